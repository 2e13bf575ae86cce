"""``trimtab generate``: prompts in, pictures out."""

import argparse
import math
import sys
from pathlib import Path
from typing import Any

from trimtab.commands.errors import UsageError, first_line
from trimtab.commands.model import (
    add_model_arguments,
    check_model,
    load_pipeline,
    stated_size_multiple,
)
from trimtab.commands.pictures import append_manifest, check_folder, save_png, slug
from trimtab.commands.words import report_unknown_words

__all__ = ["add_parser", "run"]


def add_parser(subparsers: Any) -> None:
    """Adds the command's arguments."""
    parser = subparsers.add_parser(
        "generate",
        help="pictures of prompts, under a guidance rule",
        description="Writes pictures of prompts as PNG files, each with its prompt, seed and settings in it, "
        "and a line a picture into manifest.jsonl. Picture i of a prompt has seed SEED + i, whatever is "
        "made beside it.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("prompts", nargs="*", metavar="PROMPT", help="what to show")
    add("--prompt-file", metavar="FILE", help="a text file with a prompt a line, besides those given")
    add("--negative-prompt", metavar="TEXT", help="what to guide away from")
    add(
        "--guidance",
        default="apg",
        metavar="NAME",
        help="cfg (the pipeline's own), apg, another that `trimtab info` lists, or a .json file that `trimtab tune` "
        "wrote (default: apg)",
    )
    add(
        "--guidance-scale",
        type=_scale,
        metavar="W",
        help="0 or more (default: the rule's own, such as 10 for apg, 7.5 for cfg, 0.6 for cfg++)",
    )
    add("--num-images", type=_positive, default=1, metavar="N", help="pictures a prompt (default: 1)")
    add("--seed", type=_seed, default=0, metavar="SEED", help="of a prompt's first picture (default: 0)")
    add("--steps", type=_positive, default=20, metavar="N", help="steps of the scheduler (default: 20)")
    add("--height", type=_positive, metavar="PIXELS", help="default: the model's")
    add("--width", type=_positive, metavar="PIXELS", help="default: the model's")
    add("--batch-size", type=_positive, default=4, metavar="N", help="pictures at once (default: 4)")
    add_model_arguments(parser)
    add("--output", default="out", metavar="FOLDER", help="made if missing (default: out)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Makes the pictures.

    Raises:
        UsageError: if an argument cannot be used; nothing was written then.
    """
    prompts = _prompts(args.prompts, args.prompt_file)
    folder = check_folder(args.output)
    model = check_model(args.model)
    _check_size(args, stated_size_multiple(model))

    from trimtab.commands.sampling import check_guidance, sample
    from trimtab.pipelines.families import size_multiple

    args.guidance_scale = check_guidance(args.guidance, args.guidance_scale)
    pipe = load_pipeline(model, args.dtype, args.device)
    _check_size(args, size_multiple(pipe))
    report_unknown_words(pipe, [*prompts, args.negative_prompt or ""])

    from tqdm import tqdm

    jobs = [(index, prompt, args.seed + i) for index, prompt in enumerate(prompts) for i in range(args.num_images)]
    pipe.set_progress_bar_config(desc="steps", leave=False, position=1, disable=None)
    with tqdm(total=len(jobs), desc="pictures", unit="picture", disable=None) as progress:
        for start in range(0, len(jobs), args.batch_size):
            batch = jobs[start : start + args.batch_size]
            images = sample(
                pipe,
                [prompt for _, prompt, _ in batch],
                [seed for _, _, seed in batch],
                guidance=args.guidance,
                guidance_scale=args.guidance_scale,
                steps=args.steps,
                height=args.height,
                width=args.width,
                negative_prompt=args.negative_prompt,
            )
            folder.mkdir(parents=True, exist_ok=True)
            for (index, prompt, seed), image in zip(batch, images, strict=True):
                rule = f"{Path(args.guidance).name.removesuffix('.json')}-{args.guidance_scale:g}"
                path = folder / f"{index:04d}-{slug(prompt)}-{rule}-seed{seed}.png"
                made_by = {"prompt": prompt, "seed": seed, "settings": _settings(args, pipe, image.size)}
                save_png(image, path, made_by)
                append_manifest(folder, {"file": path.name, **made_by})
                tqdm.write(str(path), file=sys.stdout)
                progress.update()


def _settings(args: argparse.Namespace, pipe: Any, size: tuple[int, int]) -> dict[str, Any]:
    return {
        "model": args.model or "bundled",
        "pipeline": type(pipe).__name__,
        "negative_prompt": args.negative_prompt,
        "guidance": args.guidance,
        "guidance_scale": args.guidance_scale,
        "steps": args.steps,
        "width": size[0],
        "height": size[1],
        "dtype": str(pipe.dtype).removeprefix("torch."),
        "device": str(pipe.device),
    }


def _prompts(given: list[str], file: str | None) -> list[str]:
    prompts = list(given)
    if blank := [str(number) for number, prompt in enumerate(prompts, start=1) if not prompt.strip()]:
        raise UsageError(f"a PROMPT must have a word in it; prompt {', '.join(blank)} is blank")
    if file is not None:
        try:
            lines = Path(file).expanduser().read_text(encoding="utf-8").splitlines()
        except OSError as error:
            raise UsageError(f"--prompt-file takes a text file; {file}: {error.strerror}") from None
        except UnicodeDecodeError as error:
            raise UsageError(f"--prompt-file takes UTF-8 text; {file}: {first_line(error)}") from None
        prompts += [line.strip() for line in lines if line.strip()]
    if not prompts:
        where = f"; {file} has no line with a word in it" if file else ""
        raise UsageError(f"give at least one PROMPT or a --prompt-file{where}")
    return prompts


def _check_size(args: argparse.Namespace, multiple: int) -> None:
    for name in ("height", "width"):
        pixels = getattr(args, name)
        if pixels and pixels % multiple:
            near = max(multiple, round(pixels / multiple) * multiple)
            raise UsageError(f"--{name} takes a multiple of {multiple} for this model ({near}, say); got {pixels}")


def _scale(text: str) -> float:
    value = _number(text, float, "a number, 0 or more")
    if not (math.isfinite(value) and value >= 0):
        raise argparse.ArgumentTypeError(f"takes a finite number, 0 or more; got {text}")
    return value


def _positive(text: str) -> int:
    value = _number(text, int, "a whole number, 1 or more")
    if value < 1:
        raise argparse.ArgumentTypeError(f"takes a whole number, 1 or more; got {text}")
    return value


def _seed(text: str) -> int:
    value = _number(text, int, "a whole number, 0 or more")
    if not 0 <= value < 2**63:
        raise argparse.ArgumentTypeError(f"takes a whole number from 0 to 2**63 - 1; got {text}")
    return value


def _number(text: str, kind: Any, takes: str) -> Any:
    try:
        return kind(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"takes {takes}; got {text!r}") from None
