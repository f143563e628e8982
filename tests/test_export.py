"The export: every part as plain operations against the part itself, the file against PyTorch in a process that has none, the page in a browser, and two stages against one."

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from widedeep_nb import export
from widedeep_nb.content import add_catalog
from widedeep_nb.core import PROTOCOLS, History, Split, UserError, make_recommender, to_interactions
from widedeep_nb.export import (
    EmbeddingTable,
    GraphBuilder,
    Int8Table,
    OnnxRecommender,
    TracedTensor,
    TwoStageRetriever,
    ann_recall,
    batch_histories,
    build_ann_index,
    can_export,
    component_recall,
    estimate_normalizer,
    exportable_hybrid,
    exported_items,
    lookup_scores,
    make_basket_batch,
    measure_two_stages,
    overlap_at_k,
    quantize_int8,
    sparse_scores,
    strip_histories,
    synthetic_hybrid,
    synthetic_split,
    to_network,
    to_onnx,
    write_export,
)

ITEMS = 40


@pytest.fixture(scope="module")
def split():
    "Forty products with categories, stars and dates; two of them nobody has had, and some people have much."
    rng = np.random.default_rng(0)
    n = 900
    log = pl.DataFrame(
        {
            "user": [f"u{int(70 * x * x)}" for x in rng.random(n)],
            "item": [f"i{int(ITEMS * x * x)}" for x in rng.random(n)],
            "rating": rng.integers(1, 6, n),
            "timestamp": np.sort(rng.integers(10**12, 10**12 + 4 * 10**10, n)),
        }
    )
    log = to_interactions(
        pl.concat(
            [
                log,
                pl.DataFrame(
                    {
                        "user": ["u0"] * ITEMS,
                        "item": [f"i{i}" for i in range(ITEMS)],
                        "rating": [3] * ITEMS,
                        "timestamp": [10**12] * ITEMS,
                    }
                ).cast(log.schema),
            ]
        ).unique(["user", "item"], maintain_order=True)
    )
    shelf = pl.DataFrame(
        {
            "item": [f"i{i}" for i in range(ITEMS + 2)],
            "category": [f"A > C{i % 4}" for i in range(ITEMS + 2)],
            "brand": [f"B{i % 3}" for i in range(ITEMS + 2)],
            "price": [None if i % 5 == 0 else float(i) for i in range(ITEMS + 2)],
            "title": [f"<b onclick=alert(1)>Thing {i}</b></script><!--" for i in range(ITEMS + 2)],
        }
    )
    return add_catalog(
        Split.from_frames(log, log.clear(), log.clear(), items=shelf, protocol=PROTOCOLS["given"]),
        shelf,
    )


@pytest.fixture(scope="module")
def histories(split):
    "Long, short, empty, with repeats, with what nobody has had."
    lists = [
        [],
        [3],
        [1, 2, 1, 1],
        list(range(25)) * 2,
        [ITEMS, 5, ITEMS + 1, 5, 6],
        [ITEMS],
        *np.random.default_rng(1).integers(0, ITEMS, (6, 7)).tolist(),
    ]
    flat = torch.tensor(sum(lists, []))
    return History(
        torch.tensor(np.cumsum([0] + [len(x) for x in lists])),
        flat,
        torch.full((len(flat),), torch.nan),
        torch.zeros(len(flat), dtype=torch.int64),
    )


SINGLE = [
    ("popularity", {}),
    ("recent-popularity", {}),
    ("wide-matrix", {}),
    ("wide-matrix", {"max_items": 17}),
    ("ease", {}),
    ("wide-neighbours", {}),
    ("wide-rules", {}),
    ("wide-next", {}),
    ("item-knn", {"k": 7}),
    ("low-pass", {"factors": 5}),
    ("svd", {"factors": 4}),
    ("als", {"factors": 8}),
    ("als", {"factors": 6, "alpha": 200.0, "lam": 0.5}),
    ("content", {}),
    ("content-towers", {"epochs": 1}),
    ("content-towers", {"epochs": 1, "parts": "wide"}),
    ("content-towers", {"epochs": 1, "parts": "deep"}),
    ("gru", {"epochs": 1, "embedding": 8}),
    ("gru", {"epochs": 1, "embedding": 8, "layers": 2, "length": 9}),
    ("self-attention", {"epochs": 1, "embedding": 8}),
    ("self-attention", {"epochs": 1, "embedding": 8, "layers": 2, "heads": 2, "length": 9}),
]


@pytest.fixture(
    scope="module",
    params=SINGLE,
    ids=lambda p: p[0] + "".join(f" {k}={v}" for k, v in p[1].items()),
)
def single(request, split):
    return make_recommender(request.param[0], **request.param[1]).fit(split)


PLAN = {
    "popularity": 0.05,
    "the year's popularity": 0.05,
    "matrix": 0.1,
    "neighbours, fading": 0.1,
    "what follows": 0.1,
    "low-pass": 0.1,
    "factors": 0.1,
    "self-attention": 0.1,
    "gru": 0.1,
    "content": 0.1,
    "content towers": 0.1,
}


@pytest.fixture(scope="module")
def hybrid(split):
    plan = {
        "ranking": PLAN,
        "cold_users": {"popularity": 0.6, "content towers": 0.4},
        "cold_items": {"content towers": 1.0},
        "epochs": {"self-attention": 1, "gru": 1, "content towers": 1},
    }
    return make_recommender("hybrid", plan=plan).fit(split)


def near(got, want):
    return float(((got - want).abs().amax(1) / want.abs().amax(1).clamp(min=1e-9)).max())


def asked(model, histories, length=60):
    code, seen = strip_histories(histories, model.n_items, length)
    return code, model.scores(torch.full((len(code),), len(model.all_users)), seen)


# ---------------------------------------------------------------- tables and baskets


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 6), st.integers(1, 9), st.integers(0, 10**6), st.sampled_from([1e-6, 1.0, 1e6])
)
def test_half_a_step(n, d, seed, size):
    rows = size * torch.randn(n, d, generator=torch.Generator().manual_seed(seed))
    small = Int8Table(rows)
    assert (
        small.rows.dtype == torch.int8
        and (
            (small.lookup(torch.arange(n)) - rows).abs()
            <= rows.abs().amax(1, keepdim=True) / 254 * (1 + 1e-4)
        ).all()
    )
    assert torch.allclose(
        small.dot_all(rows),
        (rows @ small.lookup(torch.arange(n)).T)[:, :-1],
        rtol=1e-4,
        atol=1e-4 * size**2,
    )


def test_tables_that_are_shared_stay_shared(split):
    network = to_network(make_recommender("content-towers", epochs=1).fit(split))
    small = quantize_int8(network)
    assert (
        small.part.into is small.part.table
        and type(small.part.table) is Int8Table
        and type(network.part.table) is EmbeddingTable
    )


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.lists(st.integers(0, 12), max_size=9), min_size=1, max_size=5),
    st.integers(1, 12),
    st.integers(1, 7),
)
def test_side_by_side_is_the_plain_loop(lists, n_items, length):
    flat = torch.tensor(sum(lists, []), dtype=torch.int64)
    history = History(
        torch.tensor(np.cumsum([0] + [len(x) for x in lists])),
        flat,
        torch.zeros(len(flat)),
        torch.zeros(len(flat), dtype=torch.int64),
    )
    code, event = batch_histories(history, n_items, length)
    for u, items in enumerate(lists):
        mine = [i for i in items if i < n_items][-length:]
        assert code[u].tolist() == [n_items] * (length - len(mine)) + mine
    assert torch.equal(history.item[event[event >= 0]], code[code < n_items])


# ---------------------------------------------------------------- networks and files


def test_a_part_is_what_it_was(single, histories):
    code, want = asked(single, histories)
    with torch.no_grad():
        assert near(to_network(single)(code), want) < 1e-5


def test_a_file_is_what_its_part_was(single, histories, tmp_path):
    write_export(single, pl.DataFrame({"item": single.item_ids}), tmp_path, 60)
    code, want = asked(single, histories)
    file, small = [
        OnnxRecommender(tmp_path / name, single) for name in ("model.onnx", "model.int8.onnx")
    ]
    assert near(file.ask(code), want) < 1e-5 and near(small.ask(code), want) < 0.05
    assert (
        near(file.scores(torch.zeros(len(code), dtype=torch.int64), histories), want) < 1e-5
    )  # behind the usual face
    assert overlap_at_k(file.ask(code).topk(10, 1)[1], small.ask(code).topk(10, 1)[1]).mean() > 0.85


def test_the_hybrid_is_what_it_was(hybrid, histories):
    code, want = asked(hybrid, histories)
    with torch.no_grad():
        got = to_network(hybrid)(code)
    assert (
        near(got, want) < 1e-5
        and (got - want).abs().max() < 1e-6
        and got[0].argmax() == want[0].argmax()
    )


def test_what_cannot_leave_stays_and_the_rest_weighs_as_much(hybrid, split, histories):
    class Other(type(make_recommender("mean"))):
        pass

    odd = replace(
        hybrid, plan=hybrid.plan | {"ranking": {"towers": 0.5, "popularity": 0.3, "gru": 0.2}}
    )
    for name in ("user_ids", "item_ids", "more_users", "more_items", "log", "stars"):
        setattr(odd, name, getattr(hybrid, name))
    odd.models = hybrid.models | {"towers": Other()}
    kept = exportable_hybrid(odd)
    assert (
        kept.plan["ranking"] == pytest.approx({"popularity": 0.6, "gru": 0.4})
        and odd.plan["ranking"]["towers"] == 0.5
    )
    code, want = asked(kept, histories)
    with torch.no_grad():
        assert near(to_network(odd)(code), want) < 1e-5
    odd.plan = odd.plan | {"ranking": {"towers": 1.0}}
    with pytest.raises(UserError, match="none of this hybrid's parts"):
        to_network(odd)


def test_what_cannot_leave_says_which_can(split):
    for name in ("mean", "damped-bias", "user-knn"):
        model = make_recommender(name).fit(split)
        assert not can_export(model)
        with pytest.raises(UserError, match=f"{name} needs more.*hybrid.*content-towers.*gru"):
            to_network(model)


def operators():
    "Those that the page knows."
    text = (Path(export.__file__).parent / "static/edge.js").read_text()
    return set(re.findall(r"\b([A-Z]\w+): ", text[text.index("OPERATORS = {") :]))


def test_few_operators_and_a_sound_graph(hybrid):
    for network in (to_network(hybrid), quantize_int8(to_network(hybrid))):
        graph = to_onnx(network, 12)
        onnx.checker.check_model(graph, full_check=True)
        assert {n.op_type for n in graph.graph.node} <= operators() and not any(
            i.name == "" for n in graph.graph.node for i in graph.graph.initializer
        )
        used = {i for n in graph.graph.node for i in n.input}
        assert {i.name for i in graph.graph.initializer} <= used and {
            n.output[0] for n in graph.graph.node
        } - used == {"scores"}  # nothing idle
        assert all(
            type(m.rows) is torch.Tensor for m in network.modules() if isinstance(m, EmbeddingTable)
        )  # and nothing stays traced


def test_every_length_and_every_number_of_baskets(hybrid, histories):
    for length in (1, 7):
        session = onnxruntime.InferenceSession(
            to_onnx(to_network(hybrid), length).SerializeToString()
        )
        code, want = asked(hybrid, histories, length)
        for n in (1, len(code)):
            assert (
                near(torch.from_numpy(session.run(None, {"basket": code[:n].numpy()})[0]), want[:n])
                < 1e-5
            )


@pytest.mark.parametrize(
    "say",
    [lambda x: x.cumsum(0), lambda x: torch.sort(x)[0], lambda x: x**3],
    ids=["cumsum", "sort", "pow"],
)
def test_what_cannot_be_written_down_is_named(say):
    with pytest.raises(UserError, match="cannot be written down; known: add"):
        say(TracedTensor.wrap(torch.ones(3), GraphBuilder(), "x"))


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10**6))
def test_what_is_written_down_is_what_was_done(seed):
    "A walk through random operations, run by ONNX Runtime."
    rng, tape = np.random.default_rng(seed), GraphBuilder()
    x = TracedTensor.wrap(
        torch.from_numpy(rng.normal(size=(2, 3, 4)).astype(np.float32)), tape, "x"
    )
    ways = [
        lambda y: y + 1.5,
        lambda y: 2 - y,
        lambda y: y * y,
        lambda y: y.clamp(-1, 1),
        lambda y: y[:, 1:] if y.shape[1] > 1 else y,
        lambda y: y[:, -1:],
        lambda y: y.transpose(1, 2),
        lambda y: y[..., None].sum(3),
        lambda y: y[:, 0][:, None],
        lambda y: torch.softmax(y, 2),
        lambda y: torch.relu(y),
        lambda y: torch.where(y > 0, y, -1 * y),
        lambda y: (y < 0.2).float(),
        lambda y: y.square().sum(2, keepdim=True).sqrt() + y,
        lambda y: y[:, torch.tensor([0, 0])],
        lambda y: y.reshape(-1, y.shape[1], y.shape[2]),
        lambda y: torch.tanh(y) / 3.0,
        lambda y: y @ torch.ones(y.shape[2], 4),
        lambda y: torch.nn.functional.layer_norm(
            y, y.shape[2:], torch.ones(y.shape[2]), torch.zeros(y.shape[2]), 1e-5
        ),
        lambda y: torch.nn.functional.linear(y, torch.ones(3, y.shape[2]), torch.arange(3.0)),
    ]
    y = x
    for way in rng.choice(len(ways), 6):
        y = ways[way](y)

    def value(name, shape):
        return onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)

    graph = onnx.helper.make_graph(
        tape.nodes,
        "walk",
        [value("x", [2, 3, 4])],
        [value(y.node_name, list(y.shape))],
        list(tape.constants.values()),
    )
    said = onnxruntime.InferenceSession(
        onnx.helper.make_model(
            graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=9
        ).SerializeToString()
    ).run(None, {"x": np.asarray(x.as_subclass(torch.Tensor))})[0]
    assert said.shape == tuple(y.shape) and np.allclose(
        said, y.as_subclass(torch.Tensor).numpy(), atol=1e-4
    )


def test_a_process_without_torch(hybrid, split, histories, tmp_path):
    sizes = write_export(hybrid, split.items, tmp_path, 60)
    assert (
        sizes == {p.name: p.stat().st_size for p in tmp_path.iterdir()}
        and sizes["model.int8.onnx"] < 0.9 * sizes["model.onnx"]
    )
    code, want = asked(hybrid, histories)
    np.save(tmp_path / "code.npy", code.numpy())
    alone = """
import sys
for name in ("torch", "widedeep_nb", "polars", "onnx"): sys.modules[name] = None
import json, numpy as np, onnxruntime
session = onnxruntime.InferenceSession(sys.argv[1] + "/model.onnx")
items = json.load(open(sys.argv[1] + "/items.json"))["items"]
scores = session.run(None, {"basket": np.load(sys.argv[1] + "/code.npy")})[0]
try: import torch
except ImportError: print(json.dumps([scores.tolist(), [i["item"] for i in items]]))
"""
    done = subprocess.run(
        [sys.executable, "-c", alone, str(tmp_path)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    scores, ids = json.loads(done.stdout)
    assert near(torch.tensor(scores), want) < 1e-5 and ids == hybrid.item_ids.to_list()


def test_the_table_says_what_is_known(hybrid, split):
    rows = exported_items(hybrid, split.items)
    assert [r["item"] for r in rows] == hybrid.item_ids.to_list() and len(rows) == ITEMS
    assert all(
        ("price" in r) == (int(r["item"][1:]) % 5 != 0)
        and set(r) <= {"item", "title", "category", "brand", "price"}
        for r in rows
    )
    assert exported_items(hybrid, split.items.select("item")[:3])[5] == {"item": hybrid.item_ids[5]}


# ---------------------------------------------------------------- the page

BASKETS = [[], [0], [5, 3, 7], [1, 2, 1, 1], list(range(30)) * 3]


@pytest.fixture
def opened(hybrid, split, tmp_path):
    "The page in a browser, what it asked the network for and what went wrong in it."
    import shutil

    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if not chromium:
        pytest.skip("needs chromium")
    sync = pytest.importorskip("playwright.sync_api")
    write_export(hybrid, split.items, tmp_path, 60, "shop & <co>")
    with sync.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=chromium,
            args=[
                "--headless",
                "--no-sandbox",
                "--disable-gpu",
                "--disable-quic",
                "--no-first-run",
                "--disable-background-networking",
                "--disable-component-update",
                "--disable-sync",
            ],
        )
        page, wrong = browser.new_page(viewport={"width": 360, "height": 800}), []
        page.on("pageerror", lambda e: wrong.append(str(e)))
        page.on("dialog", lambda d: (wrong.append("dialog"), d.dismiss()))
        page.on("request", lambda r: wrong.append(r.url) if not r.url.startswith("file:") else None)
        page.goto((tmp_path / "edge.html").as_uri())
        yield page, wrong
        browser.close()


def test_the_page_lists_what_the_file_lists(opened, hybrid, tmp_path):
    page, wrong = opened
    session = onnxruntime.InferenceSession(tmp_path / "model.int8.onnx")
    for basket in BASKETS:
        want = session.run(None, {"basket": np.array([([ITEMS] * 60 + basket)[-60:]])})[0][0]
        got = np.array(page.evaluate("codes => Array.from(scores(codes))", basket))
        assert got.shape == want.shape and np.abs(got - want).max() <= 1e-6 * want.max()
        best = [c for c in np.argsort(-want, kind="stable") if c not in basket][:10]
        assert page.evaluate("codes => best(scores(codes), codes, 10)", basket) == best
    assert wrong == []


def test_the_page_is_used(opened, hybrid, tmp_path):
    "By hand and by keyboard; ids and titles are text, whatever they hold."
    page, wrong = opened

    def listed(of):
        return [
            int(c)
            for c in page.eval_on_selector_all(
                f"#{of} li", "lines => lines.map(l => l.dataset.code)"
            )
        ]

    def best(basket):
        return page.evaluate("codes => best(scores(codes), codes, 10)", basket)

    assert listed("list") == best([]) and "nothing yet" in page.inner_text("#said")
    page.keyboard.press("Tab")
    page.keyboard.type("thing I7")
    assert len(listed("found")) == 1 and "Thing 7" in page.inner_text("#found li")
    page.keyboard.press("Enter")
    first = hybrid.item_ids.to_list().index("i7")
    assert listed("basket") == [first] and listed("list") == best([first])
    page.fill("#words", "")
    page.locator("#list button").nth(2).focus()
    third = listed("list")[2]
    page.keyboard.press("Enter")
    assert (
        listed("basket") == [first, third]
        and listed("list") == best([first, third])
        and third not in listed("list")
    )
    assert (
        page.evaluate("document.activeElement.closest('ol').id") == "list"
    )  # the keyboard stays where it was
    page.locator("#basket button").first.click()
    assert listed("basket") == [third] and listed("list") == best([third])
    assert (
        page.locator("li b[onclick]").count() == 0
        and "<b onclick=alert(1)>Thing" in page.locator("#list li").first.inner_text()
        and "shop & <co>" in page.inner_text("#about")
    )
    page.fill("#words", "nothing that exists")
    assert listed("found") == [] and wrong == []


def test_the_page_fits(fits, hybrid, split, tmp_path):
    write_export(
        hybrid,
        split.items.with_columns(title=pl.lit("Averyverylongnamethatnobodywouldbreak" * 3)),
        tmp_path,
        9,
    )
    fits(tmp_path / "edge.html")


def test_the_page_names_what_it_does_not_know(opened):
    page, _ = opened
    node = onnx.helper.make_node("Einsum", ["basket"], ["scores"], equation="i->i")

    def info(name):
        return onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["n", 4])

    graph = onnx.helper.make_graph(
        [node],
        "odd",
        [info("basket")],
        [info("scores")],
        [onnx.numpy_helper.from_array(np.zeros(1, np.float32), "c")],
    )
    raw = list(onnx.helper.make_model(graph).SerializeToString())
    assert "unknown operator Einsum; known: Add" in page.evaluate(
        "raw => { try { load(Uint8Array.from(raw)); } catch (e) { return e.message; } }", raw
    )
    assert "no ONNX" in page.evaluate(
        "() => { try { load(Uint8Array.of(7, 7, 7)); } catch (e) { return e.message; } }"
    )


# ---------------------------------------------------------------- two stages


def everybody(model):
    return torch.cat([torch.arange(0, model.n_users, 3), torch.tensor([len(model.all_users)])])


@pytest.fixture(scope="module")
def shop():
    return synthetic_hybrid(300, 2500)


@pytest.fixture(scope="module", params=["all parts", "synthetic"])
def two(request, hybrid, shop):
    return TwoStageRetriever(hybrid if request.param == "all parts" else shop)


def test_where_nothing_is_estimated_both_ways_are_one(two):
    users = everybody(two.model)
    history = two.model.train_history.select(users)
    (a, at), (b, whole) = two.retrieve(users, history, 8), two.exact(users, history, 8)
    assert torch.allclose(at, whole, rtol=1e-3, atol=1e-7) and overlap_at_k(a, b).mean() > 0.99
    for u in range(len(users)):
        mine, had = set(a[u].tolist()) - {-1}, set(history.select(torch.tensor([u])).item.tolist())
        assert (
            len(mine) == min(8, two.model.n_items - len(had)) == int((a[u] >= 0).sum())
            and not mine & had
            and (at[u][: len(mine)].diff() <= 0).all()
        )


@pytest.mark.parametrize(
    "name, how",
    [
        ("wide-matrix", {}),
        ("wide-matrix", {"max_items": 17}),
        ("wide-neighbours", {}),
        ("wide-next", {}),
    ],
    ids=str,
)
def test_a_row_is_the_part_without_its_noughts(name, how, split, histories):
    model = make_recommender(name, **how).fit(split)
    for fading in (False, True):
        part, x = (
            export.to_module(model, fading),
            make_basket_batch(strip_histories(histories, ITEMS, 60)[0], ITEMS),
        )
        row, want = sparse_scores(part, x, ITEMS), export.share(part(x))
        assert (row[0].diff(dim=1) >= 0).all() and torch.allclose(
            row[1].sum(1), want.sum(1), atol=1e-5
        )
        assert torch.allclose(
            lookup_scores(row, torch.arange(ITEMS).expand(len(want), -1).contiguous()),
            want,
            atol=1e-6,
        )


def test_a_part_that_cannot_be_exported_has_its_say(hybrid, split):
    "Asked about candidates and the sample only, by its own face."
    odd = replace(
        hybrid, plan=hybrid.plan | {"ranking": {"towers": 0.7, "neighbours, fading": 0.3}}
    )
    for name in ("user_ids", "item_ids", "more_users", "more_items", "log", "stars"):
        setattr(odd, name, getattr(hybrid, name))
    odd.models, odd._cache = hybrid.models | {"towers": make_recommender("user-knn").fit(split)}, {}
    users = everybody(odd)
    history = odd.train_history.select(users)
    (a, at), (b, whole) = (
        TwoStageRetriever(odd).retrieve(users, history, 8),
        TwoStageRetriever(odd).exact(users, history, 8),
    )
    assert overlap_at_k(a, b).mean() > 0.9 and torch.allclose(at[:, 0], whole[:, 0], rtol=1e-3)


def test_rules_and_what_is_too_little(two):
    model, users = two.model, everybody(two.model)[:9]
    history = model.train_history.select(users)
    few = torch.zeros(len(model.all_items), dtype=torch.bool).index_fill(0, torch.arange(5), True)
    codes, scores = two.retrieve(users, history, 8, few)
    assert (
        codes.shape == (9, 8)
        and ((codes < 5) & (codes >= -1)).all()
        and torch.equal(codes == -1, scores == -torch.inf)
    )
    had = [set(history.select(torch.tensor([u])).item.tolist()) for u in range(9)]
    assert [set(row.tolist()) - {-1} for row in codes] == [
        set(range(5)) - h for h in had
    ]  # all that there is
    codes, _ = two.retrieve(users, history, model.n_items + 50)
    assert [set(row.tolist()) - {-1} for row in codes] == [
        set(range(model.n_items)) - h for h in had
    ]
    none = two.retrieve(users, history, 3, torch.zeros(len(model.all_items), dtype=torch.bool))
    assert (none[0] == -1).all() and two.retrieve(users[:0], history.select(users[:0]), 3)[0].shape[
        0
    ] == 0


def test_new_products_are_asked_about_by_the_hybrid(hybrid):
    two, users = TwoStageRetriever(hybrid), torch.arange(5)
    new = torch.arange(len(hybrid.all_items)) >= hybrid.n_items
    codes, _ = two.retrieve(users, hybrid.train_history.select(users), 2, new)
    assert (codes >= hybrid.n_items).all()
    every, history = (
        torch.ones(len(hybrid.all_items), dtype=torch.bool),
        hybrid.train_history.select(users),
    )
    both = two.retrieve(users, history, hybrid.n_items, every)[0]
    assert (
        torch.equal(both, two.exact(users, history, hybrid.n_items, every)[0])
        and torch.equal(two.retrieve(users, history, 6, every)[0], both[:, :6])
        and (both >= hybrid.n_items).any()
    )


def test_few_candidates_make_a_fallback(shop):
    "Where rules leave next to nothing of the candidates, everything is asked about."
    two, users = TwoStageRetriever(shop, n_candidates=3, n_ann_candidates=4), torch.arange(12)
    history = shop.train_history.select(users)
    rare = torch.arange(shop.n_items) % 10 == 3
    assert torch.equal(
        two.retrieve(users, history, 6, rare)[0], two.exact(users, history, 6, rare)[0]
    )


def test_candidates_and_a_sample_are_nearly_the_whole(shop):
    two, users = (
        TwoStageRetriever(shop, n_candidates=40, n_ann_candidates=60, n_sample=80),
        everybody(shop),
    )
    history = shop.train_history.select(users)
    (a, at), (b, whole) = two.retrieve(users, history, 10), two.exact(users, history, 10)
    assert 0.85 < overlap_at_k(a, b).mean() and ((at - whole).abs() / whole).median() < 0.1


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10**6), st.integers(1, 30), st.integers(1, 40))
def test_the_estimate_is_right_on_average(seed, c, s):
    rng = np.random.default_rng(seed)
    value = torch.from_numpy(rng.exponential(size=60).astype(np.float32))
    top = value.topk(c)[1]
    found = []
    for _ in range(300):
        drawn = torch.from_numpy(rng.permutation(60)[:s])
        found.append(
            float(
                estimate_normalizer(
                    value[top][None],
                    value[drawn][None],
                    torch.isin(drawn, top)[None],
                    torch.tensor([[60.0 - c]]),
                )
            )
        )
    rest = torch.ones(60, dtype=torch.bool).index_fill(0, top, False)
    if s == 60 or c + s > 60 and s > 30 + c:
        assert found[0] == pytest.approx(float(value.sum()), rel=0.5)
    none = (1 - s / 60) ** (60 - c)  # a sample that holds candidates only says nothing of the rest
    assert (
        abs(np.mean(found) - float(value.sum()))
        < 5 * np.std(found) / 300**0.5 + (none + 0.02) * float(value[rest].sum()) + 1e-3
    )


def test_recall_counts_ties_and_gaps():
    class Fixed:
        def __init__(self, near):
            self.neighbors = near

        def search(self, q, k):
            return None, np.tile(self.neighbors, (len(q), 1))

    rows, ask = torch.tensor([[1.0], [3.0], [3.0], [3.0], [0.0]]), torch.ones(20, 1)
    assert [
        ann_recall(Fixed(near), rows, ask, 2) for near in ([1, 2], [3, 2], [1, 0], [1, -1], [0, 4])
    ] == [1, 1, 0.5, 0.5, 0]


@pytest.mark.parametrize("n", [500, 30_000])
def test_the_index_finds(n):
    draw = torch.Generator().manual_seed(0)
    rows = torch.randn(n, 12, generator=draw) * (1 + torch.rand(n, 1, generator=draw))
    ask = torch.randn(40, 12, generator=draw)
    assert overlap_at_k(
        (ask @ rows.T).topk(10, 1)[1],
        torch.from_numpy(build_ann_index(rows, ask[:20]).search(ask.numpy(), 10)[1]),
    ).mean() > (0.97 if n > 20_000 else 0.999)


def test_measured_is_what_is_there(shop):
    found = measure_two_stages(shop, 20, 10)
    assert (
        found["recall"] == {"content towers": 1.0}
        and found["overlap"] > 0.98
        and len(found["two_stage"]) == 20
        and len(found["all"]) == 10
        and found["items"] == shop.n_items
    )
    two, users = TwoStageRetriever(shop), torch.arange(20)
    two.indexes["content towers"] = build_ann_index(
        torch.zeros(shop.n_items, two.indexes["content towers"].d)
        + torch.arange(shop.n_items)[:, None],
        torch.zeros(0, 1),
    )
    assert (
        component_recall(two, "content towers", users, shop.train_history.select(users)) < 0.5
    )  # a bad index is seen to be bad


def test_a_single_model_has_no_stages(split):
    with pytest.raises(UserError, match="two stages are of a hybrid, not of popularity"):
        TwoStageRetriever(make_recommender("popularity").fit(split))


@settings(deadline=None, max_examples=10)
@given(st.integers(20, 200), st.integers(0, 900), st.integers(0, 99))
def test_a_drawn_shop_has_all_its_products(items, more, seed):
    split = synthetic_split(items, items + more, seed=seed)
    assert (
        split.n_train_items == items
        and not split.train.select("user", "item").is_duplicated().any()
    )
    assert synthetic_split(items, items + more, seed=seed).train.equals(split.train)


# ---------------------------------------------------------------- the command


def test_the_command(hybrid, split, tmp_path, capsys):
    from widedeep_nb.core import Run
    from widedeep_nb.run import main

    run = Run(tmp_path / "run")
    hybrid.save(run.model_folder("hybrid"))
    make_recommender("mean").fit(split).save(run.model_folder("mean"))
    run.write("items.parquet", split.items)
    main(["export", str(run.folder)])
    assert {p.name for p in (run.folder / "export").iterdir()} == {
        "model.onnx",
        "model.int8.onnx",
        "items.json",
        "edge.html",
    } and "edge.html" in capsys.readouterr().out
    main(["export", str(run.folder), "--out", str(tmp_path / "there"), "--length", "3"])
    assert json.loads((tmp_path / "there/items.json").read_text())["length"] == 3
    (tmp_path / "file").write_text("")
    for words, said in (
        (["--model", "mean"], "needs more than a basket"),
        (["--model", "nope"], "unknown model"),
        (["--length", "0"], "length"),
        (["--out", str(tmp_path / "file")], "is a file"),
    ):
        with pytest.raises(SystemExit) as e:
            main(["export", str(run.folder), *words])
        assert e.value.code == 2 and said in capsys.readouterr().err
