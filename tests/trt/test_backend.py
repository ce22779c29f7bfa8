"""The TensorRT backend on a double that puts work off as a GPU does, and computes with ONNX Runtime."""

import gc
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cases import (
    DENSE,
    assert_same_policy,
    export,
    forced,
    invoke,
    oracle,
    random_images,
    random_model,
    random_policy,
    read_config,
    refusal,
    rewrite_stored,
    stored_files,
    tiny,
    write_config,
)
from double import CAPABILITY, VERSION, Gpu, add_double_engines, cuda_double, described_engine

import adavit
from adavit.cli import run as run_command
from adavit.errors import BackendError, BundleError, OptionError
from adavit.files import sha256
from adavit.model import AdaViT
from adavit.runtime import Policy, Runtime
from adavit.runtime.backends.cuda import backend as device_backend
from adavit.runtime.backends.cuda import bindings as cuda

TENSORRT = dict(backend="tensorrt", threads=2, trust_engines=True)
ON_GPU = ("--backend", "tensorrt", "--trust-engines")


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("parallel", ["operators", "samples"])
def test_the_same_results_as_in_onnx_runtime(
    built: Path, runtime: Runtime, gpu: Gpu, parallel: str, graphs: bool
) -> None:
    images = random_images(runtime.architecture, 4)
    on_gpu = adavit.load(built, **TENSORRT, parallel=parallel, cuda_graphs=graphs)
    wanted, dense = runtime.run(images), runtime.run_dense(images)
    launched = 0
    for _ in range(40 if graphs else 4):  # which worker gets which image, and so what runs again, is by chance
        found = on_gpu.run(images)
        assert_same_policy(found.policy, wanted.policy)
        np.testing.assert_allclose(found.logits, wanted.logits, atol=1e-4)
        np.testing.assert_array_equal(found.macs, wanted.macs)
        np.testing.assert_allclose(on_gpu.run_dense(images), dense, atol=1e-4)
        launched += "launch" in gpu.names()
        if launched == 3:
            break
    assert bool(launched) == graphs


@pytest.mark.parametrize("graphs", [False, True])
def test_a_model_without_policies(plain: tuple[Path, Path], tmp_path: Path, gpu: Gpu, graphs: bool) -> None:
    bundle = add_double_engines(shutil.copytree(plain[0], tmp_path / "plain"), max_batch=16)
    on_gpu, images = adavit.load(bundle, **TENSORRT, cuda_graphs=graphs), random_images(DENSE, 20)
    for _ in range(4):
        found = on_gpu.run(images)  # more than the engine takes at once
        np.testing.assert_allclose(found.logits, adavit.load(bundle, threads=1).run(images).logits, atol=1e-4)
    assert found.policy.usage()["tokens"] == 1


def test_any_policy_is_replayed(built: Path, runtime: Runtime, gpu: Gpu) -> None:
    on_gpu = adavit.load(built, **TENSORRT)
    for seed in range(6):
        images, policy = random_images(runtime.architecture, 3, seed), random_policy(runtime.architecture, 3, seed)
        np.testing.assert_allclose(on_gpu.run(images, policy).logits, runtime.run(images, policy).logits, atol=1e-4)


def test_from_many_threads(built: Path, runtime: Runtime, gpu: Gpu) -> None:
    on_gpu = adavit.load(built, **TENSORRT, parallel="samples")
    batches = [random_images(runtime.architecture, 2, seed) for seed in range(12)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(on_gpu.run, batches))
    for result, images in zip(found, batches, strict=True):
        np.testing.assert_allclose(result.logits, runtime.run(images).logits, atol=1e-4)


def test_results_stay_when_other_images_are_run(built: Path, runtime: Runtime, gpu: Gpu) -> None:
    on_gpu = adavit.load(built, **TENSORRT)
    first, second = (random_images(runtime.architecture, 2, seed) for seed in (1, 2))
    kept = on_gpu.run(first).logits
    copy = kept.copy()
    on_gpu.run(second)
    del on_gpu
    gc.collect()
    np.testing.assert_array_equal(kept, copy)


MODELS = [
    {"token_policy": False},
    {"head_policy": False},
    {"sublayer_policy": False},
    {"qkv_bias": False, "keep": 0},
    {"keep": 3},
]


@pytest.mark.parametrize("changes", MODELS, ids=str)
def test_any_model_computes_what_the_masked_one_does(changes: dict[str, Any], tmp_path: Path, gpu: Gpu) -> None:
    model = random_model(tiny(**changes))
    on_gpu = adavit.load(add_double_engines(export(model, tmp_path, verify=False)), **TENSORRT)
    images = random_images(model.arch, 3)
    logits, policy, _ = oracle(model, images)
    found = on_gpu.run(images)
    assert_same_policy(found.policy, policy)
    np.testing.assert_allclose(found.logits, logits, atol=1e-4)
    policy = random_policy(model.arch, 3, 0)
    np.testing.assert_allclose(on_gpu.run(images, policy).logits, forced(model, images, policy), atol=1e-4)


def test_blocks_without_heads_are_exact(built: Path, model: AdaViT, gpu: Gpu) -> None:
    """Engines take arrays of one head at least."""
    arch = model.arch
    on_gpu, images = adavit.load(built, **TENSORRT), random_images(arch, 4)
    policy = Policy.dense(arch, 4)
    policy.heads[:, arch.keep :] = False
    policy.sublayers[1, arch.keep :, 0] = policy.sublayers[2, arch.keep :, 1] = False
    np.testing.assert_allclose(on_gpu.run(images, policy).logits, forced(model, images, policy), atol=1e-4)


def test_decisions_come_back_once_a_block_and_logits_once(built: Path, runtime: Runtime, gpu: Gpu) -> None:
    on_gpu = adavit.load(built, **TENSORRT, parallel="operators")
    images = random_images(runtime.architecture, 2)
    on_gpu.run(images)
    gpu.calls.clear()
    result = on_gpu.run(images)
    arch = runtime.architecture
    decisions = [4 * on_gpu.graphs.decisions(block) for block in range(arch.depth)]
    assert sorted(copied(gpu, 2)) == sorted(2 * [*decisions, 4 * arch.classes])
    # One wait for each image's block, one for its logits; others are for uploads that were done before.
    waits = [i for i, (call, _) in enumerate(gpu.calls) if call == "synchronise"]
    fetches = [i for i in waits if gpu.calls[i - 1][0] == "copy" and gpu.calls[i - 1][1][0] == 2]
    assert len(fetches) == 2 * (arch.depth + 1)
    runs = [detail for call, detail in gpu.calls if call == "run"]
    assert len(runs) == 2 * (arch.depth + 1)
    assert result.macs.shape == (2,)


def copied(gpu: Gpu, kind: int) -> list[int]:
    """Bytes of the copies to the device (1) or to the host (2)."""
    return [detail[1] for call, detail in gpu.calls if call == "copy" and detail[0] == kind]


def test_weights_of_heads_are_put_on_the_device_once(built: Path, runtime: Runtime, gpu: Gpu) -> None:
    arch = runtime.architecture
    on_gpu, images, policy = adavit.load(built, **TENSORRT), random_images(arch, 1), random_policy(arch, 1, 0)
    policy.sublayers[:] = True
    for _ in range(2):  # a set of heads is kept from its second use on
        on_gpu.run(images, policy)
    gpu.calls.clear()
    on_gpu.run(images, policy)
    kept = (8 * policy.tokens.sum(2)).ravel().tolist()
    assert sorted(copied(gpu, 1)) == sorted([images.nbytes, *kept])


def test_weights_that_all_sets_of_heads_share_are_on_the_device_once(built: Path, runtime: Runtime, gpu: Gpu) -> None:
    arch = runtime.architecture
    on_gpu, images, policy = adavit.load(built, **TENSORRT), random_images(arch, 1), Policy.dense(arch, 1)
    on_gpu.run(images, policy)
    for head in range(arch.heads):
        policy.heads[:, arch.keep :] = np.arange(arch.heads) != head
        on_gpu.run(images, policy)
    assert copied(gpu, 1).count(4 * arch.width * arch.hidden) == 2 * arch.depth  # fc1 of all heads, and fc2


def test_memory_is_used_again(built: Path, runtime: Runtime, gpu: Gpu) -> None:
    on_gpu, images = adavit.load(built, **TENSORRT), random_images(runtime.architecture, 3)
    for _ in range(2):
        on_gpu.run(images)
        on_gpu.run_dense(images)
    before = len(gpu.memory)
    for _ in range(3):
        on_gpu.run(images)
        on_gpu.run_dense(images)
    assert len(gpu.memory) == before


def test_weights_of_heads_beyond_the_budget(
    built: Path, runtime: Runtime, gpu: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is put out is used again, while runs that read it may still wait their turn."""
    monkeypatch.setattr(device_backend, "HEADS", 40_000)
    on_gpu = adavit.load(built, **TENSORRT, parallel="samples")
    for seed in range(8):
        images, policy = random_images(runtime.architecture, 4, seed), random_policy(runtime.architecture, 4, seed)
        np.testing.assert_allclose(on_gpu.run(images, policy).logits, runtime.run(images, policy).logits, atol=1e-4)


def test_observers_are_shown_tokens(built: Path, runtime: Runtime, gpu: Gpu) -> None:
    images, shown, wanted = random_images(runtime.architecture, 1), [], []
    runtime.run(images, observe=lambda step: wanted.append(step.tokens.copy()))
    adavit.load(built, **TENSORRT).run(images, observe=lambda step: shown.append(step.tokens.copy()))
    np.testing.assert_allclose(np.stack(shown), np.stack(wanted), atol=1e-4)


def test_nothing_is_set_again_that_is_the_same(built: Path, runtime: Runtime, gpu: Gpu) -> None:
    arch, name = runtime.architecture, "blocks.1.mlp"
    on_gpu, images, policy = adavit.load(built, **TENSORRT), random_images(arch, 1), Policy.dense(arch, 1)
    policy.sublayers[:, arch.keep :, 0] = False
    used = []
    for few in (True, False):
        policy.tokens[:] = np.arange(arch.tokens) < 3 if few else True
        on_gpu.run(images, policy)
        used.append([detail[1] for call, detail in gpu.calls if call == "profile" and detail[0] == name])
    assert used == [[0], [0, 1]]
    gpu.calls.clear()
    on_gpu.run(images, policy)
    mine = [call for call, detail in gpu.calls if detail == name or (isinstance(detail, tuple) and detail[0] == name)]
    assert set(mine) == {"address", "run"}  # neither profile nor shapes are set again


@pytest.mark.skipif(not hasattr(os, "fork"), reason="cannot fork")
def test_a_forked_child_leaves_the_device_alone(built: Path, runtime: Runtime, gpu: Gpu) -> None:
    on_gpu, images = adavit.load(built, **TENSORRT), random_images(runtime.architecture, 1)
    wanted = on_gpu.run(images).logits
    calls = len(gpu.calls)
    if (child := os.fork()) == 0:
        try:
            with pytest.raises(BackendError, match="does not survive a fork"):
                on_gpu.run(images)
            del on_gpu
            gc.collect()
            os._exit(0 if len(gpu.calls) == calls and gpu.alive["engine"] else 1)
        finally:
            os._exit(2)
    assert os.waitpid(child, 0)[1] == 0
    np.testing.assert_array_equal(on_gpu.run(images).logits, wanted)


def test_everything_is_freed_once_in_the_right_order(built: Path, runtime: Runtime, gpu: Gpu) -> None:
    on_gpu = adavit.load(built, **TENSORRT, cuda_graphs=True, parallel="samples")
    for _ in range(4):
        on_gpu.run(random_images(runtime.architecture, 3))
        on_gpu.run_dense(random_images(runtime.architecture, 3))
    assert gpu.alive["exec"] and gpu.alive["context"] and gpu.alive["engine"]
    del on_gpu
    gc.collect()
    assert not gpu.memory
    assert set(gpu.alive.values()) == {0}
    order = gpu.names("graph freed", "context freed", "engine freed", "stream freed")
    last = {name: len(order) - 1 - order[::-1].index(name) for name in set(order)}
    assert last["graph freed"] < last["engine freed"] < last["stream freed"] == len(order) - 1


def test_memory_is_freed_with_the_runtime(built: Path, runtime: Runtime, gpu: Gpu) -> None:
    """At once, not when Python next looks for cycles."""
    on_gpu = adavit.load(built, **TENSORRT, specialise=False)
    on_gpu.run(random_images(runtime.architecture, 1))
    gc.collect()
    gc.disable()
    try:
        del on_gpu
        assert not gpu.memory and not gpu.alive["engine"] and not gpu.alive["stream"]
    finally:
        gc.enable()


@pytest.mark.parametrize("refused", ["engine", "context", "shape", "run"])
def test_what_tensorrt_refuses_is_an_error(built: Path, runtime: Runtime, gpu: Gpu, refused: str) -> None:
    gpu.refuse.add(refused)
    with pytest.raises(BackendError) as caught:
        adavit.load(built, **TENSORRT).run(random_images(runtime.architecture, 1))
    assert "engine stem" in str(caught.value)
    if refused == "engine":
        assert "the magic tag is another" in str(caught.value)
        assert "adavit-export" in str(caught.value)


def test_more_images_than_the_dense_twin_takes_at_once(built: Path, runtime: Runtime, gpu: Gpu) -> None:
    on_gpu, images = adavit.load(built, **TENSORRT), random_images(runtime.architecture, 19)
    gpu.calls.clear()
    np.testing.assert_allclose(on_gpu.run_dense(images), runtime.run_dense(images), atol=1e-5, rtol=0)
    assert [detail for call, detail in gpu.calls if call == "run"] == ["dense"] * 3


def test_shapes_that_an_engine_was_not_built_for(bundle: Path, runtime: Runtime, gpu: Gpu) -> None:
    add_double_engines(bundle)
    path = bundle / "tensorrt/double/blocks.0.both.engine"
    header, _, model = path.read_bytes().partition(b"\n")
    about = json.loads(header)
    about["profiles"][0]["tokens"] = [[1], [1], [2]]
    data = json.dumps(about).encode() + b"\n" + model
    path.write_bytes(data)
    config = read_config(bundle)
    described_engine(config, "blocks.0.both").update(bytes=len(data), sha256=sha256(data))
    write_config(bundle, config)
    images, policy = random_images(runtime.architecture, 1), Policy.dense(runtime.architecture, 1)
    with pytest.raises(BackendError, match=r"engine blocks.0.both was not built for such shapes: .*tokens \[17\]"):
        adavit.load(bundle, **TENSORRT).run(images, policy)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"version": "10.1.0"}, "tensorrt 10.1.0"),
        ({"platform": "win32_amd64"}, "on win32_amd64"),
        ({"compute_capabilities": [86, 89]}, "compute capability 86, 89"),
        ({"flavour": "tensorrt-rtx"}, "no tensorrt"),
        ({"precision": "int8"}, "in int8"),
    ],
)
def test_engines_of_another_machine(bundle: Path, gpu: Gpu, changes: dict[str, object], named: str) -> None:
    add_double_engines(bundle, **changes)
    with pytest.raises(BackendError) as caught:
        adavit.load(bundle, **TENSORRT)
    message = str(caught.value)
    assert named in message
    assert f"this machine is tensorrt {VERSION} on " in message
    assert f"compute capability {CAPABILITY} and runs fp32" in message
    assert message.endswith(f"run: adavit-export {bundle} --target tensorrt")


@pytest.mark.parametrize(
    "changes",
    [
        {"hardware_compatible": True, "compute_capabilities": [80]},
        {"compute_capabilities": [80, CAPABILITY]},
    ],
)
def test_engines_that_fit(bundle: Path, gpu: Gpu, changes: dict[str, object]) -> None:
    assert adavit.load(add_double_engines(bundle, **changes), **TENSORRT).backend.versions()["engine_set"] == "double"


def test_altered_engines_are_not_deserialised(built: Path, gpu: Gpu) -> None:
    path = built / "tensorrt/double/stem.engine"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(BundleError, match=r"stem\.engine: altered"):
        adavit.load(built, **TENSORRT)
    assert gpu.alive["engine"] == 0


@pytest.mark.parametrize("name", ["stem", "blocks.1.none", "blocks.2.mlp"])
def test_engines_of_another_graph(built: Path, gpu: Gpu, name: str) -> None:
    config = read_config(built)
    engine = described_engine(config, name)
    engine["source"] = "0" * 64
    write_config(built, config)
    with pytest.raises(BackendError, match=f"{name} was built from another graph"):
        adavit.load(built, **TENSORRT)
    config["engine_sets"]["double"]["engines"].remove(engine)
    write_config(built, config)
    with pytest.raises(BundleError, match=f"double has no engine {name}"):
        adavit.load(built, **TENSORRT)


def test_engines_of_other_weights(built: Path, gpu: Gpu) -> None:
    file = stored_files(built)["weights"]
    data = bytearray((built / file).read_bytes())
    data[-1] ^= 1
    rewrite_stored(built, file, bytes(data))
    with pytest.raises(BackendError, match="was built from another graph"):
        adavit.load(built, **TENSORRT)


def test_engines_know_their_graph_by_their_role_alone(built: Path, runtime: Runtime, gpu: Gpu) -> None:
    """Whatever their files are called."""
    config = read_config(built)
    for number, engine in enumerate(config["engine_sets"]["double"]["engines"]):
        (built / engine["file"]).rename(built / f"tensorrt/double/{number}.bin")
        engine["file"] = f"tensorrt/double/{number}.bin"
    write_config(built, config)
    images = random_images(runtime.architecture, 2)
    found = adavit.load(built, **TENSORRT).run(images)
    np.testing.assert_allclose(found.logits, runtime.run(images).logits, atol=1e-4)


STORED = {"file": "a", "bytes": 1, "sha256": "0" * 64, "source": "0" * 64}
BLOCK = {"role": "block", "block": 1, "attention": True, "mlp": True, **STORED}
DAMAGED = {
    "version": ["../../../tmp/evil.1", "10.0/../x", "10.13.0\n", "", "1" * 40, "1.", "10.x", "\u0661.0", 10, None],
    "platform": ["linux/x86", "", 3, "x" * 99],
    "flavour": ["", "tensorrt/..", 1],
    "compute_capabilities": ["86", [True], [86.0], ["86"], [-1], 86, [10**9]],
    "precision": ["fp64", "", None, ["fp32"]],
    "engines": [{}, None, [{}], [STORED], [BLOCK | {"role": "blocks"}], [BLOCK | {"role": ["stem"]}], [BLOCK, BLOCK],
                [BLOCK | {"block": "1"}], [BLOCK | {"block": -1}], [BLOCK | {"block": True}], [BLOCK | {"mlp": 1}],
                [BLOCK | {"bytes": "1"}], [BLOCK | {"sha256": "0"}], [BLOCK | {"source": None}], ["stem"]],
}  # fmt: skip


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, values in DAMAGED.items() for value in values])
def test_a_damaged_description_of_engines(bundle: Path, gpu: Gpu, field: str, value: object) -> None:
    """Of any flavour: a part of it may name a library's file."""
    add_double_engines(bundle)
    config = read_config(bundle)
    config["engine_sets"]["other"] = {**config["engine_sets"]["double"], "flavour": "tensorrt-rtx", field: value}
    write_config(bundle, config)
    with pytest.raises(BundleError, match="engine_sets are damaged"):
        adavit.load(bundle, **TENSORRT)
    del config["engine_sets"]["other"][field]
    write_config(bundle, config)
    with pytest.raises(BundleError, match="engine_sets are damaged"):
        adavit.load(bundle, **TENSORRT)


@pytest.mark.parametrize("key", ["../x", "", "a b", "k" * 300, "-x"])
def test_a_damaged_key_of_engines(built: Path, gpu: Gpu, key: str) -> None:
    config = read_config(built)
    config["engine_sets"][key] = config["engine_sets"]["double"]
    write_config(built, config)
    with pytest.raises(BundleError, match="engine_sets are damaged"):
        adavit.load(built, **TENSORRT)


def test_the_command_tells_enqueuing_from_the_gpu_from_waiting(built: Path, gpu: Gpu) -> None:
    arguments = [built, *ON_GPU, "--iterations", 3, "--warmup", 1, "--threads", 1, "--cuda-graphs"]
    done = invoke(run_command, *arguments, "--json", "-")
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert set(report["device"]) == {"enqueue_ms", "gpu_ms", "sync_ms"}
    blocks = read_config(built)["architecture"]["depth"]
    assert report["device"]["gpu_ms"] == pytest.approx(0.25 * (blocks + 1))
    done = invoke(run_command, *arguments)
    assert "enqueuing" in done.stdout and "waiting for it" in done.stdout


def test_without_a_gpu_or_bindings_there_is_one_line(built: Path, gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu.refuse.add("device")
    message = refusal(invoke(run_command, built, *ON_GPU))
    assert "no NVIDIA GPU can be used here: cudaGetDeviceCount failed: a reason (CUDA error 100)" in message
    monkeypatch.undo()
    monkeypatch.setitem(__import__("sys").modules, "tensorrt", None)
    assert "pip install 'adavit[tensorrt]'" in refusal(invoke(run_command, built, *ON_GPU))


def test_bindings_that_raise_without_a_driver(built: Path, gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise RuntimeError("Failed to dlopen libcuda.so.1")

    bindings = cuda_double(gpu)
    monkeypatch.setattr(bindings, "cudaGetDeviceCount", missing)
    monkeypatch.setattr(cuda, "import_runtime", lambda: bindings)
    message = refusal(invoke(run_command, built, "--backend", "tensorrt"))
    assert "no NVIDIA GPU can be used here: Failed to dlopen libcuda.so.1" in message


def test_what_the_backend_has_not(built: Path, gpu: Gpu) -> None:
    with pytest.raises(OptionError, match="tensorrt has no providers"):
        adavit.load(built, **TENSORRT, provider="CUDAExecutionProvider")
    with pytest.raises(OptionError, match="onnxruntime has no CUDA graphs"):
        adavit.load(built, cuda_graphs=True)
