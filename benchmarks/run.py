"""Reproduces the README's numbers: python benchmarks/run.py --output results

Every row is one `adavit-run` in a process of its own, adaptive and dense alternating in the same backend: random models
of published shapes at every batch size, and for single images with every policy on, with policies by chance of the same
usage, and with nothing prepared for what images use most; then the demo on test images of Fashion-MNIST. The masked
PyTorch model is measured beside the first backend's single images. Memory and load times are of processes of their own,
too. Writes results.json and latency.png.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fashion_mnist import DATA, write_pictures
from latency_plot import plot
from models import ARCHITECTURES, BIASES, random_model

from adavit.bundle.bundle import Bundle
from adavit.bundle.demo import demo_bundle
from adavit.export import ExportOptions, export_bundle
from adavit.runtime import Policy

RUN = [sys.executable, "-c", "from adavit.entry import run; run()"]
MEMORY = [sys.executable, str(Path(__file__).parent / "memory.py")]
DEMO_ROWS = {"at 35 %": (1, "--budget", "0.35"), "as trained": (1,), "as trained, batches": (32,)}
"""Batch size and options of `adavit-run`."""

Row = dict[str, Any]


def output_of(command: list[str]) -> Row:
    """The JSON that a process prints."""
    found: Row = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return found


def shuffled(policy: Policy, seed: int) -> Policy:
    """A random policy of the same usage: every block's choices permuted, per image."""
    source = np.random.default_rng(seed)
    tokens = policy.tokens.copy()
    tokens[..., 1:] = source.permuted(tokens[..., 1:], axis=-1)
    return Policy(tokens, source.permuted(policy.heads, axis=-1), policy.sublayers)


def masked_milliseconds(name: str, profile: str, seed: int, threads: int) -> float:
    """Median of the masked PyTorch forward at batch 1: what a policy costs where it only masks."""
    torch.set_num_threads(threads)
    model = random_model(name, profile, seed)
    times = []
    with torch.inference_mode():
        for _ in range(7):
            start = time.perf_counter()
            model(torch.randn(1, 3, 224, 224))
            times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times[2:])


class Benchmark:
    """Measures rows, and prints each.

    Args:
        arguments: of the command line.
        folder: for checkpoints and bundles.

    Attributes:
        rows: reports of `adavit-run`, with the model's name, its profile and the policy: "own", "everything on" or
            "random".
        memory: for each bundle and backend, load seconds and peak MiB of adaptive and dense.
    """

    def __init__(self, arguments: argparse.Namespace, folder: Path) -> None:
        self._arguments, self._folder = arguments, folder
        self._limits = ["--threads", str(arguments.threads), "--seconds", str(arguments.seconds), "--json", "-"]
        self.rows: list[Row] = []
        self.memory: list[Row] = []

    def measure(
        self, bundle: Path, model: str, profile: str, backend: str, batch: int, *options: str, policy: str = "own"
    ) -> Row:
        """One `adavit-run`."""
        command = [*RUN, str(bundle), "--backend", backend, "--batch", str(batch), *self._limits, *options]
        report = output_of(command) | {"model": model, "profile": profile, "policy": policy, "predictions": []}
        self.rows.append(report)
        print(line(report), flush=True)
        return report

    def of_random_model(self, name: str, profile: str) -> None:
        """Every row of one model and profile."""
        given = self._arguments
        checkpoint, bundle, recorded = (self._folder / f"{name}-{profile}{end}" for end in (".pth", "", ".npz"))
        torch.save(random_model(name, profile, given.seed).state_dict(), checkpoint)
        export_bundle(checkpoint, bundle, ExportOptions(with_dense=True), lambda *_: None)
        for backend, batch in itertools.product(given.backends, given.batches):
            self.measure(bundle, name, profile, backend, batch)
        replay = "--replay-policy", str(recorded)
        for backend in given.backends:
            own = self.measure(bundle, name, profile, backend, 1, "--record-policy", str(recorded), "--no-specialise")
            if backend == given.backends[0]:
                own["masked_pytorch_ms"] = masked_milliseconds(name, profile, given.seed, given.threads)
                shuffled(Policy.load(recorded), given.seed).save(recorded)
                self.measure(bundle, name, profile, backend, 1, *replay, policy="random")
            Policy.dense(ARCHITECTURES[name], own["images"]).save(recorded)
            self.measure(bundle, name, profile, backend, 1, *replay, policy="everything on")
            self.remember(bundle, name, profile, backend)

    def of_demo(self) -> None:
        """Every row of the demo."""
        given, demo = self._arguments, demo_bundle()
        names = Bundle.open(demo).labels
        images = write_pictures(given.data, "t10k", given.test_images, names, self._folder / "test")
        for backend, (profile, (batch, *options)) in itertools.product(given.backends, DEMO_ROWS.items()):
            self.measure(demo, "demo", profile, backend, batch, "--images", str(images), *options)

    def remember(self, bundle: Path, model: str, profile: str, backend: str) -> None:
        """Load time and peak memory of a bundle and its dense twin."""
        command = [*MEMORY, str(bundle), "--backend", backend, "--threads", str(self._arguments.threads)]
        kinds = {"adaptive": (), "adaptive, samples": ("--parallel", "samples"), "dense": ("--dense",)}
        found = {kind: output_of([*command, *options]) for kind, options in kinds.items()}
        self.memory.append({"model": model, "profile": profile, "backend": backend, **found})
        cells = [f"{kind} {of['peak_mib']:.0f} MiB, loaded in {of['load_s']:.2f} s" for kind, of in found.items()]
        print(f"{model} {profile}, {backend}: " + "; ".join(cells), flush=True)


def line(row: Row) -> str:
    """A row of the table."""
    share = row["macs"]["executed_mean"] / row["macs"]["dense"]
    accuracy = "" if row["accuracy"] is None else f", {row['accuracy']['top1']:.1%} right"
    cells = [
        f"{row['model']} {row['profile']}",
        row["policy"] + accuracy + ("" if row["prepared"] else ", nothing prepared"),
        row["backend"],
        str(row["batch"]),
        f"{share:.0%}",
        f"{row['dense']['latency_ms']['p50']:.1f}",
        f"{row['latency_ms']['p50']:.1f}",
        f"{row['speedup']:.2f}x",
        f"{row['ideal_speedup']:.2f}x",
        f"{row['efficiency']:.2f}",
    ]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    """Measures, prints, and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--backends", nargs="+", default=["onnxruntime", "openvino"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--test-images", type=int, default=520)
    arguments = parser.parse_args()
    if not arguments.data.is_dir():
        parser.error(f"{arguments.data} is no folder; install Debian's dataset-fashion-mnist, or name one with --data")
    arguments.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        benchmark = Benchmark(arguments, Path(folder))
        for name, profile in BIASES:
            benchmark.of_random_model(name, profile)
        benchmark.of_demo()
    found = {"rows": benchmark.rows, "memory": benchmark.memory}
    (arguments.output / "results.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    plot(benchmark.rows, arguments.output / "latency.png")


if __name__ == "__main__":
    main()
