"""The memory that a training step takes at its peak, counted before it is run.

What the backward pass needs of a layer, in bytes per token, with C the hidden size, I that of the
MLP, H the heads, T the sequence length, and K = C on a CPU, where keys and values are copied to all
heads, and those of the key/value heads alone on a GPU:

    kept for                  fp32      16-bit          fp32 compiled   16-bit compiled
    two norms: input            8C        8C              4C              4C
               x / rms(x)       8C        8C              -               -
    projections: input          8C       10C              8C              4C
    q, out                      8C        4C              8C              4C
    k, v                        8K        4K              8K              4K
    softmax, rms                4H + 8    4H + 8          4H + 8          4H + 8
    output of attention          -         -              4C              2C
    gate, its SiLU, up, product 16I       8I             12I              6I

Under autocast each projection keeps a 16-bit copy of its input, its own. A compiled layer computes
anew what is cheap. `tests/test_plan.py` counts all of it.
"""

from __future__ import annotations

from dataclasses import dataclass

from hamner.machine import precision_on
from hamner.recipe import Recipe, StreamStage
from model import CPU_HEAD_TOKENS, MAX_LOGITS, ModelConfig

MAPPED_BYTES = 32 * 2**20  # glibc's DEFAULT_MMAP_THRESHOLD_MAX on 64 bits


@dataclass(frozen=True)
class Work:
    """All that the memory of a training step follows from."""

    config: ModelConfig
    rows: int  # sequences in one forward pass of one rank
    length: int  # tokens of a sequence
    micro_batches: int = 1  # a step has on one rank
    packed: bool = False  # several sequences in a row: attention takes a mask
    device_type: str = "cpu"
    half: bool = False  # 16-bit autocast
    compiled: bool = False
    checkpointing: bool = False
    muon: bool = False
    ranks: int = 1
    sharded: bool = False  # FSDP2 rather than DDP

    @property
    def tokens(self) -> int:
        """In one forward pass of one rank."""
        return self.rows * self.length


def work_of(
    recipe: Recipe, stage: str, device_type: str, *, checkpointing: bool, ranks: int = 1
) -> Work:
    """The work of a stage; where the recipe says `auto`, as it would be on this device."""
    settings, cuda = recipe.stage(stage), device_type == "cuda"
    each = 2 if stage == "dpo" else 1  # a pair is two sequences
    per_step = sequences_per_step(recipe, stage) // each // ranks
    rows = max(1, min(settings.micro_batch, per_step))
    return Work(
        recipe.model.config(),
        rows=each * rows,
        length=settings.sequence_length,
        micro_batches=max(1, -(-per_step // rows)),
        packed=not isinstance(settings, StreamStage),
        device_type=device_type,
        half=precision_on(device_type, recipe) != "fp32",
        compiled=cuda if recipe.compile == "auto" else bool(recipe.compile),
        checkpointing=checkpointing,
        muon=settings.optimizer.kind == "muon",
        ranks=ranks,
        sharded=ranks > 1 and recipe.parallel == "fsdp",
    )


def sequences_per_step(recipe: Recipe, stage: str) -> int:
    if stage == "dpo":
        return 2 * recipe.dpo.pairs_per_step
    return recipe.stage(stage).sequences_per_step  # type: ignore[attr-defined]


# ------------------------------------------------------------------------------ memory


def layer_bytes(work: Work) -> int:
    """What one layer keeps for its backward pass; the table above, times the tokens."""
    config, size = work.config, 2 if work.half else 4
    hidden, inner = config.hidden_size, config.intermediate_size
    if work.compiled:
        per_token = (4 + 3 * size) * hidden + 3 * size * inner
    else:
        inputs = 10 if work.half else 8
        per_token = (16 + inputs) * hidden + 4 * size * inner
    return work.tokens * (per_token + attention_bytes(work) + 8)


def attention_bytes(work: Work) -> int:
    """Per token of a layer: queries, keys, values, output, and what the softmax leaves."""
    config, size = work.config, 2 if work.half else 4
    heads, hidden = config.num_attention_heads, config.hidden_size
    apart = work.packed and work.device_type == "cpu" and not work.compiled  # `attend_apart`
    # torch turns a mask into numbers to add; the sequences' outputs are put together in a copy
    packing = size * (hidden if apart else work.length) if work.packed else 0
    flash = work.device_type == "cuda" and work.half and not work.packed  # as `model.attend` has it
    groups = flash or work.device_type == "cpu"
    keys = config.num_key_value_heads * config.head_dim if groups else hidden
    return size * 2 * (hidden + keys) + 4 * heads + packing


def backward_bytes(work: Work) -> int:
    """Gradients within a layer on their way back: two of the hidden size, two of the MLP's."""
    config, size = work.config, 2 if work.half else 4
    return work.tokens * (8 * config.hidden_size + 2 * size * config.intermediate_size)


def kept_bytes(work: Work) -> int:
    """What all layers and the last norm keep; recomputed layers keep their input alone."""
    hidden_states = 4 * work.tokens * work.config.hidden_size
    layer = hidden_states if work.checkpointing else layer_bytes(work)
    return work.config.num_hidden_layers * layer + 2 * hidden_states


def head_bytes(work: Work) -> tuple[int, int]:
    """What `model.head_loss` keeps (gradients of its input and weight), and takes besides.

    In 16 bits that is 14 bytes a logit: of one part the logits, once more in fp32, and their
    log-softmax, and of the part before it what waits to be replaced.
    """
    config, tokens = work.config, work.tokens
    most = CPU_HEAD_TOKENS if work.device_type == "cpu" else tokens
    part = min(tokens, max(1, MAX_LOGITS // config.vocab_size), most)
    inputs, weight = tokens * config.hidden_size, config.vocab_size * config.hidden_size
    logits = part * config.vocab_size
    if not work.half:
        return 4 * inputs + 4 * weight, 4 * logits
    return 2 * inputs + 4 * weight, 2 * inputs + 2 * weight + (14 if part < tokens else 8) * logits


def half_weight_bytes(work: Work) -> int:
    """16-bit copies that autocast makes of the layers' matrices; FSDP2 gathers such anyway."""
    if not work.half or work.sharded:
        return 0
    config = work.config
    layers = 2 * (config.matmul_parameters() - config.vocab_size * config.hidden_size)
    alone = work.checkpointing and work.compiled
    return layers // config.num_hidden_layers if alone else layers


def optimizer_bytes(work: Work) -> int:
    """Two moments for each parameter, and one for those that are Muon's."""
    config = work.config
    matrices = config.matmul_parameters() - config.vocab_size * config.hidden_size
    return 8 * config.num_parameters() - (4 * matrices if work.muon else 0)


def gathered_bytes(work: Work) -> int:
    """What FSDP2 puts together for a while: embedding, two layers, and gradients of one."""
    if not work.sharded:
        return 0
    config, size = work.config, 2 if work.half else 4
    embedding = config.vocab_size * config.hidden_size
    layer = (config.matmul_parameters() - embedding) // config.num_hidden_layers
    return size * (embedding + 2 * layer) + (size + 4) * layer


def gradients_kept_bytes(work: Work) -> int:
    """Gradients that are there when the last micro-batch of a step begins.

    A step's only micro-batch finds none, but DDP's buckets always are. FSDP2 shares them out after
    the last micro-batch: until then each rank adds up its own, whole.
    """
    size = 4 * work.config.num_parameters()
    several = work.micro_batches > 1
    if work.sharded:
        return size // work.ranks + (size if several else 0)
    return size if several or work.ranks > 1 else 0


def heap_bytes(work: Work) -> int:
    """On a CPU, freed memory that the C library's malloc doesn't hand back, and finds no use for.

    glibc gives blocks of 32 MiB and more back at once, and keeps smaller ones. How much it keeps is
    no calculation but what benchmarks/memory.py found: one and a half layers' worth, two where
    layers are recomputed, and 50 MiB whatever the shape.
    """
    if work.device_type != "cpu":
        return 0
    size, inner = 2 if work.half else 4, work.config.intermediate_size
    mlp = 4 * size * work.tokens * inner
    kept = layer_bytes(work)
    if size * work.tokens * inner >= MAPPED_BYTES:
        kept -= min(kept, mlp)
    if size * work.tokens * work.config.hidden_size >= MAPPED_BYTES:
        kept = 0
    return (4 if work.checkpointing else 3) * kept // 2 + 50 * 2**20


def memory_phases(work: Work) -> list[dict[str, int]]:
    """Bytes by part at the four places where a step's memory can be at its highest.

    The head's forward pass, its backward pass, that of the last layer, and that of the first.
    """
    config, shards = work.config, work.ranks if work.sharded else 1
    size, head_weight = 4 * config.num_parameters(), 4 * config.vocab_size * config.hidden_size
    before = gradients_kept_bytes(work)
    again = head_weight if config.tie_word_embeddings or before else 0
    always = {
        "weights": size // shards,
        "optimizer": optimizer_bytes(work) // shards,
        "gathered": gathered_bytes(work),
        "heap": heap_bytes(work),
    }
    kept, layer, copies = kept_bytes(work), layer_bytes(work), half_weight_bytes(work)
    one_layers = copies // config.num_hidden_layers
    last = layer * work.checkpointing + backward_bytes(work)
    head, besides = head_bytes(work)
    out = 8 * work.tokens * config.hidden_size  # of the last norm, and its copy without the last
    rows = [
        (before, copies, kept + out, head + besides),
        (before, one_layers if work.checkpointing else copies, kept, 2 * head),
        (before, one_layers if work.checkpointing else copies, kept + last, head_weight),
        (max(before, size // shards), one_layers, layer + backward_bytes(work), again),
    ]
    names = ("gradients", "16-bit weights", "activations", "head")
    return [{**always, **dict(zip(names, row, strict=True))} for row in rows]


def memory_bytes(work: Work) -> dict[str, int]:
    """Bytes by part where a training step takes most of them."""
    return max(memory_phases(work), key=lambda parts: sum(parts.values()))


def peak_bytes(work: Work) -> int:
    return sum(memory_bytes(work).values())


def copy_bytes(work: Work) -> int:
    """On a CPU, the copy from which a checkpoint is written lies in the same memory."""
    if work.device_type == "cuda":
        return 0
    return 4 * work.config.num_parameters() + optimizer_bytes(work)
