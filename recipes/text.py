"""The words-only tokenizer and the tiny text towers of the bundled models."""

from __future__ import annotations

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, PreTrainedTokenizerFast, T5Config, T5EncoderModel

from .emoji_scenes.vocabulary import caption_words

SPECIAL_TOKENS = ("<pad>", "<unk>", "<s>", "</s>")
MAX_LENGTH = 16
"""Tokens of the longest caption with its start and end."""


def build_tokenizer(*, start_token: bool = True) -> PreTrainedTokenizerFast:
    """A lower-casing tokenizer with one token a word of the captions; punctuation is dropped, the rest is ``<unk>``.

    Args:
        start_token: whether a text starts with ``<s>``, as CLIP's do; T5's only end with ``</s>``.
    """
    vocabulary = {word: index for index, word in enumerate((*SPECIAL_TOKENS, *caption_words()))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\w+"), behavior="removed", invert=True)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>" if start_token else "$A </s>",
        special_tokens=[(token, vocabulary[token]) for token in ("<s>", "</s>")],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=MAX_LENGTH if start_token else 256,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
    )


def clip_text_config(width: int = 128) -> CLIPTextConfig:
    """Two layers of ``width`` channels over the captions' vocabulary, pooled where the text ends."""
    return CLIPTextConfig(
        vocab_size=len(SPECIAL_TOKENS) + len(caption_words()),
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=width // 32,
        max_position_embeddings=MAX_LENGTH,
        hidden_act="gelu",
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=3,
    )


def build_clip_text_encoder(width: int = 128) -> CLIPTextModelWithProjection:
    """An untrained text tower with embeddings large enough to keep words apart from the first step on."""
    encoder = CLIPTextModelWithProjection(clip_text_config(width))
    encoder.text_model.embeddings.token_embedding.weight.data.normal_(std=0.5)
    return encoder


def build_t5_encoder(width: int = 256) -> T5EncoderModel:
    """An untrained T5 encoder of one layer."""
    config = T5Config(
        vocab_size=len(SPECIAL_TOKENS) + len(caption_words()),
        d_model=width,
        d_kv=32,
        d_ff=2 * width,
        num_layers=1,
        num_heads=4,
        dropout_rate=0.0,
        pad_token_id=0,
        eos_token_id=3,
        decoder_start_token_id=0,
    )
    return T5EncoderModel(config)
