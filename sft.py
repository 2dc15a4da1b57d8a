r"""Supervised fine-tuning: a causal LM learns to write the SID of the user's next item.

    python sft.py --base_model Qwen/Qwen2.5-0.5B --train_file ... --eval_file ... --sid_index_path X.index.json \
        --item_meta_path X.item.json --output_dir output/sft
"""

from __future__ import annotations

from minionerec.common.cli import parse_flags, recorded_settings, run_command
from minionerec.training.settings import SFTFlags

if __name__ == "__main__":
    # Before the imports below, which take seconds: --help and a wrong flag answer at once.
    FLAGS = parse_flags(SFTFlags)

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from transformers import EarlyStoppingCallback, PreTrainedModel

from data import TASKS, EvalSidDataset, TaskInputs, build_mixture, choose_tasks
from minionerec.common.files import InputError
from minionerec.common.items import read_items
from minionerec.common.model_folder import summarise_rows, write_model_catalogue
from minionerec.common.plugins import load_plugins
from minionerec.common.processes import is_main_process, process_state, say
from minionerec.common.records import Row
from minionerec.common.stage import Stage, open_stage
from minionerec.common.step_log import prepare_loggers
from minionerec.evaluation.ranking import measure_validation
from minionerec.language.adapters import (
    check_adapter_checkpoint,
    count_trainable_parameters,
)
from minionerec.language.catalogue_trie import build_catalogue_trie
from minionerec.language.mixture import TaskMixture
from minionerec.language.prompts import TASK_FIELDS, Encoder, PromptSet, load_prompts
from minionerec.search.legal_softmax import LegalTokens
from minionerec.training.callbacks import StageTimer
from minionerec.training.checkpoints import choose_resume_checkpoint, export_model
from minionerec.training.hub import push_model_folder
from minionerec.training.model_card import write_model_card
from minionerec.training.plan_report import report_plan
from minionerec.training.planning import Plan, find_machine, pose_problem
from minionerec.training.setup import list_training_inputs
from minionerec.training.sft_setup import (
    SFTInputs,
    SFTModel,
    batch_training,
    batch_validation,
    build_sft_arguments,
    build_sft_model,
    check_sft_flags,
    list_teacher_folders,
    read_sft_data,
)
from minionerec.training.sft_trainer import TreeBatches, TreeTrainer


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
    check_sft_flags(flags)
    if in_memory := [task for task in weights if TASKS[task].in_memory]:
        if flags.streaming == "True":
            raise InputError(f"--streaming True: --tasks {in_memory[0]} keeps its targets in memory")
        flags = replace(flags, streaming="False")
    worded = [task for task in weights if TASK_FIELDS[TASKS[task].template or task][1] != "sid"]
    if flags.softmax == "legal" and worded:
        raise InputError(f"--softmax legal: the targets of {worded[0]} are no SIDs")
    return flags, prompts, weights


def build_batches(
    flags: SFTFlags, data: SFTInputs, weights: dict[str, float], encoder: Encoder
) -> tuple[TreeBatches, TreeBatches]:
    """(training, validation) micro-batches. The validation loss is that of next_sid, where the prompt set has it."""
    texts = data.descriptions, data.preferences
    teaching = {"teacher_name": flags.teacher, "walk_teacher_name": flags.walk_teacher}
    teaching |= {"cf_path": flags.cf_path, "walks": flags.walks}
    train_inputs = TaskInputs(data.train_rows, data.catalogue, *texts, flags.cut_histories, flags.seed, **teaching)
    eval_tasks = dict.fromkeys(["next_sid"] if "next_sid" in encoder.prompts.templates else weights, 1.0)
    train_part = build_mixture(weights, train_inputs, encoder)
    eval_part = build_mixture(eval_tasks, TaskInputs(data.valid_rows, data.catalogue, *texts), encoder)
    for line in train_part.report():
        say(f"[sft] {line}")
    legal = LegalTokens(encoder.sid_ids(data.catalogue.sids)) if flags.softmax == "legal" else None
    return (
        batch_training(flags, train_part, encoder, legal=legal),
        batch_validation(flags, eval_part, encoder, legal=legal),
    )


def build_sft_trainer(
    flags: SFTFlags, data: SFTInputs, built: SFTModel, batches: tuple[TreeBatches, TreeBatches], stage: Stage
) -> TreeTrainer:
    """The trainer, which keeps the best epoch by --best_by."""
    train_set, eval_set = batches
    validate = None
    if flags.best_by != "loss":
        catalogue_trie = build_catalogue_trie(data.catalogue, built.encoder, process_state().device)
        examples = EvalSidDataset(data.valid_rows, built.encoder)

        def validate(model: PreTrainedModel) -> dict[str, float]:
            return measure_validation(model, catalogue_trie, examples, flags.eval_beams, flags.micro_batch_size)

    return TreeTrainer(
        model=built.model,
        validate=validate,
        legal=train_set.legal,
        train_dataset=train_set,
        eval_dataset=eval_set,
        callbacks=[EarlyStoppingCallback(flags.early_stopping_patience), StageTimer(stage)],
        args=build_sft_arguments(flags, train_set.steps),
    )


def complete_sft_folder(folder: Path, flags: SFTFlags, data: SFTInputs, best: float) -> None:
    """Add the catalogue and the model card to the folder of a trained model."""
    records = read_items(flags.item_meta_path, data.index, flags.sid_index_path)
    known = summarise_rows(
        data.catalogue,
        data.train_rows,
        records,
        flags.cutoff_len,
        shared_sids=len(set(data.catalogue.sids)) < len(data.catalogue.sids),
    )
    write_model_catalogue(folder, known)
    write_model_card(
        folder,
        stage="Supervised fine-tuning (`sft.py`)",
        settings=recorded_settings(flags),
        known=known,
        validation={flags.best_by: best},
    )


def plan_sft(flags: SFTFlags, prompts: PromptSet, weights: dict[str, float]) -> Plan:
    """Print the plan of the run and return it."""
    data = read_sft_data(flags)

    def build(rows: Sequence[Row], encoder: Encoder) -> TaskMixture:
        texts = data.descriptions, data.preferences
        inputs = TaskInputs(rows, data.catalogue, *texts, flags.cut_histories, flags.seed)
        return build_mixture(weights, inputs, encoder)

    return report_plan(pose_problem(flags, data.catalogue, prompts, data.train_rows, build), find_machine())


def sft(flags: SFTFlags) -> None:
    """Fine-tune a causal LM on next-SID prediction and, for pretrained bases, language alignment."""
    load_plugins(flags.plugin)
    flags, prompts, weights = resolve_sft_flags(flags)
    output, final = Path(flags.output_dir), Path(flags.output_dir) / "final_checkpoint"
    required = ("train_file", "eval_file", "sid_index_path", "item_meta_path")
    optional = ("base_model", "preference_file", "sid_init", "cf_path")
    inputs = [*list_training_inputs(flags, required, optional), *list_teacher_folders(flags)]
    stage = open_stage("sft", flags, inputs, [final], output / "sft.stage.json", trains_in=output)
    if flags.dry_run:
        plan_sft(flags, prompts, weights)
    if stage.finished:
        return
    # Now, not when training begins: a run cut off before that must not leave another run's checkpoints to be resumed.
    checkpoint = choose_resume_checkpoint(output, flags.resume_from_checkpoint, stage.resuming)
    prepare_loggers(flags, output, resuming=checkpoint is not None)
    check_adapter_checkpoint(checkpoint, flags.freeze_LLM, flags.lora)

    data = read_sft_data(flags)
    built = build_sft_model(flags, data, prompts)
    batches = build_batches(flags, data, weights, built.encoder)
    trainable = count_trainable_parameters(built.model)
    say(f"[sft] {built.parameters:,} parameters, {trainable:,} trainable, {built.new_tokens} new SID tokens")
    say(f"[sft] {batches[0].rows:,} training rows, {batches[0].steps} steps an epoch")
    trainer = build_sft_trainer(flags, data, built, batches, stage)
    trainer.train(resume_from_checkpoint=checkpoint)

    def complete(folder: Path) -> None:
        complete_sft_folder(folder, flags, data, trainer.state.best_metric)

    export_model(trainer, built.encoder, final, complete=complete)
    if is_main_process():
        push_model_folder(final, flags)
    stage.done(
        **{f"eval_{flags.best_by}": round(trainer.state.best_metric, 4)},
        steps=trainer.state.global_step,
        parameters=built.parameters,
        trainable=trainable,
    )


if __name__ == "__main__":
    run_command(sft, FLAGS, shared=True)
