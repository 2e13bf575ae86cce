"""The recipe from end to end with a handful of steps: what it writes loads as a stock pipeline."""

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusion3Pipeline
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoTokenizer, CLIPModel

from trimtab.recipes import train as recipe
from trimtab.recipes.text import build_tokenizer
from trimtab.recipes.train import Preset, main
from trimtab.recipes.train_autoencoder import draw_images
from trimtab.recipes.train_clip import draw_pairs
from trimtab.recipes.train_transformer import FlowMatchingLoss, build_transformer, t5_ids_of
from trimtab.recipes.training_loop import TrainingSettings

CAPTION = "a cat to the left of an owl on a sky background"


def tiny_preset() -> Preset:
    return Preset(
        autoencoder=TrainingSettings(4, 2, 1e-3),
        crop_steps=2,
        num_scenes=40,
        transformer=TrainingSettings(4, 8, 1e-3),
        finish=TrainingSettings(2, 8, 1e-3),
        num_layers=2,
        num_attention_heads=1,
        clip=TrainingSettings(2, 8, 1e-3),
        timestep_shift=1.0,
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(recipe.PRESETS, "cpu", tiny_preset())
        arguments = ["--preset", "cpu", "--folder", str(folder / "training"), "--output", str(folder)]
        main([*arguments, "--max-seconds", "0"])
        assert not (folder / "emoji-scenes").exists()
        main(arguments)
    return folder


def test_a_stock_call_without_a_dtype_is_in_float32(trained):
    pipe = DiffusionPipeline.from_pretrained(trained / "emoji-scenes")
    pipe.set_progress_bar_config(disable=True)
    assert {part.dtype for part in pipe.components.values() if isinstance(part, torch.nn.Module)} == {torch.float32}
    assert pipe(CAPTION, num_inference_steps=1).images[0].size == (128, 128)
    assert CLIPModel.from_pretrained(trained / "emoji-clip").dtype == torch.float32


def test_what_it_writes_loads_as_a_stock_pipeline(trained):
    pipe = DiffusionPipeline.from_pretrained(trained / "emoji-scenes", dtype=torch.float32)
    assert type(pipe) is StableDiffusion3Pipeline
    pipe.set_progress_bar_config(disable=True)
    image = pipe(CAPTION, num_inference_steps=2, guidance_scale=4.0, max_sequence_length=16).images[0]
    assert image.size == (128, 128)
    for path in (trained / "emoji-scenes").rglob("*.safetensors"):
        with safe_open(path, "pt") as file:
            assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.bfloat16}  # noqa: SIM118
    clip = CLIPModel.from_pretrained(trained / "emoji-clip")
    tokens = AutoTokenizer.from_pretrained(trained / "emoji-clip")([CAPTION], return_tensors="pt")
    assert clip.get_text_features(**tokens).pooler_output.shape == (1, 128)


def test_training_goes_on_from_a_model(trained, tmp_path, monkeypatch):
    monkeypatch.setitem(recipe.PRESETS, "cpu", tiny_preset())
    arguments = [
        "--preset",
        "cpu",
        "--folder",
        str(tmp_path / "training"),
        "--start-from",
        str(trained / "emoji-scenes"),
    ]
    main([*arguments, "--output", str(tmp_path), "--steps", "finish", "assemble"])
    before = load_file(trained / "emoji-scenes" / "transformer" / "diffusion_pytorch_model.safetensors")
    after = load_file(tmp_path / "emoji-scenes" / "transformer" / "diffusion_pytorch_model.safetensors")
    assert any(not torch.equal(before[name], after[name]) for name in before)
    name = "pos_embed.proj.weight"
    torch.testing.assert_close(before[name], after[name], rtol=0, atol=0.02)
    with pytest.raises(ValueError, match="autoencoder, transformer"):
        main(arguments)


def test_the_text_features_of_training_are_the_pipelines(trained):
    pipe = DiffusionPipeline.from_pretrained(trained / "emoji-scenes", dtype=torch.float32)
    module = FlowMatchingLoss(build_transformer(num_layers=2, num_attention_heads=1))
    for name in ("text_encoder", "text_encoder_2", "text_encoder_3"):
        getattr(module, name).load_state_dict(getattr(pipe, name).state_dict())
    ids = build_tokenizer()([CAPTION, ""], padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        features, pooled = module.eval().encode(ids, t5_ids_of(ids, 16))
    expected, negative, expected_pooled, negative_pooled = pipe.encode_prompt(
        CAPTION, None, None, max_sequence_length=16, do_classifier_free_guidance=True
    )
    torch.testing.assert_close(features, torch.cat([expected, negative]))
    torch.testing.assert_close(pooled, torch.cat([expected_pooled, negative_pooled]))


def test_a_fresh_transformer_predicts_nothing():
    module = FlowMatchingLoss(build_transformer(num_layers=1, num_attention_heads=1))
    ids = build_tokenizer()([CAPTION], padding="max_length", return_tensors="pt").input_ids
    latents, noise = torch.randn(2, 1, 8, 16, 16).unbind()
    loss = module(latents, noise, torch.tensor([0.3]), ids, t5_ids_of(ids, 16))
    torch.testing.assert_close(loss, (noise - latents).square().mean((1, 2, 3)))


def test_batches_depend_on_the_seed_and_step_alone():
    first, weights = draw_images(0, 7, 3, crop=64)
    again, _ = draw_images(0, 7, 3, crop=64)
    other, _ = draw_images(0, 8, 3, crop=64)
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert first.shape == (3, 3, 64, 64) and first.min() >= -1 and first.max() <= 1
    assert weights.shape == (3, 1, 64, 64) and weights.min() >= 0.5


def test_pairs_hold_scenes_that_differ_in_one_attribute():
    images, captions, same = draw_pairs(np.random.default_rng(0), 16)
    assert images.shape == (16, 3, 128, 128) and len(captions) == 16
    assert torch.equal(same, same.T) and same.diagonal().eq(1).all()
    for i, first in enumerate(captions):
        for j, second in enumerate(captions):
            if first == second:
                assert same[i, j] == 1


def test_unknown_words_and_punctuation():
    tokenizer = build_tokenizer()
    ids = tokenizer("A zebra, on a SKY background!").input_ids
    assert tokenizer.convert_ids_to_tokens(ids) == ["<s>", "a", "<unk>", "on", "a", "sky", "background", "</s>"]
