"""A decode that decides as the engine does and writes what it is told: the target of a trace."""

import numpy as np
import torch

from engine.decode import Decoding, Ends
from engine.engine import Engine, Prompt
from engine.heads import Choice
from engine.policies import build_rule
from engine.record import Decision, Finish
from engine.replay.traced import Traced
from engine.spec import PolicySpec
from engine.trace import TargetTrace


class Forced(Decoding):
    """Tokens are those of the targets, whatever was chosen."""

    def __init__(self, engine: Engine, prompts: list[Prompt], targets: list[list[int]], spec: PolicySpec) -> None:
        self.targets = targets
        longest = max(map(len, targets))
        start = engine.prefill(prompts, longest).start.copy()
        rule = build_rule(spec, engine.exit_points, engine.n_layers)
        super().__init__(engine.stack, engine.heads, rule, spec, start, Ends(longest, {}))

    def _write(self, rows: list[int], choice: Choice, layer: int, decision: Decision) -> None:
        told = torch.tensor([self.targets[row][self.at[row]] for row in rows])
        super()._write(rows, Choice(told, choice.confidences), layer, decision)

    def _end(self, row: int, step: int, token: int) -> Finish | None:
        return Finish.LENGTH if step + 1 == len(self.targets[row]) else None


@torch.inference_mode()
def forced(engine: Engine, prompts: list[Prompt], targets: list[list[int]], spec: PolicySpec) -> Forced:
    """The decode of a batch, done."""
    decoding = Forced(engine, prompts, targets, spec)
    decoding.run()
    return decoding


def traced(engine: Engine, prompts: list[Prompt], targets: list[list[int]], traces: list[TargetTrace]) -> Traced:
    """The traces of one batch as a piece to replay; each prompt is a source group."""
    columns = {name: np.concatenate([getattr(one, name) for one in traces], axis=-1) for name in traces[0].__dict__}
    rows, controller = np.arange(len(targets)), engine.heads.controller
    return Traced(
        points=tuple(sorted({*engine.exit_points, engine.n_layers})),
        exit_points=engine.exit_points,
        has_controller=controller is not None,
        max_new_tokens=max(map(len, targets)),
        lengths=np.array([len(target) for target in targets]),
        groups=rows,
        batches=np.zeros(len(targets), int),
        prompt_tokens=np.array([len(prompt.token_ids) for prompt in prompts]),
        prompt_keys=np.array([prompt.key for prompt in prompts]),
        **columns,
        after_exit=tuple(controller.after_exit.tolist()) if controller is not None and controller.recalls else None,
    )
