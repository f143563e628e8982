"Check that Wide & Deep starts as the damped bias, learns, stops, resumes and serves cold-start users."

import re

import numpy as np
import polars as pl
import pytest
import torch

from widedeep_nb.lib.core import History, to_interactions
from widedeep_nb.lib.features import build_batch, build_feature_state, category_codes, damped_bias
from widedeep_nb.lib.model_plots import (
    best_val_losses,
    learning_caption,
    learning_curves,
    learning_summary,
    model_in_short,
    training_in_short,
)
from widedeep_nb.lib.recommender import load_recommender, make_loss, make_recommender
from widedeep_nb.model import WideDeepNet
from widedeep_nb.preprocessing import pointwise_examples, prepare
from widedeep_nb.training import train_loop


def parity_split(n=3000, rated=True, seed=0):
    "Make a split of a log whose users like either the even or the odd items."
    rng = np.random.default_rng(seed)
    user, item = rng.integers(0, 60, n), rng.integers(0, 30, n)
    liked = (user + item) % 2 == 0
    if not rated:
        user, item = user[liked], item[liked]
    rating = np.where(liked, 5, 2).astype("float32") if rated else [None] * len(user)
    log = pl.DataFrame(
        {
            "user": [f"u{u}" for u in user],
            "item": [f"i{i}" for i in item],
            "rating": rating,
            "timestamp": np.arange(len(user)) * 10**8,
        },
        schema_overrides={"rating": pl.Float32},
    )
    log = log.unique(["user", "item"], keep="first", maintain_order=True)
    items = pl.DataFrame(
        {"item": [f"i{i}" for i in range(30)], "category": ["even", "odd"] * 15},
    )
    return prepare(to_interactions(log), "strict", items)


def rmse_on(rows, model):
    prediction = model.predict(rows["user"].to_numpy(), rows["item"].to_numpy())
    rating = torch.tensor(rows["rating"].to_numpy())
    return float((prediction - rating).square().mean().sqrt())


def test_starts_as_the_damped_bias():
    split = parity_split()
    category = category_codes(split.items)[0]
    n_users, n_items = split.n_train_users, split.n_train_items
    history = History.from_rows(split.train, n_users)
    state = build_feature_state(history, category, n_items)
    mean, user_bias, item_bias = damped_bias(
        history.user_index, history.item, history.rating, n_users, n_items + 1
    )
    user, item = torch.arange(10), torch.arange(10)
    net = WideDeepNet(n_users, n_items, int(category.max()) + 1).eval()
    batch = build_batch(state, user, history.select(user), torch.arange(10), item)
    expected = mean + user_bias[user] + item_bias[item]
    assert torch.allclose(net(batch).double(), expected, atol=1e-5)


def test_learns_what_only_a_cross_product_explains():
    split = parity_split()
    model = make_recommender("wide-deep", epochs=40, embedding_lr=0.01).fit(split)
    rmse = rmse_on(split.val, model)
    assert rmse < 0.8 * rmse_on(split.val, make_recommender("damped-bias").fit(split))
    assert rmse < 0.8 * float(split.train["rating"].std())


@pytest.mark.parametrize("rated", [True, False])
def test_cold_start_users_baskets_and_files(tmp_path, rated):
    split = parity_split(rated=rated)
    model = make_recommender("wide-deep", epochs=15).fit(split)
    assert model.predicts_ratings == rated
    cold = model.scores([model.n_users, 10**6])
    assert torch.isfinite(cold).all() and torch.equal(cold[0], cold[1])
    assert not torch.equal(cold[0], model.scores([0])[0])
    history = model.train_history.select(torch.tensor([3]))
    with_history = model.scores([model.n_users], history)
    assert not torch.equal(with_history[0], cold[0])
    model.save(tmp_path)
    loaded = load_recommender(tmp_path)
    users = [0, 5, model.n_users]
    assert torch.equal(loaded.scores(users), model.scores(users))
    assert loaded.predicts_ratings == rated
    recommended = model.recommend([{"i0": 5, "i2": 5}, ["i1"], []], k=4)
    assert len(recommended) == 12
    assert not set(recommended.filter(user="basket 1")["item"]) & {"i0", "i2"}


def test_grid_and_pairs_agree():
    split = parity_split()
    model = make_recommender("wide-deep", epochs=3).fit(split)
    users, items = torch.arange(7), torch.arange(model.n_items)
    grid = model.scores(users)
    pairs = model.predict(users.repeat_interleave(len(items)), items.repeat(7)).view(7, -1)
    assert torch.allclose(grid.clamp(*model.rating_range), pairs, atol=1e-5)


def test_the_seed_decides_the_model():
    split = parity_split()
    first, again, other = [
        make_recommender("wide-deep", epochs=3, seed=seed).fit(split).scores([0])
        for seed in (1, 1, 2)
    ]
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_sigmoid_stays_within_the_rating_range():
    split = parity_split()
    model = make_recommender("wide-deep", epochs=3, output="sigmoid").fit(split)
    scores = model.scores(torch.arange(20))
    low, high = model.rating_range
    assert scores.min() >= low and scores.max() <= high and scores.std() > 0


def test_stops_early_and_keeps_the_best():
    split = parity_split(400)
    model = make_recommender("wide-deep", epochs=200, patience=2, lr=0.02).fit(split)
    val = [row["val"] for row in model.loss_curve]
    assert len(val) < 200 and len(val) == 1 + int(np.argmin(val)) + 2
    val_loss = model._val_loss(split, "mse", 0)
    assert val_loss(model.net) == pytest.approx(min(val), rel=1e-5)


def test_resumes_bit_for_bit(tmp_path):
    "Check that training resumed after any epoch equals training without a stop, dropout included."
    split = parity_split(600)
    n_users, n_items = split.n_train_users, split.n_train_items
    x, y = pointwise_examples(split.train, category_codes(split.items)[0], n_users, n_items)
    data = (*x.to_tensors(), y)
    params = dict(lr=0.01, embedding_lr=0.01, weight_decay=0.01, swa_start=2, seed=5)

    def new_net():
        torch.manual_seed(0)
        return WideDeepNet(n_users, n_items, 3)

    uninterrupted, _ = train_loop(new_net(), data, epochs=6, **params)
    for stop in (1, 3, 5):
        checkpoint = tmp_path / f"{stop}.safetensors"
        train_loop(new_net(), data, epochs=stop, checkpoint=checkpoint, **params)
        resumed, _ = train_loop(new_net(), data, epochs=6, checkpoint=checkpoint, **params)
        for expected, actual in zip(uninterrupted.parameters(), resumed.parameters()):
            assert torch.equal(expected, actual)


def test_losses_against_formulas():
    assert make_loss("mse")(torch.tensor([4.0, 2.0]), torch.tensor([5.0, 2.0])) == 0.5
    logistic = make_loss("logistic")(torch.tensor([2.0]), torch.tensor([1.0]))
    assert float(logistic) == pytest.approx(np.log1p(np.exp(-2)))


@pytest.mark.long
def test_beats_the_damped_bias_on_ciao(ciao):
    final = ciao.for_final_fit()
    rmse_by_seed = []
    for seed in range(5):
        model = make_recommender("wide-deep", seed=seed).fit(ciao)
        best = 1 + int(np.argmin([row["val"] for row in model.loss_curve]))
        model = make_recommender("wide-deep", seed=seed, epochs=best).fit(final)
        rmse_by_seed.append(rmse_on(ciao.test, model))
    baseline = rmse_on(ciao.test, make_recommender("damped-bias").fit(final))
    assert np.mean(rmse_by_seed) <= baseline


def test_contributions_add_up_to_the_prediction():
    split = parity_split(600)
    model = make_recommender("wide-deep", epochs=2).fit(split)
    users, items = torch.arange(20), torch.arange(20)
    terms = model.contributions(users, items)
    assert list(terms) == ["mean", "user", "item", "cross-products", "deep"]
    scores = model.scores(users, items=items).diagonal()
    assert torch.allclose(sum(terms.values()), scores, atol=1e-5)


def fits_with(train, val, model="wide-deep", seeds=(0, 1)):
    "Make fits as in training.json, the losses a little higher for later seeds."
    fits = []
    for seed in seeds:
        rows = zip(train, val)
        curve = [
            {"epoch": e, "train": t + seed / 100, "val": v if v is None else v + seed / 100}
            for e, (t, v) in enumerate(rows, 1)
        ]
        fits.append({"model": model, "cut": 0, "seed": seed, "curve": curve})
    return fits


@pytest.mark.parametrize(
    "train, val, expected",
    [
        ([1.5, 1.2, 0.9], [1.6, 1.3, 1.4], ["The network learns", "rises to 1.405", "better than"]),
        ([1.5, 1.2, 0.9], [1.6, 1.7, 1.8], ["learns nothing", "rises to 1.805", "worse than"]),
        ([1.5, 1.4, 1.3], [1.6, 1.45, 1.4], ["memorizes a little", "allow it more epochs"]),
        ([1.5, 1.2], [None, None], ["no validation part", "from 1.505 to 1.205"]),
    ],
)
def test_training_in_short_follows_the_curves(train, val, expected):
    fits = fits_with(train, val)
    for branch in ("wide-alone", "deep-alone"):
        fits += fits_with([1.5] * len(val), [v and 1.5 for v in val], branch)
    curves = learning_curves(fits, take_root=False)
    summary = learning_summary(curves, max_epochs=3)
    sentences = training_in_short(summary, best_val_losses(curves), "rating error (RMSE)")
    text = " ".join(sentences)
    assert 2 <= len(sentences) <= 5 and not re.search(r"nan|None|\(\)|  ", text)
    for part in expected:
        assert part in text
    assert len(learning_caption(curves, "RMSE", 2)) > 40


def test_model_in_short_follows_the_model():
    up, down = [{"mean": 4.0, "user": sign * 0.3, "item": sign * 0.4} for sign in (1, -1)]
    first = model_in_short(5_000_000, 0.98, 10_000, 500, up, True)
    second = model_in_short(1_000, 0.3, 20, 1, down, False)
    assert (
        "5,000,000" in first[1]
        and "grows with the number" in first[1]
        and "+0.70 stars" in first[2]
    )
    assert "1 item " in second[1] and "hardly grows" in second[1] and "no ratings" in second[2]
