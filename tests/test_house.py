"Rules of the repository: modules in step with notebooks, one order of imports, clean files."

import ast
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CHAPTERS = sorted((ROOT / "nbs").glob("[0-9][0-9]_*.ipynb"))
LIBRARY = sorted((ROOT / "nbs/lib").glob("*.ipynb"))
NOTEBOOKS = [*CHAPTERS, *LIBRARY]
names = [p.stem for p in NOTEBOOKS]


def module_file(path):
    "Return the module that a notebook is exported to."
    folder = ROOT / "widedeep_nb" / ("lib" if path in LIBRARY else "")
    return folder / f"{path.stem if path in LIBRARY else path.stem[3:]}.py"


def cells(path):
    return json.loads(path.read_text())["cells"]


def code(path):
    return [c for c in cells(path) if c["cell_type"] == "code"]


def source(cell):
    return "".join(cell["source"])


def exported(path):
    return [source(c) for c in code(path) if re.search(r"^#\|\s*export", source(c), re.M)]


def tool(name, *args, cwd):
    done = subprocess.run(
        [Path(sys.executable).with_name(name), *args], cwd=cwd, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def copy_of_sources(to: Path):
    for name in ("settings.ini", "pyproject.toml"):
        shutil.copy(ROOT / name, to)
    shutil.copytree(ROOT / "nbs", to / "nbs", ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    (to / "widedeep_nb").mkdir()
    shutil.copy(ROOT / "widedeep_nb/__init__.py", to / "widedeep_nb")


def test_modules_in_step(tmp_path):
    copy_of_sources(tmp_path)
    tool("nbdev_export", cwd=tmp_path)
    made, there = [
        {str(p.relative_to(folder)): p.read_text() for p in (folder / "widedeep_nb").rglob("*.py")}
        for folder in (tmp_path, ROOT)
    ]
    assert sorted(made) == sorted(there), (
        "a module without a chapter, or a chapter without its module: run nbdev_export"
    )
    assert [n for n in made if made[n] != there[n]] == [], (
        "modules differ from their notebooks: run nbdev_export"
    )


def test_notebooks_clean(tmp_path):
    copy_of_sources(tmp_path)
    tool("nbdev_clean", cwd=tmp_path)
    assert [
        p.name
        for p in (ROOT / "nbs").rglob("*.ipynb")
        if ".ipynb_checkpoints" not in p.parts
        and p.read_text() != (tmp_path / p.relative_to(ROOT)).read_text()
    ] == [], "run nbdev_clean"


def imported_modules(path):
    "Return the modules of this package that a module imports, also inside functions."
    package = ("widedeep_nb.lib" if path.parent.name == "lib" else "widedeep_nb").split(".")
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        if isinstance(node, ast.ImportFrom):
            parents = package[: len(package) + 1 - node.level] if node.level else []
            module = ".".join([*parents, *filter(None, [node.module])])
            found |= {module, *(f"{module}.{a.name}" for a in node.names)}
    known = {file: ".".join(file.relative_to(ROOT).with_suffix("").parts) for file in MODULES}
    return {file for file, name in known.items() if name in found}


MODULES = {module_file(p): p for p in NOTEBOOKS if module_file(p).exists()}


def chapter_before(path):
    "Return the number of the chapter after which a notebook stands; a chapter's own number."
    if path in CHAPTERS:
        return int(path.stem[:2])
    text = "".join(source(c) for c in cells(path)[:1])
    place = re.search(
        r"A library notebook; it stands (?:after chapter (\d\d)|before chapter 01)\.", text
    )
    assert place, f"{path.stem} does not say after which chapter it stands"
    return int(place[1] or 0)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=names)
def test_imports_only_what_stands_before(path):
    "Check that a notebook imports chapters with a lower number, and library notebooks that stand no later."
    own = chapter_before(path)
    if not module_file(path).exists():
        return  # nothing is exported
    for module in imported_modules(module_file(path)):
        other = MODULES[module]
        place = chapter_before(other)
        if other in CHAPTERS:
            assert place < own or (place == own and path in LIBRARY), (
                f"{path.stem} imports {other.stem}"
            )
        else:
            assert place < own or (place == own and path in LIBRARY), (
                f"{path.stem} imports {other.stem}"
            )


def test_no_imports_in_a_circle():
    "Check that the library notebooks have one order."
    todo = {path: imported_modules(path) for path in MODULES}
    while todo:
        free = [path for path, needs in todo.items() if not needs & set(todo)]
        assert free, f"imports in a circle: {sorted(p.stem for p in todo)}"
        for path in free:
            del todo[path]


def check_chapter_header(path, first, all_cells):
    "Check the badge and the parameters of a chapter."
    badge = re.search(r"colab\.research\.google\.com/github/[^/]+/[^/]+/blob/main/([^)]+)\)", first)
    assert badge and badge[1] == f"nbs/{path.name}" and (ROOT / badge[1]).exists()
    assert len([c for c in all_cells if "parameters" in c["metadata"].get("tags", [])]) == 1


@pytest.mark.parametrize("path", NOTEBOOKS, ids=names)
def test_notebook_form(path):
    all_cells = cells(path)
    first = next(source(c) for c in all_cells if c["cell_type"] == "markdown")
    assert re.match(r"# .+\n\n> .+", first), (
        "a chapter opens with a title and one line that says what it is for"
    )
    if path in CHAPTERS:
        check_chapter_header(path, first, all_cells)
    for text in exported(path):
        lines = [x for x in text.splitlines() if x.strip() and not x.lstrip().startswith("#")]
        assert len(lines) <= 60, f"an exported cell of {len(lines)} lines: {lines[0]}"
        body = ast.parse(text).body
        imports = [node for node in body if isinstance(node, (ast.Import, ast.ImportFrom))]
        assert len(imports) in (0, len(body)), f"imports mixed with other code: {lines[0]}"


SCOPES = (ast.FunctionDef, ast.ClassDef, ast.Lambda)
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


def assigned_names(node):
    "Return the names that a statement assigns at module level."
    if isinstance(node, SCOPES + COMPREHENSIONS):
        return set()
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
        return {node.id}
    return set().union(*map(assigned_names, ast.iter_child_nodes(node)))


def imported_and_defined_names(node):
    "Return the names that an import, a function or a class introduces."
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        return {(alias.asname or alias.name).split(".")[0] for alias in node.names}
    return {node.name} if isinstance(node, (ast.FunctionDef, ast.ClassDef)) else set()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=names)
def test_no_cell_takes_a_name_that_a_function_needs(path):
    "Check that no cell assigns a name that exported functions of the notebook need."
    needed, assigned = set(), set()
    for cell in code(path):
        body = ast.parse(re.sub(r"(?m)^[%!].*$", "", source(cell))).body
        if source(cell).startswith("#| export"):
            needed |= set().union(*map(imported_and_defined_names, body))
        else:
            assigned |= set().union(*map(assigned_names, body))
    assert not needed & assigned


def is_command(node):
    "Return True for a command of the command line: its options document its arguments."
    return any("command" in ast.unparse(d) for d in node.decorator_list)


def undocumented_arguments(node, lines):
    "Return the arguments without a comment on one of their lines; short signatures need none."
    arguments = node.args.args + node.args.kwonlyargs
    starts = [a.lineno for a in arguments[1:]] + [node.body[0].lineno]
    if len(arguments) <= 1 and all(a.lineno == node.lineno for a in arguments):
        return []
    missing = []
    for argument, next_start in zip(arguments, starts):
        own_lines = lines[argument.lineno - 1 : max(argument.lineno, next_start - 1)]
        if argument.arg != "self" and not any("#" in line for line in own_lines):
            missing.append(argument)
    return missing


@pytest.mark.parametrize("path", NOTEBOOKS, ids=names)
def test_public_functions_are_documented(path):
    "Check for a docstring, and a comment for each argument."
    if not module_file(path).exists():
        return  # nothing is exported
    text = module_file(path).read_text()
    lines = text.splitlines()
    for node in ast.parse(text).body:
        is_public = isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name[0] != "_"
        if not is_public or is_command(node):
            continue
        assert ast.get_docstring(node), f"{node.name} has no docstring"
        if isinstance(node, ast.FunctionDef):
            undocumented = [a.arg for a in undocumented_arguments(node, lines)]
            assert not undocumented, f"{node.name}: no comment for {undocumented}"


def test_no_path_of_this_machine():
    files = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    ).stdout.split()
    texts = {
        f: (ROOT / f).read_text()
        for f in files
        if f.endswith((".ipynb", ".py", ".md", ".json", ".yml", ".toml", ".ini", ".html"))
    }
    home = re.compile(r"/(?:home|root|Users)/\w+/")
    assert [f for f, t in texts.items() if home.search(t)] == []


def test_no_row_of_the_real_log_is_in_the_notebooks(shared):
    "Check that no id of the real log is in a notebook; they are found by their form."
    import polars as pl

    log = pl.read_csv(shared / "ciao/ratings.csv.gz", has_header=False, infer_schema=False).select(
        pl.nth(0, 1)
    )
    form = re.compile(r"\b(U\d{5}|P\d{6})\b")
    assert log.select(pl.all_horizontal(pl.all().str.contains(r"^(U\d{5}|P\d{6})$")).all()).item()
    assert {
        p.name: found
        for p in (ROOT / "nbs").rglob("*.ipynb")
        if (found := form.findall(p.read_text())[:3])
    } == {}


# --- rules between the two layers


def exported_module(path):
    "Parse a module of the package."
    return ast.parse(path.read_text())


def strings(tree):
    "Return the string constants of a module, without docstrings."
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, (ast.Module, ast.FunctionDef, ast.ClassDef))
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            if id(node) not in docstrings:
                yield node


TABLES = {"RECOMMENDERS", "LOSSES", "DATASETS"}  # names that are imported when they are asked for
COMMANDS = {"widedeep_nb.lib.cli"}  # the command line, found by its name


def names_in_tables(tree):
    "Return the nodes inside the tables of registered names."
    found = set()
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if any(isinstance(t, ast.Name) and t.id in TABLES for t in targets):
            found |= {id(n) for n in ast.walk(node)}
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.stem)
def test_names_in_strings_stand_before(path):
    "Check modules that a string names, as for a subprocess, like imports; tables of names are exempt."
    tree = exported_module(path)
    exempt = names_in_tables(tree)
    own = chapter_before(MODULES[path])
    known = {".".join(f.relative_to(ROOT).with_suffix("").parts): f for f in MODULES}
    for node in strings(tree):
        if id(node) in exempt:
            continue
        for name in re.findall(r"widedeep_nb(?:\.[a-z_]+)+", node.value):
            module = next((m for m in (name, name.rpartition(".")[0]) if m in known), None)
            if module is None or module in COMMANDS or known[module] == path:
                continue
            assert chapter_before(MODULES[known[module]]) <= own, f"{path.stem} names {module}"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.stem)
def test_plotting_is_imported_in_one_place(path):
    "Check that only lib.display knows matplotlib and seaborn, and loads them on first use."
    imported = [
        module
        for node in ast.walk(exported_module(path))
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for module in (
            [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else [a.name for a in node.names]
        )
    ]
    assert [m for m in imported if m.split(".")[0] in ("matplotlib", "seaborn")] == []


ELEMENTS = re.compile(
    r"<(?:!doctype|a|article|body|button|code|details|dd|div|dl|dt|figure|figcaption|form|h[1-6]|head|header"
    r"|html|img|input|li|main|nav|ol|p|pre|script|section|span|strong|style|summary|table|tbody|td|th|thead|tr|ul)"
    r"(?:\s[^<>]*)?>",
    re.I,
)


def in_patterns(tree):
    "Return the nodes inside arguments of `re` functions: a pattern is no page."
    calls = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and isinstance(node.func.value, ast.Name)
        and node.func.value.id == "re"
    ]
    return {id(n) for call in calls for n in ast.walk(call)}


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.stem)
def test_no_html_in_python(path):
    "Check that pages are files in static/, not Python strings."
    tree = exported_module(path)
    patterns = in_patterns(tree)
    found = [n.value for n in strings(tree) if id(n) not in patterns and ELEMENTS.search(n.value)]
    css = [n.value for n in strings(tree) if re.search(r"[.#]?[\w-]+\s*\{[^{}]*:[^{}]*;", n.value)]
    assert found == [] and css == []


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda p: p.stem)
def test_chapters_have_the_parts_that_readers_expect(path):
    "Check the question, a tiny example by hand before the first definition, and the summary at the end."
    all_cells = cells(path)
    texts = [source(c) for c in all_cells if c["cell_type"] == "markdown"]
    assert re.search(r"^> .*\?$", texts[0], re.M), "the line under the title is a question"
    by_hand = next(i for i, c in enumerate(all_cells) if source(c).startswith("## By hand"))
    defined = [
        i
        for i, c in enumerate(all_cells)
        if c["cell_type"] == "code"
        and re.search(r"^#\| export", source(c), re.M)
        and re.search(r"^(def|class) ", source(c), re.M)
    ]
    assert not defined or by_hand < defined[0]
    headings = [h for t in texts for h in re.findall(r"^## (.+)$", t, re.M)]
    assert headings[-1] == "In short" and headings.count("In short") == 1
    assert any(source(c).startswith("## In short") for c in all_cells)
    assert any("in_short(" in source(c) for c in all_cells if c["cell_type"] == "code")
