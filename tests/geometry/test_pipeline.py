"""The autoencoder, the flow, the pipeline that is made of them, and its command."""

import json

import numpy as np
import pytest
import torch
import trimesh
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from PIL import Image

from tests.tiny_pipelines import NUMPY_IN_SCHEDULERS
from trimtab.cli import main
from trimtab.geometry import (
    LatentFlow,
    PointCloudAutoencoder,
    PointCloudReconstructionPipeline,
    chamfer_distance,
    load_point_cloud,
    normalize_cloud,
    save_point_cloud,
)
from trimtab.pipelines import point_cloud

pytestmark = pytest.mark.filterwarnings(NUMPY_IN_SCHEDULERS)
POINTS = torch.randn(3, 80, 3, generator=torch.Generator().manual_seed(0))


def autoencoder(**options):
    torch.manual_seed(0)
    small = {"num_points": 40, "latent_dim": 16, "encoder_channels": (16, 32), "decoder_channels": (32,), **options}
    return PointCloudAutoencoder(**small).eval()


@pytest.fixture(scope="module")
def pipe():
    flow = LatentFlow(16, hidden_dim=16, num_layers=1, latent_deviation=0.25).eval()
    pipe = PointCloudReconstructionPipeline(autoencoder(), flow, FlowMatchEulerDiscreteScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_autoencoder_is_the_papers():
    """Layer by layer: 3-64-64-64-128-1024, 256 of unit length, 1024-1024-3 m, tanh."""
    model = PointCloudAutoencoder()
    shapes = [tuple(p.shape[:2]) for name, p in model.named_parameters() if p.ndim > 1]
    encoder = [(64, 3), (64, 64), (64, 64), (128, 64), (1024, 128), (256, 1024)]
    assert shapes == [*encoder, (1024, 256), (1024, 1024), (3 * 2048, 1024)]
    assert torch.equal(model.to_points.bias, torch.full((3 * 2048,), 0.01))
    output = model.eval().encode(POINTS)
    torch.testing.assert_close(output.latents.norm(dim=1), torch.ones(3))
    assert model.decode(output.latents).sample.abs().max() <= 1


def test_autoencoder_does_not_see_the_order_of_points():
    model = autoencoder()
    torch.testing.assert_close(model.encode(POINTS).latents, model.encode(POINTS.flip(1)).latents)
    assert model.encode(POINTS[:, :1]).latents.shape == (3, 16)


def test_autoencoder_learns_and_saves(tmp_path):
    model = autoencoder().train()
    clouds = normalize_cloud(POINTS)[0]
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    first = None
    for _ in range(60):
        loss = chamfer_distance(model(clouds).sample, clouds).mean()
        first = first or loss.item()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.5 * first
    model.eval().save_pretrained(tmp_path)
    assert [path.suffix for path in sorted(tmp_path.iterdir())] == [".json", ".safetensors"]
    loaded = PointCloudAutoencoder.from_pretrained(tmp_path)
    assert not loaded.training
    torch.testing.assert_close(loaded(clouds).sample, model(clouds).sample)


def test_autocast_leaves_coordinates_exact():
    with torch.autocast("cpu", torch.bfloat16):
        assert autoencoder()(POINTS).sample.dtype is torch.float32


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: m.encode(POINTS[0]), ValueError, r"`sample` must have shape \(B, N, 3\)"),
        (lambda m: m.encode(POINTS[..., :2]), ValueError, r"`sample` must have shape \(B, N, 3\), got \(3, 80, 2\)"),
        (lambda m: m.encode(POINTS / 0), ValueError, "`sample` must be finite"),
        (lambda m: m.encode(POINTS.long()), TypeError, "`sample` must have a floating-point"),
        (lambda m: m.decode(POINTS[0]), ValueError, r"`latents` must have shape \(B, 16\)"),
    ],
)
def test_autoencoder_refuses(call, error, message):
    with pytest.raises(error, match=message):
        call(autoencoder())


def test_reconstructions_come_in_the_inputs_frame(pipe):
    output = pipe(POINTS)
    moved = pipe(10 * POINTS + 5)
    assert output.clouds.shape == (3, 40, 3) and output.latents.shape == (3, 16)
    torch.testing.assert_close(moved.clouds, 10 * output.clouds + 5, rtol=1e-3, atol=1e-3)
    for name in ("chamfer", "sliced_wasserstein"):
        torch.testing.assert_close(moved.distances[name], output.distances[name], rtol=1e-3, atol=1e-5)
    tupled = pipe(POINTS, return_dict=False)
    torch.testing.assert_close(tupled[0], output.clouds)


def test_distances_are_between_unit_clouds(pipe):
    points = POINTS[0, :40]
    output = pipe(points)
    unit = normalize_cloud(points)[0]
    decoded = pipe.decode(pipe.encode(points).latents)
    torch.testing.assert_close(output.distances["chamfer"], chamfer_distance(unit[None], decoded))


def test_inputs_of_every_kind_and_size(pipe, tmp_path):
    sphere = trimesh.creation.icosphere()
    sphere.export(tmp_path / "sphere.stl")
    save_point_cloud(POINTS[0], tmp_path / "cloud.ply")
    sources = [tmp_path / "sphere.stl", str(tmp_path / "cloud.ply"), sphere, POINTS[1].numpy(), POINTS[2, :7]]
    output = pipe(sources)
    assert output.clouds.shape == (5, 40, 3)
    for index, source in enumerate(sources):
        torch.testing.assert_close(pipe(source).clouds[0], output.clouds[index], rtol=1e-4, atol=1e-5)
    assert pipe([[0.0, 0, 0], [1, 0, 0]]).clouds.shape == (1, 40, 3)


def test_interpolation_goes_from_one_to_the_other_on_the_sphere(pipe):
    output = pipe.interpolate(POINTS[0], POINTS[1], num_clouds=5)
    ends = pipe.encode(POINTS[:2]).latents
    torch.testing.assert_close(output.latents[[0, 4]], ends)
    torch.testing.assert_close(output.latents.norm(dim=1), torch.ones(5))
    steps = (output.latents[1:] * output.latents[:-1]).sum(1)
    torch.testing.assert_close(steps, steps[:1].expand(4))
    plain = PointCloudReconstructionPipeline(autoencoder(normalize_latents=False))
    codes = plain.interpolate(POINTS[0], POINTS[1], num_clouds=3).latents
    torch.testing.assert_close(codes[1], (codes[0] + codes[2]) / 2)


def test_generation(pipe):
    first, again = (pipe.generate(4, num_inference_steps=3, generator=torch.Generator().manual_seed(0)) for _ in "ab")
    assert first.clouds.shape == (4, 40, 3) and torch.equal(first.clouds, again.clouds)
    torch.testing.assert_close(first.latents.norm(dim=1), torch.ones(4))
    with pytest.raises(ValueError, match="`generate` needs a flow"):
        PointCloudReconstructionPipeline(autoencoder()).generate()
    with pytest.raises(ValueError, match="must be at least 1"):
        pipe.generate(0)


def test_a_straight_flow_is_sampled_exactly():
    """Where all data are one code the velocity is known, and Euler's steps end at the code."""
    goal = torch.randn(8, generator=torch.Generator().manual_seed(0))

    class Straight(LatentFlow):
        def forward(self, sample, timestep, return_dict=True):
            sigma = (timestep / 1000).clamp_min(1e-6)[:, None]
            return point_cloud.BaseOutput(sample=(sample - goal) / sigma)

    flow = Straight(8, hidden_dim=8, num_layers=1)
    model = autoencoder(latent_dim=8, normalize_latents=False)
    pipe = PointCloudReconstructionPipeline(model, flow, FlowMatchEulerDiscreteScheduler())
    pipe.set_progress_bar_config(disable=True)
    latents = pipe.generate(3, num_inference_steps=7).latents
    torch.testing.assert_close(latents, goal.expand(3, -1), rtol=1e-3, atol=1e-4)


def test_refusals(pipe):
    with pytest.raises(ValueError, match="`clouds` must hold at least one cloud"):
        pipe([])
    with pytest.raises(ValueError, match="finite"):
        pipe(POINTS / 0)
    with pytest.raises(FileNotFoundError, match="nowhere.ply"):
        pipe("nowhere.ply")
    with pytest.raises(ValueError, match="`num_clouds` must be at least 2"):
        pipe.interpolate(POINTS[0], POINTS[1], num_clouds=1)


@pytest.mark.parametrize("whole", [True, False])
def test_loads_as_a_custom_pipeline(pipe, tmp_path, whole):
    saved = pipe if whole else PointCloudReconstructionPipeline(autoencoder())
    saved.save_pretrained(tmp_path)
    assert list(tmp_path.rglob("*.bin")) == [] and (tmp_path / "autoencoder" / "config.json").is_file()
    custom = {"custom_pipeline": point_cloud.__file__, "trust_remote_code": True}
    loaded = DiffusionPipeline.from_pretrained(tmp_path, **custom)
    assert type(loaded).__name__ == "PointCloudReconstructionPipeline"
    assert isinstance(loaded.autoencoder, PointCloudAutoencoder)
    torch.testing.assert_close(loaded(POINTS).clouds, saved(POINTS).clouds)
    own = PointCloudReconstructionPipeline.from_pretrained(tmp_path)
    torch.testing.assert_close(own(POINTS).clouds, saved(POINTS).clouds)
    if whole:
        own.set_progress_bar_config(disable=True)
        draw = lambda p: p.generate(2, num_inference_steps=2, generator=torch.Generator().manual_seed(0))  # noqa: E731
        torch.testing.assert_close(draw(own).clouds, draw(pipe).clouds)
    else:
        assert own.flow is None


def test_half_precision(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    half = PointCloudReconstructionPipeline.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.autoencoder.dtype is torch.bfloat16
    clouds = half(POINTS).clouds
    assert clouds.dtype is torch.float32
    torch.testing.assert_close(clouds, pipe(POINTS).clouds, rtol=0.1, atol=0.1)


@pytest.fixture
def model(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def test_command(model, tmp_path, capsys):
    source, out = tmp_path / "A Chair.ply", tmp_path / "out"
    save_point_cloud(POINTS[0], source)
    trimesh.creation.box().export(tmp_path / "box.stl")
    small = ["--model", model, "--output", str(out), "--frames", "3", "--size", "32"]
    assert main(["reconstruct", str(source), str(tmp_path / "box.stl"), *small]) == 0
    names = {f"{stem}-reconstruction.{ending}" for stem in ("a-chair", "box") for ending in ("ply", "png", "gif")}
    assert {path.name for path in out.iterdir()} == names | {"manifest.jsonl"}
    lines = [json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines()]
    assert [line["files"][0] for line in lines] == ["a-chair-reconstruction.ply", "box-reconstruction.ply"]
    assert lines[0]["figures"]["chamfer"] > 0 and lines[0]["settings"]["file"] == str(source)
    assert load_point_cloud(out / "a-chair-reconstruction.ply").shape == (40, 3)
    with Image.open(out / "box-reconstruction.gif") as image:
        assert image.size == (64, 32) and image.n_frames == 3
    with Image.open(out / "box-reconstruction.png") as image:
        assert image.size == (64, 32) and np.asarray(image).std() > 0
    before = (out / "box-reconstruction.ply").stat().st_mtime_ns
    capsys.readouterr()
    assert main(["reconstruct", str(source), str(tmp_path / "box.stl"), *small]) == 0
    assert "2 of 2 clouds are in" in capsys.readouterr().err
    assert (out / "box-reconstruction.ply").stat().st_mtime_ns == before


def test_command_never_mixes_files_up(model, tmp_path, capsys):
    """Sources of one name get files of their own, none overwrites its source, and other settings do the work again."""
    for folder, cloud in (("a", POINTS[0]), ("b", POINTS[1])):
        (tmp_path / folder).mkdir()
        save_point_cloud(cloud, tmp_path / folder / "chair.xyz")
    out, sources = tmp_path / "a", [str(tmp_path / folder / "chair.xyz") for folder in "ab"]
    small = ["--model", model, "--output", str(out), "--frames", "0", "--size", "32", "--format", "xyz"]
    for _ in range(2):
        assert main(["reconstruct", *sources, *small]) == 0
    torch.testing.assert_close(load_point_cloud(sources[0]), POINTS[0])
    stems = ("chair-reconstruction", "chair-reconstruction-2")
    assert {path.name for path in out.glob("*.xyz")} == {"chair.xyz", *(f"{stem}.xyz" for stem in stems)}
    clouds = [load_point_cloud(out / f"{stem}.xyz") for stem in stems]
    assert not torch.allclose(*clouds)
    capsys.readouterr()
    assert main(["reconstruct", sources[0], *small, "--seed", "1"]) == 0
    assert not torch.allclose(load_point_cloud(out / f"{stems[0]}.xyz"), clouds[0])
    assert main(["reconstruct", sources[0], *small]) == 0
    assert "are in" not in capsys.readouterr().err
    torch.testing.assert_close(load_point_cloud(out / f"{stems[0]}.xyz"), clouds[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["nowhere.ply"], "there is no nowhere.ply"),
        (["{cloud}", "--frames", "-1"], "--frames takes a whole number, 0 or more; got -1"),
        (["{cloud}", "--size", "3"], "--size takes a whole number, 16 or more"),
        (["{cloud}", "--model", "nowhere"], "--model takes a folder"),
        (["{cloud}", "--device", "cuda:99"], "--device cuda:99 cannot be used"),
        (["{broken}"], "broken.ply cannot be read as PLY"),
    ],
)
def test_command_refuses(model, tmp_path, capsys, options, message):
    save_point_cloud(POINTS[0], tmp_path / "cloud.ply")
    (tmp_path / "broken.ply").write_bytes(b"ply\n\xff")
    names = {"cloud": str(tmp_path / "cloud.ply"), "broken": str(tmp_path / "broken.ply")}
    options = [option.format(**names) for option in options]
    defaults = [] if "--model" in options else ["--model", model]
    assert main(["reconstruct", *options, *defaults, "--output", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
