"""Sequential recommenders over item ids: SASRec and GRU4Rec, their scores, and their checkpoint folders."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from minionerec.common.embeddings import fit_to_width
from minionerec.common.files import InputError, atomic_write, read_json


class SequentialRecommender(nn.Module):
    """A causal network over item histories with one embedding table, used for input and output.

    Histories are padded on the right: a position sees itself and what stands before it, so padding never changes it.

    Attributes:
        item_ids: the catalogue; column j of every score belongs to item_ids[j].
        settings: what `load_network` needs to build the network again.
    """

    def __init__(self, item_ids: Sequence[int], settings: dict):
        super().__init__()
        self.item_ids, self.settings = list(item_ids), settings
        self.column_of = {item: column for column, item in enumerate(self.item_ids)}
        self.embedding = nn.Embedding(len(self.item_ids), settings["hidden_size"])
        self.dropout = nn.Dropout(settings["dropout"])
        nn.init.normal_(self.embedding.weight, std=settings["hidden_size"] ** -0.5)

    @torch.no_grad()
    def start_from_vectors(self, vectors: np.ndarray, seed: int) -> None:
        """Let the embeddings begin at what is known of the items, spread as widely as random ones.

        Of an item in few histories little is learned; beginning near items like it, it needs less.

        Args:
            vectors: [N, dim], in the order of item_ids; if all are equal, the embeddings stay as they are.
            seed: of a rotation.
        """
        start = fit_to_width(vectors, self.settings["hidden_size"], seed)
        if (spread := start.std()) > 0:
            scaled = torch.from_numpy(start * (self.settings["hidden_size"] ** -0.5 / spread))
            self.embedding.weight.copy_(scaled)

    def compute_states(self, columns: Tensor) -> Tensor:
        """Hidden states [n, length, hidden_size] of catalogue columns [n, length], oldest item first."""
        raise NotImplementedError

    def forward(self, columns: Tensor, rows: Tensor, positions: Tensor) -> Tensor:
        """Logits [k, num_items] of the item after `positions` [k] of `rows` [k] of catalogue columns [n, length]."""
        return self.compute_logits(self.compute_states(columns)[rows, positions])

    def compute_logits(self, states: Tensor) -> Tensor:
        """[..., num_items] of states [..., hidden_size]."""
        return functional.linear(states, self.embedding.weight)

    def pad_histories(self, histories: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """(catalogue columns [n, longest], lengths [n]) of histories of item ids; the newest max_history items count.

        Raises:
            ValueError: an empty history, or an item outside the catalogue.
        """
        newest = [history[-self.settings["max_history"] :] for history in histories]
        unknown = {item for history in newest for item in history} - self.column_of.keys()
        if unknown:
            raise ValueError(f"item {min(unknown)} is not in the catalogue")
        if not all(map(len, newest)):
            raise ValueError("a history is empty")
        longest = max(map(len, newest))
        # Any item will do as padding.
        columns = [[self.column_of[item] for item in history] + [0] * (longest - len(history)) for history in newest]
        device = self.embedding.weight.device
        return torch.tensor(columns, device=device), torch.tensor([len(history) for history in newest], device=device)

    @torch.no_grad()
    def score_histories(self, histories: Sequence[Sequence[int]]) -> Tensor:
        """Log-probabilities [n, num_items] of the next item, over `item_ids`; histories are item ids, oldest first.

        Raises:
            ValueError: an empty history, or an item outside the catalogue.
        """
        training = self.training
        self.eval()
        columns, lengths = self.pad_histories(histories)
        last = self.compute_states(columns)[torch.arange(len(lengths), device=lengths.device), lengths - 1]
        self.train(training)
        return self.compute_logits(last).log_softmax(dim=-1)


class SASRec(SequentialRecommender):
    """Causal self-attention over item and position embeddings (Kang and McAuley 2018, arXiv 1808.09781).

    Positions count from the oldest item, so that a history and its continuation share their states.
    """

    def __init__(self, item_ids: Sequence[int], settings: dict):
        super().__init__(item_ids, settings)
        hidden_size = settings["hidden_size"]
        self.position = nn.Embedding(settings["max_history"], hidden_size)
        nn.init.normal_(self.position.weight, std=hidden_size**-0.5)
        # The paper's feed-forward layers are as wide as the model.
        layer = nn.TransformerEncoderLayer(
            hidden_size, settings["num_heads"], hidden_size, settings["dropout"], batch_first=True, norm_first=True
        )
        norm = nn.LayerNorm(hidden_size)
        self.encoder = nn.TransformerEncoder(layer, settings["num_layers"], norm, enable_nested_tensor=False)

    def compute_states(self, columns: Tensor) -> Tensor:
        length = columns.shape[1]
        embedded = self.embedding(columns) + self.position.weight[:length]
        mask = nn.Transformer.generate_square_subsequent_mask(length, device=columns.device)
        return self.encoder(self.dropout(embedded), mask=mask, is_causal=True)


class GRU4Rec(SequentialRecommender):
    """A GRU over item embeddings (Hidasi et al. 2016, arXiv 1511.06939)."""

    def __init__(self, item_ids: Sequence[int], settings: dict):
        super().__init__(item_ids, settings)
        hidden_size, layers = settings["hidden_size"], settings["num_layers"]
        between_layers = settings["dropout"] if layers > 1 else 0.0
        self.gru = nn.GRU(hidden_size, hidden_size, layers, batch_first=True, dropout=between_layers)
        self.output = nn.Linear(hidden_size, hidden_size)

    def compute_states(self, columns: Tensor) -> Tensor:
        hidden, _ = self.gru(self.dropout(self.embedding(columns)))
        return self.output(self.dropout(hidden))


NETWORKS: dict[str, type[SequentialRecommender]] = {"sasrec": SASRec, "gru4rec": GRU4Rec}


def build_network(item_ids: Sequence[int], settings: dict) -> SequentialRecommender:
    """A randomly initialised network.

    Args:
        item_ids: the catalogue.
        settings: model (of NETWORKS), hidden_size, num_layers, num_heads, dropout and max_history.
    """
    return NETWORKS[settings["model"]](item_ids, settings)


def save_network(network: SequentialRecommender, path: str | Path) -> None:
    """Write a folder with config.json (settings and ordered item ids) and model.safetensors, whole or not at all."""
    with atomic_write(path) as folder:
        folder.mkdir()
        config = {**network.settings, "item_ids": network.item_ids}
        (folder / "config.json").write_text(json.dumps(config) + "\n", encoding="utf-8")
        # Cloned, because the GPU's GRU weights are views of one buffer, which the format does not take.
        weights = {name: value.detach().cpu().clone() for name, value in network.state_dict().items()}
        save_file(weights, folder / "model.safetensors")


def load_network(path: str | Path) -> SequentialRecommender:
    """The network of a folder written by `save_network`, on the CPU and in evaluation mode.

    Raises:
        InputError: no such folder, or files that do not make a recommender.
    """
    config_file, weights_file = Path(path) / "config.json", Path(path) / "model.safetensors"
    for file in (config_file, weights_file):
        if not file.is_file():
            raise InputError(f"{file}: no such file; expected the model folder of a sasrec.py run")
    settings = read_json(config_file)
    try:
        item_ids = settings.pop("item_ids")
        if not all(isinstance(item, int) for item in item_ids) or len(set(item_ids)) != len(item_ids):
            raise ValueError("item_ids must be distinct whole numbers")
        network = build_network(item_ids, settings)
    except (AttributeError, KeyError, TypeError, ValueError, AssertionError) as error:
        raise InputError(f"{config_file}: not the config of a recommender ({error!r})") from None
    try:
        network.load_state_dict(load_file(weights_file))
    except (SafetensorError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:160]
        raise InputError(f"{weights_file}: not the weights of {config_file} ({reason})") from None
    return network.eval()
