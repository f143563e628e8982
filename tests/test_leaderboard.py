"The leaderboard: paired differences, seeds, interrupted runs, kept plans, data leakage, sentences."

import re
import shutil
import sys
import threading
import time
from dataclasses import dataclass, field

import numpy as np
import polars as pl
import pytest
import torch

from widedeep_nb.data import ingest
from widedeep_nb.evaluation import eval_ranking, evaluate_wide_deep, expected_random_ndcg
from widedeep_nb.hybrid import build_hybrid, load_or_make_plan
from widedeep_nb.leaderboard import build_leaderboard, cost_table, leaderboard_table
from widedeep_nb.lib import comparison, final_fits
from widedeep_nb.lib.core import UserError
from widedeep_nb.lib.display import join_names
from widedeep_nb.lib.final_fits import count_params, drop_component, track_resources
from widedeep_nb.lib.leaderboard_plots import plot_forest, plot_forest_by_group, plot_verdict
from widedeep_nb.lib.leaderboard_text import (
    describe_ablation,
    describe_hybrid_wins,
    describe_rating_sort,
    leaderboard_in_short,
    takeaways,
)
from widedeep_nb.lib.recommender import (
    RECOMMENDERS,
    Recommender,
    load_recommender,
    make_recommender,
)
from widedeep_nb.lib.runs import CHAPTER_FIT, METRIC_KEYS, TESTED_FIT, Run
from widedeep_nb.lib.verdict import (
    choose_model,
    headline,
    long_text,
    paired_comparisons,
    rank_models,
    run_records,
    short_text,
)

MODELS = [
    ("popularity", {}),
    ("ease", {}),
    ("als", {"factors": 4, "n_iter": 2}),
    ("mean", {}),
    ("damped-bias", {}),
]
NAMES = [name for name, _ in MODELS]


def tuning_report(models=MODELS):
    reports = []
    for name, settings in models:
        report = {"model": name, "registry_name": name, "settings": settings, "seconds": 0}
        reports.append(report | {"objectives": [], "curve": None})
    report = {"trials": 1, "seconds": 0, "split_note": "", "excluded": {}}
    return report | {"models": reports}


@dataclass
class FakeEnsemble(Recommender):
    "Ensemble that records when it chooses a plan, and on what."

    time_budget_min: float = 15.0
    plan: dict = field(default_factory=dict)
    seed: int = 0
    chose, fitted = [], []
    predicts_ratings = property(lambda self: bool(self.plan.get("rating")))
    name = "hybrid"
    complexity = 4

    def _fit(self, split):
        assert not len(split.test)
        type(self).fitted.append(bool(self.plan))
        if not self.plan:
            n_rows = (len(split.train), len(split.val))
            type(self).chose.append((*n_rows, self.time_budget_min, self.seed))
            weight = int(split.val["item"].to_numpy().sum() % 97) / 97  # depends on validation
            self.plan = {
                "ranking": {"ease": 1 - weight / 2, "popularity": weight / 2},
                "rating": {"damped-bias": 1.0} if split.has_ratings else {},
            }
        self.models = {name: make_recommender(name).fit(split) for name in self.names}
        generator = torch.Generator().manual_seed(self.seed)
        self.jitter = torch.rand(self.n_items + 1, generator=generator) * 0.05

    names = property(lambda self: dict.fromkeys([*self.plan["ranking"], *self.plan["rating"]]))

    def _scores(self, users, history, items):
        total = self.jitter[items.clamp(max=self.n_items)]
        for name, weight in self.plan["ranking"].items():
            scores = self.models[name].scores(users, history, items)
            total = total + weight * scores / scores.abs().max().clamp(min=1e-9)
        return total

    def _predict(self, users, items, history):
        weights = self.plan["rating"].items()
        return sum(w * self.models[name].predict(users, items, history) for name, w in weights)

    def _state(self):
        state = {"jitter": self.jitter}
        for name, model in self.models.items():
            state |= {f"{name}/{key}": value for key, value in model._state().items()}
        return state

    def _restore(self, state):
        self.jitter = state["jitter"]
        self.models = {name: make_recommender(name) for name in self.names}
        for name, model in self.models.items():
            for attribute in ("user_ids", "item_ids", "train_history", "rating_range"):
                setattr(model, attribute, getattr(self, attribute))
            prefix = name + "/"
            own = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
            model._restore(own)


@pytest.fixture(autouse=True)
def fake_ensemble(monkeypatch):
    monkeypatch.setitem(RECOMMENDERS, "hybrid", FakeEnsemble)
    FakeEnsemble.chose.clear()
    FakeEnsemble.fitted.clear()


def evaluated_run(folder, models=MODELS, **manifest):
    "Make a run whose Wide & Deep model is evaluated and whose tuning report is given."
    defaults = {"dataset": "demo?ratings=3000", "parameters": {"seeds": 1, "epochs": 1}}
    run = Run(folder, **defaults | manifest)
    evaluate_wide_deep(run)
    run.write("tuning.json", tuning_report(models))
    return run


def compare(run, restart=True, time_budget_min=15.0, **options):
    "Run both steps without those before them."
    build_hybrid.__wrapped__(run, time_budget_min)
    run.work_dir = run.folder / ".work" / "build_leaderboard"
    if restart:
        shutil.rmtree(run.work_dir, ignore_errors=True)
    build_leaderboard.__wrapped__(run, **options)
    return run


def copy_run(run, folder):
    shutil.copytree(run.folder, folder)
    return Run(folder)


@pytest.fixture(scope="module")
def ready(tmp_path_factory):
    return evaluated_run(tmp_path_factory.mktemp("runs") / "ready")


@pytest.fixture(scope="module")
def run(ready, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(RECOMMENDERS, "hybrid", FakeEnsemble)
        return compare(copy_run(ready, tmp_path_factory.mktemp("runs") / "done"), seeds=2)


KEY = ["cut", "seed", "model", "versus", "task", "users", "items", "relevant", "metric"]
ALL_USERS = {"users": "all", "items": "all", "relevant": "any"}


def leaderboard(run):
    return run.read("leaderboard.parquet").sort(KEY)


def results(run):
    return run.read("leaderboard.json")


def own_records(run, **filters):
    return run.metrics().filter(pl.col("versus").is_null(), **filters, **ALL_USERS)


def fit_keys(run):
    return {(fit["model"], fit["seed"]) for fit in results(run)["fits"]}


# --- what is written


def user_sums(run, name, table, column):
    "Return the users, and sums and counts of each of them by seed, [seeds, users]."
    rows = run.read(f"evaluation/tuned/{name}/{table}.parquet")
    if table == "ranked":
        rows = rows.filter(relevant="any", items="all")
    users = rows["user"].unique().sort()
    position = {user: i for i, user in enumerate(users)}
    total, count = np.zeros((2, rows["seed"].n_unique(), len(users)))
    for user, seed, value in rows.select("user", "seed", column).rows():
        total[seed, position[user]] += value
        count[seed, position[user]] += 1
    return users, total, count


@pytest.mark.parametrize(
    "metric, table, name",
    [("NDCG@20", "ranked", "ease"), ("NDCG@20", "ranked", "als"), ("RMSE", "rated", "mean")],
)
def test_differences_equal_a_plain_bootstrap(run, metric, table, name):
    users, ours, n_ours = user_sums(run, "hybrid", table, metric)
    other_users, other, n_other = user_sums(run, name, table, metric)
    assert users.equals(other_users)
    assert len(ours) == 2 and len(other) == (2 if name == "als" else 1)

    def score(totals, counts, weights, seeds):
        means = [(totals[s] * weights).sum() / (counts[s] * weights).sum() for s in seeds]
        return np.mean(np.sqrt(means) if metric == "RMSE" else means)

    row = leaderboard(run).filter(model="hybrid", versus=name, metric=metric, **ALL_USERS)
    weights, our_seeds, other_seeds = np.ones(len(users)), np.arange(2), np.arange(len(other))
    expected = score(ours, n_ours, weights, our_seeds)
    expected -= score(other, n_other, weights, other_seeds)
    assert row["value"].item() == pytest.approx(expected)
    rng, draws = np.random.default_rng(5), []
    for _ in range(1500):
        sample = rng.integers(len(users), size=len(users))
        weights = np.bincount(sample, minlength=len(users))
        our_score = score(ours, n_ours, weights, rng.choice(our_seeds, 2))
        other_score = score(other, n_other, weights, rng.choice(other_seeds, len(other)))
        draws.append(our_score - other_score)
    lo, hi = np.quantile(draws, [0.025, 0.975])
    assert hi > lo
    assert abs(row["lo"].item() - lo) < 0.15 * (hi - lo)
    assert abs(row["hi"].item() - hi) < 0.15 * (hi - lo)


def test_every_model_is_listed_and_none_is_compared_with_itself(run):
    records = run.metrics().filter(metric="NDCG@20", split="test", **ALL_USERS)
    own = leaderboard(run).filter(pl.col("versus").is_null())
    assert set(own["model"]) == {"hybrid", *NAMES}
    versus = records.filter(model="hybrid").drop_nulls("versus")["versus"].unique()
    assert sorted(versus) == sorted(NAMES)
    for name in ("hybrid", *NAMES):
        n_records = 3 if name in ("hybrid", "als") else 1  # two seeds and both together; or one
        assert len(records.filter(pl.col("versus").is_null(), model=name)) == n_records
    assert load_recommender(run.model_folder("als", 1)).seed == 1
    saved_plan = load_recommender(run.model_folder("hybrid")).plan
    assert saved_plan == results(run)["plans"][0]["plan"]


def test_earlier_tables_stay(run, ready):
    for table in ("rated", "ranked"):
        earlier = ready.read(f"evaluation/{table}.parquet")
        assert run.read(f"evaluation/{table}.parquet").equals(earlier)
    assert not (run.folder / "evaluation/ease").exists()


def test_the_figures_of_earlier_chapters_stay_beside_those_of_the_leaderboard(run, ready):
    both = run.metrics()
    assert both.filter(fit=CHAPTER_FIT).equals(ready.metrics())
    assert set(both["fit"]) == {CHAPTER_FIT, TESTED_FIT}
    assert set(run_records(run)["fit"]) == {TESTED_FIT}
    assert set(run_records(ready)["fit"]) == {CHAPTER_FIT}
    assert "wide-deep" not in choose_model(both, "ranking").test_figures


def test_chapter_06_measures_the_fit_of_chapter_05_after_chapter_13(ready, tmp_path):
    again = copy_run(ready, tmp_path / "again")
    split = again.load_splits()[-1].for_final_fit()
    make_recommender("wide-deep", epochs=1, seed=9).fit(split).save(again.model_folder("wide-deep"))
    steps = again.manifest["steps"]
    steps.pop("evaluate_wide_deep")
    again.update_manifest(steps=steps)
    evaluate_wide_deep(again)
    key = [*METRIC_KEYS, "value"]
    assert again.metrics().sort(key).equals(ready.metrics().sort(key))


def test_the_evaluated_model_is_the_saved_one(run):
    model = load_recommender(run.model_folder("als", 1))
    final_split = run.load_splits()[-1].for_final_fit()
    users = eval_ranking(model, final_split, "test", (20,)).users
    saved = run.read("evaluation/tuned/als/ranked.parquet")
    saved = saved.filter(relevant="any", items="all", seed=1)
    assert users["NDCG@20"].to_list() == pytest.approx(saved["NDCG@20"].to_list())
    n_relevant, n_candidates = users["n_relevant"].to_numpy(), users["n_candidates"].to_numpy()
    expected = expected_random_ndcg(n_relevant, n_candidates, 20).mean()
    assert results(run)["random_ndcg"] == pytest.approx(expected)


def test_one_seed_and_many(ready, run, tmp_path):
    one = compare(copy_run(ready, tmp_path / "one"), seeds=1)
    first_seeds = {("hybrid", 0), *[(name, 0) for name in NAMES]}
    assert fit_keys(one) == first_seeds
    assert fit_keys(run) == {*first_seeds, ("hybrid", 1), ("als", 1)}
    als = {"model": "als", "metric": "NDCG@20"}
    # the first seed does not depend on the number of seeds
    first = [own_records(r, seed=0, cut=0, **als)["value"].item() for r in (one, run)]
    assert first[0] == first[1]
    records = own_records(run, **als).sort("seed")
    values = records["value"]
    assert records["seed"].to_list() == [None, 0, 1]
    assert values[0] == pytest.approx(values[1:].mean()) and values[1] != values[2]


# --- interrupted runs, and kept plans


def test_an_interrupted_comparison_continues(ready, run, tmp_path, monkeypatch):
    killed, made, real = copy_run(ready, tmp_path / "killed"), [], final_fits.fit_and_measure

    def interrupted_fit(fit_fn, folder):
        if len(made) == 5 and "killed" not in made:
            made.append("killed")
            raise KeyboardInterrupt
        made.append(str(folder.relative_to(killed.folder)))
        return real(fit_fn, folder)

    monkeypatch.setattr(final_fits, "fit_and_measure", interrupted_fit)
    with pytest.raises(KeyboardInterrupt):
        compare(killed, seeds=2)
    assert not (killed.folder / "leaderboard.json").exists()
    assert len(FakeEnsemble.chose) == 1
    compare(killed, restart=False, seeds=2)
    # eight fits and the interruption: no fit is repeated, no plan is chosen again
    assert len(set(made)) == len(made) == 9 and len(FakeEnsemble.chose) == 1
    assert leaderboard(killed).equals(leaderboard(run))
    is_random = pl.col("model").is_in(["hybrid", "als"])
    records = [r.metrics().filter(is_random).sort(KEY) for r in (killed, run)]
    assert records[0].equals(records[1])


@pytest.mark.parametrize("after", [3, 7], ids=["models", "ablation"])
def test_the_test_part_is_not_evaluated_again(ready, run, tmp_path, monkeypatch, after):
    killed, evaluated = copy_run(ready, tmp_path / "killed"), []
    real = comparison.evaluate_on_test

    def interrupted_evaluation(models, *args):
        if len(evaluated) == after and None not in evaluated:
            evaluated.append(None)
            raise KeyboardInterrupt
        evaluated.append(next(iter(models.values())).name)
        return real(models, *args)

    monkeypatch.setattr(final_fits, "evaluate_on_test", interrupted_evaluation)
    with pytest.raises(KeyboardInterrupt):
        compare(killed, seeds=2)
    compare(killed, restart=False, seeds=2)
    ablation = ["hybrid", "hybrid"]  # without each of its two components for ranking
    assert [name for name in evaluated if name] == ["hybrid", *NAMES, *ablation]
    assert leaderboard(killed).equals(leaderboard(run))


def test_a_plan_is_reused(ready, tmp_path):
    run = compare(copy_run(ready, tmp_path / "run"), seeds=1, time_budget_min=1.0)
    plan, first = run.read("hybrid-plan-0.json"), leaderboard(run)
    split = run.load_splits()[0]
    assert len(FakeEnsemble.chose) == 1
    assert FakeEnsemble.chose[0][1:] == (len(split.val), 1.0, 0)
    compare(run, seeds=1, time_budget_min=1.0)
    assert len(FakeEnsemble.chose) == 1
    assert leaderboard(run).equals(first) and run.read("hybrid-plan-0.json") == plan
    compare(run, seeds=1, time_budget_min=2.0)
    assert len(FakeEnsemble.chose) == 2  # another budget
    run.update_manifest(seed=7)
    assert load_or_make_plan(run, 0, split, 2.0)
    assert len(FakeEnsemble.chose) == 3  # another seed
    run.update_manifest(data={"sha256": "another", "rows": 1})
    assert load_or_make_plan(run, 0, split, 2.0)
    assert len(FakeEnsemble.chose) == 4  # other data
    (run.folder / "hybrid-plan-0.json").write_text("{ torn")
    for _ in range(2):
        assert load_or_make_plan(run, 0, split, 2.0)["plan"]
        assert len(FakeEnsemble.chose) == 5


def test_choosing_and_fitting_do_not_read_the_test_part(ready, tmp_path):
    plain, poisoned = copy_run(ready, tmp_path / "plain"), copy_run(ready, tmp_path / "poisoned")
    reversed_items, flipped_ratings = pl.col("item").reverse(), 6 - pl.col("rating")
    test = poisoned.read("test.parquet")
    poisoned.write("test.parquet", test.with_columns(item=reversed_items, rating=flipped_ratings))
    compare(plain, seeds=1)
    compare(poisoned, seeds=1)
    assert results(plain)["plans"][0]["plan"] == results(poisoned)["plans"][0]["plan"]
    for name in ("hybrid", "als", "mean"):
        files = [r.model_folder(name) / "model.safetensors" for r in (plain, poisoned)]
        assert files[0].read_bytes() == files[1].read_bytes()
    assert not leaderboard(plain).equals(leaderboard(poisoned))


def test_folds_have_plans_of_their_own(tmp_path):
    manifest = {"dataset": "demo?ratings=9000", "protocol": "rolling"}
    run = compare(evaluated_run(tmp_path / "run", MODELS[:2], **manifest), seeds=1)
    splits = run.load_splits()
    folds = list(range(len(splits)))
    assert len(splits) > 1
    chosen_on = [chosen[:2] for chosen in FakeEnsemble.chose]
    assert chosen_on == [(len(split.train), len(split.val)) for split in splits]
    assert [plan["cut"] for plan in results(run)["plans"]] == folds
    ease_folds = {fit["cut"] for fit in results(run)["fits"] if fit["model"] == "ease"}
    assert ease_folds == set(folds)
    record = leaderboard(run).filter(model="hybrid", versus="ease", metric="NDCG@20", **ALL_USERS)
    assert len(record) == 1 and record["cut"].item() is None  # one claim over all folds
    ablation = {(row["removed"], row["metric"]) for row in results(run)["ablation"]}
    assert ablation == {("ease", "NDCG@20"), ("popularity", "NDCG@20")}


def test_a_plan_is_chosen_before_the_final_fit(tmp_path):
    run = evaluated_run(tmp_path / "run", MODELS[:1], protocol="leave-one-out")
    compare(run, seeds=1)
    assert run.load_splits()[0].for_final_fit() is not None
    assert len(FakeEnsemble.chose) == 1 and FakeEnsemble.fitted == [False, True]


def test_a_model_that_cannot_be_fitted_is_excluded(ready, tmp_path):
    run = copy_run(ready, tmp_path / "run")
    models = [("popularity", {}), ("neumf", {"max_examples": 1})]
    run.write("tuning.json", tuning_report(models))
    compare(run, seeds=1)
    excluded = results(run)["excluded"]
    assert list(excluded) == ["neumf"] and "max_examples" in excluded["neumf"]
    assert set(leaderboard(run)["model"]) == {"hybrid", "popularity"}
    for step, wrong in ((build_leaderboard, {"seeds": 0}), (build_hybrid, {"time_budget_min": -1})):
        with pytest.raises(UserError, match="is not valid"):
            step(run, **wrong)


def wins_text(records, metric, *args):
    return describe_hybrid_wins(paired_comparisons(records, metric), metric, *args)


def test_no_other_model_and_no_test_rows(ready, tmp_path):
    alone = copy_run(ready, tmp_path / "alone")
    alone.write("tuning.json", tuning_report([]))
    compare(alone, seeds=1)
    text = wins_text(leaderboard(alone), "NDCG@20")
    assert text == "In NDCG@20, there is no model to compare the hybrid ensemble with."
    assert 0 < len(takeaways(leaderboard(alone), run_records(alone), results(alone))) <= 10
    empty = copy_run(ready, tmp_path / "empty")
    empty.write("test.parquet", empty.read("test.parquet").clear())
    compare(empty, seeds=1)
    assert results(empty)["random_ndcg"] is None and results(empty)["ablation"] == []
    records = leaderboard(empty)
    assert not len(rank_models(records, "NDCG@20")) and describe_rating_sort(records) == ""
    assert takeaways(records, run_records(empty), results(empty))[0].startswith(
        "The test part has no relevant items"
    )


def test_a_log_without_ratings(tmp_path):
    source = Run(tmp_path / "source", dataset="demo?ratings=2000")
    ingest(source)
    clicks = source.read("interactions.parquet").select("user", "item", "timestamp")
    clicks.write_csv(tmp_path / "clicks.csv")
    run = evaluated_run(tmp_path / "run", MODELS[:3], dataset=str(tmp_path / "clicks.csv"))
    compare(run, seeds=1)
    records = leaderboard(run)
    assert not len(rank_models(records, "RMSE")) and len(rank_models(records, "NDCG@20")) == 4
    sentences = takeaways(records, run_records(run), results(run))
    no_ratings = "There are no ratings to predict, so rating prediction is not evaluated."
    assert no_ratings in sentences
    assert not any("off on average" in sentence for sentence in sentences)
    assert "no model to compare" in wins_text(records, "RMSE")


# --- costs


def test_memory_and_seconds():
    with track_resources() as usage:
        block = torch.ones(2**25)
        time.sleep(0.03)
        del block
    assert 120 < usage["memory"] < 180 and 0.03 < usage["seconds"] < 5
    with track_resources() as usage:
        pass
    assert usage["memory"] < 20
    if sys.platform == "linux":  # memory that was held and freed before does not hide new memory
        held, pin = [bytearray(60_000) for _ in range(2000)], bytearray(60_000)
        del held
        with track_resources() as usage:
            held = [bytearray(60_000) for _ in range(2000)]
        assert usage["memory"] > 80 and len(pin)
    with pytest.raises(ZeroDivisionError):
        with track_resources():
            1 / 0  # noqa: B018
    assert threading.active_count() < 10


def test_count_params():
    nested = {"c": torch.zeros(4, dtype=torch.float64), "d": torch.arange(5)}
    state = {"a": torch.zeros(2, 3), "b": nested, "e": torch.tensor(True), "f": 1.0}
    assert count_params(state) == 10


def test_costs_are_means_over_seeds(run):
    table = cost_table(leaderboard(run), results(run))
    seconds = [fit["seconds"] for fit in results(run)["fits"] if fit["model"] == "als"]
    row = table.filter(model="als").row(0, named=True)
    assert len(seconds) == 2 and row["seconds"] == pytest.approx(np.mean(seconds))
    assert row["RMSE"] is None and len(table) == 1 + len(MODELS)
    ease = load_recommender(run.model_folder("ease"))
    n_params = sum(v.numel() for v in ease._state().values() if v.is_floating_point())
    file_mb = (run.model_folder("ease") / "model.safetensors").stat().st_size / 2**20
    row = table.filter(model="ease").row(0, named=True)
    assert row["n_params"] == n_params and row["file_mb"] == pytest.approx(file_mb, abs=1e-4)


def test_drop_component():
    ranking, rating = {"a": 0.5, "b": 0.3, "c": 0.2}, {"b": 1.0, "d": 1.0}
    plan = {"ranking": ranking, "rating": rating, "more": [1]}
    reduced = drop_component(plan, "b")
    rest = {"a": pytest.approx(0.5 / 0.7), "c": pytest.approx(0.2 / 0.7)}
    assert reduced == {"ranking": rest, "rating": {"d": 2.0}, "more": [1]}
    assert plan["rating"] == {"b": 1.0, "d": 1.0}
    only = {"ranking": {"a": 1.0}, "rating": {}}
    assert drop_component(only, "a") == only
    assert drop_component({"ranking": {"a": 1.0}}, "z") == {"ranking": {"a": 1.0}}


def test_components_are_removed_one_by_one(run):
    ablation = {row["removed"]: row for row in results(run)["ablation"]}
    assert set(ablation) == {"ease", "popularity"}  # rating prediction has one component only
    assert {row["metric"] for row in ablation.values()} == {"NDCG@20"}
    plan, split = results(run)["plans"][0]["plan"], run.load_splits()[-1].for_final_fit()

    def score(plan):
        model = FakeEnsemble(plan=plan).fit(split)
        return eval_ranking(model, split, "test", (20,)).users["NDCG@20"].mean()

    expected = score(plan) - score(drop_component(plan, "ease"))
    assert ablation["ease"]["value"] == pytest.approx(expected)


# --- sentences


def interval(value, half_width):
    if half_width is None:
        return {"value": value, "lo": None, "hi": None}
    return {"value": value, "lo": value - half_width, "hi": value + half_width}


TEXT_COLUMNS = ("model", "versus", "task", "metric", "users", "items", "relevant")
SCHEMA = {column: pl.String for column in TEXT_COLUMNS}
SCHEMA |= {column: pl.Float64 for column in ("value", "lo", "hi", "p")} | {"n": pl.Int64}


def toy_records(ranking=(), rating=(), groups=(), n=500):
    "Make records from (model, value, half width; and hybrid minus model, half width, p)."
    rows = []
    for metric, task, models in (("NDCG@20", "ranking", ranking), ("RMSE", "rating", rating)):
        for users in ("all", *groups):
            scope = {"task": task, "metric": metric, "users": users, "n": n}
            scope |= {"items": "all", "relevant": "any"}
            for model, value, half_width, *difference in models:
                own = {"model": model, "versus": None, "p": None}
                rows.append(scope | own | interval(value, half_width))
                if difference:
                    paired = {"model": "hybrid", "versus": model, "p": difference[2]}
                    rows.append(scope | paired | interval(*difference[:2]))
    return pl.DataFrame(rows, schema=SCHEMA, orient="row")


def with_part(records, part="test"):
    "Add what records of metrics.json have beside."
    return records.with_columns(split=pl.lit(part), cut=0, seed=0)


def toy_results(records, slow=()):
    fits = []
    for i, model in enumerate(records["model"].unique(maintain_order=True)):
        cost = {"seconds": 500.0 if model in slow else 1.0 + i, "memory": 1.0}
        cost |= {"n_params": 9, "file_mb": 1.0}
        fits.append({"model": model, "cut": 0, "seed": 0} | cost)
    report = {"fits": fits, "plans": [{"cut": 0, "plan": {}, "seconds": 20.0}]}
    return report | {"excluded": {}, "ablation": [], "random_ndcg": 0.02}


WINS = toy_records(
    [
        ("hybrid", 0.3, 0.02),
        ("ease", 0.2, 0.02, 0.1, 0.02, 0.001),
        ("wide-deep-mse", 0.1, 0.02, 0.2, 0.02, 0.001),
    ],
    [
        ("hybrid", 0.9, 0.1),
        ("wide-deep-mse", 0.95, 0.1, -0.05, 0.01, 0.001),
        ("mean", 1.2, 0.1, -0.3, 0.1, 0.001),
    ],
    ("warm", "cold"),
)
LOSES = toy_records(
    [
        ("ease", 0.4, 0.02, -0.1, 0.02, 0.001),
        ("hybrid", 0.3, 0.02),
        ("popularity", 0.2, 0.02, 0.1, 0.02, 0.001),
    ]
)
TIES = toy_records(
    [
        ("hybrid", 0.3, 0.02),
        ("ease", 0.29, 0.02, 0.01, 0.02, 0.4),
        ("popularity", 0.1, 0.02, 0.2, 0.02, 0.001),
    ]
)
HYBRID = ("hybrid", 0.3, 0.02)


def test_wins_losses_and_ties():
    criterion = "(the 95 % interval of the difference excludes 0)."
    opening = "In NDCG@20, the hybrid ensemble is significantly better than"
    assert wins_text(WINS, "NDCG@20") == f"{opening} each of the 2 other models {criterion}"
    assert "better than each of the 2 other models" in wins_text(WINS, "RMSE")
    one_of_two = f"{opening} 1 of 2 other models {criterion}"
    loss = "Significantly better than the hybrid: ease."
    tie = "No significant difference: ease."
    assert wins_text(LOSES, "NDCG@20") == f"{one_of_two} {loss}"
    assert wins_text(TIES, "NDCG@20") == f"{one_of_two} {tie}"
    one_win = toy_records([HYBRID, ("ease", 0.2, 0.02, 0.1, 0.02, 0.001)])
    assert wins_text(one_win, "NDCG@20") == f"{opening} the only other model {criterion}"
    one_loss = toy_records([HYBRID, ("ease", 0.4, 0.02, -0.1, 0.02, 0.001)])
    assert wins_text(one_loss, "NDCG@20") == f"{opening} none of 1 other model {criterion} {loss}"
    no_interval = toy_records([("hybrid", 0.3, None), ("ease", 0.2, None, 0.1, None, None)])
    assert wins_text(no_interval, "NDCG@20") == f"{opening} none of 1 other model {criterion} {tie}"


def test_an_interval_that_ends_at_zero_includes_it():
    edge = toy_records([HYBRID, ("ease", 0.2, 0.02, 0.25, 0.25, 0.04)])
    row = paired_comparisons(edge, "NDCG@20").row(0, named=True)
    assert row["lo"] == 0 and row["significant"] == 0


def test_holm_correction():
    others = [(f"m{i}", 0.2, 0.02, 0.1, 0.05, 0.02) for i in range(4)]
    rows = paired_comparisons(toy_records([HYBRID, *others], groups=("warm",)), "NDCG@20", "warm")
    assert rows["significant"].to_list() == [1] * 4
    assert rows["significant_holm"].to_list() == [0] * 4
    text = describe_hybrid_wins(rows, "NDCG@20", "significant_holm", "for warm users")
    assert text.startswith("In NDCG@20 for warm users, the hybrid ensemble")
    assert "none of 4 other models (after Holm's correction for 4 claims)" in text


def test_the_sign_of_errors_and_scores():
    ranking = [("hybrid", 0.3, 0.01), ("a", 0.2, 0.01, 0.1, 0.01, 0.001)]
    rating = [("hybrid", 1.0, 0.01), ("a", 0.9, 0.01, 0.1, 0.01, 0.001)]
    records = toy_records(ranking, rating)
    assert paired_comparisons(records, "NDCG@20")["significant"].item() == 1
    assert paired_comparisons(records, "RMSE")["significant"].item() == -1
    by_score, by_error = [leaderboard_table(records, metric) for metric in ("NDCG@20", "RMSE")]
    assert by_score["versus hybrid"].to_list() == [None, "significantly worse"]
    assert by_error["versus hybrid"].to_list() == ["significantly better", None]
    assert by_error["model"].to_list() == ["a", "hybrid"]


def test_rating_sort_sentences():
    assert "significantly worse: 33% of the score" in describe_rating_sort(WINS)
    rating = [("wide-deep", 1.0, 0.1)]
    better = [("wide-deep", 0.4, 0.02, -0.1, 0.02, 0.001), HYBRID]
    assert "is significantly better" in describe_rating_sort(toy_records(better, rating))
    assert describe_rating_sort(TIES) == ""
    tied = [("wide-deep", 0.3, 0.02, 0.0, 0.02, 0.9), HYBRID]
    assert "no significant difference" in describe_rating_sort(toy_records(tied, rating))
    assert describe_rating_sort(toy_records(better)) == ""  # trained for ranking, not for ratings


def test_ablation_sentences():
    def row(removed, value, p, metric="NDCG@20"):
        return {"removed": removed, "metric": metric, "value": value, "p": p}

    half = row("wide-alone", 1, 0.001)
    rows = [row("a", 0.1, 0.001), row("b", 0.001, 0.5), row("c", -0.1, 0.001), half]
    assert describe_ablation(rows, "NDCG@20") == (
        "In NDCG@20, the hybrid ensemble has: significantly worse without a; "
        "no significant difference without b; significantly better without c "
        "(Holm's correction for 3 claims)."
    )
    errors = [row("a", -0.1, 0.001, "RMSE")]
    assert "worse without a" in describe_ablation(errors, "RMSE")
    assert describe_ablation([], "RMSE") == describe_ablation([half], "NDCG@20") == ""
    no_test = describe_ablation([row("a", 0.1, None)], "NDCG@20")
    assert "no significant difference without a" in no_test


def test_join_names():
    assert join_names([]) == "" and join_names(["a"]) == "a"
    assert join_names(list("abcdef")) == "a, b, c, d, e and f"
    assert join_names(list("abcdefgh")) == "a, b, c, d, e and 3 others"


def advice(records, **options):
    return takeaways(records, with_part(records), toy_results(records, **options))


def contains(sentences, text):
    return any(text in sentence for sentence in sentences)


def test_takeaways_follow_the_numbers():
    sentences = advice(WINS)
    best = "it is significantly better than all 2 other models."
    assert sentences[0] == f"To rank items, use hybrid: {best}"
    assert contains(sentences, "To rank items for cold-start users, use hybrid")
    assert contains(sentences, "a large gain")
    assert contains(sentences, "Do not sort by predicted ratings: that reaches 33%")
    assert f"use ease: {best}" in advice(LOSES)[0]
    assert "use ease. hybrid has the best score, but its lead is not clear" in advice(TIES)[0]
    slow_hybrid = advice(TIES, slow=("hybrid",))
    assert contains(slow_hybrid, "With one minute for training, use ease: it trains in")
    assert contains(slow_hybrid, "reaches 97% of the best")
    all_slow = advice(TIES, slow=("hybrid", "ease", "popularity"))
    assert contains(all_slow, "No model trains within a minute; the fastest is")
    popular = toy_records([HYBRID, ("popularity", 0.29, 0.02, 0.01, 0.02, 0.4)])
    assert "use popularity" in advice(popular)[0]
    chance = toy_records([("hybrid", 0.021, 0.01), ("mean", 0.02, 0.01, 0.001, 0.01, 0.9)])
    assert contains(advice(chance), "not significantly better than a random order")
    few_users = [("hybrid", 0.3, None), ("ease", 0.2, None, 0.1, None, None)]
    sentences = advice(toy_records(few_users, n=3))
    assert contains(sentences, "too few for confidence intervals")
    assert not contains(sentences, best)


ALL_ZERO = toy_records([("hybrid", 0.0, 0.0), ("ease", 0.0, 0.0, 0.0, 0.0, 1.0)])
CASES = {
    "wins": WINS,
    "loses": LOSES,
    "ties": TIES,
    "nothing": WINS[:0],
    "ratings only": WINS.filter(metric="RMSE"),
    "hybrid only": WINS.filter(model="hybrid"),
    "no hybrid": WINS.filter(pl.col("model") != "hybrid"),
    "all zero": ALL_ZERO,
}


@pytest.mark.parametrize("records", CASES.values(), ids=CASES.keys())
def test_there_are_one_to_ten_takeaways(records):
    report = toy_results(records)
    no_fits = report | {"random_ndcg": None, "plans": [], "fits": []}
    for results in (report, no_fits):
        sentences = takeaways(records, with_part(records), results)
        assert 0 < len(sentences) <= 10
        for sentence in sentences:
            assert re.fullmatch(r"[A-Z].+\.", sentence)
            assert "nan" not in sentence and "None" not in sentence


def test_all_takeaways_together_are_ten():
    ranking, rating = WINS.filter(metric="NDCG@20"), WINS.filter(metric="RMSE")
    hit_rate = ranking.with_columns(metric=pl.lit("HitRate@20"))
    absolute_error = rating.with_columns(metric=pl.lit("MAE"))
    sentences = advice(pl.concat([WINS, hit_rate, absolute_error]))
    assert len(sentences) == len(set(sentences)) == 10
    hits = "Of 100 users with 20 recommendations of hybrid, about 30 choose one of them."
    assert hits in sentences


def test_the_verdict_is_the_simplest_that_is_not_significantly_worse():
    def model(records, task="ranking", **group):
        found = choose_model(with_part(records), task, **group)
        return found.model, found.level

    assert model(WINS) == ("hybrid", ("hybrid",))
    assert model(LOSES) == ("ease", ("ease",))
    assert model(TIES) == ("ease", ("ease", "hybrid"))
    assert model(WINS[:0]) == ("", ())
    assert model(WINS.filter(metric="NDCG@20"), "rating") == ("", ())
    unsure = toy_records([("hybrid", 0.3, None), ("popularity", 0.2, None)])  # no intervals
    assert model(unsure) == ("popularity", ("popularity", "hybrid"))
    better = [("als", 0.3, 0.02), ("svd", 0.31, 0.02), HYBRID]
    assert model(toy_records(better))[0] == "svd"  # of equally simple models the better one


def test_validation_decides_and_the_test_part_is_quoted():
    """The test part says that the hybrid wins, validation that it does not."""
    records = pl.concat([with_part(WINS), with_part(LOSES, "val")])
    found = choose_model(records, "ranking")
    assert (found.part, found.model, found.best) == ("val", "ease", "ease")
    assert found.test_figures["ease"] == pytest.approx((0.2, 0.18, 0.22), abs=0.2)
    text = long_text(found)
    assert text.index("On the test part, ease has") < text.index(
        "The choice was made on other data"
    )
    on_test = choose_model(with_part(WINS), "ranking")
    assert "so the choice was made on the test part" in long_text(on_test)


@pytest.mark.parametrize("name", ["wins", "loses", "ties", "nothing", "hybrid only", "all zero"])
def test_all_texts_of_a_verdict_are_sentences(name):
    records = with_part(CASES[name])
    for task in ("ranking", "rating"):
        found = choose_model(records, task)
        for text in (short_text(found), long_text(found)):
            assert not text or re.fullmatch(r"To .+\.", text)
            assert "None" not in text and "nan" not in text and "()" not in text
        if found:
            assert headline(found).startswith(found.model)
            n_labels = len(plot_verdict(found).axes[0].get_yticklabels())
            assert n_labels == found.n_models


def test_in_short_follows_the_verdict():
    def in_short(records, seconds=None):
        found = [choose_model(with_part(records), task) for task in ("ranking", "rating")]
        return leaderboard_in_short(*found, seconds or {})

    texts = {name: [s for s in in_short(CASES[name]) if s] for name in CASES}
    assert "a clear winner for lists: hybrid" in texts["wins"][0]
    assert "no model wins clearly: 2 are level" in texts["ties"][0]
    assert texts["nothing"][0].startswith("No list could be evaluated")
    for sentences in texts.values():
        assert 2 <= len(sentences) <= 5
        for sentence in sentences:
            assert re.fullmatch(r"[A-Z].+\.", sentence) and "`" not in sentence
            assert "nan" not in sentence and "None" not in sentence and "()" not in sentence
    cost = in_short(TIES, {"ease": 0.5, "hybrid": 50.0})[2]
    assert cost == "Training ease takes 0.5 seconds; hybrid, the best, takes 100 times as long."


def test_forest_plots():
    ax = plot_forest(paired_comparisons(LOSES, "NDCG@20"), "NDCG@20").axes[0]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["popularity", "ease"]
    assert "right of 0" in ax.get_xlabel()
    errors = plot_forest(paired_comparisons(WINS, "RMSE"), "RMSE")
    assert "left of 0" in errors.axes[0].get_xlabel()
    groups = {users: paired_comparisons(WINS, "NDCG@20", users) for users in ("warm", "cold")}
    assert len(plot_forest_by_group(groups, "NDCG@20").axes) == 2
