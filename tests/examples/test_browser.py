"""The page in a real browser: what a person does, and the same numbers as the runtime's."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cases import assert_same_policy
from example_cases import REPOSITORY, plain_server, toned
from PIL import Image, ImageFilter, ImageOps

import adavit
from adavit.runtime import Policy, Runtime

pytestmark = pytest.mark.slow
SECONDS = 300
Found = dict[str, Any]
Play = Callable[..., Found]


@pytest.fixture(scope="module")
def demo() -> Runtime:
    return adavit.load("demo", threads=1, specialise=False)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Photographs of a person: a garment that is dark on light, one as JPEG, and files that cannot be shown."""
    folder = tmp_path_factory.mktemp("files")
    shirt = Image.open(REPOSITORY / "adavit/demo/images/shirt/00004.png").convert("L")
    large = ImageOps.invert(shirt).resize((420, 300), Image.Resampling.BICUBIC)
    tinted = ImageOps.colorize(large, (40, 20, 60), (230, 240, 225))
    names = {"light": "light.png", "jpeg": "photo.jpg", "text": "notes.txt", "large": "large.png", "long": "long.png"}
    found = {key: folder / name for key, name in names.items()}
    tinted.save(found["light"])
    tinted.filter(ImageFilter.GaussianBlur(3)).save(found["jpeg"], quality=95)
    found["text"].write_text("no picture")
    Image.new("L", (10100, 10000)).save(found["large"])
    Image.new("L", (1300, 20)).save(found["long"])
    return found


@pytest.fixture(scope="module")
def driver(npm: Callable[..., Path]) -> Path:
    folder = npm("driver", "puppeteer-core@24")
    (folder / "package.json").write_text('{"type": "module"}')
    (folder / "browser.js").write_text((Path(__file__).parent / "browser.js").read_text())
    return folder


@pytest.fixture(scope="module")
def play(driver: Path, node: str, chromium: str, files: dict[str, Path]) -> Play:
    """Runs one of the stories of browser.js."""

    def run(story: str, url: str, **more: object) -> Found:
        named = {key: str(path) for key, path in files.items()}
        asked = {"story": story, "url": url, "chromium": chromium, "files": named, "timeout": SECONDS * 1000, **more}
        command = [node, "browser.js", json.dumps(asked)]
        done = subprocess.run(command, cwd=driver, capture_output=True, text=True, timeout=2 * SECONDS)
        assert done.returncode == 0, done.stderr
        found: Found = json.loads(done.stdout)
        return found

    return run


@pytest.fixture(scope="module")
def whole(prepared: tuple[Path, str], play: Play, tmp_path_factory: pytest.TempPathFactory) -> Found:
    """What a long visit at a desktop shows, with one thread."""
    return play("whole", prepared[1] + "?threads=1", shots=str(tmp_path_factory.mktemp("shots")))


def crop_of(step: Found, runtime: Runtime) -> np.ndarray:
    side = runtime.architecture.image_size
    return np.array(step["crop"], np.uint8).reshape(side, side, 3)


def check(step: Found, runtime: Runtime) -> None:
    """Compares what the page shows with the runtime's result for the same pixels."""
    arch = runtime.architecture
    pixels = runtime.preprocess(crop_of(step, runtime))[None]
    result = runtime.run(pixels, budget=np.float32(step["budget"]).item() or None)
    sizes = {"tokens": arch.tokens, "heads": arch.heads, "sublayers": 2}
    masks = {name: np.array(step[name], bool).reshape(1, arch.depth, size) for name, size in sizes.items()}
    assert_same_policy(Policy(**masks), result.policy)
    np.testing.assert_allclose(step["logits"], result.logits[0], atol=1e-4)
    assert step["macs"] == result.macs[0]
    assert runtime.labels
    best = runtime.labels[int(result.logits.argmax())].replace("_", " ")
    assert step["best"].startswith(best) and step["spoken"].startswith(best)
    assert step["saved"] == f"{result.macs[0] / runtime.dense_macs:.0%}".replace("%", " %")


STEPS = ("first", "clicked", "keyed", "dragged", "arrowed", "trained", "dropped", "toned", "picked", "text")


@pytest.mark.parametrize("name", STEPS)
def test_the_page_shows_what_the_runtime_finds(whole: Found, demo: Runtime, name: str) -> None:
    check(whole["steps"][name], demo)


def test_pictures_are_cropped_as_the_runtime_crops(
    whole: Found, demo: Runtime, files: dict[str, Path], prepared: tuple[Path, str]
) -> None:
    preprocessor = demo.run(np.zeros((1, 3, 28, 28), np.float32)).preprocessor
    for name, file, most in (
        ("clicked", prepared[0] / "samples" / "sandal.png", 0),
        ("dropped", files["light"], 0),
        ("toned", files["light"], 0),
        ("picked", files["jpeg"], 3),  # decoders of JPEG round differently
    ):
        step = whole["steps"][name]
        with Image.open(file) as picture:
            wanted = preprocessor.crop(toned(picture.convert("RGB"), step["tone"]))
        assert np.abs(crop_of(step, demo).astype(int) - wanted).max() <= most, name


def test_the_budget_acts_at_once(whole: Found) -> None:
    steps = whole["steps"]
    assert steps["first"]["budget"] == 0 and steps["first"]["share"] == "about 41 %"
    assert steps["keyed"]["budget"] == pytest.approx(0.38)
    assert steps["dragged"]["budget"] == pytest.approx(whole["dragged"]) and whole["dragged"] > 0.6
    assert steps["dragged"]["macs"] > steps["keyed"]["macs"]
    assert steps["trained"]["budget"] == 0
    assert whole["results"] <= steps["text"]["id"]


def test_pictures_are_chosen_dropped_and_picked(whole: Found) -> None:
    steps = whole["steps"]
    assert [steps[name]["picture"] for name in ("first", "clicked", "arrowed")] == ["ankle boot", "sandal", "shirt"]
    assert (steps["dropped"]["picture"], steps["dropped"]["tone"]) == ("light.png", "inverted")
    assert (steps["toned"]["picture"], steps["toned"]["tone"]) == ("light.png", "stretched")
    assert steps["picked"]["picture"] == "photo.jpg"


def test_a_file_that_is_no_picture_is_named_and_left_out(whole: Found) -> None:
    assert whole["message"] == "notes.txt: this browser cannot read it as a picture"
    assert whole["names"][-2:] == ["light.png", "photo.jpg"]
    assert whole["steps"]["text"]["picture"] == "photo.jpg"  # as before
    assert whole["errors"] == []


@pytest.fixture(scope="module")
def careless(prepared: tuple[Path, str], play: Play) -> Found:
    """What a hasty visitor sees."""
    return play("careless", prepared[1] + "?threads=1")


def test_files_that_cannot_be_shown_are_left_out(careless: Found, demo: Runtime) -> None:
    large, several, long = careless["messages"]
    assert large == "large.png: 10100x10000 pixels are too many; make it smaller"
    assert several.endswith(".txt: this browser cannot read it as a picture (2 files left out)")
    assert long == "long.png: 1300x20 pixels is too elongated; crop it first (3 files left out)"
    assert careless["names"][10:] == ["light.png", "photo.jpg"]
    assert careless["errors"] == []
    assert careless["steps"]["large"]["budget"] < 0.41
    for step in careless["steps"].values():
        check(step, demo)


def test_a_budget_that_moves_all_the_time_is_followed(careless: Found) -> None:
    assert len(careless["shares"]) > 3


def test_blocks_are_chosen_by_keyboard(whole: Found) -> None:
    blocks = whole["blocks"]
    assert (blocks["chosen"], blocks["left"]) == (1, 0)
    assert blocks["caption"] == blocks["labels"][1]
    assert blocks["outline"] == "solid"
    sublayers = np.array(whole["steps"]["text"]["sublayers"]).reshape(-1, 2)
    assert ["skipped" in label for label in blocks["labels"]] == [not any(pair) for pair in sublayers]


def test_nothing_leaves_the_server(whole: Found, prepared: tuple[Path, str]) -> None:
    places = [request for request in whole["requests"] if not request.startswith(("blob:", "data:"))]
    assert places and all(place.startswith(prepared[1]) for place in places)


def test_any_server_shows_it_with_one_thread(prepared: tuple[Path, str], play: Play, demo: Runtime) -> None:
    with plain_server(prepared[0]) as url:
        found = play("plain", url + "?threads=2")
    check(found["first"], demo)
    assert ", 1 thread." in found["where"] and "COOP and COEP" in found["where"]


def test_a_model_that_is_missing_is_named(prepared: tuple[Path, str], play: Play, tmp_path: Path) -> None:
    folder = shutil.copytree(prepared[0], tmp_path / "page", ignore=shutil.ignore_patterns("model.onnx"))
    with plain_server(folder) as url:
        assert play("broken", url)["message"] == "The model could not be loaded: model.onnx: 404 File not found"


def test_an_isolated_page_has_threads(prepared: tuple[Path, str], play: Play, demo: Runtime) -> None:
    found = play("plain", prepared[1] + "?threads=2")
    check(found["first"], demo)
    assert found["where"].endswith(", 2 threads.")


@pytest.mark.parametrize("asked", ["-1", "100000"])
def test_it_takes_no_more_threads_than_there_are(asked: str, prepared: tuple[Path, str], play: Play) -> None:
    where = play("plain", prepared[1] + f"?threads={asked}")["where"]
    count = re.search(r", (\d+) threads?\.$", where)
    assert count and 1 <= int(count[1]) <= (os.cpu_count() or 1)


def test_a_phone_shows_it(prepared: tuple[Path, str], play: Play, demo: Runtime) -> None:
    found = play("phone", prepared[1] + "?threads=1")
    check(found["tapped"], demo)
    assert found["tapped"]["picture"] == "bag"
    assert found["tops"][0] == found["tops"][1]  # a longer caption moves nothing
    assert found["widths"] == [360, 360]
    assert found["slider"]["bottom"] <= 740  # it stays in sight
    assert found["dark"] == "rgb(18, 20, 23)"


def test_a_port_that_is_taken_is_one_line(prepared: tuple[Path, str]) -> None:
    port = prepared[1].rstrip("/").rsplit(":", 1)[1]
    command = [sys.executable, str(REPOSITORY / "examples/browser/prepare.py"), str(prepared[0]), "--serve", port]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"Error: port {port} cannot be served: ") and done.stderr.count("\n") == 1


def test_without_npm_one_line_says_what_to_install(tmp_path: Path) -> None:
    command = [sys.executable, str(REPOSITORY / "examples/browser/prepare.py"), str(tmp_path / "page")]
    done = subprocess.run(command, env={"PATH": "", "PYTHONPATH": str(REPOSITORY)}, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "Error: npm is missing, which downloads onnxruntime-web; install Node.js\n"
