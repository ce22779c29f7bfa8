"""Weights of other vision models are told by their names: the message says what they are, and what to do."""

from pathlib import Path

import pytest
import torch
from cases import invoke, random_model, refusal, tiny

from adavit.cli import export
from adavit.errors import CheckpointError
from adavit.model import load_checkpoint

NONE = dict.fromkeys(("token_policy", "head_policy", "sublayer_policy"), False)
State = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def vit() -> State:
    """A plain ViT with timm's names."""
    state = dict(random_model(tiny(**NONE, width=64, heads=1)).state_dict())
    for block in range(3):
        for kind in ("weight", "bias"):
            parts = [state.pop(f"blocks.{block}.attn.{part}.{kind}") for part in ("query", "key", "value")]
            state[f"blocks.{block}.attn.qkv.{kind}"] = torch.cat(parts)
    return state


def message(state: State, tmp_path: Path) -> str:
    torch.save(state, tmp_path / "model.pth")
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(tmp_path / "model.pth")
    assert str(caught.value).startswith(f"{tmp_path}/model.pth: ")
    assert "\n" not in str(caught.value)
    return str(caught.value)


EXTRAS = {
    "distilled DeiT": (["dist_token", "head_dist.weight"], "a distilled DeiT, with a second class token"),
    "global average pooling": (["fc_norm.weight"], "classifies the mean of its patches (fc_norm)"),
    "CLIP's norm": (["norm_pre.weight"], "a norm before its blocks (norm_pre)"),
    "LayerScale of timm": (["blocks.0.ls1.gamma"], "a ViT with LayerScale"),
    "LayerScale of DeiT III": (["blocks.0.gamma_1"], "multiply the rows of attn.proj and mlp.fc2"),
    "registers": (["reg_token", "blocks.0.ls1.gamma"], "a ViT with register tokens"),
    "DINOv2": (["mask_token", "blocks.0.ls1.gamma"], "a self-supervised ViT (mask_token)"),
    "MAE": (["mask_token", "decoder_embed.weight"], "a masked autoencoder (MAE)"),
    "q_norm": (["blocks.0.attn.q_norm.weight"], "normalises queries and keys (q_norm)"),
    "SwiGLU": (["blocks.0.mlp.w12.weight"], "a gated MLP (SwiGLU)"),
    "hybrid": (["patch_embed.backbone.stem.conv.weight"], "a hybrid ViT, with a convolutional stem"),
    "pre-logits": (["pre_logits.fc.weight"], "a layer before its classifier (pre_logits)"),
    "BEiT": (
        ["blocks.0.attn.relative_position_bias_table", "blocks.0.gamma_1"],
        "a Swin, BEiT or other model with rel",
    ),
    "SigLIP of timm": (["attn_pool.latent", "attn_pool.q.weight"], "pools its patches by attention, such as SigLIP's"),
}


@pytest.mark.parametrize("kind", EXTRAS)
@pytest.mark.parametrize("prefix", ["", "module."])
def test_vits_with_more_than_ours(kind: str, prefix: str, vit: State, tmp_path: Path) -> None:
    names, what = EXTRAS[kind]
    state = {prefix + name: value for name, value in {**vit, **dict.fromkeys(names, torch.ones(3))}.items()}
    found = message(state, tmp_path)
    assert what in found
    assert "which is not supported (it has '" in found
    assert "not a complete AdaViT" not in found


OTHERS = {
    "Hugging Face": (
        ["vit.embeddings.cls_token", "vit.embeddings.patch_embeddings.projection.weight", "classifier.weight",
         "vit.encoder.layer.0.attention.attention.query.weight"],
        "a ViT of Hugging Face transformers",
    ),
    "Hugging Face without its classifier": (
        ["embeddings.cls_token", "encoder.layer.0.attention.attention.query.weight"],
        "name its weights as timm does, or save the state_dict() of timm's model",
    ),
    "torchvision": (
        ["class_token", "conv_proj.weight", "encoder.pos_embedding",
         "encoder.layers.encoder_layer_0.self_attention.in_proj_weight", "heads.head.weight"],
        "a ViT of torchvision",
    ),
    "Swin of timm": (
        ["patch_embed.proj.weight", "layers.0.blocks.0.attn.relative_position_bias_table", "head.fc.weight"],
        "a Swin, BEiT or other model with relative positions",
    ),
    "ConvNeXt of timm": (["stem.0.weight", "stages.0.blocks.0.conv_dw.weight"], "a ConvNeXt or another model"),
    "ConvNeXt": (["downsample_layers.0.0.weight", "stages.0.0.dwconv.weight"], "a ConvNeXt or another model in stages"),
    "CLIP": (["logit_scale", "visual.transformer.resblocks.0.ln_1.weight"], "a CLIP or SigLIP model"),
    "CLIP of Hugging Face": (
        ["vision_model.embeddings.class_embedding", "vision_model.encoder.layers.0.mlp.fc1.weight"],
        "a CLIP or SigLIP model",
    ),
    "ResNet": (["conv1.weight", "layer1.0.conv1.weight", "fc.weight"], "a ResNet"),
}  # fmt: skip


@pytest.mark.parametrize("kind", OTHERS)
def test_other_models(kind: str, tmp_path: Path) -> None:
    names, what = OTHERS[kind]
    found = message(dict.fromkeys(names, torch.ones(3)), tmp_path)
    assert what in found
    assert "missing" not in found


def test_whole_numbers_beside_foreign_weights_do_not_come_first(tmp_path: Path) -> None:
    names = "layers.0.blocks.0.attn.relative_position_"
    state = {f"{names}index": torch.zeros(4, dtype=torch.int64), f"{names}bias_table": torch.ones(3)}
    assert "a Swin, BEiT or other model" in message(state, tmp_path)


def test_what_a_vit_may_lack(vit: State, tmp_path: Path) -> None:
    headless = {name: value for name, value in vit.items() if not name.startswith("head.")}
    assert "missing head.weight: this is a ViT without a classifier (timm's num_classes=0)" in message(
        headless, tmp_path
    )
    pooled = {**vit, "pos_embed": vit["pos_embed"][:, 1:]}
    found = message(pooled, tmp_path)
    assert "pos_embed has 16 tokens, none for the class token (timm's no_embed_class); put a row of zeros" in found
    del pooled["cls_token"]
    assert "this is a ViT without a class token" in message(pooled, tmp_path)


def test_what_the_messages_advise_works(vit: State, tmp_path: Path) -> None:
    """A row of zeros for the class token, and gammas multiplied into the rows of the layers before them."""
    generator = torch.Generator().manual_seed(1)
    gammas = {
        f"blocks.{block}.{layer}": torch.rand(64, generator=generator)
        for block in range(3)
        for layer in ("attn.proj", "mlp.fc2")
    }
    state = {**vit, "pos_embed": torch.cat([torch.zeros(1, 1, 64), vit["pos_embed"][:, 1:]], 1)}
    for layer, gamma in gammas.items():
        state |= {
            f"{layer}.weight": state[f"{layer}.weight"] * gamma[:, None],
            f"{layer}.bias": state[f"{layer}.bias"] * gamma,
        }
    torch.save(vit, tmp_path / "plain.pth")
    torch.save(state, tmp_path / "folded.pth")
    plain, folded = load_checkpoint(tmp_path / "plain.pth"), load_checkpoint(tmp_path / "folded.pth")
    with torch.no_grad():
        plain.pos_embed[:, 0] = 0
    for layer, gamma in gammas.items():
        plain.get_submodule(layer).register_forward_hook(lambda _, __, found, gamma=gamma: found * gamma)
    image = torch.randn(1, 3, 32, 32, generator=generator)
    with torch.no_grad():
        torch.testing.assert_close(folded(image).logits, plain(image).logits, atol=1e-5, rtol=0)


def test_the_command_says_it_in_one_line(vit: State, tmp_path: Path) -> None:
    torch.save({"model": {**vit, "dist_token": torch.ones(1, 1, 64)}}, tmp_path / "deit.pth")
    assert refusal(invoke(export, tmp_path / "deit.pth", "-o", tmp_path / "bundle")) == (
        f"adavit-export: error: {tmp_path}/deit.pth: this is a distilled DeiT, with a second class token, which is not "
        "supported (it has 'dist_token'); use a plain ViT, such as timm's deit_small_patch16_224\n"
    )
