"""Repositories laid out as the published ones load and run, so that the first run with real weights does."""

import json

import pytest
import torch
from diffusers import DiffusionPipeline

from tests.published_layouts import write_layout
from trimtab.benchmarks.full_size import MODELS
from trimtab.benchmarks.full_size_networks import PUBLISHED, Layout, make_network, reward_network
from trimtab.guidance import AdaptiveProjectedGuidance, attach
from trimtab.pipelines import FlowOptPipeline, GenerationMap

pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"
)
PARAMETERS = {  # of the published weights
    ("stable-diffusion-xl-base-1.0", "unet"): 2_567_463_684,
    ("stable-diffusion-xl-base-1.0", "vae"): 83_653_863,
    ("stable-diffusion-xl-base-1.0", "text_encoder"): 123_060_480,
    ("stable-diffusion-xl-base-1.0", "text_encoder_2"): 694_659_840,
    ("stable-diffusion-3.5-medium", "transformer"): 2_243_171_520,
    ("stable-diffusion-3.5-large", "transformer"): 8_056_627_520,
    ("stable-diffusion-3.5-large", "text_encoder_3"): 4_762_310_656,
    ("FLUX.1-dev", "transformer"): 11_901_408_320,
    ("Qwen-Image", "transformer"): 20_430_401_088,
    ("Qwen-Image", "text_encoder"): 8_292_166_656,
}


def parameters(model: str, component: str) -> int:
    network = make_network(Layout(PUBLISHED / model), component, "meta", torch.bfloat16)
    return sum(parameter.numel() for parameter in network.parameters())


@pytest.mark.slow
@pytest.mark.parametrize(("model", "component"), PARAMETERS)
def test_configs_have_the_published_numbers_of_parameters(model: str, component: str) -> None:
    assert parameters(model, component) == PARAMETERS[model, component]


@pytest.mark.slow
def test_the_reward_is_clip_vit_h() -> None:
    assert sum(p.numel() for p in reward_network("meta").parameters()) == 986_109_441


SLOW = ("stable-diffusion-3.5-large",)  # laid out as medium is


@pytest.mark.parametrize("model", [pytest.param(m, marks=[pytest.mark.slow] * (m in SLOW)) for m in MODELS])
def test_layout_loads_and_runs(model: str, tmp_path) -> None:
    folder = write_layout(model, tmp_path / "model")
    shards = list(folder.glob("*/diffusion_pytorch_model-00001-of-*.safetensors"))
    assert len(shards) == 1  # the denoiser's, in several files with an index
    pipe = DiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    index = json.loads((PUBLISHED / model / "model_index.json").read_text(encoding="utf-8"))
    assert type(pipe).__name__ == index["_class_name"]

    size = {"height": 32, "width": 32, "num_inference_steps": 2}
    family = Layout(folder).family
    if family.name == "flux":
        size |= {"true_cfg_scale": 3.0, "negative_prompt": "b"}
    else:
        size |= {family.guidance_argument: 3.0, "negative_prompt": "b"}
    noise = torch.Generator().manual_seed(0)
    with attach(pipe, AdaptiveProjectedGuidance(3.0)):
        picture = pipe("a cat", **size, generator=noise, output_type="pt").images
    assert picture.shape == (1, 3, 32, 32) and torch.isfinite(picture).all()

    f = GenerationMap(pipe, "a cat", **size)
    z = f.sample_latents(1, torch.Generator().manual_seed(0)).requires_grad_()
    (gradient,) = torch.autograd.grad(f(z).sum(), z)
    assert torch.isfinite(gradient).all() and gradient.abs().sum() > 0

    edit = FlowOptPipeline.from_pipe(pipe)
    edit.set_progress_bar_config(disable=True)
    out = edit(picture, "a dog", "a cat", height=32, width=32, num_inference_steps=3, num_optimization_steps=1)
    assert torch.isfinite(out.latents).all()
