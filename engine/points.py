"""Which exit points a policy may use. No torch here: rules and replay ask alike."""

from collections.abc import Sequence

from engine.errors import BadInput
from engine.spec import Patience, PolicySpec


def usable_points(spec: PolicySpec, points: Sequence[int], n_layers: int) -> tuple[int, ...]:
    """The exit points, rising, at which a token may leave."""
    return tuple(point for point in points if (spec.min_layer or 0) <= point < n_layers)


def check_points(spec: PolicySpec, field: str, wanted: Sequence[int], points: Sequence[int], n_layers: int) -> None:
    """Whether the layers that a policy names are exit points that it may use. Raises `BadInput`."""
    usable = usable_points(spec, points, n_layers)
    for layer in wanted:
        if layer not in usable:
            known = ", ".join(map(str, usable)) or "none"
            under = f" from min_layer {spec.min_layer} on" if spec.min_layer else ""
            raise BadInput(
                f"policy {spec.kind}: {field} is {layer}, which is no exit point; trained ones{under}: {known}."
            )


def check_patience(spec: Patience, usable: Sequence[int]) -> None:
    """Whether so many exit points can agree. Raises `BadInput`."""
    if spec.patience >= len(usable):
        raise BadInput(
            f"policy patience: patience is {spec.patience}, but {len(usable)} exit points can agree at most "
            f"{max(len(usable) - 1, 0)} times; give less patience or more exit points."
        )
