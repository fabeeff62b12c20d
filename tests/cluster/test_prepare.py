"""What preparing resolves: the batch size from memory, and switches that YAML reads in its own way."""

from bisect import bisect_left
from pathlib import Path
from typing import Any

import pytest
from small_world import World, write_prompts
from tiny_models import CONTEXT

import engine.memory
from cluster import jobs
from cluster.prepare import resolve
from cluster.spec import parse_job, read_job
from db import jobs as record
from db import queue
from db.session import Database
from engine.errors import BadInput
from engine.loading import load_tokenizer, resolve_model
from engine.memory import budget, footprint
from workers.shelf import EngineShelf

AUTO = {"max_new_tokens": 8, "batch_size": "auto"}
GIB = 2**30


@pytest.fixture
def many(world: World, tmp_path: Path) -> dict[str, Any]:
    """Fields of a job with enough samples for any batch size."""
    prompts = write_prompts(tmp_path / "many.jsonl", 700)
    return world.fields(generation=AUTO, benchmarks=[{"jsonl": str(prompts), "id": "id", "ends": "text"}])


def batch_size(fields: dict[str, Any], free: int, patch: pytest.MonkeyPatch, workers: int = 1) -> int:
    """What `auto` comes to with so many free bytes."""
    patch.setattr(engine.memory, "free_main_memory", lambda: free)
    return resolve(parse_job(fields), workers=workers).pinned.batch_size


def test_auto_is_resolved_from_memory_and_the_longest_prompt(
    world: World, many: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Protects what the size is made of: free memory, workers, and the longest prompt in tokens with its completion."""
    lines = [f"def f{i}(x):\n    y = {i * 37}\n    ret" for i in range(700)]
    longest = max(len(ids) for ids in load_tokenizer(str(world.model))(lines)["input_ids"])
    for rows in (2, 8, 32):
        free = needed(world, rows, longest + 8)
        assert batch_size(many, free, monkeypatch) == rows
        assert batch_size(many, free - 2, monkeypatch) == rows // 2
        assert batch_size(many, free, monkeypatch, workers=2) == 1
        assert batch_size(many, 2 * free, monkeypatch, workers=2) == rows
    assert batch_size(many, 100 * free, monkeypatch) == 32


def test_a_small_benchmark_keeps_enough_batches_for_an_interval(
    world: World, many: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Protects the speedup's interval: a batch is what is timed, and 48 samples in batches of 32 would be two."""
    small = world.fields(generation=AUTO)
    assert batch_size(small, 10 * GIB, monkeypatch) == 4
    both = many | {"benchmarks": [*many["benchmarks"], *small["benchmarks"]]}
    assert batch_size(both, 10 * GIB, monkeypatch) == 4


def test_a_prompt_longer_than_the_context_counts_as_the_context(
    world: World, many: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Protects against counting what is cut off: one huge prompt must not make all batches small."""
    free = needed(world, 32, CONTEXT)
    prompts = write_prompts(tmp_path / "long.jsonl", 700)
    prompts.write_text(prompts.read_text() + '{"id": "long", "prompt": "' + "x" * 100_000 + '", "reference": "y"}\n')
    fields = many | {"benchmarks": [{"jsonl": str(prompts), "id": "id", "ends": "text"}]}
    assert batch_size(fields, free, monkeypatch) == 32


def test_the_resolved_size_is_pinned_and_shown(world: World, db: Database) -> None:
    """Protects a job from another size on another day: workers read the number, never `auto`."""
    spec = world.spec(generation=AUTO)
    job_id = jobs.submit(db, spec)
    jobs.prepare(db, queue.claim(db, "test", kind="prepare"))
    assert record.job(db, job_id).spec["generation"]["batch_size"] == "auto"
    assert record.job(db, job_id).pinned["batch_size"] == jobs.validate(spec).batch_size == 4
    assert record.progress(db, job_id).batches_total == 12


def needed(world: World, rows: int, positions: int) -> int:
    """The fewest free bytes with which one worker's batch of so many rows fits."""
    taken = footprint(resolve_model(str(world.model)), "float32", world.exits)
    batch = taken.batch(rows, positions)
    return bisect_left(range(2 * GIB), batch, key=lambda free: budget(free, 1, taken.weights))


# --- compile ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "meant"), [("on", "on"), ("off", "off"), ("auto", "auto"), ('"on"', "on"), ("false", "off")]
)
def test_compile_is_read_as_it_is_meant(world: World, tmp_path: Path, written: str, meant: str) -> None:
    """Protects `compile: on`, which YAML turns into true before anybody sees it, in a file and as an override."""
    file = world.spec_file(tmp_path / "spec.yaml")
    assert read_job(file, [f"compile={written}"]).compile == meant
    file.write_text(file.read_text()[:-1] + f', "compile": {written}}}')
    assert read_job(file).compile == meant


def test_compile_is_pinned_and_another_one_is_another_engine(
    world: World, db: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Protects a job's figures from an engine that was compiled, or not, for the job before it."""
    pinned = {switch: resolve(world.spec(compile=switch)).pinned for switch in ("auto", "off")}
    assert {switch: found.compile for switch, found in pinned.items()} == {"auto": "auto", "off": "off"}
    shelf, loaded = EngineShelf(db, tmp_path), []
    monkeypatch.setattr(shelf, "_load", lambda wanted: loaded.append(wanted.compile) or object())
    for switch in ("auto", "auto", "off"):
        shelf.take(pinned[switch])
    assert loaded == ["auto", "off"]


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"generation": {"batch_size": 0}}, "generation.batch_size is 0; give a whole number of at least 1, or auto."),
        ({"generation": {"batch_size": -3}}, "generation.batch_size is -3; give a whole number"),
        ({"generation": {"batch_size": "atuo"}}, "generation.batch_size is 'atuo'; give a whole number"),
        ({"generation": {"batch_size": 2.5}}, "generation.batch_size is 2.5; give a whole number"),
        ({"generation": {"batch_size": None}}, "generation.batch_size is None; give a whole number"),
        ({"compile": "maybe"}, "field 'compile' is 'maybe'; input should be 'auto', 'on' or 'off'."),
        ({"compile": 1}, "field 'compile' is 1; input should be 'auto', 'on' or 'off'."),
    ],
)
def test_bad_values_get_one_sentence(world: World, changes: dict[str, Any], sentence: str) -> None:
    """Protects the reader from pydantic's two complaints about one value: field, value and remedy, once."""
    with pytest.raises(BadInput) as error:
        parse_job(world.fields(**changes))
    assert str(error.value).startswith(f"spec: {sentence}")
    assert "\n" not in str(error.value)


def test_neither_shards_nor_batches_change_a_benchmark(world: World, tmp_path: Path) -> None:
    """The same ids in the same order under the same hash, however the job is cut."""
    (tmp_path / "a.py").write_text("\n".join(f"def f{i}(a):\n    return a + {i}\n" for i in range(30)))
    asked = [{"source": str(tmp_path), "samples": 20}, {"jsonl": str(world.prompts), "samples": 20, "id": "id"}]
    found = set()
    for shard_batches, batch_size in [(1, 1), (4, 3), (50, 16)]:
        generation = {"max_new_tokens": 4, "batch_size": batch_size}
        resolved = resolve(world.spec(benchmarks=asked, shard_batches=shard_batches, generation=generation))
        hashes = tuple(one.content_hash for one in resolved.benchmarks)
        found.add((hashes, tuple(sample.name for one in resolved.benchmarks for sample in one.samples)))
    assert len(found) == 1
