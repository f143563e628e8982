"Files of every kind are read rightly: delimiters, quotes, headers, encodings, ragged rows, JSON."

import gzip
import json

import polars as pl
import pytest

from widedeep_nb.lib.core import UserError
from widedeep_nb.lib.readers import open_table, resolve_columns, translate_read_errors
from widedeep_nb.lib.reading import ReadOptions

N = 40
ROWS = [(f"u{n % 9}", f"i{n % 11}", str(n % 5 + 1), str(1400000000 + n * 3600)) for n in range(N)]
NAMES = ["user", "item", "rating", "timestamp"]


def write(path, content, encoding="utf-8"):
    "Write a file of text or bytes."
    path.write_bytes(content if isinstance(content, bytes) else content.encode(encoding))
    return path


def lines(delimiter=",", header=NAMES, rows=ROWS, end="\n"):
    "Write rows with a delimiter, after a header if there is one."
    table = [*([header] if header else []), *rows]
    return "".join(delimiter.join(row) + end for row in table)


def read(path, has_header=None, **options):
    "Read all rows of a file: reader, rows of user, item, rating and timestamp as far as there are."
    reader = open_table(path, has_header, ReadOptions(**options))
    names = resolve_columns(reader.columns, options.get("columns", {}))
    wanted = [names[c] for c in NAMES if c in names]
    return reader, pl.concat(reader.iter_frames(wanted)).rows()


def read_table(path, *columns):
    "Read columns of a table of items or users."
    reader = open_table(path, has_header=True)
    return reader, pl.concat(reader.iter_frames(list(columns))).rows()


# Delimiters, quotes and lines before the table


@pytest.mark.parametrize("header", [NAMES, None], ids=["header", "no header"])
@pytest.mark.parametrize("delimiter", [",", "\t", ";", "|", "::", " ", "  ", "\x01", "^"])
def test_delimiters(tmp_path, delimiter, header):
    path = write(tmp_path / "log.txt", lines(delimiter, header))
    reader, rows = read(path)
    assert rows == ROWS
    assert reader.reading.has_header == bool(header)
    assert reader.reading.delimiter == (
        " " if delimiter.isspace() and delimiter != "\t" else delimiter
    )
    assert reader.reading.file_format == "CSV" and not reader.rejected


def test_blanks_and_a_tab(tmp_path):
    rows = [(str(n % 9), str(n % 11), str(n % 4 + 1), str(n % 97)) for n in range(N)]
    path = write(tmp_path / "log.txt", "".join(f"{u} {i} {r}\t{t}\n" for u, i, r, t in rows))
    reader, read_rows = read(path)
    assert [row[:3] for row in read_rows] == [row[:3] for row in rows]


def test_blanks_across_blocks(tmp_path):
    rows = [(f"user{n}", f"item{n % 77}", "4") for n in range(150_000)]
    path = write(tmp_path / "log.txt", lines("   ", None, rows))
    assert path.stat().st_size > 3 << 20
    assert read(path)[1] == rows


@pytest.mark.parametrize("delimiter, name", [(";", ";"), ("~", "~"), ("#", "#")])
def test_a_given_delimiter(tmp_path, delimiter, name):
    path = write(tmp_path / "log.csv", lines(delimiter))
    assert read(path, delimiter=name)[1] == ROWS


@pytest.mark.parametrize("delimiter", ["~", "#", "/", "§"])
def test_an_unknown_delimiter_is_named(tmp_path, delimiter):
    path = write(tmp_path / "log.csv", lines(delimiter))
    with pytest.raises(UserError, match=f"each line is a single field.*delimiter={delimiter}"):
        read(path)
    assert read(path, delimiter=delimiter)[1] == ROWS


@pytest.mark.parametrize("delimiter", [",", "\t", ";"])
def test_a_backslash_before_a_quote(tmp_path, delimiter):
    rows = [(u, i, r, f'"a \\"good\\"{delimiter} \\"big\\" one"') for u, i, r, _ in ROWS]
    header = [*NAMES[:3], "review"]
    reader, read_rows = read(write(tmp_path / "log.csv", lines(delimiter, header, rows)))
    assert read_rows == [row[:3] for row in rows] and not reader.rejected
    reviews = set(pl.concat(reader.iter_frames(["review"]))["review"])
    assert reviews == {f'a "good"{delimiter} "big" one'}


def test_a_backslash_at_the_end_of_a_field_is_text(tmp_path):
    rows = [(u, i, r, '"C:\\"') for u, i, r, _ in ROWS]
    reader, read_rows = read(write(tmp_path / "log.csv", lines(",", [*NAMES[:3], "path"], rows)))
    assert read_rows == [row[:3] for row in rows]
    assert set(pl.concat(reader.iter_frames(["path"]))["path"]) == {"C:\\"}


@pytest.mark.parametrize("delimiter", [",", "\t", "|"])
def test_single_quotes_around_fields(tmp_path, delimiter):
    rows = [(f"'{u}'", f"'{i}{delimiter}x'", r) for u, i, r, _ in ROWS]
    _, read_rows = read(write(tmp_path / "log.csv", lines(delimiter, NAMES[:3], rows)))
    assert read_rows == [(u, f"{i}{delimiter}x", r) for u, i, r, _ in ROWS]


def test_apostrophes_are_no_quotes(tmp_path):
    rows = [(u, "'s Hertogenbosch" if n == 3 else i, r) for n, (u, i, r, _) in enumerate(ROWS)]
    assert read(write(tmp_path / "log.csv", lines(",", NAMES[:3], rows)))[1] == rows


def test_quotes_around_whole_lines_are_named(tmp_path):
    text = lines(rows=[]) + "".join(f'"{",".join(row)}"\n' for row in ROWS)
    with pytest.raises(UserError, match="each line is in quotes as a whole"):
        read(write(tmp_path / "log.csv", text))


def test_comments_between_the_rows(tmp_path):
    text = lines(rows=ROWS[:9]) + "# page 2\n" + lines(header=None, rows=ROWS[9:]) + "# end\n"
    reader, rows = read(write(tmp_path / "log.csv", text))
    assert sorted(rows) == sorted(ROWS) and not reader.rejected
    assert any("2 comments between the rows, such as '# page 2'" in n for n in reader.notes)


def test_a_field_with_a_delimiter_and_no_quotes_is_named(tmp_path):
    text = lines(",", [*NAMES[:3], "date"], [(*row[:3], "Fri, 03 Jan 2014") for row in ROWS])
    with pytest.raises(UserError, match="quotes around a field that holds ','.*-p delimiter="):
        read(write(tmp_path / "log.csv", text))


def test_decimal_commas_do_not_separate(tmp_path):
    rows = [(u, i, "4,5", t) for u, i, _, t in ROWS]
    for header in (NAMES, None):
        assert read(write(tmp_path / "log.csv", lines(";", header, rows)))[1] == rows
    rows = [(u, i, "4,5") for u, i, *_ in ROWS]
    assert read(write(tmp_path / "log.csv", lines(";", None, rows)))[1] == rows
    assert read(write(tmp_path / "log.csv", lines(" ", None, rows)))[1] == rows


def test_stray_quotes_between_tabs(tmp_path):
    titles = ['"Heroes' if n in (4, 11) else '5" disk' if n == 7 else f"T {n}" for n in range(N)]
    rows = [(u, i, title, r) for (u, i, r, _), title in zip(ROWS, titles)]
    path = write(tmp_path / "log.tsv", lines("\t", ["user", "item", "title", "rating"], rows))
    reader, read_rows = read(path)
    assert read_rows == [row[:2] + row[3:] for row in rows]
    assert [*pl.concat(reader.iter_frames(["title"]))["title"]] == titles
    assert any("quotes do not enclose" in note for note in reader.notes)


def test_two_stray_quotes_do_not_swallow_rows(tmp_path):
    rows = [(u, '"' * (n in (4, 11)) + i, r) for n, (u, i, r, _) in enumerate(ROWS)]
    _, read_rows = read(write(tmp_path / "log.csv", lines(",", NAMES[:3], rows)))
    assert read_rows == rows


@pytest.mark.parametrize("delimiter", [",", "\t", ";"])
def test_quoted_fields_keep_delimiters_and_line_ends(tmp_path, delimiter):
    text = f'a{delimiter} ""b""\nc'
    rows = [(u, i, r, f'"{text}"') for u, i, r, _ in ROWS]
    header = ["user", "item", "rating", "review"]
    reader, read_rows = read(write(tmp_path / "log.csv", lines(delimiter, header, rows)))
    assert read_rows == [row[:3] for row in rows] and not reader.rejected
    assert set(pl.concat(reader.iter_frames(["review"]))["review"]) == {text.replace('""', '"')}


def test_all_fields_quoted(tmp_path):
    rows = [tuple(f'"{value}"' for value in row[:3]) for row in ROWS]
    path = write(tmp_path / "log.csv", lines(";", ['"User-ID"', '"ISBN"', '"Book-Rating"'], rows))
    reader, read_rows = read(path, columns={"item": "ISBN"})
    assert read_rows == [row[:3] for row in ROWS]


@pytest.mark.parametrize(
    "before, skipped",
    [
        ("# exported 2024-01-01\n", ["# exported 2024-01-01"]),
        (
            "# exported, by a tool, in 2024\n\n# again\n",
            ["# exported, by a tool, in 2024", "# again"],
        ),
        ("Sales of May\n\n", ["Sales of May"]),
        ("\n\n", []),
        ("% bip weighted\n", ["% bip weighted"]),
    ],
)
@pytest.mark.parametrize("header", [NAMES, None], ids=["header", "no header"])
def test_lines_before_the_table(tmp_path, before, skipped, header):
    reader, rows = read(write(tmp_path / "log.csv", before + lines(",", header)))
    assert rows == ROWS and reader.reading.skipped_lines == skipped


@pytest.mark.parametrize("first", ["sep=;", '"sep=;"', "SEP=;"])
def test_excels_first_line(tmp_path, first):
    rows = [(u, i, "4,5", t) for u, i, _, t in ROWS]
    reader, read_rows = read(write(tmp_path / "log.csv", first + "\n" + lines(";", NAMES, rows)))
    assert read_rows == rows and reader.reading.skipped_lines == [first]


def test_a_header_in_a_comment(tmp_path):
    reader, rows = read(write(tmp_path / "log.txt", "# item user rating\n" + lines(" ", None)[0:]))
    assert len(rows) == N
    path = write(tmp_path / "log.txt", "# item user rating timestamp\n" + lines(" ", None))
    reader, rows = read(path)
    assert rows == [(i, u, r, t) for u, i, r, t in ROWS] and reader.reading.has_header


def test_text_with_delimiters_and_no_header(tmp_path):
    rows = [(u, f"A, B, C, D, E {i}", r) for u, i, r, _ in ROWS]
    reader, read_rows = read(write(tmp_path / "log.txt", lines("\t", None, rows)))
    assert read_rows == rows and reader.reading.delimiter == "\t"


def test_lists_of_items_are_refused(tmp_path):
    text = "".join(f"{u} " + " ".join(map(str, range(u + 2))) + "\n" for u in range(20))
    with pytest.raises(UserError, match="one event a line"):
        open_table(write(tmp_path / "train.txt", text))


# Line ends and repeated headers


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_line_ends(tmp_path, end):
    assert read(write(tmp_path / "log.csv", lines(end=end)))[1] == ROWS
    assert read(write(tmp_path / "log.csv", lines(end=end).rstrip()))[1] == ROWS


def test_mixed_line_ends_and_empty_lines(tmp_path):
    rows = [",".join(row) + ("\r\n", "\n", "\n\n", "\n\r\n")[n % 4] for n, row in enumerate(ROWS)]
    reader, read_rows = read(write(tmp_path / "log.csv", lines(rows=[]) + "".join(rows)))
    assert read_rows == ROWS and not reader.rejected


@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_a_repeated_header_is_no_row(tmp_path, mark):
    text = lines(header=["user", "item"], rows=[row[:2] for row in ROWS])
    reader, rows = read(write(tmp_path / "log.csv", text + mark + text))
    assert rows == [row[:2] for row in ROWS] * 2
    assert reader.rejected == {"repeated header line": 1}
    assert reader.reading.examples == {"repeated header line": "user,item"}


# Headers


@pytest.mark.parametrize(
    "rows, names",
    [
        ([("u0", "i0", "2014-01-03T08:26:00")], ["user", "item", "timestamp"]),
        ([("u0", "i0", "03.01.2014")], ["user", "item", "timestamp"]),
        ([("u0", "i0", "3/1/2014 08:26")], ["user", "item", "timestamp"]),
        ([("u0", "i0", "4", "2014-01-03", "08:26:00")], ["user", "item", "rating", "date", "time"]),
        ([("u0", "i0", "1400000000", "4")], ["user", "item", "timestamp", "rating"]),
        ([("u0", "i0", "pv", "1400000000")], ["user", "item", "event", "timestamp"]),
        (
            [("1000", "5000", "700000", "pv", "1400000000")],
            ["user", "item", "column 3", "event", "timestamp"],
        ),
        ([("u0", "i0", "good", "4")], ["user", "item", "column 3", "rating"]),
    ],
)
def test_columns_without_a_header(tmp_path, rows, names):
    reader = open_table(write(tmp_path / "log.csv", lines(",", None, rows * N)))
    assert reader.columns == names and reader.reading.has_header is False
    assert reader.columns == names and reader.reading.has_header is False
    assert sum(map(len, reader.iter_frames(["user"]))) == N


@pytest.mark.parametrize(
    "header",
    [
        ("user1", "item2", "rating3", "time4"),
        ("V1", "V2", "V3", "V4"),
        ("Kunde", "Artikel", "Note", "Zeit"),
        ("用户ID", "商品ID", "评分", "时间"),
    ],
)
def test_headers_with_other_words(tmp_path, header):
    reader = open_table(write(tmp_path / "log.csv", lines(",", header)))
    assert reader.columns == list(header) and reader.reading.has_header
    assert pl.concat(reader.iter_frames(list(header))).rows() == ROWS


def test_ids_that_look_like_names_are_data(tmp_path):
    rows = [(f"user{n % 9 + 1}", f"item{n % 11 + 1}") for n in range(N)]
    reader, read_rows = read(write(tmp_path / "log.csv", lines(",", None, rows)))
    assert read_rows == rows and reader.reading.has_header is False


def test_a_header_alone_or_a_single_column(tmp_path):
    reader, rows = read(write(tmp_path / "log.csv", ",".join(NAMES)))
    assert rows == [] and reader.columns == NAMES
    reader = open_table(write(tmp_path / "log.csv", "user\nu1\nu2\n"))
    assert reader.columns == ["user"]


def test_columns_of_the_same_name_are_said(tmp_path):
    path = write(tmp_path / "log.csv", lines(header=["user", "item", "item", "timestamp"]))
    reader = open_table(path)
    assert any("2 columns 'item'; the first is used" in note for note in reader.notes)
    assert any("-p columns=item=3" in note for note in reader.notes)
    assert pl.concat(reader.iter_frames(["item"]))["item"].to_list() == [row[1] for row in ROWS]


def test_row_numbers_without_a_name(tmp_path):
    numbered = [(str(n + 1), *row) for n, row in enumerate(ROWS)]
    for header in (NAMES, ["", *NAMES]):  # as R and as pandas write them
        assert read(write(tmp_path / "log.csv", lines(",", header, numbered)))[1] == ROWS


# Ragged rows


def test_a_row_that_does_not_fit_is_counted_with_its_text(tmp_path):
    rows = [*ROWS, ("u1", "x", "5"), ("u1", "y", "5", "1400000000", "more", "z" * 200)]
    reader, read_rows = read(write(tmp_path / "log.csv", lines(rows=rows)))
    assert read_rows == ROWS and reader.rejected == {"wrong number of fields": 2}
    assert reader.reading.examples == {"wrong number of fields": "u1,x,5"}
    assert sum(map(len, reader.iter_frames(["user"]))) == N  # counted anew
    assert reader.rejected == {"wrong number of fields": 2}


def test_examples_are_short(tmp_path):
    rows = [*ROWS, ("u1", "y", "5", "1400000000", "z" * 200)]
    reader, _ = read(write(tmp_path / "log.csv", lines(rows=rows)))
    assert len(reader.reading.examples["wrong number of fields"]) == 100


@pytest.mark.parametrize("end", [",", ",,", ", "])
@pytest.mark.parametrize("step", [1, 4])
@pytest.mark.parametrize("header", [NAMES, None], ids=["header", "no header"])
def test_a_delimiter_at_the_end_of_rows(tmp_path, end, step, header):
    rows = [",".join(row) + end * (n % step == 0) for n, row in enumerate(ROWS)]
    text = lines(header=header, rows=[]) + "\n".join(rows) + "\n"
    reader, read_rows = read(write(tmp_path / "log.csv", text))
    assert sorted(read_rows) == sorted(ROWS) and not reader.rejected


def test_tables_whose_rows_end_with_a_tab(tmp_path):
    header = ["item_id", "title", "year", "author"]
    rows = [(f"{n}", f"Book {n}", "1999", "Ann", "") for n in range(N)]
    reader, read_rows = read_table(
        write(tmp_path / "items.dat", lines("\t", header, rows)), *header
    )
    assert read_rows == [row[:4] for row in rows]
    assert reader.columns == header and not reader.rejected


def test_what_can_be_read_of_a_table_is_read(tmp_path):
    text = "item,title,price\ni0,Fan,1.5,\ni1,Mat,2\ni2,Pen\ni3,Cup,3,,\ni4,a,b,4\ni5\ni6,Box,5\n"
    reader, rows = read_table(write(tmp_path / "items.csv", text), "item", "title", "price")
    assert sorted(rows) == [
        ("i0", "Fan", "1.5"),
        ("i1", "Mat", "2"),
        ("i2", "Pen", None),
        ("i3", "Cup", "3"),
        ("i6", "Box", "5"),
    ]
    assert reader.rejected == {"wrong number of fields": 2}
    assert reader.reading.examples == {"wrong number of fields": "i4,a,b,4"}
    assert any("1 rows have fewer fields" in note for note in reader.notes)


def test_a_header_with_too_few_names_is_refused(tmp_path):
    with pytest.raises(UserError, match="the header has 2 names, and a row has 3 fields"):
        open_table(write(tmp_path / "log.csv", "user,item\n1,2,3\n4,5,6\n"))


# Encodings


@pytest.mark.parametrize(
    "encoding, name, text",
    [
        ("utf-8", "UTF-8", "é"),
        ("utf-8-sig", "UTF-8", "é"),
        ("latin-1", "Windows-1252", "é"),
        ("latin-1", "Windows-1252", "Küche für Anfänger"),
        ("cp1252", "Windows-1252", "Café “Größe” 5 €"),
        ("cp1251", "Windows-1251", "Чайник"),
        ("gb18030", "GB18030", "手机电池充电器"),
        ("cp932", "CP932", "カメラ用の電池"),
        ("utf-16", "UTF-16", "é"),
        ("utf-16-le", "UTF-16-LE", "é"),
        ("utf-16-be", "UTF-16-BE", "é"),
        ("utf-32", "UTF-32", "é"),
    ],
)
@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_encodings(tmp_path, encoding, name, text, kind):
    rows = [(u + text * (n % 3 == 0), i, r, t) for n, (u, i, r, t) in enumerate(ROWS)]
    content = lines(rows=rows)
    if kind == "jsonl":
        content = "".join(
            json.dumps(dict(zip(NAMES, row)), ensure_ascii=False) + "\n" for row in rows
        )
    reader, read_rows = read(write(tmp_path / f"log.{kind}", content, encoding))
    assert read_rows == rows and reader.reading.encoding == name
    assert any(name in note for note in reader.notes) == (not encoding.startswith("utf"))


def test_latin1_far_into_a_file(tmp_path):
    rows = ROWS * 2000 + [("é", "i1", "4", "1400000000")]
    path = write(tmp_path / "log.csv", lines(rows=rows), "latin-1")
    assert path.stat().st_size > 1 << 20
    assert read(path)[1][-1][0] == "é"
    packed = write(tmp_path / "log.csv.gz", gzip.compress(path.read_bytes()))
    assert read(packed)[1][-1][0] == "é"


def test_a_broken_byte_in_utf8_stays_one(tmp_path):
    content = lines(rows=[("é" + u, i, r, t) for u, i, r, t in ROWS]).encode()
    reader, rows = read(write(tmp_path / "log.csv", content.replace("éu3".encode(), b"\xe9u3", 1)))
    assert reader.reading.encoding == "UTF-8"
    assert [row[0] for row in rows if "\ufffd" in row[0]] == ["\ufffdu3"]
    content = lines().encode().replace(b"u3", b"\xff3", 1)
    assert read(write(tmp_path / "log.csv", content))[1][3][0] == "\ufffd3"


def test_nul_characters_are_left_out(tmp_path):
    content = lines().replace("u3", "u\x003", 1) + "\0" * 50
    reader, rows = read(write(tmp_path / "log.csv", content))
    assert rows[:N] == ROWS and any("51 NUL characters" in note for note in reader.notes)


# Other formats, whatever the name says


@pytest.mark.parametrize(
    "start, message",
    [
        (b"PK\x03\x04" + bytes(99), "ZIP archive or an Excel workbook"),
        (b"\xd0\xcf\x11\xe0\xa1\xb1" + bytes(99), "Excel workbook"),
        (b"\n<!DOCTYPE html><html><body>404, not found</body></html>", "HTML"),
        (b"SQLite format 3\0" + bytes(99), "SQLite"),
        (b"%PDF-1.7\n", "PDF"),
        (b"\x89PNG\r\n\x1a\n" + bytes(99), "picture"),
        (bytes(range(256)) * 9, "no text"),
        (b"", "empty"),
        (b"\n \n", "empty"),
    ],
)
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gz"])
def test_what_is_no_table_is_named(tmp_path, start, message, packed):
    content = gzip.compress(start) if packed else start
    with pytest.raises(UserError, match=message) as e:
        open_table(write(tmp_path / "log.csv", content))
    assert "\n" not in str(e.value) and "log.csv" in str(e.value)


def test_compression_is_seen_in_the_file(tmp_path):
    plain = lines().encode()
    for name, content in (
        ("log.csv.gz", plain),
        ("log.csv", gzip.compress(plain)),
        ("log.csv.gz", gzip.compress(gzip.compress(plain))),
        ("log.csv.gz", gzip.compress(plain[:500]) + gzip.compress(plain[500:])),
    ):
        assert read(write(tmp_path / name, content))[1] == ROWS


def test_json_and_parquet_under_the_name_of_csv(tmp_path):
    frame = pl.DataFrame(ROWS, schema=NAMES, orient="row")
    frame.write_parquet(tmp_path / "parquet.csv")
    frame.write_ndjson(tmp_path / "json.csv")
    for name, file_format in (("parquet.csv", "Parquet"), ("json.csv", "JSON")):
        reader, rows = read(tmp_path / name)
        assert rows == ROWS and reader.reading.file_format == file_format
        assert any("whatever its name says" in note for note in reader.notes)


def test_a_very_long_line_is_refused(tmp_path):
    rows = [*ROWS, ("u", "i" * 3_000_000, "4", "1400000000"), *ROWS]
    path = write(tmp_path / "log.csv", lines(rows=rows))
    with pytest.raises(UserError, match="a row is very long"), translate_read_errors(path):
        read(path)


# JSON


def records(step=3, **extra):
    "Return the rows as objects; every few have further fields."
    rows = [dict(zip(NAMES, (u, i, int(r), int(t)))) for u, i, r, t in ROWS]
    return [row | (extra if n % step == 0 else {}) for n, row in enumerate(rows)]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("form", ["lines", "list", "indented", "objects"])
def test_numbers_that_json_has_not(tmp_path, value, form):
    rows = records(price=value)
    text = {
        "lines": "\n".join(map(json.dumps, rows)),
        "list": json.dumps(rows),
        "indented": json.dumps(rows, indent=2),
        "objects": "\n".join(json.dumps(row, indent=1) for row in rows),
    }[form]
    path = write(tmp_path / "log.json", text)
    reader, read_rows = read(path)
    assert read_rows == ROWS and not reader.rejected
    assert pl.concat(reader.iter_frames(["price"]))["price"].null_count() == N


def test_a_malformed_line_costs_only_itself_and_is_shown(tmp_path):
    texts = list(map(json.dumps, records()))
    texts[7] = '{"user": "u7", "item":'
    texts[9] = '"a text"'
    reader, rows = read(write(tmp_path / "log.jsonl", "\n".join(texts)))
    assert len(rows) == N - 2 and reader.rejected == {"malformed line": 2}
    assert reader.reading.examples == {"malformed line": texts[7]}


def test_values_of_json_become_text(tmp_path):
    values = {"a": 12.0, "b": True, "c": False, "d": "12.0", "e": 10**25, "f": None, "g": ["x", 1]}
    path = write(tmp_path / "log.jsonl", json.dumps({"user": "u", "item": "i"} | values))
    reader = open_table(path)
    row = pl.concat(reader.iter_frames([*"abcdefg"])).row(0)
    assert row[:6] == ("12", "1", "0", "12.0", str(10**25), None) and json.loads(row[6]) == ["x", 1]


def test_keys_of_any_text(tmp_path):
    keys = ["a.b", "it's", "a/b", "~x", 'say "x"', "0", "$.user"]
    path = write(tmp_path / "log.jsonl", json.dumps(dict(zip(keys, "1234567"))))
    assert pl.concat(open_table(path).iter_frames(keys)).rows() == [tuple("1234567")]


@pytest.mark.parametrize("orient", ["columns", "index", "records", "split", "lists", "wrapped"])
def test_a_table_in_one_object(tmp_path, orient):
    rows = records()
    value = {
        "columns": {c: {str(n): row[c] for n, row in enumerate(rows)} for c in NAMES},
        "index": {str(n): row for n, row in enumerate(rows)},
        "records": rows,
        "split": {"columns": NAMES, "index": [*range(N)], "data": [[*r.values()] for r in rows]},
        "lists": {c: [row[c] for row in rows] for c in NAMES},
        "wrapped": {"status": "ok", "data": rows},
    }[orient]
    reader, read_rows = read(write(tmp_path / "log.json", json.dumps(value)))
    assert read_rows == ROWS
    assert any("one JSON object" in note for note in reader.notes) == (orient != "records")


def test_nested_ids(tmp_path):
    rows = [
        row | {"user": {"name": "x", "id": row["user"]}, "item": {"_id": row["item"], "price": 3}}
        for row in records()
    ]
    reader, read_rows = read(write(tmp_path / "log.jsonl", "\n".join(map(json.dumps, rows))))
    assert read_rows == ROWS
    assert "'user' holds objects; their 'id' was read" in reader.notes


def test_nested_objects_without_an_id(tmp_path):
    rows = [row | {"user": {"nick": row["user"], "city": "x"}} for row in records()]
    path = write(tmp_path / "log.jsonl", "\n".join(map(json.dumps, rows)))
    with pytest.raises(UserError, match="user.nick"):
        read(path)
    assert read(path, columns={"user": "user.nick"})[1] == ROWS


def test_a_list_that_is_cut_off_is_refused(tmp_path):
    with pytest.raises(UserError, match="malformed JSON in object 41"):
        read(write(tmp_path / "log.json", json.dumps(records())[:-3]))


RECORDS = [dict(zip(NAMES, (u, i, int(r), int(t)))) for u, i, r, t in ROWS]


@pytest.mark.parametrize(
    "text",
    [
        json.dumps({"response": {"items": RECORDS}}),
        "".join(json.dumps(r) + ",\n" for r in RECORDS),
        "".join(
            json.dumps(r | {"rating": {"$numberInt": str(r["rating"])}}) + "\n" for r in RECORDS
        ),
    ],
    ids=["nested list", "a comma after each line", "numbers of MongoDB"],
)
def test_further_forms_of_json(tmp_path, text):
    assert read(write(tmp_path / "log.json", text))[1] == ROWS


def test_a_comma_after_the_last_object_is_named(tmp_path):
    text = "[" + "".join(json.dumps(r) + ",\n" for r in RECORDS) + "]"
    with pytest.raises(UserError, match="without a comma after the last object"):
        read(write(tmp_path / "log.json", text))


@pytest.mark.parametrize(
    "content, message",
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12\n", "Git LFS"),
        (b"INSERT INTO log (user,item) VALUES\n('u1','i1');\n", "dump of a database"),
    ],
)
def test_files_that_only_name_a_log(tmp_path, content, message):
    with pytest.raises(UserError, match=message):
        read(write(tmp_path / "log.csv", content))


def test_western_signs_alone_are_windows_1252(tmp_path):
    rows = [(u, f"\u20ac\u2019{i}", r) for u, i, r, _ in ROWS]
    path = write(tmp_path / "log.csv", lines(";", NAMES[:3], rows), "cp1252")
    assert read(path)[1] == rows
