"Lists against plain Python: what may stand in them, in which order, and why."

import json

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from widedeep_nb.content import add_catalog
from widedeep_nb.core import PROTOCOLS, History, Split, UserError, make_recommender, to_interactions
from widedeep_nb.hybrid import component_probs
from widedeep_nb.recommend import (
    EXPLAINABLE_MODELS,
    RankingPipeline,
    Rules,
    align_catalog,
    allowed_items,
    category_levels,
    compare_variants,
    describe_diversity_cost,
    describe_revenue_order,
    evaluate_variant,
    example_rules,
    explainable_components,
    explanations,
    intra_list_diversity,
    item_contributions,
    item_weights,
    load_pipeline,
    mmr_select,
    ranking_value,
    read_rules,
)

PLAN = {
    "ranking": {
        "popularity": 0.3,
        "neighbors": 0.2,
        "neighbors, recency-weighted": 0.1,
        "matrix": 0.2,
        "content": 0.2,
    }
}


def shop_of(seed=0, users=60, known=40, new=8, rows=700, stars=True):
    rng = np.random.default_rng(seed)

    def pick_of(*names):
        return [names[i] for i in rng.integers(len(names), size=known + new)]

    items = pl.DataFrame(
        {
            "item": [f"i{i}" for i in range(known + new)],
            "title": [f"thing {i}" for i in range(known + new)],
            "category": pick_of(
                "Toys > Cars",
                "Toys > Dolls",
                "Toys > Cars > Red",
                "Books",
                "Books > Old",
                "Cars",
                None,
            ),
            "brand": pick_of("Ada", "Bo", "Cy", "Di", None),
            "price": [None if p < 3 else float(p) for p in rng.integers(0, 30, known + new)],
            "in_stock": pick_of(True, True, True, False, None),
        }
    )
    log = to_interactions(
        pl.DataFrame(
            {
                "user": [f"u{u}" for u in rng.integers(users, size=rows)],
                "item": [f"i{int(known * x * x)}" for x in rng.random(rows)],
                "rating": rng.integers(1, 6, rows) if stars else None,
                "timestamp": 10**12 + np.arange(rows) * 10**6,
            }
        )
    )
    return add_catalog(
        Split.from_frames(log, log.clear(), log.clear(), items=items, protocol=PROTOCOLS["given"]),
        items,
    ), items


def history_of(baskets):
    flat = sum(map(list, baskets), [])
    return History(
        torch.tensor(np.cumsum([0] + [len(b) for b in baskets])),
        torch.tensor(flat, dtype=torch.int64),
        torch.full((len(flat),), torch.nan),
        torch.zeros(len(flat), dtype=torch.int64),
    )


@pytest.fixture(scope="module")
def shelf():
    split, items = shop_of()
    return RankingPipeline(make_recommender("hybrid", plan=PLAN).fit(split), items)


def may_stand(product, rules):
    "The rules once more, a product at a time."
    path = (product["category"] or "").split(" > ")
    goes_by = (
        set(path) | {" > ".join(path[:n]) for n in range(1, len(path) + 1)}
        if product["category"]
        else set()
    )
    price = product["price"]
    return not (
        rules.in_stock
        and product["in_stock"] is False
        or rules.allowed
        and not goes_by & set(rules.allowed)
        or goes_by & set(rules.blocked)
        or product["item"] in rules.excluded_items
        or rules.min_price is not None
        and (price is None or price < rules.min_price)
        or rules.max_price is not None
        and (price is None or price > rules.max_price)
    )


def room_for(products, most):
    "How many of some products one list can hold."
    brands = [p["brand"] for p in products]
    return (
        len(products)
        if not most
        else sum(min(most, brands.count(b)) for b in set(brands) if b is not None)
        + brands.count(None)
    )


def random_rules(rng, names):
    def some(of, most):
        return (
            tuple(rng.choice(of, rng.integers(1, most + 1), replace=False))
            if rng.random() < 0.3
            else ()
        )

    low = float(rng.integers(0, 20)) if rng.random() < 0.25 else None
    return Rules(
        in_stock=bool(rng.random() < 0.7),
        min_price=low,
        max_price=(low or 0) + float(rng.integers(0, 25)) if rng.random() < 0.25 else None,
        allowed=tuple(map(str, some(names, 3))),
        blocked=tuple(map(str, some(names, 2))),
        excluded_items=tuple(map(str, some([f"i{i}" for i in range(48)], 6))),
        max_per_brand=int(rng.integers(1, 4)) if rng.random() < 0.4 else 0,
    )


def check_batches(shelf, batches, people=50, seed=0):
    rng, products = (
        np.random.default_rng(seed),
        shelf.items.select("item", "category", "brand", "price", "in_stock").to_dicts(),
    )
    names, n, N = (
        category_levels(shelf.items)["name"].unique().sort().to_list(),
        shelf.model.n_items,
        len(products),
    )
    short = 0
    for _ in range(batches):
        rules, k, order, candidates = (
            random_rules(rng, names),
            int(rng.choice([1, 2, 5, 10, 20, 60])),
            str(rng.choice(["score", "revenue"])),
            str(rng.choice(["known", "all", "new"], p=[0.6, 0.3, 0.1])),
        )
        diversity = float(rng.choice([0, 0, 0.3, 0.7, 1]))
        had = [rng.integers(N, size=rng.integers(0, 30)).tolist() for _ in range(people)]
        no = (
            [rng.integers(N, size=rng.integers(0, 10)).tolist() for _ in range(people)]
            if rng.random() < 0.5
            else None
        )
        users = rng.integers(shelf.model.n_users + 3, size=people)
        codes, scores = shelf.rank(
            users, history_of(had), k, rules, diversity, order, candidates, no and history_of(no)
        )
        assert codes.shape == scores.shape == (people, k)
        open_to = [
            c
            for c in range(N)
            if may_stand(products[c], rules)
            and (candidates == "all" or (c < n) == (candidates == "known"))
        ]
        for row, (mine, owned) in enumerate(zip(codes.tolist(), had)):
            left = [c for c in open_to if c not in owned and (no is None or c not in no[row])]
            shown = [c for c in mine if c >= 0]
            assert mine == shown + [-1] * (k - len(shown)) and len(set(shown)) == len(shown)
            assert set(shown) <= set(left)
            assert len(shown) == min(k, room_for([products[c] for c in left], rules.max_per_brand))
            brands = [products[c]["brand"] for c in shown if products[c]["brand"] is not None]
            assert (
                not rules.max_per_brand
                or max(map(brands.count, brands), default=0) <= rules.max_per_brand
            )
            short += len(shown) < k
        assert (scores.isnan() == (codes < 0)).all()
    return short


def test_no_list_breaks_a_rule(shelf):
    assert check_batches(shelf, 60) > 100  # of 3,000 calls; that many are short, rightly


@pytest.mark.long
def test_no_list_breaks_a_rule_in_100000_calls(shelf):
    assert check_batches(shelf, 2000, seed=1) > 1000


def test_nor_with_a_first_stage_that_finds_little(shelf, monkeypatch):
    "A quick search that neither masks nor finds all."
    monkeypatch.setattr("widedeep_nb.recommend.SORT_ORDERS", {"score": 3, "revenue": 3})
    whole = shelf.retrieve

    def narrow(users, history, m, open_to=None):
        return whole(
            users, history_of([[]] * len(users)), m if m >= len(shelf.items) else 2, open_to
        )

    other = RankingPipeline(shelf.model, shelf.items)
    other.retrieve = narrow
    check_batches(other, 20, seed=2)


# --- the order


def mmr_by_hand(worth, k, strength, points, brand, most):
    left, chosen = [j for j, w in enumerate(worth) if w > -np.inf], []
    if strength and left:
        low, high = min(worth[j] for j in left), max(worth[j] for j in left)
        worth = [(w - low) / max(high - low, 1e-12) for w in worth]
    while left and len(chosen) < k:

        def near(j):
            return max([0.0] + [float(points[j] @ points[c]) for c in chosen])

        value = {
            j: (1 - strength) * worth[j] - strength * near(j) if strength else worth[j]
            for j in left
        }
        best = max(left, key=lambda j: (value[j], -j))
        chosen.append(best)
        left = [
            j
            for j in left
            if j != best
            and not (most and brand[j] >= 0 and sum(brand[c] == brand[j] for c in chosen) >= most)
        ]
    return chosen + [-1] * (k - len(chosen))


@given(
    st.integers(0, 10**6),
    st.integers(1, 8),
    st.sampled_from([0.0, 0.25, 0.5, 1.0]),
    st.integers(0, 2),
)
@settings(deadline=None, max_examples=150)
def test_marginal_relevance_is_the_textbook_s(seed, k, strength, most):
    "Whole numbers and halves, so that ties are ties."
    rng = np.random.default_rng(seed)
    n, m = 3, int(rng.integers(1, 9))
    worth = torch.from_numpy(
        np.where(rng.random((n, m)) < 0.15, -np.inf, rng.integers(0, 5, (n, m)) / 4.0)
    )
    points = torch.from_numpy(np.eye(3)[rng.integers(0, 3, (n, m))]).to(worth.dtype)
    brand = torch.from_numpy(rng.integers(-1, 3, (n, m)))
    found = mmr_select(worth, k, strength, points if strength else None, brand, most)
    assert found.tolist() == [
        mmr_by_hand(worth[i].tolist(), k, strength, points[i], brand[i].tolist(), most)
        for i in range(n)
    ]


@pytest.mark.parametrize("order", ["score", "revenue"])
def test_the_order_is_that_of_the_scores_or_of_what_is_expected_to_be_paid(shelf, order):
    users = torch.arange(20)
    codes, scores = shelf.rank(users, k=6, rules=Rules(in_stock=False), order=order)
    whole, price = shelf.model.scores(users), [p or 0 for p in shelf.items["price"]]
    for user in range(20):
        had = set(
            shelf.model.train_history.item[
                shelf.model.train_history.indptr[user] : shelf.model.train_history.indptr[user + 1]
            ].tolist()
        )

        def value(c):
            return float(whole[user, c]) * (price[c] if order == "revenue" else 1)

        best = sorted(
            (c for c in range(shelf.model.n_items) if c not in had), key=value, reverse=True
        )[:6]
        assert [value(c) for c in codes[user].tolist()] == pytest.approx([value(c) for c in best])
        assert scores[user].tolist() == pytest.approx(whole[user, codes[user]].tolist())


def test_expected_revenue_of_scores_below_nought_is_that_of_a_softmax():
    scores, price = torch.tensor([[2.0, -1.0, 0.5]]), torch.tensor([[1.0, 30.0, 2.0]])
    chance = np.exp([2.0, -1.0, 0.5]) / np.exp([2.0, -1.0, 0.5]).sum()
    assert ranking_value(scores, price)[0].tolist() == pytest.approx(
        list(chance * [1.0, 30.0, 2.0])
    )


def test_variety_is_the_mean_over_pairs():
    rng = np.random.default_rng(0)
    space = torch.nn.functional.normalize(torch.from_numpy(rng.normal(size=(9, 4))), dim=1)
    lists = torch.tensor([[0, 1, 2, 3], [4, 5, 8, -1], [1, -1, -1, -1]])
    by_hand = [
        np.mean([1 - float(space[a] @ space[b]) for i, a in enumerate(row) for b in row[:i]])
        if len(row) > 1
        else np.nan
        for row in ([c for c in r if c >= 0] for r in lists.tolist())
    ]
    assert intra_list_diversity(lists, space).numpy() == pytest.approx(by_hand, nan_ok=True)
    assert (
        intra_list_diversity(torch.tensor([[0, 1]]), torch.tensor([[0.0, 0.0], [1.0, 0.0]])).item()
        == 1
    )  # nothing known of one is unlike anything


def test_more_diversity_makes_lists_more_varied(shelf):
    spread = [
        intra_list_diversity(shelf.rank(torch.arange(60), k=8, diversity=d)[0], shelf.space)
        .nanmean()
        .item()
        for d in (0, 0.3, 0.6, 1)
    ]
    assert spread == sorted(spread) and spread[-1] > spread[0] + 0.02


# --- why


@pytest.mark.parametrize(
    "name, params",
    [
        ("wide-matrix", {}),
        ("wide-matrix", {"max_items": 15}),
        ("wide-neighbours", {}),
        ("wide-rules", {}),
        ("wide-next", {}),
        ("item-knn", {"k": 7}),
        ("ease", {}),
        ("association-rules", {}),
        ("content", {}),
    ],
)
def test_weights_are_what_a_model_makes_of_one_event(name, params):
    split, _ = shop_of()
    model = make_recommender(name, **params).fit(split)
    assert isinstance(model, EXPLAINABLE_MODELS)
    n = model.n_items
    shown = torch.arange(n).expand(n, -1)
    alone = model._scores(
        torch.full((n,), 999), history_of([[i] for i in range(n)]), torch.arange(n)
    )
    found = item_weights(model, torch.arange(n), shown)
    if name == "content":
        found, alone = (
            torch.nn.functional.normalize(found, dim=1),
            torch.nn.functional.normalize(alone, dim=1),
        )  # there an event without stars weighs 1.25
    assert torch.allclose(found, alone, atol=1e-5) and found.abs().sum() > 0


def test_reasons_add_up_to_the_wide_score_and_the_largest_is_given(shelf):
    model, users = shelf.model, torch.arange(40)
    history = model.train_history.select(users)
    codes = shelf.rank(users, k=7)[0]
    owner, event, adds = item_contributions(model, history, codes)
    for user in range(40):
        mine, row = adds[owner == user], codes[user].clamp(min=0)
        of_user = history.select(torch.tensor([user]))
        wide = sum(
            weight * component_probs(name, part, users[:1], of_user)[0, row]
            for weight, part, name, _ in explainable_components(model)
        )
        assert torch.allclose(
            mine.sum(0).masked_fill(codes[user] < 0, 0),
            wide.masked_fill(codes[user] < 0, 0),
            atol=1e-6,
        )
    given = shelf.top_contribution(history, codes)
    for user, place in [(u, p) for u in range(40) for p in range(7)]:
        mine = [(float(a), int(e)) for a, e, o in zip(adds[:, place], event, owner) if o == user]
        best = max(mine, default=(0.0, -1))
        assert (
            given[user, place] == (best[1] if best[0] > 0 else -1)
            or float(adds[(event == given[user, place]), place]) == best[0]
        )
        assert given[user, place] < 0 or history.user_index[given[user, place]] == user
    assert (given >= 0).float().mean() > 0.8 and len(explainable_components(model)) == 4


def test_each_event_s_part_is_its_own_weight(shelf):
    "With dense tables, a person at a time; people who took a product twice among them."
    model, n = shelf.model, shelf.model.n_items
    history, codes = model.train_history.select(torch.arange(30)), torch.arange(n).expand(30, -1)
    owner, event, adds = item_contributions(model, history, codes)
    for user in range(30):
        items, stars = [
            history.select(torch.tensor([user])).item,
            history.select(torch.tensor([user])).rating,
        ]
        by_hand = torch.zeros(n, n)
        for name, weight in model.plan["ranking"].items():
            if name == "popularity":
                continue
            part = model.models[name.split(",")[0]]
            amount = torch.zeros(n)
            for age, (i, r) in enumerate(zip(items.flip(0).tolist(), stars.flip(0).tolist())):
                amount[i] += (
                    (r - 1) / 4 + 0.25
                    if name == "content"
                    else np.exp(-age / 3)
                    if "fading" in name
                    else 1
                )
            if name != "content":
                amount.clamp_(max=1)
            of_each = (
                part.space[:n] @ part.space[:n].T
                if name == "content"
                else part._score_history(torch.eye(n).to_sparse())
            )
            pulls = amount[:, None] * of_each
            by_hand += (
                weight
                * len(items)
                / (len(items) + 10)
                * torch.where(pulls.sum(0) > 0, pulls, 0)
                / pulls.sum(0).clamp(min=0).sum()
            )
        assert torch.allclose(
            adds[owner == user], by_hand[history.item[event[owner == user]]], atol=1e-6
        )


def test_a_stranger_and_a_new_product_have_no_reason(shelf):
    nobody = history_of([[], [0]])
    codes = torch.tensor([[1, 2], [len(shelf.items) - 1, -1]])
    assert shelf.top_contribution(nobody, codes).tolist() == [[-1, -1], [-1, -1]]
    other = RankingPipeline(make_recommender("popularity").fit(shop_of()[0]), shop_of()[1])
    assert other.top_contribution(history_of([[0]]), torch.tensor([[1]])).tolist() == [[-1]]


def test_what_got_few_stars_was_not_liked(shelf):
    asked = [{shelf.items["item"][0]: 5}, {shelf.items["item"][0]: 1}, [shelf.items["item"][0]]]
    found = shelf.recommend(asked, k=1)
    assert found["user"].to_list() == ["basket 1", "basket 2", "basket 3"] and found[
        "liked"
    ].to_list() == [True, False, False]
    assert [w.split(" thing")[0] for w in explanations(found, shelf.items)] == [
        "because you liked",
        "because you had",
        "because you had",
    ]


# --- beside


def test_stars_come_from_another_model_with_other_codes(shelf):
    split, items = shop_of()
    ranks, rates = make_recommender("popularity").fit(split), make_recommender("damped-bias")
    log = split.train.with_columns(
        user=split.users["user"].gather(split.train["user"]),
        item=split.items["item"].gather(split.train["item"]),
    ).filter(pl.col("item") != split.items["item"][0])
    rates.fit(Split.from_frames(log, log.clear(), log.clear(), protocol=PROTOCOLS["given"]))
    assert not rates.item_ids.equals(ranks.item_ids)
    other, users = RankingPipeline(ranks, items, rates), torch.tensor([3, 999])
    history, codes = history_of([[4], []]), torch.tensor([[1, 0, -1], [2, 1, 0]])
    found = other.predict_ratings(users, codes, history)
    for row, place in [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2)]:
        user, item = (
            ([*ranks.all_users] + [None] * 999)[users[row]],
            ranks.all_items[int(codes[row, place])],
        )

        def code(one, of):
            return of.to_list().index(one) if one in of.to_list() else len(of)

        mine = history_of([[code(ranks.all_items[4], rates.all_items)] if not row else []])
        assert (
            found[row, place]
            == rates.predict([code(user, rates.all_users)], [code(item, rates.all_items)], mine)[0]
        )
    assert (
        found[0, 2].isnan()
        and RankingPipeline(ranks, items).predict_ratings(users, codes, history).isnan().all()
    )


def test_a_log_that_knows_nothing_of_its_products_or_has_no_stars():
    split, items = shop_of(stars=False)
    model = make_recommender("hybrid", plan={"ranking": {"popularity": 0.5, "neighbors": 0.5}}).fit(
        split
    )
    bare = RankingPipeline(model, items.select("item"))
    found = bare.recommend(model.user_ids[:5].to_list(), k=4, diversity=0.5)
    assert (
        found.columns == ["user", "rank", "item", "score", "because", "liked"]
        and len(found) == 20
        and not found["liked"].any()
    )
    assert len(bare.similar_items(model.item_ids[0], 3)) == 3 and example_rules(bare) == {
        "none": Rules()
    }
    for rules, said in (
        (Rules(max_price=3), "price"),
        (Rules(allowed=("Toys",)), "category"),
        (Rules(max_per_brand=1), "brand"),
    ):
        with pytest.raises(UserError, match=f"no product here has a {said}"):
            bare.rank([0], rules=rules)
    with pytest.raises(UserError, match="price"):
        bare.rank([0], order="revenue")


def test_similar_products_keep_the_rules_and_leave_out_themselves(shelf):
    item = shelf.items["item"][0]
    found = shelf.similar_items(item, 100, Rules(max_price=15.0))
    assert (
        item not in found["item"]
        and (found["price"] <= 15).all()
        and found["similarity"].is_sorted(descending=True)
        and found["similarity"].is_between(0, 1).all()
    )
    assert sorted(found["item"]) == sorted(
        p["item"]
        for p in shelf.items.to_dicts()
        if may_stand(p, Rules(max_price=15.0)) and p["item"] != item
    )
    assert (
        item not in shelf.similar_items(item, 100, Rules(in_stock=False))["item"]
        and len(shelf.similar_items(item, 100, Rules(in_stock=False))) == len(shelf.items) - 1
    )
    with pytest.raises(UserError, match="knows no item"):
        shelf.similar_items("nothing")


# --- rules as data


@pytest.mark.parametrize(
    "given, said",
    [
        ({"colour": "red"}, "unknown rule 'colour'; known: in_stock"),
        ({"max_price": "20"}, "highest is a price"),
        ({"min_price": -1}, "lowest is a price"),
        ({"max_price": float("nan")}, "max_price"),
        ({"min_price": True}, "min_price"),
        ({"min_price": 5, "max_price": 4}, "above"),
        ({"allowed": "Toys"}, "allowed is a list of texts"),
        ({"excluded_items": [387420489]}, "without is a list of texts"),
        ({"max_per_brand": -1}, "max_per_brand"),
        ({"max_per_brand": "two"}, "max_per_brand"),
        ({"in_stock": "yes"}, "true or false"),
        (["max_price"], "rules are names with values"),
        ({"x" * 999: 1}, r"x\.\.\."),
    ],
)
def test_rules_that_are_wrong_are_said_to_be(given, said):
    with pytest.raises(UserError, match=said) as e:
        Rules.from_dict(given)
    assert len(str(e.value)) < 800 and "\n" not in str(e.value)


def test_rules_from_files(tmp_path):
    (tmp_path / "rules.json").write_text(json.dumps({"blocked": ["Toys > Cars"], "max_price": 1e3}))
    (tmp_path / "rules.yaml").write_text("blocked: [Toys > Cars]\nhighest: 1000\n")
    assert (
        read_rules(tmp_path / "rules.json")
        == read_rules(tmp_path / "rules.yaml")
        == Rules(blocked=("Toys > Cars",), max_price=1000)
    )
    for name, text in (("bad", "a: [b"), ("list", "[1]"), ("empty", "")):
        (tmp_path / name).write_text(text)
        with pytest.raises(UserError):
            read_rules(tmp_path / name)
    with pytest.raises(UserError, match="cannot be read"):
        read_rules(tmp_path / "nowhere")


def test_bad_questions(shelf):
    for how, said in (
        ({"k": 0}, "at least one place"),
        ({"k": 2.5}, "place"),
        ({"diversity": 1.5}, "0 to 1"),
        ({"diversity": float("nan")}, "0 to 1"),
        ({"order": "price"}, "unknown order"),
        ({"candidates": "old"}, "choice of items"),
        ({"rules": Rules(allowed=("Cars", "Clothes"))}, "category 'Clothes'"),
    ):
        with pytest.raises(UserError, match=said):
            shelf.rank([0], **how)
    with pytest.raises(UserError, match="stars go from 1 to 5"):
        shelf.recommend({"i1": 9})


@pytest.mark.parametrize(
    "stock",
    [
        [True, False, None],
        [3, 0, None],
        [2.5, 0.0, None],
        ["yes", "sold out", None],
        ["TRUE", " False ", None],
        ["12", "0", None],
    ],
)
def test_stock_is_read_in_several_ways(stock):
    table = align_catalog(
        pl.Series("item", ["a", "b", "c", "d"]),
        pl.DataFrame({"item": ["a", "b", "c"], "In stock": stock, "price": ["3", "x", None]}),
    )
    assert table["in_stock"].to_list() == [True, False, None, None] and table[
        "price"
    ].to_list() == [3.0, None, None, None]
    assert allowed_items(table, category_levels(table), Rules()).tolist() == [
        True,
        False,
        True,
        True,
    ]


# --- the chapter's figures, and the command


def test_figures_are_those_of_the_evaluation(shelf):
    from widedeep_nb.evaluation import eval_ranking, make_eval_task

    split, items = shop_of()
    cut = Split.from_frames(
        *[
            split.train.with_columns(
                user=split.users["user"].gather(split.train["user"]),
                item=split.items["item"].gather(split.train["item"]),
            )[a:b]
            for a, b in ((0, 560), (560, 560), (560, 700))
        ],
        items=items,
        protocol=PROTOCOLS["given"],
    )
    other = RankingPipeline(
        make_recommender("item-knn").fit(cut), cut.items.with_columns(in_stock=True)
    )
    usual, mine = (
        eval_ranking(other.model, cut, "test").users,
        evaluate_variant(other, make_eval_task(cut, "test")),
    )
    for metric in ("NDCG@20", "Revenue@20"):
        assert mine[metric].to_numpy() == pytest.approx(usual[metric].to_numpy(), abs=1e-9)
    rows = pl.DataFrame(
        compare_variants(
            {
                "score": mine,
                "revenue": evaluate_variant(other, make_eval_task(cut, "test"), order="revenue"),
            }
        )
    )
    assert rows.filter(name="score")["difference"].to_list() == [
        0
    ] * 6 and "expected revenue" in describe_revenue_order(rows)
    assert "plain lists" in describe_diversity_cost(
        pl.DataFrame(
            compare_variants(
                {
                    "0": mine,
                    "1": evaluate_variant(other, make_eval_task(cut, "test"), diversity=1.0),
                }
            )
        )
    )


def test_the_command_keeps_rules_and_says_why(tmp_path, capsys):
    from widedeep_nb.core import Run
    from widedeep_nb.run import main

    split, items = shop_of()
    run = Run(tmp_path / "run")
    run.write("items.parquet", items)
    make_recommender("hybrid", plan=PLAN | {"stars": {"ridge": 1.0}}).fit(split).save(
        run.model_folder("hybrid")
    )
    (tmp_path / "rules.json").write_text('{"most_of_brand": 1, "blocked": ["Books"]}')

    def ask(*words):
        try:
            main(["recommend", str(run.folder), *map(str, words)])
        except SystemExit as stopped:
            return stopped.code, capsys.readouterr()
        return 0, capsys.readouterr()

    code, said = ask(
        "--basket", "i0:5,i3:4", "--rules", tmp_path / "rules.json", "--diversity", 0.3, "--json"
    )
    rows, brand = json.loads(said.out)["items"], dict(items.select("item", "brand").rows())
    brands = [brand[r["item"]] for r in rows if brand[r["item"]]]
    assert (
        code == 0
        and len(rows) > 3
        and len(set(brands)) == len(brands)
        and all(1 <= r["stars"] <= 5 and r["because"] in ("i0", "i3", None) for r in rows)
        and {"i0", "i3"} & {r["because"] for r in rows}
    )
    assert not {r["item"] for r in rows} & set(
        items.filter(
            pl.col("category").str.starts_with("Books").fill_null(False)
            | (pl.col("in_stock") == False)
        )["item"]
    )
    code, said = ask("--basket", "i0:5,i3:4", "--order", "revenue", "-k", 2)
    assert (
        code == 0
        and said.out.startswith("rank")
        and "because you liked thing" in said.out
        and len(said.out.splitlines()) == 3
    )
    code, said = ask("--user", "zoe", "--rules", tmp_path / "rules.json", "--json")
    assert "nobody called zoe" in json.loads(said.out)["note"] and not {
        r["item"] for r in json.loads(said.out)["items"]
    } & set(items.filter(pl.col("category").str.starts_with("Books").fill_null(False))["item"])
    for words, complaint in (
        (["--rules", tmp_path / "nowhere"], "cannot be read"),
        (["--diversity", "2"], "0 to 1"),
        (["--order", "price"], "order"),
    ):
        code, said = ask("--user", "u1", *words)
        assert code == 2 and complaint in said.err and len(said.err.splitlines()) <= 3
    assert load_pipeline(run).rank([0], k=3)[0].shape == (1, 3)
