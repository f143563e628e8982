"Tests of the Colab notebook without the real download, on a small file of the same form."

import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import nbformat
import polars as pl
import pytest

from widedeep_nb.lib.parameters import read_parameters
from widedeep_nb.lib.publish import static_pages
from widedeep_nb.lib.runner import execute_notebook
from widedeep_nb.lib.runs import Run
from widedeep_nb.lib.shop import demo_shop

NOTEBOOK = Path(__file__).parents[1] / "nbs/run_on_colab.ipynb"
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


@pytest.mark.parametrize("there", [False, True])
def test_it_installs_on_colab_only(monkeypatch, there):
    cell, done = cell_with("git clone"), []
    assert "#| eval: false" in cell.source and "skip-execution" in cell.metadata.tags
    monkeypatch.setattr(os.path, "exists", lambda p: there and p == "/content")
    monkeypatch.setattr(os, "system", done.append)
    monkeypatch.setattr(os, "chdir", lambda p: done.append(f"cd {p}"))
    exec(cell.source, {})
    assert [d.split()[0] for d in done] == (["git", "cd", "pip"] if there else [])


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
