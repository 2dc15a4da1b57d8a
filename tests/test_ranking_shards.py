"""Rows shared out over processes: threads stand for them here, with a barrier of their own."""

import json
import random
import threading
import time
from types import SimpleNamespace

import pytest

from minionerec.common.files import InputError
from minionerec.evaluation import shards
from minionerec.evaluation.shards import RowResults, find_batches, format_batch, prepare_folder, work_in_shards


def run(monkeypatch, folder, lengths, processes=1, batch_size=4, resuming=True, fails=lambda rank, batch: False):
    """(results on every rank, batches of rows done by every rank); the result of row r with length n is [r, n]."""
    barrier = threading.Barrier(processes)
    local = threading.local()
    monkeypatch.setattr(shards, "process_state", lambda: local.state)
    results, done = [None] * processes, [[] for _ in range(processes)]
    ticks = []

    def work_of(rank):
        def work(rows):
            if fails(rank, len(done[rank])):
                raise KeyboardInterrupt
            done[rank].append(rows)
            return [[row, lengths[row]] for row in rows]

        local.state = SimpleNamespace(
            process_index=rank,
            num_processes=processes,
            is_main_process=rank == 0,
            wait_for_everyone=lambda: barrier.wait(10),
        )
        try:
            found = work_in_shards(work, lengths, batch_size, folder, lambda: ticks.append(rank))
            results[rank] = found and list(found)
        except KeyboardInterrupt:
            # The others work on until they wait for the dead one; nothing hangs on who was faster.
            deadline = time.monotonic() + 10
            while barrier.n_waiting < processes - 1 and time.monotonic() < deadline:
                time.sleep(0.001)
            barrier.abort()
        except threading.BrokenBarrierError:
            pass

    prepare_folder(folder, resuming)
    threads = [threading.Thread(target=work_of, args=(rank,)) for rank in range(processes)]
    [thread.start() for thread in threads]
    [thread.join(20) for thread in threads]
    assert not any(thread.is_alive() for thread in threads)
    assert ticks == [0] * len(done[0])
    return results, done


def flat(batches_of_ranks):
    return [row for batches in batches_of_ranks for rows in batches for row in rows]


@pytest.mark.parametrize("processes", [1, 2, 3, 5])
@pytest.mark.parametrize("rows", [1, 9, 50])
def test_every_row_once_and_in_order(monkeypatch, tmp_path, processes, rows):
    lengths = random.Random(rows).choices(range(5, 12), k=rows)
    results, done = run(monkeypatch, tmp_path / "partial", lengths, processes)
    assert results == [[[row, length] for row, length in enumerate(lengths)]] + [None] * (processes - 1)
    assert sorted(flat(done)) == list(range(rows))
    shares = [len(batches) for batches in done]
    assert max(shares) - min(shares) <= 1


def test_the_batches_are_the_same_whatever_the_processes_and_kills(monkeypatch, tmp_path):
    lengths = random.Random(3).choices(range(5, 12), k=50)
    _, (one,) = run(monkeypatch, tmp_path / "one", lengths)
    _, three = run(monkeypatch, tmp_path / "three", lengths, 3)
    assert sorted(one) == sorted(rows for batches in three for rows in batches)
    measured = [lengths[row] for rows in one for row in rows]
    assert measured == sorted(lengths, reverse=True)  # what needs most memory comes first

    folder, again = tmp_path / "killed", []
    for processes, last in ((3, 1), (2, 0)):  # three processes of which rank 1 dies, then two
        results, done = run(
            monkeypatch, folder, lengths, processes, fails=lambda rank, n, last=last: (rank, n) == (1, last)
        )
        assert results == [None] * processes
        again += [rows for batches in done for rows in batches]
    (results,), (done,) = run(monkeypatch, folder, lengths)
    assert len(results) == 50 and len(again) == 12 and len(done) == 1
    assert sorted(again + done) == sorted(one)


def test_a_torn_line_is_done_again(monkeypatch, tmp_path):
    lengths = [7] * 8
    run(monkeypatch, tmp_path, lengths)
    path = tmp_path / "rank0.jsonl"
    whole = path.read_text()
    path.write_text(whole[:-5])
    assert [sorted(batch.rows) for batch in find_batches(path)] == [[0, 1, 2, 3]]
    (results,), (done,) = run(monkeypatch, tmp_path, lengths)
    assert done == [[4, 5, 6, 7]] and results == [[row, 7] for row in range(8)]
    assert path.read_text() == whole


def test_reading_goes_on_after_what_was_read(tmp_path):
    path, results = tmp_path / "rank0.jsonl", RowResults(tmp_path, 5)
    values = {4: ["ü4\u2028", 1e-9], 2: None, 0: {"predict": ["<a_1>"]}, 3: "", 1: 7}
    lines = [format_batch(rows, [values[row] for row in rows]) for rows in ([4, 2], [0], [3, 1])]
    assert json.loads(lines[0])["results"] == [values[4], values[2]]
    assert results.collect() == 0
    path.write_bytes(lines[0] + lines[1][:9])
    assert results.collect() == 2 and results.collect() == 0 and results.missing.tolist() == [0, 1, 3]
    path.write_bytes(lines[0] + lines[1])
    (tmp_path / "rank1.jsonl").write_bytes(lines[2])
    assert results.collect() == 3 and not len(results.missing)
    assert list(results) == list(results) == [values[row] for row in range(5)]
    assert [batch.rows for batch in find_batches(path, len(lines[0]))] == [[0]]


def test_the_folder_of_another_run_is_removed(tmp_path):
    folder = tmp_path / "partial"
    prepare_folder(folder, resuming=False)
    folder.mkdir()
    (folder / "rank7.jsonl").write_bytes(format_batch([0], [1]))
    prepare_folder(folder, resuming=True)
    assert (folder / "rank7.jsonl").exists()
    prepare_folder(folder, resuming=False)
    assert not folder.exists()


@pytest.mark.parametrize(
    "line",
    [
        *("what?", "[1]", '{"rows": [1]}', '{"rows": [1, 2], "results": [1]}'),
        *(f'{{"rows": [1], "bytes": {sizes}, "results": [1]}}' for sizes in ("[2]", "[]", "[1, 1]", "1", '["a"]')),
    ],
)
def test_a_file_that_is_something_else(tmp_path, line):
    (tmp_path / "rank3.jsonl").write_bytes(format_batch([0], [1]) + line.encode() + b"\n")
    with pytest.raises(InputError, match="rank3.jsonl: not the finished batches of an earlier run; remove the folder"):
        prepare_folder(tmp_path, resuming=True)


def test_a_disk_that_is_not_shared(monkeypatch, tmp_path):
    alone = SimpleNamespace(process_index=0, num_processes=2, is_main_process=True, wait_for_everyone=lambda: None)
    monkeypatch.setattr(shards, "process_state", lambda: alone)
    with pytest.raises(InputError, match="4 rows of other processes are not there; all processes must share this disk"):
        work_in_shards(lambda rows: rows, [1] * 8, 4, tmp_path, lambda: None)
