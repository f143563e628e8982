"""Chapter 11: item models are measured on validation, and its sentences follow the numbers."""

import re

import numpy as np
import polars as pl
import pytest

from widedeep_nb.evaluation import eval_ranking
from widedeep_nb.item_models import compare_item_models
from widedeep_nb.lib.item_model_report import (
    ITEM_MODEL_TITLES,
    closest_items,
    item_models_in_short,
)
from widedeep_nb.lib.recommender import make_recommender
from widedeep_nb.lib.runs import Run

COLUMNS = ["model", "value", "lo", "hi", "gain", "gain_lo", "gain_hi", "stored"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    run = Run(tmp_path_factory.mktemp("runs") / "small", dataset="demo?ratings=4000")
    compare_item_models(run)
    return run


def test_each_model_is_evaluated_on_validation_and_paired_with_popularity(run):
    rows = run.read("item_models.json")["models"]
    assert [row["model"] for row in rows] == list(ITEM_MODEL_TITLES)
    split = run.load_splits()[-1]
    value = {}
    for name in ("popularity", "wide-matrix", "wide-next"):
        model = make_recommender(name).fit(split)
        value[name] = eval_ranking(model, split, "val", (20,)).users["NDCG@20"].mean()
        row = next(row for row in rows if row["model"] == name)
        assert np.isclose(row["value"], value[name])
        assert np.isclose(row["gain"], value[name] - value["popularity"])
        assert row["gain_lo"] <= row["gain"] <= row["gain_hi"]
    assert not len(run.metrics())  # no figure of the leaderboard is touched


def test_two_runs_give_the_same_figures(run, tmp_path):
    other = Run(tmp_path / "other", dataset="demo?ratings=4000")
    compare_item_models(other)
    assert other.read("item_models.json") == run.read("item_models.json")


def test_closest_items_are_those_of_the_weights(run):
    split = run.load_splits()[-1]
    model = make_recommender("wide-matrix").fit(split)
    table = closest_items({"matrix": model}, split, 0, k=2)
    weights = model.weight[0].clone()
    weights[0] = -1
    best = split.items.row(int(weights.argmax()), named=True)
    assert table["1"][0] in (best.get("title"), best["item"])


@pytest.mark.parametrize(
    "lo, hi, phrase",
    [
        (0.1, 0.3, "gain is real"),
        (-0.1, 0.3, "difference may be chance"),
        (-0.3, -0.1, "lose here"),
    ],
)
def test_in_short_follows_the_intervals(lo, hi, phrase):
    rows = [
        ("wide-matrix", 0.3, 0.25, 0.35, (lo + hi) / 2, lo, hi, 10_000),
        ("wide-rules", 0.28, 0.2, 0.3, 0.1, 0.0, 0.2, 600),
        ("popularity", 0.1, 0.05, 0.15, 0.0, 0.0, 0.0, 50),
    ]
    text = " ".join(item_models_in_short(pl.DataFrame(rows, schema=COLUMNS, orient="row")))
    assert phrase in text and "damped rules" in text and "600" in text
    assert not re.search(r"nan|None|\(\)", text)


def test_in_short_without_intervals_or_users():
    few = [
        ("wide-rules", 0.3, None, None, 0.2, None, None, 600),
        ("popularity", 0.1, None, None, 0.0, None, None, 50),
    ]
    sentences = item_models_in_short(pl.DataFrame(few, schema=COLUMNS, orient="row"))
    assert "too few users" in sentences[1] and "stores fewer" in sentences[2]
    nothing = item_models_in_short(pl.DataFrame(schema=COLUMNS))
    assert len(nothing) == 2 and "could not be measured" in nothing[0]
