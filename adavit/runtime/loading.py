"""Loading a bundle, with the options of an application checked."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from adavit.arguments import flag
from adavit.bundle.bundle import Bundle
from adavit.bundle.demo import find_bundle
from adavit.bundle.graphs import Graphs
from adavit.bundle.operating_points import resolve
from adavit.cpus import usable_cpus
from adavit.errors import OptionError, shown
from adavit.reading import path_of
from adavit.runtime.backend import Options, create_backend
from adavit.runtime.batch import WAYS
from adavit.runtime.fastest_backend import fastest_backend
from adavit.runtime.replaced import again_if_replaced
from adavit.runtime.session import Runtime
from adavit.runtime.ways import AUTO

__all__ = ["load"]

TRIED_IMAGES = 4
MOST_THREADS = 1024


def load(
    bundle: str | Path,
    backend: str = "onnxruntime",
    threads: int | None = None,
    provider: str | None = None,
    parallel: str = "auto",
    budget: float | None = None,
    dispatch: str = "auto",
    trust_engines: bool = False,
    precision: str | None = None,
    specialise: bool = True,
    shared_pool: bool = False,
) -> Runtime:
    """Loads a bundle that `adavit-export` made.

    Args:
        bundle: the folder, or "demo" for the model that comes with this package.
        backend: what runs the graphs: "onnxruntime", "openvino", or on NVIDIA GPUs "tensorrt" or "tensorrt-rtx", which
            run engines that `adavit-export --target` built. "auto" takes the fastest that is installed, measured on
            this machine in some seconds once, and kept in the user's cache folder.
        threads: CPU threads, by default one for each CPU that this process's affinity and cgroup quota allow.
        provider: ONNX Runtime's execution provider, by default the CPU's, such as "CUDAExecutionProvider"; for OpenVINO
            the precision, "fp32" or "bf16".
        parallel: how images share the threads. "operators" shares them inside every operator, for the lowest latency of
            one image; "samples" gives each thread an image, for the highest throughput of batches; "auto" takes the
            first for single images and the other for batches.
        budget: share of the dense MACs that requests without one of their own get; by default what the trained
            policy takes.
        dispatch: how batches are driven on a GPU (see docs/tensorrt.md). "exact" fetches after each block how much the
            next one takes. "capacity" plans that, and runs a batch as one CUDA graph. "conditional" skips on the device
            what no image of a batch wants. "auto" takes the fastest, measured once for each batch size, and kept in the
            user's cache folder. Results are the same.
        trust_engines: run TensorRT engines that this user did not build on this machine. They are native code, which
            can do whatever this process can: say so only where you trust who built them.
        precision: one that the bundle has, by default its first.
        specialise: prepare in the background for what images use most, and remember it in the user's cache folder.
            Results are the same to rounding. False keeps them bit-identical from call to call.
        shared_pool: let ONNX Runtime have one thread pool for the whole process, which the first runtime decides the
            size of. Single images may take up to 10 % less time, batches take up to half as much again. From then on,
            nobody in the process can make a session with a pool of its own.

    Raises:
        BundleError: the bundle is missing, damaged or of another version.
        BackendError: the backend is unknown, not installed, or refuses an engine, or TensorRT engines are not trusted.
        InputError: `threads` is not from 1 to 1024, `parallel` is unknown, the backend has no such provider (or is
            "auto"), `dispatch` is unknown or cannot be had, or `budget` is beyond the bundle's operating points.

    Example:
        >>> import adavit, numpy as np
        >>> runtime = adavit.load("demo")
        >>> runtime.predict(["sneaker.jpg"], top=1)  # doctest: +SKIP
    """
    options = _options(threads, provider, parallel, dispatch, trust_engines, shared_pool)
    flag("specialise", specialise)
    path = find_bundle(path_of(bundle, "bundle"))
    return again_if_replaced(path, lambda: _load(path, backend, options, budget, precision, specialise))


def _load(
    bundle: Path, backend: str, options: Options, budget: float | None, precision: str | None, specialise: bool
) -> Runtime:
    """See `load`."""
    opened = Bundle.open(bundle)
    offsets = resolve(budget, opened)
    graphs = Graphs(opened, precision)
    choice = None
    if isinstance(backend, str) and backend == "auto":
        if options.provider is not None:
            raise OptionError(
                f"provider is {shown(options.provider)}: it belongs to one backend; name that instead of 'auto'"
            )
        choice = fastest_backend(
            opened, graphs.precision, options, lambda name: _timed_run(opened, graphs, name, options)
        )
        backend = choice.backend
    made = create_backend(backend, graphs, options)
    return Runtime(opened, graphs, made, options, offsets, choice, specialise)


def _options(
    threads: object,
    provider: object,
    parallel: object,
    dispatch: object,
    trust_engines: object,
    shared_pool: object,
) -> Options:
    """How a backend is to run, of what a caller gave."""
    if threads is None:
        threads = min(usable_cpus(), MOST_THREADS)
    if type(threads) is not int or not 1 <= threads <= MOST_THREADS:
        raise OptionError(f"threads is {shown(threads)}: expected a whole number from 1 to {MOST_THREADS}")
    if not isinstance(parallel, str) or parallel not in ("auto", "operators", "samples"):
        raise OptionError(f"parallel is {shown(parallel)}: choose 'auto', 'operators' or 'samples'")
    if provider is not None and not isinstance(provider, str):
        raise OptionError(f"provider is {shown(provider)}: expected a name, or None for the backend's own choice")
    if not isinstance(dispatch, str) or dispatch not in (AUTO, *WAYS):
        raise OptionError(f"dispatch is {shown(dispatch)}: choose {', '.join(map(repr, (AUTO, *WAYS)))}")
    given = {"trust_engines": trust_engines, "shared_pool": shared_pool}
    flags = {name: flag(name, value) for name, value in given.items()}
    return Options(threads, provider, parallel, dispatch, **flags)


def _timed_run(bundle: Bundle, graphs: Graphs, backend: str, options: Options) -> tuple[Callable[[], object], int]:
    """A run to compare backends by: a few random images, one by one or, where samples run in parallel, at once.

    Returns it with its number of images.
    """
    runtime = Runtime(bundle, graphs, create_backend(backend, graphs, options), options, specialise=False)
    side, count = bundle.architecture.image_size, TRIED_IMAGES
    if options.parallel == "samples":
        count = max(TRIED_IMAGES, options.threads)
    images = np.random.default_rng(0).standard_normal((count, 3, side, side), dtype=np.float32)
    batches = np.array_split(images, 1 if options.parallel == "samples" else count)
    return lambda: [runtime.run(batch) for batch in batches], count
