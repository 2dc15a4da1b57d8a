"""Prompt templates, and how their texts become token ids: the same ones for SFT, RL and evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Formatter
from typing import Any

import yaml
from transformers import PreTrainedTokenizerBase

from minionerec.common.files import InputError, read_yaml
from minionerec.common.processes import say
from minionerec.common.records import SID_TOKEN

PROMPTS_FILE = "prompts.yaml"  # the prompt set a checkpoint carries

# Every task has one field that its prompt shows and one that its target says, so no prompt can hold anything else of
# the target item. Beside it a prompt may show {category}.
TASK_FIELDS = {
    "next_sid": ("history", "sid"),
    "similar_sid": ("history", "sid"),
    "next_title": ("history", "title"),
    "next_description": ("history", "description"),
    "title_history2sid": ("history", "sid"),
    "title_history2title": ("history", "title"),
    "title2sid": ("title", "sid"),
    "sid2title": ("sid", "title"),
    "description2sid": ("description", "sid"),
    "sid2description": ("sid", "description"),
    "history2preference": ("history", "preference"),
    "preference2sid": ("preference", "sid"),
}


# Templates of tasks that plugins register, for prompt sets that have none of their own.
REGISTERED_TEMPLATES: dict[str, dict[str, str]] = {}
SETTINGS = {"separator": "", "max_description": 400}  # of a prompt set, beside its tasks


@dataclass(frozen=True)
class PromptSet:
    """Templates by task (`{"prompt": ..., "target": ...}`) and the set's settings.

    Attributes:
        separator: the text between the items of a history.
        max_description: characters that prompts and targets show of an item's description.
    """

    templates: dict[str, dict[str, str]]
    separator: str
    max_description: int

    def prompt(self, task: str, texts: Sequence[str]) -> str:
        """The prompt of a task that shows `texts`: the items of a history, or a single text."""
        return self.template(task)["prompt"].format(**{TASK_FIELDS[task][0]: self.separator.join(texts)})

    def target(self, task: str, text: str) -> str:
        """The target of a task that says `text`."""
        return self.template(task)["target"].format(**{TASK_FIELDS[task][1]: text})

    def ending(self, task: str) -> str:
        """What all prompts of a task end with, behind what they show."""
        pieces = list(Formatter().parse(self.template(task)["prompt"]))
        shown = [number for number, (_, field, _, _) in enumerate(pieces) if field is not None]
        return "".join(literal for literal, _, _, _ in pieces[shown[-1] + 1 :]) if shown else ""

    def template(self, task: str) -> dict[str, str]:
        if task not in self.templates:
            raise InputError(f"this prompt set has no task {task!r}; it has {', '.join(self.templates)}")
        return self.templates[task]

    @property
    def is_compact(self) -> bool:
        """Whether the set shows and says nothing but bare SIDs."""
        return self.templates.keys() - REGISTERED_TEMPLATES.keys() == {"next_sid", "similar_sid"}

    @property
    def after_sid(self) -> str:
        """What every target that is a SID ends with: "" in the project's own sets."""
        targets = [self.target(task, "") for task in self.templates if TASK_FIELDS[task][1] == "sid"]
        return targets[0] if targets else ""

    def shorten(self, description: str) -> str:
        """A description on one line, cut at the last blank that leaves at most max_description characters."""
        text = " ".join(description.split())
        if len(text) <= self.max_description:
            return text
        return text[: self.max_description + 1].rpartition(" ")[0] or text[: self.max_description]

    def to_yaml(self) -> str:
        """The set as a file that `load_prompts` reads; tasks of plugins stay out, as a reader may lack the plugin."""
        settings = {name: getattr(self, name) for name in SETTINGS}
        templates = {task: parts for task, parts in self.templates.items() if task not in REGISTERED_TEMPLATES}
        return yaml.safe_dump({"checkpoint": {**settings, **templates}}, allow_unicode=True, sort_keys=False)


def resolve_prompts_file(name_or_file: str | Path) -> tuple[str, str]:
    """(YAML file, name of the set in it or "") of a set's name, FILE or FILE:SET."""
    text, _, name = str(name_or_file).rpartition(":")
    path, name = (text, name) if text else (str(name_or_file), "")
    if path in ("compact", "worded"):
        return str(Path(__file__).parents[2] / "config" / PROMPTS_FILE), path
    return path, name


def load_prompts(name_or_file: str | Path, category: str | None = None) -> PromptSet:
    """A prompt set: `compact` or `worded` (config/prompts.yaml), a YAML file with one set, or FILE:SET.

    Args:
        category: any text, for the {category} of the templates. It becomes part of them and of a checkpoint.

    Raises:
        InputError: no such set or file, a wrong setting, an unknown task, or a template that lacks its prompt or
            target, shows other fields than its task has, has its target in its prompt, or needs a category that was
            not given.
    """
    path, name = resolve_prompts_file(name_or_file)
    content = read_yaml(path, "prompts")
    if not isinstance(content, dict) or (not name and len(content) != 1) or (name and name not in content):
        raise InputError(
            f"{path}: expected {f'the prompt set {name!r}' if name else 'exactly one prompt set, or FILE:SET'}"
        )
    chosen = content[name] if name else next(iter(content.values()))
    if not isinstance(chosen, dict):
        raise InputError(f"{path}: expected the prompt set to be tasks with their templates, got {str(chosen)[:60]!r}")
    settings = {key: chosen.get(key, default) for key, default in SETTINGS.items()}
    for key, default in SETTINGS.items():
        if type(settings[key]) is not type(default) or (key == "max_description" and settings[key] < 1):
            raise InputError(f"{path}: {key} must be {'text' if default == '' else 'a number from 1'}")
    tasks = {task: template for task, template in chosen.items() if task not in SETTINGS}
    tasks |= {task: template for task, template in REGISTERED_TEMPLATES.items() if task not in tasks} if tasks else {}
    if not tasks:
        raise InputError(f"{path}: the prompt set has no task; known: {', '.join(TASK_FIELDS)}")
    checked = {task: _check_template(f"{path}, task {task}", task, template) for task, template in tasks.items()}

    templates, shown = {}, set()
    for task, parts in checked.items():
        fields = {field for _, field in parts["prompt"]}
        if "category" in fields and category is None:
            raise InputError(f"{path}, task {task}: the prompt shows {{category}}; give its text with --category")
        shown |= fields
        templates[task] = {part: _join_pieces(pieces, category or "") for part, pieces in parts.items()}
    if category is not None and "category" not in shown:
        say(f"--category {category}: no template of {path} shows a category")
    prompts = PromptSet(templates, **settings)
    for task, template in templates.items():
        if TASK_FIELDS[task][1] == "sid" and (
            not template["target"].startswith("{sid}") or prompts.target(task, "") != prompts.after_sid
        ):
            # Search and rollouts go over closed lists of SIDs, which have one beginning and one end.
            raise InputError(
                f"{path}, task {task}: the target must be {{sid}}, alone or with the same end in every task"
            )
    return prompts


def register_templates(task: str, fields: tuple[str, str], templates: dict[str, str]) -> None:
    """Make a task of a plugin known: what its prompt shows, what its target says, and its templates.

    Raises:
        InputError: templates that do not show and say these fields.
    """
    TASK_FIELDS[task] = fields
    try:
        _check_template(f"task {task}", task, templates)
    except InputError:
        del TASK_FIELDS[task]
        raise
    REGISTERED_TEMPLATES[task] = templates


Pieces = list[tuple[str, str | None]]


def _check_template(where: str, task: Any, template: Any) -> dict[str, Pieces]:
    """(literal text, field after it) pieces of a task's prompt and target, which must show the fields of the task."""
    if task not in TASK_FIELDS:
        raise InputError(f"{where}: unknown task; known: {', '.join(TASK_FIELDS)}")
    if not isinstance(template, dict) or set(template) != {"prompt", "target"}:
        raise InputError(f"{where}: expected the keys prompt and target")
    known = sorted({field for pair in TASK_FIELDS.values() for field in pair} | {"category"})
    pieces: dict[str, Pieces] = {}
    for part in ("prompt", "target"):
        try:
            parsed = list(Formatter().parse(template[part]))
        except (ValueError, TypeError) as error:
            raise InputError(f"{where}: {part} is no template ({error}); braces are written {{{{ and }}}}") from None
        for _, field, form, conversion in parsed:
            if field is not None and (field not in known or form or conversion):
                raise InputError(f"{where}: unknown field {{{field}}}; known: {', '.join(f'{{{k}}}' for k in known)}")
        pieces[part] = [(literal, field) for literal, field, _, _ in parsed]
    prompt_field, target_field = TASK_FIELDS[task]
    in_prompt, in_target = ({field for _, field in pieces[part] if field} for part in ("prompt", "target"))
    if in_prompt & in_target or target_field in in_prompt:
        leaked = min(in_prompt & in_target, default=target_field)
        raise InputError(f"{where}: the prompt contains its own target {{{leaked}}}")
    if in_prompt - {"category"} != {prompt_field}:
        raise InputError(f"{where}: the prompt must show {{{prompt_field}}} and may show {{category}}, nothing else")
    if in_target != {target_field}:
        raise InputError(f"{where}: the target must say {{{target_field}}} and no other field")
    return pieces


def _join_pieces(pieces: Pieces, category: str) -> str:
    """The template again, with `category` in its place."""
    text = ""
    for literal, field in pieces:
        text += literal.replace("{", "{{").replace("}", "}}")
        if field == "category":
            text += category.replace("{", "{{").replace("}", "}}")
        elif field:
            text += f"{{{field}}}"
    return text


def load_checkpoint_prompts(
    checkpoint: str | Path, override: str | None = None, category: str | None = None
) -> PromptSet:
    """The prompts a checkpoint was trained with, the `override` where one is named, else the worded set."""
    stored = Path(checkpoint) / PROMPTS_FILE
    return load_prompts(override or (stored if stored.is_file() else "worded"), category)


def find_start_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer puts before a text.

    By where it stands and not by its number: to some (OPT, BioGPT, XGLM) the start token is the end token.
    """
    alone, whole = (tokenizer("a", add_special_tokens=special).input_ids for special in (False, True))
    for start in range(len(whole) - len(alone) + 1):
        if whole[start : start + len(alone)] == alone:
            return whole[:start]
    return whole[:1] if whole[:1] == [tokenizer.bos_token_id] else []


class Encoder:
    """Turns texts into token ids the same way everywhere: start tokens of the tokenizer, prompt | target, end token.

    Texts go to the tokenizer in one batch, which a fast tokenizer spreads over the cores, and equal texts go there
    once. Targets, a closed list of short texts, are also kept from one task to the next. They are encoded where they
    stand, behind the end of their prompt: a SentencePiece tokenizer puts a blank before a text that stands alone.

    Args:
        tokenizer: of the model. prompts: the templates.
        cutoff_len: longest prompt with its target, in tokens; the oldest history is dropped until an example fits.

    Attributes:
        start: the tokens before a prompt.
        end: the tokens after a SID: what the templates put there, and the end token.
        pad_token_id: fills rows of different length where nothing reads it. The end token, as a padding token that
            was added to a tokenizer may have no row in the model.

    Raises:
        InputError: the tokenizer has no end token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompts: PromptSet, cutoff_len: int = 512):
        if tokenizer.eos_token_id is None:
            raise InputError(f"the tokenizer of {tokenizer.name_or_path} has no end-of-sequence token")
        self.tokenizer, self.prompts, self.cutoff_len = tokenizer, prompts, cutoff_len
        self._targets: dict[tuple[str, str], list[int]] = {}
        self.start = find_start_tokens(tokenizer)
        self.pad_token_id = tokenizer.eos_token_id
        self.end = [*self._encode_after_sid(prompts.after_sid), tokenizer.eos_token_id]

    def _encode_after_sid(self, text: str) -> list[int]:
        if not text:
            return []
        # Behind the end token, which is what a SID's tokens are to the tokenizer: one that it cuts texts at.
        ids = self._encode([self.tokenizer.eos_token + text])[0]
        return ids[1:] if ids[:1] == [self.tokenizer.eos_token_id] else self._encode([text])[0]

    def describe(self) -> tuple:
        """Everything that decides which tokens a text becomes, as plain values."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        words = backend.to_str() if backend else sorted(self.tokenizer.get_vocab().items())
        return (words, self.start, self.tokenizer.eos_token_id, vars(self.prompts), self.cutoff_len)

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        if not texts:
            return []
        return self.tokenizer(
            list(texts), add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False
        ).input_ids

    def prompt_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of prompts; equal texts share one list."""
        distinct = list(dict.fromkeys(texts))
        ids = {text: [*self.start, *tokens] for text, tokens in zip(distinct, self._encode(distinct), strict=True)}
        return [ids[text] for text in texts]

    def target_ids(self, task: str, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of a task's targets behind its prompts, with the end token; equal texts share one list.

        Raises:
            InputError: a target that runs together with the end of the prompt.
        """
        context = self.prompts.ending(task)
        new = [text for text in dict.fromkeys(texts) if (context, text) not in self._targets]
        before = self._encode([context])[0] if context else []
        for text, tokens in zip(new, self._encode([context + text for text in new]), strict=True):
            if tokens[: len(before)] != before:
                raise InputError(self._say_boundary(task, text))
            self._targets[context, text] = [*tokens[len(before) :], self.tokenizer.eos_token_id]
        return [self._targets[context, text] for text in texts]

    def sid_ids(self, sids: Sequence[str]) -> list[list[int]]:
        """Token ids of SIDs with their end: what the trie holds.

        Raises:
            InputError: a SID whose tokens are not single tokens of this tokenizer.
        """
        vocabulary = self.tokenizer.get_vocab()
        for sid in sids:
            unknown = [token for token in SID_TOKEN.findall(sid) if token not in vocabulary]
            if unknown:
                raise InputError(
                    f"the model's tokenizer ({self.tokenizer.name_or_path}) does not know the SID token {unknown[0]}; "
                    "was the model trained with this index?"
                )
        return [[*(vocabulary[token] for token in SID_TOKEN.findall(sid)), *self.end] for sid in sids]

    def check_boundary(self, task: str, target: str) -> None:
        """A prompt and its target must tokenise together as apart, or training and search would see other tokens.

        Raises:
            InputError: they do not.
        """
        prompt = self.prompts.prompt(task, [target])
        ids = self.target_ids(task, [target])[0]
        if self._encode([prompt + target])[0] != self._encode([prompt])[0] + ids[:-1]:
            raise InputError(self._say_boundary(task, target))
        tokens = SID_TOKEN.findall(target)
        if TASK_FIELDS[task][1] == "sid" and tokens:
            vocabulary = self.tokenizer.get_vocab()
            if all(token in vocabulary for token in tokens) and ids != self.sid_ids(["".join(tokens)])[0]:
                raise InputError(
                    f"prompt task {task}: {target!r} is not the SID's own tokens in the tokenizer of "
                    f"{self.tokenizer.name_or_path}"
                )

    @staticmethod
    def _say_boundary(task: str, target: str) -> str:
        return f"prompt task {task}: {target!r} tokenises together with the end of its prompt; end the prompt otherwise"
