"""Shapes, loaders, losses and the recipe of the point-cloud model."""

import json

import h5py
import numpy as np
import pytest
import torch
import trimesh

from tests.tiny_pipelines import NUMPY_IN_SCHEDULERS
from trimtab.geometry import (
    PointCloudAutoencoder,
    PointCloudReconstructionPipeline,
    chamfer_distance,
    sliced_wasserstein,
)
from trimtab.recipes import train_point_clouds as recipe
from trimtab.recipes.point_clouds import (
    CLASSES,
    LOSSES,
    TRAIN_CLASSES,
    TRANSFER_CLASSES,
    ShapePool,
    build_loss,
    draw_cloud,
    load_modelnet,
    load_shapenet,
    make_shape,
)
from trimtab.recipes.point_clouds.losses import adaptive_sliced_wasserstein
from trimtab.recipes.point_clouds.model_card import measure_model, nearest_neighbour_accuracy, write_card
from trimtab.recipes.training_loop import TrainingSettings

pytestmark = pytest.mark.filterwarnings(NUMPY_IN_SCHEDULERS)


def test_there_are_classes_to_train_on_and_others_for_transfer():
    assert len(TRAIN_CLASSES) >= 20 and len(TRANSFER_CLASSES) >= 8
    assert not set(TRAIN_CLASSES) & set(TRANSFER_CLASSES)
    with pytest.raises(ValueError, match="`name` must be one of bed"):
        make_shape("teapot", np.random.default_rng(0))


@pytest.mark.parametrize("name", CLASSES)
def test_shapes_are_sound(name):
    """Faces are of vertices that are there; clouds are centred, of unit radius, repeatable, and vary."""
    for seed in range(3):
        mesh = make_shape(name, np.random.default_rng(seed))
        assert mesh.faces.min() >= 0 and mesh.faces.max() < len(mesh.vertices) and np.isfinite(mesh.vertices).all()
    cloud = draw_cloud(name, 0, 512)
    torch.testing.assert_close(cloud.mean(0), torch.zeros(3), rtol=0, atol=1e-5)
    assert cloud.norm(dim=1).max().item() == pytest.approx(1.0, abs=1e-5)
    assert torch.equal(cloud, draw_cloud(name, 0, 512))
    for other in (draw_cloud(name, 1, 512), draw_cloud(name, 0, 512, test=True)):
        assert chamfer_distance(cloud, other) > 1e-4
    assert (cloud.std(0) > 0.01).all()  # no flat shapes


def test_a_shape_is_nearer_to_its_class_than_to_others():
    """One nearest neighbour by SW on clean shapes: far above the chance of 1 in 31."""
    names = list(CLASSES)
    reference = torch.stack([draw_cloud(name, number, 256) for name in names for number in range(4)])
    queries = torch.stack([draw_cloud(name, 50, 256) for name in names])
    table = sliced_wasserstein(queries, reference, num_projections=24, directions="quasi", pairwise=True)
    right = (table.argmin(1) // 4 == torch.arange(len(names))).float().mean()
    assert right > 0.6


def test_pool_draws_normalized_clouds_by_the_generator():
    pool = ShapePool(["chair", "mug"], 3, 600)
    assert pool.clouds.shape == (6, 600, 3) and pool.labels.tolist() == [0, 0, 0, 1, 1, 1]
    first, again = (pool.draw(5, 128, torch.Generator().manual_seed(0)) for _ in "ab")
    assert torch.equal(first, again) and first.shape == (5, 128, 3)
    torch.testing.assert_close(first.norm(dim=-1).amax(-1), torch.ones(5))


def test_modelnet_layouts(tmp_path):
    rng = np.random.default_rng(0)
    packed = tmp_path / "modelnet40_ply_hdf5_2048"
    packed.mkdir()
    for split, count in (("train", 4), ("test", 2)):
        with h5py.File(packed / f"ply_data_{split}0.h5", "w") as file:
            file["data"] = rng.standard_normal((count, 2048, 3)).astype(np.float32)
            file["label"] = np.arange(count)[:, None] % 3
    (packed / "shape_names.txt").write_text("airplane\nbathtub\nbed\n")
    clouds, labels, names = load_modelnet(packed, num_points=256)
    assert clouds.shape == (4, 256, 3) and labels.tolist() == [0, 1, 2, 0] and names == ["airplane", "bathtub", "bed"]
    torch.testing.assert_close(clouds.norm(dim=-1).amax(-1), torch.ones(4))
    assert len(load_modelnet(packed, split="test")[0]) == 2

    meshes = tmp_path / "ModelNet40"
    for name, split in (("chair", "train"), ("chair", "test"), ("bed", "train")):
        folder = meshes / name / split
        folder.mkdir(parents=True)
        trimesh.creation.box().export(folder / f"{name}_0001.off")
    clouds, labels, names = load_modelnet(meshes, num_points=64)
    assert clouds.shape == (2, 64, 3) and labels.tolist() == [0, 1] and names == ["bed", "chair"]

    texts = tmp_path / "modelnet40_normal_resampled"
    (texts / "bed").mkdir(parents=True)
    for number in (1, 2):
        np.savetxt(texts / "bed" / f"bed_000{number}.txt", rng.standard_normal((50, 6)), delimiter=",")
    (texts / "modelnet40_train.txt").write_text("bed_0001\n")
    (texts / "modelnet40_test.txt").write_text("bed_0002\n")
    clouds, _, names = load_modelnet(texts, num_points=64)
    assert clouds.shape == (1, 64, 3) and names == ["bed"]


def test_shapenet_layouts(tmp_path):
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        folder = tmp_path / "pc15k" / "03001627" / split
        folder.mkdir(parents=True)
        np.save(folder / "abc.npy", rng.standard_normal((150, 3)).astype(np.float32))
    clouds, labels, names = load_shapenet(tmp_path / "pc15k", num_points=100)
    assert clouds.shape == (1, 100, 3) and labels.tolist() == [0] and names == ["03001627"]
    assert len(load_shapenet(tmp_path / "pc15k", split=None, num_points=100)[0]) == 2

    folder = tmp_path / "v2" / "02691156" / "1a2b" / "models"
    folder.mkdir(parents=True)
    trimesh.creation.icosphere(1).export(folder / "model_normalized.obj")
    assert load_shapenet(tmp_path / "v2", split=None, num_points=64)[0].shape == (1, 64, 3)

    np.savez(tmp_path / "all.npz", data=rng.standard_normal((3, 80, 3)))
    assert load_shapenet(tmp_path / "all.npz", num_points=50)[0].shape == (3, 50, 3)


def test_loaders_refuse(tmp_path):
    with pytest.raises(FileNotFoundError, match="no clouds in"):
        load_shapenet(tmp_path)
    with pytest.raises(FileNotFoundError, match="no clouds in"):
        load_modelnet(tmp_path)
    np.savez(tmp_path / "a.npz", points=np.zeros((2, 3)))
    with pytest.raises(ValueError, match="no array `data`"):
        load_shapenet(tmp_path / "a.npz")
    np.savez(tmp_path / "b.npz", data=np.zeros((2, 3)))
    with pytest.raises(ValueError, match=r"`data` must have shape \(M, N, 3\)"):
        load_shapenet(tmp_path / "b.npz")


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_of_the_table_trains(name):
    """One step of both players from the same start: finite, and the reconstruction moves."""
    torch.manual_seed(0)
    small = {"num_points": 32, "latent_dim": 8, "encoder_channels": (8,), "decoder_channels": (16,)}
    module = recipe.ReconstructionLoss(PointCloudAutoencoder(**small), name, num_projections=5)
    settings = TrainingSettings(4, 4, 1e-3)
    optimizers = module.optimizers(settings)
    assert len(optimizers) == (2 if "-" in name and name not in ("v-dsw", "max-sw") else 1)
    before = {key: value.clone() for key, value in module.named_parameters()}
    clouds = ShapePool(["chair"], 4, 64).draw(4, 32, torch.Generator().manual_seed(0))
    cost = module(clouds, 1)
    assert cost > 0 and cost.isfinite()
    cost.backward()
    for optimizer in optimizers:
        optimizer.step()
    assert all(value.isfinite().all() for value in module.parameters())
    assert not torch.equal(before["autoencoder.to_points.weight"], module.autoencoder.to_points.weight)


def test_losses_by_wrong_names_and_adaptive_slices():
    with pytest.raises(ValueError, match="`name` must be one of cd, emd"):
        build_loss("mse", 10)
    x = torch.randn(2, 64, 3, generator=torch.Generator().manual_seed(0))
    y = x + torch.tensor([1.0, 0, 0])
    for tolerance in (0.3, 0.03):
        value = adaptive_sliced_wasserstein(x, y, torch.Generator().manual_seed(0), tolerance=tolerance)
        assert (value - 1 / 3).abs().max() < 4 * tolerance / 3


def test_recipe_from_nothing_and_resumed(tmp_path, monkeypatch, capsys):
    """Two runs that stop at once, then one to the end: a repository that reconstructs and generates."""
    small = {"num_points": 32, "latent_dim": 8, "encoder_channels": (8, 16), "decoder_channels": (16,)}
    preset = recipe.Preset(
        small, TrainingSettings(3, 8, 1e-3), {"hidden_dim": 8, "num_layers": 1}, TrainingSettings(3, 16, 1e-3), 2
    )
    monkeypatch.setitem(recipe.PRESETS, "cpu", preset)
    options = ["--preset", "cpu", "--folder", str(tmp_path / "run"), "--output", str(tmp_path / "model")]
    recipe.main([*options, "--max-seconds", "0"])
    assert "autoencoder: stopped after 0 s" in capsys.readouterr().out
    assert json.loads((tmp_path / "run" / "autoencoder" / "checkpoint.json").read_text())["step"] == 1
    recipe.main([*options, "--steps", "autoencoder", "flow", "assemble"])
    assert sorted(p.name for p in (tmp_path / "model").iterdir()) == [
        "autoencoder",
        "flow",
        "model_index.json",
        "scheduler",
    ]
    pipe = PointCloudReconstructionPipeline.from_pretrained(tmp_path / "model")
    pipe.set_progress_bar_config(disable=True)
    assert pipe.autoencoder.dtype is torch.float32  # stored in half precision, loaded as Diffusers does
    assert pipe(draw_cloud("chair", 0, 100)).clouds.isfinite().all()
    assert pipe.generate(2, num_inference_steps=2).clouds.shape == (2, 32, 3)
    figures = measure_model(pipe, shapes_a_class=1)
    for errors in figures["errors"].values():  # two samples of one surface are nearer than a model of three steps
        assert all(errors[f"{name}, floor"] < errors[name] for name in ("CD", "SW", "EMD"))
    write_card(tmp_path / "model", figures, pipe, "Three steps.")
    card = (tmp_path / "model" / "README.md").read_text()
    assert "back to 32 points" in card and "| new classes |" in card and "Three steps." in card
    assert json.loads((tmp_path / "model" / "figures.json").read_text()) == figures


def test_nearest_neighbours_tell_sets_apart_only_where_they_differ():
    sets = torch.randn(60, 32, 3, generator=torch.Generator().manual_seed(0))
    assert 0.25 < nearest_neighbour_accuracy(sets[:30], sets[30:]) < 0.75
    assert nearest_neighbour_accuracy(sets[:30], 3 * sets[30:]) > 0.95


def test_recalibrated_statistics_are_those_of_the_data():
    torch.manual_seed(0)
    model = PointCloudAutoencoder(num_points=32, encoder_channels=(8,), decoder_channels=(8,))
    pool = ShapePool(["chair", "mug"], 2, 64)
    recipe.recalibrate(model, pool, batches=30)
    clouds = pool.draw(256, 32, torch.Generator().manual_seed(5))
    with torch.no_grad():
        features = model.point_layers[0][0](clouds)
    torch.testing.assert_close(model.point_layers[0][1].running_mean, features.mean((0, 1)), rtol=0, atol=0.02)
    assert not model.training
