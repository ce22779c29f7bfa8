"""The model card: the metadata that the Hugging Face Hub reads, and what it says of operating points."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from cases import export, invoke, pictures_in, quiet, read_config, refusal

from adavit.bundle.bundle import Bundle
from adavit.bundle.card import renew_points
from adavit.bundle.demo import demo_bundle
from adavit.calibration.budgets import add_budgets
from adavit.calibration.options import BudgetOptions
from adavit.cli import export as command
from adavit.errors import OptionError
from adavit.model import AdaViT, save_safetensors


def metadata(bundle: Path) -> dict[str, Any]:
    """What stands at the top of a bundle's card: a line for each key, and its value as JSON, so that it is YAML."""
    start, front, _ = (bundle / "README.md").read_text().split("---\n", 2)
    assert start == ""
    lines = [line.split(": ", 1) for line in front.splitlines()]
    found = {key: json.loads(value) for key, value in lines}
    assert len(found) == len(lines)
    try:
        import yaml
    except ImportError:
        return found
    assert yaml.safe_load(front) == found
    return found


def points(bundle: Path) -> str:
    """What a bundle's card says of operating points, at its end."""
    return (bundle / "README.md").read_text().partition("\n## Operating points\n")[2]


def test_nothing_is_guessed(tiny_bundle: Path) -> None:
    assert metadata(tiny_bundle) == {
        "library_name": "adavit",
        "pipeline_tag": "image-classification",
        "tags": ["image-classification", "vision-transformer", "adaptive-computation", "onnx"],
    }
    assert points(tiny_bundle) == ""


def test_the_hub_finds_the_classes(tiny_bundle: Path) -> None:
    config = read_config(tiny_bundle)
    assert config["model_type"] == "adavit"
    assert config["id2label"] == {"0": "ant", "1": "bee", "2": "cat", "3": "dog", "4": "elk"}


def test_licence_and_data_sets_are_given(checkpoint: Path, tmp_path: Path) -> None:
    given: Sequence[str] = ["--license", "cc-by-4.0", "--dataset", "imagenet-1k", "--dataset", "some/photos"]
    done = invoke(command, checkpoint, "--output", tmp_path / "bundle", "--no-verify", *given, "--threads", 1)
    assert done.exit_code == 0, done.output
    found = metadata(tmp_path / "bundle")
    assert (found["license"], found["datasets"]) == ("cc-by-4.0", ["imagenet-1k", "some/photos"])
    again = export(tmp_path / "bundle" / "fp32" / "model.safetensors", tmp_path / "bundle", verify=False)
    assert metadata(again) == found, "the bundle's weights note them"


def test_a_checkpoint_notes_them(model: AdaViT, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = tmp_path / "noted.safetensors"
    save_safetensors(model, source, {"license": "Apache-2.0", "datasets": ["imagenet-1k"]})
    found = metadata(export(source, tmp_path, verify=False))
    assert (found["license"], found["datasets"]) == ("apache-2.0", ["imagenet-1k"])
    found = metadata(export(source, tmp_path, verify=False, force=True, license="mit"))
    assert (found["license"], found["datasets"]) == ("mit", ["imagenet-1k"])
    assert not caplog.records


@pytest.mark.parametrize(
    "notes", [{"license": "see our web page"}, {"datasets": "5"}, {"datasets": '["a\\nlicense: mit"]'}], ids=str
)
def test_unusable_notes_are_left_out(
    notes: dict[str, str], model: AdaViT, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = tmp_path / "noted.safetensors"
    save_safetensors(model, source, notes)
    assert not {"license", "datasets"} & set(metadata(export(source, tmp_path, verify=False)))
    assert "that the model card leaves out" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"license": "Apache 2.0"}, "'Apache 2.0' is no identifier of a licence; give one of the Hugging Face Hub's"),
        ({"license": ""}, "'' is no identifier of a licence"),
        ({"datasets": ("my photos",)}, "'my photos' is no name of a data set; give the Hugging Face Hub's"),
        ({"datasets": ("a/b/c",)}, "'a/b/c' is no name of a data set"),
    ],
)
def test_what_the_hub_would_refuse(options: dict[str, Any], message: str, checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=message):
        export(checkpoint, tmp_path, **options)
    assert list(tmp_path.iterdir()) == []


def test_they_are_for_an_export_of_a_checkpoint(tiny_bundle: Path) -> None:
    done = invoke(command, tiny_bundle, "--license", "mit", "--target", "tensorrt-rtx")
    assert "to add to a BUNDLE, leave out --license" in refusal(done, code=2)


def test_the_demo_has_its_licence_data_set_and_accuracy(tmp_path: Path) -> None:
    shipped = metadata(demo_bundle())
    assert (shipped["license"], shipped["datasets"]) == ("apache-2.0", ["zalando-datasets/fashion_mnist"])
    assert shipped["metrics"] == ["accuracy"]
    [result] = shipped["model-index"][0]["results"]
    assert result["task"] == {"type": shipped["pipeline_tag"]}
    assert result["dataset"] == {"type": shipped["datasets"][0], "name": "Fashion-MNIST", "split": "test"}
    assert [(metric["type"], metric["value"]) for metric in result["metrics"]] == [("accuracy", 0.9201)]
    exported = export(Path("demo"), tmp_path, verify=False)
    assert metadata(exported) == shipped
    assert points(exported) == points(demo_bundle())
    other = export(Path("demo"), tmp_path, verify=False, force=True, crop_ratio=0.9)
    assert set(shipped) - set(metadata(other)) == {"metrics", "model-index"}, "nobody measured this"
    assert points(other) == ""


def test_operating_points_are_of_calibration_images(checkpoint: Path, tmp_path: Path) -> None:
    bundle = export(checkpoint, tmp_path, verify=False)
    before = (bundle / "README.md").read_text()
    report = add_budgets(bundle, BudgetOptions((0.5,), (pictures_in(tmp_path, 16),)), 1, quiet)
    assert report is not None
    assert (bundle / "README.md").read_text().startswith(before)
    told = points(bundle)
    assert told.startswith("\nMeasured on the 16 calibration images that the points were chosen on.")
    assert "This is not a benchmark." in told
    assert told.count("\n| 0.") == len(report["points"])
    assert "same class as the trained policy" in told
    assert "accuracy" not in told, "these images have no labels"


def test_new_operating_points_leave_the_rest_of_a_card(tmp_path: Path) -> None:
    budgets = Bundle.open(demo_bundle()).budgets
    assert budgets is not None
    card, mine = tmp_path / "README.md", "# Mine\n\nMy words.\n"
    card.write_text(mine)
    renew_points(tmp_path, budgets)
    once = card.read_text()
    assert once.startswith(f"{mine}\n## Operating points\n")
    card.write_text(f"{once}\n## More\n\nWords.\n".replace("| 0.35 | 35.1 %", "| 0.35 | 99 %"))
    renew_points(tmp_path, budgets)
    assert card.read_text() == f"{once}\n## More\n\nWords.\n"


def test_accuracy_on_labelled_calibration_images() -> None:
    card = (demo_bundle() / "README.md").read_text()
    assert "Measured on the 2,048 calibration images that the points were chosen on. This is not a benchmark." in card
    assert "| budget | MACs | accuracy |" in card
    assert "| 0.35 | 35.1 % | 91.9 % |" in card
    assert card.count(", as trained |") == 1


@pytest.mark.parametrize("content", [None, b"\xff"])
def test_a_card_that_nobody_can_read_stays(content: bytes | None, tmp_path: Path) -> None:
    budgets = Bundle.open(demo_bundle()).budgets
    assert budgets is not None
    if content is not None:
        (tmp_path / "README.md").write_bytes(content)
    renew_points(tmp_path, budgets)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == ([] if content is None else [content])
