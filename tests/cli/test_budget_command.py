"""`adavit-export --budgets`, `adavit-run --budget` and `--latency-ms`, end to end."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cases import (
    assert_same_policy,
    invoke,
    picture,
    pictures_in,
    quiet,
    random_images,
    read_config,
    refusal,
    tiny,
    write_config,
)

import adavit
from adavit.bundle.bundle import Bundle
from adavit.bundle.operating_points import Budgets
from adavit.bundle.statistics import policies_of
from adavit.cli import export, run
from adavit.measure import latency
from adavit.runtime import Policy

SHORT = ("--iterations", 2, "--warmup", 1, "--threads", 1, "--json", "-")


def point(budget: float, offset: float) -> dict[str, Any]:
    offsets = dict.fromkeys(("tokens", "heads", "sublayers"), offset)
    return {"budget": budget, "offsets": offsets, "measured": {"macs": budget}}


@pytest.fixture
def dialled(bundle: Path) -> Path:
    """A bundle with operating points from nothing to everything."""
    points = [point(0.1, -1000.0), point(0.5, 0.0), point(1.0, 1000.0)]
    write_config(bundle, {**read_config(bundle), "budgets": {"points": points, "calibration": {}}})
    return bundle


@pytest.fixture(autouse=True)
def _briefly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency, "SECONDS", 0.05)


def report(*arguments: object) -> dict[str, Any]:
    done = invoke(run, *arguments, *SHORT)
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def test_a_budget(dialled: Path, labelled: Path, tmp_path: Path) -> None:
    recorded = tmp_path / "policy.npz"
    values = report(dialled, "--images", labelled, "--budget", 0.3, "--record-policy", recorded)
    assert values["budget"] == {"macs": 0.3, "offsets": {"tokens": -500.0, "heads": -500.0, "sublayers": -500.0}}
    assert_same_policy(Policy.load(recorded)[:1], drops_all())
    values = report(dialled, "--images", labelled, "--budget", "1", "--profile")  # a profile is of the budget too
    assert values["macs"]["executed_mean"] == values["macs"]["dense"]
    assert values["profile"] is not None
    assert report(dialled, "--images", labelled)["budget"] is None


def drops_all() -> Policy:
    policy = Policy.dense(tiny(), 1)
    policy.tokens[..., 1:] = policy.heads[:, 1:] = policy.sublayers[:, 1:] = False
    return policy


def test_the_budget_is_shown(dialled: Path) -> None:
    shown = invoke(run, dialled, *SHORT[:-2], "--budget", "0.75").stdout
    assert "budget      75.0% of the dense MACs, on average" in shown


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[float]], None]:
    """Stands for the clock: what the three points take, by their offsets."""

    def take(milliseconds: list[float]) -> None:
        times = dict(zip((-1000.0, 0.0, 1000.0), milliseconds, strict=True))
        monkeypatch.setattr(latency, "time_run", lambda run: times[run.keywords["budget"].tokens])
        monkeypatch.setattr(latency, "SECONDS", 1e-9)

    return take


@pytest.mark.parametrize(
    ("asked", "budget"), [(2, 0.1), (3, 0.3), (4, 0.5), (7, 1.0)], ids=["least", "between", "a point", "most"]
)
def test_a_latency(asked: float, budget: float, dialled: Path, clock: Callable[[list[float]], None]) -> None:
    clock([2.0, 4.0, 7.0])
    values = report(dialled, "--latency-ms", asked)
    assert values["budget"]["macs"] == pytest.approx(budget)
    macs = adavit.load(dialled, threads=1, budget=values["budget"]["macs"]).offsets
    assert values["budget"]["offsets"]["tokens"] == macs.tokens


def test_a_latency_out_of_range(dialled: Path, clock: Callable[[list[float]], None]) -> None:
    clock([2.0, 1.5, 7.0])  # the second is noise
    for asked in (1.9, 7.1):
        message = refusal(invoke(run, dialled, *SHORT, "--latency-ms", asked, "--batch", 2))
        assert f"a latency of {asked:g} ms is out of range: with batch 2 and 1 threads" in message
        assert "take 2.00 to 7.00 ms on this machine" in message


@pytest.mark.parametrize(("asked", "budget"), [(2, 0.5), (4.5, 0.75), (7, 1.0)])
def test_a_larger_budget_that_seems_faster_is_noise(
    asked: float, budget: float, dialled: Path, clock: Callable[[list[float]], None]
) -> None:
    clock([2.0, 1.5, 7.0])
    assert report(dialled, "--latency-ms", asked)["budget"]["macs"] == pytest.approx(budget)


def test_a_latency_is_timed_here(dialled: Path, labelled: Path) -> None:
    """Whatever this machine does: between the slowest and the fastest point there is a budget."""
    message = refusal(invoke(run, dialled, *SHORT, "--images", labelled, "--latency-ms", 1e9))
    fastest, slowest = (float(word) for word in message.split("take ")[1].split(" ms")[0].split(" to "))
    assert 0 < fastest <= slowest
    done = invoke(run, dialled, *SHORT, "--images", labelled, "--latency-ms", (fastest + slowest) / 2)
    if done.exit_code == 0:  # a second timing may differ from the first
        assert 0.1 <= json.loads(done.stdout)["budget"]["macs"] <= 1.0


def test_points_take_turns_on_all_images(dialled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a point takes is the median of its runs, at its own offsets, but for the first."""
    runtime, images = adavit.load(dialled, threads=1), random_images(tiny(), 5)
    assert runtime.budgets is not None
    ran: dict[float, list[np.ndarray]] = {0.1: [], 0.5: [], 1.0: []}

    def timed(run: Any) -> float:
        budget = {-1000.0: 0.1, 0.0: 0.5, 1000.0: 1.0}[run.keywords["budget"].tokens]
        ran[budget].append(run.args[0])
        return 1e9 if len(ran[budget]) < 2 else 100 * budget + len(ran[budget])

    monkeypatch.setattr(latency, "time_run", timed)
    monkeypatch.setattr(latency, "SECONDS", 1e-9)
    found = latency.budget_for_latency(runtime, runtime.budgets, images, 2, 35.0, quiet)
    assert {len(given) for given in ran.values()} == {latency.ROUNDS + 1}
    middle = 1.5 + latency.ROUNDS / 2  # of 2 to ROUNDS + 1, which is added to each
    assert found == pytest.approx(np.interp(35 - middle, [10, 50, 100], [0.1, 0.5, 1.0]))
    for given in ran.values():
        np.testing.assert_array_equal(np.concatenate(given)[:6], images[[0, 1, 2, 3, 4, 0]])


def test_few_of_many_points_are_timed(dialled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[float] = []

    def time_of(run: Any) -> float:
        timed.append(run.keywords["budget"].tokens)
        return 100 + timed[-1]

    monkeypatch.setattr(latency, "time_run", time_of)
    monkeypatch.setattr(latency, "SECONDS", 1e-9)
    points = [point(0.01 * n, float(n - 50)) for n in range(1, 101)]
    budgets = Budgets.from_dict({"points": points, "calibration": {}}, tiny().depth)
    runtime = adavit.load(dialled, threads=1)
    found = latency.budget_for_latency(runtime, budgets, random_images(tiny(), 1), 1, 100.5, quiet)
    assert found == pytest.approx(0.505)
    assert len(set(timed)) == latency.TIMED
    assert (min(timed), max(timed)) == (-49, 50)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--budget", "0.4", "--latency-ms", "9"], "give one of --budget, --latency-ms and --replay-policy"),
        (["--budget", "0.4", "--replay-policy", "x.npz"], "give one of --budget, --latency-ms and --replay-policy"),
        (["--budget", "much"], "'much' is not a valid float"),
        (["--latency-ms", "0"], "0.0 is not in the range"),
        (["--latency-ms", "-3"], "-3.0 is not in the range"),
        (["--latency-ms", "nan"], "nan is not a finite number"),
        (["--budget", "nan"], "nan is not a finite number"),
        (["--budget", "0"], "0.0 is not in the range"),
        (["--budget", "40"], "40.0 is not in the range"),
    ],
)
def test_usage(arguments: list[str], message: str, dialled: Path) -> None:
    assert message.lower() in refusal(invoke(run, dialled, *arguments), code=2).lower()


def test_budgets_that_cannot_be_had(dialled: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    picture().save(tmp_path / "a.png")
    for arguments, message in (
        ([dialled, "--budget", "0.05"], "budget 0.05 is out of range: this bundle's go from 0.1 to 1 of the dense"),
        ([tiny_bundle, "--budget", "0.4"], "has no operating points; add them with adavit-export"),
        ([tiny_bundle, "--latency-ms", "4", "--images", tmp_path], "has no operating points"),
    ):
        assert message in refusal(invoke(run, *arguments, *SHORT))


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """16 pictures."""
    return pictures_in(tmp_path_factory.mktemp("photos"), 16)


def test_exporting_with_budgets(checkpoint: Path, photos: Path, labelled: Path, tmp_path: Path) -> None:
    """The trained policy of a random model and images takes a budget of its own, which an export finds out."""
    target = tmp_path / "bundle"
    arguments = (checkpoint, "--output", target, "--threads", 1, "--calibration-images", photos)
    done = invoke(export, *arguments, "--budgets", "0.99,1", "--json", "-")
    assert done.exit_code == 0, done.output
    points = json.loads(done.stdout)["budgets"]["points"]
    assert {0.99, 1.0} < {point["budget"] for point in points}
    assert points == read_config(target)["budgets"]["points"]
    trained = next(point for point in points if not any(point["offsets"].values()))
    values = report(target, "--images", photos, "--budget", trained["budget"])
    assert values["macs"] == report(target, "--images", photos)["macs"]
    assert trained["measured"]["macs"] == pytest.approx(values["macs"]["executed_mean"] / values["macs"]["dense"])
    more = ("--calibration-images", photos, "--calibration-images", labelled)
    fewer = ("--budgets", "1", "--budget-images", 16, *more)
    shown = invoke(export, target, *fewer, "--threads", 1).stdout
    assert read_config(target)["budgets"]["calibration"]["images"] == 16
    assert "(trained)" in shown  # and the points of before are replaced
    assert 0.99 not in {point["budget"] for point in read_config(target)["budgets"]["points"]}


def test_statistics_are_added_to_a_bundle(bundle: Path, photos: Path, tmp_path: Path) -> None:
    before, pictures = read_config(bundle), tmp_path / "pictures"
    assert "statistics" not in before
    shutil.copytree(photos, pictures)
    (pictures / "broken.png").write_bytes(b"")
    done = invoke(export, bundle, "--calibration-images", pictures, "--threads", 1)
    assert done.exit_code == 0, done.output
    assert "statistics  of 16 images; 1 could not be read" in done.stdout
    after = read_config(bundle)
    assert {name: after[name] for name in before} == before
    assert after.keys() - before.keys() == {"statistics", "capacity_quantile"}
    (policies,) = policies_of(Bundle.open(bundle))
    runtime = adavit.load(bundle, threads=1)
    wanted = runtime.run(np.stack([runtime.preprocess(path) for path in sorted(photos.iterdir())])).policy
    assert_same_policy(policies, wanted)
    done = invoke(export, bundle, "--calibration-images", photos, "--threads", 1, "--json", "-")
    assert json.loads(done.stdout)["statistics"] == {"images": 16, "skipped": 0}


def test_statistics_that_cannot_be_added(bundle: Path, plain: tuple[Path, Path], photos: Path, tmp_path: Path) -> None:
    before = read_config(bundle)
    assert "no such image or folder" in refusal(invoke(export, bundle, "--calibration-images", tmp_path / "no"))
    given = ("--calibration-images", photos, "--precision", "int8")
    assert "to add to a BUNDLE, leave out --precision" in refusal(invoke(export, bundle, *given), code=2)
    assert "this model has no policies" in refusal(invoke(export, plain[0], "--calibration-images", photos))
    assert read_config(bundle) == before


def test_exports_whose_budgets_are_refused(checkpoint: Path, bundle: Path, photos: Path, tmp_path: Path) -> None:
    target = tmp_path / "new"
    before = read_config(bundle)
    for arguments, code, message in (
        (["--budgets", "some"], 2, "'some' is no list of shares such as 0.3,0.5"),
        (["--budgets", "0.3,"], 2, "is no list of shares"),
        (["--budgets", "0.3"], 2, "--budgets needs --calibration-images"),
        (["--budgets", "0.3", "--budget-images", "9", "--calibration-images", photos], 2, "9 are too few"),
        (["--budgets", "0.3", "--budget-images", "some"], 2, "'some' is not a valid integer"),
        (["--budgets", "30", "--calibration-images", photos], 2, "30 is no share of the dense MACs"),
        (["--budgets", "nan", "--calibration-images", photos], 2, "nan is no share of the dense MACs"),
        (["--budgets", "0.5,0.5", "--calibration-images", photos], 2, "a budget is given twice"),
        (["--budgets", "0.0001", "--calibration-images", photos], 1, "out of reach"),
        (["--budgets", "0.5", "--calibration-images", tmp_path / "no"], 1, "no such image or folder"),
    ):
        assert message in refusal(invoke(export, checkpoint, "--output", target, "--no-verify", *arguments), code)
        assert message in refusal(invoke(export, bundle, *arguments), code)
        assert not target.exists()
    given = ("--budgets", "0.5", "--calibration-images", photos, "--output", target)
    assert "leave out --output and --check" in refusal(invoke(export, bundle, *given), code=2)
    unasked = refusal(invoke(export, checkpoint, "--output", target, "--budget-images", 64), code=2)
    assert "--budget-images is of --budgets; give them too" in unasked
    for ignored in (("--precision", "int8"), ("--no-dense",), ("--labels", photos)):
        line = refusal(invoke(export, bundle, *given[:4], *ignored), code=2)
        assert f"to add to a BUNDLE, leave out --{ignored[0][2:].replace('no-', 'with-')}" in line
    assert read_config(bundle) == before
    assert not target.exists()
