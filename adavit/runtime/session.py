"""The runtime an application embeds: load a bundle once, run images from any thread."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from adavit.architecture import Architecture
from adavit.errors import BackendError, BundleError, InputError, OptionError, shown
from adavit.macs import image_macs
from adavit.reading import path_of
from adavit.runtime.backend import Backend, Engine, Options, create_backend
from adavit.runtime.budget import TRAINED, Budgets, Offsets, resolve
from adavit.runtime.bundle import Bundle
from adavit.runtime.choose import Choice, choose
from adavit.runtime.cpus import usable_cpus
from adavit.runtime.dispatcher import SIDE_BY_SIDE, Dispatcher, Observer
from adavit.runtime.finite import not_finite
from adavit.runtime.forks import renew_in_fork
from adavit.runtime.given import pictures_of, whole
from adavit.runtime.images import ImageLike
from adavit.runtime.kept_plan import recalled_plan
from adavit.runtime.plan import sizes_of
from adavit.runtime.policy import Policy
from adavit.runtime.replaced import again_if_replaced

__all__ = ["Prediction", "Result", "Runtime", "load"]

Float = npt.NDArray[np.float32]
TRIED_IMAGES = 4
MOST_THREADS = 1024
LARGEST = 1e15
"""Of an image's values: far beyond any pixel, and products with weights stay within what a layer norm bears."""
TURNS = 2
"""Times as many pictures as run side by side are held at once."""


@dataclass(frozen=True)
class Result:
    """What a run computed for B images.

    Attributes:
        logits: float32 [B, C].
        policy: what each image used.
        architecture: the model's shapes.
    """

    logits: Float
    policy: Policy
    architecture: Architecture = field(repr=False)

    @cached_property
    def macs(self) -> npt.NDArray[np.int64]:
        """Multiply-accumulates of each image, stem and head included: int64 [B]."""
        return image_macs(self.architecture, self.policy.tokens, self.policy.heads, self.policy.sublayers)


@dataclass(frozen=True)
class Prediction:
    """One image's most probable classes, or why there are none.

    Attributes:
        top: (label, probability) pairs, most probable first; empty where the image could not be read.
        classes: the same classes as indices.
        macs: multiply-accumulates the image took.
        usage: mean share of tokens, heads and sub-layers it used; see `Policy.usage`.
        policy: what the image used, a Policy of one image; None where the image could not be read.
        error: why the image could not be read, or None.
    """

    top: tuple[tuple[str, float], ...] = ()
    classes: tuple[int, ...] = ()
    macs: int = 0
    usage: dict[str, float] | None = None
    error: str | None = None
    policy: Policy | None = field(default=None, repr=False, compare=False)

    def __iter__(self) -> Iterator[tuple[str, float]]:
        """The (label, probability) pairs."""
        return iter(self.top)


def load(
    bundle: str | Path,
    backend: str = "onnxruntime",
    threads: int | None = None,
    provider: str | None = None,
    parallel: str = "operators",
    budget: float | None = None,
    cuda_graphs: bool = False,
    trust_engines: bool = False,
) -> Runtime:
    """Loads a bundle that `adavit-export` made.

    Args:
        bundle: the folder.
        backend: what runs the engines; `adavit.runtime.backend.names()` lists them. "auto" takes the fastest that
            is installed, measured on this machine in some seconds once, and kept in the user's cache folder.
        threads: CPU threads, by default one for each CPU of this process's affinity, or fewer where a cgroup's quota
            allows fewer. ONNX Runtime keeps one pool for the whole process: the first runtime decides its size.
        provider: ONNX Runtime's execution provider, by default the CPU's; for OpenVINO the precision, "fp32" or "bf16".
        parallel: "operators" shares the threads inside every engine, for the lowest latency of one image;
            "samples" gives each thread an image, for the highest throughput of batches.
        budget: share of the dense MACs that requests without one of their own get; by default what the trained
            policy takes.
        cuda_graphs: for TensorRT, make CUDA graphs of what runs again with the same shapes.
        trust_engines: run TensorRT engines that this user did not build on this machine. They are native code, which
            can do whatever this process can: say so only where you trust who built them.

    Raises:
        BundleError: the bundle is missing, damaged or of another version.
        BackendError: the backend is unknown, not installed, or refuses an engine, or TensorRT engines are not trusted.
        InputError: `threads` is not from 1 to 1024, `parallel` is unknown, a provider is given with "auto" or to a
            backend that has no such, CUDA graphs are asked of one that makes none, or `budget` is beyond the bundle's
            operating points.

    Example:
        >>> import adavit, numpy as np
        >>> runtime = adavit.load("bundle")  # doctest: +SKIP
        >>> runtime.predict(["cat.jpg"], top=1)  # doctest: +SKIP
    """
    options = _options(threads, provider, parallel, cuda_graphs, trust_engines)
    path = path_of(bundle, "bundle")
    return again_if_replaced(path, lambda: _load(path, backend, options, budget))


def _load(bundle: Path, backend: str, options: Options, budget: float | None) -> Runtime:
    """See `load`."""
    opened = Bundle.open(bundle)
    offsets = resolve(budget, opened)
    choice = None
    if isinstance(backend, str) and backend == "auto":
        if options.provider is not None:
            raise OptionError(
                f"provider is {shown(options.provider)}: it belongs to one backend; name that instead of 'auto'"
            )
        choice = choose(opened, options, lambda name: _trial(opened, name, options))
        backend = choice.backend
    return Runtime(opened, create_backend(backend, opened, options), options, offsets, choice)


def _options(
    threads: object, provider: object, parallel: object, cuda_graphs: object, trust_engines: object
) -> Options:
    """How a backend is to run, of what a caller gave."""
    if threads is None:
        threads = min(usable_cpus(), MOST_THREADS)
    if type(threads) is not int or not 1 <= threads <= MOST_THREADS:
        raise OptionError(f"threads is {shown(threads)}: expected a whole number from 1 to {MOST_THREADS}")
    if not isinstance(parallel, str) or parallel not in ("operators", "samples"):
        raise OptionError(f"parallel is {shown(parallel)}: choose 'operators' or 'samples'")
    if provider is not None and not isinstance(provider, str):
        raise OptionError(f"provider is {shown(provider)}: expected a name, or None for the backend's own choice")
    for name, value in (("cuda_graphs", cuda_graphs), ("trust_engines", trust_engines)):
        if not isinstance(value, bool):
            raise OptionError(f"{name} is {shown(value)}: expected True or False")
    return Options(threads, provider, parallel, bool(cuda_graphs), bool(trust_engines))


def _trial(bundle: Bundle, backend: str, options: Options) -> tuple[Callable[[], object], int]:
    """A run to compare backends by: a few random images, one by one or, where samples run in parallel, at once.

    Returns it with its number of images.
    """
    runtime = Runtime(bundle, create_backend(backend, bundle, options), options)
    side, count = bundle.architecture.image_size, max(TRIED_IMAGES, options.workers)
    images = np.random.default_rng(0).standard_normal((count, 3, side, side), dtype=np.float32)
    batches = np.array_split(images, 1 if options.parallel == "samples" else count)
    return lambda: [runtime.run(batch) for batch in batches], count


def _reloaded(
    path: str, fingerprint: str, backend: str, options: Options, offsets: Offsets, choice: Choice | None
) -> Runtime:
    """The runtime that was pickled; raises BundleError where another bundle is at its path now."""
    bundle = Bundle.open(path)
    if bundle.fingerprint != fingerprint:
        raise BundleError(f"{path}: another bundle than the one that was loaded; load it by adavit.load")
    return Runtime(bundle, create_backend(backend, bundle, options), options, offsets, choice)


def _policy(value: object) -> Policy:
    """A policy that a caller gave."""
    if not isinstance(value, Policy):
        raise InputError(f"policy is {shown(value)}: expected an adavit.Policy, as a result has it")
    return value


class Runtime:
    """A loaded bundle; every method may be called from many threads at once.

    It runs in a forked child too, where no other thread ran it while the process forked. Pickled, it loads its bundle
    again in the other process.

    Attributes:
        bundle: the bundle's description.
        backend: what runs its engines.
        options: threads, what they share, and the provider, as asked for.
        offsets: of the decision logits, where a request names no budget; may be replaced at any time.
        choice: why this backend, where it was chosen by "auto".
        dispatcher: runs the engines by a plan, which `adavit-run --tune` measures.
    """

    def __init__(
        self,
        bundle: Bundle,
        backend: Backend,
        options: Options,
        offsets: Offsets = TRAINED,
        choice: Choice | None = None,
    ) -> None:
        self.bundle = bundle
        self.backend = backend
        self.options = options
        self.offsets = offsets
        self.choice = choice
        plan = recalled_plan(bundle, options, backend)
        self.dispatcher = Dispatcher(bundle, backend, options.workers, plan)
        if plan.sets or plan.sizes:
            self.dispatcher.specialise(plan.sets, plan.sizes)
        self._dense: Engine | None = None
        self._dense_lock = threading.Lock()
        self._forked = False
        renew_in_fork(self)

    def after_fork(self) -> None:
        """Makes a forked child's lock; the child's own threads and engines run on what was loaded before."""
        self._dense_lock = threading.Lock()
        self._forked = True

    def __reduce__(self) -> tuple[Any, ...]:
        """In another process, the bundle is loaded again, and run as here."""
        how = self.backend.name, self.options, self.offsets, self.choice
        return _reloaded, (str(self.bundle.path), self.bundle.fingerprint, *how)

    @property
    def architecture(self) -> Architecture:
        """The model's shapes."""
        return self.bundle.architecture

    @property
    def labels(self) -> tuple[str, ...]:
        """Class names, by index."""
        return self.bundle.labels

    @property
    def budgets(self) -> Budgets | None:
        """The bundle's operating points, or None."""
        return self.bundle.budgets

    def run(
        self,
        images: Float,
        policy: Policy | None = None,
        observe: Observer | None = None,
        budget: float | Offsets | None = None,
    ) -> Result:
        """Runs images, computing only what their policies keep.

        Args:
            images: float32 [B, 3, S, S], normalised (`predict` does that for pictures).
            policy: a recorded policy for exactly these images, followed instead of deciding.
            observe: called with what every engine computes; for verification.
            budget: mean share of the dense MACs to run at, of this request alone, or offsets of the decision
                logits; by default what `load` was given.

        Raises:
            InputError: images or policy do not fit the model, the budget is beyond the bundle's operating points,
                or both a policy and a budget are given.
            BackendError: an engine failed, or what it computed is not finite, or beyond what a layer norm bears.
        """
        images = self._checked(images)
        if observe is not None and not callable(observe):
            raise InputError(f"observe is {shown(observe)}: expected a function, see adavit.runtime.dispatcher")
        if policy is not None:
            _policy(policy).check(self.architecture, len(images))
            if budget is not None:
                raise InputError("a recorded policy leaves nothing to a budget; give one of them")
        offsets = resolve(self.offsets if budget is None else budget, self.bundle)
        return Result(*self.dispatcher.run(images, offsets, policy, observe), self.architecture)

    def specialise(self, policy: Policy) -> int:
        """Makes engines of whole blocks for what some images used most.

        In ONNX Runtime for sets of heads, whose weights are constants there; in OpenVINO for numbers of tokens and
        heads. Later images that use the same run faster; results are the same to rounding. The engines of an earlier
        call, or of a tuned plan, are replaced. It takes some milliseconds an engine and at most 192 MiB in ONNX
        Runtime, 50 ms a size and about 240 MB in OpenVINO.

        Args:
            policy: of images like those to come, at the budget to come: some dozens or hundreds of them.

        Returns:
            How many engines there are: 0 where the bundle is not in fp32, or the backend not on a CPU.

        Raises:
            InputError: the policy is not of this model, or of no image.
            BundleError: the bundle was exported before there were such engines.
        """
        _policy(policy).check(self.architecture, len(policy))
        specialised = self.dispatcher.specialised
        if not specialised.able:
            return 0
        self.dispatcher.specialise(specialised.choose(policy), sizes_of(policy))
        return self.dispatcher.own_engines

    def run_dense(self, images: Float) -> Float:
        """Runs the dense twin: the same weights with every policy on, as one graph.

        Args:
            images: float32 [B, 3, S, S], normalised as `preprocess` does.

        Returns:
            Logits float32 [B, C].

        Raises:
            BundleError: the bundle was exported without its dense twin.
            InputError: images of another shape or type, or with values that are not finite or beyond 1e15.
            BackendError: the twin failed, or made logits that are not finite.
        """
        if self._dense is None:
            with self._dense_lock:
                if self._dense is None:
                    self._dense = self.backend.load("dense", alone=True)
        images = self._checked(images)
        logits = self.backend.buffer((len(images), self.architecture.classes))
        self._dense.run([images], [logits.rows(len(images))])
        found: Float = self.backend.fetch(logits)[0]
        if not (bad := ~np.isfinite(found).all(1)).any():
            return found
        raise not_finite(f"the dense twin's logits of image {int(bad.argmax())} are")

    def preprocess(self, image: ImageLike) -> Float:
        """A path, PIL image or array uint8 [H, W] or [H, W, 3] as the model wants it: float32 [3, S, S].

        Raises:
            InputError: it cannot be read as a picture.
        """
        return self.bundle.preprocessor(image)

    def predict(
        self, images: Iterable[ImageLike] | ImageLike, top: int = 5, budget: float | None = None
    ) -> list[Prediction]:
        """Labels and probabilities of pictures, in order.

        Args:
            images: paths, PIL images or uint8 arrays [H, W] or [H, W, 3], or one alone. Any iterable does, and some
                at a time are taken from it. One that cannot be read gets a Prediction with `error`; the others are
                done.
            top: how many classes for each.
            budget: as of `run`.

        Raises:
            InputError: `images` is none of these, `top` no whole number from 1 on, or `budget` beyond the bundle's
                operating points.
            BackendError: as of `run`.
        """
        pictures = pictures_of(images)
        top = whole("top", top, 1)
        offsets = resolve(self.offsets if budget is None else budget, self.bundle)
        at_once = TURNS * max(SIDE_BY_SIDE, self.options.workers)
        predictions: list[Prediction] = []
        while some := list(islice(pictures, at_once)):
            predictions += self._predict(some, top, offsets)
        return predictions

    def _predict(self, images: Sequence[ImageLike], top: int, offsets: Offsets) -> list[Prediction]:
        """The Predictions of pictures that are held at once."""
        pixels: dict[int, Float] = {}
        predictions: dict[int, Prediction] = {}
        for position, image in enumerate(images):
            try:
                pixels[position] = self.preprocess(image)
            except InputError as error:
                predictions[position] = Prediction(error=str(error))
        if pixels:
            result = self.run(np.stack(list(pixels.values())), budget=offsets)
            for row, position in enumerate(pixels):
                predictions[position] = self.prediction(result, row, top)
        return [predictions[position] for position in range(len(images))]

    def prediction(self, result: Result, row: int, top: int = 5) -> Prediction:
        """The Prediction of the image at `row` of a result, with its `top` classes.

        Raises:
            InputError: the result is none of this model, has no such row or no finite logits there, or `top` is no
                whole number from 1 on.
        """
        if not isinstance(result, Result):
            raise InputError(f"result is {shown(result)}: expected what Runtime.run returned")
        logits, classes = result.logits, len(self.labels)
        if not isinstance(logits, np.ndarray) or logits.shape != (len(_policy(result.policy)), classes):
            raise InputError(f"the result is of another model: its logits are not [images, {classes}]")
        if result.architecture != self.architecture:
            raise InputError(f"the result is of another model: its architecture is {shown(result.architecture)}")
        row, top = whole("row", row, 0, len(logits) - 1), whole("top", top, 1)
        result.policy.check(self.architecture, len(logits))
        if logits.dtype.kind != "f" or not np.isfinite(logits[row]).all():
            raise InputError(f"the result's logits of image {row} are not finite floats, but {logits.dtype}")
        scores = np.exp(logits[row] - logits[row].max(), dtype=np.float64)
        scores /= scores.sum()
        best = np.argsort(-scores, kind="stable")[:top]
        policy = result.policy[row : row + 1]
        return Prediction(
            tuple((self.labels[i], float(scores[i])) for i in best),
            tuple(int(i) for i in best),
            int(result.macs[row]),
            policy.usage(),
            policy=policy,
        )

    def _checked(self, images: Any) -> Float:
        if self._forked and not self.backend.on_host:
            raise BackendError(
                "a runtime on a GPU does not survive a fork; load it in the child, or start children by spawn"
            )
        side = self.architecture.image_size
        if isinstance(images, np.ndarray):
            images = np.asarray(images)
        wanted = f"float32 [B, 3, {side}, {side}] with B >= 1"
        if not isinstance(images, np.ndarray):
            raise InputError(f"images is a {type(images).__name__}, {shown(images)}: expected a numpy array, {wanted}")
        if images.dtype != np.float32 or images.ndim != 4 or images.shape[1:] != (3, side, side) or not len(images):
            raise InputError(f"images is {images.dtype} {list(images.shape)}: expected {wanted}")
        largest = max(float(images.max()), -float(images.min()))  # NaN where there is one: it is both
        if not math.isfinite(largest):
            raise InputError("images hold NaN or infinite values; check the preprocessing")
        if largest > LARGEST:
            raise InputError(f"images hold values of {largest:.0e}; normalised pixels are below 10, see preprocess")
        return np.require(images, requirements=["C", "W"])  # OpenVINO takes no memory that is read-only
