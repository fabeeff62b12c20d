"""`make bench-training`: tokens a second and memory of heads on cached states, and of tuning, a process for each."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from engine.architectures import build_stack
from engine.loading import load_model, load_tokenizer, resolve_model
from engine.training.backbone import Backbone
from engine.training.checkpoint import Log
from engine.training.corpus import Window, read_corpora
from engine.training.heads import HeadTrainer
from engine.training.shortlist import choose_shortlist
from engine.training.spec import TrainSpec, TuningSpec
from engine.training.states import States, cache_states
from engine.training.trainer import Trainer
from engine.training.tuning import Tuner
from tests.bench.measure import Row, peak_bytes, printed, summarise, write

#: what the shipped bundles are trained with, on less code
SPEC = TrainSpec(
    model="smollm2-135m",
    corpus=["networkx"],
    holdout=["rich"],
    exit_points=(12, 18, 21, 24, 27),
    shortlist=8192,
    tokens=20_000,
    holdout_tokens=1_000,
    context=384,
    batch_tokens=1024,
    threads=2,
    tuning=TuningSpec(),
)
#: in the environment, for a shorter look: BENCH_STEPS of tuning, several seconds each
STEPS = {"heads": 40, "tuning": int(os.environ.get("BENCH_STEPS", 5))}
WARM_UP = {"heads": 5, "tuning": 1}


def measure(stage: str) -> dict[str, Any]:
    """Tokens a second of each step behind the warm-up, and the process's highest memory in GiB."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = _trainer(stage, Path(folder))
        for _ in range(STEPS[stage]):
            trainer.take_step()
        speeds = [
            entry["tokens_per_s"]
            for entry in map(json.loads, trainer.log.path.read_text().splitlines())
            if entry["step"] > WARM_UP[stage]
        ]
    return {"speeds": speeds, "gib": peak_bytes() / 2**30}


def _trainer(stage: str, folder: Path) -> Trainer:
    """With all in memory that `engine.training.train` has there, and nothing else."""
    torch.set_num_threads(SPEC.threads or 1)
    facts = resolve_model(SPEC.model)
    corpus, kept = read_corpora(SPEC, load_tokenizer(SPEC.model))
    shortlist = choose_shortlist(corpus.windows, SPEC.shortlist or 0, facts.vocab_size)
    log = Log(folder / "log.jsonl")
    if stage == "tuning":
        backbone = Backbone(load_model(facts), 40, torch.Generator().manual_seed(0), None)
        return Tuner(backbone, SPEC, shortlist, {}, corpus.windows, kept.windows, folder, log)
    with torch.no_grad():
        stack = build_stack(load_model(facts))

    def cached(name: str, windows: list[Window]) -> States:
        return cache_states(stack, windows, SPEC.exit_points, folder / name, lambda done, total: None)

    learned, held = cached("corpus", corpus.windows), cached("holdout", kept.windows)
    return HeadTrainer(stack, SPEC, learned, held, shortlist, {}, folder, log)


def rows() -> Iterator[Row]:
    """What issue 8 asks of training."""
    for stage, least, most in (("heads", 4000.0, 4.0), ("tuning", None, 8.0)):
        told = subprocess.run(
            [sys.executable, "-m", "tests.bench.training", stage], stdout=subprocess.PIPE, text=True, check=True
        )
        found = json.loads(told.stdout.splitlines()[-1])
        yield summarise(f"training, {stage}: tokens a second", found["speeds"], "tok/s", at_least=least)
        gib = found["gib"]
        yield Row(f"training, {stage}: highest memory", gib, gib, gib, "GiB", at_most=most)


def main() -> None:
    """Print the table and write it to build/bench/training.json; with a stage's name measure it, as JSON."""
    if len(sys.argv) > 1:
        print(json.dumps(measure(sys.argv[1])))
    else:
        write("training", printed(rows()))


if __name__ == "__main__":
    main()
