"""Operating points of a bundle: found on images in files, and written into it."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cases import export, picture, pictures_in, quiet, random_model, read_config, tiny, write_config

import adavit
from adavit.bundle.bundle import Bundle
from adavit.bundle.capacity import CAPACITY_QUANTILE
from adavit.bundle.operating_points import Budgets, Offsets
from adavit.calibration import budgets as calibration
from adavit.calibration import offset_evaluator as module
from adavit.calibration.budgets import add_budgets
from adavit.calibration.offset_evaluator import OffsetEvaluator
from adavit.calibration.options import BudgetOptions
from adavit.errors import BundleError, InputError, OptionError
from adavit.runtime import Runtime


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 pictures in folders that carry labels of the tiny bundle."""
    folder = tmp_path_factory.mktemp("photos")
    for seed in range(24):
        path = folder / ("bee", "dog", "elk")[seed % 3] / f"{seed}.png"
        path.parent.mkdir(exist_ok=True)
        picture(seed).save(path)
    return folder


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A copy of the tiny bundle, to change; the other tests here have a bundle of their own."""
    return shutil.copytree(tiny_bundle, tmp_path / "bundle")


def middle(bundle: Path, photos: Path) -> float:
    """A budget below the trained policy's that the pictures can meet."""
    runtime = adavit.load(bundle, threads=1)
    tried, _ = OffsetEvaluator.of_files(runtime, (photos,), quiet)
    return round(0.4 * tried.run(Offsets(-99, -99, -99)).macs + 0.6 * tried.trained.macs, 3)


def test_a_search_keeps_the_quantile_of_a_bundle(bundle: Path, photos: Path) -> None:
    write_config(bundle, read_config(bundle) | {"capacity_quantile": 0.9})
    add_budgets(bundle, BudgetOptions((middle(bundle, photos),), (photos,)), 1, quiet)
    assert Bundle.open(bundle).capacity_quantile == 0.9


def test_points_are_written_into_the_bundle(bundle: Path, photos: Path) -> None:
    budget = middle(bundle, photos)
    before = read_config(bundle)
    files = {path: path.read_bytes() for path in bundle.rglob("*.*") if path.suffix not in (".json", ".md")}
    found = add_budgets(bundle, BudgetOptions((budget,), (photos,)), 1, quiet)
    assert found is not None
    after = read_config(bundle)
    assert json.loads(json.dumps(found)) == {**after["budgets"], "skipped": []}
    added = ("budgets", "statistics", "capacity_quantile")
    assert {key: value for key, value in after.items() if key not in added} == before
    assert after["capacity_quantile"] == CAPACITY_QUANTILE
    assert {path: path.read_bytes() for path in files} == files
    assert after["budgets"]["calibration"] == {"images": 24, "labelled": True}
    runtime = adavit.load(bundle, threads=1, budget=budget)
    pixels = np.stack([runtime.preprocess(path) for path in sorted(photos.rglob("*.png"))])
    dense = runtime.bundle.config["macs"]["dense"]
    assert runtime.run(pixels).macs.mean() / dense == pytest.approx(budget, rel=calibration.FAR)
    again = add_budgets(bundle, BudgetOptions((budget,), (photos,)), 1, quiet)
    assert again == found  # the same images give the same points


def test_what_others_write_meanwhile_stays(bundle: Path, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    budget, made = middle(bundle, photos), calibration.calibrate
    config = read_config(bundle)

    def meanwhile(*given: Any) -> Budgets:
        write_config(bundle, config)
        return made(*given)

    monkeypatch.setattr(calibration, "calibrate", meanwhile)
    config["engine_sets"] = {}
    add_budgets(bundle, BudgetOptions((budget,), (photos,)), 1, quiet)
    assert read_config(bundle).keys() >= {"engine_sets", "budgets"}
    config["precisions"]["fp32"]["stem"]["sha256"] = "0" * 64
    with pytest.raises(BundleError, match="was exported anew meanwhile; calibrate it again"):
        add_budgets(bundle, BudgetOptions((budget,), (photos,)), 1, quiet)
    assert read_config(bundle) == config


def test_unlabelled_and_unreadable_images(bundle: Path, photos: Path, tmp_path: Path) -> None:
    folder = tmp_path / "flat"
    folder.mkdir()
    for position, path in enumerate(sorted(photos.rglob("*.png"))):
        shutil.copy(path, folder / f"{position}.png")
    (folder / "empty.png").touch()
    found = add_budgets(bundle, BudgetOptions((middle(bundle, photos),), (folder,)), 1, quiet)
    assert found is not None
    assert found["calibration"] == {"images": 24, "labelled": False}
    assert [message.split(": ")[0] for message in found["skipped"]] == [str(folder / "empty.png")]
    assert all("accuracy" not in point["measured"] for point in found["points"])


def test_no_budgets_change_nothing(bundle: Path) -> None:
    before = (bundle / "config.json").read_bytes()
    assert add_budgets(bundle, BudgetOptions(), 1, quiet) is None
    assert (bundle / "config.json").read_bytes() == before


def test_what_fails_leaves_the_bundle_as_it_was(bundle: Path, photos: Path, tmp_path: Path) -> None:
    write_config(bundle, read_config(bundle))
    before = (bundle / "config.json").read_bytes()
    few = tmp_path / "few"
    few.mkdir()
    picture().save(few / "a.png")
    (few / "b.png").touch()
    (tmp_path / "none").mkdir()
    (tmp_path / "fifteen").mkdir()
    for options, message in (
        (BudgetOptions((0.3,), (tmp_path / "nowhere",)), "no such image or folder"),
        (BudgetOptions((0.3,), (tmp_path / "none",)), "holds no image file"),
        (BudgetOptions((0.3,), (few,)), "budgets need at least 16 images, 1 can be read; first unreadable"),
        (BudgetOptions((0.3,), (pictures_in(tmp_path / "fifteen", 15),)), "at least 16 images, 15 can be read"),
        (BudgetOptions((0.3,)), "`budgets` needs `calibration_images`"),
        (BudgetOptions((40.0,), (photos,)), "40 is no share of the dense MACs"),
        (BudgetOptions((0.0,), (photos,)), "0 is no share of the dense MACs"),
        (BudgetOptions((float("nan"),), (photos,)), "nan is no share of the dense MACs"),
        (BudgetOptions((0.3, 0.3), (photos,)), "a budget is given twice"),
        (BudgetOptions((0.001,), (photos,)), "a budget of 0.001 is out of reach"),
    ):
        with pytest.raises(InputError) as caught:
            add_budgets(bundle, options, 1, quiet)
        assert message in str(caught.value)
        assert (bundle / "config.json").read_bytes() == before
    assert sorted(path.name for path in bundle.iterdir() if path.name.startswith(".")) == []


def test_no_more_images_are_taken_than_asked_for(bundle: Path, photos: Path) -> None:
    budget = middle(bundle, photos)
    found = add_budgets(bundle, BudgetOptions((budget,), (photos,), 16), 1, quiet)
    assert found is not None
    assert found["calibration"] == {"images": 16, "labelled": True}
    for options, message in (
        (BudgetOptions((), (photos,), 64), "`budget_images` is of `budgets`; give them too"),
        (BudgetOptions((0.3,), (photos,), 15), "`budget_images`: 15 are too few; give at least 16"),
    ):
        with pytest.raises(OptionError, match=message):
            add_budgets(bundle, options, 1, quiet)


def test_one_progress_from_nothing_to_all(bundle: Path, photos: Path) -> None:
    told: list[tuple[str, float]] = []
    add_budgets(bundle, BudgetOptions((middle(bundle, photos),), (photos,)), 1, lambda *now: told.append(now))
    stages = [stage for stage, _ in told]
    searched = ["loading the bundle", "reading images", "finding operating points"]
    assert list(dict.fromkeys(stages)) == [*searched, "recording policies"]
    shares = [share for stage, share in told if stage == "finding operating points"]
    assert shares == sorted(shares)
    assert shares[0] < 0.1
    assert shares[-2] < shares[-1] == 1


def test_a_model_without_policies_is_refused_before_its_images_are_read(tmp_path: Path) -> None:
    none = dict.fromkeys(("token_policy", "head_policy", "sublayer_policy"), False)
    bundle = export(random_model(tiny(**none)), tmp_path)
    for ask in (
        lambda: add_budgets(bundle, BudgetOptions((0.5,), (tmp_path / "nowhere",)), 1, quiet),
        lambda: adavit.load(bundle, threads=1, budget=0.5),
    ):
        with pytest.raises(InputError, match="has no policies, so every image takes the same MACs; train") as caught:
            ask()
        assert "adavit-train adapt" in str(caught.value)
        assert "--budgets" not in str(caught.value)


def test_many_images_are_drawn_from_all_of_them(runtime: Runtime, photos: Path) -> None:
    drawn, _ = OffsetEvaluator.of_files(runtime, (photos,), quiet, 18)
    again, _ = OffsetEvaluator.of_files(runtime, (photos,), quiet, 18)
    assert len(drawn) == 18
    assert drawn.labels is not None
    assert again.labels is not None
    assert set(drawn.labels) == {1, 3, 4}
    np.testing.assert_array_equal(drawn.labels, again.labels)


def test_no_more_images_are_held_than_memory_is_for(
    runtime: Runtime, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = 4 * 3 * tiny().image_size ** 2
    for memory, held in ((20 * image, 20), (5 * image, 16), (99 * image, 24)):  # as few as budgets need, in any case
        monkeypatch.setattr(module, "MOST_BYTES", memory)
        assert len(OffsetEvaluator.of_files(runtime, (photos,), quiet)[0]) == held


def test_labels_count_where_every_image_has_one(runtime: Runtime, photos: Path, tmp_path: Path) -> None:
    picture(99).save(tmp_path / "unlabelled.png")
    both, _ = OffsetEvaluator.of_files(runtime, (photos, tmp_path / "unlabelled.png"), quiet)
    assert (len(both), both.labels) == (25, None)
