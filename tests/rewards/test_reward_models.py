"""Each loader against a direct computation with transformers, and for OpenCLIP one written out by hand."""

import math

import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch.nn import functional

from tests.rewards import models
from tests.tiny_pipelines import word_tokenizer
from trimtab.rewards import (
    AestheticReward,
    CLIPReward,
    HPSReward,
    ImageReward,
    ImageSimilarityReward,
    WeightedReward,
    clip_model_from_open_clip,
    load_reward,
    save_weights,
)
from trimtab.rewards.clip import _largest_size
from trimtab.rewards.load import weights_folder

PROMPTS = ["a red cat", "two dog on a sky background"]
CLOSE = {"rtol": 0.0, "atol": 1e-5}


@pytest.fixture
def images():
    """Of the size that the models take: nothing is resized, so no other resizing is compared with."""
    return torch.rand(2, 3, models.SIDE, models.SIDE, generator=torch.Generator().manual_seed(0))


def normalized(images, mean=models.MEAN, std=models.STD):
    return (images - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


def has_gradient(reward, images, prompts=PROMPTS):
    x = images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(reward(x, prompts).sum(), x)
    with torch.no_grad():
        direction = gradient / gradient.norm()
        ends = [reward(images + sign * 1e-2 * direction, prompts).sum() for sign in (1, -1)]
    assert gradient.abs().max() > 0
    assert float((ends[0] - ends[1]) / 2e-2) == pytest.approx(float(gradient.norm()), rel=0.02)
    assert all(not parameter.requires_grad and parameter.grad is None for parameter in reward.parameters())


def test_clip_is_the_models_own_logit(images, tmp_path):
    model = models.clip()
    reward = load_reward(models.saved(model, tmp_path))
    tokens = word_tokenizer()(PROMPTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        output = model(
            input_ids=tokens.input_ids, attention_mask=tokens.attention_mask, pixel_values=normalized(images)
        )
    scores = reward(images, PROMPTS)
    assert isinstance(reward, CLIPReward) and scores.dtype == torch.float32
    torch.testing.assert_close(scores, output.logits_per_image.diag(), **CLOSE)
    cosine = load_reward(tmp_path, scaled=False)
    expected = output.logits_per_image.diag() / model.logit_scale.exp()
    torch.testing.assert_close(cosine(images, PROMPTS), expected, **CLOSE)
    has_gradient(cosine, images)


def test_pickscore_has_its_own_name_and_processor(images, tmp_path, monkeypatch):
    models.clip().save_pretrained(tmp_path / "pickscore")
    models.saved(models.dinov2(), tmp_path / "processor")
    monkeypatch.setattr("trimtab.rewards.load.PICKSCORE", str(tmp_path / "pickscore"))
    monkeypatch.setattr("trimtab.rewards.load.CLIP_H", str(tmp_path / "processor"))
    reward = load_reward("pickscore")
    assert reward.name == "pickscore" and reward.scaled
    value = CLIPReward(models.clip(), word_tokenizer(), reward.preprocessing)(images, PROMPTS)
    torch.testing.assert_close(reward(images, PROMPTS), value, **CLOSE)


def test_siglip_is_the_models_own_logit(images, tmp_path):
    model = models.siglip()
    half = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "do_center_crop": False}
    folder = models.saved(model, tmp_path, size={"height": models.SIDE, "width": models.SIDE}, **half)
    tokens = word_tokenizer()(PROMPTS, padding="max_length", max_length=12, return_tensors="pt")
    with torch.no_grad():
        output = model(input_ids=tokens.input_ids, pixel_values=images * 2 - 1)
    reward = load_reward(folder)
    torch.testing.assert_close(reward(images, PROMPTS), output.logits_per_image.diag(), **CLOSE)
    has_gradient(reward, images)
    assert load_reward(folder)(torch.rand(1, 3, 20, 40), "a cat").shape == (1,)  # squeezed, not cropped


def test_siglip2_is_the_models_own_logit(tmp_path):
    model = models.siglip2()
    half = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "patch_size": 4, "max_num_patches": 30}
    folder = models.saved(model, tmp_path, **half)
    images = torch.rand(2, 3, 16, 24, generator=torch.Generator().manual_seed(0))  # 24 patches of 30
    patches = (images * 2 - 1).unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 4, 5, 1).reshape(2, 24, 48)
    pixels, mask = torch.zeros(2, 30, 48), torch.zeros(2, 30, dtype=torch.long)
    pixels[:, :24], mask[:, :24] = patches, 1
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)  # one of SigLIP 2's own kind
    tokens = tokenizer(PROMPTS, padding="max_length", max_length=12, return_tensors="pt")
    with torch.no_grad():
        output = model(
            input_ids=tokens.input_ids,
            pixel_values=pixels,
            pixel_attention_mask=mask,
            spatial_shapes=torch.tensor([[4, 6]] * 2),
        )
    reward = load_reward(folder)
    assert reward.max_num_patches == 30
    torch.testing.assert_close(reward(images, PROMPTS), output.logits_per_image.diag(), **CLOSE)
    has_gradient(reward, images)


@pytest.mark.parametrize(("height", "width"), [(16, 24), (300, 500), (17, 230), (64, 64), (5, 3)])
def test_siglip2_sizes_are_transformers_own(height, width):
    from transformers.models.siglip2.image_processing_pil_siglip2 import get_image_size_for_max_num_patches

    assert _largest_size(height, width, 4, 30) == get_image_size_for_max_num_patches(height, width, 4, 30)


def open_clip_features(state, images, ids):
    """The forward pass of OpenCLIP's CLIP, from its state dict: pre-norm blocks, causal text, GELU."""

    def norm(x, name):
        return functional.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"])

    def blocks(x, tower, count, mask=None):
        for layer in range(count):
            start, heads = f"{tower}.resblocks.{layer}", 16
            y = norm(x, f"{start}.ln_1")
            joined = y @ state[f"{start}.attn.in_proj_weight"].T + state[f"{start}.attn.in_proj_bias"]
            query, key, value = (part.unflatten(2, (heads, -1)).transpose(1, 2) for part in joined.chunk(3, -1))
            weights = query @ key.transpose(2, 3) / math.sqrt(query.shape[-1])
            weights = (weights if mask is None else weights + mask).softmax(-1)
            y = (weights @ value).transpose(1, 2).flatten(2)
            x = x + y @ state[f"{start}.attn.out_proj.weight"].T + state[f"{start}.attn.out_proj.bias"]
            y = norm(x, f"{start}.ln_2") @ state[f"{start}.mlp.c_fc.weight"].T + state[f"{start}.mlp.c_fc.bias"]
            x = x + functional.gelu(y) @ state[f"{start}.mlp.c_proj.weight"].T + state[f"{start}.mlp.c_proj.bias"]
        return x

    x = functional.conv2d(images, state["visual.conv1.weight"], stride=4).flatten(2).transpose(1, 2)
    first = state["visual.class_embedding"].expand(len(x), 1, -1)
    x = norm(torch.cat([first, x], 1) + state["visual.positional_embedding"], "visual.ln_pre")
    picture = norm(blocks(x, "visual.transformer", 3)[:, 0], "visual.ln_post") @ state["visual.proj"]
    length = ids.shape[1]
    y = state["token_embedding.weight"][ids] + state["positional_embedding"][:length]
    causal = torch.full((length, length), -math.inf).triu(1)
    y = norm(blocks(y, "transformer", 2, causal), "ln_final")
    text = y[torch.arange(len(ids)), ids.argmax(-1)] @ state["text_projection"]
    return picture, text


def test_hps_is_open_clips_cosine(images, tmp_path):
    state = models.open_clip_state()
    save_file(state, tmp_path / "hps.safetensors")
    word_tokenizer().save_pretrained(tmp_path)
    reward = load_reward(tmp_path)
    assert isinstance(reward, HPSReward) and reward.name == "hpsv2.1"
    model = clip_model_from_open_clip(state)
    last = len(state["token_embedding.weight"]) - 1  # OpenCLIP ends a text with its largest id
    ids = torch.tensor([[2, 9, 10, last, 0], [2, 11, last, 0, 0]])
    picture, text = open_clip_features(state, normalized(images), ids)
    with torch.no_grad():
        got = model.get_image_features(pixel_values=normalized(images)).pooler_output
        torch.testing.assert_close(got, picture, rtol=1e-4, atol=1e-5)
        got = model.get_text_features(input_ids=ids, attention_mask=(ids != 0).long()).pooler_output
        torch.testing.assert_close(got, text, rtol=1e-4, atol=1e-5)
    assert model.logit_scale.item() == 3.0
    tokens = reward.tokenize(PROMPTS, torch.device("cpu"))["input_ids"]
    features = model.get_text_features(input_ids=tokens).pooler_output
    expected = functional.cosine_similarity(picture, features)
    torch.testing.assert_close(reward(images, PROMPTS), expected, **CLOSE)
    has_gradient(reward, images)


def test_weights_of_something_else_are_refused_by_name():
    state = models.open_clip_state()
    with pytest.raises(ValueError, match="it lacks text_model.final_layer_norm.bias"):
        clip_model_from_open_clip({name: value for name, value in state.items() if name != "ln_final.bias"})
    with pytest.raises(ValueError, match="they also have visual.attnpool.weight"):
        clip_model_from_open_clip({**state, "visual.attnpool.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match="they lack 'visual.conv1.weight'"):
        clip_model_from_open_clip({name: value for name, value in state.items() if "conv1" not in name})


def head(state, x):
    for layer in (0, 2, 4, 6, 7):
        x = x @ state[f"layers.{layer}.weight"].T + state[f"layers.{layer}.bias"]
    return x[:, 0]


def test_image_reward_is_blip_and_its_head(images, tmp_path):
    save_file({k: v.contiguous() for k, v in models.image_reward_state().items()}, tmp_path / "ir.safetensors")
    word_tokenizer(max_length=35).save_pretrained(tmp_path)
    reward = load_reward(tmp_path)
    assert isinstance(reward, ImageReward)
    vision, text = models.blip()
    tokens = word_tokenizer()(PROMPTS, padding="max_length", max_length=35, return_tensors="pt")
    with torch.no_grad():
        seen = vision(pixel_values=normalized(images)).last_hidden_state
        read = text(
            input_ids=tokens.input_ids,
            attention_mask=tokens.attention_mask,
            encoder_hidden_states=seen,
            encoder_attention_mask=torch.ones(2, 17, dtype=torch.long),
        ).last_hidden_state
    expected = (head(models.head_state(24), read[:, 0]) - 0.16717362830052426) / 1.0333394966054072
    torch.testing.assert_close(reward(images, PROMPTS), expected, **CLOSE)
    assert (reward(images, PROMPTS) - reward(images, PROMPTS[::-1])).abs().max() > 1e-3
    has_gradient(reward, images)


def test_aesthetic_is_a_head_on_clip(images, tmp_path):
    model = models.clip()
    folder = models.saved(model, tmp_path / "clip")
    save_file(models.head_state(12), tmp_path / "head.safetensors")
    reward = load_reward(tmp_path / "head.safetensors", clip=str(folder))
    assert isinstance(reward, AestheticReward)
    with torch.no_grad():
        features = model.get_image_features(pixel_values=normalized(images)).pooler_output
    expected = head(models.head_state(12), functional.normalize(features, dim=-1))
    torch.testing.assert_close(reward(images, PROMPTS), expected, **CLOSE)
    torch.testing.assert_close(reward(images, "anything else"), expected, **CLOSE)
    has_gradient(reward, images)
    save_file(models.head_state(10), tmp_path / "wide.safetensors")
    with pytest.raises(ValueError, match="features of 12 numbers; takes a model with 10"):
        load_reward(tmp_path / "wide.safetensors", clip=str(folder))


@pytest.mark.parametrize("kind", [models.clip, models.dinov2])
def test_similarity_is_the_cosine_with_the_reference(kind, images, tmp_path):
    model = kind()
    folder = models.saved(model, tmp_path)
    reward = ImageSimilarityReward.from_pretrained(str(folder), images[0])
    with torch.no_grad():
        if isinstance(model, transformers.CLIPModel):
            features = model.get_image_features(pixel_values=normalized(images)).pooler_output
        else:
            features = model(pixel_values=normalized(images)).pooler_output
    values = reward(images, "")
    torch.testing.assert_close(values, functional.cosine_similarity(features, features[:1]), **CLOSE)
    assert values[0] == pytest.approx(1.0, abs=1e-5) and values[1] < 0.999
    has_gradient(reward, images[1:], "")
    both = ImageSimilarityReward.from_pretrained(str(folder), images)
    one = ImageSimilarityReward.from_pretrained(str(folder), images[1])
    torch.testing.assert_close(both(images, ""), (values + one(images, "")) / 2, **CLOSE)


def test_checkpointing_changes_no_value_and_no_gradient(images, tmp_path):
    """Dropout is off although layers are told that they train, which is what makes them checkpoint."""
    folder = models.saved(models.dinov2(), tmp_path)
    reward = ImageSimilarityReward.from_pretrained(str(folder), images[0])
    layers = [module for module in reward.modules() if module.training]
    assert {type(layer).__name__ for layer in layers} == {"Dinov2Layer"}

    def gradient():
        x = images.clone().requires_grad_()
        value = reward(x, "")
        return value.detach(), torch.autograd.grad(value.sum(), x)[0]

    calls = []
    hooks = [layer.layer_scale1.register_forward_hook(lambda *_: calls.append(1)) for layer in layers]
    reward.train()  # changes nothing
    with_it = gradient()
    assert len(calls) == 2 * len(layers)  # once more in the backward pass
    reward.freeze(gradient_checkpointing=False)
    without = gradient()
    assert len(calls) == 3 * len(layers) and not any(module.training for module in reward.modules())
    torch.testing.assert_close(with_it, without, rtol=0, atol=0)
    for hook in hooks:
        hook.remove()


def test_texts_are_encoded_once_and_cut_once(images, tmp_path):
    reward = load_reward(models.saved(models.clip(), tmp_path))
    calls = []
    reward.model.text_model.register_forward_hook(lambda *_: calls.append(1))
    first = reward(images, PROMPTS)
    torch.testing.assert_close(reward(images, PROMPTS), first, rtol=0, atol=0)
    torch.testing.assert_close(reward(images[:1], PROMPTS[0]), first[:1], **CLOSE)
    assert len(calls) == 1
    long = "a cat and a dog and a fox and a frog and a house and a star"
    with pytest.warns(UserWarning, match="a prompt has 19 tokens and the reward takes 16"):
        reward(images, long)
    reward(images, f"{long} and a key")  # said once


def test_half_precision_gives_float32_values(images, tmp_path):
    folder = models.saved(models.clip(), tmp_path)
    whole, half = load_reward(folder), load_reward(folder, dtype=torch.bfloat16)
    values = half(images, PROMPTS)
    assert values.dtype == torch.float32 and half.model.dtype == torch.bfloat16
    torch.testing.assert_close(values, whole(images, PROMPTS), rtol=0.1, atol=0.5)


def test_bundled_reward_tells_captions_apart():
    from trimtab.assets import asset_path

    reward = load_reward("bundled")
    images = torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    model = transformers.CLIPModel.from_pretrained(asset_path("emoji-clip"), dtype=torch.float32)
    tokens = transformers.AutoTokenizer.from_pretrained(asset_path("emoji-clip"))(["a cat"], return_tensors="pt")
    ids = {"input_ids": tokens.input_ids, "attention_mask": tokens.attention_mask}
    with torch.no_grad():
        expected = model(**ids, pixel_values=images * 2 - 1).logits_per_image[0]
    torch.testing.assert_close(reward(images, "a cat"), expected, **CLOSE)


def test_converted_weights_are_found_by_name(images, tmp_path, monkeypatch):
    monkeypatch.setenv("TRIMTAB_REWARDS", str(tmp_path / "rewards"))
    assert weights_folder() == tmp_path / "rewards"
    with pytest.raises(FileNotFoundError, match=r"published as a pickle \(xswu/HPSv2.*save_weights\('hpsv2.1', torch"):
        load_reward("hpsv2.1")
    word_tokenizer().save_pretrained(tmp_path / "tokenizer")
    path = save_weights("hpsv2.1", models.open_clip_state())
    assert [file.name for file in path.parent.iterdir()] == ["hpsv2.1.safetensors"]
    reward = load_reward("hpsv2.1", tokenizer=str(tmp_path / "tokenizer"))
    assert reward(images, PROMPTS).shape == (2,)
    for name, state, words in (
        ("pickscore", {}, "takes one of hpsv2.1, imagereward, aesthetic"),
        ("imagereward", models.open_clip_state(), "are not those of imagereward"),
    ):
        with pytest.raises(ValueError, match=words):
            save_weights(name, state)


def test_presets_are_the_papers_weights(tmp_path, monkeypatch):
    monkeypatch.setenv("TRIMTAB_REWARDS", str(tmp_path))
    save_weights("hpsv2.1", models.open_clip_state())
    save_weights("imagereward", models.image_reward_state())
    folder = str(models.saved(models.clip(), tmp_path / "clip"))
    for name in ("load.CLIP_H", "load.PICKSCORE", "hps.TOKENIZER", "image_reward.TOKENIZER"):
        monkeypatch.setattr(f"trimtab.rewards.{name}", folder)
    for cls in (HPSReward, ImageReward):
        monkeypatch.setitem(cls.from_weights.__func__.__kwdefaults__, "tokenizer", folder)
    reward = load_reward("reno")
    assert isinstance(reward, WeightedReward)
    assert reward.weights == {"hpsv2.1": 5.0, "imagereward": 1.0, "pickscore": 0.05, "clip": 0.01}
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    value, terms = reward(images, PROMPTS, return_terms=True)
    expected = sum(weight * terms[name] for name, weight in reward.weights.items())
    torch.testing.assert_close(value, expected, **CLOSE)
    for name, part in zip(reward.weights, reward.rewards, strict=True):
        torch.testing.assert_close(terms[name], part(images, PROMPTS), **CLOSE)


def test_what_is_no_reward_is_refused(tmp_path):
    models.dinov2().save_pretrained(tmp_path / "dino")
    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(b"half")
    torch.save({}, tmp_path / "pickle.pt")
    (tmp_path / "empty").mkdir()
    cases = {
        "": "`source` is ''",
        "hps": "takes bundled, right-share, clip, pickscore, hpsv2.1, imagereward, aesthetic, reno, a folder",
        "/no/such/folder": "takes bundled",
        str(tmp_path / "dino"): "a model of type 'dinov2'; takes one of clip, siglip, siglip2",
        str(tmp_path / "x.safetensors"): "whose weights are of none of hpsv2.1, imagereward, aesthetic",
        str(tmp_path / "cut.safetensors"): "no whole safetensors file",
        str(tmp_path / "pickle.pt"): "never a pickle",
        str(tmp_path / "empty"): "takes a folder with a config.json or one .safetensors file",
    }
    for source, words in cases.items():
        with pytest.raises(ValueError, match=words):
            load_reward(source)
