"""What an export writes, what it refuses, and what it leaves behind when it fails."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import export, forced, oracle, random_images, random_model, random_policy, read_config, stored_files, tiny

import adavit
from adavit.errors import AdaViTError, BundleError, CheckpointError, InputError, VerificationError
from adavit.export import bundle as exporting
from adavit.files import sha256
from adavit.macs import dense_macs, outside_macs
from adavit.model import AdaViT, resize, save_safetensors


def fault(kind: type[AdaViTError], source: Any, folder: Path, **options: Any) -> str:
    with pytest.raises(kind) as caught:
        export(source, folder, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_bundle_describes_itself(tiny_bundle: Path, checkpoint: Path) -> None:
    config = read_config(tiny_bundle)
    assert (config["schema_version"], config["model_type"]) == (3, "adavit")
    assert config["architecture"] == tiny().to_dict()
    assert config["macs"] == {"dense": dense_macs(tiny()), "outside_blocks": outside_macs(tiny())}
    assert config["checkpoint"] == {"file": "tiny.safetensors", "sha256": sha256(checkpoint.read_bytes())}
    assert config["made_by"] | {"adavit": adavit.__version__, "torch": torch.__version__} == config["made_by"]
    assert (tiny_bundle / "labels.txt").read_text() == "ant\nbee\ncat\ndog\nelk\n"
    card = (tiny_bundle / "README.md").read_text()
    assert card.startswith("---\n")
    assert config["checkpoint"]["sha256"] in card
    described = set(stored_files(tiny_bundle).values())
    found = {str(path.relative_to(tiny_bundle)) for path in tiny_bundle.rglob("*") if path.is_file()}
    assert found == described | {"config.json", "preprocessor_config.json", "labels.txt", "README.md"}


def test_files_are_as_described(tiny_bundle: Path) -> None:
    described = adavit.load(tiny_bundle, threads=1).bundle.files_of().files()
    assert len(described) == 2 + 1 + 4 + 4 + 1 + 4
    for stored in described:
        data = (tiny_bundle / stored.file).read_bytes()
        assert (len(data), sha256(data)) == (stored.bytes, stored.sha256)


@pytest.mark.parametrize("opset", list(range(17, 24)))
def test_the_operator_set_can_be_chosen(opset: int, checkpoint: Path, tmp_path: Path, runtime: adavit.Runtime) -> None:
    bundle = export(checkpoint, tmp_path, opset=opset, with_dense=True)
    assert read_config(bundle)["precisions"]["fp32"]["opset"] == opset
    images = random_images(tiny(), 2)
    other = adavit.load(bundle, threads=1)
    np.testing.assert_allclose(other.run(images).logits, runtime.run(images).logits, atol=1e-5)
    np.testing.assert_allclose(other.run_dense(images), runtime.run_dense(images), atol=1e-5)


def test_the_dense_twin_is_there_unless_it_is_left_out(checkpoint: Path, tmp_path: Path) -> None:
    assert "dense" in stored_files(export(checkpoint, tmp_path))
    assert "dense" not in stored_files(export(checkpoint, tmp_path, with_dense=False, force=True))


def test_labels_are_numbers_unless_given(checkpoint: Path, tmp_path: Path) -> None:
    assert adavit.load(export(checkpoint, tmp_path), threads=1).labels == ("0", "1", "2", "3", "4")


@pytest.mark.parametrize(
    ("noted", "labels", "fault"),
    [
        (["a", "b", "c", "d", "e"], "abcde", None),
        (["a", "b"], "01234", "2 class names (2 different) for 5 classes; labels are numbers, give `labels`"),
        (["a", "b", "c", "d", "a"], "01234", "5 class names (4 different) for 5 classes; labels"),
    ],
)
def test_noted_labels_that_do_not_fit_give_way_to_numbers(
    noted: list[str], labels: str, fault: str | None, model: AdaViT, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = tmp_path / "noted.safetensors"
    save_safetensors(model, source, {"classes": noted})
    assert (export(source, tmp_path, verify=False) / "labels.txt").read_text().split() == list(labels)
    messages = [record.getMessage() for record in caplog.records if record.name == "adavit.export.sources"]
    assert len(messages) == (fault is not None)
    assert all(message.startswith(f"{source}: {fault}") for message in messages)


@pytest.mark.parametrize(
    "content", [b"", b"a\nb\nc\nd\n", b"a\nb\nc\nd\ne\nf\n", b"a\nb\nc\nd\na\n", b"a\nb\n\nd\ne\n", b"\xff\xfe"]
)
def test_labels_that_do_not_fit(content: bytes, checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "labels.txt").write_bytes(content)
    assert "labels.txt: " in fault(InputError, checkpoint, tmp_path, labels=tmp_path / "labels.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["labels.txt"]


def test_no_such_labels(checkpoint: Path, tmp_path: Path) -> None:
    assert "cannot be read as labels" in fault(InputError, checkpoint, tmp_path, labels=tmp_path / "labels.txt")


@pytest.mark.parametrize("arch", [tiny(), tiny(stem="t2t", patch_size=16, qkv_bias=False)], ids=["patch", "t2t"])
@pytest.mark.parametrize("size", [16, 48])
def test_another_image_size(arch: Any, size: int, tmp_path: Path) -> None:
    model = random_model(arch, seed=2)
    runtime = adavit.load(export(model, tmp_path, image_size=size, verify=False), threads=1)
    assert runtime.architecture.image_size == size
    assert runtime.preprocess(np.zeros((9, 9, 3), np.uint8)).shape == (3, size, size)
    resized = resize(model, size)
    images, policy = random_images(resized.arch, 2), random_policy(resized.arch, 2, seed=4)
    np.testing.assert_allclose(runtime.run(images, policy=policy).logits, forced(resized, images, policy), atol=1e-4)


def test_the_crop_ratio_is_kept(checkpoint: Path, tmp_path: Path) -> None:
    bundle = export(checkpoint, tmp_path, crop_ratio=0.75)
    assert adavit.load(bundle, threads=1).bundle.preprocessor.short_side == int(32 / 0.75)


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"opset": 16}, InputError, "opset 16 is not supported; choose 17 to"),
        ({"opset": 99}, InputError, "opset 99 is not supported"),
        ({"crop_ratio": 0.0}, InputError, "crop_ratio is 0.0: expected a number"),
        ({"crop_ratio": 0.05}, InputError, "crop_ratio is 0.05: expected a number from 0.1 to 1"),
        ({"crop_ratio": float("nan")}, InputError, "crop_ratio is nan: expected a number"),
        ({"image_size": 33}, CheckpointError, "image size 33 cannot be had"),
        ({"heads": 4}, CheckpointError, "4 heads asked for"),
    ],
)
def test_options_that_cannot_be(
    options: dict[str, Any], kind: type[AdaViTError], message: str, checkpoint: Path, tmp_path: Path
) -> None:
    assert message in fault(kind, checkpoint, tmp_path, **options)
    assert list(tmp_path.iterdir()) == []


def test_a_bundle_is_replaced_only_by_force(checkpoint: Path, tmp_path: Path) -> None:
    bundle = export(checkpoint, tmp_path, opset=17)
    (bundle / "note").touch()
    before = files(tmp_path)
    assert "already there; give `force=True`" in fault(BundleError, checkpoint, tmp_path)
    assert files(tmp_path) == before
    export(checkpoint, tmp_path, opset=20, force=True)
    assert read_config(bundle)["precisions"]["fp32"]["opset"] == 20
    assert not (bundle / "note").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_an_empty_folder_is_replaced_by_force(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "bundle").mkdir()
    assert "already there; give `force=True`" in fault(BundleError, checkpoint, tmp_path, verify=False)
    assert read_config(export(checkpoint, tmp_path, verify=False, force=True))["name"] == "tiny"


@pytest.mark.parametrize("force", [False, True])
def test_what_is_no_bundle_is_never_replaced(force: bool, checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "thesis.txt").touch()
    assert "is a folder, but not a bundle" in fault(BundleError, checkpoint, tmp_path, force=force)
    (tmp_path / "bundle" / "config.json").write_text('{"model_type": "bert"}')  # of another model
    assert "is a folder, but not a bundle" in fault(BundleError, checkpoint, tmp_path, force=force)
    assert (tmp_path / "bundle" / "thesis.txt").is_file()
    (tmp_path / "file").mkdir()
    (tmp_path / "file" / "bundle").touch()
    assert "is no folder" in fault(BundleError, checkpoint, tmp_path / "file", force=force)
    (tmp_path / "link").mkdir()
    (tmp_path / "link" / "bundle").symlink_to(tmp_path / "bundle")
    assert "is no folder" in fault(BundleError, checkpoint, tmp_path / "link", force=force)
    assert "no such folder to write the bundle into" in fault(BundleError, checkpoint, tmp_path / "no", force=force)
    assert set(files(tmp_path)) >= {"bundle/thesis.txt", "file/bundle"}


def test_a_failed_export_leaves_the_old_bundle(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export(checkpoint, tmp_path)
    before = files(tmp_path)

    def differs(*_: Any) -> None:
        raise VerificationError("block 1, graph mlp: differs")

    monkeypatch.setattr(exporting, "verify", differs)
    assert "graph mlp" in fault(VerificationError, checkpoint, tmp_path, force=True)
    assert files(tmp_path) == before


def test_a_file_called_demo_is_that_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("demo").write_bytes(b"no checkpoint")
    fault(CheckpointError, Path("demo"), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["demo"]


def test_the_checkpoint_is_checked_first(tmp_path: Path, model: AdaViT) -> None:
    state = model.state_dict()
    del state["norm.bias"]
    torch.save(state, tmp_path / "model.pth")
    assert "missing norm.bias" in fault(CheckpointError, tmp_path / "model.pth", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["model.pth"]


def test_the_report(checkpoint: Path, tmp_path: Path) -> None:
    from cases import quiet

    stages: list[tuple[str, float]] = []
    options = exporting.ExportOptions(threads=1, with_dense=True)
    report = exporting.export_bundle(checkpoint, tmp_path / "a", options, lambda *stage: stages.append(stage))
    size = sum(path.stat().st_size for path in (tmp_path / "a" / "fp32").iterdir())
    assert report["precisions"] == {"fp32": {"graphs": 15, "bytes": size}}
    assert (report["bytes"], report["opset"]) == (size, 20)
    assert report["verified"]["decisions"] == report["verified"]["images"] * (3 * 16 + 2 * 3 + 2 * 2)
    assert 0 <= report["verified"]["max_logit_difference"] < 1e-4
    assert 0 <= report["verified"]["max_dense_logit_difference"] < 1e-4
    assert {stage.split()[0] for stage, _ in stages} == {"loading", "exporting", "running", "verifying"}
    assert all(0 < share <= 1 for stage, share in stages if stage.startswith(("exporting", "verifying")))
    assert next(share for stage, share in reversed(stages) if stage.startswith("exporting")) == 1
    options = exporting.ExportOptions(verify=False)
    assert exporting.export_bundle(checkpoint, tmp_path / "b", options, quiet)["verified"] is None


def test_decisions_on_their_threshold_prove_nothing(tmp_path: Path) -> None:
    model = random_model(tiny())
    with torch.no_grad():
        for parameter in model.blocks[1].head_select.parameters():
            parameter.zero_()
    message = fault(VerificationError, model, tmp_path)
    assert "clear of its threshold" in message
    assert "export with `verify=False`" in message
    # Exported all the same, the bundle drops what is exactly on its threshold, as the model does.
    runtime = adavit.load(export(tmp_path / "model.safetensors", tmp_path, verify=False), threads=1)
    images = random_images(tiny(), 2)
    assert not runtime.run(images).policy.heads[:, 1].any()
    assert not oracle(model, images)[1].heads[:, 1].any()


def test_weights_in_half_precision_are_exported_as_the_float32_they_are(tmp_path: Path) -> None:
    model = random_model(tiny()).half()
    torch.save(model.state_dict(), tmp_path / "half.pth")
    runtime = adavit.load(export(tmp_path / "half.pth", tmp_path), threads=1)
    images, policy = random_images(tiny(), 2), random_policy(tiny(), 2, seed=1)
    found = runtime.run(images, policy=policy).logits
    np.testing.assert_allclose(found, forced(model.float(), images, policy), atol=1e-4)


def test_models_without_a_head_policy_need_their_heads(tmp_path: Path) -> None:
    model = random_model(tiny(head_policy=False))
    torch.save(model.state_dict(), tmp_path / "model.pth")
    assert "give `heads`" in fault(CheckpointError, tmp_path / "model.pth", tmp_path)
    assert adavit.load(export(tmp_path / "model.pth", tmp_path, heads=3), threads=1).architecture == model.arch


def test_saved_notes_reach_the_bundle(tmp_path: Path, model: AdaViT) -> None:
    save_safetensors(model, tmp_path / "model.safetensors", {"crop_ratio": 0.5})
    assert (
        adavit.load(export(tmp_path / "model.safetensors", tmp_path), threads=1).bundle.preprocessor.crop_ratio == 0.5
    )
