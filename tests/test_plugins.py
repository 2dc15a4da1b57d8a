"""A reward, a task, a baseline and a SID method of one's own, one file each: the examples of docs/extending.md run."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import data
from minionerec.common.embeddings import save_embeddings
from minionerec.common.files import InputError, read_json
from minionerec.common.plugins import load_plugins
from minionerec.common.records import read_index
from minionerec.language import prompts
from minionerec.training import rewards
from minionerec.training.settings import RLFlags, SFTFlags
from rl import rl
from sft import sft

EXAMPLES = Path(__file__).parent.parent / "docs" / "examples"


REGISTRIES = [data.TASKS, data.RL_TASKS, prompts.TASK_FIELDS, prompts.REGISTERED_TEMPLATES, rewards.REWARDS]


@pytest.fixture(autouse=True)
def registries_as_they_were():
    """What a plugin registers is gone after its test."""
    before = [dict(registry) for registry in REGISTRIES]
    yield
    for registry, content in zip(REGISTRIES, before, strict=True):
        registry.clear()
        registry.update(content)


def test_every_example_is_short():
    files = sorted(EXAMPLES.glob("*.py"))
    assert {file.stem for file in files} == {"baseline", "reward", "sid_method", "task"}
    assert all(len(file.read_text().splitlines()) <= 40 for file in files)


def test_a_reward_in_one_file(trained, tmp_path):
    rl(
        RLFlags(
            model_path=trained.checkpoint,
            **{name: trained.paths[name] for name in ("train_file", "eval_file", "info_file")},
            output_dir=str(tmp_path / "rl"),
            plugin=[str(EXAMPLES / "reward.py")],
            reward_type=["first_code", "rule:0.5"],
            num_generations=4,
            train_batch_size=16,
            gradient_accumulation_steps=1,
            max_steps=2,
            test_during_training=False,
        )
    )
    state = read_json(next((tmp_path / "rl").glob("checkpoint-*")) / "trainer_state.json")
    assert 0 <= state["log_history"][0]["reward_first_code"] <= 1
    score = rewards.REWARDS["first_code"].build(None)
    example = type("Row", (), {"sid": "<a_1><b_2>"})
    assert score(["<a_1><b_2>", "<a_1><b_3>", "<a_2><b_2>"], example) == [1.0, 0.5, 0.0]


def test_a_task_in_one_file(trained, tmp_path, capsys):
    sft(
        SFTFlags(
            base_model=str(trained.folder / "tiny.json"),
            **{name: trained.paths[name] for name in ("train_file", "eval_file", "sid_index_path", "item_meta_path")},
            output_dir=str(tmp_path / "sft"),
            plugin=[str(EXAMPLES / "task.py")],
            tasks=["next_sid", "last_item2sid:0.5"],
            train_from_scratch=True,
            batch_size=32,
            micro_batch_size=32,
            num_epochs=1,
        )
    )
    assert "[sft] last_item2sid x 0.5: " in capsys.readouterr().out
    # A checkpoint is read without the plugin too.
    assert "last_item2sid" not in (tmp_path / "sft" / "final_checkpoint" / "prompts.yaml").read_text()
    assert "last_item2sid" in data.RL_TASKS


@pytest.mark.parametrize(
    "text, said",
    [
        (None, "expected a Python file that exists"),
        ("def (\n", "does not load (SyntaxError"),
        ("1 / 0\n", "does not load (ZeroDivisionError"),
        (
            "from minionerec.training.rewards import register_reward\nregister_reward('rule', None)\n",
            "reward 'rule' is registered already",
        ),
        (
            "from data import register_task\n"
            "register_task('t', 'history', 'sid', {'prompt': '{sid}', 'target': '{sid}'}, None)\n",
            "task t: the prompt contains its own target {sid}",
        ),
    ],
)
def test_plugins_that_are_refused(tmp_path, text, said):
    if text is not None:
        (tmp_path / "mine.py").write_text(text)
    with pytest.raises(InputError) as error:
        load_plugins([str(tmp_path / "mine.py")])
    assert said in str(error.value) and "\n" not in str(error.value)
    assert "t" not in data.TASKS


def test_a_sid_method_in_one_file(tmp_path):
    array = np.random.default_rng(0).standard_normal((60, 8)).astype(np.float32)
    save_embeddings(tmp_path / "toy.emb-made-td.npy", array, [str(item) for item in range(60)], "made", ["title"])
    done = subprocess.run(
        [sys.executable, "-m", "docs.examples.sid_method", "--data_path", tmp_path / "toy.emb-made-td.npy"]
        + ["--output_file", tmp_path / "out" / "toy.index.json", "--codebook_size", "8", "--num_levels", "2"],
        cwd=EXAMPLES.parents[1],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    index = read_index(tmp_path / "out" / "toy.index.json")
    assert len(set(index.values())) == 60 and {len(tokens) for tokens in index.values()} <= {2, 3}
    assert (tmp_path / "out" / "toy.index.quality.json").is_file()
