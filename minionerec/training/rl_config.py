"""The configuration of the GRPO trainer."""

from __future__ import annotations

from dataclasses import dataclass, field

from trl import GRPOConfig


@dataclass
class RLConfig(GRPOConfig):
    """TRL's `GRPOConfig` and what it has no word for.

    `per_device_train_batch_size` counts completions, as in TRL; a batch holds that many / num_generations prompts.
    loss_type is one of `LOSSES`; temperature is that of sampled rollouts, and of their log-probabilities.
    """

    beam_search: bool = field(default=True, metadata={"help": "Roll out by beam search; False: by sampling."})
    dynamic_sampling: bool = field(default=False, metadata={"help": "Find 1.5 G completions, keep a diverse G."})
    add_gt: bool = field(default=False, metadata={"help": "Put the target into groups that lack it."})
    mask_all_zero: bool = field(default=False, metadata={"help": "Leave groups of equal rewards out, KL included."})
    renormalize: bool = field(default=False, metadata={"help": "Probabilities over legal tokens only."})
    rollout_dtype: str | None = field(default=None, metadata={"help": "Precision of rollouts; None: the training's."})
    share_prompts: bool = field(
        default=True,
        metadata={"help": "Rollout and first update compute prompts once, where they can; never with dropout."},
    )
    tree_tokens: int = field(default=384, metadata={"help": "Prompt groups share a tree up to about so many tokens."})
