"Check the sequence models: causality, training, the order of events, and the recommender API."

import numpy as np
import polars as pl
import pytest
import torch

from widedeep_nb import sequences
from widedeep_nb.evaluation import eval_ranking
from widedeep_nb.lib import quality_by_group
from widedeep_nb.lib.comparison import val_score
from widedeep_nb.lib.core import History, Split, UserError, to_interactions
from widedeep_nb.lib.quality_by_group import metric_by_history_length
from widedeep_nb.lib.recommender import load_recommender, make_recommender
from widedeep_nb.lib.sequence_results import sequences_in_short
from widedeep_nb.lib.sequence_training import (
    holdout_last_events,
    length_batches,
    pad_histories,
    shuffle_ties,
)
from widedeep_nb.sequences import (
    AttentionNet,
    GRUNet,
    ShuffledHistory,
    as_simultaneous,
    relative_causal_bias,
)

both_models = pytest.mark.parametrize("name", sequences.SEQUENCE_MODELS)
QUICK = dict(embedding=16, dropout=0.1, batch_size=128, patience=0)
N = 9


def nets(n_items=N):
    torch.manual_seed(0)
    held_out = [
        GRUNet(n_items, 8, 0.2, torch.zeros(n_items), 2),
        AttentionNet(n_items, 8, 0.2, torch.zeros(n_items), 2, 2, 20),
    ]
    with torch.no_grad():
        held_out[1].relative_bias.normal_()  # as after training
    return [net.eval() for net in held_out]


def make_log(histories, times=True, step=1):
    "Return a log from lists of items, a list a user; without times in the order of the rows."
    rows = [
        (f"u{u:03d}", item, (t + 1) * step)
        for u, items in enumerate(histories)
        for t, item in enumerate(items)
    ]
    log = pl.DataFrame(rows, schema=["user", "item", "timestamp"], orient="row")
    return to_interactions(log if times else log.drop("timestamp"))


def make_split(train, val=None, test=None):
    return Split.from_frames(
        train, train.clear() if val is None else val, train.clear() if test is None else test
    )


def cycles(n=120, steps=5, items="abcdefgh", times=True, both_ways=False):
    "Return users who walk in circles from different starts; `both_ways`: half of them backwards."
    return make_log(
        [
            [
                items[(u + (-1) ** (both_ways * (u // len(items))) * t) % len(items)]
                for t in range(steps)
            ]
            for u in range(n)
        ],
        times,
    )


def sixth(n):
    return cycles(n, 6).filter(
        pl.col("timestamp").dt.epoch("ms") == 6
    )  # the events after the first five


def history_of(*items):
    return History(
        torch.tensor([0, len(items)]),
        torch.tensor(items, dtype=torch.int64),
        torch.full((len(items),), torch.nan),
        torch.zeros(len(items), dtype=torch.int64),
    )


# ---------------------------------------------------------------- causality


def depends_on_later(net):
    "Return for each length of a past whether its output depends on later events."
    draw = torch.Generator().manual_seed(1)
    events = torch.randint(N, (5, 12), generator=draw)
    output, changed = net(events), []
    for n_past in range(1, 12):
        other = torch.cat(
            [events[:, :n_past], torch.randint(N, (5, 12 - n_past), generator=draw)], 1
        )
        changed.append(not torch.equal(net(other)[:, :n_past], output[:, :n_past]))
    return changed


@pytest.mark.parametrize("which", [0, 1], ids=sequences.SEQUENCE_MODELS)
def test_no_position_sees_its_future_to_the_last_bit(which):
    with torch.no_grad():
        assert not any(depends_on_later(nets()[which]))


@pytest.mark.parametrize("which", [0, 1], ids=sequences.SEQUENCE_MODELS)
def test_the_loss_at_a_position_does_not_depend_on_later_events(which):
    "Check by the gradient: only the embeddings up to the position have one."
    net, seen = nets()[which], []

    def keep_gradient(module, inputs, output):
        output.retain_grad()
        seen.append(output)

    hook = net.item.register_forward_hook(keep_gradient)
    net(torch.randint(N, (2, 7), generator=torch.Generator().manual_seed(0)))[:, 3].select(
        1, 0
    ).sum().backward()  # one number, because layer normalization makes the sum of all constant
    hook.remove()
    assert (seen[0].grad[:, :4].abs().sum(2) > 0).all() and (seen[0].grad[:, 4:] == 0).all()


def test_without_the_mask_later_events_are_seen(monkeypatch):
    "Check that the causality tests fail without the mask."

    def unmasked(weight, n):
        return relative_causal_bias(weight, n).nan_to_num(neginf=0)

    monkeypatch.setattr(sequences, "relative_causal_bias", unmasked)
    with torch.no_grad():
        assert all(depends_on_later(nets()[1]))


def test_a_longer_history_starts_with_the_same_outputs():
    events = torch.randint(N, (3, 10), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for net in nets():
            assert torch.allclose(net(events)[:, :4], net(events[:, :4]), atol=1e-6)


# ---------------------------------------------------------------- parts


def test_pad_histories_equals_a_loop():
    rng = np.random.default_rng(0)
    lists = [rng.integers(12, size=n).tolist() for n in (0, 3, 9, 1, 0, 5)]
    history = History(
        torch.tensor(np.cumsum([0] + [len(x) for x in lists])),
        torch.tensor(sum(lists, [])),
        torch.full((18,), torch.nan),
        torch.zeros(18, dtype=torch.int64),
    )
    for n_items, length in ((12, 50), (12, 4), (7, 3), (1, 2)):
        events, count = pad_histories(history, n_items, length)
        expected = [[i for i in x if i < n_items][-length:] for x in lists]
        assert (
            count.tolist() == [len(x) for x in expected]
            and [row[:n].tolist() for row, n in zip(events, count)] == expected
        )
        assert all((row[n:] == n_items).all() for row, n in zip(events, count))
    events, count = pad_histories(history.select(torch.tensor([0, 99])), 12, 4)
    assert events.shape[0] == 2 and count.tolist() == [0, 0]


def test_padding_changes_nothing():
    events = torch.tensor([[0, 3, 1, N, N], [2, N, N, N, N]])
    with torch.no_grad():
        for net in nets():
            assert torch.allclose(
                net(events)[0, :3], net(events[:1, :3])[0], atol=1e-6
            ) and torch.allclose(net(events)[1, 0], net(events[1:, :1])[0, 0], atol=1e-6)
            wider = torch.nn.functional.pad(events, (0, 6), value=N)
            assert torch.allclose(net.next_item_loss(wider), net.next_item_loss(events), atol=1e-6)
            expected = [
                -net.scores(net(events[:1, :n])[0, -1]).log_softmax(0)[events[0, n]] for n in (1, 2)
            ]
            assert torch.isclose(
                net.next_item_loss(events), torch.stack(expected).mean(), atol=1e-6
            )


def test_every_history_is_used_once_an_epoch():
    length = torch.from_numpy(np.random.default_rng(0).integers(1, 50, 300))
    one, two = length_batches(length, 200), length_batches(length, 200)
    assert torch.cat(one).sort()[0].tolist() == torch.cat(two).sort()[0].tolist() == list(
        range(300)
    ) and not torch.equal(torch.cat(one), torch.cat(two))
    sizes = sorted(int(length[rows].sum()) for rows in one)
    assert sizes[1] > 150 and sizes[-1] < 250  # the rest makes one smaller batch
    padded = sum(int(length[rows].max()) * len(rows) for rows in one)
    assert padded < 1.5 * length.sum()
    assert [rows.tolist() for rows in length_batches(length[:1], 5)] == [[0]]


def test_sampled_softmax_approximates_the_full_softmax():
    for net in nets():
        events = torch.randint(N, (6, 5), generator=torch.Generator().manual_seed(0))
        full_gradient = torch.autograd.grad(net.next_item_loss(events), net.bias)[0]
        losses = [net.next_item_loss(events, 500) for _ in range(60)]
        assert abs(torch.stack(losses).mean() - net.next_item_loss(events)) < 0.01
        assert torch.allclose(
            torch.autograd.grad(torch.stack(losses).mean(), net.bias)[0], full_gradient, atol=0.01
        )


def test_a_large_catalog_is_learnt_with_sampled_items():
    split = make_split(cycles())
    model = make_recommender("gru", **QUICK, full_softmax_max_items=5, n_negatives=20).fit(split)
    assert model.recommend([["a", "b"]], k=1)["item"].to_list() == ["c"]


def test_only_ties_are_shuffled():
    time = torch.tensor([1, 1, 1, 2, 1, 1, 0, 0, 3])
    history = History(torch.tensor([0, 4, 6, 9]), torch.arange(9), torch.arange(9).float(), time)
    seen = [shuffle_ties(history, seed) for seed in range(50)]
    assert {tuple(h.item[:3].tolist()) for h in seen} == {
        (0, 1, 2),
        (0, 2, 1),
        (1, 0, 2),
        (1, 2, 0),
        (2, 0, 1),
        (2, 1, 0),
    }
    assert {tuple(h.item[3:].tolist()) for h in seen} == {(3, 4, 5, 6, 7, 8), (3, 5, 4, 6, 7, 8)}
    for h in seen:
        assert (
            torch.equal(h.rating, h.item.float())
            and torch.equal(h.time, time)
            and torch.equal(h.indptr, history.indptr)
        )
    assert torch.equal(seen[0].item, shuffle_ties(history, 0).item)
    shuffled = as_simultaneous(history, 1)
    assert torch.equal(shuffled.user_index, history.user_index) and all(
        sorted(shuffled.item[a:b].tolist()) == list(range(a, b))
        for a, b in zip([0, 4, 6], [4, 6, 9])
    )
    empty = History.from_rows(
        pl.DataFrame(
            schema={
                "user": pl.Int32,
                "item": pl.Int32,
                "rating": pl.Float32,
                "timestamp": pl.Datetime("ms"),
            }
        ),
        2,
    )
    assert len(shuffle_ties(empty).item) == 0


def test_an_order_by_id_among_ties_is_not_learnt():
    "Check that two items with one timestamp, listed by id, are in random order."
    pairs = [["a", "b"], ["c", "d"], ["e", "f"]]
    rows = [(f"u{u:03d}", item, u + 1) for u in range(150) for item in pairs[u % 3]]
    split = make_split(
        to_interactions(pl.DataFrame(rows, schema=["user", "item", "timestamp"], orient="row"))
    )
    model = make_recommender("gru", **QUICK).fit(split)
    code = {item: i for i, item in enumerate(split.items["item"])}
    forward, backward = (
        model.scores([999], history_of(code[x])).softmax(1)[0, code[y]]
        for x, y in (("a", "b"), ("b", "a"))
    )
    assert forward > 0.5 and backward > 0.5  # each follows the other


# ---------------------------------------------------------------- the recommenders


@both_models
def test_a_planted_order_is_learnt_by_both_and_not_by_popularity(name):
    split = make_split(cycles(), None, sixth(120))

    def quality(model):
        return eval_ranking(model.fit(split), split, "test", (1,)).users["HitRate@1"].mean()

    assert quality(make_recommender(name, **QUICK)) > 0.95
    assert (
        max(quality(make_recommender(popular)) for popular in ("popularity", "recent-popularity"))
        < 0.5
    )


@both_models
def test_the_history_in_the_query_and_its_order_matter(name):
    model = make_recommender(name, **QUICK).fit(make_split(cycles(both_ways=True)))
    assert not torch.allclose(
        model.scores([0], history_of(0, 1, 2)), model.scores([0], history_of(2, 1, 0))
    )
    assert torch.equal(
        model.scores([0], history_of(0, 1, 2)), model.scores([5], history_of(0, 1, 2))
    )  # for any user
    assert not torch.equal(ShuffledHistory(model).scores(range(50)), model.scores(range(50)))
    assert model.recommend([["c", "b", "a"], ["a", "b", "c"]], k=1)["item"].to_list() == ["h", "d"]
    assert torch.allclose(
        model.scores([0], history_of(*range(7))),
        model.scores(
            range(2),
            History(
                torch.tensor([0, 7, 8]),
                torch.tensor([*range(7), 3]),
                torch.full((8,), torch.nan),
                torch.zeros(8, dtype=torch.int64),
            ),
        )[:1],
        atol=1e-5,
    )


@both_models
def test_only_the_last_events_are_read(name):
    model = make_recommender(name, **QUICK, length=3, epochs=2).fit(make_split(cycles()))
    assert torch.equal(
        model.scores([0], history_of(7, 6, 1, 2, 3)), model.scores([0], history_of(1, 2, 3))
    )
    assert not torch.equal(
        model.scores([0], history_of(0, 2, 3)), model.scores([0], history_of(1, 2, 3))
    )


@both_models
def test_cold_users_and_new_items(name):
    split = make_split(cycles())
    model, popular = (
        make_recommender(name, **QUICK, epochs=2).fit(split),
        make_recommender("recent-popularity").fit(split),
    )
    assert (
        torch.equal(model.scores([999]), popular.scores([999]))
        and model.recommend([[]], k=3)["item"].to_list()
        == popular.recommend([[]], k=3)["item"].to_list()
    )
    scores = model.scores([0, 999], items=[0, 1, 2, 3, 4, 5, 6, 7, 8, 99])
    assert (scores[:, 8:].amax(1) < scores[:, :8].amin(1)).all() and torch.isfinite(scores).all()
    assert torch.equal(
        model.scores([0], history_of(3, 50)), model.scores([0], history_of(3))
    )  # an unknown item is ignored
    assert torch.equal(model.scores([0], history_of(50)), popular.scores([999]))


@both_models
def test_saved_and_loaded_equal(name, tmp_path):
    model = make_recommender(name, **QUICK, epochs=2, layers=2).fit(make_split(cycles()))
    model.save(tmp_path)
    backward = load_recommender(tmp_path)
    assert torch.equal(backward.scores([0, 3, 999]), model.scores([0, 3, 999])) and torch.equal(
        backward.scores([0], history_of(2, 1)), model.scores([0], history_of(2, 1))
    )
    assert sorted(f.name for f in tmp_path.iterdir()) == ["model.json", "model.safetensors"]
    with pytest.raises(UserError, match="does not predict"):
        backward.predict([0], [0])


@both_models
def test_same_seed_same_weights_and_global_rng_unchanged(name):
    def fit(seed):
        return (
            make_recommender(name, **QUICK, epochs=2, seed=seed)
            .fit(make_split(cycles()))
            .net.state_dict()
        )

    torch.manual_seed(1)
    first, outside = fit(0), torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(outside, torch.rand(1))
    assert all(torch.equal(a, b) for a, b in zip(first.values(), fit(0).values()))
    assert not torch.equal(first["item.weight"], fit(1)["item.weight"])


@both_models
@pytest.mark.parametrize("patience", [0, 2])
def test_two_rows_suffice(name, patience):
    for histories in ([["a"], ["b"]], [["a", "b"]], [["a", "b"], ["b"]], [["a"] * 3]):
        model = make_recommender(name, embedding=8, epochs=2, patience=patience).fit(
            make_split(make_log(histories))
        )
        assert torch.isfinite(model.scores([0, 9])).all() and len(model.recommend([["a"], []], k=5))


@both_models
def test_a_log_without_times_keeps_the_order_of_its_rows(name):
    model = make_recommender(name, **QUICK).fit(make_split(cycles(times=False, both_ways=True)))
    assert model.recommend([["a", "b", "c"], ["f", "e", "d"]], k=1)["item"].to_list() == ["d", "c"]


@both_models
def test_stops_early_and_keeps_the_best(name):
    split = make_split(cycles(), sixth(40))
    model = make_recommender(name, **QUICK | {"patience": 2}, epochs=40).fit(split)
    values = [row["val"] for row in model.loss_curve]
    assert model.best_epoch == 1 + int(np.argmax(values)) == len(values) - 2 < 38
    assert np.isclose(
        val_score(model, split, "NDCG@20"), max(values)
    )  # the weights are those of the best epoch
    replayed = make_recommender(name, **QUICK, epochs=model.best_epoch).fit(split)
    assert all(
        torch.equal(a, b)
        for a, b in zip(model.net.state_dict().values(), replayed.net.state_dict().values())
    )


@both_models
def test_without_a_validation_part_some_last_events_are_held_out(name):
    split = make_split(cycles())
    model = make_recommender(name, **QUICK | {"patience": 2}, epochs=30, seed=3).fit(split)
    chosen = make_recommender(name, **QUICK | {"patience": 2}, epochs=30, seed=3).fit(
        holdout_last_events(split, 3)
    )
    assert len(model.loss_curve) == chosen.best_epoch < 30 and all(
        row["val"] is None for row in model.loss_curve
    )


def test_held_out_are_the_last_events_of_some_users():
    split = make_split(cycles(60, 4))
    held_out = holdout_last_events(split, 1)
    assert (
        len(held_out.val) == 6
        and held_out.val["user"].n_unique() == 6
        and len(held_out.train) == len(split.train) - 6
    )
    last = split.train.group_by("user", maintain_order=True).last()
    assert len(held_out.val.join(last, on=["user", "item", "timestamp"])) == 6
    assert not holdout_last_events(split, 2).val.equals(held_out.val) and holdout_last_events(
        split, 1
    ).val.equals(held_out.val)
    assert len(holdout_last_events(make_split(make_log([["a"], ["b"]]))).val) == 0


def test_a_catalog_beyond_memory_raises_a_user_error():
    with pytest.raises(UserError, match="item-knn"):
        make_recommender("self-attention", max_items=7).fit(make_split(cycles()))
    make_recommender("self-attention", **QUICK, max_items=8, epochs=1).fit(make_split(cycles()))


# ---------------------------------------------------------------- results by history length


def test_history_length_bins_cover_all_users_once():
    seen = pl.DataFrame({"n_seen": range(60)})
    assert (
        seen.select(
            pl.sum_horizontal(
                *[e.cast(pl.Int8) for e in quality_by_group.HISTORY_LENGTH_BINS.values()]
            )
        )
        .to_series()
        .eq(1)
        .all()
    )


def test_better_and_worse_only_if_significant():
    rng = np.random.default_rng(0)
    users = pl.DataFrame(
        {
            "user": [f"u{i}" for i in range(300)],
            "n_seen": rng.integers(0, 30, 300),
            "seed": 0,
            "relevant": "any",
            "items": "all",
        }
    )

    def items(gain):
        return users.with_columns(pl.Series("NDCG@20", rng.random(300) / 5 + gain))

    rows = metric_by_history_length(
        {"usual": items(0), "same": items(0), "good": items(0.3), "bad": items(-0.3)}, "usual"
    ).filter(pl.col("history_length") != "0")
    assert {
        m: set(rows.filter(model=m)["direction"]) for m in ("usual", "same", "good", "bad")
    } == {"usual": {0}, "same": {0}, "good": {1}, "bad": {-1}}


# ---------------------------------------------------------------- summary


def test_the_summary_changes_with_the_results():
    def order_row(value):
        levels = {"in_order": 0.2 + value, "shuffled": 0.2, "n": 80}
        return {"model": "gru", "value": value, "lo": value - 0.01, "hi": value + 0.01} | levels

    def by_length(direction):
        columns = {"model": "gru", "history_length": ["0", "1–2", "3–5"], "value": 0.1}
        return pl.DataFrame(columns | {"direction": [0, 0, direction]})

    better, level, worse = (
        sequences_in_short([order_row(value)], by_length(direction), "popular", ["gru"])
        for value, direction in ((0.05, 1), (0.0, 0), (-0.05, -1))
    )
    assert "pays on this log" in better[0] and "from 3 known events on" in better[1]
    assert "may be chance" in level[0] and "No sequence model" in level[1]
    assert "harms on this log" in worse[0]
    for sentence in better + level + worse:
        assert sentence.endswith(".")
        assert not any(word in sentence for word in ("nan", "None", "()", "{", "`"))
    assert 2 <= len(sequences_in_short([], pl.DataFrame(), "popular", [])) <= 5
