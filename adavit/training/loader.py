"""Batches in an order that the seed and the step alone decide, prepared one ahead."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from adavit.bundle.preprocessing import Preprocessor
from adavit.training.augment import Augment
from adavit.training.data import LabelledImages
from adavit.training.distributed import World
from adavit.training.errors import DataError
from adavit.training.losses import soft_labels
from adavit.training.settings import Settings

__all__ = ["TrainingBatches", "evaluation_batches", "spread", "steps_per_epoch", "watched"]

MIXUP_STREAM = 1


class TrainingBatches:
    """This process's part of every training batch.

    Step s takes images s * batch ... of a shuffled epoch; the last, incomplete batch of an epoch is dropped.
    """

    def __init__(self, data: LabelledImages, settings: Settings, side: int, world: World, workers: int) -> None:
        self._data, self._settings, self._world = data, settings, world
        self.per_epoch = steps_per_epoch(len(data.labels), settings.batch)
        self._augment = Augment(settings.augment, side, settings.crop, settings.mirror)
        self._normalise = Preprocessor(side).normalise
        self._epoch, self._order = -1, np.empty(0, np.int64)
        self._pool = ThreadPoolExecutor(max(1, workers))

    def indices(self, step: int) -> npt.NDArray[np.int64]:
        """The images of the global batch of a step."""
        epoch, position = divmod(step, self.per_epoch)
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = np.random.default_rng([self._settings.seed, epoch]).permutation(len(self._data.labels))
        return self._order[position * self._settings.batch : (position + 1) * self._settings.batch]

    def iterate(self, first: int, last: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Images [b, 3, S, S] and soft labels [b, C] of the steps from `first` to before `last`."""
        pending = self._submit(first)
        for step in range(first, last):
            images, labels = [future.result() for future in pending[0]], pending[1]
            if step + 1 < last:
                pending = self._submit(step + 1)
            batch = torch.from_numpy(np.stack(images))
            targets = soft_labels(torch.from_numpy(labels), len(self._data.classes), self._settings.smoothing)
            yield self._mix(batch, targets, step)

    def _submit(self, step: int) -> tuple[list[Future[npt.NDArray[np.float32]]], npt.NDArray[np.int64]]:
        settings, part = self._settings, self._world.share(self._settings.batch)
        chosen = self.indices(step)[part]
        draws = self._augment.draws(settings.seed, step, settings.batch)[part]

        def prepare(index: int, draw_index: int) -> npt.NDArray[np.float32]:
            return self._normalise(self._augment(self._data.pixels(index), draws[draw_index]))

        return [self._pool.submit(prepare, int(i), k) for k, i in enumerate(chosen)], self._data.labels[chosen]

    def _mix(self, images: Tensor, targets: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Mixup of neighbours, which any number of processes pairs alike."""
        alpha = self._settings.mixup
        if alpha == 0:
            return images, targets
        share = float(np.random.default_rng([self._settings.seed, step, MIXUP_STREAM]).beta(alpha, alpha))
        partner = torch.arange(len(images)) ^ 1
        return torch.lerp(images[partner], images, share), torch.lerp(targets[partner], targets, share)

    def close(self) -> None:
        """Ends the workers."""
        self._pool.shutdown(cancel_futures=True)


def steps_per_epoch(images: int, batch: int) -> int:
    """Whole batches of an epoch; raises DataError where there is none."""
    if images < batch:
        raise DataError(f"{images} training images are fewer than one batch of {batch}")
    return images // batch


def spread(images: int, wanted: int) -> range:
    """Indices of about `wanted` images, evenly spaced, since folders come sorted by class; 0 wants all."""
    return range(0, images, max(1, images // wanted)) if wanted else range(images)


def evaluation_batches(
    data: LabelledImages, indices: Sequence[int], prepare: Preprocessor, batch: int
) -> Iterator[tuple[Tensor, npt.NDArray[np.int64]]]:
    """Images [b, 3, S, S] and labels [b], not augmented, in the given order."""
    for start in range(0, len(indices), batch):
        part = list(indices[start : start + batch])
        images = [prepare(data.pixels(i)) for i in part]
        yield torch.from_numpy(np.stack(images)), data.labels[part]


def watched(
    batches: Iterable[tuple[Tensor, npt.NDArray[np.int64]]], images: int, tell: Callable[[float], None]
) -> Iterator[tuple[Tensor, npt.NDArray[np.int64]]]:
    """The batches of so many images; after each, `tell` gets the share that is done."""
    done = 0
    for batch in batches:
        yield batch
        done += len(batch[1])
        tell(done / images)
