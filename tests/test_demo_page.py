"""The demo in headless Chromium, by scripts/test_pages.sh: type, choose, read the list and the search, change both."""

import contextlib
import os
import socket
import subprocess
import time
import urllib.request
from pathlib import Path

import pytest

from minionerec.evaluation.recommender import Recommender

if "DEMO_PYTHON" not in os.environ:
    pytest.skip("needs a browser: bash scripts/test_pages.sh", allow_module_level=True)

from browser import FIND_FLAWS, SMALLEST_TEXT, WIDTHS, open_browser, resize, save_screenshots
from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

ROOT = Path(__file__).parent.parent
SECONDS = 120  # for the server to start, and for the page to answer
BEAMS = 20


def wait_for(found):
    """The first true value of a function that is called until then."""
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        with contextlib.suppress(StaleElementReferenceException):  # the page was drawn anew meanwhile
            if value := found():
                return value
        time.sleep(0.1)
    raise TimeoutError("the page did not come to show it")


@pytest.fixture(scope="module")
def recommender(trained):
    return Recommender.load(trained.checkpoint, num_beams=BEAMS, fuse="transitions,content", fuse_weight=[1, 0, 0])


@pytest.fixture(scope="module")
def address(trained):
    """A running demo of the tiny model."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    command = [os.environ["DEMO_PYTHON"], "-m", "scripts.demo", "--model", trained.checkpoint, "--port", str(port)]
    server = subprocess.Popen([*command, "--num_beams", str(BEAMS)], cwd=ROOT)
    url = f"http://127.0.0.1:{port}"

    def answers():
        assert server.poll() is None, "the demo ended"
        try:
            return urllib.request.urlopen(url, timeout=5).status == 200
        except OSError:
            return False

    try:
        wait_for(answers)
        yield url
    finally:
        server.terminate()
        server.wait(timeout=30)


class Page:
    """The demo as somebody who sits before it: what is on it, and what can be done to it."""

    def __init__(self, url):
        self.browser = open_browser()
        resize(self.browser, WIDTHS[-1])
        self.browser.get(url)
        wait_for(lambda: self.find("#titles input"))

    def find(self, selector):
        return self.browser.find_elements(By.CSS_SELECTOR, selector)

    def fill(self, selector, text):
        """Type a text in place of what stands in a field."""
        (field,) = self.find(selector)
        field.send_keys(Keys.CONTROL, "a")
        field.send_keys(text, Keys.TAB)

    def titles(self):
        return [label.text for label in self.find("#titles label")]

    def choose(self, words, title):
        """Search a title and add it to the history."""
        self.fill("#search textarea, #search input", words)
        wait_for(lambda: self.titles() and all(all(w in t.lower() for w in words.split()) for t in self.titles()))
        wait_for(lambda: [label.click() or True for label in self.find("#titles label") if label.text == title])
        wait_for(lambda: title in self.find("#history")[0].text)

    def recommend(self):
        """Press the button and return the rows of the list that is then shown."""
        before = self.find("#tree")[0].get_attribute("innerHTML")
        self.find("#go")[0].click()
        wait_for(lambda: self.find("#tree .levels") and self.find("#tree")[0].get_attribute("innerHTML") != before)
        time.sleep(0.5)  # list and search are drawn one after the other
        return wait_for(self.rows)

    def rows(self):
        """(rank, title, reason) of the list, row by row."""
        return self.browser.execute_script(
            "return [...document.querySelectorAll('#list tbody tr')].map(row => [row.cells[0], "
            "row.querySelector('.title'), row.querySelector('.more span')].map(element => element.innerText))"
        )

    def heads(self):
        return [head.text for head in self.find("#tree .levels b")]


@pytest.fixture(scope="module")
def page(address):
    opened = Page(address)
    yield opened
    opened.browser.quit()


def expect(recommender, history, **options):
    return [item.title for item in recommender.recommend([history], **options)[0]]


def test_type_choose_and_read(page, recommender):
    """One test, since each step stands on the page that the one before left."""
    titles = dict(zip(recommender.catalogue.item_ids, recommender.catalogue.titles, strict=True))
    page.find("#go")[0].click()
    wait_for(lambda: "The history is empty" in page.find("body")[0].text)
    assert page.rows() == []

    page.choose("number 7", titles[7])
    page.choose("number 12", titles[12])
    assert page.find("#history")[0].text.split("\n")[-1].endswith(titles[12])
    page.fill("#weight input[type=number]", "0")
    rows = page.recommend()
    assert [row[1] for row in rows] == expect(recommender, [7, 12], k=10)
    assert [row[0] for row in rows] == [str(rank) for rank in range(1, 11)]
    assert page.heads()[0].startswith("Code 1: ") and len(page.heads()) >= 3
    assert page.heads()[-1].endswith("10 are in the list")
    for width in WIDTHS:
        resize(page.browser, width)
        time.sleep(1)  # the page lays itself out anew
        save_screenshots(page.browser, "demo", width)
        flaws = page.browser.execute_script(FIND_FLAWS, SMALLEST_TEXT)
        assert not [flaw for flaw in flaws if "px wide" in flaw or "sticks out" in flaw], flaws

    # Fewer beams and a shorter list; baselines with half the weight; the history may return.
    resize(page.browser, WIDTHS[-1])
    page.fill("#beams input[type=number]", "4")
    page.fill("#k input[type=number]", "3")
    rows = page.recommend()
    assert [row[1] for row in rows] == expect(recommender, [7, 12], k=3, num_beams=4)
    assert page.heads()[0].split()[2] in ("1", "2", "3", "4")
    page.fill("#beams input[type=number]", str(BEAMS))
    page.fill("#weight input[type=number]", "0.5")
    page.find("#unseen input")[0].click()
    rows = page.recommend()
    expected = expect(recommender, [7, 12], k=3, exclude_seen=False, fuse_weight=[1, 0.5, 0.5])
    assert [row[1] for row in rows] == expected and any("after" in row[2] or "like" in row[2] for row in rows)


def test_nothing_fails_and_nothing_is_asked_of_others(page, address):
    errors = [entry for entry in page.browser.get_log("browser") if entry["level"] == "SEVERE"]
    assert errors == []
    asked = [
        entry["message"] for entry in page.browser.get_log("performance") if "requestWillBeSent" in entry["message"]
    ]
    elsewhere = [text for text in asked if '"url":"http' in text and f'"url":"{address}' not in text]
    assert elsewhere == []
