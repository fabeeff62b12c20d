"""Words of source code: identifiers, numbers and operators, one token each, whatever the language."""

import re

_TOKEN = re.compile(
    r"""
      0[xXbBoO][0-9a-fA-F_]+\w*                                  # 0xff, 0b1010u8
    | (?:\d[\d_]*(?:\.\d[\d_]*)?|(?<![\w)\]])\.\d[\d_]*)         # 12, 1_000, 3.14, .5
      (?:[eE][+-]?\d+)?\w*                                       # 1e-5, 10L, 2.0f
    | [^\W\d][\w$]*                                              # identifiers of any script
    | >>>= | \*\*= | //= | <<= | >>= | >>> | === | !== | <=> | \.\.\. | \.\.= | \?\?= | &&= | \|\|=
    | -> | => | == | != | <= | >= | := | :: | \+\+ | -- | \*\* | // | << | >> | && | \|\| | \?\? | \?\. | \.\.
    | \+= | -= | \*= | /= | %= | &= | \|= | \^= | @=
    | \S                                                         # every other sign stands alone
    """,
    re.VERBOSE,
)


def code_tokens(text: str) -> list[str]:
    """`a+=b1` → `a`, `+=`, `b1`. White space separates and is not kept; upper and lower case differ."""
    return _TOKEN.findall(text)
