"""`adavit-run` and `adavit-train evaluate` tell the same of a bundle, and a checkpoint of itself."""

import json
import shutil
from pathlib import Path

import pytest
from cases import random_model, save, tiny
from click.testing import CliRunner

from adavit import cli
from adavit.cli_train import main
from adavit.export import ExportOptions, export_bundle
from adavit.model import save_safetensors

LABELS = ("ant", "bee", "cat", "dog", "elk")
KINDS = {"tokens", "heads", "sublayers"}


@pytest.fixture
def often_off(tmp_path: Path) -> tuple[Path, Path]:
    """A model whose blocks often run neither sub-layer: its checkpoint and its bundle."""
    checkpoint = save(random_model(tiny(), sublayers=-1.0, tokens=-1.0), tmp_path / "often.safetensors")
    labels = tmp_path / "labels.txt"
    labels.write_text("\n".join(LABELS) + "\n")
    export_bundle(checkpoint, tmp_path / "bundle", ExportOptions(labels=labels, crop_ratio=0.9), lambda *_: None)
    return checkpoint, tmp_path / "bundle"


def report(command: object, *arguments: object) -> dict[str, object]:
    done = CliRunner().invoke(command, [str(argument) for argument in (*arguments, "--json", "-")])  # type: ignore[arg-type]
    assert done.exit_code == 0, done.output
    found: dict[str, object] = json.loads(done.stdout)
    return found


def test_run_and_evaluate_agree(often_off: tuple[Path, Path], labelled: Path, tmp_path: Path) -> None:
    checkpoint, bundle = often_off
    shutil.copytree(labelled, tmp_path / "data" / "val")
    (tmp_path / "labels.txt").write_text("\n".join(LABELS) + "\n")
    quick = ("--iterations", 1, "--warmup", 0, "--threads", 1, "--no-specialise")
    ran = report(cli.run, bundle, "--images", labelled, *quick)
    macs = ran["macs"]
    assert isinstance(macs, dict)
    options = ("--data", tmp_path / "data", "--threads", 1, "--no-random")
    for source, more in ((bundle, ()), (checkpoint, ("--crop", 0.9, "--labels", tmp_path / "labels.txt"))):
        found = report(main, "evaluate", source, *options, *more)
        assert found["usage"] == pytest.approx(ran["usage"])
        assert found["macs"] == pytest.approx(macs["executed_mean"] / macs["dense"])
        assert found["accuracy"] == pytest.approx(ran["accuracy"]["top1"])  # type: ignore[index]
        target = found["target_usage"]
        assert isinstance(target, dict) and set(target) == KINDS
        assert target != pytest.approx(ran["usage"])  # of adapted blocks alone


def test_an_evaluation_names_both_usages(often_off: tuple[Path, Path], labelled: Path, tmp_path: Path) -> None:
    shutil.copytree(labelled, tmp_path / "data" / "val")
    done = CliRunner().invoke(main, ["evaluate", str(often_off[1]), "--data", str(tmp_path / "data")])
    assert "what ran, over all blocks" in done.stdout
    assert "usage as the targets of training count it" in done.stdout


def test_class_names_that_do_not_fit_give_way_with_a_note(labelled: Path, tmp_path: Path) -> None:
    numbered = tmp_path / "data" / "val"
    for number, name in enumerate(("bee", "bee", "dog", "dog", "dog")):
        shutil.copytree(labelled / name, numbered / str(number))
    checkpoint = tmp_path / "named.safetensors"
    save_safetensors(random_model(tiny()), checkpoint, {"classes": ["a", "b"]})
    done = CliRunner().invoke(main, ["evaluate", str(checkpoint), "--data", str(tmp_path / "data"), "--no-random"])
    assert done.exit_code == 0, done.output
    assert "adavit-train: warning: " in done.stderr
    assert "notes 2 class names for 5 classes; numbers name its classes, give --labels" in done.stderr
