"""Operating points of a bundle: offsets that meet budgets on calibration images with the least loss."""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from adavit.budget_options import BudgetOptions
from adavit.calibration.blend import best_way
from adavit.calibration.trial import Outcome, Trial
from adavit.calibration.walk import Way
from adavit.errors import InputError
from adavit.files import write_beside
from adavit.runtime.budget import MAX_OFFSET, TRAINED, Budgets, Offsets, OperatingPoint
from adavit.runtime.session import load

__all__ = ["add_budgets"]

CLOSE = 0.003
"""How far the MACs of an operating point may be from its budget, relative to it, on the calibration images."""
FAR = 0.02
"""How far they may be at most, where nothing closer is found."""
TRIES = 9
APART = 0.02
"""Budgets further apart than this have another point between them, so that interpolation stays close."""
ASTRAY = 0.01
"""How far the MACs of an interpolated request may be from its budget, relative to it, before a point is put there."""
ROUNDS = 2
"""How often the points are halved there."""

Progress = Callable[[str, float], None]


def add_budgets(bundle: Path, options: BudgetOptions, threads: int | None, progress: Progress) -> dict[str, Any] | None:
    """Calibrates operating points and writes them into the bundle's `config.json`, in place of those it had.

    Args:
        bundle: the folder.
        options: budgets and images; without budgets nothing is done.
        threads: CPU threads.
        progress: told the stage and the share done.

    Returns:
        What was written, with the images that could not be read as `skipped`, or None.

    Raises:
        InputError: the images or budgets are not usable, or a budget is out of the policies' reach.
        BundleError: the bundle is not usable.
    """
    options.check()
    if not options.budgets:
        return None
    runtime = load(bundle, threads=threads, parallel="samples")
    trial, skipped = Trial.of_files(runtime, options.calibration_images, progress)
    budgets = calibrate(trial, options.budgets)
    config = {**runtime.bundle.config, "budgets": budgets.to_dict()}
    with write_beside(bundle / "config.json") as file:
        file.write((json.dumps(config, indent=2) + "\n").encode())
    return {**budgets.to_dict(), "skipped": skipped}


def calibrate(trial: Trial, asked: Sequence[float]) -> Budgets:
    """Operating points for the budgets asked for, the trained policy, and some between them.

    Raises:
        InputError: a budget is out of the policies' reach.
    """
    least, most = (trial.run(Offsets(*(3 * [end])), 1).macs for end in (-MAX_OFFSET, MAX_OFFSET))
    for budget in asked:
        if not least <= budget <= most:
            raise InputError(
                f"a budget of {budget:g} is out of reach: this model's policies can set the MACs from {least:.3f} to "
                f"{most:.3f} of the dense ones"
            )
    way = best_way(trial, asked, min(asked) * (1 - CLOSE), min(1.0, max(asked) * (1 + CLOSE)))
    points = [_meet(trial, way, budget) for budget in sorted(asked)]
    if all(point.offsets != TRAINED for point in points):
        points = _sorted([*points, OperatingPoint(round(trial.trained.macs, 6), TRAINED, trial.trained.to_dict())])
    halves = [_between(trial, way, low.budget, high.budget) for low, high in pairwise(points)]
    points = _sorted([*points, *halves])
    for _ in range(ROUNDS):
        points = _sorted([*points, *(_astray(trial, low, high) for low, high in pairwise(points))])
    return Budgets(tuple(points), {"images": len(trial), "labelled": trial.labels is not None})


def _meet(trial: Trial, way: Way, budget: float) -> OperatingPoint:
    """The point on the way whose MACs are the budget's, on all images.

    Raises:
        InputError: none comes near it.
    """
    if abs(trial.trained.macs - budget) <= CLOSE * budget:
        return OperatingPoint(budget, TRAINED, trial.trained.to_dict())
    macs = [stop.outcome.macs for stop in way.stops]
    after = min(max(bisect_left(macs, budget), 1), len(macs) - 1)
    low, high = (after - 1.0, macs[after - 1]), (float(after), macs[after])
    found: dict[float, tuple[Offsets, Outcome]] = {}
    for attempt in range(TRIES):
        width = high[1] - low[1]  # none where the budget lies beyond the way's end, by the noise of the walk
        share = 0.5 if attempt % 3 == 2 or not width else min(1.0, max(0.0, (budget - low[1]) / width))
        position = low[0] + share * (high[0] - low[0])
        offsets = way.offsets(position)
        outcome = trial.run(offsets)
        found[abs(budget - outcome.macs)] = offsets, outcome
        if min(found) <= CLOSE * budget:
            break
        low, high = ((position, outcome.macs), high) if outcome.macs < budget else (low, (position, outcome.macs))
    offsets, outcome = found[min(found)]
    if min(found) > FAR * budget:
        raise InputError(
            f"a budget of {budget:g} cannot be met: the nearest found is {outcome.macs:.4f}; "
            "give another, or more images"
        )
    return OperatingPoint(budget, offsets, outcome.to_dict())


def _between(trial: Trial, way: Way, low: float, high: float) -> OperatingPoint | None:
    """A point about half-way between two budgets, where they are far apart."""
    return _inside(trial, way.offsets(way.at((low + high) / 2)), low, high) if high - low > APART else None


def _astray(trial: Trial, low: OperatingPoint, high: OperatingPoint) -> OperatingPoint | None:
    """What a request half-way between two points would get, where its MACs are not what it asks for."""
    offsets, asked = low.offsets.toward(high.offsets, 0.5), (low.budget + high.budget) / 2
    if high.budget - low.budget <= APART / 2 or abs(trial.run(offsets).macs - asked) <= ASTRAY * asked:
        return None
    return _inside(trial, offsets, low.budget, high.budget)


def _inside(trial: Trial, offsets: Offsets, low: float, high: float) -> OperatingPoint | None:
    """The point of some offsets, at the MACs they take; None where these are not between two budgets."""
    outcome = trial.run(offsets)
    budget = round(outcome.macs, 6)
    return OperatingPoint(budget, offsets, outcome.to_dict()) if low < budget < high else None


def _sorted(points: Sequence[OperatingPoint | None]) -> list[OperatingPoint]:
    return sorted((point for point in points if point is not None), key=lambda point: point.budget)
