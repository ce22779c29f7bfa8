"""How commands tell how far they are."""

import io
import sys
import threading
from contextlib import redirect_stderr

import click
import pytest

from adavit.console.progress import GAPS, OFF, Estimate, Progress, Stage, time_left

STAGES = [Stage("reading", 1.0), Stage("exporting", 4.0), Stage("measuring", 5.0, fixed_duration=True)]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    """A clock that the test turns."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(autouse=True)
def _progress_is_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(OFF, raising=False)


@pytest.fixture
def pipe() -> io.StringIO:
    return io.StringIO()


@pytest.fixture
def terminal() -> io.StringIO:
    return Terminal()


def on(stream: io.StringIO, command: str, stages: list[Stage], clock: Clock) -> Progress:
    """A progress on another standard error."""
    with redirect_stderr(stream):
        return Progress(stages, command, clock)


def shares(written: str) -> list[int]:
    return [int(part.split("%")[0].split()[-1]) for part in written.split("\r\x1b[K") if "%" in part]


def test_a_terminal_has_one_bar_of_the_whole_command(terminal: io.StringIO, clock: Clock) -> None:
    with on(terminal, "adavit-export", STAGES, clock) as progress:
        for stage, part in (
            ("reading", 0.0), ("reading", 0.5), ("reading", 1.0), ("exporting a", 0.5), ("exporting b", 1.0),
            ("measuring", 0.0), ("measuring", 0.5), ("measuring", 1.0),
        ):  # fmt: skip
            clock.now += 1
            progress(stage, part)
    written = terminal.getvalue()
    assert "\n" not in written
    assert "exporting b" in written and "a few seconds left" in written
    found = shares(written)
    assert len(found) == 8 and found == sorted(found), "the bar never goes back"
    assert found[0] < 20 and found[-1] == 99
    assert written.endswith("\r\x1b[K"), "it vanishes"
    progress("late", 1.0)
    assert terminal.getvalue() == written


def test_many_names_of_one_stage_do_not_restart_the_bar(terminal: io.StringIO, clock: Clock) -> None:
    with on(terminal, "adavit-export", [Stage("exporting", 10.0)], clock) as progress:
        for done in range(1, 101):
            clock.now += 0.2
            progress(f"exporting blocks.{done}.mlp", done / 100)
    found = shares(terminal.getvalue())
    assert found == sorted(found)
    assert found[24:75:25] == [25, 50, 75], "of an even pace it shows the share that is done"


def test_the_bar_is_not_drawn_more_often_than_it_can_be_read(terminal: io.StringIO, clock: Clock) -> None:
    with on(terminal, "adavit-run", STAGES, clock) as progress:
        for _ in range(50):
            clock.now += 0.01
            progress("reading", 0.5)
    assert 4 <= len(shares(terminal.getvalue())) <= 6


def test_lines_without_a_terminal_come_at_growing_intervals(pipe: io.StringIO, clock: Clock) -> None:
    came = []
    with on(pipe, "adavit-export", [Stage("verifying", 60.0)], clock) as progress:
        for second in range(1, 121):
            clock.now += 1
            before = len(pipe.getvalue())
            progress("verifying", second / 200)
            if len(pipe.getvalue()) > before:
                came.append(second)
    assert came == [5, 15, 35, 65, 95]
    lines = pipe.getvalue().splitlines()
    assert lines[0] == "adavit-export: verifying, 2 %, about 3 min left"
    assert lines[-1] == "adavit-export: verifying, 48 %, about 2 min left"
    assert "\x1b" not in pipe.getvalue() and "\r" not in pipe.getvalue()


def test_a_short_command_says_nothing_without_a_terminal(pipe: io.StringIO, clock: Clock) -> None:
    with on(pipe, "adavit-run", STAGES, clock) as progress:
        for part in (0.0, 0.5, 1.0):
            clock.now += GAPS[0] / 4
            progress("reading", part)
    assert pipe.getvalue() == ""


def test_work_that_tells_nothing_for_long_is_told_of(pipe: io.StringIO, clock: Clock) -> None:
    with on(pipe, "adavit-export", [Stage("building", 60.0)], clock) as progress:
        progress("building", 0.0)
        clock.now += 6
        progress.tick()
        assert pipe.getvalue() == "adavit-export: building, 10 %, about 50 s left\n"
        clock.now += 600
        progress.tick()
        assert pipe.getvalue().endswith("adavit-export: building, 67 %, about 5 min left\n"), "it is overdue"
    alive = [thread for thread in threading.enumerate() if thread.name == "progress"]
    for thread in alive:
        thread.join(10)
    assert not any(thread.is_alive() for thread in alive)


def test_the_command_that_runs_is_named(pipe: io.StringIO, clock: Clock) -> None:
    @click.command(name="adavit-some")
    def some() -> None:
        with redirect_stderr(pipe), Progress(clock=clock) as progress:
            clock.now += 10
            progress("reading", 0.5)

    some.main([], prog_name="adavit-some", standalone_mode=False)
    assert pipe.getvalue() == "adavit-some: reading, 50 %, about 10 s left\n"


def test_stages_may_be_known_only_later(pipe: io.StringIO, clock: Clock) -> None:
    with on(pipe, "adavit-train", [], clock) as progress:
        clock.now += 100
        progress.expect([Stage("training", 10.0), Stage("evaluating", 30.0)])
        clock.now += 10
        progress("training", 0.5)
    assert pipe.getvalue() == "adavit-train: training, 12 %, about 1 min left\n"


def test_it_can_be_turned_off(pipe: io.StringIO, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(OFF, "0")
    with on(pipe, "adavit-run", STAGES, clock) as progress:
        clock.now += 100
        progress("reading", 0.5)
    assert pipe.getvalue() == ""


def test_no_standard_error_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    with Progress() as progress:
        progress("exporting", 1.0)


def test_a_standard_error_that_takes_nothing(clock: Clock) -> None:
    stream = Terminal()
    with on(stream, "adavit-run", STAGES, clock) as progress:
        stream.close()
        progress("exporting", 1.0)


def test_names_do_not_command_the_terminal(pipe: io.StringIO, clock: Clock) -> None:
    with on(pipe, "adavit-run", STAGES, clock) as progress:
        clock.now += 10
        progress("a\x1b[31m\n", 0.5)
    assert pipe.getvalue().startswith("adavit-run: a\\x1b[31m\\x0a, ")


def test_stages_to_come_take_as_long_as_those_before_say() -> None:
    estimate = Estimate(STAGES, 0.0)
    estimate.update("reading", 0.0, 0.0)
    assert estimate.left(0.0) == pytest.approx(10.0)
    estimate.update("exporting a", 0.0, 3.0)  # reading took three times as long
    assert estimate.left(3.0) == pytest.approx(3 * 4 + 5), "a stage of fixed length takes no longer"
    estimate.update("exporting b", 0.5, 13.0)  # its own pace counts: 20 s in all
    assert estimate.left(13.0) == pytest.approx(10 + 5)
    assert estimate.left(18.0) == pytest.approx(5 + 5), "time goes on between two calls"
    assert estimate.share(18.0) == pytest.approx(18 / 28)
    estimate.update("measuring", 0.0, 30.0)
    assert estimate.left(30.0) == pytest.approx(5.0)


def test_stages_that_are_left_out_or_unexpected_do_no_harm() -> None:
    estimate = Estimate(STAGES, 0.0)
    estimate.update("exporting", 0.5, 2.0)
    assert estimate.left(2.0) == pytest.approx(2 + 5)
    estimate.update("something else", 0.5, 6.0)
    assert estimate.left(8.0) == pytest.approx(2 + 5), "its own pace, and what is to come"
    before = estimate.share(8.0)
    estimate.update("something else", 0.1, 9.0)  # it begins again
    assert estimate.share(9.0) >= before
    estimate.update("exporting", 0.5, 10.0)
    assert estimate.share(10.0) >= before


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0, "a few seconds left"), (9.9, "a few seconds left"), (11, "about 10 s left"), (49, "about 50 s left"),
        (60, "about 1 min left"), (200, "about 3 min left"), (5400, "about 1.5 h left"),
    ],
)  # fmt: skip
def test_times_in_words(seconds: float, words: str) -> None:
    assert time_left(seconds) == words
