"""benchmark.sh: recipes become arguments, flags of every recipe are known, seeds a table, and a toy run does it all."""

import csv
import os
import statistics
import subprocess
import sys

import pytest
import yaml
from matplotlib.image import imread
from test_pipeline import ROOT, write_raw
from test_plots import results

from minionerec.common.files import InputError, read_json, write_json
from scripts.benchmark_recipe import read_recipe
from scripts.benchmark_table import MODELS, BenchmarkTableFlags, read_seed, tabulate_benchmark
from scripts.recipe import RecipeFlags, list_arguments

BENCHMARKS = sorted((ROOT / "config/benchmarks").glob("*.yaml"))
RECIPE = {
    "dataset": "toy",
    "source": "input_dir",
    "published": {"Paper": {"HR@10": 0.5, "NDCG@10": 0.25}},
    "pipeline": {"sid_method": "rqkmeans_constrained", "networks": "", "fuse": "transitions,content"},
    "text2emb": {"dim": 8},
    "sids": {"codebook_size": 5, "num_levels": 2, "collisions": "nearest_free"},
    "sft": {
        "base_model": "config/tiny_qwen3.json",
        "train_from_scratch": True,
        "num_epochs": 1,
        "batch_size": 32,
        "micro_batch_size": 32,
    },
    "rl": {"max_steps": 1, "num_generations": 4, "train_batch_size": 8, "eval_step": 1, "test_beam": 10},
    "eval": {"num_beams": 12, "K": 12},
}


def write_recipe(folder, **changes):
    path = folder / "toy.yaml"
    path.write_text(yaml.safe_dump({**RECIPE, **changes}))
    return path


def run_script(*arguments, **environment):
    variables = {"MINIONEREC_PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "LAUNCH": "none", **environment}
    command = ["bash", *map(str, arguments)]
    return subprocess.run(
        command, env={**os.environ, **variables}, capture_output=True, text=True, timeout=900, check=False
    )


def test_a_recipe_as_arguments(tmp_path):
    path = write_recipe(tmp_path, behaviour=None, convert={}, sft={"sid_init": "{EMBEDDINGS}", "tasks": ["a", "b:0.5"]})
    flags = RecipeFlags(recipe=str(path), data="RAW DATA", output_dir="OUT", seed=7)
    arguments = list_arguments(read_recipe(path), flags)
    assert arguments[:8] == ["--dataset", "toy", "--input_dir", "RAW DATA", "--output_dir", "OUT", "--seed", "7"]
    given = dict(zip(arguments[::2], arguments[1::2], strict=True))
    assert given["--fuse"] == "transitions,content" and given["--networks"] == ""
    assert given["--sft"] == "--sid_init OUT/data/toy.emb-behaviour-td.npy --tasks a,b:0.5"
    assert given["--behaviour"] == "default" and "--convert" not in given
    del given["--behaviour"]
    plain = list_arguments(read_recipe(write_recipe(tmp_path, sft={"sid_init": "{EMBEDDINGS}"})), flags)
    assert plain[plain.index("--sft") + 1] == "--sid_init OUT/data/toy.emb-tfidf-td.npy"


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"epochs": 3}, "toy.yaml: epochs: expected one of dataset, source"),
        ({"source": "raw"}, "toy.yaml: expected dataset, a name, and source, input_dir or splits_dir"),
        ({"rl": 5}, "toy.yaml: rl: expected flags and their values"),
    ],
)
def test_wrong_recipes(tmp_path, changes, said):
    with pytest.raises(InputError, match=said):
        read_recipe(write_recipe(tmp_path, **changes))


@pytest.mark.parametrize("path", BENCHMARKS, ids=lambda path: path.stem)
def test_flags_of_the_recipes_are_known(path, tmp_path):
    """Where this variable is set, no stage goes on after its flags are read."""
    flags = RecipeFlags(recipe=str(path), data=str(tmp_path), output_dir=str(tmp_path / "out"))
    arguments = list_arguments(read_recipe(path), flags)
    done = run_script(ROOT / "scripts/pipeline.sh", *arguments, MINIONEREC_CHECK_FLAGS="1")
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "out").exists()


def test_the_table_is_the_mean_of_the_seeds(tmp_path, capsys):
    """Published figures stand above, minutes are those of the stages, models that one seed lacks count their own."""
    for seed in (1, 2, 3):
        folder = tmp_path / f"seed_{seed}"
        for model in ("baselines/content", "sft/test", *(["rl/test"] if seed < 3 else [])):
            write_json(folder / f"{model}.metrics.json", results(seed + len(model)))
        write_json(folder / "sft/sft.stage.json", {"cpu_seconds": 60.0 * seed})
        write_json(folder / "sft/test.stage.json", {"cpu_seconds": 30.0})
        write_json(folder / "rl/rl.stage.json", {"cpu_seconds": 120.0})
        write_json(folder / "data/toy.stage.json", {"cpu_seconds": 6.0})
    tabulate_benchmark(BenchmarkTableFlags(run_dir=str(tmp_path), recipe=str(write_recipe(tmp_path))))
    with (tmp_path / "table.csv").open() as file:
        rows = {row["model"]: row for row in csv.DictReader(file)}
    assert list(rows) == ["Paper (published)", "likeness of texts", "after SFT", "after RL", "all"]
    assert rows["Paper (published)"]["HR@10"] == "0.5" and rows["Paper (published)"]["minutes"] == ""
    for model, file, count in (("after SFT", "sft/test", 3), ("after RL", "rl/test", 2)):
        figures = [read_json(tmp_path / f"seed_{seed}/{file}.metrics.json") for seed in range(1, count + 1)]
        values = [figure["item"]["NDCG@10"] for figure in figures]
        assert float(rows[model]["NDCG@10"]) == pytest.approx(statistics.mean(values), abs=1e-4)
        assert float(rows[model]["NDCG@10 +-"]) == pytest.approx(statistics.stdev(values), abs=1e-4)
        assert int(rows[model]["seeds"]) == count
        unseen = statistics.mean(figure["item_unseen"]["HR@10"] for figure in figures)
        assert float(rows[model]["HR@10 unseen"]) == pytest.approx(unseen, abs=1e-4)
    minutes = {model: float(row["minutes"] or 0) for model, row in rows.items()}
    assert minutes == {"Paper (published)": 0, "likeness of texts": 0, "after SFT": 2.5, "after RL": 4, "all": 4.6}
    assert (tmp_path / "table.txt").read_text() in capsys.readouterr().out + "\n"
    assert imread(tmp_path / "table.png").shape[2] in (3, 4)
    with pytest.raises(InputError, match="no seed_N folder with metrics below it"):
        tabulate_benchmark(BenchmarkTableFlags(run_dir=str(tmp_path / "seed_1"), recipe=str(tmp_path / "toy.yaml")))


def test_wrong_arguments(tmp_path):
    script = ROOT / "scripts/benchmark.sh"
    for arguments, said in (
        ([], "--dataset is missing: industrial, beauty, ml-100k or ml-100k-rqvae; or --recipe"),
        (["--dataset", "games"], "--dataset games: expected industrial, beauty, ml-100k or ml-100k-rqvae"),
        (["--dataset", "beauty"], "--data is missing: the folder of the raw files"),
        (["--dataset", "beauty", "--recipe", "x"], "--dataset: goes without --recipe"),
    ):
        done = run_script(script, *arguments)
        assert done.returncode == 2 and done.stderr == f"error: {said}\n"
    done = run_script(script, "--recipe", tmp_path / "none.yaml", "--data", "x", "--output_dir", tmp_path / "out")
    assert done.returncode == 2 and "none.yaml: no such file" in done.stderr and not (tmp_path / "out").exists()


def test_a_toy_benchmark_from_raw_files_to_its_table(tmp_path):
    """Baselines, SFT, RL and both fused."""
    write_raw(tmp_path / "raw")
    arguments = [ROOT / "scripts/benchmark.sh", "--recipe", write_recipe(tmp_path), "--data", tmp_path / "raw"]
    arguments += ["--output_dir", tmp_path / "out", "--seeds", "5"]
    done = run_script(*arguments)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    models = set(read_seed(tmp_path / "out/seed_5", MODELS["benchmark"]))
    assert models >= {"popularity", "transitions + likeness", "after SFT", "after SFT, fused", "after RL, fused", "all"}
    with (tmp_path / "out/table.csv").open() as file:
        rows = {row["model"]: row for row in csv.DictReader(file)}
    fused = read_json(tmp_path / "out/seed_5/rl/test.fused.metrics.json")
    assert float(rows["after RL, fused"]["HR@10"]) == pytest.approx(fused["item"]["HR@10"], abs=1e-4)
    assert set(fused["weights"]) == {"model", "transitions", "content"} and fused["illegal"] == 0
    assert float(rows["all"]["minutes"]) > float(rows["after RL"]["minutes"]) > 0
