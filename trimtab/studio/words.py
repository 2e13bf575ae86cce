"""Errors in plain words, and the line that says what a run does."""

import functools
import html
import inspect
import logging
import re
from collections.abc import Callable
from typing import Any

from trimtab.commands.errors import UsageError, first_line

__all__ = ["in_plain_words", "plain_words", "status_html"]

_LOG = logging.getLogger(__name__)
_OPTION = re.compile(r"--([a-z]+(?:-[a-z]+)*)")
_PATH = re.compile(r"(?<![\w<])/(?:[\w.+-]+/)+[\w.+-]*")


def plain_words(error: BaseException) -> str:
    """What a person is told about an error: never a stack trace, never a path of the machine.

    Args:
        error: any. Of a ``ValueError``, whose message says what was given and what is taken, the first line counts,
            with options of the command line and arguments named as words. Others get one sentence of ours.

    Example:
        >>> plain_words(ValueError("`guidance_scale` is -1; takes a number >= 0"))
        'Guidance scale is -1; takes a number >= 0'
        >>> plain_words(RuntimeError("shape mismatch"))
        'Something went wrong inside the model (RuntimeError). Other settings may work.'
    """
    if _is_out_of_memory(error):
        return "The device's memory is too small for this. A smaller picture or fewer steps may fit."
    if isinstance(error, FloatingPointError):
        return "The picture came out as no numbers at all. A lower guidance scale may help."
    if isinstance(error, OSError) and not isinstance(error, UsageError):
        return f"A file could not be read or written ({type(error).__name__})."
    if not isinstance(error, (ValueError, TypeError, NotImplementedError)):
        return f"Something went wrong inside the model ({type(error).__name__}). Other settings may work."
    text = _OPTION.sub(lambda match: match[1].replace("-", " "), first_line(error))
    text = re.sub(r"`([a-z_]+)`", lambda match: match[1].replace("_", " "), text)
    text = _PATH.sub("the file", text)
    return text[:1].upper() + text[1:]


def in_plain_words(function: Callable[..., Any]) -> Callable[..., Any]:
    """Makes an event's function, plain or a generator, raise nothing but ``gr.Error`` in plain words."""
    import gradio as gr

    def shown(error: Exception) -> gr.Error:
        if isinstance(error, gr.Error):
            return error
        if not isinstance(error, ValueError):
            _LOG.warning("%s failed", function.__name__, exc_info=error)
        return gr.Error(html.escape(plain_words(error)), duration=10, print_exception=False)

    if inspect.isgeneratorfunction(function):

        @functools.wraps(function)
        def generator(*args: Any, **kwargs: Any) -> Any:
            try:
                yield from function(*args, **kwargs)
            except Exception as error:
                raise shown(error) from None

        return generator

    @functools.wraps(function)
    def plain(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except Exception as error:
            raise shown(error) from None

    return plain


def status_html(text: str) -> str:
    """A line for ``gr.HTML`` that screen readers read out when it changes."""
    return f'<div role="status" aria-live="polite" class="status">{html.escape(text)}</div>'


def _is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
