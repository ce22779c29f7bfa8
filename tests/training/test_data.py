import gzip
import os
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from training_cases import idx_bytes, write_idx_set

from adavit.training.data import open_images
from adavit.training.errors import DataError
from adavit.training.idx import read_idx


def write_folders(root: Path, names: tuple[str, ...] = ("cat", "dog"), part: str = "train") -> Path:
    for label, name in enumerate(names):
        (root / part / name).mkdir(parents=True)
        for k in range(2):
            Image.new("RGB", (10, 12), (label * 100, k * 50, 0)).save(root / part / name / f"{k}.png")
    return root


@pytest.mark.parametrize("packed", [False, True])
def test_idx_plain_and_gzipped(tmp_path: Path, packed: bool) -> None:
    array = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    content = idx_bytes(array)
    file = tmp_path / "images"
    file.write_bytes(gzip.compress(content, mtime=0) if packed else content)
    assert np.array_equal(read_idx(file), array)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "not an IDX file"),
        (b"\0\0\x0d\x01\0\0\0\0", "not an IDX file"),
        (b"\0\0\x08\x03\0\0", "truncated IDX header"),
        (b"\0\0\x08\xff" + bytes(4 * 255), "not an IDX file"),
        (idx_bytes(np.zeros((2, 3), np.uint8))[:-1], "truncated: its header promises 6 bytes, it has 5"),
        (idx_bytes(np.zeros((2, 3), np.uint8)) + b"x", "too long"),
        (b"\0\0\x08\x03" + b"\xff" * 12, "truncated"),
        (gzip.compress(idx_bytes(np.zeros(500, np.uint8)), mtime=0)[:-12], "cannot be read"),
    ],
)
def test_damaged_idx_files_are_refused(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(DataError, match=words):
        read_idx(tmp_path / "file")


def test_idx_set_is_replicated_to_three_channels(idx_folder: Path) -> None:
    images = open_images(idx_folder, "train")
    pixels = images.pixels(5)
    assert images.classes == ["0", "1", "2", "3"] and pixels.shape == (8, 8, 3)
    assert np.array_equal(pixels[..., 0], pixels[..., 2])


def test_idx_labels_must_match(tmp_path: Path) -> None:
    folder = write_idx_set(tmp_path / "data")
    with pytest.raises(DataError, match="label 3 but 2 class names"):
        open_images(folder, "train", classes=["a", "b"])
    (folder / "t10k-labels-idx1-ubyte").write_bytes(idx_bytes(np.zeros(3, np.uint8)))
    with pytest.raises(DataError, match="3 labels for the 32 images"):
        open_images(folder, "test")
    (folder / "train-labels-idx1-ubyte").write_bytes(idx_bytes(np.zeros(96, np.uint8)))
    with pytest.raises(DataError, match="a single class"):
        open_images(folder, "train")


def test_images_are_told_apart_wherever_they_lie(tmp_path: Path) -> None:
    def identity(folder: Path, classes: list[str] | None = None) -> str:
        return open_images(folder, "train", classes=classes).identity

    folders, packed = write_folders(tmp_path / "folders"), write_idx_set(tmp_path / "packed")
    before, digits = identity(folders), identity(packed)
    assert before.startswith("4 images of 2 classes (") and digits.startswith("96 images of 4 classes (")
    assert identity(folders.rename(tmp_path / "moved")) == before
    assert identity(packed.rename(tmp_path / "elsewhere")) == digits
    assert identity(tmp_path / "moved", ["dog", "cat"]) != before
    assert identity(tmp_path / "elsewhere", ["d", "c", "b", "a"]) != digits
    first = tmp_path / "moved/train/cat/0.png"
    Image.new("RGB", (90, 90)).save(first)
    assert identity(tmp_path / "moved") != before
    write_folders(tmp_path / "named")
    (tmp_path / "named/train/cat/0.png").rename(tmp_path / "named/train/cat/00.png")
    assert identity(tmp_path / "named") != before
    pixels = tmp_path / "elsewhere/train-images-idx3-ubyte"
    pixels.write_bytes(pixels.read_bytes()[:-1] + b"\7")
    assert identity(tmp_path / "elsewhere") != digits


def test_folders_of_mixed_size_and_mode(tmp_path: Path) -> None:
    root = write_folders(tmp_path)
    Image.new("L", (5, 5), 7).save(root / "train/cat/grey.png")
    Image.new("RGBA", (4, 9), (1, 2, 3, 0)).save(root / "train/cat/clear.png")
    Image.new("P", (6, 6)).save(root / "train/cat/palette.gif")
    Image.fromarray(np.full((3, 3), 256 * 9, np.uint16)).save(root / "train/dog/deep.png")
    images = open_images(root, "train")
    everything = [images.pixels(i) for i in range(len(images.labels))]
    assert all(p.dtype == np.uint8 and p.ndim == 3 and p.shape[2] == 3 for p in everything)
    assert images.labels.tolist() == [0] * 5 + [1] * 3
    assert (everything[-1] == 9).all()


def test_single_class_empty_class_and_no_folders(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="neither IDX files nor a folder train"):
        open_images(tmp_path, "train")
    with pytest.raises(DataError, match="no such folder"):
        open_images(tmp_path / "absent", "train")
    write_folders(tmp_path / "one", ("cat",))
    with pytest.raises(DataError, match="a single class, 'cat'"):
        open_images(tmp_path / "one", "train")
    (write_folders(tmp_path / "two") / "train" / "owl").mkdir()
    with pytest.raises(DataError, match="owl: no readable image"):
        open_images(tmp_path / "two", "train")
    (tmp_path / "three" / "train").mkdir(parents=True)
    with pytest.raises(DataError, match="no class-named folders"):
        open_images(tmp_path / "three", "train")


def test_test_classes_must_be_those_of_training(tmp_path: Path) -> None:
    write_folders(tmp_path, ("cat", "newt"), part="val")
    with pytest.raises(DataError, match="'newt' is not one of the 2 known classes"):
        open_images(tmp_path, "test", classes=["cat", "dog"])


def test_corrupt_files_are_named_and_refused_or_skipped(tmp_path: Path) -> None:
    root = write_folders(tmp_path)
    bad = root / "train" / "dog" / "bad.png"
    bad.write_bytes((root / "train" / "dog" / "0.png").read_bytes()[:40])
    with pytest.raises(DataError, match=r"bad\.png: not a readable image"):
        open_images(root, "train")
    with pytest.warns(UserWarning, match=r"skipped: .*bad\.png"):
        assert len(open_images(root, "train", corrupt="skip").labels) == 4


def test_too_elongated_pictures_are_named(tmp_path: Path) -> None:
    root = write_folders(tmp_path)
    Image.new("RGB", (9, 600)).save(root / "train/cat/long.png")
    with pytest.raises(DataError, match=r"long\.png: 9x600 pixels is too elongated; crop it first; remove it or pass"):
        open_images(root, "train").pixels(2)
    with pytest.warns(UserWarning, match=r"skipped: .*long\.png: 9x600 pixels is too elongated; crop it first$"):
        assert len(open_images(root, "train", corrupt="skip").labels) == 4


def test_truncated_photograph_is_found_when_skipping(tmp_path: Path) -> None:
    root = write_folders(tmp_path)
    photograph = root / "train" / "cat" / "late.jpg"
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(photograph)
    photograph.write_bytes(photograph.read_bytes()[:2000])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        images = open_images(root, "train")  # the header is whole: found only on decoding
    with pytest.raises(DataError, match=r"late\.jpg"):
        [images.pixels(i) for i in range(len(images.labels))]
    with pytest.warns(UserWarning, match=r"late\.jpg"):
        assert len(open_images(root, "train", corrupt="skip").labels) == 4


def test_folders_are_matched_with_known_classes_and_hidden_files_left_out(tmp_path: Path) -> None:
    root = write_folders(tmp_path / "case", ("Cat", "DOG"), part="val")
    (root / "val/Cat/.ipynb_checkpoints").mkdir()
    Image.new("RGB", (5, 5)).save(root / "val/Cat/.ipynb_checkpoints/0.png")
    (root / "val/Cat/._0.png").write_bytes(b"no image")
    images = open_images(root, "test", classes=["dog", "cat"])
    assert (images.classes, images.labels.tolist(), images.labels_by) == (["dog", "cat"], [1, 1, 0, 0], "name")
    numbered = write_folders(tmp_path / "numbers", tuple(str(i) for i in range(11)), part="val")
    images = open_images(numbered, "test", classes=[f"class {i}" for i in range(11)])
    assert (sorted(set(images.labels.tolist())), images.labels_by) == (list(range(11)), "number")
    assert images.labels.tolist()[4:6] == [10, 10]  # of 0, 1, 10
    with pytest.raises(DataError, match=r"'Cat' is not one of the 2 known classes.*give `labels_by_order=True`"):
        open_images(root, "test", classes=["owl", "newt"])
    with pytest.warns(UserWarning, match="its 2 class folders fit no label, and count as the classes in sorted order"):
        images = open_images(root, "test", classes=["owl", "newt"], by_order=True)
    assert (images.labels.tolist(), images.labels_by) == ([0, 0, 1, 1], "order")


def opened(root: Path, part: str = "train", **options: object) -> tuple[list[int], str]:
    """The labels, and what was warned of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        labels = open_images(root, part, **options).labels.tolist()  # type: ignore[arg-type]
    return labels, "\n".join(str(warning.message) for warning in caught)


def test_what_is_left_out_is_warned_of(tmp_path: Path) -> None:
    root = write_folders(tmp_path)
    picture = root / "train/cat/0.png"
    for name in ("loose.png", "cat/thumbs/0.png", "cat/x.heic", "dog/notes.txt"):
        (root / "train" / name).parent.mkdir(exist_ok=True)
        (root / "train" / name).write_bytes(picture.read_bytes())
    (root / "train/dog/more").symlink_to(root / "train/cat")
    Image.new("RGB", (5, 5)).save(root / "train/dog/2.jp2")
    labels, warned = opened(root)
    assert labels == [0, 0, 1, 1, 1]
    assert warned.splitlines() == [
        f"{root}/train: 1 images beside the class folders are left out",
        f"{root}/train: 2 folders inside class folders are left out, such as 'thumbs'",
        f"{root}/train: 1 files are left out, such as 'cat/x.heic': no known image suffix",
    ]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no FIFOs")
@pytest.mark.parametrize("kind", ["fifo", "link"])
def test_what_is_no_regular_file_is_refused_or_skipped(kind: str, tmp_path: Path) -> None:
    odd = write_folders(tmp_path) / "train/cat/odd.png"
    os.mkfifo(odd) if kind == "fifo" else odd.symlink_to("nothing.png")
    with pytest.raises(DataError, match=r"cat/odd\.png: is no regular file; remove it or pass --corrupt skip"):
        open_images(tmp_path, "train")
    labels, warned = opened(tmp_path, corrupt="skip")
    assert labels == [0, 0, 1, 1]
    assert warned.endswith("1 files are left out, such as 'cat/odd.png': they are no regular files")


def test_a_class_folder_that_is_a_dangling_link(tmp_path: Path) -> None:
    write_folders(write_folders(tmp_path), part="val")
    for part in ("train", "val"):
        (tmp_path / part / "owl").symlink_to("nothing")
    with pytest.raises(DataError, match="owl: no readable image for this class"):
        open_images(tmp_path, "train")
    labels, warned = opened(tmp_path, "test", classes=["cat", "dog", "owl"])
    assert labels == [0, 0, 1, 1]
    assert warned == f"{tmp_path}/val: class folder 'owl' holds no readable image file: left out"
