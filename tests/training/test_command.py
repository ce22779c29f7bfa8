import json
import shutil
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from adavit.bundle.bundle import Bundle
from adavit.bundle.preprocessing import Preprocessor
from adavit.cli_train import main
from adavit.export import ExportOptions, export_bundle
from adavit.model import load_checkpoint, save_safetensors
from adavit.model.checkpoint_file import load_safely
from adavit.training.loader import evaluation_batches
from adavit.training.predict import Batches

SMALL = ("--width", "16", "--heads", "2", "--depth", "2", "--image-size", "8", "--patch-size", "4", "--batch", "16",
         "--steps", "3", "--warmup", "1", "--threads", "1")  # fmt: skip
SHORT = ("--batch", "16", "--steps", "3", "--warmup", "1", "--threads", "1")


def call(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def fails(words: str, *arguments: object, code: int = 1) -> None:
    found = call(*arguments)
    assert found.exit_code == code, found.output
    assert words in found.output
    assert "Traceback" not in found.output
    if code == 1:
        assert found.output.startswith("adavit-train: error: ") and found.output.count("\n") == 1


def test_a_package_that_is_missing(idx_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.delitem(sys.modules, "adavit.training.runs", raising=False)
    fails("run: pip install 'adavit[train]'", "dense", "--data", idx_folder, "-o", tmp_path / "dense", *SMALL)


@pytest.fixture
def dense(tmp_path: Path, idx_folder: Path) -> Path:
    found = call("dense", "--data", idx_folder, "-o", tmp_path / "dense", *SMALL)
    assert found.exit_code == 0, found.output
    return tmp_path / "dense" / "weights.safetensors"


def test_no_more_threads_than_this_process_may_use(
    idx_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("adavit.cpus.quota_cpus", lambda: 2)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)), raising=False)
    own = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        assert call("dense", "--data", idx_folder, "-o", tmp_path / "dense", *SMALL[:-2]).exit_code == 0
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(own)


def test_help_needs_no_torch() -> None:
    program = "import sys; from adavit.cli_train import main; main(['--help'], standalone_mode=False); " \
              "assert 'torch' not in sys.modules"  # fmt: skip
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=60).returncode == 0


def test_dense_then_adapt_then_evaluate(tmp_path: Path, idx_folder: Path, dense: Path) -> None:
    output = tmp_path / "adaptive"
    found = call("adapt", "--data", idx_folder, "--from", dense, "-o", output, *SHORT, "--budget", 0.8,
                 "--patch-size", 2)  # fmt: skip
    assert found.exit_code == 0, found.output
    assert {file.name for file in output.iterdir()} == {
        "checkpoint.pth",
        "log.jsonl",
        "plot.png",
        "weights.safetensors",
    }
    model, resumable = load_checkpoint(output / "weights.safetensors"), load_checkpoint(output / "checkpoint.pth")
    assert model.arch == resumable.arch and (model.arch.heads, model.arch.patches) == (2, 16)
    assert torch.equal(model.head.weight, resumable.head.weight)
    plot, report = tmp_path / "plot.png", tmp_path / "report.json"
    found = call("evaluate", output / "weights.safetensors", "--data", idx_folder, "--dense", dense, "--plot", plot,
                 "--json", report)  # fmt: skip
    assert found.exit_code == 0 and "random" in found.output
    assert json.loads(report.read_text())["images"] == 32
    assert plot.read_bytes().startswith(b"\x89PNG")
    exported = tmp_path / "bundle"
    export_bundle(output / "weights.safetensors", exported, ExportOptions(), lambda *_: None)
    again = tmp_path / "again.json"
    found = call("evaluate", exported, "--data", idx_folder, "--dense", dense, "--baseline", dense, "--json", again)
    assert found.exit_code == 0 and "baseline" in found.output
    one, other = json.loads(report.read_text()), json.loads(again.read_text())
    baseline = other.pop("baseline")
    assert baseline["accuracy"] == other["dense"]["accuracy"] and 0 < baseline["macs"] < 1  # of patch 4, not 2
    assert other == one


def test_a_finished_run_is_neither_overwritten_nor_lost(tmp_path: Path, idx_folder: Path, dense: Path) -> None:
    again = ("dense", "--data", idx_folder, "-o", dense.parent, *SMALL)
    fails("holds a run; pass --resume", *again)
    (dense.parent / "checkpoint.pth").rename(tmp_path / "kept.pth")
    fails("holds a run; pass --resume", *again)  # whose weights are there
    (tmp_path / "kept.pth").rename(dense.parent / "checkpoint.pth")
    before = load_checkpoint(dense).head.weight
    assert call(*again, "--resume").exit_code == 0
    assert torch.equal(load_checkpoint(dense).head.weight, before)


def test_other_images_or_another_teacher_are_not_resumed(tmp_path: Path, idx_folder: Path, dense: Path) -> None:
    run = ("adapt", "-o", tmp_path / "run", *SHORT, "--resume")
    assert call(*run[:-1], "--data", idx_folder, "--from", dense).exit_code == 0
    for part, prefix, count in (("train", "train", 96), ("test", "t10k", 32)):
        data = shutil.copytree(idx_folder, tmp_path / part)
        images = data / f"{prefix}-images-idx3-ubyte"
        images.write_bytes(images.read_bytes()[:-1] + b"\7")
        fails(f"other sources: {part} was '{count} images of 4 classes (", *run, "--data", data, "--from", dense)
    other = tmp_path / "other.safetensors"
    save_safetensors(load_checkpoint(dense), other, {"by": "another"})
    fails("other sources: teacher was ", *run, "--data", idx_folder, "--from", other)
    fails("other sources: teacher was ", *run, "--data", idx_folder, "--from", dense, "--teacher", other)
    moved, copied = idx_folder.rename(tmp_path / "moved"), shutil.copy(dense, tmp_path / "copied.safetensors")
    assert call(*run, "--data", moved, "--from", other, "--teacher", copied).exit_code == 0


def test_a_run_of_an_earlier_version_is_resumed_with_a_warning(idx_folder: Path, dense: Path) -> None:
    checkpoint = dense.parent / "checkpoint.pth"
    content = load_safely(checkpoint)
    del content["args"].sources
    torch.save(content, checkpoint)
    again = call("dense", "--data", idx_folder, "-o", dense.parent, *SMALL, "--resume")
    assert again.exit_code == 0
    assert f"warning: {checkpoint}: does not note its images and its teacher; make sure" in again.output


def test_what_no_run_has_written_is_not_resumed(tmp_path: Path, idx_folder: Path, dense: Path) -> None:
    folder, checkpoint = dense.parent, dense.parent / "checkpoint.pth"
    whole = load_safely(checkpoint)
    weights, moments, noted = whole["state_dict"], whole["optimizer"], vars(whole["args"])
    without = {key: value for key, value in weights.items() if key != "norm.weight"}
    state, groups = moments["state"], moments["param_groups"]
    cases: list[tuple[Any, str]] = [
        (weights, "missing state_dict, state_dict_ema, optimizer, step, metric, args"),
        ({}, "missing state_dict"),
        ([weights], "missing state_dict"),
        (weights["cls_token"], "missing state_dict"),
        ({key: value for key, value in whole.items() if key != "metric"}, "missing metric"),
        ({**whole, "args": None}, "'NoneType' object has no attribute 'shapes'"),
        ({**whole, "args": Namespace(num_heads=2)}, "'Namespace' object has no attribute 'shapes'"),
        ({**whole, "args": Namespace(**{**noted, "settings": {3: 4}})}, "other settings: 3 was 4, now None"),
        ({**whole, "args": Namespace(**{**noted, "settings": 3})}, "cannot be resumed"),
        ({**whole, "state_dict": without}, 'Missing key(s) in state_dict: "norm.weight"'),
        ({**whole, "state_dict_ema": {**weights, "head.bias": torch.zeros(9)}}, "size mismatch for head.bias"),
        ({**whole, "state_dict": {**weights, "head.bias": "text"}}, "cannot be resumed"),
        ({**whole, "state_dict": None}, "cannot be resumed"),
        ({**whole, "optimizer": {}}, "cannot be resumed ('param_groups')"),
        ({**whole, "optimizer": {**moments, "param_groups": groups[:1]}}, "the optimiser is of other parameters"),
        ({**whole, "optimizer": {**moments, "state": {**state, 1: state[2]}}}, "of parameters of other shapes"),
        ({**whole, "optimizer": {**moments, "state": {**state, 1: {}}}}, "of parameters of other shapes"),
        ({**whole, "optimizer": {**moments, "state": {**state, 999: state[2]}}}, "cannot be resumed"),
        ({**whole, "step": 4}, "cannot be resumed (step 4 of 3)"),
        ({**whole, "step": "soon"}, "cannot be resumed"),
        ({**whole, "metric": None}, "cannot be resumed"),
    ]
    for content, words in cases:
        torch.save(content, checkpoint)
        before = {file.name: file.read_bytes() for file in folder.iterdir()}
        fails(words, "dense", "--data", idx_folder, "-o", folder, *SMALL, "--resume")
        assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    torch.save(whole, checkpoint)
    assert call("dense", "--data", idx_folder, "-o", folder, *SMALL, "--resume").exit_code == 0


def test_nothing_asked_is_help() -> None:
    found = call()
    assert found.exit_code == 2
    assert "Commands:" in found.output


def test_wrong_inputs_are_one_line(tmp_path: Path, idx_folder: Path, dense: Path) -> None:
    start = ("adapt", "--data", idx_folder, "-o", tmp_path / "new", *SHORT)
    fails("no such folder", "dense", "--data", tmp_path / "absent", "-o", tmp_path / "new")
    fails("no such file", *start, "--from", tmp_path / "absent.pth")
    fails("out of reach", *start, "--from", dense, "--budget", 0.01)
    fails("not a multiple of the patch side 3", *start, "--from", dense, "--patch-size", 3)
    fails("expected some of tokens, heads, sublayers", *start, "--from", dense, "--policies", "layers", code=2)
    fails("not among --policies", *start, "--from", dense, "--policies", "heads", "--token-target", 0.5, code=2)
    fixed = ("--policies", "heads", "--head-target", 0.5, "--budget", 0.5)
    fails("every target is fixed", *start, "--from", dense, *fixed, code=2)
    fails("no run to resume", *start, "--from", dense, "--resume")
    fails("fewer than one batch", "dense", "--data", idx_folder, "-o", tmp_path / "new", "--batch", 1000)
    fails("have another width", "dense", "--data", idx_folder, "-o", tmp_path / "new", "--from", dense, "--width", 32)
    fails("Missing option", "adapt", code=2)


@pytest.mark.parametrize(
    ("words", "options"),
    [
        ("width 16 is not a multiple of 3 heads", ["--heads", 3]),
        ("image side 8 is not a multiple of the patch side 3", ["--patch-size", 3]),
        ("--batch 15 does not divide over 1 processes, an even number each", ["--batch", 15, "--mixup", 1]),
        ("is not in the range", ["--learning-rate", 1e300]),
        ("is not in the range", ["--epochs", 1e308]),
        ("is not in the range", ["--distillation-temperature", 1e300]),
        ("not a finite number", ["--clip", "nan"]),
    ],
)
def test_options_that_make_no_sense(words: str, options: list[object], tmp_path: Path, idx_folder: Path) -> None:
    fails(words, "dense", "--data", idx_folder, "-o", tmp_path / "new", *SMALL, *options, code=2)
    assert not (tmp_path / "new").exists()


def test_an_adaptive_model_cannot_teach(tmp_path: Path, idx_folder: Path, dense: Path) -> None:
    first = ("adapt", "--data", idx_folder, *SHORT, "-o", tmp_path / "first")
    assert call(*first, "--from", dense).exit_code == 0
    adaptive = tmp_path / "first" / "weights.safetensors"
    second = ("adapt", "--data", idx_folder, *SHORT, "-o", tmp_path / "second", "--from", adaptive)
    fails("the teacher has policies; give a dense model with --teacher", *second)
    assert call(*second, "--teacher", dense).exit_code == 0


def test_a_model_keeps_its_order_of_classes(tmp_path: Path) -> None:
    data, names = tmp_path / "folders", ["zebra", "mole", "ant"]
    for part in ("train", "val"):
        for label, name in enumerate(names):
            folder = data / part / name
            folder.mkdir(parents=True)
            for seed in range(8):
                level = np.random.default_rng(seed).integers(0, 40, (8, 8, 3)) + 100 * label
                Image.fromarray(level.astype(np.uint8)).save(folder / f"{seed}.png")
    labels = tmp_path / "labels.txt"
    labels.write_text("\n".join(names) + "\n")
    learning = ("--steps", 60, "--learning-rate", 0.01, "--labels", labels)
    done = call("dense", "--data", data, "-o", tmp_path / "run", *SMALL, *learning)
    assert done.exit_code == 0, done.output
    weights = tmp_path / "run" / "weights.safetensors"
    export_bundle(weights, tmp_path / "bundle", ExportOptions(verify=False), lambda *_: None)
    assert (tmp_path / "bundle" / "labels.txt").read_text().split() == names
    for source in (weights, tmp_path / "bundle"):
        report = tmp_path / "report.json"
        assert call("evaluate", source, "--data", data, "--json", report).exit_code == 0
        assert json.loads(report.read_text())["accuracy"] > 0.9
        assert json.loads(report.read_text())["labels_by"] == "name"
    for place, name in enumerate(sorted(names)):
        (data / "val" / name).rename(data / "val" / f"{place} {name}")
    fails("'0 ant' is not one of the 3 known classes", "evaluate", weights, "--data", data)
    done = call("evaluate", weights, "--data", data, "--labels-by-order")
    assert done.exit_code == 0, done.output
    assert "of 24 images, labelled by the order of their folders" in done.output


def test_each_model_is_evaluated_with_its_own_crop(
    tmp_path: Path, idx_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = ("dense", "--data", idx_folder, *SMALL)
    assert call(*first, "-o", tmp_path / "half", "--crop", 0.5).exit_code == 0
    half = tmp_path / "half" / "weights.safetensors"
    assert call(*first[:-2], "-o", tmp_path / "next", "--from", half).exit_code == 0
    export_bundle(half, tmp_path / "bundle", ExportOptions(verify=False), lambda *_: None)
    export_bundle(half, tmp_path / "wider", ExportOptions(verify=False, crop_ratio=0.8), lambda *_: None)
    crops: list[float] = []

    def batches(data: Any, chosen: Any, prepare: Preprocessor, batch: int) -> Batches:
        crops.append(prepare.crop_ratio)
        return evaluation_batches(data, chosen, prepare, batch)

    monkeypatch.setattr("adavit.training.evaluation.evaluation_batches", batches)
    checkpoint = tmp_path / "next" / "checkpoint.pth"
    evaluate = ("evaluate", "--data", idx_folder, "--heads", 2, checkpoint)
    assert call(*evaluate, "--dense", tmp_path / "bundle", "--baseline", tmp_path / "wider").exit_code == 0
    assert call(*evaluate, "--crop", 0.9, "--baseline", tmp_path / "wider").exit_code == 0
    assert crops == [0.5, 0.5, 0.8, 0.9, 0.9]
    export_bundle(checkpoint, tmp_path / "again", ExportOptions(verify=False), lambda *_: None)
    assert Bundle.open(tmp_path / "again").preprocessor.crop_ratio == 0.5


def test_evaluating_on_other_classes_is_refused(tmp_path: Path, idx_folder: Path, dense: Path) -> None:
    labels = tmp_path / "labels.txt"
    labels.write_text("a\nb\nc\nd\ne\n")
    fails("5 classes, the model has 4", "evaluate", dense, "--data", idx_folder, "--labels", labels)
    labels.write_bytes(b"\xff\xfe")
    fails("labels.txt: cannot be read as labels", "evaluate", dense, "--data", idx_folder, "--labels", labels)


def altered(weights: Path, output: Path, change: Any) -> Path:
    """The weights' file with other tensors or notes."""
    with safe_open(weights, "pt") as file:
        notes, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    change(tensors, notes)
    save_file(tensors, output, notes)
    return output


def test_values_that_overflow_are_no_accuracy(tmp_path: Path, idx_folder: Path, dense: Path) -> None:
    def overflow(name: str) -> Path:
        def change(tensors: dict[str, torch.Tensor], _: dict[str, str]) -> None:
            tensors[name] = tensors[name].sign() * 3e38

        return altered(dense, tmp_path / f"{name}.safetensors", change)

    hidden, head = overflow("blocks.0.attn.proj.weight"), overflow("head.weight")
    evaluate = ("evaluate", "--data", idx_folder)
    fails("the tokens of image 0 are NaN, infinite or beyond 1e+17", *evaluate, hidden)
    fails("the logits of image 0 are NaN, infinite", *evaluate, head)
    for other in ("--dense", "--baseline"):
        fails("the tokens of image 0 are NaN, infinite", *evaluate, dense, other, hidden)


def test_classes_in_another_order_and_case_are_refused(tmp_path: Path, idx_folder: Path, dense: Path) -> None:
    def name(classes: list[str]) -> Path:
        def change(_: dict[str, torch.Tensor], notes: dict[str, str]) -> None:
            notes["classes"] = json.dumps(classes)

        return altered(dense, tmp_path / f"{''.join(classes)}.safetensors", change)

    first, cased, swapped = name(list("abcd")), name(list("ABCD")), name(list("BACD"))
    evaluate = ("evaluate", "--data", idx_folder, first)
    assert call(*evaluate, "--dense", cased).exit_code == 0
    for other in ("--dense", "--baseline"):
        fails("has the classes in another order", *evaluate, other, swapped)


@pytest.mark.parametrize(
    ("work", "words"),
    [("set_learning_rate", "nothing is saved yet"), ("balance", "go on with --resume (step 3 is saved)")],
)
def test_an_interrupt_says_what_is_saved(
    work: str, words: str, tmp_path: Path, idx_folder: Path, dense: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    run = ("adapt", "--data", idx_folder, "--from", dense, "-o", tmp_path / "run", *SHORT)
    with monkeypatch.context() as patch:
        patch.setattr(f"adavit.training.loop.{work}", interrupted)
        found = call(*run)
    assert found.exit_code == 130
    assert found.stderr.splitlines()[-1] == f"adavit-train: interrupted; {words}"
    if "--resume" in words:
        assert call(*run, "--resume").exit_code == 0
        assert (tmp_path / "run" / "weights.safetensors").exists()
