"""The ranges inside the sub-layers: recorded tokens run through the fp32 graphs, whose linear layers are recorded."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper

from adavit.bundle.graphs import Graphs
from adavit.bundle.keys import Sublayers
from adavit.bundle.onnx_graph import OnnxGraph
from adavit.calibration.fp16 import halved_values
from adavit.calibration.histogram import Histogram
from adavit.calibration.linear import Linear, Sublayer, sublayers_of
from adavit.calibration.recording import DispatchCount, Recorder, Sample
from adavit.runtime.backends.onnxruntime.process import import_onnxruntime

__all__ = ["DENSE", "Ranges", "measure_ranges"]

DENSE = "dense"
"""The dense twin, among the histograms."""

Arrays = Mapping[str, npt.NDArray[Any]]
Progress = Callable[[str, float], None]


@dataclass
class Ranges:
    """What calibration measured.

    Attributes:
        images: that ran.
        seen: how many of them reached each sub-layer, and with how many tokens; by its name.
        histograms: of what each linear layer reads, by sub-layer and site; of the dense twin under DENSE.
        peaks: the largest magnitude in each sub-layer of what fp16 would have to hold, the dense twin's included.
    """

    images: int
    seen: dict[str, DispatchCount]
    histograms: dict[str, dict[str, Histogram]] = field(default_factory=dict)
    peaks: dict[str, float] = field(default_factory=dict)


def measure_ranges(graphs: Graphs, recorder: Recorder, progress: Progress) -> Ranges:
    """Runs what a recorder kept through a bundle's fp32 graphs."""
    found = Ranges(recorder.images, {sublayer.name: seen for sublayer, seen in recorder.seen.items()})
    sessions: Sessions = {}
    for done, (sublayer, reservoir) in enumerate(recorder.reservoirs.items()):
        progress("measuring ranges", done / (len(recorder.reservoirs) + 1))
        if reservoir.samples:
            histograms = found.histograms[sublayer.name] = _histograms([sublayer])
            found.peaks[sublayer.name] = _largest_weight(graphs, sublayer)
            _measure_sublayer(graphs, sublayer, reservoir.samples, Measurements(histograms, found.peaks, sessions))
    if graphs.files.dense is not None:
        histograms = found.histograms[DENSE] = _histograms(sublayers_of(graphs.architecture))
        _measure_dense(graphs, recorder.whole.samples, Measurements(histograms, found.peaks, {}))
    progress("measuring ranges", 1.0)
    return found


def _histograms(sublayers: Sequence[Sublayer]) -> dict[str, Histogram]:
    """New ones, for the linear layers of sub-layers."""
    return {linear.site: Histogram() for sublayer in sublayers for linear in sublayer.linears()}


def _largest_weight(graphs: Graphs, sublayer: Sublayer) -> float:
    """The largest magnitude of the weights and biases of a sub-layer's linear layers."""
    tensors = graphs.tensors
    names = [name for name in sublayer.tensors("weight", "bias") if name in tensors.tensors]
    return max(float(np.abs(tensors.array(name)).max()) for name in names)


def _measure_sublayer(
    graphs: Graphs, sublayer: Sublayer, samples: Sequence[Sample], measurements: Measurements
) -> None:
    """Runs what a sub-layer was dispatched with through the graphs of its block."""
    arch = graphs.architecture
    values = {linear.read: (sublayer, linear) for linear in sublayer.linears()}
    by_graph: dict[Sublayers, tuple[RecordingGraph, Arrays]] = {}
    for key, rows in samples:
        if key.sublayers not in by_graph:
            graph = graphs.block(key.block, key.sublayers)
            by_graph[key.sublayers] = RecordingGraph(graph, values, measurements), graph.arrays(graphs.tensors)
        recording, weights = by_graph[key.sublayers]
        x = np.zeros((arch.tokens, arch.width), np.float32)
        x[: len(rows)] = rows
        kept = {"tokens": np.arange(len(rows))} if arch.token_policy else {}
        recording.run({"x": x, **kept, **weights, **graphs.head_weights(key)})


def _measure_dense(graphs: Graphs, images: Sequence[npt.NDArray[np.float32]], measurements: Measurements) -> None:
    """Runs whole images [3, S, S] through the dense twin."""
    values = {
        f"blocks.{sublayer.block}.{linear.read}": (sublayer, linear)
        for sublayer in sublayers_of(graphs.architecture)
        for linear in sublayer.linears()
    }
    graph = graphs.dense()
    recording, weights = RecordingGraph(graph, values, measurements), graph.arrays(graphs.tensors)
    for image in images:
        recording.run({"images": image[None], **weights})


Sessions = dict[tuple[bytes, tuple[str, ...]], Any]


@dataclass
class Measurements:
    """What is measured of runs.

    Attributes:
        histograms: of what linear layers read, by site.
        peaks: the largest magnitude that fp16 would have to hold, by sub-layer's name.
        sessions: by model and recorded values: weights are inputs, so that blocks share them.
    """

    histograms: dict[str, Histogram]
    peaks: dict[str, float]
    sessions: Sessions


class RecordingGraph:
    """A graph whose intermediate values are outputs too.

    Args:
        graph: it.
        values: what linear layers read, by the name of the value.
        measurements: is told what a run shows.
    """

    def __init__(
        self, graph: OnnxGraph, values: Mapping[str, tuple[Sublayer, Linear]], measurements: Measurements
    ) -> None:
        self._sites = {name: linear.site for name, (_, linear) in values.items()}
        first = {name: sublayer for name, (sublayer, linear) in values.items() if linear == sublayer.linears()[0]}
        self._halved = halved_values(graph, first)
        self._names = tuple(sorted(self._halved))
        self._measurements = measurements
        key = graph.model({}), self._names
        if key not in measurements.sessions:
            measurements.sessions[key] = _session(*key)
        self._session = measurements.sessions[key]

    def run(self, given: Arrays) -> None:
        """Runs the graph on its inputs and weights."""
        for name, value in zip(self._names, self._session.run(self._names, given), strict=True):
            if name in self._sites:
                self._measurements.histograms[self._sites[name]].add(value)
            sublayer = self._halved[name].name
            peak = float(np.abs(value).max(initial=0))
            self._measurements.peaks[sublayer] = max(self._measurements.peaks.get(sublayer, 0.0), peak)


def _session(data: bytes, names: Sequence[str]) -> Any:
    """A session whose outputs are some values of a model."""
    ort: Any = import_onnxruntime()
    model = onnx.load_from_string(data)
    del model.graph.output[:]
    model.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names)
    changed = model.SerializeToString()

    def make(own_threads: bool) -> Any:
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.use_per_session_threads = own_threads
        options.add_session_config_entry("session.force_spinning_stop", "1")
        return ort.InferenceSession(changed, options, providers=["CPUExecutionProvider"], enable_fallback=0)

    try:
        return make(own_threads=True)
    except Exception as error:
        if "global thread pool" not in str(error):
            raise
        return make(own_threads=False)  # the process has set ONNX Runtime's own
