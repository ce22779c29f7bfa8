"""What the commands print of calibration and decision parity."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from adavit.console.output import table

__all__ = ["calibration_lines", "checked_line", "compare_lines", "differs_line", "precision_lines"]

_NAMES = {"tokens": "tokens", "heads": "heads", "sublayers": "sub-layers"}


def precision_lines(precision: str, report: dict[str, Any]) -> list[str]:
    """How a precision differs from fp32, and how it was calibrated."""
    lines = []
    if checked := report.get("checked"):
        lines.append(checked_line(precision, checked, checked["input"]))
        advice = "compare them on more images by adavit-run --compare, or try --precision mixed"
        lines += [differs_line(precision, advice)] if checked["differs"] else []
    return lines + calibration_lines(report)


def calibration_lines(report: dict[str, Any]) -> list[str]:
    """The summary of a calibration; starved sub-layers are named."""
    how = f", {report['method']} ranges" if report["method"] else ""
    lines = [f"calibrated  on {report['images']} images{how}" + (" (cached)" if report["reused"] else "")]
    if skipped := report["skipped"]:
        lines[0] += f"; {len(skipped)} could not be read, first: {skipped[0]}"
    rows: list[tuple[str, ...]] = [("sub-layer", "samples", "tokens", "precision")]
    rows += [
        (name, str(found["samples"]), str(found["tokens"]), found["precision"])
        for name, found in report["sublayers"].items()
    ]
    lines += ["", *table(rows), ""]
    if "sensitivity" in report:
        rows = [("sub-layer alone in int8", "drop, points", "agreement", "logit error")]
        rows += [
            (name, f"{loss['drop']:.2f}", f"{loss['agreement']:.1%}", f"{loss['logit_error']:.2g}")
            for name, loss in report["sensitivity"].items()
        ]
        lines += [*table(rows), "", f"drop        {report['loss']['drop']:.2f} points on the calibration images"]
    return lines + _kept_lines(report["kept_higher"])


def _kept_lines(kept_higher: dict[str, Any]) -> list[str]:
    """Sub-layers that stay in a higher precision, by the reason."""
    alike: dict[tuple[str, str], list[str]] = {}
    for name, kept in kept_higher.items():
        alike.setdefault((kept["precision"], kept["reason"]), []).append(name)
    return [
        f"warning     {', '.join(names)} {'stays' if len(names) == 1 else 'stay'} in {precision}: {reason}"
        for (precision, reason), names in alike.items()
    ]


def checked_line(name: str, report: dict[str, Any], images: str) -> str:
    """How decisions differ from those in fp32 that they were made from.

    Args:
        name: whose.
        report: of an `Agreement`.
        images: which images ran.
    """
    free, accuracy = report["free"], report["accuracy"]
    line = (
        f"{name:<11} {report['images']} {images}, against fp32: {free['flipped']:.2%} of decisions "
        f"flipped, {free['top1_agreement']:.1%} of classes the same, logits differ by "
        f"{free['mean_logit_difference']:.2g} on average"
    )
    return line + (f", accuracy {accuracy['second']:.1%} (fp32: {accuracy['first']:.1%})" if accuracy else "")


def differs_line(precision: str, advice: str) -> str:
    """The warning of a precision that decides differently; the advice says what to do."""
    return f"warning     {precision} decides differently from fp32; {advice}"


def compare_lines(report: dict[str, Any]) -> list[str]:
    """The table of `adavit-run --compare` and its advice; of two bundles also which decisions differ, and where."""
    rows, ship = report["bundles"], report["advice"]["lines"]
    lines = [*table(_bundle_rows(rows)), "", *_legend(report), ""]
    lines += [f"{name:<11} {line}" for name, line in zip(("advice", *[""] * len(ship)), ship, strict=False)]
    if len(report["compared"]) == 1:
        lines += ["", *_pair_lines(report["compared"][0], rows[0]["name"], rows[1]["name"])]
    return lines


def _bundle_rows(bundles: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    """A row for each bundle; columns that say nothing are left out."""
    first = bundles[0]["name"]
    columns: list[tuple[str, Callable[[dict[str, Any]], str]]] = [
        ("bundle", lambda row: str(row["name"])),
        ("precision", lambda row: str(row["precision"])),
        ("backend", lambda row: str(row["backend"])),
        ("MB", lambda row: f"{row['bytes'] / 1e6:.1f}"),
        ("ms", lambda row: f"{row['ms_per_image']:.2f}"),
        ("speedup", lambda row: _or_dash(row["speedup"], ".2f", "x")),
        (f"over {first}'s twin", lambda row: _or_dash(row["speedup_over_first_dense"], ".2f", "x")),
        ("accuracy", lambda row: _or_dash(row["accuracy"], ".2%")),
        ("same class", lambda row: _or_dash(row["top1_agreement"], ".2%")),
        ("flipped", lambda row: _or_dash(row["flipped"], ".3%")),
    ]
    filled = [(name, *map(cell, bundles)) for name, cell in columns]
    told = [column for column in filled if set(column[1:]) != {"-"}]
    if len({row["backend"] for row in bundles}) == 1:
        told = [column for column in told if column[0] != "backend"]
    return list(zip(*told, strict=True))


def _or_dash(value: float | None, form: str, unit: str = "") -> str:
    return "-" if value is None else f"{value:{form}}{unit}"


def _legend(report: dict[str, Any]) -> list[str]:
    """What was counted and how it was measured."""
    rows, first = report["bundles"], report["bundles"][0]["name"]
    labels = f", {report['labelled']} of them labelled" if report["labelled"] else ", without labels"
    if report["labels_by"] == "order":
        labels += " by the order of their folders"
    where = f" in {rows[0]['backend']}" if len({row["backend"] for row in rows}) == 1 else ""
    lines = [
        f"images      {report['images']}{labels}",
        "MB          weights and graphs on disk",
        f"ms          an image, median of {report['runs']} runs with batch {report['batch']} and {report['threads']} "
        f"threads{where}, all bundles in turns",
        f"speedup     over the bundle's own dense twin; then over {first}'s",
        f"same class  images of the same class as {first} gives them",
        f"flipped     decisions on tokens, heads and sub-layers that are not {first}'s",
    ]
    timed = [row["dense_latency_ms"] is not None for row in rows]
    if not any(timed):
        lines = [line for line in lines if not line.startswith("speedup")]
    elif not all(timed):
        lines.append("-           the bundle was exported without its dense twin")
    return lines


def _pair_lines(report: dict[str, Any], first: str, second: str) -> list[str]:
    """Which decisions differ, and where; what remains when the second follows the first's decisions; how close it was.

    Args:
        report: of `Parity`.
        first: the reference's name.
        second: the other's name.
    """
    free, replayed = report["free"], report["replayed"]
    rows: list[tuple[str, ...]] = [(second, "decides itself", f"follows {first}'s decisions")]
    for kind in report["decisions"]:
        shares = (f"{mode['flipped_by_kind'][kind]:.3%}" for mode in (free, replayed))
        rows.append((f"flipped decisions on {_NAMES[kind]}", *shares))
    rows.append(("flipped decisions", *(f"{mode['flipped']:.3%}" for mode in (free, replayed))))
    rows.append(("images with the same policy", f"{free['identical_policies']:.1%}", ""))
    rows.append(("images with the same class", *(f"{mode['top1_agreement']:.2%}" for mode in (free, replayed))))
    rows.append(("difference of logits, mean", *(f"{mode['mean_logit_difference']:.2g}" for mode in (free, replayed))))
    if found := report["accuracy"]:
        rows.append(("accuracy", f"{found['second']:.2%}", f"{found['replayed']:.2%}"))
    lines = [*table(rows), "", *table(_block_rows(free)), ""]
    lines += [
        f"A decision compares a logit with a threshold. Of {first}'s logits lie so close to theirs:",
        *table(_margin_rows(report["decisions"])),
    ]
    return lines


def _block_rows(free: dict[str, Any]) -> list[tuple[str, ...]]:
    by_block = free["flipped_by_block"]
    rows: list[tuple[str, ...]] = [("flipped, by block", *(_NAMES[kind] for kind in by_block))]
    for block, shares in enumerate(zip(*by_block.values(), strict=True)):
        rows.append((str(block), *(f"{share:.3%}" for share in shares)))
    return rows


def _margin_rows(decisions: dict[str, Any]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [("distance to the threshold", *(_NAMES[kind] for kind in decisions))]
    for edge in next(iter(decisions.values()))["margins_below"] if decisions else ():
        rows.append((f"below {edge}", *(f"{kind['margins_below'][edge]:.3%}" for kind in decisions.values())))
    for key, name in (
        ("largest_flipped_margin", "the largest that flipped"),
        ("logit_drift_rms", "change of a logit, RMS"),
        ("logit_drift_max", "change of a logit, largest"),
    ):
        rows.append((name, *(f"{kind[key]:.2g}" for kind in decisions.values())))
    return rows
