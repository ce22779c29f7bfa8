"""The training loop: one for dense and adaptive models, one process or many, from the start or resumed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from adavit.bundle.preprocessing import Preprocessor
from adavit.errors import one_line
from adavit.model import policy as P
from adavit.model.adavit import AdaViT
from adavit.training import objective
from adavit.training.balance import balance
from adavit.training.data import LabelledImages
from adavit.training.distributed import global_sum
from adavit.training.errors import TrainingError
from adavit.training.gumbel import GumbelDecide, noise_scale
from adavit.training.loader import TrainingBatches, evaluation_batches, spread, watched
from adavit.training.log import Log, Progress, Record, Reporter, silent
from adavit.training.losses import classification
from adavit.training.optimise import learning_rate, set_learning_rate, update_average
from adavit.training.predict import predict
from adavit.training.recorder import Recording, record
from adavit.training.settings import PolicySettings
from adavit.training.state import RunState
from adavit.training.token_drop import choose_tokens
from adavit.training.usage import measure_usage

__all__ = ["Intervals", "Trainer"]

NOISE_STREAM = 1_000_003
LOG = "log.jsonl"
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


class Trainer(RunState):
    """Trains what `RunState` holds."""

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
        log = Log(self.folder / LOG, self.step - (self.unfinished is not None)) if self.world.is_main else None

        def note(entry: Record) -> None:
            if entry and log:
                log.write({"step": self.step, "epoch": self.step / batches.per_epoch, **entry})

        def save() -> None:
            if self.world.is_main:
                self.save(self.step // batches.per_epoch)

        first = self.step
        with self._parts() as (forward, recordings):
            for images, targets in batches.iterate(self.step, settings.steps):
                with _compiler_errors():
                    terms = self._update(
                        forward, recordings, images.to(self.world.device), targets.to(self.world.device)
                    )
                self.step += 1
                reporter.progress("training", (self.step - first) / (settings.steps - first))
                learnt = {"learning_rate": learning_rate(self.step - 1, settings), **terms}
                if self.step == settings.steps:
                    self.unfinished = learnt
                    save()
                    break
                entry = learnt if self.step % intervals.log == 0 else {}
                if self.step % intervals.evaluate == 0:
                    entry = entry | self.evaluate(test, intervals.images)
                    reporter.say(self._result(terms["loss"], entry))
                note(entry)
                if self.step % intervals.save == 0:
                    save()
        batches.close()
        if self.unfinished is not None:
            note(self._finish(self.unfinished, train, test, intervals, reporter))
            self.unfinished = None
            save()

    def _finish(
        self,
        learnt: Record,
        train: LabelledImages,
        test: LabelledImages,
        intervals: Intervals,
        reporter: Reporter,
    ) -> Record:
        """Moves the decisions to their targets and evaluates; the record of the last step."""
        entry = learnt | self._balance(train, reporter.progress)
        entry |= self.evaluate(test, intervals.images, reporter.progress)
        reporter.say(self._result(entry["loss"], entry))
        return entry

    @contextmanager
    def _parts(self) -> Iterator[tuple[torch.nn.Module, tuple[Recording, Recording] | None]]:
        """The module to call, parallel where there are more processes, and recordings where they are compared."""
        policy = self.settings.policy
        with ExitStack() as stack:
            recordings = None
            if policy and policy.distils_features and isinstance(self.teacher, AdaViT):
                recordings = stack.enter_context(record(self.model)), stack.enter_context(record(self.teacher))
            module: torch.nn.Module = self.model
            if self.world.size > 1:
                module = DistributedDataParallel(module)
            if self.settings.compile:
                module.compile()
            yield module, recordings

    def _update(
        self,
        forward: torch.nn.Module,
        recordings: tuple[Recording, Recording] | None,
        images: Tensor,
        targets: Tensor,
    ) -> dict[str, float]:
        """One optimiser step; the loss, its terms and the usages."""
        set_learning_rate(self.optimiser, learning_rate(self.step, self.settings))
        bf16 = self.settings.precision == "bf16"
        with torch.autocast(self.world.device.type, torch.bfloat16, enabled=bf16):
            terms, usages = self._terms(forward, recordings, images, targets)
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
        recordings: tuple[Recording, Recording] | None,
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
            terms |= objective.distillation_terms(output, taught, recordings, self.model.arch.heads, self.settings)
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
        targets = self.settings.policy.weighted_targets if self.settings.policy else {}
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
