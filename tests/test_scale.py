"Sharing out changes nothing: engines, processes and lazy steps give what one plain way gives."

import json
import os
import shutil
import time
from dataclasses import replace

import numpy as np
import polars as pl
import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from widedeep_nb import scale
from widedeep_nb.core import PROTOCOLS, SPLIT_NAMES, UserError, to_interactions
from widedeep_nb.evaluation import top_k_lists
from widedeep_nb.preprocessing import prepare
from widedeep_nb.scale import (
    LOSS_RTOL,
    MS_PER_DAY,
    BenchProcess,
    CandidateGenerator,
    Engine,
    bench,
    crossover_size,
    distributed_curves,
    format_bench,
    format_row_count,
    launch_torchrun,
    load_streaming_split,
    naive_top_k,
    ranking_bench_task,
    readme_size_text,
    recommend_within,
    resource_estimates,
    run_end_to_end,
    saved_epochs,
    scaling_exponents,
    spark_session,
    streaming_split,
    write_plain_log,
    write_synthetic_csv,
    write_training_data,
)
from widedeep_nb.training import SparseAdamW, WideDeepRecommender

TABLES = (*SPLIT_NAMES, "aside", "users", "items")


def drawn(rows, users, items, days, seed=0, whole_days=False):
    "A log without repeats; with whole days many rows share their time, so that ids decide the order."
    draw = np.random.default_rng(seed)
    time = (
        draw.integers(0, days * MS_PER_DAY, rows)
        // (MS_PER_DAY if whole_days else 1)
        * (MS_PER_DAY if whole_days else 1)
    )
    frame = pl.DataFrame(
        {
            "user": draw.integers(0, users, rows),
            "item": (items * draw.random(rows) ** 2).astype(int),
            "rating": draw.integers(1, 6, rows),
            "timestamp": time,
        }
    )
    ids = [
        pl.format("{}{}", pl.lit(c), pl.col(name)).alias(name)
        for name, c in (("user", "u"), ("item", "i"))
    ]
    return to_interactions(
        frame.with_columns(*ids, pl.from_epoch("timestamp", "ms")).unique(
            ["user", "item"], maintain_order=True
        )
    )


def same(place, log, protocol):
    mine, theirs = load_streaming_split(place, protocol), prepare(log, protocol)
    return [name for name in TABLES if not getattr(mine, name).equals(getattr(theirs, name))]


@pytest.mark.parametrize("whole_days", [False, True])
@pytest.mark.parametrize(
    "name, least", [("strict", 4), ("strict", 30), ("filtered-first", 4), ("as-reported", 4)]
)
def test_streamed_split_is_that_of_chapter_03(tmp_path, name, least, whole_days):
    for seed in range(3):
        log, protocol = (
            drawn(1500, 150, 120, 40, seed, whole_days),
            replace(PROTOCOLS[name], min_user=least, min_item=least + 1),
        )
        engine = Engine(tmp_path)
        streaming_split(
            engine,
            engine.read_parquet(write_plain_log(log.lazy(), tmp_path / "log.parquet")),
            protocol,
        )
        assert same(tmp_path, log, protocol) == []


@pytest.mark.parametrize("heaps", [1, 7, 60])
def test_ids_that_share_a_heap_are_told_apart(tmp_path, monkeypatch, heaps):
    monkeypatch.setattr(scale, "HEAPS", heaps)
    log, protocol, engine = (
        drawn(1500, 150, 120, 40),
        replace(PROTOCOLS["as-reported"], min_user=9, min_item=12),
        Engine(tmp_path),
    )
    streaming_split(
        engine, engine.read_parquet(write_plain_log(log.lazy(), tmp_path / "log.parquet")), protocol
    )
    assert (
        same(tmp_path, log, protocol) == []
        and len(load_streaming_split(tmp_path, protocol).train) > 100
    )


def test_what_cannot_be_streamed_is_refused(tmp_path):
    log, engine = drawn(200, 20, 20, 9), Engine(tmp_path)
    rows = engine.read_parquet(write_plain_log(log.lazy(), tmp_path / "log.parquet"))
    for name in ("leave-one-out", "given"):
        with pytest.raises(UserError, match="prepare"):
            streaming_split(engine, rows, PROTOCOLS[name])
    with pytest.raises(UserError, match="no rows"):
        streaming_split(
            engine,
            engine.read_parquet(
                write_plain_log(
                    log.with_columns(timestamp=pl.lit(None, pl.Datetime("ms"))).lazy(),
                    tmp_path / "untimed.parquet",
                )
            ),
        )


@pytest.mark.long
def test_spark_and_polars_give_the_same_split(tmp_path):
    "Row for row and code for code."
    pytest.importorskip("pyspark")
    if not shutil.which("java"):
        pytest.skip("Spark needs a Java")
    session = spark_session("local[2]")
    try:
        for i, (name, least) in enumerate((("strict", 3), ("filtered-first", 4))):
            log, protocol, place = (
                drawn(3000, 200, 150, 40, whole_days=bool(i)),
                replace(PROTOCOLS[name], min_user=least, min_item=least),
                tmp_path / name,
            )
            place.mkdir()
            plain = write_plain_log(log.lazy(), place / "log.parquet")
            for engine in (Engine(place / "spark", session), Engine(place / "polars")):
                engine.folder.mkdir()
                streaming_split(engine, engine.read_parquet(plain), protocol)
            spark, polars = [
                load_streaming_split(place / engine, protocol) for engine in ("spark", "polars")
            ]
            assert [
                t for t in TABLES if not getattr(spark, t).equals(getattr(polars, t))
            ] == [] and len(spark.train)
            assert same(place / "spark", log, protocol) == []
    finally:
        session.stop()


def test_lazy_steps_are_adams_where_every_row_is_touched():
    torch.manual_seed(0)
    dense, lazy = nn.Embedding(6, 4), nn.Embedding(6, 4, sparse=True)
    lazy.load_state_dict(dense.state_dict())
    pace = dict(lr=0.05, weight_decay=0.1)
    ways = [
        (dense, torch.optim.AdamW(dense.parameters(), **pace)),
        (lazy, SparseAdamW(lazy.parameters(), **pace)),
    ]
    for step in range(30):
        ids, target = torch.cat([torch.arange(6), torch.randint(6, (9,))]), torch.randn(15, 4)
        for table, optimiser in ways:
            optimiser.zero_grad()
            (table(ids) - target).square().sum().backward()
            optimiser.step()
    assert torch.allclose(dense.weight, lazy.weight, atol=1e-5) and dense.weight.std() > 0.1


def test_lazy_training_goes_on_from_a_checkpoint(tmp_path):
    "Sparse gradients or not, what was kept is enough, bit for bit."
    log = drawn(1200, 60, 50, 60)
    split, short = (
        prepare(log, replace(PROTOCOLS["strict"], min_user=2, min_item=2)),
        WideDeepRecommender(epochs=2, patience=9, sparse_update_min_rows=1),
    )
    short.checkpoint = tmp_path / "state.safetensors"
    short.fit(split)
    gone_on, whole = [
        WideDeepRecommender(epochs=4, patience=9, sparse_update_min_rows=1) for _ in range(2)
    ]
    gone_on.checkpoint = short.checkpoint
    a, b = gone_on.fit(split).net.state_dict(), whole.fit(split).net.state_dict()
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert all(m.sparse for m in whole.net.modules() if isinstance(m, nn.Embedding))


def test_lists_in_blocks_are_those_of_the_loop():
    model, split, question = ranking_bench_task(n_users=40, ratings=4000, users=90, items=70)
    assert torch.equal(
        naive_top_k(model.net, question.users, split.n_train_items),
        top_k_lists(model, split, question, 5),
    )


@pytest.fixture(scope="module")
def fitted():
    split = prepare(drawn(4000, 150, 120, 90), replace(PROTOCOLS["strict"], min_user=2, min_item=2))
    return WideDeepRecommender(epochs=2).fit(split)


def test_a_short_list_of_everything_is_everything(fitted):
    users = torch.arange(30)
    full = recommend_within(fitted, users, k=5)
    listed = CandidateGenerator.from_model(fitted, n_common=fitted.n_items).recommend(
        users, fitted.train_history.select(users), k=5
    )
    assert (
        full["exhaustive"]
        and full["found"] == 1
        and torch.equal(full["lists"].sort(1)[0], listed.sort(1)[0])
    )


def test_a_short_list_holds_nothing_twice_and_nothing_that_was_had(fitted):
    users = torch.arange(fitted.n_users)
    found = recommend_within(fitted, users, k=10, max_seconds=0)
    assert not found["exhaustive"] and 0 < found["found"] <= 1
    for user, listed in zip(users, found["lists"]):
        listed, had = listed[listed >= 0], fitted.train_history.select(user[None]).item
        assert len(listed.unique()) == len(listed) == 10 and not torch.isin(listed, had).any()


def test_needs_count_what_they_say(fitted):
    split = prepare(drawn(4000, 150, 120, 90), replace(PROTOCOLS["strict"], min_user=2, min_item=2))
    table = resource_estimates(split, {"GFLOP/s": 100.0, "GB/s": 10.0}, pairs_per_second=1.0)
    have = np.zeros((split.n_train_users, split.n_train_items))
    have[split.train["user"], split.train["item"]] = 1
    hours = dict(table.select("what", "hours").rows())
    assert hours["item-knn: exact neighbours of items"] * 3600 == pytest.approx(
        (have @ have.T).diagonal() @ have.sum(1)
    )
    assert hours["user-knn: exact neighbours of people"] * 3600 == pytest.approx(
        (have.sum(0) ** 2).sum()
    )


def test_exponents_of_a_square():
    rows = pl.DataFrame(
        [
            {"rows": n, "repeat": r, "stage": s, "seconds": c * n**p, "memory": 1.0}
            for n in (10, 100, 1000)
            for r in (1, 2, 3)
            for s, c, p in (("a", 2.0, 1), ("b", 0.1, 2))
        ]
    )
    found = {s: e for s, e, *_ in scaling_exponents(rows).rows()}
    assert (
        found["a"] == pytest.approx(1)
        and found["b"] == pytest.approx(2)
        and scaling_exponents(rows, "memory")["exponent"].abs().max() < 1e-9
    )


def engines(polars, spark, memory=lambda n: n / 1e7):
    return pl.DataFrame(
        [
            {
                "rows": n,
                "engine": e,
                "seconds": f(n),
                "memory": memory(n) if e == "Polars" else None,
            }
            for n in (10**4, 10**5, 10**6)
            for e, f in (("Polars", polars), ("Spark", spark))
        ]
    )


def test_where_to_change_over():
    over = crossover_size(engines(lambda n: 1e-6 * n, lambda n: 1e-3 * n**0.5 * 9), 24.0)
    assert over["time"] == pytest.approx(81e6) and over["memory"] == pytest.approx(
        24e7
    )  # 1e-6 n = 9e-3 sqrt(n) at n = 81 million
    assert crossover_size(engines(lambda n: 1e-6 * n, lambda n: 1e-5 * n), 24.0)["time"] == float(
        "inf"
    )  # ten times as slow at every size
    assert crossover_size(engines(lambda n: 1e-6 * n, lambda n: 1e-7 * n), 24.0)[
        "time"
    ] == pytest.approx(1e6)  # overtaken already
    assert (
        format_row_count(81e6) == "about 80,000,000 rows"
        and format_row_count(float("inf")) == "no number of rows"
    )


def test_what_large_logs_take_is_told_only_where_it_was_measured():
    stages = [
        {
            "rows": n,
            "repeat": 1,
            "stage": s,
            "seconds": 60.0 * n,
            "memory": m,
            "rows_read": 7,
            "users": 3,
            "items": 2,
            "disk": 0.5,
            "people": 3,
            "exhaustive": False,
            "would take": 7200.0,
            "found": 0.9,
        }
        for n in (1, 2)
        for s, m in (("read", 1.0), ("split", 2.5), ("lists", 2.0))
    ]
    found = {
        "growth": stages,
        "largest": [
            {"stage": "read", "seconds": 90.0, "memory": 3.0, "rows_read": 44},
            {"stage": "split", "seconds": 30.0, "memory": 4.0},
        ],
        "engines": engines(lambda n: 1e-6 * n, lambda n: 1e-5 * n).to_dicts(),
        "bench": {"machine": {"device": "a CPU", "threads": 2, "memory": 24.0}},
    }
    laptop, colab, cluster = readme_size_text(found).splitlines()
    for said in (
        "7 raw rows of 3 people and 2 products",
        "6.0 minutes",
        "at most 2.5 GB",
        "120 minutes",
        "90%",
        "0.5 GB on the disk",
        "44 rows",
        "2.0 minutes, with at most 4.0 GB",
    ):
        assert said in laptop
    assert "run_on_colab" in colab and "24 GB is enough for up to about 300 rows" in cluster
    for missing in ("largest", "engines"):
        assert readme_size_text(found | {missing: []}) == ""


def test_a_worker_says_what_went_wrong():
    with BenchProcess() as worker:
        with pytest.raises(UserError, match="unknown job 'nonsense'"):
            worker.run_task("nonsense")
        with pytest.raises(UserError, match="TypeError"):
            worker.run_task("large tables: touched rows moved")
        assert (
            worker.run_task("large tables: touched rows moved", ids=1000)["told"] > 0
        )  # and is there for the next job
        worker.process.kill()
        with pytest.raises(UserError, match="has ended"):
            worker.run_task("large tables: touched rows moved", ids=1000)


@pytest.mark.long
def test_bench_has_every_way_and_its_memory():
    found = bench(n_repeats=2, ratings=20_000, users=900, items=600, n_users=20, rows=300_000)
    assert {r["task"] for r in found["records"]} == {
        "training",
        "ranking",
        "preprocessing",
    } and len(format_bench(found)) == 1 + len(found["records"])
    for r in found["records"]:
        assert 0 < r["lo"] <= r["ratio"] <= r["hi"] and r["seconds"] > 0 and r["memory"] > 0
        if r["share of the ceiling"] is not None:
            assert 0 < r["share of the ceiling"] < 1
    memory = {r["way"]: r for r in found["records"]}["the same work, streamed"]
    assert memory["versus memory"] > 0.02  # 300,000 rows in pandas are not nothing


def test_the_whole_way_from_a_raw_file(tmp_path):
    raw = write_synthetic_csv(tmp_path / "ratings.csv", 20_000, 3_000, 300)
    stages = run_end_to_end(str(raw), tmp_path / "work", n_users=50)
    assert (
        [s["stage"] for s in stages] == ["read", "split", "features", "a pass", "lists"]
        and stages[0]["rows_read"] == 20_000
        and stages[-1]["people"] == 50
    )
    assert [s["stage"] for s in run_end_to_end(str(raw), tmp_path / "short", n_users=0)] == [
        "read",
        "split",
    ]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    place = tmp_path_factory.mktemp("together")
    write_training_data(
        place,
        prepare(drawn(6000, 300, 200, 200), replace(PROTOCOLS["strict"], min_user=2, min_item=2)),
    )
    return place


@pytest.mark.long
def test_two_processes_learn_what_one_learns(data):
    alone, both, rows = distributed_curves(data, epochs=4)
    assert (
        alone["curve"][0] - alone["curve"][-1] > 100 * LOSS_RTOL
    )  # it learns, so that agreeing means something
    for other in (both, rows):
        assert np.allclose(alone["curve"], other["curve"], rtol=LOSS_RTOL, atol=0)
    assert (
        both["held"] == alone["held"] and 0.5 <= rows["held"] / alone["held"] < 0.7
    )  # the network behind the tables is held by both
    one, two = [
        [load_file(data / way / "pass-4" / f"{rank}-of-{n}.safetensors") for rank in range(n)]
        for way, n in (("data-1", 1), ("rows-2", 2))
    ]
    dealt = [k for k in one[0] if one[0][k].dim() == 2 and two[0][k].shape != one[0][k].shape]
    assert any("exp_avg_sq" in k for k in dealt) and any(k.startswith("net/") for k in dealt)
    for (
        k
    ) in dealt:  # Adam does not mind a gradient of twice the size, so its means are looked at too
        whole, parts = one[0][k], torch.cat([t[k] for t in two])
        assert parts.shape == whole.shape and (parts - whole).norm() < 1e-2 * whole.norm()


@pytest.mark.long
def test_tables_that_are_dealt_out_are_never_whole(data, tmp_path):
    "With millions of ids a process builds half of the tables and no more, and starts from the weights that one alone would."
    tensors = load_file(data / "data.safetensors")
    save_file(
        tensors,
        tmp_path / "data.safetensors",
        {"sizes": json.dumps({"n_users": 4_000_000, "n_items": 200, "n_categories": 23})},
    )
    found = {}
    for n, way in ((1, "data"), (2, "data"), (2, "rows")):
        assert launch_torchrun(tmp_path, n, modes=(way,), epochs=1).wait(300) == 0
        found[n, way] = json.loads((tmp_path / f"{way}-{n}.json").read_text())
    assert found[2, "data"]["built"] > 0.08  # twenty million weights
    assert found[2, "rows"]["built"] < 0.65 * found[2, "data"]["built"]
    for other in found.values():
        assert np.allclose(found[1, "data"]["curve"], other["curve"], rtol=LOSS_RTOL, atol=0)


@pytest.mark.long
@pytest.mark.parametrize("way", ["data", "rows"])
def test_one_of_two_is_killed_and_training_goes_on(data, tmp_path, way):
    for name in ("undisturbed", "killed"):
        (tmp_path / name).mkdir()
        os.link(data / "data.safetensors", tmp_path / name / "data.safetensors")
    assert launch_torchrun(tmp_path / "undisturbed", 2, modes=(way,), epochs=6).wait(300) == 0
    process, parts = (
        launch_torchrun(tmp_path / "killed", 2, modes=(way,), epochs=6, pause=0.5),
        tmp_path / "killed" / f"{way}-2",
    )
    started = time.monotonic()
    while 2 not in saved_epochs(parts, 2) and time.monotonic() - started < 200:
        time.sleep(0.02)
    victims = [
        p
        for p in psutil.Process(process.pid).children(recursive=True)
        if "together" in p.cmdline() and "torch.distributed.run" not in p.cmdline()
    ]
    assert len(victims) == 2
    victims[-1].kill()
    said = process.communicate(timeout=300)[1]
    assert process.returncode == 0, said
    assert "exitcode: -9" in said, said  # it was killed before it was done
    first, second = [
        json.loads((tmp_path / name / f"{way}-2.json").read_text())
        for name in ("undisturbed", "killed")
    ]
    assert all(first[k] == second[k] for k in ("curve", "held")) and len(first["curve"]) == 6
