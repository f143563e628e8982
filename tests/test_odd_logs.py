"Check that small and odd logs go through all chapters, and that figures without data say so."

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from conftest import QUICK

from widedeep_nb.data import load
from widedeep_nb.lib import display
from widedeep_nb.lib.log_plots import show_growth, show_rating_counts
from widedeep_nb.lib.notebooks import read_in_short
from widedeep_nb.lib.split_report import tie_summary
from widedeep_nb.preprocessing import prepare

ROOT = Path(__file__).parents[1]
HOUR, DAY, START = 3600, 86_400, 1_600_000_000
STARS = (1, 2, 3, 4, 5)


def make_log(n_users=90, n_items=60, ratings=STARS, times="hours", events=None, shared=False):
    "Draw ten different items for each user, few of them popular; with `shared` all have one item."
    rng = np.random.default_rng(0)
    popularity = 1 / np.arange(1, n_items + 1)
    items = (rng.exponential(size=(n_users, n_items)) / popularity).argsort(axis=1)[:, :10]
    if shared:
        items[:, 0] = 0
    n = items.size
    columns = {"user": np.repeat(np.arange(n_users), 10), "item": items.ravel()}
    if ratings:
        columns["rating"] = rng.choice(ratings, n)
    if times == "hours":
        columns["timestamp"] = START + rng.permutation(n) * HOUR
    if times == "two dates":
        columns["timestamp"] = rng.choice([START, START + 40 * DAY], n)
    if events:
        columns["event"] = rng.choice(events, n)
    ids = [pl.format("{}{}", pl.lit(c[0]), c).alias(c) for c in ("user", "item")]
    return pl.DataFrame(columns).with_columns(ids).unique(["user", "item"], maintain_order=True)


ODD_LOGS = {
    "twelve users": dict(n_users=12, n_items=30),
    "one rating": dict(ratings=[5]),
    "hundred": dict(ratings=range(101)),
    "zero to two": dict(ratings=[0, 1, 2]),
    "two dates": dict(times="two dates"),
    "no time": dict(times=None),
    "one item for all": dict(shared=True),
    "events only": dict(ratings=None, events=["view", "purchase", "purchase"]),
}


@pytest.fixture
def odd_log(request, tmp_path):
    path = tmp_path / "log.csv"
    make_log(**ODD_LOGS[request.param]).write_csv(path)
    return path


@pytest.mark.parametrize("odd_log", ODD_LOGS, indirect=True)
def test_odd_logs_are_read_and_split(odd_log):
    "Check that no log is refused, and that every part has rows."
    log = load(odd_log).interactions
    for protocol in ("strict", "leave-one-out"):
        split = prepare(log, protocol)
        assert len(split.train) and len(split.val) and len(split.test)
        ties = tie_summary(split)
        assert (ties is None) == (log["timestamp"].n_unique() < 2)


def test_a_figure_without_data_says_so_in_its_place(monkeypatch):
    "Check that the place keeps the label of the figure, and gives the reason as caption."
    outputs = []
    monkeypatch.setattr(display, "display", lambda data, **options: outputs.append((data, options)))
    times = pl.lit(None, pl.Datetime("ms")).alias("timestamp")
    log = make_log(ratings=None).with_columns(times, rating=pl.lit(None, pl.Float32))
    display.show_missing("fig-x", "Nothing was sold, so 0% < 1% is drawn.")
    show_rating_counts(log)
    show_growth(None, None, {}, "events")
    labels = [options["metadata"]["widedeep"]["label"] for _, options in outputs]
    assert labels == ["fig-x", "fig-stars", "fig-growth"]
    for (data, options), label in zip(outputs, labels):
        about, page = options["metadata"]["widedeep"], data["text/html"]
        assert f'<figure id="{label}"' in page and "<figcaption>" in page and "<svg" not in page
        assert len(about["alt"]) > 20 and about["caption"] == about["alt"]
    assert "0\N{NO-BREAK SPACE}% &lt; 1" in outputs[0][0]["text/html"]


@pytest.mark.long
@pytest.mark.parametrize("odd_log", ODD_LOGS, indirect=True)
def test_odd_logs_go_through_all_chapters(odd_log, tmp_path):
    "Check that the report of each log is written, without a number that is none."
    widedeep = Path(sys.executable).with_name("widedeep")
    command = [widedeep, "run", "--out", tmp_path / "run", "--dataset", odd_log, *QUICK]
    environment = os.environ | {"COLUMNS": "200"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr + done.stdout
    notebooks = sorted((tmp_path / "run" / "notebooks").glob("[0-9][0-9]_*.ipynb"))
    assert len(notebooks) > 20
    for path in notebooks:
        cells = json.loads(path.read_text())["cells"]
        text, figure = read_in_short(cells)
        assert figure.startswith("fig-") or not text, path.stem
        outputs = [o for cell in cells for o in cell.get("outputs", [])]
        sentences = [text]
        for output in outputs:
            sentences.append("".join(output.get("data", {}).get("text/markdown", "")))
            sentences.append(output.get("metadata", {}).get("widedeep", {}).get("caption", ""))
        for sentence in sentences:
            assert not re.search(r"\b(nan|None(?! of)|inf)\b", sentence), (path.stem, sentence)
