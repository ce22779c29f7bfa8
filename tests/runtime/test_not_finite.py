"""Values that are not finite, wherever they arise, are errors and never a confident class."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from cases import WIDE, random_images, with_weights

import adavit
from adavit.errors import AdaViTError, BackendError, BundleError, InputError
from adavit.runtime import Policy, Runtime
from adavit.runtime.finite import check_image

IMAGES = random_images(WIDE, 2)


@pytest.fixture
def copied(wide: tuple[Path, Path], tmp_path: Path) -> Path:
    return shutil.copytree(wide[0], tmp_path / "bundle")


def loaded(bundle: Path, backend: str) -> Runtime:
    return adavit.load(bundle, backend, threads=1, provider="fp32" if backend == "openvino" else None)


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
    "stem": ("stem", np.nan, "patch_embed.bias"),
    "class token": ("stem", np.inf, "cls_token"),
    "attention": ("blocks.1.attention", np.nan, "attn.proj.bias"),
    "a middle MLP": ("blocks.1.mlp", np.nan, "mlp.fc2.bias"),
    "too large for a norm": ("blocks.1.mlp", 1e19, "mlp.fc2.bias"),
    "the last MLP": ("blocks.2.mlp", -np.inf, "mlp.fc2.bias"),
    "head": ("head", np.nan, "head.bias"),
    "overflow": ("head", 3e38, "head.weight"),
}
SETS = {"stem": "stem_set", "blocks.1.mlp": "blocks.1.both_set", "blocks.2.mlp": "blocks.2.both_set"} | {
    "head": "blocks.2.both_set"
}


@pytest.mark.parametrize("kind", FAULTS)
@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_engines_that_compute_no_numbers(backend: str, kind: str, copied: Path) -> None:
    engine, value, weight = FAULTS[kind]
    with_weights(copied, engine, value, weight)
    runtime, dense = loaded(copied, backend), Policy.dense(WIDE, 2)
    images = IMAGES * np.float32(100) if kind == "overflow" else IMAGES
    if kind == "overflow":
        with_weights(copied, engine, 3e38)
        runtime = loaded(copied, backend)
    with pytest.raises(BackendError, match=r"of image 0 are NaN, infinite or beyond 1e\+17: .*; check the bundle"):
        runtime.run(images, policy=dense)


@pytest.mark.parametrize("kind", [kind for kind in FAULTS if FAULTS[kind][0] in SETS and kind != "overflow"])
def test_engines_of_whole_blocks_that_compute_no_numbers(kind: str, copied: Path) -> None:
    engine, value, weight = FAULTS[kind]
    with_weights(copied, SETS[engine], value, weight)
    runtime, dense = loaded(copied, "onnxruntime"), Policy.dense(WIDE, 2)
    assert np.isfinite(runtime.run(IMAGES, policy=dense).logits).all()
    assert runtime.specialise(dense)
    with pytest.raises(BackendError, match="of image 0 are NaN, infinite"):
        runtime.run(IMAGES, policy=dense)


DECIDING: dict[str, Callable[[Path], object]] = {
    "onnxruntime": lambda bundle: loaded(bundle, "onnxruntime").run(IMAGES),
    "openvino": lambda bundle: loaded(bundle, "openvino").run(IMAGES),
    "specialised": lambda bundle: loaded(bundle, "onnxruntime").specialise(Policy.dense(WIDE, 1)),
}


COMPARING = ("openvino", "specialised")
"""What compares logits inside, where nobody sees that they overflow."""


@pytest.mark.parametrize(
    ("how", "value"),
    [*((how, value) for how in DECIDING for value in (np.nan, np.inf)), *((c, -3e38) for c in COMPARING)],
)
@pytest.mark.parametrize("weight", ["token_select", "choices", "norm1"])
def test_decisions_of_no_numbers(how: str, weight: str, value: float, copied: Path) -> None:
    for engine in ("decide_set", "decide"):
        with_weights(copied, f"blocks.1.{engine}", value, weight)
    with pytest.raises(
        AdaViTError, match=r"decisions of block 1|engine blocks.1.decide(_set)? has weights .* NaN, infinite"
    ) as e:
        DECIDING[how](copied)
    assert isinstance(e.value, BackendError | BundleError)


def test_a_dense_twin_that_computes_no_numbers(copied: Path) -> None:
    with_weights(copied, "dense", np.nan, "head.bias")
    with pytest.raises(BackendError, match="the dense twin's logits of image 0 are NaN, infinite"):
        loaded(copied, "onnxruntime").run_dense(IMAGES)


def test_the_image_is_named_and_the_runtime_works_on(wide: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    runtime, odd = loaded(wide[0], "onnxruntime"), IMAGES.copy()
    wanted, stem = runtime.run(IMAGES).logits, runtime.dispatcher.engines.stem.run
    odd[1, 0, 0, 0] = 7

    def overflowing(inputs: list[np.ndarray], outputs: list[object]) -> None:
        stem([np.full_like(inputs[0], np.inf) if inputs[0][0, 0, 0, 0] == 7 else inputs[0]], outputs)

    monkeypatch.setattr(runtime.dispatcher.engines.stem, "run", overflowing)
    with pytest.raises(BackendError, match="image 1 are NaN"):
        runtime.run(odd)
    np.testing.assert_array_equal(runtime.run(IMAGES).logits, wanted)


def test_the_bounds() -> None:
    tokens, logits = np.zeros((3, 4), np.float32), np.zeros((1, 5), np.float32)
    check_image(0, logits, tokens)
    check_image(0, logits)
    for array, value in ((tokens, np.nan), (tokens, -np.inf), (tokens, 1e18), (tokens, -1e18), (logits, np.nan)):
        wrong = array.copy()
        wrong[-1, -1] = value
        pair = (logits, wrong) if array is tokens else (wrong, tokens)
        with pytest.raises(BackendError, match="of image 7 are NaN, infinite or beyond"):
            check_image(7, *pair)
