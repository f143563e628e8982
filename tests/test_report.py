"Tests of the whole report, run as a user would run it."

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest

from widedeep_nb.lib.cli import main
from widedeep_nb.lib.comparison import PARAM_GRIDS
from widedeep_nb.lib.recommender import LOSSES
from widedeep_nb.sequences import SEQUENCE_MODELS

ROOT = Path(__file__).parents[1]
SETTINGS = {
    "seeds": 1,
    "epochs": 3,
    "trials": 1,
    "time_budget_min": 0.2,
    "n_shops": 2,
    "max_visitors": 60,
    "bench_ratings": 2000,
    "bench_rows": 20000,
    "bench_repeats": 1,
    "scaling_rows": 4000,
}
QUICK = [word for name, value in SETTINGS.items() for word in ("-p", f"{name}={value}")]


def widedeep(*args, cwd=ROOT):
    return subprocess.run(
        [Path(sys.executable).with_name("widedeep"), *map(str, args)],
        cwd=cwd,
        capture_output=True,
        text=True,
        env=os.environ | {"COLUMNS": "200"},
    )


def run_report(folder, *args):
    done = widedeep("run", "--out", folder, *QUICK, *args)
    assert done.returncode == 0, done.stderr + done.stdout
    return done


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "demo"
    done = run_report(folder, "--dataset", "demo?ratings=3000")
    assert f"{folder.name}/index.html" in done.stdout and re.search(
        r"\[1/23\].*\n(.*\n)*.*\[23/23\]", done.stdout
    )
    return folder


def test_page_is_one_file_with_everything(report):
    page = (report / "index.html").read_text()
    assert "synthetic" in page and page.count("<section") == 23
    outside = re.findall(
        r"""(?:src|data|poster)=["']?(https?:[^"' >]+)|url\((https?:[^)]+)|@import|<link[^>]+href|<script[^>]+src""",
        page,
    )
    assert outside == []
    assert page.count("<figure") >= 15 and "Traceback (most" not in page
    assert not re.search(
        r"(?:/home|/root|/tmp)/\w+", re.sub(r"<details.*?</details>", "", page, flags=re.S)
    )


def test_page_fits_desktop_and_phone_in_both_themes(report, fits):
    fits(report / "index.html")


def test_all_metrics_of_the_contract_are_there(report):
    records = pl.DataFrame(
        json.loads((report / "metrics.json").read_text()), infer_schema_length=None
    )
    assert set(records["model"]) == {
        "hybrid",
        "wide-deep",
        "wide-alone",
        "deep-alone",
        "wide-deep-as-reported",
        *PARAM_GRIDS,
        *SEQUENCE_MODELS,
        "content",
        "content-towers",
        *(f"wide-deep-{loss}" for loss in LOSSES),
    }
    assert (
        set(records["users"]) == {"all", "warm", "cold"}
        and set(records["task"]) == {"rating", "ranking"}
        and set(records["split"]) == {"test"}
    )
    whole = records.filter(pl.col("lo").is_not_null(), pl.col("versus").is_null())
    assert whole.select(
        (pl.col("lo") <= pl.col("value")).all() & (pl.col("value") <= pl.col("hi")).all()
    ).item()
    about = json.loads((report / "run.json").read_text())
    assert {c["status"] for c in about["chapters"].values()} == {"done"} and about["data"]["sha256"]


def test_recommendations_of_the_run(report, capsys):
    user = pl.read_parquet(report / "split/users.parquet")["user"][0]
    items = pl.read_parquet(report / "split/items.parquet")["item"][:2].to_list()
    for who in (["--user", user], ["--user", "nobody"], ["--basket", f"{items[0]}:5,{items[1]}"]):
        for model in ([], ["--model", "wide-deep"]):
            main(["recommend", str(report), *who, "-k", "5", "--json", *model])
            result = json.loads(capsys.readouterr().out)
            assert len(result["items"]) == 5 and (
                who[0] != "--basket" or not {i["item"] for i in result["items"]} & set(items)
            )


def test_an_early_chapter_runs_again_on_a_finished_run(report, tmp_path):
    "Check that results of later chapters stay when an early chapter runs again."
    shutil.copytree(report, tmp_path / "run")
    assert widedeep("run", "--out", tmp_path / "run", "--chapters", "06").returncode == 0
    before, after = [
        json.loads((f / "metrics.json").read_text()) for f in (report, tmp_path / "run")
    ]
    assert sorted(map(json.dumps, before)) == sorted(map(json.dumps, after))


@pytest.mark.long
def test_same_seed_gives_same_metrics(tmp_path):
    for name in ("once", "again"):
        run_report(
            tmp_path / name, "--dataset", "demo?ratings=3000", "-p", "time_budget_min=10"
        )  # time enough, so that no clock has a say in the plan
    one, two = [(tmp_path / name / "metrics.json").read_text() for name in ("once", "again")]
    assert one == two
    run_report(tmp_path / "again", "--dataset", "demo?ratings=3000", "--seed", "1")

    def pick(text):
        return [
            r["value"]
            for r in json.loads(text)
            if r["model"] == "wide-deep" and r["metric"] == "RMSE" and r["versus"] is None
        ]

    assert pick((tmp_path / "again/metrics.json").read_text()) != pick(one)


@pytest.mark.long
@pytest.mark.parametrize(
    "name,args,stars",
    [
        ("ciao", ["--protocol", "filtered-first"], True),
        ("ciao", ["--protocol", "rolling"], True),
        ("electronics-dense", ["-p", "tune=False"], False),
        ("electronics", ["-p", "max_users=300", "-p", "tune=False"], False),
    ],
)
def test_real_logs(shared, tmp_path, name, args, stars):
    run_report(tmp_path / "run", "--dataset", shared / name, *args)
    records = pl.DataFrame(
        json.loads((tmp_path / "run/metrics.json").read_text()), infer_schema_length=None
    )
    assert ("rating" in set(records["task"])) == stars and "ranking" in set(records["task"])
    dropped = {
        d["reason"]: d["rows"]
        for d in json.loads((tmp_path / "run/ingest.json").read_text())["dropped"]
        if d["rows"]
    }
    if name == "ciao":
        assert sorted(dropped.values()) == [34, 1433]
    if not stars:
        assert "no ratings" in (tmp_path / "run/index.html").read_text()
