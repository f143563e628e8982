"Check A/B tests: sample size, assignment, calibration, off-policy evaluation and a simulated experiment."

import itertools
import json
import sqlite3
from contextlib import closing

import matplotlib.pyplot as plt
import numpy as np
import polars as pl
import pytest
import statsmodels.api as sm
from scipy import integrate, stats

from widedeep_nb import experiments
from widedeep_nb.lib import (
    ab_simulation,
    ab_statistics,
    experiment_report,
    feedback,
    off_policy,
    statistics,
)
from widedeep_nb.lib.core import UserError
from widedeep_nb.lib.datasets import synthetic_users

PLAN = {"ranking": {"popularity": 0.3, "neighbors": 0.4, "content": 0.3}, "rating": {"ridge": 1.0}}
HALVES = {"old": 0.5, "new": 0.5}
IDS = pl.Series([f"U{i:05}" for i in range(5000)])


@pytest.fixture(scope="module")
def fitted_run(small_run):
    "A small run of the demo shop with two fitted models."
    return small_run(hybrid={"plan": PLAN}, popularity={})


@pytest.fixture(scope="module")
def results(fitted_run):
    "The results of a simulated experiment, with stores left by a killed run in the way."
    fitted_run.work_dir = fitted_run.folder / ".work/experiment-test"
    for phase in ("drawn", "test"):
        (fitted_run.work_dir / phase).mkdir(parents=True)
        (fitted_run.work_dir / phase / "feedback.sqlite").write_bytes(b"half a store")
    return ab_simulation.run_simulation(
        fitted_run,
        synthetic_users(fitted_run.manifest["dataset"]),
        ("hybrid", "popularity"),
        0.1,
        3,
        1000,
    )


# sample size


@pytest.mark.parametrize(
    "sd, effect, power, alpha",
    [*itertools.product((0.3, 2.0), (0.02, 0.1), (0.8, 0.95), (0.05, 0.01))],
)
def test_sample_size_is_the_closed_formula(sd, effect, power, alpha):
    z = stats.norm.ppf([1 - alpha / 2, power]).sum()
    assert (
        abs(ab_statistics.sample_size(sd, effect, power, alpha) - 2 * (z * sd / effect) ** 2)
        < 1 + stats.norm.ppf(1 - alpha / 2) ** 2
    )


def test_power_agrees_with_simulation():
    rng, tests = np.random.default_rng(0), 4000
    n = ab_statistics.sample_size(1.0, 0.4, 0.9)
    called = int(
        (
            ab_statistics.welch_test(rng.normal(0, 1, (tests, n)), rng.normal(0.4, 1, (tests, n))).p
            < 0.05
        ).sum()
    )
    lo, hi = statistics.binomial_limits(tests, ab_statistics.statistical_power(n, 1.0, 0.4))
    assert lo <= called <= hi and abs(ab_statistics.statistical_power(n, 1.0, 0.4) - 0.9) < 0.01


@pytest.mark.parametrize(
    "wrong",
    [
        dict(sd=0.0),
        dict(effect=-1.0),
        dict(power=0.04),
        dict(alpha=0.0),
        dict(ratio=0.0),
        dict(power=1.0),
    ],
)
def test_invalid_plans_are_refused_in_one_line(wrong):
    with pytest.raises(UserError) as e:
        ab_statistics.sample_size(**{"sd": 1.0, "effect": 0.1} | wrong)
    assert "\n" not in str(e.value)


# assignment


def test_groups_are_balanced_in_every_experiment():
    "The p-values of balance over many experiments are themselves uniform."
    sizes = [
        int((ab_statistics.assign_arms(IDS, f"experiment {i}", HALVES) == "new").sum())
        for i in range(200)
    ]
    even = [stats.binomtest(s, len(IDS)).pvalue for s in sizes]
    assert stats.kstest(even, "uniform").pvalue > 0.001
    assert (
        stats.kstest(
            [ab_statistics.srm_test([s, len(IDS) - s], [0.5, 0.5]) for s in sizes], "uniform"
        ).pvalue
        > 0.001
    )


def test_experiments_are_independent():
    groups = np.array(
        [
            (ab_statistics.assign_arms(IDS, f"experiment {i}", HALVES) == "new").to_numpy()
            for i in range(40)
        ]
    )
    pairs = [
        stats.chi2_contingency(np.histogram2d(a, b, 2)[0], correction=False).pvalue
        for a, b in itertools.combinations(groups, 2)
    ]
    assert stats.kstest(pairs, "uniform").pvalue > 0.001


def test_assignment_is_stable_and_independent_of_other_users():
    shares = {"a": 0.2, "b": 0.5, "c": 0.3}
    whole, some = ab_statistics.assign_arms(IDS, "x", shares, 0.1), IDS[::-7]
    assert ab_statistics.assign_arms(some, "x", shares, 0.1).equals(whole[::-7])
    assert (
        ab_statistics.hash_uniform(pl.Series(["U1"]), "button")[0]
        == int.from_bytes(__import__("hashlib").sha256(b"button\0U1").digest()[:8], "big")
        // 2**11
        / 2**53
    )
    parts = whole.filter(whole != "holdout")
    assert (
        ab_statistics.srm_test([int((parts == a).sum()) for a in shares], [*shares.values()])
        > 0.001
    )
    for name in ("y", "holdout"):
        assert (
            (ab_statistics.assign_arms(IDS, name, HALVES, 0.1) == "holdout") == (whole == "holdout")
        ).all()


@pytest.mark.parametrize(
    "arms, holdout",
    [
        ({"a": 1.0}, 0.0),
        ({"a": 0.5, "b": 0.6}, 0.0),
        ({"a": 0.0, "b": 1.0}, 0.0),
        (HALVES, 1.0),
        (HALVES, -0.1),
        ({"holdout": 0.5, "b": 0.5}, 0.1),
    ],
)
def test_wrong_shares_are_refused(arms, holdout):
    with pytest.raises(UserError):
        ab_statistics.assign_arms(IDS, "x", arms, holdout)


# significance tests


def test_batched_tests_equal_single_tests():
    rng = np.random.default_rng(1)
    a, b = rng.exponential(1, (20, 30)), rng.exponential(2, (20, 44))
    for i, p in enumerate(ab_statistics.welch_test(a, b).p):
        reference = stats.ttest_ind(b[i], a[i], equal_var=False)
        assert np.isclose(p, reference.pvalue) and np.allclose(
            [ab_statistics.welch_test(a, b).lo[i], ab_statistics.welch_test(a, b).hi[i]],
            reference.confidence_interval(),
        )


def test_cuped_equals_regression_on_the_pre_period():
    "Check the adjusted difference against the group coefficient of a regression (statsmodels)."
    rng = np.random.default_rng(2)
    x, y = rng.normal(size=(2, 300)), rng.normal(size=(2, 300))
    y += 0.7 * x + np.array([[0], [0.4]])
    design = np.column_stack([np.ones(600), np.repeat([0, 1], 300), x.ravel()])
    fit = sm.OLS(y.ravel(), design).fit()
    ours = ab_statistics.welch_test(*ab_statistics.cuped(*y, *x))
    assert np.isclose(ours.value, fit.params[1]) and abs(ours.se / fit.bse[1] - 1) < 0.02


def test_delta_method_agrees_with_the_bootstrap_over_users():
    rng = np.random.default_rng(3)
    v = 1 + rng.poisson(3, (2, 600))
    y = rng.binomial(v, rng.beta(1, 2, (2, 600)))
    ours, who = (
        ab_statistics.welch_test(*ab_statistics.delta_method(y, v)),
        rng.integers(600, size=(4000, 2, 600)),
    )
    again = np.take_along_axis(y[None], who, 2).sum(2) / np.take_along_axis(v[None], who, 2).sum(2)
    assert abs(np.std(again[:, 1] - again[:, 0]) / ours.se - 1) < 0.05
    assert np.isclose(ours.value, np.diff(y.sum(1) / v.sum(1))[0])


def test_sequential_p_value_is_the_mixture_likelihood_ratio():
    "Check p-values against numerical integration of the mixture (Johari et al., 2017)."
    value, se, n, planned = (
        np.array([0.5, 0.1, 0.3]),
        np.array([0.2, 0.1, 0.08]),
        np.array([50, 100, 200]),
        200,
    )
    rho2 = (-2 * np.log(0.05) + np.log(1 - 2 * np.log(0.05))) / planned

    def ratio(v, s, m):
        tau = np.sqrt(rho2 * m) * s  # in units of one user's standard deviation, s * sqrt(m)
        return integrate.quad(
            lambda d: stats.norm.pdf(d, 0, tau) * np.exp((v * d - d * d / 2) / s**2),
            -8 * tau - 2 * abs(v),
            8 * tau + 2 * abs(v),
        )[0]

    due = np.minimum.accumulate([min(1, 1 / ratio(*row)) for row in zip(value, se, n)])
    assert np.allclose(ab_statistics.confidence_sequence(value, se, n, planned)[2], due, rtol=1e-5)


def test_sequential_interval_excludes_zero_where_p_is_small():
    z, n = np.linspace(2, 4.5, 500)[:, None], np.full((500, 1), 300)
    for alpha in (0.05, 0.01):
        lo, hi, p = ab_statistics.confidence_sequence(z, np.ones((500, 1)), n, 250, alpha)
        assert ((lo > 0) == (p < alpha)).all() and 0 < (lo > 0).sum() < 500


def test_confidence_sequence_is_narrowest_at_the_planned_size():
    n = np.arange(50, 5000, 10)

    def width(planned):
        return np.subtract(
            *ab_statistics.confidence_sequence(0 * n, 1 / np.sqrt(n), n, planned)[1::-1]
        )

    near = int(
        np.argmin([width(p)[np.searchsorted(n, 1000)] for p in (100, 500, 1000, 2000, 4500)])
    )
    assert near == 2


def test_cumulative_stats_equal_tests_on_the_first_users():
    rng = np.random.default_rng(4)
    y, second, looks = rng.normal(size=(3, 90)), rng.random((3, 90)) < 0.4, np.array([20, 33, 90])
    value, se = ab_statistics.cumulative_stats(y, second, looks)
    for test, (j, n) in itertools.product(range(3), enumerate(looks)):
        expected = ab_statistics.welch_test(
            y[test, :n][~second[test, :n]], y[test, :n][second[test, :n]]
        )
        assert np.isclose(value[test, j], expected.value) and np.isclose(se[test, j], expected.se)


@pytest.fixture(scope="module")
def calibration():
    return experiments.calibration_trials()


def test_nominal_rates_hold(calibration):
    "Check false alarms, coverage and power over five thousand experiments with a known truth."
    assert experiment_report.describe_calibration(
        [r for r in experiment_report.calibration_table(calibration) if not r["holds"]]
        or experiment_report.calibration_table(calibration)
    ).endswith("simulated experiments.")


def test_peeking_and_counting_visits_inflate_false_alarms(calibration):
    high = statistics.binomial_limits(calibration["tests"], 0.05)[1]
    same = calibration["A/A"]
    assert (
        same["peeking"]["called"] > 3 * high
        and same["per_visit"]["called"] > high > same["sequential"]["called"]
    )
    assert same["sequential"]["called"] <= 0.05 * calibration["tests"]


def test_p_values_are_uniform_without_an_effect(calibration):
    assert calibration["A/A"]["uniform"] > 0.01 > calibration["A/B"]["uniform"] and calibration[
        "A/A"
    ]["p"] == sorted(calibration["A/A"]["p"])


def test_cuped_needs_fewer_users(calibration):
    population = ab_simulation.synthetic_population()
    n = calibration["cuped_n"]
    assert n < 0.7 * calibration["n"]
    called, (lo, hi) = (
        experiments.simulate_tests(population, n, 2000, seed=9)["cuped"]["called"],
        statistics.binomial_limits(2000, 0.8),
    )
    assert lo - 20 <= called <= hi + 20  # the correlation is itself an estimate


@pytest.mark.long
def test_nominal_rates_hold_over_ten_thousand_other_experiments():
    "Check counts against limits that hold for all six together with 95 %."
    population = ab_simulation.synthetic_population(seed=5)
    n = ab_statistics.sample_size(
        float(population.control.std()),
        float(population.treatment.mean() - population.control.mean()),
    )
    for apart in (False, True):
        rows = [
            experiments.simulate_tests(population, n, 2000, apart, seed) for seed in range(20, 25)
        ]
        for kind in ("mean", "ratio", "cuped"):
            count = sum(r["tests"] - r[kind]["covered"] for r in rows)
            lo, hi = stats.binom.interval(1 - 0.05 / 6, 10_000, 0.05)
            assert lo <= count <= hi, (apart, kind, count)
        assert sum(r["tests"] - r["sequential"]["covered"] for r in rows) <= 500


# off-policy evaluation


def test_off_policy_estimators_are_unbiased():
    "Check the exact expectation over all lists, with a random reward model."
    rng = np.random.default_rng(6)
    p, q = (w / w.sum() for w in rng.uniform(0.1, 1, (2, 1, 5)))
    every = np.array([*itertools.permutations(range(5), 3)])
    chance, target = (
        off_policy.list_propensity(np.repeat(w, len(every), 0), every) for w in (p, q)
    )
    assert np.isclose(chance.sum(), 1) and np.isclose(target.sum(), 1)
    reward, guess = rng.random(len(every)), rng.random(len(every))
    truth, w = (target * reward).sum(), target / chance
    assert np.isclose((chance * w * reward).sum(), truth)
    expected = np.full(len(every), (target * guess).sum())
    assert np.isclose((chance * (expected + w * (reward - guess))).sum(), truth)
    one = {
        name: value
        for name, (value, _) in off_policy.off_policy_value(
            reward, chance, target, guess, expected
        ).items()
    }
    assert (
        np.isclose(one["IPS"], (w * reward).mean())
        and np.isclose(one["self-normalized"], (w * reward).sum() / w.sum())
        and np.isclose(one["doubly robust"], (expected + w * (reward - guess)).mean())
    )


def test_bias_and_spread_on_logs_with_known_truth():
    rows = {
        r["name"]: r
        for r in ab_simulation.estimator_bias_variance(ab_simulation.synthetic_logs(seed=3))
    }
    for name in ("IPS", "self-normalized", "doubly robust"):
        assert abs(rows[name]["bias"]) < 3.5 * rows[name]["bias_se"], name
        lo, hi = statistics.binomial_limits(400, 0.95)
        assert lo - 4 <= 400 * rows[name]["covered"] <= hi + 4, name  # normal intervals
    for name in ("mean of the log", "reward model"):
        assert abs(rows[name]["bias"]) > 10 * rows[name]["bias_se"]
    assert max(rows["doubly robust"]["sd"], rows["self-normalized"]["sd"]) < 0.8 * rows["IPS"]["sd"]


def test_rewards_do_not_influence_their_own_prediction():
    rng = np.random.default_rng(7)
    x, r, other = rng.normal(size=(40, 2)), rng.random(40), rng.normal(size=(40, 3, 2))
    before = off_policy.cross_fit_reward_model(x, r, other)[0][4]
    r[4] += 10
    after = off_policy.cross_fit_reward_model(x, r, other)[0]
    assert after[4] == before and not np.isclose(
        after[5], off_policy.cross_fit_reward_model(x, r - 10 * (np.arange(40) == 4), other)[0][5]
    )


@pytest.mark.parametrize(
    "chance, target, words",
    [
        (np.ones(400), np.ones(400), "no list of this log was sampled"),
        (np.zeros(0), np.zeros(0), "no lists"),
        (np.full(400, 1.5), np.ones(400), "above 0 and at most 1"),
        (np.full(400, 0.5), np.zeros(400), "never occur"),
        (np.full(400, 0.5), np.full(400, 0.3), "0.60 instead of 1"),
        (np.full(400, 0.01), np.where(np.arange(400) < 4, 1.0, 0), "sample size of 4 lists"),
        (np.full(1, 0.5), np.full(1, 0.5), "sample size of 1 lists"),
    ],
)
def test_logs_without_overlap_are_refused_with_the_reason(chance, target, words):
    with pytest.raises(UserError) as e:
        off_policy.check_overlap(chance, target)
    assert words in str(e.value) and "\n" not in str(e.value)


def test_standard_errors_are_clustered_by_user():
    "Check the standard error with four lists per user against statsmodels."
    rng = np.random.default_rng(8)
    user = np.repeat(np.arange(150), 4)
    reward, half = (
        (rng.random(150)[user] > rng.random(600) / 2).astype(float),
        np.full(600, 0.5),
    )
    value, se = off_policy.off_policy_value(reward, half, half, 0 * reward, 0 * reward, user)["IPS"]
    due = (
        sm.OLS(reward, np.ones(600))
        .fit(cov_type="cluster", cov_kwds={"groups": user, "use_correction": False})
        .bse[0]
    )
    assert (
        np.isclose(value, reward.mean())
        and np.isclose(se, due)
        and se
        > 1.3 * off_policy.off_policy_value(reward, half, half, 0 * reward, 0 * reward)["IPS"][1]
    )


def test_too_few_users_are_refused(fitted_run):
    with pytest.raises(UserError, match="20 or more users"):
        ab_simulation.run_simulation(
            fitted_run,
            synthetic_users(fitted_run.manifest["dataset"]),
            ("hybrid", "popularity"),
            0.95,
            3,
            1000,
        )


# simulated experiment


def test_experiment_equals_its_feedback_store(fitted_run, results):
    "Check the analysis against separate SQL queries on the feedback store."
    test, path = results["test"], fitted_run.folder / "experiment/test/feedback.sqlite"
    assert (
        results["lost"] == 0
        and test["crossed"] == 0
        and test["mismatch"] > ab_statistics.SRM_ALPHA
        and not list(fitted_run.work_dir.glob("*/feedback.sqlite"))
    )
    with closing(sqlite3.connect(path)) as base:
        for arm in test["arms"]:
            visits, users = base.execute(
                "SELECT count(*), count(DISTINCT user) FROM lists WHERE NOT explored AND model = ?",
                [arm["model"]],
            ).fetchone()
            bought = base.execute(
                "SELECT count(*) FROM events WHERE event = 'purchase' AND list IN "
                "(SELECT id FROM lists WHERE NOT explored AND model = ?)",
                [arm["model"]],
            ).fetchone()[0]
            assert (arm["visits"], arm["users"], arm["bought"]) == (
                visits,
                users,
                bought,
            ) and users > 20
        every = base.execute("SELECT DISTINCT user, model FROM lists WHERE NOT explored").fetchall()
    assert [m for _, m in every] == ab_statistics.assign_arms(
        pl.Series([u for u, _ in every]), test["name"], {"popularity": 0.5, "hybrid": 0.5}, 0.1
    ).to_list()
    by = {a["model"]: a for a in test["arms"]}

    def rate(m):
        return by[m]["bought"] / by[m]["users"]

    assert np.isclose(
        test["effects"][0]["value"], rate("hybrid") - rate("popularity")
    ) and np.isclose(
        test["sequence"]["value"][-1],
        next(e["value"] for e in test["effects"] if e["metric"] == ab_statistics.PRIMARY_OUTCOME),
    )


def test_logged_propensities_are_those_of_the_model(fitted_run, results):
    "Check recomputed propensities, and estimates against the true values."
    rows = results["policies"]
    assert (
        [r["agrees"] for r in rows] == [1.0] * 3
        and np.isclose(rows[0]["effective_lists"], rows[0]["lists"])
        and np.isclose(rows[0]["estimates"]["IPS"][0], rows[0]["reward"])
    )
    for r in rows:
        assert ("refused" in r) != ("estimates" in r)
        if "estimates" in r:
            value, lo, hi = r["estimates"]["doubly robust"]
            assert abs(value - r["truth"]) < 3.5 * (hi - lo) / 3.92


def test_wrong_propensities_are_detected(fitted_run, results):
    exposures = feedback.load_exposures(
        fitted_run.folder / "experiment/drawn/feedback.sqlite"
    ).with_columns(propensity=pl.col("propensity") * 0.9)
    assert (
        ab_simulation.evaluate_policies(
            fitted_run,
            exposures,
            synthetic_users(fitted_run.manifest["dataset"]),
            ("hybrid", "popularity"),
            2,
        )[0]["agrees"]
        == 0.0
    )


def test_lists_that_were_not_sampled_are_refused(fitted_run, results):
    exposures = feedback.load_exposures(
        fitted_run.folder / "experiment/test/feedback.sqlite"
    ).filter(~pl.col("explored"))
    with pytest.raises(UserError, match="no sampled lists"):
        ab_simulation.evaluate_policies(fitted_run, exposures, None, ("hybrid", "popularity"))
    with pytest.raises(UserError, match="propensity is 1"):
        off_policy.check_overlap(
            exposures["propensity"].to_numpy(), exposures["propensity"].to_numpy()
        )


def test_crossed_users_are_left_out_and_lost_users_detected(fitted_run, results):
    exposures = feedback.load_exposures(fitted_run.folder / "experiment/test/feedback.sqlite")
    before, name, shares = (
        ab_statistics.pre_period_stats(fitted_run.read("interactions.parquet")),
        results["test"]["name"],
        {"popularity": 0.5, "hybrid": 0.5},
    )
    one = exposures.filter(~pl.col("explored"), pl.col("model") == "hybrid")[:1]
    crossed = ab_statistics.analyze_experiment(
        pl.concat([exposures, one.with_columns(model=pl.lit("popularity"))]),
        name,
        shares,
        0.1,
        before,
    )
    assert (
        crossed["crossed"] == 1
        and crossed["arms"][1]["users"] == results["test"]["arms"][1]["users"] - 1
    )
    gone = exposures.filter(
        (pl.col("model") == "hybrid")
        | pl.Series(ab_statistics.hash_uniform(exposures["user"], "gone") > 0.6)
    )
    lost = ab_statistics.analyze_experiment(gone, name, shares, 0.1, before)
    assert lost["mismatch"] < ab_statistics.SRM_ALPHA
    sentences = experiment_report.describe_experiment(
        {
            "test": lost,
            "pair": ("hybrid", "popularity"),
            "users": {},
            "lost": 0,
            "planned": results["planned"],
        }
    )
    assert "no conclusion is valid" in sentences[-1] and not any("So:" in s for s in sentences)


def test_files_that_are_no_feedback_store_are_refused(tmp_path):
    with pytest.raises(UserError, match="no feedback store"):
        feedback.load_exposures(tmp_path / "feedback.sqlite")
    (tmp_path / "feedback.sqlite").write_bytes(
        b"not a database, but long enough to be looked at as one" * 40
    )
    with pytest.raises(UserError, match="not a feedback store"):
        feedback.load_exposures(tmp_path / "feedback.sqlite")


@pytest.mark.long
def test_experiment_is_reproducible(fitted_run, results):
    "Check that users, arms and choices repeat; only the pilot depends on the service's sampling."
    fitted_run.work_dir = fitted_run.folder / ".work/experiment-again"
    again = ab_simulation.run_simulation(
        fitted_run,
        synthetic_users(fitted_run.manifest["dataset"]),
        ("hybrid", "popularity"),
        0.1,
        3,
        1000,
    )
    assert again["test"]["arms"] == results["test"]["arms"] and all(
        a == pytest.approx(b)
        for a, b in zip(again["test"]["effects"], results["test"]["effects"], strict=True)
    )


def test_decision_follows_the_interval(results):
    test = results["test"]
    for value, end in ((0.3, "use hybrid."), (-0.3, "use popularity.")):
        turned = [
            e | {"value": value, "lo": value - 0.1, "hi": value + 0.1} for e in test["effects"]
        ]
        assert experiment_report.describe_experiment(
            {"pair": ("hybrid", "popularity")} | results | {"test": test | {"effects": turned}}
        )[-1].endswith(end)
    level = [e | {"value": 0.01, "lo": -0.1, "hi": 0.12} for e in test["effects"]]
    assert (
        "no significant difference. Keep popularity"
        in experiment_report.describe_experiment(
            {"pair": ("hybrid", "popularity")} | results | {"test": test | {"effects": level}}
        )[-1]
    )


def test_report_page_fits(results, calibration, tmp_path, fits):
    plt.rcdefaults()  # other tests change them
    page = experiment_report.render_experiment(
        results | {"pair": ("hybrid", "popularity"), "calibration": calibration}, "demo"
    )
    (tmp_path / "experiment.html").write_text(page)
    assert page.count("currentColor") > 10  # the figure follows the color scheme
    fits(tmp_path / "experiment.html")


def experiment_summary(results, calibration, **changes):
    "Return the sentences of a changed experiment."
    sizes = {"metric": "liked per event", "effect": 0.1, "with CUPED": 800, "days": 21}
    base = results | {"pair": ("hybrid", "popularity"), "calibration": calibration}
    base |= {"required_sizes": {"sizes": [sizes]}} | changes
    sentences = experiment_report.experiment_in_short(base)
    for sentence in sentences:
        assert sentence.endswith(".") and not any(x in sentence for x in ("nan", "None", "()", "`"))
    return sentences


def test_experiment_in_short_follows_the_run(results, calibration):
    "Check the sentences with a winner, without one, with lost users and without a test."

    def with_effect(value, mismatch=0.5):
        effect = {"metric": ab_statistics.PRIMARY_OUTCOME, "value": value}
        effect |= {"lo": value - 0.05, "hi": value + 0.05}
        return {"test": results["test"] | {"effects": [effect], "mismatch": mismatch}}

    def summary(**changes):
        return experiment_summary(results, calibration, **changes)

    firsts = [summary(**with_effect(value))[0] for value in (0.1, -0.1, 0.0)]
    firsts.append(summary(**with_effect(0.1, mismatch=1e-9))[0])
    without = {name: value for name, value in results.items() if name != "test"}
    firsts.append(experiment_summary(without, calibration)[0])
    assert len(set(firsts)) == 5
    assert firsts[0].endswith("hybrid sells more.") and firsts[1].endswith("popularity sells more.")
    assert "cannot tell" in firsts[2] and "invalid" in firsts[3] and "real users" in firsts[4]
    worse = calibration | {"A/A": calibration["A/A"] | {"peeking": {"called": 2500, "covered": 0}}}
    assert experiment_summary(results, worse)[1] != summary()[1]
    assert "gives no number" in summary(required_sizes={"sizes": []})[2]


# other logs


def log_of(**columns):
    n = 300
    base = {
        "user": [f"u{i % 40}" for i in range(n)],
        "item": [f"i{i}" for i in range(n)],
        "rating": [1.0 + i * i % 5 for i in range(n)],
        "timestamp": [10**12 + i * 10**7 for i in range(n)],
    }
    return pl.DataFrame(
        base | columns,
        schema={"user": pl.String, "item": pl.String, "rating": pl.Float32, "timestamp": pl.Int64},
    ).with_columns(pl.col("timestamp").cast(pl.Datetime("ms")))


@pytest.mark.parametrize(
    "gone",
    [
        {},
        {"rating": [None] * 300},
        {"timestamp": [None] * 300},
        {"rating": [None] * 300, "timestamp": [None] * 300},
        {"user": ["u"] * 300},
        {"rating": [5.0] * 300},
    ],
)
def test_any_log_gets_sample_sizes(gone):
    required = ab_statistics.required_sample_sizes(log_of(**gone))
    assert (required["days"] is None) == ("timestamp" in gone) and len(required["metrics"]) == (
        1 if None in gone.get("rating", ()) else 3
    )
    for row in required["sizes"]:
        assert (
            row["with CUPED"] <= row["users"]
            and (row["days"] is None) == ("timestamp" in gone)
            and (row["days"] or 0) % 7 == 0
        )
    json.dumps(required, allow_nan=False)


def test_logs_of_real_users_get_a_plan_only():
    text = experiment_report.describe_experiment_plan(
        {"pair": ("hybrid", "popularity"), "groups": {"hybrid": 12, "popularity": 9, "holdout": 3}}
    )
    assert (
        "12" in text
        and "hold out 3" in text
        and experiment_report.describe_experiment(
            {
                "pair": ("hybrid", "popularity"),
                "groups": {"hybrid": 12, "popularity": 9, "holdout": 3},
            }
        )
        == [text]
    )
    assert synthetic_users("ciao.csv") is None


def test_a_model_is_not_compared_with_itself(fitted_run):
    fitted_run.write(
        "leaderboard.parquet",
        pl.DataFrame(
            schema={
                "model": pl.String,
                "value": pl.Float64,
                "lo": pl.Float64,
                "hi": pl.Float64,
                "n": pl.Int64,
                "versus": pl.String,
                "metric": pl.String,
                "users": pl.String,
                "items": pl.String,
                "relevant": pl.String,
            }
        ),
    )
    assert ab_simulation.pick_arms(fitted_run, "hybrid") == ("hybrid", "popularity")
    for names, words in (
        (("hybrid", "hybrid"), "itself"),
        (("nobody",), "unknown model"),
        (("popularity",), "no simple baseline"),
    ):
        with pytest.raises(UserError, match=words):
            ab_simulation.pick_arms(fitted_run, *names)
