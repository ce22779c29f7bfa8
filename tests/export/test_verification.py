"""Checking a bundle against a checkpoint: whatever differs is found and named."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from cases import WIDE, edit_weights, export, quiet, random_model, rewrite_stored, save, stored_files, tiny
from safetensors.numpy import load_file

import adavit
from adavit.errors import VerificationError
from adavit.export import check_bundle


def alter(bundle: Path, file: str) -> None:
    """Subtracts where a graph adds a bias at last, or anything, or norms otherwise; described as if exported so."""
    model = onnx.load(bundle / file, load_external_data=False)
    adds = [node for node in model.graph.node if node.op_type == "Add"]
    adds = [node for node in adds if any(name.endswith("bias") for name in node.input)] or adds
    if adds:
        adds[-1].op_type = "Sub"
    else:
        node = next(node for node in model.graph.node if node.op_type == "LayerNormalization")
        next(entry for entry in node.attribute if entry.name == "epsilon").f = 10.0
    rewrite_stored(bundle, file, model.SerializeToString())


def scale(bundle: Path, tensor: str, factor: float) -> None:
    """Scales a tensor; described as if exported so."""
    edit_weights(bundle, lambda name: name == tensor, lambda array: array * np.float32(factor))


def check(bundle: Path, checkpoint: Path) -> dict[str, Any]:
    return check_bundle(bundle, checkpoint, None, 1, quiet)


def fault(bundle: Path, checkpoint: Path) -> str:
    with pytest.raises(VerificationError) as caught:
        check(bundle, checkpoint)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_bundle_is_what_its_checkpoint_is(wide: tuple[Path, Path]) -> None:
    report = check(*wide)
    assert report["verified"]["images"] == 4
    assert report["verified"]["max_logit_difference"] < 1e-4


@pytest.mark.parametrize("worst", [0, 3, -1])
def test_the_largest_difference_of_all_runs_is_reported(
    worst: int, tiny_bundle: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, ran = adavit.Runtime.run, []

    def differs(*given: Any, **options: Any) -> adavit.Result:
        result = run(*given, **options)
        ran.append(result)
        by = 8e-4 if len(ran) == (runs + worst if worst < 0 else worst) + 1 else 4e-4
        return replace(result, logits=result.logits + np.float32(by))

    monkeypatch.setattr(adavit.Runtime, "run", differs)
    runs = -1  # as many as a first check makes
    check(tiny_bundle, checkpoint)
    runs = len(ran)
    ran.clear()
    found = check(tiny_bundle, checkpoint)["verified"]["max_logit_difference"]
    assert found == pytest.approx(8e-4, rel=0.1)


def test_every_altered_graph_is_named(tiny_bundle: Path, checkpoint: Path, tmp_path: Path) -> None:
    for name, file in stored_files(tiny_bundle).items():
        if name == "weights":
            continue
        altered = shutil.copytree(tiny_bundle, tmp_path / name)
        alter(altered, file)
        kind, *block = name.split(".")
        whole = {"dense": "the dense twin: ", "stem": "the stem: ", "batch.stem": "the stem, graph batch: "}
        wanted = whole.get(name) or f"block {block[0]}, graph {'batch' if kind == 'batch' else block[1]}: "
        assert fault(altered, checkpoint).startswith(wanted), name


def makers(tensor: str, depth: int) -> tuple[str, ...]:
    """How the message may begin where a tensor is altered: whoever uses it first."""
    if tensor.startswith(("norm.", "head.")):
        return (f"block {depth - 1}, ",)
    if not tensor.startswith("blocks."):
        return ("the stem: ",)
    block = int(tensor.split(".")[1])
    decides = "_select" in tensor or (".norm1." in tensor)
    before = "the stem: " if block == 0 else f"block {block - 1}, graph "
    return (f"block {block}, graph ", *[before] * decides)


def test_every_altered_tensor_is_named(tmp_path: Path) -> None:
    """But for the bias of keys, which adds the same to all scores of a query."""
    arch = tiny(depth=2)
    source = save(random_model(arch), tmp_path / "model.safetensors")
    altered = export(source, tmp_path, with_dense=False, verify=False)
    weights = altered / stored_files(altered)["weights"]
    intact = weights.read_bytes()
    for tensor in load_file(weights):
        if not tensor.endswith("attn.key.bias"):
            scale(altered, tensor, -1.5)
            assert fault(altered, source).startswith(makers(tensor, arch.depth)), tensor
            rewrite_stored(altered, str(weights.relative_to(altered)), intact)


@pytest.mark.parametrize("name", ["attention1.mlp.0.weight", "attention2.kqv.weight"])
def test_altered_tensors_of_the_stem_are_found(name: str, t2t: tuple[Path, Path], tmp_path: Path) -> None:
    altered = shutil.copytree(t2t[0], tmp_path / "altered")
    scale(altered, f"adavit.stem.{name}", 1.5)
    assert fault(altered, t2t[1]).startswith("the stem: ")


@pytest.fixture(scope="module")
def t2t(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The bundle of a small model with a T2T stem, and its checkpoint."""
    folder = tmp_path_factory.mktemp("t2t")
    source = save(random_model(tiny(stem="t2t", patch_size=16, qkv_bias=False)), folder / "t2t.safetensors")
    return export(source, folder), source


def test_decisions_that_differ_are_named(wide: tuple[Path, Path], tmp_path: Path) -> None:
    bundle, _ = wide
    model = random_model(WIDE, heads=100.0)
    message = fault(bundle, save(model, tmp_path / "other.safetensors"))
    assert message == "block 0, graph both: 2 of block 1's decisions on heads differ"


def test_a_small_difference_is_found(wide: tuple[Path, Path], tmp_path: Path) -> None:
    bundle, checkpoint = wide
    altered = shutil.copytree(bundle, tmp_path / "bundle")
    scale(altered, "head.weight", 1.01)
    assert "block 2, graph" in (message := fault(altered, checkpoint))
    assert ": differs from the checkpoint by up to" in message


@pytest.mark.parametrize(("tensor", "named"), [("head.bias", "block 2, graph"), ("blocks.1.mlp.fc1.bias", "block 1, ")])
def test_what_is_no_number_is_found(tensor: str, named: str, wide: tuple[Path, Path], tmp_path: Path) -> None:
    altered = shutil.copytree(wide[0], tmp_path / "bundle")
    scale(altered, tensor, float("nan"))
    assert (message := fault(altered, wide[1])).startswith(named)
    assert message.endswith(": makes values that are not finite")


def test_another_architecture_is_named(tiny_bundle: Path, tmp_path: Path) -> None:
    other = save(random_model(tiny(depth=2, hidden=64)), tmp_path / "other.safetensors")
    message = fault(tiny_bundle, other)
    assert "are of different architectures: depth 3 and 2, hidden 80 and 64" in message


def test_a_resized_bundle_is_checked_at_its_size(checkpoint: Path, tmp_path: Path) -> None:
    bundle = export(checkpoint, tmp_path, image_size=48)
    assert check(bundle, checkpoint)["verified"]["images"] > 0
