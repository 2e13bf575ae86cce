"""How good the bundled model is, on held-out captions: writes ``figures.json`` and the model card beside it.

    python benchmarks/bundled_model.py --write

Every picture is judged by ``trimtab.recipes.emoji_scenes.check_scene``, which shares no weights with the model.
"""

from __future__ import annotations

import argparse
import json
import statistics
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from PIL import Image, ImageDraw, ImageFont
from tqdm.auto import tqdm
from transformers import CLIPModel

from trimtab.assets import asset_path
from trimtab.recipes.emoji_scenes import check_scene, sample_facts, sample_scene, summarize, write_caption
from trimtab.recipes.emoji_scenes.layout import CATEGORIES
from trimtab.recipes.model_card import write_model_card
from trimtab.recipes.train_autoencoder import measure_autoencoder
from trimtab.recipes.train_clip import measure_clip

SEED = 2024
TEXT_TOKENS = 16


def held_out_captions(count: int) -> list[str]:
    """``count`` captions that training never saw, an equal number of each category in turn."""
    rng = np.random.default_rng(SEED)
    return [write_caption(sample_facts(rng, CATEGORIES[i % len(CATEGORIES)], held_out=True)) for i in range(count)]


@torch.no_grad()
def generate(
    pipe: DiffusionPipeline, captions: Sequence[str], guidance_scale: float, *, batch_size: int = 50, **options: object
) -> torch.Tensor:
    """Pictures (N, 3, 128, 128) in [0, 1]; the noise of picture ``i`` comes from its own seed."""
    pipe.set_progress_bar_config(disable=True)
    images = []
    for start in tqdm(range(0, len(captions), batch_size), desc=f"scale {guidance_scale:g}"):
        batch = list(captions[start : start + batch_size])
        generators = [torch.Generator().manual_seed(SEED + start + index) for index in range(len(batch))]
        output = pipe(
            batch,
            num_inference_steps=20,
            guidance_scale=guidance_scale,
            generator=generators,
            output_type="pt",
            **{"max_sequence_length": TEXT_TOKENS, **options},
        )
        images.append(output.images.float().cpu())
    return torch.cat(images)


def judge(images: torch.Tensor, captions: Sequence[str]) -> dict[str, float]:
    """Fractions of pictures that are right, by category."""
    return summarize(check_scene(images, list(captions)))


def judge_of_renders(count: int, autoencoder: AutoencoderKL | None = None) -> float:
    """How often the judge finds a held-out render right, after a round trip through ``autoencoder`` where given."""
    rng = np.random.default_rng(SEED)
    scenes = [sample_scene(rng, held_out=True) for _ in range(count)]
    images = torch.from_numpy(np.stack([scene.render() for scene in scenes])).permute(0, 3, 1, 2)
    if autoencoder is not None:
        with torch.no_grad():
            latents = torch.cat([autoencoder.encode(part * 2 - 1).latent_dist.mode() for part in images.split(32)])
            images = torch.cat([autoencoder.decode(part).sample for part in latents.split(32)])
            images = (images / 2 + 0.5).clamp(0, 1)
    return float(np.mean([verdict.correct for verdict in check_scene(images, [scene.caption for scene in scenes])]))


def seconds_per_image(pipe: DiffusionPipeline, guidance_scale: float, repeats: int = 5) -> float:
    """Median time of one picture, 20 steps with classifier-free guidance."""
    times = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        generate(pipe, ["a cat to the left of an owl on a sky background"], guidance_scale)
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])


def measure(model: Path, clip: Path, count: int, scales: Sequence[float]) -> dict[str, object]:
    """All figures of the model card: the best scale is found on a quarter of the captions, then measured on all."""
    pipe = DiffusionPipeline.from_pretrained(model, dtype=torch.float32)
    if torch.cuda.is_available():
        pipe.to("cuda")
    captions = held_out_captions(count)
    some = captions[: -(-count // 4)]
    by_scale = {f"{scale:g}": judge(generate(pipe, some, scale), some) for scale in scales}
    best = max(by_scale, key=lambda scale: by_scale[scale]["overall"])
    measured = judge(generate(pipe, captions, float(best)), captions)
    few = captions[: -(-count // 10)]
    stock = generate(pipe, few, float(best), max_sequence_length=256)
    vae = pipe.vae.cpu().float()
    figures: dict[str, object] = {
        "num_captions": count,
        "num_inference_steps": 20,
        "seed": SEED,
        "best_guidance_scale": float(best),
        "by_guidance_scale": by_scale,
        "best": measured,
        "stock_call_256_text_tokens": judge(stock, few)["overall"],
        "autoencoder_psnr_db": measure_autoencoder(vae),
        "judge_on_renders": judge_of_renders(count),
        "judge_on_autoencoded_renders": judge_of_renders(count, vae),
        "seconds_per_image": seconds_per_image(pipe, float(best)),
        "threads": torch.get_num_threads(),
        "parameters": {
            name: sum(p.numel() for p in getattr(pipe, name).parameters()) for name in ("transformer", "vae")
        },
    }
    if clip.is_dir():
        figures["clip_tells_altered_captions"] = measure_clip(CLIPModel.from_pretrained(clip, dtype=torch.float32))
    return figures


def contact_sheet(pipe: DiffusionPipeline, guidance_scale: float, columns: int = 6, rows: int = 4) -> Image.Image:
    """Pictures of the first held-out captions, as they come, each under its caption."""
    captions = held_out_captions(columns * rows)
    images = generate(pipe, captions, guidance_scale)
    wide, tall, line = 138, 170, 14
    sheet = Image.new("RGB", (columns * wide, rows * tall), "white")
    draw = ImageDraw.Draw(sheet)
    for index, (image, caption) in enumerate(zip(images, captions, strict=True)):
        left, top = index % columns * wide + 5, index // columns * tall
        words = textwrap.wrap(caption.removesuffix(" background"), 27)
        draw.multiline_text(
            (left, top + 2), "\n".join(words[:3]), fill="black", font=ImageFont.load_default(9), spacing=2
        )
        pixels = (image.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
        sheet.paste(Image.fromarray(pixels), (left, top + 2 * line + 9))
    return sheet


def main() -> None:
    """Measures and prints, and writes with ``--write``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=asset_path("emoji-scenes"))
    parser.add_argument("--clip", type=Path, default=asset_path("emoji-clip"))
    parser.add_argument("--num-captions", type=int, default=400)
    parser.add_argument("--scales", type=float, nargs="+", default=[3.0, 4.0, 5.0, 7.0])
    parser.add_argument("--sheet", type=Path, help="also write a contact sheet of the first captions to this PNG")
    parser.add_argument("--training", default="", help="for the card: how long the training took and on what")
    parser.add_argument("--write", action="store_true", help="write figures.json and README.md into the model's folder")
    options = parser.parse_args()
    figures = measure(options.model, options.clip, options.num_captions, options.scales)
    figures["training"] = options.training
    print(json.dumps(figures, indent=2))
    if options.sheet:
        pipe = DiffusionPipeline.from_pretrained(options.model, dtype=torch.float32)
        contact_sheet(pipe, figures["best_guidance_scale"]).save(options.sheet)
    if options.write:
        path = options.model / "figures.json"
        known = json.loads(path.read_text()) if path.is_file() else {}
        if "distilled" in known:  # measured when it was distilled, not here
            figures["distilled"] = known["distilled"]
        path.write_text(json.dumps(figures, indent=2) + "\n")
        write_model_card(options.model, figures)


if __name__ == "__main__":
    main()
