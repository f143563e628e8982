"Check that no figure depends on the names of users and items: ties in time follow a seeded hash."

from collections import Counter

import numpy as np
import polars as pl
import pytest
from scipy.stats import chisquare, spearmanr

from widedeep_nb.evaluation import evaluate_once
from widedeep_nb.lib.core import (
    EVENT_ORDER,
    SPLIT_NAMES,
    build_vocab,
    hash_ids,
    pair_hash,
    sort_by_time,
    to_interactions,
)
from widedeep_nb.lib.recommender import make_recommender
from widedeep_nb.lib.split_report import describe_tied_rows, tie_summary
from widedeep_nb.preprocessing import prepare
from widedeep_nb.updates import align_events, merge_logs, new_rows

DAY = 86_400_000


def basket_log(n_users=600, n_items=200, size=8, n_days=600, power=0.0, seed=0):
    "Draw baskets of item numbers, each bought at one moment; with `power` low numbers are popular."
    rng = np.random.default_rng(seed)
    weights = 1 / np.arange(1, n_items + 1) ** power
    draws = rng.exponential(size=(n_users, n_items)) / weights
    items = draws.argsort(axis=1)[:, :size]
    frame = pl.DataFrame(
        {
            "user": np.repeat(np.arange(n_users), size),
            "item": rng.permuted(items, axis=1).ravel(),
            "timestamp": np.repeat(rng.integers(0, n_days, n_users) * DAY, size),
        }
    )
    return frame


def named_log(n_items=200, **shape):
    "Make a log whose names are the numbers."
    return rename(basket_log(n_items=n_items, **shape), np.arange(n_items))


def rename(frame, numbers):
    "Name item i by `numbers[i]`."
    item = pl.Series("item", numbers).gather(frame["item"])
    names = {"user": frame["user"], "item": item}
    texts = [
        pl.format("{}{}", pl.lit(c[0]), n.cast(pl.String).str.zfill(3)) for c, n in names.items()
    ]
    return to_interactions(frame.with_columns(user=texts[0], item=texts[1]))


def number_of(ids):
    return ids.str.slice(1).cast(pl.Int64)


def rows_of(split, part):
    rows = getattr(split, part)
    return rows.with_columns(
        user=split.users["user"].gather(rows["user"]), item=split.items["item"].gather(rows["item"])
    )


@pytest.mark.parametrize("n_days", [600, 2])
def test_leave_one_out_takes_each_item_of_a_basket_equally_often(n_days):
    "Check that the test item is the first, second, ... of its basket by number equally often."
    log = named_log(n_days=n_days)
    split = prepare(log, "leave-one-out")
    number = number_of(pl.col("item"))
    place = log.with_columns(place=number.rank().over("user").cast(pl.Int64) - 1)
    for part in ("val", "test"):
        places = rows_of(split, part).join(place, on=["user", "item"])["place"]
        counts = np.bincount(places, minlength=8)
        assert counts.sum() == 600 and chisquare(counts).pvalue > 1e-3, (part, counts)


def test_the_part_says_nothing_about_the_ids():
    "Check under both kinds of split that neither item numbers nor user numbers go with the part."
    log = named_log(n_days=3)
    for protocol in ("leave-one-out", "strict"):
        split = prepare(log, protocol)
        rows = pl.concat(
            rows_of(split, part).with_columns(is_test=pl.lit(part == "test"))
            for part in ("train", "filtered_out", "val", "test")
        )
        last_day = rows.filter(pl.col("timestamp") == pl.col("timestamp").max())
        for column in ("user", "item"):
            correlation = spearmanr(number_of(last_day[column]), last_day["is_test"])
            assert correlation.pvalue > 1e-3, (protocol, column, correlation)


def popularity_ndcg(log, protocol):
    split = prepare(log, protocol).for_final_fit()
    model = make_recommender("popularity").fit(split.without_test())
    return evaluate_once(model, split, "test")["ranked"]["NDCG@20"].mean()


@pytest.mark.parametrize("protocol", ["leave-one-out", "strict"])
def test_names_do_not_move_figures(protocol):
    "Check that names in the order of popularity give figures like those of random names."
    n_items, n_days = 200, 600 if protocol == "leave-one-out" else 4
    log = basket_log(800, n_items, n_days=n_days, power=1.0)
    rng = np.random.default_rng(1)
    values = [popularity_ndcg(rename(log, rng.permutation(n_items)), protocol) for _ in range(30)]
    ascending, descending = np.arange(n_items), np.arange(n_items)[::-1]
    named = [popularity_ndcg(rename(log, numbers), protocol) for numbers in (ascending, descending)]
    margin = 4 * np.std(values)
    assert all(abs(value - np.mean(values)) < margin for value in named), (named, values)


def test_codes_of_equal_counts_do_not_follow_the_ids():
    "Check that items with the same number of rows get codes in an order unrelated to their names."
    items = [f"i{i:03d}" for i in range(400)] * 2
    codes = build_vocab([pl.DataFrame({"item": items})], "item")["item"]
    assert spearmanr(number_of(codes), np.arange(400)).pvalue > 1e-3


def test_events_of_one_moment_follow_their_types_then_the_file():
    "Check the order within a moment of one user and item, and that other pairs stay apart."
    rng = np.random.default_rng(0)
    events = rng.permutation(np.repeat(EVENT_ORDER, 4))
    frame = pl.DataFrame(
        {
            "user": "ann",
            "item": rng.choice(["bag", "cam"], 20),
            "rating": range(20),
            "timestamp": 5,
            "event": events,
        }
    )
    ordered = sort_by_time(to_interactions(frame))
    for item in ("bag", "cam"):
        own = ordered.filter(item=item)
        rank = own["event"].cast(pl.Enum(EVENT_ORDER)).to_physical()
        assert rank.is_sorted()
        for event in EVENT_ORDER:
            assert own.filter(event=event)["rating"].is_sorted()
    assert ordered["item"].rle().len() == 2


def test_the_hash_of_a_pair_is_a_number_of_its_own():
    "Check that pairs have different hashes, and that Polars, NumPy and Python compute the same."
    ids = hash_ids(pl.Series([f"{n}" for n in range(300)]))
    pairs = pl.DataFrame({"user": ids}).join(pl.DataFrame({"item": ids}), how="cross")
    hashes = pairs.select(pair_hash(pl.col("user"), pl.col("item"))).to_series()
    assert hashes.n_unique() == 300**2 and hashes.min() >= 0 and hashes.max() < 2**62
    user, item = pairs["user"].to_numpy(), pairs["item"].to_numpy()
    assert np.array_equal(pair_hash(user, item), hashes.to_numpy())
    assert pair_hash(int(user[7]), int(item[7])) == hashes[7]
    # known values: another machine or version must not give others
    assert hash_ids(pl.Series(["u1", "été"])).to_list() == [
        5568287098821578317,
        7341308357422402045,
    ]
    assert not hash_ids(pl.Series(["u1"]), seed=1).equals(hash_ids(pl.Series(["u1"])))


def test_the_last_rating_in_the_file_stays():
    "Check that of two ratings of one moment the later one in the file stays, whatever its value."
    frame = pl.DataFrame({"user": "u", "item": "A", "rating": [5.0, 2.0], "timestamp": 10})
    log = align_events(to_interactions(frame))
    for rows in (log, log.reverse()):
        merged = merge_logs(log.clear(), new_rows(rows, log.clear()))
        assert merged["rating"].to_list() == [rows["rating"][1]]


def test_tied_rows_are_counted():
    "Check the shares of ties against a count in plain Python, and the sentence about them."
    split = prepare(named_log(n_days=3), "strict")
    keys = ["user", "timestamp"]
    parts = {
        part: rows_of(split, part).select(keys).rows() for part in (*SPLIT_NAMES, "filtered_out")
    }
    test = parts.pop("test")
    before = sum(parts.values(), [])
    counts = Counter(before + test)
    ties, n = tie_summary(split), counts.total()
    assert ties["rows"] == pytest.approx(sum(c for c in counts.values() if c > 1) / n)
    assert ties["test_rows"] == pytest.approx(sum(key in set(before) for key in test) / len(test))
    last = max(time for _, time in counts)
    assert ties["cut_rows"] == sum(c for (_, time), c in counts.items() if time == last)
    text = describe_tied_rows(ties)
    assert "of the test rows share their time with a training row" in text and "cut" in text
    apart = sort_by_time(named_log(n_days=3)).with_columns(
        timestamp=pl.from_epoch(pl.int_range(pl.len()), "s").cast(pl.Datetime("ms"))
    )
    assert tie_summary(prepare(apart)) == {"rows": 0, "test_rows": 0, "cut_rows": 0}
    assert (
        tie_summary(prepare(apart.with_columns(timestamp=pl.lit(None, pl.Datetime("ms"))))) is None
    )
