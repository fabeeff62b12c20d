"""Drafts of self-speculation, by token and in sums; kernel plans by shape, and those that a job was computed with."""

from collections.abc import Callable

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0002"
down_revision = "0001"

ID = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    on_sqlite = op.get_bind().dialect.name == "sqlite"
    create_tables()
    for table in ("timing", "rollup"):
        for name in ("drafted", "drafts_kept"):
            op.add_column(table, sa.Column(name, sa.BigInteger(), nullable=False, server_default="0"))
    if not on_sqlite:  # which writes a sixth element into the record of a token that was a draft
        op.add_column("outcome", sa.Column("drafts", postgresql.ARRAY(sa.SmallInteger())))
    replace_view("token", TOKEN_ON_SQLITE if on_sqlite else TOKEN_ON_POSTGRESQL)
    replace_view("batch", BATCH)
    replace_view("run_summary", run_summary(number_on_sqlite if on_sqlite else number_on_postgresql))


def create_tables() -> None:
    op.create_table(
        "kernel_plan",
        sa.Column("device_class", sa.Text(), nullable=False),
        sa.Column("shape", sa.Text(), nullable=False),
        sa.Column("kernels", sa.JSON(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("device_class", "shape", name="pk_kernel_plan"),
    )
    op.create_table(
        "job_kernels",
        sa.Column("job_id", ID, nullable=False),
        sa.Column("device_class", sa.Text(), nullable=False),
        sa.Column("kernels", sa.JSON(), nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["job.id"], name="fk_job_kernels_job_id"),
        sa.PrimaryKeyConstraint("job_id", "device_class", name="pk_job_kernels"),
    )


def replace_view(name: str, select: str) -> None:
    """New columns stand behind the old ones: PostgreSQL then keeps the view, and what was granted on it."""
    if op.get_bind().dialect.name == "sqlite":
        op.execute(f"DROP VIEW {name}")
        op.execute(f"CREATE VIEW {name} AS {select}")
    else:
        op.execute(f"CREATE OR REPLACE VIEW {name} AS {select}")


TOKEN_ON_SQLITE = """
SELECT o.run_id, r.job_id, r.policy, o.id AS outcome_id, o.sample_id, t.key + 1 AS position,
  CASE json_extract(t.value, '$[3]') WHEN 2 THEN NULL ELSE json_extract(t.value, '$[0]') END AS token_id,
  json_extract(t.value, '$[1]') AS exit_layer,
  json_extract(t.value, '$[2]') AS layers_run,
  CASE json_extract(t.value, '$[3]') WHEN 0 THEN 'full' WHEN 1 THEN 'exit' ELSE 'stop' END AS decision,
  json_extract(t.value, '$[4]') AS confidence,
  abs(json_extract(t.value, '$[5]')) AS draft_layer,
  json_extract(t.value, '$[5]') > 0 AS draft_kept
FROM outcome o JOIN run r ON r.id = o.run_id JOIN json_each(o.tokens) t
"""

# subscripts, not unnest: a column that a question does not name costs nothing
TOKEN_ON_POSTGRESQL = """
SELECT o.run_id, r.job_id, r.policy, o.id AS outcome_id, o.sample_id, p AS position,
  CASE o.decisions[p] WHEN 2 THEN NULL ELSE o.token_ids[p] END AS token_id,
  o.exit_layers[p] AS exit_layer,
  o.layers_run[p] AS layers_run,
  CASE o.decisions[p] WHEN 0 THEN 'full' WHEN 1 THEN 'exit' ELSE 'stop' END AS decision,
  nullif(o.confidences[p]::double precision, 'NaN') AS confidence,
  nullif(abs(o.drafts[p]), 0) AS draft_layer,
  nullif(o.drafts[p], 0) > 0 AS draft_kept
FROM outcome o JOIN run r ON r.id = o.run_id
  CROSS JOIN LATERAL generate_series(1, o.n_tokens + CASE o.finish WHEN 'stop' THEN 1 ELSE 0 END) p
"""

BATCH = """
SELECT r.job_id, t.run_id, r.policy, r.benchmark, t.batch, t.rows, t.prefill_ns, t.decode_ns, t.decode_tokens,
  t.flops, t.ideal_ns, t.device_class, t.timed, t.drafted, t.drafts_kept
FROM timing t JOIN run r ON r.id = t.run_id
"""


def number_on_sqlite(path: str, kind: str) -> str:
    return f"cast(json_extract(r.summary, '$.{path}') AS {'INTEGER' if kind == 'bigint' else 'REAL'})"


def number_on_postgresql(path: str, kind: str) -> str:
    return f"(r.summary #>> '{{{path.replace('.', ',')}}}')::{kind}"


def run_summary(number: Callable[[str, str], str]) -> str:
    """A row a run; the figures are NULL until the job has ended. Summaries from before had no drafts to count."""
    integers = ["samples", "errors", "tokens", "stops", "cut_prompts", "n_layers", "flops"]
    figures = {name: name for name in ["shown", "mean_exit_layer", "mean_layers_run", "layers_skipped"]}
    for name in ["speedup_token", "speedup_request"]:
        figures |= {name: f"{name}.value", f"{name}_low": f"{name}.low", f"{name}_high": f"{name}.high"}
    figures |= {name: name for name in ["speedup_ideal", "efficiency", "tokens_per_second"]}
    for name in ["rouge_l", "em", "es", "accepted"]:
        figures |= {name: f"metrics.{name}.value", f"{name}_change": f"change.{name}.value"}
    columns = [f"{number(name, 'bigint')} AS {name}" for name in integers]
    columns += [f"{number(path, 'double precision')} AS {name}" for name, path in figures.items()]
    columns += [
        f"CASE WHEN r.summary IS NOT NULL THEN coalesce({number(name, 'bigint')}, 0) END AS {name}"
        for name in ["drafted", "drafts_kept"]
    ]
    return f"""
SELECT r.job_id, j.name AS job, j.state, r.id AS run_id, r.benchmark, r.policy, {", ".join(columns)}
FROM run r JOIN job j ON j.id = r.job_id
"""
