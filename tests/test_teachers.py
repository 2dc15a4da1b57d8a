"""Teachers: what they leave out, their walks, and the soft labels of their targets beside whole sequences."""

import random
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_data import SIDS, encoder, make_row
from test_tasks import random_inputs
from tiny import tiny_model

from data import TASKS, TaskInputs
from minionerec.common.files import InputError
from minionerec.common.records import Catalogue
from minionerec.language.soft_targets import TaughtPaths, draw_columns
from minionerec.recommenders import likeliest, registry
from minionerec.recommenders.folds import name_fold, part_users, write_parts
from minionerec.recommenders.likeliest import rank_by_likelihood, select_likeliest
from minionerec.recommenders.likelihoods import WholeLikelihoods, add_likelihoods, are_sound
from minionerec.recommenders.networks import build_network, save_network
from minionerec.recommenders.registry import (
    BaselineInputs,
    BuiltBaselines,
    build_baseline,
    build_without_row,
    is_baseline,
    parse_sum,
    register_baseline,
)
from minionerec.recommenders.sum_weights import choose_sum_weights, find_target_rank
from minionerec.recommenders.teachers import LONGEST_WALK, TAUGHT_ITEMS, SoftTargets, Teacher, draw_walks
from minionerec.search.prefix_tree import SoftLabels, batch_trees, compute_tree_log_probs
from minionerec.training.settings import SFTFlags
from minionerec.training.sft_setup import check_sft_flags

WORDS = "steel brass bolt nut glass flask thread long short metric".split()


def make_inputs(seed, items=30, rows=60):
    """Rows with repeated items and a catalogue whose titles share words."""
    rng = random.Random(seed)
    catalogue = Catalogue(SIDS[:items], [" ".join(rng.choices(WORDS, k=4)) for _ in range(items)], list(range(items)))
    train = [
        make_row(rng.choices(range(items), k=rng.randint(1, 6)), rng.randrange(items), f"U{rng.randrange(12)}")
        for _ in range(rows)
    ]
    return BaselineInputs(train, catalogue.with_counts(train))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", ["transitions", "cooccurrence", "cooccurrence_wide", "content", "transitions+content"])
def test_a_row_is_taught_as_if_it_had_never_been_seen(name, seed):
    inputs = make_inputs(seed)
    taught = build_without_row(name, inputs)(inputs.train_rows)
    for number, row in enumerate(inputs.train_rows):
        others = [*inputs.train_rows[:number], *inputs.train_rows[number + 1 :]]
        (expected,) = build_baseline(name, replace(inputs, train_rows=others))([row.history_ids])
        assert taught[number] == pytest.approx(expected, abs=1e-9)


def test_cooccurrence_by_hand():
    rows = [make_row([0, 1], 2, "U1"), make_row([1], 2, "U2")]
    inputs = BaselineInputs(rows, Catalogue(SIDS[:4], ["red bolt", "blue nut", "saw", "tape"], list(range(4))))
    sums = {0: 0.3, 1: 2.0, 2: 0.1 * 2.3}
    last, before = {2: 2.0 / (sums[1] + 3)}, {2: 0.5 * 0.3 / (sums[0] + 3)}
    assert build_baseline("cooccurrence", inputs)([[0, 1], [3]]) == [{2: pytest.approx(1.0)}, {}]
    (found,) = build_baseline("cooccurrence", inputs)([[1, 2]])
    back = {1: 0.2 / (sums[2] + 3), 0: 0.03 / (sums[2] + 3)}
    parts = {**back, 2: 0.5 * last[2]}
    assert found == pytest.approx({item: part / sum(parts.values()) for item, part in parts.items()})
    (wide,) = build_baseline("cooccurrence_wide", inputs)([[2]])
    assert wide == pytest.approx({1: 2 / 2.8, 0: 0.8 / 2.8})  # the ways back, .3 (1 + 1) and .3 * .8
    explain = registry.BASELINES["cooccurrence"].explain(inputs)
    assert before[2] < last[2] and explain([0, 1], [2, 3]) == ["bought with blue nut", ""]
    with pytest.raises(InputError, match="--train_file is missing"):
        build_baseline("cooccurrence", replace(inputs, train_rows=[]))


def test_a_baseline_that_cannot_leave_out_a_row_is_built_without_the_users_of_each_part(monkeypatch):
    monkeypatch.setattr(registry, "BASELINES", dict(registry.BASELINES))
    built = []

    def build_counts(inputs):
        built.append({row.user_id for row in inputs.train_rows})
        users = len(built[-1])
        return lambda histories: [{0: float(users)} for _ in histories]

    register_baseline("counts", build_counts)
    inputs = make_inputs(0)
    predict = build_without_row("counts", inputs)
    everyone = {row.user_id for row in inputs.train_rows}
    assert len(built) == 5 and set.union(*(everyone - users for users in built)) == everyone
    assert sum(len(everyone - users) for users in built) == len(everyone)
    for row, answer in zip(inputs.train_rows, predict(inputs.train_rows), strict=True):
        unseen = [users for users in built if row.user_id not in users]
        assert len(unseen) == 1 and answer == {0: len(unseen[0])}


def save_folds(folder, inputs, model="gru4rec", folds=3):
    """What `sasrec.py --folds` leaves, with random weights; {user: the network without this user}."""
    settings = {"model": model, "hidden_size": 8, "num_layers": 1, "num_heads": 2, "dropout": 0.0, "max_history": 5}
    parts = part_users(inputs.train_rows, folds)
    unseen = {}
    for fold, users in enumerate(parts):
        torch.manual_seed(fold)
        network = build_network(inputs.catalogue.item_ids, settings).eval()
        save_network(network, name_fold(folder, fold) / "model")
        unseen |= dict.fromkeys(users, network)
    save_network(build_network(inputs.catalogue.item_ids, settings), folder / "model")
    write_parts(folder, parts)
    return unseen


@pytest.mark.parametrize("model", ["sasrec", "gru4rec"])
def test_a_train_row_is_taught_by_the_network_that_has_not_seen_its_user(tmp_path, model):
    inputs = make_inputs(3)
    unseen = save_folds(tmp_path, inputs, model)
    inputs = replace(inputs, files={"cf_path": str(tmp_path / "model")})
    assert len(set(map(id, unseen.values()))) == 3
    predict = build_without_row(model, inputs)
    for row, answer in zip(inputs.train_rows, predict(inputs.train_rows), strict=True):
        network = unseen[row.user_id]
        expected = network.score_histories([row.history_ids])[0].exp().tolist()
        assert dict(answer.items()) == pytest.approx(dict(zip(network.item_ids, expected, strict=True)), abs=1e-6)
    with pytest.raises(InputError, match="user 'stranger' of the train rows was in none of the parts"):
        predict([replace(inputs.train_rows[0], user_id="stranger")])
    taught = Teacher(f"content+{model}", inputs).teach_rows(inputs.train_rows)
    assert np.allclose(taught.probabilities.sum(axis=1), 1)
    if model == "gru4rec":
        with pytest.raises(InputError, match="is a gru4rec|gru4rec"):
            save_folds(tmp_path / "other", inputs, "sasrec")
            build_without_row(model, replace(inputs, files={"cf_path": str(tmp_path / "other" / "model")}))


def test_a_baseline_of_a_file_that_cannot_leave_out_a_row_teaches_none(monkeypatch):
    monkeypatch.setattr(registry, "BASELINES", dict(registry.BASELINES))
    register_baseline("trained", lambda inputs: lambda histories: [{0: 1.0} for _ in histories], "cf_path")
    with pytest.raises(InputError, match="--teacher trained: --cf_path was trained on the rows that it would teach"):
        build_without_row("content+trained", replace(make_inputs(0), files={"cf_path": "model"}))


def test_a_network_that_was_trained_on_the_rows_cannot_teach_them(tmp_path):
    inputs = replace(make_inputs(0), files={"cf_path": str(tmp_path / "model")})
    with pytest.raises(InputError, match="--teacher sasrec: --cf_path .*model was trained on the rows that it would"):
        build_without_row("transitions+sasrec", inputs)
    (tmp_path / "folds").mkdir()
    (tmp_path / "folds" / "parts.json").write_text("[[1, 2]]")
    with pytest.raises(InputError, match="parts.json: expected a list of lists of user ids"):
        build_without_row("transitions+sasrec", inputs)


def test_sums_by_hand():
    assert add_likelihoods([{1: 3.0, 2: 1.0}, {2: 0.5}]) == {1: 0.375, 2: 0.625}
    assert add_likelihoods([{1: 3.0, 2: 1.0}, {2: 0.5}], [1, 3]) == {1: 0.1875, 2: 0.8125}
    assert add_likelihoods([{}, {2: 0.5}]) == {2: 1.0}  # a part that says nothing takes nothing away
    assert add_likelihoods([{}, {}]) == {}
    assert is_baseline("transitions+content") and is_baseline("content")
    assert not any(map(is_baseline, ("", "content+", "content+content", "content+luck", "popularity")))


@pytest.mark.parametrize("name, weights", [("transitions+content:3", [1, 3]), ("transitions:0.5+content", [0.5, 1])])
def test_a_teacher_whose_parts_have_weights(name, weights):
    inputs = make_inputs(5)
    histories = [row.history_ids for row in inputs.train_rows]
    for build, asked in ((build_baseline, histories), (build_without_row, inputs.train_rows)):
        of_parts = zip(*(build(part, inputs)(asked) for part in ("transitions", "content")), strict=True)
        for found, parts in zip(build(name, inputs)(asked), of_parts, strict=True):
            assert found == pytest.approx(add_likelihoods(parts, weights))


@pytest.mark.parametrize("name", ["content:", "content:0", "content:-1", "content:nan", "content:inf", "content:x"])
def test_weights_that_are_none(name):
    with pytest.raises(InputError, match=f"--teacher {name}: expected NAME or NAME:WEIGHT with a positive number"):
        parse_sum(name)
    assert not is_baseline("content:3")  # --names and --fuse choose weights on validation rows


@pytest.mark.parametrize("seed", range(20))
def test_arrays_of_likelihoods_read_add_up_and_sort_as_dicts_do(seed):
    generator = np.random.default_rng(seed)
    count = int(generator.integers(1, 60))
    item_ids = generator.permutation(100)[:count].tolist()
    column_of = {item: column for column, item in enumerate(item_ids)}
    # Few different values, so that there are ties, and some of 0.
    arrays = [(generator.integers(0, 4, count) / 8).astype(np.float32) for _ in range(2)]
    whole = [WholeLikelihoods(item_ids, column_of, values) for values in arrays]
    dicts = [dict(zip(item_ids, values.tolist(), strict=True)) for values in arrays]
    few = {item: float(generator.random()) for item in item_ids[: count // 3]}
    counts = {item: int(generator.integers(0, 3)) for item in item_ids}
    assert whole[0] == dicts[0] and list(whole[0].items()) == list(dicts[0].items())
    assert list(whole[0].values()) == list(dicts[0].values()) and 100 not in whole[0] and whole[0].get(100) is None
    for k in (1, 5, count, count + 3):
        assert select_likeliest(whole[0], k, counts) == select_likeliest(dicts[0], k, counts)
    for weights in (None, [1.0, 0.3, 3.0]):
        ours = add_likelihoods([few, *whole], weights)
        theirs = add_likelihoods([few, *dicts], weights)
        assert {item: p for item, p in ours.items() if p} == pytest.approx({i: p for i, p in theirs.items() if p})


@pytest.mark.parametrize("values", [[-0.1, 0.2], [float("nan"), 0.1], [float("inf"), 0.1]])
def test_arrays_that_are_no_likelihoods(values):
    items = [4, 7]
    assert are_sound(WholeLikelihoods(items, {4: 0, 7: 1}, np.array([0.0, 0.3])))
    assert not are_sound(WholeLikelihoods(items, {4: 0, 7: 1}, np.array(values)))


@pytest.mark.parametrize("seed", range(3))
def test_weights_of_sums_by_ranking_everything(seed):
    inputs = make_inputs(seed, rows=80)
    rows = make_inputs(seed + 100, rows=40).train_rows
    built = BuiltBaselines(inputs)
    weights, tried = choose_sum_weights("transitions+content", built, rows)
    for text, figure in tried.items():
        predict = built.combine("transitions+content", [float(weight) for weight in text.split(":")])
        rankings, scores = rank_by_likelihood(predict, [row.history_ids for row in rows], inputs.catalogue, 10)
        gain = 0.0
        for row, ranked, values in zip(rows, rankings, scores, strict=True):
            if row.item_id in ranked and values[ranked.index(row.item_id)] > 0:
                gain += 1 + 1 / np.log2(ranked.index(row.item_id) + 2)
        assert figure == pytest.approx(gain / len(rows), abs=2e-6)
    assert tried[":".join(f"{weight:g}" for weight in weights)] == max(tried.values()) and weights[0] == 1


def test_ranks_with_ties():
    counts = {1: 5, 2: 9}
    likelihoods = {1: 0.2, 2: 0.2, 3: 0.2, 4: 0.4, 5: 0.0}
    assert [find_target_rank(likelihoods, item, counts) for item in (4, 2, 1, 3, 5, 6)] == [1, 2, 3, 4, None, None]


def test_the_best_items_are_kept_and_add_up_to_one():
    inputs = make_inputs(3, items=40, rows=400)
    teacher = Teacher("transitions+content", inputs)
    histories = [[0], [3, 4, 5]]
    targets = teacher.teach_histories(histories)
    for number, likelihoods in enumerate(build_baseline("transitions+content", inputs)(histories)):
        best = sorted(likelihoods, key=lambda item: (-likelihoods[item], -inputs.catalogue.counts.get(item, 0), item))
        best = best[:TAUGHT_ITEMS]
        total = sum(likelihoods[item] for item in best)
        assert targets.items[number, : len(best)].tolist() == best
        assert targets.probabilities[number, : len(best)] == pytest.approx([likelihoods[i] / total for i in best])


def test_walks_go_where_the_teacher_says():
    probabilities = np.array([[0.5, 0.5], [1.0, 0.0], [0.0, 0.0], [0.25, 0.75]], dtype=np.float32)
    steps = SoftTargets(np.array([[1, 2], [3, 0], [0, 0], [0, 2]]), probabilities)
    allowed = {0: {1, 2}, 1: {3}, 2: set(), 3: {0, 2}}
    walks = [walk for seed in range(300) for walk in draw_walks(steps, np.random.default_rng(seed))]
    assert {len(walk) for walk in walks} == set(range(1, LONGEST_WALK + 1))
    forwards = backwards = 0
    for number, walk in enumerate(walks):
        start = number % 4
        ahead = walk[0] == start and all(b in allowed[a] for a, b in zip(walk, walk[1:], strict=False))
        behind = walk[-1] == start and all(a in allowed[b] for a, b in zip(walk, walk[1:], strict=False))
        assert ahead or behind
        forwards, backwards = forwards + (not behind), backwards + (not ahead)
    assert 0.5 < backwards / (forwards + backwards) < 0.7


def random_sequences(rng, count):
    """Distinct sequences of 1 to 3 tokens and an end token; none begins another."""
    chosen = set()
    while len(chosen) < count:
        chosen.add((*(rng.randint(2, 5) for _ in range(rng.randint(1, 3))), 1))
    return sorted(chosen)


@pytest.mark.parametrize("seed", range(6))
def test_labels_along_a_path_are_conditional_sums(seed):
    rng, numbers = random.Random(seed), np.random.default_rng(seed)
    sequences = random_sequences(rng, rng.choice([1, 4, 20]))
    items = numbers.integers(0, len(sequences), (7, 5))
    probabilities = numbers.random((7, 5)) * (numbers.random((7, 5)) < 0.7)
    probabilities[:, 0] += 0.1
    drawn = items[np.arange(7), draw_columns(probabilities, numbers)]
    for row, labels in enumerate(TaughtPaths(sequences).label(items, probabilities, drawn)):
        path, found = sequences[drawn[row]], [Counter() for _ in range(4)]
        for level, token, weight in zip(labels.level, labels.token, labels.weight, strict=True):
            found[level][int(token)] += float(weight)
        for level in range(4):
            expected = Counter()
            for item, p in zip(items[row], probabilities[row], strict=True):
                if p and level < len(path) and sequences[item][:level] == path[:level]:
                    expected[sequences[item][level]] += p
            total = sum(expected.values())
            assert found[level] == pytest.approx({token: p / total for token, p in expected.items()})


def test_ends_that_another_task_teaches_are_left_out():
    """Only the end tokens that nothing else could stand for."""
    sequences = [[5, 6, 1], [5, 7, 1], [8, 1], [9, 6, 1], [9, 6, 7, 1]]
    items, probabilities = np.array([[0, 1, 2, 3, 4]]), np.full((1, 5), 0.2)
    for drawn, levels in ((0, {0, 1}), (2, {0}), (3, {0, 1, 2}), (4, {0, 1, 2})):
        (all_labels,) = TaughtPaths(sequences).label(items, probabilities, np.array([drawn]))
        (labels,) = TaughtPaths(sequences, teach_end=False).label(items, probabilities, np.array([drawn]))
        assert set(labels.level.tolist()) == levels
        assert set(all_labels.level.tolist()) == set(range(len(sequences[drawn])))
        kept = np.isin(all_labels.level, list(levels))
        assert labels.token.tolist() == all_labels.token[kept].tolist()
        assert labels.weight.tolist() == all_labels.weight[kept].tolist()


def test_the_expected_loss_is_the_cross_entropy_of_whole_sequences():
    """Over all paths, each as often as the teacher says, the soft loss is that of every item weighted by its share."""
    rng, numbers = random.Random(1), np.random.default_rng(1)
    sequences, model, prompt = random_sequences(rng, 9), tiny_model("qwen3", 40), [7, 8, 9]
    items = np.array([[0, 3, 5, 8]])
    probabilities = numbers.dirichlet(np.ones(4))[None]
    paths = TaughtPaths(sequences)

    def loss(rows):
        batch = batch_trees([rows], 0)
        with torch.no_grad():
            return -(compute_tree_log_probs(model, batch) * batch.label_weight).sum().item()

    pairs = list(zip(items[0], probabilities[0], strict=True))
    expected = sum(p * loss([(prompt, sequences[item])]) for item, p in pairs)
    soft = 0.0
    for item, p in pairs:
        (labels,) = paths.label(items, probabilities, np.array([item]))
        soft += p * loss([(prompt, sequences[item], labels)])
    assert soft == pytest.approx(expected, rel=1e-5)
    # In one tree with an ordinary row, as alone.
    (labels,) = paths.label(items, probabilities, np.array([3]))
    rows = [(prompt, sequences[3], labels), ([7, 8], sequences[1], None)]
    assert loss(rows) == pytest.approx(sum(loss([row]) for row in rows), rel=1e-5)


def test_soft_labels_keep_their_order_in_a_batch():
    labels = SoftLabels(np.array([0, 0, 1]), np.array([4, 5, 6]), np.array([0.25, 0.75, 1.0]))
    batch = batch_trees([[([2, 3], [4, 6], labels), ([2, 3], [5, 1])]], 0)
    assert batch.label_token.tolist() == [4, 5, 6, 5, 1] and batch.label_weight.tolist() == [0.25, 0.75, 1, 1, 1]
    assert batch.node[batch.label_row][:4].tolist() == [1, 1, 2, 1]


@pytest.mark.parametrize("prompts", ["compact", "worded"])
@pytest.mark.parametrize("task", ["teacher_sid", "walk_sid"])
def test_taught_examples(task, prompts):
    inputs, coder = random_inputs(2), encoder(prompts)
    dataset, again = TASKS[task].build(inputs, coder), TASKS[task].build(inputs, coder)
    histories = {row.history_ids for row in inputs.rows}
    ended = {(*row.history_ids, row.item_id)[-10:] for row in inputs.rows}
    for epoch in (0, 1):
        dataset.set_epoch(epoch)
        again.set_epoch(epoch)
        assert [example.prompt_ids for example in dataset] == [example.prompt_ids for example in again]
        assert [example.item_id for example in dataset] == [example.item_id for example in again]
        for example in dataset:
            shown = [SIDS[item] for item in example.history_ids]
            assert example.prompt == coder.prompts.prompt("next_sid", shown)
            assert example.prompt_ids == coder.prompt_ids([example.prompt])[0]
            assert (
                example.target_ids == coder.target_ids("next_sid", [coder.prompts.target("next_sid", example.sid)])[0]
            )
            first = example.labels.level == 0
            assert example.labels.weight[first].sum() == pytest.approx(1)
            if task == "teacher_sid":
                assert example.history_ids in histories | ended
            else:
                assert 1 <= len(example.history_ids) <= LONGEST_WALK
    drawn = [example.item_id for example in dataset]
    dataset.set_epoch(0)
    assert [example.item_id for example in dataset] != drawn


def test_a_walk_teacher_says_what_follows_histories_that_are_no_train_rows(monkeypatch):
    """Train rows keep their own teacher; walks and the histories that end in a user's last item have the other."""
    inputs, coder = random_inputs(2), encoder()
    both = replace(inputs, walk_teacher_name="popular_first")
    catalogue = inputs.catalogue
    monkeypatch.setattr(registry, "BASELINES", dict(registry.BASELINES))
    first = {catalogue.item_ids[0]: 1.0}
    registry.register_baseline("popular_first", lambda _: lambda histories: [first] * len(histories))
    walks, taught = TASKS["walk_sid"].build(both, coder), TASKS["teacher_sid"].build(both, coder)
    assert {example.item_id for example in walks} == {catalogue.item_ids[0]}
    plain = TASKS["teacher_sid"].build(inputs, coder)
    rows, ends = len(inputs.rows), len({row.user_id for row in inputs.rows})
    assert taught._probabilities.shape[0] == plain._probabilities.shape[0] == rows + ends
    assert (taught._items[:rows] == plain._items[:rows]).all()
    assert (taught._probabilities[:rows] == plain._probabilities[:rows]).all()
    assert (taught._items[rows:, 0] == 0).all() and (taught._probabilities[rows:, 0] == 1).all()


@pytest.mark.parametrize(
    "flags, message",
    [
        (dict(teacher="content+gru4rec"), "--teacher gru4rec: needs --cf_path"),
        (dict(teacher="content+gru4rec", cf_path="run/model"), "--teacher gru4rec: .*was trained on the rows"),
        (dict(walk_teacher="luck"), "--walk_teacher luck: expected one of "),
        (dict(walk_teacher="content+gru4rec"), "--walk_teacher gru4rec: needs --cf_path"),
        (dict(cf_path="model"), "--cf_path: has an effect with --walk_teacher sasrec or gru4rec only"),
    ],
)
def test_wrong_walk_teachers(flags, message):
    required = dict.fromkeys(("base_model", "train_file", "eval_file", "sid_index_path", "item_meta_path"), "x")
    with pytest.raises(InputError, match=message):
        check_sft_flags(SFTFlags(**required, output_dir="x", tasks=["walk_sid"], **flags))


def test_every_epoch_of_walks_has_as_many_examples():
    """Their lengths are random, but the steps of a training are planned by the first epoch."""
    dataset = TASKS["walk_sid"].build(random_inputs(1, users=4), encoder())
    count, seen = len(dataset), set()
    for epoch in range(8):
        dataset.set_epoch(epoch)
        assert len(dataset) == count
        seen.add(len({tuple(example.prompt_ids) for example in dataset}))
    assert len(seen) > 1  # of other lengths


def test_a_teacher_that_says_nothing_gives_no_example():
    rows = [make_row([0], 1, "U0"), make_row([2], 3, "U1")]
    catalogue = Catalogue(SIDS[:4], ["alpha", "beta", "gamma", "delta"], [0, 1, 2, 3])
    inputs = TaskInputs(rows, catalogue, teacher_name="transitions")
    dataset = TASKS["teacher_sid"].build(inputs, encoder())
    assert len(dataset) == 0 and dataset.left_out["unknown to the teacher"] == 4


@pytest.mark.parametrize("seed", range(5))
def test_the_likeliest_are_those_of_a_plain_sort(seed):
    rng = random.Random(seed)
    for count in (0, 1, 5, 15, 16, 17, 60):
        items = rng.sample(range(100), count)
        likelihoods = {item: rng.choice([0.0, 0.1, 0.1, 0.2, rng.random()]) for item in items}
        counts = {item: rng.randrange(3) for item in items if rng.random() < 0.7}
        expected = sorted(items, key=lambda item: (-likelihoods[item], -counts.get(item, 0), item))
        for k in (0, 1, 3, count, count + 5):
            assert likeliest.select_likeliest(likelihoods, k, counts) == expected[:k]
