"""How threads wait for each other. Imported before torch, or it is too late."""

import os

# Read by OpenMP when torch is loaded, and never again. By default its threads wait for the next product in a busy loop
# for milliseconds, and take the core from whatever else the machine does; asleep, each has to be woken for every
# product, which takes longer than a small product. So they look for a little longer than the engine takes to come back,
# and then sleep: `docs/decisions/kernels.md`. What a user has set stays.
_SHORT = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "30000"}

if not any(name in os.environ for name in _SHORT):
    os.environ.update(_SHORT)
