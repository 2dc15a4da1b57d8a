"""vLLM as an engine, with a stand-in for vLLM itself: the lists, draws and weights are those of the tree search."""

import importlib
import random
import re
import threading
from importlib.metadata import PackageNotFoundError
from types import SimpleNamespace

import pytest
import torch
from tiny import END, random_catalogue, random_prompts, tiny_model
from transformers import AutoModelForCausalLM, GPT2Config
from vllm_stand_in import MoveDirectionality, SamplingParams, install

import evaluate as evaluate_command
from benchmarks.textbook import PrefixDictionary
from evaluate import evaluate
from minionerec.common.files import InputError, read_json
from minionerec.common.records import read_info
from minionerec.engines import settings
from minionerec.engines.legal_tokens import mask_illegal
from minionerec.engines.prefix_scorer import collect_weights
from minionerec.engines.remote import RemoteEngine
from minionerec.engines.server import EngineServer
from minionerec.engines.settings import check_rollout_flags, check_vllm_flags
from minionerec.engines.vllm import VllmEngine, share_cores
from minionerec.evaluation.settings import EvaluateFlags, RecommendFlags
from minionerec.language.adapters import add_lora
from minionerec.search.beam_search import beam_search, sample
from minionerec.search.trie import SidTrie
from minionerec.training.settings import RLFlags
from recommend import recommend
from rl import rl


@pytest.fixture
def started(monkeypatch):
    """The engines that the stand-in has started."""
    return install(monkeypatch)


def save(model, folder):
    model.save_pretrained(folder)
    return str(folder)


def assert_same_search(engine, model, trie, prompts, beams, **options):
    tree, theirs = (beam_search(which, trie, prompts, beams, **options) for which in (model, engine))
    assert torch.equal(tree.sequence, theirs.sequence)
    torch.testing.assert_close(tree.score, theirs.score, atol=1e-4, rtol=0)


@pytest.mark.parametrize("seed", range(6))
def test_lists_and_draws_are_those_of_the_tree(started, tmp_path, seed):
    """Equal prompts, one item, mixed depths, wide levels, sub-tries, both kinds of score."""
    rng = random.Random(seed)
    kind, vocab = ("llama", "qwen2", "qwen3")[seed % 3], 400
    model = tiny_model(kind, vocab, seed)
    engine = VllmEngine(save(model, tmp_path), 100)
    size, codes = (1, 60, 900)[seed % 3], (9, 300)[seed // 3]  # a request asks for 128 tokens at most
    trie = SidTrie(random_catalogue(rng, size, rng.randint(1, 5), codes, vocab, seed % 2))
    prompts = random_prompts(rng, 3, vocab)
    prompts.append(prompts[0])
    numbers = range(trie.num_sequences)
    excluded = [rng.sample(numbers, trie.num_sequences // 2) for _ in prompts]
    assert_same_search(engine, model, trie, prompts, 12)
    assert_same_search(engine, model, trie, prompts, 12, renormalize=True, excluded=excluded)
    assert_same_search(engine, model, trie, prompts, 12, length_penalty=1.0, excluded=excluded)
    tree, theirs = (
        sample(which, trie, prompts, 12, 1.4, torch.Generator().manual_seed(seed)) for which in (model, engine)
    )
    assert torch.equal(tree.sequence, theirs.sequence)
    torch.testing.assert_close(tree.score, theirs.score, atol=1e-4, rtol=0)


def test_a_prefix_is_asked_for_once(started, tmp_path):
    """Draws of a prompt that go the same way are one request, and a wide level as many as it needs."""
    model = tiny_model("llama", 400)
    engine = VllmEngine(save(model, tmp_path), 100)
    trie = SidTrie([[token, END] for token in range(2, 302)])
    sample(engine, trie, [[3], [4]], 500, 1.0, torch.Generator().manual_seed(0))
    drawn = sample(model, trie, [[3], [4]], 500, 1.0, torch.Generator().manual_seed(0)).sequence
    assert started[0].requests == 2 * 3 + sum(len(set(row)) for row in drawn.tolist())


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("lora", [True, False])
def test_pushed_weights_are_used(started, tmp_path, tied, lora):
    rng = random.Random(0)
    model = tiny_model("qwen3", 60, tie_word_embeddings=tied)
    engine = VllmEngine(save(model, tmp_path), 100)
    trie, prompts = SidTrie(random_catalogue(rng, 60, 3, 9, 60, True)), random_prompts(rng, 3, 60)
    assert_same_search(engine, model, trie, prompts, 8)
    if lora:
        flags = SimpleNamespace(lora_rank=4, lora_alpha=8, lora_targets=None, lora_dropout=0.0)
        model = add_lora(model, range(2, 11), flags)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    names = {name for name, _ in model.named_parameters()}
    engine.load_policy(model)
    assert names == {name for name, _ in model.named_parameters()}  # merged on a copy
    assert ("lm_head.weight" in collect_weights(model)) != tied
    assert_same_search(engine, model, trie, prompts, 8)


# ------------------------------------------------------------------------------------------------------------- commands
def run_evaluation(trained, folder, **flags):
    folder.mkdir()
    names = ("train_file", "info_file", "test_data_path")
    evaluate(
        EvaluateFlags(
            base_model=trained.checkpoint,
            **{name: trained.paths[name] for name in names},
            result_json_data=str(folder / "test.json"),
            num_beams=20,
            sample=30,
            cutoff_len=256,
            **flags,
        )
    )
    return read_json(folder / "test.json"), read_json(folder / "test.metrics.json")


def test_evaluate(trained, started, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate_command, "draw_metrics", lambda *_: None)
    for number, options in enumerate((dict(exclude_seen=True), dict(renormalize=True, length_penalty=1.0))):
        tree = run_evaluation(trained, tmp_path / f"tree{number}", **options)
        ours = run_evaluation(
            trained, tmp_path / f"vllm{number}", engine="vllm", tensor_parallel_size=2, dtype="float32", **options
        )
        assert [row["predict"] for row in ours[0]] == [row["predict"] for row in tree[0]]
        for row, expected in zip(ours[0], tree[0], strict=True):
            assert row["score"] == pytest.approx(expected["score"], abs=1e-4)
        assert ours[1] == tree[1]
    assert len(started) == 2 and started[0].settings["tensor_parallel_size"] == 2
    assert started[0].settings["dtype"] == "float32"


DECIMAL = r"-?\d+\.\d+"


def test_recommend(trained, started, capsys):
    printed = []
    for engine in ("tree", "vllm"):
        capsys.readouterr()
        recommend(
            RecommendFlags(
                base_model=trained.checkpoint,
                info_file=trained.paths["info_file"],
                titles="number 7; number 12",
                exclude_seen=True,
                engine=engine,
            )
        )
        printed.append(capsys.readouterr().out)
    # A figure may be rounded the other way in its last digit.
    figures = list(zip(*(re.findall(DECIMAL, text) for text in printed), strict=True))
    assert len(figures) > 10
    for first, second in figures:
        assert abs(float(first) - float(second)) < 1.5 * 10 ** -len(first.partition(".")[2])
    assert re.sub(DECIMAL, "#", printed[0]) == re.sub(DECIMAL, "#", printed[1]) and len(started) == 1


def train(trained, output, **changes):
    flags = dict(
        model_path=trained.checkpoint,
        **{name: trained.paths[name] for name in ("train_file", "eval_file", "info_file")},
        output_dir=str(output),
        num_generations=4,
        train_batch_size=16,
        gradient_accumulation_steps=1,
        reward_type=["ranking"],
        max_steps=3,
        optim="sgd",  # AdamW makes whole steps of the rounding by which the two engines differ
        learning_rate=1.0,
        warmup_ratio=0.0,
        test_during_training=False,
    )
    rl(RLFlags(**{**flags, **changes}))
    before, after = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).state_dict()
        for path in (trained.checkpoint, output / "final_checkpoint")
    )
    assert max((after[name] - weight).abs().max() for name, weight in before.items()) > 1e-3
    return after


def assert_same_weights(first, second):
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "options",
    [
        dict(beam_search=False, temperature=1.5, dynamic_sampling=True),
        dict(renormalize=True, add_gt=True),
        dict(lora=True, lora_rank=2, beam_search=False, add_gt=True),
    ],
)
def test_rl_beside_the_training(trained, started, tmp_path, options):
    """The same rollouts, so the same weights; pushed before every rollout.

    Without a group that has an advantage the first gradient is rounding alone, which AdamW turns into whole steps.
    """
    expected = train(trained, tmp_path / "tree", **options)
    found = train(trained, tmp_path / "vllm", use_vllm=True, vllm_gpu_memory_utilization=0.25, **options)
    assert_same_weights(found, expected)
    assert [engine.pushes for engine in started] == [3]
    assert started[0].settings["gpu_memory_utilization"] == 0.25


@pytest.fixture
def served(trained, started):
    """The address of a server."""
    server = EngineServer(("127.0.0.1", 0), VllmEngine(trained.checkpoint, 256), trained.checkpoint)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def test_rl_with_a_server(trained, started, served, tmp_path):
    options = dict(beam_search=False, temperature=1.5, add_gt=True)
    expected = train(trained, tmp_path / "tree", **options)
    server = dict(use_vllm=True, vllm_mode="server", vllm_server_base_url=served)
    found = train(trained, tmp_path / "vllm", **server, **options)
    assert_same_weights(found, expected)
    assert [engine.pushes for engine in started] == [3]


def test_a_server_says_what_is_wrong_and_goes_on(served):
    engine = RemoteEngine(served)
    with pytest.raises(InputError, match="BASE_URL|--vllm_server_base_url.*KeyError"):
        engine._ask("/score", b"{}")
    with pytest.raises(InputError, match="expected /info"):
        engine._ask("/nothing")
    with pytest.raises(InputError, match="SafetensorError"):
        engine._ask("/weights", b"no weights", 10)
    assert engine.score_tokens([[3], [4, 5]], [[5, 6], [7]])[1][0] < 0
    with pytest.raises(InputError, match="serve_vllm starts a server"):
        RemoteEngine("http://127.0.0.1:9")


# -------------------------------------------------------------------------------------------------------- what is wrong
def test_a_missing_or_untested_version(monkeypatch, tmp_path):
    def missing(package):
        raise PackageNotFoundError(package)

    monkeypatch.setattr(settings, "version", missing)
    with pytest.raises(InputError, match="--engine vllm: vLLM is not installed"):
        check_vllm_flags(
            EvaluateFlags(base_model="x", info_file="x", test_data_path="x", result_json_data="x"), "vllm", None
        )
    install(monkeypatch, "0.19.1")
    with pytest.raises(InputError, match=r"vllm 0.19.1 is installed, but only 0.32.\* was tested"):
        VllmEngine(str(tmp_path), 100)


def test_a_model_that_vllm_does_not_have(started, tmp_path):
    config = GPT2Config(vocab_size=30, n_embd=16, n_layer=1, n_head=2, n_positions=64)
    path = save(AutoModelForCausalLM.from_config(config), tmp_path)
    with pytest.raises(InputError, match=r"vLLM cannot run .* \(Model architectures .'GPT2'. are not supported\)$"):
        VllmEngine(path, 100)


def test_prompts_that_are_too_long_and_foreign_tries(started, tmp_path):
    engine = VllmEngine(save(tiny_model("llama", 30, max_position_embeddings=64), tmp_path), 512)
    trie = SidTrie([[5, END], [6, END]])
    with pytest.raises(InputError, match="lower --cutoff_len"):
        beam_search(engine, trie, [[3] * 63], 2)
    with pytest.raises(ValueError, match="another tokenizer"):
        beam_search(engine, SidTrie([[35, END]]), [[3]], 2)
    with pytest.raises(ValueError, match="at least one token"):
        sample(engine, trie, [[3], []], 2)


@pytest.mark.parametrize(
    "flags, message",
    [
        (dict(tensor_parallel_size=2), "--tensor_parallel_size: has an effect with --engine vllm only"),
        (dict(engine="vllm", dtype="auto"), "--dtype auto: with --engine vllm name float32"),
        (dict(engine="vllm", tensor_parallel_size=0), "--tensor_parallel_size 0: must be at least 1"),
        (dict(engine="vllm", vllm_gpu_memory_utilization=1.5), "--vllm_gpu_memory_utilization 1.5: must be above 0"),
    ],
)
def test_flags_of_a_search_that_cannot_be(started, flags, message):
    flags = RecommendFlags(base_model="x", info_file="x", **flags)
    with pytest.raises(InputError, match=message):
        check_vllm_flags(flags, flags.engine, flags.dtype)


@pytest.mark.parametrize(
    "flags, world, message",
    [
        (dict(vllm_mode="server"), 1, "--vllm_mode: has an effect with --use_vllm True only"),
        (dict(use_vllm=True, vllm_mode="server"), 1, "needs --vllm_server_base_url"),
        (dict(use_vllm=True, vllm_server_base_url="x"), 1, "--use_vllm True --vllm_mode server only"),
        (
            dict(use_vllm=True, vllm_mode="server", vllm_server_base_url="x", vllm_tensor_parallel_size=2),
            1,
            "--vllm_tensor_parallel_size: has an effect with --use_vllm True --vllm_mode colocate only",
        ),
        (dict(use_vllm=True, rollout_dtype="float32"), 1, "--rollout_dtype: has no effect with --use_vllm True"),
        (dict(use_vllm=True, lora=True, load_in_4bit=True), 1, "not with --load_in_4bit True"),
        (dict(use_vllm=True), 2, "several training processes share one engine by --vllm_mode server"),
    ],
)
def test_flags_of_rollouts_that_cannot_be(started, monkeypatch, flags, world, message):
    monkeypatch.setattr(settings, "count_processes", lambda: world)
    flags = RLFlags(model_path="x", train_file="x", eval_file="x", info_file="x", output_dir="x", **flags)
    with pytest.raises(InputError, match=message):
        check_rollout_flags(flags, flags.rollout_dtype, flags.load_in_4bit)


def test_processes_on_a_cpu_share_its_cores(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {4, 0, 2, 7, 6}, raising=False)
    assert [share_cores(count) for count in (1, 2, 3)] == ["auto", "0,4,7|2,6", "0,6|2,7|4"]
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {3}, raising=False)
    assert share_cores(2) == "3|3"


# ----------------------------------------------------------------------------------------------------- served endpoints
@pytest.mark.parametrize("seed", range(5))
def test_legal_tokens_against_a_dictionary_of_prefixes(seed):
    rng = random.Random(seed)
    sequences = random_catalogue(rng, (1, 30, 200)[seed % 3], rng.randint(1, 5), 6, 30, seed % 2)
    allowed, trie = PrefixDictionary(sequences, 0).allowed, SidTrie(sequences)
    written = [rng.choice(sequences)[: rng.randint(0, trie.depth)] for _ in range(40)]
    tokens = torch.tensor([(tokens + [29] * trie.depth)[: trie.depth] for tokens in written])
    logits = torch.randn(40, 30)
    masked = logits.clone()
    mask_illegal(masked, trie, tokens, torch.tensor([len(tokens) for tokens in written]), END)
    for before, after, tokens in zip(logits, masked, written, strict=True):
        legal = sorted(allowed.get(tuple(tokens), {END}))
        assert torch.isfinite(after).nonzero().squeeze(1).tolist() == legal
        assert torch.equal(before[legal], after[legal])


@pytest.fixture
def processor_class(started):
    return importlib.import_module("minionerec.engines.logits_processor").SidLogitsProcessor


def configure(trained, **additional):
    return SimpleNamespace(additional_config=additional, model_config=SimpleNamespace(model=trained.checkpoint))


def test_the_logits_processor_follows_requests_through_the_batch(trained, processor_class):
    """V1: requests come, go, move and swap rows; each writes a SID of the catalogue, but the free one."""
    rng = random.Random(0)
    processor = processor_class(configure(trained, info_file=trained.paths["info_file"]), torch.device("cpu"), False)
    legal = {tuple(sequence) for sequence in processor.trie.sequences()}
    assert len(legal) == len(set(read_info(trained.paths["info_file"]).sids))
    rows, done, vocab = {}, [], 400
    for step in range(400):
        update = SimpleNamespace(removed=[], added=[], moved=[])
        for row, (written, free) in list(rows.items()):
            if len(written) == 6 if free else tuple(written) in legal:
                done += [] if free else [tuple(written)]
                update.removed.append(row)
                del rows[row]
        for row in range(4):
            if row not in rows and rng.random() < 0.5:
                free = rng.random() < 0.2
                params = SamplingParams(extra_args={"unconstrained": 1} if free else None)
                rows[row] = ([], free)
                update.added.append((row, params, [3], rows[row][0]))
        if rows and step % 3 == 0:
            source, target = rng.choice(sorted(rows)), rng.randrange(4)
            if source != target:
                kind = MoveDirectionality.SWAP if target in rows else MoveDirectionality.UNIDIRECTIONAL
                update.moved.append((source, target, kind))
                swapped = {target: rows.pop(source)} | ({source: rows.pop(target)} if target in rows else {})
                rows |= swapped
        processor.update_state(update if update.removed or update.added or update.moved else None)
        logits = processor.apply(torch.randn(4, vocab))
        for row, (written, free) in rows.items():
            assert torch.isfinite(logits[row]).all() == free
            written.append(int(logits[row].argmax()))
    assert len(done) > 50 and set(done) <= legal


def test_the_logits_processor_reads_the_slots_of_the_second_runner(trained, processor_class):
    """V2: rows of the step point to slots, in which the output stands behind the prompt."""
    rng, slots = random.Random(1), 6
    tokens, lengths = torch.zeros(slots, 40, dtype=torch.int32), torch.zeros(slots, dtype=torch.int32)
    states = SimpleNamespace(
        device=torch.device("cpu"),
        all_token_ids=SimpleNamespace(gpu=tokens),
        prompt_len=SimpleNamespace(gpu=lengths),
    )
    processor = processor_class(configure(trained, info_file=trained.paths["info_file"]), states)
    sequences = processor.trie.sequences()
    legal, finished = {tuple(sequence) for sequence in sequences}, 0
    for _ in range(10):
        free = rng.randrange(slots)
        for slot in range(slots):
            params = SamplingParams(extra_args={"unconstrained": 1} if slot == free else {})
            assert processor.add_request(slot, params) == (slot != free)
            lengths[slot] = rng.randint(1, 30)
        total = lengths.clone().long()
        running = list(range(slots))
        for _ in range(processor.trie.depth):
            rng.shuffle(running)
            mapping = torch.tensor(running)
            context = SimpleNamespace(expanded_idx_mapping=mapping, pos=total[mapping] - 1)
            logits = processor.apply(torch.randn(len(running), 400), context)
            for slot, row in zip(list(running), logits, strict=True):
                assert torch.isfinite(row).all() == (slot == free)
                tokens[slot, total[slot]] = row.argmax()
                total[slot] += 1
                if tuple(tokens[slot, lengths[slot] : total[slot]].tolist()) in legal:
                    running.remove(slot)
                    finished += 1
            if not running:
                break
        assert running in ([], [free])
    assert finished >= 10 * (slots - 1)


def test_the_logits_processor_needs_a_catalogue(trained, processor_class):
    with pytest.raises(ValueError, match="info_file"):
        processor_class(configure(trained), torch.device("cpu"), False)
    with pytest.raises(ValueError, match="0 or 1"):
        processor_class.validate_params(SamplingParams(extra_args={"unconstrained": 3}))
