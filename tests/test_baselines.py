"The baselines against plain loops, dense algebra, another library, and figures measured on real logs."

import os
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import scipy.sparse as sp
import torch

from widedeep_nb.baselines import (
    ABLATIONS,
    EASE,
    PARAM_GRIDS,
    PROTOCOL_MODELS,
    batched_ridge,
    compare_baselines,
    compare_protocols,
    cosine,
    fit_and_save,
    grid_search,
    model_choice_text,
    pooled_records,
    rank_correlation,
    rating_residuals,
    top_k_neighbors,
    val_score,
)
from widedeep_nb.core import (
    PROTOCOLS,
    History,
    Run,
    Split,
    UserError,
    hash_order,
    load_recommender,
    make_recommender,
    mask_seen,
    to_interactions,
    top_k,
)
from widedeep_nb.data import load
from widedeep_nb.evaluation import eval_ranking, eval_ratings
from widedeep_nb.preprocessing import prepare
from widedeep_nb.training import train

NAMES = list(PARAM_GRIDS)
BY_STARS = ["mean", "damped-bias", "funk-svd"]  # need stars
RATING = [*BY_STARS, "user-knn", "item-knn"]  # predict them where there are any
BY_NUMBER = ["bpr", "neumf"]  # know a user by the code, not by the history
PERSONAL = [
    name for name in NAMES if name not in ("mean", "popularity", "recent-popularity", *BY_NUMBER)
]
FROM_HISTORY = [name for name in PERSONAL if name not in BY_STARS]
SHARED = Path(os.environ.get("WIDEDEEP_SHARED", Path(__file__).parents[1] / "../shared")) / "data"
real = pytest.mark.skipif(not SHARED.exists(), reason="the real logs are not here")


def random_log(users=40, items=25, rows=400, seed=0, stars=True, times=True):
    rng = np.random.default_rng(seed)
    # squared: a few items are popular, most are not
    log = {
        "user": [f"u{u}" for u in rng.integers(users, size=rows)],
        "item": [f"i{int(items * x * x)}" for x in rng.random(rows)],
        "rating": rng.integers(1, 6, rows) if stars else None,
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


# ---------------------------------------------------------------- each against a slower way to the same


def test_mean_is_the_mean(split):
    want = sum(split.train["rating"].to_list()) / len(split.train)
    assert np.allclose(
        make_recommender("mean").fit(split).predict([0, 5, 999], [3, 1, 999]), want, atol=1e-6
    )


@pytest.mark.parametrize("damping, passes", [(5, 10), (0, 3), (2.5, 1)])
def test_damped_bias_is_the_plain_loop(split, damping, passes):
    rows = [(u, i, float(r)) for u, i, r, _ in split.train.rows()]
    users, items = (
        np.array([0, 1, 2, split.n_train_users, 3]),
        np.array([5, 6, split.n_train_items, 7, 8]),
    )  # one stranger, one new item
    mean = sum(r for *_, r in rows) / len(rows)
    of_user, of_item = {}, {}
    for _ in range(passes):
        for target, own, other, mine, theirs in [
            (of_item, 1, 0, of_item, of_user),
            (of_user, 0, 1, of_user, of_item),
        ]:
            left = {}
            for row in rows:
                left.setdefault(row[own], []).append(row[2] - mean - theirs.get(row[other], 0))
            target.update({k: sum(v) / (len(v) + damping) for k, v in left.items()})
    model = make_recommender("damped-bias", damping=damping, epochs=passes).fit(split)
    want = [
        min(max(mean + of_user.get(u, 0) + of_item.get(i, 0), 1), 5) for u, i in zip(users, items)
    ]
    assert np.allclose(model.predict(users, items), want, atol=1e-5)
    assert np.allclose(
        model.user_bias(model.train_history),
        [of_user[u] for u in range(split.n_train_users)],
        atol=1e-9,
    )


def test_damped_bias_leaves_out_what_has_no_stars(split):
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
    assert (
        torch.equal(model.user_bias(with_gap), model.user_bias(without))
        and model.user_bias(without).item() != 0
    )


def test_damped_bias_takes_a_new_item_in_a_basket_for_an_average_one(split):
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
    assert np.allclose(model.weight, B, atol=1e-6) and np.allclose(
        model.scores(np.arange(len(X))), X @ B, atol=1e-5
    )


def test_ease_refuses_a_catalogue_beyond_its_memory(split):
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
    have = sp.csr_array(binary(split))
    alike = cosine(have, have, 2.0)
    for small, whole in zip(
        top_k_neighbors(have, 6, alike, budget=50), top_k_neighbors(have, 6, alike)
    ):
        assert torch.equal(small, whole)
    pairs = int((have.sum(1).astype(int) ** 2).sum())  # each row's entries beside one another
    assert torch.equal(
        top_k_neighbors(have, 6, alike, max_pairs=pairs)[0], top_k_neighbors(have, 6, alike)[0]
    )
    with pytest.raises(UserError, match=f"{pairs:,} pairs"):
        top_k_neighbors(have, 6, alike, max_pairs=pairs - 1)


@pytest.mark.filterwarnings("ignore:Method expects CSR")
def test_item_knn_is_implicits(split):
    nearest_neighbours = pytest.importorskip("implicit.nearest_neighbours")
    X = sp.csr_matrix(binary(split))
    k = X.shape[1]  # with all neighbours kept, ties at the border cannot matter
    theirs = nearest_neighbours.CosineRecommender(K=k)
    theirs.fit(X, show_progress=False)
    want = theirs.similarity.toarray()
    np.fill_diagonal(want, 0)  # theirs counts an item as its own neighbour
    assert np.allclose(
        make_recommender("item-knn", k=k, shrink=0).fit(split).scores(np.arange(X.shape[0])),
        X @ want,
        atol=1e-5,
    )


@pytest.mark.parametrize("measure, support", [("confidence", 2), ("lift", 1), ("lift", 3)])
def test_association_rules_are_counted(split, measure, support):
    baskets = [set(items) for items in split.train.group_by("user").agg("item")["item"].to_list()]

    def count(*items):
        return sum(set(items) <= basket for basket in baskets)

    model = make_recommender(
        "association-rules", metric_fn=measure, min_support=support, k=1000
    ).fit(split)
    for user in (0, 7, 20):
        basket = set(split.train.filter(user=user)["item"].to_list())
        scores = model.scores([user])[0]
        for item in range(model.n_items):
            strengths = [
                count(own, item)
                / count(own)
                / (count(item) / len(baskets) if measure == "lift" else 1)
                for own in basket
                if own != item and count(own, item) >= support
            ]
            assert np.isclose(scores[item], max(strengths, default=0), atol=1e-6)


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


def surprises(rows, algorithm):
    "An algorithm of Surprise, fitted on rows of user, item, stars."
    surprise = pytest.importorskip("surprise")
    import pandas as pd

    data = surprise.Dataset.load_from_df(
        pd.DataFrame(rows, columns=["user", "item", "rating"]),
        surprise.Reader(rating_scale=(-100, 100)),
    )
    return algorithm(surprise).fit(data.build_full_trainset())


@pytest.mark.parametrize("name", ["item-knn", "user-knn"])
@pytest.mark.parametrize("shrink", [0.0, 20.0])
def test_stars_of_neighbours_are_surprises(split, name, shrink):
    options = dict(
        sim_options={
            "name": "pearson_baseline",
            "user_based": name == "user-knn",
            "shrinkage": shrink,
        },
        bsl_options={"method": "als", "n_epochs": 10, "reg_u": 5, "reg_i": 5},
    )
    theirs = surprises(
        split.train.select("user", "item", "rating").rows(),
        lambda s: s.KNNBaseline(k=10**6, min_k=1, verbose=False, **options),
    )
    have = set(split.train.select("user", "item").rows())
    pairs = [
        (u, i)
        for u in range(0, split.n_train_users + 1)
        for i in range(0, split.n_train_items + 1)
        if (u, i) not in have
    ]
    want = np.array([theirs.predict(u, i, clip=False).est for u, i in pairs])
    model = make_recommender(name, k_rating=10**6, shrink_rating=shrink, shrink_pred=0.0).fit(split)
    ours, bias = (
        model.predict(*zip(*pairs)),
        make_recommender("damped-bias").fit(split).predict(*zip(*pairs)),
    )
    assert np.allclose(ours, want.clip(1, 5), atol=1e-4) and (ours - bias).abs().max() > 0.5


def test_doubt_and_cosine_for_stars_by_hand(split):
    model = make_recommender(
        "item-knn", similarities="cosine", k_rating=5, shrink_rating=1.0, shrink_pred=2.0
    ).fit(split)
    X, (_, left) = binary(split), rating_residuals(model, model.train_history)
    norm = np.sqrt(X.sum(0))
    near = (X.T @ X) / (np.outer(norm, norm) + 1)
    np.fill_diagonal(near, 0)
    bias, pulls = make_recommender("damped-bias").fit(split), []
    for user in range(8):
        item = int(np.flatnonzero(X[user] == 0)[user])
        best = sorted(range(len(near)), key=lambda j: (-near[item, j], j))[:5]
        pulls.append(
            sum(near[item, j] * left.toarray()[user, j] for j in best)
            / (sum(near[item, j] * X[user, j] for j in best) + 2)
        )
        assert np.isclose(
            model.predict([user], [item]).item(),
            np.clip(
                float(bias.mean + bias.user_bias(bias.train_history)[user] + bias.item_bias[item])
                + pulls[-1],
                1,
                5,
            ),
            atol=1e-5,
        )
    assert np.count_nonzero(pulls) > 4


@pytest.mark.parametrize("factors", [3, 12, -1, 1000])
def test_svd_is_numpys(split, factors):
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
def test_regress_is_a_ridge_regression_a_row(budget):
    rng = np.random.default_rng(0)
    rows = sp.random_array((30, 20), density=0.2, rng=rng, format="csr")
    table, penalty = rng.normal(size=(20, 3)), rng.uniform(0.5, 2, 30)
    common = 0.3 * table.T @ table
    want = []
    for row, lam in zip(rows.toarray(), penalty):
        x = table[row != 0]
        want.append(np.linalg.solve(1.7 * x.T @ x + common + lam * np.eye(3), x.T @ row[row != 0]))
    found = batched_ridge(
        rows,
        torch.tensor(table).float(),
        torch.tensor(penalty).float(),
        1.7,
        0.3 * torch.tensor(table.T @ table).float(),
        budget,
    )
    assert np.allclose(found, want, atol=1e-4) and np.abs(want).max() > 0.1


def test_funk_svd_reaches_the_objective_of_surprises_svd(split):
    lam, f = 0.1, 2
    model = make_recommender("funk-svd", factors=f, reg=lam, n_iter=200).fit(split)
    left = rating_residuals(model, model.train_history)[1].tocoo()
    rows = list(zip(left.row.tolist(), left.col.tolist(), left.data.tolist()))

    def cost(p, q):
        return sum((e - p[u] @ q[i]) ** 2 + lam * (p[u] @ p[u] + q[i] @ q[i]) for u, i, e in rows)

    theirs = []
    for seed in range(6):
        svd = surprises(
            rows,
            lambda s: s.SVD(
                n_factors=f,
                biased=False,
                n_epochs=2000,
                lr_all=0.005,
                reg_all=lam,
                random_state=seed,
            ),
        )

        def to(inner, n):
            return np.array([inner(c) for c in range(n)])

        theirs.append(
            cost(
                svd.pu[to(svd.trainset.to_inner_uid, model.n_users)],
                svd.qi[to(svd.trainset.to_inner_iid, model.n_items)],
            )
        )
    ours = min(
        cost(m._solve(left.tocsr(), m.item).double().numpy(), m.item.double().numpy())
        for m in [
            make_recommender("funk-svd", factors=f, reg=lam, n_iter=200, seed=seed).fit(split)
            for seed in range(6)
        ]
    )
    # both are local searches of the same objective, each the best of six starts
    assert abs(ours / min(theirs) - 1) < 0.01 and ours < 0.9 * sum(e * e for *_, e in rows)


def test_als_is_implicits(split):
    als = pytest.importorskip("implicit.cpu.als")
    X, alpha, lam, f = binary(split), 4.0, 3.0, 5
    model = make_recommender("als", factors=f, alpha=alpha, reg=lam, n_iter=3).fit(split)
    theirs = als.AlternatingLeastSquares(
        factors=f, regularization=lam, alpha=1 + alpha, iterations=3, use_cg=False, num_threads=1
    )
    theirs.item_factors = (
        0.01 * torch.randn(X.shape[1], f, generator=torch.Generator().manual_seed(0))
    ).numpy()
    theirs.user_factors = np.zeros((len(X), f), np.float32)
    theirs.fit(sp.csr_matrix(X, dtype=np.float32), show_progress=False)
    again = theirs.recalculate_user(
        np.arange(len(X)), sp.csr_matrix(X, dtype=np.float32)
    )  # theirs ends with the items
    assert (
        np.allclose(model.scores(np.arange(len(X))), again @ theirs.item_factors.T, atol=1e-3)
        and model.scores([0]).std() > 0.05
    )


def test_bpr_twice_is_the_same_and_learns(split):
    first, second, other = (
        make_recommender("bpr", epochs=300, seed=seed)
        .fit(split)
        .scores(np.arange(split.n_train_users))
        for seed in (0, 0, 1)
    )
    assert torch.equal(first, second) and not torch.equal(first, other)
    X = binary(split).astype(bool)
    right = [
        (row[has][:, None] > row[~has]).float().mean()
        for row, has in zip(first, torch.from_numpy(X))
    ]
    assert np.mean(right) > 0.9  # of what a person has and has not, most pairs are in order


def test_a_newcomer_of_bpr_is_the_mean_of_the_basket(split):
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


def test_without_implicit_bpr_says_what_to_install(split, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "implicit.cpu.bpr", None)
    with pytest.raises(UserError, match="baselines"):
        make_recommender("bpr").fit(split)


def test_neumf_is_two_networks_side_by_side(split):
    model = make_recommender("neumf", epochs=3).fit(split)
    net, user, item = model.net, torch.arange(6), torch.arange(4, 10)
    with torch.no_grad():
        both = torch.cat(
            [net.user_deep(user), net.item_deep(item)], 1
        )  # the paper's one layer over both
        first = (
            both @ torch.cat([net.user_layer.weight, net.item_layer.weight], 1).T
            + net.user_layer.bias
        )
        second = first.relu() @ net.rest[1].weight.T + net.rest[1].bias
        want = (
            torch.cat([net.user(user) * net.item(item), second.relu()], 1)
            @ torch.cat([net.product.weight, net.rest[3].weight], 1)[0]
            + net.rest[3].bias
        )
    assert torch.allclose(model.scores(user)[user, item], want, atol=1e-5) and want.std() > 1e-3


@pytest.mark.parametrize(
    "name, settings", [("user-knn", {"max_users": 10}), ("neumf", {"max_examples": 1000})]
)
def test_what_would_take_too_long_is_refused(split, name, settings):
    with pytest.raises(UserError, match="max_"):
        make_recommender(name, **settings).fit(split)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in BY_NUMBER])
def test_other_codes_for_users_change_nothing(name):
    log = random_log()
    other = log.with_columns(user="v" + pl.col("user").str.reverse())
    ours, theirs = split_of(log), split_of(other)
    a, b = (make_recommender(name).fit(s) for s in (ours, theirs))
    code = {u: c for c, u in enumerate(theirs.users["user"])}
    moved = torch.tensor([code["v" + u[::-1]] for u in a.user_ids])
    assert not torch.equal(moved, torch.arange(a.n_users)) and a.item_ids.equals(b.item_ids)
    assert torch.allclose(a.scores(torch.arange(a.n_users)), b.scores(moved), atol=1e-4)


# ---------------------------------------------------------------- what is popular


def test_popularity_counts_users_and_ties_fall_by_lot():
    log = to_interactions(
        pl.DataFrame({"user": list("aabbccd"), "item": ["x", "y", "x", "z", "x", "y", "z"]})
    )
    model = make_recommender("popularity").fit(Split.from_frames(log, log[:0], log[:0]))
    assert dict(zip(model.item_ids, model.weight.tolist())) == {"x": 3, "y": 2, "z": 2}
    drawn = [model.item_ids[c] for c in hash_order(model.item_ids).tolist()]
    listed = model.recommend("new", k=3)["item"].to_list()
    assert listed[0] == "x" and listed[1:] == [
        i for i in drawn if i in "yz"
    ]  # as the lot has it, whatever the code
    codes = torch.tensor([0, 2, 1])
    assert top_k(model.scores([0], items=codes), 3)[1].tolist() == [[0, 1, 2]]


def test_popularity_counts_a_repeat_once():
    log = to_interactions(pl.DataFrame({"user": list("aaab"), "item": list("xxxy")}))
    assert make_recommender("popularity").fit(Split.from_frames(log, log[:0], log[:0])).weight[
        :2
    ].tolist() == [1, 1]


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
        return make_recommender(name, **p).fit(split).recommend("stranger", k=1)["item"].item()

    assert (
        first("popularity") == "old"
        and first("recent-popularity") == "new"
        and first("recent-popularity", days=1e6) == "old"
    )
    model = make_recommender("recent-popularity", days=100).fit(split)
    want = {
        "old": sum(np.exp(-(1003 - d) / 100) for d in range(10)),
        "new": sum(np.exp(-(1003 - d) / 100) for d in range(1000, 1004)),
    }
    assert np.allclose([want[i] for i in model.item_ids], model.weight[:2])


def test_recent_popularity_without_times_is_popularity():
    log = random_log(times=False)
    split = split_of(pl.concat([log, log[:50]]), 1.0)  # some have it twice: they count once
    assert torch.equal(
        make_recommender("recent-popularity").fit(split).weight,
        make_recommender("popularity").fit(split).weight,
    )


# ---------------------------------------------------------------- strangers, new items, the history in the query


@pytest.mark.parametrize("name", [*FROM_HISTORY, *BY_NUMBER, "popularity"])
def test_a_stranger_gets_what_is_popular(split, name):
    stranger = [split.n_train_users, split.n_train_users + 77]
    want = make_recommender("popularity").fit(split).scores(stranger)
    assert torch.equal(make_recommender(name).fit(split).scores(stranger), want) and want.std() > 0


@pytest.mark.parametrize("name", NAMES)
def test_new_items_are_never_an_error(split, name):
    model = make_recommender(name).fit(split)
    beyond = [0, model.n_items, model.n_items + 50]
    scores = model.scores([0, 1, model.n_users + 3], items=beyond)
    assert (
        scores.shape == (3, 3)
        and scores.isfinite().all()
        and torch.equal(scores[:, 1], scores[:, 2])
    )
    assert torch.equal(scores[:, 0], model.scores([0, 1, model.n_users + 3])[:, 0])
    if model.predicts_ratings:
        assert model.predict([0, model.n_users], beyond[1:]).isfinite().all()
    odd = History(
        torch.tensor([0, 1]),
        torch.tensor([model.n_items + 9]),
        torch.tensor([4.0]),
        torch.tensor([0]),
    )  # all they have is new
    assert model.scores([model.n_users], odd).isfinite().all()
    if name in [*FROM_HISTORY, *BY_NUMBER]:
        assert torch.equal(model.scores([model.n_users], odd), model.scores([model.n_users]))


@pytest.mark.parametrize("name", [name for name in NAMES if name not in BY_NUMBER])
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
def test_every_model_lists_for_baskets_and_strangers(split, name):
    model = make_recommender(name).fit(split)
    full = model.recommend(
        [{"i0": 5, "i1": None, "no such thing": 1}, ["i2"], ["no such thing"], []], k=4
    )
    assert full["rank"].to_list() == [1, 2, 3, 4] * 4 and full["score"].is_finite().all()
    had = dict(full.group_by("user").agg("item").rows())
    assert (
        not {"i0", "i1"} & set(had["basket 1"])
        and "i2" not in had["basket 2"]
        and had["basket 3"] == had["basket 4"]
    )
    assert model.recommend(["nobody", "u1"], k=2)["user"].to_list() == ["nobody"] * 2 + ["u1"] * 2


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


# ---------------------------------------------------------------- files, and logs that lack something


@pytest.mark.parametrize("name", NAMES)
def test_saved_and_loaded(split, name, tmp_path):
    model = make_recommender(name).fit(split)
    model.save(tmp_path)
    back = load_recommender(tmp_path)
    users = [0, 5, model.n_users]
    assert back == model and torch.equal(back.scores(users), model.scores(users))
    assert back.recommend(["u1", "nobody"]).equals(model.recommend(["u1", "nobody"]))


@pytest.mark.parametrize("name", NAMES)
def test_without_stars_and_times(name):
    split = split_of(random_log(stars=False, times=False))
    model = make_recommender(name)
    if name not in BY_STARS:
        assert (
            model.fit(split).recommend("u1")["rank"].to_list() == list(range(1, 11))
            and not model.predicts_ratings
        )
    else:
        with pytest.raises(UserError, match="stars"):
            model.fit(split)


@pytest.mark.parametrize("name", NAMES)
def test_two_rows_suffice(name):
    log = to_interactions(
        pl.DataFrame(
            {"user": ["a", "b"], "item": ["x", "y"], "rating": [5, 1], "timestamp": [1, 2]}
        )
    )
    assert make_recommender(name).fit(Split.from_frames(log, log[:0], log[:0])).recommend("a")[
        "item"
    ].to_list() == ["y"]


# ---------------------------------------------------------------- the comparison


def test_tuning_keeps_the_best_and_never_sees_the_test():
    log = random_log(rows=900)
    split = Split.from_frames(log[:300], log[300:350], log[350:])
    points = [{"damping": d} for d in (1.0, 20.0, 500.0)]
    grid = {"RMSE": points}
    settings, tried = grid_search("damped-bias", grid, split)
    errors = []
    for point in points:
        predicted = (
            make_recommender("damped-bias", **point)
            .fit(split)
            .predict(split.val["user"].to_numpy(), split.val["item"].to_numpy())
        )
        errors.append(
            float(
                ((predicted.double().numpy() - split.val["rating"].to_numpy()) ** 2).mean() ** 0.5
            )
        )
    assert (
        np.allclose([t["value"] for t in tried], errors, atol=1e-6)
        and settings == points[int(np.argmin(errors))]
    )
    assert grid_search("damped-bias", grid, split.without_test()) == (settings, tried)
    assert grid_search("damped-bias", grid, split.merge_train_val()) == (
        {},
        [],
    )  # no validation part: the defaults


def test_every_grid_is_small_and_holds_the_default():
    for name, grid in PARAM_GRIDS.items():
        default = vars(make_recommender(name))
        for points in grid.values():
            assert 1 < len(points) <= 5 and points[0].items() <= default.items()


def test_a_model_for_both_tasks_is_tuned_for_each(split):
    both = Split.from_frames(
        *[
            p.with_columns(
                split.users["user"].gather(p["user"]).alias("user"),
                split.items["item"].gather(p["item"]).alias("item"),
            )
            for p in (split.train[:180], split.train[180:], split.test)
        ]
    )
    grid = {
        "NDCG@20": [{"k": 1}, {"k": 30}],
        "RMSE": [{"shrink_pred": 100.0}, {"shrink_pred": 0.1}],
    }
    chosen, tried = grid_search("item-knn", grid, both)

    def value(metric, **settings):
        return val_score(make_recommender("item-knn", **settings).fit(both), both, metric)

    assert [t["value"] for t in tried] == [
        value("NDCG@20", k=1),
        value("NDCG@20", k=30),
        value("RMSE", doubt=100.0),
        value("RMSE", doubt=0.1),
    ]
    assert chosen == {
        "k": 1 if tried[0]["value"] > tried[1]["value"] else 30,
        "shrink_pred": 100.0 if tried[2]["value"] < tried[3]["value"] else 0.1,
    }
    log = random_log(rows=900, stars=False)  # without stars there is nothing to tune them by
    assert set(
        grid_search("item-knn", grid, Split.from_frames(log[:300], log[300:350], log[350:]))[0]
    ) == {"k"}


def test_a_big_log_is_tuned_with_less(split, monkeypatch):
    monkeypatch.setattr("widedeep_nb.baselines.LARGE_LOG_ROWS", 100)
    log = random_log(rows=900)
    assert (
        len(
            grid_search(
                "ease", PARAM_GRIDS["ease"], Split.from_frames(log[:300], log[300:350], log[350:])
            )[1]
        )
        == 2
    )


def test_what_follows_is_what_the_intervals_say():
    row = dict(model="wide-deep", users="all", items="all", n_relevant="any")

    def say(metric, *rows):
        return model_choice_text(
            pl.DataFrame(
                [
                    row
                    | {"metric": metric, "versus": v, "value": (lo + hi) / 2, "lo": lo, "hi": hi}
                    for v, lo, hi in rows
                ]
            )
        )

    assert (
        say("RMSE", ("mean", -0.3, -0.1), ("funk-svd", -0.2, -0.1))
        == "To predict stars, wide-deep beats 2 of 2 baselines and loses to 0; it has earned its place here."
    )
    assert say("NDCG@20", ("mean", 0.1, 0.3), ("ease", -0.2, -0.1), ("als", -0.5, -0.4)).endswith(
        "beats 1 of 3 baselines and loses to 2; as it stands, use als instead."
    )
    assert (
        "simpler" in say("NDCG@20", ("mean", 0.1, 0.3), ("ease", -0.2, 0.1))
        and say("NDCG@20", ("wide-alone", -2.0, -1.0)) == ""
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    run = Run(tmp_path_factory.mktemp("runs") / "small", dataset="demo?ratings=4000")
    train(run, epochs=2, seeds=2)
    compare_baselines(run, tune=False)
    return run


def test_the_comparison_is_paired_and_complete(run):
    records = run.metrics().filter(split="test", items="all", relevant="any", users="all")

    def value(model, metric):
        return (
            pooled_records(records.filter(pl.col("versus").is_null()))
            .filter(model=model, metric=metric)["value"]
            .item()
        )

    apart = pooled_records(records.filter(pl.col("versus").is_not_null()))
    for name in [*NAMES, *ABLATIONS]:
        for metric in ("RMSE", "NDCG@20", "Precision@5"):
            row = apart.filter(versus=name, metric=metric)
            if metric == "RMSE" and name not in (*RATING, *ABLATIONS):
                assert not len(row)
                continue
            assert (
                np.isclose(row["value"].item(), value("wide-deep", metric) - value(name, metric))
                and row["lo"].item() <= row["value"].item() <= row["hi"].item()
            )
    assert set(run.metrics()["users"]) == {"all", "warm", "cold"}
    assert [f["model"] for f in run.read("compare.json")["fits"]] == NAMES and all(
        f["seconds"] > 0 for f in run.read("compare.json")["fits"]
    )


def test_what_is_kept_is_what_was_measured(run):
    split = run.load_splits()[-1].for_final_fit()
    for name in NAMES:
        model, fresh = load_recommender(run.model_folder(name)), make_recommender(name).fit(split)
        assert torch.equal(model.scores([0, 1, 10**6]), fresh.scores([0, 1, 10**6]))
    kept = run.read("evaluation/ease/ranked.parquet").filter(relevant="any", items="all")
    recorded = run.metrics().filter(
        model="ease", split="test", metric="NDCG@20", users="all", items="all", relevant="any"
    )
    assert np.isclose(kept["NDCG@20"].mean(), recorded["value"].item()) and set(
        kept["user"]
    ) <= set(split.users["user"])


def test_a_tuned_baseline_is_refitted_on_all_rows_of_the_final_fit(run):
    split = run.load_splits()[-1]
    models, notes = fit_and_save(run, "recent-popularity")
    settings, tried = grid_search("recent-popularity", PARAM_GRIDS["recent-popularity"], split)
    assert len(tried) == 5 and notes[0]["settings"] == settings and notes[0]["tried"] == tried
    assert torch.equal(
        models[0, 0].weight,
        make_recommender("recent-popularity", **settings).fit(split.merge_train_val()).weight,
    )


# ---------------------------------------------------------------- one log, several protocols


def test_tau_counts_pairs_that_changed_places():
    rng = np.random.default_rng(0)
    rows = [(p, f"m{m}", v) for p in "ab" for m, v in enumerate(rng.permutation(7).tolist())]
    a, b = ([v for p, _, v in rows if p == q] for q in "ab")
    kept = [np.sign(a[i] - a[j]) * np.sign(b[i] - b[j]) for i in range(7) for j in range(i)]
    tau = rank_correlation(
        pl.DataFrame(rows[::-1], schema=["protocol", "model", "value"], orient="row")
    )
    assert np.isclose(tau["tau"].item(), np.mean(kept)) and 0 < abs(np.mean(kept)) < 1


def test_each_protocol_is_itself(run):
    compare_protocols(run)
    told, log = run.read("protocols.json"), run.read("interactions.parquet")
    figures = pl.DataFrame(told["figures"])
    assert (
        figures["protocol"].unique(maintain_order=True).to_list()
        == [p for p in PROTOCOLS if p != "given"]
        and figures["model"].to_list() == list(PROTOCOL_MODELS) * 5
    )
    assert [(x["protocol"], x["model"]) for x in told["excluded"]] == [
        ("given", None)
    ] and "part" in told["excluded"][0]["reason"]

    def found(protocol, model):
        return figures.filter(protocol=protocol, model=model)

    measured = run.metrics().filter(
        pl.col("versus").is_null(),
        split="test",
        metric="NDCG@20",
        users="all",
        items="all",
        relevant="any",
    )
    for model in PROTOCOL_MODELS:  # the run's own protocol, as the comparison measured it
        assert np.isclose(
            found("strict", model)["value"].item(), measured.filter(model=model)["value"].item()
        )
    reported = prepare(log, "as-reported")
    assert len(reported.val) == 0 and not reported.protocol.mask_seen

    def mean(split):
        return (
            eval_ranking(make_recommender("ease").fit(split), split, "test", (20,))
            .users["NDCG@20"]
            .mean()
        )

    assert np.isclose(found("as-reported", "ease")["value"].item(), mean(reported))
    assert not np.isclose(
        found("as-reported", "ease")["value"].item(),
        found("filtered-first", "ease")["value"].item(),
    )  # the same rows, masked
    last = prepare(log, "leave-one-out")
    assert found("leave-one-out", "popularity")["n"].item() == len(
        last.test.join(last.train, on="item", how="semi").join(
            last.rows_before("test"), on=["user", "item"], how="anti"
        )
    )
    windows = [s.for_final_fit() for s in prepare(log, "rolling")]
    lists = pl.concat(
        [eval_ranking(make_recommender("item-knn").fit(s), s, "test", (20,)).users for s in windows]
    )
    assert (
        len(windows) == 4
        and np.isclose(found("rolling", "item-knn")["value"].item(), lists["NDCG@20"].mean())
        and found("rolling", "item-knn")["n"].item() == len(lists)
    )


def test_a_model_that_refuses_is_left_out_with_its_reason(tmp_path, monkeypatch):
    def refuse(self, have):
        raise UserError("too large")

    monkeypatch.setattr(EASE, "_fit_matrix", refuse)
    small = Run(tmp_path / "refused", dataset="demo?ratings=3000")
    compare_protocols(small)
    told = small.read("protocols.json")
    assert {(x["model"], x["reason"]) for x in told["excluded"] if x["protocol"] != "given"} == {
        ("ease", "too large")
    }
    assert {x["model"] for x in told["figures"]} == set(PROTOCOL_MODELS) - {"ease"}


# ---------------------------------------------------------------- what was measured before, on real logs


def lists_over(model, split, n_items, k=20, block=500):
    "Precision@5, Recall@5, MAP@5, NDCG@20, Recall@20 of each user, of lists among the items 0..n_items-1 with all that is not test masked."
    users = split.test["user"].unique().sort().to_numpy()
    seen, items = (
        History.from_rows(split.rows_before("test"), len(split.users)),
        torch.arange(n_items),
    )
    lists = torch.cat(
        [
            top_k(mask_seen(model.scores(u, items=items), seen.select(u), items), k)[1]
            for u in torch.tensor(users).long().split(block)
        ]
    )
    pairs = split.test.select("user", "item").unique()

    def key(user, item):
        return user * len(split.items) + item

    hits = np.isin(
        key(users.astype(np.int64)[:, None], lists.numpy()),
        key(pairs["user"].cast(pl.Int64).to_numpy(), pairs["item"].to_numpy()),
    )
    n = pairs.group_by("user").len().sort("user")["len"].to_numpy()
    gain = 1 / np.log2(np.arange(2, k + 2))
    at = hits[:, :5].cumsum(1) / np.arange(1, 6)
    return users, np.stack(
        [
            hits[:, :5].sum(1) / 5,
            hits[:, :5].sum(1) / n,
            (at * hits[:, :5]).sum(1) / np.minimum(n, 5),
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
def test_stars_on_ciao(ciao, name, rmse):
    rated = eval_ratings(make_recommender(name).fit(ciao), ciao, "test")
    assert len(rated) == 5432 and abs(rated["RMSE"].mean() ** 0.5 - rmse) < 0.0005


@real
@pytest.mark.parametrize(
    "name, known, floor",
    [
        ("popularity", False, (0.0267, 0.0243, 0.0230, 0.0471)),
        ("popularity", True, (0.0275, 0.0292, 0.0230, 0.0550)),
        ("ease", True, (0.0284, 0.0333, 0.0221, 0.0505)),
    ],
)
def test_lists_on_ciao(ciao, name, known, floor):
    model = make_recommender(name).fit(ciao)
    users, found = lists_over(
        model, ciao, len(ciao.items)
    )  # as they were measured: new items are candidates too
    assert np.allclose(
        found[users < model.n_users if known else slice(None), :4].mean(0), floor, atol=0.0005
    )


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
    _, found = lists_over(model, dense, model.n_items)
    assert np.allclose(found[:, [4, 3]].mean(0), (recall, ndcg), atol=0.0005)
    ours = eval_ranking(model, dense, "test", (20,)).users
    assert np.allclose(
        ours.select("Recall@20", "NDCG@20").mean().row(0), (recall, ndcg), atol=0.0005
    )
