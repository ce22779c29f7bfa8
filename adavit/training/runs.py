"""What `adavit-train dense` and `adavit-train adapt` do with their options."""

from __future__ import annotations

import shlex
import warnings
from pathlib import Path
from typing import Any

import click

from adavit import console
from adavit.model import load_checkpoint, save_safetensors
from adavit.training import start
from adavit.training.budget import KINDS
from adavit.training.checks import check_output, check_packages, warn_of_full_disk
from adavit.training.configure import (
    choose_policies,
    choose_teacher,
    policy_settings,
    read_class_names,
    run_settings,
    set_threads,
)
from adavit.training.data import open_images
from adavit.training.distributed import World, join_world
from adavit.training.log import Reporter, read_log
from adavit.training.loop import LOG, Intervals, Trainer
from adavit.training.plot import plot_log
from adavit.training.run_summary import Pictures, expected_stages, measure_pictures, run_lines
from adavit.training.state import CHECKPOINT
from adavit.training.teacher import Teacher, identify_teacher, open_teacher

__all__ = ["train_adaptive", "train_dense"]

Options = dict[str, Any]

SHAPES = ("stem", "image_size", "patch_size", "width", "depth", "heads", "hidden")
WEIGHTS, PLOT = "weights.safetensors", "plot.png"
SHRINKING = 1.5
"""Times its side in training that a picture's may be before a run from other weights says so."""


class Data:
    """The training and test images of a run, opened after the checks that need none of them."""

    def __init__(self, options: Options, world: World) -> None:
        set_threads(options)
        if world.is_main:
            check_packages("matplotlib", "safetensors")
            check_output(options["output"], (CHECKPOINT, WEIGHTS, PLOT), options["resume"])
        if options["batch"] % world.size or (options["mixup"] and options["batch"] // world.size % 2):
            parts = "an even number" if options["mixup"] else "one"
            raise click.UsageError(
                f"--batch {options['batch']} does not divide over {world.size} processes, {parts} each"
            )
        names = read_class_names(options["labels"])
        self.train = open_images(options["data"], "train", options["corrupt"], names)
        self.test = open_images(options["data"], "test", options["corrupt"], self.train.classes)
        self.pictures = measure_pictures(self.train)

    @property
    def classes(self) -> int:
        """How many there are."""
        return len(self.train.classes)


def train_dense(options: Options, progress: console.Progress) -> None:
    """`adavit-train dense`."""
    with join_world() as world:
        data = Data(options, world)
        given = {name: options[name] for name in SHAPES if options[name] is not None}
        source = load_checkpoint(options["source"], options["heads"]) if options["source"] else None
        arch = start.dense_shapes(source.arch if source else None, given, data.classes, data.pictures.side)
        mimetic = options["initial"] == "mimetic"
        model = start.fit(source, arch, options["seed"]) if source else start.new_model(arch, options["seed"], mimetic)
        teacher = open_teacher(options["teacher"], arch) if options["teacher"] else None
        settings = run_settings(options, arch, len(data.train.labels), None, teacher)
        sources = _sources(options, data, teacher)
        if source and not options["image_size"] and world.is_main:
            _warn_of_shrinking(data.pictures, arch.image_size)
        _run(Trainer(model, settings, world, options["output"], teacher, sources), data, options, progress)


def train_adaptive(options: Options, progress: console.Progress) -> None:
    """`adavit-train adapt`."""
    with join_world() as world:
        data = Data(options, world)
        source = load_checkpoint(options["source"], options["heads"])
        kinds = choose_policies(options["policies"])
        arch = start.adaptive_shapes(source.arch, kinds, data.classes, options["patch_size"])
        policy = policy_settings(options, arch, kinds)
        if policy.distils_features and options["token_drop"]:
            raise click.UsageError(
                "--token-drop leaves a teacher nothing to compare inside; "
                "leave --attention-weight and --hidden-weight at 0"
            )
        teacher = choose_teacher(options, source, arch, policy)
        settings = run_settings(options, arch, len(data.train.labels), policy, teacher)
        model = start.fit(source, arch, options["seed"])
        sources = _sources(options, data, teacher)
        _run(Trainer(model, settings, world, options["output"], teacher, sources), data, options, progress)


def _run(trainer: Trainer, data: Data, options: Options, progress: console.Progress) -> None:
    """Trains, then writes the plot and the averaged weights."""
    folder, is_main = options["output"], trainer.world.is_main
    if options["resume"]:
        trainer.resume()
    folder.mkdir(parents=True, exist_ok=True)
    intervals = Intervals(
        options["log_every"], options["save_every"], options["evaluate_every"], options["evaluate_images"]
    )

    def say(line: str) -> None:
        progress.clear()
        click.echo(console.printable(line), err=True)

    if is_main:
        warn_of_full_disk(folder, sum(weight.nbytes for weight in trainer.model.parameters()))
        teacher = options["teacher"] or options["source"] if trainer.teacher else None
        for line in run_lines(trainer, data.train, data.test, data.pictures, teacher):
            say(line)
    reporter = Reporter(progress, say) if is_main else Reporter()
    progress.expect(expected_stages(trainer, data.train, data.test, intervals))
    try:
        trainer.run(data.train, data.test, intervals, options["workers"], reporter)
        progress.clear()
        if is_main:
            _finish(trainer, data.train.classes, folder)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(_after_interrupt(trainer)) from None
    if is_main:
        say(f"next: {_next_step(trainer, options)}")


def _after_interrupt(trainer: Trainer) -> str:
    if not trainer.world.is_main:
        return ""
    if trainer.saved is None:
        return "nothing is saved yet"
    return f"go on with --resume (step {trainer.saved:,} is saved)"


def _next_step(trainer: Trainer, options: Options) -> str:
    """The command, or the commands, for the weights that a run has written; words in capitals are the reader's."""
    weights, data = str(options["output"] / WEIGHTS), ["--data", str(options["data"])]
    if trainer.settings.policy:
        evaluated = shlex.join(["adavit-train", "evaluate", weights, *data])
        return f"{shlex.join(['adavit-export', weights])} --output BUNDLE, or {evaluated}"
    labels = ["--labels", str(options["labels"])] if options["labels"] else []
    return shlex.join(["adavit-train", "adapt", *data, *labels, "-o", "RUN", "--from", weights])


def _finish(trainer: Trainer, classes: list[str], folder: Path) -> None:
    notes = {"accuracy": f"{trainer.metric:.2f}", "classes": classes, "crop_ratio": trainer.settings.crop}
    save_safetensors(trainer.average, folder / WEIGHTS, notes)
    records = read_log(folder / LOG)
    plot_log(records, folder / PLOT)
    if offsets := _offsets(records):
        click.echo(f"decision biases moved to meet the usage targets: {offsets}")
    click.echo(f"{folder / WEIGHTS}: {trainer.metric:.2f} % of the test images right")


def _offsets(records: list[dict[str, Any]]) -> str:
    """What a finished run's biases were moved by, in words."""
    last = records[-1] if records else {}
    found = [(kind, last[f"offset_{kind}"]) for kind in KINDS if f"offset_{kind}" in last]
    return ", ".join(f"{kind} {offset:+.3f}" for kind, offset in found)


def _sources(options: Options, data: Data, teacher: Teacher | None) -> dict[str, str]:
    """What a run learns from, in words, wherever it lies."""
    found = {"train": data.train.identity, "test": data.test.identity}
    return found if teacher is None else {**found, "teacher": identify_teacher(options["teacher"] or options["source"])}


def _warn_of_shrinking(pictures: Pictures, side: int) -> None:
    if pictures.side >= SHRINKING * side:
        warnings.warn(
            f"pictures of {pictures} are trained at {side} x {side}, the size of --from; "
            "a larger --image-size keeps more of them",
            stacklevel=2,
        )
