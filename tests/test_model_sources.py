"""What people bring as a model: each is loaded as it should be, or refused in one line that says what to do."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from minionerec.common.files import InputError
from minionerec.common.records import Catalogue
from minionerec.language.catalogue_trie import build_catalogue_trie, check_token_rows
from minionerec.language.model_checks import limit_length
from minionerec.language.models import load_model, load_tokenizer, train_tokenizer
from minionerec.language.prompts import TASK_FIELDS, Encoder, load_prompts
from minionerec.language.sid_tokens import add_sid_tokens, extend_tokenizer
from minionerec.search.attention_check import check_trees

SIDS = [f"<a_{n % 4}><b_{n // 4}>" for n in range(12)]
TOKENS = sorted({token for sid in SIDS for token in sid.replace("><", "> <").split()})
TEXTS = [f"### Chosen so far:\nItem A number {n}, Thing {n}\n### Next code:\n### Its title:\n" for n in range(40)]
SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 988097824\n"


def build(kind="llama", rows=None, tokenizer=None, **settings):
    tokenizer = tokenizer or train_tokenizer(TEXTS, 350)
    sizes = SMALL | {"intermediate_size": 32, "vocab_size": rows or len(tokenizer)} | settings
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes)), tokenizer


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a small whole model."""
    folder = tmp_path_factory.mktemp("model")
    model, tokenizer = build()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def change_config(**changes):
    def change(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))

    return change


def cut(name, share):
    def change(folder):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: int(len(content) * share)])

    return change


def write(name, text):
    return lambda folder: (folder / name).write_text(text)


def remove(*names):
    return lambda folder: [(folder / name).unlink(missing_ok=True) for name in names]


def spoil_weight(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = float("inf")
    model.save_pretrained(folder)


def cut_bin(share):
    def change(folder):
        torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
        cut("pytorch_model.bin", share)(folder)

    return change


def in_parts(folder):
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")


TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


@pytest.mark.parametrize(
    "change, message",
    [
        (write("model.safetensors", POINTER), "model.safetensors: a git-lfs pointer .*git lfs pull"),
        (write("tokenizer.json", POINTER), "tokenizer.json: a git-lfs pointer"),
        (write("config.json", POINTER), "config.json: a git-lfs pointer"),
        (cut("model.safetensors", 0.5), "model.safetensors: cut off or damaged"),
        (cut("model.safetensors", 0.99), "model.safetensors: cut off or damaged"),
        (cut("model.safetensors", 0), "model.safetensors: cut off or damaged"),
        (cut("config.json", 0.5), "config.json, line .*: not valid JSON"),
        (cut("config.json", 0), "config.json: the file is empty"),
        (write("config.json", "[]"), "config.json: expected an object"),
        (write("config.json", "{}"), "config.json: .* no model_type"),
        (cut("tokenizer.json", 0.5), "tokenizer.json, line .*: not valid JSON"),
        (cut("tokenizer_config.json", 0.5), "tokenizer_config.json, line .*: not valid JSON"),
        (write("special_tokens_map.json", POINTER), "special_tokens_map.json: a git-lfs pointer"),
        (write("tokenizer.json", "<!DOCTYPE html>\n<html>"), "tokenizer.json: a web page"),
        (cut_bin(0.5), "pytorch_model.bin: cut off or damaged"),
        (cut_bin(0), "pytorch_model.bin: cut off or damaged"),
        (in_parts, "in parts, but model.safetensors.index.json, which lists them, is missing"),
        (remove("config.json"), "no model folder, it has no config.json"),
        (remove("model.safetensors"), "no weights there"),
        (remove(*TOKENIZER_FILES), "no tokenizer there"),
        (change_config(vocab_size=9), "have another shape than its config says"),
        (change_config(num_hidden_layers=3), "lack weights of its config: .*layers.1.*and .* more"),
        (change_config(model_type="nonsense"), "cannot be used as"),
        (change_config(quantization_config={"quant_method": "gptq", "bits": 4}), "quantised with gptq, which needs"),
        (write("model.safetensors.index.json", '{"weight_map": {"x": "model-2.safetensors"}}'), "model-2.safetensors"),
        (spoil_weight, "not finite .*up_proj.weight"),
    ],
)
def test_what_is_wrong_with_a_folder_is_one_line(whole, tmp_path, change, message):
    folder = tmp_path / "model"
    shutil.copytree(whole, folder)
    change(folder)
    with pytest.raises(InputError, match=message) as error:
        load_model(str(folder), "base_model")
    assert len(str(error.value).splitlines()) == 1 and str(folder) in str(error.value)


def test_a_misspelt_folder_names_the_near_one_and_a_hub_name_without_hub_says_so(whole, tmp_path, monkeypatch):
    shutil.copytree(whole, tmp_path / "output" / "final_checkpoint")
    with pytest.raises(InputError, match="no such folder; did you mean .*final_checkpoint"):
        load_model(str(tmp_path / "output" / "final_checkpont"), "base_model")
    with pytest.raises(InputError, match="no config.json; did you mean .*final_checkpoint"):
        load_model(str(tmp_path / "output"), "base_model")
    monkeypatch.setattr("minionerec.common.model_sources._reach_hub", lambda: "the hub cannot be reached")
    for load in (load_model, load_tokenizer):
        with pytest.raises(InputError, match="no such model in the hub's cache, and the hub cannot be reached"):
            load("nobody/has-this", "base_model")


@pytest.mark.parametrize("own_rows", [False, True])
def test_an_adapter_is_merged_into_its_base(whole, tmp_path, capsys, own_rows):
    base, tokenizer = load_model(str(whole), "base_model")
    if own_rows:
        add_sid_tokens(base, tokenizer, TOKENS, 0)
    saved = ["embed_tokens", "lm_head"] if own_rows else None
    wrapped = get_peft_model(
        base, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=saved, task_type="CAUSAL_LM")
    )
    for name, weight in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    wrapped.peft_config["default"].base_model_name_or_path = str(whole)
    wrapped.save_pretrained(tmp_path / "adapter")
    if own_rows:
        tokenizer.save_pretrained(tmp_path / "adapter")
    ids = torch.tensor([[5, 6, 7, len(tokenizer) - 1]])
    expected = wrapped.eval()(ids).logits
    model, found = load_model(str(tmp_path / "adapter"), "base_model")
    assert "merged into its base" in capsys.readouterr().out and found.get_vocab() == tokenizer.get_vocab()
    assert type(model).__name__ == "LlamaForCausalLM"
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-5)
    assert all(weight.requires_grad for weight in model.parameters())  # peft freezes the base
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": ""}))
    with pytest.raises(InputError, match="does not name the model it belongs to"):
        load_model(str(tmp_path / "adapter"), "base_model")


def test_what_is_wrong_with_an_adapter_is_one_line(whole, tmp_path):
    base, tokenizer = load_model(str(whole), "base_model")
    wrapped = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    wrapped.peft_config["default"].base_model_name_or_path = str(whole)
    wrapped.save_pretrained(tmp_path / "adapter")

    def configure(**changes):
        def change(folder):
            config = folder / "adapter_config.json"
            config.write_text(json.dumps(json.loads(config.read_text()) | changes))

        return change

    changes = {
        "not here; name its place as base_model_name": configure(base_model_name_or_path="/models/gone"),
        "is an adapter itself": configure(base_model_name_or_path=str(tmp_path / "adapter")),
        "does not know": configure(peft_type="FUTURE"),
        r"size mismatch for .*lora_A": configure(r=4),  # a library's line that ends with a colon says nothing alone
        r"no weights there \(adapter_model.safetensors\)": remove("adapter_model.safetensors"),
        "adapter_model.safetensors: a git-lfs pointer": write("adapter_model.safetensors", POINTER),
        "adapter_config.json: a git-lfs pointer": write("adapter_config.json", POINTER),
        "adapter_model.safetensors: cut off": cut("adapter_model.safetensors", 0.5),
    }
    for number, (message, change) in enumerate(changes.items()):
        folder = tmp_path / str(number)
        shutil.copytree(tmp_path / "adapter", folder)
        change(folder)
        with pytest.raises(InputError, match=message) as error:
            load_model(str(folder), "base_model")
        assert len(str(error.value).splitlines()) == 1 and str(folder) in str(error.value)


# ------------------------------------------------------------------------------------------------- what a model can do
GPT = {"vocab_size": 100, "n_embd": 32, "n_layer": 1, "n_head": 2}


@pytest.mark.parametrize(
    "kind, settings, message",
    [
        ("llama", SMALL | {"intermediate_size": 32, "vocab_size": 100}, None),
        ("gpt2", GPT, None),
        ("opt", {**SMALL, "ffn_dim": 32, "vocab_size": 100, "word_embed_proj_dim": 32}, None),
        ("biogpt", {**SMALL, "intermediate_size": 32, "vocab_size": 100}, None),
        ("gpt_neox", {**SMALL, "intermediate_size": 32, "vocab_size": 100}, None),
        ("falcon", {**SMALL, "vocab_size": 100, "alibi": True}, "falcon"),
        (
            "mistral",
            {**SMALL, "intermediate_size": 32, "vocab_size": 100, "num_key_value_heads": 1},
            "sliding_attention",
        ),
        ("gemma2", {**SMALL, "intermediate_size": 32, "vocab_size": 100, "head_dim": 16}, "sliding_attention"),
    ],
)
def test_a_model_is_asked_whether_it_follows_prefix_trees(kind, settings, message):
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings), attn_implementation="sdpa")
    if message is None:
        check_trees(model)
        return
    with pytest.raises(ValueError, match=message):
        check_trees(model)


@pytest.mark.parametrize(
    "kind, settings, message",
    [
        ("bloom", {"vocab_size": 350, "hidden_size": 32, "n_layer": 1, "n_head": 2}, "no attention of the kind sdpa"),
        ("t5", {"vocab_size": 350, "d_model": 32, "num_layers": 1, "num_heads": 2}, "encoder beside its decoder"),
    ],
)
def test_architectures_that_cannot_work_are_named(whole, tmp_path, kind, settings, message):
    shutil.copytree(whole, tmp_path / "model")
    config = AutoConfig.for_model(kind, **settings)
    config.save_pretrained(tmp_path / "model")
    with pytest.raises(InputError, match=message) as error:
        load_model(str(tmp_path / "model"), "base_model")
    assert len(str(error.value).splitlines()) == 1


def test_the_longest_position_bounds_the_prompts(capsys):
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", **GPT, n_positions=64))
    assert limit_length(512, model) == 64 and "--cutoff_len 512 becomes 64" in capsys.readouterr().out
    assert limit_length(64, model) == 64 and limit_length(32, model) == 32
    assert limit_length(512, object()) == 512 and capsys.readouterr().out == ""


# ------------------------------------------------------------------------------------------------------------- new rows
@pytest.mark.parametrize("known", ["none", "plain", "special", "some", "tokenizer only", "padding token only"])
@pytest.mark.parametrize("padded", [0, 40])
def test_new_rows_are_those_that_vocabulary_or_embedding_lack(known, padded):
    tokenizer = train_tokenizer(TEXTS, 350)
    model, _ = build(tokenizer=tokenizer, rows=len(tokenizer) + padded)
    before = len(tokenizer)
    if known in ("plain", "special", "some", "tokenizer only"):
        tokenizer.add_tokens(TOKENS[: 3 if known == "some" else None], special_tokens=known == "special")
    if known == "padding token only":
        tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    if known in ("plain", "special", "some") and len(tokenizer) > before + padded:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    old = model.get_input_embeddings().weight.detach().clone()
    had = {token: number for token, number in tokenizer.get_vocab().items() if number < len(old)}
    new = add_sid_tokens(model, tokenizer, TOKENS, seed=0)
    rows, vocabulary = model.get_input_embeddings().weight.detach(), tokenizer.get_vocab()
    assert len(rows) == max(len(old), len(tokenizer)) and len(set(vocabulary.values())) == len(vocabulary)
    assert new == len(set(TOKENS) - set(had))
    kept = list(had.values())
    assert torch.equal(rows[kept], old[kept])
    fresh = [vocabulary[token] for token in TOKENS if token not in had]
    assert len(torch.unique(rows[fresh], dim=0)) == len(fresh)
    ids = tokenizer("so far:\n" + "".join(TOKENS), add_special_tokens=False).input_ids
    assert ids[-len(TOKENS) :] == [vocabulary[token] for token in TOKENS]
    assert add_sid_tokens(model, tokenizer, TOKENS, seed=1) == 0


def test_a_model_without_rows_for_the_catalogue_is_one_line():
    tokenizer = train_tokenizer(TEXTS, 350)
    model, _ = build(tokenizer=tokenizer)
    tokenizer.add_tokens(TOKENS)
    catalogue = Catalogue(SIDS, [""] * len(SIDS), list(range(len(SIDS))))
    trie = build_catalogue_trie(catalogue, Encoder(tokenizer, load_prompts("worded")), "cpu")
    with pytest.raises(InputError, match="the tokenizer was extended and the weights were not"):
        check_token_rows(trie, model, "x", "base_model")
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    check_token_rows(trie, model, "x", "base_model")


# ------------------------------------------------------------------------------------------------------------ encodings
def byte_tokenizer(start, end, closes=False):
    """Byte-level, with what it puts around a text."""
    special = [token for token in dict.fromkeys((start, end)) if token]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    around = f"{start} $A" if start else "$A"
    around += f" {end}" if closes else ""
    used = [(token, tokenizer.token_to_id(token)) for token in special]
    tokenizer.post_processor = processors.TemplateProcessing(single=around, special_tokens=used)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=start, eos_token=end)


def sentencepiece_tokenizer(style):
    """With a blank before every text: legacy (by the normalizer) as Llama 2, metaspace as newer ones."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    special = ["<unk>", "<s>", "</s>"] + [f"<0x{number:02X}>" for number in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator([line for text in TEXTS for line in text.split("\n")], trainer)
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] in special[:3]]
    if style == "legacy":
        blank = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
        content["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "\u2581"}, blank]}
        content["pre_tokenizer"] = None
    tokenizer = Tokenizer.from_str(json.dumps(content))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


TOKENIZERS = {
    "no start": lambda: byte_tokenizer(None, "<|end|>"),
    "start": lambda: byte_tokenizer("<s>", "</s>"),
    "start and end": lambda: byte_tokenizer("<s>", "</s>", closes=True),
    "start is the end token": lambda: byte_tokenizer("</s>", "</s>"),
    "start is the end token, at both ends": lambda: byte_tokenizer("</s>", "</s>", closes=True),
    "SentencePiece, legacy": lambda: sentencepiece_tokenizer("legacy"),
    "SentencePiece, metaspace": lambda: sentencepiece_tokenizer("metaspace"),
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_targets_are_encoded_where_they_stand(name):
    """Of every task: prompt and target together are what the tokenizer makes of the whole text."""
    tokenizer = TOKENIZERS[name]()
    extend_tokenizer(tokenizer, TOKENS)
    encoder = Encoder(tokenizer, load_prompts("worded"))
    start = [] if name == "no start" else [tokenizer.bos_token_id]
    assert encoder.start == start and encoder.end == [tokenizer.eos_token_id]
    shown = {"history": [SIDS[1], SIDS[7]], "sid": [SIDS[3]], "title": ["Thing 3"], "description": ["Item A"]}
    said = {"sid": SIDS[5], "title": "Item A number 0", "description": "a thing", "preference": "likes Item 3"}
    for task in encoder.prompts.templates:
        prompt_field, target_field = TASK_FIELDS[task]
        prompt = encoder.prompts.prompt(task, shown.get(prompt_field, ["likes Item 3"]))
        target = encoder.prompts.target(task, said[target_field])
        encoder.check_boundary(task, target)
        whole = tokenizer(prompt + target, add_special_tokens=False).input_ids
        ids = encoder.prompt_ids([prompt])[0] + encoder.target_ids(task, [target])[0]
        assert ids == [*start, *whole, tokenizer.eos_token_id], task
    assert encoder.target_ids("next_sid", SIDS) == encoder.sid_ids(SIDS)
