"""cross_domain.sh: two datasets in one numbering, a catalogue of each, the flags of all stages, and a toy run."""

import csv
import json

import pytest
from launching import long_form
from test_benchmark import run_script
from test_pipeline import ROOT

from convert_dataset import convert_dataset
from data_process.join_data_process import join_datasets
from data_process.settings import ConvertFlags, JoinFlags
from minionerec.common.files import InputError, read_json
from minionerec.common.interactions import INTER_COLUMNS
from minionerec.common.records import read_info, read_rows


def write_domain(folder, name, items, shift):
    """Items named after the domain, and users who walk along them."""
    folder.mkdir(exist_ok=True)
    records = {
        str(item): {"title": f"{name} thing {item % 4} part {item}", "description": "", "brand": "", "categories": ""}
        for item in range(items)
    }
    (folder / f"{name}.item.json").write_text(json.dumps(records))
    for split, users in (("train", range(40)), ("valid", range(40, 50)), ("test", range(50, 60))):
        lines = ["\t".join(INTER_COLUMNS)]
        for user in users:
            walk = [(user * shift + step) % items for step in range(3 + user % 3)]
            lines.append(f"u{user}\t{' '.join(map(str, walk[:-1]))}\t{walk[-1]}")
        (folder / f"{name}.{split}.inter").write_text("\n".join(lines) + "\n")


@pytest.fixture
def domains(tmp_path):
    write_domain(tmp_path / "raw", "saws", 20, 1)
    write_domain(tmp_path / "raw", "pens", 15, 3)
    return tmp_path / "raw"


def test_two_datasets_in_one_numbering(domains, tmp_path):
    """The rows are the same, the second's items stand behind the first's, and each has its own catalogue."""
    joint = tmp_path / "joint"
    flags = JoinFlags(first=str(domains / "saws"), second=str(domains / "pens"), output_path=str(joint))
    join_datasets(flags)
    items = read_json(joint / "joint.item.json")
    assert [items[str(i)]["title"].split()[0] for i in range(35)] == ["saws"] * 20 + ["pens"] * 15
    index = {str(item): [f"<a_{item % 5}>", f"<b_{item // 5}>"] for item in range(35)}
    (joint / "joint.index.json").write_text(json.dumps(index))
    for name, start, stop in (("saws", 0, 20), ("pens", 20, 35)):
        convert = ConvertFlags(
            dataset_name=name,
            data_dir=str(joint),
            item_file=str(joint / "joint.item.json"),
            index_file=str(joint / "joint.index.json"),
            only_items=str(joint / f"{name}.items.txt"),
            output_dir=str(tmp_path / "csv"),
        )
        convert_dataset(convert)
        catalogue = read_info(tmp_path / f"csv/info/{name}.txt")
        assert catalogue.item_ids == list(range(start, stop))
        assert all(title.startswith(name) for title in catalogue.titles)
        for split in ("train", "valid", "test"):
            before = [line.split("\t") for line in (domains / f"{name}.{split}.inter").read_text().splitlines()[1:]]
            after = read_rows(tmp_path / f"csv/{split}/{name}.csv")
            assert [(r.user_id, r.history_ids, r.item_id) for r in after] == [
                (user, tuple(start + int(item) for item in history.split()), start + int(target))
                for user, history, target in before
            ]
            assert {r.sid for r in after} <= set(catalogue.sids)
    convert.only_items = str(joint / "saws.items.txt")
    convert.output_dir = str(tmp_path / "wrong")
    with pytest.raises(InputError, match=r"--only_items .*saws.items.txt: lacks item \d+ of sample 1 of the train"):
        convert_dataset(convert)
    with pytest.raises(InputError, match="expected two names, none of them joint"):
        join_datasets(JoinFlags(first=str(domains / "saws"), second=str(domains / "saws"), output_path=str(joint)))


SMALL = {
    "--sids": "--codebook_size 6 --num_levels 2",
    "--sft": "--num_epochs 1 --batch_size 16 --micro_batch_size 16",
    "--rl": "--max_steps 1 --num_generations 4 --train_batch_size 8 --eval_step 1 --test_beam 10",
    "--eval": "--num_beams 12 --K 12",
}


def run_domains(folder, *arguments, **environment):
    small = [text for pair in SMALL.items() for text in pair]
    prefixes = ["--first", folder / "saws", "--second", folder / "pens"]
    return run_script(ROOT / "scripts/cross_domain.sh", *prefixes, *small, *arguments, **environment)


def test_flags_are_read_before_anything_is_run(domains, tmp_path):
    output = ["--output_dir", tmp_path / "out"]
    done = run_domains(domains, *output, MINIONEREC_CHECK_FLAGS="1")
    assert done.returncode == 0, done.stderr
    done = run_domains(domains, *output, "--text2emb", "--din 8")
    assert done.returncode == 2 and "unknown flag --din; did you mean --dim" in done.stderr
    assert not (tmp_path / "out").exists()
    done = run_script(ROOT / "scripts/cross_domain.sh", "--first", "x")
    assert done.returncode == 2 and done.stderr.startswith("error: --second is missing")


@long_form
def test_a_toy_run_to_its_table(domains, tmp_path):
    done = run_domains(domains, "--output_dir", tmp_path / "out")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    with (tmp_path / "out/table.csv").open() as file:
        rows = {row["model"]: row for row in csv.DictReader(file)}
    assert len(rows) == 12 and "A's model on B, no training" in rows and "SFT on 10 % of B, from A" in rows
    for folder in ("zero", "transfer_10", "scratch_100", "rl"):
        metrics = read_json(tmp_path / f"out/seed_42/{folder}/test.metrics.json")
        assert metrics["illegal"] == 0 and metrics["rows"] == 10
        predictions = read_json(tmp_path / f"out/seed_42/{folder}/test.json")
        catalogue = read_info(tmp_path / "out/seed_42/csv/info/pens.txt")
        assert {sid for row in predictions for sid in row["predict"]} <= set(catalogue.sids)
    record = read_json(tmp_path / "out/seed_42/scratch_10/sft.stage.json")
    assert record["settings"]["sample"] == 4
