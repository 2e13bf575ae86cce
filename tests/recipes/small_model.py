"""A repository of the bundled model's kind, small and untrained."""

from pathlib import Path

import torch
from diffusers import AutoencoderKL

from trimtab.recipes.assemble import assemble_pipeline, save_pipeline
from trimtab.recipes.train_transformer import FlowMatchingLoss, build_transformer


def save_small_model(folder: Path, *, latent_mean: float, latent_deviation: float) -> Path:
    """Its random transformer isn't constant."""
    torch.manual_seed(0)
    module = FlowMatchingLoss(build_transformer(num_layers=2, num_attention_heads=1))
    for parameter in module.transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    small = {"block_out_channels": (8,) * 4, "norm_num_groups": 4, "layers_per_block": 1, "latent_channels": 8}
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    pipe = assemble_pipeline(
        AutoencoderKL(**small, **blocks),
        module,
        latent_mean=latent_mean,
        latent_deviation=latent_deviation,
        timestep_shift=1.0,
    )
    save_pipeline(pipe, folder, torch.float32)
    return folder
