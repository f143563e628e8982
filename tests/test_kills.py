"Tests that a killed run resumes, ends with the same results, and never has half-written files."

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import polars as pl
import pytest
from safetensors import safe_open

ROOT = Path(__file__).parents[1]
WORDS = ["--dataset", "demo?ratings=2000", "-p", "seeds=2", "-p", "epochs=4"]


def start(out, *more):
    command = [
        sys.executable,
        "-m",
        "widedeep_nb.lib.cli",
        "run",
        "--out",
        str(out),
        *WORDS,
        *map(str, more),
    ]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(process, seconds=900):
    said = process.communicate(timeout=seconds)
    assert process.returncode == 0, said


def read_all(out):
    "Read every visible file to its end; return their number."
    n = 0
    for path in [
        p
        for p in out.rglob("*")
        if p.is_file() and not any(part.startswith(".") for part in p.relative_to(out).parts)
    ]:
        if path.suffix in (".json", ".ipynb"):
            json.loads(path.read_text())
        if path.suffix == ".parquet":
            pl.read_parquet(path)
        if path.suffix == ".html":
            assert path.read_text().rstrip().endswith("</html>")
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as f:
                for name in f.keys():
                    f.get_tensor(name)
        n += 1
    return n


def wait_for_orphans(out):
    "Wait until processes of a killed run have ended."
    while subprocess.run(["pgrep", "-f", str(out)], capture_output=True).returncode == 0:
        time.sleep(0.05)


def results(out):
    "Return the content of all computed files, without timings."
    plain = {
        p.relative_to(out): p.read_bytes()
        for p in out.rglob("[!.]*")
        if p.suffix in (".parquet", ".safetensors")
    }
    return plain | {
        name: (out / name).read_bytes()
        for name in ("metrics.json", "ingest.json", "preprocessing.json")
        if (out / name).exists()
    }


def kill_until_done(out, words, kills, draw, patience):
    "Kill a run at random moments, with or without its kernel; return the chapters in which it was killed."
    where = []
    for i in range(100 * kills):
        whole = len(where) >= kills
        process = start(out, *words, *["--resume"] * (out / "run.json").exists())
        try:
            finish(process, 900 if whole else draw.uniform(0.5, patience))
            return where
        except subprocess.TimeoutExpired:
            pass
        chapters = (
            json.loads((out / "run.json").read_text())["chapters"]
            if (out / "run.json").exists()
            else {}
        )
        where.append(
            next((name for name, c in chapters.items() if c["status"] == "started"), "the log")
        )
        if draw.random() < 0.5:
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.communicate()
        assert not out.exists() or read_all(out) >= 0
        if draw.random() < 0.5:
            wait_for_orphans(out)  # else the next one meets the last one's orphans
    raise AssertionError("it never came to its end")


@pytest.mark.parametrize(
    "kills, words",
    [
        (3, ["--chapters", "05"]),
        pytest.param(60, ["--chapters", "01-13,22", "-p", "trials=1"], marks=pytest.mark.long),
    ],
    ids=["one chapter", "all"],
)
def test_killed_at_random_moments(tmp_path, kills, words):
    started = time.monotonic()
    finish(start(tmp_path / "undisturbed", *words))
    patience = (time.monotonic() - started) / 3  # of this machine, as busy as it is
    expected, where, draw = results(tmp_path / "undisturbed"), [], random.Random(kills)
    while len(where) < kills:
        out = tmp_path / f"after-{len(where)}"
        where += kill_until_done(out, words, kills - len(where), draw, patience)
        found = results(out)
        assert (
            sorted(map(str, found)) == sorted(map(str, expected))
            and [name for name in found if found[name] != expected[name]] == []
        )
        assert not [p for p in out.rglob(".*") if p.name not in (".lock", ".run.lock")]
    print({name: where.count(name) for name in sorted(set(where))})
    assert len(where) >= kills and (kills < 50 or len(set(where)) >= 7)
