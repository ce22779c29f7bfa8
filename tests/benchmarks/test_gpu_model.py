"""The model of time on GPUs: what it says of ViTs that others measured, what takes longer than what, its page."""

import json
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from cases import read_config, tiny

from adavit.bundle.policy import Policy

REPOSITORY = Path(__file__).parent.parent.parent
sys.path.insert(0, str(REPOSITORY / "benchmarks"))

import gpu_figures as given  # noqa: E402
import gpu_model  # noqa: E402
from gpu_model import WAYS, Device, Task, fitted, predicted, rows_of, table  # noqa: E402
from gpu_policies import packed, recorded, unpacked  # noqa: E402
from models import ARCHITECTURES, BIASES  # noqa: E402

ARCH = ARCHITECTURES["deit_small"]


def test_the_fits_are_close_to_what_was_published() -> None:
    for name, of in given.PUBLISHED.items():
        share, kernel = fitted(name, "fp16")
        for images, ms in of.fp16.items():
            kernels = given.DENSE_KERNELS * given.VIT_B_BLOCKS + given.OTHER_KERNELS
            found = images * 2 * given.VIT_B_MACS / (share * of.fp16_peak * 1e12) + kernels * kernel
            assert 1e3 * found == pytest.approx(ms, rel=0.15)
        assert 0 < share < 1


@pytest.mark.parametrize(("images", "ms"), [(1, 9.69), (8, 47.55), (16, 90.30), (32, 171.89)])
def test_the_model_predicts_a_vit_that_it_was_not_fitted_to(images: int, ms: float) -> None:
    """ViT-L/16 on a T4, as docs/vit_guide.md of FasterTransformer has it."""
    large = replace(ARCH, width=1024, depth=24, heads=16, hidden=4096)
    found = predicted(Device.of(given.GPUS["T4"], "fp16"), Task.of(large, Policy.dense(large, 1), images))["dense"]
    assert 1e3 * found == pytest.approx(ms, rel=0.15)


def task(batch: int, seed: int = 0, tokens: float = 0.5, runs: float = 0.7) -> Task:
    source = np.random.default_rng(seed)
    policy = Policy.dense(ARCH, 64)
    policy.tokens[..., 1:] = source.random((64, ARCH.depth, ARCH.tokens - 1)) < tokens
    policy.sublayers[:] = source.random((64, ARCH.depth, 2)) < runs
    return Task.of(ARCH, policy, batch)


@pytest.mark.parametrize("gpu", given.GPUS)
@pytest.mark.parametrize("batch", [1, 32])
def test_less_work_takes_less_time(gpu: str, batch: int) -> None:
    fp16, int8 = (Device.of(given.GPUS[gpu], precision) for precision in ("fp16", "int8"))
    little, much = predicted(fp16, task(batch, tokens=0.3)), predicted(fp16, task(batch, tokens=0.8))
    assert all(little[way] <= much[way] for way in WAYS)
    assert little["dense"] == much["dense"] > predicted(int8, task(batch))["dense"]
    many = predicted(replace(fp16, small=2 * fp16.small), task(batch))
    assert all(many[way] > predicted(fp16, task(batch))[way] for way in WAYS)


def test_sublayers_that_nobody_runs_are_free_in_conditional_alone() -> None:
    device = Device.of(given.GPUS["T4"], "fp16")
    seldom, often = (predicted(device, task(1, runs=runs)) for runs in (0.1, 0.9))
    assert seldom["conditional"] < 0.6 * often["conditional"]
    assert seldom["capacity"] > 0.8 * often["capacity"]


def test_what_overflows_runs_again() -> None:
    device, some = Device.of(given.GPUS["T4"], "fp16"), task(8)
    without, all_of_them = (predicted(device, replace(some, overflowing=share)) for share in (0.0, 1.0))
    assert all_of_them["capacity"] == pytest.approx(without["capacity"] + without["exact"])


def test_kernels_are_counted_as_the_graphs_have_them(tiny_bundle: Path) -> None:
    files = read_config(tiny_bundle)["precisions"]["fp32"]["batch"]
    graph = onnx.load(tiny_bundle / files[2]["file"], load_external_data=False).graph
    assert tiny().depth > 2
    kinds = Counter(node.op_type for node in graph.node)
    matrix = sum(kinds[kind] for kind in ("Gemm", "MatMul", "Softmax", "LayerNormalization"))
    moving = sum(kinds[kind] for kind in ("CumSum", "ScatterND", "Gather", "ReduceSum", "ReduceMax"))
    deciding = matrix - given.DENSE_KERNELS
    assert moving + deciding == pytest.approx(sum(given.SMALL_KERNELS.values()), rel=0.2)


def test_packed_policies_have_the_same_counts() -> None:
    source = np.random.default_rng(0)
    policy = Policy(*(source.random((5, ARCH.depth, size)) < 0.5 for size in (ARCH.tokens, ARCH.heads, 2)))
    found = unpacked(ARCH, packed(policy))
    np.testing.assert_array_equal(found.tokens.sum(2), policy.tokens.sum(2))
    np.testing.assert_array_equal(found.heads, policy.heads)
    np.testing.assert_array_equal(found.sublayers, policy.sublayers)


@pytest.mark.parametrize(("model", "profile"), BIASES)
def test_policies_of_every_model_are_stored(model: str, profile: str) -> None:
    recorded(model, profile).check(ARCHITECTURES[model], 256)


def test_the_command_writes_a_table_numbers_and_a_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    options: list[Any] = ["--models", "deit_small", "--gpus", "T4", "H100", "--batches", "1", "2"]
    options += ["--precisions", "fp16", "int8", "--json", tmp_path / "a.json", "--plot", tmp_path / "a.png"]
    monkeypatch.setattr(sys, "argv", ["gpu_model.py", *map(str, options)])
    gpu_model.main()
    printed = capsys.readouterr().out
    assert printed.count("A model, not a measurement") == 4 and printed.count("| H100 |") == 8
    report = json.loads((tmp_path / "a.json").read_text())
    assert len(report["rows"]) == 16
    assert report["assumptions"]["gpus"]["T4"]["bandwidth"] == 320
    assert all(set(row["ms"]) == {"dense", *WAYS} for row in report["rows"])
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["--batches", "0"], "'0' is no number of images from 1 to 4096"),
        (["--batches", "-1"], "'-1' is no number of images"),
        (["--json", "nowhere/a.json"], "nowhere/a.json: its folder is not there"),
        (["--gpus", "X"], "invalid choice: 'X'"),
    ],
)
def test_mistakes_are_told_before_anything_is_computed(
    options: list[str], why: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu_model.py", *options])
    with pytest.raises(SystemExit):
        gpu_model.main()
    found = capsys.readouterr()
    assert why in found.err and not found.out


def test_a_picture_needs_matplotlib(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_model, "find_spec", lambda _: None)
    monkeypatch.setattr(sys, "argv", ["gpu_model.py", "--plot", "a.png"])
    with pytest.raises(SystemExit):
        gpu_model.main()
    assert "--plot needs matplotlib; run: pip install matplotlib" in capsys.readouterr().err


def test_the_page_shows_what_the_model_says() -> None:
    page = (REPOSITORY / "docs" / "gpu-model.md").read_text(encoding="utf-8")
    for profile in ("published", "token-heavy"):
        rows = rows_of("t2t_vit_19", profile, {"T4": given.GPUS["T4"]}, [32], ["fp16"])
        assert table(rows).splitlines()[-1] in page
