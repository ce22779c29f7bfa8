"""Reproduces the README's table and plot: python benchmarks/run.py --output results

Every row is one `adavit-run` in a process of its own, adaptive and dense alternating in the same backend; the masked
PyTorch model and a random policy of the same usage are measured beside the first backend's.
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
from models import BIASES, random_model

from adavit.export import ExportOptions, export_bundle
from adavit.runtime import Policy

COMMAND = [sys.executable, "-c", "from adavit.cli import run; run()"]


def measure(bundle: Path, batch: int, threads: int, seconds: float, *more: str) -> dict[str, Any]:
    """One `adavit-run`, as its JSON report."""
    options = ["--batch", str(batch), "--threads", str(threads), "--seconds", str(seconds), "--json", "-", *more]
    done = subprocess.run([*COMMAND, str(bundle), *options], check=True, capture_output=True, text=True)
    report: dict[str, Any] = json.loads(done.stdout)
    return report


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


def benchmark(name: str, profile: str, folder: Path, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Every row of one model and profile."""
    checkpoint, bundle, recorded = (folder / f"{name}-{profile}{end}" for end in (".pth", "", ".npz"))
    torch.save(random_model(name, profile, arguments.seed).state_dict(), checkpoint)
    export_bundle(checkpoint, bundle, ExportOptions(with_dense=True), lambda *_: None)
    rows = []
    for backend, batch in itertools.product(arguments.backends, arguments.batches):
        how = "--backend", backend, "--record-policy", str(recorded)
        report = measure(bundle, batch, arguments.threads, arguments.seconds, *how)
        report["masked_pytorch_ms"] = report["random_policy_ms"] = None
        if batch == 1 and backend == arguments.backends[0]:
            report["masked_pytorch_ms"] = masked_milliseconds(name, profile, arguments.seed, arguments.threads)
            shuffled(Policy.load(recorded), arguments.seed).save(recorded)
            replayed = "--backend", backend, "--replay-policy", str(recorded)
            replay = measure(bundle, 1, arguments.threads, arguments.seconds, *replayed)
            report["random_policy_ms"] = replay["latency_ms"]["p50"]
        rows.append({**report, "model": name, "profile": profile})
        print(line(rows[-1]), flush=True)
    return rows


def line(row: dict[str, Any]) -> str:
    """A row of the table."""
    share = row["macs"]["executed_mean"] / row["macs"]["dense"]
    cells = [
        f"{row['model']} {row['profile']}",
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


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Latency against executed MACs, each relative to the dense twin's, with the ideal line."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4.5), layout="constrained")
    axes.plot([0, 1], [0, 1], color="0.6", linestyle="--", label="ideal: time follows MACs")
    markers = {1: "o", 8: "s", 32: "^"}
    for number, (name, profile) in enumerate(BIASES):
        for row in (row for row in rows if (row["model"], row["profile"]) == (name, profile)):
            at = row["macs"]["executed_mean"] / row["macs"]["dense"], 1 / row["speedup"]
            first = row["backend"] == rows[0]["backend"]
            label = f"{name}, {profile}" if first and row["batch"] == rows[0]["batch"] else None
            filled = {} if first else {"markerfacecolor": "none"}
            axes.plot(*at, markers.get(row["batch"], "d"), color=f"C{number}", label=label, **filled)
            axes.annotate(str(row["batch"]), at, (5, -3), textcoords="offset points", fontsize="x-small")
    axes.set(xlim=(0, 1.02), ylim=(0, 1.05), xlabel="executed MACs / dense MACs (numbers: batch)")
    axes.set_title("filled: " + ", hollow: ".join(dict.fromkeys(row["backend"] for row in rows)), fontsize="medium")
    axes.set_ylabel("latency / latency of the dense twin")
    axes.legend(loc="lower right", fontsize="small")
    figure.savefig(path, dpi=150)


def main() -> None:
    """Measures, prints the table, writes results.json and latency.png."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--backends", nargs="+", default=["onnxruntime", "openvino"])
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for name, profile in BIASES:
            rows += benchmark(name, profile, Path(folder), arguments)
    (arguments.output / "results.json").write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    plot(rows, arguments.output / "latency.png")


if __name__ == "__main__":
    main()
