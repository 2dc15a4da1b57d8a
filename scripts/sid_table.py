"""One line per SID table below a folder: collisions before and after, codes used, errors, seconds.

python -m scripts.sid_table --run_dir OUT
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minionerec.common.cli import flag, parse_flags, run_command
from minionerec.common.files import InputError, read_json, write_json
from minionerec.common.processes import say, say_outputs
from minionerec.common.settings import DryRunFlags

COLUMNS = {
    "before": "collisions_before",
    "after": "collisions_after",
    "sharing": "items_sharing_a_sid",
    "extra": "extra_tokens",
    "codes used": "codes_used",
    "error": "error",
    "codebook error": "codebook_error",
    "neighbours": "neighbours",
    "seconds": "seconds",
}
NOTES = """
before, after: collision rate before and after repair; neighbours: share of the 10 nearest items that have the
same first code / first two codes; seconds: k-means, training and index, all counted"""


@dataclass
class SidTableFlags(DryRunFlags):
    """Table."""

    run_dir: str = flag(help="a folder with quality reports below it; the table is also written to RUN_DIR/sids.json")


def collect_stages(record: Path) -> dict[Path, dict[str, Any]]:
    """The stage records that an index rests on: its own, its training's, that of the k-means run it started from."""
    content = read_json(record)
    stages = {record: content}
    settings = content["settings"]
    if "ckpt_path" in settings:
        for training in Path(settings["ckpt_path"]).parent.glob("*.stage.json"):
            stages |= collect_stages(training)
    if "pretrained_codebook_path" in settings:
        name = settings["pretrained_codebook_path"].removesuffix(".codebooks.npz")
        stages |= collect_stages(Path(f"{name}.stage.json"))
    return stages


def read_figures(report_file: Path) -> dict[str, Any]:
    """The figures of one quality report and of the stages that made its index, where there are records of them."""
    report = read_json(report_file)
    record = Path(f"{str(report_file).removesuffix('.quality.json')}.stage.json")
    stages = collect_stages(record) if record.is_file() else {}
    results = stages[record]["results"] if stages else {}
    levels = report["per_level"]
    return {
        "items": report["items"],
        "collisions_before": results.get("collision_rate_before"),
        "collisions_after": report["collision_rate"],
        "items_sharing_a_sid": report["items_sharing_a_sid"],
        "extra_tokens": report["items_with_extra_token"],
        "codes_used": "/".join(str(level["codes_used"]) for level in levels),
        "error": report["reconstruction_error"],
        "codebook_error": report["codebook_reconstruction_error"],
        "neighbours": [level["neighbour_agreement"] for level in levels[:2]],
        "seconds": sum(stage["seconds"] for stage in stages.values()) if stages else None,
    }


def format_figure(key: str, value: Any) -> str:
    """A figure as it stands in the table."""
    if value is None:
        return "-"
    if isinstance(value, list):
        return "/".join(format_figure(key, part) for part in value)
    return f"{value:.1f}" if key == "seconds" else f"{value:.4f}" if isinstance(value, float) else str(value)


def format_table(rows: dict[str, dict[str, Any]]) -> str:
    """The figures by the name of their index, one line each."""
    lines = [["index", *COLUMNS]]
    lines += [[name, *(format_figure(key, row[key]) for key in COLUMNS.values())] for name, row in rows.items()]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = [
        [first.ljust(widths[0]), *(text.rjust(width) for text, width in zip(others, widths[1:], strict=True))]
        for first, *others in lines
    ]
    return "\n".join("  ".join(cells) for cells in padded)


def tabulate_sids(flags: SidTableFlags) -> None:
    """Print the table of all quality reports below RUN_DIR and write it to RUN_DIR/sids.json.

    Raises:
        InputError: no report.
    """
    root = Path(flags.run_dir)
    files = sorted(root.rglob("*.quality.json"), key=lambda path: str(path.parent))
    if not files:
        raise InputError(f"--run_dir {flags.run_dir}: no quality report below it")
    rows = {str(path.parent.relative_to(root)): read_figures(path) for path in files}
    say(format_table(rows))
    if not flags.dry_run:
        write_json(root / "sids.json", rows)
    say(NOTES)
    say_outputs([root / "sids.json"], flags.dry_run)


if __name__ == "__main__":
    run_command(tabulate_sids, parse_flags(SidTableFlags))
