"""What an evaluation reports: accuracy, MACs, and whether the policy depends on its input."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from adavit.architecture import Architecture
from adavit.macs import dense_macs
from adavit.runtime import Policy
from adavit.training.predict import Predictions

__all__ = ["RandomPolicy", "evaluation_report"]

PARTS = 5


class RandomPolicy:
    """Keeps tokens, heads and sub-layers by chance, each block as many of each kind as `like` does on average."""

    def __init__(self, like: Predictions | Policy, arch: Architecture, seed: int) -> None:
        self._random = np.random.default_rng(seed)
        self._arch = arch
        self._means = like.tokens[..., 1:].mean((0, 2)), like.heads.mean((0, 2)), like.sublayers.mean((0, 2))
        self._pending: list[npt.NDArray[np.bool_]] = []

    def policy(self, images: int) -> Policy:
        """Policies for so many images, drawn anew."""
        chosen = Policy.dense(self._arch, images)
        masks = chosen.tokens[..., 1:], chosen.heads, chosen.sublayers
        for mask, means in zip(masks, self._means, strict=True):
            mask[:] = self._random.random(mask.shape) < means[:, None]
        return chosen

    def __call__(self, logits: Tensor, threshold: float) -> Tensor:
        """A mask like the logits, whatever they say.

        Every forward asks for a block's tokens, then heads, then sub-layers, as far as the model has them.
        """
        if not self._pending:
            self._pending = self._masks(self.policy(len(logits)))
        return torch.from_numpy(self._pending.pop(0)).to(logits)

    def _masks(self, policy: Policy) -> list[npt.NDArray[np.bool_]]:
        masks, arch = [], self._arch
        for block in range(arch.depth):
            if arch.token_policy:
                masks.append(policy.tokens[:, block, 1:])
            if arch.adapts_heads(block):
                masks.append(policy.heads[:, block])
            if arch.adapts_sublayers(block):
                masks.append(policy.sublayers[:, block])
        return masks


def evaluation_report(
    found: Predictions,
    arch: Architecture,
    classes: list[str],
    dense: Predictions | None = None,
    chance: Predictions | None = None,
    baseline: tuple[Predictions, Architecture] | None = None,
) -> dict[str, Any]:
    """A report of plain JSON values; shares of MACs are of the dense model's.

    `usage` is what ran, as `Policy.usage` defines it. `target_usage` is the usage that training's targets are about.
    `blocks` is what the policy chose in each block, also where neither of its sub-layers runs.

    Args:
        found: predictions of the model, under its policy.
        arch: its shapes.
        classes: names.
        dense: predictions of a dense model for the same images, which also rates their difficulty.
        chance: predictions under a random policy.
        baseline: predictions of another model and its shapes, such as a dense one shrunk to the same MACs.
    """
    judge, by = (dense, "loss of the dense model") if dense else (found, "its own loss")
    report: dict[str, Any] = {
        "images": len(found.labels),
        "accuracy": float(found.correct.mean()),
        "macs": float(found.macs.mean()),
        "adapts": arch.adapts,
        "usage": found.policy.usage(),
        "target_usage": found.target_usage(arch.keep),
        "classes": [_of_class(found, label, name) for label, name in enumerate(classes)],
        "blocks": [_of_block(found, block) for block in range(arch.depth)],
        "constant": _constant_units(found, arch),
        "difficulty": {"by": by, **_by_difficulty(found, judge.loss)},
    }
    if dense:
        report["dense"] = {"accuracy": float(dense.correct.mean())}
        report["accuracy_of_dense"] = report["accuracy"] / max(report["dense"]["accuracy"], 1e-9)
    if chance:
        report["random_policy"] = _point(chance, 1.0)
    if baseline:
        others, shapes = baseline
        report["baseline"] = _point(others, dense_macs(shapes) / dense_macs(arch))
    return report


def _point(found: Predictions, scale: float) -> dict[str, float]:
    return {"accuracy": float(found.correct.mean()), "macs": float(found.macs.mean()) * scale}


def _of_class(found: Predictions, label: int, name: str) -> dict[str, Any]:
    mine = found.labels == label
    if not mine.any():
        return {"name": name, "images": 0, "accuracy": None, "macs": 0.0}
    macs, accuracy = float(found.macs[mine].mean()), float(found.correct[mine].mean())
    return {"name": name, "images": int(mine.sum()), "accuracy": accuracy, "macs": macs}


def _of_block(found: Predictions, block: int) -> dict[str, Any]:
    return {
        "tokens": float(found.tokens[:, block, 1:].mean()),
        "heads": float(found.heads[:, block].mean()),
        "sublayers": float(found.sublayers[:, block].mean()),
        "each_head": found.heads[:, block].mean(0).tolist(),
        "attention": float(found.sublayers[:, block, 0].mean()),
        "mlp": float(found.sublayers[:, block, 1].mean()),
    }


def _constant_units(found: Predictions, arch: Architecture) -> dict[str, list[str]]:
    """Adapted heads and sub-layers that ran for every image, or for none."""
    always, never = [], []
    ran = found.policy.executed()
    for block in range(arch.keep, arch.depth):
        units = []
        if arch.adapts_heads(block):
            units += [(f"block {block} head {j}", ran.heads[:, block, j]) for j in range(arch.heads)]
        if arch.adapts_sublayers(block):
            units += [(f"block {block} {n}", ran.sublayers[:, block, s]) for s, n in enumerate(("attention", "MLP"))]
        always += [name for name, used in units if used.all()]
        never += [name for name, used in units if not used.any()]
    return {"always": always, "never": never}


def _by_difficulty(found: Predictions, loss: npt.NDArray[np.float64]) -> dict[str, Any]:
    """MACs and accuracy of fifths of the images, from the smallest loss to the largest."""
    parts = [part for part in np.array_split(np.argsort(loss, kind="stable"), PARTS) if len(part)]
    rows = [{"macs": float(found.macs[p].mean()), "accuracy": float(found.correct[p].mean())} for p in parts]
    spread = {f"p{q}": float(np.percentile(found.macs, q)) for q in (5, 50, 95)}
    ranks = np.stack([np.argsort(np.argsort(values)) for values in (loss, found.macs)]).astype(np.float64)
    varied = len(loss) > 1 and np.ptp(found.macs) > 0
    correlation = float(np.asarray(np.corrcoef(ranks))[0, 1]) if varied else 0.0
    return {"parts": rows, "macs_spread": spread, "rank_correlation": correlation}
