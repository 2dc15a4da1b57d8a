"""Item texts, TF-IDF embeddings, the sentence encoder, and the embedding file with its ids."""

import json
from itertools import pairwise

import numpy as np
import pytest

from minionerec.common.embeddings import load_embeddings, save_embeddings, side_file_path
from minionerec.common.files import InputError
from minionerec.common.texts import clean_text
from rq.settings import EmbedFlags
from rq.text2emb.amazon_text2emb import drop_words, embed_items, join_fields
from rq.text2emb.tfidf_fit import fit_tfidf, load_fit

WORDS = "red blue green small large steel wood glass saw drill screw nail".split()


def embed(texts, dim, seed):
    """TF-IDF embeddings of texts."""
    return fit_tfidf([str(number) for number in range(len(texts))], texts, dim, seed)[1]


def items(n=40):
    random = np.random.default_rng(0)
    return {
        str(i): {
            "title": " ".join(random.choice(WORDS, 3)),
            "description": f"['{random.choice(WORDS)} tool', 'b']",
            "brand": "",
            "categories": "",
        }
        for i in range(n)
    }


def write_items(folder, n=40):
    (folder / "toy.item.json").write_text(json.dumps(items(n)))
    return {"dataset": "toy", "root": str(folder)}


@pytest.mark.parametrize(
    "value, text",
    [
        ("a  b\n c", "a b c"),
        ("['one', 'two <br> three']", "one two three"),
        (["x", "y"], "x y"),
        ("[broken", "[broken"),
        ("[not, a literal]", "[not, a literal]"),
        ("", ""),
        (None, ""),
        ("[]", ""),
        ("5 < 6 &amp; 7 > 2", "5 < 6 & 7 > 2"),
        ("<b>bold</b> it", "bold it"),
    ],
)
def test_clean(value, text):
    assert clean_text(value) == text


def test_item_texts_join_what_is_there():
    table = {"0": {"title": "A", "description": ""}, "1": {"title": "B", "description": "['c']", "brand": "d"}}
    assert join_fields(table, ["title", "description"]) == ["A", "B c"]
    assert join_fields(table, ["brand", "title"]) == ["A", "d B"]


def test_tfidf_is_the_plain_latent_semantic_analysis():
    """With all components kept, cosine similarities equal those of the TF-IDF rows, computed here by hand."""
    texts = [
        "saw drill",
        "drill saw saw",
        "nail screw",
        "screw nail drill",
        "saw nail",
        "screw drill nail nail",
        "saw drill",
    ]
    terms = sorted({term for text in texts for term in grams(text)})
    terms = [term for term in terms if sum(term in grams(text) for text in texts) >= 2]
    counts = np.array([[grams(text).count(term) for term in terms] for text in texts], dtype=float)
    weight = np.log((1 + len(texts)) / (1 + (counts > 0).sum(0))) + 1
    matrix = np.where(counts > 0, 1 + np.log(np.maximum(counts, 1)), 0) * weight
    matrix /= np.linalg.norm(matrix, axis=1, keepdims=True)
    left, values, _ = np.linalg.svd(matrix, full_matrices=False)
    kept = min(matrix.shape) - 1
    reduced = left[:, :kept] * values[:kept]
    reduced /= np.linalg.norm(reduced, axis=1, keepdims=True)
    fast = embed(texts, 99, seed=0)
    assert fast.shape == (7, kept)
    np.testing.assert_allclose(fast @ fast.T, reduced @ reduced.T, atol=1e-5)
    np.testing.assert_allclose(fast[0], fast[6], atol=1e-6)


def grams(text):
    words = text.split()
    return words + [f"{a} {b}" for a, b in pairwise(words)]


def test_tfidf_is_deterministic_and_capped():
    texts = join_fields(items(), ["title", "description"])
    one, two = embed(texts, 8, 42), embed(texts, 8, 42)
    assert one.shape == (40, 8) and one.dtype == np.float32 and np.array_equal(one, two)
    np.testing.assert_allclose(np.linalg.norm(one, axis=1), 1, atol=1e-5)
    assert embed(["red saw", "blue drill"], 64, 0).shape == (2, 1)
    for texts in (["", ""], ["red"], ["!"]):
        with pytest.raises(InputError):
            embed(texts, 4, 0)


def test_command_writes_embeddings_with_their_ids_once(tmp_path, capsys):
    flags = write_items(tmp_path)
    embed_items(EmbedFlags(**flags, dim=6))
    path = tmp_path / "toy.emb-tfidf-td.npy"
    array, ids = load_embeddings(path)
    assert array.shape == (40, 6) and array.dtype == np.float32 and ids == [str(i) for i in range(40)]
    described = json.loads(side_file_path(path).read_text())
    assert described["encoder"] == "tfidf" and described["text_fields"] == ["title", "description"]
    time = path.stat().st_mtime_ns
    embed_items(EmbedFlags(**flags, dim=6))
    assert "already done" in capsys.readouterr().out and path.stat().st_mtime_ns == time
    embed_items(EmbedFlags(**flags, dim=6, force=True))
    assert path.stat().st_mtime_ns != time
    embed_items(EmbedFlags(**flags, dim=5))
    assert load_embeddings(path)[0].shape == (40, 5)


def test_a_plain_hugging_face_folder_is_mean_pooled(tmp_path):
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    folder = tmp_path / "encoder"
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", *WORDS, "tool", "b"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        model_max_length=64,
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    model = BertModel(
        BertConfig(
            vocab_size=len(vocabulary),
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            max_position_embeddings=64,
        )
    ).eval()
    model.save_pretrained(folder)
    flags = write_items(tmp_path, n=5)
    options = {"plm_name": "tiny", "plm_checkpoint": str(folder), "batch_size": 2, "max_sent_len": 4, "device": "cpu"}
    embed_items(EmbedFlags(**flags, **options))
    array, ids = load_embeddings(tmp_path / "toy.emb-tiny-td.npy")
    assert array.shape == (5, 16) and len(ids) == 5
    for row, text in zip(array, join_fields(items(5), ["title", "description"]), strict=True):
        tokens = tokenizer(text, truncation=True, max_length=4, return_tensors="pt")
        with torch.no_grad():
            hidden = model(tokens["input_ids"], attention_mask=tokens["attention_mask"]).last_hidden_state[0]
        np.testing.assert_allclose(row, hidden.mean(0).numpy(), atol=1e-5)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"plm_name": "qwen"}, "--plm_checkpoint must name"),
        ({"plm_name": "tfidf", "plm_checkpoint": "x"}, "tfidf takes no --plm_checkpoint"),
        ({"dim": 0}, "--dim"),
        ({"word_drop_ratio": 1.0}, "--word_drop_ratio 1.0: expected a number below 1"),
        ({"text_fields": ["colour"]}, "--text_fields colour"),
        ({"dataset": "none"}, "none.item.json"),
    ],
)
def test_command_refuses_wrong_flags(tmp_path, changes, message):
    with pytest.raises(InputError) as error:
        embed_items(EmbedFlags(**{**write_items(tmp_path), **changes}))
    assert message in str(error.value)


def test_words_are_dropped_at_random(tmp_path):
    texts = [" ".join(map(str, range(1000))), "one"]
    assert drop_words(texts, -1.0, 42) == texts == drop_words(texts, 0.0, 42)
    dropped = drop_words(texts, 0.3, 42)
    words = dropped[0].split()
    assert 600 < len(words) < 800 and words == [word for word in texts[0].split() if word in set(words)]
    assert drop_words(texts, 0.3, 42) == dropped != drop_words(texts, 0.3, 43)
    flags = write_items(tmp_path)
    embed_items(EmbedFlags(**flags, dim=6))
    whole = load_embeddings(tmp_path / "toy.emb-tfidf-td.npy")[0]
    embed_items(EmbedFlags(**flags, dim=6, word_drop_ratio=0.5))
    assert not np.allclose(load_embeddings(tmp_path / "toy.emb-tfidf-td.npy")[0], whole)


def test_an_encoder_without_a_name_is_qwen(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no model folder"):
        embed_items(EmbedFlags(**write_items(tmp_path), plm_checkpoint=str(tmp_path / "empty")))
    assert (tmp_path / "toy.emb-qwen-td.stage.json").is_file()


def test_a_missing_encoder_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(InputError, match="^[^\n]*no model folder[^\n]*$"):
        embed_items(EmbedFlags(**write_items(tmp_path), plm_name="x", plm_checkpoint=str(empty)))


def saved(folder, array=None, ids=None):
    path = folder / "toy.emb-x-td.npy"
    array = np.arange(12, dtype=np.float32).reshape(4, 3) if array is None else array
    save_embeddings(path, array, ids or ["3", "1", "0", "2"], "x", ["title"])
    return path


def test_row_order_is_what_the_side_file_says(tmp_path):
    array, ids = load_embeddings(saved(tmp_path))
    assert ids == ["3", "1", "0", "2"] and array[2].tolist() == [6, 7, 8]


def test_bad_embedding_files(tmp_path):
    def check(path, message):
        with pytest.raises(InputError) as error:
            load_embeddings(path)
        assert message in str(error.value)

    holed = np.zeros((4, 3), dtype=np.float32)
    holed[2, 1] = np.nan
    check(saved(tmp_path, holed), "row 2: a value is not finite")
    check(saved(tmp_path, ids=["0", "1", "2"]), "3 item ids for the 4 rows")
    check(saved(tmp_path, ids=["0", "1", "1", "2"]), "item 1 is named by more than one row")
    check(saved(tmp_path, np.zeros(4, dtype=np.float32)), "expected a 2-D array")
    path = saved(tmp_path)
    side_file_path(path).write_text('["0", "1", "2", "3"]')
    check(path, 'expected an object with a list "item_ids"')
    side_file_path(path).write_text("{")
    check(path, "not valid JSON")
    side_file_path(path).unlink()
    check(path, "it names the item of each row")
    path.write_bytes(b"not an array")
    check(path, "not a .npy array")
    np.save(path, np.array([{"a": 1}]), allow_pickle=True)
    check(path, "not a .npy array")
    check(tmp_path / "none.npy", "no such file")


def test_added_items_are_embedded_with_the_fit_of_the_old_ones(tmp_path, capsys):
    flags = write_items(tmp_path, 40)
    embed_items(EmbedFlags(**flags, dim=8))
    path = tmp_path / "toy.emb-tfidf-td.npy"
    old, described = np.load(path), json.loads(path.with_suffix(".json").read_text())
    fit = load_fit(path.with_suffix(".fit.npz"))
    assert described["fit"] == fit.name and len(fit.texts) == 40
    texts = join_fields(items(40), ["title", "description"])
    np.testing.assert_allclose(fit.embed(texts), old, atol=1e-5)

    write_items(tmp_path, 60)
    embed_items(EmbedFlags(**flags, dim=8))
    grown = np.load(path)
    assert "20 items are new: embedded with the fit of the others" in capsys.readouterr().out
    assert grown.shape == (60, 8) and np.array_equal(grown[:40], old)
    new = fit.embed(join_fields(items(60), ["title", "description"]))[40:]
    assert np.array_equal(grown[40:], new) and np.abs(np.linalg.norm(new, axis=1) - 1).max() < 1e-5
    assert json.loads(path.with_suffix(".json").read_text())["fit"] == fit.name
    anew = fit_tfidf(["x"] * 60, join_fields(items(60), ["title", "description"]), 8, 42)[1]
    assert not np.allclose(anew[:40], old, atol=0.05)  # what fitting again would have done to the old items

    for changes in ({"refit": True, "force": True}, {"dim": 6}):
        embed_items(EmbedFlags(**{**flags, "dim": 8, **changes}))
        assert json.loads(path.with_suffix(".json").read_text())["fit"] != fit.name
    changed = items(60)
    changed["3"]["title"] = "another saw"
    (tmp_path / "toy.item.json").write_text(json.dumps(changed))
    embed_items(EmbedFlags(**flags, dim=6))
    assert "TF-IDF is fitted anew" in capsys.readouterr().out


@pytest.mark.parametrize("content", [b"", b"PK", b"no archive"])
def test_a_fit_that_is_cut_off_is_made_again(tmp_path, content):
    flags = write_items(tmp_path, 40)
    embed_items(EmbedFlags(**flags, dim=8))
    path = tmp_path / "toy.emb-tfidf-td.fit.npz"
    whole = path.read_bytes()
    path.write_bytes(content)
    assert load_fit(path) is None
    embed_items(EmbedFlags(**flags, dim=8, force=True))
    assert path.read_bytes() == whole
