"""Class folders: which classes they stand for, and that nothing of a set is left out without a word."""

import json
import os
import unicodedata
from collections.abc import Sequence
from pathlib import Path

import pytest
from cases import invoke, picture, pictures_in, refusal

from adavit.cli import export, run
from adavit.datasets.class_folders import match_folders
from adavit.datasets.image_files import find_calibration_images, find_images, labels_by
from adavit.errors import InputError

ANIMALS = ["ant", "bee", "cat", "dog", "elk"]
WORDNET = ["n01440764", "n01443537", "n01484850", "n01491361", "n01494475"]


def place(folder: Path, *names: str) -> Path:
    """The folder, with pictures of these names in it; of a name that ends with a slash, an empty folder."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if name.endswith("/"):
            (folder / name).mkdir()
        else:
            picture().save(folder / name, "png")
    return folder


def found(
    folder: Path, labels: Sequence[str] | None, by_order: bool = False
) -> tuple[dict[str, int | None], list[str]]:
    """The labels by the images' paths in the folder, and the notes."""
    notes: list[str] = []
    files = find_images([folder], labels, by_order, notes.append)
    return {str(file.path.relative_to(folder)): file.label for file in files}, notes


NAMES: list[tuple[list[str], list[str], bool, dict[str, int] | None]] = [
    (["bee", "dog"], ANIMALS, False, {"bee": 1, "dog": 3}),
    (["BEE", "Dog "], ANIMALS, False, {"BEE": 1, "Dog ": 3}),
    (["STRASSE"], ["stra\u00dfe", "weg"], False, {"STRASSE": 0}),
    ([unicodedata.normalize("NFD", "caf\u00e9")], ["th\u00e9", "caf\u00e9"], False, {"cafe\u0301": 1}),
    (["US", "us"], ["us", "US"], False, {"US": 1, "us": 0}),
    ([str(i) for i in range(12)], [f"class {i}" for i in range(12)], False, {str(i): i for i in range(12)}),
    (["00", "01", "02"], ["x", "y", "z"], False, {"00": 0, "01": 1, "02": 2}),
    (["0", "1", "2"], ["2", "1", "0"], False, {"0": 2, "1": 1, "2": 0}),
    (["00", "01"], ["1", "0"], False, None),
    (["0", "2", "3"], ["x", "y", "z"], False, None),
    (["1", "2", "3"], ["x", "y", "z"], False, None),
    (["1", "01", "2"], ["x", "y", "z"], False, None),
    (["0", "1"], ["x", "y", "z"], False, None),
    (WORDNET[::-1], ANIMALS, False, {name: i for i, name in enumerate(WORDNET)}),
    (WORDNET[:4], ANIMALS, False, None),
    (WORDNET[:2], [WORDNET[2], WORDNET[3]], False, None),
    (["b", "a", "B"], ["x", "y", "z"], True, {"B": 0, "a": 1, "b": 2}),
    (["b", "a"], ["x", "y", "z"], True, None),
    (["b", "a"], ["x", "y"], False, None),
    (["bee", "ant"], ["bee", "ant"], True, {"bee": 0, "ant": 1}),
]


@pytest.mark.parametrize(("folders", "labels", "by_order", "wanted"), NAMES, ids=lambda value: str(value)[:40])
def test_what_folders_stand_for(
    folders: list[str], labels: list[str], by_order: bool, wanted: dict[str, int] | None
) -> None:
    classes = match_folders(folders, labels, by_order)
    assert (classes and classes.index) == wanted


@pytest.mark.parametrize(
    ("folders", "labels", "message"),
    [
        (["bee", "owl"], ANIMALS, "class folder 'owl' is none of the bundle's 5 labels, where other folders are"),
        (["bee", "Bee"], ANIMALS, "class folders 'bee' and 'Bee' both fit the label 'bee'"),
        (["Us"], ["us", "US"], "class folder 'Us' fits several labels"),
        (["crane"], ["crane", "owl", "crane"], "class folder 'crane' fits several labels"),
        (["bee", *WORDNET[:4]], ANIMALS, "'n01440764' is none of the bundle's 5 labels"),
    ],
)
def test_what_fits_in_part_or_twice_is_refused(folders: list[str], labels: list[str], message: str) -> None:
    for by_order in (False, True):
        with pytest.raises(InputError) as caught:
            match_folders(folders, labels, by_order)
        assert message in str(caught.value)


def test_a_folder_without_images_needs_no_label_and_is_noted(tmp_path: Path) -> None:
    named = place(tmp_path / "named", "bee/a.png", "notes/")
    stranger = "1 folders that fit no class and hold no image are left out, such as"
    assert found(named, ANIMALS) == ({"bee/a.png": 1}, [f"{named}: {stranger} 'notes'"])
    numbered = place(tmp_path / "numbered", "0/", "1/a.png", "2/b.png", "tmp/", "7/", "x/")
    labels, notes = found(numbered, ["x", "y", "z"])
    assert labels == {"1/a.png": 1, "2/b.png": 2}
    assert notes == [
        f"{numbered}: class folder '0' holds no readable image file: left out",
        f"{numbered}: 3 folders that fit no class and hold no image are left out, such as '7'",
    ]
    with pytest.raises(InputError, match=r"numbered: class folder '1' is none of the bundle's 4 labels, such as 'w'"):
        found(numbered, ["w", "v", "y", "z"])
    (numbered / "x").rmdir()
    place(numbered, "tmp/a.png")
    with pytest.raises(InputError, match=r"numbered: class folder 'tmp' is none of the bundle's 3 labels"):
        found(numbered, ["x", "y", "z"])


@pytest.mark.parametrize("names", [ANIMALS, WORDNET])
def test_a_folder_without_images_has_no_place_in_the_order(names: list[str], tmp_path: Path) -> None:
    labels, first, by_order = [f"label {name}" for name in names], names[0], names is ANIMALS
    folder = place(tmp_path, f"{first}/", *(f"{name}/a.png" for name in names[1:]))
    with pytest.raises(InputError, match=rf"class folder '{first}' holds no image, and .* order of 4 .* tell 5 class"):
        found(folder, labels, by_order)
    place(folder, f"{first}/a.png", "0 stranger/")
    classes, notes = found(folder, labels, by_order)
    assert classes == {f"{name}/a.png": index for index, name in enumerate(names)}
    assert notes[-1].endswith("1 folders that fit no class and hold no image are left out, such as '0 stranger'")


def test_numbers_do_not_count_by_their_order(tmp_path: Path) -> None:
    labels = [f"label {index}" for index in range(10)]
    folder = place(tmp_path, *(f"{number}/a.png" for number in range(1, 11)))
    with pytest.raises(InputError, match=r"class folder '1' is none .* after the labels, or 0 to 9$"):
        found(folder, labels)
    with pytest.raises(InputError, match=r"class folders are numbers, such as '1', .* the numbers 0 to 9$"):
        found(folder, labels, by_order=True)


@pytest.mark.parametrize("lost", ["dangling", "loop", "heic", "no suffix"])
def test_a_class_without_images_is_named(lost: str, tmp_path: Path) -> None:
    folder = place(tmp_path, "ant/a.png", "ant/notes.txt")
    if lost in ("dangling", "loop"):
        (folder / "bee").symlink_to("bee" if lost == "loop" else "nothing")
        files = []
    else:
        names = [f"bee/{name}{'.heic' if lost == 'heic' else ''}" for name in ("x", "y")]
        place(folder, *names)
        files = [f"{folder}: 2 files are left out, such as '{names[0]}': no known image suffix"]
    vanished = f"{folder}: class folder 'bee' holds no readable image file: left out"
    assert found(folder, ANIMALS) == ({"ant/a.png": 0}, [vanished, *files])


def test_the_order_is_noted_and_told(tmp_path: Path) -> None:
    folder = place(tmp_path / "set", "one/a.png", "two/b.png")
    with pytest.raises(InputError, match="or give `labels_by_order=True` if they are the classes in sorted order"):
        found(folder, ["x", "y"])
    labels, notes = found(folder, ["x", "y"], by_order=True)
    assert labels == {"one/a.png": 0, "two/b.png": 1}
    in_order = "count as the classes in sorted order as text, from 'one' to 'two'"
    assert notes == [f"{folder}: its 2 class folders fit no label, and {in_order}"]
    named = place(tmp_path / "named", "x/a.png")
    assert labels_by(find_images([named], ["x", "y"])) == "name"
    assert labels_by(find_images([named, folder], ["x", "y"], True)) == "order"
    assert labels_by(find_images([named / "x"], ["x", "y"])) is None


def test_hidden_files_and_folders_are_left_out(tmp_path: Path) -> None:
    names = (".ipynb_checkpoints/a.png", "bee/a.png", "bee/._a.png", "bee/.cache/a.png")
    assert found(place(tmp_path / "set", *names), ANIMALS) == ({"bee/a.png": 1}, [])
    plain = place(tmp_path / "plain", "a.png", "._a.png", ".ipynb_checkpoints/a.png")
    assert found(plain, ANIMALS) == ({"a.png": None}, [])


def test_what_is_left_out_is_noted(tmp_path: Path) -> None:
    beside = place(tmp_path / "beside", "bee/a.png", "bee/more/c.png", "x.png", "y.png")
    assert found(beside, ANIMALS) == (
        {"bee/a.png": 1},
        [
            f"{beside}: 2 images beside the class folders are left out",
            f"{beside}: 1 folders inside class folders are left out, such as 'more'",
        ],
    )
    thumbs = place(tmp_path / "thumbs", "thumbs/a.png", "x.png")
    assert found(thumbs, ANIMALS) == (
        {"x.png": None},
        [f"{thumbs}: 1 folders in it are left out, such as 'thumbs': none is named after a label"],
    )


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no FIFOs")
def test_what_is_no_regular_file_is_left_out(tmp_path: Path) -> None:
    place(tmp_path, "a.png")
    os.mkfifo(tmp_path / "b.png")
    (tmp_path / "c.png").symlink_to(tmp_path / "nothing.png")
    (tmp_path / "d.png").symlink_to("d.png")
    assert found(tmp_path, ANIMALS) == (
        {"a.png": None},
        [f"{tmp_path}: 3 files are left out, such as 'b.png': they are no regular files"],
    )


def test_a_folder_that_cannot_be_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(InputError, match=r"cannot be listed \(Permission denied\); give other images, or access$"):
        find_images([tmp_path], ANIMALS)


@pytest.mark.parametrize("path", ["a" * 300, "a\0b", "\ud800", b"a.png", None, 3])
def test_paths_that_cannot_be(path: str) -> None:
    with pytest.raises(InputError):
        find_images([path], ANIMALS)


def test_calibration_goes_on_without_labels(tmp_path: Path) -> None:
    folder, notes = place(tmp_path, "owl/a.png", "newt/b.png"), list[str]()
    files = find_calibration_images([folder], ANIMALS, note=notes.append)
    assert [file.label for file in files] == [None, None]
    assert len(notes) == 1
    assert notes[0].startswith(f"{folder}: class folder 'newt' is none of the bundle's 5 labels")
    assert notes[0].endswith("; going on without labels")
    with pytest.raises(InputError, match="is none of the bundle's 5 labels"):
        find_calibration_images([folder], ANIMALS, by_order=True)
    assert [file.label for file in find_calibration_images([folder], ["x", "y"], by_order=True)] == [0, 1]


QUICK = ("--iterations", 1, "--warmup", 0, "--threads", 1, "--no-dense", "--no-specialise")


def test_the_command_tells_how_labels_were_matched(tiny_bundle: Path, tmp_path: Path) -> None:
    folder = place(tmp_path / "set", *(f"{i} {name}/a.png" for i, name in enumerate(ANIMALS)), "beside.png")
    arguments = (tiny_bundle, "--images", folder, *QUICK)
    without = refusal(invoke(run, tiny_bundle, "--labels-by-order", *QUICK), code=2)
    assert "--labels-by-order is of the class folders of --images; give them too" in without
    (folder / "beside.png").unlink()
    assert "class folder '0 ant' is none of the bundle's 5 labels" in refusal(invoke(run, *arguments))
    place(folder, "beside.png")
    done = invoke(run, *arguments, "--labels-by-order")
    assert done.exit_code == 0, done.output
    assert f"adavit-run: note: {folder}: 1 images beside the class folders are left out\n" in done.stderr
    assert "of 5 images, labelled by the order of their folders" in done.stdout
    report = json.loads(invoke(run, *arguments, "--labels-by-order", "--json", "-").stdout)
    assert (report["labels_by"], report["accuracy"]["n"], len(report["notes"])) == ("order", 5, 2)


def test_no_option_that_would_be_ignored(tiny_bundle: Path, labelled: Path, tmp_path: Path) -> None:
    order = "--labels-by-order"
    exported = invoke(export, "demo", "--output", tmp_path / "bundle", order)
    assert f"nothing is calibrated in fp32, give a --precision or leave out {order}" in refusal(exported, code=2)


def test_budgets_are_calibrated_on_other_classes(bundle: Path, tmp_path: Path) -> None:
    for name in ("owl", "newt"):
        (tmp_path / "set" / name).mkdir(parents=True)
        pictures_in(tmp_path / "set" / name, 8)
    done = invoke(
        export, bundle, "--budgets", "0.9", "--calibration-images", tmp_path / "set", "--threads", 1, "--json", "-"
    )
    assert done.exit_code == 0, done.output
    assert "adavit-export: note: " in done.stderr
    assert "going on without labels" in done.stderr
    report = json.loads(done.stdout)["budgets"]
    assert (report["calibration"]["labelled"], len(report["notes"])) == (False, 1)


def test_images_in_folders_of_class_folders(tmp_path: Path) -> None:
    for name in ("bee/images/0.png", "bee/images/more/1.png", "dog/2.png", "dog/thumbs/3.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        picture().save(tmp_path / name)
    (tmp_path / "bee" / "round").symlink_to(tmp_path)
    notes: list[str] = []
    found = find_images([tmp_path], ["ant", "bee", "dog"], note=notes.append)
    listed = [(file.path.relative_to(tmp_path).as_posix(), file.label) for file in found]
    assert listed == [("bee/images/0.png", 1), ("dog/2.png", 2)]
    assert [note for note in notes if "folders inside class folders are left out" in note]
