"""Real builds with TensorRT-RTX, whose builder needs no GPU."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest
from cases import (
    export,
    invoke,
    quiet,
    random_model,
    read_config,
    refusal,
    rewrite_stored,
    stored_files,
    tiny,
    write_config,
)
from onnx import helper

from adavit.bundle.bundle import Bundle
from adavit.bundle.demo import demo_bundle
from adavit.bundle.engine_set import EngineKey
from adavit.bundle.engine_sets import engine_sets, read_engine, source_of
from adavit.bundle.graph_keys import GraphKey, constants_of, graph_keys, part_keys, read_graph
from adavit.bundle.graphs import Graphs
from adavit.bundle.policy import Policy
from adavit.bundle.statistics import write_statistics
from adavit.bundle.trust import built_here
from adavit.calibration.options import CalibrationOptions
from adavit.cli import export as export_command
from adavit.errors import BackendError, BundleError, InputError
from adavit.export import ExportOptions, export_bundle
from adavit.files import folder_beside, sha256
from adavit.runtime.backends.cuda.bindings import Cuda
from adavit.tensorrt import build, worker
from adavit.tensorrt.build import add_engines
from adavit.tensorrt.options import BuildOptions

pytest.importorskip("tensorrt_rtx", reason="pip install 'adavit[tensorrt-rtx]' to build engines")
pytest.importorskip("polygraphy", reason="pip install 'adavit[tensorrt-rtx]' to build engines")

RTX = BuildOptions(target=("tensorrt-rtx",), jobs=2)
SINGLE = replace(RTX, max_batch=1)
"""Of one profile, which takes half the time to build."""
PRECISIONS = ("fp32", "fp16", "int8")
WIDE = tiny(width=192, depth=2)


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of few engines."""
    return export(random_model(tiny(head_policy=False, depth=2)), tmp_path_factory.mktemp("few"), verify=False)


@pytest.fixture
def bundle(few: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return shutil.copytree(few, tmp_path / "bundle")


def assert_complete(bundle: Path, reports: dict[str, Any], parts: bool = False) -> dict[str, Any]:
    """The last set has every graph, of the reported and described sizes and hashes, shapes within profiles."""
    built, made = engine_sets(Bundle.open(bundle))[-1], list(reports.values())[-1]
    opened = Bundle.open(bundle)
    graphs = Graphs(opened, built.precision)
    assert made["precision"] == built.precision
    assert list(made["engines"]) == [key.name for key in built.engines]
    wanted = graph_keys(graphs.files) + part_keys(graphs.files) * parts
    assert list(dict.fromkeys(key.graph for key in built.engines)) == wanted
    for key, stored in built.engines.items():
        data = (bundle / stored.file).read_bytes()
        found = made["engines"][key.name]
        assert (stored.bytes, stored.sha256) == (len(data), sha256(data)) == (found["bytes"], found["sha256"])
        assert len(read_engine(opened, stored)) == stored.unpacked_bytes > stored.bytes
        assert stored.source == source_of(graphs.files, key.graph)
        assert found["layers"] and found["seconds"] > 0
        assert sum(found["precisions"].values()) == len(found["layers"])
        graph = read_graph(graphs, key.graph)
        given = {value.name for value in graph.inputs} - set(constants_of(graphs, key.graph, graph))
        for profile in found["profiles"]:
            assert set(profile) == given
            for least, tuned, most in profile.values():
                assert all(1 <= a <= b <= c for a, b, c in zip(least, tuned, most, strict=True))
    assert built_here(built.fingerprint)
    assert (
        json.loads((bundle / next(iter(built.engines.values())).file).with_name("report.json").read_text()).keys()
        == made.keys()
    )
    return dict(made["engines"])


def computing(engine: dict[str, Any]) -> set[str]:
    """The types that an engine computes with, whole numbers and truth values left out."""
    found = {part for precision in engine["precisions"] for part in precision.split("+")}
    return found - {"int64", "int32", "bool"}


def converted_blocks(bundle: Path, precision: str) -> dict[int, set[str]]:
    """Of each block, the types of its linear layers' weights; of what no image reaches, these stay in fp32."""
    graphs = Graphs(Bundle.open(bundle), precision)
    names = ("attn.proj.weight", "mlp.fc2.weight")
    tensors = graphs.tensors.tensors
    return {
        block: {tensors[f"blocks.{block}.{name}"].dtype for name in names} for block in range(graphs.architecture.depth)
    }


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The demo in every precision, with a set of engines for each, and the report of their build."""
    folder, pictures = demo_bundle(), demo_bundle().with_name("images")
    bundle = tmp_path_factory.mktemp("demo") / "bundle"
    calibration = CalibrationOptions(PRECISIONS, (pictures,), samples=16, method="max")
    options = ExportOptions(verify=False, threads=2, calibration=calibration)
    export_bundle(folder / "fp32/model.safetensors", bundle, options, quiet)
    return bundle, add_engines(bundle, RTX, quiet)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_engine_of_the_demo_is_built(demo: tuple[Path, dict[str, Any]], precision: str) -> None:
    bundle, reports = demo
    until = PRECISIONS.index(precision) + 1
    described = read_config(bundle)
    sets = dict(list(described["engine_sets"].items())[:until])
    write_config(bundle, described | {"engine_sets": sets})
    engines = assert_complete(bundle, dict(list(reports.items())[:until]))
    write_config(bundle, described)
    assert list(engines) == ["stem", *(f"blocks.{block}" for block in range(8)), "dense"]
    assert computing(engines["stem"]) == {"float32"}
    for block, weights in converted_blocks(bundle, precision).items():
        found = computing(engines[f"blocks.{block}"])
        # Sums, normalisation, softmax and decisions stay in float32.
        assert found == {"float32"} | weights & {"float16", "int8"}, block
    built = engine_sets(Bundle.open(bundle))
    files = {engine.file for found in built for engine in found.engines.values()}
    assert files == {str(path.relative_to(bundle)) for path in bundle.glob("tensorrt/*/*.engine")}


def test_each_precision_of_a_bundle_gets_a_set(bundle: Path) -> None:
    """Of graphs that are the same here, which nothing but their place tells apart."""
    shutil.copytree(bundle / "fp32", bundle / "fp16")
    config = read_config(bundle)
    text = json.dumps(config["precisions"]["fp32"]).replace('"fp32/', '"fp16/')
    config["precisions"]["fp16"] = json.loads(text)
    write_config(bundle, config)
    reports = add_engines(bundle, SINGLE, quiet)
    assert [report["precision"] for report in reports.values()] == ["fp32", "fp16"]
    found = engine_sets(Bundle.open(bundle))
    assert [built.precision for built in found] == ["fp32", "fp16"]
    assert found[0].fingerprint != found[1].fingerprint
    files = [{engine.file for engine in built.engines.values()} for built in found]
    assert files[0].isdisjoint(files[1])


def test_every_engine_of_a_t2t_model(golden_bundles: Callable[[str], Path], tmp_path: Path) -> None:
    bundle = shutil.copytree(golden_bundles("t2t_small"), tmp_path / "bundle")
    engines = assert_complete(bundle, add_engines(bundle, SINGLE, quiet))
    assert all(computing(engine) == {"float32"} for engine in engines.values())


def test_engines_are_built_with_the_export(checkpoint: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    done = invoke(export_command, checkpoint, "--output", bundle, "--no-verify", "--target", "tensorrt-rtx")
    assert done.exit_code == 0, done.output
    found = Bundle.open(bundle)
    assert [key.graph for key in engine_sets(found)[0].engines] == graph_keys(found.files_of())
    assert "built       tensorrt-rtx-" in done.stdout


def test_a_model_without_policies_has_one_engine_to_build(plain: tuple[Path, Path], tmp_path: Path) -> None:
    bundle = shutil.copytree(plain[0], tmp_path / "plain")
    assert set(assert_complete(bundle, add_engines(bundle, SINGLE, quiet))) == {"dense"}


def test_sets_lie_side_by_side_in_the_order_of_their_builds_and_one_of_the_same_key_is_replaced(bundle: Path) -> None:
    before = {path: path.read_bytes() for path in bundle.rglob("*") if path.name.endswith((".onnx", ".txt"))}
    for capability in ("86", "120", "86"):
        options = ("--compute-capability", capability, "--max-batch", 1, "--jobs", 2)
        done = invoke(export_command, bundle, "--target", "tensorrt-rtx", *options)
        assert done.exit_code == 0, done.output
    found = engine_sets(Bundle.open(bundle))
    assert [built.compute_capabilities for built in found] == [(120,), (86,)]
    kept = {str(Path(engine.file).parent) for built in found for engine in built.engines.values()}
    assert kept == {str(path.relative_to(bundle)) for path in (bundle / "tensorrt").iterdir()}
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.parametrize("file", ["tensorrt/../b.engine", "a/../b.engine", "b.engine", "tensorrt/b.engine", "/x/y/z"])
def test_a_hostile_set_that_is_replaced_takes_nothing_along(file: str, bundle: Path) -> None:
    config = read_config(bundle)
    write_config(bundle, config | {"engine_sets": {"old": {"engines": [{"file": file}]}}})
    kept = bundle / "tensorrt" / "kept" / "stem.engine"
    kept.parent.mkdir(parents=True)
    kept.write_bytes(b"1")
    before = sorted(bundle.rglob("*"))
    build.replace_set(bundle, "old", {"engines": []})
    assert sorted(bundle.rglob("*")) == before
    assert read_config(bundle)["engine_sets"] == {"old": {"engines": []}}


def with_statistics(bundle: Path, policy: Policy) -> Path:
    """Gives a bundle statistics."""
    stored = write_statistics(bundle, [policy])
    write_config(bundle, read_config(bundle) | {"statistics": vars(stored)})
    return bundle / stored.file


def test_profiles_follow_the_statistics(bundle: Path) -> None:
    policy = Policy.dense(Bundle.open(bundle).architecture, 100)
    policy.tokens[:, 1, 2:] = False
    statistics = with_statistics(bundle, policy)
    (report,) = add_engines(bundle, RTX, quiet).values()
    tokens = policy.tokens.shape[2]
    for block, kept in ((0, tokens), (1, 2)):
        _, batch = report["engines"][f"blocks.{block}"]["profiles"]
        least, tuned, most = (shape[0] for shape in batch["attention_rows"])
        assert (least, most) == (1, 32 * tokens)
        assert 32 * kept <= tuned < 33 * kept + 4 * tokens, block
    statistics.write_bytes(b"0" * statistics.stat().st_size)
    with pytest.raises(BundleError, match="altered"):
        add_engines(bundle, RTX, quiet)


def test_parts_of_blocks_are_built_on_request(bundle: Path) -> None:
    done = invoke(export_command, bundle, "--target", "tensorrt-rtx", "--conditional", "--jobs", "2", "--json", "-")
    assert done.exit_code == 0, done.output
    engines = assert_complete(bundle, json.loads(done.stdout)["engine_sets"], parts=True)
    parts = [f"blocks.{block}.{part}" for block in range(2) for part in ("attention", "mlp", "decisions")]
    assert [name for name in engines if name.count(".") == 2] == parts


def test_heads_that_images_do_not_keep_are_left_out_on_request(tmp_path: Path) -> None:
    bundle = export(random_model(WIDE), tmp_path, verify=False)
    options = replace(SINGLE, leave_out_heads=True, conditional=True)
    with pytest.raises(InputError, match="has no statistics, which tell what heads images usually keep"):
        add_engines(bundle, options, quiet)
    policy = Policy.dense(WIDE, 50)
    policy.heads[:, 1] = [False, True, False]
    with_statistics(bundle, policy)
    engines = assert_complete(bundle, add_engines(bundle, options, quiet), parts=True)
    (built,) = engine_sets(Bundle.open(bundle))
    usual = {key.name: stored.heads for key, stored in built.engines.items() if key.usual}
    assert usual == {f"blocks.1{part}.usual": (1,) for part in ("", ".attention", ".mlp")}
    assert {"blocks.1", "blocks.0.attention", "blocks.1.decisions"} <= set(engines)
    assert not {"blocks.1.attention", "blocks.1.mlp"} & set(engines)  # what overflows runs in whole blocks
    whole, part = (engines[name]["bytes"] for name in ("blocks.1", "blocks.1.usual"))
    weights = 4 * (4 * WIDE.width**2 + WIDE.width * WIDE.hidden)
    assert whole - part > 0.8 * weights * 2 / 3  # two heads of three
    assert built.usual(GraphKey("block", 1)) == EngineKey(GraphKey("block", 1), True)
    assert built.usual(GraphKey("block", 0)) == EngineKey(GraphKey("block", 0))


def test_a_graph_that_does_not_fit_is_refused_before_anything_is_built(bundle: Path) -> None:
    file = stored_files(bundle)["batch.1"]
    model = onnx.load_from_string((bundle / file).read_bytes())
    last = next(node for node in model.graph.node if "y" in node.output)
    last.output[:] = ["before"]
    model.graph.node.insert(
        list(model.graph.node).index(last) + 1,
        helper.make_node("Transpose", ["before"], ["y"], name="the_odd_one", perm=[0, 7]),
    )
    rewrite_stored(bundle, file, model.SerializeToString())
    before = sorted(bundle.rglob("*"))
    message = refusal(invoke(export_command, bundle, "--target", "tensorrt-rtx"))
    assert "batch.1.onnx: is not a graph of its architecture: its operator Transpose does not fit" in message
    assert [path for path in sorted(bundle.rglob("*")) if path.name != "tensorrt"] == before
    assert not engine_sets(Bundle.open(bundle))


def test_what_the_builder_refuses_is_reported_likewise(bundle: Path) -> None:
    message = refusal(invoke(export_command, bundle, "--target", "tensorrt-rtx", "--compute-capability", "75"))
    assert "TensorRT refuses operator MATRIX_MULTIPLY, node 'gemm_" in message
    assert "Turing" in message
    assert not engine_sets(Bundle.open(bundle))


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--target", "tensorrt-rtx", "--hardware-compatible"], "tensorrt-rtx has no --hardware-compatible"),
        (["--target", "tensorrt-rtx", "--version-compatible"], "tensorrt-rtx has no --version-compatible"),
        (["--target", "tensorrt-rtx", "--timing-cache", "cache"], "tensorrt-rtx has no --timing-cache"),
        (["--target", "tensorrt", "--compute-capability", "86"], "tensorrt has no --compute-capability"),
        (["--target", "tensorrt-rtx", "--target", "tensorrt-rtx"], "is there twice"),
        (["--target", "tensorrt-rtx", "--compute-capability", "86;89"], "no list of compute capabilities"),
        (["--target", "tensorrt-rtx", "--output", "x"], "leave out --output"),
        (["--workspace", "64"], "without a --target"),
    ],
)
def test_mistakes_in_the_command(tiny_bundle: Path, arguments: list[str], why: str) -> None:
    assert why in refusal(invoke(export_command, tiny_bundle, *arguments), 2)


def test_a_compute_capability_that_the_builder_does_not_know(tiny_bundle: Path) -> None:
    options = BuildOptions(target=("tensorrt-rtx",), compute_capability=(99,))
    with pytest.raises(
        BackendError, match=r"does not build for compute capability 99; it does for 75, 80, 86"
    ) as raised:
        add_engines(tiny_bundle, options, quiet)
    assert "for other GPUs build with `target` tensorrt, on the device" in str(raised.value)
    with pytest.raises(InputError, match="no `timing_cache`"):
        add_engines(tiny_bundle, BuildOptions(target=("tensorrt-rtx",), timing_cache=Path("x")), quiet)


def test_leaving_out_weights_needs_a_gpu(bundle: Path) -> None:
    try:
        Cuda()
        pytest.skip("there is a GPU")
    except BackendError:
        message = refusal(invoke(export_command, bundle, "--target", "tensorrt-rtx", "--strip-weights"))
    assert "TensorRT-RTX leaves out weights only where there is a GPU: no NVIDIA GPU can be used here" in message


def test_the_builder_takes_its_options(bundle: Path) -> None:
    done = invoke(
        export_command, bundle, "--target", "tensorrt-rtx", "--workspace", "64", "--builder-optimization-level", "1",
        "--compute-capability", "8.6,sm_89", "--max-batch", "4", "--jobs", "2", "--json", "-",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    ((key, report),) = json.loads(done.stdout)["engine_sets"].items()
    assert key.endswith("-sm86-sm89")
    assert read_config(bundle)["engine_sets"][key]["max_batch"] == 4
    assert engine_sets(Bundle.open(bundle))[0].max_batch == 4
    for name, value in (("dense", "images"), ("stem", "images"), ("blocks.1", "state")):
        most = [profile[value][2][0] for profile in report["engines"][name]["profiles"]]
        assert most == [1, 4], name


def test_every_option_reaches_the_builder(tmp_path: Path) -> None:
    """What Polygraphy is asked for: most of it shows in no engine that is built without a GPU."""
    asked: dict[str, Any] = {}
    profiles: list[list[Any]] = []

    def profile() -> Any:
        profiles.append([])
        return SimpleNamespace(add=lambda *shapes: profiles[-1].append(shapes))

    loaders = SimpleNamespace(Profile=profile, CreateConfig=asked.update, PostprocessConfig=lambda config, _: config)
    trt = SimpleNamespace(
        HardwareCompatibilityLevel=SimpleNamespace(AMPERE_PLUS="Ampere and newer"),
        MemoryPoolType=SimpleNamespace(WORKSPACE="workspace"),
    )

    def ask(timing_cache: str | None, **options: Any) -> dict[str, Any]:
        asked.clear()
        built = SimpleNamespace(
            trt=trt, loaders=loaders, options=BuildOptions(**options), timing_cache=timing_cache, configure=None
        )
        worker.builder_config(built, [{"x": ((1, 4), (2, 4), (9, 4))}])  # type: ignore[arg-type]
        return asked

    plain = {
        "memory_pool_limits": None, "builder_optimization_level": None, "strip_plan": False, "load_timing_cache": None,
        "version_compatible": False, "exclude_lean_runtime": False, "hardware_compatibility_level": None,
    }  # fmt: skip
    assert ask(None) == plain | {"profiles": asked["profiles"]}
    assert profiles == [[("x", (1, 4), (2, 4), (9, 4))]]
    for option, value, wanted in (
        ("workspace", 64, {"memory_pool_limits": {"workspace": 64 << 20}}),
        ("builder_optimization_level", 0, {"builder_optimization_level": 0}),
        ("strip_weights", True, {"strip_plan": True}),
        ("version_compatible", True, {"version_compatible": True, "exclude_lean_runtime": True}),
        ("hardware_compatible", True, {"hardware_compatibility_level": "Ampere and newer"}),
    ):
        assert ask(None, **{option: value}) == plain | wanted | {"profiles": asked["profiles"]}
    assert ask("times.cache")["load_timing_cache"] == "times.cache"


def test_engines_are_for_every_gpu_that_is_named_and_can_be_captured() -> None:
    trt = pytest.importorskip("tensorrt_rtx")
    config = trt.Builder(trt.Logger(trt.Logger.ERROR)).create_builder_config()
    chosen: Any = SimpleNamespace(flavour="tensorrt-rtx", trt=trt, compute_capabilities=lambda: (86, 89, 120))
    worker._Worker.configure(chosen, None, None, config)
    found = [config.get_compute_capability(index) for index in range(config.num_compute_capabilities)]
    assert found == [trt.ComputeCapability.SM86, trt.ComputeCapability.SM89, trt.ComputeCapability.SM120]
    assert config.get_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)


def test_a_builder_that_dies_is_one_line(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = sorted(bundle.rglob("*"))
    monkeypatch.setattr(build, "worker", SimpleNamespace(start=worker.start, describe=os.abort))
    with pytest.raises(BackendError, match="the tensorrt-rtx builder died; if memory ran out, build with fewer `jobs`"):
        add_engines(bundle, RTX, quiet)
    assert sorted(bundle.rglob("*")) == before


@pytest.mark.parametrize("name", ["batch.stem", "weights"])
def test_an_altered_file_is_not_built(bundle: Path, name: str) -> None:
    path = bundle / stored_files(bundle)[name]
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(BundleError, match="altered"):
        add_engines(bundle, SINGLE, quiet)


def test_a_build_that_was_killed_leaves_nothing_that_matters(bundle: Path) -> None:
    (key,) = add_engines(bundle, SINGLE, quiet)
    folder = bundle / "tensorrt" / key
    with pytest.raises(KeyboardInterrupt), folder_beside(bundle / "a") as one:
        host = one.name.split(".")[-3]
        raise KeyboardInterrupt
    killed = f".{key}-again.00000000.{host}.999999999.tmp"  # while it was building
    shutil.copytree(folder, folder.with_name(killed))
    shutil.copytree(folder, folder.with_name(f"{key}-again"))  # killed before it was described
    assert_complete(bundle, add_engines(bundle, SINGLE, quiet))
    assert [path.name for path in (bundle / "tensorrt").iterdir()] == [f"{key}-again"]
    assert_complete(bundle, add_engines(bundle, SINGLE, quiet))
    assert [path.name for path in (bundle / "tensorrt").iterdir()] == [key]


def children(process: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def ended(process: int) -> bool:
    """Whether a process is gone, or would be if somebody asked how it ended."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def wait_until(true: Callable[[], object], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it takes too long"
        time.sleep(0.05)


@pytest.mark.skipif(not Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").is_file(), reason="asks Linux")
def test_workers_that_build_end_with_a_parent_that_is_killed(bundle: Path) -> None:
    before = read_config(bundle)
    code = "from adavit.cli import export; export()"
    command = [sys.executable, "-c", code, str(bundle), "--target", "tensorrt-rtx", "--jobs", "2"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as parent:
        wait_until(lambda: list(bundle.glob("tensorrt/.*/*.engine")), 300)
        workers = children(parent.pid)
        parent.kill()
    assert len(workers) >= 2
    wait_until(lambda: all(map(ended, workers)), 60)
    assert read_config(bundle) == before
    assert_complete(bundle, add_engines(bundle, SINGLE, quiet))
    assert not list(bundle.glob("tensorrt/.*"))


def test_tensorrt_that_is_not_installed_is_one_line(bundle: Path) -> None:
    if find_spec("tensorrt"):
        pytest.skip("tensorrt is installed")
    message = refusal(invoke(export_command, bundle, "--target", "tensorrt"))
    assert "building tensorrt engines needs packages that are missing here" in message
    assert "pip install 'adavit[tensorrt]'" in message
    assert not list(bundle.glob("tensorrt/*"))
