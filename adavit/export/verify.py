"""Proves that a bundle computes what its checkpoint computes, or names the first engine that does not."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch

from adavit.architecture import TOKEN_LOGIT, Architecture
from adavit.bundle.keys import Sublayers
from adavit.bundle.policy import Policy
from adavit.datasets.random_images import random_images
from adavit.errors import BackendError, VerificationError
from adavit.measure.compare import KINDS, margins_of
from adavit.model import AdaViT, Output
from adavit.model.adavit import Block, BlockLogits
from adavit.model.policy import BlockPolicy, decide
from adavit.runtime.backend import Options
from adavit.runtime.backends.onnxruntime.batch import OnnxRuntimeBatchBackend
from adavit.runtime.dispatcher import Step
from adavit.runtime.finite import NotFiniteError
from adavit.runtime.session import Runtime
from adavit.runtime.specialise import usage_of

__all__ = ["DRAWS", "MARGIN", "nothing_proves", "reference", "verify"]

IMAGES = 4
DRAWS = 64
MARGIN = 1e-4
"""Sample inputs whose decisions come closer to a threshold than this prove nothing: rounding may tip them."""
TOLERANCE = 1e-3
"""Largest difference of tokens and logits, relative to their largest magnitude where that is above 1."""

Float = npt.NDArray[np.float32]


@dataclass
class Reference:
    """What the masked PyTorch model computes for one image.

    Attributes:
        image: [3, S, S].
        tokens: what each block is given, and the last one makes, [L + 1, N, D].
        logits: [C].
        policy: what it keeps.
        decisions: the logits of each block's decisions on tokens, heads and sub-layers, less their thresholds,
            [L, N + H + 2]; infinite where nothing is decided.
    """

    image: Float
    tokens: Float
    logits: Float
    policy: Policy
    decisions: Float


@torch.no_grad()
def reference(model: AdaViT, image: Float, replay: Policy | None = None) -> Reference:
    """Runs the masked model on one image [3, S, S], under its own decisions or a given policy's."""
    x = model.embed(torch.from_numpy(image)[None])
    tokens = [x[0].numpy()]
    output_policies, logits, decided = [], [], []
    for index, module in enumerate(model.blocks):
        block = cast(Block, module)
        normed = block.norm1(x)
        found = block.decision_logits(x, normed)
        policy = block.policy(found, decide) if replay is None else _masks(replay, index)
        x = block.attention_step(x, normed, policy)
        x = block.mlp_step(x, policy)
        tokens.append(x[0].numpy())
        output_policies.append(policy)
        logits.append(found)
        decided.append(_margins(model.arch, found))
    output = Output(model.classify(x), logits, output_policies, [])
    masks = (mask.numpy() for mask in output.stacked(model.arch))
    return Reference(image, np.stack(tokens), output.logits[0].numpy(), Policy(*masks), np.stack(decided))


def _masks(policy: Policy, block: int) -> BlockPolicy:
    """The row of a block in an image's policy, as the masked model takes it."""
    rows = policy.tokens[:, block], policy.heads[:, block], policy.sublayers[:, block]
    return BlockPolicy(*(torch.from_numpy(row.astype(np.float32)) for row in rows))


def _margins(arch: Architecture, logits: BlockLogits) -> Float:
    """A row of `Reference.decisions`: an image's logits of a block."""
    distances = [np.full(1, np.inf, np.float32)]  # of the class token
    kinds = (logits.tokens, arch.patches, TOKEN_LOGIT), (logits.heads, arch.heads, 0.0), (logits.sublayers, 2, 0.0)
    for values, count, threshold in kinds:
        found = np.full(count, np.inf) if values is None else values[0].numpy() - np.float32(threshold)
        distances.append(found.astype(np.float32))
    return np.concatenate(distances)


def verify(model: AdaViT, runtime: Runtime, progress: Callable[[str, float], None]) -> dict[str, Any]:
    """Runs random images through both and compares every decision, the tokens behind every block, and the logits.

    Policies that keep every head, one, and none are replayed too, so that no graph goes unseen for want of an image
    that needs it. What the backend prepares for the images' heads is compared as well, and the graphs of batches.

    Of a model without policies, the logits of the dense graph are compared.

    Returns:
        How many images and decisions were compared, and the largest logit difference; of graphs in fp32.

    Raises:
        VerificationError: they differ; the message names the first block and graph that do.
    """
    if not model.arch.adapts:
        return _verify_dense(model, runtime, progress)
    chosen = _samples(model, progress)
    replayed = [reference(model, chosen[0].image, policy) for policy in _replayed_policies(model.arch)]
    runs = [(wanted, None) for wanted in chosen] + [(wanted, wanted.policy) for wanted in replayed]
    worst = 0.0
    for done, (wanted, replay) in enumerate(runs, 1):
        worst = max(worst, _compare(wanted, runtime, replay))
        if wanted is not (replayed[0] if replayed else None):  # all heads would need all weights once more
            worst = max(worst, _compare_prepared(wanted, runtime, replay))
        progress("verifying", done / (len(runs) + 1))
    worst = max(worst, _compare_batches(chosen, replayed, runtime))
    progress("verifying", 1.0)
    result: dict[str, Any] = {
        "precision": "fp32",
        "images": len(chosen),
        "decisions": sum(_decisions(model, wanted.policy) for wanted in chosen),
        "max_logit_difference": worst,
    }
    if runtime.graphs.files.dense is not None:
        images = np.stack([wanted.image for wanted in chosen])
        with torch.no_grad():
            dense = model(torch.from_numpy(images), decide=None).logits.numpy()
        result["max_dense_logit_difference"] = _difference("the dense twin", runtime.run_dense(images), dense)
    return result


def _verify_dense(model: AdaViT, runtime: Runtime, progress: Callable[[str, float], None]) -> dict[str, Any]:
    """Runs random images through a model without policies and its dense graph, at once and one by one."""
    images = np.stack(list(itertools.islice(random_images(model.arch.image_size), IMAGES)))
    with torch.no_grad():
        wanted = model(torch.from_numpy(images), decide=None).logits.numpy()
    worst = _difference("the dense twin", runtime.run(images).logits, wanted)
    for done, image in enumerate(images):
        worst = max(worst, _difference("the dense twin", runtime.run(image[None]).logits, wanted[done : done + 1]))
        progress("verifying", (done + 1) / IMAGES)
    return {"images": IMAGES, "decisions": 0, "max_logit_difference": worst, "precision": "fp32"}


def _samples(model: AdaViT, progress: Callable[[str, float], None]) -> list[Reference]:
    chosen: list[Reference] = []
    for draw, image in enumerate(itertools.islice(random_images(model.arch.image_size), DRAWS)):
        found = reference(model, image)
        if (np.abs(found.decisions) > MARGIN).all():
            chosen.append(found)
        progress("running the checkpoint", max(len(chosen) / IMAGES, draw / DRAWS))
        if len(chosen) == IMAGES:
            break
    if not chosen:
        raise nothing_proves()
    return chosen


def nothing_proves() -> VerificationError:
    """What to say where every random image comes too close to a threshold."""
    return VerificationError(
        f"none of {DRAWS} random images keeps every decision {MARGIN:g} clear of its threshold, so rounding alone "
        "may flip some; check the decision heads, or export with `verify=False`"
    )


def _replayed_policies(arch: Architecture) -> list[Policy]:
    """One image's policies: everything, no head, one head (another in every block), one sub-layer dropped, and both."""
    policies = [Policy.dense(arch, 1) for _ in range(1 + 2 * arch.head_policy + 3 * arch.sublayer_policy)]
    for number, policy in enumerate(policies[1:]):
        for block in range(arch.depth):
            if arch.adapts_heads(block):
                policy.heads[0, block] = False
                policy.heads[0, block, block % arch.heads] = number > 0
    if arch.sublayer_policy:
        for dropped, policy in zip(([0], [1], [0, 1]), policies[-3:], strict=True):
            policy.sublayers[0, arch.keep :, dropped] = False
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
    """Compares one image block by block, in the order they ran; returns the largest logit difference."""
    arch = runtime.architecture
    seen: list[Step] = []
    failure: BackendError | None = None
    try:
        result = runtime.run(wanted.image[None], replay, lambda step: seen.append(_copied(step)))
    except BackendError as error:  # what was seen before tells by which graph
        failure = error
    batches = not runtime.backend.on_host
    for step in seen:
        made_by = _made_by(wanted.policy, step.block - 1, batches)
        _difference(made_by, step.tokens, wanted.tokens[step.block])
        if step.block < arch.depth:
            _same_decisions(made_by, arch, step, wanted)
    if isinstance(failure, NotFiniteError):
        ran = min(seen[-1].block, arch.depth - 1) if seen else -1
        raise VerificationError(f"{_made_by(wanted.policy, ran, batches)}: makes values that are not finite")
    if failure:
        raise failure
    return _difference(_made_by(wanted.policy, arch.depth - 1, batches), result.logits[0], wanted.logits)


def _copied(step: Step) -> Step:
    decisions = None if step.decisions is None else step.decisions.copy()
    return step._replace(tokens=step.tokens.copy(), decisions=decisions)


def _compare_prepared(wanted: Reference, runtime: Runtime, replay: Policy | None) -> float:
    """Compares an image once more, with what the backend prepares for it."""
    backend, usage = runtime.backend, usage_of(wanted.policy, runtime.options.threads_of(1))
    if not backend.on_host:
        return 0.0
    chosen = backend.choose(usage)
    for one in chosen:
        backend.prepare(one)
    try:
        return _compare(wanted, runtime, replay) if chosen else 0.0
    finally:
        backend.retain(())


def _compare_batches(chosen: list[Reference], replayed: list[Reference], runtime: Runtime) -> float:
    """Compares images once more, as the graphs of batches run them."""
    backend = OnnxRuntimeBatchBackend(runtime.graphs, Options(runtime.options.threads))
    batches = Runtime(runtime.bundle, runtime.graphs, backend, runtime.options, runtime.offsets, specialise=False)
    runs = [(wanted, None) for wanted in chosen] + [(wanted, wanted.policy) for wanted in replayed]
    return max(_compare(wanted, batches, replay) for wanted, replay in runs)


def _made_by(policy: Policy, block: int, batches: bool) -> str:
    """The graph that ran an image's block; -1 is the stem."""
    if batches:
        return "the stem, graph batch" if block < 0 else f"block {block}, graph batch"
    if block < 0:
        return "the stem"
    return f"block {block}, graph {Sublayers(*policy.sublayers[0, block].tolist()).name}"


def _same_decisions(graph: str, arch: Architecture, step: Step, wanted: Reference) -> None:
    """Compares a block's decisions, where rounding cannot tip them, and their logits."""
    if step.decisions is None:
        return
    found = margins_of(arch, step.block, step.decisions)
    splits = np.split(wanted.decisions[step.block], [1, arch.tokens, arch.tokens + arch.heads])
    for kind, values in zip(KINDS, splits[1:], strict=True):
        if kind not in found:
            continue
        differing = ((found[kind] > 0) != (values > 0)) & (np.abs(values) > MARGIN)
        if count := int(differing.sum()):
            raise VerificationError(f"{graph}: {count} of block {step.block}'s decisions on {kind} differ")
        _difference(f"{graph}: block {step.block}'s decisions on {kind}", found[kind], values)


def _difference(graph: str, found: Float, wanted: Float) -> float:
    if not np.isfinite(found).all():
        raise VerificationError(f"{graph}: makes values that are not finite")
    worst = float(np.abs(found - wanted).max()) if found.shape == wanted.shape else np.inf
    if not worst <= TOLERANCE * max(1.0, float(np.abs(wanted).max())):
        raise VerificationError(f"{graph}: differs from the checkpoint by up to {worst:.3g}")
    return worst
