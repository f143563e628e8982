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

from widedeep_nb import comparison
from widedeep_nb.baselines import as_csr
from widedeep_nb.comparison import (LISTS, MODEL, PARTS, PASSES, STARS, SparseWide, at_candidates, best_pass, carved, faded, fit_part, make_plan, select, share, shares_of, strongest,
                                    suits, trust, try_part, weigh_lists, weigh_stars)
from widedeep_nb.core import PROTOCOLS, History, Split, as_interactions, load_recommender, make_recommender
from widedeep_nb.evaluation import ask, ndcg, rank_users
from widedeep_nb.sequence import SEQUENCE

MONTHS = 12 * 30 * 86_400_000  # a year of thirties, in milliseconds


@pytest.fixture(scope="module", autouse=True)
def two_passes():
    "Of whatever learns in passes."
    with pytest.MonkeyPatch.context() as patch:
        for name in PASSES: patch.setitem(PASSES, name, 2)
        yield


def random_log(users=40, items=25, rows=400, seed=0, stars=True, times=True, repeats=True):
    rng = np.random.default_rng(seed)
    # squared: a few items are popular, most are not
    log = {"user": [f"u{u}" for u in rng.integers(users, size=rows)], "item": [f"i{int(items * x * x)}" for x in rng.random(rows)],
           "rating": rng.integers(1, 6, rows) if stars else None, "timestamp": np.sort(rng.integers(10**12, 10**12 + MONTHS, rows)) if times else None}
    frame = pl.DataFrame({c: v for c, v in log.items() if v is not None})
    return as_interactions(frame if repeats else frame.unique(["user", "item"], keep="first", maintain_order=True))


def split_of(log, train=.8, val=.1, protocol="strict"):
    a, b = int(train * len(log)), int((train + val) * len(log))
    return Split.of(log[:a], log[a:b], log[b:], protocol=PROTOCOLS[protocol])


def history_of(*lists):
    items = sum(map(list, lists), [])
    return History(torch.tensor(np.cumsum([0] + [len(x) for x in lists])), torch.tensor(items, dtype=torch.int64), torch.full((len(items),), torch.nan), torch.zeros(len(items), dtype=torch.int64))


def rows_of(split): return [(u, i, t) for u, i, t in zip(split.train["user"], split.train["item"], split.train["timestamp"].dt.epoch("ms"))]


def binary(split):
    dense = np.zeros((split.known_users, split.known_items))
    dense[split.train["user"].to_numpy(), split.train["item"].to_numpy()] = 1
    return dense


def everybody(split): return range(split.known_users)


@pytest.fixture(scope="module")
def split(): return split_of(random_log())


# ---------------------------------------------------------------- shares and histories

tables = arrays(np.float32, st.tuples(st.integers(1, 4), st.integers(1, 7)), elements=st.integers(-300, 300).map(lambda x: np.float32(x / 100))).map(torch.from_numpy)
histories = st.lists(st.lists(st.integers(0, 11), max_size=9), min_size=1, max_size=5)


@settings(max_examples=80, deadline=None)
@given(scores=tables, times=st.integers(1, 50))
def test_a_share_is_a_part_of_one(scores, times):
    got = share(scores)
    for row, mine in zip(scores.tolist(), got.tolist()):
        whole = sum(x for x in row if x > 0)
        assert np.allclose(mine, [x / whole if x > 0 else 0 for x in row], atol=1e-6)
    assert torch.allclose(share(scores * times), got, atol=1e-6)               # whatever unit a part counts in


@settings(max_examples=80, deadline=None)
@given(scores=tables, shift=st.integers(-20, 20))
def test_a_soft_share_is_a_softmax(scores, shift):
    got = share(scores, soft=True)
    e = np.exp(scores.double().numpy())
    assert np.allclose(got, e / e.sum(1, keepdims=True), atol=1e-6) and (got > 0).all()
    assert torch.allclose(share(scores + shift, soft=True), got, atol=1e-5)


@settings(max_examples=80, deadline=None)
@given(lists=histories, n_items=st.integers(1, 12), steps=st.sampled_from([.5, 3., 100.]))
def test_what_fades_is_the_plain_loop(lists, n_items, steps):
    "Repeats add up to one at most; an item that nobody knows counts as an event, for time has passed."
    want = np.zeros((len(lists), n_items))
    for u, items in enumerate(lists):
        for place, item in enumerate(items):
            if item < n_items: want[u, item] += np.exp(-(len(items) - 1 - place) / steps)
    got = faded(history_of(*lists), n_items, steps)
    assert got.is_coalesced() and np.allclose(got.to_dense(), np.minimum(want, 1), atol=1e-6)


@settings(max_examples=50, deadline=None)
@given(lists=histories, n_items=st.integers(1, 12))
def test_who_fades_endlessly_slowly_does_not(lists, n_items):
    have = history_of(*lists)
    assert torch.allclose(faded(have, n_items, 1e9).to_dense(), have.matrix(n_items).to_dense(), atol=1e-6)


@settings(max_examples=80, deadline=None)
@given(lists=histories, n_items=st.integers(1, 12), half=st.sampled_from([1., 10.]))
def test_trust_counts_known_events(lists, n_items, half):
    counts = [sum(i < n_items for i in items) for items in lists]
    got = trust(history_of(*lists), n_items, half)
    assert np.allclose(got[:, 0], [c / (c + half) for c in counts]) and got.shape == (len(lists), 1)
    more = trust(history_of(*[items + [0] for items in lists]), n_items, half)
    assert (more > got).all() and (more < 1).all()


# ---------------------------------------------------------------- wide parts

@pytest.mark.parametrize("max_items", [1, 6, 24, 12_000])
@pytest.mark.parametrize("lam, dropout, beta, alpha", [(50., .6, .5, .1), (30_000., .2, 0., 0.), (10_000., 0., 1., .5)])
def test_wide_matrix_is_the_closed_form(split, max_items, lam, dropout, beta, alpha):
    X = binary(split)
    top = sorted(sorted(range(X.shape[1]), key=lambda i: (-X[:, i].sum(), i))[:max_items])
    T = X[:, top]
    G = T.T @ np.diag(np.maximum(T.sum(1), 1) ** -beta) @ T
    G += np.diag(np.diag(G)) * dropout / (1 - dropout) + np.eye(len(top)) * (lam * T.sum() / 250_000 + 1e-3)
    P, W = np.linalg.inv(G), np.zeros((X.shape[1], X.shape[1]))
    W[np.ix_(top, top)] = (np.eye(len(top)) - P / np.diag(P)) * T.sum(0) ** -alpha
    model = make_recommender("wide-matrix", lam=lam, dropout=dropout, beta=beta, alpha=alpha, max_items=max_items).fit(split)
    assert np.allclose(model.scores(everybody(split))[T.sum(1) > 0], (X @ W)[T.sum(1) > 0], atol=2e-4)
    assert max(t.numel() for t in model._state().values()) <= max(len(top) ** 2, X.shape[1] + 1)
    if max_items == 6: assert top != list(range(6))            # they are not simply the first: codes go by events, and some people have things twice


def test_wide_matrix_without_its_changes_is_ease(split):
    events = len(split.train.unique(["user", "item"]))
    plain = make_recommender("wide-matrix", lam=(9 - 1e-3) * 250_000 / events, dropout=0., beta=0., alpha=0.).fit(split)
    assert torch.allclose(plain.scores(everybody(split)), make_recommender("ease", lam=9.).fit(split).scores(everybody(split)), atol=1e-4)


sparse = lambda m, n: arrays(np.int64, st.tuples(m, n), elements=st.integers(0, 3).map(lambda x: x * (x > 1)))


@settings(max_examples=100, deadline=None)
@given(shape=st.tuples(st.integers(1, 8), st.integers(1, 9)), seed=st.integers(0, 10**6), fill=st.sampled_from([.1, .5, 1.]), most=st.sampled_from([1, 2, 4, 99]), budget=st.sampled_from([1, 3, 10, 10**6]), whole=st.booleans())
def test_strongest_is_dense_algebra(shape, seed, fill, most, budget, whole):
    "Whole numbers make ties: which of the equal are kept is open, how many and how large they are is not; a budget changes nothing."
    rng = np.random.default_rng(seed)
    left, right = [(rng.integers(1, 4, shape) if whole else rng.random(shape)) * (rng.random(shape) < fill) for _ in range(2)]
    dense = left.T @ right
    np.fill_diagonal(dense, 0)
    got = strongest(sp.csr_array(left.astype(float)), sp.csr_array(right.astype(float)), most, budget)
    again = strongest(sp.csr_array(left.astype(float)), sp.csr_array(right.astype(float)), most)
    assert got.shape == dense.shape and np.array_equal(got.toarray(), again.toarray()) and (got.data != 0).all()
    got = got.toarray()
    for row, want in zip(got, dense):
        assert np.allclose(row[row > 0], want[row > 0])
        assert np.allclose(np.sort(row)[::-1][:most], np.sort(want)[::-1][:most]) and (row > 0).sum() <= most


def test_strongest_of_nothing_and_of_one_person():
    nothing, one = sp.csr_array((3, 4)), sp.csr_array(np.array([[1., 0, 1, 1]]))
    assert strongest(nothing, nothing, 2).toarray().tolist() == [[0.] * 4] * 4
    assert strongest(one, one, 9, budget=2).toarray().tolist() == [[0, 0, 1, 1], [0, 0, 0, 0], [1, 0, 0, 1], [1, 0, 1, 0]]


def scores_by(weights, split):
    "By a table of weights {(from, to): weight}, for everybody."
    had = [{i for u, i, _ in rows_of(split) if u == user} for user in everybody(split)]
    return [[sum(weights.get((a, b), 0) for a in mine) for b in range(split.known_items)] for mine in had]


def largest(weights, n, most):
    "Of each row."
    return {(a, b): w for a in range(n) for b, w in sorted(((b, w) for (x, b), w in weights.items() if x == a), key=lambda p: -p[1])[:most]}


@pytest.mark.parametrize("most", [3, 300])
@pytest.mark.parametrize("days, how", [(0., {}), (90., {}), (20., {"own": 1., "other": 0., "size": 1.})])
def test_wide_neighbours_is_the_plain_loop(split, days, how, most, monkeypatch):
    monkeypatch.setattr(SparseWide, "most", most)
    model, rows = make_recommender("wide-neighbours", days=days, **how).fit(split), rows_of(split)
    end, baskets, fresh = max(t for *_, t in rows), {}, {}
    for u, i, t in rows:
        baskets.setdefault(u, set()).add(i)
        fresh[u, i] = min(1, fresh.get((u, i), 0) + (np.exp(-(end - t) / 86_400_000 / days) if days else 1))
    takers = [sum(i in b for b in baskets.values()) for i in range(split.known_items)]
    weights = {}
    for u, basket in baskets.items():
        for a in basket:
            for b in basket - {a}: weights[a, b] = weights.get((a, b), 0) + len(basket) ** -model.size * takers[a] ** -model.own * takers[b] ** -model.other * fresh[u, b]
    assert np.allclose(model.scores(everybody(split)), scores_by(largest(weights, split.known_items, most), split), atol=1e-5)


def test_without_a_date_for_everything_all_company_is_alike():
    log = random_log()
    for gap in (log.with_columns(timestamp=None), log.with_columns(timestamp=pl.when(pl.int_range(pl.len()) == 7).then(None).otherwise("timestamp"))):
        split = split_of(as_interactions(gap))
        dated, plain = [make_recommender("wide-neighbours", days=d).fit(split).scores(everybody(split)) for d in (30., 0.)]
        assert torch.equal(dated, plain)


@pytest.mark.parametrize("damping", [0., 10.])
def test_wide_rules_are_counted(split, damping):
    baskets = [{i for u, i, _ in rows_of(split) if u == user} for user in everybody(split)]
    n = range(split.known_items)
    both = {(a, b): sum({a, b} <= basket for basket in baskets) for a in n for b in n if a != b}
    weights = {(a, b): max(c - 1, 0) / (sum(a in basket for basket in baskets) + damping) for (a, b), c in both.items()}
    assert np.allclose(make_recommender("wide-rules", damping=damping).fit(split).scores(everybody(split)), scores_by(weights, split), atol=1e-5)


@pytest.mark.parametrize("how", [{}, {"steps": 1}, {"steps": 40, "decay": .9, "own": 0., "other": 1.}])
def test_wide_next_is_the_plain_loop(split, how):
    model, weights = make_recommender("wide-next", **how).fit(split), {}
    takers = binary(split).sum(0)
    for user in everybody(split):
        mine = [i for u, i, _ in rows_of(split) if u == user]
        for place, a in enumerate(mine):
            for d, b in enumerate(mine[place + 1:place + 1 + model.steps]):
                if a != b: weights[a, b] = weights.get((a, b), 0) + model.decay ** d * takers[a] ** -model.own * takers[b] ** -model.other
    assert np.allclose(model.scores(everybody(split)), scores_by(weights, split), atol=1e-5)


def test_wide_next_knows_the_direction(split):
    "Of a log that goes round, the next one is expected and not the one before."
    log = as_interactions(pl.DataFrame([(f"u{u}", f"i{(u + t) % 9}", t + 1) for u in range(30) for t in range(5)], schema=["user", "item", "timestamp"], orient="row"))
    model = make_recommender("wide-next", steps=1).fit(split_of(log, 1, 0))
    assert model.recommend([["i3"], ["i8"]], k=1)["item"].to_list() == ["i4", "i0"]


# ---------------------------------------------------------------- the low pass

def low_pass(X, factors, lift):
    size, taken = np.maximum(X.sum(1), 1), X.sum(0)
    _, value, V = np.linalg.svd(np.diag(size ** -.5) @ X @ np.diag(taken ** -.5), full_matrices=False)
    V = V[:factors][value[:factors] > 1e-9]
    return np.diag(taken ** -.5) @ V.T @ V @ np.diag(taken ** lift)


@pytest.mark.parametrize("lift", [0., .4])
def test_low_pass_with_all_factors_is_numpys(split, lift):
    model = make_recommender("low-pass", factors=999, lift=lift).fit(split)
    assert np.allclose(model.into @ model.out.T, low_pass(binary(split), 999, lift), atol=1e-3)


def test_low_pass_with_some_factors_keeps_the_largest():
    "Three kinds of people with a little noise: three directions, found as by numpy."
    rng = np.random.default_rng(0)
    rows = {(u, 10 * (u % 3) + int(i)) for u in range(90) for i in rng.choice(10, 7, False)} | {(int(u), int(i)) for u, i in zip(rng.integers(90, size=20), rng.integers(30, size=20))}
    split = split_of(as_interactions(pl.DataFrame([(f"u{u}", f"i{i}") for u, i in sorted(rows)], schema=["user", "item"], orient="row")), 1, 0)
    model, X = make_recommender("low-pass", factors=3).fit(split), binary(split)
    assert np.allclose(model.scores(everybody(split)), X @ low_pass(X, 3, .4), atol=2e-2)


def test_low_pass_lets_through_nothing_that_nobody_does():
    "Two things that are always taken together leave a direction empty; a basket with one of them must not be answered from it."
    pairs = [(f"u{u}", f"{x}{u % 3}") for u in range(12) for x in "ab"]
    split = split_of(as_interactions(pl.DataFrame(pairs, schema=["user", "item"], orient="row")), 1, 0)
    model = make_recommender("low-pass", factors=64).fit(split)
    assert np.allclose(model.into @ model.out.T, low_pass(binary(split), 64, .4), atol=1e-3)
