"""How many CPUs this process may use: its affinity, and the CPU quotas of its cgroups (cgroups(7))."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

__all__ = ["quota_cpus", "usable_cpus"]


def usable_cpus() -> int:
    """The least of the CPUs in this process's affinity and those that its cgroups' quotas allow, at least 1.

    Both are read anew each time: either may change while a process runs.
    """
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = quota_cpus()
    return affinity if quota is None else min(affinity, quota)


def quota_cpus(root: Path = Path("/")) -> int | None:
    """Whole CPUs that the quotas of this process's cgroups allow, at least 1; None without a quota.

    The quota of a cgroup holds for all below it, so the least of the process's own and all its parents' counts. Both
    versions of cgroups are looked at. What cannot be read, or is not as the kernel writes it, is no limit.

    Args:
        root: the folder with proc/ and what it says is mounted.
    """
    quotas = [quota for folder, version in _cgroups(root) if (quota := _quota(folder, version)) is not None]
    return max(1, min(quotas)) if quotas else None


def _cgroups(root: Path) -> Iterator[tuple[Path, int]]:
    """The process's own cgroups and their parents, up to each mount's root, with their version."""
    paths = _paths(root)
    for line in _lines(root / "proc/self/mountinfo"):
        mount, _, kind = line.partition(" - ")
        fields, kinds = [_unescaped(field) for field in mount.split(" ")], kind.split(" ")
        if len(fields) < 6 or len(kinds) < 3 or not fields[4].startswith("/"):
            continue
        version = 2 if kinds[0] == "cgroup2" else 1 if kinds[0] == "cgroup" and "cpu" in kinds[2].split(",") else 0
        path, top = paths.get(version), PurePosixPath(fields[3])
        if path is None or not path.is_relative_to(top) or ".." in (inside := path.relative_to(top)).parts:
            continue  # no mount of cgroups with quotas, or one that this process is not in
        for below in (inside, *inside.parents):
            yield root / fields[4].lstrip("/") / below, version


def _paths(root: Path) -> dict[int, PurePosixPath]:
    """This process's cgroup for CPUs by version; both versions may be mounted at once."""
    found = {}
    for line in _lines(root / "proc/self/cgroup"):
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if not path.startswith("/"):
            continue
        if "cpu" in controllers.split(","):
            found[1] = PurePosixPath(path)
        elif number == "0" and not controllers:
            found[2] = PurePosixPath(path)
    return found


def _quota(folder: Path, version: int) -> int | None:
    """Whole CPUs that one cgroup allows, by its quota and period in microseconds; None without a quota."""
    files = ("cpu.max",) if version == 2 else ("cpu.cfs_quota_us", "cpu.cfs_period_us")
    words = [word for name in files for line in _lines(folder / name) for word in line.split()]
    try:
        quota, period = (int(word) for word in words)
    except ValueError:  # "max", or not two numbers
        return None
    return quota // period if quota > 0 and period > 0 else None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="surrogateescape").split("\n")
    except (OSError, ValueError):  # ValueError: the kernel's paths hold no null bytes
        return []


def _unescaped(field: str) -> str:
    """A field of mountinfo, where blanks and backslashes are octal, such as \\040."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), field)
