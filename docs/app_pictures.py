"""The pictures of docs/app.md: the page of a checkpoint in a headless browser, tab by tab.

    python docs/app_pictures.py [CHECKPOINT]

It needs the extra [app], playwright, and Chromium.
"""

import shutil
import socket
import sys
from pathlib import Path
from typing import Any

from playwright.sync_api import sync_playwright

from chiaroscuro.app.page import HOST, launch
from chiaroscuro.app.served import serve

IMAGES = Path(__file__).parent / "images"


def main(checkpoint: str | None) -> None:
    """Take five pictures."""
    with socket.socket() as free:
        free.bind((HOST, 0))
        port = free.getsockname()[1]
    shown = launch(serve(checkpoint), port, block=False)
    with sync_playwright() as driver:
        browser = driver.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"]
        )
        page = browser.new_page(viewport={"width": 1200, "height": 900})
        page.goto(f"http://{HOST}:{port}")
        read(page)
        number(page, "Layer; 0 shows all", 3)
        page.wait_for_timeout(1000)
        page.locator(".reading .token").nth(14).hover()
        picture(page, "app-read")
        page.goto(f"http://{HOST}:{port}/?__theme=dark")
        read(page)
        number(page, "Share that looks far, or gets the costliest operator", 0)
        page.get_by_label("loss beside full attention's").check()
        page.wait_for_timeout(1000)
        picture(page, "app-loss")
        page.goto(f"http://{HOST}:{port}/?__theme=light")
        page.get_by_role("tab", name="Write").click()
        page.get_by_role("button", name="Write", exact=True).click()
        page.get_by_text("Done.").wait_for(timeout=120_000)
        picture(page, "app-write")
        page.get_by_role("tab", name="Measure").click()
        page.get_by_role("button", name="Measure speed").click()
        page.get_by_text("Done. Other work").wait_for(timeout=600_000)
        picture(page, "app-measure")
        page.get_by_role("tab", name="Runs").click()
        page.get_by_role("button", name="Look", exact=True).click()
        page.locator('img[src*=".png"]').first.wait_for()
        page.wait_for_timeout(1000)
        picture(page, "app-runs")
        browser.close()
    shown.close()


def read(page: Any) -> None:
    """Read the beginning of the project's own page, which is longer than a window."""
    text = (Path(__file__).parent / "index.md").read_text("utf-8")[:900]
    page.get_by_label("Text", exact=True).fill(text)
    page.get_by_role("button", name="Read", exact=True).click()
    page.locator(".reading .token").first.wait_for()


def number(page: Any, label: str, value: float) -> None:
    """Set the visible slider of this label."""
    box = page.get_by_label(f"number input for {label}").locator("visible=true")
    box.fill(str(value))
    box.blur()


def picture(page: Any, name: str) -> None:
    """Save what is seen, the text in the middle of it where there is one."""
    if page.locator(".reading").locator("visible=true").count():
        page.locator(".said").locator("visible=true").first.evaluate("e => e.scrollIntoView({block: 'center'})")
    page.screenshot(path=IMAGES / f"{name}.png")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else None)
