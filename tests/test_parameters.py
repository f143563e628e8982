"Tests of parameters: what a chapter declares, what the start of a run refuses, and what the steps take."

import ast
import importlib
import re
from typing import Optional

import nbformat
import pytest

from widedeep_nb.lib.cli import main
from widedeep_nb.lib.core import UserError
from widedeep_nb.lib.parameters import (
    cast_parameters,
    find_notebooks,
    list_chapters,
    parameter_type,
    read_parameters,
)
from widedeep_nb.lib.runner import make_run_plan
from widedeep_nb.lib.runs import Run, module_path, step_types

CHAPTERS = list_chapters(find_notebooks())
DECLARED = {path.stem: read_parameters(path) for path in CHAPTERS}
PAIRS = [(stem, name) for stem, ps in DECLARED.items() for name in ps if name != "out"]
NUMBERS = ("0", "-1", "1", "0.5", "20", "1000", "1e300", "1000000000", "9" * 40, "nan", "inf")
TEXTS = ("", "user=Kunde", "no such word", "true", "none", "hybrid", "popularity")
MODULES = {path.stem: importlib.import_module(f"widedeep_nb.{path.stem[3:]}") for path in CHAPTERS}


class Touched(Exception):
    "A step has begun to work."


class UntouchableRun:
    "Run that no step may use: its parameters are accepted once it tries to."

    def __getattr__(self, name):
        raise Touched


def code_of(path):
    "Return the syntax trees of a chapter's cells."
    cells = [c for c in nbformat.read(path, 4).cells if c.cell_type == "code"]
    return [ast.parse(re.sub(r"(?m)^[%!].*$", "", c.source)) for c in cells]


def called_steps(path):
    "List the steps that a chapter calls."
    steps = {}
    names = vars(MODULES[path.stem]).copy()
    for tree in code_of(path):
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):
                module = importlib.import_module(node.module)
                names |= {a.asname or a.name: getattr(module, a.name, None) for a in node.names}
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                function = names.get(node.func.id)
                if hasattr(function, "is_done") and hasattr(function, "__wrapped__"):
                    steps[node.func.id] = function
    return list(steps.values())


CALLS = [
    (path.stem, step, name)
    for path in CHAPTERS
    for step in called_steps(path)
    for name in step_types(step.__wrapped__)
    if name in DECLARED[path.stem]
]


def accepted(stem, name, text):
    "Return the value that the start of a run makes of a text; raise UserError where it refuses it."
    return cast_parameters(DECLARED[stem], {name: text})[name]


def is_accepted(stem, name, text):
    try:
        accepted(stem, name, text)
    except UserError:
        return False
    return True


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda p: p.stem)
def test_declarations_are_what_python_makes_of_them(path):
    cells = [c for c in nbformat.read(path, 4).cells if "parameters" in c.metadata.get("tags", [])]
    assert len(cells) == 1
    declared = DECLARED[path.stem]
    types = {p.type: parameter_type(p) for p in declared.values()}
    space = {"Optional": Optional} | types
    exec(cells[0].source, space)
    assert list(declared)[0] == "out"
    assert len(declared) == len(ast.parse(cells[0].source).body) == len(space["__annotations__"])
    for name, p in declared.items():
        assert space[name] == p.default and p.comment
        assert space["__annotations__"][name] == types[p.type]


def test_a_limit_is_stated_by_a_type_and_not_by_a_comment():
    for parameters in DECLARED.values():
        for p in parameters.values():
            assert not re.search(r"at least \d", p.comment), p
            assert p.type != "int", f"{p} has no limits"


@pytest.mark.parametrize("stem, name", PAIRS, ids=lambda x: x)
def test_defaults_are_accepted_and_nonsense_is_not(stem, name):
    p = DECLARED[stem][name]
    assert accepted(stem, name, p.default) == p.default
    if isinstance(p.default, str):
        return
    refused = [t for t in (*NUMBERS, *TEXTS) if not is_accepted(stem, name, t)]
    assert {"no such word", "nan", "inf"} <= set(refused)
    assert isinstance(p.default, bool) or "9" * 40 in refused or name == "relevant"


def test_every_chapter_gives_its_parameters_to_steps():
    given = {(stem, name) for stem, _, name in CALLS}
    assert given == set(PAIRS)


@pytest.mark.parametrize(
    "stem, step, name", CALLS, ids=lambda x: x if isinstance(x, str) else x.__name__
)
def test_a_step_refuses_nothing_that_the_start_accepts(stem, step, name):
    "Check that both have one type, and that the body of the step has no check of its own."
    declared = DECLARED[stem][name]
    assert step_types(step.__wrapped__)[name] == parameter_type(declared)
    texts = (declared.default, *NUMBERS, *TEXTS)
    values = [accepted(stem, name, t) for t in texts if is_accepted(stem, name, t)]
    assert values
    for value in values:
        with pytest.raises(Touched):
            step.__wrapped__(UntouchableRun(), **{name: value})


def raising_conditions():
    "Yield each condition on one parameter of a chapter that makes a function of the package refuse."
    names = {name for _, name in PAIRS}
    for path in sorted(module_path("lib.core").parents[1].rglob("[!_]*.py")):
        for function in ast.walk(ast.parse(path.read_text(encoding="utf8"))):
            if not isinstance(function, ast.FunctionDef):
                continue
            own = {a.arg for a in function.args.args} & names
            for node in ast.walk(function):
                if isinstance(node, ast.If) and isinstance(node.body[0], ast.Raise):
                    used = {n.id for n in ast.walk(node.test) if isinstance(n, ast.Name)}
                    if len(used) == 1 and used <= own:
                        yield f"{path.stem}.{function.name}", used.pop(), ast.unparse(node.test)


def test_no_deeper_function_refuses_what_the_start_accepts():
    for place, name, condition in raising_conditions():
        for stem, declared in DECLARED.items():
            texts = [t for t in NUMBERS if name in declared and is_accepted(stem, name, t)]
            for text in texts:
                value = accepted(stem, name, text)
                assert not eval(condition, {name: value}), f"{place}: {condition} with {text}"


WRONG = [
    ("bench_rows=2000", "greater than or equal to 10000"),
    ("distributed_rows=10", "0, or at least 1,000"),
    ("hidden_fraction=0", "greater than 0"),
    ("holdout=1", "less than 1"),
    ("rate=0", "greater than 0"),
    ("max_users=-1", "greater than or equal to 0"),
    ("relevant=nan", "finite number"),
    ("output=relu", "'linear' or 'sigmoid'"),
    ("columns=usr=Kunde", "unknown column of a log 'usr'"),
    ("scale=five", "a scale is written as 1-5"),
    ("time_format=fortnights", "time_format is a format such as"),
    ("not_rated=none", "not_rated is one or more numbers"),
    ("events=play=played", "unknown event type 'played'"),
    ("loss=bqr", "unknown loss 'bqr'; known: mse"),
    ("treatment=hybird", "unknown model 'hybird'; known: "),
    ("control=hybrid", "cannot be compared with itself"),
    ("item_vectors=nowhere.npy", "no such file"),
    ("image_dir=nowhere", "no such folder"),
    ("tune=perhaps", "valid boolean"),
    ("n_origins=1", "0, or at least 2"),
    ("max_visitors=5", "greater than or equal to 20"),
]


@pytest.mark.parametrize("pair, said", WRONG, ids=[pair for pair, _ in WRONG])
def test_all_chapters_are_refused_before_anything_is_written(pair, said, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["run", "--out", str(tmp_path / "run"), "--dataset", "demo?ratings=3000", "-p", pair])
    shown = capsys.readouterr()
    assert stopped.value.code == 2 and shown.out == ""
    assert shown.err.count("\n") == 1 and said in shown.err, shown.err
    assert not (tmp_path / "run").exists()


def test_a_parameter_of_another_chapter_is_refused_with_those_there_are(tmp_path, capsys):
    words = ["run", "--out", str(tmp_path / "run"), "--chapters", "05-06", "-p", "trials=1"]
    with pytest.raises(SystemExit):
        main(words)
    said = capsys.readouterr().err
    assert "unknown parameter 'trials'" in said and "epochs: PositiveInt = 30 (chapter 05)" in said
    assert "bench_rows" not in said and not (tmp_path / "run").exists()


def test_a_relative_path_is_that_of_the_command_line(tmp_path, monkeypatch):
    (tmp_path / "pictures").mkdir()
    monkeypatch.chdir(tmp_path)
    plan = make_run_plan(tmp_path / "run", overrides={"image_dir": "pictures"})
    assert plan.values["10_content"] == {"image_dir": str(tmp_path / "pictures")}
    assert plan.settings["parameters"] == plan.values["10_content"]


def test_a_run_made_in_python_is_checked_by_its_steps(tmp_path):
    run = Run(tmp_path / "run", dataset="demo?ratings=2000", parameters={"epochs": 0})
    with pytest.raises(UserError, match="epochs=0 is not valid"):
        MODULES["05_training"].train(run)
    assert run.manifest["steps"] == {}
