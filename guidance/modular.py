"""Guiders in modular pipelines: a step of the denoising loop that tells them the noisy latents.

A modular pipeline asks its guider component for the combination of predictions, but tells it neither the noisy
latents nor the scheduler. ``NoisyLatentsStep`` does, once in a loop before the denoiser. ``attach`` puts it into a
copy of the pipeline's blocks; ``with_noisy_latents`` makes pipelines whose blocks have it for good, where
``update_components(guider=...)`` then does for every rule.
"""

import copy
from typing import Any

import torch
from diffusers import ModularPipeline
from diffusers.guiders.guider_utils import BaseGuidance
from diffusers.modular_pipelines import ModularPipelineBlocks
from diffusers.modular_pipelines.modular_pipeline import BlockState, LoopSequentialPipelineBlocks
from diffusers.modular_pipelines.modular_pipeline_utils import InputParam, InsertableDict

from trimtab.pipelines.families import FAMILIES, Family

from .base import Guidance
from .cfg_plus_plus import CFGPlusPlusGuidance
from .handle import Attachment
from .interception import unwrapped
from .perturbation import Rows
from .progress import RunProgress
from .zero_star import ClassifierFreeZeroStarGuidance

__all__ = ["ModularAttachment", "NoisyLatentsStep", "check_modular", "with_noisy_latents"]

STEP = "noisy_latents"
"""The step's name in the loops that it is put into."""


class NoisyLatentsStep(ModularPipelineBlocks):
    """First step in a denoising loop: tells the guiders the latents, their noise level and where the run is.

    It serves guiders of ``trimtab.guidance`` and leaves others alone.
    """

    @property
    def description(self) -> str:
        return (
            "step within the denoising loop that tells the guiders the noisy latents and their noise level. "
            "It comes before the step that calls the denoiser."
        )

    @property
    def inputs(self) -> list[InputParam]:
        return [
            InputParam("latents", required=True, type_hint=torch.Tensor, description="The noisy latents."),
            InputParam("timesteps", required=True, type_hint=torch.Tensor, description="The run's timesteps."),
        ]

    @torch.no_grad()
    def __call__(
        self, components: ModularPipeline, block_state: BlockState, i: int, t: torch.Tensor
    ) -> tuple[ModularPipeline, BlockState]:
        guiders = [guider for guider in _guiders(components).values() if isinstance(guider, Guidance)]
        if i == 0:
            block_state.run_progress = RunProgress(components.scheduler)
            for guider in guiders:
                guider.release()
        required = any(guider.needs_sample for guider in guiders)
        if required and getattr(block_state, "conditioning_mask", None) is not None:
            raise NotImplementedError(
                "the given frame of image-to-video has no noise, which denoised predictions don't allow for: "
                "use rules in raw space"
            )
        progress = block_state.run_progress
        steps = -(-len(block_state.timesteps) // progress.order)
        levels = progress.predictions(progress.index(t), required=required)
        for guider in guiders:
            guider.expect(progress.step, steps, progress.begins_step, block_state.latents, *levels)
        progress.evaluation += 1
        return components, block_state


def with_noisy_latents(blocks: ModularPipelineBlocks) -> ModularPipelineBlocks:
    """A copy of blocks with a ``NoisyLatentsStep`` in each denoising loop that has a guider.

    Args:
        blocks: of a modular pipeline, at any depth.

    Returns:
        The copy. Its pipelines take every rule of ``trimtab.guidance`` by ``update_components(guider=...)``.

    Raises:
        NotImplementedError: if no loop has a guider.

    Example:
        >>> from diffusers import StableDiffusionXLAutoBlocks                              # doctest: +SKIP
        >>> pipe = with_noisy_latents(StableDiffusionXLAutoBlocks()).init_pipeline(repo)   # doctest: +SKIP
        >>> pipe.update_components(guider=AdaptiveProjectedGuidance(10.0))                 # doctest: +SKIP
    """
    blocks = copy.deepcopy(blocks)  # instances are shared by all pipelines of a class
    loops = _guided_loops(blocks)
    if not loops:
        raise NotImplementedError(f"{type(blocks).__name__} has no denoising loop with a guider")
    for loop in loops:
        if any(isinstance(block, NoisyLatentsStep) for block in loop.sub_blocks.values()):
            continue
        loop.sub_blocks = InsertableDict(loop.sub_blocks).insert(STEP, NoisyLatentsStep(), 0)
    return blocks


def _guided_loops(blocks: ModularPipelineBlocks) -> list[LoopSequentialPipelineBlocks]:
    if isinstance(blocks, LoopSequentialPipelineBlocks):
        guided = any(spec.name == "guider" for spec in blocks.expected_components)
        return [blocks] if guided else []
    return [loop for block in blocks.sub_blocks.values() for loop in _guided_loops(block)]


def _guiders(pipe: ModularPipeline) -> dict[str, BaseGuidance]:
    """A pipeline's guiders by component name, each object once."""
    found: dict[str, BaseGuidance] = {}
    for name in pipe.component_names:
        part = getattr(pipe, name, None)
        if isinstance(part, BaseGuidance) and not any(part is other for other in found.values()):
            found[name] = part
    return found


def _family_of(pipe: ModularPipeline) -> Family:
    by_name = {name: family for family in FAMILIES for name in family.guidance.modular}
    for base in type(pipe).__mro__:
        if base.__name__ in by_name:
            return by_name[base.__name__]
    raise NotImplementedError(f"`pipe` is a {type(pipe).__name__}; takes {', '.join(by_name)}")


def check_modular(pipe: ModularPipeline, guider: BaseGuidance, renormalize: bool | None) -> None:
    """Raises unless this guider can be followed in this modular pipeline; see ``attach``."""
    name = type(pipe).__name__
    if not _guided_loops(pipe._blocks):
        reason = "its blocks have no guider and make no unconditional prediction"
        by_name = {name: family for family in FAMILIES for name in family.guidance.modular}
        family = by_name.get(name)
        distilled = getattr(pipe.config, "is_distilled", False)  # FLUX.2 klein: no more in the classic pipeline
        if family is not None and family.guidance.refusal is None and not distilled:
            reason += f"; {family.pipelines[0]} makes one with {family.guidance.switch}"
        raise NotImplementedError(f"{name} can't be guided: {reason}")
    traits = _family_of(pipe).guidance
    if renormalize is not None:
        raise NotImplementedError(f"`renormalize` must be None: what {name} does with the result is in its blocks")
    inner = guider
    while isinstance(getattr(inner, "guider", None), Guidance):
        inner = inner.guider
    if not traits.renormalized:
        return
    zero_steps = isinstance(inner, ClassifierFreeZeroStarGuidance) and inner.zero_init_steps > 0
    if zero_steps or isinstance(inner, CFGPlusPlusGuidance):
        rule = "zero_init_steps > 0" if zero_steps else type(inner).__name__
        raise NotImplementedError(
            f"{name} gives the guided prediction the conditional one's norm, which undoes {rule}; the classic "
            "pipeline with attach(..., renormalize=False) can do it"
        )


class ModularAttachment(Attachment):
    """A guider in the place of a modular pipeline's guider components."""

    def __init__(self, pipe: ModularPipeline, guider: BaseGuidance):
        super().__init__(guider)
        self._pipe = pipe
        parts = [getattr(pipe, name, None) for name in _family_of(pipe).denoisers]
        denoisers = [part for part in parts if part is not None]
        self._claim([unwrapped(denoiser) for denoiser in denoisers] + [guider])
        try:
            if isinstance(guider, Guidance):
                for denoiser in denoisers:  # what can't be changed inside is told now, not in the run
                    guider.install(denoiser, Rows())()
            for name in pipe.component_names:
                if isinstance(getattr(pipe, name, None), BaseGuidance):
                    self._replace(name, guider)
            self._replace("_blocks", with_noisy_latents(pipe._blocks))
        except BaseException:
            self.remove()
            raise

    def _replace(self, name: str, value: Any) -> None:
        before = getattr(self._pipe, name)
        setattr(self._pipe, name, value)

        def undo() -> None:
            if getattr(self._pipe, name) is value:  # else replaced by somebody else since: theirs
                setattr(self._pipe, name, before)

        self._undo.append(undo)
