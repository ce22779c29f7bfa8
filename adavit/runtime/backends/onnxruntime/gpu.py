"""ONNX Runtime's providers for NVIDIA GPUs; activations stay on the device, bound where they are."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from types import ModuleType
from typing import Any

import numpy as np

from adavit.bundle.graph_keys import GraphKey, read_graph
from adavit.bundle.graphs import Graphs
from adavit.bundle.onnx_graph import OnnxGraph
from adavit.errors import BackendError, install_hint, one_line
from adavit.runtime.backend import Options
from adavit.runtime.backends.cuda.arrays import DeviceArray, check_arrays
from adavit.runtime.backends.cuda.backend import DeviceBackend
from adavit.runtime.backends.cuda.bindings import Cuda
from adavit.runtime.backends.cuda.device import Device
from adavit.runtime.backends.onnxruntime.process import (
    GPU_PROVIDERS,
    asked_for,
    import_onnxruntime,
    require_provider,
    share_pool,
)

__all__ = ["PLUGIN", "OnnxRuntimeGpuBackend"]

PLUGIN = GPU_PROVIDERS[-1]
"""TensorRT-RTX, from a package of its own that is registered with ONNX Runtime."""
ON_STREAM = GPU_PROVIDERS[:-1]
"""Providers that enqueue on a stream they are given; the plugin has its own, and is waited for."""
DEVICE = "cuda"
"""ONNX Runtime's name of the memory."""


class OnnxRuntimeGpuBackend(DeviceBackend):
    """Runs a bundle's graphs in ONNX Runtime on a GPU.

    Args:
        graphs: what to run.
        options: the provider, one of GPU_PROVIDERS, and whether to share ONNX Runtime's pool of the process. Without,
            what a provider leaves to the CPU runs on the caller's thread.

    Raises:
        BackendError: ONNX Runtime lacks the provider, or there is no GPU.
    """

    name = "onnxruntime"

    def __init__(self, graphs: Graphs, options: Options) -> None:
        self._ort = import_onnxruntime()
        self._provider = str(options.provider)
        self._plugins = _plugin_devices(self._ort) if self._provider == PLUGIN else []
        if not self._plugins and self._provider not in (available := self._ort.get_available_providers()):
            raise BackendError(
                f"ONNX Runtime has no provider {self._provider!r} here; it has {', '.join(available)}; "
                f"for a GPU run: pip uninstall -y onnxruntime && {install_hint('gpu')}; "
                f"then give {asked_for(self._provider)}"
            )
        super().__init__(graphs, Device(Cuda()))
        self._shares_pool = options.shared_pool
        if self._shares_pool:
            share_pool(self._ort, options.threads)
        self.open_engines()

    def _open(self, key: GraphKey) -> OnnxRuntimeGpuEngine:
        """See `DeviceBackend._open`: a session whose weights, but those of heads, are constants."""
        graph = read_graph(self.graphs, key)
        model = graph.model(graph.arrays(self.graphs.tensors))
        try:
            session = self._session(model)
        except Exception as error:
            raise BackendError(f"ONNX Runtime refuses graph {key.name}: {one_line(error)}") from None
        require_provider(session, key.name, self._provider)
        return OnnxRuntimeGpuEngine(self._ort, self.device, session, key.name, graph, self._provider in ON_STREAM)

    def versions(self) -> dict[str, str]:
        """ONNX Runtime's version and the provider in use."""
        return {"onnxruntime": self._ort.__version__, "provider": self._provider}

    def _session(self, model: bytes) -> Any:
        """A session of one thread, or on the process's pool where that is set."""
        try:
            return self._session_on(model)
        except Exception as error:
            if self._shares_pool or "global thread pool" not in str(error):
                raise
            self._shares_pool = True
            return self._session_on(model)

    def _session_on(self, model: bytes) -> Any:
        options = self._ort.SessionOptions()
        options.log_severity_level = 3
        if self._shares_pool:
            options.use_per_session_threads = False
        else:
            options.intra_op_num_threads = 1
        if self._plugins:
            options.add_provider_for_devices(self._plugins, {})
            return self._ort.InferenceSession(model, options)
        on_stream = self._provider in ON_STREAM
        settings = {"user_compute_stream": str(int(self.device.stream))} if on_stream else {}
        return self._ort.InferenceSession(model, options, providers=[(self._provider, settings)], enable_fallback=0)


class OnnxRuntimeGpuEngine:
    """A session, bound to memory on the device.

    Args:
        ort: the bindings.
        device: where the memory is.
        session: of the graph.
        name: for messages.
        graph: what is computed.
        on_stream: whether the session runs on the device's stream; else all that was enqueued is waited for.
    """

    most_images = 32

    def __init__(
        self, ort: ModuleType, device: Device, session: Any, name: str, graph: OnnxGraph, on_stream: bool
    ) -> None:
        self.graph = graph
        self._device, self._session, self._name, self._on_stream = device, session, name, on_stream
        self._options = ort.RunOptions()
        if on_stream:
            self._options.add_run_config_entry("disable_synchronize_execution_providers", "1")

    def close(self) -> None:
        """Frees the session."""
        self._session = None

    def run(self, arrays: Mapping[str, DeviceArray]) -> None:
        """See `DeviceEngine.run`."""
        check_arrays(self._name, (*self.graph.inputs, *self.graph.outputs), arrays)
        with self._device.lock, self._device.enqueuing():
            binding = self._session.io_binding()
            binds = [(binding.bind_input, value.name) for value in self.graph.inputs]
            binds += [(binding.bind_output, value.name) for value in self.graph.outputs]
            for bind, name in binds:
                array = arrays[name]
                bind(name, DEVICE, 0, np.dtype(array.dtype), list(array.shape), array.address)
            if not self._on_stream:
                self._device.synchronise()
            try:
                self._session.run_with_iobinding(binding, self._options)
            except Exception as error:
                raise BackendError(f"graph {self._name} failed: {one_line(error)}") from error


def _plugin_devices(ort: ModuleType) -> list[Any]:
    """The GPUs that the TensorRT-RTX plugin finds.

    Raises:
        BackendError: it is not installed, or finds none.
    """
    try:
        plugin = import_module("onnxruntime_ep_nv_tensorrt_rtx")
        name = plugin.get_ep_name()
        if not any(device.ep_name == name for device in ort.get_ep_devices()):
            ort.register_execution_provider_library(name, plugin.get_library_path())
        devices = [device for device in ort.get_ep_devices() if device.ep_name == name]
    except ImportError:
        raise BackendError(f"{PLUGIN} is not installed; run: pip install onnxruntime-ep-nv-tensorrt-rtx") from None
    except Exception as error:
        raise BackendError(f"{PLUGIN} does not load here: {one_line(error)}") from None
    if not devices:
        raise BackendError(f"{PLUGIN} finds no NVIDIA GPU here")
    return devices
