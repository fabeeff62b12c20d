"""The pages without a browser: who gets in, what forms must bring, what browsers are told."""

import re
from collections.abc import Iterator

import httpx
import pytest
from invented import HOSTILE
from pages_scene import Scene, opened_scene
from served import SECONDS, serving
from small_world import World

from cluster.pages.jobs import read_yaml_text
from cluster.pages.query import ROWS
from cluster.pages.sessions import _here
from cluster.pages.texts import difference
from db import jobs
from db.reader import VIEWS
from engine.errors import BadInput


@pytest.fixture(scope="module")
def scene(world: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    with opened_scene(tmp_path_factory.mktemp("pages"), world) as opened:
        yield opened


@pytest.fixture
def visitor(scene: Scene) -> Iterator[httpx.Client]:
    """Somebody with a browser's manners, and a cookie once logged in."""
    with httpx.Client(base_url=scene.served.url, timeout=SECONDS) as client:
        yield client


def token_in(page: httpx.Response) -> str:
    found = re.search(r'name="csrf" value="([0-9a-f]+)"', page.text)
    assert found, page.text
    return found[1]


def log_in(visitor: httpx.Client, key: str, **form: str) -> httpx.Response:
    token = token_in(visitor.get("/login"))
    return visitor.post("/login", data={"csrf": token, "key": key} | form)


def test_who_is_not_known_is_asked_to_log_in_and_goes_on_where_he_was(scene: Scene, visitor: httpx.Client) -> None:
    asked = visitor.get(f"/jobs/{scene.done}?save=file")
    assert (asked.status_code, asked.headers["location"]) == (303, f"/login?next=%2Fjobs%2F{scene.done}%3Fsave%3Dfile")
    done = log_in(visitor, scene.key, next=f"/jobs/{scene.done}")
    assert (done.status_code, done.headers["location"]) == (303, f"/jobs/{scene.done}")
    assert {"httponly", "samesite=strict"} <= {part.strip().lower() for part in done.headers["set-cookie"].split(";")}
    assert visitor.get(f"/jobs/{scene.done}").status_code == 200


@pytest.mark.parametrize("elsewhere", ["https://evil.example", "//evil.example", "/\\evil.example", "javascript:1", ""])
def test_nobody_is_sent_elsewhere_after_the_log_in(scene: Scene, visitor: httpx.Client, elsewhere: str) -> None:
    assert _here(elsewhere) == "/"
    assert log_in(visitor, scene.key, next=elsewhere).headers["location"] == "/"


def test_the_log_in_form_must_be_this_servers(scene: Scene, visitor: httpx.Client) -> None:
    """Or another site could log somebody in as somebody else."""
    assert visitor.post("/login", data={"key": scene.key}).status_code == 403
    token = token_in(visitor.get("/login"))
    foreign = {"origin": "https://evil.example"}
    assert visitor.post("/login", data={"csrf": token, "key": scene.key}, headers=foreign).status_code == 403
    with httpx.Client(base_url=scene.served.url) as other:
        assert other.post("/login", data={"csrf": token, "key": scene.key}).status_code == 403
    assert "shortstop_session" not in visitor.cookies


def test_a_form_without_the_token_changes_nothing(scene: Scene, visitor: httpx.Client) -> None:
    log_in(visitor, scene.key)
    forms = {
        "/logout": {"then": ""},
        "/submit": {"spec": "model: x"},
        "/query": {"sql": "SELECT 1"},
        f"/jobs/{scene.waiting}/cancel": {"then": ""},
        f"/jobs/{scene.waiting}/resume": {"then": ""},
        f"/jobs/{scene.dead}/retry": {"then": ""},
        f"/jobs/{scene.done}/policies": {"policy": "full"},
    }
    for path, form in forms.items():
        for token in ({}, {"csrf": "0" * 64}, {"csrf": "é"}):
            answer = visitor.post(path, data=form | token)
            assert answer.status_code == 403, path
            assert "X-CSRF-Token" in answer.text
    assert jobs.job(scene.db, scene.waiting).paused
    assert visitor.get("/").status_code == 200, "still logged in"


def test_a_reader_is_shown_no_buttons_and_may_press_none(scene: Scene, visitor: httpx.Client) -> None:
    log_in(visitor, scene.reader)
    page = visitor.get(f"/jobs/{scene.waiting}")
    assert "/cancel" not in page.text
    token = token_in(page)
    for path in (f"/jobs/{scene.waiting}/cancel", "/submit", "/query"):
        answer = visitor.post(path, data={"csrf": token})
        assert answer.status_code == 403
        assert "needs scope" in answer.text
    assert jobs.job(scene.db, scene.waiting).paused
    assert visitor.get("/query").status_code == 403


def test_the_schema_beside_a_question_has_every_view(scene: Scene, visitor: httpx.Client) -> None:
    log_in(visitor, scene.key)
    page = visitor.get("/query")
    assert page.status_code == 200
    assert set(ROWS) == set(VIEWS)
    assert all(view in page.text and says in page.text for view, says in ROWS.items())


def test_a_logged_out_cookie_is_worth_nothing(scene: Scene, visitor: httpx.Client) -> None:
    log_in(visitor, scene.key)
    cookies = dict(visitor.cookies)
    assert visitor.post("/logout", data={"csrf": token_in(visitor.get("/"))}).headers["location"] == "/login"
    assert httpx.get(scene.served.url + "/", cookies=cookies).status_code == 303


def test_browsers_are_told_to_run_nothing_that_stands_in_a_page(scene: Scene) -> None:
    for page in ("/", f"/jobs/{scene.hostile}", f"/jobs/{scene.hostile}/completions", "/system"):
        answer = scene.served.ask("GET", page, scene.key)
        policy = answer.headers["content-security-policy"]
        assert "script-src 'self';" in policy
        assert "default-src 'none'" in policy
        assert "&lt;script&gt;" in answer.text
        assert "<script>" not in answer.text
        assert "<img" not in answer.text


def test_a_spec_is_tried_out_and_submitted_once(scene: Scene, visitor: httpx.Client) -> None:
    log_in(visitor, scene.key)
    page = visitor.get("/submit")
    once = re.search(r'name="once" value="(\w+)"', page.text)
    assert once
    form = {"csrf": token_in(page), "once": once[1], "spec": str(scene.world.fields(name="once"))}
    assert "48 samples in 12 batches, 3 shards" in visitor.post("/submit", data=form | {"do": "validate"}).text
    first, second = (visitor.post("/submit", data=form | {"do": "submit"}) for _ in range(2))
    assert first.status_code == 303
    assert first.headers["location"] == second.headers["location"]
    refused = visitor.post(
        "/submit", data=form | {"spec": "model: /etc/passwd\nbenchmarks: [humaneval-lines]\npolicies: [full]"}
    )
    assert refused.status_code == 422
    assert "allow" in refused.text


@pytest.mark.parametrize(
    ("written", "complaint"),
    [
        ("a: [", "not YAML at line"),
        ("a: &x [1]\nb: *x", "alias"),
        ("- 1", "mapping"),
        ('a: "\\0"', "NUL"),
        ("x: " + "[" * 900, "."),
        ("a" * 100_001, "100,000 characters"),
    ],
)
def test_what_is_no_spec_is_refused_in_a_sentence(written: str, complaint: str) -> None:
    with pytest.raises(BadInput, match=complaint):
        read_yaml_text(written)


def test_scripts_and_styles_are_kept_by_browsers_until_they_change(scene: Scene, visitor: httpx.Client) -> None:
    page = visitor.get("/login").text
    urls = re.findall(r'(?:src|href)="(/static/[^"]+)"', page)
    assert urls
    for url in urls:
        answer = visitor.get(url)
        assert answer.headers["cache-control"].endswith("immutable")
        assert answer.headers["content-encoding"] == "gzip"
        assert visitor.get(url.partition("?")[0]).headers["cache-control"] == "no-store"
    assert visitor.get("/static/secrets.txt").status_code == 404
    assert visitor.get("/static/..%2f..%2fsettings.py").status_code == 404


def test_a_server_may_have_no_pages(scene: Scene) -> None:
    with serving(scene.db.url, scene.world.folder / "uploads", "--no-pages") as served:
        assert served.ask("GET", "/", scene.key).status_code == 404
        assert served.ask("GET", "/v1/jobs", scene.key).status_code == 200


def test_errors_come_as_pages(scene: Scene) -> None:
    for path, status in ((f"/jobs/{10**6}", 404), ("/?state=odd", 422), ("/?cursor=x", 422), ("/jobs/0", 422)):
        answer = scene.served.ask("GET", path, scene.key)
        assert answer.status_code == status
        assert answer.headers["content-type"].startswith("text/html")


def test_the_filters_of_completions(scene: Scene) -> None:
    page = f"/jobs/{scene.done}/completions"
    everything = scene.served.ask("GET", page, scene.key).text
    differing = scene.served.ask("GET", f"{page}?kind=differ", scene.key).text
    assert everything.count('<li value="') == 48
    assert 0 < differing.count('<li value="') <= 48
    assert "There is none" in scene.served.ask("GET", f"{page}?kind=errors", scene.key).text


def test_a_difference_puts_both_texts_together_again() -> None:
    for text, other in (("return x + 1", "return y"), ("", "a"), ("a", ""), (HOSTILE, HOSTILE), ("x " * 3000, "y")):
        pieces = difference(text, other)
        assert "".join(piece.text for piece in pieces if piece.kind != "missing") == text
        assert "".join(piece.text for piece in pieces if piece.kind != "added") == other
