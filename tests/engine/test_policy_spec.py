"""What may be asked of a policy, how it is written down, and where names come from."""

import json
import sys
from importlib import import_module
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import BadInput, UnknownName
from engine.registry import Registry, unknown
from engine.spec import PolicySpec, parse_policy, policies, policy

SHARES = st.floats(0, 1)
COMMON = {
    "name": st.none() | st.text(min_size=1, max_size=8),
    "kv": st.sampled_from(["copy", "recompute", "mask"]),
    "max_debt": st.integers(1, 100),
    "on_stop": st.sampled_from(["show", "suppress"]),
    "min_layer": st.none() | st.integers(1, 40),
    "max_exits_in_row": st.none() | st.integers(1, 9),
    "full_first": st.integers(1, 9),
}
OWN = {
    "full": {},
    "fixed": {"exit_layer": st.integers(1, 100)},
    "confidence": {"threshold": SHARES, "decay": st.none() | st.floats(0.1, 9)},
    "margin": {"threshold": SHARES},
    "entropy": {"threshold": st.floats(0, 12)},
    "state-similarity": {"threshold": SHARES},
    "position": {"deepest": st.integers(9, 30), "shallowest": st.integers(1, 9), "over": st.integers(1, 64)},
    "static": {
        "layers": st.lists(st.integers(1, 30), min_size=1, max_size=4),
        "kv": st.just("copy"),
        **{option: st.none() for option in ("min_layer", "max_exits_in_row")},
        "full_first": st.just(1),
    },
    "random": {"exit_layers": st.just([6, 12]), "shares": st.lists(st.floats(0, 0.5), min_size=2, max_size=2)},
    "self-speculative": {"exit_layer": st.integers(1, 30), "threshold": SHARES, "kv": st.just("recompute")},
    "patience": {"patience": st.integers(1, 20)},
    "controller": {"exit": SHARES, "stop": SHARES},
    "sec": {"exit": SHARES, "stop": SHARES, "kv": st.just("copy")},
}


@st.composite
def specs(draw: st.DrawFn) -> PolicySpec:
    kind = draw(st.sampled_from(sorted(OWN)))
    given_options = draw(
        st.fixed_dictionaries(OWN[kind], optional={k: v for k, v in COMMON.items() if k not in OWN[kind]})
    )
    return policy(kind, **given_options)


@given(specs())
def test_a_dump_reads_back(spec: PolicySpec) -> None:
    """Protects what a job keeps of its policies: nothing is lost on the way through JSON or YAML."""
    assert parse_policy(spec.dump()) == spec
    assert parse_policy(json.loads(json.dumps(spec.dump()))) == spec
    assert parse_policy(yaml.safe_load(yaml.safe_dump(spec.dump()))) == spec
    assert type(parse_policy(spec.dump())) is type(spec)


@given(specs())
def test_labels_name_the_policy(spec: PolicySpec) -> None:
    """Protects a report's rows: a label is the given name, or begins with the kind and tells every option."""
    assert spec.label == spec.name or (
        spec.label.split()[0] == spec.kind and len(spec.options()) + 1 == len(spec.label.split())
    )


@pytest.mark.parametrize(
    ("written", "label"),
    [
        ("full", "full"),
        ({"static": {"layers": [12, 13]}}, "static layers=12+13"),
        ({"self-speculative": {"exit_layer": 18}}, "self-speculative exit_layer=18"),
        (
            {"confidence": {"threshold": 0.5, "kv": "recompute", "verify": True}},
            "confidence kv=recompute verify=True threshold=0.5",
        ),
        ({"confidence": {"threshold": 0.95}}, "confidence threshold=0.95"),
        ({"sec": {"exit": 0.9, "stop": 0.7}}, "sec exit=0.9 stop=0.7"),
        ({"sec": {"exit": 1, "stop": 0.999}}, "sec exit=1 stop=0.999"),
        (
            {"fixed": {"exit_layer": 12, "kv": "recompute", "max_debt": 3}},
            "fixed kv=recompute max_debt=3 exit_layer=12",
        ),
        ({"patience": {"patience": 2, "name": "mine"}}, "mine"),
        ({"full": None}, "full"),
    ],
)
def test_labels(written: object, label: str) -> None:
    assert parse_policy(written).label == label


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("confidance", "unknown policy 'confidance'; did you mean 'confidence'"),
        ("self-speculativ", "unknown policy 'self-speculativ'; did you mean 'self-speculative'"),
        (
            "zzz",
            "unknown policy 'zzz'; known: confidence, controller, entropy, fixed, full, margin, original, patience, "
            "position, random, sec, self-speculative, state-similarity, static.",
        ),
        ({"confidence": {"threshold": 0.5, "verify": True}}, "kv is 'copy' and verify is true"),
        (
            {"confidence": {"threshold": 0.5, "kv": "recompute", "verify": True, "preview": 9}},
            "preview is 9 and verify is true",
        ),
        ({"full": {"preview": 9}}, "'preview' is 9"),
        ({"fixed": {"exit_layer": 2, "preview": 0}}, "'preview' is 0"),
        ({"static": {"layers": [2], "preview": 9}}, "'preview' is 9"),
        ({"fixed": {"exit_layer": 2, "ask_above": 0.9}}, "'ask_above' is not known here"),
        ({"sec": {"exit": 0.5, "stop": 0.5, "verify": True}}, "kv is 'copy' and verify is true"),
        ({"self-speculative": {"exit_layer": 3, "verify": False}}, "'verify' is False; input should be True"),
        ({"self-speculative": {"exit_layer": 3, "kv": "mask"}}, "'kv' is 'mask'; input should be 'recompute'"),
        ({"position": {"deepest": 4, "shallowest": 5, "over": 3}}, "shallowest is 5 and deepest 4"),
        ({"random": {"exit_layers": [4], "shares": [0.2, 0.3]}}, "shares is [0.2, 0.3] for exit_layers [4]"),
        ({"random": {"exit_layers": [4, 5], "shares": [0.7, 0.6]}}, "together at most 1"),
        ({"static": {"layers": []}}, "'layers' is []"),
        ({"static": {"layers": [2], "full_first": 3}}, "'full_first' is 3; input should be 1"),
        ({"static": {"layers": [2], "min_layer": 3}}, "'min_layer' is 3"),
        ({"entropy": {"threshold": -1}}, "'threshold' is -1"),
        ({"confidence": {"threshold": 1.2}}, "'threshold' is 1.2; input should be less than or equal to 1"),
        ({"confidence": {"threshold": -0.1}}, "'threshold' is -0.1; input should be greater than or equal to 0"),
        ({"confidence": {"threshold": float("nan")}}, "'threshold' is nan"),
        ({"confidence": {"threshold": "high"}}, "'threshold' is 'high'"),
        ({"sec": {"exit": 0.5, "stop": 1.01}}, "'stop' is 1.01"),
        ({"sec": {"exit": 0.5, "stop": 0.5, "kv": "recompute"}}, "'kv' is 'recompute'; input should be 'copy'"),
        ("confidence", "'threshold' is missing; add it"),
        ({"full": {"threshold": 0.5}}, "'threshold' is not known here; remove it or correct its name"),
        ({"fixed": {"exit_layer": 0}}, "'exit_layer' is 0"),
        ({"fixed": {"exit_layer": 2, "max_debt": 0}}, "'max_debt' is 0"),
        ({"patience": {"patience": 0}}, "'patience' is 0"),
        ({"confidence": 0.5}, "policy 'confidence': input should be a valid dictionary"),
        ({"full": {}, "sec": {}}, "give a name, or one name with its options"),
        ({1: {}}, "give a name, or one name with its options"),
        (None, "give a name, or one name with its options"),
    ],
)
def test_bad_policies(written: object, message: str) -> None:
    """Protects the user from a traceback: one sentence with field, value and remedy."""
    with pytest.raises(BadInput) as error:
        parse_policy(written)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_specs_are_closed_and_frozen() -> None:
    """Protects a job from a policy that changes under it."""
    spec = policy("confidence", threshold=0.5)
    with pytest.raises(ValueError, match="frozen"):
        spec.threshold = 0.6


def test_every_policy_has_its_rule() -> None:
    """Protects the catalogue: each spec's rule can be imported, and each is told about."""
    for kind, spec in policies.items():
        module, name = spec.rule.split(":")
        assert callable(getattr(import_module(module), name))
        assert spec.kind == kind
        assert spec.__doc__


def test_registry_reads_entry_points(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects the way in for third parties: an installed package adds a name, and may not replace a built-in one."""
    (tmp_path / "plugin_of_ours.py").write_text("added = 'from a package'\n")
    facts = tmp_path / "plugin_of_ours-1.0.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: plugin-of-ours\nVersion: 1.0\n")
    (facts / "entry_points.txt").write_text(
        "[shortstop.colours]\nteal = plugin_of_ours:added\nred = plugin_of_ours:added\n"
    )
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    colours: Registry[str] = Registry("colour", "colours", {"red": "built in"})
    assert (colours["teal"], colours["red"]) == ("from a package", "built in")
    assert sorted(colours) == ["red", "teal"]
    assert len(colours) == 2
    assert "teal" in colours
    assert "tael" not in colours
    with pytest.raises(UnknownName, match="unknown colour 'tael'; did you mean 'teal'"):
        colours["tael"]


def test_unknown_names() -> None:
    assert unknown("thing", "abc", []) == "unknown thing 'abc'; known: none."
    assert unknown("thing", "abc", ["zzz", "yyy"]) == "unknown thing 'abc'; known: yyy, zzz."
    assert unknown("thing", "zzy", ["zzz", "abc"]) == "unknown thing 'zzy'; did you mean 'zzz'?"
