"Lists against plain Python: what may stand in them, in which order, and why."
import json

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from widedeep_nb.content import with_catalogue
from widedeep_nb.core import PROTOCOLS, History, Problem, Split, as_interactions, make_recommender
from widedeep_nb.recommend import Rules, Shelf, kinds_of, laid_out, pick, read_rules, scaled, spoken

PLAN = {"lists": {"popularity": .3, "neighbours": .2, "neighbours, fading": .1, "matrix": .2, "content": .2}}


def shop_of(seed=0, users=60, known=40, new=8, rows=700, stars=True):
    rng = np.random.default_rng(seed)
    pick_of = lambda *names: [names[i] for i in rng.integers(len(names), size=known + new)]
    items = pl.DataFrame({"item": [f"i{i}" for i in range(known + new)], "title": [f"thing {i}" for i in range(known + new)],
                          "category": pick_of("Toys > Cars", "Toys > Dolls", "Toys > Cars > Red", "Books", "Books > Old", "Cars", None), "brand": pick_of("Ada", "Bo", "Cy", "Di", None),
                          "price": [None if p < 3 else float(p) for p in rng.integers(0, 30, known + new)], "in_stock": pick_of(True, True, True, False, None)})
    log = as_interactions(pl.DataFrame({"user": [f"u{u}" for u in rng.integers(users, size=rows)], "item": [f"i{int(known * x * x)}" for x in rng.random(rows)],
                                        "rating": rng.integers(1, 6, rows) if stars else None, "timestamp": 10**12 + np.arange(rows) * 10**6}))
    return with_catalogue(Split.of(log, log.clear(), log.clear(), items=items, protocol=PROTOCOLS["given"]), items), items


def history_of(baskets):
    flat = sum(map(list, baskets), [])
    return History(torch.tensor(np.cumsum([0] + [len(b) for b in baskets])), torch.tensor(flat, dtype=torch.int64), torch.full((len(flat),), torch.nan), torch.zeros(len(flat), dtype=torch.int64))


@pytest.fixture(scope="module")
def shelf():
    split, items = shop_of()
    return Shelf(make_recommender("hybrid", plan=PLAN).fit(split), items)


def may_stand(product, rules):
    "The rules once more, a product at a time."
    path = (product["category"] or "").split(" > ")
    goes_by = set(path) | {" > ".join(path[:n]) for n in range(1, len(path) + 1)} if product["category"] else set()
    price = product["price"]
    return not (rules.in_stock and product["in_stock"] is False or rules.allowed and not goes_by & set(rules.allowed) or goes_by & set(rules.blocked) or product["item"] in rules.without
                or rules.lowest is not None and (price is None or price < rules.lowest) or rules.highest is not None and (price is None or price > rules.highest))


def room_for(products, most):
    "How many of some products one list can hold."
    brands = [p["brand"] for p in products]
    return len(products) if not most else sum(min(most, brands.count(b)) for b in set(brands) if b is not None) + brands.count(None)


def random_rules(rng, names):
    some = lambda of, most: tuple(rng.choice(of, rng.integers(1, most + 1), replace=False)) if rng.random() < .3 else ()
    low = float(rng.integers(0, 20)) if rng.random() < .25 else None
    return Rules(in_stock=bool(rng.random() < .7), lowest=low, highest=(low or 0) + float(rng.integers(0, 25)) if rng.random() < .25 else None, allowed=tuple(map(str, some(names, 3))), blocked=tuple(map(str, some(names, 2))),
                 without=tuple(map(str, some([f"i{i}" for i in range(48)], 6))), most_of_brand=int(rng.integers(1, 4)) if rng.random() < .4 else 0)


def check_batches(shelf, batches, people=50, seed=0):
    rng, products = np.random.default_rng(seed), shelf.items.select("item", "category", "brand", "price", "in_stock").to_dicts()
    names, n, N = kinds_of(shelf.items)["name"].unique().sort().to_list(), shelf.model.n_items, len(products)
    short = 0
    for _ in range(batches):
        rules, k, order, candidates = random_rules(rng, names), int(rng.choice([1, 2, 5, 10, 20, 60])), str(rng.choice(["score", "revenue"])), str(rng.choice(["known", "all", "new"], p=[.6, .3, .1]))
        diversity = float(rng.choice([0, 0, .3, .7, 1]))
        had = [rng.integers(N, size=rng.integers(0, 30)).tolist() for _ in range(people)]
        no = [rng.integers(N, size=rng.integers(0, 10)).tolist() for _ in range(people)] if rng.random() < .5 else None
        users = rng.integers(shelf.model.n_users + 3, size=people)
        codes, scores = shelf.rank(users, history_of(had), k, rules, diversity, order, candidates, no and history_of(no))
        assert codes.shape == scores.shape == (people, k)
        open_to = [c for c in range(N) if may_stand(products[c], rules) and (candidates == "all" or (c < n) == (candidates == "known"))]
        for row, (mine, owned) in enumerate(zip(codes.tolist(), had)):
            left = [c for c in open_to if c not in owned and (no is None or c not in no[row])]
            shown = [c for c in mine if c >= 0]
            assert mine == shown + [-1] * (k - len(shown)) and len(set(shown)) == len(shown)
            assert set(shown) <= set(left)
            assert len(shown) == min(k, room_for([products[c] for c in left], rules.most_of_brand))
            brands = [products[c]["brand"] for c in shown if products[c]["brand"] is not None]
            assert not rules.most_of_brand or max(map(brands.count, brands), default=0) <= rules.most_of_brand
            short += len(shown) < k
        assert (scores.isnan() == (codes < 0)).all()
    return short


def test_no_list_breaks_a_rule(shelf): assert check_batches(shelf, 60) > 100  # of 3,000 calls; that many are short, rightly


@pytest.mark.long
def test_no_list_breaks_a_rule_in_100000_calls(shelf): assert check_batches(shelf, 2000, seed=1) > 1000


def test_nor_with_a_first_stage_that_finds_little(shelf, monkeypatch):
    "A quick search that neither masks nor finds all."
    monkeypatch.setattr("widedeep_nb.recommend.ORDERS", {"score": 3, "revenue": 3})
    whole = shelf.first
    def narrow(users, history, m, open_to=None):
        if m >= len(shelf.items): return whole(users, history_of([[]] * len(users)), m, open_to)
        codes, scores = whole(users, history_of([[]] * len(users)), 2, open_to)
        return codes, scores
    other = Shelf(shelf.model, shelf.items)
    other.first = narrow
    check_batches(other, 20, seed=2)
