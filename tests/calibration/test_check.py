"""What an export in other precisions says of them, beside fp32."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from cases import invoke, pictures_in, quiet, random_model, save, tiny, with_weights

import adavit
from adavit.calibration import check
from adavit.calibration.check import check_converted
from adavit.cli import export
from adavit.datasets.image_files import ImageFile, find_images
from adavit.errors import VerificationError
from adavit.runtime import Runtime


@pytest.fixture
def runtime(converted: Path, tmp_path: Path) -> Runtime:
    """A copy of the bundle in fp32."""
    copy = shutil.copytree(converted, tmp_path / "copy")
    return adavit.load(copy, threads=1, precision="fp32", specialise=False)


@pytest.fixture(scope="module")
def files(pictures: Path) -> list[ImageFile]:
    return find_images([pictures], None)


def test_the_report_of_an_export(calibrated: tuple[Path, dict]) -> None:
    report = calibrated[1]
    assert report["verified"]["precision"] == "fp32"
    assert set(report["calibration"]) == {"fp16", "int8"}
    for found in report["calibration"].values():
        checked = found["checked"]
        assert (checked["input"], checked["images"], checked["accuracy"]) == ("calibration images", 32, None)
        assert checked["differs"] is False
        assert checked["free"]["mean_logit_difference"] > 0
    assert report["calibration"]["int8"]["checked"]["free"]["flipped"] > 0


def test_the_lines_of_an_export(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    source = save(random_model(tiny(depth=2, head_policy=False), sublayers=2.0), tmp_path / "model.safetensors")
    arguments = (source, "--precision", "fp16,int8", "--threads", 1, "--force", "-o", tmp_path / "bundle")
    done = invoke(export, *arguments, "--calibration-images", pictures_in(tmp_path / "photos", 16))
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert [line for line in lines if line.startswith("fp32 graphs 4 images: ") and "decisions identical" in line]
    for name in ("fp16", "int8"):
        assert [line for line in lines if line.startswith(f"{name}        16 calibration images, against fp32: ")]
    cache = ("--calibration-cache", tmp_path / "bundle.calibration.npz")
    done = invoke(export, *arguments, *cache, "--json", "-")
    assert json.loads(done.stdout)["calibration"]["int8"]["checked"]["input"] == "random images"
    done = invoke(export, *arguments, *cache, "--no-verify", "--json", "-")
    report = json.loads(done.stdout)
    assert report["verified"] is None
    assert not [found for found in report["calibration"].values() if "checked" in found]


def test_labelled_images_give_accuracy(runtime: Runtime, files: list[ImageFile]) -> None:
    labelled = [replace(file, label=place % 5, by="name") for place, file in enumerate(files[:10])]
    report = check_converted(runtime, "int8", labelled, quiet)
    assert report["labelled"] == report["images"] == 10
    assert set(report["accuracy"]) == {"first", "second", "replayed"}


def test_no_more_images_run_than_tell_enough(
    runtime: Runtime, files: list[ImageFile], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check, "MOST_IMAGES", 5)
    assert check_converted(runtime, "int8", files, quiet)["images"] == 5


def test_a_precision_that_decides_differently_is_told(runtime: Runtime, files: list[ImageFile]) -> None:
    with_weights(runtime.bundle.path, "select.mlp_head.bias", 100.0, "int8")
    report = check_converted(runtime, "int8", files[:8], quiet)
    assert report["differs"] and report["free"]["flipped"] > check.MOST_FLIPPED


@pytest.mark.parametrize("weights", ["head.bias", "blocks.0.mlp.fc2.bias"])
def test_what_is_not_finite_fails(weights: str, runtime: Runtime, files: list[ImageFile]) -> None:
    with_weights(runtime.bundle.path, weights, float("inf"), "int8")
    with pytest.raises(VerificationError, match=r"does not run as it should in int8: .*NaN, infinite"):
        check_converted(runtime, "int8", files[:2], quiet)
