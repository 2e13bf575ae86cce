"""Inversion under the source prompt, and sampling under the target prompt, by one solver or another."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DDIMInverseScheduler, DDIMScheduler, FlowMatchEulerDiscreteScheduler

from trimtab.pipelines.flowopt_task import EditTask, counted
from trimtab.schedulers import (
    FlowMatchEulerInverseScheduler,
    FlowMatchFireFlowInverseScheduler,
    FlowMatchFireFlowScheduler,
    FlowMatchMidpointInverseScheduler,
    FlowMatchMidpointScheduler,
    FlowMatchUniInvScheduler,
    start_at,
)

__all__ = ["fireflow", "invert_and_sample", "ode_inversion", "rf_solver", "uni_inv"]


def ode_inversion(task: EditTask) -> torch.Tensor:
    """Edits by Euler's inversion, DDIM inversion of a diffusion model, and the plain sampler.

    Args:
        task: the pictures and the flow.

    Returns:
        (B, *latent_shape) float32, clean latents.
    """
    if isinstance(task.sample.scheduler, DDIMScheduler):
        return invert_and_sample(task, DDIMInverseScheduler, DDIMScheduler)
    return invert_and_sample(task, FlowMatchEulerInverseScheduler, FlowMatchEulerDiscreteScheduler)


def uni_inv(task: EditTask) -> torch.Tensor:
    """Edits by Uni-Inv (UniEdit-Flow, arXiv 2504.13109) and the plain sampler: FlowOpt's iterate 0.

    Args:
        task: the pictures and the flow.

    Returns:
        (B, *latent_shape) float32, clean latents.
    """
    return invert_and_sample(task, FlowMatchUniInvScheduler, FlowMatchEulerDiscreteScheduler)


def rf_solver(task: EditTask) -> torch.Tensor:
    """Edits by RF-Solver (arXiv 2411.04746) in both directions, at two calls of the network a step.

    The paper's RF-Edit shares features of attention between the two runs besides, which is tied to one architecture;
    that is left out here.

    Args:
        task: the pictures and the flow.

    Returns:
        (B, *latent_shape) float32, clean latents.
    """
    return invert_and_sample(task, FlowMatchMidpointInverseScheduler, FlowMatchMidpointScheduler)


def fireflow(task: EditTask) -> torch.Tensor:
    """Edits by FireFlow (arXiv 2412.07517) in both directions, at about one call of the network a step.

    The paper shares features of attention between the two runs besides; that is left out here.

    Args:
        task: the pictures and the flow.

    Returns:
        (B, *latent_shape) float32, clean latents.
    """
    return invert_and_sample(task, FlowMatchFireFlowInverseScheduler, FlowMatchFireFlowScheduler)


def invert_and_sample(task: EditTask, inverse: type, sampler: type) -> torch.Tensor:
    """Clean latents to the level of the start under the source prompt, and back under the target prompt.

    Args:
        task: the pictures and the flow.
        inverse: class of the scheduler for the way there.
        sampler: class of the scheduler for the way back.

    Returns:
        (B, *latent_shape) float32, clean latents.
    """

    def run(f: Any, kind: type, x: torch.Tensor) -> torch.Tensor:
        scheduler = start_at(kind.from_config(task.sample.scheduler.config), task.start)
        with counted(task.pipe, task.calls):
            return f.replaced(scheduler=scheduler)(x)

    x = run(task.invert, inverse, task.target)
    task.keep_outside(x)
    return run(task.sample, sampler, x)
