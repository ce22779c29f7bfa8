"""What `adavit-run` is asked for, under the headings of its --help."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click
from cloup import option_group

from adavit.bundle.bundle import PRECISIONS
from adavit.console.options.types import Finite, Threads, labels_by_order
from adavit.runtime.backend import names as backend_names

__all__ = ["OPERATING", "RUN_EXAMPLES", "run_options"]

PATH = click.Path(path_type=Path)
OPERATING = ("record_policy", "replay_policy", "budget", "latency_ms", "profile", "draw")
"""Options of what one bundle is run or measured at."""
RUN_EXAMPLES = """
\b
Examples:
  adavit-run
  adavit-run BUNDLE --images photos/
  adavit-run BUNDLE --images photos/ --budget 0.4 --json report.json
  adavit-run BUNDLE --images photos/ --draw kept.png
  adavit-run BUNDLE --images photos/ --batch 32 --backend openvino
  adavit-run --compare FP32 FP16 INT8 --images photos/

ADAVIT_PROGRESS=0 in the environment turns progress off.
"""
Function = TypeVar("Function", bound=Callable[..., Any])

INPUT = option_group(
    "Input",
    click.option(
        "--images",
        type=PATH,
        multiple=True,
        help="Image file or folder; a folder of class folders gives accuracy too. May be given several times.",
    ),
    labels_by_order,
)
OPERATING_POINT = option_group(
    "Operating point",
    click.option(
        "--budget",
        type=Finite(0, 1, min_open=True),
        metavar="SHARE",
        help="Mean share of the dense MACs to run at, such as 0.4.",
    ),
    click.option(
        "--latency-ms",
        type=Finite(0, min_open=True),
        metavar="MS",
        help="Run at the budget that takes so many milliseconds a run.",
    ),
    click.option(
        "--replay-policy", type=PATH, metavar="FILE", help="Follow the policy of --record-policy instead of deciding."
    ),
)
MEASUREMENT = option_group(
    "Measurement",
    click.option(
        "--batch", type=click.IntRange(1, 4096), metavar="N", default=1, show_default=True, help="Images per run."
    ),
    click.option("--threads", type=Threads(), metavar="N", help="CPU threads.  [default: all this process may use]"),
    click.option(
        "--parallel",
        type=click.Choice(["auto", "operators", "samples"]),
        default="auto",
        show_default=True,
        help="Threads share every operator, or each runs an image; auto: the first for single images, else the other.",
    ),
    click.option("--seconds", type=Finite(0.01), metavar="X", help="Length of the measurement.  [default: 3]"),
    click.option("--iterations", type=click.IntRange(1), metavar="N", help="Measured runs, instead of --seconds."),
    click.option(
        "--warmup",
        type=click.IntRange(0),
        metavar="N",
        default=3,
        show_default=True,
        help="Runs before the measurement.",
    ),
    click.option(
        "--dense/--no-dense", default=None, help="Measure the dense twin in turns.  [default: where it is there]"
    ),
)
OUTPUT = option_group(
    "Output",
    click.option(
        "--top", type=click.IntRange(1, 100), metavar="N", default=1, show_default=True, help="Classes shown per image."
    ),
    click.option("--draw", type=PATH, metavar="FILE.png", help="Draw what the first 8 images keep in each block."),
    click.option("--json", "json_file", metavar="FILE|-", help="Write the numbers as JSON; - is standard output."),
    click.option(
        "--profile",
        is_flag=False,
        flag_value="",
        metavar="[FILE]",
        help="Show where the time goes; FILE becomes a trace that Perfetto opens.",
    ),
    click.option("--record-policy", type=PATH, metavar="FILE", help="Write what every image used (npz)."),
)
BACKEND = option_group(
    "Backend",
    click.option(
        "--backend",
        type=click.Choice([*backend_names(), "auto"]),
        default="onnxruntime",
        show_default=True,
        help="What runs the graphs. auto measures what is installed, once, and takes the fastest.",
    ),
    click.option(
        "--provider",
        help="Execution provider of ONNX Runtime, such as CUDAExecutionProvider; fp32 or bf16 of OpenVINO.  "
        "[default: the CPU's]",
    ),
    click.option(
        "--precision",
        type=click.Choice(PRECISIONS),
        help="Which of the BUNDLE's precisions to run.  [default: its first; with --compare, all of them]",
    ),
    click.option(
        "--specialise/--no-specialise",
        default=True,
        show_default=True,
        help="Prepare for what the images use most, before the measurement.",
    ),
    click.option(
        "--dispatch",
        type=click.Choice(["auto", "exact", "capacity", "conditional"]),
        default="auto",
        show_default=True,
        help="How batches are driven on a GPU; auto measures the ways, once for each batch size.",
    ),
    click.option(
        "--trust-engines",
        is_flag=True,
        help="TensorRT: run engines that were not built on this machine. They are native code.",
    ),
)
COMPARISON = option_group(
    "Compare bundles",
    click.option(
        "--compare",
        is_flag=True,
        help="Compare size, speed, classes and decisions of BUNDLEs, each in all its precisions, and say which to ship "
        "here.",
    ),
)


def run_options(command: Function) -> Function:
    """Adds the options to the command."""
    for group in (COMPARISON, BACKEND, OUTPUT, MEASUREMENT, OPERATING_POINT, INPUT):
        command = group(command)
    return command
