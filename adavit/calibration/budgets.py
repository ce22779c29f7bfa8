"""Operating points of a bundle: offsets that meet budgets on calibration images with the least loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from adavit.bundle.bundle import Bundle, write_config
from adavit.bundle.card import renew_points
from adavit.bundle.operating_points import MAX_OFFSET, NO_POLICIES, TRAINED, Budgets, Offsets, OperatingPoint
from adavit.calibration.line_search import CLOSE, FoundPoint
from adavit.calibration.offset_evaluator import OffsetEvaluator
from adavit.calibration.options import DEFAULT_IMAGES, BudgetOptions
from adavit.calibration.search import best_points, expected
from adavit.calibration.search_progress import SearchProgress
from adavit.calibration.statistics import add_statistics
from adavit.errors import BundleError, InputError
from adavit.runtime.loading import load

__all__ = ["add_budgets"]

FAR = 0.02
"""How far the MACs of an operating point may be from its budget, relative to it, on the calibration images."""
APART = 0.01
"""Budgets closer than this are close enough for what is between them."""
ASTRAY = 0.01
"""How far the MACs of an interpolated request may be from its budget, relative to it, before a point is put there."""
SOME = 256
"""Images that tell of it."""
ROUNDS, TRIES = 3, 4
"""How often the points are halved there, and how often each is tried."""
STAGE = "finding operating points"

Progress = Callable[[str, float], None]


def add_budgets(bundle: Path, options: BudgetOptions, threads: int | None, progress: Progress) -> dict[str, Any] | None:
    """Calibrates operating points and writes them into the bundle's `config.json`, in place of those it had.

    Args:
        bundle: the folder.
        options: budgets and images; without budgets nothing is done.
        threads: CPU threads.
        progress: told the stage and the share done.

    Returns:
        What was written, with the images that could not be read as `skipped`, and `notes` of how they were found,
        if there are any; or None.

    Raises:
        InputError: the images or budgets are not usable, or a budget is out of the policies' reach.
        BundleError: the bundle is not usable, or was exported anew meanwhile.
    """
    options.check()
    if not options.budgets:
        return None
    progress("loading the bundle", 0.0)
    runtime = load(bundle, threads=threads, parallel="samples", specialise=False)
    notes: list[str] = []
    if not runtime.architecture.adapts:
        raise InputError(f"{bundle}: {NO_POLICIES}")
    most = options.budget_images or DEFAULT_IMAGES
    images = options.calibration_images, progress, most, options.labels_by_order, notes.append
    evaluator, skipped = OffsetEvaluator.of_files(runtime, *images)
    budgets = calibrate(evaluator, options.budgets, partial(progress, STAGE))
    Budgets.from_dict(budgets.to_dict(), runtime.architecture.depth)  # what no reader would take is not written
    config = dict(Bundle.open(bundle).config)  # others may have written to it meanwhile
    if config["precisions"] != runtime.bundle.config["precisions"]:
        raise BundleError(f"{bundle}: was exported anew meanwhile; calibrate it again")
    config.pop("statistics", None)  # of other points
    write_config(bundle, {**config, "budgets": budgets.to_dict()})
    renew_points(bundle, budgets)
    add_statistics(bundle, runtime, evaluator.images, progress)
    return {**budgets.to_dict(), "skipped": skipped, **({"notes": notes} if notes else {})}


def calibrate(
    evaluator: OffsetEvaluator, asked: Sequence[float], report: Callable[[float], None] = lambda _: None
) -> Budgets:
    """Operating points for the budgets asked for, the trained policy, and some between them.

    Args:
        evaluator: runs offsets on the calibration images.
        asked: shares of the dense MACs.
        report: told the share done, which never falls.

    Raises:
        InputError: a budget is out of the policies' reach, or two are the trained policy's.
    """
    progress = evaluator.progress = SearchProgress(report)
    progress.plan(len(evaluator), *expected(evaluator, len(asked)))
    progress.begin()
    least, most = (evaluator.run(Offsets(*(3 * [end])), 1).macs for end in (-MAX_OFFSET, MAX_OFFSET))
    for budget in asked:
        if not least <= budget <= most:
            raise InputError(
                f"a budget of {budget:g} is out of reach: this model's policies can set the MACs from {least:.3f} to "
                f"{most:.3f} of the dense ones"
            )
    macs = evaluator.trained.macs
    near = [budget for budget in asked if abs(macs - budget) <= CLOSE * budget]
    if len(near) > 1:
        both = " and ".join(f"{budget:g}" for budget in near)
        raise InputError(f"budgets of {both} are all what the trained policy takes ({macs:.4f}); ask for one of them")
    points = [OperatingPoint(near[0] if near else round(macs, 6), TRAINED, evaluator.trained.to_dict())]
    if further := [budget for budget in asked if budget not in near]:
        progress.plan(*expected(evaluator, len(further)))
        points += [_point(level, point) for level, point in best_points(evaluator, further, progress).items()]
        progress.begin()
    points = _sorted(points)
    for _ in range(ROUNDS):
        points = _sorted([*points, *(point_between(evaluator, low, high) for low, high in pairwise(points))])
    progress.end()
    return Budgets(tuple(points), {"images": len(evaluator), "labelled": evaluator.labels is not None})


def _point(budget: float, point: FoundPoint) -> OperatingPoint:
    """The point at a budget; raises InputError where the offsets come not near it."""
    macs = point.outcome.macs
    if abs(macs - budget) > FAR * budget:
        raise InputError(
            f"a budget of {budget:g} cannot be met: the nearest found is {macs:.4f}; give another, or more images"
        )
    return OperatingPoint(budget, point.offsets, point.outcome.to_dict())


def point_between(evaluator: OffsetEvaluator, low: OperatingPoint, high: OperatingPoint) -> OperatingPoint | None:
    """A point half-way between two, where a request there would take other MACs than it asks for."""
    line, asked = partial(low.offsets.toward, high.offsets), (low.budget + high.budget) / 2
    if high.budget - low.budget <= APART:
        return None
    ends = [evaluator.run(point.offsets, SOME).macs for point in (low, high)]
    wanted = asked * sum(ends) / (low.measured["macs"] + high.measured["macs"])  # of these images
    tried, place = dict(zip((0.0, 1.0), ends, strict=True)), 0.5
    for _ in range(TRIES):
        tried[place] = evaluator.run(line(place), SOME).macs
        if abs(tried[place] - wanted) <= (ASTRAY if place == 0.5 else ASTRAY / 2) * wanted:
            break
        places = sorted(tried)
        place = float(np.interp(wanted, [tried[place] for place in places], places))
    if place == 0.5:
        return None
    outcome = evaluator.run(line(place))
    met = abs(outcome.macs - asked) <= FAR * asked
    return OperatingPoint(asked, line(place), outcome.to_dict()) if met else None


def _sorted(points: Sequence[OperatingPoint | None]) -> list[OperatingPoint]:
    """By budget; of two at the same one, or of the trained policy, the first given."""
    given = [point for point in points if point is not None]
    trained = next(point for point in given if point.offsets == TRAINED)
    found = {trained.budget: trained}
    for point in given:
        if point.offsets != TRAINED:
            found.setdefault(point.budget, point)
    return [found[budget] for budget in sorted(found)]
