"""What the prefixes of semantic IDs have in common: words, categories, example titles."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import sparse
from sklearn.feature_extraction.text import CountVectorizer

from minionerec.common.texts import clean_text, join_item_texts, list_categories

CATEGORIES = 3  # shown of a prefix
FEWEST_ITEMS = 2  # of the catalogue that must have a word; a word of one item tells nothing about others


def count_words(texts: Sequence[str]) -> tuple[sparse.csr_matrix, np.ndarray]:
    """(which words every text has: 0 or 1 [N, words], the words); those of fewer than two texts are left out."""
    vectorizer = CountVectorizer(
        binary=True,
        min_df=min(FEWEST_ITEMS, len(texts)),
        stop_words="english",
        token_pattern=r"(?u)\b[^\W\d_][\w'-]+\b",  # a word begins with a letter: numbers name sizes of everything
    )
    try:
        return vectorizer.fit_transform(texts).tocsr(), vectorizer.get_feature_names_out()
    except ValueError:  # no word that two texts share
        return sparse.csr_matrix((len(texts), 0)), np.array([], dtype=str)


def weigh_words(inside: np.ndarray, size: int, outside: np.ndarray, others: int) -> np.ndarray:
    """How telling words are for `size` items beside the other ones: share inside * log(share inside / share outside).

    That is a word's part in the Kullback-Leibler divergence of the two; shares are smoothed by half an item, so that a
    word which no other item has does not win by one occurrence.

    Args:
        inside: [words], items inside that have each word.
        size: items inside.
        outside: [words], other items that have it.
        others: how many other items there are.

    Returns:
        float64 [words]; 0 or less where a word is no more frequent inside.
    """
    share = inside / size
    smooth = (inside + 0.5) / (size + 1)
    elsewhere = (outside + 0.5) / (others + 1)
    return share * np.log(smooth / elsewhere)


def group_by_prefix(index: Mapping[int, Sequence[str]]) -> dict[tuple[str, ...], list[int]]:
    """{prefix: row numbers of the items below it} in the order of the tree, a prefix before what continues it."""
    groups: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for row, tokens in enumerate(index.values()):
        for length in range(1, len(tokens) + 1):
            groups[tuple(tokens[:length])].append(row)

    def place(prefix: tuple[str, ...]) -> list[tuple[str, int]]:
        # <a_10> stands behind <a_9>.
        return [(re.sub(r"\d+", "", token), int("0" + "".join(re.findall(r"\d", token)))) for token in prefix]

    return dict(sorted(groups.items(), key=lambda pair: place(pair[0])))


def explain_prefixes(
    index: Mapping[int, Sequence[str]], items: Mapping[int, Mapping[str, Any]], words: int, examples: int
) -> list[dict[str, Any]]:
    """What every prefix of an index stands for.

    Words of a prefix are compared with the items beside it, below the same parent: the first code says what a part of
    the catalogue is about, the second one what is special inside that part. A prefix without items beside it is
    compared with the whole catalogue.

    Args:
        index: {item: SID tokens}.
        items: {item: {"title", "description", "categories", ...}}, the same items.
        words: the most telling words of a prefix, at most.
        examples: titles of a prefix, at most: those with most of its words, then in the order of the index.

    Returns:
        In the order of the tree, of each `prefix`, `level` (from 1), `items` (how many), `words`, `categories`
        ([category, share of the items]) and `titles`.
    """
    rows = [items[item] for item in index]
    titles = [clean_text(row.get("title")) for row in rows]
    texts = join_item_texts(titles, [clean_text(row.get("description")) for row in rows])
    table, vocabulary = count_words(texts)
    totals = np.asarray(table.sum(axis=0)).ravel()
    categories = [list_categories(row.get("categories")) for row in rows]
    # The prefixes from the root to here, each with the words and the number of its items: an index has too many to keep
    # the words of all.
    path: list[tuple[tuple[str, ...], np.ndarray, int]] = [((), totals, len(rows))]
    explained = []
    for prefix, members in group_by_prefix(index).items():
        while path[-1][0] != prefix[: len(path[-1][0])]:
            path.pop()
        inside, size = np.asarray(table[members].sum(axis=0)).ravel(), len(members)
        _, around, total = path[-1] if path[-1][2] > size else path[0]
        path.append((prefix, inside, size))
        own = inside.nonzero()[0]
        weights = weigh_words(inside[own], size, around[own] - inside[own], total - size)
        best = [own[place] for place in np.argsort(-weights, kind="stable")[:words] if weights[place] > 0]
        fitting = np.asarray(table[members][:, best].sum(axis=1)).ravel() if best else np.zeros(size)
        shown = [titles[members[place]] for place in np.argsort(-fitting, kind="stable")]
        named = Counter(category for row in members for category in categories[row])
        explained.append(
            {
                "prefix": "".join(prefix),
                "level": len(prefix),
                "items": size,
                "words": [str(vocabulary[number]) for number in best],
                "categories": [[name, round(n / size, 4)] for name, n in named.most_common(CATEGORIES)],
                "titles": list(dict.fromkeys(title for title in shown if title))[:examples],
            }
        )
    return explained
