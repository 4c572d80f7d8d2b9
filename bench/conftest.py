"""`pytest bench`: every bench checks, times and relates; the table is printed at the end.

pytest bench                      about five minutes
pytest bench --long               more lengths, shapes and densities: half an hour
pytest bench --short              one small case of each, a few rounds: that the benches still run
pytest bench --qvl-json OUT.json  the rows, the machine and the commit
"""

from __future__ import annotations

import pytest
import torch
from timing import RESULTS, Case, density_table, machine, measure, record, roofs, table, write_json

from qvl_kernels import _backends


def pytest_addoption(parser):
    parser.addoption("--long", action="store_true", help="the cases marked long too")
    parser.addoption("--short", action="store_true", help="one small case of each bench, a few rounds")
    parser.addoption("--qvl-json", metavar="FILE", help="write the measured rows to FILE")


def pytest_configure(config):
    config.addinivalue_line("markers", "long: a case that only --long runs")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--long"):
        items[:] = [item for item in items if item.get_closest_marker("long") is None]
    if config.getoption("--short"):
        seen = set()
        kept = []
        for item in items:
            if item.originalname not in seen:
                seen.add(item.originalname)
                kept.append(item)
        items[:] = kept


@pytest.fixture
def compare(benchmark, request):
    """compare(case, ours, reference, torch, tolerance): checks that all agree, times them interleaved with the roofs,
    records the row. A reference that would take too long is None.

    pytest-benchmark times `ours` too, so that its own comparison over commits works.
    """

    def run(case: Case, ours, reference, torch_own, tolerance: float, dense=None) -> None:
        with torch.no_grad():
            runs = {"ours": ours, "torch": torch_own}
            if reference is not None:
                runs["reference"] = reference
            for name in list(runs)[1:]:
                _agree(ours(), runs[name](), tolerance)
            if dense is not None:  # another result, for the relation of the times
                runs["dense"] = dense
            rounds = 3 if request.config.getoption("--short") else 25
            seconds = measure(runs | roofs().runs(), rounds)
            row = record(case, seconds, backend_of(case.operation))
            benchmark.extra_info.update(ratio_to_torch=row.ratio_to_torch, percent_of_roof=row.percent_of_roof)
            benchmark.pedantic(ours, rounds=min(rounds, max(1, int(0.2 / seconds["ours"]))), iterations=1)

    return run


def backend_of(operation: str) -> str:
    """The backend that runs the operation on the CPU here: the first it has. What is no operation but a whole model
    runs on the first there is."""
    having = _backends.explain().operations.get(operation, _backends.available_backends())
    return next(name for name in having if name not in ("triton", "cuda"))


def _agree(ours, other, tolerance: float) -> None:
    if isinstance(ours, tuple):
        for a, b in zip(ours, other):
            _agree(a, b, tolerance)
        return
    error = (ours.double() - other.double()).abs().max().item()
    largest = other.double().abs().max().item()
    assert error <= tolerance * largest, f"wrong before it is fast: error {error:.3g} of {largest:.3g}"


def pytest_terminal_summary(terminalreporter, config):
    if not RESULTS:
        return
    facts = machine()
    terminalreporter.section("qvl bench")
    terminalreporter.write_line(", ".join(f"{name} {value}" for name, value in facts.items()))
    terminalreporter.write_line(table(RESULTS))
    terminalreporter.write_line(density_table(RESULTS))
    if path := config.getoption("--qvl-json"):
        write_json(path)
