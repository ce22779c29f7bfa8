"""What the commands print: errors in one line, progress on a terminal, tables, JSON."""

from __future__ import annotations

import errno
import io
import json
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import click

from adavit.errors import AdaViTError, InputError, OptionError, bounded, printable
from adavit.files import check_place, write_beside

__all__ = [
    "Command",
    "Progress",
    "check_target",
    "export_lines",
    "printable",
    "run_lines",
    "write_json",
]

MODULES = {  # An optional package that is missing, and the extra that brings it.
    "torch": "export",
    "onnx": "export",
    "safetensors": "export",
    "onnxruntime": "cpu",
    "matplotlib": "train",
    "modelopt": "int8",
}


OUT_OF_MEMORY = "out of memory; use a smaller --batch, smaller or fewer images"


class Command(click.Command):
    """A command whose failures are one line on stderr: exit code 2 for usage, 1 for the rest, 130 for Ctrl-C."""

    def make_context(self, info_name: str | None, *args: Any, **kwargs: Any) -> click.Context:
        """Reads the command line, and prints what --help and --version ask for; what goes wrong is one line too."""
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
            with warnings.catch_warnings(), _interrupts():
                warnings.showwarning = partial(_warn, ctx.info_name)
                return super().invoke(ctx)
        except click.UsageError as error:
            raise _in_one_line(error) from None
        except OptionError as error:
            raise click.UsageError(str(error)) from None
        except AdaViTError as error:
            message = str(error)
        except ModuleNotFoundError as error:
            package = (error.name or "").split(".")[0]
            if package not in MODULES:
                raise
            extra = "train" if ctx.find_root().info_name == "adavit-train" else MODULES[package]
            message = f"{package} is not installed; run: pip install 'adavit[{extra}]'"
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
        except KeyboardInterrupt:
            click.echo(f"{ctx.info_name}: interrupted", err=True)
            ctx.exit(130)
        _fail(ctx.info_name, message)


@contextmanager
def _interrupts() -> Iterator[None]:
    """Makes a KeyboardInterrupt of Ctrl-C, whatever error a compiled package turns that into."""
    usual = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if not usual or threading.current_thread() is not threading.main_thread():
        yield
        return
    heard = []

    def hear(number: int, frame: FrameType | None) -> None:
        heard.append(number)
        signal.default_int_handler(number, frame)

    signal.signal(signal.SIGINT, hear)
    try:
        yield
    except Exception as error:
        if heard:
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
    click.echo(f"{command}: warning: {bounded(str(message))}", err=True)


def _disk_message(error: OSError) -> str:
    where = f"{error.filename}: " if error.filename else ""
    hint = {
        errno.ENOSPC: "the disk is full; free some space or write elsewhere",
        errno.EROFS: "the file system is read-only; write elsewhere",
        errno.EACCES: "no permission; choose a path you may use",
    }.get(error.errno or 0, error.strerror or str(error))
    return f"{where}{hint}"


class Progress:
    """A bar on stderr while it is a terminal, nothing otherwise. Call it with a stage and the share done."""

    WIDTH = 24

    def __init__(self) -> None:
        self._shown = sys.stderr is not None and sys.stderr.isatty()
        self._last = 0.0
        self._dirty = False

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.clear()

    def __call__(self, stage: str, share: float) -> None:
        """Shows that `share` of `stage` is done."""
        now = time.monotonic()
        if not self._shown or (now - self._last < 0.1 and share < 1):
            return
        self._last, self._dirty = now, True
        bar = "#" * round(share * self.WIDTH)
        sys.stderr.write(f"\r\x1b[K{stage:<28.28} [{bar:<{self.WIDTH}}] {share:4.0%}")
        sys.stderr.flush()

    def clear(self) -> None:
        """Removes the bar."""
        if self._dirty:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()


def check_target(option: str, target: str | Path | None) -> None:
    """Refuses what no file can be written to, before any work is done for it."""
    if target is None or str(target) == "-":
        return
    try:
        check_place(Path(target))
    except OSError as error:
        raise InputError(f"{option} {error.filename}: {error.strerror}") from None


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
    if "engines" in report:
        lines.append(f"engines     {report['engines']}, {report['bytes'] / 1e6:.1f} MB, opset {report['opset']}")
    if found := report.get("verified"):
        what = "verified" if report.get("precision", "fp32") == "fp32" else "fp32 graphs"
        lines.append(
            f"{what:<11} {found['images']} images: {found['decisions']} decisions identical, "
            f"largest logit difference {found['max_logit_difference']:.1e}"
        )
    if found := report.get("budgets"):
        lines += _budget_lines(found)
    for key, built in report.get("engine_sets", {}).items():
        size = sum(engine["bytes"] for engine in built["engines"].values())
        count, seconds = len(built["engines"]), built["seconds"]
        lines.append(f"built       {key}: {count} engines, {size / 1e6:.1f} MB, {seconds:.1f} s")
    if "seconds" in report:
        lines.append(f"took        {report['seconds']:.1f} s")
    return lines


def _offset(value: float | Sequence[float]) -> str:
    """The offset of a kind; where it differs between blocks, the least and the largest."""
    return f"{value:+.2f}" if isinstance(value, float | int) else f"{min(value):+.2f} to {max(value):+.2f}"


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


def run_lines(report: dict[str, Any]) -> list[str]:
    """The tables of `adavit-run`."""
    lines: list[str] = []
    if report["predictions"]:
        rows: list[tuple[str, ...]] = [("image", "prediction", "GMACs", "tokens", "heads", "sub-layers")]
        for p in report["predictions"]:
            top = ", ".join(f"{label} {share:.0%}" for label, share in p["top"])
            usage = [f"{p['usage'][kind]:.0%}" for kind in ("tokens", "heads", "sublayers")]
            rows.append((p["image"], top, f"{p['macs'] / 1e9:.3f}", *usage))
        lines += [*table(rows), ""]
        if more := report["images"] - len(report["predictions"]):
            lines[-1:] = [f"... and {more} more", ""]
    lines += _latency_lines(report)
    if device := report["device"]:
        enqueue, gpu, sync = (device[f"{kind}_ms"] for kind in ("enqueue", "gpu", "sync"))
        lines.append(f"of p50      {enqueue:.2f} enqueuing, {gpu:.2f} on the GPU, {sync:.2f} waiting for it")
    used = report["usage"]
    macs = report["macs"]
    lines += [
        "",
        f"model       {report['model']} on {report['backend']}, batch {report['batch']}, {report['threads']} threads, "
        f"{report['iterations']} runs",
        *([f"backend     {report['choice']['reason']}"] if report["choice"] else []),
        *([f"plan        tuned on this machine: {report['plan']}"] if report["plan"] else []),
        *([f"engines     {report['specialised']} for what blocks keep most often"] if report["specialised"] else []),
        f"MACs        {macs['executed_mean'] / 1e9:.3f} G of {macs['dense'] / 1e9:.3f} G dense "
        f"({macs['executed_mean'] / macs['dense']:.1%})",
        f"usage       tokens {used['tokens']:.1%}, heads {used['heads']:.1%}, sub-layers {used['sublayers']:.1%}",
    ]
    if found := report["budget"]:
        offsets = ", ".join(f"{kind} {_offset(value)}" for kind, value in found["offsets"].items())
        lines.append(f"budget      {found['macs']:.1%} of the dense MACs asked for; offsets of logits: {offsets}")
    if report["speedup"] is not None:
        lines.append(
            f"speedup     {report['speedup']:.2f}x of an ideal {report['ideal_speedup']:.2f}x: "
            f"efficiency {report['efficiency']:.2f}"
        )
    if found := report["accuracy"]:
        by = ", labelled by the order of their folders" if report["labels_by"] == "order" else ""
        lines.append(f"accuracy    top-1 {found['top1']:.2%}, top-5 {found['top5']:.2%} of {found['n']} images{by}")
    if found := report["profile"]:
        lines += ["", *_profile_lines(found)]
    return lines


def _profile_lines(profile: dict[str, Any]) -> list[str]:
    """The waterfall: what is left of a row's total after the ideal is loss."""
    columns = ("ideal", "padding", "slower", "engines", "decision", "moves", "calls", "total")
    rows: list[tuple[str, ...]] = [("ms", *columns)]
    for part in (*profile["parts"], {"part": "total", **profile["total"]}):
        rows.append((part["part"], *(f"{part[f'{column}_ms']:.2f}" for column in columns)))
    return [
        *table(rows),
        f"mean of {profile['runs']} runs, {profile['disturbed_runs']} disturbed ones left out; the timers' own cost: "
        f"{profile['timers_ms']:.2f} ms",
        f"ideal, padding: MACs asked for, and beyond, at the dense twin's speed of "
        f"{profile['dense_gmacs_per_second']:.0f} GMAC/s ({profile['dense_ms']:.2f} ms)",
        "engines: ideal, padding, and what they take beyond; moves: gathering and scattering rows and weights",
        f"calls: {profile['call_us']:.0f} us for every engine, and all between",
    ]


def _latency_lines(report: dict[str, Any]) -> list[str]:
    rows: list[tuple[str, ...]] = [("latency, ms", "p50", "p90", "p95", "p99", "mean", "images/s")]
    for name, part in (("adaptive", report), ("dense twin", report["dense"])):
        if part:
            values = [f"{part['latency_ms'][key]:.2f}" for key in ("p50", "p90", "p95", "p99", "mean")]
            rows.append((name, *values, f"{part['throughput']:.1f}"))
    return table(rows)
