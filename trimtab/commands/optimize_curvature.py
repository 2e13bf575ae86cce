"""What ``trimtab optimize --curvature`` reports of a picture: how sharply its noise is determined."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trimtab.commands.errors import UsageError, first_line
from trimtab.commands.pictures import save_png

__all__ = ["curvatures", "report_curvature"]

PRODUCTS = 20


def curvatures(pipe: Any, latents: Any, jobs: Sequence[Mapping[str, Any]], call: Mapping[str, Any]) -> list[Any]:
    """The spectrum of the reward's Hessian at each picture's noise.

    Args:
        pipe: a noise-optimizing pipeline with a reward.
        latents: the noise found, (B, ...).
        jobs: the pictures' settings.
        call: arguments of the pipeline's call; those of the optimizer are left out.

    Raises:
        UsageError: for a reward or a model without second derivatives.
    """
    import torch

    from trimtab.pipelines.noise_curvature import noise_curvature

    named = ("num_inference_steps", "guidance_scale", "height", "width", "max_sequence_length")
    negative = [job["negative_prompt"] for job in jobs]
    try:
        return noise_curvature(
            pipe,
            [job["prompt"] for job in jobs],
            latents,
            reward_prompt=[job["reward_prompt"] or job["prompt"] for job in jobs],
            negative_prompt=None if negative[0] is None else negative,
            generator=[torch.Generator("cpu").manual_seed(job["seed"]) for job in jobs],
            num_steps=PRODUCTS,
            **{name: value for name, value in call.items() if name in named},
        )
    except (ValueError, TypeError, RuntimeError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise MemoryError(f"--curvature: {first_line(error)}") from error
        raise UsageError(f"--curvature: {first_line(error)}") from error


def report_curvature(spectrum: Any, path: Path, made_by: Mapping[str, Any]) -> dict[str, Any]:
    """Draws a spectrum and gives its figures for the JSON.

    Args:
        spectrum: of a picture.
        path: of the drawing.
        made_by: what made the picture.
    """
    save_png(spectrum.picture("curvature of -reward"), path, made_by)
    step = spectrum.max_learning_rate
    return {
        "lambda_max": spectrum.lambda_max,
        "lambda_min": spectrum.lambda_min,
        "max_learning_rate": step if step < float("inf") else None,
        "top": spectrum.top.tolist(),
        "num_outliers": spectrum.num_outliers,
        "gap_ratio": spectrum.gap_ratio,
        "flat_fraction": spectrum.fraction_below(0.01),
        "noise_size": spectrum.size,
        "products": spectrum.num_products,
    }
