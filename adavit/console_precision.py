"""What the commands print of calibration and decision parity."""

from __future__ import annotations

from typing import Any

from adavit.console import table

__all__ = ["calibration_lines", "compare_lines"]

_NAMES = {"tokens": "tokens", "heads": "heads", "sublayers": "sub-layers"}


def calibration_lines(report: dict[str, Any]) -> list[str]:
    """The summary of a calibration; starved sub-layers are named."""
    how = f", {report['method']} ranges" if report["method"] else ""
    lines = [f"calibrated  on {report['images']} images{how}" + (" (cached)" if report["reused"] else "")]
    if skipped := report["skipped"]:
        lines[0] += f"; {len(skipped)} could not be read, first: {skipped[0]}"
    rows: list[tuple[str, ...]] = [("engine", "samples", "tokens", "precision")]
    rows += [
        (name, str(engine["samples"]), str(engine["tokens"]), engine["precision"])
        for name, engine in report["engines"].items()
    ]
    lines += ["", *table(rows), ""]
    if "sensitivity" in report:
        rows = [("sub-layer alone in int8", "drop, points", "agreement", "logit error")]
        rows += [
            (name, f"{loss['drop']:.2f}", f"{loss['agreement']:.1%}", f"{loss['logit_error']:.2g}")
            for name, loss in report["sensitivity"].items()
        ]
        lines += [*table(rows), "", f"drop        {report['loss']['drop']:.2f} points on the calibration images"]
    lines += [
        f"warning     {name} stays in {kept['precision']}: {kept['reason']}"
        for name, kept in report["kept_higher"].items()
    ]
    return lines


def compare_lines(report: dict[str, Any]) -> list[str]:
    """The tables of `adavit-run --compare`."""
    free, replayed = report["free"], report["replayed"]
    rows: list[tuple[str, ...]] = [("", "own decisions", "first's policy replayed")]
    for kind in report["decisions"]:
        shares = (f"{mode['flipped_by_kind'][kind]:.3%}" for mode in (free, replayed))
        rows.append((f"flipped decisions on {_NAMES[kind]}", *shares))
    rows.append(("flipped decisions", *(f"{mode['flipped']:.3%}" for mode in (free, replayed))))
    rows.append(("identical policies", f"{free['identical_policies']:.1%}", ""))
    rows.append(("top-1 agreement", *(f"{mode['top1_agreement']:.2%}" for mode in (free, replayed))))
    rows.append(("logit difference, mean", *(f"{mode['mean_logit_difference']:.2g}" for mode in (free, replayed))))
    if found := report["accuracy"]:
        by = "labels by the order of folders" if report["labels_by"] == "order" else ""
        rows.append(("top-1 accuracy", f"{found['second']:.2%}", f"{found['replayed']:.2%}"))
        rows.append(("... of the first", f"{found['first']:.2%}", by))
    lines = [f"first       {report['first']}", f"second      {report['second']}", f"images      {report['images']}"]
    lines += ["", *table(rows), "", *table(_block_rows(free)), "", *table(_margin_rows(report["decisions"]))]
    return lines


def _block_rows(free: dict[str, Any]) -> list[tuple[str, ...]]:
    by_block = free["flipped_by_block"]
    rows: list[tuple[str, ...]] = [("flipped, by block", *(_NAMES[kind] for kind in by_block))]
    for block, shares in enumerate(zip(*by_block.values(), strict=True)):
        rows.append((str(block), *(f"{share:.3%}" for share in shares)))
    return rows


def _margin_rows(decisions: dict[str, Any]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [("logit margins of the first", *(_NAMES[kind] for kind in decisions))]
    for edge in next(iter(decisions.values()))["margins_below"] if decisions else ():
        rows.append((f"below {edge}", *(f"{kind['margins_below'][edge]:.3%}" for kind in decisions.values())))
    for key, name in (
        ("largest_flipped_margin", "largest that flipped"),
        ("logit_drift_rms", "drift, root mean square"),
        ("logit_drift_max", "drift, largest"),
    ):
        rows.append((name, *(f"{kind[key]:.2g}" for kind in decisions.values())))
    return rows
