"""The flags of evaluate.py and recommend.py."""

from __future__ import annotations

from dataclasses import dataclass

from minionerec.common.cli import Flags, flag
from minionerec.common.settings import CatalogueFlags, PromptFlags, SeedFlags, StageFlags, StreamFlags
from minionerec.engines.settings import VllmFlags
from minionerec.recommenders.settings import BaselineFlags, SeenFlags


@dataclass
class PrecisionFlags(Flags):
    """Precision."""

    dtype: str | None = flag(
        None,
        "precision of the weights in the search; scores are summed in float32. auto is bfloat16 where the device has "
        "instructions for it and the model is so large that they pay (docs/decoding_and_evaluation.md), else float32",
        choices=("float32", "bfloat16", "auto"),
        default_text="bfloat16 on a GPU, float32 on a CPU",
    )


@dataclass
class SearchFlags(SeenFlags, PrecisionFlags):
    """Search."""

    batch_size: int | None = flag(
        None,
        "prompts of a forward pass of one process",
        default_text="what fits into the free memory, at most 32 on a CPU",
    )
    num_beams: int = flag(50, "beams of the search")
    K: int | None = flag(
        None, "length of the lists, at most --num_beams", default_text="50, or --num_beams if that is less"
    )
    length_penalty: float = flag(
        0.0, "exponent of the length that divides the score of a SID; 0 leaves the log-probability itself"
    )
    renormalize: bool = flag(False, "score with probabilities over the legal tokens, not over the whole vocabulary")
    only_items: str | None = flag(
        None, "a file with an item id a line, such as those of a category; the search finds no others"
    )
    engine: str = flag(
        "tree",
        "tree is the project's search; vllm is the same over vLLM, for models that one GPU cannot hold; hf is the same "
        "by Hugging Face generate, slow, for comparison",
        choices=("tree", "vllm", "hf"),
    )


@dataclass
class FuseFlags(BaselineFlags):
    """Fusion with baselines."""

    fuse: str | None = flag(
        None,
        "baselines whose likelihoods are added, such as transitions,content: transitions, cooccurrence, "
        "cooccurrence_wide, content (likeness of texts), sasrec, gru4rec, sums such as transitions+content, those that "
        "a plugin registers; in evaluate.py also a predictions file of the same rows with log-probabilities",
    )
    fuse_weight: list[float] | None = flag(
        None,
        "weights of the baselines, in their order; one more before them is that of the model",
        default_text="chosen on --fuse_valid_file",
    )


@dataclass
class FusionFlags(FuseFlags):
    """Choice of the weights."""

    fuse_valid_file: str | None = flag(
        None,
        "CSV of the validation split: the weights with the best HR@10 + NDCG@10 are taken, from 0, .01, .03, .1, .3, 1 "
        "and 3 for every baseline and the model. The fused lists are over items and go to NAME.fused.json",
    )
    fuse_valid_sample: int = flag(-1, "choose the weights on that many random rows; -1 is all")


@dataclass
class FolderCatalogueFlags(CatalogueFlags):
    """Catalogue."""

    info_file: str | None = flag(
        None,
        "the catalogue: sid<TAB>title<TAB>item_id, one item a line",
        default_text="the one that the model folder carries",
    )


@dataclass
class PublishedEvaluateFlags(Flags):
    """Accepted for the published command line."""

    max_new_tokens: int | None = flag(None, no_effect="the catalogue decides how long a SID is")
    temperature: float | None = flag(None, no_effect="beam search has no temperature")
    guidance_scale: float | None = flag(None, no_effect="the search is not guided")


@dataclass
class EvaluateFlags(
    SearchFlags,
    VllmFlags,
    FusionFlags,
    FolderCatalogueFlags,
    PromptFlags,
    StreamFlags,
    SeedFlags,
    StageFlags,
    PublishedEvaluateFlags,
):
    """Model and data."""

    base_model: str = flag(help="checkpoint of sft.py or rl.py", aliases=("model",))
    train_file: str | None = flag(
        None,
        "CSV of the train split. Its target counts order the items that share a SID, which are ordered by id without "
        "it, and split the metrics by popularity of the target",
    )
    test_data_path: str = flag(help="the split whose rows are ranked: a CSV, .jsonl or .parquet")
    result_json_data: str = flag(
        help="the predictions, NAME.json; metrics and plots are written beside it as NAME.metrics.json and NAME.png. "
        "Until then NAME.partial/ holds the finished rows, so that the same command after a kill does the others only"
    )
    sample: int = flag(-1, "evaluate that many random rows, for a quick look; -1 is all")


@dataclass
class RecommendFlags(FuseFlags, FolderCatalogueFlags, PromptFlags, PrecisionFlags, VllmFlags, StageFlags):
    """Model, history and list."""

    base_model: str = flag(help="final_checkpoint of sft.py or rl.py", aliases=("model",))
    history_file: str | None = flag(None, "CSV split in which --user_id is looked up")
    user_id: str | None = flag(
        None, "a user of --history_file; the history is that of the user's last row, and that row's target"
    )
    titles: str | None = flag(
        None,
        'the history, oldest first: "first; second" or a JSON list, in any case. A part of a title is enough where no '
        "other title has it, and a SID or an item id may stand for a title",
    )
    interactive: bool = flag(False, "read lines such as those of --titles from the standard input until an empty one")
    input: str | None = flag(
        None,
        "a file of users, *.csv, *.jsonl or *.parquet, with a column of titles, SIDs or item ids and maybe one of "
        "users; several processes share it, and a run that was cut off goes on",
    )
    output: str | None = flag(
        None,
        "the recommendations for --input, *.csv, *.jsonl or *.parquet; users that cannot be read stand, with the "
        "reason, in OUTPUT.skipped.jsonl",
    )
    history_column: str | None = flag(
        None,
        "column of the histories in --input",
        default_text="history, history_item_id, history_item_sid or history_item_title, the first that is there",
    )
    user_column: str | None = flag(
        None,
        "column of the users in --input",
        default_text="user_id; without it users are called by their row numbers",
    )
    top: int = flag(10, "recommendations for a user, at most --num_beams", aliases=("K",))
    num_beams: int = flag(50, "beams of the search")
    engine: str = flag(
        "tree", "tree is the project's search; vllm is the same search over vLLM", choices=("tree", "vllm")
    )
    max_history: int = flag(10, "newest items of a history that the model is shown, as in its training data; 0 is all")
    exclude_seen: bool = flag(False, "leave out the items of the history")
    categories: str | None = flag(
        None,
        'recommend only items of these categories, such as "Drills; Power tools": parts of the category texts that the '
        "model folder carries, in any case",
    )
    train_file: str | None = flag(
        None,
        "CSV of the train split, which baselines are built from; of items that share a SID, the more frequent target "
        "is shown first",
        default_text="the counts of the model folder",
    )
    fused_metrics: str | None = flag(
        None, "NAME.fused.metrics.json of evaluate.py: its baselines and weights, instead of --fuse and --fuse_weight"
    )
    explained_sids: str | None = flag(
        None, "NAME.index.explained.json of rq.explain: what the codes of a recommended SID stand for is shown too"
    )
