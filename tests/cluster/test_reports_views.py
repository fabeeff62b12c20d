"""The report on the terminal, as a page, as JSON and as a table, from invented numbers."""

import base64
import hashlib
import io
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from invented import HOSTILE, around, benchmark, completion, example, report, run, token
from rich.console import Console

from cluster.reports.figures import scatter
from cluster.reports.model import Estimate, JobReport, RunSummary
from cluster.reports.notes import benchmark_notes, headline, job_notes
from cluster.reports.page import render_page, write_page
from cluster.reports.terminal import print_report
from engine.errors import BadInput


class Page(HTMLParser):
    """What a browser would make of a page: elements, their attributes and texts."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.text = ""
        self._inside = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))
        self._inside = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            self.scripts[-1] += data
        elif self._inside != "style":
            self.text += data

    def attributes(self, name: str) -> list[str]:
        return [attributes[name] or "" for _, attributes in self.elements if name in attributes]

    def classed(self, name: str) -> list[dict[str, str | None]]:
        return [attributes for _, attributes in self.elements if name in (attributes.get("class") or "").split()]


def printed(found: JobReport, **options: Any) -> str:
    file = io.StringIO()
    print_report(found, Console(file=file, **options))
    return file.getvalue()


def hostile_report() -> JobReport:
    policy = f"full {HOSTILE}"
    runs = [run("A", policy, 1.0, 0.6), run("B", f"fixed {HOSTILE}", 1.1, 0.5)]
    completions = [completion("A", policy, [token(HOSTILE)]), completion("B", policy, [], error=HOSTILE, text=None)]
    shown = example(HOSTILE).model_copy(
        update={
            "prompt": HOSTILE,
            "reference": HOSTILE,
            "why": HOSTILE,
            "language": HOSTILE,
            "completions": completions,
        }
    )
    found = benchmark(name=HOSTILE, version=HOSTILE, left_out=[HOSTILE], runs=runs, examples=[shown])
    nested = {HOSTILE: {HOSTILE: HOSTILE}, "model": HOSTILE}
    return report(
        name=HOSTILE, error=HOSTILE, model=HOSTILE, exits=HOSTILE, provenance=nested, benchmarks=[found, found]
    )


# --- page ---------------------------------------------------------------------------------------------------


def test_hostile_text_stays_text() -> None:
    """A model may write anything; none of it may become an element, an attribute, a script or an expression."""
    page, harmless = Page(render_page(hostile_report())), Page(render_page(report()))
    assert len(page.scripts) == len(harmless.scripts) == 3
    assert page.scripts[1:] == harmless.scripts[1:]
    assert "<" not in page.scripts[0]
    assert not page.attributes("onerror")
    assert {tag for tag, _ in page.elements} - {tag for tag, _ in harmless.elements} <= {"nav", "ul", "p"}
    assert page.text.count(HOSTILE) >= 20


def test_only_the_pages_own_scripts_may_run() -> None:
    page = Page(render_page(report()))
    [allowed] = [a["content"] or "" for tag, a in page.elements if a.get("http-equiv") == "Content-Security-Policy"]
    assert "default-src 'none'" in allowed
    for script in page.scripts[1:]:
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in allowed


def test_the_page_refers_to_nothing_outside_itself() -> None:
    written = render_page(hostile_report())
    page = Page(written)
    references = [
        *page.attributes("src"),
        *page.attributes("href"),
        *page.attributes("srcset"),
        *page.attributes("data"),
    ]
    assert references
    assert all(reference.startswith(("#", "data:,")) for reference in references)
    [style] = re.findall(r"<style>(.*?)</style>", written, re.DOTALL)
    assert "url(" not in style
    assert "@import" not in style


def test_the_page_shows_the_reports_numbers() -> None:
    text = " ".join(Page(render_page(report())).text.split())
    for number in (
        "27.4 / 30", "8.6%", "1.23× 1.21–1.25", "1.33×", "91%", "1.11× 1.09–1.14", "0.550 0.530–0.570",
        "−0.050 −0.070 to −0.030", "0.311", "0.722", "0.345", "164 1,234 21", "0.87× slowdown 0.85–0.89",
    ):  # fmt: skip
        assert number in text, number
    for provenance in ("6b54" * 16, "c0ffee" * 10, "2.13.0", "cpu avx2"):
        assert provenance in text


def test_every_token_tells_its_layer_without_colour() -> None:
    page = Page(render_page(report()))
    tips = page.attributes("data-tip")
    assert "exit after layer 24 of 30 · probability 0.875" in tips
    assert "full depth, layer 30 of 30 · probability 0.875" in tips
    assert "stop at layer 18 of 30 · probability of stopping 0.750" in tips
    assert [a for a in page.classed("early") if "--d: 0.800" in (a["style"] or "")]
    assert "stop at 18" in page.text
    assert "not offered" in page.text


def test_each_completion_is_one_tab_stop() -> None:
    tokens = Page(render_page(report())).classed("t")
    assert len(tokens) == 6
    assert sum(a["tabindex"] == "0" for a in tokens) == 3


def test_tokens_spell_the_completion_with_its_white_space() -> None:
    texts = ["  if", " x:\n", "\n", "\t", "", "y"]
    found = example().model_copy(update={"completions": [completion("A", "full", [token(text) for text in texts])]})
    written = render_page(report(benchmarks=[benchmark(examples=[found])]))
    [code] = re.findall(r'<div class="code tokens"[^>]*>(.*?)</div>', written, re.DOTALL)
    assert re.sub(r"<[^>]*>", "", code) == "".join(texts)


def test_control_characters_are_seen_and_do_nothing() -> None:
    found = example(text="\x00\x1b[31m\u202egnp\x7f")
    assert "return␀␛[31m\ufffdgnp␡" in Page(render_page(report(benchmarks=[benchmark(examples=[found])]))).text


def test_without_tokens_a_completion_is_plain_text_with_its_stop() -> None:
    plain = completion("C", "sec", [], text=" return", finish="stop")
    found = example().model_copy(update={"completions": [plain]})
    page = Page(render_page(report(benchmarks=[benchmark(examples=[found])])))
    assert not page.classed("t")
    assert " return stop" in page.text


def test_a_page_that_cannot_be_written_is_bad_input(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"nowhere.*cannot be written"):
        write_page(report(), tmp_path / "nowhere" / "report.html")


def test_a_job_without_runs_has_a_page() -> None:
    page = Page(render_page(report(benchmarks=[], state="preparing", partial=True, finished_at=None)))
    assert "still being prepared" in page.text


def test_runs_without_any_number_have_a_page() -> None:
    bare = run("A", "full", 1, 0.5).model_copy(update={"summary": RunSummary()})
    page = Page(render_page(report(benchmarks=[benchmark(runs=[bare], examples=[])])))
    assert "no timed policy" in page.text
    assert page.scripts[0] == "{}"


# --- terminal -----------------------------------------------------------------------------------------------


def test_the_terminal_shows_the_reports_numbers() -> None:
    lines = printed(report()).splitlines()
    speed, quality = [
        line.split() for line in lines if line.strip().startswith("sec exit=0.9") and "is the" not in line
    ]
    assert speed[2:] == ["27.4", "/", "30", "8.6%", "1.23×", "1.33×", "91%", "1.11×"]
    assert quality[2:] == ["164", "1,234", "21", "0.550", "−0.050", "0.311", "0.722", "0.345"]
    assert any(line.split() == ["stop=0.7", "1.21–1.25", "1.09–1.14"] for line in lines)
    assert any("−0.070 to −0.030" in line for line in lines)


def test_piped_it_is_plain_text_of_a_hundred_columns() -> None:
    wide = run("D", "patience " + "a-very-long-name-without-any-gap" * 3, 0.5, 0.4)
    written = printed(report(benchmarks=[benchmark(runs=[*benchmark().runs, wide])]), width=60)
    assert max(map(len, written.splitlines())) == 100
    assert "\x1b" not in written
    assert "…" not in written


def test_a_slowdown_is_called_one() -> None:
    written = printed(report())
    assert "slowdown 0.87×" in written
    assert "confidence threshold=0.95 (0.87×) is a slowdown per token." in " ".join(written.split())


def test_names_cannot_move_the_cursor() -> None:
    evil = "full \x1b[2J\x1b]0;title\x07[bold red]x[/]"
    written = printed(report(name=evil, benchmarks=[benchmark(runs=[run("A", evil, 1, 0.5)])]), force_terminal=True)
    assert "\x1b[2J" not in written
    assert "\x1b]0" not in written
    assert "[bold red]x[/]" in written


def test_what_is_missing_is_said() -> None:
    rest = {"errors": 3, "cut_prompts": 5, "isolated": 7, "untimed_batches": 2, "shown": 0.9, "samples": 160}
    runs = [run("A", "full", 1.0, 0.6, samples=160), run("B", "sec", 1.2, 0.6, **rest)]
    skipped = [f"file {i} was empty." for i in range(5)]
    written = " ".join(printed(report(benchmarks=[benchmark(runs=runs, left_out=skipped)])).split())
    for sentence in (
        "160 of 164 samples have ended",
        "Samples that ended with an error: sec (3 of 160).",
        "2 batches were not timed",
        "7 samples were done alone or in a batch halved for memory; another run may complete them differently.",
        "5 prompts were cut from the left",
        "offered only a share of their completions: sec (90.0%).",
        "5 pieces of input were left out of the benchmark. file 0 was empty. file 1 was empty.",
        "file 2 was empty. and 2 more",
        "Accepted is an offline proxy",
    ):
        assert sentence in written


def test_nothing_is_said_of_drafts_where_there_are_none() -> None:
    """Most jobs have no policy that drafts; a policy that could but never did counts as none."""
    for written in (printed(report()), Page(render_page(report())).text):
        assert "raft" not in written
    wrong = run("D", "self-speculative exit_layer=12", 0.9, 0.6, drafted=1234, drafts_kept=0, drafts_kept_share=0.0)
    found = report(benchmarks=[benchmark(runs=[*benchmark().runs, wrong])])
    row = ["self-speculative", "exit_layer=12", "1,234", "0", "0.0%"]
    assert row in [line.split() for line in printed(found).splitlines()]
    assert " ".join(row) in " ".join(Page(render_page(found)).text.split())


# --- sentences ----------------------------------------------------------------------------------------------


def test_the_headline_names_the_fastest_policy_and_its_price() -> None:
    assert headline(benchmark()) == (
        "sec exit=0.9 stop=0.7 is the fastest per token: 1.23× (1.21–1.25), "
        "ROUGE-L −0.050 (−0.070 to −0.030) against full depth."
    )


def test_the_headline_does_not_sell_noise_or_slowdowns() -> None:
    full = run("A", "full", 1.0, 0.6)
    noisy = run("B", "sec", 1.01, 0.6)
    assert headline(benchmark(runs=[full, noisy])).endswith("The interval reaches 1: it may be no faster at all.")
    slow = run("B", "sec", 0.9, 0.6)
    assert headline(benchmark(runs=[full, slow])).startswith("No policy is faster than full depth")


@pytest.mark.parametrize(("speedup", "says"), [(0.994, True), (0.996, False), (1.0, False), (1.2, False)])
def test_a_slowdown_is_what_reads_below_one(speedup: float, says: bool) -> None:
    found = benchmark(runs=[run("A", "full", 1.0, 0.6), run("B", "sec", speedup, 0.6)])
    assert any("slowdown" in note.text for note in benchmark_notes(found)) is says


def test_an_unfinished_job_says_so() -> None:
    [note] = job_notes(report(partial=True, state="running", batches_done=4))
    assert note.text.startswith("This report is partial: the job is running, 4 of 21 batches are done.")


# --- JSON and table -----------------------------------------------------------------------------------------


def test_json_reads_back_as_the_same_report() -> None:
    found = report()
    assert JobReport.model_validate_json(found.model_dump_json()) == found


def test_json_has_no_nan() -> None:
    odd = run("A", "full", 1.0, 0.6, speedup_ideal=float("nan"), speedup_token=Estimate(value=float("inf")))
    written = report(benchmarks=[benchmark(runs=[odd])]).model_dump_json()
    assert "NaN" not in written
    assert "Infinity" not in written
    assert JobReport.model_validate_json(written).runs[0].summary.speedup_ideal is None


def test_the_table_has_a_row_a_run() -> None:
    table = report().table()
    assert table["policy"].tolist() == ["full", "confidence threshold=0.95", "sec exit=0.9 stop=0.7"]
    assert table["benchmark"].unique().tolist() == ["humaneval-lines"]
    last = table.iloc[-1]
    assert (last["speedup_token"], last["stops"], last["rouge_l"]) == (1.23, 21, 0.55)
    assert last["change_rouge_l_low"] == pytest.approx(around(-0.05).low)


# --- speed against quality ----------------------------------------------------------------------------------


def test_the_pareto_front_has_those_that_none_beats_in_both() -> None:
    """Full depth stands at 1×; what is slower and no better, or as fast and worse, is not on it."""
    runs = [
        run("A", "full", 1.0, 0.6),
        run("B", "slower", 0.9, 0.6),
        run("C", "between", 1.2, 0.55),
        run("D", "beaten", 1.1, 0.5),
        run("E", "fast", 1.4, 0.3),
        run("F", "untimed", 9.0, 0.9, speedup_token=Estimate()),
    ]
    figure = scatter(benchmark(runs=runs), "token")
    assert figure is not None
    [front] = [trace for trace in figure["data"] if trace["name"] == "Pareto front"]
    assert list(zip(front["x"], front["y"], strict=True)) == [(1.0, 0.6), (1.2, 0.55), (1.4, 0.3)]
