"Check on random files that each gives a valid log or one line of error."

import gzip
import io
import json
import tempfile
from pathlib import Path

import polars as pl
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from widedeep_nb.data import load
from widedeep_nb.lib.core import INTERACTION_SCHEMA, OPTIONAL_COLUMNS, UserError
from widedeep_nb.lib.readers import COMPRESSIONS, FORMATS, LOG_COLUMN_ALIASES

T = 1_365_811_200
names = st.sampled_from(
    [n for known in LOG_COLUMN_ALIASES.values() for n in known.split()]
    + ["reviewerID", "Item-ID", "", "text", "ü", "user\n", 'a"b', "1", "."]
) | st.text(max_size=5)
scalars = st.one_of(
    st.none(),
    st.text(max_size=6),
    st.integers(-3, 12),
    st.floats(width=32),
    st.booleans(),
    st.sampled_from(
        ["007", "1e5", " ", "nan", "inf", "click", "view", "purchase", '"', "a,b", "\r", "\ud800"]
    ),
    st.integers(T, T + 9999),
    st.sampled_from(
        [
            0,
            -1,
            T * 1000,
            T * 10**9,
            10**19,
            2**63,
            10**40,
            1e300,
            "2014-05-23",
            "05 23, 2014",
            "0000-00-00",
        ]
    ),
)
values = (
    scalars
    | st.lists(scalars, max_size=2)
    | st.dictionaries(st.text(max_size=2), scalars, max_size=2)
)


def one_in(n):
    return st.integers(0, n - 1).map(lambda k: k == n - 1)


good_rows = st.lists(
    st.fixed_dictionaries(
        {
            "user": st.sampled_from(["u1", "007", "é"]),
            "item": st.sampled_from(["i1", "00", "x y"]),
            "rating": st.integers(1, 5),
            "timestamp": st.integers(T, T + 99),
        }
    ),
    min_size=1,
    max_size=12,
)


@st.composite
def tables(draw):
    "Draw columns and rows: a valid log, a valid log with odd values, or anything."
    rows = [list(r.values()) for r in draw(good_rows)]
    columns = ["user", "item", "rating", "timestamp"]
    if draw(one_in(4)):
        columns = draw(
            st.lists(names, min_size=1, max_size=5)
            | st.permutations(columns + ["event"]).map(lambda c: c[: draw(st.integers(1, 5))])
        )
        rows = [draw(st.lists(values, min_size=len(columns), max_size=len(columns))) for _ in rows]
    for _ in range(draw(st.integers(0, 2))):
        rows[draw(st.integers(0, len(rows) - 1))][draw(st.integers(0, len(columns) - 1))] = draw(
            values
        )
    return columns, rows


def as_csv(draw, columns, rows):
    separator, quote = (
        draw(st.sampled_from([",", ",", "\t", ";", "|", "::", " "])),
        draw(st.booleans()),
    )

    def field(v):
        return "" if v is None else '"' + str(v).replace('"', '""') + '"' if quote else str(v)

    lines = [separator.join(map(field, r)) for r in ([] if draw(one_in(4)) else [columns]) + rows]
    text = draw(st.sampled_from(["\n", "\r\n", "\r"])).join(lines) + draw(
        st.sampled_from(["", "\n", "\n\n"])
    )
    return text.encode(
        draw(st.sampled_from(["utf-8"] * 8 + ["utf-8-sig", "latin-1", "utf-16"])), "replace"
    )


def as_json(draw, columns, rows):
    rows = [dict(zip(columns, r)) for r in rows]
    form = str if draw(one_in(4)) else json.dumps
    return (form(rows) if draw(st.booleans()) else "\n".join(map(form, rows))).encode(
        "utf-8", "replace"
    )


def as_parquet(draw, columns, rows):
    "Write a Parquet file; the type of a column follows its values, or is drawn."
    columns_by_name = {}
    for i, name in enumerate(columns):
        values = [r[i] for r in rows]
        try:
            column = pl.Series(name, values, strict=False).cast(
                draw(
                    st.sampled_from(
                        [None] * 6
                        + [
                            pl.String,
                            pl.Float64,
                            pl.Binary,
                            pl.Datetime("us"),
                            pl.Boolean,
                            pl.Decimal(20, 2),
                        ]
                    )
                )
                or pl.Series(values, strict=False).dtype,
                strict=False,
            )
        except (Exception, pl.exceptions.PanicException):
            column = pl.Series(name, [str(v).encode("utf-8", "replace") for v in values])
        if column.dtype not in (pl.Object, pl.Null, pl.Struct([])):
            columns_by_name[name] = column
    file = io.BytesIO()
    pl.DataFrame(columns_by_name).write_parquet(file)
    return file.getvalue()


def broken(draw, content):
    "Change, remove or insert a few bytes."
    for _ in range(draw(st.integers(0, 3))):
        start = draw(st.integers(0, len(content)))
        special = st.sampled_from([b"", b"\xff", b"\0", b'"', b"\n", b",", b"{"])
        inserted = draw(special | st.binary(max_size=4))
        end = start + draw(st.integers(0, 8))
        content = content[:start] + inserted + content[end:]
    return content


@st.composite
def files(draw):
    "Draw a file extension and the content of the file."
    end = draw(st.sampled_from(list(FORMATS))) + draw(st.sampled_from(("", "") + COMPRESSIONS))
    write = {"csv": as_csv, "json": as_json, "parquet": as_parquet}[
        draw(st.sampled_from([FORMATS["." + end.split(".")[1]]] * 60 + list(FORMATS.values())))
    ]
    content = draw(st.binary(max_size=60)) if draw(one_in(12)) else write(draw, *draw(tables()))
    if draw(one_in(3)):
        content = broken(draw, content)
    if end.endswith(COMPRESSIONS) and not draw(one_in(12)):
        content = (
            gzip.compress(content, 1)
            if end.endswith(".gz")
            else pa.compress(content, "zstd", asbytes=True)
        )
    return end, broken(draw, content) if draw(one_in(12)) else content


mappings = (
    st.none()
    | st.none()
    | st.none()
    | st.dictionaries(
        st.sampled_from(list(LOG_COLUMN_ALIASES) + ["unknown"]),
        st.sampled_from(["user", "item", "", "1", "2", "3", "0", "text", "time"]),
        max_size=3,
    )
)


def check(end, content, columns, beside):
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        (folder / f"ratings{end}").write_bytes(content)
        if beside:
            (folder / f"items{beside[0]}").write_bytes(beside[1])
        try:
            loaded = load(folder if beside else folder / f"ratings{end}", columns)
        except UserError as e:
            return valid_message(str(e))
        assert [p.name for p in folder.iterdir() if p.name.startswith(".")] == []
    log, items, users = loaded
    assert {c: t for c, t in log.schema.items() if c in INTERACTION_SCHEMA} == INTERACTION_SCHEMA
    assert all(
        OPTIONAL_COLUMNS[c] == t for c, t in log.schema.items() if c not in INTERACTION_SCHEMA
    )
    assert loaded.report["rows_read"] == len(log) + sum(d["rows"] for d in loaded.report["dropped"])
    assert len(log) == loaded.report["kept"] > 0
    for ids, table in ((log["user"], users["user"]), (log["item"], items["item"])):
        assert ids.null_count() == 0
        assert ids.str.strip_chars().str.len_bytes().min() > 0
        assert not ids.str.contains("\ufffd", literal=True).any()
        assert table.is_unique().all() and ids.is_in(table.implode()).all()
    assert log["rating"].is_finite().all()
    assert not loaded.report["has_time"] or log["timestamp"].null_count() == 0


def valid_message(text):
    assert text.isprintable() and 10 < len(text) < 1200, text


inputs = dict(file=files(), columns=mappings, beside=st.none() | st.none() | st.none() | files())
quiet = dict(
    deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
)


@settings(max_examples=300, **quiet)
@given(**inputs)
def test_any_file(file, columns, beside):
    check(*file, columns, beside)


@pytest.mark.long
@settings(max_examples=10_000, **quiet)
@given(**inputs)
def test_ten_thousand_files(file, columns, beside):
    check(*file, columns, beside)
