"""Benchmarks told by a small file: where the records lie, which fields they have, what is made of them.

The catalogue's own lie in `entries/`; a user copies one, changes it and names its path where a benchmark's name stands.
"""

import importlib.util
import os
import re
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal

import yaml
from platformdirs import user_data_path
from pydantic import Field, ValidationError, model_validator

from engine.errors import BadInput
from engine.spec import Spec, first_complaint
from workers.benchmarks.dataset import open_dataset
from workers.benchmarks.ends import Ends, cut
from workers.benchmarks.jsonl import records_of
from workers.benchmarks.lines import language_named, substantive_lines
from workers.benchmarks.records import LeftOut, Record, Sentences, each, unique
from workers.benchmarks.sample import Benchmark, Sample
from workers.scoring.codexglue import post_process

ENTRIES = Path(__file__).with_name("entries")
#: names the folder of files that no package carries
FOLDER_VARIABLE = "SHORTSTOP_BENCHMARKS"


class Source(Spec):
    """Exactly one of a file in the benchmarks' folder, a file of an installed package, a dataset."""

    file: str | None = Field(
        None, description="JSON lines, `.gz` or not, beside this file or in the benchmarks' folder"
    )
    package: str | None = Field(None, description="the installed package that `file` lies in")
    dataset: str | None = Field(None, description="a dataset of the hub, or a folder that save_to_disk wrote")
    config: str | None = None
    split: str = "test"

    @model_validator(mode="after")
    def _is_one(self) -> "Source":
        if (self.file is None) == (self.dataset is None) or (self.package is not None and self.file is None):
            raise ValueError("source: give a file, a package with a file, or a dataset.")
        return self


class Fields(Spec):
    """Each a text in which `{name}` stands for a field of the record; a list's entries are its lines."""

    id: str
    group: str | None = Field(None, description="the sample's source group; its id when absent")
    prompt: str = Field("", description="function-body: what stands before the code")
    reference: str
    test: str | None = Field(None, description="the program that passes behind prompt and completion")


class Declaration(Spec):
    """One entry of the catalogue."""

    name: str = Field(min_length=1)
    version: str = Field(min_length=1)
    content_hash: str | None = Field(
        None, pattern="^[0-9a-f]{64}$", description="of all samples, as `benchmarks show` prints it: others are refused"
    )
    description: str
    source: Source
    get: str = Field(description="the sentence that says where the data is to be had")
    language: str
    task: Literal["given", "lines", "function-body"] = Field(
        description="given: a sample a record. lines: one for each substantive line of the reference. function-body: "
        "the reference is Python code, cut behind the head of the function that the test calls"
    )
    ends: Ends
    post: Literal["none", "codexglue"] = Field("none", description="codexglue: literals and line ends as code has them")
    fields: Fields
    licence: str
    citation: str
    contamination: str = Field(description="what a model may have seen of it")


def read_declaration(path: Path) -> Declaration:
    """Raises `BadInput` with the file and the field."""
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadInput(f"benchmark {str(path)!r} cannot be read ({error.strerror}); correct the path.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        first = str(error).splitlines()[0]
        raise BadInput(f"benchmark {str(path)!r} is not YAML ({first}); correct it.") from None
    if not isinstance(value, dict):
        raise BadInput(f"benchmark {str(path)!r} does not hold a mapping; copy an entry of the catalogue.")
    try:
        return Declaration.model_validate(value)
    except ValidationError as error:
        raise BadInput(f"benchmark {str(path)!r}: {first_complaint(error)}") from None


def known_declarations() -> dict[str, Declaration]:
    """The catalogue's own, by name."""
    found = map(read_declaration, sorted(ENTRIES.glob("*.yaml")))
    return {one.name: one for one in found}


def load_declared(declaration: Declaration, beside: Path = ENTRIES) -> Benchmark:
    """All its samples. beside: the folder of the declaration's file. Raises `BadInput`, also where the data is not."""
    left_out = Sentences()
    made = each(_records(declaration, beside), partial(_samples, declaration), left_out)
    samples = unique(made, left_out)
    found = Benchmark(declaration.name, declaration.version, declaration.ends, samples, left_out.listed())
    expected = declaration.content_hash
    if expected is not None and found.content_hash != expected:
        raise BadInput(
            f"benchmark {declaration.name!r}: its {len(samples):,} samples are not those of version "
            f"{declaration.version!r} (content hash {found.content_hash[:12]}, not {expected[:12]}); "
            f"{declaration.get} Where they are meant to be others, give it another name and leave content_hash out."
        )
    return found


def benchmarks_folder() -> Path:
    """Where the files lie that people fetch themselves."""
    named = os.environ.get(FOLDER_VARIABLE)
    return Path(named).expanduser() if named else user_data_path("shortstop") / "benchmarks"


def _records(declaration: Declaration, beside: Path) -> Iterable[Record]:
    source = declaration.source
    if source.dataset is not None:
        rows = open_dataset(source.dataset, source.config, source.split, hint=declaration.get)
        where = f"dataset {source.dataset!r}, split {source.split!r}"
        return (Record(where, "row", number, row) for number, row in enumerate(rows, start=1))
    assert source.file is not None
    for folder in _folders(source.package, beside):
        for name in (source.file, f"{source.file}.gz"):
            if (folder / name).is_file():
                return records_of(str(folder / name))
    if source.package is not None:
        raise BadInput(
            f"benchmark {declaration.name!r}: the data of the package {source.package} is not installed; "
            f"{declaration.get}"
        )
    raise BadInput(
        f"benchmark {declaration.name!r}: there is no file {source.file!r} in {str(benchmarks_folder())!r} (or where "
        f"{FOLDER_VARIABLE} says); {declaration.get}"
    )


def _folders(package: str | None, beside: Path) -> list[Path]:
    if package is None:
        return [beside, benchmarks_folder()]
    found = importlib.util.find_spec(package)  # finds it without running it
    return [Path(folder) for folder in (found and found.submodule_search_locations) or []]


def _samples(declaration: Declaration, record: Record) -> Iterator[Sample]:
    make = {"given": _given, "lines": _lines, "function-body": _function_body}[declaration.task]
    for sample in make(declaration, record):
        if not sample.reference.strip():
            raise LeftOut(f"sample {sample.name!r} has an empty reference")
        yield sample


def _given(declaration: Declaration, record: Record) -> Iterator[Sample]:
    prompt, reference, test = _texts(declaration, record)
    if not prompt:
        raise LeftOut("the prompt is empty")
    yield _sample(declaration, record, prompt, cut(prompt, reference, declaration.ends, declaration.language), test)


def _lines(declaration: Declaration, record: Record) -> Iterator[Sample]:
    """The reference is the line, its indentation kept; the prompt all that stands before it."""
    prompt, whole, _ = _texts(declaration, record)
    lines = whole.split("\n")
    for index in substantive_lines(lines, language_named(declaration.language)):
        before = prompt + "".join(f"{line}\n" for line in lines[:index])
        if before:
            yield _sample(declaration, record, before, lines[index], None, place=f":{index + 1}")


def _function_body(declaration: Declaration, record: Record) -> Iterator[Sample]:
    before, code, test = _texts(declaration, record)
    end = _head_end(code, test or "")
    prompt, rest = before + code[:end], code[end:]
    body = cut(prompt, rest, declaration.ends, declaration.language)
    yield _sample(declaration, record, prompt, body, None if test is None else f"{rest[len(body) :]}\n{test}")


def _head_end(code: str, test: str) -> int:
    """Where the head of the function ends that the test calls; the last function where it calls none by name."""
    heads = list(re.finditer(r"^def (\w+)\s*\((?:[^()]|\([^()]*\))*\)[^:\n]*:[ \t]*(?:#[^\n]*)?\n", code, re.MULTILINE))
    called = [head for head in heads if re.search(rf"\b{head[1]}\s*\(", test)]
    if not heads:
        raise LeftOut("no function with its body on lines of its own")
    return (called or heads)[-1].end()


def _texts(declaration: Declaration, record: Record) -> tuple[str, str, str | None]:
    """Prompt, reference and test."""
    fields = declaration.fields
    prompt, reference = (_post(declaration, record.filled(text)) for text in (fields.prompt, fields.reference))
    return prompt, reference, None if fields.test is None else record.filled(fields.test)


def _post(declaration: Declaration, text: str) -> str:
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    if declaration.post == "codexglue":
        text = post_process(text.removeprefix("<s>").lstrip(" "))
        return re.sub(r" ?<EOL> ?", "\n", text)
    return text


def _sample(
    declaration: Declaration, record: Record, prompt: str, reference: str, test: str | None, place: str = ""
) -> Sample:
    fields = declaration.fields
    name = record.filled(fields.id)
    return Sample(
        name=f"{name}{place}",
        prompt=prompt,
        reference=reference,
        language=declaration.language,
        source_group=name if fields.group is None else record.filled(fields.group),
        test=test,
    )


def shown(declaration: Declaration) -> dict[str, Any]:
    """As it is printed."""
    return declaration.model_dump(exclude_none=True)
