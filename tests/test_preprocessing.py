"Filters count what they say, cuts keep time apart, features know the past only."

import math
from collections import Counter
from dataclasses import replace

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr

from widedeep_nb.core import (
    PROTOCOLS,
    SPLIT_NAMES,
    History,
    Protocol,
    UserError,
    load_recommender,
    make_recommender,
    min_count_filter,
    to_interactions,
)
from widedeep_nb.preprocessing import (
    FEATURES,
    Batch,
    brand_codes,
    build_batch,
    build_feature_state,
    category_codes,
    damped_bias,
    feature_names,
    k_core,
    pointwise_examples,
    prepare,
    spearman_with_ci,
    time_blocks,
)

rows_of = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=60)


def random_log(n=600, users=25, items=15, seed=0, skew=False):
    rng = np.random.default_rng(seed)
    who = rng.zipf(1.3, n) % 200 if skew else rng.integers(0, users, n)
    return to_interactions(
        pl.DataFrame(
            {
                "user": [f"u{i}" for i in who],
                "item": [f"i{i}" for i in rng.integers(0, items, n)],
                "rating": rng.integers(1, 6, n),
                "timestamp": rng.integers(0, 200, n) * 10**8,
            }
        ).unique(["user", "item", "timestamp"], maintain_order=True)
    )


@given(rows_of, st.integers(1, 4), st.integers(1, 4))
@settings(max_examples=100, deadline=None)
def test_filters_against_plain_python(pairs, a, b):
    frame = pl.DataFrame(pairs, schema=["user", "item"], orient="row")

    def once(rows):
        users, items = Counter(u for u, _ in rows), Counter(i for _, i in rows)
        return [(u, i) for u, i in rows if users[u] >= a and items[i] >= b]

    assert frame.filter(min_count_filter(a, b)).rows() == once(pairs)
    kept = pairs
    while kept != once(kept):
        kept = once(kept)
    assert k_core(frame, a, b).rows() == kept


@st.composite
def logs(draw, names=tuple(PROTOCOLS), parts=False):
    "A small log with ties in time, rows without a time, pairs that come again, few users; a protocol with thresholds that bite."
    rows = draw(
        st.lists(
            st.tuples(
                st.integers(0, 5),
                st.integers(0, 4),
                st.integers(1, 5),
                st.one_of(st.none(), st.integers(1, 12)),
            ),
            min_size=12,
            max_size=70,
            unique_by=lambda r: (r[0], r[1], r[3]),
        )
    )
    user, item, rating, time = zip(*rows)
    log = to_interactions(
        pl.DataFrame(
            {
                "user": [f"u{x}" for x in user],
                "item": [f"i{x}" for x in item],
                "rating": rating,
                "timestamp": time,
            },
            schema_overrides={"timestamp": pl.Int64},
        )
    )
    protocol = PROTOCOLS[draw(st.sampled_from(names))]
    if protocol.split_by == "given":
        return log.with_columns(
            part=pl.Series(
                draw(
                    st.lists(st.sampled_from(SPLIT_NAMES), min_size=len(rows), max_size=len(rows))
                ),
                dtype=pl.Enum(SPLIT_NAMES),
            )
        ), protocol
    return log, replace(
        protocol, min_user=draw(st.integers(1, 4)), min_item=draw(st.integers(1, 4))
    )


def splits_of(log, protocol):
    "What `prepare` gives, as a list; logs that it refuses are not of interest here."
    try:
        splits = prepare(log, protocol)
    except UserError:
        assume(False)
    return splits if isinstance(splits, list) else [splits]


def as_text(split, part):
    "Rows of a part as the shop has them."
    rows = getattr(split, part)
    return (
        rows.with_columns(
            user=split.users["user"].gather(rows["user"]),
            item=split.items["item"].gather(rows["item"]),
        )
        .select("user", "item", "rating", "timestamp")
        .rows()
    )


def placed(log, protocol):
    "Plain Python: the rows that can be put in order, in order where there is a time."
    rows = log.select("user", "item", "rating", "timestamp").rows()
    if protocol.split_by == "given" or all(r[3] is None for r in rows):
        return rows
    return sorted((r for r in rows if r[3] is not None), key=lambda r: (r[3], r[0], r[1]))


def kept_by(rows, a, b, again):
    "Plain Python: rows whose user has `a` rows and whose item has `b`, counted once or until nothing changes."
    users, items = Counter(r[0] for r in rows), Counter(r[1] for r in rows)
    left = [r for r in rows if users[r[0]] >= a and items[r[1]] >= b]
    return left if not again or left == rows else kept_by(left, a, b, again)


@given(logs())
@settings(max_examples=300, deadline=None)
def test_protocols_do_what_they_say(made):
    "Against plain Python: which rows are kept, where they are cut, and that nothing to be learnt is later than what is asked."
    log, protocol = made
    splits, rows = splits_of(log, protocol), placed(log, protocol)
    timed = len({r[3] for r in rows}) > 1
    if protocol.filter_scope != "train":
        rows = kept_by(rows, protocol.min_user, protocol.min_item, protocol.filter_scope == "core")
    assert len(splits) == len(protocol.folds)
    for split, window in zip(splits, protocol.folds):
        train, val, test, aside = [as_text(split, p) for p in (*SPLIT_NAMES, "filtered_out")]
        ends = (
            [round(round(w, 6) * len(rows)) for w in window]
            if protocol.split_by == "time"
            else [None, None, None]
        )
        assert Counter(train + aside + val + test) == Counter(
            rows[: ends[2]]
        )  # nothing twice, nothing lost
        if protocol.split_by == "time" and timed:
            assert (val, test) == (rows[ends[0] : ends[1]], rows[ends[1] : ends[2]])
            assert max(r[3] for r in train + aside) <= min(r[3] for r in val + test) and max(
                r[3] for r in train + aside + val
            ) <= min(r[3] for r in test)
        if protocol.filter_scope == "train":
            before = train + aside
            want = kept_by(before, protocol.min_user, protocol.min_item, False)
            sparse = len(want) < 0.1 * len(before)
            assert (split.protocol.min_user == 1) == (sparse or protocol.min_user == 1) and Counter(
                train
            ) == Counter(before if sparse else want)
        else:
            assert not aside and split.protocol == protocol
        if protocol.split_by == "leave-one-out":
            for user in {r[0] for r in rows}:
                own = [r for r in (rows if timed else train + val + test) if r[0] == user]
                assert [r for p in (train, val, test) for r in p if r[0] == user] == own
                assert ([r for r in val if r[0] == user], [r for r in test if r[0] == user]) == (
                    own[-2:-1],
                    own[-1:],
                )
        if protocol.split_by == "given":
            for part in SPLIT_NAMES:
                assert Counter(as_text(split, part)) == Counter(
                    log.filter(pl.col("part") == part)
                    .select("user", "item", "rating", "timestamp")
                    .rows()
                )


@given(logs(names=("rolling",)))
@settings(max_examples=50, deadline=None)
def test_rolling_windows_meet(made):
    "Each row of the last 40 % is asked about once, and each window learns from all before it."
    splits = splits_of(*made)
    asked = [r for s in splits for r in as_text(s, "test")]
    last = [r for p in SPLIT_NAMES for r in as_text(splits[-1], p)]
    assert len(splits) == 4 and asked == last[len(last) - len(asked) :]
    for s in splits:
        seen = [r for p in ("train", "val") for r in as_text(s, p)]
        assert (
            seen == last[: len(seen)]
            and as_text(s, "test") == last[len(seen) : len(seen) + len(s.test)]
        )


@given(logs(), st.randoms(use_true_random=False))
@settings(max_examples=150, deadline=None)
def test_order_does_not_depend_on_the_file(made, chance):
    "Shuffled rows give the same parts, row by row, ties in time broken by user, then item."
    log, protocol = made
    assume(
        log.select(
            log.select("user", "item").is_duplicated().any() & (log["timestamp"].n_unique() < 2)
        ).item()
        is False
    )  # by lot, a pair that comes twice is a tie
    where = list(range(len(log)))
    chance.shuffle(where)
    for a, b in zip(splits_of(log, protocol), splits_of(log[where], protocol)):
        assert a.users.equals(b.users) and a.items.equals(b.items)
        for part in (*SPLIT_NAMES, "filtered_out"):
            x, y = getattr(a, part), getattr(b, part)
            assert (
                x.equals(y)
                or protocol.split_by == "given"
                and Counter(x.rows()) == Counter(y.rows())
            )


@given(logs())
@settings(max_examples=150, deadline=None)
def test_codes_begin_with_the_known(made):
    "Ids that training knows have the first codes, before and after the final fit."
    log, protocol = made
    for split in splits_of(log, protocol):
        for s in (split, split.for_final_fit(), split.merge_train_val()):
            for column, known, table in (
                ("user", s.n_train_users, s.users),
                ("item", s.n_train_items, s.items),
            ):
                assert sorted(s.train[column].unique().to_list()) == list(range(known)) and table[
                    column
                ].n_unique() == len(table)
        again = split.merge_train_val()
        if protocol.filter_scope != "train":
            assert Counter(as_text(again, "train")) == Counter(
                as_text(split, "train") + as_text(split, "val")
            )
        assert as_text(again, "test") == as_text(split, "test") and not len(again.val)
        if again.train["timestamp"].null_count() == 0 and protocol.split_by == "time":
            assert again.train["timestamp"].is_sorted()


@pytest.mark.parametrize(
    "name, parts",
    {
        "strict": [(1600, 200, 200)],
        "filtered-first": [(1600, 200, 200)],
        "as-reported": [(1800, 0, 200)],
        "leave-one-out": [(1960, 20, 20)],
        "rolling": [(1000, 200, 200), (1200, 200, 200), (1400, 200, 200), (1600, 200, 200)],
        "given": [(1000, 600, 400)],
    }.items(),
)
def test_sizes_of_the_parts_by_hand(name, parts):
    "2,000 rows of 20 users on 10 items, none too rare for any filter."
    row = pl.int_range(2000, eager=True)
    log = to_interactions(
        pl.DataFrame(
            {
                "user": "u" + (row % 20).cast(pl.String),
                "item": "i" + (row // 7 % 10).cast(pl.String),
                "rating": row % 5 + 1,
                "timestamp": row * 10**8,
                "part": ["train"] * 1000 + ["val"] * 600 + ["test"] * 400,
            }
        )
    )
    splits = prepare(log, name)
    assert [
        tuple(len(getattr(s, p)) for p in SPLIT_NAMES)
        for s in (splits if isinstance(splits, list) else [splits])
    ] == parts


def test_each_window_has_its_own_filter():
    "An early window that is too sparse for the filter does not switch it off for the later ones."
    log = pl.concat(
        [
            random_log(400).with_columns(user=pl.format("{}x{}", "user", pl.int_range(pl.len()))),
            random_log(2000, users=10).with_columns(
                timestamp=pl.col("timestamp") + pl.duration(days=4000)
            ),
        ]
    )
    early, late = prepare(log, Protocol("two", 5, 5, folds=((0.1, 0.12, 0.15), (0.8, 0.9, 1.0))))
    assert (early.protocol.min_user, late.protocol.min_user) == (1, 5)


def test_what_cannot_be_done_is_said_in_one_line():
    log = random_log(60)
    one, few = (
        log.with_columns(user=pl.lit("a")),
        log.with_columns(user=pl.format("u{}", pl.int_range(pl.len()))),
    )
    for bad, protocol, message in (
        (one, "strict", "all 60 rows are of one user, 'a'"),
        (log.with_columns(item=pl.lit("b")), "given", "all 60 rows are of one item, 'b'"),
        (log[:0], "strict", "no training rows of the 0"),
        (log[:1], "strict", "no test rows of the 1"),
        (few, "filtered-first", "none of 60 rows has a user with 20 ratings and an item with 20"),
        (few, "leave-one-out", "none of 60 .* 5"),
        (
            few,
            Protocol("mine", 1, 1, "all", folds=((0.0, 0.5, 1.0),)),
            "'mine' leaves no training rows",
        ),
        (few, replace(PROTOCOLS["strict"], split_by="tmie"), "unknown cut 'tmie'; known: time"),
        (
            log.with_columns(part=pl.lit(None, pl.Enum(SPLIT_NAMES))),
            "given",
            "60 rows name no part; each is one of train, val, test",
        ),
        (log, "given", "train.* and test"),
    ):
        with pytest.raises(UserError, match=message) as said:
            prepare(bad, protocol)
        assert "\n" not in str(said.value)


def test_one_moment_for_all_is_no_order():
    "Where all times are equal the order is drawn by lot: the end of the log is not the end of the alphabet."
    log = (
        random_log(600, items=60)
        .with_columns(timestamp=pl.lit(10**9).cast(pl.Datetime("ms")))
        .unique(["user", "item"], maintain_order=True)
    )
    split = prepare(log, Protocol("plain", 0, 0))
    assert (
        split.test["user"].n_unique() > 10
        and split.test["user"].is_in(split.train["user"].implode()).all()
    )


def test_strict_counts_training_rows_only():
    "A user whose ratings all come after the cut is no reason to keep anything before it."
    log = random_log(900, skew=True)
    split = prepare(log)
    assert (
        len(split.filtered_out) > 20 and split.merge_train_val().n_train_users > split.n_train_users
    )
    counts = split.train.group_by("user").len()["len"], split.train.group_by("item").len()["len"]
    a = log.sort("timestamp", "user", "item")[: round(0.8 * len(log))]
    assert sorted(split.users["user"][split.train["user"].to_numpy()].to_list()) == sorted(
        a.filter(min_count_filter(5, 5))["user"].to_list()
    )
    assert (
        len(split.train) + len(split.filtered_out) == len(a)
        and len(split.rows_before("val")) == len(a)
        and split.rows_before("val")["timestamp"].is_sorted()
    )
    again = split.merge_train_val()
    assert len(again.train) == len(
        log.sort("timestamp", "user", "item")[: round(0.9 * len(log))].filter(
            min_count_filter(5, 5)
        )
    ) and len(again.rows_before("test")) == round(0.9 * len(log))
    assert min(counts[0].min(), counts[1].min()) >= 1 and len(split.val) == round(
        0.9 * len(log)
    ) - round(0.8 * len(log))


def test_given_parts_and_no_val():
    log = random_log(100).with_columns(part=pl.Series(["train"] * 60 + ["test"] * 40))[:100]
    split = prepare(to_interactions(log), "given")
    assert (len(split.train), len(split.val), len(split.test)) == (60, 0, 40)
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


def as_rows(events):
    "Training rows as a split has them; time in days."
    return pl.DataFrame(
        events,
        schema={"user": pl.Int32, "item": pl.Int32, "rating": pl.Float32, "timestamp": pl.Int64},
        orient="row",
    ).with_columns((pl.col("timestamp") * 86_400_000).cast(pl.Datetime("ms")))


@given(
    st.lists(event, min_size=1, max_size=30),
    st.lists(event, max_size=30),
    st.lists(event, max_size=30),
    st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_features_do_not_see_the_future(past, future, other, timed):
    "Whatever comes later may change, vanish or grow, with items that nobody has seen: features of what was before stay the same, bit for bit."
    past, future, other = [sorted(e, key=lambda e: e[3]) for e in (past, future, other)]

    def later(events, new):
        return [(u, i + new, stars, past[-1][3] + day) for u, i, stars, day in events]

    category, brand, n = torch.arange(9) % 3, torch.arange(9) % 4, len(past)
    made = []
    for events in (past + later(future, 0), past + later(other, 3)):
        rows = (
            as_rows(events)
            if timed
            else as_rows(events).with_columns(timestamp=pl.lit(None, pl.Datetime("ms")))
        )
        made.append(
            pointwise_examples(
                rows, category, 5, 9, n_blocks=len(rows), warm_up=0.0, brand=brand, features=ALL
            )[0]
        )  # a block a row
    for field in Batch.__dataclass_fields__:
        assert torch.equal(getattr(made[0], field)[:n], getattr(made[1], field)[:n]), field


def test_a_row_does_not_see_its_own_stars():
    log = random_log(300)
    split = prepare(log, PLAIN)
    sizes = split.n_train_users, split.n_train_items
    x, _ = pointwise_examples(
        split.train, torch.zeros(len(split.items), dtype=torch.int64), *sizes, n_blocks=500
    )
    flipped = split.train.with_columns(
        rating=pl.when(pl.int_range(pl.len()) == len(split.train) - 1)
        .then(6 - pl.col("rating"))
        .otherwise("rating")
    )
    z, _ = pointwise_examples(
        flipped, torch.zeros(len(split.items), dtype=torch.int64), *sizes, n_blocks=500
    )
    assert torch.equal(x.x_user[-1], z.x_user[-1]) and torch.equal(x.x_item[-1], z.x_item[-1])


def test_features_against_plain_python():
    log = random_log(300)
    split = prepare(log, PLAIN)
    category = torch.arange(len(split.items)) % 3
    full = History.from_rows(split.train, split.n_train_users)
    snap = build_feature_state(full, category, split.n_train_items)
    mean, _, by_item = damped_bias(
        full.user_index, full.item, full.rating, split.n_train_users, split.n_train_items + 1
    )
    user, item = 4, 7
    rows = split.train.filter(pl.col("user") == user).to_dicts()
    x = build_batch(
        snap,
        torch.tensor([user]),
        full.select(torch.tensor([user])),
        torch.tensor([0]),
        torch.tensor([item]),
    )
    own = [r["rating"] - float(mean) - float(by_item[r["item"]]) for r in rows]
    deviation = sum(own) / (len(own) + 5)
    spread = (sum((o - deviation) ** 2 for o in own) + 5 * float(snap.spread)) / (len(own) + 5)
    top = (sum(r["rating"] == 5 for r in rows) + 5 * float(snap.top[1])) / (len(own) + 5)
    assert x.x_user[0].tolist() == pytest.approx(
        [deviation, np.log1p(len(own)), spread, top], abs=1e-5
    )
    kind = [o - deviation for r, o in zip(rows, own) if r["item"] % 3 == item % 3]
    assert x.x_cross[0].tolist() == pytest.approx(
        [sum(kind) / (len(kind) + 5), np.log1p(len(kind))], abs=1e-5
    )


YEAR = 365.25


def recency_frequency_age(days, now, start):
    "Plain Python; `days` of the events of one user or item, None for an event without a time."
    days = [now if d is None else max(d, start) for d in days]
    first, last = (min(days), max(days)) if days else (now, start)
    return (
        math.log1p(now - last),
        math.log1p(30 * len(days) / (max(days) - first + 30 if days else 30)),
        math.log1p(now - first),
    )


def of_its_kind(events, mean, kind, k):
    "Plain Python: damped deviation from the mean of all stars on items of kind `k`."
    stars = [s - mean for _, i, s, _ in events if kind[i] == k and s is not None]
    return sum(stars) / (sum(kind[i] == k for _, i, _, _ in events) + 20)


@given(
    st.lists(event, min_size=1, max_size=40),
    st.lists(st.tuples(st.integers(0, 7), st.one_of(st.none(), st.integers(1, 1500))), max_size=6),
    st.integers(0, 4),
    st.integers(0, 7),
)
@settings(max_examples=200, deadline=None)
def test_features_of_time_and_brand_against_plain_python(events, extra, user, item):
    "A user's own log, going on after the snapshot or with a basket at its end; items 6 and 7 are not known to training."
    events = sorted(events, key=lambda e: e[3])
    category, brand = [0, 1, 2, 0, 1, 2, 0, 1], [0, 1, 1, 2, 2, 3, 3, 0]
    snap = build_feature_state(
        History.from_rows(as_rows(events), 5),
        torch.tensor(category),
        6,
        5.0,
        torch.tensor(brand),
        ALL,
    )
    own = [(i, s, t) for u, i, s, t in events if u == user] + [(i, None, t) for i, t in extra]
    history = History.from_rows(as_rows([(0, i, s, t) for i, s, t in own]), 1)
    x = build_batch(snap, torch.tensor([user]), history, torch.tensor([0]), torch.tensor([item]))
    of_user, of_item, of_both = [
        dict(zip(names, values[0].tolist()))
        for names, values in zip(feature_names(ALL), (x.x_user, x.x_item, x.x_cross))
    ]
    start, end = events[0][3], events[-1][3]
    now = max([end] + [t for _, _, t in own if t is not None])
    recency, frequency, _ = recency_frequency_age([t for _, _, t in own], now, start)
    assert (of_user["recency"], of_user["frequency"]) == pytest.approx(
        (recency, frequency), abs=1e-5
    )
    recency, frequency, age = recency_frequency_age(
        [t for _, i, _, t in events if i == item], end, start
    )
    assert (of_item["recency"], of_item["frequency"], of_item["age"]) == pytest.approx(
        (recency, frequency, age), abs=1e-5
    )
    there = [now if t is None else t for i, _, t in own if category[i] == category[item]]
    assert of_both["recency in the category"] == pytest.approx(
        math.log1p(now - max(there + [start])), abs=1e-5
    )
    season = (
        (math.sin(2 * math.pi * now / YEAR), math.cos(2 * math.pi * now / YEAR))
        if end - start >= YEAR
        else (0, 0)
    )
    assert (of_user["sine of the season"], of_user["cosine of the season"]) == pytest.approx(
        season, abs=1e-5
    )
    stars = [s for _, _, s, _ in events if s is not None]
    mean = sum(stars) / len(stars) if stars else 0
    assert of_item["deviation of its brand"] == pytest.approx(
        of_its_kind(events, mean, brand, brand[item]), abs=1e-5
    )
    left = [
        (
            i,
            0.0
            if s is None
            else s - mean - float(snap.deviation[min(i, 6)]) - of_user["deviation"],
        )
        for i, s, _ in own
    ]
    with_brand = [(r, own[k][1]) for k, (i, r) in enumerate(left) if brand[i] == brand[item]]
    assert of_both["deviation with the brand"] == pytest.approx(
        sum(r for r, s in with_brand if s is not None) / (len(with_brand) + 5), abs=1e-5
    )
    assert of_both["log events with the brand"] == pytest.approx(
        math.log1p(len(with_brand)), abs=1e-5
    )


def test_without_times_or_brands_the_features_are_zero():
    log = random_log(300)
    for column, groups in (("timestamp", ("time", "season")), ("brand", ("brand",))):
        split = prepare(
            log.with_columns(pl.lit(None, pl.Datetime("ms")).alias("timestamp"))
            if column == "timestamp"
            else log,
            PLAIN,
        )
        category, brand = (
            category_codes(split.items)[0],
            brand_codes(split.items, split.n_train_items)[0],
        )
        x, _ = pointwise_examples(
            split.train,
            category,
            split.n_train_users,
            split.n_train_items,
            brand=brand,
            features=groups,
        )
        plain, _ = pointwise_examples(
            split.train, category, split.n_train_users, split.n_train_items
        )
        for side, chosen, basic in zip(
            ("x_user", "x_item", "x_cross"), feature_names(groups), feature_names()
        ):
            columns, n = getattr(x, side), len(basic)
            assert (
                torch.equal(columns[:, :n], getattr(plain, side))
                and columns.shape[1] == len(chosen)
                and not columns[:, n:].any()
            )
        late = History.from_rows(
            as_rows([(0, 1, 4.0, 10**4)]), 1
        )  # a query that knows a time, asked of a log that does not
        if column == "timestamp":
            asked = build_batch(
                build_feature_state(
                    History.from_rows(split.train, split.n_train_users),
                    category,
                    split.n_train_items,
                    features=groups,
                ),
                torch.tensor([0]),
                late,
                torch.tensor([0]),
                torch.tensor([1]),
            )
            assert not asked.x_user[:, 4:].any() and not asked.x_item[:, 6:].any()


@given(
    st.lists(st.one_of(st.none(), st.sampled_from("abcdef")), min_size=1, max_size=40),
    st.integers(0, 40),
    st.integers(1, 4),
)
@settings(max_examples=100, deadline=None)
def test_brand_codes_against_plain_python(brands, known, most):
    codes, names = brand_codes(
        pl.DataFrame({"brand": brands}, schema={"brand": pl.String}), known, most
    )
    count = Counter(b for b in brands[:known] if b)
    frequent = sorted(count, key=lambda b: (-count[b], b))[:most]
    assert names == ["unknown"] + frequent and codes.tolist() == [
        frequent.index(b) + 1 if b in frequent else 0 for b in brands
    ]


def test_a_model_with_all_features(tmp_path):
    "It is saved and comes back, answers pairs and grids alike, and hears of a new event and of its time."
    log = random_log(1500)
    items = pl.DataFrame(
        {
            "item": [f"i{i}" for i in range(15)],
            "category": ["A", "B", "C"] * 5,
            "brand": ["Ox", "Yak", None] * 5,
        }
    )
    split = prepare(log, items=items)
    with pytest.raises(UserError, match="unknown group of features 'tmie'; known: stars, time"):
        make_recommender("wide-deep", features=("tmie",)).fit(split)
    model = make_recommender("wide-deep", epochs=12, lr=0.02, features=ALL).fit(split)
    assert model.net.deep.user_mean.shape == (8,) and not torch.equal(
        model.net.deep.user_layer.weight[:, 4:8], torch.zeros(32, 4)
    )
    model.save(tmp_path)
    back, users = load_recommender(tmp_path), torch.arange(9)
    grid = model.scores(users)
    assert torch.equal(back.scores(users), grid) and tuple(back.features) == ALL
    pairs = model.predict(
        users.repeat_interleave(model.n_items), torch.arange(model.n_items).repeat(9)
    ).view(9, -1)
    assert torch.allclose(grid.clamp(*model.rating_range), pairs, atol=1e-5)
    told = [
        History.from_rows(
            pl.concat(
                [
                    split.train.filter(user=0),
                    split.train.filter(user=0)[-1:].with_columns(
                        pl.col("timestamp") + pl.duration(days=d)
                    ),
                ]
            ),
            1,
        )
        for d in (1, 900)
    ]
    soon, late = [model.scores([0], h)[0] for h in told]
    assert (
        not torch.allclose(soon, late, atol=1e-4)
        and torch.isfinite(model.scores([model.n_users])).all()
    )


def test_rank_correlation_against_scipy():
    "The value is Spearman's; who always says the same three times over makes the interval no narrower."
    rng = np.random.default_rng(0)
    y = torch.from_numpy(rng.integers(1, 6, 90)).float()
    x = torch.column_stack(
        [
            y + torch.from_numpy(rng.normal(0, 3, 90)),
            torch.from_numpy(rng.integers(0, 3, 90)),
            torch.zeros(90),
        ]
    )
    value, lo, hi = spearman_with_ci(x, y, torch.arange(90))
    assert value[:2] == pytest.approx(
        [spearmanr(x[:, i], y).statistic for i in (0, 1)], abs=1e-9
    ) and np.isnan(value[2])
    thrice = spearman_with_ci(x.repeat(3, 1), y.repeat(3), torch.arange(90).repeat(3))
    careless = spearman_with_ci(x.repeat(3, 1), y.repeat(3), torch.arange(270))

    def width(r):
        return float((r[2] - r[1])[0])

    assert (
        thrice[0][:2] == pytest.approx(value[:2], abs=1e-9)
        and width(thrice) == pytest.approx(hi[0] - lo[0], rel=0.05)
        and width(careless) < 0.7 * width(thrice)
    )
    assert lo[0] < value[0] < hi[0]


def test_packing_and_strangers():
    log = random_log(300).with_columns(rating=pl.lit(None, pl.Float32))
    split = prepare(log, PLAIN)
    category, names = category_codes(split.items)
    x, y = pointwise_examples(
        split.train, category, split.n_train_users, split.n_train_items, n_negatives=2
    )
    back = Batch.from_tensors(*x.to_tensors())
    for field in Batch.__dataclass_fields__:
        assert torch.equal(getattr(back, field), getattr(x, field))
    assert (
        names == ["unknown"] and y.sum() * 3 == len(y) and torch.isfinite(x.to_tensors()[1]).all()
    )


def test_damped_bias_reproduces_the_floor(ciao):
    rows = ciao.for_final_fit().train
    user, item, rating = [torch.tensor(rows[c].to_numpy()) for c in ("user", "item", "rating")]
    mean, by_user, by_item = damped_bias(
        user.long(), item.long(), rating, len(ciao.users), len(ciao.items)
    )
    u, i, r = [torch.tensor(ciao.test[c].to_numpy()) for c in ("user", "item", "rating")]

    def rmse(p):
        return float((p - r).square().mean().sqrt())

    assert (
        sum(len(getattr(ciao, p)) for p in SPLIT_NAMES) == 54_320
        and len(ciao.users) == 3_384
        and len(ciao.items) == 1_458
        and len(ciao.test) == 5_432
    )
    assert rmse(mean) == pytest.approx(1.0873, abs=5e-4) and rmse(
        (mean + by_user[u.long()] + by_item[i.long()]).clamp(1, 5)
    ) == pytest.approx(0.9817, abs=5e-4)


def test_a_run_keeps_the_filter_that_was_used(tmp_path):
    "On a sparse log `strict` does without its filter, in the final fit of a run too."
    from widedeep_nb.core import Run

    log = random_log(500).with_columns(user=pl.format("u{}", pl.int_range(pl.len()) // 2))
    split = prepare(log)
    run = Run(tmp_path / "run")
    run.save_splits([split])
    back = run.load_splits()[0]
    assert (
        back.protocol == split.protocol
        and back.protocol.min_user == 1
        and len(back.for_final_fit().train) == len(split.train) + len(split.val)
    )


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=60), st.integers(1, 9))
def test_the_past_of_a_block_is_each_users_rows_in_order(users, blocks):
    "Told row by row, with no sorting."
    rows = to_interactions(
        pl.DataFrame(
            {
                "user": [str(u) for u in users],
                "item": ["x"] * len(users),
                "rating": [1 + i % 5 for i in range(len(users))],
                "timestamp": range(len(users)),
            }
        ).with_columns(pl.from_epoch("timestamp", "ms"))
    ).with_columns(
        user=pl.Series(users, dtype=pl.Int32), item=pl.Series(range(len(users)), dtype=pl.Int32)
    )
    start = 0
    for block, log, *_ in time_blocks(
        rows,
        torch.zeros(len(users) + 1, dtype=torch.int64),
        7,
        len(users),
        n_blocks=blocks,
        warm_up=0.0,
    ):
        past, start = users[:start], start + len(block)
        wanted = [[i for i, u in enumerate(past) if u == user] for user in range(7)]
        assert log.item.tolist() == sum(wanted, []) and log.indptr.diff().tolist() == [
            len(w) for w in wanted
        ]
    assert start == len(users)
