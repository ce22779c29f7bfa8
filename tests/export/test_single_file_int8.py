"""Single files in int8: calibrated for the file, at the budgets that it is for, and compared with fp32."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from cases import DENSE, WIDE, export, invoke, pictures_in, random_images, random_model, refusal, with_weights
from onnx import numpy_helper
from single_cases import run, with_budgets, write

import adavit
from adavit import cli
from adavit.architecture import Architecture
from adavit.bundle.operating_points import Offsets
from adavit.bundle.policy import KINDS
from adavit.runtime import Policy

BUDGETS = (None, 0.3, 0.5, 0.9)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pictures_in(tmp_path_factory.mktemp("pictures"), 20)


@pytest.fixture(scope="module")
def both(busy: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle in fp32 and int8."""
    folder = tmp_path_factory.mktemp("both") / "bundle"
    adavit.export_bundle(busy, folder, precision="fp32,int8", calibration_images=pictures, threads=1, verify=False)
    return folder


@pytest.fixture(scope="module")
def plain(both: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle in fp32 alone, with operating points; not to be changed."""
    folder = shutil.copytree(both, tmp_path_factory.mktemp("plain") / "bundle")
    config = json.loads((folder / "config.json").read_text())
    del config["precisions"]["int8"]
    (folder / "config.json").write_text(json.dumps(config))
    shutil.rmtree(folder / "int8")
    return with_budgets(folder)


def scales(path: Path) -> dict[str, float]:
    """Of what linear layers read."""
    weights = {one.name: one for one in onnx.load(path).graph.initializer}
    found = {name: float(numpy_helper.to_array(one)) for name, one in weights.items() if name.endswith("input_scale")}
    assert len(found) > 2 * WIDE.depth
    return found


def dispatched(policies: list[Policy], arch: Architecture) -> dict[str, tuple[int, int]]:
    """How many images reach each sub-layer in any of their policies, and with how many tokens in all."""
    found = {}
    for block in range(arch.depth):
        for place, part in enumerate(("attention", "mlp")):
            reached = [policy.sublayers[:, block, place] & policy.heads[:, block].any(1) for policy in policies]
            tokens = [policy.tokens[mask, block].sum() for policy, mask in zip(policies, reached, strict=True)]
            found[f"blocks.{block}.{part}"] = int(np.any(reached, 0).sum()), int(sum(tokens))
    return found


def test_at_the_trained_policy_it_is_the_bundles_int8(both: Path, busy: Path, pictures: Path, tmp_path: Path) -> None:
    own = write(both, tmp_path / "own.onnx", precision="int8")
    assert (own["calibration"], own["notes"]) == (None, [])
    assert own["checked"]["input"] == "random images"
    for name, source in (("again", both), ("checkpoint", busy)):
        report = write(source, tmp_path / f"{name}.onnx", precision="int8", calibration_images=pictures)
        assert (tmp_path / f"{name}.onnx").read_bytes() == (tmp_path / "own.onnx").read_bytes()
        assert report["calibration"]["int8"]["images"] == 20
        checked = report["checked"]
        assert (checked["input"], checked["differs"]) == ("calibration images", False)
        (point,) = checked["points"]
        assert (point["images"], point["budget"], point["accuracy"]) == (20, None, None)
        assert 0 < point["free"]["flipped"] < 0.1


@pytest.mark.parametrize("options", [{"budget": 0.3}, {"budget_input": True}], ids=str)
def test_a_budgets_own_policies_are_calibrated_on(
    options: dict[str, Any], plain: Path, pictures: Path, tmp_path: Path
) -> None:
    runtime = adavit.load(plain, threads=1, specialise=False)
    images = np.stack([runtime.preprocess(path) for path in sorted(pictures.iterdir())])
    budgets = BUDGETS if options.get("budget_input") else (0.3,)
    policies = [runtime.run(images, budget=budget).policy for budget in budgets]
    given = {"precision": "int8", "calibration_images": pictures, "with_policy": True}
    report = write(plain, tmp_path / "model.onnx", **given, **options)
    seen = report["calibration"]["int8"]["sublayers"]
    wanted = dispatched(policies, WIDE)
    assert {name: (found["samples"], found["tokens"]) for name, found in seen.items()} == wanted
    assert wanted != dispatched([runtime.run(images).policy], WIDE)
    assert [point["budget"] for point in report["checked"]["points"]] == list(budgets)
    write(plain, tmp_path / "trained.onnx", precision="int8", calibration_images=pictures)
    assert scales(tmp_path / "model.onnx") != scales(tmp_path / "trained.onnx")


def test_what_is_compared_is_what_the_file_does(plain: Path, pictures: Path, tmp_path: Path) -> None:
    given = {"precision": "int8", "calibration_images": pictures, "budget_input": True, "with_policy": True}
    report = write(plain, tmp_path / "model.onnx", **given)
    runtime = adavit.load(plain, threads=1, specialise=False)
    images = np.stack([runtime.preprocess(path) for path in sorted(pictures.iterdir())])
    for point in report["checked"]["points"]:
        wanted = runtime.run(images, budget=point["budget"] or Offsets())
        found = run(tmp_path / "model.onnx", images, [point["budget"] or 0] * 20)
        flipped = sum(int((found[kind] != getattr(wanted.policy, kind)).sum()) for kind in KINDS)
        decisions = 20 * (WIDE.depth * WIDE.patches + (WIDE.depth - WIDE.keep) * (WIDE.heads + 2))
        assert point["free"]["flipped"] == pytest.approx(flipped / decisions, abs=1e-3)
        same = (found["logits"].argmax(1) == wanted.logits.argmax(1)).mean()
        assert point["free"]["top1_agreement"] == pytest.approx(same, abs=0.06)


def test_starved_sublayers_stay_in_fp16(
    plain: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("adavit.calibration.convert.MIN_SAMPLES", 1000)
    report = write(plain, tmp_path / "model.onnx", precision="int8", calibration_images=pictures)
    kept = report["calibration"]["int8"]["kept_higher"]
    assert {found["precision"] for found in kept.values()} == {"fp16"}
    assert np.isfinite(run(tmp_path / "model.onnx", random_images(WIDE, 2))["logits"]).all()


def test_a_cache_of_ranges(plain: Path, pictures: Path, tmp_path: Path) -> None:
    cache = tmp_path / "ranges.npz"

    def calibrated(*images: Path, **options: Any) -> dict[str, Any]:
        path = tmp_path / "model.onnx"
        report = write(
            plain, path, precision="int8", calibration_cache=cache, calibration_images=images, force=True, **options
        )
        found: dict[str, Any] = report["calibration"]["int8"]
        return found | {"input": report["checked"]["input"]}

    first = calibrated(pictures, budget=0.3)
    assert (first["reused"], first["cache"]) == (False, str(cache))
    assert calibrated(pictures, budget=0.3)["reused"]
    alone = calibrated(budget=0.3, method="percentile")
    assert (alone["reused"], alone["method"], alone["input"]) == (True, "percentile", "random images")
    with pytest.raises(
        adavit.InputError, match=r"ranges\.npz: calibrated at another budget; give `calibration_images`"
    ):
        calibrated()
    assert not calibrated(pictures, budget=0.5)["reused"]


def test_a_file_that_decides_differently_is_told(both: Path, tmp_path: Path) -> None:
    bundle = shutil.copytree(both, tmp_path / "bundle")
    with_weights(bundle, "select.mlp_head.bias", 100.0, "int8")
    done = invoke(cli.export, bundle, "--single-file", tmp_path / "m.onnx", "--precision", "int8", "--threads", 1)
    assert done.exit_code == 0, done.output
    assert [
        line for line in done.stdout.splitlines() if line.startswith("int8        16 random images, against fp32: ")
    ]
    assert "warning     int8 decides differently from fp32; calibrate on more images" in done.stdout


def test_a_bundle_without_fp32(busy: Path, pictures: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    adavit.export_bundle(busy, bundle, precision="int8", calibration_images=pictures, threads=1, verify=False)
    arguments = bundle, "--single-file", tmp_path / "m.onnx", "--precision", "int8", "--threads", 1
    done = invoke(cli.export, *arguments)
    assert done.exit_code == 0, done.output
    assert "note: " in done.stderr and "has no fp32, so the decisions of the file are not compared" in done.stderr
    line = refusal(invoke(cli.export, *arguments, "--force", "--calibration-images", pictures))
    assert "is in int8: int8 is calibrated from fp32; give the checkpoint" in line


def test_the_command_calibrates_a_checkpoint(checkpoint: Path, pictures: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    given = "--single-file", path, "--precision", "int8", "--calibration-images", pictures, "--threads", 1
    done = invoke(cli.export, checkpoint, *given, "--budgets", "0.3,0.5", "--budget-images", 16, "--budget-input")
    assert (done.exit_code, done.stderr) == (0, ""), done.output
    lines = done.stdout.splitlines()
    assert "int8        20 calibration images, against fp32, at each budget:" in lines
    assert any(line.split()[:1] == ["trained"] for line in lines)
    assert any(line.split()[:1] == ["0.5"] for line in lines)
    assert "calibrated  on 20 images, max ranges" in lines
    beside = json.loads(path.with_suffix(".json").read_text())
    assert (beside["precision"], beside["weights"], beside["budget"]["input"]) == ("int8", "int8", True)
    assert sorted(one.name for one in tmp_path.iterdir()) == ["model.json", "model.onnx"]
    done = invoke(cli.export, checkpoint, *given, "--force", "--method", "percentile", "--json", "-", "--no-verify")
    report = json.loads(done.stdout)
    assert (report["checked"], report["calibration"]["int8"]["method"]) == (None, "percentile")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--precision", "int8"], 1, "is not in int8; give --calibration-images to calibrate the file on"),
        (["--precision", "int8", "--method", "max", "--seed", "3"], 2, "--seed is of a calibration; give --calib"),
        (["--method", "entropy"], 2, "nothing is calibrated in fp32, give a --precision or leave out --method"),
        (["--calibration-cache", "c.npz"], 2, "nothing is calibrated in fp32"),
        (["--precision", "int8", "--max-drop", "1"], 2, "to write a single file, leave out --max-drop"),
        (["--precision", "mixed"], 2, "choose from fp32, int8"),
        (["--precision", "int8", "--calibration-cache", "nowhere.npz"], 1, "nowhere.npz: no such calibration cache"),
        (["--precision", "int8", "--calibration-images", "nowhere"], 1, "nowhere: no such image or folder"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_is_refused(arguments: list[str], code: int, message: str, plain: Path, tmp_path: Path) -> None:
    done = invoke(cli.export, plain, "--single-file", tmp_path / "model.onnx", *arguments, "--threads", 1)
    assert message in refusal(done, code)
    assert not list(tmp_path.iterdir())


def test_too_few_images_and_nothing_to_calibrate(busy: Path, plain: Path, tmp_path: Path) -> None:
    (tmp_path / "few").mkdir()
    few, path = pictures_in(tmp_path / "few", 15), tmp_path / "model.onnx"
    with pytest.raises(adavit.InputError, match="at least 16 images, 15 can be read"):
        write(plain, path, precision="int8", calibration_images=few)
    with pytest.raises(
        adavit.InputError, match="`precision` int8 needs `calibration_images`, or a `calibration_cache`"
    ):
        write(busy, path, precision="int8")
    assert not path.exists()


def test_a_model_without_policies_is_not_calibrated(pictures: Path, tmp_path: Path) -> None:
    bundle = export(random_model(DENSE), tmp_path, verify=False)
    with pytest.raises(adavit.InputError, match=r"has no policies.*leave out `precision` int8"):
        write(bundle, tmp_path / "model.onnx", precision="int8", calibration_images=pictures)
