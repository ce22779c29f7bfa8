"""ONNX Runtime's GPU providers: the CPU's in their place, on a device that puts copies off."""

import gc
import sys
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
from adavit.runtime import Runtime
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


@pytest.mark.parametrize("parallel", ["operators", "samples"])
def test_what_is_bound_on_the_device_is_what_is_computed(
    tiny_bundle: Path, runtime: Runtime, gpu: Gpu, parallel: str
) -> None:
    on_gpu = on_cpu(tiny_bundle, parallel=parallel)
    for seed in range(4):
        images = random_images(runtime.architecture, 3, seed)
        found, wanted = on_gpu.run(images), runtime.run(images)
        assert_same_policy(found.policy, wanted.policy)
        np.testing.assert_allclose(found.logits, wanted.logits, atol=1e-4)
        np.testing.assert_allclose(on_gpu.run_dense(images), runtime.run_dense(images), atol=1e-4)
    copies = [detail for call, detail in gpu.calls if call == "copy"]
    arch = runtime.architecture
    block = sum(4 * on_gpu.graphs.decisions(number) for number in range(arch.depth))
    del on_gpu
    gc.collect()
    assert not gpu.memory
    assert set(gpu.alive.values()) == {0}
    fetched = sum(size for kind, size in copies if kind == 2)
    assert fetched == 4 * 3 * (block + 2 * 4 * arch.classes), "only decisions and logits come back"


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
