"""What the picture of a run shows, and what it refuses."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cases import picture, pictures_in, random_images, random_policy, tiny
from drawing_cases import below, result_of, some, thumbnail
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import adavit
from adavit.bundle.preprocessing import Preprocessor
from adavit.drawing import marks, text
from adavit.drawing.sheet import Sheet
from adavit.errors import InputError
from adavit.runtime import Policy, Result, Runtime

NAMES = ["ant", "bee", "cat", "dog", "elk"]


def test_dropped_patches_are_faded_and_kept_ones_plain() -> None:
    result, images = some()
    drawn = adavit.draw(result, images)
    kept = result.policy.executed().tokens[:, :, 1:].reshape(3, 3, 4, 4)
    assert {True, False} == set(kept.ravel().tolist())
    for row in range(3):
        plain = thumbnail(drawn, result, row, -1)
        for block in range(3):
            found = thumbnail(drawn, result, row, block)
            np.testing.assert_array_equal(found[kept[row, block]], plain[kept[row, block]])
            dropped = ~kept[row, block]
            if dropped.any():
                assert found[dropped].std() < 0.4 * plain[dropped].std()
                np.testing.assert_array_equal(found[dropped], marks.faded(plain[dropped]))


@pytest.mark.parametrize("grey", [0, 128, 255])
def test_faded_patches_are_unlike_kept_ones_on_any_background(grey: int) -> None:
    pixels = np.full((1, 1, 3), grey, np.uint8)
    assert np.abs(marks.faded(pixels).astype(int) - pixels).min() >= 35


def test_a_block_without_sub_layers_shows_no_patch_and_no_head() -> None:
    arch = tiny()
    policy = Policy.dense(arch, 1)
    policy.sublayers[0, 1] = False
    result, images = result_of(policy, arch), random_images(arch, 1)
    drawn = adavit.draw(result, images)
    plain = thumbnail(drawn, result, 0, -1)
    np.testing.assert_array_equal(thumbnail(drawn, result, 0, 1), marks.faded(plain))
    np.testing.assert_array_equal(thumbnail(drawn, result, 0, 2), plain)
    nothing = Policy.dense(arch, 1)
    for mask in nothing.masks():
        mask[0, 1] = False
    nothing.tokens[..., 0] = True
    idle = adavit.draw(result_of(nothing, arch), images)
    assert (below(drawn, result, 0, 1) == below(idle, result, 0, 1)).all()


def test_marks_are_filled_where_something_ran_and_hollow_else() -> None:
    result, images = some()
    on, off = Policy.dense(tiny(), 3), Policy.dense(tiny(), 3)
    off.heads[:, 1, 0] = off.sublayers[:, 2, 1] = False
    full, less = (adavit.draw(replace(result, policy=policy), images) for policy in (on, off))
    for block, changes in enumerate((False, True, True)):
        before, after = below(full, result, 0, block), below(less, result, 0, block)
        assert (after.sum() < before.sum()) == changes
        assert after.any(0).sum() == before.any(0).sum()  # hollow marks have the size of filled ones


def test_filled_and_hollow_and_the_three_shapes_differ_without_colour() -> None:
    masks = {
        shape: [np.asarray(marks.mark(shape, on)[0]) for on in (True, False)] for shape in ("dot", "square", "tri")
    }
    for filled, hollow in masks.values():
        assert filled[4:6, 4:6].min() > 200
        assert hollow[5:7, 4:6].max() < 60
        assert hollow.max() > 150
    assert len({filled.tobytes() for filled, _ in masks.values()}) == 3


def test_pictures_are_drawn_as_the_model_saw_them(runtime: Runtime, tmp_path: Path) -> None:
    folder = pictures_in(tmp_path, 3)
    paths = sorted(folder.iterdir())
    pixels = np.stack([runtime.preprocess(path) for path in paths])
    result = runtime.run(pixels)
    wanted = adavit.draw(result, pixels, runtime.labels)
    assert wanted.mode == "RGB"
    assert adavit.draw(result, paths, runtime.labels) == wanted
    assert adavit.draw(result, (picture(seed) for seed in range(3)), runtime.labels) == wanted
    assert runtime.draw(paths) == wanted
    assert runtime.draw(pixels) == wanted
    assert runtime.draw([np.asarray(picture(seed)) for seed in range(3)]) == wanted
    crop = Image.fromarray(runtime.bundle.preprocessor.crop(paths[1]))
    sheet = Sheet(runtime.architecture, 3)
    side = sheet.thumb
    shown = thumbnail(wanted, result, 1, -1).swapaxes(1, 2).reshape(side, side, 3)
    np.testing.assert_array_equal(shown, np.asarray(crop.resize((side, side), Image.Resampling.BICUBIC)))


def test_one_picture_alone_and_a_part_of_a_result(runtime: Runtime, tmp_path: Path) -> None:
    path = pictures_in(tmp_path, 1) / "00.png"
    pixels = runtime.preprocess(path)[None]
    assert runtime.draw(path) == runtime.draw(str(path)) == runtime.draw(pixels)
    result = runtime.run(np.concatenate([pixels * 0, pixels, pixels * 2]))
    assert adavit.draw(result[1:2], path, runtime.labels) == runtime.draw(path)
    assert adavit.draw(result[np.array([1])], path, runtime.labels) == runtime.draw(path)
    with pytest.raises(InputError, match="names no images"):
        result[1]  # type: ignore[index]
    with pytest.raises(InputError, match="not of the 3 images"):
        replace(result, logits=result.logits[:1])[:1]


def test_a_budget_is_followed(runtime: Runtime) -> None:
    with pytest.raises(InputError, match="budget"):
        runtime.draw(picture(), budget=0.4)  # this bundle has no operating points


def test_captions_have_the_prediction_and_the_macs(monkeypatch: pytest.MonkeyPatch) -> None:
    result, images = some(2)
    written: list[str] = []
    put = text.put
    monkeypatch.setattr(
        text, "put", lambda canvas, at, line, *rest: (written.append(line), put(canvas, at, line, *rest))
    )
    adavit.draw(result, images, NAMES)
    scores = np.exp(result.logits[0]) / np.exp(result.logits[0]).sum()
    assert {NAMES[scores.argmax()], f"{scores.max():.1%}", f"{result.macs[0] / 1e9:.3f} GMACs"} <= set(written)
    assert any(re.fullmatch(r"\d+% of dense", line) for line in written)
    assert written[:4] == ["image", "block 0", "block 1", "block 2"]
    assert sum("/" in line for line in written) == 5  # the legend
    adavit.draw(result, images)
    assert f"class {scores.argmax()}" in written


ODD_LABELS = {
    "empty": "", "blank": " ", "long": "a" * 5000, "words": "two words " * 50, "unprintable": "\ud800\x00\n\t",
    "mirrored": "\u202emirrored", "no glyphs": "\u4e2d\u6587" * 40, "stacked": "z\u0351\u0352" * 80,
    "emoji": "\U0001f600",
}  # fmt: skip


@pytest.mark.parametrize("label", ODD_LABELS.values(), ids=ODD_LABELS)
def test_labels_stay_in_their_place(label: str) -> None:
    result, images = some(2)
    empty = np.asarray(adavit.draw(result, images, [""] * 5))
    drawn = np.asarray(adavit.draw(result, images, [label] * 5))
    assert drawn.shape == empty.shape
    sheet = Sheet(result.architecture, 2)
    left, bottom = sheet.left(-1) - 6, sheet.top(2)
    np.testing.assert_array_equal(drawn[:, left:], empty[:, left:])
    assert (drawn[:bottom, left - 12 : left] == 255).all()


def test_long_lines_are_shortened_by_their_width() -> None:
    assert text.fitted("short", 200) == "short"
    for word in ("W" * 100, "i" * 300, "\u4e2d" * 90):
        cut = text.fitted(word, 110)
        assert cut.endswith("...")
        assert 80 < text.width_of(cut) <= 110
    lines = text.wrapped("black-and-tan coonhound of a very long name indeed", 116, 2)
    assert lines[0] == "black-and-tan"
    assert all(text.width_of(line) <= 116 for line in lines)
    assert text.wrapped("x" * 1000, 116, 2)[1].endswith("...")


@settings(max_examples=40, deadline=None)
@given(
    depth=st.integers(1, 20),
    heads=st.integers(1, 16),
    grid=st.integers(1, 20),
    count=st.integers(1, 4),
    seed=st.integers(0, 10**6),
    t2t=st.booleans(),
)
def test_any_model_gives_a_picture_of_its_size(
    depth: int, heads: int, grid: int, count: int, seed: int, t2t: bool
) -> None:
    patch = 16 if t2t else 4
    shapes = dict(depth=depth, heads=heads, width=16 * heads, image_size=patch * grid, patch_size=patch, keep=0)
    result, images = some(count, seed, stem="t2t" if t2t else "patch", **shapes)
    drawn = adavit.draw(result, images)
    sheet = Sheet(result.architecture, count)
    assert drawn.size == (sheet.width, sheet.height)
    pixels = np.asarray(drawn)
    for edge in (pixels[:10], pixels[-10:], pixels[:, :10], pixels[:, -10:]):
        assert (edge == 255).all()  # nothing is cut off
    kept = result.policy.executed().tokens[-1, -1, 1:].reshape(grid, grid)
    plain = thumbnail(drawn, result, count - 1, -1)
    np.testing.assert_array_equal(thumbnail(drawn, result, count - 1, depth - 1)[kept], plain[kept])
    assert sheet.thumb <= 80


def refused(message: str, result: Any, images: Any, labels: Any = None) -> None:
    with pytest.raises(InputError, match=message) as caught:
        adavit.draw(result, images, labels)
    assert "\n" not in str(caught.value)


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    result, images = some(3)
    refused(r"float32 \[3, 3, 32, 32\]", result, images[:2])
    refused(r"float32 \[3, 3, 32, 32\]", result, images.astype(np.float64))
    refused(r"float32 \[3, 3, 32, 32\]", result, images[..., :16])
    refused("there are 2 images: the result is of 3", result, [picture()] * 2)
    refused("there are more than 3 images", result, (picture() for _ in iter(int, 1)))
    refused("there are 1 images", result, picture())
    refused("give several as a list", result, np.zeros((3, 32, 32, 3), np.uint8))
    refused("no such image", result, [picture(), picture(), tmp_path / "none.png"])
    refused("expected a path", result, None)
    refused("NaN", result, np.full_like(images, np.nan))
    refused("expected 5 names", result, images, ["ant"])
    refused("expected 5 names", result, images, "antsy")
    refused("expected 5 names", result, images, [1, 2, 3, 4, 5])
    refused("what Runtime.run returned", "result", images)
    refused("how its images were cropped", replace(result, preprocessor=None), images)
    refused("how its images were cropped", replace(result, preprocessor=Preprocessor(28)), images)
    refused("logits", replace(result, logits=result.logits[:2]), images)
    refused("not finite", replace(result, logits=result.logits * np.nan), images)
    refused("expected an adavit.Policy", replace(result, policy=None), images)
    refused("these images and this model", replace(result, architecture=tiny(depth=4)), images)
    refused("empty", result[:0], images[:0])


def test_pictures_beyond_all_bounds_are_refused_before_they_are_made() -> None:
    result, images = some(65)
    refused("at most 64 are drawn", result, images)
    deep = tiny(depth=1024, heads=48)
    refused("million; give fewer images", result_of(random_policy(deep, 64, 0), deep), None)


def test_the_runtime_refuses_too_many_and_none(runtime: Runtime, tmp_path: Path) -> None:
    for images in (random_images(runtime.architecture, 65), (picture() for _ in iter(int, 1))):
        with pytest.raises(InputError, match="at most 64 are drawn"):
            runtime.draw(images)
    for images, message in (([], "at least one image"), (np.zeros((2, 3, 9, 9), np.float32), "expected float32")):
        with pytest.raises(InputError, match=message):
            runtime.draw(images)  # type: ignore[arg-type]
    (tmp_path / "broken.png").write_bytes(b"no picture")
    with pytest.raises(InputError, match=r"broken\.png"):
        runtime.draw([picture(), tmp_path / "broken.png"])


def test_a_run_tells_how_its_images_were_made(runtime: Runtime) -> None:
    result: Result = runtime.run(random_images(runtime.architecture, 1))
    assert result.preprocessor == runtime.bundle.preprocessor
    assert "preprocessor" not in repr(result)
