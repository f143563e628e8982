"Check the page of the service in a browser."

import base64
import json
import os
import re
import sqlite3
import subprocess
import sys
import time
from contextlib import closing, contextmanager
from pathlib import Path

import polars as pl
import pytest
from conftest import light_of

from widedeep_nb.lib.item_vectors import add_side_features
from widedeep_nb.lib.recommender import make_recommender
from widedeep_nb.lib.runs import Run
from widedeep_nb.lib.shop import demo_shop
from widedeep_nb.preprocessing import preprocess

ROOT = Path(__file__).parents[1]
STATIC = ROOT / "widedeep_nb/static"
PLAN = {  # an ensemble without networks
    "ranking": {"matrix": 0.6, "neighbors": 0.3, "popularity": 0.1},
    "cold_users": {"popularity": 1.0},
    "cold_items": {},
    "rating": {},
    "epochs": {},
}
MODELS = {
    "hybrid": {"plan": PLAN},
    "popularity": {},
    "item-knn": {},
    "wide-deep": {"epochs": 2},
}
HTML_TITLE = "<img src=x onerror=\"document.title='taken'\"><b>bold</b>"
ODD_ID = "a/b?c=d&e#f %20\"'<é>"
PICTURE = base64.b64decode(  # PNG of one pixel
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)
PHONE = {"width": 360, "height": 740}
SERVE = """
import json, sys
from pathlib import Path
from widedeep_nb.lib.server import serve
serve(Path(sys.argv[1]), echo=lambda line: print(line, flush=True), **json.loads(sys.argv[2]))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "A run where the most popular item has a title of HTML, and the next one an id of signs."
    folder = tmp_path_factory.mktemp("page")
    shop = demo_shop(n_ratings=3000, views=0.0, corrupted_share=0.0)
    first, second = shop.interactions["item"].value_counts(sort=True)["item"][:2]
    item = pl.col("item").replace({second: ODD_ID})
    title = pl.when(pl.col("item") == first).then(pl.lit(HTML_TITLE)).otherwise("title")
    (folder / "log").mkdir()
    timestamp = pl.col("timestamp").dt.epoch("ms")
    ratings = shop.interactions.select("user", item, "rating", timestamp)
    ratings.write_csv(folder / "log/ratings.csv")
    items = shop.items.select(item, "category", "brand", "price", title=title)
    items.write_csv(folder / "log/items.csv")
    run = Run(folder / "run", dataset=str(folder / "log"))
    preprocess(run)
    split = add_side_features(run)[-1].for_final_fit()
    for name, parameters in MODELS.items():
        make_recommender(name, **parameters).fit(split).save(run.model_folder(name))
    return run.folder


@contextmanager
def running_service(folder, **options):
    "Serve a run as a process; yield its address and the process."
    process = subprocess.Popen(
        [sys.executable, "-c", SERVE, folder, json.dumps({"port": 0} | options)],
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
def address(folder):
    with running_service(folder) as (address, _):
        yield address


@pytest.fixture(scope="module")
def with_token(folder):
    "Another service, which needs a token for writing; the last test stops it."
    with running_service(folder, token="open sesame") as service:
        yield service


def watch_page(page, base, faults):
    "Append requests to other sites, errors and blocked content of a page to `faults`."

    def check_request(request):
        if not request.url.startswith(base):
            faults.append(request.url)

    def check_message(message):
        if "Content Security Policy" in message.text:
            faults.append(message.text)

    page.on("request", check_request)
    page.on("console", check_message)
    page.on("pageerror", lambda error: faults.append(str(error)))


@pytest.fixture
def visit(browser, address):
    "A function that opens the page; there must be no faults at the end."
    contexts, faults = [], []

    def open_page(query="", base=address, **options):
        defaults = {"viewport": {"width": 1280, "height": 900}, "reduced_motion": "reduce"}
        context = browser.new_context(**defaults | options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(10_000)
        watch_page(page, base, faults)
        page.goto(base + "/" + query)
        wait_for_list(page)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert faults == []


def wait_for_list(page):
    "Wait for the list that is requested; requests are delayed a little."
    page.wait_for_timeout(250)
    page.locator("#lists[aria-busy=false]").wait_for(state="attached")


def items(page, column=0):
    "Return the items of a list."
    cards = page.locator(".column").nth(column).locator(".card")
    return cards.evaluate_all("cards => cards.map(card => card.dataset.item)")


def titles(page, where="#past-rows"):
    "Return the titles in a side list."
    return page.locator(f"{where} b").all_text_contents()


def text(page, selector):
    "Return the text of an element."
    return page.locator(selector).text_content()


def card_title(page, i):
    "Return the title of a card."
    return page.locator(".card h3").nth(i).text_content()


def click(page, name, i=0):
    "Click a button of a card."
    page.locator(".card").nth(i).get_by_role("button", name=name).click()


def options(page):
    "Return the visible options of a combobox."
    return page.locator("[role=listbox]:visible [role=option]")


def query_of(page):
    "Return the query of the page's address."
    return page.url.removeprefix(page.url.split("?")[0])


def fits(page):
    "Return whether nothing is wider than the window."
    return page.evaluate("""
        document.scrollingElement.scrollWidth <= innerWidth
        && [...document.querySelectorAll('main *, aside *, header *')].every(e =>
            !e.checkVisibility() || e.getBoundingClientRect().right <= innerWidth + 1)
    """)


def search(page, field, words):
    "Type into a combobox and wait for its options."
    page.get_by_role("combobox", name=field).fill(words)
    options(page).first.wait_for()
    page.wait_for_timeout(250)


def stored_feedback(folder, user=None, n_expected=0):
    "Return the stored events (user, item, event, list); wait until there are enough."
    deadline = time.monotonic() + 15
    query = "SELECT user, item, event, list FROM events ORDER BY rowid"
    while True:
        with closing(sqlite3.connect(folder / "service/feedback.sqlite")) as connection:
            rows = connection.execute(query).fetchall()
        rows = [row for row in rows if user is None or row[0] == user]
        if len(rows) >= n_expected or time.monotonic() > deadline:
            return rows
        time.sleep(0.1)


def active_user(folder, rank=0):
    "Return one of the users with the most ratings."
    users = pl.read_parquet(folder / "interactions.parquet")["user"]
    return users.value_counts(sort=True)["user"][rank]


# ---------------------------------------------------------------- new visitor


def test_new_visitor_builds_a_basket(visit):
    "Check that the list follows the basket, and that the address holds the state."
    page = visit()
    before = items(page)
    assert text(page, "h1") == "For a new visitor" and len(before) == 10
    card = page.locator(".card").nth(2)
    for part in ("h3", ".kind", ".why", ".stars", ".price"):
        assert card.locator(part).text_content()
    assert re.fullmatch(r"[1-5]\.\d ★", card.locator(".stars").text_content())
    search(page, "Add a product", "smartphone")
    title = options(page).first.evaluate("option => option.firstChild.textContent")
    options(page).first.click()
    wait_for_list(page)
    assert titles(page) == [title] and items(page) != before
    assert re.fullmatch(r"10 products, (all|\d+) new\.", text(page, "#news"))
    assert f"because you liked {title}" in page.locator(".why").all_text_contents()
    assert "basket=" in page.url
    shared = visit(query_of(page))
    assert titles(shared) == [title] and items(shared) == items(page)
    page.get_by_role("button", name=f"Remove: {title}").click()
    wait_for_list(page)
    assert titles(page) == [] and items(page) == before and "basket=" not in page.url
    page.go_back()
    wait_for_list(page)
    assert titles(page) == [title] and items(page) == items(shared)


def test_feedback_of_a_visitor(visit, folder):
    "Check that feedback changes the list, can be undone, and is stored when the page is left."
    page, n_before = visit(), len(stored_feedback(folder))
    sent = []
    for name, event in (("More like this", "more"), ("Not for me", "less"), ("Bought", "purchase")):
        before = items(page)
        sent.append((before[1], event))
        click(page, name, 1)
        assert text(page, "#said").startswith(name)
        wait_for_list(page)
        assert before[1] not in items(page) and items(page) != before and len(items(page)) == 10
    assert len(titles(page)) == 2 and len(titles(page, "#less-rows")) == 1
    click(page, "Not for me", 3)
    wait_for_list(page)
    assert text(page, "#said").startswith("Not for me")
    page.get_by_role("button", name="Undo").click()  # before it is sent
    wait_for_list(page)
    assert len(titles(page, "#less-rows")) == 1
    page.get_by_role("button", name="Allow again").click()
    wait_for_list(page)
    assert sent[1][0] in items(page)
    sent.append((items(page)[4], "purchase"))
    click(page, "Bought", 4)
    wait_for_list(page)
    page.goto("about:blank")
    rows = stored_feedback(folder, n_expected=n_before + 4)[n_before:]
    assert [(item, event) for _, item, event, _ in rows] == sent
    assert len({user for user, *_ in rows}) == 1 and rows[0][0].startswith("visitor-")
    with closing(sqlite3.connect(folder / "service/feedback.sqlite")) as connection:
        lists = dict(connection.execute("SELECT id, items FROM lists").fetchall())
    assert all(item in json.loads(lists[list_id]) for _, item, _, list_id in rows)


# ---------------------------------------------------------------- known user


def test_history_and_feedback_of_a_known_user(visit, folder):
    "Check the history, that its items are not recommended, and that feedback is on disk at once."
    page, user = visit(), active_user(folder)
    search(page, "User", user.lower())
    options(page).first.click()
    wait_for_list(page)
    assert text(page, "h1") == f"For {user}" and f"user={user}" in page.url
    log = pl.read_parquet(folder / "interactions.parquet").filter(user=user).sort("timestamp")
    log = log.join(
        pl.read_parquet(folder / "items.parquet"), on="item", how="left", maintain_order="left"
    )
    title, rating, timestamp = log.select("title", "rating", "timestamp").row(-1)
    row = page.locator("#past-rows li", has_text=title).text_content()
    assert f"{rating:g} ★ · {timestamp.day} " in row and f" {timestamp.year}" in row
    assert not set(items(page)) & set(log["item"])
    sent = []
    for name, event in (("More like this", "more"), ("Not for me", "less"), ("Bought", "purchase")):
        before, title = items(page), card_title(page, 2)
        sent.append((user, before[2], event))
        click(page, name, 2)
        page.locator("#said", has_text=f"Saved: {name.lower()}").wait_for()
        wait_for_list(page)
        assert before[2] not in items(page) and titles(page)[0] == title
        assert name.lower() in page.locator("#past-rows li").first.text_content()
        assert [row[:3] for row in stored_feedback(folder, user)] == sent
    assert items(visit(f"?user={user}")) == items(page)


def test_similar_products_of_a_card(visit):
    page = visit()
    card = page.locator(".card").nth(2)
    button, similar = card.get_by_role("button", name="Similar"), card.locator(".similar li")
    button.click()
    similar.first.wait_for()
    assert button.get_attribute("aria-expanded") == "true" and similar.count() == 5
    title = similar.first.locator("b").text_content()
    similar.first.get_by_role("button").click()
    wait_for_list(page)
    assert titles(page) == [title]


# ---------------------------------------------------------------- models and rules


def column_boxes(page):
    "Return the positions of two lists."
    return [page.locator(".column").nth(i).bounding_box() for i in (0, 1)]


def test_comparison_of_two_models(visit, folder):
    "Check both lists and their common items, side by side and, on a phone, one below the other."
    page = visit(f"?user={active_user(folder, 1)}")
    page.get_by_label("Compare with").select_option("popularity")
    wait_for_list(page)
    left, right = items(page), items(page, 1)
    assert len(left) == len(right) == 10 and left != right
    assert f"{len(set(left) & set(right))} in both lists" in text(page, "#news")
    assert page.locator(".column h2").all_text_contents() == ["hybrid", "popularity"]
    a, b = column_boxes(page)
    assert a["y"] == b["y"] and a["x"] + a["width"] <= b["x"]
    for column, own, other, name in ((0, left, right, "popularity"), (1, right, left, "hybrid")):
        marks = page.locator(".column").nth(column).locator(".both").all_text_contents()
        for item, mark in zip(own, marks, strict=True):
            rank = other.index(item) + 1 if item in other else None
            assert mark == (f"in both: no. {rank} of {name}" if rank else "")
    page.set_viewport_size(PHONE)
    a, b = column_boxes(page)
    assert a["y"] + a["height"] <= b["y"] and fits(page)
    shared = visit(query_of(page))
    assert (items(shared), items(shared, 1)) == (left, right)


def test_order_and_diversity(visit, folder):
    page = visit()
    before = items(page)
    prices = dict(pl.read_parquet(folder / "items.parquet").select("item", "price").iter_rows())
    page.locator("#diversity").fill("0.9")
    wait_for_list(page)
    assert items(page) != before
    page.locator("#diversity").fill("0")
    page.get_by_label("Order by").select_option("revenue")
    wait_for_list(page)
    revenue = sum(prices[item] or 0 for item in items(page))
    assert revenue > sum(prices[item] or 0 for item in before)
    page.get_by_label("Order by").select_option("score")
    wait_for_list(page)
    page.get_by_role("button", name="Ten more").click()
    wait_for_list(page)
    assert len(items(page)) == 20 and items(page)[:10] == before


def test_rules(visit, folder):
    page = visit()
    before = items(page)
    prices = dict(pl.read_parquet(folder / "items.parquet").select("item", "price").iter_rows())
    page.locator("summary").click()
    page.get_by_label("Price to").fill("30")
    wait_for_list(page)
    cheap = items(page)
    assert "highest=30" in page.url and cheap and all(prices[item] <= 30 for item in cheap)
    page.get_by_label("Price to").fill("0.001")
    wait_for_list(page)
    assert items(page) == [] and "The rules leave no product." in text(page, ".note")
    page.locator(".column").get_by_role("button", name="Clear the rules").click()
    wait_for_list(page)
    assert items(page) == before and page.get_by_label("Price to").input_value() == ""
    search(page, "Not these categories", "elec")
    options(page).first.click()
    wait_for_list(page)
    assert items(page) == [] and "blocked=Electronics" in page.url
    page.get_by_role("button", name="No longer: Electronics").click()
    wait_for_list(page)
    assert items(page) == before


# ---------------------------------------------------------------- keyboard, phone, dark mode


def press(page, *keys):
    "Press keys, one after the other."
    for key in keys:
        page.keyboard.press(key)


def focus(page):
    "Return the id or the label of the element with the focus."
    return page.evaluate("document.activeElement.id || document.activeElement.ariaLabel")


def tab_to(page, name):
    "Press Tab until an element has the focus; every focus must be visible."
    is_visible = (
        "document.activeElement === document.body"
        " || getComputedStyle(document.activeElement).outlineStyle !== 'none'"
    )
    for _ in range(80):
        if focus(page) == name:
            return
        press(page, "Tab")
        assert page.evaluate(is_visible), focus(page)
    raise AssertionError(f"{name} is not reached, {focus(page)} is")


def test_combobox_by_keyboard(visit):
    page = visit()
    tab_to(page, "add")
    page.keyboard.type("phone")
    options(page).first.wait_for()
    page.wait_for_timeout(250)
    press(page, "ArrowDown", "ArrowDown", "ArrowUp")
    box = page.get_by_role("combobox", name="Add a product")
    marked = page.locator(f"#{box.get_attribute('aria-activedescendant')}")
    assert box.get_attribute("aria-expanded") == "true"
    assert marked.get_attribute("aria-selected") == "true"
    assert page.locator("[role=option][aria-selected=true]").count() == 1
    press(page, "Escape")
    assert box.get_attribute("aria-expanded") == "false"
    assert box.input_value() == "phone" and titles(page) == []
    press(page, "ArrowDown")
    page.wait_for_timeout(250)
    press(page, "ArrowDown", "Enter")
    wait_for_list(page)
    assert len(titles(page)) == 1 and focus(page) == "add" and box.input_value() == ""
    page.keyboard.type("phone")
    press(page, "Enter")  # before the options are there
    wait_for_list(page)
    assert len(titles(page)) == 2


def test_feedback_and_users_by_keyboard(visit, folder):
    page, user = visit(), active_user(folder, 2)
    tab_to(page, "add")
    page.keyboard.type("phone")
    press(page, "Enter")
    wait_for_list(page)
    third = card_title(page, 2)
    tab_to(page, f"Not for me: {third}")
    press(page, "Enter")
    wait_for_list(page)
    assert titles(page, "#less-rows") == [third]
    assert focus(page) == f"Not for me: {card_title(page, 2)}"  # the item that replaced it
    page.evaluate("document.activeElement.blur()")
    page.locator("#who").click()
    options(page).first.wait_for()
    press(page, "Enter")
    wait_for_list(page)
    assert len(titles(page)) == 1  # nothing was typed, so the basket stays
    page.keyboard.type(user)
    press(page, "Enter")
    wait_for_list(page)
    assert text(page, "h1") == f"For {user}"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_phone_in_light_and_dark_mode(visit, scheme):
    style = {"color_scheme": scheme, "viewport": PHONE}
    long_ids = "%20".join(["x" * 60] * 3)
    page = visit(f"?basket={long_ids}&versus=popularity", **style)
    page.locator("summary").click()
    click(page, "Similar", 1)
    search(page, "Add a product", "a")
    assert fits(page) and fits(visit("?user=" + "y" * 190, **style))
    ink, paper, small_print = page.evaluate("""[
        getComputedStyle(document.body).color,
        getComputedStyle(document.body).backgroundColor,
        getComputedStyle(document.querySelector('.kind')).color,
    ]""")
    assert (light_of(paper) > 0.9) == (scheme == "light")
    assert abs(light_of(ink) - light_of(paper)) > 0.7
    assert abs(light_of(small_print) - light_of(paper)) > 0.4


# ---------------------------------------------------------------- odd data and failures


def test_titles_and_ids_are_shown_as_text(visit):
    page = visit()
    assert HTML_TITLE in page.locator(".card h3").all_text_contents()
    assert page.locator("main img:not(.picture), main h3 *").count() == 0
    search(page, "Add a product", "onerror")
    options(page).first.click()
    wait_for_list(page)
    assert titles(page) == [HTML_TITLE] and HTML_TITLE in text(page, "#said")
    assert page.locator("img:not(.picture)").count() == 0 and page.title() != "taken"
    page = visit("?user=%3Cimg%20src%3Dx%20onerror%3Dalert(1)%3E&model=%3Cb%3E")
    assert text(page, "h1") == "For <img src=x onerror=alert(1)>"
    assert page.locator("img").count() == 0
    assert "unknown user" in text(page, ".note") and "unknown user" in text(page, "#past-note")


def test_odd_item_ids(visit):
    page = visit()
    position = items(page).index(ODD_ID)
    click(page, "Similar", position)
    page.locator(".similar li b").first.wait_for()
    click(page, "More like this", position)
    wait_for_list(page)
    assert len(titles(page)) == 1 and ODD_ID not in items(page)
    shared = visit(query_of(page))
    assert titles(shared) == titles(page) and items(shared) == items(page)


def test_late_answers_are_dropped(visit):
    "Check that the old list stays until the answer to the last request."
    page, delayed = visit(), []
    before = items(page)

    def delay_revenue(route):
        if '"revenue"' in route.request.post_data:
            delayed.append(route)
        else:
            route.continue_()

    page.route("**/api/recommend", delay_revenue)
    page.locator("#order").select_option("revenue")
    page.wait_for_timeout(400)
    assert items(page) == before and len(delayed) == 1
    assert page.locator("#lists").get_attribute("aria-busy") == "true"
    page.locator("#order").select_option("score")
    page.locator("#diversity").fill("0.9")
    wait_for_list(page)
    diverse = items(page)
    answer = {"list": "x", "model": "hybrid", "user": None, "explored": False, "items": []}
    try:
        delayed[0].fulfill(json=answer)
    except Exception:
        pass  # the page has cancelled the request
    page.wait_for_timeout(200)
    assert items(page) == diverse != before


def test_feedback_that_cannot_be_stored(visit, folder):
    "Check that the page reports it, and that a later try stores it once."
    user, keys = active_user(folder, 3), []
    page = visit(f"?user={user}")

    def collect_key(request):
        if request.url.endswith("/api/feedback"):
            keys.append(json.loads(request.post_data)["key"])

    def refuse(route):
        route.fulfill(status=507, json={"error": "the disk is full"})

    page.on("request", collect_key)
    page.route("**/api/feedback", refuse)
    before = items(page)
    click(page, "Bought", 1)
    page.locator("#said", has_text="Not saved: the disk is full.").wait_for()
    assert items(page) == before and page.locator(".said").count() == 0
    assert stored_feedback(folder, user) == []
    page.unroute("**/api/feedback")
    page.get_by_role("button", name="Try again").click()
    page.locator("#said", has_text="Saved: bought").wait_for()
    wait_for_list(page)
    assert len(keys) == 3 and len(set(keys)) == 1
    assert [row[1:3] for row in stored_feedback(folder, user)] == [(before[1], "purchase")]
    assert before[1] not in items(page)


def test_token_for_feedback(visit, folder, with_token):
    address, _ = with_token
    user = active_user(folder, 4)
    page = visit(f"?user={user}", base=address)
    before = items(page)
    click(page, "More like this")
    page.locator("#said", has_text="needs a token").wait_for()
    assert items(page) == before and stored_feedback(folder, user) == []
    page.get_by_role("button", name="Enter it").click()
    assert focus(page) == "token"
    page.keyboard.type("open sesame")
    press(page, "Enter")
    click(page, "More like this")
    page.locator("#said", has_text="Saved").wait_for()
    wait_for_list(page)
    assert before[0] not in items(page)
    assert [row[1:3] for row in stored_feedback(folder, user)] == [(before[0], "more")]


def test_catalog_without_ratings_prices_and_categories(visit, address):
    "Check that the page shows ids, and no controls for what is missing."
    page = visit()

    def strip_about(route):
        about = {"stars": False, "prices": False, "categories": []}
        route.fulfill(json=route.fetch().json() | about)

    def strip_items(route):
        answer = route.fetch().json()
        missing = {"title": None, "category": None, "price": None, "stars": None}
        route.fulfill(json=answer | {"items": [item | missing for item in answer["items"]]})

    page.route("**/api/about", strip_about)
    page.route("**/api/recommend", strip_items)
    page.goto(f"{address}/?order=revenue&highest=3")
    wait_for_list(page)
    assert page.locator(".card h3").all_text_contents() == items(page) and len(items(page)) == 10
    for selector in (".kind", ".stars", ".price", "#order", "#prices", ".kinds"):
        assert page.locator(f"{selector}:visible").count() == 0


def test_pictures_and_currency(visit, address):
    "Check that each card has its picture, and each price its currency."
    page = visit()
    assert page.locator(".picture:visible").count() == 0  # this run has no pictures

    def add_details(route):
        route.fulfill(json=route.fetch().json() | {"images": True, "currency": "EUR"})

    def send_picture(route):
        route.fulfill(body=PICTURE, content_type="image/png")

    page.route("**/api/about", add_details)
    page.route("**/api/image*", send_picture)
    page.goto(address)
    wait_for_list(page)
    sources = page.locator(".picture:visible").evaluate_all("all => all.map(img => img.src)")
    assert len(set(sources)) == len(items(page)) == 10
    prices = page.locator(".price:not(.none)").all_text_contents()
    assert prices and all(price.startswith("€") for price in prices)
    assert fits(page)


def test_source_sets_no_html():
    "Check that no script sets HTML, and that the page has no inline code and no foreign address."
    script, page = (STATIC / "shop.js").read_text(), (STATIC / "shop.html").read_text()
    functions = ("innerHTML", "outerHTML", "insertAdjacentHTML", r"document\.write", "DOMParser")
    functions += ("setHTML", "createContextualFragment", r"\beval\b", "new Function")
    assert not re.search("|".join(functions), script)
    assert not re.search(r"<style|style=|<script(?![^>]+src=)|\son\w+=|https?://", page)
    assert "http" not in re.sub(r"//.*", "", script)


def test_service_that_stops_and_comes_back(visit, folder, with_token):
    address, process = with_token
    page = visit(base=address)
    before = items(page)
    process.kill()
    process.wait()
    click(page, "Not for me", 1)
    alert = page.get_by_role("alert")
    alert.wait_for()
    assert alert.text_content().startswith("The service does not answer.")
    assert items(page) == before
    page.locator("#diversity").fill("0.5")
    with running_service(folder, port=int(address.rsplit(":", 1)[1])):
        page.get_by_role("button", name="Try again").click()
        wait_for_list(page)
        assert alert.count() == 0
        assert before[1] not in items(page) and len(items(page)) == 10
