"""Proves that a bundle computes what its checkpoint computes, or names the first engine that does not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch

from adavit.architecture import TOKEN_LOGIT, Architecture
from adavit.errors import VerificationError
from adavit.model import AdaViT, Output
from adavit.model.adavit import Block, BlockLogits
from adavit.model.policy import BlockPolicy, decide
from adavit.runtime.plan import SUBLAYERS, HeadSet
from adavit.runtime.policy import Policy
from adavit.runtime.session import Runtime

__all__ = ["verify"]

IMAGES = 4
DRAWS = 64
MARGIN = 1e-4
"""Sample inputs whose decisions come closer to a threshold than this prove nothing: rounding may tip them."""
TOLERANCE = 1e-3
"""Largest difference of tokens and logits, relative to their largest magnitude where that is above 1."""

Float = npt.NDArray[np.float32]


@dataclass
class Reference:
    """What the masked PyTorch model computes for one image: tokens [N, D] behind every engine."""

    image: Float
    tokens: dict[str, Float]
    logits: Float
    policy: Policy
    margin: float


@torch.no_grad()
def reference(model: AdaViT, image: Float, replay: Policy | None = None) -> Reference:
    """Runs the masked model on one image [3, S, S], under its own decisions or a given policy's."""
    x = model.embed(torch.from_numpy(image)[None])
    tokens = {"stem": x[0].numpy()}
    output_policies, logits = [], []
    for index, module in enumerate(model.blocks):
        block = cast(Block, module)
        normed = block.norm1(x)
        found = block.decision_logits(x, normed)
        policy = block.policy(found, decide) if replay is None else _masks(replay, index)
        x = block.attention_step(x, normed, policy)
        tokens[f"blocks.{index}.attention"] = x[0].numpy()
        x = block.mlp_step(x, policy)
        tokens[f"blocks.{index}.mlp"] = x[0].numpy()
        output_policies.append(policy)
        logits.append(found)
    output = Output(model.classify(x), logits, output_policies, [])
    masks = (mask.numpy() for mask in output.stacked(model.arch))
    return Reference(image, tokens, output.logits[0].numpy(), Policy(*masks), _margin(logits))


def _masks(policy: Policy, block: int) -> BlockPolicy:
    """The row of a block in an image's policy, as the masked model takes it."""
    rows = policy.tokens[:, block], policy.heads[:, block], policy.sublayers[:, block]
    return BlockPolicy(*(torch.from_numpy(row.astype(np.float32)) for row in rows))


def _margin(logits: list[BlockLogits]) -> float:
    """Smallest distance of a decision logit from its threshold."""
    distances = [
        float((values - threshold).abs().min())
        for block in logits
        for values, threshold in ((block.tokens, TOKEN_LOGIT), (block.heads, 0.0), (block.sublayers, 0.0))
        if values is not None
    ]
    return min(distances, default=np.inf)


def verify(model: AdaViT, runtime: Runtime, progress: Callable[[str, float], None]) -> dict[str, Any]:
    """Runs random images through both and compares every decision, the tokens behind every engine, and the logits.

    Policies that keep every head, one, and none are replayed too, so that no engine goes unseen for want of an
    image that needs it; the one of one head also with engines for its sets of heads, where the backend makes them.

    Returns:
        How many images and decisions were compared, and the largest logit difference.

    Raises:
        VerificationError: they differ; the message names the first block and engine that do.
    """
    chosen = _samples(model, progress)
    replayed = [reference(model, chosen[0].image, policy) for policy in _replayed_policies(model.arch)]
    worst = 0.0
    for done, wanted in enumerate([*chosen, *replayed], 1):
        worst = max(worst, _compare(wanted, runtime, wanted.policy if done > len(chosen) else None))
        progress("verifying", done / (len(chosen) + len(replayed)))
    if len(replayed) > 1:
        worst = max(worst, _compare_sets(replayed[1], runtime))
    result = {
        "images": len(chosen),
        "decisions": sum(_decisions(model, wanted.policy) for wanted in chosen),
        "max_logit_difference": worst,
    }
    if "dense" in runtime.bundle.engines:
        images = np.stack([wanted.image for wanted in chosen])
        with torch.no_grad():
            dense = model(torch.from_numpy(images), decide=None).logits.numpy()
        result["max_dense_logit_difference"] = _difference("dense", runtime.run_dense(images), dense)
    return result


def _samples(model: AdaViT, progress: Callable[[str, float], None]) -> list[Reference]:
    side, chosen = model.arch.image_size, []
    source = np.random.default_rng(0)
    for draw in range(DRAWS):
        found = reference(model, source.standard_normal((3, side, side), dtype=np.float32))
        if found.margin > MARGIN:
            chosen.append(found)
        progress("running the checkpoint", max(len(chosen) / IMAGES, draw / DRAWS))
        if len(chosen) == IMAGES:
            break
    if not chosen:
        raise VerificationError(
            f"none of {DRAWS} random images keeps every decision {MARGIN:g} clear of its threshold, so rounding alone "
            "may flip some; check the decision heads, or export with --no-verify"
        )
    return chosen


def _replayed_policies(arch: Architecture) -> list[Policy]:
    """One image's policies of every head, one head (another in every block), and no head."""
    policies = [Policy.dense(arch, 1)]
    adapted = [block for block in range(arch.depth) if arch.adapts_heads(block)]
    for share in (1, 0) if adapted else ():
        policy = Policy.dense(arch, 1)
        for block in adapted:
            policy.heads[0, block] = False
            policy.heads[0, block, block % arch.heads] = bool(share)
        policies.append(policy)
    return policies


def _decisions(model: AdaViT, policy: Policy) -> int:
    arch = model.arch
    adapted = arch.depth - arch.keep
    return len(policy) * (
        arch.token_policy * arch.depth * arch.patches
        + arch.head_policy * adapted * arch.heads
        + arch.sublayer_policy * adapted * 2
    )


def _compare(wanted: Reference, runtime: Runtime, replay: Policy | None) -> float:
    """Compares one image engine by engine, in the order they ran; returns the largest logit difference."""
    seen: list[tuple[str, Float]] = []
    result = runtime.run(wanted.image[None], replay, lambda _, engine, x: seen.append((engine, x.copy())))
    decided: set[int] = set()
    for engine, found in seen:
        if engine.startswith("blocks."):
            block = int(engine.split(".")[1])
            _same_decisions(wanted.policy, result.policy, block, decided)
        sublayer = engine.split("_")[0]  # whichever of a sub-layer's engines ran
        _difference(engine, found, wanted.logits if engine == "head" else wanted.tokens[sublayer])
    _same_decisions(wanted.policy, result.policy, runtime.architecture.depth - 1, decided)
    return float(np.abs(result.logits[0] - wanted.logits).max())


def _compare_sets(wanted: Reference, runtime: Runtime) -> float:
    """Compares an image once more, with an engine for every set of heads that its policy keeps."""
    arch, specialised = runtime.architecture, runtime.dispatcher.specialised
    if not specialised.able:
        return 0.0
    before = specialised.sets
    specialised.make(
        tuple(
            HeadSet(block, kind, tuple(wanted.policy.heads[0, block].nonzero()[0].tolist()))
            for block in range(arch.depth)
            for kind in SUBLAYERS
            if arch.adapts_heads(block)
        )
    )
    try:
        return _compare(wanted, runtime, wanted.policy)
    finally:
        specialised.make(before)


def _same_decisions(wanted: Policy, found: Policy, last: int, decided: set[int]) -> None:
    """Compares the decisions of every block up to `last` that has not been compared yet."""
    for block in range(last + 1):
        if block in decided:
            continue
        decided.add(block)
        for kind in ("tokens", "heads", "sublayers"):
            differing = int((getattr(wanted, kind)[0, block] != getattr(found, kind)[0, block]).sum())
            if differing:
                raise VerificationError(
                    f"block {block}, engine blocks.{block}.decide: {differing} decisions on {kind} differ"
                )


def _difference(engine: str, found: Float, wanted: Float) -> float:
    worst = float(np.abs(found - wanted).max()) if found.shape == wanted.shape else np.inf
    if not worst <= TOLERANCE * max(1.0, float(np.abs(wanted).max())):
        where = f"block {engine.split('.')[1]}, " if engine.startswith("blocks.") else ""
        raise VerificationError(f"{where}engine {engine}: differs from the checkpoint by up to {worst:.3g}")
    return worst
