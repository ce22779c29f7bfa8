"""The training loop: one for dense and adaptive models, one process or many, from the start or resumed."""

from __future__ import annotations

import argparse
import copy
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from adavit.errors import one_line
from adavit.model import policy as P
from adavit.model.adavit import AdaViT
from adavit.runtime.images import Preprocessor
from adavit.training import objective
from adavit.training.balance import balance
from adavit.training.checkpoint import VERSION, read_checkpoint, write_checkpoint
from adavit.training.data import LabelledImages
from adavit.training.distributed import World, global_sum
from adavit.training.errors import TrainingError
from adavit.training.gumbel import GumbelDecide, noise_scale
from adavit.training.loader import TrainingBatches, evaluation_batches, spread, watched
from adavit.training.log import Log, Progress, Reporter, silent
from adavit.training.losses import classification
from adavit.training.optimise import (
    build_optimiser,
    learning_rate,
    restore_moments,
    set_learning_rate,
    update_average,
)
from adavit.training.predict import predict
from adavit.training.recorder import Recording, record
from adavit.training.settings import PolicySettings, Settings, describe_change
from adavit.training.teacher import Teacher
from adavit.training.token_drop import choose_tokens
from adavit.training.usage import measure_usage

__all__ = ["Intervals", "Trainer"]

NOISE_STREAM = 1_000_003
CHECKPOINT, LOG = "checkpoint.pth", "log.jsonl"
SILENT = Reporter()


@contextmanager
def _compiler_errors() -> Iterator[None]:
    """Puts what torch.compile raises into one line; importing its exceptions would load the compiler."""
    try:
        yield
    except RuntimeError as error:
        if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            raise
        raise TrainingError(f"the model cannot be compiled here ({one_line(error)}); leave --compile out") from None


@dataclass(frozen=True)
class Intervals:
    """How often a run looks up from its work, in steps.

    Attributes:
        log: between log records; save: between checkpoints; evaluate: between evaluations.
        images: test images of one evaluation, 0 for all.
    """

    log: int
    save: int
    evaluate: int
    images: int = 0


class Trainer:
    """A run: the model, its moving average, the optimiser, and where they stand.

    Args:
        model: starting weights, trained in place.
        settings: of the run.
        world: this process.
        folder: where checkpoint and log go.
        teacher: model to distil from.
        sources: what tells its images and its teacher from others; a resumed run must have the same.
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
        self.metric = 0.0

    def run(
        self,
        train: LabelledImages,
        test: LabelledImages,
        intervals: Intervals,
        workers: int = 2,
        reporter: Reporter = SILENT,
    ) -> None:
        """Trains from the current step to the last one."""
        settings, arch = self.settings, self.model.arch
        batches = TrainingBatches(train, settings, arch.image_size, self.world, workers)
        log = Log(self.folder / LOG, self.step) if self.world.leads else None
        first = self.step
        with self._parts() as (forward, heard):
            for images, targets in batches.iterate(self.step, settings.steps):
                with _compiler_errors():
                    terms = self._update(forward, heard, images.to(self.world.device), targets.to(self.world.device))
                self.step += 1
                reporter.progress("training", (self.step - first) / (settings.steps - first))
                last = self.step == settings.steps
                entry: dict[str, float] = {}
                if last or self.step % intervals.log == 0:
                    entry |= {"learning_rate": learning_rate(self.step - 1, settings), **terms}
                if last:
                    entry |= self._balance(train, reporter.progress)
                if last or self.step % intervals.evaluate == 0:
                    entry |= self.evaluate(test, intervals.images, reporter.progress if last else silent)
                    reporter.say(self._result(terms["loss"], entry))
                if entry and log:
                    log.write({"step": self.step, "epoch": self.step / batches.per_epoch, **entry})
                if self.world.leads and (last or self.step % intervals.save == 0):
                    self.save(self.step // batches.per_epoch)
        batches.close()

    @contextmanager
    def _parts(self) -> Iterator[tuple[torch.nn.Module, tuple[Recording, Recording] | None]]:
        """The module to call, parallel where there are more processes, and recordings where they are compared."""
        policy = self.settings.policy
        with ExitStack() as stack:
            heard = None
            if policy and policy.listens and isinstance(self.teacher, AdaViT):
                heard = stack.enter_context(record(self.model)), stack.enter_context(record(self.teacher))
            module: torch.nn.Module = self.model
            if self.world.size > 1:
                module = DistributedDataParallel(module)
            if self.settings.compile:
                module.compile()
            yield module, heard

    def _update(
        self,
        forward: torch.nn.Module,
        heard: tuple[Recording, Recording] | None,
        images: Tensor,
        targets: Tensor,
    ) -> dict[str, float]:
        """One optimiser step; the loss, its terms and the usages."""
        set_learning_rate(self.optimiser, learning_rate(self.step, self.settings))
        bf16 = self.settings.precision == "bf16"
        with torch.autocast(self.world.device.type, torch.bfloat16, enabled=bf16):
            terms, usages = self._terms(forward, heard, images, targets)
        total = sum(terms.values(), start=torch.zeros((), device=self.world.device))
        self._require_finite(total, terms)
        self.optimiser.zero_grad(set_to_none=True)
        total.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip)
        self.optimiser.step()
        update_average(self.average.state_dict(), self.model, self.step, self.settings.ema)
        return {"loss": float(total.detach()), **{k: float(v.detach()) for k, v in terms.items()}, **usages}

    def _terms(
        self,
        forward: torch.nn.Module,
        heard: tuple[Recording, Recording] | None,
        images: Tensor,
        targets: Tensor,
    ) -> tuple[dict[str, Tensor], dict[str, float]]:
        policy = self.settings.policy
        chosen = self._chosen_tokens(len(images))
        output = forward(images, decide=self._noisy_decide(policy) if policy else None, chosen=chosen)
        usage = measure_usage(output.policies)
        terms = {"classification": classification(output.logits, targets)}
        if policy:
            terms |= objective.usage_terms(output, usage, policy)
        if self.teacher is not None:
            with torch.no_grad():
                taught = self.teacher(images, decide=None)
            terms |= objective.distillation_terms(output, taught, heard, self.model.arch.heads, self.settings)
        return terms, {f"training_{kind}": float(mean.detach()) for kind, mean in usage.items()}

    def _noisy_decide(self, policy: PolicySettings) -> GumbelDecide:
        scale = noise_scale(self.step, self.settings.steps, policy.anneal)
        return GumbelDecide(policy.temperature, scale, self._step_seed(), self.world)

    def _chosen_tokens(self, images: int) -> Tensor | None:
        drop, patches = self.settings.token_drop, self.model.arch.tokens - 1
        chosen = choose_tokens(patches, drop, images, self._step_seed(), self.world)
        return None if chosen is None else chosen.to(self.world.device)

    def _step_seed(self) -> int:
        return self.settings.seed * NOISE_STREAM + self.step

    def _require_finite(self, total: Tensor, terms: dict[str, Tensor]) -> None:
        if not torch.isfinite(total):
            broken = [name for name, value in terms.items() if not torch.isfinite(value)]
            raise TrainingError(
                f"the loss is not finite at step {self.step} ({', '.join(broken) or 'their sum'}); "
                "lower --learning-rate, or train in fp32, and resume from the last checkpoint"
            )

    def _result(self, loss: float, found: Mapping[str, float]) -> str:
        """An evaluation, in words."""
        macs = f" at {found['macs']:.1%} of the MACs" if "macs" in found else ""
        right = f"{found['accuracy']:.2%} of the test images right{macs}"
        return f"step {self.step:,} of {self.settings.steps:,}: loss {loss:.4f}, {right}"

    def _balance(self, train: LabelledImages, progress: Progress) -> dict[str, float]:
        """Moves the averaged decisions to the targets of the kinds whose usage has a weight; the offsets."""
        policy = self.settings.policy
        targets = {kind: goal for kind, goal in policy.targets.items() if policy.weights[kind] > 0} if policy else {}
        found = balance(self.average, targets, train, self.settings, self.world, progress) if targets else {}
        return {f"offset_{kind}": offset for kind, offset in found.items()}

    def evaluate(self, test: LabelledImages, images: int, progress: Progress = silent) -> dict[str, float]:
        """Accuracy, MACs share and usages of the averaged weights, over all processes."""
        chosen = spread(len(test.labels), images)
        mine = chosen[self.world.rank :: self.world.size]
        prepare = Preprocessor(self.model.arch.image_size, self.settings.crop)
        names = ("accuracy", "macs", "tokens", "heads", "sublayers")
        sums = torch.zeros(len(names), dtype=torch.float64)
        if len(mine):
            batches = evaluation_batches(test, mine, prepare, self.settings.batch)
            batches = watched(batches, len(mine), lambda share: progress("evaluating", share))
            found = predict(self.average, batches, P.decide if self.settings.policy else None)
            usage = found.target_usage(self.model.arch.keep)
            means = {"accuracy": found.correct.mean(), "macs": found.macs.mean(), **usage}
            sums = torch.tensor([float(means[name]) * len(mine) for name in names], dtype=torch.float64)
        overall = dict(zip(names, (global_sum(sums.to(self.world.device)) / len(chosen)).tolist(), strict=True))
        self.metric = 100 * overall["accuracy"]
        return overall if self.settings.policy else {"accuracy": overall["accuracy"]}

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
            "args": argparse.Namespace(
                num_heads=arch.heads, shapes=arch.to_dict(), settings=self.settings.to_dict(), sources=self.sources
            ),
        }
        write_checkpoint(self.folder / CHECKPOINT, content)

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
        if not hasattr(begun, "sources") and self.world.leads:
            message = f"{path}: does not note its images and its teacher; make sure that they are the same"
            warnings.warn(message, stacklevel=2)

    def _restore(self, content: dict[str, Any]) -> None:
        self.model.load_state_dict(content["state_dict"])
        self.average.load_state_dict(content["state_dict_ema"])
        restore_moments(self.optimiser, content["optimizer"])
        self.step, self.metric = int(content["step"]), float(content["metric"])
        if not 0 <= self.step <= self.settings.steps:
            raise ValueError(f"step {self.step} of {self.settings.steps}")
