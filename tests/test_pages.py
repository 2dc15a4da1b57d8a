"""Pages in headless Chromium, by scripts/test_pages.sh: no script error, no missing picture, readable when narrow."""

import os
from pathlib import Path

import pytest
from run_folder import make_run

from scripts.report import ReportFlags, report

if "PAGES_TESTS" not in os.environ:
    pytest.skip("needs a browser: bash scripts/test_pages.sh", allow_module_level=True)

from browser import FIND_FLAWS, SMALLEST_TEXT, WIDTHS, open_browser, resize, save_screenshots
from selenium.webdriver.common.by import By


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Pages of toy runs, one whose RL was kept and one whose was not, the page over both, and those that were named."""
    folder = tmp_path_factory.mktemp("pages")
    for seed, kept in enumerate(("RL", "SFT")):
        make_run(folder / f"seed{seed}", seed, kept)
    report(ReportFlags(folders=[str(folder / "seed0"), str(folder / "seed1")]))
    named = [Path(page) for page in os.environ["PAGES_TESTS"].split(":") if page]
    return [folder / "seed0/report.html", folder / "seed1/report.html", folder / "report.html", *named]


@pytest.fixture(scope="module")
def browser():
    opened = open_browser()
    yield opened
    opened.quit()


@pytest.mark.parametrize("width", WIDTHS)
def test_pages_are_readable(browser, pages, width):
    for page in pages:
        resize(browser, width)
        browser.get(page.resolve().as_uri())
        for details in browser.find_elements(By.TAG_NAME, "details"):
            browser.execute_script("arguments[0].open = true", details)
        assert browser.execute_script(FIND_FLAWS, SMALLEST_TEXT) == [], page
        assert browser.get_log("browser") == [], page
        # Nothing but the page itself is asked for.
        asked = [
            entry["message"] for entry in browser.get_log("performance") if "requestWillBeSent" in entry["message"]
        ]
        assert not [message for message in asked if '"url":"http' in message], page
        for details in browser.find_elements(By.TAG_NAME, "details"):
            browser.execute_script("arguments[0].open = false", details)
        save_screenshots(browser, f"{page.parent.name}_{page.stem}", width)


def test_the_check_finds_flaws(browser, tmp_path):
    page = tmp_path / "bad.html"
    texts = '<p style="width:900px">wide</p><p style="font-size:6px">small</p><img src="none.png" alt="gone">'
    page.write_text(f"<html><body>{texts}<script>undefined_name()</script></body></html>")
    resize(browser, 400)
    browser.get(page.as_uri())
    flaws = " ".join(browser.execute_script(FIND_FLAWS, SMALLEST_TEXT))
    assert all(word in flaws for word in ("missing picture: gone", "text of 6 px", "sticks out: wide", "px wide"))
    assert any("undefined_name" in entry["message"] for entry in browser.get_log("browser"))
