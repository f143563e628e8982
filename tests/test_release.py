"The delivered model: chosen on validation, fitted on all rows, and no figure of the report comes from it."

import re
import shutil
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from widedeep_nb.baselines import EASE
from widedeep_nb.data import load
from widedeep_nb.evaluation import eval_ranking, eval_ratings
from widedeep_nb.export import measure_export
from widedeep_nb.lib import wide_deep
from widedeep_nb.lib.ab_simulation import run_simulation
from widedeep_nb.lib.backtests import full_eval_task, top_k_with_scores
from widedeep_nb.lib.cli import main
from widedeep_nb.lib.comparison import pooled_records
from widedeep_nb.lib.core import UserError
from widedeep_nb.lib.datasets import synthetic_users
from widedeep_nb.lib.demo_models import DEMO_PLAN
from widedeep_nb.lib.eval_tasks import make_eval_task
from widedeep_nb.lib.final_fits import TUNED_DIR, evaluate_and_save, fit_final_model
from widedeep_nb.lib.increments import append
from widedeep_nb.lib.item_vectors import add_side_features
from widedeep_nb.lib.ranking_pipeline import load_pipeline, rank_for_task
from widedeep_nb.lib.recommender import Recommender, load_recommender
from widedeep_nb.lib.release import all_rows_split, fit_released_models, release_text
from widedeep_nb.lib.run_recommendations import load_model, recommend_from_run
from widedeep_nb.lib.runs import Run, current_run
from widedeep_nb.lib.server import open_service
from widedeep_nb.lib.verdict import default_models, models_to_release, preferred_models
from widedeep_nb.preprocessing import preprocess, training_events
from widedeep_nb.serving import measure_service
from widedeep_nb.updates import write_update_comparison

ROOT = Path(__file__).parents[1]
MODELS = {  # name -> registry name and settings, as chapter 13 chooses them
    "hybrid": ("hybrid", {"plan": DEMO_PLAN}),
    "item-knn": ("item-knn", {}),
    "popularity": ("popularity", {}),
    "damped-bias": ("damped-bias", {}),
}
EVENT_COMPONENTS = ["popularity", "matrix", "recent neighbors", "rules", "markov chain"]
EVENT_COMPONENTS += ["low-pass", "factors", "self-attention", "gru", "already viewed", "towers"]
EVENT_EPOCHS = {"self-attention": 1, "gru": 1, "towers": 1}
VALIDATION = {"item-knn": 0.3, "hybrid": 0.2, "popularity": 0.1}  # NDCG@20


def records(values, part, metric="NDCG@20", task="ranking"):
    "Records of metrics.json with narrow intervals: each model is significantly better than the next."
    group = {"task": task, "metric": metric, "users": "all", "items": "all", "relevant": "any"}
    rows = [
        group
        | {"model": model, "split": part, "cut": 0, "n": 99}
        | {"value": value, "lo": value - 0.01, "hi": value + 0.01}
        for model, value in values.items()
    ]
    return pl.DataFrame(rows)


def write_log(folder):
    "A demo log; its newest rows have a user and an item that are nowhere else."
    shop = load("demo?ratings=2500")
    log = shop.interactions.filter(pl.col("rating").is_not_null())
    last = log["timestamp"].max()
    popular = log["item"].value_counts(sort=True)["item"]
    fans = log["user"].unique(maintain_order=True)[:15]
    newest = [("Newcomer", item) for item in popular[3:8]]
    newest += [(user, item) for user in fans for item in ("Fresh", popular[60])]
    rows = pl.DataFrame(newest, schema=["user", "item"], orient="row")
    minutes = pl.duration(minutes=pl.int_range(1, pl.len() + 1))
    rows = rows.with_columns(rating=pl.lit(5.0), timestamp=pl.lit(last) + minutes)
    columns = ["user", "item", "rating", "timestamp"]
    log = pl.concat([log.select(columns), rows.select(columns)], how="vertical_relaxed")
    folder.mkdir()
    log.unique(["user", "item"], keep="last", maintain_order=True).with_columns(
        pl.col("timestamp").dt.epoch("ms")
    ).write_csv(folder / "ratings.csv")
    shop.items.write_csv(folder / "items.csv")
    return folder


def fit_tested(run, names=tuple(MODELS)):
    "Fit, evaluate and save the tested fits; write metrics.json and leaderboard.parquet."
    splits = add_side_features(run)
    final_splits = [split.for_final_fit() for split in splits]
    tables = []
    for name in names:
        registry_name, settings = MODELS[name]
        key = {"model": name, "cut": 0, "seed": 0}
        fit = fit_final_model(key, registry_name, settings, final_splits[0], run.model_folder(name))
        evaluate_and_save(run, [fit], final_splits, {"relevant": 4, "max_users": 0})
        tables.append(run.read(f"{TUNED_DIR}/{name}/records.parquet"))
    tested = pl.concat(tables, how="diagonal")
    run.add_metrics(tested)
    run.write("leaderboard.parquet", pooled_records(tested))
    run.update_manifest(hashes=run.manifest["hashes"] | run.file_hashes)


@pytest.fixture(scope="module")
def base_run(tmp_path_factory, one_process):
    folder = tmp_path_factory.mktemp("release")
    run = Run(folder / "run", dataset=str(write_log(folder / "log")))
    fit_tested(run)
    run.add_metrics(records(VALIDATION, "val"))
    run.add_metrics(records({"damped-bias": 1.0, "hybrid": 1.5}, "val", "RMSE", "rating"))
    fit_released_models(run, MODELS)
    return run.folder


@pytest.fixture
def run(base_run, tmp_path):
    shutil.copytree(base_run, tmp_path / "run")
    return Run(tmp_path / "run")


@pytest.fixture(autouse=True, scope="module")
def one_process():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("widedeep_nb.lib.runs.n_workers", lambda n_rows: 1)
        yield


# --- the choice


@pytest.mark.parametrize("best_on_test", ["popularity", "hybrid", "item-knn"])
def test_the_test_part_chooses_nothing(tmp_path, best_on_test):
    names = ["als", "hybrid", "item-knn", "popularity"]
    run = Run(tmp_path / "run")
    run.add_metrics(records({best_on_test: 0.9, "als": 0.1}, "test"))
    assert models_to_release(run, names) == {"ranking": ["hybrid", "item-knn", "popularity"]}
    assert preferred_models(run, names)[0] == default_models(run, names)[0] == "hybrid"
    run.add_metrics(records(VALIDATION | {"als": 0.4}, "val"))
    released = models_to_release(run, names)
    assert released == {"ranking": ["als", "hybrid", "item-knn", "popularity"]}
    assert preferred_models(run, names)[0] == default_models(run, names)[0] == "als"


def test_the_model_for_ratings_is_chosen_on_validation(run):
    chosen = run.released_models()["chosen"]
    assert chosen == {"ranking": "item-knn", "rating": "damped-bias"}
    run.add_metrics(records({"hybrid": 0.2, "damped-bias": 9.0}, "test", "RMSE", "rating"))
    assert models_to_release(run, list(MODELS))["rating"] == ["damped-bias"]


# --- all rows


@pytest.mark.parametrize("protocol", ["strict", "filtered-first", "leave-one-out", "as-reported"])
@pytest.mark.parametrize("columns", [["rating", "timestamp"], ["timestamp"], ["rating"], []])
def test_every_row_is_learned_under_every_protocol(tmp_path, protocol, columns):
    log = load("demo?ratings=6000").interactions.filter(pl.col("rating").is_not_null())
    log = log.select("user", "item", *columns).with_columns(pl.col("user") + "x")
    log = pl.concat([log, log[-1:].with_columns(user=pl.lit("once"), item=pl.lit("rare"))])
    log.write_csv(tmp_path / "log.csv")
    run = Run(tmp_path / "run", dataset=str(tmp_path / "log.csv"), protocol=protocol)
    preprocess(run)
    fit_released_models(run, {"popularity": MODELS["popularity"]})
    model = load_recommender(run.released_folder("popularity"))
    rows = training_events(run.read("interactions.parquet"))
    history = model.train_history
    users = model.user_ids.gather(history.user_index.numpy())
    items = model.item_ids.gather(history.item.numpy())
    learned = pl.DataFrame({"user": users, "item": items}).sort("user", "item")
    assert learned.equals(rows.select("user", "item").sort("user", "item"))
    assert "once" in users and "rare" in items
    assert "once" not in run.read("train.parquet")["user"].cast(pl.String)


def write_events(folder, is_dated, is_fixed):
    "A log of views, carts and purchases: a user who only views, and an item that is only viewed."
    rng = np.random.default_rng(0)
    n = 3000
    log = pl.DataFrame(
        {
            "user": [f"u{code}" for code in rng.integers(0, 40, n)],
            "item": [f"i{code}" for code in rng.integers(0, 30, n)],
            "event": rng.choice(["view", "cart", "purchase"], n, p=[0.5, 0.1, 0.4]),
            "timestamp": 1_600_000_000 + 3600 * np.arange(n),
        }
    )
    pairs = [("viewer", "i1"), ("viewer", "i2"), ("u1", "viewed")]
    views = pl.DataFrame(pairs, schema=["user", "item"], orient="row")
    last = pl.lit(log["timestamp"].max() + 60, pl.Int64)
    views = views.with_columns(event=pl.lit("view"), timestamp=last)
    log = pl.concat([log, views])
    log = log if is_dated else log.drop("timestamp")
    folder.mkdir()
    parts = {"train": log[:2500], "test": log[2500:]} if is_fixed else {"log": log}
    for name, rows in parts.items():
        rows.write_csv(folder / f"{name}.csv")
    return folder if is_fixed else folder / "log.csv"


@pytest.mark.parametrize("protocol", ["strict", "filtered-first", "leave-one-out", "given"])
@pytest.mark.parametrize("is_dated", [True, False])
def test_every_event_is_learned_under_every_protocol(tmp_path, protocol, is_dated):
    path = write_events(tmp_path / "log", is_dated, protocol == "given")
    run = Run(tmp_path / "run", dataset=str(path), protocol=protocol)
    preprocess(run)
    report = fit_released_models(run, {"popularity": MODELS["popularity"]})
    model = load_recommender(run.released_folder("popularity"))
    log = run.read("interactions.parquet").with_columns(pl.col("event").cast(pl.String))
    n_target = len(log.filter(event="purchase"))
    is_event = model.train_history.event > 0
    assert len(is_event) == len(log) and int((~is_event).sum()) == n_target
    assert set(model.user_ids) == set(log["user"]) >= {"viewer"}
    assert set(model.item_ids) == set(log["item"]) >= {"viewed"}
    released = report["models"]["popularity"]
    counts = [released[name] for name in ("rows", "users", "items")]
    assert counts == [len(log), log["user"].n_unique(), log["item"].n_unique()]


@pytest.mark.parametrize("name", ["item-knn", "als", "hybrid", "ease"])
def test_models_score_items_that_were_only_viewed(tmp_path, name):
    run = Run(tmp_path / "run", dataset=str(write_events(tmp_path / "log", True, False)))
    preprocess(run)
    plan = {"ranking": dict.fromkeys(EVENT_COMPONENTS, 0.1), "epochs": EVENT_EPOCHS}
    settings = {"plan": plan} if name == "hybrid" else {}
    fit_released_models(run, {name: (name, settings)})
    model = load_model(run)
    assert model.name == name and model.released
    assert name != "hybrid" or set(model.plan["ranking"]) == set(EVENT_COMPONENTS)
    listed = model.recommend("viewer", k=31)
    assert listed["score"].is_finite().all() and "viewed" in model.item_ids


def test_a_fixed_split_and_twelve_users(tmp_path):
    (tmp_path / "log").mkdir()
    for part, size in (("train", 48), ("test", 12)):
        rows = [f"u{i % 12},i{(i * 7 + len(part)) % 9},{1 + i % 5}\n" for i in range(size)]
        (tmp_path / f"log/{part}.csv").write_text("user,item,rating\n" + "".join(rows))
    run = Run(tmp_path / "run", dataset=str(tmp_path / "log"), protocol="given")
    preprocess(run)
    report = fit_released_models(run, {"popularity": MODELS["popularity"]})
    rows = run.read("interactions.parquet")
    released = report["models"]["popularity"]
    assert released["rows"] == len(rows) and released["users"] == 12
    assert released["last"] is None and report["chosen"] == {"ranking": "popularity"}


def test_the_newest_events_reach_the_delivered_model(run):
    log = run.read("interactions.parquet")
    is_new = (pl.col("user") == "Newcomer") | (pl.col("item") == "Fresh")
    test = run.read("test.parquet")
    assert log.filter(is_new)["timestamp"].min() >= test["timestamp"].min()
    own = log.filter(user="Newcomer")["item"]
    for name in ("hybrid", "item-knn"):
        tested, released = load_model(run, name, "tested"), load_model(run, name)
        assert "Newcomer" not in tested.user_ids and "Newcomer" in released.user_ids
        assert "Fresh" not in tested.item_ids and "Fresh" in released.item_ids
        listed = released.recommend("Newcomer")
        assert not set(listed["item"]) & set(own)
        unknown = released.recommend([[]])
        assert listed["item"].to_list() != unknown["item"].to_list()
        assert tested.recommend("Newcomer")["item"].to_list() == (
            tested.recommend([[]])["item"].to_list()
        )
    # those who bought Fresh bought another item on the same day
    fans = log.filter(item="Fresh")["user"].implode()
    together = log.filter(pl.col("user").is_in(fans), pl.col("item") != "Fresh").tail(20)
    partner = together["item"].mode()[0]
    result = recommend_from_run(run, basket=partner, k=5)
    assert "Fresh" in [item["item"] for item in result["items"]]
    result = recommend_from_run(run, basket=partner, k=100, fit="tested")
    assert "Fresh" not in [item["item"] for item in result["items"]]


# --- settings


def test_settings_and_epochs_are_those_of_the_tested_fit(run):
    for name in MODELS:
        tested, released = (
            load_recommender(folder)
            for folder in (run.model_folder(name), run.released_folder(name))
        )
        assert tested.__dict__.get("plan") == released.__dict__.get("plan")
        assert type(tested) is type(released)
    network = load_recommender(run.released_folder("hybrid")).models["content towers"]
    assert network.n_items > load_recommender(run.model_folder("hybrid")).n_items


def test_a_component_without_memory_for_all_rows_is_left_out(run, monkeypatch):
    plan = DEMO_PLAN | {"ranking": {"popularity": 0.5, "towers": 0.5}, "epochs": {"towers": 1}}
    plan["cold_items"] = {}
    models = {"hybrid": ("hybrid", {"plan": plan})}
    monkeypatch.setattr("widedeep_nb.lib.ensemble.MAX_FEATURE_BYTES", 1000)
    monkeypatch.setattr(wide_deep, "MAX_FEATURE_BYTES", 1000)
    fit_released_models(run, models)
    released = load_recommender(run.released_folder("hybrid"))
    assert released.plan["ranking"] == {"popularity": 1.0}
    assert "Fresh" in released.item_ids


def test_a_model_that_cannot_take_all_items_stays_tested(run):
    assert EASE().max_items < 10**6
    run.add_metrics(records({"ease": 0.9} | VALIDATION, "val"))
    report = fit_released_models(run, MODELS | {"ease": ("ease", {"max_items": 20})})
    assert list(report["excluded"]) == ["ease"] and "max_items" in report["excluded"]["ease"]
    assert report["chosen"]["ranking"] == "hybrid"
    assert "`ease` could not be fitted on all rows" in release_text(report)
    assert not run.released_folder("ease").exists() and load_model(run).name == "hybrid"


def test_an_earlier_choice_is_removed(run):
    assert run.released_folder("damped-bias").exists()
    fit_released_models(run, {"popularity": MODELS["popularity"]})
    assert [p.name for p in (run.folder / "models/released").iterdir()] == ["popularity"]


def test_the_earlier_models_stay_until_all_new_ones_are_saved(run, monkeypatch):
    before = {path: path.read_bytes() for path in (run.folder / "models/released").rglob("*.*")}
    report = (run.folder / "released.json").read_bytes()
    save = Recommender.save

    def stop_at_popularity(model, folder):
        if model.name == "popularity":
            raise KeyboardInterrupt
        save(model, folder)

    models = {"item-knn": ("item-knn", {"k": 3}), "popularity": MODELS["popularity"]}
    with monkeypatch.context() as patch:
        patch.setattr(Recommender, "save", stop_at_popularity)
        with pytest.raises(KeyboardInterrupt):
            fit_released_models(run, models)
    assert {path: path.read_bytes() for path in before} == before
    assert (run.folder / "released.json").read_bytes() == report
    fit_released_models(run, models)
    assert load_recommender(run.released_folder("item-knn")).k == 3
    assert sorted(p.name for p in (run.folder / "models").glob(".*")) == []


# --- no figure


def test_the_evaluation_refuses_a_released_fit(run):
    split = add_side_features(run)[-1].for_final_fit()
    every_row = all_rows_split(
        run, *[run.read(f"{name}.parquet") for name in ("interactions", "items", "users")]
    )
    released = load_recommender(run.released_folder("hybrid"))
    task = make_eval_task(split, "test")
    attempts = [
        lambda: eval_ranking(released, split, "test"),
        lambda: eval_ratings(released, split, "test"),
        lambda: eval_ratings(released, every_row, "test"),
        lambda: rank_for_task(load_pipeline(run, "hybrid", fit="released"), task, {}),
        lambda: top_k_with_scores(released, full_eval_task(split, 0)),
    ]
    for attempt in attempts:
        with pytest.raises(UserError, match="released fit of hybrid"):
            attempt()
    assert len(rank_for_task(load_pipeline(run, "hybrid"), task, {})) == len(task.users)


def test_chapters_open_tested_fits_only():
    "Check each place in a chapter, or in the simulation of users, that could load a released fit."
    simulation = ROOT / "widedeep_nb/lib/ab_simulation.py"
    for path in [*(ROOT / "widedeep_nb").glob("[!_]*.py"), simulation]:
        source = path.read_text(encoding="utf8")
        for word in ("released_folder", "delivered_folder", "load_model(", '"released"'):
            assert word not in source, (path, word)
        # a service serves released fits unless it is told otherwise
        n_services = len(re.findall(r"(?:open|running)_service\(", source))
        assert source.count('"tested"') == n_services, path


def figures_of(run):
    "Compute figures that chapters 13 to 20 print, as far as they do not depend on the clock."
    simulator = synthetic_users("demo?ratings=2500")
    final_split = add_side_features(run)[-1].for_final_fit()
    hybrid = load_recommender(run.model_folder("hybrid"))
    fit_tested(run)
    exported = measure_export(run, max_users=50)
    # the lists of a simulation are drawn at random: here it only has to work
    simulation = run_simulation(run, simulator, ("item-knn", "popularity"), 0.1, 2, 40)
    write_update_comparison(run, final_split, lambda split: hybrid, 1)
    updates = [
        {key: value for key, value in row.items() if key != "seconds"}
        for row in run.read("catchup.json")["metrics"]
    ]
    return {
        "metrics.json": (run.folder / "metrics.json").read_bytes(),
        "export": [exported[key] for key in ("fidelity", "metrics", "exported")],
        "policies": [policy["policy"] for policy in simulation["policies"]],
        "updates": updates,
        "service": measure_service(run, 0.5, 20.0)["items"],
    }


def test_figures_are_the_same_without_the_released_fits(run, tmp_path):
    shutil.copytree(run.folder, tmp_path / "broken")
    broken = Run(tmp_path / "broken")
    for name in broken.released_models()["models"]:
        for file in ("model.safetensors", "model.json"):
            (broken.released_folder(name) / file).write_bytes(b"noise")
    with pytest.raises(UserError):
        load_model(broken)
    expected, found = figures_of(run), figures_of(broken)
    for name in expected:
        assert found[name] == expected[name], name


# --- commands


def test_the_service_names_the_fit_of_each_model(run, tmp_path):
    service = open_service(run.folder, feedback_dir=tmp_path / "a")
    about = service.service_info("open")
    service.close()
    assert about["default"] == "item-knn" and set(about["models"]) == {
        "item-knn",
        "hybrid",
        "popularity",
    }
    log = run.read("interactions.parquet")
    fit = about["fits"]["item-knn"]
    assert fit["fit"] == "released" and fit["rows"] == len(log)
    assert fit["last"][:19] == log["timestamp"].max().isoformat()[:19]
    tested = run.read("leaderboard.parquet").filter(
        pl.col("versus").is_null(), model="item-knn", metric="NDCG@20"
    )
    figure = next(row for row in fit["tested"] if row["metric"] == "NDCG@20")
    assert figure["value"] in tested["value"].to_list() and figure["part"] == "test"
    service = open_service(run.folder, feedback_dir=tmp_path / "b", fit="tested")
    fit = service.service_info("open")["fits"]["item-knn"]
    service.close()
    assert fit["fit"] == "tested" and fit["rows"] < len(log) and fit["tested"][0] == figure


def test_stars_come_from_the_model_chosen_for_ratings(run):
    log = run.read("interactions.parquet")
    pipeline = load_pipeline(run, "hybrid", fit="released")
    rating_model = load_recommender(run.released_folder("damped-bias"))
    recommended = pipeline.recommend(log["user"][0], 3)
    user = torch.tensor([rating_model.user_ids.index_of(log["user"][0])] * 3)
    items = torch.tensor([rating_model.item_ids.index_of(i) for i in recommended["item"]])
    expected = rating_model.predict(user, items)
    assert torch.allclose(torch.tensor(recommended["stars"].to_list()), expected, atol=1e-5)


def test_the_command_says_which_fit_it_used(run, capsys):
    folder, user = str(run.folder), "Newcomer"
    main(["recommend", folder, "--user", user, "-k", "2"])
    said = capsys.readouterr().err
    assert "item-knn has learned from all" in said and "its tested fit has NDCG@20" in said
    main(["recommend", folder, "--user", user, "-k", "2", "--fit", "tested"])
    assert "item-knn is a tested fit" in capsys.readouterr().err
    main(["export", folder])
    assert "item-knn has learned from all" in capsys.readouterr().out


def test_a_run_of_an_earlier_version_serves_its_tested_fits(run, tmp_path, capsys):
    shutil.rmtree(run.folder / "models/released")
    (run.folder / "released.json").unlink()
    main(["recommend", str(run.folder), "--user", "Newcomer", "-k", "2"])
    assert "item-knn is a tested fit" in capsys.readouterr().err
    service = open_service(run.folder, feedback_dir=tmp_path / "feedback")
    fits = {fit["fit"] for fit in service.fits.values()}
    service.close()
    assert fits == {"tested"}


@pytest.mark.parametrize("is_released", [True, False])
def test_append_updates_the_delivered_models(run, tmp_path, is_released, capsys):
    if not is_released:
        shutil.rmtree(run.folder / "models/released")
        (run.folder / "released.json").unlink()
    log = run.read("interactions.parquet")
    minute = log["timestamp"].max().timestamp() + 60
    rows = [f"Tomorrow,{item},5,{minute + i:.0f}\n" for i, item in enumerate(log["item"][:4])]
    rows.append(f"Tomorrow,Newest,4,{minute + 9:.0f}\n")
    (tmp_path / "more.csv").write_text("user,item,rating,timestamp\n" + "".join(rows))
    append(run, tmp_path / "more.csv", epochs=1)
    updated = Run(current_run(run.folder))
    names = set(MODELS) if is_released else {"hybrid", "item-knn", "popularity"}
    assert set(updated.released_models()["models"]) == set(updated.model_names()) == names
    for name in names:
        model = load_recommender(updated.released_folder(name))
        assert {"Tomorrow", "Newcomer"} <= set(model.user_ids)
        assert {"Newest", "Fresh"} <= set(model.item_ids)
        assert model.released["rows"] == len(log) + 5
        assert model.released["tested"][0]["metric"] == "NDCG@20" or name == "damped-bias"
    main(["recommend", str(run.folder), "--user", "Tomorrow", "-k", "2"])
    assert f"learned from all {len(log) + 5:,} rows" in capsys.readouterr().err
    main(["recommend", str(run.folder), "--user", "Newcomer", "-k", "2", "--fit", "tested"])
    assert "is a tested fit" in capsys.readouterr().err
