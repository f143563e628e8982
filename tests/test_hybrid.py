"The hybrid: each part against a slower way to the same, the choice of weights, the budget, and a plan that is replayed to the last digit."

import json
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

from widedeep_nb import hybrid
from widedeep_nb.core import (
    PROTOCOLS,
    History,
    Split,
    UserError,
    load_recommender,
    make_recommender,
    to_interactions,
)
from widedeep_nb.evaluation import eval_ranking, make_eval_task, ndcg
from widedeep_nb.hybrid import (
    COMPONENTS,
    MAX_EPOCHS,
    MODEL_KEY,
    RANKING_COMPONENTS,
    RATING_COMPONENTS,
    SparseItemModel,
    best_epoch,
    component_candidates,
    component_probs,
    ensemble_selection,
    ensure_validation,
    fit_component,
    fit_ranking_weights,
    fit_rating_weights,
    fit_within_budget,
    history_confidence,
    is_applicable,
    normalize_scores,
    recency_weights,
    select_components,
    top_k_product,
)
from widedeep_nb.sequence import SEQUENCE_MODELS

MONTHS = 12 * 30 * 86_400_000  # a year of thirties, in milliseconds


@pytest.fixture(scope="module", autouse=True)
def two_passes():
    "Of whatever learns in passes; and five people are enough to choose for."
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hybrid, "MIN_USERS_TO_WEIGHT", 5)
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


def split_of(log, train=0.8, val=0.1, protocol="strict"):
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


def everybody(split):
    return range(split.n_train_users)


def told(split):
    return replace(
        split,
        items=split.items.with_columns(
            category="A > B" + (pl.int_range(pl.len()) % 4).cast(pl.String)
        ),
    )


@pytest.fixture(scope="module")
def split():
    return told(split_of(random_log()))


# ---------------------------------------------------------------- shares and histories

tables = arrays(
    np.float32,
    st.tuples(st.integers(1, 4), st.integers(1, 7)),
    elements=st.integers(-300, 300).map(lambda x: np.float32(x / 100)),
).map(torch.from_numpy)
histories = st.lists(st.lists(st.integers(0, 11), max_size=9), min_size=1, max_size=5)


@settings(max_examples=80, deadline=None)
@given(scores=tables, times=st.integers(1, 50))
def test_a_share_is_a_part_of_one(scores, times):
    got = normalize_scores(scores)
    for row, mine in zip(scores.tolist(), got.tolist()):
        whole = sum(x for x in row if x > 0)
        assert np.allclose(mine, [x / whole if x > 0 else 0 for x in row], atol=1e-6)
    assert torch.allclose(
        normalize_scores(scores * times), got, atol=1e-6
    )  # whatever unit a part counts in


@settings(max_examples=80, deadline=None)
@given(scores=tables, shift=st.integers(-20, 20))
def test_a_soft_share_is_a_softmax(scores, shift):
    got = normalize_scores(scores, softmax=True)
    e = np.exp(scores.double().numpy())
    assert np.allclose(got, e / e.sum(1, keepdims=True), atol=1e-6) and (got > 0).all()
    assert torch.allclose(normalize_scores(scores + shift, softmax=True), got, atol=1e-5)


@settings(max_examples=80, deadline=None)
@given(lists=histories, n_items=st.integers(1, 12), steps=st.sampled_from([0.5, 3.0, 100.0]))
def test_what_fades_is_the_plain_loop(lists, n_items, steps):
    "Repeats add up to one at most; an item that nobody knows counts as an event, for time has passed."
    want = np.zeros((len(lists), n_items))
    for u, items in enumerate(lists):
        for place, item in enumerate(items):
            if item < n_items:
                want[u, item] += np.exp(-(len(items) - 1 - place) / steps)
    got = recency_weights(history_of(*lists), n_items, steps)
    assert got.is_coalesced() and np.allclose(got.to_dense(), np.minimum(want, 1), atol=1e-6)


@settings(max_examples=50, deadline=None)
@given(lists=histories, n_items=st.integers(1, 12))
def test_who_fades_endlessly_slowly_does_not(lists, n_items):
    have = history_of(*lists)
    assert torch.allclose(
        recency_weights(have, n_items, 1e9).to_dense(),
        have.to_sparse(n_items).to_dense(),
        atol=1e-6,
    )


@settings(max_examples=80, deadline=None)
@given(lists=histories, n_items=st.integers(1, 12), half=st.sampled_from([1.0, 10.0]))
def test_trust_counts_known_events(lists, n_items, half):
    counts = [sum(i < n_items for i in items) for items in lists]
    got = history_confidence(history_of(*lists), n_items, half)
    assert np.allclose(got[:, 0], [c / (c + half) for c in counts]) and got.shape == (len(lists), 1)
    more = history_confidence(history_of(*[items + [0] for items in lists]), n_items, half)
    assert (more > got).all() and (more < 1).all()


# ---------------------------------------------------------------- wide parts


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
        model.scores(everybody(split))[T.sum(1) > 0], (X @ W)[T.sum(1) > 0], atol=2e-4
    )
    assert max(t.numel() for t in model._state().values()) <= max(len(top) ** 2, X.shape[1] + 1)
    if max_items == 6:
        assert top != list(
            range(6)
        )  # they are not simply the first: codes go by events, and some people have things twice


def test_wide_matrix_without_its_changes_is_ease(split):
    events = len(split.train.unique(["user", "item"]))
    plain = make_recommender(
        "wide-matrix", reg=(9 - 1e-3) * 250_000 / events, dropout=0.0, beta=0.0, alpha=0.0
    ).fit(split)
    assert torch.allclose(
        plain.scores(everybody(split)),
        make_recommender("ease", reg=9.0).fit(split).scores(everybody(split)),
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
def test_strongest_is_dense_algebra(shape, seed, fill, most, budget, whole):
    "Whole numbers make ties: which of the equal are kept is open, how many and how large they are is not; a budget changes nothing."
    rng = np.random.default_rng(seed)
    left, right = [
        (rng.integers(1, 4, shape) if whole else rng.random(shape)) * (rng.random(shape) < fill)
        for _ in range(2)
    ]
    dense = left.T @ right
    np.fill_diagonal(dense, 0)
    got = top_k_product(
        sp.csr_array(left.astype(float)), sp.csr_array(right.astype(float)), most, budget
    )
    again = top_k_product(sp.csr_array(left.astype(float)), sp.csr_array(right.astype(float)), most)
    assert (
        got.shape == dense.shape
        and np.array_equal(got.toarray(), again.toarray())
        and (got.data != 0).all()
    )
    got = got.toarray()
    for row, want in zip(got, dense):
        assert np.allclose(row[row > 0], want[row > 0])
        assert (
            np.allclose(np.sort(row)[::-1][:most], np.sort(want)[::-1][:most])
            and (row > 0).sum() <= most
        )


def test_strongest_of_nothing_and_of_one_person():
    nothing, one = sp.csr_array((3, 4)), sp.csr_array(np.array([[1.0, 0, 1, 1]]))
    assert top_k_product(nothing, nothing, 2).toarray().tolist() == [[0.0] * 4] * 4
    assert top_k_product(one, one, 9, budget=2).toarray().tolist() == [
        [0, 0, 1, 1],
        [0, 0, 0, 0],
        [1, 0, 0, 1],
        [1, 0, 1, 0],
    ]


def scores_by(weights, split):
    "By a table of weights {(from, to): weight}, for everybody."
    had = [{i for u, i, _ in rows_of(split) if u == user} for user in everybody(split)]
    return [
        [sum(weights.get((a, b), 0) for a in mine) for b in range(split.n_train_items)]
        for mine in had
    ]


def largest(weights, n, most):
    "Of each row."
    return {
        (a, b): w
        for a in range(n)
        for b, w in sorted(
            ((b, w) for (x, b), w in weights.items() if x == a), key=lambda p: -p[1]
        )[:most]
    }


@pytest.mark.parametrize("most", [3, 300])
@pytest.mark.parametrize(
    "days, how", [(0.0, {}), (90.0, {}), (20.0, {"own": 1.0, "other": 0.0, "size": 1.0})]
)
def test_wide_neighbours_is_the_plain_loop(split, days, how, most, monkeypatch):
    monkeypatch.setattr(SparseItemModel, "most", most)
    model, rows = make_recommender("wide-neighbours", days=days, **how).fit(split), rows_of(split)
    end, baskets, fresh = max(t for *_, t in rows), {}, {}
    for u, i, t in rows:
        baskets.setdefault(u, set()).add(i)
        fresh[u, i] = min(
            1, fresh.get((u, i), 0) + (np.exp(-(end - t) / 86_400_000 / days) if days else 1)
        )
    takers = [sum(i in b for b in baskets.values()) for i in range(split.n_train_items)]
    weights = {}
    for u, basket in baskets.items():
        for a in basket:
            for b in basket - {a}:
                weights[a, b] = (
                    weights.get((a, b), 0)
                    + len(basket) ** -model.size
                    * takers[a] ** -model.own
                    * takers[b] ** -model.other
                    * fresh[u, b]
                )
    assert np.allclose(
        model.scores(everybody(split)),
        scores_by(largest(weights, split.n_train_items, most), split),
        atol=1e-5,
    )


def test_without_a_date_for_everything_all_company_is_alike():
    log = random_log()
    for gap in (
        log.with_columns(timestamp=None),
        log.with_columns(
            timestamp=pl.when(pl.int_range(pl.len()) == 7).then(None).otherwise("timestamp")
        ),
    ):
        split = split_of(to_interactions(gap))
        dated, plain = [
            make_recommender("wide-neighbours", days=d).fit(split).scores(everybody(split))
            for d in (30.0, 0.0)
        ]
        assert torch.equal(dated, plain)


@pytest.mark.parametrize("damping", [0.0, 10.0])
def test_wide_rules_are_counted(split, damping):
    baskets = [{i for u, i, _ in rows_of(split) if u == user} for user in everybody(split)]
    n = range(split.n_train_items)
    both = {(a, b): sum({a, b} <= basket for basket in baskets) for a in n for b in n if a != b}
    weights = {
        (a, b): max(c - 1, 0) / (sum(a in basket for basket in baskets) + damping)
        for (a, b), c in both.items()
    }
    assert np.allclose(
        make_recommender("wide-rules", damping=damping).fit(split).scores(everybody(split)),
        scores_by(weights, split),
        atol=1e-5,
    )


@pytest.mark.parametrize(
    "how", [{}, {"steps": 1}, {"steps": 40, "decay": 0.9, "own": 0.0, "other": 1.0}]
)
def test_wide_next_is_the_plain_loop(split, how):
    model, weights = make_recommender("wide-next", **how).fit(split), {}
    takers = binary(split).sum(0)
    for user in everybody(split):
        mine = [i for u, i, _ in rows_of(split) if u == user]
        for place, a in enumerate(mine):
            for d, b in enumerate(mine[place + 1 : place + 1 + model.steps]):
                if a != b:
                    weights[a, b] = (
                        weights.get((a, b), 0)
                        + model.decay**d * takers[a] ** -model.own * takers[b] ** -model.other
                    )
    assert np.allclose(model.scores(everybody(split)), scores_by(weights, split), atol=1e-5)


def test_wide_next_knows_the_direction(split):
    "Of a log that goes round, the next one is expected and not the one before."
    log = to_interactions(
        pl.DataFrame(
            [(f"u{u}", f"i{(u + t) % 9}", t + 1) for u in range(30) for t in range(5)],
            schema=["user", "item", "timestamp"],
            orient="row",
        )
    )
    model = make_recommender("wide-next", steps=1).fit(split_of(log, 1, 0))
    assert model.recommend([["i3"], ["i8"]], k=1)["item"].to_list() == ["i4", "i0"]


# ---------------------------------------------------------------- the low pass


def low_pass(X, factors, lift):
    size, taken = np.maximum(X.sum(1), 1), X.sum(0)
    _, value, V = np.linalg.svd(np.diag(size**-0.5) @ X @ np.diag(taken**-0.5), full_matrices=False)
    V = V[:factors][value[:factors] > 1e-9]
    return np.diag(taken**-0.5) @ V.T @ V @ np.diag(taken**lift)


@pytest.mark.parametrize("popularity_power", [0.0, 0.4])
def test_low_pass_with_all_factors_is_numpys(split, lift):
    model = make_recommender("low-pass", factors=999, popularity_power=lift).fit(split)
    assert np.allclose(model.into @ model.out.T, low_pass(binary(split), 999, lift), atol=1e-3)


def test_low_pass_with_some_factors_keeps_the_largest():
    "Three kinds of people with a little noise: three directions, found as by numpy."
    rng = np.random.default_rng(0)
    rows = {(u, 10 * (u % 3) + int(i)) for u in range(90) for i in rng.choice(10, 7, False)} | {
        (int(u), int(i)) for u, i in zip(rng.integers(90, size=20), rng.integers(30, size=20))
    }
    split = split_of(
        to_interactions(
            pl.DataFrame(
                [(f"u{u}", f"i{i}") for u, i in sorted(rows)], schema=["user", "item"], orient="row"
            )
        ),
        1,
        0,
    )
    model, X = make_recommender("low-pass", factors=3).fit(split), binary(split)
    assert np.allclose(model.scores(everybody(split)), X @ low_pass(X, 3, 0.4), atol=2e-2)


def test_low_pass_lets_through_nothing_that_nobody_does():
    "Two things that are always taken together leave a direction empty; a basket with one of them must not be answered from it."
    pairs = [(f"u{u}", f"{x}{u % 3}") for u in range(12) for x in "ab"]
    split = split_of(
        to_interactions(pl.DataFrame(pairs, schema=["user", "item"], orient="row")), 1, 0
    )
    model = make_recommender("low-pass", factors=64).fit(split)
    assert np.allclose(model.into @ model.out.T, low_pass(binary(split), 64, 0.4), atol=1e-3)


# ---------------------------------------------------------------- stars


@pytest.mark.parametrize("leaves", [2, 9, 40, 62])
def test_trees_are_scikit_learns(leaves):
    "Deep and shallow trees side by side, on new rows and on rows at the very thresholds."
    rng = np.random.default_rng(0)
    x = rng.integers(0, 12, (400, 6)) / 4
    y = x[:, 0] * x[:, 1] - (x[:, 2] > 1) + rng.normal(0, 0.1, 400)
    model = make_recommender(
        "trees", period_starts=3, max_iter=20, max_leaf_nodes=leaves, min_samples_leaf=5, seed=4
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
        want = np.mean([t.predict(rows) for t in theirs], 0)
        assert np.allclose(model._score_history(rows), want, rtol=0, atol=1e-12) and np.allclose(
            model._score_history(rows, block=7), want, rtol=0, atol=1e-12
        )
    assert np.ptp(model._score_history(x)) > 1 or leaves == 2
    assert len(model._score_history(x[:0])) == 0


def test_trees_without_a_test():
    "Where nothing can be told apart a tree is one leaf."
    model = make_recommender("trees", period_starts=1, max_iter=3)
    model._fit_matrix(np.zeros((50, 2)), np.arange(50.0))
    assert np.allclose(model._score_history(np.ones((3, 2))), 24.5)
    with pytest.raises(UserError, match="62 leaves"):
        make_recommender("trees", max_leaf_nodes=63)._fit_matrix(np.zeros((50, 2)), np.arange(50.0))


def test_ridge_is_scikit_learns():
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
                model._score_history(rows), theirs.predict((rows - mean) / scale), atol=1e-5
            )


@pytest.mark.parametrize("name, how", [("ridge", {}), ("trees", {"least": 20})])
@pytest.mark.parametrize("times", [True, False])
def test_stars_from_statistics_saved_and_loaded(name, how, times, tmp_path):
    split = split_of(random_log(times=times))
    model = make_recommender(name, **how).fit(split)
    ask = (
        [*everybody(split)][:9] + [999, 999],
        [*range(9)] + [3, split.n_train_items + 5],
    )  # a stranger, and a thing that nobody knows
    model.save(tmp_path)
    back = load_recommender(tmp_path)
    stars = model.predict(*ask)
    assert (
        torch.equal(back.predict(*ask), stars)
        and torch.isfinite(stars).all()
        and stars.unique().numel() > 3
    )
    assert torch.equal(back.scores([0, 5, 999]), model.scores([0, 5, 999]))
    assert sorted(f.name for f in tmp_path.iterdir()) == ["model.json", "model.safetensors"]


@pytest.mark.parametrize("name", ["ridge", "trees"])
def test_stars_from_statistics_find_what_was_planted(name):
    "Good and bad things, kind and strict people."
    rng = np.random.default_rng(0)
    user, item = rng.integers(0, 60, 3000), rng.integers(0, 30, 3000)
    stars = np.clip(
        np.round(3 + (item % 3 - 1) + (user % 3 - 1) * 0.7 + rng.normal(0, 0.4, 3000)), 1, 5
    )
    split = split_of(
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


# ---------------------------------------------------------------- who counts how much


def by_hand(parts, worth, first, steps, bags, seed):
    "Ensemble selection in plain Python."
    draw, found = torch.Generator().manual_seed(seed), []
    for _ in range(bags):
        rows = torch.randint(parts.shape[1], (parts.shape[1],), generator=draw)
        units, path = [first] * len(parts), []
        for _ in range(steps):
            tried = []
            for k in range(len(parts)):
                with_k = [u + (j == k) for j, u in enumerate(units)]
                blend = sum(u * part[rows] for u, part in zip(with_k, parts)) / sum(with_k)
                tried.append((float(worth(blend, rows).mean()), with_k))
            value, units = max(tried, key=lambda t: t[0])
            path.append((value, units))
        best = max(path, key=lambda p: p[0])[1]
        found.append([u / sum(best) for u in best])
    return [sum(w) / bags for w in zip(*found)]


def voices(n=60, k=4, seed=0):
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
def test_selection_is_the_plain_loop(seed, first, steps, bags, k):
    truth, parts = voices(k=k, seed=seed)

    def worth(blend, rows):
        return -(blend - truth[rows]).square()

    got = ensemble_selection(parts, worth, first, steps, bags, seed)
    assert np.allclose(got, by_hand(parts, worth, first, steps, bags, seed), atol=1e-9)
    assert abs(sum(got) - 1) < 1e-9 and min(got) >= first / (first * k + steps) - 1e-9
    assert got == ensemble_selection(parts, worth, first, steps, bags, seed)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 99), steps=st.integers(1, 6))
def test_a_blend_is_on_its_people_no_worse_than_the_best_alone(seed, steps):
    "On the people drawn, and of one path: the first unit goes to the best, and the best of the path is kept."
    truth, parts = voices(seed=seed)
    rows = torch.randint(60, (60,), generator=torch.Generator().manual_seed(seed))

    def cost(blend):
        return float((blend[rows] - truth[rows]).square().mean())

    weights = torch.tensor(
        ensemble_selection(
            parts, lambda blend, rows: -(blend - truth[rows]).square(), 0, steps, 1, seed
        )
    )
    assert cost((weights[:, None] * parts).sum(0)) <= min(map(cost, parts)) + 1e-12


def test_the_truth_gets_everything():
    truth, parts = voices()
    assert ensemble_selection(
        torch.stack([parts[0], truth, parts[1]]),
        lambda blend, rows: -(blend - truth[rows]).square(),
    ) == [0, 1, 0]


@pytest.fixture(scope="module")
def uneven():
    "Every thing with another number of takers, so that no two are alike."
    rng = np.random.default_rng(0)
    rows = [(f"u{u}", f"i{i:02d}") for i in range(25) for u in rng.choice(40, 4 + i, False)]
    rows = [rows[k] for k in rng.permutation(len(rows))]
    log = to_interactions(
        pl.DataFrame(rows, schema=["user", "item"], orient="row").with_columns(
            timestamp=10**12 + np.arange(len(rows)) * 10**8
        )
    )
    return split_of(log, 0.75, 0.15)


@pytest.mark.parametrize("protocol", ["strict", "as-reported", "given"])
def test_candidates_that_are_all_items_are_the_hybrids_lists(uneven, protocol):
    "What is chosen on is what is judged: scores, what is barred, hits and NDCG@20; lists that repeat what one has, too."
    split = replace(uneven, protocol=PROTOCOLS[protocol])
    weights = {
        "popularity": 0.07,
        "matrix, recency-weighted": 0.4,
        "neighbors": 0.2,
        "low-pass": 0.33,
    }
    models = {name: fit_component(split, name) for name in weights}
    hybrid, question, n = (
        make_recommender("hybrid", plan={"ranking": weights, "rating": {}, "epochs": {}}).fit(
            split
        ),
        make_eval_task(split, "val"),
        split.n_train_items,
    )
    shares, barred, hits, to_find, known = component_candidates(models, split, depth=n)
    blend = sum(w * s for w, s in zip(weights.values(), shares))
    first = (torch.arange(4 * n) % 4 == 0).expand(
        len(hits), -1
    )  # each item stands there four times, side by side
    had = question.history.select(question.users)
    assert torch.allclose(blend[first].view(-1, n), hybrid.scores(question.users, had), atol=1e-6)
    assert (barred[~first] == -torch.inf).all() and not hits[
        ~first
    ].any()  # four parts name each item, and it counts once
    assert torch.equal(
        barred[first].view(-1, n) == -torch.inf,
        had.to_sparse(n).to_dense().bool() & split.protocol.mask_seen,
    )
    mine = ndcg(hits.gather(1, (blend + barred).topk(20, 1)[1]), to_find, 20)
    theirs = eval_ranking(hybrid, split, "val", (20,)).users
    assert (
        theirs["user"].to_list() == question.users.tolist()
        and np.allclose(theirs["NDCG@20"], mine)
        and mine.mean() > 0
    )


def test_candidates_are_what_some_part_has_first(uneven):
    models = {name: fit_component(uneven, name) for name in ("popularity", "rules", "matrix")}
    shares, barred, hits, to_find, known = component_candidates(models, uneven, depth=3)
    question = make_eval_task(uneven, "val")
    had, right = (
        question.history.select(question.users),
        set(question.ground_truth.select("user", "item").rows()),
    )
    each = [component_probs(name, model, question.users, had) for name, model in models.items()]
    seen = had.to_sparse(uneven.n_train_items).to_dense()
    for k, user in enumerate(question.users.tolist()):
        top = sorted({i for g in each for i in (g[k] - 1e9 * seen[k]).topk(3)[1].tolist()})
        open_ = barred[k] == 0
        assert torch.equal(
            shares[:, k, open_],
            torch.stack([g[k, [i for i in top if not seen[k, i]]] for g in each]),
        )
        assert hits[k].sum() == sum((user, i) in right for i in top) and to_find[k] == sum(
            u == user for u, _ in right
        )
    few = component_candidates(models, uneven, max_users=5, depth=3)
    assert few[0].shape[1] == 5 and len(few[3]) == 5


def test_weights_of_lists_leave_out_what_is_small(uneven):
    models = {
        name: fit_component(uneven, name)
        for name in ("popularity", "matrix", "neighbors", "rules", "low-pass")
    }
    every, strangers, alone = fit_ranking_weights(models, uneven, 0.0)
    least = max(every.values()) - 1e-3
    some, *_ = fit_ranking_weights(models, uneven, least)
    assert list(every) == list(models) and abs(sum(every.values()) - 1) < 1e-3
    assert some == {n: w for n, w in every.items() if w >= least} and len(some) < len(every)
    shares, barred, hits, to_find, known = component_candidates(models, uneven)

    def worth(blend, rows):
        return torch.stack(
            [
                ndcg(hits[r][(b + barred[r]).topk(20)[1]][None], to_find[r : r + 1], 20)[0]
                for b, r in zip(blend, rows)
            ]
        )

    assert np.allclose(list(every.values()), by_hand(shares, worth, 0, 10, 8, 0), atol=0.02)

    def judged(name):
        return eval_ranking(models[name], uneven, "val", (20,)).users["NDCG@20"].mean()

    assert (
        list(alone) == [*models, "hybrid"]
        and alone["rules"] > 0
        and alone["popularity"] == pytest.approx(judged("popularity"), abs=0.02)
    )


def test_weights_of_stars_are_of_kinds(split):
    models = {
        "ridge": fit_component(split, "ridge"),
        "network 1": fit_component(split, "network 1"),
        "network 2": fit_component(split, "network 2"),
    }
    weights = fit_rating_weights(models, split)
    user, item, y = [split.val[c].to_torch() for c in ("user", "item", "rating")]
    said = {
        n: m.predict(
            user.long(),
            item.long(),
            History.from_rows(split.rows_before("val"), len(split.users)).select(user.long()),
        ).double()
        for n, m in models.items()
    }
    want = by_hand(
        torch.stack([said["ridge"], (said["network 1"] + said["network 2"]) / 2]),
        lambda blend, rows: -(blend - y[rows]).square(),
        2,
        10,
        8,
        0,
    )
    assert np.allclose(
        [weights["ridge"], weights["network 1"], weights["network 2"]],
        [want[0], want[1] / 2, want[1] / 2],
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
def test_what_is_carved_was_training_and_is_gone_from_it(name, seed):
    split = split_of(random_log(seed=seed), 0.9, 0, name)
    split = replace(split, val=split.val.clear(), filtered_out=split.test[:3])
    made = ensure_validation(split)
    assert ids(made, "train") != [] != ids(made, "val") and sorted(
        ids(made, "train") + ids(made, "val")
    ) == ids(split, "train")
    assert len(made.test) == len(made.filtered_out) == 0 and made.protocol == split.protocol
    assert ids(ensure_validation(replace(split, test=split.test.clear())), "val") == ids(
        made, "val"
    )  # test rows have no say
    assert sorted(made.train["user"].unique()) == [*everybody(made)] and sorted(
        made.train["item"].unique()
    ) == [*range(made.n_train_items)]
    rows, n = split.train.with_columns(pl.int_range(pl.len()).alias("row")), len(split.train)
    if split.protocol.split_by == "time":
        assert ids(made, "val") == ids(replace(split, val=split.train[int(0.9 * n) :]), "val")
    elif split.protocol.split_by == "leave-one-out":
        assert ids(made, "val") == ids(
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
        assert 0.08 < len(made.val) / n < 0.22
    assert ensure_validation(made) is made and ensure_validation(
        replace(split, val=split.train[:1])
    ).val.equals(split.train[:1])


def test_of_a_single_event_nothing_is_taken():
    "Somebody must be learnt from."
    for name in PROTOCOLS:
        split = split_of(random_log(rows=1), 1, 0, name)
        assert (
            len(ensure_validation(split).train) == 1 and len(ensure_validation(split).val) == 0
        ), name


# ---------------------------------------------------------------- the parts, within a budget


def test_dates_are_dates_when_they_span_a_month(split):
    def spanning(days):
        return replace(
            split,
            train=split.train.with_columns(
                timestamp=(
                    10**12 + pl.int_range(pl.len()) * (days * 86_400_000) // (pl.len() - 1)
                ).cast(pl.Datetime("ms"))
            ),
        )

    dated = {n for n, p in RANKING_COMPONENTS.items() if p.needs_time}

    def of(s):
        return {n for n in COMPONENTS if is_applicable(s, n)}

    assert (
        of(split) == of(spanning(30)) == set(COMPONENTS)
        and of(spanning(29)) == set(COMPONENTS) - dated
    )
    for rows in (
        split.train.with_columns(timestamp=None),
        split.train.with_columns(timestamp=pl.when(pl.int_range(pl.len()) > 0).then("timestamp")),
    ):
        assert (
            of(replace(split, train=rows.cast({"timestamp": pl.Datetime("ms")})))
            == set(COMPONENTS) - dated
        )
    assert of(told(split_of(random_log(stars=False)))) == set(RANKING_COMPONENTS) and of(
        split_of(random_log(stars=False))
    ) == set(RANKING_COMPONENTS) - {"content", "content towers"}


def test_parts_that_share_a_model_are_the_same_recommender():
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
    "Fits that take the seconds one says, and a note of each."
    now = SimpleNamespace(seconds=0.0, one={}, fits=[])

    def fit(split, name, passes=0, seed=0):
        now.fits.append((name, passes))
        now.seconds += now.one.get(name, 1.0) * (passes or MAX_EPOCHS.get(name, 1))
        return SimpleNamespace(
            name=COMPONENTS[name].recommender,
            curve=[{"val": None}] * (passes or MAX_EPOCHS.get(name, 1)),
        )

    monkeypatch.setattr(hybrid, "time", SimpleNamespace(perf_counter=lambda: now.seconds))
    monkeypatch.setattr(hybrid, "fit_component", fit)
    return now


@pytest.mark.parametrize(
    "seconds, passes",
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
def test_what_learns_in_passes_gets_as_many_as_there_is_time_for(
    clock, split, monkeypatch, seconds, passes
):
    "One is tried; three more must fit, else it is left out; with room for all of them it stops when validation says so."
    monkeypatch.setitem(MAX_EPOCHS, "gru", 10)
    clock.one["gru"] = 10.0
    assert (fit_within_budget(split, "gru", seconds) is None) == (passes is None)
    assert clock.fits == ([("gru", 1)] if seconds > 0 else []) + (
        [("gru", passes)] if passes is not None else []
    )
    assert clock.seconds <= max(seconds, 10.0)


def test_what_takes_no_passes_is_fitted_while_there_is_time(clock, split):
    assert (
        fit_within_budget(split, "matrix", 0.1)
        and fit_within_budget(split, "matrix", 0.0) is None
        and fit_within_budget(split, "matrix", -1.0) is None
    )
    assert fit_within_budget(split, "popularity", -1.0) and fit_within_budget(split, "ridge", -1.0)


@pytest.mark.parametrize("time_budget_min", [0.0, 0.01, 1.0, 10.0, 60.0])
def test_choosing_keeps_to_the_minutes(clock, split, monkeypatch, minutes):
    "A second each and ten a pass: beyond the minutes at most by one fit that was begun."
    for name in MAX_EPOCHS:
        clock.one[name], MAX_EPOCHS[name] = 10.0, 2
    monkeypatch.setattr(
        hybrid,
        "fit_ranking_weights",
        lambda models, split: ({n: 1.0 for n in models}, {"popularity": 1.0}, {}),
    )
    monkeypatch.setattr(
        hybrid, "fit_rating_weights", lambda models, split: {n: 1.0 for n in models}
    )
    plan, models = select_components(split, minutes)
    assert clock.seconds <= max(minutes * 60 + 10, 3) and plan["seconds"] == clock.seconds
    assert {"popularity", "ridge"} <= set(models) and set(plan["ranking"]) | set(
        plan["rating"]
    ) == {n for n in COMPONENTS if MODEL_KEY[n] in models}
    assert set(plan["epochs"]) == set(models) & set(MAX_EPOCHS)
    assert (minutes < 60) or set(models) == set(MODEL_KEY.values())
    assert minutes or set(models) == {"popularity", "ridge"}
    begun = [name in MAX_EPOCHS for name, _ in clock.fits]
    assert begun == sorted(begun)  # the slow ones come last


def test_the_best_pass_is_the_one_that_validation_liked():
    def of(name, *values):
        return best_epoch(name, [{"val": v} for v in values])

    for name in SEQUENCE_MODELS:
        assert of(name, 0.1, 0.3, 0.2) == 2
    assert of("wide-deep", 0.9, 0.7, 0.8) == 2 and of("gru") == of("wide-deep") == 0
    assert of("gru", None, None) == of("wide-deep", None, None) == 2


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
    "To the last digit: scores of people, strangers, baskets and new items; stars."
    who = [*everybody(split)][:20] + [999]
    basket = history_of([split.n_train_items - 1, 0], [split.n_train_items], [])
    return (
        torch.equal(a.scores(who), b.scores(who))
        and torch.equal(a.scores([999] * 3, basket), b.scores([999] * 3, basket))
        and torch.equal(a.scores(who, items=[2, 999]), b.scores(who, items=[2, 999]))
        and a.predicts_ratings == b.predicts_ratings
        and (
            not a.predicts_ratings
            or torch.equal(a.predict(who, [1] * len(who)), b.predict(who, [1] * len(who)))
        )
    )


@pytest.fixture(scope="module")
def every(split):
    return make_recommender("hybrid", plan=json.loads(json.dumps(ALL))).fit(split)


@pytest.fixture(scope="module")
def first(split):
    return make_recommender("hybrid").fit(split)


def test_the_hybrid_is_the_sum_of_its_parts(every, split):
    users, n = torch.tensor([0, 7, 30, 999]), split.n_train_items
    had = every.train_history.select(users)
    models = {name: fit_component(split, name, ALL["epochs"].get(name, 0)) for name in COMPONENTS}
    total = torch.zeros(4, n, dtype=torch.float64)
    for name, w in ALL["ranking"].items():
        part, model = RANKING_COMPONENTS[name], models[name]
        with torch.no_grad():
            alone = (
                model._score_history(
                    recency_weights(had, n) if part.recency_weighted else had.to_sparse(n)
                ).clamp(min=0)
                if hasattr(model, "_score_history")
                else model.scores(users).clamp(min=0 if name == "content" else -torch.inf)
            )
        given = (
            torch.softmax(alone, 1)
            if name in MAX_EPOCHS
            else alone / alone.sum(1, keepdim=True).clamp(min=1e-12)
        )
        count = had.indptr.diff()[:, None]
        total += (
            w
            * given
            * (
                1
                if part.family == "popular"
                else (count > 0)
                if name in MAX_EPOCHS
                else count / (count + 10)
            )
        )
    assert np.allclose(every.scores(users), total, atol=1e-5)
    assert torch.equal(
        every.scores(users, items=[5, 2, n, n + 9]),
        torch.cat([every.scores(users)[:, [5, 2]], torch.zeros(4, 2)], 1),
    )  # a new item has no share
    items = torch.tensor([3, 1, 0, 2])
    stars = sum(w * models[name].predict(users, items) for name, w in ALL["rating"].items()) / sum(
        ALL["rating"].values()
    )
    assert (
        np.allclose(every.predict(users, items), stars, atol=1e-5)
        and stars.min() >= 1
        and stars.max() <= 5
    )


def test_a_stranger_gets_what_is_popular(every, split):
    "No memory and no vector has anything to say; the towers alone know things by their kind and age."
    nobody = history_of([], [split.n_train_items])
    users = torch.tensor([999, 998])
    for name in RANKING_COMPONENTS:
        given = component_probs(name, every.models[MODEL_KEY[name]], users, nobody)
        assert torch.allclose(
            given.sum(1),
            torch.ones(2)
            if RANKING_COMPONENTS[name].family == "popular" or name in ("towers", "content towers")
            else torch.zeros(2),
            atol=1e-5,
        ), name
    popular = {n: w for n, w in ALL["ranking"].items() if RANKING_COMPONENTS[n].family == "popular"}
    lists = {n: w for n, w in ALL["ranking"].items() if n not in ("towers", "content towers")}
    hybrid, usual = [
        make_recommender(
            "hybrid",
            plan={"ranking": l, "rating": {}, "epochs": {n: 1 for n in l if n in MAX_EPOCHS}},
        )
        for l in (lists, popular)
    ]
    for model in (hybrid, usual):
        model.fit(split)
    assert torch.equal(
        hybrid.scores(users, nobody), usual.scores(users, nobody)
    ) and not torch.equal(hybrid.scores([0]), usual.scores([0]))
    assert (
        hybrid.recommend([[]], k=5)["item"].to_list()
        == usual.recommend([[]], k=5)["item"].to_list()
    )


def test_every_part_is_saved_and_loaded_to_the_last_digit(every, split, tmp_path):
    back = saved(every, tmp_path)
    assert (
        same(every, back, split)
        and back.plan == every.plan
        and list(back.models) == list(every.models)
        and back.time_budget_min == every.time_budget_min
    )


def test_a_plan_is_json_and_is_replayed_to_the_last_digit(first, split, monkeypatch, tmp_path):
    "On what it was chosen on: nothing is chosen anew, though there is a validation part; the sequence models make as many passes as were best."
    plan = json.loads(json.dumps(first.plan))
    assert (
        plan == first.plan
        and set(plan)
        == {"ranking", "cold_users", "rating", "cold_items", "epochs", "standalone", "seconds"}
        and 1 - 0.02 * len(RANKING_COMPONENTS) < sum(plan["ranking"].values()) < 1.011
        and abs(sum(plan["rating"].values()) - 1) < 1e-2
    )
    assert all(w >= 0.02 for n, w in plan["ranking"].items() if n != "popularity") and set(
        plan["epochs"]
    ) == {
        n
        for n in MAX_EPOCHS
        if any(n in plan[of] for of in ("ranking", "cold_users", "cold_items", "rating"))
    }
    monkeypatch.setattr(hybrid, "select_components", lambda *a: pytest.fail("it chose"))
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
def test_more_passes_than_are_best_are_replayed_too(name, split, monkeypatch):
    "The whole choice for each part that learns in passes, with enough of them to stop early."
    monkeypatch.setitem(MAX_EPOCHS, name, 9)
    chosen = fit_component(split, name)
    again = fit_component(split, name, best_epoch(chosen.name, chosen.loss_curve))
    one = [m._state() for m in (chosen, again)]
    assert (
        all(torch.equal(one[0][k], one[1][k]) for k in one[0] | one[1])
        and 1 <= best_epoch(chosen.name, chosen.loss_curve) <= 9
    )
    assert len(fit_component(split, name, 4).loss_curve) <= 4


def test_the_same_seed_the_same_hybrid_and_the_test_part_has_no_say(first, split):
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
    assert torch.equal(drawn, torch.rand(1))  # the outside is left alone
    other = make_recommender(
        "hybrid",
        seed=3,
        plan={
            "ranking": {"gru": 1.0},
            "rating": {"network 1": 1.0},
            "epochs": {"gru": 1, "network 1": 1},
        },
    )
    mine = make_recommender("hybrid", plan=other.plan)
    assert not torch.equal(other.fit(split).scores([0]), mine.fit(split).scores([0]))


def test_networks_start_from_seeds_of_their_own(every):
    weights = [
        torch.cat([p.flatten() for p in every.models[n].net.parameters()])
        for n in RATING_COMPONENTS
        if n.startswith("network")
    ]
    assert len(weights) == 4 and all(
        not torch.equal(a, b) for k, a in enumerate(weights) for b in weights[:k]
    )
    assert [every.models[f"network {k}"].seed for k in (1, 2, 3, 4)] == [1, 2, 3, 4]


def test_a_basket_is_answered(first, split):
    ids = split.items["item"][: split.n_train_items]
    rows = first.recommend([[ids[3], ids[0], "unheard of"], {ids[1]: 5.0, ids[2]: 1.0}, []], k=6)
    lists = rows.group_by("user", maintain_order=True).agg("item")["item"].to_list()
    assert (
        [len(l) for l in lists] == [6] * 3
        and not {ids[3], ids[0]} & set(lists[0])
        and not {ids[1], ids[2]} & set(lists[1])
    )
    want = first.scores([999], history_of([3, 0]))[0]
    assert np.allclose(
        rows.filter(pl.col("user") == "basket 1")["score"],
        sorted(
            (want[i].item() for i in range(split.n_train_items) if i not in (0, 3)), reverse=True
        )[:6],
        atol=1e-6,
    )
    assert not torch.allclose(
        first.scores([999], history_of([3, 0])), first.scores([999], history_of([2, 1])), atol=1e-3
    )


def positions():
    "Leave one out of a log whose times are places in a history."
    place = random_log().with_columns(
        place=pl.int_range(pl.len(), 0, -1).over("user"),
        timestamp=pl.int_range(1, pl.len() + 1).over("user").cast(pl.Datetime("ms")),
    )
    return Split.from_frames(
        *[
            place.filter(p).drop("place")
            for p in (pl.col("place") > 2, pl.col("place") == 2, pl.col("place") == 1)
        ],
        protocol=PROTOCOLS["leave-one-out"],
    )


def strangers(log=random_log()):
    return Split.from_frames(
        log[:300], log[300:350].with_columns(user=pl.lit("new ") + pl.col("user")), log[350:]
    )


KINDS = {
    "without stars": lambda: split_of(random_log(stars=False)),
    "without times": lambda: split_of(random_log(times=False)),
    "with some stars": lambda: split_of(
        random_log().with_columns(rating=pl.when(pl.int_range(pl.len()) % 3 == 0).then("rating"))
    ),
    "cold_users": strangers,
    "positions": positions,
    "one user": lambda: split_of(random_log(users=1, rows=60)),
    "one item": lambda: split_of(random_log(items=1, rows=60)),
    "new items": lambda: Split.from_frames(
        (log := random_log())[:300],
        log[300:350].with_columns(item=pl.lit("new ") + pl.col("item")),
        log[350:],
    ),
    "no validation": lambda: split_of(random_log(), 0.9, 0),
    "given": lambda: split_of(random_log(stars=False), 0.9, 0, "given"),
    "one row": lambda: split_of(random_log(rows=1), 1, 0),
}


@pytest.mark.filterwarnings("ignore:std_mean")
@pytest.mark.parametrize("kind", KINDS)
def test_it_fits_alone(kind, tmp_path):
    "With no argument, on any log."
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
    if kind == "cold_users":
        assert set(lists.values()) == {1.0} and not set(model.plan["cold_users"].values()) & {
            1.0 / 3
        }  # nobody known to choose for; strangers have a choice of their own
    if kind in ("new items", "one user"):
        assert set(lists) >= {"popularity", "matrix", "neighbors", "low-pass"} and set(
            lists.values()
        ) == {1.0}  # nobody to ask


@pytest.mark.parametrize("time_budget_min", [0.0, 0.01])
def test_next_to_no_time_still_gives_lists_and_stars(split, minutes):
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


def test_without_validation_it_chooses_on_carved_rows_and_learns_from_all(monkeypatch):
    split, asked = split_of(random_log(stars=False), 0.9, 0), []

    def choose(on, minutes, seed):
        asked.append((on, minutes, seed))
        plan, models = (
            hybrid.fill_plan_defaults({"ranking": {"matrix": 0.5, "popularity": 0.5}}),
            {n: fit_component(on, n) for n in ("matrix", "popularity")},
        )
        return plan, models

    monkeypatch.setattr(hybrid, "select_components", choose)
    model = make_recommender("hybrid", time_budget_min=3.0, seed=8).fit(split)
    ((on, minutes, seed),) = asked
    assert (
        ids(on, "val") == ids(ensure_validation(split), "val")
        and (minutes, seed) == (1.5, 8)
        and len(model.models["matrix"].train_history.item) == len(split.train) > len(on.train)
    )
    assert same(model, make_recommender("hybrid", plan=model.plan).fit(split), split)
    tried = split_of(random_log(stars=False))
    made = []
    monkeypatch.setattr(hybrid, "fit_component", lambda *a: made.append(a[1]) or fit_component(*a))
    again = make_recommender("hybrid").fit(tried)
    assert (
        not made and again.models["matrix"].n_items == tried.n_train_items
    )  # what was fitted for the choice is kept


def test_a_large_catalogue_takes_no_square(tmp_path):
    "15,000 items: a table of each by each would take 900 MB and more."
    code = """
import resource, sys
sys.path.insert(0, sys.argv[1])
import numpy as np, polars as pl, torch
from widedeep_nb.core import Split, as_interactions, make_recommender
from widedeep_nb import hybrid
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** (20 if sys.platform == 'darwin' else 10)
rng, n = np.random.default_rng(0), 30_000
items = np.r_[np.arange(15_000), (15_000 * rng.random(n - 15_000) ** 2).astype(int)]
log = as_interactions(pl.DataFrame({'user': [f'u{u}' for u in rng.integers(5000, size=n)], 'item': [f'i{i}' for i in items], 'timestamp': 10**12 + np.sort(rng.integers(0, 10**10 * 3, n))}))
split = Split.of(log, log[:0], log[:0])
before = peak()
for name, how in (('wide-matrix', {'max_items': 500}), ('wide-neighbours', {}), ('wide-rules', {}), ('wide-next', {}), ('low-pass', {})):
    model = make_recommender(name, **how).fit(split)
    assert model.n_items == 15_000 and torch.isfinite(model.scores(range(50))).all() and max(t.numel() for t in model._state().values()) < 2_000_000, name
print(peak() - before)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(hybrid.__file__).rsplit("/", 2)[0]],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and float(done.stdout) < 300, done.stdout + done.stderr
