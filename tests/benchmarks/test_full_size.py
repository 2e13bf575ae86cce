"""Memory that is counted without data against memory that is measured with them."""

import json

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from tests.published_layouts import CLIP, write_layout
from trimtab.benchmarks import full_size
from trimtab.benchmarks.full_size_memory import PeakBytes, fused_attention, measured
from trimtab.benchmarks.full_size_networks import PUBLISHED, Layout

GIB = 2**30


def deep(device: str) -> tuple[torch.nn.Module, torch.Tensor]:
    """Six linear layers, each with a GELU after it, and an input."""
    with torch.device(device):
        layers = [layer for _ in range(6) for layer in (torch.nn.Linear(256, 256), torch.nn.GELU())]
        return torch.nn.Sequential(*layers).requires_grad_(False), torch.ones(64, 256, requires_grad=True)


def test_counted_bytes_are_the_activations() -> None:
    network, x = deep("meta")
    with torch.no_grad(), PeakBytes() as memory:
        network(x)
    assert (memory.live, memory.peak) == (0, 2 * x.nbytes)  # a layer's input and output; no weight
    with PeakBytes() as memory:
        y = network(x)
    assert memory.live == 6 * x.nbytes + y.nbytes  # the GELUs' inputs, kept for the backward pass


def test_counted_without_data_is_what_is_allocated_with_them() -> None:
    def backward(device: str):
        network, x = deep(device)
        return lambda: torch.autograd.grad(network(x).square().sum(), x)

    compute = backward("meta")
    with PeakBytes() as memory:
        compute()
    assert measured(backward("cpu"), "cpu", 1)["bytes"] == pytest.approx(memory.peak, rel=0.02)


def test_attention_takes_no_table_of_scores() -> None:
    q = torch.empty(1, 2, 512, 64, device="meta")
    with fused_attention(), PeakBytes() as memory, FlopCounterMode(display=False) as flops:
        F.scaled_dot_product_attention(q, q, q)
    assert memory.peak < 1.5 * q.nbytes < 2 * 512 * 512 * 4
    assert flops.get_total_flops() == 2 * (2 * 512 * 512 * 64) * 2
    assert F.scaled_dot_product_attention(*torch.ones(3, 1, 1, 2, 4)).shape == (1, 1, 2, 4)  # as it was


@pytest.mark.slow
@pytest.mark.parametrize("model", ["stable-diffusion-3.5-medium", "FLUX.1-dev"])
def test_prediction_is_near_the_measurement(model: str, tmp_path) -> None:
    folder = write_layout(model, tmp_path / "model", weights=False)
    config = json.loads((PUBLISHED / "CLIP-ViT-H-14" / "config.json").read_text(encoding="utf-8"))
    for part in ("text_config", "vision_config"):
        config[part] |= CLIP | {"image_size": 28}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    options = {"pixels": 128, "dtype": torch.float32, "reward_folder": tmp_path}
    predicted = full_size.predict(folder, **options)
    found = full_size.measure(folder, "cpu", **options)
    ratios = {name: predicted["parts"][name]["bytes"] / found[name]["bytes"] for name in found}
    assert {name: ratio for name, ratio in ratios.items() if not 0.9 < ratio < 1.1} == {}


def test_a_run_peaks_at_its_largest_part() -> None:
    layout = Layout(PUBLISHED / "stable-diffusion-xl-base-1.0")
    weights = {"unet": 50, "vae": 2, "text_encoder": 3, "text_encoder_2": 60, "reward": 10}
    parts = {"step": 4, "guided step": 7, "decode": 9, "encode": 8, "gradient": 40, "jacobian-free gradient": 20}
    peaks = full_size.run_peaks(layout, weights, parts, pixels=0)
    assert peaks == {
        "sampling, resident": 115 + 9,
        "sampling, offloaded": 60,
        "guidance, resident": 115 + 9,
        "guidance, offloaded": 60,
        "FlowOpt, resident": 115 + 9,
        "FlowOpt, offloaded": 60,
        "ReNO, checkpointed, resident": 125 + 40,
        "ReNO, checkpointed, offloaded": 10 + 50 + 2 + 40,
        "ReNO, jacobian-free, resident": 125 + 20,
        "ReNO, jacobian-free, offloaded": 10 + 60,
    }


def test_the_smallest_gpu_has_room_to_spare() -> None:
    assert full_size.gpu_for(6 * GIB) == 8
    assert full_size.gpu_for(7 * GIB) == 12
    assert full_size.gpu_for(10**15) is None
