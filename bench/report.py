"""Writes the rows of `pytest bench --qvl-json FILE` into README.md, between its markers.

python bench/report.py bench_native.json bench_avx2.json
"""

import json
import sys
from pathlib import Path

from timing import Row, table

BEGIN, END = "<!-- bench: begin -->", "<!-- bench: end -->"


def section(path: str) -> str:
    """One machine's table with the line that says what it was measured on."""
    content = json.loads(Path(path).read_text())
    facts = content["machine"]
    head = (
        f"{facts['cpu']}, {facts['threads']} threads, {facts['capability']}, torch {facts['torch']}, "
        f"commit {facts['commit']}; roofs in the same run: {facts['read_gbytes']} GB/s read, "
        f"{facts['fma_gflops']} GFLOP/s float32."
    )
    return head + "\n\n" + table([Row(**row) for row in content["rows"]])


def main(paths: list[str]) -> None:
    readme = Path(__file__).resolve().parent.parent / "README.md"
    text = readme.read_text()
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    readme.write_text(before + BEGIN + "\n" + "\n\n".join(map(section, paths)) + "\n" + END + after)


if __name__ == "__main__":
    main(sys.argv[1:])
