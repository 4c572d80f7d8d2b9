"""What a model takes in memory, predicted from its numbers, and the formats, cache and chunks that fit into what there
is.

    weights   what a step reads of them: all but the embedding table where that is a table of its own, of which a step
              reads a row a token; mapped pages count as they are read
    picture   a picture's activations; they are gone before the cache is there
    cache     keys and values of `tokens` tokens
    prompt    activations of a prompt, a picture's features among them
    base      Python, torch and this package

The most is base + weights + the larger of picture and cache + prompt.

Smaller formats come in the order of what they cost: first int8 keys and values and smaller chunks, which cost next to
nothing, then the next format of the weights ("int4" has int8 keys and values from the start). Of a packed checkpoint,
whose format is what it is, a part of the weights can stay on the disk (`qvl_model.paging`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from .config import Qwen3VLConfig

if TYPE_CHECKING:
    from .weights import StoredTensor

FORMATS = ("fp32", "bf16", "int8", "int4")  # of weights, best first
CACHES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "int8": torch.int8}
BASE_BYTES = 255 << 20  # measured: the command before a model is loaded
_LAYERS_AT_LEAST = 8  # of a model's weights an eighth has to fit, two layers and the head among them
_CHUNKS = ((1024, 1024), (512, 512), (256, 256))  # tokens of a prompt, patches of a picture


@dataclass(frozen=True)
class Use:
    """What a plan is made for: `tokens` in the cache, and the patches of the largest picture."""

    tokens: int = 4096
    patches: int = 4096


@dataclass(frozen=True)
class Plan:
    """How a model will run, and what it takes. Bytes; `weights`, `cache` are names of formats."""

    weights: str
    cache: str
    prefill_chunk: int
    image_rows: int
    use: Use
    weight_bytes: int
    cache_bytes: int
    prompt_bytes: int
    picture_bytes: int
    resident: int | None = None  # bytes of the weights that are in memory, None for all
    load_bytes: int = 0  # what loading needs beside the weights: the largest matrix, where matrices are packed then

    @property
    def nbytes(self) -> int:
        """What the model takes."""
        return (self.weight_bytes if self.resident is None else self.resident) + self.beside_weights

    @property
    def beside_weights(self) -> int:
        """What it takes at most beside its weights."""
        return max(self.load_bytes, self.picture_bytes, self.cache_bytes + self.prompt_bytes)

    @property
    def peak(self) -> int:
        """What the process takes."""
        return BASE_BYTES + self.nbytes


def choose(
    config: Qwen3VLConfig,
    stored: Mapping[str, StoredTensor],
    weights: str,
    budget: int,
    use: Use | None = None,
    device: str = "cpu",
) -> Plan:
    """The first plan that fits into `budget` bytes (of which the base is not part).

    Args:
        weights: a format, or "auto": the checkpoint's own or the first smaller one that fits.
        device: weights are packed for "cpu" only.

    Raises:
        MemoryError: none fits; the message has the bytes of the smallest, and names a format that would fit.
    """
    use = use or Use()
    last = None
    for plan in _plans(config, stored, weights, use, device):
        if plan.nbytes <= budget:
            return plan
        last = plan
    assert last is not None
    resident = budget - last.beside_weights
    if config.weights and resident * _LAYERS_AT_LEAST > last.weight_bytes:
        return replace(last, resident=resident)
    smaller = () if weights == "auto" or config.weights or device != "cpu" else FORMATS[FORMATS.index(weights) + 1 :]
    fitting = [plan for name in smaller for plan in _plans(config, stored, name, use) if plan.nbytes <= budget]
    hint = f"; weights={fitting[0].weights!r} takes {_gib(fitting[0].nbytes)}" if fitting else ""
    raise MemoryError(
        f"weights={last.weights!r} takes {_gib(last.nbytes)} ({_gib(last.weight_bytes)} of weights), "
        f"{_gib(budget)} may be used{hint}"
    )


def plan_for(config: Qwen3VLConfig, stored: Mapping[str, StoredTensor], weights: str, use: Use) -> Plan:
    """The first of the plans with these weights, whatever it takes."""
    return next(_plans(config, stored, weights, use))


def _plans(
    config: Qwen3VLConfig, stored: Mapping[str, StoredTensor], weights: str, use: Use, device: str = "cpu"
) -> Iterator[Plan]:
    """From the best to the smallest."""
    own = own_format(config, stored)
    names = [config.weights or weights]
    if names == ["auto"]:
        names = [name for name in FORMATS[FORMATS.index(own) :] if device == "cpu" or name in ("fp32", "bf16")]
    for name in names:
        here = config.weights and stored  # no model has to be made to know its bytes
        weight_bytes = bytes_of_packed(config, stored) if here else bytes_of_weights(config, name, own)
        packs = name in ("int8", "int4") and not config.weights
        load = config.text.vocab_size * config.text.hidden_size * (2 if own == "bf16" else 4) if packs else 0
        table = name if name in ("fp32", "bf16") else own
        caches = ("int8",) if name == "int4" else dict.fromkeys((table, "bf16", "int8"))  # what loses less than int4
        for keys in caches:
            for chunk, rows in _CHUNKS:
                cache, prompt = bytes_of_cache(config, keys, use), bytes_of_prompt(config, name, use, chunk)
                picture = bytes_of_picture(config, name, use, rows)
                yield Plan(name, keys, chunk, rows, use, weight_bytes, cache, prompt, picture, load_bytes=load)


def own_format(config: Qwen3VLConfig, stored: Mapping[str, StoredTensor]) -> str:
    """ "bf16" where most numbers of the checkpoint, or of a packed one its embedding table, have 16 bits, else "fp32";
    of a checkpoint that is not here, what its configuration says."""
    if not stored:
        return "fp32" if config.dtype == "float32" else "bf16"
    sizes: dict[str, int] = {}
    for tensor in stored.values():
        if "F" in tensor.dtype:
            sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.nbytes
    largest = max(sizes, key=lambda dtype: sizes[dtype], default="F32")
    return "bf16" if largest in ("BF16", "F16") else "fp32"


def bytes_of_weights(config: Qwen3VLConfig, weights: str, own: str) -> int:
    """Of all parameters, in their formats; the embedding table counts where it is the head too, or is converted."""
    from .model import Qwen3VL
    from .packing import expect_packed

    with torch.device("meta"):
        model = Qwen3VL(config)
    stored = torch.bfloat16 if own == "bf16" else torch.float32
    if weights != "fp32":
        expect_packed(model, weights, joined=False, stored=torch.bfloat16 if weights == "bf16" else stored)
    table = model.model.language_model.embed_tokens.weight
    nbytes = sum(tensor.nbytes for tensor in model.state_dict(keep_vars=True).values())
    mapped = weights in ("int8", "int4") or own == weights
    if model.head_is_table or mapped:
        nbytes -= table.nbytes
    return nbytes


def bytes_of_packed(config: Qwen3VLConfig, stored: Mapping[str, StoredTensor]) -> int:
    """The same, of a packed checkpoint that is here."""
    table = stored.get("model.language_model.embed_tokens.weight")
    is_head = config.tie_word_embeddings and config.weights == "bf16"
    return sum(tensor.nbytes for tensor in stored.values()) - (0 if is_head or table is None else table.nbytes)


def bytes_of_cache(config: Qwen3VLConfig, cache: str, use: Use) -> int:
    """Keys and values of all layers as if all were "fused"; int8 has a float32 scale for each token and head."""
    text = config.text
    heads = 2 * text.num_hidden_layers * text.num_key_value_heads * use.tokens
    dtype = CACHES[cache]
    return heads * (text.head_dim * dtype.itemsize + (4 if dtype == torch.int8 else 0))


def bytes_of_prompt(config: Qwen3VLConfig, weights: str, use: Use, chunk: int) -> int:
    """Activations of a prompt of which `chunk` tokens are computed at a time."""
    text = config.text
    heads = text.num_attention_heads * text.head_dim, text.num_key_value_heads * text.head_dim
    gate_up = text.intermediate_size * (1 if weights != "fp32" else 3)
    # Each token: x, residual and norm; then queries, keys, values twice (before and behind norm and rotation) and the
    # output, or the feed-forward layer; 2 bytes of x as integers.
    token = 4 * (3 * text.hidden_size + max(3 * heads[0] + 4 * heads[1], gate_up)) + 2 * text.intermediate_size
    # The prompt's embeddings twice, and the chunk's copy of them.
    embeddings = 4 * text.hidden_size * (2 * use.tokens + chunk)
    return _bytes_of_features(config, use) + embeddings + min(chunk, use.tokens) * token


def bytes_of_picture(config: Qwen3VLConfig, weights: str, use: Use, rows: int) -> int:
    """Activations of the largest picture, `rows` patches at a time between attentions."""
    vision = config.vision
    # Each patch: pixels, x before and behind a block, queries, keys, values, attention's output. Of `rows` patches
    # what lies between: the same again, and the feed-forward layer.
    patch = 4 * (vision.patch_dim + 6 * vision.hidden_size)
    between = vision.intermediate_size * (1 if weights != "fp32" else 2)
    row = 4 * max(8 * vision.hidden_size, 2 * vision.hidden_size + between, 2 * vision.patch_dim)
    return _bytes_of_features(config, use) + use.patches * patch + min(rows, use.patches) * row


def _bytes_of_features(config: Qwen3VLConfig, use: Use) -> int:
    """Of a picture's tokens, those of DeepStack among them."""
    merged = use.patches // config.vision.spatial_merge_size**2
    return 4 * merged * config.text.hidden_size * (1 + len(config.vision.deepstack_visual_indexes))


def _gib(nbytes: int) -> str:
    return f"{nbytes / 2**30:.2f} GiB"
