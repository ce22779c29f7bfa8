import io
import sys

import pytest

from adavit.console import Progress, table


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_is_a_bar_on_a_terminal_and_vanishes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    with Progress() as progress:
        progress("exporting stem", 0.5)
        progress("exporting head", 1.0)
    written = sys.stderr.getvalue()
    assert "exporting stem" in written
    assert f"[{'#' * 24}] 100%" in written
    assert written.endswith("\r\x1b[K")
    assert "\n" not in written


def test_progress_is_silent_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with Progress() as progress:
        progress("exporting", 1.0)
    assert sys.stderr.getvalue() == ""


def test_columns_are_aligned() -> None:
    assert table([("a", "b"), ("long", "1"), ("c", "22")]) == ["a      b", "long   1", "c     22"]
