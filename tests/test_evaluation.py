"Evaluation against plain Python, against ranx, and with models without skill."

import math
import random
import re
from dataclasses import replace

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from widedeep_nb import evaluation
from widedeep_nb.lib import aggregation, eval_tasks, statistics
from widedeep_nb.lib.core import PROTOCOLS, Split, UserError, hash_order, to_interactions
from widedeep_nb.lib.evaluation_plots import (
    evaluation_in_short,
    history_caption,
    history_in_short,
    history_title,
)
from widedeep_nb.lib.recommender import Recommender
from widedeep_nb.lib.runs import METRIC_SCHEMA

# no deadline: the time of an example depends on the machine
settings.register_profile("steady", deadline=None)
settings.load_profile("steady")
STRICT, UNMASKED = PROTOCOLS["strict"], PROTOCOLS["as-reported"]


class TableScores(Recommender):
    "Recommender that looks scores up: `table[user code, item code]`."

    name = "table"

    def __init__(self, table):
        self.table = torch.as_tensor(table, dtype=torch.float32)

    def _fit(self, split):
        pass

    def _scores(self, users, history, items):
        return self.table[users][:, items]


class TableRatings(TableScores):
    "Recommender that looks ratings up."

    predicts_ratings = True

    def _predict(self, users, items, history):
        return self.table[users, items]


def log(rows):
    return to_interactions(pl.DataFrame(rows, schema=["user", "item", "rating"], orient="row"))


def make(train, val, test=(), protocol=STRICT, items=None):
    return Split.from_frames(log(train), log(val), log(list(test)), items=items, protocol=protocol)


# ---- plain Python


def expected_results(train, val, score, order, ks, relevant, mask, new):
    "Compute the metrics of each user of `val` in plain Python; `order`: position of an item in ties."
    train_items, histories = {i for _, i, _ in train}, {}
    for u, i, _ in train:
        histories.setdefault(u, set()).add(i)
    candidates = {i for _, i, _ in val} - train_items if new else train_items
    expected = {}
    for user in {u for u, _, _ in val}:
        history = histories.get(user, set())
        is_relevant = relevance_of(relevant)
        truth = {i for u, i, rating in val if u == user and is_relevant(rating)} & candidates
        if mask:
            truth -= history
        if not truth:
            continue
        allowed = [i for i in candidates if not (mask and i in history)]
        ranked = sorted(
            (i for i in allowed if score(user, i) != -math.inf),
            key=lambda i: (-score(user, i), order[i]),
        )
        row = {"warm": user in histories, "n_relevant": len(truth), "n_candidates": len(allowed)}
        for k in ks:
            row |= expected_metrics([i in truth for i in ranked[:k]], len(truth), k)
        expected[user] = row
    return expected


def relevance_of(threshold):
    def is_relevant(rating):
        return threshold is None or (rating is not None and rating >= threshold)

    return is_relevant


def expected_metrics(hits, n_relevant, k):
    "Compute the ranking metrics of one list in plain Python."
    ranks = [rank for rank, hit in enumerate(hits, 1) if hit]
    n_best = min(k, n_relevant)
    ideal = sum(1 / math.log2(rank + 1) for rank in range(1, n_best + 1))
    return {
        f"Precision@{k}": len(ranks) / k,
        f"Recall@{k}": len(ranks) / n_relevant,
        f"HitRate@{k}": float(bool(ranks)),
        f"MRR@{k}": 1 / ranks[0] if ranks else 0.0,
        f"MAP@{k}": sum((j + 1) / rank for j, rank in enumerate(ranks)) / n_best,
        f"NDCG@{k}": sum(1 / math.log2(rank + 1) for rank in ranks) / ideal,
    }


def random_case(rng):
    "Make a small log with cold-start users, new items, repeats, ties, -inf and short catalogs."
    users = [f"u{i}" for i in range(rng.randint(2, 9))]
    items = [f"i{i}" for i in range(rng.randint(2, 25))]

    def rows(n, us, its):
        return [
            (rng.choice(us), rng.choice(its), rng.choice([None, 1, 2, 3, 4, 5])) for _ in range(n)
        ]

    train = rows(
        rng.randint(2, 60),
        users[: max(1, len(users) - 2)],
        items[: max(1, len(items) - rng.randint(0, 3))],
    )
    val = rows(rng.randint(1, 40), users, items)
    near = [0.3, 0.1 + 0.2, float(np.nextafter(np.float32(0.3), np.float32(1))), -math.inf]
    draw = rng.choice(
        [
            lambda: rng.random(),
            lambda: rng.randint(0, 1),
            lambda: rng.randint(0, 4),
            lambda: rng.choice(near),
            lambda: 0,
        ]
    )
    table = {(u, i): float(np.float32(draw())) for u in users for i in items}
    return train, val, table


def test_metrics_equal_those_of_plain_python():
    rng, cases, empty_lists, ties = random.Random(1), 0, 0, 0
    while cases < 1500:
        train, val, table = random_case(rng)
        mask, new = rng.random() < 0.6, rng.random() < 0.2
        relevant, seed = rng.choice([None, None, 4, 2.5]), rng.randint(0, 3)
        ks = tuple(sorted(rng.sample([1, 2, 3, 5, 10, 40], 3)))
        split = make(train, val, protocol=STRICT if mask else UNMASKED)
        users, items = split.users["user"].to_list(), split.items["item"].to_list()
        order = {items[p]: n for n, p in enumerate(hash_order(split.items["item"], seed).tolist())}
        scores = [[table[u, i] for i in items] for u in users]
        model = TableScores(scores).fit(split)
        choice = "new" if new else "known"
        results = evaluation.eval_ranking(model, split, "val", ks, relevant, choice, seed)
        expected = expected_results(
            train, val, lambda u, i: table[u, i], order, ks, relevant, mask, new
        )
        assert {users[u] for u in results.users["user"]} == set(expected)
        for row in results.users.to_dicts():
            user = users[row["user"]]
            for name, value in expected[user].items():
                assert abs(row[name] - value) <= 1e-6, (row, expected[user])
            cases += 1
            empty_lists += expected[user]["n_candidates"] < max(ks)
            ties += len({table[user, i] for i in items}) < len(items)
        excluded = results.task.excluded
        assert excluded["users"] == len({u for u, _, _ in val})
        assert excluded["users without relevant items"] == excluded["users"] - len(expected)
        n_pairs = excluded["pairs"] - excluded["pairs on non-candidate items"]
        n_pairs -= excluded["pairs already in the history"]
        assert n_pairs == sum(e["n_relevant"] for e in expected.values())
    assert empty_lists > 200
    assert ties > 500


def test_blocks_of_users_change_nothing():
    train, val, table = random_case(random.Random(8))
    split = make(train, val)
    model = TableScores(torch.rand(len(split.users), len(split.items))).fit(split)
    task = eval_tasks.make_eval_task(split)
    assert len(task.users) > 2
    assert torch.equal(
        eval_tasks.top_k_lists(model, split, task, 5, budget=1),
        eval_tasks.top_k_lists(model, split, task, 5),
    )


@pytest.mark.long
def test_metrics_equal_those_of_ranx():
    ranx = pytest.importorskip("ranx")
    rng = np.random.default_rng(0)
    users, items = [f"u{i}" for i in range(60)], [f"i{i}" for i in range(50)]
    train = [(u, i, None) for u in users for i in rng.choice(items, 8, replace=False)] + [
        (users[0], i, None) for i in items
    ]
    val = list(
        {(u, str(i), None) for u in users[1:] for i in rng.choice(items, rng.integers(1, 12))}
    )
    split = make(train, val)
    scores = rng.permuted(np.tile(np.arange(50.0), (60, 1)), axis=1)  # strictly ordered
    results = evaluation.eval_ranking(TableScores(scores).fit(split), split, ks=(5, 10, 20))
    name, item = split.users["user"].to_list(), split.items["item"].to_list()
    histories = set(split.train.select("user", "item").iter_rows())
    truth = {}
    for u, i in results.task.ground_truth.iter_rows():
        truth.setdefault(name[u], {})[item[i]] = 1
    run = {}
    for u in results.users["user"]:
        allowed = [i for i in range(50) if (u, i) not in histories]
        run[name[u]] = {item[i]: float(scores[u, i]) for i in allowed}
    n = results.users["n_relevant"].to_numpy()
    theirs = ranx.evaluate(
        ranx.Qrels(truth),
        ranx.Run(run),
        ["precision@5", "recall@5", "map@5", "ndcg@20", "hit_rate@10", "mrr@10"],
        return_mean=False,
    )
    by_user = [sorted(truth).index(name[u]) for u in results.users["user"]]  # ranx sorts by id
    for ours, (metric, values) in zip(
        ["Precision@5", "Recall@5", "MAP@5", "NDCG@20", "HitRate@10", "MRR@10"], theirs.items()
    ):
        values = np.asarray(values)[by_user] * (n / np.minimum(5, n) if metric == "map@5" else 1)
        assert np.allclose(results.users[ours].to_numpy(), values, atol=1e-9), metric
    assert 0 < results.users["MAP@5"].mean() < 1


# ---- properties of the metrics

rows_of_hits = st.lists(st.booleans(), min_size=1, max_size=12)


@given(rows_of_hits, st.integers(0, 20), st.integers(1, 15))
def test_metrics_lie_between_0_and_1(hits, more, k):
    relevant = max(1, sum(hits) + more)
    for name in evaluation.RANKING_METRICS:
        value = evaluation.METRICS[name].function(torch.tensor([hits]), torch.tensor([relevant]), k)
        assert 0 <= value.item() <= 1 + 1e-12, name


@given(st.integers(1, 20), st.integers(1, 12))
def test_the_best_list_scores_1(relevant, k):
    hits, n = torch.tensor([[i < relevant for i in range(k)]]), torch.tensor([relevant])
    for name in ("MAP", "NDCG", "HitRate", "MRR"):
        assert abs(evaluation.METRICS[name].function(hits, n, k).item() - 1) < 1e-12, name


@given(rows_of_hits, st.data())
def test_a_hit_that_moves_up_never_harms(hits, data):
    up, down = sorted(data.draw(st.lists(st.integers(0, len(hits) - 1), min_size=2, max_size=2)))
    better = list(hits)
    if hits[down] and not hits[up]:
        better[up], better[down] = True, False
    k, n = data.draw(st.integers(1, len(hits))), torch.tensor([max(1, sum(hits))])
    for name in evaluation.RANKING_METRICS:
        metric = evaluation.METRICS[name].function
        before, after = (metric(torch.tensor([h]), n, k).item() for h in (hits, better))
        assert after >= before - 1e-12, name
        if better != hits and down < k and name in ("MAP", "NDCG"):
            assert after > before, name


@settings(max_examples=30)
@given(
    st.integers(0, 10**6),
    st.sampled_from([lambda x: 2 * x + 1, lambda x: x**3, torch.exp, lambda x: x - 100]),
)
def test_only_the_order_of_scores_counts(seed, stretch):
    train, val, _ = random_case(random.Random(seed))
    split = make(train, val)
    scores = torch.randint(
        0, 6, (len(split.users), len(split.items)), generator=torch.Generator().manual_seed(seed)
    ).float()
    a, b = (
        evaluation.eval_ranking(TableScores(s).fit(split), split).users
        for s in (scores, stretch(scores))
    )
    assert a.equals(b)


# ---- ties and models without skill


def skewed_shop(n_users=250, n_items=40, name=lambda i: f"i{i:02d}"):
    "Make a log of users with six items each, of which few are popular; the sixth is for validation."
    rng = np.random.default_rng(0)
    weight = 1 / np.arange(1, n_items + 1)
    taken = [rng.choice(n_items, 6, replace=False, p=weight / weight.sum()) for _ in range(n_users)]
    return make(
        [(f"u{u}", name(i), None) for u, t in enumerate(taken) for i in t[:5]],
        [(f"u{u}", name(t[5]), None) for u, t in enumerate(taken)],
    )


def constant(split):
    return TableScores(torch.zeros(len(split.users), len(split.items))).fit(split)


@pytest.mark.parametrize(
    "name",
    [lambda i: f"i{i:02d}", lambda i: f"{(17 * i + 5) % 40:03d}"],
    ids=["one naming", "another naming"],
)
def test_a_constant_scores_as_chance_whatever_the_items_are_called(name):
    split = skewed_shop(name=name)
    model = constant(split)
    users = [evaluation.eval_ranking(model, split, ks=(10,), seed=s).users for s in range(150)]
    scores = np.array([u["NDCG@10"].mean() for u in users])
    chance = evaluation.expected_random_ndcg(
        users[0]["n_relevant"].to_numpy(), users[0]["n_candidates"].to_numpy(), 10
    ).mean()
    assert abs(scores.mean() - chance) < 3.3 * scores.std() / len(scores) ** 0.5
    by_hand = sum(1 / math.log2(i + 1) for i in range(1, 11)) / 35  # one of 35 is relevant
    assert chance == pytest.approx(by_hand)
    assert 3.3 * scores.std() / len(scores) ** 0.5 < 0.2 * chance  # the check above could fail


def models_without_skill(split):
    class Seen(TableScores):
        def _scores(self, users, history, items):
            return history.to_sparse(self.n_items).to_dense()[:, items]

    popular = torch.bincount(
        torch.tensor(split.train["item"].to_numpy()).long(), minlength=len(split.items)
    ).float()
    real = TableScores(popular.expand(len(split.users), -1)).fit(split)

    def turn(s):
        return torch.randperm(len(popular), generator=torch.Generator().manual_seed(s))

    shuffled = [
        TableScores(popular[turn(s)].expand(len(split.users), -1)).fit(split) for s in range(12)
    ]
    return {
        "real": [real] * 12,
        "shuffled": shuffled,
        "constant": [constant(split)] * 12,
        "seen": [Seen([]).fit(split)] * 12,
    }


def test_models_without_skill_fail_and_a_real_model_passes():
    split = skewed_shop()
    verdict = {
        name: evaluation.gain_over_random(
            [
                evaluation.eval_ranking(m, split, ks=(10,), seed=s).users
                for s, m in enumerate(models)
            ]
        )
        for name, models in models_without_skill(split).items()
    }
    assert verdict["real"][1] > 0.05
    for name in ("shuffled", "constant", "seen"):
        assert verdict[name][1] <= 0, name


def test_a_seen_item_cannot_be_a_hit():
    split = make(
        [("a", "x", None), ("a", "y", None), ("b", "z", None)], [("a", "x", None), ("a", "z", None)]
    )
    results = evaluation.eval_ranking(
        TableScores([[9, 9, 0], [0, 0, 0]]).fit(split), split, ks=(1,)
    )
    assert results.users["n_relevant"].to_list() == [1] and results.users[
        "Precision@1"
    ].to_list() == [1]
    assert results.task.excluded["pairs already in the history"] == 1
    open_split = replace(split, protocol=UNMASKED)
    assert evaluation.eval_ranking(
        TableScores([[9, 9, 0], [0, 0, 0]]).fit(open_split), open_split, ks=(1,)
    ).users["n_relevant"].to_list() == [2]


def test_a_model_fitted_on_more_than_the_training_part_is_refused():
    split = make(
        [("a", "x", 3), ("b", "y", 4)],
        [("a", "y", 5)],
        [("b", "x", 1)],
        protocol=replace(STRICT, min_user=1, min_item=1),
    )
    leaky = TableScores(torch.zeros(2, 2)).fit(split.merge_train_val())
    with pytest.raises(UserError, match="fitted on other rows"):
        evaluation.eval_ranking(leaky, split)
    with pytest.raises(UserError, match="fitted on other rows"):
        evaluation.eval_ratings(leaky, split)
    assert len(evaluation.eval_ranking(leaky, split.merge_train_val(), "test").users) == 1


def test_scores_that_are_not_numbers_are_refused():
    split = make([("a", "x", 3), ("b", "y", 4)], [("a", "y", 5)])
    with pytest.raises(UserError, match="not numbers"):
        evaluation.eval_ranking(TableScores(torch.full((2, 2), torch.nan)).fit(split), split)


@pytest.mark.parametrize("history", ["seen", "fit"])
def test_history_is_what_the_protocol_says(history):
    class Probe(TableScores):
        predicts_ratings = True

        def _scores(self, users, history, items):
            self.n_scored = len(history.item)
            return torch.zeros(len(users), len(items))

        def _predict(self, users, items, history):
            self.n_predicted = len(history.item)
            return torch.zeros(len(users))

    split = make(
        [("a", "x", 3), ("b", "y", 4), ("c", "z", 1)],
        [("a", "y", 5)],
        [("a", "z", 2), ("a", "y", 1), ("b", "x", 1)],
        protocol=replace(PROTOCOLS["leave-one-out"], history_source=history),
    )
    probe = Probe([]).fit(split)
    evaluation.eval_ranking(probe, split, "test")
    evaluation.eval_ratings(probe, split, "test")
    assert (probe.n_scored, probe.n_predicted) == {"seen": (3, 5), "fit": (2, 3)}[history]


# ---- beyond accuracy


def test_beyond_accuracy_by_hand():
    items_table = pl.DataFrame(
        {"item": ["x", "y", "z"], "category": ["A", "A", "B"], "price": [10.0, 20.0, 40.0]}
    )
    train = [
        ("a", "x", None),
        ("b", "x", None),
        ("b", "y", None),
        ("c", "x", None),
        ("d", "z", None),
    ]
    split = make(train, [("a", "y", None), ("e", "x", None)], items=items_table)
    items = split.items["item"].to_list()
    score = [float({"x": 3, "y": 2, "z": 1}[i]) for i in items]
    results = evaluation.eval_ranking(TableScores([score] * 5).fit(split), split, ks=(1, 2))
    # a has x and gets y, z; e is a cold-start user and gets x, y
    a, e = results.users.sort("warm", descending=True).to_dicts()
    assert a["Novelty@2"] == pytest.approx(2)
    assert e["Novelty@2"] == pytest.approx((math.log2(4 / 3) + 2) / 2)
    assert (a["Diversity@2"], e["Diversity@2"]) == (1, 0)
    assert (a["Revenue@2"], e["Revenue@2"]) == (20, 10)
    assert a["PopularityLift@2"] == pytest.approx((1 - 3) / 3)
    assert e["PopularityLift@2"] is None
    shown = aggregation.catalog_metrics(
        results.lists[:, :1], results.task.candidates
    )  # y and x of three
    assert shown["value"].to_list() == pytest.approx([2 / 3, 1 / 3])


def test_diversity_against_all_pairs():
    rng = random.Random(3)
    for _ in range(200):
        category = [rng.randint(-1, 3) for _ in range(9)]
        row = rng.sample(range(9), 5) + [-1] * rng.randint(0, 2)
        known = [category[i] for i in row if i >= 0 and category[i] >= 0]
        pairs = [(a, b) for n, a in enumerate(known) for b in known[n + 1 :]]
        results = eval_tasks.diversity(torch.tensor([row]), torch.tensor(category)).item()
        if not pairs:
            assert math.isnan(results)
        else:
            assert results == pytest.approx(1 - sum(a == b for a, b in pairs) / len(pairs))


# ---- rating errors


def test_rmse_by_hand():
    split = make(
        [("a", "x", 1), ("b", "y", 5), ("b", "x", 3)],
        [("a", "y", 5), ("a", "n", 1), ("s", "x", 2), ("b", "n", None)],
    )
    rows = evaluation.eval_ratings(TableRatings(torch.full((3, 3), 3.0)).fit(split), split)
    assert len(rows) == 3  # errors -2, 2, 1; one row has no rating
    users = evaluation.eval_ranking(constant(split), split).users
    users = users.with_columns(relevant=pl.lit("any"), items=pl.lit("all"))
    records = evaluation.metric_table([rows], [users]).filter(task="rating").to_dicts()
    by_group = {(r["users"], r["items"], r["metric"]): r for r in records}
    expected = {
        ("all", "all"): [2, 2, 1],
        ("warm", "all"): [2, 2],
        ("cold", "all"): [1],
        ("all", "warm"): [2, 1],
        ("all", "new"): [2],
        ("cold", "warm"): [1],
        ("warm", "warm"): [2],
        ("warm", "new"): [2],
    }
    assert {k[:2] for k in by_group} == set(expected)
    for key, errors in expected.items():
        mse = sum(e * e for e in errors) / len(errors)
        assert by_group[*key, "MSE"]["value"] == pytest.approx(mse)
        assert by_group[*key, "RMSE"]["value"] == pytest.approx(mse**0.5)
        assert by_group[*key, "MAE"]["value"] == pytest.approx(sum(errors) / len(errors))
        assert by_group[*key, "MAE"]["n"] == len(errors)


def test_rows_in_blocks_and_models_without_ratings():
    split = make(
        [(f"u{i % 7}", f"i{i % 5}", 1 + i % 5) for i in range(35)],
        [(f"u{i % 9}", f"i{i % 6}", 1 + i % 3) for i in range(40)],
    )
    table = torch.rand(len(split.users), len(split.items)) * 4 + 1
    model = TableRatings(table).fit(split)
    one, many = (
        evaluation.eval_ratings(model, split),
        evaluation.eval_ratings(model, split, batch_size=3),
    )
    assert one.equals(many) and len(one) == 40
    assert np.allclose(one["predicted"], table[one["user"].to_list(), one["item"].to_list()])
    assert len(evaluation.eval_ratings(constant(split), split)) == 0


# ---- intervals


def covered(simulate, truth, repeats=400):
    "Return the share of intervals that hold the truth."
    rng = np.random.default_rng(5)
    inside = 0
    for r in range(repeats):
        _, lo, hi = simulate(rng, r)
        inside += bool(lo[0] <= truth <= hi[0])
    return inside / repeats


def limits(repeats=400):
    return 0.95 - 3.3 * (0.95 * 0.05 / repeats) ** 0.5, 0.95 + 3.3 * (0.95 * 0.05 / repeats) ** 0.5


def test_coverage_of_a_mean():
    low, high = limits()

    def simulate(rng, r):
        return statistics.bootstrap((rng.random(150) < 0.3).astype(float), n_resamples=400, seed=r)

    assert low <= covered(simulate, 0.3) <= high


def test_coverage_of_rmse_with_correlated_rows_of_a_user():
    def simulate(rng, r):
        n = rng.integers(1, 12, 150)  # ratings of each user
        own = rng.normal(size=150)  # how hard a user is to predict
        total = np.array([((o + 0.3 * rng.normal(size=m)) ** 2).sum() for o, m in zip(own, n)])
        return statistics.bootstrap(total, n, take_sqrt=True, n_resamples=400, seed=r)

    low, high = limits()
    assert low - 0.02 <= covered(simulate, 1.09**0.5) <= high  # squares are skewed: two points more


def test_paired_is_narrower_than_unpaired():
    rng = np.random.default_rng(2)
    user = rng.normal(size=300)
    a = user + 0.1 * rng.normal(size=300)
    b = user + 0.05 + 0.1 * rng.normal(size=300)
    difference, lo, hi, p = statistics.paired_bootstrap(b, a)
    (_, alo, ahi), (_, blo, bhi) = statistics.bootstrap(a), statistics.bootstrap(b)
    unpaired = ((ahi - alo) ** 2 + (bhi - blo) ** 2) ** 0.5  # width for different users
    assert (hi - lo < 0.3 * unpaired).all()
    assert difference == pytest.approx((b - a).mean())
    assert lo > 0 and p < 0.01
    assert alo < bhi and blo < ahi


def test_a_model_does_not_differ_from_itself():
    rng = np.random.default_rng(3)
    squared, n = rng.random((5, 80, 2)), rng.integers(1, 9, (5, 80, 2))
    for take_sqrt in (False, True):
        results = statistics.paired_bootstrap(squared, squared, n, n, take_sqrt=take_sqrt)
        assert [x.tolist() for x in results] == [[0, 0], [0, 0], [0, 0], [1, 1]]


def test_paired_rmse_is_the_difference_of_rmse():
    a, b, n = np.array([4.0, 1, 9]), np.array([1.0, 1, 1]), np.array([1, 1, 2])
    assert statistics.paired_bootstrap(a, b, n, n, take_sqrt=True)[0] == pytest.approx(
        (14 / 4) ** 0.5 - (3 / 4) ** 0.5
    )


def test_p_values_are_uniform_where_nothing_differs():
    rng = np.random.default_rng(4)
    p = [
        statistics.paired_bootstrap(
            rng.normal(size=80), rng.normal(size=80), n_resamples=400, seed=r
        )[3][0]
        for r in range(400)
    ]
    margin = 3.3 * (0.05 * 0.95 / 400) ** 0.5
    assert 0.05 - margin <= np.mean(np.array(p) <= 0.05) <= 0.05 + margin + 0.01
    assert abs(np.mean(p) - 0.5) < 3.3 * (1 / 12 / 400) ** 0.5


def test_seeds_are_resampled_too():
    users = np.tile([0.0, 1.0], 100)
    seeds = np.array([-0.3, -0.1, 0, 0.1, 0.3])
    value, lo, hi = statistics.bootstrap(users + seeds[:, None])
    _, lo1, hi1 = statistics.bootstrap(users)
    assert value == pytest.approx(0.5)
    assert hi - lo > 1.5 * (hi1 - lo1)
    _, low, high, _ = statistics.paired_bootstrap(users + seeds[:, None], users)
    assert (low < 0).all() and (high > 0).all()


def test_blocks_of_samples_change_nothing():
    values = np.random.default_rng(0).random(50)
    whole = np.concatenate(list(statistics.bootstrap_weights(50, 100)))
    blocks = list(statistics.bootstrap_weights(50, 100, width=2**20))
    assert len(blocks) > 1
    assert (whole == np.concatenate(blocks)).all()
    assert (whole.sum(1) == 50).all()
    assert statistics.bootstrap(values)[0] == pytest.approx(values.mean())


def test_holm():
    assert np.allclose(statistics.holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])
    assert statistics.holm([0.9, 0.8]).max() == 1


def test_directions_of_metrics():
    assert evaluation.higher_is_better("NDCG@20")
    assert not evaluation.higher_is_better("RMSE")
    with pytest.raises(KeyError):
        evaluation.higher_is_better("no such metric")


# ---- evaluate and aggregate


def rated_shop():
    rng = np.random.default_rng(1)

    def rows(users, n):
        return [
            (
                f"u{rng.integers(*users)}",
                f"i{min(int(rng.exponential(6)), 24)}",
                float(rng.integers(1, 6)),
            )
            for _ in range(n)
        ]

    return make(rows((0, 40), 400), rows((20, 60), 150) + [("u30", "new", 5.0)])


def test_evaluate():
    split = rated_shop()
    generator = torch.Generator().manual_seed(0)
    table = torch.rand(len(split.users), len(split.items), generator=generator) * 4 + 1
    model = TableRatings(table).fit(split)
    records = evaluation.evaluate(model, split, ks=(5, 20))
    assert set(records["task"]) == {"rating", "ranking"}
    assert records["versus"].null_count() == len(records)
    assert set(records["relevant"]) == {"any"}
    assert all(records.schema[c] == METRIC_SCHEMA[c] for c in records.columns)
    keys = records.select("users", "items", "relevant", "task", "metric")
    assert not keys.is_duplicated().any()
    assert (records["lo"] <= records["value"] + 1e-12).all()
    assert (records["value"] <= records["hi"] + 1e-12).all()
    metrics = {f"{m}@{k}" for m in evaluation.RANKING_METRICS for k in (5, 20)}
    metrics |= {"Coverage@20", "Gini@20", "Novelty@20", "PopularityLift@20"}
    assert metrics == set(records.filter(task="ranking")["metric"])
    ndcg = {g: records.filter(users=g, metric="NDCG@5") for g in ("all", "warm", "cold")}
    n = {group: record["n"].item() for group, record in ndcg.items()}
    assert n["all"] == n["warm"] + n["cold"]
    assert min(n.values()) > 5
    users = evaluation.eval_ranking(model, split, ks=(5, 20)).users
    cold_mean = users.filter(~pl.col("warm"))["NDCG@5"].mean()
    assert ndcg["cold"]["value"].item() == pytest.approx(cold_mean)


def test_evaluate_with_a_threshold_and_with_new_items():
    split = rated_shop()
    model = TableRatings(torch.rand(len(split.users), len(split.items)) * 4 + 1).fit(split)
    n_any = evaluation.evaluate(model, split).filter(users="all", metric="NDCG@5")["n"].item()
    liked, new = (
        evaluation.evaluate(model, split, relevant=4),
        evaluation.evaluate(model, split, items="new"),
    )
    assert set(liked.filter(task="ranking")["relevant"]) == {">=4"}
    assert liked.filter(users="all", metric="NDCG@5")["n"].item() < n_any
    assert set(new["items"]) == {"new"}
    assert set(new["task"]) == {"ranking"}
    new_rows = split.val.join(split.train, on="item", how="anti")
    expected = new_rows.group_by("user").agg(pl.col("item").n_unique())
    n_new = new.filter(users="all", metric="NDCG@5")["n"].item()
    assert n_new == len(expected) < 5
    assert new["lo"].null_count() == len(new)  # too few users for an interval
    precision = new.filter(users="all", metric="Precision@5")["value"].item()
    assert precision == pytest.approx(expected["item"].mean() / 5)  # all new items are listed


def test_folds_are_clustered_by_user_and_seeds_are_pooled():
    rng = np.random.default_rng(0)
    users = [f"u{i}" for i in range(60)]
    hard = rng.random(60)

    def one_fold(fold, seed):
        columns = {"user": users, "warm": True, "NDCG@5": hard, "relevant": "any", "items": "all"}
        return aggregation.label_fold_and_seed(pl.DataFrame(columns), fold, seed)

    fits = [(fold, seed) for fold in range(4) for seed in (0, 1)]
    ranked = pl.concat([one_fold(*fit) for fit in fits])
    rated = pl.DataFrame(
        schema={
            "user": pl.String,
            "warm": pl.Boolean,
            "warm_item": pl.Boolean,
            "cut": pl.Int64,
            "seed": pl.Int64,
        }
        | {m: pl.Float64 for m in evaluation.RATING_METRICS}
    )
    tables = evaluation.metrics_by_seed_and_fold(rated, ranked, fits)
    assert len(tables) == 9
    for column in ("cut", "seed"):
        assert tables[-1][column].null_count() == len(tables[-1])
    single = tables[0].filter(users="all").row(0, named=True)
    pooled = tables[-1].filter(users="all").row(0, named=True)
    assert pooled["n"] == 240
    assert pooled["value"] == pytest.approx(hard.mean())
    # the same users four times do not narrow the interval
    assert pooled["hi"] - pooled["lo"] == pytest.approx(single["hi"] - single["lo"])


def test_two_models_are_compared_on_the_same_users_only():
    frame = pl.DataFrame(
        {"user": list(range(10)), "warm": [True] * 10, "NDCG@5": np.linspace(0, 1, 10)}
    )
    better = frame.with_columns(pl.col("NDCG@5") + 0.1)
    row = aggregation.aggregate([better], ["NDCG@5"], reference=[frame]).row(0, named=True)
    assert row["value"] == pytest.approx(0.1)
    assert row["lo"] == pytest.approx(0.1)
    assert row["p"] < 0.01
    with pytest.raises(UserError, match="same users"):
        aggregation.aggregate([better], ["NDCG@5"], reference=[frame[1:]])


def test_a_part_without_relevant_items_is_no_error():
    split = make([("a", "x", None), ("b", "y", None)], [("a", "x", None)])
    results = evaluation.eval_ranking(constant(split), split)
    assert len(results.users) == 0
    assert results.task.excluded["users without relevant items"] == 1
    assert len(evaluation.evaluate(constant(split), split)) == 0


def test_evaluation_in_short_follows_the_results():
    recall = {"value": 0.3, "lo": 0.25, "hi": 0.35, "chance": 0.1}
    gap = {"value": -0.05, "lo": -0.08, "hi": -0.02, "rmse": 1.1, "mean_rmse": 1.15}
    good = evaluation_in_short(recall, 900, gap, "1", "More history helps.")
    unsure = evaluation_in_short(
        recall | {"lo": 0.05}, 900, gap | {"hi": 0.01}, "5", "Worst with no events."
    )
    bad = evaluation_in_short(
        recall | {"value": 0.05, "lo": None, "hi": None},
        3,
        gap | {"value": 0.2, "lo": 0.1, "hi": 0.3},
        passed=["constant"],
    )
    nothing = evaluation_in_short(None, 0, None)
    assert "clearly less" in good[0] and "of 0.050 is significant" in good[1]
    assert "not clear" in unsure[0] and "may be chance" in unsure[1]
    assert "do not show the ratings" in bad[1] and "constant" in bad[-1]
    few = evaluation_in_short(recall, 3, gap | {"lo": None, "hi": None})
    assert "Too few users" in few[1]
    for sentences in (good, unsure, bad, nothing, few):
        assert 2 <= len(sentences) <= 5
        assert not re.search(r"nan|None|\(\)|  ", " ".join(sentences))


def test_history_title_follows_the_groups():
    def groups(*values):
        return pl.DataFrame(
            {
                "users": [f"{i}" for i in range(len(values))],
                "value": values,
                "lo": [v - 0.1 for v in values],
                "hi": [v + 0.1 for v in values],
            }
        )

    assert history_title(groups(1.5, 1.0), True) == "More history, better results"
    assert history_title(groups(1.0, 1.5), True) == "More history, worse results"
    assert history_title(groups(1.0, 1.5), False) == "More history, better results"
    assert history_title(groups(1.0, 1.5, 1.0), True) == "Worst with 1 events"
    assert history_title(groups(1.0, 1.05), True) == "History makes no significant difference"
    assert "worst with 1 events" in history_caption(groups(1.0, 1.5, 1.0), "RMSE", True)
    assert "a real difference." in history_in_short(groups(1.5, 1.0), "RMSE", True)
    unsure = history_in_short(groups(1.0, 1.5, 1.0), "RMSE", True)
    assert "too few users" in unsure and "worst for users with 1 events (1.500)" in unsure
