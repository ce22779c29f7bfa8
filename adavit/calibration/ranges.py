"""The ranges inside the engines: their recorded inputs are run through them in fp32, watched at every linear layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from adavit.calibration.fp16 import halved_nodes
from adavit.calibration.histogram import Histogram
from adavit.calibration.linear import linear_layers
from adavit.calibration.recording import Recorder, Sample, Seen
from adavit.runtime.backends.onnxruntime import import_onnxruntime
from adavit.bundle.bundle import Bundle

__all__ = ["Ranges", "measure_ranges"]

Progress = Callable[[str, float], None]


@dataclass
class Ranges:
    """What calibration measured.

    Attributes:
        images: that ran.
        seen: how often each engine was dispatched, and with how many tokens.
        histograms: of the inputs of every linear layer, by unit (a sub-layer, or "dense") and site.
        peaks: the largest magnitude in each unit of what fp16 would have to hold.
        statistics: what the policies kept, as `config.json` has it.
    """

    images: int
    seen: dict[str, Seen]
    histograms: dict[str, dict[str, Histogram]] = field(default_factory=dict)
    peaks: dict[str, float] = field(default_factory=dict)
    statistics: dict[str, Any] = field(default_factory=dict)

    def samples(self, unit: str) -> int:
        """How many samples reached a unit: both of a sub-layer's engines together."""
        if unit == "dense":
            return self.images
        return sum(self.seen[name].samples for name in (unit, f"{unit}_gather") if name in self.seen)


def measure_ranges(bundle: Bundle, recorder: Recorder, progress: Progress) -> Ranges:
    """Runs what a recorder kept through the engines of its fp32 bundle."""
    result = Ranges(recorder.images, dict(recorder.seen), statistics=recorder.statistics().to_dict())
    ort = import_onnxruntime()
    units = [name for name, reservoir in recorder.reservoirs.items() if reservoir.samples and name in bundle.engines]
    for done, unit in enumerate(units, 1):
        model = onnx.load_from_string(bundle.read(unit))
        if unit.endswith(".attention"):
            _add_norm(model, onnx.load_from_string(bundle.read(unit.replace("attention", "decide"))))
        watched = _Watched(model, ort)
        for sample in recorder.reservoirs[unit].samples:
            watched.run(sample)
        result.histograms[unit], result.peaks[unit] = watched.histograms, watched.peak
        progress("measuring ranges", done / len(units))
    return result


def _add_norm(model: onnx.ModelProto, decide: onnx.ModelProto) -> None:
    """Makes the attention engine compute norm1(x), as its block's `decide` does."""
    norm = next(node for node in decide.graph.node if node.output[0] == "normed")
    graph = model.graph
    graph.initializer.extend(value for value in decide.graph.initializer if value.name in norm.input)
    graph.node.insert(0, norm)
    graph.input.remove(next(value for value in graph.input if value.name == norm.output[0]))


class _Watched:
    """An engine whose inner values are outputs too."""

    def __init__(self, model: onnx.ModelProto, ort: ModuleType) -> None:
        self._sites = {layer.tensor: layer.site for layer in linear_layers(model)}
        halved = {name for node in halved_nodes(model) for name in node.output}
        self._names = sorted(halved | set(self._sites))
        found = {value.name for value in model.graph.output}
        model.graph.output.extend(
            helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in self._names if name not in found
        )
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.use_per_session_threads = False
        self._session = ort.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"], enable_fallback=0
        )
        self.histograms: dict[str, Histogram] = {site: Histogram() for site in self._sites.values()}
        self.peak = 0.0

    def run(self, sample: Sample) -> None:
        values: Mapping[str, Any] = dict(zip(self._names, self._session.run(self._names, sample), strict=True))
        self.peak = max(self.peak, *(float(np.abs(value).max()) for value in values.values()))
        for tensor, site in self._sites.items():
            self.histograms[site].add(values[tensor])
