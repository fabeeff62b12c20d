"""`shortstop schedule`: jobs that recur, what became of them, and whom they tell."""

import signal
from typing import TYPE_CHECKING, Annotated

import typer

from cluster.cli.options import DatabaseUrl, JsonFlag, Overrides, ServerUrl
from cluster.cli.output import note, print_json, print_table
from cluster.cli.start import opened, service, start

if TYPE_CHECKING:
    from cluster.schedules.ticking import Ticked
    from db.schedules import FiringRow, ScheduleRow

Name = Annotated[str, typer.Argument(metavar="NAME", help="As `shortstop schedule list` prints it.")]
File = Annotated[
    str, typer.Argument(metavar="FILE", help="A YAML file, see docs/schedules.md; - reads standard input.")
]
Firings = Annotated[int, typer.Option("--last", metavar="N", min=1, max=1000, help="The newest firings to show.")]


def add(
    file: File,
    overrides: Overrides = None,
    database: DatabaseUrl = None,
    server: ServerUrl = None,
    as_json: JsonFlag = False,
) -> None:
    """Check a schedule as far as its job, and let it fire from now on."""
    from cluster.cli.jobs import spec_folder
    from cluster.reports.formats import moment
    from cluster.schedules.spec import read_schedule

    with service(database, server=server) as shortstop:
        done = shortstop.schedules.add(read_schedule(file, overrides or []), spec_folder(file))
    if as_json:
        print_json(done)
        return
    print(f"schedule {done.schedule.name}: fires next on {moment(done.schedule.next_at)}")
    for url, secret in done.secrets.items():
        note(f"messages to {url} are signed with {secret}; it is shown this once")


def list_schedules(database: DatabaseUrl = None, server: ServerUrl = None, as_json: JsonFlag = False) -> None:
    """The schedules by name, and how the last firing of each ended."""
    from cluster.reports.formats import moment

    with service(database, server=server) as shortstop:
        rows = shortstop.schedules.list()
    if as_json:
        print_json(rows)
        return
    columns = ("schedule", "cron", "zone", "next", "last", "verdict", "failing since")
    print_table(
        columns,
        [
            (
                one.schedule.name,
                one.schedule.spec["cron"],
                one.schedule.spec["zone"],
                _next(one.schedule),
                None if one.last is None else moment(one.last.fire_at),
                None if one.last is None else _verdict(one.last),
                None if one.incident is None else moment(one.incident.opened_at),
            )
            for one in rows
        ],
    )


def show(
    name: Name,
    last: Firings = 10,
    database: DatabaseUrl = None,
    server: ServerUrl = None,
    as_json: JsonFlag = False,
) -> None:
    """One schedule: its history with verdicts and what changed, and what its webhooks were told."""
    from cluster.reports.formats import moment

    with service(database, server=server) as shortstop:
        found = shortstop.schedules.show(name, limit=last)
    if as_json:
        print_json(found)
        return
    row, spec = found.schedule, found.schedule.spec
    facts = [
        ("schedule", row.name),
        ("cron", f"{spec['cron']} {spec['zone']}"),
        ("next", _next(row)),
        ("overlap", row.overlap),
        ("baseline", spec["baseline"] if isinstance(spec["baseline"], str) else str(spec["baseline"])),
        ("failing since", None if found.incident is None else moment(found.incident.opened_at)),
    ]
    print_table(("", ""), [fact for fact in facts if fact[1] is not None])
    for one in found.firings:
        jobs = ", ".join(f"job {job}" if role == "run" else f"{role} job {job}" for role, job in one.jobs.items())
        print(f"\n{moment(one.fire_at)}  {_verdict(one)}{f'  {jobs}' if jobs else ''}")
        for line in _lines(one):
            print(f"  {line}")
    if found.messages:
        print()
        print_table(
            ("message", "to", "state", "attempts", "last answer"),
            [(moment(one.made_at), one.url, one.state, one.attempts, one.answer) for one in found.messages],
        )


def pause(name: Name, database: DatabaseUrl = None, server: ServerUrl = None, as_json: JsonFlag = False) -> None:
    """Let a schedule fire no more; a job that it began goes on."""
    with service(database, server=server) as shortstop:
        _answer(shortstop.schedules.pause(name), as_json)


def resume(name: Name, database: DatabaseUrl = None, server: ServerUrl = None, as_json: JsonFlag = False) -> None:
    """Let a schedule fire again, from now on."""
    with service(database, server=server) as shortstop:
        _answer(shortstop.schedules.resume(name), as_json)


def remove(name: Name, database: DatabaseUrl = None, server: ServerUrl = None, as_json: JsonFlag = False) -> None:
    """Remove a schedule with its history; its jobs stay."""
    with service(database, server=server) as shortstop:
        shortstop.schedules.remove(name)
    if as_json:
        print_json({"removed": name})
    else:
        print(f"schedule {name}: removed")


def trigger(name: Name, database: DatabaseUrl = None, server: ServerUrl = None, as_json: JsonFlag = False) -> None:
    """Fire now, paused or not."""
    with service(database, server=server) as shortstop:
        done = shortstop.schedules.trigger(name)
    if as_json:
        print_json(done)
    elif "run" in done.jobs:
        print(f"schedule {name}: job {done.jobs['run']} submitted")
    else:
        print(f"schedule {name}: {done.state}")


def resend(name: Name, database: DatabaseUrl = None, server: ServerUrl = None, as_json: JsonFlag = False) -> None:
    """Send again what the webhooks of a schedule did not take, dead letters included."""
    with service(database, server=server) as shortstop:
        count = shortstop.schedules.resend(name)
    if as_json:
        print_json({"messages": count})
    else:
        print(f"schedule {name}: {count} messages are sent again")


def tick(database: DatabaseUrl = None, as_json: JsonFlag = False) -> None:
    """Look once what is due: fire, judge, tell. For a machine whose own cron does the looking."""
    from cluster.schedules.ticking import look

    settings = start(database)
    with opened(settings, create=False) as db:
        done = look(db, settings)
    if as_json:
        print_json(done)
    else:
        print(_ticked(done))


def run(database: DatabaseUrl = None) -> None:
    """Look what is due until SIGTERM or Ctrl-C. `serve` and `fleet` do so beside their work."""
    import threading

    from cluster.schedules.ticking import ticking

    settings = start(database)
    ending = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ending.set())
    with ticking(settings):
        note("looking what is due, end with Ctrl-C")
        ending.wait()


def _ticked(done: "Ticked") -> str:
    return f"fired {done.fired}, left out {done.left_out}, judged {done.judged}, messages delivered {done.delivered}"


def _answer(row: "ScheduleRow", as_json: bool) -> None:
    if as_json:
        print_json(row)
    else:
        print(f"schedule {row.name}: {f'next {_next(row)}' if not row.paused else 'paused'}")


def _next(row: "ScheduleRow") -> str:
    from cluster.reports.formats import moment

    if row.paused:
        return "paused"
    return "ended" if row.next_at is None else moment(row.next_at)


def _verdict(one: "FiringRow") -> str:
    """What came of a firing, in a word or two."""
    if one.verdict is not None:
        return one.verdict.value
    if one.state == "submitted":
        return "under way" if len(one.jobs) < 2 else "being confirmed"
    return one.state.value


def _lines(one: "FiringRow") -> list[str]:
    """Why, what `latest` was, what changed, and the figures."""
    from cluster.schedules.history import changes, figures

    said = [why for why in (one.sentence or one.reason,) if why]
    said += [f"latest {field}: {value}" for field, value in one.resolved.items()]
    return [*said, *(f"changed: {change}" for change in changes(one)), *figures(one)]
