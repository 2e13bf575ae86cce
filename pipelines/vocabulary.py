"""Names the words of a prompt that a model has never seen, where its tokenizer tells."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

__all__ = ["unknown_words", "word_level_tokenizers"]


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
