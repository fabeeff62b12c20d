"""An export: one job that has ended as a folder of Parquet files and a manifest, the same bytes from either database.

manifest.json holds the job, what it was computed with, and the hash of every other file. Rows refer to each other by
place, never by a database's own keys: a run by its place in the report, a sample by its position in the benchmark, a
task by its place among the job's.
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from db.errors import BadInput
from db.trace_parquet import CELL_FIELDS

#: raised when what stands below changes
FORMAT = 3
MANIFEST = "manifest.json"
#: the artifact of a job that has one
EXITS = "exits"

DECISIONS = ("full", "exit", "stop")

SCHEMAS: dict[str, pa.Schema] = {
    "samples": pa.schema(
        [
            ("benchmark", pa.int32()),  # place in the manifest
            ("position", pa.int32()),
            ("name", pa.string()),
            ("prompt", pa.string()),
            ("reference", pa.string()),
            ("language", pa.string()),
            ("source_group", pa.string()),
            ("test", pa.string()),
        ]
    ),
    "runs": pa.schema(
        [
            ("run", pa.int32()),
            ("benchmark", pa.int32()),
            ("name", pa.string()),  # under which the job asked for the benchmark
            ("policy", pa.string()),
            ("policy_kind", pa.string()),
            ("policy_spec", pa.string()),  # JSON
            ("summary", pa.string()),  # JSON
        ]
    ),
    "tasks": pa.schema(
        [
            ("task", pa.int32()),
            ("kind", pa.string()),
            ("state", pa.string()),
            ("benchmark", pa.int32()),
            ("first_batch", pa.int32()),
            ("end_batch", pa.int32()),
            ("done_batches", pa.int32()),
            ("parent", pa.int32()),
            ("epoch", pa.int32()),
            ("attempt", pa.int32()),
            ("deaths", pa.int32()),
            ("worker", pa.string()),
            ("error", pa.string()),
        ]
    ),
    "completions": pa.schema(
        [
            ("run", pa.int32()),
            ("sample", pa.int32()),
            ("task", pa.int32()),
            ("text", pa.string()),
            ("error", pa.string()),
            ("finish", pa.string()),
            ("n_tokens", pa.int32()),
            ("prompt_tokens", pa.int32()),
            ("cut_tokens", pa.int32()),
            ("shown", pa.bool_()),
            ("isolated", pa.bool_()),
        ]
    ),
    "tokens": pa.schema(
        [
            ("run", pa.int32()),
            ("sample", pa.int32()),
            ("position", pa.int32()),
            ("token_id", pa.int32()),
            ("exit_layer", pa.int16()),
            ("layers_run", pa.int16()),
            ("decision", pa.string()),
            ("confidence", pa.float32()),
            ("draft_layer", pa.int16()),
            ("draft_kept", pa.bool_()),
        ]
    ),
    "scores": pa.schema(
        [
            ("run", pa.int32()),
            ("sample", pa.int32()),
            ("metric", pa.string()),
            ("version", pa.string()),
            ("value", pa.float64()),
        ]
    ),
    "labels": pa.schema(
        [
            ("benchmark", pa.int32()),
            ("sample", pa.int32()),
            ("text", pa.string()),
            ("judge", pa.string()),
            ("accepted", pa.bool_()),
            ("at", pa.float64()),
        ]
    ),
    "timings": pa.schema(
        [
            ("run", pa.int32()),
            ("batch", pa.int32()),
            ("rows", pa.int32()),
            *((name, pa.int64()) for name in ("prefill_ns", "decode_ns", "decode_tokens", "flops", "ideal_ns")),
            ("device_class", pa.string()),
            ("timed", pa.bool_()),
            ("drafted", pa.int64()),
            ("drafts_kept", pa.int64()),
            ("full_decode_ns", pa.int64()),
        ]
    ),
    "traces": pa.schema(
        [
            ("run", pa.int32()),
            ("sample", pa.int32()),
            ("prompt_tokens", pa.int32()),
            ("prompt_key", pa.int64()),
            *CELL_FIELDS,
        ]
    ),
}


def parquet(name: str) -> str:
    """The file's name."""
    return f"{name}.parquet"


def digest(file: Path) -> str:
    """SHA-256 (hex) of a file."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def write_manifest(folder: Path, content: dict[str, Any], shortstop: str) -> str:
    """Write manifest.json. Returns the export's id: the hash of all that it holds."""
    id = _id(content)
    manifest = {"format": FORMAT, "id": id, "shortstop": shortstop, "content": content}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return id


def read_manifest(folder: Path) -> tuple[str, dict[str, Any]]:
    """(id, content) of an export whose files are all there and whole. Raises `BadInput`."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        found, id, content = manifest["format"], manifest["id"], manifest["content"]
    except FileNotFoundError:
        raise BadInput(f"folder {str(folder)!r} holds no {MANIFEST}; name the folder of an export.") from None
    except OSError as error:
        raise BadInput(f"folder {str(folder)!r} cannot be read ({error.strerror}); name another one.") from None
    except (ValueError, KeyError, TypeError):
        raise damaged(folder, MANIFEST) from None
    if found != FORMAT:
        raise BadInput(
            f"export {str(folder)!r} has format {found}, this version reads {FORMAT}; export it again with this one."
        )
    if _id(content) != id:
        raise damaged(folder, MANIFEST)
    _check_files(folder, content)
    return id, content


def rows(folder: Path, name: str) -> Iterator[tuple[Any, ...]]:
    """The rows of a file, some thousand in memory at a time."""
    for batch in batches(folder, name):
        yield from zip(*(column.to_pylist() for column in batch.columns), strict=True)


def batches(folder: Path, name: str) -> Iterator[pa.RecordBatch]:
    """The same as Arrow."""
    with pq.ParquetFile(folder / parquet(name)) as file:
        yield from file.iter_batches(batch_size=10_000)


def damaged(folder: Path, file: str) -> BadInput:
    """For an export that is not as it was written."""
    return BadInput(f"export {str(folder)!r} is damaged: {file} is not as it was written; copy or export it again.")


def _id(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _check_files(folder: Path, content: dict[str, Any]) -> None:
    wanted = [(parquet(name), content["files"][name]["sha256"]) for name in SCHEMAS]
    for file, hash in wanted + [(EXITS, found["sha256"]) for found in content["artifacts"]]:
        try:
            if digest(folder / file) != hash:
                raise damaged(folder, file)
        except OSError:
            raise damaged(folder, file) from None
    for name, schema in SCHEMAS.items():
        if not pq.read_schema(folder / parquet(name)).equals(schema):
            raise damaged(folder, parquet(name))
