"""The trained point-cloud model that ships: it loads as a stranger would load it, reconstructs and generates."""

import json

import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from tests.tiny_pipelines import NUMPY_IN_SCHEDULERS
from trimtab.assets import asset_path
from trimtab.cli import main
from trimtab.commands.demo_reconstruct import demo_reconstruct
from trimtab.geometry import (
    PointCloudReconstructionPipeline,
    chamfer_distance,
    load_point_cloud,
    normalize_cloud,
    save_point_cloud,
    sliced_wasserstein,
)
from trimtab.pipelines import point_cloud
from trimtab.recipes.point_clouds import TRAIN_CLASSES, draw_cloud

pytestmark = pytest.mark.filterwarnings(NUMPY_IN_SCHEDULERS)


@pytest.fixture(scope="module")
def pipe():
    pipe = PointCloudReconstructionPipeline.from_pretrained(asset_path("point-clouds"))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def held_out(pipe):
    """A shape of each class that training never saw."""
    points = pipe.autoencoder.config.num_points
    return torch.stack([draw_cloud(name, 20, points, test=True) for name in TRAIN_CLASSES])


def test_it_is_a_small_repository_of_safetensors():
    folder = asset_path("point-clouds")
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    assert sum(sizes.values()) <= 8_000_000
    assert {name.rsplit(".")[-1] for name in sizes} == {"json", "md", "safetensors"}


def test_diffusers_loads_it_as_a_custom_pipeline(pipe, held_out):
    custom = {"custom_pipeline": point_cloud.__file__, "trust_remote_code": True}
    loaded = DiffusionPipeline.from_pretrained(asset_path("point-clouds"), **custom)
    assert type(loaded).__name__ == "PointCloudReconstructionPipeline"
    torch.testing.assert_close(loaded(held_out[:2]).clouds, pipe(held_out[:2]).clouds)


def test_reconstructions_are_near_and_tell_shapes_apart(pipe, held_out):
    output = pipe(held_out)
    assert output.distances["sliced_wasserstein"].sqrt().mean() < 0.025
    assert output.distances["chamfer"].mean() < 0.012
    table = sliced_wasserstein(output.clouds, held_out, num_projections=32, directions="quasi", pairwise=True)
    assert torch.equal(table.argmin(1), torch.arange(len(held_out)))


def test_figures_of_the_card_are_the_models(pipe, held_out):
    """Its mean errors over four shapes a class; one a class is near them."""
    figures = json.loads((asset_path("point-clouds") / "figures.json").read_text())
    errors = figures["errors"]["known classes"]
    output = pipe(held_out)
    assert 100 * output.distances["chamfer"].mean().item() == pytest.approx(errors["CD"], rel=0.2)
    assert f"{errors['EMD']:.2f}" in (asset_path("point-clouds") / "README.md").read_text()


def test_drawn_clouds_look_like_shapes_and_differ(pipe, held_out):
    drawn = pipe.generate(24, num_inference_steps=30, generator=torch.Generator().manual_seed(0)).clouds
    near = sliced_wasserstein(drawn, held_out, num_projections=32, directions="quasi", pairwise=True)
    generator = torch.Generator().manual_seed(0)
    codes = torch.randn(24, pipe.autoencoder.config.latent_dim, generator=generator)
    codes = torch.nn.functional.normalize(codes, dim=1)
    random = sliced_wasserstein(pipe.decode(codes), held_out, num_projections=32, directions="quasi", pairwise=True)
    assert near.amin(1).mean() < 0.8 * random.amin(1).mean()
    assert len(near.argmin(1).unique()) >= 8
    between = chamfer_distance(drawn[:12], drawn[12:])
    assert between.min() > 1e-3


def test_command_takes_it_by_default(tmp_path, held_out):
    save_point_cloud(10 * held_out[0] + 3, tmp_path / "bed.ply")
    options = ["--output", str(tmp_path / "out"), "--frames", "0", "--size", "32"]
    assert main(["reconstruct", str(tmp_path / "bed.ply"), *options]) == 0
    made = load_point_cloud(tmp_path / "out" / "bed-reconstruction.ply")
    assert chamfer_distance(normalize_cloud(made)[0], held_out[0]) < 0.02
    assert (made - 3).norm(dim=1).max() > 8  # in the frame of the input


def test_demo_writes_a_turntable(tmp_path):
    path = demo_reconstruct(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {
        "chair.ply",
        *(f"chair-reconstruction.{ending}" for ending in ("ply", "png", "gif")),
    }
    with Image.open(path) as turntable:
        assert turntable.size == (480, 240) and turntable.n_frames == 24
