"Cold start and exposure against second implementations: hidden items, short histories, shares."

from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from widedeep_nb.cold_start import (
    cold_item_results,
    evaluate_cold_start,
    item_exposure,
    metric_by_n_events,
    truncate_history,
)
from widedeep_nb.content import hide_random_items
from widedeep_nb.data import load
from widedeep_nb.evaluation import eval_ranking, eval_ratings
from widedeep_nb.lib import cold_start_evaluation
from widedeep_nb.lib.cold_start_evaluation import (
    UNKNOWN_GROUPS,
    IdOnlyModel,
    OptionalStep,
    Oracle,
    compare_unknown_rows,
    compare_with_learned,
    concat_over_folds,
    id_embeddings,
    item_groups,
    side_feature_sources,
    source_ablation,
    with_mean_unknown_row,
)
from widedeep_nb.lib.cold_start_plots import cold_start_in_short, describe_cold_items
from widedeep_nb.lib.core import PROTOCOLS, History, Split, UserError, to_interactions
from widedeep_nb.lib.quality_by_group import metric_by_group, user_groups
from widedeep_nb.lib.recommender import make_recommender
from widedeep_nb.lib.runs import Run
from widedeep_nb.preprocessing import prepare


@pytest.fixture(scope="module")
def split(demo_split):
    return demo_split(4000, seed=2).for_final_fit()


@given(st.lists(st.integers(0, 6), min_size=1, max_size=6), st.integers(0, 7))
@settings(deadline=None)
def test_truncate_history(sizes, k):
    indptr = torch.tensor(np.cumsum([0] + sizes))
    events = torch.arange(int(indptr[-1]))
    complete = History(indptr, events, torch.ones(len(events)), events)
    short = truncate_history(complete, k)
    for user in range(len(sizes)):
        items = complete.item[indptr[user] : indptr[user + 1]].tolist()
        kept = short.item[short.indptr[user] : short.indptr[user + 1]].tolist()
        assert kept == (items[-k:] if k else [])


def known_items(split):
    return set(split.items["item"][: split.n_train_items])


def ids_of(split, rows):
    user, item = split.users["user"].gather(rows["user"]), split.items["item"].gather(rows["item"])
    return pl.DataFrame({"user": user, "item": item})


@given(st.floats(0.05, 0.9), st.integers(0, 5))
@settings(deadline=None, max_examples=15)
def test_hidden_items_are_hidden(split, fraction, seed):
    reduced = hide_random_items(split, fraction, seed)
    hidden = known_items(split) - known_items(reduced)
    n_hidden = max(1, round(fraction * split.n_train_items))
    assert len(hidden) >= n_hidden
    assert known_items(reduced) < known_items(split)
    for part in (reduced.train, reduced.filtered_out, reduced.val):
        items = set(ids_of(reduced, part)["item"])
        assert not items & hidden or len(hidden) > n_hidden
    assert ids_of(reduced, reduced.test).equals(ids_of(split, split.test))


def test_hiding_does_not_depend_on_popularity(split):
    counts = split.train["item"].value_counts().sort("item")["count"].to_numpy()
    shares = []
    for seed in range(30):
        known = known_items(hide_random_items(split, 0.3, seed))
        hidden_counts = [c for c, item in zip(counts, split.items["item"]) if item not in known]
        shares.append(sum(hidden_counts) / counts.sum())
    assert abs(np.mean(shares) - 0.3) < 0.03


def test_a_complete_history_gives_the_usual_result(split):
    "Check it for users with exactly that many events and models that do not use ids."
    models = {name: make_recommender(name).fit(split) for name in ("popularity", "item-knn")}
    results = metric_by_n_events(models, split, event_counts=(0, 4), min_users=1)
    for name, model in models.items():
        users = eval_ranking(model, split, "test", (20,)).users
        usual = dict(users.filter(n_seen=4).select("user", "NDCG@20").rows())
        short = dict(results.filter(model=name, events=4).select("user", "NDCG@20").rows())
        assert len(usual) > 5
        for user, value in usual.items():
            assert short[user] == pytest.approx(value, abs=1e-6)
        assert results.filter(model=name, events=0)["user"].to_list() == list(short)
    popularity = results.filter(model="popularity")
    without, with_events = [popularity.filter(events=k)["NDCG@20"].to_list() for k in (0, 4)]
    assert without == with_events and len(without) > 20


class RecordingModel:
    "Model that records the users and histories it is given."

    def __init__(self, split):
        self.n_users, self.all_users = split.n_train_users, split.users["user"]
        self.queries = []

    def scores(self, users, history, items):
        self.queries.append((users, history))
        return torch.zeros(len(users), len(items))


def test_ids_do_not_reach_the_model(split):
    model = RecordingModel(split)
    metric_by_n_events({"model": model}, split, event_counts=(0, 2), min_users=10)
    assert all((users == len(split.users)).all() for users, _ in model.queries)
    lengths = {int(history.indptr.diff().max()) for _, history in model.queries}
    assert lengths == {0, 2}


def test_mean_row(split):
    model = IdOnlyModel(0.5, epochs=1).fit(split)
    user, item = model.net.user.weight, model.net.item.weight
    mean = with_mean_unknown_row(model)
    assert len(id_embeddings(model)) == 4
    assert torch.allclose(mean.net.user.weight[-1], user[:-1].mean(0))
    assert torch.equal(mean.net.item.weight[:-1], item[:-1])
    unknown_user = [10**6]
    assert float(mean.predict(unknown_user, [0])) != float(model.predict(unknown_user, [0]))


def test_a_learned_row_is_better_than_a_random_one():
    "Check it for unknown users of a log with strong tastes, where ids are the only features."
    rng = np.random.default_rng(0)
    n = 6000
    user, item = rng.integers(0, 300, n), rng.integers(0, 80, n)
    user_bias = rng.normal(0, 1, 300)[user] * 0.3
    item_bias = rng.normal(0, 1, 80)[item]
    rating = np.clip(np.round(3 + user_bias + item_bias + rng.normal(0, 0.3, n)), 1, 5)

    def rows(start, stop, prefix):
        columns = {
            "user": [f"{prefix}{u}" for u in user[start:stop]],
            "item": [f"i{i}" for i in item[start:stop]],
            "rating": rating[start:stop],
            "timestamp": np.arange(start, stop),
        }
        return to_interactions(pl.DataFrame(columns))

    train, val, test = rows(0, 5000, "u"), rows(0, 0, "u"), rows(5000, n, "new ")
    split = Split.from_frames(train, val, test, protocol=PROTOCOLS["given"])
    tables = compare_unknown_rows(
        lambda model: eval_ratings(model, split, "test"),
        lambda id_dropout: IdOnlyModel(id_dropout, epochs=8).fit(split),
    )
    groups = {"new users": UNKNOWN_GROUPS["new users"]}
    rows_by_kind = {r["row"]: r for r in compare_with_learned("id-only", tables, "RMSE", groups)}
    random, learned = rows_by_kind["random init"], rows_by_kind["learned"]
    assert random["hi"] < 0 and learned["value"] < random["value"] and learned["n"] == 1000


@pytest.mark.parametrize("id_dropout", [0.5, 0.0])
def test_epochs_are_chosen_on_validation(monkeypatch, id_dropout):
    "Check it for the learned row, and for the mean row with the mean in place."
    split = prepare(load("demo?ratings=4000").interactions, "strict")
    grid = (1, 9)
    monkeypatch.setattr(cold_start_evaluation, "EPOCH_GRID", grid)
    losses = []
    for epochs in grid:
        model = IdOnlyModel(id_dropout, epochs, 3).fit(split)
        model = model if id_dropout else with_mean_unknown_row(model)
        losses.append(eval_ratings(model, split, "val")["RMSE"].mean())
    chosen = cold_start_evaluation.fit_id_only(split, id_dropout, 3)
    assert chosen.epochs == grid[int(np.argmin(losses))] and losses[0] != losses[1]
    # refused for a model that is fitted on the training part only
    eval_ratings(chosen, split.for_final_fit(), "test")


def test_cold_items(split):
    reduced = hide_random_items(split, 0.3)
    models = {name: make_recommender(name).fit(reduced) for name in ("kind-popularity", "content")}
    towers = make_recommender("content-towers", epochs=6, patience=6)
    models["content-towers"] = towers.fit(reduced)
    models["oracle"] = Oracle("demo?ratings=4000&seed=2").fit(reduced)
    tables = cold_item_results(models, reduced)
    score = {name: table["NDCG@20"].mean() for name, table in tables.items()}
    assert score["oracle"] > score["content-towers"] > score["random"]
    assert score["content"] > score["random"]
    assert len({len(table) for table in tables.values()}) == 1


def test_sources_are_removed(split):
    reduced = hide_random_items(split, 0.3).for_final_fit()
    sources = ["category", "brand", "price", "text", "user_features"]
    assert side_feature_sources(reduced) == sources
    rows = source_ablation(reduced, epochs=2)
    assert [row["removed"] for row in rows[::2]] == ["nothing", *sources, "everything"]
    assert rows[0]["difference"] == 0 == rows[1]["difference"]
    value = {(row["removed"], row["items"]): row["value"] for row in rows}
    assert value["nothing", "new"] > value["everything", "new"]
    for row in rows:
        expected = value["nothing", row["items"]] - row["value"]
        assert row["difference"] == pytest.approx(expected, abs=1e-9)


def masks_by_kind(groups):
    "Return the masks of groups by the property that defines them."
    masks = {}
    for (by, _), mask in groups.items():
        masks.setdefault(by, []).append(mask)
    return masks


def test_groups(split):
    groups = user_groups(split)
    assert set(masks_by_kind(groups)) == {"events", "age_group", "region"}
    assert (np.sum(masks_by_kind(groups)["events"], 0) == 1).all()
    for masks in masks_by_kind(item_groups(split)).values():
        assert (np.sum(masks, 0) == 1).all()
    users = eval_ranking(make_recommender("popularity").fit(split), split, "test", (20,)).users
    for row in metric_by_group({"popularity": users}, groups, min_users=5):
        mask = groups[row["by"], row["group"]]
        values = [value for user, value in users.select("user", "NDCG@20").rows() if mask[user]]
        assert row["value"] == pytest.approx(np.mean(values))


def test_exposure_shares(split):
    results = eval_ranking(make_recommender("popularity").fit(split), split, "test", (20,))
    rows = pl.DataFrame(item_exposure({"popularity": results.lists}, split))
    totals = rows.group_by("by", "source").agg(pl.col("share").sum())["share"]
    assert totals.to_numpy() == pytest.approx(1)
    head = dict(rows.filter(group="head: half of all events").select("source", "share").rows())
    assert head["earlier interactions"] <= 0.5 < head["recommended by popularity"]


def test_cold_item_sentences():
    def row(model, value, difference, lo, hi):
        score = {"model": model, "value": value, "lo": value - 0.1, "hi": value + 0.1, "n": 9}
        paired = {"difference": difference, "difference_lo": lo, "difference_hi": hi}
        return {"scenario": "hidden at random"} | score | paired

    def describe(value, baseline, *difference):
        content = row("content", value, *difference)
        return describe_cold_items([content, row("kind-popularity", baseline, None, None, None)])

    better = describe(0.5, 0.3, 0.2, 0.1, 0.3)
    assert better.startswith("Hidden at random: content has 0.500 [0.400, 0.600], significantly")
    assert "significantly better than kind-popularity" in better
    assert "not significantly different" in describe(0.5, 0.3, 0.2, -0.1, 0.3)
    assert "significantly worse" in describe(0.3, 0.5, -0.2, -0.3, -0.1)
    assert describe_cold_items([]) == "There are no cold-start items to evaluate."


def test_the_hidden_fraction_is_checked(tmp_path):
    with pytest.raises(
        UserError, match="hidden_fraction=1.5 is not valid; it should be less than 1"
    ):
        evaluate_cold_start(Run(tmp_path / "run"), hidden_fraction=1.5)


def test_folds_are_concatenated_by_user_id():
    "Check two folds in which code 0 is another user."
    ids = (["ann", "bob"], ["bob", "cid"])
    folds = [SimpleNamespace(users=pl.DataFrame({"user": fold_ids})) for fold_ids in ids]
    table = pl.DataFrame({"user": [0, 1], "RMSE": [1.0, 2.0]})
    results = concat_over_folds(folds, lambda split: {"model": table})
    assert results["model"].rows() == [("ann", 1.0), ("bob", 2.0), ("bob", 1.0), ("cid", 2.0)]


def in_short_inputs(gain, tail):
    "Return results of a run whose main model gains (or not) from events and shows rare items."
    columns = {"events": [0, 1, 5], "n": 60}
    models = {"hybrid": [0.1, 0.1 + gain / 2, 0.1 + gain], "popularity": [0.1] * 3}
    events = pl.concat(
        [pl.DataFrame({"model": m, "value": v} | columns) for m, v in models.items()]
    )
    events = events.with_columns(lo=pl.col("value") - 0.02, hi=pl.col("value") + 0.02)
    paired = {"difference": gain, "difference_lo": gain - 0.05, "difference_hi": gain + 0.05}
    score = {"scenario": "hidden at random", "value": 0.3, "lo": 0.2, "hi": 0.4, "n": 9}
    new_items = [{"model": "content"} | score | paired]
    groups = pl.DataFrame({"by": "events", "group": ["no events", "5 to 9"], "model": "hybrid"})
    groups = groups.with_columns(value=pl.Series([0.1, 0.1 + gain]), n=30)
    sources = ["recommended by hybrid", "test interactions"]
    exposure = {"by": "popularity", "group": "tail: the last tenth", "source": sources}
    return events, new_items, groups, pl.DataFrame(exposure | {"share": [tail, 0.2]})


def test_the_summary_changes_with_the_results():
    good = cold_start_in_short(*in_short_inputs(0.3, 0.2))
    poor = cold_start_in_short(*in_short_inputs(-0.01, 0.01))
    assert 2 <= len(poor) <= 5 and 2 <= len(good) <= 5 and not set(good) & set(poor)
    assert "from 1 known event on" in good[0] and "never above" in poor[0]
    for sentence in good + poor:
        assert sentence.endswith((".", ".)"))
        assert not any(word in sentence for word in ("nan", "None", "()", "{", "`"))
    empty = pl.DataFrame()
    assert len(cold_start_in_short(empty, [], empty, empty)) == 2


def test_an_optional_step_is_kept_up_to_date_but_not_made():
    calls = []

    def required(run):
        calls.append(run)

    required.is_done = lambda manifest: False
    optional = OptionalStep(required)
    never, once = ({"steps": steps} for steps in ({}, {"required": {"fingerprint": "x"}}))
    optional(SimpleNamespace(manifest=never))
    assert not calls and optional.is_done(never)
    optional(SimpleNamespace(manifest=once))
    assert len(calls) == 1 and not optional.is_done(once)


def test_a_lone_chapter_needs_no_leaderboard(tmp_path):
    run = Run(tmp_path / "run", dataset="demo?ratings=2000", parameters={"epochs": 1, "seeds": 1})
    evaluate_cold_start(run)
    results = run.read("newcomers.json")
    assert "build_leaderboard" not in run.manifest["steps"] and results["new"]
    models = {row["model"] for row in results["served"]}
    assert models == {"content-towers", "recent-popularity", "popularity"}
