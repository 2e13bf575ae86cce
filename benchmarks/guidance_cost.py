"""What guidance costs: the rule against Diffusers' own, and a pipeline's step with and without attach().

The claims: the rule in raw space is at least 1.8 times as fast as Diffusers' APG on the same tensors; a guided step
takes at most 1.01 times the pipeline's own with plain guidance, or at most 1 ms more.

    python benchmarks/guidance_cost.py                            # the rule, and a small SD3 with random weights
    python benchmarks/guidance_cost.py --model assets/emoji-scenes
    python benchmarks/guidance_cost.py --architecture sd3.5-large --device cuda --dtype bfloat16
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import diffusers
import torch
from diffusers import DiffusionPipeline
from diffusers.guiders.adaptive_projected_guidance import MomentumBuffer, normalized_guidance

from trimtab.guidance import AdaptiveProjectedGuidance, attach

PAIRS = 50


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def paired(
    first: Callable[[], object],
    second: Callable[[], object],
    device: str,
    pairs: int,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[list[float], list[float]]:
    """Seconds of both, run in turn so that the machine's other work meets both."""
    times: tuple[list[float], list[float]] = ([], [])
    for function in (first, second):
        function()
    for _ in range(pairs):
        for function, kept in zip((first, second), times, strict=True):
            synchronize(device)
            start = clock()
            function()
            synchronize(device)
            kept.append(clock() - start)
    return times


def rule_cost(device: str, pairs: int, clock: Callable[[], float] = time.perf_counter) -> dict[str, float]:
    """Both guiders' rule on (1, 16, 128, 128) float32, momentum and rescaling on, as at each step of a run."""
    cond, uncond = torch.randn(2, 1, 16, 128, 128, generator=torch.Generator().manual_seed(0)).to(device)
    buffer = MomentumBuffer(-0.5)
    guider = AdaptiveProjectedGuidance(8.0, space="raw")
    step = iter(range(10**9))

    def theirs() -> None:
        normalized_guidance(cond, uncond, 7.0, buffer, 0.0, 15.0, use_original_formulation=True)

    def ours() -> None:
        guider.set_state(next(step), 10**9, None)
        guider.combine(cond, uncond)

    diffusers_s, ours_s = map(statistics.median, paired(theirs, ours, device, pairs, clock))
    return {"diffusers_ms": 1e3 * diffusers_s, "ours_ms": 1e3 * ours_s, "speedup": diffusers_s / ours_s}


def make(architecture: str, device: str, dtype: torch.dtype) -> tuple[DiffusionPipeline, dict]:
    """A pipeline of this architecture with random weights, and the arguments of its call."""
    generator = torch.Generator().manual_seed(0)

    def embedding(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    with torch.device(device):
        if architecture == "sdxl":
            denoiser = diffusers.UNet2DConditionModel(
                sample_size=128,
                block_out_channels=(320, 640, 1280),
                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
                up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
                transformer_layers_per_block=(1, 2, 10),
                attention_head_dim=(5, 10, 20),
                cross_attention_dim=2048,
                addition_embed_type="text_time",
                addition_time_embed_dim=256,
                projection_class_embeddings_input_dim=2816,
                use_linear_projection=True,
            )
        else:
            large = architecture == "sd3.5-large"
            denoiser = diffusers.SD3Transformer2DModel(
                sample_size=128 if large else 16,
                num_layers=38 if large else 8,
                attention_head_dim=64 if large else 32,
                num_attention_heads=38 if large else 8,
                caption_projection_dim=2432 if large else 256,
                joint_attention_dim=4096 if large else 128,
                pooled_projection_dim=2048 if large else 128,
                in_channels=16,
                out_channels=16,
                pos_embed_max_size=192 if large else 16,
            )
    denoiser = denoiser.to(dtype).eval()
    vae = diffusers.AutoencoderKL(latent_channels=4 if architecture == "sdxl" else 16)
    call: dict = {"output_type": "latent", "guidance_scale": 7.0}
    if architecture == "sdxl":
        scheduler = diffusers.EulerDiscreteScheduler()
        pipe: DiffusionPipeline = diffusers.StableDiffusionXLPipeline(
            vae, None, None, None, None, denoiser, scheduler, add_watermarker=False
        )
        widths, pooled, tokens = 2048, 1280, 77
        call |= {"height": 1024, "width": 1024, "target_size": (1024, 1024), "original_size": (1024, 1024)}
        pipe.vae_scale_factor = 8
    else:
        pipe = diffusers.StableDiffusion3Pipeline(
            denoiser, diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), vae, *(None,) * 6
        )
        pipe.vae_scale_factor = 8
        large = architecture == "sd3.5-large"
        widths, pooled, tokens = (4096, 2048, 333) if large else (128, 128, 32)
        side = 1024 if large else 128
        call |= {"height": side, "width": side}
    for name in ("prompt", "negative_prompt"):
        prefix = "" if name == "prompt" else "negative_"
        call[f"{name}_embeds"] = embedding(1, tokens, widths)
        call[f"{prefix}pooled_prompt_embeds"] = embedding(1, pooled)
    return pipe.to(device), call


def step_cost(
    pipe: DiffusionPipeline, call: dict, device: str, pairs: int, steps: int, clock: Callable[[], float]
) -> dict[str, float]:
    """Milliseconds a step under the pipeline's own guidance and under attach(APG), whole runs in turn.

    Medians, and the fastest of each, which other work on the machine disturbs least.
    """
    pipe.set_progress_bar_config(disable=True)

    def own() -> None:
        pipe(num_inference_steps=steps, generator=torch.Generator().manual_seed(0), **call)

    def guided() -> None:
        with attach(pipe, AdaptiveProjectedGuidance(7.0)):
            own()

    times = paired(own, guided, device, pairs, clock)
    own_ms, guided_ms = (1e3 * statistics.median(kept) / steps for kept in times)
    fastest, fastest_guided = (1e3 * min(kept) / steps for kept in times)
    return {
        "own_ms": own_ms,
        "attached_ms": guided_ms,
        "ratio": guided_ms / own_ms,
        "extra_ms": guided_ms - own_ms,
        "fastest_own_ms": fastest,
        "fastest_attached_ms": fastest_guided,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "float16", "bfloat16"))
    parser.add_argument("--architecture", default="small", choices=("small", "sdxl", "sd3.5-large"))
    parser.add_argument("--model", help="a folder or Hub id in place of an architecture with random weights")
    parser.add_argument("--prompt", default="a cat to the left of an owl on a sky background")
    parser.add_argument("--pairs", type=int, default=PAIRS)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="one thread's CPU time instead of time passed, for a machine with other work",
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype)
    clock = time.perf_counter
    if args.cpu_time:
        torch.set_num_threads(1)
        clock = time.process_time
    rule = rule_cost(args.device, args.pairs, clock)
    if args.model:
        pipe = DiffusionPipeline.from_pretrained(args.model, dtype=dtype).to(args.device)
        call = {"prompt": args.prompt, "output_type": "latent", "guidance_scale": 7.0}
    else:
        pipe, call = make(args.architecture, args.device, dtype)
    step = step_cost(pipe, call, args.device, args.pairs, args.steps, clock)
    name = args.model or args.architecture
    print(
        f"rule, raw space, (1, 16, 128, 128) float32 on {args.device}: Diffusers {rule['diffusers_ms']:.3f} ms, "
        f"ours {rule['ours_ms']:.3f} ms, {rule['speedup']:.2f} times as fast"
    )
    print(
        f"step of {name}, {args.dtype} on {args.device}: own {step['own_ms']:.2f} ms, attached "
        f"{step['attached_ms']:.2f} ms, ratio {step['ratio']:.4f}, {step['extra_ms']:+.3f} ms "
        f"(median of {args.pairs} pairs of {args.steps} steps); fastest {step['fastest_own_ms']:.2f} and "
        f"{step['fastest_attached_ms']:.2f} ms"
    )
    settings = {key: str(value) for key, value in vars(args).items() if key != "out"}
    settings |= {"torch": torch.__version__, "threads": str(torch.get_num_threads())}
    args.out.mkdir(parents=True, exist_ok=True)
    suffix = Path(name).name.replace(".", "")
    path = args.out / f"guidance_cost_{suffix}.json"
    path.write_text(json.dumps({"settings": settings, "rule": rule, "step": step}, indent=2) + "\n")
    print(f"written to {path}")


if __name__ == "__main__":
    main()
