"""Plans change which engine runs, and never what is computed; tuning measures one and keeps it."""

import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cases import (
    WIDE,
    assert_same_policy,
    export,
    forced,
    invoke,
    quiet,
    random_images,
    random_model,
    random_policy,
    refusal,
    tiny,
)
from hypothesis import given, settings
from hypothesis import strategies as st

import adavit
from adavit.cli import run
from adavit.console_tune import tune_lines
from adavit.errors import InputError
from adavit.macs import dense_macs
from adavit.runtime import Runtime, staircase, timing, tune
from adavit.runtime.backend import Sizes
from adavit.runtime.plan import SETS, SUBLAYERS, EnginePlan, ruled, sizes_of
from adavit.runtime.profile import Profiler
from adavit.runtime.staircase import Staircase

pytestmark = pytest.mark.usefixtures("cache")


def random_plan(seed: int) -> EnginePlan:
    """Any choice of engines for any counts; without a head, there is none."""
    source = np.random.default_rng(seed)
    return EnginePlan.where(WIDE, lambda kind, k, h: h > 0 and bool(source.random() < 0.5))


def random_sizes(seed: int) -> dict[Sizes, float]:
    """Any frequent sizes of blocks."""
    source = np.random.default_rng(seed)
    blocks, kinds = source.integers(0, WIDE.depth, 4), source.choice(SETS, 4)
    tokens, heads = source.integers(1, WIDE.tokens + 1, 4), source.integers(1, WIDE.heads + 1, 4)
    columns = blocks.tolist(), kinds.tolist(), tokens.tolist(), heads.tolist()
    return {Sizes(*row): 0.5 for row in zip(*columns, strict=True)}


@pytest.fixture(scope="module", params=["onnxruntime", "openvino"])
def planned(request: pytest.FixtureRequest, wide: tuple[Path, Path]) -> Runtime:
    provider = "fp32" if request.param == "openvino" else None
    return adavit.load(wide[0], backend=request.param, provider=provider, threads=1)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_any_plan_computes_the_same(seed: int, planned: Runtime) -> None:
    planned.dispatcher.plan = random_plan(seed)
    images, policy = random_images(WIDE, 2, seed=seed), random_policy(WIDE, 2, seed)
    sizes = {**sizes_of(policy[:1]), **random_sizes(seed)}  # of one image, and such as none has
    planned.dispatcher.specialise((), sizes)
    assert bool(planned.dispatcher.sizes) == (planned.backend.name == "openvino")
    wanted = forced(random_model(WIDE), images, policy)
    np.testing.assert_allclose(planned.run(images, policy=policy).logits, wanted, atol=1e-4, rtol=1e-4)


def test_a_plan_is_followed(wide: tuple[Path, Path]) -> None:
    loaded = adavit.load(wide[0], threads=1)
    profiler = Profiler(loaded.bundle, loaded.backend)
    timed = Runtime(loaded.bundle, profiler, loaded.options)
    policy = adavit.Policy.dense(WIDE, 1)
    policy.heads[:, 1:, 0] = False
    for kinds in ((), ("attention",), ("mlp",), ("attention", "mlp")):
        timed.dispatcher.plan = EnginePlan.where(WIDE, lambda kind, k, h: kind in kinds and h > 0)  # noqa: B023
        with profiler.recording() as calls:
            timed.run(random_images(WIDE, 1), policy)
        ran = {call.name.split(".")[-1] for call in calls if call.name.startswith("blocks.1.")}
        assert {kind for kind in ("attention", "mlp") if f"{kind}_gather" in ran} == set(kinds)


def test_plans_survive_being_written() -> None:
    plan = replace(random_plan(1), sizes=random_sizes(1))
    again = EnginePlan.from_dict(json.loads(json.dumps(plan.to_dict())), WIDE, "a file")
    assert again == replace(plan, origin="a file")


@pytest.mark.parametrize(
    "change",
    [
        lambda plan: None,
        lambda plan: [],
        lambda plan: {"attention": plan["attention"]},
        lambda plan: {**plan, "mlp": "01"},
        lambda plan: {**plan, "mlp": plan["mlp"][1:]},
        lambda plan: {**plan, "mlp": [*plan["mlp"][1:], "0"]},
        lambda plan: {**plan, "mlp": [*plan["mlp"][1:], 0]},
        lambda plan: {**plan, "mlp": [row.replace("0", "2") for row in plan["mlp"]]},
        lambda plan: {**plan, "sizes": 1},
        lambda plan: {**plan, "sizes": [[0, "both", 1, 1]]},
        lambda plan: {**plan, "sizes": [[[0], "both", 1, 1, 0.5]]},
        lambda plan: {**plan, "sizes": [[WIDE.depth, "both", 1, 1, 0.5]]},
        lambda plan: {**plan, "sizes": [[-1, "both", 1, 1, 0.5]]},
        lambda plan: {**plan, "sizes": [[True, "both", 1, 1, 0.5]]},
        lambda plan: {**plan, "sizes": [[0, "decide", 1, 1, 0.5]]},
        lambda plan: {**plan, "sizes": [[0, "both", 0, 1, 0.5]]},
        lambda plan: {**plan, "sizes": [[0, "both", WIDE.tokens + 1, 1, 0.5]]},
        lambda plan: {**plan, "sizes": [[0, "both", 1, WIDE.heads + 1, 0.5]]},
        lambda plan: {**plan, "sizes": [[0, "both", 1, 1, "often"]]},
        lambda plan: {**plan, "sizes": [[0, "both", 1, 1, math.nan]]},
        lambda plan: {**plan, "sizes": [[0, "both", 1, 1, 0]]},
    ],
)
def test_what_is_no_plan(change: Any) -> None:
    plan = random_plan(2).to_dict()
    with pytest.raises(ValueError, match=r"has no row|has other rows|sizes are not|is no size"):
        EnginePlan.from_dict(change(plan), WIDE, "a file")


def test_the_faster_engine_is_planned() -> None:
    arch = tiny()  # 17 tokens, 3 heads
    stairs = Staircase(
        tokens=[1, 9, 17],
        masked={"attention": [1.0, 5.0, 9.0], "mlp": [3.0, 3.0, 3.0]},
        gathered={"attention": [[2.0] * 3, [4.5] * 3, [9.0] * 3], "mlp": [[2.7] * 3, [3.0] * 3, [9.0] * 3]},
        weights={"attention": [4.0, 0.0, 0.0], "mlp": [0.4, 0.0, 0.0]},
    )
    plan = stairs.plan(arch)
    for k in range(1, arch.tokens + 1):
        masked = 1 + (k - 1) / 2
        assert [row[0] for row in plan.gathers[k]] == [False, masked > 3, masked > 4.5, False], k
        assert [row[1] for row in plan.gathers[k]] == [False, True, False, False]


@pytest.mark.parametrize("kind", [0, 1], ids=["attention", "mlp"])
def test_the_rule_gathers_few_heads_of_many_tokens(kind: int) -> None:
    arch = tiny(image_size=224, patch_size=16, width=384, heads=6, hidden=1536)
    gathers = np.array(ruled(arch).gathers)[1:, 1:, kind]  # by tokens and heads, from 1
    assert gathers[-1, 0]
    assert not gathers[0].any()  # the copy costs more than it saves
    assert not gathers[:, -1].any()  # nothing to save
    assert (np.diff(gathers.astype(int), axis=0) >= 0).all()  # where it pays, it does with more tokens
    assert (np.diff(gathers.astype(int), axis=1) <= 0).all()  # and with fewer heads
    assert np.array(ruled(arch, always=True).gathers)[:, 1:].all()


def test_times_are_medians_without_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    now, taken = 0.0, {"a": iter([90.0, 4.0, 70.0, 5.0]), "b": iter([1.0, 7.0, 8.0, 3.0])}

    def run(name: str) -> None:
        nonlocal now
        now += next(taken[name]) / 1e3

    monkeypatch.setattr(timing, "perf_counter", lambda: now)
    shares: list[float] = []
    runs = {name: partial(run, name) for name in taken}
    found = timing.median_times(runs, 3, "timing", lambda stage, share: shares.append(share))
    assert found == pytest.approx({"a": 5.0, "b": 7.0})
    assert shares == [0.25, 0.5, 0.75, 1.0]


@pytest.mark.openvino
@pytest.mark.parametrize("faster", ["rule", "measured"])
def test_the_faster_plan_is_taken(faster: str, wide: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = adavit.load(wide[0], threads=1)
    heads, ones = [[1.0, 1.0]] * WIDE.heads, [1.0, 1.0]
    stairs = Staircase(
        tokens=[1, WIDE.tokens],
        masked={"attention": [2.0, 2.0], "mlp": ones},  # so that attention always gathers, and the MLP never
        gathered={"attention": heads, "mlp": heads},
        weights={"attention": [0.0] * WIDE.heads, "mlp": [0.0] * WIDE.heads},
    )
    plans = {"rule": ruled(WIDE), "measured": stairs.plan(WIDE)}
    times = {"rule": 9.0, "measured": 9.0, faster: 4.0}
    policies = {"nothing": 6.0, "tokens": 3.0, "heads": 5.0, "sublayers": 4.0}

    def timed(runs: dict[str, Any], rounds: int, stage: str, progress: Any) -> dict[str, float]:
        assert not loaded.dispatcher.specialised.sets  # whose engines follow no plan
        if stage == "comparing plans":
            for name, run in runs.items():
                run()
                assert loaded.dispatcher.plan.gathers == plans[name].gathers
            return times
        assert loaded.dispatcher.plan.gathers == plans[faster].gathers  # what policies gain is of the plan taken
        return policies

    monkeypatch.setattr(tune, "measure_staircase", lambda *_: stairs)
    monkeypatch.setattr(tune, "median_times", timed)
    loaded.specialise(adavit.Policy.dense(WIDE, 1))  # which what is tuned is not
    used = adavit.Policy.dense(WIDE, 1)
    used.heads[:, 1:, 2:] = False
    report = tune.tune(loaded, quiet, used)
    assert report["taken"] == faster
    assert report["plans_ms"] == {name: time / tune.IMAGES for name, time in times.items()}
    assert loaded.dispatcher.plan.gathers == plans[faster].gathers
    assert loaded.dispatcher.plan.origin == report["plan"]
    assert {found.heads for found in loaded.dispatcher.specialised.sets if found.block} == {(0, 1)}
    again = adavit.load(wide[0], threads=1).dispatcher.plan
    assert (again.gathers, again.origin) == (plans[faster].gathers, report["plan"])
    other = adavit.load(wide[0], threads=1, backend="openvino")
    assert other.options == loaded.options
    assert other.dispatcher.plan.origin is None  # it is of the backend that was measured
    for gain in report["gains"]:
        assert gain["speedup"] == pytest.approx(6 / policies[gain["dropped"]])
        assert gain["ideal"] == pytest.approx(1 / gain["macs"])


def test_policies_that_are_compared_drop_half_of_one_kind(wide: tuple[Path, Path]) -> None:
    loaded = adavit.load(wide[0], threads=1)
    gains = {gain["dropped"]: gain["macs"] for gain in tune.tune(loaded, quiet)["gains"]}
    for kind in ("tokens", "heads", "sublayers"):
        half = adavit.Policy.dense(WIDE, 1)
        if kind == "tokens":
            half.tokens[:, :, 1 + WIDE.patches // 2 :] = False
        elif kind == "heads":
            half.heads[:, WIDE.keep :, WIDE.heads // 2 :] = False
        else:
            half.sublayers[:, 1, 1] = half.sublayers[:, 2, 0] = False
        assert gains[kind] == pytest.approx(loaded.run(random_images(WIDE, 1), half).macs[0] / dense_macs(WIDE))


def test_what_is_timed_is_what_the_staircase_says(wide: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = adavit.load(wide[0], threads=1)
    profiler = Profiler(loaded.bundle, loaded.backend)
    timed = Runtime(loaded.bundle, profiler, loaded.options)

    def once(runs: dict[Any, Any], *_: Any) -> dict[Any, float]:
        for (kind, tokens, heads), timed_run in runs.items():
            for _ in range(2):  # what gathers weights does so every time
                with profiler.recording() as calls:
                    timed_run()
                names = [call.name for call in calls]
                assert names == [f"blocks.2.{kind}", *([] if kind.endswith("_weights") else ["fetch"])]
                assert calls[0].sizes.get("K", 0) == tokens
                assert calls[0].sizes.get("h", 0) == heads
        return {(kind, tokens, heads): 1e6 * len(kind) + 1e3 * tokens + heads for kind, tokens, heads in runs}

    monkeypatch.setattr(staircase, "median_times", once)
    found = staircase.measure_staircase(timed.dispatcher, quiet)
    for kind in ("attention", "mlp"):
        size, at = 1e6 * len(kind), np.array(found.tokens)
        np.testing.assert_array_equal(found.masked[kind], size + 1e3 * at)
        for heads in range(1, WIDE.heads + 1):
            np.testing.assert_array_equal(found.gathered[kind][heads - 1], size + 7e6 + 1e3 * at + heads)
            assert found.weights[kind][heads - 1] == size + 8e6 + heads


def test_tuning(wide: tuple[Path, Path], cache: Path, planned: Runtime) -> None:
    name = planned.backend.name
    loaded = Runtime(planned.bundle, planned.backend, planned.options)
    assert loaded.dispatcher.plan == ruled(WIDE, always=name == "openvino")
    images = random_images(WIDE, 3)
    before = loaded.run(images)
    report = tune.tune(loaded, quiet, before.policy)
    (path,) = cache.iterdir()
    assert (report["plan"], report["backend"]) == (str(path), name)
    own = "sets" if name == "onnxruntime" else "sizes"
    assert report["own_engines"] == own
    found = report["gathers"][own]
    assert found
    assert any(line.startswith(f"{own} ") and f" {len(found)} " in line for line in tune_lines(report))
    assert set(report["plans_ms"]) == ({"rule", "measured"} if name == "onnxruntime" else {"rule"})
    assert report["plans_ms"][report["taken"]] == min(report["plans_ms"].values())
    assert [gain["dropped"] for gain in report["gains"]] == ["nothing", "tokens", "heads", "sublayers"]
    assert report["gains"][0]["macs"] == report["gains"][0]["speedup"] == 1
    assert all(gain["ms"] > 0 and gain["ideal"] > 1 for gain in report["gains"][1:])
    stairs = report["staircase"]
    assert stairs["tokens"][0] == 1
    assert stairs["tokens"][-1] == WIDE.tokens
    for kind in SETS if name == "openvino" else SUBLAYERS:
        by_heads = stairs["blocks" if name == "openvino" else "gathered"][kind]
        assert len(by_heads) == WIDE.heads
        assert all(len(times) == len(stairs["tokens"]) and min(times) > 0 for times in by_heads)
    assert all(len(stairs["weights"][kind]) == WIDE.heads for kind in SUBLAYERS)
    again = Runtime(planned.bundle, planned.backend, planned.options)
    assert again.dispatcher.plan.origin == str(path)
    assert again.dispatcher.plan.to_dict() == report["gathers"]
    assert len(again.dispatcher.specialised.sets) + len(again.dispatcher.sizes) == len(found)
    after = again.run(images)
    assert_same_policy(after.policy, before.policy)
    np.testing.assert_allclose(after.logits, before.logits, atol=1e-4, rtol=0)


def test_a_damaged_plan_is_not_followed(wide: tuple[Path, Path], cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    tune.tune(adavit.load(wide[0], threads=1), quiet)
    (path,) = cache.iterdir()
    kept = json.loads(path.read_text())
    for damage in ("{", json.dumps({**kept, "measured": {"gathers": {"attention": []}}})):
        path.write_text(damage)
        caplog.clear()
        assert adavit.load(wide[0], threads=1).dispatcher.plan == ruled(WIDE)
        assert str(path) in caplog.text
    path.write_text(json.dumps(kept))
    assert adavit.load(wide[0], threads=1).dispatcher.plan.origin == str(path)
    assert adavit.load(wide[0], threads=2).dispatcher.plan.origin is None


def test_where_nothing_can_be_kept(wide: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file, not a folder")
    loaded = adavit.load(wide[0], threads=1)
    report = tune.tune(loaded, quiet)
    assert report["plan"] is None
    assert loaded.dispatcher.plan.to_dict() == report["gathers"]


@pytest.mark.openvino
def test_no_heads_to_decide_on(tmp_path: Path) -> None:
    bundle = export(random_model(tiny(head_policy=False)), tmp_path)
    with pytest.raises(InputError, match="no engines to choose between"):
        tune.tune(adavit.load(bundle, threads=1), quiet)
    loaded = adavit.load(bundle, "openvino", 1, "fp32")
    report = tune.tune(loaded, quiet, loaded.run(random_images(loaded.architecture, 2)).policy)
    assert report["gathers"]["sizes"]
    assert report["staircase"]["heads"] == [loaded.architecture.heads]
    assert any(line.startswith("17 tokens") for line in tune_lines(report))


def test_the_command(wide: tuple[Path, Path], tmp_path: Path) -> None:
    bundle, threads = wide[0], ("--threads", 1)
    done = invoke(run, "--tune", bundle, *threads, "--json", tmp_path / "tuned.json")
    assert (done.exit_code, done.stderr) == (0, "")
    for part in ("attention, ms", "MLP, ms", "3 gathered", "145 tokens", "new set of heads", "sublayers", "is taken"):
        assert part in done.stdout
    report = json.loads((tmp_path / "tuned.json").read_text())
    ran = invoke(run, bundle, *threads, "--iterations", 1, "--json", tmp_path / "ran.json")
    assert f"tuned on this machine: {report['plan']}" in ran.stdout
    assert json.loads((tmp_path / "ran.json").read_text())["plan"] == report["plan"]
    message = refusal(invoke(run, "--tune", bundle, "--budget", 0.5), code=2)
    assert "--tune measures by itself, without --budget" in message
    (tmp_path / "empty").mkdir()
    assert "holds no image file" in refusal(invoke(run, "--tune", bundle, "--images", tmp_path / "empty"))
