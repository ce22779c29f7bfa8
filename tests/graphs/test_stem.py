"""The T2T stem, restructured, on pictures that are hard on it: normalisation divides flat patches by almost nothing."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import GOLDEN, golden

import adavit
from adavit.model.checkpoint import load_checkpoint

NOISE = golden("t2t_small")[0][:1]
SIDE = NOISE.shape[-1]
PICTURES = {
    "noise": NOISE,
    "white": np.full_like(NOISE, 2.64),
    "half white": np.where(np.arange(SIDE) < SIDE // 2, np.float32(2.64), NOISE),
    "offset": NOISE / 20 + 5,
    "little noise": NOISE / 1000 + np.float32(2.4),
    "squares": np.round(NOISE[..., ::16, ::16]).repeat(16, 2).repeat(16, 3),
    "one colour": np.broadcast_to(np.array([2.2, -1.8, 0.3], np.float32)[:, None, None], NOISE.shape).copy(),
}


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("name", PICTURES)
def test_hard_pictures(name: str, backend: str, golden_bundles: Callable[[str], Path]) -> None:
    provider = "fp32" if backend == "openvino" else None
    runtime = adavit.load(golden_bundles("t2t_small"), backend, threads=1, provider=provider)
    exact = load_checkpoint(GOLDEN / "t2t_small.safetensors").double()
    slot = runtime.backend.slot(1)
    slot.stem(PICTURES[name])
    with torch.inference_mode():
        wanted = (exact.tokens_to_token(torch.from_numpy(PICTURES[name]).double()) + exact.pos_embed[:, 1:])[0]
    np.testing.assert_allclose(slot.tokens()[1:], wanted.numpy(), atol=3e-5)
