"""Training of exits."""

from engine.training.spec import TrainSpec

__all__ = ["TrainSpec"]
