"Tests of the Colab notebook without the real download, on a small file of the same form."

import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import nbformat
import polars as pl
import pytest

from widedeep_nb import __version__
from widedeep_nb.lib.core import UserError
from widedeep_nb.lib.parameters import (
    find_notebooks,
    list_chapters,
    read_parameters,
    select_chapters,
)
from widedeep_nb.lib.publish import static_pages
from widedeep_nb.lib.runner import execute_notebook, make_run_plan
from widedeep_nb.lib.runs import Run
from widedeep_nb.lib.shop import demo_shop
from widedeep_nb.lib.templates import render

NOTEBOOK = Path(__file__).parents[1] / "nbs/run_on_colab.ipynb"
CHAPTERS = sorted(NOTEBOOK.parent.glob("[0-9][0-9]_*.ipynb"))
TEMPLATE = NOTEBOOK.parents[1] / "templates/chapter.ipynb"
CELLS = nbformat.read(NOTEBOOK, 4).cells


def cell_with(text):
    return next(c for c in CELLS if c.cell_type == "code" and text in c.source)


def test_form():
    assert "blob/main/nbs/run_on_colab.ipynb)" in CELLS[0].source
    assert (
        set(read_parameters(NOTEBOOK)) == {"dataset", "protocol", "out", "chapters", "fast"}
        and read_parameters(NOTEBOOK)["dataset"].default == "electronics-2014"
    )
    assert NOTEBOOK not in static_pages(NOTEBOOK.parent)  # it is not run when figures are published
    for text in ("run_report(", "reported = ", "make_archive"):
        assert "#| eval: false" in cell_with(text).source  # nor by nbdev_test


class Shell:
    "Notebook shell that records what it is asked to do."

    def __init__(self):
        self.done = []

    def system(self, command):
        self.done.append(command)

    def run_line_magic(self, name, line):
        self.done.append(f"%{name} {line}")

    def set_custom_exc(self, kinds, handler):
        self.done.append((kinds, handler))


def run_cell(source, monkeypatch, on_colab):
    "Run a cell with a recording shell, on Colab or elsewhere."
    shell = Shell()
    monkeypatch.setattr(os.path, "exists", lambda p: on_colab and p == "/content")
    monkeypatch.setattr(os, "chdir", lambda p: shell.done.append(f"cd {p}"))
    exec(source, {"get_ipython": lambda: shell})
    return shell.done


@pytest.mark.parametrize("on_colab", [False, True])
def test_it_installs_on_colab_only(monkeypatch, on_colab):
    cell = cell_with("git clone")
    assert "#| eval: false" in cell.source and "skip-execution" in cell.metadata.tags
    done = run_cell(cell.source, monkeypatch, on_colab)
    assert [d.split()[0] for d in done] == (["git", "cd", "pip", "%pip"] if on_colab else [])
    if on_colab:
        assert f"--branch v{__version__} " in done[0] and "-c /content/colab.txt" in done[3]


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda p: p.stem)
def test_chapters_install_the_release_and_replace_nothing(path, monkeypatch):
    source = nbformat.read(path, 4).cells[0].source
    assert source == nbformat.read(TEMPLATE, 4).cells[0].source
    assert "#| hide" in source and "#| eval: false" in source
    assert run_cell(source, monkeypatch, on_colab=False) == []
    listed, installed = run_cell(source, monkeypatch, on_colab=True)
    assert listed == "pip list --format=freeze > /content/colab.txt"
    assert installed.startswith("%pip install -q -c /content/colab.txt ")
    assert installed.endswith(f"@v{__version__}'")


def test_a_failed_installation_stops_the_cell(monkeypatch):
    source = nbformat.read(TEMPLATE, 4).cells[0].source
    monkeypatch.setitem(sys.modules, "widedeep_nb", None)
    with pytest.raises(ImportError):
        run_cell(source, monkeypatch, on_colab=True)


def test_drive_is_mounted_for_a_run_on_drive(monkeypatch):
    mounted, colab = [], ModuleType("google.colab")
    colab.drive = SimpleNamespace(mount=mounted.append)
    monkeypatch.setitem(sys.modules, "google", ModuleType("google"))
    monkeypatch.setitem(sys.modules, "google.colab", colab)
    source = cell_with("drive.mount").source
    exec(source, {"out": "", "os": os})
    assert mounted == []
    exec(source, {"out": "/content/drive/MyDrive/widedeep", "os": os})
    assert mounted == ["/content/drive"]


def test_a_user_error_is_one_line(monkeypatch, capsys):
    shell = Shell()
    space = {"get_ipython": lambda: shell, "UserError": UserError, "sys": sys}
    exec(cell_with("set_custom_exc").source, space)
    (kinds, handler), *_ = shell.done
    assert kinds == (UserError,)
    handler(shell, UserError, UserError("unknown dataset 'shop'"), None)
    assert capsys.readouterr().err == "Please check your choices: unknown dataset 'shop'\n"


@pytest.mark.parametrize("chapters", ["", "01", "01-03", "07", "21,23"])
@pytest.mark.parametrize("fast", [False, True])
def test_every_choice_of_chapters_can_be_fast(chapters, fast, monkeypatch, tmp_path, capsys):
    "Check that only parameters are passed that one of the chosen chapters declares."
    plans = []

    def run_report(plan, echo):
        plans.append(plan)
        return SimpleNamespace(folder=tmp_path)

    space = {"dataset": "demo", "protocol": "strict", "out": str(tmp_path / "run")}
    space |= {"chapters": chapters, "fast": fast, "summary_text": lambda run: ""}
    space |= {"run_report": run_report, "display_md": print, "make_run_plan": make_run_plan}
    space |= {"find_notebooks": find_notebooks, "list_chapters": list_chapters}
    space |= {"read_parameters": read_parameters, "select_chapters": select_chapters}
    exec(cell_with("run_report(").source, space)
    passed = set(plans[0].settings["parameters"])
    declared = set().union(*[read_parameters(path) for path in plans[0].chapters])
    assert passed <= declared and (not passed or fast)
    assert chapters or not fast or passed == {"epochs", "seeds", "trials", "time_budget_min"}


def test_the_report_is_shown(tmp_path):
    (tmp_path / "index.html").write_text('<p class="a">5 < 6</p>', encoding="utf8")
    shown = []
    space = {"run": SimpleNamespace(folder=tmp_path), "display": shown.append}
    space |= {"HTML": lambda text: text, "render": render}
    exec(cell_with("report_frame").source, space)
    assert shown[0].startswith("<iframe srcdoc=") and "&lt;p class=&#34;a&#34;&gt;" in shown[0]


def test_the_run_is_packed_and_downloaded(monkeypatch, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/index.html").write_text("the report")
    space = {
        "shutil": __import__("shutil"),
        "sys": sys,
        "run": SimpleNamespace(folder=tmp_path / "run"),
    }
    exec(cell_with("make_archive").source, space)
    assert "run.zip" in capsys.readouterr().out and (tmp_path / "run.zip").stat().st_size > 0
    given, colab = [], ModuleType("google.colab")
    colab.files = SimpleNamespace(download=given.append)
    monkeypatch.setitem(sys.modules, "google", ModuleType("google"))
    monkeypatch.setitem(sys.modules, "google.colab", colab)
    exec(cell_with("make_archive").source, space)
    assert given == [str(tmp_path / "run.zip")]


@pytest.mark.long
def test_everything_but_the_download(tmp_path):
    "Check the whole run on a file like that of 2014: no header; user, item, rating, seconds."
    log = demo_shop(n_ratings=8000, seed=0).interactions.filter(pl.col("rating").is_not_null())
    rows = log.select(
        "user",
        "item",
        pl.col("rating").cast(pl.Float64),
        pl.col("timestamp").cast(pl.Datetime("ms")).dt.epoch("s"),
    )
    rows.write_csv(tmp_path / "ratings_Electronics.csv", include_header=False)
    error = execute_notebook(
        NOTEBOOK,
        tmp_path / "done.ipynb",
        {
            "dataset": str(tmp_path / "ratings_Electronics.csv"),
            "out": str(tmp_path / "run"),
            "fast": True,
        },
    )
    assert error is None, error
    done = nbformat.read(tmp_path / "done.ipynb", 4)
    said = "\n".join(
        o.get("text") or o["data"].get("text/markdown") or o["data"].get("text/plain", "")
        for c in done.cells
        for o in c.get("outputs", [])
    )
    assert (
        "GPU" in said and "07 baselines" in said and "use " in said and "packed as run.zip" in said
    )
    table = next(
        o
        for c in done.cells
        for o in c.get("outputs", [])
        if o.get("metadata", {}).get("widedeep", {}).get("label") == "tbl-beside-the-original"
    )
    assert all(
        f">{text}</td>" in table.data["text/html"]
        for text in (
            "original report",
            "1.2450",
            "0.0063",
            "wide-deep",
            "damped-bias",
            "popularity",
        )
    )
    run = Run(tmp_path / "run")
    assert (
        run.protocol.name == "filtered-first"
        and (run.folder / "index.html").exists()
        and (tmp_path / "run.zip").exists()
        and run.manifest["parameters"]
        == {"epochs": 3, "seeds": 1, "trials": 1, "time_budget_min": 2.0}
    )
