"""What can go wrong with the record.

RecordError
├── BadInput          what the caller asked for cannot be done; nothing was changed
│   ├── Missing       there is nothing of that number
│   ├── Conflict      what is there stands against it: the job has ended, the key belongs to another spec
│   ├── NewerSchema   the database was written by a newer Shortstop
│   └── OlderSchema   the database needs `shortstop db upgrade`
├── LeaseLost         the shard belongs to somebody else by now; nothing was written
└── Unavailable       the database is away, busy or full; try again
"""


class RecordError(Exception):
    """The record could not be read or written."""

    #: whether the same call may succeed when it is made again
    retryable = False


class BadInput(RecordError, ValueError):
    """What the caller asked for cannot be done; the message names the field, the value and the remedy."""


class Missing(BadInput):
    """There is no job, run or key of that number."""


class Conflict(BadInput):
    """What is there stands against it: the job has ended, the key belongs to another spec."""


class NewerSchema(BadInput):
    """The database was written by a newer version of Shortstop."""


class OlderSchema(BadInput):
    """The database is of an older version of Shortstop; `shortstop db upgrade` brings it up to date."""


class LeaseLost(RecordError):
    """The task is no longer held under this lease: it expired, was cancelled, or went to another worker."""


class Unavailable(RecordError):
    """The database cannot be reached, is locked by another process, or its disk is full.

    Whether the last transaction was committed is not known: repeat it. `db.queue.complete` makes that safe.
    """

    retryable = True
