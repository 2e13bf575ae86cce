"""Tiny random pipelines of further families and tasks, for guidance: prompts come as embeddings, or as text where the
family's complete tiny pipeline exists.

    from tests.more_tiny_pipelines import GUIDED, guided_pipeline

    pipe = guided_pipeline("lumina-2")
    latents = pipe(**GUIDED["lumina-2"].call([0, 1]), num_inference_steps=2, output_type="latent")[0]
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler

from tests.tiny_pipelines import TINY, _flow_vae, _vae, _xl_unet, tiny_pipeline

PROMPTS = ["a red cat", "two dog on a sky background"]
LENGTH = 8  # tokens of a made prompt


def embedding(rows: Sequence[int], *shape: int, seed: int = 0) -> torch.Tensor:
    """Random embeddings, each row the same in every batch."""
    made = [torch.randn(shape, generator=torch.Generator().manual_seed(1000 * seed + row)) for row in rows]
    return torch.stack(made)


def mask(rows: Sequence[int], length: int = LENGTH) -> torch.Tensor:
    return torch.ones(len(rows), length, dtype=torch.long)


def lumina_2() -> DiffusionPipeline:
    transformer = diffusers.Lumina2Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        hidden_size=8,
        num_layers=1,
        num_refiner_layers=1,
        num_attention_heads=1,
        num_kv_heads=1,
        multiple_of=8,
        axes_dim_rope=(4, 2, 2),
        axes_lens=(32, 16, 16),
        cap_feat_dim=8,
    )
    return diffusers.Lumina2Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
        vae=_flow_vae(),
        text_encoder=None,
        tokenizer=None,
    )


def aura_flow() -> DiffusionPipeline:
    transformer = diffusers.AuraFlowTransformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_projection_dim=16,
        joint_attention_dim=16,
        out_channels=4,
        pos_embed_max_size=64,
    )
    return diffusers.AuraFlowPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=_vae(),
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.73),
    )


def z_image() -> DiffusionPipeline:
    transformer = diffusers.ZImageTransformer2DModel(
        all_patch_size=(2,),
        all_f_patch_size=(1,),
        in_channels=16,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[8, 4, 4],
        axes_lens=[256, 32, 32],
    )
    with torch.no_grad():  # made by torch.empty
        transformer.x_pad_token.fill_(1.0)
        transformer.cap_pad_token.fill_(1.0)
    return diffusers.ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=_flow_vae(16),
        text_encoder=None,
        tokenizer=None,
        transformer=transformer,
    )


def kolors() -> DiffusionPipeline:
    scheduler = diffusers.EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.014,
        beta_schedule="scaled_linear",
        num_train_timesteps=1100,
        timestep_spacing="leading",
        steps_offset=1,
    )
    return diffusers.KolorsPipeline(
        vae=_vae(), text_encoder=None, tokenizer=None, unet=_xl_unet(16), scheduler=scheduler
    )


def cogview_4() -> DiffusionPipeline:
    transformer = diffusers.CogView4Transformer2DModel(
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        out_channels=4,
        text_embed_dim=16,
        time_embed_dim=8,
        condition_dim=4,
        rope_axes_dim=(16, 16),
        sample_size=8,
    )
    scheduler = FlowMatchEulerDiscreteScheduler(
        base_shift=0.25,
        max_shift=0.75,
        base_image_seq_len=256,
        use_dynamic_shifting=True,
        time_shift_type="linear",
    )
    return diffusers.CogView4Pipeline(
        tokenizer=None, text_encoder=None, vae=_vae(), transformer=transformer, scheduler=scheduler
    )


def hunyuan_dit() -> DiffusionPipeline:
    transformer = diffusers.HunyuanDiT2DModel(
        sample_size=8,
        num_layers=2,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=3,
        in_channels=4,
        cross_attention_dim=16,
        cross_attention_dim_t5=16,
        pooled_projection_dim=16,
        hidden_size=24,
        text_len=LENGTH,
        text_len_t5=LENGTH,
        activation_fn="gelu-approximate",
    )
    return diffusers.HunyuanDiTPipeline(
        vae=_vae(),
        text_encoder=None,
        tokenizer=None,
        transformer=transformer,
        scheduler=diffusers.DDPMScheduler(
            beta_start=0.00085,
            beta_end=0.03,
            beta_schedule="scaled_linear",
            prediction_type="v_prediction",
            clip_sample=False,
            steps_offset=1,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def wan() -> DiffusionPipeline:
    transformer = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=16,
        ffn_dim=16,
        num_layers=2,
        rope_max_seq_len=32,
    )
    vae = diffusers.AutoencoderKLWan(
        base_dim=3,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    return diffusers.WanPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=vae,
        scheduler=diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
        transformer=transformer,
    )


def ltx() -> DiffusionPipeline:
    transformer = diffusers.LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        patch_size=1,
        patch_size_t=1,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        num_layers=2,
        caption_channels=16,
    )
    vae = diffusers.AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
        spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False),
        decoder_inject_noise=(False,) * 5,
        upsample_residual=(False,) * 4,
        upsample_factor=(1,) * 4,
        patch_size=1,
        patch_size_t=1,
    )
    return diffusers.LTXPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=vae,
        text_encoder=None,
        tokenizer=None,
        transformer=transformer,
    )


def flux_2_klein(*, is_distilled: bool = False) -> DiffusionPipeline:
    transformer = diffusers.Flux2Transformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
    )
    vae = diffusers.AutoencoderKLFlux2(
        sample_size=16,
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
        block_out_channels=(4,),
        layers_per_block=1,
        latent_channels=1,
        norm_num_groups=1,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    return diffusers.Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=vae,
        text_encoder=None,
        tokenizer=None,
        transformer=transformer,
        is_distilled=is_distilled,
    )


def _embeds(width: int) -> Callable[[Sequence[int]], dict[str, Any]]:
    def call(rows: Sequence[int]) -> dict[str, Any]:
        return {
            "prompt_embeds": embedding(rows, LENGTH, width, seed=1),
            "negative_prompt_embeds": embedding([7] * len(rows), LENGTH, width, seed=2),
        }

    return call


def _masked(width: int) -> Callable[[Sequence[int]], dict[str, Any]]:
    def call(rows: Sequence[int]) -> dict[str, Any]:
        masks = {"prompt_attention_mask": mask(rows), "negative_prompt_attention_mask": mask(rows)}
        return {**_embeds(width)(rows), **masks}

    return call


def _lists(width: int) -> Callable[[Sequence[int]], dict[str, Any]]:
    def call(rows: Sequence[int]) -> dict[str, Any]:
        return {name: list(value.unbind()) for name, value in _embeds(width)(rows).items()}

    return call


def _pooled(width: int) -> Callable[[Sequence[int]], dict[str, Any]]:
    def call(rows: Sequence[int]) -> dict[str, Any]:
        pooled = {
            "pooled_prompt_embeds": embedding(rows, 16, seed=3),
            "negative_pooled_prompt_embeds": embedding([7] * len(rows), 16, seed=4),
        }
        return {**_embeds(width)(rows), **pooled}

    return call


def _two_encoders(width: int) -> Callable[[Sequence[int]], dict[str, Any]]:
    def call(rows: Sequence[int]) -> dict[str, Any]:
        first = _masked(width)(rows)
        second = {f"{name}_2": value + 0.5 if value.is_floating_point() else value for name, value in first.items()}
        return {**first, **second}

    return call


def _texts(rows: Sequence[int]) -> dict[str, Any]:
    return {"prompt": [PROMPTS[row] for row in rows]}


@dataclass(frozen=True)
class GuidedCase:
    """A pipeline and how it is called with guidance.

    Attributes:
        build: makes the pipeline.
        prompts: keyword arguments of the stock call for prompts by number.
        latent_shape: of one sample, as the stock call takes it.
        fixed: further keyword arguments.
        argument: of the stock call that holds the guidance scale.
    """

    build: Callable[[], DiffusionPipeline]
    prompts: Callable[[Sequence[int]], dict[str, Any]]
    latent_shape: tuple[int, ...]
    fixed: dict[str, Any]
    argument: str = "guidance_scale"

    def call(self, rows: Sequence[int], scale: float = 5.0) -> dict[str, Any]:
        fixed = dict(self.fixed)
        if "negative_prompt" in fixed:
            fixed["negative_prompt"] = [fixed["negative_prompt"]] * len(rows)
        return {**self.prompts(rows), **fixed, self.argument: scale}


def _complete(name: str) -> GuidedCase:
    fixed = {key: value for key, value in TINY[name].call.items() if key != "guidance_scale"}
    argument = "guidance_scale"
    if name == "flux" or "true_cfg_scale" in fixed:
        fixed.pop("true_cfg_scale", None)
        fixed["negative_prompt"], argument = "bad quality", "true_cfg_scale"
    return GuidedCase(TINY[name].build, _texts, TINY[name].latent_shape, fixed, argument)


SMALL = {"height": 16, "width": 16}
GUIDED: dict[str, GuidedCase] = {
    **{name: _complete(name) for name in TINY},
    "lumina-2": GuidedCase(lumina_2, _masked(8), (4, 8, 8), {"height": 64, "width": 64}),
    "aura-flow": GuidedCase(aura_flow, _masked(16), (4, 8, 8), SMALL),
    "z-image": GuidedCase(z_image, _lists(16), (16, 8, 8), SMALL),
    "kolors": GuidedCase(kolors, _pooled(16), (4, 8, 8), SMALL),
    "cogview-4": GuidedCase(cogview_4, _embeds(16), (4, 8, 8), SMALL),
    "hunyuan-dit": GuidedCase(hunyuan_dit, _two_encoders(16), (4, 8, 8), {**SMALL, "use_resolution_binning": False}),
    "wan": GuidedCase(wan, _embeds(16), (4, 3, 4, 4), {"height": 32, "width": 32, "num_frames": 9}),
    "ltx": GuidedCase(ltx, _masked(16), (192, 8), {"height": 32, "width": 32, "num_frames": 9}),
    "flux-2-klein": GuidedCase(flux_2_klein, _embeds(16), (4, 4, 4), {"height": 8, "width": 8}),
}


def guided_pipeline(name: str) -> DiffusionPipeline:
    """Builds ``GUIDED[name]`` in eval mode with weights that depend on nothing but the name."""
    if name in TINY:
        return tiny_pipeline(name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(sum(map(ord, name)))
        pipe = GUIDED[name].build()
        for component in pipe.components.values():
            if isinstance(component, torch.nn.Module):
                component.eval()
                for parameter in component.parameters():  # some are made zero, and then nothing depends on anything
                    if not parameter.any():
                        torch.nn.init.normal_(parameter, std=0.3)
        if name == "aura-flow":  # its prompts hardly matter at its initial weights
            for parameter in pipe.transformer.parameters():
                parameter.requires_grad_(False).mul_(2.0 if parameter.ndim == 2 else 1.0)
    pipe.set_progress_bar_config(disable=True)
    return pipe


# ---- other tasks of the same families ----------------------------------------------------------------------


def _controlnet_xl(unet: torch.nn.Module) -> torch.nn.Module:
    return diffusers.ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(4, 8))


def _controlnet_3(transformer: torch.nn.Module) -> torch.nn.Module:
    return diffusers.SD3ControlNetModel.from_transformer(transformer, num_layers=1, num_extra_conditioning_channels=0)


def _controlnet_flux(transformer: torch.nn.Module) -> torch.nn.Module:
    return diffusers.FluxControlNetModel.from_transformer(
        transformer, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2
    )


CONTROLNETS: dict[str, Callable[[torch.nn.Module], torch.nn.Module]] = {
    "sdxl": _controlnet_xl,
    "sd3": _controlnet_3,
    "flux": _controlnet_flux,
}

PICTURE = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(5))
FROM_PICTURE = {"image": PICTURE, "strength": 0.75}
INPAINT = {**FROM_PICTURE, "mask_image": (PICTURE[:, :1] > 0.5).float()}

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    # class: (family's tiny pipeline, arguments for the task)
    "StableDiffusionImg2ImgPipeline": ("sd15", FROM_PICTURE),
    "StableDiffusionInpaintPipeline": ("sd15", {**INPAINT, **SMALL}),
    "StableDiffusionXLImg2ImgPipeline": ("sdxl", FROM_PICTURE),
    "StableDiffusionXLInpaintPipeline": ("sdxl", {**INPAINT, **SMALL}),
    "StableDiffusionXLControlNetPipeline": ("sdxl", {"image": PICTURE}),
    "StableDiffusionXLControlNetImg2ImgPipeline": ("sdxl", {**FROM_PICTURE, "control_image": PICTURE}),
    "StableDiffusionXLControlNetInpaintPipeline": ("sdxl", {**INPAINT, "control_image": PICTURE, **SMALL}),
    "StableDiffusion3Img2ImgPipeline": ("sd3", {**FROM_PICTURE, **SMALL}),
    "StableDiffusion3InpaintPipeline": ("sd3", {**INPAINT, **SMALL}),
    "StableDiffusion3ControlNetPipeline": ("sd3", {"control_image": PICTURE, **SMALL}),
    "FluxImg2ImgPipeline": ("flux", {**FROM_PICTURE, **SMALL}),
    "FluxInpaintPipeline": ("flux", {**INPAINT, **SMALL}),
    "FluxControlNetPipeline": ("flux", {"control_image": PICTURE, **SMALL}),
}


def variant_pipeline(class_name: str) -> DiffusionPipeline:
    """A pipeline of ``VARIANTS`` from its family's tiny components, the same at every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return _variant_pipeline(class_name)


def _variant_pipeline(class_name: str) -> DiffusionPipeline:
    name = VARIANTS[class_name][0]
    components = {key: value for key, value in tiny_pipeline(name).components.items() if value is not None}
    cls = getattr(diffusers, class_name)
    if "ControlNet" in class_name:
        network = components["unet"] if name == "sdxl" else components["transformer"]
        controlnet = CONTROLNETS[name](network).eval()
        for parameter in controlnet.parameters():  # its outputs start as zero
            if not parameter.any():
                torch.nn.init.normal_(parameter, std=0.1)
        components["controlnet"] = controlnet
    if class_name == "StableDiffusion3InpaintPipeline":  # takes models of 16 channels only
        components["vae"] = _flow_vae(16).eval()
        components["transformer"] = diffusers.SD3Transformer2DModel.from_config(
            components["transformer"].config, in_channels=16, out_channels=16
        ).eval()
    if name == "sd15":
        components |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    pipe = cls(**components)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def variant_call(class_name: str, scale: float) -> dict[str, Any]:
    """Arguments of its stock call, with guidance on."""
    name, task = VARIANTS[class_name]
    call = {**GUIDED[name].call([0], scale), **task}
    known = inspect.signature(getattr(diffusers, class_name).__call__).parameters
    return {key: value for key, value in call.items() if key in known}
