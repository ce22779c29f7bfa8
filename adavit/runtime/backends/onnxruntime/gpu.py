"""ONNX Runtime's providers for NVIDIA GPUs; activations stay on the device, bound where they are."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from importlib import import_module
from types import ModuleType
from typing import Any

import numpy as np

from adavit.bundle.graph_keys import GraphKey, constants_of, read_graph
from adavit.bundle.graphs import Graphs
from adavit.bundle.onnx_graph import OnnxGraph
from adavit.errors import BackendError, install_hint, one_line
from adavit.runtime.backend import Options
from adavit.runtime.backends.cuda.backend import DeviceBackend
from adavit.runtime.backends.cuda.bindings import Cuda
from adavit.runtime.backends.cuda.captures import Captures
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
MOST_IMAGES = 32
"""Of a run."""
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
        cuda = Cuda()
        self._stream = int(cuda.call("cudaStreamCreateWithFlags", cuda.runtime.cudaStreamNonBlocking))
        why = "ONNX Runtime's sessions cannot be recorded; that is for the backends tensorrt and tensorrt-rtx"
        super().__init__(graphs, cuda, Captures(cuda, why, why), MOST_IMAGES)
        self.at_close.append(partial(cuda.call, "cudaStreamDestroy", self._stream))
        self._shares_pool = options.shared_pool
        if self._shares_pool:
            share_pool(self._ort, options.threads)
        self.open_engines()

    def stream(self) -> tuple[int, bool]:
        """See `DeviceBackend`: that of all sessions."""
        return self._stream, False

    def open(self, key: GraphKey, every_head: bool) -> OnnxRuntimeGpuEngine:
        """See `DeviceBackend.open`: a session whose weights are constants."""
        graph = read_graph(self.graphs, key)
        constants = constants_of(self.graphs, key, graph)
        try:
            session = self._session(graph.model(constants))
        except Exception as error:
            raise BackendError(f"ONNX Runtime refuses graph {key.name}: {one_line(error)}") from None
        require_provider(session, key.name, self._provider)
        on_stream = self._provider in ON_STREAM
        return OnnxRuntimeGpuEngine(self._ort, self.cuda, session, key.name, graph.without(constants), on_stream)

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
        settings = {"user_compute_stream": str(self._stream)} if on_stream else {}
        return self._ort.InferenceSession(model, options, providers=[(self._provider, settings)], enable_fallback=0)


class OnnxRuntimeGpuEngine:
    """A session; see `DeviceEngine`.

    Args:
        ort: the bindings.
        cuda: the CUDA runtime.
        session: of the graph.
        name: for messages.
        graph: what is computed, without what is constant.
        on_stream: whether the session runs on the lanes' stream; else all that was enqueued is waited for.
    """

    most_images = MOST_IMAGES

    def __init__(self, ort: ModuleType, cuda: Cuda, session: Any, name: str, graph: OnnxGraph, on_stream: bool) -> None:
        self.graph, self.session, self.name = graph, session, name
        self.cuda, self.on_stream = cuda, on_stream
        self.options = ort.RunOptions()
        if on_stream:
            self.options.add_run_config_entry("disable_synchronize_execution_providers", "1")

    def scratch(self, batch: int) -> int:
        """See `DeviceEngine`: ONNX Runtime has memory of its own."""
        return 0

    def runner(self, scratch: int, size: int) -> OnnxRuntimeGpuRunner:
        """See `DeviceEngine`."""
        return OnnxRuntimeGpuRunner(self)

    def close(self) -> None:
        """See `DeviceEngine`."""
        self.session = None


class OnnxRuntimeGpuRunner:
    """A session, bound to a lane's memory; see `Runner`.

    Args:
        engine: the session's.
    """

    def __init__(self, engine: OnnxRuntimeGpuEngine) -> None:
        self._engine = engine
        self._binding = engine.session.io_binding()
        self._inputs = [value.name for value in engine.graph.inputs]
        self._addresses: Mapping[str, int] = {}
        self._types = {value.name: np.dtype(value.dtype) for value in (*engine.graph.inputs, *engine.graph.outputs)}

    def bind(self, addresses: Mapping[str, int], shapes: Mapping[str, tuple[int, ...]]) -> None:
        """See `Runner`."""
        self._addresses = addresses
        for name, address in addresses.items():
            bind = self._binding.bind_input if name in self._inputs else self._binding.bind_output
            bind(name, DEVICE, 0, self._types[name], list(shapes[name]), address)

    def run(self, room: Mapping[str, int], stream: int) -> None:
        """See `Runner`."""
        engine = self._engine
        for name, size in room.items():
            if name in self._addresses:
                self._binding.bind_input(name, DEVICE, 0, self._types[name], [size], self._addresses[name])
        if not engine.on_stream:
            engine.cuda.call("cudaStreamSynchronize", stream)
        try:
            engine.session.run_with_iobinding(self._binding, engine.options)
        except Exception as error:
            raise BackendError(f"graph {engine.name} failed: {one_line(error)}") from error

    def captures(self) -> bool:
        """See `Runner`: sessions allocate memory and synchronise as they like."""
        return False

    def close(self) -> None:
        """See `Runner`."""
        self._binding = None


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
