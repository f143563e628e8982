"Check that bad input gives one line of error, exit code 2, and no partial files."

import json
import os
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest

from widedeep_nb.lib.cli import main
from widedeep_nb.lib.core import UserError
from widedeep_nb.lib.reading_report import OVERRIDE_HINT
from widedeep_nb.lib.recommender import make_recommender
from widedeep_nb.lib.runs import Run
from widedeep_nb.preprocessing import preprocess

ROOT = Path(__file__).parents[1]
VALID = pl.DataFrame(
    {
        "user": [f"u{i % 40}" for i in range(400)],
        "item": [f"i{(i * i) % 31}" for i in range(400)],
        "rating": [1.0 + i % 5 for i in range(400)],
        "timestamp": [1_300_000_000 + 1000 * i for i in range(400)],
    }
).unique(["user", "item"], maintain_order=True)


def widedeep(*words):
    "Run a command; return its exit code."
    try:
        main([str(w) for w in words])
    except SystemExit as stopped:
        return stopped.code
    return 0


def csv(frame):
    return frame.write_csv().encode()


def parquet(folder):
    VALID.write_parquet(folder / "valid.parquet")
    return (folder / "valid.parquet").read_bytes()


CASES = {
    "missing": ("nowhere.csv", lambda d: None, [], "nowhere.csv"),
    "empty": ("log.csv", lambda d: b"", [], "log.csv"),
    "header only": ("log.csv", lambda d: b"user,item,rating\n", [], "no rows"),
    "a picture": (
        "log.csv",
        lambda d: b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 20,
        [],
        "log.csv",
    ),
    "another kind": (
        "log.docx",
        lambda d: b"PK\x03\x04",
        [],
        "not a kind of file that can be read",
    ),
    "no item": (
        "log.csv",
        lambda d: csv(VALID.rename({"item": "colour"})),
        [],
        "no column for the item",
    ),
    "mostly bad": (
        "log.csv",
        lambda d: csv(VALID.with_columns(pl.lit("much").alias("rating"))),
        [],
        "rows",
    ),
    "one user": (
        "log.csv",
        lambda d: csv(
            VALID.with_columns(pl.lit("me").alias("user")).unique("item", maintain_order=True)
        ),
        [],
        "user",
    ),
    "a filter that leaves nothing": (
        "log.csv",
        lambda d: csv(VALID.head(60)),
        ["--protocol", "filtered-first"],
        "none of 60 rows",
    ),
    "no parts": ("log.csv", lambda d: csv(VALID), ["--protocol", "given"], "train.*"),
    "cut off Parquet": ("log.parquet", lambda d: parquet(d)[:-40], [], "log.parquet"),
    "Parquet of noise": (
        "log.parquet",
        lambda d: parquet(d)[:100] + os.urandom(4000) + parquet(d)[-300:],
        [],
        "log.parquet",
    ),
    "cut off gzip": (
        "log.csv.gz",
        lambda d: __import__("gzip").compress(csv(VALID))[:-200],
        [],
        "log.csv.gz",
    ),
    "noise in gzip's clothes": (
        "log.csv.gz",
        lambda d: b"\x1f\x8b\x08" + os.urandom(3000),
        [],
        "log.csv.gz",
    ),
    "a database": ("log.csv", lambda d: b"SQLite format 3\0" + bytes(4000), [], "log.csv"),
}


@pytest.mark.parametrize("name, content, words, message", CASES.values(), ids=CASES)
def test_refused_and_nothing_written(tmp_path, capfd, name, content, words, message):
    path = tmp_path / name
    data = content(tmp_path)
    if data is not None:
        path.write_bytes(data)
    assert widedeep("run", "--dataset", path, "--out", tmp_path / "out", *words) == 2
    output = capfd.readouterr()
    # a log that can be read, but not split, is described before it is refused
    lines = [line for line in output.out.splitlines() if line != OVERRIDE_HINT]
    assert [line for line in lines if not line.startswith("  ")] == []
    assert output.err.startswith("error: "), output.err
    assert output.err.count("\n") == 1, output.err
    assert message in output.err, output.err
    assert not (tmp_path / "out").exists()


@pytest.fixture
def finished(tmp_path):
    "Run with a log, one model and metrics."
    VALID.write_csv(tmp_path / "valid.csv")
    run = Run(tmp_path / "run", dataset=str(tmp_path / "valid.csv"))
    preprocess(run)
    make_recommender("popularity").fit(run.load_splits()[0].for_final_fit()).save(
        run.model_folder("popularity")
    )
    run.add_metrics(
        pl.DataFrame(
            [
                dict(
                    model="popularity",
                    task="ranking",
                    split="test",
                    users="all",
                    items="all",
                    relevant="any",
                    metric="NDCG@20",
                    value=0.5,
                    lo=0.4,
                    hi=0.6,
                    n=3,
                )
            ]
        )
    )
    return run


def everything(folder):
    "Read all visible files of a folder."
    return {
        p.relative_to(folder): p.read_bytes() for p in sorted(folder.rglob("[!.]*")) if p.is_file()
    }


@pytest.mark.parametrize("case", ["empty", "no item", "a filter that leaves nothing"])
def test_a_refused_log_leaves_a_finished_run_as_it_is(finished, tmp_path, capfd, case):
    before = everything(finished.folder)
    name, content, words, message = CASES[case]
    (tmp_path / name).write_bytes(content(tmp_path))
    assert widedeep("run", "--dataset", tmp_path / name, "--out", finished.folder, *words) == 2
    assert message in capfd.readouterr().err
    assert everything(finished.folder) == before
    assert not (finished.folder / ".new").exists()


def test_a_log_that_has_changed_is_read_again(finished, tmp_path):
    before = finished.manifest["steps"]["preprocess"]["fingerprint"]
    VALID.head(300).write_csv(tmp_path / "valid.csv")
    assert widedeep("run", "--out", finished.folder, "--chapters", "01", "--resume") == 0
    assert finished.manifest["steps"]["preprocess"]["fingerprint"] != before
    assert finished.read("ingest.json")["rows_read"] == 300
    kept = finished.manifest["steps"]["ingest"]
    assert widedeep("run", "--out", finished.folder, "--chapters", "01", "--resume") == 0
    assert finished.manifest["steps"]["ingest"] == kept


@pytest.mark.parametrize(
    "file, content, message",
    [
        ("run.json", b"{", "cannot be read"),
        ("run.json", b'{"format": 99}', "another version"),
        ("run.json", b"[]", "another version"),
        ("models/popularity/model.safetensors", b"noise", "weights"),
        ("models/popularity/model.json", b"[]", "no saved recommender"),
        ("models/popularity/model.json", b"{}", "no saved recommender"),
        ("metrics.json", b"[{", "cannot be read"),
        ("items.parquet", b"PAR1noise", "cannot be read"),
    ],
)
def test_a_broken_run_folder(finished, capfd, file, content, message):
    (finished.folder / file).write_bytes(content)
    assert widedeep("recommend", finished.folder, "--basket", "i1:5,i4") == 2
    output = capfd.readouterr()
    assert output.out == "", output.err
    assert output.err.startswith("error: "), output.err
    assert output.err.count("\n") == 1, output.err
    assert message in output.err, output.err


def test_a_run_folder_of_another_version_is_left_alone(finished, capfd):
    finished.write("run.json", finished.manifest | {"format": 99})
    before = everything(finished.folder)
    assert widedeep("run", "--dataset", "demo", "--out", finished.folder) == 2
    assert "another version" in capfd.readouterr().err and everything(finished.folder) == before


@pytest.fixture
def small_disk(tmp_path):
    "Folder on a file system of 300 kB."
    folder = tmp_path / "small"
    folder.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", folder], capture_output=True
    ).returncode:
        pytest.skip("no right to mount a small disk here")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk(small_disk, tmp_path, capfd):
    assert widedeep("run", "--dataset", "demo", "--out", small_disk / "run") == 2
    output = capfd.readouterr()
    assert output.err.startswith("error: "), output.err
    assert output.err.count("\n") == 1, output.err
    assert "No space left" in output.err, output.err
    assert os.listdir(small_disk) == []
    VALID.head(100).write_csv(tmp_path / "few.csv")
    assert (
        widedeep(
            "run",
            "--dataset",
            tmp_path / "few.csv",
            "--out",
            small_disk / "run",
            "--chapters",
            "01-02",
        )
        == 2
    )  # the log fits, its pictures do not
    assert "No space left" in capfd.readouterr().err
    assert not [
        p for p in (small_disk / "run").rglob(".*") if p.name not in (".lock", ".run.lock", ".new")
    ]
    for path in (small_disk / "run").rglob("*.json"):
        json.loads(path.read_text())


WRITERS = {
    "json": "run.write('a.json', ['long'] * 100_000)",
    "parquet": "run.write('a.parquet', pl.DataFrame({'a': np.random.rand(100_000)}))",
    "model": "make_recommender('popularity').fit(split).save(run.folder / 'a')",
}


@pytest.mark.parametrize("kind", WRITERS)
def test_every_writer_reports_a_full_disk(finished, kind):
    "Check with a limit on the size of files, which needs no rights."
    limit = 20 if kind == "model" else 5000
    code = (
        "import numpy as np, polars as pl, resource\n"
        "from widedeep_nb import Run, make_recommender\n"
        "from widedeep_nb.lib.core import UserError\n"
        f"run = Run({str(finished.folder)!r})\n"
        "split = run.load_splits()[0]\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n"
        f"try: {WRITERS[kind]}\n"
        "except UserError as e: print(e)"
    )
    before = everything(finished.folder)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, (done.stdout, done.stderr)
    assert "cannot be written (File too large)" in done.stdout, (done.stdout, done.stderr)
    assert done.stdout.count("\n") == 1, (done.stdout, done.stderr)
    assert everything(finished.folder) == before and not list(finished.folder.rglob(".a*"))


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be a run folder"):
        Run(tmp_path / "file" / "run")
