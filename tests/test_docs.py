"""What a reader meets first: links that lead somewhere, licences, and one version everywhere."""

import ast
import inspect
import re
import tomllib
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

import adavit
from adavit.version import __version__

REPOSITORY = Path(__file__).parent.parent
PAGES = sorted(page for place in ("*.md", "docs/**/*.md", "examples/*/*.md") for page in REPOSITORY.glob(place))
LINK = re.compile(r"\]\(([^()\s]+)\)")
FENCE = re.compile(r"^ *```.*?^ *```", re.MULTILINE | re.DOTALL)


def prose(page: Path) -> str:
    """A page without its blocks of code."""
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    found: set[str] = set()
    for heading in re.findall(r"^#{1,6} +(.*?) *#*$", prose(page), re.MULTILINE):
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
        found.add(next(name for name in (slug, *(f"{slug}-{n}" for n in range(1, 99))) if name not in found))
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_relative_links_lead_somewhere(page: Path) -> None:
    broken = []
    for link in LINK.findall(prose(page)):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = unquote(link).partition("#")
        target = (page.parent / path).resolve() if path else page
        there = target.exists() and target.is_relative_to(REPOSITORY)
        if not there or (anchor and target.suffix == ".md" and anchor not in anchors(target)):
            broken.append(link)
    assert not broken


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    found: dict[str, Any] = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return found


def test_the_licences_are_there(project: dict[str, Any]) -> None:
    assert project["license"] == "Apache-2.0"
    assert not [name for name in project["classifiers"] if name.startswith("License")]
    texts = {name: (REPOSITORY / name).read_text(encoding="utf-8") for name in project["license-files"]}
    assert "Apache License\n                           Version 2.0, January 2004" in texts["LICENSE"]
    assert "The AdaViT Deploy authors" in texts["NOTICE"]
    images = texts["adavit/demo/images/LICENSE.txt"]
    assert "Copyright (c) 2017 Zalando SE" in images and "Permission is hereby granted" in images


def test_one_version() -> None:
    changes = (REPOSITORY / "CHANGELOG.md").read_text(encoding="utf-8")
    released = re.findall(r"^## \[(\d[^]]*)\] - \d{4}-\d{2}-\d{2}$", changes, re.MULTILINE)
    assert released[0] == __version__
    citation = (REPOSITORY / "CITATION.cff").read_text(encoding="utf-8")
    assert re.findall(r"^version: (.*)$", citation, re.MULTILINE) == [__version__]


def test_the_citation_is_of_the_paper() -> None:
    yaml = pytest.importorskip("yaml")
    citation = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    assert (citation["cff-version"], citation["license"]) == ("1.2.0", "Apache-2.0")
    paper = citation["preferred-citation"]
    assert {"type", "title", "authors", "year", "url"} <= set(paper)
    assert [author["family-names"] for author in paper["authors"]] == [
        "Meng", "Li", "Chen", "Lan", "Wu", "Jiang", "Lim",
    ]  # fmt: skip


def test_the_page_on_python_names_options_that_there_are() -> None:
    page = (REPOSITORY / "docs" / "python.md").read_text(encoding="utf-8")
    options = {name: set(inspect.signature(getattr(adavit, name)).parameters) for name in ("export_bundle", "compare")}
    calls = [node for block in FENCE.findall(page) for node in ast.walk(ast.parse(code(block)))]
    named = {
        (ast.unparse(call.func), word.arg) for call in calls if isinstance(call, ast.Call) for word in call.keywords
    }
    asked = {(name, word) for name, word in named if name.startswith("adavit.")}
    assert asked and not {(name, word) for name, word in asked if word not in options[name.removeprefix("adavit.")]}
    table = page.split("| option | what |")[1].split("\n\n")[0]
    rows = {word for row in table.splitlines()[2:] for word in re.findall(r"`(\w+)`", row.split("|")[1])}
    assert rows and rows <= options["export_bundle"]


def code(block: str) -> str:
    """What is between the fences."""
    return "\n".join(block.strip().splitlines()[1:-1])
