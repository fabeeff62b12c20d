"""`transformers` greedy generate in a process of its own, as its users run it: threads as they come, without us."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType


class Peer:
    """Answers with what `generate` took. Ended with the `with` block."""

    def __init__(self, folder: Path, threads: int) -> None:
        ours = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
        environment = {name: value for name, value in os.environ.items() if name not in ours}
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__)), str(folder), str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def __enter__(self) -> "Peer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def generate(self, prompts: list[list[int]], new: int) -> tuple[float, float]:
        """Seconds to the first token behind each of these prompts, which are of one length, and on to the last."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps({"prompts": prompts, "new": new}), file=self._process.stdin, flush=True)
        prefill, decode = self._process.stdout.readline().split()
        return float(prefill), float(decode)


def serve(folder: str, threads: str) -> None:
    """Read one request a line, answer one number a line."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.generation import StoppingCriteriaList

    torch.set_num_threads(int(threads))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for line in sys.stdin:
        request = json.loads(line)
        ids, new = torch.tensor(request["prompts"]), request["new"]
        never, times = torch.zeros(len(ids), dtype=torch.bool), [time.perf_counter()]

        def note(*_: object, times: list[float] = times, never: torch.Tensor = never, **__: object) -> torch.Tensor:
            times.append(time.perf_counter())
            return never

        with torch.inference_mode():
            model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new,
                min_new_tokens=new,
                do_sample=False,
                stopping_criteria=StoppingCriteriaList([note]),
            )
        print(times[1] - times[0], times[-1] - times[1], flush=True)


if __name__ == "__main__":
    serve(*sys.argv[1:])
