"""Runs a command and writes what its engine did to the weights: `launched.py sft.py --flag value ...`, or `-m rq.rqvae`

Environment:
    SEEN: a folder; class and local number of elements of every parameter at the first step go to SEEN/RANK.json, the
        peak memory of the process in MiB to SEEN/RANK.memory.
    FSDP_ON_CPU: lets accelerate run real FSDP2 over gloo. accelerate 1.15 has no FSDP where PartialState says
        MULTI_CPU, though torch has; here it says MULTI_GPU.
    DIE_AT_STEP, DIE_ON_RANK, DIE_HOW: the rank kills itself ("kill") or stops by an error ("error") before that step,
        counted from 0: of a trainer of transformers, else of an optimizer, else a batch of texts that is embedded.
    EXTRA_FORWARDS: rank 0 searches the validation rows once more than the others, so that forwards are unequal.
"""

import atexit
import json
import os
import resource
import runpy
import signal
import sys
from pathlib import Path

import accelerate.state
from accelerate.utils import DistributedType
from torch.optim.optimizer import register_optimizer_step_pre_hook
from transformers import Trainer

RANK = os.environ.get("RANK", "0")
SEEN = Path(os.environ.get("SEEN", "/nonexistent"))

if os.environ.get("FSDP_ON_CPU"):
    start = accelerate.state.PartialState.__init__

    def start_as_gpu(self, cpu=False, **named):
        fresh = not self._shared_state
        start(self, cpu=cpu, **named)
        if fresh:
            self.distributed_type = DistributedType.MULTI_GPU

    accelerate.state.PartialState.__init__ = start_as_gpu


def describe_parameters(model):
    """{name: [class, elements on this rank, elements altogether]}"""
    seen = {}
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "ds_tensor"):
            seen[name] = ["ZeRO-3", parameter.ds_tensor.numel(), parameter.ds_numel]
        elif hasattr(parameter, "to_local"):
            seen[name] = [type(parameter).__name__, parameter.to_local().numel(), parameter.numel()]
        else:
            seen[name] = [type(parameter).__name__, parameter.numel(), parameter.numel()]
    return seen


def die_at(step):
    if os.environ.get("DIE_ON_RANK") != RANK or step != int(os.environ["DIE_AT_STEP"]):
        return
    if os.environ["DIE_HOW"] == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    from minionerec.common.files import InputError

    raise InputError(f"rank {RANK} stops here")


step_before = Trainer.training_step


def training_step(self, model, *arguments, **named):
    report = SEEN / f"{RANK}.json"
    if SEEN.is_dir() and not report.exists():
        engine = {"wrapper": type(self.model_wrapped).__name__, "optimizer": type(self.optimizer.optimizer).__name__}
        report.write_text(json.dumps({**engine, "parameters": describe_parameters(model)}))
    die_at(self.state.global_step)
    return step_before(self, model, *arguments, **named)


Trainer.training_step = training_step
calls = []


def count_call(*_):
    die_at(len(calls))
    calls.append(1)


command = sys.argv[2] if sys.argv[1] == "-m" else Path(sys.argv[1]).stem
if command in ("rq.rqvae", "rq.rqkmeans_plus", "sasrec"):
    register_optimizer_step_pre_hook(count_call)
if command == "rq.text2emb.amazon_text2emb" and os.environ.get("DIE_ON_RANK"):
    from sentence_transformers import SentenceTransformer

    encode_before = SentenceTransformer.encode

    def encode(*arguments, **named):
        count_call()
        return encode_before(*arguments, **named)

    SentenceTransformer.encode = encode


def write_peak_memory():
    if SEEN.is_dir():
        kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        (SEEN / f"{RANK}.memory").write_text(str(round(kib / 1024)))


atexit.register(write_peak_memory)

if os.environ.get("EXTRA_FORWARDS"):
    from minionerec.evaluation import ranking

    rank_before = ranking.rank_sids

    def rank_sids(*arguments, **named):
        result = rank_before(*arguments, **named)
        return rank_before(*arguments, **named) if os.environ.get("RANK") == "0" else result

    ranking.rank_sids = rank_sids

sys.argv = sys.argv[1:]
if sys.argv[0] == "-m":
    sys.argv = sys.argv[1:]
    runpy.run_module(command, run_name="__main__", alter_sys=True)
else:
    sys.path.insert(0, str(Path(sys.argv[0]).resolve().parent))
    runpy.run_path(sys.argv[0], run_name="__main__")
