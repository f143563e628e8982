"Event types: the target, what is known before a part, what is hidden, and weights in every model."

from dataclasses import replace

import numpy as np
import polars as pl
import pytest
import torch

from widedeep_nb.evaluation import eval_ranking
from widedeep_nb.lib.aggregation import user_codes_to_ids
from widedeep_nb.lib.catalog import CatalogIndex
from widedeep_nb.lib.core import PROTOCOLS, UserError, to_interactions
from widedeep_nb.lib.eval_tasks import make_eval_task
from widedeep_nb.lib.event_comparison import compare_event_types, event_rows
from widedeep_nb.lib.event_types import choose_event_weights, infer_target
from widedeep_nb.lib.feedback import FeedbackStore
from widedeep_nb.lib.inference import RecommendService
from widedeep_nb.lib.ranking_pipeline import RankingPipeline
from widedeep_nb.lib.recommender import load_recommender, make_recommender, mask_seen
from widedeep_nb.lib.runs import Run
from widedeep_nb.lib.service_schemas import FeedbackEvent, RecommendRequest
from widedeep_nb.lib.validation import ensemble_ranking_table
from widedeep_nb.preprocessing import prepare, weigh_events

MATRIX_MODELS = (
    "popularity",
    "item-knn",
    "user-knn",
    "association-rules",
    "ease",
    "svd",
    "als",
    "wide-matrix",
    "wide-neighbours",
    "wide-rules",
    "wide-next",
    "low-pass",
)
OTHER_MODELS = ("bpr", "neumf", "gru", "self-attention")
FEW_EPOCHS = {"neumf": 2, "gru": 2, "self-attention": 2}


def shop_log(n_items=24, n_groups=2, n_bought=9, carts="later"):
    "Make purchases within a user's group of items; carts of later purchases, of the group, or at random."
    rng = np.random.default_rng(0)
    size = n_items // n_groups
    rows = []
    for user in range(60):
        first = (user % n_groups) * size
        for place, item in enumerate(first + rng.permutation(size)[:n_bought]):
            time = 10_000 * (place + 1) + user
            rows.append((f"u{user}", f"i{item}", "purchase", time))
            choices = {"later": item, "group": first + rng.integers(size)}
            carted = choices.get(carts, rng.integers(n_items))
            is_early = carts == "later" and rng.random() < 0.8
            cart_time = int(rng.integers(1, time if is_early else 95_000))
            rows.append((f"u{user}", f"i{carted}", "cart", cart_time))
    log = pl.DataFrame(rows, ["user", "item", "event", "timestamp"], orient="row")
    return to_interactions(log.unique(["user", "item", "event"], maintain_order=True))


@pytest.fixture(scope="module")
def split():
    return prepare(shop_log())


def model_of(name, split):
    epochs = {"epochs": FEW_EPOCHS[name]} if name in FEW_EPOCHS else {}
    return make_recommender(name, **epochs).fit(split)


def test_the_target_is_the_strongest_frequent_type_and_can_be_set():
    log = shop_log()
    assert infer_target(log) == "purchase"
    rare = pl.concat([log.filter(pl.col("event") == "cart")] * 30 + [log[:1]])
    assert infer_target(rare) == "cart"  # one purchase in ten thousand rows cannot be learned
    half_rated = log.with_columns(rating=pl.when(pl.col("event") == "purchase").then(4.0))
    assert infer_target(half_rated) == "rating"
    carts = prepare(log, target="cart")
    assert set(carts.auxiliary["event"]) == {"purchase"}
    with pytest.raises(UserError, match="-p target="):
        prepare(log, target="view")


@pytest.mark.parametrize("protocol", ["strict", "leave-one-out", "rolling"])
def test_auxiliary_events_are_older_than_the_part_that_is_predicted(protocol):
    splits = prepare(shop_log(), replace(PROTOCOLS[protocol], min_user=2, min_item=2))
    splits = splits if isinstance(splits, list) else [splits]
    for split in splits + [split.merge_train_val() for split in splits]:
        assert {"train", "test"} <= set(split.auxiliary["part"])
        for part in ("val", "test") if len(split.val) else ("test",):
            events = split.auxiliary_before(part)
            first = getattr(split, part).group_by("user").agg(start=pl.col("timestamp").min())
            late = events.join(first, on="user").filter(pl.col("timestamp") >= pl.col("start"))
            assert len(events) and not len(late)


def test_a_given_split_says_in_which_part_an_auxiliary_event_happened():
    log = shop_log().with_columns(timestamp=pl.lit(None, pl.Datetime("ms")))
    parts = pl.Series(np.resize(["train"] * 7 + ["val", "test"], len(log)))
    log = log.with_columns(part=parts)
    split = prepare(log, "given")
    carts = log.filter(pl.col("event") == "cart")["part"].value_counts().sort("part")
    assert split.auxiliary["part"].value_counts().sort("part").equals(carts)


def test_what_was_bought_or_rated_is_hidden_and_what_was_carted_is_not(split):
    task = make_eval_task(split, "test")
    carted = split.auxiliary_before("test").select("user", "item").unique()
    assert len(task.ground_truth.join(carted, on=["user", "item"], how="semi"))
    owned = split.auxiliary.with_columns(event=pl.lit("rating"))
    rated = make_eval_task(replace(split, auxiliary=owned), "test").ground_truth
    assert not len(rated.join(carted, on=["user", "item"], how="semi"))
    model = make_recommender("own-history", event="cart").fit(split)
    lists = model.recommend(model.user_ids.to_list(), k=3).filter(pl.col("score") > 0)
    bought = split.train.select(
        split.users["user"].gather(split.train["user"]).alias("user"),
        split.items["item"].gather(split.train["item"]).alias("item"),
    )
    assert len(lists) and not len(lists.join(bought, on=["user", "item"], how="semi"))


@pytest.mark.parametrize("name", [*MATRIX_MODELS, *OTHER_MODELS])
def test_a_weight_of_zero_is_a_log_without_these_events(split, name):
    ignored = split.with_event_weights({"cart": 0.0})
    users = torch.arange(split.n_train_users)
    scores = model_of(name, ignored).scores(users)
    assert torch.equal(scores, model_of(name, split.without_auxiliary()).scores(users))


@pytest.mark.parametrize("name", MATRIX_MODELS)
def test_a_weight_of_one_is_a_log_with_these_events_as_targets(split, name):
    alike = split.with_event_weights({"cart": 1.0})
    rows = alike.events_before("val", split.train).filter(pl.col("item") < split.n_train_items)
    rows = rows.filter(pl.col("user") < split.n_train_users)
    columns = [c for c in split.train.columns if c != "event"]
    as_targets = replace(
        split.without_auxiliary(), train=rows.select(columns), val=split.val.select(columns).clear()
    )
    users = torch.arange(split.n_train_users)
    scores = model_of(name, replace(alike, val=split.val.clear())).scores(users)
    expected = model_of(name, as_targets).scores(users)
    assert torch.allclose(scores, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [*MATRIX_MODELS, *OTHER_MODELS, "own-history", "hybrid"])
def test_models_with_event_types_are_the_same_after_saving(split, name, tmp_path):
    fitted = split.with_event_weights({"cart": 0.3})
    options = {"time_budget_min": 0.05} if name == "hybrid" else {}
    model = make_recommender(name, **options) if options else model_of_any(name)
    model.fit(fitted).save(tmp_path)
    loaded = load_recommender(tmp_path)
    assert loaded.event_weights == pytest.approx({"cart": 0.3})
    users = torch.arange(5)
    history = make_eval_task(fitted, "test").history.select(users)
    assert torch.equal(loaded.scores(users, history), model.scores(users, history))
    assert history.event.any()
    purchases = history.targets_only()
    if name not in ("popularity", "bpr", "neumf", "association-rules"):  # by code, or the best rule
        assert not torch.equal(model.scores(users, purchases), model.scores(users, history))


def model_of_any(name):
    epochs = {"epochs": FEW_EPOCHS[name]} if name in FEW_EPOCHS else {}
    return make_recommender(name, **epochs)


def test_models_for_target_events_do_not_see_the_others(split):
    users = torch.arange(5)
    history = make_eval_task(split, "test").history.select(users)
    model = make_recommender("recent-popularity").fit(split)
    assert model.uses_event_types or not model.train_history.event.any()
    other = make_recommender("kind-popularity").fit(split)
    assert not other.train_history.event.any()
    assert torch.equal(other.scores(users, history), other.scores(users, history.targets_only()))


def test_weights_are_chosen_on_validation_and_can_be_given():
    useful = prepare(shop_log(n_items=80, n_groups=8, n_bought=4, carts="group"))
    weights, trials = choose_event_weights(useful)
    recall = {trial["weight"]: trial["recall"] for trial in trials}
    assert weights["cart"] > 0 and recall[weights["cart"]] == max(recall.values())
    split, note = weigh_events(useful, "cart=0.25")
    assert set(split.auxiliary["weight"]) == {0.25} and note["given"] and not note["trials"]
    with pytest.raises(UserError, match="event_weights"):
        weigh_events(useful, "cart=7")


def test_the_hybrid_suggests_what_is_in_the_cart(split):
    options = {"time_budget_min": 1.0, "components": ("popularity", "neighbors", "in the cart")}
    with_carts = make_recommender("hybrid", **options).fit(split)
    assert "in the cart" in with_carts.plan["ranking"]
    without = make_recommender("hybrid", **options).fit(split.without_auxiliary())
    assert "in the cart" not in without.plan["ranking"]
    metrics = [
        eval_ranking(model, fitted_on, "test", (5,)).users["NDCG@5"].mean()
        for model, fitted_on in ((with_carts, split), (without, split.without_auxiliary()))
    ]
    assert metrics[0] > metrics[1] + 0.05


def test_feedback_hides_what_was_bought_and_not_what_was_viewed(tmp_path):
    purchases = shop_log().filter(pl.col("event") == "purchase")
    shop = prepare(purchases)
    model = make_recommender("item-knn").fit(shop)
    items = pl.DataFrame({"item": model.item_ids, "title": model.item_ids})
    user = model.user_ids[0]
    service = RecommendService(
        {"item-knn": RankingPipeline(model, items)},
        CatalogIndex(purchases, items, purchases.select("user").unique(), [model]),
        FeedbackStore(tmp_path / "feedback.sqlite"),
    )
    request = RecommendRequest(user=user, k=10)
    bought = purchases.filter(user=user)["item"].implode()
    new = model.recommend(user, k=9).filter(~pl.col("item").is_in(bought))
    suggested = new["item"].to_list()[:3]
    for item, event in zip(suggested, ("view", "cart", "purchase")):
        service.store.add_event(FeedbackEvent(key=item, user=user, item=item, event=event)).result()
    history, _ = service.query_histories([request])
    query = service.to_model_history("item-knn", history)
    columns = torch.arange(model.n_items)
    scores = mask_seen(model.scores(torch.tensor([0]), query, columns), query, columns)[0]
    service.close()
    codes = [model.item_ids.to_list().index(item) for item in suggested]
    assert (scores[codes] > -torch.inf).tolist() == [True, True, False]
    weights = query.with_weights(model.event_weights).weight[-3:]
    assert weights.tolist() == pytest.approx([0.1, 0.5, 1.0])


def test_a_user_with_carts_only_is_cold_in_all_tables():
    log = shop_log()
    bought = log.filter(pl.col("event") == "purchase")["timestamp"].sort()
    in_validation = bought[int(0.85 * len(bought))]
    carts = {"user": ["new"] * 2, "item": ["i1", "i2"], "event": ["cart", "purchase"]}
    new = pl.DataFrame(carts | {"timestamp": [bought[0], in_validation]})
    rows = pl.concat([log, to_interactions(new).select(log.columns).cast(dict(log.schema))])
    split = prepare(rows, "strict", target="purchase").without_test()
    plan = {"ranking": {"popularity": 0.5, "neighbors": 0.5}}
    model = make_recommender("hybrid", plan=plan).fit(split)
    by_model = eval_ranking(model, split, "val", (20,)).users
    by_model = dict(user_codes_to_ids(by_model, split).select("user", "warm").rows())
    table = ensemble_ranking_table(model, split, 0)
    assert dict(table.select("user", "warm").rows()) == by_model
    assert False in by_model.values() and True in by_model.values()


@pytest.mark.long
def test_carts_help_on_a_real_log(shared, tmp_path):
    "Weighted types beat purchases alone and all types alike; one purchase in six was in the cart."
    run = Run(tmp_path / "run", dataset=str(shared / "taobao"), protocol="given")
    compare_event_types(run, time_budget_min=3)
    assert run.read("preprocessing.json")["target"] == "purchase"
    gains = {row["variant"]: row for row in event_rows(run.read("event_types.json")).to_dicts()}
    assert gains["target only"]["gain_lo"] > 0.05
    assert gains["all alike"]["gain_lo"] > 0
