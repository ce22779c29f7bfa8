"""What policies gain on this machine, and the plan that runs a bundle fastest, kept for the runtimes to come."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import numpy as np

from adavit.architecture import Architecture
from adavit.macs import dense_macs
from adavit.runtime.kept_plan import keep_plan
from adavit.runtime.plan import EnginePlan, ruled
from adavit.runtime.policy import Policy
from adavit.runtime.session import Runtime
from adavit.runtime.staircase import BlockStaircase, Staircase, measure_blocks, measure_staircase
from adavit.runtime.timing import median_times

__all__ = ["tune"]

ROUNDS = 9
IMAGES = 4

Progress = Callable[[str, float], None]


def tune(runtime: Runtime, progress: Progress, used: Policy | None = None) -> dict[str, Any]:
    """Measures engines and policies, and keeps the faster one of the rule's plan and the measured one.

    Args:
        runtime: what to tune; it uses the plan afterwards.
        progress: told the stage and the share done.
        used: what images like those to come use; their most frequent sets of heads or sizes get engines of their own.

    Returns:
        The numbers under the keys of `adavit-run --tune --json`.

    Raises:
        InputError: the model has no policies, or decides on no heads where the backend runs sub-layers, so that there
            is nothing to plan.
    """
    arch, dispatcher = runtime.architecture, runtime.adaptive_dispatcher("tune")
    specialised = dispatcher.specialised
    dispatcher.specialise(())
    staircase: BlockStaircase | Staircase
    plans = {"rule": ruled(arch, runtime.backend.always_gathers)}
    if runtime.backend.always_gathers:
        staircase = measure_blocks(dispatcher, progress)
    else:
        staircase = measure_staircase(dispatcher, progress)
        plans["measured"] = staircase.plan(arch)
    shape = IMAGES, 3, arch.image_size, arch.image_size
    images = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)

    def run_under(plan: EnginePlan) -> None:
        dispatcher.plan = plan
        for position in range(IMAGES):
            runtime.run(images[position : position + 1])

    compared = median_times(
        {name: partial(run_under, plan) for name, plan in plans.items()}, ROUNDS, "comparing plans", progress
    )
    taken = min(compared, key=compared.__getitem__)
    dispatcher.plan = plans[taken]
    gains = _gains(runtime, images[:1], progress)
    if used is not None:
        progress("making engines", 0.0)
        runtime.specialise(used)
    plan = replace(plans[taken], sets=specialised.sets, sizes=dispatcher.sizes)
    measured = {"taken": taken, "staircase": asdict(staircase)}
    path = keep_plan(runtime.bundle, runtime.options, runtime.backend, plan, measured)
    dispatcher.plan = replace(plan, origin=None if path is None else str(path))
    return {
        "model": runtime.bundle.name,
        "backend": runtime.backend.name,
        "threads": runtime.options.threads,
        "parallel": runtime.options.parallel,
        "staircase": asdict(staircase),
        "gains": gains,
        "plans_ms": {name: time / IMAGES for name, time in compared.items()},
        "taken": taken,
        "gathers": plan.to_dict(),
        "own_engines": ("sets" if specialised.by_set else "sizes") if specialised.able else None,
        "plan": dispatcher.plan.origin,
    }


def _gains(runtime: Runtime, image: np.ndarray[Any, Any], progress: Progress) -> list[dict[str, Any]]:
    """What dropping half of one kind gains, against dropping nothing."""
    arch = runtime.architecture
    policies = _halved(arch)
    times = median_times(
        {kind: partial(runtime.run, image, kept) for kind, kept in policies.items()}, ROUNDS, "policies", progress
    )
    gains = []
    for kind, policy in policies.items():
        macs = int(runtime.run(image, policy).macs[0])
        speedup, ideal = times["nothing"] / times[kind], dense_macs(arch) / macs
        gains.append(
            {"dropped": kind, "ms": times[kind], "macs": macs / dense_macs(arch), "speedup": speedup, "ideal": ideal}
        )
    return gains


def _halved(arch: Architecture) -> dict[str, Policy]:
    """Policies of one image: one that drops nothing, and for every kind one that drops half of it, and of no other."""
    source = np.random.default_rng(0)
    policies = {kind: Policy.dense(arch, 1) for kind in ("nothing", "tokens", "heads", "sublayers")}
    for block in range(arch.depth):
        if arch.token_policy:
            policies["tokens"].tokens[0, block, 1 + source.permutation(arch.patches)[: arch.patches // 2]] = False
        if arch.adapts_heads(block):
            policies["heads"].heads[0, block, source.permutation(arch.heads)[: arch.heads // 2]] = False
        if arch.adapts_sublayers(block):
            policies["sublayers"].sublayers[0, block, block % 2] = False
    return policies
