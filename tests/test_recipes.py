"""The five steps of docs/recipes.md for a log of one's own, as they stand on the page, on a made-up shop."""

import csv
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
from launching import long_form

from minionerec.common.files import read_json
from minionerec.language.prompts import load_prompts

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "recipes.md"
STEPS = re.findall(r"^<!-- run -->\n```bash\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
ITEMS = 30


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    """A folder that looks like a clone of the project, with log.csv and items.csv of users who walk along the items."""
    folder = tmp_path_factory.mktemp("shop")
    for path in ROOT.iterdir():
        if not path.name.startswith(".") and path.name not in ("output", "wandb"):
            (folder / path.name).symlink_to(path)
    rng = random.Random(0)
    words = ["red", "blue", "old", "new", "saw", "drill", "lamp"]
    with (folder / "items.csv").open("w", newline="") as file:
        titles = [f"{rng.choice(words)} {rng.choice(words)} {item}" for item in range(ITEMS)]
        rows = [(f"P{item:03}", title, title.split()[0]) for item, title in enumerate(titles)]
        csv.writer(file).writerows([("item", "title", "category"), *rows])
    log = []
    for user in range(40):
        item, day = rng.randrange(ITEMS), rng.randrange(1, 20)
        for hour in range(8):
            log.append((f"u{user}", f"P{item:03}", f"2024-05-{day:02} {hour:02}:{user:02}:00"))
            item = (item + rng.choice([1, 1, 1, 3])) % ITEMS
    with (folder / "log.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("user", "item", "time"), *log])
    return folder


def run_step(step, folder, **variables):
    environment = {"MINIONEREC_PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "LAUNCH": "none", **variables}
    environment |= {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(folder)}
    done = subprocess.run(
        ["bash", "-ec", step],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout


def test_a_log_is_read_and_checked(shop):
    assert len(STEPS) == 4 and "csv_data_process" in STEPS[0]
    output = run_step(STEPS[0], shop)
    assert "0 errors, 0 warnings" in output
    items = read_json(shop / "output/shop/data/shop.item.json")
    assert {record["original_id"] for record in items.values()} == {f"P{item:03}" for item in range(ITEMS)}


def test_the_flags_of_the_pipeline_are_read(shop):
    run_step(STEPS[1], shop, MINIONEREC_CHECK_FLAGS="1")
    assert not (shop / "output/shop/sft").exists()


def test_the_prompts_of_a_published_checkpoint_are_read(tmp_path):
    (block,) = re.findall(r"^```yaml\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    (tmp_path / "published_prompts.yaml").write_text(block)
    prompts = load_prompts(tmp_path / "published_prompts.yaml")
    assert prompts.prompt("next_sid", ["<a_1>", "<a_2>"]).count("<a_1>, <a_2>") == 1
    assert prompts.target("next_sid", "<a_3>") == "<a_3>\n"


@long_form
def test_all_steps(shop):
    """The small numbers of the page are made smaller still; nothing else is changed."""
    smaller = {"--max_steps 60": "--max_steps 2", "--eval_step 20": "--eval_step 2"}
    smaller |= {
        "--train_batch_size 1024": "--train_batch_size 64",
        "industrial_taught_sft.yaml ": "\\g<0>--num_epochs 1 ",
    }
    outputs = []
    for step in STEPS:
        for text, other in smaller.items():
            step = re.sub(re.escape(text), other, step)
        outputs.append(run_step(step, shop))
    assert "HR@10" in outputs[2] and (shop / "output/shop/report.html").is_file()
    with (shop / "output/shop/recommendations.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 400 and {row["user_id"] for row in rows} == {f"u{user}" for user in range(40)}
    assert {row["original_id"] for row in rows} <= {f"P{item:03}" for item in range(ITEMS)}
