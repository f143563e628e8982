"Check that filters count as they say, splits respect time, and features see the past only."

import math
from collections import Counter
from dataclasses import replace
from operator import itemgetter

import numpy as np
import pandas as pd
import polars as pl
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr

from widedeep_nb.lib.core import (
    PROTOCOLS,
    SPLIT_NAMES,
    History,
    Protocol,
    UserError,
    min_count_filter,
    sort_by_time,
    to_interactions,
)
from widedeep_nb.lib.features import (
    FEATURES,
    Batch,
    brand_codes,
    build_batch,
    build_feature_state,
    category_codes,
    damped_bias,
    feature_names,
)
from widedeep_nb.lib.recommender import load_recommender, make_recommender
from widedeep_nb.lib.runs import Run
from widedeep_nb.lib.split_report import preprocessing_in_short, split_notes, split_summary
from widedeep_nb.lib.statistics import spearman_with_ci
from widedeep_nb.preprocessing import k_core, pointwise_examples, prepare, time_blocks

COLUMNS = ["user", "item", "rating", "timestamp"]
id_pairs = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=60)


def random_log(n=600, n_users=25, n_items=15, seed=0, skew=False):
    "Make a random log; with `skew` few users have most rows."
    rng = np.random.default_rng(seed)
    user = rng.zipf(1.3, n) % 200 if skew else rng.integers(0, n_users, n)
    log = pl.DataFrame(
        {
            "user": [f"u{u}" for u in user],
            "item": [f"i{i}" for i in rng.integers(0, n_items, n)],
            "rating": rng.integers(1, 6, n),
            "timestamp": rng.integers(0, 200, n) * 10**8,
        }
    )
    return to_interactions(log.unique(["user", "item", "timestamp"], maintain_order=True))


def numbered_users(log, rows_per_user=1):
    "Give every `rows_per_user` rows a user of their own."
    return log.with_columns(user=pl.format("u{}", pl.int_range(pl.len()) // rows_per_user))


def as_list(splits):
    return splits if isinstance(splits, list) else [splits]


@given(id_pairs, st.integers(1, 4), st.integers(1, 4))
@settings(max_examples=100, deadline=None)
def test_filters_against_plain_python(pairs, min_user, min_item):
    frame = pl.DataFrame(pairs, schema=["user", "item"], orient="row")
    counted_once = filtered_rows(pairs, min_user, min_item, False)
    assert frame.filter(min_count_filter(min_user, min_item)).rows() == counted_once
    core = filtered_rows(pairs, min_user, min_item, True)
    assert k_core(frame, min_user, min_item).rows() == core


@st.composite
def logs(draw, names=tuple(PROTOCOLS)):
    "Draw a small log with ties and gaps in time, and a protocol with thresholds that matter."
    row = st.tuples(
        st.integers(0, 5),
        st.integers(0, 4),
        st.integers(1, 5),
        st.one_of(st.none(), st.integers(1, 12)),
    )
    user_item_time = itemgetter(0, 1, 3)
    rows = draw(st.lists(row, min_size=12, max_size=70, unique_by=user_item_time))
    user, item, rating, time = zip(*rows)
    frame = pl.DataFrame(
        {
            "user": [f"u{u}" for u in user],
            "item": [f"i{i}" for i in item],
            "rating": rating,
            "timestamp": time,
        },
        schema_overrides={"timestamp": pl.Int64},
    )
    log = to_interactions(frame)
    protocol = PROTOCOLS[draw(st.sampled_from(names))]
    if protocol.split_by == "given":
        part = st.lists(st.sampled_from(SPLIT_NAMES), min_size=len(rows), max_size=len(rows))
        return log.with_columns(part=pl.Series(draw(part), dtype=pl.Enum(SPLIT_NAMES))), protocol
    minimum = st.integers(1, 4)
    return log, replace(protocol, min_user=draw(minimum), min_item=draw(minimum))


def splits_of(log, protocol):
    "Return the splits of a log as a list; skip logs that `prepare` refuses."
    try:
        return as_list(prepare(log, protocol))
    except UserError:
        assume(False)


def rows_with_ids(split, part):
    "Return the rows of a part with the ids of the log."
    rows = getattr(split, part)
    user = split.users["user"].gather(rows["user"])
    item = split.items["item"].gather(rows["item"])
    return rows.with_columns(user=user, item=item).select(COLUMNS).rows()


def rows_of_parts(split, parts=SPLIT_NAMES):
    return [row for part in parts for row in rows_with_ids(split, part)]


def sorted_rows(log, protocol):
    "Drop undated rows and sort by time and the hash of user and item, in plain Python."
    rows = log.select(COLUMNS).rows()
    if protocol.split_by == "given" or all(time is None for *_, time in rows):
        return rows
    dated = [row for row in rows if row[3] is not None]
    return sorted(dated, key=lambda row: (row[3], plain_pair_hash(*row[:2])))


def plain_pair_hash(user, item):
    "Compute the hash of a pair of ids in plain Python."
    prime = 2**31 - 1
    ids = np.array([user, item], dtype=object)
    hashes = pd.util.hash_array(ids, hash_key=f"{0:016d}", categorize=False)
    u, i = [int(h) // 2 % prime for h in hashes]
    first, second = 1566083941 * u + 1812433253 * i, 1664525 * u + 1013904223 * i
    return pow(first, 5, prime), pow(second, 5, prime)


def filtered_rows(rows, min_user, min_item, repeat):
    "Filter rows by counts, once or until nothing changes, in plain Python."
    users, items = Counter(r[0] for r in rows), Counter(r[1] for r in rows)
    left = [r for r in rows if users[r[0]] >= min_user and items[r[1]] >= min_item]
    if not repeat or left == rows:
        return left
    return filtered_rows(left, min_user, min_item, repeat)


def check_time_order(past, future):
    assert max(time for *_, time in past) <= min(time for *_, time in future)


def check_train_filter(split, protocol, train, filtered_out):
    before = train + filtered_out
    expected = filtered_rows(before, protocol.min_user, protocol.min_item, False)
    sparse = len(expected) < 0.1 * len(before)
    assert (split.protocol.min_user == 1) == (sparse or protocol.min_user == 1)
    assert Counter(train) == Counter(before if sparse else expected)


def check_leave_one_out(rows, train, val, test):
    "Check that the last rows of each user, in the order of `rows`, are its val and test rows."
    for user in {r[0] for r in rows}:
        own = [r for r in rows if r[0] == user]
        own_parts = [[r for r in part if r[0] == user] for part in (train, val, test)]
        assert sum(own_parts, []) == own
        assert own_parts[1:] == [own[-2:-1], own[-1:]]


@given(logs())
@settings(max_examples=300, deadline=None)
def test_protocols_against_plain_python(log_and_protocol):
    "Check which rows are kept, where they are split, and that no training row is newer than the test."
    log, protocol = log_and_protocol
    splits, rows = splits_of(log, protocol), sorted_rows(log, protocol)
    timed = len({time for *_, time in rows}) > 1
    by_time = protocol.split_by == "time"
    if protocol.filter_scope != "train":
        repeat = protocol.filter_scope == "core"
        rows = filtered_rows(rows, protocol.min_user, protocol.min_item, repeat)
    assert len(splits) == len(protocol.folds)
    for split, fold_bounds in zip(splits, protocol.folds):
        parts = (*SPLIT_NAMES, "filtered_out")
        train, val, test, filtered_out = [rows_with_ids(split, part) for part in parts]
        before = train + filtered_out
        ends = [round(round(share, 6) * len(rows)) for share in fold_bounds]
        in_fold = rows[: ends[2]] if by_time else rows
        assert Counter(before + val + test) == Counter(in_fold)
        if by_time and timed:
            assert (val, test) == (rows[ends[0] : ends[1]], rows[ends[1] : ends[2]])
            check_time_order(before, val + test)
            check_time_order(before + val, test)
        if protocol.filter_scope == "train":
            check_train_filter(split, protocol, train, filtered_out)
        else:
            assert not filtered_out and split.protocol == protocol
        if protocol.split_by == "leave-one-out":
            check_leave_one_out(rows if timed else train + val + test, train, val, test)
        if protocol.split_by == "given":
            for part in SPLIT_NAMES:
                expected = log.filter(pl.col("part") == part).select(COLUMNS).rows()
                assert Counter(rows_with_ids(split, part)) == Counter(expected)


@given(logs(names=("rolling",)))
@settings(max_examples=50, deadline=None)
def test_rolling_folds_meet(log_and_protocol):
    "Check that each of the last rows is tested once, and each fold learns from all rows before it."
    splits = splits_of(*log_and_protocol)
    tested = [row for split in splits for row in rows_with_ids(split, "test")]
    rows = rows_of_parts(splits[-1])
    assert len(splits) == 4 and tested == rows[len(rows) - len(tested) :]
    for split in splits:
        before = rows_of_parts(split, ("train", "val"))
        n = len(before)
        assert before == rows[:n]
        assert rows_with_ids(split, "test") == rows[n : n + len(split.test)]


@given(logs(), st.randoms(use_true_random=False))
@settings(max_examples=150, deadline=None)
def test_order_does_not_depend_on_the_file(log_and_protocol, random):
    "Check that shuffled rows give the same parts where no pair occurs twice at one moment."
    log, protocol = log_and_protocol
    repeated_pairs = log.select("user", "item").is_duplicated().any()
    assume(not (repeated_pairs and log["timestamp"].n_unique() < 2))  # a tie in the hash order
    shuffled = list(range(len(log)))
    random.shuffle(shuffled)
    for a, b in zip(splits_of(log, protocol), splits_of(log[shuffled], protocol)):
        assert a.users.equals(b.users) and a.items.equals(b.items)
        for part in (*SPLIT_NAMES, "filtered_out"):
            x, y = getattr(a, part), getattr(b, part)
            if protocol.split_by == "given":
                assert Counter(x.rows()) == Counter(y.rows())
            else:
                assert x.equals(y)


def check_codes(split):
    "Check that training ids have the first codes, and that the tables have no id twice."
    for column, n_train, table in (
        ("user", split.n_train_users, split.users),
        ("item", split.n_train_items, split.items),
    ):
        assert sorted(split.train[column].unique().to_list()) == list(range(n_train))
        assert table[column].n_unique() == len(table)


@given(logs())
@settings(max_examples=150, deadline=None)
def test_training_ids_have_the_first_codes(log_and_protocol):
    "Check codes and parts before and after the final fit."
    log, protocol = log_and_protocol
    for split in splits_of(log, protocol):
        merged = split.merge_train_val()
        for variant in (split, split.for_final_fit(), merged):
            check_codes(variant)
        if protocol.filter_scope != "train":
            expected = rows_of_parts(split, ("train", "val"))
            assert Counter(rows_with_ids(merged, "train")) == Counter(expected)
        assert rows_with_ids(merged, "test") == rows_with_ids(split, "test")
        assert not len(merged.val)
        if merged.train["timestamp"].null_count() == 0 and protocol.split_by == "time":
            assert merged.train["timestamp"].is_sorted()


PART_SIZES = {
    "strict": [(1600, 200, 200)],
    "filtered-first": [(1600, 200, 200)],
    "as-reported": [(1800, 0, 200)],
    "leave-one-out": [(1960, 20, 20)],
    "rolling": [(1000, 200, 200), (1200, 200, 200), (1400, 200, 200), (1600, 200, 200)],
    "given": [(1000, 600, 400)],
}


def sizes(split):
    return tuple(len(getattr(split, part)) for part in SPLIT_NAMES)


@pytest.mark.parametrize("protocol, expected", PART_SIZES.items())
def test_sizes_of_the_parts(protocol, expected):
    "Check the parts of 2,000 rows of 20 users on 10 items, none too rare for any filter."
    row = pl.int_range(2000, eager=True)
    frame = pl.DataFrame(
        {
            "user": "u" + (row % 20).cast(pl.String),
            "item": "i" + (row // 7 % 10).cast(pl.String),
            "rating": row % 5 + 1,
            "timestamp": row * 10**8,
            "part": ["train"] * 1000 + ["val"] * 600 + ["test"] * 400,
        }
    )
    splits = as_list(prepare(to_interactions(frame), protocol))
    assert [sizes(split) for split in splits] == expected


def test_each_fold_has_its_own_filter():
    "Check that an early fold too sparse for the filter does not drop it for the later ones."
    sparse = random_log(400)
    sparse = sparse.with_columns(user=pl.format("{}x{}", "user", pl.int_range(pl.len())))
    later = pl.col("timestamp") + pl.duration(days=4000)
    log = pl.concat([sparse, random_log(2000, n_users=10).with_columns(timestamp=later)])
    protocol = Protocol("two", 5, 5, folds=((0.1, 0.12, 0.15), (0.8, 0.9, 1.0)))
    early, late = prepare(log, protocol)
    assert (early.protocol.min_user, late.protocol.min_user) == (1, 5)


ROWS = random_log(60)
ONE_EACH = numbered_users(ROWS)
REFUSED = [
    (ROWS.with_columns(user=pl.lit("a")), "strict", "all 60 rows are of one user, 'a'"),
    (ROWS.with_columns(item=pl.lit("b")), "given", "all 60 rows are of one item, 'b'"),
    (ROWS[:0], "strict", "no training rows of 0"),
    (ROWS[:1], "strict", "no test rows of 1"),
    (ONE_EACH, "filtered-first", "none of 60 rows has a user with 20 ratings and an item with 20"),
    (ONE_EACH, "leave-one-out", "none of 60 .* 5"),
    (
        ONE_EACH,
        Protocol("mine", 1, 1, "all", folds=((0.0, 0.5, 1.0),)),
        "'mine' leaves no training rows",
    ),
    (
        ONE_EACH,
        replace(PROTOCOLS["strict"], split_by="tmie"),
        "unknown split strategy 'tmie'; known: time",
    ),
    (
        ROWS.with_columns(part=pl.lit(None, pl.Enum(SPLIT_NAMES))),
        "given",
        "60 rows name no part; each is one of train, val, test",
    ),
    (ROWS, "given", "train.* and test"),
]


@pytest.mark.parametrize("log, protocol, message", REFUSED)
def test_impossible_requests_give_one_line(log, protocol, message):
    with pytest.raises(UserError, match=message) as error:
        prepare(log, protocol)
    assert "\n" not in str(error.value)


def test_without_times_the_order_is_random():
    "Check that with one time for all rows the test part is not the end of the alphabet."
    moment = pl.lit(10**9).cast(pl.Datetime("ms"))
    log = random_log(600, n_items=60).with_columns(timestamp=moment)
    split = prepare(log.unique(["user", "item"], maintain_order=True), Protocol("plain", 0, 0))
    users = split.test["user"]
    assert users.n_unique() > 10 and users.is_in(split.train["user"].implode()).all()


def test_strict_counts_training_rows_only():
    "Check that ratings after the split do not keep a user in the training part."
    log = random_log(900, skew=True)
    split, n = prepare(log), len(log)
    rows = sort_by_time(log)
    until_val, until_test = rows[: round(0.8 * n)], rows[: round(0.9 * n)]
    merged = split.merge_train_val()
    assert len(split.filtered_out) > 20 and merged.n_train_users > split.n_train_users
    users = split.users["user"][split.train["user"].to_numpy()].to_list()
    expected = until_val.filter(min_count_filter(5, 5))["user"].to_list()
    assert sorted(users) == sorted(expected)
    assert len(split.train) + len(split.filtered_out) == len(until_val)
    before_val = split.rows_before("val")
    assert len(before_val) == len(until_val) and before_val["timestamp"].is_sorted()
    assert len(merged.train) == len(until_test.filter(min_count_filter(5, 5)))
    assert len(merged.rows_before("test")) == len(until_test)
    assert len(split.val) == len(until_test) - len(until_val)


def test_predefined_parts_without_val():
    log = random_log(100).with_columns(part=pl.Series(["train"] * 60 + ["test"] * 40))[:100]
    assert sizes(prepare(to_interactions(log), "given")) == (60, 0, 40)
    with pytest.raises(UserError, match="train.* and test"):
        prepare(random_log(100), "given")


PLAIN = Protocol("plain", 0, 0, folds=((0.9, 0.95, 1.0),))
ALL = tuple(FEATURES)
event = st.tuples(
    st.integers(0, 4),
    st.integers(0, 5),
    st.sampled_from([1.0, 2.0, 3.0, 4.0, 5.0, None]),
    st.integers(1, 900),
)
events_lists = st.lists(event, max_size=30)


def coded_rows(events):
    "Make rows with codes, as of a split, from (user, item, rating, day)."
    schema = {"user": pl.Int32, "item": pl.Int32, "rating": pl.Float32, "timestamp": pl.Int64}
    time = (pl.col("timestamp") * 86_400_000).cast(pl.Datetime("ms"))
    return pl.DataFrame(events, schema=schema, orient="row").with_columns(time)


def history_of(events, n_users=1):
    return History.from_rows(coded_rows(events), n_users)


def pair_features(state, user, history, item):
    "Build the input for one pair."
    users, items = torch.tensor([user]), torch.tensor([item])
    return build_batch(state, users, history, torch.tensor([0]), items)


def equal_batches(a, b, n=None):
    "Return whether the first `n` rows of two batches are equal in all fields."
    return all(
        torch.equal(getattr(a, name)[:n], getattr(b, name)[:n])
        for name in Batch.__dataclass_fields__
    )


@given(st.lists(event, min_size=1, max_size=30), events_lists, events_lists, st.booleans())
@settings(max_examples=150, deadline=None)
def test_features_do_not_see_the_future(past, future, other, timed):
    "Check that features of past rows stay the same, bit for bit, whatever follows."
    past, future, other = [sorted(e, key=lambda e: e[3]) for e in (past, future, other)]
    end = past[-1][3]

    def after(events, item_offset):
        return [(user, item + item_offset, rating, end + day) for user, item, rating, day in events]

    category, brand = torch.arange(9) % 3, torch.arange(9) % 4
    batches = []
    for events in (past + after(future, 0), past + after(other, 3)):
        rows = coded_rows(events)
        if not timed:
            rows = rows.with_columns(timestamp=pl.lit(None, pl.Datetime("ms")))
        # a block for each row
        options = dict(n_blocks=len(rows), warm_up=0.0, brand=brand, features=ALL)
        batches.append(pointwise_examples(rows, category, 5, 9, **options)[0])
    assert equal_batches(*batches, len(past))


def test_a_row_does_not_see_its_own_rating():
    split = prepare(random_log(300), PLAIN)
    category = torch.zeros(len(split.items), dtype=torch.int64)
    n_users, n_items, last = split.n_train_users, split.n_train_items, len(split.train) - 1
    is_last = pl.int_range(pl.len()) == last
    flipped = pl.when(is_last).then(6 - pl.col("rating")).otherwise("rating")
    batches = []
    for rows in (split.train, split.train.with_columns(rating=flipped)):
        batches.append(pointwise_examples(rows, category, n_users, n_items, n_blocks=500)[0])
    original, changed = batches
    assert torch.equal(original.x_user[-1], changed.x_user[-1])
    assert torch.equal(original.x_item[-1], changed.x_item[-1])


def test_features_against_plain_python():
    split = prepare(random_log(300), PLAIN)
    category = torch.arange(len(split.items)) % 3
    n_users, n_items = split.n_train_users, split.n_train_items
    history = History.from_rows(split.train, n_users)
    state = build_feature_state(history, category, n_items)
    mean, _, item_bias = damped_bias(
        history.user_index, history.item, history.rating, n_users, n_items + 1
    )
    user, item = 4, 7
    x = pair_features(state, user, history.select(torch.tensor([user])), item)
    rows = split.train.filter(pl.col("user") == user).to_dicts()
    own = [row["rating"] - float(mean) - float(item_bias[row["item"]]) for row in rows]
    n = len(own) + 5
    deviation = sum(own) / n
    squares = sum((value - deviation) ** 2 for value in own)
    variance = (squares + 5 * float(state.residual_var)) / n
    top_share = (sum(row["rating"] == 5 for row in rows) + 5 * float(state.top_rating[1])) / n
    expected = [deviation, np.log1p(len(own)), variance, top_share]
    assert x.x_user[0].tolist() == pytest.approx(expected, abs=1e-5)
    same_category = [
        value - deviation for row, value in zip(rows, own) if row["item"] % 3 == item % 3
    ]
    expected = [sum(same_category) / (len(same_category) + 5), np.log1p(len(same_category))]
    assert x.x_cross[0].tolist() == pytest.approx(expected, abs=1e-5)


YEAR_DAYS = 365.25


def recency_frequency_age(days, now, start):
    "Compute the features of one user or item from the days of its events; None is undated."
    days = [now if day is None else max(day, start) for day in days]
    first, last = (min(days), max(days)) if days else (now, start)
    active_days = max(days) - first + 30 if days else 30
    frequency = 30 * len(days) / active_days
    return math.log1p(now - last), math.log1p(frequency), math.log1p(now - first)


def season_of(now, start, end):
    "Compute sine and cosine of the place in the year; 0 for a log shorter than a year."
    if end - start < YEAR_DAYS:
        return (0, 0)
    angle = 2 * math.pi * now / YEAR_DAYS
    return (math.sin(angle), math.cos(angle))


def label_deviation(events, mean, labels, label):
    "Compute the damped deviation from the mean rating of the items with a label."
    ratings = [
        rating - mean
        for _, item, rating, _ in events
        if labels[item] == label and rating is not None
    ]
    n = sum(labels[item] == label for _, item, _, _ in events)
    return sum(ratings) / (n + 20)


def features_by_name(x):
    "Return the features of one pair as three dicts: of the user, of the item, of both."
    values = [tensor[0].tolist() for tensor in (x.x_user, x.x_item, x.x_cross)]
    return [dict(zip(names, row)) for names, row in zip(feature_names(ALL), values)]


CATEGORY, BRAND = [0, 1, 2, 0, 1, 2, 0, 1], [0, 1, 1, 2, 2, 3, 3, 0]
later_events = st.lists(
    st.tuples(st.integers(0, 7), st.one_of(st.none(), st.integers(1, 1500))), max_size=6
)


@given(st.lists(event, min_size=1, max_size=40), later_events, st.integers(0, 4), st.integers(0, 7))
@settings(max_examples=200, deadline=None)
def test_time_and_brand_features_against_plain_python(events, later, user, item):
    "Check queries whose history goes on after the feature state, or ends with undated items."
    events = sorted(events, key=lambda e: e[3])
    n_items = 6  # items 6 and 7 are unknown to training
    state = build_feature_state(
        history_of(events, 5), torch.tensor(CATEGORY), n_items, 5.0, torch.tensor(BRAND), ALL
    )
    own = [(i, rating, day) for u, i, rating, day in events if u == user]
    own += [(i, None, day) for i, day in later]
    history = history_of([(0, *event) for event in own])
    of_user, of_item, of_both = features_by_name(pair_features(state, user, history, item))
    start, end = events[0][3], events[-1][3]
    days = [day for _, _, day in own]
    now = max([end, *(day for day in days if day is not None)])

    recency, frequency, _ = recency_frequency_age(days, now, start)
    actual = (of_user["recency"], of_user["frequency"])
    assert actual == pytest.approx((recency, frequency), abs=1e-5)
    item_days = [day for _, i, _, day in events if i == item]
    expected = recency_frequency_age(item_days, end, start)
    actual = (of_item["recency"], of_item["frequency"], of_item["age"])
    assert actual == pytest.approx(expected, abs=1e-5)
    category_days = [day for i, _, day in own if CATEGORY[i] == CATEGORY[item]]
    last = max([start, *(now if day is None else day for day in category_days)])
    assert of_both["recency in the category"] == pytest.approx(math.log1p(now - last), abs=1e-5)
    actual = (of_user["sine of the season"], of_user["cosine of the season"])
    assert actual == pytest.approx(season_of(now, start, end), abs=1e-5)

    ratings = [rating for _, _, rating, _ in events if rating is not None]
    mean = sum(ratings) / len(ratings) if ratings else 0
    expected = label_deviation(events, mean, BRAND, BRAND[item])
    assert of_item["deviation of its brand"] == pytest.approx(expected, abs=1e-5)
    with_brand = [(i, rating) for i, rating, _ in own if BRAND[i] == BRAND[item]]
    residuals = [
        rating - mean - float(state.deviation[min(i, n_items)]) - of_user["deviation"]
        for i, rating in with_brand
        if rating is not None
    ]
    expected = sum(residuals) / (len(with_brand) + 5)
    assert of_both["deviation with the brand"] == pytest.approx(expected, abs=1e-5)
    expected = math.log1p(len(with_brand))
    assert of_both["log events with the brand"] == pytest.approx(expected, abs=1e-5)


UNTIMED = pl.lit(None, pl.Datetime("ms")).alias("timestamp")


@pytest.mark.parametrize("groups", [("time", "season"), ("brand",)])
def test_without_times_or_brands_the_features_are_zero(groups):
    log = random_log(300)
    split = prepare(log.with_columns(UNTIMED) if "time" in groups else log, PLAIN)
    n_users, n_items = split.n_train_users, split.n_train_items
    category, brand = category_codes(split.items)[0], brand_codes(split.items, n_items)[0]
    options = dict(brand=brand, features=groups)
    x, _ = pointwise_examples(split.train, category, n_users, n_items, **options)
    plain, _ = pointwise_examples(split.train, category, n_users, n_items)
    for side, names, plain_names in zip(
        ("x_user", "x_item", "x_cross"), feature_names(groups), feature_names()
    ):
        columns, n = getattr(x, side), len(plain_names)
        assert columns.shape[1] == len(names) and not columns[:, n:].any()
        assert torch.equal(columns[:, :n], getattr(plain, side))


def test_a_dated_query_to_an_undated_log_has_no_time_features():
    split = prepare(random_log(300).with_columns(UNTIMED), PLAIN)
    history = History.from_rows(split.train, split.n_train_users)
    category, groups = category_codes(split.items)[0], ("time", "season")
    state = build_feature_state(history, category, split.n_train_items, features=groups)
    x = pair_features(state, 0, history_of([(0, 1, 4.0, 10**4)]), 1)
    assert not x.x_user[:, 4:].any() and not x.x_item[:, 6:].any()


@given(
    st.lists(st.one_of(st.none(), st.sampled_from("abcdef")), min_size=1, max_size=40),
    st.integers(0, 40),
    st.integers(1, 4),
)
@settings(max_examples=100, deadline=None)
def test_brand_codes_against_plain_python(brands, n_known_items, max_brands):
    items = pl.DataFrame({"brand": brands}, schema={"brand": pl.String})
    codes, names = brand_codes(items, n_known_items, max_brands)
    counts = Counter(brand for brand in brands[:n_known_items] if brand)
    frequent = sorted(counts, key=lambda brand: (-counts[brand], brand))[:max_brands]
    expected = [frequent.index(brand) + 1 if brand in frequent else 0 for brand in brands]
    assert names == ["unknown"] + frequent and codes.tolist() == expected


def scores_after(model, rows, days):
    "Score user 0 whose last event is repeated some days later."
    later = rows[-1:].with_columns(pl.col("timestamp") + pl.duration(days=days))
    return model.scores([0], History.from_rows(pl.concat([rows, later]), 1))[0]


def test_a_model_with_all_features(tmp_path):
    "Check saving, pairs against grids, and that new events and their times change the scores."
    items = pl.DataFrame(
        {
            "item": [f"i{i}" for i in range(15)],
            "category": ["A", "B", "C"] * 5,
            "brand": ["Ox", "Yak", None] * 5,
        }
    )
    split = prepare(random_log(1500), items=items)
    with pytest.raises(UserError, match="unknown group of features 'tmie'; known: stars, time"):
        make_recommender("wide-deep", features=("tmie",)).fit(split)
    model = make_recommender("wide-deep", epochs=12, lr=0.02, features=ALL).fit(split)
    assert model.net.deep.user_mean.shape == (8,)
    weight = model.net.deep.user_layer.weight[:, 4:8]
    assert not torch.equal(weight, torch.zeros(32, 4))
    model.save(tmp_path)
    loaded, users = load_recommender(tmp_path), torch.arange(9)
    grid = model.scores(users)
    assert torch.equal(loaded.scores(users), grid) and tuple(loaded.features) == ALL
    items = torch.arange(model.n_items)
    pairs = model.predict(users.repeat_interleave(model.n_items), items.repeat(9)).view(9, -1)
    assert torch.allclose(grid.clamp(*model.rating_range), pairs, atol=1e-5)
    rows = split.train.filter(user=0)
    soon, late = scores_after(model, rows, 1), scores_after(model, rows, 900)
    assert not torch.allclose(soon, late, atol=1e-4)
    assert torch.isfinite(model.scores([model.n_users])).all()


def interval_width(result):
    _, lo, hi = result
    return float((hi - lo)[0])


def test_rank_correlation_against_scipy():
    "Check Spearman's value; rows repeated within a cluster do not narrow the interval."
    rng = np.random.default_rng(0)
    y = torch.from_numpy(rng.integers(1, 6, 90)).float()
    noisy = y + torch.from_numpy(rng.normal(0, 3, 90))
    unrelated = torch.from_numpy(rng.integers(0, 3, 90))
    x = torch.column_stack([noisy, unrelated, torch.zeros(90)])
    result = spearman_with_ci(x, y, torch.arange(90))
    value, lo, hi = result
    expected = [spearmanr(x[:, i], y).statistic for i in (0, 1)]
    assert value[:2] == pytest.approx(expected, abs=1e-9) and np.isnan(value[2])
    assert lo[0] < value[0] < hi[0]
    tripled_x, tripled_y = x.repeat(3, 1), y.repeat(3)
    clustered = spearman_with_ci(tripled_x, tripled_y, torch.arange(90).repeat(3))
    independent = spearman_with_ci(tripled_x, tripled_y, torch.arange(270))
    assert clustered[0][:2] == pytest.approx(value[:2], abs=1e-9)
    assert interval_width(clustered) == pytest.approx(interval_width(result), rel=0.05)
    assert interval_width(independent) < 0.7 * interval_width(clustered)


def test_packing_of_unrated_examples():
    log = random_log(300).with_columns(rating=pl.lit(None, pl.Float32))
    split = prepare(log, PLAIN)
    category, names = category_codes(split.items)
    n_users, n_items = split.n_train_users, split.n_train_items
    x, y = pointwise_examples(split.train, category, n_users, n_items, n_negatives=2)
    assert equal_batches(Batch.from_tensors(*x.to_tensors()), x)
    assert names == ["unknown"] and y.sum() * 3 == len(y)
    assert torch.isfinite(x.to_tensors()[1]).all()


def test_damped_bias_reproduces_the_baseline_on_ciao(ciao):
    rows = ciao.for_final_fit().train
    user, item, rating = [torch.tensor(rows[c].to_numpy()) for c in ("user", "item", "rating")]
    mean, user_bias, item_bias = damped_bias(
        user.long(), item.long(), rating, len(ciao.users), len(ciao.items)
    )
    user, item, rating = [torch.tensor(ciao.test[c].to_numpy()) for c in ("user", "item", "rating")]
    prediction = (mean + user_bias[user.long()] + item_bias[item.long()]).clamp(1, 5)
    assert sum(sizes(ciao)) == 54_320 and len(ciao.test) == 5_432
    assert len(ciao.users) == 3_384 and len(ciao.items) == 1_458
    rmse = [float((p - rating).square().mean().sqrt()) for p in (mean, prediction)]
    assert rmse == pytest.approx([1.0873, 0.9817], abs=5e-4)


def test_a_run_keeps_the_filter_that_was_used(tmp_path):
    "Check that `strict` without its filter, on a sparse log, is saved with the split."
    split = prepare(numbered_users(random_log(500), 2))
    run = Run(tmp_path / "run")
    run.save_splits([split])
    loaded = run.load_splits()[0]
    assert loaded.protocol == split.protocol and loaded.protocol.min_user == 1
    assert len(loaded.for_final_fit().train) == len(split.train) + len(split.val)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=60), st.integers(1, 9))
def test_the_past_of_a_block_is_each_users_rows_in_order(users, n_blocks):
    "Check the histories of the blocks row by row, without sorting."
    n = len(users)
    frame = pl.DataFrame(
        {
            "user": [str(user) for user in users],
            "item": ["x"] * n,
            "rating": [1 + i % 5 for i in range(n)],
            "timestamp": range(n),
        }
    )
    rows = to_interactions(frame.with_columns(pl.from_epoch("timestamp", "ms")))
    user, item = pl.Series(users, dtype=pl.Int32), pl.Series(range(n), dtype=pl.Int32)
    rows = rows.with_columns(user=user, item=item)
    category, start = torch.zeros(n + 1, dtype=torch.int64), 0
    blocks = time_blocks(rows, category, 7, n, n_blocks=n_blocks, warm_up=0.0)
    for block, history, *_ in blocks:
        past = users[:start]
        start += len(block)
        expected = [[i for i, u in enumerate(past) if u == user] for user in range(7)]
        assert history.item.tolist() == sum(expected, [])
        assert history.indptr.diff().tolist() == [len(items) for items in expected]
    assert start == n


def correlations(*rows):
    "Make a table of feature correlations: (feature, correlation, half the interval)."
    frame = pl.DataFrame(rows, schema=["feature", "correlation", "half"], orient="row")
    value, half = pl.col("correlation"), pl.col("half")
    return frame.with_columns(lo=value - half, hi=value + half)


STRONG = correlations(("item: deviation", 0.4, 0.1), ("both: recency in the category", 0.1, 0.2))
WEAK = correlations(("user: recency", -0.1, 0.2))


def split_report(dates, folds=1, min_user=5, filtered_out=0):
    "Make the content of preprocessing.json; `dates` holds begin and end of each part."
    parts = [
        {"cut": fold, "part": part, "rows": rows, "from": begin, "to": end}
        for fold in range(folds)
        for part, rows, (begin, end) in zip(("train", "val", "test"), (80, 10, 10), dates)
    ]
    used = {"min_user": min_user, "min_item": min_user, "filter_scope": "train"}
    return {"filter": used, "filtered_out": filtered_out, "parts": parts}


IN_ORDER = [
    ("2020-01-01", "2021-01-01"),
    ("2021-01-01", "2021-06-01"),
    ("2021-06-01", "2022-01-01"),
]
OVERLAPPING = [("2020-01-01", "2022-01-01")] * 3
UNDATED = [(None, None)] * 3


@pytest.mark.parametrize(
    "report, unknown, features, words",
    [
        (
            split_report(IN_ORDER),
            0.02,
            STRONG,
            ["as in a shop", "Only 2 %", "1 has a clear relation"],
        ),
        (
            split_report(IN_ORDER, filtered_out=7),
            0.3,
            WEAK,
            ["7 training rows were removed", "In 30 %", "None of"],
        ),
        (split_report(IN_ORDER, folds=4), 0.7, STRONG, ["tested 4 times", "judge a model first"]),
        (split_report(OVERLAPPING), 0.5, STRONG, ["newer than test rows"]),
        (split_report(UNDATED, min_user=1), 0.0, WEAK, ["drawn at random", "was dropped"]),
    ],
)
def test_sentences_follow_the_split(report, unknown, features, words):
    sentences = preprocessing_in_short(report, 5, unknown, features, "the following ratings")
    text = " ".join(sentences)
    for word in words:
        assert word in text
    assert "None " not in text.replace("None of", "") and "nan" not in text and "()" not in text
    assert 2 <= len([s for s in sentences if s]) <= 5
    assert all(s.endswith(".") for s in sentences if s)


def test_sentences_of_a_real_split():
    rows = to_interactions(
        pl.DataFrame(
            {
                "user": [f"u{i % 7}" for i in range(140)],
                "item": [f"i{i % 5}" for i in range(140)],
                "rating": [1 + i % 5 for i in range(140)],
            }
        )
    )
    split = prepare(rows)
    report = split_report(UNDATED) | {"parts": split_summary(split)}
    assert "drawn at random" in preprocessing_in_short(report, 5, 0.0, STRONG, "ratings")[0]
    assert "random order" in split_notes(report, split.protocol, has_times=False)
