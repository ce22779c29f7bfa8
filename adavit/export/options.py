"""What is asked of an export."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from adavit.arguments import flag, number, whole
from adavit.bundle.bundle import OPSETS
from adavit.calibration.options import BudgetOptions, CalibrationOptions
from adavit.errors import OptionError, shown
from adavit.tensorrt.options import BuildOptions

__all__ = ["ExportOptions"]


@dataclass(frozen=True)
class ExportOptions:
    """What `adavit-export` is asked for; see `adavit-export --help`. None leaves a choice to the checkpoint."""

    with_dense: bool = True
    opset: int = 20
    labels: Path | None = None
    image_size: int | None = None
    crop_ratio: float | None = None
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None
    heads: int | None = None
    license: str | None = None
    dataset: tuple[str, ...] = ()
    verify: bool = True
    force: bool = False
    threads: int | None = None
    calibration: CalibrationOptions = field(default_factory=CalibrationOptions)
    build: BuildOptions = field(default_factory=BuildOptions)
    budgets: BudgetOptions = field(default_factory=BudgetOptions)

    def check(self) -> None:
        """Raises OptionError where an option is out of range, does not fit another, or would be ignored."""
        if type(self.opset) is not int or self.opset not in OPSETS:
            raise OptionError(f"opset {shown(self.opset)} is not supported; choose {OPSETS[0]} to {OPSETS[-1]}")
        for name, most in (("image_size", None), ("heads", None), ("threads", 1024)):
            if getattr(self, name) is not None:
                whole(name, getattr(self, name), 1, most)
        for name in ("with_dense", "verify", "force"):
            flag(name, getattr(self, name))
        if self.crop_ratio is not None:
            number("crop_ratio", self.crop_ratio, 0.1, 1)
        for name, least in (("mean", -1000), ("std", 0)):
            _check_channels(name, getattr(self, name), least)
        self.calibration.check()
        self.calibration.refuse_unused(images=not self.budgets.budgets)
        self.budgets.check()
        self.build.check()


def _check_channels(name: str, values: object, least: float) -> None:
    """Raises OptionError where a value is no three numbers from `least` to 1000; a deviation is above 0."""
    if values is None:
        return
    if not isinstance(values, tuple) or len(values) != 3:
        raise OptionError(f"{name} is {shown(values)}: expected three numbers, of red, green and blue")
    for value in values:
        number(name, value, least, 1000, above=name == "std")
