"""A bundle on disk: a folder of engines, described by `config.json`, checked before anything is used."""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from adavit.architecture import Architecture
from adavit.errors import BundleError, InputError, shown
from adavit.files import find_folder, sha256, write_beside
from adavit.macs import dense_macs, outside_macs
from adavit.reading import path_of, read_regular
from adavit.runtime.budget import Budgets
from adavit.runtime.demo import find_bundle
from adavit.runtime.images import Preprocessor

__all__ = [
    "LABELS",
    "PREPROCESSING",
    "SCHEMA_VERSION",
    "Bundle",
    "EngineSpec",
    "TensorSpec",
    "is_bundle",
    "write_config",
]

SCHEMA_VERSION = 2
CONFIG, LABELS, PREPROCESSING = "config.json", "labels.txt", "preprocessor_config.json"
"""The text files that the runtime reads of a bundle: what describes it, class names, and what images go through."""
MAX_TEXT = 16 << 20
MAX_ENGINE = (2 << 30) - 1  # A protobuf message cannot be larger.
ENGINE_NAME = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*")
DTYPES = ("float32", "float16", "bfloat16", "int64", "int32", "int8", "bool")


@dataclass(frozen=True)
class TensorSpec:
    """An engine's input or output; a dimension is a size, or a name where it varies."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    def of_heads(self, heads: int, head_width: int) -> tuple[int, ...]:
        """The shape for so many heads, "h", with their channels "c", or "c+2" with two rows of a bias."""
        channels = heads * head_width
        sizes = {"h": heads, "c": channels, "c+2": channels + 2}
        return tuple(sizes[size] if isinstance(size, str) else size for size in self.shape)


class Stored(Protocol):
    """A file of a bundle: its path inside, with forward slashes, its size and its hash."""

    @property
    def file(self) -> str: ...

    @property
    def bytes(self) -> int: ...

    @property
    def sha256(self) -> str: ...


@dataclass(frozen=True)
class TextFile:
    """A text file of a bundle; see `Stored`."""

    file: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class EngineSpec:
    """One ONNX file of a bundle.

    Attributes:
        name: the engine's name, such as "stem" or "blocks.3.attention".
        file: path inside the bundle, with forward slashes.
        inputs, outputs: its tensors, in order.
        bytes: the file's size.
        sha256: the file's hash.
    """

    name: str
    file: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    bytes: int
    sha256: str

    @property
    def wants_constants(self) -> bool:
        """Whether it is for runtimes that make the weights handed to it constants; others have no use for it."""
        return self.name.endswith("_set")

    def without(self, names: Collection[str]) -> EngineSpec:
        """The engine without the inputs of these names."""
        return replace(self, inputs=tuple(tensor for tensor in self.inputs if tensor.name not in names))


@dataclass(frozen=True)
class Bundle:
    """A checked bundle.

    Attributes:
        path: the folder, absolute.
        architecture: the model's shapes.
        engines: by name.
        labels: one per class.
        preprocessor: what the model's images go through.
        budgets: its operating points, or None.
        config: all of `config.json`.
    """

    path: Path
    architecture: Architecture
    engines: Mapping[str, EngineSpec]
    labels: tuple[str, ...]
    preprocessor: Preprocessor
    budgets: Budgets | None
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
                "export again with this version, or install the one that made it"
            )
        try:
            arch = Architecture.from_dict(config.get("architecture"))
            engines = {name: _engine(name, spec) for name, spec in config["engines"].items()}
            texts = {name: _text_file(name, config["files"][name]) for name in (LABELS, PREPROCESSING)}
            budgets = Budgets.from_dict(config["budgets"], arch.depth) if "budgets" in config else None
            if config["macs"] != {"dense": dense_macs(arch), "outside_blocks": outside_macs(arch)}:
                raise ValueError(f"its MACs, {shown(config['macs'])}, are not those of its architecture")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise BundleError(f"{folder}/{CONFIG} is damaged ({error}); export again") from None
        labels = tuple(_decoded(folder / LABELS, read_stored(folder, texts[LABELS])).splitlines())
        if len(labels) != arch.classes:
            raise BundleError(f"{folder}/{LABELS} has {len(labels)} lines for {arch.classes} classes; export again")
        preprocessing = _decoded(folder / PREPROCESSING, read_stored(folder, texts[PREPROCESSING]))
        preprocessor = Preprocessor.from_dict(_object(folder / PREPROCESSING, preprocessing), arch.image_size)
        for engine in engines.values():
            _check_file(folder, engine)
        return cls(folder, arch, engines, labels, preprocessor, budgets, config)

    @cached_property
    def fingerprint(self) -> str:
        """Tells this bundle from others: the hash of its description, which has the hashes of its files."""
        return sha256(json.dumps(self.config, sort_keys=True).encode())

    @property
    def name(self) -> str:
        """The model's name, for people."""
        return str(self.config.get("name") or self.path.resolve().name)

    @property
    def has_twin(self) -> bool:
        """Whether there is a dense twin to compare with; a model without policies is its own."""
        return self.architecture.adapts and "dense" in self.engines

    def read(self, name: str) -> bytes:
        """The bytes of an engine, hashed before they are returned.

        Raises:
            BundleError: there is no such engine, or its file is not the one that was exported.
        """
        return self.read_stored(self.engine(name))

    def engine(self, name: str) -> EngineSpec:
        """The description of an engine; raises BundleError where there is no such engine."""
        if name not in self.engines:
            hint = "; export again" + (", without --no-dense" if name == "dense" else "")
            raise BundleError(f"{self.path}: has no engine {name!r}{hint}")
        return self.engines[name]

    def read_stored(self, stored: Stored) -> bytes:
        """The bytes of a file that the bundle describes, hashed before they are returned.

        Raises:
            BundleError: the file is not the one that is described.
        """
        return read_stored(self.path, stored)


def read_stored(folder: Path, stored: Stored) -> bytes:
    """The bytes of a described file in a folder: opened once, read whole, and hashed; see `Bundle.read_stored`."""
    path = _check_file(folder, stored)
    try:
        data = read_regular(path, stored.bytes)
    except OSError as error:
        raise BundleError(f"{folder}/{stored.file}: cannot be read ({error.strerror})") from None
    if len(data) != stored.bytes or sha256(data) != stored.sha256:
        raise BundleError(
            f"{folder}/{stored.file}: altered since export (SHA-256 differs); copy the bundle or export again"
        )
    return data


def _check_file(folder: Path, stored: Stored) -> Path:
    """A described file's path, which stays inside, after a look at what is there and its size.

    A symbolic link is as good as a file: what is used are the bytes that have the right hash.
    """
    file = PurePosixPath(stored.file)
    if (
        file.is_absolute()
        or ".." in file.parts
        or not file.parts
        or not stored.file.isprintable()
        or any(c in stored.file for c in "\\:")
    ):
        raise BundleError(f"{folder}: the path {stored.file[:80]!r} leaves the bundle; do not use this bundle")
    path = folder / file
    try:
        found = os.stat(path)
    except (OSError, ValueError):  # ValueError where it cannot be encoded
        raise BundleError(f"{folder}/{stored.file}: missing; copy the bundle whole or export again") from None
    if not stat.S_ISREG(found.st_mode):
        raise BundleError(f"{folder}/{stored.file}: is not a regular file")
    if found.st_size != stored.bytes:
        raise BundleError(
            f"{folder}/{stored.file}: {found.st_size} bytes instead of {stored.bytes}; copy the bundle or export again"
        )
    return path


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
        return {"schema_version", "engines"} <= _object(folder, _config_text(_folder(folder))).keys()
    except (BundleError, InputError):
        return False


def _object(path: Path, text: str) -> dict[str, Any]:
    """The JSON object that a file holds."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):  # ValueError also for numbers of thousands of digits
        raise BundleError(f"{path}: not JSON; export again") from None
    if not isinstance(value, dict):
        raise BundleError(f"{path}: not a JSON object; export again")
    return value


def _text_file(name: str, spec: dict[str, Any]) -> TextFile:
    size, digest = spec["bytes"], spec["sha256"]
    if type(size) is not int or not 0 < size <= MAX_TEXT or not isinstance(digest, str):
        raise ValueError(f"{name} has no size up to {MAX_TEXT >> 20} MiB or no hash")
    return TextFile(name, size, digest)


def _engine(name: str, spec: dict[str, Any]) -> EngineSpec:
    if not ENGINE_NAME.fullmatch(name):  # files are named after it
        raise ValueError(f"an engine is named {name[:80]!r}")
    size = spec["bytes"]
    if type(size) is not int or not 0 < size <= MAX_ENGINE:
        raise ValueError(f"engine {name} is said to have {shown(size)} bytes")
    if not isinstance(spec["file"], str) or not isinstance(spec["sha256"], str):
        raise ValueError(f"engine {name} has no file or hash")
    inputs, outputs = (tuple(_tensor(t) for t in spec[key]) for key in ("inputs", "outputs"))
    return EngineSpec(name, spec["file"], inputs, outputs, size, spec["sha256"])


def _tensor(spec: dict[str, Any]) -> TensorSpec:
    shape = tuple(spec["shape"])
    for size in shape:
        if not (isinstance(size, str) or (type(size) is int and 0 <= size <= 1 << 31)):
            raise ValueError(f"tensor {shown(spec['name'])} has a dimension {shown(size)}")
    if spec["dtype"] not in DTYPES:
        raise ValueError(f"tensor {shown(spec['name'])} has the type {shown(spec['dtype'])}")
    return TensorSpec(str(spec["name"]), spec["dtype"], shape)
