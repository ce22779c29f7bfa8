"""TensorRT engines of one build: what they are for, and on which machines they run."""

from __future__ import annotations

import json
import platform
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from adavit.bundle.graph_keys import GraphKey
from adavit.bundle.stored import StoredFile
from adavit.errors import BackendError
from adavit.files import sha256

__all__ = [
    "FLAVOURS",
    "MOST_BATCH",
    "VERSION",
    "EngineKey",
    "EngineSet",
    "Machine",
    "StoredEngine",
    "numeric_version",
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


def _is_newer(version: str, than: str) -> bool:
    """Whether a version is newer than another of the same major version."""
    found, least = ([int(part) for part in text.split(".") if part.isdigit()] for text in (version, than))
    return found[:1] == least[:1] and found >= least
