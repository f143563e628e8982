"Ranking pipeline against plain Python: business rules, order, diversity, and explanations."

import json

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import normalize

from widedeep_nb.evaluation import eval_ranking
from widedeep_nb.lib.cli import main
from widedeep_nb.lib.content_features import add_catalog
from widedeep_nb.lib.core import PROTOCOLS, History, Split, UserError, to_interactions
from widedeep_nb.lib.ensemble import component_probs
from widedeep_nb.lib.eval_tasks import make_eval_task
from widedeep_nb.lib.explanations import (
    EXPLAINABLE_MODELS,
    explainable_components,
    item_contributions,
    item_weights,
)
from widedeep_nb.lib.ranking_pipeline import (
    RankingPipeline,
    explanations,
    load_pipeline,
    mmr_select,
    ranking_value,
)
from widedeep_nb.lib.recommend_plots import (
    describe_diversity_cost,
    describe_revenue_order,
    recommend_in_short,
)
from widedeep_nb.lib.recommender import make_recommender
from widedeep_nb.lib.rules import Rules, align_catalog, allowed_items, category_levels, read_rules
from widedeep_nb.lib.runs import Run
from widedeep_nb.recommend import (
    compare_variants,
    evaluate_variant,
    example_rules,
    intra_list_diversity,
)

WEIGHTS = {
    "popularity": 0.3,
    "neighbors": 0.2,
    "neighbors, recency-weighted": 0.1,
    "matrix": 0.2,
    "content": 0.2,
}
PLAN = {"ranking": WEIGHTS}
CATEGORIES = (
    "Toys > Cars",
    "Toys > Dolls",
    "Toys > Cars > Red",
    "Books",
    "Books > Old",
    "Cars",
    None,
)


def split_of(train, test=None, items=None):
    empty = train.clear()
    test = empty if test is None else test
    return Split.from_frames(train, empty, test, items=items, protocol=PROTOCOLS["given"])


def toy_shop(seed=0, users=60, known=40, new=8, rows=700, with_ratings=True):
    "Make the split and the item table of a random shop."
    rng = np.random.default_rng(seed)

    def choose(*values):
        return [values[i] for i in rng.integers(len(values), size=known + new)]

    ids = range(known + new)
    items = pl.DataFrame(
        {
            "item": [f"i{i}" for i in ids],
            "title": [f"thing {i}" for i in ids],
            "category": choose(*CATEGORIES),
            "brand": choose("Ada", "Bo", "Cy", "Di", None),
            "price": [None if p < 3 else float(p) for p in rng.integers(0, 30, known + new)],
            "in_stock": choose(True, True, True, False, None),
        }
    )
    log = pl.DataFrame(
        {
            "user": [f"u{u}" for u in rng.integers(users, size=rows)],
            "item": [f"i{int(known * x * x)}" for x in rng.random(rows)],
            "rating": rng.integers(1, 6, rows) if with_ratings else None,
            "timestamp": 10**12 + np.arange(rows) * 10**6,
        }
    )
    return add_catalog(split_of(to_interactions(log), items=items), items), items


def log_of(split):
    "Return the training rows of a split with ids in place of codes."
    train = split.train
    user, item = (
        split.users["user"].gather(train["user"]),
        split.items["item"].gather(train["item"]),
    )
    return train.with_columns(user=user, item=item)


def history_of(baskets):
    "Make histories without ratings and times."
    items = torch.tensor([item for basket in baskets for item in basket], dtype=torch.int64)
    indptr = torch.tensor(np.cumsum([0] + [len(basket) for basket in baskets]))
    return History(indptr, items, torch.full((len(items),), torch.nan), torch.zeros_like(items))


@pytest.fixture(scope="module")
def pipeline():
    split, items = toy_shop()
    return RankingPipeline(make_recommender("hybrid", plan=PLAN).fit(split), items)


def category_names(category):
    if not category:
        return set()
    path = category.split(" > ")
    return set(path) | {" > ".join(path[:n]) for n in range(1, len(path) + 1)}


def is_allowed(item, rules):
    "Apply the rules to one item, in plain Python."
    names, price = category_names(item["category"]), item["price"]
    if rules.in_stock and item["in_stock"] is False:
        return False
    if rules.allowed and not names & set(rules.allowed):
        return False
    if names & set(rules.blocked) or item["item"] in rules.excluded_items:
        return False
    if rules.min_price is not None and (price is None or price < rules.min_price):
        return False
    return rules.max_price is None or (price is not None and price <= rules.max_price)


def capacity(items, max_per_brand):
    "Count how many of some items one list can hold."
    if not max_per_brand:
        return len(items)
    brands = [item["brand"] for item in items]
    named = set(brands) - {None}
    return brands.count(None) + sum(min(max_per_brand, brands.count(b)) for b in named)


def random_rules(rng, names):
    def sample(values, most):
        if rng.random() >= 0.3:
            return ()
        return tuple(map(str, rng.choice(values, rng.integers(1, most + 1), replace=False)))

    low = float(rng.integers(0, 20)) if rng.random() < 0.25 else None
    in_stock = bool(rng.random() < 0.7)
    high = (low or 0) + float(rng.integers(0, 25)) if rng.random() < 0.25 else None
    allowed, blocked = sample(names, 3), sample(names, 2)
    excluded_items = sample([f"i{i}" for i in range(48)], 6)
    max_per_brand = int(rng.integers(1, 4)) if rng.random() < 0.4 else 0
    return Rules(in_stock, low, high, allowed, blocked, excluded_items, max_per_brand)


def random_baskets(rng, n_items, n_users, most):
    sizes = [rng.integers(0, most) for _ in range(n_users)]
    return [rng.integers(n_items, size=size).tolist() for size in sizes]


def check_list(codes, available, items, rules, k):
    "Check one list against the items that are available to its user; return its length."
    shown = [code for code in codes if code >= 0]
    assert codes == shown + [-1] * (k - len(shown)) and len(set(shown)) == len(shown)
    assert set(shown) <= set(available)
    assert len(shown) == min(k, capacity([items[c] for c in available], rules.max_per_brand))
    brands = [items[c]["brand"] for c in shown if items[c]["brand"] is not None]
    if rules.max_per_brand and brands:
        assert max(map(brands.count, brands)) <= rules.max_per_brand
    return len(shown)


def check_random_lists(pipeline, n_batches, n_users=50, seed=0):
    "Check random lists with random rules and options; return how many lists are short."
    rng = np.random.default_rng(seed)
    items = pipeline.items.select("item", "category", "brand", "price", "in_stock").to_dicts()
    names = category_levels(pipeline.items)["name"].unique().sort().to_list()
    n_known, n_items, n_short = pipeline.model.n_items, len(items), 0
    for _ in range(n_batches):
        rules, k = random_rules(rng, names), int(rng.choice([1, 2, 5, 10, 20, 60]))
        order = str(rng.choice(["score", "revenue"]))
        candidates = str(rng.choice(["known", "all", "new"], p=[0.6, 0.3, 0.1]))
        diversity = float(rng.choice([0, 0, 0.3, 0.7, 1]))
        history = random_baskets(rng, n_items, n_users, 30)
        excluded = random_baskets(rng, n_items, n_users, 10) if rng.random() < 0.5 else None
        users = rng.integers(pipeline.model.n_users + 3, size=n_users)
        excluded_history = excluded and history_of(excluded)
        options = (k, rules, diversity, order, candidates, excluded_history)
        codes, scores = pipeline.rank(users, history_of(history), *options)
        assert codes.shape == scores.shape == (n_users, k)
        assert (scores.isnan() == (codes < 0)).all()
        ranges = {"known": range(n_known), "new": range(n_known, n_items), "all": range(n_items)}
        allowed = [code for code in ranges[candidates] if is_allowed(items[code], rules)]
        for row, own_codes in enumerate(codes.tolist()):
            hidden = {*history[row], *(excluded[row] if excluded else ())}
            available = [code for code in allowed if code not in hidden]
            n_short += check_list(own_codes, available, items, rules, k) < k
    return n_short


def test_no_list_breaks_a_rule(pipeline):
    assert check_random_lists(pipeline, 60) > 100  # of 3,000 lists, as few items are allowed


@pytest.mark.long
def test_no_list_breaks_a_rule_in_100000_lists(pipeline):
    assert check_random_lists(pipeline, 2000, seed=1) > 1000


def test_rules_hold_with_a_poor_first_stage(pipeline, monkeypatch):
    "Check a search that does not mask histories and finds only two items."
    monkeypatch.setattr("widedeep_nb.lib.ranking_pipeline.SORT_ORDERS", {"score": 3, "revenue": 3})

    def poor_search(users, history, m, allowed_mask=None):
        no_history = history_of([[]] * len(users))
        n_found = m if m >= len(pipeline.items) else 2
        return pipeline.retrieve(users, no_history, n_found, allowed_mask)

    other = RankingPipeline(pipeline.model, pipeline.items)
    other.retrieve = poor_search
    check_random_lists(other, 20, seed=2)


# --- order and diversity


def plain_mmr(values, k, strength, vectors, brand, max_per_brand):
    "Select by maximal marginal relevance, one list in plain Python."
    left, selected = [j for j, value in enumerate(values) if value > -np.inf], []
    if strength and left:
        low, high = min(values[j] for j in left), max(values[j] for j in left)
        values = [(value - low) / max(high - low, 1e-12) for value in values]

    def objective(j):
        if not strength:
            return values[j]
        similarity = max([0.0] + [float(vectors[j] @ vectors[c]) for c in selected])
        return (1 - strength) * values[j] - strength * similarity

    def is_full(j):
        n_same = sum(brand[c] == brand[j] for c in selected)
        return max_per_brand and brand[j] >= 0 and n_same >= max_per_brand

    while left and len(selected) < k:
        best = max(left, key=lambda j: (objective(j), -j))
        selected.append(best)
        left = [j for j in left if j != best and not is_full(j)]
    return selected + [-1] * (k - len(selected))


@given(
    st.integers(0, 10**6),
    st.integers(1, 8),
    st.sampled_from([0.0, 0.25, 0.5, 1.0]),
    st.integers(0, 2),
)
@settings(deadline=None, max_examples=150)
def test_mmr_equals_plain_python(seed, k, strength, max_per_brand):
    "Check values that are multiples of a quarter, so that ties are exact."
    rng = np.random.default_rng(seed)
    n, m = 3, int(rng.integers(1, 9))
    is_missing, quarters = rng.random((n, m)) < 0.15, rng.integers(0, 5, (n, m)) / 4.0
    values = torch.from_numpy(np.where(is_missing, -np.inf, quarters))
    vectors = torch.from_numpy(np.eye(3)[rng.integers(0, 3, (n, m))]).to(values.dtype)
    brand = torch.from_numpy(rng.integers(-1, 3, (n, m)))
    selected = mmr_select(values, k, strength, vectors if strength else None, brand, max_per_brand)
    for i in range(n):
        own = (values[i].tolist(), k, strength, vectors[i], brand[i].tolist(), max_per_brand)
        assert selected[i].tolist() == plain_mmr(*own)


@pytest.mark.parametrize("order", ["score", "revenue"])
def test_the_order_is_by_score_or_by_expected_revenue(pipeline, order):
    users, model = torch.arange(20), pipeline.model
    codes, scores = pipeline.rank(users, k=6, rules=Rules(in_stock=False), order=order)
    values, all_scores = model.scores(users), model.scores(users)
    if order == "revenue":
        values = (
            values
            * torch.tensor([price or 0 for price in pipeline.items["price"]])[: model.n_items]
        )
    indptr, history_items = model.train_history.indptr, model.train_history.item
    for user in range(20):
        own = set(history_items[indptr[user] : indptr[user + 1]].tolist())
        new_values = [float(values[user, c]) for c in range(model.n_items) if c not in own]
        best = sorted(new_values, reverse=True)[:6]
        assert values[user, codes[user]].tolist() == pytest.approx(best)
        assert scores[user].tolist() == pytest.approx(all_scores[user, codes[user]].tolist())


def test_expected_revenue_of_negative_scores_uses_a_softmax():
    scores, prices = [2.0, -1.0, 0.5], [1.0, 30.0, 2.0]
    probability = np.exp(scores) / np.exp(scores).sum()
    revenue = ranking_value(torch.tensor([scores]), torch.tensor([prices]))[0].tolist()
    assert revenue == pytest.approx(list(probability * prices))


def test_diversity_is_the_mean_over_pairs():
    rng = np.random.default_rng(0)
    space = normalize(torch.from_numpy(rng.normal(size=(9, 4))), dim=1)
    lists = torch.tensor([[0, 1, 2, 3], [4, 5, 8, -1], [1, -1, -1, -1]])
    expected = []
    for row in lists.tolist():
        codes = [code for code in row if code >= 0]
        pairs = [(a, b) for i, a in enumerate(codes) for b in codes[:i]]
        distances = [1 - float(space[a] @ space[b]) for a, b in pairs]
        expected.append(np.mean(distances) if distances else np.nan)
    assert intra_list_diversity(lists, space).numpy() == pytest.approx(expected, nan_ok=True)
    without_features = torch.tensor([[0.0, 0.0], [1.0, 0.0]])
    assert intra_list_diversity(torch.tensor([[0, 1]]), without_features).item() == 1


def test_a_higher_strength_gives_more_diversity(pipeline):
    diversity = []
    for strength in (0, 0.3, 0.6, 1):
        codes, _ = pipeline.rank(torch.arange(60), k=8, diversity=strength)
        diversity.append(intra_list_diversity(codes, pipeline.space).nanmean().item())
    assert diversity == sorted(diversity) and diversity[-1] > diversity[0] + 0.02


# --- explanations


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
def test_item_weights_are_the_scores_of_single_events(name, params):
    split, _ = toy_shop()
    model = make_recommender(name, **params).fit(split)
    assert isinstance(model, EXPLAINABLE_MODELS)
    codes = torch.arange(model.n_items)
    unknown_users = torch.full((model.n_items,), 999)
    single_events = history_of([[i] for i in range(model.n_items)])
    scores = model._scores(unknown_users, single_events, codes)
    weights = item_weights(model, codes, codes.expand(model.n_items, -1))
    if name == "content":  # an event without a rating weighs 1.25 there
        weights, scores = normalize(weights, dim=1), normalize(scores, dim=1)
    assert torch.allclose(weights, scores, atol=1e-5) and weights.abs().sum() > 0


def wide_score(model, history, user, codes):
    own_history = history.select(torch.tensor([user]))
    score = torch.zeros(len(codes))
    for weight, component, name, _ in explainable_components(model):
        probs = component_probs(name, component, torch.tensor([0]), own_history)
        score = score + weight * probs[0, codes]
    return score


def test_contributions_add_up_to_the_wide_score(pipeline):
    model, users = pipeline.model, torch.arange(40)
    history = model.train_history.select(users)
    codes = pipeline.rank(users, k=7)[0]
    owner, _, contribution = item_contributions(model, history, codes)
    assert len(explainable_components(model)) == 4
    for user in range(40):
        is_empty = codes[user] < 0
        total = contribution[owner == user].sum(0).masked_fill(is_empty, 0)
        expected = wide_score(model, history, user, codes[user].clamp(min=0))
        assert torch.allclose(total, expected.masked_fill(is_empty, 0), atol=1e-6)


def test_the_largest_contribution_is_the_explanation(pipeline):
    users = torch.arange(40)
    history = pipeline.model.train_history.select(users)
    codes = pipeline.rank(users, k=7)[0]
    owner, event, contribution = item_contributions(pipeline.model, history, codes)
    explaining = pipeline.top_contribution(history, codes)
    assert (explaining >= 0).float().mean() > 0.8
    for user in range(40):
        for place in range(7):
            own = contribution[owner == user, place]
            largest = float(own.max()) if len(own) else 0.0
            chosen = int(explaining[user, place])
            if largest <= 0:
                assert chosen == -1
                continue
            assert history.user_index[chosen] == user
            assert float(contribution[event == chosen, place]) == largest


def plain_contributions(model, items, ratings):
    "Compute the contributions of one user's events with dense tables; [items, items]."
    n = model.n_items
    total = torch.zeros(n, n)
    events = list(zip(items.flip(0).tolist(), ratings.flip(0).tolist()))
    for name, weight in model.plan["ranking"].items():
        if name == "popularity":
            continue
        component, amount = model.models[name.split(",")[0]], torch.zeros(n)
        for age, (item, rating) in enumerate(events):
            if name == "content":
                amount[item] += (rating - 1) / 4 + 0.25
            else:
                amount[item] += np.exp(-age / 3) if "recency" in name else 1
        if name == "content":
            weights = component.space[:n] @ component.space[:n].T
        else:
            amount.clamp_(max=1)
            weights = component._score_history(torch.eye(n).to_sparse())
        terms = amount[:, None] * weights
        confidence = len(items) / (len(items) + 10)
        positive = torch.where(terms.sum(0) > 0, terms, 0)
        total += weight * confidence * positive / terms.sum(0).clamp(min=0).sum()
    return total


def test_contributions_equal_dense_tables(pipeline):
    "Check one user at a time, users with repeated items among them."
    model = pipeline.model
    history = model.train_history.select(torch.arange(30))
    codes = torch.arange(model.n_items).expand(30, -1)
    owner, event, contribution = item_contributions(model, history, codes)
    for user in range(30):
        own = history.select(torch.tensor([user]))
        expected = plain_contributions(model, own.item, own.rating)
        items = history.item[event[owner == user]]
        assert torch.allclose(contribution[owner == user], expected[items], atol=1e-6)


def test_cold_start_users_and_items_have_no_explanation(pipeline):
    no_history_and_new_item = history_of([[], [0]])
    codes = torch.tensor([[1, 2], [len(pipeline.items) - 1, -1]])
    explaining = pipeline.top_contribution(no_history_and_new_item, codes)
    assert explaining.tolist() == [[-1, -1], [-1, -1]]
    split, items = toy_shop()
    popularity = RankingPipeline(make_recommender("popularity").fit(split), items)
    assert popularity.top_contribution(history_of([[0]]), torch.tensor([[1]])).tolist() == [[-1]]


def test_items_rated_below_the_mean_are_not_liked(pipeline):
    item = pipeline.items["item"][0]
    recommended = pipeline.recommend([{item: 5}, {item: 1}, [item]], k=1)
    assert recommended["user"].to_list() == ["basket 1", "basket 2", "basket 3"]
    assert recommended["liked"].to_list() == [True, False, False]
    openings = [text.split(" thing")[0] for text in explanations(recommended, pipeline.items)]
    assert openings == ["because you liked", "because you had", "because you had"]


# --- ratings, and logs without features


def test_a_rating_model_may_have_other_codes():
    split, items = toy_shop()
    ranking_model = make_recommender("popularity").fit(split)
    rows = log_of(split).filter(pl.col("item") != split.items["item"][0])
    rating_model = make_recommender("damped-bias").fit(split_of(rows))
    assert not rating_model.item_ids.equals(ranking_model.item_ids)
    pipeline = RankingPipeline(ranking_model, items, rating_model)
    user_ids, item_ids = ranking_model.all_users.to_list(), ranking_model.all_items.to_list()

    def code_of(one_id, ids):
        return ids.to_list().index(one_id) if one_id in ids else len(ids)

    history, codes = history_of([[4], []]), torch.tensor([[1, 0, -1], [2, 1, 0]])
    users = torch.tensor([3, 999])
    ratings = pipeline.predict_ratings(users, codes, history)
    own_histories = [[code_of(item_ids[4], rating_model.all_items)], []]
    user_codes = [code_of(user_ids[3], rating_model.all_users), len(rating_model.all_users)]
    for row, place in [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2)]:
        item_code = code_of(item_ids[int(codes[row, place])], rating_model.all_items)
        own_history = history_of([own_histories[row]])
        expected = rating_model.predict([user_codes[row]], [item_code], own_history)[0]
        assert ratings[row, place] == expected
    assert ratings[0, 2].isnan()
    without_ratings = RankingPipeline(ranking_model, items)
    assert without_ratings.predict_ratings(users, codes, history).isnan().all()


def test_a_log_without_features_and_ratings():
    split, items = toy_shop(with_ratings=False)
    plan = {"ranking": {"popularity": 0.5, "neighbors": 0.5}}
    model = make_recommender("hybrid", plan=plan).fit(split)
    pipeline = RankingPipeline(model, items.select("item"))
    recommended = pipeline.recommend(model.user_ids[:5].to_list(), k=4, diversity=0.5)
    assert recommended.columns == ["user", "rank", "item", "score", "because", "liked"]
    assert len(recommended) == 20 and not recommended["liked"].any()
    assert len(pipeline.similar_items(model.item_ids[0], 3)) == 3
    assert example_rules(pipeline) == {"none": Rules()}
    needed = {
        "price": Rules(max_price=3),
        "category": Rules(allowed=("Toys",)),
        "brand": Rules(max_per_brand=1),
    }
    for column, rules in needed.items():
        with pytest.raises(UserError, match=f"no item of this catalog has a {column}"):
            pipeline.rank([0], rules=rules)
    with pytest.raises(UserError, match="price"):
        pipeline.rank([0], order="revenue")


def test_similar_items_follow_the_rules(pipeline):
    item, cheap = pipeline.items["item"][0], Rules(max_price=15.0)
    similar = pipeline.similar_items(item, 100, cheap)
    assert item not in similar["item"] and (similar["price"] <= 15).all()
    similarity = similar["similarity"]
    assert similarity.is_sorted(descending=True) and similarity.is_between(0, 1).all()
    allowed = [row["item"] for row in pipeline.items.to_dicts() if is_allowed(row, cheap)]
    assert sorted(similar["item"]) == sorted(set(allowed) - {item})
    others = pipeline.similar_items(item, 100, Rules(in_stock=False))
    assert item not in others["item"] and len(others) == len(pipeline.items) - 1
    with pytest.raises(UserError, match="knows no item"):
        pipeline.similar_items("nothing")


# --- rules as data


@pytest.mark.parametrize(
    "data, message",
    [
        ({"color": "red"}, "unknown rule 'color'; known: in_stock"),
        ({"max_price": "20"}, "max_price is a price"),
        ({"min_price": -1}, "min_price is a price"),
        ({"max_price": float("nan")}, "max_price"),
        ({"min_price": True}, "min_price"),
        ({"min_price": 5, "max_price": 4}, "above"),
        ({"allowed": "Toys"}, "allowed is a list of texts"),
        ({"excluded_items": [387420489]}, "excluded_items is a list of texts"),
        ({"max_per_brand": -1}, "max_per_brand"),
        ({"max_per_brand": "two"}, "max_per_brand"),
        ({"in_stock": "yes"}, "true or false"),
        (["max_price"], "rules are names with values"),
        ({"x" * 999: 1}, r"x\.\.\."),
    ],
)
def test_wrong_rules_are_errors(data, message):
    with pytest.raises(UserError, match=message) as error:
        Rules.from_dict(data)
    text = str(error.value)
    assert len(text) < 800 and "\n" not in text


def test_rules_from_files(tmp_path):
    json_file, yaml_file = tmp_path / "rules.json", tmp_path / "rules.yaml"
    json_file.write_text(json.dumps({"blocked": ["Toys > Cars"], "max_price": 1e3}))
    yaml_file.write_text("blocked: [Toys > Cars]\nmax_price: 1000\n")
    expected = Rules(blocked=("Toys > Cars",), max_price=1000)
    assert read_rules(json_file) == read_rules(yaml_file) == expected
    for name, text in (("bad", "a: [b"), ("list", "[1]"), ("empty", "")):
        (tmp_path / name).write_text(text)
        with pytest.raises(UserError):
            read_rules(tmp_path / name)
    with pytest.raises(UserError, match="cannot be read"):
        read_rules(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"k": 0}, "k is a whole number of at least 1, not 0"),
        ({"k": 2.5}, "k is a whole number"),
        ({"diversity": 1.5}, "0 to 1"),
        ({"diversity": float("nan")}, "0 to 1"),
        ({"order": "price"}, "unknown order"),
        ({"candidates": "old"}, "choice of items"),
        ({"rules": Rules(allowed=("Cars", "Clothes"))}, "category 'Clothes'"),
    ],
)
def test_wrong_options_are_errors(pipeline, options, message):
    with pytest.raises(UserError, match=message):
        pipeline.rank([0], **options)


def test_wrong_ratings_are_errors(pipeline):
    with pytest.raises(UserError, match="ratings are between 1 and 5"):
        pipeline.recommend({"i1": 9})


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
def test_stock_is_parsed_in_several_forms(stock):
    columns = {"item": ["a", "b", "c"], "In stock": stock, "price": ["3", "x", None]}
    table = align_catalog(pl.Series("item", ["a", "b", "c", "d"]), pl.DataFrame(columns))
    assert table["in_stock"].to_list() == [True, False, None, None]
    assert table["price"].to_list() == [3.0, None, None, None]
    mask = allowed_items(table, category_levels(table), Rules())
    assert mask.tolist() == [True, False, True, True]


# --- the step, and the command


def test_metrics_equal_those_of_the_evaluation():
    split, items = toy_shop()
    rows = log_of(split)
    parts = split_of(rows[:560], rows[560:], items)
    in_stock = parts.items.with_columns(in_stock=True)
    pipeline = RankingPipeline(make_recommender("item-knn").fit(parts), in_stock)
    task = make_eval_task(parts, "test")
    usual = eval_ranking(pipeline.model, parts, "test").users
    plain = evaluate_variant(pipeline, task)
    for metric in ("NDCG@20", "Revenue@20"):
        assert plain[metric].to_numpy() == pytest.approx(usual[metric].to_numpy(), abs=1e-9)
    by_revenue = evaluate_variant(pipeline, task, order="revenue")
    rows = pl.DataFrame(compare_variants({"score": plain, "revenue": by_revenue}))
    assert rows.filter(name="score")["difference"].to_list() == [0] * 6
    assert "expected revenue" in describe_revenue_order(rows)
    diverse = evaluate_variant(pipeline, task, diversity=1.0)
    rows = pl.DataFrame(compare_variants({"0": plain, "1": diverse}))
    assert describe_diversity_cost(rows).startswith("Plain lists have a diversity of")


@pytest.fixture
def command(tmp_path, capsys):
    "Return a function that runs `widedeep recommend` on a toy run, and its item table."
    split, items = toy_shop()
    run = Run(tmp_path / "run")
    run.write("items.parquet", items)
    model = make_recommender("hybrid", plan=PLAN | {"rating": {"ridge": 1.0}})
    model.fit(split).save(run.model_folder("hybrid"))
    (tmp_path / "rules.json").write_text('{"max_per_brand": 1, "blocked": ["Books"]}')

    def call(*args):
        code = 0
        try:
            main(["recommend", str(run.folder), *map(str, args)])
        except SystemExit as stopped:
            code = stopped.code
        return code, capsys.readouterr()

    return call, run, items


def blocked_items(items):
    is_book = pl.col("category").str.starts_with("Books").fill_null(False)
    return set(items.filter(is_book)["item"])


def test_the_command_follows_the_rules(command, tmp_path):
    call, run, items = command
    rules, basket = ("--rules", tmp_path / "rules.json"), ("--basket", "i0:5,i3:4")
    code, output = call(*basket, *rules, "--diversity", 0.3, "--json")
    rows, brand_of = json.loads(output.out)["items"], dict(items.select("item", "brand").rows())
    brands = [brand_of[row["item"]] for row in rows if brand_of[row["item"]]]
    assert code == 0 and len(rows) > 3 and len(set(brands)) == len(brands)
    sold_out = set(items.filter(pl.col("in_stock").not_())["item"])
    assert not {row["item"] for row in rows} & (blocked_items(items) | sold_out)
    because = {row["because"] for row in rows}
    assert because <= {"i0", "i3", None} and because & {"i0", "i3"}
    assert all(1 <= row["stars"] <= 5 for row in rows)
    code, output = call("--user", "zoe", *rules, "--json")
    answer = json.loads(output.out)
    assert "zoe" in answer["note"]
    assert not {row["item"] for row in answer["items"]} & blocked_items(items)


def test_the_command_explains_and_reports_errors(command, tmp_path):
    call, run, _ = command
    code, output = call("--basket", "i0:5,i3:4", "--order", "revenue", "-k", 2)
    lines = output.out.splitlines()
    assert code == 0 and lines[0].startswith("rank") and len(lines) == 3
    assert "because you liked thing" in output.out
    wrong_options = {
        "cannot be read": ("--rules", tmp_path / "nowhere"),
        "0 to 1": ("--diversity", "2"),
        "order": ("--order", "price"),
    }
    for message, options in wrong_options.items():
        code, output = call("--user", "u1", *options)
        assert code == 2 and message in output.err and len(output.err.splitlines()) <= 3
    assert load_pipeline(run).rank([0], k=3)[0].shape == (1, 3)


def reranking_report(loss, revenue, rule):
    "Make a lists.json in which strength 0.5, the order and the rule change NDCG@20 by this much."

    def row(name, metric, value, difference):
        figures = {"value": value, "lo": value - 0.01, "hi": value + 0.01}
        figures |= {"difference": difference, "difference_lo": difference - 0.01}
        return {
            "name": name,
            "n": 50,
            "metric": metric,
            "difference_hi": difference + 0.01,
        } | figures

    diversity = [row("0", "NDCG@20", 0.3, 0.0), row("0.5", "NDCG@20", 0.3 + loss, loss)]
    diversity += [row("0", "ILD@20", 0.4, 0.0), row("0.5", "ILD@20", 0.6, 0.2)]
    orders = [row("revenue", "NDCG@20", 0.3, loss), row("revenue", "Revenue@20", 9.0, revenue)]
    rules = [row("none", "NDCG@20", 0.3, 0.0), row("cheap", "NDCG@20", 0.3 + rule, rule)]
    report = {"diversity": diversity, "orders": orders, "rules": rules}
    report["allowed_share"] = {"none": 1.0, "cheap": 0.5}
    return report | {"explanations": {"slots": 100, "explained": 90, "liked": 60}}


def test_in_short_follows_the_figures():
    worse = recommend_in_short(reranking_report(-0.1, 2.0, -0.2))
    better = recommend_in_short(reranking_report(0.0, -2.0, 0.1))
    assert worse[0].startswith(
        "Every bit of variety that we tried makes the lists significantly worse"
    )
    assert "50 % more varied (strength 0.5)" in better[0]
    assert "holds more of the money" in worse[1] and "but is worse at showing" in worse[1]
    assert "holds less of the money" in better[1] and "and is as good" in better[1]
    assert "“cheap” costs most quality: -0.200" in worse[2]
    assert better[2] == "None of the rules that we tried costs any quality."
    nothing = {"slots": 0, "explained": 0, "liked": 0}
    empty = {"diversity": [], "orders": [], "rules": [], "allowed_share": {"none": 1.0}}
    for sentences in (worse, better, recommend_in_short(empty | {"explanations": nothing})):
        assert 2 <= len(sentences) <= 5
        for sentence in sentences:
            assert sentence[0].isupper() and sentence.endswith(".") and "`" not in sentence
            assert "nan" not in sentence and "None " not in sentence.replace("None of", "")
