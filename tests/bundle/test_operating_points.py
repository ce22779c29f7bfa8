"""Operating points: what offsets keep, what a budget stands for, and that it is of one request alone."""

import copy
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import (
    assert_same_policy,
    export,
    oracle,
    picture,
    random_images,
    random_model,
    random_policy,
    read_config,
    tiny,
    write_config,
)
from hypothesis import given, settings
from hypothesis import strategies as st

import adavit
from adavit.bundle.operating_points import TRAINED, Budgets, Offsets
from adavit.errors import BundleError, InputError
from adavit.runtime import Runtime

IMAGES = random_images(tiny(), 6)
POINTS: dict[str, Any] = {
    "points": [
        {"budget": 0.2, "offsets": {"tokens": -2.0, "heads": -4.0, "sublayers": -1.0}, "measured": {"macs": 0.2}},
        {"budget": 0.5, "offsets": {"tokens": 0.0, "heads": 0.0, "sublayers": 0.0}, "measured": {"macs": 0.5}},
        {"budget": 0.9, "offsets": {"tokens": 8.0, "heads": 0.0, "sublayers": 2.0}, "measured": {"macs": 0.9}},
    ],
    "calibration": {"images": 3},
}
SOME = st.floats(-4, 4, width=32)


@pytest.fixture
def dialled(bundle: Path) -> Path:
    """A bundle with three operating points."""
    write_config(bundle, {**read_config(bundle), "budgets": POINTS})
    return bundle


@settings(max_examples=8, deadline=None)
@given(tokens=SOME, heads=SOME, sublayers=SOME)
def test_offsets_are_biases_in_the_masked_net(runtime: Runtime, tokens: float, heads: float, sublayers: float) -> None:
    """The reference in PyTorch with shifted biases decides the same."""
    shifted = random_model(tiny(), tokens=tokens, heads=heads, sublayers=sublayers)
    logits, policy, margin = oracle(shifted, IMAGES)
    sure = margin > 1e-5
    found = runtime.run(IMAGES, budget=Offsets(tokens, heads, sublayers))
    assert_same_policy(found.policy[sure], policy[sure])
    np.testing.assert_allclose(found.logits[sure], logits[sure], atol=1e-4)


@settings(max_examples=8, deadline=None)
@given(st.lists(st.tuples(SOME, SOME, SOME), min_size=3, max_size=3))
def test_offsets_by_block_are_biases_of_these_blocks(runtime: Runtime, by_block: list[tuple[float, ...]]) -> None:
    shifted = random_model(tiny())
    with torch.no_grad():
        for block, (tokens, heads, sublayers) in zip(shifted.blocks, by_block, strict=True):
            block.attn.token_select.mlp_head.bias += tokens
            for name, offset in (("head_select", heads), ("layer_select", sublayers)):
                if getattr(block, name, None):
                    getattr(block, name).mlp_head.bias += offset
    logits, policy, margin = oracle(shifted, IMAGES)
    sure = margin > 1e-5
    found = runtime.run(IMAGES, budget=Offsets(*zip(*by_block, strict=True)))
    assert_same_policy(found.policy[sure], policy[sure])
    np.testing.assert_allclose(found.logits[sure], logits[sure], atol=1e-4)


@given(
    st.one_of(SOME, st.tuples(SOME, SOME)), st.one_of(SOME, st.tuples(SOME, SOME)), st.floats(0, 1), st.integers(0, 1)
)
def test_between_offsets_by_block_each_block_is_on_its_line(first: Any, second: Any, share: float, block: int) -> None:
    low, high = Offsets(heads=first), Offsets(heads=second)
    wanted = (1 - share) * low.by_block(2)[1][block] + share * high.by_block(2)[1][block]
    assert low.toward(high, share).by_block(2)[1][block] == pytest.approx(wanted, abs=1e-6)
    if first == second:
        assert low.toward(high, share).by_block(2) == low.by_block(2)  # to the last bit: what stays never turns back


def test_offsets_for_another_number_of_blocks(runtime: Runtime) -> None:
    with pytest.raises(InputError, match="there are 2 offsets of heads: this model has 3 blocks"):
        runtime.run(IMAGES, budget=Offsets(heads=(1.0, 2.0)))


def test_without_offsets_the_trained_policy_runs(runtime: Runtime) -> None:
    assert_same_policy(runtime.run(IMAGES, budget=TRAINED).policy, runtime.run(IMAGES).policy)


@settings(max_examples=15, deadline=None)
@given(first=st.tuples(SOME, SOME, SOME), more=st.tuples(*[st.floats(0, 4, width=32)] * 3))
def test_a_larger_offset_keeps_what_a_smaller_one_keeps(
    runtime: Runtime, first: tuple[float, ...], more: tuple[float, ...]
) -> None:
    """At the same logits, which are those of the first block that decides on a kind."""
    small = runtime.run(IMAGES, budget=Offsets(*first)).policy
    large = runtime.run(IMAGES, budget=Offsets(first[0], first[1] + more[1], first[2] + more[2])).policy
    assert (large.heads[:, 1] >= small.heads[:, 1]).all()
    assert (large.sublayers[:, 1] >= small.sublayers[:, 1]).all()
    large = runtime.run(IMAGES, budget=Offsets(first[0] + more[0])).policy
    assert (large.tokens[:, 0] >= small.tokens[:, 0]).all()


@pytest.mark.parametrize("kind", ["tokens", "heads", "sublayers"])
def test_the_ends_keep_all_or_nothing(kind: str, runtime: Runtime) -> None:
    arch = runtime.architecture
    for offset, wanted in ((1000.0, True), (-1000.0, False)):
        mask = getattr(runtime.run(IMAGES, budget=Offsets(**{kind: offset})).policy, kind)
        adapted = mask[..., 1:] if kind == "tokens" else mask[:, arch.keep :]
        assert (adapted == wanted).all()


@given(budget=st.floats(0.2, 0.9))
def test_between_points_offsets_are_on_the_straight_line(budget: float) -> None:
    budgets = Budgets.from_dict(POINTS, tiny().depth)
    found = budgets.offsets(budget)
    for kind in ("tokens", "heads", "sublayers"):
        stored = [getattr(point.offsets, kind) for point in budgets.points]
        assert getattr(found, kind) == pytest.approx(np.interp(budget, [0.2, 0.5, 0.9], stored), abs=1e-12)


def test_stored_points_are_met_exactly() -> None:
    budgets = Budgets.from_dict(POINTS, tiny().depth)
    for point in budgets.points:
        assert budgets.offsets(point.budget) == point.offsets
    assert budgets.offsets(np.float64(0.5)) == TRAINED
    assert budgets.trained.budget == 0.5
    assert Budgets.from_dict(json.loads(json.dumps(budgets.to_dict())), tiny().depth) == budgets


def test_a_budget_is_of_its_request_alone(dialled: Path) -> None:
    """Requests of many budgets from many threads get what each gets alone."""
    shared = adavit.load(dialled, threads=1, specialise=False)
    asked = [None, 0.2, 0.35, 0.5, 0.7, 0.9, Offsets(heads=-1.5)]
    alone = [adavit.load(dialled, threads=1, specialise=False).run(IMAGES, budget=budget) for budget in asked]
    assert len({tuple(result.macs) for result in alone}) == len(asked) - 1  # 0.5 is the trained policy
    with ThreadPoolExecutor(6) as pool:
        together = list(pool.map(lambda budget: shared.run(IMAGES, budget=budget), asked * 10))
    for position, found in enumerate(together):
        wanted = alone[position % len(asked)]
        assert_same_policy(found.policy, wanted.policy)
        np.testing.assert_array_equal(found.logits, wanted.logits)


def test_a_runtime_has_a_budget_of_its_own(dialled: Path) -> None:
    plain = adavit.load(dialled, threads=1, specialise=False)
    small = adavit.load(dialled, threads=1, specialise=False, budget=0.2)
    assert_same_policy(small.run(IMAGES).policy, plain.run(IMAGES, budget=0.2).policy)
    assert_same_policy(small.run(IMAGES, budget=0.5).policy, plain.run(IMAGES).policy)
    assert small.predict(picture(), budget=0.9) == plain.predict(picture(), budget=0.9)
    assert small.predict(picture()) == plain.predict(picture(), budget=0.2) != plain.predict(picture())
    replayed = random_policy(tiny(), 6, seed=3)  # a recorded policy is followed whatever the runtime's budget
    np.testing.assert_array_equal(small.run(IMAGES, policy=replayed).logits, plain.run(IMAGES, policy=replayed).logits)


@pytest.mark.parametrize("parallel", ["operators", "samples", "auto"])
def test_every_image_of_a_batch_runs_at_the_budget(parallel: str, dialled: Path) -> None:
    runtime = adavit.load(dialled, threads=2, parallel=parallel)
    batch = runtime.run(IMAGES, budget=0.3)
    for row in range(len(IMAGES)):
        assert_same_policy(runtime.run(IMAGES[row : row + 1], budget=0.3).policy, batch.policy[row : row + 1])


@pytest.mark.parametrize(("kind", "parallel"), [("array", "operators"), ("list", "samples"), ("tuple", "auto")])
def test_each_image_of_a_batch_runs_at_a_budget_of_its_own(kind: str, parallel: str, dialled: Path) -> None:
    runtime = adavit.load(dialled, threads=2, parallel=parallel, specialise=False)
    asked: Any = [0.9, 0.2, 0.5, 0.35, 0.2, 0.7]
    budgets = {"array": np.array(asked), "list": asked, "tuple": tuple(asked)}[kind]
    batch = runtime.run(IMAGES, budget=budgets)
    assert len(set(batch.macs.tolist())) > 3
    for row, budget in enumerate(asked):
        alone = runtime.run(IMAGES[row : row + 1], budget=budget)
        assert_same_policy(alone.policy, batch.policy[row : row + 1])
        np.testing.assert_allclose(alone.logits[0], batch.logits[row], atol=1e-5)
    np.testing.assert_array_equal(
        runtime.run(IMAGES, budget=np.full(6, 0.5, np.float32)).macs, runtime.run(IMAGES).macs
    )


def test_each_image_of_a_batch_runs_with_offsets_of_its_own(runtime: Runtime) -> None:
    each = [Offsets(heads=0.3 * row, tokens=(0.1, -0.5 * row, 1.0)) for row in range(len(IMAGES))]
    batch = runtime.run(IMAGES, budget=each)
    for row, offsets in enumerate(each):
        assert_same_policy(runtime.run(IMAGES[row : row + 1], budget=offsets).policy, batch.policy[row : row + 1])


EACH_WRONG: dict[str, tuple[Any, str]] = {
    "too few": ([0.4], "there are 1 budgets for 6 images: give one for each, or one for all"),
    "too many": (np.full(7, 0.4), "there are 7 budgets for 6 images"),
    "none": ([], "there are 0 budgets for 6 images"),
    "one is beyond": (np.array([0.4] * 5 + [2.0]), "image 5: budget 2 is out of range: this bundle's go from 0.2"),
    "one is NaN": (np.array([np.nan] + [0.4] * 5), "image 0: budget nan is out of range"),
    "one is missing": ([0.4, None, 0.4, 0.4, 0.4, 0.4], "image 1: budget is None: expected a share"),
    "one is text": (["0.4"] * 6, "image 0: budget is '0.4': expected a share"),
    "offsets of another depth": ([Offsets(heads=(1.0, 2.0))] * 6, "there are 2 offsets of heads"),
    "truths": (np.ones(6, bool), "expected a share"),
    "two dimensions": (np.full((6, 1), 0.4), "expected a share"),
}


@pytest.mark.parametrize("kind", EACH_WRONG)
def test_budgets_of_images_that_are_refused(kind: str, dialled: Path) -> None:
    budget, message = EACH_WRONG[kind]
    with pytest.raises(InputError) as caught:
        adavit.load(dialled, threads=1, specialise=False).run(IMAGES, budget=budget)
    assert message in str(caught.value)


def test_pictures_and_drawings_have_one_budget(dialled: Path) -> None:
    runtime = adavit.load(dialled, threads=1, specialise=False)
    for ask in (
        lambda: runtime.predict([picture()], budget=[0.4]),  # type: ignore[arg-type]
        lambda: runtime.draw([picture()], budget=np.array([0.4])),  # type: ignore[arg-type]
        lambda: adavit.load(dialled, threads=1, budget=[0.4]),  # type: ignore[arg-type]
    ):
        with pytest.raises(InputError, match=r"budget is .*: expected a share of the dense MACs"):
            ask()


WRONG: dict[str, tuple[Any, str]] = {
    "below": (0.19, "budget 0.19 is out of range: this bundle's go from 0.2 to 0.9 of the dense MACs"),
    "above": (1, "budget 1 is out of range"),
    "per cent": (40, "from 0.2 to 0.9 of the dense MACs"),
    "NaN": (float("nan"), "budget nan is out of range"),
    "text": ("0.4", "budget is '0.4': expected a share of the dense MACs from 0.2 to 0.9"),
    "truth": (True, "budget is True: expected a share"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_budgets_that_are_refused(kind: str, dialled: Path) -> None:
    budget, message = WRONG[kind]
    runtime = adavit.load(dialled, threads=1)
    for ask in (
        lambda: runtime.run(IMAGES, budget=budget),
        lambda: runtime.predict(picture(), budget=budget),
        lambda: adavit.load(dialled, threads=1, budget=budget),
    ):
        with pytest.raises(InputError) as caught:
            ask()
        assert message in str(caught.value)


def test_a_bundle_without_points(runtime: Runtime, tiny_bundle: Path) -> None:
    assert runtime.budgets is None
    for ask in (lambda: runtime.run(IMAGES, budget=0.4), lambda: adavit.load(tiny_bundle, threads=1, budget=0.4)):
        with pytest.raises(InputError, match=r"has no operating points; add them with adavit-export .* --budgets"):
            ask()


def test_a_budget_and_a_recorded_policy(runtime: Runtime) -> None:
    with pytest.raises(InputError, match="a recorded policy leaves nothing to a budget"):
        runtime.run(IMAGES, policy=random_policy(tiny(), 6, seed=1), budget=TRAINED)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1001.0, "1", None, True])
def test_offsets_that_are_none(value: Any) -> None:
    with pytest.raises(InputError, match="the offset of heads is"):
        Offsets(heads=value)


def damaged(**changes: Any) -> dict[str, Any]:
    values = copy.deepcopy(POINTS)
    values["points"][1].update(changes)  # type: ignore[attr-defined]
    return values


DAMAGED: dict[str, Any] = {
    "a list": [],
    "null": None,
    "no points": {"points": [], "calibration": {}},
    "points of text": {"points": ["a", "b"], "calibration": {}},
    "too many": {
        "points": [{**POINTS["points"][n == 0], "budget": (n + 1) / 2000} for n in range(1001)],
        "calibration": {},
    },
    "no calibration": {"points": POINTS["points"]},
    "out of order": damaged(budget=0.95),
    "twice": damaged(budget=0.2),
    "more than all": {"points": [*POINTS["points"][:2], {**POINTS["points"][2], "budget": 1.1}], "calibration": {}},
    "the trained policy twice": {
        "points": [*POINTS["points"], {**POINTS["points"][1], "budget": 1}],
        "calibration": {},
    },
    "a budget of NaN": damaged(budget=float("nan")),
    "a budget of text": damaged(budget="0.5"),
    "an offset of NaN": damaged(offsets={"tokens": float("nan")}),
    "an infinite offset": damaged(offsets={"tokens": float("inf")}),
    "an unknown kind": damaged(offsets={"blocks": 1.0}),
    "offsets of too few blocks": damaged(offsets={"tokens": [1.0, 2.0]}),
    "an offset of NaN in a block": damaged(offsets={"tokens": [1.0, float("nan"), 2.0]}),
    "offsets in a list": damaged(offsets=[0, 0, 0]),
    "without the trained policy": damaged(offsets={"tokens": 1.0}),
    "no measurement": damaged(measured=1),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_damaged_points_are_refused(kind: str, bundle: Path) -> None:
    write_config(bundle, {**read_config(bundle), "budgets": DAMAGED[kind]})
    with pytest.raises(BundleError, match=r"config\.json( is damaged|: not JSON)"):
        adavit.load(bundle)


@pytest.mark.parametrize("missing", ["token_policy", "head_policy", "sublayer_policy"])
def test_models_that_lack_a_policy_have_budgets_too(missing: str, tmp_path: Path) -> None:
    arch = tiny(**{missing: False})
    runtime = adavit.load(export(random_model(arch), tmp_path), threads=1)
    offsets = Offsets(*(-0.7 if getattr(arch, f"{kind}_policy") else 5.0 for kind in ("token", "head", "sublayer")))
    biases = {"tokens": -0.7, "heads": -0.7, "sublayers": -0.7}
    _, policy, margin = oracle(random_model(arch, **biases), IMAGES)
    sure = margin > 1e-5
    assert_same_policy(runtime.run(IMAGES, budget=offsets).policy[sure], policy[sure])
