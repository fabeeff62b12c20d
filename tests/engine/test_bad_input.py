"""Each kind of bad input ends in one clear sentence that names the value and the remedy."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import (
    CONTEXT,
    POINTS,
    facts_of,
    make_bundle,
    open_engine,
    random_prompts,
    tiny_tokenizer,
    write_bundle,
)

from engine.engine import Engine, Prompt
from engine.errors import BadInput, WeightsMismatch
from engine.exits import MANIFEST, TENSORS
from engine.spec import policy

Change = Callable[[Path], object]


def sentence(error: pytest.ExceptionInfo[BadInput]) -> str:
    """The message: one line, short enough to read, with an end."""
    text = str(error.value)
    assert "\n" not in text
    assert len(text.replace("/", " ").split()) < 70, text
    assert text.endswith((".", "`", "?", ")")), text
    return text


@pytest.fixture
def copy_of(tmp_path: Path, tiny_folder: Callable[[str], Path]) -> Callable[..., Path]:
    """A tiny model's folder with a fault put in."""

    def make(change: Change, kind: str = "llama") -> Path:
        folder = tmp_path / "model"
        shutil.copytree(tiny_folder(kind), folder, ignore=shutil.ignore_patterns("exits*", "cache"))
        change(folder)
        return folder

    return make


@pytest.fixture
def bundle(tmp_path: Path, tiny_bundle: Callable[..., Path]) -> Path:
    """A bundle of one's own for the tiny Llama, to be damaged."""
    return shutil.copytree(tiny_bundle("llama", head="lens", shortlist=100), tmp_path / "bundle")


def edited(file: Path, **fields: object) -> None:
    """Change fields of a JSON file; None removes one."""
    content = json.loads(file.read_text()) | fields
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def with_tensors(folder: Path, **added: torch.Tensor | None) -> None:
    """Add tensors to a model's weights, `__` standing for a dot; None removes one."""
    file = folder / "model.safetensors"
    tensors = load_file(file) | {name.replace("__", "."): tensor for name, tensor in added.items()}
    tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(tensors, file, metadata={"format": "pt"})


# --- models ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["smolm2-135m", "smollm2_135m", "SmolLM2-135m"])
def test_unknown_model_gets_the_nearest_name(name: str) -> None:
    with pytest.raises(BadInput, match="did you mean 'smollm2-135m'") as error:
        Engine(name)
    assert name in sentence(error)


def test_unknown_model_far_from_any_name() -> None:
    with pytest.raises(BadInput, match=r"known: smollm2-135m.*no folder here") as error:
        Engine("/nowhere/xyz")
    sentence(error)


@pytest.mark.parametrize("name", ["nobody/nothing-of-that-name", "some body/with spaces--x"])
def test_hub_id_without_a_network(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects the sentence that says where the model was looked for and how to provide it."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(BadInput, match="hf download") as error:
        Engine(name)
    text = sentence(error)
    assert name in text
    assert str(huggingface_hub.constants.HF_HUB_CACHE) in text


def _cut(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def _larger_tokenizer(folder: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([f"<extra {number}>" for number in range(7)])
    tokenizer.save_pretrained(folder)


def with_rope(folder: Path, **rope: object) -> None:
    edited(folder / "config.json", rope_parameters=rope)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: (f / "model.safetensors").unlink(), "no \\*.safetensors file; save the model with save_pretrained"),
        (lambda f: (f / "config.json").unlink(), "no config.json"),
        (lambda f: (f / "config.json").write_text("{"), "is not JSON"),
        (lambda f: (f / "config.json").write_text("[]"), "no JSON object"),
        (lambda f: (f / "generation_config.json").write_text("{"), "is not JSON"),
        (lambda f: edited(f / "config.json", vocab_size=None), "no 'vocab_size'"),
        (lambda f: edited(f / "config.json", model_type="bert"), "family 'bert' is not known; known: codegen, gpt2"),
        (lambda f: edited(f / "config.json", model_type="nonsense"), "family 'nonsense' is not known"),
        (lambda f: edited(f / "config.json", num_hidden_layers=8), "18 tensors are missing"),
        (lambda f: edited(f / "config.json", intermediate_size=81), "18 tensors are missing or of another shape"),
        (lambda f: with_tensors(f, model__norm__weight=None), "1 tensor is missing .* model.norm.weight first"),
        (lambda f: with_tensors(f, score__weight=torch.ones(1)), "1 tensor is not part of .* score.weight first"),
        (
            lambda f: edited(f / "config.json", num_hidden_layers=5),
            "9 tensors are not part of .* model.layers.5.input_layernorm.weight first",
        ),
        (lambda f: with_rope(f, rope_type="longrope"), "rope_type 'longrope', .* use a model with one of default, "),
        (lambda f: with_rope(f, rope_type="spiral"), "rope_type 'spiral'"),
        (lambda f: edited(f / "config.json", rope_parameters=None, rope_scaling={"type": "su"}), "rope_type 'su'"),
        (lambda f: edited(f / "config.json", num_attention_heads=7), "transformers makes no model of its config"),
        (lambda f: edited(f / "config.json", hidden_act="wave"), "transformers makes no model of its config"),
        (_larger_tokenizer, "token '<extra 6>' with id 265, but vocab_size in config.json is 264; use the tokenizer"),
        (_cut, "is damaged"),
        (lambda f: (f / "model.safetensors").write_bytes(b""), "is damaged"),
        (lambda f: (f / "model.safetensors").write_bytes(b"no weights here"), "is damaged"),
        (lambda f: [file.unlink() for file in f.glob("tokenizer*")], "its tokenizer cannot be read"),
        (lambda f: (f / "tokenizer.json").write_text("{"), "its tokenizer cannot be read"),
    ],
)
def test_broken_model_folder(change: Change, message: str, copy_of: Callable[[Change], Path]) -> None:
    """Protects against a traceback, and against weights that transformers would silently make up."""
    folder = copy_of(change)
    with pytest.raises(BadInput, match=message) as error:
        open_engine(folder)
    assert str(folder) in sentence(error) or "family" in message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda f: edited(f / "config.json", use_sliding_window=False),
            "'sliding_attention' .* and sliding_window None",
        ),
        (lambda f: edited(f / "config.json", layer_types=["chunked_attention"] * 6), "'chunked_attention' among"),
        (lambda f: with_rope(f, full_attention={"rope_type": "default"}), "transformers makes no model of its config"),
    ],
)
def test_layers_that_transformers_could_not_run(change: Change, message: str, copy_of: Callable[..., Path]) -> None:
    """Protects against a layer that silently sees all, or turns by other angles than its configuration says."""
    folder = copy_of(change, "qwen2 window in every other layer")
    with pytest.raises(BadInput, match=message) as error:
        open_engine(folder)
    assert str(folder) in sentence(error)


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("llama", ["model__layers__0__self_attn__rotary_emb__inv_freq"]),
        ("gpt2", ["transformer__h__1__attn__bias", "transformer__h__1__attn__masked_bias"]),
        ("gpt_bigcode", ["transformer__h__1__attn__bias", "transformer__h__1__attn__masked_bias"]),
        ("codegen", ["transformer__h__1__attn__causal_mask", "transformer__h__1__attn__embed_positions"]),
    ],
)
def test_masks_and_angles_among_the_weights(
    kind: str, names: list[str], copy_of: Callable[..., Path], tiny_engine: Callable[..., Engine]
) -> None:
    """Protects checkpoints of older releases, which hold what newer ones make anew."""
    engine = open_engine(copy_of(lambda f: with_tensors(f, **{name: torch.ones(1) for name in names}), kind))
    assert engine.complete(["def f"])[0].token_ids == tiny_engine(kind).complete(["def f"])[0].token_ids


def test_code_that_comes_with_a_model_is_not_run(copy_of: Callable[..., Path], tmp_path: Path) -> None:
    """Protects the promise that no model executes anything: its classes are those of `transformers`, or none."""
    trace = tmp_path / "was-run"

    def trap(folder: Path) -> None:
        code = f"open({str(trace)!r}, 'w')\nfrom transformers import *\n"
        (folder / "trap.py").write_text(code + "class Config(LlamaConfig): pass\nclass Model(LlamaForCausalLM): pass\n")
        edited(folder / "config.json", auto_map={"AutoConfig": "trap.Config", "AutoModelForCausalLM": "trap.Model"})
        edited(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": [None, "trap.Tokenizer"]})

    folder = copy_of(trap)
    assert open_engine(folder).n_layers == 6
    edited(folder / "config.json", model_type="ours")
    with pytest.raises(BadInput, match="family 'ours' is not known"):
        open_engine(folder)
    assert not trace.exists()


def test_cache_that_cannot_be_written(tiny_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects a read-only home: hashes are noted to save time, no more; a conversion needs the folder and says so."""
    monkeypatch.setenv("SHORTSTOP_CACHE", str(tiny_folder("llama") / "config.json"))
    assert Engine(str(tiny_folder("llama"))).n_layers == 6
    with pytest.raises(BadInput, match=r"cannot be written .* set SHORTSTOP_CACHE") as error:
        Engine("smollm2-135m")
    sentence(error)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "tpu"}, "device is 'tpu'; give auto, cpu or cuda"),
        ({"dtype": "int4"}, "dtype is 'int4'; give one of float32, bfloat16, float16"),
        ({"threads": 0}, "threads is 0; give at least 1"),
    ],
)
def test_bad_engine_option(options: dict[str, object], message: str, tiny_folder: Callable[[str], Path]) -> None:
    with pytest.raises(BadInput, match=message) as error:
        Engine(str(tiny_folder("llama")), **options)
    sentence(error)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_a_gpu(tiny_folder: Callable[[str], Path]) -> None:
    with pytest.raises(BadInput, match="torch sees no GPU here; give cpu, or auto") as error:
        Engine(str(tiny_folder("llama")), device="cuda")
    sentence(error)
    assert Engine(str(tiny_folder("llama")), device="auto").device.type == "cpu"


# --- exits ----------------------------------------------------------------------------------------------------


def test_exits_for_other_weights(tiny_folder: Callable[[str], Path], bundle: Path) -> None:
    """Protects a result from heads that belong to another model, also one of the same shape."""
    with pytest.raises(WeightsMismatch, match="train exits for this model") as error:
        open_engine(tiny_folder("gpt2"), bundle)
    sentence(error)
    open_engine(tiny_folder("llama"), bundle)


def test_one_weight_makes_another_model(copy_of: Callable[[Change], Path], bundle: Path) -> None:
    """Protects the weights' hash: it sees a single changed number."""

    def nudge(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        tensors["model.norm.weight"][7] += 1e-3
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    with pytest.raises(WeightsMismatch):
        open_engine(copy_of(nudge), bundle)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: edited(b / MANIFEST, exit_points=[1, 7]), "7 is outside the model; give layers from 1 to 6"),
        (lambda b: edited(b / MANIFEST, exit_points=[0, 2]), "0 is outside the model"),
        (lambda b: edited(b / MANIFEST, exit_points=[2, 1]), r"\[2, 1\] must rise, each once; give \[1, 2\]"),
        (lambda b: edited(b / MANIFEST, exit_points=[2, 2]), r"\[2, 2\] must rise, each once; give \[2\]"),
        (lambda b: edited(b / MANIFEST, exit_points=[]), "'exit_points' is \\[\\]"),
        (lambda b: edited(b / MANIFEST, head=None), "'head' is missing"),
        (lambda b: edited(b / MANIFEST, head="tide"), "'head' is 'tide'"),
        (lambda b: edited(b / MANIFEST, flavour=1), "'flavour' is not known here"),
        (lambda b: edited(b / MANIFEST, schema_version=2), "'schema_version' is 2"),
        (lambda b: edited(b / MANIFEST, exit_points=[1, 3]), r"'heads.3.down' is missing, but exits.json promises"),
        (lambda b: edited(b / MANIFEST, rank=5), r"'heads.1.down' is \[4, 48\], but exits.json promises \[5, 48\]"),
        (lambda b: edited(b / MANIFEST, shortlist=99), r"'shortlist' is \[100\]"),
        (lambda b: (b / MANIFEST).write_text("{"), "invalid JSON"),
        (lambda b: (b / MANIFEST).unlink(), "the folder has no exits.json"),
        (lambda b: (b / TENSORS).unlink(), "cannot be read"),
        (lambda b: (b / TENSORS).write_bytes((b / TENSORS).read_bytes()[:-1] + b"?"), "exits.safetensors is damaged"),
    ],
)
def test_broken_bundle(change: Change, message: str, bundle: Path, tiny_folder: Callable[[str], Path]) -> None:
    """Protects against heads that are not what their manifest says, before a token is written with them."""
    change(bundle)
    with pytest.raises(BadInput, match=message) as error:
        open_engine(tiny_folder("llama"), bundle)
    assert str(bundle) in sentence(error)


def test_a_controller_that_is_only_claimed(tmp_path: Path, tiny_folder: Callable[[str], Path]) -> None:
    folder = write_bundle(
        tmp_path / "claim", facts_of(tiny_folder("llama")), {}, head="tied", exit_points=POINTS, controller=True
    )
    with pytest.raises(BadInput, match=r"'controller' is missing, but exits\.json promises"):
        open_engine(tiny_folder("llama"), folder)


def test_unknown_exits(tiny_folder: Callable[[str], Path]) -> None:
    with pytest.raises(BadInput, match="unknown exits 'nowhere'") as error:
        open_engine(tiny_folder("llama"), Path("nowhere"))
    sentence(error)


def test_exits_that_every_model_brings_along(tmp_path: Path, tiny_folder: Callable[[str], Path]) -> None:
    """Protects `exits: tied`, by which a LayerSkip checkpoint runs as it is: the model's own head after every layer."""
    kind = "llama untied"
    built = make_bundle(
        tmp_path / "exits", facts_of(tiny_folder(kind)), head="tied", points=(1, 2, 3, 4, 5), controller=False
    )
    named, bundled = open_engine(tiny_folder(kind), "tied"), open_engine(tiny_folder(kind), built)
    assert (named.exit_points, named.head_kind) == ((1, 2, 3, 4, 5), "tied")
    prompts = [Prompt([5, 6, 7, 8]), Prompt([9])]
    for spec in (policy("fixed", exit_layer=3), policy("self-speculative", exit_layer=4, threshold=0.1)):
        written = [
            [completion.token_ids for completion in done.completions]
            for done in (
                engine.decode(engine.prefill(prompts, 8), spec, max_new_tokens=8, ends_with_line=False)
                for engine in (named, bundled)
            )
        ]
        assert written[0] == written[1]
    assert named.exits_hash == open_engine(tiny_folder(kind), "tied").exits_hash
    with pytest.raises(BadInput, match="needs a controller"):
        named.check(policy("sec", exit=0.5, stop=0.5))


# --- policies -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (policy("fixed", exit_layer=3), "exit_layer is 3, which is no exit point; trained ones: 1, 2, 4, 5"),
        (policy("fixed", exit_layer=6), "exit_layer is 6, which is no exit point"),
        (policy("patience", patience=4), "4 exit points can agree at most 3 times"),
        (policy("sec", exit=0.5, stop=0.5), "needs a controller, and the exits of .* have none"),
        (policy("confidence", threshold=0.5, ask_above=0.5), "with ask_above needs a controller"),
        (policy("fixed", exit_layer=2, preview=5), "preview is 5, and the exits of .* have none"),
        (policy("self-speculative", exit_layer=3), "exit_layer is 3, which is no exit point; trained ones: 1, 2, 4, 5"),
        (policy("fixed", exit_layer=2, min_layer=3), "trained ones from min_layer 3 on: 4, 5"),
        (policy("random", exit_layers=[2, 3], shares=[0.1, 0.1]), "exit_layers is 3, which is no exit point"),
        (policy("static", layers=[2, 7]), "layers has 7, which the model has not; give layers from 1 to 6"),
        (policy("static", layers=[1, 2, 3, 4, 5, 6]), "names every layer of the model; leave one in"),
    ],
    ids=lambda value: getattr(value, "label", ""),
)
def test_policy_that_these_exits_cannot_serve(spec: object, message: str, tiny_engine: Callable[..., Engine]) -> None:
    engine = tiny_engine("llama", head="tied", controller=False, preview=False)
    with pytest.raises(BadInput, match=message) as error:
        engine.check(spec)
    sentence(error)
    with pytest.raises(BadInput, match=message):
        engine.complete(["x"], spec)


@pytest.mark.parametrize(
    "spec",
    [
        policy("fixed", exit_layer=1),
        policy("confidence", threshold=0.5),
        policy("patience", patience=1),
        policy("sec", exit=0.5, stop=0.5),
        policy("position", deepest=4, shallowest=2, over=3),
        policy("self-speculative", exit_layer=1),
    ],
    ids=lambda spec: spec.kind,
)
def test_policy_without_exits(spec: object, tiny_engine: Callable[..., Engine]) -> None:
    with pytest.raises(BadInput, match="needs exits, and none are given; name a bundle in the field `exits`") as error:
        tiny_engine("llama").check(spec)
    sentence(error)
    tiny_engine("llama").check(policy("full"))


# --- prompts --------------------------------------------------------------------------------------------------


def test_long_prompt_is_cut_from_the_left_and_counted(tiny_engine: Callable[..., Engine]) -> None:
    """Protects the end of the prompt, which is where the completion goes on, and the room behind it."""
    engine = tiny_engine("llama")
    text = "".join(chr(ord("a") + i % 26) for i in range(300))
    [prompt] = engine.encode([text], room=10)
    assert (len(prompt.token_ids), prompt.cut_tokens) == (CONTEXT - 10, 300 - (CONTEXT - 10))
    assert engine.tokenizer.decode(prompt.token_ids) == text[-(CONTEXT - 10) :]
    [whole] = engine.complete([text], max_new_tokens=10)
    [tail] = engine.complete([text[-(CONTEXT - 10) :]], max_new_tokens=10)
    assert (whole.prompt_tokens, whole.cut_tokens) == (CONTEXT - 10, 300 - (CONTEXT - 10))
    assert (tail.cut_tokens, tail.token_ids) == (0, whole.token_ids)


def test_prompt_that_just_fits(tiny_engine: Callable[..., Engine]) -> None:
    engine = tiny_engine("gpt2")
    [prompt] = engine.encode(["x" * (CONTEXT - 10)], room=10)
    assert prompt.cut_tokens == 0
    assert len(engine.complete(["x" * (CONTEXT - 10)], max_new_tokens=10)[0].token_ids) == 10


def test_empty_prompt(tiny_engine: Callable[..., Engine]) -> None:
    """Protects a batch in which one prompt is empty: it starts from the model's own beginning, the others as ever."""
    engine = tiny_engine("gpt2")
    empty, other = engine.complete(["", "def f"], max_new_tokens=5)
    assert empty.prompt_tokens == 1
    assert empty.n_tokens >= 1
    assert other.token_ids == engine.complete(["def f"], max_new_tokens=5)[0].token_ids


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0 .* must be at least 1"),
        ({"batch_size": 0}, "batch_size 0; both must be at least 1"),
        ({"max_new_tokens": CONTEXT}, f"max_new_tokens is {CONTEXT}, but the model's context has {CONTEXT} positions"),
    ],
)
def test_bad_generation_option(options: dict[str, int], message: str, tiny_engine: Callable[..., Engine]) -> None:
    with pytest.raises(BadInput, match=message) as error:
        tiny_engine("llama").complete(["x"], **options)
    sentence(error)


def test_one_string_is_no_list_of_prompts(tiny_engine: Callable[..., Engine]) -> None:
    with pytest.raises(BadInput, match="give a list of strings"):
        tiny_engine("llama").complete("def f(x):")


def test_more_tokens_than_there_is_room_for(tiny_engine: Callable[..., Engine]) -> None:
    """Protects the cache's end, which a GPU would only report as a device-side assertion."""
    engine = tiny_engine("llama")
    start = engine.prefill(random_prompts(2), 4)
    with pytest.raises(BadInput, match="max_new_tokens is 5, but prefill left room for 4"):
        engine.decode(start, policy("full"), max_new_tokens=5, ends_with_line=False)
    engine.decode(start, policy("full"), max_new_tokens=4, ends_with_line=False)
    short = [Prompt([1, 2])]
    engine.decode(engine.prefill(short, 4), policy("full"), max_new_tokens=4, ends_with_line=False)
