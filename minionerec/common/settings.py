"""Flags that several commands share, in groups; a command's own dataclass is composed of them."""

from __future__ import annotations

from dataclasses import dataclass

from minionerec.common.cli import Flags, flag


@dataclass
class SeedFlags(Flags):
    """Repeatability."""

    seed: int = flag(42, "seed of everything random")


@dataclass
class StageFlags(Flags):
    """The run."""

    force: bool = flag(False, "do a finished run again")
    dry_run: bool = flag(
        False,
        "write nothing: check the flags, and print what the run would read, do and write, and what is known of its "
        "time; training commands measure a few steps or count them (docs/planning.md)",
    )


@dataclass
class DryRunFlags(Flags):
    """What is written."""

    dry_run: bool = flag(False, "write nothing: read and check the input, and print what would be written")


@dataclass
class PluginFlags(Flags):
    """Plugins."""

    plugin: list[str] | None = flag(
        None, "Python files that are run first and may register tasks, rewards and baselines (docs/extending.md)"
    )


@dataclass
class CatalogueFlags(Flags):
    """Catalogue."""

    info_file: str = flag(help="the catalogue: sid<TAB>title<TAB>item_id, one item a line")
    shared_sids: bool = flag(
        False, "accept items that share a SID; a model cannot tell them apart, and metrics say how such ties fall"
    )


@dataclass
class PromptFlags(Flags):
    """Prompts."""

    prompts: str | None = flag(
        None,
        "prompt set: compact (bare SIDs), worded, a YAML file with one set, or FILE:SET",
        default_text="that of the checkpoint; of a base without one, worded",
    )
    category: str | None = flag(None, "any text, for prompts that show {category}")
    cutoff_len: int = flag(
        512, "longest prompt with its target, in tokens; the oldest history is dropped until it fits"
    )


@dataclass
class AdapterFlags(Flags):
    """LoRA."""

    lora: bool = flag(
        False,
        "train LoRA matrices beside the linear layers of the decoder and the token rows of the SIDs; freeze the rest",
    )
    lora_rank: int = flag(16, "rank of the LoRA matrices")
    lora_alpha: int = flag(32, "the matrices act times lora_alpha / lora_rank")
    lora_targets: list[str] | None = flag(
        None, "names of the linear layers, such as q_proj,v_proj", default_text="every linear layer of the decoder"
    )
    lora_dropout: float = flag(0.0, "dropout on the input of the LoRA matrices")
    load_in_4bit: bool = flag(
        False, "keep the frozen linear layers in 4 bits (QLoRA, with bitsandbytes); what is exported is a plain model"
    )


@dataclass
class LoggingFlags(Flags):
    """Logging."""

    report_to: list[str] | None = flag(
        None,
        "where steps are logged besides OUTPUT/steps.csv: tensorboard writes to OUTPUT/runs, wandb respects "
        "WANDB_MODE=offline; a run that was cut off goes on in the same run there",
        choices=("tensorboard", "wandb", "none"),
        default_text="wandb with --wandb_project, else none",
    )
    wandb_project: str | None = flag(None, "project of wandb", default_text="MiniOneRec, where --report_to names wandb")
    wandb_run_name: str | None = flag(None, "name of the wandb run")


@dataclass
class HubFlags(Flags):
    """The Hugging Face hub."""

    push_to_hub: bool = flag(False, "send the finished model folder to --hub_model_id (log in with `hf auth login`)")
    hub_model_id: str | None = flag(None, "repository on the hub, such as my-name/my-model")
    hub_private_repo: bool = flag(False, "make that repository private")


@dataclass
class StreamFlags(Flags):
    """Data larger than memory."""

    streaming: str = flag(
        "auto",
        "keep the rows and their tokens as mapped files beside the output (True) or in memory (False); the results "
        "are the same",
        choices=("auto", "True", "False"),
        default_text="auto: files for splits from 64 MB on",
    )
    workers: int | None = flag(
        None, "processes that tokenise rows which are kept as files", default_text="the CPU cores, at most 8"
    )
