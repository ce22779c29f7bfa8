"""Random models, policies, sizes and rooms: images that find no room are found, and all others are exact."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from batch_reference import BatchReference, sizes_of
from cases import export, forced, random_images, random_model, random_policy
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from strategies import architectures

from adavit.architecture import Architecture
from adavit.bundle.bundle import Bundle
from adavit.bundle.graphs import Graphs
from adavit.graphs.batch import GOES_ON, NOT_FINITE, OVERFLOWED
from adavit.model import AdaViT
from adavit.runtime import Policy

ROOMS = ("fits", "larger", "much larger", "one less", "half", "one")
"""How much of what is needed there is."""


def room_of(kind: str, needed: int) -> int:
    """So much room."""
    less = {"one less": needed - 1, "half": needed // 2, "one": 1}
    return max(1, less.get(kind, needed + {"larger": 1, "much larger": 2 * needed + 7}.get(kind, 0)))


class Expected:
    """What becomes of images, counted one by one.

    Args:
        arch: the model's shapes.
        policy: what the images keep.
        heads: those that blocks have, where not all.
        bad: images of NaN.
    """

    def __init__(
        self, arch: Architecture, policy: Policy, heads: Mapping[int, Sequence[int]], bad: Sequence[int]
    ) -> None:
        self.arch, self.policy, self.heads, self.bad = arch, policy, heads, bad
        self.states = [[GOES_ON] * len(policy)]
        self._look()

    def block(self, block: int, room: Sequence[int]) -> None:
        """Adds the states behind a block."""
        states = list(self.states[-1])
        tokens = self.policy.tokens[:, block].sum(1)
        there = self.heads.get(block, range(self.arch.heads))
        lacks = np.delete(self.policy.heads[:, block], there, 1).any(1)
        for sublayer, (most, images, longest) in enumerate(((room[0], room[1], room[2]), (room[3], None, None))):
            runs = self.policy.sublayers[:, block, sublayer]
            rows = count = 0
            for image, state in enumerate(states):
                if state != GOES_ON or not runs[image]:
                    continue
                if lacks[image]:
                    states[image] = OVERFLOWED
                    continue
                rows, count = rows + tokens[image], count + 1
                if rows > most or (images and count > images) or (longest and tokens[image] > longest):
                    states[image] = OVERFLOWED
        self.states.append(states)
        self._look()

    def _look(self) -> None:
        """Decisions on tokens find an image of NaN."""
        for image in self.bad:
            self.states[-1][image] = NOT_FINITE


@st.composite
def policies(draw: st.DrawFn, arch: Architecture, batch: int) -> Policy:
    """Any, also with all images alike, or all but one."""
    found = random_policy(arch, batch, draw(st.integers(0, 1000)))
    alone = draw(st.integers(0, batch - 1))
    for block in range(arch.depth):
        special = draw(st.sampled_from(["any", "any", "any", "nothing", "class tokens", "everything", "one alone"]))
        if special == "everything":
            for mask in found.masks():
                mask[:, block] = True
        if special == "class tokens" and arch.token_policy:
            found.tokens[:, block, 1:] = False
        if special in ("nothing", "one alone") and arch.adapts_sublayers(block):
            found.sublayers[:, block] = False
            found.sublayers[alone, block] = special == "one alone"
    return found


@st.composite
def heads_there(draw: st.DrawFn, arch: Architecture) -> dict[int, tuple[int, ...]]:
    """For some blocks, some of their heads."""
    found = {}
    for block in range(arch.depth):
        if arch.adapts_heads(block) and draw(st.integers(0, 2)) == 0:
            some = draw(st.sets(st.integers(0, arch.heads - 1), min_size=1))
            found[block] = tuple(sorted(some))
    return found


@settings(max_examples=10, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(architectures(), st.data())
def test_whatever_there_is_room_for_is_exact(arch: Architecture, data: st.DataObject) -> None:
    assume(arch.adapts)
    batch = data.draw(st.sampled_from([1, 2, 3, 5, 8, 33]))
    assume(batch * arch.tokens < 500)
    seed = data.draw(st.integers(0, 1000))
    model = random_model(arch, seed)
    with tempfile.TemporaryDirectory() as folder:
        graphs = Graphs(Bundle.open(export(model, Path(folder), verify=False, with_dense=False)))
        for _ in range(4):
            assert_exact(model, graphs, batch, data)


def assert_exact(model: AdaViT, graphs: Graphs, batch: int, data: st.DataObject) -> None:
    """One batch, replayed: states are as counted, and logits of all that go on are the masked model's."""
    arch = graphs.architecture
    images = random_images(arch, batch, data.draw(st.integers(0, 100)))
    follow = data.draw(policies(arch, batch))
    wanted = forced(model, images, follow)
    bad = data.draw(st.sampled_from([(), (0,), (batch - 1,), (batch // 2,)])) if arch.token_policy else ()
    images[list(bad)] = np.nan
    heads = data.draw(heads_there(arch))
    expected = Expected(arch, follow, heads, bad)
    kinds = data.draw(st.sampled_from([ROOMS[:1], ROOMS[:2], ROOMS[:3], ROOMS[:1] * 4 + ROOMS, ROOMS]))
    rooms = data.draw(st.lists(st.tuples(*[st.sampled_from(kinds)] * 4), min_size=arch.depth, max_size=arch.depth))

    def room(block: int, sizes: np.ndarray) -> list[int]:
        np.testing.assert_array_equal(sizes, sizes_of(follow, block, np.array(expected.states[-1]) == GOES_ON))
        found = [room_of(kind, int(size)) for kind, size in zip(rooms[block], sizes, strict=True)]
        found = np.minimum(found, batch * arch.tokens).tolist()
        expected.block(block, found)
        return found

    parts = data.draw(st.booleans())
    found = BatchReference(graphs, heads, parts).run(images, room, follow)
    np.testing.assert_array_equal(found.states, expected.states)
    good = np.flatnonzero(found.states[-1] == GOES_ON)
    np.testing.assert_allclose(found.logits[good], wanted[good], atol=2e-4, rtol=0)
