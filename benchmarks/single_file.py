"""Measures single files: python benchmarks/single_file.py [demo deit_small:published ...] [--json FILE]

Each model runs as a single file, as its dense twin in one file, and in the bundle's runtime, which has prepared for the
images. They take turns; a turn's first call does not count. The files run in plain ONNX Runtime. Of its session's
options, only the number of threads is set. Load times and memory are of processes of their own.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import onnx
import onnxruntime
from models import BIASES, random_model

import adavit
from adavit.bundle.demo import demo_bundle
from adavit.datasets.random_images import random_images
from adavit.model import save_safetensors

IMAGES, CALIBRATION = 8, 48
BUDGETED = ("demo:0.35",)
MODELS = ("demo", *BUDGETED, *(":".join(key) for key in BIASES))
MEMORY = """
import sys, time, numpy, onnxruntime
from pathlib import Path
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = int(sys.argv[2])
start = time.perf_counter()
session = onnxruntime.InferenceSession(sys.argv[1], options)
seconds = time.perf_counter() - start
images = numpy.load(sys.argv[3])
for image in images:
    session.run(["logits"], {"images": image[None]})
status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
print(seconds, int(status["VmHWM"].split()[0]) / 1024)
"""


def main() -> None:
    """Measures, prints a table, and writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", default=list(MODELS))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--max-size", type=float, default=1.0)
    parser.add_argument("--domain", default="standard")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    rows = []
    print(f"{'model':24} batch  dense ms  runtime ms  file ms  of dense  of runtime  size  memory  load")
    for model in given.models:
        with tempfile.TemporaryDirectory() as scratch:
            for row in measure(model, Path(scratch), given):
                rows.append(row)
                print(
                    f"{row['model']:24} {row['batch']:5}  {row['dense_ms']:8.1f}  {row['runtime_ms']:10.1f}  "
                    f"{row['file_ms']:7.1f}  {row['of_dense']:8.2f}  {row['of_runtime']:10.2f}  {row['size']:4.2f}  "
                    f"{row['memory']:6.2f}  {row['load']:4.2f}",
                    flush=True,
                )
    if given.json:
        given.json.write_text(json.dumps({"threads": given.threads, "rows": rows}, indent=2) + "\n")


def measure(model: str, folder: Path, given: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of a model, one for each batch size."""
    name, _, profile = model.partition(":")
    budget = float(profile) if name == "demo" and profile else None
    bundle = demo_bundle() if name == "demo" else bundle_of(name, profile, folder, given.seed)
    runtime = adavit.load(bundle, threads=given.threads, budget=budget)
    images, pictures = images_of(runtime, folder)
    prepared = runtime.run(images, budget=budget)
    files = {"file": folder / "model.onnx", "dense": folder / "dense.onnx"}
    report = adavit.export_single_file(
        bundle, files["file"], budget=budget, threads=given.threads, max_size=given.max_size, domain=given.domain,
        calibration_images=pictures,
    )  # fmt: skip
    onnx.save(onnx.load(bundle / "fp32" / "dense.onnx"), files["dense"])
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = given.threads
    sessions = {key: onnxruntime.InferenceSession(path, options) for key, path in files.items()}
    runs: dict[str, Callable[[np.ndarray], Any]] = {"runtime": runtime.run}
    for key, session in sessions.items():
        runs[key] = lambda batch, session=session: session.run(["logits"], {"images": batch})
    own = processes(files, given.threads, images[:IMAGES], folder)
    rows = []
    for batch in given.batches:
        runtime.specialise(prepared.policy, batch=batch)
        times = turns(runs, [images[i : i + batch] for i in range(0, IMAGES, batch)], given.rounds)
        rows.append(
            {
                "model": model, "batch": batch, "blocks": report["blocks"],
                "macs": float(prepared.macs[:IMAGES].mean() / runtime.dense_macs),
                **{f"{key}_ms": 1000 * seconds for key, seconds in times.items()},
                "of_dense": times["dense"] / times["file"], "of_runtime": times["runtime"] / times["file"],
                "size": files["file"].stat().st_size / files["dense"].stat().st_size,
                "memory": own["file"][1] / own["dense"][1], "load": own["file"][0] / own["dense"][0],
            }
        )  # fmt: skip
    return rows


def bundle_of(name: str, profile: str, folder: Path, seed: int) -> Path:
    """The bundle of a model with random weights."""
    save_safetensors(random_model(name, profile, seed), folder / "model.safetensors")
    adavit.export_bundle(folder / "model.safetensors", folder / "bundle", verify=False)
    return folder / "bundle"


def images_of(runtime: adavit.Runtime, folder: Path) -> tuple[np.ndarray, list[Path]]:
    """Normalised pixels to run, and pictures to calibrate on: the demo's own, or random ones."""
    if runtime.bundle.path == demo_bundle():
        paths = sorted((demo_bundle().parent / "images").rglob("*.png"))
        return np.stack([runtime.preprocess(path) for path in paths]), paths
    from PIL import Image

    images = np.stack(list(itertools.islice(random_images(runtime.architecture.image_size), IMAGES + CALIBRATION)))
    mean, std = (np.array(getattr(runtime.bundle.preprocessor, name))[:, None, None] for name in ("mean", "std"))
    pictures = folder / "pictures"
    pictures.mkdir()
    for number, image in enumerate(images[IMAGES:]):
        pixels = np.clip((image * std + mean) * 255, 0, 255).astype(np.uint8).transpose(1, 2, 0)
        Image.fromarray(pixels).save(pictures / f"{number:02}.png")
    return images, [pictures]


def turns(runs: dict[str, Callable[[np.ndarray], Any]], batches: list[np.ndarray], rounds: int) -> dict[str, float]:
    """Median seconds of a batch, each way of running it taking turns."""
    times: dict[str, list[list[float]]] = {key: [[] for _ in batches] for key in runs}
    for number in range(rounds):
        for key in list(runs)[:: 1 if number % 2 else -1]:
            runs[key](batches[0])
            for batch, found in zip(batches, times[key], strict=True):
                start = perf_counter()
                runs[key](batch)
                found.append(perf_counter() - start)
    return {key: statistics.fmean(map(statistics.median, found)) for key, found in times.items()}


def processes(files: dict[str, Path], threads: int, images: np.ndarray, folder: Path) -> dict[str, tuple[float, float]]:
    """Seconds to load each file, and MiB that its process takes at most."""
    np.save(folder / "images.npy", images)
    found = {}
    for key, path in files.items():
        command = [sys.executable, "-c", MEMORY, str(path), str(threads), str(folder / "images.npy")]
        runs = [subprocess.run(command, check=True, capture_output=True, text=True).stdout.split() for _ in range(3)]
        found[key] = tuple(statistics.median(float(run[place]) for run in runs) for place in (0, 1))
    return found


if __name__ == "__main__":
    main()
