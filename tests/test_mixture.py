"""Which tasks a run takes and how they are weighted, the files they need, and the commands that take them."""

import json
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
from test_data import SIDS, encoder, make_row, timeline
from test_prompts import write_set
from test_tasks import build, random_inputs
from tiny import list_plan, make_dataset, write_config

from data import DEFAULT_TASKS, RL_TASKS, TASKS, SidSFTDataset, TaskInputs, build_mixture, choose_tasks
from evaluate import evaluate
from minionerec.common.files import InputError, read_json
from minionerec.common.items import read_descriptions, read_preferences
from minionerec.common.records import Catalogue
from minionerec.evaluation.settings import EvaluateFlags
from minionerec.language.mixture import TaskMixture
from minionerec.language.prompts import load_prompts
from minionerec.search.prefix_tree import build_prefix_tree
from minionerec.training.callbacks import EpochSetter
from minionerec.training.settings import RLFlags, SFTFlags
from minionerec.training.sft_trainer import TreeBatches
from rl import rl
from sft import sft


# --------------------------------------------------------------------------------------------------- choice and weights
def test_tasks_and_weights_are_read():
    worded, compact = load_prompts("worded"), load_prompts("compact")
    # The default does not follow the templates: the worded set has eleven.
    assert choose_tasks(None, worded) == dict.fromkeys(DEFAULT_TASKS, 1.0) and len(worded.templates) > len(
        DEFAULT_TASKS
    )
    assert choose_tasks(None, worded, RL_TASKS) == {"next_sid": 1, "title_history2sid": 1, "title2sid": 1}
    assert choose_tasks(None, compact) == choose_tasks(None, compact, RL_TASKS) == {"next_sid": 1}
    assert choose_tasks(["next_title:2", "next_sid", "title2sid:0.5"], worded) == {
        "next_title": 2,
        "next_sid": 1,
        "title2sid": 0.5,
    }
    assert choose_tasks(["preference2sid"], worded, preference_file="x.json") == {"preference2sid": 1}
    # Without the flag among the files it needs, a task takes its file for granted.
    assert choose_tasks(["description2sid:3"], worded, preference_file=None) == {"description2sid": 3}


@pytest.mark.parametrize(
    "tasks, known, files, said",
    [
        (["next_sid", "next"], TASKS, {}, "--tasks next: expected one of next_sid, similar_sid, next_title"),
        (["next_title"], RL_TASKS, {}, "--tasks next_title: expected one of next_sid, title_history2sid"),
        (["next_sid", "next_sid:2"], TASKS, {}, "next_sid is given twice; write next_sid:2"),
        (["next_sid:0"], TASKS, {}, "--tasks next_sid:0: expected NAME or NAME:WEIGHT with a positive number"),
        (["next_sid:-1"], TASKS, {}, "expected NAME or NAME:WEIGHT"),
        (["next_sid:"], TASKS, {}, "expected NAME or NAME:WEIGHT"),
        (["next_sid:half"], TASKS, {}, "expected NAME or NAME:WEIGHT"),
        (["next_sid:nan"], TASKS, {}, "expected NAME or NAME:WEIGHT"),
        (["next_sid:inf"], TASKS, {}, "expected NAME or NAME:WEIGHT"),
        (["preference2sid"], TASKS, {"preference_file": None}, "--tasks: preference2sid needs --preference_file"),
        (["description2sid"], RL_TASKS, {"item_meta_path": None}, "description2sid needs --item_meta_path"),
        (
            ["next_sid"],
            TASKS,
            {"preference_file": "x.json"},
            "--preference_file: no chosen task needs it; --tasks may name history2preference, preference2sid",
        ),
    ],
)
def test_wrong_choices(tasks, known, files, said):
    with pytest.raises(InputError) as error:
        choose_tasks(tasks, load_prompts("worded"), known, **files)
    assert said in str(error.value)


def test_a_set_without_a_default_task_needs_names(tmp_path):
    prompts = load_prompts(write_set(tmp_path / "mine.yaml", next_title=("{history}: ", "{title}")))
    with pytest.raises(InputError, match="--tasks: name the tasks; this prompt set has next_title"):
        choose_tasks(None, prompts)
    with pytest.raises(InputError, match="this prompt set has no task 'next_sid'; it has next_title"):
        choose_tasks(["next_sid"], prompts)
    assert choose_tasks(["next_title"], prompts) == {"next_title": 1}


@pytest.mark.parametrize("weight", [0.001, 0.3, 0.5, 1, 1.25, 2, 3.7])
def test_a_weight_is_a_fixed_number_of_examples(weight):
    inputs = random_inputs(21)
    mixture = build_mixture({"next_sid": 1, "title2sid": weight}, inputs, encoder("worded"))
    rows, items = len(inputs.rows), len(SIDS)
    expected = max(1, round(weight * items))
    seen = []
    for epoch in range(4):
        mixture.set_epoch(epoch)
        examples = [mixture[index] for index in range(len(mixture))]
        assert len(mixture) == rows + expected and examples[:rows] == build("next_sid", inputs).examples
        times = Counter(example.item_id for example in examples[rows:])
        assert all(example.group.startswith("title2sid") for example in examples[rows:])
        # All items as often as the whole part of the weight says, some once more.
        assert {times[item] for item in range(items)} <= {expected // items, -(-expected // items)}
        seen.append([example.item_id for example in examples[rows:]])
        assert seen[-1] == sorted(seen[-1])
    assert (len(set(map(tuple, seen))) == 1) == (expected % items == 0)
    again = build_mixture({"next_sid": 1, "title2sid": weight}, inputs, encoder("worded"))
    again.set_epoch(3)  # as after resuming
    assert [again[index].item_id for index in range(rows, len(again))] == seen[3]
    other = build_mixture({"next_sid": 1, "title2sid": weight}, replace(inputs, seed=1), encoder("worded"))
    other.set_epoch(3)
    assert ([other[index].item_id for index in range(rows, len(other))] == seen[3]) == (expected % items == 0)


def test_every_step_of_an_epoch_stays_as_large_and_every_part_is_told_the_epoch():
    """Weights in the batches of training: tasks with less than all of their examples, cut histories, rows twice."""
    rows = [row for user in "ABC" for row in timeline(user, list(range(25)))]
    inputs = TaskInputs(rows, Catalogue(SIDS, [f"Item {n}" for n in range(40)], list(range(40))), cut_histories=True)
    coder = encoder("worded")
    mixture = build_mixture({"next_sid": 2, "title_history2sid": 0.5, "title2sid": 0.25}, inputs, coder)
    batches = TreeBatches([mixture], 32, 2, coder.pad_token_id, seed=1)
    expected = SidSFTDataset(rows, coder, cut_histories=True)
    plans = []
    for epoch in range(3):
        batches.set_epoch(epoch), expected.set_epoch(epoch)
        found = [example for part in list_plan(batches) for _, example in part]
        assert len(found) == batches.rows == 2 * 72 + 36 + 10
        prompts = Counter(example.prompt for example in found)
        assert all(prompts[example.prompt] in range(2, 99, 2) for example in expected)
        plans.append(sorted(prompts))
        # A row that stands in a tree twice adds no token there, only its labels.
        labels = sum(batches[index]["label_weight"].sum() for index in range(len(batches)))
        assert labels == sum(len(example.target_ids) for example in found)
        sequences = [[*example.prompt_ids, *example.target_ids[:-1]] for example in found]
        once = [list(sequence) for sequence in set(map(tuple, sequences))]
        assert len(once) < len(sequences)
        assert len(build_prefix_tree(sequences).tokens) == len(build_prefix_tree(once).tokens)
    assert plans[0] != plans[1] != plans[2]


def test_a_task_without_examples_is_an_error():
    inputs = TaskInputs([make_row([1], 2, "A")], Catalogue(SIDS[:2], ["Same", "Same"], [0, 1]), {}, {"B": "Toys"})
    for task, said in (
        ("title2sid", "title2sid has no example \\(left out: 2 sharing its title"),
        ("sid2description", "sid2description has no example \\(left out: 2 without description"),
        ("preference2sid", "preference2sid has no example \\(left out: 1 without preference"),
    ):
        with pytest.raises(InputError, match=said):
            build_mixture({"next_sid": 1, task: 1}, inputs, encoder("worded"))


def test_the_report_says_what_was_left_out():
    inputs = TaskInputs([make_row([1], 2)], Catalogue(SIDS[:4], ["Same", "Same", "", "Own"], [0, 1, 2, 3]))
    mixture = build_mixture({"next_sid": 1, "title2sid": 0.5}, inputs, encoder("worded"))
    assert mixture.report() == [
        "next_sid x 1: 1 examples",
        "title2sid x 0.5: 1 examples, 2 left out sharing its title, 1 left out without title",
    ]
    assert isinstance(mixture, TaskMixture)


# ---------------------------------------------------------------------------------------------------------------- files
def test_preferences_are_read_from_both_forms(tmp_path):
    texts = {"U1": "Likes\n  tools", "7": "\u724c 'x'", "U2": " "}
    expected = {"U1": "Likes tools", "7": "\u724c 'x'", "U2": ""}
    one, lines = tmp_path / "p.json", tmp_path / "p.jsonl"
    one.write_text(json.dumps(texts, indent=1), encoding="utf-8")
    lines.write_text(
        "\n\n".join(
            json.dumps({"preference": text, "user_id": user}, ensure_ascii=False) for user, text in texts.items()
        ),
        encoding="utf-8",
    )
    assert read_preferences(one) == read_preferences(lines) == expected


@pytest.mark.parametrize(
    "name, text, said",
    [
        ("p.json", '{"U1": "x"\n "U2"', "line 2: not valid JSON"),
        ("p.json", '{"user_id": "a", "preference": "x"}\n{"user_id": "b", "preference": "y"}', "is named .jsonl"),
        ("p.json", '["U1"]', 'expected one object such as {"user id": "text"}'),
        ("p.json", '[["U1", "x"]]', "expected one object"),
        ("p.json", '"U1"', "expected one object"),
        ("p.json", '{"U1": 3}', "user 'U1': the user id and the preference must be texts"),
        ("p.json", '{"U1": {"text": "x"}}', "user 'U1': the user id and the preference must be texts"),
        ("p.json", '{"U1": "x", "U1": "y"}', "user 'U1' stands there already"),
        ("p.json", "{}", "no user"),
        ("p.jsonl", "", "no user"),
        ("p.jsonl", '{"user_id": "a", "preference": "x"}\n{"user_id": "a"', "line 2: expected"),
        ("p.jsonl", '\n{"user_id": "a"}', "line 2: expected"),
        ("p.jsonl", '{"user_id": "a", "preference": "x", "more": 1}', "line 1: expected"),
        ("p.jsonl", '["a", "x"]', "line 1: expected"),
        ("p.jsonl", '{"user_id": 7, "preference": "x"}', "line 1: the user id and the preference must be texts"),
        ("p.jsonl", '{"user_id": "a", "preference": null}', "line 1: the user id and the preference must be texts"),
        ("p.jsonl", '{"user_id": "a", "preference": "x"}\n' * 2, "line 2: user 'a' stands there already"),
    ],
)
def test_wrong_preference_files(tmp_path, name, text, said):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(InputError) as error:
        read_preferences(path)
    assert str(error.value).startswith(str(path)) and said in str(error.value) and "\n" not in str(error.value)


def test_a_missing_preference_file_is_named_with_its_flag(tmp_path):
    for name in ("p.json", "p.jsonl"):
        with pytest.raises(InputError, match=f"--preference_file: .*{name}: no such file"):
            read_preferences(tmp_path / name)


def test_descriptions_must_cover_the_items(tmp_path):
    path = tmp_path / "toy.item.json"
    path.write_text('{"0": {"title": "A", "description": "About A"}, "1": {"title": "B", "description": null}}')
    assert read_descriptions(path, [1, 0], "info.txt") == {0: "About A", 1: ""}
    with pytest.raises(InputError, match="toy.item.json: item 2 of info.txt is missing"):
        read_descriptions(path, [0, 2], "info.txt")
    path.write_text('{"0": {"title": "A"}, "1": 3}')
    with pytest.raises(InputError, match='toy.item.json, item 1: expected an object with a text "title"'):
        read_descriptions(path, [0], "info.txt")
    path.write_text("[]")
    with pytest.raises(InputError, match="toy.item.json: expected an object of items"):
        read_descriptions(path, [0], "info.txt")


# ------------------------------------------------------------------------------------------------------------- commands
@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """paths by flag name, with descriptions of their own, a preference file and a prompt set that shows a category."""
    folder = tmp_path_factory.mktemp("toy")
    paths = make_dataset(folder, items=20, users=10)
    items = read_json(paths["item_meta_path"])
    for item, fields in items.items():
        fields["description"] = f"Number {item} in words" if int(item) % 4 else ""
    (folder / "toy.item.json").write_text(json.dumps(items))
    (folder / "p.json").write_text(json.dumps({f"U{user}": f"Taste {user}" for user in range(5)}))
    worded = {task: tuple(template.values()) for task, template in load_prompts("worded").templates.items()}
    worded["next_sid"] = ("{category}: {history}\n", "{sid}")
    prompts = write_set(folder / "mine.yaml", separator=" ", **worded)
    return folder, {
        **paths,
        "config": write_config(folder),
        "preference_file": str(folder / "p.json"),
        "prompts": prompts,
    }


def train(toy, output, **changes):
    _, paths = toy
    flags = {key: paths[key] for key in ("train_file", "eval_file", "sid_index_path", "item_meta_path")}
    flags |= {"base_model": paths["config"], "train_from_scratch": True, "batch_size": 16, "num_epochs": 2}
    sft(SFTFlags(**{**flags, "output_dir": str(output), **changes}))
    return str(output / "final_checkpoint")


def test_all_tasks_from_sft_to_evaluation(toy, tmp_path, capsys, monkeypatch):
    folder, paths = toy
    extra = {"preference_file": paths["preference_file"], "prompts": str(paths["prompts"]), "category": "Toys"}
    weighted = [f"{task}:0.5" if task == "next_title" else task for task in TASKS]
    checkpoint = train(toy, tmp_path / "sft", tasks=weighted, **extra)
    said = capsys.readouterr().out
    assert "tasks=['next_sid', 'similar_sid', 'next_title:0.5', " in said
    assert "[sft] description2sid x 1: 15 examples, 5 left out without description" in said
    assert "[sft] next_title x 0.5: " in said
    assert load_prompts(f"{checkpoint}/prompts.yaml") == load_prompts(paths["prompts"], "Toys")

    epochs = []
    set_epoch = TaskMixture.set_epoch
    monkeypatch.setattr(TaskMixture, "set_epoch", lambda self, epoch: epochs.append(epoch) or set_epoch(self, epoch))
    flags = {key: paths[key] for key in ("train_file", "eval_file", "info_file", "item_meta_path", "preference_file")}
    rl(
        RLFlags(
            model_path=checkpoint,
            **flags,
            output_dir=str(tmp_path / "rl"),
            tasks=["next_sid:0.1", "description2sid", "preference2sid:0.1"],
            num_generations=4,
            train_batch_size=16,
            num_train_epochs=2,
            test_during_training=False,
            beta=0.0,
        )
    )
    said = capsys.readouterr().out
    assert "[rl] description2sid x 1: 15 examples, 5 left out without description" in said
    assert set(epochs) == {0, 1} and epochs == sorted(epochs)

    for name, category, prompts in (("own", None, None), ("named", "Toys", str(paths["prompts"]))):
        evaluate(
            EvaluateFlags(
                base_model=str(tmp_path / "rl" / "final_checkpoint"),
                **{key: paths[key] for key in ("train_file", "info_file", "test_data_path")},
                result_json_data=str(tmp_path / f"{name}.json"),
                num_beams=5,
                K=5,
                prompts=prompts,
                category=category,
            )
        )
    own, named = (read_json(tmp_path / f"{name}.json") for name in ("own", "named"))
    assert own == named and own[0]["input"].startswith("Toys: <a_")


def test_the_trainer_tells_the_mixture_the_epoch():
    mixture = build_mixture({"title2sid": 0.5}, random_inputs(2), encoder("worded"))

    def items():
        return [mixture[index].item_id for index in range(len(mixture))]

    expected = []
    for epoch in range(3):
        mixture.set_epoch(epoch)
        expected.append(items())
    # Before the first epoch, as the second begins, and in the middle of the third, where a resumed run may start.
    for epoch, found in zip((None, 1.0, 2.5), expected, strict=True):
        loader, state = SimpleNamespace(dataset=mixture), SimpleNamespace(epoch=epoch)
        EpochSetter().on_epoch_begin(None, state, None, train_dataloader=loader)
        assert items() == found


def test_a_set_without_next_sid_is_validated_on_its_own_tasks(toy, tmp_path):
    prompts = write_set(tmp_path / "mine.yaml", title2sid=("{title}: ", "{sid}"), next_title=("{history}: ", "{title}"))
    checkpoint = train(toy, tmp_path / "sft", prompts=str(prompts), tasks=["next_title"])
    assert set(load_prompts(f"{checkpoint}/prompts.yaml").templates) == {"title2sid", "next_title"}
    assert read_json(tmp_path / "sft" / "sft.stage.json")["results"]["eval_loss"] > 0


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"tasks": ["preference2sid"], "prompts": "worded"}, "--tasks: preference2sid needs --preference_file"),
        ({"prompts": "worded", "preference_file": "p.json"}, "--preference_file: no chosen task needs it"),
        ({"tasks": ["next_sid:x"]}, "--tasks next_sid:x: expected NAME or NAME:WEIGHT"),
        ({"tasks": ["history2preference"], "prompts": "worded", "preference_file": "nowhere.json"}, "nowhere.json"),
    ],
)
def test_wrong_flags_of_sft(toy, tmp_path, changes, said, monkeypatch):
    monkeypatch.setattr(
        "minionerec.training.sft_setup.build_model_from_config", lambda *_: pytest.fail("a model was made")
    )
    with pytest.raises(InputError) as error:
        train(toy, tmp_path / "sft", **changes)
    assert said in str(error.value)


def test_a_changed_preference_file_is_a_changed_input(toy, tmp_path, capsys):
    folder, _ = toy
    path = tmp_path / "p.json"
    flags = {
        "tasks": ["next_sid", "preference2sid"],
        "prompts": "worded",
        "num_epochs": 1,
        "preference_file": str(path),
    }
    for texts, done in (({"U1": "A"}, False), ({"U1": "A"}, True), ({"U1": "A", "U2": "B"}, False)):
        if not done:
            path.write_text(json.dumps(texts))
        train(toy, tmp_path / "sft", **flags)
        assert ("already done" in capsys.readouterr().out) == done
