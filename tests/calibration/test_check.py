"""What an export in another precision says of the bundle that it writes, beside its fp32 graphs."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from cases import invoke, pictures_in, quiet, random_model, save, tiny, with_weights

import adavit
from adavit.calibration import check
from adavit.calibration.check import check_converted
from adavit.cli import export
from adavit.console_precision import checked_lines
from adavit.errors import VerificationError
from adavit.runtime import Runtime
from adavit.runtime.image_files import ImageFile, find_images

pytest.importorskip("modelopt", reason="pip install 'adavit[int8]' to convert engines")

Calibrated = Callable[[str], tuple[Path, dict]]


@pytest.fixture(scope="module")
def fp32(calibrated: Calibrated) -> Runtime:
    return adavit.load(calibrated("fp32")[0], threads=1)


@pytest.fixture(scope="module")
def files(pictures: Path) -> list[ImageFile]:
    return find_images([pictures], None)


def test_the_report_of_an_export(calibrated: Calibrated) -> None:
    assert calibrated("fp32")[1]["checked"] is None
    report = calibrated("int8")[1]
    assert report["verified"]["precision"] == "fp32"
    checked = report["checked"]
    assert (checked["input"], checked["images"], checked["accuracy"]) == ("calibration images", 32, None)
    assert (checked["differs"], checked["free"]["flipped"] > 0) == (False, True)
    assert checked["free"]["mean_logit_difference"] > 0
    assert "calibration" in report and "checked" not in report["calibration"]


def test_the_lines_of_an_export(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    source = save(random_model(tiny(depth=2, head_policy=False), sublayers=2.0), tmp_path / "model.safetensors")
    arguments = (source, "--precision", "fp16", "--threads", 1, "--force", "-o", tmp_path / "bundle")
    done = invoke(export, *arguments, "--calibration-images", pictures_in(tmp_path / "photos", 16))
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert not [line for line in lines if line.startswith("verified")]
    assert [line for line in lines if line.startswith("fp32 graphs 4 images: ") and "decisions identical" in line]
    assert [line for line in lines if line.startswith("fp16        16 calibration images, against fp32: ")]
    cache = ("--calibration-cache", tmp_path / "bundle.calibration.npz")
    done = invoke(export, *arguments, *cache, "--json", "-")
    assert json.loads(done.stdout)["checked"]["input"] == "random images"
    done = invoke(export, *arguments, *cache, "--no-verify", "--json", "-")
    report = json.loads(done.stdout)
    assert report["verified"] is report["checked"] is None


def test_labelled_images_give_accuracy(calibrated: Calibrated, fp32: Runtime, files: list[ImageFile]) -> None:
    labelled = [replace(file, label=place % 5, by="name") for place, file in enumerate(files[:10])]
    report = check_converted(fp32, calibrated("int8")[0], labelled, quiet)
    assert report["labelled"] == 10
    (line,) = checked_lines("int8", report)
    assert "10 calibration images" in line and "accuracy" in line and "(fp32: " in line


def test_no_more_images_run_than_tell_enough(
    calibrated: Calibrated, fp32: Runtime, files: list[ImageFile], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check, "MOST_IMAGES", 5)
    assert check_converted(fp32, calibrated("int8")[0], files, quiet)["images"] == 5


def test_a_bundle_that_decides_differently_is_warned_of(
    calibrated: Calibrated, fp32: Runtime, files: list[ImageFile], tmp_path: Path
) -> None:
    bundle = shutil.copytree(calibrated("int8")[0], tmp_path / "bundle")
    for block in range(fp32.architecture.depth):
        with_weights(bundle, f"blocks.{block}.decide", 100.0)
    report = check_converted(fp32, bundle, files[:8], quiet)
    assert report["differs"] and report["free"]["flipped"] > check.MOST_FLIPPED
    line, warning = checked_lines("int8", report)
    assert line.startswith("int8        8 calibration images")
    assert warning.startswith("warning     the int8 bundle decides differently")


@pytest.mark.parametrize("engine", ["head", "dense"])
def test_what_is_not_finite_fails(
    engine: str, calibrated: Calibrated, fp32: Runtime, files: list[ImageFile], tmp_path: Path
) -> None:
    bundle = shutil.copytree(calibrated("int8")[0], tmp_path / "bundle")
    with_weights(bundle, engine, float("inf"), "head.bias")
    with pytest.raises(VerificationError, match=r"converted bundle .*NaN, infinite"):
        check_converted(fp32, bundle, files[:2], quiet)
