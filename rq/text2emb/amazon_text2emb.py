"""Item texts into embeddings: TF-IDF + truncated SVD, or any sentence-transformers or Hugging Face encoder.

python -m rq.text2emb.amazon_text2emb --dataset NAME --root DIR --plm_name tfidf
python -m rq.text2emb.amazon_text2emb --dataset NAME --root DIR --plm_name qwen --plm_checkpoint FOLDER
"""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

from minionerec.common.cli import parse_flags, run_command
from rq.settings import EmbedFlags

if __name__ == "__main__":
    # Before the imports below, which take seconds: --help and a wrong flag answer at once.
    FLAGS = parse_flags(EmbedFlags)

import numpy as np

from minionerec.common.embeddings import load_embeddings, save_embeddings, side_file_path
from minionerec.common.files import InputError
from minionerec.common.items import read_item_records
from minionerec.common.model_sources import check_model_source, translate_errors
from minionerec.common.processes import (
    computes_on_cpu,
    count_processes,
    get_rank,
    is_main_process,
    leave_others,
    say,
)
from minionerec.common.progress import ProgressBar
from minionerec.common.sharing import gather_on_main
from minionerec.common.stage import open_stage
from minionerec.common.texts import clean_text
from rq.text2emb.tfidf_fit import TfidfFit, fit_tfidf, load_fit

TEXT_FIELDS = ["title", "description"]


def join_fields(items: dict[str, dict], fields: list[str]) -> list[str]:
    """One text per item, its non-empty fields joined, in the order of `items`."""
    return [" ".join(filter(None, (clean_text(item.get(field)) for field in fields))) for item in items.values()]


def drop_words(texts: list[str], ratio: float, seed: int) -> list[str]:
    """The texts without a random share of their words; a ratio of 0 or less leaves them as they are."""
    if ratio <= 0:
        return texts
    draws = random.Random(seed)
    return [" ".join(word for word in text.split(" ") if draws.random() > ratio) for text in texts]


def embed_by_tfidf(
    item_ids: list[str], texts: list[str], flags: EmbedFlags, output: Path, fields: list[str]
) -> tuple[np.ndarray, TfidfFit]:
    """Embeddings by TF-IDF and truncated SVD, and the fit that gave them.

    Where the items only grew since the fit that lies beside `output`, that fit is used again: old items keep their
    rows to the last bit, so that an index made from them can take in the new ones.

    Returns:
        float32 [N, dim], rows of length 1 (0 for a text without any known word).
    """
    settings = json.dumps([flags.dim, flags.seed, fields, flags.word_drop_ratio])
    fit = None if flags.refit else load_fit(name_fit(output))
    if fit is None or not fit.covers(item_ids, texts, settings):
        if fit is not None:
            say(
                "[text2emb] texts or settings changed: TF-IDF is fitted anew, for which the index must be made anew too"
            )
        fit, array = fit_tfidf(item_ids, texts, flags.dim, flags.seed, settings)
        return array, fit
    array = fit.embed(texts)
    try:
        rows, ids = load_embeddings(output)
        old = dict(zip(ids, rows, strict=True)) if rows.shape[1] == array.shape[1] else {}
    except InputError:
        old = {}
    for row, item in enumerate(item_ids):
        if item in fit.texts and item in old:
            array[row] = old[item]
    new = sum(item not in fit.texts for item in item_ids)
    say(f"[text2emb] {new} items are new: embedded with the fit of the others ({name_fit(output).name}; --refit True)")
    return array, fit


def name_fit(output: Path) -> Path:
    """The file of the TF-IDF fit that belongs to an embedding file."""
    return output.with_suffix(".fit.npz")


def embed_by_encoder(
    texts: list[str], checkpoint: str, max_sent_len: int, batch_size: int, device: str | None
) -> np.ndarray | None:
    """Embeddings pooled and normalised as the sentence-transformers configuration of the encoder says.

    A plain Hugging Face folder has no such configuration; sentence-transformers then takes the mean over tokens.

    Args:
        texts: N texts.
        checkpoint: sentence-transformers or Hugging Face folder, or hub name.
        max_sent_len: tokens read of a text, at most.
        batch_size: texts read at a time.
        device: such as cuda:0 or cpu; None for what is there.

    Returns:
        float32 [N, hidden size] on the main process, None on the others.

    Raises:
        InputError: an encoder that cannot be loaded.
    """
    from sentence_transformers import SentenceTransformer

    if count_processes() > 1 or computes_on_cpu():
        from rq.index.codebook import pick_device

        device = str(pick_device(device))
    source = check_model_source(checkpoint, "plm_checkpoint")
    with translate_errors(checkpoint, "plm_checkpoint", "a text encoder"):
        model = SentenceTransformer(checkpoint, device=device, **source)
        tokenizer = model.tokenizer
        if tokenizer.pad_token is None:  # as of Llama; what fills a batch is masked, whichever token it is
            tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token or tokenizer.bos_token
        if tokenizer.pad_token is None:
            raise InputError(f"--plm_checkpoint {checkpoint}: its tokenizer has no token that could pad a batch")
    model.max_seq_length = min(max_sent_len, model.max_seq_length or max_sent_len)
    # Texts of like length share a batch. Processes share whole batches, so that no embedding depends on their number.
    order = sorted(range(len(texts)), key=lambda row: -len(texts[row]))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    arrays = []
    for number in ProgressBar(
        range(get_rank(), len(batches), count_processes()), unit="batches", shorter="--max_sent_len"
    ):
        part = [texts[row] for row in batches[number]]
        vectors = model.encode(part, batch_size=batch_size, show_progress_bar=False, convert_to_numpy=True)
        arrays.append((number, vectors.astype(np.float32)))
    arrays = [vectors for _, vectors in sorted(gather_on_main(arrays), key=lambda pair: pair[0])]
    if not is_main_process():
        return None
    whole = np.concatenate(arrays)
    return whole[np.argsort(order)]


def resolve_embed_flags(flags: EmbedFlags) -> EmbedFlags:
    """The flags with the name of the encoder worked out.

    Raises:
        InputError: tfidf with a checkpoint, an encoder without one, or a number out of range.
    """
    default = "tfidf" if flags.plm_checkpoint is None else "qwen"
    flags = replace(flags, plm_name=flags.plm_name or default)
    if flags.plm_name == "tfidf" and flags.plm_checkpoint is not None:
        raise InputError("--plm_name tfidf: tfidf takes no --plm_checkpoint")
    if flags.plm_name != "tfidf" and flags.plm_checkpoint is None:
        raise InputError(f"--plm_name {flags.plm_name}: --plm_checkpoint must name the encoder's folder")
    if min(flags.dim, flags.batch_size, flags.max_sent_len) < 1:
        raise InputError("--dim, --batch_size and --max_sent_len must be at least 1")
    if flags.word_drop_ratio >= 1:
        raise InputError(f"--word_drop_ratio {flags.word_drop_ratio}: expected a number below 1")
    return flags


def read_texts(flags: EmbedFlags, item_file: Path, fields: list[str]) -> tuple[list[str], list[str]]:
    """(item ids, one text per item) of an item file.

    Raises:
        InputError: a field that no item has.
    """
    items = read_item_records(item_file)
    missing = [field for field in fields if not any(field in item for item in items.values())]
    if missing:
        raise InputError(f"--text_fields {','.join(missing)}: no item of {item_file} has it")
    return list(items), drop_words(join_fields(items, fields), flags.word_drop_ratio, flags.seed)


def embed_items(flags: EmbedFlags) -> None:
    """Embed the items of ROOT/DATASET.item.json into ROOT/DATASET.emb-PLM_NAME-td.npy and its .json side file."""
    flags = resolve_embed_flags(flags)
    if flags.plm_name == "tfidf":
        leave_others()
    fields = flags.text_fields or TEXT_FIELDS
    item_file = Path(flags.root) / f"{flags.dataset}.item.json"
    output = Path(flags.root) / f"{flags.dataset}.emb-{flags.plm_name}-td.npy"
    stage = open_stage(
        "text2emb",
        flags,
        inputs=[item_file],
        outputs=[output, side_file_path(output), *([name_fit(output)] if flags.plm_name == "tfidf" else [])],
        record=output.with_suffix(".stage.json"),
    )
    if stage.finished:
        return
    item_ids, texts = read_texts(flags, item_file, fields)
    fit = None
    if flags.plm_name == "tfidf":
        array, fit = embed_by_tfidf(item_ids, texts, flags, output, fields)
    else:
        array = embed_by_encoder(texts, flags.plm_checkpoint, flags.max_sent_len, flags.batch_size, flags.device)
    if array is None:
        return
    if not np.isfinite(array).all():
        raise InputError(f"{flags.plm_checkpoint}: the encoder gave values that are not finite")
    save_embeddings(output, array, item_ids, flags.plm_checkpoint or flags.plm_name, fields, fit.name if fit else None)
    if fit:  # last: a fit without the embeddings that it gave would give others in the last bits
        fit.save(name_fit(output))
    stage.done(items=len(array), dim=array.shape[1], items_without_text=sum(not text for text in texts))


if __name__ == "__main__":
    run_command(embed_items, FLAGS, shared=True)
