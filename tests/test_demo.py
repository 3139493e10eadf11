"""The page of `stts-molmo demo`: by its functions, by Gradio's client, and in a browser that must ask nobody else.

Runs where the extra `demo` is installed (`make test-extras`); what a person sees, where there is a Chromium too.
"""

import asyncio
import re
import runpy
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
from helpers import ROOT, TINY, write_video
from huggingface_hub.repocard import metadata_load
from huggingface_hub.utils import httpx
from PIL import Image
from stts_molmo.tools.answer import answer_question
from stts_molmo.tools.checkpoint import Checkpoint
from stts_molmo.tools.cli import app
from stts_molmo.tools.streaming import Answerer, Limits
from typer.testing import CliRunner

MISSING = "the extra `demo` is not installed; make test-extras runs this"
gradio = pytest.importorskip("gradio", reason=MISSING)
gradio_client = pytest.importorskip("gradio_client", reason=MISSING)
demo = pytest.importorskip("stts_molmo.tools.demo", reason=MISSING)

CLIPS = ROOT / "examples" / "clips"
QUIET, QUESTION = str(CLIPS / "quiet.mp4"), "What color is the still shape?"
LIMITS = Limits(max_bytes=300_000, max_video_seconds=30, max_frames=16, max_characters=500, max_requests=4)
SCREENSHOT = ROOT / "docs" / "demo.png"  # taken anew by the test below where there is none
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return Checkpoint(str(TINY), device="cpu")


@pytest.fixture(scope="module")
def answerer(checkpoint) -> Answerer:
    return Answerer(checkpoint, LIMITS)


@pytest.fixture(scope="module")
def url(answerer, tmp_path_factory):
    """Where the page is."""
    show(answerer)  # the first of all takes longer, and is not what the docs show
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path_factory.mktemp("uploads")))
        page = demo.build(answerer, demo.bundled_clips())
        _, url, _ = demo.launch(page, answerer, "127.0.0.1", None, prevent_thread_lock=True, quiet=True)
        yield url
        page.close()


@pytest.fixture
def long_answers(checkpoint, monkeypatch):
    """The tiny model says one word; now it goes on."""
    monkeypatch.setattr(checkpoint.model.generation_config, "eos_token_id", None)
    monkeypatch.setattr(demo, "MAX_NEW_TOKENS", 2000)


def is_free(answerer: Answerer) -> bool:
    """Whether the model's thread takes the next question soon."""
    free = threading.Event()
    answerer.model_thread.submit(free.set)
    return free.wait(5)


# ----------------------------------------------------------------------------------------------------------------------
# Functions
# ----------------------------------------------------------------------------------------------------------------------


def show(answerer, video=QUIET, question=QUESTION, ratio=0.5, budget=0, frames=8, method="scorer", beside=True) -> list:
    async def collect():
        arguments = (answerer, video, question, ratio, budget, frames, method, beside)
        return [shown async for shown in demo.show(*arguments)]

    return asyncio.run(collect())


@pytest.mark.parametrize("method", ["scorer", "cosine", "tome"])
def test_answers_are_those_of_ask(answerer, method):
    *before, (pruned, whole, table, picture) = show(answerer, method=method)
    expected = answer_question(Checkpoint(str(TINY), "cpu"), QUIET, QUESTION, method=method)
    unpruned = answer_question(Checkpoint(str(TINY), "cpu"), QUIET, QUESTION, method="none")
    assert (pruned, whole) == (expected.answer, unpruned.answer)
    assert [row.split(" | ") for row in table.splitlines() if "vision" in row] == [
        ["| vision tokens before", "72", "72 |"],
        ["| vision tokens after", "36", "72 |"],
    ]
    assert f"| {method} | unpruned |" in table and "| seconds, generate |" in table
    assert picture.height < picture.width > 1000
    assert before[0][0] == ""  # the picture comes first


def test_a_budget_takes_the_place_of_the_ratio(answerer):
    *_, (_, whole, table, _) = show(answerer, budget=20, beside=False, frames=5)
    assert "| vision tokens after | 20 |" in table and whole == ""


def test_dropped_blocks_are_dimmed(answerer):
    pictures = [np.asarray(show(answerer, ratio=ratio, beside=False)[-1][3]).mean() for ratio in (0, 0.5, 0.9)]
    assert pictures[0] > pictures[1] > pictures[2]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"video": None}, "Pick a clip below, or upload one"),
        ({"question": " "}, "is empty; ask something"),
        ({"question": "a" * 501}, "more than 500 characters"),
        ({"ratio": 1.0}, "prune_ratio=1.0 must be"),
        ({"method": "magic"}, "method='magic' is unknown"),
        ({"budget": -1}, "max_vision_tokens=-1"),
    ],
    ids=str,
)
def test_what_cannot_be_asked(answerer, given, message):
    with pytest.raises(ValueError, match=message):
        show(answerer, **given)


def test_limits_hold(answerer, tmp_path):
    write_video(tmp_path / "long.mp4", num_frames=40, fps=1)
    with pytest.raises(ValueError, match="is 39.0 seconds long; at most 30 are taken"):
        show(answerer, video=str(tmp_path / "long.mp4"))
    assert (
        "| vision tokens before | 144 |"
        in show(answerer, video=str(write_video(tmp_path / "a.mp4", num_frames=25, fps=1)), frames=10**6, beside=False)[
            -1
        ][2]
    )


# ----------------------------------------------------------------------------------------------------------------------
# Over HTTP
# ----------------------------------------------------------------------------------------------------------------------


def connect(url: str):
    return gradio_client.Client(url, verbose=False, analytics_enabled=False, httpx_kwargs={"timeout": 60})


def ask(client, clip, question=QUESTION, ratio=0.5, budget=0, frames=8, method="scorer", beside=False):
    return client.submit(clip, question, ratio, budget, frames, method, beside, api_name="/ask").result(timeout=60)


def upload(path: str | Path):
    return gradio_client.handle_file(str(path))


def test_many_ask_at_a_time(url):
    kinds = [(QUIET, QUESTION, 4), (str(CLIPS / "busy.mp4"), "What color is the ball?", 8), (QUIET, QUESTION, 6)]

    def work(number: int) -> bool:
        video, question, frames = kinds[number % 3]
        client = connect(url)
        answer, _, table, picture = ask(client, upload(video), question, frames=frames)
        tokens = 9 * frames - int(9 * frames * 0.5)
        return answer in ("green", "red") and f"| vision tokens after | {tokens} |" in table and Path(picture).is_file()

    with ThreadPoolExecutor(3) as pool:
        assert all(pool.map(work, range(9)))


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/etc/passwd", "was not uploaded"),
        (str(ROOT / "README.md"), "was not uploaded"),
        ("clip.mp4", "was not uploaded"),
        ("file:///etc/passwd", "was not uploaded"),
        ("http://127.0.0.1:9/a.mp4", "links are not followed"),
        ("https://example.org/a.mp4", "links are not followed"),
    ],
)
def test_nobody_names_a_file_of_ours_or_has_one_fetched(url, path, message, tmp_path, monkeypatch):
    """Asked without Gradio's client, which would upload a file of that name."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(QUIET, "clip.mp4")
    clip = {"path": path, "meta": {"_type": "gradio.FileData"}}
    call = f"{url.rstrip('/')}/gradio_api/call/ask"
    asked = httpx.post(call, json={"data": [clip, QUESTION, 0.5, 0, 8, "scorer", False]}, timeout=60)
    if asked.status_code == 200:
        told = httpx.get(f"{call}/{asked.json()['event_id']}", timeout=60).text
        assert "event: error" in told and message in told
    else:
        assert asked.status_code == 400 and message in asked.text


def test_what_is_asked_may_be_so_large(url):
    for body in (b"[" * 10**5, b"{", b'"' + b"a" * 2**20 + b'"'):
        assert httpx.post(f"{url.rstrip('/')}/gradio_api/call/ask", content=body, timeout=60).status_code == 400


def test_an_upload_may_be_so_large(url, tmp_path):
    (tmp_path / "large.mp4").write_bytes(bytes(LIMITS.max_bytes + 1000))
    client = connect(url)
    with pytest.raises(Exception, match="(?i)size|413|large"):
        ask(client, upload(tmp_path / "large.mp4"))


def test_a_wrong_upload_gets_a_message(url, tmp_path):
    (tmp_path / "notes.mp4").write_text("no video")
    client = connect(url)
    with pytest.raises(
        gradio_client.exceptions.AppError, match="'notes.mp4' (cannot be read as a video|is a text file)"
    ):
        ask(client, upload(tmp_path / "notes.mp4"))
    with pytest.raises(gradio_client.exceptions.AppError, match="is empty; ask something"):
        ask(client, upload(QUIET), question="")
    assert ask(client, upload(QUIET))[0] == "green"


# ----------------------------------------------------------------------------------------------------------------------
# In a browser
# ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def browser_page(url):
    reason = "there is no Chromium here; Debian's package `chromium` is one"
    if CHROMIUM is None:
        pytest.skip(reason)
    playwright = pytest.importorskip("playwright.sync_api", reason=MISSING)
    with playwright.sync_playwright() as engine:
        browser = engine.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.set_default_timeout(60_000)
        asked = []
        page.on("request", lambda request: asked.append(request.url))
        page.goto(url)
        page.wait_for_selector("#ask")
        yield page
        browser.close()
        hosts = {urlsplit(address).hostname for address in asked if not address.startswith(("data:", "blob:"))}
        assert hosts == {"127.0.0.1"}


def answers(page) -> tuple[str, str]:
    return page.input_value("#pruned textarea"), page.input_value("#whole textarea")


def wait_until_answered(page) -> None:
    page.wait_for_function("document.querySelector('#figures').innerText.includes('unpruned')")


def test_a_person_picks_a_clip_and_asks(browser_page, tmp_path):
    browser_page.get_by_text("Where is the dot at 2.0 ?").click()
    browser_page.wait_for_function("document.querySelector('#question textarea').value.includes('dot')")
    browser_page.wait_for_function("document.querySelector('#clip video')?.readyState >= 2")
    browser_page.click("#ask")
    wait_until_answered(browser_page)
    assert answers(browser_page) == ("0 2 2.0", "0 2 2.0")
    assert "36" in browser_page.inner_text("#figures table")
    browser_page.wait_for_function("document.querySelector('#picture img')?.naturalWidth > 1000")
    browser_page.wait_for_timeout(1000)  # until progress has faded
    browser_page.screenshot(path=tmp_path / "demo.png", full_page=True)
    picture = Image.open(tmp_path / "demo.png").convert("P", palette=Image.Palette.ADAPTIVE, colors=128)
    if not SCREENSHOT.exists():
        picture.save(SCREENSHOT, optimize=True)
    assert SCREENSHOT.stat().st_size < 300_000 and Image.open(SCREENSHOT).width == picture.width


def test_a_person_uploads_a_clip(browser_page, tmp_path):
    browser_page.set_input_files("#clip input[type=file]", QUIET)
    browser_page.wait_for_selector("#clip video")
    browser_page.fill("#question textarea", QUESTION)
    browser_page.click("#ask")
    wait_until_answered(browser_page)
    assert answers(browser_page) == ("green", "green")


def test_a_person_uploads_something_else(browser_page, tmp_path):
    (tmp_path / "notes.mp4").write_text("no video")
    browser_page.set_input_files("#clip input[type=file]", tmp_path / "notes.mp4")
    browser_page.wait_for_selector("text=Video not playable")  # says the browser; and the server, of what it is asked:
    browser_page.fill("#question textarea", QUESTION)
    browser_page.click("#ask")
    browser_page.wait_for_selector("text='notes.mp4' cannot be read as a video")
    (tmp_path / "large.mp4").write_bytes(bytes(LIMITS.max_bytes + 1))
    browser_page.reload()
    browser_page.wait_for_selector("#ask")
    browser_page.set_input_files("#clip input[type=file]", tmp_path / "large.mp4")
    browser_page.wait_for_selector("text=/exceeds|too large|maximum/i")


def test_a_person_asks_nothing_of_nothing(browser_page):
    browser_page.click("#ask")
    browser_page.wait_for_selector("text=Pick a clip below, or upload one.")


def test_a_person_stops_an_answer(browser_page, answerer, long_answers):
    browser_page.get_by_text(QUESTION).click()
    browser_page.wait_for_selector("#clip video")
    browser_page.click("#ask")
    browser_page.wait_for_selector("#picture img")  # which comes before the first word
    browser_page.click("#stop")
    assert is_free(answerer)
    browser_page.wait_for_timeout(500)
    # Not the text: Gradio's page at times writes "Error" there, for the empty end that its own /cancel sends.
    assert answers(browser_page)[1] == "" and browser_page.locator("#figures table").count() == 0


# ----------------------------------------------------------------------------------------------------------------------
# The command and the Space
# ----------------------------------------------------------------------------------------------------------------------

SPACE = ROOT / "examples" / "space"


def test_the_command_of_the_docs(monkeypatch):
    launched = []
    monkeypatch.setattr(demo, "launch", lambda *arguments: launched.append(arguments))
    page = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    (command,) = re.findall(r"^stts-molmo (demo .*)$", page, re.MULTILINE)
    monkeypatch.chdir(ROOT)
    result = CliRunner().invoke(app, [*command.split(), "--max-mb", "3", "--port", "9000"])
    assert result.exit_code == 0, result.output
    ((page, answerer, *address),) = launched
    assert address == ["127.0.0.1", 9000] and answerer.limits.max_bytes == 3 * 2**20
    assert answerer.limits.max_video_seconds == 600


def test_the_space_starts(monkeypatch):
    launched = []
    monkeypatch.setattr(demo, "launch", lambda *arguments, **options: launched.append((arguments, options)))
    runpy.run_path(str(SPACE / "app.py"), run_name="__main__")
    (((page, answerer), options),) = launched
    assert isinstance(page, gradio.Blocks) and options == {"host": "0.0.0.0", "port": 7860}
    assert {path.name for path in (SPACE / "clips").iterdir()} == set(demo.QUESTIONS)
    assert all(path.resolve().is_relative_to(CLIPS) for path in (SPACE / "clips").iterdir())


def test_the_space_says_what_it_runs_with():
    card = metadata_load(SPACE / "README.md")
    assert (card["sdk"], card["app_file"]) == ("gradio", "app.py")
    (locked,) = [
        line for line in (ROOT / "constraints-demo.txt").read_text().splitlines() if line.startswith("gradio==")
    ]
    assert locked == f"gradio=={card['sdk_version']}"
    assert (SPACE / "requirements.txt").read_text() == "stts-molmo[demo]\n"
