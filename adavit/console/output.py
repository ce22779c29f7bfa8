"""What the commands share: errors in one line, tables, JSON, and the summary of an export."""

from __future__ import annotations

import errno
import io
import json
import logging
import re
import shlex
import shutil
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import click
import cloup

from adavit.console.progress import Progress
from adavit.errors import AdaViTError, InputError, OptionError, bounded, missing_package, printable
from adavit.files import check_place, write_beside

__all__ = [
    "Command",
    "Progress",
    "check_targets",
    "end_lines",
    "export_lines",
    "in_flags",
    "printable",
    "table",
    "write_json",
]

OPTION = re.compile(r"`([a-z][a-z_]*)(?:=([^`]*))?`")
"""An option in a message, in Python's words, with its value or without."""
FLAGS = {"with_dense=False": "--no-dense"}
"""Options that the commands spell otherwise than by `in_flags`'s rule."""
NARROWEST = 40
"""Columns of a help text at least; a narrower terminal wraps it."""
OUT_OF_MEMORY = "out of memory; use a smaller --batch, smaller or fewer images"


class Command(cloup.Command):
    """A command whose failures are one line on stderr: exit code 2 for usage, 1 for the rest, 130 for Ctrl-C."""

    def make_context(self, info_name: str | None, *args: Any, **kwargs: Any) -> click.Context:
        """Reads the command line, and prints what --help and --version ask for; what goes wrong is one line too."""
        if shutil.get_terminal_size().columns < NARROWEST:
            kwargs["terminal_width"] = NARROWEST
        try:
            return super().make_context(info_name, *args, **kwargs)
        except click.exceptions.NoArgsIsHelpError:
            raise
        except click.UsageError as error:
            raise _in_one_line(error) from None
        except BrokenPipeError:
            raise
        except OSError as error:
            _fail(info_name, _disk_message(error))

    def invoke(self, ctx: click.Context) -> Any:
        """Runs the command."""
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):  # names that its encoding lacks are no reason to stop
                stream.reconfigure(errors="backslashreplace")
        try:
            with warnings.catch_warnings(), _logged(ctx.info_name), _interrupts():
                warnings.showwarning = partial(_warn, ctx.info_name)
                return super().invoke(ctx)
        except click.UsageError as error:
            raise _in_one_line(error) from None
        except OptionError as error:
            raise click.UsageError(in_flags(str(error))) from None
        except AdaViTError as error:
            message = in_flags(str(error))
        except ModuleNotFoundError as error:
            hint = missing_package(error, "train" if ctx.find_root().info_name == "adavit-train" else None)
            if hint is None:
                raise
            message = hint
        except BrokenPipeError:
            raise
        except OSError as error:
            message = _disk_message(error)
        except MemoryError:
            message = OUT_OF_MEMORY
        except RuntimeError as error:
            if "can't allocate memory" not in str(error):  # torch's word for it
                raise
            message = OUT_OF_MEMORY
        except KeyboardInterrupt as error:
            advice = f"; {error}" if str(error) else ""
            click.echo(f"{ctx.info_name}: interrupted{advice}", err=True)
            ctx.exit(130)
        _fail(ctx.info_name, message)


@contextmanager
def _interrupts() -> Iterator[None]:
    """Makes a KeyboardInterrupt of Ctrl-C, whatever error a compiled package turns that into."""
    usual = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if not usual or threading.current_thread() is not threading.main_thread():
        yield
        return
    signals = []

    def note_signal(number: int, frame: FrameType | None) -> None:
        signals.append(number)
        signal.default_int_handler(number, frame)

    signal.signal(signal.SIGINT, note_signal)
    try:
        yield
    except Exception as error:
        if signals:
            raise KeyboardInterrupt from error
        raise
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _in_one_line(error: click.UsageError) -> click.UsageError:
    """A mistake in usage without the context, whose usage lines click would print, and bounded."""
    return click.UsageError(bounded(error.format_message()))


def _fail(command: str | None, message: str) -> NoReturn:
    """Ends the command with one line."""
    click.echo(f"{command}: error: {bounded(message)}", err=True)
    _drop_output()
    raise click.exceptions.Exit(1)


def _drop_output() -> None:
    """Closes a standard output that takes no more: Python would try again as it ends, and complain."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        with suppress(OSError):
            sys.stdout.close()


def _warn(command: str | None, message: Warning | str, *_: Any) -> None:
    click.echo(f"{command}: warning: {bounded(in_flags(str(message)))}", err=True)


@contextmanager
def _logged(command: str | None) -> Iterator[None]:
    """Prints what this package logs as warnings of the command."""

    class Printed(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            _warn(command, record.getMessage())

    log, handler = logging.getLogger("adavit"), Printed(logging.WARNING)
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)


def in_flags(message: str) -> str:
    """A message with the options that it names in Python's words, in backticks, as flags.

    `calibration_images` becomes --calibration-images, `force=True` --force, `verify=False` --no-verify, and
    `max_drop=0.2` --max-drop 0.2.
    """

    def flag(found: re.Match[str]) -> str:
        name, value = found[1].replace("_", "-"), found[2]
        if spelled := FLAGS.get(found[0].strip("`")):
            return spelled
        if value in ("True", None):
            return f"--{name}"
        return f"--no-{name}" if value == "False" else f"--{name} " + value.strip("'")

    return OPTION.sub(flag, message)


def _disk_message(error: OSError) -> str:
    where = f"{error.filename}: " if error.filename else ""
    hint = {
        errno.ENOSPC: "the disk is full; free some space or write elsewhere",
        errno.EROFS: "the file system is read-only; write elsewhere",
        errno.EACCES: "no permission; choose a path you may use",
    }.get(error.errno or 0, error.strerror or str(error))
    return f"{where}{hint}"


def check_targets(targets: Mapping[str, str | Path | None]) -> None:
    """Refuses, by option, what no file can be written to, before any work is done for it, and one file for two."""
    taken: dict[Path, str] = {}
    for option, target in targets.items():
        if target is None or str(target) == "-":
            continue
        try:
            check_place(Path(target))
            place = Path(target).resolve()
        except OSError as error:
            raise InputError(f"{option} {error.filename}: {error.strerror}") from None
        except RuntimeError:
            raise InputError(f"{option} {target}: is a link that goes round; name another file") from None
        if place.is_file() or not place.exists():  # a device takes several
            if place in taken:
                raise click.UsageError(f"{taken[place]} and {option} name the same file, {target}; name two")
            taken[place] = option


def write_json(report: dict[str, Any], target: str | None) -> None:
    """Writes a report to a file, beside it first, or to standard output for "-"."""
    if target is None:
        return
    text = json.dumps(report, indent=2) + "\n"
    if target == "-":
        click.echo(text, nl=False)
    else:
        with write_beside(Path(target).resolve()) as file:
            file.write(text.encode())


def table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Aligned columns: the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join([row[0].ljust(widths[0])] + [cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True)])
        for row in rows
    ]


def export_lines(report: dict[str, Any]) -> list[str]:
    """The summary of an export or a check."""
    lines = [f"bundle      {report['bundle']}"]
    for precision, files in report.get("precisions", {}).items():
        graphs = f"{files['graphs']} graph{'s' * (files['graphs'] > 1)}"
        lines.append(f"{precision:<11} {graphs}, {files['bytes'] / 1e6:.1f} MB, opset {report['opset']}")
    if prepare := report.get("preprocessing"):
        side, mean, std = (prepare[key] for key in ("side", "mean", "std"))
        numbers = (" ".join(f"{value:g}" for value in values) for values in (mean, std))
        lines.append(
            f"pictures    {side} x {side}, crop {prepare['crop_ratio']:g}, mean {{}}, std {{}}".format(*numbers)
        )
    if found := report.get("verified"):
        decisions = f"{found['decisions']} decisions identical, " if found["decisions"] else ""
        what = "verified" if "fp32" in report.get("precisions", ["fp32"]) else "fp32 graphs"
        lines.append(
            f"{what:<11} {found['images']} images: {decisions}"
            f"largest logit difference {found['max_logit_difference']:.1e}"
        )
    if found := report.get("budgets"):
        lines += _budget_lines(found)
    if found := report.get("statistics"):
        skipped = f"; {found['skipped']} could not be read" if found["skipped"] else ""
        lines.append(f"statistics  of {found['images']} images{skipped}")
    for key, built in report.get("engine_sets", {}).items():
        size = sum(engine["bytes"] for engine in built["engines"].values())
        count, seconds = len(built["engines"]), built["seconds"]
        lines.append(f"built       {key}: {count} engines, {size / 1e6:.1f} MB, {seconds:.1f} s")
    return lines


def end_lines(report: dict[str, Any]) -> list[str]:
    """How long an export or a check took, and the next step."""
    lines = [f"took        {report['seconds']:.1f} s"] if "seconds" in report else []
    if precisions := report.get("precisions"):
        bundle = shlex.quote(report["bundle"])
        compared = "--compare " if len(precisions) > 1 else "" if "fp32" in precisions else "--compare FP32 "
        lines.append(f"next        adavit-run {compared}{bundle} --images PHOTOS")
    return lines


def _budget_lines(report: dict[str, Any]) -> list[str]:
    right = "accuracy" if report["calibration"]["labelled"] else "agreement"
    rows: list[tuple[str, ...]] = [("budget", "MACs", right, "tokens", "heads", "sub-layers")]
    for point in report["points"]:
        measured = point["measured"]
        usage = [f"{measured['usage'][kind]:.0%}" for kind in ("tokens", "heads", "sublayers")]
        trained = "" if any(point["offsets"].values()) else " (trained)"
        rows.append((f"{point['budget']:.4g}{trained}", f"{measured['macs']:.1%}", f"{measured[right]:.2%}", *usage))
    images = f"on {report['calibration']['images']} images"
    if report["skipped"]:
        images += f"; {len(report['skipped'])} could not be read, first: {report['skipped'][0]}"
    return ["", *table(rows), images]
