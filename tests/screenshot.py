"""Make the pictures of the product for README and site: python tests/screenshot.py RUN [FOLDER].

RUN is a finished run of the demo shop; FOLDER gets page.png, dashboard.png and experiment.png [results].
"""

import io
import shutil
import sys
from pathlib import Path

from conftest import CHROMIUM_OPTIONS
from PIL import Image
from playwright.sync_api import sync_playwright
from test_service_page import ROOT, click, running_service, wait_for_list

SIZE = {"width": 1200, "height": 800}


def save(page, target):
    "Save what the browser shows, with few colors."
    picture = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
    picture.quantize(256, dither=Image.Dither.NONE).save(target, optimize=True)


def service_picture(browser, run, target):
    "Take a picture of the service's page after three reactions."
    with running_service(run) as (address, _):
        page = browser.new_page(viewport=SIZE)
        page.goto(address)
        wait_for_list(page)
        for reaction, place in (("More like this", 2), ("Not for me", 4), ("Bought", 1)):
            click(page, reaction, place)
            wait_for_list(page)
        page.mouse.move(0, 0)
        page.evaluate("document.activeElement.blur(), scrollTo(0, 0)")
        page.wait_for_timeout(500)
        save(page, target)


def file_picture(browser, file, target):
    "Take a picture of the top of a page that lies in the run folder."
    page = browser.new_page(viewport=SIZE)
    page.goto(file.resolve().as_uri())
    page.wait_for_timeout(500)
    save(page, target)


def main(run, folder=ROOT / "results"):
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=CHROMIUM_OPTIONS)
        service_picture(browser, run, folder / "page.png")
        for name in ("dashboard", "experiment"):
            if (run / f"{name}.html").exists():
                file_picture(browser, run / f"{name}.html", folder / f"{name}.png")
        browser.close()


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
