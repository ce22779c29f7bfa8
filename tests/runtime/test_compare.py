"""Decision parity: `adavit-run --compare`."""

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from cases import WIDE, export, invoke, pictures_in, random_model, refusal, rewrite_engine
from onnx import numpy_helper

import adavit
from adavit.cli import run


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pictures_in(tmp_path_factory.mktemp("photos"), 10)


@pytest.fixture(scope="module")
def shifted(wide: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wide bundle, its block 1 deciding otherwise on heads, and its classes moved."""
    bundle = shutil.copytree(wide[0], tmp_path_factory.mktemp("shifted") / "bundle")
    for engine, weight, shift in (("blocks.1.decide", "choices.bias", 0.5), ("head", "head.bias", 0.01)):
        model = onnx.load(bundle / f"onnx/{engine}.onnx")
        value = next(value for value in model.graph.initializer if value.name == weight)
        changed = numpy_helper.to_array(value) + np.float32(shift)
        if engine != "head":
            changed[WIDE.heads :] -= np.float32(shift)  # sub-layers as they were
        value.CopyFrom(numpy_helper.from_array(changed, weight))
        rewrite_engine(bundle, engine, model.SerializeToString())
    return bundle


def compared(*arguments: object) -> dict:
    done = invoke(run, "--compare", *arguments, "--threads", 1, "--json", "-")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def test_a_bundle_agrees_with_itself(wide: tuple[Path, Path], photos: Path) -> None:
    report = compared(wide[0], wide[0], "--images", photos)
    assert report["free"]["flipped"] == report["replayed"]["flipped"] == 0
    assert report["free"]["identical_policies"] == report["free"]["top1_agreement"] == 1
    assert report["free"]["mean_logit_difference"] == 0
    assert (report["images"], report["accuracy"]) == (10, None)
    decided = {kind: values["decisions"] for kind, values in report["decisions"].items()}
    adapted = WIDE.depth - WIDE.keep
    assert decided == {
        "tokens": 10 * WIDE.depth * WIDE.patches, "heads": 10 * adapted * WIDE.heads, "sublayers": 10 * adapted * 2,
    }  # fmt: skip


def test_blocks_that_are_skipped(photos: Path, tmp_path: Path) -> None:
    bundle = export(random_model(WIDE, sublayers=-2.0), tmp_path)
    loaded = adavit.load(bundle, threads=1)
    images = np.stack([loaded.preprocess(path) for path in sorted(photos.iterdir())])
    assert (~loaded.run(images).policy.sublayers.any(2)).any()
    report = compared(bundle, bundle, "--images", photos)
    assert report["free"]["flipped"] == report["replayed"]["flipped"] == 0
    assert report["free"]["identical_policies"] == 1


def test_flips_are_counted_where_they_happen(wide: tuple[Path, Path], shifted: Path, photos: Path) -> None:
    report = compared(wide[0], shifted, "--images", photos)
    first, second = (adavit.load(bundle, threads=1) for bundle in (wide[0], shifted))
    images = np.stack([first.preprocess(path) for path in sorted(photos.iterdir())])
    wanted, found = first.run(images).policy, second.run(images).policy
    for kind in ("tokens", "heads", "sublayers"):
        different = (getattr(wanted, kind) != getattr(found, kind)).sum()
        share = different / report["decisions"][kind]["decisions"]
        assert report["free"]["flipped_by_kind"][kind] == pytest.approx(share)
    replayed = report["replayed"]
    assert replayed["flipped_by_kind"]["heads"] > 0
    assert replayed["flipped_by_kind"]["tokens"] == replayed["flipped_by_kind"]["sublayers"] == 0
    assert [share > 0 for share in replayed["flipped_by_block"]["heads"]] == [False, True, False]
    assert replayed["mean_logit_difference"] == pytest.approx(0.01, abs=1e-4)
    assert report["decisions"]["heads"]["logit_drift_max"] == pytest.approx(0.5, abs=1e-4)
    assert report["decisions"]["heads"]["largest_flipped_margin"] <= 0.5
    same = [all((getattr(wanted, k)[i] == getattr(found, k)[i]).all() for k in ("tokens", "heads")) for i in range(10)]
    assert report["free"]["identical_policies"] <= np.mean(same)


def test_margins_are_cumulative_shares(wide: tuple[Path, Path], photos: Path) -> None:
    for kind in compared(wide[0], wide[0], "--images", photos)["decisions"].values():
        shares = list(kind["margins_below"].values())
        assert shares == sorted(shares) and shares[0] >= 0 and 0 < shares[-1] <= 1


def test_labelled_folders_give_accuracy(tiny_bundle: Path, labelled: Path) -> None:
    report = compared(tiny_bundle, tiny_bundle, "--images", labelled)
    assert report["labelled"] == 3
    assert report["accuracy"]["first"] == report["accuracy"]["second"] == report["accuracy"]["replayed"]
    done = invoke(run, "--compare", tiny_bundle, tiny_bundle, "--images", labelled, "--threads", 1)
    assert "identical policies" in done.stdout and "top-1 accuracy" in done.stdout


def test_what_cannot_be_compared(
    wide: tuple[Path, Path], tiny_bundle: Path, photos: Path, labelled: Path, tmp_path: Path
) -> None:
    line = refusal(invoke(run, "--compare", wide[0], tiny_bundle, "--images", photos))
    assert "different models" in line
    assert "--images" in refusal(invoke(run, "--compare", wide[0], wide[0]), 2)
    message = refusal(invoke(run, "--compare", wide[0], wide[0], "--images", photos, "--budget", 0.5), 2)
    assert "--compare runs the trained policies once, without --budget" in message
    message = refusal(invoke(run, "--compare", wide[0], wide[0], "--images", photos, "--tune"), 2)
    assert "--compare runs the trained policies once, without --tune" in message
    assert "no other BUNDLE" in refusal(invoke(run, wide[0], "--compare", wide[0], wide[0], "--images", photos), 2)
    (tmp_path / "broken.png").write_bytes(b"")
    assert "can be read" in refusal(invoke(run, "--compare", wide[0], wide[0], "--images", tmp_path))


def test_models_without_some_policies(tmp_path: Path, photos: Path) -> None:
    from cases import tiny

    bundle = export(random_model(tiny(head_policy=False, sublayer_policy=False)), tmp_path)
    assert set(compared(bundle, bundle, "--images", photos)["decisions"]) == {"tokens"}
