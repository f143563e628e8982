"A step is computed again where code that it runs has changed, and only then."

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from widedeep_nb.lib import datasets
from widedeep_nb.lib import runs as runs_module
from widedeep_nb.lib.runner import unexported_code
from widedeep_nb.lib.runs import Run, code_hash, import_closure, parse_code, step

ROOT = Path(__file__).parents[1]
CHAPTERS = sorted((ROOT / "nbs").glob("[0-9][0-9]_*.ipynb"))
MODULES = {
    "readers": '"Read files."\n\n\ndef read(path):\n    "Read a file."\n    return path\n',
    "splits": "from .readers import read\n\n\n@step()\ndef split(run):\n    run.write('a.json', [read(1)])\n",
    "plots": "from widedeep_nb.readers import read\n\n\n@step()\ndef plot(run):\n    run.write('b.json', [read(2)])\n",
    "models": "@step(split)\ndef fit(run):\n    from .splits import split\n\n    run.write('c.json', [split])\n",
}


@pytest.fixture
def package(tmp_path, monkeypatch):
    "Make a package of four modules and let core look for code there."
    folder = tmp_path / "package"
    folder.mkdir()
    for name, text in MODULES.items():
        (folder / f"{name}.py").write_text(text)
    monkeypatch.setattr(runs_module, "PACKAGE", folder)
    forget()
    yield folder
    forget()


def forget():
    "Forget which code was read: a new process would read it again."
    runs_module._module_code.cache_clear()
    runs_module._step_modules.cache_clear()


def edit(package, module, old, new):
    "Change a module of the package."
    path = package / f"{module}.py"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    forget()


def test_imports_are_followed_wherever_they_stand(package):
    assert import_closure("models") == {"models", "splits", "readers"}
    assert import_closure("plots") == {"plots", "readers"}


@pytest.mark.parametrize(
    "module, old, new, changed",
    [
        ("readers", "return path", "return path + 1", {"split", "plot", "fit"}),
        ("splits", "read(1)", "read(3)", {"split", "fit"}),
        ("plots", "read(2)", "read(3)", {"plot"}),
        ("models", "[split]", "[split, 1]", {"fit"}),
        ("readers", '"Read a file."', '"Read a file; return its path."', set()),
        ("readers", "    return path", "    # the path is enough\n    return path", set()),
    ],
)
def test_an_edit_reaches_the_steps_that_run_it_and_no_others(package, module, old, new, changed):
    homes = {"split": "splits", "plot": "plots", "fit": "models"}
    assert runs_module._step_modules() == homes
    before = {name: code_hash(home) for name, home in homes.items()}
    edit(package, module, old, new)
    assert {n for n, home in homes.items() if code_hash(home) != before[n]} == changed


def test_a_step_runs_again_after_an_edit(package, tmp_path):
    runs = []

    @step()
    def split(run):
        runs.append("split")

    @step(split)
    def fit(run):
        runs.append("fit")

    run = Run(tmp_path / "run")
    fit(run)
    fit(run)
    assert runs == ["split", "fit"]
    edit(package, "models", "[split]", "[split, 1]")
    assert split.is_done(run.manifest) and not fit.is_done(run.manifest)
    fit(run)
    assert runs == ["split", "fit", "fit"]
    edit(package, "readers", "return path", "return path + 1")
    fit(run)
    assert runs == ["split", "fit", "fit", "split", "fit"]


@pytest.mark.parametrize("path", CHAPTERS, ids=[p.stem for p in CHAPTERS])
def test_chapters_are_in_step_with_their_modules(path):
    assert unexported_code(path) == ""


def test_an_edit_that_was_not_exported_is_seen(tmp_path):
    path = tmp_path / "02_eda.ipynb"
    notebook = json.loads((ROOT / "nbs/02_eda.ipynb").read_text())
    cell = next(c for c in notebook["cells"] if "def run_eda(" in "".join(c["source"]))
    cell["source"].append("\n    run.seed + 1")
    path.write_text(json.dumps(notebook))
    assert unexported_code(path)


def test_docstrings_comments_and_the_list_of_names_do_not_count():
    import ast

    def same(a, b):
        return ast.dump(parse_code(a)) == ast.dump(parse_code(b))

    assert same(
        '"A module."\n__all__ = ["f"]\ndef f():\n    "Do."\n    return 1', "def f(): return 1"
    )
    assert same("from .data import load", "from widedeep_nb.data import load")
    names = ast.dump(parse_code("from ..data import load", "widedeep_nb.lib"))
    assert names == ast.dump(parse_code("from widedeep_nb.data import load"))
    assert not same("def f(): return 1", "def f(): return 2")


def test_the_demo_log_changes_with_the_code_of_its_shop(monkeypatch):
    before = datasets.fingerprint("demo")
    assert datasets.fingerprint("demo") == before
    monkeypatch.setattr(datasets, "code_hash", lambda module: f"edited {module}")
    assert datasets.fingerprint("demo") != before


@pytest.mark.long
def test_resume_after_an_edit(tmp_path):
    "Run three chapters, edit the module of one, resume: the ones that import it run again, the others do not."
    for folder in ("nbs", "widedeep_nb"):
        shutil.copytree(
            ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__")
        )
    shutil.copy(ROOT / "settings.ini", tmp_path)
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}

    def run(*options):
        command = [sys.executable, "-m", "widedeep_nb.lib.cli", "run", "--chapters", "01-03"]
        command += ["--dataset", "demo?ratings=2000", "--out", "run", *options]
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return set(re.findall(r"\] (\d\d) \w+ +done before", done.stdout))

    assert run() == set()
    assert run("--resume") == {"01", "02", "03"}
    module = tmp_path / "widedeep_nb/eda.py"
    module.write_text(module.read_text() + "\nEDITED = True\n")
    assert run("--resume") == {"01", "03"}
    module = tmp_path / "widedeep_nb/data.py"
    module.write_text(module.read_text() + "\nEDITED = True\n")
    assert run("--resume") == set()
