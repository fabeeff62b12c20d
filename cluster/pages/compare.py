"""Compare: what changed from one job to another, how sure that is, and the samples behind it."""

from dataclasses import dataclass
from typing import Annotated, Any
from urllib.parse import urlencode

from anyio import to_thread
from fastapi import APIRouter, Query, Request
from starlette.responses import Response

from cluster.api.access import Caller, Reader
from cluster.api.jobs import Shared
from cluster.api.state import State
from cluster.comparing import figures, words
from cluster.comparing.model import Comparison, Flip, Moved, PairComparison
from cluster.pages.showing import PageRoute, show
from cluster.pages.texts import Piece, difference
from cluster.reports.figures import Figure
from db.errors import Missing, RecordError
from db.pairs import Written, written_by
from db.session import Database
from engine.errors import BadInput

router = APIRouter(include_in_schema=False, route_class=PageRoute)

_SIDE = r"^[^\x00-\x1f\x7f]*$"
Side = Annotated[str, Query(max_length=300, pattern=_SIDE)]
#: samples of each list that are shown with their texts; the JSON has more
SHOWN = 12


@dataclass(frozen=True)
class Behind:
    """A sample that changed, and what was written for it."""

    sample: Flip | Moved
    written: Written
    pieces: list[Piece] | None  #: B's text held against A's


@dataclass(frozen=True)
class Listed:
    """Samples that changed in one way."""

    title: str
    count: int
    rows: list[Behind]


@router.get("/compare")
async def compare(request: Request, caller: Reader, state: Shared, a: Side = "", b: Side = "") -> Response:
    """Two sides held against each other; without any, the form that asks for them."""

    def read() -> Response:
        return _page(request, caller, state, a.strip(), b.strip())

    return await to_thread.run_sync(read, limiter=state.readers)


def _page(request: Request, caller: Caller, state: State, a: str, b: str) -> Response:
    found, complaint, status = None, None, 200
    if a:
        try:
            found = state.service(caller.name).compare(a, b or None)
        except (BadInput, RecordError) as error:
            if isinstance(error, RecordError) and not isinstance(error, ValueError):
                raise
            complaint, status = str(error), 404 if isinstance(error, Missing) else 422
    return show(
        request,
        caller,
        "compare.html.j2",
        status=status,
        charts=None if found is None else _charts(found),
        a=a,
        b=b,
        found=found,
        complaint=complaint,
        words=words,
        behind=[] if found is None else [_behind(state.db, pair) for pair in found.pairs],
        json_url=f"/v1/compare?{urlencode({name: side for name, side in (('a', a), ('b', b)) if side})}",
    )


def _charts(found: Comparison) -> dict[str, Figure]:
    made: dict[str, Figure | None] = {}
    for number, pair in enumerate(found.pairs):
        made[f"changes-{number}"] = figures.forest(pair)
        made[f"parting-{number}"] = figures.divergence(pair)
    return {name: figure for name, figure in made.items() if figure}


def _behind(db: Database, pair: PairComparison) -> list[Listed]:
    """Flips both ways of every metric, then what moved most; a list of the same samples is not shown twice."""
    lists: list[tuple[str, int, list[Any]]] = []
    for flips in pair.flips:
        lists.append((f"{flips.metric} lost", flips.n_lost, flips.lost))
        lists.append((f"{flips.metric} gained", flips.n_gained, flips.gained))
    lost = [one for one in pair.moved if one.b < one.a]
    gained = [one for one in pair.moved if one.b > one.a]
    lists.append((f"{pair.moved_metric} fell most", len(lost), lost))
    lists.append((f"{pair.moved_metric} rose most", len(gained), gained))
    lists.append(("Other tokens", pair.agreement.diverging, pair.diverged))
    ids = {one.sample_id for _, _, rows in lists for one in rows[:SHOWN]}
    texts = written_by(db, pair.run_a, pair.run_b, ids)
    seen: list[list[int]] = []
    found = []
    for title, count, rows in lists:
        mine = [one.sample_id for one in rows[:SHOWN]]
        if mine and mine not in seen:
            found.append(Listed(title, count, [_row(one, texts[one.sample_id]) for one in rows[:SHOWN]]))
            seen.append(mine)
    return found


def _row(sample: Flip | Moved, written: Written) -> Behind:
    has_both = written.text_a is not None and written.text_b is not None
    return Behind(sample, written, difference(written.text_b or "", written.text_a or "") if has_both else None)
