"""A whole block in one call of OpenVINO, on the tokens and with the heads that its policy keeps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from adavit.runtime.backends.openvino_buffers import OpenVinoBuffer, as_rows, rounded
from adavit.runtime.backends.openvino_engine import Requests
from adavit.runtime.backends.openvino_models import mask_of, names_of, there_of

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
        """See `FixedEngine.bound`. Kept tokens are rounded up by some that are not kept, which stay as they are."""
        known = self._fixed | {key: as_rows(values[key]).tensor for key in self._names if key in values}
        tensors = [known.get(key) for key in self._names]
        rows = self._rows_of(values["kept"]) if "kept" in self._names else None

        def run(*weights: Any) -> None:
            for position, given in zip(self._given, weights, strict=True):
                tensors[position] = given.tensor
            if rows is not None:
                rows(tensors)
            self._requests.run(list(tensors))

        return run

    def _rows_of(self, kept: npt.NDArray[np.bool_]) -> Callable[[list[Any]], None]:
        """What sets a run's tensors for the tokens that are kept when it comes to it, bool [N]."""
        order = OpenVinoBuffer.empty(kept.shape, "int32")
        of_kept, of_there = self._names.index("kept"), self._names.index("there")
        of_mask = self._names.index("mask") if "mask" in self._names else None

        def set_rows(tensors: list[Any]) -> None:
            count = int(np.count_nonzero(kept))
            rows = rounded(count, len(kept))
            order.array[:] = np.argsort(~kept, kind="stable")
            tensors[of_kept] = order.rows(rows).tensor
            tensors[of_there] = there_of(count, rows)
            if of_mask is not None:
                tensors[of_mask] = mask_of(count, rows)

        return set_rows
