"""The weights of heads, put on the device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from adavit.bundle.head_weights import Arrays
from adavit.runtime.backends.cuda.arrays import DeviceArray
from adavit.runtime.backends.cuda.device import Device
from adavit.runtime.head_cache import in_file

__all__ = ["HeadUploads"]


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
