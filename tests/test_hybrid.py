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


# ---------------------------------------------------------------- stars

def test_trees_are_scikit_learns():
    "Deep and shallow trees side by side, on new rows and on rows at the very thresholds."
    rng = np.random.default_rng(0)
    x = rng.integers(0, 12, (400, 6)) / 4
    y = x[:, 0] * x[:, 1] - (x[:, 2] > 1) + rng.normal(0, .1, 400)
    model = make_recommender("trees", starts=3, rounds=20, leaves=9, least=5, seed=4)
    model._learn(x, y)
    theirs = [HistGradientBoostingRegressor(learning_rate=.05, max_iter=20, max_leaf_nodes=9, min_samples_leaf=5, l2_regularization=20., max_features=.4, random_state=4 + s).fit(x, y) for s in range(3)]
    for rows in (x, rng.integers(-3, 16, (300, 6)) / 4, rng.normal(size=(50, 6)) * 100):
        want = np.mean([t.predict(rows) for t in theirs], 0)
        assert np.allclose(model._from(rows), want, rtol=0, atol=1e-12) and np.allclose(model._from(rows, block=7), want, rtol=0, atol=1e-12)
    assert np.ptp(model._from(x)) > 1 and len(model._from(x[:0])) == 0


def test_ridge_is_scikit_learns():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(300, 8)) @ rng.normal(size=(8, 8)) + rng.normal(size=8) * 9
    x[:, 3] = .1                                                # says nothing
    y = x @ rng.normal(size=8) + rng.normal(size=300) + 2
    for lam in (.1, 300.):
        model = make_recommender("ridge", lam=lam)
        model._learn(x, y)
        mean, scale = x.mean(0), np.where(np.ptp(x, 0) > 0, x.std(0), 1.)
        theirs = TheirRidge(lam).fit((x - mean) / scale, y)
        new = rng.normal(size=(50, 8)) * 5
        new[:, 3] = .1
        for rows in (x, new): assert np.allclose(model._from(rows), theirs.predict((rows - mean) / scale), atol=1e-5)


@pytest.mark.parametrize("name, how", [("ridge", {}), ("trees", {"least": 20})])
@pytest.mark.parametrize("times", [True, False])
def test_stars_from_statistics_saved_and_loaded(name, how, times, tmp_path):
    split = split_of(random_log(times=times))
    model = make_recommender(name, **how).fit(split)
    ask = [*everybody(split)][:9] + [999, 999], [*range(9)] + [3, split.known_items + 5]          # a stranger, and a thing that nobody knows
    model.save(tmp_path)
    back = load_recommender(tmp_path)
    stars = model.predict(*ask)
    assert torch.equal(back.predict(*ask), stars) and torch.isfinite(stars).all() and stars.unique().numel() > 3
    assert torch.equal(back.scores([0, 5, 999]), model.scores([0, 5, 999]))
    assert sorted(f.name for f in tmp_path.iterdir()) == ["model.json", "model.safetensors"]


@pytest.mark.parametrize("name", ["ridge", "trees"])
def test_stars_from_statistics_find_what_was_planted(name):
    "Good and bad things, kind and strict people."
    rng = np.random.default_rng(0)
    user, item = rng.integers(0, 60, 3000), rng.integers(0, 30, 3000)
    stars = np.clip(np.round(3 + (item % 3 - 1) + (user % 3 - 1) * .7 + rng.normal(0, .4, 3000)), 1, 5)
    split = split_of(as_interactions(pl.DataFrame({"user": [f"u{u}" for u in user], "item": [f"i{i}" for i in item], "rating": stars, "timestamp": np.arange(3000) * 10**7})))
    error = lambda model: float((model.fit(split).predict(split.test["user"], split.test["item"]) - split.test["rating"].to_torch()).square().mean())
    assert error(make_recommender(name)) < .5 * error(make_recommender("mean"))


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
    return truth, truth + torch.randn(k, n, generator=random, dtype=torch.float64) * torch.linspace(.3, 1.5, k, dtype=torch.float64)[:, None]


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 99), first=st.integers(0, 2), steps=st.integers(1, 6), bags=st.integers(1, 3), k=st.integers(1, 4))
def test_selection_is_the_plain_loop(seed, first, steps, bags, k):
    truth, parts = voices(k=k, seed=seed)
    worth = lambda blend, rows: -(blend - truth[rows]).square()
    got = select(parts, worth, first, steps, bags, seed)
    assert np.allclose(got, by_hand(parts, worth, first, steps, bags, seed), atol=1e-9)
    assert abs(sum(got) - 1) < 1e-9 and min(got) >= first / (first * k + steps) - 1e-9
    assert got == select(parts, worth, first, steps, bags, seed)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 99), steps=st.integers(1, 6))
def test_a_blend_is_on_its_people_no_worse_than_the_best_alone(seed, steps):
    "On the people drawn, and of one path: the first unit goes to the best, and the best of the path is kept."
    truth, parts = voices(seed=seed)
    rows = torch.randint(60, (60,), generator=torch.Generator().manual_seed(seed))
    cost = lambda blend: float((blend[rows] - truth[rows]).square().mean())
    weights = torch.tensor(select(parts, lambda blend, rows: -(blend - truth[rows]).square(), 0, steps, 1, seed))
    assert cost((weights[:, None] * parts).sum(0)) <= min(map(cost, parts)) + 1e-12


def test_the_truth_gets_everything():
    truth, parts = voices()
    assert select(torch.stack([parts[0], truth, parts[1]]), lambda blend, rows: -(blend - truth[rows]).square()) == [0, 1, 0]


@pytest.fixture(scope="module")
def uneven():
    "Every thing with another number of takers, so that no two are alike."
    rng = np.random.default_rng(0)
    rows = [(f"u{u}", f"i{i:02d}") for i in range(25) for u in rng.choice(40, 4 + i, False)]
    rows = [rows[k] for k in rng.permutation(len(rows))]
    log = as_interactions(pl.DataFrame(rows, schema=["user", "item"], orient="row").with_columns(timestamp=10**12 + np.arange(len(rows)) * 10**8))
    return split_of(log, .75, .15)


@pytest.mark.parametrize("protocol", ["strict", "as-reported", "given"])
def test_candidates_that_are_all_items_are_the_hybrids_lists(uneven, protocol):
    "What is chosen on is what is judged: scores, what is barred, hits and NDCG@20; lists that repeat what one has, too."
    split = replace(uneven, protocol=PROTOCOLS[protocol])
    weights = {"popularity": .07, "matrix, fading": .4, "neighbours": .2, "low-pass": .33}
    models = {name: fit_part(split, name) for name in weights}
    hybrid, question, n = make_recommender("hybrid", plan={"lists": weights, "stars": {}, "passes": {}}).fit(split), ask(split, "val"), split.known_items
    shares, barred, hits, to_find = at_candidates(models, split, depth=n)
    blend = sum(w * s for w, s in zip(weights.values(), shares))
    first = (torch.arange(4 * n) % 4 == 0).expand(len(hits), -1)                                  # each item stands there four times, side by side
    had = question.seen.take(question.users)
    assert torch.allclose(blend[first].view(-1, n), hybrid.scores(question.users, had), atol=1e-6)
    assert (barred[~first] == -torch.inf).all() and not hits[~first].any()                       # four parts name each item, and it counts once
    assert torch.equal(barred[first].view(-1, n) == -torch.inf, had.matrix(n).to_dense().bool() & split.protocol.mask_seen)
    mine = ndcg(hits.gather(1, (blend + barred).topk(20, 1)[1]), to_find, 20)
    theirs = rank_users(hybrid, split, "val", (20,)).users
    assert theirs["user"].to_list() == question.users.tolist() and np.allclose(theirs["NDCG@20"], mine) and mine.mean() > 0


def test_candidates_are_what_some_part_has_first(uneven):
    models = {name: fit_part(uneven, name) for name in ("popularity", "rules", "matrix")}
    shares, barred, hits, to_find = at_candidates(models, uneven, depth=3)
    question = ask(uneven, "val")
    had, right = question.seen.take(question.users), set(question.right.select("user", "item").rows())
    each = [shares_of(name, model, question.users, had) for name, model in models.items()]
    seen = had.matrix(uneven.known_items).to_dense()
    for k, user in enumerate(question.users.tolist()):
        top = sorted({i for g in each for i in (g[k] - 1e9 * seen[k]).topk(3)[1].tolist()})
        open_ = barred[k] == 0
        assert torch.equal(shares[:, k, open_], torch.stack([g[k, [i for i in top if not seen[k, i]]] for g in each]))
        assert hits[k].sum() == sum((user, i) in right for i in top) and to_find[k] == sum(u == user for u, _ in right)
    few = at_candidates(models, uneven, most=5, depth=3)
    assert few[0].shape[1] == 5 and len(few[3]) == 5


def test_weights_of_lists_leave_out_what_is_small(uneven):
    models = {name: fit_part(uneven, name) for name in ("popularity", "matrix", "neighbours", "rules", "low-pass")}
    every, some = weigh_lists(models, uneven, 0.), weigh_lists(models, uneven, .15)
    assert list(every) == list(models) and abs(sum(every.values()) - 1) < 1e-3
    assert some == {n: w for n, w in every.items() if w >= .15} and len(some) < len(every)
    shares, barred, hits, to_find = at_candidates(models, uneven)
    worth = lambda blend, rows: torch.stack([ndcg(hits[r][(b + barred[r]).topk(20)[1]][None], to_find[r:r + 1], 20)[0] for b, r in zip(blend, rows)])
    assert np.allclose(list(every.values()), by_hand(shares, worth, 0, 10, 8, 0), atol=.02)


def test_weights_of_stars_are_of_kinds(split):
    models = {"ridge": fit_part(split, "ridge"), "network 1": fit_part(split, "network 1"), "network 2": fit_part(split, "network 2")}
    weights = weigh_stars(models, split)
    user, item, y = [split.val[c].to_torch() for c in ("user", "item", "rating")]
    said = {n: m.predict(user.long(), item.long(), History.of(split.seen("val"), len(split.users)).take(user.long())).double() for n, m in models.items()}
    want = by_hand(torch.stack([said["ridge"], (said["network 1"] + said["network 2"]) / 2]), lambda blend, rows: -(blend - y[rows]).square(), 2, 10, 8, 0)
    assert np.allclose([weights["ridge"], weights["network 1"], weights["network 2"]], [want[0], want[1] / 2, want[1] / 2], atol=1e-4)
    assert weigh_stars({}, split) == {} and weigh_stars(models, replace(split, val=split.val.with_columns(rating=pl.lit(None, pl.Float32)))) == {}


def ids(split, part): return sorted(zip(split.users["user"].gather(getattr(split, part)["user"]), split.items["item"].gather(getattr(split, part)["item"]), getattr(split, part)["timestamp"]))


@pytest.mark.parametrize("name", PROTOCOLS)
@pytest.mark.parametrize("seed", range(3))
def test_what_is_carved_was_training_and_is_gone_from_it(name, seed):
    split = split_of(random_log(seed=seed), .9, 0, name)
    split = replace(split, val=split.val.clear(), aside=split.test[:3])
    made = carved(split)
    assert ids(made, "train") != [] != ids(made, "val") and sorted(ids(made, "train") + ids(made, "val")) == ids(split, "train")
    assert len(made.test) == len(made.aside) == 0 and made.protocol == split.protocol
    assert ids(carved(replace(split, test=split.test.clear())), "val") == ids(made, "val")       # test rows have no say
    assert sorted(made.train["user"].unique()) == [*everybody(made)] and sorted(made.train["item"].unique()) == [*range(made.known_items)]
    rows, n = split.train.with_columns(pl.int_range(pl.len()).alias("row")), len(split.train)
    if split.protocol.cut == "time": assert ids(made, "val") == ids(replace(split, val=split.train[int(.9 * n):]), "val")
    elif split.protocol.cut == "leave-one-out": assert ids(made, "val") == ids(replace(split, val=rows.filter(pl.len().over("user") > 1).group_by("user").last().select(split.train.columns)), "val")
    else: assert .08 < len(made.val) / n < .22
    assert carved(made) is made and carved(replace(split, val=split.train[:1])).val.equals(split.train[:1])


def test_of_a_single_event_nothing_is_taken():
    "Somebody must be learnt from."
    for name in PROTOCOLS:
        split = split_of(random_log(rows=1), 1, 0, name)
        assert len(carved(split).train) == 1 and len(carved(split).val) == 0, name
