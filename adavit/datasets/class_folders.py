"""Which classes a folder's class-named folders stand for.

By name, they carry the labels, whatever their case and form of Unicode. By number, they are 0 to C - 1, the classes'
indices. By order, they are as many as the classes and stand for them as they are sorted: where all are WordNet ids,
which is the order of ImageNet's classes, or where the caller says so. A guess would be an accuracy that is wrong.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from adavit.errors import InputError, shown

__all__ = ["ClassFolderError", "Classes", "Kind", "folded", "match_folders", "misfit"]

Kind = Literal["name", "number", "order"]
WORDNET_ID = re.compile(r"n[0-9]{8}")
NUMBER = re.compile(r"[0-9]{1,9}")
UNFIT = "is none of the bundle's {} labels"


class ClassFolderError(InputError):
    """Class folders do not fit the labels; as unlabelled images they are of use."""


@dataclass(frozen=True)
class Classes:
    """What class folders stand for.

    Attributes:
        index: the class of each folder, by its name.
        by: how it is known: by the folders' names, their numbers, or their order.
    """

    index: Mapping[str, int]
    by: Kind


def match_folders(
    folders: Sequence[str],
    labels: Sequence[str],
    by_order: bool = False,
    empty: frozenset[str] = frozenset(),
    note: Callable[[str], None] | None = None,
    unfit: str = UNFIT,
) -> Classes | None:
    """The classes of folders, or None where none of them fits a label.

    Args:
        folders: names of the folders.
        labels: the classes' names, by index.
        by_order: whether folders that fit no label, and are as many as these, stand for them in sorted order.
        empty: those of the folders without images: they need not fit where others do, and have no place in the order.
        note: told where the order counts.
        unfit: what to say of a folder that fits no label, of which there are {}.

    Raises:
        ClassFolderError: only some of the folders fit a label, or one fits several, or several fit one; or they are
            to count by their order, and are numbers, or as many only with empty ones.
    """
    found = _by_name(folders, labels)
    strangers = [name for name in folders if name not in found and name not in empty]
    if strangers and not empty.issuperset(found):
        stranger = f"class folder {shown(strangers[0])} {unfit.format(len(labels))}"
        raise ClassFolderError(f"{stranger}, where other folders are; rename or remove it")
    if found and not strangers:
        return Classes(found, "name")
    if numbers := _by_number(folders, labels, empty):
        return Classes(numbers, "number")
    return _by_order([name for name in folders if name not in empty], labels, by_order, sorted(empty), note)


def misfit(folders: Sequence[str], labels: Sequence[str], unfit: str = UNFIT) -> ClassFolderError:
    """What to say of folders, all with images, of which none fits a label."""
    advice = "name the folders after the labels"
    if _are_numbers(folders):
        advice += f", or 0 to {len(labels) - 1}"
    elif len(folders) == len(labels):
        advice += ", or give `labels_by_order=True` if they are the classes in sorted order"
    such = f", such as {shown(labels[0])}" if labels else ""
    stranger = min(folders, key=lambda name: bool(NUMBER.fullmatch(name)))
    return ClassFolderError(f"class folder {shown(stranger)} {unfit.format(len(labels))}{such}; {advice}")


def folded(name: str) -> str:
    """A name without what file systems and people change in it."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name.strip()).casefold())


def _by_name(folders: Sequence[str], labels: Sequence[str]) -> dict[str, int]:
    """The classes of the folders that carry a label."""
    exact: dict[str, list[int]] = {}
    alike: dict[str, list[int]] = {}
    for index, label in enumerate(labels):
        exact.setdefault(label, []).append(index)
        alike.setdefault(folded(label), []).append(index)
    found: dict[str, int] = {}
    holder: dict[int, str] = {}
    for name in folders:
        fits = exact.get(name) or alike.get(folded(name), [])
        if len(fits) > 1:
            raise ClassFolderError(
                f"class folder {shown(name)} fits several labels: {shown(labels[fits[0]])} and "
                f"{shown(labels[fits[1]])} of the classes {fits[0]} and {fits[1]}; name the classes differently"
            )
        if fits:
            other = holder.setdefault(fits[0], name)
            if other != name:
                raise ClassFolderError(
                    f"class folders {shown(other)} and {shown(name)} both fit the label {shown(labels[fits[0]])}; "
                    "join them, or rename one"
                )
            found[name] = fits[0]
    return found


def _by_number(folders: Sequence[str], labels: Sequence[str], empty: frozenset[str]) -> dict[str, int]:
    """The classes of folders that are the numbers 0 to C - 1; none where labels are other numbers."""
    if any(NUMBER.fullmatch(label) and int(label) != index for index, label in enumerate(labels)):
        return {}
    classes = range(len(labels))
    numbers = {name: int(name) for name in folders if NUMBER.fullmatch(name)}
    fit = {name: number for name, number in numbers.items() if name not in empty or number in classes}
    strangers = any(name not in fit and name not in empty for name in folders)
    return fit if not strangers and sorted(fit.values()) == list(classes) else {}


def _by_order(
    folders: Sequence[str], labels: Sequence[str], asked: bool, empty: Sequence[str], note: Callable[[str], None] | None
) -> Classes | None:
    """The classes of as many folders with images; None where their order does not count."""
    wordnet = _are_wordnet_ids(folders) and not any(WORDNET_ID.fullmatch(folded(label)) for label in labels)
    if not (wordnet or asked):
        return None
    if len(folders) < len(labels) <= len(folders) + len(empty):
        raise ClassFolderError(
            f"class folder {shown(empty[0])} holds no image, and without such the order of {len(folders)} folders "
            f"cannot tell {len(labels)} classes; put images in it, or name the folders after the labels"
        )
    if len(folders) != len(labels):
        return None
    if _are_numbers(folders):
        raise ClassFolderError(
            f"class folders are numbers, such as {shown(folders[0])}, which do not count as classes by their order; "
            f"rename them after the labels, or to the numbers 0 to {len(labels) - 1}"
        )
    ordered = sorted(folders, key=folded if wordnet else None)
    if note:
        why = "are WordNet ids" if wordnet else "fit no label"
        between = f"from {shown(ordered[0])} to {shown(ordered[-1])}"
        note(f"its {len(folders)} class folders {why}, and count as the classes in sorted order as text, {between}")
    return Classes({name: index for index, name in enumerate(ordered)}, "order")


def _are_numbers(names: Sequence[str]) -> bool:
    return all(NUMBER.fullmatch(name) for name in names)


def _are_wordnet_ids(names: Sequence[str]) -> bool:
    """Whether names are WordNet ids, each another one."""
    distinct = {folded(name) for name in names}
    return len(distinct) == len(names) and all(WORDNET_ID.fullmatch(name) for name in distinct)
