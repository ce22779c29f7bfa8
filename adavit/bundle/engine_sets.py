"""TensorRT engines in a bundle: sets by flavour, version, platform, compute capability and precision, side by side.

A set is for the machine it was built for, and has an engine for every graph of one precision. Blocks may have a second
one, of the heads that images usually keep. What does not fit is found out here, before TensorRT sees a byte.
"""

from __future__ import annotations

import json
import platform
import re
import sys
import zlib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

from adavit.bundle.bundle import PRECISIONS, Bundle, GraphFiles
from adavit.bundle.graph_keys import GraphKey, stored_graph
from adavit.bundle.stored import StoredFile
from adavit.bundle.trust import built_here
from adavit.errors import BackendError, BundleError, shown
from adavit.files import sha256

__all__ = [
    "FLAVOURS",
    "MOST_BATCH",
    "EngineKey",
    "EngineSet",
    "Machine",
    "StoredEngine",
    "engine_sets",
    "find_engine_set",
    "numeric_version",
    "packed_engine",
    "read_engine",
    "read_engine_set",
    "source_of",
    "this_platform",
]

FLAVOURS = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
"""The flavours of TensorRT, and their Python packages."""

AMPERE = 80
"""The least compute capability that hardware-compatible engines run on."""

MOST_BATCH = 4096
"""The largest batch that engines may be built for."""

VERSION = re.compile(r"[0-9]{1,9}(?:\.[0-9]{1,9}){0,7}")
"""Part of a library's file name."""
PATTERNS = {
    "key": re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,199}"),
    "flavour": re.compile(r"[a-z][a-z0-9-]{0,31}"),
    "version": VERSION,
    "platform": re.compile(r"[a-z0-9_]{1,63}"),
    "sha256": re.compile(r"[0-9a-f]{64}"),
}
"""What the texts of a set may be."""


class EngineKey(NamedTuple):
    """An engine of a set.

    Attributes:
        graph: that it was built from.
        usual: it has the usual heads of its block alone, not all.
    """

    graph: GraphKey
    usual: bool = False

    @property
    def name(self) -> str:
        """For files, messages and reports."""
        return f"{self.graph.name}.usual" if self.usual else self.graph.name


@dataclass(frozen=True)
class StoredEngine(StoredFile):
    """A built engine, as `packed_engine` packs it.

    Attributes:
        unpacked_bytes: of the engine itself.
        source: tells what it was built from, see `source_of`.
        heads: the usual heads of its block, where it has these alone.
    """

    unpacked_bytes: int
    source: str
    heads: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Machine:
    """What runs engines: flavour and version of TensorRT, platform, and compute capability (86 is 8.6)."""

    flavour: str
    version: str
    platform: str
    compute_capability: int

    def __str__(self) -> str:
        return f"{self.flavour} {self.version} on {self.platform} with compute capability {self.compute_capability}"


@dataclass(frozen=True)
class EngineSet:
    """The engines of one build.

    Attributes:
        key: names the set in `config.json`.
        flavour: "tensorrt" or "tensorrt-rtx".
        version: of TensorRT.
        platform: such as "linux_x86_64".
        compute_capabilities: of the GPUs it is for; 86 is 8.6.
        hardware_compatible: runs on newer GPUs too.
        version_compatible: runs in newer versions of the same major version too.
        stripped: the weights are left out, to be put in from the bundle's.
        max_batch: images of a batch at most.
        precision: of the graphs.
        engines: by their keys.
    """

    key: str
    flavour: str
    version: str
    platform: str
    compute_capabilities: tuple[int, ...]
    hardware_compatible: bool
    version_compatible: bool
    stripped: bool
    max_batch: int
    precision: str
    engines: Mapping[EngineKey, StoredEngine]

    @property
    def fingerprint(self) -> str:
        """The hash of what would run: flavour, version, platform, precision, and every engine's own hash and heads."""
        engines = {key.name: [stored.sha256, stored.heads] for key, stored in self.engines.items()}
        kind = {name: getattr(self, name) for name in ("flavour", "version", "platform", "precision")}
        content = kind | {"engines": engines}
        return sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode())

    def usual(self, graph: GraphKey) -> EngineKey:
        """The engine of a graph that has the usual heads; that of all heads where there is no other."""
        key = EngineKey(graph, True)
        return key if key in self.engines else EngineKey(graph)

    def fits(self, machine: Machine) -> bool:
        """Whether these engines run there."""
        return (
            (self.flavour, self.platform) == (machine.flavour, machine.platform)
            and (
                machine.compute_capability in self.compute_capabilities
                or (self.hardware_compatible and machine.compute_capability >= AMPERE)
            )
            and (
                machine.version == self.version
                or (self.version_compatible and _is_newer(machine.version, self.version))
            )
        )

    def __str__(self) -> str:
        capabilities = ", ".join(map(str, self.compute_capabilities))
        newer = " or newer" if self.hardware_compatible else ""
        machine = f"{self.flavour} {self.version} on {self.platform} with compute capability {capabilities}{newer}"
        return f"{machine} in {self.precision}"


def this_platform() -> str:
    """This machine's operating system and processor, as engine sets name them."""
    return f"{sys.platform}_{platform.machine().lower()}"


def numeric_version(text: str) -> str:
    """The numbers and dots that a library's version begins with, by which engine sets are told apart."""
    found = VERSION.match(text)
    if found is None:
        raise BackendError(f"TensorRT has the version {text[:80]!r}: expected numbers and dots; install it again")
    return found[0]


def source_of(files: GraphFiles, key: GraphKey) -> str:
    """Tells what an engine is built from: a hash of the graph's hash and that of the weights."""
    return sha256(f"{stored_graph(files, key).sha256} {files.weights.sha256}".encode())


def find_engine_set(bundle: Bundle, machine: Machine, precision: str, trust_engines: bool = False) -> EngineSet:
    """The bundle's set for a machine: of those for its compute capability the last built, else one for newer GPUs.

    Args:
        bundle: where the sets are.
        machine: what is to run one.
        precision: of the graphs that are to run.
        trust_engines: take one that this user did not build on this machine, too.

    Raises:
        BundleError: the description of a set is damaged.
        BackendError: there is none, or none to trust; the message names both sides and the command that builds one.
    """
    sets = engine_sets(bundle)
    found = [engines for engines in sets if engines.precision == precision and engines.fits(machine)]
    trusted = [engines for engines in found if trust_engines or built_here(engines.fingerprint)]
    if trusted:
        return min(reversed(trusted), key=lambda engines: engines.hardware_compatible)
    command = f"adavit-export {bundle.path} --target {machine.flavour}"
    if machine.flavour == "tensorrt-rtx":
        capability = machine.compute_capability
        command = f"adavit-export {bundle.path} --target tensorrt-rtx --compute-capability {capability}"
    if found:
        raise BackendError(
            f"{bundle.path}: its engines {found[0].key} came with it and were not built by this user on this machine; "
            f"TensorRT engines are native code: if you trust who built them, give "
            f"`trust_engines=True`, else build them here, run: {command}"
        )
    there = "; ".join(str(engines) for engines in sets if engines.flavour == machine.flavour)
    raise BackendError(
        f"{bundle.path}: its engines are for {there or 'no ' + machine.flavour}, this machine is {machine} and runs "
        f"{precision}; run: {command}"
    )


def engine_sets(bundle: Bundle) -> list[EngineSet]:
    """All sets of a bundle; raises BundleError where their description is damaged."""
    try:
        described = bundle.config.get("engine_sets", {}).items()
        return [read_engine_set(key, values, bundle.architecture.heads) for key, values in described]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise BundleError(
            f"{bundle.path}/config.json: its engine_sets are damaged ({error}); remove the set that is, or export "
            "again, and build the engines again"
        ) from None


def packed_engine(engine: bytes) -> bytes:
    """An engine as it is stored: much of it is source code of kernels, which repeats itself."""
    return zlib.compress(engine, 1)


def read_engine(bundle: Bundle, stored: StoredEngine) -> bytes:
    """Reads an engine, checks it against its hash, and unpacks it; raises BundleError where it is damaged."""
    unpacker, found = zlib.decompressobj(), b""
    packed = bundle.read_stored(stored)
    with suppress(zlib.error):
        found = unpacker.decompress(packed, stored.unpacked_bytes + 1)  # one more finds the end
    if not unpacker.eof or len(found) != stored.unpacked_bytes:
        raise BundleError(f"{bundle.path}/{stored.file}: is no packed engine; build the engines again")
    return found


def read_engine_set(key: str, values: Mapping[str, Any], heads: int) -> EngineSet:
    """A set from its description in `config.json`.

    Args:
        key: of the set.
        values: the description.
        heads: of the model.

    Raises:
        ValueError, KeyError, TypeError, AttributeError: it describes no set of this model.
    """
    capabilities = values["compute_capabilities"]
    if not all(type(capability) is int and 0 < capability < 10_000 for capability in capabilities):
        raise ValueError(f"compute_capabilities is {str(capabilities)[:80]}")
    return EngineSet(
        _text("key", key),
        _text("flavour", values["flavour"]),
        _text("version", values["version"]),
        _text("platform", values["platform"]),
        tuple(capabilities),
        values["hardware_compatible"] is True,
        values["version_compatible"] is True,
        values["stripped"] is True,
        _max_batch(values["max_batch"]),
        _precision(values["precision"]),
        _engines(values["engines"], heads),
    )


def _precision(value: Any) -> str:
    if value not in PRECISIONS:
        raise ValueError(f"precision is {shown(value)}")
    return str(value)


def _engines(values: Any, heads: int) -> dict[EngineKey, StoredEngine]:
    if not isinstance(values, list):
        raise ValueError("engines is no list")
    found = {EngineKey(GraphKey.from_dict(engine), "heads" in engine): _stored(engine, heads) for engine in values}
    if len(found) != len(values):
        raise ValueError("two engines are of one graph")
    for graph, usual in found:
        if usual and EngineKey(GraphKey("block", graph.block)) not in found:
            raise ValueError(f"{graph.name} has an engine of some heads, and its block none of all")
    return found


def _max_batch(value: Any) -> int:
    if type(value) is not int or not 1 <= value <= MOST_BATCH:
        raise ValueError(f"max_batch is {shown(value)}")
    return value


def _stored(values: Mapping[str, Any], heads: int) -> StoredEngine:
    return StoredEngine(
        str(values["file"]),
        _bytes(values["bytes"]),
        _text("sha256", values["sha256"]),
        _bytes(values["unpacked_bytes"]),
        _text("sha256", values["source"]),
        _heads(values["heads"], heads) if "heads" in values else None,
    )


def _bytes(value: Any) -> int:
    if type(value) is not int or value <= 0:
        raise ValueError(f"an engine has {shown(value)} bytes")
    return value


def _heads(values: Any, heads: int) -> tuple[int, ...]:
    """The numbers of an engine's heads, ascending."""
    known = isinstance(values, list) and all(type(head) is int and 0 <= head < heads for head in values)
    if not known or not values or any(second <= first for first, second in pairwise(values)):
        raise ValueError(f"an engine has the heads {shown(values)}, of {heads}")
    return tuple(values)


def _text(kind: str, value: Any) -> str:
    """A text of a set, if it is what it may be: some become parts of files' names."""
    if not isinstance(value, str) or not PATTERNS[kind].fullmatch(value):
        raise ValueError(f"{kind} is {shown(value)}")
    return value


def _is_newer(version: str, than: str) -> bool:
    """Whether a version is newer than another of the same major version."""
    found, least = ([int(part) for part in text.split(".") if part.isdigit()] for text in (version, than))
    return found[:1] == least[:1] and found >= least
