"The leaderboard: differences by hand, starts, kills, the plan that is kept, what choosing may see, and words that follow the numbers."

import re
import shutil
import sys
import time
from dataclasses import dataclass, field

import numpy as np
import polars as pl
import pytest
import torch

from widedeep_nb import comparison
from widedeep_nb.comparison import (
    build_leaderboard,
    cost_table,
    count_params,
    describe_ablation,
    describe_hybrid_wins,
    describe_rating_sort,
    drop_component,
    join_names,
    leaderboard_table,
    paired_comparisons,
    plot_forest,
    plot_forest_by_group,
    rank_models,
    statistical_ties,
    takeaways,
    track_resources,
)
from widedeep_nb.core import (
    RECOMMENDERS,
    Recommender,
    Run,
    UserError,
    load_recommender,
    make_recommender,
)
from widedeep_nb.data import ingest
from widedeep_nb.evaluation import eval_ranking, evaluate_wide_deep, expected_random_ndcg
from widedeep_nb.hybrid import build_hybrid, load_or_make_plan

FIELD = [
    ("popularity", {}),
    ("ease", {}),
    ("als", {"factors": 4, "n_iter": 2}),
    ("mean", {}),
    ("damped-bias", {}),
]


def tuning(field=FIELD):
    return {
        "trials": 1,
        "seconds": 0,
        "split_note": "",
        "excluded": {},
        "models": [
            {
                "model": m,
                "registry_name": m,
                "settings": s,
                "seconds": 0,
                "objectives": [],
                "curve": None,
            }
            for m, s in field
        ],
    }


@dataclass
class Fake(Recommender):
    "A hybrid that notes down when it chooses, and on what."

    minutes: float = 15.0
    plan: dict = field(default_factory=dict)
    seed: int = 0
    chose, fitted = [], []
    predicts_ratings = property(lambda self: bool(self.plan.get("stars")))
    name = "hybrid"

    def _fit(self, split):
        assert not len(split.test)
        type(self).fitted.append(bool(self.plan))
        if not self.plan:
            type(self).chose.append(
                (len(split.train), len(split.val), self.time_budget_min, self.seed)
            )
            judge = (
                int(split.val["item"].to_numpy().sum() % 97) / 97
            )  # what validation says has a say
            self.plan = {
                "ranking": {"ease": 1 - judge / 2, "popularity": judge / 2},
                "stars": {"damped-bias": 1.0} if split.has_ratings else {},
            }
        self.made = {n: make_recommender(n).fit(split) for n in self.parts}
        self.jitter = (
            torch.rand(self.n_items + 1, generator=torch.Generator().manual_seed(self.seed)) * 0.05
        )

    parts = property(lambda self: dict.fromkeys([*self.plan["ranking"], *self.plan["stars"]]))

    def _scores(self, users, history, items):
        def scaled(s):
            return s / s.abs().max().clamp(min=1e-9)

        return (
            sum(
                w * scaled(self.made[n].scores(users, history, items))
                for n, w in self.plan["ranking"].items()
            )
            + self.jitter[items.clamp(max=self.n_items)]
        )

    def _predict(self, users, items, history):
        return sum(
            w * self.made[n].predict(users, items, history) for n, w in self.plan["stars"].items()
        )

    def _state(self):
        return {"jitter": self.jitter} | {
            f"{n}/{k}": v for n, m in self.made.items() for k, v in m._state().items()
        }

    def _restore(self, state):
        self.jitter, self.made = state["jitter"], {n: make_recommender(n) for n in self.parts}
        for n, m in self.made.items():
            m.user_ids, m.item_ids, m.train_history, m.rating_range = (
                self.user_ids,
                self.item_ids,
                self.train_history,
                self.rating_range,
            )
            m._restore(
                {k.removeprefix(n + "/"): v for k, v in state.items() if k.startswith(n + "/")}
            )


@pytest.fixture(autouse=True)
def fake(monkeypatch):
    monkeypatch.setitem(RECOMMENDERS, "hybrid", Fake)
    Fake.chose.clear(), Fake.fitted.clear()


def measured_run(folder, field=FIELD, **about):
    run = Run(
        folder, **{"dataset": "demo?ratings=3000", "parameters": {"seeds": 1, "epochs": 1}} | about
    )
    evaluate_wide_deep(run)
    run.write("tuning.json", tuning(field))
    return run


def do(run, again=True, minutes=15.0, **how):
    "Both steps without the steps before them."
    build_hybrid.__wrapped__(run, minutes)
    run.work_dir = run.folder / ".work" / "build_leaderboard"
    if again:
        shutil.rmtree(run.work_dir, ignore_errors=True)
    build_leaderboard.__wrapped__(run, **how)
    return run


def copied(run, to):
    shutil.copytree(run.folder, to)
    return Run(to)


@pytest.fixture(scope="module")
def ready(tmp_path_factory):
    return measured_run(tmp_path_factory.mktemp("runs") / "ready")


@pytest.fixture(scope="module")
def run(ready, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(RECOMMENDERS, "hybrid", Fake)
        return do(copied(ready, tmp_path_factory.mktemp("runs") / "done"), n_seeds=2)


key = ["cut", "seed", "model", "versus", "task", "users", "items", "relevant", "metric"]


def figures(run):
    return run.read("leaderboard.parquet").sort(key)


of_all = dict(users="all", items="all", n_relevant="any")


# --- what is written


def by_user(run, name, table, column):
    "[seeds, users]: sums and counts of each user."
    rows = run.read(f"evaluation/tuned/{name}/{table}.parquet")
    rows = rows.filter(relevant="any", items="all") if table == "ranked" else rows
    users = rows["user"].unique().sort()
    place = {u: i for i, u in enumerate(users)}
    total, count = np.zeros((2, rows["seed"].n_unique(), len(users)))
    for user, seed, value in rows.select("user", "seed", column).rows():
        total[seed, place[user]] += value
        count[seed, place[user]] += 1
    return users, total, count


@pytest.mark.parametrize(
    "metric, table, name",
    [("NDCG@20", "ranked", "ease"), ("NDCG@20", "ranked", "als"), ("RMSE", "rated", "mean")],
)
def test_differences_are_those_made_by_hand(run, metric, table, name):
    (users, ours, n), (others, other, m) = [
        by_user(run, who, table, metric) for who in ("hybrid", name)
    ]
    assert users.equals(others) and len(ours) == 2 and len(other) == (2 if name == "als" else 1)
    bend = np.sqrt if metric == "RMSE" else lambda x: x

    def figure(t, c, w, s):
        return np.mean([bend((t[i] * w).sum() / (c[i] * w).sum()) for i in s])

    found = figures(run).filter(model="hybrid", versus=name, metric=metric, **of_all)
    whole, each = np.ones(len(users)), [np.arange(len(x)) for x in (ours, other)]
    assert found["value"].item() == pytest.approx(
        figure(ours, n, whole, each[0]) - figure(other, m, whole, each[1])
    )
    rng, draws = np.random.default_rng(5), []
    for _ in range(1500):
        w = np.bincount(rng.integers(len(users), size=len(users)), minlength=len(users))
        draws.append(
            figure(ours, n, w, rng.choice(each[0], 2))
            - figure(other, m, w, rng.choice(each[1], len(other)))
        )
    lo, hi = np.quantile(draws, [0.025, 0.975])
    assert abs(found["lo"].item() - lo) < 0.15 * (hi - lo) and abs(
        found["hi"].item() - hi
    ) < 0.15 * (hi - lo)
    assert (hi - lo) > 0


def test_every_model_is_there_and_nothing_is_compared_with_itself(run):
    records, names = (
        run.metrics().filter(metric="NDCG@20", split="test", **of_all),
        ["hybrid", *[m for m, _ in FIELD]],
    )
    assert set(figures(run).filter(pl.col("versus").is_null())["model"]) == set(names)
    assert sorted(records.filter(model="hybrid").drop_nulls("versus")["versus"].unique()) == sorted(
        names[1:]
    )
    for name in names:
        assert len(records.filter(pl.col("versus").is_null(), model=name)) == (
            3 if name in ("hybrid", "als") else 1
        )  # two starts and both together; or one
    assert (
        load_recommender(run.model_folder("als", 1)).seed == 1
        and load_recommender(run.model_folder("hybrid")).plan
        == run.read("leaderboard.json")["plans"][0]["plan"]
    )


def test_earlier_tables_stay(run, ready):
    for table in ("rated", "ranked"):
        assert run.read(f"evaluation/{table}.parquet").equals(
            ready.read(f"evaluation/{table}.parquet")
        )
    assert not (run.folder / "evaluation/ease").exists()


def test_the_model_that_was_judged_is_the_one_that_is_kept(run):
    users = eval_ranking(
        load_recommender(run.model_folder("als", 1)),
        run.load_splits()[-1].for_final_fit(),
        "test",
        (20,),
    ).users
    kept = run.read("evaluation/tuned/als/ranked.parquet").filter(
        relevant="any", items="all", seed=1
    )
    assert users["NDCG@20"].to_list() == pytest.approx(kept["NDCG@20"].to_list())
    assert run.read("leaderboard.json")["random_ndcg"] == pytest.approx(
        expected_random_ndcg(
            users["n_relevant"].to_numpy(), users["n_candidates"].to_numpy(), 20
        ).mean()
    )


def test_one_start_and_many(ready, run, tmp_path):
    one = do(copied(ready, tmp_path / "one"), n_seeds=1)
    assert {(f["model"], f["seed"]) for f in one.read("leaderboard.json")["fits"]} == {
        ("hybrid", 0),
        *[(m, 0) for m, _ in FIELD],
    }
    assert {(f["model"], f["seed"]) for f in run.read("leaderboard.json")["fits"]} == {
        ("hybrid", 0),
        ("hybrid", 1),
        ("als", 1),
        *[(m, 0) for m, _ in FIELD],
    }
    first = [
        r.metrics()
        .filter(pl.col("versus").is_null(), model="als", metric="NDCG@20", seed=0, cut=0, **of_all)[
            "value"
        ]
        .item()
        for r in (one, run)
    ]
    assert first[0] == first[1]  # the first start is the same, however many follow
    both = (
        run.metrics()
        .filter(pl.col("versus").is_null(), model="als", metric="NDCG@20", **of_all)
        .sort("seed")
    )
    assert (
        both["seed"].to_list() == [None, 0, 1]
        and both["value"][0] == pytest.approx(both["value"][1:].mean())
        and both["value"][1] != both["value"][2]
    )


# --- kills, and the plan that is kept


def test_a_killed_comparison_goes_on(ready, run, tmp_path, monkeypatch):
    killed, made, real = copied(ready, tmp_path / "killed"), [], comparison.fit_and_measure

    def some(make, folder):
        if len(made) == 5 and "killed" not in made:
            made.append("killed")
            raise KeyboardInterrupt
        made.append(str(folder.relative_to(killed.folder)))
        return real(make, folder)

    monkeypatch.setattr(comparison, "fit_and_measure", some)
    with pytest.raises(KeyboardInterrupt):
        do(killed, n_seeds=2)
    assert not (killed.folder / "leaderboard.json").exists() and len(Fake.chose) == 1
    do(killed, again=False, n_seeds=2)
    assert (
        len(set(made)) == len(made) == 9 and len(Fake.chose) == 1
    )  # eight fits and the kill: none is made twice, nothing is chosen anew
    assert figures(killed).equals(figures(run))
    assert (
        killed.metrics()
        .filter(pl.col("model").is_in(["hybrid", "als"]))
        .sort(key)
        .equals(run.metrics().filter(pl.col("model").is_in(["hybrid", "als"])).sort(key))
    )


@pytest.mark.parametrize("after", [3, 7], ids=["models", "ablation"])
def test_killed_between_judgements_the_test_part_is_not_looked_at_again(
    ready, run, tmp_path, monkeypatch, after
):
    killed, looked, real = copied(ready, tmp_path / "killed"), [], comparison.on_test

    def some(models, *rest):
        if len(looked) == after and None not in looked:
            looked.append(None)
            raise KeyboardInterrupt
        looked.append(next(iter(models.values())).name)
        return real(models, *rest)

    monkeypatch.setattr(comparison, "evaluate_on_test", some)
    with pytest.raises(KeyboardInterrupt):
        do(killed, n_seeds=2)
    do(killed, again=False, n_seeds=2)
    parts = 2  # the hybrid once more without each of its two parts for lists
    assert [n for n in looked if n] == ["hybrid", *[m for m, _ in FIELD]] + [
        "hybrid"
    ] * parts and figures(killed).equals(figures(run))


def test_a_plan_once_reached_is_replayed(ready, tmp_path):
    run = do(copied(ready, tmp_path / "run"), n_seeds=1, time_budget_min=1.0)
    plan, first = run.read("hybrid-plan-0.json"), figures(run)
    assert len(Fake.chose) == 1 and Fake.chose[0][1:] == (len(run.load_splits()[0].val), 1.0, 0)
    assert (
        do(run, n_seeds=1, time_budget_min=1.0)
        and len(Fake.chose) == 1
        and figures(run).equals(first)
        and run.read("hybrid-plan-0.json") == plan
    )
    do(run, n_seeds=1, time_budget_min=2.0)
    assert len(Fake.chose) == 2  # another budget
    run.update_manifest(seed=7)
    assert (
        load_or_make_plan(run, 0, run.load_splits()[0], 2.0) and len(Fake.chose) == 3
    )  # another seed
    run.update_manifest(data={"sha256": "another", "rows": 1})
    assert (
        load_or_make_plan(run, 0, run.load_splits()[0], 2.0) and len(Fake.chose) == 4
    )  # other data
    (run.folder / "hybrid-plan-0.json").write_text("{ torn")
    assert load_or_make_plan(run, 0, run.load_splits()[0], 2.0)["plan"] and len(Fake.chose) == 5
    assert load_or_make_plan(run, 0, run.load_splits()[0], 2.0)["plan"] and len(Fake.chose) == 5


def test_choosing_and_fitting_do_not_see_the_test_part(ready, tmp_path):
    plain, poisoned = copied(ready, tmp_path / "plain"), copied(ready, tmp_path / "poisoned")
    test = poisoned.read("test.parquet")
    poisoned.write(
        "test.parquet",
        test.with_columns(item=pl.col("item").reverse(), rating=6 - pl.col("rating")),
    )
    for each in (plain, poisoned):
        do(each, n_seeds=1)
    assert (
        plain.read("leaderboard.json")["plans"][0]["plan"]
        == poisoned.read("leaderboard.json")["plans"][0]["plan"]
    )
    for name in ("hybrid", "als", "mean"):
        assert (plain.model_folder(name) / "model.safetensors").read_bytes() == (
            poisoned.model_folder(name) / "model.safetensors"
        ).read_bytes()
    assert not figures(plain).equals(figures(poisoned))


def test_windows_have_plans_of_their_own(tmp_path):
    run = measured_run(tmp_path / "run", FIELD[:2], dataset="demo?ratings=9000", protocol="rolling")
    do(run, n_seeds=1)
    splits, notes = run.load_splits(), run.read("leaderboard.json")
    assert len(splits) > 1 and [c[:2] for c in Fake.chose] == [
        (len(s.train), len(s.val)) for s in splits
    ]
    assert [p["cut"] for p in notes["plans"]] == list(range(len(splits))) and {
        f["cut"] for f in notes["fits"] if f["model"] == "ease"
    } == set(range(len(splits)))
    record = figures(run).filter(model="hybrid", versus="ease", metric="NDCG@20", **of_all)
    assert len(record) == 1 and record["cut"].item() is None  # one claim over all windows
    assert {(p["removed"], p["metric"]) for p in notes["ablation"]} == {
        ("ease", "NDCG@20"),
        ("popularity", "NDCG@20"),
    }


def test_where_nothing_is_held_back_the_plan_is_given(tmp_path):
    run = measured_run(tmp_path / "run", FIELD[:1], protocol="leave-one-out")
    do(run, n_seeds=1)
    assert (
        run.load_splits()[0].for_final_fit() is not None
        and len(Fake.chose) == 1
        and Fake.fitted == [False, True]
    )  # chosen, and fitted with what was chosen


def test_a_model_that_does_not_fit_is_left_out_and_named(ready, tmp_path):
    run = copied(ready, tmp_path / "run")
    run.write("tuning.json", tuning([("popularity", {}), ("neumf", {"max_examples": 1})]))
    do(run, n_seeds=1)
    notes = run.read("leaderboard.json")
    assert (
        list(notes["excluded"]) == ["neumf"]
        and "max_examples" in notes["excluded"]["neumf"]
        and set(figures(run)["model"]) == {"hybrid", "popularity"}
    )
    for wrong in ({"seeds": 0}, {"minutes": -1.0}):
        with pytest.raises(UserError, match="is at least"):
            do(run, **wrong)


def test_nobody_to_judge_and_nobody_to_beat(ready, tmp_path):
    alone = copied(ready, tmp_path / "alone")
    alone.write("tuning.json", tuning([]))
    do(alone, n_seeds=1)
    assert (
        describe_hybrid_wins(paired_comparisons(figures(alone), "NDCG@20"), "NDCG@20")
        == "In NDCG@20 there is nothing to compare the hybrid with."
        and 0 < len(takeaways(figures(alone), alone.read("leaderboard.json"))) <= 10
    )
    empty = copied(ready, tmp_path / "empty")
    empty.write("test.parquet", empty.read("test.parquet").clear())
    do(empty, n_seeds=1)
    notes = empty.read("leaderboard.json")
    assert (
        notes["random_ndcg"] is None
        and not len(rank_models(figures(empty), "NDCG@20"))
        and notes["ablation"] == []
    )
    assert (
        takeaways(figures(empty), notes)[0].startswith("Nobody")
        and describe_rating_sort(figures(empty)) == ""
    )


def test_a_log_without_stars(tmp_path):
    made = Run(tmp_path / "made", dataset="demo?ratings=2000")
    ingest(made)
    made.read("interactions.parquet").select("user", "item", "timestamp").write_csv(
        tmp_path / "clicks.csv"
    )
    run = measured_run(tmp_path / "run", FIELD[:3], dataset=str(tmp_path / "clicks.csv"))
    do(run, n_seeds=1)
    assert (
        not len(rank_models(figures(run), "RMSE"))
        and len(rank_models(figures(run), "NDCG@20")) == 4
    )
    lines = takeaways(figures(run), run.read("leaderboard.json"))
    assert (
        "There were no stars to predict, so this says nothing about ratings." in lines
        and not any("off on average" in line for line in lines)
    )
    assert describe_hybrid_wins(paired_comparisons(figures(run), "RMSE"), "RMSE").endswith(
        "nothing to compare the hybrid with."
    )


# --- costs


def test_memory_seconds_and_numbers():
    with track_resources() as spent:
        block = torch.ones(2**25)
        time.sleep(0.03)
        del block
    assert 120 < spent["memory"] < 180 and 0.03 < spent["seconds"] < 5
    with track_resources() as spent:
        pass
    assert spent["memory"] < 20
    if (
        sys.platform == "linux"
    ):  # what was held before and is free again does not hide what is taken now
        held, pin = [bytearray(60_000) for _ in range(2000)], bytearray(60_000)
        del held
        with track_resources() as spent:
            held = [bytearray(60_000) for _ in range(2000)]
        assert spent["memory"] > 80 and len(pin)
    with pytest.raises(ZeroDivisionError):
        with track_resources():
            1 / 0
    import threading

    assert threading.active_count() < 10
    assert (
        count_params(
            {
                "a": torch.zeros(2, 3),
                "b": {"c": torch.zeros(4, dtype=torch.float64), "d": torch.arange(5)},
                "e": torch.tensor(True),
                "f": 1.0,
            }
        )
        == 10
    )


def test_costs_are_means_over_starts(run):
    notes, records = run.read("leaderboard.json"), figures(run)
    table = cost_table(records, notes)
    als = [f for f in notes["fits"] if f["model"] == "als"]
    row = table.filter(model="als").row(0, named=True)
    assert (
        len(als) == 2
        and row["seconds"] == pytest.approx(np.mean([f["seconds"] for f in als]))
        and row["RMSE"] is None
        and len(table) == 1 + len(FIELD)
    )
    ease = load_recommender(run.model_folder("ease"))
    assert table.filter(model="ease")["n_params"].item() == sum(
        v.numel() for v in ease._state().values() if v.is_floating_point()
    )
    assert table.filter(model="ease")["file_mb"].item() == pytest.approx(
        (run.model_folder("ease") / "model.safetensors").stat().st_size / 2**20, abs=1e-4
    )


def test_a_plan_with_one_part_less():
    plan = {"ranking": {"a": 0.5, "b": 0.3, "c": 0.2}, "stars": {"b": 1.0, "d": 1.0}, "more": [1]}
    assert drop_component(plan, "b") == {
        "ranking": {"a": pytest.approx(0.5 / 0.7), "c": pytest.approx(0.2 / 0.7)},
        "stars": {"d": 2.0},
        "more": [1],
    } and plan["stars"] == {"b": 1.0, "d": 1.0}
    assert drop_component({"ranking": {"a": 1.0}, "stars": {}}, "a") == {
        "ranking": {"a": 1.0},
        "stars": {},
    } and drop_component({"ranking": {"a": 1.0}}, "z") == {"ranking": {"a": 1.0}}


def test_parts_are_taken_out_one_by_one(run):
    parts = run.read("leaderboard.json")["ablation"]
    assert {(p["removed"], p["metric"]) for p in parts} == {
        ("ease", "NDCG@20"),
        ("popularity", "NDCG@20"),
    }  # stars have one part only
    plan, split = (
        run.read("leaderboard.json")["plans"][0]["plan"],
        run.load_splits()[-1].for_final_fit(),
    )

    def score(p):
        return eval_ranking(Fake(plan=p).fit(split), split, "test", (20,)).users["NDCG@20"].mean()

    assert next(p for p in parts if p["removed"] == "ease")["value"] == pytest.approx(
        score(plan) - score(drop_component(plan, "ease"))
    )


# --- words


def records_of(lists=(), stars=(), group=(), n=500):
    "Made-up records: (model, value, half of its interval; and the hybrid minus it, half, p)."
    rows = []
    for metric, task, models in (("NDCG@20", "ranking", lists), ("RMSE", "rating", stars)):
        for users in ("all", *group):
            for model, value, half, *apart in models:
                base = dict(
                    task=task, metric=metric, users=users, items="all", n_relevant="any", n=n
                )

                def around(v, h):
                    return {
                        "value": v,
                        "lo": None if h is None else v - h,
                        "hi": None if h is None else v + h,
                    }

                rows.append(
                    base | {"model": model, "versus": None, "p": None} | around(value, half)
                )
                if apart:
                    rows.append(
                        base
                        | {"model": "hybrid", "versus": model, "p": apart[2]}
                        | around(*apart[:2])
                    )
    schema = (
        {c: pl.String for c in ("model", "versus", "task", "metric", "users", "items", "relevant")}
        | {c: pl.Float64 for c in ("value", "lo", "hi", "p")}
        | {"n": pl.Int64}
    )
    return pl.DataFrame(rows, schema=schema, orient="row")


def notes_of(records, slow=()):
    return {
        "fits": [
            {
                "model": m,
                "cut": 0,
                "seed": 0,
                "seconds": 500.0 if m in slow else 1.0 + i,
                "memory": 1.0,
                "n_params": 9,
                "file_mb": 1.0,
            }
            for i, m in enumerate(records["model"].unique(maintain_order=True))
        ],
        "plans": [{"cut": 0, "plan": {}, "seconds": 20.0}],
        "excluded": {},
        "ablation": [],
        "random_ndcg": 0.02,
    }


wins = records_of(
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
loses = records_of(
    [
        ("ease", 0.4, 0.02, -0.1, 0.02, 0.001),
        ("hybrid", 0.3, 0.02),
        ("popularity", 0.2, 0.02, 0.1, 0.02, 0.001),
    ]
)
ties = records_of(
    [
        ("hybrid", 0.3, 0.02),
        ("ease", 0.29, 0.02, 0.01, 0.02, 0.4),
        ("popularity", 0.1, 0.02, 0.2, 0.02, 0.001),
    ]
)


def test_wins_losses_and_ties_in_words():
    assert (
        describe_hybrid_wins(paired_comparisons(wins, "NDCG@20"), "NDCG@20")
        == "In NDCG@20 the hybrid beats every one of the 2 other models (the 95 % interval of the difference excludes 0)."
    )
    assert describe_hybrid_wins(paired_comparisons(wins, "RMSE"), "RMSE").startswith(
        "In RMSE the hybrid beats every one"
    )
    assert "beats 1 of 2 other models" in describe_hybrid_wins(
        paired_comparisons(loses, "NDCG@20"), "NDCG@20"
    ) and describe_hybrid_wins(paired_comparisons(loses, "NDCG@20"), "NDCG@20").endswith(
        "it loses to ease."
    )
    assert describe_hybrid_wins(paired_comparisons(ties, "NDCG@20"), "NDCG@20").endswith(
        "beats 1 of 2 other models (the 95 % interval of the difference excludes 0); it cannot be told apart from ease."
    )
    only = records_of([("hybrid", 0.3, 0.02), ("ease", 0.2, 0.02, 0.1, 0.02, 0.001)])
    assert "beats the only other model" in describe_hybrid_wins(
        paired_comparisons(only, "NDCG@20"), "NDCG@20"
    )
    none = records_of([("hybrid", 0.3, 0.02), ("ease", 0.4, 0.02, -0.1, 0.02, 0.001)])
    assert (
        describe_hybrid_wins(paired_comparisons(none, "NDCG@20"), "NDCG@20")
        == "In NDCG@20 the hybrid beats none of 1 other model (the 95 % interval of the difference excludes 0); it loses to ease."
    )
    few = records_of([("hybrid", 0.3, None), ("ease", 0.2, None, 0.1, None, None)])
    assert "cannot be told apart from ease" in describe_hybrid_wins(
        paired_comparisons(few, "NDCG@20"), "NDCG@20"
    ) and "beats none" in describe_hybrid_wins(paired_comparisons(few, "NDCG@20"), "NDCG@20")


def test_an_interval_that_ends_at_nought_does_not_exclude_it():
    edge = records_of([("hybrid", 0.3, 0.02), ("ease", 0.2, 0.02, 0.25, 0.25, 0.04)])
    assert (
        paired_comparisons(edge, "NDCG@20")["lo"].item() == 0
        and paired_comparisons(edge, "NDCG@20")["significant"].item() == 0
    )


def test_more_claims_are_corrected():
    many = records_of(
        [("hybrid", 0.3, 0.02), *[(f"m{i}", 0.2, 0.02, 0.1, 0.05, 0.02) for i in range(4)]],
        group=("warm",),
    )
    rows = paired_comparisons(many, "NDCG@20", "warm")
    assert (
        rows["significant"].to_list() == [1] * 4 and rows["significant_holm"].to_list() == [0] * 4
    )
    assert (
        "beats none of 4 other models (after Holm's correction for 4 claims)"
        in describe_hybrid_wins(rows, "NDCG@20", "significant_holm", "for warm users")
    )


def test_the_sign_of_errors_and_of_lists():
    both = records_of(
        [("hybrid", 0.3, 0.01), ("a", 0.2, 0.01, 0.1, 0.01, 0.001)],
        [("hybrid", 1.0, 0.01), ("a", 0.9, 0.01, 0.1, 0.01, 0.001)],
    )
    assert (
        paired_comparisons(both, "NDCG@20")["significant"].item() == 1
        and paired_comparisons(both, "RMSE")["significant"].item() == -1
    )
    assert leaderboard_table(both, "NDCG@20")["so it is"].to_list() == [
        None,
        "beaten",
    ] and leaderboard_table(both, "RMSE")["so it is"].to_list() == ["beats the hybrid", None]
    assert leaderboard_table(both, "RMSE")["model"].to_list() == ["a", "hybrid"]


def test_lists_by_stars_in_words():
    assert (
        "worth less, 33% of it (the interval of the difference excludes 0)"
        in describe_rating_sort(wins)
    )
    better = records_of(
        [("wide-deep", 0.4, 0.02, -0.1, 0.02, 0.001), ("hybrid", 0.3, 0.02)],
        [("wide-deep", 1.0, 0.1)],
    )
    assert (
        "stars are the better guide" in describe_rating_sort(better)
        and describe_rating_sort(ties) == ""
    )
    level = records_of(
        [("wide-deep", 0.3, 0.02, 0.0, 0.02, 0.9), ("hybrid", 0.3, 0.02)], [("wide-deep", 1.0, 0.1)]
    )
    assert "cannot be told apart" in describe_rating_sort(level)
    assert (
        describe_rating_sort(
            records_of([("wide-deep", 0.4, 0.02, -0.1, 0.02, 0.001), ("hybrid", 0.3, 0.02)])
        )
        == ""
    )  # trained for lists, no stars


def test_parts_in_words():
    def part(w, v, p, metric="NDCG@20"):
        return {"removed": w, "metric": metric, "value": v, "p": p}

    assert (
        describe_ablation(
            [
                part("a", 0.1, 0.001),
                part("b", 0.001, 0.5),
                part("c", -0.1, 0.001),
                part("wide-alone", 1, 0.001),
            ],
            "NDCG@20",
        )
        == "In NDCG@20, of the hybrid's parts: it needs a; b could go without a loss that can be shown; without c it would be better (Holm's correction for 3 claims)."
    )
    assert (
        "it needs a" in describe_ablation([part("a", -0.1, 0.001, "RMSE")], "RMSE")
        and describe_ablation([], "RMSE")
        == describe_ablation([part("wide-alone", 1, 0.001)], "NDCG@20")
        == ""
    )
    assert "could go" in describe_ablation([part("a", 0.1, None)], "NDCG@20")


def test_names_in_a_sentence():
    assert (
        join_names([]) == ""
        and join_names(["a"]) == "a"
        and join_names(list("abcdef")) == "a, b, c, d, e and f"
        and join_names(list("abcdefgh")) == "a, b, c, d, e and 3 others"
    )


def test_ten_lines_follow_the_numbers():
    def said(records, **how):
        return takeaways(records, notes_of(records, **how))

    lines = said(wins)
    assert (
        lines[0]
        == "If everybody gets lists from one model, use hybrid: it did better than all others, and that was no accident."
        and any("strangers, use hybrid" in line for line in lines)
    )
    assert any("a gain that is worth having" in line for line in lines) and any(
        "Do not sort lists by predicted stars: that is worth 33%" in line for line in lines
    )
    assert "use ease: it did better" in said(loses)[0]
    assert (
        said(ties)[0]
        == "If everybody gets lists from one model, use hybrid; ease may be as good, and is quicker."
    )
    assert any(
        "has a minute, use ease: it learns in" in line and "worth 97% of the best" in line
        for line in said(ties, slow=("hybrid",))
    )
    assert any(
        "Nothing here learns within a minute; the quickest is" in line
        for line in said(ties, slow=("hybrid", "ease", "popularity"))
    )
    level = records_of([("hybrid", 0.3, 0.02), ("popularity", 0.29, 0.02, 0.01, 0.02, 0.4)])
    assert "show what sells (popularity)" in said(level)[0]
    luck = records_of([("hybrid", 0.021, 0.01), ("mean", 0.02, 0.01, 0.001, 0.01, 0.9)])
    assert any("cannot be told from lists drawn by lot" in line for line in said(luck))
    few = records_of([("hybrid", 0.3, None), ("ease", 0.2, None, 0.1, None, None)], n=3)
    assert any("too few to say how sure" in line for line in said(few)) and not any(
        "no accident" in line for line in said(few)
    )


@pytest.mark.parametrize(
    "records",
    [
        wins,
        loses,
        ties,
        wins[:0],
        wins.filter(metric="RMSE"),
        wins.filter(model="hybrid"),
        wins.filter(pl.col("model") != "hybrid"),
        records_of([("hybrid", 0.0, 0.0), ("ease", 0.0, 0.0, 0.0, 0.0, 1.0)]),
    ],
    ids=[
        "wins",
        "loses",
        "ties",
        "nothing",
        "stars only",
        "hybrid only",
        "no hybrid",
        "all at nought",
    ],
)
def test_ten_lines_are_at_most_ten_and_never_none(records):
    for notes in (
        notes_of(records),
        notes_of(records) | {"random_ndcg": None, "plans": [], "fits": []},
    ):
        lines = takeaways(records, notes)
        assert 0 < len(lines) <= 10 and all(
            re.fullmatch(r"[A-Z].+\.", line) and "nan" not in line and "None" not in line
            for line in lines
        )


def test_all_that_can_be_said_fits_into_ten_lines():
    full = pl.concat(
        [
            wins,
            wins.filter(metric="NDCG@20").with_columns(metric=pl.lit("HitRate@20")),
            wins.filter(metric="RMSE").with_columns(metric=pl.lit("MAE")),
        ]
    )
    lines = takeaways(full, notes_of(full))
    assert len(lines) == len(set(lines)) == 10 and any(
        line
        == "Of 100 people who are shown 20 things by hybrid, about 30 find something that they go on to take."
        for line in lines
    )


def test_a_lead_that_few_share():
    assert (
        statistical_ties(wins, "NDCG@20") == ["hybrid"]
        and statistical_ties(loses, "NDCG@20") == ["ease"]
        and statistical_ties(ties, "NDCG@20") == ["hybrid", "ease"]
        and statistical_ties(wins[:0], "NDCG@20") == []
    )


def test_forests():
    fig = plot_forest(paired_comparisons(loses, "NDCG@20"), "NDCG@20")
    assert [t.get_text() for t in fig.axes[0].get_yticklabels()] == [
        "popularity",
        "ease",
    ] and "right of 0" in fig.axes[0].get_xlabel()
    assert "left of 0" in plot_forest(paired_comparisons(wins, "RMSE"), "RMSE").axes[0].get_xlabel()
    assert (
        len(
            plot_forest_by_group(
                {g: paired_comparisons(wins, "NDCG@20", g) for g in ("warm", "cold")}, "NDCG@20"
            ).axes
        )
        == 2
    )
