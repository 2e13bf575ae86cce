"""Arguments of public functions and pipelines: a named ValueError or TypeError, or a result without a NaN."""

import inspect

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tests.guidance.test_rules import apply
from tests.hostile.cases import CASES, tried
from tests.tiny_pipelines import NUMPY_IN_SCHEDULERS, tiny_pipeline
from trimtab.geometry import (
    chamfer_distance,
    earth_movers_distance,
    max_sliced_wasserstein,
    sinkhorn_divergence,
    sliced_wasserstein,
)
from trimtab.guidance import GUIDERS, make_guider
from trimtab.pipelines import FlowOptPipeline, NoiseOptimizationPipeline
from trimtab.pipelines.images import fit_images, load_images, load_masks, size_of_batch
from trimtab.rewards import CallableReward

pytestmark = pytest.mark.filterwarnings(NUMPY_IN_SCHEDULERS)

NUMBERS = st.floats(width=32) | st.integers(-3, 9) | st.sampled_from([1e30, -1e30, 2**31, 10**40])
ANYTHING = (
    NUMBERS | st.none() | st.booleans() | st.text(max_size=3) | st.lists(NUMBERS, max_size=2) | st.binary(max_size=2)
)


def tensors(shape: st.SearchStrategy[tuple[int, ...]], dtypes: list[torch.dtype]) -> st.SearchStrategy[torch.Tensor]:
    def make(shape: tuple[int, ...], dtype: torch.dtype, seed: int, scale: float, odd: list[float]) -> torch.Tensor:
        values = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale
        for i, value in enumerate(odd[: values.numel()]):
            values.view(-1)[i] = value
        return values.to(dtype)

    odd = st.lists(st.sampled_from([0.0, float("nan"), float("inf"), -float("inf"), 1e30, -1.0]), max_size=2)
    scale = st.sampled_from([0.0, 1e-30, 1e-3, 1.0, 1e3, 1e25])
    return st.builds(make, shape, st.sampled_from(dtypes), st.integers(0, 9), scale, odd | st.just([]))


CLOUDS = st.sampled_from([(5, 3), (2, 5, 3), (2, 4, 3), (1, 1, 1), (2, 0, 3), (3,), (5, 2), (0, 3), (1, 5, 3)])
DISTANCES = [chamfer_distance, earth_movers_distance, max_sliced_wasserstein, sinkhorn_divergence, sliced_wasserstein]


@CASES
@pytest.mark.filterwarnings("ignore")  # of POT, where costs overflow
def test_distances(cases):
    types = [torch.float32, torch.float64, torch.float16, torch.int64, torch.bool]

    @tried(cases)
    @given(st.sampled_from(DISTANCES), tensors(CLOUDS, types), tensors(CLOUDS, types), st.data())
    def holds(distance, x, y, data):
        takes = sorted(set(inspect.signature(distance).parameters) & {"p", "root", "num_projections", "squared"})
        options = {name: data.draw(ANYTHING, label=name) for name in takes if data.draw(st.integers(0, 3)) == 0}
        if isinstance(options.get("num_projections"), (int, float)) and abs(options["num_projections"]) > 100:
            options["num_projections"] = 100  # more are more work, as asked for
        try:
            value = distance(x, y, **options)
        except (ValueError, TypeError) as error:
            assert "`" in str(error)
        else:
            assert not bool(value.isnan().any()), (distance.__name__, x, y, options, value)

    holds()


@CASES
def test_guidance_rules(cases):
    """Finite predictions, however large, small or alike, are not made NaN."""
    shapes = st.sampled_from([(1, 4, 4, 4), (2, 3, 4, 6), (1, 1, 2, 2)])

    @tried(cases)
    @given(st.sampled_from(sorted(GUIDERS)), st.floats() | st.floats(0, 20), shapes, st.data())
    def holds(name, scale, shape, data):
        try:
            guider = make_guider(name, scale)
        except ValueError as error:
            assert "guidance_scale" in str(error)
            return
        given_, kinds = [], st.sampled_from(["zero", "small", "large", "plain"])
        for seed in range(3):
            noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
            given_.append(noise * {"zero": 0.0, "small": 1e-20, "large": 1e4, "plain": 1.0}[data.draw(kinds)])
        if data.draw(st.booleans()):
            given_[1] = given_[0]
        x = torch.randn(shape, generator=torch.Generator().manual_seed(7))
        assert bool(apply(guider, *given_, x=x).isfinite().all()) or scale > 1e20, (name, scale)

    holds()


@CASES
def test_arrays_as_pictures(cases):
    shapes = st.lists(st.integers(0, 5), max_size=5).map(tuple)
    kinds = st.sampled_from(["uint8", "float32", "float64", "int64", "bool", "complex64", "U1", "object"])

    def make(shape: tuple[int, ...], kind: str, value: float, tensor: bool) -> object:
        with np.errstate(all="ignore"):
            array = np.full(shape, value if kind not in ("U1", "object") else "a").astype(kind)
        numeric = kind not in ("U1", "object")
        return torch.from_numpy(array) if tensor and numeric else array

    values = st.sampled_from([0.0, 0.5, 1.0, 2.0, -1.0, float("nan"), float("inf")])
    sources = st.builds(make, shapes, kinds, values, st.booleans())
    modes = st.sampled_from(["1", "L", "LA", "I", "F", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "LAB", "I;16"])
    sources |= st.builds(lambda mode, size: Image.new(mode, size), modes, st.tuples(*[st.integers(0, 40)] * 2))

    @tried(cases)
    @given(st.lists(sources, max_size=3) | sources, sources, st.sampled_from([1, 8, 16]))
    @pytest.mark.filterwarnings("ignore")
    def holds(pictures, mask, multiple):
        try:
            images = load_images(pictures)
            masks = load_masks(mask, images)
            size = size_of_batch(images, 32 * 32, multiple)
            batch = fit_images([*images, *masks], size)
        except (ValueError, TypeError) as error:
            assert "image" in str(error), repr(error)
        else:
            assert batch.shape[1:] == (3, size[1], size[0]) and bool(((batch >= 0) & (batch <= 1)).all())

    holds()


FLOWOPT = {
    "strength": ANYTHING,
    "num_inference_steps": st.integers(-1, 3) | st.none() | st.text(max_size=2) | st.just(1.5),
    "num_optimization_steps": st.integers(-1, 2) | st.none() | st.floats(),
    "step_size": ANYTHING,
    "guidance_scale": ANYTHING,
    "source_guidance_scale": ANYTHING,
    "acceleration": st.sampled_from(["none", "anderson", "inverse", "newton", None, 3]),
    "locality": ANYTHING,
    "height": st.sampled_from([None, 8, 16, 18, -8, 0, "8", 8.0]),
    "width": st.sampled_from([None, 8, 16, 17]),
    "output_type": st.sampled_from(["pt", "latent", "np", "pil", "jpeg", None]),
    "prompt": st.text(max_size=5) | st.lists(st.text(max_size=3), max_size=2) | st.none() | st.integers(),
    "mask_image": st.none()
    | st.just("none.png")
    | st.builds(Image.new, st.just("L"), st.just((16, 16)), st.integers(0, 255)),
    "blend": st.sampled_from([None, "none", "feather", "poisson", "smear"]),
}
OPTIMIZE = {
    "num_optimization_steps": st.integers(-1, 2) | st.none() | st.floats() | st.booleans(),
    "optimizer": st.sampled_from(["gradient", "best-of-n", "consensus", "directional", "newton", None, 3]),
    "gradient": st.sampled_from(["full", "jacobian-free", "half", None]),
    "preset": st.sampled_from([None, "paper", "none", "none.json", 3]),
    "num_images_per_prompt": st.integers(-1, 2) | st.text(max_size=1),
    "batch_size": st.integers(-1, 2) | st.none() | st.floats(),
    "guidance_scale": ANYTHING,
    "num_inference_steps": st.integers(-1, 3) | st.none() | st.text(max_size=2),
    "monitor_patience": st.integers(-1, 2) | st.none(),
    "optimizer_kwargs": st.none()
    | st.dictionaries(st.sampled_from(["lr", "max_grad_norm", "x"]), ANYTHING, max_size=2),
    "output_type": st.sampled_from(["pt", "latent", "np", "jpeg", None]),
    "prompt": st.text(max_size=5) | st.lists(st.text(max_size=3), max_size=2) | st.none() | st.integers(),
}


@CASES
@pytest.mark.filterwarnings("ignore")  # what a run ends with is told so
def test_arguments_of_pipelines(cases):
    stock = tiny_pipeline("sd3")
    edit = FlowOptPipeline.from_pipe(stock)
    red = CallableReward(lambda images, prompts: images[:, 0].mean((1, 2)), True)
    optimize = NoiseOptimizationPipeline.from_pipe(stock, reward=red)
    for pipe in (edit, optimize):
        pipe.set_progress_bar_config(disable=True)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8))

    @tried(cases)
    @given(st.booleans(), st.data())
    def holds(edits, data):
        arguments = FLOWOPT if edits else OPTIMIZE
        names = data.draw(st.lists(st.sampled_from(sorted(arguments)), max_size=3, unique=True))
        options = {"prompt": "a cat", "num_inference_steps": 1, "num_optimization_steps": 1, "output_type": "pt"}
        options |= {"max_sequence_length": 8} | {name: data.draw(arguments[name], label=name) for name in names}
        try:
            if edits:
                result = edit(picture, **options).images
            else:
                result = optimize(**options, generator=torch.Generator().manual_seed(0)).images
        except (ValueError, TypeError, FloatingPointError, FileNotFoundError) as error:
            assert str(error)
        except RuntimeError as error:  # within a run, where numbers grew too large
            assert "not finite" in str(error)
        else:
            if not isinstance(result, list):
                assert bool(torch.as_tensor(result).isfinite().all()), options

    holds()
