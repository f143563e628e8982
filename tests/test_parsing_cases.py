"Check what is decided from the values of a log: times, scales, numbers, ids, columns, events, returns."

import json
import sqlite3
from datetime import datetime, timedelta, timezone

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from widedeep_nb.data import load
from widedeep_nb.lib.core import UserError
from widedeep_nb.lib.numbers import to_price
from widedeep_nb.lib.readers import parse_read_options
from widedeep_nb.lib.reading import ReadOptions
from widedeep_nb.lib.times import looks_like_time, parse_dates

T = 1_388_736_000  # 3 January 2014, 08:00


def write(path, header, rows):
    "Write a table, separated by commas unless a row is text already; return its path."
    lines = [row if isinstance(row, str) else ",".join(map(str, row)) for row in rows]
    path.write_text("\n".join([header] * bool(header) + lines) + "\n")
    return path


def read(path, **options):
    "Load a log as the command line does, with options as text."
    return load(path, options=parse_read_options(**options))


def dropped(loaded):
    return {d["reason"]: d["rows"] for d in loaded.report["dropped"] if d["rows"]}


def notes(loaded):
    return " | ".join(loaded.report["notes"])


def firsts(loaded, n=1):
    return loaded.interactions["timestamp"].head(n).dt.strftime("%Y-%m-%d %H:%M:%S").to_list()


# Times


def timed(path, times, header="user,item,rating,timestamp"):
    "Write a log of one row for each time, quoted."
    return write(path, header, [f'u{i},i{i % 7},{1 + i % 5},"{t}"' for i, t in enumerate(times)])


MOMENTS = [datetime(2014, 1, 3, 8, 26) + timedelta(days=1, minutes=7) * i for i in range(40)]
FORMATS = [
    "%d/%m/%Y",
    "%m/%d/%Y",
    "%d/%m/%Y %H:%M",
    "%m/%d/%Y %I:%M %p",
    "%d-%m-%Y",
    "%d.%m.%Y",
    "%d.%m.%Y %H:%M:%S",
    "%Y/%m/%d %H:%M:%S",
    "%Y-%m-%d",
    "%Y-%m-%d %H:%M:%S",
    "%Y-%m-%dT%H:%M:%S.123",
    "%Y-%m-%dT%H:%M:%SZ",
    "%Y-%m-%d %H:%M:%S+00:00",
    "%Y-%m-%d %H:%M:%S UTC",
    "%Y.%m.%d",
    "%Y%m%d",
    "%Y%m%d%H%M",
    "%Y%m%d%H%M%S",
    "%Y%m%dT%H%M%SZ",
    "%a %b %d %H:%M:%S %Y",
    "%a %b %d %H:%M:%S +0000 %Y",
    "%a, %d %b %Y %H:%M:%S GMT",
    "%A, %B %d, %Y",
    "%d %B %Y",
    "%b %d, %Y",
    "%b %d, %Y, %I:%M:%S %p",
    "%d-%b-%Y",
    "%d-%b-%y",
    "%d/%b/%Y:%H:%M:%S +0000",
    "%m %d, %Y",
    "%d/%m/%y",
    "%m/%d/%y %H:%M",
]


@pytest.mark.parametrize("form", FORMATS)
def test_dates_in_any_form(tmp_path, form):
    loaded = read(timed(tmp_path / "log.csv", [m.strftime(form) for m in MOMENTS]))
    has_clock = any(code in form for code in ("%H", "%I"))
    shown = "%Y-%m-%d %H:%M" if has_clock else "%Y-%m-%d"
    ours = loaded.interactions["timestamp"].dt.strftime(shown).to_list()
    assert ours == [m.strftime(shown) for m in MOMENTS]
    assert loaded.report["has_time"] and not dropped(loaded)
    assert loaded.report["reading"]["time_unit"].startswith("dates")
    assert "may have the day or the month first" not in notes(loaded)


@pytest.mark.parametrize(
    "written, moment",
    [
        ("1/3/2014 08:26", "2014-03-01 08:26:00"),
        ("3.1.14", "2014-01-03 00:00:00"),
        ("2014-1-3 8:26", "2014-01-03 08:26:00"),
        ("2014-01-03T09:26:00+01:00", "2014-01-03 08:26:00"),
        ("2014-01-03T01:56:00-0630", "2014-01-03 08:26:00"),
        ("2014-01-03T08:26:00.123456789Z", "2014-01-03 08:26:00"),
        ("2014-01-03 08:26:00,123", "2014-01-03 08:26:00"),
        ("Freitag, 3. Januar 2014", "2014-01-03 00:00:00"),
        ("3rd January 2014", "2014-01-03 00:00:00"),
        ("12/31/2014 12:05 AM", "2014-12-31 00:05:00"),
        ("2014-Jan-03", "2014-01-03 00:00:00"),
        ("Jan 2014", "2014-01-01 00:00:00"),
        ("2014-01", "2014-01-01 00:00:00"),
        ("1979-05-01", "1979-05-01 00:00:00"),
        ("2 février 2014", "2014-02-02 00:00:00"),
        ("8 juillet 2014", "2014-07-08 00:00:00"),
        ("8 juin 2014", "2014-06-08 00:00:00"),
        ("3 de enero de 2014", "2014-01-03 00:00:00"),
        ("3 gennaio 2014", "2014-01-03 00:00:00"),
        ("3 мая 2014", "2014-05-03 00:00:00"),
        ("03JAN2014", "2014-01-03 00:00:00"),
        ("2014年1月3日 08:26", "2014-01-03 08:26:00"),
        ("2014-W01-5", "2014-01-03 00:00:00"),
        ("2015-W53", "2015-12-28 00:00:00"),
        ("2014-003", "2014-01-03 00:00:00"),
        ("2014 Q2", "2014-04-01 00:00:00"),
        ("2014-01-03 08:26:00 CET", "2014-01-03 07:26:00"),
        ("Fri Jan 03 08:26:00 PST 2014", "2014-01-03 16:26:00"),
        ("2014-01-03T09:26:00+01:00[Europe/Berlin]", "2014-01-03 08:26:00"),
        ("Fri Jan 03 2014 09:26:00 GMT+0100 (Central European Time)", "2014-01-03 08:26:00"),
        ("2014-01-03 10:26 +2", "2014-01-03 08:26:00"),
    ],
)
def test_a_date(tmp_path, written, moment):
    assert firsts(read(timed(tmp_path / "log.csv", [written]))) == [moment]


def test_the_whole_column_tells_the_order_of_day_and_month(tmp_path):
    days = ["03/01/2014"] * 30
    day_first = read(timed(tmp_path / "day.csv", days + ["25/01/2014"]))
    assert firsts(day_first) == ["2014-01-03 00:00:00"]
    assert "in 1 of 31 dates" in day_first.report["reading"]["time_reason"]
    month_first = read(timed(tmp_path / "month.csv", days + ["01/25/2014"]))
    assert firsts(month_first) == ["2014-03-01 00:00:00"]


def test_an_ambiguous_order_is_said_and_can_be_given(tmp_path):
    path = timed(tmp_path / "log.csv", ["03/04/2014", "05/06/2014"])
    unsure = read(path)
    assert firsts(unsure) == ["2014-04-03 00:00:00"]
    assert "-p time_format='month first'" in notes(unsure)
    for form in ("month first", "%m/%d/%Y"):
        sure = read(path, time_format=form)
        assert firsts(sure) == ["2014-03-04 00:00:00"]
        assert "time_format" not in notes(sure)
        assert sure.report["reading"]["time_reason"] == "given by -p time_format="


@pytest.mark.parametrize("form", ["%y-%m-%d", "%y/%m/%d %H:%M", "%y.%m.%d"])
def test_a_year_of_two_digits_may_come_first(tmp_path, form):
    moments = [m - timedelta(days=3000) for m in MOMENTS]  # 2005, so no number is above 31
    loaded = read(timed(tmp_path / "log.csv", [m.strftime(form) for m in moments]))
    days = loaded.interactions["timestamp"].dt.date().to_list()
    assert days == [m.date() for m in moments]
    assert "were read as year, month and day" in notes(loaded)
    assert "-p time_format='%d" in notes(loaded)


@pytest.mark.parametrize("n_numbers", [3, 30])
def test_dates_and_numbers_in_one_column(tmp_path, n_numbers):
    times = [str(T + i) if i < n_numbers else m.strftime("%Y-%m-%d") for i, m in enumerate(MOMENTS)]
    loaded = read(timed(tmp_path / "log.csv", times))
    assert len(loaded.interactions) == 40 and not dropped(loaded)
    assert {t.year for t in loaded.interactions["timestamp"]} == {2014}
    assert "others numbers, which were read as seconds" in notes(loaded)


def test_a_date_of_zeros_does_not_ask_for_the_order(tmp_path):
    loaded = read(timed(tmp_path / "log.csv", ["2014-01-03"] * 9 + ["0000-00-00"]))
    assert dropped(loaded) == {"timestamp missing or unreadable": 1}
    assert "may have the day or the month first" not in notes(loaded)


def test_dates_of_both_orders_are_counted(tmp_path):
    loaded = read(timed(tmp_path / "log.csv", ["25/01/2014"] * 9 + ["01/25/2014"]))
    assert dropped(loaded) == {"timestamp missing or unreadable": 1}
    assert "1 of 10 dates do not fit" in notes(loaded)
    assert "01/25/2014" in loaded.report["reading"]["examples"]["timestamp missing or unreadable"]


@pytest.mark.parametrize(
    "header, row, moment",
    [
        ("user,item,rating,date,time", "u,i,4,2014-01-03,08:26:00", "2014-01-03 08:26:00"),
        ("user,item,rating,time,date", "u,i,4,08:26,03.01.2014", "2014-01-03 08:26:00"),
        ("user,item,rating,date,time", "u,i,4,20140103,08:26:00", "2014-01-03 08:26:00"),
        ("user,item,rating,date,time", "u,i,4,2014-01-03,1388737560", "2014-01-03 08:26:00"),
        ("user,item,time,timestamp", "u,i,3.5,1388737560", "2014-01-03 08:26:00"),
    ],
)
def test_date_and_clock_in_two_columns(tmp_path, header, row, moment):
    assert firsts(read(write(tmp_path / "log.csv", header, [row] * 3))) == [moment]


def test_two_columns_of_time_can_be_given(tmp_path):
    path = write(tmp_path / "log.csv", "user,item,wann,uhr", ["u,i,2014-01-03,08:26:00"])
    assert firsts(read(path, columns="timestamp=wann+uhr")) == ["2014-01-03 08:26:00"]


@pytest.mark.parametrize(
    "numbers, moment, unit",
    [
        ([20140103, 20140225], "2014-01-03 00:00:00", "dates (%Y%m%d)"),
        ([20140103082600], "2014-01-03 08:26:00", "dates (%Y%m%d%H%M%S)"),
        ([201401030826], "2014-01-03 08:26:00", "dates (%Y%m%d%H%M)"),
        ([201401, 201402], "2014-01-01 00:00:00", "dates (%Y%m)"),
        ([2014, 2015], "2014-01-01 00:00:00", "dates (%Y)"),
        ([41642.351389, 41700], "2014-01-03 08:26:00", "spreadsheet days"),
        ([16073, 16074], "2014-01-03 00:00:00", "days since 1970"),
        ([1388737560], "2014-01-03 08:26:00", "seconds"),
        (["1.388737560e9"], "2014-01-03 08:26:00", "seconds"),
        ([1388737560000], "2014-01-03 08:26:00", "milliseconds"),
        ([1388737560.5], "2014-01-03 08:26:00", "seconds"),
    ],
)
def test_numbers_as_times(tmp_path, numbers, moment, unit):
    loaded = read(timed(tmp_path / "log.csv", numbers))
    assert firsts(loaded) == [moment]
    assert loaded.report["time_unit"] == unit


@pytest.mark.parametrize("numbers", [range(1, 41), range(0, 400, 10), [97, 12, 55, 3]])
def test_running_numbers_give_the_order(tmp_path, numbers):
    loaded = read(timed(tmp_path / "log.csv", numbers))
    assert loaded.report["time_unit"] == "order"
    assert "running numbers" in notes(loaded) and "-p time_format=" in notes(loaded)
    ranks = loaded.interactions["timestamp"].rank("dense").to_list()
    assert ranks == pl.Series(list(numbers)).rank("dense").to_list()


@pytest.mark.parametrize(
    "start, word",
    [(283_996_800, "before 1990"), (4_386_000_000, "in the future")],
)
def test_old_and_shifted_times_are_kept_and_said(tmp_path, start, word):
    loaded = read(timed(tmp_path / "log.csv", [start + i * 86_400 for i in range(40)]))
    assert not dropped(loaded) and loaded.report["kept"] == 40
    assert word in notes(loaded)
    assert loaded.interactions["timestamp"].dt.epoch("s")[0] == start


def test_some_old_times_are_kept_and_zeros_are_not(tmp_path):
    loans = [283_996_800 + i for i in range(20)] + [T + i for i in range(60)] + [0] * 5
    loaded = read(timed(tmp_path / "log.csv", loans))
    assert dropped(loaded) == {"timestamp before 1990 or in the future": 5}


@pytest.mark.parametrize(
    "values, message",
    [
        (["soon", "later"], r"such as 'soon'.*-p time_format=.*-p columns=timestamp="),
        ([0] * 40, r"all times are 0.*-p columns=timestamp="),
        (["08:26:00", "09:26:00"], r"such as '08:26:00'.*-p columns=timestamp="),
        (["spring of 2014"] * 3, r"-p time_format="),
    ],
)
def test_times_that_cannot_be_read_are_an_error(tmp_path, values, message):
    path = timed(tmp_path / "log.csv", values)
    with pytest.raises(UserError, match=message):
        read(path)
    assert not read(path, columns="timestamp=").report["has_time"]


def test_a_column_without_times_is_said(tmp_path):
    loaded = read(timed(tmp_path / "log.csv", [""] * 9))
    assert not loaded.report["has_time"] and "holds no times" in notes(loaded)


@pytest.mark.parametrize(
    "written, given, moment",
    [
        ("3|1|2014", "%d|%m|%Y", "2014-01-03 00:00:00"),
        ("140103", "%y%m%d", "2014-01-03 00:00:00"),
        ("1388737560000", "ms", "2014-01-03 08:26:00"),
        ("1000", "days", "1972-09-27 00:00:00"),
        ("41642", "excel", "2014-01-03 00:00:00"),
    ],
)
def test_a_given_form_of_times(tmp_path, written, given, moment):
    assert firsts(read(timed(tmp_path / "log.csv", [written]), time_format=given)) == [moment]


@pytest.mark.parametrize("given", ["never", "dd.mm.yyyy", "%Q %", "%d/%m"])
def test_a_given_form_that_is_none(tmp_path, given):
    with pytest.raises(UserError, match="time_format"):
        read(timed(tmp_path / "log.csv", ["3|1|2014"]), time_format=given)


def test_parts_that_are_written_differently_are_said(tmp_path):
    rows = [f"u{n % 5},i{n},{1 + n % 5},{T + n}" for n in range(40)]
    write(tmp_path / "train.csv", "user,item,rating,timestamp", rows[:30])
    write(
        tmp_path / "test.csv", "userId;itemId;rating;date", [r.replace(",", ";") for r in rows[30:]]
    )
    said = notes(read(tmp_path))
    assert "but test.csv as CSV, UTF-8, separated by ';'" in said and "user = userId" in said
    write(tmp_path / "test.csv", "user,item,rating,timestamp", rows[30:])
    assert "but test.csv" not in notes(read(tmp_path))


def test_each_part_of_a_split_has_times(tmp_path):
    for part in ("train", "test"):
        timed(tmp_path / f"{part}.csv", ["03/01/2014", "25/01/2014"])
    loaded = read(tmp_path)
    assert firsts(loaded, 2) == ["2014-01-03 00:00:00", "2014-01-25 00:00:00"]


moments = st.datetimes(datetime(1991, 1, 1), datetime(2026, 1, 1))


@settings(max_examples=60, deadline=None, database=None, derandomize=True)
@given(st.lists(moments, min_size=1, max_size=12), st.sampled_from(FORMATS))
def test_a_form_is_read_rightly_or_said(times, form):
    "Check that a column is right, or that it is said that nothing in it tells the order."
    texts = [t.strftime(form) for t in times]
    if texts[0].isdecimal():
        return
    log = pl.LazyFrame({"timestamp": texts})
    parsed, found = parse_dates(log)
    ours = log.select(pl.from_epoch(parsed, "ms")).collect().to_series()
    right = [datetime.strptime(text, form.replace("%Z", "UTC")) for text in texts]
    right = [t.replace(tzinfo=None, microsecond=0) for t in right]
    same = [t.replace(microsecond=0) for t in ours if t] == right
    is_said = any("may have the day or the month first" in note for note in found.notes)
    assert same or is_said or "each is a first day" in found.reason or "%y" in form


# Scales


def rated(path, ratings, header="user,item,rating"):
    "Write a log with each rating in a row of its own."
    return write(path, header, [(f"u{i % 40}", f"i{i}", r) for i, r in enumerate(ratings)])


def spread(**rows):
    "Repeat each value as often as said, in a mixed order."
    values = [
        float(k[1:].replace("m", "-").replace("_", ".")) for k, n in rows.items() for _ in range(n)
    ]
    return [values[i * 7919 % len(values)] for i in range(len(values))]


@pytest.mark.parametrize(
    "ratings, scale, liked",
    [
        (spread(v0=60, v1=80, v2=120), [0, 2], 2),
        (spread(v1=10, v2=20, v3=30), [0, 5], 4),
        (spread(v1=30, v2=50, v3=70), [1, 3], 3),
        (spread(v1=9, v2=9, v3=20, v4=50, v5=80), [1, 5], 4),
        (spread(v1=20, v2=30, v3=40, v4=40, v5=30, v6=20), [1, 6], 5),
        (spread(v1=20, v2=30, v3=40, v4=40, v5=30, v6=20, v7=30), [1, 7], 6),
        (spread(v0_5=9, v1=9, v2_5=20, v3_5=50, v5=80), [0.5, 5], 4),
        (spread(v0_5=9, v1=9, v2_5=20, v3_5=50, v4=80), [0.5, 4], 3.5),
        (spread(v1=9, v3=9, v7=20, v8=50, v10=80), [1, 10], 8),
        (spread(v0=9, v3=9, v7=20, v8=50, v10=80), [0, 10], 8),
        (spread(v0=9, v20=9, v55=20, v80=50, v97=80), [0, 100], 80),
        (spread(vm10=9, vm5=9, v0=20, v5_5=50, v10=80), [-10, 10], 6),
        (spread(vm2=9, vm1=9, v0=20, v1=50, v2=80), [-2, 2], 2),
        (spread(v0_1=9, v0_25=9, v0_5=20, v0_9=50, v1=80), [0, 1], 0.8),
        (spread(v5=900), [1, 5], 4),
    ],
)
def test_a_scale_and_what_counts_as_liked(tmp_path, ratings, scale, liked):
    report = read(rated(tmp_path / "log.csv", ratings)).report
    if scale == [0, 5]:
        scale = [1, 5]
    assert list(report["scale"]) == scale and report["has_ratings"]
    assert report["liked_from"] == report["reading"]["liked_from"] == pytest.approx(liked)
    assert report["kept"] == len(ratings)


@pytest.mark.parametrize(
    "ratings",
    [
        spread(v1=210, v2=50, v3=20, v4=10, v5=6, v6=4),
        spread(v1=240, v2=40, v3=12, v4=5, v5=3),
        spread(v1=600, v2=100, v3=50, v5=30, v8=10, v20=5, v40=3, v95=1),
        spread(v1=30, v6=20, v12=40, v24=30, v48=10, v600=2),
        spread(v0_4=30, v1_5=30, v12_1=20, v300_5=5),
        spread(v1=90, v2=10),
    ],
)
def test_counts_are_no_ratings(tmp_path, ratings):
    loaded = read(rated(tmp_path / "log.csv", ratings))
    assert not loaded.report["has_ratings"] and not dropped(loaded)
    assert loaded.report["reading"]["rating_kind"] == "counts"
    assert "-p scale=1-5" in notes(loaded)
    assert loaded.interactions["quantity"].to_list() == pytest.approx(ratings)
    assert read(rated(tmp_path / "log.csv", ratings), scale=f"0-{max(ratings):g}").report[
        "has_ratings"
    ]


@pytest.mark.parametrize(
    "ratings, mark, scale",
    [
        (spread(v0=600, v3=20, v5=60, v7=80, v8=100, v9=80, v10=60), 0, [1, 10]),
        (spread(v0=300, v1=20, v2=20, v3=80, v4=100, v5=80), 0, [1, 5]),
        (spread(vm1=200, v3=20, v5=60, v7=80, v8=100, v9=80, v10=60), -1, [1, 10]),
        (spread(v99=200, vm9_5=20, v0=60, v7_2=80, v9=60), 99, [-10, 10]),
        (spread(v999=50, v1=20, v2=20, v3=80, v4=100, v5=80), 999, [1, 5]),
    ],
)
def test_not_rated_is_an_event_without_a_rating(tmp_path, ratings, mark, scale):
    loaded = read(rated(tmp_path / "log.csv", ratings))
    n_marked = ratings.count(mark)
    assert list(loaded.report["scale"]) == scale and loaded.report["kept"] == len(ratings)
    assert loaded.report["reading"]["not_rated"] == {f"{mark:g}": n_marked}
    assert f"{n_marked:,} rows" in notes(loaded)
    unrated = loaded.interactions.filter(pl.col("rating").is_null())
    assert len(unrated) == n_marked and set(unrated["event"]) == {"purchase"}


def test_the_user_says_what_is_not_rated(tmp_path):
    path = rated(tmp_path / "log.csv", spread(v0=20, v1=40, v2=40, v3=40, v4=40, v5=40))
    assert list(read(path).report["scale"]) == [0, 5]
    assert "-p not_rated=0" in notes(read(path))
    told = read(path, not_rated="0")
    assert list(told.report["scale"]) == [1, 5]
    assert told.interactions["rating"].null_count() == 20


@pytest.mark.parametrize("ratings", [spread(v1=70, vm1=30), spread(v1=70, v0=20, vm1=10)])
def test_thumbs(tmp_path, ratings):
    loaded = read(rated(tmp_path / "log.csv", ratings))
    assert loaded.report["reading"]["rating_kind"] == "liked"
    assert dropped(loaded) == {"not liked": 30} and not loaded.report["has_ratings"]


@pytest.mark.parametrize(
    "given, kind, n_kept",
    [
        ("1-5", "ratings", 100),
        ("counts", "counts", 110),
        ("0-10", "ratings", 110),
        ("0 to 100", "ratings", 110),
    ],
)
def test_a_given_scale(tmp_path, given, kind, n_kept):
    ratings = spread(v1=20, v2=20, v3=20, v4=20, v5=20, v8=10)
    loaded = read(rated(tmp_path / "log.csv", ratings), scale=given)
    assert loaded.report["reading"]["rating_kind"] == kind
    assert loaded.report["kept"] == n_kept
    assert loaded.report["reading"]["scale_reason"] == "given by -p scale="


@pytest.mark.parametrize(
    "name, value",
    [
        ("scale", "5-1"),
        ("scale", "stars"),
        ("not_rated", "none"),
        ("events", "play"),
        ("events", "play=fun"),
    ],
)
def test_options_of_another_form(name, value):
    with pytest.raises(UserError, match=value.split("=")[-1]):
        parse_read_options(**{name: value})


def test_typing_errors_are_faults_with_an_example(tmp_path):
    ratings = spread(v1=9, v2=9, v3=20, v4=50, v5=80) + [50]
    loaded = read(rated(tmp_path / "log.csv", ratings))
    assert list(loaded.report["scale"]) == [1, 5]
    assert dropped(loaded) == {"rating outside the scale": 1}
    assert "50.0" in loaded.report["reading"]["examples"]["rating outside the scale"]


def test_a_scale_that_is_unknown(tmp_path):
    ratings = [-500, 200, -300, 400, -100, 900]
    with pytest.raises(UserError, match=r"-500 to 900.*-p scale=-500-900"):
        read(rated(tmp_path / "log.csv", ratings))


def test_a_threshold_that_tells_nothing_is_said(tmp_path):
    alike = read(rated(tmp_path / "alike.csv", [5] * 200))
    assert "all ratings are 5" in notes(alike)
    nearly = read(rated(tmp_path / "nearly.csv", spread(v5=190, v2=5, v3=5)))
    assert "95% of the ratings are 4 or more" in notes(nearly)


# Numbers


@pytest.mark.parametrize(
    "texts, ratings",
    [
        (["1 star", "2 stars", "3 stars", "4 stars", "5 stars"], [1, 2, 3, 4, 5]),
        (["1/5", "2/5", "3/5", "4/5", "5/5"], [1, 2, 3, 4, 5]),
        (["1.0 out of 5 stars", "2.0 out of 5 stars", "5.0 out of 5 stars"], [1, 2, 5]),
        (["★☆☆☆☆", "★★☆☆☆", "★★★★★"], [1, 2, 5]),
        (["⭐", "⭐⭐⭐", "⭐⭐⭐⭐⭐"], [1, 3, 5]),
        (["10%", "55 %", "100%"], [10, 55, 100]),
    ],
)
def test_ratings_as_text(tmp_path, texts, ratings):
    rows = [f"u{i % 9},i{i},{texts[i % len(texts)]}" for i in range(60)]
    loaded = read(write(tmp_path / "log.csv", "user,item,rating", rows))
    expected = [ratings[i % len(ratings)] for i in range(60)]
    assert loaded.interactions["rating"].to_list() == expected
    assert f"ratings are text: '{texts[0]}' was read as" in notes(loaded)


@pytest.mark.parametrize(
    "liked, other", [("like", "dislike"), ("True", "False"), ("yes", "no"), ("thumbs up", "down")]
)
def test_words_for_liked_or_not(tmp_path, liked, other):
    rows = [f"u{i % 9},i{i},{other if i % 3 == 0 else liked}" for i in range(60)]
    loaded = read(write(tmp_path / "log.csv", "user,item,rating", rows))
    assert loaded.report["reading"]["rating_kind"] == "liked"
    assert len(loaded.interactions) == 40 and dropped(loaded) == {"not liked": 20}


@pytest.mark.parametrize(
    "written, ratings",
    [
        (["4,5", "3", "5", "2,5"] * 10, [4.5, 3, 5, 2.5]),
        (["4,5", "3.5", "5", "2,0"] * 10, [4.5, 3.5, 5, 2]),
        (["4,5", "3,667", "5,0", "2,333"] * 10, [4.5, 3.667, 5, 2.333]),
        ([" 4,5 ", "+3", "5", "1"] * 10, [4.5, 3, 5, 1]),
    ],
)
def test_decimal_commas_in_ratings(tmp_path, written, ratings):
    rows = [f"u{i};i{i};{r};{T + i}" for i, r in enumerate(written)]
    loaded = read(write(tmp_path / "log.csv", "user;item;rating;timestamp", rows))
    assert loaded.interactions["rating"].head(4).to_list() == pytest.approx(ratings)
    assert not dropped(loaded) and "decimal commas" in notes(loaded)


@pytest.mark.parametrize(
    "prices, numbers",
    [
        (["12,99 €", "5,00 €"], [12.99, 5]),
        (["1.299,00 €", "12,5"], [1299, 12.5]),
        (["$1,299.00", "$5.25"], [1299, 5.25]),
        (["1.299 €", "12,99 €"], [1299, 12.99]),
        (["1,299", "12.99"], [1299, 12.99]),
        (["1 299,00 kr", "5 kr"], [1299, 5]),
        (["CHF 1'299.50", "EUR 3"], [1299.5, 3]),
        (["1.5", "free"], [1.5, None]),
        (["12,-", ""], [12, None]),
        (["1,234,567.5", "3"], [1234567.5, 3]),
    ],
)
def test_prices(tmp_path, prices, numbers):
    write(tmp_path / "ratings.csv", "user,item,rating", ["u0,i0,4", "u1,i1,5"])
    write(tmp_path / "items.csv", "item;price", [f"i{i};{p}" for i, p in enumerate(prices)])
    assert read(tmp_path).items["price"].to_list() == numbers


@settings(max_examples=100, deadline=None, database=None, derandomize=True)
@given(st.lists(st.integers(0, 10**8), min_size=1, max_size=9), st.booleans(), st.booleans())
def test_formatted_prices_come_back(cents, with_comma, grouped):
    texts = [f"{c / 100:{',' if grouped else ''}.2f} €" for c in cents]
    if with_comma:
        texts = [t.translate(str.maketrans(",.", ".,")) for t in texts]
    assert to_price(pl.Series(texts)).to_list() == pytest.approx([c / 100 for c in cents])


def test_numeric_columns_with_decimal_commas(tmp_path):
    write(tmp_path / "ratings.csv", "user,item,rating", ["u0,i0,4", "u1,i1,5"])
    write(tmp_path / "items.csv", "item;weight;code", ["i0;2,5;007", "i1;1;12"])
    items = read(tmp_path).items
    assert items["weight"].to_list() == [2.5, 1] and items["code"].to_list() == ["007", "12"]


# Ids


@pytest.mark.parametrize(
    "word",
    ["NULL", "null", "nan", "NaN", "None", "<NA>", "N/A", "NA", r"\N", "undefined", '""""""'],
)
def test_words_for_nothing_are_no_ids(tmp_path, word):
    rows = [f"{word if i % 4 == 0 else f'u{i}'},i{i},4" for i in range(40)]
    loaded = read(write(tmp_path / "log.csv", "user,item,rating", rows))
    assert dropped(loaded) == {"missing user or item": 10}
    assert "10 rows have the word" in notes(loaded) and "for the user" in notes(loaded)


def test_an_empty_id_is_shown_as_such(tmp_path):
    rows = [f"{'' if n == 3 else 'u'},i{n},4" for n in range(9)]
    loaded = read(write(tmp_path / "log.csv", "user,item,rating", rows))
    example = loaded.report["reading"]["examples"]["missing user or item"]
    assert example.startswith("(no user), i3")


def test_a_word_for_nothing_names_the_way_to_keep_it(tmp_path):
    rows = [f"{'None' if n == 3 else 'u'},i{n},4" for n in range(9)]
    loaded = read(write(tmp_path / "log.csv", "user,item,rating", rows))
    assert "write it otherwise in the file, such as 'None_'" in notes(loaded)


def test_ids_that_resemble_words_for_nothing_stay(tmp_path):
    ids = ["Nan", "Nullarbor", "none of them", "0", "N", "nA", "unknown"]
    rows = [f"{user},i{i},4" for i, user in enumerate(ids)]
    loaded = read(write(tmp_path / "log.csv", "user,item,rating", rows))
    assert loaded.interactions["user"].to_list() == ids and not dropped(loaded)


# Columns


@pytest.mark.parametrize(
    "header",
    [
        "userId,itemId,ratings,ts",
        "user,item,label,time",
        "session_id,item_id,score,timestamp",
        "user_id,anime_id,rating,created_at",
        "userID,artistID,rating,timestamp",
        "userID,placeID,rating,date",
        "User-ID,ISBN,Book-Rating,timestamp",
        "CustomerID,StockCode,rating,InvoiceDate",
        "User,Game_ID,rating,timestamp",
        "用户ID,商品ID,评分,时间戳",
        "uid,iid,stars,t_dat",
    ],
)
def test_names_of_columns(tmp_path, header):
    rows = [(f"u{i}", f"i{i}", 1 + i % 5, T + i) for i in range(20)]
    loaded = read(write(tmp_path / "log.csv", header, rows))
    assert loaded.interactions["user"][3] == "u3" and loaded.interactions["item"][3] == "i3"
    assert loaded.report["has_ratings"] and loaded.report["has_time"]
    used = {use["name"]: use["source"] for use in loaded.report["reading"]["columns"]}
    assert used["user"] == header.split(",")[0] and not loaded.report["reading"]["unused"]


@pytest.mark.parametrize(
    "header",
    [
        "user_id:token,item_id:token,rating:float,timestamp:float",
        "User,Item (SKU),Rating [1-5],Time (UTC)",
    ],
)
def test_names_with_a_unit_or_a_type(tmp_path, header):
    rows = [f"u{n % 5},i{n},{1 + n % 5},{T + n}" for n in range(40)]
    loaded = read(write(tmp_path / "log.csv", header, rows))
    assert loaded.report["kept"] == 40
    assert loaded.report["has_ratings"] and loaded.report["has_time"]


def test_the_fuller_of_two_columns_is_taken(tmp_path):
    rows = [f"{'' if n % 4 else 'x'},u{n % 9},i{n},4" for n in range(40)]
    loaded = read(write(tmp_path / "log.csv", "user_id,customer,item,rating", rows))
    assert loaded.report["kept"] == 40 and loaded.report["users"] == 9


def test_ids_win_over_names(tmp_path):
    rows = [f"Anna,u{i},Fan,i{i},4" for i in range(40)]
    loaded = read(write(tmp_path / "log.csv", "user,user_id,item,item_id,rating", rows))
    assert loaded.report["users"] == loaded.report["kept"] == 40
    assert loaded.report["reading"]["unused"] == ["user", "item"]


def test_unused_columns_that_look_like_ratings_or_times_are_said(tmp_path):
    rows = [f"u{i},i{i},{1 + i % 5},{T + i},blue" for i in range(40)]
    loaded = read(write(tmp_path / "log.csv", "user,item,note,wann,color", rows))
    assert loaded.report["reading"]["unused"] == ["note", "wann", "color"]
    assert "-p columns=rating=note" in notes(loaded)
    assert "-p columns=timestamp=wann" in notes(loaded) and "color" not in notes(loaded)


def test_a_missing_column_is_named_with_the_way_out(tmp_path):
    path = write(tmp_path / "log.csv", "Kunde,Artikel,Bewertung", ["a,x,4"])
    with pytest.raises(UserError, match="-p columns=user=Kunde,item=Artikel"):
        read(path)
    half = write(tmp_path / "half.csv", "Kunde,item,Bewertung", ["a,x,4"])
    with pytest.raises(UserError, match="-p columns=user=Kunde,item=item"):
        read(half)
    assert read(path, columns="user=Kunde,item=Artikel").report["kept"] == 1


@pytest.mark.parametrize(
    "row, expected",
    [
        ("1000,5000,700000,pv,{t}", {"event": "raw", "rating": None}),
        ("1000,5000,700000,{t},buy", {"event": "raw", "rating": None}),
        ("1000,5000,4,{t},Audio", {"event": None, "rating": 4}),
        ("1000,5000,{t},4", {"event": None, "rating": 4}),
        ("1000,5000,2014-01-03 08:26:00,4", {"event": None, "rating": 4}),
        ("1000,5000,4,2014-01-03", {"event": None, "rating": 4}),
        ("{t},1000,5000,4", {"event": None, "rating": 4}),
        ("2014-01-03,1000,5000,4", {"event": None, "rating": 4}),
        ("{n},1000,5000,4,{t}", {"event": None, "rating": 4}),
        ("{t},pv,1000,5000", {"event": "raw", "rating": None}),
    ],
)
def test_columns_without_a_header(tmp_path, row, expected):
    rows = [row.replace("{t}", str(T + i)).replace("{n}", str(i)) for i in range(40)]
    rows = [r.replace("pv", ("pv", "cart", "fav", "buy")[i % 4]) for i, r in enumerate(rows)]
    loaded = read(write(tmp_path / "log.csv", "", rows))
    first = loaded.interactions.row(0, named=True)
    assert (first["user"], first["item"]) == ("1000", "5000")
    assert loaded.report["has_time"] and loaded.report["first"].startswith("2014-01-03")
    assert loaded.report["has_ratings"] == (expected["rating"] is not None)
    assert loaded.report["has_events"] == (expected["event"] is not None)


def test_numbered_columns_of_a_file_without_a_header(tmp_path):
    rows = ['1000,"Half-Life 2, Gold",purchase,1.0,0', '1000,"Half-Life 2, Gold",play,3.5,0'] * 20
    loaded = read(write(tmp_path / "log.csv", "", rows), columns="user=1,item=2,event=3")
    assert not loaded.report["has_time"] and not loaded.report["has_ratings"]
    assert "there is no header" in notes(loaded)
    reading = loaded.report["reading"]
    assert [use["name"] for use in reading["columns"]] == ["user", "item", "event"]
    assert {use["reason"] for use in reading["columns"]} == {"given by -p columns="}


def test_running_numbers_without_a_header_give_the_order(tmp_path):
    path = write(tmp_path / "log.csv", "", [f"7,{i},{1 + i % 5},{i}" for i in range(40)])
    loaded = read(path, columns="user=1,item=2,rating=3,timestamp=4")
    assert loaded.report["has_ratings"] and loaded.report["time_unit"] == "order"


# Events


@pytest.mark.parametrize(
    "word, event",
    [
        ("play", "view"),
        ("fav", "cart"),
        ("Add To Cart", "cart"),
        ("wishlist", "cart"),
        ("pv", "view"),
        ("buy", "purchase"),
        ("transaction", "purchase"),
        ("checkout", "purchase"),
        ("clicked", "click"),
        ("收藏", "cart"),
    ],
)
def test_words_for_events(tmp_path, word, event):
    rows = ["a,x,view", "a,y,purchase", f"b,x,{word}"]
    loaded = read(write(tmp_path / "log.csv", "user,item,event", rows))
    assert loaded.interactions["event"].to_list() == ["view", "purchase", event]
    assert loaded.report["reading"]["events"][word] == [event, 1 + (word in ("view", "purchase"))]


def test_steam(tmp_path):
    rows = ['1000,"Half-Life 2, Gold",purchase,1.0,0', '1000,"Half-Life 2, Gold",play,3.5,0'] * 20
    path = write(tmp_path / "log.csv", "who,what,how,hours,zero", rows)
    loaded = read(path, columns="user=who,item=what,event=how")
    assert loaded.report["kept"] == 40 and not dropped(loaded)
    assert loaded.interactions["event"].to_list() == ["purchase", "view"] * 20
    told = read(path, columns="user=who,item=what,event=how", events="play=purchase")
    assert set(told.interactions["event"]) == {"purchase"}
    less = read(path, columns="user=who,item=what,event=how", events="play=")
    assert dropped(less) == {"event that takes something back": 20}


def test_unknown_events(tmp_path):
    some = [f"a,x{i},view" for i in range(8)] + ["a,y,sneeze"]
    loaded = read(write(tmp_path / "some.csv", "user,item,event", some))
    assert (
        loaded.report["kept"] == 9 and "sneeze" in notes(loaded) and "-p events=" in notes(loaded)
    )
    codes = [f"a,x{i},{1 + i % 4}" for i in range(8)]
    path = write(tmp_path / "codes.csv", "user,item,event", codes)
    with pytest.raises(UserError, match=r"-p events=1=purchase.*-p columns=event="):
        read(path)
    told = read(path, events="1=view,2=cart,3=cart,4=purchase")
    assert told.interactions["event"].value_counts(sort=True)["count"].to_list() == [4, 2, 2]
    one = [f"a,x{i},1" for i in range(8)]
    alike = read(write(tmp_path / "one.csv", "user,item,event", one))
    assert alike.report["kept"] == 8 and not alike.report["has_events"]
    assert "tells nothing" in notes(alike)


def test_an_event_that_takes_something_back(tmp_path):
    rows = ["a,x,cart", "a,x,remove_from_cart", "a,y,purchase", "a,y,refund", "a,z,purchase"]
    loaded = read(write(tmp_path / "log.csv", "user,item,event", rows))
    assert loaded.interactions.select("item", "event").rows() == [("x", "cart"), ("z", "purchase")]
    assert dropped(loaded) == {
        "event that takes something back": 1,
        "return": 1,
        "returned later": 1,
    }


# Returns and quantities

RETAIL = "InvoiceNo,StockCode,Description,Quantity,InvoiceDate,UnitPrice,CustomerID,Country"
RETAIL_ROWS = [
    "536365,85123A,LANTERN,6,12/1/2010 8:26,2.55,17850,United Kingdom",
    "536366,71053,LAMP,2,12/1/2010 8:28,3.39,17850,United Kingdom",
    "C536379,85123A,LANTERN,-6,12/13/2010 9:41,2.55,17850,United Kingdom",
    "C536380,71053,LAMP,-1,12/13/2010 9:42,3.39,17850,United Kingdom",
    "536381,85123A,LANTERN,4,12/14/2010 9:42,2.55,17850,United Kingdom",
    "C536382,22720,TIN,-5,12/15/2010 9:42,2.55,13047,United Kingdom",
    "536383,22720,TIN,5,12/16/2010 9:42,2.55,13047,United Kingdom",
    "536384,22720,TIN,3,12/17/2010 9:42,2.55,,United Kingdom",
]


def test_online_retail(tmp_path):
    loaded = read(write(tmp_path / "retail.csv", RETAIL, RETAIL_ROWS))
    assert dropped(loaded) == {"missing user or item": 1, "return": 3, "returned later": 1}
    assert loaded.interactions.select("user", "item", "quantity").rows() == [
        ("17850", "71053", 1),
        ("17850", "85123A", 4),
        ("13047", "22720", 5),
    ]
    text = notes(loaded)
    assert "3 rows are returns: they cancel 1 purchases and reduce the quantity of 1" in text
    assert "5 of 12 returned pieces have no earlier purchase" in text
    assert firsts(loaded) == ["2010-12-01 08:28:00"]


def test_quantities_given_as_ratings(tmp_path):
    rows = RETAIL_ROWS * 1 + [f"5370{i},A{i},X,1,12/18/2010 9:42,1,1{i},UK" for i in range(40)]
    path = write(tmp_path / "retail.csv", RETAIL, rows)
    loaded = read(path, columns="rating=Quantity")
    assert not loaded.report["has_ratings"] and dropped(loaded)["return"] == 3
    assert loaded.interactions["quantity"].sum() == 50


def test_a_cancelled_invoice_without_quantities(tmp_path):
    rows = ["536,a,x,2010-12-01", "C537,a,x,2010-12-02", "538,a,y,2010-12-03"]
    loaded = read(write(tmp_path / "log.csv", "InvoiceNo,user,item,date", rows))
    assert dropped(loaded) == {"return": 1, "returned later": 1}


def test_a_quantity_of_zero_is_no_event(tmp_path):
    loaded = read(write(tmp_path / "log.csv", "user,item,qty", ["a,x,2", "a,y,0", "b,x,1"]))
    assert dropped(loaded) == {"quantity of 0": 1}
    assert loaded.interactions["quantity"].to_list() == [2, 1]


@settings(max_examples=80, deadline=None, database=None, derandomize=True)
@given(
    st.lists(
        st.tuples(st.sampled_from("ab"), st.sampled_from("xy"), st.integers(-3, 3)), max_size=20
    )
)
def test_returns_as_one_counts_them_by_hand(rows):
    from widedeep_nb.lib.events import cancel_returns

    left = [None if q < 0 else q for _, _, q in rows]
    for i, (user, item, quantity) in enumerate(rows):
        owed = max(0, -quantity)
        for j in reversed(range(i)):
            if rows[j][:2] == (user, item) and left[j]:
                taken = min(owed, left[j])
                left[j], owed = left[j] - taken, owed - taken
    schema = {"user": pl.String, "item": pl.String, "quantity": pl.Float64}
    log = pl.LazyFrame(rows, schema, orient="row").with_row_index("row")
    ours = cancel_returns(log.with_columns(timestamp=pl.lit(None, pl.Int64)))
    for row, remaining in ours.select("row", "remaining").iter_rows():
        assert remaining == left[row]


# Parts and other sources


def test_a_test_part_without_ratings(tmp_path):
    write(tmp_path / "train.csv", "user,item,rating", [f"u{i},i{i},{1 + i % 5}" for i in range(30)])
    write(tmp_path / "test.csv", "user,item", [f"u{i},j{i}" for i in range(10)])
    loaded = read(tmp_path)
    assert loaded.report["kept"] == 40 and not dropped(loaded)
    test = loaded.interactions.filter(part="test")
    assert test["rating"].null_count() == 10 and set(test["event"]) == {"purchase"}
    assert "the part without ratings (test)" in notes(loaded)


def test_a_database_is_decided_in_the_same_way(tmp_path):
    base = sqlite3.connect(tmp_path / "shop.db")
    base.execute("CREATE TABLE log (user, item, rating, date)")
    days = [f"{1 + i % 28:02d}/02/2014" for i in range(40)]
    rows = [(f"u{i}", f"i{i}", "4,5", day) for i, day in enumerate(days)]
    base.executemany("INSERT INTO log VALUES (?, ?, ?, ?)", rows)
    base.commit()
    base.close()
    loaded = read(f"sqlite:///{tmp_path}/shop.db?query=SELECT * FROM log")
    assert loaded.report["kept"] == 40 and loaded.interactions["rating"][0] == 4.5
    assert firsts(loaded) == ["2014-02-01 00:00:00"]


def test_the_reading_is_plain_json(tmp_path):
    loaded = read(rated(tmp_path / "log.csv", spread(v1=90, v2=10)))
    reading = json.loads(json.dumps(loaded.report["reading"], allow_nan=False))
    assert reading["scale"] == [0, None] and reading["rating_kind"] == "counts"
    assert [use["name"] for use in reading["columns"]] == ["user", "item", "rating"]


def test_messages_of_faulty_logs_name_the_way_out(tmp_path):
    rows = [f"u{i},i{i},{'much' if i % 3 else 4}" for i in range(30)]
    with pytest.raises(UserError, match="such as 'u1, i1, much'.*-p columns=rating="):
        read(write(tmp_path / "log.csv", "user,item,rating", rows))


def test_a_look_at_times():
    now = datetime.now(timezone.utc).timestamp()
    assert looks_like_time(pl.Series([now - 5])) and not looks_like_time(pl.Series([3, 4]))
    assert not looks_like_time(pl.Series(["red", None]))


def test_faulty_times_at_the_start_do_not_hide_the_column_of_times(tmp_path):
    "A log sorted by time begins with its faulty times, such as those of 1970."
    times = [k * 100_000 for k in range(1, 201)] + [1_400_000_000 + k * 10 for k in range(9800)]
    rows = [f"u{k},i{k % 37},{k % 5 + 1},{time}" for k, time in enumerate(times)]
    (tmp_path / "log.csv").write_text("\n".join(rows))
    loaded = load(str(tmp_path / "log.csv"))
    assert loaded.report["reading"]["time_unit"] == "seconds"
    assert dropped(loaded) == {"timestamp before 1990 or in the future": 200}


@pytest.mark.parametrize("options", [ReadOptions(columns={"item": "items"}), ReadOptions()])
def test_a_list_of_items_is_no_item(tmp_path, options):
    name = "items" if options.columns else "item"
    rows = [json.dumps({"user": f"u{n}", name: ["a", "b"]}) for n in range(30)]
    (tmp_path / "log.jsonl").write_text("\n".join(rows))
    with pytest.raises(UserError, match="is a list, such as .* a row should have one item"):
        load(str(tmp_path / "log.jsonl"), options=options)
