"The page about the architecture and its drawing agree with the code."

import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf8")
DRAWING = ROOT / "docs/architecture.svg"
TOOL = ROOT / "tools/draw_architecture.py"


def test_the_drawing_is_up_to_date():
    done = subprocess.run([sys.executable, TOOL, "--check"])
    assert done.returncode == 0, "run python tools/draw_architecture.py"


def test_the_drawing_is_small_and_for_day_and_night():
    text = DRAWING.read_text(encoding="utf8")
    boxes = [e for e in ElementTree.fromstring(text).iter() if e.tag.endswith("}rect")]
    assert len(boxes) <= 20  # groups of modules, not all modules
    assert "prefers-color-scheme: dark" in text and "<desc" in text
    for line in re.findall(r'<text class="names"[^>]*>([^<]+)', text):
        assert len(line) <= 52  # as wide as a box


def test_no_line_of_the_drawing_goes_down():
    text = DRAWING.read_text(encoding="utf8")
    lines = re.findall(r'd="M\d+,(\d+) C.* \d+,(\d+)"', text)
    assert len(lines) > 10 and all(int(end) <= int(start) for start, end in lines)


def test_every_module_is_in_one_group():
    sys.path.insert(0, str(TOOL.parent))
    try:
        import draw_architecture as tool
    finally:
        sys.path.pop(0)
    known = tool.modules()
    exported = {
        ".".join(p.relative_to(ROOT / "widedeep_nb").with_suffix("").parts)
        for p in (ROOT / "widedeep_nb").rglob("[!_]*.py")
    }
    assert set(known) == exported
    assert tool.group_of(0, True) == 0 and tool.group_of(20, True) == 5
    assert tool.wrap(["a"]) == ["a"]
    assert tool.wrap(["x" * 40] * 9)[-1].endswith("· 6 more")


def test_the_page_is_one_page_and_names_what_exists():
    assert len(PAGE.split()) < 1000
    modules = set(re.findall(r"`(lib\.\w+)`", PAGE)) - {"lib.name"}
    assert modules
    for module in modules:
        assert (ROOT / "nbs" / f"{module.replace('.', '/')}.ipynb").exists(), module
    for link in re.findall(r"\]\((?!http)([^)#]+)", PAGE):
        assert (ROOT / link).exists(), link
