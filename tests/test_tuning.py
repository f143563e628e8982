"Tuning: search spaces, studies that survive a kill, and rows that no trial may read."

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

from widedeep_nb import leaderboard
from widedeep_nb.leaderboard import tune, tuning_gains
from widedeep_nb.lib import loss_comparison, tuning
from widedeep_nb.lib import wide_deep as wide_deep_module
from widedeep_nb.lib.comparison import PARAM_GRIDS
from widedeep_nb.lib.core import UserError, to_interactions
from widedeep_nb.lib.ensemble import best_epoch
from widedeep_nb.lib.leaderboard_plots import describe_fit, describe_tuning_gains, diagnose_curve
from widedeep_nb.lib.recommender import LOSSES, make_recommender
from widedeep_nb.lib.runs import Run
from widedeep_nb.lib.tuning import (
    RANKING_METRIC,
    RATING_METRIC,
    best_trial,
    completed_trials,
    default_params,
    final_params,
    from_optuna_params,
    loss_variants,
    next_trial,
    objectives_for,
    open_journal,
    open_study,
    recommender_params,
    run_study,
    run_trial,
    search_spaces,
    study_name,
    to_optuna_params,
    to_registry_name,
)
from widedeep_nb.preprocessing import prepare, preprocess
from widedeep_nb.sequences import SEQUENCE_MODELS

ROOT = Path(__file__).parents[1]
FEW = ("mean", "damped-bias", "item-knn", "svd", "funk-svd", "gru", "wide-deep", "wide-deep-bpr")
OBJECTIVES = [(name, metric) for name, spaces in search_spaces().items() for metric in spaces]
BOTH = {RANKING_METRIC: 0, RATING_METRIC: 0}


def comparable(trials):
    "Return what must be equal in equal trials: all but the seconds."
    keys = ("settings", "value", "curve", "epochs", "reason")
    return [[trial.get(key) for key in keys] for trial in trials]


def tune_alone(run, **options):
    "Run the step without those before it; of earlier work only the trials remain."
    shutil.rmtree(run.folder / ".work", ignore_errors=True)
    return tune.__wrapped__(run, **options)


def toy_log(n=1200, seed=0, with_ratings=True):
    "Make a log of 60 users with two tastes and 30 items."
    rng = np.random.default_rng(seed)
    user, item = rng.integers(0, 60, n), rng.integers(0, 30, n)
    item = np.where(rng.random(n) < 0.7, item - (item + user) % 2 * (item > 0), item)
    rating = (3 + (user % 2 == item % 2) + rng.integers(-1, 2, n)).astype("float32")
    columns = {
        "user": [f"u{u}" for u in user],
        "item": [f"i{i}" for i in item],
        "rating": rating if with_ratings else [None] * n,
        "timestamp": 15 * 10**11 + np.arange(n) * 10**8,
    }
    log = pl.DataFrame(columns, schema_overrides={"rating": pl.Float32})
    return to_interactions(log.unique(["user", "item"], keep="first", maintain_order=True))


@pytest.fixture(scope="module")
def small():
    return prepare(toy_log(), "strict")


def toy_run(folder, log=None, protocol="strict", seed=0):
    "Make a run with its splits and evaluation settings, but without models."
    data = folder / "toy"
    data.mkdir(parents=True)
    log = toy_log() if log is None else log
    log.with_columns(pl.col("timestamp").dt.epoch("ms")).write_csv(data / "ratings.csv")
    ids, categories = [f"i{k}" for k in range(30)], [f"A > {k % 2}" for k in range(30)]
    pl.DataFrame({"item": ids, "category": categories}).write_csv(data / "items.csv")
    run = Run(folder / "run", dataset=str(data), protocol=protocol, seed=seed)
    preprocess(run)
    run.write("evaluation.json", {"relevant": 4.0, "max_users": 40})
    return run


@pytest.fixture
def few(monkeypatch):
    "Reduce the comparison to a few models that are fitted quickly."
    spaces = {name: search_spaces()[name] for name in FEW}
    for module in (leaderboard, tuning):
        monkeypatch.setattr(module, "search_spaces", lambda: spaces)
    return FEW


def report_of(run):
    "Return the tuning report without its seconds."
    report = run.read("tuning.json")
    report.pop("seconds")
    for model in report["models"]:
        model.pop("seconds")
        for objective in model["objectives"]:
            objective.pop("seconds")
            for result in objective["results"]:
                result.pop("seconds")
    return report


def count_trials(monkeypatch):
    "Record which trials are really run."
    made = []

    def counted_trial(name, metric, *args, **options):
        made.append((name, metric))
        return run_trial(name, metric, *args, **options)

    monkeypatch.setattr(tuning, "run_trial", counted_trial)
    return made


# --- search spaces


def test_all_models_have_a_space():
    content = ("content", "content-towers")
    wide_deep = [f"wide-deep-{loss}" for loss in LOSSES]
    expected = {*PARAM_GRIDS, *SEQUENCE_MODELS, *content, "wide-deep", *wide_deep}
    assert set(search_spaces()) == expected
    untuned = [name for name, spaces in search_spaces().items() if not spaces]
    assert untuned == ["mean", "popularity", "content"]
    assert untuned == [name for name, grid in PARAM_GRIDS.items() if not grid] + ["content"]
    for name, grid in PARAM_GRIDS.items():
        assert set(grid) == set(search_spaces()[name])


@pytest.mark.parametrize("name, metric", OBJECTIVES)
def test_spaces_contain_the_default_and_no_unknown_setting(name, metric):
    space, default = search_spaces()[name][metric], default_params(name, metric)
    known = set(recommender_params(name))
    assert set(space) <= known and "seed" not in space
    assert set(loss_variants().get(name, {})) <= known
    for setting, search_range in space.items():
        value = default[setting]
        if isinstance(search_range, list):
            assert value in search_range
            assert len(set(map(str, search_range))) == len(search_range) > 1
        else:
            low, high, *scale = search_range
            assert low < high and low <= value <= high
            assert type(value) is (int if "int" in str(scale) else float)
    assert from_optuna_params(space, to_optuna_params(space, default)) == default
    if name in PARAM_GRIDS:
        for setting, value in PARAM_GRIDS[name][metric][0].items():
            assert value == default[setting]


def corner_of(name, metric, side):
    "Return settings that are all at the same end of their ranges."
    settings = {}
    for setting, search_range in search_spaces()[name][metric].items():
        is_choice = isinstance(search_range, list)
        settings[setting] = search_range[-side] if is_choice else search_range[side]
    return settings | ({"epochs": 2} if name == "neumf" else {})


@pytest.mark.parametrize("side", [0, 1])
def test_corners_can_be_fitted(small, side):
    "Check that each model can be fitted there, and that the final settings are complete."
    for name, metric in OBJECTIVES:
        known = recommender_params(name)
        corner = corner_of(name, metric, side)
        result = run_trial(name, metric, corner, small, 20, epochs=2)
        assert math.isfinite(result["value"])
        assert ("epochs" in result) == ("patience" in known)
        settings = final_params(name, [{"settings": corner, **result}], small)
        settings = json.loads(json.dumps(settings))
        seed = {"seed": 3} if "seed" in known else {}
        model = make_recommender(to_registry_name(name), **settings, **seed)
        if "epochs" in result:
            assert model.epochs == result["epochs"] and "seed" not in settings


def test_losses_are_trained_as_in_chapter_08(small, tmp_path, monkeypatch):
    "Check that batch size, stride, features and negatives are those of `fit_with_loss`."
    made = {}
    parent = wide_deep_module.WideDeepRecommender

    class RecordedWideDeep(parent):
        loss_curve = []

        def fit(self, split):
            return made.setdefault(self.loss, self)

        def save(self, folder):
            pass

    monkeypatch.setattr(loss_comparison, "WideDeepRecommender", RecordedWideDeep)
    for loss in LOSSES:
        loss_comparison.fit_with_loss(
            small, tmp_path, tmp_path / "c", loss, 8, 5, alpha=0.5, seed=0
        )
        expected = tuning.full_params(f"wide-deep-{loss}", {}, small)
        settings = {k: v for k, v in vars(made[loss]).items() if k in expected}
        settings["features"] = list(settings["features"])
        assert settings == expected


# --- studies


def svd_study(journal=None):
    return open_study(journal, "a", RANKING_METRIC)


def funk_study(journal=None):
    return open_study(journal, "a", RATING_METRIC)


def run_svd(study, n, split):
    return run_study(study, "svd", RANKING_METRIC, n, split)


def run_funk(study, n, split, **options):
    return run_study(study, "funk-svd", RATING_METRIC, n, split, **options)


def test_the_first_trial_is_the_default(small):
    trials = run_funk(funk_study(), 6, small)
    settings = [trial["settings"] for trial in trials]
    assert settings[0] == default_params("funk-svd", RATING_METRIC)
    assert len({json.dumps(s) for s in settings}) == 6
    for trial in trials:
        repeated = run_trial("funk-svd", RATING_METRIC, trial["settings"], small)
        assert trial["value"] == repeated["value"]
    best = best_trial(trials, RATING_METRIC)
    assert best["value"] == min(trial["value"] for trial in trials)
    other_seed = run_funk(funk_study(), 6, small, seed=1)
    assert other_seed[0]["settings"] == settings[0] and other_seed[1]["settings"] != settings[1]


def test_equal_spaces_have_different_random_trials(small):
    names = ("user-knn", "item-knn")
    user_space, item_space = [search_spaces()[name][RANKING_METRIC] for name in names]
    assert user_space == item_space
    user, item = [run_study(svd_study(), name, RANKING_METRIC, 2, small) for name in names]
    assert user[0]["settings"] == item[0]["settings"]
    assert user[1]["settings"] != item[1]["settings"]


def test_the_best_ranking_is_the_largest(small):
    trials = run_svd(svd_study(), 5, small)
    assert best_trial(trials, RANKING_METRIC)["value"] == max(trial["value"] for trial in trials)


@pytest.mark.parametrize(
    "name, metric, sign", [("svd", RANKING_METRIC, 1), ("damped-bias", RATING_METRIC, -1)]
)
def test_later_trials_are_nearer_to_good_settings(monkeypatch, name, metric, sign):
    "Check this for a score that is best near the upper end of the range."
    ((setting, (low, high, _)),) = search_spaces()[name][metric].items()

    def distance(settings):
        return abs(math.log(settings[setting] / low) / math.log(high / low) - 0.9)

    def scored_trial(name, metric, params, *args, **options):
        return {"value": 1 - sign * distance(params)}

    monkeypatch.setattr(tuning, "run_trial", scored_trial)
    trials = run_study(open_study(None, "a", metric), name, metric, 30, None)
    distances = [distance(trial["settings"]) for trial in trials]
    assert np.median(distances[15:]) < 0.5 * np.median(distances[1:8])


def test_a_study_continues_after_any_interruption(small, tmp_path, monkeypatch):
    "Check all of eight trials, so that proposals from four earlier results are among them."
    complete = comparable(run_funk(funk_study(), 8, small))
    for k in range(1, 9):
        made = []

        def interrupted_trial(*args, **options):
            made.append(args)
            if len(made) == k:
                raise KeyboardInterrupt
            return run_trial(*args, **options)

        path = tmp_path / str(k)
        monkeypatch.setattr(tuning, "run_trial", interrupted_trial)
        with pytest.raises(KeyboardInterrupt):
            run_funk(funk_study(open_journal(path)), 8, small)
        with open(path, "ab") as file:
            file.write(b'{"op_code": 5, "worker')
        lock = Path(f"{path}.lock")
        lock.touch()
        journal = open_journal(path)
        assert not lock.exists()
        study = funk_study(journal)
        assert comparable(run_funk(study, 8, small)) == complete and len(made) == 9
        assert len(study.trials) == 9 and len(completed_trials(study)) == 8


def test_unfinished_trials_do_not_change_proposals(small):
    clean, littered = funk_study(), funk_study()
    for n in range(1, 8):
        for _ in range(3):
            next_trial(littered, "funk-svd", RATING_METRIC)
        expected = comparable(run_funk(clean, n, small))
        assert comparable(run_funk(littered, n, small)) == expected


def test_an_enqueued_default_is_not_enqueued_again(small):
    study, space = svd_study(), search_spaces()["svd"][RANKING_METRIC]
    study.enqueue_trial(to_optuna_params(space, default_params("svd", RANKING_METRIC)))
    expected = comparable(run_svd(svd_study(), 4, small))
    assert comparable(run_svd(study, 4, small)) == expected


def test_the_seed_is_that_of_the_run(small):
    first, other, repeated = [
        run_trial("gru", RANKING_METRIC, {}, small, epochs=2, seed=seed) for seed in (0, 1, 0)
    ]
    assert first == repeated and first["curve"] != other["curve"]


def test_more_trials_are_added_and_fewer_are_the_first(small, tmp_path, monkeypatch):
    made = count_trials(monkeypatch)
    complete = comparable(run_svd(svd_study(), 6, small))
    for n, n_new in ((2, 2), (5, 3), (6, 1), (4, 0), (6, 0)):
        made.clear()
        study = svd_study(open_journal(tmp_path / "journal"))
        assert comparable(run_svd(study, n, small)) == complete[:n] and len(made) == n_new


def test_a_failed_trial_counts_with_its_reason(small, monkeypatch):
    calls = []

    def failing_trial(name, metric, params, *args, **options):
        calls.append(params)
        if len(calls) in (2, 4):
            raise UserError("too large")
        return run_trial(name, metric, params, *args, **options)

    monkeypatch.setattr(tuning, "run_trial", failing_trial)
    trials = run_svd(svd_study(), 6, small)
    failed = [False, True, False, True, False, False]
    assert [trial.get("reason") for trial in trials] == ["too large" if f else None for f in failed]
    assert [trial["value"] is None for trial in trials] == failed
    assert len(calls) == 6 and len({json.dumps(params) for params in calls}) > 4
    assert best_trial(trials, RANKING_METRIC)["value"] is not None
    calls[:] = [None]
    study = open_study(None, "b", RANKING_METRIC)
    for _ in range(2):  # a default that failed is not tried again later
        with pytest.raises(UserError, match="too large"):
            run_svd(study, 6, small)
        assert len(calls) == 2


def test_a_score_must_be_finite(small, monkeypatch):
    table = pl.DataFrame({RANKING_METRIC: [math.nan]})
    monkeypatch.setattr(tuning, "validation_table", lambda *args: table)
    with pytest.raises(UserError, match="not a finite number"):
        run_trial("svd", RANKING_METRIC, {}, small)


@pytest.mark.parametrize("name, metric", [("gru", RANKING_METRIC), ("wide-deep", RATING_METRIC)])
def test_epochs_and_curve_are_those_of_the_best_trial(small, tmp_path, name, metric):
    path, studies = tmp_path / name, {metric: "toy"}
    model = tuning.tune_model(name, studies, small, path, 3, options={"epochs": 4})
    study = open_study(open_journal(path), "toy", metric)
    best = best_trial(run_study(study, name, metric, 3, small), metric)
    epochs, settings = best["epochs"], model["settings"]
    assert model["curve"] == best["curve"]
    assert settings["epochs"] == epochs == best_epoch(name, best["curve"])
    values = [row["val"] for row in best["curve"]]
    best_value = max(values) if name == "gru" else min(values)
    assert epochs == 1 + values.index(best_value)
    # under some protocols the final fit has a validation part, and must not stop early
    for split in (small.merge_train_val(), small):
        assert len(make_recommender(name, **settings).fit(split).loss_curve) == epochs


# --- the step


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    run = toy_run(tmp_path_factory.mktemp("all") / "x")
    tune_alone(run, trials=2, epochs=1)
    return run


def test_all_models_have_equally_many_trials(tuned):
    report = tuned.read("tuning.json")
    assert report["excluded"] == {} and report["trials"] == 2
    objectives = {
        model["model"]: [objective["metric"] for objective in model["objectives"]]
        for model in report["models"]
    }
    expected = {name: list(spaces) for name, spaces in search_spaces().items()}
    assert objectives == expected | {"wide-deep": [RATING_METRIC]}
    assert list(objectives) == list(search_spaces())
    assert report["split_note"] == "the validation part"
    assert set(report["baselines"]) == {RATING_METRIC, RANKING_METRIC}
    journals = {path.stem for path in (tuned.folder / "tuning").glob("*.journal")}
    assert journals >= {name for name, metrics in objectives.items() if metrics}


def test_reports_hold_the_default_and_the_best_trial(tuned):
    for model in tuned.read("tuning.json")["models"]:
        name = model["model"]
        keys = {
            "model",
            "registry_name",
            "settings",
            "seconds",
            "objectives",
            "curve",
            "validation",
        }
        assert set(model) == keys
        assert (model["curve"] is not None) == ("patience" in recommender_params(name))
        for objective in model["objectives"]:
            results, metric = objective["results"], objective["metric"]
            assert objective["trials"] == len(results) == 2
            default = json.loads(json.dumps(default_params(name, metric)))
            assert results[0]["settings"] == default
            assert results[0]["value"] == objective["default"]
            best = best_trial(results, metric)
            assert best["value"] == objective["best"]
            assert best["settings"].items() <= model["settings"].items()
        make_recommender(model["registry_name"], **model["settings"])


def test_the_best_trial_leaves_its_validation_table(tuned):
    for model in tuned.read("tuning.json")["models"]:
        for metric, path in model["validation"].items():
            value = tuned.read(f"tuning/{path}")[metric].mean()
            value = value**0.5 if metric == RATING_METRIC else value
            best = [o["best"] for o in model["objectives"] if o["metric"] == metric]
            assert best in ([], [pytest.approx(value)])
        assert {o["metric"] for o in model["objectives"]} <= set(model["validation"])
        assert model["validation"]


KILLED = """
import os, signal, sys
from widedeep_nb import leaderboard
from widedeep_nb.lib import tuning as c

made, run_trial, tell = [], c.run_trial, c.optuna.Study.tell
spaces = {name: c.search_spaces()[name] for name in %r}
c.search_spaces = leaderboard.search_spaces = lambda: spaces


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def dying_trial(*args, **options):
    made.append(args)
    result = run_trial(*args, **options)
    if len(made) == %d and %r == "in a trial":
        die()
    return result


def dying_tell(self, trial, *args, **options):
    if len(made) == %d and %r == "before its result is stored" and not isinstance(trial, int):
        die()
    return tell(self, trial, *args, **options)


c.run_trial, c.optuna.Study.tell = dying_trial, dying_tell
leaderboard.tune.__wrapped__(leaderboard.Run(sys.argv[1]), trials=3, epochs=2)
"""


def test_a_killed_process_is_continued(tmp_path, few):
    "Check that a process killed in a trial, or before its result is stored, is continued alike."
    run = toy_run(tmp_path / "a")
    copies = [shutil.copytree(run.folder.parent, tmp_path / str(i)) / "run" for i in range(2)]
    tune_alone(run, trials=3, epochs=2)
    moments = ("in a trial", "before its result is stored")
    for folder, k, moment in zip(copies, (1, 15), moments):
        code = KILLED % (FEW, k, moment, k, moment)
        command = [sys.executable, "-c", code, str(folder)]
        killed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        assert any(path.stat().st_size for path in (folder / "tuning").iterdir())
        assert not (folder / "tuning.json").exists()
        with pytest.MonkeyPatch.context() as patch:
            made = count_trials(patch)
            tune_alone(Run(folder), trials=3, epochs=2)
        assert report_of(Run(folder)) == report_of(run) and len(made) == 3 * 8 - k + 1


def scramble(part):
    flipped = 6 - pl.col("rating").reverse()
    return part.with_columns(item=pl.col("item").reverse(), rating=flipped)


def unread_tables(protocol):
    "List the tables that tuning must not read."
    if protocol == "strict":
        return ["test.parquet"]
    later = [f"{fold}{part}" for fold in ("cuts/1/", "cuts/2/", "") for part in ("train", "val")]
    tests = [f"{fold}test" for fold in ("cuts/0/", "cuts/1/", "cuts/2/", "")]
    return [f"{name}.parquet" for name in later + tests]


@pytest.mark.parametrize("protocol", ["strict", "rolling"])
def test_test_rows_are_never_read(tmp_path, few, protocol):
    "Check that other test rows and other later folds change nothing, and other validation rows do."
    log = toy_log() if protocol == "strict" else toy_log(4000)
    run = toy_run(tmp_path / "a", log, protocol)
    other_test, other_val = [
        Run(shutil.copytree(run.folder, tmp_path / name)) for name in ("test", "val")
    ]
    for name in unread_tables(protocol):
        other_test.write(name, scramble(run.read(name)))
    val = "val.parquet" if protocol == "strict" else "cuts/0/val.parquet"
    other_val.write(val, scramble(run.read(val)))
    for each in (run, other_test, other_val):
        tune_alone(each, trials=2, epochs=1)
    assert report_of(other_test) == report_of(run) != report_of(other_val)
    assert len(report_of(run)["models"]) == len(FEW)
    assert ("oldest of 4 folds" in report_of(run)["split_note"]) == (protocol == "rolling")


def test_other_data_never_reuse_trials(tmp_path, few, monkeypatch):
    "Check other rows, epochs, seeds and spaces in one folder."
    made, run = count_trials(monkeypatch), toy_run(tmp_path / "a")

    def n_new_trials(epochs=1):
        made.clear()
        tune_alone(run, trials=2, epochs=epochs)
        return len(made)

    total = n_new_trials()
    assert total and n_new_trials() == 0
    rows = run.read("train.parquet")
    is_sixth, flipped = pl.int_range(pl.len()) == 5, 6 - pl.col("rating")
    rating = pl.when(is_sixth).then(flipped).otherwise(pl.col("rating"))
    run.write("train.parquet", rows.with_columns(rating=rating))
    assert n_new_trials() == total
    run.write("train.parquet", rows)
    assert n_new_trials() == 0 and n_new_trials(epochs=2) == total
    run.update_manifest(seed=1)
    assert n_new_trials() == total
    run.update_manifest(seed=0)
    other_space = {RANKING_METRIC: {"factors": (2, 127, "log int")}}
    spaces = tuning.search_spaces() | {"svd": other_space}
    for module in (leaderboard, tuning):
        monkeypatch.setattr(module, "search_spaces", lambda: spaces)
    assert n_new_trials() == 2 and made == [("svd", RANKING_METRIC)] * 2


def test_study_names(tmp_path, few):
    run = toy_run(tmp_path / "a")
    options = {"max_users": 40, "epochs": 1}
    name = study_name(run, "svd", RANKING_METRIC, **options)
    for text in ("svd", RANKING_METRIC, "toy", "strict", "seed 0"):
        assert text in name
    assert name != study_name(run, "svd", RANKING_METRIC, **options | {"max_users": 41})
    protocol = run.read("split/protocol.json")
    run.write("split/protocol.json", protocol | {"mask_seen": False})
    assert name != study_name(run, "svd", RANKING_METRIC, **options)


def test_errors(tmp_path, few, monkeypatch):
    run = toy_run(tmp_path / "a")
    for options, message in (
        ({"trials": 0}, "trials=0 is not valid"),
        ({"trials": -3}, "trials=-3 is not valid"),
        ({"epochs": 0}, "epochs=0 is not valid"),
    ):
        with pytest.raises(UserError, match=message):
            tune(run, **options)
    assert not (run.folder / "tuning.json").exists()
    (run.folder / "tuning").mkdir()
    (run.folder / f"tuning/{FEW[1]}.journal").write_text("no journal\n{}\n{}\n")
    with pytest.raises(UserError, match="remove it to tune again"):
        tune_alone(run)
    shutil.rmtree(run.folder / "tuning")

    def limited_trial(name, *args, **options):
        if name in ("gru", "item-knn"):
            raise UserError(f"{name} would take too much")
        return run_trial(name, *args, **options)

    monkeypatch.setattr(tuning, "run_trial", limited_trial)
    tune_alone(run, trials=2, epochs=1)
    report, failed = run.read("tuning.json"), ("item-knn", "gru")
    assert report["excluded"] == {name: f"{name} would take too much" for name in failed}
    assert [model["model"] for model in report["models"]] == [n for n in FEW if n not in failed]


def test_without_ratings_only_ranking_is_tuned(tmp_path, monkeypatch):
    names = (*FEW, "ease", "wide-deep-mse")
    spaces = {name: search_spaces()[name] for name in names}
    for module in (leaderboard, tuning):
        monkeypatch.setattr(module, "search_spaces", lambda: spaces)
    run = toy_run(tmp_path / "a", toy_log(with_ratings=False))
    tune_alone(run, trials=2, epochs=1)
    report = run.read("tuning.json")
    rating_models = {"mean", "damped-bias", "funk-svd", "wide-deep-mse"}
    reason = "this log has no ratings to learn from"
    assert report["excluded"] == dict.fromkeys(rating_models, reason)
    assert [m["model"] for m in report["models"]] == [n for n in names if n not in rating_models]
    for model in report["models"]:
        assert [objective["metric"] for objective in model["objectives"]] == [RANKING_METRIC]
    assert list(report["baselines"]) == [RANKING_METRIC]


@pytest.mark.parametrize("cause", ["no rows", "no known items"])
def test_without_validation_the_defaults_stay(tmp_path, few, cause):
    log = toy_log() if cause == "no rows" else toy_log(with_ratings=False)
    run = toy_run(tmp_path / "a", log)
    val = run.read("val.parquet")
    if cause == "no rows":
        run.write("val.parquet", val.clear())
    else:
        unknown_item = pl.lit(run.load_splits()[0].n_train_items, pl.Int32)
        run.write("val.parquet", val.with_columns(item=unknown_item).cast(val.schema))
    tune_alone(run, trials=2, epochs=1)
    report = run.read("tuning.json")
    assert report["split_note"].startswith("none: no user of the validation part")
    assert report["baselines"] == {} and report["seconds"] == 0
    for model in report["models"]:
        assert model["objectives"] == [] and model["curve"] is None and model["seconds"] == 0
    settings = {model["model"]: model["settings"] for model in report["models"]}
    assert all(not params for name, params in settings.items() if name not in loss_variants())
    assert settings["wide-deep-bpr"]["epochs"] == 5
    assert len(tuning_gains(report)) == 0


# --- objectives and sentences


def test_no_setting_is_tuned_twice():
    assert objectives_for("wide-deep", BOTH) == [RATING_METRIC]
    assert objectives_for("user-knn", BOTH) == [RANKING_METRIC, RATING_METRIC]
    assert objectives_for("user-knn", {}) == [] == objectives_for("mean", BOTH)


def test_gains(tuned):
    report = tuned.read("tuning.json")
    rows = tuning_gains(report)
    assert len(rows) == sum(len(model["objectives"]) for model in report["models"])
    assert (rows["gain"] >= 0).all()
    for metric, sign in ((RANKING_METRIC, 1), (RATING_METRIC, -1)):
        of_metric = rows.filter(metric=metric)
        best = of_metric["best"]
        assert best.to_list() == sorted(best, reverse=sign > 0)
        assert ((best - of_metric["default"]) * sign >= 0).all()
        assert describe_tuning_gains(of_metric).startswith(f"In {metric},")
    no_gain = rows.filter(metric=RANKING_METRIC).with_columns(best="default", gain=pl.lit(0.0))
    assert describe_tuning_gains(no_gain) == "In NDCG@20, no trial beats a default."


def toy_curve(train, val):
    return [{"epoch": i + 1, "train": t, "val": v} for i, (t, v) in enumerate(zip(train, val))]


def test_learning_curves():
    peak, improving = [0.1, 0.3, 0.2], [0.3, 0.1]
    assert diagnose_curve("gru", toy_curve([3, 2, 1], peak)) == "overfits"
    assert diagnose_curve("gru", toy_curve([3, 2, 2.5], peak)) == "plateaus"
    assert diagnose_curve("wide-deep", toy_curve([3, 2, 1], peak)) == "overfits"
    assert diagnose_curve("wide-deep", toy_curve([3, 2], improving)) == "still improves"
    assert describe_fit({"gru": toy_curve([3, 2], [0.1, 0.3])}) == (
        "No model overfits within its epochs. Still improving in the last epoch: gru (2)."
    )
