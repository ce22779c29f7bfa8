import hashlib
import json
from pathlib import Path

from click.testing import CliRunner

import adavit
from adavit.cli import run
from adavit.runtime.evaluate import demo_bundle

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
