"""Chats to prompts by the template of a checkpoint: a program, which may come from anybody."""

import contextlib
import sys
import time
from collections.abc import Iterator

import jinja2
from transformers import ProcessorMixin

try:
    import resource
except ImportError:  # on Windows: limits of time and length alone
    resource = None

MAX_SECONDS = 10  # of work, whatever else the machine does
MAX_CHARACTERS = 10**6  # that a template adds to a chat
MAX_MEMORY = 2**30  # bytes, checked between two steps of a template
FAILURES = (jinja2.TemplateError, ArithmeticError, LookupError, MemoryError, RecursionError, TypeError, ValueError)


def render_prompt(processor: ProcessorMixin, messages: list[dict]) -> str:
    """
    The prompt that asks for an answer to `messages`, as the chat template of `processor` writes it.

    Transformers renders in a sandbox, from which a template reaches nothing, but in which it may go on for ever.

    Raises:
        ValueError: there is no template, it fails, or it takes too much time or memory.
    """
    try:
        refuse_powers(processor.chat_template)
        with limits():
            prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
        if len(prompt) > MAX_CHARACTERS + sum(map(len, texts_of(messages))):
            raise ValueError(f"it writes {len(prompt):,} characters")
    except FAILURES as error:
        reason = str(error) or type(error).__name__
        raise ValueError(f"The checkpoint's chat template cannot be used: {reason}; mend or replace it.") from error
    return prompt


def texts_of(messages: list | dict | str) -> Iterator[str]:
    """All texts in a chat, in order, those that name files too."""
    if isinstance(messages, str):
        yield messages
    elif isinstance(messages, (list, tuple, dict)):
        for part in messages.values() if isinstance(messages, dict) else messages:
            yield from texts_of(part)


def refuse_powers(template: str | dict | None) -> None:
    """No chat needs `**`, and `9 ** 9 ** 9` is a single step that no limit ends."""
    if isinstance(template, str) and any(
        (kind, text) == ("operator", "**") for _, kind, text in jinja2.Environment().lex(template)
    ):
        raise ValueError("it computes powers (`**`)")


@contextlib.contextmanager
def limits() -> Iterator[None]:
    """End what runs inside, in this thread, with a `ValueError` once it takes too much time or memory."""
    deadline, memory = time.thread_time() + MAX_SECONDS, peak_memory() + MAX_MEMORY

    def check(frame, event, argument):
        if time.thread_time() > deadline:
            raise ValueError(f"it is still running after {MAX_SECONDS} seconds of work")
        if peak_memory() > memory:
            raise ValueError(f"it takes more than {MAX_MEMORY >> 20} MiB of memory")
        return check if frame.f_code.co_filename == "<template>" else None  # every line of a template, every call else

    tracer = sys.gettrace()
    sys.settrace(check)
    try:
        yield
    finally:
        sys.settrace(tracer)


def peak_memory() -> int:
    """The most bytes that this process has had in memory."""
    if resource is None:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
