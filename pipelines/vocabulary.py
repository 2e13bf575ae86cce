"""Names the words of a prompt that a model has never seen, where its tokenizer tells."""

import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

__all__ = ["UnknownWordsWarning", "unknown_words", "warn_of_unknown_words", "word_level_tokenizers"]


class UnknownWordsWarning(UserWarning):
    """A prompt has words that mean nothing to the model."""


def word_level_tokenizers(pipe: "DiffusionPipeline") -> list[Any]:
    """A pipeline's tokenizers whose vocabulary is a list of words, as the bundled model's is.

    Args:
        pipe: any pipeline.

    Returns:
        The tokenizers, in the order of the pipeline's components; none for models that split words.
    """
    from tokenizers.models import WordLevel

    backends = {name: getattr(part, "backend_tokenizer", None) for name, part in pipe.components.items()}
    return [pipe.components[name] for name, back in backends.items() if back and isinstance(back.model, WordLevel)]


def unknown_words(pipe: "DiffusionPipeline", prompts: str | Sequence[str]) -> list[str]:
    """The words of prompts that a word-level tokenizer of the pipeline maps to its unknown token.

    Args:
        pipe: any pipeline; one without a word-level tokenizer knows all words.
        prompts: one prompt or several.

    Returns:
        The words as the tokenizer sees them (in lower case, where it lowers them), each once, in order.
    """
    found: dict[str, None] = {}
    for tokenizer in word_level_tokenizers(pipe):
        backend = tokenizer.backend_tokenizer
        for prompt in [prompts] if isinstance(prompts, str) else prompts:
            text = backend.normalizer.normalize_str(prompt) if backend.normalizer else prompt
            words = backend.pre_tokenizer.pre_tokenize_str(text) if backend.pre_tokenizer else [(text, (0, 0))]
            found |= {word: None for word, _ in words if word and backend.token_to_id(word) is None}
    return list(found)


def warn_of_unknown_words(pipe: "DiffusionPipeline", arguments: Mapping[str, Any], stacklevel: int = 2) -> None:
    """Gives one warning that names all words of a call's prompts that the model does not know, if there are any.

    Args:
        pipe: any pipeline; one without a word-level tokenizer knows all words.
        arguments: of the pipeline's call by name, of which the prompts count: ``prompt``, ``negative_prompt`` and
            those of further text encoders, each a string or several.
        stacklevel: as in ``warnings.warn``: 2 names the line that called the function that calls this one.
    """
    texts: list[str] = []
    for name, value in arguments.items():
        if name.removeprefix("negative_").startswith("prompt"):
            given = value if isinstance(value, (list, tuple)) else [value]
            texts += [text for text in given if isinstance(text, str)]  # embeddings come in lists, too
    if texts and (words := unknown_words(pipe, texts)):
        message = f"the model does not know {', '.join(words)}: it takes each for one and the same unknown word"
        warnings.warn(message, UnknownWordsWarning, stacklevel=stacklevel + 1)
