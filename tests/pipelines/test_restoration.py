"""Restoration from measurements with unknown gains: the sensors against dense matrices, and the pipeline at work."""

import copy
import math

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from PIL import Image
from scipy.sparse.linalg import lsqr

from tests.tiny_pipelines import NUMPY_IN_SCHEDULERS, tiny_pipeline
from trimtab.assets import asset_path
from trimtab.optim.solvers import project_gains
from trimtab.pipelines import PatternedSensor, RestorationPipeline, Sensor, ShiftedSensor
from trimtab.pipelines.sensors import least_squares
from trimtab.recipes.emoji_scenes.layout import sample_scene

pytestmark = pytest.mark.filterwarnings(NUMPY_IN_SCHEDULERS)

SHORT = {"max_sequence_length": 16}
SHIFTS = [(0, 0), (3, -2), (-1, 5)]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def shifted(size: int = 16, share: float = 0.8) -> ShiftedSensor:
    return ShiftedSensor(SHIFTS, (torch.rand(3, size, size, generator=generator()) < share).float())


def sensors() -> list[Sensor]:
    return [shifted(), PatternedSensor(16, 16, 60, 3)]


def gains_of(sensor: Sensor, rho: float = 0.5) -> torch.Tensor:
    wave = torch.rand(sensor.gains_shape, generator=generator(3))
    return project_gains(1 + rho * (2 * wave - 1).flatten(), rho).reshape(sensor.gains_shape)


def matrix(sensor: Sensor) -> torch.Tensor:
    units = torch.eye(math.prod(sensor.image_shape)).reshape(-1, *sensor.image_shape)
    return torch.stack([sensor.forward(unit).flatten() for unit in units], 1)


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline("sd3")


def test_a_pixel_of_a_moved_camera_sees_what_lies_under_it():
    sensor, image = shifted(), torch.rand(3, 16, 16, generator=generator(1))
    y = sensor.forward(image)
    for snapshot, (a, b) in enumerate(SHIFTS):
        for row in range(16):
            for column in range(16):
                inside = 0 <= row - a < 16 and 0 <= column - b < 16
                seen = bool(sensor.masks[snapshot, row, column])
                assert inside or not seen
                if seen:
                    assert torch.equal(y[snapshot, :, row, column], image[:, row - a, column - b])
                else:
                    assert not y[snapshot, :, row, column].any()


@pytest.mark.parametrize("index", [0, 1])
def test_adjoints_are_the_transposes(index):
    sensor = sensors()[index]
    A = matrix(sensor)
    y = torch.randn(sensor.measurement_shape, generator=generator(2))
    assert torch.allclose(sensor.adjoint(y).flatten(), A.T @ y.flatten(), atol=1e-4)


def test_patterns_of_a_snapshot_are_orthonormal_and_differ_between_snapshots():
    sensor = PatternedSensor(16, 16, 256, 2)
    A = matrix(sensor).reshape(2, 3, 256, 3, 256)
    for snapshot in range(2):
        assert torch.allclose(A[snapshot, 0, :, 0] @ A[snapshot, 0, :, 0].T, torch.eye(256), atol=1e-4)
        assert torch.equal(A[snapshot, 0, :, 0], A[snapshot, 2, :, 2]) and not A[snapshot, 0, :, 1].any()
    assert (A[0, 0, :, 0] * A[1, 0, :, 0]).sum(1).abs().mean() < 0.2


@pytest.mark.parametrize("index", [0, 1])
def test_least_squares_is_scipys(index):
    sensor = sensors()[index]
    g, image = gains_of(sensor), torch.rand(sensor.image_shape, generator=generator(1))
    y = sensor.measure(image, g, noise_level=0.05, generator=generator(4))
    prior = torch.rand(sensor.image_shape, generator=generator(5))
    found = least_squares(y, sensor, g, prior=prior, weight=0.04, max_iterations=200)
    A = (g * torch.ones(sensor.measurement_shape)).flatten()[:, None].double() * matrix(sensor).double()
    shift = lsqr(A.numpy(), (y.flatten().double() - A @ prior.flatten().double()).numpy(), damp=0.2, atol=1e-12)[0]
    assert np.abs(found.flatten().numpy() - prior.flatten().numpy() - shift).max() < 2e-3


def test_noise_is_of_its_level_and_only_where_anything_is_seen():
    sensor, image = shifted(), torch.rand(3, 16, 16, generator=generator(1))
    noise = sensor.measure(image, noise_level=0.1) - sensor.measure(image)
    seen = sensor.sees().bool()
    assert noise[seen].std() == pytest.approx(0.1, rel=0.1) and not noise[~seen].any()


@pytest.mark.parametrize("index", [0, 1])
def test_a_tiny_pipeline_fits_the_data(pipe, index):
    """Its flow knows nothing; what is left of the data must be about the noise all the same."""
    sensor = sensors()[index]
    image = torch.rand(3, 16, 16, generator=generator(1))
    y = sensor.measure(image, gains_of(sensor), noise_level=0.02)
    restore, states = RestorationPipeline.from_pipe(pipe), []
    restore.set_progress_bar_config(disable=True)
    before = copy.copy(pipe.scheduler.config)
    options = {"num_inference_steps": 4, "output_type": "pt", "guidance_scale": 2.0, "max_sequence_length": 16}
    out = restore(y, sensor, "a red cat", callback_on_iteration_end=lambda p, k, s: states.append(s), **options)
    assert out.images.shape == (1, 3, 16, 16) and out.gains.shape == sensor.gains_shape
    assert out.gains.mean() == pytest.approx(1, abs=1e-4) and (out.gains > 0).all()
    assert [state.step for state in states] == [0, 1, 2, 3] and out.num_function_evaluations == 8
    assert torch.equal(out.residuals, torch.tensor([state.residual for state in states]))
    assert out.residuals[-1] < 0.06 and pipe.scheduler.config == before
    again = restore(y, sensor, "a red cat", **options)
    assert torch.equal(again.images, out.images)  # seed 0, and nothing of the pipeline has changed
    other = restore(y, sensor, "a red cat", generator=generator(7), **options)
    assert not torch.equal(other.images, out.images)
    known = restore(y, sensor, "a red cat", gains=gains_of(sensor), **options)
    assert torch.equal(known.gains, gains_of(sensor))


def test_a_callback_and_the_keyboard_end_a_run(pipe):
    sensor = shifted()
    y = sensor.measure(torch.rand(3, 16, 16, generator=generator(1)))
    restore = RestorationPipeline(pipe)
    restore.set_progress_bar_config(disable=True)
    out = restore(y, sensor, callback_on_iteration_end=lambda p, k, s: k == 1, num_inference_steps=5, **SHORT)
    assert len(out.residuals) == 2 and not out.interrupted and isinstance(out.images[0], Image.Image)

    def interrupt(_pipe, step, _state):
        if step == 2:
            raise KeyboardInterrupt

    out = restore(y, sensor, callback_on_iteration_end=interrupt, num_inference_steps=5, **SHORT)
    assert len(out.residuals) == 3 and out.interrupted


def test_snapshots_may_be_pictures(pipe):
    sensor = shifted(share=1.1)
    y = sensor.measure(torch.rand(3, 16, 16, generator=generator(1)))
    pictures = [Image.fromarray((shot.movedim(0, -1).numpy() * 255).round().astype(np.uint8)) for shot in y]
    restore = RestorationPipeline(pipe)
    restore.set_progress_bar_config(disable=True)
    a, b = (restore(given, sensor, num_inference_steps=2, output_type="np", **SHORT).images for given in (y, pictures))
    assert np.abs(a - b).max() < 0.1


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["shots", "patterns"])
def test_the_bundled_flow_restores_what_calibration_alone_does_not(kind):
    pipe = StableDiffusion3Pipeline.from_pretrained(asset_path("emoji-scenes"), dtype=torch.float32)
    scene = sample_scene(np.random.default_rng(5), held_out=True)
    truth = torch.from_numpy(scene.render()).movedim(-1, 0)
    sensor = PatternedSensor(128, 128, 4096, 6)
    if kind == "shots":
        masks = (torch.rand(4, 128, 128, generator=generator()) < 0.4).float()
        sensor = ShiftedSensor([(0, 0), (17, -23), (-30, 9), (11, 28)], masks)
    g = gains_of(sensor)
    y = sensor.measure(truth, g, noise_level=0.02)
    restore = RestorationPipeline(pipe)
    restore.set_progress_bar_config(disable=True)
    out = restore(y, sensor, scene.caption, output_type="pt", num_inference_steps=8, max_sequence_length=16)

    def psnr(image):
        return -10 * math.log10(float((image.clamp(0, 1) - truth).square().mean()))

    ignored = psnr(least_squares(y, sensor))
    assert psnr(out.images[0]) > 24 and psnr(out.images[0]) > ignored + 6, (psnr(out.images[0]), ignored)
    assert (out.gains - g).norm() < 0.7 * (g - 1).norm()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"measurements": torch.ones(2, 3, 16, 16)}, ValueError, r"`measurements` has shape \(2, 3, 16, 16\)"),
        ({"measurements": torch.full((3, 3, 16, 16), math.nan)}, ValueError, "`measurements` has values that are not"),
        ({"measurements": torch.zeros(3, 3, 16, 16)}, ValueError, "`measurements` is 0 everywhere"),
        ({"measurements": "y"}, TypeError, "`measurements` is a str"),
        ({"sensor": lambda x: x}, TypeError, "`sensor` is a function"),
        ({"sensor": ShiftedSensor([(1, 1)] * 3, torch.ones(16, 16))}, ValueError, "no data can tell the gains"),
        ({"gains": torch.zeros(16, 16)}, ValueError, "`gains` has values that are not finite and > 0"),
        ({"gains": torch.ones(5)}, ValueError, r"`gains` has shape \(5,\)"),
        ({"noise_level": -1.0}, ValueError, "`noise_level` is -1"),
        ({"rho": 0.0}, ValueError, "`rho` is 0"),
        ({"strength": 1.0}, ValueError, "`strength` is 1"),
        ({"num_inference_steps": 0}, ValueError, "`num_inference_steps` is 0"),
        ({"output_type": "latent"}, ValueError, "`output_type` is 'latent'"),
        ({"prompt": ["a", "b"]}, TypeError, "`prompt` is a list"),
        ({"generator": 3}, TypeError, "`generator` is 3"),
        ({"stpes": 3}, TypeError, "`stpes` is no argument"),
    ],
)
def test_bad_input_is_named(pipe, changes, error, message):
    y = torch.ones(3, 3, 16, 16)
    arguments = {"measurements": y, "sensor": shifted(), "num_inference_steps": 2, **changes}
    with pytest.raises(error, match=message):
        RestorationPipeline(pipe)(arguments.pop("measurements"), arguments.pop("sensor"), **arguments)


def test_bad_sensors_and_pipelines_are_named(pipe):
    with pytest.raises(ValueError, match="`shifts` is empty"):
        ShiftedSensor([], torch.ones(4, 4))
    with pytest.raises(ValueError, match=r"`masks` is \(2, 4, 4\) for 1 shifts"):
        ShiftedSensor([(0, 0)], torch.ones(2, 4, 4))
    with pytest.raises(ValueError, match="values other than 0 and 1"):
        ShiftedSensor([(0, 0)], torch.full((4, 4), 0.5))
    with pytest.raises(ValueError, match=r"nothing to see in snapshots \[1\]"):
        ShiftedSensor([(0, 0), (4, 0)], torch.ones(4, 4))
    with pytest.raises(ValueError, match="`num_sensors` is 17"):
        PatternedSensor(4, 4, 17, 1)
    with pytest.raises(ValueError, match="`image` has shape"):
        shifted().measure(torch.ones(3, 8, 8))
    with pytest.raises(ValueError, match="`sensor` sees 15 x 15 pixels"):
        RestorationPipeline(pipe)(torch.ones(2, 3, 15, 15), ShiftedSensor([(0, 0), (1, 1)], torch.ones(15, 15)))
    with pytest.raises(ValueError, match="takes a pipeline with a flow"):
        RestorationPipeline(tiny_pipeline("sdxl"))
