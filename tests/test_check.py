"How a log is read is said: by `widedeep check`, before a run, and on the report's first screen."

import json
import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest

from widedeep_nb.data import ingest
from widedeep_nb.lib.cli import main
from widedeep_nb.lib.reading_report import reading_in_short, reading_lines
from widedeep_nb.lib.recommender import make_recommender
from widedeep_nb.lib.report_page import render_page
from widedeep_nb.lib.runs import Run
from widedeep_nb.preprocessing import preprocess

ROOT = Path(__file__).parents[1]
ROWS = [
    (f"u{i % 12}", f"i{i % 30}", i % 5 + 1, 1_400_000_000 + 86_400 * i, "red") for i in range(40)
]


def csv_text(columns="user,item,rating,timestamp,color", rows=ROWS, separator=","):
    "Write rows as a CSV file."
    lines = [columns.replace(",", separator)]
    lines += [separator.join(map(str, row)) for row in rows]
    return "\n".join(lines) + "\n"


@pytest.fixture
def shop(tmp_path):
    "Folder with a log and a table of items whose ids are written differently."
    folder = tmp_path / "shop"
    folder.mkdir()
    rows = [(user, f"{100 + int(item[1:])}.0", *rest) for user, item, *rest in ROWS]
    (folder / "ratings.csv").write_text(csv_text(rows=rows))
    items = [(100 + i, f"Thing {i}", 1.5, "x") for i in range(30)]
    items += [(103, "Again", 2, "y"), ("", "No id", 3, "z")]
    (folder / "items.csv").write_text(csv_text("item,title,price,material", items))
    return folder


@pytest.fixture
def check(capfd):
    "Run `widedeep check`; return its exit code, standard output and standard error."

    def run(*words):
        capfd.readouterr()
        try:
            main(["check", *map(str, words)])
            code = 0
        except SystemExit as stopped:
            code = stopped.code
        captured = capfd.readouterr()
        return code, captured.out, captured.err

    return run


def as_dict(out):
    "Split the printed lines into what and how; several of one kind are joined."
    facts = {}
    for line in out.splitlines():
        if line.startswith("  "):
            what, how = line.strip().split("  ", 1)
            facts[what] = f"{facts.get(what, '')} {how.strip()}".strip()
    return facts


def write_log(folder, kind):
    "Write the same rows as one of several kinds of source; return its path and the options it needs."
    path = folder / f"log.{kind}"
    frame = pl.DataFrame(ROWS, ["user", "item", "rating", "timestamp", "color"], orient="row")
    if kind == "csv":
        path.write_text(csv_text())
    elif kind == "tsv":
        path.write_text(csv_text(separator="\t"))
    elif kind == "parquet":
        frame.write_parquet(path)
    elif kind == "jsonl":
        frame.write_ndjson(path)
    elif kind == "german":
        path = folder / "log.csv"
        path.write_text(csv_text("Kunde,Artikel,Note,Wann,color", separator=";"))
        return path, ["-p", "columns=user=Kunde,item=Artikel,rating=Note,timestamp=Wann"]
    elif kind == "sqlite":
        with sqlite3.connect(path) as connection:
            connection.execute("CREATE TABLE log (user, item, rating, timestamp, color)")
            connection.executemany("INSERT INTO log VALUES (?, ?, ?, ?, ?)", ROWS)
        return f"sqlite:///{path}?query=SELECT * FROM log", []
    elif kind == "split":
        path.mkdir()
        (path / "train.csv").write_text(csv_text(rows=ROWS[:30]))
        (path / "test.csv").write_text(csv_text(rows=ROWS[30:]))
    return path, []


SOURCES = {
    "csv": "CSV, separated by ',', with a header, UTF-8",
    "tsv": "CSV, separated by tabs, with a header, UTF-8",
    "parquet": "Parquet",
    "jsonl": "JSON",
    "german": "CSV, separated by ';', with a header, UTF-8",
    "sqlite": "SQL",
    "split": "CSV, separated by ',', with a header, UTF-8",
}


@pytest.mark.parametrize("kind", SOURCES)
def test_the_lines_say_how_each_kind_of_source_is_read(tmp_path, check, kind):
    source, options = write_log(tmp_path, kind)
    code, out, err = check(source, *options)
    assert code == 0 and err == ""
    facts = as_dict(out)
    german = kind == "german"
    assert facts["file"].startswith(SOURCES[kind])
    assert facts["user"].startswith("'Kunde'" if german else "'user'")
    assert facts["item"].startswith("'Artikel'" if german else "'item'")
    assert "1 to 5, liked from 4" in facts["rating"]
    assert ("split" in facts) == (kind == "split")
    assert "seconds" in facts["time"] and "2014-05-13 to 2014-06-21" in facts["time"]
    assert facts["not used"] == "color"
    assert facts["rows"] == "40 of 40 kept; 12 users, 30 items"
    assert "left out" not in facts and "warning" not in facts
    if german:
        assert "given by -p columns=" in facts["user"]


def test_a_known_dataset_is_checked(check):
    code, out, _ = check("demo?ratings=3000")
    facts = as_dict(out)
    assert code == 0
    assert "title" in facts["items"] and "age_group" in facts["users"]
    for reason in ("rating outside the scale", "missing user or item", "superseded"):
        assert reason in facts["left out"]


def test_what_is_left_out_is_counted_by_reason_with_the_parameter_that_helps(tmp_path, check):
    rows = [*ROWS, ("u1", "i1", 9, 1_400_000_000, "red"), ("u1", "i2", 4, "soon", "red")]
    (tmp_path / "log.csv").write_text(csv_text(rows=rows))
    facts = as_dict(check(tmp_path / "log.csv", "-p", "scale=1-5")[1])
    assert facts["rows"].startswith("40 of 42 kept")
    assert "1 row: rating outside the scale, such as 'u1, i1, 9" in facts["left out"]
    assert "1 row: timestamp missing or unreadable, such as 'u1, i2, 4, soon" in facts["left out"]
    assert "-p scale=" in facts["left out"] and "-p time_format=" in facts["left out"]


def test_json_is_what_the_report_holds(tmp_path, check, shop):
    code, out, err = check(shop, "--json")
    assert code == 0 and err == ""
    run = Run(tmp_path / "run", dataset=str(shop))
    ingest(run)
    assert json.loads(out) == run.read("ingest.json")
    assert "\n".join(reading_lines(json.loads(out))) + "\n" == check(shop)[1]


def test_counts_are_valid_json(tmp_path, check):
    rows = [
        (user, item, 300 * i, time, color) for i, (user, item, _, time, color) in enumerate(ROWS)
    ]
    (tmp_path / "log.csv").write_text(csv_text(rows=rows))
    out = check(tmp_path / "log.csv", "--json")[1]
    report = json.loads(out, parse_constant=pytest.fail)  # no NaN, no Infinity
    assert report["reading"]["scale"] == [0, None]
    assert "counts" in as_dict("\n".join(reading_lines(report)))["rating"]


@pytest.mark.parametrize(
    "words, message",
    [
        (["nowhere.csv"], "no such file"),
        (["nothing"], "unknown dataset"),
        (["log.csv", "-p", "seeds=1"], "unknown option of reading 'seeds'"),
        (["log.csv", "-p", "columns=user=Kunde"], "no column 'Kunde'"),
        (["log.csv", "-p", "columns"], "has no value"),
        (["words.csv"], "-p not_rated="),
        ([], "PATH"),
    ],
)
def test_what_is_wrong_is_one_line_and_exit_code_2(tmp_path, check, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "log.csv").write_text(csv_text())
    words_rows = [(user, item, "good", time, color) for user, item, _, time, color in ROWS]
    (tmp_path / "words.csv").write_text(csv_text(rows=words_rows))
    code, out, err = check(*words)
    assert code == 2 and out == ""
    assert err.startswith("error: ") and err.count("\n") == 1 and message in err


def test_nothing_is_written(tmp_path, check, shop, monkeypatch):
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    monkeypatch.chdir(tmp_path)
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p != temporary}
    assert check(shop)[0] == 0
    assert check(tmp_path / "nowhere.csv")[0] == 2
    after = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p != temporary}
    assert after == before


def test_ids_that_do_not_meet_are_a_warning_with_its_cause(check, shop):
    facts = as_dict(check(shop)[1])
    assert "none of the 30 ids in items.csv is in the log" in facts["warning"]
    assert "'100.0'" in facts["warning"] and "'100'" in facts["warning"]
    assert "0 of the 30 items of the log are in it" in facts["items"]


def test_a_catalog_with_items_that_nobody_bought_is_no_warning(check, shop):
    items = [(f"{100 + i}.0", f"Thing {i}") for i in range(300)]
    (shop / "items.csv").write_text(csv_text("item,title", items))
    facts = as_dict(check(shop)[1])
    assert "warning" not in facts
    assert "30 of the 30 items of the log are in it; not in the log: 270" in facts["items"]


def test_rows_of_a_side_table_that_are_not_used_are_counted(check, shop):
    facts = as_dict(check(shop)[1])
    assert "items.csv, 32 rows" in facts["items"] and "material" in facts["items"]
    assert "1 row: no id of the item, such as 'No id" in facts["items"]
    assert "1 row: an id that occurs before, such as '103, Again" in facts["items"]


@pytest.mark.parametrize("quotes", ["", "'", '"'])
def test_options_pass_through_a_shell(tmp_path, quotes):
    "An option can be typed as the messages write it, with or without quotes."
    rows = [
        (user, item, rating, f"{3 + i % 25:02}/01/2014", "")
        for i, (user, item, rating, *_) in enumerate(ROWS)
    ]
    (tmp_path / "log.csv").write_text(csv_text(rows=rows))
    option = f"-p {quotes}time_format=%d/%m/%Y{quotes}"
    command = f'"{sys.executable}" -m widedeep_nb.lib.cli check log.csv --json {option}'
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    report = json.loads(done.stdout)
    assert (report["first"][:10], report["last"][:10]) == ("2014-01-03", "2014-01-27")


@pytest.fixture
def read_run(tmp_path, shop):
    "Run in which a log was read, with an executed chapter 01."
    run = Run(tmp_path / "run", dataset=str(shop))
    ingest(run)
    return run


def test_the_first_screen_says_how_the_log_was_read(read_run):
    page = render_page(read_run)
    report = read_run.read("ingest.json")
    first_screen = page.split('<section class="verdict">')[0]
    assert reading_in_short(report).replace("'", "&#39;") in first_screen
    risks = page.split("What could go wrong")[1].split("</section>")[0]
    assert "100.0" in risks and "items.csv" in risks


def test_names_from_a_file_are_not_markup(read_run):
    report = read_run.read("ingest.json")
    report["reading"]["warnings"] = ["ids <script>alert(1)</script> *x* [a](http://b)"]
    report["reading"]["columns"] = [
        {"name": "user", "source": "<b>Kunde</b>", "reason": "named so"}
    ]
    read_run.write("ingest.json", report)
    page = render_page(read_run)
    assert "<script>alert" not in page and "<b>Kunde" not in page and 'href="http://b"' not in page
    assert "*x*" in page and "&lt;b&gt;Kunde" in page


def test_before_a_run_the_lines_are_printed(tmp_path, shop, capfd, check):
    words = ["run", "--dataset", shop, "--out", tmp_path / "run", "--chapters", "01"]
    main(list(map(str, words)))
    out = capfd.readouterr().out
    lines = check(shop)[1]
    assert out.startswith(lines) and "01 data" in out.removeprefix(lines)
    page = (tmp_path / "run/index.html").read_text()
    assert 'href="#01_data--how-the-log-was-read"' in page
    assert 'id="01_data--how-the-log-was-read"' in page
    for line in lines.splitlines()[:-1]:
        how = line.strip().split("  ", 1)[1].strip().split(" [-p")[0]
        if not line.startswith(("  rows", "  left out")):
            assert how.replace("'", "&#39;") in page.replace("\N{NO-BREAK SPACE}", " ")


def test_append_says_how_the_new_log_is_read(tmp_path, capfd):
    log = pl.DataFrame(
        {
            "user": [f"u{i % 40}" for i in range(400)],
            "item": [f"i{i * i % 31}" for i in range(400)],
            "rating": [i % 5 + 1 for i in range(400)],
            "timestamp": [1_300_000_000 + 1000 * i for i in range(400)],
        }
    ).unique(["user", "item"], maintain_order=True)
    log.write_csv(tmp_path / "log.csv")
    run = Run(tmp_path / "run", dataset=str(tmp_path / "log.csv"))
    preprocess(run)
    popularity = make_recommender("popularity").fit(run.load_splits()[0].for_final_fit())
    popularity.save(run.model_folder("popularity"))
    new = log.head(3).with_columns(pl.col("timestamp") + 1_000_000)
    new.rename({"user": "Kunde"}).write_csv(tmp_path / "new.csv")
    main(["append", str(run.folder), str(tmp_path / "new.csv"), "-p", "columns=user=Kunde"])
    first_line = capfd.readouterr().out.splitlines()[0]
    assert "user = Kunde" in first_line and "0 of 3 rows left out" in first_line


def test_help_lists_check_after_run():
    done = subprocess.run(
        [sys.executable, "-m", "widedeep_nb.lib.cli", "--help"], capture_output=True, text=True
    )
    commands = [line.split()[0] for line in done.stdout.split("Commands:")[1].splitlines() if line]
    assert commands[:3] == ["run", "check", "datasets"]


def test_real_files_are_said(shared, check):
    code, out, _ = check(shared / "ciao")
    assert code == 0 and "rating" in as_dict(out)
    assert Path(shared / "ciao").exists()
