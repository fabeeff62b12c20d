"""The supervisor's process: a fleet over all jobs, until it is told to stop or Ray is lost.

Ray ends a process that has lost its head, without asking. So the keeper starts this one, and starts it again.
Exit codes: 0 drained, 2 bad input (the sentence goes to the keeper), anything else: try again.
"""

import json
import os
import sys
import time
from contextlib import closing

from cluster.cli.output import note
from cluster.errors import ClusterError
from cluster.fleet.keeper import BAD_INPUT, GPU_SECONDS, GPUS, JOINED, LOST, REFUSED, Orders
from cluster.jobs import sigterm_interrupts
from cluster.logs import configure_logs
from cluster.ray_environment import set_up_ray
from db.errors import BadInput, RecordError
from db.session import open_database


def main() -> int:
    """Do what standard input says: `Orders` as JSON."""
    orders = Orders.model_validate_json(sys.stdin.read())
    configure_logs(orders.log_level)
    try:
        with sigterm_interrupts():
            _supervise(orders)
    except KeyboardInterrupt:
        return 0
    except BadInput as error:
        if orders.again:
            note(f"shortstop: {error}")
            return LOST
        print(f"{REFUSED}{error}", flush=True)
        return BAD_INPUT
    except (ClusterError, RecordError) as error:
        note(f"shortstop: {error}")
        return LOST
    return 0


def _supervise(orders: Orders) -> None:
    set_up_ray(orders.ray_address)
    from cluster.fleet.supervisor import Fleet

    keeper, next_look, told = os.getppid(), 0.0, ""

    def each_round() -> None:
        nonlocal next_look, told
        if os.getppid() != keeper:  # nobody would start it again, nor keep another fleet out
            raise KeyboardInterrupt
        if time.monotonic() < next_look:
            return
        next_look, gpus = time.monotonic() + GPU_SECONDS, json.dumps(fleet.gpus())
        if gpus != told:
            told = gpus
            print(f"{GPUS}{gpus}", flush=True)

    with closing(open_database(orders.database_url, patient=True)) as db:
        fleet = Fleet(
            db,
            workers=orders.workers,
            workers_a_node=orders.workers_a_node,
            gpus_per_worker=orders.gpus_per_worker,
            ray_address=orders.ray_address,
            lease_seconds=orders.lease_seconds,
            idle_seconds=orders.idle_seconds,
            log_level=orders.log_level,
        )
        with fleet, sigterm_interrupts():  # in this order: Ray brings a handler of its own
            print(JOINED, flush=True)  # from now on a Ray that is not there is one to wait for
            fleet.run(each_round)


if __name__ == "__main__":
    sys.exit(main())
