"""Which engine sets this user built on this machine, kept in $XDG_STATE_HOME/adavit or ~/.local/state/adavit.

TensorRT engines are native code: who deserialises one runs what its author wrote. Only those are believed that were
built here, unless the caller says more.
"""

from __future__ import annotations

import logging
import os
import stat
from pathlib import Path

from adavit.files import write_beside
from adavit.user_folder import user_folder

__all__ = ["built_here", "private", "remember_built"]

log = logging.getLogger(__name__)

FOLDER = "engine-sets"


def built_here(fingerprint: str) -> bool:
    """Whether this user built the engine set of this fingerprint on this machine.

    A record that others may have written is not believed.
    """
    path = _record(fingerprint)
    return path is not None and private(path)


def private(path: Path) -> bool:
    """Whether a file is there that, like its two folders, is this user's, and nobody else may write."""
    try:
        return stat.S_ISREG(path.lstat().st_mode) and all(map(_own, (path, *path.parents[:2])))
    except (OSError, ValueError):
        return False


def remember_built(fingerprint: str, key: str) -> None:
    """Records that this user built an engine set here; a warning says where that is not possible.

    Args:
        fingerprint: of the set.
        key: of the set, for people.
    """
    path, why = _record(fingerprint), "there is no home folder"
    if path is not None:
        try:
            _make_folders(path.parent)
            with write_beside(path) as file:
                file.write(f"{key}\n".encode())
            why = f"{path.parent} is not this user's alone"
        except (OSError, ValueError) as error:
            why = f"{path.parent} cannot be written: {getattr(error, 'strerror', None) or error}"
    if not built_here(fingerprint):
        log.warning("not remembered that the engines were built here (%s); run them with `trust_engines=True`", why)


def _record(fingerprint: str) -> Path | None:
    folder = user_folder("XDG_STATE_HOME", ".local/state")
    return folder and folder / FOLDER / fingerprint


def _make_folders(folder: Path) -> None:
    """Makes a folder and its parent so that others may not write there, whatever the umask."""
    folder.parent.parent.mkdir(parents=True, exist_ok=True)
    for made in (folder.parent, folder):
        made.mkdir(mode=0o700, exist_ok=True)


def _own(path: Path) -> bool:
    """Whether a file or folder is this user's, and others may not write there."""
    if not hasattr(os, "geteuid"):  # Windows keeps others out of a user's folders by itself
        return True
    found = path.stat()
    return found.st_uid == os.geteuid() and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
