"The same chance for everybody: spaces, searches that survive a kill, and rows that no trial may see."

import json
import math
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from widedeep_nb import comparison
from widedeep_nb.baselines import PARAM_GRIDS
from widedeep_nb.comparison import (
    BASE_PARAMS,
    RANKING_METRIC,
    RATING_METRIC,
    SEARCH_SPACES,
    best_trial,
    completed_trials,
    default_params,
    describe_fit,
    describe_tuning_gains,
    diagnose_curve,
    final_params,
    from_optuna_params,
    next_trial,
    objectives_for,
    open_journal,
    open_study,
    recommender_params,
    run_study,
    run_trial,
    study_name,
    to_optuna_params,
    to_registry_name,
    tune,
    tuning_gains,
)
from widedeep_nb.core import LOSSES, Run, UserError, make_recommender, to_interactions
from widedeep_nb.hybrid import best_epoch
from widedeep_nb.preprocessing import prepare, preprocess
from widedeep_nb.sequence import SEQUENCE_MODELS

ROOT = Path(__file__).parents[1]
FEW = ("mean", "damped-bias", "item-knn", "svd", "funk-svd", "gru", "wide-deep", "wide-deep-bpr")
everyone = [(name, metric) for name, of in SEARCH_SPACES.items() for metric in of]


def told(trials):
    return [
        (t["settings"], t["value"], t.get("curve"), t.get("epochs"), t.get("reason"))
        for t in trials
    ]


def step_alone(run, **how):
    "The step without the chapters before it, and with nothing left of an earlier try but its trials."
    shutil.rmtree(run.folder / ".work", ignore_errors=True)
    return tune.__wrapped__(run, **how)


def log_of(n=1200, seed=0, stars=True):
    "Sixty people of two tastes, thirty things."
    rng = np.random.default_rng(seed)
    user, item = rng.integers(0, 60, n), rng.integers(0, 30, n)
    item = np.where(rng.random(n) < 0.7, item - (item + user) % 2 * (item > 0), item)
    rating = (3 + (user % 2 == item % 2) + rng.integers(-1, 2, n)).astype("float32")
    log = pl.DataFrame(
        {
            "user": [f"u{u}" for u in user],
            "item": [f"i{i}" for i in item],
            "rating": rating if stars else [None] * n,
            "timestamp": 15 * 10**11 + np.arange(n) * 10**8,
        },
        schema_overrides={"rating": pl.Float32},
    )
    return to_interactions(log.unique(["user", "item"], keep="first", maintain_order=True))


@pytest.fixture(scope="module")
def small():
    return prepare(log_of(), "strict")


def run_of(folder, log=None, protocol="strict", seed=0):
    "A run whose rows are there, and who is asked; no model."
    place = folder / "toy"
    place.mkdir(parents=True)
    (log_of() if log is None else log).with_columns(pl.col("timestamp").dt.epoch("ms")).write_csv(
        place / "ratings.csv"
    )
    pl.DataFrame(
        {"item": [f"i{k}" for k in range(30)], "category": [f"A > {k % 2}" for k in range(30)]}
    ).write_csv(place / "items.csv")
    run = Run(folder / "run", dataset=str(place), protocol=protocol, seed=seed)
    preprocess(run)
    run.write("evaluation.json", {"relevant": 4.0, "max_users": 40})
    return run


@pytest.fixture
def few(monkeypatch):
    "A handful of contestants, quickly fitted."
    monkeypatch.setattr(comparison, "SEARCH_SPACES", {name: SEARCH_SPACES[name] for name in FEW})
    return FEW


def answers(run):
    "What tuning said, but not how long it took."
    tuning = run.read("tuning.json")
    for c in tuning["models"]:
        for timed in (c, *c["objectives"], *(t for q in c["objectives"] for t in q["results"])):
            timed.pop("seconds")
    return {k: v for k, v in tuning.items() if k != "seconds"}


def counted(monkeypatch):
    "Which trials are really made."
    made = []

    def watched(name, metric, *args, **how):
        made.append((name, metric))
        return run_trial(name, metric, *args, **how)

    monkeypatch.setattr(comparison, "run_trial", watched)
    return made


# --- the spaces


def test_everybody_is_there():
    assert set(SEARCH_SPACES) == {
        *PARAM_GRIDS,
        *SEQUENCE_MODELS,
        "content",
        "content-towers",
        "wide-deep",
        *(f"wide-deep-{loss}" for loss in LOSSES),
    }
    assert (
        [name for name, of in SEARCH_SPACES.items() if not of]
        == ["mean", "popularity", "content"]
        == [name for name, grid in PARAM_GRIDS.items() if not grid] + ["content"]
    )
    assert all(set(PARAM_GRIDS[name]) == set(SEARCH_SPACES[name]) for name in PARAM_GRIDS)


@pytest.mark.parametrize("name, metric", everyone)
def test_spaces_hold_the_default_and_nothing_unknown(name, metric):
    space, default = SEARCH_SPACES[name][metric], default_params(name, metric)
    assert (
        set(space) <= set(recommender_params(name))
        and "seed" not in space
        and set(BASE_PARAMS.get(name, {})) <= set(recommender_params(name))
    )
    for k, within in space.items():
        if isinstance(within, list):
            assert default[k] in within and len(set(map(str, within))) == len(within) > 1
        else:
            assert (
                within[0] <= default[k] <= within[1]
                and within[0] < within[1]
                and type(default[k]) is (int if "int" in str(within[2:]) else float)
            )
    assert from_optuna_params(space, to_optuna_params(space, default)) == default
    if name in PARAM_GRIDS:
        assert all(
            PARAM_GRIDS[name][metric][0][k] == default[k] for k in PARAM_GRIDS[name][metric][0]
        )


@pytest.mark.parametrize("side", [0, 1])
def test_the_corners_can_be_fitted(small, side):
    "With every setting at the same end of its range, each contestant learns, and its settings serve for the final fit."
    for name, metric in everyone:
        corner = {
            k: w[-side] if isinstance(w, list) else w[side]
            for k, w in SEARCH_SPACES[name][metric].items()
        } | ({"epochs": 2} if name == "neumf" else {})
        found = run_trial(name, metric, corner, small, 20, epochs=2)
        assert math.isfinite(found["value"]) and (
            ("epochs" in found) == ("patience" in recommender_params(name))
        )
        settings = json.loads(
            json.dumps(final_params(name, [{"settings": corner, **found}], small))
        )
        made = make_recommender(
            to_registry_name(name),
            **settings,
            **({"seed": 3} if "seed" in recommender_params(name) else {}),
        )
        if "epochs" in found:
            assert made.epochs == found["epochs"] and "seed" not in settings


def test_the_losses_are_trained_as_in_chapter_08(small, tmp_path, monkeypatch):
    "Batch, thinning, features and draws are those that `fit_with_loss` gives the model."
    from widedeep_nb import ranking

    made = {}

    class Watched(ranking.WideDeep):
        def fit(self, split):
            return made.setdefault(self.loss, self)

        def save(self, folder):
            self.loss_curve = []

    monkeypatch.setattr(ranking, "WideDeep", Watched)
    for loss in LOSSES:
        monkeypatch.setattr(Watched, "curve", [], raising=False)
        ranking.fit_with_loss(small, tmp_path, tmp_path / "c", loss, 8, 5, alpha=0.5, seed=0)
        ours = comparison.full_params(f"wide-deep-{loss}", {}, small)
        assert {
            k: list(v) if k == "features" else v for k, v in vars(made[loss]).items() if k in ours
        } == ours


# --- a search


def test_a_trial_is_the_default_first_then_others(small):
    tried = run_study(open_study(None, "a", RATING_METRIC), "funk-svd", RATING_METRIC, 6, small)
    assert (
        tried[0]["settings"] == default_params("funk-svd", RATING_METRIC)
        and len({json.dumps(t["settings"]) for t in tried}) == 6
    )
    for t in tried:
        assert t["value"] == run_trial("funk-svd", RATING_METRIC, t["settings"], small)["value"]
    assert best_trial(tried, RATING_METRIC)["value"] == min(t["value"] for t in tried)
    other = run_study(
        open_study(None, "a", RATING_METRIC), "funk-svd", RATING_METRIC, 6, small, seed=1
    )
    assert (
        other[0]["settings"] == tried[0]["settings"]
        and other[1]["settings"] != tried[1]["settings"]
    )
    assert (
        SEARCH_SPACES["user-knn"][RANKING_METRIC] == SEARCH_SPACES["item-knn"][RANKING_METRIC]
    )  # the same space, but not the same luck
    near = [
        run_study(open_study(None, "a", RANKING_METRIC), name, RANKING_METRIC, 2, small)
        for name in ("user-knn", "item-knn")
    ]
    assert (
        near[0][0]["settings"] == near[1][0]["settings"]
        and near[0][1]["settings"] != near[1][1]["settings"]
    )


def test_the_best_of_lists_is_the_largest(small):
    tried = run_study(open_study(None, "a", RANKING_METRIC), "svd", RANKING_METRIC, 5, small)
    assert best_trial(tried, RANKING_METRIC)["value"] == max(t["value"] for t in tried)


@pytest.mark.parametrize(
    "name, metric, sign", [("svd", RANKING_METRIC, 1), ("damped-bias", RATING_METRIC, -1)]
)
def test_it_looks_where_good_settings_were(monkeypatch, name, metric, sign):
    "A figure that is best near the upper end: what is proposed later lies nearer to it."
    ((setting, (low, high, _)),) = SEARCH_SPACES[name][metric].items()

    def off(chosen):
        return abs(math.log(chosen[setting] / low) / math.log(high / low) - 0.9)

    monkeypatch.setattr(
        comparison,
        "run_trial",
        lambda name, metric, chosen, *args, **how: {"value": 1 - sign * off(chosen)},
    )
    far = [
        off(t["settings"]) for t in run_study(open_study(None, "a", metric), name, metric, 30, None)
    ]
    assert np.median(far[15:]) < 0.5 * np.median(far[1:8])


def test_cut_off_after_any_trial_it_goes_on_alike(small, tmp_path, monkeypatch):
    "Eight trials, so that what was learnt from the first four is part of it; cut off in the middle of each of them."
    whole = told(
        run_study(open_study(None, "a", RATING_METRIC), "funk-svd", RATING_METRIC, 8, small)
    )
    for k in range(1, 9):
        made = []

        def cut(*args, **how):
            made.append(args)
            if len(made) == k:
                raise KeyboardInterrupt
            return run_trial(*args, **how)

        path = tmp_path / str(k)
        monkeypatch.setattr(comparison, "run_trial", cut)
        with pytest.raises(KeyboardInterrupt):
            run_study(
                open_study(open_journal(path), "a", RATING_METRIC),
                "funk-svd",
                RATING_METRIC,
                8,
                small,
            )
        with open(path, "ab") as f:
            f.write(b'{"op_code": 5, "worker')
        Path(f"{path}.lock").touch()
        journal = open_journal(path)
        assert not Path(f"{path}.lock").exists()
        study = open_study(journal, "a", RATING_METRIC)
        assert (
            told(run_study(study, "funk-svd", RATING_METRIC, 8, small)) == whole and len(made) == 9
        )
        assert len(study.trials) == 9 and len(completed_trials(study)) == 8


def test_left_overs_do_not_change_what_is_proposed(small):
    plain, littered = [open_study(None, "a", RATING_METRIC) for _ in range(2)]
    for n in range(1, 8):
        for _ in range(3):
            next_trial(littered, "funk-svd", RATING_METRIC)
        assert told(run_study(littered, "funk-svd", RATING_METRIC, n, small)) == told(
            run_study(plain, "funk-svd", RATING_METRIC, n, small)
        )


def test_killed_between_two_strokes_of_the_pen(small):
    "With the default written down as the next one, but not begun."
    study = open_study(None, "a", RANKING_METRIC)
    study.enqueue_trial(
        to_optuna_params(
            SEARCH_SPACES["svd"][RANKING_METRIC], default_params("svd", RANKING_METRIC)
        )
    )
    assert told(run_study(study, "svd", RANKING_METRIC, 4, small)) == told(
        run_study(open_study(None, "a", RANKING_METRIC), "svd", RANKING_METRIC, 4, small)
    )


def test_the_seed_is_that_of_the_run(small):
    one, two, again = [
        run_trial("gru", RANKING_METRIC, {}, small, epochs=2, seed=seed) for seed in (0, 1, 0)
    ]
    assert one == again and one["curve"] != two["curve"]


def test_more_trials_go_on_and_fewer_are_the_first(small, tmp_path, monkeypatch):
    made = counted(monkeypatch)
    whole = told(run_study(open_study(None, "a", RANKING_METRIC), "svd", RANKING_METRIC, 6, small))
    for n, new in ((2, 2), (5, 3), (6, 1), (4, 0), (6, 0)):
        made.clear()
        study = open_study(open_journal(tmp_path / "journal"), "a", RANKING_METRIC)
        assert (
            told(run_study(study, "svd", RANKING_METRIC, n, small)) == whole[:n]
            and len(made) == new
        )


def test_a_trial_that_cannot_be_made_counts_with_its_reason(small, monkeypatch):
    calls = []

    def picky(name, metric, chosen, *args, **how):
        calls.append(chosen)
        if len(calls) in (2, 4):
            raise UserError("too large")
        return run_trial(name, metric, chosen, *args, **how)

    monkeypatch.setattr(comparison, "run_trial", picky)
    study = open_study(None, "a", RANKING_METRIC)
    tried = run_study(study, "svd", RANKING_METRIC, 6, small)
    assert [t.get("reason") for t in tried] == [
        None,
        "too large",
        None,
        "too large",
        None,
        None,
    ] and [t["value"] is None for t in tried] == [False, True, False, True, False, False]
    assert (
        len(calls) == 6
        and len({json.dumps(c) for c in calls}) > 4
        and best_trial(tried, RANKING_METRIC)["value"] is not None
    )
    calls.clear(), calls.append(None)
    study = open_study(None, "b", RANKING_METRIC)
    for _ in range(2):  # and not again on another day
        with pytest.raises(UserError, match="too large"):
            run_study(study, "svd", RANKING_METRIC, 6, small)
        assert len(calls) == 2
    monkeypatch.setattr(comparison, "val_score", lambda *args: math.nan)
    with pytest.raises(UserError, match="no numbers"):
        run_trial("svd", RANKING_METRIC, {}, small)


def test_passes_and_curve_are_those_of_the_best_trial(small, tmp_path):
    for name, metric in (("gru", RANKING_METRIC), ("wide-deep", RATING_METRIC)):
        one = comparison.tune_model(
            name, {metric: "toy"}, small, tmp_path / name, 3, how={"epochs": 4}
        )
        best = best_trial(
            run_study(
                open_study(open_journal(tmp_path / name), "toy", metric), name, metric, 3, small
            ),
            metric,
        )
        assert one["curve"] == best["curve"] and one["settings"]["epochs"] == best[
            "epochs"
        ] == best_epoch(name, best["curve"])
        judged = [row["val"] for row in best["curve"]]
        assert best["epochs"] == 1 + judged.index((max if name == "gru" else min)(judged))
        for final in (
            small.merge_train_val(),
            small,
        ):  # under some protocols the final fit has a validation part, and must not stop at it
            assert (
                len(make_recommender(name, **one["settings"]).fit(final).loss_curve)
                == best["epochs"]
            )


# --- the step


@pytest.fixture(scope="module")
def everybody(tmp_path_factory):
    run = run_of(tmp_path_factory.mktemp("all") / "x")
    step_alone(run, results=2, epochs=1)
    return run


def test_everybody_has_as_many_trials(everybody):
    tuning = everybody.read("tuning.json")
    assert (
        tuning["excluded"] == {}
        and [c["model"] for c in tuning["models"]] == list(SEARCH_SPACES)
        and tuning["trials"] == 2
    )
    asked = {c["model"]: [q["metric"] for q in c["objectives"]] for c in tuning["models"]}
    assert asked == {
        name: [RATING_METRIC] if name == "wide-deep" else list(of)
        for name, of in SEARCH_SPACES.items()
    }
    for c in tuning["models"]:
        assert set(c) == {
            "model",
            "registry_name",
            "settings",
            "seconds",
            "objectives",
            "curve",
        } and (c["curve"] is not None) == ("patience" in recommender_params(c["model"]))
        for q in c["objectives"]:
            assert (
                q["trials"] == len(q["results"]) == 2
                and q["results"][0]["value"] == q["default"]
                and q["best"] == best_trial(q["results"], q["metric"])["value"]
            )
            assert q["results"][0]["settings"] == json.loads(
                json.dumps(default_params(c["model"], q["metric"]))
            )
            chosen = best_trial(q["results"], q["metric"])["settings"]
            assert {k: c["settings"][k] for k in chosen if k != "epochs" or "epochs" in chosen} == {
                k: v for k, v in chosen.items() if k != "epochs" or "epochs" in chosen
            }
        make_recommender(c["registry_name"], **c["settings"])
    assert tuning["split_note"] == "the validation part" and set(tuning["baselines"]) == {
        RATING_METRIC,
        RANKING_METRIC,
    }
    assert {p.stem for p in (everybody.folder / "tuning").glob("*.journal")} >= {
        c["model"] for c in tuning["models"] if c["objectives"]
    } and (everybody.folder / "tuning.json").exists()


KILLED = """
import os, signal, sys
from widedeep_nb import comparison as c
made, attempt, tell = [], c.attempt, c.optuna.Study.tell
c.SPACES = {name: c.SPACES[name] for name in %r}
def die(): os.kill(os.getpid(), signal.SIGKILL)
def counted(*args, **how):
    made.append(args)
    found = attempt(*args, **how)
    if len(made) == %d and %r == "in a trial": die()
    return found
def told(self, trial, *args, **how):
    if len(made) == %d and %r == "before it is told" and not isinstance(trial, int): die()
    return tell(self, trial, *args, **how)
c.attempt, c.optuna.Study.tell = counted, told
c.tune.__wrapped__(c.Run(sys.argv[1]), trials=3, epochs=2)
"""


def test_killed_for_good(tmp_path, few):
    "A process that really dies, in the middle of a trial and with a trial made but not told; what goes on is what would have been."
    run = run_of(tmp_path / "a")
    fresh = [shutil.copytree(run.folder.parent, tmp_path / str(i)) / "run" for i in range(2)]
    step_alone(run, results=3, epochs=2)
    for folder, k, when in zip(fresh, (1, 15), ("in a trial", "before it is told")):
        died = subprocess.run(
            [sys.executable, "-c", KILLED % (FEW, k, when, k, when), str(folder)],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        assert died.returncode == -signal.SIGKILL, died.stderr
        assert (
            any(p.stat().st_size for p in (folder / "tuning").iterdir())
            and not (folder / "tuning.json").exists()
        )
        made = pytest.MonkeyPatch()
        calls = counted(made)
        step_alone(Run(folder), results=3, epochs=2)
        made.undo()
        assert answers(Run(folder)) == answers(run) and len(calls) == 3 * 8 - k + 1


def without_order(part):
    return part.with_columns(item=pl.col("item").reverse(), rating=6 - pl.col("rating").reverse())


@pytest.mark.parametrize("protocol", ["strict", "rolling"])
def test_test_rows_are_never_read(tmp_path, few, monkeypatch, protocol):
    "Other test rows, and under a rolling protocol other later windows: the same answers. Other validation rows: others."
    log = log_of() if protocol == "strict" else log_of(4000)
    run = run_of(tmp_path / "a", log, protocol)
    copies = [Run(shutil.copytree(run.folder, tmp_path / str(i))) for i in range(2)]
    tables = (
        ["test.parquet"]
        if protocol == "strict"
        else [
            f"{at}{part}.parquet"
            for at in ("cuts/1/", "cuts/2/", "")
            for part in ("train", "val", "test")
        ]
        + ["cuts/0/test.parquet"]
    )
    for name in tables:
        copies[0].write(name, without_order(run.read(name)))
    first = "" if protocol == "strict" else "cuts/0/"
    copies[1].write(f"{first}val.parquet", without_order(run.read(f"{first}val.parquet")))
    for r in (run, *copies):
        step_alone(r, results=2, epochs=1)
    assert answers(copies[0]) == answers(run) != answers(copies[1])
    assert len(run.read("tuning.json")["models"]) == len(FEW)
    assert ("oldest of 4 windows" in answers(run)["split_note"]) == (protocol == "rolling")


def test_other_data_never_meets_old_trials(tmp_path, few, monkeypatch):
    "In one folder: other rows, another seed, another protocol, another space, other passes."
    made, run = counted(monkeypatch), run_of(tmp_path / "a")
    step_alone(run, results=2, epochs=1)
    total = len(made)
    made.clear(), step_alone(run, results=2, epochs=1)
    assert not made
    row = run.read("train.parquet")
    run.write(
        "train.parquet",
        row.with_columns(
            rating=pl.when(pl.int_range(pl.len()) == 5)
            .then(6 - pl.col("rating"))
            .otherwise(pl.col("rating"))
        ),
    )
    made.clear(), step_alone(run, results=2, epochs=1)
    assert len(made) == total
    run.write("train.parquet", row)
    made.clear(), step_alone(run, results=2, epochs=1)
    assert not made
    step_alone(run, results=2, epochs=2)
    assert len(made) == total
    run.update_manifest(seed=1)
    made.clear(), step_alone(run, results=2, epochs=1)
    assert len(made) == total
    run.update_manifest(seed=0)
    monkeypatch.setitem(
        comparison.SEARCH_SPACES, "svd", {RANKING_METRIC: {"factors": (2, 127, "log int")}}
    )
    made.clear(), step_alone(run, results=2, epochs=1)
    assert made == [("svd", RANKING_METRIC)] * 2
    names = [
        study_name(run, "svd", RANKING_METRIC, max_softmax_items=most, epochs=1)
        for most in (40, 41)
    ]
    assert names[0] != names[1] and all(
        part in names[0] for part in ("svd", RANKING_METRIC, "toy", "strict", "seed 0")
    )
    table = run.read("split/protocol.json")
    run.write("split/protocol.json", table | {"mask_seen": False})
    assert study_name(run, "svd", RANKING_METRIC, max_softmax_items=40, epochs=1) != names[0]


def test_what_is_wrong_is_said_in_a_line(tmp_path, few, monkeypatch):
    run = run_of(tmp_path / "a")
    for how, said in (
        ({"trials": 0}, "trials is at least 1, not 0"),
        ({"trials": -3}, "trials is at least 1"),
        ({"epochs": 0}, "epochs is at least 1"),
    ):
        with pytest.raises(UserError, match=said):
            step_alone(run, **how)
    assert not (run.folder / "tuning.json").exists()
    (run.folder / "tuning").mkdir()
    (run.folder / f"tuning/{FEW[1]}.journal").write_text("no journal\n{}\n{}\n")
    with pytest.raises(UserError, match="remove it to tune anew"):
        step_alone(run)
    shutil.rmtree(run.folder / "tuning")

    def narrow(name, *args, **how):
        if name in ("gru", "item-knn"):
            raise UserError(f"{name} would take too much")
        return run_trial(name, *args, **how)

    monkeypatch.setattr(comparison, "run_trial", narrow)
    step_alone(run, results=2, epochs=1)
    tuning = run.read("tuning.json")
    assert tuning["excluded"] == {
        name: f"{name} would take too much" for name in ("item-knn", "gru")
    }
    assert [c["model"] for c in tuning["models"]] == [n for n in FEW if n not in tuning["excluded"]]


def test_without_stars_only_lists_are_asked_for(tmp_path, monkeypatch):
    keep = (*FEW, "ease", "wide-deep-mse")
    monkeypatch.setattr(comparison, "SEARCH_SPACES", {name: SEARCH_SPACES[name] for name in keep})
    run = run_of(tmp_path / "a", log_of(stars=False))
    step_alone(run, results=2, epochs=1)
    tuning = run.read("tuning.json")
    assert set(tuning["excluded"]) == {"mean", "damped-bias", "funk-svd", "wide-deep-mse"} and set(
        tuning["excluded"].values()
    ) == {"this log has no stars to learn from"}
    assert {c["model"]: [q["metric"] for q in c["objectives"]] for c in tuning["models"]} == {
        n: [RANKING_METRIC] for n in keep if n not in tuning["excluded"]
    }
    assert list(tuning["baselines"]) == [RANKING_METRIC]


@pytest.mark.parametrize("reason", ["no rows", "nobody knows their items"])
def test_without_validation_the_defaults_stay(tmp_path, few, why):
    run = run_of(tmp_path / "a", log_of(stars=False) if why != "no rows" else None)
    val = run.read("val.parquet")
    run.write(
        "val.parquet",
        val.clear()
        if why == "no rows"
        else val.with_columns(item=pl.lit(run.load_splits()[0].n_train_items, pl.Int32)).cast(
            val.schema
        ),
    )
    step_alone(run, results=2, epochs=1)
    tuning = run.read("tuning.json")
    assert (
        tuning["split_note"].startswith("none: nobody in the validation part")
        and tuning["baselines"] == {}
        and tuning["seconds"] == 0
    )
    assert all(
        c["objectives"] == [] and c["curve"] is None and c["seconds"] == 0 for c in tuning["models"]
    )
    settings = {c["model"]: c["settings"] for c in tuning["models"]}
    assert (
        all(settings[n] == {} for n in settings if n not in BASE_PARAMS)
        and settings["wide-deep-bpr"]["epochs"] == 5
    )
    assert len(tuning_gains(tuning)) == 0


# --- words


def test_questions_do_not_tune_a_setting_twice():
    assert objectives_for("wide-deep", {RANKING_METRIC: 0, RATING_METRIC: 0}) == [
        RATING_METRIC
    ] and objectives_for("user-knn", {RANKING_METRIC: 0, RATING_METRIC: 0}) == [
        RANKING_METRIC,
        RATING_METRIC,
    ]
    assert (
        objectives_for("user-knn", {})
        == []
        == objectives_for("mean", {RANKING_METRIC: 0, RATING_METRIC: 0})
    )


def test_words_follow_the_numbers(everybody):
    tuning = everybody.read("tuning.json")
    rows = tuning_gains(tuning)
    assert (
        len(rows) == sum(len(c["objectives"]) for c in tuning["models"])
        and (rows["gain"] >= 0).all()
    )
    for metric, sign in ((RANKING_METRIC, 1), (RATING_METRIC, -1)):
        mine = rows.filter(metric=metric)
        assert (
            mine["best"].to_list() == sorted(mine["best"], reverse=sign > 0)
            and ((mine["best"] - mine["default"]) * sign >= 0).all()
        )
        assert describe_tuning_gains(mine).startswith(f"In {metric}")
    level = rows.filter(metric=RANKING_METRIC).with_columns(best="default", gain=pl.lit(0.0))
    assert describe_tuning_gains(level) == "In NDCG@20 no trial beats a default."

    def line(train, val):
        return [{"epoch": i + 1, "train": t, "val": v} for i, (t, v) in enumerate(zip(train, val))]

    assert (
        diagnose_curve("gru", line([3, 2, 1], [0.1, 0.3, 0.2])) == "overfits"
        and diagnose_curve("gru", line([3, 2, 2.5], [0.1, 0.3, 0.2])) == "levels off"
    )
    assert (
        diagnose_curve("wide-deep", line([3, 2, 1], [0.1, 0.3, 0.2])) == "overfits"
        and diagnose_curve("wide-deep", line([3, 2], [0.3, 0.1])) == "still learns"
    )
    assert (
        describe_fit({"gru": line([3, 2], [0.1, 0.3])})
        == "None overfits within its passes. It still got better in its last pass: gru (2)."
    )
