"""The RQ-VAE's parts against plain twins, and its training: resume, NaN stop, checkpoints, the command."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minionerec.common.cli import parse_flags
from minionerec.common.embeddings import save_embeddings
from minionerec.common.files import InputError
from minionerec.common.step_log import read_steps
from rq.index.codebook import load_checkpoint, load_frozen_model
from rq.models.layers import MLPLayers
from rq.models.rq import ResidualVectorQuantizer
from rq.models.rqvae import RQVAE
from rq.models.vq import VectorQuantizer, kmeans_centres, sinkhorn, squared_distances
from rq.rqvae import train_rqvae
from rq.settings import RQVAEFlags, TrainerFlags
from rq.trainer import Trainer


def clusters(n=60, dim=8, groups=6, seed=0):
    random = np.random.default_rng(seed)
    centres = random.standard_normal((groups, dim)) * 3
    return torch.tensor(centres[np.arange(n) % groups] + 0.3 * random.standard_normal((n, dim)), dtype=torch.float32)


def slow_sinkhorn(distances, epsilon, iterations):
    """Plain loops over scaling vectors, numpy, one problem; the same scaling of the distances, the same slack row."""
    d = distances.astype(np.float64)
    d = 2 * (d - d.min()) / (d.max() - d.min()) - 1
    n, codes = d.shape
    masses = [1 / max(n, codes)] * n
    if n < codes:
        d = np.concatenate([d, np.zeros((1, codes))])
        masses.append((codes - n) / codes)
    kernel = np.exp(-d / epsilon)
    rows, columns = np.ones(len(d)), np.ones(codes)
    for _ in range(iterations):
        for k in range(codes):
            columns[k] = 1 / codes / sum(rows[i] * kernel[i, k] for i in range(len(d)))
        for i in range(len(d)):
            rows[i] = masses[i] / sum(kernel[i, k] * columns[k] for k in range(codes))
    return (rows[:, None] * kernel * columns)[:n]


@pytest.mark.parametrize("n, codes", [(9, 5), (5, 5), (3, 8)])
@pytest.mark.parametrize("epsilon", [0.05, 0.5])
def test_sinkhorn_equals_plain_numpy_and_keeps_its_marginals(n, codes, epsilon):
    distances = np.random.default_rng(0).random((n, codes))
    plan = sinkhorn(torch.tensor(distances), epsilon, 300).numpy()
    np.testing.assert_allclose(plan, slow_sinkhorn(distances, epsilon, 300), rtol=1e-6, atol=1e-12)
    np.testing.assert_allclose(plan.sum(1), 1 / max(n, codes), rtol=1e-9)
    columns = sinkhorn(torch.tensor(distances), 0.5, 500).sum(0).numpy()
    if n >= codes:
        np.testing.assert_allclose(columns, 1 / codes, rtol=1e-6)
    else:
        assert columns.max() <= 1 / codes + 1e-9


def test_fewer_points_than_codes_go_to_their_nearest_codes_apart():
    """Entropic transport at a small epsilon is the assignment of least total distance."""
    from scipy.optimize import linear_sum_assignment

    for seed in range(20):
        distances = np.random.default_rng(seed).random((5, 40))
        distances[1] = distances[0] + 0.01 * distances[1]
        plan = sinkhorn(torch.tensor(distances), 0.003, 2000)
        assert plan.argmax(1).tolist() == linear_sum_assignment(distances)[1].tolist()


def test_sinkhorn_solves_stacked_problems_apart_and_stands_tiny_epsilon():
    distances = torch.rand(4, 6, 3, generator=torch.Generator().manual_seed(0))
    together = sinkhorn(distances, 0.01, 30)
    for problem, plan in zip(distances, together, strict=True):
        torch.testing.assert_close(sinkhorn(problem, 0.01, 30), plan)
    extreme = sinkhorn(torch.rand(64, 256) * 1e6, 0.003, 50)
    torch.testing.assert_close(extreme.sum(1), torch.full((64,), 1 / 256, dtype=torch.float64))
    assert torch.isfinite(sinkhorn(torch.zeros(3, 4), 0.003, 5)).all()


def test_sinkhorn_uses_codes_more_evenly_than_nearest():
    x = clusters(200)
    layer = VectorQuantizer(16, 8, sk_epsilon=0.01, sk_iters=100)
    torch.nn.init.normal_(layer.embedding.weight, std=3.0)
    nearest, spread = layer.assign(x, use_sk=False), layer.assign(x, use_sk=True)
    assert torch.bincount(spread).max() < torch.bincount(nearest).max()
    layer.sk_epsilon = 0.0
    assert torch.equal(layer.assign(x, use_sk=True), nearest)


def test_squared_distances_equal_a_loop():
    x, codes = torch.randn(5, 3), torch.randn(4, 3)
    slow = torch.stack([torch.stack([((a - b) ** 2).sum() for b in codes]) for a in x])
    torch.testing.assert_close(squared_distances(x, codes), slow)


def test_gradient_passes_straight_through_and_the_loss_is_vq_vae():
    torch.manual_seed(0)
    layer = VectorQuantizer(8, 4, beta=0.25)
    torch.nn.init.normal_(layer.embedding.weight)
    x = torch.randn(10, 4, requires_grad=True)
    code, loss, indices = layer(x, use_sk=False)
    chosen = layer.embedding.weight[indices]
    torch.testing.assert_close(code, chosen)
    upstream = torch.randn(10, 4)
    (gradient,) = torch.autograd.grad((code * upstream).sum(), x, retain_graph=True)
    torch.testing.assert_close(gradient, upstream)
    torch.testing.assert_close(loss, 1.25 * ((x - chosen) ** 2).mean())
    gradient_x, gradient_codes = torch.autograd.grad(loss, [x, layer.embedding.weight])
    torch.testing.assert_close(gradient_x, 0.25 * 2 * (x - chosen).detach() / x.numel())
    expected = torch.zeros(8, 4).index_add_(0, indices, (2 * (chosen - x) / x.numel()).detach())
    torch.testing.assert_close(gradient_codes, expected)


def test_kmeans_start_is_used_once_in_training_only():
    x = clusters()
    layer = VectorQuantizer(6, 8, kmeans_init=True)
    layer.eval()
    layer(x)
    assert not layer.started
    layer.train()
    _, loss, indices = layer(x)
    assert layer.started and len(torch.unique(indices)) == 6 and loss < 0.3
    fixed = layer.embedding.weight.clone()
    layer(x + 5)
    assert torch.equal(layer.embedding.weight, fixed)
    copy = VectorQuantizer(6, 8, kmeans_init=True)
    copy.load_state_dict(layer.state_dict())
    assert copy.started


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 12), st.integers(1, 12))
def test_kmeans_centres_of_any_number_of_points(n, codes):
    centres = kmeans_centres(torch.randn(n, 3), codes, 5)
    assert centres.shape == (codes, 3) and torch.isfinite(centres).all()
    assert len(torch.unique(centres, dim=0)) == codes


def test_kmeans_centres_of_equal_points():
    centres = kmeans_centres(torch.ones(9, 2), 4, 5)
    assert len(torch.unique(centres, dim=0)) == 4


def test_residual_levels_equal_a_loop_with_sizes_of_their_own():
    torch.manual_seed(0)
    quantiser = ResidualVectorQuantizer([8, 4, 2], 5).eval()
    for layer in quantiser.vq_layers:
        torch.nn.init.normal_(layer.embedding.weight)
    x = torch.randn(7, 5)
    total, loss, indices = quantiser(x, use_sk=False)
    losses = []
    for row in range(7):
        residual, summed = x[row], torch.zeros(5)
        for level, layer in enumerate(quantiser.vq_layers):
            weights = layer.embedding.weight.detach()
            nearest = min(range(layer.n_e), key=lambda k: float(((residual - weights[k]) ** 2).sum().detach()))
            assert nearest == indices[row, level]
            losses.append(1.25 * ((residual - layer.embedding.weight[nearest]) ** 2).mean())
            residual, summed = residual - layer.embedding.weight[nearest], summed + layer.embedding.weight[nearest]
        torch.testing.assert_close(total[row], summed)
    torch.testing.assert_close(loss, torch.stack(losses).mean())
    with pytest.raises(ValueError, match="2 Sinkhorn epsilons for 3 levels"):
        ResidualVectorQuantizer([8, 4, 2], 5, sk_epsilons=[0.0, 0.1])


def test_model_names_shapes_and_loss():
    model = RQVAE(8, [4, 4], e_dim=3, layers=[6, 5], kmeans_init=False, quant_loss_weight=0.5)
    assert [m.weight.shape for m in model.encoder.mlp_layers if hasattr(m, "weight")] == [(6, 8), (5, 6), (3, 5)]
    assert [m.weight.shape for m in model.decoder.mlp_layers if hasattr(m, "weight")] == [(5, 3), (6, 5), (8, 6)]
    x = torch.randn(9, 8)
    out, quant_loss, indices = model(x, use_sk=False)
    assert out.shape == x.shape and indices.shape == (9, 2) and model.rq.vq_layers[1].embedding.weight.shape == (4, 3)
    total, reconstruction = model.compute_loss(out, quant_loss, x)
    torch.testing.assert_close(total, ((out - x) ** 2).mean() + 0.5 * quant_loss)
    torch.testing.assert_close(reconstruction, ((out - x) ** 2).mean())
    assert torch.equal(model.get_indices(x, use_sk=False), indices)
    model.loss_type = "l1"
    torch.testing.assert_close(model.compute_loss(out, quant_loss, x)[1], (out - x).abs().mean())
    with pytest.raises(ValueError, match="loss_type"):
        RQVAE(8, [4], loss_type="huber")
    with pytest.raises(ValueError):
        MLPLayers([3])
    assert MLPLayers([4, 3, 2], dropout=0.5, bn=True)(torch.randn(6, 4)).shape == (6, 2)


def build(folder, seed=1, dropout=0.2, **settings):
    torch.manual_seed(seed)
    model = RQVAE(8, [6, 4], e_dim=4, layers=[16], dropout_prob=dropout)
    defaults = {"epochs": 12, "batch_size": 16, "eval_step": 4, "warmup_epochs": 2, "lr": 3e-3}
    settings = {**defaults, "lr_scheduler_type": "cosine", **settings}
    return Trainer(model, TrainerFlags(ckpt_dir=str(folder), **settings))


class Killed(Exception):
    pass


@pytest.mark.parametrize("learner", ["AdamW", "sgd", "rmsprop"])
def test_resumed_training_ends_with_the_same_weights(tmp_path, learner):
    data = clusters()
    whole = build(tmp_path / "whole", learner=learner, revive_every=3)
    results = whole.fit(data)

    cut = build(tmp_path / "cut", learner=learner, revive_every=3)
    ticks = []

    def kill():
        ticks.append(cut.epoch)
        if cut.epoch == 8:
            raise Killed

    cut.on_checkpoint = kill
    with pytest.raises(Killed):
        cut.fit(data)
    torch.rand(7)
    again = build(tmp_path / "cut", seed=99, learner=learner, revive_every=3)
    assert again.resume() and again.epoch == 8
    assert again.fit(data) == results
    ends = zip(whole.model.state_dict().items(), again.model.state_dict().items(), strict=True)
    for (name, one), (_, other) in ends:
        assert torch.equal(one, other), name
    assert ticks == [4, 8]
    for name in ("best_loss_model.pth", "best_collision_model.pth"):
        one, other = load_checkpoint(tmp_path / "whole" / name), load_checkpoint(tmp_path / "cut" / name)
        assert one["epoch"] == other["epoch"] and one["loss"] == other["loss"]


def test_checkpoints_of_other_settings_are_not_continued(tmp_path):
    build(tmp_path, epochs=4).fit(clusters())
    other = build(tmp_path, epochs=4, lr=1e-4)
    assert not other.resume() and other.epoch == 0
    assert not list(tmp_path.iterdir())


def test_only_the_newest_checkpoints_stay_and_the_best_model_loads(tmp_path):
    trainer = build(tmp_path, epochs=14, eval_step=3, save_limit=2, dropout=0.0)
    best_loss, best_collision = trainer.fit(clusters())
    names = sorted(path.name for path in tmp_path.iterdir())
    best = ["best_collision_model.pth", "best_loss_model.pth"]
    assert names == [*best, "checkpoint_00000012.pth", "checkpoint_00000014.pth", "final_model.pth"]
    final = load_frozen_model(tmp_path / "final_model.pth").state_dict()
    assert all(torch.equal(tensor, final[name]) for name, tensor in trainer.model.state_dict().items())
    assert load_checkpoint(tmp_path / "best_loss_model.pth")["loss"] == best_loss
    model = load_frozen_model(tmp_path / "best_collision_model.pth")
    codes = [tuple(row) for row in model.get_indices(clusters()).tolist()]
    assert best_collision == pytest.approx(1 - len(set(codes)) / len(codes))
    assert trainer._valid_epoch(clusters()) == pytest.approx(
        1 - len({tuple(row) for row in trainer.model.get_indices(clusters()).tolist()}) / 60
    )


def test_training_lowers_the_loss_and_clips_the_gradient(tmp_path):
    trainer = build(tmp_path, dropout=0.0, lr_scheduler_type="constant", warmup_epochs=0, lr=1e-2)
    data = clusters()
    first = trainer._train_epoch(data)[0]
    for _ in range(30):
        last, reconstruction = trainer._train_epoch(data)
    assert last < 0.5 * first and reconstruction <= last
    trainer.settings.max_norm = 1e-6
    trainer._train_epoch(data * 100)
    norm = math.sqrt(sum(float(p.grad.pow(2).sum()) for p in trainer.model.parameters()))
    assert norm == pytest.approx(1e-6, rel=1e-2)


@pytest.mark.parametrize(
    "kind, at_start, at_half, at_end",
    [
        ("constant", 1.0, 1.0, 1.0),
        ("linear", 1.0, 0.5, 0.0),
        ("cosine", 1.0, 0.5, 0.0),
    ],
)
def test_learning_rate_schedule(tmp_path, kind, at_start, at_half, at_end):
    trainer = build(tmp_path, epochs=12, warmup_epochs=2, lr=1.0, lr_scheduler_type=kind)
    rates = []
    for step in (0, 9, 19, 20, 70, 120):
        trainer.step = step
        rates.append(trainer._lr(steps_per_epoch=10))
    assert rates == pytest.approx([0.05, 0.5, 1.0, at_start, at_half, at_end])


def test_a_loss_that_is_not_finite_stops_the_training(tmp_path):
    trainer = build(tmp_path, lr=1e30, warmup_epochs=0, max_norm=1e30, lr_scheduler_type="constant")
    with pytest.raises(InputError, match="diverged in epoch .*: the loss is not finite .*--lr 1e.30"):
        trainer.fit(clusters())
    assert not list(tmp_path.glob("best_*"))


def test_dead_codes_go_to_where_the_fit_is_worst():
    torch.manual_seed(0)
    quantiser = ResidualVectorQuantizer([8, 6], 4)
    x = torch.randn(40, 4)
    far = torch.full((4,), 50.0)
    with torch.no_grad():
        quantiser.vq_layers[0].embedding.weight.copy_(x[:8])
        quantiser.vq_layers[0].embedding.weight[[2, 5]] = far
        quantiser.vq_layers[1].embedding.weight.copy_(0.3 * torch.randn(6, 4))
        quantiser.vq_layers[1].embedding.weight[4] = far
    before = [layer.embedding.weight.clone() for layer in quantiser.vq_layers]
    dead = [sorted(codes.tolist()) for codes in quantiser.revive(x, torch.Generator().manual_seed(0))]
    assert dead[0] == [2, 5] and 4 in dead[1]
    for layer, old, codes in zip(quantiser.vq_layers, before, dead, strict=True):
        changed = (layer.embedding.weight != old).any(1).nonzero()[:, 0].tolist()
        assert changed == codes
    # Revived codes of the first level are rows of x, each nearest to its own row at least.
    for code in dead[0]:
        assert (x == quantiser.vq_layers[0].embedding.weight[code]).all(1).any()
    used = quantiser(x, use_sk=False)[2]
    assert all(len(used[:, level].unique()) == size for level, size in enumerate((8, 6)))
    assert [len(codes) for codes in quantiser.revive(x, torch.Generator())] == [0, 0]
    # Rows that lie on their codes gain nothing from a second one.
    exact = ResidualVectorQuantizer([3], 4)
    with torch.no_grad():
        exact.vq_layers[0].embedding.weight[0] = x[0]
    assert len(exact.revive(x[:1].repeat(5, 1), torch.Generator())[0]) == 0


def test_revival_raises_usage_and_forgets_the_optimisers_state(tmp_path):
    data = clusters(200, groups=40)

    def used(**settings):
        torch.manual_seed(3)
        model = RQVAE(8, [32, 16], e_dim=4, layers=[16], kmeans_init=False)
        flags = TrainerFlags(ckpt_dir=str(tmp_path), epochs=30, eval_step=30, warmup_epochs=0, **settings)
        trainer = Trainer(model, flags)
        trainer.fit(data)
        codes = model.eval().get_indices(data)
        return len(codes[:, 0].unique()) + len(codes[:, 1].unique()), trainer

    without, _ = used()
    revived, trainer = used(revive_every=5)
    assert revived > without
    weight = trainer.model.rq.vq_layers[0].embedding.weight
    with torch.no_grad():
        weight[7] = 99.0
        trainer.optimizer.state[weight]["exp_avg_sq"][7] = 5.0
    trainer._revive(data)
    assert weight[7].abs().max() < 50 and (trainer.optimizer.state[weight]["exp_avg_sq"][7] == 0).all()


def test_bfloat16_autocast_trains_with_float32_codes_and_weights(tmp_path):
    data = clusters()
    losses = {}
    for bf16 in (False, True):
        trainer = build(tmp_path / str(bf16), dropout=0.0, bf16=bf16)
        seen = []
        trainer.model.encoder.register_forward_hook(lambda module, inputs, output, seen=seen: seen.append(output.dtype))
        trainer.fit(data)
        losses[bf16] = trainer.best_loss
        assert (torch.bfloat16 in seen) == bf16
        assert all(tensor.dtype == torch.float32 for tensor in trainer.model.state_dict().values())
    assert losses[True] != losses[False] and losses[True] == pytest.approx(losses[False], rel=0.1)


@pytest.mark.parametrize(
    "wrong",
    [
        {"learner": "lion"},
        {"revive_every": -1},
        {"epochs": 0},
        {"batch_size": 0},
        {"eval_step": 0},
        {"lr": 0.0},
        {"lr": float("nan")},
        {"max_norm": 0.0},
        {"warmup_epochs": -1},
        {"save_limit": 0},
    ],
)
def test_wrong_settings_are_refused(tmp_path, wrong):
    with pytest.raises(InputError, match=f"--{next(iter(wrong))}"):
        build(tmp_path, **wrong)


def test_files_that_are_no_checkpoint(tmp_path):
    path = tmp_path / "x.pth"
    path.write_bytes(b"no checkpoint")
    with pytest.raises(InputError, match="not a checkpoint"):
        load_checkpoint(path)
    torch.save({"weights": torch.zeros(2)}, path)
    with pytest.raises(InputError, match="no weights"):
        load_checkpoint(path)
    torch.save(print, path)
    with pytest.raises(InputError, match="not a checkpoint"):
        load_checkpoint(path)
    with pytest.raises(InputError, match="no such file"):
        load_checkpoint(tmp_path / "none.pth")


def command(folder, **changes):
    data = folder / "toy.emb-x-td.npy"
    if not data.exists():
        save_embeddings(data, clusters().numpy(), [str(i) for i in range(60)], "x", ["title"])
    flags = {
        "data_path": str(data),
        "ckpt_dir": str(folder / "ck"),
        "epochs": 6,
        "eval_step": 2,
        "num_emb_list": [6, 4],
        "layers": [16],
        "e_dim": 4,
        "warmup_epochs": 1,
        "device": "cpu",
    }
    train_rqvae(RQVAEFlags(**{**flags, **changes}))


def test_a_dry_run_measures_a_few_epochs_and_writes_nothing(tmp_path, capsys):
    command(tmp_path, dry_run=True)
    said = capsys.readouterr().out
    assert "it was not run before" in said and "  6 epochs take about" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["toy.emb-x-td.json", "toy.emb-x-td.npy"]


def test_command_runs_once_redoes_on_force_and_resumes(tmp_path, capsys, monkeypatch):
    command(tmp_path)
    record = json.loads((tmp_path / "ck" / "rqvae.stage.json").read_text())
    assert record["status"] == "done" and record["results"]["items"] == 60
    weights = load_checkpoint(tmp_path / "ck" / "checkpoint_00000006.pth")["state_dict"]
    command(tmp_path)
    assert "already done" in capsys.readouterr().out

    epoch = Trainer._train_epoch

    def die_in_the_fifth(self, data):
        if self.epoch == 4:
            raise Killed
        return epoch(self, data)

    monkeypatch.setattr(Trainer, "_train_epoch", die_in_the_fifth)
    with pytest.raises(Killed):
        command(tmp_path, force=True)
    monkeypatch.undo()
    command(tmp_path)
    output = capsys.readouterr().out
    assert "an earlier run was cut off" in output and "from epoch 4" in output
    steps = read_steps(tmp_path / "ck" / "steps.csv")  # one curve, whatever the breaks
    assert [row["step"] for row in steps] == [1, 2, 3, 4, 5, 6]
    assert ["collision_rate" in row for row in steps] == [False, True] * 3
    for name, tensor in load_checkpoint(tmp_path / "ck" / "checkpoint_00000006.pth")["state_dict"].items():
        assert torch.equal(tensor, weights[name])
    command(tmp_path, epochs=2)
    assert sorted(path.name for path in (tmp_path / "ck").glob("checkpoint_*")) == ["checkpoint_00000002.pth"]


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"sk_epsilons": [0.0]}, "--sk_epsilons: expected 2 numbers"),
        ({"num_emb_list": [0, 4]}, "--num_emb_list"),
        ({"dropout_prob": 1.0}, "--dropout_prob"),
        ({"device": "cuda:99"}, "--device cuda:99"),
        ({"bn": True, "batch_size": 59}, "--bn"),
        ({"data_path": "/nowhere.npy"}, "--data_path: /nowhere.npy: no such file"),
    ],
)
def test_command_refuses_wrong_flags(tmp_path, wrong, message):
    with pytest.raises(InputError) as error:
        command(tmp_path, **wrong)
    assert message in str(error.value)


@pytest.mark.parametrize(
    "wrong, message",
    [
        ("--lr_scheduler_type step", "--lr_scheduler_type step: expected one of constant, linear, cosine"),
        ("--loss_type huber", "--loss_type huber: expected one of mse, l1"),
    ],
)
def test_command_line_refuses_what_is_no_choice(capsys, wrong, message):
    with pytest.raises(SystemExit, match="2"):
        parse_flags(RQVAEFlags, ["--data_path", "x.npy", "--ckpt_dir", "ck", *wrong.split()])
    assert capsys.readouterr().err == f"error: {message}\n"
