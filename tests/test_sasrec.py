"""SASRec and GRU4Rec: causality, the folded training sequences against single rows, checkpoints, and the command."""

import json
import os
import random
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import make_dataset

from minionerec.common.embeddings import save_embeddings
from minionerec.common.files import InputError, read_json
from minionerec.common.records import Row, read_info, read_rows
from minionerec.common.step_log import read_steps
from minionerec.evaluation import network_runs
from minionerec.evaluation.metrics import find_rank, ndcg
from minionerec.evaluation.network_runs import validate_network
from minionerec.recommenders.network_training import (
    NetworkTrainer,
    compute_sequence_loss,
    draw_batches,
    fold_histories,
    rank_with_network,
)
from minionerec.recommenders.networks import SequentialRecommender, build_network, load_network, save_network
from minionerec.recommenders.settings import SASRecFlags
from sasrec import sasrec

ROOT = Path(__file__).parent.parent
ITEMS = [7, 3, 11, 5, 2, 19, 4, 8]  # ids that are neither sorted nor 0..N-1
MODELS = ("sasrec", "gru4rec")


def tiny(model, seed=0, **changes):
    settings = {"model": model, "hidden_size": 16, "num_layers": 2, "num_heads": 2, "dropout": 0.0, "max_history": 4}
    torch.manual_seed(seed)
    return build_network(ITEMS, {**settings, **changes}).eval()


def row(history, target, user="u"):
    return Row(user, ("t",) * len(history), tuple(history), ("<a>",) * len(history), "t", target, "<a>")


def random_rows(seed, count=60):
    """Users' timelines cut into rows; few items, so that histories, and rows as a whole, repeat between users."""
    rng = random.Random(seed)
    timelines = [rng.choices(ITEMS[:4], k=rng.randint(2, 8)) for _ in range(count // 4)]
    rows = [row(timeline[:place], timeline[place]) for timeline in timelines for place in range(1, len(timeline))]
    rng.shuffle(rows)
    return rows[:count]


@pytest.mark.parametrize("model", MODELS)
def test_a_later_item_changes_no_earlier_state(model):
    network = tiny(model)
    columns = torch.tensor([[1, 4, 0, 6], [1, 4, 5, 2]])
    with torch.no_grad():
        first, second = network.compute_states(columns)
    assert torch.allclose(first[:2], second[:2], atol=1e-6)
    assert (first[2] - second[2]).abs().max() > 1e-3


@pytest.mark.parametrize("model", MODELS)
def test_scores_do_not_depend_on_the_batch(model):
    """Nor on whether the network was left in training mode, nor on items older than max_history."""
    network = tiny(model, dropout=0.5)
    histories = [[7], [3, 11, 5, 2], [19, 7], [2, 8, 3], [11, 4, 2, 19, 7, 3]]
    together = network.train().score_histories(histories)
    assert network.training and together.shape == (5, len(ITEMS))
    for history, scores in zip(histories, together, strict=True):
        assert torch.allclose(network.score_histories([history])[0], scores, atol=1e-5)
    assert torch.allclose(together.exp().sum(dim=1), torch.ones(5), atol=1e-5)
    assert torch.allclose(network.score_histories([[2, 19, 7, 3]])[0], together[4], atol=1e-5)
    assert not torch.allclose(network.score_histories([[19, 2, 7, 3]])[0], together[4], atol=1e-3)  # order counts


def test_scores_refuse_what_they_cannot_rank():
    with pytest.raises(ValueError, match="item 6 is not in the catalogue"):
        tiny("sasrec").score_histories([[7, 6], [9]])
    with pytest.raises(ValueError, match="a history is empty"):
        tiny("sasrec").score_histories([[7], []])


def test_rows_folded_by_hand():
    rows = [row([7, 3], 5), row([7], 3), row([3], 7), row([7], 3), row([7, 3, 5, 2, 4], 8), row([7, 2], 3)]
    found = {sequence.history: sorted(sequence.targets) for sequence in fold_histories(rows, 4)}
    assert found == {
        (3, 5, 2, 4): [(0, 7), (3, 8)],  # the newest four of a history of five; 3 begins it
        (7, 2): [(0, 3), (0, 3), (1, 3)],  # 7 begins this one and the next; once is enough
        (7, 3): [(1, 5)],
    }


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("model", MODELS)
def test_folded_loss_equals_the_loss_of_single_rows(model, seed):
    """The same targets, each after the history that its row shows, and the same loss and gradients."""
    rows, network = random_rows(seed), tiny(model, seed)
    sequences = fold_histories(rows, 4)
    assert len(sequences) < len({r.history_ids[-4:] for r in rows}) < len(rows)
    folded = [(s.history[: position + 1], item) for s in sequences for position, item in s.targets]
    assert Counter(folded) == Counter((r.history_ids[-4:], r.item_id) for r in rows)

    network.train()
    loss = compute_sequence_loss(network, sequences)
    loss.backward()
    gradients = {name: value.grad.clone() for name, value in network.named_parameters()}
    network.zero_grad()
    expected = 0.0
    for r in rows:
        columns = torch.tensor([[ITEMS.index(item) for item in r.history_ids[-4:]]])
        logits = network.compute_states(columns)[0, -1] @ network.embedding.weight.T
        expected = expected - logits.log_softmax(0)[ITEMS.index(r.item_id)] / len(rows)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
    for name, value in network.named_parameters():
        assert torch.allclose(gradients[name], value.grad, atol=1e-5), name


def test_random_batches_hold_every_sequence_once():
    sequences = fold_histories(random_rows(3), 4)
    targets = [len(sequence.targets) for sequence in sequences]
    torch.manual_seed(0)
    orders = [draw_batches(sequences, 8) for _ in range(2)]
    for batches in orders:
        assert sorted(id(sequence) for batch in batches for sequence in batch) == sorted(map(id, sequences))
        sizes = [sum(len(sequence.targets) for sequence in batch) for batch in batches]
        # Every batch but the last ends with the sequence that comes nearest below a multiple of 8.
        assert all(8 - max(targets) < size < 8 + max(targets) for size in sizes[:-1])
        assert len(batches) <= -(-sum(targets) // 8)
    assert orders[0] != orders[1]
    assert [len(batch) for batch in draw_batches(sequences, 1)] == [1] * len(sequences)
    assert len(draw_batches(sequences, 10_000)) == 1


def train(network, rows, validate=None, **changes):
    """What a training on rows, which also choose the epoch, measures."""
    validate = validate or (lambda: validate_network(network, rows))
    sequences = fold_histories(rows, 4)
    settings = {"learning_rate": 1e-2, "weight_decay": 0.0, **changes}
    return NetworkTrainer(network=network, sequences=sequences, validate=validate, **settings).fit()


@pytest.mark.parametrize("dim", [3, 16, 40])
def test_embeddings_start_where_vectors_say(dim):
    """Likeness stays likeness, as far as the width reaches; the spread is that of a random start."""
    vectors = np.random.default_rng(dim).standard_normal((len(ITEMS), dim)) + 5
    network = tiny("gru4rec")
    network.start_from_vectors(vectors, seed=0)
    started = network.embedding.weight.detach().double().numpy()
    assert started.std() == pytest.approx(16**-0.5, rel=1e-5)
    centred = vectors - vectors.mean(axis=0)  # of rank 7 at most, below the width of 16
    products, expected = started @ started.T, centred @ centred.T
    assert np.allclose(products / products[0, 0], expected / expected[0, 0], atol=1e-5)

    random_start = network.embedding.weight.clone()
    network.start_from_vectors(np.ones((len(ITEMS), dim)), seed=0)
    assert torch.equal(network.embedding.weight, random_start)  # they say nothing


@pytest.mark.parametrize("model", MODELS)
def test_it_learns_a_deterministic_transition(model):
    follows = dict(zip(ITEMS, ITEMS[1:] + ITEMS[:1], strict=True))
    rows = []
    for item in ITEMS:
        timeline = [item]
        for _ in range(4):
            timeline.append(follows[timeline[-1]])
            rows.append(row(timeline[:-1], timeline[-1]))
    network = tiny(model, num_layers=1)
    epochs = train(network, rows, num_epochs=60, batch_size=4, patience=60)
    assert [ranked[0] for ranked in rank_with_network(network, rows, 3)[0]] == [r.item_id for r in rows]
    assert epochs[-1]["loss"] < 0.1 < epochs[0]["loss"]


def test_ranking_and_validation_against_a_full_sort():
    network, rows = tiny("sasrec"), random_rows(1)
    items, scores = rank_with_network(network, rows, 5)
    for r, ranked, values in zip(rows, items, scores, strict=True):
        every = dict(zip(ITEMS, network.score_histories([r.history_ids])[0].tolist(), strict=True))
        assert ranked == sorted(ITEMS, key=lambda item: -every[item])[:5]
        assert values == pytest.approx([every[item] for item in ranked], abs=1e-5)
    assert [sorted(ranked) for ranked in rank_with_network(network, rows[:2], 50)[0]] == [sorted(ITEMS)] * 2
    rankings = rank_with_network(network, rows, 8)[0]
    ranks = [find_rank(r.item_id, ranked) for r, ranked in zip(rows, rankings, strict=True)]
    assert validate_network(network, rows) == {"HR@10": 1.0, "NDCG@10": pytest.approx(ndcg(ranks, 10))}


def test_the_best_epoch_is_kept_and_patience_ends_training():
    seen = []

    def scripted():
        seen.append({name: value.clone() for name, value in network.state_dict().items()})
        return {"HR@10": 0.0, "NDCG@10": [0.1, 0.3, 0.2, 0.3, 0.9][len(seen) - 1]}

    network, rows = tiny("gru4rec"), random_rows(2)
    epochs = train(network, rows, scripted, num_epochs=9, batch_size=8, patience=2)
    assert [epoch["epoch"] for epoch in epochs] == [1, 2, 3, 4]  # epoch 4 only equals the best one
    for name, value in network.state_dict().items():
        assert torch.equal(value, seen[1][name]) and not torch.equal(value, seen[3][name]), name


@pytest.mark.parametrize("model", MODELS)
def test_reading_back_gives_equal_scores(tmp_path, model):
    network = tiny(model, dropout=0.5)
    save_network(network, tmp_path / "model")
    again = load_network(tmp_path / "model")
    assert again.item_ids == ITEMS and not again.training
    assert torch.equal(again.score_histories([[7, 3], [5]]), network.score_histories([[7, 3], [5]]))
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == ["config.json", "model.safetensors"]


def test_a_broken_model_folder_is_named(tmp_path):
    good, bad = tmp_path / "good", tmp_path / "bad"
    save_network(tiny("sasrec"), good)
    with pytest.raises(
        InputError, match=r"nowhere/config.json: no such file; expected the model folder of a sasrec.py"
    ):
        load_network(tmp_path / "nowhere")
    config = read_json(good / "config.json")
    for changes, said in [
        ({"model": "bert"}, r"bad/config.json: not the config of a recommender \(KeyError\('bert'\)\)"),
        ({"item_ids": [1, 1]}, "bad/config.json: .*item_ids must be distinct whole numbers"),
        ({"num_heads": 3}, "bad/config.json: not the config of a recommender"),
        ({"item_ids": [1, 2]}, "bad/model.safetensors: not the weights of .*bad/config.json"),
    ]:
        shutil.copytree(good, bad, dirs_exist_ok=True)
        (bad / "config.json").write_text(json.dumps({**config, **changes}))
        with pytest.raises(InputError, match=said):
            load_network(bad)
    shutil.copytree(good, bad, dirs_exist_ok=True)
    (bad / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(InputError, match="bad/model.safetensors: not the weights of"):
        load_network(bad)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Flags of the command for a dataset in which items share SIDs."""
    paths = make_dataset(tmp_path_factory.mktemp("data"), shared=True)
    flags = {name: paths[name] for name in ("train_file", "test_data_path", "info_file")}
    return {**flags, "valid_file": paths["eval_file"], "shared_sids": True}


@pytest.mark.parametrize("model", MODELS)
def test_the_command(tmp_path, data, model, capsys):
    """The files hang together, the same seed gives the same files, and a finished run is not done again."""
    short = {"model": model, "num_epochs": 3, "hidden_size": 16, "K": 20}
    for name, seed in (("one", 1), ("again", 1), ("other", 2)):
        sasrec(SASRecFlags(**data, **short, output_dir=str(tmp_path / name), seed=seed))
    one, again, other = ((tmp_path / name / "test.json").read_text() for name in ("one", "again", "other"))
    assert one == again != other
    assert (tmp_path / "one/epochs.json").read_text() == (tmp_path / "again/epochs.json").read_text()

    output = tmp_path / "one"
    predictions, metrics = read_json(output / "test.json"), read_json(output / "test.metrics.json")
    test, catalogue = read_rows(data["test_data_path"]), read_info(data["info_file"], shared_sids=True)
    network = load_network(output / "model")
    assert (
        network.item_ids == catalogue.item_ids and network.settings["num_layers"] == {"sasrec": 2, "gru4rec": 1}[model]
    )
    for prediction, r in zip(predictions, test, strict=True):
        assert (prediction["user_id"], prediction["item_id"], prediction["output"]) == (r.user_id, r.item_id, r.sid)
        scores = dict(zip(network.item_ids, network.score_histories([r.history_ids])[0].tolist(), strict=True))
        assert prediction["score"] == pytest.approx([scores[item] for item in prediction["predict_items"]], abs=1e-5)
        assert prediction["score"] == sorted(prediction["score"], reverse=True) and len(prediction["score"]) == 20
        assert prediction["predict"] == [catalogue.sid_of[item] for item in prediction["predict_items"]]
    hits = [prediction["item_id"] in prediction["predict_items"][:10] for prediction in predictions]
    assert metrics["item"]["HR@10"] == pytest.approx(sum(hits) / len(hits), abs=1e-6)
    assert metrics["illegal"] == metrics["duplicates"] == metrics["short_lists"] == 0
    epochs = read_json(output / "epochs.json")
    steps = read_steps(output / "steps.csv")
    shown = [(row["step"], row["loss"], row["eval_HR@10"], row["eval_NDCG@10"]) for row in steps]
    assert shown == [tuple(epoch[key] for key in ("epoch", "loss", "HR@10", "NDCG@10")) for epoch in epochs]
    capsys.readouterr()
    sasrec(SASRecFlags(**data, **short, output_dir=str(tmp_path / "dry"), dry_run=True))
    assert "  3 epochs take about" in capsys.readouterr().out and not (tmp_path / "dry").exists()
    best = max(epochs, key=lambda epoch: epoch["NDCG@10"])
    record = read_json(output / "sasrec.stage.json")["results"]
    assert record["epoch"] == best["epoch"]
    assert record["validation NDCG@10"] == pytest.approx(best["NDCG@10"], abs=1e-6)
    assert validate_network(network, read_rows(data["valid_file"]))["NDCG@10"] == pytest.approx(best["NDCG@10"])

    written = (output / "test.json").stat().st_mtime_ns
    capsys.readouterr()
    sasrec(SASRecFlags(**data, **short, output_dir=str(output), seed=1))
    assert "already done" in capsys.readouterr().out and (output / "test.json").stat().st_mtime_ns == written


def test_folds_are_trained_without_their_users_and_go_on_after_a_break(tmp_path, data, monkeypatch):
    flags = SASRecFlags(
        **data, model="gru4rec", num_epochs=2, hidden_size=8, folds=3, output_dir=str(tmp_path / "whole"), seed=1
    )
    sasrec(flags)
    parts = read_json(tmp_path / "whole/folds/parts.json")
    rows = read_rows(data["train_file"])
    assert len(parts) == 3 and sorted(sum(parts, [])) == sorted({row.user_id for row in rows})

    # The same by hand: a run on the rows of the others.
    users = set(parts[1])
    lines = Path(data["train_file"]).read_text().splitlines()
    others = [line for line, row in zip(lines[1:], rows, strict=True) if row.user_id not in users]
    (tmp_path / "others.csv").write_text("\n".join([lines[0], *others]) + "\n")
    alone = {**data, "train_file": str(tmp_path / "others.csv"), "output_dir": str(tmp_path / "alone")}
    sasrec(SASRecFlags(**alone, model="gru4rec", num_epochs=2, hidden_size=8, seed=1))
    for name in ("config.json", "model.safetensors"):
        by_hand = (tmp_path / "alone/model" / name).read_bytes()
        assert (tmp_path / "whole/folds/1/model" / name).read_bytes() == by_hand

    saved, save = [], network_runs.save_network

    def save_two(network, path):
        if len(saved) == 1:
            raise KeyboardInterrupt
        saved.append(path)
        save(network, path)

    monkeypatch.setattr(network_runs, "save_network", save_two)
    cut = replace(flags, output_dir=str(tmp_path / "cut"))
    with pytest.raises(KeyboardInterrupt):
        sasrec(cut)
    assert not (tmp_path / "cut/folds/parts.json").exists() and (tmp_path / "cut/folds/0/model").is_dir()
    monkeypatch.setattr(network_runs, "save_network", save)
    sasrec(cut)
    files = sorted(path.relative_to(tmp_path / "whole") for path in (tmp_path / "whole/folds").rglob("*.safetensors"))
    assert len(files) == 3
    for path in [*files, Path("test.json"), Path("folds/parts.json")]:
        assert (tmp_path / "cut" / path).read_bytes() == (tmp_path / "whole" / path).read_bytes()
    sasrec(replace(cut, folds=0))
    assert not (tmp_path / "cut/folds").exists()


def test_the_command_begins_at_item_vectors(tmp_path, data, monkeypatch):
    """Rows of the file stand in another order than the catalogue; another file is another run."""
    ids = read_info(data["info_file"], shared_sids=True).item_ids
    vectors = np.random.default_rng(0).standard_normal((len(ids), 5))
    starts, start = [], SequentialRecommender.start_from_vectors

    def remember(network, vectors, seed):
        starts.append((network.item_ids, vectors, seed))
        start(network, vectors, seed)

    monkeypatch.setattr(SequentialRecommender, "start_from_vectors", remember)
    file, output = tmp_path / "x.emb-tfidf-td.npy", tmp_path / "out"
    save_embeddings(file, vectors[::-1], list(map(str, ids[::-1])), "tfidf", ["title"])
    flags = SASRecFlags(
        **data, num_epochs=1, hidden_size=8, folds=2, seed=3, output_dir=str(output), item_init=str(file)
    )
    sasrec(flags)
    assert len(starts) == 3  # that of the folds too
    for items, found, seed in starts:
        assert items == ids and seed == 3 and np.allclose(found, vectors, atol=1e-6)
    sasrec(flags)
    assert len(starts) == 3
    save_embeddings(file, 2 * vectors, list(map(str, ids)), "tfidf", ["title"])
    sasrec(replace(flags, folds=0))
    assert len(starts) == 4

    save_embeddings(file, vectors[1:], list(map(str, ids[1:])), "tfidf", ["title"])
    with pytest.raises(InputError, match=f"--item_init .*: item {ids[0]} has no embedding there"):
        sasrec(flags)
    save_embeddings(file, vectors, list(map(str, ids)), "tfidf", ["texts", "behaviour"])
    with pytest.raises(InputError, match="--item_init .*: was made from the rows of all users"):
        sasrec(flags)


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"folds": 1}, "--folds 1: expected 2 or more, or 0 for none"),
        ({"folds": 1000, "num_epochs": 1}, "--folds 1000: .*train.csv has [0-9]+ users only"),
        ({"model": "bert"}, "--model bert: expected one of sasrec, gru4rec"),
        ({"num_epochs": 0}, "--num_epochs 0: expected 1 or more"),
        ({"K": -1}, "--K -1: expected 1 or more"),
        ({"dropout": 1.0}, "--dropout 1.0: expected a share from 0 to below 1"),
        ({"num_heads": 3}, "--hidden_size 64: expected a multiple of --num_heads 3"),
        ({"shared_sids": False}, "info.txt, line 3: SID .* of line 2 already"),
        ({"valid_file": "nowhere.csv"}, "nowhere.csv: no such file"),
    ],
)
def test_wrong_flags(tmp_path, data, changes, said):
    with pytest.raises(InputError, match=said):
        sasrec(SASRecFlags(**{**data, "output_dir": str(tmp_path / "out"), **changes}))
    assert not (tmp_path / "out" / "model").exists()


@pytest.mark.parametrize("flag, name", [("train_file", "train"), ("valid_file", "valid"), ("test_data_path", "test")])
def test_an_item_without_a_line_in_the_info_file_is_named(tmp_path, data, flag, name):
    lines = Path(data[flag]).read_text().splitlines()
    cells = read_rows(data[flag])[1]
    other = lines[2].replace(f'"{list(cells.history_ids)}"', f'"{[99, *cells.history_ids[1:]]}"')
    other = other.replace(f",[{cells.history_ids[0]}],", ",[99],")  # a history of one item stands without quotes
    assert other != lines[2]
    changed = tmp_path / f"{name}.csv"
    changed.write_text("\n".join([*lines[:2], other, *lines[3:]]) + "\n")
    with pytest.raises(InputError, match=rf"{name}.csv, row 2: item 99 is not in .*info.txt"):
        sasrec(SASRecFlags(**{**data, flag: str(changed), "output_dir": str(tmp_path / "out")}))


def test_all_baselines_by_one_script(tmp_path, data):
    root, output = tmp_path / "data", tmp_path / "out"
    for flag, place in [
        ("train_file", "train/toy_5_2020.csv"),
        ("valid_file", "valid/toy_5_2020.csv"),
        ("test_data_path", "test/toy_5_2020.csv"),
        ("info_file", "info/toy_5_2020.txt"),
    ]:
        (root / place).parent.mkdir(parents=True)
        shutil.copy(data[flag], root / place)
    environment = {**os.environ, "MINIONEREC_PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    command = ["bash", str(ROOT / "scripts" / "baselines.sh"), "--data_root", str(root), "--output_dir", str(output)]

    def run(*flags):
        return subprocess.run(
            [*command, *flags], env=environment, check=False, capture_output=True, text=True, timeout=300
        )

    done = run("--category", "toy", "--seed", "3")
    assert done.returncode == 0, done.stderr
    table = done.stdout[done.stdout.rindex("item level") :].splitlines()
    names = ["popularity", "transitions", "repeat_last", "content", "transitions+content", "sasrec", "gru4rec"]
    assert [line.split()[0] for line in table[1:8]] == names
    folders = [f"baselines/{name}" for name in names[:5]] + ["sasrec/test", "gru4rec/test"]
    for line, folder in zip(table[1:8], folders, strict=True):
        assert f"{read_json(output / f'{folder}.metrics.json')['item']['HR@1']:.4f}" == line.split()[1]
    assert read_json(output / "gru4rec/model/config.json")["model"] == "gru4rec"
    assert read_json(output / "sasrec/sasrec.stage.json")["settings"]["seed"] == 3

    wrong = run("--category", "games")
    assert wrong.returncode == 2 and "train/games*.csv: no such file" in wrong.stderr
    assert run().stderr == "error: --category is missing\n"
