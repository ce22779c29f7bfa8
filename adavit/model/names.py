"""Finds the model's weights in a checkpoint: training tools put them into containers and names before their names."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor

from adavit.errors import CheckpointError

__all__ = ["find_weights", "own_names"]

CONTAINERS = (
    "state_dict_ema", "model_ema", "ema_state_dict", "ema_model", "ema",
    "state_dict", "model_state_dict", "model_state", "model", "module", "net", "weights",
)  # fmt: skip
"""Where training checkpoints keep their weights, the exponential moving average first."""
MAX_DEPTH = 4
"""Containers within containers; a pickle may hold itself."""

WRAPPERS = frozenset({"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"})
"""Names that DataParallel, torch.compile, FSDP, activation checkpointing and Lightning Fabric put into names."""
COUNTER = "n_averaged"
"""What AveragedModel counts beside the weights."""
ANCHOR = "pos_embed"
"""A weight that every model has once, at its root."""
ROOTS = frozenset({"blocks", "cls_token", "head", "norm", "patch_embed", "pos_embed", "tokens_to_token"})
"""How the names of a model's own weights begin."""


def find_weights(content: Mapping[Any, Any]) -> Mapping[Any, Any]:
    """The innermost container of a checkpoint that holds weights; the content itself where there is none."""
    for _ in range(MAX_DEPTH):
        inner = next((content[key] for key in CONTAINERS if _holds_weights(content.get(key))), None)
        if inner is None:
            break
        content = inner
    return content


def _holds_weights(value: Any) -> bool:
    if not isinstance(value, dict):
        return False
    return any(isinstance(v, Tensor) for v in value.values()) or any(isinstance(value.get(k), dict) for k in CONTAINERS)


def own_names(state: Mapping[Any, Any]) -> tuple[list[tuple[str, str]], str]:
    """The names in a checkpoint, and those that the model itself gives the weights.

    Wrappers are taken off wherever they are, AveragedModel's counter is left out, and so is a prefix that all names
    share.

    Returns:
        Pairs of the checkpoint's name and the model's, and the prefix that was taken off.

    Raises:
        CheckpointError: a name is no text, or only some of the weights are under the model's prefix.
    """
    pairs = []
    for key, value in state.items():
        if not isinstance(key, str):
            raise CheckpointError(f"{key!r} is no name of a weight; save model.state_dict()")
        parts = [part for part in key.split(".") if part not in WRAPPERS]
        counts = parts[-1:] == [COUNTER] and isinstance(value, Tensor) and value.numel() == 1
        if not counts:
            pairs.append((key, ".".join(parts) or key))
    prefix = _prefix([name for _, name in pairs])
    return [(key, name.removeprefix(prefix)) for key, name in pairs], prefix


def _prefix(names: Collection[str]) -> str:
    """What is before the names of the model's own weights, such as "model."; empty where there is nothing."""
    found = sorted({name.removesuffix(ANCHOR) for name in names if f".{name}".endswith(f".{ANCHOR}")})
    if not found:
        return _shared(names)
    if len(found) > 1:
        listed = " and ".join(repr(prefix) if prefix else "no prefix" for prefix in found)
        raise CheckpointError(
            f"holds several models, under {listed}; save one of them alone with torch.save(model.state_dict(), ...)"
        )
    prefix = found[0]
    if others := sorted(name for name in names if not name.startswith(prefix)):
        more = f" and {len(others) - 1} more" if len(others) > 1 else ""
        raise CheckpointError(
            f"its model is under {prefix!r}, beside {others[0]}{more}; save the model alone with "
            f"torch.save(model.state_dict(), ...), without {prefix!r} in the names"
        )
    return prefix


def _shared(names: Collection[str]) -> str:
    """The prefix that all names share, as far as no weight of a model's own begins so."""
    prefix = ""
    while True:
        firsts = {name.removeprefix(prefix).partition(".")[:2] for name in names}
        first, dot = firsts.pop() if len(firsts) == 1 else ("", "")
        if not dot or first in ROOTS:
            return prefix
        prefix += first + dot
