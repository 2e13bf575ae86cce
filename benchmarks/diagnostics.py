"""Pictures of the bundled model's diagnostics: curvature of a reward in noise space, and what attention heads select.

python -m trimtab.benchmarks.diagnostics docs
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from trimtab.assets import asset_path
from trimtab.commands.few_steps import FEW_STEPS_CALL, with_few_steps
from trimtab.commands.pictures import check_folder, save_png, write_json
from trimtab.optim import HeadMargin, attention_margin, margin_picture

PROMPT = "a cat to the left of an owl on a lavender background"
MOST_HEADS = 16


def noise_spectrum(pipe: Any, iterations: int) -> Any:
    """The reward's spectrum at noise that was optimized so long."""
    from trimtab.pipelines import NoiseOptimizationPipeline
    from trimtab.pipelines.noise_curvature import noise_curvature

    made = NoiseOptimizationPipeline.from_pipe(pipe, reward="bundled")
    made.set_progress_bar_config(disable=True)
    call = {**FEW_STEPS_CALL, "max_sequence_length": 16}
    generator = torch.Generator().manual_seed(0)
    found = made(PROMPT, num_optimization_steps=iterations, generator=generator, **call)
    (spectrum,) = noise_curvature(made, PROMPT, found.latents, num_steps=30, **call)
    return spectrum


def text_heads() -> tuple[list[HeadMargin], list[str]]:
    """Heads of the bundled CLIP's text tower, its start token left out, and the words."""
    from transformers import AutoTokenizer

    from trimtab.rewards import load_reward

    tokenizer = AutoTokenizer.from_pretrained(asset_path("emoji-clip"))
    tokens = tokenizer([PROMPT], return_tensors="pt")
    words = tokenizer.convert_ids_to_tokens(tokens["input_ids"][0])
    clip = load_reward("bundled")
    heads = attention_margin(clip.model.text_model, dict(tokens), ignore_tokens=(0,))
    return heads, [word.removesuffix("</w>") for word in words]


def picture_heads(pipe: Any) -> tuple[list[HeadMargin], list[str]]:
    """Heads of the transformer: which words the picture's tokens select in the middle of sampling."""
    tokenizer = pipe.tokenizer
    words = [word.removesuffix("</w>") for word in tokenizer.convert_ids_to_tokens(tokenizer(PROMPT)["input_ids"])]
    size = pipe.transformer.config.sample_size // pipe.transformer.config.patch_size
    image = size * size

    def run() -> None:
        generator = torch.Generator().manual_seed(0)
        pipe(PROMPT, generator=generator, output_type="latent", max_sequence_length=16, **FEW_STEPS_CALL)

    columns = slice(image + 1, image + len(words) - 1)  # without start and end
    heads = attention_margin(
        lambda _: run(), (None,), modules=pipe.transformer, queries=slice(0, image), tokens=columns, max_queries=32
    )
    middle = max(head.call for head in heads) // 2
    return [head for head in heads if head.call == middle and head.row == heads[-1].row], words[1:-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", metavar="FOLDER")
    parser.add_argument("--iterations", type=int, default=15)
    args = parser.parse_args()
    folder = check_folder(args.output)
    folder.mkdir(parents=True, exist_ok=True)

    from diffusers import DiffusionPipeline

    pipe = with_few_steps(DiffusionPipeline.from_pretrained(asset_path("emoji-scenes")))
    pipe.set_progress_bar_config(disable=True)
    made_by, figures = {"prompt": PROMPT}, {}
    for name, (heads, words) in {"text": text_heads(), "picture": picture_heads(pipe)}.items():
        save_png(margin_picture(heads, words, most=MOST_HEADS), Path(folder) / f"attention-{name}.png", made_by)
        selecting = [head for head in heads if head.report.is_selection]
        figures[f"attention-{name}"] = {
            "heads": len(heads),
            "that_select": len(selecting),
            "median_efficiency": _median([h.report.efficiency for h in selecting if h.report.efficiency is not None]),
        }
    spectrum = noise_spectrum(pipe, args.iterations)
    save_png(spectrum.picture("curvature of -reward"), Path(folder) / "curvature.png", made_by)
    figures["curvature"] = {
        "size": spectrum.size,
        "lambda_max": spectrum.lambda_max,
        "lambda_min": spectrum.lambda_min,
        "flat_fraction": spectrum.fraction_below(0.01),
        "max_learning_rate": spectrum.max_learning_rate,
    }
    write_json(Path(__file__).parent / "results" / "diagnostics.json", figures)
    print(json.dumps(figures, indent=2))


def _median(values: list[float]) -> float | None:
    return float(torch.tensor(values).median()) if values else None


if __name__ == "__main__":
    main()
