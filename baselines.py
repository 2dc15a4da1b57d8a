r"""Baselines without a language model: popularity, transitions, the user's last items again, likeness of texts, sums,
SASRec and GRU4Rec.

    python baselines.py --train_file ... --valid_file ... --test_data_path ... --info_file ... \
        --output_dir output/baselines

A sum such as transitions+content adds likelihoods, each divided by its sum; --valid_file chooses their weights.
"""

from __future__ import annotations

from minionerec.common.cli import parse_flags, run_command
from minionerec.recommenders.settings import COUNTING_BASELINES, BaselinesFlags, SASRecFlags

if __name__ == "__main__":
    # Before the imports below, which take seconds: --help and a wrong flag answer at once.
    FLAGS = parse_flags(BaselinesFlags)

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from minionerec.common.files import InputError, write_json
from minionerec.common.items import read_descriptions
from minionerec.common.plugins import load_plugins
from minionerec.common.processes import say
from minionerec.common.records import Row, check_rows, read_info, read_rows
from minionerec.common.stage import Stage, open_stage
from minionerec.evaluation.metrics import format_metrics
from minionerec.evaluation.predictions import RankedItems, write_item_predictions
from minionerec.evaluation.seen_items import check_seen_flags, extend_length, leave_out, list_excluded
from minionerec.recommenders.likeliest import rank_by_likelihood
from minionerec.recommenders.registry import (
    BASELINES,
    SUM_SIGN,
    BaselineInputs,
    BuiltBaselines,
    check_baseline_files,
    is_baseline,
)
from minionerec.recommenders.sum_weights import choose_descriptions, choose_sum_weights
from minionerec.recommenders.transitions import (
    count_transitions,
    rank_by_repeating,
    rank_by_transitions,
    score_transitions,
    sort_by_popularity,
)

NETWORKS = ("sasrec", "gru4rec")


def check_baselines_flags(flags: BaselinesFlags) -> None:
    """The baselines must exist, once each, and have the files they need.

    Raises:
        InputError: they do not.
    """
    names = list(dict.fromkeys((*COUNTING_BASELINES, *BASELINES)))
    if flags.K < 1:
        raise InputError(f"--K {flags.K}: expected 1 or more")
    check_seen_flags(flags)
    for name in flags.names:
        if name not in names and not is_baseline(name):
            expected = f"some of {', '.join(names)}, or a sum such as transitions+content"
            raise InputError(f"--names {name}: expected {expected}")
        if flags.names.count(name) > 1:
            raise InputError(f"--names: {name} is given twice")
    if not flags.names:
        raise InputError(f"--names: expected some of {', '.join(names)}")
    networks = list_networks(flags.names)
    if flags.cf_path and len(networks) > 1:
        raise InputError(f"--cf_path: holds one network, and --names has {' and '.join(networks)}")
    if networks and not flags.cf_path and not flags.valid_file:
        raise InputError(f"--names {networks[0]}: needs --valid_file to be trained, or --cf_path")
    trained = [] if flags.cf_path else networks
    others = [part for name in flags.names for part in name.split(SUM_SIGN) if part not in trained]
    check_baseline_files("names", others, {"cf_path": flags.cf_path})
    for name in ("test_data_path", "train_file"):
        path = getattr(flags, name)
        if flags.valid_file and Path(flags.valid_file).resolve() == Path(path).resolve():
            raise InputError(f"--valid_file {path}: is --{name}; choose weights on the validation split")


def list_networks(names: Sequence[str]) -> list[str]:
    """Those of NETWORKS that stand among the names or in their sums."""
    parts = {part for name in names for part in name.split(SUM_SIGN)}
    return [name for name in NETWORKS if name in parts]


def train_networks(
    flags: BaselinesFlags, inputs: BaselineInputs, valid_rows: list[Row], stage: Stage
) -> dict[str, BaselineInputs]:
    """{network: inputs with its model folder} of the networks that are trained here, as sasrec.py would by default."""
    networks = [] if flags.cf_path else list_networks(flags.names)
    if not networks:
        return {}
    # Only here: the other baselines need no torch.
    from minionerec.evaluation.network_runs import resolve_sasrec_flags, train_on_rows
    from minionerec.recommenders.networks import save_network

    own_inputs = {}
    for name in networks:
        folder = Path(flags.output_dir) / name
        files = {key: getattr(flags, key) for key in ("train_file", "valid_file", "test_data_path", "info_file")}
        own = resolve_sasrec_flags(SASRecFlags(**files, output_dir=str(folder), model=name, seed=flags.seed))
        folder.mkdir(parents=True, exist_ok=True)
        network, _ = train_on_rows(
            own, inputs.catalogue, inputs.train_rows, valid_rows, stage.tick, resuming=stage.resuming
        )
        save_network(network, folder / "model")
        own_inputs[name] = replace(inputs, files={"cf_path": str(folder / "model")})
    return own_inputs


def add_descriptions(inputs: BaselineInputs, flags: BaselinesFlags, valid_rows: list[Row]) -> BaselineInputs:
    """The inputs with the descriptions of --item_meta_path, unless validation rows say that titles alone do better."""
    if not flags.item_meta_path or not any("content" in name.split(SUM_SIGN) for name in flags.names):
        return inputs
    descriptions = read_descriptions(flags.item_meta_path, inputs.catalogue.item_ids, flags.info_file)
    inputs = replace(inputs, descriptions=descriptions)
    if valid_rows:
        excluded = list_excluded(flags, valid_rows, inputs.catalogue)
        inputs, tried = choose_descriptions(inputs, valid_rows, excluded)
        say(f"[baselines] content: HR@10 + NDCG@10 on {len(valid_rows):,} validation rows by texts: {tried}")
    return inputs


def choose_weights_of_sums(
    flags: BaselinesFlags, built: BuiltBaselines, rows: list[Row]
) -> dict[str, list[float] | None]:
    """{baseline: weights of its parts}, None where it has no parts or there are no validation rows."""
    weights: dict[str, list[float] | None] = dict.fromkeys(flags.names)
    excluded = list_excluded(flags, rows, built.inputs.catalogue)
    for name in flags.names:
        if SUM_SIGN in name and rows:
            weights[name], tried = choose_sum_weights(name, built, rows, excluded)
            say(f"[baselines] {name}: HR@10 + NDCG@10 on {len(rows):,} validation rows by weights: {tried}")
    return weights


def rank_by_baseline(
    name: str, built: BuiltBaselines, rows: list[Row], k: int, weights: list[float] | None = None
) -> tuple[list[list[int]], list[list[float]] | None]:
    """(the k best items of a baseline for every row, best first; their scores, where it has any)."""
    inputs = built.inputs
    by_popularity = sort_by_popularity(inputs.catalogue)
    if name == "popularity":
        return [by_popularity[:k]] * len(rows), None
    if name == "repeat_last":
        return [rank_by_repeating(row.history_ids, by_popularity, k) for row in rows], None
    if name == "transitions":
        transitions = count_transitions(inputs.train_rows)
        rankings = [rank_by_transitions(row.history_ids, transitions, by_popularity, k) for row in rows]
        scores = [score_transitions(row.history_ids, transitions) for row in rows]
        pairs = zip(rankings, scores, strict=True)
        return rankings, [[of_item.get(item, 0.0) for item in ranked] for ranked, of_item in pairs]
    histories = [row.history_ids for row in rows]
    return rank_by_likelihood(built.combine(name, weights), histories, inputs.catalogue, k)


def baselines(flags: BaselinesFlags) -> None:
    """Rank the test split by every baseline; writes predictions and metrics of each."""
    load_plugins(flags.plugin)
    check_baselines_flags(flags)
    output = Path(flags.output_dir)
    metrics_files = {name: output / f"{name}.metrics.json" for name in flags.names}
    inputs = [flags.train_file, flags.test_data_path, flags.info_file, flags.cf_path, *(flags.plugin or ())]
    inputs += [flags.valid_file, flags.item_meta_path]
    stage = open_stage("baselines", flags, inputs, metrics_files.values(), output / "baselines.stage.json")
    if stage.finished:
        return
    catalogue = read_info(flags.info_file, flags.shared_sids)
    train_rows = read_rows(flags.train_file, "train_file")
    test_rows = read_rows(flags.test_data_path, "test_data_path")
    catalogue = catalogue.with_counts(train_rows)
    check_rows(test_rows, catalogue, flags.test_data_path, flags.info_file)
    valid_rows = read_rows(flags.valid_file, "valid_file") if flags.valid_file else []
    check_rows(valid_rows, catalogue, flags.valid_file or "", flags.info_file)
    baseline_inputs = BaselineInputs(train_rows, catalogue, files={"cf_path": flags.cf_path})
    baseline_inputs = add_descriptions(baseline_inputs, flags, valid_rows)
    built = BuiltBaselines(baseline_inputs, train_networks(flags, baseline_inputs, valid_rows, stage))
    weights = choose_weights_of_sums(flags, built, valid_rows)
    excluded, results = list_excluded(flags, test_rows, catalogue), {}
    for name, metrics_file in metrics_files.items():
        whole = rank_by_baseline(name, built, test_rows, extend_length(flags.K, excluded), weights[name])
        rankings, scores = leave_out(*whole, excluded, flags.K)
        ranked = map(RankedItems, rankings, scores or [None] * len(rankings))
        results[name] = write_item_predictions(output / f"{name}.json", test_rows, ranked, catalogue, flags.K)
        chosen = {"weights": dict(zip(name.split(SUM_SIGN), weights[name], strict=True))} if weights[name] else {}
        write_json(metrics_file, {**results[name], **chosen})
    say(format_metrics(results))
    stage.done(**{name: f"HR@10 {result['item'].get('HR@10')}" for name, result in results.items()})


if __name__ == "__main__":
    run_command(baselines, FLAGS)
