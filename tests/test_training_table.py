"""The console table of a run: headings, one legend, rows that are means over their steps, validation lines."""

from types import SimpleNamespace

import pytest

from minionerec.training.callbacks import HEADING_EVERY, RL_COLUMNS, SFT_COLUMNS, TrainingTable


@pytest.mark.parametrize("columns", [RL_COLUMNS, SFT_COLUMNS])
def test_rows_stand_under_their_headings(columns):
    table = TrainingTable(columns)
    logs = {key: 0.123456 for key, *_ in columns}
    row, heading = table.format_row(12, logs), table.format_heading()
    assert len(row) == len(heading) and row.startswith("    12 ")
    for _, name, *_ in columns:
        end = heading.index(f" {name}") + len(name) + 1
        assert row[end - 1] != " " and row[end : end + 1] in ("", " ")
    assert "0.12s" in row and "1.2e-01" in row


def test_what_is_not_logged_leaves_its_place_empty():
    table = TrainingTable()
    whole = {key: 1.0 for key, *_ in RL_COLUMNS}
    row = table.format_row(1, {key: value for key, value in whole.items() if key != "kl"})
    assert len(row) == len(table.format_row(1, whole)) and len(row.split()) == len(RL_COLUMNS)


def test_headings_come_again_the_legend_does_not_and_validation_has_its_own_line():
    table, written = TrainingTable(), []
    table.bar = SimpleNamespace(say=written.append)
    main = SimpleNamespace(is_world_process_zero=True, global_step=7, max_steps=1000)
    for _ in range(HEADING_EVERY + 1):
        table.on_log(None, main, None, logs={"loss": 1.0, "reward": 0.5})
    assert len(written) == HEADING_EVERY + 4 and written[0] == written[HEADING_EVERY + 2] == table.format_heading()
    assert written[1] == table.format_legend() and "zero: share of groups with equal rewards" in written[1]
    table.on_log(None, main, None, logs={"eval_loss": 1.5, "eval_HR@10": 0.125, "eval_NDCG@10": 0.1, "epoch": 1})
    assert written[-1] == "     7 validation: loss 1.5000, HR@10 0.1250, NDCG@10 0.1000"
    other = SimpleNamespace(is_world_process_zero=False, global_step=7)
    table.on_log(None, other, None, logs={"loss": 1.0})
    assert len(written) == HEADING_EVERY + 5


def test_a_row_is_the_mean_of_the_steps_since_the_last_one():
    table, written = TrainingTable(SFT_COLUMNS), []
    table.bar, table._every = SimpleNamespace(say=written.append), 2
    for step, loss in enumerate([1.0, 2.0, 5.0], 1):
        state = SimpleNamespace(is_world_process_zero=True, global_step=step, max_steps=3)
        table.on_log(None, state, None, logs={"loss": loss, "learning_rate": 0.1 * step, "epoch": step})
    rows = [line.split() for line in written[2:]]
    assert [row[:3] for row in rows] == [["2", "2.00", "1.5000"], ["3", "3.00", "5.0000"]]  # the last step has a row
    assert rows[0][3] == "2.0e-01"
