"""lm-evaluation-harness on this engine: real tasks over local data, what it writes and how likely it finds it."""

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval", reason="the extra lm-eval carries the harness")
os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = os.environ["HF_EVALUATE_OFFLINE"] = "1"
sys.path.append(str(Path(__file__).parents[1] / "engine"))

from tiny_models import facts_of, make_bundle, own_cache, random_model, save

from engine.errors import BadInput

#: the harness's own, and those of what it imports
pytestmark = pytest.mark.filterwarnings("ignore")

POLICY = {"confidence": {"threshold": 0.1}}
COUNT = 6
GENERATE = """
task: local_lines
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{prompt}}}}"
doc_to_target: "{{{{reference}}}}"
generation_kwargs: {{until: ["\\n", "stop"], max_gen_toks: 6}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""
CHOOSE = """
task: local_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{prompt}}}}"
doc_to_choice: "{{{{[reference, ' wrong']}}}}"
doc_to_target: 0
target_delimiter: ""
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A tiny model with exits, two tasks and their data."""
    folder = tmp_path_factory.mktemp("harness")
    save(random_model("llama"), folder / "model")
    make_bundle(folder / "exits", facts_of(folder / "model"), head="lens")
    rows = [{"prompt": f"def f{i}(x):\n    return", "reference": f" x + {i}"} for i in range(COUNT)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "tasks").mkdir()
    for name, text in (("lines", GENERATE), ("choice", CHOOSE)):
        (folder / "tasks" / f"{name}.yaml").write_text(text.format(data=folder / "data.jsonl"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HOME", str(folder / "hf"))
        patch.setenv("HF_DATASETS_CACHE", str(folder / "hf" / "datasets"))
        with own_cache(folder / "cache"):
            yield folder


def model(folder: Path, **options: Any) -> Any:
    from workers.harness import ShortstopLM

    arguments = {"pretrained": str(folder / "model"), "exits": str(folder / "exits"), "device": "cpu", "threads": 1}
    return ShortstopLM(**arguments | options)


def evaluated(folder: Path, lm: Any) -> dict[str, Any]:
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    tasks = TaskManager(include_path=str(folder / "tasks"), include_defaults=False)
    found = simple_evaluate(lm, tasks=["local_lines", "local_choice"], task_manager=tasks, bootstrap_iters=0)
    assert found is not None
    return found


@pytest.mark.parametrize("policy", ["full", POLICY], ids=["full", "confidence"])
def test_tasks_run_under_a_policy(folder: Path, policy: Any) -> None:
    """What is written is what the engine writes, up to the task's ends; likelihoods are the engine's."""
    lm = model(folder, policy=policy)
    found = evaluated(folder, lm)
    lines = sorted(found["samples"]["local_lines"], key=lambda sample: sample["doc_id"])
    assert len(lines) == COUNT
    prompts = [sample["doc"]["prompt"] for sample in lines]
    done = lm.engine.complete(prompts, policy, max_new_tokens=6)
    expected = [one.text.split("\n")[0].split("stop")[0] for one in done]
    assert [sample["resps"][0][0] for sample in lines] == expected
    assert found["results"]["local_lines"]["exact_match,none"] == 0
    for sample in found["samples"]["local_choice"]:
        assert len(sample["resps"]) == 2
        for (context, choice), response in zip(sample["arguments"], sample["resps"], strict=True):
            ids, whole = lm.tok_encode(context), lm.tok_encode(context + choice)
            [one] = lm.engine.likelihoods([(ids, whole[len(ids) :])], policy)
            assert float(response[0][0]) == pytest.approx(float(one.log_probabilities.sum()), abs=1e-4), (
                context,
                choice,
            )
            assert str(response[0][1]) == str(bool(one.greedy.all()))


def test_policies_differ(folder: Path) -> None:
    """Otherwise the test above would see no policy at all."""
    lm = model(folder)
    pairs = [(lm.tok_encode("def f(x):"), lm.tok_encode(" return x"))]
    [full], [early] = lm.engine.likelihoods(pairs), lm.engine.likelihoods(pairs, POLICY)
    assert full.log_probabilities.sum() != early.log_probabilities.sum()


def test_whole_texts_in_windows(folder: Path) -> None:
    """Each token is predicted once, whatever the length."""
    from lm_eval.api.instance import Instance

    lm = model(folder)
    text = "def f(x): return x\n" * 40
    ids = lm.tok_encode(text)
    assert len(ids) > lm.engine.max_context
    request = Instance("loglikelihood_rolling", {}, (text,), 0)
    [total] = lm.loglikelihood_rolling([request])
    first = lm.engine.max_context - 1
    windows, at = [([lm.eot_token_id], ids[:first])], first
    while at < len(ids):
        end = min(at + first, len(ids))
        windows.append((ids[end - first - 1 : at], ids[at:end]))
        at = end
    told = lm.engine.likelihoods(windows)
    assert sum(len(one.log_probabilities) for one in told) == len(ids)
    assert total == pytest.approx(sum(float(one.log_probabilities.sum()) for one in told))


def test_what_cannot_be_is_refused(folder: Path) -> None:
    from lm_eval.api.instance import Instance

    with pytest.raises(BadInput, match="model_args: model shortstop has no 'tempo'; give pretrained"):
        model(folder, tempo=3)
    with pytest.raises(BadInput, match="model_args: model shortstop lacks pretrained"):
        model(folder, pretrained="")
    with pytest.raises(BadInput, match="'confidence'"):
        model(folder, policy="confidense")
    asks = Instance("generate_until", {}, ("def", {"do_sample": True, "temperature": 0.7}), 0)
    with pytest.raises(BadInput, match="this engine writes greedily, so set do_sample: false"):
        model(folder).generate_until([asks])


def test_the_command_is_the_harness_own(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`shortstop lm-eval run`, with arguments as the harness takes them; its files hold the samples."""
    from typer.testing import CliRunner

    from cluster.cli import app

    arguments = {"pretrained": str(folder / "model"), "exits": str(folder / "exits"), "policy": POLICY, "threads": 1}
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    command = ["lm-eval", "run", "--model", "shortstop", "--model_args", json.dumps(arguments)]
    command += ["--tasks", "local_lines", "--include_path", str(folder / "tasks"), "--log_samples"]
    done = CliRunner().invoke(app, [*command, "--output_path", str(tmp_path / "out")])
    assert done.exit_code == 0, f"{done.output}\n{done.exception!r}"
    [file] = (tmp_path / "out").rglob("samples_local_lines_*.jsonl")
    assert len(file.read_text().splitlines()) == COUNT
