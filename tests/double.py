"""Bundles with engines that the doubles of CUDA and TensorRT run, where there are neither."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cases import read_config, write_config
from cuda_double import CAPABILITY, Gpu, cuda_double, driver_double, nvrtc_double
from trt_double import VERSION, trt_double

from adavit.bundle.bundle import Bundle
from adavit.bundle.engine_sets import source_of, this_platform
from adavit.bundle.graph_keys import graph_keys, read_graph
from adavit.bundle.graphs import Graphs
from adavit.files import sha256
from adavit.tensorrt.profiles import profiles_of

__all__ = [
    "CAPABILITY",
    "VERSION",
    "Gpu",
    "add_double_engines",
    "cuda_double",
    "described_engine",
    "driver_double",
    "nvrtc_double",
    "trt_double",
]


def add_double_engines(bundle: Path, flavour: str = "tensorrt", max_batch: int = 8, **changes: Any) -> Path:
    """Adds a set of engines that the double reads: their profiles, then the complete ONNX model."""
    graphs = Graphs(Bundle.open(bundle))
    folder = bundle / "tensorrt" / "double"
    folder.mkdir(parents=True, exist_ok=True)
    described = []
    for number, key in enumerate(graph_keys(graphs.files)):
        graph = read_graph(graphs, key)
        profiles = profiles_of(graph.inputs, key.block, graphs.architecture, None, max_batch)
        if key.name.endswith(".mlp"):  # cut in two, to see profiles change
            (whole,) = profiles
            profiles = [{**whole, "tokens": ((1,), (5,), (5,))}, whole]
        header = {"name": key.name, "profiles": profiles, "scratch": 1000 * number}
        data = json.dumps(header).encode() + b"\n" + graph.model(graph.arrays(graphs.tensors))
        (folder / f"{key.name}.engine").write_bytes(data)
        stored = {"file": f"tensorrt/double/{key.name}.engine", "bytes": len(data), "sha256": sha256(data)}
        described.append({**key.to_dict(), **stored, "source": source_of(graphs.files, key)})
    config = read_config(bundle)
    config.setdefault("engine_sets", {})["double"] = {
        "flavour": flavour, "version": VERSION, "platform": this_platform(), "compute_capabilities": [CAPABILITY],
        "hardware_compatible": False, "version_compatible": False, "stripped": False, "precision": graphs.precision,
        "engines": described, **changes,
    }  # fmt: skip
    write_config(bundle, config)
    return bundle


def described_engine(config: dict[str, Any], name: str) -> dict[str, Any]:
    """What `config.json` says of one of the double's engines, by the name of its file."""
    engines = config["engine_sets"]["double"]["engines"]
    return next(engine for engine in engines if Path(engine["file"]).name == f"{name}.engine")
