"Check downloads from a local server that answers right, wrong, partly, with errors or not at all."

import gzip
import hashlib
import http.server
import threading
from dataclasses import replace

import pytest

from widedeep_nb.data import load
from widedeep_nb.lib import datasets as datasets_module
from widedeep_nb.lib.core import UserError
from widedeep_nb.lib.datasets import DATASETS, Dataset, cache_dir, datasets, fingerprint

ROWS = "\n".join(
    ["user,item,rating,timestamp"]
    + [f"u{i},i{i},{1 + i % 5},{1_365_811_200 + i}" for i in range(20)]
).encode()
ITEMS = gzip.compress(
    b"".join(
        b'{"parent_asin": "i%d", "title": "Thing %d", "price": "None", "details": {"a": [1]}}\n'
        % (i, i)
        for i in range(20)
    )
)
SUM = hashlib.sha256(ROWS).hexdigest()


class Server(http.server.BaseHTTPRequestHandler):
    "Local server; the first part of the path is how it behaves."

    bodies = {"ratings.csv": ROWS, "items.jsonl.gz": ITEMS}

    def log_message(self, *args):
        pass

    def do_GET(self):
        way, name = self.path.strip("/").split("/")
        self.server.asked.append(way)
        body = self.bodies.get(name, b"")
        if way.isdigit():
            return self.send_error(int(way))
        if way == "moved":
            return self.answer(b"", 302, Location="/page/" + name)
        if way == "page":
            body = b"<!doctype html><title>Not here any more</title>"
        if way == "wrong":
            body = body[:-3]
        if way == "cut":
            return self.answer(body[: len(body) // 2], length=len(body))
        if way == "short":
            return self.answer(body[: len(body) // 2])
        if way == "silent":
            return self.server.over.wait(20)
        if way == "stalls":
            self.answer(body[:10], length=len(body))
            return self.server.over.wait(20)
        self.answer(body)

    def answer(self, body, status=200, length=None, **headers):
        self.send_response(status)
        for name, value in {
            "Content-Length": len(body) if length is None else length,
            **headers,
        }.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(body)
        self.wfile.flush()


@pytest.fixture
def served(tmp_path, monkeypatch):
    "Factory of a dataset `toy` with one address per behavior of the server, and an empty cache."
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    server.asked, server.over, server.daemon_threads = [], threading.Event(), True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("WIDEDEEP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets_module, "DOWNLOAD_TIMEOUT", 0.3)

    def toy(*ways, metadata=()):
        def urls(ways, name):
            return tuple(f"http://127.0.0.1:{server.server_port}/{way}/{name}" for way in ways)

        monkeypatch.setitem(
            DATASETS,
            "toy",
            Dataset(
                "a toy shop",
                20,
                "ask the owner",
                1_300_000,
                urls(ways, "ratings.csv"),
                SUM,
                urls(metadata, "items.jsonl.gz"),
                options={"metadata": 0},
            ),
        )
        server.asked.clear()
        return server.asked

    yield toy
    server.over.set()
    server.shutdown()
    server.server_close()


def kept():
    "List the files in the cache."
    return sorted(f.name for f in cache_dir("toy").rglob("*")) if cache_dir("toy").exists() else []


def refused(dataset):
    "Load a dataset that cannot be downloaded; return the message."
    with pytest.raises(UserError) as e:
        load(dataset)
    assert "\n" not in str(e.value) and "try again" in str(e.value)
    return str(e.value)


def test_a_download_is_announced_checked_and_kept(served, capsys):
    asked = served("good")
    assert not datasets().filter(name="toy")["available"].item() and fingerprint("toy") is None
    assert load("toy").report["kept"] == 20 and kept() == ["ratings.csv"]
    notice, bar = capsys.readouterr().err.split("\n", 1)
    assert all(
        part in notice
        for part in ("a toy shop", "20 rows", "1 MB", "ask the owner", str(cache_dir("toy")))
    )
    assert "100%" in bar
    assert datasets().filter(name="toy")["available"].item() and fingerprint("toy") == SUM
    assert load("toy").report["sha256"] == SUM and asked == ["good"]
    assert capsys.readouterr().err == ""  # no notice without a download


@pytest.mark.parametrize(
    "way, why",
    [
        ("wrong", "not the published file"),
        ("page", "not the published file"),
        ("moved", "not the published file"),
        ("cut", "the file ends early"),
        ("short", "not the published file"),
        ("500", "it answers 500"),
        ("404", "it answers 404"),
        ("silent", "no answer in time"),
        ("stalls", "no answer in time"),
    ],
)
def test_a_failed_download_leaves_nothing(served, way, why):
    served(way)
    assert why in refused("toy") and kept() == []
    served("good")
    assert load("toy").report["kept"] == 20


@pytest.mark.parametrize(
    "way, why",
    [
        ("page", "not the published file"),
        ("moved", "not the published file"),
        ("cut", "the file ends early"),
        ("short", "the file ends early"),
        ("404", "it answers 404"),
        ("stalls", "no answer in time"),
    ],
)
def test_a_file_without_a_known_sum_is_read_through_before_it_is_kept(served, way, why):
    served("good", metadata=(way,))
    assert why in refused("toy?metadata=1") and kept() == ["ratings.csv"]
    served("good", metadata=(way, "good"))
    items = load("toy?metadata=1").items
    assert items["title"].to_list() == [f"Thing {i}" for i in range(20)]
    assert items.columns == ["item", "title", "price"]
    assert kept() == ["items.jsonl.gz", "ratings.csv"]
    assert fingerprint("toy?metadata=1") == load("toy?metadata=1").report["sha256"] != SUM


def test_the_next_address_is_tried_where_one_fails(served):
    asked = served("404", "stalls", "good")
    assert load("toy").report["sha256"] == SUM
    assert asked == ["404", "stalls", "good"]
    assert kept() == ["ratings.csv"]


def test_a_damaged_file_in_the_cache_is_replaced(served):
    served("good")
    load("toy")
    (cache_dir("toy") / "ratings.csv").write_bytes(ROWS + b"\nx,y,5,1365811200")
    assert load("toy").report["rows_read"] == 20 and fingerprint("toy") == SUM
    (cache_dir("toy") / "ratings.csv").write_bytes(b"damaged")
    served("500")
    assert "it answers 500" in refused("toy") and kept() == []


def test_a_refused_connection(served, monkeypatch):
    served("good")
    monkeypatch.setitem(
        DATASETS, "toy", replace(DATASETS["toy"], urls=("http://127.0.0.1:9/good/ratings.csv",))
    )
    assert "ConnectionError" in refused("toy") and kept() == []
