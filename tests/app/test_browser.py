"""The page in a browser: every tab opened, each control moved, nothing asked of another host."""

import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from chiaroscuro.app import measuring
from chiaroscuro.app.page import HOST, launch
from chiaroscuro.app.served import Served

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
gradio = pytest.importorskip("gradio", reason="the app's pages need gradio")
playwright = pytest.importorskip("playwright.sync_api", reason="the browser is driven by playwright")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")

ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture(scope="module")
def address(served: Served, run_folder: Path) -> Iterator[str]:
    patch = pytest.MonkeyPatch()
    patch.setattr(measuring, "SECONDS", 0.01)
    patch.setattr(measuring, "LENGTHS", (32,))
    patch.chdir(run_folder.parent.parent)
    with socket.socket() as free:
        free.bind((HOST, 0))
        port = free.getsockname()[1]
    page = launch(served, port, block=False)
    yield f"http://{HOST}:{port}"
    page.close()
    patch.undo()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield opened
        opened.close()


@pytest.fixture
def visitor(browser: Any, address: str) -> Iterator[Any]:
    context = browser.new_context(viewport={"width": 1200, "height": 1000})
    asked: list[str] = []
    page = context.new_page()
    page.on("request", lambda request: asked.append(request.url))
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.set_default_timeout(20_000)
    page.goto(address)
    page.get_by_role("button", name="Read", exact=True).wait_for()
    yield page
    context.close()
    foreign = [url for url in asked if not url.startswith((address, f"ws://{HOST}", "data:", "blob:"))]
    assert not foreign, foreign
    assert not errors, errors


def read(page: Any, text: str) -> None:
    page.get_by_label("Text", exact=True).fill(text)
    page.get_by_role("button", name="Read", exact=True).click()


def slide(page: Any, label: str, value: float) -> None:
    """Set the visible slider of this label by its number box."""
    box = page.get_by_label(f"number input for {label}").locator("visible=true")
    box.fill(str(value))
    box.press("Enter")
    box.blur()


LOOK, KEPT = "Share that looks far, or gets the costliest operator", "Share that is kept"


def test_reading(visitor: Any, tmp_path: Path) -> None:
    read(visitor, "the light falls on a wall and what is dark stays dark <b>until</b> the sun has gone round")
    visitor.locator(".reading .token").first.wait_for()
    assert visitor.locator(".reading b").count() == 0 and visitor.locator(".layer-map").count() == 1
    slide(visitor, LOOK, 1)
    visitor.get_by_text("100.0% got the costliest operator").wait_for()
    slide(visitor, LOOK, 0)
    visitor.get_by_text(" 0.0% got the costliest operator").wait_for()
    slide(visitor, KEPT, 1)
    visitor.get_by_text("100.0% are kept").wait_for()
    slide(visitor, "Layer; 0 shows all", 2)
    visitor.locator('.token[data-tip*="layer 2: "]').first.wait_for()
    token = visitor.locator(".reading .token").nth(3)
    token.focus()
    shown = token.evaluate("e => getComputedStyle(e, '::after').content")
    assert "score" in shown and "near" in shown
    visitor.get_by_label("loss beside full attention's").check()
    visitor.locator(".token.better, .token.worse").first.wait_for()
    for scheme in ("light", "dark"):
        visitor.emulate_media(color_scheme=scheme)
        visitor.screenshot(path=tmp_path / f"{scheme}.png")
        assert (tmp_path / f"{scheme}.png").stat().st_size > 10_000
    read(visitor, "")
    visitor.get_by_text("the text is empty").wait_for()
    read(visitor, "light " * 500)
    visitor.get_by_text("at most 128 are shown").wait_for()


def test_writing(visitor: Any) -> None:
    visitor.get_by_role("tab", name="Write").click()
    visitor.get_by_label("Prompt").fill("the light <i>falls</i>")
    slide(visitor, "New tokens, at most", 8)
    slide(visitor, "Temperature; 0 takes the likeliest token", 0)
    visitor.get_by_label("Seed").fill("3")
    visitor.get_by_role("button", name="Write", exact=True).click()
    visitor.get_by_text("Done.").wait_for()
    assert visitor.get_by_text("8 tokens,").count() == 2 and visitor.locator(".reading i").count() == 0
    visitor.get_by_label("Seed").fill("")
    visitor.get_by_role("button", name="Write", exact=True).click()
    visitor.get_by_text("a number is missing").wait_for()
    visitor.get_by_label("Seed").fill("18446744073709551616")
    visitor.get_by_role("button", name="Write", exact=True).click()
    visitor.get_by_text("give a whole number from 0 to").wait_for()
    visitor.get_by_label("Seed").fill("3")
    visitor.get_by_label("Prompt").fill("")
    visitor.get_by_role("button", name="Write", exact=True).click()
    visitor.get_by_text("the prompt is empty").wait_for()
    visitor.get_by_role("button", name="Stop").click()
    visitor.get_by_text("Stopped.").wait_for()


def test_measuring(visitor: Any, tmp_path: Path) -> None:
    visitor.get_by_role("tab", name="Measure").click()
    visitor.get_by_role("button", name="Measure speed").click()
    visitor.get_by_text("Done. Other work").wait_for(timeout=180_000)
    (tmp_path / "text.txt").write_text("the light falls on a wall and what is dark stays dark")
    visitor.locator('input[type="file"]:not([accept])').set_input_files(tmp_path / "text.txt")
    visitor.get_by_text("The beginning of text.txt.").wait_for()
    visitor.get_by_text("local · attention").locator("visible=true").first.wait_for()


def test_looking_at_runs(visitor: Any) -> None:
    visitor.get_by_role("tab", name="Runs").click()
    visitor.get_by_role("button", name="Look", exact=True).click()
    visitor.get_by_text("1 runs, 0 sweeps.").wait_for()
    visitor.locator('img[src*=".png"]').first.wait_for()
    visitor.get_by_label("Folder of runs").fill("nowhere")
    visitor.get_by_role("button", name="Look", exact=True).click()
    visitor.get_by_text("nowhere is no folder").wait_for()
    visitor.locator('img[src*=".png"]').first.wait_for(state="detached")
    assert visitor.get_by_text("nowhere is no folder").is_visible()  # the emptied lists do not take the line away


def test_two_visitors(browser: Any, address: str) -> None:
    pages = [browser.new_context().new_page() for _ in range(2)]
    for page in pages:
        page.set_default_timeout(20_000)
        page.goto(address)
        read(page, "the light falls on a wall and what is dark stays dark until the sun has gone round")
        page.locator(".reading .token").first.wait_for()
    slide(pages[0], LOOK, 1)
    slide(pages[1], LOOK, 0)
    pages[0].get_by_text("100.0% got the costliest operator").wait_for()
    pages[1].get_by_text(" 0.0% got the costliest operator").wait_for()


def test_the_keyboard_reaches_every_control(visitor: Any) -> None:
    reached = set()
    for _ in range(40):
        visitor.keyboard.press("Tab")
        reached.add(
            visitor.evaluate(
                "() => { const e = document.activeElement;"
                " return e.getAttribute('aria-label') || e.innerText || e.name || e.tagName }"
            ).strip()
        )
    assert any("Read" in each for each in reached) and any(LOOK in each for each in reached), reached
