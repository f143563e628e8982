"Check the recommendation service: answers, feedback, exploration, security, failures and load."

import asyncio
import hashlib
import io
import itertools
import json
import os
import re
import resource
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np
import polars as pl
import psutil
import pytest
import uvicorn
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from widedeep_nb import serving
from widedeep_nb.data import load
from widedeep_nb.lib import app as app_module
from widedeep_nb.lib import load_test, ranking_pipeline, service_schemas, synthetic_catalogs
from widedeep_nb.lib import server as server_module
from widedeep_nb.lib.app import make_app
from widedeep_nb.lib.cli import cli, main
from widedeep_nb.lib.core import UserError, sort_by_time
from widedeep_nb.lib.feedback import FeedbackStore
from widedeep_nb.lib.inference import BatchQueue
from widedeep_nb.lib.item_details import ItemImages
from widedeep_nb.lib.off_policy import pl_probabilities, sample_plackett_luce
from widedeep_nb.lib.rules import Rules
from widedeep_nb.lib.runs import Run
from widedeep_nb.lib.server import TimeoutProtocol, open_service
from widedeep_nb.lib.service_schemas import FeedbackEvent, RecommendRequest
from widedeep_nb.serving import open_loop_load

httpx = pytest.importorskip("httpx")
ROOT = Path(__file__).parents[1]
PLAN = {
    "ranking": {"popularity": 0.3, "neighbors": 0.4, "content": 0.3},
    "rating": {"ridge": 1.0},
}
JSON = {"content-type": "application/json"}
INTERNAL_ERROR = {"error": "internal error; it has been logged"}


@pytest.fixture(scope="session")
def run(small_run):
    "A small run with three fitted models."
    return small_run(hybrid={"plan": PLAN}, item_knn={}, popularity={})


@pytest.fixture
def service(run, tmp_path):
    service = open_service(run.folder, feedback_dir=tmp_path, seed=0)
    yield service
    service.close()


class Client:
    "A client of an application without a network."

    def __init__(self, app):
        self.app = app

    def __call__(self, method, path, body=None, **options):
        if body is not None:
            options["json"] = body
        return asyncio.run(self.send(method, path, options))

    async def send(self, method, path, options):
        transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await client.request(method, path, **options)

    def send_all(self, calls):
        "Send requests (method, path, body) at once."

        async def send_concurrently():
            sends = [self.send(method, path, {"json": body}) for method, path, body in calls]
            return await asyncio.gather(*sends)

        return asyncio.run(send_concurrently())


@pytest.fixture
def client(service):
    return Client(make_app(service))


def recommend(client, **body):
    "Post a request for recommendations; return the response's JSON."
    return client("POST", "/api/recommend", body).json()


def get(client, path, **params):
    "Get a path; return the response's JSON."
    return client("GET", path, params=params).json()


def item_ids(answer):
    "Return the item ids of a recommendation response."
    return [item["item"] for item in answer["items"]]


def event(key, user, item, kind="purchase", **fields):
    "Return the JSON of a feedback event."
    return {"key": key, "user": user, "item": item, "event": kind, **fields}


def is_one_line_error(response):
    "Return whether a response has an error of one line and nothing else."
    return list(response.json()) == ["error"] and "\n" not in response.json()["error"]


def stored_keys(path):
    "Return the keys of all stored events."
    with closing(sqlite3.connect(path)) as connection:
        return [key for (key,) in connection.execute("SELECT key FROM events")]


def count_lists(path):
    "Return the number of logged lists."
    with closing(sqlite3.connect(path)) as connection:
        return connection.execute("SELECT count(*) FROM lists").fetchone()[0]


@contextmanager
def running_in_thread(app, **options):
    "Serve an application behind a socket, in a thread of this process."
    listener = server_module.bind_socket("127.0.0.1", 0)
    config = uvicorn.Config(
        app, http=TimeoutProtocol, ws="none", lifespan="off", log_level="critical", **options
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield listener.getsockname()
    finally:
        server.should_exit = True
        thread.join()


@contextmanager
def running_process(folder, *options, env=None, **popen_options):
    "Serve a run as a process; yield the process and its address."
    command = [sys.executable, "-m", "widedeep_nb.lib.cli", "serve", str(folder), "--port", "0"]
    child = subprocess.Popen(
        [*command, *map(str, options)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=os.environ | (env or {}),
        **popen_options,
    )
    try:
        line = child.stdout.readline()
        assert line.startswith("http://127.0.0.1:"), child.communicate()
        yield child, line.split(" ")[0]
    finally:
        child.kill()
        child.communicate()


def post(address, path, body, **headers):
    "Post JSON to a running service; return the status and the response's JSON."
    request = urllib.request.Request(address + path, json.dumps(body).encode(), JSON | headers)
    try:
        with urllib.request.urlopen(request, timeout=20) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as e:
        return e.code, json.load(e)


# ---------------------------------------------------------------- recommendations


def test_response_equals_pipeline(run, service, client):
    "Check that HTTP, catalog codes and batching do not change what the pipeline recommends."
    log = run.read("interactions.parquet")  # the models were fitted on its ratings only
    with_other_events = set(log.filter(pl.col("event") != "rating")["user"])
    user = next(u for u in service.catalog.users[3:] if u not in with_other_events)
    answer = recommend(client, user=user, k=7)
    items = answer["items"]
    expected = service.pipelines["hybrid"].recommend([user], 7)
    for field in ("item", "title", "price"):
        assert [item[field] for item in items] == expected[field].to_list()
    for field in ("score", "stars"):
        assert np.allclose([item[field] for item in items], expected[field], rtol=1e-4)
    explained_by = [item["because"] and item["because"]["item"] for item in items]
    assert explained_by == expected["because"].to_list() and any(explained_by)
    assert [item["rank"] for item in items] == list(range(1, 8))
    assert {item["propensity"] for item in items} == {1.0}
    assert answer["user"] == user and answer["model"] == "hybrid" and not answer["explored"]


def test_explanations_of_a_basket(service, client):
    "Check that liked is true, false or null by the rating of the explaining item."
    a, b, c = service.pipelines["hybrid"].recommend([service.catalog.users[3]], 7)["item"][:3]
    basket = [{"item": a, "rating": 5}, {"item": b, "rating": 1}, {"item": c}]
    reasons = [item["because"] for item in recommend(client, basket=basket, k=50)["items"]]
    liked = {reason["item"]: reason["liked"] for reason in reasons if reason}
    assert liked.items() <= {a: True, b: False, c: None}.items() and len(liked) >= 2


def test_options_reach_the_pipeline(service, client):
    basket = dict(zip(service.catalog.products["item"][:2], (5.0, None)))
    entries = [{"item": item, "rating": rating} for item, rating in basket.items()]
    options = {"model": "item-knn", "diversity": 0.3, "rules": {"highest": 90}}
    answer = recommend(client, basket=entries, **options)
    pipeline = service.pipelines["item-knn"]
    expected = pipeline.recommend([basket], 10, diversity=0.3, rules=Rules(max_price=90))
    assert item_ids(answer) == expected["item"].to_list()


def test_catalog_history_is_the_log(run, service):
    "Check that the catalog has all events of the log, also those after the model's fit."
    log = run.read("interactions.parquet").filter(pl.col("rating").is_not_null())
    user = service.catalog.users[5]
    history = service.catalog.train_history.targets_only()
    of_user = history.select(service.catalog.user_rows([user])).item
    items = service.catalog.products["item"].gather(of_user.numpy())
    assert sorted(items) == sorted(log.filter(user=user)["item"])
    model_history = service.pipelines["hybrid"].model.train_history.targets_only()
    assert len(history.item) == len(log) == len(model_history.item)


def random_requests(service, n):
    "Return requests of six kinds, half for users, half for baskets."
    rng = np.random.default_rng(0)
    items, users = service.catalog.products["item"], service.catalog.users
    kinds = [
        {"k": 5},
        {"k": 9, "model": "item-knn"},
        {"k": 5, "diversity": 0.5},
        {"k": 4, "order": "revenue"},
        {"k": 3, "rules": {"lowest": 50}},
        {"k": 5, "candidates": "all"},
    ]
    requests = []
    for i in range(n):
        if i % 2:
            query = {"user": users[int(rng.integers(len(users)))]}
        else:
            basket = [{"item": items[int(code)]} for code in rng.integers(0, len(items), 3)]
            query = {"basket": basket, "not_for_me": [items[int(rng.integers(len(items)))]]}
        requests.append(RecommendRequest(**kinds[i % 6], **query))
    return requests


def test_batch_equals_single_answers(service):
    "Check that forty requests of six kinds in one batch get the same lists as one by one."

    def summary(answer):
        return [(i["item"], round(i["score"], 5), i["because"]) for i in answer["items"]]

    jobs = [service.parse_request(request) for request in random_requests(service, 40)]
    answers = service.answer(jobs)
    assert [summary(a) for a in answers] == [summary(service.answer([job])[0]) for job in jobs]
    assert len({a["list"] for a in answers}) == 40
    assert len({str(summary(a)) for a in answers}) > 30


def test_one_bad_job_spoils_no_other(service, client, monkeypatch):
    rank = service.pipelines["hybrid"].rank

    def fail_for_two(users, history, k, **options):
        if k == 2:
            raise RuntimeError("/secret/path")
        return rank(users, history, k, **options)

    monkeypatch.setattr(service.pipelines["hybrid"], "rank", fail_for_two)
    bodies = [{"k": k} for k in (1, 2, 3, 2, 4)]
    bodies.append({"k": 5, "rules": {"blocked": ["no such thing"]}})
    responses = client.send_all([("POST", "/api/recommend", body) for body in bodies])
    assert [r.status_code for r in responses] == [200, 500, 200, 500, 200, 422]
    assert responses[1].json() == INTERNAL_ERROR
    assert "no such thing" in responses[5].json()["error"]


def test_about(run, client):
    about = get(client, "/api/about")
    assert about["models"] == ["hybrid", "item-knn", "popularity"]
    assert about["default"] == "hybrid" and about["writing"] == "open"
    assert about["items"] == len(run.read("items.parquet")) and about["stars"] and about["prices"]
    body = {"rules": {"allowed": about["categories"][-1:]}}
    assert client("POST", "/api/recommend", body).status_code == 200


def test_pictures(run, client):
    "Check the pictures of the demo shop, the errors for others, and the currency."
    about = get(client, "/api/about")
    assert about["images"] and about["currency"] == "USD"
    item = run.read("items.parquet")["item"][0]
    response = client("GET", "/api/image", params={"item": item})
    assert response.headers["content-type"] == "image/png"
    assert Image.open(io.BytesIO(response.content)).size == (32, 32)
    for unknown in ("nothing", "../run.json", "run.json"):
        assert client("GET", "/api/image", params={"item": unknown}).status_code == 404
    assert client("GET", "/api/image").status_code == 422


def test_pictures_of_a_folder(run, tmp_path):
    "Check that only pictures of known items are used, whatever else lies in the folder."
    first, second = run.read("items.parquet")["item"][:2]
    Image.new("RGB", (3, 3)).save(tmp_path / f"{first}.jpg")
    (tmp_path / f"{second}.svg").write_text("<svg onload='alert(1)'/>")
    (tmp_path / "other.png").write_text("")
    images = ItemImages(pl.Series([first, second]), "demo", str(tmp_path))
    assert list(images.files) == [first] and images.read(first)[1] == "image/jpeg"
    assert images.read(second) is None and images.read("other") is None


def test_search_items(run, client):
    title = run.read("items.parquet")["title"].drop_nulls()[4]
    first, last = title.split()[0].lower(), title.split()[-1].lower()
    products = get(client, "/api/items", search=f"{last.upper()} {first}")["items"]
    titles = [product["title"] for product in products]
    assert title in titles and all(first in t.lower() and last in t.lower() for t in titles)
    assert get(client, "/api/items", search=".*") == {"items": []}  # no regular expression
    assert len(get(client, "/api/items", limit=3)["items"]) == 3


def test_users_and_histories(run, client):
    log = sort_by_time(run.read("interactions.parquet"))
    user, n_events = log["user"].value_counts(sort=True).row(0)
    assert get(client, "/api/users", limit=1)["users"] == [{"user": user, "events": n_events}]
    events = get(client, "/api/history", user=user, limit=200)["events"]
    expected = log.filter(user=user).reverse()
    assert [e["product"]["item"] for e in events] == expected["item"].to_list()
    assert [e["rating"] for e in events] == expected["rating"].to_list()
    dates = expected["timestamp"].dt.strftime("%Y-%m-%d").to_list()
    assert [e["time"][:10] for e in events] == dates


def test_similar_items(run, client):
    item = run.read("items.parquet")["item"][0]
    answer = get(client, "/api/similar", item=item, k=4)
    similarities = [i["similarity"] for i in answer["items"]]
    assert answer["item"]["item"] == item
    assert len(answer["items"]) == 4 and item not in item_ids(answer)
    assert similarities == sorted(similarities, reverse=True)


def test_item_that_one_model_does_not_know(service, client):
    "Check that it is an error for similar items, and left out of the basket for recommendations."
    hybrid, knn = service.pipelines["hybrid"].model, service.pipelines["item-knn"].model
    item = next(i for i in hybrid.all_items if i not in knn.all_items)
    for model, status in (("hybrid", 200), ("item-knn", 404)):
        params = {"item": item, "model": model}
        assert client("GET", "/api/similar", params=params).status_code == status
    body = {"basket": [{"item": item}], "model": "item-knn"}
    assert client("POST", "/api/recommend", body).status_code == 200


def test_large_catalog_uses_two_stages(run, service, tmp_path, monkeypatch):
    "Check that the ensemble retrieves candidates first, and recommends nearly the same items."
    monkeypatch.setattr(server_module, "TWO_STAGE_MIN_ITEMS", 100)
    two_stage = open_service(run.folder, feedback_dir=tmp_path / "two")
    retriever = two_stage.pipelines["hybrid"].retrieve.__self__
    assert type(retriever).__name__ == "TwoStageRetriever"
    assert not hasattr(two_stage.pipelines["item-knn"].retrieve, "parts")
    overlaps = []
    for user in service.catalog.users[:20]:
        request = RecommendRequest(user=user)
        exact, approximate = [
            set(item_ids(s.answer([s.parse_request(request)])[0])) for s in (service, two_stage)
        ]
        overlaps.append(len(exact & approximate) / 10)
    assert np.mean(overlaps) > 0.9
    two_stage.close()


# ---------------------------------------------------------------- feedback


def test_feedback_joins_the_history_at_once(client):
    "Check which events exclude an item: purchases and ratings do, views, clicks and carts do not."
    items = item_ids(recommend(client, basket=[], k=8))

    def send(n, item, kind, **fields):
        body = event(f"f{n}", "visitor", item, kind, **fields)
        return client("POST", "/api/feedback", body).status_code

    assert client("POST", "/api/recommend", {"user": "visitor"}).status_code == 404
    assert client("GET", "/api/history", params={"user": "visitor"}).status_code == 404
    assert send(0, items[0], "view") == 201
    assert send(1, items[0], "click") == 201 and send(2, items[1], "cart") == 201
    for n, kind in ((2, "purchase"), (3, "more")):
        assert send(n + 1, items[n], kind) == 201
    assert send(5, items[4], "rating", rating=5) == 201 and send(6, items[5], "less") == 201
    recommended = item_ids(recommend(client, user="visitor", k=30))
    assert not set(recommended) & set(items[2:6])
    events = get(client, "/api/history", user="visitor")["events"]
    last = [(e["product"]["item"], e["event"], e["rating"]) for e in events[:2]]
    assert last == [(items[5], "less", None), (items[4], "rating", 5.0)] and len(events) == 7
    users = get(client, "/api/users", search="VISIT")["users"]
    assert {"user": "visitor", "events": 7} in users


def test_feedback_of_a_known_user(service, client):
    user = service.catalog.users[2]
    before = get(client, "/api/history", user=user, limit=200)["events"]
    item = item_ids(recommend(client, user=user))[0]
    client("POST", "/api/feedback", event("x", user, item))
    after = get(client, "/api/history", user=user, limit=200)["events"]
    assert after[0]["product"]["item"] == item and after[1:] == before
    users = get(client, "/api/users", search=user)["users"]
    assert next(u for u in users if u["user"] == user)["events"] == len(after)
    assert item not in item_ids(recommend(client, user=user, k=100))


def test_feedback_survives_a_restart(run, tmp_path):
    for status in (201, 200):  # new; known already
        service = open_service(run.folder, feedback_dir=tmp_path)
        client, item = Client(make_app(service)), service.catalog.products["item"][0]
        body = event("x", "visitor", item, "less")
        assert client("POST", "/api/feedback", body).status_code == status
        assert item not in item_ids(recommend(client, user="visitor", k=100))
        service.close()


def test_event_is_stored_once(service, client):
    "Check that a key is stored once, however often it is sent, and belongs to one event."
    item = service.catalog.products["item"][0]
    bodies = [event("same", "v", item, "click")] * 30
    bodies += [event(f"k{n % 7}", "v", item, "click") for n in range(70)]
    responses = client.send_all([("POST", "/api/feedback", body) for body in bodies])
    assert sorted(r.status_code for r in responses) == [200] * 92 + [201] * 8
    assert sum(r.json()["new"] for r in responses) == 8
    other = client("POST", "/api/feedback", event("same", "another user", item, "click"))
    assert other.status_code == 409 and is_one_line_error(other)
    keys = stored_keys(service.store.path)
    assert len(keys) == len(set(keys)) == 8


def test_feedback_can_be_loaded_as_a_log(service, client):
    items, user = service.catalog.products["item"], 'ann "the" <x>'
    client("POST", "/api/feedback", event("rated", user, items[1], "rating", rating=4))
    for n, kind in ((0, "click"), (2, "less"), (3, "purchase"), (4, "more")):
        response = client("POST", "/api/feedback", event(str(n), user, items[n], kind))
        assert response.status_code == 201
    log = load(f"sqlite:///{service.store.path}?query=SELECT * FROM log").interactions
    assert sorted(log.select("user", "item", "event", "rating").rows()) == sorted(
        [
            (user, items[0], "click", None),
            (user, items[1], "rating", 4.0),
            (user, items[3], "purchase", None),
        ]
    )
    assert abs(log["timestamp"].dt.timestamp("ms").max() / 1000 - time.time()) < 60


def test_command_feedback(run, tmp_path, capsys):
    path = tmp_path / "x.parquet"
    command = ["feedback", str(run.folder), "--out", str(path), "--feedback-dir", str(tmp_path)]
    with pytest.raises(SystemExit):
        main(command)
    assert "widedeep serve" in capsys.readouterr().err
    store = FeedbackStore(tmp_path / "feedback.sqlite")
    with pytest.raises(SystemExit):
        main(command)
    assert "has received no feedback" in capsys.readouterr().err
    store.add_event(FeedbackEvent(key="1", user="u", item="i", event="click")).result()
    main(command)  # while the service runs
    assert pl.read_parquet(path)["user"].to_list() == ["u"]
    assert load(path).interactions["item"].to_list() == ["i"]
    store.close()


def test_lists_are_logged(service, client):
    "Check that every place of every list is logged with its propensity."
    sampled = recommend(client, user=service.catalog.users[1], k=6, explore=True)
    best = recommend(client, k=3, model="popularity")
    service.close()
    query = (
        "SELECT list, user, model, explored, position, item, propensity FROM shown "
        "ORDER BY list, position"
    )
    with closing(sqlite3.connect(service.store.path)) as connection:
        rows = connection.execute(query).fetchall()
        times = [t for (t,) in connection.execute("SELECT time FROM lists")]
    expected = []
    for answer in (sampled, best):
        fields = (answer["list"], answer["user"], answer["model"], int(answer["explored"]))
        for item in answer["items"]:
            propensity = pytest.approx(item["propensity"])
            expected.append((*fields, item["rank"], item["item"], propensity))
    assert rows == expected and all(abs(t / 1000 - time.time()) < 60 for t in times)
    assert sampled["explored"] and any(i["propensity"] < 0.9 for i in sampled["items"])
    assert {i["propensity"] for i in best["items"]} == {1.0}


def send_until_closed(address, prefix, item, acknowledged):
    "Send events until the service is gone; append the keys that it acknowledged."
    for n in itertools.count():
        key = f"{prefix}-{n}"
        try:
            status, _ = post(address, "/api/feedback", event(key, prefix, item, "click"))
        except OSError:
            return
        if status == 201:
            acknowledged.append(key)


def test_acknowledged_events_survive_a_kill(run, tmp_path):
    "Check that twice in a row, with four clients that send until the service dies."
    acknowledged, item = [], run.read("items.parquet")["item"][0]
    for life in range(2):
        with running_process(run.folder, "--feedback-dir", tmp_path) as (child, address):
            with ThreadPoolExecutor(4) as pool:
                for n in range(4):
                    pool.submit(send_until_closed, address, f"{life}-{n}", item, acknowledged)
                while len(acknowledged) < 100 * (life + 1):
                    time.sleep(0.005)
                child.send_signal(signal.SIGKILL)
    keys = stored_keys(tmp_path / "feedback.sqlite")
    assert len(acknowledged) >= 200 and set(acknowledged) <= set(keys)
    assert len(set(keys)) == len(keys) and {key[0] for key in keys} == {"0", "1"}


def test_commits_are_synced(tmp_path):
    store = FeedbackStore(tmp_path / "b.sqlite")
    assert store.connection.execute("PRAGMA synchronous").fetchone() == (2,)
    assert store.connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    store.close()


# ---------------------------------------------------------------- exploration


def test_propensities_are_exact():
    "Check all lists of two among four: propensities are products, sum to one, match frequencies."
    w = np.array([0.5, 0.3, 0.15, 0.05])
    n = 1_000_000
    places, propensity = sample_plackett_luce(np.tile(w, (n, 1)), 2, np.random.default_rng(0))
    count = np.bincount(places[:, 0] * 4 + places[:, 1], minlength=16)
    total, chi_square = 0, 0
    for a, b in itertools.permutations(range(4), 2):
        expected = w[a], w[b] / (1 - w[a])
        probability = expected[0] * expected[1]
        rows = (places[:, 0] == a) & (places[:, 1] == b)
        assert np.allclose(propensity[rows], expected, rtol=1e-12)
        total += probability
        chi_square += (count[a * 4 + b] - n * probability) ** 2 / (n * probability)
    assert abs(total - 1) < 1e-12
    assert chi_square < 31.3  # 11 degrees of freedom, p = 0.001
    assert (places[:, 0] != places[:, 1]).all()


def test_pl_probabilities():
    scores = np.array([[0.6, 0.3, 0.1, -np.inf], [0, 0, 0, 0], [2.0, -1, -1, -np.inf]])
    softmax = np.exp([3, 0, 0]) / np.exp([3, 0, 0]).sum()
    expected = [[0.6, 0.3, 0.1, 0], [0.25] * 4, [*softmax, 0]]
    assert np.allclose(pl_probabilities(scores, 1.0, 0.0), expected)
    cold, hot = [pl_probabilities(np.array([[0.6, 0.3, 0.1]]), t, 0.0)[0] for t in (0.1, 10.0)]
    assert cold[0] > 0.99 and np.ptp(hot) < 0.1
    with_floor = pl_probabilities(np.array([[1.0, 0.0]]), 1.0, 0.1)
    assert np.allclose(with_floor, [[0.95, 0.05]])
    assert np.allclose(pl_probabilities(np.full((1, 3), -np.inf)), 0)


def test_sample_of_a_small_pool():
    weights = pl_probabilities(np.array([[0.5, -np.inf, 0.5]]))
    places, propensity = sample_plackett_luce(weights, 3, np.random.default_rng(0))
    assert sorted(places[0, :2]) == [0, 2] and places[0, 2] == -1
    assert np.allclose(propensity[0, :2], [0.5, 1])


def test_small_propensities_are_exact():
    "Check that the rest of a pool is summed from the small end, so that no weight is lost."
    w = np.array([[1.0, 1e-18, 3e-18]])
    places, propensity = sample_plackett_luce(np.tile(w, (2000, 1)), 3, np.random.default_rng(1))
    second = places[:, 1]
    assert set(second) == {1, 2}
    assert np.allclose(propensity[second == 1, 1], 0.25) and np.allclose(propensity[:, 2], 1)


def test_sampled_lists_keep_the_rules(service, client):
    user = service.catalog.users[0]
    events = get(client, "/api/history", user=user, limit=200)["events"]
    seen = {e["product"]["item"] for e in events}
    rules = {"highest": 100, "most_of_brand": 1}
    answers = [recommend(client, user=user, k=5, explore=True, rules=rules) for _ in range(30)]
    for answer in answers:
        items = answer["items"]
        assert len({i["item"] for i in items}) == len({i["brand"] for i in items}) == 5
        assert not seen & set(item_ids(answer)) and all(i["price"] <= 100 for i in items)
        assert all(0 < i["propensity"] < 1 for i in items)
    assert len({str(item_ids(answer)) for answer in answers}) > 20
    assert len({str(item_ids(recommend(client, user=user))) for _ in range(3)}) == 1


def test_frequencies_match_propensities(service):
    "Check the first place of many sampled lists, through the whole service."
    jobs = [service.parse_request(RecommendRequest(k=1, explore=True)) for _ in range(64)]
    first_items = []
    for _ in range(40):
        first_items += [answer["items"][0] for answer in service.answer(jobs)]
    counts = (
        pl.DataFrame(first_items, infer_schema_length=None)
        .group_by("item")
        .agg(pl.len(), pl.col("propensity").first())
        .top_k(5, by="len")
    )
    expected = counts["propensity"] * len(first_items)
    assert ((counts["len"] - expected).abs() < 4 * expected.sqrt()).all()
    assert counts["propensity"].max() > 0.03


def test_exploration_by_default(run, tmp_path):
    service = open_service(run.folder, explore=0.5, feedback_dir=tmp_path)
    client = Client(make_app(service))
    assert recommend(client)["explored"] and not recommend(client, explore=False)["explored"]
    service.close()


# ---------------------------------------------------------------- file verification


@pytest.fixture
def copied(run, tmp_path):
    "The folder of a copy of the run."
    subprocess.run(["cp", "-r", run.folder, tmp_path / "run"], check=True)
    return tmp_path / "run"


@pytest.mark.parametrize(
    "file",
    ["interactions.parquet", "items.parquet", "users.parquet", "models/hybrid/model.safetensors"],
)
def test_a_flipped_bit_is_refused(copied, file):
    raw = bytearray((copied / file).read_bytes())
    raw[len(raw) // 2] ^= 1
    (copied / file).write_bytes(raw)
    with pytest.raises(UserError, match="changed since it was written|not those that were") as e:
        open_service(copied)
    assert "\n" not in str(e.value) and "run" in str(e.value)


def test_missing_hash_file_or_model(copied, capsys):
    manifest = json.loads((copied / "run.json").read_text())
    (copied / "run.json").write_text(json.dumps(manifest | {"hashes": {}}))
    with pytest.raises(SystemExit) as e:
        main(["serve", str(copied), "--port", "0"])
    assert e.value.code == 2 and capsys.readouterr().err.count("\n") == 1
    (copied / "run.json").write_text(json.dumps(manifest))
    (copied / "items.parquet").unlink()
    with pytest.raises(UserError, match="items.parquet"):
        open_service(copied)
    with pytest.raises(UserError, match="unknown model 'gru'; known: hybrid, item-knn, popularity"):
        open_service(copied, ("gru",))


def test_feedback_store_that_cannot_be_written(run, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="cannot be written.*--feedback-dir"):
        open_service(run.folder, feedback_dir=tmp_path / "file")
    (tmp_path / "feedback.sqlite").write_text("not a database, and longer than a header " * 100)
    with pytest.raises(UserError, match="cannot be written.*--feedback-dir"):
        open_service(run.folder, feedback_dir=tmp_path)


def test_a_run_writes_its_hashes(tmp_path):
    "Check that a step writes the hash of each of its tables."
    from widedeep_nb.preprocessing import preprocess

    run = Run(tmp_path / "r", dataset="demo?ratings=2000")
    preprocess(run)
    hashes = {}
    for path in run.folder.rglob("*.parquet"):
        hashes[str(path.relative_to(run.folder))] = hashlib.sha256(path.read_bytes()).hexdigest()
    assert hashes == run.manifest["hashes"]
    tables = ("interactions", "items", "users", "train")
    assert {f"{name}.parquet" for name in tables} <= set(hashes)


def test_folder_that_changes_while_it_is_read(copied, monkeypatch):
    load_pipeline = ranking_pipeline.load_pipeline

    def load_and_touch(run, name, **options):
        pipeline = load_pipeline(run, name, **options)
        (copied / "items.parquet").touch()
        return pipeline

    monkeypatch.setattr(server_module, "load_pipeline", load_and_touch)
    with pytest.raises(UserError, match="changed while it was read"):
        open_service(copied)


def test_folder_that_changes_while_it_is_served(copied, tmp_path):
    "Check that files that are overwritten, cut or removed change the health, not the lists."
    with running_process(copied, "--feedback-dir", tmp_path / "feedback") as (child, address):
        user = pl.read_parquet(copied / "interactions.parquet")["user"][0]

        def items():
            _, answer = post(address, "/api/recommend", {"user": user, "k": 20})
            return [(i["item"], i["score"], i["stars"]) for i in answer["items"]]

        def health():
            return json.load(urllib.request.urlopen(address + "/health"))

        before = items()
        assert health()["status"] == "ok"
        weights = copied / "models/hybrid/model.safetensors"
        with open(weights, "r+b") as f:
            size = f.seek(0, 2)
            f.seek(size // 4)
            f.write(os.urandom(size // 2))
        assert health()["status"] == "changed" and items() == before
        assert "models/hybrid/model.safetensors" in health()["note"]
        os.truncate(weights, 100)
        (copied / "items.parquet").write_bytes(b"")
        (copied / "interactions.parquet").unlink()
        assert items() == before
        assert all(name in health()["note"] for name in ("items.parquet", "interactions.parquet"))
        assert child.poll() is None


# ---------------------------------------------------------------- refused requests

BAD_RECOMMEND_REQUESTS = [
    ({"k": 0}, 422),
    ({"k": 101}, 422),
    ({"k": "ten"}, 422),
    ({"k": 1e99}, 422),
    ({"basket": [{"item": "x"}] * 201}, 422),
    ({"basket": {"x": 5}}, 422),
    ({"basket": [{"item": ""}]}, 422),
    ({"basket": [{"item": "x" * 201}]}, 422),
    ({"basket": [{"item": "x", "rating": 6}]}, 422),
    ({"user": "nobody"}, 404),
    ({"model": "nothing"}, 404),
    ({"rules": {"lowest": 9, "highest": 8}}, 422),
    ({"rules": {"lowest": -1}}, 422),
    ({"rules": {"allowed": ["nothing of that name"]}}, 422),
    ({"rules": {"price": 3}}, 422),
    ({"diversity": 2}, 422),
    ({"order": "worst"}, 422),
    ({"explore": "perhaps"}, 422),
    ({"repeat": "perhaps"}, 422),
    ({"repeat": True}, 422),  # this run has not measured repeat purchases
    ([], 422),
    ("x", 422),
    (None, 422),
]
BAD_REQUESTS = [("POST", "/api/recommend", *request) for request in BAD_RECOMMEND_REQUESTS] + [
    ("GET", "/api/similar", None, 422),
    ("GET", "/api/similar?item=nothing", None, 404),
    ("GET", "/api/similar?item=nothing&k=0", None, 422),
    ("GET", "/api/history?user=nobody", None, 404),
    ("GET", "/api/history", None, 422),
    ("GET", "/api/items?limit=0", None, 422),
    ("GET", "/api/items?search=" + "x" * 101, None, 422),
    ("GET", "/api/nothing", None, 404),
    ("DELETE", "/api/recommend", None, 405),
    ("GET", "/static/../serving.py", None, 404),
    ("GET", "/static/%2e%2e/serving.py", None, 404),
    ("POST", "/api/feedback", event("k", "u", "nothing"), 404),
    ("POST", "/api/feedback", event("k", "u", "x", "bought"), 422),
    ("POST", "/api/feedback", {"key": "k"}, 422),
]


@pytest.mark.parametrize("method, path, body, status", BAD_REQUESTS)
def test_bad_requests(client, method, path, body, status):
    response = client(method, path, body)
    assert response.status_code == status, response.text
    assert is_one_line_error(response)
    assert "Traceback" not in response.text and ".py" not in response.text


@pytest.mark.parametrize(
    "raw",
    [
        b"{",
        b"\xff\xfe",
        b'{"k": NaN}',
        b'{"rules": {"lowest": Infinity}}',
        b'{"user": "\\ud800"}',
        b'{"basket": [{"item": "x", "rating": 1e999}]}',
        b"[" * 30_000,
        b'{"k": ' + b"9" * 5000 + b"}",
        b'{"rules": {"highest": ' + b"9" * 400 + b"}}",
    ],
)
def test_bad_bytes(client, raw):
    response = client("POST", "/api/recommend", content=raw, headers=JSON)
    assert 400 <= response.status_code < 500 and is_one_line_error(response)


def test_rating_only_in_rating_events(service, client):
    item = service.catalog.products["item"][0]
    for body in (
        event("a", "u", item, "rating"),
        event("a", "u", item, "click", rating=3),
        event("a", "u", item, "rating", rating=99),
    ):
        assert client("POST", "/api/feedback", body).status_code == 422


def test_odd_user_ids(service, client):
    "Check ids with quotes, line ends, null characters, other scripts and spaces."
    item = service.catalog.products["item"][0]
    users = ["o'hara; DROP TABLE events", "a\nb", "\x00", "日本", "%_", "\U0001f600" * 50, " "]
    for n, user in enumerate(users):
        response = client("POST", "/api/feedback", event(f"odd {n}", user, item, "purchase"))
        assert response.status_code == 201
        assert item not in item_ids(recommend(client, user=user, k=100))
        assert len(get(client, "/api/history", user=user)["events"]) == 1


def test_large_bodies_are_refused(client):
    body = b'{"user": "' + b"x" * 70_000 + b'"}'

    async def chunks():
        for start in range(0, len(body), 1000):
            yield body[start : start + 1000]

    for content in (body, chunks()):
        response = client("POST", "/api/recommend", content=content, headers=JSON)
        assert response.status_code == 413 and "65,536" in response.json()["error"]
    content = b"{}" + b" " * 65_000
    response = client("POST", "/api/recommend", content=content, headers=JSON)
    assert response.status_code == 200


def test_writing_needs_the_token(service, monkeypatch):
    "Check that tokens are compared in constant time, and that reading needs none."
    item, compared = service.catalog.products["item"][0], []

    def compare_digest(a, b):
        compared.append((a, b))
        return a == b

    monkeypatch.setattr(app_module.hmac, "compare_digest", compare_digest)
    client = Client(make_app(service, token="sésame"))

    def send(**headers):
        encoded = {name: value.encode() for name, value in headers.items()}
        return client("POST", "/api/feedback", event("t", "u", item, "click"), headers=encoded)

    wrong = [{}] + [{"authorization": text} for text in ("Bearer wrong", "sesame", "Bearer")]
    assert [send(**headers).status_code for headers in wrong] == [401] * 4
    assert is_one_line_error(send()) and send().headers["www-authenticate"] == "Bearer"
    assert get(client, "/api/about")["writing"] == "token"
    assert client("POST", "/api/recommend", {}).status_code == 200
    assert send(authorization="Bearer sésame").status_code == 201
    assert len(compared) == 7


def test_other_origins_are_refused(service, client):
    "Check that no other origin may read, and that a form of another page cannot write."
    origin = {"origin": "https://elsewhere.example"}
    response = client("GET", "/api/about", headers=origin)
    assert not [name for name in response.headers if name.startswith("access-control")]
    preflight = origin | {"access-control-request-method": "POST"}
    assert client("OPTIONS", "/api/feedback", headers=preflight).status_code == 405
    content = json.dumps(event("c", "u", service.catalog.products["item"][0], "click"))
    form_types = ("text/plain", "application/x-www-form-urlencoded")
    for content_type in (*form_types, "multipart/form-data; boundary=x", ""):
        headers = {"content-type": content_type}
        response = client("POST", "/api/feedback", content=content, headers=headers)
        assert response.status_code == 422


@pytest.mark.parametrize(
    "host, status",
    [
        ("localhost", 200),
        ("localhost:8000", 200),
        ("127.0.0.1:1", 200),
        ("[::1]:80", 200),
        ("[::1]", 200),
        ("elsewhere.example", 400),
        ("localhost.elsewhere.example:80", 400),
        ("", 400),
    ],
)
def test_host_names(service, host, status):
    client = Client(make_app(service, hosts=("localhost", "127.0.0.1", "::1")))
    assert client("GET", "/health", headers={"host": host}).status_code == status


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/static/shop.js",
        "/static/shop.css",
        "/docs",
        "/openapi.json",
        "/api/about",
        "/metrics",
        "/api/nothing",
        "/api/similar",
    ],
)
def test_security_headers_on_every_response(client, path):
    headers = client("GET", path).headers
    assert headers["content-security-policy"].startswith("default-src 'self'")
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "no-referrer"


def test_pages_load_nothing_from_other_sites(client):
    marks = ('src="http', "src='http", 'href="http', "url(http", "@import", "cdn.")
    for path in ("/", "/docs", "/static/shop.css", "/static/shop.js"):
        response = client("GET", path)
        assert response.status_code == 200
        assert not [mark for mark in marks if mark in response.text], path


def test_docs_list_all_endpoints(client):
    paths = get(client, "/openapi.json")["paths"]
    docs = client("GET", "/docs").text
    assert all(path in docs for path in paths)
    endpoints = {"/api/recommend", "/api/similar", "/api/feedback", "/health", "/metrics"}
    assert endpoints <= set(paths)


# ---------------------------------------------------------------- failures


def test_internal_errors_are_logged_and_not_shown(service, client, monkeypatch, caplog):
    monkeypatch.setattr(service, "recommend_batch", lambda jobs: 1 / 0)
    response = client("POST", "/api/recommend", {})
    assert response.status_code == 500 and response.json() == INTERNAL_ERROR
    assert "ZeroDivisionError" in caplog.text
    assert "content-security-policy" in response.headers


POST_HEAD = (
    b"POST /api/recommend HTTP/1.1\r\nhost: x\r\n"
    b"content-type: application/json\r\ncontent-length: %d\r\n\r\n"
)


def is_closed(connection):
    "Return whether the other side has closed a connection."
    connection.settimeout(2)
    try:
        return connection.recv(1000) == b"" or connection.recv(1000) == b""
    except ConnectionError:
        return True
    finally:
        connection.close()


def test_slow_clients_delay_no_other(service, monkeypatch):
    "Check that with 200 slow clients others are served, and the slow ones are disconnected."
    monkeypatch.setattr(TimeoutProtocol, "request_timeout", 1.0)
    starts = [b"", b"GET /health HTTP/1.1\r\nx: ", POST_HEAD % 500 + b"{", b"\r\n"]
    with running_in_thread(make_app(service), timeout_keep_alive=1) as address:
        url = f"http://127.0.0.1:{address[1]}"
        slow = [socket.create_connection(address) for _ in range(200)]
        for n, connection in enumerate(slow):
            connection.sendall(starts[n % 4])
        start = time.monotonic()
        assert post(url, "/api/recommend", {})[0] == 200
        for _ in range(5):
            time.sleep(0.25)
            for n, connection in enumerate(slow):
                try:
                    connection.sendall(b"a" if n % 4 else b"")
                except OSError:
                    pass
            assert post(url, "/api/recommend", {})[0] == 200
        time.sleep(max(0, 2.5 - (time.monotonic() - start)))
        assert sum(is_closed(connection) for connection in slow) == 200


def receive_items(connection, n):
    "Receive a response until it has n items."
    response = b""
    while response.count(b'"rank"') < n:
        response += connection.recv(65536)
    return response


def test_a_request_in_pieces_is_served(service, monkeypatch):
    "Check several requests over one connection, in small pieces and with long bodies."
    monkeypatch.setattr(TimeoutProtocol, "request_timeout", 5.0)
    raw = load_test.encode_request("/api/recommend", {"k": 2})
    app = make_app(service)
    with running_in_thread(app) as address, socket.create_connection(address) as connection:
        connection.settimeout(10)
        for _ in range(3):
            for start in range(0, len(raw), 37):
                connection.sendall(raw[start : start + 37])
                time.sleep(0.002)
            assert receive_items(connection, 2).startswith(b"HTTP/1.1 200")
        body = b"{}" + b" " * 40_000  # bodies do not count as headers
        for _ in range(3):
            connection.sendall(POST_HEAD % len(body) + body)
            assert receive_items(connection, 10).startswith(b"HTTP/1.1 200")


def test_endless_headers_are_cut_off(service):
    app = make_app(service)
    with running_in_thread(app) as address, socket.create_connection(address) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nx: ")
        with pytest.raises(ConnectionError):
            for _ in range(2000):
                connection.sendall(b"a" * 10_000)
                time.sleep(0.001)
        assert post(f"http://127.0.0.1:{address[1]}", "/api/recommend", {})[0] == 200


def test_full_disk(service, client):
    "Check that feedback is refused and not stored, lists go on, and writing recovers."
    item, connection = service.catalog.products["item"][0], service.store.connection

    def send(n):
        body = event(f"d{n}", "user " + "x" * 150, item, "click")
        return client("POST", "/api/feedback", body)

    n_pages = connection.execute("PRAGMA page_count").fetchone()[0]
    connection.execute(f"PRAGMA max_page_count = {n_pages + 2}")
    responses = [send(n) for n in range(200)]
    statuses = [response.status_code for response in responses]
    first_refused = statuses.index(507)
    assert set(statuses) == {201, 507} and "room" in responses[first_refused].json()["error"]
    for _ in range(20):
        assert client("POST", "/api/recommend", {"k": 100}).status_code == 200
    assert send(first_refused).status_code == 507
    health = get(client, "/health")
    assert health["status"] == "cannot write" and "full" in health["note"]
    assert health["lists_lost"] >= 1
    keys = stored_keys(service.store.path)
    assert set(keys) == {f"d{n}" for n, status in enumerate(statuses) if status == 201}
    connection.execute("PRAGMA max_page_count = 1000000")
    assert send(first_refused).status_code == 201 and get(client, "/health")["status"] == "ok"


def test_file_size_limit(run, tmp_path):
    "Check the same with the limit of the operating system, and a restart."
    item, limit = run.read("items.parquet")["item"][0], 300_000

    def set_limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    options = ("--feedback-dir", tmp_path)
    acknowledged = set()
    with running_process(run.folder, *options, preexec_fn=set_limit) as (child, address):
        for n in range(3000):
            refused = event(f"r{n}", "u" * 100, item, "click")
            status, answer = post(address, "/api/feedback", refused)
            if status == 507:
                break
            if status == 201:
                acknowledged.add(f"r{n}")
        assert status == 507 and "\n" not in answer["error"]
        assert post(address, "/api/recommend", {"k": 2})[0] == 200 and child.poll() is None
    store = FeedbackStore(tmp_path / "feedback.sqlite")
    assert set(stored_keys(store.path)) == acknowledged
    assert store.add_event(FeedbackEvent(**refused)).result()
    store.close()


def test_full_queues_are_refused(service, client, monkeypatch):
    monkeypatch.setitem(service_schemas.LIMITS, "waiting", 0)
    feedback = event("q", "u", service.catalog.products["item"][0], "click")
    for path, body in (("/api/recommend", {}), ("/api/feedback", feedback)):
        response = client("POST", path, body)
        assert response.status_code == 503 and is_one_line_error(response)


def test_client_that_leaves_the_queue():
    "Check that a cancelled request does not disturb the others in its batch."
    free = threading.Event()

    def answer(numbers):
        free.wait(5)
        return [n + 1 for n in numbers]

    batch_queue = BatchQueue(answer)

    async def submit_and_cancel():
        cancelled = asyncio.create_task(batch_queue.submit(1))
        other = asyncio.create_task(batch_queue.submit(2))
        await asyncio.sleep(0.05)
        cancelled.cancel()
        free.set()
        assert await other == 3

    asyncio.run(submit_and_cancel())
    batch_queue.close()


def test_logs_hold_no_token(run, tmp_path):
    env, options = {"WIDEDEEP_TOKEN": "t0p-secret"}, ("--feedback-dir", tmp_path)
    with running_process(run.folder, *options, env=env) as (child, address):
        body = event("k", "u", run.read("items.parquet")["item"][0], "click")
        for token, status in (("t0p-secret", 201), ("wr0ng-guess", 401)):
            headers = {"authorization": f"Bearer {token}"}
            assert post(address, "/api/feedback", body, **headers)[0] == status
        port = int(address.rsplit(":", 1)[1])
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(b"nonsense t0p-secret\r\n\r\n")
            connection.recv(1000)
        child.send_signal(signal.SIGTERM)
        output = "".join(child.communicate(timeout=30))
    assert "t0p-secret" not in output and "wr0ng-guess" not in output


def test_signals_end_the_service(run, tmp_path):
    "Check that both signals end it without a traceback and with all lists logged."
    for n, number in enumerate((signal.SIGINT, signal.SIGTERM)):
        with running_process(run.folder, "--feedback-dir", tmp_path) as (child, address):
            assert post(address, "/api/recommend", {})[0] == 200
            child.send_signal(number)
            assert "Traceback" not in child.communicate(timeout=30)[1]
        assert count_lists(tmp_path / "feedback.sqlite") == n + 1


def worker_of(child):
    "Return the worker of a service: the child process that has the most memory."
    children = psutil.Process(child.pid).children(recursive=True)
    return max(children, key=lambda process: process.memory_info().rss)


def test_service_stops_when_its_worker_dies(run, tmp_path):
    with running_process(run.folder, "--feedback-dir", tmp_path) as (child, address):
        assert post(address, "/api/recommend", {})[0] == 200
        worker_of(child).kill()
        status, answer = post(address, "/api/recommend", {})
        assert status == 503 and "try again" in str(answer)
        stderr = child.communicate(timeout=30)[1]
    assert child.returncode == 2 and "Traceback" not in stderr
    assert stderr.strip().splitlines()[-1].startswith("error: a worker process has ended")


def test_worker_stops_when_the_service_dies(run, tmp_path):
    with running_process(run.folder, "--feedback-dir", tmp_path) as (child, address):
        worker = worker_of(child)
        assert post(address, "/api/recommend", {})[0] == 200
        child.kill()
        worker.wait(timeout=20)
    assert count_lists(tmp_path / "feedback.sqlite") == 1


def test_listens_on_this_machine_only_by_default(run, capsys):
    options = {p.name: p for p in cli.commands["serve"].params}
    assert options["host"].default == "127.0.0.1" and options["explore"].default == 0
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        port = str(taken.getsockname()[1])
        with pytest.raises(SystemExit) as e:
            main(["serve", str(run.folder), "--port", port])
    assert e.value.code == 2 and "name another --port" in capsys.readouterr().err
    with pytest.raises(UserError, match="cannot listen"):
        server_module.bind_socket("no.such.host.invalid", 0)


def test_metrics(service):
    client = Client(make_app(service, service_metrics=app_module.ServiceMetrics()))
    item = service.catalog.products["item"][0]
    recommend(client, basket=[{"item": item}, {"item": "nothing"}, {"item": "nor this"}])
    client("POST", "/api/feedback", event("m", "u", item, "click"))
    for path in ("/api/nothing/1", "/api/nothing/2"):
        client("GET", path)
    values = {}
    for family in text_string_to_metric_families(client("GET", "/metrics").text):
        for sample in family.samples:
            values[sample.name, *sorted(sample.labels.values())] = sample.value
    assert values["widedeep_requests_total", "/api/recommend", "200"] == 1
    assert values["widedeep_requests_total", "404", "other"] == 2
    assert values["widedeep_seconds_count", "/api/feedback"] == 1
    assert values["widedeep_basket_items_total", "yes"] == 1
    assert values["widedeep_basket_items_total", "no"] == 2
    assert values["widedeep_feedback_total", "click", "yes"] == 1
    assert 0 < values["widedeep_model_age_seconds", "hybrid"] < 86_400
    assert values["widedeep_waiting",] == 0 and values["widedeep_lists_lost",] == 0


# ---------------------------------------------------------------- load


async def stall_once(connection_times, reader, writer):
    "Answer requests of a connection; block the whole process at the twentieth request."
    while True:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
        except asyncio.IncompleteReadError:
            return writer.close()
        await reader.readexactly(int(head.split(b"content-length: ")[1].split(b"\r\n")[0]))
        connection_times.append(time.perf_counter())
        if len(connection_times) == 20:
            time.sleep(0.5)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")


def test_latency_counts_from_the_due_time():
    "Check that a stall of half a second shows in the latency of the requests that were due."

    async def measure():
        times = []
        server = await asyncio.start_server(
            lambda reader, writer: stall_once(times, reader, writer), "127.0.0.1", 0
        )
        address = server.sockets[0].getsockname()
        results = await open_loop_load(address, [load_test.encode_request("/x", {})], 200, 1.0)
        server.close()
        return results

    results = asyncio.run(measure())
    assert len(results) == 200 and (results["status"] == 200).all() and results["due"].is_sorted()
    assert results["seconds"].max() > 0.45 and (results["seconds"] > 0.1).sum() > 40


def results_of_load(median=30.0, p99=60.0, answered=2500, rates=(66.0, 1448.0)):
    "Return results as in serving.json."
    load = {"asked": 2500, "answered": answered, "lost": 0, "seconds": 5.1, "rate": 488.7}
    load |= {"median": median, "p99": p99, "mean_batch_size": 10.6, "memory": [1257.0]}
    batches = [{"size": size, "rate": rate} for size, rate in zip((1, 64), rates)]
    return {"items": 600, "synthetic": False, "cores": 2, "load": load, "batches": batches}


def test_in_short_follows_the_results():
    good = load_test.serving_in_short(results_of_load(), 100, 100)
    slow = load_test.serving_in_short(results_of_load(p99=400.0), 100, 100)
    bad = load_test.serving_in_short(results_of_load(answered=2000, rates=(66.0, 60.0)), 90, 100)
    assert (
        "every customer got a list" in good[0]
        and "Nobody would notice" in good[1]
        and "1,448" in good[1]
    )
    assert "add a worker" in slow[1] and slow[0] != good[0]
    assert "20.0% of the customers got no list" in bad[0] and "too slow" in bad[1]
    assert "brought nothing" in bad[2] and "10 of 100 confirmed clicks were lost" in bad[3]
    for sentences in (good, slow, bad):
        text = " ".join(sentences)
        assert 2 <= len(sentences) <= 5 and text.count("  ") == 0
        assert not re.search(r"nan|None|\(\)|\[\]", text)


def test_load_on_a_process(run):
    load = serving.measure_load(run, 1.5, 40)
    assert load["asked"] == load["answered"] == 60 and load["lost"] == 0
    assert 0 < load["median"] <= load["p99"] <= load["max"]
    assert load["memory"][0] > 50 and load["mean_batch_size"] >= 1


def test_synthetic_catalog_run(tmp_path):
    run = synthetic_catalogs.synthetic_catalog_run(tmp_path / "m", 120)
    service = open_service(run.folder)
    assert len(service.catalog.products) == 120 == service.pipelines["hybrid"].model.n_items
    answer = service.answer([service.parse_request(RecommendRequest())])[0]
    assert answer["items"][9]["rank"] == 10
    service.close()


# ---------------------------------------------------------------- OpenAPI description


def check_conformance(service, n_examples):
    "Check that answers to valid and invalid requests are as described; return the number of both."
    schemathesis = pytest.importorskip("schemathesis")
    from hypothesis import HealthCheck, Phase, given, settings
    from schemathesis.checks import not_a_server_error
    from schemathesis.specs.openapi import checks

    conformance_checks = [
        not_a_server_error,
        checks.content_type_conformance,
        checks.response_schema_conformance,
        checks.status_code_conformance,
    ]
    responses = []
    schema = schemathesis.openapi.from_asgi("/openapi.json", make_app(service))
    for result in schema.get_all_operations():
        operation = result.ok()

        @settings(
            max_examples=n_examples,
            deadline=None,
            database=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
            phases=[Phase.explicit, Phase.generate],
        )
        @given(case=operation.as_strategy())
        def check_case(case):
            response = case.call()
            responses.append((operation.path, response.status_code))
            case.validate_response(response, checks=conformance_checks)
            assert response.status_code < 500

        check_case()
    expected = {("/api/recommend", status) for status in (200, 404, 422)}
    expected |= {("/api/items", 200), ("/api/history", 404)}
    expected |= {("/api/similar", 404), ("/api/feedback", 404)}
    assert expected <= set(responses), set(responses)
    return len(responses)


def test_conformance(service):
    assert check_conformance(service, 60) > 200


@pytest.mark.long
def test_conformance_thousands_of_times(service):
    n_requests = check_conformance(service, 1500)
    print(f"{n_requests:,} requests")
    assert n_requests >= 5000
