"""The command `adavit-train`; torch is imported only once there is work to do."""

from __future__ import annotations

from typing import Any

import click

import adavit
from adavit import console
from adavit.option_types import labels_by_order
from adavit.training.options import ABOVE_0, AMOUNT, PATH, POSITIVE, SHARE, data_options, run_options, teacher_options

__all__ = ["main"]

KINDS = ("tokens", "heads", "sublayers")


class Group(console.Command, click.Group):
    """A group whose subcommands fail in one line, as the other commands of this package do."""


@click.group(cls=Group, name="adavit-train")
@click.version_option(adavit.__version__)
def main() -> None:
    """Train an AdaViT: a dense backbone, then its policies jointly with it."""


@main.command()
@run_options
@click.option("--from", "source", type=PATH, help="Weights to start from: T2T-ViT, DeiT, timm or an earlier run.")
@click.option("--heads", type=POSITIVE, help="Attention heads.  [default: width / 64]")
@click.option("--image-size", type=POSITIVE, help="Side in pixels.  [default: that of --from, or 28]")
@click.option("--patch-size", type=POSITIVE, help="Pixels per patch side.  [default: that of --from, or 4]")
@click.option("--stem", type=click.Choice(["patch", "t2t"]), help="Stem.  [default: that of --from, or patch]")
@click.option("--width", type=POSITIVE, help="Token width.  [default: that of --from, or 192]")
@click.option("--depth", type=POSITIVE, help="Blocks; fewer than --from has take evenly spaced ones.  "
              "[default: that of --from, or 8]")  # fmt: skip
@click.option("--hidden", type=POSITIVE, help="Hidden width of the MLP.  [default: that of --from, or 3 x width]")
@click.option("--start", "initial", type=click.Choice(["normal", "mimetic"]), default="normal", show_default=True,
              help="Weights without --from: small and random, or with attention that looks at its own place, "
              "which suits little data.")  # fmt: skip
@teacher_options
def dense(**options: Any) -> None:
    """Train a dense backbone, from scratch or from other weights."""
    from adavit.training import runs

    runs.train_dense(options)


@main.command()
@run_options
@click.option("--from", "source", type=PATH, required=True, help="Dense weights: the start, and the teacher.")
@teacher_options
@click.option("--heads", type=POSITIVE, help="Attention heads, where the weights do not tell.")
@click.option("--patch-size", type=POSITIVE, help="Pixels per patch side.  [default: that of --from]")
@click.option("--policies", default=",".join(KINDS), show_default=True, help="Which policies to train.")
@click.option("--budget", type=SHARE, help="Share of the dense MACs; sets the targets that are not given.")
@click.option("--token-target", type=SHARE, help="Mean usage of tokens.  [default: by --budget, or 0.5]")
@click.option("--head-target", type=SHARE, help="Mean usage of heads.  [default: by --budget, or 0.5]")
@click.option("--sublayer-target", type=SHARE, help="Mean usage of sub-layers.  [default: by --budget, or 0.5]")
@click.option("--token-weight", type=AMOUNT, default=2.0, show_default=True, help="Of the token usage loss.")
@click.option("--head-weight", type=AMOUNT, default=2.0, show_default=True, help="Of the head usage loss.")
@click.option("--sublayer-weight", type=AMOUNT, default=2.0, show_default=True, help="Of the sub-layer usage loss.")
@click.option("--temperature", type=ABOVE_0, default=5.0, show_default=True,
              help="Of the Gumbel-sigmoid.")  # fmt: skip
@click.option("--anneal", type=AMOUNT, default=0.3, show_default=True,
              help="Share of the run in which the noise falls to 0; 0 keeps it.")  # fmt: skip
@click.option("--floor", type=SHARE, default=0.0, show_default=True, help="Least usage of a head or sub-layer.")
@click.option("--floor-weight", type=AMOUNT, default=0.0, show_default=True, help="Of that floor.")
@click.option("--entropy-weight", type=AMOUNT, default=0.0, show_default=True, help="Of the decisions' entropy.")
@click.option("--diversity-weight", type=AMOUNT, default=0.0, show_default=True, help="Of the diversity term.")
@click.option("--attention-weight", type=AMOUNT, default=0.0, show_default=True, help="Of the teacher's attention.")
@click.option("--hidden-weight", type=AMOUNT, default=0.0, show_default=True, help="Of the teacher's hidden states.")
@click.option("--policy-rate", type=AMOUNT, default=10.0, show_default=True,
              help="Learning rate of the decision layers over that of the rest.")  # fmt: skip
def adapt(**options: Any) -> None:
    """Train policies jointly with a backbone that starts dense, the dense model teaching."""
    from adavit.training import runs

    runs.train_adaptive(options)


@main.command()
@click.argument("source", type=PATH, metavar="CHECKPOINT|BUNDLE")
@data_options
@labels_by_order
@click.option(
    "--dense",
    type=PATH,
    metavar="CHECKPOINT|BUNDLE",
    help="A dense model to compare with; its loss rates how hard an image is.",
)
@click.option(
    "--baseline",
    type=PATH,
    metavar="CHECKPOINT|BUNDLE",
    help="Another model to compare with, such as a dense one shrunk to the same MACs.",
)
@click.option("--heads", type=POSITIVE, help="Attention heads, where the checkpoint does not tell.")
@click.option("--images", type=click.IntRange(min=0), default=0, show_default=True, help="Test images; 0 for all.")
@click.option("--batch", type=POSITIVE, default=128, show_default=True, help="Images at a time.")
@click.option("--random/--no-random", default=True, show_default=True, help="Compare with a random policy.")
@click.option("--seed", type=click.IntRange(0, 2**31 - 1), default=0, show_default=True, help="Of that policy.")
@click.option("--plot", type=PATH, help="Write a plot (PNG).")
@click.option("--json", "json_file", metavar="FILE|-", help="Write the report as JSON; - is standard output.")
def evaluate(json_file: str | None, **options: Any) -> None:
    """Report accuracy, MACs, and how a policy depends on its input, of a checkpoint or an exported bundle."""
    from adavit.training import runs

    report = runs.evaluate(options)
    if json_file != "-":
        for line in runs.report_lines(report):
            click.echo(line)
    console.write_json(report, json_file)
