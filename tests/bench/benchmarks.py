"""`make bench-benchmarks`: a hundred samples out of the middle of 2 GB of JSON lines, and a search for overlap.

BENCH_GB sets the file's size. What is measured is a fresh process each time: what a job that is prepared takes.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.bench.measure import Row, printed, seconds, summarise, write
from workers.benchmarks.overlap import overlap
from workers.benchmarks.sample import Sample

GIGABYTES = float(os.environ.get("BENCH_GB", "2"))
ROUNDS = 5
#: printed by the child: seconds, peak memory in MB, samples
CHILD = """
import resource, sys, time
from workers.benchmarks.catalogue import load_benchmark
from workers.benchmarks.spec import parse_benchmark
spec = parse_benchmark({"jsonl": sys.argv[1], "records": [int(sys.argv[2]), int(sys.argv[3])]})
start = time.perf_counter()
benchmark = load_benchmark(spec, tokenizer_of=None, max_new_tokens=1)
taken = time.perf_counter() - start
print(taken, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, len(benchmark.samples))
"""


def lines(file: Path) -> int:
    """A file of the wanted size, of records of some 600 bytes. Returns how many."""
    body = "\n".join(f"    total_{i} = first(alpha, {i}) + second(beta)" for i in range(11))
    made = 0
    with file.open("w", encoding="utf-8") as out:
        while out.tell() < GIGABYTES * 1e9:
            out.writelines(
                json.dumps({"id": made + i, "prompt": f"def f{made + i}():\n{body}\n    return ", "reference": f"{i}"})
                + "\n"
                for i in range(10_000)
            )
            made += 10_000
    return made


def loaded(file: Path, cache: Path, first: int) -> tuple[float, float]:
    """Seconds and megabytes of a process that takes a hundred samples."""
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(file), str(first), str(first + 100)],
        env=os.environ | {"SHORTSTOP_CACHE": str(cache), "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    taken, memory, samples = map(float, done.stdout.split())
    assert samples == 100, samples
    return taken, memory


def rows(folder: Path) -> list[Row]:
    """The first look, which makes the index, and those after it; then overlap with the standard library."""
    file, cache = folder / "large.jsonl", folder / "cache"
    made = lines(file)
    first = min(1_000_000, made // 2)
    size = f"{file.stat().st_size / 1e9:.1f} GB, {made:,} records"
    indexing = loaded(file, cache, first)
    later = [loaded(file, cache, first) for _ in range(ROUNDS)]
    place = f"samples {first:,} to {first + 100:,}"
    text = Path(json.__file__).with_name("decoder.py").read_text(encoding="utf-8")
    samples = [Sample(f"s{at}", text[at - 200 : at], text[at : at + 60], "python", "s") for at in range(200, 9_000, 9)]
    search = [seconds(lambda: overlap(samples, "email")) for _ in range(ROUNDS)]
    return [
        Row(f"first look, {size}", indexing[0], indexing[0], indexing[0], "s"),
        Row("memory of the first look", indexing[1], indexing[1], indexing[1], "MB"),
        summarise(place, [taken for taken, _ in later], "s", at_most=2),
        summarise(f"memory of {place}", [memory for _, memory in later], "MB", at_most=300),
        summarise(f"overlap of {len(samples):,} samples with the package email", search, "s"),
    ]


def main() -> None:
    """Print the table and write it to build/bench/benchmarks.json."""
    with tempfile.TemporaryDirectory() as folder:
        write("benchmarks", printed(rows(Path(folder))))


if __name__ == "__main__":
    main()
