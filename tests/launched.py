"""Runs a command and writes what its engine did to the weights: `launched.py sft.py --flag value ...`

Environment:
    SEEN: a folder; class and local number of elements of every parameter at the first step go to SEEN/RANK.json.
    FSDP_ON_CPU: lets accelerate run real FSDP2 over gloo. accelerate 1.15 has no FSDP where PartialState says
        MULTI_CPU, though torch has; here it says MULTI_GPU.
    DIE_AT_STEP, DIE_ON_RANK, DIE_HOW: the rank kills itself ("kill") or stops by an error ("error") before that step.
    EXTRA_FORWARDS: rank 0 searches the validation rows once more than the others, so that forwards are unequal.
"""

import json
import os
import runpy
import signal
import sys
from pathlib import Path

import accelerate.state
from accelerate.utils import DistributedType
from transformers import Trainer

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


step_before = Trainer.training_step


def training_step(self, model, *arguments, **named):
    rank = os.environ.get("RANK", "0")
    report = Path(os.environ.get("SEEN", "/nonexistent")) / f"{rank}.json"
    if report.parent.is_dir() and not report.exists():
        engine = {"wrapper": type(self.model_wrapped).__name__, "optimizer": type(self.optimizer.optimizer).__name__}
        report.write_text(json.dumps({**engine, "parameters": describe_parameters(model)}))
    if os.environ.get("DIE_ON_RANK") == rank and self.state.global_step == int(os.environ["DIE_AT_STEP"]):
        if os.environ["DIE_HOW"] == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        from minionerec.common.files import InputError

        raise InputError(f"rank {rank} stops here")
    return step_before(self, model, *arguments, **named)


Trainer.training_step = training_step

if os.environ.get("EXTRA_FORWARDS"):
    from minionerec.evaluation import ranking

    rank_before = ranking.rank_sids

    def rank_sids(*arguments, **named):
        result = rank_before(*arguments, **named)
        return rank_before(*arguments, **named) if os.environ.get("RANK") == "0" else result

    ranking.rank_sids = rank_sids

sys.argv = sys.argv[1:]
sys.path.insert(0, str(Path(sys.argv[0]).resolve().parent))
runpy.run_path(sys.argv[0], run_name="__main__")
