"""Finds the model's weights in a checkpoint: training tools put them into containers and names before their names."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from torch import Tensor

from adavit.errors import CheckpointError, shown

__all__ = ["find_weights", "own_names"]

CONTAINERS = ("state_dict", "model_state_dict", "model_state", "model", "module", "net", "weights")
"""Where training checkpoints keep their weights."""
AVERAGE = re.compile("ema|swa|averag|shadow", re.IGNORECASE)
"""In the names of where they keep an average of the weights, which comes first."""
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
    """The innermost container of a checkpoint that holds weights; the content itself where there is none.

    Averaged weights come before those that were averaged.

    Raises:
        CheckpointError: there are several averages, or one whose tensors have no names.
    """
    for _ in range(MAX_DEPTH):
        inner = _average(content)
        if inner is None:
            inner = next((content[key] for key in CONTAINERS if _holds_weights(content.get(key))), None)
        if inner is None:
            break
        content = inner
    return content


def _average(content: Mapping[Any, Any]) -> Mapping[Any, Any] | None:
    """What holds averaged weights by name; None where there is no average."""
    keys = [key for key in content if isinstance(key, str) and AVERAGE.search(key)]
    held = {key: names for key in keys if (names := list(_tensor_names(content[key])))}
    named = [key for key, names in held.items() if any(ROOTS.intersection(name.split(".")) for name in names)]
    if held and not named:
        raise CheckpointError(
            f"its average {shown(next(iter(held)))} holds tensors without the names of the model's weights; put them "
            "into the model, and save it alone with torch.save(model.state_dict(), ...)"
        )
    if len(named) > 1:
        listed = " and ".join(map(shown, named))
        raise CheckpointError(
            f"holds several averages, {listed}; save one of them alone with torch.save(model.state_dict(), ...)"
        )
    return content[named[0]] if named else None


def _tensor_names(held: Any) -> Iterator[str]:
    """The names of the tensors in a container and in those within, empty in lists; single numbers are none.

    Each container is looked into once: a pickle may hold one in itself, or in a million places.
    """
    waiting, seen = [held], set()
    while waiting:
        container = waiting.pop()
        if not isinstance(container, dict | list | tuple) or id(container) in seen:
            continue
        seen.add(id(container))
        for key, value in container.items() if isinstance(container, dict) else (("", part) for part in container):
            if isinstance(value, Tensor) and value.numel() > 1:
                yield key if isinstance(key, str) else ""
            else:
                waiting.append(value)


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
            raise CheckpointError(f"{shown(key)} is no name of a weight; save model.state_dict()")
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
