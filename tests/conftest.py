"""Settings of every test: Triton interpreted, uninitialised memory filled with NaN, two threads, a fixed seed."""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is first imported
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch


@pytest.fixture(autouse=True)
def _hostile_memory_and_seed():
    # In this mode torch.empty is filled with NaN (or the largest integer), so that memory a kernel left unwritten
    # shows.
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(0)
    yield
    torch.use_deterministic_algorithms(False)
