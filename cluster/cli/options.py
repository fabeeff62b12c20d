"""Options that several commands share."""

from typing import Annotated

import typer

JsonFlag = Annotated[bool, typer.Option("--json", help="Print JSON.")]
DatabaseUrl = Annotated[
    str | None,
    typer.Option(
        "--database",
        metavar="URL",
        help="sqlite:///file or postgresql+psycopg://…; without it the one that the settings name.",
    ),
]
ServerUrl = Annotated[
    str | None,
    typer.Option(
        "--server",
        metavar="URL",
        help="Ask this server instead of a database; SHORTSTOP_SERVER names one, SHORTSTOP_KEY its key.",
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--override", "-O", metavar="PATH=VALUE", help="Set a field of the spec, like policies.1.threshold=0.9."
    ),
]
Workers = Annotated[int | None, typer.Option("--workers", metavar="N", help="Workers to keep alive on this machine.")]
RayAddress = Annotated[
    str | None,
    typer.Option(
        "--ray-address", metavar="HOST:PORT", help="A running Ray cluster; without it one is started on this machine."
    ),
]
GpusPerWorker = Annotated[
    float | None,
    typer.Option("--gpus-per-worker", metavar="N", help="What a worker on a GPU holds: 0.5 lets two share one."),
]
Inline = Annotated[bool, typer.Option("--inline", help="Work in this process, without Ray: for debugging.")]
HtmlFile = Annotated[
    str | None, typer.Option("--html", metavar="FILE", help="Write the report as one HTML file as well.")
]
IfChanged = Annotated[
    bool,
    typer.Option("--if-changed", help="Run nothing where a finished job has the same inputs; report that one."),
]
SpecFile = Annotated[str, typer.Argument(metavar="SPEC", help="A YAML file; - reads standard input.")]
Key = Annotated[
    str | None,
    typer.Option(
        "--key", metavar="KEY", help="The same key and spec again are the same job: for a script that retries."
    ),
]
JobId = Annotated[
    int, typer.Argument(metavar="JOB", min=1, max=2**31 - 1, help="The job's number, as `shortstop list` prints it.")
]
