"""The device that a model runs on, and the class of devices whose figures may be compared."""

import platform
from pathlib import Path

import torch

from engine.errors import BadInput
from engine.memory import is_out_of_memory


def find_device(name: str) -> torch.device:
    """`auto`, `cpu` or `cuda` on this machine. Raises `BadInput`."""
    if name not in ("auto", "cpu", "cuda"):
        raise BadInput(f"device is {name!r}; give auto, cpu or cuda.")
    if name == "cuda" and not torch.cuda.is_available():
        raise BadInput("device is 'cuda', but torch sees no GPU here; give cpu, or auto.")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def describe_device_class(device: torch.device, dtype: str, threads: int) -> str:
    """Processor or GPU, instruction set, threads, type, torch version: figures are compared within one class only."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, {dtype}, torch {torch.__version__}"
    capability = torch.backends.cpu.get_cpu_capability()
    return f"cpu {processor()} {capability}, {threads} thread{'s' * (threads > 1)}, {dtype}, torch {torch.__version__}"


def count_gpus() -> int:
    """GPUs that torch sees on this machine."""
    return torch.cuda.device_count()


def gpu_memory() -> list[tuple[str, int, int]]:
    """Of the GPUs that this process computes on: UUID, bytes in use by whoever, bytes in all. Not yet run on one."""
    if not torch.cuda.is_initialized():
        return []
    found = []
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        found.append((str(torch.cuda.get_device_properties(index).uuid), total - free, total))
    return found


def is_lost(error: BaseException) -> bool:
    """Whether an error means that this process can compute nothing on its GPU any more.

    The GPU fell off its bus, or a kernel failed: CUDA then answers every later call with the same error. Not yet seen
    on one: torch's words for it are known from its source.
    """
    return isinstance(error, RuntimeError) and "CUDA error" in str(error) and not is_out_of_memory(error)


def processor() -> str:
    """Its name, as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
