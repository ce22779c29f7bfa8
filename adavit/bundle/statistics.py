"""What a model's policies kept on calibration images, in a bundle: `statistics.npz`.

Policies are packed, eight decisions a byte, at the trained point and at each stored budget. What a runtime prepares at
its start, and the sizes that engines are built for, are derived from them.
"""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
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

__all__ = ["operating_offsets", "policy_at", "write_statistics"]

MOST_IMAGES = 1024
MOST_BYTES = 1 << 30


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
    if bundle.statistics is None:
        return None
    data, arch, stored = bundle.read_stored(bundle.statistics), bundle.architecture, operating_offsets(bundle)
    path = f"{bundle.path}/{bundle.statistics.file}"
    try:
        found = dict(zip(KINDS, read_arrays(BytesIO(data), KINDS, MOST_BYTES), strict=True))
        place = min(range(len(stored)), key=lambda place: _distance(stored[place], offsets, arch.depth))
        policy = Policy(*(_unpacked(found[kind], len(stored), place, arch, kind) for kind in KINDS))
        policy.check(arch, len(policy))
    except (ValueError, InputError) as error:
        raise BundleError(f"{path}: no statistics of this model ({error}); export again") from None
    return policy


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
