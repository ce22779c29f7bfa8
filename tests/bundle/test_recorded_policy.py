import io
from pathlib import Path

import numpy as np
import pytest
from cases import assert_same_policy, random_policy, tiny

from adavit.errors import InputError
from adavit.runtime import Policy


def test_a_saved_policy_loads_again(tmp_path: Path) -> None:
    policy = random_policy(tiny(), 4, seed=1)
    policy.save(tmp_path / "policy.npz")
    assert_same_policy(Policy.load(tmp_path / "policy.npz"), policy)
    assert [path.name for path in tmp_path.iterdir()] == ["policy.npz"]


def test_saving_keeps_the_name_it_is_given(tmp_path: Path) -> None:
    random_policy(tiny(), 1, seed=1).save(tmp_path / "policy")
    assert [path.name for path in tmp_path.iterdir()] == ["policy"]


def test_slices_and_joins() -> None:
    policy = random_policy(tiny(), 5, seed=2)
    assert len(policy) == 5
    assert len(policy[1:3]) == 2
    assert_same_policy(Policy.concatenate([policy[:2], policy[2:]]), policy)


def test_usage_is_the_mean_share_that_ran() -> None:
    policy = Policy.dense(tiny(), 2)
    assert policy.usage() == {"tokens": 1.0, "heads": 1.0, "sublayers": 1.0}
    policy.sublayers[0, :, 0] = False
    assert policy.usage() == {"tokens": 1.0, "heads": 1.0, "sublayers": 0.75}
    policy.sublayers[0] = False  # an image that skips every block
    assert policy.usage() == {"tokens": 0.5, "heads": 0.5, "sublayers": 0.5}
    assert policy.tokens.all()  # what was decided stays


def test_a_block_without_sublayers_executes_no_token_and_no_head() -> None:
    policy = random_policy(tiny(), 6, seed=3)
    ran = policy.executed()
    idle = ~policy.sublayers.any(-1)
    assert idle.any() and not idle.all()
    assert not ran.tokens[idle].any() and not ran.heads[idle].any()
    assert (ran.tokens[~idle] == policy.tokens[~idle]).all() and (ran.heads[~idle] == policy.heads[~idle]).all()
    assert (ran.sublayers == policy.sublayers).all()


def npz(**arrays: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()


def packed(damage: bytes) -> bytes:
    """Policies whose deflated bytes are others."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **dict.fromkeys(("tokens", "heads", "sublayers"), MASK))
    data = bytearray(buffer.getvalue())
    start = data.index(b"tokens.npy") + len("tokens.npy") + 20
    data[start : start + len(damage)] = damage
    return bytes(data)


MASK = np.ones((1, 3, 3), bool)
NOT_POLICIES = {
    "empty": b"",
    "text": b"tokens",
    "one array": npy(MASK),
    "pickled": npy(np.array([{}], object)),
    "a mask short": npz(tokens=MASK, heads=MASK),
    "numbers": npz(tokens=MASK, heads=MASK, sublayers=MASK.astype(float)),
    "flat": npz(tokens=MASK, heads=MASK, sublayers=MASK[0]),
    "objects": npz(tokens=MASK, heads=MASK, sublayers=np.array([{}], object)),
    "cut": npz(tokens=MASK, heads=MASK, sublayers=MASK)[:-100],
    "damaged": npz(tokens=MASK, heads=MASK, sublayers=MASK).replace(b"NUMPY", b"\xff\xff\xff\xff\xff"),
    "badly packed": packed(b"\xff" * 40),
}


@pytest.mark.parametrize("kind", NOT_POLICIES)
def test_what_is_no_policy_is_refused(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "policy.npz"
    path.write_bytes(NOT_POLICIES[kind])
    with pytest.raises(InputError, match=r"policy\.npz: not a recorded policy"):
        Policy.load(path)


def test_a_policy_that_unpacks_to_more_than_any(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "policy.npz"
    np.savez_compressed(path, **dict.fromkeys(("tokens", "heads", "sublayers"), np.zeros((1, 1000, 1000), bool)))
    monkeypatch.setattr("adavit.bundle.policy.MOST_BYTES", 2_000_000)
    assert path.stat().st_size < 100_000
    with pytest.raises(InputError, match=r"takes 30\d+ bytes unpacked, over 2000000"):
        Policy.load(path)


def test_no_such_policy(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such policy file; record one with"):
        Policy.load(tmp_path / "policy.npz")
