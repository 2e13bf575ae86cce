"""What differs between the pipeline families of Diffusers, one short entry each.

Whatever wraps a stock pipeline reads this table and holds no family's name itself. A new family is one entry
here, one thin custom-pipeline file, and one row in the tests' table of tiny pipelines.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

__all__ = ["FAMILIES", "Family", "GuidanceTraits", "denoisers_of", "family_of", "size_multiple", "stock_class"]


@dataclass(frozen=True, kw_only=True)
class GuidanceTraits:
    """How a stock pipeline gets the two predictions of classifier-free guidance, and what it does to them.

    Attributes:
        calls: "batched", one call of the denoiser on a batch twice as long, or "separate", one call on the
            condition and then one on the negative.
        conditional_first: of a batched call, the conditional half comes first.
        negated: the scheduler gets minus the network's output.
        renormalized: the pipeline gives its own combination the norm of the conditional prediction.
        scale_offset: what is added to the usual scale w in cond + (w - 1)(cond - uncond) to get the argument.
        switch: what makes the pipeline predict both.
        refusal: why there is no classifier-free guidance, where there is none.
        variants: names of the family's stock classes for other tasks, which ask for guidance in the same way.
        modular: names of the family's modular pipelines, with a guider component or without.
        unbatched: inputs of the denoiser without a batch axis whose first axis might have the batch's length.
    """

    calls: Literal["batched", "separate"] = "batched"
    conditional_first: bool = False
    negated: bool = False
    renormalized: bool = False
    scale_offset: float = 0.0
    switch: str = "guidance_scale > 1"
    refusal: str | None = None
    variants: tuple[str, ...] = ()
    modular: tuple[str, ...] = ()
    unbatched: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Family:
    """How one family of stock pipelines treats prompts, latents and its autoencoder.

    Attributes:
        name: short name, unique in the table.
        pipelines: names of the stock text-to-image classes; their subclasses belong to the family too.
        denoisers: attributes of the pipeline that hold the networks called at each step.
        guidance: the mechanics of classifier-free guidance.
        guidance_argument: the argument of the stock call that sets how strongly the prompt holds.
        prompt_outputs: what `encode_prompt` returns, in order.
        shared_outputs: those of `prompt_outputs` that have no batch axis.
        tokens: the stock call takes latents as tokens, (B, h w / patch^2, C patch^2), and not as (B, C, h, w).
        patch: side of the square of latent pixels in a token.
        video: samples have many frames: latents (B, C, frames, h, w), or tokens frame by frame.
        frame_axis: the autoencoder takes (B, C, frames, h, w), pictures as videos of one frame.
        normalization: how latents relate to what the autoencoder decodes: "scale" (`scaling_factor`, then
            `shift_factor` or `latents_mean` and `latents_std` where it has them), "statistics" (`latents_mean`
            and `latents_std` alone) or "batch-norm" (its own, on patches of 2x2 latent pixels as channels).
        upcast_autoencoder: a float16 autoencoder whose config says `force_upcast` decodes in float32.
        scale_factor: attribute of the pipeline that holds the pixels to a side of a latent pixel.
        returns_latents: its output of type "latent" can be passed as `latents` again.
    """

    name: str
    pipelines: tuple[str, ...]
    denoisers: tuple[str, ...] = ("transformer",)
    guidance: GuidanceTraits = field(default_factory=GuidanceTraits)
    guidance_argument: str = "guidance_scale"
    prompt_outputs: tuple[str, ...]
    shared_outputs: tuple[str, ...] = ()
    tokens: bool = False
    patch: int = 1
    video: bool = False
    frame_axis: bool = False
    normalization: Literal["scale", "statistics", "batch-norm"] = "scale"
    upcast_autoencoder: bool = False
    scale_factor: str = "vae_scale_factor"
    returns_latents: bool = True


_PAIR = ("prompt_embeds", "negative_prompt_embeds")
_POOLED = (*_PAIR, "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
_MASKED = (
    "prompt_embeds",
    "prompt_attention_mask",
    "negative_prompt_embeds",
    "negative_prompt_attention_mask",
)
_TRUE_CFG = "true_cfg_scale > 1 and a negative_prompt"

FAMILIES: list[Family] = [
    Family(
        name="stable-diffusion",  # 1.x and 2.x
        pipelines=("StableDiffusionPipeline",),
        denoisers=("unet",),
        guidance=GuidanceTraits(
            variants=("StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline"),
        ),
        prompt_outputs=_PAIR,
    ),
    Family(
        name="stable-diffusion-xl",
        pipelines=("StableDiffusionXLPipeline",),
        denoisers=("unet",),
        guidance=GuidanceTraits(
            variants=(
                "StableDiffusionXLImg2ImgPipeline",
                "StableDiffusionXLInpaintPipeline",
                "StableDiffusionXLControlNetPipeline",
                "StableDiffusionXLControlNetImg2ImgPipeline",
                "StableDiffusionXLControlNetInpaintPipeline",
            ),
            modular=("StableDiffusionXLModularPipeline",),
        ),
        prompt_outputs=_POOLED,
        upcast_autoencoder=True,
    ),
    Family(
        name="stable-diffusion-3",  # 3 and 3.5
        pipelines=("StableDiffusion3Pipeline",),
        guidance=GuidanceTraits(
            variants=(
                "StableDiffusion3Img2ImgPipeline",
                "StableDiffusion3InpaintPipeline",
                "StableDiffusion3ControlNetPipeline",
                "StableDiffusion3ControlNetInpaintingPipeline",
            ),
            modular=("StableDiffusion3ModularPipeline",),
        ),
        prompt_outputs=_POOLED,
    ),
    Family(
        name="flux",  # FLUX.1: guidance_scale is an input of the network, true_cfg_scale the classic one
        pipelines=("FluxPipeline",),
        guidance=GuidanceTraits(
            calls="separate",
            switch=_TRUE_CFG,
            variants=("FluxImg2ImgPipeline", "FluxInpaintPipeline", "FluxControlNetPipeline"),
            modular=("FluxModularPipeline",),
        ),
        prompt_outputs=("prompt_embeds", "pooled_prompt_embeds", "text_ids"),
        shared_outputs=("text_ids",),
        tokens=True,
        patch=2,
    ),
    Family(
        name="pixart",
        pipelines=("PixArtSigmaPipeline", "PixArtAlphaPipeline"),
        prompt_outputs=_MASKED,
    ),
    Family(
        name="sana",
        pipelines=("SanaPipeline",),
        prompt_outputs=_MASKED,
    ),
    Family(
        name="sana-sprint",
        pipelines=("SanaSprintPipeline",),
        guidance=GuidanceTraits(
            refusal="its guidance is distilled into the network, there is no unconditional prediction"
        ),
        prompt_outputs=("prompt_embeds", "prompt_attention_mask"),
    ),
    Family(
        name="lumina-2",
        pipelines=("Lumina2Pipeline",),
        guidance=GuidanceTraits(calls="separate", negated=True, renormalized=True),
        prompt_outputs=_MASKED,
    ),
    Family(
        name="aura-flow",
        pipelines=("AuraFlowPipeline",),
        prompt_outputs=_MASKED,
        upcast_autoencoder=True,
    ),
    Family(
        name="qwen-image",
        pipelines=("QwenImagePipeline",),
        guidance=GuidanceTraits(
            calls="separate", renormalized=True, switch=_TRUE_CFG, modular=("QwenImageModularPipeline",)
        ),
        guidance_argument="true_cfg_scale",
        prompt_outputs=("prompt_embeds", "prompt_embeds_mask"),
        tokens=True,
        patch=2,
        frame_axis=True,
        normalization="statistics",
    ),
    Family(
        name="z-image",
        pipelines=("ZImagePipeline",),
        guidance=GuidanceTraits(
            conditional_first=True, negated=True, scale_offset=-1.0, modular=("ZImageModularPipeline",)
        ),
        prompt_outputs=_PAIR,
    ),
    Family(
        name="kolors",
        pipelines=("KolorsPipeline",),
        denoisers=("unet",),
        prompt_outputs=_POOLED,
        upcast_autoencoder=True,
    ),
    Family(
        name="cogview-4",
        pipelines=("CogView4Pipeline",),
        guidance=GuidanceTraits(calls="separate"),
        prompt_outputs=_PAIR,
    ),
    Family(
        name="hunyuan-dit",
        pipelines=("HunyuanDiTPipeline",),
        guidance=GuidanceTraits(unbatched=("image_rotary_emb",)),
        prompt_outputs=(*_PAIR, "prompt_attention_mask", "negative_prompt_attention_mask"),
    ),
    Family(
        name="wan",
        pipelines=("WanPipeline",),
        denoisers=("transformer", "transformer_2"),  # 2.2 has one for high noise and one for low
        guidance=GuidanceTraits(calls="separate", modular=("WanModularPipeline",)),
        prompt_outputs=_PAIR,
        video=True,
        frame_axis=True,
        normalization="statistics",
        scale_factor="vae_scale_factor_spatial",
    ),
    Family(
        name="ltx",
        pipelines=("LTXPipeline",),
        guidance=GuidanceTraits(modular=("LTXModularPipeline",)),
        prompt_outputs=_MASKED,
        tokens=True,
        video=True,
        frame_axis=True,
        scale_factor="vae_spatial_compression_ratio",
    ),
    Family(
        name="flux-2-klein",
        pipelines=("Flux2KleinPipeline",),
        guidance=GuidanceTraits(
            calls="separate", modular=("Flux2KleinModularPipeline", "Flux2KleinBaseModularPipeline")
        ),
        prompt_outputs=("prompt_embeds", "text_ids"),
        patch=2,
        normalization="batch-norm",
        returns_latents=False,
    ),
    Family(
        name="flux-2",
        pipelines=("Flux2Pipeline",),
        guidance=GuidanceTraits(
            refusal="its guidance is distilled into the network, there is no unconditional prediction",
            modular=("Flux2ModularPipeline",),
        ),
        prompt_outputs=("prompt_embeds", "text_ids"),
        patch=2,
        normalization="batch-norm",
        returns_latents=False,
    ),
]
"""The table. An entry that is appended holds from then on; with a name of a class twice, the last one."""


def _by_class() -> dict[str, Family]:
    return {pipeline: family for family in FAMILIES for pipeline in family.pipelines}


def stock_class(pipe: Any) -> type:
    """The stock Diffusers class that a pipeline is an instance of, itself or through a subclass.

    Args:
        pipe: a pipeline.

    Returns:
        The first class in the method resolution order that the table names.

    Raises:
        ValueError: `pipe` belongs to no family of the table; the message names the classes that do.

    Example:
        >>> stock = type("StableDiffusion3Pipeline", (), {"__module__": "diffusers.pipelines"})
        >>> stock_class(type("MyPipeline", (stock,), {})()).__name__
        'StableDiffusion3Pipeline'
    """
    known = _by_class()
    for cls in type(pipe).__mro__:
        if cls.__name__ in known and cls.__module__.split(".")[0] == "diffusers":
            return cls
    raise ValueError(f"`pipe` is a {type(pipe).__name__}, which is in no family known here; takes {', '.join(known)}")


def family_of(pipe: Any) -> Family:
    """The table's entry for a pipeline.

    Args:
        pipe: a stock pipeline or an instance of a subclass of one.

    Returns:
        Its family.

    Raises:
        ValueError: `pipe` belongs to no family of the table; the message names the classes that do.
    """
    return _by_class()[stock_class(pipe).__name__]


def denoisers_of(pipe: Any) -> list[Any]:
    """The denoisers that a pipeline of the table has: one, or Wan 2.2's two.

    Raises:
        ValueError: as for `family_of`.
    """
    networks = (getattr(pipe, name, None) for name in family_of(pipe).denoisers)
    return [network for network in networks if network is not None]


def size_multiple(pipe: Any) -> int:
    """Pixels that height and width of a pipeline's pictures must be a multiple of: a latent's, times a patch's.

    Raises:
        ValueError: as for `family_of`.
    """
    family = family_of(pipe)
    patches = [denoiser.config.get("patch_size", 1) for denoiser in denoisers_of(pipe)]
    patches = [size if isinstance(size, int) else size[-1] for size in patches]  # of a video: (frames, h, w)
    return getattr(pipe, family.scale_factor) * max(family.patch, *patches)
