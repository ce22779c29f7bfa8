"""OpenVINO on a bundle's graphs: the same numbers as the masked model, from any thread, decisions in float32."""

import gc
import sys
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
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
    rewrite_stored,
    stored_files,
)
from hypothesis import given, settings
from hypothesis import strategies as st

import adavit
from adavit.bundle.bundle import Bundle
from adavit.bundle.graphs import Graphs
from adavit.cli import run
from adavit.errors import BackendError, BundleError, OptionError
from adavit.export.write import describe_bundle
from adavit.graphs.files import write_graphs
from adavit.graphs.precision import Precision, Units
from adavit.runtime import Policy, Runtime, inputs
from adavit.runtime.backends.openvino.models import bf16_tensor_of, compute_in_bf16, unfold
from adavit.runtime.dispatcher import Step

LINEAR = {"attn.query": "qkv", "attn.key": "qkv", "attn.value": "qkv", "attn.proj": "proj", "mlp.fc1": "fc1"} | {
    "mlp.fc2": "fc2"
}
"""The linear layers of a block, and the site whose input each reads."""


@pytest.fixture(scope="module")
def loaded(wide: tuple[Path, Path]) -> Runtime:
    return adavit.load(wide[0], backend="openvino", provider="fp32", threads=1, specialise=False)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), batch=st.integers(1, 3))
def test_any_policy(seed: int, batch: int, loaded: Runtime) -> None:
    images, policy = random_images(WIDE, batch, seed=seed), random_policy(WIDE, batch, seed)
    wanted = forced(random_model(WIDE), images, policy)
    np.testing.assert_allclose(loaded.run(images, policy=policy).logits, wanted, atol=1e-4, rtol=1e-4)


def test_sub_layers_without_heads(loaded: Runtime) -> None:
    images, policy = random_images(WIDE, 3), Policy.dense(WIDE, 3)
    policy.heads[:, WIDE.keep :] = False
    policy.sublayers[1, -1, 0] = policy.sublayers[2, -1, 1] = False
    wanted = forced(random_model(WIDE), images, policy)
    np.testing.assert_allclose(loaded.run(images, policy=policy).logits, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["deit_small", "deit_sparse", "t2t_small"])
def test_golden_decisions_and_replay(name: str, golden_bundles: Callable[[str], Path]) -> None:
    images, logits, policy = golden(name)
    fresh = adavit.load(golden_bundles(name), backend="openvino", provider="fp32", threads=1)
    for _ in range(2):
        result = fresh.run(images)
        assert_same_policy(result.policy, policy)
        np.testing.assert_allclose(result.logits, logits, atol=1e-4, rtol=0)
        np.testing.assert_allclose(fresh.run(images, policy=policy).logits, logits, atol=1e-4, rtol=0)
        assert fresh.specialise(policy) > 0


def test_a_first_image_of_its_class_token_alone_spoils_no_later_one(golden_bundles: Callable[[str], Path]) -> None:
    images, logits, policy = golden("deit_sparse")
    fresh = adavit.load(golden_bundles("deit_sparse"), backend="openvino", provider="fp32", threads=1)
    least = Policy.dense(fresh.architecture, 1)
    least.tokens[..., 1:] = False
    fresh.run(images[:1], policy=least)
    np.testing.assert_allclose(fresh.run(images, policy=policy).logits, logits, atol=1e-4, rtol=0)
    dense = Policy.dense(fresh.architecture, len(images))
    np.testing.assert_allclose(fresh.run(images, policy=dense).logits, fresh.run_dense(images), atol=1e-4, rtol=0)


def test_what_an_image_overflows_spoils_no_later_one(wide: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    fresh = adavit.load(wide[0], backend="openvino", provider="fp32", threads=1, specialise=False)
    policy = Policy.dense(WIDE, 1)
    policy.tokens[..., 1:100] = False  # of 145, so that rows behind the kept ones are computed
    wanted = fresh.run(random_images(WIDE, 1), policy=policy).logits
    with monkeypatch.context() as patched, pytest.raises(BackendError, match="NaN, infinite"):
        patched.setattr(inputs, "LARGEST", np.inf)
        fresh.run(np.full((1, 3, 48, 48), 3e38, np.float32), policy=Policy.dense(WIDE, 1))
    np.testing.assert_array_equal(fresh.run(random_images(WIDE, 1), policy=policy).logits, wanted)


@given(tokens=st.integers(1, WIDE.tokens))
def test_numbers_of_tokens_are_rounded_up_to_few(tokens: int, loaded: Runtime) -> None:
    found = loaded.backend.rounded(tokens)
    assert tokens <= found < tokens + 16
    assert found <= WIDE.tokens
    assert (WIDE.tokens - found) % 16 == 0


@pytest.mark.parametrize("parallel", ["auto", "operators", "samples"])
def test_many_threads(parallel: str, golden_bundles: Callable[[str], Path]) -> None:
    images, logits, policy = golden("deit_sparse")
    loaded = adavit.load(golden_bundles("deit_sparse"), "openvino", 2, "fp32", parallel)
    loaded.specialise(policy)
    rows = [np.random.default_rng(seed).permutation(len(images)) for seed in range(24)]
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda chosen: loaded.run(images[chosen]), rows))
    for chosen, result in zip(rows, found, strict=True):
        assert_same_policy(result.policy, policy[chosen])
        np.testing.assert_allclose(result.logits, logits[chosen], atol=1e-4, rtol=0)


def test_pictures_that_cannot_be_written_to(loaded: Runtime) -> None:
    images = random_images(WIDE, 2)
    wanted = loaded.run(images).logits, loaded.run_dense(images)
    images.flags.writeable = False
    np.testing.assert_array_equal(loaded.run(images).logits, wanted[0])
    np.testing.assert_array_equal(loaded.run_dense(images), wanted[1])


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_models_of_frequent_heads_compute_the_same(seed: int, loaded: Runtime) -> None:
    images, policy = random_images(WIDE, 2, seed=seed), random_policy(WIDE, 2, seed)
    for some in (policy[:1], policy):  # the second replaces the first
        loaded.specialise(some)
        wanted = forced(random_model(WIDE), images, policy)
        np.testing.assert_allclose(loaded.run(images, policy=policy).logits, wanted, atol=1e-4, rtol=1e-4)


def test_heads_get_models_once_they_are_frequent(wide: tuple[Path, Path]) -> None:
    fresh = adavit.load(wide[0], backend="openvino", provider="fp32", threads=1, specialise=False)
    rare = Policy.dense(WIDE, 1)
    rare.heads[:, 1:, 0] = False
    assert fresh.specialise(Policy.concatenate([Policy.dense(WIDE, 20), rare])) == WIDE.depth
    image = random_images(WIDE, 1)
    fresh.run(image, policy=Policy.dense(WIDE, 1))
    before = [weakref.ref(model) for model in fresh.backend.constant.values()]  # type: ignore[attr-defined]
    assert fresh.specialise(rare) == WIDE.depth  # the first block keeps all heads
    gc.collect()
    assert sum(model() is not None for model in before) == 1


THREADS = """
import sys
from pathlib import Path
import numpy as np
import adavit
def threads():
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith("Threads"))
runtime = adavit.load(sys.argv[1], "openvino", int(sys.argv[2]), "fp32", specialise=False)
side = runtime.architecture.image_size
runtime.run(np.zeros((1, 3, side, side), np.float32))
found = [threads()]
for head in range(3):
    policy = adavit.Policy.dense(runtime.architecture, 1)
    policy.heads[:, 1:, head] = False
    runtime.specialise(policy)
    runtime.run(np.zeros((1, 3, side, side), np.float32), policy=policy)
    found.append(threads())
print(*found)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
def test_threads_do_not_grow_with_what_is_prepared(wide: tuple[Path, Path]) -> None:
    alone, shared = (python(THREADS, wide[0], threads) for threads in (1, 2))
    assert (alone.returncode, shared.returncode) == (0, 0), alone.stderr + shared.stderr
    assert len(set(alone.stdout.split())) == 1
    assert len(set(shared.stdout.split()[1:])) == 1


@pytest.mark.parametrize("location", ["*/_ORT_MEM_ADDR_/*", "../model.safetensors", "other.bin"])
def test_references_out_of_the_weights_never_reach_it(
    location: str, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import openvino

    file = stored_files(bundle)["blocks.1.both"]
    model = onnx.load(bundle / file, load_external_data=False)
    place = next(tensor for tensor in model.graph.initializer if tensor.external_data).external_data
    next(entry for entry in place if entry.key == "location").value = location
    rewrite_stored(bundle, file, model.SerializeToString())
    read = CountingCore(openvino.Core())
    monkeypatch.setattr(openvino, "Core", lambda: read)
    with pytest.raises(BundleError, match=r"lies in .*, not in model\.safetensors"):
        adavit.load(bundle, "openvino", threads=1)
    assert not any(location.encode() in data for data in read.given)


class CountingCore:
    """A core that notes what it is given, and says that its CPU computes in bf16 if it is to."""

    def __init__(self, core: Any, able: bool = False) -> None:
        self.core, self.able, self.given = core, able, list[bytes]()

    def get_property(self, device: str, name: str) -> list[str]:
        return ["FP32"] + ["BF16"] * self.able

    def read_model(self, data: bytes) -> Any:
        self.given.append(data)
        return self.core.read_model(data)

    def compile_model(self, *arguments: Any) -> Any:
        return self.core.compile_model(*arguments)


@pytest.mark.parametrize(("provider", "wanted"), [(None, "bf16"), ("bf16", "bf16"), ("fp32", "fp32")])
def test_decisions_stay_in_float32_where_the_rest_is_bf16(
    provider: str | None, wanted: str, wide: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    import openvino

    core = CountingCore(openvino.Core(), able=True)
    monkeypatch.setattr(openvino, "Core", lambda: core)
    loaded, model = adavit.load(wide[0], "openvino", 1, provider, specialise=False), random_model(WIDE)
    assert loaded.backend.versions()["precision"] == wanted
    images, policy, compared = random_images(WIDE, 2), Policy.dense(WIDE, 2), 0

    def compare(step: Step) -> None:
        nonlocal compared
        if step.decisions is None:
            return
        block = model.blocks[step.block]
        with torch.no_grad():
            logits = block.attn.token_select.mlp_head(block.norm1(torch.from_numpy(step.tokens.copy())))[1:, 0].numpy()
        np.testing.assert_allclose(step.decisions[1 : WIDE.tokens], logits, atol=1e-4)
        compared += 1

    error = np.abs(loaded.run(images, policy=policy, observe=compare).logits - forced(model, images, policy)).max()
    assert compared == 2 * WIDE.depth
    assert error < (0.2 if wanted == "bf16" else 1e-4)


@given(values=st.lists(st.floats(-(2.0**126), 2.0**126, width=32), min_size=1))
def test_the_nearest_bfloat16(values: list[float]) -> None:
    array = np.array(values, np.float32)
    wanted = torch.from_numpy(array).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    np.testing.assert_array_equal(bf16_tensor_of(array).data.view(np.uint16), wanted)


def model_of(bundle: Path, dense: bool) -> Any:
    """The stem of a bundle as OpenVINO reads it, or its dense twin."""
    import openvino

    graphs = Graphs(Bundle.open(bundle))
    graph = graphs.dense() if dense else graphs.stem()
    return openvino.Core().read_model(graph.model(graph.arrays(graphs.tensors)))


def run_in_float32(model: Any, images: Any) -> Any:
    import openvino

    return openvino.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})([images])[0]


@pytest.mark.parametrize("dense", [False, True])
def test_the_unfold_of_pixels_is_an_operator(dense: bool, golden_bundles: Callable[[str], Path]) -> None:
    images, bundle = golden("t2t_small")[0][: 1 + 2 * dense], golden_bundles("t2t_small")
    changed = model_of(bundle, dense)
    unfold(changed)
    assert [node.get_type_name() for node in changed.get_ops()].count("ExtractImagePatches") == 1
    np.testing.assert_array_equal(run_in_float32(changed, images), run_in_float32(model_of(bundle, dense), images))


def test_large_layers_of_the_stem_alone_compute_in_bf16(golden_bundles: Callable[[str], Path]) -> None:
    images, model = golden("t2t_small")[0][:1], model_of(golden_bundles("t2t_small"), dense=False)
    compute_in_bf16(model)
    kinds = [node.get_type_name() for node in model.get_ops() if node.get_output_element_type(0).to_string() == "bf16"]
    assert [kinds.count(kind) for kind in ("MatMul", "Convolution")] == [1, 2]
    exact = run_in_float32(model_of(golden_bundles("t2t_small"), dense=False), images)
    assert np.abs(run_in_float32(model, images) - exact).max() / exact.std() < 0.1


@pytest.fixture(scope="module")
def converted(wide: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wide bundle in fp16 and int8, whose activations have a range that fits layer normalisations."""
    folder, source = tmp_path_factory.mktemp("converted"), Bundle.open(wide[0])
    weights = {name: value.numpy() for name, value in random_model(WIDE).state_dict().items()}
    blocks = range(WIDE.depth)
    halves, codes = dict(weights), dict(weights)
    for block in blocks:
        for layer, site in LINEAR.items():
            name = f"blocks.{block}.{layer}"
            scale = np.abs(weights[f"{name}.weight"]).max(1) / 127
            codes[f"{name}.weight"] = (weights[f"{name}.weight"] / scale[:, None]).round().astype(np.int8)
            codes |= {f"{name}.weight.scale": scale, f"{name}.weight.zero": np.zeros(len(scale), np.int8)}
            for prefix in ("", "dense."):
                codes[f"{prefix}blocks.{block}.{site}.input_scale"] = np.float32(4 / 127)
            for kind in ("weight", "bias"):
                if f"{name}.{kind}" in halves:
                    halves[f"{name}.{kind}"] = weights[f"{name}.{kind}"].astype(np.float16)
    files = []
    for name, tensors in (("fp16", halves), ("int8", codes)):
        parts = [(block, part) for block in blocks for part in ("attention", "mlp")]
        units = Units(dict.fromkeys(parts, Precision(name)))
        files.append(write_graphs(folder, name, WIDE, tensors, 20, True, lambda *_: None, units))
    about = {key: source.config[key] for key in ("name", "checkpoint")}
    describe_bundle(folder, files, WIDE, source.labels, source.preprocessor, about)
    return folder


def computed_as_written(bundle: Path, precision: str, images: np.ndarray) -> np.ndarray:
    """What the dense twin's graph makes, operator by operator."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    found = onnxruntime.InferenceSession(bundle / precision / "dense.onnx", options, ["CPUExecutionProvider"])
    return found.run(None, {"images": images})[0]


@pytest.mark.parametrize(("precision", "error"), [("fp16", 2e-3), ("int8", 0.1)])
def test_other_precisions(precision: str, error: float, converted: Path) -> None:
    images = random_images(WIDE, 3)
    ours = adavit.load(converted, "openvino", threads=1, precision=precision, specialise=False)
    theirs = adavit.load(converted, threads=1, precision=precision, specialise=False)
    result = theirs.run(images)
    for prepared in (False, True):
        if prepared:
            assert ours.specialise(result.policy) * theirs.specialise(result.policy) > 0
        wanted = theirs.run(images, policy=result.policy).logits
        np.testing.assert_allclose(ours.run(images, policy=result.policy).logits, wanted, atol=error)
    same = [(a == b).mean() for a, b in zip(ours.run(images).policy.masks(), result.policy.masks(), strict=True)]
    assert min(same) > 0.98
    wanted = computed_as_written(converted, precision, images)
    np.testing.assert_allclose(ours.run_dense(images), wanted, atol=error)


def test_precisions_that_are_not_there(tiny_bundle: Path, converted: Path) -> None:
    import openvino

    with pytest.raises(OptionError, match="no precision 'int7'; choose fp32 or bf16"):
        adavit.load(tiny_bundle, backend="openvino", provider="int7", threads=1)
    with pytest.raises(OptionError, match="int8 graphs as they are; bf16 is for fp32 ones"):
        adavit.load(converted, backend="openvino", provider="bf16", threads=1, precision="int8")
    if "BF16" not in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        with pytest.raises(BackendError, match=r"does not compute in bf16 .* choose fp32"):
            adavit.load(tiny_bundle, backend="openvino", provider="bf16", threads=1)


def test_a_graph_that_does_not_fit_is_refused_before_it_sees_it(bundle: Path) -> None:
    file = stored_files(bundle)["blocks.0.both"]
    model = onnx.load(bundle / file, load_external_data=False)
    node = next(node for node in model.graph.node if node.op_type == "Transpose")
    node.attribute[0].ints[:] = [0, 0, 0]
    rewrite_stored(bundle, file, model.SerializeToString())
    with pytest.raises(BundleError, match=r"blocks\.0\.both\.onnx: is not a graph of its architecture"):
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
    done = invoke(run, tiny_bundle, *short, "--batch", 2)
    assert (done.exit_code, done.stderr) == (0, "")
    assert "on openvino" in done.stdout
