"""The bundled model's card: what it is, how it was made and what it measures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

_CARD = """\
---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-image
language: en
tags: [stable-diffusion-3, flow-matching, emoji, tiny]
---

# emoji-scenes

A small text-to-image model that runs on a laptop: a flow transformer of {transformer:.1f} million parameters over the
latents of a {vae:.1f} million parameter autoencoder, in the layout of `StableDiffusion3Pipeline`. It draws 56 objects
(32 emoji nouns; circles, squares and hearts in 8 colours) on 8 backgrounds, alone, two to four of a kind, or two in a
relation, at 128x128 pixels. It ships with [trimtab](https://github.com/trimtab/trimtab), whose tests and demos use it.

```python
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("assets/emoji-scenes")
prompt = "a cat to the left of an owl on a sky background"
image = pipe(prompt, num_inference_steps=20, guidance_scale={scale:g}, max_sequence_length=16).images[0]
```

`max_sequence_length=16` is enough for every caption and faster than the stock default of 256, which works as well.

## What it understands

`[a|an|two|three|four] OBJECT(s) on a BACKGROUND background`, or
`a OBJECT to the left of|to the right of|above|below a OBJECT on a BACKGROUND background`.
Words it does not know become `<unk>`: no error, and no meaning.

## Figures

{count} held-out captions (of the tenth of all facts that training never saw, in either wording), {steps} steps,
classifier-free guidance at scale {scale:g}, seed {seed}. A judge that shares no weights with the model decides: it
explains a picture by the known sprites (`trimtab.recipes.emoji_scenes.check_scene`).

| figure | measured | aim |
|---|---|---|
{rows}

By guidance scale, on a quarter of the captions:

| scale | {columns} |
|---|{rules}|
{scales}

{few_steps}## How it was made

`make train` (`python -m trimtab.recipes.train`, seed 0) renders captioned scenes on the fly, trains
the autoencoder, encodes scenes ahead, then trains the transformer together with its text encoders.
{training}

## Limits

It knows 100 English words and one style; it was not trained on people, and says nothing about larger models.

The sprites are Noto Emoji by Google, Apache License 2.0; the weights are under the same licence.
"""

_FEW_STEPS = """\
## In four evaluations

`transformer_4_steps` is the transformer distilled to four evaluations a picture, guidance included, where the call
above makes {evaluations}. Of the same captions it gets {four:.1%} all right: one object {object:.1%},
two objects {two:.1%}, counts {counts:.1%}. Give it the noise levels it was trained at, and no guidance:

```python
from diffusers import SD3Transformer2DModel

few = SD3Transformer2DModel.from_pretrained("assets/emoji-scenes", subfolder="transformer_4_steps")
pipe = DiffusionPipeline.from_pretrained("assets/emoji-scenes", transformer=few)
image = pipe(prompt, sigmas=[1.0, 0.75, 0.5, 0.25], guidance_scale=1.0, max_sequence_length=16).images[0]
```

`python -m trimtab.recipes.distil` made it: {training}

"""

_BARS = (
    ("autoencoder_psnr_db", "autoencoder, held-out scenes", ">= 27 dB"),
    ("background", "background right", ">= 97%"),
    ("one object", "one object right", ">= 85%"),
    ("two objects", "two objects both present", ">= 70%"),
    ("left/right", "left/right right", ">= 60%"),
    ("above/below", "above/below right", ">= 60%"),
    ("counts", "counts right", ">= 60%"),
    ("overall", "all that the caption states and nothing else", ""),
    ("stock_call_256_text_tokens", "all right, with the stock call's 256 text tokens", ""),
    ("seconds_per_image", "one image, float32, {threads} CPU threads", "<= 5 s"),
    ("judge_on_renders", "the judge itself, on held-out renders", ">= 99%"),
    ("judge_on_autoencoded_renders", "the judge after the autoencoder", ">= 97%"),
)


def write_model_card(folder: Path, figures: dict[str, Any]) -> None:
    """Writes ``README.md`` into ``folder``.

    Args:
        folder: the model's.
        figures: as ``benchmarks/bundled_model.py`` measures them; ``"training"`` tells how long it took and on what.
            ``"distilled"``, optional, has the figures of the few-step transformer: ``"four"`` as ``"best"``, and
            its ``"training"``.
    """
    known = {**figures["best"], **figures}
    rows = "\n".join(
        f"| {text.format(**figures)} | {_format(key, known[key])} | {bar} |" for key, text, bar in _BARS if key in known
    )
    columns = list(figures["best"])
    scales = "\n".join(
        f"| {scale} | " + " | ".join(f"{values[name]:.1%}" for name in columns) + " |"
        for scale, values in figures["by_guidance_scale"].items()
    )
    card = _CARD.format(
        transformer=figures["parameters"]["transformer"] / 1e6,
        vae=figures["parameters"]["vae"] / 1e6,
        scale=figures["best_guidance_scale"],
        count=figures["num_captions"],
        steps=figures["num_inference_steps"],
        seed=figures["seed"],
        rows=rows,
        columns=" | ".join(columns),
        rules="|".join("---" for _ in columns),
        scales=scales,
        training=figures["training"],
        few_steps=_few_steps(figures),
    )
    (folder / "README.md").write_text(card)


def _few_steps(figures: dict[str, Any]) -> str:
    """What the distilled transformer measures, where there are figures of it."""
    if "distilled" not in figures:
        return ""
    distilled = figures["distilled"]
    return _FEW_STEPS.format(
        evaluations=2 * figures["num_inference_steps"],
        object=distilled["four"]["one object"],
        four=distilled["four"]["overall"],
        two=distilled["four"]["two objects"],
        counts=distilled["four"]["counts"],
        training=distilled["training"],
    )


def _format(key: str, value: float) -> str:
    if key.endswith("_db"):
        return f"{value:.1f} dB"
    return f"{value:.2f} s" if key.startswith("seconds") else f"{value:.1%}"
