"""Prompt sets and their tokens: what a template may show, where sets are found, and the encoder."""

import random
import string

import pytest
import yaml
from test_data import SIDS, TOKENIZER, encoder, make_tokenizer

from minionerec.common.files import InputError
from minionerec.language.models import BOS
from minionerec.language.prompts import (
    TASK_FIELDS,
    Encoder,
    load_checkpoint_prompts,
    load_prompts,
    resolve_prompts_file,
)


def write_set(path, **tasks):
    """A YAML file with one set; a task is (prompt, target), a setting any other value."""
    chosen = {
        name: dict(zip(("prompt", "target"), value, strict=True)) if isinstance(value, tuple) else value
        for name, value in tasks.items()
    }
    path.write_text(yaml.safe_dump({"mine": chosen}, allow_unicode=True), encoding="utf-8")
    return path


# ----------------------------------------------------------------------------------------------------------------- sets
@pytest.mark.parametrize(
    "content, said",
    [
        ({"mine": {"next_sid": {"prompt": "{history}"}}}, "task next_sid: expected the keys prompt and target"),
        ({"mine": {"next_sid": {"prompt": "{history}", "target": "{sid}", "more": ""}}}, "next_sid: expected the keys"),
        ({"mine": {"next_sid": "{history}"}}, "task next_sid: expected the keys prompt and target"),
        ({"mine": {"next_sid": {"prompt": "{history} {sid}", "target": "{sid}"}}}, "contains its own target {sid}"),
        ({"mine": {"sid2title": {"prompt": "{title}?", "target": "It is {title}"}}}, "contains its own target {title}"),
        ({"mine": {"next_sid": {"prompt": "{histroy}", "target": "{sid}"}}}, "task next_sid: unknown field {histroy}"),
        ({"one": {}, "two": {}}, "exactly one prompt set"),
        (["next_sid"], "exactly one prompt set"),
        ({"mine": "next_sid"}, "expected the prompt set"),
    ],
)
def test_wrong_prompt_sets(tmp_path, content, said):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(InputError) as error:
        load_prompts(path)
    assert str(path) in str(error.value) and said in str(error.value)


def test_prompt_sets_are_found_by_name_file_and_file_with_set(tmp_path):
    path = tmp_path / "mine.yaml"
    first, second = load_prompts("compact"), load_prompts("worded")
    task = "  next_sid: {prompt: '%s{history}', target: '{sid}'}\n"
    path.write_text("one:\n" + task % "a" + "two:\n" + task % "b")
    assert load_prompts(f"{path}:two").template("next_sid")["prompt"] == "b{history}"
    with pytest.raises(InputError, match="expected the prompt set 'three'"):
        load_prompts(f"{path}:three")
    with pytest.raises(InputError, match="--prompts: .*missing.yaml: no such file"):
        load_prompts(tmp_path / "missing.yaml")
    path.write_text("a: [")
    with pytest.raises(InputError, match="mine.yaml, line 1: not valid YAML"):
        load_prompts(path)
    assert set(first.templates) == {"next_sid", "similar_sid"} and {"next_sid", "title2sid", "sid2title"} <= set(
        second.templates
    )
    with pytest.raises(InputError, match="no task 'title2sid'"):
        first.template("title2sid")


def test_a_checkpoint_brings_its_prompts(tmp_path):
    """Its own set before the worded one; a named one before both."""
    worded, compact = load_prompts("worded"), load_prompts("compact")
    assert load_checkpoint_prompts(tmp_path) == worded
    (tmp_path / "prompts.yaml").write_text(compact.to_yaml(), encoding="utf-8")
    assert load_checkpoint_prompts(tmp_path) == compact
    assert load_checkpoint_prompts(tmp_path, "worded") == worded
    (tmp_path / "prompts.yaml").write_text(worded.to_yaml(), encoding="utf-8")
    assert load_checkpoint_prompts(tmp_path) == worded  # line breaks and separator included


NEXT = ("{history}", "{sid}")


@pytest.mark.parametrize(
    "tasks, said",
    [
        # A row task may show the history and nothing of the target item, whatever its own target is.
        (dict(next_sid=("{history} {title}", "{sid}")), "the prompt must show {history} and may show {category}"),
        (dict(next_title=("{history} {sid}", "{title}")), "the prompt must show {history}"),
        (dict(title_history2sid=("{history} {description}", "{sid}")), "the prompt must show {history}"),
        (dict(preference2sid=("{preference} {title}", "{sid}")), "the prompt must show {preference}"),
        (dict(title2sid=("{title} {description}", "{sid}")), "the prompt must show {title}"),
        (dict(next_sid=("What is next?", "{sid}")), "the prompt must show {history}"),
        (dict(next_sid=("{history}", "{title}")), "the target must say {sid}"),
        (dict(next_title=("{history}", "{title} {description}")), "the target must say {title}"),
        (dict(next_title=("{history}", "a title")), "the target must say {title}"),
        (dict(next_title=("{history}", "{title} of {category}")), "the target must say {title}"),
        (dict(next_item=NEXT), "task next_item: unknown task; known: next_sid, "),
        (dict(next_sid=("{history", "{sid}")), "prompt is no template"),
        (dict(next_sid=("{history}}", "{sid}")), "prompt is no template"),
        (dict(next_sid=(3, "{sid}")), "prompt is no template"),
        (dict(next_sid=("{history!r}", "{sid}")), "unknown field {history}"),
        (dict(next_sid=("{history:>9}", "{sid}")), "unknown field {history}"),
        (dict(next_sid=("{}", "{sid}")), "unknown field {}"),
        (dict(next_sid=("{history.x}", "{sid}")), "unknown field {history.x}"),
        (
            dict(next_sid=("{history} {category}", "{sid}")),
            "the prompt shows {category}; give its text with --category",
        ),
        (dict(next_sid=("{history}", "Item {sid}")), "the target must be {sid}, alone"),
        (dict(next_sid=("{history}", "{sid}\n"), title2sid=("{title}", "{sid}")), "task title2sid: the target must be"),
        (dict(next_sid=NEXT, separator=3), "separator must be text"),
        (dict(next_sid=NEXT, max_description="long"), "max_description must be a number from 1"),
        (dict(next_sid=NEXT, max_description=0), "max_description must be a number from 1"),
        (dict(next_sid=NEXT, max_description=True), "max_description must be a number from 1"),
        (dict(separator=", "), "the prompt set has no task"),
    ],
)
def test_what_a_template_may_not_show(tmp_path, tasks, said):
    path = write_set(tmp_path / "mine.yaml", **tasks)
    with pytest.raises(InputError) as error:
        load_prompts(path)
    assert str(path) in str(error.value) and said in str(error.value) and "\n" not in str(error.value)


def test_every_task_has_a_worded_template_and_any_subset_will_do(tmp_path):
    worded = load_prompts("worded")
    assert set(worded.templates) == set(TASK_FIELDS)
    rng = random.Random(0)
    for _ in range(20):
        chosen = rng.sample(sorted(TASK_FIELDS), rng.randint(1, len(TASK_FIELDS)))
        tasks = {task: tuple(worded.template(task).values()) for task in chosen}
        loaded = load_prompts(write_set(tmp_path / "mine.yaml", **tasks, separator="; "))
        assert loaded.templates == {task: worded.template(task) for task in chosen}
        assert (loaded.separator, loaded.max_description) == ("; ", 400)


def test_worded_prompts_stay_short():
    """Their own words, in characters: every token of them is paid for in every stage."""
    worded = load_prompts("worded")
    assert max(len(worded.prompt(task, [""])) for task in worded.templates) <= 90


def test_the_category_becomes_part_of_the_prompts(tmp_path, capsys):
    """Braces in it, or in the template, stay what they are; a checkpoint needs no flag."""
    path = write_set(tmp_path / "mine.yaml", next_sid=("{{x}} {category}: {history}", "{sid}"), separator=" ")
    for category in ("Tools & Home", "{history} {", "工具", ""):
        prompts = load_prompts(path, category)
        assert prompts.prompt("next_sid", ["a", "b"]) == f"{{x}} {category}: a b"
        (tmp_path / "prompts.yaml").write_text(prompts.to_yaml(), encoding="utf-8")
        assert load_checkpoint_prompts(tmp_path) == prompts
    assert capsys.readouterr().out == ""
    assert load_prompts("worded", "Tools") == load_prompts("worded")
    assert "--category Tools: no template of " in capsys.readouterr().out


def test_settings_travel_with_the_checkpoint(tmp_path):
    path = write_set(tmp_path / "mine.yaml", next_sid=NEXT, separator=" | ", max_description=17)
    prompts = load_prompts(path)
    (tmp_path / "prompts.yaml").write_text(prompts.to_yaml(), encoding="utf-8")
    assert load_checkpoint_prompts(tmp_path) == prompts and prompts.max_description == 17


def test_descriptions_are_cut_between_words(tmp_path):
    """Against taking words one by one while they fit."""
    rng = random.Random(1)
    for _ in range(300):
        longest = rng.randint(1, 30)
        prompts = load_prompts(write_set(tmp_path / "mine.yaml", next_sid=NEXT, max_description=longest))
        words = ["".join(rng.choices(string.ascii_letters, k=rng.randint(1, 8))) for _ in range(rng.randint(0, 8))]
        text = "".join(word + rng.choice([" ", "\n", "  ", "\t "]) for word in words)
        expected = ""
        for word in words:
            longer = f"{expected} {word}".strip()
            if len(longer) > longest:
                break
            expected = longer
        assert prompts.shorten(text) == (expected or "".join(words[:1])[:longest])


def test_the_end_of_a_sid_target_is_the_end_in_the_trie(tmp_path):
    """A set that matches another checkpoint may close its SIDs with a line end."""
    path = write_set(tmp_path / "mine.yaml", next_sid=("{history}", "{sid}\n"), title2sid=("{title}: ", "{sid}\n"))
    coder = Encoder(TOKENIZER, load_prompts(path))
    line_end = TOKENIZER("\n", add_special_tokens=False).input_ids
    assert coder.end == [*line_end, TOKENIZER.eos_token_id]
    for task in ("next_sid", "title2sid"):
        assert coder.sid_ids([SIDS[3]]) == coder.target_ids(task, [coder.prompts.target(task, SIDS[3])])
    assert encoder().end == [TOKENIZER.eos_token_id]


# -------------------------------------------------------------------------------------------------------------- encoder
@pytest.mark.parametrize("bos, closes", [(True, False), (True, True), (False, False)])
def test_the_start_token_stands_once_and_the_end_token_after_targets_only(bos, closes):
    tokenizer = make_tokenizer(bos, closes)
    coder = encoder("worded", tokenizer)
    start = [tokenizer.convert_tokens_to_ids(BOS)] if bos else []
    words = tokenizer("some words\n", add_special_tokens=False).input_ids
    assert coder.start == start and coder.prompt_ids(["some words\n"]) == [start + words]
    assert coder.target_ids("title2sid", ["some words\n"]) == [words + [tokenizer.eos_token_id]]
    assert coder.prompt_ids([]) == coder.target_ids("next_sid", []) == []
    assert coder.pad_token_id == tokenizer.eos_token_id


def test_sid_ids():
    coder = encoder()
    assert coder.sid_ids([SIDS[3], "<a_1>"]) == coder.target_ids("next_sid", [SIDS[3], "<a_1>"])
    with pytest.raises(InputError, match="does not know the SID token <z_9>"):
        coder.sid_ids([SIDS[0], "<a_1><z_9>"])


def test_a_tokenizer_without_end_token_is_refused():
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(InputError, match="no end-of-sequence token"):
        encoder(tokenizer=tokenizer)


def test_the_boundary_between_prompt_and_target_is_checked(tmp_path):
    """Trap 7: a prompt whose end merges with the target's first letters would be trained on other tokens."""
    tokenizer = make_tokenizer(texts=["word preword"] * 50)
    path = tmp_path / "mine.yaml"
    path.write_text("mine:\n  sid2title: {prompt: '{sid} pre', target: '{title}'}\n")
    coder = Encoder(tokenizer, load_prompts(path))
    coder.check_boundary("sid2title", "<a_1>")  # an added token never merges
    with pytest.raises(InputError, match="prompt task sid2title: 'word' tokenises together with the end of its prompt"):
        coder.check_boundary("sid2title", "word")
    for prompts in ("compact", "worded"):
        encoder(prompts, tokenizer).check_boundary("next_sid", SIDS[0])


class Counting:
    """A tokenizer that notes the texts it is given."""

    def __init__(self, tokenizer):
        self.tokenizer, self.texts = tokenizer, []

    def __getattr__(self, name):
        return getattr(self.tokenizer, name)

    def __call__(self, texts, **options):
        self.texts += texts if isinstance(texts, list) else [texts]
        return self.tokenizer(texts, **options)


def test_equal_texts_are_tokenised_once():
    tokenizer = Counting(TOKENIZER)
    coder = Encoder(tokenizer, load_prompts("compact"))
    rng = random.Random(0)
    words = [f"word {number}" for number in range(20)]
    tokenizer.texts.clear()
    for _ in range(5):
        texts = rng.choices(words, k=30)
        assert coder.target_ids("next_sid", texts) == [
            [*TOKENIZER(t, add_special_tokens=False).input_ids, coder.end[-1]] for t in texts
        ]
    assert sorted(tokenizer.texts) == sorted(set(tokenizer.texts)) and len(tokenizer.texts) > 10
    tokenizer.texts.clear()
    texts = rng.choices(words, k=30)
    assert coder.prompt_ids(texts) == [TOKENIZER(text).input_ids for text in texts]
    assert len(tokenizer.texts) == len(set(texts)) < 30


def test_the_file_of_a_prompt_set():
    assert resolve_prompts_file("own.yaml") == ("own.yaml", "") and resolve_prompts_file("a/own.yaml:mine") == (
        "a/own.yaml",
        "mine",
    )
    for name in ("compact", "worded"):
        assert load_prompts(":".join(resolve_prompts_file(name))) == load_prompts(name)
