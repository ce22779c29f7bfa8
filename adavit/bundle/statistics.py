"""What a model's policies kept on calibration images, in a bundle: `statistics.npz`.

Policies are packed, eight decisions a byte, at the trained point and at each stored budget. What a runtime prepares at
its start, and the sizes that engines are built for, are derived from them.
"""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt

from adavit.architecture import Architecture
from adavit.bundle.bundle import STATISTICS, Bundle
from adavit.bundle.operating_points import TRAINED, Offsets
from adavit.bundle.policy import KINDS, Policy
from adavit.bundle.stored import StoredFile
from adavit.errors import BundleError, InputError
from adavit.reading import read_arrays

__all__ = ["operating_offsets", "policies_around", "policies_of", "policy_at", "usual_heads", "write_statistics"]

MOST_IMAGES = 1024
MOST_BYTES = 1 << 30
ON_LINE = 1e-6
"""How far offsets may be from the line between two points and still count as on it, over all kinds and blocks."""
USUAL = 0.001
"""Share of images that keep a head that counts as usual."""


def operating_offsets(bundle: Bundle) -> list[Offsets]:
    """The trained point first, then those of the other stored budgets, ascending."""
    points = bundle.budgets.points if bundle.budgets else ()
    return [TRAINED, *(point.offsets for point in points if point.offsets != TRAINED)]


def write_statistics(folder: Path, policies: Sequence[Policy]) -> StoredFile:
    """Writes the policies of the same images at each of `operating_offsets`, and returns what describes the file."""
    arrays = {
        kind: np.packbits(np.stack([getattr(policy, kind)[:MOST_IMAGES] for policy in policies]), -1) for kind in KINDS
    }
    packed = BytesIO()
    np.savez_compressed(packed, allow_pickle=False, **arrays)
    (folder / STATISTICS).write_bytes(packed.getvalue())
    return StoredFile.of(STATISTICS, packed.getvalue())


def policy_at(bundle: Bundle, offsets: Offsets) -> Policy | None:
    """What images kept at the stored point that is next to some offsets; None where a bundle has no statistics.

    Raises:
        BundleError: the file is damaged, or of another model.
    """
    stored, depth = operating_offsets(bundle), bundle.architecture.depth
    nearest = min(range(len(stored)), key=lambda place: _distance(stored[place], offsets, depth))
    return next(iter(_policies(bundle, [nearest])), None)


def policies_of(bundle: Bundle) -> list[Policy]:
    """What images kept at each of `operating_offsets`; nothing where a bundle has no statistics.

    Raises:
        BundleError: the file is damaged, or of another model.
    """
    return _policies(bundle, range(len(operating_offsets(bundle))))


def policies_around(bundle: Bundle, offsets: Offsets) -> list[Policy]:
    """What images kept at the one or two stored points that some offsets are at, or between.

    Offsets of a budget lie on the straight line between those of two neighbours. Others count as at the nearest point.

    Returns:
        a policy for each point; nothing where a bundle has no statistics.

    Raises:
        BundleError: the file is damaged, or of another model.
    """
    stored, depth = operating_offsets(bundle), bundle.architecture.depth
    nearest = min(range(len(stored)), key=lambda place: _distance(stored[place], offsets, depth))
    if _distance(stored[nearest], offsets, depth) > ON_LINE:
        points = bundle.budgets.points if bundle.budgets else ()
        for low, high in pairwise(point.offsets for point in points):
            if _between(low, high, offsets, depth):
                return _policies(bundle, [stored.index(low), stored.index(high)])
    return _policies(bundle, [nearest])


def usual_heads(policies: Sequence[Policy], share: float = USUAL) -> list[tuple[int, ...]]:
    """The heads of each block that more than a share of the images uses, in any of some policies; at least one each."""
    found = []
    for block in range(policies[0].heads.shape[1]):
        kept = [policy.heads[:, block] & policy.sublayers[:, block].any(1, keepdims=True) for policy in policies]
        shares = np.max([mask.mean(0) for mask in kept], 0)
        usual = np.flatnonzero(shares > share)
        found.append(tuple(usual.tolist()) or (int(shares.argmax()),))
    return found


def _policies(bundle: Bundle, places: Sequence[int]) -> list[Policy]:
    """What images kept at some of the `operating_offsets`; nothing where a bundle has no statistics."""
    if bundle.statistics is None:
        return []
    data, arch, points = bundle.read_stored(bundle.statistics), bundle.architecture, len(operating_offsets(bundle))
    try:
        found = dict(zip(KINDS, read_arrays(BytesIO(data), KINDS, MOST_BYTES), strict=True))
        policies = [Policy(*(_unpacked(found[kind], points, place, arch, kind) for kind in KINDS)) for place in places]
        for policy in policies:
            policy.check(arch, len(policy))
    except (ValueError, InputError) as error:
        path = f"{bundle.path}/{bundle.statistics.file}"
        raise BundleError(f"{path}: no statistics of this model ({error}); export again") from None
    return policies


def _unpacked(
    packed: npt.NDArray[np.uint8], points: int, place: int, arch: Architecture, kind: str
) -> npt.NDArray[np.bool_]:
    """The masks [n, L, M] of a kind at one point."""
    size = {"tokens": arch.tokens, "heads": arch.heads, "sublayers": 2}[kind]
    shape = packed.shape
    if packed.dtype != np.uint8 or packed.ndim != 4 or shape[0] != points or shape[2:] != (arch.depth, -(-size // 8)):
        raise ValueError(f"its {kind} are {packed.dtype} {list(shape)}")
    return np.unpackbits(packed[place, :MOST_IMAGES], -1, count=size).astype(bool)


def _distance(first: Offsets, second: Offsets, depth: int) -> float:
    """How far offsets are apart."""
    return float(np.abs(np.subtract(first.by_block(depth), second.by_block(depth))).sum())


def _between(low: Offsets, high: Offsets, offsets: Offsets, depth: int) -> bool:
    """Whether offsets are on the straight line from `low` to `high`."""
    way = _distance(low, high, depth)
    if way == 0:
        return False
    share = _distance(low, offsets, depth) / way
    return share <= 1 and _distance(low.toward(high, share), offsets, depth) <= ON_LINE
