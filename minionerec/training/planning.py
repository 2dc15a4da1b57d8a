"""The plan of a training run: what it computes, what it keeps in memory, how long it takes, and what would fit.

`--dry_run True` of sft.py and rl.py and `python -m scripts.plan` print it. No weight is loaded: the model is built on
the meta device from its config. docs/planning.md explains every line.
"""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import psutil
import torch
from huggingface_hub import try_to_load_from_cache
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from minionerec.common.files import InputError
from minionerec.common.model_sources import TOKENIZER_FILES, translate_errors
from minionerec.common.processes import computes_on_cpu, count_processes
from minionerec.common.records import SID_TOKEN, Catalogue, Row
from minionerec.language.adapters import count_trainable_parameters, wrap_with_adapters
from minionerec.language.catalogue_trie import build_catalogue_trie
from minionerec.language.mixture import TaskMixture
from minionerec.language.model_checks import check_decoder_only, limit_length
from minionerec.language.models import build_model_from_config, load_tokenizer, train_tokenizer
from minionerec.language.prompts import Encoder, PromptSet
from minionerec.language.sid_tokens import add_sid_tokens
from minionerec.search.attention_check import check_tree_attention
from minionerec.training.optimizers import PLAIN_OPTIMIZERS
from minionerec.training.plan_memory import (
    ATTENTION,
    MLP,
    ModelShape,
    Setting,
    count_phases,
    count_search_bytes,
    find_peak,
    read_shape,
)
from minionerec.training.plan_work import (
    Work,
    count_operations,
    count_rl_work,
    count_sft_work,
    sample_mixture,
    with_prompts,
)
from minionerec.training.settings import RLFlags, SFTFlags

GIB = 2**30
UTILIZATION = 0.4  # of the arithmetic that the machine can do at best
STAND_IN_TOKENS = 8000  # of a tokenizer made from the item texts, where the base's own is not there
LAUNCHES = {"cpu": "one process", "gpu": "one process", "ddp": "DDP", "zero2": "ZeRO-2", "zero3": "ZeRO-3"}
LAUNCHES |= {"fsdp2": "FSDP2"}
SEARCHED_PROMPTS = {"cpu": 32, "cuda": 256}  # of a search at once, at most, see `choose_batch_size`


@dataclass(frozen=True)
class Machine:
    """What a run is planned for.

    Attributes:
        device: "cpu" or "cuda".
        engine, processes: see `name_engine`; one process a GPU.
        memory: bytes that each process may use.
        reserve: bytes of them that are taken before there is a model.
        flops: products of a process, operations a second at best; None where nobody said.
        measured: `flops` were measured here.
        utilization: the share of them that a run is taken to reach.
    """

    device: str
    engine: str
    processes: int
    memory: int
    reserve: int
    flops: float | None
    measured: bool
    utilization: float


def measure_flops(device: str) -> float:
    """Operations a second of a product of matrices, float32 on a CPU and bf16 elsewhere: the best of five."""
    size, dtype = (1024, torch.float32) if device == "cpu" else (8192, torch.bfloat16)
    left, right = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
    seconds = []
    for _ in range(6):
        started = time.perf_counter()
        left @ right
        if device != "cpu":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return 2 * size**3 / min(seconds[1:])


def find_machine(utilization: float = UTILIZATION) -> Machine:
    """The machine of this process, under the engine that its launcher asked for."""
    processes, engine = count_processes(), "DDP"
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true":
        engine = "FSDP2"
    elif os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true":
        engine = f"ZeRO-{os.environ.get('ACCELERATE_DEEPSPEED_ZERO_STAGE', '2')}"
    elif processes == 1:
        engine = "one process"
    device = "cpu" if computes_on_cpu() else "cuda"
    if device == "cpu":
        memory, reserve = psutil.virtual_memory().total // processes, psutil.Process().memory_info().rss
    else:
        free, memory = torch.cuda.mem_get_info()
        reserve = memory - free
    return Machine(device, engine, processes, memory, reserve, measure_flops(device), True, utilization)


def choose_machine(
    gpus: int,
    *,
    gpu_memory: float | None,
    launch: str,
    reserve: float,
    peak_tflops: float | None,
    utilization: float,
) -> Machine:
    """The machine that --gpus, --gpu_memory (GiB each) and --launch of the planner describe.

    Raises:
        InputError: values that do not fit together.
    """
    if gpus < 0 or utilization <= 0 or reserve < 0:
        raise InputError("--gpus, --reserve: must not be negative; --utilization: must be above 0")
    if launch == "cpu" or not gpus:
        if launch not in ("cpu", "auto"):
            raise InputError(f"--launch {launch}: needs --gpus 1 or more")
        flops = peak_tflops * 1e12 if peak_tflops else measure_flops("cpu")
        taken = psutil.Process().memory_info().rss
        memory = round(gpu_memory * GIB) if gpu_memory else psutil.virtual_memory().total
        return Machine("cpu", "one process", 1, memory, taken, flops, not peak_tflops, utilization)
    if gpu_memory is None and not torch.cuda.is_available():
        raise InputError("--gpu_memory: this machine has no GPU; say how many GiB each of them has")
    memory = round(gpu_memory * GIB) if gpu_memory else torch.cuda.mem_get_info()[1]
    if launch == "auto":
        launch = "ddp" if gpus > 1 else "gpu"
    engine, processes = LAUNCHES[launch], 1 if launch == "gpu" else gpus
    flops = peak_tflops * 1e12 if peak_tflops else None
    return Machine("cuda", engine, processes, memory, round(reserve * GIB), flops, False, utilization)


# ---------------------------------------------------------------------------------------------------------------- model
@dataclass
class Base:
    """A model on the meta device with a row for every SID token, its tokenizer, and what had to be assumed."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    new_tokens: int
    notes: tuple[str, ...] = ()


def find_base(path: str, flag: str) -> str:
    """The file or folder of a model: `path` itself, or where the hub's cache has the config of that name.

    Raises:
        InputError: neither is there.
    """
    if Path(path).is_file() or (Path(path) / "config.json").is_file():
        return path
    cached = None
    if not Path(path).exists() and path.count("/") <= 1 and not path.startswith((".", "/")):
        cached = try_to_load_from_cache(path, "config.json")
    if not isinstance(cached, str):
        raise InputError(
            f"--{flag} {path}: no folder with a config.json, and the hub's cache has no model of that name"
        )
    return str(Path(cached).parent)


def build_base(
    flags: SFTFlags | RLFlags, titles: Sequence[str], sid_tokens: Sequence[str], *, add_tokens: bool
) -> Base:
    """The model of a run, from its config alone.

    Args:
        flags: base_model or model_path.
        titles: of the items, which make a tokenizer where the base has none.
        sid_tokens: the distinct tokens of the catalogue.
        add_tokens: give SID tokens that are new their rows, as sft.py does.

    Raises:
        InputError: no model there that prefix trees can use.
    """
    flag = "base_model" if isinstance(flags, SFTFlags) else "model_path"
    base, titles = find_base(getattr(flags, flag), flag), [title for title in titles if title]
    if Path(base).is_file():
        with torch.device("meta"):
            model, tokenizer = build_model_from_config(base, titles, flags.seed, longest=flags.cutoff_len)
        return Base(model, tokenizer, add_sid_tokens(model, tokenizer, sid_tokens, flags.seed))
    with translate_errors(base, flag, "a causal LM"):
        with torch.device("meta"):
            config = AutoConfig.from_pretrained(base, local_files_only=True)
            check_decoder_only(config)
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa")
        check_tree_attention(model, flags.cutoff_len)
    if any((Path(base) / name).is_file() for name in TOKENIZER_FILES):
        tokenizer = load_tokenizer(base, flag)
        new = add_sid_tokens(model, tokenizer, sid_tokens, flags.seed) if add_tokens else 0
        return Base(model, tokenizer, new)
    rows = model.get_input_embeddings().weight.shape[0]
    model.resize_token_embeddings(rows + len(sid_tokens), mean_resizing=False)
    tokenizer = train_tokenizer(titles, STAND_IN_TOKENS)
    tokenizer.add_tokens(list(sid_tokens))
    note = "tokens: counted with a tokenizer made from the item titles; no tokenizer lies beside the config"
    return Base(model, tokenizer, len(sid_tokens), (note,))


def shape_model(base: Base, flags: SFTFlags | RLFlags, sid_tokens: Sequence[str], lora: bool) -> ModelShape:
    """The shape of a model and what of it the flags train, or with `lora` LoRA matrices and token rows."""
    shape, freeze = read_shape(base.model), getattr(flags, "freeze_LLM", False) and not lora
    if not (lora or freeze):
        return shape
    ids = base.tokenizer.convert_tokens_to_ids(list(sid_tokens))
    wrapped = wrap_with_adapters(copy.deepcopy(base.model), ids, replace(flags, lora=lora), freeze)
    shape = replace(shape, trainable=count_trainable_parameters(wrapped), trains="lora" if lora else "rows")
    if lora:
        shape = replace(shape, targets=tuple(flags.lora_targets or (*ATTENTION, *MLP)), rank=flags.lora_rank)
    return shape


# -------------------------------------------------------------------------------------------------------------- problem
@dataclass
class Problem:
    """A run to be planned: what does not change while settings that fit are looked for.

    Attributes:
        flags: of the run, resolved.
        shape_of: the shape of the model with LoRA, or as the flags say, by `lora`.
        work_of: the work of the run, by its flags and the number of processes.
        new_tokens: SID tokens that the base does not have.
        notes: what had to be assumed.
    """

    flags: SFTFlags | RLFlags
    shape_of: Callable[[bool], ModelShape]
    work_of: Callable[[SFTFlags | RLFlags, int], Work]
    new_tokens: int
    notes: tuple[str, ...] = ()


def list_distinct_tokens(catalogue: Catalogue) -> list[str]:
    """The distinct tokens of a catalogue's SIDs, sorted."""
    return sorted({token for sid in catalogue.sids for token in SID_TOKEN.findall(sid)})


def list_uncounted_savers(flags: SFTFlags | RLFlags) -> list[str]:
    """Flags that change memory and that the plan does not follow, with what it counts instead."""
    notes = []
    if flags.optim not in PLAIN_OPTIMIZERS:
        notes.append(f"--optim {flags.optim}: not counted, but the states of AdamW in float32")
    if flags.load_in_4bit:
        notes.append("--load_in_4bit True: not counted, but float32 weights of the base: 4 bytes each, not half a byte")
    if getattr(flags, "rollout_dtype", None) in ("bfloat16", "auto"):
        notes.append(f"--rollout_dtype {flags.rollout_dtype}: its copy of the weights is not counted, 2 bytes each")
    return notes


def pose_problem(
    flags: SFTFlags | RLFlags,
    catalogue: Catalogue,
    prompts: PromptSet,
    rows: Sequence[Row],
    build: Callable[[Sequence[Row], Encoder], TaskMixture],
    *,
    add_tokens: bool = True,
) -> Problem:
    """A run to be planned, from its flags and its data.

    Args:
        flags: resolved.
        catalogue: the items.
        prompts: the prompt set.
        rows: of the train split, those that the run draws.
        build: makes the examples of rows, as the command does.
        add_tokens: see `build_base`.

    Raises:
        InputError: see `build_base`; data that does not make up a step.
    """
    sid_tokens = list_distinct_tokens(catalogue)
    base = build_base(flags, catalogue.titles, sid_tokens, add_tokens=add_tokens)
    encoder = Encoder(base.tokenizer, prompts, limit_length(flags.cutoff_len, base.model))
    if isinstance(flags, RLFlags):
        trie = build_catalogue_trie(catalogue, encoder, "cpu")
        mixture, share = sample_mixture(rows, lambda drawn: build(drawn, encoder), flags.seed, 0)
    else:
        least = 4 * flags.batch_size
        mixture, share = sample_mixture(rows, lambda drawn: build(drawn, encoder), flags.seed, least)
    works: dict[tuple, Work] = {}

    def work_of(changed: SFTFlags | RLFlags, processes: int) -> Work:
        names = ("micro_batch_size", "train_batch_size")
        key = (processes, *(getattr(changed, name, None) for name in names))
        if key not in works and isinstance(changed, RLFlags):
            works[key] = count_rl_work(changed, mixture, share, trie, processes)
        elif key not in works:
            works[key] = count_sft_work(changed, mixture, share, encoder, processes)
        return works[key]

    shape_of = cache(lambda lora: shape_model(base, flags, sid_tokens, lora))
    return Problem(flags, shape_of, work_of, base.new_tokens, (*base.notes, *list_uncounted_savers(flags)))


# ----------------------------------------------------------------------------------------------------------------- plan
@dataclass
class Plan:
    """A run under one setting.

    Attributes:
        phases: {phase: {what: bytes}}, see `count_phases`.
        peak: (phase, bytes) of the largest.
        operations: {part: floating-point operations of the run}.
        seconds: of the run; None where the speed of the machine is not known.
    """

    machine: Machine
    flags: SFTFlags | RLFlags
    shape: ModelShape
    work: Work
    setting: Setting
    phases: dict[str, dict[str, int]]
    peak: tuple[str, int]
    operations: dict[str, float]
    seconds: float | None

    @property
    def fits(self) -> bool:
        """The peak stays within the memory of a process."""
        return self.peak[1] + self.machine.reserve <= self.machine.memory


def check_combination(flags: SFTFlags | RLFlags, shape: ModelShape, engine: str) -> None:
    """Stop at what the trainers refuse, see `check_engine`.

    Raises:
        InputError: what does not go together.
    """
    if engine == "FSDP2" and shape.trains != "all" and shape.tied:
        raise InputError("FSDP2 with --lora or --freeze_LLM: not with a base whose output layer is its embedding")
    if engine in ("ZeRO-3", "FSDP2") and getattr(flags, "sync_ref_model", False):
        raise InputError(f"--sync_ref_model True: not under {engine}, whose policy is in parts")


def _shares_prompts(flags: RLFlags, accumulation: int, engine: str) -> bool:
    """As the trainer decides it, see `GroupTrainer.share_prompts`."""
    apart = flags.dropout or (flags.lora and flags.lora_dropout) or flags.gradient_checkpointing or flags.use_vllm
    apart = apart or flags.rollout_dtype or flags.mask_all_zero or flags.attention == "flex_attention"
    return bool(flags.beta and not apart and accumulation == 1 and engine == "one process")


def make_plan(problem: Problem, machine: Machine, flags: SFTFlags | RLFlags | None = None) -> Plan:
    """The plan of a run, with its own flags or with others.

    Raises:
        InputError: flags that do not go together.
    """
    flags = flags or problem.flags
    shape, work = problem.shape_of(flags.lora), problem.work_of(flags, machine.processes)
    check_combination(flags, shape, machine.engine)
    is_rl = isinstance(flags, RLFlags)
    setting = Setting(
        engine=machine.engine,
        processes=machine.processes,
        bf16=machine.device != "cpu" if flags.bf16 is None else flags.bf16,
        checkpointing=flags.gradient_checkpointing,
        accumulates=work.accumulation > 1,
        reference=is_rl and bool(flags.beta) and (not flags.lora or bool(flags.ref_model_path)),
        shares_prompts=is_rl and _shares_prompts(flags, work.accumulation, machine.engine),
        dropout=bool(flags.dropout),
        lora_dropout=flags.lora and bool(flags.lora_dropout),
        exports_here=machine.device == "cpu",
    )
    if is_rl:
        # What a search finds free decides how many prompts it takes at once: half of that, as `choose_batch_size` does.
        alone = count_phases(shape, work.largest, setting, {"alone": replace(work.searches["rollouts"], prompts=0)})
        free = machine.memory - machine.reserve - sum(alone["alone"].values())
        each = count_search_bytes(shape, replace(work.searches["rollouts"], prompts=1), setting)
        most = min(SEARCHED_PROMPTS[machine.device], work.searches["rollouts"].prompts)
        work = with_prompts(work, "rollouts", max(1, min(most, free // 2 // each)))
        if "validation" in work.searches:
            size = max(1, flags.eval_batch_size // flags.test_beam)
            work = with_prompts(work, "validation", min(size, flags.eval_sample) if flags.eval_sample > 0 else size)
    phases = count_phases(shape, work.largest, setting, work.searches)
    reference = is_rl and bool(flags.beta)
    operations = count_operations(shape, work, flags.gradient_checkpointing, reference)
    seconds = None
    if machine.flops:
        seconds = sum(operations.values()) / (machine.flops * machine.utilization * machine.processes)
    return Plan(machine, flags, shape, work, setting, phases, find_peak(phases), operations, seconds)
