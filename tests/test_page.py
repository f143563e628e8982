"The page of the service, clicked through in a browser."

import json
import os
import re
import shutil
import sqlite3
import subprocess
import sys
import time
from contextlib import closing, contextmanager
from pathlib import Path

import polars as pl
import pytest
from conftest import light_of

from widedeep_nb.content import add_side_features
from widedeep_nb.core import Run, make_recommender
from widedeep_nb.preprocessing import preprocess
from widedeep_nb.shop import demo_shop

ROOT = Path(__file__).parents[1]
STATIC = ROOT / "widedeep_nb/static"
SIMPLE = {
    "lists": {"matrix": 0.6, "neighbours": 0.3, "popularity": 0.1},
    "strangers": {"popularity": 1.0},
    "newcomers": {},
    "stars": {},
    "passes": {},
}  # a hybrid without networks
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
EVIL, ODD = "<img src=x onerror=\"document.title='taken'\"><b>bold</b>", "a/b?c=d&e#f %20\"'<é>"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "A run of a shop in which the product that most people have has a title of HTML, and the next one an id of signs."
    place, shop = (
        tmp_path_factory.mktemp("page"),
        demo_shop(n_ratings=3000, views=0.0, corrupted_share=0.0),
    )
    first, second = shop.interactions["item"].value_counts(sort=True)["item"][:2]
    odd = pl.col("item").replace({second: ODD})
    (place / "log").mkdir()
    shop.interactions.select("user", odd, "rating", pl.col("timestamp").dt.epoch("ms")).write_csv(
        place / "log/ratings.csv"
    )
    shop.items.select(
        odd,
        title=pl.when(pl.col("item") == first).then(pl.lit(EVIL)).otherwise("title"),
        category="category",
        brand="brand",
        price="price",
    ).write_csv(place / "log/items.csv")
    run = Run(place / "run", dataset=str(place / "log"))
    preprocess(run)
    split = add_side_features(run)[-1].for_final_fit()
    for name, how in {
        "hybrid": {"plan": SIMPLE},
        "popularity": {},
        "item-knn": {},
        "wide-deep": {"epochs": 2},
    }.items():
        make_recommender(name, **how).fit(split).save(run.model_folder(name))
    return run.folder


@contextmanager
def service(folder, **how):
    "A service of its own process; where it is, and the process."
    code = "import json, sys; from pathlib import Path; from widedeep_nb.serving import serve; serve(Path(sys.argv[1]), tell=lambda line: print(line, flush=True), **json.loads(sys.argv[2]))"
    process = subprocess.Popen(
        [sys.executable, "-c", code, folder, json.dumps({"port": 0} | how)],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    try:
        line = process.stdout.readline()
        assert line.startswith("http://"), line
        yield line.split()[0], process
    finally:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def at(folder):
    with service(folder) as (address, _):
        yield address


@pytest.fixture(scope="module")
def guarded(folder):
    "Another service, which wants a token for writing; the last test stops it."
    with service(folder, token="open sesame") as found:
        yield found


@pytest.fixture(scope="module")
def chromium():
    path = shutil.which("chromium") or shutil.which("chromium-browser")
    if not path:
        pytest.skip("needs chromium")
    sync = pytest.importorskip("playwright.sync_api")
    with sync.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def visit(chromium, at):
    "Open the page; what it asked elsewhere, what was blocked and what failed must be nothing."
    contexts, faults = [], []

    def go(query="", base=at, **how):
        context = chromium.new_context(
            **{"viewport": {"width": 1280, "height": 900}, "reduced_motion": "reduce"} | how
        )
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(10_000)
        page.on("request", lambda r: faults.append(r.url) if not r.url.startswith(base) else None)
        page.on("pageerror", lambda e: faults.append(str(e)))
        page.on(
            "console",
            lambda m: faults.append(m.text) if "Content Security Policy" in m.text else None,
        )
        page.goto(base + "/" + query)
        settled(page)
        return page

    yield go
    for context in contexts:
        context.close()
    assert faults == []


def settled(page):
    "Wait for the list that is asked for; a question waits its time before it is asked."
    page.wait_for_timeout(250)
    page.locator("#lists[aria-busy=false]").wait_for(state="attached")


def items(page, column=0):
    return (
        page.locator(".column")
        .nth(column)
        .locator(".card")
        .evaluate_all("cards => cards.map(c => c.dataset.item)")
    )


def titles(page, where="#past-rows"):
    return page.locator(f"{where} b").all_text_contents()


def say(page, what, i=0):
    return page.locator(".card").nth(i).get_by_role("button", name=what).click()


def options(page):
    return page.locator("[role=listbox]:visible [role=option]")


def fits(page):
    return page.evaluate(
        "document.scrollingElement.scrollWidth <= innerWidth && [...document.querySelectorAll('main *, aside *, header *')].every(e => !e.checkVisibility() || e.getBoundingClientRect().right <= innerWidth + 1)"
    )


def find(page, field, text):
    page.get_by_role("combobox", name=field).fill(text)
    options(page).first.wait_for()
    page.wait_for_timeout(250)


def heard(folder, user=None, least=0):
    "What the service has written down, waited for."
    end = time.monotonic() + 15
    while True:
        with closing(sqlite3.connect(folder / "service/feedback.sqlite")) as base:
            rows = base.execute(
                "SELECT user, item, event, list FROM events ORDER BY rowid"
            ).fetchall()
        rows = [r for r in rows if user is None or r[0] == user]
        if len(rows) >= least or time.monotonic() > end:
            return rows
        time.sleep(0.1)


def somebody(folder, place=0):
    "One of those with most ratings."
    return pl.read_parquet(folder / "interactions.parquet")["user"].value_counts(sort=True)["user"][
        place
    ]


def had(folder, user):
    return set(pl.read_parquet(folder / "interactions.parquet").filter(user=user)["item"])


# ---------------------------------------------------------------- a new visitor


def test_a_new_visitor_builds_a_basket_and_the_list_follows(visit, folder):
    page = visit()
    assert page.locator("h1").text_content() == "For a new visitor" and len(items(page)) == 10
    card, before = page.locator(".card").nth(2), items(page)
    assert all(
        card.locator(part).text_content() for part in ("h3", ".kind", ".why", ".stars", ".price")
    )
    assert re.fullmatch(r"[1-5]\.\d ★", card.locator(".stars").text_content())
    find(page, "Add a product", "smartphone")
    option = options(page).first
    title = option.evaluate("o => o.firstChild.textContent")
    option.click()
    settled(page)
    assert (
        titles(page) == [title]
        and items(page) != before
        and re.fullmatch(r"10 products, (all|\d+) new\.", page.locator("#news").text_content())
    )
    reasons = page.locator(".why").all_text_contents()
    assert f"because you liked {title}" in reasons and "basket=" in page.url
    shared = visit(page.url.removeprefix(page.url.split("?")[0]))  # the address holds it all
    assert titles(shared) == [title] and items(shared) == items(page)
    page.get_by_role("button", name=f"Remove: {title}").click()
    settled(page)
    assert titles(page) == [] and items(page) == before and "basket=" not in page.url
    page.go_back()
    settled(page)
    assert titles(page) == [title] and items(page) == items(shared)


def test_what_a_visitor_says_has_an_effect_and_is_written(visit, folder):
    page, old = visit(), len(heard(folder))
    said = []
    for what, event in (("More like this", "more"), ("Not for me", "less"), ("Bought", "purchase")):
        before = items(page)
        said.append((before[1], event))
        say(page, what, 1)
        assert (
            page.locator("#said")
            .text_content()
            .startswith(
                {"more": "More like this", "less": "Not for me", "purchase": "Bought"}[event]
            )
        )
        settled(page)
        assert before[1] not in items(page) and items(page) != before and len(items(page)) == 10
    assert len(titles(page)) == 2 and len(titles(page, "#less-rows")) == 1
    say(page, "Not for me", 3)
    settled(page)
    unsaid = page.locator("#said").text_content()
    page.get_by_role(
        "button", name="Undo"
    ).click()  # the last word is taken back before it is written
    settled(page)
    assert len(titles(page, "#less-rows")) == 1 and unsaid.startswith("Not for me")
    page.get_by_role("button", name="Allow again").click()
    settled(page)
    assert said[1][0] in items(page)
    said.append((items(page)[4], "purchase"))
    say(page, "Bought", 4)
    settled(page)
    page.goto("about:blank")  # what was said last is written when the page is left
    rows = heard(folder, least=old + 4)[old:]
    assert (
        [(item, event) for _, item, event, _ in rows] == said
        and len({user for user, *_ in rows}) == 1
        and rows[0][0].startswith("visitor-")
    )
    with closing(sqlite3.connect(folder / "service/feedback.sqlite")) as base:
        shown = {row[0]: json.loads(row[1]) for row in base.execute("SELECT id, items FROM lists")}
    assert all(item in shown[on] for _, item, _, on in rows)  # in the list that was shown


# ---------------------------------------------------------------- somebody known


def test_somebody_known_has_a_history_and_says_more(visit, folder):
    page, user = visit(), somebody(folder)
    find(page, "For whom", user.lower())
    options(page).first.click()
    settled(page)
    assert page.locator("h1").text_content() == f"For {user}" and f"user={user}" in page.url
    title, stars, when = (
        pl.read_parquet(folder / "interactions.parquet")
        .filter(user=user)
        .sort("timestamp")
        .join(pl.read_parquet(folder / "items.parquet"), on="item", maintain_order="left")
        .select("title", "rating", "timestamp")
        .row(-1)
    )
    told, newest = (
        page.locator("#past-rows li", has_text=title).text_content(),
        page.locator("#past-rows li").first,
    )
    assert f"{stars:g} ★ · {when.day} " in told and f" {when.year}" in told
    assert not set(items(page)) & had(folder, user)
    said = []
    for what, event, words in (
        ("More like this", "more", "more like this"),
        ("Not for me", "less", "not for me"),
        ("Bought", "purchase", "bought"),
    ):
        before = items(page)
        name = page.locator(".card h3").nth(2).text_content()
        said.append((user, before[2], event))
        say(page, what, 2)
        page.locator("#said", has_text=f"Written: {words}").wait_for()
        settled(page)
        assert (
            before[2] not in items(page)
            and titles(page)[0] == name
            and words in newest.text_content()
        )
        assert [row[:3] for row in heard(folder, user)] == said  # on the disk once it is said so
    again = visit(f"?user={user}")
    assert items(again) == items(page)


def test_similar_products_of_a_card(visit):
    page = visit()
    button = page.locator(".card").nth(2).get_by_role("button", name="Similar")
    button.click()
    near = page.locator(".card").nth(2).locator(".similar li")
    near.first.wait_for()
    assert button.get_attribute("aria-expanded") == "true" and near.count() == 5
    title = near.first.locator("b").text_content()
    near.first.get_by_role("button").click()
    settled(page)
    assert titles(page) == [title]


# ---------------------------------------------------------------- models, rules


def test_two_models_side_by_side(visit, folder):
    user = somebody(folder, 1)
    page = visit(f"?user={user}")
    page.get_by_label("Compare with").select_option("popularity")
    settled(page)
    left, right = items(page), items(page, 1)
    assert (
        len(left) == len(right) == 10
        and left != right
        and f"{len(set(left) & set(right))} in both lists" in page.locator("#news").text_content()
    )
    assert page.locator(".column h2").all_text_contents() == ["hybrid", "popularity"]
    boxes = [page.locator(".column").nth(i).bounding_box() for i in (0, 1)]
    assert boxes[0]["y"] == boxes[1]["y"] and boxes[0]["x"] + boxes[0]["width"] <= boxes[1]["x"]
    for column, mine, other, name in ((0, left, right, "popularity"), (1, right, left, "hybrid")):
        marks = page.locator(".column").nth(column).locator(".both").all_text_contents()
        assert marks == [
            f"in both: no. {other.index(i) + 1} of {name}" if i in other else "" for i in mine
        ]
    page.set_viewport_size({"width": 360, "height": 740})
    boxes = [page.locator(".column").nth(i).bounding_box() for i in (0, 1)]
    assert boxes[0]["y"] + boxes[0]["height"] <= boxes[1]["y"] and fits(page)
    shared = visit(page.url.removeprefix(page.url.split("?")[0]))
    assert (items(shared), items(shared, 1)) == (left, right)


def test_rules_order_and_diversity(visit, folder):
    page = visit()
    before, prices = (
        items(page),
        dict(pl.read_parquet(folder / "items.parquet").select("item", "price").iter_rows()),
    )
    page.locator("#diversity").fill("0.9")
    settled(page)
    varied = items(page)
    page.locator("#diversity").fill("0")
    page.get_by_label("Order by").select_option("revenue")
    settled(page)
    dear = items(page)
    assert varied != before and sum(prices[i] or 0 for i in dear) > sum(
        prices[i] or 0 for i in before
    )
    page.get_by_label("Order by").select_option("score")
    page.locator("summary").click()
    page.get_by_label("Price to").fill("30")
    settled(page)
    assert "highest=30" in page.url and items(page) and all(prices[i] <= 30 for i in items(page))
    page.get_by_label("Price to").fill("0.001")
    settled(page)
    assert (
        items(page) == []
        and "Nothing is left by the rules." in page.locator(".note").text_content()
    )
    page.locator(".column").get_by_role("button", name="Clear the rules").click()
    settled(page)
    assert items(page) == before and page.get_by_label("Price to").input_value() == ""
    find(page, "Not these categories", "elec")
    options(page).first.click()
    settled(page)
    assert items(page) == [] and "blocked=Electronics" in page.url
    page.get_by_role("button", name="No longer: Electronics").click()
    settled(page)
    assert items(page) == before
    page.get_by_role("button", name="Ten more").click()
    settled(page)
    assert len(items(page)) == 20 and items(page)[:10] == before


# ---------------------------------------------------------------- by keyboard, on a telephone, at night


def test_wholly_by_keyboard(visit, folder):
    page, key = visit(), lambda *keys: [page.keyboard.press(k) for k in keys]

    def focus():
        return page.evaluate("document.activeElement.id || document.activeElement.ariaLabel")

    def tab_to(name):
        for _ in range(80):
            if focus() == name:
                return
            key("Tab")
            assert page.evaluate(
                "document.activeElement === document.body || getComputedStyle(document.activeElement).outlineStyle !== 'none'"
            ), focus()  # it is seen
        raise AssertionError(f"{name} is not reached, {focus()} is")

    tab_to("add")
    page.keyboard.type("phone")
    options(page).first.wait_for()
    page.wait_for_timeout(250)
    key("ArrowDown", "ArrowDown", "ArrowUp")
    box = page.get_by_role("combobox", name="Add a product")
    marked = page.locator(f"#{box.get_attribute('aria-activedescendant')}")
    assert (
        box.get_attribute("aria-expanded") == "true"
        and marked.get_attribute("aria-selected") == "true"
        and page.locator("[role=option][aria-selected=true]").count() == 1
    )
    key("Escape")
    assert (
        box.get_attribute("aria-expanded") == "false"
        and box.input_value() == "phone"
        and titles(page) == []
    )
    key("ArrowDown")
    page.wait_for_timeout(250)
    key("ArrowDown", "Enter")
    settled(page)
    assert len(titles(page)) == 1 and focus() == "add" and box.input_value() == ""
    page.keyboard.type("phone")
    key("Enter")  # at once, before anything is found
    settled(page)
    assert len(titles(page)) == 2
    third = page.locator(".card h3").nth(2).text_content()
    tab_to(f"Not for me: {third}")
    key("Enter")
    settled(page)
    assert titles(page, "#less-rows") == [third]
    assert (
        focus() == f"Not for me: {page.locator('.card h3').nth(2).text_content()}"
    )  # on what took its place
    page.evaluate("document.activeElement.blur()")
    user = somebody(folder, 2)
    page.locator("#who").click()
    options(page).first.wait_for()
    key("Enter")
    settled(page)
    assert len(titles(page)) == 2  # nothing was typed, nothing is lost
    page.keyboard.type(user)
    key("Enter")
    settled(page)
    assert page.locator("h1").text_content() == f"For {user}"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_on_a_telephone_by_day_and_by_night(visit, folder, scheme):
    page = visit(
        f"?basket={'%20'.join(['x' * 60] * 3)}&versus=popularity",
        color_scheme=scheme,
        viewport={"width": 360, "height": 740},
    )
    page.locator("summary").click()
    say(page, "Similar", 1)
    find(page, "Add a product", "a")
    assert fits(page) and fits(
        visit("?user=" + "y" * 190, color_scheme=scheme, viewport={"width": 360, "height": 740})
    )
    ink, paper, rest = page.evaluate(
        "[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor, getComputedStyle(document.querySelector('.kind')).color]"
    )
    contrast = abs(light_of(ink) - light_of(paper)), abs(light_of(rest) - light_of(paper))
    assert (
        (light_of(paper) > 0.9) == (scheme == "light") and contrast[0] > 0.7 and contrast[1] > 0.4
    )


# ---------------------------------------------------------------- what goes wrong


def test_whatever_is_shown_is_text(visit, folder):
    page = visit()
    assert (
        EVIL in page.locator(".card h3").all_text_contents()
        and page.locator("main img, main h3 b").count() == 0
    )
    find(page, "Add a product", "onerror")
    options(page).first.click()
    settled(page)
    assert (
        titles(page) == [EVIL]
        and EVIL in page.locator("#said").text_content()
        and page.locator("img").count() == 0
        and page.title() != "taken"
    )
    page = visit("?user=%3Cimg%20src%3Dx%20onerror%3Dalert(1)%3E&model=%3Cb%3E")
    assert (
        page.locator("h1").text_content() == "For <img src=x onerror=alert(1)>"
        and page.locator("img").count() == 0
    )
    assert (
        "nobody of that id" in page.locator(".note").text_content()
        and "nobody of that id" in page.locator("#past-note").text_content()
    )


def test_ids_of_any_signs(visit, folder):
    page = visit()
    place = items(page).index(ODD)
    say(page, "Similar", place)
    page.locator(".similar li b").first.wait_for()
    say(page, "More like this", place)
    settled(page)
    assert len(titles(page)) == 1 and ODD not in items(page)
    shared = visit(page.url.removeprefix(page.url.split("?")[0]))
    assert titles(shared) == titles(page) and items(shared) == items(page)


def test_late_answers_are_dropped_and_the_old_list_stays_until_then(visit):
    page, held = visit(), []
    before = items(page)
    page.route(
        "**/api/recommend",
        lambda route: (
            held.append(route) if '"revenue"' in route.request.post_data else route.continue_()
        ),
    )
    page.locator("#order").select_option("revenue")
    page.wait_for_timeout(400)
    assert (
        items(page) == before
        and page.locator("#lists").get_attribute("aria-busy") == "true"
        and len(held) == 1
    )
    page.locator("#order").select_option("score")
    page.locator("#diversity").fill("0.9")
    settled(page)
    varied = items(page)
    try:
        held[0].fulfill(
            status=200,
            content_type="application/json",
            body=json.dumps(
                {"list": "x", "model": "hybrid", "user": None, "explored": False, "items": []}
            ),
        )
    except Exception:
        pass  # the page has given the question up
    page.wait_for_timeout(200)
    assert items(page) == varied != before


def test_what_cannot_be_written_is_said_and_written_once_when_it_can(visit, folder):
    user, keys = somebody(folder, 3), []
    page = visit(f"?user={user}")
    page.on(
        "request",
        lambda r: (
            keys.append(json.loads(r.post_data)["key"]) if r.url.endswith("/api/feedback") else None
        ),
    )
    page.route(
        "**/api/feedback",
        lambda route: route.fulfill(status=507, json={"error": "the disk is full"}),
    )
    before = items(page)
    say(page, "Bought", 1)
    page.locator("#said", has_text="Not written: the disk is full.").wait_for()
    assert (
        items(page) == before and page.locator(".said").count() == 0 and heard(folder, user) == []
    )
    page.unroute("**/api/feedback")
    page.get_by_role("button", name="Try again").click()
    page.locator("#said", has_text="Written: bought").wait_for()
    settled(page)
    assert (
        len(keys) == 3
        and len(set(keys)) == 1
        and [row[1:3] for row in heard(folder, user)] == [(before[1], "purchase")]
        and before[1] not in items(page)
    )


def test_a_token_for_writing(visit, folder, guarded):
    user = somebody(folder, 4)
    page = visit(f"?user={user}", base=guarded[0])
    before = items(page)
    say(page, "More like this", 0)
    page.locator("#said", has_text="wants a token").wait_for()
    assert items(page) == before and heard(folder, user) == []
    page.get_by_role("button", name="Enter it").click()
    assert page.evaluate("document.activeElement.id") == "token"
    page.keyboard.type("open sesame")
    page.keyboard.press("Enter")
    say(page, "More like this", 0)
    page.locator("#said", has_text="Written").wait_for()
    settled(page)
    assert before[0] not in items(page) and [row[1:3] for row in heard(folder, user)] == [
        (before[0], "more")
    ]


def test_a_log_without_stars_prices_and_categories(visit, at):
    page = visit()
    page.route(
        "**/api/about",
        lambda route: route.fulfill(
            json=route.fetch().json() | {"stars": False, "prices": False, "categories": []}
        ),
    )

    def bare(route):
        answer = route.fetch().json()
        route.fulfill(
            json=answer
            | {
                "items": [
                    i | {"title": None, "category": None, "price": None, "stars": None}
                    for i in answer["items"]
                ]
            }
        )

    page.route("**/api/recommend", bare)
    page.goto(f"{at}/?order=revenue&highest=3")
    settled(page)
    assert page.locator(".card h3").all_text_contents() == items(page) and len(items(page)) == 10
    assert not any(
        page.locator(f"{what}:visible").count()
        for what in (".kind", ".stars", ".price", "#order", "#prices", ".kinds")
    )


def test_nothing_is_set_as_html():
    script, page = (STATIC / "shop.js").read_text(), (STATIC / "shop.html").read_text()
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|DOMParser|setHTML|createContextualFragment|\beval\b|new Function",
        script,
    )
    assert not re.search(
        r"<style|style=|<script(?![^>]+src=)|\son\w+=|https?://", page
    ) and "http" not in re.sub(r"//.*", "", script)


def test_the_service_is_gone_and_comes_back(visit, folder, guarded):
    address, process = guarded
    page = visit(base=address)
    before = items(page)
    process.kill()
    process.wait()
    say(page, "Not for me", 1)
    page.get_by_role("alert").wait_for()
    assert (
        page.get_by_role("alert").text_content().startswith("The service does not answer.")
        and items(page) == before
    )
    page.locator("#diversity").fill("0.5")
    with service(folder, port=int(address.rsplit(":", 1)[1])):
        page.get_by_role("button", name="Try again").click()
        settled(page)
        assert (
            page.get_by_role("alert").count() == 0
            and before[1] not in items(page)
            and len(items(page)) == 10
        )
