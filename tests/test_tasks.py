"""Every task over random data: what its prompts and targets are, and the rules for what is cut or left out."""

import random
from collections import Counter
from dataclasses import replace

import pytest
from test_data import SIDS, TOKENIZER, encoder, make_row, make_tokenizer, timeline
from test_prompts import write_set

import data
from data import (
    RL_TASKS,
    TASKS,
    D3Dataset,
    EvalD3Dataset,
    EvalSidDataset,
    FusionSeqRecDataset,
    PreferenceSFTDataset,
    RLSeqTitle2SidDataset,
    RLSid2TitleDataset,
    RLSidhis2TitleDataset,
    RLTitle2SidDataset,
    SFTData,
    SidDataset,
    SidItemFeatDataset,
    SidSFTDataset,
    TaskInputs,
    TitleHistory2SidSFTDataset,
    UserPreference2sidSFTDataset,
)
from minionerec.common.files import InputError
from minionerec.common.records import Catalogue
from minionerec.language.prompts import TASK_FIELDS, Encoder, load_prompts
from minionerec.training.settings import SFTFlags
from minionerec.training.sft_setup import check_teaching_flags
from minionerec.training.sft_trainer import TreeBatches


def words(rng, count):
    return " ".join("".join(rng.choices("abcdefgh", k=6)) for _ in range(count))


def random_inputs(seed, users=6):
    """Items and users with texts of random words; a history never holds the target, and a user may buy an item
    twice.
    """
    rng = random.Random(seed)
    titles = [words(rng, rng.randint(3, 6)) for _ in SIDS]
    descriptions = {item: words(rng, rng.randint(3, 70)) for item in range(len(SIDS))}
    rows = []
    for user in range(users):
        for _ in range(rng.randint(1, 5)):
            history = rng.choices(range(len(SIDS)), k=rng.randint(1, 10))
            target = rng.choice([item for item in range(len(SIDS)) if item not in history])
            rows.append(make_row(history, target, f"U{user}", titles=lambda item: titles[item]))
    preferences = {f"U{user}": words(rng, 12) for user in range(users)}
    return TaskInputs(rows, Catalogue(SIDS, titles, list(range(len(SIDS)))), descriptions, preferences)


def build(task, inputs, coder=None, cutoff_len=512, known=TASKS):
    coder = coder or encoder("worded")
    coder.cutoff_len = cutoff_len
    return known[task].build(inputs, coder)


def test_the_registries_know_every_task():
    assert [task for task in TASKS if not TASKS[task].template] == list(TASK_FIELDS)
    # Rewards need a target that was taken, not one that was drawn.
    sid_tasks = {task for task, (_, answer) in TASK_FIELDS.items() if answer == "sid"}
    assert set(RL_TASKS) == sid_tasks - {"similar_sid"}
    assert all(RL_TASKS[task].file_flag == TASKS[task].file_flag for task in RL_TASKS)
    for task in TASKS:
        dataset = build(task, random_inputs(0))
        assert len(dataset) > 5 and dataset[0] == dataset.examples[0]
        allowed = {"similar_sid": {"like no other item"}, "teacher_sid": {"unknown to the teacher"}}
        assert set(dataset.left_out) <= allowed.get(task, set())


# ------------------------------------------------------------------------------------------------- prompts and targets
@pytest.mark.parametrize("task", TASK_FIELDS)
@pytest.mark.parametrize("seed", range(3))
def test_no_prompt_holds_its_target(task, seed):
    """Nor, in a row task, any text of the target item."""
    inputs = random_inputs(seed)
    for known in (TASKS, RL_TASKS) if task in RL_TASKS else (TASKS,):
        for example in build(task, inputs, known=known):
            assert example.target and example.target not in example.prompt
            if example.user_id:
                item = example.item_id
                for text in (SIDS[item], inputs.catalogue.titles[item], inputs.descriptions[item]):
                    assert text not in example.prompt


@pytest.mark.parametrize("task", [task for task in TASK_FIELDS if task != "similar_sid"])
def test_no_prompt_depends_on_its_target(task):
    """Every answer exchanged, the prompts stay as they are."""
    inputs, rng = random_inputs(7), random.Random(7)
    given, answer = TASK_FIELDS[task]
    catalogue, changed = inputs.catalogue, {}
    if given == "history" or given == "preference":
        strangers = [make_row([0], 39, titles=lambda _: words(rng, 4)) for _ in inputs.rows]
        rows = [
            replace(row, sid=o.sid, item_id=o.item_id, title=o.title)
            for row, o in zip(inputs.rows, strangers, strict=True)
        ]
        changed["rows"] = [r for r in rows]
    if given != "description":
        changed["descriptions"] = {item: words(rng, 5) for item in inputs.descriptions}
    if given != "preference":
        changed["preferences"] = {user: words(rng, 5) for user in inputs.preferences}
    if answer == "sid":
        catalogue = replace(catalogue, sids=SIDS[1:] + SIDS[:1])
    if answer == "title":
        catalogue = replace(catalogue, titles=[words(rng, 4) for _ in SIDS])
    first, second = build(task, inputs), build(task, replace(inputs, catalogue=catalogue, **changed))
    assert [e.prompt for e in first] == [e.prompt for e in second]
    assert [e.prompt_ids for e in first] == [e.prompt_ids for e in second]
    different = [e.target_ids != o.target_ids for e, o in zip(first, second, strict=True)]
    assert sum(different) >= len(different) - 2  # item 39 may be a row's target already


def texts_of(task, row, inputs):
    """(what the prompt shows, what the target says) of a row task, spelled out."""
    return {
        "next_sid": (row.history_sids, row.sid),
        "next_title": (row.history_sids, row.title),
        "next_description": (row.history_sids, load_prompts("worded").shorten(inputs.descriptions[row.item_id])),
        "title_history2sid": (row.history_titles, row.sid),
        "title_history2title": (row.history_titles, row.title),
        "history2preference": (row.history_sids, inputs.preferences[row.user_id]),
        "preference2sid": ([inputs.preferences[row.user_id]], row.sid),
    }[task]


# similar_sid has targets of its own making: tests/test_similar_items.py
TAKEN = [task for task in TASK_FIELDS if task != "similar_sid"]
ROW_TASKS = [task for task in TAKEN if TASK_FIELDS[task][0] in ("history", "preference")]


@pytest.mark.parametrize("task", ROW_TASKS)
@pytest.mark.parametrize("bos", [True, False])
def test_row_tasks_against_formatting_row_by_row(task, bos):
    inputs, coder, worded = random_inputs(3), encoder("worded", make_tokenizer(bos)), load_prompts("worded")
    rows = inputs.rows
    if task == "history2preference":  # one example a user: its last row
        rows = [
            row for row, after in zip(rows, rows[1:] + [None], strict=True) if not after or after.user_id != row.user_id
        ]
    dataset = build(task, inputs, coder)
    assert dataset.rows == rows
    for row, example in zip(rows, dataset, strict=True):
        shown, said = texts_of(task, row, inputs)
        field, answer = TASK_FIELDS[task]
        prompt = worded.template(task)["prompt"].replace(f"{{{field}}}", ", ".join(shown))
        ids = coder.tokenizer(prompt + said, add_special_tokens=False).input_ids
        assert (example.prompt, example.target) == (prompt, said)
        assert example.prompt_ids + example.target_ids == [*coder.start, *ids, coder.tokenizer.eos_token_id]
        assert (example.user_id, example.group) == (row.user_id, row.user_id)
        assert (example.sid, example.item_id) == (row.sid, row.item_id)


@pytest.mark.parametrize("task", [task for task in TAKEN if task not in ROW_TASKS])
def test_item_tasks_against_formatting_item_by_item(task):
    inputs, worded = random_inputs(4), load_prompts("worded")
    dataset = build(task, inputs)
    assert [example.item_id for example in dataset] == inputs.catalogue.item_ids
    for item, example in enumerate(dataset):
        texts = {
            "sid": SIDS[item],
            "title": inputs.catalogue.titles[item],
            "description": worded.shorten(inputs.descriptions[item]),
        }
        field, answer = TASK_FIELDS[task]
        assert example.prompt == worded.template(task)["prompt"].replace(f"{{{field}}}", texts[field])
        assert (example.target, example.sid, example.user_id) == (texts[answer], SIDS[item], "")


def test_rl_and_evaluation_classes_make_the_same_examples():
    """Trap 1, class by class."""
    inputs, coder = random_inputs(5), encoder("worded")
    rows, items = inputs.rows, inputs.catalogue
    for trained, others in (
        (SidSFTDataset, (SidDataset, EvalSidDataset)),
        (SFTData, (D3Dataset, EvalD3Dataset)),
        (TitleHistory2SidSFTDataset, (RLSeqTitle2SidDataset,)),
        (FusionSeqRecDataset, (RLSidhis2TitleDataset,)),
    ):
        for other in others:
            assert trained(rows, coder).examples == other(rows, coder).examples and other is not trained
    assert RLSid2TitleDataset(items, coder).examples == build("sid2title", inputs).examples
    assert RLTitle2SidDataset(items, coder).examples == build("title2sid", inputs).examples
    assert SidItemFeatDataset(items, coder).examples == [
        *build("title2sid", inputs).examples,
        *build("sid2title", inputs).examples,
    ]
    for task in RL_TASKS:
        assert build(task, inputs).examples == build(task, inputs, known=RL_TASKS).examples
    assert FusionSeqRecDataset(rows, coder, inputs.descriptions).task == "next_description"
    names = (
        "SidSFTDataset SidItemFeatDataset FusionSeqRecDataset TitleHistory2SidSFTDataset SFTData PreferenceSFTDataset "
    )
    names += "UserPreference2sidSFTDataset SidDataset D3Dataset RLTitle2SidDataset RLSeqTitle2SidDataset "
    names += "RLSid2TitleDataset RLSidhis2TitleDataset EvalSidDataset EvalD3Dataset"
    assert all(issubclass(getattr(data, name), data.PromptDataset) for name in names.split())


def test_compact_rows_of_a_user_are_one_sequence_with_a_loss_at_every_item():
    rows = timeline("U", list(range(11)))
    (coder, examples) = encoder(), SidSFTDataset(rows, encoder()).examples
    batches = TreeBatches([examples], len(rows), 1, coder.pad_token_id, seed=1)
    (batch,) = (batches[index] for index in range(len(batches)))
    # The start token and 11 items of 2 tokens, written once; labels are the two tokens and the end of every target.
    whole = [*coder.start, *(token for item in range(11) for token in coder.sid_ids([SIDS[item]])[0][:2])]
    assert batch["input_ids"].tolist() == [whole]
    labels = sorted(zip(batch["node"][batch["label_row"]].tolist(), batch["label_token"].tolist(), strict=True))
    expected = []
    for item in range(1, 11):
        first = len(coder.start) + 2 * item - 1  # the last token of the item before
        expected += [(first + step, token) for step, token in enumerate(coder.sid_ids([SIDS[item]])[0])]
    assert labels == sorted(expected)


# ---------------------------------------------------------------------------------------------------------------- rules
@pytest.mark.parametrize("task", ROW_TASKS)
@pytest.mark.parametrize("seed", range(3))
def test_the_oldest_history_goes_first(task, seed):
    """Against dropping one item after the other until the example fits, at lengths from too short to long enough."""
    inputs, worded, rng = random_inputs(seed), load_prompts("worded"), random.Random(seed)
    coder, field = encoder("worded"), TASK_FIELDS[task][0]
    outcomes = Counter()
    for row in inputs.rows:
        shown, said = texts_of(task, row, inputs)
        target = coder.target_ids(task, [said])[0]
        template = worded.template(task)["prompt"]
        prompts = [template.replace(f"{{{field}}}", ", ".join(shown[first:])) for first in range(len(shown))]
        ids = coder.prompt_ids(prompts)
        cutoff_len = rng.randint(len(ids[-1]) - 3, len(ids[0]) + 3) + len(target)
        one = replace(inputs, rows=[row])
        first = next((n for n in range(len(shown)) if len(ids[n]) + len(target) <= cutoff_len), None)
        if first is None:
            message = f"--cutoff_len {cutoff_len}: row 1 needs {len(ids[-1]) + len(target)} tokens for {task}"
            with pytest.raises(InputError, match=message):
                build(task, one, cutoff_len=cutoff_len)
        else:
            (example,) = build(task, one, cutoff_len=cutoff_len)
            assert (example.prompt, example.prompt_ids, example.target_ids) == (prompts[first], ids[first], target)
        outcomes["none" if first is None else "cut" if first else "whole"] += 1
    assert outcomes["none"] + outcomes["cut"] > 0 and outcomes["whole"] > 0


def test_many_rows_are_cut_like_each_alone():
    inputs = random_inputs(12, users=12)
    together = build("title_history2sid", inputs, cutoff_len=200)
    alone = [build("title_history2sid", replace(inputs, rows=[row]), cutoff_len=200) for row in inputs.rows]
    assert list(together) == [example for dataset in alone for example in dataset]
    assert together.shown_items.tolist() == [dataset.shown_items[0] for dataset in alone]
    assert len(set(together.shown_items)) > 2


def test_items_that_are_too_long_are_left_out():
    inputs = random_inputs(13)
    whole = build("description2sid", inputs)
    length = {e.item_id: len(e.prompt_ids) + len(e.target_ids) for e in whole}
    limit = sorted(length.values())[10]
    cut = build("description2sid", inputs, cutoff_len=limit)
    assert list(cut) == [e for e in whole if length[e.item_id] <= limit] and 10 < len(cut) < len(whole)
    assert cut.left_out == {"longer than cutoff_len": len(whole) - len(cut)}


def test_what_has_no_text_is_left_out_and_counted():
    titles = {0: "", 1: "One", 2: " ", 3: "Three", 4: "Four", 5: "Five"}
    rows = [
        make_row(history, target, user, titles=titles.get)
        for user, history, target in (("A", [0, 1, 2, 3], 4), ("A", [0, 2], 5), ("B", [3], 0), ("C", [2], 2))
    ]
    descriptions, preferences = {4: "About four", 5: " \n"}, {"A": "Likes A", "B": ""}
    inputs = TaskInputs(rows, Catalogue(SIDS[:6], list(titles.values()), list(titles)), descriptions, preferences)
    found = {task: build(task, inputs) for task in TASKS}
    kept = {task: [e.item_id for e in dataset] for task, dataset in found.items()}
    left = {task: dict(dataset.left_out) for task, dataset in found.items()}
    # A history without any title has nothing to show; items without one are skipped.
    assert (kept["title_history2sid"], left["title_history2sid"]) == ([4, 0], {"without history": 2})
    assert "\nOne, Three\n" in found["title_history2sid"][0].prompt
    assert found["title_history2sid"].rows == [rows[0], rows[2]]
    assert left["title_history2title"] == {"without history": 2, "without title": 1}
    assert (kept["next_title"], left["next_title"]) == ([4, 5], {"without title": 2})
    assert (kept["next_description"], left["next_description"]) == ([4], {"without description": 3})
    assert (kept["next_sid"], left["next_sid"]) == ([4, 5, 0, 2], {})
    assert (kept["title2sid"], left["title2sid"]) == ([1, 3, 4, 5], {"without title": 2})
    assert (kept["sid2title"], left["sid2title"]) == ([1, 3, 4, 5], {"without title": 2})
    assert (kept["description2sid"], left["description2sid"]) == ([4], {"without description": 5})
    assert (kept["sid2description"], left["sid2description"]) == ([4], {"without description": 5})
    assert (kept["history2preference"], left["history2preference"]) == ([5], {"without preference": 2})
    assert (kept["preference2sid"], left["preference2sid"]) == ([4, 5], {"without preference": 2})


def test_items_that_share_what_the_prompt_shows_are_left_out(tmp_path):
    """Equal titles, descriptions that are equal once cut, and one SID of two items."""
    path = write_set(
        tmp_path / "mine.yaml",
        max_description=9,
        **{task: tuple(load_prompts("worded").template(task).values()) for task in TASK_FIELDS},
    )
    coder = Encoder(TOKENIZER, load_prompts(path))
    catalogue = Catalogue([*SIDS[:4], SIDS[0]], ["Same", "Own", "Same", "Fourth", "Fifth"], [0, 1, 2, 3, 4])
    descriptions = {0: "long text one", 1: "long text two", 2: "long tale", 3: "", 4: ""}
    expected = {
        "title2sid": ([1, 3, 4], {"sharing its title": 2}),
        "sid2title": ([1, 2, 3], {"sharing its sid": 2}),
        "description2sid": ([2], {"sharing its description": 2, "without description": 2}),
        "sid2description": ([1, 2], {"sharing its sid": 2, "without description": 1}),
    }
    for task, (items, left_out) in expected.items():
        dataset = SidItemFeatDataset(catalogue, coder, tasks=(task,), descriptions=descriptions)
        assert ([e.item_id for e in dataset], dict(dataset.left_out)) == (items, left_out)
    assert build("sid2description", TaskInputs([], catalogue, descriptions), coder)[0].target == "long text"


def test_a_preference_may_not_name_the_target():
    titles = {1: "Blue Steel Hammer", 2: "Saw", 3: "Wood  screws, \u00c4NY size", 4: "Drill"}
    rows = [make_row([4], target, user, titles=titles.get) for user in "AB" for target in (1, 2, 3)]
    text = f"Wants a blue STEEL hammer, a saw, wood screws, \u00e4ny size; {SIDS[2].upper()} "
    dataset = UserPreference2sidSFTDataset(rows, encoder("worded"), {"A": text, "B": "Likes a saw"})
    # B's text says "saw", a title of one word, which may be chance.
    assert [(e.user_id, e.item_id) for e in dataset] == [("B", 1), ("B", 2), ("B", 3)]
    assert dataset.left_out == {"naming the target": 3}


def test_a_preference_is_said_once_a_user():
    rows = [row for user in "ABC" for row in timeline(user, [1, 2, 3, 4])]
    random.Random(0).shuffle(rows)
    dataset = PreferenceSFTDataset(rows, encoder("worded"), {"A": "Tools", "C": "Toys"})
    assert sorted((e.user_id, e.target) for e in dataset) == [("A", "Tools"), ("C", "Toys")]
    assert dataset.left_out == {"without preference": 1}
    for example, row in zip(dataset, dataset.rows, strict=True):
        assert row is [r for r in rows if r.user_id == example.user_id][-1]


@pytest.mark.parametrize(
    "flags, message",
    [
        (dict(teacher="transitions"), "--teacher transitions: .* add teacher_sid to --tasks"),
        (dict(tasks=["next_sid", "teacher_sid:0.5"], walks=2), "--walks 2: .* add walk_sid to --tasks"),
        (dict(tasks=["next_sid"], walk_teacher="content"), "--walk_teacher content: .* add walk_sid to --tasks"),
        (dict(tasks=["next_sid", "teacher_sid:0.5"], walk_teacher="content"), None),
        (dict(tasks=["next_sid", "teacher_sid:0.5"], teacher="transitions"), None),
        (dict(tasks=["walk_sid"], teacher="transitions", walks=2), None),
        (dict(teacher="transitions+content", walks=3), None),  # the defaults, as settings files hold them
        (dict(teacher="transitions", plugin=["own_task.py"]), None),  # whose tasks may read it
    ],
)
def test_flags_of_a_teacher_without_a_task_that_reads_them_are_refused(flags, message):
    required = dict.fromkeys(("base_model", "train_file", "eval_file", "sid_index_path", "item_meta_path"), "x")
    settings = SFTFlags(**required, output_dir="x", **flags)
    if message is None:
        check_teaching_flags(settings)
    else:
        with pytest.raises(InputError, match=message):
            check_teaching_flags(settings)
