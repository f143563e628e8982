"The recipes of CONTRIBUTING.md work as they are written."

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf8")
RECIPES = {
    name: body
    for name, body in re.findall(r"^## Recipe: (.+?)\n(.*?)(?=^## |\Z)", TEXT, re.M | re.S)
}
MOST_STEPS = 10


def blocks(recipe):
    "Return the fenced blocks of a recipe: language, attributes, text."
    for language, about, text in re.findall(
        r"^```(\w+) ?(.*?)\n(.*?)^```", RECIPES[recipe], re.M | re.S
    ):
        yield language, dict(pair.split("=") for pair in about.split()), text


def defines(cell, name):
    "Return whether a cell assigns to a name."
    return re.search(rf"^{name}\b.*= ", "".join(cell["source"]), re.M) is not None


def add_cell(path, text, before=None):
    "Add a code cell at the end of a notebook, or before the cell that defines a name."
    notebook = json.loads(path.read_text(encoding="utf8"))
    cells = notebook["cells"]
    cell = {
        "cell_type": "code",
        "execution_count": None,
        "id": "abcd1234",
        "metadata": {},
        "outputs": [],
    }
    cell["source"] = text.rstrip().splitlines(keepends=True)
    place = next((i for i, c in enumerate(cells) if before and defines(c, before)), len(cells))
    cells.insert(place, cell)
    path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf8")


def add_entry(path, table, line):
    "Add a line to a table, after the last line of the same form."
    notebook = json.loads(path.read_text(encoding="utf8"))
    cell = next(c for c in notebook["cells"] if c["cell_type"] == "code" and defines(c, table))
    lines = "".join(cell["source"]).split("\n")

    def form(text):
        return re.sub(r'"[^"]*"', '""', text).strip()[:8]

    last = max(i for i, other in enumerate(lines) if form(other) == form(line))
    indent = re.match(r" *", lines[last])[0]
    lines.insert(last + 1, indent + line.strip())
    cell["source"] = "\n".join(lines).splitlines(keepends=True)
    path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf8")


def add_line(path, after, line):
    "Add a line to a text file after the line that contains `after`, with its indent."
    lines = path.read_text(encoding="utf8").split("\n")
    place = next(i for i, other in enumerate(lines) if after in other)
    indent = re.match(r" *", lines[place])[0]
    lines.insert(place + 1, indent + line.strip())
    path.write_text("\n".join(lines), encoding="utf8")


@pytest.fixture
def checkout(tmp_path):
    "Copy what a contributor edits."
    for folder in ("nbs", "widedeep_nb", "templates"):
        shutil.copytree(
            ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__")
        )
    for name in ("settings.ini", "pyproject.toml", "_quarto.yml"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe(recipe, checkout):
    steps = re.findall(r"^\d+\. ", RECIPES[recipe], re.M)
    assert 0 < len(steps) <= MOST_STEPS
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = os.environ | {"PATH": path, "PYTHONPATH": str(checkout)}
    ran = 0
    for language, about, text in blocks(recipe):
        if "cell" in about:
            add_cell(checkout / about["cell"], text, about.get("before"))
        elif "table" in about:
            add_entry(checkout / about["in"], about["table"], text)
        elif "after" in about:
            add_line(checkout / about["in"], about["after"], text)
        elif language == "sh":
            script = ["bash", "-euc", text]
            done = subprocess.run(
                script, cwd=checkout, env=environment, capture_output=True, text=True
            )
            assert done.returncode == 0, done.stdout + done.stderr
            ran += 1
    assert ran
    lint = ["ruff", "check", "nbs"]
    done = subprocess.run(lint, cwd=checkout, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_there_are_recipes_for_what_people_add():
    expected = {"a recommender", "a loss", "a metric", "a chapter", "a library notebook"}
    assert expected <= set(RECIPES)


def test_new_chapter_is_run_and_in_order(checkout):
    "Check that a chapter made from the template is listed last, with the form that all chapters have."
    from widedeep_nb.lib.parameters import list_chapters, read_parameters

    new = checkout / "nbs/24_returning_users.ipynb"
    shutil.copy(checkout / "templates/chapter.ipynb", new)
    assert list_chapters(checkout / "nbs")[-1] == new
    assert set(read_parameters(new)) == {"out"}
    cells = json.loads(new.read_text(encoding="utf8"))["cells"]
    headings = ["".join(c["source"]).split("\n")[0] for c in cells if c["cell_type"] == "markdown"]
    assert headings[0].startswith("# ") and headings[2].startswith("## By hand")
    assert headings[-1] == "## In short"
    first = json.loads((checkout / "nbs/01_data.ipynb").read_text(encoding="utf8"))["cells"][0]
    assert cells[0]["source"] == first["source"]  # the cell that installs the package on Colab


def test_template_of_a_library_notebook_says_where_it_stands():
    cells = json.loads((ROOT / "templates/library.ipynb").read_text(encoding="utf8"))["cells"]
    assert "A library notebook; it stands before chapter 01." in "".join(cells[0]["source"])
