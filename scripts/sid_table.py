"""One line per SID table below a folder: collisions before and after, codes used, errors, seconds.

python -m scripts.sid_table --run_dir OUT
"""

from __future__ import annotations

from pathlib import Path

from minionerec.common.cli import run
from minionerec.common.files import InputError, read_json, write_json
from minionerec.common.processes import say

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


def stages_behind(record: Path) -> dict[Path, dict]:
    """The stage records that an index rests on: its own, its training's, and that of the k-means run it started from."""
    content = read_json(record)
    found = {record: content}
    settings = content["settings"]
    if "ckpt_path" in settings:
        for training in Path(settings["ckpt_path"]).parent.glob("*.stage.json"):
            found |= stages_behind(training)
    if "pretrained_codebook_path" in settings:
        name = settings["pretrained_codebook_path"].removesuffix(".codebooks.npz")
        found |= stages_behind(Path(f"{name}.stage.json"))
    return found


def figures(report_file: Path) -> dict:
    """The figures of one quality report and of the stages that made its index, where they are known."""
    report = read_json(report_file)
    record = Path(f"{str(report_file).removesuffix('.quality.json')}.stage.json")
    stages = stages_behind(record) if record.is_file() else {}
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


def cell(key: str, value) -> str:
    if value is None:
        return "-"
    if isinstance(value, list):
        return "/".join(cell(key, part) for part in value)
    return f"{value:.1f}" if key == "seconds" else f"{value:.4f}" if isinstance(value, float) else str(value)


def table(run_dir: str) -> None:
    """Print the table of all quality reports below RUN_DIR and write it to RUN_DIR/sids.json."""
    root = Path(run_dir)
    files = sorted(root.rglob("*.quality.json"), key=lambda path: str(path.parent))
    if not files:
        raise InputError(f"--run_dir {run_dir}: no quality report below it")
    rows = {str(path.parent.relative_to(root)): figures(path) for path in files}
    lines = [["index", *COLUMNS]]
    lines += [[name, *(cell(key, row[key]) for key in COLUMNS.values())] for name, row in rows.items()]
    widths = [max(map(len, column)) for column in zip(*lines)]
    for first, *others in lines:
        cells = (text.rjust(width) for text, width in zip(others, widths[1:]))
        say("  ".join([first.ljust(widths[0]), *cells]))
    write_json(root / "sids.json", rows)
    say(
        "\nbefore, after: collision rate before and after repair; neighbours: share of the 10 nearest items that have the"
    )
    say("same first code / first two codes; seconds: k-means, training and index, all counted")
    say(f"  -> {root / 'sids.json'}")


if __name__ == "__main__":
    run(table)
