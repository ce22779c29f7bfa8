"""A whole block in one call of OpenVINO, on the tokens and with the heads that its policy keeps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy.typing as npt

from adavit.runtime.backends.openvino_buffers import OpenVinoBuffer, as_rows, rounded
from adavit.runtime.backends.openvino_engine import Compiled, Requests
from adavit.runtime.backends.openvino_models import mask_of, names_of

__all__ = ["BlockModels", "OpenVinoBlockEngine"]


class BlockModels:
    """A `block_model` for any numbers of tokens and heads, and for some of them alone, which is faster.

    Args:
        head_width: of the model.
        make: makes a `block_model`.
        compile_model: compiles it.

    Attributes:
        names: of its inputs, then its outputs.
        any: compiled for any numbers.
        prepared: compiled for so many tokens, as they are rounded, and heads. May be replaced as a whole.
    """

    def __init__(self, head_width: int, make: Callable[[], Any], compile_model: Callable[[Any], Compiled]) -> None:
        self._head_width, self._make, self._compile = head_width, make, compile_model
        self.any = compile_model(make())
        self.names = [*names_of(self.any.inputs), *names_of(self.any.outputs)]
        self.prepared: dict[tuple[int, int], Compiled] = {}

    def prepare(self, tokens: int, heads: int) -> Compiled:
        """Compiles it for so many tokens, as they are rounded, and heads alone."""
        channels = heads * self._head_width
        by_name = dict.fromkeys(("kept", "mask"), tokens) | dict.fromkeys(("qkv", "qkv_bias", "heads"), heads)
        by_name |= {"proj": channels, "fc1": channels + 2}
        model = self._make()
        shapes: dict[Any, list[Any]] = {}
        for port, name in zip(model.inputs, names_of(model.inputs), strict=True):
            shapes[port] = [by_name[name] if size.is_dynamic else size for size in port.partial_shape]
        model.reshape(shapes)
        return self._compile(model)


class OpenVinoBlockEngine:
    """A block with its weights, and requests of its own, in which they stay set.

    Args:
        name: of the engine.
        models: run it, and others with other weights.
        heads: how many there are.
        fixed: the weights that are the same in every run, by the names of the model's inputs.
        given: the names of the others.
    """

    def __init__(
        self, name: str, models: BlockModels, heads: int, fixed: Mapping[str, npt.NDArray[Any]], given: Sequence[str]
    ) -> None:
        self._name, self._models, self._heads = name, models, heads
        self._any = Requests(name, models.any)
        self._fixed = {key: as_rows(array) for key, array in fixed.items()}  # tensors do not keep their memory
        self._given = [models.names.index(key) for key in given]

    def bound(self, values: Mapping[str, Any]) -> Callable[..., None]:
        """See `FixedEngine.bound`. Kept tokens are rounded up by further ones of the class token."""
        names, at_given = self._models.names, self._given
        known = self._fixed | {key: as_rows(values[key]) for key in names if key in values}
        tensors = [known[key].tensor if key in known else None for key in names]
        at_kept, at_mask = (names.index(key) if key in names else None for key in ("kept", "mask"))
        if at_kept is not None:
            kept = values["kept"]
            numbers = OpenVinoBuffer.empty(kept.shape, "int32")

        def bound(*weights: Any) -> None:
            now, rows = tensors.copy(), 0
            for position, given in zip(at_given, weights, strict=True):
                now[position] = given.tensor
            if at_kept is not None:
                found = kept.nonzero()[0]
                count = len(found)
                rows = rounded(count, len(kept))
                numbers.array[:count] = found
                numbers.array[count:rows] = 0
                now[at_kept] = numbers.rows(rows).tensor
                if at_mask is not None:
                    now[at_mask] = mask_of(count, rows)
            self._requests_of(rows, weights[0].number if weights else self._heads).run(now)

        return bound

    def _requests_of(self, tokens: int, heads: int) -> Requests:
        """What runs it with so many tokens, as they are rounded, and heads."""
        compiled = self._models.prepared.get((tokens, heads))
        return self._any if compiled is None else compiled.requests_of(self._name)
