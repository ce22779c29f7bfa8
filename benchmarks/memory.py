"""Load time and peak memory of a bundle, or of its dense twin: python benchmarks/memory.py BUNDLE [--dense]

Runs random images one by one, or all of them where samples run in parallel, prepared for what they use most, in this
process and nothing else. Prints JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from adavit.bundle.bundle import Bundle
from adavit.bundle.graphs import Graphs
from adavit.runtime.backend import Options, create_backend
from adavit.runtime.loading import load

IMAGES = 64


def peak_mib() -> float:
    """The most memory this process had resident, on Linux; getrusage's may be the parent's."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["VmHWM"].split()[0]) / 1024


def main() -> None:
    """Loads, runs, and prints seconds and megabytes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--dense", action="store_true")
    parser.add_argument("--backend", default="onnxruntime")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--parallel", default="operators")
    arguments = parser.parse_args()
    start = time.perf_counter()
    if arguments.dense:  # as of a model without policies, which has no other graph
        bundle = Bundle.open(arguments.bundle)
        graphs = Graphs(bundle)
        arch = bundle.architecture
        graphs.architecture = replace(arch, token_policy=False, head_policy=False, sublayer_policy=False)
        backend = create_backend(arguments.backend, graphs, Options(arguments.threads, shared_pool=True))
    else:
        how = {"parallel": arguments.parallel, "shared_pool": True, "specialise": False}
        runtime = load(arguments.bundle, arguments.backend, arguments.threads, **how)
        arch = runtime.architecture
    seconds = time.perf_counter() - start
    images = np.random.default_rng(0).standard_normal((IMAGES, 3, arch.image_size, arch.image_size), dtype=np.float32)
    if arguments.dense:
        for position in range(IMAGES):
            backend.dense(images[position : position + 1])
    else:
        runtime.specialise(runtime.run(images).policy)
        size = IMAGES if arguments.parallel == "samples" else 1
        for position in range(0, IMAGES, size):
            runtime.run(images[position : position + size])
    print(json.dumps({"load_s": seconds, "peak_mib": peak_mib()}))


if __name__ == "__main__":
    main()
