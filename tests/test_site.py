"Tests of the site: reachable pages, targets of links and references, captions and text alternatives."

import ast
import json
import re
import shutil
from pathlib import Path
from urllib.parse import urlsplit

import nbformat
import pytest
import yaml
from bs4 import BeautifulSoup

from widedeep_nb.lib.display import COLORS
from widedeep_nb.lib.publish import static_pages
from widedeep_nb.lib.report_page import DARK_COLORS, page_css, render_chapter
from widedeep_nb.lib.runner import execute_notebook
from widedeep_nb.lib.site import site_filter

ROOT = Path(__file__).parents[1]
SITE = yaml.safe_load((ROOT / "_quarto.yml").read_text())
NOTEBOOKS = [ROOT / "index.ipynb", *sorted((ROOT / "nbs").glob("*.ipynb"))]
LIBRARY = sorted((ROOT / "nbs/lib").glob("*.ipynb"))
RESULT_PAGES = static_pages(ROOT / "nbs")
PAGES = [*NOTEBOOKS, *sorted((ROOT / "nbs").glob("*.qmd"))]
TEXTS = [ROOT / "README.md", *PAGES]
HOSTS = {
    "jmlr.org",
    "arxiv.org",
    "proceedings.neurips.cc",
    "proceedings.mlr.press",
    "papers.nips.cc",
    "colab.research.google.com",
    "doi.org",
    "github.com",
    "papermill.readthedocs.io",
    "quarto.org",
    "sifter.org",
    "snap.stanford.edu",
    "mcauleylab.ucsd.edu",
    "datarepo.eng.ucsd.edu",
    "narwhals-dev.github.io",
    "onnx.ai",
    "widedeep-nb.github.io",
    "www.usenix.org",
}


def name(p):
    return p.relative_to(ROOT).as_posix()


def each(paths):
    return pytest.mark.parametrize("path", paths, ids=name)


def outputs(path):
    return (
        [o for c in nbformat.read(path, 4).cells for o in c.get("outputs", [])]
        if path.suffix == ".ipynb"
        else []
    )


def filtered(path):
    "Return a notebook as Quarto gets it."
    return site_filter(json.loads(path.read_text(encoding="utf8")), path.parent)


def markdown(path):
    "Return the prose of a page and of its outputs, without code."
    if path.suffix != ".ipynb":
        text = path.read_text()
    else:
        text = "\n\n".join(
            [c.source for c in nbformat.read(path, 4).cells if c.cell_type == "markdown"]
            + [
                o.data["text/markdown"]
                for o in outputs(path)
                if "text/markdown" in o.get("data", {})
            ]
        )
    return re.sub(
        r"^---\n.*?\n---\n|^```.*?^```|<!--.*?-->|`[^`\n]*`|\$\$.*?\$\$|\$[^$\n]+\$",
        "",
        text,
        flags=re.S | re.M,
    )


def anchors(path):
    "Return the anchors of the headings of a page."
    headings = re.findall(
        r"^#+ (.+)$",
        path.read_text()
        if path.suffix != ".ipynb"
        else "\n".join(c.source for c in nbformat.read(path, 4).cells if c.cell_type == "markdown"),
        re.M,
    )
    labels = {
        o.metadata.widedeep.label for o in outputs(path) if "widedeep" in o.get("metadata", {})
    }
    ids = {re.sub(r"\s+", "-", re.sub(r"[^\w\s.-]", "", h).strip().lower()) for h in headings}
    return ids | labels


def links(text):
    return re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r"""(?:src|href)=["']([^"']+)""", text)


# --- every page is there and can be reached


def listed(contents):
    if isinstance(contents, str):  # a pattern
        yield from (name(p) for p in ROOT.glob(contents))
        return
    for entry in contents:
        if isinstance(entry, str):
            yield entry
        elif "href" in entry:
            yield entry["href"]
        else:
            yield from listed(entry["contents"])


def test_the_sidebar_lists_every_page_once():
    pages = [p for p in listed(SITE["website"]["sidebar"]["contents"]) if not p.endswith(".html")]
    assert sorted(pages) == sorted(map(name, [*PAGES, *LIBRARY]))


def test_all_pages_are_rendered():
    assert {p for pattern in SITE["project"]["render"] for p in ROOT.glob(pattern)} == {
        *PAGES,
        *LIBRARY,
    }
    assert (
        SITE["execute"] == {"enabled": False}
        and set(SITE["format"]["html"]["theme"]) == {"light", "dark"}
        and SITE["format"]["html"]["html-math-method"] == "mathml"
    )


@each(PAGES)
def test_each_page_says_what_it_is_for(path):
    text = (
        path.read_text()
        if path.suffix == ".qmd"
        else next(c.source for c in nbformat.read(path, 4).cells if c.cell_type == "markdown")
    )
    assert re.match(r"(---\ntitle: .+\n---|# .+)\n\n> .+", text)


def test_the_workflow_publishes_what_make_site_renders():
    flow = yaml.safe_load((ROOT / ".github/workflows/publish.yml").read_text())
    steps = flow["jobs"]["site"]["steps"]
    used = [s["uses"].split("@")[0] for s in steps if "uses" in s]
    order = [
        "actions/checkout",
        "actions/setup-python",
        "quarto-dev/quarto-actions/setup",
        "actions/configure-pages",
        "actions/upload-pages-artifact",
        "actions/deploy-pages",
    ]
    assert used == order and all(re.search(r"@v\d+$", s["uses"]) for s in steps if "uses" in s)
    assert (
        next(s for s in steps if "upload" in s.get("uses", ""))["with"]["path"]
        == SITE["project"]["output-dir"]
    )
    assert flow["permissions"] == {"contents": "read", "pages": "write", "id-token": "write"}
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
    runs = [
        s["run"]
        for f in (ROOT / ".github/workflows").glob("*.yml")
        for job in yaml.safe_load(f.read_text())["jobs"].values()
        for s in job["steps"]
        if "run" in s
    ]
    assert "make site" in runs and all(
        r.split()[0] == "make" and r.split()[1] in targets for r in runs
    )


# --- links


@each(TEXTS)
def test_links_within_have_a_target(path):
    for link in [x for x in links(markdown(path)) if not urlsplit(x).scheme]:
        place, _, anchor = link.partition("#")
        target = (path.parent / place).resolve() if place else path
        assert target.exists(), f"{name(path)} links to {link}"
        assert not anchor or anchor in anchors(target), (
            f"{name(path)} links to {link}: no such heading"
        )


@each(TEXTS)
def test_links_without_are_https_to_known_hosts(path):
    for link in [x for x in links(markdown(path)) if urlsplit(x).scheme]:
        parts = urlsplit(link)
        assert (
            parts.scheme == "https"
            and parts.hostname in HOSTS
            and re.fullmatch(r"[\w./:%~?=&#()+-]+", link)
        ), f"{name(path)} links to {link}"
        inside = re.search(r"/widedeep-nb/widedeep_nb/blob/main/(.+)", link)
        assert not inside or (ROOT / inside[1]).exists(), f"{name(path)} links to {link}"


def test_links_are_found():
    "Check that links and anchors are found."
    assert (
        "nbs/results.ipynb" in links(markdown(ROOT / "README.md"))
        and sum(len(links(markdown(p))) for p in TEXTS) > 40
    )
    assert "rating-prediction-and-ranking" in anchors(ROOT / "nbs/discussion.ipynb")


# --- the bibliography


def entries():
    found = re.findall(
        r"^@(\w+)\{([\w-]+),\n(.*?)^\}", (ROOT / SITE["bibliography"]).read_text(), re.S | re.M
    )
    return {
        key: {"type": kind} | dict(re.findall(r"^\s*(\w+)\s*=\s*\{(.*)\},?$", body, re.M))
        for kind, key, body in found
    }


CITED = re.compile(r"(?<![\w.])-?@([a-z]+\d{4}\w*)")


def test_every_citation_has_its_entry_and_every_entry_is_cited():
    cited = {key: name(p) for p in PAGES for key in CITED.findall(markdown(p))}
    assert {k: p for k, p in cited.items() if k not in entries()} == {} and set(entries()) - set(
        cited
    ) == set()
    strange = [
        (name(p), at)
        for p in PAGES
        for at in re.findall(r"(?<![\w.])@[\w-]+", markdown(p))
        if not CITED.fullmatch(at) and not at.startswith(("@fig-", "@tbl-"))
    ]
    assert strange == []


@pytest.mark.parametrize("key", entries())
def test_entries_are_whole(key):
    entry = entries()[key]
    needed = {
        "article": ["author", "journal", "volume", "pages"],
        "inproceedings": ["author", "booktitle"],
        "book": ["editor", "publisher"],
        "misc": ["author", "howpublished", "url"],
    }[entry["type"]]
    assert all(entry.get(field) for field in ["title", "year", *needed])
    people = re.sub(r"\\\W|[{}]", "", entry.get("author") or entry["editor"])  # without accents
    assert key.startswith(
        tuple(people.split(",")[0].lower().split())
    )  # a surname of two words gives one of them
    assert re.search(r"\d{4}", key)[0] == entry["year"] and 1900 < int(entry["year"]) < 2030
    if "doi" in entry:
        assert re.fullmatch(r"10\.\d{4,9}/[\w.()/-]+", entry["doi"])
    if "url" in entry:
        assert urlsplit(entry["url"]).scheme == "https" and urlsplit(entry["url"]).hostname in HOSTS
    assert "doi" in entry or "url" in entry or "pages" in entry
    assert (ROOT / SITE["bibliography"]).read_text().count(f"{{{key},") == 1


# --- figures, tables and references to them

LABELLED = re.compile(
    r"^::: \{#((?:fig|tbl)-[a-z0-9-]+)\}\n\n````\{=html\}\n(.*?)\n````\n\n([^\n]+)\n\n:::\n$", re.S
)


@each(NOTEBOOKS)
def test_labelled_outputs_become_divs_that_quarto_can_number(path):
    labels = []
    for cell in filtered(path)["cells"]:
        for output in [o for o in cell.get("outputs", []) if "widedeep" in o.get("metadata", {})]:
            text = output["data"]["text/markdown"]
            found = LABELLED.match(text)
            assert found and list(output["data"]) == ["text/markdown"], text[:200]
            label, content, caption = found.groups()
            labels.append(label)
            assert (
                label == output["metadata"]["widedeep"]["label"]
                and ":::" not in content
                and "````" not in content
            )
            assert f'id="{label}"' not in content and not re.search(
                r"</?(figure|figcaption|caption)\b", content
            )
            if label.startswith("tbl-"):
                assert content.count("<table") == content.count("</table>") == 1
            assert re.sub(r"\\(.)", r"\1", caption) == output["metadata"]["widedeep"]["caption"]
    assert len(labels) == len(set(labels)), (
        "a website's references hold within a page, and need each label once there"
    )


@each(PAGES)
def test_references_have_their_figure_on_the_page(path):
    labels = {
        o.metadata.widedeep.label for o in outputs(path) if "widedeep" in o.get("metadata", {})
    }
    assert set(re.findall(r"@((?:fig|tbl)-[\w-]*\w)", markdown(path))) - labels == set()


@each(NOTEBOOKS)
def test_every_figure_has_a_caption_and_a_text_alternative(path):
    for o in outputs(path):
        about, page = o.get("metadata", {}).get("widedeep"), o.get("data", {}).get("text/html", "")
        assert "image/png" not in o.get("data", {}), "a bare picture: use show_figure"
        soup = BeautifulSoup(page, "html.parser")
        for svg in soup.find_all("svg"):
            assert svg.get("role") == "img" and len(svg.get("aria-label", "")) > 20
        for img in soup.find_all("img"):
            assert img.get("alt")
        if about:
            assert (
                re.search(r"\w.*\w.*[.!?)]$", about["caption"])
                and len(about["caption"].split()) > 4
            ), about["caption"]
            assert not about["label"].startswith("fig-") or len(about["alt"]) > 20, about["label"]


# --- pages that state results


@each(RESULT_PAGES)
def test_no_number_is_typed_into_prose(path):
    prose = [c.source for c in nbformat.read(path, 4).cells if c.cell_type == "markdown"]
    code = [
        n.value
        for c in nbformat.read(path, 4).cells
        if c.cell_type == "code"
        for n in ast.walk(ast.parse(c.source))
        if isinstance(n, ast.Constant) and isinstance(n.value, str)
    ]
    for text in [re.sub(r"`[^`]*`|Apache-2\.0|95 %|top 1 %", "", t) for t in prose + code]:
        assert re.findall(r"\d+\.\d+|(?<![.\d])\d+ ?%|\d{1,3},\d{3}\b", text) == []


@each(RESULT_PAGES)
def test_result_pages_have_their_outputs(path):
    shown = [o for o in outputs(path) if o.output_type in ("display_data", "execute_result")]
    assert shown and not any(o.output_type in ("error", "stream") for o in outputs(path))


@pytest.mark.long
@each(RESULT_PAGES)
def test_result_pages_say_what_results_say(path, tmp_path):
    assert execute_notebook(path, tmp_path / path.name, {}) is None

    def said(p):
        return [
            (o.data.get("text/markdown") or o.data.get("text/plain"))
            for o in outputs(p)
            if "data" in o
        ]

    assert said(tmp_path / path.name) == said(path)


@pytest.mark.long
@each(RESULT_PAGES)
def test_result_pages_hold_for_other_runs_too(path, tmp_path):
    "Check logs without ratings, times and cold-start users, and one log under two protocols."
    runs = {f.stem: json.loads(f.read_text()) for f in (ROOT / "results").glob("*.json")}
    bare = json.loads(json.dumps(runs["demo-strict"])) | {"dataset": "bare", "protocol": "given"}
    bare["log"] |= {"has_ratings": False, "first": None, "last": None}
    bare["summary"] |= dict.fromkeys(
        ["first", "last", "stars_mean", "stars_sd", "new_user", "new_item", "new_either"]
    )
    bare["metrics"] = [
        r for r in bare["metrics"] if r["task"] == "ranking" and r["users"] != "cold"
    ]
    runs |= {"bare-given": bare, "demo-rolling": runs["demo-strict"] | {"protocol": "rolling"}}
    for folder in ("nbs", "results"):
        (tmp_path / folder).mkdir()
    for stem, run in runs.items():
        (tmp_path / "results" / f"{stem}.json").write_text(json.dumps(run))
    page = tmp_path / path.relative_to(ROOT)
    shutil.copy(path, page)
    assert execute_notebook(page, tmp_path / "done.ipynb", {}) is None
    done = tmp_path / "done.ipynb"
    labels, published = (
        [o.metadata.widedeep.label for o in outputs(p) if "widedeep" in o.get("metadata", {})]
        for p in (done, path)
    )
    assert bool(labels) == bool(published) and len(labels) == len(set(labels))
    assert set(re.findall(r"@((?:fig|tbl)-[\w-]*\w)", markdown(done))) <= set(labels)
    text = "".join(str(o.get("data", "")) for o in outputs(done))
    assert "bare" in text and "rolling" in text and not re.search(r"\bnan\b", text)


def test_result_pages_fit_desktop_and_phone(tmp_path, fits):
    "Check the layout with the CSS of the report."
    for path in RESULT_PAGES:
        file = tmp_path / f"{path.stem}.html"
        head = '<!doctype html><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        body = f'<div class="layout"><nav></nav><main>{render_chapter(path)}</main></div>'
        file.write_text(f"{head}<style>{page_css()}</style>{body}")
        fits(file)


def test_dark_theme_colors_match_the_site():
    css = (ROOT / "site/site.css").read_text()
    rules = re.findall(r'style\*="(\w+): (#\w+)"\] \{ (\w+): (#\w+) !important', css)
    assert sorted(rules) == sorted(
        (use, COLORS[n], use, bright)
        for n, bright in DARK_COLORS.items()
        for use in ("fill", "stroke")
    )
    assert SITE["format"]["html"]["css"] == "site/site.css"


# --- the site without Quarto: the filter and pandoc do the same to a page


def page_source(path):
    "Return a page as Markdown: texts, folded code and outputs."
    if path.suffix == ".qmd":
        return path.read_text(encoding="utf8")
    parts = []
    for cell in filtered(path)["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        if source.strip():
            summary = "<details><summary>code</summary>"
            parts.append(f"{summary}\n\n````python\n{source}\n````\n\n</details>")
        for output in cell["outputs"]:
            data = output.get("data", {})
            if "text/markdown" in data:
                parts.append("".join(data["text/markdown"]))
            elif "text/html" in data:
                parts.append("````{=html}\n" + "".join(data["text/html"]) + "\n````")
            else:
                text = "".join(data.get("text/plain", "")) or "".join(output.get("text", ""))
                parts.append(f"````\n{text}\n````")
    return "\n\n".join(parts)


def page_html(path):
    "Convert a page with pandoc, and put it into the width and the style of the site."
    pandoc = pytest.importorskip("pypandoc")
    body = pandoc.convert_text(page_source(path), "html5", "markdown", extra_args=["--mathml"])
    css = (ROOT / "site/site.css").read_text(encoding="utf8")
    head = (
        '<!doctype html><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        "<style>body{margin:0 12px;font:16px/1.6 system-ui;color:#1f2933;background:#fff}"
        "pre{overflow-x:auto}svg,img{max-width:100%}"
        "@media (prefers-color-scheme:dark){body{color:#e6edf3;background:#0f1720}}"
    )
    return f"{head}{css}</style><main>{body}</main>"


@pytest.fixture(scope="module")
def html_pages():
    "Convert every page once."
    return {path: page_html(path) for path in [*PAGES, *LIBRARY]}


def test_pages_fit_a_telephone(html_pages, tmp_path, browser):
    "Check that no page is wider than 390 pixels, with the style sheet of the site."
    wide = {}
    page = browser.new_page(viewport={"width": 390, "height": 800})
    for path, html in html_pages.items():
        file = tmp_path / f"{path.parent.name}-{path.stem}.html"
        file.write_text(html, encoding="utf8")
        page.goto(file.as_uri())
        reach = page.evaluate("document.scrollingElement.scrollWidth")
        if reach > 390:
            wide[name(path)] = reach
    assert wide == {}


def test_links_of_pages_have_a_target(html_pages):
    "Check links between pages, and links within a page, as they are after the filter."
    broken = []
    for path, html in html_pages.items():
        soup = BeautifulSoup(html, "html.parser")
        ids = {e["id"] for e in soup.find_all(id=True)}
        for link in [a["href"] for a in soup.find_all("a", href=True)]:
            parts = urlsplit(link)
            if parts.scheme in ("https", "mailto"):
                continue
            target = (path.parent / parts.path).resolve() if parts.path else path
            if not target.exists() or (not parts.path and parts.fragment not in ids):
                broken.append((name(path), link))
    assert broken == []


MENTION = re.compile(r"(?<![\w/])[Cc]hapters? \d\d\b")


def test_every_mention_of_a_chapter_is_a_link(html_pages):
    open_mentions = []
    for path, html in html_pages.items():
        soup = BeautifulSoup(html, "html.parser")
        for element in soup(["a", "code", "pre", "svg", "table", "figcaption"]):
            element.decompose()
        own = path.name[:2]
        mentions = [m for m in MENTION.findall(soup.get_text()) if m[-2:] != own]
        open_mentions += [(name(path), m) for m in mentions]
    assert open_mentions == []


CHAPTERS = [p for p in NOTEBOOKS if p.name[:2].isdigit()]


@each(CHAPTERS)
def test_chapters_show_no_dump(path):
    "Check that no output is a bare frame, a dictionary or an array."
    dump = re.compile(r"shape: \(|class=\"dataframe|^[\[{(].*[\]})]$|^tensor\(|^array\(", re.S)
    for cell in filtered(path)["cells"]:
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            texts = [
                output.get("text", ""),
                *(data.get(k, "") for k in ("text/plain", "text/html")),
            ]
            if "text/markdown" in data or "widedeep" in output.get("metadata", {}):
                continue
            for text in map("".join, texts):
                assert not dump.search(text.strip()), text[:100]


@each(CHAPTERS)
def test_chapters_have_no_walls_of_code(path):
    "Check that at most three code cells follow each other without a text or an output."
    run = 0
    for cell in filtered(path)["cells"]:
        silent = cell["cell_type"] == "code" and not cell["outputs"]
        run = run + 1 if silent else 0
        assert run <= 3


def test_the_filter_is_quick_and_light():
    "Check that the filter imports no package: Quarto starts it once for every page."
    import subprocess
    import sys

    code = "import sys, widedeep_nb.lib.site; print([m for m in sys.modules if m in BIG])"
    code = code.replace("BIG", repr(("torch", "polars", "numpy", "nbformat", "matplotlib")))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "[]", done.stderr


def test_no_theme_asks_for_a_font():
    "Check that both themes switch web fonts off; cosmo and darkly load some."
    for kind in ("light", "dark"):
        base, *own = SITE["format"]["html"]["theme"][kind]
        assert base in ("cosmo", "darkly")
        assert "$web-font-path: false;" in "".join((ROOT / file).read_text() for file in own)
