"""What backends on a GPU share: images stay on the device, one engine runs a block, and decisions alone come back."""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence

import numpy as np

from adavit.bundle.graph_keys import DENSE_GRAPH, GraphKey, graph_keys
from adavit.bundle.graphs import Graphs
from adavit.runtime.backend import Float, Usage
from adavit.runtime.backends.cuda.arrays import DeviceArray, DeviceEngine
from adavit.runtime.backends.cuda.device import Device
from adavit.runtime.backends.cuda.heads import HeadUploads
from adavit.runtime.backends.cuda.slot import DeviceSlot
from adavit.runtime.forks import renew_in_fork
from adavit.runtime.head_cache import HeadCache

__all__ = ["DeviceBackend"]

HEADS = 256 << 20
"""Bytes of the weights of heads that are kept on the device, beside one copy of what all heads share."""


class DeviceBackend(ABC):
    """What `Backend` says, for a device; a backend adds its name, `versions`, and how an engine is made.

    Once nothing refers to it, its engines are closed, and what they ran on is freed.

    Args:
        graphs: what to run.
        device: where.
    """

    on_host = False

    def __init__(self, graphs: Graphs, device: Device) -> None:
        self.graphs, self.device = graphs, device
        self._opened: list[DeviceEngine] = []
        self._finalizer = weakref.finalize(self, _close, device, self._opened)
        self._engines: dict[GraphKey, DeviceEngine] = {}
        self.heads = HeadCache(graphs, HeadUploads(device, graphs.architecture.head_width), HEADS)
        renew_in_fork(self)

    def after_fork(self) -> None:
        """Leaves the device to the parent: a forked child may not call CUDA."""
        self._finalizer.detach()

    def open_engines(self) -> None:
        """Makes the engines of all graphs, but for a dense twin beside others: that is made when it is run."""
        if self.graphs.architecture.adapts:
            self.graphs.check_deciding()
        for key in graph_keys(self.graphs.files):
            if key != DENSE_GRAPH or not self.graphs.architecture.adapts:
                self.engine(key)

    @abstractmethod
    def _open(self, key: GraphKey) -> DeviceEngine:
        """Makes the engine of a graph.

        Raises:
            BundleError: it is not the one that was exported or built.
            BackendError: it does not run here.
        """

    def engine(self, key: GraphKey) -> DeviceEngine:
        """The engine of a graph, made once; see `_open`."""
        found = self._engines.get(key)
        if found is None:
            with self.device.lock:
                found = self._engines.get(key)
                if found is None:
                    found = self._open(key)
                    self._opened.append(found)
                    self._engines[key] = found
        return found

    def slot(self, threads: int) -> DeviceSlot:
        """See `Backend.slot`."""
        return DeviceSlot(self)

    def dense(self, images: Float) -> Float:
        """See `Backend.dense`: as many images at once as the engine is for."""
        engine, logits = self.engine(DENSE_GRAPH), np.empty((len(images), self.graphs.architecture.classes), np.float32)
        for start in range(0, len(images), engine.most_images):
            some = images[start : start + engine.most_images]
            given = DeviceArray.empty(self.device, some.shape)
            made = DeviceArray.empty(self.device, (len(some), logits.shape[1]))
            with self.device.lock:
                self.device.upload(np.ascontiguousarray(some), given.address)
                engine.run({"images": given, "logits": made})
            logits[start : start + len(some)] = self.fetch(made)
        return logits

    def fetch(self, array: DeviceArray) -> Float:
        """An array's values on the host, once all that was enqueued before is done."""
        (found,) = self.device.fetch([(array.address, array.nbytes)])
        return found.as_array(array.shape, array.dtype)

    def choose(self, usage: Usage) -> Sequence[Hashable]:
        """See `Backend.choose`: nothing."""
        return []

    def prepare(self, wanted: Hashable) -> None:  # noqa: B027  (there is nothing to do)
        """See `Backend.prepare`: nothing is chosen."""

    def retain(self, wanted: Sequence[Hashable]) -> None:  # noqa: B027  (there is nothing to do)
        """See `Backend.retain`: nothing is prepared."""

    def prepared(self) -> Sequence[Hashable]:
        """See `Backend.prepared`: nothing."""
        return []

    def rounded(self, tokens: int) -> int:
        """See `Backend.rounded`: as many."""
        return tokens

    def timings(self) -> dict[str, float]:
        """See `Backend.timings`."""
        return self.device.timings()


def _close(device: Device, engines: list[DeviceEngine]) -> None:
    """Frees engines, then what they ran on."""
    with device.lock:
        device.synchronise()
        for engine in engines:
            engine.close()
        engines.clear()
        device.close()
