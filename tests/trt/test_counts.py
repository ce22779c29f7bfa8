"""How much each way to drive a batch asks of a device."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from cases import random_images
from double import Gpu
from driving import FLAVOURS, counted, on_device, ran

from adavit.runtime import Runtime


def test_exact_waits_once_a_block(roomy: Callable[..., Path], runtime: Runtime, gpu: Gpu) -> None:
    on_gpu, depth = on_device(roomy(), "exact"), runtime.architecture.depth
    for batch in range(1, 33):
        images = random_images(runtime.architecture, batch, batch)
        on_gpu.run(images)
        found = counted(gpu, lambda: on_gpu.run(images))  # noqa: B023
        assert found["run"] == depth + 1
        assert found["synchronise"] == found["fetch"] == depth + 1
        assert found["upload"] == 1
        assert found["shape"] == found["address"] == found["profile"] == found["launch"] == 0
        other = random_images(runtime.architecture, batch, 100 + batch)
        counted(gpu, lambda: on_gpu.run(other))  # noqa: B023
        shapes = Counter(detail[0] for call, detail in gpu.calls if call == "shape")
        assert all(count <= 4 for count in shapes.values())
        assert not {"address", "profile"} & set(gpu.names())


@FLAVOURS
@pytest.mark.parametrize(("way", "engines"), [("capacity", 1), ("conditional", 3)])
def test_others_launch_once_and_wait_once(
    roomy: Callable[..., Path], runtime: Runtime, gpu: Gpu, way: str, engines: int, flavour: str
) -> None:
    """The graph is recorded when a size comes the third time: its runs are the graph's."""
    on_gpu, depth = on_device(roomy(flavour), way, flavour), runtime.architecture.depth
    for batch in range(1, 33) if flavour == "tensorrt" else (1, 7, 32):
        images = random_images(runtime.architecture, batch, batch)
        for _ in range(2):
            warm = counted(gpu, lambda: on_gpu.run(images))  # noqa: B023
            assert (warm["run"], warm["launch"]) == (engines * depth + 1, 0)
        recorded = counted(gpu, lambda: on_gpu.run(images))  # noqa: B023
        assert (recorded["run"], recorded["launch"], recorded["synchronise"]) == (engines * depth + 1, 1, 1)
        assert (recorded["upload"], recorded["fetch"]) == (1, 1)
        other = random_images(runtime.architecture, batch, 100 + batch)
        found = counted(gpu, lambda: on_gpu.run(other))  # noqa: B023
        assert found == {"launch": 1, "synchronise": 1}, "nothing is set, run or copied by itself"
    assert all(not batch.overflowed for batch in ran(on_gpu))
