"""CodeXGLUE's line completion (Lu et al. 2021), as its published evaluator scores it.

Its files write a literal as `<STR_LIT>`, `<NUM_LIT>` or `<CHAR_LIT>`, the common ones with their value:
`<STR_LIT:utf-8>`. Both texts are post-processed first; the prediction is stripped before that, the reference is not.
"""

import re

from rapidfuzz.distance import Indel

_LITERAL = re.compile("<(STR|NUM|CHAR)_LIT:(.*?)>", re.DOTALL)


def em_codexglue(prediction: str, reference: str) -> float:
    """Equal token by token: white space separates and is not compared."""
    return float(post_process(prediction.strip()).split() == post_process(reference).split())


def es_codexglue(prediction: str, reference: str) -> float:
    """The insertion-deletion ratio in whole percent, 0..100, rounded half to even; one text empty: 0, both: 100."""
    ours, theirs = post_process(prediction.strip()), post_process(reference)
    total = len(ours) + len(theirs)
    return float(round(100 * ((total - Indel.distance(ours, theirs)) / total))) if total else 100.0


def post_process(code: str) -> str:
    """Literals as their values: a number without one is 0, a string or character empty."""
    if "_LIT" not in code:
        return code
    code = code.replace("<NUM_LIT>", "0").replace("<STR_LIT>", "").replace("<CHAR_LIT>", "")
    for kind, value in _LITERAL.findall(code):
        code = code.replace(f"<{kind}_LIT:{value}>", value)
    return code
