"The demo shop: its measures against second computations, and what chapter 23 says about it."

import hashlib
import re

import numpy as np
import polars as pl
import pytest

from widedeep_nb.demo_shop import mean_ndcg, ranking_quality, rating_errors
from widedeep_nb.lib.datasets import synthetic_repeats
from widedeep_nb.lib.shop import demo_shop
from widedeep_nb.lib.shop_checks import (
    count_per_period,
    december_ratio,
    hill_exponent,
    shop_in_short,
    shop_options,
    shop_ratings,
)


@pytest.fixture(scope="module")
def data():
    return shop_ratings(demo_shop(6_000, 1, views=0, corrupted_share=0))


def test_tail_exponent_of_a_pareto_sample():
    for exponent in (1.2, 2.0, 3.0):
        sample = np.sort(np.random.default_rng(0).pareto(exponent, 200_000) + 1)[::-1]
        assert hill_exponent(sample) == pytest.approx(exponent, rel=0.05)


def test_ndcg_equals_the_formula():
    rng = np.random.default_rng(0)
    scores, seen = rng.random((20, 30)), rng.random((20, 30)) < 0.2
    relevant = (rng.random((20, 30)) < 0.15) & ~seen
    relevant[:, 0], seen[:, 0] = True, False
    values = []
    for s, been, wanted in zip(scores, seen, relevant):
        order = [i for i in np.argsort(-s) if not been[i]][:5]
        gained = sum(1 / np.log2(rank + 2) for rank, i in enumerate(order) if wanted[i])
        best = sum(1 / np.log2(rank + 2) for rank in range(min(5, wanted.sum())))
        values.append(gained / best)
    assert mean_ndcg(scores, seen, relevant, k=5) == pytest.approx(np.mean(values))


def test_the_truth_is_the_ceiling(data):
    errors, quality = rating_errors(data), ranking_quality(data)
    assert errors["truth"] < min(errors["mean"], errors["biases"])
    assert quality["truth"] == max(quality.values()) <= 1


def test_the_parts_are_in_order_of_time(data):
    assert (np.diff(data.date) >= np.timedelta64(0)).all()
    assert data.date[data.train].max() <= data.date[data.test].min()


def test_months_are_counted():
    times = pl.DataFrame(
        {"t": pl.Series(["2020-12-01", "2020-12-31", "2021-01-05"]).str.to_datetime()}
    )
    per_month = count_per_period(times, "t", "1mo")
    assert per_month["len"].to_list() == [2, 1] and december_ratio(per_month) == pytest.approx(
        4 / 3
    )


def test_the_shop_of_a_run():
    assert shop_options("demo?ratings=4000") == {"n_ratings": 4000, "seed": 0, "consumables": 0}
    assert shop_options("ciao") == {"n_ratings": 20_000, "seed": 0, "consumables": 0}


def test_in_short_says_whether_better_models_win():
    errors = {"mean": 1.4, "biases": 1.2, "truth": 1.0}
    quality = {"popularity": 0.05, "item neighbors": 0.1, "EASE": 0.12, "truth": 0.2}
    won = shop_in_short(20_000, 1_500, 600, errors, quality)
    lost = shop_in_short(3_000, 200, 100, errors, quality | {"item neighbors": 0.01, "EASE": 0.02})
    for sentences in (won, lost):
        text = " ".join(sentences)
        assert 2 <= len(sentences) <= 5 and not re.search(r"\bnan\b|None|\(\)|`", text)
    assert "EASE reach 60%" in won[1] and "only 25%" in won[1]
    assert "too few ratings" in lost[1] and won[0] != lost[0]


PLAIN_LOGS = {  # (ratings, seed): SHA-256 of the log, the items and the users as CSV
    (20_000, 0): ("fa4e9af4", "5b6d4e00", "32adf6b8"),
    (3_000, 1): ("58e87961", "a5b134d4", "7bcd0f7f"),
}


@pytest.mark.parametrize("size", PLAIN_LOGS)
def test_the_plain_shop_has_not_changed(size):
    shop = demo_shop(*size)
    tables = (shop.interactions, shop.items, shop.users)
    digests = [hashlib.sha256(t.write_csv().encode()).hexdigest()[:8] for t in tables]
    assert tuple(digests) == PLAIN_LOGS[size]


def test_a_shop_with_consumables_has_the_plain_log_in_it():
    plain, supplied = demo_shop(3_000, 1), demo_shop(3_000, 1, consumables=1)
    new_items = supplied.items["item"][len(plain.items) :]
    assert supplied.items[: len(plain.items)].equals(plain.items)
    is_new = supplied.interactions["item"].is_in(new_items.implode()).fill_null(False)
    assert supplied.interactions.filter(~is_new).equals(plain.interactions)
    purchases = supplied.interactions.filter(is_new)
    assert purchases["event"].unique().to_list() == ["purchase"]
    with pytest.raises(ValueError, match="consumables is 0 or 1, not 2"):
        demo_shop(3_000, 1, consumables=2)


def test_purchases_of_consumables_follow_their_usual_time():
    shop = demo_shop(20_000, 0, consumables=1)
    truth = synthetic_repeats("demo?consumables=1")
    assert synthetic_repeats("demo") is None and synthetic_repeats("shop.csv") is None
    log = shop.interactions.join(truth, on="item").sort("user", "item", "timestamp")
    days = pl.col("timestamp").diff().over("user", "item").dt.total_days(fractional=True)
    gaps = log.with_columns(gap=days / pl.col("usual_days")).drop_nulls("gap")
    # the mean of the intervals, but for those that the closing date cuts off
    assert 0.93 < gaps["gap"].mean() < 1.02
    # each purchase is followed by another with the probability of its item
    old = log.filter(pl.col("timestamp") < pl.col("timestamp").max().dt.offset_by("-2y"))
    n_purchases = log.group_by("item", "user").len()
    started = old.unique(["user", "item"], keep="first").join(n_purchases, on=["user", "item"])
    by_item = started.group_by("item").agg(pl.col("len").mean(), pl.col("again").first())
    expected = 1 / (1 - by_item["again"])
    assert ((by_item["len"] - expected).abs() / expected).median() < 0.15
