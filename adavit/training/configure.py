"""Options of `adavit-train dense` and `adapt` as settings, teachers and targets."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import click
import torch

from adavit.architecture import Architecture
from adavit.cpus import usable_cpus
from adavit.model import AdaViT
from adavit.model.notes import read_crop
from adavit.reading import read_labels
from adavit.training.augment import usual_crop
from adavit.training.budget import KINDS, targets_for
from adavit.training.errors import TrainingError
from adavit.training.settings import PUBLISHED_TARGET, PolicySettings, Settings
from adavit.training.teacher import OnnxTeacher, Teacher, check_teacher, open_teacher

__all__ = [
    "choose_crop", "choose_policies", "choose_teacher", "policy_settings", "read_class_names", "run_settings",
    "set_threads",
]  # fmt: skip

Options = dict[str, Any]

OPTION_NAMES = {"tokens": "token", "heads": "head", "sublayers": "sublayer"}
RUN_OPTIONS = (
    "batch", "clip", "compile", "distillation_temperature", "ema", "final", "learning_rate", "mirror", "mixup",
    "precision", "seed", "smoothing", "token_drop", "warmup", "weight_decay",
)  # fmt: skip
POLICY_OPTIONS = (
    "anneal", "attention_weight", "diversity_weight", "entropy_weight", "floor", "floor_weight", "hidden_weight",
    "temperature",
)  # fmt: skip


def set_threads(options: Options) -> None:
    """Makes torch use as many threads as are asked for, by default no more than this process may use."""
    torch.set_num_threads(options["threads"] or min(torch.get_num_threads(), usable_cpus()))


def read_class_names(path: Path | None) -> list[str] | None:
    """The names in a file of labels; None without a file."""
    return [label for label in read_labels(path) if label] if path else None


def choose_crop(given: float | None, path: Path | None, side: int) -> float:
    """Share of the short side that evaluation keeps: the one asked for, else that of the weights, else the usual."""
    return given or (read_crop(path) if path else None) or usual_crop(side)


def choose_teacher(options: Options, source: AdaViT, arch: Architecture, policy: PolicySettings) -> Teacher | None:
    """The model to learn from, if anything is to be learnt: --teacher, or the weights to start from."""
    if options["logit_weight"] == 0 and not policy.distils_features:
        return None
    if not options["teacher"]:
        if source.arch.classes != arch.classes:
            raise TrainingError(_other_classes(options, source.arch.classes, arch.classes))
        check_teacher(source, arch)
        teacher: Teacher = source
    else:
        teacher = open_teacher(options["teacher"], arch)
    if policy.distils_features and isinstance(teacher, OnnxTeacher):
        raise click.UsageError("an ONNX teacher gives logits alone; leave --attention-weight and --hidden-weight at 0")
    if policy.distils_features and isinstance(teacher, AdaViT) and teacher.arch.tokens != arch.tokens:
        raise TrainingError(
            f"the teacher has {teacher.arch.tokens} tokens, the student {arch.tokens}: they have nothing to compare "
            "inside; leave --attention-weight and --hidden-weight at 0"
        )
    return teacher


def _other_classes(options: Options, known: int, wanted: int) -> str:
    dense = shlex.join(["adavit-train", "dense", "--from", str(options["source"]), "--data", str(options["data"])])
    return (
        f"the weights know {known} classes, the data has {wanted}; run `{dense} -o DENSE`, "
        "then adapt --from DENSE/weights.safetensors"
    )


def choose_policies(text: str) -> tuple[str, ...]:
    """The kinds that --policies names."""
    chosen = [part.strip() for part in text.split(",") if part.strip()]
    if not chosen or set(chosen) - set(KINDS):
        raise click.UsageError(f"--policies {text!r}: expected some of {', '.join(KINDS)}, separated by commas")
    return tuple(kind for kind in KINDS if kind in chosen)


def policy_settings(options: Options, arch: Architecture, kinds: tuple[str, ...]) -> PolicySettings:
    """How the policies of these kinds are trained."""
    chosen = {kind: options[f"{OPTION_NAMES[kind]}_target"] for kind in KINDS}
    chosen = {kind: target for kind, target in chosen.items() if target is not None}
    if stray := set(chosen) - set(kinds):
        raise click.UsageError(f"--{OPTION_NAMES[stray.pop()]}-target: that policy is not among --policies")
    if options["budget"] is not None:
        targets = targets_for(arch, kinds, options["budget"], chosen)
    else:
        targets = {**dict.fromkeys(kinds, PUBLISHED_TARGET), **chosen}
    return PolicySettings(
        targets=targets,
        weights={kind: options[f"{OPTION_NAMES[kind]}_weight"] for kind in kinds},
        learning_rate_scale=options["policy_rate"],
        **{name: options[name] for name in POLICY_OPTIONS},
    )


def run_settings(
    options: Options, arch: Architecture, images: int, policy: PolicySettings | None, teacher: Teacher | None
) -> Settings:
    """The settings of a run on so many training images."""
    small = usual_crop(arch.image_size) == 1
    return Settings(
        steps=options["steps"] or max(1, round(options["epochs"] * (images // options["batch"]))),
        augment=options["augment"] or ("shift" if small else "crop"),
        crop=choose_crop(options["crop"], options["source"], arch.image_size),
        logit_weight=options["logit_weight"] if teacher else 0.0,
        policy=policy,
        **{name: options[name] for name in RUN_OPTIONS},
    )
