"The words of GLOSSARY.md are the words of the project."

import ast
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "nbs").rglob("*.ipynb"))
GLOSSARY = (ROOT / "GLOSSARY.md").read_text(encoding="utf8")
BANNED = re.findall(r"\*\*([a-z ]+)\*\*", GLOSSARY)
# keys and file names of runs stay as they are
FILES = re.compile(r"newcomers\.json|[`\"\'](newcomers)[`\"\']|\.newcomers")
WORDS = re.compile(r"\b(" + "|".join(BANNED) + r")s?\b", re.I)


def cells(path, kind):
    "Return the sources of a notebook's cells of one kind."
    notebook = json.loads(path.read_text(encoding="utf8"))
    return ["".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == kind]


def tree(source):
    "Parse a cell without its magics."
    return ast.parse(re.sub(r"(?m)^(\s*)[%!].*$", r"\1pass", source))


def identifiers(node):
    "Return the names that a piece of code defines: functions, classes, arguments."
    for n in ast.walk(node):
        if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield n.name
        if isinstance(n, ast.arg):
            yield n.arg


def found(text):
    "Return the banned words in a text."
    return [m[0] for m in WORDS.finditer(FILES.sub(" ", text))]


def test_the_glossary_bans_words():
    assert len(BANNED) >= 10 and "nought" in BANNED
    assert found("a stranger gets nought, by lot") == ["stranger", "nought", "by lot"]
    assert found("a random order") == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=[p.stem for p in NOTEBOOKS])
def test_names(path):
    names = {n for cell in cells(path, "code") for n in identifiers(tree(cell))}
    parts = {n: set(n.lower().split("_")) for n in names}
    banned = {w for w in BANNED if " " not in w}
    plural = banned | {w + "s" for w in banned} | {"lot", "told"}
    assert [n for n in sorted(names) if parts[n] & plural] == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=[p.stem for p in NOTEBOOKS])
def test_texts_in_code(path):
    "Look at docstrings, captions, messages, labels."
    strings = [
        n.value
        for cell in cells(path, "code")
        for n in ast.walk(tree(cell))
        if isinstance(n, ast.Constant) and isinstance(n.value, str) and " " in n.value
    ]
    assert {s[:80]: found(s) for s in strings if found(s)} == {}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=[p.stem for p in NOTEBOOKS])
def test_headings(path):
    headings = re.findall(r"(?m)^#+ .+$|^> .+$", "\n".join(cells(path, "markdown")))
    assert [h for h in headings if found(h)] == []


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_pages(name):
    assert found((ROOT / name).read_text(encoding="utf8")) == []
