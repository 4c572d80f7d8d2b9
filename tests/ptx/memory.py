"""State spaces: global memory with bounds, and shared and local memory that find unwritten reads and races."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .counts import SECTOR, Counts
from .dtypes import PtxError

_WIDEST = 16  # bytes of the widest access


@dataclass
class Region:
    """Bytes [start, end) of this process that a kernel may touch; `bytes_` begins at `origin`, 16-byte aligned."""

    name: str
    start: int
    end: int
    writable: bool
    keep: Any  # what owns the memory
    origin: int = 0
    bytes_: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint8))
    loaded: np.ndarray = field(default_factory=lambda: np.empty(0, bool))  # by sector
    stored: np.ndarray = field(default_factory=lambda: np.empty(0, bool))

    def __post_init__(self) -> None:
        self.origin = self.start - self.start % SECTOR
        size = self.end - self.origin
        padded = (ctypes.c_uint8 * size).from_address(self.origin)
        self.bytes_ = np.frombuffer(padded, np.uint8)
        self.loaded = np.zeros(-(-size // SECTOR), bool)
        self.stored = np.zeros(-(-size // SECTOR), bool)


class GlobalMemory:
    """The buffers of a launch at their own addresses in this process. An access outside all of them is an error."""

    def __init__(self) -> None:
        self.regions: list[Region] = []

    def add_tensor(self, name: str, tensor: Any, *, writable: bool = True) -> None:
        """Registers what a torch tensor on the CPU spans, from its first element to its last."""
        if tensor is not None and tensor.numel():
            span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
            self.add(name, tensor.data_ptr(), span * tensor.element_size(), tensor, writable=writable)

    def add_array(self, name: str, array: np.ndarray, *, writable: bool = True) -> int:
        """Registers a contiguous array; returns its address."""
        self.add(name, array.ctypes.data, array.nbytes, array, writable=writable)
        return array.ctypes.data

    def add(self, name: str, start: int, size: int, keep: Any, *, writable: bool = True) -> None:
        self.regions.append(Region(name, start, start + size, writable, keep))

    def begin(self) -> None:
        """Forgets which sectors were touched: a launch begins."""
        for region in self.regions:
            region.loaded[:] = False
            region.stored[:] = False

    def count_distinct(self, counts: Counts) -> None:
        """Adds the sectors touched since `begin`. A sector at the seam of two buffers counts for both."""
        counts.distinct_loaded_sectors += sum(int(region.loaded.sum()) for region in self.regions)
        counts.distinct_stored_sectors += sum(int(region.stored.sum()) for region in self.regions)

    def load(self, addresses: np.ndarray, dtype: np.dtype, count: int) -> np.ndarray:
        """(threads, count) values from aligned addresses."""
        values = np.empty((addresses.size, count), dtype)
        for region, where in self._split(addresses, dtype.itemsize * count, "load"):
            offsets = addresses[where] - np.uint64(region.origin)
            region.loaded[offsets // np.uint64(SECTOR)] = True
            values[where] = _gather(region.bytes_, offsets, dtype, count)
        return values

    def store(self, addresses: np.ndarray, values: np.ndarray) -> None:
        """values (threads, count) to aligned addresses."""
        for region, where in self._split(addresses, values.dtype.itemsize * values.shape[1], "store"):
            if not region.writable:
                raise AccessError(f"store to {region.name}, which is an input", where)
            offsets = addresses[where] - np.uint64(region.origin)
            region.stored[offsets // np.uint64(SECTOR)] = True
            _scatter(region.bytes_, offsets, values[where])

    def _split(self, addresses: np.ndarray, width: int, what: str) -> list[tuple[Region, Any]]:
        """The regions that hold the accesses, each with the indices of its own."""
        check_alignment(addresses, width, what)
        first, last = int(addresses.min()), int(addresses.max()) + width
        for region in self.regions:
            if region.start <= first and last <= region.end:
                return [(region, slice(None))]
        found = []
        left = np.ones(addresses.size, bool)
        for region in self.regions:
            inside = left & (addresses >= region.start) & (addresses + np.uint64(width) <= region.end)
            if inside.any():
                found.append((region, np.flatnonzero(inside)))
                left &= ~inside
        if left.any():
            raise AccessError(f"{what} of {width} bytes {self._nearest(int(addresses[left][0]))}", np.flatnonzero(left))
        return found

    def _nearest(self, address: int) -> str:
        if not self.regions:
            return f"at {address:#x}: no buffer is registered"
        region = min(self.regions, key=lambda r: max(r.start - address, address - r.end + 1))
        where = f"{address - region.start} of {region.name}, which has {region.end - region.start} bytes"
        return f"out of bounds: at byte {where}"


class AccessError(PtxError):
    """An error in an access, with the indices of the threads (among those that made it) that are to blame."""

    def __init__(self, message: str, where: Any) -> None:
        super().__init__(message)
        self.first = 0 if isinstance(where, slice) else int(np.asarray(where).flat[0])


def check_alignment(addresses: np.ndarray, width: int, what: str) -> None:
    """Raises AccessError where an address is not a multiple of the access's width."""
    wrong = addresses % np.uint64(width) != 0
    if wrong.any():
        raise AccessError(f"{what} of {width} bytes is misaligned", np.flatnonzero(wrong))


def _gather(buffer: np.ndarray, offsets: np.ndarray, dtype: np.dtype, count: int) -> np.ndarray:
    size = dtype.itemsize
    typed = buffer[: buffer.size // size * size].view(dtype)
    first = (offsets // np.uint64(size)).astype(np.int64)
    return typed[first[:, None] + np.arange(count)]


def _scatter(buffer: np.ndarray, offsets: np.ndarray, values: np.ndarray) -> None:
    size = values.dtype.itemsize
    typed = buffer[: buffer.size // size * size].view(values.dtype)
    first = (offsets // np.uint64(size)).astype(np.int64)
    typed[first[:, None] + np.arange(values.shape[1])] = values


_NOBODY = -1
_SEVERAL_WARPS = -(1 << 30)


class SharedMemory:
    """`size` bytes for each block of a batch.

    A race is two accesses to a byte by different threads, one of them a store, with no barrier of the block between
    them (and, within a warp, no bar.warp.sync). Every access is stamped with a clock; a barrier records the time at
    which it was passed, so an earlier access is one whose stamp is older.
    """

    def __init__(self, blocks: int, size: int, threads_per_block: int) -> None:
        self.size = size
        self.padded = -(-size // _WIDEST) * _WIDEST
        self.threads_per_block = threads_per_block
        total = blocks * self.padded
        self.bytes_ = np.zeros(total, np.uint8)
        self.written = np.zeros(total, bool)
        self.writer = np.full(total, _NOBODY, np.int64)
        self.write_time = np.zeros(total, np.int64)
        # The thread that read last; -2 - warp for several threads of one warp.
        self.reader = np.full(total, _NOBODY, np.int64)
        self.read_time = np.zeros(total, np.int64)
        self.clock = 1
        self.block_time = np.zeros(blocks, np.int64)
        self.warp_time = np.zeros(blocks * threads_per_block // 32, np.int64)

    def pass_barrier(self, blocks: np.ndarray) -> None:
        """All accesses of these blocks so far come before all later ones."""
        self.clock += 1
        self.block_time[blocks] = self.clock

    def pass_warp_barrier(self, warps: np.ndarray) -> None:
        """The same for the threads of each of these warps."""
        self.clock += 1
        self.warp_time[warps] = self.clock

    def load(self, threads: np.ndarray, addresses: np.ndarray, dtype: np.dtype, count: int) -> np.ndarray:
        """(threads, count) values from aligned addresses."""
        width = dtype.itemsize * count
        offsets, at = self._locate(threads, addresses, width, "load")
        unwritten = ~self.written[at].all(axis=1)
        if unwritten.any():
            where = np.flatnonzero(unwritten)
            raise AccessError(f"load of shared memory at {addresses[where[0]]} that nobody wrote", where)
        self._check_race(threads, at, self.writer, self.write_time, "a store by", "load")
        self._note_readers(threads, at)
        return _gather(self.bytes_, offsets, dtype, count)

    def store(self, threads: np.ndarray, addresses: np.ndarray, values: np.ndarray) -> None:
        """values (threads, count) to aligned addresses."""
        offsets, at = self._locate(threads, addresses, values.dtype.itemsize * values.shape[1], "store")
        self._check_race(threads, at, self.writer, self.write_time, "a store by", "store")
        self._check_race(threads, at, self.reader, self.read_time, "a load by", "store")
        self.clock += 1
        owner = np.broadcast_to(threads[:, None], at.shape)
        self.writer[at] = owner
        self.write_time[at] = self.clock
        self.written[at] = True
        clash = (self.writer[at] != owner).any(axis=1)
        if clash.any():
            raise AccessError("race: two threads store to one byte in the same instruction", np.flatnonzero(clash))
        _scatter(self.bytes_, offsets, values)

    def _locate(
        self, threads: np.ndarray, addresses: np.ndarray, width: int, what: str
    ) -> tuple[np.ndarray, np.ndarray]:
        check_alignment(addresses, width, what)
        outside = addresses + np.uint64(width) > np.uint64(self.size)
        if outside.any():
            where = np.flatnonzero(outside)
            at = f"at byte {addresses[where[0]]} of {self.size}"
            raise AccessError(f"{what} of {width} bytes of shared memory out of bounds: {at}", where)
        offsets = addresses + (threads // self.threads_per_block * self.padded).astype(np.uint64)
        return offsets, offsets.astype(np.int64)[:, None] + np.arange(width)

    def _check_race(
        self, threads: np.ndarray, at: np.ndarray, who: np.ndarray, when: np.ndarray, other: str, what: str
    ) -> None:
        me = threads[:, None]
        previous, time = who[at], when[at]
        recent = (previous != _NOBODY) & (time > self.block_time[me // self.threads_per_block])
        previous_warp = np.where(previous >= 0, previous // 32, -2 - previous)
        ordered_in_warp = (previous_warp == me // 32) & (time < self.warp_time[me // 32])
        racing = (recent & (previous != me) & ~ordered_in_warp).any(axis=1)
        if racing.any():
            where = np.flatnonzero(racing)
            lane = previous[where[0]][recent[where[0]]][0]
            culprit = f"thread {lane % self.threads_per_block}" if lane >= 0 else "several threads"
            raise AccessError(f"race in shared memory: this {what} and {other} {culprit}, no barrier between", where)

    def _note_readers(self, threads: np.ndarray, at: np.ndarray) -> None:
        me = np.broadcast_to(threads[:, None], at.shape)
        previous = self.reader[at]
        stale = self.read_time[at] <= self.block_time[me // self.threads_per_block]
        self.clock += 1
        self.reader[at] = me
        alone = (self.reader[at] == me) & (stale | (previous == _NOBODY) | (previous == me))
        if not alone.all():
            warp = me // 32
            previous_warp = np.where(previous >= 0, previous // 32, -2 - previous)
            same_warp = stale | (previous == _NOBODY) | (previous_warp == warp)
            crowd = np.where(same_warp, -2 - warp, _SEVERAL_WARPS)
            self.reader[at[~alone]] = crowd[~alone]
            mixed = (self.reader[at] != crowd) & ~alone
            self.reader[at[mixed]] = _SEVERAL_WARPS
        self.read_time[at] = self.clock


class LocalMemory:
    """`size` bytes for each thread."""

    def __init__(self, threads: int, size: int) -> None:
        self.size = -(-size // _WIDEST) * _WIDEST
        self.bytes_ = np.zeros(threads * self.size, np.uint8)

    def load(self, threads: np.ndarray, addresses: np.ndarray, dtype: np.dtype, count: int) -> np.ndarray:
        return _gather(self.bytes_, self._locate(threads, addresses, dtype.itemsize * count), dtype, count)

    def store(self, threads: np.ndarray, addresses: np.ndarray, values: np.ndarray) -> None:
        _scatter(self.bytes_, self._locate(threads, addresses, values.dtype.itemsize * values.shape[1]), values)

    def _locate(self, threads: np.ndarray, addresses: np.ndarray, width: int) -> np.ndarray:
        check_alignment(addresses, width, "local access")
        outside = addresses + np.uint64(width) > np.uint64(self.size)
        if outside.any():
            raise AccessError("access to local memory out of bounds", np.flatnonzero(outside))
        return addresses + (threads * self.size).astype(np.uint64)


def count_sectors(warps: np.ndarray, addresses: np.ndarray) -> int:
    """Distinct (warp, 32-byte sector) pairs of an access no wider than a sector."""
    sectors = addresses // np.uint64(SECTOR)
    # Lanes are in order of their warps, and neighbours mostly share a sector: only changes need a look.
    change = np.empty(sectors.size, bool)
    change[0] = True
    np.logical_or(sectors[1:] != sectors[:-1], warps[1:] != warps[:-1], out=change[1:])
    candidates = warps[change].astype(np.uint64) << np.uint64(44) ^ sectors[change] % np.uint64(1 << 44)
    return int(np.unique(candidates).size)


def count_bank_passes(threads: np.ndarray, addresses: np.ndarray, width: int) -> tuple[int, int]:
    """(accesses, further passes) over 32 banks of 4 bytes; lanes that want the same word share a pass.

    A warp's access of 8 bytes a lane is made by half warps, of 16 by quarter warps.
    """
    lanes = 32 // max(1, width // 4)
    groups = threads // lanes
    words = addresses[:, None].astype(np.int64) // 4 + np.arange(max(1, width // 4))
    keys = np.unique(np.broadcast_to(groups[:, None], words.shape).astype(np.int64) << 32 | words)
    group, bank = keys >> 32, keys & 31
    distinct, index = np.unique(group, return_inverse=True)
    ways = np.bincount(index * 32 + bank, minlength=distinct.size * 32).reshape(-1, 32).max(axis=1)
    return int(distinct.size), int((ways - 1).sum())
