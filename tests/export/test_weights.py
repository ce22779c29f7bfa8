"""The weights of a bundle are a checkpoint."""

from pathlib import Path

import pytest
import torch
from cases import export, random_model, stored_files, tiny
from safetensors import safe_open

import adavit
from adavit.architecture import Architecture
from adavit.files import sha256
from adavit.model import load_checkpoint


@pytest.mark.parametrize("arch", [tiny(), tiny(stem="t2t", patch_size=16, qkv_bias=False)], ids=["patch", "t2t"])
def test_the_weights_are_the_checkpoint(arch: Architecture, tmp_path: Path) -> None:
    model = random_model(arch)
    bundle = export(model, tmp_path, verify=False)
    weights = bundle / stored_files(bundle)["weights"]
    loaded = load_checkpoint(weights)
    assert loaded.arch == arch
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name


def test_an_export_of_the_weights_is_the_same_bundle(tiny_bundle: Path, tmp_path: Path) -> None:
    first = adavit.load(tiny_bundle, threads=1).bundle
    second = adavit.load(export(tiny_bundle / first.files_of().weights.file, tmp_path), threads=1).bundle
    assert second.files_of() == first.files_of()
    assert (second.labels, second.preprocessor, second.name) == (first.labels, first.preprocessor, tiny_bundle.name)


def test_what_images_go_through_is_noted(tiny_bundle: Path, tmp_path: Path, checkpoint: Path) -> None:
    first = export(checkpoint, tmp_path, crop_ratio=0.75, verify=False)
    weights = first / stored_files(first)["weights"]
    with safe_open(weights, "np") as file:
        assert file.metadata()["crop_ratio"] == "0.75"
    second = export(weights, tmp_path, force=True, verify=False)
    assert adavit.load(second, threads=1).bundle.preprocessor.crop_ratio == 0.75
    assert sha256((second / stored_files(second)["weights"]).read_bytes())
