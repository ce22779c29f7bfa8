"""Proves that a bundle computes what its checkpoint computes, or names the first engine that does not."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch

from adavit.architecture import TOKEN_LOGIT, Architecture
from adavit.errors import BackendError, VerificationError
from adavit.model import AdaViT, Output
from adavit.model.adavit import Block, BlockLogits
from adavit.model.policy import BlockPolicy, decide
from adavit.runtime.dispatcher import DECISIONS
from adavit.runtime.plan import HeadSet, sets_of
from adavit.runtime.policy import Policy
from adavit.runtime.session import Runtime

__all__ = ["random_images", "verify"]

IMAGES = 4
DRAWS = 64
WHITE = 2.64
"""Of half of every second image: normalisation divides patches of one colour by almost nothing."""
MARGIN = 1e-4
"""Sample inputs whose decisions come closer to a threshold than this prove nothing: rounding may tip them."""
TOLERANCE = 1e-3
"""Largest difference of tokens and logits, relative to their largest magnitude where that is above 1."""

Float = npt.NDArray[np.float32]
Bool = npt.NDArray[np.bool_]


@dataclass
class Reference:
    """What the masked PyTorch model computes for one image.

    Attributes:
        image: [3, S, S].
        tokens: behind every engine, [N, D].
        logits: [C].
        policy: what it keeps.
        decided: which tokens, heads and sub-layers each block would keep, bool [L, N + H + 2].
        clear: whether rounding cannot tip these, bool of the same shape.
    """

    image: Float
    tokens: dict[str, Float]
    logits: Float
    policy: Policy
    decided: Bool
    clear: Bool


@torch.no_grad()
def reference(model: AdaViT, image: Float, replay: Policy | None = None) -> Reference:
    """Runs the masked model on one image [3, S, S], under its own decisions or a given policy's."""
    x = model.embed(torch.from_numpy(image)[None])
    tokens = {"stem": x[0].numpy()}
    output_policies, logits, decided = [], [], []
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
        decided.append(_decided(model.arch, found))
    output = Output(model.classify(x), logits, output_policies, [])
    masks = (mask.numpy() for mask in output.stacked(model.arch))
    kept, clear = (np.stack(rows) for rows in zip(*decided, strict=True))
    return Reference(image, tokens, output.logits[0].numpy(), Policy(*masks), kept, clear)


def _masks(policy: Policy, block: int) -> BlockPolicy:
    """The row of a block in an image's policy, as the masked model takes it."""
    rows = policy.tokens[:, block], policy.heads[:, block], policy.sublayers[:, block]
    return BlockPolicy(*(torch.from_numpy(row.astype(np.float32)) for row in rows))


def _decided(arch: Architecture, logits: BlockLogits) -> tuple[Bool, Bool]:
    """Of an image's logits of a block: what they keep, and which of them are clear of their threshold, [N + H + 2]."""
    distances = [np.array([np.inf])]  # of the class token
    kinds = (logits.tokens, arch.patches, TOKEN_LOGIT), (logits.heads, arch.heads, 0.0), (logits.sublayers, 2, 0.0)
    for values, count, threshold in kinds:
        distances.append(np.full(count, np.inf) if values is None else values[0].numpy() - threshold)
    joined = np.concatenate(distances)
    return joined > 0, np.abs(joined) > MARGIN


def verify(model: AdaViT, runtime: Runtime, progress: Callable[[str, float], None]) -> dict[str, Any]:
    """Runs random images through both and compares every decision, the tokens behind every engine, and the logits.

    Policies that keep every head, one, and none are replayed too, so that no engine goes unseen for want of an
    image that needs it; those of few heads also with engines for their sets of heads, where the backend makes them.

    Of a model without policies, the logits of the dense graph are compared.

    Returns:
        How many images and decisions were compared, and the largest logit difference; of graphs in fp32.

    Raises:
        VerificationError: they differ; the message names the first block and engine that do.
    """
    if not model.arch.adapts:
        return _verify_dense(model, runtime, progress)
    chosen = _samples(model, progress)
    replayed = [reference(model, chosen[0].image, policy) for policy in _replayed_policies(model.arch)]
    runs = [(wanted, None) for wanted in chosen] + [(wanted, wanted.policy) for wanted in replayed]
    worst, arch = 0.0, model.arch
    # Where the last block alone has an engine of its own, every block's decisions are made alone.
    in_sets = [(*run, (HeadSet(arch.depth - 1, "both", tuple(range(arch.heads))),)) for run in runs[: len(chosen)]]
    for wanted, replay in runs:
        if wanted is not replayed[0]:  # all heads would need all weights once more
            in_sets.append((wanted, replay, tuple(sorted({found for _, found in sets_of(wanted.policy)}))))
    for done, (wanted, replay) in enumerate(runs, 1):
        worst = max(worst, _compare(wanted, runtime, replay))
        progress("verifying", done / (len(runs) + len(in_sets)))
    for done, (wanted, replay, sets) in enumerate(in_sets, 1):
        worst = max(worst, _compare_sets(wanted, runtime, replay, sets))
        progress("verifying", (len(runs) + done) / (len(runs) + len(in_sets)))
    result: dict[str, Any] = {
        "precision": "fp32",
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


def _verify_dense(model: AdaViT, runtime: Runtime, progress: Callable[[str, float], None]) -> dict[str, Any]:
    """Runs random images through a model without policies and its dense graph, at once and one by one."""
    images = np.stack(list(itertools.islice(random_images(model.arch.image_size), IMAGES)))
    with torch.no_grad():
        wanted = model(torch.from_numpy(images), decide=None).logits.numpy()
    worst = _difference("dense", runtime.run(images).logits, wanted)
    for done, image in enumerate(images):
        worst = max(worst, _difference("dense", runtime.run(image[None]).logits, wanted[done : done + 1]))
        progress("verifying", (done + 1) / IMAGES)
    return {"images": IMAGES, "decisions": 0, "max_logit_difference": worst, "precision": "fp32"}


def random_images(side: int) -> Iterator[Float]:
    """Normal pixels [3, S, S] without end, half of every second image white; each time the same."""
    source = np.random.default_rng(0)
    for draw in itertools.count():
        image = source.standard_normal((3, side, side), dtype=np.float32)
        if draw % 2:
            image[:, :, : side // 2] = WHITE
        yield image


def _samples(model: AdaViT, progress: Callable[[str, float], None]) -> list[Reference]:
    chosen: list[Reference] = []
    for draw, image in enumerate(itertools.islice(random_images(model.arch.image_size), DRAWS)):
        found = reference(model, image)
        if found.clear.all():
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
    """One image's policies of everything, no head, one head (another in every block), and that in one sub-layer."""
    policies = [Policy.dense(arch, 1) for _ in range(1 + 2 * arch.head_policy + 2 * arch.sublayer_policy)]
    for number, policy in enumerate(policies[1:]):
        for block in range(arch.depth):
            if arch.adapts_heads(block):
                policy.heads[0, block] = False
                policy.heads[0, block, block % arch.heads] = number > 0
    if arch.sublayer_policy:
        for part, policy in enumerate(policies[-2:]):
            policy.sublayers[0, arch.keep :, part] = False
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
    dispatcher = runtime.adaptive_dispatcher("compare")
    seen: list[tuple[str, npt.NDArray[Any]]] = []
    failure: BackendError | None = None
    try:
        runtime.run(wanted.image[None], replay, lambda _, engine, x: seen.append((engine, x.copy())))
    except BackendError as error:  # what was seen before tells by which engine
        failure = error
    before, worst = "", 0.0
    for engine, found in seen:
        if engine.startswith(DECISIONS):
            block = engine.removeprefix(DECISIONS)
            alone = "decide_set" if dispatcher.specialised.sets else "decide"
            by = before if before.endswith("_set") and _block(before) == int(block) - 1 else f"blocks.{block}.{alone}"
            _same_decisions(by, runtime.architecture, found, wanted, int(block))
            continue
        if engine == "head":
            last = before.endswith("_set") and _block(before) == runtime.architecture.depth - 1
            worst = _difference(before if last else engine, found, wanted.logits)
            continue
        behind = engine.split("_")[0].replace(".both", ".mlp")  # whichever of the engines that end with it ran
        _difference(engine, found, wanted.tokens[behind])
        before = engine
    if failure:
        raise failure
    return worst


def _compare_sets(wanted: Reference, runtime: Runtime, replay: Policy | None, sets: tuple[HeadSet, ...]) -> float:
    """Compares an image once more, with engines for some sets of heads."""
    dispatcher = runtime.adaptive_dispatcher("compare")
    if not dispatcher.specialises:
        return 0.0
    before = dispatcher.specialised.sets
    dispatcher.specialise(sets)
    try:
        return _compare(wanted, runtime, replay)
    finally:
        dispatcher.specialise(before)


def _same_decisions(engine: str, arch: Architecture, found: Bool, wanted: Reference, block: int) -> None:
    """Compares a block's decisions, which an engine made, where rounding cannot tip them."""
    differing = (found != wanted.decided[block]) & wanted.clear[block]
    by_kind = np.split(differing, [arch.tokens, arch.tokens + arch.heads])
    for kind, which in zip(("tokens", "heads", "sublayers"), by_kind, strict=True):
        if count := int(which.sum()):
            raise VerificationError(f"{_named(engine)}: {count} decisions on {kind} differ")


def _block(engine: str) -> int:
    """The number in the name of a block's engine; -1 of the stem's."""
    return int(engine.split(".")[1]) if engine.startswith("blocks.") else -1


def _named(engine: str) -> str:
    """An engine, behind its block if it is of one."""
    return (f"block {_block(engine)}, " if engine.startswith("blocks.") else "") + f"engine {engine}"


def _difference(engine: str, found: Float, wanted: Float) -> float:
    worst = float(np.abs(found - wanted).max()) if found.shape == wanted.shape else np.inf
    if not worst <= TOLERANCE * max(1.0, float(np.abs(wanted).max())):
        raise VerificationError(f"{_named(engine)}: differs from the checkpoint by up to {worst:.3g}")
    return worst
