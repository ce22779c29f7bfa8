"""The model: AdaViT in PyTorch, and the checkpoints it is read from."""

from adavit.model.adavit import AdaViT, Output
from adavit.model.checkpoint import load_checkpoint, save_safetensors

__all__ = ["AdaViT", "Output", "load_checkpoint", "save_safetensors"]
