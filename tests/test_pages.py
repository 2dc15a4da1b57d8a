"""Pages in headless Chromium, by scripts/test_pages.sh: no script error, no missing picture, readable when narrow."""

import base64
import os
from pathlib import Path

import pytest
from run_folder import make_run

from scripts.report import ReportFlags, report

if "PAGES_TESTS" not in os.environ:
    pytest.skip("needs a browser: bash scripts/test_pages.sh", allow_module_level=True)

from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By

WIDTHS = (400, 1400)
SMALLEST_TEXT = 10  # pixels
PIECE = 1500  # height of a screenshot

# Texts that are too small, elements that stick out of the page, and pictures that are not there or too small to read.
FIND_FLAWS = """
const flaws = [], width = document.documentElement.clientWidth;
for (const image of document.images) {
  if (!image.complete || !image.naturalWidth) flaws.push('missing picture: ' + image.alt);
  else if (image.getBoundingClientRect().width < Math.min(300, width * 0.8)) flaws.push('small picture: ' + image.alt);
}
for (const element of document.body.querySelectorAll('*')) {
  const own = [...element.childNodes].some(node => node.nodeType === 3 && node.textContent.trim());
  if (!own || !element.getClientRects().length) continue;
  const size = parseFloat(getComputedStyle(element).fontSize);
  if (size < arguments[0]) flaws.push('text of ' + size + ' px: ' + element.textContent.trim().slice(0, 40));
  const box = element.getBoundingClientRect();
  if (!element.closest('.scroll') && (box.right > width + 1 || box.left < -1))
    flaws.push('sticks out: ' + element.textContent.trim().slice(0, 40));
}
const whole = document.documentElement.scrollWidth;
if (whole > width) flaws.push('the page is ' + whole + ' px wide');
return flaws;
"""


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Pages of toy runs, one whose RL was kept and one whose was not, the page over both, and those that were named."""
    folder = tmp_path_factory.mktemp("pages")
    for seed, kept in enumerate(("RL", "SFT")):
        make_run(folder / f"seed{seed}", seed, kept)
    report(ReportFlags(folders=[str(folder / "seed0"), str(folder / "seed1")]))
    named = [Path(page) for page in os.environ["PAGES_TESTS"].split(":") if page]
    return [folder / "seed0/report.html", folder / "seed1/report.html", folder / "report.html", *named]


def open_browser():
    options = webdriver.ChromeOptions()
    options.binary_location = "/usr/bin/chromium"
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--hide-scrollbars"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    return webdriver.Chrome(options=options, service=Service("/usr/bin/chromedriver"))


@pytest.fixture(scope="module")
def browser():
    opened = open_browser()
    yield opened
    opened.quit()


def resize(browser, width):
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)


def save_screenshots(browser, name, width):
    """The page from top to bottom, as pieces that a viewer shows in full size."""
    height = browser.execute_script("return document.documentElement.scrollHeight")
    for number, top in enumerate(range(0, height, PIECE)):
        clip = {"x": 0, "y": top, "width": width, "height": min(PIECE, height - top), "scale": 1}
        shot = browser.execute_cdp_cmd("Page.captureScreenshot", {"clip": clip, "captureBeyondViewport": True})
        path = Path(os.environ["PAGES_OUT"]) / f"{name}_{width}_{number:02d}.png"
        path.write_bytes(base64.b64decode(shot["data"]))


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
