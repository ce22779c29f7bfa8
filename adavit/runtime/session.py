"""The runtime an application embeds: load a bundle once, run images from any thread."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any
from weakref import finalize

import numpy as np
import numpy.typing as npt
from PIL import Image

from adavit.architecture import Architecture
from adavit.arguments import whole
from adavit.bundle.bundle import Bundle
from adavit.bundle.graphs import Graphs
from adavit.bundle.operating_points import TRAINED, Budgets, Offsets, resolve, resolve_each
from adavit.bundle.policy import Policy
from adavit.bundle.preprocessing import ImageLike
from adavit.bundle.statistics import policy_at
from adavit.errors import BackendError, BundleError, InputError, shown
from adavit.macs import dense_macs
from adavit.results import Prediction, Result, checked_policy
from adavit.runtime.backend import Backend, Options, Usage, Use, create_backend
from adavit.runtime.batch import BatchBackend
from adavit.runtime.batch_dispatcher import BatchDispatcher
from adavit.runtime.dense import DenseDispatcher, no_policies
from adavit.runtime.dispatcher import Dispatcher, Observer
from adavit.runtime.dispatchers import dispatcher_of
from adavit.runtime.fastest_backend import Choice
from adavit.runtime.finite import check_logits
from adavit.runtime.forks import renew_in_fork
from adavit.runtime.inputs import checked_images
from adavit.runtime.predictions import predict, prediction_of
from adavit.runtime.specialise import KeptUsage, Specialiser, usage_of

__all__ = ["Runtime"]

Float = npt.NDArray[np.float32]
Budget = float | Offsets


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
        dispatcher: runs the graphs; on a GPU, a `BatchDispatcher`; of a model without policies, a `DenseDispatcher`.
    """

    def __init__(
        self,
        bundle: Bundle,
        graphs: Graphs,
        backend: Backend | BatchBackend,
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
        self.dispatcher = dispatcher_of(graphs, backend, options)
        self._in_background = specialise
        self._specialiser: Specialiser | None = None
        if backend.on_host and bundle.architecture.adapts:
            kept = KeptUsage(bundle, options, backend.name, graphs.precision)
            self._specialiser = Specialiser(backend, specialise, kept.remember)
            if specialise:
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
        if self._specialiser:
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
        if self._specialiser is None:
            return 0
        sizes = (1, len(policy)) if batch is None else (whole("batch", batch, 1),)
        threads = set(map(self.options.threads_of, sizes))
        usage: dict[Use, float] = {}
        for number in threads:
            usage |= usage_of(policy, number)
        return self._specialiser.specialise(usage, len(policy))

    def adaptive_dispatcher(self, purpose: str) -> Dispatcher | BatchDispatcher:
        """The dispatcher, for work that needs policies.

        Args:
            purpose: what is to be done, such as "tune"; for the message.

        Raises:
            InputError: the model has no policies.
        """
        if isinstance(self.dispatcher, DenseDispatcher):
            raise no_policies(self.bundle.path, purpose)
        return self.dispatcher

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
        return predict(self, images, top, budget)

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
        return prediction_of(result, row, top, self.architecture, self.labels)

    def _checked(self, images: Any) -> Float:
        if self._forked and not self.backend.on_host:
            raise BackendError(
                "a runtime on a GPU does not survive a fork; load it in the child, or start children by spawn"
            )
        return checked_images(images, self.architecture.image_size)
