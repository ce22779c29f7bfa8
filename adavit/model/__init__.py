"""The model: AdaViT in PyTorch, and the checkpoints it is read from."""

from adavit.model.adavit import AdaViT, Output
from adavit.model.checkpoint import load_checkpoint
from adavit.model.checkpoint_file import read_metadata, save_safetensors
from adavit.model.resize import resize

__all__ = ["AdaViT", "Output", "load_checkpoint", "read_metadata", "resize", "save_safetensors"]
