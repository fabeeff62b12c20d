"""What can go wrong in the engine.

EngineError
├── BadInput          what the caller asked for cannot be done; nothing was changed
│   ├── UnknownName   no such model, policy, head, ...; names the nearest known one
│   └── WeightsMismatch   exits that were trained for other weights
├── NumericalError    the model produced NaN or infinite logits
├── OutOfMemory       the device has too little memory for a batch
└── DeviceLost        this process can compute nothing on its GPU any more
"""


class EngineError(Exception):
    """The engine could not do its work."""


class BadInput(EngineError, ValueError):
    """What the caller asked for cannot be done; the message names the field, the value and the remedy."""


class UnknownName(BadInput):
    """A name that no registry knows."""


class WeightsMismatch(BadInput):
    """Exits were trained for other weights than the model's."""


class NumericalError(EngineError):
    """The model produced NaN or infinite logits."""


class OutOfMemory(EngineError):
    """The device has too little memory for a batch; a smaller one may fit."""


class DeviceLost(EngineError):
    """The GPU is gone, or a kernel failed on it: this process can compute nothing there any more, another one may."""
