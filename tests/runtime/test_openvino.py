"""OpenVINO beside ONNX Runtime: the same numbers, from any thread, decisions in float32."""

import gc
import json
import shutil
import weakref
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from adavit.runtime.heads import HeadWeights
from adavit.runtime.state import Scratch, Thresholds
from cases import (
    WIDE,
    assert_same_policy,
    forced,
    golden,
    invoke,
    python,
    random_images,
    random_model,
    random_policy,
    rewrite_engine,
)
from hypothesis import given, settings
from hypothesis import strategies as st

import adavit
from adavit.bundle.bundle import Bundle
from adavit.cli import run
from adavit.errors import BackendError, BundleError, OptionError
from adavit.runtime import Policy, Runtime, session
from adavit.runtime.backend import Options
from adavit.runtime.backends.openvino import OpenVinoBackend
from adavit.runtime.backends.openvino_buffers import rounded, to_bfloat16
from adavit.runtime.backends.openvino_engine import Requests
from adavit.runtime.backends.openvino_stem import compute_in_bf16, unfold


def computes_bf16() -> bool:
    """Whether this CPU does."""
    import openvino

    return "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


@pytest.fixture(scope="module")
def loaded(wide: tuple[Path, Path]) -> Runtime:
    return adavit.load(wide[0], backend="openvino", provider="fp32", threads=1)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), batch=st.integers(1, 3))
def test_any_policy(seed: int, batch: int, loaded: Runtime) -> None:
    images, policy = random_images(WIDE, batch, seed=seed), random_policy(WIDE, batch, seed)
    wanted = forced(random_model(WIDE), images, policy)
    np.testing.assert_allclose(loaded.run(images, policy=policy).logits, wanted, atol=1e-4, rtol=1e-4)


def test_a_first_image_of_its_class_token_alone_spoils_no_later_one(golden_bundles: Callable[[str], Path]) -> None:
    images, logits, policy = golden("deit_sparse")
    fresh = adavit.load(golden_bundles("deit_sparse"), backend="openvino", provider="fp32", threads=1)
    least = adavit.Policy.dense(fresh.architecture, 1)
    least.tokens[..., 1:] = False
    fresh.run(images[:1], policy=least)
    np.testing.assert_allclose(fresh.run(images, policy=policy).logits, logits, atol=1e-4, rtol=0)
    dense = adavit.Policy.dense(fresh.architecture, len(images))
    np.testing.assert_allclose(fresh.run(images, policy=dense).logits, fresh.run_dense(images), atol=1e-4, rtol=0)


def test_what_an_image_overflows_spoils_no_later_one(wide: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    fresh = adavit.load(wide[0], backend="openvino", provider="fp32", threads=1)
    policy = Policy.dense(WIDE, 1)
    policy.tokens[..., 1:100] = False  # of 145, so that rows behind the kept ones are computed
    wanted = fresh.run(random_images(WIDE, 1), policy=policy).logits
    with monkeypatch.context() as patched, pytest.raises(BackendError, match="NaN, infinite"):
        patched.setattr(session, "LARGEST", np.inf)
        fresh.run(np.full((1, 3, 48, 48), 3e38, np.float32), policy=Policy.dense(WIDE, 1))
    np.testing.assert_array_equal(fresh.run(random_images(WIDE, 1), policy=policy).logits, wanted)


@given(tokens=st.integers(1, 300), more=st.integers(0, 300))
def test_numbers_of_tokens_are_rounded_up_to_few(tokens: int, more: int) -> None:
    everything = tokens + more
    found = rounded(tokens, everything)
    assert tokens <= found < tokens + 16
    assert found <= everything
    assert (everything - found) % 16 == 0


@given(values=st.lists(st.floats(-(2.0**126), 2.0**126, width=32), min_size=1))
def test_the_nearest_bfloat16(values: list[float]) -> None:
    array = np.array(values, np.float32)
    wanted = torch.from_numpy(array).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    np.testing.assert_array_equal(to_bfloat16(array), wanted)


@pytest.mark.parametrize("parallel", ["operators", "samples"])
def test_many_threads(parallel: str, golden_bundles: Callable[[str], Path]) -> None:
    images, logits, policy = golden("deit_sparse")
    loaded = adavit.load(golden_bundles("deit_sparse"), "openvino", 2, "fp32", parallel)
    rows = [np.random.default_rng(seed).permutation(len(images)) for seed in range(24)]
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda chosen: loaded.run(images[chosen]), rows))
    for chosen, result in zip(rows, found, strict=True):
        assert_same_policy(result.policy, policy[chosen])
        np.testing.assert_allclose(result.logits, logits[chosen], atol=1e-4, rtol=0)


class AbleCore:
    """A core that says its CPU computes in bf16, and notes what it is asked to compile."""

    def __init__(self, core: Any) -> None:
        self.core = core
        self.asked: dict[str, str] = {}
        self.threads: list[tuple[str, int, int]] = []

    def get_property(self, device: str, name: str) -> list[str]:
        return ["FP32", "BF16"]

    def read_model(self, data: bytes) -> Any:
        return self.core.read_model(data)

    def compile_model(self, model: Any, device: str, properties: dict[str, Any]) -> Any:
        self.asked[model.friendly_name] = properties["INFERENCE_PRECISION_HINT"]
        self.threads.append((model.friendly_name, properties["INFERENCE_NUM_THREADS"], properties["NUM_STREAMS"]))
        return self.core.compile_model(model, device, {**properties, "INFERENCE_PRECISION_HINT": "f32"})


@pytest.mark.parametrize(("provider", "wanted"), [(None, "bf16"), ("bf16", "bf16"), ("fp32", "f32")])
def test_decisions_stay_in_float32_where_the_rest_is_bf16(
    provider: str | None, wanted: str, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import openvino

    core = AbleCore(openvino.Core())
    monkeypatch.setattr(openvino, "Core", lambda: core)
    loaded = adavit.load(tiny_bundle, backend="openvino", provider=provider, threads=1)
    whole = {"attention_set", "mlp_set", "both_set", "decide_set"}
    assert set(core.asked) == {"stem", "head", "empty"} | whole
    for name, precision in core.asked.items():
        assert precision == ("f32" if name.startswith("decide") else wanted), name
    assert loaded.backend.versions()["precision"] == ("fp32" if wanted == "f32" else "bf16")


def test_each_worker_has_copies_and_a_thread_of_its_own(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import openvino

    core = AbleCore(openvino.Core())
    monkeypatch.setattr(openvino, "Core", lambda: core)
    loaded = adavit.load(tiny_bundle, backend="openvino", provider="fp32", threads=2, parallel="samples")
    assert all(compiled % 2 == 0 for compiled in Counter(core.threads).values())
    assert {(threads, streams) for _, threads, streams in core.threads} == {(1, 1)}
    requests = loaded.dispatcher.engines.stem._requests  # type: ignore[attr-defined]
    together = Barrier(2)
    monkeypatch.setattr(requests, "run", lambda tensors: (together.wait(60), Requests.run(requests, tensors)))
    loaded.run(random_images(loaded.architecture, 2))
    assert [len(idle) for idle in requests._idle] == [1, 1]
    before = len(core.threads)
    assert loaded.specialise(Policy.dense(loaded.architecture, 1)) == (len(core.threads) - before) / 2 > 0
    assert {(threads, streams) for _, threads, streams in core.threads} == {(1, 1)}
    loaded.run_dense(random_images(loaded.architecture, 1))
    assert core.threads[-1] == ("dense", 2, 1)


@pytest.mark.skipif(not computes_bf16(), reason="this CPU does not compute in bf16")
def test_what_a_block_in_bf16_decides_for_the_next_is_float32(wide: tuple[Path, Path]) -> None:
    loaded, exact = adavit.load(wide[0], "openvino", 1, "bf16"), adavit.load(wide[0], threads=1)
    scratch, normed = Scratch(WIDE, exact.backend), exact.backend.buffer((WIDE.tokens, WIDE.width))
    thresholds, tokens, compared = Thresholds.of(loaded.offsets, WIDE), np.empty((WIDE.tokens, WIDE.width)), 0

    def compare(_: int, engine: str, found: Any) -> None:
        nonlocal tokens, compared
        kind, _, block = engine.partition(".")
        if kind != "decisions":
            tokens = found.copy()
            return
        index, outputs = int(block), [normed.rows(WIDE.tokens), *scratch.logits[int(block)]]
        exact.dispatcher.engines.blocks[index].decide.run([tokens], outputs)
        of_tokens = scratch.decided[index][0].array[:, 0] - thresholds.tokens[index]
        clear = np.abs(of_tokens) > 1e-4  # a product in bf16 is off by 1e-2
        np.testing.assert_array_equal(found[: WIDE.tokens][clear], of_tokens[clear] > 0)
        if WIDE.choices(index):
            chosen = scratch.decided[index][1].array[0]
            clear = np.abs(chosen) > 1e-4
            np.testing.assert_array_equal(found[WIDE.tokens :][clear], chosen[clear] > 0)
        compared += 1

    for seed in range(24):
        loaded.run(random_images(WIDE, 1, seed=seed), observe=compare)
    assert compared == 24 * WIDE.depth


def stem_model(bundle: Path, engine: str = "stem") -> Any:
    """The stem of a bundle as OpenVINO reads it, or its dense twin."""
    import openvino

    return openvino.Core().read_model(Bundle.open(bundle).read(engine))


def run_in_float32(model: Any, images: Any) -> Any:
    import openvino

    return openvino.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})([images])[0]


@pytest.mark.parametrize("engine", ["stem", "dense"])
@pytest.mark.parametrize("batch", [1, 3])
def test_the_unfold_of_pixels_is_an_operator(engine: str, batch: int, golden_bundles: Callable[[str], Path]) -> None:
    images, changed = golden("t2t_small")[0][:batch], stem_model(golden_bundles("t2t_small"), engine)
    unfold(changed)
    kinds = Counter(node.get_type_name() for node in changed.get_ops())
    before = Counter(node.get_type_name() for node in stem_model(golden_bundles("t2t_small"), engine).get_ops())
    assert kinds["ExtractImagePatches"] == 1
    assert kinds["Convolution"] == before["Convolution"] - 1
    wanted = run_in_float32(stem_model(golden_bundles("t2t_small"), engine), images)
    np.testing.assert_array_equal(run_in_float32(changed, images), wanted)


def test_large_layers_of_the_stem_alone_compute_in_bf16(golden_bundles: Callable[[str], Path]) -> None:
    model = stem_model(golden_bundles("t2t_small"))
    compute_in_bf16(model)
    found = {
        value.get_node().input_value(0).get_node().get_friendly_name()
        for node in model.get_ops()
        if node.get_type_name() in ("MatMul", "Convolution") and node.get_element_type().to_string() == "bf16"
        for value in node.input_values()
    }
    assert {"attention1.kqv.weight", "attention2.kqv.weight", "project.weight"} < found
    assert not {name for name in found if "mlp" in name or name.endswith((".w", "proj.weight"))}
    assert [output.get_element_type().to_string() for output in model.outputs] == ["f32"]
    images = golden("t2t_small")[0]
    exact = run_in_float32(stem_model(golden_bundles("t2t_small")), images)
    error = np.abs(run_in_float32(model, images) - exact).max() / exact.std()
    assert error < 0.1
    assert error > 0 or not computes_bf16()


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_models_for_frequent_sizes_compute_the_same(seed: int, loaded: Runtime) -> None:
    images, policy = random_images(WIDE, 2, seed=seed), random_policy(WIDE, 2, seed)
    for some in (policy[:1], policy):  # the second replaces the first
        assert 0 < loaded.specialise(some) <= (some.sublayers.any(2) & some.heads.any(2)).sum()
        wanted = forced(random_model(WIDE), images, policy)
        np.testing.assert_allclose(loaded.run(images, policy=policy).logits, wanted, atol=1e-4, rtol=1e-4)


def test_a_size_is_compiled_once_it_is_frequent_and_then_run(wide: tuple[Path, Path]) -> None:
    loaded = adavit.load(wide[0], backend="openvino", provider="fp32", threads=1)
    dense, image = Policy.dense(WIDE, 1), random_images(WIDE, 1)
    before = loaded.run(image, policy=dense).logits
    rare = Policy.concatenate([Policy.dense(WIDE, 20), random_policy(WIDE, 1, 0)])
    kinds = {WIDE.choices(block + 1) if block + 1 < WIDE.depth else None for block in range(WIDE.depth)}
    assert loaded.specialise(rare) == len(kinds)  # one for all blocks that decide on as much
    blocks = range(WIDE.depth)
    of_any = [loaded.dispatcher.specialised.engines[block, bytes([1, 1])]._any for block in blocks]  # type: ignore[attr-defined]
    for requests in of_any:
        requests._idle = [None]  # would fail
    np.testing.assert_allclose(loaded.run(image, policy=dense).logits, before, atol=1e-5)
    dense.heads[0, 1, 0] = False
    with pytest.raises(AttributeError):
        loaded.run(image, policy=dense)


def test_models_for_other_sizes_are_dropped(wide: tuple[Path, Path]) -> None:
    loaded = adavit.load(wide[0], backend="openvino", provider="fp32", threads=1)
    image, dense, half = random_images(WIDE, 1), Policy.dense(WIDE, 1), Policy.dense(WIDE, 1)
    half.tokens[..., 1:72] = False
    assert loaded.specialise(dense) > 0
    loaded.run(image, policy=dense)
    blocks = loaded.dispatcher.specialised.engines.values()
    before = [weakref.ref(model) for block in blocks for model in block._models.prepared.values()]  # type: ignore[attr-defined]
    assert loaded.specialise(half) > 0
    gc.collect()
    assert before
    assert not any(model() for model in before)


def test_weights_that_are_put_out_are_held_no_longer(loaded: Runtime) -> None:
    engines = loaded.dispatcher.engines.weights
    kept = HeadWeights(loaded.bundle, loaded.backend, engines, 0)
    first, second = (bytes([heads == kept_head for heads in range(WIDE.heads)] + [1, 1]) for kept_head in (0, 1))
    sized = HeadWeights(loaded.bundle, loaded.backend, engines, sum(rows.array.nbytes for rows in kept.of(1, first)))
    weights = sized.of(1, first)
    assert weights is not None
    assert sized.of(1, first) is weights
    held = weakref.ref(weights[0].array.base)
    assert sized.of(1, second) is not None
    del weights
    gc.collect()
    assert held() is None


def test_precisions_that_are_not_there(tiny_bundle: Path) -> None:
    with pytest.raises(OptionError, match="no precision 'int7'; choose fp32 or bf16"):
        adavit.load(tiny_bundle, backend="openvino", provider="int7", threads=1)
    backend = OpenVinoBackend(Bundle.open(tiny_bundle), Options(1, "fp32"))
    if "BF16" not in backend._core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        with pytest.raises(BackendError, match=r"does not compute in bf16 .* choose fp32"):
            adavit.load(tiny_bundle, backend="openvino", provider="bf16", threads=1)


def test_an_engine_it_refuses(bundle: Path) -> None:
    rewrite_engine(bundle, "head", b"not a model")
    with pytest.raises(BackendError, match="OpenVINO refuses engine head: "):
        adavit.load(bundle, backend="openvino", threads=1)


def test_an_unfold_that_cannot_be_made_an_operator(golden_bundles: Callable[[str], Path], tmp_path: Path) -> None:
    bundle = shutil.copytree(golden_bundles("t2t_small"), tmp_path / "bundle")
    images, logits = (
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["B", 3, None, None])  # of any size
        for name in ("images", "logits")
    )
    weights = onnx.numpy_helper.from_array(np.ones((3, 3, 9, 9), np.float32), "unfold")
    node = onnx.helper.make_node("Conv", ["images", "unfold"], ["logits"])
    model = onnx.helper.make_model(
        onnx.helper.make_graph([node], "dense", [images], [logits], [weights]), ir_version=10
    )
    rewrite_engine(bundle, "dense", model.SerializeToString())
    with pytest.raises(BackendError, match="OpenVINO refuses engine dense: "):
        adavit.load(bundle, backend="openvino", threads=1).run_dense(golden("t2t_small")[0])


def test_a_block_without_its_weights(bundle: Path) -> None:
    engine = Bundle.open(bundle).read("blocks.1.attention")
    rewrite_engine(bundle, "blocks.2.attention", engine)
    with pytest.raises(BundleError, match=r"engine blocks.2.attention has no weights attn.query.weight; export again"):
        adavit.load(bundle, backend="openvino", threads=1)
    rewrite_engine(bundle, "blocks.2.attention", engine[:100])
    with pytest.raises(BundleError, match=r"engine blocks.2.attention: an engine ends in the middle of a field"):
        adavit.load(bundle, backend="openvino", threads=1)


def test_a_block_with_weights_of_other_shapes(bundle: Path) -> None:
    engine = Bundle.open(bundle).read("blocks.2.mlp")
    model = onnx.load_from_string(engine)
    for tensor in model.graph.initializer:
        if tensor.name == "blocks.2.mlp.fc1.weight":
            tensor.CopyFrom(onnx.numpy_helper.from_array(np.zeros((3, 3), np.float32), tensor.name))
    rewrite_engine(bundle, "blocks.2.mlp", model.SerializeToString())
    with pytest.raises(BundleError, match=r"blocks.2.mlp has weights mlp.fc1.weight of \[3, 3\], not of \[48, 80\]"):
        adavit.load(bundle, backend="openvino", threads=1)
    swapped = engine.replace(b"fc1.weight", b"fc0.weight").replace(b"fc2.weight", b"fc1.weight")
    rewrite_engine(bundle, "blocks.2.mlp", swapped.replace(b"fc0.weight", b"fc2.weight"))
    with pytest.raises(BundleError, match=r"blocks.2.mlp has weights mlp.fc1.weight of \[\d+, \d+\], not of \["):
        adavit.load(bundle, backend="openvino", threads=1)


REFUSED = """
import sys
class Refused:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "openvino":
            raise ImportError("No module named 'openvino'", name=name) from CAUSE
sys.meta_path.insert(0, Refused())
from adavit.cli import run
run(prog_name="adavit-run")
"""


def test_not_installed(tiny_bundle: Path) -> None:
    done = python(REFUSED.replace("CAUSE", "None"), tiny_bundle, "--backend", "openvino")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.count("\n") == 1
    assert "OpenVINO does not import" in done.stderr
    assert "pip install 'adavit[openvino]'" in done.stderr


def test_ctrl_c_while_it_is_imported(tiny_bundle: Path) -> None:
    done = python(REFUSED.replace("CAUSE", "KeyboardInterrupt()"), tiny_bundle, "--backend", "openvino")
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "adavit-run: interrupted\n")


def test_the_command(tiny_bundle: Path, labelled: Path) -> None:
    short = ("--images", labelled, "--iterations", 2, "--threads", 2, "--backend", "openvino")
    done = invoke(run, tiny_bundle, *short, "--batch", 2, "--profile")
    assert (done.exit_code, done.stderr) == (0, "")
    assert "on openvino" in done.stdout


def test_decision_agreement_and_logit_error_against_onnx_runtime(
    tiny_bundle: Path, labelled: Path, tmp_path: Path
) -> None:
    arguments = ("--compare", tiny_bundle, tiny_bundle, "--images", labelled, "--backend", "openvino", "--threads", 1)
    done = invoke(run, *arguments, "--provider", "fp32", "--json", tmp_path / "report.json")
    assert (done.exit_code, done.stderr) == (0, "")
    assert "bundle in onnxruntime" in done.stdout
    assert "bundle in openvino fp32" in done.stdout
    free = json.loads((tmp_path / "report.json").read_text())["free"]
    assert (free["flipped"], free["identical_policies"], free["top1_agreement"]) == (0, 1, 1)
    assert 0 < free["mean_logit_difference"] < 1e-4
