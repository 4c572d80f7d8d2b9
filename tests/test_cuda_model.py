"""The roofline model's arithmetic: occupancy against NVIDIA's calculator, times against bytes by hand."""

from __future__ import annotations

import cuda_model
import pytest
from cuda_images import cuda_module
from ptx import Counts

_cuda = cuda_module()


@pytest.mark.parametrize(
    ("threads", "registers", "shared", "blocks"),
    [
        (256, 32, 0, 8),  # 64 warps
        (256, 40, 0, 6),  # 65536 / (40 x 256) = 6.4
        (32, 16, 0, 32),  # the limit of blocks
        (128, 32, 48 * 1024, 2),  # 96 KiB of shared memory
        (1024, 64, 0, 1),
        (512, 80, 256, 1),
    ],
)
def test_resident_blocks(threads, registers, shared, blocks):
    assert cuda_model.resident_blocks(threads, registers, shared) == blocks


def test_a_long_launch_takes_as_long_as_its_bytes():
    import torch

    x = torch.empty(3 * 6 * 1000, 2048)  # 6 blocks of 256 threads on each of 3 SMs, 1000 times: no tail
    plan = _cuda.plan_rms_norm(x, None, x[0], torch.empty_like(x), None, None, 1e-6)
    sectors = x.numel() * 4 // 32
    counts = Counts(loaded_sectors=2 * sectors, stored_sectors=sectors)
    counts.distinct_loaded_sectors = counts.distinct_stored_sectors = sectors
    counts.warp_instructions["load_global"] = 2 * sectors // 16
    gpu = cuda_model.GPUS[0]
    estimate = cuda_model.estimate(gpu, plan, counts)
    assert estimate.bound == "DRAM"
    assert estimate.seconds == pytest.approx(64 * sectors / 48e9 + cuda_model.LAUNCH)
    assert estimate.occupancy == 0.75
    counts.warp_instructions["fp32"] = 10**9
    assert cuda_model.estimate(gpu, plan, counts).bound == "issue"
