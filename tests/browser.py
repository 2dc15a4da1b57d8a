"""A headless Chromium for the tests of pages: widths, screenshots, and what makes a page hard to read."""

import base64
import os
from pathlib import Path

from selenium import webdriver
from selenium.webdriver.chrome.service import Service

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


def open_browser():
    options = webdriver.ChromeOptions()
    options.binary_location = "/usr/bin/chromium"
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--hide-scrollbars"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    return webdriver.Chrome(options=options, service=Service("/usr/bin/chromedriver"))


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
