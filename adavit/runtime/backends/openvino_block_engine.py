"""A whole block in one call of OpenVINO, on the tokens and with the heads that its policy keeps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy.typing as npt

from adavit.runtime.backends.openvino_buffers import OpenVinoBuffer, as_rows, rounded
from adavit.runtime.backends.openvino_engine import Requests
from adavit.runtime.backends.openvino_models import mask_of, names_of

__all__ = ["OpenVinoBlockEngine"]


class OpenVinoBlockEngine:
    """A compiled `block_model`, which other blocks may share, with the weights of one block.

    Args:
        name: of the engine.
        compiled: the model.
        fixed: the weights that are the same in every run, by the names of the model's inputs.
        given: the names of the others.
    """

    def __init__(self, name: str, compiled: Any, fixed: Mapping[str, npt.NDArray[Any]], given: Sequence[str]) -> None:
        self._requests = Requests(name, compiled)
        self._names = [*names_of(compiled.inputs), *names_of(compiled.outputs)]
        self._fixed = {key: as_rows(array).tensor for key, array in fixed.items()}
        self._given = [self._names.index(key) for key in given]

    def bound(self, values: Mapping[str, Any]) -> Callable[..., None]:
        """See `FixedEngine.bound`. Kept tokens are rounded up by further ones of the class token."""
        known = self._fixed | {key: as_rows(values[key]).tensor for key in self._names if key in values}
        tensors = [known.get(key) for key in self._names]
        run, at_given = self._requests.run, self._given
        at_kept, at_mask = (self._names.index(key) if key in self._names else None for key in ("kept", "mask"))
        if at_kept is not None:
            kept = values["kept"]
            numbers = OpenVinoBuffer.empty(kept.shape, "int32")

        def bound(*weights: Any) -> None:
            now = tensors.copy()
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
            run(now)

        return bound
