"""ONNX Runtime's providers for NVIDIA GPUs; activations stay on the device, bound where they are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from types import ModuleType
from typing import Any

import numpy as np

from adavit.errors import BackendError, install_hint, one_line
from adavit.runtime.backend import Backend, Options
from adavit.runtime.backends.cuda import Cuda
from adavit.runtime.backends.device import Device
from adavit.runtime.backends.device_moves import DeviceMoves, Uploads
from adavit.runtime.backends.onnxruntime import (
    OnnxRuntimeBackend,
    asked_for,
    import_onnxruntime,
    require_provider,
    share_pool,
)
from adavit.bundle.bundle import Bundle, EngineSpec

__all__ = ["PROVIDERS", "OnnxRuntimeGpuBackend", "create"]

PLUGIN = "NvTensorRTRTXExecutionProvider"
"""TensorRT-RTX, from a package of its own that is registered with ONNX Runtime."""
ON_STREAM = ("CUDAExecutionProvider", "TensorrtExecutionProvider")
"""Providers that enqueue on a stream they are given; the plugin has its own, and is waited for."""
PROVIDERS = (*ON_STREAM, PLUGIN)
NATIVE = b"EPContext"
"""The operator whose node holds what a provider compiled, native code; no bundle of ours has one."""
DEVICE = "cuda"
"""ONNX Runtime's name of the memory."""


def create(bundle: Bundle, options: Options) -> Backend:
    """ONNX Runtime on what the provider is for: a GPU or the CPU."""
    kind: Callable[[Bundle, Options], Any] = (
        OnnxRuntimeGpuBackend if options.provider in PROVIDERS else OnnxRuntimeBackend
    )
    made: Backend = kind(bundle, options)
    return made


class OnnxRuntimeGpuBackend(DeviceMoves):
    """Runs a bundle's graphs in ONNX Runtime on a GPU.

    Args:
        bundle: where the graphs are.
        options: the provider, one of PROVIDERS, and threads for what a provider leaves to the CPU.

    Raises:
        BackendError: ONNX Runtime lacks the provider, or there is no GPU.
    """

    name = "onnxruntime"

    def __init__(self, bundle: Bundle, options: Options) -> None:
        self._bundle = bundle
        self._ort = import_onnxruntime()
        self._provider = str(options.provider)
        self._plugins = _plugin_devices(self._ort) if self._provider == PLUGIN else []
        if not self._plugins and self._provider not in (available := self._ort.get_available_providers()):
            raise BackendError(
                f"ONNX Runtime has no provider {self._provider!r} here; it has {', '.join(available)}; "
                f"for a GPU run: pip uninstall -y onnxruntime && {install_hint('gpu')}; "
                f"then give {asked_for(self._provider)}"
            )
        super().__init__(Device(Cuda()))
        share_pool(self._ort, options.threads)

    def load(self, name: str, alone: bool = False) -> OnnxRuntimeGpuEngine:
        """Creates a session; see `Backend.load`."""
        data, spec = self._bundle.read(name), self._bundle.engine(name)
        if NATIVE in data:
            raise BackendError(
                f"engine {name} holds compiled code for a provider ({NATIVE.decode()}), which is not run; export again"
            )
        options = self._ort.SessionOptions()
        options.log_severity_level = 3
        options.use_per_session_threads = False
        on_stream = self._provider in ON_STREAM
        try:
            if self._plugins:
                options.add_provider_for_devices(self._plugins, {})
                session = self._ort.InferenceSession(data, options)
            else:
                settings = {"user_compute_stream": str(int(self._device.stream))} if on_stream else {}
                providers = [(self._provider, settings)]
                session = self._ort.InferenceSession(data, options, providers=providers, enable_fallback=0)
        except Exception as error:
            raise BackendError(f"ONNX Runtime refuses engine {spec.name}: {one_line(error)}") from None
        require_provider(session, spec, self._provider)
        engine = OnnxRuntimeGpuEngine(self._ort, self._device, session, spec, on_stream)
        self._engines.append(engine)
        return engine

    def versions(self) -> dict[str, str]:
        """ONNX Runtime's version and the provider in use."""
        return {"onnxruntime": self._ort.__version__, "provider": self._provider}


class OnnxRuntimeGpuEngine:
    """One session, bound to memory on the device."""

    def __init__(self, ort: ModuleType, device: Device, session: Any, spec: EngineSpec, on_stream: bool) -> None:
        self._device = device
        self._session = session
        self.spec = spec
        self._on_stream = on_stream
        self._uploads = Uploads(device)
        self._options = ort.RunOptions()
        if on_stream:
            self._options.add_run_config_entry("disable_synchronize_execution_providers", "1")

    def close(self) -> None:
        """Frees the session."""
        self._session = None

    def run(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
        """See `Engine.run`."""
        with self._device.lock, self._device.enqueuing():
            tensors = self._uploads.tensors(self.spec, inputs, outputs)
            binding = self._session.io_binding()
            for position, (tensor, rows) in enumerate(tensors):
                bind = binding.bind_input if position < len(inputs) else binding.bind_output
                bind(tensor.name, DEVICE, 0, np.dtype(tensor.dtype), list(rows.shape), rows.address)
            if not self._on_stream:
                self._device.synchronise()
            try:
                self._session.run_with_iobinding(binding, self._options)
            except Exception as error:
                raise BackendError(f"engine {self.spec.name} failed: {one_line(error)}") from error


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
