"""What a policy drops is not computed: watched through a backend that notes every engine's run."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cases import WIDE, random_images

from adavit.runtime import Policy, Runtime
from adavit.runtime.backend import Backend, Engine, Options, create_backend
from adavit.bundle.bundle import Bundle

IMAGES = random_images(WIDE, 1)


class Watched:
    """An engine that notes how many rows of tokens it is given."""

    def __init__(self, engine: Engine, rows: list[int]) -> None:
        self.engine = engine
        self.rows = rows

    def run(self, inputs: Sequence[Any], *outputs: Any) -> Any:
        self.rows.append(len(inputs[0].numpy()))
        return self.engine.run(inputs, *outputs)


class Watching:
    """ONNX Runtime, watched; one more backend behind the Protocol."""

    name = "watching"

    def __init__(self, bundle: Bundle, options: Options) -> None:
        self.bundle = bundle
        self.inner: Backend = create_backend("onnxruntime", bundle, options)
        self.sublayers: dict[int, list[int]] = defaultdict(list)
        """Rows given to the sub-layer engines of each block: those that take any number of tokens."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def load(self, name: str, alone: bool = False) -> Any:
        engine, spec = self.inner.load(name, alone), self.bundle.engines[name]
        takes_tokens = spec.inputs and len(spec.inputs[0].shape) == 2 and isinstance(spec.inputs[0].shape[0], str)
        if not (spec.name.startswith("blocks.") and takes_tokens):
            return engine
        return Watched(engine, self.sublayers[int(spec.name.split(".")[1])])


@pytest.fixture(scope="module")
def watched(wide: tuple[Path, Path]) -> Runtime:
    bundle, options = Bundle.open(wide[0]), Options(threads=1)
    return Runtime(bundle, Watching(bundle, options), options)


def rows(runtime: Runtime, policy: Policy) -> dict[int, list[int]]:
    backend: Any = runtime.backend
    for seen in backend.sublayers.values():
        seen.clear()
    runtime.run(IMAGES, policy=policy)
    return {block: list(seen) for block, seen in sorted(backend.sublayers.items())}


def test_everything_runs_when_everything_is_kept(watched: Runtime) -> None:
    found = rows(watched, Policy.dense(WIDE, 1))
    assert list(found) == [0, 1, 2]
    assert all(seen and set(seen) == {WIDE.tokens} for seen in found.values())


def test_dropped_tokens_are_not_computed(watched: Runtime) -> None:
    policy = Policy.dense(WIDE, 1)
    for block, kept in enumerate((30, 7, 1)):
        policy.tokens[0, block, kept:] = False
    assert [set(seen) for seen in rows(watched, policy).values()] == [{30}, {7}, {1}]


def test_skipped_sublayers_do_not_run(watched: Runtime) -> None:
    everything = rows(watched, Policy.dense(WIDE, 1))
    for skipped in ([0], [1], [0, 1]):
        policy = Policy.dense(WIDE, 1)
        policy.sublayers[0, 1, skipped] = False
        found = rows(watched, policy)
        assert (found[0], found[2]) == (everything[0], everything[2])
        assert len(found[1]) == (0 if len(skipped) == 2 else len(everything[1]) - 1)


def test_without_heads_no_engine_of_the_block_runs(watched: Runtime) -> None:
    policy = Policy.dense(WIDE, 1)
    policy.heads[0, 1] = False
    found = rows(watched, policy)
    assert found[1] == []
    assert found[2]


def test_each_image_of_a_batch_runs_what_it_keeps(watched: Runtime) -> None:
    backend: Any = watched.backend
    for seen in backend.sublayers.values():
        seen.clear()
    policy = Policy.dense(WIDE, 2)
    policy.tokens[0, :, 5:] = False
    policy.tokens[1, :, 9:] = False
    watched.run(np.repeat(IMAGES, 2, 0), policy=policy)
    assert all(set(seen) == {5, 9} for seen in backend.sublayers.values())
