"Check drift alarms, staleness, incremental updates and the dashboard."

import json
import os
import random
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from scipy.stats import binomtest, ks_2samp

from widedeep_nb.data import load
from widedeep_nb.evaluation import ndcg
from widedeep_nb.lib import content_features, two_tower, wide_deep
from widedeep_nb.lib.ab_statistics import PRIMARY_OUTCOME
from widedeep_nb.lib.backtests import (
    BACKTEST_MODELS,
    backtest_once,
    full_eval_task,
    split_at_age,
    split_at_period,
    top_k_with_scores,
)
from widedeep_nb.lib.content_features import add_catalog
from widedeep_nb.lib.core import PROTOCOLS, Split, UserError, to_interactions
from widedeep_nb.lib.dashboard import (
    acceptance_rates,
    dashboard,
    experiment_panel,
    health_panel,
    latency_quantile,
    read_feedback,
    scrape_metrics,
)
from widedeep_nb.lib.drift import (
    DRIFT_SCENARIOS,
    FALSE_ALARM_RATE,
    MonitoredFeature,
    make_period_grid,
)
from widedeep_nb.lib.eval_tasks import hit_matrix
from widedeep_nb.lib.feedback import FeedbackStore, write_feedback
from widedeep_nb.lib.increments import append
from widedeep_nb.lib.monitoring_plots import (
    describe_drift,
    describe_output_drift,
    describe_staleness,
    monitoring_in_short,
)
from widedeep_nb.lib.recommender import load_recommender, make_recommender
from widedeep_nb.lib.runs import Run, current_run
from widedeep_nb.lib.server import open_service
from widedeep_nb.lib.service_schemas import FeedbackEvent, RecommendRequest
from widedeep_nb.lib.update_report import describe_warm_start, updates_in_short
from widedeep_nb.monitoring import (
    backtest,
    conformal_alarm,
    detect_drift,
    distribution_distance,
    drift_calibration_trial,
    output_drift_report,
    reference_distances,
    run_drift,
    staleness_curve,
)
from widedeep_nb.preprocessing import drop_undated, preprocess, sort_by_time, training_events
from widedeep_nb.updates import (
    align_events,
    compare_update_modes,
    compare_warm_start,
    daily_changes,
    evaluate_per_user,
    update_model,
)

ROOT = Path(__file__).parents[1]
PLAN = {
    "ranking": {"popularity": 0.3, "neighbors, recency-weighted": 0.4, "self-attention": 0.3},
    "rating": {"ridge": 0.5, "network 1": 0.5},
    "epochs": {"self-attention": 1, "network 1": 1},
}
DAY = 86_400_000


# --- drift


def test_distances_against_scipy():
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 9, 300), rng.integers(2, 9, 200)
    p, q = [np.bincount(x, minlength=9).astype(float) for x in (a, b)]
    distance, score = distribution_distance(p, q, "ordinal")
    assert np.isclose(distance, ks_2samp(a, b).statistic) and np.isclose(
        score, distance * (300 * 200 / 500) ** 0.5
    )
    r, s = p / 300, q / 200
    m = (r + s) / 2

    def kl(x):
        return np.sum(x[x > 0] * np.log(x[x > 0] / m[x > 0]))

    assert np.isclose(distribution_distance(p, q, "nominal")[0], ((kl(r) + kl(s)) / 2) ** 0.5)


def test_periods_are_compared_with_what_lay_before_the_gap():
    "Check that lag 2 of period 5 is compared with the window that ends at period 3."
    counts = np.random.default_rng(0).integers(1, 50, (8, 3)).astype(float)
    distance = reference_distances(MonitoredFeature("nominal", counts), 2, 3)[0]
    assert np.isclose(
        distance[5, 1], distribution_distance(counts[5], counts[2] + counts[3], "nominal")[0]
    )
    assert np.isnan(distance[2, 1]) and not np.isnan(distance[3, 1])


def test_alarm_has_its_nominal_rate_without_drift():
    "Check the rate on dependent series with heavy tails."
    rng, hits = np.random.default_rng(0), 0
    for _ in range(2000):
        shared = rng.standard_t(2, (1, 61, 1))
        hits += conformal_alarm(
            shared + rng.standard_t(2, (4, 61, 1)), np.array([True, False, True, False]), 59, 1
        ).alarm
    assert binomtest(hits, 2000, 3 / 61).pvalue > 0.05


@pytest.mark.parametrize("n", [30, pytest.param(300, marks=pytest.mark.long)])
def test_false_alarms_and_detection_of_injected_drift(n):
    trials = [drift_calibration_trial(5000 + i) for i in range(n)]
    assert all(t["n_reference"] >= 19 for t in trials)
    alarms = sum(t["alarm"] for t in trials)
    assert binomtest(alarms, n, FALSE_ALARM_RATE).pvalue > 0.05, alarms
    for scenario in DRIFT_SCENARIOS:
        found = [t["delays"][scenario] for t in trials]
        assert sum(d is not None for d in found) >= 0.9 * n, (
            scenario,
            found,
        )  # within three periods


def test_seasons_give_no_alarm_and_new_peaks_do():
    rng = np.random.default_rng(0)

    def shop(last_december):
        frames = []
        for m in range(132):
            start = datetime(2010 + m // 12, m % 12 + 1, 1)
            december = m % 12 == 11
            toys = 0.5 if december and (last_december or m < 120) else 0.1
            frames.append(
                pl.DataFrame(
                    {
                        "user": rng.integers(0, 300, 600).astype(str),
                        "item": np.where(rng.random(600) < toys, "toy", "book"),
                        "rating": rng.integers(1, 6, 600),
                        "timestamp": [
                            start + timedelta(hours=h) for h in rng.integers(0, 672, 600).tolist()
                        ],
                    }
                )
            )
        return to_interactions(pl.concat(frames))

    items = pl.DataFrame({"item": ["toy", "book"], "category": ["Toys", "Books"]})
    usual = detect_drift(shop(True), items, datetime(2020, 11, 20), unit="1mo")["periods"][-1]
    june = detect_drift(
        shop(True).with_columns(
            item=pl.when(pl.col("timestamp") >= datetime(2020, 12, 1))
            .then(pl.lit("toy"))
            .otherwise("item")
        ),
        items,
        datetime(2020, 11, 20),
        unit="1mo",
    )["periods"][-1]
    assert (
        usual["start"][:7] == june["start"][:7] == "2020-12"
        and not usual["alarm"]
        and june["alarm"]
    )


@pytest.mark.parametrize(
    "columns", [["user", "item"], ["user", "item", "timestamp"], ["user", "item", "rating"]]
)
def test_logs_with_few_columns_are_handled(columns):
    log = to_interactions(load("demo?ratings=2000").interactions.select(columns))
    if "timestamp" not in columns:
        with pytest.raises(UserError, match="no time"):
            detect_drift(log, pl.DataFrame({"item": ["A"]}), datetime(2020, 1, 1))
        return
    found = detect_drift(log, log.select("item").unique(), datetime(2023, 1, 1))
    assert found["features"] == ["activity", "new users", "new items"] and describe_drift(found)


def test_two_dates_have_no_period_to_compare():
    times = [datetime(2024, 1, 1), datetime(2024, 2, 10)] * 45
    log = pl.DataFrame({"user": list("abc") * 30, "item": list("xyz") * 30, "timestamp": times})
    with pytest.raises(UserError, match="no period of this log"):
        detect_drift(to_interactions(log), log.select("item").unique(), datetime(2024, 2, 10))


def test_short_past_gives_no_alarm():
    log = to_interactions(
        pl.DataFrame(
            {
                "user": list("abcd") * 50,
                "item": list("xyyx") * 50,
                "timestamp": [datetime(2024, 1, 1) + timedelta(days=d) for d in range(200)],
            }
        )
    )
    found = detect_drift(log, log.select("item").unique(), datetime(2024, 5, 1), unit="1mo")
    assert not any(r["alarm"] for r in found["periods"]) and "19 are needed" in describe_drift(
        found
    )


# --- staleness


def test_backtest_never_learns_from_the_future():
    rows = sort_by_time(drop_undated(training_events(load("demo?ratings=3000").interactions)))
    calendar = make_period_grid(rows["timestamp"], unit="1q")
    period, end = calendar.period_index(rows["timestamp"]), 50
    split, test_period = split_at_period(rows, period, end, 55, PROTOCOLS["strict"])
    for t in (51, 53):
        now = split_at_age(split, test_period, t)
        assert calendar.period_index(now.train["timestamp"]).max() <= end and set(
            calendar.period_index(now.test["timestamp"])
        ) == {t}
        assert (
            calendar.period_index(now.rows_before("test")["timestamp"]).max() == t - 1
            and len(now.rows_before("test")) == (period < t).sum()
        )


def test_items_unknown_to_the_model_count_as_missed():
    rows = to_interactions(
        pl.DataFrame(
            {
                "user": list("abab") + ["a", "a"],
                "item": list("xyzz") + ["y", "new"],
                "timestamp": range(1, 7),
            }
        )
    )
    split, test_period = split_at_period(
        rows, np.array([0, 0, 0, 0, 1, 1]), 0, 1, PROTOCOLS["given"]
    )
    task = full_eval_task(split_at_age(split, test_period, 1), 100)
    model = make_recommender("popularity").fit(split)
    value, codes = top_k_with_scores(model, task)
    hits, to_find = hit_matrix(codes, task)
    assert to_find.tolist() == [2] and hits.sum() == 1 and 0 < ndcg(hits, to_find, 20)[0] < 1


@pytest.mark.long
def test_backtest_on_a_real_log(shared):
    "Check that neighbours and popularity lose quality with age on ciao."
    rows = sort_by_time(drop_undated(training_events(load(shared / "ciao").interactions)))
    calendar = make_period_grid(rows["timestamp"], unit="1mo")
    period, n = calendar.period_index(rows["timestamp"]), len(calendar.period_starts)
    rows, period = rows.filter(period < n), period[period < n]
    users = pl.DataFrame(
        [
            row
            for end in range(n - 24, n - 1, 1)
            for row in backtest_once(rows, period, end, n - 1, PROTOCOLS["strict"], 200)["users"]
        ]
    )
    found = {(r["model"], r["age"]): r for r in staleness_curve(users)}
    assert (
        found["wide-neighbours", 12]["more_hi"] < 0
        and found["recent-popularity", 12]["more_hi"] < 0
    )


@pytest.mark.parametrize(
    "columns",
    [
        ["user", "item"],
        pytest.param(["user", "item", "timestamp"], marks=pytest.mark.long),
        pytest.param(["user", "item", "rating"], marks=pytest.mark.long),
    ],
    ids=["ids only", "no ratings", "no times"],
)
def test_chapter_runs_on_logs_with_few_columns(tmp_path, columns):
    load("demo?ratings=2000").interactions.filter(pl.col("rating").is_not_null()).select(
        columns
    ).write_csv(tmp_path / "log.csv")
    run = Run(
        tmp_path / "run",
        dataset=str(tmp_path / "log.csv"),
        parameters={"seeds": 1, "epochs": 1, "tune": False, "time_budget_min": 0.02},
    )
    for step in (run_drift, backtest, compare_warm_start):
        step(run)
    texts = [
        describe_drift(run.read("drift.json")),
        describe_staleness(run.read("replay.json")),
        describe_output_drift(run.read("replay.json")),
        describe_warm_start(run.read("catchup.json")),
    ]
    assert all(texts) and ("no time" in texts[0]) == ("timestamp" not in columns)
    assert dashboard(run).read_text().count("<section") == 6
    days = daily_changes(align_events(run.read("interactions.parquet")))
    assert days["events"].sum() > 0 and days["events"].min() > 0
    for sentences in (
        monitoring_in_short(run.read("drift.json"), run.read("replay.json")),
        updates_in_short(days, run.read("catchup.json")),
    ):
        well_formed(sentences)


def well_formed(sentences):
    "Check sentences for a reader who sees nothing else."
    told = [sentence for sentence in sentences if sentence]
    assert 2 <= len(told) <= 5
    for sentence in told:
        assert sentence.endswith(".") and not re.search(r"nan|None|\(\)|`|_", sentence), sentence


def drift_results(alarm, n_alarms):
    "Return drift.json with one period since training, and twenty trials."
    row = {"trained": False, "alarm": alarm, "threshold": 3.0}
    row["z"] = {"prices": 4.0 if alarm else 1.0, "ratings": None}
    trials = [{"alarm": i < n_alarms, "delays": {"prices rise": 1}} for i in range(20)]
    found = {"unit": "month", "rate": 0.05, "features": ["prices", "ratings"], "periods": [row]}
    return found | {"before": {"alarms": 0, "periods": 0}, "trials": trials}


def aging_results(change):
    "Return replay.json of a model that changes by some NDCG@20 in three months."
    rows = []
    for age, more in ((1, 0.0), (3, change)):
        row = {"model": BACKTEST_MODELS[-1], "age": age, "n": 90, "value": 0.2 + more}
        row |= {
            "lo": 0.1,
            "hi": 0.3,
            "more": more,
            "more_lo": more - 0.001,
            "more_hi": more + 0.001,
        }
        rows.append(row)
    return {"unit": "month", "ages": rows}


def test_monitoring_in_short_follows_the_run():
    "Check that the sentences say the opposite where the run does."
    moved = monitoring_in_short(drift_results(True, 1), aging_results(-0.02))
    quiet = monitoring_in_short(drift_results(False, 4), aging_results(0.0))
    nothing = monitoring_in_short({"reason": "no times"}, {"reason": "too short"})
    for sentences in (moved, quiet, nothing):
        well_formed(sentences)
    assert all(a != b for a, b in zip(moved, quiet))
    missed = {"injected": {"prices rise": {"after": None, "by": None}}}
    told = monitoring_in_short(drift_results(False, 1) | missed, aging_results(0.0))[1]
    assert "on this log it found 0 of 1" in told and "20 of 20" in told
    assert "prices" in moved[0] and "lost 10" in moved[2] and "as when it was new" in quiet[2]


def test_updates_in_short_follows_the_run():
    "Check the sentences of a good and a poor update, and of none."
    days = pl.DataFrame({"day": [1, 2], "events": [9, 3], "new users": [1, 0], "new items": [0, 2]})

    def compared(ndcg, rmse, seconds):
        rows = [
            {"metric": "NDCG@20", "non_inferior": ndcg},
            {"metric": "RMSE", "non_inferior": rmse},
        ]
        rows[0]["seconds"] = {"warm_start": seconds, "retrained": 10.0}
        return {"new": 50, "metrics": rows}

    texts = [
        updates_in_short(days, results)
        for results in (
            compared(True, True, 1.0),
            compared(False, None, 20.0),
            compared(True, False, 2.0),
            {"reason": "no events after training"},
        )
    ]
    for sentences in texts:
        well_formed(sentences)
    assert len({sentences[-1] for sentences in texts}) == 4
    assert "update every day" in texts[0][2] and "train again" in texts[1][2]


# --- incremental updates


@pytest.fixture(scope="module")
def base_run(tmp_path_factory):
    "A run whose log ends 300 events early, and three files with them; the second has a new user and item."
    place = tmp_path_factory.mktemp("append")
    shop = load("demo?ratings=2500")
    log = shop.interactions
    (place / "log").mkdir()

    def write(rows, name):
        return rows.with_columns(pl.col("timestamp").dt.epoch("ms")).write_csv(place / name)

    write(log[:-300], "log/ratings.csv")
    shop.items.write_csv(place / "log/items.csv")
    shop.users.write_csv(place / "log/users.csv")
    run = Run(place / "run", dataset=str(place / "log"))
    preprocess(run)
    rated = training_events(run.read("interactions.parquet"))
    split = add_catalog(
        Split.from_frames(
            rated,
            rated.clear(),
            rated.clear(),
            items=shop.items,
            users=shop.users,
            protocol=PROTOCOLS["given"],
        ),
        shop.items,
    )
    for name, params in (("hybrid", {"plan": PLAN}), ("popularity", {})):
        make_recommender(name, **params).fit(split).save(run.model_folder(name))
    popular = rated["item"].value_counts(sort=True)["item"][:6].to_list()
    new = pl.DataFrame(
        {
            "user": ["New user"] * 7,
            "item": ["Thing", *popular],
            "rating": [5.0, 4.0, 3.0, 4.0, 5.0, 4.0, 2.0],
        }
    )
    new = to_interactions(new.with_columns(timestamp=log["timestamp"][-150])).with_columns(
        event=pl.lit("rating").cast(log.schema["event"])
    )
    for name, rows in zip(
        ("one", "two", "three"), (log[-300:-200], pl.concat([log[-200:-100], new]), log[-100:])
    ):
        write(rows, f"{name}.csv")
    write(pl.concat([log[-300:], new]).sort("timestamp"), "all.csv")
    return run.folder


@pytest.fixture
def run(base_run, tmp_path):
    shutil.copytree(base_run, tmp_path / "run")
    return Run(tmp_path / "run")


def state_of(folder):
    "Read every visible file of a run."
    files = [
        p
        for p in Path(folder).rglob("*")
        if p.is_file() and not any(part.startswith(".") for part in p.relative_to(folder).parts)
    ]
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


def updated_state(run):
    "Return the log and the model weights of the last update."
    folder = current_run(run.folder)
    models = {
        name: load_recommender(folder / "models/released" / name)._state()
        for name in ("hybrid", "popularity")
    }
    return pl.read_parquet(folder / "interactions.parquet"), models


def test_order_of_arrival_does_not_matter(base_run, run, tmp_path):
    summary = {
        name: append(run, base_run.parent / f"{name}.csv", epochs=1)
        for name in ("three", "one", "two", "one")
    }
    assert summary["one"]["new"] == 0 or summary["one"]["repeated"] > 0
    assert (
        summary["two"]["new users"] == 1
        and summary["two"]["new items"] == 1
        and summary["two"]["late"] > 0
    )
    shutil.copytree(base_run, tmp_path / "other")
    append(Run(tmp_path / "other"), base_run.parent / "all.csv", epochs=1)
    (log, models), (other_log, other_models) = (
        updated_state(run),
        updated_state(Run(tmp_path / "other")),
    )
    assert log.equals(other_log) and len(log) > len(run.read("interactions.parquet"))
    for name in models:
        assert models[name].keys() == other_models[name].keys() and all(
            torch.equal(v, other_models[name][k]) for k, v in models[name].items()
        ), name


def test_files_of_the_report_do_not_change(base_run, run):
    was = state_of(run.folder)
    append(run, base_run.parent / "one.csv", epochs=1)
    now = state_of(run.folder)
    assert {k: now[k] for k in was} == was and {
        k.split("/")[0] for k in now.keys() - was.keys()
    } == {"events", "live.json"}


def test_repeated_rows_count_once_and_newer_ratings_win(run, tmp_path):
    log = run.read("interactions.parquet")
    pair = log.filter(pl.col("rating").is_not_null())[-1]
    pl.concat([pair, pair, log[:50]]).write_parquet(tmp_path / "again.parquet")
    pl.concat(
        [
            pair.with_columns(
                rating=pl.lit(1.0).cast(pl.Float32),
                timestamp=pl.col("timestamp") - pl.duration(days=900),
            ),
            log[:50],
        ]
    ).write_parquet(tmp_path / "older.parquet")
    assert append(run, tmp_path / "again.parquet", models=("popularity",))["new"] == 0
    summary = append(run, tmp_path / "older.parquet", models=("popularity",))
    after = pl.read_parquet(current_run(run.folder) / "interactions.parquet")
    found = after.filter(pl.col("rating").is_not_null(), user=pair["user"][0], item=pair["item"][0])
    assert (
        summary["new"] == summary["late"] == 1
        and len(found) == 1
        and found["rating"].to_list() == pair["rating"].to_list()
        and found["timestamp"].to_list() == pair["timestamp"].to_list()
    )


def test_popularity_and_features_are_updated(base_run, run):
    append(run, base_run.parent / "two.csv", epochs=1)
    folder = current_run(run.folder)
    model, hybrid = (
        load_recommender(folder / "models/released/popularity"),
        load_recommender(folder / "models/released/hybrid"),
    )
    rows = training_events(pl.read_parquet(folder / "interactions.parquet"))
    log = pl.read_parquet(folder / "interactions.parquet")
    known = log.filter(pl.col("user").is_in(model.user_ids.implode()), item=model.item_ids[3])
    weights = {"rating": 1.0} | model.event_weights
    event_weight = known["event"].cast(pl.String).replace_strict(weights, default=0.0)
    by_user = known.with_columns(weight=event_weight).group_by("user").agg(pl.col("weight").sum())
    assert model.weight[3] == pytest.approx(by_user["weight"].clip(upper_bound=1).sum(), rel=1e-5)
    assert (
        "New user" in hybrid.user_ids
        and len(hybrid.train_history.item) == len(model.train_history.item) > 0
    )
    snap = hybrid.models["network 1"].feature_state
    assert int(snap.time_range[1]) == rows["timestamp"].to_physical().max()


def test_warm_start_begins_with_the_trained_weights(base_run, run, monkeypatch):
    "Check the weights before the first epoch; a new user has those of unknown users."
    monkeypatch.setattr(wide_deep, "train_loop", lambda net, *args, **options: (net.eval(), []))
    old = load_recommender(run.model_folder("hybrid")).models["network 1"]
    rows = training_events(run.read("interactions.parquet"))
    more = to_interactions(
        pl.DataFrame(
            {
                "user": ["New user"] * 3,
                "item": old.item_ids[:3].to_list(),
                "rating": [3.0, 4.0, 5.0],
                "timestamp": [rows["timestamp"].max()] * 3,
            }
        )
    )
    split = Split.from_frames(
        pl.concat([rows.select(more.columns), more]),
        more.clear(),
        more.clear(),
        items=run.read("items.parquet"),
        protocol=PROTOCOLS["given"],
    )
    new = update_model(old, split)

    def code(ids, name):
        return ids.to_list().index(name)

    for user in old.user_ids[:5]:
        a, b = [m.net.wide.user.weight[code(m.user_ids, user)] for m in (old, new)]
        assert torch.equal(a, b)
        a, b = [m.net.deep.user.weight[code(m.user_ids, user)] for m in (old, new)]
        assert torch.equal(a, b)
    for item in old.item_ids[:5]:
        assert torch.equal(*[m.net.deep.item.weight[code(m.item_ids, item)] for m in (old, new)])
    assert torch.equal(
        new.net.deep.user.weight[code(new.user_ids, "New user")], old.net.deep.user.weight[-1]
    )


def test_content_warm_start_rotates_the_text_features(monkeypatch):
    "Check that scores are unchanged before the first epoch when items move and a new one comes."
    shop = load("demo?ratings=2500")
    rows = training_events(shop.interactions)

    def split(log, items):
        return add_catalog(
            Split.from_frames(
                log,
                log.clear(),
                log.clear(),
                items=items,
                users=shop.users,
                protocol=PROTOCOLS["given"],
            ),
            items,
            shop.users,
        )

    old = make_recommender("content-towers", epochs=2).fit(split(rows, shop.items))
    monkeypatch.setattr(two_tower, "train_two_tower", lambda self, validate: self.net.eval() and [])
    words, width = content_features.tfidf_vectors, old.item_features.vectors["text"].shape[1]
    turn = torch.linalg.qr(torch.randn(width, width, generator=torch.Generator().manual_seed(0)))[0]
    monkeypatch.setattr(content_features, "tfidf_vectors", lambda *given: words(*given) @ turn)
    more = rows.filter(item=rows["item"].mode()[0])[:40].with_columns(
        item=old.item_ids[-1] + pl.lit(""), user=rows["user"].unique().sort()[:40]
    )
    new = update_model(old, split(pl.concat([rows, more]), shop.items.reverse()))
    first_users = old.user_ids[:50].to_list()

    def scores(model):
        users, items = [
            torch.tensor([{u: i for i, u in enumerate(ids)}[x] for x in selected])
            for ids, selected in (
                (model.user_ids, first_users),
                (model.item_ids, old.item_ids.to_list()),
            )
        ]
        history = old.train_history.select(torch.arange(50))
        return model.scores(
            users, history if model is old else replace(history, item=items[history.item]), items
        )

    assert new.item_ids.to_list() != old.item_ids.to_list()
    assert (scores(old) - scores(new)).abs().mean() < 0.01 * scores(old).std()


@pytest.mark.long
def test_warm_start_is_non_inferior_to_retraining():
    "Check the stated margins on a demo shop."
    shop = load("demo?ratings=20000")
    rows = sort_by_time(drop_undated(training_events(shop.interactions)))
    known, new, later = rows[:17_000], rows[17_000:18_000], rows[18_000:]

    def split(log, test, aside=None):
        return add_catalog(
            Split.from_frames(
                log, log.clear(), test, shop.users, shop.items, PROTOCOLS["given"], aside
            ),
            shop.items,
            shop.users,
        )

    plan = {
        "ranking": {
            "neighbors, recency-weighted": 0.4,
            "self-attention": 0.2,
            "content towers": 0.4,
        },
        "cold_items": {"content towers": 1.0},
        "rating": {"ridge": 0.3, "network 1": 0.7},
        "epochs": {"self-attention": 15, "content towers": 7, "network 1": 15},
    }
    now, base = (
        split(pl.concat([known, new]), later),
        make_recommender("hybrid", plan=plan).fit(split(known, later)),
    )
    tables = {
        "retrained": evaluate_per_user(make_recommender("hybrid", plan=plan).fit(now), now, 5000),
        "warm_start": evaluate_per_user(update_model(base, now), now, 5000),
        "stale": evaluate_per_user(base, split(known, later, new), 5000),
    }
    found = {row["metric"]: row for row in compare_update_modes(tables, {})}
    assert found["NDCG@20"]["non_inferior"] and found["RMSE"]["non_inferior"], found


def test_updates_of_another_log_are_ignored(base_run, run):
    append(run, base_run.parent / "one.csv", models=("popularity",))
    assert current_run(run.folder) != run.folder
    run.update_manifest(data={"sha256": "another", "rows": 1})
    assert current_run(run.folder) == run.folder


@pytest.mark.parametrize(
    "text, message",
    [
        (
            "user,item,rating,timestamp\nu,A,5,1700000000\n,A,5,1700000000\n,B,4,1700000000\n",
            "faulty",
        ),
        ("user,item,rating\nu,A,5\nv,B,4\nw,C,3\n", "no time"),
        ("user,item,rating,timestamp\nu,A,1,1700000000\n", "do not look like ratings"),
        (
            "user,item,rating,timestamp\n" + "u,A,9,1700000000\nv,B,2,1700000000\n" * 9,
            "outside this run",
        ),
        ("a,b\n1,2\n", "no column|cannot|faulty|no time"),
    ],
)
def test_invalid_logs_are_refused_without_changes(run, tmp_path, text, message):
    was = state_of(run.folder)
    (tmp_path / "bad.csv").write_text(text)
    with pytest.raises(UserError, match=message):
        append(run, tmp_path / "bad.csv")
    assert state_of(run.folder) == was


def test_append_is_atomic_under_kills(base_run, run):
    "Check that a killed append leaves no trace, and that the next one succeeds."
    code = "\n".join(
        [
            "import sys",
            "from widedeep_nb.lib.runs import Run",
            "from widedeep_nb.lib.increments import append",
            "print('go', flush=True)",
            "append(Run(sys.argv[1]), sys.argv[2], epochs=1)",
        ]
    )
    rng, was, killed = random.Random(0), state_of(run.folder), 0

    def start():
        process = subprocess.Popen(
            [sys.executable, "-c", code, str(run.folder), str(base_run.parent / "one.csv")],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        process.stdout.readline()
        return process, time.monotonic()

    process, started = start()
    assert process.wait(300) == 0
    took, whole = time.monotonic() - started, updated_state(run)

    def clear():
        return [
            shutil.rmtree(p) if p.is_dir() else p.unlink()
            for p in (run.folder / "events", run.folder / "live.json")
            if p.exists()
        ]

    clear()
    while killed < 3:
        process, _ = start()
        time.sleep(rng.uniform(0.05, 0.7) * took)
        process.send_signal(signal.SIGKILL)
        process.wait()
        if (run.folder / "live.json").exists():  # it finished before the signal
            assert (
                updated_state(run)[0].equals(whole[0])
                and updated_state(run)[1].keys() == whole[1].keys()
            )
            clear()
            took /= 2
            continue
        killed += 1
        assert {
            k: v for k, v in state_of(run.folder).items() if not k.startswith("events/")
        } == was and current_run(run.folder) == run.folder
    append(run, base_run.parent / "one.csv", epochs=1)
    log, models = updated_state(run)
    assert log.equals(whole[0]) and all(
        torch.equal(v, whole[1][m][k]) for m in models for k, v in models[m].items()
    )
    assert [p for p in (run.folder / "events").iterdir() if p.name.startswith(".")] == []


def test_service_serves_the_update_it_was_started_with(base_run, run, tmp_path):
    append(run, base_run.parent / "two.csv", epochs=1)
    service = open_service(current_run(run.folder), feedback_dir=str(tmp_path))
    try:

        def asked():
            return service.answer([service.parse_request(RecommendRequest(user="New user", k=5))])[
                0
            ]

        first = asked()
        assert (
            len(first["items"]) == 5
            and "Thing" not in [i["item"] for i in first["items"]]
            and "Thing" in service.catalog.item_codes
        )
        append(run, base_run.parent / "three.csv", epochs=1)
        assert service.changed_files() == "" and [i["item"] for i in asked()["items"]] == [
            i["item"] for i in first["items"]
        ]
        other = open_service(current_run(run.folder), feedback_dir=str(tmp_path / "other"))
        assert len(other.catalog.train_history.item) > len(service.catalog.train_history.item)
        other.close()
    finally:
        service.close()


def test_feedback_of_the_service_can_be_appended(run, tmp_path):
    store = FeedbackStore(run.folder / "service/feedback.sqlite")
    items = run.read("items.parquet")["item"]
    for i in range(8):
        store.add_event(
            FeedbackEvent(
                key=str(i), user="Visitor", item=items[i], event="click" if i % 2 else "purchase"
            )
        ).result()
    store.close()
    write_feedback(run, tmp_path / "feedback.parquet")
    summary = append(run, tmp_path / "feedback.parquet", models=("popularity",))
    assert summary["new"] == 8 and summary["new users"] == 1
    assert (
        pl.read_parquet(current_run(run.folder) / "interactions.parquet")
        .filter(user="Visitor")["event"]
        .cast(pl.String)
        .sort()
        .to_list()
        == ["click"] * 4 + ["purchase"] * 4
    )


# --- the dashboard

METRICS_TEXT = """# HELP widedeep_requests_total Requests
# TYPE widedeep_requests counter
widedeep_requests_total{path="/api/recommend",status="200"} 990.0
widedeep_requests_total{path="/api/recommend",status="500"} 10.0
# TYPE widedeep_seconds histogram
widedeep_seconds_bucket{le="0.01",path="/api/recommend"} 600.0
widedeep_seconds_bucket{le="0.1",path="/api/recommend"} 991.0
widedeep_seconds_bucket{le="+Inf",path="/api/recommend"} 1000.0
widedeep_seconds_count{path="/api/recommend"} 1000.0
widedeep_seconds_sum{path="/api/recommend"} 9.0
# TYPE widedeep_waiting gauge
widedeep_waiting 3.0
# TYPE widedeep_lists_lost gauge
widedeep_lists_lost 0.0
# TYPE widedeep_model_age_seconds gauge
widedeep_model_age_seconds{model="hybrid"} 172800.0
"""


def test_health_in_numbers(tmp_path):
    (tmp_path / "m.txt").write_text(METRICS_TEXT)
    found = scrape_metrics(str(tmp_path / "m.txt"))
    assert (latency_quantile(found, 0.5), latency_quantile(found, 0.99)) == (0.01, 0.1)
    panel = health_panel(found)
    assert (
        panel.status == "ok"
        and "1,000 requests" in panel.summary
        and "10 server errors" in panel.summary
        and "2.0 days" in panel.summary
    )
    for old, new in (
        ('status="500"} 10', 'status="500"} 11'),
        ("waiting 3", "waiting 300"),
        ("lost 0", "lost 1"),
        ('le="0.1",path="/api/recommend"} 991', 'le="0.1",path="/api/recommend"} 980'),
    ):
        (tmp_path / "m.txt").write_text(METRICS_TEXT.replace(old, new))
        assert health_panel(scrape_metrics(str(tmp_path / "m.txt"))).status == "warn", old
    with pytest.raises(UserError, match="no metrics"):
        scrape_metrics(str(tmp_path / "none.txt"))
    with pytest.raises(UserError, match="no metrics"):
        scrape_metrics("http://127.0.0.1:9")


def test_metrics_of_a_real_service(base_run, run):
    from widedeep_nb.lib.app import make_app

    httpx = pytest.importorskip("httpx")
    import asyncio

    service = open_service(run.folder, feedback_dir=str(run.folder / "service"))

    async def ask():
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(make_app(service)), base_url="http://shop"
        ) as client:
            for _ in range(20):
                assert (await client.post("/api/recommend", json={"k": 3})).status_code == 200
            return (await client.get("/metrics")).text

    try:
        (run.folder / "metrics.txt").write_text(asyncio.run(ask()))
    finally:
        service.close()
    found = scrape_metrics(str(run.folder / "metrics.txt"))
    panel = health_panel(found)
    assert (
        latency_quantile(found, 0.99) is not None
        and panel.summary.startswith("20 requests")
        and "Latency: median" in panel.summary
        and len(read_feedback(run.folder / "service")[0]) == 20
    )


@pytest.fixture
def run_with_feedback(run):
    "A run with feedback of three days: half of the lists accepted, on the last day none."
    store = FeedbackStore(run.folder / "service/feedback.sqlite")
    start, items = 1_700_000_000_000 // DAY * DAY, run.read("items.parquet")["item"].to_list()
    lists = [
        (
            f"L{d}-{i}",
            start + d * DAY + i * 3_000_000 // 2,
            f"user {i % 20}",
            "hybrid",
            0,
            json.dumps(items[:5]),
            json.dumps([1.0] * 5),
        )
        for d in range(3)
        for i in range(40)
    ]
    store.log_impressions(lists)
    store.close()
    with closing(sqlite3.connect(run.folder / "service/feedback.sqlite")) as base:
        base.executemany(
            "INSERT INTO events VALUES (?, ?, ?, ?, 'click', NULL, ?)",
            [
                (f"{row[0]}!", row[1] + 1000, row[2], items[0], row[0])
                for n, row in enumerate(lists)
                if n % 2 and n < 80
            ],
        )
        base.commit()
    return run


def test_acceptance_rates(run_with_feedback):
    lists, events = read_feedback(run_with_feedback.folder / "service")
    assert acceptance_rates(lists, events, "day")["value"].to_list() == [0.5, 0.5, 0.0]
    row = acceptance_rates(lists, events, "model").row(0, named=True)
    assert np.isclose(row["value"], 1 / 3) and row["lo"] < 1 / 3 < row["hi"] and row["n"] == 120


@pytest.mark.parametrize("with_all", [False, True], ids=["a bare run", "a run with everything"])
def test_dashboard_page(run_with_feedback, fits, tmp_path, with_all):
    run = run_with_feedback
    if with_all:
        shutil.copy(write_backtest(run), run.folder / "replay.json")
        (tmp_path / "m.txt").write_text(METRICS_TEXT)
        run.write(
            "experiment.json", experiment_results(("<b>hybrid</b>", "popularity"), mismatch=1e-6)
        )
    else:
        shutil.rmtree(run.folder / "service")
    page = dashboard(run, metrics=str(tmp_path / "m.txt") if with_all else "")
    fits(page)
    text = page.read_text()
    assert (
        text.count('class="normal"') == 6
        and text.count("<section") == 6
        and "http://" not in text.replace("http://www.w3.org", "")
        and "$" not in text
    )
    if with_all:
        assert (
            "<b>hybrid" not in text
            and "&lt;b&gt;hybrid" in text
            and "check" in text
            and "so no conclusion is valid" in text
            and "1,000 requests" in text
        )
    else:
        assert (
            "No experiment has been run here" in text
            and "No list has been shown yet" in text
            and "has not been run here" in text
        )


def experiment_results(pair, mismatch=0.5, lost=0):
    "Return the results of an experiment."
    new, old = pair
    effects = [
        {"metric": metric, "value": 0.1, "lo": 0.02, "hi": 0.18, "p": 0.01, "se": 0.04}
        for metric in ("purchases per user", "purchases per visit", PRIMARY_OUTCOME)
    ]
    arms = [
        {"model": m, "users": 100, "visits": 220, "bought": n} for m, n in ((old, 40), (new, 50))
    ]
    sequence = {
        "users": [50, 200],
        "value": [0.1, 0.1],
        "lo": [-0.1, 0.01],
        "hi": [0.3, 0.2],
        "p": [0.5, 0.04],
    }
    return {
        "pair": list(pair),
        "users": {"holdout": 20},
        "lost": lost,
        "planned": {"effect": 0.05},
        "test": {
            "name": "a",
            "arms": arms,
            "mismatch": mismatch,
            "crossed": 0,
            "effects": effects,
            "sequence": sequence,
        },
    }


def test_experiment_panel_states_the_decision(run_with_feedback):
    "Check the status with a valid test, a sample-ratio mismatch and lost visits."
    for options, status, text in (
        ({}, "ok", "So: use hybrid."),
        ({"mismatch": 1e-6}, "warn", "so no conclusion is valid"),
        ({"lost": 3}, "warn", "3 visits were lost"),
    ):
        run_with_feedback.write(
            "experiment.json", experiment_results(("hybrid", "popularity"), **options)
        )
        panel = experiment_panel(run_with_feedback)
        assert (
            panel.status == status
            and text in panel.summary
            and panel.table["model"].to_list() == ["popularity", "hybrid"]
            and panel.figure is not None
        )


def write_backtest(run):
    "Write a small backtest of the run's own log."
    rows = sort_by_time(drop_undated(training_events(run.read("interactions.parquet"))))
    calendar = make_period_grid(rows["timestamp"], min_rows=30)
    period, n = calendar.period_index(rows["timestamp"]), len(calendar.period_starts)
    rows, period = rows.filter(period < n), period[period < n]
    results = {
        e: backtest_once(rows, period, e, n - 1, PROTOCOLS["strict"]) for e in range(n - 30, n - 1)
    }
    users = pl.DataFrame([row for result in results.values() for row in result["users"]])
    run.write(
        "backtest.json",
        {
            "unit": calendar.name,
            "origins": len(results),
            "ages": staleness_curve(users),
            "by_period": [],
            "outputs": output_drift_report(
                {e: result["outputs"] for e, result in results.items()}, calendar, n - 3
            ),
        },
    )
    return run.folder / "backtest.json"


def test_dashboard_with_a_newer_log(run_with_feedback, tmp_path, base_run):
    log = load("demo?ratings=2500").interactions[-300:]
    log.with_columns(rating=pl.lit(1.0).cast(pl.Float32), event=pl.lit("rating")).with_columns(
        pl.col("timestamp").dt.epoch("ms"),
        pl.when(pl.int_range(pl.len()) < 5).then(5.0).otherwise("rating").alias("rating"),
    ).write_csv(tmp_path / "new.csv")
    text = dashboard(
        run_with_feedback, log=str(tmp_path / "new.csv"), output=str(tmp_path / "page.html")
    ).read_text()
    assert (
        "Input drift" in text
        and (tmp_path / "page.html").exists()
        and "Nothing has been appended" in text
    )
    append(run_with_feedback, base_run.parent / "one.csv", models=("popularity",))
    assert re.search(
        r"\d+ events have been appended since the report", dashboard(run_with_feedback).read_text()
    )
