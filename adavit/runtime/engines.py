"""The engines of a bundle, loaded and by their part in a block."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

from adavit.errors import BundleError
from adavit.runtime.backend import Backend, Engine
from adavit.runtime.bundle import Bundle
from adavit.runtime.plan import SUBLAYERS

__all__ = ["Engines"]


@dataclass(frozen=True)
class BlockEngines:
    """One block's engines; those that are given heads' weights are there where the block has a head policy."""

    decide: Engine
    attention: Engine
    mlp: Engine
    attention_gather: Engine | None = None
    mlp_gather: Engine | None = None


_ALWAYS = ("decide", "attention", "mlp")


class Engines:
    """All engines of a bundle but its dense twin, and those that a backend has for whole blocks.

    Attributes:
        stem, head: what runs before the blocks, and after them.
        blocks: each block's engines; none where the backend always gathers, since it runs whole blocks.
        weights: for each block, by sub-layer, what gathers the weights of heads; none where there is no head policy.
        empty: what attention and MLP of every block add without a head, each [L, D].
    """

    def __init__(self, bundle: Bundle, backend: Backend) -> None:
        arch = bundle.architecture
        for index in range(arch.depth):
            _require_fit(bundle, index)

        def block(index: int) -> BlockEngines:
            kinds = [field.name for field in fields(BlockEngines)] if arch.adapts_heads(index) else _ALWAYS
            return BlockEngines(**{kind: backend.load(f"blocks.{index}.{kind}") for kind in kinds})

        def weights(index: int) -> Mapping[str, Engine]:
            kinds = SUBLAYERS if arch.adapts_heads(index) else ()
            return {kind: backend.load(f"blocks.{index}.{kind}_weights") for kind in kinds}

        self.stem, self.head = backend.load("stem"), backend.load("head")
        self.blocks = [] if backend.always_gathers else [block(index) for index in range(arch.depth)]
        self.weights = [weights(index) for index in range(arch.depth)]
        self.empty = backend.buffer((arch.depth, arch.width)), backend.buffer((arch.depth, arch.width))
        if arch.head_policy:
            backend.load("empty").run([], [vectors.rows(arch.depth) for vectors in self.empty])


def _require_fit(bundle: Bundle, block: int) -> None:
    """Raises BundleError where a block's engines take or make other numbers of tensors than the dispatcher gives."""
    arch, name = bundle.architecture, f"blocks.{block}."
    adapts = arch.adapts_heads(block)
    wanted = {
        "decide": (1, 1 + arch.token_policy + (arch.choices(block) > 0)),
        "attention": (2 + adapts, 1),
        "mlp": (1 + adapts, 1),
    }
    if adapts:
        weights = {kind: len(bundle.engine(f"{name}{kind}_weights").outputs) for kind in SUBLAYERS}
        wanted |= {"attention_gather": (2 + weights["attention"], 1), "mlp_gather": (2 + weights["mlp"], 1)}
        wanted |= {f"{kind}_weights": (1, count) for kind, count in weights.items()}
    for kind, counts in wanted.items():
        spec = bundle.engine(f"{name}{kind}")
        if (found := (len(spec.inputs), len(spec.outputs))) != counts:
            raise BundleError(
                f"{bundle.path}: engine {name}{kind} has {found[0]} inputs and {found[1]} outputs, the architecture "
                f"asks for {counts[0]} and {counts[1]}; export again"
            )
