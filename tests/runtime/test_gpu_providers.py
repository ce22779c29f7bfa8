"""ONNX Runtime's GPU providers: the CPU's in their place, on a device that puts copies off."""

import gc
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import onnxruntime
import pytest
from cases import assert_same_policy, invoke, random_images, refusal, rewrite_engine
from double import Gpu, cuda_double
from onnx import helper

import adavit
from adavit.cli import run as run_command
from adavit.errors import BackendError
from adavit.runtime import Runtime
from adavit.runtime.backend import Options
from adavit.runtime.backends import cuda, onnxruntime_gpu
from adavit.runtime.backends.onnxruntime_gpu import PLUGIN, OnnxRuntimeGpuBackend
from adavit.bundle.bundle import Bundle


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    device = Gpu()
    monkeypatch.setattr(cuda, "import_runtime", lambda: cuda_double(device))
    monkeypatch.setattr(onnxruntime_gpu, "DEVICE", "cpu")
    return device


def test_what_is_bound_on_the_device_is_what_is_computed(tiny_bundle: Path, runtime: Runtime, gpu: Gpu) -> None:
    bundle, options = Bundle.open(tiny_bundle), Options(1, "CPUExecutionProvider")
    on_gpu = Runtime(bundle, OnnxRuntimeGpuBackend(bundle, options), options)
    for seed in range(4):
        images = random_images(runtime.architecture, 3, seed)
        found, wanted = on_gpu.run(images), runtime.run(images)
        assert_same_policy(found.policy, wanted.policy)
        np.testing.assert_allclose(found.logits, wanted.logits, atol=1e-4)
        np.testing.assert_allclose(on_gpu.run_dense(images), runtime.run_dense(images), atol=1e-4)
    copies = [kind for call, kind in gpu.calls if call == "copy"]
    del on_gpu
    gc.collect()
    assert not gpu.memory
    assert set(gpu.alive.values()) == {0}
    arch = runtime.architecture
    assert sum(size for kind, size in copies if kind == 2) <= 4 * 4 * 3 * (
        arch.depth * (arch.tokens + arch.heads + 2) + 2 * arch.classes
    ), "only decisions and logits come back"


@pytest.mark.parametrize("provider", ["CUDAExecutionProvider", "TensorrtExecutionProvider"])
def test_a_provider_that_is_not_there(tiny_bundle: Path, provider: str) -> None:
    if provider in onnxruntime.get_available_providers():
        pytest.skip(f"{provider} is there")
    message = refusal(invoke(run_command, tiny_bundle, "--provider", provider))
    assert f"no provider '{provider}' here" in message
    assert "pip install 'adavit[gpu]' (in a clone: pip install '.[gpu]')" in message
    assert f"provider='{provider}' (adavit-run --provider {provider})" in message


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
    bundle, options = Bundle.open(tiny_bundle), Options(1, provider)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [provider, "CPUExecutionProvider"])
    session = SimpleNamespace(get_providers=lambda: ["CPUExecutionProvider"])
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda *_, **__: session)
    with pytest.raises(BackendError, match="engine stem would run on CPUExecutionProvider, not on CUDA"):
        OnnxRuntimeGpuBackend(bundle, options).load("stem")


def test_what_a_provider_compiled_is_not_run(bundle: Path, gpu: Gpu) -> None:
    """Native code in the shape of a graph: in a node of the graph, or of a graph inside."""
    node = helper.make_node("EPContext", ["a"], ["b"], domain="com.microsoft", embed_mode=1, ep_cache_context=b"code")
    inner = helper.make_node("If", ["c"], ["b"], then_branch=helper.make_graph([node], "inner", [], []))
    options = Options(1, "CPUExecutionProvider")
    for nodes in ([node], [inner]):
        model = helper.make_model(helper.make_graph(nodes, "graph", [], []))
        rewrite_engine(bundle, "stem", model.SerializeToString())
        with pytest.raises(BackendError, match=r"engine stem holds compiled code for a provider \(EPContext\)"):
            OnnxRuntimeGpuBackend(Bundle.open(bundle), options).load("stem")
