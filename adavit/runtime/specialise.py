"""Engines of their own for the sets of heads that come most often, with the weights of these heads as constants.

A backend prepares constants once; weights that are gathered for an image it rearranges on every call, and to mask the
dropped heads costs their MACs. Policies keep few sets of heads in a block, so that some dozens of engines serve most
images. Sets without an engine are run as ever; results are the same to rounding.
"""

from __future__ import annotations

import logging
from collections import defaultdict

import numpy as np

from adavit.errors import BackendError
from adavit.macs import dense_macs
from adavit.runtime.backend import Backend, Engine
from adavit.runtime.bundle import Bundle
from adavit.runtime.heads import HeadWeights
from adavit.runtime.plan import SUBLAYERS, HeadSet, saved_macs
from adavit.runtime.policy import Policy

__all__ = ["Specialised"]

log = logging.getLogger(__name__)

BYTES = 128 << 20
"""Of all these engines' weights, at most."""
LEAST = 2e-4
"""Share of the dense MACs that an engine has to save of an image's time, to be worth its memory."""


class Specialised:
    """Engines for sets of heads.

    Args:
        bundle: describes the engines that gather; they become these.
        backend: makes the engines; only some can fix an engine's inputs.
        head_weights: gathers the constants.

    Attributes:
        able: whether the backend can, and the bundle is in fp32: what quantised weights are folded into is another
            matter.
        sets: those that have engines.
        engines: by block, sub-layer and the bytes of the kept heads' numbers; replaced as a whole.
    """

    def __init__(self, bundle: Bundle, backend: Backend, head_weights: HeadWeights) -> None:
        self.able = backend.fixes_inputs and bundle.config.get("precision") == "fp32"
        self.sets: tuple[HeadSet, ...] = ()
        self.engines: dict[tuple[int, str, bytes], Engine] = {}
        self._bundle, self._backend, self._head_weights = bundle, backend, head_weights

    def choose(self, policy: Policy) -> tuple[HeadSet, ...]:
        """The sets that save most of some images' time by their bytes, as many as BYTES hold; none if not able.

        Raises:
            BundleError: the bundle was exported before there were such engines.
        """
        if not self.able:
            return ()
        arch, saved = self._bundle.architecture, defaultdict[HeadSet, float](float)
        tokens = policy.tokens.sum(2)
        for image, block, part in np.argwhere(policy.sublayers).tolist():
            heads = tuple(policy.heads[image, block].nonzero()[0].tolist())
            if arch.adapts_heads(block) and heads:
                kind, kept = SUBLAYERS[part], int(tokens[image, block])
                saved[HeadSet(block, kind, heads)] += saved_macs(arch, kind, kept, len(heads))
        least = LEAST * dense_macs(arch) * len(policy)
        sizes = {found: self._size(found) for found, macs in saved.items() if macs >= least}
        chosen, free = [], BYTES
        for found in sorted(sizes, key=lambda found: saved[found] / sizes[found], reverse=True):
            if sizes[found] <= free:
                chosen.append(found)
                free -= sizes[found]
        return tuple(sorted(chosen))

    def make(self, sets: tuple[HeadSet, ...]) -> None:
        """Makes engines for these sets, in the place of those there are.

        Raises:
            BackendError: this backend cannot, or the bundle is not in fp32.
            BundleError: the bundle was exported before there were such engines.
        """
        if sets and not self.able:
            raise BackendError(f"{self._backend.name} makes no engines for sets of heads, or the bundle is not in fp32")
        self.engines = {(s.block, s.kind, np.array(s.heads, np.intp).tobytes()): self._load(s) for s in sets}
        self.sets = sets
        if sets:
            log.info("%d engines for sets of heads, %.0f MB", len(sets), sum(map(self._size, sets)) / 1e6)

    def _size(self, found: HeadSet) -> int:
        """Bytes of an engine's weights: those of its heads, and the others."""
        others = self._bundle.engine(_engine(found)).bytes
        return others + self._head_weights.size(found.block, found.kind, len(found.heads))

    def _load(self, found: HeadSet) -> Engine:
        heads = np.array(found.heads, np.intp)
        constants = self._head_weights.arrays(found.block, found.kind, heads)
        if found.kind == "mlp":
            constants["heads"] = heads
        return self._backend.load(_engine(found), constants=constants)


def _engine(found: HeadSet) -> str:
    """The name of what becomes the engine of a set, once the weights handed to it are constants."""
    return f"blocks.{found.block}.{'attention_set' if found.kind == 'attention' else 'mlp_gather'}"
