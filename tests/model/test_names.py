"""Whole weights under the names that training tools give them, and files that are called otherwise."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from cases import invoke, tiny
from safetensors.torch import save_file

from adavit.cli import export as export_command
from adavit.errors import CheckpointError
from adavit.model import AdaViT, load_checkpoint, read_metadata, save_safetensors
from adavit.model.notes import read_classes, read_crop
from adavit.training.teacher import open_teacher

State = dict[str, Any]


@pytest.fixture
def state(model: AdaViT) -> State:
    return dict(model.state_dict())


def assert_loads(path: Path, model: AdaViT) -> None:
    found, wanted = load_checkpoint(path).state_dict(), model.state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(value, wanted[key]) for key, value in found.items())


def fault(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    return message


def under(prefix: str, state: State) -> State:
    return {prefix + key: value for key, value in state.items()}


PREFIXES = (
    "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "module.module.", "model.", "net.", "backbone.",
    "model.module._orig_mod.", "student.backbone.", "blocks.", "head.", "_fsdp_wrapped_module._orig_mod.",
)  # fmt: skip


@pytest.mark.parametrize("prefix", PREFIXES)
def test_a_prefix_that_all_names_share(prefix: str, state: State, model: AdaViT, tmp_path: Path) -> None:
    torch.save({"state_dict": under(prefix, state)}, tmp_path / "model.pth")
    assert_loads(tmp_path / "model.pth", model)
    save_file(under(prefix, state), tmp_path / "model.safetensors")
    assert_loads(tmp_path / "model.safetensors", model)


def wrapped_inside(state: State) -> State:
    """FSDP and torch.compile of single blocks."""
    names = {key: key.replace("blocks.1.", "blocks.1._fsdp_wrapped_module._orig_mod.") for key in state}
    return {f"_fsdp_wrapped_module.{name}": state[key] for key, name in names.items()}


WRAPPED: dict[str, Callable[[State], Any]] = {
    "blocks of their own": wrapped_inside,
    "some names alone": lambda s: {f"module.{k}" if "blocks" in k else k: v for k, v in s.items()},
    "AveragedModel": lambda s: {"n_averaged": torch.tensor(5), **under("module.", s)},
    "DDP of AveragedModel": lambda s: {"module.n_averaged": torch.tensor(5), **under("module.module.", s)},
    "Lightning's AveragedModel": lambda s: {"average.n_averaged": torch.tensor(5), **under("average.module.", s)},
    "Lightning": lambda s: {
        "epoch": 3, "pytorch-lightning_version": "2.5.0", "state_dict": under("model.", s), "callbacks": {"best": 0.5},
        "hyper_parameters": {"lr": 0.1}, "optimizer_states": [{}],
    },
    "DeepSpeed": lambda s: {"module": s, "lr_scheduler": None},
    "PyTorch's tutorial": lambda s: {"epoch": 3, "model_state_dict": s, "optimizer_state_dict": {}},
    "containers in one another": lambda s: {"model": {"state_dict": under("module.", s)}, "epoch": 3},
    "an average of another kind": lambda s: {"ema": {"decay": 0.9, "shadow_params": []}, "state_dict": s},
}  # fmt: skip


@pytest.mark.parametrize("kind", WRAPPED)
def test_what_tools_make_of_a_model(kind: str, state: State, model: AdaViT, tmp_path: Path) -> None:
    torch.save(WRAPPED[kind](state), tmp_path / "model.pth")
    assert_loads(tmp_path / "model.pth", model)


AVERAGES: dict[str, Callable[[State], State]] = {
    **{
        key: lambda s, key=key: {key: s}  # type: ignore[misc]
        for key in (
            "averaged_model", "ema_weights", "model_ema_state_dict", "ema_state", "swa_state_dict", "module_ema",
            "shadow", "ema", "EMA",
        )
    },
    "a shadow": lambda s: {"ema": {"decay": 0.9, "shadow": s}},
    "a shadow beside tensors": lambda s: {"ema": {"decay": torch.tensor(0.9), "updates": torch.tensor(5), "shadow": s}},
    "its state": lambda s: {"ema": {"decay": 0.9, "state_dict": under("module.", s)}},
    "its optimiser beside it": lambda s: {"ema_optimizer": {"state": {0: {"exp_avg": s["pos_embed"]}}}, "ema": s},
}  # fmt: skip


@pytest.mark.parametrize("kind", AVERAGES)
@pytest.mark.parametrize("container", ["state_dict", "model"])
def test_an_average_comes_before_what_was_averaged(
    kind: str, container: str, state: State, model: AdaViT, tmp_path: Path
) -> None:
    last = {key: value + 1 for key, value in state.items()}
    torch.save({container: last, **AVERAGES[kind](state)}, tmp_path / "model.pth")
    assert_loads(tmp_path / "model.pth", model)


NO_AVERAGES: dict[str, State] = {
    "none": {"state_dict_ema": None, "ema": None},
    "empty": {"state_dict_ema": {}, "shadow": []},
    "numbers": {"ema_decay": 0.99, "ema": {"decay": torch.tensor(0.99), "updates": 5}, "swa_start": torch.tensor(7)},
}


@pytest.mark.parametrize("kind", NO_AVERAGES)
def test_what_is_called_an_average_and_holds_no_weights(kind: str, state: State, model: AdaViT, tmp_path: Path) -> None:
    torch.save({"model": state, **NO_AVERAGES[kind]}, tmp_path / "model.pth")
    assert_loads(tmp_path / "model.pth", model)


FAULTS: dict[str, tuple[Callable[[State], Any], tuple[str, ...]]] = {
    "a loss beside it": (
        lambda s: {**under("model.", s), "loss.weight": torch.ones(5), "loss.count": torch.tensor(1)},
        ("its model is under 'model.', beside loss.count and 1 more", "save the model alone"),
    ),
    "an average beside it": (
        lambda s: {**under("ema.", s), **under("model.", s)},
        ("holds several models, under 'ema.' and 'model.'", "save one of them alone"),
    ),
    "an average without names": (
        lambda s: {"model": s, "ema": {"decay": 0.9, "shadow_params": list(s.values())}},
        ("its average 'ema' holds tensors without the names", "save it alone with torch.save(model.state_dict(), ...)"),
    ),
    "an average out of reach": (lambda s: {"model": s, "ema": {"best": s}}, ("'best' is a dict, not a tensor",)),
    "several averages": (
        lambda s: {"model": s, "ema": s, "swa_state_dict": s},
        ("holds several averages, 'ema' and 'swa_state_dict'", "save one of them alone"),
    ),
    "a teacher beside bare weights": (lambda s: {**s, **under("teacher.", s)}, ("no prefix and 'teacher.'",)),
    "a hole under a prefix": (
        lambda s: under("model.", {k: v for k, v in s.items() if k != "norm.bias"}),
        ("under 'model.'", "missing norm.bias"),
    ),
    "no positions under a prefix": (
        lambda s: under("model.", {k: v for k, v in s.items() if k != "pos_embed"}),
        ("under 'model.'", "missing pos_embed"),
    ),
    "blocks alone": (lambda s: {k: v for k, v in s.items() if k.startswith("blocks.")}, (": missing pos_embed",)),
    "one name twice": (
        lambda s: {**s, "module.norm.bias": s["norm.bias"]},
        ("norm.bias is there twice", "keep one of the two"),
    ),
    "numbers for names": (lambda s: {0: s["norm.bias"]}, ("0 is no name of a weight",)),
    "the counter alone": (lambda _: {"n_averaged": torch.tensor(5)}, ("holds no weights",)),
}


@pytest.mark.parametrize("kind", FAULTS)
def test_what_is_not_one_model_is_named(kind: str, state: State, tmp_path: Path) -> None:
    change, parts = FAULTS[kind]
    torch.save(change(state), tmp_path / "model.pth")
    message = fault(tmp_path / "model.pth")
    for part in parts:
        assert part in message


def test_a_checkpoint_that_holds_itself(state: State, tmp_path: Path) -> None:
    content: State = {"epoch": 3}
    content["model"] = content
    torch.save(content, tmp_path / "model.pth")
    assert "'epoch' is a int, not a tensor" in fault(tmp_path / "model.pth")


def test_what_a_trainer_pickles_beside_the_weights_is_named(
    state: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = ModuleType("a_trainer")

    class AttributeDict(dict):  # type: ignore[type-arg]
        pass

    AttributeDict.__module__, AttributeDict.__qualname__ = trainer.__name__, "AttributeDict"
    trainer.AttributeDict = AttributeDict  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, trainer.__name__, trainer)
    torch.save({"state_dict": state, "hyper_parameters": AttributeDict(lr=0.1)}, tmp_path / "lightning.ckpt")
    message = fault(tmp_path / "lightning.ckpt")
    assert "a_trainer.AttributeDict" in message
    assert "save only the weights with torch.save(model.state_dict(), ...)" in message


@pytest.fixture
def noted(model: AdaViT, tmp_path: Path) -> Path:
    save_safetensors(model, tmp_path / "noted.safetensors", {"classes": ["a", "b"], "crop_ratio": 0.7})
    return tmp_path / "noted.safetensors"


@pytest.mark.parametrize("name", ["MODEL.SAFETENSORS", "3f2a9c", "weights.pth", "model.ckpt"])
def test_safetensors_are_told_by_their_content(name: str, noted: Path, model: AdaViT, tmp_path: Path) -> None:
    path = shutil.copy(noted, tmp_path / name)
    assert_loads(path, model)
    assert (read_classes(path), read_crop(path), read_metadata(path)["num_heads"]) == (["a", "b"], 0.7, "3")
    truncated = tmp_path / f"half-{name}"
    truncated.write_bytes(path.read_bytes()[:-100])
    assert "a damaged safetensors file" in fault(truncated)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_is_told_by_its_content(zipped: bool, state: State, model: AdaViT, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    assert_loads(path, model)
    assert (read_classes(path), read_crop(path), read_metadata(path)) == ([], None, {})


def hostile(header: Any, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


TENSOR = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
HOSTILE = {
    "longer than the file": (1 << 20).to_bytes(8, "little") + b'{"a": 1}',
    "longer than any": b"\xff" * 8 + b"{",
    "no JSON": hostile(b"{" + b"[" * 100_000),
    "beyond the end": hostile({"pos_embed": {**TENSOR, "data_offsets": [0, 1 << 40]}}),
    "overlapping": hostile({"pos_embed": TENSOR, "b": TENSOR}, bytes(4)),
    "larger than a size": hostile({"pos_embed": {**TENSOR, "shape": [1 << 62, 1 << 62]}}, bytes(4)),
    "no tensor": hostile({"pos_embed": 3}, bytes(4)),
    "no text in the notes": hostile({"__metadata__": {"num_heads": 3}, "pos_embed": TENSOR}, bytes(4)),
    "a type that torch may lack": hostile({"pos_embed": {**TENSOR, "dtype": "F4", "shape": [8]}}, bytes(4)),
    "whole numbers": hostile({"pos_embed": {**TENSOR, "dtype": "I32"}}, bytes(4)),
    "not whole": hostile({"pos_embed": TENSOR}, bytes(4)),
    "no weights": hostile({}),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_safetensors_are_refused(kind: str, tmp_path: Path) -> None:
    (tmp_path / "model.pth").write_bytes(HOSTILE[kind])
    fault(tmp_path / "model.pth")


def test_teachers_and_checks_take_the_same_files(tmp_path: Path, state: State, checkpoint: Path) -> None:
    arch = tiny(token_policy=False, head_policy=False, sublayer_policy=False)
    dense = AdaViT(arch)
    save_file(under("_orig_mod.", dict(dense.state_dict())), tmp_path / "teacher.pth")
    teacher = open_teacher(tmp_path / "teacher.pth", arch)
    assert isinstance(teacher, AdaViT) and teacher.arch == arch
    torch.save(under("model.", state), tmp_path / "lightning.ckpt")
    done = invoke(export_command, tmp_path / "lightning.ckpt", "--output", tmp_path / "bundle", "--no-verify")
    assert done.exit_code == 0, done.output
    done = invoke(export_command, "--check", tmp_path / "bundle", "--against", tmp_path / "lightning.ckpt")
    assert done.exit_code == 0, done.output
