"""Arrays on a device, and what runs on them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from adavit.bundle.onnx_format import Value
from adavit.bundle.onnx_graph import OnnxGraph
from adavit.errors import BackendError
from adavit.runtime.backends.cuda.device import Allocation, Device, size_of

__all__ = ["DeviceArray", "DeviceEngine", "check_arrays"]


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
        return cls(device.memory.acquire(size_of(shape, dtype)), shape, dtype)

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
