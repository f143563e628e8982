import os
import re
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def shared():
    "Real data beside the project: from WIDEDEEP_SHARED, else ../shared."
    place = Path(os.environ.get("WIDEDEEP_SHARED", ROOT.parent / "shared"))
    if not (place / "data").exists():
        pytest.skip(f"needs the measuring data in {place}; set WIDEDEEP_SHARED")
    return place / "data"


@pytest.fixture(scope="session")
def ciao(shared):
    "ciao under filtered-first, with its categories."
    from widedeep_nb.data import load
    from widedeep_nb.preprocessing import prepare

    log, items, users, *_ = load(shared / "ciao")
    return prepare(log, "filtered-first", items, users)


@pytest.fixture(scope="session")
def small_run(tmp_path_factory):
    "A maker of small runs of the demo shop with some fitted models, to be served."
    from widedeep_nb.content import add_catalog
    from widedeep_nb.core import PROTOCOLS, Run, Split, make_recommender
    from widedeep_nb.data import load

    def make(**models):
        run = Run(tmp_path_factory.mktemp("small") / "run", dataset="demo?ratings=2500")
        log, items, users, *_ = load("demo?ratings=2500")
        for name, table in (("interactions", log), ("items", items), ("users", users)):
            run.write(f"{name}.parquet", table)
        run.update_manifest(hashes=run.file_hashes)
        rated = log.filter(log["rating"].is_not_null())
        split = add_catalog(
            Split.from_frames(
                rated,
                rated.clear(),
                rated.clear(),
                items=items,
                users=users,
                protocol=PROTOCOLS["given"],
            ),
            items,
        )
        for name, how in models.items():
            make_recommender(name.replace("_", "-"), **how).fit(split).save(
                run.model_folder(name.replace("_", "-"))
            )
        return run

    return make


@pytest.fixture
def look():
    "A browser that opens a file at desk and telephone width, by day and by night, and says what it sees."
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if not chromium:
        pytest.skip("needs chromium")
    sync = pytest.importorskip("playwright.sync_api")
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
    ]
    with sync.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=flags)

        def see(file):
            "For each width and scheme: how far the page reaches, its colours, pictures that are empty or cut off, what it asked the network for."
            for width, scheme in [(w, s) for w in (1280, 360) for s in ("light", "dark")]:
                page, asked = (
                    browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme),
                    [],
                )
                page.on(
                    "request",
                    lambda r: (
                        asked.append(r.url) if not r.url.startswith(("file:", "data:")) else None
                    ),
                )
                page.goto(Path(file).as_uri())
                seen = page.evaluate("""() => ({reach: document.scrollingElement.scrollWidth, paper: getComputedStyle(document.body).backgroundColor, ink: getComputedStyle(document.body).color,
                    figures: document.querySelectorAll('svg, img').length,
                    bad: [...document.querySelectorAll('svg, img, table caption')].filter(e => { const b = e.getBoundingClientRect(); return e.checkVisibility() && (b.width < 20 || b.height < 8 || b.right > innerWidth + 1) }).map(e => e.outerHTML.slice(0, 80))})""")
                page.close()
                yield {"width": width, "scheme": scheme, "asked": asked} | seen

        yield see
        browser.close()


def light_of(colour):
    "How light a colour of a browser is, 0 to 1."
    return sum(int(c) for c in re.findall(r"\d+", colour)[:3]) / 765


@pytest.fixture
def fits(look):
    "Assert that a page fits, day and night, desk and telephone."

    def check(file):
        for seen in look(file):
            assert seen["reach"] <= seen["width"] and seen["bad"] == [] and seen["asked"] == [], (
                str(file),
                seen,
            )
            day = seen["scheme"] == "light"
            assert (
                (light_of(seen["paper"]) > 0.9 and light_of(seen["ink"]) < 0.3)
                if day
                else (light_of(seen["paper"]) < 0.2 and light_of(seen["ink"]) > 0.8)
            ), seen

    return check
