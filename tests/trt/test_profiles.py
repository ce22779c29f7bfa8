"""The shapes that engines are built for, and those that they are tuned for."""

from pathlib import Path

import pytest
from cases import tiny
from hypothesis import given
from hypothesis import strategies as st

from adavit.bundle.bundle import Bundle
from adavit.bundle.graph_keys import STEM_GRAPH, GraphKey, constants_of, read_graph
from adavit.bundle.graphs import Graphs
from adavit.bundle.onnx_format import Value
from adavit.runtime.batch import Room
from adavit.tensorrt.profiles import Profile, Rooms, profiles_of

ARCH = tiny(image_size=224, patch_size=16)
TOKENS = 197
BLOCK = dict(
    x=("R", 48), kept=("B", 202), state=("B",), numbers=("R",), attention_rows=("T",), attention_images=("A",),
    attention_tokens=("K",), mlp_rows=("U",),
)  # fmt: skip
IMAGES = dict(images=("B", 3, 224, 224))


def profiles(
    inputs: dict[str, tuple[int | str, ...]], max_batch: int = 16, block: int | None = 1, rooms: Rooms | None = None
) -> list[Profile]:
    values = [Value(name, "float32", shape) for name, shape in inputs.items()]
    return profiles_of(values, block, ARCH, max_batch, rooms)


def sizes(profile: Profile, name: str) -> tuple[int, ...]:
    """The least, the tuned and the largest first dimension of an input."""
    return tuple(shape[0] for shape in profile[name])


def test_a_profile_is_for_single_images_and_one_for_batches_tuned_for_the_largest() -> None:
    single, batch = profiles(BLOCK)
    assert single == {
        "x": ((198, 48),) * 3,
        "kept": ((1, 202),) * 3,
        "state": ((1,),) * 3,
        "numbers": ((198,),) * 3,
        "attention_rows": ((1,), (197,), (197,)),
        "attention_images": ((1,),) * 3,
        "attention_tokens": ((1,), (197,), (197,)),
        "mlp_rows": ((1,), (197,), (197,)),
    }
    assert batch == {
        "x": ((198, 48), (3153, 48), (3153, 48)),
        "kept": ((1, 202), (16, 202), (16, 202)),
        "state": ((1,), (16,), (16,)),
        "numbers": ((198,), (3153,), (3153,)),
        "attention_rows": ((1,), (3152,), (3152,)),
        "attention_images": ((1,), (16,), (16,)),
        "attention_tokens": ((1,), (197,), (197,)),
        "mlp_rows": ((1,), (3152,), (3152,)),
    }
    stem = profiles(IMAGES, block=None)
    assert [sizes(profile, "images") for profile in stem] == [(1, 1, 1), (1, 16, 16)]


def test_a_set_for_single_images_has_one_profile() -> None:
    assert profiles(BLOCK, max_batch=1) == profiles(BLOCK)[:1]


def test_blocks_are_tuned_for_the_room_that_they_get() -> None:
    def rooms(batch: int) -> list[Room]:
        return [Room(9, 9, 9, 9), Room(100 * batch, max(1, batch // 2), 120, 150 * batch)]

    single, batch = profiles(BLOCK, rooms=rooms)
    assert [sizes(single, name) for name in BLOCK][4:] == [(1, 100, 197), (1, 1, 1), (1, 120, 197), (1, 150, 197)]
    assert [sizes(batch, name) for name in BLOCK][4:] == [
        (1, 1600, 3152), (1, 8, 16), (1, 120, 197), (1, 2400, 3152),
    ]  # fmt: skip
    assert profiles(IMAGES, block=None, rooms=rooms) == profiles(IMAGES, block=None)


@given(st.integers(1, 64), st.data())
def test_every_room_that_a_batch_can_take_is_within_a_profile(max_batch: int, data: st.DataObject) -> None:
    images = data.draw(st.integers(1, max_batch))
    tuned = Room(*data.draw(st.tuples(*[st.integers(1, 20000)] * 4)))
    running = data.draw(st.integers(0, images))
    rows, longest = running * data.draw(st.integers(1, TOKENS)), data.draw(st.integers(1, TOKENS))
    wanted = {
        "state": images, "numbers": images * TOKENS + 1, "attention_rows": max(1, rows),
        "attention_images": max(1, running), "attention_tokens": longest, "mlp_rows": max(1, rows),
    }  # fmt: skip
    found = profiles(BLOCK, max_batch, rooms=lambda _: [tuned] * 2)
    chosen = found[0] if images == 1 else found[-1]
    for name, size in wanted.items():
        least, middle, most = sizes(chosen, name)
        assert least <= size <= most and least <= middle <= most, name


def test_the_graphs_of_a_bundle_have_no_other_dimensions(tiny_bundle: Path) -> None:
    graphs = Graphs(Bundle.open(tiny_bundle))
    for key in (STEM_GRAPH, GraphKey("block", 1), GraphKey("block", 1, "mlp"), GraphKey("dense")):
        graph = read_graph(graphs, key)
        constants = constants_of(graphs, key, graph)
        inputs = [value for value in graph.inputs if value.name not in constants]
        assert len(profiles_of(inputs, key.block, graphs.architecture, 4)) == 2


def test_an_unknown_dimension_is_named() -> None:
    with pytest.raises(ValueError, match="a graph has a dimension 'Z'"):
        profiles(dict(x=("Z", 4)))
