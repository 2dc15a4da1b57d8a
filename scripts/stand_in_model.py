"""The shape of the model that a run of sft.py will leave: config, tokenizer and prompts, no weights.

scripts/dry_run.sh makes one in a temporary folder, so that the stages that begin with that model can be planned before
it is trained. Flags are those of sft.py; the folder is OUTPUT_DIR/final_checkpoint.
"""

from __future__ import annotations

from minionerec.common.cli import parse_flags, run_command
from minionerec.training.settings import SFTFlags

if __name__ == "__main__":
    # Before the imports below, which take seconds: --help and a wrong flag answer at once.
    FLAGS = parse_flags(SFTFlags)

from pathlib import Path

from minionerec.common.files import atomic_write
from minionerec.common.items import read_catalogue
from minionerec.common.records import read_index
from minionerec.language.prompts import PROMPTS_FILE, load_prompts
from minionerec.training.planning import build_base, list_distinct_tokens


def write_stand_in(flags: SFTFlags) -> None:
    """Write the folder, unless there is one already.

    Raises:
        InputError: no such base, or items and SIDs that do not fit together.
    """
    folder = Path(flags.output_dir) / "final_checkpoint"
    if (folder / "config.json").is_file():
        return
    index = read_index(flags.sid_index_path, "sid_index_path")
    catalogue, _ = read_catalogue(flags.item_meta_path, index, flags.sid_index_path)
    base = build_base(flags, catalogue.titles, list_distinct_tokens(catalogue), add_tokens=True)
    prompts = load_prompts(flags.prompts or ("compact" if flags.train_from_scratch else "worded"), flags.category)
    with atomic_write(folder) as temporary:
        base.model.config.save_pretrained(temporary)
        base.tokenizer.save_pretrained(temporary)
        (temporary / PROMPTS_FILE).write_text(prompts.to_yaml(), encoding="utf-8")


if __name__ == "__main__":
    run_command(write_stand_in, FLAGS)
