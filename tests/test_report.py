"Tests of the whole report, run as a user would run it."

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from bs4 import BeautifulSoup
from conftest import QUICK

from widedeep_nb.lib.cli import main
from widedeep_nb.lib.comparison import PARAM_GRIDS
from widedeep_nb.lib.notebooks import read_in_short
from widedeep_nb.lib.recommender import LOSSES
from widedeep_nb.lib.runs import CHAPTER_FIT, METRIC_SCHEMA, TESTED_FIT
from widedeep_nb.sequences import SEQUENCE_MODELS

ROOT = Path(__file__).parents[1]


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
    assert "synthetic" in page and page.count('<section id="') == 23
    outside = re.findall(
        r"""(?:src|data|poster)=["']?(https?:[^"' >]+)|url\((https?:[^)]+)|@import|<link[^>]+href|<script[^>]+src""",
        page,
    )
    assert outside == []
    assert page.count("<figure") >= 15 and "Traceback (most" not in page
    outside_details = re.sub(r"<details.*?</details>", "", page, flags=re.S)
    # the commands to copy name the folder of the run as the reader has to type it
    without_commands = outside_details.replace(os.path.relpath(report, ROOT), "runs/demo")
    assert not re.search(r"(?:/home|/root|/tmp)/\w+", without_commands)


def test_page_fits_desktop_and_phone_in_both_themes(report, fits):
    fits(report / "index.html")


def test_the_page_opens_with_what_came_out(report, browser):
    "Check the two views: findings first, short enough to read and print, and the chapters behind one switch."
    page_file = report / "index.html"
    assert page_file.stat().st_size < 5e6
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.goto(page_file.as_uri())
    assert page.locator("#findings").is_visible() and not page.locator("#how").is_visible()
    assert page.evaluate("document.scrollingElement.scrollHeight") <= 15_000
    assert page.locator("article.found").count() == 23
    assert page.locator("article.found .picture svg, article.found .picture img").count() == 23
    commands = page.locator(".command code").all_inner_texts()
    assert len(commands) >= 4 and all(c.startswith("widedeep ") for c in commands)
    page.locator("article.found h3 a").nth(12).click()
    assert page.locator("#how").is_visible() and not page.locator("#findings").is_visible()
    stems = page.locator("#how section[id]").evaluate_all("all => all.map(e => e.id)")
    assert stems[0] == "01_data" and stems[-1] == "23_demo_shop"
    page.emulate_media(media="print")
    assert page.locator("#findings").is_visible() and not page.locator("#how").is_visible()


def sentence_frames(text):
    "Return the sentences of a summary without numbers and names."
    frames = re.sub(r"[\d.,%–\[\]+-]+", "#", text.lower())
    return set(filter(None, (s.strip() for s in re.split(r"(?<=[a-z#)]{2})[.!?](?=\s|$)", frames))))


def summaries(folder):
    "Return what each chapter of a folder says in short."
    paths = sorted(Path(folder).glob("[0-9][0-9]_*.ipynb"))
    return {p.stem: read_in_short(json.loads(p.read_text())["cells"]) for p in paths}


def test_every_chapter_says_in_short_what_came_out(report):
    "Check the summaries of this run, and that they differ from those of the published run."
    here, published = summaries(report / "notebooks"), summaries(ROOT / "nbs")
    assert len(here) == 23
    seen = {}
    for stem, (text, figure) in here.items():
        assert figure.startswith("fig-"), stem
        assert not re.search(r"\b(nan|None|inf)\b|\(\)|  ", text), (stem, text)
        assert 2 <= len(re.findall(r"[.!?](?:\s|$)", text)) <= 12, (stem, text)
        assert text != published[stem][0], f"{stem} says the same for two runs"
        for frame in sentence_frames(text):
            assert seen.setdefault(frame, stem) == stem, (stem, seen[frame], frame)


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
        and set(records["split"]) == {"val", "test"}
    )
    whole = records.filter(pl.col("lo").is_not_null(), pl.col("versus").is_null())
    assert whole.select(
        (pl.col("lo") <= pl.col("value")).all() & (pl.col("value") <= pl.col("hi")).all()
    ).item()
    about = json.loads((report / "run.json").read_text())
    assert {c["status"] for c in about["chapters"].values()} == {"done"} and about["data"]["sha256"]


def per_user(folder, model, fit, task):
    "Read the figures of each user, or of each rating, of one fit of a model."
    place = folder / "evaluation"
    if fit == TESTED_FIT:
        place = place / "tuned" / model
    elif model != "wide-deep":
        place = place / model
    name = {"ranking": "ranked", "rating": "rated"}[task]
    return pl.read_parquet(place / f"{name}.parquet")


def plain_mean(table, record):
    "Average a metric over users within each seed, then over seeds; the root of a mean for RMSE."
    if record["task"] == "ranking":
        table = table.filter(relevant=record["relevant"], items=record["items"])
    elif record["items"] != "all":
        table = table.filter(warm_item=record["items"] == "warm")
    if record["users"] != "all":
        table = table.filter(warm=record["users"] == "warm")
    means = []
    for _, rows in table.group_by("seed"):
        values = rows[record["metric"]].drop_nulls().to_numpy()
        means.append(values.mean() ** 0.5 if record["metric"] == "RMSE" else values.mean())
    return float(np.mean(means))


def plain_difference(folder, record):
    "Recompute a difference of the test part from the figures of the users of both models."
    sides = [
        per_user(folder, record[side], record["fit"], record["task"])
        for side in ("model", "versus")
    ]
    assert set(sides[0]["user"]) == set(sides[1]["user"])
    return plain_mean(sides[0], record) - plain_mean(sides[1], record)


def test_every_difference_is_that_of_one_fit(report):
    "Recompute the differences of metrics.json, and the values beside them, from the users' figures."
    records = pl.DataFrame(json.loads((report / "metrics.json").read_text()), schema=METRIC_SCHEMA)
    measured = records.filter(pl.col("metric").is_in(["NDCG@20", "Recall@5", "RMSE", "MAE"]))
    measured = measured.filter(split="test", protocol="strict").drop_nulls("value")
    differences = measured.filter(pl.col("versus").is_not_null()).to_dicts()
    fits = {(r["fit"], r["model"]) for r in differences}
    assert fits == {(TESTED_FIT, "hybrid"), (CHAPTER_FIT, "wide-deep")}
    for record in differences:
        assert plain_difference(report, record) == pytest.approx(record["value"], abs=1e-6), record
    for record in measured.filter(pl.col("versus").is_null(), seed=0).to_dicts():
        table = per_user(report, record["model"], record["fit"], record["task"])
        assert plain_mean(table, record) == pytest.approx(record["value"], abs=1e-6), record
    assert dict(records.group_by("split").agg(pl.col("fit").unique()).rows())["val"] == [TESTED_FIT]


PRINTED = [  # chapter, table, metric, fit, column of the values, column of the differences
    ("07_baselines", "tbl-stars", "RMSE", CHAPTER_FIT, "all", "wide-deep minus model"),
    ("07_baselines", "tbl-lists", "NDCG@20", CHAPTER_FIT, "all", "wide-deep minus model"),
    ("09_sequences", "tbl-both", "NDCG@20", CHAPTER_FIT, "NDCG@20", "wide-deep minus model"),
    ("13_leaderboard", "tbl-lead-stars", "RMSE", TESTED_FIT, "all", "hybrid minus model"),
    ("13_leaderboard", "tbl-lead-lists", "NDCG@20", TESTED_FIT, "all", "hybrid minus model"),
]


def printed_table(folder, stem, label):
    "Return the rows of a table that a chapter has shown, as dicts of text."
    cells = json.loads((folder / f"notebooks/{stem}.ipynb").read_text())["cells"]
    for output in (o for c in cells for o in c.get("outputs", [])):
        html = "".join(output.get("data", {}).get("text/html", ""))
        table = BeautifulSoup(html, "html.parser").find("table", id=label)
        if table:
            heads = [cell.get_text() for cell in table.find_all("th")]
            rows = [
                [cell.get_text() for cell in row.find_all("td")] for row in table.find_all("tr")
            ]
            return [dict(zip(heads, row)) for row in rows if row]


@pytest.mark.parametrize("stem, label, metric, fit, values, differences", PRINTED)
def test_printed_values_and_differences_are_of_one_fit(
    report, stem, label, metric, fit, values, differences
):
    reference = differences.split(" minus ")[0]
    task = "rating" if metric == "RMSE" else "ranking"
    record = {"metric": metric, "users": "all", "items": "all", "relevant": "any", "task": task}
    record |= {"fit": fit, "model": reference}
    rows = printed_table(report, stem, label)
    n_differences = 0
    for row in rows:
        table = per_user(report, row["model"], fit, task)
        assert f"{plain_mean(table, record):.3f}" == row[values].split()[0].lstrip("+")
        if row[differences] not in ("", "–"):
            n_differences += 1
            difference = plain_difference(report, record | {"versus": row["model"]})
            assert abs(difference - float(row[differences].split()[0])) < 0.0006, row
    assert n_differences >= len(rows) - 1 - (metric == "RMSE") and n_differences


def test_differences_of_later_chapters_are_those_of_the_values_beside_them(report):
    "Check the files of chapters 11, 12, 14, 15 and 20, which have values and differences."

    def read(name):
        return json.loads((report / f"{name}.json").read_text())

    def check(rows, keys, is_reference, difference, sign):
        references = {
            tuple(row[k] for k in keys): row["value"] for row in rows if is_reference(row)
        }
        n_checked = 0
        for row in rows:
            if row.get(difference) is not None:
                expected = sign * (row["value"] - references[tuple(row[k] for k in keys)])
                assert row[difference] == pytest.approx(expected, abs=1e-6), row
                n_checked += row[difference] != 0
        assert n_checked

    check(read("item_models")["models"], (), lambda r: r["model"] == "popularity", "gain", 1)
    events = read("event_types")["rows"]
    check(events, ("metric",), lambda r: r["variant"] == "weighted", "gain", -1)
    cold_start = read("newcomers")
    keys = ("model", "group_name", "metric")
    rows = cold_start["unknown_rows"]
    check(rows, keys, lambda r: r["row"] == "learned", "learned_minus_row", -1)
    rows = cold_start["sources"]
    check(rows, ("items",), lambda r: r["removed"] == "nothing", "difference", -1)
    lists = read("lists")
    check(lists["diversity"], ("metric",), lambda r: r["name"] == "0", "difference", 1)
    for row in read("catchup")["metrics"]:
        for name in ("warm_start", "stale"):
            difference = row[name]["value"] - row["retrained"]["value"]
            assert row[f"{name}_minus_retrained"]["value"] == pytest.approx(difference, abs=1e-6)


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
