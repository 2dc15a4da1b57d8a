"""The console table of a run: headings, rows under them, validation lines."""

from types import SimpleNamespace

from minionerec.training.callbacks import HEADING_EVERY, RL_COLUMNS, TrainingTable


def test_rows_stand_under_their_headings():
    table = TrainingTable()
    logs = {key: 0.123456 for key, *_ in RL_COLUMNS}
    row, heading = table.format_row(12, logs), table.format_heading()
    assert len(row) == len(heading) and row.startswith("    12 ")
    for _, name, _ in RL_COLUMNS:
        end = heading.index(f" {name}") + len(name) + 1
        assert row[end - 1] != " " and row[end : end + 1] in ("", " ")
    assert "0.12s" in row and "1.2e-01" in row


def test_what_is_not_logged_leaves_its_place_empty():
    table = TrainingTable()
    whole = {key: 1.0 for key, *_ in RL_COLUMNS}
    row = table.format_row(1, {key: value for key, value in whole.items() if key != "kl"})
    assert len(row) == len(table.format_row(1, whole)) and len(row.split()) == len(RL_COLUMNS)


def test_headings_come_again_and_validation_has_its_own_line():
    table, written = TrainingTable(), []
    table.training_bar = SimpleNamespace(write=written.append)
    main = SimpleNamespace(is_world_process_zero=True, global_step=7)
    for _ in range(HEADING_EVERY + 1):
        table.on_log(None, main, None, logs={"loss": 1.0, "reward": 0.5})
    assert len(written) == HEADING_EVERY + 3 and written[0] == written[HEADING_EVERY + 1] == table.format_heading()
    table.on_log(None, main, None, logs={"eval_HR@10": 0.125, "eval_NDCG@10": 0.1, "epoch": 1})
    assert written[-1] == "     7 validation: HR@10 0.1250, NDCG@10 0.1000"
    other = SimpleNamespace(is_world_process_zero=False, global_step=7)
    table.on_log(None, other, None, logs={"loss": 1.0})
    assert len(written) == HEADING_EVERY + 4
