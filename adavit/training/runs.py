"""What the subcommands of `adavit-train` do with their options."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import torch

from adavit.architecture import Architecture
from adavit.files import find_folder
from adavit.model import AdaViT, load_checkpoint, save_safetensors
from adavit.model import policy as P
from adavit.model.checkpoint import read_classes, read_crop
from adavit.reading import read_labels
from adavit.runtime import Runtime, load
from adavit.runtime.class_folders import folded
from adavit.runtime.cpus import usable_cpus
from adavit.runtime.demo import names_demo
from adavit.runtime.images import Preprocessor
from adavit.training import start
from adavit.training.augment import usual_crop
from adavit.training.budget import KINDS, targets_for
from adavit.training.data import LabelledImages, open_images
from adavit.training.distributed import World, join_world
from adavit.training.errors import DataError, TrainingError
from adavit.training.loader import evaluation_batches, spread
from adavit.training.log import read_log
from adavit.training.loop import CHECKPOINT, LOG, Intervals, Trainer
from adavit.training.plot import plot_evaluation, plot_log
from adavit.training.predict import Predictions, predict, predict_bundle
from adavit.training.report import RandomPolicy, evaluation_report
from adavit.training.settings import PUBLISHED_TARGET, PolicySettings, Settings
from adavit.training.teacher import OnnxTeacher, Teacher, check_teacher, identify_teacher, open_teacher

__all__ = ["evaluate", "report_lines", "train_adaptive", "train_dense"]

Options = dict[str, Any]

OPTION_NAMES = {"tokens": "token", "heads": "head", "sublayers": "sublayer"}
SHAPES = ("stem", "image_size", "patch_size", "width", "depth", "heads", "hidden")
RUN_OPTIONS = (
    "batch", "clip", "compile", "distillation_temperature", "ema", "final", "learning_rate", "mirror", "mixup",
    "precision", "seed", "smoothing", "token_drop", "warmup", "weight_decay",
)  # fmt: skip
POLICY_OPTIONS = (
    "anneal", "attention_weight", "diversity_weight", "entropy_weight", "floor", "floor_weight", "hidden_weight",
    "temperature",
)  # fmt: skip
WEIGHTS, PLOT = "weights.safetensors", "plot.png"


def train_dense(options: Options) -> None:
    """`adavit-train dense`."""
    with join_world() as world:
        train, test = _open_data(options, world)
        given = {name: options[name] for name in SHAPES if options[name] is not None}
        source = load_checkpoint(options["source"], options["heads"]) if options["source"] else None
        arch = start.dense_shapes(source.arch if source else None, given, len(train.classes))
        mimetic = options["initial"] == "mimetic"
        model = start.fit(source, arch, options["seed"]) if source else start.new_model(arch, options["seed"], mimetic)
        teacher = open_teacher(options["teacher"], arch) if options["teacher"] else None
        settings = _settings(options, arch, len(train.labels), None, teacher)
        sources = _sources(options, train, test, teacher)
        _run(Trainer(model, settings, world, options["output"], teacher, sources), train, test, options)


def train_adaptive(options: Options) -> None:
    """`adavit-train adapt`."""
    with join_world() as world:
        train, test = _open_data(options, world)
        source = load_checkpoint(options["source"], options["heads"])
        kinds = _kinds(options["policies"])
        arch = start.adaptive_shapes(source.arch, kinds, len(train.classes), options["patch_size"])
        policy = _policy_settings(options, arch, kinds)
        if policy.listens and options["token_drop"]:
            raise click.UsageError(
                "--token-drop leaves a teacher nothing to compare inside; "
                "leave --attention-weight and --hidden-weight at 0"
            )
        teacher = _teacher(options, source, arch, policy)
        settings = _settings(options, arch, len(train.labels), policy, teacher)
        model = start.fit(source, arch, options["seed"])
        sources = _sources(options, train, test, teacher)
        _run(Trainer(model, settings, world, options["output"], teacher, sources), train, test, options)


def evaluate(options: Options) -> Options:
    """`adavit-train evaluate`: the report as plain values."""
    _set_threads(options)
    model = _open_model(options["source"], options["heads"], options["threads"])
    arch = _shapes(model)
    names = _class_names(options["labels"]) or _labels_of(model, options["source"])
    test = open_images(options["data"], "test", options["corrupt"], names, options["labels_by_order"])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def run(name: str, model: AdaViT | Runtime, chance: RandomPolicy | None = None) -> Predictions:
        shapes, chosen = _shapes(model), spread(len(test.labels), options["images"])
        if len(test.classes) != shapes.classes:
            raise DataError(f"{options['data']}: {len(test.classes)} classes, the model has {shapes.classes}")
        prepare = _preprocessor(model, options[name], options["crop"])
        batches = evaluation_batches(test, chosen, prepare, options["batch"])
        if isinstance(model, Runtime):
            return predict_bundle(model, batches, chance.policy if chance else None)
        return predict(model.to(device), batches, chance or P.decide)

    def other(name: str) -> tuple[Predictions, Architecture] | None:
        if not options[name]:
            return None
        model = _open_model(options[name], arch.heads, options["threads"])
        theirs = _labels_of(model, options[name])
        if _reordered(theirs, test.classes):
            raise DataError(f"{options[name]}: has the classes in another order; compare models of one order")
        return run(name, model), _shapes(model)

    found, dense, baseline = run("source", model), other("dense"), other("baseline")
    by_chance = options["random"] and arch.adapts
    chance = run("source", model, RandomPolicy(found, arch, options["seed"])) if by_chance else None
    report = evaluation_report(found, arch, test.classes, dense[0] if dense else None, chance, baseline)
    report["labels_by"] = test.labels_by
    if options["plot"]:
        plot_evaluation(report, options["plot"])
    return report


def report_lines(report: Options) -> list[str]:
    """An evaluation for people."""
    usage = ", ".join(f"{kind} {share:.1%}" for kind, share in report["usage"].items())
    by = ", labelled by the order of their folders" if report["labels_by"] == "order" else ""
    lines = [
        f"accuracy    {report['accuracy']:.2%} of {report['images']} images{by}",
        f"MACs        {report['macs']:.1%} of dense",
        f"usage       {usage}",
    ]
    if "dense" in report:
        lines.append(f"dense       {report['dense']['accuracy']:.2%}; {report['accuracy_of_dense']:.2%} of it kept")
    if "random_policy" in report:
        found = report["random_policy"]
        lines.append(f"random      {found['accuracy']:.2%} with a random policy at {found['macs']:.1%} of dense")
    if "baseline" in report:
        found = report["baseline"]
        lines.append(f"baseline    {found['accuracy']:.2%} at {found['macs']:.1%} of dense")
    for name, units in report["constant"].items():
        lines.append(f"{name:<6} used {', '.join(units) or 'none'}")
    easy, hard = report["difficulty"]["parts"][0], report["difficulty"]["parts"][-1]
    lines.append(
        f"easy, hard  {easy['macs']:.1%} of the MACs for the easiest fifth, {hard['macs']:.1%} for the hardest"
    )
    return lines


def _open_model(path: Path, heads: int | None, threads: int | None) -> AdaViT | Runtime:
    """A checkpoint's model, or the runtime of a bundle folder."""
    if names_demo(path) or find_folder(path).is_dir():
        return load(path, threads=threads, parallel="samples")
    return load_checkpoint(path, heads).eval()


def _labels_of(model: AdaViT | Runtime, path: Path) -> list[str]:
    """A model's class names: its bundle's, those that its weights note, or numbers."""
    if isinstance(model, Runtime):
        return list(model.labels)
    noted, count = read_classes(path), model.arch.classes
    return noted if len(noted) == count else [str(index) for index in range(count)]


def _reordered(theirs: list[str], classes: list[str]) -> bool:
    """Whether both are the same names in another order, as they are written or but for their case."""
    alike = [folded(name) for name in theirs], [folded(name) for name in classes]
    return any(one != other and sorted(one) == sorted(other) for one, other in (alike, (theirs, classes)))


def _preprocessor(model: AdaViT | Runtime, path: Path, crop: float | None) -> Preprocessor:
    """How a model's images are prepared: as its bundle says, or for a checkpoint in the usual way."""
    if isinstance(model, Runtime):
        own = model.bundle.preprocessor
        return replace(own, crop_ratio=crop or own.crop_ratio)
    return Preprocessor(model.arch.image_size, _crop(crop, path, model.arch.image_size))


def _crop(given: float | None, path: Path | None, side: int) -> float:
    """Share of the short side that evaluation keeps: the one asked for, else that of the weights, else the usual."""
    return given or (read_crop(path) if path else None) or usual_crop(side)


def _shapes(model: AdaViT | Runtime) -> Architecture:
    return model.architecture if isinstance(model, Runtime) else model.arch


def _run(trainer: Trainer, train: LabelledImages, test: LabelledImages, options: Options) -> None:
    """Trains, then writes the plot and the averaged weights."""
    folder, leads = options["output"], trainer.world.leads
    if options["resume"]:
        trainer.resume()
    elif any((folder / name).exists() for name in (CHECKPOINT, WEIGHTS, PLOT)):
        raise TrainingError(f"{folder}: holds a run; pass --resume to go on with it, or choose another --output")
    folder.mkdir(parents=True, exist_ok=True)
    intervals = Intervals(
        options["log_every"], options["save_every"], options["evaluate_every"], options["evaluate_images"]
    )
    trainer.run(train, test, intervals, options["workers"])
    if leads:
        _write_weights(trainer, train.classes, folder / WEIGHTS)
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


def _write_weights(trainer: Trainer, classes: list[str], path: Path) -> None:
    notes = {"accuracy": f"{trainer.metric:.2f}", "classes": classes, "crop_ratio": trainer.settings.crop}
    save_safetensors(trainer.average, path, notes)


def _open_data(options: Options, world: World) -> tuple[LabelledImages, LabelledImages]:
    _set_threads(options)
    if options["batch"] % world.size or (options["mixup"] and options["batch"] // world.size % 2):
        parts = "an even number" if options["mixup"] else "one"
        raise click.UsageError(f"--batch {options['batch']} does not divide over {world.size} processes, {parts} each")
    names = _class_names(options["labels"])
    train = open_images(options["data"], "train", options["corrupt"], names)
    return train, open_images(options["data"], "test", options["corrupt"], train.classes)


def _sources(options: Options, train: LabelledImages, test: LabelledImages, teacher: Teacher | None) -> dict[str, str]:
    """What a run learns from, in words, wherever it lies."""
    found = {"train": train.identity, "test": test.identity}
    return found if teacher is None else {**found, "teacher": identify_teacher(options["teacher"] or options["source"])}


def _set_threads(options: Options) -> None:
    torch.set_num_threads(options["threads"] or min(torch.get_num_threads(), usable_cpus()))


def _class_names(path: Path | None) -> list[str] | None:
    return [label for label in read_labels(path) if label] if path else None


def _teacher(options: Options, source: AdaViT, arch: Architecture, policy: PolicySettings) -> Teacher | None:
    """The model to learn from, if anything is to be learnt: --teacher, or the weights to start from."""
    if options["logit_weight"] == 0 and not policy.listens:
        return None
    if not options["teacher"]:
        check_teacher(source, arch)
        teacher: Teacher = source
    else:
        teacher = open_teacher(options["teacher"], arch)
    if policy.listens and isinstance(teacher, OnnxTeacher):
        raise click.UsageError("an ONNX teacher gives logits alone; leave --attention-weight and --hidden-weight at 0")
    if policy.listens and isinstance(teacher, AdaViT) and teacher.arch.tokens != arch.tokens:
        raise TrainingError(
            f"the teacher has {teacher.arch.tokens} tokens, the student {arch.tokens}: they have nothing to compare "
            "inside; leave --attention-weight and --hidden-weight at 0"
        )
    return teacher


def _kinds(text: str) -> tuple[str, ...]:
    chosen = [part.strip() for part in text.split(",") if part.strip()]
    if not chosen or set(chosen) - set(KINDS):
        raise click.UsageError(f"--policies {text!r}: expected some of {', '.join(KINDS)}, separated by commas")
    return tuple(kind for kind in KINDS if kind in chosen)


def _policy_settings(options: Options, arch: Architecture, kinds: tuple[str, ...]) -> PolicySettings:
    fixed = {kind: options[f"{OPTION_NAMES[kind]}_target"] for kind in KINDS}
    fixed = {kind: target for kind, target in fixed.items() if target is not None}
    if stray := set(fixed) - set(kinds):
        raise click.UsageError(f"--{OPTION_NAMES[stray.pop()]}-target: that policy is not among --policies")
    if options["budget"] is not None:
        targets = targets_for(arch, kinds, options["budget"], fixed)
    else:
        targets = {**dict.fromkeys(kinds, PUBLISHED_TARGET), **fixed}
    return PolicySettings(
        targets=targets,
        weights={kind: options[f"{OPTION_NAMES[kind]}_weight"] for kind in kinds},
        learning_rate_scale=options["policy_rate"],
        **{name: options[name] for name in POLICY_OPTIONS},
    )


def _settings(
    options: Options, arch: Architecture, images: int, policy: PolicySettings | None, teacher: Teacher | None
) -> Settings:
    small = usual_crop(arch.image_size) == 1
    return Settings(
        steps=options["steps"] or max(1, round(options["epochs"] * (images // options["batch"]))),
        augment=options["augment"] or ("shift" if small else "crop"),
        crop=_crop(options["crop"], options["source"], arch.image_size),
        logit_weight=options["logit_weight"] if teacher else 0.0,
        policy=policy,
        **{name: options[name] for name in RUN_OPTIONS},
    )
