"The same chance for everybody: spaces, searches that survive a kill, and rows that no trial may see."
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from widedeep_nb import comparison
from widedeep_nb.baselines import GRIDS
from widedeep_nb.comparison import (BASE, LISTS, SPACES, STARS, attempt, best_of, default_of, distribution, fate, fates_in_words, fields_of, finished, floors_of, for_good, from_text,
                                    open_journal, propose, questions_of, registered_as, search, study_name, study_of, to_text, tune, worth_in_words, worth_of_tuning)
from widedeep_nb.core import LOSSES, Problem, Run, as_interactions, make_recommender
from widedeep_nb.hybrid import best_pass
from widedeep_nb.preprocessing import prepare, preprocess
from widedeep_nb.sequence import SEQUENCE

ROOT = Path(__file__).parents[1]
FEW = ("mean", "damped-bias", "item-knn", "svd", "funk-svd", "gru", "wide-deep", "wide-deep-bpr")
everyone = [(name, metric) for name, of in SPACES.items() for metric in of]
told = lambda trials: [(t["settings"], t["value"], t.get("curve"), t.get("passes"), t.get("why")) for t in trials]


def step_alone(run, **how):
    "The step without the chapters before it, and with nothing left of an earlier try but its trials."
    shutil.rmtree(run.folder / ".work", ignore_errors=True)
    return tune.__wrapped__(run, **how)


def log_of(n=1200, seed=0, stars=True):
    "Sixty people of two tastes, thirty things."
    rng = np.random.default_rng(seed)
    user, item = rng.integers(0, 60, n), rng.integers(0, 30, n)
    item = np.where(rng.random(n) < .7, item - (item + user) % 2 * (item > 0), item)
    rating = (3 + (user % 2 == item % 2) + rng.integers(-1, 2, n)).astype("float32")
    log = pl.DataFrame({"user": [f"u{u}" for u in user], "item": [f"i{i}" for i in item], "rating": rating if stars else [None] * n, "timestamp": 15 * 10**11 + np.arange(n) * 10**8}, schema_overrides={"rating": pl.Float32})
    return as_interactions(log.unique(["user", "item"], keep="first", maintain_order=True))


@pytest.fixture(scope="module")
def small(): return prepare(log_of(), "strict")


def run_of(folder, log=None, protocol="strict", seed=0):
    "A run whose rows are there, and who is asked; no model."
    place = folder / "toy"
    place.mkdir(parents=True)
    (log_of() if log is None else log).with_columns(pl.col("timestamp").dt.epoch("ms")).write_csv(place / "ratings.csv")
    pl.DataFrame({"item": [f"i{k}" for k in range(30)], "category": [f"A > {k % 2}" for k in range(30)]}).write_csv(place / "items.csv")
    run = Run(folder / "run", dataset=str(place), protocol=protocol, seed=seed)
    preprocess(run)
    run.write("evaluation.json", {"relevant": 4., "most_users": 40})
    return run


@pytest.fixture
def few(monkeypatch):
    "A handful of contestants, quickly fitted."
    monkeypatch.setattr(comparison, "SPACES", {name: SPACES[name] for name in FEW})
    return FEW


def answers(run):
    "What tuning said, but not how long it took."
    tuning = run.read("tuning.json")
    for c in tuning["contestants"]:
        for timed in (c, *c["questions"], *(t for q in c["questions"] for t in q["tried"])): timed.pop("seconds")
    return {k: v for k, v in tuning.items() if k != "seconds"}


def counted(monkeypatch):
    "Which trials are really made."
    made = []
    def watched(name, metric, *args, **how):
        made.append((name, metric))
        return attempt(name, metric, *args, **how)
    monkeypatch.setattr(comparison, "attempt", watched)
    return made


# --- the spaces

def test_everybody_is_there():
    assert set(SPACES) == {*GRIDS, *SEQUENCE, "content", "content-towers", "wide-deep", *(f"wide-deep-{loss}" for loss in LOSSES)}
    assert [name for name, of in SPACES.items() if not of] == ["mean", "popularity", "content"] == [name for name, grid in GRIDS.items() if not grid] + ["content"]
    assert all(set(GRIDS[name]) == set(SPACES[name]) for name in GRIDS)


@pytest.mark.parametrize("name, metric", everyone)
def test_spaces_hold_the_default_and_nothing_unknown(name, metric):
    space, default = SPACES[name][metric], default_of(name, metric)
    assert set(space) <= set(fields_of(name)) and "seed" not in space and set(BASE.get(name, {})) <= set(fields_of(name))
    for k, within in space.items():
        if isinstance(within, list): assert default[k] in within and len(set(map(str, within))) == len(within) > 1
        else: assert within[0] <= default[k] <= within[1] and within[0] < within[1] and type(default[k]) is (int if "int" in str(within[2:]) else float)
    assert from_text(space, to_text(space, default)) == default
    if name in GRIDS: assert all(GRIDS[name][metric][0][k] == default[k] for k in GRIDS[name][metric][0])


@pytest.mark.parametrize("side", [0, 1])
def test_the_corners_can_be_fitted(small, side):
    "With every setting at the same end of its range, each contestant learns, and its settings serve for the final fit."
    for name, metric in everyone:
        corner = {k: w[-side] if isinstance(w, list) else w[side] for k, w in SPACES[name][metric].items()} | ({"epochs": 2} if name == "neumf" else {})
        found = attempt(name, metric, corner, small, 20, epochs=2)
        assert math.isfinite(found["value"]) and (("passes" in found) == ("patience" in fields_of(name)))
        settings = json.loads(json.dumps(for_good(name, [{"settings": corner, **found}], small)))
        made = make_recommender(registered_as(name), **settings, **({"seed": 3} if "seed" in fields_of(name) else {}))
        if "passes" in found: assert made.epochs == found["passes"] and "seed" not in settings


def test_the_losses_are_trained_as_in_chapter_08(small, tmp_path, monkeypatch):
    "Batch, thinning, features and draws are those that `fit_with` gives the model."
    from widedeep_nb import ranking
    made = {}
    class Watched(ranking.WideDeep):
        def fit(self, split): return made.setdefault(self.loss, self)
        def save(self, folder): self.curve = []
    monkeypatch.setattr(ranking, "WideDeep", Watched)
    for loss in LOSSES:
        monkeypatch.setattr(Watched, "curve", [], raising=False)
        ranking.fit_with(small, tmp_path, tmp_path / "c", loss, 8, 5, alpha=.5, seed=0)
        ours = comparison.settings_of(f"wide-deep-{loss}", {}, small)
        assert {k: list(v) if k == "features" else v for k, v in vars(made[loss]).items() if k in ours} == ours


# --- a search

def test_a_trial_is_the_default_first_then_others(small):
    tried = search(study_of(None, "a", STARS), "funk-svd", STARS, 6, small)
    assert tried[0]["settings"] == default_of("funk-svd", STARS) and len({json.dumps(t["settings"]) for t in tried}) == 6
    for t in tried: assert t["value"] == attempt("funk-svd", STARS, t["settings"], small)["value"]
    assert best_of(tried, STARS)["value"] == min(t["value"] for t in tried)
    other = search(study_of(None, "a", STARS), "funk-svd", STARS, 6, small, seed=1)
    assert other[0]["settings"] == tried[0]["settings"] and other[1]["settings"] != tried[1]["settings"]
    assert SPACES["user-knn"][LISTS] == SPACES["item-knn"][LISTS]  # the same space, but not the same luck
    near = [search(study_of(None, "a", LISTS), name, LISTS, 2, small) for name in ("user-knn", "item-knn")]
    assert near[0][0]["settings"] == near[1][0]["settings"] and near[0][1]["settings"] != near[1][1]["settings"]


def test_the_best_of_lists_is_the_largest(small):
    tried = search(study_of(None, "a", LISTS), "svd", LISTS, 5, small)
    assert best_of(tried, LISTS)["value"] == max(t["value"] for t in tried)


@pytest.mark.parametrize("name, metric, sign", [("svd", LISTS, 1), ("damped-bias", STARS, -1)])
def test_it_looks_where_good_settings_were(monkeypatch, name, metric, sign):
    "A figure that is best near the upper end: what is proposed later lies nearer to it."
    (setting, (low, high, _)), = SPACES[name][metric].items()
    off = lambda chosen: abs(math.log(chosen[setting] / low) / math.log(high / low) - .9)
    monkeypatch.setattr(comparison, "attempt", lambda name, metric, chosen, *args, **how: {"value": 1 - sign * off(chosen)})
    far = [off(t["settings"]) for t in search(study_of(None, "a", metric), name, metric, 30, None)]
    assert np.median(far[15:]) < .5 * np.median(far[1:8])


def test_cut_off_after_any_trial_it_goes_on_alike(small, tmp_path, monkeypatch):
    "Eight trials, so that what was learnt from the first four is part of it; cut off in the middle of each of them."
    whole = told(search(study_of(None, "a", STARS), "funk-svd", STARS, 8, small))
    for k in range(1, 9):
        made = []
        def cut(*args, **how):
            made.append(args)
            if len(made) == k: raise KeyboardInterrupt
            return attempt(*args, **how)
        path = tmp_path / str(k)
        monkeypatch.setattr(comparison, "attempt", cut)
        with pytest.raises(KeyboardInterrupt): search(study_of(open_journal(path), "a", STARS), "funk-svd", STARS, 8, small)
        with open(path, "ab") as f: f.write(b'{"op_code": 5, "worker')
        Path(f"{path}.lock").touch()
        journal = open_journal(path)
        assert not Path(f"{path}.lock").exists()
        study = study_of(journal, "a", STARS)
        assert told(search(study, "funk-svd", STARS, 8, small)) == whole and len(made) == 9
        assert len(study.trials) == 9 and len(finished(study)) == 8


def test_left_overs_do_not_change_what_is_proposed(small):
    plain, littered = [study_of(None, "a", STARS) for _ in range(2)]
    for n in range(1, 8):
        for _ in range(3): propose(littered, "funk-svd", STARS)
        assert told(search(littered, "funk-svd", STARS, n, small)) == told(search(plain, "funk-svd", STARS, n, small))


def test_killed_between_two_strokes_of_the_pen(small):
    "With the default written down as the next one, but not begun."
    study = study_of(None, "a", LISTS)
    study.enqueue_trial(to_text(SPACES["svd"][LISTS], default_of("svd", LISTS)))
    assert told(search(study, "svd", LISTS, 4, small)) == told(search(study_of(None, "a", LISTS), "svd", LISTS, 4, small))


def test_the_seed_is_that_of_the_run(small):
    one, two, again = [attempt("gru", LISTS, {}, small, epochs=2, seed=seed) for seed in (0, 1, 0)]
    assert one == again and one["curve"] != two["curve"]


def test_more_trials_go_on_and_fewer_are_the_first(small, tmp_path, monkeypatch):
    made = counted(monkeypatch)
    whole = told(search(study_of(None, "a", LISTS), "svd", LISTS, 6, small))
    for n, new in ((2, 2), (5, 3), (6, 1), (4, 0), (6, 0)):
        made.clear()
        study = study_of(open_journal(tmp_path / "journal"), "a", LISTS)
        assert told(search(study, "svd", LISTS, n, small)) == whole[:n] and len(made) == new


def test_a_trial_that_cannot_be_made_counts_with_its_reason(small, monkeypatch):
    calls = []
    def picky(name, metric, chosen, *args, **how):
        calls.append(chosen)
        if len(calls) in (2, 4): raise Problem("too large")
        return attempt(name, metric, chosen, *args, **how)
    monkeypatch.setattr(comparison, "attempt", picky)
    study = study_of(None, "a", LISTS)
    tried = search(study, "svd", LISTS, 6, small)
    assert [t.get("why") for t in tried] == [None, "too large", None, "too large", None, None] and [t["value"] is None for t in tried] == [False, True, False, True, False, False]
    assert len(calls) == 6 and len({json.dumps(c) for c in calls}) > 4 and best_of(tried, LISTS)["value"] is not None
    calls.clear(), calls.append(None)
    study = study_of(None, "b", LISTS)
    for _ in range(2):  # and not again on another day
        with pytest.raises(Problem, match="too large"): search(study, "svd", LISTS, 6, small)
        assert len(calls) == 2
    monkeypatch.setattr(comparison, "on_validation", lambda *args: math.nan)
    with pytest.raises(Problem, match="no numbers"): attempt("svd", LISTS, {}, small)


def test_passes_and_curve_are_those_of_the_best_trial(small, tmp_path):
    for name, metric in (("gru", LISTS), ("wide-deep", STARS)):
        one = comparison.tune_one(name, {metric: "toy"}, small, tmp_path / name, 3, how={"epochs": 4})
        best = best_of(search(study_of(open_journal(tmp_path / name), "toy", metric), name, metric, 3, small), metric)
        assert one["curve"] == best["curve"] and one["settings"]["epochs"] == best["passes"] == best_pass(name, best["curve"])
        judged = [row["val"] for row in best["curve"]]
        assert best["passes"] == 1 + judged.index((max if name == "gru" else min)(judged))
        for final in (small.refit(), small):  # under some protocols the final fit has a validation part, and must not stop at it
            assert len(make_recommender(name, **one["settings"]).fit(final).curve) == best["passes"]


# --- the step

@pytest.fixture(scope="module")
def everybody(tmp_path_factory):
    run = run_of(tmp_path_factory.mktemp("all") / "x")
    step_alone(run, trials=2, epochs=1)
    return run


def test_everybody_has_as_many_trials(everybody):
    tuning = everybody.read("tuning.json")
    assert tuning["left_out"] == {} and [c["model"] for c in tuning["contestants"]] == list(SPACES) and tuning["trials"] == 2
    asked = {c["model"]: [q["metric"] for q in c["questions"]] for c in tuning["contestants"]}
    assert asked == {name: [STARS] if name == "wide-deep" else list(of) for name, of in SPACES.items()}
    for c in tuning["contestants"]:
        assert set(c) == {"model", "registered", "settings", "seconds", "questions", "curve"} and (c["curve"] is not None) == ("patience" in fields_of(c["model"]))
        for q in c["questions"]:
            assert q["trials"] == len(q["tried"]) == 2 and q["tried"][0]["value"] == q["default"] and q["best"] == best_of(q["tried"], q["metric"])["value"]
            assert q["tried"][0]["settings"] == json.loads(json.dumps(default_of(c["model"], q["metric"])))
            chosen = best_of(q["tried"], q["metric"])["settings"]
            assert {k: c["settings"][k] for k in chosen if k != "epochs" or "passes" in chosen} == {k: v for k, v in chosen.items() if k != "epochs" or "passes" in chosen}
        make_recommender(c["registered"], **c["settings"])
    assert tuning["window"] == "the validation part" and set(tuning["floors"]) == {STARS, LISTS}
    assert {p.stem for p in (everybody.folder / "tuning").glob("*.journal")} >= {c["model"] for c in tuning["contestants"] if c["questions"]} and (everybody.folder / "tuning.json").exists()


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
    step_alone(run, trials=3, epochs=2)
    for folder, k, when in zip(fresh, (1, 15), ("in a trial", "before it is told")):
        died = subprocess.run([sys.executable, "-c", KILLED % (FEW, k, when, k, when), str(folder)], cwd=ROOT, capture_output=True, text=True)
        assert died.returncode == -signal.SIGKILL, died.stderr
        assert any(p.stat().st_size for p in (folder / "tuning").iterdir()) and not (folder / "tuning.json").exists()
        made = pytest.MonkeyPatch()
        calls = counted(made)
        step_alone(Run(folder), trials=3, epochs=2)
        made.undo()
        assert answers(Run(folder)) == answers(run) and len(calls) == 3 * 8 - k + 1


def without_order(part): return part.with_columns(item=pl.col("item").reverse(), rating=6 - pl.col("rating").reverse())


@pytest.mark.parametrize("protocol", ["strict", "rolling"])
def test_test_rows_are_never_read(tmp_path, few, monkeypatch, protocol):
    "Other test rows, and under a rolling protocol other later windows: the same answers. Other validation rows: others."
    log = log_of() if protocol == "strict" else log_of(4000)
    run = run_of(tmp_path / "a", log, protocol)
    copies = [Run(shutil.copytree(run.folder, tmp_path / str(i))) for i in range(2)]
    tables = ["test.parquet"] if protocol == "strict" else [f"{at}{part}.parquet" for at in ("cuts/1/", "cuts/2/", "") for part in ("train", "val", "test")] + ["cuts/0/test.parquet"]
    for name in tables: copies[0].write(name, without_order(run.read(name)))
    first = "" if protocol == "strict" else "cuts/0/"
    copies[1].write(f"{first}val.parquet", without_order(run.read(f"{first}val.parquet")))
    for r in (run, *copies): step_alone(r, trials=2, epochs=1)
    assert answers(copies[0]) == answers(run) != answers(copies[1])
    assert len(run.read("tuning.json")["contestants"]) == len(FEW)
    assert ("oldest of 4 windows" in answers(run)["window"]) == (protocol == "rolling")


def test_other_data_never_meets_old_trials(tmp_path, few, monkeypatch):
    "In one folder: other rows, another seed, another protocol, another space, other passes."
    made, run = counted(monkeypatch), run_of(tmp_path / "a")
    step_alone(run, trials=2, epochs=1)
    total = len(made)
    made.clear(), step_alone(run, trials=2, epochs=1)
    assert not made
    row = run.read("train.parquet")
    run.write("train.parquet", row.with_columns(rating=pl.when(pl.int_range(pl.len()) == 5).then(6 - pl.col("rating")).otherwise(pl.col("rating"))))
    made.clear(), step_alone(run, trials=2, epochs=1)
    assert len(made) == total
    run.write("train.parquet", row)
    made.clear(), step_alone(run, trials=2, epochs=1)
    assert not made
    step_alone(run, trials=2, epochs=2)
    assert len(made) == total
    run.update(seed=1)
    made.clear(), step_alone(run, trials=2, epochs=1)
    assert len(made) == total
    run.update(seed=0)
    monkeypatch.setitem(comparison.SPACES, "svd", {LISTS: {"factors": (2, 127, "log int")}})
    made.clear(), step_alone(run, trials=2, epochs=1)
    assert made == [("svd", LISTS)] * 2
    names = [study_name(run, "svd", LISTS, most=most, epochs=1) for most in (40, 41)]
    assert names[0] != names[1] and all(part in names[0] for part in ("svd", LISTS, "toy", "strict", "seed 0"))
    table = run.read("split/protocol.json")
    run.write("split/protocol.json", table | {"mask_seen": False})
    assert study_name(run, "svd", LISTS, most=40, epochs=1) != names[0]


def test_what_is_wrong_is_said_in_a_line(tmp_path, few, monkeypatch):
    run = run_of(tmp_path / "a")
    for how, said in (({"trials": 0}, "trials is at least 1, not 0"), ({"trials": -3}, "trials is at least 1"), ({"epochs": 0}, "epochs is at least 1")):
        with pytest.raises(Problem, match=said): step_alone(run, **how)
    assert not (run.folder / "tuning.json").exists()
    (run.folder / "tuning").mkdir()
    (run.folder / f"tuning/{FEW[1]}.journal").write_text("no journal\n{}\n{}\n")
    with pytest.raises(Problem, match="remove it to tune anew"): step_alone(run)
    shutil.rmtree(run.folder / "tuning")
    def narrow(name, *args, **how):
        if name in ("gru", "item-knn"): raise Problem(f"{name} would take too much")
        return attempt(name, *args, **how)
    monkeypatch.setattr(comparison, "attempt", narrow)
    step_alone(run, trials=2, epochs=1)
    tuning = run.read("tuning.json")
    assert tuning["left_out"] == {name: f"{name} would take too much" for name in ("item-knn", "gru")}
    assert [c["model"] for c in tuning["contestants"]] == [n for n in FEW if n not in tuning["left_out"]]


def test_without_stars_only_lists_are_asked_for(tmp_path, monkeypatch):
    keep = (*FEW, "ease", "wide-deep-mse")
    monkeypatch.setattr(comparison, "SPACES", {name: SPACES[name] for name in keep})
    run = run_of(tmp_path / "a", log_of(stars=False))
    step_alone(run, trials=2, epochs=1)
    tuning = run.read("tuning.json")
    assert set(tuning["left_out"]) == {"mean", "damped-bias", "funk-svd", "wide-deep-mse"} and set(tuning["left_out"].values()) == {"this log has no stars to learn from"}
    assert {c["model"]: [q["metric"] for q in c["questions"]] for c in tuning["contestants"]} == {n: [LISTS] for n in keep if n not in tuning["left_out"]}
    assert list(tuning["floors"]) == [LISTS]


@pytest.mark.parametrize("why", ["no rows", "nobody knows their items"])
def test_without_validation_the_defaults_stay(tmp_path, few, why):
    run = run_of(tmp_path / "a", log_of(stars=False) if why != "no rows" else None)
    val = run.read("val.parquet")
    run.write("val.parquet", val.clear() if why == "no rows" else val.with_columns(item=pl.lit(run.splits()[0].known_items, pl.Int32)).cast(val.schema))
    step_alone(run, trials=2, epochs=1)
    tuning = run.read("tuning.json")
    assert tuning["window"].startswith("none: nobody in the validation part") and tuning["floors"] == {} and tuning["seconds"] == 0
    assert all(c["questions"] == [] and c["curve"] is None and c["seconds"] == 0 for c in tuning["contestants"])
    settings = {c["model"]: c["settings"] for c in tuning["contestants"]}
    assert all(settings[n] == {} for n in settings if n not in BASE) and settings["wide-deep-bpr"]["epochs"] == 5
    assert len(worth_of_tuning(tuning)) == 0


# --- words

def test_questions_do_not_tune_a_setting_twice():
    assert questions_of("wide-deep", {LISTS: 0, STARS: 0}) == [STARS] and questions_of("user-knn", {LISTS: 0, STARS: 0}) == [LISTS, STARS]
    assert questions_of("user-knn", {}) == [] == questions_of("mean", {LISTS: 0, STARS: 0})


def test_words_follow_the_numbers(everybody):
    tuning = everybody.read("tuning.json")
    rows = worth_of_tuning(tuning)
    assert len(rows) == sum(len(c["questions"]) for c in tuning["contestants"]) and (rows["gain"] >= 0).all()
    for metric, sign in ((LISTS, 1), (STARS, -1)):
        mine = rows.filter(metric=metric)
        assert mine["best"].to_list() == sorted(mine["best"], reverse=sign > 0) and ((mine["best"] - mine["default"]) * sign >= 0).all()
        assert worth_in_words(mine).startswith(f"In {metric}")
    level = rows.filter(metric=LISTS).with_columns(best="default", gain=pl.lit(0.))
    assert worth_in_words(level) == "In NDCG@20 no trial beats a default."
    line = lambda train, val: [{"epoch": i + 1, "train": t, "val": v} for i, (t, v) in enumerate(zip(train, val))]
    assert fate("gru", line([3, 2, 1], [.1, .3, .2])) == "overfits" and fate("gru", line([3, 2, 2.5], [.1, .3, .2])) == "levels off"
    assert fate("wide-deep", line([3, 2, 1], [.1, .3, .2])) == "overfits" and fate("wide-deep", line([3, 2], [.3, .1])) == "still learns"
    assert fates_in_words({"gru": line([3, 2], [.1, .3])}) == "None overfits within its passes. It still got better in its last pass: gru (2)."
