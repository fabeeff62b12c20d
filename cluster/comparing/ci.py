"""A verdict as CI systems read it: JUnit XML, and a comment in Markdown."""

from pathlib import Path
from xml.etree import ElementTree

from cluster.gates import Outcome, RuleVerdict, Verdict
from engine.errors import BadInput

_MARKS = {Outcome.PASS: "✅", Outcome.FAIL: "❌", Outcome.INCONCLUSIVE: "❔"}


def junit(verdict: Verdict) -> str:
    """A test case a rule: a failure is a failure, what is inconclusive is skipped."""
    failures = sum(one.outcome is Outcome.FAIL for one in verdict.rules)
    skipped = sum(one.outcome is Outcome.INCONCLUSIVE for one in verdict.rules)
    counts = {"tests": str(len(verdict.rules)), "failures": str(failures), "skipped": str(skipped), "errors": "0"}
    root = ElementTree.Element("testsuites", counts)
    suite = ElementTree.SubElement(root, "testsuite", {"name": "shortstop gate", **counts})
    for one in verdict.rules:
        names = {"classname": _xml(f"{one.benchmark}.{one.policy}"), "name": _xml(_name(one))}
        case = ElementTree.SubElement(suite, "testcase", names)
        if one.outcome is Outcome.FAIL:
            ElementTree.SubElement(case, "failure", {"message": _xml(one.sentence)}).text = _xml(one.sentence)
        elif one.outcome is Outcome.INCONCLUSIVE:
            ElementTree.SubElement(case, "skipped", {"message": _xml(one.sentence)})
        else:
            ElementTree.SubElement(case, "system-out").text = _xml(one.sentence)
    if verdict.confirmation:
        ElementTree.SubElement(suite, "system-out").text = _xml(verdict.confirmation)
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def markdown(verdict: Verdict) -> str:
    """A comment for a merge request. What came from outside stands in code, where it forms nothing."""
    jobs = f"job {verdict.job_b}" + ("" if verdict.job_a == verdict.job_b else f" against job {verdict.job_a}")
    lines = [
        f"### {_MARKS[verdict.outcome]} Shortstop gate: {verdict.outcome}, {jobs}",
        "",
        _escaped(verdict.sentence),
        "",
    ]
    if verdict.confirmation:
        lines += [_escaped(verdict.confirmation), ""]
    lines += ["| | metric | benchmark | policy | what was found |", "|---|---|---|---|---|"]
    for one in verdict.rules:
        cells = (_code(_name(one)), _code(one.benchmark), _code(one.policy), _escaped(one.sentence))
        lines.append(f"| {_MARKS[one.outcome]} {one.outcome} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def write(text: str, path: Path, option: str) -> None:
    """Raises `BadInput` where the file cannot be written."""
    try:
        path.write_text(text, encoding="utf-8", newline="\n")
    except OSError as error:
        raise BadInput(f"{option}: {str(path)!r} cannot be written ({error.strerror}); name another file.") from None


def _name(one: RuleVerdict) -> str:
    return one.metric if one.device_class is None else f"{one.metric} [{one.device_class}]"


def _xml(text: str) -> str:
    """Without the characters that XML 1.0 cannot hold, escaped or not."""
    return "".join(char if char in "\t\n\r" or (char >= " " and char not in "\ufffe\uffff") else "�" for char in text)


def _code(text: str) -> str:
    return "`" + " ".join(text.replace("`", "'").replace("|", "¦").split()) + "`"


def _escaped(text: str) -> str:
    """One line of plain text in a table's cell: nothing in it links, mentions or marks up."""
    line = " ".join(text.split())
    for char in "\\`*_[]<>|#!~":
        line = line.replace(char, f"\\{char}")
    return line.replace("@", "@\u200b")
