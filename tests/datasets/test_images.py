"""Preprocessing against an independent computation, and every picture that cannot be used."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cases import picture
from PIL import Image

from adavit.bundle.preprocessing import Preprocessor
from adavit.datasets.image_files import ImageFile, find_images
from adavit.errors import BundleError, InputError

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def independent(image: Image.Image, side: int, ratio: float) -> np.ndarray:
    """What torchvision's Resize(int(side / ratio)), CenterCrop(side), ToTensor and Normalize make of a picture."""
    image = image.convert("RGB")
    short, (width, height) = int(side / ratio), image.size
    size = (short, int(short * height / width)) if width <= height else (int(short * width / height), short)
    pixels = np.asarray(image.resize(size, Image.Resampling.BICUBIC), np.float64)
    top, left = (round((length - side) / 2.0) for length in pixels.shape[:2])
    pixels = pixels[top : top + side, left : left + side] / 255
    return ((pixels - MEAN) / STD).transpose(2, 0, 1)


@pytest.mark.parametrize("side", [28, 32, 112])
@pytest.mark.parametrize("ratio", [0.9, 0.875, 1.0])
@pytest.mark.parametrize("size", [(40, 50), (50, 40), (33, 33), (301, 200), (20, 97), (28, 28)])
def test_preprocessing_is_resize_crop_and_normalise(side: int, ratio: float, size: tuple[int, int]) -> None:
    image = picture(3, size)
    found = Preprocessor(side, ratio)(image)
    assert found.dtype == np.float32
    assert found.flags.c_contiguous
    assert found.shape == (3, side, side)
    np.testing.assert_allclose(found, independent(image, side, ratio), atol=1e-5)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1", "LA"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    image = picture().convert(mode)
    np.testing.assert_allclose(Preprocessor(32)(image), independent(image, 32, 0.9), atol=1e-5)


def test_16_bit_grey_keeps_its_upper_bits(tmp_path: Path) -> None:
    path = tmp_path / "deep.png"
    Image.fromarray(np.full((28, 28), 256 * 9 + 5, np.uint16)).save(path)
    shallow = Preprocessor(28, 1.0)(np.full((28, 28), 9, np.uint8))
    assert np.array_equal(Preprocessor(28, 1.0)(path), shallow)
    assert np.array_equal(Preprocessor(28, 1.0)(Image.open(path)), shallow)
    (tmp_path / "deep.pgm").write_bytes(b"P5 28 28 65535\n" + np.full((28, 28), 256 * 9 + 5, ">u2").tobytes())
    assert np.array_equal(Preprocessor(28, 1.0)(tmp_path / "deep.pgm"), shallow)


@pytest.mark.parametrize("values", [np.full((28, 28), 0.5, np.float32), np.full((28, 28), 1 << 20, np.int32)])
def test_grey_of_no_known_range(values: np.ndarray, tmp_path: Path) -> None:
    Image.fromarray(values).save(tmp_path / "deep.tif")
    with pytest.raises(InputError, match=r"deep.tif: a picture .* has no known range; convert it"):
        Preprocessor(28)(tmp_path / "deep.tif")
    with pytest.raises(InputError, match=r"image: a picture .* has no known range"):
        Preprocessor(28)(Image.fromarray(values))


def test_a_picture_without_pixels() -> None:
    with pytest.raises(InputError, match="image: 0x5 pixels is no picture"):
        Preprocessor(28)(Image.new("RGB", (0, 5)))


def test_elongated_pictures_are_named(tmp_path: Path) -> None:
    Image.new("RGB", (600, 9)).save(tmp_path / "long.png")
    for image, name in (
        (tmp_path / "long.png", tmp_path / "long.png"),
        (Image.new("RGB", (600, 9)), "image"),
        (np.zeros((9, 600), np.uint8), "image"),
    ):
        assert fault(image) == f"{name}: 600x9 pixels is too elongated; crop it first"


def test_paths_pictures_and_arrays_are_the_same_to_it(tmp_path: Path) -> None:
    preprocess, image = Preprocessor(32), picture()
    image.save(tmp_path / "a.png")
    wanted = preprocess(image)
    for other in (tmp_path / "a.png", str(tmp_path / "a.png"), np.asarray(image)):
        np.testing.assert_array_equal(preprocess(other), wanted)
    gray = np.asarray(image.convert("L"))
    np.testing.assert_array_equal(preprocess(gray), preprocess(np.stack([gray] * 3, -1)))


def test_photographs_are_turned_upright(tmp_path: Path) -> None:
    image = picture()
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    image.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(Preprocessor(32)(tmp_path / "a.png"), Preprocessor(32)(image))
    np.testing.assert_array_equal(Preprocessor(32)(Image.open(tmp_path / "a.png")), Preprocessor(32)(image))


def test_whatever_a_decoder_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture().save(tmp_path / "a.png")
    opened = Image.open(tmp_path / "a.png")

    def fail(*_: Any) -> None:
        raise RuntimeError("damaged")

    monkeypatch.setattr(Image.Image, "convert", fail)
    for image in (tmp_path / "a.png", opened):
        with pytest.raises(InputError, match=r": not a readable image \(RuntimeError\)"):
            Preprocessor(32)(image)


def test_what_it_writes_it_reads_again() -> None:
    preprocess = Preprocessor(56, 0.875, (0.1, 0.2, 0.3), (1.0, 2.0, 3.0))
    values = preprocess.to_dict()
    assert Preprocessor.from_dict(values, 56) == preprocess
    assert values["size"] == {"shortest_edge": 64}
    assert values["crop_size"] == {"height": 56, "width": 56}
    assert (values["resample"], values["rescale_factor"]) == (3, 1 / 255)


DAMAGE: dict[str, dict[str, Any]] = {
    "another side": {"crop_size": {"height": 48, "width": 48}},
    "no side": {"crop_size": {}},
    "infinite side": {"crop_size": {"height": float("inf")}},
    "no crop ratio": {"crop_ratio": None},
    "zero crop ratio": {"crop_ratio": 0},
    "NaN crop ratio": {"crop_ratio": float("nan")},
    "two means": {"image_mean": [0.5, 0.5]},
    "text": {"image_mean": ["a", "b", "c"]},
    "no std": {"image_std": [0, 0, 0]},
    "NaN": {"image_std": [float("nan"), 1, 1]},
    "huge": {"image_mean": [10**400, 0, 0]},
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_refused(kind: str) -> None:
    with pytest.raises(BundleError, match=r"^preprocessor_config\.json.*export again$"):
        Preprocessor.from_dict({**Preprocessor(56).to_dict(), **DAMAGE[kind]}, 56)


def fault(image: Any) -> str:
    with pytest.raises(InputError) as caught:
        Preprocessor(32)(image)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "array",
    [np.zeros((8, 8), np.float32), np.zeros(8, np.uint8), np.zeros((8, 8, 4), np.uint8), np.zeros((0, 8, 3), np.uint8)],
    ids=str,
)
def test_arrays_that_are_no_image(array: np.ndarray) -> None:
    assert "an image is uint8 [H, W] or [H, W, 3]" in fault(array)


def test_files_that_are_no_image(tmp_path: Path) -> None:
    picture(0, (300, 300)).save(tmp_path / "cut.jpg")
    data = (tmp_path / "cut.jpg").read_bytes()
    for name, content, message in (
        ("empty.png", b"", "it is empty"),
        ("text.png", b"hello", "in no format that Pillow knows"),
        ("photo.heic", b"hello", "convert it to JPEG"),
        ("cut.jpg", data[: len(data) // 2], "not a readable image"),
    ):
        (tmp_path / name).write_bytes(content)
        assert fault(tmp_path / name).startswith(f"{tmp_path / name}: ")
        assert message in fault(tmp_path / name)
    assert "no such image" in fault(tmp_path / "nothing.png")
    assert "not a readable image" in fault(tmp_path)


def test_a_picture_that_cannot_be_decoded_after_all(tmp_path: Path) -> None:
    picture(0, (300, 300)).save(tmp_path / "cut.jpg")
    data = (tmp_path / "cut.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(data[: len(data) // 2])
    with Image.open(tmp_path / "cut.jpg") as opened:
        assert "not a readable image" in fault(opened)


@pytest.mark.parametrize("other", [None, 3, b"bytes"])
def test_what_is_no_picture_at_all(other: Any) -> None:
    assert "an image is a path, a PIL image or a uint8 array" in fault(other)


def test_decompression_bombs_are_not_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture(0, (40, 50)).save(tmp_path / "large.png")
    for limit in (1500, 500):  # Pillow warns above the limit, and raises above twice the limit
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        assert "too many pixels" in fault(tmp_path / "large.png")


def test_a_strip_is_too_elongated() -> None:
    assert "500x1 pixels is too elongated" in fault(np.zeros((1, 500, 3), np.uint8))


def test_files_and_folders_are_listed_in_order(labelled: Path, tmp_path: Path) -> None:
    for name in ("b.png", "a.JPG", "notes.txt"):
        picture().convert("RGB").save(tmp_path / name, "png")
    assert find_images([tmp_path, labelled / "bee" / "1.png"], ["x"]) == [
        ImageFile(tmp_path / "a.JPG"),
        ImageFile(tmp_path / "b.png"),
        ImageFile(labelled / "bee" / "1.png"),
    ]


def test_class_folders_carry_labels(labelled: Path) -> None:
    labels = [file.label for file in find_images([labelled], ["ant", "bee", "cat", "dog", "elk"])]
    assert labels == [1, 1, 3]
    assert [file.label for file in find_images([labelled], ["x", "y"], by_order=True)] == [0, 0, 1]


def test_image_sets_that_fit_nothing_are_refused(labelled: Path, tmp_path: Path) -> None:
    for paths, message in (
        ([labelled], "class folder 'bee' is none of the bundle's 3 labels"),
        ([tmp_path], "holds no image file"),
        ([tmp_path / "nothing"], "no such image or folder"),
    ):
        with pytest.raises(InputError, match=message):
            find_images(paths, ["x", "y", "z"])
    with pytest.raises(InputError, match="class folder 'dog' is none of the bundle's 2 labels"):
        find_images([labelled], ["bee", "dogs"])  # one of which is there: no place in an order is meant
