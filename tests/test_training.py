"Wide & Deep: starts as the damped bias, learns, stops, resumes, and answers for strangers."

import numpy as np
import polars as pl
import pytest
import torch

from widedeep_nb.core import (
    History,
    load_recommender,
    make_loss,
    make_recommender,
    to_interactions,
)
from widedeep_nb.model import WideDeepNet
from widedeep_nb.preprocessing import (
    build_batch,
    build_feature_state,
    category_codes,
    damped_bias,
    pointwise_examples,
    prepare,
)
from widedeep_nb.training import train_loop


def made_log(n=3000, stars=True, seed=0):
    "Users like even or odd items."
    rng = np.random.default_rng(seed)
    u, i = rng.integers(0, 60, n), rng.integers(0, 30, n)
    liked = (u + i) % 2 == 0
    if not stars:
        u, i = u[liked], i[liked]
    rating = np.where(liked, 5, 2).astype("float32") if stars else [None] * len(u)
    log = pl.DataFrame(
        {
            "user": [f"u{x}" for x in u],
            "item": [f"i{x}" for x in i],
            "rating": rating,
            "timestamp": np.arange(len(u)) * 10**8,
        },
        schema_overrides={"rating": pl.Float32},
    )
    items = pl.DataFrame(
        {
            "item": [f"i{x}" for x in range(30)],
            "category": [("even", "odd")[x % 2] for x in range(30)],
        }
    )
    return prepare(
        to_interactions(log.unique(["user", "item"], keep="first", maintain_order=True)),
        "strict",
        items,
    )


def test_starts_as_the_damped_bias():
    split = made_log()
    category, n = category_codes(split.items)[0], (split.n_train_users, split.n_train_items)
    log = History.from_rows(split.train, n[0])
    snap = build_feature_state(log, category, n[1])
    mean, by_user, by_item = damped_bias(log.user_index, log.item, log.rating, n[0], n[1] + 1)
    user, item = torch.arange(10), torch.arange(10)
    net = WideDeepNet(*n, int(category.max()) + 1).eval()
    said = net(build_batch(snap, user, log.select(user), torch.arange(10), item))
    assert torch.allclose(said.double(), mean + by_user[user] + by_item[item], atol=1e-5)


def test_learns_what_only_a_cross_product_can_say():
    split = made_log()

    def rmse(model):
        return float(
            (
                model.predict(split.val["user"].to_numpy(), split.val["item"].to_numpy())
                - torch.tensor(split.val["rating"].to_numpy())
            )
            .square()
            .mean()
            .sqrt()
        )

    both = make_recommender("wide-deep", epochs=40, embedding_lr=0.01).fit(split)
    assert rmse(both) < 0.8 * rmse(make_recommender("damped-bias").fit(split))
    assert rmse(both) < 0.8 * float(split.train["rating"].std())


@pytest.mark.parametrize("stars", [True, False])
def test_strangers_baskets_and_files(tmp_path, stars):
    split = made_log(stars=stars)
    model = make_recommender("wide-deep", epochs=15).fit(split)
    assert model.predicts_ratings == stars
    stranger = model.scores([model.n_users, 10**6])
    assert torch.isfinite(stranger).all() and torch.equal(stranger[0], stranger[1])
    assert not torch.equal(stranger[0], model.scores([0])[0])
    known = model.train_history.select(torch.tensor([3]))
    as_basket = model.scores([model.n_users], known)  # a stranger with the history of user 3
    assert not torch.equal(as_basket[0], stranger[0])
    model.save(tmp_path)
    back = load_recommender(tmp_path)
    assert (
        torch.equal(back.scores([0, 5, model.n_users]), model.scores([0, 5, model.n_users]))
        and back.predicts_ratings == stars
    )
    ranked = model.recommend([{"i0": 5, "i2": 5}, ["i1"], []], k=4)
    assert len(ranked) == 12 and not set(ranked.filter(user="basket 1")["item"]) & {"i0", "i2"}


def test_grid_and_pairs_agree():
    split = made_log()
    model = make_recommender("wide-deep", epochs=3).fit(split)
    users, items = torch.arange(7), torch.arange(model.n_items)
    grid = model.scores(users)
    pairs = model.predict(users.repeat_interleave(len(items)), items.repeat(7)).view(7, -1)
    assert torch.allclose(grid.clamp(*model.rating_range), pairs, atol=1e-5)


def test_same_seed_same_model_other_seed_another():
    split = made_log()
    one, two, three = [
        make_recommender("wide-deep", epochs=3, seed=s).fit(split).scores([0]) for s in (1, 1, 2)
    ]
    assert torch.equal(one, two) and not torch.equal(one, three)


def test_sigmoid_stays_within_the_stars():
    split = made_log()
    model = make_recommender("wide-deep", epochs=3, output="sigmoid").fit(split)
    scores = model.scores(torch.arange(20))
    assert (
        scores.min() >= model.rating_range[0]
        and scores.max() <= model.rating_range[1]
        and scores.std() > 0
    )


def test_stops_early_and_keeps_the_best():
    split = made_log(400)
    model = make_recommender("wide-deep", epochs=200, patience=2, lr=0.02).fit(split)
    val = [row["val"] for row in model.loss_curve]
    assert len(val) < 200 and len(val) == 1 + int(np.argmin(val)) + 2
    judge = model._val_loss(split, "mse", 0)
    assert judge(model.net) == pytest.approx(min(val), rel=1e-5)


def test_resumes_bit_for_bit(tmp_path):
    "Stopped after any pass, training goes on as if nothing had happened: dropout, shuffling and Adam's memory included."
    split = made_log(600)
    x, y = pointwise_examples(
        split.train, category_codes(split.items)[0], split.n_train_users, split.n_train_items
    )

    def net():
        torch.manual_seed(0)
        return WideDeepNet(split.n_train_users, split.n_train_items, 3)

    pace = dict(lr=0.01, embedding_lr=0.01, weight_decay=0.01, swa_start=2, seed=5)
    whole, _ = train_loop(net(), (*x.to_tensors(), y), epochs=6, **pace)
    for stop in (1, 3, 5):
        place = tmp_path / f"{stop}.safetensors"
        train_loop(net(), (*x.to_tensors(), y), epochs=stop, checkpoint=place, **pace)
        resumed, _ = train_loop(net(), (*x.to_tensors(), y), epochs=6, checkpoint=place, **pace)
        for a, b in zip(whole.parameters(), resumed.parameters()):
            assert torch.equal(a, b)


def test_losses_by_hand():
    assert make_loss("mse")(torch.tensor([4.0, 2.0]), torch.tensor([5.0, 2.0])) == 0.5
    assert float(make_loss("logistic")(torch.tensor([2.0]), torch.tensor([1.0]))) == pytest.approx(
        np.log1p(np.exp(-2))
    )


@pytest.mark.long
def test_beats_the_damped_bias_on_ciao(ciao):
    final = ciao.for_final_fit()
    user, item, rating = (
        ciao.test["user"].to_numpy(),
        ciao.test["item"].to_numpy(),
        torch.tensor(ciao.test["rating"].to_numpy()),
    )

    def rmse(model):
        return float((model.predict(user, item) - rating).square().mean().sqrt())

    found = []
    for seed in range(5):
        chosen = make_recommender("wide-deep", seed=seed).fit(ciao)
        best = 1 + int(np.argmin([row["val"] for row in chosen.loss_curve]))
        found.append(rmse(make_recommender("wide-deep", seed=seed, epochs=best).fit(final)))
    assert np.mean(found) <= rmse(make_recommender("damped-bias").fit(final))
