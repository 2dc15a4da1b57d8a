"""README.md of a model folder: a Hugging Face model card that says what the model is, how good, and how it was made."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from safetensors import safe_open

from minionerec.common.files import InputError, write_text
from minionerec.common.model_folder import ModelCatalogue

CARD_FILE = "README.md"
TEMPLATE = Path(__file__).with_name("model_card.md.jinja")
TASK_TYPE = "sequential-recommendation"
RESULTS = re.compile(r"(?<=\n## Results\n\n).*?(?=\n\n## )", re.DOTALL)
NO_RESULTS = (
    "Not measured yet: `python -m scripts.model_card --model FOLDER --metrics TEST.metrics.json` fills this in."
)


def write_model_card(
    folder: Path,
    *,
    stage: str,
    settings: Mapping[str, Any],
    known: ModelCatalogue,
    validation: Mapping[str, float],
    note: str = "",
) -> None:
    """Write the card of a folder that is being made.

    Args:
        folder: of the model.
        stage: what trained it, in words.
        settings: {flag: value} of its command.
        known: the catalogue that the folder carries.
        validation: {metric: value} on the validation rows, at SID level.
        note: what else a reader must know, such as that training changed nothing.
    """
    rows = sum(known.catalogue.counts.values())
    base = str(settings.get("base_model") or settings.get("model_path") or "")
    on_hub = bool(re.fullmatch(r"[\w.-]+/[\w.-]+", base)) and not Path(base).exists()
    name = str(settings.get("category") or Path(str(settings.get("train_file", ""))).stem or "model")
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["recommendation", "generative-recommendation", "semantic-ids", "minionerec"],
        base_model=base if on_hub else None,
        model_name=name,
        eval_results=_make_results(name, "validation", validation) or None,
    )
    card = ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        name=name,
        items=f"{len(known.catalogue.item_ids):,}",
        cold_items=f"{sum(not known.catalogue.counts.get(item) for item in known.catalogue.item_ids):,}",
        first_title=known.catalogue.titles[0].replace('"', "'"),
        results=_draw_table(data.eval_results or []),
        train_file=Path(str(settings.get("train_file", ""))).name,
        rows=f"{rows:,}",
        max_history=known.max_history,
        stage=stage,
        parameters=f"{count_saved_parameters(folder):,}",
        note=note,
        settings=yaml.safe_dump(dict(settings), sort_keys=False, allow_unicode=True).strip(),
    )
    write_text(folder / CARD_FILE, str(card))


def count_saved_parameters(folder: Path) -> int:
    """Parameters in the weight files of a model folder; weights that are shared stand there once."""
    count = 0
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            count += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())
    return count


def add_results(folder: str | Path, split: str, metrics: Mapping[str, float]) -> None:
    """Put the figures of a split into the card of a model folder; earlier ones of the same split go.

    Raises:
        InputError: the folder has no card, or one without the section for results.
    """
    path = Path(folder) / CARD_FILE
    if not path.is_file():
        raise InputError(f"--model {folder}: has no {CARD_FILE}; sft.py and rl.py write it")
    card = ModelCard.load(path)
    if not RESULTS.search(str(card)):
        raise InputError(f"{path}: has no section '## Results' as sft.py and rl.py write it")
    name = card.data.model_name or Path(folder).name
    kept = [result for result in card.data.eval_results or [] if result.dataset_split != split]
    card.data.model_name = name
    card.data.eval_results = [*kept, *_make_results(name, split, metrics)]
    card.text = RESULTS.sub(lambda _: _draw_table(card.data.eval_results), card.text)
    write_text(path, str(card))


def _make_results(dataset: str, split: str, metrics: Mapping[str, float]) -> list[EvalResult]:
    return [
        EvalResult(
            task_type=TASK_TYPE,
            task_name="Sequential recommendation",
            dataset_type=re.sub(r"\W+", "-", dataset).strip("-").lower() or "dataset",
            dataset_name=dataset,
            dataset_split=split,
            metric_type=name.lower(),
            metric_name=name,
            metric_value=round(value, 6),
        )
        for name, value in metrics.items()
    ]


def _draw_table(results: Sequence[EvalResult]) -> str:
    if not results:
        return NO_RESULTS
    splits = list(dict.fromkeys(result.dataset_split for result in results))
    names = list(dict.fromkeys(result.metric_name for result in results))
    values = {(result.dataset_split, result.metric_name): f"{result.metric_value:.4f}" for result in results}
    lines = [f"| | {' | '.join(names)} |", f"|---|{'---|' * len(names)}"]
    for split in splits:
        lines.append(f"| {split} | {' | '.join(values.get((split, name), '') for name in names)} |")
    return "\n".join(lines)
