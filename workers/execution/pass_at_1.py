"""`pass@1`: whether a completion passes its sample's test (Chen et al. 2021), greedy decoding, one try."""


def pass_at_1(prompt: str, completion: str, test: str) -> float:
    """1 where prompt, completion and test run to their end in a sandbox. Raises `BadInput` where there is none."""
    from workers.execution.sandbox import Ending, execute

    return float(execute(f"{prompt}{completion}\n{test}") is Ending.PASSED)
