"""vLLM itself on the CPU against the tree search: `bash scripts/test_vllm.sh` makes the environment and runs this."""

import json
import os
import random
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_vllm import assert_same_search, assert_same_weights, save, train
from tiny import END, random_catalogue, random_prompts, tiny_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GPT2Config

from minionerec.common.files import InputError
from minionerec.common.records import read_info
from minionerec.engines.remote import RemoteEngine
from minionerec.engines.vllm import VllmEngine
from minionerec.language.prompts import Encoder, load_checkpoint_prompts
from minionerec.search.beam_search import sample
from minionerec.search.trie import SidTrie

pytestmark = pytest.mark.skipif(not os.environ.get("VLLM_TESTS"), reason="needs vLLM: bash scripts/test_vllm.sh")

ROOT = Path(__file__).parent.parent
SIZE = dict(hidden_size=64, num_attention_heads=2, num_key_value_heads=2, head_dim=32)
FAMILIES = {"llama": SIZE, "qwen2": SIZE, "qwen3": {**SIZE, "tie_word_embeddings": True}}


@contextmanager
def engine_of(model, folder, **settings):
    engine = VllmEngine(save(model, folder), 200, **settings)
    try:
        yield engine
    finally:
        engine.close()


def assert_same_draws(engine, model, trie, prompts, count=16):
    tree, theirs = (
        sample(which, trie, prompts, count, 1.3, torch.Generator().manual_seed(5)) for which in (model, engine)
    )
    assert torch.equal(tree.sequence, theirs.sequence)
    torch.testing.assert_close(tree.score, theirs.score, atol=1e-4, rtol=0)


def disturb(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)


@pytest.mark.parametrize("kind", FAMILIES)
def test_lists_draws_and_pushed_weights(tmp_path, kind):
    """210 prompts over every option of the search; a level of 140 children is two requests; new weights are used."""
    rng = random.Random(kind)
    model = tiny_model(kind, 300, 0, **FAMILIES[kind])
    tries = [
        SidTrie(random_catalogue(rng, size, depth, 140, 300, mixed))
        for size, depth, mixed in ((500, 3, False), (300, 4, True), (1, 5, False))
    ]
    with engine_of(model, tmp_path) as engine:
        for trie in tries:
            prompts = random_prompts(rng, 70, 300, 60)
            numbers = range(trie.num_sequences)
            excluded = [rng.sample(numbers, trie.num_sequences // 2) for _ in prompts]
            assert_same_search(engine, model, trie, prompts, 20)
            assert_same_search(engine, model, trie, prompts[:10], 20, renormalize=True, excluded=excluded[:10])
            assert_same_search(engine, model, trie, prompts[:10], 20, length_penalty=1.0)
            assert_same_draws(engine, model, trie, prompts[:20])
        for _ in range(2):
            disturb(model)
            engine.load_policy(model)
            assert_same_search(engine, model, tries[0], prompts[:10], 20)
            assert_same_draws(engine, model, tries[1], prompts[:10])


def test_a_small_cache(tmp_path):
    """Requests of one token wait where the cache is full: the same lists."""
    rng = random.Random(2)
    model = tiny_model("qwen3", 300, 0, **SIZE)
    trie = SidTrie(random_catalogue(rng, 300, 3, 60, 300, True))
    prompts = [[rng.randint(2, 299) for _ in range(150)] for _ in range(12)]
    with engine_of(model, tmp_path, num_gpu_blocks_override=12) as engine:  # 384 tokens
        assert_same_search(engine, model, trie, prompts, 20)
        assert_same_draws(engine, model, trie, prompts)


def test_two_tensor_parallel_processes(tmp_path):
    rng = random.Random(3)
    model = tiny_model("llama", 300, 0, **SIZE)
    trie, prompts = SidTrie(random_catalogue(rng, 300, 3, 60, 300, True)), random_prompts(rng, 12, 300, 60)
    with engine_of(model, tmp_path, tensor_parallel_size=2) as engine:
        assert_same_search(engine, model, trie, prompts, 20)
        assert_same_draws(engine, model, trie, prompts)
        disturb(model)
        engine.load_policy(model)
        assert_same_search(engine, model, trie, prompts, 20)


def test_a_model_that_vllm_does_not_have(tmp_path):
    config = GPT2Config(vocab_size=30, n_embd=16, n_layer=1, n_head=2, n_positions=64)
    config.architectures = ["NoSuchModel"]
    path = save(AutoModelForCausalLM.from_config(config), tmp_path)
    config = AutoConfig.from_pretrained(path)
    (tmp_path / "config.json").write_text(json.dumps({**config.to_dict(), "architectures": ["NoSuchForCausalLM"]}))
    with pytest.raises(InputError, match="vLLM cannot run"):
        VllmEngine(path, 50)


# ------------------------------------------------------------------------------------------------------------ processes
@pytest.fixture(scope="module")
def larger(trained, tmp_path_factory):
    """`trained` with attention heads of a size that vLLM has: the same tokenizer and prompts, random weights."""
    folder = tmp_path_factory.mktemp("larger")
    for path in Path(trained.checkpoint).iterdir():
        if path.suffix in (".json", ".yaml", ".jinja"):
            shutil.copy(path, folder)
    config = AutoConfig.from_pretrained(trained.checkpoint, head_dim=32, initializer_range=0.3)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return SimpleNamespace(paths=trained.paths, checkpoint=str(folder))


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@contextmanager
def running(folder, *command, url):
    """A server in a process of its own, from when it answers at `url`."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with open(folder / "server.log", "wb") as log:
        process = subprocess.Popen([sys.executable, *command], stdout=log, stderr=log, env=environment, cwd=ROOT)
        try:
            for _ in range(600):
                try:
                    urllib.request.urlopen(url, timeout=5).close()
                    break
                except OSError:
                    assert process.poll() is None, (folder / "server.log").read_text()[-3000:]
                    time.sleep(1)
            else:
                pytest.fail("the server does not answer")
            yield
        finally:
            process.terminate()
            process.wait()


def run_rl(trained, output, *flags):
    """rl.py as a command, whose engine imports it anew in its own processes."""
    names = ("train_file", "eval_file", "info_file")
    command = [sys.executable, "rl.py", "--model_path", trained.checkpoint, "--output_dir", str(output)]
    command += [part for name in names for part in (f"--{name}", trained.paths[name])]
    command += "--num_generations 4 --train_batch_size 16 --gradient_accumulation_steps 1 --reward_type ranking".split()
    command += "--max_steps 3 --warmup_ratio 0.0 --test_during_training False".split()
    result = subprocess.run([*command, *flags], capture_output=True, text=True, cwd=ROOT, timeout=900)
    assert result.returncode == 0, result.stderr[-3000:]
    return AutoModelForCausalLM.from_pretrained(output / "final_checkpoint", dtype=torch.float32).state_dict()


def test_rl_colocated_and_with_a_server(larger, tmp_path):
    """The same weights as with the tree search: beams beside the training, draws with a server.

    The target is put into every group of beams, which would have no advantage without it, see `test_vllm`. Plain
    gradient descent, for AdamW makes whole steps of the rounding by which the two engines differ.
    """
    descent = dict(optim="sgd", learning_rate=1.0)
    expected = train(larger, tmp_path / "tree", renormalize=True, add_gt=True, **descent)
    before = AutoModelForCausalLM.from_pretrained(larger.checkpoint, dtype=torch.float32).state_dict()
    assert max((expected[name] - weight).abs().max() for name, weight in before.items()) > 1e-2
    sgd = ("--use_vllm", "True", "--optim", "sgd", "--learning_rate", "1.0")
    found = run_rl(larger, tmp_path / "colocated", *sgd, "--renormalize", "True", "--add_gt", "True")
    assert_same_weights(found, expected)
    expected = train(larger, tmp_path / "draws", beam_search=False, temperature=1.5, **descent)
    port = free_port()
    command = ("-m", "scripts.serve_vllm", "--model", larger.checkpoint, "--port", str(port))
    url = f"http://127.0.0.1:{port}"
    with running(tmp_path, *command, url=f"{url}/info"):
        flags = (*sgd, "--vllm_mode", "server", "--vllm_server_base_url", url)
        found = run_rl(larger, tmp_path / "served", *flags, "--beam_search", "False", "--temperature", "1.5")
        assert RemoteEngine(url).vocabulary > END
    assert_same_weights(found, expected)


def test_the_served_logits_processor(larger, tmp_path):
    """256 completions of an OpenAI-style server at a high temperature, many of them at once: all are SIDs."""
    info = larger.paths["info_file"]
    port = free_port()
    command = ["-m", "vllm.entrypoints.openai.api_server", "--model", larger.checkpoint, "--port", str(port)]
    command += ["--logits-processors", "minionerec.engines.logits_processor:SidLogitsProcessor"]
    command += ["--additional-config", json.dumps({"info_file": info}), "--dtype", "float32", "--enforce-eager"]
    command += ["--kv-cache-memory-bytes", "1000000000", "--num-gpu-blocks-override", "24", "--block-size", "32"]
    command += ["--generation-config", "vllm", "--max-model-len", "200", "--served-model-name", "sids"]
    command += ["--no-enable-chunked-prefill", "--max-num-batched-tokens", "4096"]
    tokenizer = AutoTokenizer.from_pretrained(larger.checkpoint)
    encoder = Encoder(tokenizer, load_checkpoint_prompts(larger.checkpoint))
    sids = read_info(info).sids
    legal = {tuple(target) for target in encoder.target_ids("next_sid", sids)}
    prompts = encoder.prompt_ids(["".join(sids[start % 20 : start % 20 + 3 + start // 20]) for start in range(200)])
    # Their completions end in the next block of the cache, which has no room for that many at once.
    prompts = [prompt for prompt in prompts if 27 <= len(prompt) <= 31][:16]
    assert len(prompts) == 16
    answers = []

    def ask(prompt, **extra):
        body = dict(model="sids", prompt=prompt, max_tokens=8, temperature=2.0, n=16, return_token_ids=True, **extra)
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"http://127.0.0.1:{port}/v1/completions", json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=300) as answer:
            return [tuple(choice["token_ids"]) for choice in json.load(answer)["choices"]]

    with running(tmp_path, *command, url=f"http://127.0.0.1:{port}/health"):
        threads = [threading.Thread(target=lambda p=prompt: answers.extend(ask(p))) for prompt in prompts]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60) as answer:
            counts = re.findall(r"^vllm:num_preemptions_total\S* (\S+)", answer.read().decode(), re.MULTILINE)
        free = ask(prompts[0], vllm_xargs={"unconstrained": 1})
    assert len(answers) == 256 and set(answers) <= legal and len(set(answers)) > 10
    assert not set(free) <= legal and sum(map(float, counts)) > 0
