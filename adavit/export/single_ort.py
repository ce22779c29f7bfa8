"""A single file in ONNX Runtime's own format, for its small builds on phones."""

from __future__ import annotations

import tempfile
from pathlib import Path

import onnxruntime as ort

from adavit.errors import BackendError, one_line

__all__ = ["ort_bytes"]

NAME = "model.ort"


def ort_bytes(data: bytes) -> bytes:
    """The same model in the .ort format, optimised only in ways that run on every CPU.

    Raises:
        BackendError: ONNX Runtime cannot write it.
    """
    with tempfile.TemporaryDirectory(prefix="adavit-") as scratch:
        path = Path(scratch) / NAME
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        options.optimized_model_filepath = str(path)
        options.add_session_config_entry("session.save_model_format", "ORT")
        unwanted = ["ConstantFolding"]  # it would store fp16 weights as fp32
        try:
            ort.InferenceSession(data, options, providers=["CPUExecutionProvider"], disabled_optimizers=unwanted)
        except Exception as error:  # of onnxruntime's own classes, which it does not export
            raise BackendError(
                f"{scratch}: ONNX Runtime cannot write the .ort form here first ({one_line(error)}); free some space, "
                "or set TMPDIR to another folder"
            ) from None
        return path.read_bytes()
