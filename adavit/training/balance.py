"""Moves the biases of the decisions, after the last step, so that the mean usages are their targets.

Training pulls the usages of its batches to the targets; the averaged weights decide otherwise than any step's, and
where a unit is used for nearly every image or for nearly none, rounding says for which. One offset a kind settles it:

    z' = z + offset      z: the decision logits of a kind, in all blocks

It is the quantile of the logits at which the target's share of them is above the threshold. But what a block decides
changes what later blocks see. So the model runs again under its new biases, and the offsets are mended, until the
usages are near.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import Tensor

from adavit.architecture import TOKEN_LOGIT
from adavit.bundle.preprocessing import Preprocessor
from adavit.model import policy as P
from adavit.model.adavit import AdaViT, Block, Output, Select
from adavit.training.data import LabelledImages
from adavit.training.distributed import World, global_sum
from adavit.training.loader import evaluation_batches, watched
from adavit.training.log import Progress, silent
from adavit.training.predict import Batches
from adavit.training.settings import PolicySettings, Settings

__all__ = ["ROUNDS", "balance", "images_to_balance"]

IMAGES, IMAGE_STREAM = 1024, 2
NEAR, FAR = 0.004, 0.02
"""Distances of a usage from its target: where the search ends, and where the user is told."""
ROUNDS, PATIENCE = 24, 6
"""Of the search: the most, and how many in turn may be no better than the best before it ends."""
LARGER = 4
"""Times the batch of a training step, which keeps far more of every image in memory."""
BETTER = 0.99
"""The factor on the distance from all targets from which on a round is better."""
SHORTER = 0.8
"""The factor on the steps after a round that was no better than the best."""
FARTHEST, FINEST = 64.0, 1e-4
"""Of offsets: the largest, and the least change that rounding cannot undo."""

Values = dict[str, float]


def balance(
    model: AdaViT,
    targets: Mapping[str, float],
    train: LabelledImages,
    settings: Settings,
    world: World,
    progress: Progress = silent,
) -> Values:
    """Moves the decision biases of a model in place; every process ends with the same.

    Args:
        model: in eval mode; all processes have the same.
        targets: mean usages by kind, as `measure_usage` defines them; kinds the model has a policy of.
        train: the training images, of which up to 1,024 are looked at, prepared as in evaluation.
        settings: of the run.
        world: this process.
        progress: told the share of the rounds that are done.

    Returns:
        The offsets by kind. Where a usage ends more than 0.02 from its target, a warning says so.
    """
    chosen = _choose(len(train.labels), settings.seed)[world.rank :: world.size]
    prepare = Preprocessor(model.arch.image_size, settings.crop)
    trained = _copied_biases(model)
    offsets, part = dict.fromkeys(targets, 0.0), 1.0
    best, best_offsets, best_usage = float("inf"), offsets, dict.fromkeys(targets, 0.0)
    waited = 0
    for done in range(ROUNDS):

        def tell(share: float, done: int = done) -> None:
            progress("meeting the targets", (done + share) / ROUNDS)

        _set_biases(model, trained, offsets)
        batches = evaluation_batches(train, chosen, prepare, LARGER * settings.batch)
        decisions = _decisions(model, targets, watched(batches, len(chosen), tell))
        usage = {kind: found.usage(0.0) for kind, found in decisions.items()}
        missed = math.hypot(*(usage[kind] - target for kind, target in targets.items()))
        waited = 0 if missed < BETTER * best else waited + 1
        if missed < best:
            best, best_offsets, best_usage = missed, offsets, usage
        else:
            part *= SHORTER
        if waited == PATIENCE:
            break
        steps = {kind: decisions[kind].offset(target) for kind, target in targets.items()}
        if not any(steps.values()) or all(abs(usage[kind] - target) <= NEAR for kind, target in targets.items()):
            break
        offsets = {kind: offsets[kind] + part * step for kind, step in steps.items()}
    _set_biases(model, trained, best_offsets)
    if world.is_main:
        _warn_of_misses(targets, best_usage)
    return best_offsets


@dataclass(frozen=True)
class _Decisions:
    """All decisions of a kind over this process's images.

    Attributes:
        logits: float32 [n], less their threshold.
        weights: float64 [n], what each counts in the mean usage.
    """

    logits: Tensor
    weights: Tensor

    def usage(self, offset: float) -> float:
        """The mean usage over all processes, were the logits moved and nothing else."""
        kept = self.weights[self.logits + offset > 0].sum()
        share, whole = global_sum(torch.stack([kept, self.weights.sum()])).tolist()
        return float(share / whole) if whole else 0.0

    def offset(self, target: float) -> float:
        """Where that usage is nearest to the target."""
        reach = 1.0
        while reach < FARTHEST and not self.usage(-reach) <= target <= self.usage(reach):
            reach *= 2
        low, high, middle = -reach, reach, 0.0
        while high - low > FINEST and abs((found := self.usage(middle)) - target) > NEAR / 4:
            low, high = (middle, high) if found < target else (low, middle)
            middle = (low + high) / 2
        return min((0.0, middle, low, high), key=lambda offset: abs(self.usage(offset) - target))


def images_to_balance(train: LabelledImages, policy: PolicySettings | None) -> int:
    """How many training images each round looks at; 0 where no usage has a target to meet."""
    return min(IMAGES, len(train.labels)) if policy and policy.weighted_targets else 0


def _choose(images: int, seed: int) -> list[int]:
    """Indices of the images to look at."""
    order = np.random.default_rng([seed, 0, IMAGE_STREAM]).permutation(images)
    return sorted(int(index) for index in order[:IMAGES])


@torch.no_grad()
def _decisions(model: AdaViT, kinds: Mapping[str, float], batches: Batches) -> dict[str, _Decisions]:
    device = model.cls_token.device
    none = torch.zeros(0, device=device)
    logits, weights = {kind: [none] for kind in kinds}, {kind: [none.double()] for kind in kinds}
    for images, _ in batches:
        output = model(images.to(device), decide=P.decide)
        for kind in kinds:
            for values, each in _of_kind(output, kind):
                logits[kind].append(values.flatten())
                weights[kind].append(each.expand_as(values).flatten().double())
    return {kind: _Decisions(torch.cat(logits[kind]), torch.cat(weights[kind])) for kind in kinds}


def _of_kind(output: Output, kind: str) -> Iterator[tuple[Tensor, Tensor]]:
    """By block, decision logits less their threshold [B, n], and what each counts, [B, 1]: a head, in what runs."""
    for found, policy in zip(output.decisions, output.policies, strict=True):
        values = getattr(found, kind)
        if values is not None:
            one = torch.ones_like(values[:, :1])
            running = 2 * one if policy.sublayers is None else policy.sublayers.sum(1, keepdim=True)
            yield values - (TOKEN_LOGIT if kind == "tokens" else 0.0), running if kind == "heads" else one


def _biases(model: AdaViT) -> Iterator[tuple[str, int, Tensor]]:
    """Kind, block, and bias of every decision layer."""
    for index, module in enumerate(model.blocks):
        block = cast(Block, module)
        for kind, owner, name in (
            ("tokens", block.attn, "token_select"),
            ("heads", block, "head_select"),
            ("sublayers", block, "layer_select"),
        ):
            if hasattr(owner, name):
                yield kind, index, cast(Select, getattr(owner, name)).mlp_head.bias


def _copied_biases(model: AdaViT) -> dict[tuple[str, int], Tensor]:
    return {(kind, block): bias.detach().clone() for kind, block, bias in _biases(model)}


@torch.no_grad()
def _set_biases(model: AdaViT, trained: Mapping[tuple[str, int], Tensor], offsets: Mapping[str, float]) -> None:
    for kind, block, bias in _biases(model):
        bias.copy_(trained[kind, block] + offsets.get(kind, 0.0))


def _warn_of_misses(targets: Mapping[str, float], usage: Mapping[str, float]) -> None:
    for kind, target in targets.items():
        if abs(usage[kind] - target) > FAR:
            warnings.warn(
                f"the usage of {kind} is {usage[kind]:.3f}, the target {target:.3f}: no move of the decision "
                "biases brings it nearer; train longer, or choose another target",
                stacklevel=3,
            )
