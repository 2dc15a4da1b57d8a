"""Amazon dumps for tests: a small log of reviews and its catalogue, written in each of the three forms."""

import gzip
import json

import numpy as np

from data_process.interactions import start_of_month

FORMS = ("2014", "2018", "2023")
START, END = start_of_month(2016, 10), start_of_month(2018, 11)
WINDOW = {"st_year": 2016, "st_month": 10, "ed_year": 2018, "ed_month": 11}
ALL = {"user_k": 0, "item_k": 0}


def log(users=6, items=5, each=8):
    """(user, item, seconds, rating); many reviews share a time."""
    random = np.random.default_rng(0)
    rows = [(f"U{u}", f"I{random.integers(items)}", START + 1000 * int(random.integers(9)), 4.0) for u in range(users)]
    rows += [
        (f"U{u}", f"I{random.integers(items)}", START + 1000 * int(random.integers(20)), float(random.integers(1, 6)))
        for _ in range(each)
        for u in range(users)
    ]
    return rows


def catalogue(items=5):
    return {f"I{i}": f"Item &amp; No. {i}" for i in range(items)}


def review_line(form, user, item, seconds, rating):
    if form == "2023":
        record = {"rating": rating, "title": "Good", "text": "ok", "asin": "V1", "parent_asin": item, "user_id": user}
        return json.dumps(record | {"timestamp": seconds * 1000, "verified_purchase": True})
    record = {"reviewerID": user, "asin": item, "reviewText": "it's “ok”", "overall": rating}
    return json.dumps(record | {"unixReviewTime": seconds})


def item_line(form, item, title):
    texts = ["A <b>bold</b> claim.", 'It\'s &lt;br&gt; "big"']
    if form == "2014":
        record = {"asin": item, "description": " ".join(texts), "title": title, "brand": "Acme"}
        return str(record | {"categories": [["Tools", "Saws"], ["Tools", "Blades & Co"]]})
    if form == "2018":
        record = {"asin": item, "description": texts, "title": title, "brand": "Acme"}
        return json.dumps(record | {"category": ["Tools", "Saws", "Blades &amp; Co"]})
    record = {"parent_asin": item, "description": texts, "title": title, "store": "Acme", "main_category": "X"}
    return json.dumps(record | {"categories": ["Tools", "Saws", "Blades & Co"], "price": None})


def write(path, lines, packed=False):
    content = "".join(line + "\n" for line in lines).encode()
    path.write_bytes(gzip.compress(content) if packed else content)
    return str(path)


def dump(folder, rows=None, titles=None, form="2018", packed=False, more_reviews=(), more_items=()):
    """Write both files; returns the flags that name them."""
    folder.mkdir(parents=True, exist_ok=True)
    rows, titles = log() if rows is None else rows, catalogue() if titles is None else titles
    end = ".gz" if packed else ""
    reviews = [review_line(form, *row) for row in rows] + list(more_reviews)
    items = [item_line(form, *pair) for pair in titles.items()] + list(more_items)
    return {
        "dataset": "toy",
        "metadata_file": write(folder / f"meta.json{end}", items, packed),
        "reviews_file": write(folder / f"reviews.json{end}", reviews, packed),
        "output_path": str(folder / "out"),
        "user_k": 2,
        "item_k": 2,
    }


GOOD = {"reviewerID": "U0", "asin": "I0", "unixReviewTime": START, "overall": 5.0}
GOOD_2023 = {"user_id": "U0", "parent_asin": "I0", "timestamp": START * 1000, "rating": 5.0}
