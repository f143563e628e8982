import os
import re
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
QUICK_SETTINGS = {  # of a whole run in some minutes
    "seeds": 1,
    "epochs": 3,
    "trials": 1,
    "time_budget_min": 0.2,
    "n_shops": 2,
    "max_visitors": 60,
    "bench_ratings": 2000,
    "bench_rows": 20000,
    "bench_repeats": 1,
    "scaling_rows": 4000,
    "distributed_rows": 2000,
}
QUICK = [word for name, value in QUICK_SETTINGS.items() for word in ("-p", f"{name}={value}")]
CHROMIUM_OPTIONS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
MEASURE_PAGE = """() => {
    const body = getComputedStyle(document.body);
    const broken = e => {
        const b = e.getBoundingClientRect();
        return e.checkVisibility() && (b.width < 20 || b.height < 8 || b.right > innerWidth + 1);
    };
    return {
        reach: document.scrollingElement.scrollWidth,
        paper: body.backgroundColor,
        ink: body.color,
        figures: document.querySelectorAll('svg, img').length,
        bad: [...document.querySelectorAll('svg, img, table caption')]
            .filter(broken).map(e => e.outerHTML.slice(0, 80)),
    };
}"""


@pytest.fixture(scope="session")
def shared():
    "Folder of real datasets: from WIDEDEEP_SHARED, else ../shared."
    folder = Path(os.environ.get("WIDEDEEP_SHARED", ROOT.parent / "shared"))
    if not (folder / "data").exists():
        pytest.skip(f"needs the measuring data in {folder}; set WIDEDEEP_SHARED")
    return folder / "data"


@pytest.fixture(scope="session")
def ciao(shared):
    "Ciao log under the protocol filtered-first, with its categories."
    from widedeep_nb.data import load
    from widedeep_nb.preprocessing import prepare

    log, items, users, *_ = load(shared / "ciao")
    return prepare(log, "filtered-first", items, users)


@pytest.fixture(scope="session")
def demo_split():
    "Factory of splits of the rated rows of a demo shop, with its catalog: `demo_split(3000, seed=1)`."
    import polars as pl

    from widedeep_nb.lib.content_features import add_catalog
    from widedeep_nb.lib.core import to_interactions
    from widedeep_nb.lib.shop import demo_shop
    from widedeep_nb.preprocessing import prepare

    def make(n_ratings, seed):
        shop = demo_shop(n_ratings=n_ratings, seed=seed)
        log = shop.interactions.filter(
            pl.col("rating").is_between(1, 5),
            pl.col("user").is_not_null(),
            pl.col("item").is_not_null(),
            pl.col("timestamp").dt.year().is_between(2000, 2030),
        )
        log = to_interactions(log.unique(["user", "item"], maintain_order=True))
        split = prepare(log, "strict", shop.items, shop.users)
        return add_catalog(split, shop.items, shop.users)

    return make


@pytest.fixture(scope="session")
def small_run(tmp_path_factory):
    "Factory of small runs of the demo shop with fitted models: `small_run(name=params)`."
    from widedeep_nb.data import load
    from widedeep_nb.lib.content_features import add_catalog
    from widedeep_nb.lib.core import Split
    from widedeep_nb.lib.protocols import PROTOCOLS
    from widedeep_nb.lib.recommender import make_recommender
    from widedeep_nb.lib.runs import Run

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
        for name, params in models.items():
            make_recommender(name.replace("_", "-"), **params).fit(split).save(
                run.model_folder(name.replace("_", "-"))
            )
        return run

    return make


# playwright keeps an event loop running while it is open: tests of other files that call asyncio.run would fail
@pytest.fixture(scope="module")
def browser():
    "Start one browser for all tests of a file."
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if not chromium:
        pytest.skip("needs chromium")
    sync = pytest.importorskip("playwright.sync_api")
    with sync.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=CHROMIUM_OPTIONS)
        yield browser
        browser.close()


@pytest.fixture
def look(browser):
    "Browser that opens a file at two widths and in two color schemes and yields measurements."

    def see(file):
        "Yield per width and scheme: page width, colors, broken elements, network requests."
        for width, scheme in [(w, s) for w in (1280, 360) for s in ("light", "dark")]:
            viewport = {"width": width, "height": 800}
            page = browser.new_page(viewport=viewport, color_scheme=scheme)
            requests = []
            page.on("request", lambda r, requests=requests: requests.append(r.url))
            page.goto(Path(file).as_uri())
            seen = page.evaluate(MEASURE_PAGE)
            page.close()
            remote = [url for url in requests if not url.startswith(("file:", "data:"))]
            yield {"width": width, "scheme": scheme, "asked": remote} | seen

    return see


def light_of(color):
    "Return the mean of red, green and blue of a CSS color, 0 to 1."
    return sum(int(c) for c in re.findall(r"\d+", color)[:3]) / 765


@pytest.fixture
def fits(look):
    "Check that a page fits: both schemes, both widths."

    def check(file):
        for seen in look(file):
            assert seen["reach"] <= seen["width"], (
                str(file),
                seen,
            )
            assert seen["bad"] == [], (
                str(file),
                seen,
            )
            assert seen["asked"] == [], (
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
