"""docs/policies.md: its example is a policy, and it forgets none."""

import re
from collections.abc import Callable
from pathlib import Path

from documented import DOCUMENTS, installed
from tiny_models import random_prompts

from engine.engine import Engine
from engine.spec import PolicySpec, parse_policy, policies


def test_policy_from_another_package(tmp_path: Path, tiny_engine: Callable[..., Engine]) -> None:
    """Protects the document: a package made of its blocks adds a policy, with the options of every policy."""
    engine = tiny_engine("llama", head="tied")
    with installed("policies.md", policies, tmp_path):
        spec = parse_policy({"even": {"threshold": 0, "full_first": 3}})
        engine.check(spec)
        start = engine.prefill(random_prompts(3, seed=2), 8)
        for completion in engine.decode(start, spec, max_new_tokens=8, ends_with_line=False).completions:
            exits = [place for place, decision in enumerate(completion.decisions) if decision == "exit"]
            assert exits == [place for place in range(3, len(completion.decisions)) if place % 2 == 0]
    assert "even" not in policies


def test_document_names_every_policy_and_every_common_option() -> None:
    """Protects the document against a policy or an option that it forgets."""
    text = (DOCUMENTS / "policies.md").read_text()
    named = set(re.findall(r"`([\w-]+)(?:: \w+)?`", text))
    assert set(policies) <= named
    assert set(PolicySpec.model_fields) - {"name"} <= named
