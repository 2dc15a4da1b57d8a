"""TF-IDF + truncated SVD of item texts, kept with its embeddings so that items added later are embedded alike.

A fit over a larger catalogue has other terms, weights and axes: old items would move, and codes trained on the old
embeddings would mean nothing. The fit is an .npz of plain arrays beside the embeddings.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from minionerec.common.files import InputError, atomic_write


@dataclass
class TfidfFit:
    """A fitted analysis.

    Attributes:
        terms: words and word pairs. idf: [terms], their weights. components: [dim, terms], the axes.
        settings: what it was fitted with, as one text.
        texts: {item id: hash of its text} of the items that it was fitted on.
    """

    terms: np.ndarray
    idf: np.ndarray
    components: np.ndarray
    settings: str
    texts: dict[str, str]

    @property
    def name(self) -> str:
        """16 hexadecimal digits that tell this fit from others."""
        digest = hashlib.blake2b(digest_size=8)
        for array in (self.idf, self.components):
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """float32 [N, dim], rows of length 1 (0 for a text without any of the terms)."""
        from sklearn.preprocessing import normalize

        vectorizer = _build_vectorizer(vocabulary={term: column for column, term in enumerate(self.terms.tolist())})
        vectorizer.idf_ = self.idf
        return normalize(vectorizer.transform(texts) @ self.components.T).astype(np.float32)

    def covers(self, item_ids: Sequence[str], texts: Sequence[str], settings: str) -> bool:
        """Whether the items are those of the fit with their texts unchanged, and perhaps more, at the same settings."""
        now = dict(zip(item_ids, map(hash_text, texts), strict=True))
        return settings == self.settings and all(now.get(item) == text for item, text in self.texts.items())

    def save(self, path: str | Path) -> None:
        """Write it as .npz."""
        about = json.dumps({"settings": self.settings, "texts": self.texts})
        with atomic_write(path) as temporary, temporary.open("wb") as file:
            np.savez_compressed(file, terms=self.terms, idf=self.idf, components=self.components, about=np.array(about))


def _build_vectorizer(**options):
    from sklearn.feature_extraction.text import TfidfVectorizer

    return TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, **options)


def hash_text(text: str) -> str:
    """16 hexadecimal digits that tell a text."""
    return hashlib.blake2b(text.encode("utf-8"), digest_size=8).hexdigest()


def fit_tfidf(
    item_ids: Sequence[str], texts: list[str], dim: int, seed: int, settings: str = ""
) -> tuple[TfidfFit, np.ndarray]:
    """TF-IDF over words and word pairs with sublinear counts, then truncated SVD.

    Latent semantic analysis (Deerwester et al. 1990). Terms of a single item say nothing about its neighbours and are
    left out, unless all terms are such.

    Returns:
        The fit, and float32 [N, min(dim, what the matrix allows)], rows of length 1 (0 for a text without any shared
        word).

    Raises:
        InputError: no words, or too few for an embedding.
    """
    from sklearn.decomposition import TruncatedSVD
    from sklearn.preprocessing import normalize

    for min_df in (2, 1):
        vectorizer = _build_vectorizer(min_df=min_df)
        try:
            matrix = vectorizer.fit_transform(texts)
            break
        except ValueError:
            continue
    else:
        raise InputError("the item texts hold no words")
    # The solver takes at most one component fewer than either side of the matrix.
    most = min(matrix.shape) - 1
    if most < 1:
        raise InputError(f"{matrix.shape[0]} items x {matrix.shape[1]} terms are too few for a TF-IDF embedding")
    solver = TruncatedSVD(n_components=min(dim, most), random_state=seed)
    reduced = solver.fit_transform(matrix)
    hashes = dict(zip(item_ids, map(hash_text, texts), strict=True))
    fit = TfidfFit(
        np.array(vectorizer.get_feature_names_out(), dtype=str),
        vectorizer.idf_,
        solver.components_.astype(np.float32),
        settings,
        hashes,
    )
    return fit, normalize(reduced).astype(np.float32)


def load_fit(path: str | Path) -> TfidfFit | None:
    """The fit of a file; None where there is none, or none that is whole."""
    if not Path(path).is_file():
        return None
    try:
        with np.load(path, allow_pickle=False) as content:
            about = json.loads(str(content["about"]))
            fit = TfidfFit(content["terms"], content["idf"], content["components"], about["settings"], about["texts"])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    fits = fit.terms.ndim == fit.idf.ndim == 1 and fit.components.ndim == 2 and isinstance(fit.texts, dict)
    return fit if fits and len(fit.terms) == len(fit.idf) == fit.components.shape[1] else None
