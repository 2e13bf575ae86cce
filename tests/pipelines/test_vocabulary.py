"""Words that a model does not know: named once a call, by a warning that points at the caller's line."""

import warnings

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.more_tiny_pipelines import guided_pipeline
from tests.tiny_pipelines import NUMPY_IN_SCHEDULERS, tiny_pipeline
from trimtab.commands.words import report_unknown_words
from trimtab.pipelines import GenerationMap, GuidedStableDiffusion3Pipeline
from trimtab.pipelines.vocabulary import UnknownWordsWarning, unknown_words

pytestmark = pytest.mark.filterwarnings(NUMPY_IN_SCHEDULERS)

CALL = {"num_inference_steps": 1, "max_sequence_length": 16}


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline("sd3")


@pytest.fixture(scope="module")
def guided():
    return GuidedStableDiffusion3Pipeline.from_pipe(guided_pipeline("sd3"))


def only(record) -> str:
    """The text of the one warning, which must be of the right kind and point at this file."""
    (item,) = [item for item in record if item.category is not DeprecationWarning]
    assert issubclass(item.category, UnknownWordsWarning) and item.filename == __file__
    return str(item.message)


def test_each_word_once_and_in_order(pipe):
    assert unknown_words(pipe, ["A Zebra on a zebra", "a quagga, a cat"]) == ["zebra", "quagga"]
    assert unknown_words(pipe, "a cat on a sky background") == []


def test_a_map_names_them_when_it_is_made(pipe):
    prompts = ["a zebra on a sky background", "a quagga"]
    with pytest.warns(UnknownWordsWarning) as record:
        f = GenerationMap(pipe, prompts, negative_prompt="a gnu", **CALL)
    assert {"zebra", "quagga", "gnu"} == set(only(record).split("know ")[1].split(":")[0].split(", "))
    f(f.sample_latents(2, torch.Generator().manual_seed(0)))  # a warning now would be an error


def test_a_guided_pipeline_names_them_at_each_call(guided):
    for _ in range(2):
        with pytest.warns(UnknownWordsWarning) as record:
            guided("a zebra", negative_prompt="a gnu", output_type="latent", **CALL)
        assert "does not know zebra, gnu:" in only(record)
    with pytest.warns(UnknownWordsWarning):  # unguided, too
        guided("a zebra", guidance_scale=1.0, output_type="latent", **CALL)


def test_nothing_is_said_of_known_words_and_of_embeddings(pipe, guided):
    guided("a red cat", negative_prompt="bad quality", output_type="latent", **CALL)
    GenerationMap(pipe, "a red cat", **CALL)
    embeds = pipe.encode_prompt("a red cat", None, None, max_sequence_length=16)
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    GenerationMap(pipe, **dict(zip(names, embeds, strict=True)), **CALL)


def test_a_model_that_splits_words_knows_all():
    backend = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate("<abez")}, merges=[], unk_token="<"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    pipe = tiny_pipeline("sd3")
    for name in ("tokenizer", "tokenizer_2", "tokenizer_3"):
        setattr(pipe, name, PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<"))
    assert unknown_words(pipe, "a zebra, a quagga") == []


def test_a_command_says_it_once_in_a_line_of_its_own(pipe, capsys):
    with warnings.catch_warnings():
        report_unknown_words(pipe, ["a zebra", "a red cat"])
        GenerationMap(pipe, "a zebra", **CALL)  # would raise, were its warning not off
    assert capsys.readouterr().err == "trimtab: warning: the model does not know zebra\n"
