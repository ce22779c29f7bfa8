import hashlib
import json
from pathlib import Path

from click.testing import CliRunner

import adavit
from adavit.cli import export, run
from adavit.runtime.bundle import Bundle
from adavit.runtime.demo import demo_bundle

DEMO = Path(adavit.__file__).parent / "demo"


def test_the_bundle_that_ships_is_of_the_checkpoint_that_ships() -> None:
    runtime = adavit.load(demo_bundle(), threads=1)
    checkpoint = (DEMO / "checkpoint.safetensors").read_bytes()
    assert runtime.bundle.config["checkpoint"]["sha256"] == hashlib.sha256(checkpoint).hexdigest()
    assert {"dense", "empty"} < set(runtime.bundle.engines)


def test_without_arguments_the_demo_runs_on_its_own_images() -> None:
    done = CliRunner().invoke(run, ["--iterations", "2", "--warmup", "0", "--threads", "1", "--json", "-"])
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert (report["model"], report["images"], report["accuracy"]["n"]) == ("adavit-demo", 20, 20)
    assert report["accuracy"]["top1"] > 0.6
    assert report["macs"]["executed_mean"] < report["macs"]["dense"]


def test_an_export_of_the_demo_has_its_operating_points(tmp_path: Path) -> None:
    done = CliRunner().invoke(export, ["demo", "--output", str(tmp_path / "demo")])
    assert done.exit_code == 0, done.output
    exported, shipped = Bundle.open(tmp_path / "demo"), Bundle.open(demo_bundle())
    assert exported.config["checkpoint"] == shipped.config["checkpoint"]
    assert exported.budgets == shipped.budgets
    assert set(exported.engines) == set(shipped.engines)
    larger = CliRunner().invoke(export, ["demo", "--output", str(tmp_path / "larger"), "--image-size", "32"])
    assert larger.exit_code == 0, larger.output
    assert Bundle.open(tmp_path / "larger").budgets is None
