"""What is asked of calibration: precisions, operating points, and the images to find both on."""

from __future__ import annotations

from dataclasses import dataclass, fields
from numbers import Real
from pathlib import Path
from typing import Any

from adavit.arguments import choice, flag, number, whole
from adavit.bundle.bundle import PRECISIONS
from adavit.errors import OptionError, shown

__all__ = ["DEFAULT_IMAGES", "FEWEST_IMAGES", "METHODS", "BudgetOptions", "CalibrationOptions"]

METHODS = ("entropy", "max", "percentile")
FEWEST_IMAGES, DEFAULT_IMAGES = 16, 512
"""Images to find operating points on: as few as will do, and as many as are taken of more."""


@dataclass(frozen=True)
class CalibrationOptions:
    """Precisions of a bundle, the default first, and what they are calibrated on; see `adavit-export --help`."""

    precisions: tuple[str, ...] = ("fp32",)
    calibration_images: tuple[Path, ...] = ()
    calibration_cache: Path | None = None
    samples: int = 64
    method: str = "max"
    max_drop: float = 0.3
    seed: int = 0
    labels_by_order: bool = False

    @classmethod
    def taken_from(cls, options: dict[str, Any]) -> CalibrationOptions:
        """Takes its options out of a command's, but for the images, which budgets are calibrated on too."""
        shared = {"calibration_images", "labels_by_order"}
        own = {field.name for field in fields(cls)} - shared
        return cls(**{name: options[name] for name in shared}, **{name: options.pop(name) for name in own})

    @property
    def calibrated(self) -> tuple[str, ...]:
        """The precisions that are calibrated: all but fp32."""
        return tuple(name for name in self.precisions if name != "fp32")

    @property
    def measured(self) -> bool:
        """Whether there are ranges, of images or of a cache."""
        return bool(self.calibration_images) or self.calibration_cache is not None

    def set_for_calibration(self, images: bool) -> list[str]:
        """The options that only a calibration follows, and that are not as by default.

        Args:
            images: whether that is of the images too, which budgets are also calibrated on.
        """
        names = {"calibration_cache", "samples", "method", "max_drop", "seed"}
        names |= {"calibration_images", "labels_by_order"} if images else set()
        return [
            field.name for field in fields(self) if field.name in names and getattr(self, field.name) != field.default
        ]

    def refuse_unused(self, images: bool) -> None:
        """Raises OptionError where an option would be ignored, since nothing is calibrated in fp32.

        Args:
            images: as of `set_for_calibration`.
        """
        if not self.calibrated and (unused := self.set_for_calibration(images)):
            raise OptionError(f"nothing is calibrated in fp32, give a `precision` or leave out `{unused[0]}`")

    def check_ranges(self) -> None:
        """Raises OptionError where an option is out of range."""
        whole("samples", self.samples, 16, 4096)
        choice("method", self.method, METHODS)
        number("max_drop", self.max_drop, 0, 100)
        whole("seed", self.seed, 0)

    def check(self) -> None:
        """Raises OptionError where an option is out of range, or does not fit another."""
        self.check_ranges()
        names: Any = self.precisions
        if not isinstance(names, tuple) or not names or not set(names) <= set(PRECISIONS):
            raise OptionError(f"`precision` is {shown(names)}: choose from {', '.join(PRECISIONS)}")
        if len(set(names)) != len(names):
            raise OptionError("`precision` names one twice")
        if not self.calibrated:
            return
        if not self.measured:
            asked = ",".join(self.precisions)
            raise OptionError(f"`precision` {asked} needs `calibration_images`, or a `calibration_cache`")
        if "mixed" in self.precisions and not self.calibration_images:
            raise OptionError("`precision` mixed measures accuracy on images: give `calibration_images`")


@dataclass(frozen=True)
class BudgetOptions:
    """Budgets asked for, and the images to meet them on; see `adavit-export --help`."""

    budgets: tuple[float, ...] = ()
    calibration_images: tuple[Path, ...] = ()
    budget_images: int | None = None
    labels_by_order: bool = False

    @classmethod
    def taken_from(cls, options: dict[str, Any]) -> BudgetOptions:
        """Takes its options out of a command's."""
        return cls(**{field.name: options.pop(field.name) for field in fields(cls)})

    def check(self) -> None:
        """Raises OptionError where an option makes no sense, or does not fit another."""
        flag("labels_by_order", self.labels_by_order)
        if self.budget_images is not None:
            whole("budget_images", self.budget_images, 0)
        for budget in self.budgets:
            if not isinstance(budget, Real) or not 0 < budget <= 1:
                found = f"{budget:g}" if isinstance(budget, Real) else shown(budget)
                raise OptionError(f"`budgets`: {found} is no share of the dense MACs; give numbers such as 0.3,0.5")
        if len(set(self.budgets)) != len(self.budgets):
            raise OptionError("`budgets`: a budget is given twice")
        if self.budgets and not self.calibration_images:
            raise OptionError("`budgets` needs `calibration_images`")
        if self.budget_images is not None and not self.budgets:
            raise OptionError("`budget_images` is of `budgets`; give them too")
        if self.budget_images is not None and self.budget_images < FEWEST_IMAGES:
            raise OptionError(f"`budget_images`: {self.budget_images} are too few; give at least {FEWEST_IMAGES}")
        if self.labels_by_order and not self.calibration_images:
            raise OptionError("`labels_by_order` is of the class folders of `calibration_images`; give them too")
