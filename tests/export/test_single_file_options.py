"""What a single file can be asked for, and what is refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from cases import (
    invoke,
    refusal,
)
from single_cases import write

import adavit
from adavit import cli


@pytest.mark.parametrize(
    ("fault", "value", "message"),
    [
        ("adavit.graphs.single.TOKEN_LOGIT", 0.5, r"model\.onnx: \d+ of block 0's decisions on tokens differ"),
        ("adavit.graphs.single_policy.outside_macs", lambda _: 1, r"model\.onnx: its MACs differ"),
        ("adavit.graphs.nested.NestedBuilder.gelu", lambda self, x: x, r"model\.onnx: .*differ"),
        ("adavit.graphs.single.add_macs", lambda *_: "nothing", r"model\.onnx: ONNX Runtime does not run the file"),
    ],
)
def test_a_wrong_file_is_not_kept(
    fault: str, value: Any, message: str, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fault, value)
    with pytest.raises(adavit.VerificationError, match=message):
        write(tiny_bundle, tmp_path / "model.onnx", with_policy=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 2}, "budget is 2: expected a number above 0 to 1"),
        ({"budget": "0.4"}, "budget is '0.4'"),
        ({"budget": 0.1}, "out of range: this bundle's go from 0.3 to 0.9"),
        ({"budget": 0.4, "budget_input": True}, "not both"),
        ({"budget_input": 1}, "budget_input is 1: expected True or False"),
        ({"domain": "cuda"}, "domain is 'cuda': choose from standard, onnxruntime"),
        ({"weights": "int8"}, "weights is 'int8': choose from fp32, fp16"),
        ({"max_size": 0.5}, "max_size is 0.5: expected a number from 1 to 4"),
        ({"precision": "fp16"}, "precision is 'fp16': choose from fp32, int8"),
        ({"precision": "int8"}, "is not in int8; give `calibration_images`"),
        ({"precision": "int8", "weights": "fp16"}, "leave out `weights`"),
        ({"precision": "int8", "max_size": 2}, "leave out `max_size`"),
        ({"threads": 0}, "threads is 0"),
        ({"image_size": 64}, "to write a single file of a bundle, leave out `image_size`"),
        ({"std": (1, 1, 1)}, "of a bundle, leave out `std`"),
        ({"budgets": 0.5}, "of a bundle, leave out `budgets`"),
        ({"labels_by_order": True}, "of the class folders of `calibration_images`; give them too"),
        ({"budget_images": 9}, "of a bundle, leave out `budget_images`"),
        ({"max_size": 2}, "nothing tells which they are; give `calibration_images`"),
        ({"progress": 3}, "progress is 3"),
    ],
    ids=str,
)
def test_options_that_cannot_be(options: dict[str, Any], message: str, budgeted: Path, tmp_path: Path) -> None:
    with pytest.raises(adavit.InputError) as caught:
        adavit.export_single_file(budgeted, tmp_path / "model.onnx", **options)
    assert message in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_targets_that_cannot_be(budgeted: Path, tmp_path: Path) -> None:
    (tmp_path / "model.json").write_text("mine")
    (tmp_path / "folder.onnx").mkdir()
    for name, message in (
        ("model.onnx", r"model\.json: already there; give `force=True`"),
        ("model.bin", r"ends in \.onnx"),
        ("folder.onnx", "is a folder"),
        ("nowhere/model.onnx", "no such folder"),
    ):
        with pytest.raises(adavit.InputError, match=message):
            write(budgeted, tmp_path / name)
    assert (tmp_path / "model.json").read_text() == "mine"
    write(budgeted, tmp_path / "model.onnx", force=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder.onnx", "model.json", "model.onnx"]


def test_budgets_need_points(tiny_bundle: Path, checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(adavit.InputError, match="is a checkpoint, which has no operating points; give `budgets`"):
        write(checkpoint, tmp_path / "model.onnx", budget_input=True)
    with pytest.raises(adavit.CheckpointError, match="no such file"):
        write(tmp_path / "nowhere.pth", tmp_path / "model.onnx", budget_input=True)
    for options in ({"budget": 0.4}, {"budget_input": True}):
        with pytest.raises(adavit.InputError, match="has no operating points; add them with adavit-export"):
            write(tiny_bundle, tmp_path / "model.onnx", **options)


def test_the_command(budgeted: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    done = invoke(cli.export, budgeted, "--single-file", path, "--budget-input", "--threads", 1)
    assert (done.exit_code, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0].startswith(f"file        {path}: ")
    assert "budgets     0.3 to 0.9; 0 is the trained policy" in lines
    assert any(line.startswith("verified    5 images: ") for line in lines)
    done = invoke(cli.export, budgeted, "--single-file", path, "--force", "--threads", 1, "--json", "-", "--no-verify")
    report = json.loads(done.stdout)
    assert report["verified"] is None
    assert set(report) == {
        "file", "json", "bytes", "precision", "weights", "domain", "opset", "budget", "blocks", "macs",
        "calibration", "verified", "checked", "notes", "seconds",
    }  # fmt: skip


def test_the_command_exports_a_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    labels = tmp_path / "labels.txt"
    labels.write_text("a\nb\nc\nd\ne\n")
    path = tmp_path / "model.onnx"
    done = invoke(
        cli.export, checkpoint, "--single-file", path, "--labels", labels, "--crop-ratio", 0.5, "--threads", 1
    )
    assert (done.exit_code, done.stderr) == (0, "")
    beside = json.loads(path.with_suffix(".json").read_text())
    assert (beside["labels"], beside["preprocessing"]["crop_ratio"]) == (list("abcde"), 0.5)


@pytest.mark.parametrize("name", ["model.onnx", "model.json", "model.ort", "sub/../model.json"])
def test_the_report_is_a_file_of_its_own(name: str, budgeted: Path, tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    asked = ["--single-file", tmp_path / "model.onnx", "--ort-format", "--json", tmp_path / name]
    assert "is a file that --single-file writes" in refusal(invoke(cli.export, budgeted, *asked), code=2)
    assert [path.name for path in tmp_path.iterdir()] == ["sub"]


def test_a_folder_that_is_no_bundle(budgeted: Path, tmp_path: Path) -> None:
    bundle = shutil.copytree(budgeted, tmp_path / "bundle")
    (bundle / "config.json").write_text("{")
    for options in ({}, {"budget": 0.4}):
        with pytest.raises(adavit.BundleError, match=r"config\.json: not JSON"):
            write(bundle, tmp_path / "model.onnx", **options)
    (bundle / "config.json").unlink()
    with pytest.raises(adavit.BundleError, match=r"config\.json: missing; this is not a bundle"):
        write(bundle, tmp_path / "model.onnx", budget=0.4)


def test_no_room_for_the_ort_form(budgeted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adavit.export.single_ort.NAME", "nowhere/model.ort")
    with pytest.raises(adavit.BackendError, match=r"cannot write the \.ort form here first .*; free some space"):
        write(budgeted, tmp_path / "model.onnx", ort_format=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--budget-input"], "without --single-file, leave out --budget-input"),
        (["--with-policy"], "without --single-file, leave out --with-policy"),
        (["--domain", "standard"], "without --single-file, leave out --domain"),
        (["--max-size", "2"], "without --single-file, leave out --max-size"),
        (["--weights", "fp16"], "without --single-file, leave out --weights"),
        (["--ort-format"], "without --single-file, leave out --ort-format"),
        (["--budget", "0.5"], "without --single-file, leave out --budget"),
        (["--single-file", "m.onnx", "--output", "b"], "to write a single file, leave out --output"),
        (["--single-file", "m.onnx", "--target", "tensorrt"], "to write a single file, leave out --target"),
        (["--single-file", "m.onnx", "--opset", "20"], "to write a single file, leave out --opset"),
        (["--single-file", "m.onnx", "--labels", "l"], "of a BUNDLE, leave out --labels"),
        (["--single-file", "m.onnx", "--budgets", "0.5"], "of a BUNDLE, leave out --budgets"),
        (["--single-file", "m.onnx", "--precision", "fp32,int8"], "has one --precision"),
        (["--single-file", "m.onnx", "--precision", "int8", "--weights", "fp16"], "leave out --weights"),
        (["--single-file", "m.onnx", "--max-size", "9"], "is not in the range"),
        (["--single-file", "m.onnx", "--budget", "0.3", "--budget-input"], "not both"),
        (["--single-file", "m.txt"], "ends in .onnx"),
    ],
    ids=" ".join,
)
def test_usage(arguments: list[str], message: str, budgeted: Path) -> None:
    assert message in refusal(invoke(cli.export, budgeted, *arguments), code=2)


def test_a_source_is_needed() -> None:
    assert "give a BUNDLE or a CHECKPOINT" in refusal(invoke(cli.export, "--single-file", "m.onnx"), code=2)


def test_a_missing_source(tmp_path: Path) -> None:
    message = refusal(invoke(cli.export, tmp_path / "nothing.pth", "--single-file", tmp_path / "m.onnx"))
    assert "no such file" in message
    assert not list(tmp_path.iterdir())
