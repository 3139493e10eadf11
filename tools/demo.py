"""`stts-molmo demo`: a page on which to ask about a clip, and to see what was kept of it and what that saved."""

import contextlib
import json
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import gradio as gr
from PIL import Image
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..configuration_stts_molmo import METHODS
from ..download_stts_molmo import is_link
from .answer import MAX_NEW_TOKENS, WatchedVideo, ask_about
from .streaming import Answerer, Finished
from .video import make_video_inputs
from .visualization import draw_clip, stack

ABOUT = """# STTS on Molmo2

Half of a video's tokens can go before the language model reads them. Ask about a clip, and see which were kept."""
KEPT = "What was kept: dropped blocks are dimmed. Below each frame are the scores, bright is high; grey is not scored."
CLIPS = Path(__file__).parents[1] / "examples" / "clips"
QUESTIONS = {
    "quiet.mp4": "What color is the still shape?",
    "busy.mp4": "What color is the ball?",
    "handheld.mp4": "Where is the dot at 2.0 ?",
}
STAGES = ("decode", "preprocess", "encode", "generate")
KEEP_UPLOADS = 3600  # seconds
MAX_JSON = 2**20  # bytes of what is asked, uploads apart


class NoLinks:
    """
    Middleware that refuses requests in which a link stands for a file: Gradio would fetch it before anyone looks at its
    size. A browser uploads.
    """

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = dict(scope.get("headers", ()))
        if scope.get("method") != "POST" or headers.get(b"content-type", b"").startswith(b"multipart/"):
            return await self.app(scope, receive, send)
        body, more = b"", True
        while more and len(body) <= MAX_JSON:
            message = await receive()
            body += message.get("body", b"")
            more = message.get("more_body", False)
        try:
            refused = len(body) > MAX_JSON or (body and names_link(json.loads(body)))
        except (ValueError, RecursionError):
            refused = True
        if refused:
            answer = PlainTextResponse("Upload the clip; links are not followed.", 400)
            return await answer(scope, receive, send)

        async def replay() -> Message:
            nonlocal body
            if body is None:
                return await receive()
            message, body = {"type": "http.request", "body": body}, None
            return message

        await self.app(scope, replay, send)


def names_link(value) -> bool:
    """Whether a link stands for a file, anywhere in what Gradio is asked."""
    if isinstance(value, dict):
        return is_link(str(value.get("path", ""))) or any(map(names_link, value.values()))
    return isinstance(value, list) and any(map(names_link, value))


def build(answerer: Answerer, examples: Sequence[tuple[str | Path, str]] = ()) -> gr.Blocks:
    """
    The page.

    Args:
        answerer: the model, and the limits of what is asked of it.
        examples: clips to pick, each with a question.
    """
    limits, config = answerer.limits, answerer.checkpoint.config.stts_config
    frames = min(answerer.checkpoint.processor.video_processor.num_frames, limits.max_frames)
    most_tokens = limits.max_frames * tokens_per_frame(answerer)

    async def respond(
        video: str | None, question: str, ratio: float, budget: int, num_frames: int, method: str, beside: bool
    ) -> AsyncIterator[tuple[str, str, str, Image.Image | None]]:
        """What [`show`] gives, the picture once; whatever goes wrong becomes a message on the page."""
        sent = object()
        try:
            async for shown in show(answerer, video, question, ratio, budget, num_frames, method, beside):
                *texts, picture = shown
                yield *texts, gr.skip() if picture is sent else picture
                sent = picture
            yield shown  # the last is what Gradio's client returns
        except TimeoutError as error:
            raise gr.Error("There is no answer in time; ask for fewer frames.", print_exception=False) from error
        except (OSError, TypeError, ValueError) as error:
            raise gr.Error(str(error), print_exception=False) from error
        except RuntimeError as error:
            raise gr.Error(str(error)) from error

    # An upload that lies there longer is deleted.
    with gr.Blocks(analytics_enabled=False, title="STTS on Molmo2", delete_cache=(KEEP_UPLOADS, KEEP_UPLOADS)) as page:
        gr.Markdown(ABOUT)
        with gr.Row():
            with gr.Column():
                video = gr.Video(label="Clip", sources=["upload"], buttons=[], height=240, elem_id="clip")
                question = gr.Textbox(label="Question", max_length=limits.max_characters, elem_id="question")
                with gr.Row():
                    ratio = gr.Slider(0, 0.9, config.prune_ratio or 0.5, step=0.05, label="Share to drop, k")
                    budget = gr.Slider(0, most_tokens, 0, step=1, label="Or the most tokens to keep (0: k counts)")
                with gr.Row():
                    num_frames = gr.Slider(1, limits.max_frames, frames, step=1, label="Most frames")
                    method = gr.Radio(METHODS, value=config.method, label="Method")
                beside = gr.Checkbox(True, label="Ask without pruning too")
                with gr.Row():
                    ask = gr.Button("Ask", variant="primary", elem_id="ask")
                    stop = gr.Button("Stop", elem_id="stop")
            with gr.Column():
                with gr.Row():
                    pruned = gr.Textbox(label="Answer, pruned", elem_id="pruned")
                    whole = gr.Textbox(label="Answer, unpruned", elem_id="whole")
                figures = gr.Markdown(elem_id="figures")
        gr.Markdown(KEPT)
        picture = gr.Image(
            format="png", interactive=False, show_label=False, buttons=["download", "fullscreen"], elem_id="picture"
        )
        if examples:
            gr.Examples([[str(clip), text] for clip, text in examples], [video, question], cache_examples=False)
        asked = [video, question, ratio, budget, num_frames, method, beside]
        shown = [pruned, whole, figures, picture]
        events = [
            on(respond, asked, shown, concurrency_limit=1, concurrency_id="model", api_name=name)
            for on, name in ((ask.click, "ask"), (question.submit, False))
        ]
        stop.click(None, cancels=events)
    return page


async def show(
    answerer: Answerer,
    video: str | None,
    question: str,
    ratio: float,
    budget: int,
    num_frames: int,
    method: str,
    beside: bool,
) -> AsyncIterator[tuple[str, str, str, Image.Image | None]]:
    """
    Answer a question with pruning and, `beside`, without.

    Yields:
        Both answers as they grow, a table of what they cost, and what was kept.

    Raises:
        OSError, ValueError: the clip or an option is not usable.
        RuntimeError: the model failed.
        TimeoutError: it took too long.
    """
    if video is None:
        raise ValueError("Pick a clip below, or upload one.")
    if len(question) > answerer.limits.max_characters:
        raise ValueError(f"The question has more than {answerer.limits.max_characters} characters.")
    messages = [ask_about(question)]
    ways = [answerer.check_pruning(None if budget else ratio, method, budget or None)]
    ways += [answerer.check_pruning(method="none")] if beside else []
    answers, ends, figures, picture = ["", ""], [], "", None
    clip = Path(video)  # below Gradio's folder of uploads, as Gradio has checked
    for number, pruning in enumerate(ways):
        events = answerer.answer(clip, messages, pruning, int(num_frames), max_new_tokens=MAX_NEW_TOKENS)
        async with contextlib.aclosing(events):
            async for event in events:
                if isinstance(event, WatchedVideo):
                    clip = event.clip
                    picture = picture or draw(event)
                elif isinstance(event, Finished):
                    answers[number] = event.answer.answer
                    ends.append(event)
                    figures = table(ends)
                else:
                    answers[number] += event
                yield *answers, figures, picture


def bundled_clips() -> list[tuple[Path, str]]:
    """Clips of the repository, where this runs in one, each with a question that the bundled checkpoint can answer."""
    clips = [(CLIPS / name, question) for name, question in QUESTIONS.items()]
    return [(clip, question) for clip, question in clips if clip.is_file()]


def draw(watched: WatchedVideo) -> Image.Image:
    processor = watched.checkpoint.processor
    inputs = make_video_inputs(processor, watched.clip, "cpu")
    return stack(draw_clip(processor, watched.clip, inputs, {watched.pruning.method: watched.features}))


def table(ends: Sequence[Finished]) -> str:
    """Tokens and seconds of each answer, as Markdown."""
    answers = [end.answer for end in ends]
    names = [answer.method if answer.method != "none" else "unpruned" for answer in answers]
    rows = {
        "vision tokens before": [f"{answer.vision_tokens['before']:,}" for answer in answers],
        "vision tokens after": [f"{answer.vision_tokens['after']:,}" for answer in answers],
        "tokens read": [f"{end.num_read:,}" for end in ends],
    }
    rows |= {
        f"seconds, {stage}": [f"{answer.seconds[stage]:.2f}" for answer in answers]
        for stage in STAGES
        if all(stage in answer.seconds for answer in answers)
    }
    lines = [["", *names], ["---"] * (len(names) + 1), *([name, *cells] for name, cells in rows.items())]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def tokens_per_frame(answerer: Answerer) -> int:
    rows, columns = answerer.checkpoint.processor.video_processor.grid
    return rows * columns


def launch(page: gr.Blocks, answerer: Answerer, host: str, port: int | None, **options) -> tuple:
    """
    Serve the page, to `max_requests` askers who wait at a time.

    Args:
        port: the first free one from 7860 on when not given.
        options: others of Gradio's `launch`.
    """
    page.queue(max_size=answerer.limits.max_requests, default_concurrency_limit=1)
    return page.launch(
        server_name=host,
        server_port=port,
        share=False,
        ssr_mode=False,
        enable_monitoring=False,
        show_error=True,
        max_file_size=answerer.limits.max_bytes,
        app_kwargs={"middleware": [Middleware(NoLinks)]},
        **options,
    )
