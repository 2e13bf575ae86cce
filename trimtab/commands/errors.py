"""The error that a command answers with one line and exit code 2."""

__all__ = ["UsageError", "first_line"]


class UsageError(ValueError):
    """What the user gave cannot be used; the message says what was wrong and what is taken."""


def first_line(error: BaseException) -> str:
    """The first line that says something in an exception's message, else its type's name."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
