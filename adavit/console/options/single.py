"""What `adavit-export` is asked for in a single file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from adavit.console.options.types import Finite

__all__ = ["SINGLE", "single_options"]

Function = TypeVar("Function", bound=Callable[..., Any])

SINGLE = ("budget", "budget_input", "with_policy", "domain", "max_size", "weights", "ort_format")
"""Options that only a single file follows."""


def single_options(command: Function) -> Function:
    """Adds the options to a command."""
    for option in reversed(
        [
            click.option(
                "--single-file",
                type=click.Path(path_type=Path),
                metavar="OUT.onnx",
                help="Write the model as one ONNX file, and OUT.json beside it, in the place of a bundle.",
            ),
            click.option(
                "--budget",
                type=Finite(0, 1, min_open=True),
                metavar="SHARE",
                help="Share of the dense MACs that the file is for.  [default: the trained policy]",
            ),
            click.option("--budget-input", is_flag=True, help="Give the file a required input `budget` [B]."),
            click.option("--with-policy", is_flag=True, help="Give the file outputs for what it kept, and its MACs."),
            click.option(
                "--domain",
                type=click.Choice(("standard", "onnxruntime")),
                default="standard",
                show_default=True,
                help="Operators: ONNX's own alone, or ONNX Runtime's too.",
            ),
            click.option(
                "--max-size",
                type=Finite(1, 4),
                metavar="X",
                default=1.0,
                show_default=True,
                help="Times the weights' size that constant weights of frequent head sets may make the file.",
            ),
            click.option(
                "--weights",
                type=click.Choice(("fp32", "fp16")),
                help="How weights are stored; fp16 halves the download.  [default: fp32]",
            ),
            click.option("--ort-format", is_flag=True, help="Write OUT.ort too, ONNX Runtime's own format."),
        ]
    ):
        command = option(command)
    return command
