"""Full-size models with random weights, whose policies use about what published and token-heavy ones do."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from adavit.architecture import Architecture

if TYPE_CHECKING:
    from adavit.model import AdaViT

ARCHITECTURES = {
    "t2t_vit_19": Architecture("t2t", 224, 16, 448, 19, 7, 1344, 1000, 1, False, True, True, True),
    "deit_small": Architecture("patch", 224, 16, 384, 12, 6, 1536, 1000, 1, True, True, True, True),
}
BIASES = {  # Added to the logits of heads, sub-layers and tokens.
    ("t2t_vit_19", "published"): (0.0, 0.55, 2.2),
    ("t2t_vit_19", "token-heavy"): (1.0, 1.2, 0.3),
    ("deit_small", "published"): (0.0, 0.35, 2.2),
    ("deit_small", "token-heavy"): (0.8, 1.0, 0.2),
}


def random_model(name: str, profile: str, seed: int) -> AdaViT:
    """A model of a published shape: unit-gain random weights, decision logits spread around the profile's biases."""
    import torch  # shapes and biases are wanted where there is none

    from adavit.model import AdaViT

    torch.manual_seed(seed)
    model = AdaViT(ARCHITECTURES[name]).eval().requires_grad_(False)
    head, sublayer, token = BIASES[name, profile]
    bias_of = {"head_select": head, "layer_select": sublayer, "token_select": token}
    for key, value in model.named_parameters():
        kind = next((kind for kind in bias_of if kind in key), None)
        if kind and key.endswith("bias"):
            value.copy_(bias_of[kind] + 0.3 * torch.randn_like(value))
        elif "norm" in key:
            value.copy_(key.endswith("weight") + 0.1 * torch.randn_like(value))
        elif key in ("cls_token", "pos_embed"):
            value.copy_(0.3 * torch.randn_like(value))
        elif value.dim() >= 2 and not key.endswith(".w"):
            gain = 0.5 if key.endswith(("attn.proj.weight", "fc2.weight")) else 1.0
            value.copy_(torch.randn_like(value) * gain / math.sqrt(value[0].numel()))
        elif key.endswith("bias"):
            value.copy_(0.1 * torch.randn_like(value))
    return model
