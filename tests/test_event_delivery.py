"Types of events and repeats from a log to recommendations, the service, feedback and later logs."

import numpy as np
import polars as pl
import pytest
import torch
from test_serving import Client

from widedeep_nb.data import ingest
from widedeep_nb.lib.app import make_app
from widedeep_nb.lib.cli import main
from widedeep_nb.lib.increments import append
from widedeep_nb.lib.item_vectors import add_side_features
from widedeep_nb.lib.ranking_pipeline import explanations
from widedeep_nb.lib.recommender import load_recommender, make_recommender
from widedeep_nb.lib.release import all_rows_split, describe_rows
from widedeep_nb.lib.retrieval import TwoStageRetriever
from widedeep_nb.lib.runs import Run, current_run
from widedeep_nb.lib.server import open_service
from widedeep_nb.preprocessing import preprocess, run_target

DAY = 86_400
PLAN = {
    "ranking": {"popularity": 0.2, "neighbors": 0.3, "in the cart": 0.5},
    "cold_users": {"popularity": 1.0},
    "rating": {},
    "epochs": {},
}


def shop_rows(n_items=40):
    "Make views, carts and purchases of 40 users, the carts of items that are bought later."
    rng = np.random.default_rng(0)
    rows = []
    for user in range(40):
        items = user % 4 + 4 * rng.permutation(n_items // 4)[:8]
        for place, item in enumerate(items):
            time = 1_400_000_000 + DAY * (3 * place + user % 3) + user
            rows.append((f"u{user}", f"i{item}", "view", time - 5_000))
            rows.append((f"u{user}", f"i{item}", "purchase", time))
        rows.append(
            (f"u{user}", f"i{user % 4 + 4 * rng.integers(n_items // 4)}", "cart", time - 900)
        )
    return pl.DataFrame(rows, ["user", "item", "event", "timestamp"], orient="row")


def make_run(folder, log, **parameters):
    "Make a run with two released models, as chapters 01, 03 and 13 do."
    log.write_csv(folder / "log.csv")
    run = Run(folder / "run", dataset=str(folder / "log.csv"), parameters=parameters)
    ingest(run)
    preprocess(run, **parameters)
    add_side_features(run)
    tables = [run.read(f"{name}.parquet") for name in ("interactions", "items", "users")]
    split = all_rows_split(run, *tables)
    models = {}
    for name, settings in (("hybrid", {"plan": PLAN}), ("item-knn", {})):
        model = make_recommender(name, **settings).fit(split)
        models[name] = model.released = describe_rows(model) | {"tested": []}
        for place in (run.released_folder(name), run.model_folder(name)):
            model.save(place)
    run.write("released.json", {"chosen": {"ranking": "hybrid"}, "models": models, "excluded": {}})
    run.update_manifest(hashes=run.manifest["hashes"] | run.file_hashes)
    return run


@pytest.fixture(autouse=True, scope="module")
def one_process():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("widedeep_nb.lib.runs.n_workers", lambda n_rows: 1)
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    weights = {"target": "purchase", "event_weights": "view=0.1,cart=0.4"}
    return make_run(tmp_path_factory.mktemp("shop"), shop_rows(), **weights)


def send_feedback(run, folder, events):
    "Send events (user, item, type) over HTTP; return the lists of both models after them."
    service = open_service(run.folder, models=("hybrid", "item-knn"), feedback_dir=folder)
    client = Client(make_app(service))
    lists = {}
    for n, (user, item, event) in enumerate(events):
        body = {"key": f"{folder.name} {n}", "user": user, "item": item, "event": event}
        assert client("POST", "/api/feedback", body).status_code == 201
    for model in service.pipelines:
        body = {"user": events[0][0], "k": 30, "model": model}
        answer = client("POST", "/api/recommend", body).json()
        lists[model] = [row["item"] for row in answer["items"]]
    service.close()
    return lists


def test_types_from_feedback_to_the_next_model(run, tmp_path, capsys):
    "Views, carts and purchases keep their type and weight; only the purchase hides its item."
    bought = set(shop_rows().filter(user="u1", event="purchase")["item"])
    viewed, carted, new = [f"i{n}" for n in range(1, 40, 4) if f"i{n}" not in bought][:2] + ["i2"]
    events = [("u1", viewed, "view"), ("u1", carted, "cart"), ("u1", new, "purchase")]
    events.append(("Newcomer", new, "purchase"))
    store = tmp_path / "service"
    for items in send_feedback(run, store, events).values():
        assert {viewed, carted} <= set(items) and not {new, *bought} & set(items)
    log = tmp_path / "feedback.parquet"
    main(["feedback", str(run.folder), "--feedback-dir", str(store), "--out", str(log)])
    main(["append", str(run.folder), str(log)])
    assert "4 of 4 events are new" in capsys.readouterr().out
    updated = Run(current_run(run.folder))
    assert run_target(updated) == "purchase"
    model = load_recommender(updated.released_folder("item-knn"))
    assert model.event_weights == pytest.approx({"view": 0.1, "cart": 0.4})
    history = model.train_history.select(torch.tensor([model.user_ids.to_list().index("u1")]))
    last = [model.item_ids[code] for code in history.item[-3:].tolist()]
    assert last == [viewed, carted, new]
    assert history.weight[-3:].tolist() == pytest.approx([0.1, 0.4, 1.0])
    assert history.event[-3:].tolist() == [1, 3, 0]
    main(["recommend", str(run.folder), "--user", "u1", "-k", "30"])
    items = [line.split()[2] for line in capsys.readouterr().out.splitlines()[1:]]
    assert items[0] == carted and viewed in items and not {new, *bought} & set(items)
    for items in send_feedback(updated, tmp_path / "again", [("u1", viewed, "click")]).values():
        assert {viewed, carted} <= set(items) and not {new, *bought} & set(items)


def test_append_says_what_it_leaves_out_and_how_words_were_read(run, tmp_path, capsys):
    rows = ["u1,i3,Merkzettel,1", ",i4,purchase,1", "u2,i5,purchase,zwei"]
    rows += [f"u{n},i{n},purchase,1" for n in range(6, 12)]
    end = shop_rows()["timestamp"].max()
    rows = [f"{row},{end + n}" for n, row in enumerate(rows)]
    (tmp_path / "day.csv").write_text("\n".join(["user,item,event,quantity,timestamp", *rows]))
    main(["append", str(run.folder), str(tmp_path / "day.csv")])
    said = capsys.readouterr().out
    assert "Merkzettel" in said and "1 row: missing user or item, such as '(no user), i4" in said
    assert "rows whose quantity is no number: 1" in said


def test_a_later_log_does_not_change_the_target(tmp_path):
    "Ratings, more than purchases, come later: the run still predicts purchases."
    run = make_run(tmp_path, shop_rows())
    assert run_target(run) == "purchase"
    end = shop_rows()["timestamp"].max()
    rows = [f"u{n % 40},i{n % 37},{1 + n % 5},{end + n}" for n in range(900)]
    (tmp_path / "day.csv").write_text("\n".join(["user,item,rating,timestamp", *rows]))
    append(run, tmp_path / "day.csv", models=("item-knn",))
    updated = Run(current_run(run.folder))
    assert run_target(updated) == "purchase"
    service = open_service(updated.folder, models=("item-knn",), feedback_dir=tmp_path / "service")
    assert service.catalog.target == "purchase"
    service.close()


def test_old_views_stay_where_a_dated_log_is_appended_to_one_without_times(tmp_path):
    log = shop_rows()
    run = make_run(tmp_path, log.drop("timestamp"))
    log.tail(20).write_csv(tmp_path / "day.csv")
    append(run, tmp_path / "day.csv", models=("item-knn",))
    tables = [
        Run(current_run(run.folder)).read(f"{n}.parquet")
        for n in ("interactions", "items", "users")
    ]
    split = all_rows_split(run, *tables)
    assert len(split.train) + len(split.auxiliary) == len(log) + 20
    model = load_recommender(Run(current_run(run.folder)).released_folder("item-knn"))
    assert len(model.train_history.item) == len(log) + 20


def test_two_stages_propose_what_is_in_the_cart(run):
    model = load_recommender(run.released_folder("hybrid"))
    retriever = TwoStageRetriever(model, n_candidates=5, n_ann_candidates=5)
    history = model.train_history
    users = torch.arange(model.n_users)
    codes, _ = retriever.retrieve(users, history, 3)
    exact, _ = retriever.exact(users, history, 3)
    is_cart = history.event == 3
    owned = set(zip(history.owned().user_index.tolist(), history.owned().item.tolist()))
    carted = set(zip(history.user_index[is_cart].tolist(), history.item[is_cart].tolist()))
    lists = [[(u, c) for u, row in enumerate(t.tolist()) for c in row] for t in (codes, exact)]
    wanted = carted - owned
    assert wanted and wanted <= set(lists[1]) and wanted <= set(lists[0])


def test_the_reason_names_what_the_user_did():
    rows = {
        "item": ["bag", "bag", "bag", "bag"],
        "because": ["cam", "bag", "cam", "bag"],
        "liked": [None] * 4,
        "event": ["view", "cart", None, None],
    }
    items = pl.DataFrame({"item": ["bag", "cam"], "title": ["Bag", "Camera"]})
    rows = pl.DataFrame(rows, schema_overrides={"liked": pl.Boolean})
    assert explanations(rows, items).to_list() == [
        "because you viewed Camera",
        "because you put it in the cart before",
        "because you had Camera",
        "because you have bought it before",
    ]


def test_an_export_says_that_it_reads_no_types(run, tmp_path, capsys):
    main(["export", str(run.folder), "--model", "item-knn", "--out", str(tmp_path / "export")])
    assert "no event types: each cart and view" in capsys.readouterr().out


def test_a_dashboard_reads_a_newer_log_as_it_is_told(run, tmp_path, capsys):
    log = shop_rows().rename({"user": "Kunde", "item": "Ware"}).tail(30)
    log.write_csv(tmp_path / "day.csv")
    page = tmp_path / "page.html"
    words = ["dashboard", str(run.folder), str(tmp_path / "day.csv"), "--output", str(page)]
    main([*words, "-p", "columns=user=Kunde,item=Ware"])
    assert page.exists()
    with pytest.raises(SystemExit):
        main([*words, "-p", "columns=user=Nobody,item=Ware"])
    assert "Nobody" in capsys.readouterr().err
