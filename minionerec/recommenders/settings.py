"""The flags of baselines.py and sasrec.py."""

from __future__ import annotations

from dataclasses import dataclass

from minionerec.common.cli import Flags, flag
from minionerec.common.settings import CatalogueFlags, LoggingFlags, PluginFlags, SeedFlags, StageFlags

COUNTING_BASELINES = ("popularity", "transitions", "repeat_last")
CATALOGUE_LOSS = "the loss is a cross-entropy over all items of the catalogue"


@dataclass
class SeenFlags(Flags):
    """Items of the history."""

    exclude_seen: bool = flag(False, "lists leave out what is in the row's history")
    repeat_newest: int = flag(
        0, "with --exclude_seen, so many of the newest items of the history may be found all the same"
    )


@dataclass
class BaselineFlags(PluginFlags):
    """Registered baselines."""

    cf_path: str | None = flag(None, "model folder of sasrec.py, for the baseline sasrec or gru4rec")
    item_meta_path: str | None = flag(
        None,
        "NAME.item.json: the baseline content then looks at descriptions too",
        default_text="content looks at titles alone",
    )


@dataclass
class BaselinesFlags(SeenFlags, BaselineFlags, CatalogueFlags, SeedFlags, StageFlags):
    """Data and lists."""

    train_file: str = flag(help="CSV of the train split, which the baselines are built from")
    valid_file: str | None = flag(
        None,
        "CSV of the validation split, on which the weights of sums and the epochs of networks are chosen",
        default_text="all weights are 1, and no network is trained",
    )
    test_data_path: str = flag(help="CSV of the split whose rows are ranked")
    output_dir: str = flag(help="NAME.json and NAME.metrics.json of every baseline are written there")
    names: list[str] = flag(
        [*COUNTING_BASELINES, "content", "transitions+content"],
        "the baselines to rank: popularity, transitions, repeat_last, cooccurrence, cooccurrence_wide, content, those "
        "of a plugin, sums such as transitions+content, or the networks sasrec and gru4rec, trained with cross-entropy "
        "over all items into OUTPUT_DIR/NAME/model where no --cf_path is given",
    )
    K: int = flag(50, "length of the recommendation lists")


@dataclass
class PublishedSASRecFlags(Flags):
    """Accepted for the published command line."""

    data: str | None = flag(None, no_effect="the files of a dataset are given one by one, such as --train_file")
    num_filters: int | None = flag(None, no_effect="it belongs to Caser, which is not here")
    filter_sizes: str | None = flag(None, no_effect="it belongs to Caser, which is not here")
    r_click: float | None = flag(None, no_effect="rows have one kind of interaction")
    r_buy: float | None = flag(None, no_effect="rows have one kind of interaction")
    alpha: float | None = flag(None, no_effect=CATALOGUE_LOSS)
    beta: float | None = flag(None, no_effect=CATALOGUE_LOSS)
    loss_type: str | None = flag(None, no_effect=CATALOGUE_LOSS)
    save_flag: int | None = flag(None, no_effect="the best epoch is always saved, to OUTPUT_DIR/model")
    cuda: int | None = flag(None, no_effect="the accelerator is used where there is one; CUDA_VISIBLE_DEVICES picks it")
    eval_num: int | None = flag(None, no_effect="every epoch is measured on the validation rows")
    result_json_path: str | None = flag(None, no_effect="results are written to OUTPUT_DIR/test.metrics.json")
    sample_num: int | None = flag(None, no_effect="all rows are used")
    descri: str | None = flag(None, no_effect="a run is told by its --output_dir")
    debug: bool | None = flag(None, no_effect="there is no shortened run")


@dataclass
class SASRecFlags(SeenFlags, CatalogueFlags, LoggingFlags, SeedFlags, StageFlags, PublishedSASRecFlags):
    """Data, network and training."""

    train_file: str = flag(help="CSV of the train split")
    valid_file: str = flag(help="CSV of the validation split, on which the epoch is chosen")
    test_data_path: str = flag(help="CSV of the test split")
    output_dir: str = flag(help="model/, test.json, test.metrics.json and epochs.json are written there")
    model: str = flag(
        "sasrec",
        "the network; SASRec and GRU are other spellings",
        choices=("sasrec", "gru4rec", "SASRec", "GRU"),
    )
    hidden_size: int = flag(64, "width of the network and of the item embeddings", aliases=("hidden_factor",))
    num_layers: int | None = flag(None, "layers of the network", default_text="2 for sasrec, 1 for gru4rec")
    num_heads: int = flag(2, "attention heads of sasrec")
    dropout: float = flag(0.5, "dropout on the item embeddings and inside the network", aliases=("dropout_rate",))
    max_history: int = flag(10, "newest items of a history that the network sees")
    item_init: str | None = flag(
        None,
        "embeddings (.npy of text2emb or rq.behaviour) at which the network's item embeddings begin",
        default_text="they begin at random",
    )
    learning_rate: float = flag(3e-3, "learning rate of AdamW", aliases=("lr",))
    weight_decay: float | None = flag(
        None, "weight decay of AdamW", default_text="0.1 for sasrec, 0 for gru4rec", aliases=("l2_decay",)
    )
    batch_size: int = flag(128, "train rows of a step, about")
    num_epochs: int = flag(60, "epochs, at most", aliases=("epoch",))
    patience: int = flag(
        8,
        "stop after so many epochs without a better validation NDCG@10; sasrec may stand still at the popularity "
        "ranking for the first few",
        aliases=("early_stop",),
    )
    folds: int = flag(
        0,
        "so many more networks, each trained without one part of the users, into OUTPUT_DIR/folds: as a --teacher of "
        "sft.py the network that has not seen a train row's user says what should come next",
    )
    K: int = flag(50, "length of the recommendation lists")
