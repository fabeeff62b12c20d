"""`transformers` greedy generate in a process of its own, as its users run it: with OpenMP as it comes, without us."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType


class Peer:
    """Answers with the seconds that `generate` took. Ended with the `with` block."""

    def __init__(self, folder: Path, threads: int) -> None:
        environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
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

    def generate(self, prompts: list[list[int]], new: int) -> float:
        """Seconds for `new` tokens behind each of these prompts, which are of one length."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps({"prompts": prompts, "new": new}), file=self._process.stdin, flush=True)
        return float(self._process.stdout.readline())


def serve(folder: str, threads: str) -> None:
    """Read one request a line, answer one number a line."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(int(threads))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for line in sys.stdin:
        request = json.loads(line)
        ids, new = torch.tensor(request["prompts"]), request["new"]
        begin = time.perf_counter()
        with torch.inference_mode():
            model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new, do_sample=False
            )
        print(time.perf_counter() - begin, flush=True)


if __name__ == "__main__":
    serve(*sys.argv[1:])
