"""What `adavit-run --tune` prints."""

from __future__ import annotations

from typing import Any

from adavit.console import table

__all__ = ["tune_lines"]

KINDS = {"attention": "attention", "mlp": "MLP"}


def tune_lines(report: dict[str, Any]) -> list[str]:
    """The tables of a tuning: engines' times by tokens and heads, what policies gain, and the plan."""
    stairs = report["staircase"]
    heads = range(1, len(stairs["weights"]["mlp"]) + 1)
    lines: list[str] = []
    for kind, title in KINDS.items():
        columns = (f"{title}, ms", "all heads", *(f"{count} gathered" for count in heads), "gathers")
        rows: list[tuple[str, ...]] = [columns]
        for row, tokens in enumerate(stairs["tokens"]):
            gathered = [times[row] for times in stairs["gathered"][kind]]
            chosen = [str(count) for count in heads if report["gathers"][kind][count][tokens] == "1"]
            times = (f"{time:.3f}" for time in (stairs["masked"][kind][row], *gathered))
            rows.append((f"{tokens} tokens", *times, " ".join(chosen) or "none"))
        weights = (f"{time:.3f}" for time in stairs["weights"][kind])
        lines += [*table([*rows, ("new set of heads", "", *weights, "")]), ""]
    rows = [("half dropped", "MACs", "ms", "speedup", "ideal", "efficiency")]
    for gain in report["gains"]:
        numbers = f"{gain['speedup']:.2f}x", f"{gain['ideal']:.2f}x", f"{gain['speedup'] / gain['ideal']:.2f}"
        rows.append((gain["dropped"], f"{gain['macs']:.0%}", f"{gain['ms']:.2f}", *numbers))
    sets = f"{len(report['gathers']['sets'])} sets of heads have engines of their own"
    if not report["gathers"]["sets"]:
        sets += "; --images finds the frequent ones"
    plans = ", ".join(f"{name} {time:.2f} ms an image" for name, time in report["plans_ms"].items())
    return [
        *lines,
        *table(rows),
        "",
        f"model       {report['model']} on {report['backend']}, {report['threads']} threads",
        f"plan        {report['taken']} is taken ({plans}); "
        + (f"kept in {report['plan']}" if report["plan"] else "not kept"),
        *([f"sets        {sets}"] if report["engines_by_set"] else []),
    ]
