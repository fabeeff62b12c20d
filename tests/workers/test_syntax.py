"""Cuts that follow the syntax, in every language whose grammar is known."""

import json
from pathlib import Path

import pytest

from engine.errors import BadInput
from workers.benchmarks.catalogue import load_benchmark
from workers.benchmarks.ends import cut
from workers.benchmarks.files import read_source
from workers.benchmarks.lines import LANGUAGES
from workers.benchmarks.sample import Benchmark
from workers.benchmarks.source import LONGEST_REFERENCE
from workers.benchmarks.spec import parse_benchmark
from workers.benchmarks.syntax import GRAMMARS, Code

#: of each language a file with functions
FILES = {
    "c": (
        "a.c",
        'int add(int a, int b)\n{\n    // "{"\n    int c = a + b;\n    return c;\n}\n\nint one(void) { return 1; }\n',
    ),
    "cpp": (
        "a.cpp",
        "int Box::area(int w) const {\n    auto f = [](int x) {\n        return x;\n    };\n    return f(w);\n}\n",
    ),
    "csharp": ("A.cs", "class A {\n    int Add(int a) {\n        return a + 1;\n    }\n}\n"),
    "go": ("a.go", "package a\n\nfunc Add(a int) int {\n\tif a > 0 {\n\t\treturn a\n\t}\n\treturn 0\n}\n"),
    "java": (
        "A.java",
        "class A {\n    A() {\n        this.x = 1;\n    }\n\n    int add(int a) {\n        return a + x;\n    }\n}\n",
    ),
    "javascript": (
        "a.js",
        "function add(a, b) {\n  return a + b;\n}\n\nconst two = (a) => {\n  return `${a}`;\n};\n",
    ),
    "php": ("a.php", "<?php\nfunction add($a) {\n    return $a + 1;\n}\n"),
    "python": (
        "a.py",
        'def add(\n    a, b\n):\n    """Adds é."""\n    c = a + b\n    return c\n\n\ndef one(): return 1\n',
    ),
    "rust": (
        "a.rs",
        "impl A {\n    fn add(&self, a: i32) -> i32 {\n        let b = a;\n        b + 1\n    }\n}\n",
    ),
    "typescript": ("a.ts", "export function add(a: number): number {\n  return a + 1;\n}\n"),
}
BODIES = {
    "c": ['    // "{"\n    int c = a + b;\n    return c;\n}'],
    "cpp": ["    auto f = [](int x) {\n        return x;\n    };\n    return f(w);\n}"],
    "csharp": ["        return a + 1;\n    }"],
    "go": ["\tif a > 0 {\n\t\treturn a\n\t}\n\treturn 0\n}"],
    "java": ["        this.x = 1;\n    }", "        return a + x;\n    }"],
    "javascript": ["  return a + b;\n}", "  return `${a}`;\n}"],
    "php": ["    return $a + 1;\n}"],
    "python": ["    c = a + b\n    return c"],
    "rust": ["        let b = a;\n        b + 1\n    }"],
    "typescript": ["  return a + 1;\n}"],
}


def load(folder: Path, language: str, **options: object) -> Benchmark:
    name, text = FILES[language]
    (folder / name).write_text(text, encoding="utf-8")
    spec = parse_benchmark({"source": str(folder), "language": language, "samples": None, **options})
    return load_benchmark(spec, tokenizer_of=lambda: pytest.fail("no tokenizer here"), max_new_tokens=10)


def test_every_grammar_has_a_file_here():
    assert FILES.keys() == GRAMMARS.keys() == BODIES.keys()


@pytest.mark.parametrize("language", GRAMMARS)
def test_a_body_is_what_stands_between_its_head_and_its_end(tmp_path, language):
    """The whole body, its closing brace included, nothing of what follows; functions on one line are none."""
    code = Code(FILES[language][1], language)
    assert sorted(FILES[language][1][body.start : body.end] for body in code.bodies()) == sorted(BODIES[language])


@pytest.mark.parametrize("language", GRAMMARS)
def test_function_body_ends_as_its_completion_will(tmp_path, language):
    """The rule that cuts completions leaves of the file's own text exactly the body: grammar and rule agree."""
    benchmark = load(tmp_path, language, task="function-body")
    assert sorted(sample.reference for sample in benchmark.samples) == sorted(BODIES[language])
    assert benchmark.ends == "function"
    for sample in benchmark.samples:
        written = f"{sample.reference}\n\nmore = 1;\n}}\n"
        assert cut(sample.prompt, written, "function", language) == sample.reference


@pytest.mark.parametrize("language", GRAMMARS)
@pytest.mark.parametrize("task", ["line-rest", "single-line-infill"])
def test_lines_are_cut_between_pieces_of_code(tmp_path, language, task):
    """Prompt and reference are the file's text around the cut; none lies in a word, a string or a comment."""
    name, text = FILES[language]
    benchmark = load(tmp_path, language, task=task)
    assert benchmark.samples
    for sample in benchmark.samples:
        assert f"{sample.prompt}{sample.reference}\n" in text
        line = sample.prompt.rsplit("\n", 1)[-1] + sample.reference
        assert not line.strip().startswith(("//", '"""'))
        assert (task == "line-rest") == bool(sample.prompt.rsplit("\n", 1)[-1].strip())
        if task == "line-rest":
            assert not (sample.prompt[-1].isalnum() and sample.reference[0].isalnum())
        assert (sample.source_group, sample.language) == (name, language)


def test_a_cut_never_lies_in_a_string_or_comment(tmp_path):
    """A line within a docstring has no cut, and one with a string is cut beside it."""
    text = 'x = """\nwords of a text\n"""\ny = call("two words", 3)  # why not\n'
    (tmp_path / "a.py").write_text(text)
    starts = [0, *(place + 1 for place, sign in enumerate(text) if sign == "\n")]
    code = Code(text, "python")
    assert code.places(starts[1], starts[2] - 1) == []
    line = text.split("\n")[3]
    cuts = [line[: place - starts[3]] for place in code.places(starts[3], starts[4] - 1)]
    assert cuts == ["y", "y =", "y = call", "y = call(", 'y = call("two words"', 'y = call("two words",', cuts[-1]]
    assert cuts[-1] == 'y = call("two words", 3'


def test_templates_are_code_and_template_strings_are_not():
    """Names that grammars give to both: lines of a C++ template are cut, a JavaScript string over two lines is not."""
    text = "template <typename T>\nT twice(T value) {\n    return value + value;\n}\n"
    at = text.index("    return")
    assert len(Code(text, "cpp").places(at, text.index("\n", at))) == 4
    text = "const a = `one ${b}\ntwo three`;\n"
    assert Code(text, "javascript").places(text.index("two"), len(text) - 1) == []
    assert Code(text, "javascript").begins_in_string(text.index("two"))


def test_grammar_and_rule_agree_on_real_code():
    """Of the functions of a large module hardly any is left out because the text alone tells another end."""
    spec = parse_benchmark({"source": "argparse", "task": "function-body", "samples": None})
    [text] = read_source(spec).texts.values()
    bodies = [body for body in Code(text, "python").bodies() if body.end - body.start < LONGEST_REFERENCE]
    benchmark = load_benchmark(spec, tokenizer_of=lambda: pytest.fail("no tokenizer here"), max_new_tokens=10)
    assert len(bodies) > 100
    assert len(benchmark.samples) > 0.97 * len(bodies)


def test_infill_takes_lines_of_functions_only(tmp_path):
    """As HumanEval-infilling does: no imports, no heads, no docstrings."""
    benchmark = load(tmp_path, "python", task="single-line-infill")
    assert [sample.reference for sample in benchmark.samples] == ["    c = a + b", "    return c"]


@pytest.mark.parametrize("language", ["c", "java", "python", "rust"])
def test_ends_beyond_the_line_are_the_references_too(tmp_path, language):
    """`ends: block` on lines of a function: every reference reaches to the end of its block."""
    benchmark = load(tmp_path, language, task="single-line-infill", ends="block")
    assert benchmark.ends == "block"
    assert "ends=block" in benchmark.name
    bodies = BODIES[language]
    for sample in benchmark.samples:
        assert any(body.endswith(sample.reference) for body in bodies)


def test_several_languages_are_told_by_their_extensions(tmp_path):
    """`language: all`, and each sample knows its own; `.h` is C's where C is asked for."""
    for name, text in FILES.values():
        (tmp_path / name).write_text(text, encoding="utf-8")
    (tmp_path / "a.h").write_text("#define A 1\nint add(int a, int b);\n")
    (tmp_path / "README.md").write_text("no\ncode\n")
    spec = parse_benchmark({"source": str(tmp_path), "language": "all", "samples": None})
    benchmark = load_benchmark(spec, tokenizer_of=lambda: pytest.fail("no tokenizer"), max_new_tokens=10)
    languages = {sample.source_group: sample.language for sample in benchmark.samples}
    assert {name: languages[name] for name, _ in FILES.values()} == {name: one for one, (name, _) in FILES.items()}
    assert languages["a.h"] == "c"
    assert "README.md" not in languages
    two = parse_benchmark({"source": str(tmp_path), "language": ["go", "cpp"], "samples": None})
    found = load_benchmark(two, tokenizer_of=lambda: pytest.fail("no tokenizer"), max_new_tokens=10)
    assert {sample.language for sample in found.samples} == {"go", "cpp"}
    assert json.dumps(two.model_dump(mode="json"))


def test_a_language_without_a_grammar_is_refused_where_one_is_needed(tmp_path):
    (tmp_path / "a.rb").write_text("def one\n  1\nend\n")
    assert set(LANGUAGES) - set(GRAMMARS) == {"ruby", "kotlin"}
    for task in ("line-rest", "function-body", "single-line-infill"):
        spec = parse_benchmark({"source": str(tmp_path), "language": "ruby", "task": task})
        with pytest.raises(BadInput, match="that of ruby is not known; take next-line or random-cut"):
            load_benchmark(spec, tokenizer_of=lambda: pytest.fail("no tokenizer"), max_new_tokens=10)
