"""Batch graphs in ONNX Runtime on the CPU, driven in the plainest way: what any device has to compute."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnxruntime

from adavit.architecture import TOKEN_LOGIT, Architecture
from adavit.bundle.bundle import Bundle
from adavit.bundle.graph_keys import STEM_GRAPH, GraphKey, constants_of, read_graph
from adavit.bundle.graphs import Graphs
from adavit.runtime import Policy, Runtime
from adavit.runtime.backend import Options
from adavit.runtime.backends.onnxruntime.backend import HIDING_INT8
from adavit.runtime.backends.onnxruntime.batch import OnnxRuntimeBatchBackend

Array = np.ndarray
Rooms = Callable[[int, Array], Sequence[int]]
"""The sizes T, A, K, U that a block is given, from its position and what the graph before asks for."""
ROOM = ("attention_rows", "attention_images", "attention_tokens", "mlp_rows")


def fitting(block: int, sizes: Array) -> list[int]:
    """The sizes that a block asks for."""
    return [max(1, int(size)) for size in sizes]


def all_of(arch: Architecture, batch: int) -> Rooms:
    """Room for whatever the images keep."""
    rows = batch * arch.tokens
    return lambda block, sizes: (rows, batch, arch.tokens, rows)


class Outcome(NamedTuple):
    """What a batch left.

    Attributes:
        logits: [B, C].
        policy: what the images kept, or what was followed.
        states: in front of each block and behind the last, [L + 1, B].
        sizes: what each block asks for, [L, 4].
        decisions: the logits of each block's decisions [B, M'], where it has any.
        tokens: behind the last block, [B, N, D].
    """

    logits: Array
    policy: Policy
    states: Array
    sizes: Array
    decisions: list[Array | None]
    tokens: Array


def sizes_of(policy: Policy, block: int, goes_on: Array) -> Array:
    """T, A, K, U of a block, int64 [4], for the images that go on."""
    runs = policy.sublayers[:, block] & goes_on[:, None]
    each = policy.tokens[:, block].sum(1)[:, None] * runs
    return np.array([each[:, 0].sum(), runs[:, 0].sum(), each[:, 0].max(), each[:, 1].sum()])


def limits_of(arch: Architecture, batch: int) -> Array:
    """What decisions have to exceed as trained, [L, B, 3]."""
    return np.tile(np.array([TOKEN_LOGIT, 0, 0], np.float32), (arch.depth, batch, 1))


@dataclass
class BatchReference:
    """Runs a bundle's batch graphs.

    Attributes:
        graphs: of a precision.
        heads: those that the graph of a block has, by its position; all where it is not named.
        in_parts: whether attention, MLP and decisions of a block run one by one; what no image runs is left out then.
    """

    graphs: Graphs
    heads: Mapping[int, tuple[int, ...]]
    in_parts: bool = False

    def __post_init__(self) -> None:
        self._sessions: dict[GraphKey, Any] = {}
        self.ran: list[str] = []
        """The names of the graphs that the last batch ran."""

    def run(
        self, images: Array, rooms: Rooms = fitting, replay: Policy | None = None, limits: Array | None = None
    ) -> Outcome:
        """Runs images [B, 3, S, S].

        Args:
            images: normalised pixels.
            rooms: the sizes of each block.
            replay: a policy to follow.
            limits: what decisions have to exceed, [L, B, 3].
        """
        arch, batch = self.graphs.architecture, len(images)
        limits = limits_of(arch, batch) if limits is None else limits
        numbers, self.ran = np.arange(batch * arch.tokens + 1), []
        made = self._run(STEM_GRAPH, {"images": images, "limits": limits[0]})
        kept, states, sizes, decisions = [], [], [], []
        for block in range(arch.depth):
            kept.append(made["next_kept"])
            states.append(made["next_state"])
            decisions.append(made.get("next_decisions"))
            asked = made["next_sizes"]
            if replay is not None:
                kept[-1] = np.concatenate([mask[:, block] for mask in replay.masks()], 1)
                asked = sizes_of(replay, block, states[-1] == 0)
            sizes.append(asked)
            given = {"x": made["y"], "kept": kept[-1], "state": states[-1], "numbers": numbers}
            given |= {name: numbers[:size] for name, size in zip(ROOM, rooms(block, asked), strict=True)}
            if block + 1 < arch.depth:
                given["limits"] = limits[block + 1]
            made = self._parts(block, given, asked) if self.in_parts else self._run(GraphKey("block", block), given)
        ends = arch.tokens, arch.tokens + arch.heads
        policy = Policy(*np.split(np.stack(kept, 1), ends, 2)) if replay is None else replay
        tokens = made["y"][:-1].reshape(batch, arch.tokens, arch.width)
        states.append(made["next_state"])
        return Outcome(made["logits"], policy, np.stack(states), np.stack(sizes), decisions, tokens)

    def _parts(self, block: int, given: dict[str, Array], sizes: Array) -> dict[str, Array]:
        """A block in parts: attention and MLP where an image runs them, then the decisions."""
        x, state = given["x"], given["state"]
        if sizes[1]:
            x, state = self._run(GraphKey("block", block, "attention"), given).values()
        if sizes[3]:
            x, state = self._run(
                GraphKey("block", block, "mlp"), {**given, "x_between": x, "state_between": state}
            ).values()
        made = {"y": x, "state_behind": state, "next_state": state}
        return made | self._run(GraphKey("block", block, "decisions"), {**given, **made})

    def _run(self, key: GraphKey, given: Mapping[str, Array]) -> dict[str, Array]:
        """Runs a graph on those of the values that it takes."""
        if key not in self._sessions:
            self._sessions[key] = self._session(key)
        session = self._sessions[key]
        self.ran.append(key.name)
        names = [value.name for value in session.get_outputs()]
        found = session.run(names, {value.name: given[value.name] for value in session.get_inputs()})
        return dict(zip(names, found, strict=True))

    def _session(self, key: GraphKey) -> Any:
        graph = read_graph(self.graphs, key)
        heads = None if key.block is None else self.heads.get(key.block)
        options = onnxruntime.SessionOptions()
        options.log_severity_level, options.intra_op_num_threads = 3, 1
        data = graph.model(constants_of(self.graphs, key, graph, heads))
        return onnxruntime.InferenceSession(
            data, options, providers=["CPUExecutionProvider"], disabled_optimizers=HIDING_INT8
        )


def batches_on_cpu(bundle: Path, way: str = "exact", heads: Any = None, most: int = 32) -> Runtime:
    """A runtime whose batches run as on a device, one of at most so many images after the other."""
    opened, options = Bundle.open(bundle), Options(1, dispatch=way)
    graphs = Graphs(opened)
    backend = OnnxRuntimeBatchBackend(graphs, options, heads, most)
    return Runtime(opened, graphs, backend, options, specialise=False)
