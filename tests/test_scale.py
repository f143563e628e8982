"Check that engines, processes and sparse updates give the results of the plain implementations."

import json
import os
import re
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

from widedeep_nb.lib import large_logs
from widedeep_nb.lib.benchmarks import bench, format_bench, naive_top_k, ranking_bench_task
from widedeep_nb.lib.core import PROTOCOLS, SPLIT_NAMES, UserError, to_interactions
from widedeep_nb.lib.distributed import (
    LOSS_RTOL,
    distributed_curves,
    launch_torchrun,
    saved_epochs,
    write_training_data,
)
from widedeep_nb.lib.end_to_end import (
    CandidateGenerator,
    recommend_within,
    run_end_to_end,
)
from widedeep_nb.lib.eval_tasks import top_k_lists
from widedeep_nb.lib.large_logs import (
    MS_PER_DAY,
    Engine,
    load_streaming_split,
    spark_session,
    streaming_split,
    write_plain_log,
    write_synthetic_csv,
)
from widedeep_nb.lib.optimizers import SparseAdamW
from widedeep_nb.lib.profiling import BenchProcess
from widedeep_nb.lib.scale_plots import (
    describe_limits,
    format_row_count,
    readme_size_text,
    scale_in_short,
)
from widedeep_nb.lib.wide_deep import WideDeepRecommender
from widedeep_nb.preprocessing import prepare
from widedeep_nb.scale import crossover_size, resource_estimates, scaling_exponents

TABLES = (*SPLIT_NAMES, "filtered_out", "users", "items")


def make_log(rows, users, items, days, seed=0, whole_days=False):
    "Draw a log without repeats; with whole days rows share their times, so that hashes decide the order."
    rng = np.random.default_rng(seed)
    time = (
        rng.integers(0, days * MS_PER_DAY, rows)
        // (MS_PER_DAY if whole_days else 1)
        * (MS_PER_DAY if whole_days else 1)
    )
    frame = pl.DataFrame(
        {
            "user": rng.integers(0, users, rows),
            "item": (items * rng.random(rows) ** 2).astype(int),
            "rating": rng.integers(1, 6, rows),
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


def different_tables(folder, log, protocol):
    streamed, expected = load_streaming_split(folder, protocol), prepare(log, protocol)
    return [name for name in TABLES if not getattr(streamed, name).equals(getattr(expected, name))]


@pytest.mark.parametrize("whole_days", [False, True])
@pytest.mark.parametrize(
    "name, min_rows", [("strict", 4), ("strict", 30), ("filtered-first", 4), ("as-reported", 4)]
)
def test_streamed_split_equals_prepare(tmp_path, name, min_rows, whole_days):
    for seed in range(3):
        log, protocol = (
            make_log(1500, 150, 120, 40, seed, whole_days),
            replace(PROTOCOLS[name], min_user=min_rows, min_item=min_rows + 1),
        )
        engine = Engine(tmp_path)
        streaming_split(
            engine,
            engine.read_parquet(write_plain_log(log.lazy(), tmp_path / "log.parquet")),
            protocol,
        )
        assert different_tables(tmp_path, log, protocol) == []


@pytest.mark.parametrize("n_buckets", [1, 7, 60])
def test_ids_in_one_hash_bucket_are_counted_separately(tmp_path, monkeypatch, n_buckets):
    monkeypatch.setattr(large_logs, "N_HASH_BUCKETS", n_buckets)
    log, protocol, engine = (
        make_log(1500, 150, 120, 40),
        replace(PROTOCOLS["as-reported"], min_user=9, min_item=12),
        Engine(tmp_path),
    )
    streaming_split(
        engine, engine.read_parquet(write_plain_log(log.lazy(), tmp_path / "log.parquet")), protocol
    )
    assert (
        different_tables(tmp_path, log, protocol) == []
        and len(load_streaming_split(tmp_path, protocol).train) > 100
    )


def test_protocols_that_need_memory_are_refused(tmp_path):
    log, engine = make_log(200, 20, 20, 9), Engine(tmp_path)
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
    "Check the two engines row for row and code for code."
    pytest.importorskip("pyspark")
    if not shutil.which("java"):
        pytest.skip("Spark needs Java")
    session = spark_session("local[2]")
    try:
        for i, (name, min_rows) in enumerate((("strict", 3), ("filtered-first", 4))):
            log, protocol, place = (
                make_log(3000, 200, 150, 40, whole_days=bool(i)),
                replace(PROTOCOLS[name], min_user=min_rows, min_item=min_rows),
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
            assert different_tables(place / "spark", log, protocol) == []
    finally:
        session.stop()


def test_sparse_updates_equal_adamw_where_every_row_is_in_the_batch():
    torch.manual_seed(0)
    dense, lazy = nn.Embedding(6, 4), nn.Embedding(6, 4, sparse=True)
    lazy.load_state_dict(dense.state_dict())
    options = dict(lr=0.05, weight_decay=0.1)
    pairs = [
        (dense, torch.optim.AdamW(dense.parameters(), **options)),
        (lazy, SparseAdamW(lazy.parameters(), **options)),
    ]
    for step in range(30):
        ids, target = torch.cat([torch.arange(6), torch.randint(6, (9,))]), torch.randn(15, 4)
        for table, optimizer in pairs:
            optimizer.zero_grad()
            (table(ids) - target).square().sum().backward()
            optimizer.step()
    assert torch.allclose(dense.weight, lazy.weight, atol=1e-5) and dense.weight.std() > 0.1


def test_training_with_sparse_updates_resumes_from_a_checkpoint(tmp_path):
    "Check that resumed training equals uninterrupted training, bit for bit."
    log = make_log(1200, 60, 50, 60)
    split, short = (
        prepare(log, replace(PROTOCOLS["strict"], min_user=2, min_item=2)),
        WideDeepRecommender(epochs=2, patience=9, sparse_update_min_rows=1),
    )
    short.checkpoint = tmp_path / "state.safetensors"
    short.fit(split)
    resumed, whole = [
        WideDeepRecommender(epochs=4, patience=9, sparse_update_min_rows=1) for _ in range(2)
    ]
    resumed.checkpoint = short.checkpoint
    a, b = resumed.fit(split).net.state_dict(), whole.fit(split).net.state_dict()
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert all(m.sparse for m in whole.net.modules() if isinstance(m, nn.Embedding))


def test_top_k_lists_equal_the_naive_loop():
    model, split, task = ranking_bench_task(n_eval_users=40, n_ratings=4000, n_users=90, n_items=70)
    assert torch.equal(
        naive_top_k(model.net, task.users, split.n_train_items),
        top_k_lists(model, split, task, 5),
    )


@pytest.fixture(scope="module")
def fitted():
    split = prepare(
        make_log(4000, 150, 120, 90), replace(PROTOCOLS["strict"], min_user=2, min_item=2)
    )
    return WideDeepRecommender(epochs=2).fit(split)


def test_retrieving_every_item_is_exact(fitted):
    users = torch.arange(30)
    full = recommend_within(fitted, users, k=5)
    listed = CandidateGenerator.from_model(fitted, n_common=fitted.n_items).recommend(
        users, fitted.train_history.select(users), k=5
    )
    assert (
        full["exhaustive"]
        and full["recall"] == 1
        and torch.equal(full["lists"].sort(1)[0], listed.sort(1)[0])
    )


def test_retrieved_lists_matrix_no_repeats_and_no_seen_items(fitted):
    users = torch.arange(fitted.n_users)
    results = recommend_within(fitted, users, k=10, max_seconds=0)
    assert not results["exhaustive"] and 0 < results["recall"] <= 1
    for user, listed in zip(users, results["lists"]):
        items, seen = listed[listed >= 0], fitted.train_history.select(user[None]).item
        assert len(items.unique()) == len(items) == 10 and not torch.isin(items, seen).any()


def test_resource_estimates_count_pairs(fitted):
    split = prepare(
        make_log(4000, 150, 120, 90), replace(PROTOCOLS["strict"], min_user=2, min_item=2)
    )
    table = resource_estimates(split, {"GFLOP/s": 100.0, "GB/s": 10.0}, pairs_per_second=1.0)
    matrix = np.zeros((split.n_train_users, split.n_train_items))
    matrix[split.train["user"], split.train["item"]] = 1
    hours = dict(table.select("method", "hours").rows())
    assert hours["item-knn: exact item neighbors"] * 3600 == pytest.approx(
        (matrix @ matrix.T).diagonal() @ matrix.sum(1)
    )
    assert hours["user-knn: exact user neighbors"] * 3600 == pytest.approx(
        (matrix.sum(0) ** 2).sum()
    )


def test_scaling_exponents():
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


def test_crossover_size():
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


def test_readme_text_needs_large_measurements():
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
            "n_users": 3,
            "exhaustive": False,
            "exact_seconds": 7200.0,
            "recall": 0.9,
        }
        for n in (1, 2)
        for s, m in (("read", 1.0), ("split", 2.5), ("lists", 2.0))
    ]
    found = {
        "scaling": stages,
        "large_log": [
            {"stage": "read", "seconds": 90.0, "memory": 3.0, "rows_read": 44},
            {"stage": "split", "seconds": 30.0, "memory": 4.0},
        ],
        "engines": engines(lambda n: 1e-6 * n, lambda n: 1e-5 * n).to_dicts(),
        "bench": {"machine": {"device": "a CPU", "threads": 2, "memory": 24.0}},
    }
    laptop, colab, cluster = readme_size_text(found).splitlines()
    for text in (
        "7 raw rows of 3 users and 2 items",
        "6.0 minutes",
        "at most 2.5 GB",
        "120 minutes",
        "90%",
        "0.5 GB of disk",
        "44 rows",
        "2.0 minutes, with at most 4.0 GB",
    ):
        assert text in laptop
    assert "run_on_colab" in colab and "24 GB is enough for about 300 rows" in cluster
    for missing in ("large_log", "engines"):
        assert readme_size_text(found | {missing: []}) == ""


def test_bench_process_reports_errors():
    with BenchProcess("widedeep_nb.lib.benchmarks") as worker:
        with pytest.raises(UserError, match="unknown task 'nonsense'"):
            worker.run_task("nonsense")
        with pytest.raises(UserError, match="TypeError"):
            worker.run_task("large tables: sparse updates")
        assert (
            worker.run_task("large tables: sparse updates", n_ids=1000)["result"] > 0
        )  # still alive
        worker.process.kill()
        with pytest.raises(UserError, match="has ended"):
            worker.run_task("large tables: sparse updates", n_ids=1000)


@pytest.mark.long
def test_bench_measures_every_implementation():
    found = bench(
        n_repeats=2, n_ratings=20_000, n_users=900, n_items=600, n_eval_users=20, n_rows=300_000
    )
    assert {r["task"] for r in found["records"]} == {
        "training",
        "ranking",
        "preprocessing",
    } and len(format_bench(found)) == 1 + len(found["records"])
    for r in found["records"]:
        assert 0 < r["lo"] <= r["ratio"] <= r["hi"] and r["seconds"] > 0 and r["memory"] > 0
        if r["roofline_share"] is not None:
            assert 0 < r["roofline_share"] < 1
    memory = {r["implementation"]: r for r in found["records"]}["the same work, streamed"]
    assert memory["baseline_memory"] > 0.02  # 300,000 rows in pandas are not nothing


def test_end_to_end_from_a_raw_file(tmp_path):
    raw = write_synthetic_csv(tmp_path / "ratings.csv", 20_000, 3_000, 300)
    stages = run_end_to_end(str(raw), tmp_path / "work", n_users=50)
    assert (
        [s["stage"] for s in stages] == ["read", "split", "features", "epoch", "lists"]
        and stages[0]["rows_read"] == 20_000
        and stages[-1]["n_users"] == 50
    )
    assert [s["stage"] for s in run_end_to_end(str(raw), tmp_path / "short", n_users=0)] == [
        "read",
        "split",
    ]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distributed")
    write_training_data(
        folder,
        prepare(
            make_log(6000, 300, 200, 200), replace(PROTOCOLS["strict"], min_user=2, min_item=2)
        ),
    )
    return folder


@pytest.mark.long
def test_two_processes_learn_as_one(data):
    single, both, rows = distributed_curves(data, epochs=4)
    assert single["curve"][0] - single["curve"][-1] > 100 * LOSS_RTOL  # it learns
    for other in (both, rows):
        assert np.allclose(single["curve"], other["curve"], rtol=LOSS_RTOL, atol=0)
    assert (
        both["n_weights"] == single["n_weights"]
        and 0.5 <= rows["n_weights"] / single["n_weights"] < 0.7
    )  # the layers are replicated
    one, two = [
        [load_file(data / way / "epoch-4" / f"{rank}-of-{n}.safetensors") for rank in range(n)]
        for way, n in (("data-1", 1), ("rows-2", 2))
    ]
    sharded = [k for k in one[0] if one[0][k].dim() == 2 and two[0][k].shape != one[0][k].shape]
    assert any("exp_avg_sq" in k for k in sharded) and any(k.startswith("net/") for k in sharded)
    for k in sharded:  # moments too: Adam hides a scaled gradient
        whole, parts = one[0][k], torch.cat([t[k] for t in two])
        assert parts.shape == whole.shape and (parts - whole).norm() < 1e-2 * whole.norm()


@pytest.mark.long
def test_sharded_tables_are_never_whole(data, tmp_path):
    "Check memory and first loss with millions of ids in one and two processes."
    tensors = load_file(data / "data.safetensors")
    save_file(
        tensors,
        tmp_path / "data.safetensors",
        {"sizes": json.dumps({"n_users": 4_000_000, "n_items": 200, "n_categories": 23})},
    )
    found = {}
    for n, mode in ((1, "data"), (2, "data"), (2, "rows")):
        assert launch_torchrun(tmp_path, n, modes=(mode,), epochs=1).wait(300) == 0
        found[n, mode] = json.loads((tmp_path / f"{mode}-{n}.json").read_text())
    assert found[2, "data"]["build_memory"] > 0.08  # twenty million weights
    assert found[2, "rows"]["build_memory"] < 0.65 * found[2, "data"]["build_memory"]
    for other in found.values():
        assert np.allclose(found[1, "data"]["curve"], other["curve"], rtol=LOSS_RTOL, atol=0)


@pytest.mark.long
@pytest.mark.parametrize("mode", ["data", "rows"])
def test_training_resumes_after_a_process_is_killed(data, tmp_path, mode):
    for name in ("undisturbed", "killed"):
        (tmp_path / name).mkdir()
        os.link(data / "data.safetensors", tmp_path / name / "data.safetensors")
    assert launch_torchrun(tmp_path / "undisturbed", 2, modes=(mode,), epochs=6).wait(300) == 0
    process, parts = (
        launch_torchrun(tmp_path / "killed", 2, modes=(mode,), epochs=6, pause=0.5),
        tmp_path / "killed" / f"{mode}-2",
    )
    started = time.monotonic()
    while 2 not in saved_epochs(parts, 2) and time.monotonic() - started < 200:
        time.sleep(0.02)
    victims = [
        p
        for p in psutil.Process(process.pid).children(recursive=True)
        if "distributed" in p.cmdline() and "torch.distributed.run" not in p.cmdline()
    ]
    assert len(victims) == 2
    victims[-1].kill()
    errors = process.communicate(timeout=300)[1]
    assert process.returncode == 0, errors
    assert "exitcode: -9" in errors, errors  # it was killed before it was done
    first, second = [
        json.loads((tmp_path / name / f"{mode}-2.json").read_text())
        for name in ("undisturbed", "killed")
    ]
    assert all(first[k] == second[k] for k in ("curve", "n_weights")) and len(first["curve"]) == 6


def stage_rows(n_rows, repeats=2, power=1.0):
    "Return measurements of three sizes whose time grows by a power of the rows."
    return pl.DataFrame(
        [
            {
                "rows": n,
                "repeat": repeat,
                "stage": stage,
                "seconds": 1e-4 * n**power,
                "memory": 0.7,
                "rows_read": n,
                "users": 30,
                "items": 20,
                "n_users": 10,
                "exhaustive": True,
            }
            for n in (n_rows // 10, n_rows, 10 * n_rows)
            for repeat in range(1, repeats + 1)
            for stage in ("read", "lists")
        ]
    )


def is_well_formed(sentences):
    text = " ".join(sentences)
    return not re.search(r"\bnan\b|None|\(\)|\binf\b|  |`", text) and all(
        s.rstrip().endswith(".") for s in sentences
    )


def test_in_short_follows_the_measurements():
    linear, steep = stage_rows(1_000), stage_rows(500, repeats=1, power=1.6)
    calm = scale_in_short(linear, scaling_exponents(linear), [], 20.0, has_gpu=False)
    too_large = ["ease: dense item-item matrix", "user-knn: exact user neighbors"]
    alarm = scale_in_short(steep, scaling_exponents(steep), too_large, 4.0, has_gpu=True)
    assert is_well_formed(calm) and is_well_formed(alarm)
    assert all(a != b for a, b in zip(calm, alarm)) and 2 <= len(calm) <= 5
    assert "10,000 ratings" in calm[0] and "2 seconds" in calm[0] and "without a GPU" in calm[0]
    assert "200 seconds" not in calm[2] and "3 minutes" in calm[2]  # 2 s times 100
    assert "In a single repeat" in alarm[1] and "1 repeat " in alarm[2]
    twice = stage_rows(500, repeats=2, power=1.6)
    sure = scale_in_short(twice, scaling_exponents(twice), [], 4.0, has_gpu=True)
    assert "grows faster than the log" in sure[1]
    assert "do not use ease and user-knn" in alarm[3]


def test_one_implementation_is_described_as_one():
    assert describe_limits(["ease: x"], 3.0).startswith("ease does not fit")
    assert describe_limits(["ease: x", "bpr: y"], 3.0).startswith("ease and bpr do not fit")
