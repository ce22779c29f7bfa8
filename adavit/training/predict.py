"""Runs a model, or an exported bundle, over a labelled set and keeps what it decided."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from adavit.macs import dense_macs, image_macs
from adavit.model.adavit import AdaViT, Output
from adavit.model.policy import Decide
from adavit.runtime import Policy, Runtime
from adavit.runtime.finite import LARGEST
from adavit.training.errors import TrainingError

__all__ = ["Batches", "Predictions", "predict", "predict_bundle"]

Bools = npt.NDArray[np.bool_]
Batches = Iterable[tuple[Tensor, npt.NDArray[np.int64]]]
Part = tuple[npt.NDArray[np.generic], ...]


@dataclass(frozen=True)
class Predictions:
    """Of n images.

    Attributes:
        labels: int64 [n], true; logits: float32 [n, C].
        tokens: bool [n, L, N]; heads: bool [n, L, H]; sublayers: bool [n, L, 2].
        macs: share of the dense MACs, float64 [n].
    """

    labels: npt.NDArray[np.int64]
    logits: npt.NDArray[np.float32]
    tokens: Bools
    heads: Bools
    sublayers: Bools
    macs: npt.NDArray[np.float64]

    @property
    def correct(self) -> Bools:
        """Whether the best class is the true one, [n]."""
        return np.asarray(self.logits.argmax(1) == self.labels)

    @property
    def loss(self) -> npt.NDArray[np.float64]:
        """Cross-entropy of each image, [n]."""
        shifted = self.logits.astype(np.float64) - self.logits.max(1, keepdims=True)
        log_sum = np.log(np.exp(shifted).sum(1))
        return np.asarray(log_sum - shifted[np.arange(len(self.labels)), self.labels])

    @property
    def policy(self) -> Policy:
        """What the images used."""
        return Policy(self.tokens, self.heads, self.sublayers)

    def target_usage(self, first_adapted: int) -> dict[str, float]:
        """Mean usages as the targets of training count them; see `usage.measure_usage`.

        Patch tokens of all blocks; heads and sub-layers of the blocks from `first_adapted` on, heads weighted by the
        sub-layers that run. `policy.usage()` is the usage that the runtime reports.
        """
        heads, sublayers = self.heads[:, first_adapted:].mean(-1), self.sublayers[:, first_adapted:]
        running = sublayers.sum(-1)
        return {
            "tokens": float(self.tokens[..., 1:].mean()),
            "heads": float((heads * running).sum() / max(1, running.sum())),
            "sublayers": float(sublayers.mean()) if sublayers.size else 1.0,
        }


@torch.no_grad()
def predict(model: AdaViT, batches: Batches, decide: Decide | None) -> Predictions:
    """Predictions of a model in eval mode; `decide` None is its dense twin.

    Raises:
        TrainingError: for an image, the model computes values that are NaN, infinite or too large for a layer norm.
    """
    device = model.cls_token.device
    parts: list[Part] = []
    done = 0
    for images, labels in batches:
        with _last_tokens(model) as last:
            output = model(images.to(device), decide=decide)
        _require_finite(output, last[0], done)
        masks = [mask.cpu().numpy() for mask in output.stacked(model.arch)]
        share = image_macs(model.arch, *masks) / dense_macs(model.arch)
        parts.append((labels, output.logits.float().cpu().numpy(), *masks, share))
        done += len(labels)
    return _joined(parts)


@contextmanager
def _last_tokens(model: AdaViT) -> Iterator[list[Tensor]]:
    """Where a forward leaves the last block's output [B, N, D]; keeping every block's would take memory."""
    found: list[Tensor] = []
    handle = model.norm.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0]))
    try:
        yield found
    finally:
        handle.remove()


def _require_finite(output: Output, tokens: Tensor, done: int) -> None:
    """Checks a batch as the runtime checks an image: argmax and comparisons make decisions of NaN, too.

    Sub-layers add to the tokens, so that what was not finite in any of them is not finite at the end.
    """
    decisions = [
        logits for block in output.decisions for logits in (block.tokens, block.heads, block.sublayers)
        if logits is not None
    ]  # fmt: skip
    for what, good in (
        ("tokens", (tokens.abs() < LARGEST).flatten(1).all(1)),
        ("logits", output.logits.isfinite().all(1)),
        *(("decisions", logits.isfinite().all(1)) for logits in decisions),
    ):
        if not good.all():
            raise TrainingError(
                f"the {what} of image {done + int(good.int().argmin())} are NaN, infinite or beyond {LARGEST:.0e}: "
                "the model's weights are damaged, or its training has diverged; take another checkpoint, or train "
                "with a lower --learning-rate"
            )


def predict_bundle(runtime: Runtime, batches: Batches, choose: Callable[[int], Policy] | None = None) -> Predictions:
    """Predictions of a bundle, under its own policy or under those that `choose` makes for a number of images."""
    parts: list[Part] = []
    for images, labels in batches:
        found = runtime.run(images.numpy(), choose(len(labels)) if choose else None)
        used, share = found.policy, found.macs / dense_macs(runtime.architecture)
        parts.append((labels, found.logits, used.tokens, used.heads, used.sublayers, share))
    return _joined(parts)


def _joined(parts: Sequence[Part]) -> Predictions:
    return Predictions(*(np.concatenate(column) for column in zip(*parts, strict=True)))
