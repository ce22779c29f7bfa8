"""Whatever public functions are given, what reaches the caller is one of this package's own errors, in one line."""

import copy
import json
import os
import pickle
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Callable
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cases import picture, random_images, read_config, tiny, write_config
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import adavit
from adavit.bundle.operating_points import Offsets, OperatingPoint
from adavit.bundle.preprocessing import Preprocessor
from adavit.errors import LONGEST_MESSAGE, AdaViTError, InputError, OptionError, shown
from adavit.runtime import Policy, Result, Runtime

IMAGES = random_images(tiny(), 2)


class Odd:
    """A value that fails in every way."""

    def __repr__(self) -> str:
        raise RuntimeError("no repr")


class Index:
    def __index__(self) -> int:
        raise RuntimeError("no index")


class Fspath(os.PathLike[str]):
    def __fspath__(self) -> str:
        raise RuntimeError("no path")


class Float(float):
    def __float__(self) -> float:
        raise RuntimeError("no float")


JUNK: list[Any] = [
    None, True, 0, -1, 1.5, 2.5, float("nan"), float("inf"), 10**400, 10**5000, Fraction(10**400, 3), 1j, "", "a",
    "a" * 300 + ".jpg", "a\0b", "\ud800", "\udc80", "a\nb\x1b[31m", "x" * 10_000, b"", b"bytes", bytearray(b"x"), [],
    [None], [[[]]], (), {}, {"tokens": 1}, set(), object(), Odd(), Odd, print, slice(0), slice("a", 2.5), slice(None),
    range(3), iter(()), Path(), Path("a\0b"), Path("\ud800"), Path("y" * 300), np.zeros(0), np.zeros((2, 3)),
    np.float32("nan"), np.int64(2), np.bool_(True), np.zeros((), object), np.array([None, "a"], object),
    np.array([5, 99]), np.array(["a"]), np.zeros((0, 0, 3), np.uint8), np.zeros((2, 4, 4, 3), np.uint8),
    np.zeros((2, 3, 32, 32), np.float16), np.full((1, 3, 32, 32), np.nan, np.float32), IMAGES[:0],
    np.ma.masked_array(IMAGES, IMAGES > 0), IMAGES.astype(">f4"), IMAGES.view(np.recarray), Policy(None, None, None),  # type: ignore[arg-type]
    Policy.dense(tiny(), 0), Policy.dense(tiny(), 2), Policy.dense(tiny(depth=2), 2), Offsets(), Offsets(heads=(1, 2)),
    tiny(), picture(), Index(), Fspath(), Float(0.7), slice(Index()), Result(None, None, None),  # type: ignore[arg-type]
]  # fmt: skip

values = st.sampled_from(JUNK) | st.integers() | st.floats() | st.text(max_size=20) | st.binary(max_size=5)


def only_own(call: Callable[[], object]) -> None:
    """Calls it; nothing but this package's errors may come, in one printable line that is not too long."""
    try:
        call()
    except AdaViTError as error:
        message = str(error)
        assert message.isprintable()
        assert 0 < len(message) <= LONGEST_MESSAGE


@given(value=values, more=values, other=values)
@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_any_values(value: Any, more: Any, other: Any, runtime: Runtime) -> None:
    policy, result = Policy.dense(tiny(), 2), runtime.run(IMAGES)
    calls: list[Callable[[], object]] = [
        partial(runtime.run, value),
        partial(runtime.run, IMAGES, policy=value),
        partial(runtime.run, IMAGES, budget=value),
        partial(runtime.run, IMAGES, budget=[value, more]),
        partial(runtime.run, IMAGES, value, None, more),
        partial(runtime.run_dense, value),
        partial(runtime.preprocess, value),
        partial(runtime.predict, value),
        partial(runtime.predict, [value, picture()]),
        partial(runtime.predict, picture(), top=value, budget=more),
        partial(runtime.specialise, value),
        partial(runtime.prediction, value, more, other),
        partial(runtime.prediction, result, value, more),
        partial(runtime.draw, value),
        partial(runtime.draw, [picture(), value]),
        partial(runtime.draw, picture(), budget=value),
        partial(adavit.draw, value, more, other),
        partial(adavit.draw, result, value, more),
        partial(adavit.draw, result, IMAGES, value),
        partial(adavit.draw, Result(value, more, tiny(), runtime.bundle.preprocessor), IMAGES),
        partial(adavit.draw, Result(result.logits, policy, value, more), IMAGES),
        lambda: result[value],
        lambda: Result(value, policy, tiny())[:1],
        lambda: Result(result.logits, value, tiny())[more],
        partial(Policy.load, value),
        partial(Policy.concatenate, value),
        partial(Policy.concatenate, [policy, value]),
        partial(policy.check, value, more),
        partial(policy.check, tiny(), value),
        lambda: policy[value],
        lambda: Policy(value, more, other).usage(),
        lambda: len(Policy(policy.tokens, value, policy.sublayers)),
        lambda: Policy(value, policy.heads, policy.sublayers).check(tiny(), 2),
        partial(adavit.load, value, threads=1, specialise=False),
    ]
    if not isinstance(value, int) or value < 1000:  # larger ones are arrays that large
        calls += [partial(Policy.dense, tiny(), value), partial(Policy.empty, tiny(), value)]
    for call in calls:
        only_own(call)


@given(value=values)
@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@pytest.mark.parametrize(
    "name",
    ["backend", "threads", "provider", "parallel", "budget", "dispatch", "precision", "specialise", "shared_pool"],
)
def test_any_arguments_of_load(name: str, value: Any, tiny_bundle: Path) -> None:
    if not (isinstance(value, int) and 0 < value <= 1024):  # which are threads
        only_own(lambda: adavit.load(tiny_bundle, **{"threads": 1, "specialise": False, name: value}))


@pytest.mark.parametrize("path", ["no/folder/a.npz", ".", "b" * 300, "a\0b", "\ud800", None, b"a.npz", 3])
def test_places_where_no_policy_can_be_kept(path: Any, tmp_path: Path) -> None:
    where = tmp_path / path if isinstance(path, str) else path
    with pytest.raises(InputError):
        Policy.dense(tiny(), 1).save(where)


WRONG: dict[str, tuple[Callable[[Runtime], object], str]] = {
    "no images": (lambda r: r.predict(None), "images is None: expected a path, a PIL image, a uint8 array"),  # type: ignore[arg-type]
    "bytes": (lambda r: r.predict(b"\xff\xd8"), "images is b'\\xff\\xd8': expected a path"),  # type: ignore[arg-type]
    "top": (lambda r: r.predict(picture(), top=2.5), "top is 2.5: expected a whole number from 1 on"),  # type: ignore[arg-type]
    "many": (lambda r: r.preprocess(np.zeros((2, 4, 4, 3), np.uint8)), "give several as a list"),
    "policy": (lambda r: r.run(IMAGES, policy={}), "policy is {}: expected an adavit.Policy"),  # type: ignore[arg-type]
    "nothing to specialise for": (lambda r: r.specialise(None), "policy is None: expected an adavit.Policy"),  # type: ignore[arg-type]
    "empty policy": (lambda r: r.specialise(Policy.dense(tiny(), 0)), "the policy is empty"),
    "no bundle": (lambda r: adavit.load(None), "bundle is None: expected a path"),  # type: ignore[arg-type]
    "row": (lambda r: r.prediction(r.run(IMAGES), 2), "row is 2: expected a whole number from 0 to 1"),
    "images of a policy": (lambda r: Policy.dense(tiny(), 2)[0], "0 names no images"),  # type: ignore[index]
    "large": (lambda r: r.run(IMAGES * np.float32(1e20)), "normalised pixels are below 10"),
}  # fmt: skip


@pytest.mark.parametrize("kind", WRONG)
def test_what_is_expected_is_said(kind: str, runtime: Runtime) -> None:
    call, message = WRONG[kind]
    with pytest.raises(InputError) as caught:
        call(runtime)
    assert message in str(caught.value)


def paths_in(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where in a JSON value other values are."""
    keys = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [at, *(path for key, inner in keys for path in paths_in(inner, (*at, key)))]


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from([10**400, "\ud800"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)


def damaged(data: st.DataObject, intact: Any, value: Any) -> Any:
    """A JSON value, one value of which is another."""
    result = copy.deepcopy(intact)
    *outer, last = data.draw(st.sampled_from([path for path in paths_in(intact) if path]))
    inner = result
    for key in outer:
        inner = inner[key]
    inner[last] = value
    return result


@given(data=st.data(), value=json_values)
@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_any_damage_of_a_bundles_description(data: st.DataObject, value: Any, bundle: Path) -> None:
    intact = (bundle / "config.json").read_text()
    write_config(bundle, damaged(data, {**json.loads(intact), "budgets": BUDGETS}, value))
    try:
        only_own(lambda: adavit.load(bundle, threads=1, specialise=False).predict(picture(), top=1, budget=0.5))
    finally:
        (bundle / "config.json").write_text(intact)


POINTS = [
    (0.4, {"tokens": -1.0, "heads": [0.0, 0.5, 1], "sublayers": 0.0}),
    (0.9, dict(tokens=0, heads=0, sublayers=0)),
]
BUDGETS = {
    "points": [{"budget": share, "offsets": offsets, "measured": {"macs": share}} for share, offsets in POINTS],
    "calibration": {"images": 3, "labelled": False},
}


@given(data=st.data(), value=json_values)
@settings(max_examples=200, deadline=None)
def test_any_damage_of_a_preprocessor(data: st.DataObject, value: Any) -> None:
    values = damaged(data, Preprocessor(32).to_dict(), value)

    def pixels() -> None:
        assert np.isfinite(Preprocessor.from_dict(values, 32)(picture())).all()

    only_own(pixels)


@pytest.mark.parametrize("key", ["name", "schema_version", "precisions", "architecture"])
def test_long_values_of_a_file_are_not_printed_whole(key: str, bundle: Path) -> None:
    config = read_config(bundle)
    config[key] = ["x\n" * 10_000]
    write_config(bundle, config)
    only_own(lambda: adavit.load(bundle, threads=1))


def test_long_messages_keep_their_beginning_and_their_end() -> None:
    error = InputError("the file: " + "\x1b[31m\nx\ud800" * 3000 + "; make it again")
    assert str(error).startswith("the file: \\x1b[31m x\\xd800")
    assert str(error).endswith("; make it again")
    assert len(str(error)) == LONGEST_MESSAGE
    str(error).encode()
    again = pickle.loads(pickle.dumps(OptionError(error)))
    assert (type(again), str(again)) == (OptionError, str(error))
    assert str(copy.copy(error)) == str(error)


def test_values_are_shown_in_short() -> None:
    assert shown("a\nb") == r"'a\nb'"
    assert len(shown("x" * 10_000)) == 80
    assert shown(10**5000) == "a value of the type int"
    assert shown(Odd()) == "a value of the type Odd"
    assert shown(b"x" * 10_000).startswith("b'xxx")
    assert (shown([1, {"a": None}]), shown(KeyError("a"))) == ("[1, {'a': None}]", "KeyError('a')")


HOLDERS: dict[str, Callable[[Any], Any]] = {
    "list": lambda value: [value, value],
    "tuple": lambda value: (value, value),
    "dict": lambda value: {"a": value, "b": value},
    "OrderedDict": lambda value: OrderedDict(a=value, b=value),
    "Namespace": lambda value: Namespace(a=value, b=value),
    "dataclass": lambda value: OperatingPoint(value, value, value),
    "array of objects": lambda value: np.array([None, value, value], object),
}


@pytest.mark.parametrize("kind", HOLDERS)
def test_values_that_hold_one_another_are_shown_at_once(kind: str) -> None:
    value: Any = 1
    for _ in range(60):
        value = HOLDERS[kind](value)
    assert len(shown(value)) <= 80
    assert len(shown(ValueError(value))) <= 80
