"""A stand-in for vLLM, with the interface that the project uses, which computes with Hugging Face in this process."""

import sys
from enum import Enum, auto
from types import ModuleType, SimpleNamespace

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM


class SamplingParams(SimpleNamespace):
    """Whatever it is called with."""


class LLM:
    """Answers requests for one token row by row; like vLLM it keeps what it computed until it is told to forget it."""

    started: list["LLM"] = []

    def __init__(self, model: str, max_model_len: int, **settings):
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        if self.model.config.model_type == "gpt2":
            reason = "Value error, Model architectures ['GPT2'] are not supported [type=value_error, input=x]"
            raise ValueError(f"1 validation error for ModelConfig\n  {reason}")
        if max_model_len > self.model.config.max_position_embeddings:
            raise ValueError(f"max_model_len {max_model_len} is too long")
        self.longest, self.settings = max_model_len, settings
        self.model_config = SimpleNamespace(get_vocab_size=lambda: self.model.config.vocab_size)
        self.cache, self.pushes, self.requests = {}, 0, 0
        LLM.started.append(self)

    @torch.no_grad()
    def generate(self, prompts, sampling_params, use_tqdm=True):
        answers = []
        for prompt, params in zip(prompts, sampling_params, strict=True):
            assert params.max_tokens == 1 and params.temperature == 0 and params.ignore_eos and params.flat_logprobs
            assert 0 < len(params.logprob_token_ids) <= 128
            prefix = tuple(prompt["prompt_token_ids"])
            assert len(prefix) < self.longest
            if prefix not in self.cache:
                self.cache[prefix] = self.model(torch.tensor([prefix])).logits[0, -1].log_softmax(-1)
            row = self.cache[prefix]
            ids = [int(row.argmax()), *params.logprob_token_ids]  # the token it would write stands first
            flat = SimpleNamespace(token_ids=ids, logprobs=row[ids].tolist())
            answers.append(SimpleNamespace(outputs=[SimpleNamespace(logprobs=flat)]))
            self.requests += 1
        return answers

    def collective_rpc(self, method, args=()):
        assert method == "load_weights_file"
        state = load_file(args[0])
        missing, unexpected = self.model.load_state_dict(state, strict=False)
        tied = set(self.model.all_tied_weights_keys or ())
        assert not unexpected and set(missing) == tied and not tied & set(state)
        self.pushes += 1

    def reset_prefix_cache(self) -> bool:
        self.cache.clear()
        return True


class MoveDirectionality(Enum):
    UNIDIRECTIONAL = auto()
    SWAP = auto()


def install(monkeypatch, version: str = "0.32.0") -> list[LLM]:
    """Let `import vllm` find the stand-in until the test ends; returns the engines it will have started."""
    from minionerec.engines import settings
    from minionerec.engines.vllm import ENVIRONMENT

    processors = dict(
        BatchUpdate=SimpleNamespace, LogitsProcessor=type("V1", (), {}), MoveDirectionality=MoveDirectionality
    )
    modules = {
        "vllm": dict(LLM=LLM, SamplingParams=SamplingParams),
        **dict.fromkeys(("vllm.v1", "vllm.v1.sample", "vllm.v1.worker", "vllm.v1.worker.gpu"), {}),
        "vllm.v1.worker.gpu.sample": {},
        "vllm.v1.sample.logits_processor": processors,
        "vllm.v1.worker.gpu.sample.logits_processor": dict(LogitsProcessor=type("V2", (), {})),
    }
    for name, content in modules.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "minionerec.engines.logits_processor", raising=False)
    monkeypatch.setattr(settings, "version", lambda package: version)
    monkeypatch.setattr(LLM, "started", [])
    for name in (*ENVIRONMENT, "VLLM_CPU_OMP_THREADS_BIND"):
        monkeypatch.setenv(name, "as-before")  # what the engine sets is undone
    return LLM.started
