"""The trie over a catalogue's semantic IDs in the tokens of one model, with the text of every SID."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from transformers import PreTrainedModel

from minionerec.common.files import InputError
from minionerec.common.records import Catalogue
from minionerec.language.prompts import Encoder
from minionerec.search.trie import SidTrie


@dataclass
class CatalogueTrie:
    """What a search goes over, and what its results are called.

    Attributes:
        trie: the token sequences of all SIDs, end token included.
        sids: the SID text of every sequence number of the trie.
        number_of: {SID text: sequence number}.
    """

    trie: SidTrie
    sids: list[str]
    number_of: dict[str, int] = field(init=False)

    def __post_init__(self) -> None:
        self.number_of = {sid: number for number, sid in enumerate(self.sids)}


def build_catalogue_trie(catalogue: Catalogue, encoder: Encoder, device: torch.device | str) -> CatalogueTrie:
    """The trie over the catalogue's SIDs with their end token.

    The SID texts are decoded from the tokens the trie holds, so that what is reported is what was searched.

    Raises:
        InputError: a SID whose tokens are not single tokens of the encoder's tokenizer.
    """
    try:
        trie = SidTrie(encoder.sid_ids(catalogue.sids), device)
    except ValueError as error:
        raise InputError(f"the SIDs of the catalogue make no trie: {error}") from None
    end = len(encoder.end)
    sids = [
        "".join(encoder.tokenizer.convert_ids_to_tokens(tokens[: len(tokens) - end])) for tokens in trie.sequences()
    ]
    return CatalogueTrie(trie, sids)


def check_token_rows(catalogue_trie: CatalogueTrie, model: PreTrainedModel | object, path: str, flag: str) -> None:
    """Stop at a model without rows for the tokens of the catalogue; engines check that themselves.

    Raises:
        InputError: its tokenizer was extended, and its weights were not.
    """
    if not isinstance(model, PreTrainedModel):
        return
    rows, highest = model.get_input_embeddings().weight.shape[0], catalogue_trie.trie.max_token
    if highest >= rows:
        raise InputError(
            f"--{flag} {path}: its tokenizer gives a SID token the number {highest}, but the model has {rows} token "
            "rows: the tokenizer was extended and the weights were not; train it with sft.py, which adds the rows"
        )
