"""What every use of NVIDIA Model Optimizer shares."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import onnx

from adavit.runtime.backends.onnxruntime import import_onnxruntime

__all__ = ["finished", "model_optimizer"]


@contextmanager
def model_optimizer() -> Iterator[None]:
    """Lets Model Optimizer work in this process: silent, and with ONNX Runtime sessions on the process's pool.

    ONNX Runtime refuses sessions with a pool of their own once a runtime has shared its threads, as the one that
    calibrates has. What matters of the many messages comes back as results or exceptions.
    """
    ort: Any = import_onnxruntime()
    own = ort.SessionOptions

    def shared() -> Any:
        options = own()
        options.use_per_session_threads = False
        return options

    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    ort.SessionOptions = shared
    try:
        yield
    finally:
        ort.SessionOptions = own
        logging.disable(disabled)


def finished(converted: onnx.ModelProto, source: onnx.ModelProto) -> onnx.ModelProto:
    """A converted engine, checked, and the same bytes whenever it is made from the same engine and ranges."""
    result = onnx.ModelProto()
    result.CopyFrom(source)
    result.graph.CopyFrom(converted.graph)
    graph = result.graph
    graph.name = source.graph.name
    used = {name for node in graph.node for name in node.input}
    weights = sorted((value for value in graph.initializer if value.name in used), key=lambda value: value.name)
    del graph.initializer[:], graph.value_info[:]
    graph.initializer.extend(weights)
    onnx.checker.check_model(result, full_check=True)
    return result
