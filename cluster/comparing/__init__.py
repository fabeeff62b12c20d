"""Two sides held against each other: what changed, how sure that is, and which samples are behind it.

`sides.py` reads what is to be compared, `build.py` compares, `noise.py` knows how far two runs of the same spec differ
in speed, `confirming.py` asks again on fresh samples; `model.py` is what comes out, `terminal.py` and `ci.py` print it.
The rule that judges it is `cluster/gates.py`.
"""
