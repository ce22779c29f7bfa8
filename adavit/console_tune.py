"""What `adavit-run --tune` prints."""

from __future__ import annotations

from typing import Any

from adavit.console import table

__all__ = ["tune_lines"]

KINDS = {"attention": "attention", "mlp": "MLP"}
BLOCKS = KINDS | {"both": "attention and MLP"}
OWN = {"sets": "sets of heads", "sizes": "sizes of blocks"}


def tune_lines(report: dict[str, Any]) -> list[str]:
    """The tables of a tuning: engines' times by tokens and heads, what policies gain, and the plan."""
    rows = [("half dropped", "MACs", "ms", "speedup", "ideal", "efficiency")]
    for gain in report["gains"]:
        numbers = f"{gain['speedup']:.2f}x", f"{gain['ideal']:.2f}x", f"{gain['speedup'] / gain['ideal']:.2f}"
        rows.append((gain["dropped"], f"{gain['macs']:.0%}", f"{gain['ms']:.2f}", *numbers))
    plans = ", ".join(f"{name} {time:.2f} ms an image" for name, time in report["plans_ms"].items())
    return [
        *(_block_lines(report["staircase"]) if "blocks" in report["staircase"] else _sublayer_lines(report)),
        *table(rows),
        "ideal: dense / executed MACs; efficiency: speedup / ideal",
        "",
        f"model       {report['model']} on {report['backend']}, {report['threads']} threads",
        f"plan        {report['taken']} is taken ({plans}); "
        + (f"kept in {report['plan']}" if report["plan"] else "not kept"),
        *([_own_engines(report["own_engines"], report["gathers"])] if report["own_engines"] else []),
    ]


def _own_engines(what: str, plan: dict[str, Any]) -> str:
    """What the plan has engines for."""
    found = f"{what:11} {len(plan[what])} {OWN[what]} have engines of their own"
    return found if plan[what] else found + "; --images finds the frequent ones"


def _block_lines(stairs: dict[str, Any]) -> list[str]:
    """The tables of whole blocks: by what runs, times by tokens and heads."""
    heads, lines = [f"{count} head{'s' * (count > 1)}" for count in stairs["heads"]], list[str]()
    for kind, by_heads in stairs["blocks"].items():
        rows: list[tuple[str, ...]] = [(f"{BLOCKS[kind]}, ms", *heads)]
        for row, tokens in enumerate(stairs["tokens"]):
            rows.append((f"{tokens} tokens", *(f"{times[row]:.3f}" for times in by_heads)))
        lines += [*table(rows), ""]
    rows = [("new set of heads, ms", *heads)]
    rows += [(KINDS[kind], *(f"{time:.3f}" for time in times)) for kind, times in stairs["weights"].items()]
    return [*lines, *table(rows), ""] if stairs["weights"] else lines


def _sublayer_lines(report: dict[str, Any]) -> list[str]:
    """The tables of sub-layers: times with all heads and with gathered ones, and which numbers of heads gather."""
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
    return lines
