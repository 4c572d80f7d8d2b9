"""What a launch did, counted while it was interpreted."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

SECTOR = 32  # bytes: what L2 and DRAM move at once


@dataclass
class Counts:
    """Totals over the grid. Warp instructions count a warp once, however many of its lanes are active."""

    warp_instructions: Counter[str] = field(default_factory=Counter)  # by class: fp32, int, convert, special, ...
    thread_instructions: Counter[str] = field(default_factory=Counter)
    opcodes: Counter[str] = field(default_factory=Counter)  # warp instructions by opcode and modifiers
    loaded_bytes: int = 0  # asked for by threads
    stored_bytes: int = 0
    loaded_sectors: int = 0  # distinct sectors of each warp's access: the traffic to L2
    stored_sectors: int = 0
    distinct_loaded_sectors: int = 0  # over the whole launch: the least that DRAM moves
    distinct_stored_sectors: int = 0
    shared_accesses: int = 0  # of a warp, or of the half or quarter warp that moves 128 bytes
    bank_conflicts: int = 0  # further passes because lanes meet in a bank
    barriers: int = 0  # a block passes one
    divergent_branches: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(**{name: value + getattr(other, name) for name, value in vars(self).items()})
