"""`adavit-export`, end to end."""

import errno
import json
import os
import shutil
from importlib.metadata import entry_points
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import (
    invoke,
    pictures_in,
    random_model,
    read_config,
    refusal,
    save,
    shell,
    stored_files,
    tiny,
    with_weights,
    write_config,
)

import adavit
from adavit.calibration.options import BudgetOptions, CalibrationOptions
from adavit.cli import export
from adavit.console.progress import Stage
from adavit.console.stages import checking_stages, exporting_stages, running_stages
from adavit.export import ExportOptions, check_bundle, export_bundle
from adavit.measure.options import RunOptions
from adavit.measure.run import run_bundle
from adavit.tensorrt.options import BuildOptions


def opset(bundle: Path) -> int:
    return read_config(bundle)["precisions"]["fp32"]["opset"]


def test_the_commands_are_installed() -> None:
    scripts = {script.name: script.value for script in entry_points(group="console_scripts")}
    assert (scripts["adavit-export"], scripts["adavit-run"]) == ("adavit.entry:export", "adavit.entry:run")


def test_export_and_check(checkpoint: Path, tmp_path: Path) -> None:
    bundle, report = tmp_path / "bundle", tmp_path / "report.json"
    done = invoke(export, checkpoint, "--output", bundle, "--with-dense", "--threads", 1, "--json", report)
    assert (done.exit_code, done.stderr) == (0, "")
    assert f"bundle      {bundle}" in done.stdout
    assert "decisions identical" in done.stdout
    values = json.loads(report.read_text())
    expected = {
        "bundle", "precisions", "bytes", "opset", "architecture", "macs", "preprocessing", "verified", "budgets",
        "engine_sets", "seconds", "calibration", "notes",
    }  # fmt: skip
    assert set(values) == expected
    assert values["notes"] == []
    assert values["calibration"] is None  # it is in fp32, which was verified
    stored = stored_files(bundle)
    size = sum((bundle / file).stat().st_size for file in stored.values())
    assert values["precisions"] == {"fp32": {"graphs": len(stored) - 1, "bytes": size}}
    assert values["bytes"] == size
    assert f"fp32        {len(stored) - 1} graphs, " in done.stdout
    assert values["architecture"] == tiny().to_dict()
    done = invoke(export, "--check", bundle, "--against", checkpoint, "--threads", 1, "--json", "-")
    assert (done.exit_code, done.stderr) == (0, "")
    assert json.loads(done.stdout)["verified"] == values["verified"]


def test_in_a_process_of_its_own(checkpoint: Path, tmp_path: Path) -> None:
    done = shell("adavit-export", checkpoint, "-o", tmp_path / "bundle", "--no-verify", "--json", "-")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["verified"] is None
    done = shell("adavit-export", tmp_path / "nothing.pth", "-o", tmp_path / "other")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        f"adavit-export: error: {tmp_path}/nothing.pth: no such file; "
        "give the path of a trained AdaViT (.pth or .safetensors)\n"
    )


def test_options_reach_the_bundle(checkpoint: Path, tmp_path: Path) -> None:
    labels, bundle = tmp_path / "labels.txt", tmp_path / "bundle"
    labels.write_text("a\nb\nc\nd\ne\n")
    options = ["--labels", labels, "--image-size", 48, "--opset", 18, "--crop-ratio", 0.5, "--threads", 1]
    assert invoke(export, checkpoint, "-o", bundle, *options).exit_code == 0
    runtime = adavit.load(bundle, threads=1)
    assert runtime.labels == ("a", "b", "c", "d", "e")
    assert (runtime.architecture.image_size, runtime.bundle.preprocessor.crop_ratio) == (48, 0.5)
    assert opset(bundle) == 18


def test_an_existing_bundle_needs_force(checkpoint: Path, bundle: Path) -> None:
    message = refusal(invoke(export, checkpoint, "-o", bundle))
    assert message == f"adavit-export: error: {bundle}: already there; give --force to replace it\n"
    assert "dense" in stored_files(bundle)
    assert invoke(export, checkpoint, "-o", bundle, "--force", "--threads", 1, "--no-dense").exit_code == 0
    assert "dense" not in stored_files(bundle)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give a CHECKPOINT and --output BUNDLE"),
        (["a.pth"], "give a CHECKPOINT and --output BUNDLE"),
        (["a.pth", "--target", "tensorrt"], "a.pth is no bundle to add to; give a BUNDLE, or a CHECKPOINT and"),
        (["a.pth", "--calibration-images", "c"], "a.pth is no bundle to add to; give a BUNDLE"),
        (["demo", "--calibration-images", "c"], "the demo's bundle stays as it is; give --output BUNDLE"),
        (["-o", "b"], "give a CHECKPOINT and --output BUNDLE"),
        (["--check", "b"], "--check BUNDLE takes --against CHECKPOINT"),
        (["--check", "b", "--against", "a", "-o", "c"], "--check BUNDLE takes --against CHECKPOINT"),
        (["--check", "b", "--against", "a", "--opset", "20"], "to check a BUNDLE, leave out --opset"),
        (["--check", "b", "--against", "a", "--budgets", "0.5"], "to check a BUNDLE, leave out --budgets"),
        (["--check", "b", "--against", "a", "--samples", "32"], "to check a BUNDLE, leave out --samples"),
        (["a", "-o", "b", "--against", "a"], "is verified against its CHECKPOINT, leave out --against"),
        (["a", "-o", "b", "--calibration-images", "c"], "give a --precision or leave out --calibration-images"),
        (["a", "-o", "b", "--budgets", "0.5", "--calibration-images", "c", "--seed", "3"], "or leave out --seed"),
        (["a", "-o", "b", "--opset", "new"], "'new' is not a valid integer"),
        (["a", "-o", "b", "--opset", "3"], "opset 3 is not supported; choose 17 to 23"),
        (["a", "-o", "b", "--image-size", "0"], "0 is not in the range"),
        (["a", "-o", "b", "--heads", "0"], "0 is not in the range"),
        (["a", "-o", "b", "--crop-ratio", "7"], "7.0 is not in the range"),
        (["a", "-o", "b", "--crop-ratio", "nan"], "nan is not a finite number"),
        (["a", "-o", "b", "--max-drop", "nan"], "nan is not a finite number"),
        (["a", "-o", "b", "--max-drop", "1"], "give a --precision or leave out --max-drop"),
        (["a", "-o", "b", "--target", "tensorrt", "--workspace", "9" * 20], "is not in the range"),
        (["a", "-o", "b", "--jobs", "2"], "without a --target"),
        (["a", "-o", "b", "--threads", "0"], "0 is not in the range"),
        (["a", "-o", "b", "--nope"], "No such option"),
        (["a", "b", "-o", "c"], "unexpected extra argument"),
    ],
)
def test_usage(arguments: list[str], message: str) -> None:
    assert message.lower() in refusal(invoke(export, *arguments), code=2).lower()


def test_wrong_checkpoints_and_options(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.pth").write_text("hello")
    state = random_model(tiny()).state_dict()
    torch.save({**state, "norm.bias": state["norm.bias"] / 0}, tmp_path / "nan.pth")
    for source, options, message in (
        (tmp_path / "notes.pth", [], "notes.pth: not a PyTorch checkpoint"),
        (tmp_path / "nan.pth", [], "nan.pth: not a complete AdaViT or ViT: NaN or infinite values in norm.bias"),
        (tmp_path, [], "cannot be read (is a folder, not a file)"),
        (checkpoint, ["--image-size", 31], "image size 31 cannot be had"),
        (checkpoint, ["--labels", tmp_path / "no.txt"], "no.txt: cannot be read as labels"),
        (checkpoint, ["-o", tmp_path / "no" / "bundle"], "no such folder to write the bundle into"),
    ):
        assert message in refusal(invoke(export, source, "-o", tmp_path / "bundle", *options))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["nan.pth", "notes.pth"]


def test_a_check_that_fails_names_block_and_graph(checkpoint: Path, bundle: Path) -> None:
    with_weights(bundle, "blocks.1.norm1.bias", 3.0)
    message = refusal(invoke(export, "--check", bundle, "--against", checkpoint, "--threads", 1))
    assert "block 0, graph both: block 1's decisions on tokens: differs from the checkpoint" in message


def test_a_check_is_of_fp32(checkpoint: Path, bundle: Path) -> None:
    """Whichever precision is the default; and what is checked is nothing to remember."""
    shutil.copytree(bundle / "fp32", bundle / "fp16")
    config = read_config(bundle)
    fp32 = config["precisions"]["fp32"]
    fp16 = json.loads(json.dumps(fp32).replace("fp32/", "fp16/"))
    write_config(bundle, {**config, "precisions": {"fp16": fp16, "fp32": fp32}})
    assert adavit.load(bundle, threads=1, specialise=False).graphs.precision == "fp16"
    done = invoke(export, "--check", bundle, "--against", checkpoint, "--threads", 1)
    assert done.exit_code == 0, done.output
    write_config(bundle, {**config, "precisions": {"fp16": fp16}})
    message = refusal(invoke(export, "--check", bundle, "--against", checkpoint, "--threads", 1))
    assert f"{bundle} is fp16: compare it with fp32 by adavit-run --compare" in message


def test_a_check_against_another_checkpoint_fails(bundle: Path, tmp_path: Path) -> None:
    other = save(random_model(tiny(), seed=1), tmp_path / "other.safetensors")
    assert "the stem: differs" in refusal(invoke(export, "--check", bundle, "--against", other, "--threads", 1))
    assert "no such bundle folder" in refusal(invoke(export, "--check", tmp_path / "no", "--against", other))
    assert "no such file" in refusal(invoke(export, "--check", bundle, "--against", tmp_path / "no.pth"))


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.ENOSPC, "the disk is full; free some space or write elsewhere"),
        (errno.EROFS, "the file system is read-only; write elsewhere"),
        (errno.EACCES, "no permission; choose a path you may use"),
    ],
)
@pytest.mark.parametrize("old", [False, True])
def test_a_disk_that_refuses(
    number: int, message: str, old: bool, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = tmp_path / "bundle"
    if old:
        assert invoke(export, checkpoint, "-o", bundle, "--no-verify").exit_code == 0
    write, written = Path.write_bytes, []

    def fills(path: Path, data: bytes) -> int:
        written.append(path)
        if len(written) > 4:
            write(path, data[: len(data) // 2])
            raise OSError(number, os.strerror(number), str(path))
        return write(path, data)

    monkeypatch.setattr(Path, "write_bytes", fills)
    assert message in refusal(invoke(export, checkpoint, "-o", bundle, "--force"))
    assert len(written) == 5
    assert [path.name for path in tmp_path.iterdir()] == (["bundle"] if old else [])
    monkeypatch.undo()
    if old:
        assert adavit.load(bundle, threads=1).labels == ("0", "1", "2", "3", "4")
    assert invoke(export, checkpoint, "-o", bundle, "--force", "--no-verify").exit_code == 0


def test_a_folder_that_cannot_be_written(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(path: Path, *_: Any, **__: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr(Path, "mkdir", refuses)
    assert "the file system is read-only" in refusal(invoke(export, checkpoint, "-o", tmp_path / "bundle"))
    assert list(tmp_path.iterdir()) == []


SIGNAL = """
import os, signal
from pathlib import Path
write, written = Path.write_bytes, []

def signalling(path, data):
    written.append(path)
    if len(written) == 3:
        os.kill(os.getpid(), signal.{name})
    return write(path, data)

Path.write_bytes = signalling
"""


@pytest.mark.parametrize("old", [False, True])
def test_a_killed_export_leaves_the_old_bundle_or_none(old: bool, checkpoint: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    if old:
        assert invoke(export, checkpoint, "-o", bundle, "--no-verify", "--opset", 17).exit_code == 0
    done = shell("adavit-export", checkpoint, "-o", bundle, "--force", before=SIGNAL.format(name="SIGKILL"))
    assert done.returncode == -9
    assert len(list(tmp_path.glob(".*"))) == 1  # the half that nobody could clear away
    if old:
        adavit.load(bundle, threads=1)
        assert opset(bundle) == 17
    else:
        assert not bundle.exists()
    assert invoke(export, checkpoint, "-o", bundle, "--force", "--threads", 1).exit_code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]
    assert opset(bundle) == 20


def test_ctrl_c_leaves_nothing_half_written(checkpoint: Path, tmp_path: Path) -> None:
    done = shell("adavit-export", checkpoint, "-o", tmp_path / "bundle", before=SIGNAL.format(name="SIGINT"))
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "adavit-export: interrupted\n")
    assert list(tmp_path.iterdir()) == []


def test_a_package_that_is_missing(checkpoint: Path, tmp_path: Path) -> None:
    hidden = "import sys\nsys.modules['torch'] = None"
    done = shell("adavit-export", checkpoint, "-o", tmp_path / "bundle", before=hidden)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        "adavit-export: error: torch is not installed; "
        "run: pip install 'adavit[export]' (in a clone: pip install '.[export]')\n"
    )


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("weights.safetensors", "run"), ("pytorch_model.bin", "run"), ("checkpoint.pth", "run"),
        ("model_best.pth.tar", "run"), ("deit_small.safetensors", "deit_small"),
    ],
)  # fmt: skip
def test_the_name_of_a_model_tells_something(file: str, name: str, checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    shutil.copy(checkpoint, tmp_path / "run" / file)
    done = invoke(export, tmp_path / "run" / file, "-o", tmp_path / "bundle", "--no-verify")
    assert done.exit_code == 0, done.output
    assert read_config(tmp_path / "bundle")["name"] == name


def test_a_bundle_is_no_checkpoint(bundle: Path, tmp_path: Path) -> None:
    images = str(pictures_in(tmp_path, 1))
    for options in ([], ["--precision", "int8"], ["--precision", "fp16", "--calibration-images", images]):
        message = refusal(invoke(export, bundle, "-o", tmp_path / "other", *options))
        assert f"{bundle} is a bundle; a bundle of any precision is exported from the checkpoint" in message
        precision = " ".join(options[:2] or ["--precision", "fp32"])
        command = f"adavit-export CHECKPOINT --output {tmp_path}/other {precision}"
        assert message.endswith(f": {command}\n")
    assert not (tmp_path / "other").exists()


def test_the_stages_of_an_export_and_a_run_are_expected(checkpoint: Path, tmp_path: Path, tiny_bundle: Path) -> None:
    told: list[str] = []
    note = lambda stage, share: told.append(stage)  # noqa: E731
    images, calibration = (pictures_in(tmp_path, 3),), CalibrationOptions()
    export_bundle(checkpoint, tmp_path / "bundle", ExportOptions(threads=1), note)
    stages = exporting_stages(True, calibration, BudgetOptions(), BuildOptions())
    assert in_order(told, stages)
    told.clear()
    run_bundle(tiny_bundle, RunOptions(images=images, threads=1, iterations=1, profile=""), note)
    assert in_order(told, running_stages(None, 1, False, True, "onnxruntime"))
    told.clear()
    check_bundle(tiny_bundle, checkpoint, None, 1, note)
    assert in_order(told, checking_stages())


def in_order(told: list[str], stages: list[Stage]) -> bool:
    """Whether what was told is what was expected, in this order."""
    names = [name for name, _ in groupby(next((s.name for s in stages if t.startswith(s.name)), t) for t in told)]
    return names == [stage.name for stage in stages]


def test_the_demo(tmp_path: Path) -> None:
    demo = Path(adavit.__file__).parent / "demo"
    assert invoke(export, "demo", "-o", tmp_path / "bundle", "--threads", 1).exit_code == 0
    runtime = adavit.load(tmp_path / "bundle", threads=1)
    assert runtime.graphs.files.dense is not None
    assert runtime.labels == tuple((demo / "labels.txt").read_text().split("\n")[:-1])
    files = sorted((demo / "images").glob("*/*.png"))
    found = runtime.predict(files, top=1)
    right = [one.top[0][0] == file.parent.name for file, one in zip(files, found, strict=True)]
    assert len(right) == 20
    assert sum(right) > 12


def test_preprocessing_is_told_and_may_be_given(checkpoint: Path, tmp_path: Path) -> None:
    given = ("--mean", 0.5, 0.5, 0.5, "--std", 0.5, 0.25, 0.5, "--crop-ratio", 1, "--no-dense", "--no-verify")
    done = invoke(export, checkpoint, "--output", tmp_path / "own", *given)
    assert done.exit_code == 0, done.output
    assert "crop 1, mean 0.5 0.5 0.5, std 0.5 0.25 0.5" in done.stdout
    assert f"next        adavit-run {tmp_path / 'own'} --images PHOTOS" in done.stdout.splitlines()[-1]
    runtime = adavit.load(tmp_path / "own", threads=1)
    white = np.full((40, 40, 3), 255, np.uint8)
    assert runtime.preprocess(white)[:, 0, 0].tolist() == [1.0, 2.0, 1.0]
    done = invoke(export, checkpoint, "--output", tmp_path / "usual", "--no-dense", "--no-verify")
    assert "mean 0.485 0.456 0.406, std 0.229 0.224 0.225" in done.stdout
    for wrong in (("--std", 0, 1, 1), ("--mean", "nan", 0, 0), ("--mean", 0.5)):
        assert refusal(invoke(export, checkpoint, "--output", tmp_path / "no", *wrong), 2)
