"""The README of a published custom pipeline."""

from trimtab import __version__

__all__ = ["BASES", "pipeline_card"]

BASES = {
    "guided_flux": "black-forest-labs/FLUX.1-dev",
    "guided_pixart_sigma": "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS",
    "guided_qwen_image": "Qwen/Qwen-Image",
    "guided_sana": "Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers",
    "guided_stable_diffusion": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "guided_stable_diffusion_3": "stabilityai/stable-diffusion-3.5-medium",
    "guided_stable_diffusion_xl": "stabilityai/stable-diffusion-xl-base-1.0",
    "guided_wan": "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
    "flowopt_aura_flow": "fal/AuraFlow",
    "flowopt_flux": "black-forest-labs/FLUX.1-dev",
    "flowopt_flux_2": "black-forest-labs/FLUX.2-dev",
    "flowopt_flux_2_klein": "black-forest-labs/FLUX.2-klein-base-9B",
    "flowopt_lumina_2": "Alpha-VLLM/Lumina-Image-2.0",
    "flowopt_qwen_image": "Qwen/Qwen-Image",
    "flowopt_sana": "Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers",
    "flowopt_stable_diffusion": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "flowopt_stable_diffusion_3": "stabilityai/stable-diffusion-3.5-medium",
    "flowopt_stable_diffusion_xl": "stabilityai/stable-diffusion-xl-base-1.0",
    "flowopt_z_image": "Tongyi-MAI/Z-Image-Turbo",
    "noise_optimization_flux": "black-forest-labs/FLUX.1-schnell",
    "noise_optimization_pixart_alpha": "PixArt-alpha/PixArt-XL-2-1024-MS",
    "noise_optimization_pixart_sigma": "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS",
    "noise_optimization_sana": "Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers",
    "noise_optimization_sana_sprint": "Efficient-Large-Model/Sana_Sprint_1.6B_1024px_diffusers",
    "noise_optimization_stable_diffusion": "stabilityai/sd-turbo",
    "noise_optimization_stable_diffusion_3": "stabilityai/stable-diffusion-3.5-large-turbo",
    "noise_optimization_stable_diffusion_xl": "stabilityai/sdxl-turbo",
    "noise_optimization_z_image": "Tongyi-MAI/Z-Image-Turbo",
}
"""A model on the Hub that goes with each custom pipeline, for the example."""

_PRESETS = {
    "noise_optimization_flux": "flux-schnell",
    "noise_optimization_sana_sprint": "sana-sprint",
    "noise_optimization_stable_diffusion": "paper-sd-turbo",
    "noise_optimization_stable_diffusion_3": "sd3.5-large-turbo",
    "noise_optimization_stable_diffusion_xl": "paper-sdxl-turbo",
    "noise_optimization_z_image": "z-image-turbo",
}

_KINDS = {
    "guided": (
        "text-to-image",
        "Adaptive projected guidance ([arXiv 2410.02416](https://arxiv.org/abs/2410.02416)) and other guidance rules "
        "in the stock call: high scales without burnt colours. The call is the stock one and `guider=`.",
    ),
    "flowopt": (
        "image-to-image",
        "FlowOpt ([arXiv 2510.22010](https://arxiv.org/abs/2510.22010)): edits real pictures and finds the noise that "
        "makes them, without training and without gradients. `pipe.generate` is the stock text-to-image call.",
    ),
    "noise_optimization": (
        "text-to-image",
        "ReNO ([arXiv 2406.04312](https://arxiv.org/abs/2406.04312)): the noise of a frozen model is moved until a "
        "reward likes the picture. `pipe.generate` is the stock text-to-image call.",
    ),
    "point_cloud": (
        None,
        "Reconstructs point clouds and meshes through short codes, interpolates between them and draws new ones; the "
        "model was trained under sliced-Wasserstein distances "
        "([arXiv 2301.04791](https://arxiv.org/abs/2301.04791)).",
    ),
}


def pipeline_card(file: str, class_name: str, *, repo_id: str | None, has_model: bool) -> tuple[str, str]:
    """The front matter that the Hub reads, and the text below it.

    Args:
        file: the pipeline's, such as "guided_flux".
        class_name: the pipeline's.
        repo_id: OWNER/NAME on the Hub; None leaves a place for it.
        has_model: whether the repository holds a model.
    """
    kind = next(name for name in _KINDS if file.startswith(name))
    task, about = _KINDS[kind]
    repo = repo_id or f"OWNER/{file.replace('_', '-')}"
    base = BASES.get(file)
    front = ["library_name: diffusers", "tags: [diffusers, trimtab, custom-pipeline]"]
    if task is not None:
        front.append(f"pipeline_tag: {task}")
    if not has_model:  # weights have a licence of their own
        front.append("license: apache-2.0")
        front += [f"base_model: {base}"] if base else []
    lines = [
        f"# {class_name}",
        "",
        about,
        "",
        f"It needs the package trimtab, {__version__} or newer, besides Diffusers: `pipeline.py` imports the class "
        "from there. Diffusers asks for `trust_remote_code=True` before it runs that file.",
        "",
        "```python",
        *_example(file, kind, repo, base, has_model),
        "```",
    ]
    if has_model:
        lines += ["", f"`model_index.json` names the class, so no `custom_pipeline=` is needed with {repo}."]
    elif base:
        lines += ["", "Any other repository or folder of the same stock pipeline goes in the first place."]
    return "---\n" + "\n".join(front) + "\n---\n\n", "\n".join(lines) + "\n"


def _example(file: str, kind: str, repo: str, base: str | None, has_model: bool) -> list[str]:
    loading = [f'    "{repo}",'] if has_model or base is None else [f'    "{base}",', f'    custom_pipeline="{repo}",']
    if kind == "point_cloud":
        return [
            "from diffusers import DiffusionPipeline",
            "from trimtab.geometry import save_point_cloud",
            "",
            f'pipe = DiffusionPipeline.from_pretrained("{repo}", trust_remote_code=True)',
            *_CALLS[kind](file),
        ]
    return [
        "import torch",
        "from diffusers import DiffusionPipeline",
        *(["from trimtab.rewards import load_reward"] if kind == "noise_optimization" else []),
        *(["from diffusers.utils import export_to_video"] if file == "guided_wan" else []),
        "",
        "pipe = DiffusionPipeline.from_pretrained(",
        *loading,
        "    trust_remote_code=True,",
        "    dtype=torch.bfloat16,",
        ').to("cuda")',
        *_CALLS[kind](file),
    ]


def _guided(file: str) -> list[str]:
    if file == "guided_wan":
        return ['export_to_video(pipe("a cat on a red chair").frames[0], "cat.mp4", fps=16)']
    return ['pipe("a cat on a red chair").images[0].save("cat.png")']


def _flowopt(file: str) -> list[str]:
    return [
        'out = pipe(image="cat.png", source_prompt="a cat on a red chair", prompt="a dog on a red chair")',
        'out.images[0].save("dog.png")',
    ]


def _noise_optimization(file: str) -> list[str]:
    preset = _PRESETS.get(file)
    return [
        "out = pipe(",
        '    "a cat on a red chair",',
        '    reward=load_reward("pickscore", device="cuda"),',
        f'    preset="{preset}",' if preset else '    gradient="jacobian-free",',
        "    generator=torch.Generator().manual_seed(0),",
        ")",
        'out.images[0].save("cat.png")',
        "print(out.rewards)  # one an iteration",
    ]


def _point_cloud(file: str) -> list[str]:
    return [
        'out = pipe("chair.obj")  # or a PLY, STL, GLB, NPZ, XYZ, a trimesh mesh, an array (N, 3)',
        'save_point_cloud(out.clouds[0], "chair.ply")',
        "print(out.distances)",
        'between = pipe.interpolate("chair.obj", "table.obj").clouds',
    ]


_CALLS = {
    "guided": _guided,
    "flowopt": _flowopt,
    "noise_optimization": _noise_optimization,
    "point_cloud": _point_cloud,
}
