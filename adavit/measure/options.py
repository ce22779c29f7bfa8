"""What `adavit-run` is asked for."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from adavit.cpus import usable_cpus
from adavit.runtime.backend import Options
from adavit.runtime.loading import load
from adavit.runtime.session import Runtime

__all__ = ["RunOptions"]

LOADING = (
    "backend",
    "threads",
    "provider",
    "parallel",
    "budget",
    "dispatch",
    "trust_engines",
    "precision",
)
"""Options that `adavit.load` takes too."""


@dataclass(frozen=True)
class RunOptions:
    """What `adavit-run` is asked for; see `adavit-run --help`."""

    images: tuple[Path, ...] = ()
    batch: int = 1
    iterations: int | None = None
    seconds: float | None = None
    warmup: int = 3
    threads: int | None = None
    backend: str = "onnxruntime"
    provider: str | None = None
    parallel: str = "auto"
    dispatch: str = "auto"
    trust_engines: bool = False
    record_policy: Path | None = None
    replay_policy: Path | None = None
    draw: Path | None = None
    budget: float | None = None
    latency_ms: float | None = None
    dense: bool | None = None
    top: int = 1
    profile: str | None = None
    specialise: bool = True
    labels_by_order: bool = False
    precision: str | None = None

    def with_used_threads(self, notes: list[str]) -> RunOptions:
        """Fewer threads where a batch uses fewer, since samples run in parallel: the twin has no more then.

        What changes is added to the notes.
        """
        threads = self.threads or usable_cpus()
        options = Options(threads, parallel=self.parallel)
        used = options.workers(self.batch) * options.threads_of(self.batch)
        if used == threads:
            return self
        notes.append(
            f"samples run in parallel, each on one thread: a batch of {self.batch} uses {used} of {threads} "
            "threads, and so does the dense twin here; give a larger `batch`, or `parallel='operators'`"
        )
        return replace(self, threads=used)

    def load(self, bundle: Path, **how: Any) -> Runtime:
        """Loads a bundle to be run so; what is prepared, is prepared before the measurement.

        Args:
            bundle: the folder.
            how: arguments of `adavit.load` that are other than these options.
        """
        values: dict[str, Any] = {name: getattr(self, name) for name in LOADING}
        return load(bundle, specialise=False, **(values | how))
