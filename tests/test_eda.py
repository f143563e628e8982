"Check the statistics of a log against brute force, and every figure on every kind of log."

import json
from datetime import datetime, timedelta

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr

from widedeep_nb import eda
from widedeep_nb.lib import display, log_plots, log_summary
from widedeep_nb.lib.core import to_interactions
from widedeep_nb.lib.display import set_theme
from widedeep_nb.lib.runs import Run

counts_lists = st.lists(st.integers(0, 50), min_size=1, max_size=40).filter(any)


def random_log(n=600, n_users=40, n_items=30, days=900, seed=0, **columns):
    "Make a random log; `columns` replaces or (with None) drops some of its columns."
    rng = np.random.default_rng(seed)
    seconds = rng.integers(0, days * 86400, n)
    log = {
        "user": [f"u{i}" for i in rng.zipf(1.7, n) % n_users],
        "item": [f"i{i}" for i in rng.zipf(1.5, n) % n_items],
        "rating": rng.integers(1, 6, n),
        "timestamp": [datetime(2020, 1, 15) + timedelta(seconds=int(s)) for s in seconds],
    }
    log |= columns
    given_columns = {name: column for name, column in log.items() if column is not None}
    return to_interactions(pl.DataFrame(given_columns))


def item_table(categories):
    return pl.DataFrame(
        {"item": [f"i{i}" for i in range(30)], "category": categories},
        schema_overrides={"category": pl.String},
    )


EVENTS = ["click"] * 400 + ["purchase"] * 200
EVERY_OTHER = pl.when(pl.int_range(600) % 2 == 0).then(pl.col("rating", "timestamp"))
LOGS = {
    "full": random_log(),
    "no ratings": random_log(rating=None),
    "no time": random_log(timestamp=None),
    "events": random_log(rating=None, event=EVENTS),
    "bare": random_log(rating=None, timestamp=None),
    "one user": random_log(user=["only"] * 600),
    "one item": random_log(item=["only"] * 600),
    "one row": random_log(1),
    "two rows": random_log(2),
    "a week": random_log(days=7),
    "an hour": random_log(days=1 / 24),
    "fine ratings": random_log(rating=np.linspace(0, 100, 600)),
    "one rating": random_log(rating=[3] * 600),
    "half known": random_log().with_columns(EVERY_OTHER),
    "big": random_log(20_000, 3000, 2000, 3000),
    "decades": random_log(days=20_000),
}
TABLES = {
    "no table": pl.DataFrame({"item": [f"i{i}" for i in range(30)]}),
    "flat": item_table([f"kind {i % 9} with a name far too long to be shown" for i in range(30)]),
    "path": item_table([f"Electronics > Part {i % 4} > x" for i in range(30)]),
    "pair": item_table(["left", "right"] * 15),
    "unknown": item_table([None] * 30),
}


@pytest.fixture
def shown(monkeypatch):
    "Collect (label, caption) of what is shown; check that a figure stays within its frame."
    outputs = []

    def show_figure(fig, label, caption, alt, real=display.show_figure):
        fig.draw_without_rendering()
        box = fig.get_tightbbox()
        inside = box.x0 > -0.05 and box.x1 < fig.get_figwidth() + 0.05
        assert inside, f"{label}: something leaves the figure"
        assert "nan" not in (caption + alt).split() and "None" not in caption + alt
        outputs.append((label, caption))
        real(fig, label, caption, alt)

    def display_md(text):
        outputs.append(("text", text))

    def show_missing(label, reason):
        outputs.append(("text", reason))

    def show_table(frame, label, caption):
        outputs.append((label, caption + str(frame.rows())))

    for function in (show_figure, display_md, show_missing, show_table):
        for module in (log_plots, log_summary):
            monkeypatch.setattr(module, function.__name__, function, raising=False)
    set_theme()
    return outputs


def show_survival_curves(log):
    counts = {side: eda.interaction_counts(log, side) for side in ("user", "item")}
    survival = {side: eda.survival_function(rows) for side, rows in counts.items()}
    log_plots.show_survival_curves(counts, survival, log_summary.row_label(log))


def show_lorenz_curves(log):
    counts = {side: eda.interaction_counts(log, side) for side in ("user", "item")}
    curves = {side: eda.lorenz_curve(rows) for side, rows in counts.items()}
    gini = {side: eda.gini_coefficient(rows) for side, rows in counts.items()}
    head_share, n_items = eda.top_share(counts["item"]), len(counts["item"])
    log_plots.show_lorenz_curves(curves, gini, head_share, n_items, log_summary.row_label(log))


def show_growth(log):
    every = log_plots.time_bin(log)
    growth = eda.growth_by_period(log, every) if every else None
    log_plots.show_growth(growth, every, eda.cold_share(log), log_summary.row_label(log))


def show_correlations(log):
    users, items = [
        eda.spearman_correlations(eda.interaction_statistics(log, side))
        for side in ("user", "item")
    ]
    log_plots.show_correlations(users, items)


@given(counts_lists)
@settings(deadline=None)
def test_gini_is_half_the_relative_mean_difference(values):
    x = np.array(values, float)
    expected = np.abs(x[:, None] - x[None]).mean() / (2 * x.mean())
    assert eda.gini_coefficient(pl.Series(values)) == pytest.approx(expected, abs=1e-12)


@given(counts_lists)
@settings(deadline=None)
def test_lorenz_curve_follows_the_sorted_cumulative_sum(values):
    curve = eda.lorenz_curve(pl.Series(values))
    expected = np.concatenate([[0], np.cumsum(np.sort(values))]) / sum(values)
    shares = np.arange(len(expected)) / len(values)
    interpolated = np.interp(shares, curve["ids"], curve["ratings"])
    assert interpolated == pytest.approx(expected, abs=1e-12)


@given(counts_lists)
@settings(deadline=None)
def test_survival_function_counts_those_with_at_least_n(values):
    table = eda.survival_function(pl.Series(values))
    assert table["n"].to_list() == sorted(set(values))
    for n, share in table.rows():
        assert share == pytest.approx(sum(v >= n for v in values) / len(values))


dated_pairs = st.tuples(st.sampled_from("abcde"), st.sampled_from("vwxyz"), st.integers(0, 1500))
GAPS = {"1mo": range(28, 32), "1d": [1], "1q": range(90, 93)}  # days


@given(st.lists(dated_pairs, min_size=1, max_size=40), st.sampled_from(["1mo", "1d", "1q"]))
@settings(deadline=None, max_examples=25)
def test_growth_counts_every_row_once(rows, every):
    time = pl.datetime(2019, 12, 31) + pl.duration(days="day")
    frame = pl.DataFrame(rows, schema=["user", "item", "day"], orient="row")
    log = to_interactions(frame.with_columns(timestamp=time))
    table = eda.growth_by_period(log, every)
    totals = (len(rows), log["user"].n_unique(), log["item"].n_unique())
    assert table.select(pl.exclude("period").sum()).row(0) == totals
    first = [group["timestamp"].dt.truncate(every).min() for _, group in log.group_by("user")]
    for period, n_rows, n_new_users, _ in table.rows():
        assert n_rows == (log["timestamp"].dt.truncate(every) == period).sum()
        assert n_new_users == first.count(period)
    gaps = table["period"].diff().drop_nulls().dt.total_days()
    assert table["period"].is_sorted() and gaps.max() in (None, *GAPS[every])


def test_rows_without_time_are_left_out():
    assert eda.growth_by_period(LOGS["half known"])["ratings"].sum() == 300
    assert not log_plots.has_timestamps(LOGS["no time"]) and eda.cold_share(LOGS["no time"]) == {}


@pytest.mark.parametrize("last", [0.1, 0.35, 0.9])
def test_cold_share_row_by_row(last):
    log = random_log(150, 60, 50)
    rows = sorted(log.select("timestamp", "user", "item").rows())
    split_at = round((1 - last) * len(rows))
    users = {user for _, user, _ in rows[:split_at]}
    items = {item for _, _, item in rows[:split_at]}
    new = np.array([(user not in users, item not in items) for _, user, item in rows[split_at:]])
    expected = [*new.mean(0), new.any(1).mean()]
    assert 0 < expected[2] < 1 or last == 0.9
    assert list(eda.cold_share(log, last).values()) == pytest.approx(expected)


@pytest.mark.parametrize("by, other", [("user", "item"), ("item", "user")])
def test_statistics_and_correlations_row_by_row(by, other):
    log = LOGS["full"]
    table = eda.interaction_statistics(log, by)
    counts = dict(log.group_by(other).len().rows())
    start = log["timestamp"].min()
    for row in table.rows(named=True):
        own = log.filter(pl.col(by) == row[by])
        mean = np.mean(own["rating"].to_list())
        assert row["count"] == len(own) and row["mean rating"] == pytest.approx(mean, rel=1e-5)
        neighbors = np.mean([counts[id] for id in own[other]])
        assert row["neighbors' count"] == pytest.approx(neighbors)
        days = (own["timestamp"] - start).dt.total_milliseconds() / 86_400_000
        expected = (days.min(), days.max() - days.min())
        assert (row["first day"], row["days active"]) == pytest.approx(expected)
    pair = table.select("count", "rating SD").drop_nulls()
    assert 1 < len(pair) < len(table) or by == "item"
    correlation = eda.spearman_correlations(table).loc["count", "rating SD"]
    assert correlation == pytest.approx(spearmanr(*pair.get_columns()).statistic)


def test_category_level_and_shares():
    n_categories = {}
    for name in ("path", "flat", "pair"):
        n_categories[name] = log_plots.item_categories(TABLES[name])["category"].n_unique()
    assert n_categories == {"path": 4, "flat": 9, "pair": 2}
    assert log_plots.item_categories(TABLES["no table"]) is None
    assert log_plots.item_categories(TABLES["unknown"]) is None
    log, table = LOGS["full"], log_plots.item_categories(TABLES["path"])
    year = pl.col("timestamp").dt.year()
    shares = log_plots.category_shares(log, table, year, min_rows=1)
    totals = shares.group_by("period").agg(pl.col("share").sum())["share"].to_list()
    assert totals == pytest.approx([1.0] * 3)
    category_of = dict(table.rows())
    in_2021 = log.filter(year == 2021)["item"]
    expected = np.mean([category_of[item] == "Part 2" for item in in_2021])
    share = shares.filter(period=2021, category="Part 2")["share"].item()
    assert share == pytest.approx(expected)
    assert not len(log_plots.category_shares(log, table, year, min_rows=len(log)))


@pytest.mark.parametrize("name", LOGS)
def test_every_figure_on_every_log(name, shown):
    log = LOGS[name]
    rated = log["rating"].null_count() < len(log)
    dated = log["timestamp"].null_count() < len(log)
    log_plots.show_rating_counts(log)
    show_survival_curves(log)
    show_lorenz_curves(log)
    show_growth(log)
    show_correlations(log)
    labels = [label for label, _ in shown]
    long_enough = dated and name not in ("one row", "two rows", "an hour")
    if name == "two rows":
        long_enough = labels[3] != "text"  # depends on two random times
    assert labels == [
        "fig-stars" if rated else "text",
        "fig-tails",
        "fig-lorenz",
        "fig-growth" if long_enough else "text",
        "fig-correlations",
    ]
    if name == "events":
        assert "click (66.7 %), purchase (33.3 %)" in shown[0][1]
    if not dated:
        assert "has no times" in shown[3][1]


SOME_LOGS = ["full", "events", "no time", "bare", "one user", "one row", "two rows", "a week"]


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("name", [*SOME_LOGS, "an hour", "half known"])
def test_categories_on_every_log(name, table, shown):
    log_plots.show_categories(LOGS[name], TABLES[table])
    assert len(shown) == 1
    label = shown[0][0]
    if table in ("no table", "unknown") or name in ("no time", "bare", "one row"):
        assert label == "text"
    if table in ("flat", "path", "pair") and name in ("full", "events", "one user", "a week"):
        assert label == "fig-categories"


@pytest.mark.parametrize("name", LOGS)
def test_summary_and_findings_on_every_log(name, shown):
    log = LOGS[name]
    summary = eda.log_summary(log)
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary
    n_pairs = len(set(log.select("user", "item").rows()))
    density = n_pairs / (summary["users"] * summary["items"])
    assert summary["rows"] == len(log) and summary["density"] == pytest.approx(density)
    per_user = np.unique(log["user"].to_list(), return_counts=True)[1]
    assert summary["users_below_5"] == (per_user < 5).mean()
    assert summary["users_below_20"] == (per_user < 20).mean()
    assert summary["users_with_one"] == (per_user == 1).mean()
    log_summary.show_log_summary(summary)
    findings = log_summary.log_findings(summary)
    label, caption = shown[0]
    assert label == "tbl-summary" and len(findings) == 3
    assert not any("None" in text or "nan" in text for text in [*findings, caption])
    undated = log["timestamp"].null_count() == len(log)
    assert ("Without times" in findings[-1]) == undated
    sentences = log_summary.eda_in_short(summary)
    assert len(sentences) == 3 and all(text.endswith(".") for text in sentences)
    text = " ".join(sentences)
    assert "None" not in text and "nan" not in text and "()" not in text
    assert ("no times" in sentences[2]) == undated


def test_sentences_follow_the_log():
    even = pl.Series(range(600)) % 30
    equal = random_log(user=[f"u{u}" for u in even], item=[f"i{i}" for i in even.reverse()])
    pairs = [
        log_summary.eda_in_short(eda.log_summary(log)) for log in (random_log(n_users=400), equal)
    ]
    assert all(ours != theirs for ours, theirs in zip(*pairs))
    assert "personal lists for a few only" in pairs[0][1]
    assert "most can get personal lists" in pairs[1][1]


def test_top_share():
    counts = pl.Series([1] * 198 + [51, 51])
    assert eda.top_share(counts) == pytest.approx(102 / 300)  # two of 200 items
    assert eda.top_share(pl.Series([3, 1])) == 0.75  # at least one item


def test_the_step_writes_its_file(tmp_path):
    run = Run(tmp_path / "run", dataset="demo?ratings=4000")
    eda.run_eda(run)
    report = run.read("eda.json")
    assert report["summary"]["rows"] == len(run.read("interactions.parquet"))
    assert report["findings"] == log_summary.log_findings(report["summary"])
