"Make the screenshot of the service's page for the README: python tests/screenshot.py RUN [PICTURE]."

import io
import shutil
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright
from test_page import FLAGS, ROOT, say, service, settled


def main(run, picture=ROOT / "results/page.png"):
    with service(run) as (address, _), sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium") or shutil.which("chromium-browser"), args=FLAGS
        )
        page = browser.new_page(viewport={"width": 1200, "height": 800})
        page.goto(address)
        settled(page)
        for what, place in (("More like this", 2), ("Not for me", 4), ("Bought", 1)):
            say(page, what, place)
            settled(page)
        page.locator("#said").evaluate("said => said.replaceChildren()")
        page.mouse.move(0, 0)
        page.evaluate("document.activeElement.blur(), scrollTo(0, 0)")
        page.wait_for_timeout(500)
        Image.open(io.BytesIO(page.screenshot())).convert("RGB").quantize(
            256, dither=Image.Dither.NONE
        ).save(picture, optimize=True)
        browser.close()


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
