"""Where a completion ends: the text alone decides, so that every policy and the reference end alike."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.benchmarks.ends import ENDS, cut

PY = "def f(a, b):\n"
JAVA = "class A {\n    int f(int a) {\n"


@pytest.mark.parametrize(
    ("ends", "prompt", "completion", "expected"),
    [
        ("text", PY, "    return a\n\n", "    return a\n\n"),
        ("line", PY, "    return a \n    b", "    return a "),
        ("line", PY, "\n    b", ""),
        ("line", PY, "    b\r\n    c", "    b"),
        ("statement", PY, "    x = g(\n        a,\n    )\n    return x\n", "    x = g(\n        a,\n    )"),
        ("statement", PY + "    x = g(\n", "        a,\n    )\n    return x", "        a,\n    )"),
        ("statement", PY, '    """One\n\n    two."""\n    return 1', '    """One\n\n    two."""'),
        ("statement", PY, "    a = b + \\\n        c\n    d", "    a = b + \\\n        c"),
        ("statement", PY, "    # why\n    return a  # (\n    d", "    # why\n    return a  # ("),
        ("statement", PY, "    a = {\n 1: 2}\n    d", "    a = {\n 1: 2}"),
        ("block", PY, "    if a:\n        b\n\n    return b\n\nprint(f)\n", "    if a:\n        b\n\n    return b"),
        ("block", PY + "    if a:\n", "        b\n        c\n    return d\n", "        b\n        c"),
        ("block", PY + "    if a:\n        b = ", "1\n        c\n    return d\n", "1\n        c"),
        ("block", PY, "    a = (\n1)\n    c\nd", "    a = (\n1)\n    c"),
        ("block", PY, '    a = """\nx\n"""\n    c\nd', '    a = """\nx\n"""\n    c'),
        (
            "block",
            PY,
            "    a\n# a comment is no line of the block\n    c\nd",
            "    a\n# a comment is no line of the block\n    c",
        ),
        ("function", PY + "    if a:\n", "        b\n    return d\n\n\ndef g():\n", "        b\n    return d"),
        ("function", PY, "    def g():\n        1\n    return g\nx", "    def g():\n        1\n    return g"),
        ("function", "class A:\n    def f(self):\n", "        1\n\n    def g(self):\n", "        1"),
        ("function", PY, "x = 1\n", ""),
        ("function", PY, "    return 1\n    # more\n\n\n# about g\ndef g():\n", "    return 1"),
        ("function", PY, "    a = 1\n# odd\n    return a\nx", "    a = 1\n# odd\n    return a"),
        ("function", PY, "\n\n    return 1\n\n\nx", "\n\n    return 1"),
    ],
)
def test_python(ends, prompt, completion, expected):
    assert cut(prompt, completion, ends, "python") == expected


@pytest.mark.parametrize(
    ("ends", "prompt", "completion", "expected"),
    [
        ("statement", JAVA, "        int x = g(a,\n b); return x;", "        int x = g(a,\n b);"),
        ("statement", JAVA, "        for (int i = 0; i < a; i++) {\n a(); }", "        for (int i = 0; i < a; i++) {"),
        ("statement", JAVA, "        return a\n    }\n", "        return a"),
        ("statement", JAVA, '        s = ";}";\n x', '        s = ";}";'),
        ("block", JAVA, "        if (a) { b(); }\n    }\n}\nx", "        if (a) { b(); }\n    }"),
        ("block", JAVA + "        if (a) {\n", "  b(); // }\n        }\n        c();\n    }", "  b(); // }\n        }"),
        (
            "function",
            JAVA + "        if (a) {\n",
            "  b();\n        }\n        c();\n    }\n}",
            "  b();\n        }\n        c();\n    }",
        ),
        ("function", JAVA, "        return '}';\n    }\n    int g() {}\n}", "        return '}';\n    }"),
    ],
)
def test_java(ends, prompt, completion, expected):
    assert cut(prompt, completion, ends, "java") == expected


@pytest.mark.parametrize(
    ("language", "ends", "prompt", "completion", "expected"),
    [
        ("go", "statement", "func f() {\n", "\tx := g(\n\t\ta)\n\treturn x\n", "\tx := g(\n\t\ta)"),
        ("go", "function", "func (s *S) f(a int) (int, error) {\n", "\tif a {\n\t}\n}\nfunc g", "\tif a {\n\t}\n}"),
        ("javascript", "statement", "f(() => {\n", "  const a = `\n;`\n  b()", "  const a = `\n;`"),
        ("javascript", "statement", "", "f(() => {\n  b();\n});", "f(() => {"),
        ("javascript", "statement", "", "a = {\n  b: 1,\n};\nc", "a = {\n  b: 1,\n};"),
        ("java", "statement", JAVA, "int[] a = new int[] {1,\n 2};\n", "int[] a = new int[] {1,\n 2};"),
        ("javascript", "statement", "", "a = b +\n  c\nd", "a = b +\n  c"),
        ("javascript", "function", "all(x => {\n", "  if (x) {\n  }\n});\ny", "  if (x) {\n  }\n}"),
        ("java", "function", "all(x -> {\n", "  if (x) {\n  }\n});\ny", "  if (x) {\n  }\n}"),
        (
            "java",
            "function",
            "int f() {\n switch (a) {\n case 1 -> {\n",
            "}\n}\n return 1;\n}\ny",
            "}\n}\n return 1;\n}",
        ),
        ("cpp", "statement", "int x;\n", "#include <a>\nint y;\n", "#include <a>"),
        ("c", "statement", "", "#define A(x) \\\n  f(x)\nint y;\n", "#define A(x) \\\n  f(x)"),
        ("php", "statement", "", "# no\n$a = 1;\n", "# no\n$a = 1;"),
        ("rust", "function", "fn f() {\n match a {\n Some(x) => {\n", "}\n}\n 1\n}\ny", "}\n}\n 1\n}"),
        ("rust", "function", "fn f<I>(i: I) where I: Iterator<Item = u8> {\n", "  1\n}\ny", "  1\n}"),
        ("typescript", "function", "const f = (a: number): string => {\n", "  return a;\n}\nx", "  return a;\n}"),
        (
            "rust",
            "function",
            "fn f<'a>(x: &'a str) -> &'a str {\n",
            "    if x { x } else { y }\n}\nfn g",
            "    if x { x } else { y }\n}",
        ),
        ("cpp", "function", "int A::f() const {\n  while (x) {\n", "}\n return 1;\n}\nint", "}\n return 1;\n}"),
        ("c", "block", "int x;\n", "int y;\n", "int y;"),
    ],
)
def test_other_languages(language, ends, prompt, completion, expected):
    assert cut(prompt, completion, ends, language) == expected


CODE = st.text(st.sampled_from("ab1 \n\t(){}[];:'\"#/\\`=,"), max_size=40)


@given(CODE, CODE, st.sampled_from(ENDS), st.sampled_from(["python", "java", "javascript", "rust", "go"]))
def test_what_is_cut_is_a_beginning_and_is_cut_no_further(prompt, completion, ends, language):
    """A prefix, whatever was written; cut again it stays as it is, so that stored texts can be scored again."""
    once = cut(prompt, completion, ends, language)
    assert completion.startswith(once)
    assert cut(prompt, once, ends, language) == once
