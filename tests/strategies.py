"""Architectures and biases of decisions for Hypothesis."""

from __future__ import annotations

from typing import Any

from cases import KEEP_ALL, tiny
from hypothesis import strategies as st

from adavit.architecture import Architecture


@st.composite
def architectures(draw: st.DrawFn) -> Architecture:
    def choice(*values: Any) -> Any:
        return draw(st.sampled_from(values))

    stem = choice("patch", "patch", "t2t")
    patch = 16 if stem == "t2t" else choice(4, 5, 8)
    heads = draw(st.integers(1, 12))
    policies = {f"{kind}_policy": draw(st.booleans()) for kind in ("token", "head", "sublayer")}
    depth = draw(st.integers(1, 4))
    # What no block has cannot be read from a checkpoint: keep is below the depth where something is adapted.
    adapts = policies["head_policy"] or policies["sublayer_policy"]
    return tiny(
        stem=stem,
        patch_size=patch,
        image_size=patch * choice(*((2, 3, 7) if stem == "t2t" else (1, 5, 7, 12))),
        width=heads * choice(5, 16, 20, 32, 64),
        heads=heads,
        depth=depth,
        hidden=draw(st.integers(8, 300)),
        classes=draw(st.integers(1, 12)),
        keep=draw(st.integers(0, depth - 1)) if adapts else 1,
        qkv_bias=draw(st.booleans()),
        **policies,
    )


BIASES = st.fixed_dictionaries(
    {
        kind: st.sampled_from([0.0, 0.0, 0.0, extreme, -extreme])
        for kind, extreme in (("tokens", KEEP_ALL), ("heads", KEEP_ALL), ("sublayers", KEEP_ALL))
    }
)
