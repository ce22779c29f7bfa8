"""What can be asked of a build, and which flavour of TensorRT can do it."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from adavit.arguments import choice, flag, whole
from adavit.bundle.engine_set import FLAVOURS, MOST_BATCH
from adavit.errors import OptionError

__all__ = ["BuildOptions"]

UNSUPPORTED = {
    "tensorrt": {
        "compute_capability": "it builds for the GPU it runs on; build on that machine, or add `hardware_compatible`",
    },
    "tensorrt-rtx": {
        "hardware_compatible": "name the GPUs with `compute_capability`",
        "version_compatible": "its engines are for the version that built them",
        "timing_cache": "its builder times no kernels",
    },
}
"""What a flavour cannot do, and why or what else does it."""

RANGES = {
    "workspace": (1, 1 << 20),
    "builder_optimization_level": (0, 5),
    "max_batch": (1, MOST_BATCH),
    "jobs": (1, 64),
}
"""The least and the most of each number."""

FLAGS = ("hardware_compatible", "version_compatible", "strip_weights", "conditional", "leave_out_heads")


@dataclass(frozen=True)
class BuildOptions:
    """What `adavit-export --target` is asked for; see `adavit-export --help`."""

    target: tuple[str, ...] = ()
    compute_capability: tuple[int, ...] = ()
    hardware_compatible: bool = False
    version_compatible: bool = False
    timing_cache: Path | None = None
    workspace: int | None = None
    builder_optimization_level: int | None = None
    max_batch: int = 32
    jobs: int = 1
    strip_weights: bool = False
    conditional: bool = False
    leave_out_heads: bool = False

    @classmethod
    def taken_from(cls, options: dict[str, Any]) -> BuildOptions:
        """Takes these fields out of a command's options, and checks them.

        Raises:
            OptionError: a target cannot do what is asked.
        """
        build = cls(**{field.name: options.pop(field.name) for field in fields(cls)})
        build.check()
        return build

    def check(self) -> None:
        """Raises OptionError where an option is out of range, a flavour lacks it, or no target is there to use it."""
        self._check_ranges()
        if not self.target:
            if self != BuildOptions():
                raise OptionError("options for building TensorRT engines without a `target`; add one")
            return
        if len(set(self.target)) < len(self.target):
            raise OptionError("a `target` is there twice")
        for target in self.target:
            for option, why in UNSUPPORTED[target].items():
                if getattr(self, option):
                    raise OptionError(f"{target} has no `{option}`: {why}")

    def _check_ranges(self) -> None:
        for target in self.target:
            choice("target", target, sorted(FLAVOURS))
        for capability in self.compute_capability:
            whole("compute_capability", capability, 10, 999)
        for name in FLAGS:
            flag(name, getattr(self, name))
        for name, (least, most) in RANGES.items():
            if getattr(self, name) is not None:
                whole(name, getattr(self, name), least, most)
