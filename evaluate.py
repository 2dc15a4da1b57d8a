"""Evaluation: exact constrained beam search over the catalogue, then HR@K and NDCG@K at SID and item level.

    python evaluate.py --base_model output/sft/final_checkpoint --train_file ... --info_file ... --test_data_path ... \
        --result_json_data output/sft/test.json

Several processes (`accelerate launch evaluate.py ...`, `torchrun --nproc_per_node 2 evaluate.py ...`) share the rows and
write the same one file.
"""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import torch
from accelerate.utils import gather_object
from transformers import set_seed

from data import EvalSidDataset
from LogitProcessor import hf_rank_sids
from minionerec.common.cli import run
from minionerec.common.files import InputError, write_json
from minionerec.common.items import read_item_ids
from minionerec.common.processes import is_main_process, process_state, say
from minionerec.common.records import Row, check_rows_against_catalogue, count_popularity, read_info, read_rows
from minionerec.common.stage import Stage
from minionerec.evaluation.fusion import CandidateScorer, Fusion, build_row_likelihoods, choose_weight
from minionerec.evaluation.metrics import format_metrics, score_predictions
from minionerec.evaluation.plot import draw_metrics
from minionerec.evaluation.predictions import build_item_predictions, score_item_predictions
from minionerec.evaluation.ranking import rank_sids
from minionerec.evaluation.shards import prepare_folder, work_in_shards
from minionerec.language.catalogue_trie import build_catalogue_trie
from minionerec.language.examples import Example
from minionerec.language.models import load_model
from minionerec.language.prompts import Encoder, load_checkpoint_prompts, resolve_prompts_file
from minionerec.recommenders.registry import BASELINES
from minionerec.search.beam_search import choose_batch_size

ENGINES = ("tree", "hf")


def evaluate(
    base_model: str,
    train_file: str,
    info_file: str,
    test_data_path: str,
    result_json_data: str,
    batch_size: int | None = None,
    num_beams: int = 50,
    K: int = 50,
    length_penalty: float = 0.0,
    renormalize: bool = False,
    exclude_seen: bool = False,
    only_items: str | None = None,
    engine: str = "tree",
    fuse: str | None = None,
    fuse_weight: float | None = None,
    fuse_valid_file: str | None = None,
    fuse_valid_sample: int = -1,
    cf_path: str | None = None,
    cutoff_len: int = 512,
    prompts: str | None = None,
    category: str | None = None,
    shared_sids: bool = False,
    sample: int = -1,
    seed: int = 42,
    force: bool = False,
) -> None:
    """Rank the catalogue for every test row and measure.

    Args:
        base_model: checkpoint of sft.py or rl.py.
        train_file: CSV of the train split; its target counts order the items that share a SID.
        info_file: the catalogue. shared_sids: accept items that share a SID there.
        result_json_data: the predictions are written there, the metrics beside it (NAME.metrics.json, NAME.png). Until
            then NAME.partial/ holds the finished rows; the same command after a kill does the others only.
        batch_size: prompts per forward pass of one process; default: what fits into the free memory, at most 32 on CPU.
        num_beams: beams of the search. K: length of the lists, at most num_beams.
        length_penalty: exponent of the length that divides the score of a SID (0: the log-probability itself).
        renormalize: score with probabilities over the legal tokens instead of the whole vocabulary.
        exclude_seen: the search leaves out what stands in the row's history. only_items: a file with an item id a line, such
            as those of a category: the search finds no others.
        engine: tree (`beam_search`), or hf: the same search by Hugging Face `generate`, slow, for comparison.
        fuse: a second recommender whose likelihoods are added: transitions, content (likeness of titles), sasrec (then
            cf_path is the model folder of a sasrec.py run), or a predictions file of the same rows with log-probabilities.
            The fused lists are over items; they and their metrics go to NAME.fused.json and NAME.fused.metrics.json.
        fuse_weight: of the second recommender. Default: of 0, .01, .03, .1, .3, 1, 3 the one with the best NDCG@10 on
            fuse_valid_file, a validation CSV, or on fuse_valid_sample random rows of it.
        prompts: another prompt set than the checkpoint's own. category: any text, for prompts that show {category}.
        sample: evaluate that many random rows (-1: all), for a quick look.
    """
    if K > num_beams:
        raise InputError(f"--K {K}: cannot exceed --num_beams {num_beams}")
    if engine not in ENGINES or (engine == "hf" and num_beams < 2):
        raise InputError(
            f"--engine {engine}: expected one of {', '.join(ENGINES)}, and for hf --num_beams of 2 or more"
        )
    if engine == "hf" and (renormalize or exclude_seen or only_items):
        raise InputError("--engine hf: has neither --renormalize nor --exclude_seen nor --only_items")
    if fuse is None:
        given = [fuse_weight, fuse_valid_file, cf_path]
        for flag, value in zip(("fuse_weight", "fuse_valid_file", "cf_path"), given):
            if value is not None:
                raise InputError(f"--{flag}: has an effect with --fuse only")
    else:
        if fuse not in BASELINES and not Path(fuse).is_file():
            raise InputError(f"--fuse {fuse}: expected one of {', '.join(BASELINES)}, or a predictions file")
        if length_penalty or renormalize or only_items or exclude_seen:
            raise InputError(
                "--fuse: adds probabilities, so it goes without --length_penalty, --renormalize, --only_items and --exclude_seen"
            )
        if (cf_path is None) == (fuse == "sasrec"):
            raise InputError("--fuse sasrec and --cf_path go together")
        if (fuse_weight is None) == (fuse_valid_file is None):
            raise InputError("--fuse: expected either --fuse_weight or --fuse_valid_file to choose it on")
        if fuse not in BASELINES and fuse_weight is None:
            raise InputError(f"--fuse {fuse}: a file has no validation rows; give --fuse_weight")
        if fuse_weight is not None and not 0 <= fuse_weight < math.inf:
            raise InputError(f"--fuse_weight {fuse_weight}: must be 0 or more, and finite")
        for flag, path in (("test_data_path", test_data_path), ("train_file", train_file)):
            if fuse_valid_file and Path(fuse_valid_file).resolve() == Path(path).resolve():
                raise InputError(f"--fuse_valid_file {path}: is --{flag}; choose the weight on the validation split")
    if fuse_valid_sample != -1 and (fuse_valid_file is None or fuse_valid_sample < 1):
        raise InputError(f"--fuse_valid_sample {fuse_valid_sample}: expected at least 1, with --fuse_valid_file")
    if sample < -1 or sample == 0:
        raise InputError(f"--sample {sample}: expected -1 (all rows) or at least 1")
    if batch_size is not None and batch_size < 1:
        raise InputError(f"--batch_size {batch_size}: must be at least 1")
    output = Path(result_json_data)
    ends = (".metrics.json", ".png", ".stage.json", ".fused.json", ".fused.metrics.json")
    metrics_file, picture, record, fused_file, fused_metrics = (output.with_name(output.stem + end) for end in ends)
    partials = [output.with_name(f"{output.stem}{end}") for end in (".partial", ".valid.partial")]
    settings = {key: value for key, value in locals().items() if key in evaluate.__annotations__ and key != "force"}
    inputs = [train_file, info_file, test_data_path, *([resolve_prompts_file(prompts)[0]] if prompts else [])]
    inputs += [path for path in (only_items, fuse_valid_file, cf_path) if path]
    inputs += [fuse] if fuse and fuse not in BASELINES else []
    inputs += [base_model] if Path(base_model).exists() else []
    with process_state().main_process_first():
        outputs = [output, metrics_file, picture, *([fused_file, fused_metrics] if fuse else [])]
        stage = Stage("evaluate", settings, inputs, outputs, record, force)
        if is_main_process():
            for folder in partials:
                prepare_folder(folder, stage.resuming)
    if stage.finished:
        return

    catalogue = read_info(info_file, shared_sids)
    train = read_rows(train_file, "train_file")
    counts = count_popularity(row.item_id for row in train)
    known = dict(zip(catalogue.item_ids, catalogue.sids))
    generator = torch.Generator().manual_seed(seed)

    def read_split(path: str, flag: str, count: int) -> list[Row]:
        rows = read_rows(path, flag)
        for number, row in enumerate(rows, 1):
            if known.get(row.item_id) != row.sid:
                raise InputError(f"{path}, row {number}: item {row.item_id} with SID {row.sid} is not in {info_file}")
        if fuse:
            check_rows_against_catalogue(rows, path, catalogue, info_file)
        if 0 < count < len(rows):
            rows = [rows[place] for place in torch.randperm(len(rows), generator=generator)[:count].sort().values]
        return rows

    rows = read_split(test_data_path, "test_data_path", sample)
    choosing = fuse is not None and fuse_weight is None
    valid = read_split(fuse_valid_file, "fuse_valid_file", fuse_valid_sample) if choosing else []
    wanted = read_item_ids(only_items, known) if only_items else []
    set_seed(seed)
    model, tokenizer = load_model(base_model, "base_model")
    encoder = Encoder(tokenizer, load_checkpoint_prompts(base_model, prompts, category))
    device = process_state().device
    trie, sid_of_sequence = build_catalogue_trie(catalogue, encoder, device)
    model.to(device, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32).eval()
    number_of = {sid: number for number, sid in enumerate(sid_of_sequence)}
    included = sorted({number_of[known[item]] for item in wanted}) if only_items else None

    def search(rows: list[Row], path: str, folder: Path) -> tuple[list[Example], list[dict] | None]:
        """(examples; their lists on the main process, None on others, with --fuse also what fusion needs), in row order."""
        examples = EvalSidDataset(rows, encoder, cutoff_len).examples
        if len(examples) < len(rows):
            raise InputError(f"{path}: {len(rows) - len(examples)} rows have a history of empty SIDs")
        mixing = None
        if fuse:
            partner = build_row_likelihoods(fuse, rows, train, catalogue, cf_path)
            mixing = CandidateScorer(model, encoder, catalogue, counts, partner, K)

        def rank(places: list[int]) -> list[dict]:
            chosen = [examples[place] for place in places]
            if engine == "hf":
                ranked, scores = hf_rank_sids(
                    model, trie, sid_of_sequence, chosen, num_beams, encoder.end[-1], length_penalty
                )
            else:
                histories = [rows[place].history_sids for place in places] if exclude_seen else []
                seen = [[number_of[sid] for sid in history if sid in number_of] for history in histories]
                ranked, scores = rank_sids(
                    model,
                    trie,
                    sid_of_sequence,
                    chosen,
                    num_beams,
                    len(chosen),
                    length_penalty,
                    progress=False,
                    renormalize=renormalize,
                    excluded=seen if exclude_seen else None,
                    included=[included] * len(places) if included else None,
                )
            found = [
                {"predict": best[:K], "score": [round(value, 6) for value in values[:K]]}
                for best, values in zip(ranked, scores)
            ]
            if not mixing:
                return found
            mixed = mixing(places, [example.prompt_ids for example in chosen], ranked, scores)
            return [{**own, **more} for own, more in zip(found, mixed)]

        lengths = [len(example.prompt_ids) for example in examples]
        # All processes must cut the same batches, whatever memory each of them has.
        width = num_beams + K if fuse else num_beams  # the partner's items are scored like beams more
        size = batch_size or min(gather_object([choose_batch_size(model, trie, max(lengths), width)]))
        if batch_size is None and engine == "hf":
            size = max(1, size // num_beams)  # a beam is a row of its own there
        return examples, work_in_shards(rank, lengths, size, folder, stage.tick)

    grid = None
    if choosing:
        _, found = search(valid, fuse_valid_file, partials[1])
        if found is not None:
            fuse_weight, grid = choose_weight(valid, Fusion(found, catalogue, counts))
            say(f"[evaluate] --fuse {fuse}: NDCG@10 on {len(valid):,} validation rows by weight: {grid}")
    examples, lists = search(rows, test_data_path, partials[0])
    if lists is None:
        return  # another process than the main one

    predictions = [
        {
            "user_id": row.user_id,
            "item_id": row.item_id,
            "input": example.prompt,
            "output": row.sid,
            "predict": found["predict"],
            "score": found["score"],
        }
        for row, example, found in zip(rows, examples, lists, strict=True)
    ]
    histories = [row.history_sids for row in rows]
    results = score_predictions(predictions, catalogue.sids, catalogue.item_ids, counts, K, histories)
    columns = {base_model: results}
    write_json(output, predictions, indent=None)
    write_json(metrics_file, results)
    for path in (fused_file, fused_metrics):
        path.unlink(missing_ok=True)  # of an earlier run with other lists
    if fuse:
        fusion = Fusion(lists, catalogue, counts)
        ranked = [fusion(place, fuse_weight)[:K] for place in range(len(rows))]
        items, values = ([[pair[part] for pair in own] for own in ranked] for part in (0, 1))
        fused = build_item_predictions(rows, items, catalogue, values)
        how = {"fuse": fuse, "fuse_weight": fuse_weight, "chosen_on": grid and fuse_valid_file, "grid": grid}
        beside = score_item_predictions(fused, rows, catalogue, counts, K)
        columns[f"with {fuse}, weight {fuse_weight:g}"] = beside
        write_json(fused_file, fused, indent=None)
        write_json(fused_metrics, {**beside, **how})
    say(format_metrics(columns))
    if results["items_sharing_a_sid"]:
        say(f"{results['items_sharing_a_sid']} items share a SID; at item level the most popular of them comes first")
    draw_metrics(columns, picture)
    stage.done(rows=len(rows), illegal=results["illegal"], short_lists=results["short_lists"])
    for folder in partials:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    run(evaluate)
