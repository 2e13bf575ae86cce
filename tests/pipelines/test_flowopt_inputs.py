"""Pictures and arguments of every kind: handled by a stated rule, or refused by name before any model runs."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.pipelines.test_flowopt_families import flowopt, picture, stock_pipeline
from tests.pipelines.test_generation_map_inputs import watched
from tests.tiny_pipelines import NUMPY_IN_SCHEDULERS
from trimtab.pipelines.images import fit_images, fitted_size, load_image, load_images, load_masks, size_of_batch

pytestmark = pytest.mark.filterwarnings(NUMPY_IN_SCHEDULERS)

RUN = {"num_inference_steps": 2, "num_optimization_steps": 0, "step_size": 0.1, "max_sequence_length": 16}


@pytest.fixture(scope="module")
def pipe():
    return flowopt("sd3", stock_pipeline("sd3"))


def coloured(size: tuple[int, int] = (20, 12)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


# ---- reading -----------------------------------------------------------------------------------------------


def test_kinds_of_pictures_are_read_as_upright_rgb(tmp_path: Path):
    rgb = coloured()
    pixels = np.asarray(rgb)
    for source in (rgb, pixels, pixels / 255, torch.from_numpy(pixels / 255).movedim(-1, 0)):
        assert np.array_equal(np.asarray(load_image(source)), pixels)
    rgb.save(tmp_path / "a.png")
    assert np.array_equal(np.asarray(load_image(tmp_path / "a.png")), pixels)
    assert np.array_equal(np.asarray(load_image(str(tmp_path / "a.png"))), pixels)

    grey = rgb.convert("L")
    for source in (grey, np.asarray(grey), np.asarray(grey)[..., None], torch.from_numpy(np.asarray(grey) / 255)[None]):
        assert np.array_equal(np.asarray(load_image(source)), np.asarray(grey.convert("RGB")))
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    assert np.array_equal(np.asarray(load_image(deep)), np.asarray(grey.convert("RGB")))
    assert load_image(rgb.convert("CMYK")).mode == load_image(rgb.convert("P")).mode == "RGB"
    assert load_image(rgb.convert("1")).mode == "RGB"


def test_transparency_lies_on_white():
    image = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    image.putpixel((0, 0), (255, 0, 0, 255))
    image.putpixel((1, 0), (0, 0, 0, 128))
    read = load_image(image)
    assert [read.getpixel((x, 0)) for x in range(3)] == [(255, 0, 0), (127, 127, 127), (255, 255, 255)]
    palette = Image.new("P", (2, 1))
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.putpixel((1, 0), 1)
    palette.info["transparency"] = 0
    assert [load_image(palette).getpixel((x, 0)) for x in range(2)] == [(255, 255, 255), (0, 0, 255)]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_turns_a_picture_upright(tmp_path: Path, orientation: int):
    upright = coloured((6, 4))
    turn = Image.Transpose
    turns = [turn.FLIP_LEFT_RIGHT, turn.ROTATE_180, turn.FLIP_TOP_BOTTOM, turn.TRANSPOSE, turn.ROTATE_90]
    turns += [turn.TRANSVERSE, turn.ROTATE_270]
    stored = upright if orientation == 1 else upright.transpose(turns[orientation - 2])
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(np.asarray(load_image(tmp_path / "turned.png")), np.asarray(upright))


def test_the_first_frame_of_an_animation(tmp_path: Path):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert load_image(tmp_path / "a.gif").getpixel((0, 0)) == (255, 0, 0)


def test_what_cannot_be_read_is_named(tmp_path: Path):
    (tmp_path / "text.png").write_text("no picture")
    whole = tmp_path / "whole.png"
    coloured((64, 64)).save(whole)
    (tmp_path / "cut.png").write_bytes(whole.read_bytes()[:2000])
    for path, message in (
        (tmp_path / "none.png", "`image` .*none.png does not exist"),
        (tmp_path / "text.png", "`image` .*text.png is no picture"),
        (tmp_path / "cut.png", "`image` .*cut.png is no picture"),
        (tmp_path, "is no picture that can be read"),
    ):
        with pytest.raises(ValueError, match=message):
            load_image(path)
    for value, error, message in (
        (3, TypeError, "`image` is a int; takes a path, a PIL image"),
        (None, TypeError, "`image` is a NoneType"),
        (np.zeros((4, 4, 2)), ValueError, r"`image` is a float64 \(4, 4, 2\) array"),
        (np.zeros((4, 4, 3)) + 2, ValueError, "`image` has a value that is not in"),
        (np.full((4, 4, 3), np.nan), ValueError, "`image` has a value that is not in"),
        (np.zeros((4, 4, 3), dtype=np.int64), ValueError, "`image` has dtype int64"),
        (np.zeros((0, 4, 3), dtype=np.uint8), ValueError, "`image` is a uint8"),
        (torch.zeros(4, 4, 3), ValueError, r"`image` is a torch.float32 \(4, 4, 3\) tensor"),
        (torch.zeros(3, 4, 4, dtype=torch.uint8), ValueError, "`image` is a torch.uint8"),
        ([], ValueError, "`image` is an empty list"),
    ):
        with pytest.raises(error, match=message):
            load_images(value)


# ---- sizes -------------------------------------------------------------------------------------------------


def test_the_rule_of_sizes():
    area, multiple = 1024 * 1024, 16
    for size in ((1024, 1024), (4000, 3000), (300, 900), (1, 1), (12_000, 2000), (37, 41)):
        width, height = fitted_size(size, area, multiple)
        assert width % multiple == height % multiple == 0
        assert abs(width * height / area - 1) < 0.05
        assert abs(width / height / (size[0] / size[1]) - 1) < 0.05
    assert fitted_size((128, 128), 128 * 128, 16) == (128, 128)
    for size in ((12_000, 1000), (10, 100)):
        with pytest.raises(ValueError, match=f"`image` is {size[0]} x {size[1]} pixels; takes sides of at most 8 to 1"):
            fitted_size(size, area, multiple)
    assert size_of_batch([coloured((12_000, 1000))], area, 16, height=64, width=128) == (128, 64)


def test_what_sticks_out_is_cut_off_evenly():
    image = Image.new("RGB", (64, 32), "red")
    image.paste("blue", (16, 0, 48, 32))
    fitted = fit_images([image], (16, 16))[0]
    assert fitted.shape == (3, 16, 16)
    assert fitted[2].min() > 0.9 and fitted[0].max() < 0.1  # the middle, and nothing of the red ends
    exact = coloured((16, 16))
    assert torch.equal(fit_images([exact], (16, 16))[0], torch.from_numpy(np.array(exact)).movedim(-1, 0) / 255)


@pytest.mark.parametrize(
    ("source", "size"),
    [
        (coloured((16, 16)), (16, 16)),
        (coloured((40, 20)), (24, 12)),
        (coloured((1, 1)), (16, 16)),
        (coloured((500, 2000)), (8, 32)),
        (coloured((16, 16)).convert("RGBA"), (16, 16)),
        (coloured((16, 16)).convert("L"), (16, 16)),
    ],
    ids=["same", "wide", "one pixel", "tall", "RGBA", "greyscale"],
)
def test_an_edit_takes_pictures_of_any_size(pipe, source: Image.Image, size: tuple[int, int]):
    result = pipe(source, "a red cat", "a dog", **RUN)
    assert result.images[0].size == size


def test_a_picture_12000_pixels_wide(pipe, tmp_path: Path):
    Image.new("RGB", (12_000, 2000), (10, 200, 30)).save(tmp_path / "wide.jpg", quality=30)
    assert pipe(tmp_path / "wide.jpg", "a red cat", "a dog", **RUN).images[0].size == (40, 8)
    wide = Image.new("RGB", (12_000, 100))
    with watched(pipe) as ran, pytest.raises(ValueError, match="`image` is 12000 x 100 pixels; takes sides of at most"):
        pipe(wide, "a red cat", "a dog", **RUN)
    assert not ran
    assert pipe(wide, "a red cat", "a dog", height=16, width=16, **RUN).images[0].size == (16, 16)


# ---- arguments ---------------------------------------------------------------------------------------------

BAD: list[tuple[type[Exception], str, dict[str, Any]]] = [
    (ValueError, "`strength` is 0; takes a number in", {"strength": 0}),
    (ValueError, "`strength` is 1.2", {"strength": 1.2}),
    (ValueError, "`strength` is nan", {"strength": float("nan")}),
    (TypeError, "`strength` is a str", {"strength": "strong"}),
    (ValueError, "`num_inference_steps` is 0", {"num_inference_steps": 0}),
    (ValueError, "`num_optimization_steps` is -1", {"num_optimization_steps": -1}),
    (TypeError, "`num_optimization_steps` is a float", {"num_optimization_steps": 1.5}),
    (ValueError, "`step_size` is -0.1", {"step_size": -0.1}),
    (ValueError, "`step_size` is nan", {"step_size": float("nan")}),
    (ValueError, "`step_size` has shape", {"step_size": torch.ones(3)}),
    (ValueError, "`guidance_scale` is -1", {"guidance_scale": -1.0}),
    (ValueError, "`source_guidance_scale` is nan", {"source_guidance_scale": float("nan")}),
    (ValueError, "`acceleration` is 'newton'; takes one of none, anderson, inverse", {"acceleration": "newton"}),
    (ValueError, "`selection` is 'best'; takes 'last' or a function", {"selection": "best"}),
    (ValueError, "`selection` is 'residual'; takes 'last' or a function", {"selection": "residual"}),
    (ValueError, "`blend` is 'smear'; takes None, 'none' or one of 'feather', 'poisson'", {"blend": "smear"}),
    (ValueError, "`output_type` is 'jpg'", {"output_type": "jpg"}),
    (ValueError, "`prompt` has 2 prompts for 1 pictures", {"prompt": ["a cat", "a dog"]}),
    (ValueError, "`source_prompt` has 3 prompts for 1 pictures", {"source_prompt": ["a cat"] * 3}),
    (ValueError, "`prompt` is None", {"prompt": None}),
    (TypeError, "`source_prompt`", {"source_prompt": 3}),
    (ValueError, "`prompt` is an empty list", {"prompt": []}),
    (ValueError, "`height` is 18; takes a multiple of 4", {"height": 18, "width": 16}),
    (ValueError, "`height` is 16 and `width` is None; takes both or none", {"height": 16}),
    (TypeError, "`guidance_scales` is no argument of", {"guidance_scales": 1}),
    (TypeError, "`latents` is set by", {"latents": None}),
    (TypeError, "`solver_kwargs` has `steps`; takes memory", {"solver_kwargs": {"steps": 1}}),
    (ValueError, "`memory` is 0", {"solver_kwargs": {"memory": 0}}),
    (TypeError, "`generator` is a int", {"generator": 3}),
    (ValueError, "`image` has pictures of different proportions", {"image": [coloured((16, 16)), coloured((32, 16))]}),
    (ValueError, "`mask_image` has 2 masks for 1 pictures", {"mask_image": [coloured((16, 16))] * 2}),
    (ValueError, "`mask_image` is black everywhere", {"mask_image": Image.new("L", (16, 16))}),
    (ValueError, "`mask_image` is 32 x 16 pixels for a picture of 16 x 16", {"mask_image": coloured((32, 16))}),
    (TypeError, "`mask_image` is a int", {"mask_image": 1}),
]  # fmt: skip


@pytest.mark.parametrize(("error", "message", "options"), BAD, ids=[message[:40] for _, message, _ in BAD])
def test_refused_before_any_model_runs(pipe, error: type[Exception], message: str, options: dict[str, Any]):
    arguments = {"image": picture("sd3"), "prompt": "a cat", "source_prompt": "a dog", **RUN} | options
    with watched(pipe) as ran, pytest.raises(error, match=message):
        pipe(**arguments)
    if "proportions" not in message:
        assert not ran
    if "output_type" in options:
        return
    with pytest.raises(error, match=message):  # at the call of `stream`, not at its first state
        pipe.stream(**arguments)


def test_stream_and_invert_refuse_what_they_do_not_take(pipe):
    with pytest.raises(TypeError, match="`keep_history` is an argument of the call, not of `stream`"):
        pipe.stream(picture("sd3"), "a cat", keep_history=True)
    with pytest.raises(TypeError, match="strength"):
        pipe.invert(picture("sd3"), "a cat", strength=0.5)
    with pytest.raises(ValueError, match="`selection` gives shape"):
        pipe(picture("sd3"), "a cat", "a dog", selection=lambda images, prompts: images, **RUN)


def test_masks_are_read_like_pictures():
    white = Image.new("L", (16, 16), 255)
    images = [coloured((16, 16))] * 2
    assert len(load_masks(white, images)) == 2 and len(load_masks([white, white], images)) == 2
    half = torch.zeros(1, 8, 8)
    half[:, :4] = 1
    assert (
        fit_images(load_masks(half, images), (4, 4), Image.Resampling.BOX).mean(1)[0].tolist()
        == [[1.0] * 4] * 2 + [[0.0] * 4] * 2
    )
