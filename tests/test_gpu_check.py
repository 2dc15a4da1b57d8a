"""The GPU check in its tiny form, on the CPU: parts that pass, fail or are skipped, its time, its launches."""

import json
import os
import random
import subprocess
import sys
import time

import pytest
import torch

from benchmarks import bench_sft, device_checks, gpu_check
from benchmarks.arithmetic import count_forward_flops
from benchmarks.gpu_check import GPUCheckFlags, Part, check, check_and_exit, list_launches, run_command_line, run_part
from benchmarks.problems import make_up_data, write_published_data
from minionerec.common.cli import parse_flags
from minionerec.common.files import InputError
from minionerec.common.items import read_catalogue
from minionerec.common.records import read_index, read_info, read_rows
from minionerec.search.prefix_tree import batch_trees

whole_launch = pytest.mark.skipif(
    os.environ.get("LAUNCH_TESTS") != "all", reason="runs three commands; LAUNCH_TESTS=all does it"
)


def test_correctness_and_speed(capsys):
    report = check(GPUCheckFlags(device="cpu", parts=["correct", "speed"]))
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == report
    assert not report["failed"] and report["device"] == "CPU"
    # float32 and bfloat16: search, sampling, training twice, GRPO; then peak, search, training, GRPO.
    assert len(report["parts"]) == 2 * 5 + 4
    assert report["skipped"].keys() == {
        "correct/grpo/float32/flex_attention",
        "correct/grpo/bfloat16/flex_attention",
        "speed/training/flex_attention/qwen3-tiny",
    }
    for name, figures in report["parts"].items():
        if name.startswith("speed/") and name != "speed/peak":
            assert figures["ratio"] > 0 and 0 < figures.get("share_of_peak", 0.5) < 1


def test_a_failing_part_gives_status_1_and_is_named(monkeypatch, capsys):
    monkeypatch.setattr(device_checks, "check_search", lambda *_: 1 / 0)
    monkeypatch.setattr(gpu_check, "list_timings", lambda *_: [Part("speed/a", 1e6, dict)])
    monkeypatch.setattr(
        device_checks, "check_training", lambda *_: device_checks.hold_to_limits({"loss_off": 1}, torch.float32)
    )
    for name in ("check_sampling", "check_grpo"):
        monkeypatch.setattr(device_checks, name, lambda *_: {"figure": 1})
    with pytest.raises(SystemExit) as stopped:
        check_and_exit(GPUCheckFlags(device="cpu", parts=["correct", "speed"], seconds=60))
    output = capsys.readouterr()
    report = json.loads(output.out.splitlines()[-1])
    assert stopped.value.code == 1 and "FAILED: correct/search/float32, " in output.err
    assert (
        "ZeroDivisionError: division by zero" in output.out and "CheckFailed: loss_off 1 is above 0.0001" in output.out
    )
    assert report["skipped"]["speed/a"].startswith("needs 1000000 s, ")
    assert report["parts"]["correct/grpo/bfloat16/sdpa"] == {"seconds": 0.0, "figure": 1}


def test_a_device_and_a_part_that_are_not_there(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="--device cuda: torch finds no CUDA device"):
        check(GPUCheckFlags(device="cuda"))
    with pytest.raises(SystemExit):
        parse_flags(GPUCheckFlags, ["--parts", "corect"])
    assert "--parts corect: expected one of correct, launch, speed" in capsys.readouterr().err


@pytest.mark.parametrize("gpus, runnable", [(0, ["cpu"]), (1, ["gpu"]), (2, ["gpu", "ddp", "fsdp2"])])
@pytest.mark.parametrize("deepspeed", [False, True])
def test_which_launches_a_machine_allows(monkeypatch, gpus, runnable, deepspeed):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(gpu_check.importlib.util, "find_spec", lambda name: deepspeed or None)
    parts = list_launches(torch.device("cuda" if gpus else "cpu"), 0)
    runnable = runnable + ["zero2", "zero3"] * (deepspeed and gpus > 0)
    assert [part.name for part in parts if not part.missing] == [f"launch/{how}" for how in runnable]
    assert {part.name for part in parts} >= {"launch/ddp", "launch/fsdp2", "launch/zero2", "launch/zero3"}
    reasons = [part.missing for part in parts if "zero" in part.name]
    assert deepspeed or reasons == ["deepspeed is not installed"] * 2


def test_commands_are_ended_with_what_they_started(tmp_path):
    child = f"import os, time; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    sleeper = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    part = Part("launch/sleeper", 0, lambda: run_command_line([sys.executable, "-c", sleeper], dict(os.environ)))
    run_part(part, 3)
    assert part.status == "FAILED" and part.reason == "not done after 3 s"
    pid = int((tmp_path / "pid").read_text())
    for _ in range(50):  # the orphan is reaped by whoever adopted it
        try:
            state = open(f"/proc/{pid}/stat").read().split()[2]
        except FileNotFoundError:
            break
        if state == "Z":
            break
        time.sleep(0.1)
    else:
        pytest.fail(f"process {pid} still runs")
    with pytest.raises(device_checks.CheckFailed, match="ended with status 3: why"):
        run_command_line([sys.executable, "-c", "print('why'); raise SystemExit(3)"], dict(os.environ))


def test_the_data_of_the_launches_is_read_back(tmp_path):
    rows, catalogue = make_up_data(random.Random(0), users=20, items=60)
    paths = write_published_data(rows, catalogue, tmp_path)
    assert read_rows(paths["train_file"]) + read_rows(paths["eval_file"]) == rows
    again, _ = read_catalogue(paths["item_meta_path"], read_index(paths["sid_index_path"]), "index")
    assert again.sids == catalogue.sids and read_info(paths["info_file"]).titles == catalogue.titles


def test_operations_of_trees_leave_padding_out():
    model = device_checks.build_random_model("qwen3-tiny", 400, 0)
    groups = [[([5, 6, 7], [8, 9]), ([5, 6], [7])], [([3], [4])]]
    batch = batch_trees(groups, 0)
    assert batch.input_ids.shape == (2, 4)  # 5 6 7 8, and 3 with padding
    expected = count_forward_flops(model.config, 5, 4 * 5 // 2 + 1, 4)
    assert bench_sft.count_tree_flops(model, batch, 0) == expected


@pytest.mark.parametrize("launching", [False, pytest.param(True, marks=whole_launch)])
def test_the_script(launching):
    environment = {**os.environ, "MINIONEREC_PYTHON": sys.executable}
    script = ["bash", str(gpu_check.ROOT / "scripts" / "gpu_check.sh"), "--device", "cpu", "--parts", "launch"]
    script += ["--seconds", "300" if launching else "10"]
    done = subprocess.run(script, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["skipped"].keys() >= {f"launch/{how}" for how in ("ddp", "fsdp2", "zero2", "zero3")}
    if launching:
        assert 0 <= report["parts"]["launch/cpu"]["HR@10"] <= 1
    else:
        assert report["skipped"]["launch/cpu"].startswith("needs 30 s, ") and not report["parts"]
