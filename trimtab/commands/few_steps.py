"""The bundled model in four network evaluations: its transformer distilled from twenty guided steps."""

from typing import Any

from trimtab.commands.model import BUNDLED

__all__ = ["FEW_STEPS_CALL", "with_few_steps"]

FEW_STEPS_CALL: dict[str, Any] = {"num_inference_steps": 4, "sigmas": [1.0, 0.75, 0.5, 0.25], "guidance_scale": 1.0}
"""How the distilled transformer is called: at the noise levels that it was distilled for, guidance being in it."""


def with_few_steps(pipe: Any) -> Any:
    """The bundled model's pipeline with the distilled transformer in the place of its own, all else shared.

    Args:
        pipe: the bundled model's, a ``StableDiffusion3Pipeline``.

    Returns:
        Another pipeline of its class, on its device and in its dtype.
    """
    from diffusers import SD3Transformer2DModel

    from trimtab.assets import FEW_STEPS, asset_path

    transformer = SD3Transformer2DModel.from_pretrained(
        asset_path(BUNDLED), subfolder=FEW_STEPS, dtype=pipe.transformer.dtype, use_safetensors=True
    )
    return type(pipe).from_pipe(pipe, transformer=transformer.to(pipe.device))
