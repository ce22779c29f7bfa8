"""Graphs of batches in fp16 and int8 decide as near to fp32 as those of single images do."""

from pathlib import Path

import numpy as np
import pytest
from batch_reference import BatchReference, all_of
from cases import WIDE, random_images

import adavit
from adavit.bundle.bundle import Bundle
from adavit.bundle.graphs import Graphs
from adavit.runtime import Policy


def shares(found: Policy, wanted: Policy) -> list[float]:
    """The shares of decisions on tokens and on heads that are the same."""
    return [float((getattr(found, kind) == getattr(wanted, kind)).mean()) for kind in ("tokens", "heads")]


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_decisions_and_classes_stay_close(converted: Path, precision: str) -> None:
    images = random_images(WIDE, 16, seed=9)
    runs = {name: adavit.load(converted, threads=1, precision=name, specialise=False) for name in {"fp32", precision}}
    wanted, single = runs["fp32"].run(images), runs[precision].run(images)
    batches = BatchReference(Graphs(Bundle.open(converted), precision), {})
    found = batches.run(images)
    assert not found.states.any()
    assert np.mean(shares(found.policy, wanted.policy)) > {"fp16": 0.999, "int8": 0.97}[precision]
    assert np.mean(shares(found.policy, single.policy)) > {"fp16": 0.999, "int8": 0.99}[precision]
    replayed = batches.run(images, replay=wanted.policy)
    allowed = {"fp16": 0.01, "int8": 0.35}[precision] * np.abs(wanted.logits).max()
    assert np.abs(replayed.logits - wanted.logits).max() < allowed
    roomy = batches.run(images, all_of(WIDE, len(images)), replay=wanted.policy)
    # A value may round to the next code, which changes an image's logits by far less than int8 does.
    assert np.median(np.abs(roomy.logits - replayed.logits).max(1)) < 1e-3


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_parts_compute_what_the_whole_does(converted: Path, precision: str) -> None:
    images, graphs = random_images(WIDE, 4, seed=2), Graphs(Bundle.open(converted), precision)
    wanted = BatchReference(graphs, {}).run(images)
    found = BatchReference(graphs, {}, in_parts=True).run(images, replay=wanted.policy)
    np.testing.assert_array_equal(found.states, wanted.states)
    assert np.median(np.abs(found.logits - wanted.logits).max(1)) < 1e-3
