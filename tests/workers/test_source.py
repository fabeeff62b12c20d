"""Benchmarks cut out of source code: next-line and random-cut, and what is left out of them."""

import os
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from engine.errors import BadInput
from workers.benchmarks.catalogue import load_benchmark
from workers.benchmarks.lines import LANGUAGES, substantive_lines
from workers.benchmarks.sample import Benchmark
from workers.benchmarks.source import LONGEST_PROMPT, WINDOW
from workers.benchmarks.spec import parse_benchmark

MODULE = "# licence\n\nimport os\n\n\ndef área(x):\n    # square\n    return (\n        x * x\n    )\n"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE as the models have it, small enough to cut letters of two bytes in two."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    bpe.train_from_iterator([Path(os.__file__).read_text(encoding="utf-8")], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe)


def load(value: object, tokenizer: PreTrainedTokenizerFast | None = None, max_new_tokens: int = 10) -> Benchmark:
    def tokenizer_of() -> PreTrainedTokenizerFast:
        assert tokenizer is not None, "only random-cut may ask for the tokenizer"
        return tokenizer

    return load_benchmark(parse_benchmark(value), tokenizer_of=tokenizer_of, max_new_tokens=max_new_tokens)


def write(root: Path, files: dict[str, str | bytes]) -> str:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(root)


def test_next_line_takes_substantive_lines_after_their_file(tmp_path):
    """Every substantive line but the first, each after exactly what stands before it."""
    benchmark = load({"source": write(tmp_path / "src", {"a/b.py": MODULE, "z.py": "x = 1\ny = 2\n"})})
    assert benchmark.ends == "line"
    assert [sample.name for sample in benchmark.samples] == ["a/b.py:3", "a/b.py:6", "a/b.py:8", "a/b.py:9", "z.py:2"]
    for sample in benchmark.samples[:4]:
        assert MODULE.startswith(f"{sample.prompt}{sample.reference}\n")
        assert (sample.source_group, sample.language) == ("a/b.py", "python")
    assert benchmark.samples[3].reference == "        x * x"


def test_a_long_prompt_keeps_its_last_whole_lines(tmp_path):
    """At most 4,000 characters, beginning where a line begins, and no line fewer than fit."""
    lines = [f"value_{i} = {i}" for i in range(1000)]
    benchmark = load({"source": write(tmp_path, {"long.py": "\n".join(lines)}), "samples": None})
    assert len(benchmark.samples) == 999
    for sample in benchmark.samples:
        number = int(sample.name.rpartition(":")[2]) - 1
        kept = sample.prompt.split("\n")[:-1]
        assert kept == lines[number - len(kept) : number]
        assert len(sample.prompt) <= LONGEST_PROMPT
        assert len(kept) == number or len(sample.prompt) + len(lines[number - len(kept) - 1]) + 1 > LONGEST_PROMPT


def test_same_spec_same_samples_wherever_the_folder_lies(tmp_path):
    """Neither the path, nor the order files were written in, nor the checkout's line ends make another benchmark."""
    files = {f"m{i}.py": f"import m{i}\n" + MODULE for i in range(9)}
    one = write(tmp_path / "x" / "src", files)
    windows = {name: text.replace("\n", "\r\n") for name, text in reversed(files.items())}
    other = write(tmp_path / "elsewhere" / "src", windows)
    spec = {"samples": 20, "seed": 4}
    here, there = load({"source": one, **spec}), load({"source": other, **spec})
    assert here == there
    assert here.content_hash == there.content_hash
    assert here.name == "source:src samples=20 seed=4"
    assert {sample.source_group for sample in here.samples} == set(files)
    assert load({"source": one, "samples": 20, "seed": 5}).content_hash != here.content_hash


def test_a_source_changes_its_version_with_its_content_unless_named(tmp_path):
    """One's own code changes daily: a new version, not an error; under a given name it is an error for the record."""
    source = write(tmp_path / "src", {"a.py": MODULE})
    before, named = load({"source": source}), load({"source": source, "name": "ours"})
    write(tmp_path / "src", {"a.py": MODULE + "print(1)\n"})
    after, renamed = load({"source": source}), load({"source": source, "name": "ours"})
    assert before.name == after.name
    assert before.version != after.version
    assert (named.name, named.version) == (renamed.name, renamed.version) == ("ours", "2")
    assert named.content_hash != renamed.content_hash


def test_what_cannot_be_completed_is_left_out_with_a_sentence(tmp_path):
    """Links (loops among them), null characters, other encodings, huge lines, empty files: named, never fatal."""
    source = write(
        tmp_path / "src",
        {
            "good.py": MODULE,
            "null.py": "a = 1\nb = '\0'\n",
            "latin.py": b"# caf\xe9\nx = 1\n",
            "huge.py": "a = 1\nb = '" + "x" * 3000 + "'\n",
            "data.py": "x = 0\n" * 400_000,
            "empty.py": "\n \n",
            "notes.txt": "no code",
            ".venv/lib/hidden.py": MODULE,
            "venv/pyvenv.cfg": "",
            "venv/lib/other.py": MODULE,
            "__pycache__/cached.py": MODULE,
        },
    )
    (tmp_path / "src" / "loop").symlink_to(tmp_path / "src")
    (tmp_path / "src" / "itself.py").symlink_to("itself.py")
    os.mkfifo(tmp_path / "src" / "pipe.py")
    (tmp_path / "src" / os.fsdecode(b"caf\xe9.py")).write_text(MODULE)
    benchmark = load({"source": source})
    assert {sample.source_group for sample in benchmark.samples} == {"good.py"}
    assert benchmark.left_out == [
        r"caf\udce9.py is left out: its name is not UTF-8.",
        "data.py is left out: it has 2,400,000 bytes, more than 2,097,152.",
        "empty.py is left out: it is empty.",
        "huge.py is left out: its longest line has 3,006 characters, more than 2,000.",
        "itself.py is left out: it is a symbolic link, and links are not followed.",
        "latin.py is left out: byte 6 is not UTF-8.",
        "loop is left out: it is a symbolic link, and links are not followed.",
        "null.py is left out: it holds null characters.",
        "pipe.py is left out: it is not a regular file.",
    ]


def test_an_installed_package_is_found_and_not_imported(tmp_path, monkeypatch):
    """A package, a package within, a single module: by name, without running a line of it."""
    write(
        tmp_path, {"bomb/__init__.py": "import sys\nraise SystemExit\n", "bomb/inner/x.py": MODULE, "fuse.py": MODULE}
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path.parent)
    assert {s.source_group for s in load("source:bomb").samples} == {"__init__.py", "inner/x.py"}
    assert {s.source_group for s in load("source:bomb.inner").samples} == {"x.py"}
    assert {s.source_group for s in load("source:fuse").samples} == {"fuse.py"}
    assert "bomb" not in sys.modules


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        ({"source": "./nowhere"}, "source './nowhere': there is no such folder; correct the path."),
        ({"source": "jsn"}, "no such installed package; did you mean 'json'?"),
        ({"source": "json.nothing"}, "source 'json.nothing': there is no such folder"),
        ({"source": "sys"}, "source 'sys' is compiled into Python and has no source files"),
        ({"source": "json", "language": "pyton"}, "unknown language 'pyton'; did you mean 'python'?"),
        ({"source": "json", "language": "go"}, "benchmark 'source:json language=go' has no samples"),
        ({"source": __file__}, "is not a folder; give the folder that holds it."),
    ],
)
def test_a_source_that_cannot_be_had_is_named(tmp_path, monkeypatch, spec, sentence):
    """One sentence with field, value and remedy."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadInput) as fault:
        load(spec)
    assert sentence in str(fault.value)


def test_an_empty_benchmark_says_what_was_left_out(tmp_path):
    with pytest.raises(
        BadInput, match=r"has no samples; .* 1 pieces of input were left out; the first: a\.py is left out: it is empty"
    ):
        load({"source": write(tmp_path, {"a.py": ""})})


def test_random_cut_follows_the_protocol(tmp_path, tokenizer):
    """Windows of 128 tokens; cut from min(len - 10, 50) to len - 1; the next 10 tokens, fewer at the window's end."""
    text = Path(os.__file__).read_text(encoding="utf-8")[:20_000]
    source = write(tmp_path / "src", {"os.py": text})
    benchmark = load({"source": source, "task": "random-cut", "samples": None}, tokenizer)
    assert benchmark.ends == "text"
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    whole, rest = divmod(len(ids), WINDOW)
    assert len(benchmark.samples) == whole + (rest > 10)
    cuts = []
    for number, sample in enumerate(benchmark.samples):
        window = ids[number * WINDOW : (number + 1) * WINDOW]
        cut = next(cut for cut in range(1, len(window)) if tokenizer.decode(window[:cut]) == sample.prompt)
        assert sample.reference == tokenizer.decode(window[cut : cut + 10])
        assert min(len(window) - 10, 50) <= cut <= len(window) - 1
        assert sample.name == f"os.py:{number}"
        cuts.append(cut)
    assert len(set(cuts)) > 10
    assert load({"source": source, "task": "random-cut", "samples": None}, tokenizer) == benchmark
    reseeded = load({"source": source, "task": "random-cut", "samples": None, "seed": 1}, tokenizer)
    assert [s.prompt for s in reseeded.samples] != [s.prompt for s in benchmark.samples]


def test_random_cut_keeps_letters_whole(tmp_path, tokenizer):
    """A cut within a letter of several bytes leaves no replacement character: the letter stays with the prompt."""
    text = "x = 1\n" + "\n".join(["ж" * 1500] * 20)
    benchmark = load({"source": write(tmp_path, {"a.py": text}), "task": "random-cut", "samples": None}, tokenizer)
    assert len(benchmark.samples) > 400
    for sample in benchmark.samples:
        assert sample.reference
        assert set(sample.prompt + sample.reference) <= set(text)


@pytest.mark.parametrize("length", [1, 64, 200])
def test_random_cut_references_are_as_long_as_completions(tmp_path, tokenizer, length):
    """`max_new_tokens` other than the paper's 10 still leaves a prompt in every window."""
    source = write(tmp_path, {"a.py": "value = value + 1\n" * 400})
    benchmark = load({"source": source, "task": "random-cut"}, tokenizer, max_new_tokens=length)
    longest = max(len(tokenizer(sample.reference)["input_ids"]) for sample in benchmark.samples)
    assert longest <= min(length, WINDOW) + 1
    assert all(sample.prompt and sample.reference for sample in benchmark.samples)


@pytest.mark.parametrize(
    ("language", "text", "expected"),
    [
        ("python", 'x = 1  # why\n#!y\n  )\n    }),\n"""doc"""\n# no\n\t\n]', [0, 4]),
        ("java", "/** a\n * b\n */ int x;\n// c\n/* d */\n/* e */ y();\n});\n*p = 1;\n}", [2, 5, 7]),
        ("c", 'char *s = "/* not a comment";\nint x;', [0, 1]),
        ("javascript", "/*\n/* still one */\nf();", [2]),
        ("ruby", "# a\nend", [1]),
        ("php", "# a\n// b\n$x = 1;", [2]),
    ],
)
def test_substantive_lines(language, text, expected):
    """Not blank, not a comment only, not only closing brackets: by the language's own comments."""
    assert substantive_lines(text.split("\n"), LANGUAGES[language]) == expected
