"""Checkpoints on disk <-> modules: safetensors, single or sharded, mapped into memory instead of copied.

A parameter whose dtype on disk is the wanted one *is* the file's page-cache pages (a private mapping): nothing is read
before it is used, the kernel may drop the pages again, and writing to such a parameter never reaches the file. Other
parameters are converted one at a time. Everything is checked (headers, shards, names, shapes) before the first
parameter is assigned, so a bad checkpoint never leaves a half-loaded model behind.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .config import Qwen3VLConfig
from .files import write_then_rename
from .memory import available_memory, keep_freed, parse_bytes, pick_device
from .planning import FORMATS, choose

if TYPE_CHECKING:
    from .model import Qwen3VL

WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
CONFIG_NAME = "config.json"
PADDING = "padding."  # names of bytes between tensors: the format allows no holes

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I8": torch.int8,
    "U8": torch.uint8,
}
DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_DTYPE_BYTES = {
    name: size
    for size, names in {
        8: ("F64", "I64", "U64"),
        4: ("F32", "I32", "U32"),
        2: ("F16", "BF16", "I16", "U16"),
        1: ("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0"),
    }.items()
    for name in names
}
_MAX_HEADER_BYTES = 100_000_000

Model = TypeVar("Model", bound="Qwen3VL")


class CheckpointError(ValueError):
    """A checkpoint cannot be loaded; the message names the file and, where there is one, the tensor."""


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies: its file, its dtype as safetensors writes it ("BF16") and its shape."""

    file: Path
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * _DTYPE_BYTES[self.dtype]


def read_header(file: Path) -> dict[str, StoredTensor]:
    """Names, dtypes and shapes of a safetensors file, checked against its size without reading any data.

    Layout: 8 bytes little-endian header length N, N bytes of JSON {name: {dtype, shape, data_offsets}}, then the data.
    Raises CheckpointError naming the file (and tensor) for whatever does not add up.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        prefix = stream.read(8)
        if len(prefix) < 8:
            raise CheckpointError(f"{file}: truncated, {size} bytes are too few for a safetensors header")
        length = struct.unpack("<Q", prefix)[0]
        if length > size - 8 or length > _MAX_HEADER_BYTES:
            raise CheckpointError(
                f"{file}: the header claims {length} bytes but the file has {size}: "
                "truncated, or not a safetensors file"
            )
        try:
            header = json.loads(stream.read(length))
        except ValueError as error:
            raise CheckpointError(f"{file}: the safetensors header is not valid JSON ({error})") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{file}: the safetensors header is not a JSON object")
    header.pop("__metadata__", None)
    return {name: _checked_entry(file, name, entry, size - 8 - length) for name, entry in header.items()}


def _checked_entry(file: Path, name: str, entry: Any, data_bytes: int) -> StoredTensor:
    where = f"{file}: tensor {name!r}"
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    except (KeyError, TypeError, ValueError):
        raise CheckpointError(f"{where}: the header must give dtype, shape and two data_offsets, got {entry}") from None
    if not isinstance(dtype, str) or dtype not in _DTYPE_BYTES:
        raise CheckpointError(f"{where}: unknown dtype {dtype!r}")
    if not all(isinstance(n, int) and n >= 0 for n in (*shape, begin, end)):
        raise CheckpointError(f"{where}: shape and data_offsets must be whole numbers >= 0, got {entry}")
    tensor = StoredTensor(file, dtype, shape)
    if end > data_bytes:
        raise CheckpointError(
            f"{where}: lies at bytes {begin}:{end} of the data but the file has {data_bytes}: truncated"
        )
    if end - begin != tensor.nbytes:
        raise CheckpointError(
            f"{where}: shape {shape} in {dtype} takes {tensor.nbytes} bytes, the header gives it {end - begin}"
        )
    return tensor


def list_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of the checkpoint in `folder`, from `model.safetensors` or the shards of its index."""
    if (folder / WEIGHTS_NAME).is_file():
        return read_header(folder / WEIGHTS_NAME)
    index_file = folder / INDEX_NAME
    if not index_file.is_file():
        other = sorted(p.name for p in folder.glob("*.bin")) + sorted(p.name for p in folder.glob("*.gguf"))
        hint = f" ({other[0]} is not safetensors, the only format read)" if other else ""
        raise FileNotFoundError(f"{folder}: holds neither {WEIGHTS_NAME} nor {INDEX_NAME}{hint}")
    try:
        shard_of = json.loads(index_file.read_text("utf-8"))["weight_map"]
        shards = {shard: folder / shard for shard in sorted(set(shard_of.values()))}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index_file}: must be a JSON object with a weight_map ({error})") from None
    stored: dict[str, dict[str, StoredTensor]] = {}
    for shard, file in shards.items():
        if os.path.dirname(shard):
            raise CheckpointError(f"{index_file}: a shard must lie in the checkpoint's folder, got {shard!r}")
        if not file.is_file():
            raise FileNotFoundError(f"{file}: missing shard, named by {INDEX_NAME}")
        stored[shard] = read_header(file)
    for name, shard in shard_of.items():
        if name not in stored[shard]:
            raise CheckpointError(f"{shards[shard]}: tensor {name!r} is missing, {INDEX_NAME} says it is here")
    return {name: tensor for tensors in stored.values() for name, tensor in tensors.items()}


def check_tensors(stored: Mapping[str, StoredTensor], model: Qwen3VL, folder: Path) -> None:
    """Raises CheckpointError unless `stored` holds exactly what `model` needs, in the model's shapes.

    Of names that share one parameter (a tied head) at least one must be stored.
    """
    groups = _parameter_groups(model)
    missing = [names[0] for names, _ in groups if not any(name in stored for name in names)]
    if missing:
        wanted = "it" if len(missing) == 1 else "them"
        raise CheckpointError(f"{folder}: {_some(missing)} missing from the checkpoint; config.json asks for {wanted}")
    known = {name for names, _ in groups for name in names}
    unexpected = [name for name in stored if name not in known and not name.startswith(PADDING)]
    if unexpected:
        file = stored[unexpected[0]].file
        raise CheckpointError(
            f"{file}: {_some(unexpected)} not expected: the model of config.json has none of that name"
        )
    for names, tensor in groups:
        for name in names:
            found = stored.get(name)
            if found is None:
                continue
            if found.shape != tuple(tensor.shape):
                raise CheckpointError(
                    f"{found.file}: tensor {name!r} has shape {found.shape}, config.json asks for {tuple(tensor.shape)}"
                )
            if not tensor.is_floating_point() and _DTYPES.get(found.dtype) != tensor.dtype:
                raise CheckpointError(f"{found.file}: tensor {name!r} is stored as {found.dtype}, not {tensor.dtype}")
            if tensor.is_floating_point() and not found.dtype.lstrip("B").startswith("F"):
                raise CheckpointError(
                    f"{found.file}: tensor {name!r} is stored as {found.dtype}; float32, bfloat16, float16 can be read"
                )


def _parameter_groups(model: Qwen3VL) -> list[tuple[list[str], Tensor]]:
    """The parameters and buffers of `model`, each with every name that it goes by (two for a tied head)."""
    state = model.state_dict(keep_vars=True)
    head = state.pop("lm_head.weight") if model.head_is_table else None
    groups = [([name], tensor) for name, tensor in state.items()]
    if head is not None:
        next(names for names, _ in groups if names[0].endswith("embed_tokens.weight")).append("lm_head.weight")
    return groups


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more are" if len(names) > 3 else " is" if len(names) == 1 else " are"
    return ("tensor " if len(names) == 1 else "tensors ") + ", ".join(repr(name) for name in names[:3]) + more


def assign_tensors(model: Qwen3VL, stored: Mapping[str, StoredTensor], device: torch.device) -> None:
    """Gives `model` (built on the meta device, in the dtypes that are wanted) its tensors: the mapped pages where dtype
    and device match, else converted."""
    wanted = {
        next(name for name in names if name in stored): (names, tensor.dtype)
        for names, tensor in _parameter_groups(model)
    }
    mapped, converted = defaultdict(list), []
    for name, (_, dtype) in wanted.items():
        if _DTYPES[stored[name].dtype] == dtype and device.type == "cpu":
            mapped[stored[name].file].append(name)
        else:
            converted.append(name)
    for file, names in mapped.items():
        for name, tensor in read_tensors(file, names):
            _assign(model, wanted[name][0], tensor)
    for name in converted:
        # A mapping for each: with it go the pages that were read, so that at no time two copies are resident.
        for _, tensor in read_tensors(stored[name].file, [name]):
            _assign(model, wanted[name][0], tensor.to(device=device, dtype=wanted[name][1]))


def read_tensors(file: Path, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    name = None
    """The tensors of these names, mapped."""
    try:
        with safe_open(file, framework="pt", device="cpu") as mapped:
            for name in names:
                yield name, mapped.get_tensor(name)
    except SafetensorError as error:
        raise CheckpointError(f"{file}: {f'tensor {name!r}: ' if name else ''}{error}") from None


def _assign(model: nn.Module, names: Iterable[str], value: Tensor) -> None:
    parameter = nn.Parameter(value) if value.is_floating_point() else value
    for name in names:
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        setattr(module, leaf, value if leaf in module._buffers else parameter)


def check_format(weights: str) -> None:
    """Raises ValueError, naming the formats that exist, unless `weights` is one of them or "auto"."""
    if weights != "auto" and weights not in FORMATS:
        raise ValueError(f"weights={weights!r} is no weight format; there are auto, {', '.join(FORMATS)}")


def load_pretrained(
    cls: type[Model],
    path_or_repo: str | os.PathLike[str],
    *,
    weights: str = "auto",
    attention: str | Sequence[str] | None = None,
    vision_attention: str | Sequence[str] | None = None,
    fusion: str = "deepstack",
    device: str | torch.device = "auto",
    max_memory: int | str | None = None,
    precision: str = "medium",
) -> Model:
    """The model of a checkpoint in the released format (config.json and safetensors), in eval mode.

    Args:
        path_or_repo: a local folder, or a hub id such as "Qwen/Qwen3-VL-2B-Instruct".
        weights: "fp32"; "bf16", "int8", "int4": packed on the CPU (`qvl_model.packing`), float32 activations, matrices
            that cannot be trained; or "auto": the checkpoint's own, smaller where that would exceed `max_memory`.
        attention, vision_attention, fusion: of `Qwen3VL`.
        device: "auto", "cpu", "cuda", "cuda:1", ...
        max_memory: bytes (or "12GB") that the model may take: weights, a cache of 4096 tokens, and what a prompt and
            a picture of 1024 x 1024 need to be computed (`qvl_model.planning`); by default what the device has free.
            Where that is little, the cache becomes int8 and chunks smaller, then the weights; a packed checkpoint
            that is larger still keeps a part of its weights on the disk (`qvl_model.paging`).
        precision: of products with packed matrices, `qvl_kernels.packed_linear`, and of the softmax attention beside
            them: "medium", or "highest" for factors that are rounded as little as the format allows.

    The model is complete or there is none; `model.plan` says what was chosen. Parameters whose dtype is the stored one
    are mapped, not copied. On the CPU the process keeps some of the memory that it frees (`memory.keep_freed`).

    Raises:
        FileNotFoundError: no such folder, file, shard, or hub repository.
        CheckpointError, ConfigError: the message names the file and the tensor or field.
        MemoryError: no plan fits into `max_memory`; the message names a format that would.
    """
    from .packing import pack_model, set_precision
    from .paging import page
    from .processor import PROCESSOR_FILES, find_folder  # with it come tokenizers, jinja2 and pillow

    check_format(weights)
    if precision not in ("highest", "medium"):
        raise ValueError(f"precision must be 'highest' or 'medium', got {precision!r}")
    folder = find_folder(os.fspath(path_or_repo), (*PROCESSOR_FILES, "*.safetensors", INDEX_NAME))
    config = Qwen3VLConfig.from_json(folder / CONFIG_NAME)
    stored = list_tensors(folder)
    with torch.device("meta"):
        model = cls(config, attention=attention, vision_attention=vision_attention, fusion=fusion)
    target = pick_device(device, sum(tensor.nbytes for tensor in stored.values()))
    budget = available_memory(target) if max_memory is None else parse_bytes(max_memory)
    if config.weights and weights not in ("auto", config.weights):
        raise ValueError(f"{folder} is packed as {config.weights}, weights={weights!r} is not in it")
    plan = choose(config, stored, weights, budget, device=target.type)
    quantised = plan.weights in ("int8", "int4") and not config.weights
    if quantised and target.type == "cpu":
        model = _packed_on_the_way(model, stored, plan.weights, folder)
    else:
        _expect(model, stored, plan.weights, target)
        check_tensors(stored, model, folder)
        assign_tensors(model, stored, target)
        model.tie_weights()
        if quantised:
            pack_model(model, plan.weights)
    if target.type == "cpu":
        keep_freed()
    set_precision(model, precision)
    model.model.visual.rows = plan.image_rows
    model.plan = plan
    if plan.resident is not None:
        page(model, plan.resident)
    model.processor_source = str(folder)
    return model.eval()


def _expect(model: Qwen3VL, stored: Mapping[str, StoredTensor], weights: str, device: torch.device) -> None:
    """Makes a model on the meta device ask for what is stored, in the dtypes that are wanted."""
    from .packing import expect_packed

    if model.config.weights or (weights == "bf16" and device.type == "cpu"):
        table = torch.bfloat16 if weights == "bf16" else stored_dtype(stored)
        expect_packed(model, weights, joined=bool(model.config.weights), stored=table)
    else:
        model.to({"fp32": torch.float32, "bf16": torch.bfloat16}.get(weights, stored_dtype(stored)))


def _packed_on_the_way(model: Model, stored: dict[str, StoredTensor], weights: str, folder: Path) -> Model:
    """A model like the given one, which is on the meta device, with the checkpoint's matrices packed. Of what is stored
    one matrix at a time is in memory."""
    from .pack_file import packed_tensors
    from .packing import expect_packed

    check_tensors(stored, model, folder)
    with torch.device("meta"):
        packed = type(model)(
            model.config, attention=model.attention, vision_attention=model.vision_attention, fusion=model.fusion
        )
    expect_packed(packed, weights, joined=True, stored=stored_dtype(stored))
    for _, make in packed_tensors(model, packed, stored, weights):
        for name, tensor in make().items():
            _assign(packed, [name], tensor)
    packed.tie_weights()
    packed.config = replace(packed.config, weights=weights)
    return packed


def stored_dtype(stored: Mapping[str, StoredTensor]) -> torch.dtype:
    """Of the embedding table: float32 or bfloat16, float16 becomes float32."""
    names = ("model.language_model.embed_tokens.weight", "lm_head.weight")
    dtypes = [stored[name].dtype for name in names if name in stored]
    return torch.bfloat16 if dtypes[:1] == ["BF16"] else torch.float32


def save_pretrained(model: Qwen3VL, folder: str | os.PathLike[str]) -> None:
    """Writes `config.json` and `model.safetensors` in the released format, or packed as the model is; a tied head is
    left out.

    Each file is written under a temporary name and then renamed, so a reader, or a crash, never meets half a file.

    Raises:
        OSError: the folder cannot be written; the message names it.
    """
    folder = Path(folder)
    dtype = model.model.language_model.embed_tokens.weight.dtype
    config = replace(model.config, dtype=str(dtype).removeprefix("torch."))
    tensors = {names[0]: tensor.detach().contiguous() for names, tensor in _parameter_groups(model)}
    if not config.weights:  # mapped bf16 matrices have float32 norms beside them
        tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_then_rename(folder / WEIGHTS_NAME, lambda file: save_file(tensors, file, metadata={"format": "pt"}))
        write_then_rename(folder / CONFIG_NAME, config.to_json)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise OSError(f"{folder}: the checkpoint cannot be written here ({reason})") from error
