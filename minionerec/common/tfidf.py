"""TF-IDF vectors of item texts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import sparse
from sklearn.feature_extraction.text import TfidfVectorizer


def compute_tfidf(texts: Sequence[str]) -> sparse.csr_matrix:
    """[N, words] TF-IDF of texts, rows of length 1; words that only one text has are left out. No column if all are."""
    words = TfidfVectorizer(sublinear_tf=True, min_df=min(2, len(texts)), stop_words="english", dtype=np.float32)
    try:
        return words.fit_transform(texts)
    except ValueError:  # no word that two texts share
        return sparse.csr_matrix((len(texts), 0), dtype=np.float32)
