"""An exit bundle on disk: a folder with `exits.json` and `exits.safetensors`. No torch here."""

import hashlib
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from engine.errors import BadInput, WeightsMismatch
from engine.loading import ModelFacts, cache_folder, write_whole
from engine.registry import unknown
from engine.spec import ControllerKind, HeadKind, PolicySpec, Spec, first_complaint

if TYPE_CHECKING:
    from torch import Tensor

SHIPPED = Path(__file__).parent / "bundles"
MANIFEST, TENSORS = "exits.json", "exits.safetensors"
#: the tensor that a calibrated controller adds where the token before left early, [3]: see `engine.controllers`
AFTER_EXIT = "controllers.after_exit"
#: the name of the exits that every model brings along
TIED = "tied"

#: of a reliability diagram: mean probability that was said, share that was so, places
Bin = tuple[float, float, int]


class ExitsManifest(Spec):
    """`exits.json`: what the tensors beside it are, for which weights, and how they were made."""

    schema_version: Literal[1] = 1
    model: str
    weights_hash: str
    n_layers: int
    hidden_size: int
    vocab_size: int
    exit_points: tuple[int, ...] = Field(min_length=1)
    head: HeadKind
    rank: int | None = Field(None, ge=1, description="of a lens")
    shortlist: int | None = Field(
        None, ge=1, description="tokens that a head may predict; the whole vocabulary when absent"
    )
    controller: ControllerKind | None
    preview: int | None = Field(None, ge=1, description="rank of the look at all tokens behind the last layer")
    tuned_weights_hash: str | None = Field(
        None, description="of the model with the bundle's deltas; absent where they leave the model as it came"
    )
    training: dict[str, Any] = {}
    corpus: list[dict[str, Any]] = []
    scores: dict[str, dict[str, float]] = Field({}, description="held-out, by exit point")
    reliability: dict[str, dict[str, list[Bin]]] = Field(
        {}, description="held-out, by exit point and class of the controller: what it said, what was so, how often"
    )
    tensors_hash: str = Field(description="sha256 of exits.safetensors")

    @property
    def tunes(self) -> bool:
        """Whether the bundle changes the model itself: then there are two references."""
        return self.tuned_weights_hash is not None

    @field_validator("controller", mode="before")
    @classmethod
    def _first_there_was_one(cls, value: Any) -> Any:
        """Bundles in the record of older jobs say whether they have one; it is SEC's."""
        return ("sec" if value else None) if isinstance(value, bool) else value

    @model_validator(mode="after")
    def _points_rise(self) -> "ExitsManifest":
        check_exit_points(self.exit_points, self.n_layers)
        return self


def after_exit(folder: Path, manifest: ExitsManifest) -> tuple[float, ...] | None:
    """What a calibrated controller adds to the logits of continue, exit and stop where the token before left early.

    None: the bundle's controller does not look at that, or there is none.
    """
    from safetensors import safe_open

    if manifest.controller != "calibrated":
        return None
    with safe_open(folder / TENSORS, framework="numpy") as tensors:
        return tuple(map(float, tensors.get_tensor(AFTER_EXIT)))


def check_exit_points(points: tuple[int, ...], n_layers: int) -> None:
    """Exit points rise and lie inside the model. Raises `BadInput`."""
    for point in points:
        if not 1 <= point <= n_layers:
            raise BadInput(f"exit_points: {point} is outside the model; give layers from 1 to {n_layers}.")
    if list(points) != sorted(set(points)):
        raise BadInput(f"exit_points: {list(points)} must rise, each once; give {sorted(set(points))}.")


def find_exits(name: str | Path, model: ModelFacts) -> Path:
    """The folder of a bundle by what a model's user calls it: see `tied_exits`, `find_bundle`. Raises `BadInput`."""
    return tied_exits(model) if str(name) == TIED else find_bundle(name)


def find_bundle(name: str | Path) -> Path:
    """The folder of a shipped bundle, by name, or of one's own, by path. Raises `BadInput`."""
    shipped = SHIPPED / str(name)
    if Path(name).name == str(name) and (shipped / MANIFEST).is_file():
        return shipped
    folder = Path(name).expanduser()
    if (folder / MANIFEST).is_file():
        return folder.resolve()
    if folder.is_dir():
        raise BadInput(f"exits {str(name)!r}: the folder has no {MANIFEST}; make a bundle with `shortstop train`.")
    raise BadInput(f"{unknown('exits', str(name), known_exits())} It is no folder here either ({folder.absolute()}).")


def tied_exits(model: ModelFacts) -> Path:
    """A bundle of nothing but the model's own norm and unembedding, after every layer.

    For models that were trained to leave early themselves, such as LayerSkip's. Raises `BadInput` where the cache
    folder cannot be written.
    """
    folder = cache_folder() / "exits" / f"{TIED}-{model.weights_hash[:24]}"
    empty = (2).to_bytes(8, "little") + b"{}"  # safetensors of nothing
    manifest = ExitsManifest(
        model=f"weights {model.weights_hash[:12]}",  # not its name here: the bundle is the same on every machine
        weights_hash=model.weights_hash,
        n_layers=model.n_layers,
        hidden_size=model.hidden_size,
        vocab_size=model.vocab_size,
        exit_points=tuple(range(1, model.n_layers)),
        head="tied",
        controller=None,
        tensors_hash=hashlib.sha256(empty).hexdigest(),
    )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / TENSORS, empty)
        write_whole(folder / MANIFEST, manifest.model_dump_json(indent=1).encode())
    except OSError as error:
        raise BadInput(f"exits {TIED!r}: {folder} cannot be written ({error}); set SHORTSTOP_CACHE.") from None
    return folder


def known_exits() -> list[str]:
    """What can be named without a path."""
    return [*shipped_exits(), TIED]


def shipped_exits() -> list[str]:
    """Names of the bundles that come with Shortstop."""
    return sorted(path.parent.name for path in SHIPPED.glob(f"*/{MANIFEST}"))


def read_manifest(folder: Path) -> ExitsManifest:
    """Read `exits.json` and hold the tensors file against its hash. Raises `BadInput`."""
    try:
        manifest = ExitsManifest.model_validate_json((folder / MANIFEST).read_bytes())
        found = hashlib.sha256((folder / TENSORS).read_bytes()).hexdigest()
    except ValidationError as error:
        raise BadInput(f"exits {folder / MANIFEST}: {first_complaint(error)}") from None
    except OSError as error:
        raise BadInput(
            f"exits {folder}: {error.filename} cannot be read ({error.strerror}); train the bundle again."
        ) from None
    if found != manifest.tensors_hash:
        raise BadInput(
            f"exits {folder}: {TENSORS} is damaged (its hash is not the one in {MANIFEST}); get the bundle again."
        )
    return manifest


def write_bundle(out: Path, manifest: ExitsManifest, tensors: Mapping[str, "Tensor"]) -> ExitsManifest:
    """Both files into a folder of their own, moved into place whole; gives the manifest with the tensors' hash.

    out: absent or empty; nothing else is ever replaced. Raises `BadInput` where it cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(prefix=f"{out.name}.", dir=out.parent))
    except OSError as error:
        raise BadInput(f"out: {out} cannot be written ({error.strerror}); give another folder.") from None
    try:
        made.chmod(0o755)  # mkdtemp makes it the owner's alone
        save_file(dict(tensors), made / TENSORS)
        (made / TENSORS).chmod(0o644)
        digest = hashlib.sha256((made / TENSORS).read_bytes()).hexdigest()
        manifest = manifest.model_copy(update={"tensors_hash": digest})
        (made / MANIFEST).write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")
        made.replace(out)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise BadInput(f"out: {out} cannot be written ({reason}); make room, or give another folder.") from None
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return manifest


def exits_hash(folder: Path) -> str:
    """sha256 over both files of a bundle."""
    return hashlib.sha256((folder / MANIFEST).read_bytes() + (folder / TENSORS).read_bytes()).hexdigest()


def check_weights(manifest: ExitsManifest, model: ModelFacts) -> None:
    """Exits serve the weights that they were trained on and no others. Raises `WeightsMismatch`."""
    if manifest.weights_hash != model.weights_hash:
        raise WeightsMismatch(
            f"exits: trained for {manifest.model!r} with weights {manifest.weights_hash[:12]}…, but model "
            f"{model.name!r} has weights {model.weights_hash[:12]}…; train exits for this model with `shortstop train`."
        )


def check_policy(policy: PolicySpec, manifest: ExitsManifest | None, n_layers: int) -> None:
    """Whether these exits can serve this policy. Raises `BadInput`."""
    if policy.needs == "tuning" and not (manifest and manifest.tunes):
        raise BadInput(
            f"policy {policy.kind!r} is the model without what its exits changed in it, and here they change nothing; "
            "leave it out, or name a bundle with deltas in the field `exits`."
        )
    if policy.needs != "nothing" and manifest is None:
        raise BadInput(f"policy {policy.kind!r} needs exits, and none are given; name a bundle in the field `exits`.")
    if policy.asks_controller and manifest is not None and not manifest.controller:
        field = "" if policy.needs == "controller" else " with ask_above"
        raise BadInput(
            f"policy {policy.kind!r}{field} needs a controller, and the exits of {manifest.model!r} have none; train "
            "one."
        )
    if policy.preview is not None and (manifest is None or manifest.preview is None):
        of = "there are no exits" if manifest is None else f"the exits of {manifest.model!r} have none"
        raise BadInput(
            f"policy {policy.kind!r}: preview is {policy.preview}, and {of}; train some with one, or leave it out."
        )
    if policy.asks is not None and manifest is not None and manifest.controller != policy.asks:
        raise BadInput(
            f"policy {policy.kind!r} is about the controller {policy.asks!r}, and the exits of {manifest.model!r} "
            f"have a {manifest.controller!r} one; use the policy 'controller'."
        )
    from engine.policies import build_rule

    build_rule(policy, manifest.exit_points if manifest else (), n_layers)
