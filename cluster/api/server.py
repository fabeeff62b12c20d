"""`shortstop serve`: the API in a process, the fleet and the schedules beside it."""

import gc
import socket
from collections.abc import Callable
from contextlib import closing, nullcontext
from types import FrameType

import uvicorn

from cluster.api.access import is_loopback
from cluster.api.app import make_app
from cluster.api.fleet import fleet
from cluster.schedules.ticking import ticking
from cluster.settings import Settings
from db import keys
from db.session import open_database
from engine.errors import BadInput

#: that requests in hand may take when the server is asked to end
_DRAIN_SECONDS = 10


def serve(
    settings: Settings,
    *,
    host: str,
    port: int,
    with_fleet: bool,
    with_pages: bool = True,
    workers: int | None = None,
    on_ready: Callable[[str], None] = lambda url: None,
) -> None:
    """Serve until SIGINT or SIGTERM.

    port: 0 for any that is free. workers: the most of the fleet; as many as there are places when absent. on_ready is
    told the server's URL once it accepts connections. Raises `BadInput` for an address that cannot be had, and for one
    beyond this machine while there is no valid key.
    """
    with closing(open_database(settings.database_url)) as db:
        loopback = is_loopback(host)
        if not loopback and not keys.any_key(db, valid=True):
            raise BadInput(
                f"host {host!r} is open to others, and there is no API key; make one with `shortstop key create`, "
                "or serve on 127.0.0.1."
            )
        app = make_app(db, settings, is_loopback=loopback, with_pages=with_pages)
        config = uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=_DRAIN_SECONDS,
            timeout_keep_alive=75,
        )
        with (
            _listening(host, port) as listener,
            fleet(settings, workers) if with_fleet else nullcontext() as keeper,
            ticking(settings),
        ):
            if keeper:
                app.state.shortstop.metrics.gpus = keeper.gpus
            server = _Server(config, app.state.shortstop.hub.close)
            gc.freeze()  # what is loaded by now stays: looking through it again would stop every request in hand
            on_ready(f"http://{_shown(host)}:{listener.getsockname()[1]}")
            server.run(sockets=[listener])


class _Server(uvicorn.Server):
    """Ends open streams when it is asked to end, so that nobody waits for them."""

    def __init__(self, config: uvicorn.Config, end_streams: Callable[[], None]) -> None:
        super().__init__(config)
        self._end_streams = end_streams

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._end_streams()
        super().handle_exit(sig, frame)


def _listening(host: str, port: int) -> socket.socket:
    """Raises `BadInput` where nobody can listen there."""
    try:
        [(family, kind, protocol, _, address), *_] = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        listener = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no name"
        raise BadInput(f"host {host!r}: there is no such address ({reason}); give another.") from None
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(2048)
    except OSError as error:
        listener.close()
        raise BadInput(f"port {port} of {host!r} cannot be had ({error.strerror}); give another.") from None
    return listener


def _shown(host: str) -> str:
    return f"[{host}]" if ":" in host else host
