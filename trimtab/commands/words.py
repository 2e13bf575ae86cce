"""Tells of words in prompts that a model does not know."""

import sys
import warnings
from collections.abc import Sequence
from typing import Any

__all__ = ["report_unknown_words"]


def report_unknown_words(pipe: Any, prompts: Sequence[str]) -> None:
    """Prints a line that names the words a pipeline does not know, if there are any.

    The pipelines' own warnings of them are off for the rest of the command.

    Args:
        pipe: any pipeline.
        prompts: those of the command, negative ones too.
    """
    from trimtab.pipelines.vocabulary import UnknownWordsWarning, unknown_words

    warnings.simplefilter("ignore", UnknownWordsWarning)  # trimtab.cli.main undoes it
    if words := unknown_words(pipe, prompts):
        print(f"trimtab: warning: the model does not know {', '.join(words)}", file=sys.stderr)
