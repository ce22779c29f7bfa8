"""Measures this machine's GPU: python benchmarks/gpu.py [--bundle BUNDLE] [--json FILE]

Builds engines, checks that they keep what the CPU keeps, and measures every way to drive batches of 1, 8 and 32 images
against the dense engine, in turns, in fp16 and int8; under 8 minutes. Beside a measurement stands what gpu_model.py
predicts for this GPU, if it has its figures. Whatever is not installed is left out, and named. Without --bundle, a
DeiT-S with random weights and policies of about the published usage is exported first, which needs adavit[export].
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from time import monotonic, perf_counter
from typing import Any, NamedTuple

import gpu_model
import numpy as np
from gpu_figures import GPUS
from PIL import Image

import adavit
from adavit.bundle.bundle import Bundle
from adavit.errors import AdaViTError, BackendError, missing_package
from adavit.runtime import Runtime
from adavit.runtime.backends.cuda.bindings import Cuda
from adavit.runtime.batch import WAYS
from adavit.tensorrt.build import add_engines
from adavit.tensorrt.options import BuildOptions

BATCHES, PRECISIONS = (1, 8, 32), ("fp16", "int8")
SECONDS = 8 * 60 - 30
"""After which nothing new is begun."""
ROUNDS, LEAST_SECONDS = 9, 0.05
"""Turns of every way, and how long each is run in a turn at least."""
PARITY_IMAGES = 32
FLAVOURS = ("tensorrt", "tensorrt-rtx")

Row = dict[str, Any]


class Target(NamedTuple):
    """What runs: a backend, and its provider."""

    backend: str
    provider: str | None = None

    @property
    def name(self) -> str:
        return self.provider or self.backend


TARGETS = (
    Target("tensorrt"),
    Target("tensorrt-rtx"),
    Target("onnxruntime", "CUDAExecutionProvider"),
    Target("onnxruntime", "TensorrtExecutionProvider"),
    Target("onnxruntime", "NvTensorRTRTXExecutionProvider"),
)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def export(folder: Path) -> Path:
    """A DeiT-S in both precisions, with statistics."""
    try:
        import torch
        from models import random_model
    except ModuleNotFoundError as error:
        raise BackendError(f"{missing_package(error) or error}; or give --bundle BUNDLE") from None
    pictures, source = folder / "pictures", np.random.default_rng(0)
    pictures.mkdir()
    for number in range(64):
        Image.fromarray(source.integers(0, 256, (224, 224, 3), dtype=np.uint8)).save(pictures / f"{number}.png")
    torch.save(random_model("deit_small", "published", 0).state_dict(), folder / "deit_small.pth")
    adavit.export_bundle(
        folder / "deit_small.pth", folder / "bundle", precision=PRECISIONS, calibration_images=pictures, verify=False
    )
    return folder / "bundle"


def build(bundle: Path, capability: int) -> dict[str, str]:
    """Adds engines of both flavours, where their packages are; returns why not."""
    missing = {}
    for flavour in FLAVOURS:
        say(f"building {flavour} engines")
        began = monotonic()
        rtx = {"compute_capability": (capability,)} if flavour == "tensorrt-rtx" else {}
        try:
            add_engines(bundle, BuildOptions(target=(flavour,), conditional=True, jobs=4, **rtx), lambda *_: None)
            say(f"built in {monotonic() - began:.0f} s")
        except AdaViTError as error:
            missing[flavour] = str(error)
    return missing


def loaded(bundle: Path, target: Target, precision: str, **how: Any) -> Runtime:
    return adavit.load(bundle, target.backend, provider=target.provider, precision=precision, **how)


def parity(bundle: Path, runtime: Runtime, precision: str) -> Row:
    """How far a GPU's decisions and logits are from those that the CPU makes of the same images."""
    images = random_images(runtime, PARITY_IMAGES)
    wanted = adavit.load(bundle, precision=precision, specialise=False).run(images)
    found = runtime.run(images)
    same = [np.mean(a == b) for a, b in zip(found.policy.masks(), wanted.policy.masks(), strict=True)]
    replayed = runtime.run(images, policy=wanted.policy).logits
    return {
        "decisions": dict(zip(("tokens", "heads", "sublayers"), map(float, same), strict=True)),
        "classes": float(np.mean(found.logits.argmax(1) == wanted.logits.argmax(1))),
        "replayed_logits": float(np.abs(replayed - wanted.logits).max() / np.abs(wanted.logits).max()),
    }


def random_images(runtime: Runtime, count: int) -> np.ndarray:
    side = runtime.architecture.image_size
    return np.random.default_rng(count).standard_normal((count, 3, side, side), dtype=np.float32)


def measure(bundle: Path, target: Target, precision: str, until: float) -> Iterator[Row]:
    """A row for each batch size: ms of every way and of the dense engine."""
    ways, why = {}, {}
    for way in WAYS:
        try:
            runtime = loaded(bundle, target, precision, dispatch=way)
        except AdaViTError as error:
            why[way] = str(error)
            continue
        ways[way] = runtime
        why |= left_out(way, runtime)
    ways = {way: runtime for way, runtime in ways.items() if way not in why}
    if not ways:
        raise BackendError("; ".join(dict.fromkeys(why.values())))
    first = next(iter(ways.values()))
    checked = parity(bundle, first, precision)
    for batch in BATCHES:
        if monotonic() > until:
            say(f"no time left for {target.name} {precision} batch {batch}")
            return
        images = random_images(first, batch)
        runs = {way: partial(runtime.run, images) for way, runtime in ways.items()}
        if first.graphs.files.dense:
            runs["dense"] = partial(first.run_dense, images)
        times = in_turns(runs)
        for way, runtime in ways.items():  # who cannot record a batch finds out when it tries
            why |= left_out(way, runtime)
        yield {
            "target": target.name, "precision": precision, "batch": batch,
            "ms": {name: ms for name, ms in times.items() if name not in why},
            "left_out": dict(why), "parity": checked, "versions": first.backend.versions(),
        }  # fmt: skip


def measure_all(bundle: Path, capability: int, until: float) -> tuple[list[Row], dict[str, str]]:
    """The rows of everything that is installed, and why the rest is left out."""
    precisions, rows = tuple(Bundle.open(bundle).graphs), []
    missing = build(bundle, capability)
    for target in TARGETS:
        for precision in precisions:
            if monotonic() > until:
                missing[target.name] = "no time was left"
                continue
            say(f"measuring {target.name} in {precision}")
            try:
                rows += measure(bundle, target, precision, until)
            except AdaViTError as error:
                missing.setdefault(target.name, str(error))
    return rows, missing


def left_out(way: str, runtime: Runtime) -> dict[str, str]:
    """Why a way is not gone, by its name."""
    reason = None if runtime.backend.on_host else runtime.backend.why_not(way)
    return {way: reason} if reason else {}


def in_turns(runs: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Median ms of every run."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(ROUNDS + 1):
        for name, run in runs.items():
            began, count = perf_counter(), 0
            while count < 3 or perf_counter() - began < LEAST_SECONDS:
                run()
                count += 1
            if turn:
                times[name].append(1e3 * (perf_counter() - began) / count)
    return {name: median(found) for name, found in times.items()}


def gpu_name(cuda: Cuda) -> str:
    found = cuda.call("cudaGetDeviceProperties", 0).name
    return found.decode() if isinstance(found, bytes) else str(found)


def predictions(name: str) -> dict[tuple[str, int], dict[str, float]]:
    """What the model says of this GPU, ms by precision and batch; nothing where it has no figures of it."""
    known = next((key for key in GPUS if key.lower() in name.lower()), None)
    if known is None:
        return {}
    rows = gpu_model.rows_of("deit_small", "published", {known: GPUS[known]}, BATCHES, PRECISIONS)
    return {(row["precision"], row["batch"]): row["ms"] for row in rows}


def table(rows: list[Row], model: dict[tuple[str, int], dict[str, float]]) -> str:
    names = ("dense", *WAYS)
    lines = [f"{'target':<32} {'in':<5} {'batch':>5}  " + " ".join(f"{name:>18}" for name in names) + "  speedup"]
    for row in rows:
        predicted, cells = model.get((row["precision"], row["batch"]), {}), []
        for name in names:
            measured = f"{row['ms'][name]:.2f}" if name in row["ms"] else "-"
            cells.append(measured + (f" ({predicted[name]:.2f})" if name in predicted else ""))
        adaptive = [row["ms"][way] for way in WAYS if way in row["ms"]]
        gain = f"{row['ms']['dense'] / min(adaptive):.2f}x" if "dense" in row["ms"] and adaptive else "-"
        cells = [f"{cell:>18}" for cell in cells]
        lines.append(f"{row['target']:<32} {row['precision']:<5} {row['batch']:>5}  {' '.join(cells)}  {gain:>7}")
    return "\n".join([*lines, "", "ms a batch, medians; in brackets what the model predicts"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, help="with the precisions to measure; engines are added to it")
    parser.add_argument("--json", type=Path, help="all numbers")
    arguments = parser.parse_args()
    until = monotonic() + SECONDS
    try:
        cuda = Cuda()
        name, capability = gpu_name(cuda), cuda.compute_capability()
        with tempfile.TemporaryDirectory() as folder:
            bundle = arguments.bundle or export(Path(folder))
            rows, missing = measure_all(bundle, capability, until)
    except AdaViTError as error:
        print(f"gpu.py: {error}", file=sys.stderr)
        return 1
    model = {} if arguments.bundle else predictions(name)
    print(f"{name}, compute capability {capability}\n\n{table(rows, model)}")
    for target, why in missing.items():
        print(f"left out: {target}: {why}")
    if arguments.json:
        predicted = [{"precision": key[0], "batch": key[1], "ms": ms} for key, ms in model.items()]
        report = {"gpu": name, "compute_capability": capability, "machine": platform.platform(), "rows": rows,
                  "model": predicted, "left_out": missing}  # fmt: skip
        arguments.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0 if rows else 1


if __name__ == "__main__":
    sys.exit(main())
