"""A logits processor for served vLLM endpoints: every completion is a SID of the catalogue.

    python -m vllm.entrypoints.openai.api_server --model RL/final_checkpoint \
        --logits-processors minionerec.engines.logits_processor:SidLogitsProcessor \
        --additional-config '{"info_file": "CSV/info/NAME.txt"}'

vLLM alone imports this module. One class serves both of its model runners, whose interfaces differ: V1 hands over lists
of output tokens, V2 tensors of all tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, MoveDirectionality
from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as V2LogitsProcessor

from minionerec.engines.legal_tokens import mask_illegal

FREE = "unconstrained"  # among a request's vllm_xargs, which are numbers or texts: 1 leaves the request alone


class SidLogitsProcessor(LogitsProcessor, V2LogitsProcessor):
    """Lets requests write SIDs of the catalogue alone, each to its end.

    Args:
        vllm_config: with `info_file` in its additional_config.
        state: the device (V1), or the states of all requests (V2).
        is_pin_memory: of V1.

    Raises:
        ValueError: no info file was named.
    """

    def __init__(self, vllm_config: Any, state: Any, is_pin_memory: bool = False):
        from transformers import AutoTokenizer

        from minionerec.common.records import read_info
        from minionerec.language.catalogue_trie import build_catalogue_trie
        from minionerec.language.prompts import Encoder, load_checkpoint_prompts

        info_file = (vllm_config.additional_config or {}).get("info_file")
        if not info_file:
            raise ValueError('--additional-config: expected {"info_file": "CSV/info/NAME.txt"}')
        model = vllm_config.model_config.model
        encoder = Encoder(AutoTokenizer.from_pretrained(model), load_checkpoint_prompts(model, None, None))
        self.states = None if isinstance(state, torch.device) else state
        device = state if self.states is None else state.device
        self.trie = build_catalogue_trie(read_info(info_file, True), encoder, device).trie
        self.end = encoder.end[-1]
        self.outputs: dict[int, list[int]] = {}  # V1: the output tokens of the constrained requests by row
        self.slots: set[int] = set()  # V2: the slots of the constrained requests

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Refuse a value that is neither 0 nor 1."""
        value = (sampling_params.extra_args or {}).get(FREE, False)
        if value not in (0, 1):
            raise ValueError(f"vllm_xargs: {FREE} must be 0 or 1, got {value!r}")

    @staticmethod
    def _is_free(params: SamplingParams) -> bool:
        return bool((params.extra_args or {}).get(FREE, False))

    def is_argmax_invariant(self) -> bool:
        """False: greedy decoding is constrained as well."""
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """V1: follow the requests through the rows of the batch."""
        if batch_update is None:
            return
        for row in batch_update.removed:
            self.outputs.pop(row, None)
        for row, params, _, written in batch_update.added:
            self.outputs.pop(row, None)
            if not self._is_free(params):
                self.outputs[row] = written
        for source, target, direction in batch_update.moved:
            moved, other = self.outputs.pop(source, None), self.outputs.pop(target, None)
            if moved is not None:
                self.outputs[target] = moved
            if other is not None and direction == MoveDirectionality.SWAP:
                self.outputs[source] = other

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        """V2: a request takes a slot, whatever was there before."""
        self.slots.discard(req_idx)
        if self._is_free(sampling_params):
            return False
        self.slots.add(req_idx)
        return True

    def apply(self, logits: torch.Tensor, ctx: Any = None) -> torch.Tensor:
        """Mask the rows of the constrained requests."""
        rows, tokens, counts = self._read_outputs(logits.device) if ctx is None else self._read_slots(ctx)
        if len(rows):
            chosen = logits[rows]
            mask_illegal(chosen, self.trie, tokens, counts, self.end)
            logits[rows] = chosen
        return logits

    def _read_outputs(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """V1: (rows of logits, tokens [R, depth], counts [R])."""
        rows, depth = sorted(self.outputs), self.trie.depth
        written = [list(self.outputs[row]) for row in rows]
        counts = torch.tensor([len(tokens) for tokens in written])
        tokens = torch.tensor([(tokens + [-1] * depth)[:depth] for tokens in written], dtype=torch.long)
        return torch.tensor(rows, dtype=torch.long, device=device), tokens.to(device), counts.to(device)

    def _read_slots(self, ctx: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """V2: the same; a row's output begins where its prompt ends."""
        slot = ctx.expanded_idx_mapping.long()
        constrained = torch.tensor(sorted(self.slots), dtype=torch.long, device=slot.device)
        rows = torch.isin(slot, constrained).nonzero().squeeze(1)
        slot = slot[rows]
        start = self.states.prompt_len.gpu[slot].long()
        counts = (ctx.pos[rows].long() + 1 - start).clamp(min=0)
        written = self.states.all_token_ids.gpu
        place = (start.unsqueeze(1) + torch.arange(self.trie.depth, device=slot.device)).clamp(max=written.shape[1] - 1)
        return rows, written[slot.unsqueeze(1), place].long(), counts
