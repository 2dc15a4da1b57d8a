r"""Supervised fine-tuning: a causal LM learns to write the SID of the user's next item.

    python sft.py --base_model Qwen/Qwen2.5-0.5B --train_file ... --eval_file ... --sid_index_path X.index.json \
        --item_meta_path X.item.json --output_dir output/sft
"""

from __future__ import annotations

from minionerec.common.cli import parse_flags, run_command
from minionerec.training.settings import SFTFlags

if __name__ == "__main__":
    # Before the imports below, which take seconds: --help and a wrong flag answer at once.
    FLAGS = parse_flags(SFTFlags)

from dataclasses import dataclass, replace
from pathlib import Path

from transformers import EarlyStoppingCallback, PreTrainedModel, TrainingArguments, set_seed

from data import EvalSidDataset, TaskInputs, build_mixture, choose_tasks
from minionerec.common.files import InputError
from minionerec.common.items import read_catalogue, read_preferences
from minionerec.common.plugins import load_plugins
from minionerec.common.processes import process_state, say
from minionerec.common.records import Catalogue, Row, read_index
from minionerec.common.stage import Stage, open_stage
from minionerec.evaluation.ranking import measure_validation
from minionerec.language.adapters import (
    check_adapter_checkpoint,
    check_adapter_flags,
    count_trainable_parameters,
    wrap_with_adapters,
)
from minionerec.language.catalogue_trie import build_catalogue_trie
from minionerec.language.examples import TaskMixture
from minionerec.language.models import add_dropout, build_model_from_config, check_attention, load_model
from minionerec.language.prompts import Encoder, PromptSet, load_prompts
from minionerec.language.sid_tokens import add_sid_tokens, compute_start_directions
from minionerec.training.callbacks import StageTimer
from minionerec.training.checkpoints import choose_resume_checkpoint, export_model
from minionerec.training.setup import build_arguments, check_divisible, list_training_inputs, read_splits
from minionerec.training.sft_trainer import TreeBatches, TreeTrainer


@dataclass
class RunData:
    """What a run reads: the catalogue with its SID tokens and texts, the rows, the tasks."""

    index: dict[int, tuple[str, ...]]
    catalogue: Catalogue
    descriptions: dict[int, str]
    preferences: dict[str, str] | None
    train_rows: list[Row]
    valid_rows: list[Row]

    @property
    def sid_tokens(self) -> list[str]:
        """The distinct tokens of all SIDs."""
        return sorted({token for tokens in self.index.values() for token in tokens})


@dataclass
class SFTModel:
    """What a run trains, and how its texts become tokens."""

    model: PreTrainedModel
    encoder: Encoder
    parameters: int
    new_tokens: int


def resolve_sft_flags(flags: SFTFlags) -> tuple[SFTFlags, PromptSet, dict[str, float]]:
    """(flags with every default worked out, prompt set, {task: weight}), once they are checked against each other.

    Raises:
        InputError: flags that contradict each other.
    """
    scratch = flags.train_from_scratch
    prompts = load_prompts(flags.prompts or ("compact" if scratch else "worded"), flags.category)
    weights = choose_tasks(flags.tasks, prompts, preference_file=flags.preference_file)
    flags = replace(
        flags,
        tasks=list(flags.tasks or weights),
        cut_histories=prompts.is_compact if flags.cut_histories is None else flags.cut_histories,
        sid_init=flags.sid_init or ("text" if scratch else "noise"),
    )
    check_adapter_flags(flags, flags.freeze_LLM, scratch)
    if flags.eval_beams < 10:
        raise InputError(f"--eval_beams {flags.eval_beams}: HR@10 needs 10 beams or more")
    if flags.tree_tokens < 1:
        raise InputError(f"--tree_tokens {flags.tree_tokens}: must be at least 1")
    check_attention(flags.attention)
    if Path(flags.base_model).is_file() and not scratch:
        raise InputError(
            f"--base_model {flags.base_model}: a config file has no weights; add --train_from_scratch True"
        )
    return flags, prompts, weights


def read_sft_data(flags: SFTFlags) -> RunData:
    """Everything that can be wrong with the input is found here, before a model is loaded."""
    index = read_index(flags.sid_index_path, "sid_index_path")
    catalogue, descriptions = read_catalogue(flags.item_meta_path, index, flags.sid_index_path)
    preferences = read_preferences(flags.preference_file) if flags.preference_file else None
    _, train_rows, valid_rows = read_splits(
        flags, catalogue, flags.sid_index_path, flags.sample, flags.seed, history=True
    )
    return RunData(index, catalogue, descriptions, preferences, train_rows, valid_rows)


def build_model(flags: SFTFlags, data: RunData, prompts: PromptSet) -> SFTModel:
    """The base with a row for every SID token; wrapped, where only a part of it is trained."""
    set_seed(flags.seed)
    scratch, titles = flags.train_from_scratch, data.catalogue.titles
    descriptions = list(data.descriptions.values())
    if scratch:
        texts = [text for text in (*titles, *descriptions) if text]
        model, tokenizer = build_model_from_config(flags.base_model, texts, flags.seed, flags.attention)
    else:
        model, tokenizer = load_model(flags.base_model, "base_model", flags.attention)
    directions = None
    if flags.sid_init == "text" and not tokenizer.get_vocab().keys() >= set(data.sid_tokens):
        sids = [data.index[item] for item in data.catalogue.item_ids]
        directions = compute_start_directions(model, tokenizer, sids, titles, descriptions, flags.seed, scratch)
    # A random model's rows would take epochs to part if they started alike; a pretrained one's must not be outliers.
    spread = 1.0 if scratch else 0.1
    new_tokens = add_sid_tokens(model, tokenizer, data.sid_tokens, flags.seed, spread, directions)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    model = wrap_with_adapters(model, tokenizer.convert_tokens_to_ids(data.sid_tokens), flags, flags.freeze_LLM)
    if flags.dropout:  # after the wrapping: its hooks are to stand on the layers that are called
        add_dropout(model, flags.dropout)
    return SFTModel(model, Encoder(tokenizer, prompts, flags.cutoff_len), parameters, new_tokens)


def build_batches(
    flags: SFTFlags, data: RunData, weights: dict[str, float], encoder: Encoder
) -> tuple[TreeBatches, TreeBatches]:
    """(training, validation) micro-batches. The validation loss is that of next_sid, where the prompt set has it."""
    texts = data.descriptions, data.preferences
    train_inputs = TaskInputs(data.train_rows, data.catalogue, *texts, flags.cut_histories, flags.seed)
    eval_tasks = dict.fromkeys(["next_sid"] if "next_sid" in encoder.prompts.templates else weights, 1.0)
    train_part = build_mixture(weights, train_inputs, encoder)
    eval_part = build_mixture(eval_tasks, TaskInputs(data.valid_rows, data.catalogue, *texts), encoder)
    for line in train_part.report():
        say(f"[sft] {line}")
    return _batch_training(flags, train_part, encoder), _batch_validation(flags, eval_part, encoder)


def _batch_training(flags: SFTFlags, part: TaskMixture, encoder: Encoder) -> TreeBatches:
    world = process_state().num_processes
    micro_batches = check_divisible(flags.batch_size, flags.micro_batch_size) * world
    how = {"packing": flags.packing, "tree_tokens": flags.tree_tokens}
    try:
        return TreeBatches([part], flags.batch_size, micro_batches, encoder.pad_token_id, flags.seed, **how)
    except ValueError as error:
        raise InputError(f"--batch_size {flags.batch_size}: {error}") from None


def _batch_validation(flags: SFTFlags, part: TaskMixture, encoder: Encoder) -> TreeBatches:
    world = process_state().num_processes
    micro_batches = max(world, -(-len(part) // flags.micro_batch_size // world) * world)
    how = {"packing": flags.packing, "tree_tokens": flags.tree_tokens}
    return TreeBatches([part], len(part), min(micro_batches, len(part)), encoder.pad_token_id, None, **how)


def build_sft_trainer(
    flags: SFTFlags, data: RunData, built: SFTModel, batches: tuple[TreeBatches, TreeBatches], stage: Stage
) -> TreeTrainer:
    """The trainer, which keeps the best epoch by --best_by."""
    train_set, eval_set = batches
    validate = None
    if flags.best_by == "HR@10":
        catalogue_trie = build_catalogue_trie(data.catalogue, built.encoder, process_state().device)
        examples = EvalSidDataset(data.valid_rows, built.encoder).examples

        def validate() -> dict[str, float]:
            policy = trainer.accelerator.unwrap_model(trainer.model)
            return measure_validation(policy, catalogue_trie, examples, flags.eval_beams, flags.micro_batch_size)

    arguments = build_arguments(
        TrainingArguments,
        flags,
        flags.num_epochs * train_set.steps,
        ["wandb"] if flags.wandb_project else [],
        per_device_train_batch_size=1,
        per_device_eval_batch_size=1,
        gradient_accumulation_steps=check_divisible(flags.batch_size, flags.micro_batch_size),
        num_train_epochs=flags.num_epochs,
        eval_strategy="epoch",
        save_strategy="epoch",
        logging_strategy="epoch",
        save_total_limit=flags.save_total_limit,
        load_best_model_at_end=True,
        metric_for_best_model=f"eval_{flags.best_by}",
        greater_is_better=flags.best_by != "loss",
    )
    trainer = TreeTrainer(
        model=built.model,
        validate=validate,
        train_dataset=train_set,
        eval_dataset=eval_set,
        callbacks=[EarlyStoppingCallback(flags.early_stopping_patience), StageTimer(stage)],
        args=arguments,
    )
    return trainer


def sft(flags: SFTFlags) -> None:
    """Fine-tune a causal LM on next-SID prediction and, for pretrained bases, language alignment."""
    load_plugins(flags.plugin)
    flags, prompts, weights = resolve_sft_flags(flags)
    check_divisible(flags.batch_size, flags.micro_batch_size)
    output, final = Path(flags.output_dir), Path(flags.output_dir) / "final_checkpoint"
    required = ("train_file", "eval_file", "sid_index_path", "item_meta_path")
    inputs = list_training_inputs(flags, required, ("base_model", "preference_file"))
    stage = open_stage("sft", flags, inputs, [final], output / "sft.stage.json")
    if stage.finished:
        return
    # Now, not when training begins: a run cut off before that must not leave another run's checkpoints to be resumed.
    checkpoint = choose_resume_checkpoint(output, flags.resume_from_checkpoint, stage.resuming)
    check_adapter_checkpoint(checkpoint, flags.freeze_LLM, flags.lora)

    data = read_sft_data(flags)
    built = build_model(flags, data, prompts)
    batches = build_batches(flags, data, weights, built.encoder)
    trainable = count_trainable_parameters(built.model)
    say(f"[sft] {built.parameters:,} parameters, {trainable:,} trainable, {built.new_tokens} new SID tokens")
    say(f"[sft] {batches[0].rows:,} training rows, {batches[0].steps} steps an epoch")
    trainer = build_sft_trainer(flags, data, built, batches, stage)
    trainer.train(resume_from_checkpoint=checkpoint)
    export_model(trainer, built.model, built.encoder, final)
    stage.done(
        **{f"eval_{flags.best_by}": round(trainer.state.best_metric, 4)},
        steps=trainer.state.global_step,
        parameters=built.parameters,
        trainable=trainable,
    )


if __name__ == "__main__":
    run_command(sft, FLAGS)
