"""Checking a bundle against a checkpoint: whatever differs is found and named."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from cases import WIDE, export, quiet, random_model, read_config, rewrite_engine, save, tiny
from onnx import numpy_helper

from adavit.errors import VerificationError
from adavit.export import check_bundle
from adavit.export import verify as verifying


def alter(bundle: Path, name: str, factor: float = -1.5) -> None:
    """Scales an engine's largest weight, or without any, subtracts where it adds; described as if exported so."""
    engine = onnx.load(bundle / read_config(bundle)["engines"][name]["file"])
    weights = [weight for weight in engine.graph.initializer if weight.data_type == onnx.TensorProto.FLOAT]
    if weights:
        largest = max(weights, key=lambda weight: np.prod(weight.dims))
        largest.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(largest) * np.float32(factor), largest.name))
    else:
        next(node for node in reversed(engine.graph.node) if node.op_type == "Add").op_type = "Sub"
    rewrite_engine(bundle, name, engine.SerializeToString())


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
    compare, ran = verifying._compare, []

    def differs(*given: Any) -> float:
        ran.append(compare(*given))
        return 0.25 if len(ran) == (runs + worst if worst < 0 else worst) + 1 else 0.125

    monkeypatch.setattr(verifying, "_compare", differs)
    runs = -1  # as many as a first check makes
    check(tiny_bundle, checkpoint)
    runs = len(ran)
    ran.clear()
    assert check(tiny_bundle, checkpoint)["verified"]["max_logit_difference"] == 0.25


def test_every_altered_engine_is_named(wide: tuple[Path, Path], tmp_path: Path) -> None:
    bundle, checkpoint = wide
    for name in read_config(bundle)["engines"]:
        if name.startswith("rows."):  # has no weights, and in host memory rows are moved without it
            continue
        altered = shutil.copytree(bundle, tmp_path / name)
        alter(altered, name)
        message = fault(altered, checkpoint)
        shutil.rmtree(altered)
        named = message.split("engine ")[1].split(":")[0]
        if name == "empty":  # it serves every block that keeps no head
            assert named.startswith("blocks.")
            continue
        # Altered weights show where they are used.
        assert name.replace("_weights", "_gather") == named, f"{name} was altered, but: {message}"
        if name.startswith("blocks."):
            assert message.startswith(f"block {name.split('.')[1]}, engine ")


def test_decisions_that_differ_are_named(wide: tuple[Path, Path], tmp_path: Path) -> None:
    bundle, _ = wide
    model = random_model(WIDE, heads=100.0)
    message = fault(bundle, save(model, tmp_path / "other.safetensors"))
    assert message.startswith("block 1, engine blocks.1.decide: ")
    assert message.endswith("decisions on heads differ")


def test_a_small_difference_is_found(wide: tuple[Path, Path], tmp_path: Path) -> None:
    bundle, checkpoint = wide
    altered = shutil.copytree(bundle, tmp_path / "bundle")
    alter(altered, "head", 1.01)
    assert "engine head: differs from the checkpoint by up to" in fault(altered, checkpoint)


@pytest.mark.parametrize("name", ["head", "blocks.1.mlp"])
def test_what_is_no_number_is_found(name: str, wide: tuple[Path, Path], tmp_path: Path) -> None:
    altered = shutil.copytree(wide[0], tmp_path / "bundle")
    alter(altered, name, float("nan"))
    assert f"engine {name}: differs from the checkpoint by up to nan" in fault(altered, wide[1])


def test_another_architecture_is_named(tiny_bundle: Path, tmp_path: Path) -> None:
    other = save(random_model(tiny(depth=2, hidden=64)), tmp_path / "other.safetensors")
    message = fault(tiny_bundle, other)
    assert "are of different architectures: depth 3 and 2, hidden 80 and 64" in message


def test_a_resized_bundle_is_checked_at_its_size(checkpoint: Path, tmp_path: Path) -> None:
    bundle = export(checkpoint, tmp_path, image_size=48)
    assert check(bundle, checkpoint)["verified"]["images"] > 0
