"""How much of a search is done, of parts whose sizes are known about."""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["SearchProgress"]

LONGER = 1.1
"""What a part is expected to take, of what it has taken, once that is more than was expected."""
NEARLY = 0.99
"""The share that is reported at most before the end."""


class SearchProgress:
    """Counts images that ran, against what the parts of a search are expected to take.

    A part that takes less, or more, makes the rest shorter, or longer; the share that is reported never falls.

    Args:
        report: told the share done, from 0 to 1.
    """

    def __init__(self, report: Callable[[float], None]) -> None:
        self._report = report
        self._parts: list[float] = []
        self._expected = 0.0
        self._done, self._before, self._share = 0, 0, 0.0

    def plan(self, *parts: float) -> None:
        """The images that the parts to come are expected to run, in order."""
        self._parts = list(parts)

    def begin(self) -> None:
        """Ends a part, and begins the next."""
        self._before = self._done
        self._expected = self._parts.pop(0)

    def ran(self, images: int) -> None:
        """Counts images; tells nothing before the first part."""
        self._done += images
        if not self._expected:
            return
        here = max((self._done - self._before) * LONGER, self._expected)
        self._tell(min(NEARLY, self._done / (self._before + here + sum(self._parts))))

    def end(self) -> None:
        """Everything is done."""
        self._tell(1.0)

    def _tell(self, share: float) -> None:
        self._share = max(self._share, share)
        self._report(self._share)
