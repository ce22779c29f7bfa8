"""Bundles with engines that the doubles of CUDA and TensorRT run, where there are neither."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from cases import read_config, write_config
from cuda_double import CAPABILITY, Gpu, cuda_double, driver_double, nvrtc_double
from trt_double import VERSION, trt_double

from adavit.bundle.bundle import Bundle
from adavit.bundle.engine_set import EngineKey, this_platform
from adavit.bundle.engine_sets import packed_engine, source_of
from adavit.bundle.graph_keys import constants_of, graph_keys, part_keys, read_graph
from adavit.bundle.graphs import Graphs
from adavit.bundle.policy import Policy
from adavit.bundle.statistics import write_statistics
from adavit.files import sha256
from adavit.runtime.backends.cuda import bindings
from adavit.runtime.backends.tensorrt import backend
from adavit.tensorrt.profiles import profiles_of

__all__ = [
    "CAPABILITY",
    "VERSION",
    "Gpu",
    "add_double_engines",
    "add_statistics",
    "cuda_double",
    "described_engine",
    "driver_double",
    "install",
    "nvrtc_double",
    "trt_double",
]


def install(patch: pytest.MonkeyPatch) -> Gpu:
    """A double of CUDA and TensorRT in their place."""
    gpu = Gpu()
    patch.setattr(bindings, "import_runtime", lambda: cuda_double(gpu))
    patch.setattr(bindings, "import_driver", lambda: driver_double(gpu))
    patch.setattr(bindings, "import_nvrtc", lambda: nvrtc_double(gpu))
    patch.setattr(backend, "import_tensorrt", lambda flavour: trt_double(gpu, flavour))
    return gpu


def add_statistics(bundle: Path, *policies: Policy, **changes: Any) -> Path:
    """Adds what calibration images kept at each operating point; `changes` are of `config.json`."""
    config = read_config(bundle) | changes
    write_config(bundle, config | {"statistics": vars(write_statistics(bundle, policies))})
    return bundle


def add_double_engines(
    bundle: Path,
    flavour: str = "tensorrt",
    max_batch: int = 8,
    usual: Sequence[tuple[int, ...]] | None = None,
    parts: bool = True,
    **changes: Any,
) -> Path:
    """Adds a set of engines that the double reads: their profiles, then the complete ONNX model.

    Args:
        bundle: the folder.
        flavour: of TensorRT.
        max_batch: images of a batch at most.
        usual: for each block, the heads that its usual engine has.
        parts: whether there are engines of parts of blocks.
        changes: of the set's description.
    """
    graphs = Graphs(Bundle.open(bundle))
    folder = bundle / "tensorrt" / "double"
    folder.mkdir(parents=True, exist_ok=True)
    described = []
    keys = [EngineKey(key) for key in graph_keys(graphs.files) + part_keys(graphs.files) * parts]
    keys += [EngineKey(key.graph, True) for key in keys if usual and key.graph.block is not None]
    for number, key in enumerate(keys):
        graph, heads = read_graph(graphs, key.graph), usual[key.graph.block or 0] if usual and key.usual else None
        constants = constants_of(graphs, key.graph, graph, heads)
        profiles = profiles_of(graph.without(constants).inputs, key.graph.block, graphs.architecture, max_batch)
        header = {"name": key.name, "profiles": profiles, "scratch": 1000 * number}
        data = json.dumps(header).encode() + b"\n" + graph.model(constants)
        packed, file = packed_engine(data), f"tensorrt/double/{key.name}.engine"
        (bundle / file).write_bytes(packed)
        stored = {"file": file, "bytes": len(packed), "unpacked_bytes": len(data), "sha256": sha256(packed)}
        about = {**key.graph.to_dict(), **stored, "source": source_of(graphs.files, key.graph)}
        described.append(about | ({"heads": list(heads)} if heads is not None else {}))
    config = read_config(bundle)
    config.setdefault("engine_sets", {})["double"] = {
        "flavour": flavour, "version": VERSION, "platform": this_platform(), "compute_capabilities": [CAPABILITY],
        "hardware_compatible": False, "version_compatible": False, "stripped": False, "max_batch": max_batch,
        "precision": graphs.precision, "engines": described, **changes,
    }  # fmt: skip
    write_config(bundle, config)
    return bundle


def described_engine(config: dict[str, Any], name: str) -> dict[str, Any]:
    """What `config.json` says of one of the double's engines, by the name of its file."""
    engines = config["engine_sets"]["double"]["engines"]
    return next(engine for engine in engines if Path(engine["file"]).name == f"{name}.engine")
