"Repeat purchases: against the truth of a synthetic shop, in lists, rules, the service and appended logs."

import json
from dataclasses import replace

import numpy as np
import polars as pl
import pytest
import torch
from scipy.stats import gamma
from sklearn.metrics import roc_auc_score

from widedeep_nb.data import load
from widedeep_nb.lib.core import History, UserError, to_interactions
from widedeep_nb.lib.eval_tasks import hit_matrix, make_eval_task
from widedeep_nb.lib.increments import append
from widedeep_nb.lib.ranking_pipeline import (
    REPEAT_FILE,
    RankingPipeline,
    explanations,
    load_pipeline,
)
from widedeep_nb.lib.recommender import make_recommender
from widedeep_nb.lib.repeat_purchases import (
    HORIZON_DAYS,
    RepeatModel,
    RepeatRanker,
    due_items,
    fit_ranker,
    fit_repeats,
    last_purchases,
    repeat_share,
)
from widedeep_nb.lib.rules import Rules
from widedeep_nb.lib.runs import Run, current_run
from widedeep_nb.lib.server import open_service
from widedeep_nb.lib.service_schemas import FeedbackEvent, RecommendRequest
from widedeep_nb.lib.shop import demo_repeats, demo_shop
from widedeep_nb.preprocessing import prepare
from widedeep_nb.recommend import compare_repeats, evaluate_repeats, task_of_kind

SHOP = {"n_ratings": 6_000, "seed": 1}
MS_PER_DAY = 86_400_000


@pytest.fixture(scope="module")
def shop():
    "Purchases of a shop with ink and batteries, its items, and the truth about repeats."
    shop = demo_shop(**SHOP, consumables=1)
    purchases = shop.interactions.filter(pl.col("event") == "purchase")
    log = to_interactions(purchases.select("user", "item", "timestamp", event="event"))
    return log, shop.items, demo_repeats(**SHOP, consumables=1)


@pytest.fixture(scope="module")
def split(shop):
    log, items, _ = shop
    return prepare(log, "strict", items)


@pytest.fixture(scope="module")
def weights(split):
    "Weights of new items and repeats, from a model that has not seen the validation part."
    return fit_ranker(make_recommender("popularity").fit(split), split)


@pytest.fixture(scope="module")
def pipeline(split, weights):
    "Popular items and repeats, with all rows before the test part."
    final = split.for_final_fit()
    pipeline = RankingPipeline(make_recommender("popularity").fit(final), final.items)
    rows = final.rows_before("test").filter(pl.col("item") < len(pipeline.items))
    pipeline.repeats = RepeatRanker(fit_repeats(rows, pipeline.items), **weights)
    return pipeline


@pytest.fixture(scope="module")
def task(split):
    return make_eval_task(split.for_final_fit(), "test", repeat=True)


# ---------------------------------------------------------------- against the truth


def test_usual_times_are_those_of_the_shop(shop):
    log, items, truth = shop
    items = items.select("item", "category")
    codes = {item: code for code, item in enumerate(items["item"])}
    users = log["user"].rank("dense").cast(pl.Int64)
    rows = log.with_columns(users, pl.col("item").replace_strict(codes, return_dtype=pl.Int64))
    model = fit_repeats(rows, items)
    estimates = items.with_columns(days=pl.Series(model.usual_days), p=pl.Series(model.again))
    both = estimates.join(truth, on="item")
    medians = gamma.median(both["shape"], scale=both["usual_days"] / both["shape"])
    error = np.abs(np.log(both["days"].to_numpy() / medians))
    assert np.median(error) < 0.1 and error.max() < 0.3
    error = (both["p"] - both["again"]).abs()
    assert error.median() < 0.05 and error.max() < 0.15
    others = estimates.join(truth, on="item", how="anti")
    assert others["p"].median() < 0.15 < both["p"].min()


def test_probabilities_are_calibrated_against_the_truth(split, shop):
    "Compare with the probability that the gamma distribution of the shop gives."
    truth = shop[2]
    rows = split.rows_before("test")
    model = fit_repeats(rows, split.items)
    history = History.from_rows(rows, len(split.users))
    user, item, time = last_purchases(history)
    ids = split.items["item"].gather(item.numpy())
    silence = (model.end - time).numpy() / MS_PER_DAY
    pairs = pl.DataFrame({"item": ids, "silence": silence, "code": item.numpy()})
    pairs = pairs.join(truth, on="item", maintain_order="left")
    own = model.probability(pairs["code"].to_numpy(), pairs["silence"].to_numpy())
    scale = pairs["usual_days"] / pairs["shape"]
    due, soon = [
        gamma.cdf(pairs["silence"] + days, pairs["shape"], scale=scale)
        for days in (0, HORIZON_DAYS)
    ]
    p = pairs["again"].to_numpy()
    true = p * (soon - due) / (1 - p * due)
    assert np.corrcoef(own, true)[0, 1] > 0.85
    assert 0.7 < own.sum() / true.sum() < 1.3


def test_lists_with_repeats_are_better(pipeline, task):
    records = compare_repeats(pipeline, task).filter(metric="NDCG@20", users="all")
    by_kind = {}
    for row in records.rows(named=True):
        column = "difference" if row["versus"] else row["model"].split()[1]
        by_kind.setdefault(row["relevant"], {})[column] = row
    assert by_kind["new or repeat"]["difference"]["lo"] > 0.05
    assert by_kind["repeat"]["difference"]["lo"] > 0.2
    assert by_kind["repeat"]["without"]["value"] == 0 < by_kind["new"]["without"]["value"]
    # the few places that repeats take cost little of the rest
    assert by_kind["new"]["with"]["value"] > 0.5 * by_kind["new"]["without"]["value"]


def test_time_matters_beyond_the_item(pipeline, task):
    "Compare with a score that knows how likely a repeat is, but not when."
    model = pipeline.repeats.model
    codes, probability = due_items(model, task.history.select(task.users))
    is_hit = hit_matrix(codes, task)[0][codes >= 0].numpy()
    by_time = roc_auc_score(is_hit, probability[codes >= 0].numpy())
    by_item = roc_auc_score(is_hit, model.again[codes[codes >= 0].numpy()])
    assert by_time > by_item + 0.02 > 0.85


def test_kinds_of_purchases_divide_the_relevant_pairs(task):
    pairs = [task_of_kind(task, kind).ground_truth for kind in ("new", "repeat")]
    assert pl.concat(pairs).sort("user", "item").equals(task.ground_truth)
    bought = set(zip(task.history.user_index.tolist(), task.history.item.tolist()))
    assert not any(pair in bought for pair in pairs[0].rows())
    assert all(pair in bought for pair in pairs[1].rows())


def test_share_of_repeats(split):
    earlier = set(split.rows_before("val").select("user", "item").rows())
    expected = np.mean([row in earlier for row in split.val.select("user", "item").rows()])
    assert repeat_share(split) == expected > 0.2
    no_val = replace(split, val=split.val.clear())
    assert 0.2 < repeat_share(no_val) < 0.9


# ---------------------------------------------------------------- lists and rules


def purchases_of(pipeline, users):
    return [set(pipeline.model.train_history.select(u[None]).item.tolist()) for u in users]


def test_bought_items_are_in_lists_only_with_repeats(pipeline):
    users = torch.arange(40)
    bought = purchases_of(pipeline, users)
    for repeat in (None, False):
        codes, _ = pipeline.rank(users, k=20, rules=Rules(repeat=repeat))
        assert not any(set(row) & own for row, own in zip(codes.tolist(), bought))
    codes, scores = pipeline.rank(users, k=20, rules=Rules(repeat=True))
    n_repeats = [len(set(row) & own) for row, own in zip(codes.tolist(), bought)]
    assert np.mean(n_repeats) > 1
    assert all(len(set(row) - {-1}) == sum(c >= 0 for c in row) for row in codes.tolist())
    assert (scores[:, :-1] >= scores[:, 1:]).all()
    pipeline.repeat = True
    try:
        assert (pipeline.rank(users, k=20)[0] == codes).all()
        plain = pipeline.rank(users, k=20, rules=Rules(repeat=False))[0]
    finally:
        pipeline.repeat = False
    # what is left of a list without its repeats is the plain list
    for row, own, new in zip(codes.tolist(), bought, plain.tolist()):
        kept = [c for c in row if c not in own]
        assert kept == new[: len(kept)]


@pytest.mark.parametrize("options", [{}, {"diversity": 0.3}, {"order": "revenue"}])
def test_rules_hold_for_repeats(pipeline, options):
    users = torch.arange(40)
    table = pipeline.items
    ink = "Electronics > Supplies > Ink Cartridges"
    is_ink = table["category"].eq_missing(ink)
    rules = Rules(blocked=(ink,), repeat=True, max_per_brand=2)
    codes, _ = pipeline.rank(users, k=10, rules=rules, **options)
    listed = codes[codes >= 0].numpy()
    assert not is_ink.gather(listed).any()
    brand = pipeline.brand[codes.clamp(min=0)].masked_fill(codes < 0, -1)
    assert all(torch.bincount(row[row >= 0]).max() <= 2 for row in brand)
    free = pipeline.rank(users, k=10, rules=Rules(repeat=True), **options)[0]
    assert is_ink.gather(free[free >= 0].numpy()).any()


def test_excluded_items_are_not_repeated(pipeline):
    users = torch.arange(40)
    codes, _ = pipeline.rank(users, k=5, rules=Rules(repeat=True))
    n = torch.full((40, 1), torch.nan).flatten()
    first = History(torch.arange(41), codes[:, 0], n, torch.zeros(40, dtype=torch.int64))
    without, _ = pipeline.rank(users, k=5, rules=Rules(repeat=True), excluded=first)
    assert (without != codes[:, :1]).all()
    assert (without[:, :4] == codes[:, 1:]).all()


def test_repeats_are_explained(pipeline):
    users = pipeline.model.user_ids[:40].to_list()
    rows = pipeline.recommend(users, k=10, rules=Rules(repeat=True))
    history = pipeline.model.train_history
    bought = {
        (users[user], pipeline.items["item"][item])
        for user, item in zip(history.user_index.tolist(), history.item.tolist())
        if user < 40
    }
    is_repeat = np.array([pair in bought for pair in rows.select("user", "item").rows()])
    assert 20 < is_repeat.sum() < len(rows)
    assert ((rows["because"] == rows["item"]).fill_null(False).to_numpy() == is_repeat).all()
    why = explanations(rows, pipeline.items).to_numpy()
    assert ((why == "because you have bought it before") == is_repeat).all()


def test_repeats_that_were_not_measured_are_an_error(pipeline):
    other = RankingPipeline(pipeline.model, pipeline.items)
    with pytest.raises(UserError, match="-p repeat=true"):
        other.rank([0], rules=Rules(repeat=True))
    assert (other.rank([0])[0] == other.rank([0], rules=Rules(repeat=False))[0]).all()
    with pytest.raises(UserError, match="repeat is true or false, not 'yes'"):
        Rules.from_dict({"repeat": "yes"})


def test_what_was_just_bought_is_not_due():
    model = RepeatModel(np.array([0.9, 0.9]), np.log([60.0, 60.0]), 0.4, 100 * MS_PER_DAY)
    nan = torch.full((3,), torch.nan)
    days = torch.tensor([0, 45, 44])
    history = History(torch.tensor([0, 2, 3]), torch.tensor([0, 1, 0]), nan, days * MS_PER_DAY)
    codes, before = due_items(model, history)
    assert codes.tolist() == [[0, 1], [0, -1]]
    # a new event of the first user moves the present of that user only
    days = torch.tensor([0, 160, 44])
    after = due_items(model, replace(history, time=days * MS_PER_DAY))[1]
    assert after[0, 1] < 1e-6 < 0.05 < before[0, 1] and after[1, 0] == before[1, 0]
    assert after[0, 0] < before[0, 0]


# ---------------------------------------------------------------- reading and appending


def test_purchases_supersede_nothing(tmp_path):
    rows = ["user,item,rating,timestamp,event"]
    for user in range(30):
        rows += [f"u{user},i{i},{1 + (user + i) % 5},{1_400_000_000 + i},rating" for i in range(3)]
    rows.append("u0,i0,4,1500000000,rating")
    rows += [f"u0,ink,5,{1_400_000_000 + d * 86_400},purchase" for d in (0, 60, 120)]
    (tmp_path / "log.csv").write_text("\n".join(rows) + "\n")
    loaded = load(tmp_path / "log.csv")
    log = loaded.interactions
    assert len(log.filter(item="ink")) == 3
    assert log.filter(user="u0", item="i0")["rating"].to_list() == [4]
    dropped = {row["reason"]: row["rows"] for row in loaded.report["dropped"] if row["rows"]}
    assert dropped == {"superseded by a later rating": 1}


@pytest.fixture
def run(shop, weights, tmp_path):
    "A run whose purchases are known, with popular items and repeats on."
    log, items, _ = shop
    run = Run(tmp_path / "run", dataset="demo?ratings=6000&seed=1&consumables=1")
    users = log.select("user").unique().sort("user")
    for name, table in (("interactions", log), ("items", items), ("users", users)):
        run.write(f"{name}.parquet", table)
    run.write("ingest.json", {"has_time": True, "has_ratings": False, "scale": None})
    run.write("preprocessing.json", {"target": "purchase", "event_weights": {"weights": {}}})
    report = {"repeat": True, "ranker": weights, "share": 0.5, "reason": "", "metrics": []}
    run.write(REPEAT_FILE, report)
    run.update_manifest(hashes=run.file_hashes)
    final = prepare(log, replace(run.protocol, folds=((0.98, 0.99, 1.0),)), items)
    make_recommender("popularity").fit(final.for_final_fit()).save(run.model_folder("popularity"))
    return run


def due_user(pipeline):
    "Return a user whose list begins with a bought item, that item, and the codes of both."
    n = pipeline.model.n_users
    codes, _ = pipeline.rank(torch.arange(n), k=1)
    bought = purchases_of(pipeline, torch.arange(n))
    user = next(u for u in range(n) if codes[u, 0].item() in bought[u])
    return pipeline.model.user_ids[user], pipeline.items["item"][codes[user, 0].item()]


def test_appended_purchases_are_kept_and_start_the_time_anew(run, tmp_path):
    pipeline = load_pipeline(run, "popularity")
    assert pipeline.repeat
    user, item = due_user(pipeline)
    log = run.read("interactions.parquet")
    end = log["timestamp"].max()
    row = {"user": [user], "item": [item], "timestamp": [end], "event": ["purchase"]}
    day = pl.DataFrame(row).with_columns(pl.col("timestamp").dt.offset_by("1d"))
    day.write_csv(tmp_path / "day.csv")
    summary = append(run, tmp_path / "day.csv", models=("popularity",))
    assert summary["new"] == 1 and summary["repeated"] == 0
    updated = Run(current_run(run.folder))
    kept = updated.read("interactions.parquet").filter(user=user, item=item)
    assert len(kept) == len(log.filter(user=user, item=item)) + 1
    later = load_pipeline(updated, "popularity", fit="released")
    assert later.repeat and later.repeats.model.end == pipeline.repeats.model.end + MS_PER_DAY
    first = later.recommend(user, k=1)["item"][0]
    assert first != item
    # the same day again changes nothing
    assert append(run, tmp_path / "day.csv", models=("popularity",))["new"] == 0


# ---------------------------------------------------------------- the service


def ask(service, **query):
    request = RecommendRequest(**query)
    answer = service.answer([service.parse_request(request)])[0]
    if isinstance(answer, Exception):
        raise answer
    return [item["item"] for item in answer["items"]]


def test_service_suggests_repeats(run, tmp_path):
    user, item = due_user(load_pipeline(run, "popularity"))
    service = open_service(run.folder, feedback_dir=tmp_path / "feedback")
    bought = run.read("interactions.parquet").filter(user=user)["item"].to_list()
    try:
        assert ask(service, user=user, k=5)[0] == item
        assert ask(service, user=user, k=5, repeat=True)[0] == item
        assert not set(ask(service, user=user, k=20, repeat=False)) & set(bought)
        assert item not in ask(service, user=user, k=20, not_for_me=[item])
        # a look does not start the time anew, a purchase does
        for n, event in enumerate(("view", "click")):
            service.store.add_event(
                FeedbackEvent(key=str(n), user=user, item=item, event=event)
            ).result()
        assert ask(service, user=user, k=5)[0] == item
        purchase = FeedbackEvent(key="bought", user=user, item=item, event="purchase")
        service.store.add_event(purchase).result()
        assert ask(service, user=user, k=1)[0] != item
    finally:
        service.close()


def test_service_of_a_run_without_repeats(run, tmp_path):
    report = run.read(REPEAT_FILE)
    run.write(REPEAT_FILE, report | {"repeat": False, "ranker": None})
    user = run.read("interactions.parquet")["user"][0]
    service = open_service(run.folder, feedback_dir=tmp_path / "feedback")
    bought = run.read("interactions.parquet").filter(user=user)["item"].to_list()
    try:
        assert not set(ask(service, user=user, k=20)) & set(bought)
        with pytest.raises(UserError, match="has not measured repeat purchases"):
            ask(service, user=user, repeat=True)
    finally:
        service.close()


# ---------------------------------------------------------------- the chapter


def small_parameters(**more):
    return {"seeds": 1, "epochs": 2, "tune": False, "trials": 1, "time_budget_min": 0.1} | more


@pytest.mark.long
def test_chapter_on_a_log_with_repeats(shop, tmp_path):
    "Check that repeats are on by default, measured by kind, and off where the user says so."
    log, items, truth = shop
    folder = tmp_path / "log"
    folder.mkdir()
    log.drop("rating").write_csv(folder / "interactions.csv")
    items.write_csv(folder / "items.csv")
    run = Run(tmp_path / "run", dataset=str(folder), parameters=small_parameters())
    evaluate_repeats(run)
    report = run.read(REPEAT_FILE)
    assert report["repeat"] and report["share"] > 0.2 and "by default" in report["reason"]
    rows = [r for r in report["metrics"] if r["metric"] == "NDCG@20" and r["versus"]]
    assert {r["relevant"] for r in rows} == {"new or repeat", "new", "repeat"}
    assert next(r for r in rows if r["relevant"] == "new or repeat")["lo"] > 0
    records = run.metrics().filter(model="hybrid with repeats", relevant="repeat")
    assert len(records) and records["split"].unique().to_list() == ["test"]
    pipeline = load_pipeline(run)
    assert pipeline.repeat
    estimated = pl.DataFrame(
        {"item": pipeline.items["item"], "days": pipeline.repeats.model.usual_days}
    ).join(truth, on="item")
    assert np.corrcoef(estimated["days"], estimated["usual_days"])[0, 1] > 0.9
    evaluate_repeats(run, repeat=False)
    assert not run.read(REPEAT_FILE)["repeat"] and not load_pipeline(run).repeat


@pytest.mark.long
def test_chapter_on_a_log_without_repeats(tmp_path):
    run = Run(tmp_path / "run", dataset="demo?ratings=3000", parameters=small_parameters())
    evaluate_repeats(run)
    report = run.read(REPEAT_FILE)
    assert not report["repeat"] and report["share"] == 0 and report["ranker"] is None
    assert not run.metrics()["relevant"].is_in(["new", "repeat", "new or repeat"]).any()
    before = json.dumps(run.read("metrics.json"))
    evaluate_repeats(run, repeat=True)
    other = run.metrics().filter(~pl.col("model").str.contains("repeats"))
    assert json.dumps(other.to_dicts()) == before
