"""Tiny random pipelines of the real diffusers classes, one builder a family, made without a network.

Every builder returns a complete pipeline: denoiser, autoencoder, scheduler, text encoders and word-level
tokenizers, a few thousand parameters each, the same at every call. Default pictures are 16x16 or 32x32.

    from tests.tiny_pipelines import TINY, tiny_pipeline

    pipe = tiny_pipeline("sd3")
    image = pipe("a cat", num_inference_steps=2, output_type="pt").images
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
import transformers
from diffusers import AutoencoderKL, DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<pad>", "<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "\n"]
WORDS = """
a an the two three four cat dog fox owl panda frog apple pizza rocket house star key red green blue yellow
black white pink sky mint sand circle square heart on of to left right above below background photo painting
bad quality describe image system user assistant by detailing color shape size texture quantity text spatial
relationships objects and , : .
"""
VOCABULARY = {word: index for index, word in enumerate(dict.fromkeys([*SPECIAL, *WORDS.split()]))}
VOCABULARY_SIZE = len(VOCABULARY)

# diffusers 0.42 schedulers convert tensors to arrays in a way that numpy 2 deprecates.
NUMPY_IN_SCHEDULERS = "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"


def word_tokenizer(*, max_length: int = 16, bos: bool = True, eos: bool = True) -> PreTrainedTokenizerFast:
    """A lower-casing word-level tokenizer over `VOCABULARY`; unknown words share one id."""
    tokenizer = Tokenizer(models.WordLevel(vocab=VOCABULARY, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    specials = "|".join(token.replace("|", r"\|") for token in SPECIAL)
    pattern = Regex(rf"{specials}|\w+|[^\w\s]")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(pattern, behavior="removed", invert=True)
    template = f"{'<s> ' if bos else ''}$A{' </s>' if eos else ''}"
    tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[(t, VOCABULARY[t]) for t in ("<s>", "</s>")]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=max_length,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
    )


def _clip(kind: type, width: int = 16) -> torch.nn.Module:
    config = transformers.CLIPTextConfig(
        hidden_size=width,
        intermediate_size=24,
        num_attention_heads=2,
        num_hidden_layers=2,
        projection_dim=width,
        max_position_embeddings=16,
        vocab_size=VOCABULARY_SIZE,
        pad_token_id=0,
        bos_token_id=VOCABULARY["<s>"],
        eos_token_id=VOCABULARY["</s>"],
    )
    return kind(config)


def _t5(width: int) -> torch.nn.Module:
    return transformers.T5EncoderModel(
        transformers.T5Config(
            d_model=width,
            d_ff=24,
            d_kv=8,
            num_heads=2,
            num_layers=1,
            vocab_size=VOCABULARY_SIZE,
            pad_token_id=0,
        )
    )


def _vae(latent_channels: int = 4, **config: Any) -> AutoencoderKL:
    """Two levels, so one latent pixel stands for 2x2 image pixels."""
    return AutoencoderKL(
        block_out_channels=(4, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=latent_channels,
        norm_num_groups=2,
        sample_size=16,
        **config,
    )


def _flow_vae(latent_channels: int = 4) -> AutoencoderKL:
    return _vae(
        latent_channels,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.0609,
        scaling_factor=1.5035,
    )


def stable_diffusion() -> DiffusionPipeline:
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=8,
        norm_num_groups=2,
    )
    scheduler = diffusers.DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    return diffusers.StableDiffusionPipeline(
        vae=_vae(),
        text_encoder=_clip(transformers.CLIPTextModel),
        tokenizer=word_tokenizer(),
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _xl_unet(cross_attention_dim: int) -> torch.nn.Module:
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 16,
        transformer_layers_per_block=(1, 1),
        cross_attention_dim=cross_attention_dim,
        norm_num_groups=2,
    )


def stable_diffusion_xl() -> DiffusionPipeline:
    scheduler = diffusers.EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        timestep_spacing="leading",
        steps_offset=1,
    )
    return diffusers.StableDiffusionXLPipeline(
        vae=_vae(scaling_factor=0.13025),
        text_encoder=_clip(transformers.CLIPTextModel),
        text_encoder_2=_clip(transformers.CLIPTextModelWithProjection),
        tokenizer=word_tokenizer(),
        tokenizer_2=word_tokenizer(),
        unet=_xl_unet(32),
        scheduler=scheduler,
        add_watermarker=False,
    )


def stable_diffusion_3() -> DiffusionPipeline:
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_projection_dim=16,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        pos_embed_max_size=16,
    )
    return diffusers.StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=_flow_vae(),
        text_encoder=_clip(transformers.CLIPTextModelWithProjection),
        tokenizer=word_tokenizer(),
        text_encoder_2=_clip(transformers.CLIPTextModelWithProjection),
        tokenizer_2=word_tokenizer(),
        text_encoder_3=_t5(32),
        tokenizer_3=word_tokenizer(bos=False),
    )


def flux(*, guidance_embeds: bool = True) -> DiffusionPipeline:
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=16,
        guidance_embeds=guidance_embeds,
        axes_dims_rope=(4, 4, 8),
    )
    pipe = diffusers.FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=_flow_vae(),
        text_encoder=_clip(transformers.CLIPTextModel),
        tokenizer=word_tokenizer(),
        text_encoder_2=_t5(32),
        tokenizer_2=word_tokenizer(bos=False),
        transformer=transformer,
    )
    pipe.default_sample_size = 8
    return pipe


def pixart_sigma() -> DiffusionPipeline:
    transformer = diffusers.PixArtTransformer2DModel(
        sample_size=8,
        num_layers=2,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_channels=32,
        in_channels=4,
        out_channels=8,  # noise and variance: the pipeline drops the second half
        cross_attention_dim=16,
        norm_elementwise_affine=False,
        norm_type="ada_norm_single",
        num_embeds_ada_norm=1000,
    )
    return diffusers.PixArtSigmaPipeline(
        tokenizer=word_tokenizer(bos=False),
        text_encoder=_t5(32),
        vae=_vae(scaling_factor=0.13025),
        transformer=transformer,
        scheduler=diffusers.DPMSolverMultistepScheduler(),
    )


def sana() -> DiffusionPipeline:
    transformer = diffusers.SanaTransformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=8,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=16,
    )
    vae = diffusers.AutoencoderDC(
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8, 8),
        decoder_block_out_channels=(8, 8, 8),
        encoder_qkv_multiscales=((), (), (5,)),
        decoder_qkv_multiscales=((), (), (5,)),
        encoder_layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1),
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
        scaling_factor=0.41407,
    )
    text_encoder = transformers.Gemma2Model(
        transformers.Gemma2Config(
            vocab_size=VOCABULARY_SIZE,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            max_position_embeddings=512,
            attn_implementation="eager",
            pad_token_id=0,
            bos_token_id=VOCABULARY["<s>"],
            eos_token_id=VOCABULARY["</s>"],
        )
    )
    return diffusers.SanaPipeline(
        tokenizer=word_tokenizer(eos=False),
        text_encoder=text_encoder,
        vae=vae,
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def qwen_image() -> DiffusionPipeline:
    transformer = diffusers.QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        guidance_embeds=False,
        axes_dims_rope=(4, 4, 8),
    )
    vae = diffusers.AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 2],
        num_res_blocks=1,
        attn_scales=[],
        temperal_downsample=[False],
        latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[1.5, 0.7, 1.0, 2.0],
    )
    image_token, start_token, end_token = VOCABULARY_SIZE, VOCABULARY_SIZE + 1, VOCABULARY_SIZE + 2
    config = transformers.Qwen2_5_VLConfig(
        text_config={
            "vocab_size": VOCABULARY_SIZE + 3,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "rope_parameters": {"mrope_section": [1, 1, 2], "rope_type": "default", "rope_theta": 1e4},
            "pad_token_id": 0,
            "bos_token_id": VOCABULARY["<s>"],
            "eos_token_id": VOCABULARY["</s>"],
        },
        vision_config={
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 2,
            "out_hidden_size": 16,
        },
        image_token_id=image_token,
        vision_start_token_id=start_token,
        vision_end_token_id=end_token,
    )
    pipe = diffusers.QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=vae,
        text_encoder=transformers.Qwen2_5_VLForConditionalGeneration(config),
        tokenizer=word_tokenizer(max_length=256, bos=False, eos=False),
        transformer=transformer,
    )
    pipe.default_sample_size = 8
    return pipe


@dataclass(frozen=True)
class TinyCase:
    """A builder and the arguments with which the family's stock call is right for its tiny model.

    Attributes:
        build: makes the pipeline.
        latent_shape: of one sample, as the stock call takes it.
        size: (height, width) of the default picture.
        call: keyword arguments for the stock call besides the prompt (guided wherever the family can be).
    """

    build: Callable[[], DiffusionPipeline]
    latent_shape: tuple[int, ...]
    size: tuple[int, int]
    call: dict[str, Any] = field(default_factory=dict)


TINY: dict[str, TinyCase] = {
    "sd15": TinyCase(stable_diffusion, (4, 8, 8), (16, 16), {"guidance_scale": 5.0}),
    "sdxl": TinyCase(stable_diffusion_xl, (4, 8, 8), (16, 16), {"guidance_scale": 5.0}),
    "sd3": TinyCase(stable_diffusion_3, (4, 8, 8), (16, 16), {"guidance_scale": 5.0, "max_sequence_length": 16}),
    "flux": TinyCase(flux, (16, 16), (16, 16), {"guidance_scale": 3.5, "max_sequence_length": 16}),
    "pixart-sigma": TinyCase(
        pixart_sigma,
        (4, 8, 8),
        (16, 16),
        {
            "guidance_scale": 4.5,
            "max_sequence_length": 16,
            "use_resolution_binning": False,
            "clean_caption": False,
        },
    ),
    "sana": TinyCase(
        sana,
        (4, 8, 8),
        (32, 32),
        {
            "guidance_scale": 4.5,
            "height": 32,
            "width": 32,
            "max_sequence_length": 16,
            "use_resolution_binning": False,
            "clean_caption": False,
            "complex_human_instruction": None,
        },
    ),
    "qwen-image": TinyCase(
        qwen_image,
        (16, 16),
        (16, 16),
        {"true_cfg_scale": 4.0, "negative_prompt": "bad quality", "max_sequence_length": 16},
    ),
}


def tiny_pipeline(name: str, *, dtype: torch.dtype = torch.float32) -> DiffusionPipeline:
    """Builds `TINY[name]` in eval mode with weights that depend on nothing but the name."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(sum(map(ord, name)))
        pipe = TINY[name].build()
    for component in pipe.components.values():
        if isinstance(component, torch.nn.Module):
            component.eval()
    pipe.set_progress_bar_config(disable=True)
    return pipe if dtype == torch.float32 else pipe.to(dtype=dtype)
