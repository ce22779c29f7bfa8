"""What `adavit-run` prints of a run and of its profile."""

from __future__ import annotations

from typing import Any

from adavit.console.output import table

__all__ = ["run_lines"]

NOISE = "random noise, so that accuracy means nothing, and photographs may keep more or less; give --images"
FEWEST_RUNS = 10
"""Fewer runs tell no speedup."""
COLUMNS = {
    "ideal": "ideal", "padding": "padding", "excess": "slower", "graphs": "graphs", "waiting": "fetch",
    "overhead": "calls", "total": "total",
}  # fmt: skip
"""The columns of a profile, and what they are called in the report."""


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
            spread = ", evenly of all classes" if report["accuracy"] else ""
            lines[-1:] = [f"{len(report['predictions'])} images{spread}; {more} more were run", ""]
    lines += _latency_lines(report)
    if device := report["device"]:
        enqueue, gpu, sync = (device[f"{kind}_ms"] for kind in ("enqueue", "gpu", "sync"))
        lines.append(f"of p50, ms  {enqueue:.2f} enqueuing work, {gpu:.2f} on the GPU, {sync:.2f} waiting for it")
    if found := report["dispatch"]:
        lines += _dispatch_lines(found)
    used = report["usage"]
    macs, prepared = report["macs"], report["prepared"]
    lines += [
        "",
        f"model       {report['model']} in {report['precision']} on {report['backend']}, batch {report['batch']}, "
        f"{_count(report['threads'], 'thread')}, {_count(report['iterations'], 'run')}",
        *([f"input       {NOISE}"] if report["input"] == "random" else []),
        *([f"backend     {report['choice']['reason']}"] if report["choice"] else []),
        *([f"prepared    {_count(prepared, 'graph')} for what images use most"] if prepared else []),
        f"MACs        {macs['executed_mean'] / 1e9:.3f} G of {macs['dense'] / 1e9:.3f} G dense "
        f"({macs['executed_mean'] / macs['dense']:.1%})",
        f"usage       tokens {used['tokens']:.1%}, heads {used['heads']:.1%}, sub-layers {used['sublayers']:.1%}",
    ]
    if found := report["budget"]:
        lines.append(
            f"budget      {found['macs']:.1%} of the dense MACs, on average over images like those it was found on"
        )
    if not report["policies"]:
        lines.append("policies    none: a dense model, which skips nothing; adavit-train adapt trains policies")
    if report["speedup"] is not None:
        lines.append(
            f"speedup     {report['speedup']:.2f}x over the dense twin; ideal {report['ideal_speedup']:.2f}x "
            f"(dense / executed MACs); efficiency {report['efficiency']:.2f} (speedup / ideal)"
        )
        if report["iterations"] < FEWEST_RUNS:
            lines.append(f"            of fewer than {FEWEST_RUNS} runs: too few to rely on; give more --seconds")
    if found := report["accuracy"]:
        by = ", labelled by the order of their folders" if report["labels_by"] == "order" else ""
        top5 = "" if found["top5"] is None else f", top-5 {found['top5']:.2%}"
        lines.append(f"accuracy    top-1 {found['top1']:.2%}{top5} of {found['n']} images{by}")
    if report["drawn"]:
        lines.append(f"drawn       {report['drawn']}")
    if found := report["profile"]:
        lines += ["", *_profile_lines(found)]
    return lines


def _dispatch_lines(found: dict[str, Any]) -> list[str]:
    """How batches went on a device."""
    ways, again = " and ".join(found["ways"]), found["overflowed_images"]
    lines = [f"dispatch    {ways}; blocks multiplied {found['padding']:.2f} times the MACs that the policies ask for"]
    if again:
        share = found["overflowed_batches"] / found["batches"]
        lines.append(
            f"overflows   in {share:.1%} of the batches: {_count(again, 'image')} of {found['images']:,} ran again, "
            f"{found['macs_of_overflows'] / found['macs_multiplied']:.1%} of what was multiplied"
        )
    return lines


def _count(count: int, what: str) -> str:
    return f"{count:,} {what}{'s' * (count > 1)}"


def _profile_lines(profile: dict[str, Any]) -> list[str]:
    """The waterfall: what is left of a row's total after the ideal is loss."""
    rows: list[tuple[str, ...]] = [("ms", *COLUMNS)]
    for part in (*profile["parts"], {"part": "total", **profile["total"]}):
        rows.append((part["part"], *(f"{part[f'{key}_ms']:.2f}" for key in COLUMNS.values())))
    return [
        *table(rows),
        f"mean of {profile['runs']} runs, {profile['disturbed_runs']} disturbed ones left out; the timers' own cost: "
        f"{profile['timers_ms']:.2f} ms",
        "",
        f"ideal       the MACs that the policy asks for, at the dense twin's {profile['dense_gmacs_per_second']:.0f} "
        f"GMAC/s ({profile['dense_ms']:.2f} ms)",
        "padding     the MACs of further tokens, where a backend rounds their number up",
        "excess      what graphs take beyond ideal and padding; below 0, they are faster than the dense twin",
        "graphs      ideal + padding + excess: the time that graphs take",
        "waiting     bringing the logits of decisions and classes to the host",
        "overhead    all between these calls",
    ]


def _latency_lines(report: dict[str, Any]) -> list[str]:
    rows: list[tuple[str, ...]] = [("latency, ms", "p50", "p90", "p95", "p99", "mean", "images/s")]
    for name, part in (("adaptive" if report["policies"] else "dense", report), ("dense twin", report["dense"])):
        if part:
            values = [f"{part['latency_ms'][key]:.2f}" for key in ("p50", "p90", "p95", "p99", "mean")]
            rows.append((name, *values, f"{part['throughput']:.1f}"))
    return table(rows)
