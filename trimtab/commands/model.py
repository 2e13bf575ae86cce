"""Checks a model before anything is loaded, and loads it."""

import argparse
import json
import re
import struct
from pathlib import Path
from typing import Any

from trimtab.commands.errors import UsageError, first_line
from trimtab.commands.json_lines import given_path

__all__ = [
    "BUNDLED",
    "add_model_arguments",
    "check_model",
    "load_pipeline",
    "stated_size_multiple",
]

BUNDLED = "emoji-scenes"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds ``--model``, ``--dtype`` and ``--device``."""
    add = parser.add_argument
    add("--model", metavar="MODEL", help="a Diffusers folder or a Hub id (default: the bundled model)")
    add(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="auto is bfloat16 on CUDA and float32 elsewhere",
    )
    add("--device", default="auto", metavar="DEVICE", help="such as cpu, cuda:1, mps (default: what there is)")


def check_model(model: str | None) -> str:
    """What ``from_pretrained`` is to be given for a model, once its files were found whole.

    Args:
        model: a folder in the Diffusers layout or a Hub id; None is the bundled model.

    Returns:
        The folder's path or the Hub id.

    Raises:
        UsageError: if it is neither, or a file of the folder is missing its end.
    """
    if model is None:
        from trimtab.assets import asset_path

        try:
            folder = asset_path(BUNDLED)
        except FileNotFoundError as error:
            raise UsageError(f"the bundled model is not there: {error}; give one with --model") from None
    else:
        folder = given_path(model, "--model")
        if not folder.exists() and _HUB_ID.fullmatch(model):
            return model
    if not folder.is_dir():
        found = "is a file" if folder.exists() else "does not exist"
        raise UsageError(f"--model takes a folder with a model_index.json or a Hub id like owner/name; {model} {found}")
    _read_json(folder / "model_index.json", "--model takes a folder with a model_index.json")
    for path in sorted(folder.rglob("*.safetensors")):
        _check_safetensors(path)
    return str(folder)


def stated_size_multiple(model: str) -> int:
    """What height and width of a model's pictures must be a multiple of, read from its configs.

    Args:
        model: what :func:`check_model` returned.

    Returns:
        Pixels a latent times latents a patch; 1 where the configs are not on this disk or do not tell.
    """
    folder = Path(model)
    vae = _config(folder / "vae")
    channels = vae.get("block_out_channels") or vae.get("encoder_block_out_channels") or [1]
    patch = _config(folder / "transformer").get("patch_size", 1)
    return 2 ** (len(channels) - 1) * (patch if isinstance(patch, int) else max(patch))


def load_pipeline(model: str, dtype: str, device: str) -> Any:
    """Loads a stock pipeline, from safetensors alone and with no code of the model's.

    Args:
        model: what :func:`check_model` returned.
        dtype: ``"auto"`` (bfloat16 on CUDA, else float32) or a floating-point type of torch by its name.
        device: ``"auto"`` (the accelerator if there is one) or a device of torch.

    Returns:
        The pipeline, on the device.

    Raises:
        UsageError: if the device is not there or the model cannot be loaded.
    """
    import diffusers
    import torch
    import transformers

    from trimtab.pipelines.families import family_of

    if device == "auto":
        found = torch.accelerator.current_accelerator(check_available=True)
        device = found.type if found else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UsageError(f"--device {device} cannot be used: {first_line(error)}") from None
    if dtype == "auto":
        dtype = "bfloat16" if device.startswith("cuda") else "float32"

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    verbosity = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()  # it advises torchvision, which no pipeline here needs
    try:
        pipe = diffusers.DiffusionPipeline.from_pretrained(
            model, dtype=getattr(torch, dtype), use_safetensors=True, trust_remote_code=False
        )
    except Exception as error:  # a broken model raises nearly anything, from KeyError to SafetensorError
        raise UsageError(f"--model {model} cannot be loaded: {first_line(error)}") from error
    finally:
        transformers.utils.logging.set_verbosity(verbosity)
    try:
        family_of(pipe)
    except ValueError as error:
        raise UsageError(f"--model {model}: {first_line(error)}") from None
    if not hasattr(pipe, "image_processor"):
        raise UsageError(f"--model takes a model of pictures; {model} is a {type(pipe).__name__}")
    return pipe.to(device)


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    return _read_json(path, "a config must be JSON") if path.is_file() else {}


def _read_json(path: Path, takes: str) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"{takes}; {path.parent} has none") from None
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{takes}; {path} is no JSON: {first_line(error)}") from None
    if not isinstance(content, dict):
        raise UsageError(f"{takes}; {path} holds no JSON object")
    return content


def _check_safetensors(path: Path) -> None:
    """Compares a file's size with what its header says: a cut download is told before loading starts."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        header = file.read(length) if 8 + length <= size else b""
    try:
        ends = [int(entry["data_offsets"][1]) for name, entry in json.loads(header).items() if name != "__metadata__"]
        wanted = 8 + length + max(ends, default=0)
    except (AttributeError, LookupError, TypeError, ArithmeticError, ValueError, RecursionError):
        raise UsageError(f"{path} is no whole safetensors file (its header is cut or broken)") from None
    if size != wanted:
        raise UsageError(f"{path} is no whole safetensors file: {size} bytes, {wanted} by its header")
