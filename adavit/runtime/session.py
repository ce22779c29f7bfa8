"""The runtime an application embeds: load a bundle once, run images from any thread."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any
from weakref import finalize

import numpy as np
import numpy.typing as npt
from PIL import Image

from adavit.architecture import Architecture
from adavit.arguments import whole
from adavit.bundle.bundle import Bundle
from adavit.bundle.demo import find_bundle
from adavit.bundle.graphs import Graphs
from adavit.bundle.operating_points import TRAINED, Budgets, Offsets, resolve, resolve_each
from adavit.bundle.policy import Policy
from adavit.bundle.preprocessing import ImageLike, pictures_of
from adavit.bundle.statistics import policy_at
from adavit.cpus import usable_cpus
from adavit.errors import BackendError, BundleError, InputError, OptionError, shown
from adavit.macs import dense_macs
from adavit.reading import path_of
from adavit.results import Prediction, Result, checked_policy
from adavit.runtime.backend import Backend, Options, Usage, Use, create_backend
from adavit.runtime.choose import Choice, choose
from adavit.runtime.dense import DenseDispatcher, no_policies
from adavit.runtime.dispatcher import SIDE_BY_SIDE, Dispatcher, Observer
from adavit.runtime.finite import check_logits
from adavit.runtime.forks import renew_in_fork
from adavit.runtime.replaced import again_if_replaced
from adavit.runtime.specialise import KeptUsage, Specialiser, usage_of

__all__ = ["Prediction", "Result", "Runtime", "load"]

Float = npt.NDArray[np.float32]
Budget = float | Offsets
TRIED_IMAGES = 4
MOST_THREADS = 1024
LARGEST = 1e15
"""Of an image's values: far beyond any pixel, and products with weights stay within what a layer norm bears."""
TURNS = 2
"""Times as many pictures as run side by side are held at once."""


def load(
    bundle: str | Path,
    backend: str = "onnxruntime",
    threads: int | None = None,
    provider: str | None = None,
    parallel: str = "auto",
    budget: float | None = None,
    cuda_graphs: bool = False,
    trust_engines: bool = False,
    precision: str | None = None,
    specialise: bool = True,
    shared_pool: bool = False,
) -> Runtime:
    """Loads a bundle that `adavit-export` made.

    Args:
        bundle: the folder, or "demo" for the model that comes with this package.
        backend: what runs the engines; `adavit.runtime.backend.names()` lists them. "auto" takes the fastest that
            is installed, measured on this machine in some seconds once, and kept in the user's cache folder.
        threads: CPU threads, by default one for each CPU that this process's affinity and cgroup quota allow.
        provider: ONNX Runtime's execution provider, by default the CPU's; for OpenVINO the precision, "fp32" or "bf16".
        parallel: how images share the threads. "operators" shares them inside every operator, for the lowest latency of
            one image; "samples" gives each thread an image, for the highest throughput of batches; "auto" takes the
            first for single images and the other for batches.
        budget: share of the dense MACs that requests without one of their own get; by default what the trained
            policy takes.
        cuda_graphs: for TensorRT, make CUDA graphs of what runs again with the same shapes.
        trust_engines: run TensorRT engines that this user did not build on this machine. They are native code, which
            can do whatever this process can: say so only where you trust who built them.
        precision: one that the bundle has, by default its first.
        specialise: prepare in the background for what images use most, and remember it in the user's cache folder.
            Results are the same to rounding. False keeps them bit-identical from call to call.
        shared_pool: let ONNX Runtime have one thread pool for the whole process, which the first runtime decides the
            size of. It saves up to 5 %; from then on, nobody in the process can make a session with a pool of its own.

    Raises:
        BundleError: the bundle is missing, damaged or of another version.
        BackendError: the backend is unknown, not installed, or refuses an engine, or TensorRT engines are not trusted.
        InputError: `threads` is not from 1 to 1024, `parallel` is unknown, the backend has no such provider (or is
            "auto") or no CUDA graphs, or `budget` is beyond the bundle's operating points.

    Example:
        >>> import adavit, numpy as np
        >>> runtime = adavit.load("demo")
        >>> runtime.predict(["sneaker.jpg"], top=1)  # doctest: +SKIP
    """
    options = _options(threads, provider, parallel, cuda_graphs, trust_engines, shared_pool)
    if not isinstance(specialise, bool):
        raise OptionError(f"specialise is {shown(specialise)}: expected True or False")
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
        choice = choose(opened, graphs.precision, options, lambda name: _trial(opened, graphs, name, options))
        backend = choice.backend
    made = create_backend(backend, graphs, options)
    return Runtime(opened, graphs, made, options, offsets, choice, specialise)


def _options(
    threads: object,
    provider: object,
    parallel: object,
    cuda_graphs: object,
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
    flags = {"cuda_graphs": cuda_graphs, "trust_engines": trust_engines, "shared_pool": shared_pool}
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise OptionError(f"{name} is {shown(value)}: expected True or False")
    return Options(threads, provider, parallel, bool(cuda_graphs), bool(trust_engines), bool(shared_pool))


def _trial(bundle: Bundle, graphs: Graphs, backend: str, options: Options) -> tuple[Callable[[], object], int]:
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


def _reloaded(path: str, fingerprint: str, precision: str, backend: str, options: Options, *how: Any) -> Runtime:
    """The runtime that was pickled; raises BundleError where another bundle is at its path now."""
    bundle = Bundle.open(path)
    if bundle.fingerprint != fingerprint:
        raise BundleError(f"{path}: another bundle than the one that was loaded; load it by adavit.load")
    graphs = Graphs(bundle, precision)
    return Runtime(bundle, graphs, create_backend(backend, graphs, options), options, *how)


class Runtime:
    """A loaded bundle; every method may be called from many threads at once.

    A forked child may use it, if no other thread was running it during the fork, and not on a GPU. A pickled runtime
    loads its bundle again in the other process.

    Attributes:
        bundle: the bundle's description.
        backend: what runs its engines.
        options: what `load` was given: threads, provider, parallel and the like.
        offsets: added to the decision logits of requests without a budget; may be replaced at any time.
        choice: why this backend, where it was chosen by "auto".
        graphs: what runs, in one precision.
        dispatcher: runs the graphs; a model without policies has a `DenseDispatcher`, which runs its dense graph.
    """

    def __init__(
        self,
        bundle: Bundle,
        graphs: Graphs,
        backend: Backend,
        options: Options,
        offsets: Offsets = TRAINED,
        choice: Choice | None = None,
        specialise: bool = True,
    ) -> None:
        self.bundle = bundle
        self.graphs = graphs
        self.backend = backend
        self.options = options
        self.offsets = offsets
        self.choice = choice
        self.dispatcher: Dispatcher | DenseDispatcher = (
            Dispatcher(graphs, backend, options) if bundle.architecture.adapts else DenseDispatcher(graphs, backend)
        )
        self._in_background = specialise
        kept = KeptUsage(bundle, options, backend.name, graphs.precision)
        self._specialiser = Specialiser(backend, specialise and bundle.architecture.adapts, kept.remember)
        if specialise and bundle.architecture.adapts:
            self._specialiser.start(kept.recall() or self._usual())
        finalize(self, self._specialiser.stop)
        self._forked = False
        renew_in_fork(self)

    def after_fork(self) -> None:
        """Notes that this is a forked child; its own threads and engines run on what was loaded before."""
        self._forked = True

    def _usual(self) -> Usage:
        """What calibration images used, where the bundle tells."""
        policy = policy_at(self.bundle, self.offsets)
        return {} if policy is None else usage_of(policy, self.options.threads_of(1))

    def __reduce__(self) -> tuple[Any, ...]:
        """In another process, the bundle is loaded again, and run as here."""
        what = str(self.bundle.path), self.bundle.fingerprint, self.graphs.precision
        return _reloaded, (*what, self.backend.name, self.options, self.offsets, self.choice, self._in_background)

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
        budget: Budget | Sequence[Budget] | npt.NDArray[Any] | None = None,
    ) -> Result:
        """Runs images, computing only what their policies keep.

        Args:
            images: float32 [B, 3, S, S], normalised (`predict` does that for pictures).
            policy: a recorded policy for exactly these images, followed instead of deciding.
            observe: called with a `Step` before each block and behind the last; for verification.
            budget: mean share of the dense MACs to run at, of this request alone, or offsets of the decision
                logits; for all images, or an array [B] of one for each. By default what `load` was given.

        A model without policies computes everything: its policy keeps all, and there is nothing to budget.

        Raises:
            InputError: images or policy do not fit the model, the budget is beyond the bundle's operating points,
                or both a policy and a budget are given.
            BackendError: an engine failed, or computed values that are not finite or too large for a layer norm.
        """
        images = self._checked(images)
        if observe is not None and not callable(observe):
            raise InputError(f"observe is {shown(observe)}: expected a function, see adavit.runtime.dispatcher")
        if policy is not None:
            checked_policy(policy).check(self.architecture, len(images))
            if budget is not None:
                raise InputError("a recorded policy leaves nothing to a budget; give one of them")
        offsets = resolve_each(self.offsets if budget is None else budget, self.bundle, len(images))
        logits, used = self.dispatcher.run(images, offsets, policy, observe)
        self._specialiser.note(used, self.options.threads_of(len(images)))
        return Result(logits, used, self.architecture, self.bundle.preprocessor)

    def specialise(self, policy: Policy, batch: int | None = None) -> int:
        """Prepares for what some images used most, at once, so that later images run faster.

        Results are the same to rounding. What was prepared before is replaced. Without `load(..., specialise=False)`
        it is replaced again once images tell otherwise.

        Args:
            policy: of images like those to come, at the budget to come: some dozens or hundreds of them.
            batch: how many images a run is going to have; by default one, or as many as these.

        Returns:
            How much is prepared: 0 where that is no faster.

        Raises:
            InputError: the policy is not of this model, or of no image, or `batch` is no whole number from 1 on.
        """
        checked_policy(policy).check(self.architecture, len(policy))
        if not self.architecture.adapts:
            return 0
        sizes = (1, len(policy)) if batch is None else (whole("batch", batch, 1),)
        threads = set(map(self.options.threads_of, sizes))
        usage: dict[Use, float] = {}
        for number in threads:
            usage |= usage_of(policy, number)
        return self._specialiser.specialise(usage, len(policy))

    def adaptive_dispatcher(self, purpose: str) -> Dispatcher:
        """The dispatcher, for work that needs policies.

        Args:
            purpose: what is to be done, such as "tune"; for the message.

        Raises:
            InputError: the model has no policies.
        """
        if isinstance(self.dispatcher, Dispatcher):
            return self.dispatcher
        raise no_policies(self.bundle.path, purpose)

    @property
    def dense_macs(self) -> int:
        """Multiply-accumulates of an image with every policy on, stem and head included."""
        return dense_macs(self.architecture)

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
        logits = self.backend.dense(self._checked(images))
        check_logits(logits, "the dense twin's logits")
        return logits

    def preprocess(self, image: ImageLike) -> Float:
        """Resizes, crops and normalises a picture as the model expects it.

        Args:
            image: a path, a PIL image, or an array uint8 [H, W] or [H, W, 3].

        Returns:
            float32 [3, S, S].

        Raises:
            InputError: it cannot be read as a picture.
        """
        return self.bundle.preprocessor(image)

    def predict(
        self, images: Iterable[ImageLike] | ImageLike, top: int = 5, budget: float | None = None
    ) -> list[Prediction]:
        """Labels and probabilities of pictures, in order.

        Args:
            images: an iterable of paths, PIL images or uint8 arrays [H, W] or [H, W, 3], or one alone. It is read
                some images at a time. An image that cannot be read gets a Prediction with `error`.
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
        at_once = TURNS * max(SIDE_BY_SIDE, self.options.threads)
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

    def draw(self, images: Iterable[ImageLike] | ImageLike | Float, budget: float | None = None) -> Image.Image:
        """Runs images and draws what was kept of each, as `adavit.draw` does.

        Args:
            images: what `predict` takes, or what `run` takes: float32 [B, 3, S, S]; at most 64.
            budget: as of `run`.

        Returns:
            The picture, RGB. A notebook shows it, `save` writes it.

        Raises:
            InputError: an image cannot be read, there are none or too many, or the budget is beyond the bundle's
                operating points.
            BackendError: as of `run`.

        Example:
            >>> runtime.draw(["cat.jpg", "dog.jpg"]).save("kept.png")  # doctest: +SKIP
        """
        from adavit.drawing import MOST_IMAGES, draw, normalised

        offsets = resolve(self.offsets if budget is None else budget, self.bundle)
        pixels = normalised(images, self.bundle.preprocessor, MOST_IMAGES)
        return draw(self.run(pixels, budget=offsets), pixels, self.labels)

    def prediction(self, result: Result, row: int, top: int = 5) -> Prediction:
        """The Prediction of the image at `row` of a result, with its `top` classes.

        Raises:
            InputError: the result is of another model, has no such row, or no finite logits there, or `top` is no
                whole number from 1 on.
        """
        if not isinstance(result, Result):
            raise InputError(f"result is {shown(result)}: expected what Runtime.run returned")
        logits, classes = result.logits, len(self.labels)
        if not isinstance(logits, np.ndarray) or logits.shape != (len(checked_policy(result.policy)), classes):
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
