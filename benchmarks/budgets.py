"""Accuracy against MACs of one checkpoint: python benchmarks/budgets.py --output results

Runs the operating points of the demo's bundle on test images of Fashion-MNIST, beside two ways of spending as many
MACs: the same offset for every decision, and policies by chance that keep as many tokens, heads and sub-layers
in every block. With --calibrate, the points are first found on training images, with `adavit-export`, in the bundle
OUTPUT/bundle. Writes budgets.json and budgets.png.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from fashion_mnist import DATA, pictures, write_pictures

import adavit
from adavit.bundle.bundle import Bundle
from adavit.bundle.demo import demo_bundle
from adavit.bundle.operating_points import Offsets
from adavit.macs import dense_macs
from adavit.runtime import Policy, Runtime
from adavit.training.report import RandomPolicy

EXPORT = [sys.executable, "-c", "from adavit.entry import export; export()"]
BATCH = 100
WIDEST, BISECTIONS, COMPARED, CLOSE = 16.0, 16, 1000, 0.002
"""Of the uniform offset: the largest, steps at most, images, and how near to the MACs, relative to them, is enough."""
Row = dict[str, float]


def calibrate(bundle: Path, budgets: str, data: Path, count: int, folder: Path) -> Path:
    """A copy of the bundle in a folder, with operating points from training images."""
    photos = write_pictures(data, "train", count, Bundle.open(bundle).labels, folder / "images")
    copy = shutil.copytree(bundle, folder / "bundle", dirs_exist_ok=True)
    options = ["--budgets", budgets, "--calibration-images", str(photos), "--budget-images", str(count)]
    subprocess.run([*EXPORT, str(copy), *options], check=True)
    return copy


class Held:
    """Held-out images, and what a runtime makes of them."""

    def __init__(self, runtime: Runtime, data: Path, count: int) -> None:
        self.runtime = runtime
        images, self.labels = pictures(data, "t10k", count)
        self.pixels = np.stack([runtime.preprocess(image) for image in images])

    def run(self, count: int | None = None, **how: Any) -> tuple[Row, Policy]:
        """MACs, as a share of the dense ones, and accuracy of the first `count` images, and what they used."""
        right, macs, policies = [], [], []
        given = how.pop("policy", None)
        for start in range(0, count or len(self.pixels), BATCH):
            rows = slice(start, min(start + BATCH, count or len(self.pixels)))
            policy = None if given is None else given[rows]
            result = self.runtime.run(self.pixels[rows], policy=policy, **how)
            right.append(result.logits.argmax(1) == self.labels[rows])
            macs.append(result.macs)
            policies.append(result.policy)
        share = np.concatenate(macs).mean() / dense_macs(self.runtime.architecture)
        row = {"macs": float(share), "accuracy": float(np.concatenate(right).mean())}
        return row, Policy.concatenate(policies)

    def uniform(self, budget: float) -> Row:
        """The same offset for every decision, that takes the MACs of a budget."""
        wanted = self.run(COMPARED, budget=budget)[0]["macs"]
        low, high = -WIDEST, WIDEST
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            taken = self.run(COMPARED, budget=Offsets(middle, middle, middle))[0]["macs"]
            if abs(taken - wanted) <= CLOSE * wanted:
                break
            low, high = (middle, high) if taken < wanted else (low, middle)
        return {"offset": middle, **self.run(budget=Offsets(middle, middle, middle))[0]}

    def by_chance(self, like: Policy) -> Row:
        """Decisions by chance, as many of every kind in every block."""
        policy = RandomPolicy(like, self.runtime.architecture, 0).policy(len(like))
        return self.run(policy=policy)[0]


def margin(curve: list[Row], others: list[Row]) -> list[float]:
    """How much more accurate a curve is than others at their MACs, where it has some as large."""
    macs, accuracy = ([row[key] for row in curve] for key in ("macs", "accuracy"))
    within = [row for row in others if macs[0] * 0.99 <= row["macs"] <= macs[-1] * 1.01]
    return [float(np.interp(row["macs"], macs, accuracy)) - row["accuracy"] for row in within]


def plot(report: dict[str, Any], path: Path) -> None:
    """The three curves."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4.2), layout="constrained")
    for name, style in (("calibrated", "o-"), ("uniform", "s--"), ("random", "x:")):
        axes.plot([r["macs"] for r in report[name]], [100 * r["accuracy"] for r in report[name]], style, label=name)
    trained = report["trained"]
    axes.plot(trained["macs"], 100 * trained["accuracy"], "*k", markersize=12, label="as trained")
    axes.set(xlabel="executed MACs / dense MACs", ylabel=f"top-1 of {report['images']} held-out images, %")
    axes.legend()
    figure.savefig(path, dpi=150)


def main() -> None:
    """Calibrates, runs, prints the table, and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--bundle", type=Path, default=demo_bundle())
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--budgets", default="0.25,0.3,0.35,0.38,0.4,0.45,0.5,0.6,0.7")
    parser.add_argument("--calibrate", action="store_true")
    parser.add_argument("--calibration-images", type=int, default=2048)
    parser.add_argument("--test-images", type=int, default=10_000)
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    bundle = arguments.bundle
    if arguments.calibrate:
        count = arguments.calibration_images
        bundle = calibrate(bundle, arguments.budgets, arguments.data, count, arguments.output)
    runtime = adavit.load(bundle, parallel="samples")
    if runtime.budgets is None:
        parser.error(f"{bundle} has no operating points; pass --calibrate")
    held = Held(runtime, arguments.data, arguments.test_images)
    asked = sorted(float(share) for share in arguments.budgets.split(","))
    report: dict[str, Any] = {"images": arguments.test_images, "points": runtime.budgets.to_dict()}
    report["trained"] = held.run()[0]
    report |= {"calibrated": [], "uniform": [], "random": []}
    print(f"{'budget':>7} {'MACs':>7} {'top-1':>7} {'uniform':>15} {'random':>15}")
    for budget in asked:
        row, used = held.run(budget=budget)
        others = held.uniform(budget), held.by_chance(used)
        for kind, found in zip(("calibrated", "uniform", "random"), (row, *others), strict=True):
            report[kind].append({"budget": budget, **found})
        beside = [f"{r['accuracy']:.2%} at {r['macs']:.3f}" for r in others]
        print(f"{budget:7.3f} {row['macs']:7.4f} {row['accuracy']:7.2%} {beside[0]:>15} {beside[1]:>15}", flush=True)
    between = [held.run(budget=sum(pair) / 2)[0] | {"budget": sum(pair) / 2} for pair in pairwise(asked)]
    curve = report["calibrated"]
    report["interpolated"] = between
    report["macs_error"] = max(abs(row["macs"] / row["budget"] - 1) for row in [*curve, *between])
    report["least_margin"] = {kind: min(margin(curve, report[kind])) for kind in ("uniform", "random")}
    print(f"largest relative error of the MACs, stored and interpolated: {report['macs_error']:.2%}")
    print("least margin over", ", ".join(f"{kind} {value:+.2%}" for kind, value in report["least_margin"].items()))
    (arguments.output / "budgets.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    plot(report, arguments.output / "budgets.png")


if __name__ == "__main__":
    main()
