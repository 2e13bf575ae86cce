"""What finetuning on 50 scenes of a bell teaches the bundled model, and what batches that grow save on its loss.

    python -m trimtab.benchmarks.optim.finetune bell --result out/finetune/lora [--captions 24]
    python -m trimtab.benchmarks.optim.finetune batches [--steps 30]

``bell`` judges pictures by the sprites' own templates (trimtab.recipes.emoji_scenes.check_scene), before and after what
``python -m trimtab.recipes.finetune`` wrote is loaded: captions with the bell that are none of the 50, of how many the
objects stated are there and no others ("shown") and of how many all that is stated is right; and captions of known
objects, which tell what was forgotten. ``batches`` trains the same LoRA on as many samples with fixed batches and with
batches that grow by the norm test, and shows loss, steps and processor time; there is no bar.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from diffusers.utils import make_image_grid
from PIL import Image

from trimtab.assets import asset_path
from trimtab.benchmarks.optim.report import RESULTS, Row, write_report
from trimtab.recipes.captioned_pictures import encode_pictures, object_facts, read_pictures, write_object_scenes
from trimtab.recipes.emoji_scenes import CATEGORIES, check_scene, sample_facts, write_caption
from trimtab.recipes.emoji_scenes.new_object import BELL, known_object
from trimtab.recipes.finetune import Finetuning, finetune
from trimtab.recipes.training_loop import TrainingSettings

CALL = {"num_inference_steps": 12, "guidance_scale": 3.0, "max_sequence_length": 16}


def held_out(captions: int) -> tuple[list[str], list[str]]:
    """Captions of the bell that the 50 scenes of seed 0 do not have, and of known objects that no training had."""
    with known_object(BELL):
        seen = {write_caption(facts) for facts in object_facts(BELL, 50, 0)}
        drawn = dict.fromkeys(write_caption(facts) for facts in object_facts(BELL, 12 * captions, 1))
    rng = np.random.default_rng(12)
    known = [write_caption(sample_facts(rng, CATEGORIES[i % len(CATEGORIES)], held_out=True)) for i in range(captions)]
    return [caption for caption in drawn if caption not in seen][:captions], known


def judged(pipe: StableDiffusion3Pipeline, captions: list[str]) -> tuple[dict[str, float], list[Image.Image]]:
    """Shares that show their objects, and that are right in all; one picture a caption, its noise by its number."""
    images = []
    for start in range(0, len(captions), 8):
        part = captions[start : start + 8]
        generators = [torch.Generator().manual_seed(start + number) for number in range(len(part))]
        images += pipe(part, generator=generators, **CALL).images
    with known_object(BELL):
        verdicts = check_scene(images, captions)
    shares = {name: sum(getattr(v, name) for v in verdicts) / len(verdicts) for name in ("shown", "correct")}
    return shares, images


def load(result: Path | None) -> StableDiffusion3Pipeline:
    """The bundled pipeline, with what a finetune wrote."""
    pipe = StableDiffusion3Pipeline.from_pretrained(asset_path("emoji-scenes"), dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    if result is not None and (result / "config.json").exists():
        pipe.transformer = SD3Transformer2DModel.from_pretrained(result, dtype=torch.float32)
    elif result is not None:
        pipe.load_lora_weights(result)
    return pipe


def bell(result: Path, captions: int, pictures: Path | None) -> tuple[list[Row], dict]:
    """Rows of before and after."""
    new, known = held_out(captions)
    figures, grids = {"through the autoencoder alone": ceiling(captions)}, []
    for name, where in (("before", None), ("after", result)):
        pipe = load(where)
        for kind, asked in (("bell", new), ("known", known)):
            figures[f"{name}, {kind}"], images = judged(pipe, asked)
            grids += images[:8]
            print(name, kind, figures[f"{name}, {kind}"], flush=True)
    if pictures is not None:
        make_image_grid(grids, 4, 8).save(pictures)
    rows = []
    for kind, told in (("bell", "the bell's captions"), ("known", "known captions")):
        for what in ("shown", "correct"):
            after, before = figures[f"after, {kind}"][what], figures[f"before, {kind}"][what]
            rows.append(
                Row(f"finetune on 50 scenes, {told}: {what}, after against before", after, before, "no bar", True)
            )
    return rows, {"captions": captions, **figures}


@torch.no_grad()
def ceiling(captions: int) -> dict[str, float]:
    """Shares of rendered scenes of the bell that are still right after the autoencoder, which never saw one."""
    pipe = load(None)
    with TemporaryDirectory() as folder:
        pictures, texts = read_pictures(write_object_scenes(BELL, Path(folder), count=captions, seed=1))
    pixels = pipe.image_processor.preprocess(pictures)
    decoded = pipe.vae.decode(pipe.vae.encode(pixels).latent_dist.mean).sample
    with known_object(BELL):
        verdicts = check_scene((decoded / 2 + 0.5).clamp(0, 1), texts)
    return {name: sum(getattr(v, name) for v in verdicts) / len(verdicts) for name in ("shown", "correct")}


def batches(steps: int) -> tuple[list[Row], dict]:
    """Rows of fixed and growing batches at equal samples."""
    runs = {
        "AdamW, batch 8": ("adamw", 1e-3, 8, 1, 0),
        "AdamW, 4 to 32": ("adamw", 1e-3, 2, 2, 32),
        "AdaGrad-Norm, batch 8": ("adagrad_norm", 0.3, 8, 1, 0),
        "AdaGrad-Norm, 4 to 32": ("adagrad_norm", 0.3, 2, 2, 32),
    }
    figures = {}
    with TemporaryDirectory() as name:
        folder = Path(name)
        pictures = encode_pictures(load(None), *read_pictures(write_object_scenes(BELL, folder / "scenes")))
        for number, (title, (optimizer, rate, micro, accumulation, largest)) in enumerate(runs.items()):
            samples = 8 * steps
            training = TrainingSettings(
                samples // (micro * accumulation), micro, rate, warmup_steps=1, accumulation=accumulation,
                mixed_precision="no", log_every=1, checkpoint_seconds=1e9,
            )  # fmt: skip
            started = time.process_time()
            settings = Finetuning(training, optimizer=optimizer, max_batch_size=largest)
            finetune(load(None), pictures, settings, folder / str(number))
            seconds = time.process_time() - started
            rows = [json.loads(line) for line in (folder / str(number) / "log.jsonl").read_text().splitlines()]
            # the mean over the last quarter of the samples
            last = [row["loss"] for row in rows[-max(1, len(rows) // 4) :]]
            figures[title] = {"loss": sum(last) / len(last), "steps": rows[-1]["step"], "seconds": seconds}
            print(title, figures[title], flush=True)
    out = []
    for optimizer in ("AdamW", "AdaGrad-Norm"):
        fixed, growing = figures[f"{optimizer}, batch 8"], figures[f"{optimizer}, 4 to 32"]
        for what in ("loss", "steps", "seconds"):
            out.append(
                Row(
                    f"finetune, {optimizer}: {what}, growing batch against 8",
                    growing[what],
                    fixed[what],
                    "no bar",
                    True,
                )
            )
    return out, {"samples": 8 * steps, **figures}


def main() -> None:
    """Measures and writes; the other part's rows of the last run are kept."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=("bell", "batches"))
    parser.add_argument("--result", type=Path, default=Path("out/finetune/lora"))
    parser.add_argument("--captions", type=int, default=24)
    parser.add_argument("--pictures", type=Path, help="write eight pictures of each kind, before and after, here")
    parser.add_argument("--steps", type=int, default=30)
    args = parser.parse_args()
    path = RESULTS / "finetune.json"
    parts = json.loads(path.read_text())["settings"] if path.exists() else {}
    rows, details = bell(args.result, args.captions, args.pictures) if args.part == "bell" else batches(args.steps)
    parts[args.part] = {"rows": [vars(row) for row in rows], **details}
    write_report("finetune", [Row(**row) for part in parts.values() for row in part["rows"]], parts)


if __name__ == "__main__":
    main()
