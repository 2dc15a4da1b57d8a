"""vLLM as the engine of searches: exact log-probabilities of the legal children, from processes of its own.

Every level of a search is one request per distinct prefix for a single token, which returns the log-probabilities of
the legal children over the full vocabulary; vLLM's prefix cache keeps what prompts and earlier levels computed. What is
searched, drawn and ranked stays here, so that lists and draws are those of the tree search. vLLM is imported only when
an engine starts: it is an extra, see docs/vllm.md.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from minionerec.common.files import InputError
from minionerec.engines.prefix_scorer import PrefixEngine
from minionerec.engines.settings import check_vllm

MOST_TOKENS = 128  # that one request can ask for
# What is set where the environment says nothing: processes that share no state with this one, no reports, quiet logs.
ENVIRONMENT = {
    "VLLM_WORKER_MULTIPROCESSING_METHOD": "spawn",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
}
CORES = "VLLM_CPU_OMP_THREADS_BIND"
CPU_SETTINGS = {
    "dtype": "float32",
    "block_size": 32,
    "enable_chunked_prefill": False,
    "kv_cache_memory_bytes": 2**31,
}


def shorten_error(error: Exception) -> str:
    """The line of an error that says something; vLLM's own validation puts a heading before it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    line = lines[1] if len(lines) > 1 and "validation error" in lines[0] else lines[0]
    return line.removeprefix("Value error, ").partition(" [type=")[0]


def share_cores(processes: int) -> str:
    """Which cores each process of an engine on a CPU computes with, as vLLM writes it: "0,2|1,3".

    Left alone, vLLM wants a memory node of its own for each process.
    """
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    if processes == 1:
        return "auto"
    return "|".join(",".join(map(str, cores[rank::processes] or cores)) for rank in range(processes))


@contextmanager
def bound_to_cores(processes: int) -> Iterator[None]:
    """Inside, engines on a CPU start with the cores of `share_cores`, unless the environment names some.

    An engine that is started later may have another number of processes.
    """
    named = CORES in os.environ
    if not named and not torch.cuda.is_available():
        os.environ[CORES] = share_cores(processes)
    try:
        yield
    finally:
        if not named:
            os.environ.pop(CORES, None)


class VllmEngine(PrefixEngine):
    """A model in vLLM's own processes.

    Args:
        model: a HF folder or hub name.
        max_model_len: tokens of the longest prompt with its SID; the model's own limit may be lower.
        tensor_parallel_size: processes (on GPUs: GPUs) that share every layer.
        gpu_memory_utilization: share of a GPU's memory for weights and cache.
        flag: the flag that asked for vLLM, for errors.
        settings: further arguments of `vllm.LLM`.

    Raises:
        InputError: vLLM is missing or untested, or cannot run the model.
    """

    def __init__(
        self,
        model: str,
        max_model_len: int,
        *,
        tensor_parallel_size: int = 1,
        gpu_memory_utilization: float = 0.9,
        flag: str = "--engine vllm",
        **settings: Any,
    ):
        check_vllm(flag)
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        from vllm import LLM, SamplingParams

        if not torch.cuda.is_available():
            # A prefill is not cut into pieces there, so that it must fit into one pass.
            settings = CPU_SETTINGS | {"max_num_batched_tokens": max(max_model_len + 1, 4096)} | settings
        self._params = SamplingParams
        try:
            limit = getattr(AutoConfig.from_pretrained(model).get_text_config(), "max_position_embeddings", None)
            # The one token that every request makes, and that is not used, needs a place as well.
            self._longest = min(max_model_len + 1, limit or max_model_len + 1)
            options = {
                "dtype": "bfloat16",
                "max_model_len": self._longest,
                "tensor_parallel_size": tensor_parallel_size,
                "gpu_memory_utilization": gpu_memory_utilization,
                "enforce_eager": True,
                "enable_prefix_caching": True,
                "logprobs_mode": "raw_logprobs",
                "max_logprobs": MOST_TOKENS,
                "generation_config": "vllm",
                "worker_extension_cls": "minionerec.engines.worker.WeightLoader",
                **settings,
            }
            with bound_to_cores(tensor_parallel_size):
                self._llm = LLM(model=model, skip_tokenizer_init=True, **options)
        except (ValueError, RuntimeError, NotImplementedError, OSError, AssertionError) as error:
            raise InputError(f"{flag}: vLLM cannot run {model} ({shorten_error(error)})") from error
        self.vocabulary = self._llm.model_config.get_vocab_size()

    def score_tokens(self, prefixes: Sequence[list[int]], tokens: Sequence[list[int]]) -> list[list[float]]:
        if max(map(len, prefixes)) >= self._longest:
            raise InputError(
                f"a prompt with its SID has {max(map(len, prefixes)) + 1} tokens, but vLLM was started for "
                f"{self._longest - 1}: lower --cutoff_len"
            )
        requests, settings = [], []
        for prefix, wanted in zip(prefixes, tokens, strict=True):
            parts = math.ceil(len(wanted) / MOST_TOKENS)
            for part in range(parts):
                requests.append({"prompt_token_ids": prefix})
                settings.append(self._ask_for(wanted[part * MOST_TOKENS : (part + 1) * MOST_TOKENS]))
        answers = iter(self._llm.generate(requests, settings, use_tqdm=False))
        scores = []
        for wanted in tokens:
            found: dict[int, float] = {}
            for _ in range(math.ceil(len(wanted) / MOST_TOKENS)):
                flat = next(answers).outputs[0].logprobs
                found.update(zip(flat.token_ids, flat.logprobs, strict=True))
            scores.append([found[token] for token in wanted])
        return scores

    def _ask_for(self, tokens: list[int]) -> Any:
        """A request for one token, whichever, and the log-probabilities of `tokens` in its place."""
        return self._params(
            temperature=0.0,
            max_tokens=1,
            ignore_eos=True,
            detokenize=False,
            logprob_token_ids=tokens,
            flat_logprobs=True,
            skip_clone=True,
        )

    def load_file(self, path: str | Path) -> None:
        self._llm.collective_rpc("load_weights_file", args=(str(path),))
        # Keys and values in the cache are those of the weights before.
        if not self._llm.reset_prefix_cache():
            raise RuntimeError("vLLM kept keys and values of other weights: requests are still running")

    def close(self) -> None:
        """End vLLM's processes; this happens by itself when Python ends."""
        self._llm.llm_engine.engine_core.shutdown()
