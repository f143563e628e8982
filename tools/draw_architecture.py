"Draw docs/architecture.svg from the imports of the modules: groups of chapters, groups of library notebooks."

import ast
import json
import re
import sys
from collections import Counter
from pathlib import Path

from jinja2 import Environment, FileSystemLoader

ROOT = Path(__file__).resolve().parents[1]
# last chapter of the group, name of the chapters, name of the library notebooks that stand there
GROUPS = [
    (3, "Data", "Foundations, reading and features"),
    (6, "Model", "Training and measuring"),
    (14, "Better lists", "Models and comparison"),
    (17, "In the shop", "Service"),
    (20, "After launch", "Experiments and monitoring"),
    (21, "Scale", "Large logs and benchmarks"),
    (23, "Appendices", "Running and publishing"),
]
ROW_HEIGHT, TOP, LEFT, RIGHT, WIDTH = 92, 76, 24, 500, 336
MAX_NAMES = 3  # lines of names in a box
LINE_LENGTH = 52


def first_text(path: Path) -> str:
    "Return the first text cell of a notebook."
    cells = json.loads(path.read_text(encoding="utf8"))["cells"]
    return next("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")


def group_of(
    place: int,  # number of a chapter; for a library notebook, the chapter after which it stands
    is_library: bool,
) -> int:
    "Return the number of the group in which a notebook stands."
    if is_library:
        place += place < 23  # what stands after chapter 20 helps chapter 21
    return next(i for i, (last, *_) in enumerate(GROUPS) if place <= last)


def modules() -> dict:  # name of the module -> (is in the library, group)
    "List the modules that the notebooks are exported to."
    found = {}
    for path in sorted((ROOT / "nbs").glob("[0-9][0-9]_*.ipynb")):
        if (ROOT / f"widedeep_nb/{path.stem[3:]}.py").exists():
            found[path.stem[3:]] = (False, group_of(int(path.stem[:2]), False))
    for path in sorted((ROOT / "nbs/lib").glob("*.ipynb")):
        place = re.search(r"it stands after chapter (\d\d)", first_text(path))
        found[f"lib.{path.stem}"] = (True, group_of(int(place[1]) if place else 0, True))
    return found


def imports(name: str, known: dict) -> set:
    "Return the modules of this package that a module imports, also inside functions."
    path = ROOT / "widedeep_nb" / f"{name.replace('.', '/')}.py"
    package = ["widedeep_nb", *name.split(".")[:-1]]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = package[: len(package) + 1 - node.level] if node.level else []
            module = ".".join([*parents, *filter(None, [node.module])])
            found |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    return {other for other in known if f"widedeep_nb.{other}" in found and other != name}


def wrap(names: list) -> list:  # lines of text
    "Join names to at most MAX_NAMES lines; those that do not fit are counted."
    lines = [""]
    for shown, name in enumerate(names):
        text = f"{lines[-1]} · {name}" if lines[-1] else name
        room = LINE_LENGTH - (len(" · 99 more") if len(lines) == MAX_NAMES else 0)
        if len(text) <= room:
            lines[-1] = text
        elif len(lines) < MAX_NAMES:
            lines.append(name)
        else:
            lines[-1] += f" · {len(names) - shown} more"
            break
    return lines


def box(title: str, names: list, x: int, row: int, kind: str) -> dict:
    "Return the box of a group."
    return dict(title=title, lines=wrap(names), x=x, y=TOP + row * ROW_HEIGHT, kind=kind)


def draw() -> str:  # text of the picture
    "Draw the groups, and an arrow from each group of chapters to the library groups that it uses."
    known = modules()
    boxes, arrows = [], []
    for row, (_, chapters, library) in enumerate(GROUPS):
        for is_library, title, x in ((False, chapters, LEFT), (True, library, RIGHT)):
            names = [name for name, home in known.items() if home == (is_library, row)]
            names = [name.removeprefix("lib.") for name in names]
            boxes.append(box(title, names, x, row, "library" if is_library else "chapter"))
    counts = Counter()
    for name, (is_library, row) in known.items():
        for other in imports(name, known):
            other_is_library, other_row = known[other]
            if other_is_library and not is_library:
                counts[row, other_row] += 1
    for (row, other_row), n in sorted(counts.items()):
        start, end = [TOP + r * ROW_HEIGHT + 38 for r in (row, other_row)]
        label = f"{GROUPS[row][1]} uses {GROUPS[other_row][2]}: {n} imports"
        arrows.append(dict(y=start, to=end, width=round(0.8 + n**0.5 / 1.6, 1), label=label))
    folder = Environment(loader=FileSystemLoader(Path(__file__).parent), trim_blocks=True)
    n_library = sum(is_library for is_library, _ in known.values())
    return folder.get_template("architecture.svg.j2").render(
        boxes=boxes,
        arrows=arrows,
        left=LEFT,
        right=RIGHT,
        box_width=WIDTH,
        width=RIGHT + WIDTH + LEFT,
        height=TOP + len(GROUPS) * ROW_HEIGHT + 12,
        n_chapters=len(list((ROOT / "nbs").glob("[0-9][0-9]_*.ipynb"))),
        n_library=n_library,
    )


if __name__ == "__main__":
    target = ROOT / "docs/architecture.svg"
    text = draw()
    if "--check" in sys.argv:
        sys.exit(0 if target.exists() and target.read_text(encoding="utf8") == text else 1)
    target.write_text(text, encoding="utf8")
