"""Drives the double of a device, some way, and sees what was asked of it."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cases import assert_same_policy
from double import Gpu

import adavit
from adavit.runtime import Result, Runtime
from adavit.runtime.batch import WAYS
from adavit.runtime.batch_dispatcher import Ran

FLAVOURS = pytest.mark.parametrize("flavour", ["tensorrt", "tensorrt-rtx"])
WAY = pytest.mark.parametrize("way", WAYS)


def on_device(bundle: Path, way: str, flavour: str = "tensorrt", **options: Any) -> Runtime:
    return adavit.load(bundle, flavour, trust_engines=True, dispatch=way, **options)


def assert_same(found: Result, wanted: Result) -> None:
    assert_same_policy(found.policy, wanted.policy)
    np.testing.assert_allclose(found.logits, wanted.logits, atol=1e-4)


def ran(runtime: Runtime) -> list[Ran]:
    """How the batches went since this was last asked."""
    dispatcher: Any = runtime.dispatcher
    found = list(dispatcher.ran)
    dispatcher.ran.clear()
    return found


def assert_all_freed(gpu: Gpu) -> None:
    gc.collect()
    assert not gpu.memory
    assert set(gpu.alive.values()) == {0}


def counted(gpu: Gpu, run: Callable[[], object]) -> Counter[str]:
    """What a call asks of the device: calls by name, "upload" and "fetch" among them."""
    gpu.calls.clear()
    run()
    found = Counter(gpu.names())
    ways = {1: "upload", 2: "fetch", 3: "move"}
    found.update(ways[detail[0]] for call, detail in gpu.calls if call == "copy")
    return found
