"Check the core interfaces: splits and codes, histories, ties, files, run folders, steps."

import json
import os
import time

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from widedeep_nb import load_recommender, make_recommender
from widedeep_nb.lib import core, recommender
from widedeep_nb.lib.core import (
    PROTOCOLS,
    History,
    Split,
    UserError,
    encode_ids,
    hash_order,
    to_interactions,
    top_k,
)
from widedeep_nb.lib.recommender import Recommender, mask_seen
from widedeep_nb.lib.runs import Run, open_run, step

ids = st.text(min_size=1, max_size=8)
logs = st.lists(st.tuples(ids, ids, st.integers(1, 5)), min_size=3, max_size=40)


def split_of(rows):
    "Split rows in half, a quarter and a quarter; return the split and the log."
    log = to_interactions(
        pl.DataFrame(rows, schema=["user", "item", "rating"], orient="row").with_columns(
            timestamp=pl.int_range(pl.len())
        )
    )
    a, b = len(log) // 2, 3 * len(log) // 4
    return Split.from_frames(log[:a], log[a:b], log[b:], protocol=PROTOCOLS["given"]), log


@given(logs)
@settings(max_examples=100, deadline=None)
def test_training_ids_are_a_prefix_of_the_codes(rows):
    split, log = split_of(rows)
    for column, known in (("user", split.n_train_users), ("item", split.n_train_items)):
        table = getattr(split, column + "s")[column]
        assert table.n_unique() == len(table) == log[column].n_unique()
        assert set(table[:known]) == set(log[column][: len(split.train)])
        again = split.merge_train_val()
        assert set(table[: getattr(again, f"n_train_{column}s")]) == set(
            log[column][: len(split.train) + len(split.val)]
        )
        decoded = pl.concat([getattr(split, p) for p in core.SPLIT_NAMES])[column]
        assert table[decoded.to_numpy()].to_list() == log[column].to_list()
    assert encode_ids(["\0 unknown"], split.users["user"]).to_list() == [len(split.users)]


def test_fit_never_sees_the_test_part():
    class Nosy(Recommender):
        def _fit(self, split):
            self.rows = len(split.test)

    split, _ = split_of([("a", "x", 1), ("b", "y", 2), ("c", "x", 3), ("a", "z", 4)])
    assert len(split.test) and Nosy().fit(split).rows == 0


@given(logs, st.lists(st.integers(0, 60), max_size=10))
@settings(max_examples=100, deadline=None)
def test_history_is_each_users_rows_in_order(rows, users):
    split, _ = split_of(rows)
    history = History.from_rows(split.train, split.n_train_users).select(
        torch.tensor(users, dtype=torch.int64)
    )
    for i, user in enumerate(users):
        rows_of_user = split.train.filter(pl.col("user") == user)
        a, b = history.indptr[i], history.indptr[i + 1]
        assert history.item[a:b].tolist() == rows_of_user["item"].to_list()
        assert history.rating[a:b].tolist() == rows_of_user["rating"].to_list()
    dense = history.to_sparse(split.n_train_items).to_dense()
    assert torch.equal(
        dense.sum(1).long(),
        torch.tensor(
            [split.train.filter(pl.col("user") == u)["item"].n_unique() for u in users],
            dtype=torch.int64,
        ),
    )


@given(st.integers(1, 30), st.integers(1, 12), st.integers(1, 4), st.integers(0, 2**31))
@settings(max_examples=200, deadline=None)
def test_top_k_is_a_stable_sort(m, k, levels, seed):
    scores = torch.randint(levels, (7, m), generator=torch.Generator().manual_seed(seed)).float()
    scores[scores == levels - 1] = -torch.inf
    order = scores.sort(dim=1, descending=True, stable=True)
    value, column = top_k(scores, k)
    assert torch.equal(
        column, order.indices[:, :k].masked_fill(order.values[:, :k] == -torch.inf, -1)
    )


def test_hash_order_is_unbiased():
    "Check that the first tenth of the ids has the mean place of all, over 200 seeds."
    table = pl.Series([f"B{i:06d}" for i in range(1000)])
    places = np.stack([np.argsort(hash_order(table, seed).numpy()) for seed in range(200)])
    assert abs(places[:, :100].mean() - 499.5) < 4 * 1000 / 12**0.5 / 20000**0.5
    assert torch.equal(hash_order(table, 3), hash_order(table, 3))
    assert not torch.equal(hash_order(table, 3), hash_order(table, 4))


def test_masks_only_what_the_user_has():
    history = History(
        torch.tensor([0, 2, 2]),
        torch.tensor([1, 4]),
        torch.zeros(2),
        torch.zeros(2, dtype=torch.int64),
    )
    masked = mask_seen(torch.zeros(2, 3), history, torch.tensor([4, 0, 2]))
    assert masked.tolist() == [[-float("inf"), 0, 0], [0, 0, 0]]


def test_names_resolve_and_unknown_names_list_the_known():
    for name in recommender.RECOMMENDERS:
        assert make_recommender(name).name == name
    with pytest.raises(UserError, match="known: .*damped-bias"):
        make_recommender("nope")
    with pytest.raises(UserError, match="known: .*damping"):
        make_recommender("damped-bias", dumping=3)


def test_run_folder(tmp_path):
    run = Run(tmp_path / "r", dataset="demo?ratings=10", protocol="rolling")
    assert run.protocol.folds[0] == pytest.approx((0.5, 0.6, 0.7))
    assert run.model_folder("ease").parts[-2:] == ("models", "ease")
    assert run.model_folder("ease", 2, 0).parts[-2:] == ("cut-0", "seed-2")
    manifest = json.loads((tmp_path / "r/run.json").read_text())
    (tmp_path / "r/run.json").write_text(json.dumps(manifest | {"format": 0}))
    with pytest.raises(UserError, match="another version"):
        Run(tmp_path / "r")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/thesis.txt").write_text("text")
    with pytest.raises(UserError, match="not of a run"):
        Run(tmp_path / "other")
    with pytest.raises(UserError, match="unknown protocol"):
        Run(tmp_path / "p", protocol="strickt")


def test_a_failed_step_leaves_nothing_done(tmp_path):
    @step()
    def breaks(run):
        run.write("half.json", {})
        raise RuntimeError

    run = Run(tmp_path / "r")
    with pytest.raises(RuntimeError):
        breaks(run)
    assert "breaks" not in run.manifest["steps"]


def test_another_setting_makes_a_step_stale(tmp_path):
    calls = []

    @step()
    def counted(run, size: int = 1):
        calls.append((run.manifest["dataset"], size))

    run = Run(tmp_path / "r", dataset="a")
    counted(run)
    counted(run)
    counted(run, size=2)
    counted(run)
    Run(tmp_path / "r", dataset="b")
    counted(run)
    assert calls == [("a", 1), ("a", 2), ("b", 2)]
    with pytest.raises(UserError, match="known: size"):
        counted(run, sise=3)


def test_weights_that_were_changed_are_refused(tmp_path):
    split, _ = split_of([("a", "x", 1), ("b", "y", 2), ("c", "x", 3), ("a", "z", 4)])
    make_recommender("popularity").fit(split).save(tmp_path)
    raw = bytearray((tmp_path / "model.safetensors").read_bytes())
    raw[-1] ^= 1
    (tmp_path / "model.safetensors").write_bytes(raw)
    with pytest.raises(UserError, match="not those that were saved"):
        load_recommender(tmp_path)


# Parallel tasks of a step


def test_tasks_run_in_parallel_and_once(tmp_path, monkeypatch):
    monkeypatch.setenv("LOKY_MAX_CPU_COUNT", "2")
    run = Run(tmp_path / "run")
    tasks = {name: (wait_and_report, str(tmp_path / name)) for name in ("a", "b", "c", "d")}
    results = run.map_cached(tasks, 1000, "waiting")
    processes = {pid for pid, _ in results.values()}
    assert len(processes | {os.getpid()}) == 3  # two other processes
    assert {threads for _, threads in results.values()} == {1}
    assert run.map_cached(tasks, 1000, "waiting") == results
    assert all((tmp_path / name).read_text() == "x" for name in tasks)  # not run again
    alone = run.map_cached({"e": (os.getpid,)}, 10**6, "a large log")
    assert alone == {"e": os.getpid()}


def wait_and_report(path):
    "Write one byte, wait, return the process id and the number of threads."
    with open(path, "a") as f:
        f.write("x")
    time.sleep(0.5)
    return os.getpid(), torch.get_num_threads()


def test_a_failing_task_raises_its_user_error(tmp_path, monkeypatch):
    monkeypatch.setenv("LOKY_MAX_CPU_COUNT", "2")
    run = Run(tmp_path / "run")
    with pytest.raises(UserError, match="^no such thing$"):
        run.map_cached({"good": (len, "abc"), "bad": (refuse,)}, 10, "failing")
    assert not (run.work_dir / "bad.json").exists()


def refuse():
    "Raise a user error."
    raise UserError("no such thing")


def test_demo_runs_are_shared_by_chapters_of_one_process(tmp_path, monkeypatch):
    "Check that WIDEDEEP_TINY keeps a demo run for calls with the same parameters."
    alone = open_run("")
    assert alone.folder != open_run("").folder
    assert alone.manifest["parameters"] == {
        "seeds": 2,
        "epochs": 8,
    }
    monkeypatch.setenv("WIDEDEEP_TINY", str(tmp_path))
    first = open_run("", seeds=1)
    first.update_manifest(steps={"train": {"fingerprint": "m"}})
    assert first.manifest["parameters"] == {"seeds": 1, "epochs": 8}
    assert tmp_path in first.folder.parents
    assert open_run("", seeds=1).manifest["steps"] == {"train": {"fingerprint": "m"}}
    assert open_run("", seeds=2).manifest["steps"] == {}
