"""Reading rows, indexes and catalogues, and turning rows into prompts: the same ones for SFT, RL and evaluation."""

import csv
import io
import json
import random
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import make_dataset
from tokenizers import processors
from transformers import AddedToken, PreTrainedTokenizerFast

from data import (
    EvalSidDataset,
    RLSeqTitle2SidDataset,
    RLTitle2SidDataset,
    SidDataset,
    SidItemFeatDataset,
    SidSFTDataset,
    TitleHistory2SidSFTDataset,
)
from minionerec.common.files import InputError
from minionerec.common.records import (
    SID_TOKEN,
    Catalogue,
    Row,
    check_index_against_info,
    check_rows,
    parse_list_cell,
    read_index,
    read_info,
    read_rows,
)
from minionerec.common.row_files import CSV_COLUMNS
from minionerec.common.row_table import draw_rows
from minionerec.language.models import BOS, EOS, train_tokenizer
from minionerec.language.prompts import Encoder, load_prompts

SIDS = [f"<a_{item}><b_{item % 3}>" for item in range(40)]


def make_tokenizer(bos: bool = True, closes: bool = False, texts=("a few words", "to train on")):
    """Byte-level BPE with the SID tokens; with `bos` it opens every text, with `closes` it also ends it."""
    tokenizer = train_tokenizer(texts, 300)
    if not bos:
        tokenizer.backend_tokenizer.post_processor = processors.ByteLevel()
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token=EOS)
    elif closes:
        special = [(token, tokenizer.convert_tokens_to_ids(token)) for token in (BOS, EOS)]
        template = processors.TemplateProcessing(f"{BOS} $A {EOS}", special_tokens=special)
        tokenizer.backend_tokenizer.post_processor = template
    tokens = sorted({token for sid in SIDS for token in SID_TOKEN.findall(sid)})
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in tokens])
    return tokenizer


TOKENIZER = make_tokenizer()


def encoder(prompts="compact", tokenizer=TOKENIZER, cutoff_len=512):
    return Encoder(tokenizer, load_prompts(prompts), cutoff_len)


def make_row(history, target, user="U", titles=None):
    title = titles or (lambda item: f"Thing {item}")
    return Row(
        user,
        tuple(map(title, history)),
        tuple(history),
        tuple(SIDS[item] for item in history),
        title(target),
        target,
        SIDS[target],
    )


def timeline(user, items, longest=10):
    """The rows of one user: every item but the first is a target once."""
    return [make_row(items[max(0, place - longest) : place], items[place], user) for place in range(1, len(items))]


# ---------------------------------------------------------------------------------------------------------------- files
def write_rows(path, rows, columns=CSV_COLUMNS, cell=repr):
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        for row in rows:
            record = dict(
                user_id=row.user_id,
                history_item_title=cell(list(row.history_titles)),
                item_title=row.title,
                history_item_id=cell(list(row.history_ids)),
                item_id=row.item_id,
                history_item_sid=cell(list(row.history_sids)),
                item_sid=row.sid,
            )
            writer.writerow([record[column] for column in columns])
    return path


NASTY = [
    "it's",
    '6" nail',
    "a, b",
    "back\\slash",
    "\\'",
    "\"'",
    "Ünïcode 牛 \U0001f980",
    "line\nbreak\ttab",
    "['x']",
    "",
    "\u2028",
    "#",
    "','",
]


@pytest.mark.parametrize("cell", [repr, json.dumps, lambda value: json.dumps(value, ensure_ascii=False)])
def test_rows_round_trip_with_nasty_titles(tmp_path, cell):
    count = len(NASTY)
    rows = [
        make_row([1, 2, 3], 4, titles=lambda item, shift=shift: NASTY[(item + shift) % count]) for shift in range(count)
    ]
    assert read_rows(write_rows(tmp_path / "x.csv", rows, cell=cell)) == rows


def test_columns_may_stand_in_any_order_beside_others(tmp_path):
    rows = [make_row([1, 2], 3)]
    assert read_rows(write_rows(tmp_path / "x.csv", rows, columns=CSV_COLUMNS[::-1])) == rows


texts = st.text(st.characters(codec="utf-8"), max_size=12) | st.text("'\"\\,[] nabc\n", max_size=8)


@given(st.lists(texts, max_size=5))
@settings(max_examples=300, deadline=None)
def test_any_list_of_texts_is_read_back(values):
    for written in (repr(values), json.dumps(values), json.dumps(values, ensure_ascii=False)):
        assert parse_list_cell(written, "x") == values
        file = io.StringIO(newline="")
        csv.writer(file).writerow([written])
        assert parse_list_cell(next(csv.reader(io.StringIO(file.getvalue(), newline="")))[0], "x") == values


@given(st.text("'\"\\,[]() nab1\n#", max_size=10))
@settings(max_examples=500, deadline=None)
def test_the_fast_way_never_differs_from_the_literal_parser(inner):
    """Whatever a cell holds: read as Python reads it, or refused."""
    import ast
    import warnings

    text = f"['{inner}']"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about escapes that Python does not know
        try:
            expected = ast.literal_eval(text)
        except (SyntaxError, ValueError):
            expected = None
        if isinstance(expected, list):
            assert parse_list_cell(text, "x") == expected
        else:
            with pytest.raises(InputError):
                parse_list_cell(text, "x")


def csv_text(**changes):
    cells = dict(
        user_id="U1",
        history_item_title="['T1', 'T2']",
        item_title="T3",
        history_item_id="[1, 2]",
        item_id="3",
        history_item_sid="['<a_1>', '<a_2>']",
        item_sid="<a_3>",
    )
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, CSV_COLUMNS)
    writer.writeheader()
    writer.writerow(cells)
    writer.writerow({**cells, **changes})
    return file.getvalue()


@pytest.mark.parametrize(
    "text, said",
    [
        (csv_text().replace("history_item_sid", "sids"), "line 1: missing column history_item_sid"),
        ("", "the file is empty"),
        (csv_text().splitlines()[0] + "\n", "no rows"),
        (csv_text(history_item_id="[1, 2"), "line 3, column history_item_id: expected a list literal"),
        (csv_text(history_item_title="__import__('os').system('true')"), "line 3, column history_item_title"),
        (csv_text(history_item_sid="['<a_1>', chr(60)]"), "line 3, column history_item_sid: expected a list literal"),
        (csv_text(history_item_id="{1: 2}"), "line 3, column history_item_id: expected a list literal"),
        (csv_text(history_item_id="[1]"), "line 3: histories of different length: 2 titles, 1 ids, 2 SIDs"),
        (
            csv_text(history_item_title="[]", history_item_id="[]", history_item_sid="[]"),
            "line 3: the history is empty",
        ),
        (csv_text(item_id="three"), "line 3: item ids must be whole numbers"),
        (csv_text(item_id="3.5"), "line 3: item ids must be whole numbers"),
        (csv_text(history_item_id="[1, 2.5]"), "line 3: item ids must be whole numbers"),
        (csv_text(history_item_id="[1, 1e999]"), "line 3: item ids must be whole numbers"),
        (csv_text(history_item_id="[1, None]"), "line 3: item ids must be whole numbers"),
        (csv_text().rstrip() + ",more\n", "line 3: expected 7 fields"),
        (csv_text() + "U1,['T1']\n", "line 4: expected 7 fields"),
    ],
)
def test_wrong_rows_are_named_by_file_and_line(tmp_path, text, said):
    path = tmp_path / "train.csv"
    path.write_text(text, newline="")
    with pytest.raises(InputError) as error:
        read_rows(path, "train_file")
    assert str(error.value).startswith(str(path)) and said in str(error.value) and "\n" not in str(error.value)


def test_a_missing_file_is_named_with_its_flag(tmp_path):
    for read in (read_rows, read_index):
        with pytest.raises(InputError, match="--the_flag: .*nothing.x: no such file"):
            read(tmp_path / "nothing.x", "the_flag")
    with pytest.raises(InputError, match="--info_file: .*nothing.x: no such file"):
        read_info(tmp_path / "nothing.x")


@pytest.mark.parametrize(
    "text, said",
    [
        ('{"0": ["<a_1>"],\n "1": ["<a_2>"', "line 2: not valid JSON"),
        ("{}", "expected an object"),
        ('[["<a_1>"]]', "expected an object"),
        ('{"0": ["<a_1>"], "1": []}', "item 1: expected a list of tokens"),
        ('{"0": ["<a_1>"], "1": "<a_1>"}', "item 1: expected a list of tokens"),
        ('{"0": ["<a_1>", "b"]}', "item 0: expected a list of tokens"),
        ('{"0": ["<a_1><b_2>"]}', "item 0: expected a list of tokens"),
        ('{"0": ["<a_1>", 3]}', "item 0: expected a list of tokens"),
        ('{"zero": ["<a_1>"]}', "item id 'zero' is not a whole number"),
    ],
)
def test_wrong_indexes(tmp_path, text, said):
    path = tmp_path / "toy.index.json"
    path.write_text(text)
    with pytest.raises(InputError) as error:
        read_index(path)
    assert str(error.value).startswith(str(path)) and said in str(error.value)


def test_an_index_of_mixed_depth_is_read(tmp_path):
    path = tmp_path / "toy.index.json"
    path.write_text('{"0": ["<a_1>", "<b_2>"], "7": ["<a_1>", "<b_2>", "<c_3>", "<d_4>"]}')
    assert read_index(path) == {0: ("<a_1>", "<b_2>"), 7: ("<a_1>", "<b_2>", "<c_3>", "<d_4>")}


def test_rows_must_agree_with_the_catalogue():
    catalogue = Catalogue(SIDS, ["title"] * len(SIDS), list(range(len(SIDS))))
    rows = [make_row([1, 2], 3), make_row([1, 5], 4)]
    check_rows(rows, catalogue, "x.csv", "info.txt")

    def without(item):
        kept = [other for other in catalogue.item_ids if other != item]
        return Catalogue([SIDS[other] for other in kept], ["title"] * len(kept), kept)

    for item in (4, 5):  # a target, a history item
        with pytest.raises(InputError, match=rf"^x.csv, row 2: item {item} is not in info.txt"):
            check_rows(rows, without(item), "x.csv", "info.txt")
    check_rows(rows, without(5), "x.csv", "info.txt", history=False)
    with pytest.raises(InputError, match=r"^x.csv, row 2: item 4 is not in info.txt"):
        check_rows(rows, without(4), "x.csv", "info.txt", history=False)
    other = Catalogue([*SIDS[:2], "<a_9>", *SIDS[3:]], catalogue.titles, catalogue.item_ids)
    with pytest.raises(InputError, match=r"^x.csv, row 1: item 2 has SID <a_2><b_2>, but info.txt says <a_9>"):
        check_rows(rows, other, "x.csv", "info.txt")


def test_the_index_must_agree_with_the_info_file():
    catalogue = Catalogue(SIDS, ["title"] * len(SIDS), list(range(len(SIDS))))
    index = {item: tuple(SID_TOKEN.findall(sid)) for item, sid in enumerate(SIDS)}
    check_index_against_info(index, catalogue, "x.index.json", "info.txt")
    for change, said in (({3: ("<a_9>",)}, "item 3 has SID <a_9>, info.txt says"), ({4: ()}, "item 4 has SID none")):
        with pytest.raises(InputError, match=f"^x.index.json: {said}"):
            check_index_against_info(index | change, catalogue, "x.index.json", "info.txt")


def test_random_rows_keep_their_order():
    rows = [make_row([1], item) for item in range(2, 40)]
    drawn = draw_rows(rows, 7, random.Random(3))
    assert len(drawn) == 7 and [row.item_id for row in drawn] == sorted(row.item_id for row in drawn)
    assert drawn == draw_rows(rows, 7, random.Random(3)) != draw_rows(rows, 7, random.Random(4))
    assert draw_rows(rows, -1, random.Random(3)) == rows == draw_rows(rows, 99, random.Random(3))


@pytest.mark.parametrize(
    "text, said",
    [
        ("<a_1>\tOne\t1\n<a_2>\tTwo\n", "line 2: expected sid<TAB>title<TAB>item_id"),
        ("<a_1> One 1\n", "line 1: expected"),
        ("<a_1>\tOne\t1\n<a_2>\tTwo\ttwo\n", "line 2: expected"),
        ("<a_1>\tOne\t\u00b2\n", "line 1: expected"),  # a digit that is no number
        ("a_1\tOne\t1\n", "line 1: expected"),
        ("<a_1>x\tOne\t1\n", "line 1: expected"),
        ("\tOne\t1\n", "line 1: expected"),
        ("<a_1>\tOne\t1\n\n<a_1>\tTwo\t2\n", "line 3: SID <a_1> belongs to the item of line 1 already"),
        ("<a_1>\tOne\t1\n<a_2>\tTwo\t1\n", "line 2: item 1 stands on line 1 already"),
        ("", "no items"),
        ("\n", "no items"),
    ],
)
def test_wrong_info_files(tmp_path, text, said):
    path = tmp_path / "info.txt"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError) as error:
        read_info(path)
    assert str(error.value).startswith(str(path)) and said in str(error.value)


def test_shared_sids_only_on_request(tmp_path):
    path = tmp_path / "info.txt"
    path.write_text("<a_1>\tOne 'x', \u2028\t1\r\n<a_1>\t\t2\n<a_1><b_2>\tThree\t0\n", encoding="utf-8")
    with pytest.raises(InputError, match="--shared_sids True"):
        read_info(path)
    found = read_info(path, shared_sids=True)
    assert found == Catalogue(["<a_1>", "<a_1>", "<a_1><b_2>"], ["One 'x', \u2028", "", "Three"], [1, 2, 0])


# -------------------------------------------------------------------------------------------------------------- prompts
@pytest.mark.parametrize("prompts", ["compact", "worded"])
@pytest.mark.parametrize("bos", [True, False])
def test_the_same_prompt_in_sft_rl_and_evaluation(prompts, bos):
    """Trap 1."""
    rows = timeline("U", list(range(15)))
    coder = encoder(prompts, make_tokenizer(bos))
    sft, rl, evaluation = (kind(rows, coder) for kind in (SidSFTDataset, SidDataset, EvalSidDataset))
    for trained, rolled, searched in zip(sft, rl, evaluation, strict=True):
        assert trained.prompt == rolled.prompt == searched.prompt
        assert trained.prompt_ids == rolled.prompt_ids == searched.prompt_ids
        assert trained.target_ids == rolled.target_ids == searched.target_ids
    if prompts == "worded":
        assert TitleHistory2SidSFTDataset(rows, coder).examples == RLSeqTitle2SidDataset(rows, coder).examples
        catalogue = Catalogue(SIDS[:5], list("abcde"), list(range(5)))
        trained = SidItemFeatDataset(catalogue, coder, tasks=("title2sid",)).examples
        assert trained == RLTitle2SidDataset(catalogue, coder).examples and len(trained) == 5


def test_compact_prompts_are_bare_sids():
    (example,) = EvalSidDataset([make_row([4, 5], 6)], encoder())
    assert example.prompt == SIDS[4] + SIDS[5]
    ids = TOKENIZER.convert_tokens_to_ids
    assert example.prompt_ids == ids([BOS, "<a_4>", "<b_1>", "<a_5>", "<b_2>"])
    assert example.target_ids == ids(["<a_6>", "<b_0>", EOS])


def test_targets_travel_in_the_row():
    """Trap 3: equal histories with different targets, in one split, keep their own."""
    rows = [make_row([1, 2], target, user) for user, target in (("A", 3), ("B", 4), ("A", 5), ("B", 4))]
    for kind in (SidSFTDataset, SidDataset, EvalSidDataset):
        examples = list(kind(rows, encoder()))
        assert [(e.user_id, e.item_id, e.sid) for e in examples] == [(r.user_id, r.item_id, r.sid) for r in rows]
        assert [e.target_ids for e in examples] == encoder().target_ids("next_sid", [r.sid for r in rows])


# ------------------------------------------------------------------------------------------------------------- datasets
def test_cutoff_drops_the_oldest_history_and_keeps_the_target():
    rows = [make_row([1, 2, 3, 4], 5), make_row([6], 7)]
    whole = EvalSidDataset(rows, encoder(cutoff_len=12))  # start + 4 x 2 + target of 2 + end
    assert whole[0].prompt == "".join(SIDS[1:5])
    for cutoff, kept in ((11, 3), (10, 3), (9, 2), (6, 1)):
        cut = EvalSidDataset(rows, encoder(cutoff_len=cutoff))
        assert cut[0].prompt == "".join(SIDS[5 - kept : 5])
        assert len(cut[0].prompt_ids) == 1 + 2 * kept and cut[0].target_ids == whole[0].target_ids
        assert cut[1] == whole[1]
    with pytest.raises(InputError, match="--cutoff_len 5: row 1 needs 6 tokens"):
        EvalSidDataset(rows, encoder(cutoff_len=5))


def test_cutoff_on_worded_titles():
    row = make_row([1, 2, 3], 4, titles=lambda item: f"Title {item}")
    whole = TitleHistory2SidSFTDataset([row], encoder("worded"))[0]
    length = len(whole.prompt_ids) + len(whole.target_ids)
    cut = TitleHistory2SidSFTDataset([row], encoder("worded", cutoff_len=length - 1))[0]
    assert "Title 1" in whole.prompt and "Title 1" not in cut.prompt and "Title 2, Title 3" in cut.prompt
    assert cut.prompt == whole.prompt.replace("Title 1, ", "")


def test_alignment_leaves_out_what_has_no_answer():
    """No title, and titles of two items: the second only for title -> SID."""
    catalogue = Catalogue(SIDS[:4], ["Same", "", "Same", "Own"], [0, 1, 2, 3])
    found = SidItemFeatDataset(catalogue, encoder("worded"))
    assert [(e.item_id, e.sid) for e in found if e.group.startswith("title2sid")] == [(3, SIDS[3])]
    assert [e.item_id for e in found if e.group.startswith("sid2title")] == [0, 2, 3]
    titles = [TOKENIZER.decode(e.target_ids[:-1]) for e in found if e.group.startswith("sid2title")]
    assert titles == ["Same", "Same", "Own"]


def cut_rows():
    rng = random.Random(0)
    timelines = {
        "long": [rng.randrange(40) for _ in range(37)],
        "short": list(range(8)),
        "exact": list(range(11)),
        "other": [rng.randrange(40) for _ in range(23)],
    }
    return [row for user, items in timelines.items() for row in timeline(user, items)]


def test_cut_histories_keep_every_target_and_shorten_from_the_old_end():
    rows = cut_rows()
    data = SidSFTDataset(rows, encoder(), cut_histories=True, seed=3)
    whole = list(SidSFTDataset(rows, encoder()))
    changed = 0
    for epoch in range(4):
        data.set_epoch(epoch)
        assert [(e.user_id, e.item_id, e.sid) for e in data] == [(r.user_id, r.item_id, r.sid) for r in rows]
        assert [e.target_ids for e in data] == [e.target_ids for e in whole]
        for row, mine, full in zip(rows, data, whole, strict=True):
            assert mine.prompt and "".join(row.history_sids).endswith(mine.prompt)
            if row.user_id in ("short", "exact"):  # at most 10 targets: their timeline fits one history
                assert mine == full
            changed += mine != full
    assert changed > 0


def test_cut_histories_of_a_group_share_one_prefix():
    """Within a piece of a timeline every history begins at the same item: their prompts are nested."""
    data = SidSFTDataset(cut_rows(), encoder(), cut_histories=True, seed=3)
    for epoch in range(4):
        data.set_epoch(epoch)
        groups = {}
        for example in data:
            groups.setdefault(example.group, []).append(example)
        assert max(map(len, groups.values())) == 10
        for examples in groups.values():
            assert len({e.user_id for e in examples}) == 1
            for first, second in pairwise(examples):
                assert second.prompt_ids[: len(first.prompt_ids)] == first.prompt_ids
                assert len(second.prompt_ids) == len(first.prompt_ids) + 2
        # Five pieces at most for 36 targets, however they fall; one tree for a short user.
        assert sum(group.startswith("long") for group in groups) <= 5 and "short" in groups


def test_cuts_are_a_function_of_seed_and_epoch():
    rows = cut_rows()

    def prompts(data):
        return [e.prompt for e in data]

    first, second = (SidSFTDataset(rows, encoder(), cut_histories=True, seed=3) for _ in range(2))
    other_seed = SidSFTDataset(rows, encoder(), cut_histories=True, seed=4)
    start = prompts(first)
    assert start == prompts(second)
    seen = []
    for epoch in range(3):
        first.set_epoch(epoch), other_seed.set_epoch(epoch)
        seen.append((prompts(first), prompts(other_seed)))
    second.set_epoch(2)  # as after resuming: earlier epochs were never asked for
    assert prompts(second) == seen[2][0] and seen[0][0] == start
    assert seen[0] != seen[1] and seen[1] != seen[2] and all(mine != theirs for mine, theirs in seen)


def test_without_cutting_epochs_are_equal():
    data = SidSFTDataset(cut_rows(), encoder())
    before = list(data)
    data.set_epoch(5)
    assert list(data) == before


def test_the_toy_dataset_reads_back(tmp_path):
    """Files as the pipeline writes them, SIDs of three and of four tokens."""
    paths = make_dataset(tmp_path, deep=True)
    index, catalogue = read_index(paths["sid_index_path"]), read_info(paths["info_file"])
    assert {len(tokens) for tokens in index.values()} == {3, 4}
    assert dict(zip(catalogue.item_ids, catalogue.sids, strict=True)) == {
        item: "".join(tokens) for item, tokens in index.items()
    }
    for name in ("train_file", "eval_file", "test_data_path"):
        check_rows(read_rows(paths[name]), catalogue, paths[name], paths["info_file"])
