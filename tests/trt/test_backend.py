"""The TensorRT backend on a double that puts work off as a GPU does, and computes with ONNX Runtime."""

import gc
import json
import os
import shutil
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from cases import (
    DENSE,
    forced,
    invoke,
    random_images,
    random_policy,
    read_config,
    refusal,
    rewrite_stored,
    stored_files,
    write_config,
)
from double import CAPABILITY, VERSION, Gpu, add_double_engines, cuda_double, described_engine

import adavit
from adavit.bundle.engine_sets import packed_engine
from adavit.cli import run as run_command
from adavit.errors import BackendError, BundleError, OptionError
from adavit.files import sha256
from adavit.model import AdaViT
from adavit.runtime import Policy, Runtime
from adavit.runtime.backends.cuda import bindings as cuda

TENSORRT = dict(backend="tensorrt", threads=2, trust_engines=True)
ON_GPU = ("--backend", "tensorrt", "--trust-engines")


@pytest.mark.parametrize("way", ["auto", "exact", "conditional"])
def test_a_model_without_policies(plain: tuple[Path, Path], tmp_path: Path, gpu: Gpu, way: str) -> None:
    """There is one way to run it."""
    bundle = add_double_engines(shutil.copytree(plain[0], tmp_path / "plain"), max_batch=16)
    on_gpu, images = adavit.load(bundle, **TENSORRT, dispatch=way), random_images(DENSE, 20)
    found = on_gpu.run(images)  # more than the engine takes at once
    np.testing.assert_allclose(found.logits, adavit.load(bundle, threads=1).run(images).logits, atol=1e-4)
    assert found.policy.usage()["tokens"] == 1


def test_results_stay_when_other_images_are_run(built: Path, runtime: Runtime, gpu: Gpu) -> None:
    on_gpu = adavit.load(built, **TENSORRT)
    first, second = (random_images(runtime.architecture, 2, seed) for seed in (1, 2))
    kept = on_gpu.run(first).logits
    copy = kept.copy()
    on_gpu.run(second)
    del on_gpu
    gc.collect()
    np.testing.assert_array_equal(kept, copy)


def test_blocks_without_heads_are_exact(built: Path, model: AdaViT, gpu: Gpu) -> None:
    """Engines have rows for one image at least."""
    arch = model.arch
    on_gpu, images = adavit.load(built, **TENSORRT), random_images(arch, 4)
    policy = Policy.dense(arch, 4)
    policy.heads[:, arch.keep :] = False
    policy.sublayers[1, arch.keep :, 0] = policy.sublayers[2, arch.keep :, 1] = False
    np.testing.assert_allclose(on_gpu.run(images, policy).logits, forced(model, images, policy), atol=1e-4)


def test_what_comes_back_of_a_batch(built: Path, runtime: Runtime, gpu: Gpu) -> None:
    """Sizes once a block, then policies and logits at once, however many images there are."""
    on_gpu, arch = adavit.load(built, **TENSORRT, dispatch="exact"), runtime.architecture
    for batch in (1, 8):
        images = random_images(arch, batch)
        on_gpu.run(images)
        gpu.calls.clear()
        result = on_gpu.run(images)
        up, back = copied(gpu, 1), copied(gpu, 2)
        assert back[:-1] == [32] * arch.depth
        policy = arch.depth * batch * (arch.tokens + arch.heads + 2)
        assert policy <= back[-1] <= policy + 4 * batch * arch.classes + 256 * 4 * arch.depth
        assert images.nbytes <= sum(up) <= images.nbytes + arch.depth * (12 * batch + 256) and len(up) == 1
        assert result.macs.shape == (batch,)


def copied(gpu: Gpu, kind: int) -> list[int]:
    """Bytes of the copies to the device (1) or to the host (2)."""
    return [detail[1] for call, detail in gpu.calls if call == "copy" and detail[0] == kind]


def test_memory_is_used_again(built: Path, runtime: Runtime, gpu: Gpu) -> None:
    on_gpu, images = adavit.load(built, **TENSORRT), random_images(runtime.architecture, 3)
    for _ in range(4):
        on_gpu.run(images)
        on_gpu.run_dense(images)
    before = len(gpu.memory)
    for _ in range(3):
        on_gpu.run(images)
        on_gpu.run_dense(images)
    assert len(gpu.memory) == before


def test_nothing_is_set_again_that_is_the_same(built: Path, runtime: Runtime, gpu: Gpu) -> None:
    arch, name = runtime.architecture, "blocks.1"
    on_gpu, policy = adavit.load(built, **TENSORRT, dispatch="exact"), Policy.dense(arch, 2)

    def asked(images: int, few: int) -> dict[str, int]:
        """What is asked of a block's engine, where the images keep the first `few` tokens."""
        policy.tokens[:] = np.arange(arch.tokens) < few
        gpu.calls.clear()
        on_gpu.run(random_images(arch, images), policy[:images])
        mine = [call for call, detail in gpu.calls if detail == name or (isinstance(detail, tuple) and name in detail)]
        return dict(Counter(mine))

    first = asked(2, 3)
    assert (first["profile"], first["run"]) == (1, 1)
    assert asked(2, 3) == {"run": 1}
    assert asked(2, 5) == {"shape": 3, "run": 1}, "rows of attention, of one image and of the MLP"
    assert asked(1, 5)["profile"] == 1, "single images have a profile of their own"
    assert asked(1, 5) == {"run": 1}


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
    on_gpu = adavit.load(built, **TENSORRT, dispatch="conditional")
    for _ in range(4):
        on_gpu.run(random_images(runtime.architecture, 3))
        on_gpu.run(random_images(runtime.architecture, 3), random_policy(runtime.architecture, 3, 0))
        on_gpu.run_dense(random_images(runtime.architecture, 3))
    assert gpu.alive["exec"] and gpu.alive["context"] and gpu.alive["engine"]
    del on_gpu
    gc.collect()
    assert not gpu.memory
    assert set(gpu.alive.values()) == {0}
    order = gpu.names("graph freed", "context freed", "engine freed", "stream freed")
    last = {name: len(order) - 1 - order[::-1].index(name) for name in set(order)}
    assert last["graph freed"] < last["context freed"] < last["stream freed"], "a lane's own, one after the other"
    assert order.index("engine freed") > last["stream freed"], "engines are of all lanes"


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


@pytest.mark.parametrize("name", ["stem", "blocks.1"])
def test_shapes_that_an_engine_was_not_built_for(bundle: Path, runtime: Runtime, gpu: Gpu, name: str) -> None:
    config = read_config(add_double_engines(bundle))
    engine = described_engine(config, name)
    header, _, model = zlib.decompress((bundle / engine["file"]).read_bytes()).partition(b"\n")
    about = json.loads(header)
    shapes = about["profiles"][1]["images" if name == "stem" else "attention_rows"]
    shapes[2] = [1, *shapes[2][1:]]
    data = json.dumps(about).encode() + b"\n" + model
    packed = packed_engine(data)
    (bundle / engine["file"]).write_bytes(packed)
    engine.update(bytes=len(packed), unpacked_bytes=len(data), sha256=sha256(packed))
    write_config(bundle, config)
    images, policy = random_images(runtime.architecture, 2), Policy.dense(runtime.architecture, 2)
    with pytest.raises(BackendError, match=rf"engine {name} was not built for such shapes: .* \["):
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


@pytest.mark.parametrize("name", ["stem", "blocks.1", "blocks.2"])
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


STORED = {"file": "a", "bytes": 1, "unpacked_bytes": 1, "sha256": "0" * 64, "source": "0" * 64}
BLOCK = {"role": "block", "block": 1, **STORED}
DAMAGED = {
    "version": ["../../../tmp/evil.1", "10.0/../x", "10.13.0\n", "", "1" * 40, "1.", "10.x", "\u0661.0", 10, None],
    "platform": ["linux/x86", "", 3, "x" * 99],
    "flavour": ["", "tensorrt/..", 1],
    "compute_capabilities": ["86", [True], [86.0], ["86"], [-1], 86, [10**9]],
    "precision": ["fp64", "", None, ["fp32"]],
    "engines": [{}, None, [{}], [STORED], [BLOCK | {"role": "blocks"}], [BLOCK | {"role": ["stem"]}], [BLOCK, BLOCK],
                [BLOCK | {"block": "1"}], [BLOCK | {"block": -1}], [BLOCK | {"block": True}],
                [BLOCK | {"part": "heads"}], [BLOCK | {"part": 1}], [BLOCK | {"part": ["mlp"]}],
                [BLOCK | {"heads": [9]}], [BLOCK | {"heads": []}], [BLOCK | {"heads": "0"}],
                [BLOCK, BLOCK | {"heads": [1, 0]}], [BLOCK, BLOCK | {"heads": [True]}], [BLOCK | {"heads": [0]}],
                [BLOCK | {"unpacked_bytes": None}], [BLOCK | {"bytes": "1"}], [BLOCK | {"sha256": "0"}],
                [BLOCK | {"source": None}], ["stem"]],
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
    arguments = [built, *ON_GPU, "--iterations", 3, "--warmup", 1, "--threads", 1, "--dispatch", "exact"]
    done = invoke(run_command, *arguments, "--json", "-")
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert set(report["device"]) == {"enqueue_ms", "gpu_ms", "sync_ms"}
    assert report["device"]["gpu_ms"] == pytest.approx(0.25), "from the first copy to the last"
    done = invoke(run_command, *arguments)
    assert "enqueuing" in done.stdout and "waiting for it" in done.stdout


def test_without_a_gpu_or_bindings_there_is_one_line(built: Path, gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu.refuse.add("device")
    message = refusal(invoke(run_command, built, *ON_GPU))
    assert "no NVIDIA GPU can be used here: cudaGetDeviceCount failed: a reason (CUDA error 100)" in message
    assert "nvidia-smi shows GPUs and their driver" in message
    monkeypatch.undo()
    monkeypatch.setitem(__import__("sys").modules, "tensorrt", None)
    message = refusal(invoke(run_command, built, *ON_GPU))
    assert "pip install 'adavit[tensorrt]'" in message and "NVIDIA's index https://pypi.nvidia.com" in message


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
