"""What a single file computes of budgets and policies: the limits of decisions, and MACs."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from onnx import TensorProto

from adavit.architecture import TOKEN_LOGIT, Architecture
from adavit.bundle.operating_points import Budgets
from adavit.graphs.nested import NestedBuilder
from adavit.macs import outside_macs

__all__ = ["add_limits", "add_macs", "limits_of"]


def add_limits(graph: NestedBuilder, arch: Architecture, budgets: Budgets, budget: str) -> str:
    """Adds what decision logits have to exceed, for budgets [B]: those of `limits_of`, one after the other, [B, M].

    As `Budgets.offsets` does it, in float64: a straight line between neighbours. Budgets beyond the points are
    clamped. What is not above 0 is the trained policy.
    """
    table = np.array([np.concatenate(point.offsets.by_block(arch.depth)) for point in budgets.points], np.float64)
    shares = np.array([np.float32(point.budget) for point in budgets.points], np.float64)
    places = graph.double("budgets", shares)
    offsets = graph.double("budgets.offsets", table)
    asked = graph.op("Cast", budget, to=TensorProto.DOUBLE)
    ends = (graph.double(f"budgets.{name}", shares[at]) for name, at in (("least", 0), ("most", -1)))
    inside = graph.op("Clip", asked, *ends)
    column = graph.op("Unsqueeze", inside, graph.ints(1))
    below = graph.op("Cast", graph.op("Less", places, column), to=TensorProto.INT64)  # [B, P]
    high = graph.op("ReduceSum", below, graph.ints(1), keepdims=0)  # [B]
    before = graph.op("Sub", high, graph.scalar(1, "int64"))
    low = graph.op("Max", before, graph.scalar(0, "int64"))
    start, end = (graph.op("Gather", places, place) for place in (low, high))
    # Where both are the first point, the way is 0: the least one keeps the share a number.
    way = graph.op("Max", graph.op("Sub", end, start), graph.double("least_way", 1e-9))
    share = graph.op("Unsqueeze", graph.op("Div", graph.op("Sub", inside, start), way), graph.ints(1))
    first, second = (graph.op("Gather", offsets, place) for place in (low, high))
    one = graph.double("whole", 1.0)
    line = graph.op("Add", graph.op("Mul", graph.op("Sub", one, share), first), graph.op("Mul", share, second))
    line = graph.op("Where", graph.op("Equal", first, second), first, line)  # rounding would turn back what stays
    trained = graph.op("Unsqueeze", graph.op("Greater", budget, graph.scalar(0.0)), graph.ints(1))
    line = graph.op("Where", trained, line, graph.double("trained", 0.0))
    bounds = graph.double("bounds", np.repeat([TOKEN_LOGIT, 0.0, 0.0], arch.depth))
    limits = graph.op("Cast", graph.op("Sub", bounds, line), to=TensorProto.FLOAT)  # [B, 3 L]
    columns = np.arange(3 * arch.depth).reshape(3, arch.depth).astype(np.float32)
    order = np.concatenate([part for block in limits_of(arch, columns) for part in block]).astype(np.int64)
    return graph.op("Gather", limits, graph.constant("limits.order", order), axis=1)


def limits_of(arch: Architecture, values: npt.NDArray[np.float32]) -> list[list[npt.NDArray[np.float32]]]:
    """What the logits of each block's decisions have to exceed, as far as it has policies.

    Args:
        arch: the model's shapes.
        values: limits of tokens, heads and sub-layers by block, [3, L].

    Returns:
        for each block, that of tokens [1], and those of heads and sub-layers, one for each logit.
    """
    found = []
    for block, (tokens, heads, sublayers) in enumerate(values.T):
        sizes = arch.heads * arch.adapts_heads(block), 2 * arch.adapts_sublayers(block)
        parts = np.repeat(tokens, arch.token_policy), np.repeat([heads, sublayers], sizes)
        found.append([part.astype(np.float32) for part in parts if len(part)])
    return found


def add_macs(graph: NestedBuilder, arch: Architecture, tokens: str, heads: str, sublayers: str) -> str:
    """Adds the MACs int64 [] of an image's masks [L, N], [L, H] and [L, 2]; see `adavit.macs`."""

    def number(value: int) -> str:
        return graph.scalar(value, "int64")

    def count(mask: str) -> str:
        return graph.op("ReduceSum", graph.op("Cast", mask, to=TensorProto.INT64), graph.ints(1), keepdims=0)

    kept, channels = count(tokens), graph.op("Mul", count(heads), number(arch.head_width))
    runs = graph.op("Cast", sublayers, to=TensorProto.INT64)
    attention, mlp = (graph.op("Gather", runs, number(place), axis=1) for place in (0, 1))
    width = graph.op("Add", graph.op("Mul", kept, number(2)), number(4 * arch.width))
    of_attention = graph.op("Mul", graph.op("Mul", kept, channels), width)
    any_head = graph.op("Cast", graph.op("Greater", channels, number(0)), to=TensorProto.INT64)
    of_mlp = graph.op("Mul", graph.op("Mul", kept, any_head), number(arch.hidden))
    of_mlp = graph.op("Mul", of_mlp, graph.op("Add", channels, number(arch.width)))
    both = graph.op("Add", graph.op("Mul", attention, of_attention), graph.op("Mul", mlp, of_mlp))
    return graph.op("Add", graph.op("ReduceSum", both, keepdims=0), number(outside_macs(arch)))
