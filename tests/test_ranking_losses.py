"Ranking losses: gradients, invariances, the correction of samples, and models trained with each."

import inspect
import math
import re

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from widedeep_nb import ranking_losses
from widedeep_nb.evaluation import eval_ranking
from widedeep_nb.lib import loss_comparison
from widedeep_nb.lib.core import UserError, to_interactions
from widedeep_nb.lib.features import FEATURES, Batch, category_codes, sample_negatives
from widedeep_nb.lib.history_models import Popularity
from widedeep_nb.lib.loss_comparison import (
    describe_losses,
    fit_with_loss,
    gap_to_best,
    loss_in_short,
    loss_leaderboard,
    plot_loss_comparison,
)
from widedeep_nb.lib.recommender import LOSSES, load_recommender, make_loss, make_recommender
from widedeep_nb.lib.runs import Run
from widedeep_nb.lib.wide_deep import check_feature_memory
from widedeep_nb.preprocessing import listwise_examples, pointwise_examples, prepare
from widedeep_nb.ranking_losses import compare_losses, logq_corrected
from widedeep_nb.training import train

LISTWISE = [name for name, loss in LOSSES.items() if loss.kind == "listwise"]


def gradient_of(name):
    return getattr(ranking_losses, f"{name.replace('-', '_')}_gradient")


lists = arrays(
    np.float64,
    st.tuples(st.integers(1, 5), st.integers(2, 9)),
    elements=st.integers(-400, 400).map(lambda x: x / 100),
).map(torch.from_numpy)
each_loss = pytest.mark.parametrize("name", LISTWISE)


def random_log_q(scores, seed=0):
    "Draw log-probabilities for the columns of lists."
    generator = torch.Generator().manual_seed(seed)
    q = torch.rand(scores.shape, dtype=torch.float64, generator=generator)
    return q.clamp(min=0.01).log()


def off_margin(scores):
    "Tell whether no score is at the margin, where WARP jumps."
    return bool(((scores[:, 1:] - scores[:, :1] + 1).abs() > 1e-3).all())


# --- the losses


@each_loss
@settings(max_examples=60, deadline=None)
@given(scores=lists)
def test_gradients_equal_those_of_autograd_and_of_differences(name, scores):
    loss, log_q = make_loss(name), random_log_q(scores)
    by_hand, variable = gradient_of(name)(scores, log_q), scores.clone().requires_grad_()
    loss(variable, log_q).backward()
    assert torch.allclose(by_hand, variable.grad, atol=1e-12)
    if name == "warp" and not off_margin(scores):
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


@each_loss
@settings(max_examples=60, deadline=None)
@given(scores=lists, shift=st.integers(-50, 50))
def test_a_constant_added_to_all_scores_changes_nothing(name, scores, shift):
    loss, log_q = make_loss(name), random_log_q(scores)
    assert torch.isclose(loss(scores + shift, log_q), loss(scores, log_q), atol=1e-9)
    assert gradient_of(name)(scores, log_q).sum(1).abs().max() < 1e-12


@each_loss
@settings(max_examples=60, deadline=None)
@given(scores=lists)
def test_the_score_of_the_taken_item_is_raised(name, scores):
    """Check that the taken item is raised and the others are lowered.

    ListNet raises the taken item up to its target probability only.
    """
    push = gradient_of(name)(scores, random_log_q(scores))
    if name != "listnet":
        assert (push[:, 0] <= 0).all() and (push[:, 1:] >= 0).all()
        return
    share = math.e / (math.e + scores.shape[1] - 1)
    assert torch.equal(push[:, 0] < 0, torch.softmax(scores, 1)[:, 0] < share)


@pytest.mark.parametrize("name", ["bpr", "sampled-softmax", "full-softmax"])
@settings(max_examples=40, deadline=None)
@given(scores=lists, more=st.integers(1, 300))
def test_the_loss_falls_as_the_taken_item_rises(name, scores, more):
    log_q, higher = random_log_q(scores), scores.clone()
    higher[:, 0] += more / 100
    assert make_loss(name)(higher, log_q) < make_loss(name)(scores, log_q)


@each_loss
def test_the_loss_is_the_mean_over_rows(name):
    scores = torch.randn(7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    log_q, loss = random_log_q(scores), make_loss(name)
    rows = [loss(scores[i : i + 1], log_q[i : i + 1]) for i in range(7)]
    assert torch.isclose(loss(scores, log_q), torch.stack(rows).mean())
    order = torch.tensor([0, 3, 1, 4, 2])  # the columns of the other items can be permuted
    assert torch.isclose(loss(scores[:, order], log_q[:, order]), loss(scores, log_q))


def test_warp_weighs_by_the_counted_rank():
    "Check a list with three of four items within the margin: rank 3, cost 1 + 1/2 + 1/3, / 3 each."
    scores = torch.tensor([[1.0, 3.0, 1.0, 0.5, -0.5]], dtype=torch.float64)
    assert float(ranking_losses.warp(scores)) == pytest.approx(
        (1 + 1 / 2 + 1 / 3) / 3 * ((1 - 1 + 3) + (1 - 1 + 1) + (1 - 1 + 0.5))
    )
    assert float(ranking_losses.warp(scores - torch.tensor([0.0, 9.0, 9.0, 9.0, 9.0]))) == 0
    top, bottom = [
        -ranking_losses.warp_gradient(torch.tensor([[0.0] + [1.0] * n + [-9.0] * (99 - n)]))[0, 0]
        for n in (1, 50)
    ]
    assert 4 < bottom / top < 5  # 50 items ahead cost 4.5 times as much as one, not 50 times


def test_listnet_against_scipy():
    from scipy.special import softmax
    from scipy.stats import entropy

    scores = np.random.default_rng(0).normal(size=(20, 6))
    grades = softmax([1.0, 0, 0, 0, 0, 0])
    by_hand = np.mean([entropy(grades, p) + entropy(grades) for p in softmax(scores, axis=1)])
    assert float(ranking_losses.listnet(torch.from_numpy(scores))) == pytest.approx(by_hand)


def test_full_softmax_is_cross_entropy():
    scores = torch.randn(20, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.isclose(
        ranking_losses.full_softmax(scores),
        torch.nn.functional.cross_entropy(scores, torch.zeros(20, dtype=torch.int64)),
    )


# --- sampling and its correction


@settings(max_examples=40, deadline=None)
@given(scores=lists)
def test_uniform_samples_of_all_others_give_the_full_softmax(scores):
    log_q = torch.full_like(scores, -math.log(scores.shape[1] - 1))
    log_q[:, 0] = 0
    assert torch.isclose(
        ranking_losses.sampled_softmax(scores, log_q), ranking_losses.full_softmax(scores)
    )
    assert torch.equal(logq_corrected(scores), scores)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_the_corrected_sum_is_unbiased(alpha):
    "Check the mean over all possible samples of one item, weighted by probability."
    score = torch.tensor([0.3, 2.0, -1.0, 0.7, 0.0], dtype=torch.float64)
    sold = torch.tensor([7, 0, 3, 50, 1])
    q = (1.0 + sold).double() ** alpha
    for taken in range(5):
        others = torch.tensor([i for i in range(5) if i != taken])
        chance = q[others] / q[others].sum()
        lists = torch.stack([torch.full((4,), taken), others], 1)
        log_q = torch.stack([torch.zeros(4, dtype=torch.float64), chance.log()], 1)
        sums = logq_corrected(score[lists], log_q).exp().sum(1)
        assert torch.isclose((sums * chance).sum(), score.exp().sum())


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_many_samples_give_the_full_softmax(alpha):
    "Check `sample_negatives` of training; without the correction, popular items bias the loss."
    score = torch.tensor([0.3, 2.0, -1.0, 0.7, 0.0], dtype=torch.float64)
    sold = torch.tensor([7, 0, 3, 50, 1])
    lists, log_q = sample_negatives(
        torch.tensor([1, 3]), sold, 40_000, alpha, torch.Generator().manual_seed(0)
    )
    uniform = torch.full((1, 40_001), -math.log(4))
    for row, taken in enumerate((1, 3)):
        all_items = torch.tensor([taken, *(i for i in range(5) if i != taken)])
        truth = float(ranking_losses.full_softmax(score[all_items][None]))
        scores = score[lists[row : row + 1]]
        estimate = float(ranking_losses.sampled_softmax(scores, log_q[row : row + 1]))
        assert estimate == pytest.approx(truth, abs=0.02)
        if alpha:
            assert abs(float(ranking_losses.sampled_softmax(scores, uniform)) - truth) > 0.1


@settings(max_examples=30, deadline=None)
@given(
    n=st.integers(2, 30),
    negatives=st.integers(1, 6),
    alpha=st.sampled_from([0.0, 0.5, 1.0]),
    seed=st.integers(0, 5),
)
def test_samples_are_other_items_with_their_probabilities(n, negatives, alpha, seed):
    rng = np.random.default_rng(seed)
    taken = torch.from_numpy(rng.integers(0, n, 20))
    count = torch.from_numpy(rng.integers(0, 50, n))
    lists, log_q = sample_negatives(
        taken, count, negatives, alpha, torch.Generator().manual_seed(seed)
    )
    assert lists.shape == log_q.shape == (20, 1 + negatives)
    assert torch.equal(lists[:, 0], taken)
    assert (log_q[:, 0] == 0).all()
    assert ((lists >= 0) & (lists < n)).all()
    assert (lists[:, 1:] != taken[:, None]).all()
    weight = (1.0 + count).double() ** alpha
    assert torch.allclose(
        log_q[:, 1:].double().exp(),
        weight[lists[:, 1:]] / (weight.sum() - weight[taken])[:, None],
        atol=1e-6,
    )
    everything, _ = sample_negatives(taken, count, -1, 0.0, torch.Generator())
    assert all(sorted(row) == list(range(n)) for row in everything.tolist())


def test_one_item_makes_no_list():
    with pytest.raises(UserError, match="two items"):
        sample_negatives(torch.tensor([0]), torch.tensor([5]), 3, 0.0, torch.Generator())


# --- the model


def synthetic_split(n=5000, seed=0, ratings=True):
    "Make users who take items of their own parity; a fifth of all rows are one popular item."
    rng = np.random.default_rng(seed)
    user, item = rng.integers(0, 150, n), rng.integers(0, 60, n)
    item = np.where(rng.random(n) < 0.2, 0, np.where((user + item) % 2 == 0, item, (item + 1) % 60))
    log = pl.DataFrame(
        {
            "user": [f"u{x}" for x in user],
            "item": [f"i{x}" for x in item],
            "timestamp": np.arange(n) * 10**8,
            "rating": rng.integers(1, 6, n).astype("float32") if ratings else [None] * n,
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
    return synthetic_split()


def ndcg(model, split):
    return eval_ranking(model, split, "val", (10,)).users["NDCG@10"].mean()


@pytest.mark.parametrize("loss", ["logistic", *LISTWISE])
def test_each_loss_learns_the_synthetic_tastes(split, loss, tmp_path):
    "Check that a model beats popularity; ratings are noise here."
    model = make_recommender(
        "wide-deep",
        loss=loss,
        epochs=6,
        n_negatives=4,
        batch_size=128 if loss != "logistic" else 640,
        lr=0.01,
    ).fit(split)
    assert not model.predicts_ratings
    assert ndcg(model, split) > 1.3 * ndcg(Popularity().fit(split), split)
    with pytest.raises(UserError, match="does not predict ratings"):
        model.predict([0], [0])
    model.save(tmp_path)
    back = load_recommender(tmp_path)
    users = [0, 7, model.n_users]
    assert back.loss == loss
    assert not back.predicts_ratings
    assert torch.equal(back.scores(users), model.scores(users))
    val_loss = model._val_loss(split, loss, {"full-softmax": -1}.get(loss, 4))
    best = min(row["val"] for row in model.loss_curve)
    assert val_loss(model.net) == pytest.approx(best, rel=1e-4)


def test_ratings_do_not_change_listwise_examples(split):
    "Check that other ratings with the same mean give the same examples."
    x, y = listwise_examples(
        split.train, category_codes(split.items)[0], split.n_train_users, split.n_train_items, 3
    )
    flipped = split.train.with_columns(rating=6 - pl.col("rating"))
    other, z = listwise_examples(
        flipped, category_codes(split.items)[0], split.n_train_users, split.n_train_items, 3
    )
    assert torch.equal(y, z)
    assert torch.equal(x.item, other.item)
    assert torch.equal(x.popularity, other.popularity)


def test_listwise_and_pointwise_examples_have_the_same_features(split):
    "Check that the first column of a list has the features of its row; batches survive `to_tensors`."
    sizes = category_codes(split.items)[0], split.n_train_users, split.n_train_items
    rows = pointwise_examples(split.train, *sizes, features=("time",))[0]
    x, log_q = listwise_examples(split.train, *sizes, 5, features=("time",))
    for name in Batch.__dataclass_fields__:
        one, many = getattr(rows, name), getattr(x, name)
        assert torch.equal(one, many[:, 0]), name
    back = Batch.from_tensors(*[t[:9] for t in x.to_tensors()])
    assert torch.equal(back.x_cross, x.x_cross[:9])
    assert back.item.shape == (9, 6)
    assert back.user.shape == (9, 1)
    thin, thin_q = listwise_examples(split.train, *sizes, 5, features=("time",), row_stride=7)
    assert len(log_q) / 8 < len(thin_q) < len(log_q) / 5
    assert set(map(int, thin.item[:, 0])) <= set(map(int, x.item[:, 0]))


def test_the_default_loss_depends_on_the_log(split):
    "Check that the default is mse with ratings and logistic without, bit for bit."
    for log, loss in ((split, "mse"), (synthetic_split(ratings=False), "logistic")):
        explicit = make_recommender("wide-deep", epochs=2, loss=loss).fit(log)
        default = make_recommender("wide-deep", epochs=2).fit(log)
        assert torch.equal(explicit.scores([0, 5]), default.scores([0, 5]))
        assert default.predicts_ratings == (loss == "mse")
        assert default.loss_curve == explicit.loss_curve
    two = make_recommender("wide-deep", epochs=2, n_negatives=2).fit(log)
    assert torch.equal(two.scores([0, 5]), default.scores([0, 5]))


def test_same_seed_same_model_other_seed_other_samples(split, monkeypatch):
    sampled = []

    def recorded(*args, **options):
        examples = listwise_examples(*args, **options)
        sampled.append(examples[0].item)
        return examples

    monkeypatch.setattr("widedeep_nb.lib.wide_deep.listwise_examples", recorded)
    one, two, three = [
        make_recommender("wide-deep", loss="sampled-softmax", epochs=1, n_negatives=3, seed=s)
        .fit(split)
        .scores([0])
        for s in (1, 1, 2)
    ]
    assert torch.equal(one, two)
    assert not torch.equal(one, three)
    assert torch.equal(sampled[0], sampled[1])
    assert not torch.equal(sampled[0], sampled[2])


def test_validation_is_the_loss_on_validation_rows(split):
    "Check the loss with the scores of all items, for the validation rows of known items."
    model = make_recommender("wide-deep", loss="full-softmax", epochs=1, row_stride=10).fit(split)
    rows = split.val.filter(pl.col("item") < split.n_train_items)
    chances = torch.log_softmax(model.scores(rows["user"].to_numpy()), 1)
    by_hand = -chances[torch.arange(len(rows)), torch.tensor(rows["item"].to_numpy()).long()].mean()
    assert model.loss_curve[0]["val"] == pytest.approx(float(by_hand), rel=1e-4)


def error_of(f):
    return str(pytest.raises(UserError, f).value)


def test_errors_are_one_line(split, tmp_path, monkeypatch):
    unknown = "unknown loss 'bqr'; known: " + ", ".join(LOSSES)
    assert error_of(lambda: make_recommender("wide-deep", loss="bqr").fit(split)) == unknown
    assert error_of(lambda: make_loss("bqr")) == unknown
    unrated = synthetic_split(ratings=False)
    message = error_of(lambda: make_recommender("wide-deep", loss="mse").fit(unrated))
    assert "this log has none" in message
    message = error_of(lambda: check_feature_memory(10_000_000, 100_000, ()))
    assert "sampled-softmax" in message
    assert "GB" in message
    assert "\n" not in message
    monkeypatch.setattr("widedeep_nb.lib.wide_deep.MAX_FEATURE_BYTES", 10**5)
    message = error_of(lambda: make_recommender("wide-deep", loss="full-softmax").fit(split))
    assert "sampled-softmax" in message
    run = Run(tmp_path / "run", dataset="demo?ratings=2000")
    assert "unknown loss" in error_of(lambda: train(run, loss="bqr"))
    message = error_of(lambda: compare_losses(run, epochs=0))
    assert "epochs=0 is not valid; it should be greater than or equal to 1" == message


def test_every_listwise_loss_has_the_same_arguments():
    for name in LISTWISE:
        for function in (make_loss(name), gradient_of(name)):
            assert list(inspect.signature(function).parameters) == ["scores", "log_q"]


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


def test_each_loss_is_evaluated_like_every_model(run):
    notes = run.read("ranking.json")
    records = run.metrics().filter(
        split="test", metric="NDCG@20", users="all", items="all", relevant="any"
    )
    split = run.load_splits()[-1].for_final_fit()
    assert notes["excluded"] == {}
    assert {f["loss"] for f in notes["fits"]} == set(LOSSES)
    for loss in LOSSES:
        name = f"wide-deep-{loss}"
        model = load_recommender(run.model_folder(name))
        assert model.loss == loss
        assert model.predicts_ratings == (loss == "mse")
        assert model.features == [g for g in FEATURES if g != "stars"]
        own = eval_ranking(model, split, "test", (20,)).users["NDCG@20"].mean()
        recorded = records.filter(pl.col("versus").is_null(), model=name)["value"].item()
        assert recorded == pytest.approx(own)
        assert len(records.filter(model="wide-deep", versus=name)) == 1
        assert (run.folder / f"evaluation/{name}/ranked.parquet").exists()
    assert len(records.filter(pl.col("versus").is_null(), model="popularity")) == 1


def test_the_budget_is_the_same(run):
    "Check that an epoch scores as many pairs with each listwise loss, within a tenth."
    split = run.load_splits()[-1].for_final_fit()
    row_stride = {f["loss"]: f["row_stride"] for f in run.read("ranking.json")["fits"]}
    stride = row_stride.pop("full-softmax")
    assert row_stride == dict.fromkeys(set(LOSSES) - {"full-softmax"}, 1)
    assert split.n_train_items / stride == pytest.approx(1 + 2, rel=0.1)


def test_a_killed_comparison_resumes(run, monkeypatch, tmp_path):
    "Check that a run killed before the fourth fit keeps three fits and gives the same metrics."
    import shutil

    shutil.copytree(run.folder, tmp_path / "again")
    again, fitted = Run(tmp_path / "again"), []
    before = again.metrics()
    few = dict(list(LOSSES.items())[:4])
    monkeypatch.setattr(ranking_losses, "LOSSES", few)
    again.update_manifest(
        steps={k: v for k, v in again.manifest["steps"].items() if k != "compare_losses"}
    )

    def killed_once(*args, **params):
        if len(fitted) == 3 and None not in fitted:
            fitted.append(None)
            raise KeyboardInterrupt
        fitted.append(args[3])
        return fit_with_loss(*args, **params)

    monkeypatch.setattr(loss_comparison, "fit_with_loss", killed_once)
    with pytest.raises(KeyboardInterrupt):
        compare_losses(again, epochs=1, n_negatives=2)
    compare_losses(again, epochs=1, n_negatives=2)
    assert [loss for loss in fitted if loss] == list(few)
    key = [c for c in before.columns if c not in ("value", "lo", "hi", "n")]
    assert before.sort(key).equals(again.metrics().sort(key))


def users_with(ndcg):
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


def test_sentences_follow_the_numbers():
    even = np.linspace(0.2, 0.4, 40)
    tables = {
        "popularity": users_with(even),
        "bpr": users_with(even + 0.1),
        "mse": users_with(even - 0.1),
        "warp": users_with(even + 0.1 + 0.02 * np.cos(np.arange(40) * np.pi)),
    }
    rows = loss_leaderboard(tables)
    names = rows["name"].to_list()
    assert set(names[:2]) == {"bpr", "warp"}
    assert names[2:] == ["popularity", "mse"]
    best, other = names[:2]
    gaps = gap_to_best(tables, best)
    significant = dict(gaps.select("name", "significant").rows())
    assert significant == {other: False, "popularity": True, "mse": True}
    assert gaps.filter(name="mse")["value"].item() == pytest.approx(0.2)
    text = describe_losses(rows, gaps)
    assert f"{best} has the best lists." in text
    assert f"no significant difference from {other}." in text
    assert "Below the baseline popularity: mse." in text
    two = {"popularity": users_with(even), "mse": users_with(even - 0.1)}
    text = describe_losses(loss_leaderboard(two), gap_to_best(two, "popularity"))
    assert "not cost-effective" in text
    axes = plot_loss_comparison(rows).axes
    assert [ax.get_xlabel() for ax in axes] == ["NDCG@20", "Recall@20"]
    assert [t.get_text() for t in axes[0].get_yticklabels()] == names


def test_in_short_follows_the_results():
    even = np.linspace(0.2, 0.4, 40)
    good = {"popularity": users_with(even - 0.1), "bpr": users_with(even)}
    bad = {"popularity": users_with(even), "bpr": users_with(even - 0.1)}
    texts = []
    for tables in (good | {"mse": users_with(even - 0.15)}, bad):
        rows = loss_leaderboard(tables)
        sentences = loss_in_short(rows, gap_to_best(tables, rows["name"][0]), 40, 2)
        assert 2 <= len(sentences) <= 5
        texts.append(" ".join(sentences))
    assert (
        "train this network with BPR" in texts[0]
        and "are significantly better than a plain list" in texts[0]
    )
    assert "bestsellers is better than all of them, 0.300" in texts[1]
    for text in texts:
        assert not {"nan", "None", "()", "  "} & set(re.findall(r"nan|None|\(\)|  ", text))
