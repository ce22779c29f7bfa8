"""Blocks in one engine each, for the sets of heads that come most often, with the weights of these heads as constants.

A backend prepares constants once; weights that are gathered for an image it rearranges on every call, and to mask the
dropped heads costs their MACs. In one engine there is nothing to do between the sub-layers of a block. Policies keep
few sets of heads in a block, so that some dozens of engines serve most images. Blocks without an engine for their set
are run as ever; results are the same to rounding. A backend that always gathers has engines for any set instead.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable
from itertools import groupby

import numpy as np
import numpy.typing as npt

from adavit.architecture import Architecture
from adavit.errors import BackendError
from adavit.macs import dense_macs
from adavit.runtime.backend import Backend, Constants, FixedEngine
from adavit.runtime.bundle import Bundle
from adavit.runtime.plan import SUBLAYERS, HeadSet, saved_macs, set_kinds, sets_of, sublayers_of
from adavit.runtime.policy import Policy
from adavit.runtime.weights import attention_weights, check_deciding, mlp_weights, set_weights

__all__ = ["DECIDING", "STEM", "Key", "Specialised"]

log = logging.getLogger(__name__)

BYTES = 192 << 20
"""Of all these engines' weights, at most."""
COPIES = 2.0
"""Of the model's weights, at most, where that is less."""
LEAST = 2e-4
"""Share of the dense MACs that an engine has to save of an image's time, to be worth its memory."""

STEM = -1
"""In the place of a block, for the stem."""
Key = tuple[int, bytes]
DECIDING = b""
"""In the place of choices, for the engine that makes a block's decisions."""


class Specialised:
    """Engines for sets of heads.

    Args:
        bundle: describes the engines and holds their weights.
        backend: makes the engines; only some can fix an engine's inputs.

    Attributes:
        able: whether the backend can, and the bundle is in fp32: what quantised weights are folded into is another
            matter.
        sets: those that have engines.
        engines: by block and its choices: for each head, then for each sub-layer, whether it is kept, as the bytes of
            bool [H + 2]; or by the last two of these alone, for any heads, whose weights a run is given; or by
            `DECIDING`. Replaced as a whole.
    """

    def __init__(self, bundle: Bundle, backend: Backend) -> None:
        self.able = backend.fixed is not None and bundle.config.get("precision") == "fp32"
        self.sets: tuple[HeadSet, ...] = ()
        self._bundle, self._backend = bundle, backend
        self._of_any = self._engines_of_any() if backend.always_gathers else {}
        self.engines = self._of_any

    def _engines_of_any(self) -> dict[Key, FixedEngine]:
        """Engines that are given their heads' weights with each run."""
        if (fixed := self._backend.fixed) is None:
            return {}
        arch, engines = self._bundle.architecture, self._deciding(fixed, first=0)
        for block in range(arch.depth):
            for kind in set_kinds(arch, block):
                engines[block, bytes(_sublayers(kind))] = fixed(f"blocks.{block}.{kind}_set", {})
        return engines

    def _deciding(self, fixed: Callable[[str, Constants], FixedEngine], first: int) -> dict[Key, FixedEngine]:
        """Engines for the decisions of the blocks from the first on."""
        blocks = range(first, self._bundle.architecture.depth)
        return {(block, DECIDING): fixed(f"blocks.{block}.decide_set", {}) for block in blocks}

    @property
    def by_set(self) -> bool:
        """Whether sets of heads get engines: able, and by a backend without engines for any set."""
        return self.able and not self._backend.always_gathers

    def choose(self, policy: Policy) -> tuple[HeadSet, ...]:
        """The sets that save most of some images' time by their bytes, as memory allows; none if not `by_set`."""
        if not self.by_set:
            return ()
        arch, saved = self._bundle.architecture, defaultdict[HeadSet, float](float)
        tokens = policy.tokens.sum(2)
        for image, found in sets_of(policy):
            saved[found] += saved_macs(arch, found.kind, int(tokens[image, found.block]), len(found.heads))
        least = LEAST * dense_macs(arch) * len(policy)
        sizes = {found: set_bytes(arch, found) for found, macs in saved.items() if macs >= least}
        everything = HeadSet(0, "both", tuple(range(arch.heads)))
        chosen, free = [], min(BYTES, COPIES * arch.depth * set_bytes(arch, everything))
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
        load, arch = self._backend.fixed, self._bundle.architecture
        if not sets:
            self.engines, self.sets = self._of_any, ()
            return
        if load is None or not self.by_set:
            raise BackendError(f"{self._backend.name} makes no engines for sets of heads, or the bundle is not in fp32")

        def fixed(name: str, constants: Constants) -> FixedEngine:
            check_deciding(self._bundle, name)
            return load(name, constants)

        engines = {(STEM, DECIDING): fixed("stem_set", {}), **self._deciding(fixed, first=1)}
        for block, of_block in groupby(sorted(sets), key=lambda found: found.block):
            attention, mlp = attention_weights(self._bundle, block), mlp_weights(self._bundle, block)
            for found in of_block:
                weights = set_weights(arch, found, attention, mlp)
                engines[block, _choices(arch, found).tobytes()] = fixed(f"blocks.{block}.{found.kind}_set", weights)
        self.engines, self.sets = engines, sets
        size = sum(set_bytes(arch, found) for found in sets)
        log.info("%d engines for sets of heads, %.0f MB", len(sets), size / 1e6)


def set_bytes(arch: Architecture, found: HeadSet) -> int:
    """Of the matrices in the engine of a set."""
    channels = len(found.heads) * arch.head_width
    attention, mlp = 4 * channels * arch.width, arch.hidden * (channels + arch.width)
    return 4 * ((found.kind != "mlp") * attention + (found.kind != "attention") * mlp)


def _choices(arch: Architecture, found: HeadSet) -> npt.NDArray[np.bool_]:
    """What a block chooses that runs a set: bool [H + 2]."""
    heads = np.isin(np.arange(arch.heads), found.heads)
    return np.append(heads, _sublayers(found.kind))


def _sublayers(kind: str) -> list[bool]:
    """Which of the sub-layers run."""
    return [part in sublayers_of(kind) for part in SUBLAYERS]
