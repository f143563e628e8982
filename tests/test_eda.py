"The pictures of the log: numbers against brute force, and every figure on every kind of log."

import json
from datetime import datetime, timedelta

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr

from widedeep_nb import eda
from widedeep_nb.core import Run, set_theme, to_interactions

some_counts = st.lists(st.integers(0, 50), min_size=1, max_size=40).filter(any)


def made(n=600, users=40, items=30, days=900, seed=0, **columns):
    "A log by chance; `select_columns` replaces some of it."
    rng = np.random.default_rng(seed)
    time = [
        datetime(2020, 1, 15) + timedelta(seconds=int(s)) for s in rng.integers(0, days * 86400, n)
    ]
    log = {
        "user": [f"u{i}" for i in rng.zipf(1.7, n) % users],
        "item": [f"i{i}" for i in rng.zipf(1.5, n) % items],
        "rating": rng.integers(1, 6, n),
        "timestamp": time,
    }
    return to_interactions(
        pl.DataFrame({k: v for k, v in (log | columns).items() if v is not None})
    )


CLICKS = {"rating": None, "event": ["click"] * 400 + ["purchase"] * 200}
LOGS = {
    "full": made(),
    "no stars": made(rating=None),
    "no time": made(timestamp=None),
    "events": made(**CLICKS),
    "bare": made(rating=None, timestamp=None),
    "one user": made(user_rows=["only"] * 600),
    "one item": made(item_codes=["only"] * 600),
    "one row": made(1),
    "two rows": made(2),
    "a week": made(days=7),
    "an hour": made(days=1 / 24),
    "many stars": made(rating=np.linspace(0, 100, 600)),
    "one star": made(rating=[3] * 600),
    "half known": made().with_columns(
        pl.when(pl.int_range(600) % 2 == 0).then(pl.col("rating", "timestamp"))
    ),
    "big": made(20_000, 3000, 2000, 3000),
    "decades": made(days=20_000),
}
TABLES = {
    "no table": pl.DataFrame({"item": [f"i{i}" for i in range(30)]}),
    "flat": pl.DataFrame(
        {
            "item": [f"i{i}" for i in range(30)],
            "category": [f"kind {i % 9} with a name far too long to be shown" for i in range(30)],
        }
    ),
    "path": pl.DataFrame(
        {
            "item": [f"i{i}" for i in range(30)],
            "category": [f"Electronics > Part {i % 4} > x" for i in range(30)],
        }
    ),
    "pair": pl.DataFrame(
        {"item": [f"i{i}" for i in range(30)], "category": ["left", "right"] * 15}
    ),
    "unknown": pl.DataFrame(
        {"item": [f"i{i}" for i in range(30)], "category": [None] * 30},
        schema_overrides={"category": pl.String},
    ),
}


@pytest.fixture
def shown(monkeypatch):
    "What is shown, in order; everything in a figure must lie within its frame."
    found = []

    def figure(fig, label, caption, alt, real=eda.show_figure):
        fig.draw_without_rendering()
        box = fig.get_tightbbox()
        assert box.x0 > -0.05 and box.x1 < fig.get_figwidth() + 0.05, (
            f"{label}: something leaves the figure"
        )
        assert "nan" not in (caption + alt).split() and "None" not in caption + alt
        found.append((label, caption))
        real(fig, label, caption, alt)

    monkeypatch.setattr(eda, "show_figure", figure)
    monkeypatch.setattr(eda, "say", lambda text: found.append(("said", text)))
    monkeypatch.setattr(
        eda,
        "show_table",
        lambda frame, label, caption: found.append((label, caption + str(frame.rows()))),
    )
    set_theme()
    return found


@given(some_counts)
@settings(deadline=None)
def test_gini_is_half_the_relative_mean_difference(values):
    x = np.array(values, float)
    brute = np.abs(x[:, None] - x[None]).mean() / (2 * x.mean())
    assert eda.gini_coefficient(pl.Series(values)) == pytest.approx(brute, abs=1e-12)


@given(some_counts)
@settings(deadline=None)
def test_lorenz_lies_on_the_sorted_cumulative_sum(values):
    curve = eda.lorenz_curve(pl.Series(values))
    whole = np.concatenate([[0], np.cumsum(np.sort(values))]) / sum(values)
    assert np.interp(
        np.arange(len(whole)) / len(values), curve["ids"], curve["ratings"]
    ) == pytest.approx(whole, abs=1e-12)


@given(some_counts)
@settings(deadline=None)
def test_tail_counts_those_with_at_least_n(values):
    table = eda.survival_function(pl.Series(values))
    assert table["n"].to_list() == sorted(set(values))
    for n, share in table.rows():
        assert share == pytest.approx(sum(v >= n for v in values) / len(values))


@given(
    st.lists(
        st.tuples(st.sampled_from("abcde"), st.sampled_from("vwxyz"), st.integers(0, 1500)),
        min_size=1,
        max_size=40,
    ),
    st.sampled_from(["1mo", "1d", "1q"]),
)
@settings(deadline=None, max_examples=25)
def test_by_month_loses_nothing(rows, every):
    log = to_interactions(
        pl.DataFrame(rows, schema=["user", "item", "day"], orient="row").with_columns(
            timestamp=pl.datetime(2019, 12, 31) + pl.duration(days="day")
        )
    )
    table = eda.growth_by_period(log, every)
    assert table.select(pl.exclude("month").sum()).row(0) == (
        len(rows),
        log["user"].n_unique(),
        log["item"].n_unique(),
    )
    for month, n, users, _ in table.rows():
        assert n == (log["timestamp"].dt.truncate(every) == month).sum()
        assert users == sum(
            group["timestamp"].dt.truncate(every).min() == month
            for _, group in log.group_by("user")
        )
    gaps = table["month"].diff().drop_nulls().dt.total_days()
    assert table["month"].is_sorted() and gaps.max() in (
        None,
        *{"1mo": range(28, 32), "1d": [1], "1q": range(90, 93)}[every],
    )


def test_rows_without_time_are_left_out():
    log = LOGS["half known"]
    assert eda.growth_by_period(log)["ratings"].sum() == 300
    assert not eda.has_timestamps(LOGS["no time"]) and eda.cold_share(LOGS["no time"]) == {}


@pytest.mark.parametrize("last", [0.1, 0.35, 0.9])
def test_newcomers_one_by_one(last):
    log = made(150, 60, 50)
    rows = sorted(log.select("timestamp", "user", "item").rows())
    cut = round((1 - last) * len(rows))
    users, items = {u for _, u, _ in rows[:cut]}, {i for _, _, i in rows[:cut]}
    new = np.array(
        [
            (u not in users, i not in items, u not in users or i not in items)
            for _, u, i in rows[cut:]
        ]
    )
    assert 0 < new[:, 2].mean() < 1 or last == 0.9
    assert list(eda.cold_share(log, last).values()) == pytest.approx(new.mean(0))


@pytest.mark.parametrize("by", ["user", "item"])
def test_statistics_and_correlations_one_by_one(by):
    log = LOGS["full"]
    table, other = eda.interaction_statistics(log, by), "item" if by == "user" else "user"
    size = dict(log.group_by(other).len().rows())
    for row in table.rows(named=True):
        mine = log.filter(pl.col(by) == row[by])
        assert row["count"] == len(mine) and row["mean rating"] == pytest.approx(
            np.mean(mine["rating"].to_list()), rel=1e-5
        )
        assert row["neighbors' count"] == pytest.approx(np.mean([size[i] for i in mine[other]]))
        days = (mine["timestamp"] - log["timestamp"].min()).dt.total_milliseconds() / 86_400_000
        assert (row["first day"], row["days active"]) == pytest.approx(
            (days.min(), days.max() - days.min())
        )
    pair = table.select("count", "rating SD").drop_nulls()
    assert 1 < len(pair) < len(table) or by == "item"
    assert eda.spearman_correlations(table).loc["count", "rating SD"] == pytest.approx(
        spearmanr(*pair.get_columns()).statistic
    )


def test_category_level_and_shares():
    log = LOGS["full"]
    assert (
        eda.item_categories(TABLES["path"])["category"].n_unique() == 4
        and eda.item_categories(TABLES["flat"])["category"].n_unique() == 9
    )
    assert eda.item_categories(TABLES["pair"])["category"].n_unique() == 2
    assert (
        eda.item_categories(TABLES["no table"]) is None
        and eda.item_categories(TABLES["unknown"]) is None
    )
    table = eda.item_categories(TABLES["path"])
    shares = eda.category_shares(log, table, pl.col("timestamp").dt.year(), min_rows=1)
    assert shares.group_by("period").agg(pl.col("share").sum())["share"].to_list() == pytest.approx(
        [1.0] * 3
    )
    kind, rows = dict(table.rows()), log.filter(pl.col("timestamp").dt.year() == 2021)
    assert shares.filter(period=2021, category="Part 2")["share"].item() == pytest.approx(
        np.mean([kind[i] == "Part 2" for i in rows["item"]])
    )
    assert (
        eda.category_shares(log, table, pl.col("timestamp").dt.year(), min_rows=len(log))[
            "period"
        ].len()
        == 0
    )


@pytest.mark.parametrize("name", LOGS)
def test_every_picture_on_every_log(name, shown):
    log = LOGS[name]
    stars, time = log["rating"].null_count() < len(log), log["timestamp"].null_count() < len(log)
    for show in (
        eda.show_rating_counts,
        eda.show_survival_curves,
        eda.show_lorenz_curves,
        eda.show_growth,
        eda.show_correlations,
    ):
        show(log)
    labels = [label for label, _ in shown]
    told = time and name not in ("one row", "two rows", "an hour")
    if name == "two rows":
        told = labels[3] != "said"  # as far apart as chance put them
    assert labels == [
        "fig-stars" if stars else "said",
        "fig-tails",
        "fig-lorenz",
        "fig-growth" if told else "said",
        "fig-correlations",
    ]
    if name == "events":
        assert "click (66.7 %), purchase (33.3 %)" in shown[0][1]
    if not time:
        assert "No times" in shown[3][1]


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize(
    "name",
    [
        "full",
        "events",
        "no time",
        "bare",
        "one user",
        "one row",
        "two rows",
        "a week",
        "an hour",
        "half known",
    ],
)
def test_categories_on_every_log(name, table, shown):
    eda.show_categories(LOGS[name], TABLES[table])
    assert len(shown) == 1
    if table in ("no table", "unknown") or name in ("no time", "bare", "one row"):
        assert shown[0][0] == "said"
    if table in ("flat", "path", "pair") and name in ("full", "events", "one user", "a week"):
        assert shown[0][0] == "fig-categories"


@pytest.mark.parametrize("name", LOGS)
def test_summary_and_findings_on_every_log(name, shown):
    log = LOGS[name]
    numbers = eda.log_summary(log)
    assert json.loads(json.dumps(numbers, allow_nan=False)) == numbers
    assert numbers["rows"] == len(log) and numbers["density"] == pytest.approx(
        len(set(log.select("user", "item").rows())) / (numbers["users"] * numbers["items"])
    )
    per_user = np.unique(log["user"].to_list(), return_counts=True)[1]
    assert (numbers["users_below_5"], numbers["users_below_20"], numbers["users_with_one"]) == (
        (per_user < 5).mean(),
        (per_user < 20).mean(),
        (per_user == 1).mean(),
    )
    eda.show_log_summary(numbers)
    said = eda.log_findings(numbers)
    assert (
        shown[0][0] == "tbl-summary"
        and len(said) == 3
        and not any("None" in s or "nan" in s for s in said + [shown[0][1]])
    )
    assert ("Without times" in said[-1]) == (log["timestamp"].null_count() == len(log))


def test_top_share():
    counts = pl.Series([1] * 198 + [51, 51])
    assert eda.top_share(counts) == pytest.approx(102 / 300)  # two of 200 items
    assert eda.top_share(pl.Series([3, 1])) == 0.75  # at least one


def test_the_step_leaves_its_file(tmp_path):
    run = Run(tmp_path / "run", dataset="demo?ratings=4000")
    eda.run_eda(run)
    about = run.read("eda.json")
    assert about["summary"]["rows"] == len(run.read("interactions.parquet")) and about[
        "findings"
    ] == eda.log_findings(about["summary"])
