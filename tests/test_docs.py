"""The site: its links lead somewhere, its names exist, its commands and Python lines work, its tables say their commit."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import documents
import pytest
import typer
from documents import DOCS, ROOT

import topiarist
from topiarist.allocate import ALLOCATIONS
from topiarist.cli.app import OPTIONS, RESUMING, app
from topiarist.cli.from_options import understood
from topiarist.models import FAMILIES
from topiarist.pipelines.recipes.recipe import read_recipe
from topiarist.solvers import SOLVERS
from topiarist.structured import METHODS

PAGES = documents.pages()
BASELINES = {"magnitude", "random", "uniform", "occlusion"}
"""Methods that stand on no page of their own."""
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
NAME = re.compile(r"`((?:topiarist|tp)\.[A-Za-z_][\w.]*)")
FLAG = re.compile(r"`(--[a-z][a-z-]+)(?!\w)")
"""A code span that begins with a flag; those of other programs stand behind their names."""
COMMIT = re.compile(r"\*(?:Measured|Counted)[^*]*(?:commits?|format)[^*]*\*")


def anchors(text: str) -> set[str]:
    """Of every heading, as mkdocs and GitHub name them."""
    heads = re.findall(r"^#+ (.*)$", documents.prose(text), flags=re.MULTILINE)
    plain = (re.sub(r"[^\w\s-]", "", head.replace("`", "")).strip().lower() for head in heads)
    return {re.sub(r"[\s]", "-", head) for head in plain}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str):
    for target in LINK.findall(documents.prose(PAGES[page])):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file.read_text()), target


@pytest.mark.parametrize("page", PAGES)
def test_names_in_code_exist(page: str):
    for name in NAME.findall(PAGES[page]):
        parts = name.replace("tp.", "topiarist.", 1).split(".") if name.startswith("tp.") else name.split(".")
        value: object = topiarist
        for number, part in enumerate(parts[1:], start=2):
            if not hasattr(value, part):  # a room that shares its name with a function, or one that nothing imported
                value = importlib.import_module(".".join(parts[: number - 1]))
            if not hasattr(value, part):
                importlib.import_module(".".join(parts[:number]))
            value = getattr(value, part)


def test_flags_exist():
    commands: Any = typer.main.get_command(app)
    options = [option for command in commands.commands.values() for option in command.params]
    known = {name for option in options for name in (*option.opts, *option.secondary_opts)}
    pages = {page: text for page, text in PAGES.items() if not page.startswith(("docs/develop/", "CHANGELOG"))}
    named = {(page, flag) for page, text in pages.items() for flag in FLAG.findall(text)}
    assert not {(page, flag) for page, flag in named if understood([flag], OPTIONS)[0] not in known}


def test_the_reference_names_the_commands_that_resume():
    said = re.search(r"The same command then resumes for ([^;]*);", PAGES["docs/reference/cli.md"])
    assert said and set(re.findall(r"`(\w+)`", said[1])) == RESUMING


def test_every_page_is_in_the_navigation():
    listed = set(re.findall(r"[\w./-]+\.md", (ROOT / "mkdocs.yml").read_text()))
    assert listed == {str(file.relative_to(DOCS)) for file in DOCS.rglob("*.md")}


def test_every_method_has_a_page():
    text = "".join(text for page, text in PAGES.items() if page.startswith("docs/methods/"))
    names = [f"`topiarist.solvers.{method.__name__}`" for name, method in SOLVERS.items() if name not in BASELINES]
    names += [f"`topiarist.allocate.{rule.__name__}`" for name, rule in ALLOCATIONS.items() if name not in BASELINES]
    names += [f'`topiarist.structured.METHODS["{name}"]`' for name in METHODS if name not in BASELINES]
    assert not [name for name in names if name not in text]


def test_every_figure_is_used():
    used = {Path(target).name for text in PAGES.values() for target in LINK.findall(text) if target.endswith(".svg")}
    assert used == {file.name for file in (DOCS / "figures").glob("*.svg")}


@pytest.mark.parametrize("page", [page for page in PAGES if page.startswith("docs/results/") and "index" not in page])
def test_tables_of_results_say_their_commit(page: str):
    tables = re.findall(r"(?:^\|.*\n)+", PAGES[page], flags=re.MULTILINE)
    assert 1 <= len(tables) <= 3
    for table in tables:
        after = PAGES[page].split(table, 1)[1].lstrip("\n").split("\n", 1)[0]
        assert COMMIT.match(after), after


def test_commits_exist():
    if not (ROOT / ".git").exists():
        pytest.skip("no history here")
    shallow = subprocess.run(["git", "rev-parse", "--is-shallow-repository"], cwd=ROOT, capture_output=True, text=True)
    if shallow.stdout.strip() != "false":
        pytest.skip("a shallow clone")
    named = {
        h for page, text in PAGES.items() if page.startswith("docs/") for h in re.findall(r"`([0-9a-f]{7})`", text)
    }
    for commit in sorted(named):
        subprocess.run(["git", "cat-file", "-e", f"{commit}^{{commit}}"], cwd=ROOT, check=True)


def test_recipes_are_read(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    documents.furnish(tmp_path, "")
    found = re.findall(r"^```yaml\n(topiarist:.*?)^```", "".join(PAGES.values()), flags=re.DOTALL | re.MULTILINE)
    for number, text in enumerate(found):
        file = tmp_path / f"{number}.yaml"
        file.write_text(text)
        assert read_recipe(str(file)).steps
    assert found


RUNNABLE = [page for page, text in PAGES.items() if page.startswith("docs/") and any(documents.blocks(text))]


@pytest.mark.slow
@pytest.mark.parametrize("page", RUNNABLE)
def test_commands_and_lines_run(page: str, tmp_path: Path, monkeypatch, capsys):
    before = set(FAMILIES)
    documents.furnish(tmp_path, PAGES[page])
    try:
        documents.run_page(PAGES[page], tmp_path, monkeypatch, capsys)
    finally:
        for kind in set(FAMILIES) - before:  # the page on families adds a row
            del FAMILIES[kind]


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path: Path):
    pytest.importorskip("mkdocstrings", reason="pip install 'topiarist[docs]'")
    pytest.importorskip("material", reason="pip install 'topiarist[docs]'")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "reference" / "cli.html").stat().st_size > 10_000
