"""Plain ViT weights through the commands: exported as their dense graph alone, run, and refused what needs policies."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import DENSE, invoke, pictures_in, random_model, refusal, save, stored_files, with_weights

import adavit
from adavit.cli import export, run
from adavit.runtime import Policy

SHORT = ("--iterations", 2, "--warmup", 1, "--threads", 1)


@pytest.fixture(scope="module")
def timm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain ViT as timm saves it: no note of its heads, queries, keys and values in one."""
    state = dict(random_model(DENSE).state_dict())
    for block in range(DENSE.depth):
        for kind in ("weight", "bias"):
            parts = [state.pop(f"blocks.{block}.attn.{part}.{kind}") for part in ("query", "key", "value")]
            state[f"blocks.{block}.attn.qkv.{kind}"] = torch.cat(parts)
    path = tmp_path_factory.mktemp("timm") / "vit.pth"
    torch.save(state, path)
    return path


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_from_weights_to_predictions(backend: str, timm: Path, tmp_path: Path) -> None:
    bundle, photos = tmp_path / "bundle", tmp_path / "photos"
    done = invoke(export, timm, "-o", bundle, "--threads", 1, "--json", tmp_path / "report.json")
    assert done.exit_code == 0, done.output
    assert "fp32        1 graph, " in done.stdout
    assert "verified    4 images: largest logit difference " in done.stdout
    assert "decisions" not in done.output
    assert f"adavit-export: note: {timm} has no policies, so there is nothing to skip" in done.stderr
    assert f"adavit-train adapt --from {timm} --data" in done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["verified"]["max_logit_difference"] < 1e-4
    assert report["notes"] == [done.stderr.strip().removeprefix("adavit-export: note: ")]
    assert set(stored_files(bundle)) == {"weights", "dense"}
    photos.mkdir()
    pictures_in(photos, 3)
    done = invoke(run, bundle, "--images", photos, "--backend", backend, *SHORT)
    assert done.exit_code == 0, done.output
    assert "02.png" in done.stdout
    assert "\ndense  " in done.stdout
    assert "policies    none: a dense model, which skips nothing" in done.stdout
    for word in ("adaptive", "speedup", "dense twin", "efficiency"):
        assert word not in done.output


def ran(bundle: Path, *arguments: object) -> dict[str, Any]:
    done = invoke(run, bundle, *SHORT, "--json", "-", *arguments)
    assert done.exit_code == 0, done.output
    report: dict[str, Any] = json.loads(done.stdout)
    return report


@pytest.mark.parametrize("options", [(), ("--batch", 20), ("--parallel", "samples"), ("--no-specialise",)])
def test_the_numbers_of_a_run(options: tuple[object, ...], plain: tuple[Path, Path]) -> None:
    report = ran(plain[0], *options)
    assert report["policies"] == []
    assert report["usage"] == {"tokens": 1, "heads": 1, "sublayers": 1}
    assert report["macs"]["executed_mean"] == report["macs"]["dense"]
    assert report["dense"] is report["speedup"] is report["efficiency"] is None
    assert report["prepared"] == 0


def test_a_policy_is_recorded_and_replayed(plain: tuple[Path, Path], tmp_path: Path) -> None:
    policy = tmp_path / "policy.npz"
    ran(plain[0], "--record-policy", policy)
    assert Policy.load(policy).usage() == {"tokens": 1, "heads": 1, "sublayers": 1}
    ran(plain[0], "--replay-policy", policy)


@pytest.mark.parametrize(
    ("arguments", "purpose"),
    [
        (["--profile"], "profile"),
        (["--dense"], "compare with a dense twin"),
    ],
)
def test_runs_that_need_policies(arguments: list[str], purpose: str, plain: tuple[Path, Path]) -> None:
    message = refusal(invoke(run, plain[0], *arguments))
    assert f"{plain[0]}: the model has no policies, so there is nothing to {purpose}; adavit-train adapt" in message


def test_bundles_without_policies_are_not_compared(plain: tuple[Path, Path], tmp_path: Path) -> None:
    message = refusal(invoke(run, "--compare", plain[0], plain[0], "--images", pictures_in(tmp_path, 2)))
    assert "no policies, so there is nothing to compare" in message


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--no-dense"], "its bundle is its dense graph alone; leave out --no-dense"),
        (["--precision", "int8", "--calibration-images", "photos"], "leave out --precision int8"),
        (["--precision", "fp16", "--calibration-images", "photos"], "leave out --precision fp16"),
        (["--budgets", "0.5", "--calibration-images", "photos"], "the same MACs at any budget; leave out --budgets"),
    ],
)  # fmt: skip
def test_exports_that_need_policies(arguments: list[str], why: str, timm: Path, tmp_path: Path) -> None:
    message = refusal(invoke(export, timm, "-o", tmp_path / "bundle", *arguments), code=2)
    assert f"{timm} has no policies" in message
    assert why in message
    assert not list(tmp_path.iterdir())


def test_a_check_against_the_weights(plain: tuple[Path, Path], bundle: Path, tmp_path: Path) -> None:
    done = invoke(export, "--check", plain[0], "--against", plain[1], "--threads", 1)
    assert done.exit_code == 0, done.output
    assert "verified    4 images: largest logit difference " in done.stdout
    other = save(random_model(DENSE, seed=1), tmp_path / "other.safetensors")
    message = refusal(invoke(export, "--check", plain[0], "--against", other, "--threads", 1))
    assert "the dense twin: differs from the checkpoint by up to" in message
    assert "different architectures" in refusal(invoke(export, "--check", bundle, "--against", plain[1]))


def test_an_export_that_computes_something_else_fails(
    timm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from adavit.export import bundle as exporting

    def damaged(folder: Path, **options: Any) -> adavit.Runtime:
        with_weights(folder, "head.bias", 5.0)
        return adavit.load(folder, **options)

    monkeypatch.setattr(exporting, "load", damaged)
    message = refusal(invoke(export, timm, "-o", tmp_path / "bundle", "--threads", 1))
    assert "the dense twin: differs from the checkpoint" in message
    assert not list(tmp_path.iterdir())


def test_without_verification(timm: Path, tmp_path: Path) -> None:
    done = invoke(export, timm, "-o", tmp_path / "bundle", "--no-verify", "--with-dense")
    assert done.exit_code == 0, done.output
    runtime = adavit.load(tmp_path / "bundle", threads=1)
    images = np.zeros((1, 3, 32, 32), np.float32)
    np.testing.assert_allclose(
        runtime.run(images).logits, random_model(DENSE)(torch.from_numpy(images)).logits.detach(), atol=1e-4
    )
