"Tests of the command line, runner, page, site filter and publishing, on small notebooks."

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import nbformat
import polars as pl
import pytest
import torch
import yaml
from bs4 import BeautifulSoup
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from widedeep_nb.lib.cli import main
from widedeep_nb.lib.core import Split, UserError, to_interactions
from widedeep_nb.lib.parameters import list_chapters, parse_overrides
from widedeep_nb.lib.recommender import RECOMMENDERS, Recommender, register
from widedeep_nb.lib.report_page import render_page
from widedeep_nb.lib.run_recommendations import parse_basket, recommend_from_run
from widedeep_nb.lib.runner import make_run_plan, open_locked_run
from widedeep_nb.lib.runs import Run, dataset_slug
from widedeep_nb.lib.site import site_filter
from widedeep_nb.lib.verdict import summary_text, winners_svg

ROOT = Path(__file__).parents[1]
REAL = sorted((ROOT / "nbs").glob("[0-9][0-9]_*.ipynb"))
# writes one line each time the chapter is run
COUNT = "from pathlib import Path\nif out: print(file=open(Path(out) / f'{name}.ran', 'a'))"
BADGE = "[![Open in Colab](https://colab.example/badge.svg)](https://colab.example/{name})"
SAME_FIGURE = """from IPython.display import HTML, display
display(HTML('<figure id="fig-same"><a href="#fig-same">here</a></figure>'))"""
FAILING = """class UserError(ValueError): pass
assert fail != 'bug', 'as asked'
if fail == 'problem': raise UserError('the file is empty; give another')
(n, rate)"""
EXTERNAL = """import sys
from IPython.display import HTML
print('secret ' + 'of the machine', file=sys.stderr)
HTML('<img src="https://far.example/a.png"><script src="https://far.example/a.js"></script>done')"""
QUOTING = """from widedeep_nb.lib.results import load_results
print([(n, r['metrics'][0]['value']) for n, r in load_results('../results').items()])"""
TABLE = (
    '<div class="wd-table"><table class="wd" id="tbl-b"><caption>All.</caption>'
    "<tr></tr></table></div>"
)


def chapter(folder, name, parameters, *cells):
    nb = new_notebook(
        cells=[
            new_markdown_cell(f"# Chapter {name[3:]}\n\n{BADGE.format(name=name)}"),
            new_code_cell("#| hide\nfrom typing import Optional"),
            new_code_cell(
                f"out: str = ''  # run folder\n{parameters}", metadata={"tags": ["parameters"]}
            ),
            new_code_cell(f"#| hide\nname = '{name}'\n{COUNT}"),
            *cells,
        ]
    )
    nbformat.write(nb, folder / f"{name}.ipynb")


@pytest.fixture
def nbs(tmp_path):
    folder = tmp_path / "nbs"
    folder.mkdir()
    same = new_code_cell(SAME_FIGURE)
    chapter(
        folder,
        "00_first",
        "n: int = 2  # a number",
        new_markdown_cell(
            "See [the second](01_second.ipynb). A mean $\\bar{x}$.\n\n## Twice\n\n## Twice more"
        ),
        new_code_cell("#| export\nprint(n * n)"),
        same,
    )
    chapter(
        folder,
        "01_second",
        "n: int = 2  # a number\nrate: Optional[float] = None  # a rate\nfail: str = ''  # how to fail",
        new_code_cell(FAILING),
    )
    chapter(
        folder,
        "02_third",
        "pause: float = 0.0  # seconds",
        new_code_cell("import time\ntime.sleep(pause)"),
        new_code_cell(EXTERNAL),
        same,
    )
    return folder


def widedeep(*words):
    "Call the command line in this process; return its exit code."
    try:
        main([str(w) for w in words])
    except SystemExit as stopped:
        return stopped.code
    return 0


def ran(out, name):
    return (
        len((out / f"{name}.ran").read_text().splitlines()) if (out / f"{name}.ran").exists() else 0
    )


def statuses(out):
    return {
        name: c["status"]
        for name, c in json.loads((out / "run.json").read_text())["chapters"].items()
    }


def source_of(path):
    return "\n".join(c.source for c in nbformat.read(path, 4).cells)


# --- invalid input, before anything is written


@pytest.mark.parametrize(
    "words, said",
    [
        (
            ["-p", "m=1"],
            [
                "unknown parameter 'm'",
                "n: int = 2 (chapter 00, 01)",
                "rate: Optional[float] = None (chapter 01)",
                "pause: float = 0.0",
            ],
        ),
        (["-p", "n=two"], ["n=two is not valid; it should be a valid integer", "n: int = 2"]),
        (["-p", "rate=fast"], ["rate=fast is not valid", "rate: Optional[float] = None"]),
        (["-p", "n"], ["'-p n' has no value"]),
        (["-p", "out=/tmp"], ["unknown parameter 'out'"]),
        (["--chapters", "00", "-p", "pause=1"], ["unknown parameter 'pause'"]),
        (["--chapters", "04"], ["unknown chapter '04'", "00, 01, 02"]),
        (["--chapters", "02-01"], ["end before they begin", "00, 01, 02"]),
        (["--protocol", "strickt"], ["unknown protocol 'strickt'", "strict"]),
        (["--dataset", "demmo"], ["unknown dataset 'demmo'", "demo", "electronics-2014"]),
        (["--seed", "x"], ["--seed"]),
        (["--seed", "-1"], ["--seed"]),
        (["-f", "nowhere.yaml"], ["nowhere.yaml cannot be read"]),
    ],
)
def test_refused_in_one_line_and_nothing_written(nbs, tmp_path, capsys, words, said):
    assert widedeep("run", "--out", tmp_path / "run", "--notebooks", nbs, *words) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.startswith("error: ") and shown.err.count("\n") == 1
    assert all(s in shown.err for s in said), shown.err
    assert not (tmp_path / "run").exists()


def test_a_folder_of_something_else_is_left_alone(nbs, tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("years of work")
    assert widedeep("run", "--out", tmp_path / "mine", "--notebooks", nbs) == 2
    assert os.listdir(tmp_path / "mine") == ["thesis.txt"]


def test_without_a_checkout(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        "widedeep_nb.__file__", str(tmp_path / "site-packages/widedeep_nb/__init__.py")
    )
    monkeypatch.chdir(tmp_path)
    assert widedeep("run") == 2
    assert "needs a checkout" in capsys.readouterr().err and os.listdir(tmp_path) == []


# --- parameters


def test_values_come_from_a_file_and_from_words(nbs, tmp_path):
    (tmp_path / "given.yaml").write_text("n: 7\nrate: 1e-3\n")

    def plan(*words):
        return make_run_plan(
            tmp_path / "run",
            notebooks=nbs,
            overrides=parse_overrides(words, tmp_path / "given.yaml"),
        ).values

    assert plan() == {"00_first": {"n": 7}, "01_second": {"n": 7, "rate": 0.001}, "02_third": {}}
    assert plan("n=8", "rate=none")["01_second"] == {"n": 8, "rate": None}
    (tmp_path / "given.yaml").write_text("n: [1, 2]\n")
    with pytest.raises(UserError, match="name: value"):
        plan()


def test_the_shop_s_appendix_belongs_to_the_shop(nbs):
    shutil.copy(nbs / "02_third.ipynb", nbs / "23_demo_shop.ipynb")

    def names(dataset):
        return [p.name[:2] for p in list_chapters(nbs, dataset)]

    assert names("demo?ratings=4000") == ["00", "01", "02", "23"] and names("/data/mine.csv") == [
        "00",
        "01",
        "02",
    ]


# --- running


def test_run_chapters_and_resume(nbs, tmp_path, capsys):
    out = tmp_path / "run {n}"  # papermill fills in braces

    def go(*words):
        return widedeep("run", "--out", out, "--notebooks", nbs, *words)

    assert go("--chapters", "00,02", "-p", "n=3") == 0
    assert statuses(out) == {"00_first": "done", "02_third": "done"} and (
        ran(out, "00_first"),
        ran(out, "01_second"),
    ) == (1, 0)
    lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"\[1/2\] 00 first +\d+\.\d s", lines[0]) and "index.html" in lines[-1]
    assert nbformat.read(out / "notebooks/00_first.ipynb", 4).cells[-2].outputs[0].text == "9\n"
    assert (
        go("--resume") == 0
    )  # 01 is new, so 02, which comes after it, is run again; n=3 is remembered
    assert [ran(out, c) for c in ("00_first", "01_second", "02_third")] == [1, 1, 2]
    assert (
        nbformat.read(out / "notebooks/01_second.ipynb", 4).cells[-1].outputs[0].data["text/plain"]
        == "(3, None)"
    )
    assert go("--resume") == 0
    assert [ran(out, c) for c in ("00_first", "01_second", "02_third")] == [1, 1, 2]
    assert go("--resume", "-p", "pause=0.01") == 0
    assert [ran(out, c) for c in ("00_first", "01_second", "02_third")] == [1, 1, 3]
    assert not list(out.glob("**/.*.ipynb")) and Path(out / "index.html").exists()


def test_without_resume_everything_is_computed_again(nbs, tmp_path):
    out = tmp_path / "run"
    (nbs / "03_steps.ipynb").write_text(
        nbformat.writes(
            new_notebook(cells=[new_code_cell("#| export\n@step()\ndef prepare(run): pass")])
        )
    )
    run = Run(out, dataset="demo?ratings=4000", protocol="given", parameters={"n": 5})
    run.update_manifest(
        steps={"prepare": {"fingerprint": "a"}, "other": {"fingerprint": "b"}},
        chapters={"03_steps": {"status": "done", "fingerprint": "c", "seconds": 1}},
    )
    run.write("metrics.json", [])
    with open_locked_run(make_run_plan(out, chapters="03", notebooks=nbs)) as run:
        assert (
            set(run.manifest["steps"]) == {"other"}
            and run.manifest["chapters"] == {}
            and (out / "metrics.json").exists()
        )
        assert (run.manifest["dataset"], run.manifest["protocol"], run.manifest["parameters"]) == (
            "demo?ratings=4000",
            "given",
            {"n": 5},
        )
    run.update_manifest(steps={"other": {"fingerprint": "b"}})
    with open_locked_run(make_run_plan(out, resume=True, notebooks=nbs)) as run:
        assert set(run.manifest["steps"]) == {"other"} and (out / "metrics.json").exists()
    with open_locked_run(make_run_plan(out, dataset="demo", notebooks=nbs)) as run:
        assert (
            run.manifest["steps"] == {}
            and run.manifest["parameters"] == {}
            and run.manifest["dataset"] == "demo"
            and not (out / "metrics.json").exists()
        )


def test_a_failing_cell_and_a_problem(nbs, tmp_path, capsys):
    out = tmp_path / "run"

    def go(*words):
        return widedeep("run", "--out", out, "--notebooks", nbs, *words)

    assert go("-p", "fail=bug") == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and all(
        s in said
        for s in ("01_second", "AssertionError: as asked", str(out / "notebooks/01_second.ipynb"))
    )
    assert (
        statuses(out) == {"00_first": "done", "01_second": "failed"} and ran(out, "02_third") == 0
    )
    made = (out / "index.html").read_text()
    assert (
        "AssertionError: as asked" in made and "failed</b>" in made and "site-packages" not in made
    )
    assert go("--resume", "-p", "fail=problem") == 2
    assert (
        capsys.readouterr().err == "error: the file is empty; give another\n"
        and statuses(out)["01_second"] == "failed"
    )
    assert (
        go("--resume", "-p", "fail=") == 0
        and set(statuses(out).values()) == {"done"}
        and ran(out, "00_first") == 1
    )


def test_a_kernel_that_dies(nbs, tmp_path, capsys):
    chapter(nbs, "01_second", "n: int = 2  # a number", new_code_cell("import os\nos._exit(9)"))
    assert widedeep("run", "--out", tmp_path / "run", "--notebooks", nbs) == 1
    assert (
        "01_second failed: its kernel died" in capsys.readouterr().err
        and statuses(tmp_path / "run")["01_second"] == "failed"
    )


def test_chapters_run_on_this_python_whatever_python3_means(nbs, tmp_path, monkeypatch):
    spec = tmp_path / "jupyter/kernels/python3"
    spec.mkdir(parents=True)
    (spec / "kernel.json").write_text(
        json.dumps(
            {
                "argv": ["/bin/false", "{connection_file}"],
                "display_name": "another",
                "language": "python",
            }
        )
    )
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    monkeypatch.setenv("JUPYTER_DATA_DIR", str(tmp_path / "jupyter"))
    chapter(
        nbs,
        "00_first",
        "n: int = 2  # a number",
        new_code_cell("import sys\nprint(sys.executable)"),
    )
    assert widedeep("run", "--out", tmp_path / "run", "--notebooks", nbs, "--chapters", "00") == 0
    assert (
        nbformat.read(tmp_path / "run/notebooks/00_first.ipynb", 4)
        .cells[-1]
        .outputs[0]
        .text.strip()
        == sys.executable
    )


def start(out, nbs, *words):
    return subprocess.Popen(
        [
            sys.executable,
            "-m",
            "widedeep_nb.lib.cli",
            "run",
            "--out",
            out,
            "--notebooks",
            nbs,
            *words,
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(out, process, name, status, also=lambda: True):
    "Wait until a chapter has a status; the process must still run."
    for _ in range(3000):
        try:
            if statuses(out).get(name) == status and also():
                return
        except FileNotFoundError:
            pass
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    raise AssertionError(f"{name} never was {status}")


@pytest.mark.parametrize(
    "name, status", [("00_first", "started"), ("00_first", "done"), ("02_third", "started")]
)
def test_killed_and_resumed(nbs, tmp_path, capsys, name, status):
    out = tmp_path / "run"
    process = start(out, nbs, "-p", "pause=60")
    wait_for(out, process, name, status)
    before = (out / "run.json").read_text()
    done = [c for c, s in statuses(out).items() if s == "done"]
    assert (
        widedeep("run", "--out", out, "--notebooks", nbs, "--dataset", "electronics-2014") == 2
    )  # one at a time
    assert (
        "is being run already" in capsys.readouterr().err
        and json.loads(before)["dataset"]
        == "demo"
        == json.loads((out / "run.json").read_text())["dataset"]
    )
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = [c for c, s in statuses(out).items() if s == "done"]
    assert widedeep("run", "--out", out, "--notebooks", nbs, "--resume", "-p", "pause=0") == 0
    assert statuses(out) == dict.fromkeys(["00_first", "01_second", "02_third"], "done")
    assert all(ran(out, c) == 1 for c in done) and ran(out, "02_third") >= 1
    assert not list((out / "notebooks").glob(".*"))


def test_ctrl_c(nbs, tmp_path):
    out = tmp_path / "run"
    process = start(out, nbs, "-p", "pause=60")
    wait_for(out, process, "02_third", "started", lambda: ran(out, "02_third") == 1)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert (
        process.returncode == 130
        and said.strip().startswith("stopped; resume with: widedeep run --out")
        and said.strip().count("\n") == 0
    ), said
    assert (
        statuses(out)["02_third"] == "started"
        and (out / "index.html").exists()
        and sorted(os.listdir(out / "notebooks")) == ["00_first.ipynb", "01_second.ipynb"]
    )


# --- the page


def outside(html):
    "Return everything that a page would load, and links without a target."
    soup = BeautifulSoup(html, "html.parser")
    found = [
        (t.name, k, v)
        for t in soup.find_all(True)
        for k, v in t.attrs.items()
        if k in ("src", "href", "srcset", "xlink:href", "data", "poster", "action", "background")
        and re.match(r"(https?:)?//|\w+\.\w+", v.strip())
        and not (t.name == "a" and v.startswith("http"))
    ]
    found += re.findall(r"@import[^;]*|url\((?!#)[^)]*\)", html.split("<body>")[0])
    ids = [t["id"] for t in soup.find_all(id=True)]
    found += [i for i in set(ids) if ids.count(i) > 1] + [
        a["href"] for a in soup.find_all("a", href=re.compile("^#")) if a["href"][1:] not in ids
    ]
    return (
        found + [t for t in soup.find_all(["iframe", "link"])] + soup.find_all("script", src=True)
    )


def test_page_is_one_file_and_loads_nothing(nbs, tmp_path):
    out = tmp_path / "run"
    assert widedeep("run", "--out", out, "--notebooks", nbs) == 0
    made = (out / "index.html").read_text()
    assert outside(made) == []
    soup = BeautifulSoup(made, "html.parser")
    assert [s["id"] for s in soup.find_all("section", id=True)] == [
        "00_first",
        "01_second",
        "02_third",
    ] and len(soup.find("nav").find_all("a")) == 3
    text = soup.get_text()
    assert (
        "Chapter third" in text
        and "done" in text
        and "synthetic" in soup.find("main", id="findings").get_text()
        and "chapter 07" in text
    )
    assert (
        "<math" in made
        and "secret of the machine" not in made
        and "#| " not in made
        and "injected" not in made
        and ".ran" not in made
    )
    assert soup.find(id="00_first--twice") and soup.find(id="00_first--twice-more")
    assert outside('<body><img src="//a.example/x.png"><a href="#no">x</a></body>') != []


def records(*rows):
    base = dict(
        task="ranking",
        split="test",
        users="all",
        items="all",
        relevant="any",
        metric="NDCG@20",
        n=50,
        versus=None,
    )
    return pl.DataFrame(
        [base | dict(zip(("model", "versus", "value", "lo", "hi"), row)) for row in rows],
        schema_overrides={"versus": pl.String},
        infer_schema_length=None,
    )


@pytest.mark.parametrize(
    "rows, said",
    [
        (
            [
                ("wide-deep", None, 0.2, 0.1, 0.3),
                ("popularity", None, 0.1, 0.05, 0.15),
                ("wide-deep", "popularity", 0.1, 0.01, 0.2),
            ],
            "use wide-deep: it is significantly better than the only other model.",
        ),
        (
            [
                ("wide-deep", None, 0.2, 0.1, 0.3),
                ("popularity", None, 0.1, 0.05, 0.15),
                ("wide-deep", "popularity", 0.1, -0.01, 0.2),
            ],
            "use popularity. wide-deep has the best score, but its lead is not clear, and popularity is simpler.",
        ),
        (
            [("wide-deep", None, 0.2, 0.1, 0.3), ("popularity", None, 0.1, 0.05, 0.15)],
            "use popularity. wide-deep has the best score, but its lead is not clear, and popularity is simpler.",
        ),
        (
            [
                ("wide-deep", None, 0.1, 0.1, 0.3),
                ("popularity", None, 0.2, 0.05, 0.15),
                ("wide-deep", "popularity", -0.1, -0.2, -0.01),
            ],
            "use popularity: it is significantly better than the only other model.",
        ),
        (
            [
                ("wide-deep", None, 0.1, 0.1, 0.3),
                ("popularity", None, 0.2, 0.05, 0.15),
                ("wide-deep", "popularity", -0.1, -0.2, 0.01),
            ],
            "use popularity. It has the best score; wide-deep is not clearly worse, but it is not simpler.",
        ),
        (
            [("popularity", None, 0.2, 0.05, 0.15)],
            "use popularity; no other model has been evaluated.",
        ),
    ],
)
def test_the_advice_follows_the_figures(tmp_path, rows, said):
    run = Run(tmp_path / "run")
    assert "chapter 07" in summary_text(run) and winners_svg(run) == ""
    run.add_metrics(records(*rows))
    assert said in summary_text(run)
    assert outside(render_page(run)) == [] and "<svg" in render_page(run)
    worse = records(*rows).with_columns(
        pl.lit("RMSE").alias("metric"), pl.lit("rating").alias("task")
    )  # lower is better: value and interval turn round
    run.add_metrics(worse.with_columns(value=-pl.col("value"), lo=-pl.col("hi"), hi=-pl.col("lo")))
    rating = summary_text(run).split("To predict ratings")[1]
    assert said in rating


# --- recommendations


class Count(Recommender):
    "Number of training events of each item."

    def _fit(self, split):
        self.count = torch.bincount(
            torch.from_numpy(split.train["item"].to_numpy()), minlength=split.n_train_items
        ).float()

    def _scores(self, users, history, items):
        return self.count[items].expand(len(users), -1)


def test_recommend(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(RECOMMENDERS, "count", None)
    model = register("count")(dataclass(Count))()
    log = to_interactions(
        pl.DataFrame(
            {
                "user": ["ann", "ann", "bob", "bob", "eve"],
                "item": ["007", "bag", "007", "cam", "bag"],
                "rating": [5, 3, 4, 1, 2],
                "timestamp": [1, 2, 3, 4, 5],
            }
        )
    )
    run = Run(tmp_path / "run")
    run.write(
        "items.parquet",
        pl.DataFrame({"item": ["007", "bag", "cam"], "title": ["A film", "A bag", "A camera"]}),
    )
    assert (
        widedeep("recommend", run.folder, "--user", "ann") == 2
        and "no fitted model" in capsys.readouterr().err
    )
    model.fit(Split.from_frames(log, log.clear(), log.clear())).save(run.model_folder("count"))

    def ask(*words):
        return (
            widedeep("recommend", run.folder, "--json", *words),
            json.loads(capsys.readouterr().out),
        )

    code, found = ask("--user", "ann")
    assert (
        code == 0
        and [(r["item"], r["title"], r["rank"]) for r in found["items"]] == [("cam", "A camera", 1)]
        and found["note"] == ""
    )
    _, found = ask("--user", "zoe", "-k", "2")
    assert "is not in the log" in found["note"] and {r["item"] for r in found["items"]} == {
        "007",
        "bag",
    }
    _, found = ask("--basket", "bag,cam:5")
    assert found["note"] == "" and {r["item"] for r in found["items"]} == {"007"}
    _, found = ask("--basket", "hat")
    assert "does not know hat" in found["note"] and "quoted" not in found["note"]
    _, found = ask("--basket", "007:5,hat")
    assert "does not know hat" in found["note"] and "is quoted: --basket" in found["note"]
    assert "hat" in found["note"] and {r["item"] for r in found["items"]} == {"bag", "cam"}
    assert widedeep("recommend", run.folder, "--user", "zoe") == 0
    shown = capsys.readouterr()
    assert "is not in the log" in shown.err and "A film" in shown.out
    for words, said in [
        (["--user", "ann", "--basket", "007"], "either"),
        ([], "either"),
        (["--user", "ann", "--model", "eas"], "known: count"),
        (["--user", "ann", "-k", "0"], "-k"),
    ]:
        assert widedeep("recommend", run.folder, *words) == 2 and said in capsys.readouterr().err
    assert (
        widedeep("recommend", tmp_path / "nowhere", "--user", "ann") == 2
        and not (tmp_path / "nowhere").exists()
    )


@pytest.mark.parametrize(
    "text, known, items",
    [
        ("007:4.5, bag,a:b", (), {"007": 4.5, "bag": None, "a:b": None}),
        ("a,b:5", ["a,b"], {"a,b": 5}),
        ("a,b", ["a,b", "a", "b"], {"a,b": None}),
        ("a,b:5", ["a", "b"], {"a": None, "b": 5}),
        ("x:5", ["x:5"], {"x:5": None}),
        ("x:5:4", ["x:5"], {"x:5": 4}),
        ("x:5,y:3", ["x:5", "y"], {"x:5": None, "y": 3}),
        ('"a,b":5,"x:5",y', (), {"a,b": 5, "x:5": None, "y": None}),
        ('"x":5', ["x", "x:5"], {"x": 5}),
        ('"5"" pipe":2, 6" pipe', (), {'5" pipe': 2, '6" pipe': None}),
        ("https://shop/7,b", (), {"https://shop/7": None, "b": None}),
    ],
)
def test_parse_basket(text, known, items):
    assert parse_basket(text, known) == items


@pytest.mark.parametrize("text", [" , ", '"a,b:5', '"a"b', '""'])
def test_a_basket_that_cannot_be_read(text):
    with pytest.raises(UserError, match="--basket"):
        parse_basket(text)


def test_datasets(capsys):
    assert widedeep("datasets") == 0
    assert capsys.readouterr().out.startswith("demo")


# --- the site's filter and publishing


def labelled(label="fig-a"):
    data = {
        "text/html": f'<figure id="{label}"><svg>x</svg><figcaption>It "grows" by $2.</figcaption></figure>'
    }
    return new_output(
        "display_data",
        data,
        metadata={"widedeep": {"label": label, "caption": 'It "grows" by $2.', "alt": "A line."}},
    )


def test_site_filter_as_a_command():
    table = new_output(
        "display_data",
        {"text/html": TABLE},
        metadata={"widedeep": {"label": "tbl-b", "caption": "All."}},
    )
    nb = new_notebook(
        cells=[
            new_code_cell("#| hide\nsecret()"),
            new_code_cell("#| default_exp run"),
            new_code_cell("out = 1", metadata={"tags": ["injected-parameters"]}),
            new_code_cell(
                "#| export\n#| eval: false\n#| code-fold: true\nf()",
                outputs=[new_output("stream", name="stderr", text="warned"), labelled()],
            ),
            new_code_cell("g()", outputs=[table]),
            new_code_cell("h()", outputs=[labelled("fig-c"), labelled("fig-d")]),
        ]
    )
    done = subprocess.run(
        [sys.executable, "-m", "widedeep_nb.lib.cli", "site-filter"],
        input=nbformat.writes(nb),
        capture_output=True,
        text=True,
        cwd=ROOT / "nbs",
    )
    assert done.returncode == 0 and done.stderr == ""
    figure, two, three = json.loads(done.stdout)["cells"]
    assert figure["source"] == ["#| code-fold: true\n", "f()"]
    assert [c["source"] for c in (two, three)] == [["g()"], ["h()"]]
    texts = [
        "".join(o["data"]["text/markdown"]) for c in (figure, two, three) for o in c["outputs"]
    ]
    assert (
        texts[0]
        == '::: {#fig-a}\n\n````{=html}\n<svg>x</svg>\n````\n\nIt "grows" by \\$2.\n\n:::\n'
    )
    assert '<div class="wd-table"><table class="wd"><tr></tr></table></div>' in texts[1] and texts[
        1
    ].endswith("\n````\n\nAll.\n\n:::\n")
    assert [t.splitlines()[0] for t in texts] == [
        "::: {#fig-a}",
        "::: {#tbl-b}",
        "::: {#fig-c}",
        "::: {#fig-d}",
    ]  # several in one cell


@pytest.mark.parametrize("path", REAL, ids=lambda p: p.stem)
def test_site_filter_leaves_no_directive_of_nbdev(path):
    for cell in site_filter(json.loads(path.read_text()), path.parent)["cells"]:
        if cell["cell_type"] == "code":
            lines = [line[2:].strip() for line in cell["source"] if line.startswith("#|")]
            options = yaml.safe_load("\n".join(lines)) or {}
            assert isinstance(options, dict) and not set(options) & {
                "export",
                "eval",
                "hide",
                "default_exp",
            }


def finished(nbs, out, *words):
    "Make a run of the small chapters, with a metric and a log."
    shutil.copy(ROOT / "settings.ini", nbs.parent)
    assert widedeep("run", "--out", out, "--notebooks", nbs, *words) == 0
    run = Run(out)
    run.add_metrics(records(("popularity", None, 0.2, 0.1, 0.3)))
    run.write(
        "interactions.parquet", pl.DataFrame({"user": ["a"], "item": ["b"], "timestamp": [None]})
    )
    return run


def test_publish(nbs, tmp_path, capsys):
    chapter(
        nbs,
        "02_third",
        "",
        new_code_cell("import sys\nprint('warned', file=sys.stderr)\nprint(out)\nobject()"),
    )
    nbformat.write(new_notebook(cells=[new_code_cell(QUOTING)]), nbs / "discussion.ipynb")
    nbformat.write(
        new_notebook(
            cells=[
                new_code_cell("n: int = 1  # a number", metadata={"tags": ["parameters"]}),
                new_code_cell("1 / 0"),
            ]
        ),
        nbs / "driver.ipynb",
    )
    before = {p.name: nbformat.read(p, 4) for p in nbs.glob("*.ipynb")}
    finished(nbs, tmp_path / "runs/mine", "--dataset", "demo?ratings=4000")
    assert widedeep("publish", tmp_path / "runs/mine", "--notebooks", nbs) == 0
    for path in nbs.glob("*.ipynb"):
        after, old = nbformat.read(path, 4), before[path.name]
        assert [(c.id, c.source, c.metadata.get("tags")) for c in after.cells] == [
            (c.id, c.source, c.metadata.get("tags")) for c in old.cells
        ]
        assert not any(o.get("name") == "stderr" for c in after.cells for o in c.get("outputs", []))
        assert str(tmp_path) not in path.read_text()
    shown = nbformat.read(nbs / "02_third.ipynb", 4).cells[-1].outputs
    assert shown[0].text == "runs/mine\n" and shown[1].data["text/plain"] == "<object>"
    results = json.loads((tmp_path / "results/demo-strict.json").read_text())
    assert (
        results["dataset"] == results["metrics"][0]["dataset"] == "demo"
        and results["rows"] == 1
        and results["metrics"][0]["value"] == 0.2
    )
    assert (
        set(results["seconds"]) == {"00_first", "01_second", "02_third"}
        and {"protocol", "seed", "device", "versions", "log", "parts"} < set(results)
        and str(tmp_path) not in json.dumps(results)
    )
    assert (
        nbformat.read(nbs / "discussion.ipynb", 4).cells[0].outputs[0].text
        == "[('demo-strict', 0.2)]\n"
    )
    assert nbformat.read(nbs / "driver.ipynb", 4).cells[1].outputs == []
    text = (nbs / "01_second.ipynb").read_text()
    (nbs / "01_second.ipynb").write_text(text.replace("as asked", "as you like"))
    capsys.readouterr()
    assert (
        widedeep("publish", tmp_path / "runs/mine", "--notebooks", nbs) == 2
        and "01_second has changed since the run" in capsys.readouterr().err
    )


def test_rows_of_a_real_log_are_never_published(nbs, tmp_path):
    for n, tags in (("02_third", ["rows"]), ("03_fourth", [])):
        chapter(nbs, n, "", new_code_cell("print('user a')", metadata={"tags": tags}))

    def shown(stem):
        return nbformat.read(nbs / f"{stem}.ipynb", 4).cells[-1].outputs[0]

    log = tmp_path / "private/ratings.csv"
    log.parent.mkdir()
    log.write_text("user,item,rating,timestamp\n")
    run = finished(nbs, tmp_path / "runs/mine", "--dataset", log)
    run.write("ingest.json", {"kept": 1, "notes": ["of user a"]})
    assert widedeep("publish", run.folder, "--notebooks", nbs) == 0
    assert (
        "not published" in shown("02_third").data["text/markdown"]
        and "user a"
        not in (nbs / "02_third.ipynb").read_text().split('"outputs"')[-1].split('"source"')[0]
    )
    assert shown("03_fourth").text == "user a\n"
    text = (tmp_path / "results/ratings-strict.json").read_text()
    assert (
        json.loads(text)["log"]["kept"] == 1
        and "of user a" not in text
        and str(tmp_path) not in text
    )
    run.update_manifest(dataset="demo")
    assert (
        widedeep("publish", run.folder, "--notebooks", nbs) == 0
        and shown("02_third").text == "user a\n"
    )


# --- the real notebooks


@pytest.mark.parametrize("path", REAL, ids=lambda p: p.stem)
def test_badges_point_at_the_notebook_itself(path):
    links = re.findall(
        r"colab\.research\.google\.com/github/[\w-]+/[\w-]+/blob/main/([^)\s]+)", source_of(path)
    )
    assert links == [f"nbs/{path.name}"] and (ROOT / links[0]).exists()


def test_dataset_slugs_have_no_path():
    assert [
        dataset_slug(d)
        for d in (
            "demo?ratings=4000",
            "/data/me/ratings.csv.gz",
            "postgresql://me:secret@host/shop?query=SELECT a/b",
        )
    ] == ["demo", "ratings", "shop"]


def test_a_user_of_the_log_is_known_though_filtered_out(tmp_path):
    "Check that items of the whole log are masked, also those after the fit."
    from widedeep_nb.lib.core import Split, to_interactions
    from widedeep_nb.lib.recommender import make_recommender

    log = to_interactions(
        pl.DataFrame(
            {
                "user": ["ann", "ann", "bob", "eve"],
                "item": ["cam", "bag", "cam", "pen"],
                "timestamp": [1, 2, 3, 4],
            }
        )
    )
    run = Run(tmp_path / "run")
    run.write("interactions.parquet", log)
    make_recommender("popularity").fit(Split.from_frames(log[:3], log[:0], log[3:])).save(
        run.model_folder("popularity")
    )  # eve's row came after the fit
    result = recommend_from_run(run, user="bob", k=2)
    assert [r["item"] for r in result["items"]] == ["bag"] and result["note"] == ""
    assert (
        recommend_from_run(run, user="eve", k=2)["note"] == ""
        and "user zoe is not in the log" in recommend_from_run(run, user="zoe", k=2)["note"]
    )
