"""Baselines beside the model of a recommender: their flags, how they are built, and what they say of a history."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from minionerec.common.files import InputError, read_json
from minionerec.common.model_folder import ModelCatalogue
from minionerec.common.records import Row
from minionerec.evaluation.fusion import (
    Explainer,
    check_fuse_names,
    name_terms,
    read_baseline_inputs,
    resolve_weights,
)
from minionerec.evaluation.settings import RecommendFlags
from minionerec.recommenders.registry import BuiltBaselines, Likelihoods


@dataclass
class FusedBaselines:
    """Baselines beside the model of a recommender.

    Attributes:
        likelihoods: of each, in the order of their weights.
        weights: of the model and the baselines.
        explainer: of the fused lists.
    """

    likelihoods: list[Likelihoods]
    weights: list[float]
    explainer: Explainer

    def predict(
        self, histories: Sequence[Sequence[int]], is_allowed: Sequence[Callable[[int], bool]]
    ) -> list[Callable[[Sequence[int]], list[dict[int, float]]]]:
        """What `CandidateScorer` asks for: per baseline, the likelihoods of the allowed items after some histories.

        Args:
            histories: item ids, oldest first.
            is_allowed: of each history, whether an item may be recommended.
        """

        def select(predict: Likelihoods) -> Callable[[Sequence[int]], list[dict[int, float]]]:
            def predict_rows(rows: Sequence[int]) -> list[dict[int, float]]:
                found = predict([histories[row] for row in rows])
                return [
                    {item: p for item, p in likelihoods.items() if is_allowed[row](item)}
                    for row, likelihoods in zip(rows, found, strict=True)
                ]

            return predict_rows

        return [select(predict) for predict in self.likelihoods]


def read_fused_metrics(flags: RecommendFlags) -> RecommendFlags:
    """The flags with the baselines and weights of --fused_metrics, where it is given.

    Raises:
        InputError: no file of a fusion.
    """
    if flags.fused_metrics is None:
        return flags
    if flags.fuse or flags.fuse_weight:
        raise InputError("--fused_metrics: names baselines and weights, so it goes without --fuse and --fuse_weight")
    content = read_json(flags.fused_metrics, "fused_metrics")
    weights = content.get("weights") if isinstance(content, dict) else None
    if not isinstance(weights, dict) or not isinstance(content.get("fuse"), str):
        raise InputError(f"--fused_metrics {flags.fused_metrics}: expected NAME.fused.metrics.json of evaluate.py")
    return replace(flags, fuse=content["fuse"], fuse_weight=list(weights.values()))


def check_recommended_fusion(flags: RecommendFlags, has_transitions: bool) -> None:
    """The flags of the fusion must fit each other. Plugins are loaded before.

    Args:
        flags: of the command.
        has_transitions: the model folder knows the train rows' transitions, so that no train file is needed.

    Raises:
        InputError: the first that does not.
    """
    if flags.fuse is None:
        for name in ("fuse_weight", "cf_path", "item_meta_path"):
            if getattr(flags, name) is not None:
                raise InputError(f"--{name}: has an effect with --fuse or --fused_metrics only")
        return
    if flags.engine == "vllm":
        raise InputError("--engine vllm: has no --fuse, which scores items that the search did not find")
    if flags.fuse_weight is None:
        raise InputError("--fuse: needs --fuse_weight, or --fused_metrics instead of both")
    check_fuse_names(flags, bool(flags.train_file) or has_transitions, files=False)


def build_fused(flags: RecommendFlags, known: ModelCatalogue, train_rows: Sequence[Row] = ()) -> FusedBaselines | None:
    """The baselines of --fuse, from the train rows where there are some, else from what the model folder knows.

    Returns:
        None without --fuse.
    """
    if flags.fuse is None:
        return None
    inputs = read_baseline_inputs(flags, flags.info_file or flags.base_model, known.catalogue, train_rows)
    if not train_rows:
        inputs = replace(inputs, transitions=known.transitions)
    if not flags.item_meta_path:
        inputs = replace(inputs, descriptions=known.descriptions)
    built = BuiltBaselines(inputs)
    weights, names = resolve_weights(flags), name_terms(flags.fuse)
    return FusedBaselines([built.combine(name) for name in names[1:]], weights, Explainer(built, names, weights))


def read_prefix_words(path: str) -> dict[str, list[str]]:
    """{prefix of a SID: its most telling words} of a file of rq.explain.

    Raises:
        InputError: not such a file.
    """
    content = read_json(path, "explained_sids")
    prefixes = content.get("prefixes") if isinstance(content, dict) else None
    if not isinstance(prefixes, list) or not all(
        isinstance(p, dict) and {"prefix", "words"} <= p.keys() for p in prefixes
    ):
        raise InputError(f"--explained_sids {path}: expected NAME.index.explained.json of rq.explain")
    return {prefix["prefix"]: list(map(str, prefix["words"])) for prefix in prefixes}
