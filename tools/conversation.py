"""Questions that follow each other about one video, typed at a terminal or piped in."""

import contextlib
import sys
from collections.abc import Iterator
from functools import partial

from transformers.generation.streamers import BaseStreamer

from .answer import MAX_NEW_TOKENS, Answer, WatchedVideo, ask_about


class Conversation:
    """
    A chat about a video that was watched. Each question is understood with all that was said before it, and costs the
    LLM its own tokens and those of its answer.
    """

    def __init__(self, watched: WatchedVideo):
        self.watched = watched
        self.messages: list[dict] = []

    def ask(
        self, question: str, *, max_new_tokens: int = MAX_NEW_TOKENS, streamer: BaseStreamer | None = None
    ) -> Answer:
        """
        Answer a question and remember both. Arguments and errors are those of [`WatchedVideo.answer`]; a question that
        cannot be answered is not remembered.
        """
        message = ask_about(question)
        if self.messages:
            message["content"] = message["content"][1:]  # the video has been seen
        messages = [*self.messages, message]
        answer = self.watched.answer(messages, max_new_tokens=max_new_tokens, streamer=streamer)
        said = {"role": "assistant", "content": [{"type": "text", "text": answer.answer}]}
        self.messages = [*messages, said]
        return answer


def typed_questions() -> Iterator[str]:
    """
    What a person types, line by line up to Ctrl-D or Ctrl-C, or what comes in by a pipe; empty lines aside.

    Raises:
        ValueError: nothing comes in by a pipe.
    """
    if sys.stdin.isatty():
        lines = iter(partial(input, "> "), None)
    else:
        lines = sys.stdin
    num_questions = 0
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        for line in lines:
            if line.strip():
                num_questions += 1
                yield line.strip()
    if not num_questions and not sys.stdin.isatty():
        raise ValueError("No question came in; pass one as QUESTION, or several, a line each, to the standard input.")
