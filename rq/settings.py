"""Flags of the commands that make semantic IDs, in the groups that they share. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass

from minionerec.common.cli import flag
from minionerec.common.settings import LoggingFlags, SeedFlags, StageFlags

HIDDEN_WIDTHS = [2048, 1024, 512, 256, 128, 64]
STEP_NAMES = ("none", "sinkhorn", "nearest_free", "extra_token", "own_token")
NO_WORKERS = "the embeddings are held in memory as one tensor"


@dataclass
class DeviceFlags:
    """Device."""

    device: str | None = flag(None, "such as cuda:0 or cpu", default_text="cuda where there is one, else cpu")


@dataclass
class EmbeddingFlags:
    """Embeddings."""

    data_path: str = flag(help="DIR/NAME.emb-PLM-td.npy, with its side file, which names the item of every row")


@dataclass
class RepairFlags:
    """Items that share a SID."""

    collisions: list[str] | None = flag(
        None,
        "what happens to items that share a SID. none: nothing. sinkhorn: they are spread over the last level in up to "
        "--repair_rounds rounds, which may leave some. nearest_free: they move to the nearest free last-level code of "
        "their prefix, and get one more token where the prefix is full. extra_token: every item of a shared SID gets "
        "one more token. own_token: every item gets one more token, which is no other's. sinkhorn,nearest_free and "
        "sinkhorn,extra_token: what sinkhorn leaves is resolved as well",
        choices=STEP_NAMES,
        default_text="sinkhorn,nearest_free; with --append_to nearest_free",
    )
    sk_epsilon: float = flag(
        0.003, "regularisation of the sinkhorn step, for distances brought to the range from -1 to 1"
    )
    sk_iters: int = flag(100, "scalings of the transport plan in the sinkhorn step")
    repair_rounds: int = flag(20, "rounds of the sinkhorn step, at most")


@dataclass
class IndexFlags(EmbeddingFlags, RepairFlags, DeviceFlags, StageFlags):
    """Index."""

    ckpt_path: str = flag(help="an RQ-VAE or RQ-KMeans+ checkpoint, or the .npz codebooks of a k-means method")
    output_file: str | None = flag(
        None, "the index to write; its report is written beside it", default_text="NAME.index.json beside --data_path"
    )
    append_to: str | None = flag(
        None,
        "an index made with this codebook: its SIDs are kept, and the items of --data_path that it lacks are added",
    )
    batch_size: int = flag(4096, "items quantised at a time")


@dataclass
class IndexPlusFlags(IndexFlags):
    """Accepted for the published command line."""

    num_emb_list: list[int] | None = flag(None, no_effect="the checkpoint holds its codes per level")
    e_dim: int | None = flag(None, no_effect="the checkpoint holds the width of its codes")
    layers: list[int] | None = flag(None, no_effect="the checkpoint holds its hidden widths")
    num_workers: int = flag(4, no_effect=NO_WORKERS)


@dataclass
class KMeansFlags(EmbeddingFlags, RepairFlags, SeedFlags, DeviceFlags, StageFlags):
    """Codebooks and index."""

    output_file: str | None = flag(
        None,
        "the index to write; report and codebooks are written beside it",
        default_text="NAME.index.json beside --data_path",
    )
    num_levels: int | None = flag(None, "levels, for a single --codebook_size", default_text="3", aliases=("l",))
    codebook_size: list[int] | None = flag(
        None, "codes of every level, or a list with one number per level", default_text="256", aliases=("k",)
    )
    iterations: int = flag(50, "k-means rounds per level, at most")
    collisions: list[str] = flag(
        ["nearest_free"], "what happens to items that share a SID, as in rq.generate_indices", choices=STEP_NAMES
    )


@dataclass
class DatasetFlags(KMeansFlags):
    """Layout of the published scripts."""

    dataset: str | None = flag(None, "names both files, instead of --data_path and --output_file")
    data_path: str | None = flag(
        None,
        "DIR/NAME.emb-PLM-td.npy, with its side file, which names the item of every row",
        default_text="that of --dataset",
    )


@dataclass
class RQKMeansFaissFlags(DatasetFlags):
    """Faiss."""

    uniform: bool = flag(
        False,
        "assign the items of each level to its centres in equal numbers, at least total distance; a code then is the "
        "mean of its items",
    )
    output_root: str = flag("data", "with --dataset, the index is OUTPUT_ROOT/DATASET/DATASET.faiss-rq.index.json")
    iters: int | None = flag(None, no_effect="--uniform solves the assignment itself, not a number of Sinkhorn rounds")
    batch_size: int | None = flag(None, no_effect="--uniform looks at all items at once")


@dataclass
class RQKMeansConstrainedFlags(DatasetFlags):
    """Constrained k-means."""

    root: str = flag("./data/Amazon", "with --dataset, the folder of DATASET.emb-qwen-td.npy and of the index")
    engine: str = flag(
        "balanced",
        "balanced: this project's, for any number of items, on a CPU or GPU; min_cost_flow: exact assignments by "
        "k-means-constrained, for some 10,000 items on a CPU",
        choices=("balanced", "min_cost_flow"),
    )
    iterations: int = flag(100, "k-means rounds per level, at most", aliases=("max_iter",))
    collisions: list[str] = flag(
        ["extra_token"], "what happens to items that share a SID, as in rq.generate_indices", choices=STEP_NAMES
    )
    verbose: bool = flag(False, no_effect="progress is always shown")


@dataclass
class TrainerFlags(SeedFlags):
    """Training."""

    ckpt_dir: str = flag(
        help="folder for best_loss_model.pth, best_collision_model.pth, final_model.pth and the last checkpoints"
    )
    lr: float = flag(1e-3, "learning rate")
    epochs: int = flag(10_000, "passes over the items")
    batch_size: int = flag(20_480, "items per step")
    eval_step: int = flag(50, "epochs between collision rates and checkpoints")
    learner: str = flag("AdamW", "optimiser: AdamW, Adam, SGD, Adagrad or RMSprop, in any case")
    lr_scheduler_type: str = flag(
        "constant", "the learning rate after the warm-up", choices=("constant", "linear", "cosine")
    )
    warmup_epochs: int = flag(50, "epochs in which the learning rate rises from 0")
    weight_decay: float = flag(1e-4, "weight decay of the optimiser")
    max_norm: float = flag(1.0, "gradients are clipped to this norm")
    save_limit: int = flag(2, "checkpoints kept besides the best models")
    revive_every: int = flag(
        0, "every so many epochs, codes that no item uses move to items that are fitted badly; 0: never"
    )
    bf16: bool = flag(
        False, "run the MLPs in bfloat16 autocast, for GPUs; weights, distances and losses stay in float32"
    )


@dataclass
class AutoencoderFlags(EmbeddingFlags, TrainerFlags, LoggingFlags, DeviceFlags, StageFlags):
    """Autoencoder."""

    layers: list[int] = flag(HIDDEN_WIDTHS, "hidden widths of the encoder; the decoder has them the other way round")
    dropout_prob: float = flag(0.0, "dropout on the input of every layer")
    bn: bool = flag(False, "batch norm before each activation")
    loss_type: str = flag("mse", "reconstruction loss", choices=("mse", "l1"))
    quant_loss_weight: float = flag(1.0, "weight of the quantisation loss beside the reconstruction loss")
    beta: float = flag(0.25, "weight of the commitment term in the quantisation loss")
    sk_epsilons: list[float] | None = flag(
        None, "Sinkhorn regularisation of each level while training, 0 for none", default_text="0 on every level"
    )
    sk_iters: int = flag(50, "scalings of a Sinkhorn assignment")
    num_workers: int = flag(4, no_effect=NO_WORKERS)


@dataclass
class RQVAEFlags(AutoencoderFlags):
    """Codebooks."""

    num_emb_list: list[int] = flag([256, 256, 256], "codes per level")
    e_dim: int = flag(32, "width of the codes")
    kmeans_init: bool = flag(True, "start the codes from k-means over the first batch")
    kmeans_iters: int = flag(100, "rounds of that k-means, at most")


@dataclass
class RQKMeansPlusFlags(AutoencoderFlags):
    """Codebooks."""

    pretrained_codebook_path: str = flag(
        help=".npz codebooks of rq.rqkmeans_faiss or rq.rqkmeans_constrained; they set levels and codes per level"
    )
    num_emb_list: list[int] | None = flag(
        None, "codes per level, checked against the codebooks", default_text="those of the codebooks"
    )
    e_dim: int | None = flag(
        None, "width of the codes, checked against the embeddings", default_text="that of the embeddings"
    )
    lr: float = flag(1e-4, "learning rate")
    epochs: int = flag(5_000, "passes over the items")
    batch_size: int = flag(2_048, "items per step")
    weight_decay: float = flag(0.0, "weight decay of the optimiser")
    save_limit: int = flag(5, "checkpoints kept besides the best models")
    kmeans_init: bool = flag(False, no_effect="the codes start from --pretrained_codebook_path")
    kmeans_iters: int = flag(100, no_effect="the codes start from --pretrained_codebook_path")


@dataclass
class QualityFlags(StageFlags):
    """SID report."""

    index: list[str] = flag(help="index files, separated by commas")
    emb: str = flag(help="the embeddings of their items, with the side file")
    codebook_sizes: list[int] | None = flag(
        None,
        "codes per level of all of them, such as 256,256,256",
        default_text="what an earlier report beside the index says, else up to the largest number seen, so that dead "
        "codes above it are not counted",
    )
    train_file: str | None = flag(
        None, "NAME.train.inter: how often items that were bought one after the other share their first codes"
    )
    neighbours: int = flag(10, "nearest items by cosine that are looked at for each sampled item")
    sample: int = flag(2000, "random items whose neighbours are looked at")
    seed: int = flag(0, "seed of that sample")


@dataclass
class BehaviourFlags(EmbeddingFlags, SeedFlags, StageFlags):
    """Behaviour."""

    train_file: str = flag(help="NAME.train.inter, the samples whose items are counted")
    output_file: str | None = flag(
        None, "the embeddings to write", default_text="DIR/NAME.emb-PLM+behaviour-td.npy beside --data_path"
    )
    dim: int = flag(128, "dimensions of the behaviour part, at most")
    weight: float = flag(1.0, "length of the behaviour part of a frequent item; that of the text part is 1")
    rare: float = flag(5.0, "occurrences at which the behaviour part has half of its squared length")
    decay: float = flag(0.5, "weight of a pair of items with every item between them")


@dataclass
class EmbedFlags(SeedFlags, DeviceFlags, StageFlags):
    """Item texts."""

    dataset: str = flag(help="the items are ROOT/DATASET.item.json, the embeddings ROOT/DATASET.emb-PLM_NAME-td.npy")
    root: str = flag(help="folder of the items and of the embeddings")
    plm_name: str | None = flag(
        None,
        "tfidf, or any name for the encoder of --plm_checkpoint",
        default_text="tfidf; qwen with --plm_checkpoint",
    )
    plm_checkpoint: str | None = flag(None, "sentence-transformers or Hugging Face folder, or hub name")
    text_fields: list[str] | None = flag(None, "item fields that make up the text", default_text="title,description")
    dim: int = flag(256, "SVD components of tfidf, at most")
    refit: bool = flag(
        False, "fit tfidf anew where items were only added; else the fit beside the embeddings is used again for them"
    )
    max_sent_len: int = flag(2048, "tokens that the encoder reads of a text, at most")
    batch_size: int = flag(64, "texts that the encoder reads at a time")
    word_drop_ratio: float = flag(-1.0, "share of the words of every text that are left out at random; 0 or less: none")


@dataclass
class ExplainFlags(StageFlags):
    """Codes explained."""

    index: str = flag(help="the index, NAME.index.json")
    items: str = flag(help="its items, NAME.item.json")
    output: str | None = flag(
        None, "OUTPUT.json and OUTPUT.html are written", default_text="NAME.index.explained beside --index"
    )
    words: int = flag(6, "most telling words of a prefix, at most")
    examples: int = flag(3, "example titles of a prefix, at most")
