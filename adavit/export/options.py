"""What `adavit-export` is asked for."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from adavit.calibration.options import BudgetOptions, CalibrationOptions
from adavit.tensorrt.options import BuildOptions

__all__ = ["ExportOptions"]


@dataclass(frozen=True)
class ExportOptions:
    """What `adavit-export` is asked for; see its --help. None leaves a choice to the checkpoint."""

    with_dense: bool = True
    opset: int = 20
    labels: Path | None = None
    image_size: int | None = None
    crop_ratio: float | None = None
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None
    heads: int | None = None
    verify: bool = True
    force: bool = False
    threads: int | None = None
    calibration: CalibrationOptions = field(default_factory=CalibrationOptions)
    build: BuildOptions = field(default_factory=BuildOptions)
    budgets: BudgetOptions = field(default_factory=BudgetOptions)
