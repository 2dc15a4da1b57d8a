"""The flags of sft.py and rl.py."""

from __future__ import annotations

from dataclasses import dataclass

from minionerec.common.cli import Flags, flag
from minionerec.common.settings import (
    AdapterFlags,
    CatalogueFlags,
    HubFlags,
    LoggingFlags,
    PluginFlags,
    PromptFlags,
    SeedFlags,
    StageFlags,
    StreamFlags,
)
from minionerec.engines.settings import VllmRolloutFlags


@dataclass
class SplitFlags(StreamFlags, PluginFlags):
    """Data."""

    train_file: str = flag(help="the train split: a CSV, .jsonl or .parquet")
    eval_file: str = flag(help="the validation split, likewise")
    eval_sample: int = flag(-1, "validate on that many random rows; -1 is all")
    preference_file: str | None = flag(
        None, "user preference texts, written from the train split alone, for history2preference and preference2sid"
    )


@dataclass
class OptimizationFlags(Flags):
    """Optimization."""

    output_dir: str = flag(help="checkpoints go there; the last one is OUTPUT_DIR/final_checkpoint")
    warmup_ratio: float = flag(0.03, "share of the steps in which the learning rate rises; then it falls as a cosine")
    weight_decay: float = flag(0.0, "weight decay of AdamW")
    optim: str = flag(
        "adamw_torch_fused",
        "optimizer, by its name in transformers; adamw_8bit and paged_adamw_8bit of bitsandbytes, or adafactor, keep "
        "less state (docs/training.md)",
    )
    dropout: float = flag(0.0, "dropout on embeddings and residual branches while the model learns")
    gradient_checkpointing: bool = flag(False, "compute activations twice instead of keeping them: less memory, slower")
    bf16: bool | None = flag(
        None,
        "compute in bfloat16 autocast over float32 weights (docs/training.md)",
        default_text="True on a GPU that has it, False on a CPU",
    )
    attention: str = flag("sdpa", "attention kernel; flex_attention needs CUDA", choices=("sdpa", "flex_attention"))
    dataloader_num_workers: int = flag(0, "processes that prepare batches ahead; 0: the training process does")
    resume_from_checkpoint: str | None = flag(
        None, "a checkpoint-N folder to go on from", default_text="the last one of a run that was cut off"
    )


@dataclass
class SFTFlags(SplitFlags, PromptFlags, OptimizationFlags, AdapterFlags, LoggingFlags, HubFlags, SeedFlags, StageFlags):
    """Supervised fine-tuning."""

    base_model: str = flag(help="HF folder or hub name; with --train_from_scratch also a JSON config (config/*.json)")
    train_from_scratch: bool = flag(False, "start from random weights of the base's config")
    sid_index_path: str = flag(help="the semantic IDs of the items, NAME.index.json")
    prompts: str | None = flag(
        None,
        "prompt set: compact (bare SIDs), worded, a YAML file with one set, or FILE:SET",
        default_text="compact from scratch, else worded",
    )
    item_meta_path: str = flag(help="titles and descriptions of the items, NAME.item.json")
    tasks: list[str] | None = flag(
        None,
        "tasks with weights, such as next_sid,title2sid:0.5 (docs/training.md lists them)",
        default_text="next_sid,title_history2sid,title2sid,sid2title, as far as the prompt set has them",
    )
    teacher: str = flag(
        "transitions+content",
        "the baseline, or sum of baselines, that the tasks teacher_sid and walk_sid learn from, such as "
        "transitions+content:3, where a part has a weight of its own; it may hold sasrec or gru4rec where "
        "sasrec.py --folds has trained networks that did not see the rows",
    )
    walk_teacher: str | None = flag(
        None,
        "what the histories learn from that are no train rows: those of walk_sid, and what follows a user's last train "
        "item. Such a baseline or sum may hold sasrec or gru4rec without --folds, which know the train rows by heart",
        default_text="--teacher",
    )
    cf_path: str | None = flag(None, "model folder of sasrec.py, for sasrec or gru4rec in a teacher")
    walks: int = flag(3, "synthetic histories of walk_sid for every item and epoch")
    cut_histories: bool | None = flag(
        None,
        "let a long user's targets share pieces of the timeline, so that prefix trees compute less",
        default_text="True with compact prompts",
    )
    sample: int = flag(-1, "train on that many random rows; -1 is all")
    batch_size: int = flag(1024, "rows of an optimizer step, over all processes")
    micro_batch_size: int = flag(16, "rows of a forward pass of one process")
    num_epochs: int = flag(10, "epochs, at most")
    learning_rate: float = flag(3e-4, "peak learning rate")
    sid_init: str | None = flag(
        None,
        "where the token rows of new SIDs start: what the items that use a code are about (text), noise, or the item "
        "embeddings of a file NAME.emb-PLM-td.npy",
        default_text="text from scratch, noise in a pretrained base",
    )
    freeze_LLM: bool = flag(False, "train only the token rows of the SIDs")
    packing: str = flag(
        "tree",
        "compute rows that share prefixes as one tree, or pad separate rows: the same loss, a tree is far cheaper",
        choices=("tree", "none"),
    )
    tree_tokens: int = flag(2048, "tokens of a tree, about")
    softmax: str = flag(
        "vocabulary",
        "what a token's probability is over: the vocabulary, or the legal tokens, those that may follow in the "
        "catalogue; far cheaper where items have tokens of their own. Every search of the model then does the same",
        choices=("vocabulary", "legal"),
    )
    early_stopping_patience: int = flag(3, "stop after so many epochs without a better one; the best one is kept")
    best_by: str = flag(
        "loss",
        "what the best epoch has: the least validation loss, or the highest figure of a constrained search; sum is "
        "HR@10 + NDCG@10",
        choices=("loss", "HR@10", "NDCG@10", "sum"),
    )
    eval_beams: int = flag(10, "beams of the search of --best_by, where it is not the loss")
    save_total_limit: int = flag(1, "checkpoints to keep")
    group_by_length: bool = flag(False, no_effect="batches are cut by tokens and prefix trees hardly pad")


@dataclass
class RewardFlags(Flags):
    """Rewards."""

    reward_type: list[str] | None = flag(
        None,
        "rewards with weights, such as ranking,prefix:0.5, summed: rule, ranking, ranking_only, prefix, semantic, "
        "content, transitions, sasrec, module (docs/reinforcement_learning.md explains them)",
        default_text="rule:0.5,content,transitions",
    )
    ada_path: str | None = flag(None, "item embeddings of the semantic reward, NAME.emb-PLM-td.npy")
    cf_path: str | None = flag(None, "model folder of sasrec.py for the sasrec reward")
    reward_module: str | None = flag(None, "FILE.py:FUNCTION of the module reward, called as (completions, example)")


@dataclass
class LossFlags(Flags):
    """Loss."""

    beta: float = flag(1.0, "weight of the KL term; 0 needs no reference model")
    dapo: bool = flag(False, "DAPO: the mean over tokens and a higher upper clip")
    gspo: bool = flag(False, "GSPO: ratios of whole completions")
    dr_grpo: bool | None = flag(
        None,
        "Dr. GRPO: rewards not divided by their spread, sums over tokens not by length; False: GRPO as first published",
        default_text="True, unless --dapo or --gspo is given",
    )
    num_iterations: int = flag(1, "optimizer steps per rollout")
    epsilon: float | None = flag(None, "lower clip of the ratio", default_text="as in the loss's paper")
    epsilon_high: float | None = flag(None, "upper clip of the ratio", default_text="as in the loss's paper")
    renormalize: bool = flag(
        False, "probabilities over legal tokens only, in the beams' ranks, the loss and the KL term"
    )
    mask_all_zero: bool = flag(False, "leave groups of equal rewards out, their KL term included")
    ref_model_path: str | None = flag(
        None, "reference of the KL term", default_text="the model that the run starts from"
    )
    sync_ref_model: bool = flag(False, "move the reference towards the policy")
    ref_model_sync_steps: int = flag(512, "steps between two moves of the reference")
    ref_model_mixup_alpha: float = flag(0.6, "how far each move goes")


@dataclass
class RolloutFlags(Flags):
    """Rollouts."""

    num_generations: int = flag(16, "completions of a prompt")
    beam_search: bool = flag(True, "roll out the best items by beam search; False: sample them")
    temperature: float = flag(1.0, "of sampled rollouts")
    dynamic_sampling: bool = flag(
        False, "find half as many again and keep the target, if it was found, and as many distinct ones as possible"
    )
    add_gt: bool = flag(False, "put the target into groups that lack it")
    rollout_dtype: str | None = flag(
        None,
        "precision that rollouts are computed in; the loss computes their log-probabilities itself, in the training's "
        "precision. auto is chosen as by --dtype of evaluate.py",
        choices=("float32", "bfloat16", "auto"),
        default_text="that of the training: bfloat16 autocast on a GPU, float32 on a CPU",
    )


@dataclass
class ValidationFlags(Flags):
    """Validation."""

    test_during_training: bool = flag(
        True, "measure HR@10 and NDCG@10 on validation rows; final_checkpoint is the best one, the start included"
    )
    best_by: str = flag(
        "sum", "what the best checkpoint has most of; sum is HR@10 + NDCG@10", choices=("HR@10", "NDCG@10", "sum")
    )
    test_beam: int = flag(20, "beams of the validation")
    eval_step: float = flag(0.2, "steps between validations; below 1: share of the run")
    early_stopping_patience: int = flag(0, "stop after so many validations without a better one; 0 never does")
    eval_batch_size: int = flag(640, "completions of a validation pass, per device")
    # Far more rows would make a validation longer than the steps between two of them.
    eval_sample: int = flag(1000, "validate on that many random rows; -1 is all")


@dataclass
class RLFlags(
    RewardFlags,
    LossFlags,
    RolloutFlags,
    VllmRolloutFlags,
    ValidationFlags,
    SplitFlags,
    CatalogueFlags,
    PromptFlags,
    OptimizationFlags,
    AdapterFlags,
    LoggingFlags,
    HubFlags,
    SeedFlags,
    StageFlags,
):
    """Reinforcement learning."""

    model_path: str = flag(help="checkpoint of sft.py")
    tasks: list[str] | None = flag(
        None,
        "tasks with weights, such as next_sid,title2sid:0.5; others: description2sid, preference2sid",
        default_text="next_sid,title_history2sid,title2sid, as far as the prompt set has them",
    )
    sample_train: int | bool = flag(
        -1, "train on that many random rows; -1 or False is all, True 80 % of them", default_text="all rows"
    )
    item_meta_path: str | None = flag(None, "NAME.item.json, for tasks that show descriptions")
    sid_index_path: str | None = flag(None, "NAME.index.json; only checked to agree with the info file")
    train_batch_size: int = flag(64, "completions of a forward pass, per device")
    gradient_accumulation_steps: int | None = flag(
        None, "forward passes of an optimizer step", default_text="what makes 64 prompts on all devices together"
    )
    num_train_epochs: float = flag(2.0, "epochs")
    max_steps: int = flag(-1, "stop after that many optimizer steps; -1 goes by num_train_epochs")
    learning_rate: float = flag(1e-5, "peak learning rate")
    max_grad_norm: float = flag(0.3, "gradients are clipped to this norm")
    tensorboard: bool = flag(False, "the same as tensorboard among --report_to")
