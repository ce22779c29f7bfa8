"""The blocks of an fp32 bundle in OpenVINO: one model for all blocks of a kind, which takes their weights as inputs.

A model for every block costs much beside what it computes: each has kernels and memory of its own, which are no longer
in the cache when its block's turn comes, and prepares itself for every number of tokens. Where bf16 is computed in, the
weights are kept in it, so that half as much is read.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import openvino

from adavit.bundle.bundle import Bundle, EngineSpec, TensorSpec
from adavit.runtime.backend import Constants, Engine, Options, Sizes
from adavit.runtime.backends.openvino_block_engine import BlockModels, OpenVinoBlockEngine
from adavit.runtime.backends.openvino_buffers import as_rows, from_bfloat16, rounded, to_bfloat16
from adavit.runtime.backends.openvino_engine import OpenVinoEngine
from adavit.runtime.backends.openvino_models import block_model, decide_model, names_of
from adavit.runtime.plan import sublayers_of
from adavit.runtime.weights import attention_weights, block_weights, check_deciding, engine_weights, mlp_weights

__all__ = ["Blocks"]

Array = npt.NDArray[Any]
Compile = Callable[[Any, bool], Any]

PREPARED = 40
"""Models that whole blocks are compiled to at most, for frequent sizes: 6 MB and 50 ms each."""
OFTEN = 1 / 16
"""How often an image has to have them."""
TOKEN_SELECT = "attn.token_select.mlp_head"


class ByHead(NamedTuple):
    """Weights of which a model takes the shares of the kept heads.

    Attributes:
        spec: what is taken, for h heads or their c channels, as "c" or with the bias as "c+2".
        array: the weights of all heads, [H, ...].
        bias: the last two rows of what is taken, or None.
    """

    spec: TensorSpec
    array: Array
    bias: Array | None = None

    def fill(self, heads: npt.NDArray[Any], into: Array) -> None:
        """Takes the shares of heads [h]."""
        if self.bias is not None:
            into[-2:] = self.bias
            into = into[:-2]
        self.array.take(heads, 0, out=into.reshape(len(heads), *self.array.shape[1:]), mode="clip")

    def of(self, heads: npt.NDArray[Any]) -> Array:
        """The shares of heads [h], a copy."""
        into = np.empty(self.spec.of_heads(len(heads), self.array.shape[1]), self.array.dtype)
        self.fill(heads, into)
        return into


class Weights(NamedTuple):
    """What a sub-layer's model takes of one block.

    Attributes:
        by_head: what is taken for chosen heads.
        fixed: the others, by name.
    """

    by_head: tuple[ByHead, ...]
    fixed: dict[str, Array]


class Blocks:
    """Engines of the blocks of an fp32 bundle.

    Args:
        bundle: where their weights are.
        compile_model: compiles a model, in float32 if the second argument says so.
        bf16: whether to compute in it; decisions are in float32 in any case.
        options: the threads that compile, and the workers, each of which has a copy of what is compiled.
    """

    def __init__(self, bundle: Bundle, compile_model: Compile, bf16: bool, options: Options) -> None:
        self._bundle, self._compile, self._bf16, self._options = bundle, compile_model, bf16, options
        self._deciding: dict[int, Any] = {}
        self._whole: dict[tuple[str, int | None], BlockModels] = {}
        self._weights: dict[tuple[int, str], Weights] = {}
        self._all_heads: dict[tuple[int, str], dict[str, Array]] = {}

    def load(self, name: str) -> Engine:
        """The engine of this name, "blocks.i." and "decide", or "attention_weights" or "mlp_weights".

        Raises:
            BundleError: its file is not what was exported, or lacks weights, or has them in other shapes.
        """
        spec = self._bundle.engine(name)
        number, part = name.split(".")[1:]
        block = int(number)
        if part != "decide":
            weights = self._weigh(block, part.removesuffix("_weights"))
            return TakingEngine(replace(spec, outputs=tuple(share.spec for share in weights.by_head)), weights)
        arch = self._bundle.architecture
        choices = arch.choices(block)
        if choices not in self._deciding:
            self._deciding[choices] = self._compile(decide_model(arch, choices), True)
        model, fixed = self._deciding[choices], self._weigh(block, part).fixed
        return OpenVinoEngine(spec, model, [fixed[key] for key in names_of(model.inputs) if key in fixed])

    def whole(self, name: str, _: Constants) -> OpenVinoBlockEngine:
        """The engine of a whole block, "blocks.i." and its kind, which is given its heads' weights with each run.

        Raises:
            BundleError: as `load`.
        """
        arch = self._bundle.architecture
        number, part = name.split(".")[1:]
        block, kind = int(number), part.removesuffix("_set")
        sublayers = sublayers_of(kind)
        deciding = block + bool(sublayers)
        fixed = dict(self._weigh(deciding, "decide" if deciding < arch.depth else "head").fixed)
        given: list[str] = []
        for sublayer in sublayers:
            weights = self._weigh(block, sublayer)
            fixed |= weights.fixed
            given += ["heads"] * (sublayer == "mlp") + [share.spec.name for share in weights.by_head]
            if not arch.adapts_heads(block):
                fixed |= self._of_all_heads(block, sublayer)
        given = [key for key in given if key not in fixed]
        return OpenVinoBlockEngine(name, self._whole_models(kind, deciding), arch.heads, fixed, given)

    def _of_all_heads(self, block: int, sublayer: str) -> dict[str, Array]:
        """What a sub-layer is given where all heads are kept, taken once."""
        found = self._all_heads.get((block, sublayer))
        if found is None:
            heads = np.arange(self._bundle.architecture.heads)
            shares = {share.spec.name: share.of(heads) for share in self._weigh(block, sublayer).by_head}
            found = self._all_heads[block, sublayer] = {"heads": heads} | shares
        return found

    def _whole_models(self, kind: str, deciding: int) -> BlockModels:
        """The models of a block as a whole that decides for another one, the same where that decides on as much."""
        arch = self._bundle.architecture
        choices = arch.choices(deciding) if deciding < arch.depth else None
        found = self._whole.get((kind, choices))
        if found is None:
            make = partial(block_model, arch, kind, self._type, choices)
            found = BlockModels(arch.head_width, make, lambda model: self._compile(model, kind == "decide"))
            self._whole[kind, choices] = found
        return found

    def prepare(self, used: Mapping[Sizes, float]) -> Mapping[Sizes, float]:
        """Compiles whole blocks for the sizes that come most often. See `Backend.prepare`."""
        arch, times = self._bundle.architecture, defaultdict[tuple[BlockModels, int, int], float](float)
        named: dict[tuple[BlockModels, int, int], Sizes] = {}
        for sizes, often in used.items():
            rows = rounded(sizes.tokens, arch.tokens) if arch.token_policy else 0
            key = self._whole_models(sizes.kind, sizes.block + 1), rows, sizes.heads
            times[key] += often
            named.setdefault(key, sizes)
        frequent = [key for key in sorted(times, key=times.__getitem__, reverse=True) if times[key] >= OFTEN]
        wanted = frequent[: PREPARED // self._options.workers]
        prepared: dict[BlockModels, dict[tuple[int, int], Any]] = {models: {} for models in self._whole.values()}

        def prepare(models: BlockModels, rows: int, heads: int) -> None:
            prepared[models][rows, heads] = models.prepared.get((rows, heads)) or models.prepare(rows, heads)

        with ThreadPoolExecutor(self._options.threads, "adavit-compile") as pool:
            list(pool.map(prepare, *zip(*wanted, strict=True)))
        for models, found in prepared.items():
            models.prepared = found
        return {named[key]: times[key] for key in wanted}

    def _weigh(self, block: int, part: str) -> Weights:
        """The weights of a block's part, read once."""
        found = self._weights.get((block, part))
        if found is None:
            weigh: Callable[[int], Weights] = getattr(self, f"_weigh_{part}")
            found = self._weights[block, part] = weigh(block)
        return found

    def _weigh_decide(self, block: int) -> Weights:
        arch = self._bundle.architecture
        width, choices = arch.width, arch.choices(block)
        shapes: dict[str, tuple[int, ...]] = {"norm1.weight": (width,), "norm1.bias": (width,)}
        if arch.token_policy:
            shapes |= {f"{TOKEN_SELECT}.weight": (1, width), f"{TOKEN_SELECT}.bias": (1,)}
        if choices:
            shapes |= {"choices.weight": (width, choices), "choices.bias": (choices,)}
        check_deciding(self._bundle, f"blocks.{block}.decide")
        found = block_weights(self._bundle, block, "decide", shapes)
        fixed = {name: found[name].copy() for name in ("norm1.weight", "norm1.bias")}
        if arch.token_policy:
            vector = found[f"{TOKEN_SELECT}.weight"].astype(np.float64)
            offset = found[f"{TOKEN_SELECT}.bias"] + vector @ fixed["norm1.bias"]
            folded = {"token_select.weight": vector * fixed["norm1.weight"], "token_select.bias": offset}
            fixed |= {name: value.astype(np.float32) for name, value in folded.items()}
        if choices:
            fixed["choices.weight"] = np.array(found["choices.weight"].T, order="C")
            fixed["choices.bias"] = found["choices.bias"].copy()
        return Weights((), fixed)

    def _weigh_head(self, _: int) -> Weights:
        arch = self._bundle.architecture
        shapes: dict[str, tuple[int, ...]] = {"norm.weight": (arch.width,), "norm.bias": (arch.width,)}
        shapes |= {"head.weight": (arch.width, arch.classes), "head.bias": (arch.classes,)}
        found = engine_weights(self._bundle, "head", "", shapes)
        fixed = {name: value.copy() for name, value in found.items()}
        return Weights((), fixed | {"head.weight": self._matrix(found["head.weight"].T)})

    def _weigh_attention(self, block: int) -> Weights:
        arch = self._bundle.architecture
        heads, d, width = arch.heads, arch.head_width, arch.width
        found = attention_weights(self._bundle, block)
        matrices = [found[f"attn.{part}.weight"].T.reshape(heads, d, width) for part in ("query", "key", "value")]
        qkv = self._matrix(np.concatenate(matrices, 1))
        by_head = [ByHead(TensorSpec("qkv", self._dtype, ("h", 3 * d, width)), qkv)]
        if arch.qkv_bias:
            query, value = (found[f"attn.{part}.bias"].reshape(heads, d) for part in ("query", "value"))
            bias = np.concatenate([query, np.zeros_like(query), value], 1)[..., None]
            by_head.append(ByHead(TensorSpec("qkv_bias", "float32", ("h", 3 * d, 1)), bias))
        projection = self._matrix(found["attn.proj.weight"].reshape(heads, d, width))
        by_head.append(ByHead(TensorSpec("proj", self._dtype, ("c", width)), projection))
        norm = self._weigh(block, "decide").fixed
        fixed = {name: norm[name] for name in ("norm1.weight", "norm1.bias")}
        return Weights(tuple(by_head), fixed | {"attn.proj.bias": found["attn.proj.bias"].copy()})

    def _weigh_mlp(self, block: int) -> Weights:
        arch = self._bundle.architecture
        found = mlp_weights(self._bundle, block)
        first = self._matrix(found["mlp.fc1.weight"].reshape(arch.heads, arch.head_width, arch.hidden))
        rest = found["mlp.fc1.bias"].copy()
        rounded = from_bfloat16(to_bfloat16(rest)) if self._bf16 else rest
        bias = self._matrix(np.stack([rounded, rest - rounded]))
        by_head = ByHead(TensorSpec("fc1", self._dtype, ("c+2", arch.hidden)), first, bias)
        fixed = {name: found[name].copy() for name in ("norm2.weight", "norm2.bias", "mlp.fc2.bias")}
        fixed["mlp.fc2.weight"] = self._matrix(found["mlp.fc2.weight"].T)
        return Weights((by_head,), fixed)

    @property
    def _type(self) -> Any:
        return openvino.Type.bf16 if self._bf16 else openvino.Type.f32

    @property
    def _dtype(self) -> str:
        return "bfloat16" if self._bf16 else "float32"

    def _matrix(self, weights: Array) -> Array:
        """Weights in the type that is computed in; a copy."""
        return to_bfloat16(weights) if self._bf16 else np.array(weights, order="C")


class TakingEngine:
    """Copies the shares of chosen heads from a block's weights.

    Args:
        spec: what it takes and fills.
        weights: the block's.
    """

    def __init__(self, spec: EngineSpec, weights: Weights) -> None:
        self.spec = spec
        self._by_head = weights.by_head

    def run(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
        """See `Engine.run`."""
        heads = as_rows(inputs[0]).array
        for share, rows in zip(self._by_head, outputs, strict=True):
            share.fill(heads, rows.array)
