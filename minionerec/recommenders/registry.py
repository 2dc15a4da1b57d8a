"""Baselines: recommenders without a language model that say how likely each item is after a history.

Fusion (`evaluate.py --fuse NAME`) adds them to a language model, rewards look at them, `sft.py --teacher NAME` lets a
model learn from them, and `baselines.py --names NAME` ranks with them. NAME may be a sum such as transitions+content;
a teacher's parts may have weights, as in transitions+content:3 (where there are validation rows, these choose them).
To add one, call `register_baseline` with a function that builds it, here or in a file of --plugin;
docs/examples/baseline.py is a whole one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from minionerec.common.files import InputError
from minionerec.common.records import Catalogue, Row
from minionerec.common.weights import parse_weighted_names
from minionerec.recommenders.content import (
    compute_item_texts,
    explain_content,
    find_similar_items,
)
from minionerec.recommenders.cooccurrence import NEAR, WIDE, Cooccurrences, CooccurrenceSettings
from minionerec.recommenders.folds import ask_unseen, leave_out_users, name_fold, part_users, read_parts
from minionerec.recommenders.likelihoods import WholeLikelihoods, add_likelihoods, are_sound
from minionerec.recommenders.transitions import (
    count_transitions,
    explain_transitions,
    leave_out_transition,
    score_transitions,
)

# Histories of item ids, oldest first -> {item id: p} of the catalogue's items; items that it leaves out have p = 0.
Likelihoods = Callable[[Sequence[Sequence[int]]], list[Mapping[int, float]]]
# Train rows -> the same after the history of each, as if that row had never been seen.
LikelihoodsWithoutRow = Callable[[Sequence[Row]], list[Mapping[int, float]]]
# A history of item ids, oldest first, and items -> why each of them is likely, in a few words, or an empty text.
Reasons = Callable[[Sequence[int], Sequence[int]], list[str]]


@dataclass(frozen=True)
class BaselineInputs:
    """What baselines are built from.

    Attributes:
        train_rows: all rows of the train split.
        catalogue: the items, with their popularity in the train rows.
        device: where networks compute.
        files: {flag: path} of the files that baselines may need.
        descriptions: {item id: text}, where they are known: then likeness looks at them too.
        transitions: {item id: {next item id: how often}} of the train rows, where these are not at hand.
    """

    train_rows: Sequence[Row]
    catalogue: Catalogue
    device: str = "cpu"
    files: dict[str, str | None] = field(default_factory=dict)
    descriptions: dict[int, str] = field(default_factory=dict)
    transitions: dict[int, dict[int, int]] | None = None

    def count_transitions(self) -> dict[int, dict[int, int]]:
        """{item id: {next item id: how often}} of the train rows."""
        return count_transitions(self.train_rows) if self.transitions is None else self.transitions


@dataclass(frozen=True)
class Baseline:
    """A kind of baseline.

    Attributes:
        build: makes it.
        file_flag: of the file that it needs.
        build_without_row: makes it so that it can leave out the row in question.
        explain: makes what says why it recommends an item.
    """

    build: Callable[[BaselineInputs], Likelihoods]
    file_flag: str = ""
    build_without_row: Callable[[BaselineInputs], LikelihoodsWithoutRow] | None = None
    explain: Callable[[BaselineInputs], Reasons] | None = None


BASELINES: dict[str, Baseline] = {}
SUM_SIGN = "+"
FOLDS = 5  # of cross-fitting


def register_baseline(
    name: str,
    build: Callable[[BaselineInputs], Likelihoods],
    file_flag: str = "",
    build_without_row: Callable[[BaselineInputs], LikelihoodsWithoutRow] | None = None,
    explain: Callable[[BaselineInputs], Reasons] | None = None,
) -> None:
    """Make a baseline known to --fuse, to --teacher and to --names of baselines.py.

    Args:
        name: of the baseline.
        build: called once with the inputs of the run; returns the function from histories of item ids, oldest first, to
            one {item id: likelihood} each. Likelihoods are 0 or more and should add up to 1.
        file_flag: the flag of the file it cannot do without: cf_path.
        build_without_row: called once like `build`; returns the function from train rows to what the baseline would say
            of each had it not seen the row. A teacher without one is built several times, without some users each.
        explain: called once like `build`; returns the function from a history and items to a reason each, such as
            "bought after X". Without one the baseline's name is the reason.

    Raises:
        InputError: a name that is taken, or one with a sign of sums.
    """
    if name in BASELINES:
        raise InputError(f"baseline {name!r} is registered already")
    if SUM_SIGN in name or ":" in name:
        raise InputError(f"baseline {name!r}: {SUM_SIGN} stands between the parts of a sum, : before their weights")
    BASELINES[name] = Baseline(build, file_flag, build_without_row, explain)


def parse_sum(name: str, flag: str = "teacher") -> tuple[list[str], list[float]]:
    """(the parts of a sum, their weights) of a name such as cooccurrence+content+gru4rec:3.

    Raises:
        InputError: a part that is no baseline or stands there twice, or a weight that is no number above 0.
    """
    weights = parse_weighted_names(flag, name.split(SUM_SIGN), BASELINES)
    return list(weights), list(weights.values())


def is_baseline(name: str) -> bool:
    """Whether `name` is registered, or is a sum of different registered baselines, without weights."""
    parts = name.split(SUM_SIGN)
    return len(set(parts)) == len(parts) and all(part in BASELINES for part in parts)


def check_baseline_files(flag: str, names: Sequence[str], files: dict[str, str | None]) -> None:
    """Every baseline must have the file that it needs, and every file a baseline that needs it.

    Args:
        flag: the flag that chose the baselines, for the errors.
        names: the chosen ones, sums among them; names that are not registered need no file.
        files: {flag: path or None}.

    Raises:
        InputError: a file that is missing or useless.
    """
    parts = [part.partition(":")[0] for name in names for part in name.split(SUM_SIGN)]
    parts = [part for part in parts if part in BASELINES]
    needed = {BASELINES[part].file_flag: part for part in parts if BASELINES[part].file_flag}
    for file_flag, name in needed.items():
        if not files.get(file_flag):
            raise InputError(f"--{flag} {name}: needs --{file_flag}")
    for file_flag, path in files.items():
        if path and file_flag not in needed:
            users = [name for name, baseline in BASELINES.items() if baseline.file_flag == file_flag]
            raise InputError(f"--{file_flag}: has an effect with --{flag} {' or '.join(users)} only")


class BuiltBaselines:
    """The baselines of a run: each is built once, when it is first asked for, whatever sums it stands in.

    Args:
        inputs: what they are built from.
        own_inputs: {baseline: what it alone is built from}, where that is something else.
    """

    def __init__(self, inputs: BaselineInputs, own_inputs: dict[str, BaselineInputs] | None = None):
        self.inputs, self._own_inputs = inputs, own_inputs or {}
        self._built: dict[str, Likelihoods] = {}

    def list_parts(self, name: str) -> list[Likelihoods]:
        """The likelihoods of every part of a sum, or of the one baseline, checked whenever they are asked for.

        Raises:
            InputError: a broken file, or one of another catalogue; later, likelihoods that are none.
        """
        names, _ = parse_sum(name)
        for part in names:
            if part not in self._built:
                predict = BASELINES[part].build(self._own_inputs.get(part, self.inputs))
                self._built[part] = _check_likelihoods(part, predict, self.inputs.catalogue)
        return [self._built[part] for part in names]

    def combine(self, name: str, weights: Sequence[float] | None = None) -> Likelihoods:
        """The likelihoods of a registered baseline or of a sum of some.

        Args:
            name: of a baseline, or of a sum such as transitions+content: see `add_likelihoods`.
            weights: of the parts of a sum; without them those of the name count, 1 each where it has none.

        Raises:
            InputError: as `list_parts` does.
        """
        parts = self.list_parts(name)
        return parts[0] if len(parts) == 1 else _add_parts(parts, weights or parse_sum(name)[1])


def build_baseline(name: str, inputs: BaselineInputs) -> Likelihoods:
    """The likelihoods of one baseline or sum, as `BuiltBaselines` gives them."""
    return BuiltBaselines(inputs).combine(name)


def build_without_row(name: str, inputs: BaselineInputs) -> LikelihoodsWithoutRow:
    """What a baseline, or a sum of some, says of train rows that it has not seen.

    A baseline that cannot leave out a single row is built FOLDS times, each time without the rows of some users, and
    each row is looked at by the one that has not seen its user (cross-fitting).

    Raises:
        InputError: a baseline that was trained before on these very rows, without others beside it that were not.
    """
    names, weights = parse_sum(name)
    parts = []
    for part in names:
        baseline = BASELINES[part]
        if baseline.build_without_row:
            parts.append(_check_likelihoods(part, baseline.build_without_row(inputs), inputs.catalogue))
        elif baseline.file_flag:
            # Built again without some users it would be the same, from the same file.
            raise InputError(f"--teacher {part}: --{baseline.file_flag} was trained on the rows that it would teach")
        else:
            parts.append(_cross_fit(part, inputs))
    return parts[0] if len(parts) == 1 else _add_parts(parts, weights)


def _add_parts(parts: Sequence[Callable], weights: Sequence[float]) -> Callable:
    """`add_likelihoods` of what the parts say, of histories or of rows."""
    return lambda asked: [
        add_likelihoods(of_parts, weights) for of_parts in zip(*(part(asked) for part in parts), strict=True)
    ]


def _check_likelihoods(name: str, predict: Callable, catalogue: Catalogue) -> Callable:
    """`predict`, of histories or of rows, whose answers are checked."""
    item_ids = frozenset(catalogue.item_ids)

    def predict_checked(asked: Sequence) -> list[dict[int, float]]:
        predictions = predict(asked)
        if len(predictions) != len(asked):
            raise InputError(f"baseline {name}: {len(predictions)} predictions for {len(asked)} histories")
        for likelihoods in predictions:
            # The items of an array are those of the catalogue; `build_sasrec` has looked.
            if not isinstance(likelihoods, WholeLikelihoods) and not item_ids.issuperset(likelihoods):
                strangers = likelihoods.keys() - item_ids
                raise InputError(f"baseline {name}: {min(strangers)} is not in the info file")
            if not are_sound(likelihoods):
                raise InputError(f"baseline {name}: the likelihoods must be finite numbers of 0 or more")
        return predictions

    return predict_checked


def _cross_fit(name: str, inputs: BaselineInputs) -> LikelihoodsWithoutRow:
    """A baseline that looks at every row with the eyes of one that has not seen the row's user."""
    parts = part_users(inputs.train_rows, FOLDS)
    predictors = []
    for users in parts:
        rows = leave_out_users(inputs.train_rows, users)
        part = replace(inputs, train_rows=rows, catalogue=inputs.catalogue.with_counts(rows))
        predictors.append(_check_likelihoods(name, BASELINES[name].build(part), inputs.catalogue))
    return ask_unseen(predictors, parts)


# -------------------------------------------------------------------------------------------------------- built-in ones
def build_transitions(inputs: BaselineInputs) -> Likelihoods:
    """Decayed transition counts of the train rows (`score_transitions`), as shares of their sum."""
    transitions, item_ids = inputs.count_transitions(), set(inputs.catalogue.item_ids)
    return lambda histories: [
        _compute_shares(score_transitions(history, transitions), item_ids) for history in histories
    ]


def build_transitions_without_row(inputs: BaselineInputs) -> LikelihoodsWithoutRow:
    """The same for train rows, each without its own transition."""
    transitions, item_ids = inputs.count_transitions(), set(inputs.catalogue.item_ids)
    return lambda rows: [
        _compute_shares(
            leave_out_transition(score_transitions(row.history_ids, transitions), row.history_ids, row.item_id),
            item_ids,
        )
        for row in rows
    ]


def _compute_shares(scores: dict[int, float], item_ids: set[int]) -> dict[int, float]:
    kept = {item: score for item, score in scores.items() if item in item_ids}
    total = sum(kept.values())
    return {item: score / total for item, score in kept.items()}


def _register_cooccurrence(name: str, settings: CooccurrenceSettings) -> None:
    def count(inputs: BaselineInputs) -> Cooccurrences:
        return Cooccurrences(inputs.train_rows, inputs.catalogue, settings)

    register_baseline(
        name,
        lambda inputs: count(inputs).predict,
        build_without_row=lambda inputs: count(inputs).predict_without_row,
        explain=lambda inputs: count(inputs).explain,
    )


def build_content(catalogue: Catalogue, descriptions: dict[int, str] | None = None) -> Likelihoods:
    """Likeness of titles, and of descriptions where there are some, to those of the history: `find_similar_items`."""
    texts = compute_item_texts(catalogue.titles, [(descriptions or {}).get(item, "") for item in catalogue.item_ids])
    number_of = {item: number for number, item in enumerate(catalogue.item_ids)}

    def predict(histories: Sequence[Sequence[int]]) -> list[dict[int, float]]:
        numbers, probabilities = find_similar_items(
            texts, [[number_of[item] for item in history] for history in histories]
        )
        pairs = zip(numbers.tolist(), probabilities.tolist(), strict=True)
        return [{catalogue.item_ids[number]: p for number, p in zip(*pair, strict=True) if p > 0} for pair in pairs]

    return predict


def build_content_without_row(
    catalogue: Catalogue, descriptions: dict[int, str] | None = None
) -> LikelihoodsWithoutRow:
    """The same of rows: texts do not know who has bought what."""
    predict = build_content(catalogue, descriptions)
    return lambda rows: predict([row.history_ids for row in rows])


def build_sasrec(catalogue: Catalogue, cf_path: str, device: str = "cpu", model: str | None = None) -> Likelihoods:
    """The network in a model folder of sasrec.py: SASRec or GRU4Rec.

    Args:
        catalogue: the items.
        cf_path: the folder.
        device: where it computes.
        model: the kind that is expected, if it matters.

    Raises:
        InputError: no such folder, a network of another catalogue or of another kind.
    """
    from minionerec.recommenders.networks import load_network  # only here: the others need no torch

    network = load_network(cf_path).to(device)
    if model and network.settings["model"] != model:
        raise InputError(f"--cf_path {cf_path}: holds {network.settings['model']}, not {model}")
    if set(network.item_ids) != set(catalogue.item_ids):
        raise InputError(f"--cf_path {cf_path}: its items are not those of the info file")

    def predict(histories: Sequence[Sequence[int]]) -> list[Mapping[int, float]]:
        probabilities = network.score_histories(histories).exp().cpu().numpy()
        return [WholeLikelihoods(network.item_ids, network.column_of, row) for row in probabilities]

    return predict


def build_network_without_row(inputs: BaselineInputs, name: str, model: str | None = None) -> LikelihoodsWithoutRow:
    """Of train rows, the networks that `sasrec.py --folds N` trained beside --cf_path: each has not seen some users.

    Args:
        inputs: with cf_path among the files.
        name: of the baseline, for errors.
        model: the kind that is expected, if it matters.

    Raises:
        InputError: there are none, or they are of another catalogue or kind.
    """
    cf_path = inputs.files["cf_path"]
    parts = read_parts(cf_path, name)
    folders = [str(name_fold(Path(cf_path).parent, fold) / "model") for fold in range(len(parts))]
    predictors = [build_sasrec(inputs.catalogue, folder, inputs.device, model) for folder in folders]
    return ask_unseen(predictors, parts)


register_baseline(
    "transitions",
    build_transitions,
    build_without_row=build_transitions_without_row,
    explain=lambda inputs: explain_transitions(inputs.count_transitions(), inputs.catalogue),
)
_register_cooccurrence("cooccurrence", NEAR)
_register_cooccurrence("cooccurrence_wide", WIDE)
register_baseline(
    "content",
    lambda inputs: build_content(inputs.catalogue, inputs.descriptions),
    build_without_row=lambda inputs: build_content_without_row(inputs.catalogue, inputs.descriptions),
    explain=lambda inputs: explain_content(inputs.catalogue, inputs.descriptions),
)


def _register_network(name: str) -> None:
    model = name if name == "gru4rec" else None  # sasrec stands for either
    register_baseline(
        name,
        lambda inputs: build_sasrec(inputs.catalogue, inputs.files["cf_path"], inputs.device, model),
        "cf_path",
        build_without_row=lambda inputs: build_network_without_row(inputs, name, model),
    )


_register_network("sasrec")
_register_network("gru4rec")
