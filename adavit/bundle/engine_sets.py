"""TensorRT engines in a bundle: sets by flavour, version, platform, compute capability and precision, side by side.

A set is for the machine it was built for, and has an engine for every graph of one precision. What does not fit is
found out here, before TensorRT sees a byte.
"""

from __future__ import annotations

import json
import platform
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from adavit.bundle.bundle import PRECISIONS, Bundle, GraphFiles
from adavit.bundle.graph_keys import GraphKey, stored_graph
from adavit.bundle.stored import StoredFile
from adavit.bundle.trust import built_here
from adavit.errors import BackendError, BundleError, shown
from adavit.files import sha256

__all__ = [
    "FLAVOURS",
    "EngineSet",
    "Machine",
    "StoredEngine",
    "engine_sets",
    "find_engine_set",
    "numeric_version",
    "read_engine_set",
    "source_of",
    "this_platform",
]

FLAVOURS = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
"""The flavours of TensorRT, and their Python packages."""

AMPERE = 80
"""The least compute capability that hardware-compatible engines run on."""

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


@dataclass(frozen=True)
class StoredEngine(StoredFile):
    """A built engine.

    Attributes:
        source: tells what it was built from, see `source_of`.
    """

    source: str


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
        precision: of the graphs.
        engines: by the graph.
    """

    key: str
    flavour: str
    version: str
    platform: str
    compute_capabilities: tuple[int, ...]
    hardware_compatible: bool
    version_compatible: bool
    stripped: bool
    precision: str
    engines: Mapping[GraphKey, StoredEngine]

    @property
    def fingerprint(self) -> str:
        """The hash of what would run: flavour, version, platform, precision and every engine's own hash."""
        engines = {key.name: stored.sha256 for key, stored in self.engines.items()}
        kind = {name: getattr(self, name) for name in ("flavour", "version", "platform", "precision")}
        content = kind | {"engines": engines}
        return sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode())

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
    """The bundle's set for a machine; one made for exactly its compute capability first.

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
        return min(trusted, key=lambda engines: engines.hardware_compatible)
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
        return [read_engine_set(key, values) for key, values in bundle.config.get("engine_sets", {}).items()]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise BundleError(
            f"{bundle.path}/config.json: its engine_sets are damaged ({error}); remove the set that is, or export "
            "again, and build the engines again"
        ) from None


def read_engine_set(key: str, values: Mapping[str, Any]) -> EngineSet:
    """A set from its description in `config.json`; raises ValueError, KeyError, TypeError or AttributeError."""
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
        _precision(values["precision"]),
        _engines(values["engines"]),
    )


def _precision(value: Any) -> str:
    if value not in PRECISIONS:
        raise ValueError(f"precision is {shown(value)}")
    return str(value)


def _engines(values: Any) -> dict[GraphKey, StoredEngine]:
    if not isinstance(values, list):
        raise ValueError("engines is no list")
    found = {GraphKey.from_dict(engine): _stored(engine) for engine in values}
    if len(found) != len(values):
        raise ValueError("two engines are of one graph")
    return found


def _stored(values: Mapping[str, Any]) -> StoredEngine:
    size = values["bytes"]
    if type(size) is not int or size <= 0:
        raise ValueError(f"an engine has {shown(size)} bytes")
    return StoredEngine(str(values["file"]), size, _text("sha256", values["sha256"]), _text("sha256", values["source"]))


def _text(kind: str, value: Any) -> str:
    """A text of a set, if it is what it may be: some become parts of files' names."""
    if not isinstance(value, str) or not PATTERNS[kind].fullmatch(value):
        raise ValueError(f"{kind} is {shown(value)}")
    return value


def _is_newer(version: str, than: str) -> bool:
    """Whether a version is newer than another of the same major version."""
    found, least = ([int(part) for part in text.split(".") if part.isdigit()] for text in (version, than))
    return found[:1] == least[:1] and found >= least
