"""Where a run stands, and how that is saved and resumed."""

from __future__ import annotations

import argparse
import copy
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adavit.errors import one_line
from adavit.model.adavit import AdaViT
from adavit.training.checkpoint import VERSION, read_checkpoint, write_checkpoint
from adavit.training.distributed import World
from adavit.training.errors import TrainingError
from adavit.training.log import Record
from adavit.training.optimise import build_optimiser, restore_moments
from adavit.training.settings import Settings, describe_change
from adavit.training.teacher import Teacher

__all__ = ["CHECKPOINT", "RunState"]

CHECKPOINT = "checkpoint.pth"


class RunState:
    """A run: the model, its moving average, the optimiser, and where they stand.

    Args:
        model: starting weights, trained in place.
        settings: of the run.
        world: this process.
        folder: where checkpoint and log go.
        teacher: model to distil from.
        sources: what tells its images and its teacher from others; a resumed run must have the same.

    Attributes:
        step: the steps that are done.
        saved: the step of the checkpoint; None where there is none yet.
        unfinished: terms of the last step, until decisions are at their targets and evaluated; None otherwise.
        metric: the last accuracy, in percent.
    """

    def __init__(
        self,
        model: AdaViT,
        settings: Settings,
        world: World,
        folder: Path,
        teacher: Teacher | None = None,
        sources: Mapping[str, str] | None = None,
    ) -> None:
        self.model = model.to(world.device).train()
        self.average = copy.deepcopy(self.model).eval()
        self.settings, self.world, self.folder = settings, world, folder
        self.sources = dict(sources or {})
        self.teacher = teacher.to(world.device).eval() if teacher else None
        self.optimiser = build_optimiser(self.model, settings)
        self.step = 0
        self.saved: int | None = None
        self.unfinished: Record | None = None
        self.metric = 0.0

    @property
    def ended(self) -> bool:
        """Whether nothing is left to do."""
        return self.step == self.settings.steps and self.unfinished is None

    def save(self, epoch: int) -> None:
        """Writes the checkpoint, in the released layout."""
        arch = self.model.arch
        content = {
            "state_dict": self.model.state_dict(),
            "state_dict_ema": self.average.state_dict(),
            "optimizer": self.optimiser.state_dict(),
            "epoch": epoch,
            "step": self.step,
            "arch": "adavit",
            "version": VERSION,
            "metric": self.metric,
            "unfinished": self.unfinished,
            "args": argparse.Namespace(
                num_heads=arch.heads, shapes=arch.to_dict(), settings=self.settings.to_dict(), sources=self.sources
            ),
        }
        write_checkpoint(self.folder / CHECKPOINT, content)
        self.saved = self.step

    def resume(self) -> None:
        """Goes on from the folder's checkpoint.

        Raises:
            TrainingError: there is none, it is of another architecture, of other settings, images or teacher, or
                no run has written it.
        """
        path = self.folder / CHECKPOINT
        if not path.is_file():
            raise TrainingError(f"{path}: no run to resume; leave --resume out to start one")
        content = read_checkpoint(path)
        try:
            self._require_same(path, content["args"])
            self._restore(content)
        except (TrainingError, MemoryError):
            raise
        except Exception as error:  # of a file that others have written, torch raises anything
            raise TrainingError(
                f"{path}: cannot be resumed ({one_line(error)}); start anew in another --output"
            ) from None

    def _require_same(self, path: Path, begun: argparse.Namespace) -> None:
        for words, then, now in (
            ("architecture", begun.shapes, self.model.arch.to_dict()),
            ("settings", begun.settings, self.settings.to_dict()),
            ("sources", getattr(begun, "sources", self.sources), self.sources),
        ):
            if change := describe_change(then, now):
                raise TrainingError(f"{path}: the run to resume has other {words}: {change}; give the same options")
        if not hasattr(begun, "sources") and self.world.is_main:
            message = f"{path}: does not note its images and its teacher; make sure that they are the same"
            warnings.warn(message, stacklevel=2)

    def _restore(self, content: dict[str, Any]) -> None:
        self.model.load_state_dict(content["state_dict"])
        self.average.load_state_dict(content["state_dict_ema"])
        restore_moments(self.optimiser, content["optimizer"])
        self.step, self.metric = int(content["step"]), float(content["metric"])
        if not 0 <= self.step <= self.settings.steps:
            raise ValueError(f"step {self.step} of {self.settings.steps}")
        rest = content.get("unfinished")  # an earlier version saved its last step only when all was done
        self.unfinished = None if rest is None else {name: float(value) for name, value in rest.items()}
        self.saved = self.step
