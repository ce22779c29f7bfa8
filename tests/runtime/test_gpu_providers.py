"""ONNX Runtime's GPU providers: the CPU's in their place, on a device that puts copies off."""

import gc
import re
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest
from cases import (
    DENSE,
    assert_same_policy,
    forced,
    invoke,
    python,
    random_images,
    random_policy,
    refusal,
)
from double import Gpu, cuda_double

import adavit
from adavit.bundle.bundle import Bundle
from adavit.bundle.graphs import Graphs
from adavit.cli import run as run_command
from adavit.errors import BackendError
from adavit.model import AdaViT
from adavit.runtime import Result, Runtime
from adavit.runtime.backend import Options
from adavit.runtime.backends.cuda import bindings as cuda
from adavit.runtime.backends.onnxruntime import gpu as onnxruntime_gpu
from adavit.runtime.backends.onnxruntime.gpu import PLUGIN, OnnxRuntimeGpuBackend


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    device = Gpu()
    monkeypatch.setattr(cuda, "import_runtime", lambda: cuda_double(device))
    monkeypatch.setattr(onnxruntime_gpu, "DEVICE", "cpu")
    return device


def on_cpu(bundle: Path, **changes: Any) -> Runtime:
    """The GPU's backend, with the CPU's provider in the place of one for a GPU."""
    opened, options = Bundle.open(bundle), Options(2, "CPUExecutionProvider", **changes)
    graphs = Graphs(opened)
    return Runtime(opened, graphs, OnnxRuntimeGpuBackend(graphs, options), options)


@pytest.mark.parametrize("way", ["auto", "exact", "capacity"])
def test_what_is_bound_on_the_device_is_what_is_computed(
    roomy: Callable[..., Path], runtime: Runtime, gpu: Gpu, way: str
) -> None:
    on_gpu, arch = on_cpu(roomy(), dispatch=way), runtime.architecture
    for seed, batch in enumerate((3, 3, 1, 33, 3)):
        images = random_images(arch, batch, seed)
        assert_same(on_gpu.run(images), runtime.run(images))
        np.testing.assert_allclose(on_gpu.run_dense(images), runtime.run_dense(images), atol=1e-4)
    gpu.calls.clear()
    on_gpu.run(random_images(arch, 3))
    fetched = [detail[1] for call, detail in gpu.calls if call == "copy" and detail[0] == 2]
    if way != "auto":
        assert len(fetched) == 1 + arch.depth * (way == "exact")
    assert "launch" not in gpu.names(), "sessions are not recorded"
    del on_gpu
    gc.collect()
    assert not gpu.memory
    assert set(gpu.alive.values()) == {0}


def assert_same(found: Result, wanted: Result) -> None:
    assert_same_policy(found.policy, wanted.policy)
    np.testing.assert_allclose(found.logits, wanted.logits, atol=1e-4)


def test_from_several_threads(roomy: Callable[..., Path], runtime: Runtime, gpu: Gpu) -> None:
    """Sessions run on one stream, and lanes have memory of their own."""
    on_gpu = on_cpu(roomy(), dispatch="capacity")
    batches = [random_images(runtime.architecture, 1 + seed % 4, seed) for seed in range(16)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(on_gpu.run, batches))
    for result, images in zip(found, batches, strict=True):
        assert_same(result, runtime.run(images))


def test_conditions_are_for_other_backends(
    roomy: Callable[..., Path], runtime: Runtime, gpu: Gpu, caplog: pytest.LogCaptureFixture
) -> None:
    on_gpu, images = on_cpu(roomy(), dispatch="conditional"), random_images(runtime.architecture, 2)
    assert_same(on_gpu.run(images), runtime.run(images))
    assert re.search(r"no conditional dispatch \(ONNX Runtime's .*tensorrt-rtx\); capacity takes over", caplog.text)


def test_any_policy_is_replayed(tiny_bundle: Path, model: AdaViT, gpu: Gpu) -> None:
    on_gpu = on_cpu(tiny_bundle)
    for seed in range(6):  # also without any head
        images, policy = random_images(model.arch, 3, seed), random_policy(model.arch, 3, seed)
        np.testing.assert_allclose(on_gpu.run(images, policy).logits, forced(model, images, policy), atol=1e-4)


def test_a_model_without_policies(plain: tuple[Path, Path], gpu: Gpu) -> None:
    images = random_images(DENSE, 40)
    np.testing.assert_allclose(
        on_cpu(plain[0]).run(images).logits, adavit.load(plain[0], threads=1).run(images).logits, atol=1e-4
    )


SHARED = """
import sys
sys.path.insert(0, sys.argv[2])
import numpy as np
import onnxruntime
from double import Gpu, cuda_double
import adavit
from adavit.bundle.bundle import Bundle
from adavit.bundle.graphs import Graphs
from adavit.runtime.backend import Options
from adavit.runtime.backends.cuda import bindings as cuda
from adavit.runtime.backends.onnxruntime import gpu as onnxruntime_gpu
cuda.import_runtime = lambda: cuda_double(Gpu())
onnxruntime_gpu.DEVICE = "cpu"
opened = Bundle.open(sys.argv[1])
shared, before = sys.argv[3] == "shared", sys.argv[3] == "before"
if before:
    onnxruntime.set_global_thread_pool_sizes(2, 1)
options = Options(2, "CPUExecutionProvider", shared_pool=shared)
backend = onnxruntime_gpu.OnnxRuntimeGpuBackend(Graphs(opened), options)
side = opened.architecture.image_size
assert np.isfinite(backend.dense(np.zeros((1, 3, side, side), np.float32))).all()
from onnxruntime import InferenceSession
graphs = Graphs(opened)
graph = graphs.stem()
InferenceSession(graph.model(graph.arrays(graphs.tensors)))
print("made")
"""


@pytest.mark.parametrize(("pool", "others"), [("own", True), ("shared", False), ("before", False)])
def test_the_process_keeps_its_thread_pools_unless_they_are_asked_for(
    tiny_bundle: Path, pool: str, others: bool
) -> None:
    """Where somebody has set the process's pool, that is used."""
    done = python(SHARED, tiny_bundle, Path(__file__).parent.parent, pool)
    assert (done.stdout == "made\n") == others, done.stderr
    assert others or "global thread pool" in done.stderr


@pytest.mark.parametrize("provider", ["CUDAExecutionProvider", "TensorrtExecutionProvider"])
def test_a_provider_that_is_not_there(tiny_bundle: Path, provider: str) -> None:
    if provider in onnxruntime.get_available_providers():
        pytest.skip(f"{provider} is there")
    message = refusal(invoke(run_command, tiny_bundle, "--provider", provider))
    assert f"no provider '{provider}' here" in message
    assert "pip install 'adavit[gpu]' (in a clone: pip install '.[gpu]')" in message
    assert message.endswith(f"then give --provider {provider}\n")


def test_a_plugin_that_is_not_there_or_does_not_load(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime_ep_nv_tensorrt_rtx", None)
    with pytest.raises(BackendError, match="pip install onnxruntime-ep-nv-tensorrt-rtx"):
        adavit.load(tiny_bundle, provider=PLUGIN)
    plugin = ModuleType("onnxruntime_ep_nv_tensorrt_rtx")
    plugin.get_ep_name, plugin.get_library_path = lambda: PLUGIN, lambda: "/nowhere/libplugin.so"  # type: ignore
    monkeypatch.setitem(sys.modules, "onnxruntime_ep_nv_tensorrt_rtx", plugin)
    with pytest.raises(BackendError, match=f"{PLUGIN} does not load here: .*nowhere"):
        adavit.load(tiny_bundle, provider=PLUGIN)


def test_a_provider_that_gives_way_to_another(tiny_bundle: Path, gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    provider = "CUDAExecutionProvider"
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [provider, "CPUExecutionProvider"])
    session = SimpleNamespace(get_providers=lambda: ["CPUExecutionProvider"])
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda *_, **__: session)
    with pytest.raises(BackendError, match="graph stem would run on CPUExecutionProvider, not on CUDA"):
        adavit.load(tiny_bundle, provider=provider)
