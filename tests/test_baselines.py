"Baselines against plain loops, dense algebra, other libraries, and published values on real logs."

import os
import re
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import scipy.sparse as sp
import torch

from widedeep_nb.baselines import (
    EASE,
    PROTOCOL_MODELS,
    compare_baselines,
    compare_protocols,
    rank_correlation,
)
from widedeep_nb.data import load
from widedeep_nb.evaluation import eval_ranking, eval_ratings
from widedeep_nb.lib.comparison import (
    ABLATIONS,
    PARAM_GRIDS,
    fit_and_save,
    grid_search,
    pooled_records,
    read_records,
    val_score,
)
from widedeep_nb.lib.comparison_plots import baselines_in_short, table_by_group
from widedeep_nb.lib.core import (
    PROTOCOLS,
    History,
    Split,
    UserError,
    hash_order,
    to_interactions,
    top_k,
)
from widedeep_nb.lib.history_models import rating_residuals
from widedeep_nb.lib.matrix_factorization import batched_ridge
from widedeep_nb.lib.neighbors import cosine, top_k_neighbors
from widedeep_nb.lib.recommender import load_recommender, make_recommender, mask_seen
from widedeep_nb.lib.runs import Run
from widedeep_nb.preprocessing import prepare, run_event_weights
from widedeep_nb.training import train

NAMES = list(PARAM_GRIDS)
NEED_RATINGS = ["mean", "damped-bias", "funk-svd"]
RATING = [*NEED_RATINGS, "user-knn", "item-knn"]  # predict ratings where there are any
BY_USER_ID = ["bpr", "neumf"]  # have a vector per user
PERSONAL = [
    name for name in NAMES if name not in ("mean", "popularity", "recent-popularity", *BY_USER_ID)
]
FROM_HISTORY = [name for name in PERSONAL if name not in NEED_RATINGS]
SHARED = Path(os.environ.get("WIDEDEEP_SHARED", Path(__file__).parents[1] / "../shared")) / "data"
real = pytest.mark.skipif(not SHARED.exists(), reason="the real logs are not here")


def random_log(users=40, items=25, rows=400, seed=0, ratings=True, times=True):
    rng = np.random.default_rng(seed)
    # squared: a few items are popular, most are not
    log = {
        "user": [f"u{u}" for u in rng.integers(users, size=rows)],
        "item": [f"i{int(items * x * x)}" for x in rng.random(rows)],
        "rating": rng.integers(1, 6, rows) if ratings else None,
        "timestamp": np.sort(rng.integers(0, 10**11, rows)) if times else None,
    }
    frame = pl.DataFrame({c: v for c, v in log.items() if v is not None})
    return to_interactions(frame.unique(["user", "item"], keep="first", maintain_order=True))


def split_of(log, share=0.8):
    n = int(share * len(log))
    return Split.from_frames(log[:n], log[:0], log[n:])


@pytest.fixture(scope="module")
def split():
    return split_of(random_log())


def binary(split):
    dense = np.zeros((split.n_train_users, split.n_train_items))
    dense[split.train["user"].to_numpy(), split.train["item"].to_numpy()] = 1
    return dense


# ---- each against a slower implementation


def test_mean_is_the_mean(split):
    expected = sum(split.train["rating"].to_list()) / len(split.train)
    predicted = make_recommender("mean").fit(split).predict([0, 5, 999], [3, 1, 999])
    assert np.allclose(predicted, expected, atol=1e-6)


def plain_bias(rows, mean, damping, n_iter):
    "Fit damped biases with plain loops; rows are (user, item, rating)."
    user_bias, item_bias = {}, {}
    for _ in range(n_iter):
        for target, own, other, biases in [
            (item_bias, 1, 0, user_bias),
            (user_bias, 0, 1, item_bias),
        ]:
            residuals = {}
            for row in rows:
                residual = row[2] - mean - biases.get(row[other], 0)
                residuals.setdefault(row[own], []).append(residual)
            target.update({k: sum(v) / (len(v) + damping) for k, v in residuals.items()})
    return user_bias, item_bias


@pytest.mark.parametrize("damping, n_iter", [(5, 10), (0, 3), (2.5, 1)])
def test_damped_bias_is_the_plain_loop(split, damping, n_iter):
    rows = [(u, i, float(r)) for u, i, r, _ in split.train.rows()]
    # with a cold-start user and a new item
    users = np.array([0, 1, 2, split.n_train_users, 3])
    items = np.array([5, 6, split.n_train_items, 7, 8])
    mean = sum(r for *_, r in rows) / len(rows)
    user_bias, item_bias = plain_bias(rows, mean, damping, n_iter)
    model = make_recommender("damped-bias", damping=damping, n_bias_iter=n_iter).fit(split)
    expected = [mean + user_bias.get(u, 0) + item_bias.get(i, 0) for u, i in zip(users, items)]
    assert np.allclose(model.predict(users, items), np.clip(expected, 1, 5), atol=1e-5)
    expected = [user_bias[u] for u in range(split.n_train_users)]
    assert np.allclose(model.user_bias(model.train_history), expected, atol=1e-9)


def test_damped_bias_ignores_rows_without_rating(split):
    model = make_recommender("damped-bias").fit(split)
    with_gap = History(
        torch.tensor([0, 2]),
        torch.tensor([0, 1]),
        torch.tensor([5.0, torch.nan]),
        torch.zeros(2, dtype=torch.int64),
    )
    without = History(
        torch.tensor([0, 1]),
        torch.tensor([0]),
        torch.tensor([5.0]),
        torch.zeros(1, dtype=torch.int64),
    )
    assert torch.equal(model.user_bias(with_gap), model.user_bias(without))
    assert model.user_bias(without).item() != 0


def test_damped_bias_treats_a_new_item_in_a_basket_as_average(split):
    model = make_recommender("damped-bias", damping=1).fit(split)
    basket = History(
        torch.tensor([0, 1]),
        torch.tensor([split.n_train_items + 3]),
        torch.tensor([5.0]),
        torch.tensor([0]),
    )
    assert np.isclose(model.user_bias(basket).item(), (5 - float(model.mean)) / 2)


def test_ease_is_the_closed_form(split):
    X = binary(split)
    P = np.linalg.inv(X.T @ X + 7 * np.eye(X.shape[1]))
    B = np.eye(X.shape[1]) - P @ np.diag(1 / np.diag(P))
    model = make_recommender("ease", reg=7).fit(split)
    assert np.allclose(model.weight, B, atol=1e-6)
    assert np.allclose(model.scores(np.arange(len(X))), X @ B, atol=1e-5)


def test_ease_refuses_a_catalog_beyond_its_memory(split):
    with pytest.raises(UserError, match="item-knn"):
        make_recommender("ease", max_items=split.n_train_items - 1).fit(split)
    make_recommender("ease", max_items=split.n_train_items).fit(split)


@pytest.mark.parametrize("k, shrink", [(3, 0.0), (5, 4.0), (1000, 1.0)])
def test_item_knn_is_brute_force(split, k, shrink):
    X = binary(split)
    norm = np.sqrt(X.sum(0))
    near = (X.T @ X) / (np.outer(norm, norm) + shrink)
    np.fill_diagonal(near, 0)
    kept = np.zeros_like(near)
    for item, row in enumerate(near):  # the k nearest, ties to the smaller code
        best = sorted(range(len(row)), key=lambda j: (-row[j], j))[:k]
        kept[item, best] = row[best]
    model = make_recommender("item-knn", k=k, shrink=shrink).fit(split)
    assert np.allclose(model.scores(np.arange(len(X))), X @ kept, atol=1e-5)


def test_item_knn_in_blocks_is_item_knn_at_once(split):
    X = sp.csr_array(binary(split))
    similarity = cosine(X, X, 2.0)
    whole = top_k_neighbors(X, 6, similarity)
    for small, large in zip(top_k_neighbors(X, 6, similarity, budget=50), whole):
        assert torch.equal(small, large)
    n_pairs = int((X.sum(1).astype(int) ** 2).sum())  # pairs of entries of each row
    assert torch.equal(top_k_neighbors(X, 6, similarity, max_pairs=n_pairs)[0], whole[0])
    with pytest.raises(UserError, match=f"{n_pairs:,} pairs"):
        top_k_neighbors(X, 6, similarity, max_pairs=n_pairs - 1)


@pytest.mark.filterwarnings("ignore:Method expects CSR")
def test_item_knn_equals_that_of_implicit(split):
    nearest_neighbours = pytest.importorskip("implicit.nearest_neighbours")
    X = sp.csr_matrix(binary(split))
    k = X.shape[1]  # with all neighbors kept, ties at rank k cannot matter
    theirs = nearest_neighbours.CosineRecommender(K=k)
    theirs.fit(X, show_progress=False)
    expected = theirs.similarity.toarray()
    np.fill_diagonal(expected, 0)  # implicit counts an item as its own neighbor
    assert np.allclose(
        make_recommender("item-knn", k=k, shrink=0).fit(split).scores(np.arange(X.shape[0])),
        X @ expected,
        atol=1e-5,
    )


@pytest.mark.parametrize("measure, min_support", [("confidence", 2), ("lift", 1), ("lift", 3)])
def test_association_rules_are_counted(split, measure, min_support):
    baskets = [set(items) for items in split.train.group_by("user").agg("item")["item"].to_list()]

    def count(*items):
        return sum(set(items) <= basket for basket in baskets)

    def strength(own, item):
        confidence = count(own, item) / count(own)
        return confidence / (count(item) / len(baskets)) if measure == "lift" else confidence

    settings = {"measure": measure, "min_support": min_support, "k": 1000}
    model = make_recommender("association-rules", **settings).fit(split)
    for user in (0, 7, 20):
        basket = set(split.train.filter(user=user)["item"].to_list())
        scores = model.scores([user])[0]
        for item in range(model.n_items):
            own_items = [i for i in basket if i != item and count(i, item) >= min_support]
            strongest = max((strength(own, item) for own in own_items), default=0)
            assert np.isclose(scores[item], strongest, atol=1e-6)


@pytest.mark.parametrize("k, shrink", [(4, 0.0), (9, 3.0)])
def test_user_knn_is_brute_force(split, k, shrink):
    X = binary(split)
    norm = np.sqrt(X.sum(1))
    near = (X @ X.T) / (np.outer(norm, norm) + shrink)
    kept = np.zeros_like(near)
    for user, row in enumerate(near):
        best = sorted(range(len(row)), key=lambda v: (-row[v], v))[:k]
        kept[user, best] = row[best]
    assert np.allclose(
        make_recommender("user-knn", k=k, shrink=shrink).fit(split).scores(np.arange(len(X))),
        kept @ X,
        atol=1e-5,
    )


def fit_surprise(rows, algorithm):
    "Fit an algorithm of Surprise on rows of user, item, rating."
    surprise = pytest.importorskip("surprise")
    import pandas as pd

    data = surprise.Dataset.load_from_df(
        pd.DataFrame(rows, columns=["user", "item", "rating"]),
        surprise.Reader(rating_scale=(-100, 100)),
    )
    return algorithm(surprise).fit(data.build_full_trainset())


@pytest.mark.parametrize("name", ["item-knn", "user-knn"])
@pytest.mark.parametrize("shrink", [0.0, 20.0])
def test_ratings_of_neighbors_equal_those_of_surprise(split, name, shrink):
    similarity = {"name": "pearson_baseline", "user_based": name == "user-knn"}
    options = dict(
        sim_options=similarity | {"shrinkage": shrink},
        bsl_options={"method": "als", "n_epochs": 10, "reg_u": 5, "reg_i": 5},
    )
    theirs = fit_surprise(
        split.train.select("user", "item", "rating").rows(),
        lambda s: s.KNNBaseline(k=10**6, min_k=1, verbose=False, **options),
    )
    rated = set(split.train.select("user", "item").rows())
    pairs = [
        (u, i)
        for u in range(0, split.n_train_users + 1)
        for i in range(0, split.n_train_items + 1)
        if (u, i) not in rated
    ]
    expected = np.array([theirs.predict(u, i, clip=False).est for u, i in pairs])
    settings = {"k_rating": 10**6, "shrink_rating": shrink, "bias_weight": 0.0}
    model = make_recommender(name, **settings).fit(split)
    predicted = model.predict(*zip(*pairs))
    bias = make_recommender("damped-bias").fit(split).predict(*zip(*pairs))
    assert np.allclose(predicted, expected.clip(1, 5), atol=1e-4)
    assert (predicted - bias).abs().max() > 0.5


def test_shrunk_predictions_with_cosine_by_hand(split):
    settings = {"similarity": "cosine", "k_rating": 5, "shrink_rating": 1.0, "bias_weight": 2.0}
    model = make_recommender("item-knn", **settings).fit(split)
    X = binary(split)
    residuals = rating_residuals(model, model.train_history)[1].toarray()
    norm = np.sqrt(X.sum(0))
    near = (X.T @ X) / (np.outer(norm, norm) + 1)
    np.fill_diagonal(near, 0)
    bias = make_recommender("damped-bias").fit(split)
    user_bias, corrections = bias.user_bias(bias.train_history), []
    for user in range(8):
        item = int(np.flatnonzero(X[user] == 0)[user])
        best = sorted(range(len(near)), key=lambda j: (-near[item, j], j))[:5]
        weighted = sum(near[item, j] * residuals[user, j] for j in best)
        weights = sum(near[item, j] * X[user, j] for j in best)
        corrections.append(weighted / (weights + 2))
        by_bias = float(bias.mean + user_bias[user] + bias.item_bias[item])
        expected = np.clip(by_bias + corrections[-1], 1, 5)
        assert np.isclose(model.predict([user], [item]).item(), expected, atol=1e-5)
    assert np.count_nonzero(corrections) > 4


@pytest.mark.parametrize("factors", [3, 12, -1, 1000])
def test_svd_equals_that_of_numpy(split, factors):
    X = binary(split)
    if factors < 0:
        factors += X.shape[1]  # all but one
    u, s, v = np.linalg.svd(X, full_matrices=False)
    s[factors:] = 0
    assert np.allclose(
        make_recommender("svd", factors=factors).fit(split).scores(np.arange(len(X))),
        u * s @ v,
        atol=1e-4,
    )


@pytest.mark.parametrize("budget", [1, 300, 2**22])
def test_batched_ridge_is_a_ridge_regression_per_row(budget):
    rng = np.random.default_rng(0)
    rows = sp.random_array((30, 20), density=0.2, rng=rng, format="csr")
    table, penalty = rng.normal(size=(20, 3)), rng.uniform(0.5, 2, 30)
    gram = 0.3 * table.T @ table
    expected = []
    for row, reg in zip(rows.toarray(), penalty):
        x = table[row != 0]
        normal = 1.7 * x.T @ x + gram + reg * np.eye(3)
        expected.append(np.linalg.solve(normal, x.T @ row[row != 0]))
    inputs, penalties = torch.tensor(table).float(), torch.tensor(penalty).float()
    base_gram = 0.3 * torch.tensor(table.T @ table).float()
    solutions = batched_ridge(rows, inputs, penalties, 1.7, base_gram, budget)
    assert np.allclose(solutions, expected, atol=1e-4)
    assert np.abs(expected).max() > 0.1


def test_funk_svd_reaches_the_objective_of_surprise(split):
    reg, n_factors = 0.1, 2
    settings = {"factors": n_factors, "reg": reg, "n_iter": 200}
    model = make_recommender("funk-svd", **settings).fit(split)
    residuals = rating_residuals(model, model.train_history)[1].tocoo()
    rows = list(zip(residuals.row.tolist(), residuals.col.tolist(), residuals.data.tolist()))

    def cost(p, q):
        return sum((e - p[u] @ q[i]) ** 2 + reg * (p[u] @ p[u] + q[i] @ q[i]) for u, i, e in rows)

    def surprise_cost(seed):
        options = {"n_factors": n_factors, "biased": False, "n_epochs": 2000, "lr_all": 0.005}
        svd = fit_surprise(rows, lambda s: s.SVD(reg_all=reg, random_state=seed, **options))
        users = [svd.trainset.to_inner_uid(c) for c in range(model.n_users)]
        items = [svd.trainset.to_inner_iid(c) for c in range(model.n_items)]
        return cost(svd.pu[users], svd.qi[items])

    def our_cost(seed):
        fitted = make_recommender("funk-svd", seed=seed, **settings).fit(split)
        users = fitted._solve(residuals.tocsr(), fitted.item)
        return cost(users.double().numpy(), fitted.item.double().numpy())

    # both are local searches of the same objective, each the best of six seeds; ours ends 1 % lower
    theirs, ours = min(map(surprise_cost, range(6))), min(map(our_cost, range(6)))
    assert 0.98 < ours / theirs < 1.01
    assert ours < 0.9 * sum(e * e for *_, e in rows)


def test_als_equals_that_of_implicit(split):
    als = pytest.importorskip("implicit.cpu.als")
    X, alpha, reg, n_factors = binary(split), 4.0, 3.0, 5
    model = make_recommender("als", factors=n_factors, alpha=alpha, reg=reg, n_iter=3).fit(split)
    options = {"factors": n_factors, "regularization": reg, "alpha": 1 + alpha, "iterations": 3}
    theirs = als.AlternatingLeastSquares(use_cg=False, num_threads=1, **options)
    generator = torch.Generator().manual_seed(0)
    theirs.item_factors = (0.01 * torch.randn(X.shape[1], n_factors, generator=generator)).numpy()
    theirs.user_factors = np.zeros((len(X), n_factors), np.float32)
    sparse = sp.csr_matrix(X, dtype=np.float32)
    theirs.fit(sparse, show_progress=False)
    users = theirs.recalculate_user(np.arange(len(X)), sparse)  # implicit ends with the items
    expected = users @ theirs.item_factors.T
    assert np.allclose(model.scores(np.arange(len(X))), expected, atol=1e-3)
    assert model.scores([0]).std() > 0.05


def test_bpr_twice_is_the_same_and_learns(split):
    first, second, other = (
        make_recommender("bpr", epochs=300, seed=seed)
        .fit(split)
        .scores(np.arange(split.n_train_users))
        for seed in (0, 0, 1)
    )
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    is_positive = torch.from_numpy(binary(split).astype(bool))
    right = [(row[p][:, None] > row[~p]).float().mean() for row, p in zip(first, is_positive)]
    assert np.mean(right) > 0.9  # most pairs of a positive and another item are in order


def test_a_cold_start_user_of_bpr_is_the_mean_of_the_basket(split):
    model = make_recommender("bpr").fit(split)
    basket = History(
        torch.tensor([0, 2]),
        torch.tensor([4, 1]),
        torch.full((2,), torch.nan),
        torch.zeros(2, dtype=torch.int64),
    )
    item = model.item.numpy()
    assert np.allclose(
        model.scores([model.n_users], basket)[0],
        item[:, :-1] @ item[[4, 1], :-1].mean(0) + item[:, -1],
        atol=1e-5,
    )


def test_bpr_without_implicit_names_the_package(split, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "implicit.cpu.bpr", None)
    with pytest.raises(UserError, match="baselines"):
        make_recommender("bpr").fit(split)


def test_neumf_is_two_networks_side_by_side(split):
    model = make_recommender("neumf", epochs=3).fit(split)
    net, user, item = model.net, torch.arange(6), torch.arange(4, 10)
    with torch.no_grad():
        pair = torch.cat([net.user_deep(user), net.item_deep(item)], 1)
        weight = torch.cat([net.user_layer.weight, net.item_layer.weight], 1)  # the paper's layer
        first = pair @ weight.T + net.user_layer.bias
        second = first.relu() @ net.rest[1].weight.T + net.rest[1].bias
        inputs = torch.cat([net.user(user) * net.item(item), second.relu()], 1)
        weight = torch.cat([net.product.weight, net.rest[3].weight], 1)[0]
        expected = inputs @ weight + net.rest[3].bias
    assert torch.allclose(model.scores(user)[user, item], expected, atol=1e-5)
    assert expected.std() > 1e-3


@pytest.mark.parametrize(
    "name, settings", [("user-knn", {"max_users": 10}), ("neumf", {"max_examples": 1000})]
)
def test_too_much_work_is_refused(split, name, settings):
    with pytest.raises(UserError, match="max_"):
        make_recommender(name, **settings).fit(split)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in BY_USER_ID])
def test_other_codes_for_users_change_nothing(name):
    log = random_log()
    other = log.with_columns(user="v" + pl.col("user").str.reverse())
    ours, theirs = split_of(log), split_of(other)
    a, b = (make_recommender(name).fit(s) for s in (ours, theirs))
    code = {u: c for c, u in enumerate(theirs.users["user"])}
    moved = torch.tensor([code["v" + u[::-1]] for u in a.user_ids])
    assert not torch.equal(moved, torch.arange(a.n_users))
    assert a.item_ids.equals(b.item_ids)
    assert torch.allclose(a.scores(torch.arange(a.n_users)), b.scores(moved), atol=1e-4)


# ---- popularity


def test_popularity_counts_users_and_breaks_ties_in_random_order():
    log = to_interactions(
        pl.DataFrame({"user": list("aabbccd"), "item": ["x", "y", "x", "z", "x", "y", "z"]})
    )
    model = make_recommender("popularity").fit(Split.from_frames(log, log[:0], log[:0]))
    assert dict(zip(model.item_ids, model.weight.tolist())) == {"x": 3, "y": 2, "z": 2}
    order = [model.item_ids[c] for c in hash_order(model.item_ids).tolist()]
    items = model.recommend("new", k=3)["item"].to_list()
    assert items == ["x", *(i for i in order if i in "yz")]  # not by code
    codes = torch.tensor([0, 2, 1])
    assert top_k(model.scores([0], items=codes), 3)[1].tolist() == [[0, 1, 2]]


def test_popularity_counts_a_repeat_once():
    log = to_interactions(pl.DataFrame({"user": list("aaab"), "item": list("xxxy")}))
    model = make_recommender("popularity").fit(Split.from_frames(log, log[:0], log[:0]))
    assert model.weight[:2].tolist() == [1, 1]


def test_a_late_rise_changes_the_order():
    day = 86_400_000
    old, new = [("old", d) for d in range(10)], [("new", d) for d in range(1000, 1004)]
    log = to_interactions(
        pl.DataFrame(
            [(f"u{n}", i, d * day) for n, (i, d) in enumerate(old + new)],
            schema=["user", "item", "timestamp"],
            orient="row",
        )
    )
    split = Split.from_frames(log, log[:0], log[:0])

    def first(name, **p):
        return make_recommender(name, **p).fit(split).recommend("unknown", k=1)["item"].item()

    assert first("popularity") == "old"
    assert first("recent-popularity") == "new"
    assert first("recent-popularity", days=1e6) == "old"
    model = make_recommender("recent-popularity", days=100).fit(split)
    expected = {
        "old": sum(np.exp(-(1003 - d) / 100) for d in range(10)),
        "new": sum(np.exp(-(1003 - d) / 100) for d in range(1000, 1004)),
    }
    assert np.allclose([expected[i] for i in model.item_ids], model.weight[:2])


def test_recent_popularity_without_times_is_popularity():
    log = random_log(times=False)
    split = split_of(pl.concat([log, log[:50]]), 1.0)  # repeats count once
    assert torch.equal(
        make_recommender("recent-popularity").fit(split).weight,
        make_recommender("popularity").fit(split).weight,
    )


# ---- cold-start users, new items, the history in the query


@pytest.mark.parametrize("name", [*FROM_HISTORY, *BY_USER_ID, "popularity"])
def test_a_cold_start_user_gets_popularity(split, name):
    cold_users = [split.n_train_users, split.n_train_users + 77]
    expected = make_recommender("popularity").fit(split).scores(cold_users)
    assert torch.equal(make_recommender(name).fit(split).scores(cold_users), expected)
    assert expected.std() > 0


@pytest.mark.parametrize("name", NAMES)
def test_new_items_are_never_an_error(split, name):
    model = make_recommender(name).fit(split)
    beyond = [0, model.n_items, model.n_items + 50]
    scores = model.scores([0, 1, model.n_users + 3], items=beyond)
    assert scores.shape == (3, 3)
    assert scores.isfinite().all()
    assert torch.equal(scores[:, 1], scores[:, 2])
    assert torch.equal(scores[:, 0], model.scores([0, 1, model.n_users + 3])[:, 0])
    if model.predicts_ratings:
        assert model.predict([0, model.n_users], beyond[1:]).isfinite().all()
    new_only = History(
        torch.tensor([0, 1]),
        torch.tensor([model.n_items + 9]),
        torch.tensor([4.0]),
        torch.tensor([0]),
    )  # only a new item
    assert model.scores([model.n_users], new_only).isfinite().all()
    if name in [*FROM_HISTORY, *BY_USER_ID]:
        assert torch.equal(model.scores([model.n_users], new_only), model.scores([model.n_users]))


@pytest.mark.parametrize("name", [name for name in NAMES if name not in BY_USER_ID])
def test_a_basket_like_a_known_history_scores_alike(split, name):
    model = make_recommender(name).fit(split)
    known = torch.arange(model.n_users)
    basket = model.train_history.select(known)
    assert torch.equal(model.scores(known + model.n_users, basket), model.scores(known))
    if model.predicts_ratings:
        item = torch.arange(len(known)) % model.n_items
        assert torch.equal(
            model.predict(known + model.n_users, item, basket), model.predict(known, item)
        )


@pytest.mark.parametrize("name", NAMES)
def test_every_model_makes_lists_for_baskets_and_cold_start_users(split, name):
    model = make_recommender(name).fit(split)
    full = model.recommend(
        [{"i0": 5, "i1": None, "no such item": 1}, ["i2"], ["no such item"], []], k=4
    )
    assert full["rank"].to_list() == [1, 2, 3, 4] * 4
    assert full["score"].is_finite().all()
    lists = dict(full.group_by("user").agg("item").rows())
    assert not {"i0", "i1"} & set(lists["basket 1"])
    assert "i2" not in lists["basket 2"]
    assert lists["basket 3"] == lists["basket 4"]
    assert model.recommend(["unknown", "u1"], k=2)["user"].to_list() == ["unknown"] * 2 + ["u1"] * 2


@pytest.mark.parametrize("name", PERSONAL)
def test_another_history_changes_the_scores(split, name):
    model = make_recommender(name).fit(split)
    assert not torch.allclose(
        model.scores([0], model.train_history.select(torch.tensor([1]))), model.scores([0])
    )


@pytest.mark.parametrize("name", NAMES)
def test_rows_of_a_block_do_not_touch_each_other(split, name):
    model = make_recommender(name).fit(split)
    users, items = torch.tensor([3, model.n_users, 0, 3]), torch.tensor([4, 1, 7])
    alone = torch.cat([model.scores([u], items=items) for u in users.tolist()])
    assert torch.allclose(model.scores(users, items=items), alone, atol=1e-6)


# ---- files, and logs without ratings or times


@pytest.mark.parametrize("name", NAMES)
def test_saved_and_loaded(split, name, tmp_path):
    model = make_recommender(name).fit(split)
    model.save(tmp_path)
    back = load_recommender(tmp_path)
    users = [0, 5, model.n_users]
    assert back == model
    assert torch.equal(back.scores(users), model.scores(users))
    assert back.recommend(["u1", "unknown"]).equals(model.recommend(["u1", "unknown"]))


@pytest.mark.parametrize("name", NAMES)
def test_without_ratings_and_times(name):
    split = split_of(random_log(ratings=False, times=False))
    model = make_recommender(name)
    if name not in NEED_RATINGS:
        assert model.fit(split).recommend("u1")["rank"].to_list() == list(range(1, 11))
        assert not model.predicts_ratings
    else:
        with pytest.raises(UserError, match="no ratings"):
            model.fit(split)


@pytest.mark.parametrize("name", NAMES)
def test_two_rows_suffice(name):
    log = to_interactions(
        pl.DataFrame(
            {"user": ["a", "b"], "item": ["x", "y"], "rating": [5, 1], "timestamp": [1, 2]}
        )
    )
    model = make_recommender(name).fit(Split.from_frames(log, log[:0], log[:0]))
    assert model.recommend("a")["item"].to_list() == ["y"]


# ---- the comparison


def test_tuning_keeps_the_best_and_never_sees_the_test():
    log = random_log(rows=900)
    split = Split.from_frames(log[:300], log[300:350], log[350:])
    points = [{"damping": d} for d in (1.0, 20.0, 500.0)]
    grid = {"RMSE": points}
    best_settings, trials = grid_search("damped-bias", grid, split)
    user, item, rating = (split.val[c].to_numpy() for c in ("user", "item", "rating"))
    errors = []
    for point in points:
        model = make_recommender("damped-bias", **point).fit(split)
        squares = (model.predict(user, item).double().numpy() - rating) ** 2
        errors.append(float(squares.mean() ** 0.5))
    assert np.allclose([t["value"] for t in trials], errors, atol=1e-6)
    assert best_settings == points[int(np.argmin(errors))]
    assert grid_search("damped-bias", grid, split.without_test()) == (best_settings, trials)
    # no validation part: the defaults
    assert grid_search("damped-bias", grid, split.merge_train_val()) == ({}, [])


def test_every_grid_is_small_and_holds_the_default():
    for name, grid in PARAM_GRIDS.items():
        default = vars(make_recommender(name))
        for points in grid.values():
            assert 1 < len(points) <= 5
            assert points[0].items() <= default.items()


def test_a_model_for_both_tasks_is_tuned_for_each(split):
    parts = []
    for rows in (split.train[:180], split.train[180:], split.test):
        user = split.users["user"].gather(rows["user"]).alias("user")
        item = split.items["item"].gather(rows["item"]).alias("item")
        parts.append(rows.with_columns(user, item))
    with_val = Split.from_frames(*parts)
    grid = {
        "NDCG@20": [{"k": 1}, {"k": 30}],
        "RMSE": [{"bias_weight": 100.0}, {"bias_weight": 0.1}],
    }
    best_settings, trials = grid_search("item-knn", grid, with_val)

    def value(metric, **settings):
        model = make_recommender("item-knn", **settings).fit(with_val)
        return val_score(model, with_val, metric)

    values = [t["value"] for t in trials]
    assert values == [
        value("NDCG@20", k=1),
        value("NDCG@20", k=30),
        value("RMSE", bias_weight=100.0),
        value("RMSE", bias_weight=0.1),
    ]
    assert best_settings == {
        "k": 1 if values[0] > values[1] else 30,
        "bias_weight": 100.0 if values[2] < values[3] else 0.1,
    }
    log = random_log(rows=900, ratings=False)  # without ratings, only lists can be tuned
    unrated = Split.from_frames(log[:300], log[300:350], log[350:])
    assert set(grid_search("item-knn", grid, unrated)[0]) == {"k"}


def test_a_large_log_is_tuned_with_fewer_settings(monkeypatch):
    monkeypatch.setattr("widedeep_nb.lib.comparison.LARGE_LOG_ROWS", 100)
    log = random_log(rows=900)
    split = Split.from_frames(log[:300], log[300:350], log[350:])
    assert len(grid_search("ease", PARAM_GRIDS["ease"], split)[1]) == 2


def well_formed(sentences):
    text = " ".join(filter(None, sentences))
    assert not re.search(r"\bnan\b|None|\(\)|  |\.\.|\binf\b", text.strip()), text
    assert all(s.endswith(".") for s in sentences if s)
    return text


@pytest.mark.parametrize(
    "arguments, phrases",
    [
        (
            ({"model": "ease", "value": 0.3, "popularity": 0.1}, (0.05, 0.01, 0.09)),
            ("The best baseline for lists is ease", "3.0 times", "Wide & Deep is 0.050 higher"),
        ),
        (
            ({"model": "als", "value": 0.2, "popularity": 0.1}, (-0.05, -0.09, -0.01)),
            ("is als", "Wide & Deep is 0.050 lower"),
        ),
        (
            ({"model": "popularity", "value": 0.1, "popularity": 0.1}, (0.0, -0.1, 0.1)),
            ("no baseline is better than one list", "neither clearly better nor clearly worse"),
        ),
        (
            ({"model": "als", "value": 0.2, "popularity": 0.0}, (0.1, None, None)),
            ("too few users",),
        ),
        ((None, None), ("No test user has a relevant item",)),
    ],
)
def test_in_short_says_what_came_out_for_lists(arguments, phrases):
    text = well_formed(baselines_in_short(*arguments))
    assert all(phrase in text for phrase in phrases)


def test_in_short_says_what_came_out_for_ratings_and_protocols():
    ratings = {"model": "damped-bias", "value": 1.1, "mean": 1.3}

    def text(*arguments, **options):
        return well_formed(baselines_in_short(None, None, *arguments, **options))

    assert "is clearly better than damped-bias" in text(ratings, (-0.1, -0.2, -0.05))
    assert "is clearly worse than damped-bias" in text(ratings, (0.1, 0.05, 0.2))
    assert "neither clearly better nor" in text(ratings, (0.1, -0.05, 0.2))
    only_mean = text({"model": "mean", "value": 1.3, "mean": 1.3}, None)
    assert "For ratings, mean has the lowest error (RMSE) of the baselines, 1.300." in only_mean
    assert "3 of 10 pairs" in text(protocols=(4, 5, 10, 3, 2))
    assert "Every pair gives the same order" in text(protocols=(4, 5, 10, 10, 0))
    assert "Only one evaluation protocol" in text()
    assert text(advice="Use it.").endswith("Use it.")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    run = Run(tmp_path_factory.mktemp("runs") / "small", dataset="demo?ratings=4000")
    train(run, epochs=2, seeds=2)
    compare_baselines(run, tune=False)
    return run


def test_the_comparison_is_paired_and_complete(run):
    records = run.metrics().filter(split="test", items="all", relevant="any", users="all")

    models = pooled_records(records.filter(pl.col("versus").is_null()))

    def value(model, metric):
        return models.filter(model=model, metric=metric)["value"].item()

    differences = pooled_records(records.filter(pl.col("versus").is_not_null()))
    for name in [*NAMES, *ABLATIONS]:
        for metric in ("RMSE", "NDCG@20", "Precision@5"):
            row = differences.filter(versus=name, metric=metric)
            if metric == "RMSE" and name not in (*RATING, *ABLATIONS):
                assert not len(row)
                continue
            difference = row["value"].item()
            assert np.isclose(difference, value("wide-deep", metric) - value(name, metric))
            assert row["lo"].item() <= difference <= row["hi"].item()
    assert set(run.metrics()["users"]) == {"all", "warm", "cold"}
    fits = run.read("compare.json")["fits"]
    assert [f["model"] for f in fits] == NAMES
    assert all(f["seconds"] > 0 for f in fits)


def test_a_table_holds_one_fit_of_each_model_even_after_later_tuning(run):
    def table():
        return table_by_group(read_records(run, ["wide-deep", *ABLATIONS, *NAMES]), "RMSE")

    before = table()
    records = run.metrics()
    own = read_records(run, ["wide-deep"]).filter(metric="RMSE", users="all")["value"].item()
    measured = pooled_records(records.filter(pl.col("versus").is_null(), model="wide-deep"))
    in_all = measured.filter(metric="RMSE", users="all", items="all", relevant="any", split="test")
    assert own == in_all["value"].item()  # the same as chapter 06 wrote

    # chapter 13 writes other fits of the same models, without the differences of this chapter
    tuned = records.filter(pl.col("versus").is_null()).with_columns(pl.col("value") * 0.9)
    kept = run.read("metrics.json")
    try:
        run.add_metrics(tuned)
        assert table().equals(before)
    finally:
        run.write("metrics.json", kept)
    numbers = before.with_columns(
        pl.col(c).str.extract(r"^([-+]?[\d.]+)").cast(pl.Float64)
        for c in ("all", "wide-deep minus model")
    )
    wide_deep = numbers.filter(model="wide-deep")["all"].item()
    for value, difference in numbers.select("all", "wide-deep minus model").drop_nulls().rows():
        assert abs(wide_deep - value - difference) < 0.0021  # three roundings to 0.001


def test_saved_models_and_tables_match_the_metrics(run):
    split = run.load_splits()[-1].for_final_fit()
    for name in NAMES:
        model, fresh = load_recommender(run.model_folder(name)), make_recommender(name).fit(split)
        assert torch.equal(model.scores([0, 1, 10**6]), fresh.scores([0, 1, 10**6]))
    saved = run.read("evaluation/ease/ranked.parquet").filter(relevant="any", items="all")
    recorded = run.metrics().filter(
        model="ease", split="test", metric="NDCG@20", users="all", items="all", relevant="any"
    )
    assert np.isclose(saved["NDCG@20"].mean(), recorded["value"].item())
    assert set(saved["user"]) <= set(split.users["user"])


def test_a_tuned_baseline_is_refitted_on_all_rows_of_the_final_fit(run):
    split = run.load_splits()[-1]
    models, notes = fit_and_save(run, "recent-popularity")
    settings, trials = grid_search("recent-popularity", PARAM_GRIDS["recent-popularity"], split)
    assert len(trials) == 5
    assert notes[0]["settings"] == settings
    assert notes[0]["tried"] == trials
    refitted = make_recommender("recent-popularity", **settings).fit(split.merge_train_val())
    assert torch.equal(models[0, 0].weight, refitted.weight)


# ---- protocols


def test_tau_counts_reversed_pairs():
    rng = np.random.default_rng(0)
    rows = [(p, f"m{m}", v) for p in "ab" for m, v in enumerate(rng.permutation(7).tolist())]
    a, b = ([v for p, _, v in rows if p == q] for q in "ab")
    kept = [np.sign(a[i] - a[j]) * np.sign(b[i] - b[j]) for i in range(7) for j in range(i)]
    tau = rank_correlation(
        pl.DataFrame(rows[::-1], schema=["protocol", "model", "value"], orient="row")
    )
    assert np.isclose(tau["tau"].item(), np.mean(kept))
    assert 0 < abs(np.mean(kept)) < 1


def test_each_protocol_is_evaluated_as_it_says(run):
    compare_protocols(run)
    results, log = run.read("protocols.json"), run.read("interactions.parquet")
    figures = pl.DataFrame(results["figures"])
    protocols = figures["protocol"].unique(maintain_order=True).to_list()
    assert protocols == [p for p in PROTOCOLS if p != "given"]
    assert figures["model"].to_list() == list(PROTOCOL_MODELS) * 5
    assert [(x["protocol"], x["model"]) for x in results["excluded"]] == [("given", None)]
    assert "part" in results["excluded"][0]["reason"]

    def figure(protocol, model, column="value"):
        return figures.filter(protocol=protocol, model=model)[column].item()

    def ndcg(name, split):
        weighted = split.with_event_weights(run_event_weights(run))
        model = make_recommender(name).fit(weighted)
        return eval_ranking(model, weighted, "test", (20,)).users["NDCG@20"]

    recorded = run.metrics().filter(
        pl.col("versus").is_null(),
        split="test",
        metric="NDCG@20",
        users="all",
        items="all",
        relevant="any",
    )
    for model in PROTOCOL_MODELS:  # the run's own protocol, as in the comparison
        expected = recorded.filter(model=model)["value"].item()
        assert np.isclose(figure("strict", model), expected)
    reported = prepare(log, "as-reported")
    assert len(reported.val) == 0
    assert not reported.protocol.mask_seen
    assert np.isclose(figure("as-reported", "ease"), ndcg("ease", reported).mean())
    # the same rows, masked
    assert not np.isclose(figure("as-reported", "ease"), figure("filtered-first", "ease"))
    split = prepare(log, "leave-one-out")
    known = split.test.join(split.train, on="item", how="semi")
    bought = split.auxiliary_before("test").filter(pl.col("event") == "purchase")
    owned = pl.concat(rows.select("user", "item") for rows in (split.rows_before("test"), bought))
    unseen = known.join(owned, on=["user", "item"], how="anti")
    assert figure("leave-one-out", "popularity", "n") == len(unseen)
    folds = [s.for_final_fit() for s in prepare(log, "rolling")]
    assert len(folds) == 4
    lists = pl.concat([ndcg("item-knn", fold) for fold in folds])
    assert np.isclose(figure("rolling", "item-knn"), lists.mean())
    assert figure("rolling", "item-knn", "n") == len(lists)


def test_a_model_that_cannot_be_fitted_is_skipped_with_its_reason(tmp_path, monkeypatch):
    def refuse(self, user_item):
        raise UserError("too large")

    monkeypatch.setattr(EASE, "_fit_matrix", refuse)
    small = Run(tmp_path / "refused", dataset="demo?ratings=3000")
    compare_protocols(small)
    results = small.read("protocols.json")
    skipped = [x for x in results["excluded"] if x["protocol"] != "given"]
    assert {(x["model"], x["reason"]) for x in skipped} == {("ease", "too large")}
    assert {x["model"] for x in results["figures"]} == set(PROTOCOL_MODELS) - {"ease"}


# ---- values measured before, on real logs


def list_metrics(model, split, n_items, k=20, block=500):
    """Compute Precision@5, Recall@5, MAP@5, NDCG@20 and Recall@20 of each user.

    Candidates are the items 0 to n_items - 1; the user's rows outside of the test part are masked.
    """
    users = split.test["user"].unique().sort().to_numpy()
    history = History.from_rows(split.rows_before("test"), len(split.users))
    items, lists = torch.arange(n_items), []
    for block_users in torch.tensor(users).long().split(block):
        scores = model.scores(block_users, items=items)
        lists.append(top_k(mask_seen(scores, history.select(block_users), items), k)[1])
    lists = torch.cat(lists)
    pairs = split.test.select("user", "item").unique()

    def key(user, item):
        return user * len(split.items) + item

    hits = np.isin(
        key(users.astype(np.int64)[:, None], lists.numpy()),
        key(pairs["user"].cast(pl.Int64).to_numpy(), pairs["item"].to_numpy()),
    )
    n = pairs.group_by("user").len().sort("user")["len"].to_numpy()
    gain = 1 / np.log2(np.arange(2, k + 2))
    precision = hits[:, :5].cumsum(1) / np.arange(1, 6)
    return users, np.stack(
        [
            hits[:, :5].sum(1) / 5,
            hits[:, :5].sum(1) / n,
            (precision * hits[:, :5]).sum(1) / np.minimum(n, 5),
            hits @ gain / gain.cumsum()[np.minimum(n, k) - 1],
            hits.sum(1) / n,
        ],
        axis=1,
    )


@pytest.fixture(scope="module")
def ciao():
    return prepare(load(SHARED / "ciao").interactions, "filtered-first").for_final_fit()


@real
def test_the_log_is_the_one_that_was_measured(ciao):
    assert (len(ciao.train) + len(ciao.test), len(ciao.users), len(ciao.items), len(ciao.test)) == (
        54320,
        3384,
        1458,
        5432,
    )


@real
@pytest.mark.parametrize("name, rmse", [("mean", 1.0873), ("damped-bias", 0.9817)])
def test_ratings_on_ciao(ciao, name, rmse):
    rated = eval_ratings(make_recommender(name).fit(ciao), ciao, "test")
    assert len(rated) == 5432
    assert abs(rated["RMSE"].mean() ** 0.5 - rmse) < 0.0005


@real
@pytest.mark.parametrize(
    "name, known, expected",
    [
        ("popularity", False, (0.0267, 0.0243, 0.0230, 0.0471)),
        ("popularity", True, (0.0275, 0.0292, 0.0230, 0.0550)),
        ("ease", True, (0.0284, 0.0333, 0.0221, 0.0505)),
    ],
)
def test_lists_on_ciao(ciao, name, known, expected):
    model = make_recommender(name).fit(ciao)
    users, metrics = list_metrics(model, ciao, len(ciao.items))  # new items are candidates too
    rows = users < model.n_users if known else slice(None)
    assert np.allclose(metrics[rows, :4].mean(0), expected, atol=0.0005)


@pytest.fixture(scope="module")
def dense():
    return prepare(load(SHARED / "electronics-dense").interactions, "given")


@real
@pytest.mark.parametrize(
    "name, settings, recall, ndcg",
    [
        ("popularity", {}, 0.0434, 0.0257),
        pytest.param("ease", {"reg": 300.0}, 0.0754, 0.0487, marks=pytest.mark.long),
    ],
)
def test_lists_on_a_published_split(dense, name, settings, recall, ndcg):
    model = make_recommender(name, **settings).fit(dense)
    _, metrics = list_metrics(model, dense, model.n_items)
    assert np.allclose(metrics[:, [4, 3]].mean(0), (recall, ndcg), atol=0.0005)
    ours = eval_ranking(model, dense, "test", (20,)).users
    assert np.allclose(
        ours.select("Recall@20", "NDCG@20").mean().row(0), (recall, ndcg), atol=0.0005
    )
