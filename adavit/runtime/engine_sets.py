"""TensorRT engines in a bundle: sets by flavour, version, platform and compute capability, side by side.

A set is for the machine it was built for. What does not fit is found out here, before TensorRT sees a byte.
"""

from __future__ import annotations

import platform
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from adavit.errors import BackendError, BundleError
from adavit.runtime.bundle import Bundle

__all__ = ["FLAVOURS", "EngineSet", "Machine", "StoredEngine", "find_engine_set", "this_platform"]

FLAVOURS = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
"""The flavours of TensorRT, and their Python packages."""

AMPERE = 80
"""The least compute capability that hardware-compatible engines run on."""


@dataclass(frozen=True)
class StoredEngine:
    """A built engine.

    Attributes:
        file: path inside the bundle.
        bytes: the file's size.
        sha256: the file's hash.
        source: the hash of the ONNX file it was built from.
    """

    file: str
    bytes: int
    sha256: str
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
        stripped: the weights are left out, to be put in from the ONNX files.
        engines: by name.
    """

    key: str
    flavour: str
    version: str
    platform: str
    compute_capabilities: tuple[int, ...]
    hardware_compatible: bool
    version_compatible: bool
    stripped: bool
    engines: Mapping[str, StoredEngine]

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
        return f"{self.flavour} {self.version} on {self.platform} with compute capability {capabilities}{newer}"


def this_platform() -> str:
    """This machine's operating system and processor, as engine sets name them."""
    return f"{sys.platform}_{platform.machine().lower()}"


def find_engine_set(bundle: Bundle, machine: Machine) -> EngineSet:
    """The bundle's set for a machine; one made for exactly its compute capability first.

    Raises:
        BundleError: the description of a set is damaged.
        BackendError: there is none; the message names both sides and the command that builds one.
    """
    sets = engine_sets(bundle)
    found = [engines for engines in sets if engines.fits(machine)]
    if found:
        return min(found, key=lambda engines: engines.hardware_compatible)
    there = "; ".join(str(engines) for engines in sets if engines.flavour == machine.flavour)
    command = f"adavit-export {bundle.path} --target {machine.flavour}"
    if machine.flavour == "tensorrt-rtx":
        command += f" --compute-capability {machine.compute_capability}"
    raise BackendError(
        f"{bundle.path}: its engines are for {there or 'no ' + machine.flavour}, this machine is {machine}; "
        f"run: {command}"
    )


def engine_sets(bundle: Bundle) -> list[EngineSet]:
    """All sets of a bundle; raises BundleError where their description is damaged."""
    try:
        return [_engine_set(key, values) for key, values in bundle.config.get("engine_sets", {}).items()]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise BundleError(
            f"{bundle.path}/config.json: its engine_sets are damaged ({error}); build the engines again"
        ) from None


def _engine_set(key: str, values: Mapping[str, Any]) -> EngineSet:
    engines = {
        name: StoredEngine(str(v["file"]), int(v["bytes"]), str(v["sha256"]), str(v["source"]))
        for name, v in values["engines"].items()
    }
    return EngineSet(
        key,
        str(values["flavour"]),
        str(values["version"]),
        str(values["platform"]),
        tuple(int(capability) for capability in values["compute_capabilities"]),
        values["hardware_compatible"] is True,
        values["version_compatible"] is True,
        values["stripped"] is True,
        engines,
    )


def _is_newer(version: str, than: str) -> bool:
    """Whether a version is newer than another of the same major version."""
    found, least = ([int(part) for part in text.split(".") if part.isdigit()] for text in (version, than))
    return found[:1] == least[:1] and found >= least
