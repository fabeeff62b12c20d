"""Kernel plans that were measured before on this machine, kept in the user's cache folder."""

import hashlib
import json
from collections.abc import Callable, Iterable
from contextlib import suppress

from engine.kernels import is_plan
from engine.loading import cache_folder, write_whole

Plan = dict[str, list[str]]


def remembered_plan(device_class: str, shapes: Iterable[str], measure: Callable[[list[str]], Plan]) -> Plan:
    """The plan for these shapes; those that were never measured on this device class are measured now, and kept.

    Where many machines share a database, the database remembers instead (`db.devices.kernel_plan`).
    """
    note = cache_folder() / "kernels" / f"{hashlib.sha256(device_class.encode()).hexdigest()[:24]}.json"
    try:
        noted = json.loads(note.read_text())
        known: Plan = {shape: kernels for shape, kernels in noted.items() if is_plan(kernels)}
    except (OSError, ValueError, AttributeError):
        known = {}
    wanted = list(shapes)
    if missing := [shape for shape in wanted if shape not in known]:
        known |= measure(missing)
        with suppress(OSError):  # a note saves time next time, no more
            note.parent.mkdir(parents=True, exist_ok=True)
            write_whole(note, json.dumps(known, indent=1).encode())
    return {shape: known[shape] for shape in wanted}
