import hashlib
import json
import shutil
from pathlib import Path

import pytest
from cases import invoke, refusal
from click.testing import CliRunner

import adavit
from adavit.bundle.bundle import Bundle
from adavit.bundle.demo import demo_bundle
from adavit.bundle.statistics import operating_offsets, policy_at
from adavit.cli import export, run
from adavit.cli_train import main

DEMO = Path(adavit.__file__).parent / "demo"


def test_the_weights_that_ship_are_the_checkpoint() -> None:
    """They are there once: the bundle is what an export of its own weights makes."""
    runtime = adavit.load(demo_bundle(), threads=1)
    checkpoint = (demo_bundle() / "fp32" / "model.safetensors").read_bytes()
    assert runtime.bundle.config["checkpoint"]["sha256"] == hashlib.sha256(checkpoint).hexdigest()
    assert runtime.graphs.files.dense is not None
    assert sum(path.stat().st_size for path in demo_bundle().rglob("*") if path.is_file()) <= 13_000_000


def test_the_demo_starts_with_what_calibration_images_kept() -> None:
    bundle = Bundle.open(demo_bundle())
    points = [policy_at(bundle, offsets) for offsets in operating_offsets(bundle)]
    used = [policy.tokens.mean() for policy in points if policy is not None]
    assert len(used) == len(bundle.budgets.points)
    assert used[1] < used[0] < used[-1]  # the trained point comes first, then the least budget


def test_without_arguments_the_demo_runs_on_its_own_images() -> None:
    done = CliRunner().invoke(run, ["--iterations", "2", "--warmup", "0", "--threads", "1", "--json", "-"])
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert (report["model"], report["images"], report["accuracy"]["n"]) == ("adavit-demo", 20, 20)
    assert report["accuracy"]["top1"] > 0.6
    assert report["macs"]["executed_mean"] < report["macs"]["dense"]
    assert report["notes"] == []


def test_an_export_of_the_demo_has_its_operating_points(tmp_path: Path) -> None:
    done = CliRunner().invoke(export, ["demo", "--output", str(tmp_path / "demo")])
    assert done.exit_code == 0, done.output
    exported, shipped = Bundle.open(tmp_path / "demo"), Bundle.open(demo_bundle())
    assert exported.config["checkpoint"] == shipped.config["checkpoint"]
    assert exported.budgets == shipped.budgets
    assert exported.graphs == shipped.graphs
    larger = CliRunner().invoke(export, ["demo", "--output", str(tmp_path / "larger"), "--image-size", "32"])
    assert larger.exit_code == 0, larger.output
    assert Bundle.open(tmp_path / "larger").budgets is None


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_demo_by_its_name(elsewhere: Path) -> None:
    assert adavit.load("demo", threads=1).bundle.path == demo_bundle()
    assert adavit.load(Path("demo"), threads=1).bundle.name == "adavit-demo"
    done = invoke(run, "demo", "--iterations", 1, "--warmup", 0, "--threads", 1, "--no-dense", "--json", "-")
    assert done.exit_code == 0, done.output
    values = json.loads(done.stdout)
    assert (values["model"], values["input"], values["accuracy"]["n"]) == ("adavit-demo", "images", 20)
    images = DEMO / "images" / "bag"
    done = invoke(run, "--compare", "demo", "demo", "--images", images, "--threads", 1, "--json", "-")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["images"] == 2


def test_the_demo_is_checked_by_its_name(elsewhere: Path) -> None:
    done = invoke(export, "--check", "demo", "--against", "demo", "--threads", 1)
    assert done.exit_code == 0, done.output
    assert "decisions identical" in done.stdout


def test_the_demo_is_evaluated_by_its_name(elsewhere: Path) -> None:
    shutil.copytree(DEMO / "images", "data/val")
    done = invoke(main, "evaluate", "demo", "--data", "data", "--threads", 1, "--no-random", "--json", "-")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert (found["images"], found["classes"][0]["name"]) == (20, adavit.load("demo", threads=1).labels[0])


def test_a_file_or_folder_of_that_name_wins(elsewhere: Path, tiny_bundle: Path) -> None:
    shutil.copytree(tiny_bundle, "demo")
    assert adavit.load("demo", threads=1).bundle.name == "tiny"
    assert json.loads(invoke(run, "demo", "--iterations", 1, "--json", "-").stdout)["input"] == "random"
    shutil.rmtree("demo")
    Path("demo").touch()
    assert "demo: is a file, and a bundle is a folder" in refusal(invoke(run, "demo"))


def test_nothing_is_added_to_the_demo_that_is_installed(elsewhere: Path) -> None:
    before = (demo_bundle() / "config.json").read_bytes()
    for options in (["--budgets", "0.3", "--calibration-images", DEMO / "images"], ["--target", "tensorrt-rtx"]):
        message = refusal(invoke(export, "demo", *options), code=2)
        assert "the demo's bundle stays as it is; give --output BUNDLE, for a bundle of your own" in message
    assert (demo_bundle() / "config.json").read_bytes() == before
