"""The page's pixels are those of the runtime, to the last bit."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from example_cases import EXAMPLES, toned
from PIL import Image

from adavit.bundle.preprocessing import Preprocessor

SIZES = ((28, 28), (300, 200), (31, 57), (640, 479), (20, 17), (28, 90), (33, 28), (1, 1), (8, 3))
PREPROCESSORS = (Preprocessor(28, 1.0), Preprocessor(224, 0.9), Preprocessor(32, 0.875, (0.5,) * 3, (0.5,) * 3))
TONES = ("plain", "stretched", "inverted")


def noisy(width: int, height: int, seed: int) -> Image.Image:
    """A picture with areas, edges and noise."""
    source = np.random.default_rng(seed)
    areas = source.integers(0, 256, (height // 7 + 1, width // 7 + 1, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(areas).resize((width, height), Image.Resampling.BICUBIC), np.int64)
    return Image.fromarray(np.clip(smooth + source.integers(-60, 60, smooth.shape), 0, 255).astype(np.uint8))


def run(node: str, folder: Path, cases: list[dict[str, Any]]) -> list[str]:
    """Preprocesses cases with the page's code; the tones that it suggests."""
    for name in (EXAMPLES / "package.json", EXAMPLES / "browser" / "pixels.js"):
        shutil.copy(name, folder)
    shutil.copy(Path(__file__).parent / "pixels.js", folder / "run.js")
    (folder / "cases.json").write_text(json.dumps(cases))
    command = [node, "run.js", "./pixels.js", "cases.json"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found: list[str] = json.loads(done.stdout)
    return found


def case(folder: Path, picture: Image.Image, tone: str, preprocessor: Preprocessor) -> dict[str, Any]:
    """A case whose pixels are in a file of their own."""
    file = folder / f"{len(list(folder.iterdir()))}.raw"
    file.write_bytes(picture.tobytes())
    width, height = picture.size
    preprocessing = preprocessor.to_dict()
    return {"file": str(file), "width": width, "height": height, "tone": tone, "preprocessing": preprocessing}


def test_pixels_are_those_of_the_runtime(node: str, tmp_path: Path) -> None:
    cases, wanted = [], []
    for seed, (width, height) in enumerate(SIZES):
        picture = noisy(width, height, seed)
        for tone in TONES:
            for preprocessor in PREPROCESSORS:
                cases.append(case(tmp_path, picture, tone, preprocessor))
                wanted.append(preprocessor(toned(picture, tone)))
    run(node, tmp_path, cases)
    for one, pixels in zip(cases, wanted, strict=True):
        found = np.fromfile(one["file"] + ".out", np.float32).reshape(pixels.shape)
        np.testing.assert_array_equal(found, pixels, err_msg=str(one))


@pytest.mark.parametrize(("ground", "tone"), [(230, "inverted"), (20, "stretched")])
def test_a_light_ground_is_inverted(node: str, tmp_path: Path, ground: int, tone: str) -> None:
    pixels = np.full((90, 120, 3), 255 - ground, np.uint8)
    pixels[:5], pixels[-5:], pixels[:, :5], pixels[:, -5:] = (ground,) * 4
    one = case(tmp_path, Image.fromarray(pixels), "plain", PREPROCESSORS[0])
    assert run(node, tmp_path, [one]) == [tone]
