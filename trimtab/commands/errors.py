"""The errors that a command answers with one line."""

__all__ = ["FailedJobs", "UsageError", "first_line", "one_line"]


class UsageError(ValueError):
    """What the user gave cannot be used; the message says what was wrong and what is taken."""


class FailedJobs(Exception):
    """Some jobs of many failed, and the others are done."""


def first_line(error: BaseException) -> str:
    """The first line that says something in an exception's message, else its type's name."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def one_line(text: str) -> str:
    """A text with what would end the line, turn it around or colour it written as an escape."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)
