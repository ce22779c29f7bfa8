"""Where this package keeps files of the user's own."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["user_folder"]


def user_folder(variable: str, usual: str) -> Path | None:
    """The folder `adavit` in one of the user's base folders; None where there is no home.

    Args:
        variable: the environment variable that names the base folder; a relative path does not count.
        usual: the base folder in the user's home without it.
    """
    base = os.environ.get(variable, "")
    try:
        folder = (Path(base) if os.path.isabs(base) else Path.home() / usual) / "adavit"
    except RuntimeError:
        return None
    return folder if folder.is_absolute() else None
