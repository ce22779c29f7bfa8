"""The stages of each command, in order, for the time that it has left: seconds for the demo on two cores."""

from __future__ import annotations

from adavit.calibration.options import BudgetOptions, CalibrationOptions
from adavit.console.progress import Stage
from adavit.tensorrt.options import BuildOptions

__all__ = [
    "adding_stages",
    "checking_stages",
    "comparing_stages",
    "exporting_stages",
    "running_stages",
    "single_stages",
    "training_stages",
]

MACS_PER_SECOND = 5e10
"""Of a model in PyTorch."""
LOADING = Stage("loading the bundle", 1)
VERIFYING = (LOADING, Stage("running the checkpoint", 5), Stage("verifying", 4))
CALIBRATING = (LOADING, Stage("running calibration images", 2), Stage("measuring ranges", 4))
SEARCHING = (
    Stage("exporting", 10), Stage("exporting", 10), Stage("measuring sensitivity", 20),
    Stage("putting sub-layers back", 10),
)  # fmt: skip


def running_stages(
    seconds: float | None, iterations: int | None, latency: bool, profile: bool, backend: str
) -> list[Stage]:
    """Those of `adavit-run`.

    Args:
        seconds: of the measurement, 3 by default.
        iterations: of the measurement, in the place of seconds.
        latency: whether the budget for a latency is looked for.
        profile: whether the time is also booked.
        backend: what runs; "auto" measures several.
    """
    measured = Stage("measuring", iterations * 0.02) if iterations else _measuring(seconds or 3.0)
    warm = Stage("warming up", 0.3)
    return [
        Stage("loading the bundle", 5.0 if backend == "auto" else 1.0),
        *([Stage("timing operating points", 3, fixed_duration=True)] if latency else []),
        Stage("running images", 0.3),
        Stage("preparing", 0.3),
        warm,
        measured,
        *([warm, measured._replace(name="profiling")] if profile else []),
    ]


def comparing_stages(bundles: int, seconds: float | None, iterations: int | None) -> list[Stage]:
    """Those of `adavit-run --compare`, of so many bundles and precisions."""
    measured = Stage("measuring", iterations * 0.04 * bundles) if iterations else _measuring(bundles * (seconds or 3.0))
    return [LOADING, Stage("comparing", 2.0 * bundles), measured]


def _measuring(seconds: float) -> Stage:
    """A measurement that ends by the clock."""
    return Stage("measuring", seconds, fixed_duration=True)


def training_stages(training: float, balancing: float, evaluating: float) -> list[Stage]:
    """Those of `adavit-train dense` and `adapt`, by their MACs; what has none does not come."""
    parts = ("training", training), ("meeting the targets", balancing), ("evaluating", evaluating)
    return [Stage(name, macs / MACS_PER_SECOND) for name, macs in parts if macs]


def checking_stages() -> list[Stage]:
    """Those of `adavit-export --check`."""
    return [LOADING, Stage("loading the checkpoint", 2), *VERIFYING[1:]]


def adding_stages(budgets: BudgetOptions, build: BuildOptions) -> list[Stage]:
    """Those that add budgets and engines to a bundle."""
    searched = [LOADING, Stage("reading images", 0.5), Stage("finding operating points", 120)]
    found = searched if budgets.budgets else []
    found += [Stage("recording policies", 15)] if budgets.calibration_images else []
    return found + [Stage(f"building {target}", 60) for target in build.target]


def exporting_stages(
    verify: bool, calibration: CalibrationOptions, budgets: BudgetOptions, build: BuildOptions
) -> list[Stage]:
    """Those of an export."""
    stages = [Stage("loading the checkpoint", 2), Stage("exporting", 1), *(VERIFYING if verify else ())]
    converted = [precision for precision in calibration.precisions if precision != "fp32"]
    stages += CALIBRATING if converted else []
    for precision in converted:
        stages += [*(SEARCHING if precision == "mixed" else ()), Stage("exporting", 10)]
    stages += [LOADING, Stage("checking the precision", 3 * len(converted))] if converted and verify else []
    return stages + adding_stages(budgets, build)


def single_stages(given: bool, verify: bool, calibration: CalibrationOptions, budgets: BudgetOptions) -> list[Stage]:
    """Those of a single file; `given` says that its bundle is there already."""
    stages = [] if given else exporting_stages(verify, CalibrationOptions(), budgets, BuildOptions())
    stages.append(LOADING)
    if calibration.calibrated and calibration.measured:
        stages += [*CALIBRATING, Stage("exporting", 10)]
    elif calibration.calibration_images:
        stages.append(Stage("running calibration images", 2))
    stages.append(Stage("writing the file", 1))
    if verify:
        stages += [Stage("running images", 1), Stage("verifying", 3)]
        stages += [Stage("checking the precision", 3)] if calibration.calibrated else []
    return stages
