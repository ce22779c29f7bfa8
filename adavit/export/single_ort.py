"""A single file in ONNX Runtime's own format, for its small builds on phones."""

from __future__ import annotations

import tempfile
from pathlib import Path

import onnxruntime as ort

__all__ = ["ort_bytes"]


def ort_bytes(data: bytes) -> bytes:
    """The same model in the .ort format, optimised only in ways that run on every CPU."""
    with tempfile.TemporaryDirectory(prefix="adavit-") as scratch:
        path = Path(scratch) / "model.ort"
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        options.optimized_model_filepath = str(path)
        options.add_session_config_entry("session.save_model_format", "ORT")
        # Folding would store fp16 weights as fp32.
        ort.InferenceSession(data, options, providers=["CPUExecutionProvider"], disabled_optimizers=["ConstantFolding"])
        return path.read_bytes()
