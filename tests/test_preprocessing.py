"Filters count what they say, cuts keep time apart, features know the past only."
from collections import Counter

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given, settings, strategies as st

from widedeep_nb.core import PARTS, enough, PROTOCOLS, History, Problem, as_interactions
from widedeep_nb.preprocessing import Inputs, category_codes, core_of, damped_bias, make_inputs, prepare, take_snapshot, training_inputs

rows_of = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=60)


def random_log(n=600, users=25, items=15, seed=0, skew=False):
    rng = np.random.default_rng(seed)
    who = rng.zipf(1.3, n) % 200 if skew else rng.integers(0, users, n)
    return as_interactions(pl.DataFrame({"user": [f"u{i}" for i in who], "item": [f"i{i}" for i in rng.integers(0, items, n)],
                                         "rating": rng.integers(1, 6, n), "timestamp": rng.integers(0, 200, n) * 10**8}).unique(["user", "item", "timestamp"], maintain_order=True))


@given(rows_of, st.integers(1, 4), st.integers(1, 4))
@settings(max_examples=100, deadline=None)
def test_filters_against_plain_python(pairs, a, b):
    frame = pl.DataFrame(pairs, schema=["user", "item"], orient="row")
    def once(rows):
        users, items = Counter(u for u, _ in rows), Counter(i for _, i in rows)
        return [(u, i) for u, i in rows if users[u] >= a and items[i] >= b]
    assert frame.filter(enough(a, b)).rows() == once(pairs)
    kept = pairs
    while kept != once(kept): kept = once(kept)
    assert core_of(frame, a, b).rows() == kept


@pytest.mark.parametrize("name", [n for n in PROTOCOLS if n != "given"])
def test_no_training_row_is_later_than_a_test_row(name):
    log = random_log(4000)
    splits = prepare(log, name)
    splits = splits if isinstance(splits, list) else [splits]
    assert len(splits) == len(PROTOCOLS[name].windows)
    for split in splits:
        assert len(split.test)
        if PROTOCOLS[name].cut == "time":
            assert split.train["timestamp"].max() <= split.test["timestamp"].min() and split.seen("test")["timestamp"].max() <= split.test["timestamp"].min()
        else:
            last = lambda part, f: getattr(split, part).group_by("user").agg(f(pl.col("timestamp"))).sort("user")["timestamp"]
            assert (last("train", pl.Expr.max) <= last("test", pl.Expr.min)).all() and (last("val", pl.Expr.max) <= last("test", pl.Expr.min)).all()


def test_order_does_not_depend_on_the_file():
    log = random_log()
    one, two = prepare(log, "rolling"), prepare(log.sample(fraction=1, shuffle=True, seed=3), "rolling")
    for a, b in zip(one, two):
        for part in PARTS: assert getattr(a, part).equals(getattr(b, part))


def test_strict_counts_training_rows_only():
    "A user whose ratings all come after the cut is no reason to keep anything before it."
    log = random_log(900, skew=True)
    split = prepare(log)
    assert len(split.aside) > 20 and split.refit().known_users > split.known_users
    counts = split.train.group_by("user").len()["len"], split.train.group_by("item").len()["len"]
    a = log.sort("timestamp", "user", "item")[: round(.8 * len(log))]
    assert sorted(split.users["user"][split.train["user"].to_numpy()].to_list()) == sorted(a.filter(enough(5, 5))["user"].to_list())
    assert len(split.train) + len(split.aside) == len(a) and len(split.seen("val")) == len(a) and split.seen("val")["timestamp"].is_sorted()
    again = split.refit()
    assert len(again.train) == len(log.sort("timestamp", "user", "item")[: round(.9 * len(log))].filter(enough(5, 5))) and len(again.seen("test")) == round(.9 * len(log))
    assert min(counts[0].min(), counts[1].min()) >= 1 and len(split.val) == round(.9 * len(log)) - round(.8 * len(log))


def test_given_parts_and_no_val():
    log = random_log(100).with_columns(part=pl.Series(["train"] * 60 + ["test"] * 40))[:100]
    split = prepare(as_interactions(log), "given")
    assert (len(split.train), len(split.val), len(split.test)) == (60, 0, 40)
    with pytest.raises(Problem, match="train.* and test"): prepare(random_log(100), "given")


def test_features_do_not_see_the_future():
    "Whatever comes later may change: features of earlier rows stay the same, bit for bit."
    log = random_log()
    split = prepare(log, PROTOCOLS["given"].__class__("plain", 0, 0, windows=((.9, .95, 1.),)))
    train, sizes = split.train, (split.known_users, split.known_items)
    category = torch.arange(len(split.items)) % 3
    x, y = training_inputs(train, category, *sizes, blocks=9, warm_up=.1)
    edge = len(train) // 2
    rng = np.random.default_rng(1)
    later = train[edge:].with_columns(rating=pl.Series(rng.integers(1, 6, len(train) - edge), dtype=pl.Float32), item=pl.Series(rng.permutation(train["item"][edge:].to_numpy()), dtype=pl.Int32))
    z, _ = training_inputs(pl.concat([train[:edge], later]), category, *sizes, blocks=9, warm_up=.1)
    same = edge - round(.1 * len(train))
    for field in ("x_user", "x_item", "x_cross", "mean", "activity", "popularity"):
        a, b = getattr(x, field), getattr(z, field)
        assert torch.equal(a[:same], b[:same]), field
        if field != "activity": assert not torch.equal(a[same:], b[same:]), field  # who is active did not change


def test_a_row_does_not_see_its_own_stars():
    log = random_log(300)
    split = prepare(log, PROTOCOLS["given"].__class__("plain", 0, 0, windows=((.9, .95, 1.),)))
    sizes = split.known_users, split.known_items
    x, _ = training_inputs(split.train, torch.zeros(len(split.items), dtype=torch.int64), *sizes, blocks=500)
    flipped = split.train.with_columns(rating=pl.when(pl.int_range(pl.len()) == len(split.train) - 1).then(6 - pl.col("rating")).otherwise("rating"))
    z, _ = training_inputs(flipped, torch.zeros(len(split.items), dtype=torch.int64), *sizes, blocks=500)
    assert torch.equal(x.x_user[-1], z.x_user[-1]) and torch.equal(x.x_item[-1], z.x_item[-1])


def test_features_against_plain_python():
    log = random_log(300)
    split = prepare(log, PROTOCOLS["given"].__class__("plain", 0, 0, windows=((.9, .95, 1.),)))
    category = torch.arange(len(split.items)) % 3
    full = History.of(split.train, split.known_users)
    snap = take_snapshot(full, category, split.known_items)
    mean, _, by_item = damped_bias(full.owner, full.item, full.rating, split.known_users, split.known_items + 1)
    user, item = 4, 7
    rows = split.train.filter(pl.col("user") == user).to_dicts()
    x = make_inputs(snap, torch.tensor([user]), full.take(torch.tensor([user])), torch.tensor([0]), torch.tensor([item]))
    own = [r["rating"] - float(mean) - float(by_item[r["item"]]) for r in rows]
    deviation = sum(own) / (len(own) + 5)
    spread = (sum((o - deviation) ** 2 for o in own) + 5 * float(snap.spread)) / (len(own) + 5)
    top = (sum(r["rating"] == 5 for r in rows) + 5 * float(snap.top[1])) / (len(own) + 5)
    assert x.x_user[0].tolist() == pytest.approx([deviation, np.log1p(len(own)), spread, top], abs=1e-5)
    kind = [o - deviation for r, o in zip(rows, own) if r["item"] % 3 == item % 3]
    assert x.x_cross[0].tolist() == pytest.approx([sum(kind) / (len(kind) + 5), np.log1p(len(kind))], abs=1e-5)


def test_packing_and_strangers():
    log = random_log(300).with_columns(rating=pl.lit(None, pl.Float32))
    split = prepare(log, PROTOCOLS["given"].__class__("plain", 0, 0, windows=((.9, .95, 1.),)))
    category, names = category_codes(split.items)
    x, y = training_inputs(split.train, category, split.known_users, split.known_items, negatives=2)
    back = Inputs.unpack(*x.pack())
    for field in Inputs.__dataclass_fields__: assert torch.equal(getattr(back, field), getattr(x, field))
    assert names == ["unknown"] and y.sum() * 3 == len(y) and torch.isfinite(x.pack()[1]).all()


def test_damped_bias_reproduces_the_floor(ciao):
    rows = ciao.final().train
    user, item, rating = [torch.tensor(rows[c].to_numpy()) for c in ("user", "item", "rating")]
    mean, by_user, by_item = damped_bias(user.long(), item.long(), rating, len(ciao.users), len(ciao.items))
    u, i, r = [torch.tensor(ciao.test[c].to_numpy()) for c in ("user", "item", "rating")]
    rmse = lambda p: float((p - r).square().mean().sqrt())
    assert sum(len(getattr(ciao, p)) for p in PARTS) == 54_320 and len(ciao.users) == 3_384 and len(ciao.items) == 1_458 and len(ciao.test) == 5_432
    assert rmse(mean) == pytest.approx(1.0873, abs=5e-4) and rmse((mean + by_user[u.long()] + by_item[i.long()]).clamp(1, 5)) == pytest.approx(.9817, abs=5e-4)


def test_a_run_keeps_the_filter_that_was_used(tmp_path):
    "On a sparse log `strict` does without its filter, in the final fit of a run too."
    from widedeep_nb.core import Run
    log = random_log(500).with_columns(user=pl.format("u{}", pl.int_range(pl.len()) // 2))
    split = prepare(log)
    run = Run(tmp_path / "run")
    run.save_splits([split])
    back = run.splits()[0]
    assert back.protocol == split.protocol and back.protocol.min_user == 1 and len(back.final().train) == len(split.train) + len(split.val)
