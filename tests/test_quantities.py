"Quantities that weigh: what is read, what models make of it, and what later logs and engines do."

from dataclasses import replace

import polars as pl
import pytest
import torch

from widedeep_nb.data import load
from widedeep_nb.lib.catalog import CatalogIndex
from widedeep_nb.lib.cli import main
from widedeep_nb.lib.core import PROTOCOLS, UserError
from widedeep_nb.lib.event_types import quantity_summary
from widedeep_nb.lib.feedback import FeedbackStore
from widedeep_nb.lib.increments import align_quantities
from widedeep_nb.lib.inference import RecommendService
from widedeep_nb.lib.large_logs import (
    Engine,
    load_streaming_split,
    streaming_split,
    write_plain_log,
)
from widedeep_nb.lib.ranking_pipeline import RankingPipeline
from widedeep_nb.lib.readers import parse_read_options
from widedeep_nb.lib.reading_report import reading_lines
from widedeep_nb.lib.recommender import load_recommender, make_recommender
from widedeep_nb.lib.service_schemas import RecommendRequest
from widedeep_nb.preprocessing import prepare

MODELS = (
    *("popularity", "item-knn", "user-knn", "ease", "svd", "als", "wide-matrix"),
    *("wide-neighbours", "wide-next", "low-pass", "gru", "self-attention"),
)
LOG = parse_read_options(quantity_weight="log")


def shop_rows(event="purchase"):
    "Make a row for each user and place: a time, an item, and 1, 3 or 7 pieces."
    rows = ["user,item,event,timestamp,quantity"]
    for place in range(6):
        for user in range(30):
            item = (5 * user + place * (1 + user % 3)) % 15
            time = 1_400_000_000 + 86_400 * place + user
            rows.append(f"u{user},i{item},{event},{time},{(1, 3, 7)[(user + item) % 3]}")
            rows.append(f"u{user},i{(item + 1) % 15},view,{time - 60},1")
    return rows


def read_rows(tmp_path, rows, options=LOG):
    path = tmp_path / "log.csv"
    path.write_text("\n".join(rows) + "\n")
    return load(path, options=options)


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    return read_rows(tmp_path_factory.mktemp("shop"), shop_rows()).interactions


@pytest.fixture(scope="module")
def split(log):
    return prepare(log, replace(PROTOCOLS["strict"], min_user=1, min_item=1), target="purchase")


def without_quantities(split):
    "Return the split as a log without quantities gives it."
    parts = ("train", "val", "test", "filtered_out")
    return replace(split, **{p: getattr(split, p).drop("quantity_weight") for p in parts})


def fit(name, split):
    options = {"epochs": 2} if name in ("gru", "self-attention") else {}
    return make_recommender(name, **options).fit(split)


def test_weights_are_those_of_the_pieces_that_stay(tmp_path):
    quantities = {"a": 1, "b": 3, "c": 7, "d": "", "e": 5}
    rows = ["user,item,timestamp,quantity"]
    rows += [
        f"ann,{item},{1_400_000_000 + n},{q}" for n, (item, q) in enumerate(quantities.items())
    ]
    rows += ["ann,e,1400000100,-2", "bob,b,1400000000,1"]
    loaded = read_rows(tmp_path, rows)
    weights = dict(loaded.interactions.filter(user="ann").select("item", "quantity_weight").rows())
    assert weights == pytest.approx({"a": 1, "b": 2, "c": 3, "d": 1, "e": 2})
    assert "log2(1 + q)" in "\n".join(reading_lines(loaded.report))
    plain = read_rows(tmp_path, rows, parse_read_options())
    assert "quantity_weight" not in plain.interactions.columns
    assert "-p quantity_weight=log" in "\n".join(reading_lines(plain.report))


def test_counts_weigh_too(tmp_path):
    rows = ["user,item,plays", *(f"u{n},i{n % 7},{1 + 10 * (n % 60)}" for n in range(300))]
    weights = read_rows(tmp_path, rows).interactions["quantity_weight"]
    assert weights.min() == 1 and weights.max() == pytest.approx(9.2095, abs=1e-3)  # log2(592)


def test_quantities_are_needed_and_the_word_is_known(tmp_path):
    rows = [row.rpartition(",")[0] for row in shop_rows()]
    with pytest.raises(UserError, match="needs quantities.*-p columns=quantity="):
        read_rows(tmp_path, rows)
    with pytest.raises(UserError, match="quantity_weight"):
        parse_read_options(quantity_weight="linear")


def test_a_log_with_quantities_and_views_is_split(tmp_path):
    log = read_rows(tmp_path, shop_rows(), parse_read_options()).interactions
    events = prepare(log, target="purchase").events_before("test")
    assert set(events["event"].unique()) == {None, "view"}
    assert sorted(set(events["weight"])) == pytest.approx([0.1, 1])


@pytest.mark.parametrize("name", MODELS)
def test_scores_change_with_quantities(split, name):
    users = torch.arange(split.n_train_users)
    model, plain = fit(name, split), fit(name, without_quantities(split))
    assert not torch.allclose(model.scores(users), plain.scores(users), rtol=1e-3)
    one_piece = split.train.with_columns(quantity_weight=pl.lit(1.0, pl.Float32))
    one_piece = fit(name, replace(split, train=one_piece))
    assert torch.equal(one_piece.scores(users), plain.scores(users))


def test_popularity_sums_weights(split):
    purchases = replace(split, auxiliary=split.auxiliary.clear())
    pairs = purchases.train.group_by("user", "item").agg(
        weight=1 + (pl.col("quantity_weight") - 1).sum()
    )
    sums = pairs.group_by("item").agg(pl.col("weight").sum()).sort("item")
    model = fit("popularity", purchases)
    assert model.weight[:-1].tolist() == pytest.approx(sums["weight"].to_list(), rel=1e-5)
    summary = quantity_summary(split)
    assert summary["rows"] > 50 and summary["largest"] == 3


def test_weights_are_saved_with_the_model(split, tmp_path):
    model = fit("item-knn", replace(split, auxiliary=split.auxiliary.clear()))
    model.save(tmp_path)
    weights = load_recommender(tmp_path).train_history.weight
    assert torch.equal(weights, model.train_history.weight) and weights.max() == 3


def test_the_service_reads_the_weights_of_the_log(log, split, tmp_path):
    model = fit("item-knn", split)
    items = pl.DataFrame({"item": model.item_ids, "title": model.item_ids})
    users = log.select("user").unique()
    service = RecommendService(
        {"item-knn": RankingPipeline(model, items)},
        CatalogIndex(log, items, users, [model], target="purchase"),
        FeedbackStore(tmp_path / "feedback.sqlite"),
    )
    user = model.user_ids[0]
    history, _ = service.query_histories([RecommendRequest(user=user, basket=[{"item": "i1"}])])
    query = service.to_model_history("item-knn", history)
    service.close()
    bought = log.filter(user=user, event="purchase")["quantity_weight"].to_list()
    assert query.weight[query.event == 0].tolist() == [*bought, 1]


@pytest.mark.parametrize("protocol", ["strict", "filtered-first"])
@pytest.mark.parametrize("target", ["purchase", "view"])
def test_engines_know_target_and_quantities(log, tmp_path, protocol, target):
    protocol = replace(PROTOCOLS[protocol], min_user=2, min_item=2)
    engine = Engine(tmp_path)
    plain = write_plain_log(log.lazy(), tmp_path / "plain.parquet", target)
    streaming_split(engine, engine.read_parquet(plain), protocol)
    streamed, expected = (
        load_streaming_split(tmp_path, protocol),
        prepare(log, protocol, target=target),
    )
    for part in ("train", "val", "test", "filtered_out", "users", "items"):
        rows = getattr(streamed, part)
        assert rows.equals(getattr(expected, part).select(rows.columns)), part
    assert "quantity_weight" in streamed.train.columns
    with pytest.raises(UserError, match="-p target="):
        write_plain_log(log.lazy(), tmp_path / "plain.parquet", "cart")


def test_later_logs_weigh_where_the_run_weighs(log, tmp_path):
    day = read_rows(tmp_path, shop_rows(), parse_read_options()).interactions
    weights = align_quantities(day, weighs=True)["quantity_weight"]
    assert weights.equals(log["quantity_weight"])
    feedback = align_quantities(day.drop("quantity"), weighs=True)
    assert feedback["quantity_weight"].unique().to_list() == [1]
    assert "quantity_weight" not in align_quantities(log, weighs=False).columns


def test_fees_are_named_and_can_be_ignored(tmp_path, capsys):
    rows = ["CustomerID,StockCode,InvoiceNo,Quantity,InvoiceDate"]
    rows += [f"{12_000 + n % 60},{20_000 + n % 97},{500_000 + n},2,2011-01-01" for n in range(900)]
    rows += [f"{12_000 + n},POST,{510_000 + n},1,2011-01-02" for n in range(40)]
    rows += ["12001,M,C520001,-1,2011-01-03", "12002,M,520002,1,2011-01-03"]
    note = "POST (40 rows) and M (1 row) have no digit"
    plain = read_rows(tmp_path, rows, parse_read_options())
    assert any(
        note in line and "-p ignore_items=POST,M" in line for line in reading_lines(plain.report)
    )
    main(["check", str(tmp_path / "log.csv"), "-p", "ignore_items=POST, M"])
    text = capsys.readouterr().out
    assert "42 rows: item to be ignored" in text and "have no digit" not in text
    words = [f"u{n % 60},{'abcdefghij'[n % 10]},{1_400_000_000 + n}" for n in range(300)]
    words = read_rows(tmp_path, ["user,item,timestamp", *words], parse_read_options())
    assert not any("no digit" in line for line in reading_lines(words.report))


def test_a_word_in_place_of_a_quantity_is_said(tmp_path):
    rows = [f"u{k % 7},i{k % 11},{'1.2k' if k < 2 else k % 3 + 1}" for k in range(60)]
    (tmp_path / "log.csv").write_text("user,item,quantity\n" + "\n".join(rows))
    report = load(str(tmp_path / "log.csv")).report
    assert "rows whose quantity is no number: 2; each counts as one piece" in report["notes"]
    assert report["kept"] == 60
