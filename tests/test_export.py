"Check the export: modules, ONNX files, the browser page and two-stage retrieval."

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
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import widedeep_nb
from widedeep_nb.export import Int8Table, exported_items, quantize_int8, write_export
from widedeep_nb.lib import ensemble, networks
from widedeep_nb.lib.content_features import add_catalog
from widedeep_nb.lib.core import PROTOCOLS, History, Split, UserError, to_interactions
from widedeep_nb.lib.export_measures import (
    component_recall,
    describe_export,
    export_in_short,
    measure_two_stages,
    strip_histories,
)
from widedeep_nb.lib.history_models import HistoryRecommender
from widedeep_nb.lib.networks import (
    EmbeddingTable,
    batch_histories,
    exportable_hybrid,
    make_basket_batch,
    to_network,
)
from widedeep_nb.lib.onnx_graph import (
    ONNX_FILES,
    GraphBuilder,
    OnnxRecommender,
    TracedTensor,
    to_onnx,
)
from widedeep_nb.lib.recommender import make_recommender, recommender_class, recommender_names
from widedeep_nb.lib.retrieval import (
    TwoStageRetriever,
    ann_recall,
    build_ann_index,
    estimate_normalizer,
    lookup_scores,
    overlap_at_k,
    sparse_scores,
)
from widedeep_nb.lib.synthetic_catalogs import synthetic_hybrid, synthetic_split

N_ITEMS = 40
FITTED_FIELDS = (
    "user_ids",
    "item_ids",
    "cold_users",
    "cold_items",
    "train_history",
    "rating_range",
)


@pytest.fixture(scope="module")
def split():
    "Forty items with side features, ratings and dates; two cold-start items; skewed users."
    rng = np.random.default_rng(0)
    n = 900
    log = pl.DataFrame(
        {
            "user": [f"u{int(70 * x * x)}" for x in rng.random(n)],
            "item": [f"i{int(N_ITEMS * x * x)}" for x in rng.random(n)],
            "rating": rng.integers(1, 6, n),
            "timestamp": np.sort(rng.integers(10**12, 10**12 + 4 * 10**10, n)),
        }
    )
    one_of_each = pl.DataFrame(
        {
            "user": ["u0"] * N_ITEMS,
            "item": [f"i{i}" for i in range(N_ITEMS)],
            "rating": [3] * N_ITEMS,
            "timestamp": [10**12] * N_ITEMS,
        }
    )
    log = pl.concat([log, one_of_each.cast(log.schema)])
    log = to_interactions(log.unique(["user", "item"], maintain_order=True))
    n = N_ITEMS + 2
    items = pl.DataFrame(
        {
            "item": [f"i{i}" for i in range(n)],
            "category": [f"A > C{i % 4}" for i in range(n)],
            "brand": [f"B{i % 3}" for i in range(n)],
            "price": [None if i % 5 == 0 else float(i) for i in range(n)],
            "title": [f"<b onclick=alert(1)>Thing {i}</b></script><!--" for i in range(n)],
        }
    )
    none = log.clear()
    split = Split.from_frames(log, none, none, items=items, protocol=PROTOCOLS["given"])
    return add_catalog(split, items)


def make_history(lists):
    "Return a history of lists of item codes, without ratings and times."
    items = torch.tensor(sum(lists, []), dtype=torch.int64)
    indptr = torch.tensor(np.cumsum([0] + [len(codes) for codes in lists]))
    no_rating = torch.full((len(items),), torch.nan)
    return History(indptr, items, no_rating, torch.zeros(len(items), dtype=torch.int64))


@pytest.fixture(scope="module")
def histories():
    "Long, short and empty histories, with repeated items and with cold-start items."
    lists = [[], [3], [1, 2, 1, 1], list(range(25)) * 2]
    lists += [[N_ITEMS, 5, N_ITEMS + 1, 5, 6], [N_ITEMS]]
    return make_history(lists + np.random.default_rng(1).integers(0, N_ITEMS, (6, 7)).tolist())


SINGLE_MODELS = [
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
    ("als", {"factors": 6, "alpha": 200.0, "reg": 0.5}),
    ("content", {}),
    ("content-towers", {"epochs": 1}),
    ("content-towers", {"epochs": 1, "branches": "wide"}),
    ("content-towers", {"epochs": 1, "branches": "deep"}),
    ("gru", {"epochs": 1, "embedding": 8}),
    ("gru", {"epochs": 1, "embedding": 8, "layers": 2, "length": 9}),
    ("self-attention", {"epochs": 1, "embedding": 8}),
    ("self-attention", {"epochs": 1, "embedding": 8, "layers": 2, "heads": 2, "length": 9}),
]


def model_id(param):
    "Return the name of a test case: the model and its parameters."
    name, parameters = param
    return name + "".join(f" {k}={v}" for k, v in parameters.items())


@pytest.fixture(scope="module", params=SINGLE_MODELS, ids=model_id)
def single(request, split):
    name, parameters = request.param
    return make_recommender(name, **parameters).fit(split)


RANKING_WEIGHTS = {
    "popularity": 0.05,
    "popularity, 365 days": 0.05,
    "matrix": 0.1,
    "neighbors, recency-weighted": 0.1,
    "markov chain": 0.1,
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
        "ranking": RANKING_WEIGHTS,
        "cold_users": {"popularity": 0.6, "content towers": 0.4},
        "cold_items": {"content towers": 1.0},
        "epochs": {"self-attention": 1, "gru": 1, "content towers": 1},
    }
    return make_recommender("hybrid", plan=plan).fit(split)


def relative_error(scores, expected):
    "Return the largest error of a row over its largest expected score."
    error = (scores - expected).abs().amax(1)
    return float((error / expected.abs().amax(1).clamp(min=1e-9)).max())


def expected_scores(model, histories, length=60):
    "Return baskets of codes, and the model's own scores of the same events."
    codes, history = strip_histories(histories, model.n_items, length)
    unknown_users = torch.full((len(codes),), len(model.all_users))
    return codes, model.scores(unknown_users, history)


def run_onnx(model, codes):
    "Return the scores of an ONNX model, a file or bytes, by ONNX Runtime."
    session = onnxruntime.InferenceSession(model)
    return torch.from_numpy(session.run(None, {"basket": np.asarray(codes)})[0])


# ---------------------------------------------------------------- tables and baskets


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 6), st.integers(1, 9), st.integers(0, 10**6), st.sampled_from([1e-6, 1.0, 1e6])
)
def test_int8_error_is_half_a_step(n, d, seed, scale):
    rows = scale * torch.randn(n, d, generator=torch.Generator().manual_seed(seed))
    table = Int8Table(rows)
    restored = table.lookup(torch.arange(n))
    bound = rows.abs().amax(1, keepdim=True) / 254 * (1 + 1e-4)
    assert table.rows.dtype == torch.int8 and ((restored - rows).abs() <= bound).all()
    products = (rows @ restored.T)[:, :-1]
    assert torch.allclose(table.dot_all(rows), products, rtol=1e-4, atol=1e-4 * scale**2)


def test_shared_tables_stay_shared(split):
    network = to_network(make_recommender("content-towers", epochs=1).fit(split))
    quantized = quantize_int8(network)
    assert quantized.part.input_table is quantized.part.table
    assert type(quantized.part.table) is Int8Table and type(network.part.table) is EmbeddingTable


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.lists(st.integers(0, 12), max_size=9), min_size=1, max_size=5),
    st.integers(1, 12),
    st.integers(1, 7),
)
def test_batch_histories_equals_a_loop(lists, n_items, length):
    history = make_history(lists)
    codes, event = batch_histories(history, n_items, length)
    for user, items in enumerate(lists):
        known = [i for i in items if i < n_items][-length:]
        assert codes[user].tolist() == [n_items] * (length - len(known)) + known
    assert torch.equal(history.item[event[event >= 0]], codes[codes < n_items])


# ---------------------------------------------------------------- networks and files


def test_network_equals_model(single, histories):
    codes, expected = expected_scores(single, histories)
    with torch.no_grad():
        assert relative_error(to_network(single)(codes), expected) < 1e-5


def test_file_equals_model(single, histories, tmp_path):
    "Check the float32 and the int8 file, and the interface of a recommender."
    write_export(single, pl.DataFrame({"item": single.item_ids}), tmp_path, 60)
    codes, expected = expected_scores(single, histories)
    exact, quantized = [OnnxRecommender(tmp_path / name, single) for name in ONNX_FILES]
    scores, quantized_scores = exact.score_baskets(codes), quantized.score_baskets(codes)
    assert relative_error(scores, expected) < 1e-5
    assert relative_error(quantized_scores, expected) < 0.05
    users = torch.zeros(len(codes), dtype=torch.int64)
    assert relative_error(exact.scores(users, histories), expected) < 1e-5
    top, quantized_top = scores.topk(10, 1)[1], quantized_scores.topk(10, 1)[1]
    assert overlap_at_k(top, quantized_top).mean() > 0.85


def test_hybrid_network_equals_model(hybrid, histories):
    codes, expected = expected_scores(hybrid, histories)
    with torch.no_grad():
        scores = to_network(hybrid)(codes)
    assert relative_error(scores, expected) < 1e-5 and (scores - expected).abs().max() < 1e-6
    assert scores[0].argmax() == expected[0].argmax()


def with_other_component(hybrid, ranking, model):
    "Return an ensemble with other weights, and with another model for its component towers."
    other = replace(hybrid, plan=hybrid.plan | {"ranking": ranking})
    for name in FITTED_FIELDS:
        setattr(other, name, getattr(hybrid, name))
    other.models = hybrid.models | {"towers": model}
    other._cache = {}
    return other


def test_excluded_components_pass_their_weight_on(hybrid, histories):
    class Other(type(make_recommender("mean"))):
        pass

    weights = {"towers": 0.5, "popularity": 0.3, "gru": 0.2}
    model = with_other_component(hybrid, weights, Other())
    exported = exportable_hybrid(model)
    assert exported.plan["ranking"] == pytest.approx({"popularity": 0.6, "gru": 0.4})
    assert model.plan["ranking"]["towers"] == 0.5
    codes, expected = expected_scores(exported, histories)
    with torch.no_grad():
        assert relative_error(to_network(model)(codes), expected) < 1e-5
    model.plan = model.plan | {"ranking": {"towers": 1.0}}
    with pytest.raises(UserError, match="no component of this hybrid"):
        to_network(model)


@pytest.mark.parametrize("name", recommender_names())
def test_models_say_whether_they_can_be_exported(name):
    cls = recommender_class(name)
    has_module = any(base.__name__ in networks.MODULE_MAKERS for base in cls.__mro__)
    assert cls.exportable == (has_module or name == "hybrid")


def test_modules_do_not_depend_on_class_identity(split, histories):
    "Check that a second copy of a class, as in a notebook that is run, is exported too."
    model = make_recommender("ease").fit(split)
    codes, expected = expected_scores(model, histories)
    cls = type(model)
    model.__class__ = type(cls.__name__, (HistoryRecommender,), dict(vars(cls)))
    assert not isinstance(model, cls)
    with torch.no_grad():
        assert relative_error(to_network(model)(codes), expected) < 1e-5


@pytest.mark.parametrize("name", ["mean", "damped-bias", "user-knn"])
def test_unsupported_models_are_refused(name, split):
    model = make_recommender(name).fit(split)
    assert not model.exportable
    with pytest.raises(UserError, match=f"{name} cannot be exported") as e:
        to_network(model)
    supported = str(e.value).split("these can: ")[1].split(", ")
    assert {"hybrid", "content-towers", "gru"} <= set(supported)


def page_operators():
    "Return the names of the operators that the page supports."
    text = (Path(widedeep_nb.__file__).parent / "static/edge.js").read_text()
    return set(re.findall(r"\b([A-Z]\w+): ", text[text.index("OPERATORS = {") :]))


def test_graph_is_valid_and_minimal(hybrid):
    "Check that the page supports all operators, that no node is idle, and no table stays traced."
    for network in (to_network(hybrid), quantize_int8(to_network(hybrid))):
        model = to_onnx(network, 12)
        onnx.checker.check_model(model, full_check=True)
        nodes = model.graph.node
        constants = {constant.name for constant in model.graph.initializer}
        used = {name for node in nodes for name in node.input}
        assert {node.op_type for node in nodes} <= page_operators() and "" not in constants
        assert constants <= used and {node.output[0] for node in nodes} - used == {"scores"}
        tables = [m for m in network.modules() if isinstance(m, EmbeddingTable)]
        assert all(type(table.rows) is torch.Tensor for table in tables)


def test_any_length_and_any_number_of_baskets(hybrid, histories):
    for length in (1, 7):
        model = to_onnx(to_network(hybrid), length).SerializeToString()
        codes, expected = expected_scores(hybrid, histories, length)
        for n in (1, len(codes)):
            assert relative_error(run_onnx(model, codes[:n]), expected[:n]) < 1e-5


@pytest.mark.parametrize(
    "operation",
    [lambda x: x.cumsum(0), lambda x: torch.sort(x)[0], lambda x: x**3],
    ids=["cumsum", "sort", "pow"],
)
def test_unsupported_operations_are_named(operation):
    with pytest.raises(UserError, match="cannot be exported to ONNX; supported: add"):
        operation(TracedTensor.wrap(torch.ones(3), GraphBuilder(), "x"))


OPERATIONS = [
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
    lambda y: F.layer_norm(y, y.shape[2:], torch.ones(y.shape[2]), torch.zeros(y.shape[2]), 1e-5),
    lambda y: F.linear(y, torch.ones(3, y.shape[2]), torch.arange(3.0)),
]


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10**6))
def test_traced_operations_equal_torch(seed):
    "Check random sequences of operations against ONNX Runtime."
    rng, builder = np.random.default_rng(seed), GraphBuilder()
    value = rng.normal(size=(2, 3, 4)).astype(np.float32)
    x = y = TracedTensor.wrap(torch.from_numpy(value), builder, "x")
    for i in rng.choice(len(OPERATIONS), 6):
        y = OPERATIONS[i](y)
    info = onnx.helper.make_tensor_value_info
    inputs = [info("x", onnx.TensorProto.FLOAT, list(x.shape))]
    outputs = [info(y.node_name, onnx.TensorProto.FLOAT, list(y.shape))]
    constants = list(builder.constants.values())
    graph = onnx.helper.make_graph(builder.nodes, "random", inputs, outputs, constants)
    opset = onnx.helper.make_opsetid("", 18)
    model = onnx.helper.make_model(graph, opset_imports=[opset], ir_version=9)
    session = onnxruntime.InferenceSession(model.SerializeToString())
    result = session.run(None, {"x": value})[0]
    assert result.shape == tuple(y.shape)
    assert np.allclose(result, y.as_subclass(torch.Tensor).numpy(), atol=1e-4)


SCORE_WITHOUT_TORCH = """
import sys
for name in ("torch", "widedeep_nb", "polars", "onnx"): sys.modules[name] = None
import json, numpy as np, onnxruntime
session = onnxruntime.InferenceSession(sys.argv[1] + "/model.onnx")
items = json.load(open(sys.argv[1] + "/items.json"))["items"]
scores = session.run(None, {"basket": np.load(sys.argv[1] + "/code.npy")})[0]
try: import torch
except ImportError: print(json.dumps([scores.tolist(), [i["item"] for i in items]]))
"""


def test_process_without_torch(hybrid, split, histories, tmp_path):
    sizes = write_export(hybrid, split.items, tmp_path, 60)
    assert sizes == {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    assert sizes["model.int8.onnx"] < 0.9 * sizes["model.onnx"]
    codes, expected = expected_scores(hybrid, histories)
    np.save(tmp_path / "code.npy", codes.numpy())
    command = [sys.executable, "-c", SCORE_WITHOUT_TORCH, str(tmp_path)]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    scores, ids = json.loads(process.stdout)
    assert relative_error(torch.tensor(scores), expected) < 1e-5
    assert ids == hybrid.item_ids.to_list()


def test_exported_items(hybrid, split):
    "Check that missing values are left out, and items without a row have only their id."
    rows = exported_items(hybrid, split.items)
    assert [row["item"] for row in rows] == hybrid.item_ids.to_list() and len(rows) == N_ITEMS
    for row in rows:
        assert ("price" in row) == (int(row["item"][1:]) % 5 != 0)
        assert set(row) <= {"item", "title", "category", "brand", "price"}
    partial = exported_items(hybrid, split.items.select("item")[:3])
    assert partial[5] == {"item": hybrid.item_ids[5]}


# ---------------------------------------------------------------- browser page

BASKETS = [[], [0], [5, 3, 7], [1, 2, 1, 1], list(range(30)) * 3]


@pytest.fixture
def opened(hybrid, split, tmp_path, browser):
    "The page in a browser, and the list of what goes wrong in it."
    write_export(hybrid, split.items, tmp_path, 60, "shop & <co>")
    faults = []

    def refuse_dialog(dialog):
        faults.append("dialog")
        dialog.dismiss()

    def check_request(request):
        if not request.url.startswith("file:"):
            faults.append(request.url)

    page = browser.new_page(viewport={"width": 360, "height": 800})
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("dialog", refuse_dialog)
    page.on("request", check_request)
    page.goto((tmp_path / "edge.html").as_uri())
    yield page, faults
    page.close()


def best_on_page(page, basket):
    "Return the codes that the page recommends for a basket."
    return page.evaluate("codes => best(scores(codes), codes, 10)", basket)


def listed_on_page(page, list_id):
    "Return the codes of a list that the page shows."
    script = "lines => lines.map(line => line.dataset.code)"
    return [int(code) for code in page.eval_on_selector_all(f"#{list_id} li", script)]


def test_page_recommends_as_the_file(opened, tmp_path):
    page, faults = opened
    for basket in BASKETS:
        codes = [([N_ITEMS] * 60 + basket)[-60:]]
        expected = run_onnx(tmp_path / "model.int8.onnx", codes)[0].numpy()
        scores = np.array(page.evaluate("codes => Array.from(scores(codes))", basket))
        assert scores.shape == expected.shape
        assert np.abs(scores - expected).max() <= 1e-6 * expected.max()
        best = [code for code in np.argsort(-expected, kind="stable") if code not in basket][:10]
        assert best_on_page(page, basket) == best
    assert faults == []


def test_page_by_mouse_and_keyboard(opened, hybrid):
    "Check search, basket and list; ids and titles are shown as text, whatever they hold."
    page, faults = opened
    assert listed_on_page(page, "list") == best_on_page(page, [])
    assert "For an empty basket" in page.inner_text("#said")
    page.keyboard.press("Tab")
    page.keyboard.type("thing I7")
    assert len(listed_on_page(page, "found")) == 1 and "Thing 7" in page.inner_text("#found li")
    page.keyboard.press("Enter")
    first = hybrid.item_ids.to_list().index("i7")
    assert listed_on_page(page, "basket") == [first]
    assert listed_on_page(page, "list") == best_on_page(page, [first])
    page.fill("#words", "")
    page.locator("#list button").nth(2).focus()
    third = listed_on_page(page, "list")[2]
    page.keyboard.press("Enter")
    assert listed_on_page(page, "basket") == [first, third]
    recommended = listed_on_page(page, "list")
    assert recommended == best_on_page(page, [first, third]) and third not in recommended
    assert page.evaluate("document.activeElement.closest('ol').id") == "list"  # focus stays
    page.locator("#basket button").first.click()
    assert listed_on_page(page, "basket") == [third]
    assert listed_on_page(page, "list") == best_on_page(page, [third])
    assert page.locator("li b[onclick]").count() == 0
    assert "<b onclick=alert(1)>Thing" in page.locator("#list li").first.inner_text()
    assert "shop & <co>" in page.inner_text("#about")
    page.fill("#words", "nothing that exists")
    assert listed_on_page(page, "found") == [] and faults == []


def test_page_fits_the_window(fits, hybrid, split, tmp_path):
    long_title = pl.lit("Averyverylongnamethatnobodywouldbreak" * 3)
    write_export(hybrid, split.items.with_columns(title=long_title), tmp_path, 9)
    fits(tmp_path / "edge.html")


def test_page_names_unsupported_operators(opened):
    page, _ = opened
    node = onnx.helper.make_node("Einsum", ["basket"], ["scores"], equation="i->i")
    inputs, outputs = [
        [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["n", 4])]
        for name in ("basket", "scores")
    ]
    constant = onnx.numpy_helper.from_array(np.zeros(1, np.float32), "c")
    graph = onnx.helper.make_graph([node], "odd", inputs, outputs, [constant])
    raw = list(onnx.helper.make_model(graph).SerializeToString())
    script = "raw => { try { load(Uint8Array.from(raw)); } catch (e) { return e.message; } }"
    assert "unknown operator Einsum; known: Add" in page.evaluate(script, raw)
    assert "no ONNX" in page.evaluate(script, [7, 7, 7])


# ---------------------------------------------------------------- two-stage retrieval


def sample_users(model):
    "Return a third of the users, and a cold-start user."
    return torch.cat([torch.arange(0, model.n_users, 3), torch.tensor([len(model.all_users)])])


def seen_items(history):
    "Return the set of items of each user."
    return [set(history.select(torch.tensor([n])).item.tolist()) for n in range(len(history))]


def code_sets(codes):
    "Return the set of items of each list."
    return [set(row.tolist()) - {-1} for row in codes]


@pytest.fixture(scope="module")
def synthetic():
    return synthetic_hybrid(300, 2500)


@pytest.fixture(scope="module", params=["all components", "synthetic"])
def retriever(request, hybrid, synthetic):
    return TwoStageRetriever(hybrid if request.param == "all components" else synthetic)


def test_two_stages_equal_exact_scoring(retriever):
    "Check this where the sample holds all items, so that no normalizer is estimated."
    model, users = retriever.model, sample_users(retriever.model)
    history = model.train_history.select(users)
    codes, scores = retriever.retrieve(users, history, 8)
    exact_codes, exact_scores = retriever.exact(users, history, 8)
    assert torch.allclose(scores, exact_scores, rtol=1e-3, atol=1e-7)
    assert overlap_at_k(codes, exact_codes).mean() > 0.99
    seen, recommended = seen_items(history), code_sets(codes)
    for n in range(len(users)):
        size = min(8, model.n_items - len(seen[n]))
        assert len(recommended[n]) == size == int((codes[n] >= 0).sum())
        assert not recommended[n] & seen[n] and (scores[n][:size].diff() <= 0).all()


@pytest.mark.parametrize(
    "name, parameters",
    [
        ("wide-matrix", {}),
        ("wide-matrix", {"max_items": 17}),
        ("wide-neighbours", {}),
        ("wide-next", {}),
    ],
    ids=str,
)
def test_sparse_scores_equal_all_scores(name, parameters, split, histories):
    model = make_recommender(name, **parameters).fit(split)
    codes, _ = strip_histories(histories, N_ITEMS, 60)
    x = make_basket_batch(codes, N_ITEMS)
    all_codes = torch.arange(N_ITEMS).expand(len(codes), -1).contiguous()
    for recency_weighted in (False, True):
        part = networks.to_module(model, recency_weighted)
        expected = ensemble.normalize_scores(part(x))
        row = sparse_scores(part, x, N_ITEMS)
        assert (row[0].diff(dim=1) >= 0).all()
        assert torch.allclose(row[1].sum(1), expected.sum(1), atol=1e-5)
        assert torch.allclose(lookup_scores(row, all_codes), expected, atol=1e-6)


def test_component_that_cannot_be_exported(hybrid, split):
    "Check that such a component scores the candidates and the sample itself."
    weights = {"towers": 0.7, "neighbors, recency-weighted": 0.3}
    model = with_other_component(hybrid, weights, make_recommender("user-knn").fit(split))
    users = sample_users(model)
    history = model.train_history.select(users)
    codes, scores = TwoStageRetriever(model).retrieve(users, history, 8)
    exact_codes, exact_scores = TwoStageRetriever(model).exact(users, history, 8)
    assert overlap_at_k(codes, exact_codes).mean() > 0.9
    assert torch.allclose(scores[:, 0], exact_scores[:, 0], rtol=1e-3)


def test_rules_that_leave_few_items(retriever):
    model, users = retriever.model, sample_users(retriever.model)[:9]
    history = model.train_history.select(users)
    seen = seen_items(history)
    no_item = torch.zeros(len(model.all_items), dtype=torch.bool)
    five_items = no_item.index_fill(0, torch.arange(5), True)
    codes, scores = retriever.retrieve(users, history, 8, five_items)
    assert codes.shape == (9, 8) and torch.equal(codes == -1, scores == -torch.inf)
    assert code_sets(codes) == [set(range(5)) - items for items in seen]
    codes, _ = retriever.retrieve(users, history, model.n_items + 50)
    assert code_sets(codes) == [set(range(model.n_items)) - items for items in seen]
    assert (retriever.retrieve(users, history, 3, no_item)[0] == -1).all()
    codes, _ = retriever.retrieve(users[:0], history.select(users[:0]), 3)
    assert codes.shape[0] == 0


def test_cold_start_items_are_scored_exactly(hybrid):
    retriever, users = TwoStageRetriever(hybrid), torch.arange(5)
    history = hybrid.train_history.select(users)
    is_cold = torch.arange(len(hybrid.all_items)) >= hybrid.n_items
    codes, _ = retriever.retrieve(users, history, 2, is_cold)
    assert (codes >= hybrid.n_items).all()
    all_items = torch.ones(len(hybrid.all_items), dtype=torch.bool)
    codes, _ = retriever.retrieve(users, history, hybrid.n_items, all_items)
    assert torch.equal(codes, retriever.exact(users, history, hybrid.n_items, all_items)[0])
    assert torch.equal(retriever.retrieve(users, history, 6, all_items)[0], codes[:, :6])
    assert (codes >= hybrid.n_items).any()


def test_few_allowed_candidates_are_scored_exactly(synthetic):
    retriever = TwoStageRetriever(synthetic, n_candidates=3, n_ann_candidates=4)
    users = torch.arange(12)
    history = synthetic.train_history.select(users)
    is_allowed = torch.arange(synthetic.n_items) % 10 == 3
    codes, _ = retriever.retrieve(users, history, 6, is_allowed)
    assert torch.equal(codes, retriever.exact(users, history, 6, is_allowed)[0])


def test_estimated_normalizers_change_little(synthetic):
    retriever = TwoStageRetriever(synthetic, n_candidates=40, n_ann_candidates=60, n_sample=80)
    users = sample_users(synthetic)
    history = synthetic.train_history.select(users)
    codes, scores = retriever.retrieve(users, history, 10)
    exact_codes, exact_scores = retriever.exact(users, history, 10)
    assert overlap_at_k(codes, exact_codes).mean() > 0.85
    assert ((scores - exact_scores).abs() / exact_scores).median() < 0.1


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10**6), st.integers(1, 30), st.integers(1, 40))
def test_normalizer_estimate_is_unbiased(seed, n_candidates, n_sample):
    rng = np.random.default_rng(seed)
    values = torch.from_numpy(rng.exponential(size=60).astype(np.float32))
    top = values.topk(n_candidates)[1]
    n_others = torch.tensor([[60.0 - n_candidates]])
    estimates = []
    for _ in range(300):
        sample = torch.from_numpy(rng.permutation(60)[:n_sample])
        is_candidate = torch.isin(sample, top)[None]
        estimate = estimate_normalizer(
            values[top][None], values[sample][None], is_candidate, n_others
        )
        estimates.append(float(estimate))
    total = float(values.sum())
    if n_candidates + n_sample > 60 and n_sample > 30 + n_candidates:
        assert estimates[0] == pytest.approx(total, rel=0.5)
    rest = total - float(values[top].sum())
    p_empty = (1 - n_sample / 60) ** (60 - n_candidates)  # sample without other items: no estimate
    tolerance = 5 * np.std(estimates) / 300**0.5 + (p_empty + 0.02) * rest + 1e-3
    assert abs(np.mean(estimates) - total) < tolerance


def test_recall_counts_ties_and_gaps():
    class FixedIndex:
        def __init__(self, neighbors):
            self.neighbors = neighbors

        def search(self, queries, k):
            return None, np.tile(self.neighbors, (len(queries), 1))

    rows, queries = torch.tensor([[1.0], [3.0], [3.0], [3.0], [0.0]]), torch.ones(20, 1)
    results = ([1, 2], [3, 2], [1, 0], [1, -1], [0, 4])
    recalls = [ann_recall(FixedIndex(result), rows, queries, 2) for result in results]
    assert recalls == [1, 1, 0.5, 0.5, 0]


@pytest.mark.parametrize("n, recall", [(500, 0.999), (30_000, 0.97)])
def test_index_recall(n, recall):
    rng = torch.Generator().manual_seed(0)
    rows = torch.randn(n, 12, generator=rng) * (1 + torch.rand(n, 1, generator=rng))
    queries = torch.randn(40, 12, generator=rng)
    index = build_ann_index(rows, queries[:20])
    found = torch.from_numpy(index.search(queries.numpy(), 10)[1])
    assert overlap_at_k((queries @ rows.T).topk(10, 1)[1], found).mean() > recall


def test_measure_two_stages(synthetic):
    results = measure_two_stages(synthetic, 20, 10)
    assert results["recall"] == {"content towers": 1.0} and results["overlap"] > 0.98
    assert len(results["two_stage"]) == 20 and len(results["all"]) == 10
    assert results["items"] == synthetic.n_items


def test_component_recall_of_a_bad_index(synthetic):
    retriever, users = TwoStageRetriever(synthetic), torch.arange(20)
    dimension = retriever.indexes["content towers"].d
    bad_vectors = torch.zeros(synthetic.n_items, dimension)
    bad_vectors = bad_vectors + torch.arange(synthetic.n_items)[:, None]
    retriever.indexes["content towers"] = build_ann_index(bad_vectors, torch.zeros(0, 1))
    history = synthetic.train_history.select(users)
    assert component_recall(retriever, "content towers", users, history) < 0.5


def test_two_stages_need_an_ensemble(split):
    with pytest.raises(UserError, match="needs the hybrid ensemble, not popularity"):
        TwoStageRetriever(make_recommender("popularity").fit(split))


@settings(deadline=None, max_examples=10)
@given(st.integers(20, 200), st.integers(0, 900), st.integers(0, 99))
def test_synthetic_split_has_all_items(n_items, n_more, seed):
    split = synthetic_split(n_items, n_items + n_more, seed=seed)
    assert split.n_train_items == n_items
    assert not split.train.select("user", "item").is_duplicated().any()
    assert synthetic_split(n_items, n_items + n_more, seed=seed).train.equals(split.train)


# ---------------------------------------------------------------- command


def results_of_export(diff=(0.0, -0.01, 0.01), two_stage=9.0, torch_ms=5.0, excluded=("towers",)):
    "Return results as in export.json."
    value, lo, hi = diff
    whole = {"model": "whole", "value": 0.218, "lo": 0.2, "hi": 0.235, "n": 823}
    whole |= {"diff": None, "diff_lo": None, "diff_hi": None}
    files = [whole | {"model": f, "diff": value, "diff_lo": lo, "diff_hi": hi} for f in ONNX_FILES]
    return {
        "files": {"model.onnx": 5_398_208, "model.int8.onnx": 2_267_885},
        "fidelity": {"overlap": 0.998},
        "excluded": list(excluded),
        "speeds": {"PyTorch": [torch_ms] * 3, "ONNX Runtime, int8": [0.8] * 3},
        "metrics": [whole, *files],
        "two_stage": {"items": 550, "two_stage": [two_stage], "all": [4.0], "overlap": 0.98},
    }


def test_in_short_follows_the_results():
    same = results_of_export()
    better = results_of_export((0.01, 0.005, 0.02), two_stage=1.0, excluded=())
    worse = results_of_export((-0.01, -0.02, -0.005), torch_ms=0.5, excluded=("towers", "bpr"))
    nobody = same | {"metrics": []}
    texts = [" ".join(export_in_short(r)) for r in (same, better, worse, nobody)]
    assert "no significant difference" in texts[0] and "wait with two stages" in texts[0]
    assert "so use the small file" in texts[1] and "4.0 times as quick" in texts[1]
    assert "significantly worse" in texts[2] and "not quicker" in texts[2]
    assert "towers and bpr, which need more" in texts[2] and "It leaves out" not in texts[1]
    assert "not known" in texts[3]
    assert not any(re.search(r"nan|None|\(\)|\[\]|  ", text) for text in texts)
    captions = [describe_export(r["metrics"], 50) for r in (same, better, worse)]
    assert "no difference is significant" in captions[0]
    assert "significantly better" in captions[1] and "significantly worse" in captions[2]


def test_command_export(hybrid, split, tmp_path, capsys):
    from widedeep_nb.lib.cli import main
    from widedeep_nb.lib.runs import Run

    run = Run(tmp_path / "run")
    hybrid.save(run.model_folder("hybrid"))
    make_recommender("mean").fit(split).save(run.model_folder("mean"))
    run.write("items.parquet", split.items)
    main(["export", str(run.folder)])
    files = {path.name for path in (run.folder / "export").iterdir()}
    assert files == {*ONNX_FILES, "items.json", "edge.html"}
    assert "edge.html" in capsys.readouterr().out
    main(["export", str(run.folder), "--out", str(tmp_path / "there"), "--length", "3"])
    assert json.loads((tmp_path / "there/items.json").read_text())["length"] == 3
    (tmp_path / "file").write_text("")
    for options, message in (
        (["--model", "mean"], "needs more than the items of a basket"),
        (["--model", "nope"], "unknown model"),
        (["--length", "0"], "length"),
        (["--out", str(tmp_path / "file")], "is a file"),
    ):
        with pytest.raises(SystemExit) as e:
            main(["export", str(run.folder), *options])
        assert e.value.code == 2 and message in capsys.readouterr().err
