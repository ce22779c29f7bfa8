"""What is asked of a single file."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from adavit.arguments import choice, flag, number, whole
from adavit.calibration.options import CalibrationOptions
from adavit.errors import InputError, OptionError

__all__ = ["DOMAINS", "PRECISIONS", "WEIGHTS", "SingleFileOptions", "check_target", "files_of"]

DOMAINS = ("standard", "onnxruntime")
WEIGHTS = ("fp32", "fp16")
PRECISIONS = ("fp32", "int8")
LARGEST = 4.0
"""Times the plain file's size that constant weights of frequent head sets may make it."""


@dataclass(frozen=True)
class SingleFileOptions:
    """How a single file is written; see `adavit-export --help`."""

    budget: float | None = None
    budget_input: bool = False
    with_policy: bool = False
    domain: str = "standard"
    max_size: float = 1.0
    weights: str | None = None
    ort_format: bool = False
    calibration: CalibrationOptions = field(default_factory=CalibrationOptions)
    verify: bool = True
    force: bool = False
    threads: int | None = None

    @classmethod
    def taken_from(cls, options: dict[str, Any], **shared: Any) -> SingleFileOptions:
        """Takes its options out of a command's; the shared ones are of an export of a bundle too."""
        own = {field.name: options.pop(field.name) for field in fields(cls) if field.name not in shared}
        return cls(**own, **shared)

    @property
    def precision(self) -> str:
        """Of the file."""
        return self.calibration.precisions[0]

    def check(self) -> None:
        """Raises OptionError where an option is out of range, or does not fit another."""
        for name in ("budget_input", "with_policy", "ort_format", "verify", "force"):
            flag(name, getattr(self, name))
        choice("domain", self.domain, DOMAINS)
        self._check_calibration()
        number("max_size", self.max_size, 1, LARGEST)
        if self.threads is not None:
            whole("threads", self.threads, 1, 1024)
        if self.budget is not None:
            number("budget", self.budget, 0, 1, above=True)
            if self.budget_input:
                raise OptionError("give `budget`, which is baked in, or `budget_input`, not both")
        if self.weights is not None:
            choice("weights", self.weights, WEIGHTS)
        if self.precision == "int8" and (self.weights is not None or self.max_size > 1):
            unused = "weights" if self.weights is not None else "max_size"
            raise OptionError(f"`precision` int8 stores int8 weights, each once; leave out `{unused}`")

    def _check_calibration(self) -> None:
        """Raises OptionError where an option of the calibration is out of range, or would be ignored."""
        found = self.calibration
        if len(found.precisions) > 1:
            raise OptionError("a single file has one `precision`; write a file for each")
        choice("precision", self.precision, PRECISIONS)
        found.check_ranges()
        flag("labels_by_order", found.labels_by_order)
        if found.labels_by_order and not found.calibration_images:
            raise OptionError("`labels_by_order` is of the class folders of `calibration_images`; give them too")
        found.refuse_unused(images=False)
        unused = found.set_for_calibration(images=True)
        if self.precision == "int8" and unused and not found.measured:
            raise OptionError(f"`{unused[0]}` is of a calibration; give `calibration_images` too")


def files_of(output: Path, ort_format: bool) -> dict[str, Path]:
    """What is written, by the keys of the report."""
    return {"file": output, "json": output.with_suffix(".json")} | (
        {"ort": output.with_suffix(".ort")} if ort_format else {}
    )


def check_target(output: Path, options: SingleFileOptions) -> None:
    """Raises InputError where the files may not be written."""
    if output.suffix != ".onnx":
        raise OptionError(f"{output}: a single file ends in .onnx; name it so")
    if not output.parent.is_dir():
        raise InputError(f"{output.parent}: no such folder to write the file into; make it first")
    for path in files_of(output, options.ort_format).values():
        if path.is_dir():
            raise InputError(f"{path}: is a folder; name a file")
        if path.exists() and not options.force:
            raise InputError(f"{path}: already there; give `force=True` to replace it")
