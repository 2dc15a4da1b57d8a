"""A small dataset with SIDs of three and four tokens, and a model fine-tuned on it, for tests that only read them."""

import os
from types import SimpleNamespace

import pytest

# Before torch is loaded: tiny tensors gain nothing from threads that wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """paths: of the dataset by flag name; checkpoint: of a few epochs of sft.py from scratch; folder: its output."""
    from tiny import make_dataset, write_config

    from minionerec.training.settings import SFTFlags
    from sft import sft

    folder = tmp_path_factory.mktemp("trained")
    paths = make_dataset(folder / "data", deep=True)
    sft(
        SFTFlags(
            base_model=write_config(folder),
            **{name: paths[name] for name in ("train_file", "eval_file", "sid_index_path", "item_meta_path")},
            output_dir=str(folder / "sft"),
            train_from_scratch=True,
            batch_size=16,
            micro_batch_size=16,
            num_epochs=6,
            learning_rate=1e-2,
        )
    )
    return SimpleNamespace(paths=paths, folder=folder, checkpoint=str(folder / "sft" / "final_checkpoint"))
