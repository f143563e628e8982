"Newcomers against second implementations: what is hidden stays hidden, what is known grows, and shares are shares."

from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from widedeep_nb.content import add_catalog
from widedeep_nb.core import (
    PROTOCOLS,
    History,
    Run,
    Split,
    UserError,
    make_recommender,
    to_interactions,
)
from widedeep_nb.data import load
from widedeep_nb.evaluation import eval_ranking, eval_ratings
from widedeep_nb.newcomers import (
    UNKNOWN_GROUPS,
    IdOnlyModel,
    Oracle,
    cold_item_results,
    compare_unknown_rows,
    compare_with_learned,
    concat_over_folds,
    describe_cold_items,
    evaluate_cold_start,
    hide_random_items,
    id_embeddings,
    item_exposure,
    item_groups,
    metric_by_group,
    metric_by_n_events,
    side_feature_sources,
    source_ablation,
    truncate_history,
    user_groups,
    with_mean_unknown_row,
)
from widedeep_nb.preprocessing import prepare
from widedeep_nb.shop import demo_shop


@pytest.fixture(scope="module")
def split():
    shop = demo_shop(n_ratings=4000, seed=2)
    log = shop.interactions.filter(
        pl.col("rating").is_between(1, 5),
        pl.col("user").is_not_null(),
        pl.col("item").is_not_null(),
        pl.col("timestamp").dt.year().is_between(2000, 2030),
    ).unique(["user", "item"], maintain_order=True)
    return add_catalog(
        prepare(to_interactions(log), "strict", shop.items, shop.users), shop.items, shop.users
    ).for_final_fit()


@given(st.lists(st.integers(0, 6), min_size=1, max_size=6), st.integers(0, 7))
@settings(deadline=None)
def test_shortened(sizes, k):
    ptr = torch.tensor(np.cumsum([0] + sizes))
    whole = History(
        ptr, torch.arange(int(ptr[-1])), torch.ones(int(ptr[-1])), torch.arange(int(ptr[-1]))
    )
    short = truncate_history(whole, k)
    for u in range(len(sizes)):
        mine = whole.item[ptr[u] : ptr[u + 1]].tolist()
        assert short.item[short.indptr[u] : short.indptr[u + 1]].tolist() == (
            mine[-k:] if k else []
        )


@given(st.floats(0.05, 0.9), st.integers(0, 5))
@settings(deadline=None, max_examples=15)
def test_hidden_products_are_hidden(split, share, seed):
    less = hide_random_items(split, share, seed)
    known, before = [set(s.items["item"][: s.n_train_items]) for s in (less, split)]
    gone = before - known
    assert (
        len(gone) >= max(1, round(share * split.n_train_items))
        and known < before
        and len(less.test) == len(split.test)
    )
    ids = less.items["item"]
    for part in (less.train, less.filtered_out, less.val):
        assert not set(ids.gather(part["item"])) & gone or len(gone) > round(
            share * split.n_train_items
        )

    def text(s):
        return s.test.select(
            pl.Series("user", s.users["user"].gather(s.test["user"])),
            pl.Series("item", s.items["item"].gather(s.test["item"])),
        )

    assert text(less).equals(text(split))


def test_the_lot_of_hiding_does_not_look_at_popularity(split):
    count = split.train["item"].value_counts().sort("item")["count"].to_numpy()
    shares = []
    for seed in range(30):
        known = set(
            hide_random_items(split, 0.3, seed).items["item"][
                : hide_random_items(split, 0.3, seed).n_train_items
            ]
        )
        shares.append(
            sum(c for c, i in zip(count, split.items["item"]) if i not in known) / count.sum()
        )
    assert abs(np.mean(shares) - 0.3) < 0.03


def test_all_events_shown_is_the_usual_question(split):
    "Who has just so many events is shown whole, and by a model that knows no ids gets the usual list."
    models = {name: make_recommender(name).fit(split) for name in ("popularity", "item-knn")}
    found = metric_by_n_events(models, split, event_counts=(0, 4), few=1)
    for name, model in models.items():
        usual = {
            u: v
            for u, v, n in eval_ranking(model, split, "test", (20,))
            .users.select("user", "NDCG@20", "n_seen")
            .rows()
            if n == 4
        }
        mine = dict(found.filter(model=name, events=4).select("user", "NDCG@20").rows())
        assert len(usual) > 5 and all(
            mine[user] == pytest.approx(value, abs=1e-6) for user, value in usual.items()
        )
        assert found.filter(model=name, events=0)["user"].to_list() == list(mine)

    def of(k):
        return found.filter(model="popularity", events=k)["NDCG@20"].to_list()

    assert of(0) == of(4) and len(of(0)) > 20


def test_a_short_history_is_a_stranger_s(split):
    "Neither the id nor the traits of a person reach the model."

    class Spy:
        n_users, all_users, heard = split.n_train_users, split.users["user"], []

        def scores(self, users, history, items):
            self.heard.append((users, history))
            return torch.zeros(len(users), len(items))

    spy = Spy()
    metric_by_n_events({"spy": spy}, split, event_counts=(0, 2), few=10)
    assert all((users == len(split.users)).all() for users, _ in spy.heard) and {
        int(h.indptr.diff().max()) for _, h in spy.heard
    } == {0, 2}


def test_unknown_rows(split):
    tiny = IdOnlyModel(0.5, passes=1).fit(split)
    user, item = tiny.net.user.weight, tiny.net.item.weight
    mean = with_mean_unknown_row(tiny)
    assert (
        len(id_embeddings(tiny)) == 4
        and torch.allclose(mean.net.user.weight[-1], user[:-1].mean(0))
        and torch.equal(mean.net.item.weight[:-1], item[:-1])
    )
    assert float(mean.predict([10**6], [0])) != float(tiny.predict([10**6], [0]))


def test_a_learnt_row_is_better_than_one_as_drawn():
    "Where ids are all there is: people of a log with strong tastes, asked about before anybody knows them."
    draw = np.random.default_rng(0)
    n = 6000
    user, item = draw.integers(0, 300, n), draw.integers(0, 80, n)
    stars = np.clip(
        np.round(
            3
            + draw.normal(0, 1, 300)[user] * 0.3
            + draw.normal(0, 1, 80)[item]
            + draw.normal(0, 0.3, n)
        ),
        1,
        5,
    )

    def rows(pick, of):
        return to_interactions(
            pl.DataFrame(
                {
                    "user": [f"{of}{u}" for u in user[pick]],
                    "item": [f"i{i}" for i in item[pick]],
                    "rating": stars[pick],
                    "timestamp": np.arange(n)[pick],
                }
            )
        )

    split = Split.from_frames(
        rows(slice(0, 5000), "u"),
        rows(slice(0, 0), "u"),
        rows(slice(5000, n), "new "),
        protocol=PROTOCOLS["given"],
    )
    tables = compare_unknown_rows(
        lambda m: eval_ratings(m, split, "test"),
        lambda hide: IdOnlyModel(hide, passes=8).fit(split),
    )
    found = {
        r["row"]: r
        for r in compare_with_learned(
            "id-only", tables, "RMSE", {"new users": UNKNOWN_GROUPS["new users"]}
        )
    }
    assert (
        found["random init"]["hi"] < 0
        and found["learned"]["value"] < found["random init"]["value"]
        and found["learned"]["n"] == 1000
    )


def test_passes_are_chosen_on_validation(monkeypatch):
    "The best on the validation part, for the mean row with the mean in place; then fitted on both parts."
    import widedeep_nb.newcomers as chapter

    split = prepare(load("demo?ratings=4000").interactions, "strict")
    monkeypatch.setattr(chapter, "EPOCH_GRID", (1, 9))
    for hide in (0.5, 0.0):
        made = [IdOnlyModel(hide, n, 3).fit(split) for n in (1, 9)]
        costs = [
            eval_ratings(m if hide else with_mean_unknown_row(m), split, "val")["RMSE"].mean()
            for m in made
        ]
        chosen = chapter.fit_id_only(split, hide, 3)
        assert chosen.epochs == (1, 9)[int(np.argmin(costs))] and costs[0] != costs[1]
        eval_ratings(
            chosen, split.for_final_fit(), "test"
        )  # refused, had it been fitted on the first part only


def test_new_products(split):
    models = {
        name: make_recommender(
            name, **({"epochs": 6, "patience": 6} if "towers" in name else {})
        ).fit(hide_random_items(split, 0.3))
        for name in ("kind-popularity", "content", "content-towers")
    }
    less = hide_random_items(split, 0.3)
    tables = cold_item_results(
        models | {"oracle": Oracle("demo?ratings=4000&seed=2").fit(less)}, less
    )
    worth = {name: table["NDCG@20"].mean() for name, table in tables.items()}
    assert (
        worth["oracle"] > worth["content-towers"] > worth["random"]
        and worth["content"] > worth["random"]
    )
    assert len({len(t) for t in tables.values()}) == 1


def test_sources_are_left_out(split):
    less = hide_random_items(split, 0.3).for_final_fit()
    assert side_feature_sources(less) == ["category", "brand", "price", "text", "user_features"]
    found = source_ablation(less, passes=2)
    assert [r["removed"] for r in found[::2]] == [
        "nothing",
        "category",
        "brand",
        "price",
        "text",
        "user_features",
        "everything",
    ] and found[0]["difference"] == 0 == found[1]["difference"]
    value = {(r["removed"], r["items"]): r["value"] for r in found}
    assert value[("nothing", "new")] > value[("everything", "new")]
    for r in found:
        assert r["difference"] == pytest.approx(
            value[("nothing", r["items"])] - r["value"], abs=1e-9
        )


def test_groups(split):
    people = user_groups(split)
    events = [mine for (by, _), mine in people.items() if by == "events"]
    assert (np.sum(events, 0) == 1).all() and {by for by, _ in people} == {
        "events",
        "age_group",
        "region",
    }
    table = eval_ranking(make_recommender("popularity").fit(split), split, "test", (20,)).users
    for r in metric_by_group({"popularity": table}, people, few=5):
        mine = people[(r["by"], r["group"])]
        assert r["value"] == pytest.approx(
            np.mean([v for u, v in table.select("user", "NDCG@20").rows() if mine[u]])
        )
    for by in {by for by, _ in item_groups(split)}:
        assert (
            np.sum([mine for (b, _), mine in item_groups(split).items() if b == by], 0) == 1
        ).all()


def test_shares_of_places(split):
    lists = eval_ranking(make_recommender("popularity").fit(split), split, "test", (20,)).lists
    found = item_exposure({"popularity": lists}, split)
    for by in {r["by"] for r in found}:
        for what in {r["what"] for r in found}:
            assert sum(
                r["share"] for r in found if (r["by"], r["what"]) == (by, what)
            ) == pytest.approx(1)
    of = {(r["group"], r["what"]): r["share"] for r in found}
    assert (
        of[("head: half of all events", "taken before")]
        <= 0.5
        < of[("head: half of all events", "shown by popularity")]
    )


def test_words_follow_the_numbers():
    def row(model, value, more, lo, hi):
        return {
            "scenario": "new in time",
            "model": model,
            "value": value,
            "lo": value - 0.1,
            "hi": value + 0.1,
            "n": 9,
            "difference": more,
            "difference_lo": lo,
            "difference_hi": hi,
        }

    assert "which is beaten" in describe_cold_items(
        [row("content", 0.5, 0.2, 0.1, 0.3), row("kind-popularity", 0.3, None, None, None)]
    )
    assert "not told apart" in describe_cold_items(
        [row("content", 0.5, 0.2, -0.1, 0.3), row("kind-popularity", 0.3, None, None, None)]
    )
    assert "which is surely better" in describe_cold_items(
        [row("content", 0.3, -0.2, -0.3, -0.1), row("kind-popularity", 0.5, None, None, None)]
    )
    assert describe_cold_items([]) == "There are no new products to ask about."


def test_a_share_that_is_none(tmp_path):
    with pytest.raises(UserError, match="between 0 and 1, not 1.5"):
        evaluate_cold_start.__wrapped__(Run(tmp_path / "run"), hidden=1.5)


def test_windows_are_put_together_by_the_ids_of_people():
    "Code 0 is another person in another window."
    windows = [
        SimpleNamespace(users=pl.DataFrame({"user": ids}))
        for ids in (["ann", "bob"], ["bob", "cid"])
    ]
    found = concat_over_folds(
        windows, lambda split: {"model": pl.DataFrame({"user": [0, 1], "RMSE": [1.0, 2.0]})}
    )
    assert found["model"].rows() == [("ann", 1.0), ("bob", 2.0), ("bob", 1.0), ("cid", 2.0)]
