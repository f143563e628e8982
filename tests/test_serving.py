"The service: what it answers, what it keeps, what it refuses, and what it survives."

import asyncio
import hashlib
import itertools
import json
import os
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
import torch
import uvicorn
from prometheus_client.parser import text_string_to_metric_families

import widedeep_nb.serving as serving
from widedeep_nb.core import Run, UserError
from widedeep_nb.data import load
from widedeep_nb.recommend import Rules
from widedeep_nb.run import cli, main
from widedeep_nb.serving import (
    BatchQueue,
    FeedbackEvent,
    FeedbackStore,
    RecommendRequest,
    TimeoutProtocol,
    make_app,
    open_loop_load,
    open_service,
    pl_probabilities,
    sample_plackett_luce,
)

httpx = pytest.importorskip("httpx")
ROOT = Path(__file__).parents[1]
PLAN = {"lists": {"popularity": 0.3, "neighbours": 0.4, "content": 0.3}, "stars": {"ridge": 1.0}}


@pytest.fixture(scope="session")
def made(small_run):
    "A small run with three fitted models."
    return small_run(hybrid={"plan": PLAN}, item_knn={}, popularity={})


@pytest.fixture
def shop(made, tmp_path):
    shop = open_service(made.folder, feedback_dir=tmp_path, seed=0)
    yield shop
    shop.close()


@contextmanager
def in_process(shop, **how):
    "A client of the service without a network."
    app = make_app(shop, **how)

    class Client:
        def __call__(self, method, path, body=None, **more):
            if body is not None:
                more["json"] = body
            return asyncio.run(self.send(method, path, more))

        async def send(self, method, path, more):
            async with httpx.AsyncClient(
                transport=httpx.ASGITransport(app, raise_app_exceptions=False),
                base_url="http://localhost",
            ) as c:
                return await c.request(method, path, **more)

        def all(self, calls):
            async def go():
                return await asyncio.gather(
                    *[self.send(m, p, {"json": b} | h) for m, p, b, h in calls]
                )

            return asyncio.run(go())

    yield Client()


@pytest.fixture
def ask(shop):
    with in_process(shop) as client:
        yield client


@contextmanager
def listening(app, **how):
    "The service behind a socket, in a thread of this process."
    door = serving.bind_socket("127.0.0.1", 0)
    server = uvicorn.Server(
        uvicorn.Config(
            app, http=TimeoutProtocol, ws="none", lifespan="off", log_level="critical", **how
        )
    )
    thread = threading.Thread(target=server.run, kwargs={"sockets": [door]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield door.getsockname()
    finally:
        server.should_exit = True
        thread.join()


@contextmanager
def process(folder, *words, env=None, **how):
    "The service as a process."
    child = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "widedeep_nb.run",
            "serve",
            str(folder),
            "--port",
            "0",
            *map(str, words),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=os.environ | (env or {}),
        **how,
    )
    try:
        line = child.stdout.readline()
        assert line.startswith("http://127.0.0.1:"), child.communicate()
        yield child, line.split(" ")[0]
    finally:
        child.kill()
        child.communicate()


def post(address, path, body, **headers):
    request = urllib.request.Request(
        address + path, json.dumps(body).encode(), {"content-type": "application/json"} | headers
    )
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as e:
        return e.code, json.load(e)


def event(key, user, item, kind="purchase", **more):
    return {"key": key, "user": user, "item": item, "event": kind, **more}


def codes_in(answer):
    return [i["item"] for i in answer.json()["items"]]


# ---------------------------------------------------------------- what it answers


def test_a_list_is_the_shelfs(shop, ask, made):
    "Through HTTP, numbering and batches comes what the shelf says."
    user = shop.catalog.users[3]
    found = ask("POST", "/api/recommend", {"user": user, "k": 7}).json()
    shelf = shop.pipelines["hybrid"]
    want = shelf.recommend([user], 7)
    assert [i["item"] for i in found["items"]] == want["item"].to_list() and [
        i["rank"] for i in found["items"]
    ] == list(range(1, 8))
    assert np.allclose(
        [i["score"] for i in found["items"]], want["score"], rtol=1e-4
    ) and np.allclose([i["stars"] for i in found["items"]], want["stars"], rtol=1e-4)
    assert [i["because"] and i["because"]["item"] for i in found["items"]] == want[
        "because"
    ].to_list() and any(i["because"] for i in found["items"])
    assert [i["title"] for i in found["items"]] == want["title"].to_list() and [
        i["price"] for i in found["items"]
    ] == want["price"].to_list()
    assert (
        found["user"] == user
        and found["model"] == "hybrid"
        and not found["explored"]
        and {i["propensity"] for i in found["items"]} == {1.0}
    )
    a, b, c = want["item"][:3]
    found = ask(
        "POST",
        "/api/recommend",
        {"basket": [{"item": a, "rating": 5}, {"item": b, "rating": 1}, {"item": c}], "k": 50},
    ).json()
    said = {i["because"]["item"]: i["because"]["liked"] for i in found["items"] if i["because"]}
    assert said.items() <= {a: True, b: False, c: None}.items() and len(said) >= 2
    basket = dict(zip(want["item"][:2], (5.0, None)))
    found = ask(
        "POST",
        "/api/recommend",
        {
            "basket": [{"item": i, "rating": r} for i, r in basket.items()],
            "model": "item-knn",
            "diversity": 0.3,
            "rules": {"highest": 90},
        },
    )
    assert (
        codes_in(found)
        == shop.pipelines["item-knn"]
        .recommend([basket], 10, diversity=0.3, rules=Rules(max_price=90))["item"]
        .to_list()
    )


def test_the_log_is_a_history_whatever_the_model_saw(made, tmp_path):
    "Events that came after the fit count: the log is asked, not the model's memory."
    log = made.read("interactions.parquet")
    shop = open_service(made.folder, feedback_dir=tmp_path)
    knows = shop.pipelines["hybrid"].model.train_history
    row = int(shop.catalog.user_rows([shop.catalog.users[5]])[0])
    mine = shop.catalog.train_history.select(torch.tensor([row]))
    assert sorted(shop.catalog.products["item"].gather(mine.item.numpy())) == sorted(
        log.filter(pl.col("rating").is_not_null(), user=shop.catalog.users[5])["item"]
    )
    assert len(shop.catalog.train_history.item) == log["rating"].count() and len(knows.item) == len(
        shop.catalog.train_history.item
    )
    shop.close()


def test_together_is_as_alone(shop):
    "Forty questions of six kinds in one batch get the very lists that each would get by itself."
    draw = np.random.default_rng(0)
    items, users = shop.catalog.products["item"], shop.catalog.users
    kinds = [
        {"k": 5},
        {"k": 9, "model": "item-knn"},
        {"k": 5, "diversity": 0.5},
        {"k": 4, "order": "revenue"},
        {"k": 3, "rules": {"lowest": 50}},
        {"k": 5, "candidates": "all"},
    ]
    asked = []
    for n in range(40):
        who = (
            {"user": users[int(draw.integers(len(users)))]}
            if n % 2
            else {
                "basket": [{"item": items[int(i)]} for i in draw.integers(0, len(items), 3)],
                "not_for_me": [items[int(draw.integers(len(items)))]],
            }
        )
        asked.append(shop.parse_request(RecommendRequest(**kinds[n % 6], **who)))

    def plain(answer):
        return [(i["item"], round(i["score"], 5), i["because"]) for i in answer["items"]]

    together = shop.answer(asked)
    assert [plain(a) for a in together] == [plain(shop.answer([q])[0]) for q in asked]
    assert len({a["list"] for a in together}) == 40 and len({str(plain(a)) for a in together}) > 30


def test_one_bad_question_spoils_no_other(shop, ask, monkeypatch):
    rank = shop.pipelines["hybrid"].rank

    def fails_for_two(users, history, k, **how):
        if k == 2:
            raise RuntimeError("/secret/path")
        return rank(users, history, k, **how)

    monkeypatch.setattr(shop.pipelines["hybrid"], "rank", fails_for_two)
    answers = ask.all(
        [("POST", "/api/recommend", {"k": k}, {}) for k in (1, 2, 3, 2, 4)]
        + [("POST", "/api/recommend", {"k": 5, "rules": {"blocked": ["no such thing"]}}, {})]
    )
    assert [a.status_code for a in answers] == [200, 500, 200, 500, 200, 422]
    assert (
        answers[1].json() == {"error": "something is wrong here; it has been noted"}
        and "no such thing" in answers[5].json()["error"]
    )


def test_what_the_shop_knows(shop, ask, made):
    log, items = made.read("interactions.parquet"), made.read("items.parquet")
    about = ask("GET", "/api/about").json()
    assert (
        about["models"] == ["hybrid", "item-knn", "popularity"]
        and about["default"] == "hybrid"
        and about["items"] == len(items)
        and about["stars"]
        and about["prices"]
        and about["writing"] == "open"
    )
    assert (
        ask("POST", "/api/recommend", {"rules": {"allowed": about["categories"][-1:]}}).status_code
        == 200
    )
    title = items["title"].drop_nulls()[4]
    word, other = title.split()[0], title.split()[-1]
    found = ask("GET", "/api/items", params={"search": f"{other.upper()} {word.lower()}"}).json()[
        "items"
    ]
    assert title in [p["title"] for p in found] and all(
        word.lower() in p["title"].lower() and other.lower() in p["title"].lower() for p in found
    )
    assert (
        ask("GET", "/api/items", params={"search": ".*"}).json() == {"items": []}
        and len(ask("GET", "/api/items", params={"limit": 3}).json()["items"]) == 3
    )
    rated = log.filter(pl.col("rating").is_not_null())
    most = rated["user"].value_counts(sort=True).row(0)
    assert ask("GET", "/api/users", params={"limit": 1}).json()["users"] == [
        {"user": most[0], "events": most[1]}
    ]
    past = ask("GET", "/api/history", params={"user": most[0], "limit": 200}).json()["events"]
    want = rated.filter(user=most[0]).sort("timestamp", descending=True)
    assert [e["product"]["item"] for e in past] == want["item"].to_list() and [
        e["rating"] for e in past
    ] == want["rating"].to_list()
    assert [e["time"][:10] for e in past] == want["timestamp"].dt.strftime("%Y-%m-%d").to_list()
    near = ask("GET", "/api/similar", params={"item": items["item"][0], "k": 4}).json()
    assert (
        near["item"]["item"] == items["item"][0]
        and len(near["items"]) == 4
        and items["item"][0] not in [i["item"] for i in near["items"]]
    )
    assert [i["similarity"] for i in near["items"]] == sorted(
        [i["similarity"] for i in near["items"]], reverse=True
    )


def test_models_that_know_fewer_products(shop, ask):
    "A product that only one model knows is asked of that one, and left out of the histories of the other."
    hybrid, knn = shop.pipelines["hybrid"].model, shop.pipelines["item-knn"].model
    only = next(i for i in hybrid.all_items if i not in knn.all_items)
    assert ask("GET", "/api/similar", params={"item": only}).status_code == 200
    assert ask("GET", "/api/similar", params={"item": only, "model": "item-knn"}).status_code == 404
    assert (
        ask("POST", "/api/recommend", {"basket": [{"item": only}], "model": "item-knn"}).status_code
        == 200
    )


def test_very_many_products_are_looked_at_in_two_stages(shop, made, tmp_path, monkeypatch):
    "The same lists, by way of candidates."
    monkeypatch.setattr(serving, "LARGE", 100)
    two = open_service(made.folder, feedback_dir=tmp_path / "two")
    assert two.pipelines[
        "hybrid"
    ].retrieve.__self__.__class__.__name__ == "TwoStages" and not hasattr(
        two.pipelines["item-knn"].retrieve, "parts"
    )
    alike = []
    for user in shop.catalog.users[:20]:
        one, other = [
            [
                i["item"]
                for i in s.answer([s.parse_request(RecommendRequest(user=user))])[0]["items"]
            ]
            for s in (shop, two)
        ]
        alike.append(len(set(one) & set(other)) / 10)
    assert np.mean(alike) > 0.9
    two.close()


# ---------------------------------------------------------------- feedback


def test_feedback_is_history_at_once(shop, ask):
    first = codes_in(ask("POST", "/api/recommend", {"basket": [], "k": 8}))

    def say(n, item, kind, **more):
        return ask("POST", "/api/feedback", event(f"f{n}", "visitor", item, kind, **more))

    assert (
        ask("POST", "/api/recommend", {"user": "visitor"}).status_code == 404
        and ask("GET", "/api/history", params={"user": "visitor"}).status_code == 404
    )
    assert say(0, first[0], "view").status_code == 201
    assert (
        codes_in(ask("POST", "/api/recommend", {"user": "visitor", "k": 8})) == first
    )  # looked at, no more
    for n, kind in enumerate(("click", "cart", "purchase", "more")):
        assert say(n + 1, first[n], kind).status_code == 201
    assert (
        say(5, first[4], "rating", rating=5).status_code == 201
        and say(6, first[5], "less").status_code == 201
    )
    now = codes_in(ask("POST", "/api/recommend", {"user": "visitor", "k": 30}))
    assert not set(now) & set(first[:6])
    liked = [{"item": i, "rating": r} for i, r in zip(first[:5], (None, None, None, None, 5))]
    assert now == codes_in(
        ask("POST", "/api/recommend", {"basket": liked, "not_for_me": [first[5]], "k": 30})
    )
    past = ask("GET", "/api/history", params={"user": "visitor"}).json()["events"]
    assert [(e["product"]["item"], e["event"], e["rating"]) for e in past][:2] == [
        (first[5], "less", None),
        (first[4], "rating", 5.0),
    ] and len(past) == 7
    assert {"user": "visitor", "events": 7} in ask(
        "GET", "/api/users", params={"search": "VISIT"}
    ).json()["users"]


def test_feedback_joins_the_log(shop, ask):
    user = shop.catalog.users[2]
    before = ask("GET", "/api/history", params={"user": user, "limit": 200}).json()["events"]
    item = codes_in(ask("POST", "/api/recommend", {"user": user}))[0]
    ask("POST", "/api/feedback", event("x", user, item))
    after = ask("GET", "/api/history", params={"user": user, "limit": 200}).json()["events"]
    assert after[0]["product"]["item"] == item and after[1:] == before
    assert next(
        u
        for u in ask("GET", "/api/users", params={"search": user}).json()["users"]
        if u["user"] == user
    )["events"] == len(after)
    assert item not in codes_in(ask("POST", "/api/recommend", {"user": user, "k": 100}))


def test_feedback_outlives_the_service(made, tmp_path):
    shop = open_service(made.folder, feedback_dir=tmp_path)
    item = shop.catalog.products["item"][0]
    with in_process(shop) as ask:
        assert ask("POST", "/api/feedback", event("x", "visitor", item, "less")).status_code == 201
    shop.close()
    shop = open_service(made.folder, feedback_dir=tmp_path)
    with in_process(shop) as ask:
        assert ask("POST", "/api/feedback", event("x", "visitor", item, "less")).status_code == 200
        assert item not in codes_in(ask("POST", "/api/recommend", {"user": "visitor", "k": 100}))
    shop.close()


def test_an_event_is_written_once_however_often_it_is_sent(shop, ask):
    item = shop.catalog.products["item"][0]
    answers = ask.all(
        [("POST", "/api/feedback", event("same", "v", item, "click"), {})] * 30
        + [("POST", "/api/feedback", event(f"k{n % 7}", "v", item, "click"), {}) for n in range(70)]
    )
    assert (
        sorted(a.status_code for a in answers) == [200] * 92 + [201] * 8
        and sum(a.json()["new"] for a in answers) == 8
    )
    other = ask("POST", "/api/feedback", event("same", "someone else", item, "click"))
    assert other.status_code == 409 and "\n" not in other.json()["error"]
    with closing(sqlite3.connect(shop.store.path)) as base:
        assert base.execute("SELECT count(*), count(DISTINCT key) FROM events").fetchone() == (8, 8)


def test_it_can_be_read_back_as_a_log(shop, ask, made, tmp_path):
    items = shop.catalog.products["item"]
    for n, (item, kind, stars) in enumerate(
        [
            (items[0], "click", None),
            (items[1], "rating", 4),
            (items[2], "less", None),
            (items[3], "purchase", None),
            (items[4], "more", None),
        ]
    ):
        assert (
            ask(
                "POST",
                "/api/feedback",
                event(str(n), 'ann "the" <x>', item, kind, **({"rating": stars} if stars else {})),
            ).status_code
            == 201
        )
    log = load(f"sqlite:///{shop.store.path}?query=SELECT * FROM log").interactions
    assert log.select("user", "item", "event", "rating").rows() == [
        ('ann "the" <x>', items[0], "click", None),
        ('ann "the" <x>', items[1], "rating", 4.0),
        ('ann "the" <x>', items[3], "purchase", None),
    ]
    assert abs(log["timestamp"].dt.timestamp("ms").max() / 1000 - time.time()) < 60


def test_the_command_feedback(made, tmp_path, capsys):
    words = [
        "feedback",
        str(made.folder),
        "--out",
        str(tmp_path / "x.parquet"),
        "--feedback-dir",
        str(tmp_path),
    ]
    with pytest.raises(SystemExit):
        main(words)
    assert "widedeep serve" in capsys.readouterr().err
    book = FeedbackStore(tmp_path / "feedback.sqlite")
    with pytest.raises(SystemExit):
        main(words)
    assert "nobody has said anything" in capsys.readouterr().err
    book.add_event(FeedbackEvent(key="1", user="u", item="i", event="click")).result()
    main(words)  # while the service runs
    assert pl.read_parquet(tmp_path / "x.parquet")["user"].to_list() == ["u"] and load(
        tmp_path / "x.parquet"
    ).interactions["item"].to_list() == ["i"]
    book.close()


def test_every_list_is_written_down(shop, ask):
    drawn_list = ask(
        "POST", "/api/recommend", {"user": shop.catalog.users[1], "k": 6, "explore": True}
    ).json()
    best = ask("POST", "/api/recommend", {"k": 3, "model": "popularity"}).json()
    shop.close()
    with closing(sqlite3.connect(shop.store.path)) as base:
        rows = base.execute(
            "SELECT list, user, model, explored, position, item, propensity FROM shown ORDER BY list, position"
        ).fetchall()
        when = base.execute("SELECT time FROM lists").fetchall()
    want = [
        (
            a["list"],
            a["user"],
            a["model"],
            int(a["explored"]),
            i["rank"],
            i["item"],
            pytest.approx(i["propensity"]),
        )
        for a in (drawn_list, best)
        for i in a["items"]
    ]
    assert rows == want and all(abs(t / 1000 - time.time()) < 60 for (t,) in when)
    assert (
        drawn_list["explored"]
        and any(i["propensity"] < 0.9 for i in drawn_list["items"])
        and {i["propensity"] for i in best["items"]} == {1.0}
    )


def test_an_acknowledged_event_survives_a_kill(made, tmp_path):
    "Twice in a row; events are sent by four clients until the service dies under them."
    acknowledged, item = [], made.read("items.parquet")["item"][0]
    for life in range(2):
        with process(made.folder, "--feedback-dir", tmp_path) as (child, address):

            def send(client):
                for n in itertools.count():
                    key = f"{life}-{client}-{n}"
                    try:
                        if (
                            post(
                                address,
                                "/api/feedback",
                                event(key, f"user {client}", item, "click"),
                            )[0]
                            == 201
                        ):
                            acknowledged.append(key)
                    except OSError:
                        return

            with ThreadPoolExecutor(4) as pool:
                for client in range(4):
                    pool.submit(send, client)
                while len(acknowledged) < 100 * (life + 1):
                    time.sleep(0.005)
                child.send_signal(signal.SIGKILL)
    with closing(sqlite3.connect(tmp_path / "feedback.sqlite")) as base:
        kept = [k for (k,) in base.execute("SELECT key FROM events")]
    assert (
        len(acknowledged) >= 200
        and set(acknowledged) <= set(kept)
        and len(set(kept)) == len(kept)
        and {k[0] for k in kept} == {"0", "1"}
    )


def test_commits_are_synced(tmp_path):
    book = FeedbackStore(tmp_path / "b.sqlite")
    assert book.base.execute("PRAGMA synchronous").fetchone() == (2,) and book.base.execute(
        "PRAGMA journal_mode"
    ).fetchone() == ("wal",)
    book.close()


# ---------------------------------------------------------------- lists that are drawn


def test_propensities_are_exact():
    "Every list of two among four: its propensity is the product by hand, they sum to one, and a million draws agree."
    w = np.array([0.5, 0.3, 0.15, 0.05])
    n = 1_000_000
    places, chance = sample_plackett_luce(np.tile(w, (n, 1)), 2, np.random.default_rng(0))
    count = np.bincount(places[:, 0] * 4 + places[:, 1], minlength=16)
    total, chi = 0, 0
    for a, b in itertools.permutations(range(4), 2):
        by_hand = w[a], w[b] / (1 - w[a])
        rows = (places[:, 0] == a) & (places[:, 1] == b)
        assert np.allclose(chance[rows], by_hand, rtol=1e-12)
        total, chi = (
            total + by_hand[0] * by_hand[1],
            chi
            + (count[a * 4 + b] - n * by_hand[0] * by_hand[1]) ** 2 / (n * by_hand[0] * by_hand[1]),
        )
    assert abs(total - 1) < 1e-12 and chi < 31.3  # of 11 degrees of freedom; once in a thousand
    assert (places[:, 0] != places[:, 1]).all()


def test_weights():
    shares = pl_probabilities(
        np.array([[0.6, 0.3, 0.1, -np.inf], [0, 0, 0, 0], [2.0, -1, -1, -np.inf]]), 1.0, 0.0
    )
    assert np.allclose(
        shares,
        [[0.6, 0.3, 0.1, 0], [0.25] * 4, [*(np.exp([3, 0, 0]) / np.exp([3, 0, 0]).sum()), 0]],
    )
    cold, hot = [pl_probabilities(np.array([[0.6, 0.3, 0.1]]), t, 0.0)[0] for t in (0.1, 10.0)]
    assert cold[0] > 0.99 and np.ptp(hot) < 0.1
    assert np.allclose(
        pl_probabilities(np.array([[1.0, 0.0]]), 1.0, 0.1), [[0.95, 0.05]]
    )  # nothing is quite without a chance
    assert np.allclose(pl_probabilities(np.full((1, 3), -np.inf)), 0)
    places, chance = sample_plackett_luce(
        pl_probabilities(np.array([[0.5, -np.inf, 0.5]])), 3, np.random.default_rng(0)
    )
    assert (
        sorted(places[0, :2]) == [0, 2]
        and places[0, 2] == -1
        and np.allclose(chance[0, :2], [0.5, 1])
    )


def test_a_tiny_chance_is_exact():
    "What is left of a pool is summed from the small end: nothing is lost beside a weight of one."
    w = np.array([[1.0, 1e-18, 3e-18]])
    places, chance = sample_plackett_luce(np.tile(w, (2000, 1)), 3, np.random.default_rng(1))
    second = places[:, 1]
    assert (
        set(second) == {1, 2}
        and np.allclose(chance[second == 1, 1], 0.25)
        and np.allclose(chance[:, 2], 1)
    )


def test_drawn_lists_keep_the_rules(shop, ask):
    user = shop.catalog.users[0]
    seen = {
        e["product"]["item"]
        for e in ask("GET", "/api/history", params={"user": user, "limit": 200}).json()["events"]
    }
    lists = [
        ask(
            "POST",
            "/api/recommend",
            {"user": user, "k": 5, "explore": True, "rules": {"highest": 100, "most_of_brand": 1}},
        ).json()["items"]
        for _ in range(30)
    ]
    for items in lists:
        assert (
            len({i["item"] for i in items}) == 5
            and not seen & {i["item"] for i in items}
            and all(i["price"] <= 100 for i in items)
        )
        assert len({i["brand"] for i in items}) == 5 and all(0 < i["propensity"] < 1 for i in items)
    assert len({str([i["item"] for i in items]) for items in lists}) > 20
    assert (
        len({str(codes_in(ask("POST", "/api/recommend", {"user": user}))) for _ in range(3)}) == 1
    )


def test_drawn_as_often_as_it_says(shop):
    "A first place that is drawn many times, through all of the service."
    asked = [shop.parse_request(RecommendRequest(k=1, explore=True)) for _ in range(64)]
    first = [i["items"][0] for _ in range(40) for i in shop.answer(asked)]
    found = (
        pl.DataFrame(first, infer_schema_length=None)
        .group_by("item")
        .agg(pl.len(), pl.col("propensity").first())
        .top_k(5, by="len")
    )
    expected = found["propensity"] * len(first)
    assert ((found["len"] - expected).abs() < 4 * expected.sqrt()).all() and found[
        "propensity"
    ].max() > 0.03


def test_exploring_by_default(made, tmp_path):
    shop = open_service(made.folder, explore=0.5, feedback_dir=tmp_path)
    with in_process(shop) as ask:
        assert (
            ask("POST", "/api/recommend", {}).json()["explored"]
            and not ask("POST", "/api/recommend", {"explore": False}).json()["explored"]
        )
    shop.close()


# ---------------------------------------------------------------- a run that is what it was


@pytest.fixture
def copied(made, tmp_path):
    subprocess.run(["cp", "-r", made.folder, tmp_path / "run"], check=True)
    return tmp_path / "run"


def damage(path):
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


@pytest.mark.parametrize(
    "file",
    ["interactions.parquet", "items.parquet", "users.parquet", "models/hybrid/model.safetensors"],
)
def test_a_flipped_bit_is_not_served(copied, file):
    damage(copied / file)
    with pytest.raises(UserError, match="not what was written|not those that were saved") as e:
        open_service(copied)
    assert "\n" not in str(e.value) and "run" in str(e.value)


def test_what_is_missing_is_said(copied, capsys):
    about = json.loads((copied / "run.json").read_text())
    (copied / "run.json").write_text(json.dumps(about | {"hashes": {}}))
    with pytest.raises(SystemExit) as e:
        main(["serve", str(copied), "--port", "0"])
    assert e.value.code == 2 and capsys.readouterr().err.count("\n") == 1
    (copied / "run.json").write_text(json.dumps(about))
    (copied / "items.parquet").unlink()
    with pytest.raises(UserError, match="items.parquet"):
        open_service(copied)
    with pytest.raises(UserError, match="unknown model 'gru'; known: hybrid, item-knn, popularity"):
        open_service(copied, ("gru",))


def test_a_book_that_cannot_be_written(made, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="cannot be written.*--book"):
        open_service(made.folder, feedback_dir=tmp_path / "file")
    (tmp_path / "feedback.sqlite").write_text(
        "no database at all, and longer than the head of one " * 100
    )
    with pytest.raises(UserError, match="cannot be written.*--book"):
        open_service(made.folder, feedback_dir=tmp_path)


def test_a_run_writes_its_hashes(made, tmp_path):
    "A step writes the hash of each table that it makes."
    from widedeep_nb.preprocessing import preprocess

    run = Run(tmp_path / "r", dataset="demo?ratings=2000")
    preprocess(run)
    tables = {
        str(p.relative_to(run.folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in run.folder.rglob("*.parquet")
    }
    assert tables == run.manifest["hashes"] and {
        "interactions.parquet",
        "items.parquet",
        "users.parquet",
        "train.parquet",
    } <= set(tables)


def test_a_folder_that_is_written_while_it_is_read(copied, monkeypatch):
    opened = serving.open_shelf

    def slow(run, name):
        shelf = opened(run, name)
        (copied / "items.parquet").touch()
        return shelf

    monkeypatch.setattr(serving, "open_shelf", slow)
    with pytest.raises(UserError, match="was being written while it was read"):
        open_service(copied)


def test_a_folder_that_changes_while_it_is_served(copied, tmp_path):
    "Files overwritten in place, cut off and removed: the lists stay what they were, and health says so."
    with process(copied, "--feedback-dir", tmp_path / "book") as (child, address):
        user = pl.read_parquet(copied / "interactions.parquet")["user"][0]

        def plain():
            return [
                (i["item"], i["score"], i["stars"])
                for i in post(address, "/api/recommend", {"user": user, "k": 20})[1]["items"]
            ]

        def health():
            return json.load(urllib.request.urlopen(address + "/health"))

        before = plain()
        assert health()["status"] == "ok"
        weights = copied / "models/hybrid/model.safetensors"
        with open(weights, "r+b") as f:
            size = f.seek(0, 2)
            f.seek(size // 4)
            f.write(os.urandom(size // 2))
        assert (
            health()["status"] == "changed"
            and "models/hybrid/model.safetensors" in health()["note"]
            and plain() == before
        )
        os.truncate(weights, 100)
        (copied / "items.parquet").write_bytes(b"")
        (copied / "interactions.parquet").unlink()
        assert plain() == before and all(
            name in health()["note"] for name in ("items.parquet", "interactions.parquet")
        )
        assert child.poll() is None


# ---------------------------------------------------------------- what it refuses

BAD = [
    ("POST", "/api/recommend", {"k": 0}, 422),
    ("POST", "/api/recommend", {"k": 101}, 422),
    ("POST", "/api/recommend", {"k": "ten"}, 422),
    ("POST", "/api/recommend", {"k": 1e99}, 422),
    ("POST", "/api/recommend", {"basket": [{"item": "x"}] * 201}, 422),
    ("POST", "/api/recommend", {"basket": {"x": 5}}, 422),
    ("POST", "/api/recommend", {"basket": [{"item": ""}]}, 422),
    ("POST", "/api/recommend", {"basket": [{"item": "x" * 201}]}, 422),
    ("POST", "/api/recommend", {"basket": [{"item": "x", "rating": 6}]}, 422),
    ("POST", "/api/recommend", {"user": "nobody"}, 404),
    ("POST", "/api/recommend", {"model": "nothing"}, 404),
    ("POST", "/api/recommend", {"rules": {"lowest": 9, "highest": 8}}, 422),
    ("POST", "/api/recommend", {"rules": {"lowest": -1}}, 422),
    ("POST", "/api/recommend", {"rules": {"allowed": ["nothing of that name"]}}, 422),
    ("POST", "/api/recommend", {"rules": {"price": 3}}, 422),
    ("POST", "/api/recommend", {"diversity": 2}, 422),
    ("POST", "/api/recommend", {"order": "worst"}, 422),
    ("POST", "/api/recommend", {"explore": "perhaps"}, 422),
    ("POST", "/api/recommend", [], 422),
    ("POST", "/api/recommend", "x", 422),
    ("POST", "/api/recommend", None, 422),
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


@pytest.mark.parametrize("method, path, body, status", BAD)
def test_bad_requests(ask, method, path, body, status):
    answer = ask(method, path, body)
    assert answer.status_code == status, answer.text
    assert (
        list(answer.json()) == ["error"]
        and "\n" not in answer.json()["error"]
        and "Traceback" not in answer.text
        and ".py" not in answer.text
    )


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
def test_bad_bytes(ask, raw):
    answer = ask(
        "POST", "/api/recommend", content=raw, headers={"content-type": "application/json"}
    )
    assert (
        400 <= answer.status_code < 500
        and list(answer.json()) == ["error"]
        and "\n" not in answer.json()["error"]
    )


def test_a_rating_needs_stars_and_nothing_else_has(ask, shop):
    item = shop.catalog.products["item"][0]
    for bad in (
        event("a", "u", item, "rating"),
        event("a", "u", item, "click", rating=3),
        event("a", "u", item, "rating", rating=99),
    ):
        assert ask("POST", "/api/feedback", bad).status_code == 422


def test_odd_ids_go_through(ask, shop):
    "Whatever a shop calls its people: quotes, line ends, another script, a nought."
    item = shop.catalog.products["item"][0]
    for n, user in enumerate(
        ["o'hara; DROP TABLE events", "a\nb", "\x00", "日本", "%_", "\U0001f600" * 50, " "]
    ):
        assert (
            ask("POST", "/api/feedback", event(f"odd {n}", user, item, "click")).status_code == 201
        )
        assert (
            item not in codes_in(ask("POST", "/api/recommend", {"user": user, "k": 100}))
            and len(ask("GET", "/api/history", params={"user": user}).json()["events"]) == 1
        )


def test_a_large_body_is_not_read(ask):
    big = b'{"user": "' + b"x" * 70_000 + b'"}'
    for headers in ({}, {"transfer-encoding": "chunked"}):

        async def pieces():
            for a in range(0, len(big), 1000):
                yield big[a : a + 1000]

        answer = ask(
            "POST",
            "/api/recommend",
            content=pieces() if headers else big,
            headers={"content-type": "application/json"},
        )
        assert answer.status_code == 413 and "65,536" in answer.json()["error"]
    assert (
        ask(
            "POST",
            "/api/recommend",
            content=b"{}" + b" " * 65_000,
            headers={"content-type": "application/json"},
        ).status_code
        == 200
    )


def test_writing_needs_the_token(shop, monkeypatch):
    item, compared = shop.catalog.products["item"][0], []
    monkeypatch.setattr(
        serving.hmac, "compare_digest", lambda a, b: compared.append((a, b)) or (a == b)
    )
    with in_process(shop, token="sésame") as ask:

        def say(**headers):
            return ask(
                "POST",
                "/api/feedback",
                event("t", "u", item, "click"),
                headers={k: v.encode() for k, v in headers.items()},
            )

        assert [
            say().status_code,
            say(authorization="Bearer wrong").status_code,
            say(authorization="sesame").status_code,
            say(authorization="Bearer").status_code,
        ] == [401] * 4
        assert list(say().json()) == ["error"] and say().headers["www-authenticate"] == "Bearer"
        assert (
            ask("GET", "/api/about").json()["writing"] == "token"
            and ask("POST", "/api/recommend", {}).status_code == 200
        )
        assert say(authorization="Bearer sésame").status_code == 201
    assert len(compared) == 7


def test_nobody_elses_page_can_use_it(ask, shop):
    "No other origin is let in, and a form of another page cannot write: it cannot send JSON."
    answer = ask("GET", "/api/about", headers={"origin": "https://elsewhere.example"})
    assert not [h for h in answer.headers if h.startswith("access-control")]
    assert (
        ask(
            "OPTIONS",
            "/api/feedback",
            headers={
                "origin": "https://elsewhere.example",
                "access-control-request-method": "POST",
            },
        ).status_code
        == 405
    )
    for kind in (
        "text/plain",
        "application/x-www-form-urlencoded",
        "multipart/form-data; boundary=x",
        "",
    ):
        answer = ask(
            "POST",
            "/api/feedback",
            content=json.dumps(event("c", "u", shop.catalog.products["item"][0], "click")),
            headers={"content-type": kind},
        )
        assert answer.status_code == 422
    with in_process(shop, hosts=("localhost", "127.0.0.1", "::1")) as ask:
        for host, status in (
            ("localhost", 200),
            ("localhost:8000", 200),
            ("127.0.0.1:1", 200),
            ("[::1]:80", 200),
            ("[::1]", 200),
            ("elsewhere.example", 400),
            ("localhost.elsewhere.example:80", 400),
            ("", 400),
        ):
            assert ask("GET", "/health", headers={"host": host}).status_code == status, host


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
def test_headers_are_on_every_answer(ask, path):
    answer = ask("GET", path)
    assert (
        answer.headers["content-security-policy"].startswith("default-src 'self'")
        and answer.headers["x-content-type-options"] == "nosniff"
        and answer.headers["referrer-policy"] == "no-referrer"
    )


def test_pages_load_nothing_from_elsewhere(ask):
    for path in ("/", "/docs", "/static/shop.css", "/static/shop.js"):
        answer = ask("GET", path)
        assert answer.status_code == 200 and not [
            m
            for m in ('src="http', "src='http", 'href="http', "url(http", "@import", "cdn.")
            if m in answer.text
        ], path
    api = ask("GET", "/openapi.json").json()
    docs = ask("GET", "/docs").text
    assert all(path in docs for path in api["paths"]) and {
        "/api/recommend",
        "/api/similar",
        "/api/feedback",
        "/health",
        "/metrics",
    } <= set(api["paths"])


# ---------------------------------------------------------------- what it survives


def test_an_error_of_ours_is_noted_where_it_runs_only(shop, ask, monkeypatch, caplog):
    monkeypatch.setattr(shop, "lists", lambda questions: 1 / 0)
    answer = ask("POST", "/api/recommend", {})
    assert (
        answer.status_code == 500
        and answer.json() == {"error": "something is wrong here; it has been noted"}
        and "ZeroDivisionError" in caplog.text
    )
    assert "content-security-policy" in answer.headers


def test_slow_clients_hold_up_nobody(shop, monkeypatch):
    "Two hundred clients that send a byte now and then: others are served, and the slow are let go."
    monkeypatch.setattr(TimeoutProtocol, "patience", 1.0)
    with listening(make_app(shop), timeout_keep_alive=1) as at:
        slow = [socket.create_connection(at) for _ in range(200)]
        for n, s in enumerate(slow):
            s.sendall(
                [
                    b"",
                    b"GET /health HTTP/1.1\r\nx: ",
                    b"POST /api/recommend HTTP/1.1\r\ncontent-type: application/json\r\ncontent-length: 500\r\n\r\n{",
                    b"\r\n",
                ][n % 4]
            )
        begun = time.monotonic()
        assert post(f"http://127.0.0.1:{at[1]}", "/api/recommend", {})[0] == 200
        for _ in range(5):
            time.sleep(0.25)
            for s in slow:
                try:
                    s.sendall(b"a" if slow.index(s) % 4 else b"")
                except OSError:
                    pass
            assert post(f"http://127.0.0.1:{at[1]}", "/api/recommend", {})[0] == 200
        time.sleep(max(0, 2.5 - (time.monotonic() - begun)))
        gone = 0
        for s in slow:
            s.settimeout(2)
            try:
                gone += s.recv(1000) in (b"",) or s.recv(1000) == b""
            except ConnectionError:
                gone += 1
            s.close()
        assert gone == 200


def test_a_request_in_pieces_is_served(shop, monkeypatch):
    monkeypatch.setattr(TimeoutProtocol, "patience", 5.0)
    raw = serving.encode_request("/api/recommend", {"k": 2})
    with listening(make_app(shop)) as at, socket.create_connection(at) as s:
        s.settimeout(10)
        for _ in range(3):  # over one connection
            for a in range(0, len(raw), 37):
                s.sendall(raw[a : a + 37])
                time.sleep(0.002)
            answer = b""
            while answer.count(b'"rank"') < 2:
                answer += s.recv(65536)
            assert answer.startswith(b"HTTP/1.1 200")
        body = b"{}" + b" " * 40_000  # a long body, and many of them, are no long head
        for _ in range(3):
            s.sendall(
                b"POST /api/recommend HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
                % len(body)
                + body
            )
            answer = b""
            while answer.count(b'"rank"') < 10:
                answer += s.recv(65536)
            assert answer.startswith(b"HTTP/1.1 200")


def test_an_endless_head_is_cut_off(shop):
    with listening(make_app(shop)) as at, socket.create_connection(at) as s:
        s.sendall(b"GET /health HTTP/1.1\r\nx: ")
        with pytest.raises(ConnectionError):
            for _ in range(2000):
                s.sendall(b"a" * 10_000)
                time.sleep(0.001)
        assert post(f"http://127.0.0.1:{at[1]}", "/api/recommend", {})[0] == 200


def test_a_full_disk(shop, ask):
    "Feedback is refused with a reason and is not there afterwards; lists go on; and it heals."
    item = shop.catalog.products["item"][0]

    def say(n):
        return ask("POST", "/api/feedback", event(f"d{n}", "user " + "x" * 150, item, "click"))

    shop.store.base.execute(
        f"PRAGMA max_page_count = {shop.store.base.execute('PRAGMA page_count').fetchone()[0] + 2}"
    )
    answers = [say(n) for n in range(200)]
    refused = [n for n, a in enumerate(answers) if a.status_code == 507]
    assert (
        refused
        and {a.status_code for a in answers} == {201, 507}
        and "room" in answers[refused[0]].json()["error"]
    )
    assert {ask("POST", "/api/recommend", {"k": 100}).status_code for _ in range(20)} == {
        200
    } and say(refused[0]).status_code == 507
    health = ask("GET", "/health").json()
    assert (
        health["status"] == "cannot write"
        and "full" in health["note"]
        and health["lists_lost"] >= 1
    )
    with closing(sqlite3.connect(shop.store.path)) as base:
        kept = {k for (k,) in base.execute("SELECT key FROM events")}
    assert kept == {f"d{n}" for n, a in enumerate(answers) if a.status_code == 201}
    shop.store.base.execute("PRAGMA max_page_count = 1000000")
    assert say(refused[0]).status_code == 201 and ask("GET", "/health").json()["status"] == "ok"


def test_files_that_may_not_grow(made, tmp_path):
    "The same with the system's own limit, and a process that is started again."
    item, stop = made.read("items.parquet")["item"][0], 300_000
    with process(
        made.folder,
        "--feedback-dir",
        tmp_path,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (stop, stop)),
    ) as (child, address):
        answers = {}
        for n in range(3000):
            answers[f"r{n}"] = post(
                address, "/api/feedback", event(f"r{n}", "u" * 100, item, "click")
            )
            if answers[f"r{n}"][0] == 507:
                break
        assert answers[f"r{n}"][0] == 507 and "\n" not in answers[f"r{n}"][1]["error"]
        assert post(address, "/api/recommend", {"k": 2})[0] == 200 and child.poll() is None
    book = FeedbackStore(tmp_path / "feedback.sqlite")
    with closing(sqlite3.connect(book.path)) as base:
        kept = {k for (k,) in base.execute("SELECT key FROM events")}
    assert {k for k, (status, _) in answers.items() if status == 201} == kept and book.add_event(
        FeedbackEvent(**event(f"r{n}", "u" * 100, item, "click"))
    ).result()
    book.close()


def test_a_long_line_is_not_joined(shop, ask, monkeypatch):
    monkeypatch.setitem(serving.LIMITS, "waiting", 0)
    for path, body in (
        ("/api/recommend", {}),
        ("/api/feedback", event("q", "u", shop.catalog.products["item"][0], "click")),
    ):
        answer = ask("POST", path, body)
        assert answer.status_code == 503 and list(answer.json()) == ["error"]


def test_who_has_gone_gets_no_answer():
    "A client that leaves while it waits disturbs nobody."
    free = threading.Event()
    line = BatchQueue(lambda numbers: free.wait(5) and [n + 1 for n in numbers])

    async def go():
        gone, stays = asyncio.create_task(line.submit(1)), asyncio.create_task(line.submit(2))
        await asyncio.sleep(0.05)
        gone.cancel()
        free.set()
        assert await stays == 3

    asyncio.run(go())
    line.close()


def test_the_log_of_the_process_holds_no_token(made, tmp_path):
    with process(made.folder, "--feedback-dir", tmp_path, env={"WIDEDEEP_TOKEN": "t0p-secret"}) as (
        child,
        address,
    ):
        item = made.read("items.parquet")["item"][0]
        for given, status in (("t0p-secret", 201), ("wr0ng-guess", 401)):
            assert (
                post(
                    address,
                    "/api/feedback",
                    event("k", "u", item, "click"),
                    authorization=f"Bearer {given}",
                )[0]
                == status
            )
        with socket.create_connection(("127.0.0.1", int(address.rsplit(":", 1)[1]))) as s:
            s.sendall(b"nonsense t0p-secret\r\n\r\n") or s.recv(1000)
        child.send_signal(signal.SIGTERM)
        said = "".join(child.communicate(timeout=30))
    assert "t0p-secret" not in said and "wr0ng-guess" not in said


def test_it_ends_when_it_is_told_to(made, tmp_path):
    "Both ways, without a word and with nothing lost."
    for life, told in enumerate((signal.SIGINT, signal.SIGTERM)):
        with process(made.folder, "--feedback-dir", tmp_path) as (child, address):
            assert post(address, "/api/recommend", {})[0] == 200
            child.send_signal(told)
            assert "Traceback" not in child.communicate(timeout=30)[1]
        with closing(sqlite3.connect(tmp_path / "feedback.sqlite")) as base:
            assert base.execute("SELECT count(*) FROM lists").fetchone() == (life + 1,)


def scorer_of(child):
    "The process of a service that scores: of its children the one that has the most memory."
    return max(
        psutil.Process(child.pid).children(recursive=True), key=lambda p: p.memory_info().rss
    )


def test_when_the_scorer_goes_the_service_stops_and_says_so(made, tmp_path):
    with process(made.folder, "--feedback-dir", tmp_path) as (child, address):
        assert post(address, "/api/recommend", {})[0] == 200
        scorer_of(child).kill()
        status, answer = post(address, "/api/recommend", {})
        assert status == 503 and "ask again" in str(answer)
        said = child.communicate(timeout=30)[1]
    assert (
        child.returncode == 2
        and said.strip().splitlines()[-1].startswith("error: the process that scores has gone")
        and "Traceback" not in said
    )


def test_when_the_service_is_killed_the_scorer_goes_too(made, tmp_path):
    with process(made.folder, "--feedback-dir", tmp_path) as (child, address):
        scorer = scorer_of(child)
        assert post(address, "/api/recommend", {})[0] == 200
        child.kill()
        scorer.wait(timeout=20)
    with closing(sqlite3.connect(tmp_path / "feedback.sqlite")) as base:
        assert base.execute("SELECT count(*) FROM lists").fetchone() == (1,)


def test_it_listens_to_this_machine_only(made, capsys):
    options = {p.name: p for p in cli.commands["serve"].params}
    assert options["host"].default == "127.0.0.1" and options["explore"].default == 0
    with closing(socket.create_server(("127.0.0.1", 0))) as taken, pytest.raises(SystemExit) as e:
        main(["serve", str(made.folder), "--port", str(taken.getsockname()[1])])
    assert e.value.code == 2 and "name another --port" in capsys.readouterr().err
    with pytest.raises(UserError, match="cannot listen"):
        serving.bind_socket("no.such.host.invalid", 0)


def test_measures(shop):
    meters = serving.ServiceMetrics()
    with in_process(shop, service_metrics=meters) as ask:
        item = shop.catalog.products["item"][0]
        ask(
            "POST",
            "/api/recommend",
            {"basket": [{"item": item}, {"item": "nothing"}, {"item": "nor this"}]},
        )
        ask("POST", "/api/feedback", event("m", "u", item, "click"))
        for path in ("/api/nothing/1", "/api/nothing/2"):
            ask("GET", path)
        text = ask("GET", "/metrics").text
    of = {
        (s.name, *sorted(s.labels.values())): s.value
        for f in text_string_to_metric_families(text)
        for s in f.samples
    }
    assert (
        of["widedeep_requests_total", "/api/recommend", "200"] == 1
        and of["widedeep_requests_total", "404", "other"] == 2
        and of["widedeep_seconds_count", "/api/feedback"] == 1
    )
    assert (
        of["widedeep_basket_items_total", "yes"] == 1
        and of["widedeep_basket_items_total", "no"] == 2
        and of["widedeep_feedback_total", "click", "yes"] == 1
    )
    assert (
        0 < of["widedeep_model_age_seconds", "hybrid"] < 86_400
        and of["widedeep_waiting",] == 0
        and of["widedeep_lists_lost",] == 0
    )


# ---------------------------------------------------------------- under load


def test_late_answers_are_counted_from_when_they_were_due():
    "A service that stands still for half a second: the requests that came meanwhile have waited, and are told to have."

    async def go():
        begun = []

        async def answer(reader, writer):
            while True:
                try:
                    head = await reader.readuntil(b"\r\n\r\n")
                except asyncio.IncompleteReadError:
                    return writer.close()
                await reader.readexactly(int(head.split(b"content-length: ")[1].split(b"\r\n")[0]))
                begun.append(time.perf_counter())
                if len(begun) == 20:
                    time.sleep(0.5)  # the whole process stands still, the client too
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")

        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        found = await open_loop_load(
            server.sockets[0].getsockname(), [serving.encode_request("/x", {})], 200, 1.0
        )
        server.close()
        return found

    found = asyncio.run(go())
    assert len(found) == 200 and (found["status"] == 200).all() and found["due"].is_sorted()
    assert found["seconds"].max() > 0.45 and (found["seconds"] > 0.1).sum() > 40


def test_a_load_on_a_process(made):
    found = serving.measure_load(made, 1.5, 40)
    assert (
        found["asked"] == found["answered"] == 60
        and found["lost"] == 0
        and 0 < found["median"] <= found["p99"] <= found["max"]
        and found["memory"][0] > 50
        and found["mean_batch_size"] >= 1
    )


def test_a_made_up_shop(tmp_path):
    run = serving.synthetic_catalog_run(tmp_path / "m", 120)
    shop = open_service(run.folder)
    assert (
        len(shop.catalog.products) == 120 == shop.pipelines["hybrid"].model.n_items
        and shop.answer([shop.parse_request(RecommendRequest())])[0]["items"][9]["rank"] == 10
    )
    shop.close()


# ---------------------------------------------------------------- against its own description


def conforms(shop, examples):
    "Requests that fit the description, and some that do not: no error of ours, and answers as described."
    schemathesis = pytest.importorskip("schemathesis")
    from hypothesis import HealthCheck, Phase, given, settings
    from schemathesis.checks import not_a_server_error
    from schemathesis.specs.openapi.checks import (
        content_type_conformance,
        response_schema_conformance,
        status_code_conformance,
    )

    app, done, seen = make_app(shop), [0], set()
    schema = schemathesis.openapi.from_asgi("/openapi.json", app)
    for found in schema.get_all_operations():
        operation = found.ok()

        @settings(
            max_examples=examples,
            deadline=None,
            database=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
            phases=[Phase.explicit, Phase.generate],
        )
        @given(case=operation.as_strategy())
        def check(case):
            answer = case.call()
            done[0] += 1
            seen.add((operation.path, answer.status_code))
            case.validate_response(
                answer,
                checks=[
                    not_a_server_error,
                    content_type_conformance,
                    response_schema_conformance,
                    status_code_conformance,
                ],
            )
            assert answer.status_code < 500

        check()
    assert {
        ("/api/recommend", 200),
        ("/api/recommend", 404),
        ("/api/recommend", 422),
        ("/api/similar", 404),
        ("/api/feedback", 404),
        ("/api/items", 200),
        ("/api/history", 404),
    } <= seen, seen
    return done[0]


def test_it_is_as_described(shop):
    assert conforms(shop, 60) > 200


@pytest.mark.long
def test_it_is_as_described_thousands_of_times(shop):
    done = conforms(shop, 1500)
    print(f"{done:,} requests")
    assert done >= 5000
