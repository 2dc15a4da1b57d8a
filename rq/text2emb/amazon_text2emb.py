"""Item texts into embeddings: TF-IDF + truncated SVD, or any sentence-transformers or Hugging Face encoder.

python -m rq.text2emb.amazon_text2emb --dataset NAME --root DIR --plm_name tfidf
python -m rq.text2emb.amazon_text2emb --dataset NAME --root DIR --plm_name qwen --plm_checkpoint FOLDER
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from minionerec.common.cli import run
from minionerec.common.embeddings import save_embeddings, side_file_path
from minionerec.common.files import InputError
from minionerec.common.items import read_item_records
from minionerec.common.processes import is_main_process
from minionerec.common.stage import Stage
from minionerec.common.texts import clean_text

TEXT_FIELDS = ["title", "description"]


def item_texts(items: dict[str, dict], fields: list[str]) -> list[str]:
    """One text per item, its non-empty fields joined, in the order of `items`."""
    return [" ".join(filter(None, (clean_text(item.get(field)) for field in fields))) for item in items.values()]


def tfidf_embeddings(texts: list[str], dim: int, seed: int) -> np.ndarray:
    """float32 [N, min(dim, what the matrix allows)], rows of length 1 (0 for a text without any shared word).

    TF-IDF over words and word pairs with sublinear counts, then truncated SVD (latent semantic analysis, Deerwester et
    al. 1990). Terms of a single item say nothing about its neighbours and are left out, unless all terms are such.
    """
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.preprocessing import normalize

    for least in (2, 1):
        try:
            matrix = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, min_df=least).fit_transform(texts)
            break
        except ValueError:
            continue
    else:
        raise InputError("the item texts hold no words")
    # The last singular direction needs no room for oversampling: the solver takes at most one fewer than either side.
    most = min(matrix.shape) - 1
    if most < 1:
        raise InputError(f"{matrix.shape[0]} items x {matrix.shape[1]} terms are too few for a TF-IDF embedding")
    reduced = TruncatedSVD(n_components=min(dim, most), random_state=seed).fit_transform(matrix)
    return normalize(reduced).astype(np.float32)


def encoder_embeddings(
    texts: list[str], checkpoint: str, max_sent_len: int, batch_size: int, device: str | None
) -> np.ndarray:
    """float32 [N, hidden size], pooled and normalised as the encoder's own sentence-transformers configuration says.

    A plain Hugging Face folder has no such configuration; sentence-transformers then takes the mean over tokens.
    """
    from sentence_transformers import SentenceTransformer

    try:
        model = SentenceTransformer(checkpoint, device=device)
    except (OSError, ValueError) as error:
        raise InputError(f"--plm_checkpoint {checkpoint}: cannot be loaded ({str(error).splitlines()[0]})") from None
    model.max_seq_length = min(max_sent_len, model.max_seq_length or max_sent_len)
    return model.encode(
        texts, batch_size=batch_size, show_progress_bar=is_main_process(), convert_to_numpy=True
    ).astype(np.float32)


def main(
    dataset: str,
    root: str,
    plm_name: str = "tfidf",
    plm_checkpoint: str | None = None,
    text_fields: list[str] | None = None,
    dim: int = 256,
    max_sent_len: int = 2048,
    batch_size: int = 64,
    device: str | None = None,
    seed: int = 42,
    force: bool = False,
) -> None:
    """Embed the items of ROOT/DATASET.item.json into ROOT/DATASET.emb-PLM_NAME-td.npy and its .json side file.

    plm_name: tfidf, or any name for the encoder of plm_checkpoint
    plm_checkpoint: sentence-transformers or Hugging Face folder, or hub name
    text_fields: item fields that make up the text; default title,description
    dim, seed: tfidf only, SVD components at most and its random start
    max_sent_len, batch_size, device: encoder only; tokens kept of a text, texts at a time, cuda or cpu (default: found)
    """
    settings = dict(locals())
    fields = text_fields or TEXT_FIELDS
    if (plm_checkpoint is None) != (plm_name == "tfidf"):
        raise InputError(
            f"--plm_name {plm_name}: "
            + (
                "tfidf takes no --plm_checkpoint"
                if plm_checkpoint
                else "--plm_checkpoint must name the encoder's folder"
            )
        )
    if dim < 1 or batch_size < 1 or max_sent_len < 1:
        raise InputError("--dim, --batch_size and --max_sent_len must be at least 1")
    item_file = Path(root) / f"{dataset}.item.json"
    output = Path(root) / f"{dataset}.emb-{plm_name}-td.npy"
    stage = Stage(
        "text2emb", settings, [item_file], [output, side_file_path(output)], output.with_suffix(".stage.json"), force
    )
    if stage.finished:
        return
    items = read_item_records(item_file)
    unknown = [field for field in fields if not any(field in item for item in items.values())]
    if unknown:
        raise InputError(f"--text_fields {','.join(unknown)}: no item of {item_file} has it")
    texts = item_texts(items, fields)
    empty = sum(not text for text in texts)
    if plm_name == "tfidf":
        array = tfidf_embeddings(texts, dim, seed)
    else:
        array = encoder_embeddings(texts, plm_checkpoint, max_sent_len, batch_size, device)
    if not np.isfinite(array).all():
        raise InputError(f"{plm_checkpoint}: the encoder gave values that are not finite")
    save_embeddings(output, array, list(items), plm_checkpoint or plm_name, fields)
    stage.done(items=len(array), dim=array.shape[1], items_without_text=empty)


if __name__ == "__main__":
    run(main)
