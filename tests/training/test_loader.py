from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from adavit.bundle.preprocessing import Preprocessor
from adavit.training.data import open_images
from adavit.training.distributed import World
from adavit.training.errors import DataError
from adavit.training.loader import TrainingBatches, evaluation_batches, spread
from adavit.training.settings import Settings

CPU = torch.device("cpu")


def batches(folder: Path, world: World, **changes: object) -> TrainingBatches:
    settings = Settings(**{"steps": 100, "batch": 16, "mixup": 0.4, **changes})  # type: ignore[arg-type]
    return TrainingBatches(open_images(folder, "train"), settings, 8, world, 1)


def test_an_epoch_visits_every_image_once_in_an_order_of_its_own(idx_folder: Path) -> None:
    loader = batches(idx_folder, World(0, 1, CPU))
    first = np.concatenate([loader.indices(step) for step in range(loader.per_epoch)])
    second = np.concatenate([loader.indices(step + loader.per_epoch) for step in range(loader.per_epoch)])
    assert sorted(first) == sorted(second) == list(range(96))
    assert not np.array_equal(first, second)


def test_a_later_start_gives_the_same_batches(idx_folder: Path) -> None:
    whole = list(batches(idx_folder, World(0, 1, CPU)).iterate(0, 8))
    late = list(batches(idx_folder, World(0, 1, CPU)).iterate(5, 8))
    assert all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(whole[5:], late, strict=True))


def test_processes_share_the_batch_of_one(idx_folder: Path) -> None:
    alone = next(batches(idx_folder, World(0, 1, CPU)).iterate(3, 4))
    parts = [next(batches(idx_folder, World(rank, 2, CPU)).iterate(3, 4)) for rank in (0, 1)]
    assert torch.equal(alone[0], torch.cat([part[0] for part in parts]))
    assert torch.equal(alone[1], torch.cat([part[1] for part in parts]))


def test_mixup_mixes_images_and_labels_alike(idx_folder: Path) -> None:
    world = World(0, 1, CPU)
    plain = next(batches(idx_folder, world, mixup=0.0, smoothing=0.0).iterate(0, 1))
    mixed = next(batches(idx_folder, world, smoothing=0.0).iterate(0, 1))
    share = float(((mixed[0][0] - plain[0][1]) / (plain[0][0] - plain[0][1])).nanmedian())
    assert 0 <= share <= 1
    torch.testing.assert_close(mixed[1][0], share * plain[1][0] + (1 - share) * plain[1][1], atol=1e-3, rtol=0)
    torch.testing.assert_close(mixed[0][1], share * plain[0][1] + (1 - share) * plain[0][0], atol=1e-3, rtol=0)


def test_fewer_images_than_a_batch_are_refused(idx_folder: Path) -> None:
    with pytest.raises(DataError, match="96 training images are fewer than one batch of 128"):
        batches(idx_folder, World(0, 1, CPU), batch=128)


def test_evaluation_keeps_the_order(idx_folder: Path) -> None:
    data = open_images(idx_folder, "test")
    parts = list(evaluation_batches(data, range(1, 32, 2), Preprocessor(8, 1.0), 5))
    assert [len(labels) for _, labels in parts] == [5, 5, 5, 1]
    assert np.concatenate([labels for _, labels in parts]).tolist() == data.labels[1::2].tolist()


def test_evaluation_sees_what_a_bundle_sees(tmp_path: Path) -> None:
    files = [tmp_path / "val" / name / "0.png" for name in ("ant", "bee")]
    for size, file in zip(((301, 400), (57, 56)), files, strict=True):
        file.parent.mkdir(parents=True)
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (*size, 3), dtype=np.uint8)).save(file)
    prepare = Preprocessor(224, 0.9)
    ((images, _),) = evaluation_batches(open_images(tmp_path, "test"), range(2), prepare, 2)
    assert np.array_equal(images.numpy(), np.stack([prepare(file) for file in files]))


def test_a_part_of_a_sorted_folder_has_every_class() -> None:
    assert list(spread(10, 0)) == list(spread(10, 99)) == list(range(10))
    assert list(spread(100, 4)) == [0, 25, 50, 75]
