"Check the ensemble: components against plain implementations, weights, time budget, and plans."

import json
import re
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest
import scipy.sparse as sp
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from sklearn.ensemble import HistGradientBoostingRegressor
from sklearn.linear_model import Ridge as TheirRidge

from widedeep_nb import hybrid as hybrid_module
from widedeep_nb.evaluation import eval_ranking, ndcg
from widedeep_nb.hybrid import (
    blend_gain,
    ensemble_selection,
    fit_ranking_weights,
    fit_rating_weights,
    select_components,
)
from widedeep_nb.item_models import SparseItemModel, top_k_product
from widedeep_nb.lib import ensemble
from widedeep_nb.lib.core import PROTOCOLS, History, Split, UserError, to_interactions
from widedeep_nb.lib.ensemble import (
    COMPONENTS,
    MAX_EPOCHS,
    MODEL_KEY,
    RANKING_COMPONENTS,
    RATING_COMPONENTS,
    best_epoch,
    component_candidates,
    component_probs,
    ensure_validation,
    fit_component,
    fit_within_budget,
    history_confidence,
    is_applicable,
    normalize_scores,
    recency_weights,
)
from widedeep_nb.lib.ensemble_plots import hybrid_in_short
from widedeep_nb.lib.eval_tasks import make_eval_task
from widedeep_nb.lib.recommender import load_recommender, make_recommender
from widedeep_nb.sequences import SEQUENCE_MODELS

MONTHS = 12 * 30 * 86_400_000  # a year of thirties, in milliseconds


@pytest.fixture(scope="module", autouse=True)
def two_epochs():
    "Limit networks to two epochs, and choose weights for as few as five users."
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hybrid_module, "MIN_USERS_TO_WEIGHT", 5)
        for name in MAX_EPOCHS:
            patch.setitem(MAX_EPOCHS, name, 2)
        yield


def random_log(users=40, items=25, rows=400, seed=0, stars=True, times=True, repeats=True):
    rng = np.random.default_rng(seed)
    # squared: a few items are popular, most are not
    log = {
        "user": [f"u{u}" for u in rng.integers(users, size=rows)],
        "item": [f"i{int(items * x * x)}" for x in rng.random(rows)],
        "rating": rng.integers(1, 6, rows) if stars else None,
        "timestamp": np.sort(rng.integers(10**12, 10**12 + MONTHS, rows)) if times else None,
    }
    frame = pl.DataFrame({c: v for c, v in log.items() if v is not None})
    return to_interactions(
        frame if repeats else frame.unique(["user", "item"], keep="first", maintain_order=True)
    )


def make_split(log, train=0.8, val=0.1, protocol="strict"):
    a, b = int(train * len(log)), int((train + val) * len(log))
    return Split.from_frames(log[:a], log[a:b], log[b:], protocol=PROTOCOLS[protocol])


def history_of(*lists):
    items = sum(map(list, lists), [])
    return History(
        torch.tensor(np.cumsum([0] + [len(x) for x in lists])),
        torch.tensor(items, dtype=torch.int64),
        torch.full((len(items),), torch.nan),
        torch.zeros(len(items), dtype=torch.int64),
    )


def rows_of(split):
    return [
        (u, i, t)
        for u, i, t in zip(
            split.train["user"], split.train["item"], split.train["timestamp"].dt.epoch("ms")
        )
    ]


def binary(split):
    dense = np.zeros((split.n_train_users, split.n_train_items))
    dense[split.train["user"].to_numpy(), split.train["item"].to_numpy()] = 1
    return dense


def all_users(split):
    return range(split.n_train_users)


def with_category(split):
    return replace(
        split,
        items=split.items.with_columns(
            category="A > B" + (pl.int_range(pl.len()) % 4).cast(pl.String)
        ),
    )


@pytest.fixture(scope="module")
def split():
    return with_category(make_split(random_log()))


# ---------------------------------------------------------------- scores and histories

tables = arrays(
    np.float32,
    st.tuples(st.integers(1, 4), st.integers(1, 7)),
    elements=st.integers(-300, 300).map(lambda x: np.float32(x / 100)),
).map(torch.from_numpy)
histories = st.lists(st.lists(st.integers(0, 11), max_size=9), min_size=1, max_size=5)


@settings(max_examples=80, deadline=None)
@given(scores=tables, times=st.integers(1, 50))
def test_normalized_scores_sum_to_one(scores, times):
    got = normalize_scores(scores)
    for row, own in zip(scores.tolist(), got.tolist()):
        whole = sum(x for x in row if x > 0)
        assert np.allclose(own, [x / whole if x > 0 else 0 for x in row], atol=1e-6)
    assert torch.allclose(
        normalize_scores(scores * times), got, atol=1e-6
    )  # the unit does not matter


@settings(max_examples=80, deadline=None)
@given(scores=tables, shift=st.integers(-20, 20))
def test_normalized_logits_are_a_softmax(scores, shift):
    got = normalize_scores(scores, softmax=True)
    e = np.exp(scores.double().numpy())
    assert np.allclose(got, e / e.sum(1, keepdims=True), atol=1e-6) and (got > 0).all()
    assert torch.allclose(normalize_scores(scores + shift, softmax=True), got, atol=1e-5)


@settings(max_examples=80, deadline=None)
@given(lists=histories, n_items=st.integers(1, 12), steps=st.sampled_from([0.5, 3.0, 100.0]))
def test_recency_weights_equal_a_loop(lists, n_items, steps):
    "Check that repeats add up to at most 1, and that unknown items count as events."
    expected = np.zeros((len(lists), n_items))
    for u, items in enumerate(lists):
        for position, item in enumerate(items):
            if item < n_items:
                expected[u, item] += np.exp(-(len(items) - 1 - position) / steps)
    got = recency_weights(history_of(*lists), n_items, steps)
    assert got.is_coalesced() and np.allclose(got.to_dense(), np.minimum(expected, 1), atol=1e-6)


@settings(max_examples=50, deadline=None)
@given(lists=histories, n_items=st.integers(1, 12))
def test_recency_weights_without_decay(lists, n_items):
    have = history_of(*lists)
    assert torch.allclose(
        recency_weights(have, n_items, 1e9).to_dense(),
        have.to_sparse(n_items).to_dense(),
        atol=1e-6,
    )


@settings(max_examples=80, deadline=None)
@given(lists=histories, n_items=st.integers(1, 12), half=st.sampled_from([1.0, 10.0]))
def test_history_confidence_counts_known_events(lists, n_items, half):
    counts = [sum(i < n_items for i in items) for items in lists]
    got = history_confidence(history_of(*lists), n_items, half)
    assert np.allclose(got[:, 0], [c / (c + half) for c in counts]) and got.shape == (len(lists), 1)
    more = history_confidence(history_of(*[items + [0] for items in lists]), n_items, half)
    assert (more > got).all() and (more < 1).all()


# ---------------------------------------------------------------- wide components


@pytest.mark.parametrize("max_items", [1, 6, 24, 12_000])
@pytest.mark.parametrize(
    "lam, dropout, beta, alpha",
    [(50.0, 0.6, 0.5, 0.1), (30_000.0, 0.2, 0.0, 0.0), (10_000.0, 0.0, 1.0, 0.5)],
)
def test_wide_matrix_is_the_closed_form(split, max_items, lam, dropout, beta, alpha):
    X = binary(split)
    top = sorted(sorted(range(X.shape[1]), key=lambda i: (-X[:, i].sum(), i))[:max_items])
    T = X[:, top]
    G = T.T @ np.diag(np.maximum(T.sum(1), 1) ** -beta) @ T
    G += np.diag(np.diag(G)) * dropout / (1 - dropout) + np.eye(len(top)) * (
        lam * T.sum() / 250_000 + 1e-3
    )
    P, W = np.linalg.inv(G), np.zeros((X.shape[1], X.shape[1]))
    W[np.ix_(top, top)] = (np.eye(len(top)) - P / np.diag(P)) * T.sum(0) ** -alpha
    model = make_recommender(
        "wide-matrix", reg=lam, dropout=dropout, beta=beta, alpha=alpha, max_items=max_items
    ).fit(split)
    assert np.allclose(
        model.scores(all_users(split))[T.sum(1) > 0], (X @ W)[T.sum(1) > 0], atol=2e-4
    )
    assert max(t.numel() for t in model._state().values()) <= max(len(top) ** 2, X.shape[1] + 1)
    if max_items == 6:
        assert top != list(
            range(6)
        )  # they are not simply the first: codes go by events, and some people have things twice


def test_wide_matrix_without_its_extensions_is_ease(split):
    events = len(split.train.unique(["user", "item"]))
    plain = make_recommender(
        "wide-matrix", reg=(9 - 1e-3) * 250_000 / events, dropout=0.0, beta=0.0, alpha=0.0
    ).fit(split)
    assert torch.allclose(
        plain.scores(all_users(split)),
        make_recommender("ease", reg=9.0).fit(split).scores(all_users(split)),
        atol=1e-4,
    )


@settings(max_examples=100, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 8), st.integers(1, 9)),
    seed=st.integers(0, 10**6),
    fill=st.sampled_from([0.1, 0.5, 1.0]),
    most=st.sampled_from([1, 2, 4, 99]),
    budget=st.sampled_from([1, 3, 10, 10**6]),
    whole=st.booleans(),
)
def test_top_k_product_against_dense_algebra(shape, seed, fill, most, budget, whole):
    "Check values and number of the kept entries, also with ties; the budget changes nothing."
    rng = np.random.default_rng(seed)
    left, relevant = [
        (rng.integers(1, 4, shape) if whole else rng.random(shape)) * (rng.random(shape) < fill)
        for _ in range(2)
    ]
    dense = left.T @ relevant
    np.fill_diagonal(dense, 0)
    got = top_k_product(
        sp.csr_array(left.astype(float)), sp.csr_array(relevant.astype(float)), most, budget
    )
    again = top_k_product(
        sp.csr_array(left.astype(float)), sp.csr_array(relevant.astype(float)), most
    )
    assert (
        got.shape == dense.shape
        and np.array_equal(got.toarray(), again.toarray())
        and (got.data != 0).all()
    )
    got = got.toarray()
    for row, expected in zip(got, dense):
        assert np.allclose(row[row > 0], expected[row > 0])
        assert (
            np.allclose(np.sort(row)[::-1][:most], np.sort(expected)[::-1][:most])
            and (row > 0).sum() <= most
        )


def test_top_k_product_of_nothing_and_of_one_user():
    nothing, one = sp.csr_array((3, 4)), sp.csr_array(np.array([[1.0, 0, 1, 1]]))
    assert top_k_product(nothing, nothing, 2).toarray().tolist() == [[0.0] * 4] * 4
    assert top_k_product(one, one, 9, budget=2).toarray().tolist() == [
        [0, 0, 1, 1],
        [0, 0, 0, 0],
        [1, 0, 0, 1],
        [1, 0, 1, 0],
    ]


def scores_by(weights, split):
    "Return the scores of all users by weights {(source, target): weight}."
    histories = [{i for u, i, _ in rows_of(split) if u == user} for user in all_users(split)]
    return [
        [sum(weights.get((a, b), 0) for a in own) for b in range(split.n_train_items)]
        for own in histories
    ]


def largest(weights, n, most):
    "Return the largest weights of each row."
    return {
        (a, b): w
        for a in range(n)
        for b, w in sorted(
            ((b, w) for (x, b), w in weights.items() if x == a), key=lambda p: -p[1]
        )[:most]
    }


@pytest.mark.parametrize("most", [3, 300])
@pytest.mark.parametrize(
    "days, options",
    [
        (0.0, {}),
        (90.0, {}),
        (20.0, {"source_power": 1.0, "target_power": 0.0, "length_power": 1.0}),
    ],
)
def test_wide_neighbours_equals_a_loop(split, days, options, most, monkeypatch):
    monkeypatch.setattr(SparseItemModel, "max_neighbors", most)
    model, rows = (
        make_recommender("wide-neighbours", days=days, **options).fit(split),
        rows_of(split),
    )
    end, baskets, fresh = max(t for *_, t in rows), {}, {}
    for u, i, t in rows:
        baskets.setdefault(u, set()).add(i)
        fresh[u, i] = min(
            1, fresh.get((u, i), 0) + (np.exp(-(end - t) / 86_400_000 / days) if days else 1)
        )
    popularity = [sum(i in b for b in baskets.values()) for i in range(split.n_train_items)]
    weights = {}
    for u, basket in baskets.items():
        for a in basket:
            for b in basket - {a}:
                weights[a, b] = (
                    weights.get((a, b), 0)
                    + len(basket) ** -model.length_power
                    * popularity[a] ** -model.source_power
                    * popularity[b] ** -model.target_power
                    * fresh[u, b]
                )
    assert np.allclose(
        model.scores(all_users(split)),
        scores_by(largest(weights, split.n_train_items, most), split),
        atol=1e-5,
    )


def test_missing_timestamps_give_equal_weights():
    log = random_log()
    for gap in (
        log.with_columns(timestamp=None),
        log.with_columns(
            timestamp=pl.when(pl.int_range(pl.len()) == 7).then(None).otherwise("timestamp")
        ),
    ):
        split = make_split(to_interactions(gap))
        dated, plain = [
            make_recommender("wide-neighbours", days=d).fit(split).scores(all_users(split))
            for d in (30.0, 0.0)
        ]
        assert torch.equal(dated, plain)


@pytest.mark.parametrize("damping", [0.0, 10.0])
def test_wide_rules_are_counted(split, damping):
    baskets = [{i for u, i, _ in rows_of(split) if u == user} for user in all_users(split)]
    n = range(split.n_train_items)
    pairs = {(a, b): sum({a, b} <= basket for basket in baskets) for a in n for b in n if a != b}
    weights = {
        (a, b): max(c - 1, 0) / (sum(a in basket for basket in baskets) + damping)
        for (a, b), c in pairs.items()
    }
    assert np.allclose(
        make_recommender("wide-rules", damping=damping).fit(split).scores(all_users(split)),
        scores_by(weights, split),
        atol=1e-5,
    )


@pytest.mark.parametrize(
    "options",
    [{}, {"window": 1}, {"window": 40, "decay": 0.9, "source_power": 0.0, "target_power": 1.0}],
)
def test_wide_next_equals_a_loop(split, options):
    model, weights = make_recommender("wide-next", **options).fit(split), {}
    popularity = binary(split).sum(0)
    for user in all_users(split):
        own = [i for u, i, _ in rows_of(split) if u == user]
        for position, a in enumerate(own):
            for d, b in enumerate(own[position + 1 : position + 1 + model.window]):
                if a != b:
                    weights[a, b] = (
                        weights.get((a, b), 0)
                        + model.decay**d
                        * popularity[a] ** -model.source_power
                        * popularity[b] ** -model.target_power
                    )
    assert np.allclose(model.scores(all_users(split)), scores_by(weights, split), atol=1e-5)


def test_wide_next_knows_the_direction(split):
    "Check that in a cyclic log the next item is recommended, not the previous one."
    log = to_interactions(
        pl.DataFrame(
            [(f"u{u}", f"i{(u + t) % 9}", t + 1) for u in range(30) for t in range(5)],
            schema=["user", "item", "timestamp"],
            orient="row",
        )
    )
    model = make_recommender("wide-next", window=1).fit(make_split(log, 1, 0))
    assert model.recommend([["i3"], ["i8"]], k=1)["item"].to_list() == ["i4", "i0"]


# ---------------------------------------------------------------- low-pass filter


def low_pass(X, factors, lift):
    size, taken = np.maximum(X.sum(1), 1), X.sum(0)
    _, value, V = np.linalg.svd(np.diag(size**-0.5) @ X @ np.diag(taken**-0.5), full_matrices=False)
    V = V[:factors][value[:factors] > 1e-9]
    return np.diag(taken**-0.5) @ V.T @ V @ np.diag(taken**lift)


@pytest.mark.parametrize("lift", [0.0, 0.4])
def test_low_pass_with_all_factors_equals_numpy(split, lift):
    model = make_recommender("low-pass", factors=999, popularity_power=lift).fit(split)
    assert np.allclose(model.into @ model.out.T, low_pass(binary(split), 999, lift), atol=1e-3)


def test_low_pass_with_some_factors_keeps_the_largest():
    "Check that three groups of users with a little noise give the singular vectors of numpy."
    rng = np.random.default_rng(0)
    rows = {(u, 10 * (u % 3) + int(i)) for u in range(90) for i in rng.choice(10, 7, False)} | {
        (int(u), int(i)) for u, i in zip(rng.integers(90, size=20), rng.integers(30, size=20))
    }
    split = make_split(
        to_interactions(
            pl.DataFrame(
                [(f"u{u}", f"i{i}") for u, i in sorted(rows)], schema=["user", "item"], orient="row"
            )
        ),
        1,
        0,
    )
    model, X = make_recommender("low-pass", factors=3).fit(split), binary(split)
    assert np.allclose(model.scores(all_users(split)), X @ low_pass(X, 3, 0.4), atol=2e-2)


def test_low_pass_drops_empty_directions():
    "Check that singular vectors with a value of zero are dropped."
    pairs = [(f"u{u}", f"{x}{u % 3}") for u in range(12) for x in "ab"]
    split = make_split(
        to_interactions(pl.DataFrame(pairs, schema=["user", "item"], orient="row")), 1, 0
    )
    model = make_recommender("low-pass", factors=64).fit(split)
    assert np.allclose(model.into @ model.out.T, low_pass(binary(split), 64, 0.4), atol=1e-3)


# ---------------------------------------------------------------- ratings


@pytest.mark.parametrize("leaves", [2, 9, 40, 62])
def test_trees_equal_scikit_learn(leaves):
    "Check deep and shallow trees on new rows and on rows at the thresholds."
    rng = np.random.default_rng(0)
    x = rng.integers(0, 12, (400, 6)) / 4
    y = x[:, 0] * x[:, 1] - (x[:, 2] > 1) + rng.normal(0, 0.1, 400)
    model = make_recommender(
        "trees", n_seeds=3, max_iter=20, max_leaf_nodes=leaves, min_samples_leaf=5, seed=4
    )
    model._fit_matrix(x, y)
    theirs = [
        HistGradientBoostingRegressor(
            learning_rate=0.05,
            max_iter=20,
            max_leaf_nodes=leaves,
            min_samples_leaf=5,
            l2_regularization=20.0,
            max_features=0.4,
            random_state=4 + s,
        ).fit(x, y)
        for s in range(3)
    ]
    for rows in (x, rng.integers(-6, 32, (300, 6)) / 8, rng.normal(size=(50, 6)) * 100):
        expected = np.mean([t.predict(rows) for t in theirs], 0)
        assert np.allclose(
            model._predict_features(rows), expected, rtol=0, atol=1e-12
        ) and np.allclose(model._predict_features(rows, block=7), expected, rtol=0, atol=1e-12)
    assert np.ptp(model._predict_features(x)) > 1 or leaves == 2
    assert len(model._predict_features(x[:0])) == 0


def test_trees_of_one_leaf():
    "Check trees of a single leaf."
    model = make_recommender("trees", n_seeds=1, max_iter=3)
    model._fit_matrix(np.zeros((50, 2)), np.arange(50.0))
    assert np.allclose(model._predict_features(np.ones((3, 2))), 24.5)
    with pytest.raises(UserError, match="at most 62"):
        make_recommender("trees", max_leaf_nodes=63)._fit_matrix(np.zeros((50, 2)), np.arange(50.0))


def test_ridge_equals_scikit_learn():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(300, 8)) @ rng.normal(size=(8, 8)) + rng.normal(size=8) * 9
    x[:, 3] = 0.1  # says nothing
    y = x @ rng.normal(size=8) + rng.normal(size=300) + 2
    for lam in (0.1, 300.0):
        model = make_recommender("ridge", reg=lam)
        model._fit_matrix(x, y)
        mean, scale = x.mean(0), np.where(np.ptp(x, 0) > 0, x.std(0), 1.0)
        theirs = TheirRidge(lam).fit((x - mean) / scale, y)
        new = rng.normal(size=(50, 8)) * 5
        new[:, 3] = 0.1
        for rows in (x, new):
            assert np.allclose(
                model._predict_features(rows), theirs.predict((rows - mean) / scale), atol=1e-5
            )


@pytest.mark.parametrize("name, options", [("ridge", {}), ("trees", {"min_samples_leaf": 20})])
@pytest.mark.parametrize("times", [True, False])
def test_rating_models_saved_and_loaded(name, options, times, tmp_path):
    split = make_split(random_log(times=times))
    model = make_recommender(name, **options).fit(split)
    pairs = (
        [*all_users(split)][:9] + [999, 999],
        [*range(9)] + [3, split.n_train_items + 5],
    )  # a cold-start user, and an unknown item
    model.save(tmp_path)
    loaded = load_recommender(tmp_path)
    stars = model.predict(*pairs)
    assert (
        torch.equal(loaded.predict(*pairs), stars)
        and torch.isfinite(stars).all()
        and stars.unique().numel() > 3
    )
    assert torch.equal(loaded.scores([0, 5, 999]), model.scores([0, 5, 999]))
    assert sorted(f.name for f in tmp_path.iterdir()) == ["model.json", "model.safetensors"]


@pytest.mark.parametrize("name", ["ridge", "trees"])
def test_rating_models_find_planted_effects(name):
    "Check that planted effects of items and users are learnt."
    rng = np.random.default_rng(0)
    user, item = rng.integers(0, 60, 3000), rng.integers(0, 30, 3000)
    stars = np.clip(
        np.round(3 + (item % 3 - 1) + (user % 3 - 1) * 0.7 + rng.normal(0, 0.4, 3000)), 1, 5
    )
    split = make_split(
        to_interactions(
            pl.DataFrame(
                {
                    "user": [f"u{u}" for u in user],
                    "item": [f"i{i}" for i in item],
                    "rating": stars,
                    "timestamp": np.arange(3000) * 10**7,
                }
            )
        )
    )

    def error(model):
        return float(
            (
                model.fit(split).predict(split.test["user"], split.test["item"])
                - split.test["rating"].to_torch()
            )
            .square()
            .mean()
        )

    assert error(make_recommender(name)) < 0.5 * error(make_recommender("mean"))


# ---------------------------------------------------------------- ensemble weights


def select_by_loop(parts, objective, first, steps, bags, seed):
    "Select ensemble weights in plain Python."
    generator, found = torch.Generator().manual_seed(seed), []
    for _ in range(bags):
        rows = torch.randint(parts.shape[1], (parts.shape[1],), generator=generator)
        units, path = [first] * len(parts), []
        for _ in range(steps):
            with_validation = []
            for k in range(len(parts)):
                with_k = [u + (j == k) for j, u in enumerate(units)]
                blend = sum(u * part[rows] for u, part in zip(with_k, parts)) / sum(with_k)
                with_validation.append((float(objective(blend, rows).mean()), with_k))
            value, units = max(with_validation, key=lambda t: t[0])
            path.append((value, units))
        best = max(path, key=lambda p: p[0])[1]
        found.append([u / sum(best) for u in best])
    return [sum(w) / bags for w in zip(*found)]


def noisy_predictions(n=60, k=4, seed=0):
    random = torch.Generator().manual_seed(seed)
    truth = torch.randn(n, generator=random, dtype=torch.float64)
    return truth, truth + torch.randn(k, n, generator=random, dtype=torch.float64) * torch.linspace(
        0.3, 1.5, k, dtype=torch.float64
    )[:, None]


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 99),
    first=st.integers(0, 2),
    steps=st.integers(1, 6),
    bags=st.integers(1, 3),
    k=st.integers(1, 4),
)
def test_ensemble_selection_equals_a_loop(seed, first, steps, bags, k):
    truth, parts = noisy_predictions(k=k, seed=seed)

    def objective(blend, rows):
        return -(blend - truth[rows]).square()

    got = ensemble_selection(parts, objective, first, steps, bags, seed)
    assert np.allclose(got, select_by_loop(parts, objective, first, steps, bags, seed), atol=1e-9)
    assert abs(sum(got) - 1) < 1e-9 and min(got) >= first / (first * k + steps) - 1e-9
    assert got == ensemble_selection(parts, objective, first, steps, bags, seed)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 99), steps=st.integers(1, 6))
def test_the_blend_is_no_worse_than_the_best_component(seed, steps):
    "Check on the sampled rows and one bag: the first vote goes to the best component."
    truth, parts = noisy_predictions(seed=seed)
    rows = torch.randint(60, (60,), generator=torch.Generator().manual_seed(seed))

    def cost(blend):
        return float((blend[rows] - truth[rows]).square().mean())

    weights = torch.tensor(
        ensemble_selection(
            parts, lambda blend, rows: -(blend - truth[rows]).square(), 0, steps, 1, seed
        )
    )
    assert cost((weights[:, None] * parts).sum(0)) <= min(map(cost, parts)) + 1e-12


def test_the_truth_gets_all_weight():
    truth, parts = noisy_predictions()
    assert ensemble_selection(
        torch.stack([parts[0], truth, parts[1]]),
        lambda blend, rows: -(blend - truth[rows]).square(),
    ) == [0, 1, 0]


@pytest.fixture(scope="module")
def without_ties():
    "Return a split whose items all have a different popularity, so that there are no ties."
    rng = np.random.default_rng(0)
    rows = [(f"u{u}", f"i{i:02d}") for i in range(25) for u in rng.choice(40, 4 + i, False)]
    rows = [rows[k] for k in rng.permutation(len(rows))]
    log = to_interactions(
        pl.DataFrame(rows, schema=["user", "item"], orient="row").with_columns(
            timestamp=10**12 + np.arange(len(rows)) * 10**8
        )
    )
    return make_split(log, 0.75, 0.15)


@pytest.mark.parametrize("protocol", ["strict", "as-reported", "given"])
def test_all_items_as_candidates_give_the_ensemble_scores(without_ties, protocol):
    "Check that with all items as candidates NDCG@20 equals that of the evaluation."
    split = replace(without_ties, protocol=PROTOCOLS[protocol])
    weights = {
        "popularity": 0.07,
        "matrix, recency-weighted": 0.4,
        "neighbors": 0.2,
        "low-pass": 0.33,
    }
    models = {name: fit_component(split, name) for name in weights}
    hybrid, task, n = (
        make_recommender("hybrid", plan={"ranking": weights, "rating": {}, "epochs": {}}).fit(
            split
        ),
        make_eval_task(split, "val"),
        split.n_train_items,
    )
    all_probs, mask, hits, n_relevant, is_warm = component_candidates(models, split, depth=n)
    blend = sum(w * s for w, s in zip(weights.values(), all_probs))
    first = (torch.arange(4 * n) % 4 == 0).expand(
        len(hits), -1
    )  # each item is there four times, side by side
    histories = task.history.select(task.users)
    assert torch.allclose(blend[first].view(-1, n), hybrid.scores(task.users, histories), atol=1e-6)
    assert (mask[~first] == -torch.inf).all() and not hits[
        ~first
    ].any()  # each item is a candidate four times, and counts once
    assert torch.equal(
        mask[first].view(-1, n) == -torch.inf,
        histories.to_sparse(n).to_dense().bool() & split.protocol.mask_seen,
    )
    own = ndcg(hits.gather(1, (blend + mask).topk(20, 1)[1]), n_relevant, 20)
    theirs = eval_ranking(hybrid, split, "val", (20,)).users
    assert (
        theirs["user"].to_list() == task.users.tolist()
        and np.allclose(theirs["NDCG@20"], own)
        and own.mean() > 0
    )


def test_candidates_are_the_first_items_of_any_component(without_ties):
    models = {name: fit_component(without_ties, name) for name in ("popularity", "rules", "matrix")}
    all_probs, mask, hits, n_relevant, is_warm = component_candidates(models, without_ties, depth=3)
    task = make_eval_task(without_ties, "val")
    histories, relevant = (
        task.history.select(task.users),
        set(task.ground_truth.select("user", "item").rows()),
    )
    each = [component_probs(name, model, task.users, histories) for name, model in models.items()]
    seen = histories.to_sparse(without_ties.n_train_items).to_dense()
    for k, user in enumerate(task.users.tolist()):
        top = sorted({i for g in each for i in (g[k] - 1e9 * seen[k]).topk(3)[1].tolist()})
        open_ = mask[k] == 0
        assert torch.equal(
            all_probs[:, k, open_],
            torch.stack([g[k, [i for i in top if not seen[k, i]]] for g in each]),
        )
        assert hits[k].sum() == sum((user, i) in relevant for i in top) and n_relevant[k] == sum(
            u == user for u, _ in relevant
        )
    few = component_candidates(models, without_ties, max_users=5, depth=3)
    assert few[0].shape[1] == 5 and len(few[3]) == 5


def test_small_ranking_weights_are_left_out(without_ties):
    models = {
        name: fit_component(without_ties, name)
        for name in ("popularity", "matrix", "neighbors", "rules", "low-pass")
    }
    warm, only_cold_users, standalone, _ = fit_ranking_weights(models, without_ties, 0.0)
    min_weight = max(warm.values()) - 1e-3
    kept, *_ = fit_ranking_weights(models, without_ties, min_weight)
    assert list(warm) == list(models) and abs(sum(warm.values()) - 1) < 1e-3
    assert kept == {n: w for n, w in warm.items() if w >= min_weight} and len(kept) < len(warm)
    all_probs, mask, hits, n_relevant, is_warm = component_candidates(models, without_ties)

    def objective(blend, rows):
        return torch.stack(
            [
                ndcg(hits[r][(b + mask[r]).topk(20)[1]][None], n_relevant[r : r + 1], 20)[0]
                for b, r in zip(blend, rows)
            ]
        )

    weights, expected = list(warm.values()), select_by_loop(all_probs, objective, 0, 10, 8, 0)
    n_votes = 8 * 10  # of all bags; sums in another order break ties otherwise: two votes move
    assert np.allclose(weights, expected, atol=2.5 / n_votes)
    blends = [
        (torch.tensor(w).float()[:, None, None] * all_probs).sum(0) for w in (weights, expected)
    ]
    quality, expected_quality = [objective(b, range(len(b))).mean() for b in blends]
    assert abs(quality - expected_quality) < 0.002

    def evaluated(name):
        return eval_ranking(models[name], without_ties, "val", (20,)).users["NDCG@20"].mean()

    assert (
        list(standalone) == [*models, "hybrid"]
        and standalone["rules"] > 0
        and standalone["popularity"] == pytest.approx(evaluated("popularity"), abs=0.02)
    )


def test_rating_weights_are_by_group(split):
    models = {
        "ridge": fit_component(split, "ridge"),
        "network 1": fit_component(split, "network 1"),
        "network 2": fit_component(split, "network 2"),
    }
    weights = fit_rating_weights(models, split)
    user, item, y = [split.val[c].to_torch() for c in ("user", "item", "rating")]
    predicted = {
        n: m.predict(
            user.long(),
            item.long(),
            History.from_rows(split.rows_before("val"), len(split.users)).select(user.long()),
        ).double()
        for n, m in models.items()
    }
    expected = select_by_loop(
        torch.stack([predicted["ridge"], (predicted["network 1"] + predicted["network 2"]) / 2]),
        lambda blend, rows: -(blend - y[rows]).square(),
        2,
        10,
        8,
        0,
    )
    assert np.allclose(
        [weights["ridge"], weights["network 1"], weights["network 2"]],
        [expected[0], expected[1] / 2, expected[1] / 2],
        atol=1e-4,
    )
    assert (
        fit_rating_weights({}, split) == {}
        and fit_rating_weights(
            models, replace(split, val=split.val.with_columns(rating=pl.lit(None, pl.Float32)))
        )
        == {}
    )


def ids(split, part):
    return sorted(
        zip(
            split.users["user"].gather(getattr(split, part)["user"]),
            split.items["item"].gather(getattr(split, part)["item"]),
            getattr(split, part)["timestamp"],
        )
    )


@pytest.mark.parametrize("name", PROTOCOLS)
@pytest.mark.parametrize("seed", range(3))
def test_validation_rows_are_moved_from_training(name, seed):
    split = make_split(random_log(seed=seed), 0.9, 0, name)
    split = replace(split, val=split.val.clear(), filtered_out=split.test[:3])
    with_val = ensure_validation(split)
    assert ids(with_val, "train") != [] != ids(with_val, "val") and sorted(
        ids(with_val, "train") + ids(with_val, "val")
    ) == ids(split, "train")
    assert (
        len(with_val.test) == len(with_val.filtered_out) == 0
        and with_val.protocol == split.protocol
    )
    assert ids(ensure_validation(replace(split, test=split.test.clear())), "val") == ids(
        with_val, "val"
    )  # test rows change nothing
    assert sorted(with_val.train["user"].unique()) == [*all_users(with_val)] and sorted(
        with_val.train["item"].unique()
    ) == [*range(with_val.n_train_items)]
    rows, n = split.train.with_columns(pl.int_range(pl.len()).alias("row")), len(split.train)
    if split.protocol.split_by == "time":
        assert ids(with_val, "val") == ids(replace(split, val=split.train[int(0.9 * n) :]), "val")
    elif split.protocol.split_by == "leave-one-out":
        assert ids(with_val, "val") == ids(
            replace(
                split,
                val=rows.filter(pl.len().over("user") > 1)
                .group_by("user")
                .last()
                .select(split.train.columns),
            ),
            "val",
        )
    else:
        assert 0.08 < len(with_val.val) / n < 0.22
    assert ensure_validation(with_val) is with_val and ensure_validation(
        replace(split, val=split.train[:1])
    ).val.equals(split.train[:1])


def test_a_single_event_stays_in_training():
    "Check that the only event stays in training."
    for name in PROTOCOLS:
        split = make_split(random_log(rows=1), 1, 0, name)
        assert (
            len(ensure_validation(split).train) == 1 and len(ensure_validation(split).val) == 0
        ), name


# ---------------------------------------------------------------- components within a budget


def test_timestamps_are_dates_if_they_span_a_month(split):
    def with_span(days):
        return replace(
            split,
            train=split.train.with_columns(
                timestamp=(
                    10**12 + pl.int_range(pl.len()) * (days * 86_400_000) // (pl.len() - 1)
                ).cast(pl.Datetime("ms"))
            ),
        )

    dated = {n for n, p in RANKING_COMPONENTS.items() if p.needs_time}
    events = {
        n for n, p in RANKING_COMPONENTS.items() if p.recommender == "own-history"
    }  # none here

    def applicable(s):
        return events | {n for n in COMPONENTS if is_applicable(s, n)}

    assert (
        applicable(split) == applicable(with_span(30)) == set(COMPONENTS)
        and applicable(with_span(29)) == set(COMPONENTS) - dated
    )
    for rows in (
        split.train.with_columns(timestamp=None),
        split.train.with_columns(timestamp=pl.when(pl.int_range(pl.len()) > 0).then("timestamp")),
    ):
        assert (
            applicable(replace(split, train=rows.cast({"timestamp": pl.Datetime("ms")})))
            == set(COMPONENTS) - dated
        )
    assert applicable(with_category(make_split(random_log(stars=False)))) == set(
        RANKING_COMPONENTS
    ) and applicable(make_split(random_log(stars=False))) == set(RANKING_COMPONENTS) - {
        "content",
        "content towers",
    }


def test_components_that_share_a_model_have_the_same_settings():
    assert set(MODEL_KEY) == set(COMPONENTS) == RANKING_COMPONENTS.keys() | RATING_COMPONENTS.keys()
    for name, model in MODEL_KEY.items():
        assert MODEL_KEY[model] == model and (
            COMPONENTS[name].recommender,
            COMPONENTS[name].settings,
        ) == (COMPONENTS[model].recommender, COMPONENTS[model].settings)
    assert (
        len({MODEL_KEY[n] for n in RATING_COMPONENTS}) == len(RATING_COMPONENTS)
        and MODEL_KEY["matrix, recency-weighted"] == "matrix"
        and MODEL_KEY["recent neighbors"] == "recent neighbors"
    )


@pytest.fixture
def clock(monkeypatch):
    "Replace fits by fake ones that take given seconds, and record them."
    now = SimpleNamespace(seconds=0.0, one={}, fits=[])

    def fit(split, name, epochs=0, seed=0):
        now.fits.append((name, epochs))
        now.seconds += now.one.get(name, 1.0) * (epochs or MAX_EPOCHS.get(name, 1))
        return SimpleNamespace(
            name=COMPONENTS[name].recommender,
            loss_curve=[{"val": None}] * (epochs or MAX_EPOCHS.get(name, 1)),
        )

    for module in (hybrid_module, ensemble):
        monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: now.seconds))
        monkeypatch.setattr(module, "fit_component", fit)
    return now


@pytest.mark.parametrize(
    "seconds, epochs",
    [
        (-1.0, None),
        (0.0, None),
        (39.0, None),
        (40.0, 3),
        (75.0, 6),
        (109.0, 9),
        (110.0, 0),
        (10_000.0, 0),
    ],
)
def test_networks_get_as_many_epochs_as_fit(clock, split, monkeypatch, seconds, epochs):
    "Check that one epoch is tried, three more must fit, and all epochs use early stopping."
    monkeypatch.setitem(MAX_EPOCHS, "gru", 10)
    clock.one["gru"] = 10.0
    assert (fit_within_budget(split, "gru", seconds) is None) == (epochs is None)
    assert clock.fits == ([("gru", 1)] if seconds > 0 else []) + (
        [("gru", epochs)] if epochs is not None else []
    )
    assert clock.seconds <= max(seconds, 10.0)


def test_models_without_epochs_are_fitted_while_there_is_time(clock, split):
    assert (
        fit_within_budget(split, "matrix", 0.1)
        and fit_within_budget(split, "matrix", 0.0) is None
        and fit_within_budget(split, "matrix", -1.0) is None
    )
    assert fit_within_budget(split, "popularity", -1.0) and fit_within_budget(split, "ridge", -1.0)


@pytest.mark.parametrize("minutes", [0.0, 0.01, 1.0, 10.0, 60.0])
def test_choosing_keeps_to_the_time_budget(clock, split, monkeypatch, minutes):
    "Check the time budget: it is exceeded by one started fit at most."
    for name in MAX_EPOCHS:
        clock.one[name], MAX_EPOCHS[name] = 10.0, 2
    monkeypatch.setattr(
        hybrid_module,
        "fit_ranking_weights",
        lambda models, _: (dict.fromkeys(models, 1.0), {"popularity": 1.0}, {}, {}),
    )
    monkeypatch.setattr(
        hybrid_module, "fit_rating_weights", lambda models, split: {n: 1.0 for n in models}
    )
    plan, models = select_components(split, minutes)
    assert clock.seconds <= max(minutes * 60 + 10, 3) and plan["seconds"] == clock.seconds
    assert {"popularity", "ridge"} <= set(models) and set(plan["ranking"]) | set(
        plan["rating"]
    ) == {n for n in COMPONENTS if MODEL_KEY[n] in models}
    assert set(plan["epochs"]) == set(models) & set(MAX_EPOCHS)
    without_events = {MODEL_KEY[n] for n in COMPONENTS if is_applicable(split, n)}
    assert (minutes < 60) or set(models) == without_events
    assert minutes or set(models) == {"popularity", "ridge"}
    is_slow = [name in MAX_EPOCHS for name, _ in clock.fits]
    assert is_slow == sorted(is_slow)  # the slow ones come last


def test_best_epoch():
    def applicable(name, *values):
        return best_epoch(name, [{"val": v} for v in values])

    for name in SEQUENCE_MODELS:
        assert applicable(name, 0.1, 0.3, 0.2) == 2
    assert (
        applicable("wide-deep", 0.9, 0.7, 0.8) == 2
        and applicable("gru") == applicable("wide-deep") == 0
    )
    assert applicable("gru", None, None) == applicable("wide-deep", None, None) == 2


# ---------------------------------------------------------------- the hybrid

ALL = {
    "ranking": {n: round(1 / (k + 1), 3) for k, n in enumerate(RANKING_COMPONENTS)},
    "rating": {n: k + 1.0 for k, n in enumerate(RATING_COMPONENTS)},
    "epochs": dict.fromkeys(MAX_EPOCHS, 1),
}


def saved(model, tmp_path):
    model.save(tmp_path)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["model.json", "model.safetensors"]
    return load_recommender(tmp_path)


def same(a, b, split):
    "Return whether all scores and rating predictions of two models are equal, bit by bit."
    users = [*all_users(split)][:20] + [999]
    basket = history_of([split.n_train_items - 1, 0], [split.n_train_items], [])
    return (
        torch.equal(a.scores(users), b.scores(users))
        and torch.equal(a.scores([999] * 3, basket), b.scores([999] * 3, basket))
        and torch.equal(a.scores(users, items=[2, 999]), b.scores(users, items=[2, 999]))
        and a.predicts_ratings == b.predicts_ratings
        and (
            not a.predicts_ratings
            or torch.equal(a.predict(users, [1] * len(users)), b.predict(users, [1] * len(users)))
        )
    )


@pytest.fixture(scope="module")
def warm(split):
    return make_recommender("hybrid", plan=json.loads(json.dumps(ALL))).fit(split)


@pytest.fixture(scope="module")
def first(split):
    return make_recommender("hybrid").fit(split)


def test_the_ensemble_is_the_weighted_sum_of_its_components(warm, split):
    users, n = torch.tensor([0, 7, 30, 999]), split.n_train_items
    histories = warm.train_history.select(users)
    models = {name: fit_component(split, name, ALL["epochs"].get(name, 0)) for name in COMPONENTS}
    total = torch.zeros(4, n, dtype=torch.float64)
    for name, w in ALL["ranking"].items():
        part, model = RANKING_COMPONENTS[name], models[name]
        with torch.no_grad():
            standalone = (
                model._score_history(
                    recency_weights(histories, n)
                    if part.recency_weighted
                    else histories.to_sparse(n)
                ).clamp(min=0)
                if hasattr(model, "_score_history")
                else model.scores(users).clamp(min=0 if name == "content" else -torch.inf)
            )
        probs = (
            torch.softmax(standalone, 1)
            if name in MAX_EPOCHS
            else standalone / standalone.sum(1, keepdim=True).clamp(min=1e-12)
        )
        count = histories.indptr.diff()[:, None]
        total += (
            w
            * probs
            * (
                1
                if part.family == "popular"
                else (count > 0)
                if name in MAX_EPOCHS
                else count / (count + 10)
            )
        )
    assert np.allclose(warm.scores(users), total, atol=1e-5)
    assert torch.equal(
        warm.scores(users, items=[5, 2, n, n + 9]),
        torch.cat([warm.scores(users)[:, [5, 2]], torch.zeros(4, 2)], 1),
    )  # a new item has no probability
    items = torch.tensor([3, 1, 0, 2])
    stars = sum(w * models[name].predict(users, items) for name, w in ALL["rating"].items()) / sum(
        ALL["rating"].values()
    )
    assert (
        np.allclose(warm.predict(users, items), stars, atol=1e-5)
        and stars.min() >= 1
        and stars.max() <= 5
    )


def test_cold_users_get_what_is_popular(warm, split):
    "Check that cold-start users get no personal scores, except those of the content models."
    nobody = history_of([], [split.n_train_items])
    users = torch.tensor([999, 998])
    for name in RANKING_COMPONENTS:
        probs = component_probs(name, warm.models[MODEL_KEY[name]], users, nobody)
        assert torch.allclose(
            probs.sum(1),
            torch.ones(2)
            if RANKING_COMPONENTS[name].family == "popular" or name in ("towers", "content towers")
            else torch.zeros(2),
            atol=1e-5,
        ), name
    popular = {n: w for n, w in ALL["ranking"].items() if RANKING_COMPONENTS[n].family == "popular"}
    lists = {n: w for n, w in ALL["ranking"].items() if n not in ("towers", "content towers")}
    hybrid, popular_only = [
        make_recommender(
            "hybrid",
            plan={
                "ranking": weights,
                "rating": {},
                "epochs": {n: 1 for n in weights if n in MAX_EPOCHS},
            },
        )
        for weights in (lists, popular)
    ]
    for model in (hybrid, popular_only):
        model.fit(split)
    assert torch.equal(
        hybrid.scores(users, nobody), popular_only.scores(users, nobody)
    ) and not torch.equal(hybrid.scores([0]), popular_only.scores([0]))
    assert (
        hybrid.recommend([[]], k=5)["item"].to_list()
        == popular_only.recommend([[]], k=5)["item"].to_list()
    )


def test_every_component_is_saved_and_loaded_exactly(warm, split, tmp_path):
    loaded = saved(warm, tmp_path)
    assert (
        same(warm, loaded, split)
        and loaded.plan == warm.plan
        and list(loaded.models) == list(warm.models)
        and loaded.time_budget_min == warm.time_budget_min
    )


def toy_candidates(n_users, good, seed=0):
    """Make candidates of two components; `good` of them puts the relevant item first."""
    generator = torch.Generator().manual_seed(seed)
    hits = torch.zeros(n_users, 30, dtype=torch.bool)
    hits[torch.arange(n_users), torch.randint(30, (n_users,), generator=generator)] = True
    probs = torch.rand(2, n_users, 30, generator=generator)
    for k in good:
        probs[k] += 0.3 * hits
    ones = torch.ones(n_users)
    return ensemble.Candidates(probs, torch.zeros(n_users, 30), hits, ones.long(), ones.bool())


def test_the_gain_of_the_blend_is_measured_on_other_users():
    names = ["matrix", "popularity"]
    two_good = blend_gain(toy_candidates(400, (0, 1)), names, ["popularity"], 0.02)
    assert two_good["lo"] > 0 and two_good["n"] == 400
    # noise adds nothing, and fitted weights cannot pretend that it does
    noise = [blend_gain(toy_candidates(400, (), seed), names, [], 0.0) for seed in range(12)]
    assert abs(np.mean([gain["value"] for gain in noise])) < 0.01
    few = toy_candidates(2 * hybrid_module.MIN_USERS_TO_WEIGHT - 2, (0,))
    assert blend_gain(few, names, [], 0.02) == {}
    assert two_good == blend_gain(toy_candidates(400, (0, 1)), names, ["popularity"], 0.02)


@pytest.mark.parametrize(
    "lo, hi, phrase",
    [
        (0.01, 0.03, "better (NDCG@20)"),
        (-0.01, 0.03, "not proven"),
        (-0.03, -0.01, "Serve gru alone"),
    ],
)
def test_in_short_follows_the_gain(lo, hi, phrase):
    weights = pl.DataFrame(
        [("ranking", "matrix", "wide", 0.6), ("ranking", "gru", "deep", 0.4)],
        schema=["task", "component", "family", "weight"],
        orient="row",
    )
    gain = {"best": "gru", "value": (lo + hi) / 2, "lo": lo, "hi": hi, "n": 300}
    text = " ".join(hybrid_in_short(weights, gain, 2))
    assert phrase in text and "60 % models that count pairs" in text and "mean of 2 models" in text
    one_source = hybrid_in_short(weights[:1], None)
    assert "one source" in one_source[0] and "gain is unknown" in one_source[1]
    for sentences in (text, " ".join(one_source)):
        assert not re.search(r"nan|None|\(\)", sentences)


def test_a_plan_is_json_and_is_replayed_exactly(first, split, monkeypatch, tmp_path):
    "Check that a fit with a plan chooses nothing and gives the same model."
    plan = json.loads(json.dumps(first.plan))
    assert (
        plan == first.plan
        and set(plan)
        == {
            "ranking",
            "cold_users",
            "rating",
            "cold_items",
            "epochs",
            "standalone",
            "gain",
            "seconds",
        }
        and 1 - 0.02 * len(RANKING_COMPONENTS) < sum(plan["ranking"].values()) < 1.011
        and abs(sum(plan["rating"].values()) - 1) < 1e-2
    )
    assert all(w >= 0.02 for n, w in plan["ranking"].items() if n != "popularity") and set(
        plan["epochs"]
    ) == {
        n
        for n in MAX_EPOCHS
        if any(
            n in plan[applicable]
            for applicable in ("ranking", "cold_users", "cold_items", "rating")
        )
    }
    monkeypatch.setattr(
        hybrid_module, "select_components", lambda *a: pytest.fail("it chose a plan")
    )
    again = make_recommender("hybrid", plan=plan).fit(split)
    assert (
        same(first, again, split)
        and again.plan == first.plan
        and set(again.models) == set(first.models)
    )
    assert same(first, saved(first, tmp_path), split)
    final = make_recommender("hybrid", plan=plan).fit(
        split.for_final_fit()
    )  # and on other rows, which have no validation part
    assert (
        final.plan == plan
        and not len(split.for_final_fit().val)
        and torch.isfinite(final.scores(range(5))).all()
    )


@pytest.mark.parametrize("name", sorted(MAX_EPOCHS))
def test_the_best_number_of_epochs_is_replayed(name, split, monkeypatch):
    "Check that a fit with the best number of epochs equals the early-stopped fit."
    monkeypatch.setitem(MAX_EPOCHS, name, 9)
    chosen = fit_component(split, name)
    again = fit_component(split, name, best_epoch(chosen.name, chosen.loss_curve))
    one = [m._state() for m in (chosen, again)]
    assert (
        all(torch.equal(one[0][k], one[1][k]) for k in one[0] | one[1])
        and 1 <= best_epoch(chosen.name, chosen.loss_curve) <= 9
    )
    assert len(fit_component(split, name, 4).loss_curve) <= 4


def test_same_seed_same_ensemble_and_test_rows_change_nothing(first, split):
    torch.manual_seed(5)
    poisoned = replace(
        split,
        test=split.test.with_columns(
            item=pl.col("item").reverse(),
            rating=pl.lit(1.0, pl.Float32),
            timestamp=pl.col("timestamp").min(),
        ),
    )
    again = make_recommender("hybrid").fit(poisoned)

    def clean(plan):
        return {k: v for k, v in plan.items() if k != "seconds"}

    assert clean(again.plan) == clean(first.plan) and same(first, again, split)
    drawn = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(1))  # the global generator is unchanged
    other = make_recommender(
        "hybrid",
        seed=3,
        plan={
            "ranking": {"gru": 1.0},
            "rating": {"network 1": 1.0},
            "epochs": {"gru": 1, "network 1": 1},
        },
    )
    own = make_recommender("hybrid", plan=other.plan)
    assert not torch.equal(other.fit(split).scores([0]), own.fit(split).scores([0]))


def test_networks_have_different_seeds(warm):
    weights = [
        torch.cat([p.flatten() for p in warm.models[n].net.parameters()])
        for n in RATING_COMPONENTS
        if n.startswith("network")
    ]
    assert len(weights) == 4 and all(
        not torch.equal(a, b) for k, a in enumerate(weights) for b in weights[:k]
    )
    assert [warm.models[f"network {k}"].seed for k in (1, 2, 3, 4)] == [1, 2, 3, 4]


def test_a_basket_is_answered(first, split):
    ids = split.items["item"][: split.n_train_items]
    rows = first.recommend([[ids[3], ids[0], "unheard of"], {ids[1]: 5.0, ids[2]: 1.0}, []], k=6)
    lists = rows.group_by("user", maintain_order=True).agg("item")["item"].to_list()
    assert (
        [len(items) for items in lists] == [6] * 3
        and not {ids[3], ids[0]} & set(lists[0])
        and not {ids[1], ids[2]} & set(lists[1])
    )
    expected = first.scores([999], history_of([3, 0]))[0]
    assert np.allclose(
        rows.filter(pl.col("user") == "basket 1")["score"],
        sorted(
            (expected[i].item() for i in range(split.n_train_items) if i not in (0, 3)),
            reverse=True,
        )[:6],
        atol=1e-6,
    )
    assert not torch.allclose(
        first.scores([999], history_of([3, 0])), first.scores([999], history_of([2, 1])), atol=1e-3
    )


def positions():
    "Return a leave-one-out split of a log whose timestamps are positions in a history."
    position = random_log().with_columns(
        place=pl.int_range(pl.len(), 0, -1).over("user"),
        timestamp=pl.int_range(1, pl.len() + 1).over("user").cast(pl.Datetime("ms")),
    )
    return Split.from_frames(
        *[
            position.filter(p).drop("place")
            for p in (pl.col("place") > 2, pl.col("place") == 2, pl.col("place") == 1)
        ],
        protocol=PROTOCOLS["leave-one-out"],
    )


def only_cold_users(log=random_log()):
    return Split.from_frames(
        log[:300], log[300:350].with_columns(user=pl.lit("new ") + pl.col("user")), log[350:]
    )


KINDS = {
    "without stars": lambda: make_split(random_log(stars=False)),
    "without times": lambda: make_split(random_log(times=False)),
    "with some stars": lambda: make_split(
        random_log().with_columns(rating=pl.when(pl.int_range(pl.len()) % 3 == 0).then("rating"))
    ),
    "cold users": only_cold_users,
    "positions": positions,
    "one user": lambda: make_split(random_log(users=1, rows=60)),
    "one item": lambda: make_split(random_log(items=1, rows=60)),
    "new items": lambda: Split.from_frames(
        (log := random_log())[:300],
        log[300:350].with_columns(item=pl.lit("new ") + pl.col("item")),
        log[350:],
    ),
    "no validation": lambda: make_split(random_log(), 0.9, 0),
    "given": lambda: make_split(random_log(stars=False), 0.9, 0, "given"),
    "one row": lambda: make_split(random_log(rows=1), 1, 0),
}


@pytest.mark.filterwarnings("ignore:std_mean")
@pytest.mark.parametrize("kind", KINDS)
def test_it_fits_any_log(kind, tmp_path):
    "Check that the ensemble fits any log without arguments."
    split = KINDS[kind]()
    model = make_recommender("hybrid").fit(split)
    lists, stars = model.plan["ranking"], model.plan["rating"]
    assert (
        json.loads(json.dumps(model.plan)) == model.plan
        and lists
        and min(lists.values()) > 0
        and model.plan["cold_users"]
        and all(RANKING_COMPONENTS[n].family == "popular" for n in model.plan["cold_users"])
    )
    assert all(
        is_applicable(split, n) for n in [*lists, *stars]
    ) and model.predicts_ratings == split.has_ratings == bool(stars)
    scores = model.scores([0, 999])
    assert (
        torch.isfinite(scores).all()
        and scores.shape == (2, split.n_train_items)
        and scores[1].max() > 0
    )
    assert len(model.recommend([[split.items["item"][0]], []], k=3)) >= 1
    eval_ranking(model, split, "test", (20,))
    if split.has_ratings:
        assert ((stars := model.predict([0, 999], [0, 999])) >= 1).all() and (stars <= 5).all()
    assert same(model, saved(model, tmp_path), split)
    if kind == "positions":
        assert not any(RANKING_COMPONENTS[n].needs_time for n in lists)
    if kind == "cold users":
        assert set(lists.values()) == {1.0} and not set(model.plan["cold_users"].values()) & {
            1.0 / 3
        }  # too few warm users to choose weights for; cold-start users have weights of their own
    if kind in ("new items", "one user"):
        assert set(lists) >= {"popularity", "matrix", "neighbors", "low-pass"} and set(
            lists.values()
        ) == {1.0}  # no users to validate on


@pytest.mark.parametrize("minutes", [0.0, 0.01])
def test_a_tiny_time_budget_still_gives_a_ranking_and_ratings(split, minutes):
    model = make_recommender("hybrid", time_budget_min=minutes).fit(split)
    assert (
        set(model.plan["ranking"]) >= ({"popularity"} if not minutes else set())
        and "ridge" in model.plan["rating"]
    )
    if not minutes:
        assert (
            model.plan["ranking"] == {"popularity": 1.0}
            and model.plan["rating"] == {"ridge": 1.0}
            and not model.plan["epochs"]
        )
    assert (
        len(eval_ranking(model, split, "val", (20,)).users) > 5
        and model.predict([0], [0]).isfinite().all()
    )


def test_without_validation_it_chooses_on_training_rows_and_refits(monkeypatch):
    split, calls = make_split(random_log(stars=False), 0.9, 0), []

    def choose(split, minutes, seed, _):
        calls.append((split, minutes, seed))
        plan, models = (
            ensemble.fill_plan_defaults({"ranking": {"matrix": 0.5, "popularity": 0.5}}),
            {n: fit_component(split, n) for n in ("matrix", "popularity")},
        )
        return plan, models

    monkeypatch.setattr(hybrid_module, "select_components", choose)
    model = make_recommender("hybrid", time_budget_min=3.0, seed=8).fit(split)
    ((on, minutes, seed),) = calls
    assert (
        ids(on, "val") == ids(ensure_validation(split), "val")
        and (minutes, seed) == (1.5, 8)
        and len(model.models["matrix"].train_history.item) == len(split.train) > len(on.train)
    )
    assert same(model, make_recommender("hybrid", plan=model.plan).fit(split), split)
    with_validation = make_split(random_log(stars=False))
    with_val = []
    for module in (hybrid_module, ensemble):
        monkeypatch.setattr(
            module, "fit_component", lambda *a: with_val.append(a[1]) or fit_component(*a)
        )
    again = make_recommender("hybrid").fit(with_validation)
    assert (
        not with_val and again.models["matrix"].n_items == with_validation.n_train_items
    )  # what was fitted for the choice is kept


def test_a_large_catalog_takes_no_square_matrix(tmp_path):
    "Check the peak memory with 15,000 items: an item-item matrix would take 900 MB."
    code = """
import resource
import sys

sys.path.insert(0, sys.argv[1])
import numpy as np
import polars as pl
import torch
from widedeep_nb import Split, make_recommender
from widedeep_nb.lib.core import to_interactions


def peak():
    unit = 2 ** (20 if sys.platform == 'darwin' else 10)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


rng, n = np.random.default_rng(0), 30_000
items = np.r_[np.arange(15_000), (15_000 * rng.random(n - 15_000) ** 2).astype(int)]
users = rng.integers(5000, size=n)
columns = {'user': [f'u{u}' for u in users], 'item': [f'i{i}' for i in items]}
timestamp = 10**12 + np.sort(rng.integers(0, 10**10 * 3, n))
log = to_interactions(pl.DataFrame(columns | {'timestamp': timestamp}))
split = Split.from_frames(log, log[:0], log[:0])
before = peak()
for name in ('wide-matrix', 'wide-neighbours', 'wide-rules', 'wide-next', 'low-pass'):
    options = {'max_items': 500} if name == 'wide-matrix' else {}
    model = make_recommender(name, **options).fit(split)
    assert model.n_items == 15_000, name
    assert torch.isfinite(model.scores(range(50))).all(), name
    assert max(t.numel() for t in model._state().values()) < 2_000_000, name
print(peak() - before)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(hybrid_module.__file__).rsplit("/", 2)[0]],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and float(done.stdout) < 300, done.stdout + done.stderr
