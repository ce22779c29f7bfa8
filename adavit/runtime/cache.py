"""What was noted on this machine, kept in the user's cache folder: $XDG_CACHE_HOME/adavit or ~/.cache/adavit."""

from __future__ import annotations

import json
import logging
import os
import platform
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from fnmatch import fnmatch
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from adavit.bundle.bundle import Bundle
from adavit.errors import bounded, one_line
from adavit.files import sha256, write_beside
from adavit.reading import open_regular
from adavit.runtime.backend import Options
from adavit.user_folder import user_folder
from adavit.version import __version__

__all__ = ["cpu_name", "facts", "kept_any", "kept_at", "recall", "remember"]

log = logging.getLogger(__name__)

EXECUTORS = (
    "onnxruntime", "onnxruntime-gpu", "openvino", "tensorrt", "tensorrt-cu12", "tensorrt-cu13", "tensorrt-rtx",
    "tensorrt-rtx-cu12", "tensorrt-rtx-cu13",
)  # fmt: skip
"""The packages whose versions a measurement depends on."""
MAX_FILE = 1 << 20


def cpu_name() -> str:
    """The CPU's name, for people and to tell machines apart."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or "unknown"


def facts(bundle: Bundle, options: Options) -> dict[str, Any]:
    """Everything that a measurement depends on: bundle, machine, versions, threads and other options."""
    how = asdict(options)
    del how["trust_engines"]  # which says what may run, not how
    del how["shared_pool"]  # which changes little
    return {
        "adavit": __version__,
        "bundle": bundle.fingerprint,
        "cpu": cpu_name(),
        "cpus": os.cpu_count(),
        "machine": platform.machine(),
        "options": how,
        "versions": _versions(),
    }


def _versions() -> dict[str, str]:
    """Those of the packages that are installed."""
    found = {}
    for name in EXECUTORS:
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def _folder() -> Path | None:
    """The cache folder; None where there is no home."""
    return user_folder("XDG_CACHE_HOME", ".cache")


def kept_any(kind: str) -> bool:
    """Whether there is any measurement of a kind: cheaper to ask than for one that fits."""
    folder = _folder()
    try:
        return folder is not None and any(fnmatch(name, f"{kind}-*.json") for name in os.listdir(folder))
    except FileNotFoundError:
        return False
    except (OSError, ValueError) as error:
        _warn_unreadable(folder, getattr(error, "strerror", None) or str(error))
        return False


def kept_at(kind: str, known: Mapping[str, Any]) -> Path | None:
    """Where a measurement of some kind belongs, which depends on these facts; None where there is no home."""
    folder = _folder()
    return folder and folder / f"{kind}-{sha256(json.dumps(known, sort_keys=True).encode())[:16]}.json"


def recall(kind: str, known: Mapping[str, Any]) -> dict[str, Any] | None:
    """What `remember` kept under the same facts; None where there is nothing of use."""
    path = kept_at(kind, known)
    try:
        if path is None:
            return None
        with open_regular(path) as file:
            data = file.read(MAX_FILE + 1)
        if len(data) > MAX_FILE:
            raise ValueError(f"over {MAX_FILE} bytes")
        value = json.loads(data)
    except FileNotFoundError:
        return None
    except OSError as error:
        _warn_unreadable(_folder(), error.strerror or str(error))
        return None
    except (ValueError, RecursionError) as error:
        log.warning("%s", bounded(f"{path} is of no use ({one_line(error)}); it is replaced"))
        return None
    if not isinstance(value, dict) or value.get("facts") != known or not isinstance(value.get("measured"), dict):
        log.warning("%s", bounded(f"{path} holds something else; it is replaced"))
        return None
    found: dict[str, Any] = value["measured"]
    return found


@cache
def _warn_unreadable(folder: Path | None, why: str) -> None:
    """Warns once of a folder, which every runtime looks into."""
    log.warning("%s", bounded(f"{folder} cannot be read ({why}); what was measured before is not used"))


def remember(kind: str, known: Mapping[str, Any], measured: Mapping[str, Any]) -> Path | None:
    """Keeps a measurement under the facts it depends on; returns where, or None where that is not possible."""
    path = kept_at(kind, known)
    if path is None:
        log.warning("there is no home folder; what was measured is not kept")
        return None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with write_beside(path) as file:
            file.write((json.dumps({"facts": known, "measured": measured}, indent=2) + "\n").encode())
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        log.warning("%s", bounded(f"{path} cannot be written ({why}); what was measured is not kept"))
        return None
    return path
