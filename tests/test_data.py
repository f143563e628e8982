"Check that any source becomes a validated log: readers, reasons, sources, names, the step."

import gzip
import hashlib
import io
import json
import os
import sqlite3
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import polars as pl
import pyarrow as pa
import pytest

from widedeep_nb.data import ingest, load
from widedeep_nb.lib import sources
from widedeep_nb.lib.core import UserError
from widedeep_nb.lib.datasets import datasets, fingerprint
from widedeep_nb.lib.ingest_report import (
    ERRORS,
    EXCLUSIONS,
    describe_ingest,
    ingest_in_short,
    plot_ingest,
)
from widedeep_nb.lib.runs import Run
from widedeep_nb.lib.scales import infer_rating_scale

SHARED = Path(os.environ.get("WIDEDEEP_SHARED") or Path(__file__).parents[2] / "shared") / "data"
T = 1_365_811_200  # a second of 2013


def shared(name):
    "Return the path of a shared dataset, or skip the test."
    if not (SHARED / name).exists():
        pytest.skip(f"{SHARED / name} is not here; set WIDEDEEP_SHARED")
    return SHARED / name


def dropped(loaded):
    "Count the rows left out by reason."
    return {d["reason"]: d["rows"] for d in loaded.report["dropped"] if d["rows"]}


def log_csv(path, rows, header="user,item,rating,timestamp"):
    "Write a CSV file; return its path."
    path.write_text("\n".join(([header] if header else []) + rows) + "\n")
    return path


GOOD = [f"u{i},i{i},{1 + i % 5},{T + i}" for i in range(20)]


# Real logs


def test_ciao():
    loaded = load(shared("ciao"))
    assert dropped(loaded) == {"rating outside the scale": 34, "superseded by a later rating": 1433}
    assert loaded.report["rows_read"] == 284_086
    assert loaded.report["kept"] == len(loaded.interactions) == 284_086 - 34 - 1433
    assert loaded.report["users"] == 7_375 and len(loaded.items) == 105_114
    assert loaded.report["first"].startswith("2000-05")
    assert loaded.report["last"].startswith("2011-04")
    assert loaded.items["category"].n_unique() == 28
    assert loaded.interactions.select("user", "item").is_unique().all()
    assert loaded.report["sha256"] != load(shared("ciao/ratings.csv.gz")).report["sha256"]


def test_ciao_keeps_the_last_rating_of_a_pair():
    raw = pl.read_csv(
        shared("ciao/ratings.csv.gz"),
        has_header=False,
        new_columns=["user", "item", "rating", "time"],
    )
    last = (
        raw.to_pandas()
        .query("rating > 0")
        .sort_values("time", kind="stable")
        .drop_duplicates(["user", "item"], keep="last")
    )
    ours = load(SHARED / "ciao").interactions.sort("user", "item")
    last = last.sort_values(["user", "item"])
    assert ours["user"].to_list() == last["user"].tolist()
    assert ours["rating"].to_list() == last["rating"].tolist()
    assert (ours["timestamp"].dt.epoch("s").to_numpy() == last["time"].to_numpy()).all()


def test_electronics_likes_become_events():
    loaded = load(shared("electronics"))
    raw = pl.read_csv(SHARED / "electronics/feedback.csv.gz")
    assert loaded.report["rows_read"] == 450_771
    assert dropped(loaded) == {"not liked": int((raw["liked"] == 0).sum())}
    assert loaded.interactions["rating"].null_count() == len(loaded.interactions)
    assert not loaded.report["has_ratings"]
    assert (
        loaded.interactions["user"].to_list()
        == raw.filter(liked=1)["user_id"].cast(pl.String).to_list()
    )


def test_electronics_dense_keeps_its_parts():
    loaded = load(shared("electronics-dense"))
    counts = dict(loaded.interactions["part"].value_counts().iter_rows())
    assert counts == {"train": 244_630, "val": 33_986, "test": 68_777}
    assert loaded.report["users"] == 20_247 and loaded.report["items"] == 11_589
    assert loaded.report["has_parts"]
    assert not loaded.report["has_time"]
    assert not loaded.report["has_ratings"]


# Readers

ROWS = [("007", "0132793040", 5.0, T), ("b,1", "é 2", 3.5, T + 1), ('a"q', "00", 1.0, T + 2)]


def write_as(kind, path):
    frame = pl.DataFrame(
        ROWS, schema=["reviewerID", "asin", "overall", "unixReviewTime"], orient="row"
    )
    if kind == "csv":
        frame.write_csv(path)
    elif kind == "tsv":
        frame.write_csv(path, separator="\t")
    elif kind == "jsonl":
        frame.write_ndjson(path)
    elif kind == "json":
        path.write_text(json.dumps(frame.to_dicts()))
    else:
        frame.write_parquet(path)


@pytest.mark.parametrize("packed", ["", "gz", "zst"])
@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "json", "parquet"])
def test_every_format_and_packing(tmp_path, kind, packed):
    path = tmp_path / f"log.{kind}"
    write_as(kind, path)
    if packed:
        raw, path = path.read_bytes(), tmp_path / f"log.{kind}.{packed}"
        with pa.CompressedOutputStream(str(path), {"gz": "gzip", "zst": "zstd"}[packed]) as f:
            f.write(raw)
    log = load(path).interactions
    assert [
        (u, i, r, int(t.timestamp()))
        for u, i, r, t in log.with_columns(log["timestamp"].dt.replace_time_zone("UTC")).rows()
    ] == ROWS


@pytest.mark.parametrize(
    "names",
    [
        "user_id,parent_asin,rating,timestamp",
        "userId,movieId,rating,timestamp",
        "Customer ID,SKU,stars,date",
        "user_id,business_id,stars,time",
        "reviewerID,asin,overall,unixReviewTime",
    ],
)
def test_known_names(tmp_path, names):
    loaded = load(log_csv(tmp_path / "log.csv", GOOD, names))
    assert loaded.interactions["user"].to_list() == [f"u{i}" for i in range(20)]
    assert loaded.report["has_ratings"]
    assert loaded.report["has_time"]


@pytest.mark.parametrize(
    "line, row",
    [
        ("A1,007,5.0,1365811200", ("A1", "007", 5, T)),
        ("A1,007,5.0", ("A1", "007", 5, None)),
        ("A1,007,1365811200", ("A1", "007", None, T)),
        ("1\t007", ("1", "007", None, None)),
        ("A1;007;5;1365811200;more", ("A1", "007", 5, T)),
    ],
)
def test_headerless(tmp_path, line, row):
    log = load(log_csv(tmp_path / "log.csv", [line], "")).interactions
    assert log.with_columns(pl.col("timestamp").dt.epoch("s")).rows() == [row]


def test_ids_stay_text(tmp_path):
    path = log_csv(
        tmp_path / "log.csv",
        ["007,0132793040,5,1365811200", " 08 ,1e5,4,1365811200", "1.0,+1,3,1365811200"],
    )
    assert load(path).interactions.select("user", "item").rows() == [
        ("007", "0132793040"),
        ("08", "1e5"),
        ("1.0", "+1"),
    ]
    typed = tmp_path / "log.parquet"
    # pandas stores a column of ids with gaps as floats
    pl.DataFrame({"user": [1.0, 2.0], "item": [7, 8]}).write_parquet(typed)
    assert load(typed).interactions.select("user", "item").rows() == [("1", "7"), ("2", "8")]


PUBLISHED = {  # the first lines of the files as they are published
    "amazon-2014.json": (
        '{"reviewerID": "A2SUAM1J3GNN3B", "asin": "0000013714", '
        '"reviewerName": "J. McDonald", "helpful": [2, 3], '
        '"reviewText": "I bought this...", "overall": 5.0, "summary": "Heavenly", '
        '"unixReviewTime": 1252800000, "reviewTime": "09 13, 2009"}'
    ),
    "amazon-2018.json": (
        '{"overall": 5.0, "verified": true, "reviewTime": "09 13, 2009", '
        '"reviewerID": "A2SUAM1J3GNN3B", "asin": "0000013714", '
        '"style": {"Format:": " Hardcover"}, "reviewText": "...", '
        '"unixReviewTime": 1252800000, "image": ["https://x"]}'
    ),
    "amazon-2018.csv": "item,user,rating,timestamp\n0000013714,A2SUAM1J3GNN3B,5.0,1252800000",
    "amazon-2018-bare.csv": "0000013714,A2SUAM1J3GNN3B,5.0,1252800000",
    "amazon-2023.jsonl": (
        '{"rating": 5.0, "title": "Such", "text": "This", "images": [], '
        '"asin": "B00YQ6X8EO", "parent_asin": "0000013714", "user_id": "A2SUAM1J3GNN3B", '
        '"timestamp": 1252800000000, "helpful_vote": 0, "verified_purchase": true}'
    ),
    "amazon-2023.csv": "user_id,parent_asin,rating,timestamp,history\nA2SUAM1J3GNN3B,0000013714,5.0,1252800000000,",
    "movielens.csv": "userId,movieId,rating,timestamp\nA2SUAM1J3GNN3B,0000013714,5.0,1252800000",
    "u.data": "A2SUAM1J3GNN3B\t0000013714\t5\t1252800000",
    "ratings.dat": "A2SUAM1J3GNN3B::0000013714::5::1252800000",
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_files(tmp_path, name):
    (tmp_path / name).write_text(PUBLISHED[name] + "\n")
    loaded = load(tmp_path / name)
    row = (
        loaded.interactions.with_columns(pl.col("timestamp").dt.epoch("s"))
        .select("user", "item", "rating", "timestamp")
        .row(0)
    )
    assert row == (
        "A2SUAM1J3GNN3B",
        "0000013714",
        5 if loaded.report["has_ratings"] else None,
        1_252_800_000,
    )
    assert (
        f"times were read as {'milliseconds' if '2023' in name else 'seconds'}"
        in loaded.report["notes"]
    )


def test_numbers_become_text_ids(tmp_path):
    lines = tmp_path / "log.jsonl"
    lines.write_text(
        '{"user": 7, "item": 12.0}\n{"user": "007", "item": 12.5}\n{"user": 12345678901, "item": "12.0"}\n'
    )
    assert load(lines).interactions.select("user", "item").rows() == [
        ("7", "12"),
        ("007", "12.5"),
        ("12345678901", "12.0"),
    ]
    typed = tmp_path / "log.parquet"
    pl.DataFrame(
        {"user": [7.0, None, 12345678901.0], "item": pl.Series([1, 2, 3], dtype=pl.UInt8)}
    ).write_parquet(typed)
    assert load(typed).interactions.select("user", "item").rows() == [
        ("7", "1"),
        ("12345678901", "3"),
    ]


def test_four_event_types_without_ratings(tmp_path):
    log = load(
        log_csv(
            tmp_path / "log.csv",
            [f"u,i,{T},{e}" for e in ("click", "View", "add_to_cart", "purchase", "pageview")],
            "visitorid,itemid,timestamp,event",
        )
    ).interactions
    assert log["event"].to_list() == ["click", "view", "cart", "purchase", "view"]
    assert log["rating"].null_count() == 5


# Column mapping

MAPPED = [f"{'ab'[i % 2]}{i},i{i},{1 + i % 5},{T + i}" for i in range(9)]


def test_given_columns_override_what_is_found(tmp_path):
    path = log_csv(tmp_path / "log.csv", MAPPED, "kunde,user,stars,wann")
    loaded = load(path, columns={"user": "kunde", "item": "user", "timestamp": "wann"})
    assert loaded.interactions.select("user", "item", "rating").row(0) == ("a0", "i0", 1)
    assert loaded.report["has_time"]
    assert "'kunde' was read as the user" in loaded.report["notes"]
    assert "'user' was read as the item" in loaded.report["notes"]
    assert not load(path, columns={"user": "kunde", "item": "user", "rating": ""}).report[
        "has_ratings"
    ]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_given_columns_in_other_files(tmp_path, kind):
    frame, path = pl.DataFrame({"kunde": ["a"], "artikel": ["007"]}), tmp_path / f"log.{kind}"
    frame.write_ndjson(path) if kind == "jsonl" else frame.write_parquet(path)
    assert load(path, {"user": "kunde", "item": "artikel"}).interactions.select(
        "user", "item"
    ).rows() == [("a", "007")]


def test_columns_without_a_header_are_counted_from_one(tmp_path):
    path = log_csv(tmp_path / "log.csv", ["007,ann,4,1365811200", "bag,bob,5,1365811201"], "")
    assert load(path, {"user": "2", "item": "1"}).interactions.select(
        "user", "item", "rating"
    ).rows() == [("ann", "007", 4), ("bob", "bag", 5)]
    words = log_csv(
        tmp_path / "words.csv", ["ann,fan", "bob,bag"], ""
    )  # nothing shows that this is no header
    assert load(words, {"user": "1", "item": "2"}).interactions.select("user", "item").rows() == [
        ("ann", "fan"),
        ("bob", "bag"),
    ]
    (tmp_path / "ratings.dat").write_text("5::ann::007\n3::bob::bag\n")
    assert load(
        tmp_path / "ratings.dat", {"user": "2", "item": "3", "rating": "1"}
    ).interactions.select("user", "item", "rating").rows() == [("ann", "007", 5), ("bob", "bag", 3)]


def test_given_columns_in_a_folder_and_a_database(tmp_path):
    (tmp_path / "shop").mkdir()
    for part in ("train", "test"):
        log_csv(tmp_path / "shop" / f"{part}.csv", ["a,007"], "kunde,artikel")
    assert (
        load(tmp_path / "shop", {"user": "kunde", "item": "artikel"}).interactions["item"].to_list()
        == ["007"] * 2
    )
    base = sqlite3.connect(tmp_path / "shop.db")
    base.execute("CREATE TABLE log AS SELECT 'a' AS kunde, '007' AS artikel")
    base.commit()
    base.close()
    assert (
        load(
            f"sqlite:///{tmp_path}/shop.db?query=SELECT * FROM log",
            {"user": "kunde", "item": "artikel"},
        )
        .interactions["item"]
        .item()
        == "007"
    )


@pytest.mark.parametrize(
    "columns, message",
    [
        ({"user": "name"}, "no column 'name' for the user; there are: kunde, artikel"),
        (
            {"customer": "kunde"},
            "unknown column of a log 'customer'; known: user, item, rating, timestamp, event",
        ),
        ({"user": "3"}, "no column '3'"),
        ({"user": "kunde", "item": ""}, "no column for the item"),
    ],
)
def test_an_unknown_column(tmp_path, columns, message):
    with pytest.raises(UserError, match=message):
        load(log_csv(tmp_path / "log.csv", ["a,007"], "kunde,artikel"), columns)


def test_columns_as_a_parameter_of_the_step(tmp_path):
    run = Run(
        tmp_path / "run",
        dataset=str(log_csv(tmp_path / "log.csv", MAPPED, "kunde,artikel,stars,wann")),
        parameters={"columns": "user=kunde, item=artikel"},
    )
    ingest(run)
    assert run.read("interactions.parquet")["user"][0] == "a0"
    assert not run.read("ingest.json")["has_time"]
    ingest(run, columns="user=kunde,item=artikel,timestamp=wann")
    assert run.read("ingest.json")["has_time"]
    with pytest.raises(
        UserError, match="columns are written as user=kunde,item=artikel, not 'kunde'"
    ):
        ingest(run, columns="kunde")


@pytest.mark.parametrize(
    "factor, unit",
    [
        (1, "seconds"),
        (1_000, "milliseconds"),
        (1_000_000, "microseconds"),
        (1_000_000_000, "nanoseconds"),
    ],
)
def test_unit_of_time(tmp_path, factor, unit):
    loaded = load(
        log_csv(
            tmp_path / "log.csv", [f"u{i},i{i},{1 + i % 5},{(T + i) * factor}" for i in range(20)]
        )
    )
    assert loaded.report["time_unit"] == unit
    assert loaded.interactions["timestamp"].dt.epoch("s").to_list() == [T + i for i in range(20)]


@pytest.mark.parametrize(
    "text",
    [
        "2014-05-23",
        "2014-05-23 00:00:00",
        "2014-05-23T00:00:00Z",
        "2014-05-23T02:00:00+02:00",
        "2014-05-23 00:00:00 UTC",
        "05 23, 2014",
    ],
)
def test_dates(tmp_path, text):
    path = tmp_path / "log.jsonl"
    path.write_text(json.dumps({"user": "a", "item": "b", "date": text}))
    assert load(path).report["first"] == "2014-05-23T00:00:00"


def test_temporal_columns(tmp_path):
    pl.DataFrame(
        {
            "user": ["a"],
            "item": ["b"],
            "time": pl.Series(["2014-05-23 02:00"]).str.to_datetime(
                "%Y-%m-%d %H:%M", time_zone="Europe/Berlin"
            ),
        }
    ).write_parquet(tmp_path / "log.parquet")
    assert load(tmp_path / "log.parquet").report["first"] == "2014-05-23T00:00:00"


@pytest.mark.parametrize(
    "written",
    [
        "2014-05-23T02:00:01.977",
        "2014-05-23T02:00:01",
        "2014-05-23 02:00:01.977123",
        "2014-05-23 02:00:01",
        "2014-05-23T02:00:01Z",
        "2014-05-23T04:00:01.977+02:00",
    ],
)
def test_timestamps_of_programs(tmp_path, written):
    (tmp_path / "log.csv").write_text(f"user,item,time\na,b,{written}\n")
    assert load(tmp_path / "log.csv").report["first"].startswith("2014-05-23T02:00:01")


def test_a_malformed_json_line_costs_only_itself(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"user": "1", "item": "2"}\n\n{"user": "3", "it\n{"user": 4, "item": "05"}\n')
    loaded = load(path)
    assert loaded.interactions.select("user", "item").rows() == [
        ("1", "2"),
        ("4", "05"),
    ]
    assert dropped(loaded) == {"malformed line": 1}


def test_a_list_of_objects_with_other_values(tmp_path):
    path = tmp_path / "log.json"
    path.write_text('[{"user": 1, "item": "2"},\n 3, {"user": 4, "item": "05"}]')
    loaded = load(path)
    assert loaded.interactions.select("user", "item").rows() == [
        ("1", "2"),
        ("4", "05"),
    ]
    assert dropped(loaded) == {"malformed line": 1}


def test_rows_with_another_number_of_fields(tmp_path):
    loaded = load(log_csv(tmp_path / "log.csv", GOOD + ["u1,x,5", f"u1,y,5,{T},6,7", "u1"]))
    assert dropped(loaded) == {"wrong number of fields": 3}
    assert loaded.report["rows_read"] == 23
    assert loaded.report["kept"] == 20


def test_a_quote_that_is_never_closed_is_counted_by_lines(tmp_path):
    loaded = load(log_csv(tmp_path / "log.csv", GOOD + [f'"u1,x,5,{T}', f"u2,x,5,{T}"]))
    assert dropped(loaded) == {"wrong number of fields": 2}


def test_a_quoted_field_may_span_lines(tmp_path):
    loaded = load(
        log_csv(
            tmp_path / "log.csv",
            ['a,x,5,"good,\n""very"" good"', "b,x,4,"],
            "user,item,rating,text",
        )
    )
    assert loaded.interactions["user"].to_list() == ["a", "b"] and dropped(loaded) == {}


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_invalid_utf8_costs_one_row(tmp_path, kind):
    rows = [
        f'{{"user": "u{i}", "item": "é", "rating": {1 + i % 5}, "text": "t"}}'
        if kind == "jsonl"
        else f"u{i},é,{1 + i % 5},t"
        for i in range(9)
    ]
    content = "\n".join((["user,item,rating,text"] if kind == "csv" else []) + rows).encode()
    for changed, expected in (
        (content.replace(b"u4", b"\xff4"), {"id not in UTF-8": 1}),
        (content.replace("é".encode(), "é".encode("latin1"), 1), {"id not in UTF-8": 1}),
        # no harm in a column that is not used
        (content[::-1].replace(b"t", b"\xe9", 1)[::-1], {}),
    ):
        (tmp_path / f"log.{kind}").write_bytes(changed)
        assert dropped(load(tmp_path / f"log.{kind}")) == expected


def test_python_literals_are_not_executed(tmp_path):
    log_csv(tmp_path / "ratings.csv", GOOD)
    trap = tmp_path / "trap"
    (tmp_path / "items.json").write_text(
        "{'asin': 'i0', 'title': 'Fan'}\n"
        + f"{{'asin': 'i1', 'title': open({str(trap)!r}, 'w').write('x')}}\n"
        + "{'asin': 'i2',\n{'asin': 'i3', 'title': 'Bag'}\n"
        + "(" * 5000
        + "\n"
    )
    items = load(tmp_path).items.drop_nulls("title")
    assert items.rows() == [("i0", "Fan"), ("i3", "Bag")] and not trap.exists()


def test_items_as_amazon_has_them_in_2023(tmp_path):
    log_csv(tmp_path / "ratings.csv", GOOD)
    item = {
        "main_category": "All Electronics",
        "title": "FS-1051",
        "average_rating": 4.5,
        "rating_number": 6,
        "features": ["PROFESSIONAL", "One size"],
        "description": ["A", "B"],
        "price": None,
        "images": [{"thumb": "https://m/t.jpg", "large": "https://m/l.jpg", "hi_res": None}],
        "videos": [],
        "store": "Fat Shark",
        "categories": ["Electronics", 'FPV, "Goggles"'],
        "details": {"Date": "2015", "Dim": {"a": "1"}},
        "parent_asin": "i0",
        "bought_together": None,
    }
    rows = [
        item,
        item | {"parent_asin": "i1", "price": "from 14.99", "categories": [], "description": []},
        item | {"parent_asin": "i2", "price": 1299.0, "title": None, "images": []},
        item | {"parent_asin": "i3", "price": "—"},
    ]
    (tmp_path / "items.jsonl.gz").write_bytes(
        gzip.compress("\n".join(map(json.dumps, rows)).encode())
    )
    items = load(tmp_path).items.head(4)
    assert set(items.columns) == {
        "item",
        "title",
        "category",
        "brand",
        "price",
        "description",
        "image",
        "main_category",
        "average_rating",
        "rating_number",
        "bought_together",
    }
    assert items["price"].to_list() == [None, 14.99, 1299.0, None]
    assert items["description"].to_list() == ["A B", None, "A B", "A B"]
    assert items["brand"][0] == "Fat Shark"
    assert items["category"][0].startswith("Electronics > FPV")
    assert items["category"][1] is None
    assert items["image"][0] == "https://m/t.jpg"
    assert items["average_rating"][0] == 4.5


def test_python_literals_as_amazons_metadata(tmp_path):
    log_csv(tmp_path / "ratings.csv", GOOD)
    with gzip.open(tmp_path / "items.json.gz", "wt") as f:
        f.write(
            "{'asin': 'i0', 'title': \"It's\", 'categories': [['Electronics', 'GPS'], ['Gifts']], "
            "'price': 3.5, 'related': {'x': ['i1']}}\n"
        )
    row = load(tmp_path).items.filter(item="i0").to_dicts()[0]
    assert row == {"item": "i0", "title": "It's", "category": "Electronics > GPS", "price": 3.5}


# Reasons


@pytest.mark.parametrize(
    "row, why",
    [
        (",i1,5,1365811200", "missing user or item"),
        ("u1, ,5,1365811200", "missing user or item"),
        ("u1,i1,good,1365811200", "rating missing or not a number"),
        ("u1,i1,,1365811200", "rating missing or not a number"),
        ("u1,i1,nan,1365811200", "rating missing or not a number"),
        ("u1,i1,0,1365811200", "rating outside the scale"),
        ("u1,i1,11,1365811200", "rating outside the scale"),
        ("u1,i1,5,", "timestamp missing or unreadable"),
        ("u1,i1,5,today", "timestamp missing or unreadable"),
        ("u1,i1,5,600000000", "timestamp before 1990 or in the future"),
        ("u1,i1,5,0", "timestamp before 1990 or in the future"),
        ("u1,i1,5,32503680000", "timestamp before 1990 or in the future"),
        (",,x,", "missing user or item"),
        ("u1,i1,0,600000000", "rating outside the scale"),
    ],
)
def test_each_error_is_counted_once_under_its_first_reason(tmp_path, row, why):
    loaded = load(log_csv(tmp_path / "log.csv", GOOD + [row]))
    assert dropped(loaded) == {why: 1}
    assert loaded.interactions["user"].to_list() == [f"u{i}" for i in range(20)]


def test_times_in_the_future_are_errors_after_a_day(tmp_path):
    now = int(time.time())
    assert dropped(
        load(
            log_csv(
                tmp_path / "log.csv", GOOD + [f"u1,x,5,{now + 3_600}", f"u1,y,5,{now + 7 * 86_400}"]
            )
        )
    ) == {"timestamp before 1990 or in the future": 1}


def test_the_last_rating_in_time_counts(tmp_path):
    again = [
        f"u1,i1,5,{T + 100}",
        f"u1,i1,4,{T + 50}",
        f"u2,i2,5,{T + 2}",
    ]  # the latest is not the last row; a tie goes to the later row
    loaded = load(log_csv(tmp_path / "log.csv", GOOD + again))
    assert dropped(loaded) == {EXCLUSIONS[1]: 3}
    assert loaded.interactions.filter(pl.col("user").is_in(["u1", "u2"])).select(
        "user", "rating"
    ).rows() == [("u1", 5), ("u2", 5)]


def test_events_stay_beside_ratings_and_may_repeat(tmp_path):
    rows = [
        f"a,x,,{T},view",
        f"a,x,,{T},view",
        f"a,x,,{T},AddToCart",
        f"a,x,5,{T},rating",
        f"a,x,3,{T + 1},rating",
        f"b,x,,{T},transaction",
        f"b,x,,{T},rating",
        f"b,x,,{T},sneeze",
        f"b,y,4,{T},purchase",
        f"b,z,2,{T},",
    ]
    loaded = load(log_csv(tmp_path / "log.csv", rows, "user,item,rating,timestamp,event"))
    assert dropped(loaded) == {
        "rating missing or not a number": 1,
        EXCLUSIONS[1]: 1,
    }
    assert loaded.report["has_events"]
    assert loaded.interactions.select("event", "rating").rows() == [
        ("view", None),
        ("view", None),
        ("cart", None),
        ("rating", 3),
        ("purchase", None),
        ("view", None),
        ("purchase", 4),
        ("rating", 2),
    ]
    assert any("unknown" in note and "sneeze" in note for note in loaded.report["notes"])


def test_likes_and_counts_are_events(tmp_path):
    likes = load(
        log_csv(tmp_path / "likes.csv", ["a,x,1", "a,y,0", "b,x,1", "b,z,"], "user,item,liked")
    )
    assert likes.interactions.rows() == [
        ("a", "x", None, None),
        ("b", "x", None, None),
    ]
    assert dropped(likes) == {"rating missing or not a number": 1, EXCLUSIONS[0]: 1}
    plays = load(
        log_csv(tmp_path / "plays.csv", ["a,x,1", "a,y,2000", "b,x,300"], "user,item,rating")
    )
    assert plays.interactions["rating"].null_count() == 3
    assert not plays.report["has_ratings"]
    assert any("counts" in n for n in plays.report["notes"])


@pytest.mark.parametrize(
    "ratings, scale",
    [
        ([5, 4, 1, 3] * 10 + [0, 11], (1, 5)),
        ([0.5, 1, 4.5, 5], (0.5, 5)),
        ([0, 1, 5, 3] * 5, (0, 5)),
        ([10, 7, 1, 3], (1, 10)),
        ([0, 10, 8, 9] * 5, (0, 10)),
        ([0, 55, 100, 80], (0, 100)),
        ([1, 1, 1], (0, 1)),
    ],
)
def test_scales(ratings, scale):
    assert (
        infer_rating_scale(pl.LazyFrame({"rating": ratings}, schema={"rating": pl.Float32})).range
        == scale
    )


def test_without_ratings_and_times(tmp_path):
    loaded = load(log_csv(tmp_path / "log.csv", ["a,x", "a,x", "b,y"], "user,item"))
    assert loaded.interactions.rows() == [("a", "x", None, None)] * 2 + [("b", "y", None, None)]
    assert loaded.report["first"] is None
    interactions, items, users = loaded
    assert items["item"].to_list() == ["x", "y"] and users["user"].to_list() == ["a", "b"]


def test_a_log_is_refused_if_most_rows_are_faulty(tmp_path):
    bad = [f"u{i},i{i},x,{T}" for i in range(20)]
    assert load(log_csv(tmp_path / "log.csv", GOOD + bad)).report["kept"] == 20
    with pytest.raises(UserError, match="21 of 41 rows are faulty.*rating missing"):
        load(log_csv(tmp_path / "log.csv", GOOD + bad + [",,,"]))


# Side tables


def test_side_tables(tmp_path):
    log_csv(tmp_path / "ratings.csv", GOOD)
    log_csv(
        tmp_path / "items.csv",
        ['i1,"$1,299.00",A thing,2.5,"[""A"", ""B""]"', "i1,1,twice,1,", "x,,Nobody has it,3,C"],
        "item_id,price,name,weight,category",
    )
    log_csv(tmp_path / "users.csv", ["u1,34,01099", "u2,51,10115"], "user_id,age,place")
    _, items, users = load(tmp_path)
    assert items.filter(item="i1").to_dicts() == [
        {"item": "i1", "price": 1299.0, "title": "A thing", "category": "A > B", "weight": 2.5}
    ]
    assert len(items) == 21
    assert items["item"].is_unique().all()
    assert set(items["item"]) >= {"x", "i19"}
    assert users.schema["age"] == pl.Float64
    assert users.filter(user="u1")["place"].item() == "01099"
    assert len(users) == 20


def test_a_split_without_validation_and_pairs_in_two_parts(tmp_path):
    log_csv(tmp_path / "train.csv", ["a,x,5", "a,x,4", "b,x,3"], "user,item,rating")
    log_csv(tmp_path / "test.csv", ["a,x,2"], "user,item,rating")
    assert load(tmp_path).interactions.select("user", "rating", "part").rows() == [
        ("a", 4, "train"),
        ("b", 3, "train"),
        ("a", 2, "test"),
    ]


# Databases


def test_sqlite(tmp_path):
    base = sqlite3.connect(tmp_path / "shop.db")
    base.execute("CREATE TABLE log (user TEXT, sku, stars REAL, time INTEGER)")
    base.executemany(
        "INSERT INTO log VALUES (?, ?, ?, ?)",
        [("007", "01", 5, T), ("8", 2, 3.5, T), ("9", "x", 1, T)],
    )
    base.commit()
    base.close()
    before = (tmp_path / "shop.db").read_bytes()
    loaded = load(
        f"sqlite:///{tmp_path}/shop.db?query=SELECT * FROM log WHERE stars > 1 AND sku LIKE '%'"
    )
    assert loaded.interactions.select("user", "item", "rating").rows() == [
        ("007", "01", 5),
        ("8", "2", 3.5),
    ]
    with pytest.raises(UserError):
        load(f"sqlite:///{tmp_path}/shop.db?query=DELETE FROM log")
    assert (tmp_path / "shop.db").read_bytes() == before


def test_a_password_is_not_shown(monkeypatch):
    def refuse(query, uri, engine):
        assert uri == "postgresql://me:hunter2@localhost/shop"
        raise RuntimeError(f"cannot connect to {uri}\nfor some reason")

    monkeypatch.setenv("SHOP_PASSWORD", "hunter2")
    monkeypatch.setattr(sources, "find_spec", lambda name: name == "connectorx")
    monkeypatch.setattr(pl, "read_database_uri", refuse)
    with pytest.raises(UserError, match="cannot connect to postgresql://localhost/shop$") as e:
        load("postgresql://me:$SHOP_PASSWORD@localhost/shop?query=SELECT 1")
    assert "hunter2" not in str(e.value)


def test_connectorx_and_adbc(tmp_path):
    base = sqlite3.connect(tmp_path / "shop.db")
    base.execute("CREATE TABLE log AS SELECT '007' AS user, 12 AS item, 4.5 AS rating")
    base.commit()
    base.close()
    for driver in ("connectorx", "adbc_driver_sqlite"):
        if sources.find_spec(driver) is None:
            continue
        engine = "none" if driver == "connectorx" else "sqlite"
        assert sources.query_db(
            engine, f"sqlite:///{tmp_path}/shop.db", "SELECT * FROM log"
        ).rows() == [("007", 12, 4.5)]
        with pytest.raises(UserError, match="database does not answer") as e:
            sources.query_db(engine, f"sqlite:///{tmp_path}/shop.db", "SELECT nothing FROM nowhere")
        assert str(e.value).isprintable()


# Fingerprints


def test_fingerprint_is_what_load_reports(tmp_path, monkeypatch):
    monkeypatch.setenv("WIDEDEEP_CACHE", str(tmp_path / "cache"))
    path = log_csv(tmp_path / "shop.csv", GOOD)
    (tmp_path / "shop").mkdir()
    for name in ("ratings.csv", "items.csv"):
        log_csv(tmp_path / "shop" / name, GOOD)
    for dataset in (
        str(path),
        str(tmp_path / "shop"),
        "demo?ratings=4000",
        "demo?seed=0&ratings=4000",
    ):
        assert fingerprint(dataset) == load(dataset).report["sha256"]
    before = fingerprint(str(tmp_path / "shop"))
    log_csv(tmp_path / "shop" / "items.csv", GOOD[1:])
    assert fingerprint(str(tmp_path / "shop")) != before
    assert fingerprint("demo?ratings=4000") != fingerprint("demo?ratings=4001")
    for gone in (
        "electronics-2014",
        "no.csv",
        "nobody",
        str(tmp_path / "cache"),
        "sqlite:///shop.db?query=SELECT 1",
    ):
        assert fingerprint(gone) is None


# Memory

READ = """
import sys
from pathlib import Path
from widedeep_nb.data import ingest_log

def peak():
    # VmHWM, since ru_maxrss would begin with the parent's
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024

small, large = map(Path, sys.argv[1:])
ingest_log(str(small), small.with_suffix(".out"))  # what reading needs once
before = peak()
report, items, users = ingest_log(str(large), large.with_suffix(".out"))
print(report["rows_read"], report["kept"], peak() - before)
"""


def write_large(path, blocks, rows=20_000):
    "Write blocks of rows with two kilobytes of unused text each."
    words = pl.select(pl.int_range(50_000).hash(1).cast(pl.String)).to_series()
    with gzip.open(path, "wb", 1) if path.suffix == ".gz" else open(path, "wb") as f:
        for block in range(blocks):
            n = pl.int_range(block * rows, (block + 1) * rows, eager=True)
            text = pl.select(
                pl.concat_str(
                    [words.gather((n * 7 + k * 13) % 50_000) for k in range(100)], separator=" "
                )
            ).to_series()
            frame = pl.DataFrame(
                {
                    "user": "U" + (n % 30_011).cast(pl.String),
                    "item": "00" + (n // 7 % 5_003).cast(pl.String),
                    "rating": n % 5 + 1,
                    "timestamp": T + n,
                    "text": text,
                }
            )
            f.write(
                frame.write_ndjson().encode()
                if "json" in path.name
                else frame.write_csv(include_header=not block).encode()
            )


@pytest.mark.long
@pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="the peak of memory is read from Linux's /proc"
)
@pytest.mark.parametrize(
    "name", ["log.csv", "log.csv.gz", "log.jsonl", "log.jsonl.gz", "log.parquet"]
)
def test_memory_does_not_grow_with_the_file(tmp_path, name):
    small, large, megabytes = tmp_path / f"small-{name}", tmp_path / name, 600
    for path, blocks in ((small, 1), (large, 16)):
        if name.endswith("parquet"):
            write_large(path.with_suffix(".csv"), blocks)
            pl.scan_csv(path.with_suffix(".csv")).sink_parquet(
                path, row_group_size=20_000, compression="uncompressed"
            )
        else:
            write_large(path, blocks)
    if not name.endswith(".gz"):
        assert large.stat().st_size > megabytes * 1e6
    done = subprocess.run(
        [sys.executable, "-c", READ, str(small), str(large)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    assert int(done[0]) == 320_000 and int(done[1]) == 320_000
    assert float(done[2]) < megabytes / 3


# Known datasets


def test_demo_is_the_same_each_time_and_takes_options():
    one, two, other = (
        load("demo?ratings=4000&seed=3"),
        load("demo?ratings=4000&seed=3"),
        load("demo?ratings=4000"),
    )
    assert all(a.equals(b) for a, b in zip(one, two)) and one.report == two.report
    assert not one.interactions["rating"].equals(other.interactions["rating"])
    assert one.report["sha256"] != other.report["sha256"]
    assert one.interactions["rating"].count() >= 3_900
    assert other.report["sha256"] == load("demo?seed=0&ratings=4000").report["sha256"]


def test_known_names_are_listed():
    assert datasets()["name"].to_list() == ["demo", "electronics-2014", "electronics-2023"]
    assert datasets()["available"][0]
    with pytest.raises(UserError, match="known: demo, electronics-2014, electronics-2023"):
        load("electronics")


# Errors are one line


def bad_files():
    "Make files of another format than their names say, or cut off."
    parquet, packed = io.BytesIO(), io.BytesIO()
    pl.DataFrame({"user": [f"u{i}" for i in range(99)], "item": "i"}).write_parquet(parquet)
    with zipfile.ZipFile(packed, "w") as z:
        z.writestr("log.csv", "user,item\na,b\n")
    base = sqlite3.connect(":memory:")
    base.execute("CREATE TABLE log (user, item)")
    png = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + bytes(40)
    noise = "user,item\n" + "".join(f"{os.urandom(8).hex()},1\n" for _ in range(500))
    return {
        "photo.csv": png,
        "base.csv": base.serialize(),
        "base.db": base.serialize(),
        "shop.zip": packed.getvalue(),
        "zip.csv": packed.getvalue(),
        "missing.csv": b"user,price\n1,2\n",
        "missing.parquet": parquet.getvalue().replace(b"item", b"itam"),
        "cut.parquet": parquet.getvalue()[:-20],
        "cut.parquet.gz": gzip.compress(parquet.getvalue()[:200]),
        "half.csv.zst": pa.compress(noise.encode(), "zstd", asbytes=True)[:3000],
        "half.jsonl.gz": gzip.compress(b'{"user": "a", "item": "b"}\n' * 5000)[:-9],
        "number.json": b"12",
        "numbers.json": b"[1, 2]",
        "wide.csv": b"user,item\n1,2,3\n4,5,6\n",
    }


@pytest.mark.parametrize(
    "dataset",
    [
        "",
        "nobody",
        "none.csv",
        "no/such/folder",
        "demo?ratings=many",
        "demo?colour=1",
        "photo.png",
        "noise.csv",
        "empty.csv",
        "header.csv",
        "half.csv.gz",
        "not.parquet",
        "words.txt",
        "list.json",
        "empty",
        "two",
        "sqlite:///none.db?query=SELECT 1",
        "sqlite:///none.db",
        "mysql://h/db?query=SELECT 1",
        "noid",
        "photo.csv",
        "base.csv",
        "base.db",
        "shop.zip",
        "zip.csv",
        "missing.csv",
        "missing.parquet",
        "cut.parquet",
        "cut.parquet.gz",
        "half.csv.zst",
        "half.jsonl.gz",
        "number.json",
        "numbers.json",
        "wide.csv",
        "null\0.csv",
        "x" * 5000 + ".csv",
        "~nobody/x.csv",
        "sqlite:///base.db?query=BEGIN",
        "sqlite:///base.db?query=SELECT 1; SELECT 2",
        "sqlite:///photo.png?query=SELECT 1",
    ],
)
def test_errors_are_one_line(tmp_path, monkeypatch, dataset):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        sources, "find_spec", lambda name: None
    )  # else a driver would wait for the database
    for name, content in {
        "photo.png": b"\x89PNG",
        "noise.csv": bytes(range(256)) * 4,
        "empty.csv": b"",
        "header.csv": b"user,item,rating\n",
        "half.csv.gz": gzip.compress(b"user,item\n" + os.urandom(999))[:500],
        "not.parquet": b"PAR1",
        "words.txt": b"once upon a time\nthere was\n",
        "list.json": b"[1, 2",
        **bad_files(),
    }.items():
        (tmp_path / name).write_bytes(content)
    for folder in ("empty", "two", "noid"):
        (tmp_path / folder).mkdir()
    for name in ("two/ratings.csv", "two/ratings.parquet", "noid/ratings.csv"):
        (tmp_path / name).write_bytes(b"user,item\n1,2\n")
    (tmp_path / "noid/items.csv").write_text("colour\nred\n")
    with pytest.raises(UserError) as e:
        load(dataset)
    assert "\n" not in str(e.value) and str(e.value).isprintable() and 20 < len(str(e.value)) < 800


# The step


def test_ingest(tmp_path):
    path = log_csv(tmp_path / "log.csv", GOOD + ["u1,i1,0,5"])
    run = Run(tmp_path / "run", dataset=str(path))
    ingest(run)
    report = run.read("ingest.json")
    assert run.manifest["data"] == {
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "rows": 21,
    }
    assert len(run.read("interactions.parquet")) == report["kept"] == 20
    assert [d["reason"] for d in report["dropped"]] == list(ERRORS + EXCLUSIONS)
    assert len(run.read("items.parquet")) == len(run.read("users.parquet")) == 20
    plot_ingest(report)


def test_a_refused_log_leaves_nothing(tmp_path):
    run = Run(tmp_path / "run", dataset=str(log_csv(tmp_path / "log.csv", [",,,"])))
    with pytest.raises(UserError):
        ingest(run)
    assert {p.name for p in run.folder.iterdir()} <= {
        "run.json",
        ".lock",
    }
    assert "ingest" not in run.manifest["steps"]


def test_import_loads_no_network_library():
    code = "import sys, widedeep_nb.data; sys.exit('requests' in sys.modules or 'pooch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# What the chapter says


def reports(tmp_path):
    "Make reports of a clean log, a log with faults, and one without ratings and times."
    rows = [f"u{i},i{i % 7},{1 + i % 5},{T + i}" for i in range(60)]
    faulty = rows[:40] + [",i1,5,1400000000"] * 9 + ["u1,i1,2,1500000000"]
    pairs = ["user,item"] + [f"u{i},i{i % 7}" for i in range(60)]
    yield load(log_csv(tmp_path / "clean.csv", rows)).report
    yield load(log_csv(tmp_path / "faulty.csv", faulty)).report
    yield load(log_csv(tmp_path / "pairs.csv", pairs, header="")).report


def test_sentences_follow_the_report(tmp_path):
    clean, faulty, bare = reports(tmp_path)
    assert ingest_in_short(clean)[1:3] == [
        "All 60 rows of the file could be used.",
        "No row is faulty, so the export from the shop's database needs no repair.",
    ]
    sentences = ingest_in_short(faulty)
    assert sentences[1].startswith("10 of the 50 rows (20.0 %) were left out")
    assert sentences[2].startswith("9 of the 10 are faulty. These are 18.0 % of all rows.")
    assert "no times" in ingest_in_short(bare)[-1] and ", from" not in ingest_in_short(bare)[0]
    assert "no timestamps" in describe_ingest(bare) and "no ratings" in describe_ingest(bare)
    for report in (clean, faulty, bare):
        text = " ".join(ingest_in_short(report)) + describe_ingest(report)
        assert "None" not in text and "nan" not in text and "()" not in text
