"""What a run says before its first step, and what it looks for then."""

import shutil
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image
from training_cases import tiny

from adavit.cli_train import main
from adavit.model import load_checkpoint
from adavit.training import start
from adavit.training.data import open_images
from adavit.training.distributed import World
from adavit.training.loop import Intervals, Trainer
from adavit.training.run_summary import expected_stages, measure_pictures
from adavit.training.settings import PolicySettings, Settings

SHAPES = ("--width", 16, "--heads", 2, "--depth", 1)
SHORT = ("--batch", 8, "--steps", 2, "--warmup", 1, "--threads", 1)


def call(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def write_folders(folder: Path, sizes: list[tuple[int, int]]) -> Path:
    """Two classes, a dark and a bright one, of pictures of the given widths and heights in turn."""
    for part, count in (("train", 8), ("val", 2)):
        for label, name in enumerate(("cat", "dog")):
            (folder / part / name).mkdir(parents=True)
            for index in range(count):
                picture = Image.new("RGB", sizes[index % len(sizes)], (100 * label + index,) * 3)
                picture.save(folder / part / name / f"{index}.png")
    return folder


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    return write_folders(tmp_path / "pictures", [(64, 64)])


def test_a_run_says_what_it_found_on_standard_error(tmp_path: Path, pictures: Path) -> None:
    done = call("dense", "--data", pictures, "-o", tmp_path / "dense", *SHAPES, *SHORT, "--patch-size", 16)
    assert done.exit_code == 0, done.output
    for words in (
        "16 training and 4 test images of 2 classes: cat, dog\n",
        "64 x 64 pixels; trained at 64 x 64 pixels\n",
        "1 block of width 16, 2 heads, patch stem, 16 patches of 16 x 16 pixels",
        "2 steps of 8 images, 1 epoch, fp32, on 1 CPU thread\n",
    ):
        assert words in done.stderr
    weights = tmp_path / "dense" / "weights.safetensors"
    assert done.stdout == f"{weights}: 50.00 % of the test images right\n"
    done = call("adapt", "--data", pictures, "-o", tmp_path / "run", "--from", weights, *SHORT, "--head-target", 0.75)
    assert done.exit_code == 0, done.output
    assert "tokens 50.0%, heads 75.0%, sub-layers 50.0%; about" in done.stderr
    assert f"teacher     {weights}\n" in done.stderr


def test_without_a_terminal_evaluations_are_told(tmp_path: Path, pictures: Path) -> None:
    options = (*SHAPES, *SHORT, "--patch-size", 16, "--evaluate-every", 1)
    done = call("dense", "--data", pictures, "-o", tmp_path / "dense", *options)
    told = [line for line in done.stderr.splitlines() if line.startswith("step ")]
    assert [line.split(":")[0] for line in told] == ["step 1 of 2", "step 2 of 2"]
    assert all("of the test images right" in line for line in told)


def test_a_resumed_run_says_where_it_goes_on(tmp_path: Path, pictures: Path) -> None:
    run = ("dense", "--data", pictures, "-o", tmp_path / "dense", *SHAPES, *SHORT, "--patch-size", 16)
    assert "goes on" not in call(*run).stderr
    assert "goes on at step 2 of 2 steps" in call(*run, "--resume").stderr


@pytest.mark.parametrize(
    ("side", "given", "expected"),
    [
        (8, {}, (28, 4)),
        (28, {}, (28, 4)),
        (32, {}, (32, 4)),
        (64, {}, (64, 4)),
        (65, {}, (64, 4)),
        (96, {}, (96, 8)),
        (500, {}, (224, 16)),
        (28, {"patch_size": 7}, (28, 7)),
        (28, {"patch_size": 3}, (27, 3)),
        (64, {"image_size": 28}, (28, 4)),
        (64, {"image_size": 100}, (100, 4)),
        (64, {"image_size": 224}, (224, 16)),
        (64, {"stem": "t2t"}, (224, 16)),
    ],
)
def test_a_new_model_follows_the_size_of_the_pictures(
    side: int, given: dict[str, object], expected: tuple[int, int]
) -> None:
    arch = start.dense_shapes(None, given, 10, side)
    assert (arch.image_size, arch.patch_size) == expected


def test_pictures_that_weights_shrink_are_told(tmp_path: Path, pictures: Path) -> None:
    first = ("dense", "--data", pictures, *SHAPES, *SHORT)
    assert call(*first, "-o", tmp_path / "small", "--image-size", 32, "--patch-size", 16).exit_code == 0
    small = tmp_path / "small" / "weights.safetensors"
    again = ("dense", "--data", pictures, *SHORT, "--from", small, "--heads", 2)
    done = call(*again, "-o", tmp_path / "next")
    assert "warning: pictures of 64 x 64 pixels are trained at 32 x 32, the size of --from; a larger" in done.stderr
    assert "64 x 64 pixels; trained at 32 x 32 pixels, resized\n" in done.stderr
    done = call(*again, "-o", tmp_path / "asked", "--image-size", 32)
    assert done.exit_code == 0 and "warning" not in done.stderr


def test_pictures_of_many_sizes(tmp_path: Path) -> None:
    data = write_folders(tmp_path / "data", [(40, 30), (64, 48), (100, 90)])
    found = measure_pictures(open_images(data, "train"))
    assert (str(found), found.side) == ("40 to 100 x 30 to 90 pixels", 48)


def test_sizes_of_idx_images(idx_folder: Path) -> None:
    found = measure_pictures(open_images(idx_folder, "train"))
    assert (str(found), found.side) == ("8 x 8 pixels", 8)


def test_classes_without_a_training_image_are_told(tmp_path: Path, pictures: Path) -> None:
    labels = tmp_path / "labels.txt"
    labels.write_text("cat\ndog\nemu\nfox\n")
    options = (*SHAPES, *SHORT, "--patch-size", 16, "--labels", labels)
    done = call("dense", "--data", pictures, "-o", tmp_path / "dense", *options)
    assert done.exit_code == 0, done.output
    assert "2 of the classes have no training image: emu, fox\n" in done.stderr


def refused(words: str, *arguments: object) -> None:
    done = call(*arguments)
    assert done.exit_code == 1, done.output
    assert words in done.output and done.output.count("\n") == 1


@pytest.mark.parametrize("package", ["matplotlib", "safetensors"])
def test_packages_of_the_end_are_looked_for_at_the_start(
    package: str, tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    run = ("dense", "--data", pictures, "-o", tmp_path / "dense", *SHAPES, *SHORT)
    refused(f"{package} is not installed; run: pip install", *run)
    assert not (tmp_path / "dense").exists()


def test_a_plot_needs_matplotlib_before_anything_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    absent = ("evaluate", tmp_path / "absent", "--data", tmp_path)
    refused("matplotlib is not installed", *absent, "--plot", tmp_path / "plot.png")
    refused("absent: no such file", *absent)


def test_places_that_cannot_be_written_are_refused_first(tmp_path: Path, pictures: Path) -> None:
    (tmp_path / "file").write_text("")
    for place in ("file", "file/run"):
        refused("is no folder that can be written to", "dense", "--data", pictures, "-o", tmp_path / place, *SHORT)
    absent = ("evaluate", tmp_path / "absent", "--data", pictures)
    refused("--json ", *absent, "--json", tmp_path / "none" / "report.json")
    refused("--plot ", *absent, "--plot", tmp_path)


def test_a_disk_that_is_nearly_full_is_told(tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    done = call("dense", "--data", pictures, "-o", tmp_path / "dense", *SHAPES, *SHORT, "--patch-size", 16)
    assert done.exit_code == 0
    assert "warning: " in done.stderr and "MB free, where checkpoints need about" in done.stderr


def test_models_to_compare_with_are_opened_before_any_runs(
    tmp_path: Path, idx_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = ("dense", "--data", idx_folder, "-o", tmp_path / "dense", *SHAPES, *SHORT, "--image-size", 8)
    assert call(*run, "--patch-size", 4).exit_code == 0
    weights = tmp_path / "dense" / "weights.safetensors"
    assert load_checkpoint(weights).arch.image_size == 8

    def never(*_: object) -> None:
        raise AssertionError("a model ran")

    monkeypatch.setattr("adavit.training.evaluation.predict", never)
    for other in ("--dense", "--baseline"):
        refused("absent: no such file", "evaluate", weights, "--data", idx_folder, other, tmp_path / "absent")


@pytest.mark.parametrize("name", ["dense", "adapt", "evaluate"])
def test_help_has_headings_and_ends_with_an_example(name: str) -> None:
    text = call(name, "--help").output
    headings = {"dense": ["Model:", "Distillation:"], "adapt": ["Model:", "Policies:"], "evaluate": ["Comparison:"]}
    for heading in ["Data", *headings[name]]:
        assert f"\n{heading}" in text
    assert text.rstrip().splitlines()[-1].startswith(f"  adavit-train {name} ")
    assert text.index("--data") < text.index("--seed") and "\x1b" not in text


def test_the_next_step_is_the_last_line(tmp_path: Path, pictures: Path) -> None:
    dense, run = tmp_path / "my dense", tmp_path / "run"
    done = call("dense", "--data", pictures, "-o", dense, *SHAPES, *SHORT, "--patch-size", 16)
    assert done.stderr.splitlines()[-1] == (
        f"next: adavit-train adapt --data {pictures} -o RUN --from '{dense}/weights.safetensors'"
    )
    weights = run / "weights.safetensors"
    done = call("adapt", "--data", pictures, "-o", run, "--from", dense / "weights.safetensors", *SHORT)
    assert done.exit_code == 0, done.output
    assert done.stderr.splitlines()[-1] == (
        f"next: adavit-export {weights} --output BUNDLE, or adavit-train evaluate {weights} --data {pictures}"
    )
    assert "\n            then up to 24 rounds over 16 training images to meet the targets\n" in done.stderr


def test_weights_of_other_classes_are_refused_with_the_command_that_fits_them(tmp_path: Path, pictures: Path) -> None:
    for part in ("train", "val"):
        shutil.copytree(pictures / part / "dog", tmp_path / "three" / part / "emu")
        for name in ("cat", "dog"):
            shutil.copytree(pictures / part / name, tmp_path / "three" / part / name)
    dense = ("dense", *SHAPES, *SHORT, "--patch-size", 16)
    assert call(*dense, "--data", pictures, "-o", tmp_path / "dense").exit_code == 0
    weights, data = tmp_path / "dense" / "weights.safetensors", tmp_path / "three"
    adapt = ("adapt", "--data", data, "-o", tmp_path / "run", *SHORT, "--from", weights)
    words = f"run `adavit-train dense --from {weights} --data {data} -o DENSE`, then adapt"
    refused(f"the weights know 2 classes, the data has 3; {words}", *adapt)
    refused("the teacher's class count is 2, the student's 3; train", *adapt, "--teacher", weights)


def test_the_time_that_is_left_follows_from_the_work(tmp_path: Path, pictures: Path) -> None:
    train, test = (open_images(pictures, part) for part in ("train", "test"))
    arch = tiny(image_size=64, patch_size=16)
    settings = Settings(steps=4, batch=8, policy=PolicySettings())
    trainer = Trainer(start.new_model(arch, 0), settings, World(0, 1, torch.device("cpu")), tmp_path)
    stages = expected_stages(trainer, train, test, Intervals(1, 1, 2))
    assert [stage.name for stage in stages] == ["training", "meeting the targets", "evaluating"]
    training, balancing, evaluating = (stage.seconds / stages[2].seconds for stage in stages)
    assert (training, balancing, evaluating) == pytest.approx(((4 * 8 * 3 + 4) / 4, 24 * 16 / 4, 1))
    trainer.step, trainer.unfinished = 4, {"loss": 1.0}
    rest = expected_stages(trainer, train, test, Intervals(1, 1, 2))
    assert rest == stages[1:]
    trainer.unfinished = None
    assert expected_stages(trainer, train, test, Intervals(1, 1, 2)) == []
