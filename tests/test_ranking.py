"Losses that rank: gradients, invariances, the correction of draws, and models trained with each."

import inspect
import math

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from widedeep_nb import ranking
from widedeep_nb.baselines import Popularity
from widedeep_nb.core import (
    LOSSES,
    POINTWISE,
    Run,
    UserError,
    load_recommender,
    make_loss,
    make_recommender,
    to_interactions,
)
from widedeep_nb.evaluation import eval_ranking
from widedeep_nb.preprocessing import (
    FEATURES,
    Batch,
    category_codes,
    listwise_examples,
    pointwise_examples,
    prepare,
    sample_negatives,
)
from widedeep_nb.ranking import (
    compare_losses,
    describe_losses,
    fit_with_loss,
    gap_to_best,
    logq_corrected,
    loss_leaderboard,
    plot_loss_comparison,
)
from widedeep_nb.training import check_feature_memory, train

LISTS = [name for name in LOSSES if name not in POINTWISE]


def gradient_of(name):
    return getattr(ranking, f"{name.replace('-', '_')}_gradient")


lists = arrays(
    np.float64,
    st.tuples(st.integers(1, 5), st.integers(2, 9)),
    elements=st.integers(-400, 400).map(lambda x: x / 100),
).map(torch.from_numpy)
each_list = pytest.mark.parametrize("name", LISTS)


def likely(scores, seed=0):
    "Log-probabilities for the columns of some lists."
    return (
        torch.rand(scores.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        .clamp(min=0.01)
        .log()
    )


def apart(scores):
    "Are all items away from the margin, where WARP jumps?"
    return bool(((scores[:, 1:] - scores[:, :1] + 1).abs() > 1e-3).all())


# --- the losses


@each_list
@settings(max_examples=60, deadline=None)
@given(scores=lists)
def test_gradients_are_those_of_autograd_and_of_small_steps(name, scores):
    loss, log_q = make_loss(name), likely(scores)
    by_hand, asked = gradient_of(name)(scores, log_q), scores.clone().requires_grad_()
    loss(asked, log_q).backward()
    assert torch.allclose(by_hand, asked.grad, atol=1e-12)
    if name == "warp" and not apart(scores):
        return
    h = 1e-5
    steps = [
        torch.zeros_like(scores).index_put(
            (torch.tensor(i), torch.tensor(j)), torch.tensor(h, dtype=torch.float64)
        )
        for i in range(scores.shape[0])
        for j in range(scores.shape[1])
    ]
    small = torch.stack(
        [(loss(scores + d, log_q) - loss(scores - d, log_q)) / (2 * h) for d in steps]
    ).view_as(scores)
    assert torch.allclose(by_hand, small, atol=1e-7)


@each_list
@settings(max_examples=60, deadline=None)
@given(scores=lists, shift=st.integers(-50, 50))
def test_what_is_added_to_all_scores_of_a_list_changes_nothing(name, scores, shift):
    loss, log_q = make_loss(name), likely(scores)
    assert torch.isclose(loss(scores + shift, log_q), loss(scores, log_q), atol=1e-9)
    assert gradient_of(name)(scores, log_q).sum(1).abs().max() < 1e-12


@each_list
@settings(max_examples=60, deadline=None)
@given(scores=lists)
def test_the_taken_item_is_lifted(name, scores):
    "Always, but by ListNet, which is content when it has its share; others are pushed down, but by ListNet those below theirs."
    log_q, push = likely(scores), gradient_of(name)(scores, likely(scores))
    if name != "listnet":
        assert (push[:, 0] <= 0).all() and (push[:, 1:] >= 0).all()
        return
    share = math.e / (math.e + scores.shape[1] - 1)
    assert torch.equal(push[:, 0] < 0, torch.softmax(scores, 1)[:, 0] < share)


@pytest.mark.parametrize("name", ["bpr", "sampled-softmax", "full-softmax"])
@settings(max_examples=40, deadline=None)
@given(scores=lists, more=st.integers(1, 300))
def test_the_loss_falls_as_the_taken_item_rises(name, scores, more):
    log_q, higher = likely(scores), scores.clone()
    higher[:, 0] += more / 100
    assert make_loss(name)(higher, log_q) < make_loss(name)(scores, log_q)


@each_list
def test_a_row_is_a_row_and_the_loss_their_mean(name):
    scores = torch.randn(7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    log_q, loss = likely(scores), make_loss(name)
    rows = [loss(scores[i : i + 1], log_q[i : i + 1]) for i in range(7)]
    assert torch.isclose(loss(scores, log_q), torch.stack(rows).mean())
    order = torch.tensor(
        [0, 3, 1, 4, 2]
    )  # who stands beside the taken item in which column does not matter
    assert torch.isclose(loss(scores[:, order], log_q[:, order]), loss(scores, log_q))


def test_warp_counts_the_rank_and_weighs_it():
    "Three of four within the margin of one: rank 3, cost 1 + 1/2 + 1/3, a third of it each."
    scores = torch.tensor([[1.0, 3.0, 1.0, 0.5, -0.5]], dtype=torch.float64)
    assert float(ranking.warp(scores)) == pytest.approx(
        (1 + 1 / 2 + 1 / 3) / 3 * ((1 - 1 + 3) + (1 - 1 + 1) + (1 - 1 + 0.5))
    )
    assert float(ranking.warp(scores - torch.tensor([0.0, 9.0, 9.0, 9.0, 9.0]))) == 0
    top, bottom = [
        -ranking.warp_gradient(torch.tensor([[0.0] + [1.0] * n + [-9.0] * (99 - n)]))[0, 0]
        for n in (1, 50)
    ]
    assert 4 < bottom / top < 5  # 50 mistakes cost 4.5 times as much as one, not 50 times


def test_listnet_against_scipy():
    from scipy.special import softmax
    from scipy.stats import entropy

    scores = np.random.default_rng(0).normal(size=(20, 6))
    grades = softmax([1.0, 0, 0, 0, 0, 0])
    by_hand = np.mean([entropy(grades, p) + entropy(grades) for p in softmax(scores, axis=1)])
    assert float(ranking.listnet(torch.from_numpy(scores))) == pytest.approx(by_hand)


def test_full_softmax_is_cross_entropy():
    scores = torch.randn(20, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.isclose(
        ranking.full_softmax(scores),
        torch.nn.functional.cross_entropy(scores, torch.zeros(20, dtype=torch.int64)),
    )


# --- drawing, and taking it back


@settings(max_examples=40, deadline=None)
@given(scores=lists)
def test_all_others_drawn_alike_is_the_full_softmax(scores):
    log_q = torch.full_like(scores, -math.log(scores.shape[1] - 1))
    log_q[:, 0] = 0
    assert torch.isclose(
        ranking.sampled_softmax(scores, log_q), ranking.full_softmax(scores)
    ) and torch.equal(logq_corrected(scores), scores)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_the_corrected_sum_is_right_in_the_mean(alpha):
    "Exactly: over all possible draws of one item, each weighed by its chance."
    score, sold = (
        torch.tensor([0.3, 2.0, -1.0, 0.7, 0.0], dtype=torch.float64),
        torch.tensor([7, 0, 3, 50, 1]),
    )
    q = (1.0 + sold).double() ** alpha
    for taken in range(5):
        others = torch.tensor([i for i in range(5) if i != taken])
        chance = q[others] / q[others].sum()
        listed = torch.stack([torch.full((4,), taken), others], 1)
        sums = (
            logq_corrected(
                score[listed], torch.stack([torch.zeros(4, dtype=torch.float64), chance.log()], 1)
            )
            .exp()
            .sum(1)
        )
        assert torch.isclose((sums * chance).sum(), score.exp().sum())


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_many_draws_give_the_full_softmax(alpha):
    "With the drawer that training uses; without the correction, popular draws lead it astray."
    score, sold = (
        torch.tensor([0.3, 2.0, -1.0, 0.7, 0.0], dtype=torch.float64),
        torch.tensor([7, 0, 3, 50, 1]),
    )
    listed, log_q = sample_negatives(
        torch.tensor([1, 3]), sold, 40_000, alpha, torch.Generator().manual_seed(0)
    )
    for row in range(2):
        truth = ranking.full_softmax(
            score[
                torch.cat(
                    [listed[row, :1], torch.tensor([i for i in range(5) if i != listed[row, 0]])]
                )
            ][None]
        )
        assert float(
            ranking.sampled_softmax(score[listed[row : row + 1]], log_q[row : row + 1])
        ) == pytest.approx(float(truth), abs=0.02)
        if alpha:
            assert (
                abs(
                    float(
                        ranking.sampled_softmax(
                            score[listed[row : row + 1]], torch.full((1, 40_001), -math.log(4))
                        )
                    )
                    - float(truth)
                )
                > 0.1
            )


@settings(max_examples=30, deadline=None)
@given(
    n=st.integers(2, 30),
    negatives=st.integers(1, 6),
    alpha=st.sampled_from([0.0, 0.5, 1.0]),
    seed=st.integers(0, 5),
)
def test_draws_are_other_items_and_their_chances_add_up(n, negatives, alpha, seed):
    random = np.random.default_rng(seed)
    taken, count = (
        torch.from_numpy(random.integers(0, n, 20)),
        torch.from_numpy(random.integers(0, 50, n)),
    )
    listed, log_q = sample_negatives(
        taken, count, negatives, alpha, torch.Generator().manual_seed(seed)
    )
    assert (
        listed.shape == log_q.shape == (20, 1 + negatives)
        and torch.equal(listed[:, 0], taken)
        and (log_q[:, 0] == 0).all()
    )
    assert ((listed >= 0) & (listed < n)).all() and (listed[:, 1:] != taken[:, None]).all()
    weight = (1.0 + count).double() ** alpha
    assert torch.allclose(
        log_q[:, 1:].double().exp(),
        weight[listed[:, 1:]] / (weight.sum() - weight[taken])[:, None],
        atol=1e-6,
    )
    everything, _ = sample_negatives(taken, count, -1, 0.0, torch.Generator())
    assert all(sorted(row) == list(range(n)) for row in everything.tolist())


def test_one_item_makes_no_list():
    with pytest.raises(UserError, match="two items"):
        sample_negatives(torch.tensor([0]), torch.tensor([5]), 3, 0.0, torch.Generator())


# --- the model


def planted(n=5000, seed=0, stars=True):
    "People buy what is of their kind (even or odd); a fifth of what is bought is the one thing that everybody needs."
    rng = np.random.default_rng(seed)
    user, item = rng.integers(0, 150, n), rng.integers(0, 60, n)
    item = np.where(rng.random(n) < 0.2, 0, np.where((user + item) % 2 == 0, item, (item + 1) % 60))
    log = pl.DataFrame(
        {
            "user": [f"u{x}" for x in user],
            "item": [f"i{x}" for x in item],
            "timestamp": np.arange(n) * 10**8,
            "rating": rng.integers(1, 6, n).astype("float32") if stars else [None] * n,
        },
        schema_overrides={"rating": pl.Float32},
    )
    items = pl.DataFrame(
        {
            "item": [f"i{x}" for x in range(60)],
            "category": [("even", "odd")[x % 2] for x in range(60)],
        }
    )
    return prepare(
        to_interactions(log.unique(["user", "item"], keep="first", maintain_order=True)),
        "strict",
        items,
    )


@pytest.fixture(scope="module")
def split():
    return planted()


def ndcg(model, split):
    return eval_ranking(model, split, "val", (10,)).users["NDCG@10"].mean()


@pytest.mark.parametrize("loss", ["logistic", *LISTS])
def test_each_loss_finds_what_was_planted(split, loss, tmp_path):
    "Stars are noise here: only who takes what has anything to say."
    model = make_recommender(
        "wide-deep",
        loss=loss,
        epochs=6,
        n_negatives=4,
        batch_size=128 if loss != "logistic" else 640,
        lr=0.01,
    ).fit(split)
    assert not model.predicts_ratings and ndcg(model, split) > 1.3 * ndcg(
        Popularity().fit(split), split
    )
    with pytest.raises(UserError, match="does not predict stars"):
        model.predict([0], [0])
    model.save(tmp_path)
    back = load_recommender(tmp_path)
    assert (
        back.loss == loss
        and not back.predicts_ratings
        and torch.equal(back.scores([0, 7, model.n_users]), model.scores([0, 7, model.n_users]))
    )
    assert model._val_loss(split, loss, {"full-softmax": -1}.get(loss, 4))(
        model.net
    ) == pytest.approx(min(row["val"] for row in model.loss_curve), rel=1e-4)


def test_stars_do_not_matter_to_a_loss_of_lists(split):
    "Other stars, of the same mean and in other places, leave what is learnt from alone: targets are what was taken."
    x, y = listwise_examples(
        split.train, category_codes(split.items)[0], split.n_train_users, split.n_train_items, 3
    )
    turned = split.train.with_columns(rating=6 - pl.col("rating"))
    other, z = listwise_examples(
        turned, category_codes(split.items)[0], split.n_train_users, split.n_train_items, 3
    )
    assert (
        torch.equal(y, z)
        and torch.equal(x.item, other.item)
        and torch.equal(x.popularity, other.popularity)
    )


def test_lists_and_rows_have_the_same_features(split):
    "What a list says of its first column is what a row says; a list of lists goes in and out of `to_tensors` as it is."
    about = category_codes(split.items)[0], split.n_train_users, split.n_train_items
    rows, (x, log_q) = (
        pointwise_examples(split.train, *about, features=("time",))[0],
        listwise_examples(split.train, *about, 5, features=("time",)),
    )
    for name in Batch.__dataclass_fields__:
        one, many = getattr(rows, name), getattr(x, name)
        assert torch.equal(one, many[:, 0]), name
    back = Batch.from_tensors(*[t[:9] for t in x.to_tensors()])
    assert (
        torch.equal(back.x_cross, x.x_cross[:9])
        and back.item.shape == (9, 6)
        and back.user.shape == (9, 1)
    )
    thin, thin_q = listwise_examples(split.train, *about, 5, features=("time",), row_stride=7)
    assert len(log_q) / 8 < len(thin_q) < len(log_q) / 5 and set(map(int, thin.item[:, 0])) <= set(
        map(int, x.item[:, 0])
    )


def test_the_default_is_what_it_was(split):
    "No loss asked for is mse where there are stars and logistic where there are none, bit for bit."
    for log, loss in ((split, "mse"), (planted(stars=False), "logistic")):
        asked, default = [
            make_recommender("wide-deep", epochs=2, **how).fit(log) for how in ({"loss": loss}, {})
        ]
        assert (
            torch.equal(asked.scores([0, 5]), default.scores([0, 5]))
            and default.predicts_ratings == (loss == "mse")
            and default.loss_curve == asked.loss_curve
        )
    two = make_recommender("wide-deep", epochs=2, n_negatives=2).fit(log)
    assert torch.equal(two.scores([0, 5]), default.scores([0, 5]))


def test_same_seed_same_model_other_seed_other_draws(split, monkeypatch):
    drawn = []

    def watched(*args, **how):
        made = listwise_examples(*args, **how)
        drawn.append(made[0].item)
        return made

    monkeypatch.setattr("widedeep_nb.training.training_lists", watched)
    one, two, three = [
        make_recommender("wide-deep", loss="sampled-softmax", epochs=1, n_negatives=3, seed=s)
        .fit(split)
        .scores([0])
        for s in (1, 1, 2)
    ]
    assert torch.equal(one, two) and not torch.equal(one, three)
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


def test_validation_is_the_loss_on_validation_rows(split):
    "By hand from the scores of all items: for each validation row of a known item, the surprise at it."
    model = make_recommender("wide-deep", loss="full-softmax", epochs=1, row_stride=10).fit(split)
    rows = split.val.filter(pl.col("item") < split.n_train_items)
    chances = torch.log_softmax(model.scores(rows["user"].to_numpy()), 1)
    by_hand = -chances[torch.arange(len(rows)), torch.tensor(rows["item"].to_numpy()).long()].mean()
    assert model.loss_curve[0]["val"] == pytest.approx(float(by_hand), rel=1e-4)


def test_what_is_wrong_is_said_in_a_line(split, tmp_path, monkeypatch):
    def said(f):
        return str(pytest.raises(UserError, f).value)

    unknown = said(lambda: make_recommender("wide-deep", loss="bqr").fit(split))
    assert (
        unknown
        == said(lambda: make_loss("bqr"))
        == "unknown loss 'bqr'; known: " + ", ".join(LOSSES)
    )
    assert "learns stars, and this log has none" in said(
        lambda: make_recommender("wide-deep", loss="mse").fit(planted(stars=False))
    )
    large = said(lambda: check_feature_memory(10_000_000, 100_000, ()))
    assert "sampled-softmax" in large and "GB" in large and "\n" not in large
    monkeypatch.setattr("widedeep_nb.training.MAX_FEATURE_BYTES", 10**5)
    assert "sampled-softmax" in said(
        lambda: make_recommender("wide-deep", loss="full-softmax").fit(split)
    )
    run = Run(tmp_path / "run", dataset="demo?ratings=2000")
    assert "unknown loss" in said(
        lambda: train(run, loss="bqr")
    ) and "epochs is at least 1" in said(lambda: compare_losses.__wrapped__(run, passes=0))


def test_every_loss_of_lists_has_the_same_face():
    assert set(POINTWISE) < set(LOSSES)
    for name in LISTS:
        assert (
            list(inspect.signature(make_loss(name)).parameters)
            == list(inspect.signature(gradient_of(name)).parameters)
            == ["scores", "log_q"]
        )


# --- the chapter's step


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    made = Run(
        tmp_path_factory.mktemp("runs") / "demo",
        dataset="demo?ratings=2000",
        parameters={"seeds": 1, "epochs": 1},
    )
    compare_losses(made, epochs=1, n_negatives=2)
    return made


def test_each_loss_is_measured_as_every_model_is(run):
    notes, records = (
        run.read("ranking.json"),
        run.metrics().filter(
            split="test", metric="NDCG@20", users="all", items="all", relevant="any"
        ),
    )
    assert notes["excluded"] == {} and {f["loss"] for f in notes["fits"]} == set(LOSSES)
    for loss in LOSSES:
        name = f"wide-deep-{loss}"
        model = load_recommender(run.model_folder(name))
        assert (
            model.loss == loss
            and model.predicts_ratings == (loss == "mse")
            and model.features == [g for g in FEATURES if g != "stars"]
        )
        own = (
            eval_ranking(model, run.load_splits()[-1].for_final_fit(), "test", (20,))
            .users["NDCG@20"]
            .mean()
        )
        assert records.filter(pl.col("versus").is_null(), model=name)[
            "value"
        ].item() == pytest.approx(own)
        assert len(records.filter(model="wide-deep", versus=name)) == 1
        assert (run.folder / f"evaluation/{name}/ranked.parquet").exists()
    assert len(records.filter(pl.col("versus").is_null(), model="popularity")) == 1


def test_the_budget_is_the_same(run):
    "Pairs scored in a pass: within a tenth, but for the loss of stars, which draws nothing."
    split = run.load_splits()[-1].for_final_fit()
    every = {f["loss"]: f["row_stride"] for f in run.read("ranking.json")["fits"]}
    assert {name: n for name, n in every.items() if name != "full-softmax"} == dict.fromkeys(
        set(LOSSES) - {"full-softmax"}, 1
    )
    assert split.n_train_items / every["full-softmax"] == pytest.approx(1 + 2, rel=0.1)


def test_a_killed_comparison_goes_on(run, monkeypatch, tmp_path):
    "Killed before the fourth fit, three are not made again, and nothing that comes out is another."
    import shutil

    shutil.copytree(run.folder, tmp_path / "again")
    again, made = Run(tmp_path / "again"), []
    before = again.metrics()
    few = dict(list(LOSSES.items())[:4])
    monkeypatch.setattr(ranking, "LOSSES", few)
    again.update_manifest(
        steps={k: v for k, v in again.manifest["steps"].items() if k != "compare_losses"}
    )

    def watched(*args, **params):
        if len(made) == 3 and not any(m is None for m in made):
            made.append(None)
            raise KeyboardInterrupt
        made.append(args[3])
        return fit_with_loss(*args, **params)

    monkeypatch.setattr(ranking, "fit_with_loss", watched)
    with pytest.raises(KeyboardInterrupt):
        compare_losses(again, epochs=1, n_negatives=2)
    compare_losses(again, epochs=1, n_negatives=2)
    assert [m for m in made if m] == list(few)
    key = [c for c in before.columns if c not in ("value", "lo", "hi", "n")]
    assert before.sort(key).equals(again.metrics().sort(key))


def people(ndcg):
    return pl.DataFrame(
        {
            "user": range(len(ndcg)),
            "seed": 0,
            "warm": True,
            "items": "all",
            "relevant": "any",
            "NDCG@20": ndcg,
            "Recall@20": ndcg,
        }
    )


def test_words_follow_the_numbers():
    even = np.linspace(0.2, 0.4, 40)
    tables = {
        "popularity": people(even),
        "bpr": people(even + 0.1),
        "mse": people(even - 0.1),
        "warp": people(even + 0.1 + 0.02 * np.cos(np.arange(40) * np.pi)),
    }
    rows = loss_leaderboard(tables)
    assert set(rows["name"][:2]) == {"bpr", "warp"} and rows["name"].to_list()[2:] == [
        "popularity",
        "mse",
    ]
    best, other = rows["name"][:2]
    gaps = gap_to_best(tables, best)
    assert dict(gaps.select("name", "sure").rows()) == {
        other: False,
        "popularity": True,
        "mse": True,
    }
    assert gaps.filter(name="mse")["value"].item() == pytest.approx(0.2)
    words = describe_losses(rows, gaps)
    assert (
        f"are those of {best}" in words
        and f"told apart from {other}." in words
        and "Below popularity, which knows nobody: mse." in words
    )
    floor = {"popularity": people(even), "mse": people(even - 0.1)}
    assert "not worth its cost" in describe_losses(
        loss_leaderboard(floor), gap_to_best(floor, "popularity")
    )
    axes = plot_loss_comparison(rows).axes
    assert [ax.get_xlabel() for ax in axes] == ["NDCG@20", "Recall@20"] and [
        t.get_text() for t in axes[0].get_yticklabels()
    ] == rows["name"].to_list()
