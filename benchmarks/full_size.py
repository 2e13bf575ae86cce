"""What the published models take: parameters, operations and memory, predicted from their configs or measured.

    python benchmarks/full_size.py                       # on the meta device: no weights, no GPU, some minutes
    python benchmarks/full_size.py --device cuda         # with random weights on a GPU as well: memory and seconds
    python benchmarks/full_size.py --model FLUX.1-dev

The networks are made of the configs in `benchmarks/published`. The parts that a run consists of (a step, a guided step,
decoding, encoding, gradients) are computed on tensors without data while their bytes are counted; a run's peak is that
of its largest part and the weights that lie on the GPU meanwhile. A part's temporaries within one operation, cuDNN's
and cuBLAS's workspaces and fragmentation are not in it; "GPU" adds 5% and 1 GiB for them.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from trimtab.benchmarks.full_size_memory import PeakBytes, fused_attention, measured
from trimtab.benchmarks.full_size_networks import PUBLISHED, Layout, denoiser_call, make_network, reward_network
from trimtab.commands.pictures import write_json
from trimtab.pipelines.gradients import blockwise_checkpointed, checkpointed
from trimtab.pipelines.latents import decode_latents, encode_images

__all__ = ["GPUS", "Parts", "gpu_for", "main", "markdown", "measure", "predict", "run_peaks"]

MODELS = (
    "stable-diffusion-xl-base-1.0",
    "stable-diffusion-3.5-medium",
    "stable-diffusion-3.5-large",
    "FLUX.1-dev",
    "Qwen-Image",
)
GPUS = (8, 12, 16, 24, 32, 40, 48, 80, 141, 180)
"""GiB of common GPUs."""
RENO_STEPS = 1
"""Evaluations of the denoiser under the full gradient. Each is checkpointed: a further one costs one latent."""
_GIB = 2**30


class Parts:
    """The parts of a run, as functions without arguments.

    Args:
        layout: the model.
        pixels: side of the picture.
        device: "meta", "cpu" or "cuda".
        dtype: of the model; the reward is float32.
        reward_folder: another CLIP's config than that of PickScore.
    """

    def __init__(
        self, layout: Layout, pixels: int, device: str, dtype: torch.dtype, reward_folder: Path | None = None
    ) -> None:
        self.layout, self.pixels, self.device, self.dtype = layout, pixels, device, dtype
        self.side = pixels // 8
        self.denoiser = make_network(layout, layout.denoiser, device, dtype)
        self.vae = make_network(layout, "vae", device, dtype)
        self.reward = reward_network(device, folder=reward_folder)
        self.image_size = self.reward.config.vision_config.image_size

    def all(self) -> dict[str, Callable[[], Any]]:
        """By name. A guided step is one call on a batch of two or two calls, as the family's is."""
        return {
            "step": lambda: self.step(1),
            "guided step": self.guided_step,
            "decode": self.decode,
            "encode": self.encode,
            "gradient": self.gradient,
            "jacobian-free gradient": self.reward_gradient,
        }

    def _noise(self, shape: Sequence[int], dtype: torch.dtype | None = None, grad: bool = False) -> Tensor:
        return torch.ones(tuple(shape), device=self.device, dtype=dtype or self.dtype, requires_grad=grad)

    @torch.no_grad()
    def step(self, batch: int) -> Tensor:
        call, shape = denoiser_call(self.denoiser, batch, self.side, self.device, self.dtype)
        return call(self._noise(shape))

    @torch.no_grad()
    def guided_step(self) -> Tensor:
        if self.layout.family.guidance.calls == "batched":
            cond, uncond = self.step(2).float().chunk(2)
        else:
            cond, uncond = self.step(1).float(), self.step(1).float()
        return uncond + 3.0 * (cond - uncond)

    @torch.no_grad()
    def decode(self) -> Tensor:
        return self._picture(self._noise(self._latents()))

    @torch.no_grad()
    def encode(self) -> Tensor:
        return encode_images(self.vae, self.layout.family, self._noise((1, 3, self.pixels, self.pixels)))

    def gradient(self) -> Tensor:
        """Of a reward through `RENO_STEPS` evaluations, each checkpointed, and the decoder, checkpointed by blocks."""
        call, shape = denoiser_call(self.denoiser, 1, self.side, self.device, self.dtype)
        z = self._noise(shape, torch.float32, grad=True)
        x = z.to(self.dtype, copy=True)
        with checkpointed([self.denoiser]):
            for _ in range(RENO_STEPS):
                x = x - call(x)[..., : x.shape[-1]] / RENO_STEPS
        return self._climb(x, z)

    def reward_gradient(self) -> Tensor:
        """Of a reward through the decoder alone, as under `gradient="jacobian-free"`."""
        z = self._noise(self._latents(), torch.float32, grad=True)
        return self._climb(z.to(self.dtype, copy=True), z)

    def _climb(self, x: Tensor, z: Tensor) -> Tensor:
        with blockwise_checkpointed([self.vae]):
            picture = F.interpolate(self._picture(x).float(), size=(self.image_size,) * 2, mode="bicubic")
            features = self.reward.visual_projection(self.reward.vision_model(picture).pooler_output)
            return torch.autograd.grad(features.sum(), z)[0]

    def _picture(self, x: Tensor) -> Tensor:
        return decode_latents(self.vae, self.layout.family, x, self.side, self.side)

    def _latents(self) -> tuple[int, ...]:
        return denoiser_call(self.denoiser, 1, self.side, self.device, self.dtype)[1]


def predict(
    folder: Path, *, pixels: int = 1024, dtype: torch.dtype = torch.bfloat16, reward_folder: Path | None = None
) -> dict[str, Any]:
    """Counts on the meta device.

    Args:
        folder: in the layout of a published repository.
        pixels: side of the picture, a multiple of 16.
        dtype: of the model.
        reward_folder: as for `Parts`.

    Returns:
        "parameters" and "bytes" of the weights by component, "parts" with bytes beyond the weights and flops, and
        "peaks" of the runs, see `run_peaks`.
    """
    layout = Layout(folder)
    parts = Parts(layout, pixels, "meta", dtype, reward_folder)
    networks: dict[str, nn.Module] = {layout.denoiser: parts.denoiser, "vae": parts.vae, "reward": parts.reward}
    networks |= {name: make_network(layout, name, "meta", dtype) for name in layout.text_encoders}
    counted = {}
    for name, compute in parts.all().items():
        with fused_attention():
            with PeakBytes() as memory:
                compute()
            with FlopCounterMode(display=False) as flops:  # apart: its hooks keep activations
                compute()
        counted[name] = {"bytes": memory.peak, "flops": flops.get_total_flops()}
    weights = {name: _bytes(network) for name, network in networks.items()}
    return {
        "pixels": pixels,
        "dtype": str(dtype).removeprefix("torch."),
        "parameters": {name: sum(p.numel() for p in network.parameters()) for name, network in networks.items()},
        "bytes": weights,
        "parts": counted,
        "peaks": run_peaks(layout, weights, {name: part["bytes"] for name, part in counted.items()}, pixels),
    }


def measure(folder: Path, device: str, **options: Any) -> dict[str, dict[str, float]]:
    """Bytes beyond the weights and seconds of each part, with random weights on a device.

    Args:
        folder: as for `predict`, like the options `pixels`, `dtype` and `reward_folder`.
        device: "cuda", or "cpu" for small models.
    """
    pixels, dtype = options.get("pixels", 1024), options.get("dtype", torch.bfloat16)
    parts = Parts(Layout(folder), pixels, device, dtype, options.get("reward_folder"))
    return {name: measured(compute, device) for name, compute in parts.all().items()}


def _bytes(network: nn.Module) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in (*network.parameters(), *network.buffers()))


def run_peaks(layout: Layout, weights: dict[str, int], parts: dict[str, int], pixels: int) -> dict[str, int]:
    """The most bytes that lie on the GPU at once, by run.

    "resident" has all networks there; "offloaded" is `enable_model_cpu_offload`: one network at a time, and under the
    full gradient the denoiser and the autoencoder together, as the backward pass goes through both. FlowOpt holds two
    latents in float32 beside its sampler's. The reward stays on the GPU where there is one.
    """
    denoiser, vae, reward = weights[layout.denoiser], weights["vae"], weights["reward"]
    text = max((weights[name] for name in layout.text_encoders), default=0)
    everything = sum(weights.values()) - reward
    latents = 2 * 4 * 16 * (pixels // 8) ** 2
    step, guided, decode = parts["step"], parts["guided step"], parts["decode"]
    full, free = parts["gradient"], parts["jacobian-free gradient"]
    return {
        "sampling, resident": everything + max(step, decode),
        "sampling, offloaded": max(text, denoiser + step, vae + decode),
        "guidance, resident": everything + max(guided, decode),
        "guidance, offloaded": max(text, denoiser + guided, vae + decode),
        "FlowOpt, resident": everything + latents + max(guided, decode, parts["encode"]),
        "FlowOpt, offloaded": max(text, denoiser + guided + latents, vae + latents + max(decode, parts["encode"])),
        "ReNO, checkpointed, resident": everything + reward + max(full, decode),
        "ReNO, checkpointed, offloaded": reward + max(text, denoiser + vae + full),
        "ReNO, jacobian-free, resident": everything + reward + max(step, free),
        "ReNO, jacobian-free, offloaded": reward + max(text, denoiser + step, vae + free),
    }


def gpu_for(peak: int) -> int | None:
    """GiB of the smallest common GPU that holds a peak with 5% and 1 GiB to spare; None where none does."""
    return next((size for size in GPUS if peak * 1.05 + _GIB <= size * _GIB), None)


def markdown(results: dict[str, dict[str, Any]]) -> str:
    """The README's table: GiB at the peak and the smallest common GPU, offloaded and resident."""
    runs = ("sampling", "guidance", "FlowOpt", "ReNO, jacobian-free", "ReNO, checkpointed")
    lines = ["| model | " + " | ".join(runs) + " |", "|---" * (len(runs) + 1) + "|"]
    for name, result in results.items():
        cells = []
        for run in runs:
            sizes = []
            for where in ("offloaded", "resident"):
                peak = result["peaks"][f"{run}, {where}"]
                gpu = gpu_for(peak)
                sizes.append(f"{peak / _GIB:.0f} → {'none' if gpu is None else gpu}")
            cells.append("; ".join(sizes))
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Predicts, measures where a device is given, writes JSON after each model, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", choices=MODELS, help="several times for several; all by default")
    parser.add_argument("--pixels", type=int, default=1024, help="side of the picture")
    parser.add_argument("--device", default="meta", help="cuda: measures as well")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "full_size.json")
    options = parser.parse_args()
    results = json.loads(options.out.read_text(encoding="utf-8")) if options.out.is_file() else {}
    for name in options.model or MODELS:
        results[name] = predict(PUBLISHED / name, pixels=options.pixels)
        if options.device != "meta":
            found = measure(PUBLISHED / name, options.device, pixels=options.pixels)
            parts = results[name]["parts"]
            ratios = {part: parts[part]["bytes"] / max(1, found[part]["bytes"]) for part in parts}
            results[name]["measured"] = {"device": _device_name(options.device), "parts": found, "ratio": ratios}
        options.out.parent.mkdir(parents=True, exist_ok=True)
        write_json(options.out, results)
        print(name, {run: f"{peak / _GIB:.1f} GiB" for run, peak in results[name]["peaks"].items()}, flush=True)
    print(markdown(results))


def _device_name(device: str) -> str:
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else device


if __name__ == "__main__":
    main()
