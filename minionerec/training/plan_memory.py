"""What a training run keeps in memory, from the shapes of its model and of its micro-batches: formulas, nothing run.

docs/planning.md derives them; tests/test_plan.py checks them against what autograd saves, benchmarks/bench_plan.py
against measured peaks. All sizes are bytes of one process.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from transformers import PreTrainedModel

FLOAT = 4  # bytes of a float32 number
ADAM = 2 * FLOAT  # the two averages of AdamW
BUCKET = 500_000_000  # elements of DeepSpeed's buckets for reducing and gathering, by its own default
LIVE = 1_000_000_000  # elements that DeepSpeed ZeRO-3 keeps gathered, by its own default
ATTENTION, MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class ModelShape:
    """The widths of a model, and what of it learns.

    Attributes:
        hidden, inner, layers, vocabulary: widths of the residual stream and of the MLP, layers, token rows.
        heads, key_heads, head_width: of the attention.
        parameters, trainable: weights, and those that learn.
        decoder_weights, layer_weights: weights of all linear layers of the decoder, and of one layer with its norms.
        tied: the output layer is the token embedding.
        normed_heads: queries and keys are normalised head by head, as in Qwen3.
        trains: "all" weights, "lora" matrices and token rows, or token "rows".
        targets, rank: names of the linear layers with LoRA matrices, and the rank of these.
        is_known: its layers are those of Llama, from which the formulas are derived.
    """

    hidden: int
    inner: int
    layers: int
    vocabulary: int
    heads: int
    key_heads: int
    head_width: int
    parameters: int
    trainable: int
    decoder_weights: int
    layer_weights: int
    tied: bool
    normed_heads: bool
    is_known: bool
    trains: str = "all"
    targets: Collection[str] = ()
    rank: int = 0

    @property
    def row_weights(self) -> int:
        """Weights of the token embedding."""
        return self.vocabulary * self.hidden


def read_shape(model: PreTrainedModel) -> ModelShape:
    """The shape of a plain model that trains all its weights; it may be on the meta device."""
    config, layers = model.config.get_text_config(), model.get_decoder().layers
    names = {name.rsplit(".", 1)[-1] for name, _ in layers[0].named_modules()}
    matrices = [weight.numel() for weight in layers.parameters() if weight.dim() > 1]
    parameters = sum(weight.numel() for weight in model.parameters())
    return ModelShape(
        hidden=config.hidden_size,
        inner=getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
        layers=len(layers),
        vocabulary=model.get_input_embeddings().weight.shape[0],
        heads=config.num_attention_heads,
        key_heads=getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
        head_width=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        parameters=parameters,
        trainable=parameters,
        decoder_weights=sum(matrices),
        layer_weights=sum(weight.numel() for weight in layers[0].parameters()),
        tied=model.get_output_embeddings().weight is model.get_input_embeddings().weight,
        normed_heads="q_norm" in names,
        is_known={*ATTENTION, *MLP} <= names,
    )


@dataclass(frozen=True)
class BatchShape:
    """A micro-batch: `rows` prefix trees padded to `length` nodes, with labels at `label_nodes` nodes in all."""

    rows: int
    length: int
    label_nodes: int
    masked: bool = True

    @property
    def tokens(self) -> int:
        """Nodes that are computed, padding included."""
        return self.rows * self.length

    @property
    def pairs(self) -> int:
        """Pairs of a query and a key."""
        return self.rows * self.length**2


@dataclass(frozen=True)
class SearchShape:
    """A search: `prompts` at once of up to `length` tokens, `beams` each, over sequences of up to `depth` tokens.

    forced: tokens that are fed in one pass once every beam has a single way left; 1 where there is no such way.
    """

    prompts: int
    length: int
    beams: int
    depth: int
    forced: int = 1


@dataclass(frozen=True)
class Setting:
    """How a run is computed.

    Attributes:
        engine: see `name_engine`: "one process", "DDP", "ZeRO-2", "ZeRO-3", "FSDP2".
        processes: how many share the work.
        bf16: the forward pass is computed in bf16, as on a GPU that has it.
        checkpointing: activations are computed twice instead of being kept.
        accumulates: an optimizer step has several micro-batches.
        reference: a frozen model of the same shape stands beside the policy.
        shares_prompts: rollout and first update compute the prompts once.
        dropout, lora_dropout: there is some.
        exports_here: the written model is loaded again in the memory that is planned, as on a CPU.
    """

    engine: str = "one process"
    processes: int = 1
    bf16: bool = False
    checkpointing: bool = False
    accumulates: bool = True
    reference: bool = False
    shares_prompts: bool = False
    dropout: bool = False
    lora_dropout: bool = False
    exports_here: bool = True

    @property
    def shards(self) -> bool:
        """No process holds the whole weights while it trains."""
        return self.engine in ("ZeRO-3", "FSDP2")

    @property
    def autocast(self) -> bool:
        """Weights are float32, and products are computed in bf16."""
        return self.bf16 and self.engine in ("one process", "DDP")

    @property
    def element(self) -> int:
        """Bytes of a number that products are computed in."""
        return 2 if self.bf16 else FLOAT


# ---------------------------------------------------------------------------------------------------------- activations
def count_layer_bytes(shape: ModelShape, batch: BatchShape, setting: Setting) -> int:
    """What autograd keeps of one decoder layer for the backward pass.

    Args:
        shape: its layers are taken to be Llama's, with or without normed heads.
        batch: whose tokens go through it.
        setting: precision and dropout.
    """
    element, trains_all = setting.element, shape.trains == "all"
    queries, keys = shape.heads * shape.head_width, shape.key_heads * shape.head_width
    consumers = [name for name in (*ATTENTION, *MLP) if trains_all or name in shape.targets]
    # What a norm normalised, in float32; the result, where the norm's own weight learns.
    kept = 2 * shape.hidden * (FLOAT + (0 if not trains_all else element if not setting.autocast else FLOAT))
    # The input of the linear layers that learn: one tensor, or under autocast a copy for each.
    for group in (ATTENTION[:3], MLP[:2]):
        learning = sum(name in consumers for name in group)
        kept += shape.hidden * element * (learning if setting.autocast else min(learning, 1))
    if shape.normed_heads:
        kept += (queries + keys) * (FLOAT + (element if trains_all else 0))
        kept += FLOAT * (shape.heads + shape.key_heads)
    # Queries, keys, values and what comes out; with a mask, keys and values stand there once for every query head.
    kept += element * (4 * queries if batch.masked else 2 * queries + 2 * keys) + FLOAT * shape.heads + 2 * FLOAT
    kept += element * batch.length if batch.masked else 0  # the mask as numbers, anew in every layer
    # LoRA converts the attention's output to float32 and back; without it the two are one tensor.
    kept += element * queries if setting.autocast and "o_proj" in shape.targets else 0
    kept += element * shape.inner * (4 if "down_proj" in consumers else 3)  # gate, its activation, up, their product
    kept += element * shape.rank * len(shape.targets)
    if setting.lora_dropout:
        inputs = {**dict.fromkeys((*ATTENTION, *MLP), shape.hidden), "o_proj": queries, "down_proj": shape.inner}
        kept += sum(inputs[name] for name in shape.targets) * 2 * element
    kept += 2 * shape.hidden * element if setting.dropout else 0
    return batch.tokens * kept


def count_activation_bytes(shape: ModelShape, batch: BatchShape, setting: Setting) -> int:
    """What autograd keeps of a whole forward pass up to the logits, weights themselves left out."""
    layer, trains_all = count_layer_bytes(shape, batch, setting), shape.trains == "all"
    pure = setting.bf16 and not setting.autocast
    ends = batch.tokens * (
        shape.hidden * (FLOAT + (0 if not trains_all else 2 if pure else FLOAT))
        + FLOAT  # the last norm
        + 2 * shape.head_width * (2 if pure else FLOAT)  # cosine and sine of the positions
        + 8  # token ids
    )
    ends += batch.label_nodes * shape.hidden * setting.element  # what the output layer sees
    if not setting.checkpointing:
        return shape.layers * layer + ends
    # The input of every layer, the mask as bits, and one layer that is computed anew.
    inputs = shape.layers * batch.tokens * shape.hidden * (2 if pure else FLOAT)
    return inputs + (batch.pairs if batch.masked else 0) + layer + ends


def count_copy_bytes(shape: ModelShape, setting: Setting) -> int:
    """Copies of weights that a forward pass keeps: in bf16 under autocast, and token rows with the trained ones in."""
    copies = 0
    if setting.autocast:
        layers = shape.layers if shape.trains == "all" or not setting.checkpointing else 1
        copies += 2 * (shape.decoder_weights * layers // shape.layers + shape.row_weights)
        copies += 2 * shape.trainable * layers // shape.layers if shape.trains == "lora" else 0
    elif shape.trains != "all":
        copies += setting.element * shape.row_weights
    return copies


def count_logit_bytes(shape: ModelShape, batch: BatchShape, setting: Setting) -> int:
    """Logits and their gradient, at the nodes with labels; all else is computed from a part of them at a time.

    Under autocast accelerate makes both float32, and the gradient becomes bf16 again for the output layer.
    """
    element = 2 * FLOAT + 2 if setting.autocast else 2 * setting.element
    return element * batch.label_nodes * shape.vocabulary


def count_search_bytes(shape: ModelShape, search: SearchShape, setting: Setting) -> int:
    """Cache, logits and the widest layer of a search over several prompts at once."""
    queries, keys = shape.heads * shape.head_width, shape.key_heads * shape.head_width
    slots = search.length + search.beams * search.depth
    # Prompts stand in a cache of their own until they are in the buffer that the search fills. Keys are float32: the
    # rotation makes them so.
    key_value = keys * (2 * setting.element if not setting.autocast else FLOAT + 2)
    cache = shape.layers * key_value * (search.length + slots)
    # The logits of the step before are there while the next are computed; log-probabilities go prompt by prompt.
    logits = search.beams * (1 + search.forced) * shape.vocabulary * (FLOAT + (2 if setting.bf16 else 0))
    wide = max(search.length, search.beams * search.forced)
    layer = wide * (3 * shape.inner * setting.element + 3 * shape.hidden * FLOAT)
    layer += slots * (2 * queries * setting.element + wide * (1 + setting.element))
    return search.prompts * (cache + max(logits, layer)) + 3 * FLOAT * search.beams * search.forced * shape.vocabulary


# -------------------------------------------------------------------------------------------------------------- weights
def count_state_bytes(shape: ModelShape, setting: Setting) -> dict[str, int]:
    """{weights, gradients, optimizer, gathered, buckets}: what a process holds of the model while it trains.

    "gathered" are parts of other processes that are whole for a while, "buckets" those of gradients under way.
    """
    n, element = setting.processes, setting.element
    everything, learning, engine = shape.parameters, shape.trainable, setting.engine
    state = {"weights": 0, "gradients": 0, "optimizer": 0, "gathered": 0, "buckets": 0}
    if engine in ("one process", "DDP"):
        state |= {"weights": FLOAT * everything, "gradients": FLOAT * learning, "optimizer": ADAM * learning}
        state["buckets"] = FLOAT * learning if engine == "DDP" and n > 1 else 0
    elif engine == "FSDP2":
        # The root's own part, embedding and output layer, stays whole from the forward to the backward pass.
        root = shape.parameters - shape.layers * shape.layer_weights
        state |= {"weights": FLOAT * everything // n, "gradients": FLOAT * learning // n}
        state |= {"optimizer": ADAM * learning // n, "gathered": element * (root + 2 * shape.layer_weights)}
        state["buckets"] = element * 2 * shape.layer_weights if shape.trains == "all" else 0
    else:
        master = FLOAT if setting.bf16 or n > 1 else 0  # DeepSpeed keeps its own float32 parts of what learns
        state |= {"optimizer": (ADAM + master) * learning // n, "gradients": element * learning // n}
        state["weights"] = element * everything // (n if engine == "ZeRO-3" else 1)
        state["gathered"] = element * min(everything, LIVE) if engine == "ZeRO-3" else 0
        state["buckets"] = element * BUCKET
    return state


def count_phases(
    shape: ModelShape, batch: BatchShape, setting: Setting, searches: dict[str, SearchShape]
) -> dict[str, dict[str, int]]:
    """{phase: {what: bytes}} of everything that is there at the worst moment of each phase of a run.

    Args:
        shape: of the policy.
        batch: the largest micro-batch.
        setting: how it is computed.
        searches: {phase: its largest search}, such as rollouts and validation.
    """
    state = count_state_bytes(shape, setting)
    rows = FLOAT * shape.row_weights
    resident = {"weights": state["weights"], "optimizer": state["optimizer"]}
    if setting.reference:
        # Never sharded; its linear layers are held as autocast multiplies them.
        resident["reference model"] = FLOAT * shape.parameters - (2 * shape.decoder_weights if setting.autocast else 0)
    # With several micro-batches a step, gradients are whole when activations are. With one they take their place.
    training = {**resident, "gathered weights": state["gathered"], "gradient buckets": state["buckets"]}
    training["gradients"] = state["gradients"] if setting.accumulates else 0
    training["copies of weights"] = count_copy_bytes(shape, setting)
    training["activations"] = count_activation_bytes(shape, batch, setting)
    logits = count_logit_bytes(shape, batch, setting)
    # The gradient of the output layer's rows is there before those of the layers; of tied ones it waits for the end.
    head = rows if shape.trains != "all" or shape.tied or setting.accumulates else 0
    backward = batch.tokens * setting.element * (3 * shape.inner + 2 * shape.hidden)
    training["logits and backward pass"] = max(logits, logits // 2 + head, head + backward)
    ending = {**resident, "gradients": state["gradients"], "gradient buckets": state["buckets"]}
    ending["gathered weights"] = state["gathered"]
    # Of tied rows both gradients, as output layer and as embedding, wait to be added.
    ending["gradients of token rows"] = rows * (2 if shape.tied and shape.trains == "all" else 1)
    phases = {"training": training, "end of the backward pass": ending}
    for name, search in searches.items():
        whole = setting.element * shape.parameters if setting.shards else 0
        cached = 2 * (shape.decoder_weights + shape.row_weights) if setting.autocast and shape.trains == "all" else 0
        merged = rows if shape.trains != "all" else 0
        # At most: those of completions come later.
        shared = training["activations"] if setting.shares_prompts and name == "rollouts" else 0
        phases[name] = {
            **resident,
            "gathered weights": whole,
            "activations": shared,
            "copies of weights": cached + merged,
            "search": count_search_bytes(shape, search, setting),
        }
    if setting.exports_here:
        phases["export"] = {**resident, "the written model, loaded again": FLOAT * shape.parameters}
    return phases


def find_peak(phases: dict[str, dict[str, int]]) -> tuple[str, int]:
    """(phase, bytes) of the largest sum."""
    return max(((name, sum(parts.values())) for name, parts in phases.items()), key=lambda entry: entry[1])
