"""What backends on a GPU share: images stay on the device, one engine runs a block, and decisions alone come back."""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from adavit.bundle.graph_keys import DENSE_GRAPH, STEM_GRAPH, GraphKey, graph_keys
from adavit.bundle.graphs import Graphs
from adavit.bundle.head_weights import Arrays
from adavit.bundle.keys import BlockKey
from adavit.bundle.onnx_graph import OnnxGraph, Value
from adavit.errors import BackendError
from adavit.runtime.backend import Float, Index, Usage
from adavit.runtime.backends.cuda.device import Allocation, Device, size_of
from adavit.runtime.forks import renew_in_fork
from adavit.runtime.head_cache import HeadCache, in_file

__all__ = ["DeviceArray", "DeviceBackend", "DeviceEngine", "DeviceSlot", "check_arrays"]

HEADS = 256 << 20
"""Bytes of the weights of heads that are kept on the device, beside one copy of what all heads share."""


@dataclass(frozen=True)
class DeviceArray:
    """An array on the device.

    Attributes:
        allocation: its memory, from the first byte on.
        shape, dtype: of what is there.
    """

    allocation: Allocation
    shape: tuple[int, ...]
    dtype: str = "float32"

    @classmethod
    def empty(cls, device: Device, shape: tuple[int, ...], dtype: str = "float32") -> DeviceArray:
        """An array that nothing was written to."""
        return cls(device.memory.take(size_of(shape, dtype)), shape, dtype)

    @property
    def address(self) -> int:
        """Of its first byte."""
        return self.allocation.address

    @property
    def nbytes(self) -> int:
        """Its size."""
        return size_of(self.shape, self.dtype)

    def first(self, *shape: int) -> DeviceArray:
        """What lies at its beginning, as an array of another shape that is no larger."""
        return DeviceArray(self.allocation, shape, self.dtype)


class DeviceEngine(Protocol):
    """A graph that was made ready to run on the device.

    Attributes:
        graph: what it computes.
    """

    graph: OnnxGraph

    @property
    def most_images(self) -> int:
        """Images of a run at most, for the dense twin."""
        ...

    def run(self, arrays: Mapping[str, DeviceArray]) -> None:
        """Enqueues a run on inputs and outputs by name; further arrays are left alone."""
        ...

    def close(self) -> None:
        """Frees it; nothing may be running."""
        ...


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

    def keep(self, wanted: Sequence[Hashable]) -> None:  # noqa: B027  (there is nothing to do)
        """See `Backend.keep`: nothing is prepared."""

    def prepared(self) -> Sequence[Hashable]:
        """See `Backend.prepared`: nothing."""
        return []

    def rounded(self, tokens: int) -> int:
        """See `Backend.rounded`: as many."""
        return tokens

    def timings(self) -> dict[str, float]:
        """See `Backend.timings`."""
        return self.device.timings()


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
            given |= self._backend.heads.lend(key).values  # on the device, in memory of their own
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


class HeadUploads:
    """Puts the weights of heads on the device; what all sets of heads share, the weights' own memory, once.

    Where a block keeps no head, one whose weights are all zero takes part: it adds nothing, and no engine has to take
    arrays without values.

    Args:
        device: where.
        head_width: channels of a head.
    """

    def __init__(self, device: Device, head_width: int) -> None:
        self._device = device
        one, three = head_width, 3 * head_width
        self._channels = {"qkv": three, "qkv_bias": three, "proj": one, "fc1": one, "heads": 1}
        self._shared: dict[int, DeviceArray] = {}

    def __call__(self, arrays: Arrays) -> Mapping[str, DeviceArray]:
        """The arrays on the device, by the same names."""
        return {name: self._of(self._with_a_head(name, array)) for name, array in arrays.items()}

    def _with_a_head(self, name: str, array: npt.NDArray[Any]) -> npt.NDArray[Any]:
        if array.size:
            return array
        return np.zeros([size or self._channels[name] for size in array.shape], array.dtype)

    def _of(self, array: npt.NDArray[Any]) -> DeviceArray:
        with self._device.lock:
            if not in_file(array):
                return self._uploaded(array)
            place = array.__array_interface__["data"][0]
            if place not in self._shared:
                self._shared[place] = self._uploaded(array)
            return self._shared[place]

    def _uploaded(self, array: npt.NDArray[Any]) -> DeviceArray:
        found = DeviceArray.empty(self._device, array.shape, array.dtype.name)
        self._device.upload(array, found.address)
        return found


def check_arrays(name: str, values: Sequence[Value], arrays: Mapping[str, DeviceArray]) -> None:
    """Raises BackendError where arrays are not such inputs or outputs of an engine; a size that varies takes any."""
    for value in values:
        array = arrays.get(value.name)
        sizes = zip(value.shape, array.shape, strict=False) if array else ()
        same = all(isinstance(size, str) or size == given for size, given in sizes)
        if array is None or array.dtype != value.dtype or len(array.shape) != len(value.shape) or not same:
            found = f"{array.dtype} {list(array.shape)}" if array else "nothing"
            wanted = f"{value.dtype} {list(value.shape)}"
            raise BackendError(f"engine {name}: {value.name} is {wanted}, and was given {found}")


def _close(device: Device, engines: list[DeviceEngine]) -> None:
    """Frees engines, then what they ran on."""
    with device.lock:
        device.synchronise()
        for engine in engines:
            engine.close()
        engines.clear()
        device.close()
