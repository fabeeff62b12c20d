"""How torch's threads wait for each other. Imported before torch, or it is too late."""

import os
import sys

# Read by torch's OpenMP when it is loaded, and never again. By default its threads wait for the next product in a busy
# loop: they take the core from numpy's threads (six times slower) and from whatever else the machine does (a product
# of 0.2 ms takes the 8 ms of the scheduler's slice). Waking a sleeper costs microseconds: `docs/decisions/kernels.md`.
# What a user has set stays.
#: whether torch's threads wait in a busy loop: it was loaded before us, or a user has asked for it
spins = "torch" in sys.modules and os.environ.get("OMP_WAIT_POLICY", "").upper() != "PASSIVE"
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
spins = spins or os.environ["OMP_WAIT_POLICY"].upper() != "PASSIVE"
