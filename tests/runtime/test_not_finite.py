"""Values that are not finite, wherever they arise, are errors and never a confident class."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from batch_reference import batches_on_cpu
from cases import WIDE, random_images, with_weights

import adavit
from adavit.bundle.operating_points import Offsets
from adavit.errors import BackendError, BundleError, InputError
from adavit.runtime import Policy, Runtime
from adavit.runtime.backends.onnxruntime.slot import OnnxRuntimeSlot
from adavit.runtime.finite import NotFiniteError, check_image

IMAGES = random_images(WIDE, 2)


@pytest.fixture
def copied(wide: tuple[Path, Path], tmp_path: Path) -> Path:
    return shutil.copytree(wide[0], tmp_path / "bundle")


def loaded(bundle: Path, backend: str) -> Runtime:
    provider = "fp32" if backend == "openvino" else None
    return adavit.load(bundle, backend, threads=1, provider=provider, specialise=False)


@pytest.mark.parametrize("value", [3e38, 1e20, -3e38])
@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_images_beyond_what_is_computed_with(backend: str, value: float, wide: tuple[Path, Path]) -> None:
    runtime, images = loaded(wide[0], backend), IMAGES.copy()
    images[1, 0, 3, 4] = value
    for run in (runtime.run, runtime.run_dense):
        with pytest.raises(InputError, match=r"images hold values of [23]e\+38|images hold values of 1e\+20"):
            run(images)
    assert np.isfinite(runtime.run(np.full_like(IMAGES, 1e6)).logits).all()


FAULTS = {
    "stem": ("patch_embed.proj.bias", np.nan),
    "class token": ("cls_token", np.inf),
    "attention": ("blocks.1.attn.proj.bias", np.nan),
    "a middle MLP": ("blocks.1.mlp.fc2.bias", np.nan),
    "a weight of a head": ("blocks.1.attn.value.weight", np.nan),
    "too large for a norm": ("blocks.1.mlp.fc2.bias", 1e19),
    "the last MLP": ("blocks.2.mlp.fc2.bias", -np.inf),
    "head": ("head.bias", np.nan),
}


@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("kind", FAULTS)
@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_graphs_that_compute_no_numbers(backend: str, kind: str, prepared: bool, copied: Path) -> None:
    with_weights(copied, *FAULTS[kind])
    runtime, dense = loaded(copied, backend), Policy.dense(WIDE, 2)
    if prepared:
        runtime.specialise(dense)
    with pytest.raises(BackendError, match=r"of image 0 are NaN, infinite or beyond 1e\+17: .*; check the bundle"):
        runtime.run(IMAGES, policy=dense)


@pytest.mark.parametrize("most", [32, 1])
@pytest.mark.parametrize("decides", [True, False])
@pytest.mark.parametrize("kind", FAULTS)
def test_graphs_of_batches_that_compute_no_numbers(kind: str, decides: bool, most: int, copied: Path) -> None:
    """Also what no decision and no logit tells: norms hide what is too large for them."""
    with_weights(copied, *FAULTS[kind])
    runtime = batches_on_cpu(copied, most=most)
    policy = None if decides else Policy.dense(WIDE, 2)
    if decides:
        runtime.offsets = Offsets(50.0, 50.0, 50.0)  # everything runs, so that the fault shows
    with pytest.raises(NotFiniteError, match=r"of image 0 are|on image 0, or its last tokens, are"):
        runtime.run(IMAGES, policy=policy)


@pytest.mark.parametrize("value", [np.nan, np.inf, -3e38])
@pytest.mark.parametrize("weight", ["blocks.1.attn.token_select", "blocks.1.head_select", "blocks.1.norm1.weight"])
@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_weights_that_decide_are_numbers(backend: str, weight: str, value: float, copied: Path) -> None:
    with_weights(copied, weight, value)
    with pytest.raises(BundleError, match=r"the weights blocks.1.* are NaN, infinite or beyond 1e\+15; export again"):
        loaded(copied, backend)


def test_a_dense_twin_that_computes_no_numbers(copied: Path) -> None:
    with_weights(copied, "head.bias", np.nan)
    with pytest.raises(BackendError, match="the dense twin's logits of image 0 are NaN, infinite"):
        loaded(copied, "onnxruntime").run_dense(IMAGES)


def test_the_image_is_named_and_the_runtime_works_on(wide: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    runtime, odd = loaded(wide[0], "onnxruntime"), IMAGES.copy()
    wanted, stem = runtime.run(IMAGES).logits, OnnxRuntimeSlot.stem
    odd[1, 0, 0, 0] = 7

    def overflowing(slot: OnnxRuntimeSlot, image: np.ndarray) -> None:
        stem(slot, np.full_like(image, np.inf) if image[0, 0, 0, 0] == 7 else image)

    monkeypatch.setattr(OnnxRuntimeSlot, "stem", overflowing)
    with pytest.raises(BackendError, match="image 1 are NaN"):
        runtime.run(odd)
    np.testing.assert_array_equal(runtime.run(IMAGES).logits, wanted)


def test_the_bounds() -> None:
    tokens, logits = np.zeros((3, 4), np.float32), np.zeros((1, 5), np.float32)
    check_image(0, logits, tokens)
    for array, value in ((tokens, np.nan), (tokens, -np.inf), (tokens, 1e18), (tokens, -1e18), (logits, np.nan)):
        wrong = array.copy()
        wrong[-1, -1] = value
        pair = (logits, wrong) if array is tokens else (wrong, tokens)
        with pytest.raises(BackendError, match="of image 7 are NaN, infinite or beyond"):
            check_image(7, *pair)
