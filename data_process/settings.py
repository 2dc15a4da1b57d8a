"""Flags of the commands that prepare data, in the groups that they share. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass

from minionerec.common.cli import flag
from minionerec.common.settings import SeedFlags, StageFlags

SPLIT_METHODS = ("chronological", "leave_one_out")


@dataclass
class SampleFlags(StageFlags):
    """Interactions and samples."""

    dataset: str = flag(help="name of the outputs, OUTPUT_PATH/DATASET.*")
    output_path: str = flag(help="folder of the outputs")
    user_k: int = flag(5, "interactions that every user has at least (k-core); 0 or 1: no limit")
    item_k: int = flag(5, "interactions that every item has at least (k-core); 0 or 1: no limit")
    st_year: int | None = flag(None, "first year of the time window, in UTC", default_text="open")
    st_month: int | None = flag(None, "first month of the time window", default_text="January")
    ed_year: int | None = flag(None, "year in which the time window ends, in UTC", default_text="open")
    ed_month: int | None = flag(None, "first month behind the time window, itself excluded", default_text="January")
    split: str = flag(
        "chronological",
        "chronological: one global 8:1:1 cut in time; leave_one_out: the last two targets of every user",
        choices=SPLIT_METHODS,
    )
    max_history: int = flag(10, "items of a history, at most; the oldest are left out")
    min_rating: float | None = flag(None, "interactions rated lower are left out")


@dataclass
class AmazonFlags(SampleFlags):
    """Amazon Reviews dump."""

    metadata_file: str | None = flag(
        None,
        "item records: JSON lines or Python literals, plain or gzip, of 2014, 2018 or 2023",
        default_text="meta_DATASET.json in this folder",
    )
    reviews_file: str | None = flag(
        None, "reviews in the same forms", default_text="DATASET_5.json or DATASET.json in this folder"
    )
    max_title_words: int = flag(20, "items with a longer title are left out")
    duplicates: str = flag(
        "same_time",
        "same_time: reviews of equal user, item and time count once; user_item: only a user's first review of an item "
        "counts, among those in the window and rated high enough",
        choices=("same_time", "user_item"),
    )
    max_bad_lines: int = flag(100, "more malformed lines than this in a file stop the run")


@dataclass
class RecboleFlags(SampleFlags):
    """RecBole files."""

    input_dir: str = flag(help="folder of DATASET.inter and DATASET.item")
    user_field: str = flag("user_id", "column of the user")
    item_field: str = flag("item_id", "column of the item")
    time_field: str = flag("timestamp", "column of the time, in seconds since 1970")
    rating_field: str = flag("rating", "column of the rating, for --min_rating")
    title_field: str | None = flag(
        None, "column of the title in the .item file", default_text="found by its usual names"
    )
    category_field: str | None = flag(
        None, "column of the categories in the .item file", default_text="found by its usual names"
    )


@dataclass
class CsvFlags(SampleFlags):
    """CSV files."""

    interactions_file: str = flag(help="a CSV with a header line and columns of user, item and time; .tsv: with tabs")
    items_file: str | None = flag(
        None,
        "a CSV with a header line, an item a line: its id, title, and other texts",
        default_text="none; an item's id is its title",
    )
    user_field: str | None = flag(None, "column of the user", default_text="found by its usual names")
    item_field: str | None = flag(None, "column of the item, in both files", default_text="found by its usual names")
    time_field: str | None = flag(
        None,
        "column of the time: seconds, milliseconds or microseconds since 1970, or dates such as 2024-05-31 17:20",
        default_text="found by its usual names",
    )
    rating_field: str = flag("rating", "column of the rating, for --min_rating")
    title_field: str | None = flag(None, "column of the title", default_text="found by its usual names")
    category_field: str | None = flag(None, "column of the categories", default_text="found by its usual names")


@dataclass
class PublishedFlags(StageFlags):
    """Published splits."""

    dataset: str = flag(help="what the file names begin with, and name of the outputs, OUTPUT_PATH/DATASET.*")
    splits_dir: str = flag(
        help="folder of train|valid|test/DATASET*.csv and index/DATASET*.item.json; their SIDs are not looked at"
    )
    output_path: str = flag(help="folder of the outputs")


@dataclass
class JoinFlags(StageFlags):
    """Two datasets."""

    first: str = flag(help="DIR/NAME of DIR/NAME.item.json, DIR/NAME.train.inter, ...; its item ids stay what they are")
    second: str = flag(help="the same of the other dataset, whose items are numbered behind those of the first")
    output_path: str = flag(help="folder of the outputs")


@dataclass
class ConvertFlags(SeedFlags, StageFlags):
    """Conversion."""

    dataset_name: str = flag(help="what the names of the input files begin with")
    data_dir: str = flag(
        help="folder with DATASET_NAME.train.inter, .valid.inter, .test.inter, .item.json and .index.json"
    )
    output_dir: str = flag(help="folder of train|valid|test/CATEGORY.csv and info/CATEGORY.txt")
    category: str | None = flag(None, "name of the output files", default_text="DATASET_NAME")
    index_file: str | None = flag(None, "the index, where it is elsewhere", default_text="that of --data_dir")
    item_file: str | None = flag(None, "the item file, where it is elsewhere", default_text="that of --data_dir")
    shared_sids: bool = flag(False, "allow several items to have one SID")
    only_items: str | None = flag(
        None, "a file with an item id a line: the info file lists no others", default_text="all items"
    )
    max_valid_samples: int | None = flag(None, "keep this many random rows of the valid split", default_text="all")
    max_test_samples: int | None = flag(None, "keep this many random rows of the test split", default_text="all")
    keep_longest_only: bool = flag(False, "keep one row per user of the train split, that with the longest history")


@dataclass
class ValidateFlags:
    """Checks."""

    data_dir: str = flag(
        help="folder with DATASET.item.json, .index.json, .train.inter, ... and/or train/DATASET*.csv, info/, index/; "
        "what is missing is not checked"
    )
    dataset: str | None = flag(None, "the dataset to check", default_text="all that are in the folder")
    max_problems: int = flag(20, "problems shown of one kind in one file; the others are counted")
