"""A bundle on disk: a folder of graphs and weights, described by `config.json`, checked before anything is used."""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from adavit.architecture import Architecture
from adavit.bundle.capacity import capacity_quantile
from adavit.bundle.demo import find_bundle
from adavit.bundle.keys import Sublayers, combinations
from adavit.bundle.operating_points import Budgets
from adavit.bundle.preprocessing import Preprocessor
from adavit.bundle.stored import StoredFile, check_file, map_stored, read_stored
from adavit.errors import BundleError, InputError, bounded, shown
from adavit.files import find_folder, sha256, write_beside
from adavit.macs import dense_macs, outside_macs
from adavit.reading import parse_json, path_of, read_regular

__all__ = [
    "DENSE",
    "LABELS",
    "MODEL_TYPE",
    "OPSETS",
    "PRECISIONS",
    "PREPROCESSING",
    "SCHEMA_VERSION",
    "STATISTICS",
    "WEIGHTS",
    "Bundle",
    "GraphFiles",
    "is_bundle",
    "write_config",
]

SCHEMA_VERSION = 3
MODEL_TYPE = "adavit"
CONFIG, LABELS, PREPROCESSING = "config.json", "labels.txt", "preprocessor_config.json"
"""The text files that the runtime reads of a bundle: what describes it, class names, and what images go through."""
STATISTICS = "statistics.npz"
"""What the policies kept on calibration images."""
WEIGHTS, STEM, DENSE = "model.safetensors", "stem.onnx", "dense.onnx"
"""In the folder of a precision: its weights, and the graphs beside those of the blocks."""
PRECISIONS = ("fp32", "fp16", "int8", "mixed")
OPSETS = range(17, 24)
"""Versions of the standard operators: LayerNormalization came with 17; 23 is the newest that every backend reads."""
LONGEST_NAME = 200
MAX_TEXT = 16 << 20
MAX_GRAPH = 4 << 20
"""Bytes of a graph, which holds no weights: a dense twin takes 6 KB a block."""
MAX_STATISTICS = 256 << 20
MAX_WEIGHTS = 64 << 30


@dataclass(frozen=True)
class GraphFiles:
    """The graphs of one precision, and the weights that they share.

    Attributes:
        precision: one of PRECISIONS.
        opset: version of the standard operators.
        weights: the safetensors file.
        stem: images to tokens; None in a model without policies.
        blocks: for each block, by the sub-layers that run.
        dense: the dense twin, if there is one.
        batch: the stem and the blocks for a batch of images, for devices; empty in a model without policies.
    """

    precision: str
    opset: int
    weights: StoredFile
    stem: StoredFile | None
    blocks: tuple[Mapping[Sublayers, StoredFile], ...]
    dense: StoredFile | None
    batch: tuple[StoredFile, ...] = ()

    def files(self) -> list[StoredFile]:
        """All of them."""
        graphs = [self.stem, *(file for block in self.blocks for file in block.values()), self.dense]
        return [self.weights, *(file for file in graphs if file), *self.batch]

    @property
    def bytes(self) -> int:
        """Of all files."""
        return sum(file.bytes for file in self.files())

    def to_dict(self) -> dict[str, Any]:
        """As `config.json` has it."""
        found: dict[str, Any] = {"opset": self.opset, "weights": vars(self.weights)}
        if self.stem:
            found["stem"] = vars(self.stem)
            found["blocks"] = [{key.name: vars(file) for key, file in block.items()} for block in self.blocks]
            found["batch"] = [vars(file) for file in self.batch]
        return found | ({"dense": vars(self.dense)} if self.dense else {})


@dataclass(frozen=True)
class Bundle:
    """A checked bundle.

    Attributes:
        path: the folder, absolute.
        architecture: the model's shapes.
        graphs: by precision, the default first.
        labels: one per class.
        preprocessor: what the model's images go through.
        budgets: its operating points, or None.
        statistics: the file of what the policies kept on calibration images, or None.
        capacity_quantile: share of random batches of these images that a capacity has room for.
        config: all of `config.json`.
    """

    path: Path
    architecture: Architecture
    graphs: Mapping[str, GraphFiles]
    labels: tuple[str, ...]
    preprocessor: Preprocessor
    budgets: Budgets | None
    statistics: StoredFile | None
    capacity_quantile: float
    config: Mapping[str, Any]

    @classmethod
    def open(cls, path: str | Path) -> Bundle:
        """Reads a bundle and checks its description, and that every file is there in its full size.

        Raises:
            BundleError: something is missing, altered, unsafe or of another schema version.
            InputError: `path` is no path.
        """
        folder = _folder(path)
        config = _object(folder / CONFIG, _config_text(folder))
        version = config.get("schema_version")
        if version != SCHEMA_VERSION or type(version) is not int:
            raise BundleError(
                f"{folder}: bundle schema version {shown(version)}, this adavit reads {SCHEMA_VERSION}; "
                "export the checkpoint again with this version"
            )
        try:
            arch = Architecture.from_dict(config.get("architecture"))
            graphs = {name: _graph_files(name, values, arch) for name, values in config["precisions"].items()}
            if not graphs or config["model_type"] != MODEL_TYPE:
                raise ValueError("it has no graphs, or another model_type")
            texts = {name: _text_file(name, config["files"][name]) for name in (LABELS, PREPROCESSING)}
            budgets = Budgets.from_dict(config["budgets"], arch.depth) if "budgets" in config else None
            statistics = _stored(STATISTICS, config["statistics"], MAX_STATISTICS) if "statistics" in config else None
            quantile = capacity_quantile(config)
            if config["macs"] != {"dense": dense_macs(arch), "outside_blocks": outside_macs(arch)}:
                raise ValueError(f"its MACs, {shown(config['macs'])}, are not those of its architecture")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise BundleError(f"{folder}/{CONFIG} is damaged ({error}); export again") from None
        labels = tuple(_decoded(folder / LABELS, read_stored(folder, texts[LABELS])).splitlines())
        if len(labels) != arch.classes:
            raise BundleError(f"{folder}/{LABELS} has {len(labels)} lines for {arch.classes} classes; export again")
        preprocessing = _decoded(folder / PREPROCESSING, read_stored(folder, texts[PREPROCESSING]))
        preprocessor = Preprocessor.from_dict(_object(folder / PREPROCESSING, preprocessing), arch.image_size)
        for file in [statistics, *(file for files in graphs.values() for file in files.files())]:
            if file:
                check_file(folder, file)
        return cls(folder, arch, graphs, labels, preprocessor, budgets, statistics, quantile, config)

    @cached_property
    def fingerprint(self) -> str:
        """Tells this bundle from others: the hash of its description, which has the hashes of its files."""
        return sha256(json.dumps(self.config, sort_keys=True).encode())

    @property
    def name(self) -> str:
        """The model's name, for people."""
        return bounded(str(self.config.get("name") or self.path.resolve().name), LONGEST_NAME)

    def files_of(self, precision: str | None = None) -> GraphFiles:
        """The graphs of a precision, by default the first; raises InputError where the bundle has none in it."""
        if precision is None:
            return next(iter(self.graphs.values()))
        if not isinstance(precision, str) or precision not in self.graphs:
            raise InputError(
                f"{self.path} is not in precision {shown(precision)}; it has {', '.join(self.graphs)}: choose one of "
                "them, or export it again with that `precision`"
            )
        return self.graphs[precision]

    def read_stored(self, stored: StoredFile) -> bytes:
        """The bytes of a file that the bundle describes, hashed before they are returned.

        Raises:
            BundleError: the file is not the one that is described.
        """
        return read_stored(self.path, stored)

    def map_stored(self, stored: StoredFile) -> bytes | mmap.mmap:
        """A large file that the bundle describes, mapped into memory after its bytes were hashed.

        The file is opened once. A file that is put in its place later is another one, and is not seen.

        Raises:
            BundleError: the file is not the one that is described.
        """
        return map_stored(self.path, stored)


def _folder(given: Any) -> Path:
    """Where a bundle is; raises InputError where what is given is no path, BundleError where no folder is there."""
    path = find_bundle(path_of(given, "bundle"))
    try:
        folder = find_folder(path)
        there = folder.is_dir()
        absolute = folder.absolute()  # the process may go elsewhere
    except OSError as error:
        raise BundleError(f"{path}: cannot be looked into ({error.strerror})") from None
    if not there:
        if os.path.lexists(folder):
            raise BundleError(f"{path}: is a file, and a bundle is a folder; make one of a checkpoint by adavit-export")
        raise BundleError(f"{path}: no such bundle folder; make one with adavit-export, or give 'demo'")
    return absolute


def _config_text(folder: Path) -> str:
    """What `config.json` holds, which describes everything else."""
    path = folder / CONFIG
    try:
        return _decoded(path, read_regular(path, MAX_TEXT))
    except FileNotFoundError:
        raise BundleError(f"{path}: missing; this is not a bundle, or not all of one") from None
    except OSError as error:
        raise BundleError(f"{path}: {error.strerror}; this is not a bundle's file") from None


def _decoded(path: Path, data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise BundleError(f"{path}: cannot be read as text; export again") from None


def write_config(folder: Path, config: Mapping[str, Any]) -> None:
    """Replaces what describes a bundle, its `config.json`."""
    with write_beside(folder / CONFIG) as file:
        file.write((json.dumps(config, indent=2) + "\n").encode())


def is_bundle(folder: Path) -> bool:
    """Whether a folder holds a bundle, of any version: other models have a config.json too."""
    try:
        return "schema_version" in _object(folder, _config_text(_folder(folder)))
    except (BundleError, InputError):
        return False


def _object(path: Path, text: str) -> dict[str, Any]:
    """The JSON object that a file holds."""
    try:
        value = parse_json(text)
    except ValueError:  # also for numbers of thousands of digits
        raise BundleError(f"{path}: not JSON; export again") from None
    if not isinstance(value, dict):
        raise BundleError(f"{path}: not a JSON object; export again")
    return value


def _text_file(name: str, spec: dict[str, Any]) -> StoredFile:
    return _stored(name, {**spec, "file": name}, MAX_TEXT)


def _graph_files(precision: str, values: dict[str, Any], arch: Architecture) -> GraphFiles:
    if precision not in PRECISIONS or type(values["opset"]) is not int or values["opset"] not in OPSETS:
        raise ValueError(f"it has a precision {shown(precision)}, or an unknown opset")
    weights = _stored("weights", values["weights"], MAX_WEIGHTS)
    stem = _stored("stem", values["stem"], MAX_GRAPH) if "stem" in values else None
    dense = _stored("dense", values["dense"], MAX_GRAPH) if "dense" in values else None
    blocks, batch = values.get("blocks", []), values.get("batch", [])
    counts = (arch.adapts, arch.depth * arch.adapts, (arch.depth + 1) * arch.adapts)
    if (stem is not None, len(blocks), len(batch)) != counts or not (stem or dense):
        raise ValueError(f"the graphs of {precision} are not those of its architecture")
    found = []
    for number, block in enumerate(blocks):
        wanted = {key.name: key for key in combinations(arch, number)}
        if set(block) != set(wanted):
            raise ValueError(f"block {number} has graphs for {shown(sorted(block))}")
        found.append({key: _stored(name, block[name], MAX_GRAPH) for name, key in wanted.items()})
    batches = tuple(_stored("batch", file, MAX_GRAPH) for file in batch)
    files = GraphFiles(precision, values["opset"], weights, stem, tuple(found), dense, batches)
    paths = {PurePosixPath(file.file) for file in files.files()}
    if len(paths) != len(files.files()) or {path.parent for path in paths} != {PurePosixPath(precision)}:
        raise ValueError(f"its graphs and weights of {precision} are not each a file in that folder")
    return files


def _stored(name: str, values: dict[str, Any], most: int) -> StoredFile:
    file, size, digest = values["file"], values["bytes"], values["sha256"]
    texts = isinstance(file, str) and isinstance(digest, str)
    if type(size) is not int or not 0 < size <= most or not texts:
        raise ValueError(f"{name} has no file, no hash, or a size of {shown(size)}")
    return StoredFile(file, size, digest)
