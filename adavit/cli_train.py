"""The command `adavit-train`; torch is imported only once there is work to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import cloup

import adavit
from adavit.console import output as console
from adavit.console.options.train import (
    adaptive_options,
    comparison_options,
    data_options,
    dense_options,
    report_options,
    run_options,
    teacher_options,
    training_options,
)

__all__ = ["main"]


class Group(console.Command, cloup.Group):
    """A group whose subcommands fail in one line, as the other commands of this package do."""


def _examples(*lines: str) -> str:
    """Command lines as the end of a help text."""
    return "\n".join(("\b", "Example:" if len(lines) == 1 else "Examples:", *(f"  {line}" for line in lines)))


@cloup.group(
    cls=Group,
    name="adavit-train",
    epilog=_examples(
        "adavit-train dense --data DATA -o DENSE",
        "adavit-train adapt --data DATA -o RUN --from DENSE/weights.safetensors --budget 0.5",
        "adavit-train evaluate RUN/weights.safetensors --data DATA",
    ),
)
@click.version_option(adavit.__version__)
def main() -> None:
    """Train an AdaViT: a dense backbone, then its policies jointly with it."""


@main.command(epilog=_examples("adavit-train dense --data DATA -o DENSE --epochs 20"))
@data_options(output=True)
@dense_options
@training_options
@teacher_options
@run_options
def dense(**options: Any) -> None:
    """Train a dense backbone, from scratch or from other weights."""
    from adavit.training import runs

    with console.Progress() as progress:
        runs.train_dense(options, progress)


@main.command(epilog=_examples("adavit-train adapt --data DATA -o RUN --from DENSE/weights.safetensors --budget 0.5"))
@data_options(output=True)
@adaptive_options
@training_options
@teacher_options
@run_options
def adapt(**options: Any) -> None:
    """Train policies jointly with a backbone that starts dense, the dense model teaching."""
    from adavit.training import runs

    with console.Progress() as progress:
        runs.train_adaptive(options, progress)


@main.command(
    epilog=_examples(
        "adavit-train evaluate RUN/weights.safetensors --data DATA --dense DENSE/weights.safetensors",
        "adavit-train evaluate BUNDLE --data DATA --plot plot.png --json report.json",
    )
)
@click.argument("source", type=click.Path(path_type=Path), metavar="CHECKPOINT|BUNDLE")
@data_options(output=False)
@comparison_options
@report_options
def evaluate(json_file: str | None, **options: Any) -> None:
    """Report accuracy, MACs and usage of a checkpoint or an exported bundle, and how its policy depends on the input.

    DATA needs only its val/ (or test/), or the two IDX files of its test images.
    """
    console.check_targets({"--json": json_file, "--plot": options["plot"]})
    from adavit.training import evaluation

    with console.Progress() as progress:
        report = evaluation.evaluate(options, progress)
    if json_file != "-":
        for line in evaluation.report_lines(report):
            click.echo(console.printable(line))
    console.write_json(report, json_file)
