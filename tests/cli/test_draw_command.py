"""`adavit-run --draw`, end to end."""

from pathlib import Path

import numpy as np
import pytest
from cases import invoke, pictures_in, refusal
from PIL import Image

from adavit.cli import run
from adavit.runtime import Runtime

SHORT = ("--iterations", 1, "--warmup", 0, "--threads", 1, "--no-dense")


def usage_error(*arguments: object) -> str:
    """What a mistake in the usage is told."""
    return refusal(invoke(run, *arguments), 2)


@pytest.mark.parametrize("batch", [1, 3, 16])
def test_it_draws_the_first_images_of_the_run(tiny_bundle: Path, runtime: Runtime, tmp_path: Path, batch: int) -> None:
    (tmp_path / "photos").mkdir()
    photos = pictures_in(tmp_path / "photos", 10)
    (photos / "00.png").write_bytes(b"no picture")
    target = tmp_path / "KEPT.PNG"
    done = invoke(run, tiny_bundle, *SHORT, "--images", photos, "--draw", target, "--batch", batch)
    assert done.exit_code == 0, done.output
    with Image.open(target) as drawn:
        assert drawn.format == "PNG"
        assert drawn.copy() == runtime.draw(sorted(photos.iterdir())[1:9])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["KEPT.PNG", "photos"]


def test_a_replayed_policy_is_what_is_drawn(tiny_bundle: Path, runtime: Runtime, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    photos = pictures_in(tmp_path / "photos", 2)
    images = np.stack([runtime.preprocess(path) for path in sorted(photos.iterdir())])
    policy = runtime.run(images).policy
    policy.tokens[:, 2, 1:] = False
    policy.save(tmp_path / "policy.npz")
    drawn = []
    for options in ((), ("--replay-policy", tmp_path / "policy.npz")):
        done = invoke(run, tiny_bundle, *SHORT, "--images", photos, "--draw", tmp_path / "kept.png", *options)
        assert done.exit_code == 0, done.output
        with Image.open(tmp_path / "kept.png") as picture:
            drawn.append(picture.copy())
    assert drawn[0].size == drawn[1].size
    assert drawn[0] != drawn[1]


def test_the_demo_draws_its_own_images(tmp_path: Path) -> None:
    done = invoke(run, *SHORT, "--draw", tmp_path / "kept.png", "--budget", 0.35)
    assert done.exit_code == 0, done.output
    with Image.open(tmp_path / "kept.png") as drawn:
        assert drawn.width < 900


def test_mistakes_in_its_usage(tiny_bundle: Path, labelled: Path, tmp_path: Path) -> None:
    target = tmp_path / "kept.png"
    assert "give --images too" in usage_error(tiny_bundle, *SHORT, "--draw", target)
    for name in ("kept.jpg", "kept", "-"):
        assert "end it in .png" in usage_error(tiny_bundle, *SHORT, "--images", labelled, "--draw", name)
    compared = ("--compare", tiny_bundle, tiny_bundle, "--images", labelled)
    assert "without --draw" in usage_error(*compared, "--draw", target)
    assert not target.exists()


def test_a_place_that_takes_no_file_is_refused_beforehand(tiny_bundle: Path, labelled: Path, tmp_path: Path) -> None:
    missing = refusal(invoke(run, tiny_bundle, *SHORT, "--images", labelled, "--draw", tmp_path / "no" / "kept.png"))
    assert "no such folder to write into" in missing
    (tmp_path / "folder.png").mkdir()
    folder = refusal(invoke(run, tiny_bundle, *SHORT, "--images", labelled, "--draw", tmp_path / "folder.png"))
    assert "is a folder" in folder


def test_a_failure_while_writing_leaves_nothing(
    tiny_bundle: Path, labelled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Image.Image, file: object, *_: object, **__: object) -> None:
        file.write(b"half")  # type: ignore[attr-defined]
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    done = invoke(run, tiny_bundle, *SHORT, "--images", labelled, "--draw", tmp_path / "kept.png")
    assert "the disk is full" in refusal(done)
    assert list(tmp_path.iterdir()) == []


def test_one_file_is_not_written_twice(tiny_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    photos = pictures_in(tmp_path / "photos", 1)
    (tmp_path / "link.png").symlink_to("kept.png")
    for draw, other in (("kept.png", "--json"), ("link.png", "--record-policy")):
        said = usage_error(tiny_bundle, "--images", photos, "--draw", tmp_path / draw, other, tmp_path / "kept.png")
        assert "--draw" in said and f"{other}" in said and "name two" in said
    assert not (tmp_path / "kept.png").exists()


@pytest.mark.parametrize("option", ["--draw", "--json", "--record-policy", "--profile"])
def test_a_link_that_goes_round_is_refused_first(option: str, tiny_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "loop.png").symlink_to("loop.png")
    assert "goes round" in refusal(invoke(run, tiny_bundle, option, tmp_path / "loop.png"), 1)
