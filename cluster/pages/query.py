"""Questions in SQL, with the schema beside them."""

from functools import lru_cache
from typing import Any

from anyio import to_thread
from fastapi import APIRouter, Request
from starlette.responses import Response

from cluster.api.access import Questioner
from cluster.api.jobs import Shared
from cluster.pages.forms import Asked
from cluster.pages.showing import PageRoute, show
from db.queries import query
from db.session import Database
from engine.errors import BadInput

router = APIRouter(include_in_schema=False, route_class=PageRoute)

#: rows that the page shows; downloads have all
MOST_ROWS = 1_000
LONGEST = 100_000
_SECONDS = 30.0

#: what each of `db.reader.VIEWS` has a row for, in the order of the page
ROWS = {
    "run_summary": "a row a run",
    "completion": "a row a sample and policy",
    "completion_score": "a row a completion and metric",
    "completion_label": "a row a completion and judge",
    "token": "a row a token",
    "batch": "a row a batch and policy",
    "overlap": "a row a sample and corpus",
}
EXAMPLES = {
    "Runs by speed": (
        "SELECT job_id, benchmark, policy, speedup_token, rouge_l, rouge_l_change, accepted\n"
        "FROM run_summary\nWHERE state = 'done'\nORDER BY speedup_token DESC\nLIMIT 50"
    ),
    "Where tokens leave": (
        "SELECT policy, decision, exit_layer, count(*) AS tokens\nFROM token\n"
        "WHERE job_id = (SELECT max(job_id) FROM run_summary)\n"
        "GROUP BY policy, decision, exit_layer\nORDER BY policy, decision, exit_layer"
    ),
    "Errors": (
        "SELECT job_id, policy, benchmark, sample, error\nFROM completion\nWHERE error IS NOT NULL\n"
        "ORDER BY job_id DESC\nLIMIT 50"
    ),
}


@router.get("/query")
def ask_for_question(request: Request, caller: Questioner, state: Shared) -> Response:
    """The page where a question is written."""
    return _page(request, caller, state.db, next(iter(EXAMPLES.values())))


@router.post("/query")
async def ask(request: Request, posted: Asked, state: Shared) -> Response:
    """The answer to a question, as much of it as a page shows."""
    sql = posted.text("sql")
    save = posted.form.get("do") == "save"

    def answered() -> Response:
        try:
            if not 0 < len(sql) <= LONGEST:
                raise BadInput(f"query: it has {len(sql):,} characters; write 1 to {LONGEST:,}.")
            with query(state.db, sql, timeout_s=_SECONDS, limit=MOST_ROWS + 1) as found:
                rows = list(found)
                columns = found.columns
        except ValueError as error:  # BadInput of engine and record
            return _page(request, posted.caller, state.db, sql, complaint=str(error))
        return _page(request, posted.caller, state.db, sql, columns=columns, rows=rows, save=save)

    return await to_thread.run_sync(answered, limiter=state.questions)


def _page(
    request: Request,
    caller: Any,
    db: Database,
    sql: str,
    *,
    columns: list[str] | None = None,
    rows: list[Any] | None = None,
    complaint: str | None = None,
    save: bool | None = None,
) -> Response:
    return show(
        request,
        caller,
        "query.html.j2",
        status=422 if complaint else 200,
        save=save,
        scripts=("query.js",),
        sql=sql,
        columns=columns,
        rows=(rows or [])[:MOST_ROWS],
        has_more=len(rows or []) > MOST_ROWS,
        complaint=complaint,
        schema=_schema(db),
        row_of=ROWS,
        examples=EXAMPLES,
    )


@lru_cache(4)
def _schema(db: Database) -> dict[str, list[str]]:
    """The columns of each view, as this record has them."""
    found = {}
    for view in ROWS:
        with query(db, f"SELECT * FROM {view} LIMIT 0") as answer:
            found[view] = answer.columns
    return found
