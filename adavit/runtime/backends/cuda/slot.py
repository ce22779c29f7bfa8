"""An image's memory on the device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from adavit.bundle.graph_keys import STEM_GRAPH, GraphKey
from adavit.bundle.keys import BlockKey
from adavit.runtime.backend import Float, Index
from adavit.runtime.backends.cuda.arrays import DeviceArray

if TYPE_CHECKING:
    from adavit.runtime.backends.cuda.backend import DeviceBackend

__all__ = ["DeviceSlot"]


class DeviceSlot:
    """An image's tokens, decisions and logits on the device; see `Slot`.

    Tokens are there twice: a graph may not write what it reads.

    Args:
        backend: has the engines.
    """

    def __init__(self, backend: DeviceBackend) -> None:
        arch, device = backend.graphs.architecture, backend.device
        self._backend, self._arch = backend, arch
        tokens = (arch.tokens, arch.width)
        self._x, self._y = DeviceArray.empty(device, tokens), DeviceArray.empty(device, tokens)
        self._image = DeviceArray.empty(device, (1, 3, arch.image_size, arch.image_size))
        self._kept = DeviceArray.empty(device, (arch.tokens,), "int64")
        self._logits = DeviceArray.empty(device, (1, arch.classes))
        self._decisions = DeviceArray.empty(device, (1, arch.tokens + arch.heads + 2))

    def stem(self, image: Float) -> None:
        """See `Slot.stem`."""
        self._backend.device.upload(image, self._image.address)
        self._run(STEM_GRAPH, {"images": self._image}, 0)

    def block(self, key: BlockKey, tokens: Index) -> None:
        """See `Slot.block`."""
        given = {"x": self._x}
        if any(key.sublayers):
            given |= self._backend.heads.acquire(key).values  # on the device, in memory of their own
            if self._arch.token_policy:
                self._backend.device.upload(tokens, self._kept.address)
                given["tokens"] = self._kept.first(len(tokens))
        self._run(GraphKey("block", key.block, key.sublayers), given, key.block + 1)

    def decisions(self) -> Float:
        """See `Slot.decisions`."""
        found: Float = self._backend.fetch(self._decisions)[0]
        return found

    def logits(self) -> Float:
        """See `Slot.logits`."""
        found: Float = self._backend.fetch(self._logits)[0]
        return found

    def tokens(self) -> Float:
        """See `Slot.tokens`."""
        return self._backend.fetch(self._x)

    def _run(self, key: GraphKey, given: Mapping[str, DeviceArray], coming: int) -> None:
        """Runs a graph behind which a block is to come."""
        engine = self._backend.engine(key)
        self._decisions = self._decisions.first(1, self._backend.graphs.decisions(coming))
        engine.run({**given, "y": self._y, "logits": self._logits, "decisions": self._decisions})
        if any(value.name == "y" for value in engine.graph.outputs):
            self._x, self._y = self._y, self._x
