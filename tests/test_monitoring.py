"Drift, ageing, new events and the dashboard: alarms at the stated rate, appends that are whole, pages that fit."

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

import widedeep_nb.content as content
import widedeep_nb.training as training
from widedeep_nb.content import add_catalog
from widedeep_nb.core import (
    PROTOCOLS,
    Run,
    Split,
    UserError,
    load_recommender,
    make_recommender,
    to_interactions,
)
from widedeep_nb.data import load
from widedeep_nb.evaluation import hit_matrix, ndcg
from widedeep_nb.experiment import PRIMARY_OUTCOME
from widedeep_nb.monitoring import (
    DRIFT_SCENARIOS,
    FALSE_ALARM_RATE,
    MonitoredFeature,
    acceptance_rates,
    append,
    backtest,
    backtest_once,
    compare_update_modes,
    compare_warm_start,
    conformal_alarm,
    current_run,
    dashboard,
    describe_drift,
    describe_output_drift,
    describe_staleness,
    describe_warm_start,
    detect_drift,
    distribution_distance,
    drift_calibration_trial,
    evaluate_per_user,
    experiment_panel,
    full_eval_task,
    health_panel,
    latency_quantile,
    make_period_grid,
    output_drift_report,
    read_feedback,
    reference_distances,
    run_drift,
    scrape_metrics,
    split_at_age,
    split_at_period,
    staleness_curve,
    top_k_with_scores,
    update_model,
)
from widedeep_nb.preprocessing import drop_undated, preprocess, sort_by_time, training_events
from widedeep_nb.serving import (
    FeedbackEvent,
    FeedbackStore,
    RecommendRequest,
    open_service,
    write_feedback,
)

ROOT = Path(__file__).parents[1]
PLAN = {
    "lists": {"popularity": 0.3, "newer neighbours": 0.4, "self-attention": 0.3},
    "stars": {"ridge": 0.5, "network 1": 0.5},
    "passes": {"self-attention": 1, "network 1": 1},
}
DAY = 86_400_000


# --- drift


def test_distances_against_scipy():
    draw = np.random.default_rng(0)
    a, b = draw.integers(0, 9, 300), draw.integers(2, 9, 200)
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
    "By hand: lag 2 of period 5 is compared with the window that ends at period 3."
    counts = np.random.default_rng(0).integers(1, 50, (8, 3)).astype(float)
    distance = reference_distances(MonitoredFeature("nominal", counts), 2, 3)[0]
    assert np.isclose(
        distance[5, 1], distribution_distance(counts[5], counts[2] + counts[3], "nominal")[0]
    )
    assert np.isnan(distance[2, 1]) and not np.isnan(distance[3, 1])


def test_the_alarm_has_its_rate_where_nothing_changes():
    "Series that hang together and have fat tails: any distribution will do."
    draw, hits = np.random.default_rng(0), 0
    for _ in range(2000):
        shared = draw.standard_t(2, (1, 61, 1))
        hits += conformal_alarm(
            shared + draw.standard_t(2, (4, 61, 1)), np.array([True, False, True, False]), 59, 1
        ).alarm
    assert binomtest(hits, 2000, 3 / 61).pvalue > 0.05


def some_shops(n, first=5000):
    return [drift_calibration_trial(first + i) for i in range(n)]


@pytest.mark.parametrize("n", [30, pytest.param(300, marks=pytest.mark.long)])
def test_silent_at_the_stated_rate_and_loud_on_planted_drifts(n):
    tried = some_shops(n)
    assert all(t["past"] >= 19 for t in tried)
    alarms = sum(t["alarm"] for t in tried)
    assert binomtest(alarms, n, FALSE_ALARM_RATE).pvalue > 0.05, alarms
    for kind in DRIFT_SCENARIOS:
        found = [t["delays"][kind] for t in tried]
        assert sum(d is not None for d in found) >= 0.9 * n, (kind, found)  # within three periods


def test_a_season_that_comes_back_is_no_news_and_one_that_is_new_is():
    draw, start = np.random.default_rng(0), datetime(2010, 1, 1)

    def shop(last_december):
        frames = []
        for m in range(132):
            at, december = datetime(2010 + m // 12, m % 12 + 1, 1), m % 12 == 11
            toys = 0.5 if december and (last_december or m < 120) else 0.1
            frames.append(
                pl.DataFrame(
                    {
                        "user": draw.integers(0, 300, 600).astype(str),
                        "item": np.where(draw.random(600) < toys, "toy", "book"),
                        "rating": draw.integers(1, 6, 600),
                        "timestamp": [
                            at + timedelta(hours=h) for h in draw.integers(0, 672, 600).tolist()
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
def test_poor_logs_are_told_plainly(columns):
    log = to_interactions(load("demo?ratings=2000").interactions.select(columns))
    if "timestamp" not in columns:
        with pytest.raises(UserError, match="no time"):
            detect_drift(log, pl.DataFrame({"item": ["A"]}), datetime(2020, 1, 1))
        return
    found = detect_drift(log, log.select("item").unique(), datetime(2023, 1, 1))
    assert found["inputs"] == ["activity", "unknown users", "unknown items"] and describe_drift(
        found
    )


def test_a_short_past_gives_no_alarm_and_says_so():
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


# --- quality over time


def test_the_replay_never_learns_from_the_future():
    rows = sort_by_time(drop_undated(training_events(load("demo?ratings=3000").interactions)))
    calendar = make_period_grid(rows["timestamp"], unit="1q")
    period, end = calendar.period_index(rows["timestamp"]), 50
    split, at = split_at_period(rows, period, end, 55, PROTOCOLS["strict"])
    for t in (51, 53):
        now = split_at_age(split, at, t)
        assert calendar.period_index(now.train["timestamp"]).max() <= end and set(
            calendar.period_index(now.test["timestamp"])
        ) == {t}
        assert (
            calendar.period_index(now.rows_before("test")["timestamp"]).max() == t - 1
            and len(now.rows_before("test")) == (period < t).sum()
        )


def test_what_a_model_cannot_list_counts_as_missed():
    rows = to_interactions(
        pl.DataFrame(
            {
                "user": list("abab") + ["a", "a"],
                "item": list("xyzz") + ["y", "new"],
                "timestamp": range(1, 7),
            }
        )
    )
    split, at = split_at_period(rows, np.array([0, 0, 0, 0, 1, 1]), 0, 1, PROTOCOLS["given"])
    question = full_eval_task(split_at_age(split, at, 1), 100)
    model = make_recommender("popularity").fit(split)
    value, codes = top_k_with_scores(model, question)
    hits, to_find = hit_matrix(codes, question)
    assert to_find.tolist() == [2] and hits.sum() == 1 and 0 < ndcg(hits, to_find, 20)[0] < 1


@pytest.mark.long
def test_replay_on_a_real_log(shared):
    "Neighbours and popularity age on ciao; the young model is never worse beyond chance."
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
    ids=["ids only", "no stars", "no time"],
)
def test_the_chapter_on_poor_logs(tmp_path, columns):
    load("demo?ratings=2000").interactions.filter(pl.col("rating").is_not_null()).select(
        columns
    ).write_csv(tmp_path / "log.csv")
    run = Run(
        tmp_path / "run",
        dataset=str(tmp_path / "log.csv"),
        parameters={"seeds": 1, "epochs": 1, "tune": False, "minutes": 0.02},
    )
    for step in (run_drift, backtest, compare_warm_start):
        step(run)
    told_of = [
        describe_drift(run.read("drift.json")),
        describe_staleness(run.read("replay.json")),
        describe_output_drift(run.read("replay.json")),
        describe_warm_start(run.read("catchup.json")),
    ]
    assert all(told_of) and ("no time" in told_of[0]) == ("timestamp" not in columns)
    assert dashboard(run).read_text().count("<section") == 6


# --- new events


@pytest.fixture(scope="module")
def before(tmp_path_factory):
    "A run whose log ends 300 events early, and those events in three files; the middle one holds something new."
    place = tmp_path_factory.mktemp("append")
    shop = load("demo?ratings=2500")
    log = shop.interactions
    (place / "log").mkdir()

    def write(rows, name):
        return rows.with_columns(pl.col("timestamp").dt.epoch("ms")).write_csv(place / name)

    (
        write(log[:-300], "log/ratings.csv"),
        shop.items.write_csv(place / "log/items.csv"),
        shop.users.write_csv(place / "log/users.csv"),
    )
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
    for name, how in (("hybrid", {"plan": PLAN}), ("popularity", {})):
        make_recommender(name, **how).fit(split).save(run.model_folder(name))
    most = rated["item"].value_counts(sort=True)["item"][:6].to_list()
    new = pl.DataFrame(
        {
            "user": ["Newcomer"] * 7,
            "item": ["Thing", *most],
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
def run(before, tmp_path):
    shutil.copytree(before, tmp_path / "run")
    return Run(tmp_path / "run")


def state_of(folder):
    "Everything that readers of a run see."
    files = [
        p
        for p in Path(folder).rglob("*")
        if p.is_file() and not any(part.startswith(".") for part in p.relative_to(folder).parts)
    ]
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


def learnt(run):
    "What was appended, and what was learnt from it."
    at = current_run(run.folder)
    models = {
        name: load_recommender(at / "models" / name)._state() for name in ("hybrid", "popularity")
    }
    return pl.read_parquet(at / "interactions.parquet"), models


def test_order_of_arrival_does_not_matter(before, run, tmp_path):
    told_of = {
        name: append(run, before.parent / f"{name}.csv", epochs=1)
        for name in ("three", "one", "two", "one")
    }
    assert told_of["one"]["new"] == 0 or told_of["one"]["repeated"] > 0
    assert (
        told_of["two"]["new users"] == 1
        and told_of["two"]["new items"] == 1
        and told_of["two"]["late"] > 0
    )
    shutil.copytree(before, tmp_path / "other")
    append(Run(tmp_path / "other"), before.parent / "all.csv", epochs=1)
    (log, models), (other, theirs) = learnt(run), learnt(Run(tmp_path / "other"))
    assert log.equals(other) and len(log) > len(run.read("interactions.parquet"))
    for name in models:
        assert models[name].keys() == theirs[name].keys() and all(
            torch.equal(v, theirs[name][k]) for k, v in models[name].items()
        ), name


def test_the_reports_own_files_stay(before, run):
    was = state_of(run.folder)
    append(run, before.parent / "one.csv", epochs=1)
    now = state_of(run.folder)
    assert {k: now[k] for k in was} == was and {
        k.split("/")[0] for k in now.keys() - was.keys()
    } == {"events", "live.json"}


def test_repeated_rows_count_once_and_an_older_rating_gives_way(run, tmp_path):
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
    told_of = append(run, tmp_path / "older.parquet", models=("popularity",))
    after = pl.read_parquet(current_run(run.folder) / "interactions.parquet")
    found = after.filter(pl.col("rating").is_not_null(), user=pair["user"][0], item=pair["item"][0])
    assert (
        told_of["new"] == told_of["late"] == 1
        and len(found) == 1
        and found["rating"].to_list() == pair["rating"].to_list()
        and found["timestamp"].to_list() == pair["timestamp"].to_list()
    )


def test_popularity_and_features_are_of_now(before, run):
    append(run, before.parent / "two.csv", epochs=1)
    at = current_run(run.folder)
    model, hybrid = (
        load_recommender(at / "models/popularity"),
        load_recommender(at / "models/hybrid"),
    )
    rows = training_events(pl.read_parquet(at / "interactions.parquet"))
    item = model.item_ids[3]
    assert (
        model.weight[3]
        == rows.filter(item=item)
        .filter(pl.col("user").is_in(model.user_ids.implode()))["user"]
        .n_unique()
    )
    assert (
        "Newcomer" in hybrid.user_ids
        and len(hybrid.train_history.item) == len(model.train_history.item) > 0
    )
    snap = hybrid.models["network 1"].feature_state
    assert int(snap.clock[1]) == rows["timestamp"].to_physical().max()


def test_a_network_goes_on_from_its_weights(before, run, monkeypatch):
    "Before any pass its weights are the old ones; a new person is a stranger."
    monkeypatch.setattr(training, "fit_network", lambda net, *given, **how: (net.eval(), []))
    old = load_recommender(run.model_folder("hybrid")).models["network 1"]
    rows = training_events(run.read("interactions.parquet"))
    more = to_interactions(
        pl.DataFrame(
            {
                "user": ["Newcomer"] * 3,
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

    def code(ids, of):
        return {u: i for i, u in enumerate(ids)}[of]

    for who in old.user_ids[:5]:
        a, b = [m.net.wide.user.weight[code(m.user_ids, who)] for m in (old, new)]
        assert torch.equal(a, b)
        a, b = [m.net.deep.user.weight[code(m.user_ids, who)] for m in (old, new)]
        assert torch.equal(a, b)
    for what in old.item_ids[:5]:
        assert torch.equal(*[m.net.deep.item.weight[code(m.item_ids, what)] for m in (old, new)])
    assert torch.equal(
        new.net.deep.user.weight[code(new.user_ids, "Newcomer")], old.net.deep.user.weight[-1]
    )


def test_a_network_on_words_goes_on_where_tags_and_space_are_turned(monkeypatch):
    "Products change places, a new one comes: before any pass the scores are the old ones."
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
    monkeypatch.setattr(content, "fit_content", lambda self, judge: self.net.eval() and [])
    words, width = content.tfidf_vectors, old.item_features.vectors["text"].shape[1]
    turn = torch.linalg.qr(torch.randn(width, width, generator=torch.Generator().manual_seed(0)))[0]
    monkeypatch.setattr(content, "word_vectors", lambda *given: words(*given) @ turn)
    more = rows.filter(item=rows["item"].mode()[0])[:40].with_columns(
        item=old.item_ids[-1] + pl.lit(""), user=rows["user"].unique().sort()[:40]
    )
    new = update_model(old, split(pl.concat([rows, more]), shop.items.reverse()))
    who = old.user_ids[:50].to_list()

    def scores(model):
        users, items = [
            torch.tensor([{u: i for i, u in enumerate(ids)}[x] for x in wanted])
            for ids, wanted in ((model.user_ids, who), (model.item_ids, old.item_ids.to_list()))
        ]
        had = old.train_history.select(torch.arange(50))
        return model.scores(
            users, had if model is old else replace(had, item_codes=items[had.item]), items
        )

    assert new.item_ids.to_list() != old.item_ids.to_list()
    assert (scores(old) - scores(new)).abs().mean() < 0.01 * scores(old).std()


@pytest.mark.long
def test_a_warm_start_is_as_good_as_training_anew():
    "On a demo shop, within the margins that are stated."
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
        "lists": {"newer neighbours": 0.4, "self-attention": 0.2, "content towers": 0.4},
        "newcomers": {"content towers": 1.0},
        "stars": {"ridge": 0.3, "network 1": 0.7},
        "passes": {"self-attention": 15, "content towers": 7, "network 1": 15},
    }
    now, base = (
        split(pl.concat([known, new]), later),
        make_recommender("hybrid", plan=plan).fit(split(known, later)),
    )
    tables = {
        "anew": evaluate_per_user(make_recommender("hybrid", plan=plan).fit(now), now, 5000),
        "warm": evaluate_per_user(update_model(base, now), now, 5000),
        "stale": evaluate_per_user(base, split(known, later, new), 5000),
    }
    found = {row["metric"]: row for row in compare_update_modes(tables, {})}
    assert found["NDCG@20"]["non_inferior"] and found["RMSE"]["non_inferior"], found


def test_a_run_with_another_log_leaves_aside_what_was_appended(before, run):
    append(run, before.parent / "one.csv", models=("popularity",))
    assert current_run(run.folder) != run.folder
    run.update_manifest(data={"sha256": "another", "rows": 1})
    assert current_run(run.folder) == run.folder


@pytest.mark.parametrize(
    "what, why",
    [
        (
            "user,item,rating,timestamp\nu,A,5,1700000000\n,A,5,1700000000\n,B,4,1700000000\n",
            "faulty",
        ),
        ("user,item,rating\nu,A,5\nv,B,4\nw,C,3\n", "no time"),
        ("user,item,rating,timestamp\nu,A,1,1700000000\n", "do not look like the stars"),
        (
            "user,item,rating,timestamp\n" + "u,A,9,1700000000\nv,B,2,1700000000\n" * 9,
            "beyond the stars",
        ),
        ("a,b\n1,2\n", "no column|cannot|faulty|no time"),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_is_written(run, tmp_path, what, why):
    was = state_of(run.folder)
    (tmp_path / "bad.csv").write_text(what)
    with pytest.raises(UserError, match=why):
        append(run, tmp_path / "bad.csv")
    assert state_of(run.folder) == was


def test_killed_at_random_moments(before, run):
    "An append is there whole or not at all, and what is left of a killed one is in nobody's way."
    code = "import sys; from widedeep_nb.core import Run; from widedeep_nb.monitoring import append; print('go', flush=True); append(Run(sys.argv[1]), sys.argv[2], passes=1)"
    draw, was, killed = random.Random(0), state_of(run.folder), 0

    def start():
        process = subprocess.Popen(
            [sys.executable, "-c", code, str(run.folder), str(before.parent / "one.csv")],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        process.stdout.readline()
        return process, time.monotonic()

    process, begun = start()
    assert process.wait(300) == 0
    took, whole = time.monotonic() - begun, learnt(run)

    def clear():
        return [
            shutil.rmtree(p) if p.is_dir() else p.unlink()
            for p in (run.folder / "events", run.folder / "live.json")
            if p.exists()
        ]

    clear()
    while killed < 3:
        process, _ = start()
        time.sleep(draw.uniform(0.05, 0.7) * took)
        process.send_signal(signal.SIGKILL)
        process.wait()
        if (run.folder / "live.json").exists():  # it was quicker this time, and so it is whole
            assert learnt(run)[0].equals(whole[0]) and learnt(run)[1].keys() == whole[1].keys()
            clear()
            took /= 2
            continue
        killed += 1
        assert {
            k: v for k, v in state_of(run.folder).items() if not k.startswith("events/")
        } == was and current_run(run.folder) == run.folder
    append(run, before.parent / "one.csv", epochs=1)
    log, models = learnt(run)
    assert log.equals(whole[0]) and all(
        torch.equal(v, whole[1][m][k]) for m in models for k, v in models[m].items()
    )
    assert [p for p in (run.folder / "events").iterdir() if p.name.startswith(".")] == []


def test_the_service_serves_what_was_appended_and_is_not_disturbed_by_more(before, run, tmp_path):
    append(run, before.parent / "two.csv", epochs=1)
    shop = open_service(current_run(run.folder), feedback_dir=str(tmp_path))
    try:

        def asked():
            return shop.answer([shop.parse_request(RecommendRequest(user="Newcomer", k=5))])[0]

        first = asked()
        assert (
            len(first["items"]) == 5
            and "Thing" not in [i["item"] for i in first["items"]]
            and "Thing" in shop.catalog.item
        )
        append(run, before.parent / "three.csv", epochs=1)
        assert shop.changed_files() == "" and [i["item"] for i in asked()["items"]] == [
            i["item"] for i in first["items"]
        ]
        other = open_service(current_run(run.folder), feedback_dir=str(tmp_path / "other"))
        assert len(other.catalog.train_history.item) > len(shop.catalog.train_history.item)
        other.close()
    finally:
        shop.close()


def test_feedback_of_the_service_can_be_appended(run, tmp_path):
    book = FeedbackStore(run.folder / "service/feedback.sqlite")
    items = run.read("items.parquet")["item"]
    for i in range(8):
        book.add_event(
            FeedbackEvent(
                key=str(i), user="Visitor", item=items[i], event="click" if i % 2 else "purchase"
            )
        ).result()
    book.close()
    write_feedback(run, tmp_path / "feedback.parquet")
    told_of = append(run, tmp_path / "feedback.parquet", models=("popularity",))
    assert told_of["new"] == 8 and told_of["new users"] == 1
    assert (
        pl.read_parquet(current_run(run.folder) / "interactions.parquet")
        .filter(user="Visitor")["event"]
        .cast(pl.String)
        .sort()
        .to_list()
        == ["click"] * 4 + ["purchase"] * 4
    )


# --- the dashboard

MEASURES = """# HELP widedeep_requests_total Requests
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
    (tmp_path / "m.txt").write_text(MEASURES)
    found = scrape_metrics(str(tmp_path / "m.txt"))
    assert (latency_quantile(found, 0.5), latency_quantile(found, 0.99)) == (0.01, 0.1)
    panel = health_panel(found)
    assert (
        panel.status == "ok"
        and "1,000 requests" in panel.summary
        and "10 of them" in panel.summary
        and "2.0 days" in panel.summary
    )
    for old, new in (
        ('status="500"} 10', 'status="500"} 11'),
        ("waiting 3", "waiting 300"),
        ("lost 0", "lost 1"),
        ('le="0.1",path="/api/recommend"} 991', 'le="0.1",path="/api/recommend"} 980'),
    ):
        (tmp_path / "m.txt").write_text(MEASURES.replace(old, new))
        assert health_panel(scrape_metrics(str(tmp_path / "m.txt"))).state == "warn", old
    with pytest.raises(UserError, match="no measures"):
        scrape_metrics(str(tmp_path / "none.txt"))
    with pytest.raises(UserError, match="no measures"):
        scrape_metrics("http://127.0.0.1:9")


def test_measures_of_a_real_service(before, run):
    from widedeep_nb.serving import make_app

    httpx = pytest.importorskip("httpx")
    import asyncio

    shop = open_service(run.folder, feedback_dir=str(run.folder / "service"))

    async def ask():
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(make_app(shop)), base_url="http://shop"
        ) as client:
            for _ in range(20):
                assert (await client.post("/api/recommend", json={"k": 3})).status_code == 200
            return (await client.get("/metrics")).text

    try:
        (run.folder / "said.txt").write_text(asyncio.run(ask()))
    finally:
        shop.close()
    found = scrape_metrics(str(run.folder / "said.txt"))
    panel = health_panel(found)
    assert (
        latency_quantile(found, 0.99) is not None
        and panel.summary.startswith("20 requests")
        and "lists came within" in panel.summary
        and len(read_feedback(run.folder / "service")[0]) == 20
    )


@pytest.fixture
def booked(run):
    "The run with a book of three days: of the lists of the first two days half were taken, of the last day's none."
    book = FeedbackStore(run.folder / "service/feedback.sqlite")
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
    book.log_impressions(lists)
    book.close()
    with closing(sqlite3.connect(run.folder / "service/feedback.sqlite")) as base:
        base.executemany(
            "INSERT INTO events VALUES (?, ?, ?, ?, 'click', NULL, ?)",
            [
                (f"{l[0]}!", l[1] + 1000, l[2], items[0], l[0])
                for n, l in enumerate(lists)
                if n % 2 and n < 80
            ],
        )
        base.commit()
    return run


def test_share_of_lists_taken(booked):
    lists, events = read_feedback(booked.folder / "service")
    assert acceptance_rates(lists, events, "day")["value"].to_list() == [0.5, 0.5, 0.0]
    row = acceptance_rates(lists, events, "model").row(0, named=True)
    assert np.isclose(row["value"], 1 / 3) and row["lo"] < 1 / 3 < row["hi"] and row["n"] == 120


@pytest.mark.parametrize("with_all", [False, True], ids=["a bare run", "a run with everything"])
def test_the_page(booked, fits, tmp_path, with_all):
    run = booked
    if with_all:
        shutil.copy(before_replay(run), run.folder / "replay.json")
        (tmp_path / "m.txt").write_text(MEASURES)
        run.write(
            "experiment.json", experiment_found(("<b>hybrid</b>", "popularity"), mismatch=1e-6)
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
            and "look here" in text
            and "so nothing can be said" in text
            and "1,000 requests" in text
        )
    else:
        assert (
            "No experiment has been run here" in text
            and "No list has been shown yet" in text
            and "has not been run here" in text
        )


def experiment_found(pair, mismatch=0.5, lost=0):
    "What chapter 20 leaves of an experiment."
    new, old = pair
    effects = [
        {"what": what, "value": 0.1, "lo": 0.02, "hi": 0.18, "p": 0.01, "se": 0.04}
        for what in ("purchases a person", "purchases a visit", PRIMARY_OUTCOME)
    ]
    arms = [
        {"model": m, "people": 100, "visits": 220, "bought": n} for m, n in ((old, 40), (new, 50))
    ]
    way = {
        "people": [50, 200],
        "value": [0.1, 0.1],
        "lo": [-0.1, 0.01],
        "hi": [0.3, 0.2],
        "p": [0.5, 0.04],
    }
    return {
        "pair": list(pair),
        "people": {"holdout": 20},
        "lost": lost,
        "planned": {"effect": 0.05},
        "test": {
            "name": "a",
            "arms": arms,
            "mismatch": mismatch,
            "crossed": 0,
            "effects": effects,
            "way": way,
        },
    }


def test_the_panel_of_experiments_reads_chapter_20(booked):
    "In order, unless groups are askew or visits were lost; the decision in its words."
    for how, state, says in (
        ({}, "ok", "So: use hybrid."),
        ({"mismatch": 1e-6}, "warn", "so nothing can be said"),
        ({"lost": 3}, "warn", "3 visits were lost"),
    ):
        booked.write("experiment.json", experiment_found(("hybrid", "popularity"), **how))
        panel = experiment_panel(booked)
        assert (
            panel.status == state
            and says in panel.summary
            and panel.table["model"].to_list() == ["popularity", "hybrid"]
            and panel.figure is not None
        )


def before_replay(run):
    "A replay of the run's own log, small."
    rows = sort_by_time(drop_undated(training_events(run.read("interactions.parquet"))))
    calendar = make_period_grid(rows["timestamp"], min_rows=30)
    period, n = calendar.period_index(rows["timestamp"]), len(calendar.period_starts)
    rows, period = rows.filter(period < n), period[period < n]
    each = {
        e: backtest_once(rows, period, e, n - 1, PROTOCOLS["strict"]) for e in range(n - 30, n - 1)
    }
    users = pl.DataFrame([row for of in each.values() for row in of["users"]])
    run.write(
        "kept.json",
        {
            "unit": calendar.name,
            "origins": len(each),
            "ages": staleness_curve(users),
            "by_period": [],
            "outputs": output_drift_report(
                {e: of["outputs"] for e, of in each.items()}, calendar, n - 3
            ),
        },
    )
    return run.folder / "kept.json"


def test_a_newer_log_is_told_of_drift(booked, tmp_path, before):
    log = load("demo?ratings=2500").interactions[-300:]
    log.with_columns(rating=pl.lit(1.0).cast(pl.Float32), event=pl.lit("rating")).with_columns(
        pl.col("timestamp").dt.epoch("ms"),
        pl.when(pl.int_range(pl.len()) < 5).then(5.0).otherwise("rating").alias("rating"),
    ).write_csv(tmp_path / "new.csv")
    text = dashboard(
        booked, log=str(tmp_path / "new.csv"), output=str(tmp_path / "page.html")
    ).read_text()
    assert (
        "Drift of what comes in" in text
        and (tmp_path / "page.html").exists()
        and "Nothing has been appended" in text
    )
    append(booked, before.parent / "one.csv", models=("popularity",))
    assert re.search(
        r"\d+ events have been appended since the report", dashboard(booked).read_text()
    )
