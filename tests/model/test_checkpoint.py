"""Every layout a checkpoint comes in, and every fault that must be named instead of loaded."""

import os
import pickle
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import GOLDEN, python, random_model, save, tiny
from safetensors.torch import save_file

from adavit.architecture import Architecture
from adavit.errors import CheckpointError, InputError
from adavit.model import AdaViT, load_checkpoint, read_metadata, save_safetensors
from adavit.model.checkpoint_file import load_safely
from adavit.model.notes import read_classes, read_crop

State = dict[str, Any]


@pytest.fixture
def state(model: AdaViT) -> State:
    return dict(model.state_dict())


def assert_loads(path: Path, model: AdaViT, heads: int | None = None) -> None:
    loaded = load_checkpoint(path, heads)
    assert loaded.arch == model.arch
    assert not loaded.training
    wanted = model.state_dict()
    assert loaded.state_dict().keys() == wanted.keys()
    assert all(torch.equal(value, wanted[key]) for key, value in loaded.state_dict().items())


def fault(path: Path, heads: int | None = None) -> str:
    """The message a checkpoint is refused with: one line that begins with its path."""
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(path, heads)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    return message


def fused(state: State) -> State:
    """Query, key and value of every block as one, as T2T-ViT, DeiT and timm store them."""
    result = {key: value for key, value in state.items() if not any(f".{p}." in key for p in ("query", "key", "value"))}
    for key in [key for key in state if ".query." in key]:
        parts = [state[key.replace("query", part)] for part in ("query", "key", "value")]
        result[key.replace("query", "qkv")] = torch.cat(parts)
    return result


LAYOUTS: dict[str, Callable[[State], Any]] = {
    "bare": lambda state: state,
    "state_dict": lambda state: {"state_dict": state, "epoch": 3},
    "DeiT's model": lambda state: {"model": state, "epoch": 3, "optimizer": {}},
    "module. prefix": lambda state: {"state_dict": {f"module.{key}": value for key, value in state.items()}},
    "fused qkv": fused,
    "double precision": lambda state: {key: value.double() for key, value in state.items()},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str, state: State, model: AdaViT, tmp_path: Path) -> None:
    torch.save(LAYOUTS[layout](state), tmp_path / "model.pth")
    assert_loads(tmp_path / "model.pth", model)


@pytest.mark.parametrize("average", ["state_dict_ema", "model_ema"])
def test_a_training_checkpoint_gives_its_average(average: str, state: State, model: AdaViT, tmp_path: Path) -> None:
    last = {key: value + 1 for key, value in state.items()}
    content = {"epoch": 9, "arch": "ada", "state_dict": last, "model": last, average: state, "optimizer": {"lr": 0.1}}
    torch.save({**content, "version": 2, "metric": 0.5, "args": Namespace(lr=0.1)}, tmp_path / "released.pth.tar")
    assert_loads(tmp_path / "released.pth.tar", model)


def test_the_released_layout_loads_its_average() -> None:
    with torch.serialization.safe_globals([Namespace]):
        content = torch.load(GOLDEN / "deit_sparse.pth", weights_only=True)
    found = load_checkpoint(GOLDEN / "deit_sparse.pth").state_dict()
    assert all(torch.equal(value, content["state_dict_ema"][key]) for key, value in found.items())
    assert any(not torch.equal(value, content["state_dict"][key]) for key, value in found.items())


ARCHITECTURES = {
    "t2t": tiny(stem="t2t", patch_size=16, image_size=48, qkv_bias=False),
    "odd grid, keep 0": tiny(image_size=40, keep=0, heads=6),
    "keep 2": tiny(keep=2, patch_size=16),
    "tokens only": tiny(head_policy=False, sublayer_policy=False),
    "heads only": tiny(token_policy=False, sublayer_policy=False),
    "sub-layers only": tiny(token_policy=False, head_policy=False),
    "dense": tiny(token_policy=False, head_policy=False, sublayer_policy=False, qkv_bias=False),
}


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_the_architecture_is_read_from_the_shapes(kind: str, tmp_path: Path) -> None:
    model = random_model(ARCHITECTURES[kind])
    assert_loads(save(model, tmp_path / "model.safetensors"), model)


def without_heads(tmp_path: Path, width: int, heads: int) -> tuple[AdaViT, Path]:
    model = random_model(tiny(head_policy=False, width=width, heads=heads))
    torch.save(model.state_dict(), tmp_path / "model.pth")
    return model, tmp_path / "model.pth"


def test_heads_are_64_wide_where_nothing_tells(tmp_path: Path) -> None:
    model, path = without_heads(tmp_path, width=128, heads=2)
    assert_loads(path, model)


def test_heads_can_be_given_or_noted(tmp_path: Path) -> None:
    model, path = without_heads(tmp_path, width=48, heads=4)
    assert "nothing tells the number of heads" in fault(path)
    assert "give `heads`" in fault(path)
    assert_loads(path, model, heads=4)
    torch.save({"model": model.state_dict(), "args": Namespace(num_heads=4)}, path)
    assert_loads(path, model)
    assert_loads(path, model, heads=4)
    assert "6 heads asked for, but it notes 4" in fault(path, heads=6)


def test_heads_that_contradict_the_policy_are_refused(checkpoint: Path) -> None:
    assert "4 heads asked for, but head_select decides on 3" in fault(checkpoint, heads=4)


def test_heads_that_do_not_divide_the_width_are_refused(tmp_path: Path) -> None:
    _, path = without_heads(tmp_path, width=48, heads=4)
    assert "width 48 is not a multiple of 5 heads" in fault(path, heads=5)


def without(*parts: str) -> Callable[[State], State]:
    return lambda state: {key: value for key, value in state.items() if not key.startswith(parts)}


def having(key: str, change: Callable[[torch.Tensor], Any]) -> Callable[[State], State]:
    return lambda state: {**state, key: change(state.get(key, torch.zeros(3)))}


def with_nan(value: torch.Tensor) -> torch.Tensor:
    value = value.clone()
    value.view(-1)[0] = float("nan")
    return value


DECISION = "attn.token_select"
FAULTS: dict[str, tuple[Callable[[State], Any], str]] = {
    "missing": (without("blocks.1.attn.proj.bias"), "missing blocks.1.attn.proj.bias"),
    "missing norm": (without("norm."), "missing norm.bias, norm.weight"),
    "missing stem": (without("patch_embed"), "missing patch_embed.proj.weight"),
    "missing head": (without("head."), "missing head.weight"),
    "missing block": (without("blocks.1."), "missing blocks.1.*: 3 blocks are numbered"),
    "no block": (without("blocks."), "missing blocks.0.*"),
    "extra": (having("neck.weight", torch.clone), "unexpected neck.weight"),
    "mis-shaped": (having("blocks.1.mlp.fc1.bias", lambda v: v[:-1]), "mis-shaped blocks.1.mlp.fc1.bias [79] instead"),
    "flat": (having("pos_embed", torch.flatten), "mis-shaped pos_embed [816]: expected 3 dimensions"),
    "not square": (having("pos_embed", lambda v: v[:, :-1]), "pos_embed has 16 tokens"),
    "NaN": (having("norm.weight", with_nan), "NaN or infinite values in norm.weight"),
    "infinite": (having("blocks.2.norm1.bias", lambda v: v / 0), "NaN or infinite values in blocks.2.norm1.bias"),
    "token head of one block": (without(f"blocks.0.{DECISION}"), f"missing {DECISION} in block 0, though other blocks"),
    "head policy of one block": (without("blocks.2.head_select"), "missing head_select in block 2, though"),
    "sub-layer policy of one block": (without("blocks.1.layer_select"), "missing layer_select in block 1, though"),
    "half a policy head": (
        without("blocks.1.head_select.mlp_head.bias"),
        "missing blocks.1.head_select.mlp_head.bias",
    ),
    "query bias of one block": (without("blocks.1.attn.query.bias"), "missing blocks.1.attn.query.bias"),
    "fused and split": (lambda s: {**s, **fused(s)}, "is there twice"),
    "a nested tensor": (
        having("pos_embed", lambda _: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])),
        "pos_embed is a nested tensor",
    ),
    "whole numbers": (having("head.bias", lambda v: v.long()), "head.bias is torch.int64"),
    "text among weights": (having("note", lambda _: "hello"), "'note' is a str, not a tensor"),
    "no storage": (having("head.bias", lambda v: v.to("meta")), "head.bias has no weights of its own"),
    "expanded": (having("head.bias", lambda v: v[:1].expand(1 << 40)), "head.bias has no weights of its own"),
    "a number": (having("blocks.0.attn.qkv.weight", lambda _: torch.tensor(1.0)), "blocks.0.attn.qkv.weight"),
    "a list": (lambda s: list(s.values()), "holds a list, not weights"),
    "one tensor": (lambda s: s["head.bias"], "holds a Tensor, not weights"),
    "no weights": (lambda _: {}, "holds no weights"),
    "another model": (lambda _: {"conv1.weight": torch.zeros(3, 3)}, "missing pos_embed"),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("kind", FAULTS)
def test_faults_are_named(kind: str, state: State, tmp_path: Path) -> None:
    change, message = FAULTS[kind]
    torch.save(change(state), tmp_path / "model.pth")
    assert message in fault(tmp_path / "model.pth")


def test_all_faults_of_a_file_come_at_once(state: State, tmp_path: Path) -> None:
    state["norm.weight"] = with_nan(state["norm.weight"])
    state["head.bias"] = state["head.bias"][:2]
    state["neck"] = state.pop("norm.bias")
    save_file(state, tmp_path / "model.safetensors")
    message = fault(tmp_path / "model.safetensors")
    for part in ("missing norm.bias", "unexpected neck", "mis-shaped head.bias", "NaN or infinite values in norm."):
        assert part in message


class Code:
    """Runs a command when it is unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (self.command,)


@pytest.mark.parametrize("protocol", [None, 0, 2, 4])
def test_code_in_a_pickle_is_refused_and_never_runs(protocol: int | None, state: State, tmp_path: Path) -> None:
    path, trace = tmp_path / "model.pth", tmp_path / "trace"
    content = {"extra": Code(f"touch {trace}"), **state}
    if protocol is None:
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content, protocol))
    # Pickles of protocols that torch.save never writes are refused before it is known what they would run.
    wanted = "not a PyTorch checkpoint to trust" if protocol in (0, 4) else "refused, it would run posix.system"
    message = fault(path)
    assert wanted in message
    assert "save only the weights" in message
    assert not trace.exists()


@pytest.mark.parametrize("name", ["model.pth", "model.safetensors"])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_a_truncated_file_is_refused(name: str, share: float, state: State, tmp_path: Path) -> None:
    path = tmp_path / name
    if path.suffix == ".pth":
        torch.save(state, path)
    else:
        save_file(state, path)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    assert any(word in fault(path) for word in ("truncated", "damaged", "not a PyTorch checkpoint"))


@pytest.mark.parametrize("content", [b"hello, world\n", b"\x80\x04.", b"\x89PNG\r\n\x1a\n" + bytes(64), bytes(4096)])
@pytest.mark.parametrize("name", ["notes.pth", "notes.safetensors"])
def test_what_is_no_checkpoint_is_refused(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    assert "not a PyTorch checkpoint" in fault(tmp_path / name) or "not a safetensors file" in fault(tmp_path / name)


def test_whatever_reading_raises(state: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: Path) -> None:
        raise AssertionError("storage key not found")

    torch.save(state, tmp_path / "model.pth")
    monkeypatch.setattr("adavit.model.checkpoint_file.load_safely", fail)
    assert "not a PyTorch checkpoint, or a truncated one" in fault(tmp_path / "model.pth")


def test_what_is_no_file_is_named(tmp_path: Path) -> None:
    assert "no such file; give the path" in fault(tmp_path / "nothing.pth")
    os.mkfifo(tmp_path / "pipe.pth")
    (tmp_path / "loop.pth").symlink_to("loop.pth")
    for path, kind in (
        (tmp_path, "is a folder, not a file"),
        (tmp_path / "pipe.pth", "is not a regular file but a pipe"),
        (Path("/dev/zero"), "is not a regular file but a device"),
        (tmp_path / "loop.pth", "symbolic links"),
        (tmp_path / f"{'x' * 300}.pth", "name too long"),
    ):
        for read in (load_checkpoint, read_metadata, read_classes, read_crop):
            with pytest.raises(CheckpointError) as caught:
                read(path)
            assert f"{path}: cannot be read (" in str(caught.value)
            assert kind in str(caught.value).replace("File", "file")
    with pytest.raises(OSError, match="pipe"):
        load_safely(tmp_path / "pipe.pth")


@pytest.mark.parametrize("path", [5, None, b"model.pth", "a\0b"])
def test_what_is_no_path(path: Any) -> None:
    with pytest.raises(InputError, match=r"^checkpoint is .*path"):
        load_checkpoint(path)


def bomb() -> list[Any]:
    """A list whose repr would be of 2^60 parts."""
    parts: list[Any] = []
    for _ in range(60):
        parts = [parts, parts]
    return parts


def test_values_that_hold_one_another_are_told_in_short(state: State, tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    torch.save({"state_dict": state, "ema": bomb(), "args": Namespace(crop_pct=bomb(), num_heads=bomb())}, path)
    assert load_checkpoint(path)
    with pytest.raises(CheckpointError, match=r"its crop ratio is \[\["):
        read_crop(path)


def test_a_number_of_heads_that_no_text_can_hold(checkpoint: Path) -> None:
    assert "a value of the type int heads asked for" in fault(checkpoint, heads=10**5000)


def test_the_saved_weights_load_again(model: AdaViT, checkpoint: Path) -> None:
    assert_loads(checkpoint, model)


SAVE = """
import sys
from adavit.model import load_checkpoint, save_safetensors
notes = {"accuracy": "93.20", "classes": ["caf\u00e9", "b"], "crop_ratio": 1.0, "of": "x", "by": "y"}
save_safetensors(load_checkpoint(sys.argv[1]), sys.argv[2], notes)
"""


def test_the_same_weights_and_notes_are_the_same_bytes(model: AdaViT, checkpoint: Path, tmp_path: Path) -> None:
    """Of processes of their own, each of which has an order of hashes of its own."""
    files = [tmp_path / f"{run}.safetensors" for run in range(3)]
    for file in files:
        assert python(SAVE, checkpoint, file).returncode == 0
    assert len({file.read_bytes() for file in files}) == 1
    assert_loads(files[0], model)
    assert read_metadata(files[0])["crop_ratio"] == "1.0"
    assert read_classes(files[0]) == ["café", "b"]


def test_the_crop_is_read_where_it_is_noted(model: AdaViT, state: State, tmp_path: Path) -> None:
    released, own = tmp_path / "released.pth", tmp_path / "checkpoint.pth"
    torch.save({"state_dict": state, "args": Namespace(crop_pct=0.875)}, released)
    torch.save({"state_dict": state, "args": Namespace(settings={"crop": 0.8})}, own)
    assert (read_crop(released), read_crop(own)) == (0.875, 0.8)
    noted = tmp_path / "noted.safetensors"
    save_safetensors(model, noted, {"crop_ratio": 0.7})
    assert read_crop(noted) == 0.7
    assert read_crop(save(model, noted)) is None
    for content in (state, {"state_dict": state, "args": Namespace(crop_pct=None)}, [state]):
        torch.save(content, own)
        assert read_crop(own) is None
    for wrong in (0.0, 7, float("nan"), "wide", [0.9], 10**400):
        torch.save({"state_dict": state, "args": Namespace(crop_pct=wrong)}, own)
        with pytest.raises(CheckpointError, match=r"its crop ratio is .*; give one from 0\.1 to 1"):
            read_crop(own)


def test_architecture_fields_are_checked() -> None:
    values = tiny().to_dict()
    assert Architecture.from_dict(values) == tiny()
    wrong: list[tuple[dict[str, Any], str]] = [
        ({**values, "stem": "conv"}, "unknown stem"),
        ({**values, "depth": 10**9}, "depth is 1000000000"),
        ({**values, "width": True}, "width is True"),
        ({**values, "heads": 5}, "not a multiple of 5 heads"),
        ({**values, "image_size": 33}, "not a multiple of the patch side"),
        ({**values, "keep": 4}, "keep is 4, more than the depth"),
        ({**values, "stem": "t2t", "patch_size": 8}, "patch side is 8: the stem 't2t' makes patches of 16"),
        ({**values, "qkv_bias": 1}, "qkv_bias is 1"),
        ({**values, "extra": 1}, "extra"),
        ({}, "fields differ"),
    ]
    for found, message in wrong:
        with pytest.raises(ValueError, match=message):
            Architecture.from_dict(found)
