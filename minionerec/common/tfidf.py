"""TF-IDF vectors of item texts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import sparse
from sklearn.feature_extraction.text import TfidfVectorizer


def compute_tfidf(texts: Sequence[str]) -> sparse.csr_matrix:
    """TF-IDF vectors of texts, in rows of length 1.

    Words that only one text has are left out, and so are the most common English ones.

    Args:
        texts: N of them.

    Returns:
        float32 [N, words]; no column if no two texts share a word.
    """
    vectorizer = TfidfVectorizer(sublinear_tf=True, min_df=min(2, len(texts)), stop_words="english", dtype=np.float32)
    try:
        return vectorizer.fit_transform(texts)
    except ValueError:  # no word that two texts share
        return sparse.csr_matrix((len(texts), 0), dtype=np.float32)
