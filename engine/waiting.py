"""How threads wait for each other. Imported before numpy and torch, or it is too late."""

import os
import sys

# Read by OpenMP (torch, numba) and by OpenBLAS (numpy) when they are loaded, and never again. By default all of them
# wait for the next product in a busy loop: they take the core from each other (six times slower) and from whatever else
# the machine does (a product of 0.2 ms takes the 8 ms of the scheduler's slice). Sleeping at once costs tens of
# microseconds for every wake: so they look for about as long as it takes to come back, and then sleep:
# `docs/decisions/kernels.md`. What a user has set stays.
_SHORT = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "3000", "OPENBLAS_THREAD_TIMEOUT": "16"}
_OPENMP = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")

_chosen = any(name in os.environ for name in _OPENMP)
#: whether torch's threads wait in a busy loop: it was loaded before us, or a user has asked for it
spins = os.environ.get("OMP_WAIT_POLICY", "").upper() == "ACTIVE" or ("torch" in sys.modules and not _chosen)
for _name, _value in _SHORT.items():
    if not (_chosen and _name in _OPENMP):
        os.environ.setdefault(_name, _value)
