"""The token rows of semantic IDs: adding them to a model, and where they start in embedding space."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from sklearn.decomposition import TruncatedSVD
from transformers import (
    AddedToken,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from minionerec.common.texts import join_item_texts
from minionerec.common.tfidf import compute_tfidf

COMPONENTS = 128  # of latent semantic analysis
# How much of a new row's spread is direction, where there is one; the rest is noise, so that no two rows are equal.
DIRECTED_SHARE = 0.95


def _sid_sort_key(token: str) -> tuple:
    """Sorts <a_2> before <a_10>: by level, then by number."""
    match = re.fullmatch(r"<(\D*?)_?(\d*)>", token)
    level, number = match.groups() if match else (token, "")
    return level, int(number or 0), token


def extend_tokenizer(tokenizer: PreTrainedTokenizerBase, tokens: Iterable[str]) -> set[int]:
    """Make every SID token one token of the tokenizer, wherever it stands in a text.

    The vocabulary says what is new, and not what adding a token answers: a token that is there already, as in a
    published checkpoint, counts as added where only its properties differ.

    Returns:
        The ids of the tokens that the vocabulary did not have.
    """
    wanted = sorted(set(tokens), key=_sid_sort_key)
    known = tokenizer.get_vocab()
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in wanted if token not in known])
    # A token of a learned vocabulary may be there and yet never come out whole.
    vocabulary = tokenizer.get_vocab()
    torn = [
        token
        for token, ids in zip(wanted, tokenizer(wanted, add_special_tokens=False).input_ids, strict=True)
        if ids != [vocabulary[token]]
    ]
    if torn:
        tokenizer.add_tokens([AddedToken(token, normalized=False) for token in torn])
    return {vocabulary[token] for token in wanted if token not in known}


def add_sid_tokens(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tokens: Iterable[str],
    seed: int,
    spread: float = 0.1,
    directions: dict[str, np.ndarray] | None = None,
) -> int:
    """Give every SID token a row of its own.

    New rows start at the mean of the old ones plus noise of `spread` times their standard deviation. Rows that a
    token had before stay as they are. New are the rows of tokens that the vocabulary did not have, of which a
    vocabulary padded beyond the tokenizer takes some, and those of tokens past the end of the embedding, as where
    somebody extended the tokenizer and not the weights.

    Args:
        model, tokenizer: changed in place.
        tokens: the SID tokens.
        seed: of the noise.
        spread: of the noise.
        directions: {token: vector [hidden]} of standard deviation 1 over all tokens (`compute_code_directions`), by
            which the noise is then mostly replaced.

    Returns:
        How many of the tokens got a new row.
    """
    before = set(tokenizer.get_vocab().values())
    rows = model.get_input_embeddings().weight.shape[0]
    added = extend_tokenizer(tokenizer, tokens)
    vocabulary = tokenizer.get_vocab()
    new = sorted(added | {number for number in vocabulary.values() if number >= rows})
    if not new:
        return 0
    if max(new) >= rows:
        model.resize_token_embeddings(max(new) + 1, mean_resizing=False)
    old_ids = [number for number in sorted(before) if number < rows]
    # Nearly always the first ones: a view then, as the rows may be a gigabyte.
    old_rows = slice(len(old_ids)) if old_ids == list(range(len(old_ids))) else old_ids
    generator = torch.Generator().manual_seed(seed)
    names = {number: token for token, number in vocabulary.items()}
    directed = None
    if directions:
        zero = np.zeros_like(next(iter(directions.values())))
        directed = torch.from_numpy(np.stack([directions.get(names.get(number, ""), zero) for number in new]))
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    for layer in [model.get_input_embeddings()] + ([] if tied else [model.get_output_embeddings()]):
        with torch.no_grad():
            old = layer.weight[old_rows]
            noise = torch.randn(len(new), old.shape[1], generator=generator).to(old)
            if directed is not None:
                noise = DIRECTED_SHARE * directed.to(old) + (1 - DIRECTED_SHARE**2) ** 0.5 * noise
            layer.weight[new] = old.mean(dim=0) + spread * old.std(dim=0) * noise
    return sum(number in set(new) for number in {vocabulary[token] for token in tokens})


def compute_tfidf_vectors(texts: Sequence[str], width: int, seed: int) -> np.ndarray:
    """Latent semantic analysis of texts (Deerwester et al. 1990), randomly rotated into `width` dimensions.

    For a model without any knowledge of words: its dimensions mean nothing yet, but like items get like vectors.

    Returns:
        float64 [N, width]; all zeros if the texts have too few words in common.
    """
    table = compute_tfidf(texts)
    components = min(COMPONENTS, width, *(size - 1 for size in table.shape))
    if components < 1:
        return np.zeros((len(texts), width))
    with np.errstate(invalid="ignore"):  # where all texts are alike it divides by a variance of zero
        vectors = TruncatedSVD(components, random_state=seed).fit_transform(table)
    vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-9)
    rotation, _ = np.linalg.qr(np.random.default_rng(seed).standard_normal((width, width)))
    return vectors @ rotation[:components]


def average_embeddings(texts: Sequence[str], model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """[N, hidden]: mean of the model's own embeddings of a text's tokens, rare tokens counting more (idf)."""
    rows = model.get_input_embeddings().weight.detach().float().cpu().numpy()
    tokens = [np.unique(ids) for ids in tokenizer(list(texts), add_special_tokens=False).input_ids]
    times = np.bincount(np.concatenate(tokens).astype(np.int64), minlength=len(rows))
    weight = np.log(len(texts) / np.maximum(times, 1) + 1)
    vectors = np.zeros((len(texts), rows.shape[1]))
    for text, ids in enumerate(tokens):
        if len(ids):
            vectors[text] = np.average(rows[ids], axis=0, weights=weight[ids])
    return vectors


def compute_code_directions(sids: Sequence[Sequence[str]], vectors: np.ndarray) -> dict[str, np.ndarray]:
    """{SID token: mean vector of the items that use it, less the mean of its level}, of standard deviation 1 in all.

    Empty if the vectors say nothing: all equal, or one code a level.

    Args:
        sids: SID tokens of each item. vectors [N, hidden]: of the same items.
    """
    users: dict[tuple[int, str], list[int]] = defaultdict(list)
    for item, sid in enumerate(sids):
        for level, token in enumerate(sid):
            users[level, token].append(item)
    means = {key: vectors[items].mean(axis=0) for key, items in users.items()}
    centre = {
        level: np.mean([mean for (other, _), mean in means.items() if other == level], axis=0)
        for level in {level for level, _ in means}
    }
    directions = {token: mean - centre[level] for (level, token), mean in means.items()}
    scale = np.stack(list(directions.values())).std()
    return {token: vector / scale for token, vector in directions.items()} if scale > 0 else {}


def compute_start_directions(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sids: Sequence[Sequence[str]],
    titles: Sequence[str],
    descriptions: Sequence[str],
    seed: int,
    from_scratch: bool,
) -> dict[str, np.ndarray]:
    """{SID token: direction} of what the items that use a token are about, see `compute_code_directions`.

    By the words' embeddings in a pretrained base; by latent semantic analysis of the words for a random model.

    Args:
        sids, titles, descriptions: of every item.
        seed: of the analysis.
        from_scratch: whether the model is random.
    """
    texts = join_item_texts(titles, descriptions)
    if from_scratch:
        vectors = compute_tfidf_vectors(texts, model.get_input_embeddings().weight.shape[1], seed)
    else:
        vectors = average_embeddings(texts, model, tokenizer)
    return compute_code_directions(sids, vectors)
