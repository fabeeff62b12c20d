"""What can go wrong in the cluster.

ClusterError
├── FleetError    no worker could be had, or they died one after the other; the job stays as it is
│   └── RayLost   Ray is gone, and its workers with it; another one can go on
└── ServerError   the server is not there, or failed

KeyboardInterrupt
└── Interrupted   the same, while a job was worked on that a command needs

BadInput (of the engine)
└── NotAllowed    the server knows no such key, or the key may not do that
"""

from engine.errors import BadInput


class ClusterError(Exception):
    """The cluster could not do its work."""


class FleetError(ClusterError):
    """No worker could be had, or workers died one after the other. What is done is kept, and the job can be resumed."""


class RayLost(FleetError):
    """Ray is gone, and its workers with it. What is done is kept, and whoever connects to the next one goes on."""


class ServerError(ClusterError):
    """The server cannot be reached, is busy for long, or failed. What was asked for may have been done."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C while a job was worked on that a command needs. The job stays, and the sentence says how to go on."""


class NotAllowed(BadInput):
    """The server knows no such API key, or it may not do that. Nothing was changed."""
