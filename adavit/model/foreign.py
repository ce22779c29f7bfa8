"""Tells weights of other vision models by their names, for messages that say what a file is."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from math import isqrt

from torch import Tensor

from adavit.errors import CheckpointError, shown

__all__ = ["refuse_foreign", "refuse_lacking"]

PLAIN = "use a plain ViT, such as timm's deit_small_patch16_224"
RENAME = "name its weights as timm does, or save the state_dict() of timm's model"
SCALE = "multiply the rows of attn.proj and mlp.fc2, weight and bias, by their gammas, and leave the gammas out"

FOREIGN = (
    # Other families come first: some of their models have the extras of ViTs too.
    (r"relative_position_bias_table|\.rel_pos_", "a Swin, BEiT or other model with relative positions", PLAIN),
    (r"(^|\.)stages\.\d|downsample_layers\.|conv_dw\.", "a ConvNeXt or another model in stages", PLAIN),
    (r"(^|\.)layer1\.0\.conv1\.", "a ResNet", PLAIN),
    (r"resblocks\.\d|(text|vision)_model\.", "a CLIP or SigLIP model", PLAIN),
    (r"(^|\.)attn_pool\.", "a ViT that pools its patches by attention, such as SigLIP's", PLAIN),
    (r"(^|\.)decoder_(blocks|embed|pos_embed)", "a masked autoencoder (MAE), without a classifier", PLAIN),
    (r"encoder_layer_\d+\.", "a ViT of torchvision", RENAME),
    (r"patch_embeddings\.|embeddings\.cls_token|attention\.attention\.", "a ViT of Hugging Face transformers", RENAME),
    # ViTs with more than AdaViT's backbone has.
    (r"(^|\.)(dist_token|head_dist\.)", "a distilled DeiT, with a second class token", PLAIN),
    (r"(^|\.)reg(ister)?_tokens?$", "a ViT with register tokens", PLAIN),
    (r"(^|\.)mask_token$", "a self-supervised ViT (mask_token), without a classifier", PLAIN),
    (r"(^|\.)fc_norm\.", "a ViT that classifies the mean of its patches (fc_norm)", PLAIN),
    (r"(^|\.)norm_pre\.", "a ViT with a norm before its blocks (norm_pre), as CLIP's has", PLAIN),
    (r"(^|\.)blocks\.\d+\.(ls\d\.gamma|gamma_\d)$", "a ViT with LayerScale", SCALE),
    (r"\.attn\.[qk]_norm\.", "a ViT that normalises queries and keys (q_norm)", PLAIN),
    (r"\.mlp\.(w12|fc1_g|gate_proj)\.", "a ViT with a gated MLP (SwiGLU)", PLAIN),
    (r"(^|\.)patch_embed\.backbone\.", "a hybrid ViT, with a convolutional stem", PLAIN),
    (r"(^|\.)pre_logits\.", "a ViT with a layer before its classifier (pre_logits)", PLAIN),
)
"""A regular expression for a name that no AdaViT has, what a model with such a name is, and what to do."""

VIT = ("pos_embed", "blocks.0.norm1.weight")
"""Weights that every ViT has."""


def refuse_foreign(names: Iterable[str]) -> None:
    """Raises a CheckpointError where a name is one of another kind of model."""
    given = list(names)
    for pattern, what, remedy in FOREIGN:
        if found := next((name for name in given if re.search(pattern, name)), None):
            raise CheckpointError(f"this is {what}, which is not supported (it has {shown(found)}); {remedy}")


def refuse_lacking(state: Mapping[str, Tensor]) -> None:
    """Raises a CheckpointError where the weights are a ViT's, but lack its classifier or its class token.

    Args:
        state: weights by timm's names.
    """
    if any(name not in state for name in VIT):
        return
    if _is_of_patches(state["pos_embed"]):
        if "cls_token" not in state:
            raise CheckpointError(
                f"this is a ViT without a class token, which is not supported (no cls_token); {PLAIN}"
            )
        raise CheckpointError(
            f"pos_embed has {state['pos_embed'].shape[1]} tokens, none for the class token (timm's no_embed_class); "
            "put a row of zeros before them"
        )
    if not any(name.startswith("head.") for name in state):
        raise CheckpointError(
            "missing head.weight: this is a ViT without a classifier (timm's num_classes=0), which is not supported; "
            "save the model with its classifier"
        )


def _is_of_patches(positions: Tensor) -> bool:
    """Whether there is a position for each patch of a square, and none for a class token."""
    return positions.ndim == 3 and isqrt(positions.shape[1]) ** 2 == positions.shape[1]
