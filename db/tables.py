"""The tables of the record. `migrations/` creates them; a test holds the two against each other.

Times are seconds since 1970 by the database's clock. The columns of `outcome` that hold its tokens differ by database
and are known to `db/token_columns.py`; the documented views to `db/queries.py`.
"""

from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    Connection,
    Double,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    PrimaryKeyConstraint,
    Table,
    Text,
    UniqueConstraint,
    false,
)
from sqlalchemy.dialects import postgresql, sqlite

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)

#: SQLite numbers rows by itself only where the key is a plain INTEGER
Id = BigInteger().with_variant(Integer, "sqlite")


def _refers(name: str, target: str, *, nullable: bool = False) -> Column[Any]:
    return Column(name, Id, ForeignKey(target), nullable=nullable)


def _drafts() -> list[Column[Any]]:
    """Sums of drafts; rows that were written before there were any have none."""
    return [Column(name, BigInteger, nullable=False, server_default="0") for name in ("drafted", "drafts_kept")]


job = Table(
    "job",
    metadata,
    Column("id", Id, primary_key=True),
    Column("name", Text, nullable=False),
    Column("spec", JSON, nullable=False),
    Column("state", Text, nullable=False),
    Column("priority", Integer, nullable=False),
    Column("pinned", JSON(none_as_null=True)),
    Column("error", Text),
    Column("created_at", Double, nullable=False),
    Column("started_at", Double),
    Column("finished_at", Double),
    # who asked for it, and under which key: the same key again is the same job
    Column("principal", Text, nullable=False, server_default="local"),
    Column("idempotency_key", Text),
    Column("body_hash", Text),
    Column("paused", Boolean, nullable=False, server_default=false()),
    Index("uq_job_principal", "principal", "idempotency_key", unique=True),
)
_OPEN = job.c.state.in_(["preparing", "ready", "running"])
Index("ix_job_open", job.c.priority.desc(), job.c.id, sqlite_where=_OPEN, postgresql_where=_OPEN)

#: who did what to a job, and when: written once (triggers), and gone only after the job is
job_event = Table(
    "job_event",
    metadata,
    Column("id", Id, primary_key=True),
    Column("job_id", Id, nullable=False),
    Column("at", Double, nullable=False),
    Column("who", Text, nullable=False),
    Column("what", Text, nullable=False),
    Column("detail", JSON, nullable=False),
    Index("ix_job_event_job_id", "job_id", "id"),
)

#: content: written once per hash, shared by every job
benchmark = Table(
    "benchmark",
    metadata,
    Column("id", Id, primary_key=True),
    Column("name", Text, nullable=False),
    Column("version", Text, nullable=False),
    Column("content_hash", Text, nullable=False, unique=True),
    Column("ends", Text, nullable=False, server_default="line"),
    Column("n_samples", Integer, nullable=False),
    Column("left_out", JSON, nullable=False),
)

#: a name and version mean one content for ever
benchmark_name = Table(
    "benchmark_name",
    metadata,
    Column("name", Text),
    Column("version", Text),
    _refers("benchmark_id", "benchmark.id"),
    PrimaryKeyConstraint("name", "version"),
)

sample = Table(
    "sample",
    metadata,
    Column("id", Id, primary_key=True),
    _refers("benchmark_id", "benchmark.id"),
    Column("position", Integer, nullable=False),
    Column("name", Text, nullable=False),
    Column("prompt", Text, nullable=False),
    Column("reference", Text, nullable=False),
    Column("language", Text, nullable=False),
    Column("source_group", Text, nullable=False),
    Column("test", Text),
    UniqueConstraint("benchmark_id", "position"),
)

#: that a benchmark was looked for in a corpus
corpus_overlap = Table(
    "corpus_overlap",
    metadata,
    _refers("benchmark_id", "benchmark.id"),
    Column("corpus", Text),
    Column("texts", BigInteger, nullable=False),
    Column("characters", BigInteger, nullable=False),
    Column("judged", Integer, nullable=False),
    Column("looked_at", Double, nullable=False),
    PrimaryKeyConstraint("benchmark_id", "corpus"),
)

#: a sample that stands in a corpus in part
overlapping_sample = Table(
    "overlapping_sample",
    metadata,
    _refers("benchmark_id", "benchmark.id"),
    Column("corpus", Text),
    Column("position", Integer),
    Column("shared", Integer, nullable=False),
    Column("runs", Integer, nullable=False),
    Column("found_in", Text, nullable=False),
    PrimaryKeyConstraint("benchmark_id", "corpus", "position"),
)

artifact = Table(
    "artifact",
    metadata,
    Column("hash", Text, primary_key=True),
    Column("kind", Text, nullable=False),
    Column("content", LargeBinary, nullable=False),
    Column("created_at", Double, nullable=False),
)

run = Table(
    "run",
    metadata,
    Column("id", Id, primary_key=True),
    _refers("job_id", "job.id"),
    Column("position", Integer, nullable=False),
    _refers("benchmark_id", "benchmark.id"),
    Column("benchmark", Text, nullable=False),
    Column("policy", Text, nullable=False),
    Column("policy_kind", Text, nullable=False),
    Column("policy_spec", JSON, nullable=False),
    Column("score_revision", Integer, nullable=False),
    Column("summary", JSON(none_as_null=True)),
    UniqueConstraint("job_id", "benchmark_id", "policy"),
)

task = Table(
    "task",
    metadata,
    Column("id", Id, primary_key=True),
    _refers("job_id", "job.id"),
    Column("kind", Text, nullable=False),
    Column("state", Text, nullable=False),
    Column("priority", Integer, nullable=False),
    Column("epoch", Integer, nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("worker", Text),
    Column("lease_until", Double),
    Column("run_after", Double, nullable=False),
    Column("error", Text),
    # of a shard
    _refers("benchmark_id", "benchmark.id", nullable=True),
    Column("first_batch", Integer, nullable=False),
    Column("end_batch", Integer, nullable=False),
    Column("done_batches", Integer, nullable=False),
    Column("cost", BigInteger, nullable=False, server_default="0"),
    _refers("parent_id", "task.id", nullable=True),
    # of a suspect
    Column("deaths", Integer, nullable=False),
    Column("isolated_from", Integer),
    Column("alone", Integer),
    Column("guilty", JSON, nullable=False),
    CheckConstraint("end_batch >= first_batch", name="extent"),
    Index("ix_task_job_id", "job_id"),
)
_READY, _LEASED = task.c.state == "ready", task.c.state == "leased"
# in the order of claims; by the id alone PostgreSQL would at times go through the tasks of all jobs to find one's first
Index(
    "ix_task_ready_of_job",
    task.c.job_id,
    task.c.kind,
    task.c.run_after,
    task.c.cost.desc(),
    task.c.id,
    sqlite_where=_READY,
    postgresql_where=_READY,
)
Index("ix_task_leased", task.c.lease_until, sqlite_where=_LEASED, postgresql_where=_LEASED)

#: workers that asked for a shard in vain, when, and of which jobs they would have taken one (NULL: of any)
idle_worker = Table(
    "idle_worker",
    metadata,
    Column("worker", Text, primary_key=True),
    Column("asked_at", Double, nullable=False),
    Column("job_ids", JSON(none_as_null=True)),
)

outcome = Table(
    "outcome",
    metadata,
    Column("id", Id, primary_key=True),
    _refers("run_id", "run.id"),
    _refers("sample_id", "sample.id"),
    _refers("task_id", "task.id"),
    Column("text", Text),
    Column("error", Text),
    Column("finish", Text),
    Column("n_tokens", Integer, nullable=False),
    Column("prompt_tokens", Integer, nullable=False),
    Column("cut_tokens", Integer, nullable=False),
    Column("shown", Boolean, nullable=False),
    Column("isolated", Boolean, nullable=False),
    UniqueConstraint("run_id", "sample_id"),
    CheckConstraint("(text IS NULL) <> (error IS NULL)", name="completion_or_error"),
)

#: metrics in an order, under a number that their names and versions give: see `db.score_rows`
metric_list = Table(
    "metric_list",
    metadata,
    Column("list_id", BigInteger),
    Column("place", Integer),
    Column("metric", Text, nullable=False),
    Column("version", Text, nullable=False),
    PrimaryKeyConstraint("list_id", "place"),
)

#: the scores that a completion has by one revision, in the order of a list of metrics. Read through the view `score`.
score_row = Table(
    "score_row",
    metadata,
    _refers("run_id", "run.id"),
    Column("revision", Integer),
    _refers("sample_id", "sample.id"),
    Column("list_id", BigInteger, nullable=False),
    Column("scores", postgresql.ARRAY(Double).with_variant(JSON, "sqlite"), nullable=False),
    PrimaryKeyConstraint("run_id", "revision", "sample_id"),
    sqlite_with_rowid=False,
)

#: a view, hence of no metadata: a row for each score of `score_row`
score = Table(
    "score",
    MetaData(),
    Column("run_id", BigInteger, ForeignKey(run.c.id)),
    Column("revision", Integer),
    Column("sample_id", BigInteger),
    Column("metric", Text),
    Column("version", Text),
    Column("value", Double),
)

#: what judges said of a text that policies wrote for a sample, whichever policies those were
label = Table(
    "label",
    metadata,
    _refers("job_id", "job.id"),
    _refers("sample_id", "sample.id"),
    Column("text_hash", Text),  # SHA-256 (hex): a text may be too long for a key
    Column("judge", Text),
    Column("text", Text, nullable=False),
    Column("accepted", Boolean, nullable=False),
    Column("at", Double, nullable=False),
    PrimaryKeyConstraint("job_id", "sample_id", "text_hash", "judge"),
)

timing = Table(
    "timing",
    metadata,
    _refers("run_id", "run.id"),
    Column("batch", Integer),
    Column("rows", Integer, nullable=False),
    Column("prefill_ns", BigInteger, nullable=False),
    Column("decode_ns", BigInteger, nullable=False),
    Column("decode_tokens", BigInteger, nullable=False),
    Column("flops", BigInteger, nullable=False),
    Column("ideal_ns", BigInteger, nullable=False),
    Column("device_class", Text, nullable=False),
    Column("timed", Boolean, nullable=False),
    *_drafts(),
    Column("full_decode_ns", BigInteger),
    PrimaryKeyConstraint("run_id", "batch"),
)

#: what every exit point predicted for every token of a target: see `db.traces`
trace = Table(
    "trace",
    metadata,
    _refers("run_id", "run.id"),
    _refers("sample_id", "sample.id"),
    Column("layout", Integer, nullable=False),
    Column("n_points", Integer, nullable=False),
    Column("n_tokens", Integer, nullable=False),
    Column("prompt_tokens", Integer, nullable=False),
    Column("prompt_key", BigInteger, nullable=False),
    Column("content", LargeBinary, nullable=False),
    PrimaryKeyConstraint("run_id", "sample_id"),
)

_SUMS = (
    "samples errors shown isolated cut_prompts tokens full_tokens exit_tokens stops exit_layer_sum layers_run_sum"
    " stop_layers_run_sum timed_batches untimed_batches prefill_ns decode_ns decode_tokens ideal_ns flops"
)

#: one row a (run, shard): the fields of `db.records.Rollup`
rollup = Table(
    "rollup",
    metadata,
    _refers("run_id", "run.id"),
    _refers("task_id", "task.id"),
    *(Column(name, BigInteger, nullable=False) for name in _SUMS.split()),
    *(
        Column(name, JSON, nullable=False)
        for name in ("exit_histogram", "stop_histogram", "score_counts", "score_sums")
    ),
    *_drafts(),
    PrimaryKeyConstraint("run_id", "task_id"),
)

#: what a device class reaches: the fields of `engine.cost.Machine`
device_class = Table(
    "device_class",
    metadata,
    Column("name", Text, primary_key=True),
    Column("plan", JSON, nullable=False),
    Column("created_at", Double, nullable=False),
)

#: the kernels that multiply matrices of one shape: chosen once per device class
kernel_plan = Table(
    "kernel_plan",
    metadata,
    Column("device_class", Text),
    Column("shape", Text),
    Column("kernels", JSON, nullable=False),
    Column("created_at", Double, nullable=False),
    PrimaryKeyConstraint("device_class", "shape"),
)

#: provenance: what a job was computed with on each device class, kernels by shape
job_kernels = Table(
    "job_kernels",
    metadata,
    _refers("job_id", "job.id"),
    Column("device_class", Text),
    Column("kernels", JSON, nullable=False),
    PrimaryKeyConstraint("job_id", "device_class"),
)

#: two runs of the same spec, and by how much they differed in speed: kept when the runs themselves are gone
noise_pair = Table(
    "noise_pair",
    metadata,
    Column("run_a", Id),
    Column("run_b", Id),
    Column("device_class", Text),
    Column("content_hash", Text, nullable=False),
    Column("policy", Text, nullable=False),
    # logarithms of A's time over B's: of a token, of a request; by the clock, and as multiples of full depth's
    Column("log_token", Double, nullable=False),
    Column("log_request", Double, nullable=False),
    Column("paced_token", Double),
    Column("paced_request", Double),
    Column("measured_at", Double, nullable=False),
    PrimaryKeyConstraint("run_a", "run_b", "device_class"),
    Index("ix_noise_pair_content_hash", "content_hash", "policy", "device_class"),
)


#: References that PostgreSQL does not look up: it would for every row, and a commit would take twice as long. Who
#: writes them holds the shard (the fence) or the job (`db.rescoring`); what they refer to goes after them, and when
#: nobody can write any more (`db.pruning`); `db.checks` finds what lacks.
UNCHECKED_ON_POSTGRESQL = frozenset(
    (table.name, key.parent.name) for table in (outcome, score_row) for key in table.foreign_keys
)


def insert_new(connection: Connection, table: Table, values: dict[str, Any]) -> bool:
    """Insert a row unless its key is there already. True: this call wrote it; the first writer wins."""
    insert = sqlite.insert if connection.dialect.name == "sqlite" else postgresql.insert
    written = insert(table).values(values).on_conflict_do_nothing().returning(*table.primary_key)
    return connection.execute(written).first() is not None


# of the same metadata, in files of their own
import db.key_tables  # noqa: E402
import db.schedule_tables  # noqa: E402, F401
