"""A checkpoint packed on disk: loading it is mapping it.

`model.safetensors` has the tensors of the packed model in the order in which a step uses them, every one at a multiple
of 64 bytes, so that kernels read the mapped pages as they are. The file is written one matrix at a time under another
name, with a journal of what is done: a run that was cut off goes on where it stopped, and only a complete file gets the
name that loads. `checksums.json` has the SHA-256 of every tensor, for `verify`.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qvl_kernels import PackedLinear, pack_linear

from .config import Qwen3VLConfig
from .files import write_then_rename
from .model import Qwen3VL
from .packing import expect_packed, joined, sites
from .processor import PROCESSOR_FILES, find_folder
from .weights import (
    CONFIG_NAME,
    DTYPE_NAMES,
    INDEX_NAME,
    PADDING,
    WEIGHTS_NAME,
    CheckpointError,
    StoredTensor,
    check_tensors,
    list_tensors,
    read_header,
    read_tensors,
    stored_dtype,
)

CHECKSUMS_NAME = "checksums.json"
_ALIGNMENT = 64


@dataclass(frozen=True)
class _Layout:
    """The header of the file and where each tensor's bytes begin, counted from the file's start."""

    header: bytes
    places: dict[str, tuple[int, int]]
    size: int


def pack_checkpoint(
    path_or_repo: str | os.PathLike[str],
    out: str | os.PathLike[str],
    weights: str,
    advance: Callable[[str], object] = lambda name: None,
) -> Path:
    """Writes the checkpoint with matrices packed as `weights` ("bf16", "int8", "int4") to the folder `out`.

    Args:
        path_or_repo: a released checkpoint; of it one matrix at a time is in memory.
        out: a folder, made if it is not there. What an interrupted run left there is used again.
        advance: is told the name of each tensor as it is written.

    Raises:
        CheckpointError, ConfigError, FileNotFoundError: of the source; ValueError: it is packed already; OSError: `out`
        cannot be written.
    """
    folder = find_folder(os.fspath(path_or_repo), (*PROCESSOR_FILES, "*.safetensors", INDEX_NAME))
    config = Qwen3VLConfig.from_json(folder / CONFIG_NAME)
    if config.weights:
        raise ValueError(f"{folder} is packed already, as {config.weights}")
    stored = list_tensors(folder)
    with torch.device("meta"):
        released, packed = Qwen3VL(config), Qwen3VL(config)
    check_tensors(stored, released, folder)
    table = torch.bfloat16 if weights == "bf16" else stored_dtype(stored)
    expect_packed(packed, weights, joined=True, stored=table)
    layout = _layout(packed)
    target = Path(out)
    target.mkdir(parents=True, exist_ok=True)
    if target.resolve() == folder.resolve():
        raise ValueError(f"{target}: the packed checkpoint needs a folder of its own")
    sums = _write(target / f"{WEIGHTS_NAME}.part", layout, packed_tensors(released, packed, stored, weights), advance)
    for name in PROCESSOR_FILES:
        if (folder / name).is_file() and name != CONFIG_NAME:
            shutil.copyfile(folder / name, target / name)
    write_then_rename(target / CHECKSUMS_NAME, lambda file: file.write_text(json.dumps(sums, indent=0) + "\n"))
    names = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
    write_then_rename(target / CONFIG_NAME, replace(config, weights=weights, dtype=names[table]).to_json)
    (target / f"{WEIGHTS_NAME}.part").replace(target / WEIGHTS_NAME)
    (target / f"{WEIGHTS_NAME}.part.journal").unlink()
    return target


def verify(folder: str | os.PathLike[str], advance: Callable[[str], object] = lambda name: None) -> int:
    """The number of tensors whose bytes have the checksum that was written with them.

    Raises:
        CheckpointError: one has not; the message names it. FileNotFoundError: there are no checksums.
    """
    folder = Path(folder)
    file = folder / CHECKSUMS_NAME
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file; `qvl pack` writes it beside the weights")
    sums = json.loads(file.read_text("utf-8"))
    weights = folder / WEIGHTS_NAME
    there = [name for name in read_header(weights) if not name.startswith(PADDING)]
    if set(there) != set(sums):
        raise CheckpointError(f"{weights}: its tensors are not those of {CHECKSUMS_NAME}")
    for name, tensor in read_tensors(weights, there):
        if _digest(tensor) != sums[name]:
            raise CheckpointError(f"{weights}: tensor {name!r} does not have its checksum: the file is damaged")
        advance(name)
    return len(there)


def _layout(packed: Qwen3VL) -> _Layout:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at, places = 0, {}
    for name, tensor in packed.state_dict(keep_vars=True).items():
        if name == "lm_head.weight" and packed.head_is_table:
            continue
        header[name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [at, at + tensor.nbytes],
        }
        places[name] = (at, tensor.nbytes)
        at += tensor.nbytes
        if rest := -at % _ALIGNMENT:
            header[f"{PADDING}{len(places)}"] = {"dtype": "U8", "shape": [rest], "data_offsets": [at, at + rest]}
            at += rest
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    start = 8 + len(text)
    moved = {name: (start + offset, size) for name, (offset, size) in places.items()}
    return _Layout(struct.pack("<Q", len(text)) + text, moved, start + at)


def packed_tensors(
    released: Qwen3VL, packed: Qwen3VL, stored: dict[str, StoredTensor], weights: str
) -> Iterator[tuple[tuple[str, ...], Callable[[], dict[str, Tensor]]]]:
    """Names of the packed file that belong together, and what makes their tensors; in the file's order."""
    parts_of = {site.path: site for site in sites(released, weights, joined=True)}
    head, table = "lm_head.weight", "model.language_model.embed_tokens.weight"
    aliases = {head: table, table: head}  # of a tied head either may be stored

    def read(name: str) -> Tensor:
        name = name if name in stored else aliases[name]
        return next(tensor for _, tensor in read_tensors(stored[name].file, [name]))

    for path, module in packed.named_modules():
        if isinstance(module, PackedLinear):
            names = tuple(f"{path}.{name}" for name in module.state_dict())
            yield names, functools.partial(_packed, parts_of[path].sources(), path, module, read)
        else:
            for name, tensor in module.named_parameters(recurse=False, prefix=path):
                yield (name,), functools.partial(_converted, name, tensor.dtype, read)


def _converted(name: str, dtype: torch.dtype, read: Callable[[str], Tensor]) -> dict[str, Tensor]:
    return {name: read(name).to(dtype)}


def _packed(sources: list[str], path: str, like: PackedLinear, read: Callable[[str], Tensor]) -> dict[str, Tensor]:
    weight = joined([read(f"{source}.weight") for source in sources])
    bias = joined([read(f"{source}.bias") for source in sources]) if like.bias is not None else None
    assert weight is not None
    layer = PackedLinear(pack_linear(weight, bias, format=like.format))
    return {f"{path}.{name}": tensor for name, tensor in layer.state_dict().items()}


def _write(part: Path, layout: _Layout, groups: Any, advance: Callable[[str], object]) -> dict[str, str]:
    """Fills the file, from where an earlier run of the same layout stopped; returns the checksums."""
    journal = part.with_name(part.name + ".journal")
    begun = part.is_file() and part.stat().st_size == layout.size and journal.is_file()
    if begun:
        with part.open("rb") as stream:
            begun = stream.read(len(layout.header)) == layout.header
    sums: dict[str, str] = {}
    if begun:
        for line in journal.read_text("utf-8").splitlines():
            try:
                sums |= json.loads(line)
            except ValueError:  # the line that was being written
                break
    with part.open("r+b" if begun else "w+b") as stream, journal.open("a" if begun else "w", encoding="utf-8") as done:
        if not begun:
            stream.truncate(layout.size)
            stream.write(layout.header)
        for names, make in groups:
            wanted = [name for name in names if name in layout.places]
            if not wanted or all(name in sums for name in wanted):
                continue
            made = make()
            new = {}
            for name in wanted:
                tensor = made[name].detach().contiguous()
                start, size = layout.places[name]
                assert tensor.nbytes == size, name
                stream.seek(start)
                stream.write(tensor.flatten().view(torch.uint8).numpy().data)
                new[name] = _digest(tensor)
                advance(name)
            stream.flush()
            os.fsync(stream.fileno())
            done.write(json.dumps(new) + "\n")
            done.flush()
            sums |= new
    return sums


def _digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().flatten().view(torch.uint8).numpy().data).hexdigest()
