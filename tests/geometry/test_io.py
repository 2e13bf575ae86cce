"""Clouds from files of every kind, and back; pictures of them."""

import json
import struct

import numpy as np
import pytest
import torch
import trimesh
from PIL import Image

from trimtab.geometry import io as cloud_io
from trimtab.geometry import (
    load_point_cloud,
    normalize_cloud,
    render_point_cloud,
    sample_surface,
    save_point_cloud,
    save_turntable,
    turntable,
)

POINTS = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("ending", [".ply", ".obj", ".xyz", ".npz", ".npy", ".glb"])
def test_there_and_back_again(tmp_path, ending):
    save_point_cloud(POINTS, tmp_path / f"cloud{ending}")
    assert [path.name for path in tmp_path.iterdir()] == [f"cloud{ending}"]
    torch.testing.assert_close(load_point_cloud(tmp_path / f"cloud{ending}"), POINTS, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("ending", ["ply", "obj", "stl", "glb", "off"])
def test_meshes_are_sampled_by_area(tmp_path, ending):
    """A long box: each pair of faces gets its share of the points, all of which lie on the surface."""
    box = trimesh.creation.box((4.0, 1.0, 1.0))
    box.export(tmp_path / f"box.{ending}")
    points = load_point_cloud(tmp_path / f"box.{ending}", num_points=9000).numpy()
    half = np.array([2.0, 0.5, 0.5])
    assert points.shape == (9000, 3) and np.abs(np.abs(points) / half).max() < 1 + 1e-5
    on = np.isclose(np.abs(points), half, atol=1e-5)
    assert on.any(1).all()
    np.testing.assert_allclose(on.mean(0), [1 / 9, 4 / 9, 4 / 9], atol=0.02)
    assert len(load_point_cloud(tmp_path / f"box.{ending}")) == 2048


def test_scenes_are_put_together_in_place(tmp_path):
    scene = trimesh.Scene([trimesh.creation.icosphere(radius=0.1).apply_translation((x, 0, 0)) for x in (-5, 5)])
    scene.export(tmp_path / "two.glb")
    for source in (tmp_path / "two.glb", scene):
        points = load_point_cloud(source, num_points=500)
        assert 0.3 < (points[:, 0] > 0).float().mean() < 0.7 and points[:, 0].abs().min() > 4.8


def test_arrays_meshes_and_text(tmp_path):
    assert torch.equal(load_point_cloud(POINTS), POINTS)
    assert torch.equal(load_point_cloud(POINTS.double().numpy()), POINTS)
    assert torch.equal(load_point_cloud(POINTS[None]), POINTS)
    assert torch.equal(load_point_cloud([[0, 1, 2], [3, 4, 5]]), torch.tensor([[0.0, 1, 2], [3, 4, 5]]))
    assert torch.equal(load_point_cloud(trimesh.PointCloud(POINTS.numpy())), POINTS)
    assert load_point_cloud(trimesh.creation.icosphere(), num_points=10).norm(dim=1).min() > 0.9
    (tmp_path / "a.txt").write_text("# x y z nx\n1,2,3,0\n4,5,6,0\n")
    (tmp_path / "b.pts").write_text("1 2 3\n4 5 6\n")
    np.savez(tmp_path / "m.npz", vertices=np.eye(3), faces=[[0, 1, 2]])
    for name in ("a.txt", "b.pts"):
        assert torch.equal(load_point_cloud(tmp_path / name), torch.tensor([[1.0, 2, 3], [4, 5, 6]]))
    torch.testing.assert_close(load_point_cloud(tmp_path / "m.npz", num_points=7).sum(1), torch.ones(7))


def test_choice_of_points_is_the_generators():
    draw = lambda seed: load_point_cloud(POINTS, num_points=9, generator=torch.Generator().manual_seed(seed))  # noqa: E731
    assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))
    assert len({tuple(point) for point in draw(1).tolist()}) == 9
    assert len(load_point_cloud(POINTS, num_points=90)) == 50


def test_huge_clouds_are_subsampled_with_a_notice(tmp_path, monkeypatch):
    monkeypatch.setattr(cloud_io, "_MAX_POINTS", 30)
    np.save(tmp_path / "big.npy", POINTS.numpy())
    with pytest.warns(UserWarning, match="big.npy has 50 points; 30 of them are used"):
        assert load_point_cloud(tmp_path / "big.npy").shape == (30, 3)
    with pytest.warns(UserWarning, match="big.npy has 50 points; 10 of them are used"):
        assert load_point_cloud(tmp_path / "big.npy", num_points=10).shape == (10, 3)


def write(name, content):
    def make(folder):
        path = folder / name
        path.write_bytes(content) if isinstance(content, bytes) else path.write_text(content)
        return path

    return make


PLY = "ply\nformat ascii 1.0\nelement vertex {}\nproperty float x\nproperty float y\nproperty float z\nend_header\n"
FLAT = "v 0 0 0\nv 1 0 0\nv 2 0 0\nf 1 2 3\n"


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda folder: folder / "none.ply", FileNotFoundError, "no file .*none.ply"),
        (write("a.doc", "x"), ValueError, "is read from .ply, .obj"),
        (write("a.ply", b"ply\nformat binary_little_endian 1.0\n\xff\xfe"), ValueError, "cannot be read as PLY"),
        (write("a.ply", PLY.format(100) + "1 2\n"), ValueError, "a.ply"),
        (write("a.ply", PLY.format(0)), ValueError, "a.ply"),
        (write("a.ply", PLY.format(1) + "nan 0 0\n"), ValueError, "a.ply.*finite"),
        (write("a.obj", ""), ValueError, "a.obj"),
        (write("a.obj", FLAT), ValueError, "a.obj.*area"),
        (write("a.stl", b"\x00" * 84), ValueError, "a.stl"),
        (write("a.stl", b"\x00" * 10), ValueError, "a.stl"),
        (write("a.glb", b"glTF" + b"\x00" * 40), ValueError, "cannot be read as GLB"),
        (write("a.off", "OFF\n5 5 0\n"), ValueError, "a.off"),
        (write("a.npz", b"PK\x03\x04nonsense"), ValueError, "cannot be read as NPZ"),
        (write("a.npy", b""), ValueError, "cannot be read as NPY"),
        (write("a.xyz", ""), ValueError, "holds no points"),
        (write("a.xyz", "1 2\n3 4\n"), ValueError, "2 numbers a line"),
        (write("a.xyz", "a b c\n"), ValueError, "cannot be read as XYZ"),
        (write("a.xyz", "1 2 inf\n"), ValueError, "must be finite"),
    ],
)
def test_files_that_cannot_be_used(tmp_path, make, error, message):
    with pytest.raises(error, match=message):
        load_point_cloud(make(tmp_path))


def test_pickles_are_refused(tmp_path):
    np.save(tmp_path / "a.npy", np.array([{}], object), allow_pickle=True)
    with pytest.raises(ValueError, match="cannot be read as NPY: .*pickle"):
        load_point_cloud(tmp_path / "a.npy")


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        (7, TypeError, "`source` must be a path"),
        (np.zeros((3, 2)), ValueError, r"shape \(N, 3\), got \(3, 2\)"),
        (np.zeros((0, 3)), ValueError, "at least one"),
        (np.full((2, 3), np.nan), ValueError, "finite"),
        (np.array([["a", "b", "c"]]), TypeError, "must hold numbers"),
        (trimesh.Trimesh(), ValueError, "shape|at least one"),
    ],
)
def test_arrays_that_cannot_be_used(source, error, message):
    with pytest.raises(error, match=message):
        load_point_cloud(source)
    with pytest.raises(ValueError, match="`num_points` must be"):
        load_point_cloud(POINTS, num_points=0)


def test_saving_refuses(tmp_path):
    with pytest.raises(ValueError, match="`path` must end in .ply"):
        save_point_cloud(POINTS, tmp_path / "a.stl")
    with pytest.raises(ValueError, match=r"`cloud` must have shape \(N, 3\)"):
        save_point_cloud(POINTS[:, :2], tmp_path / "a.ply")
    with pytest.raises(ValueError, match="finite"):
        save_point_cloud(POINTS / 0, tmp_path / "a.ply")
    assert list(tmp_path.iterdir()) == []


def test_surface_of_nothing_is_refused():
    rng, triangle = np.random.default_rng(0), np.eye(3)
    for faces, message in (
        (np.zeros((0, 3), int), "at least one face"),
        (np.array([[0, 1, 3]]), "vertices 0 to 2, got 0 to 3"),
        (np.array([[0, 1, 1]]), "area > 0"),
    ):
        with pytest.raises(ValueError, match=message):
            sample_surface(triangle, faces, 5, rng)
    with pytest.raises(ValueError, match="finite"):
        sample_surface(triangle * np.nan, np.array([[0, 1, 2]]), 5, rng)


def test_normalized_clouds():
    cloud, centre, radius = normalize_cloud(torch.stack([POINTS, 3 * POINTS + 5]))
    torch.testing.assert_close(cloud[0], cloud[1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(cloud.norm(dim=-1).amax(-1), torch.ones(2))
    torch.testing.assert_close((cloud * radius + centre)[1], 3 * POINTS + 5)
    same, centre, radius = normalize_cloud(torch.ones(4, 3))
    assert torch.equal(same, torch.zeros(4, 3)) and radius.item() == 1


def test_pictures_show_the_nearer_point():
    """Of two points in line with the camera only the nearer is seen; a turn by half shows the other."""
    pair = torch.tensor([[0.0, 0.5, 0.6], [0.0, -0.5, -0.6]])
    level = torch.tensor([[0.0, 0.0, 0.6], [0.0, 1e-3, -0.6]])
    both = np.asarray(render_point_cloud(pair, size=64, azimuth=0, elevation=0)).reshape(-1, 3)
    assert len(np.unique(both, axis=0)) > 2
    front, back = (
        np.asarray(render_point_cloud(level, size=64, azimuth=angle, elevation=0, point_radius=4))[32, 32]
        for angle in (0, 180)
    )
    assert front[2] > front[0] and back[0] > back[2]  # blue is low, orange high


def test_turntables(tmp_path):
    frames = turntable(POINTS / 4, num_frames=5, size=48)
    assert len(frames) == 5 and frames[0].size == (48, 48)
    assert (np.asarray(frames[0]) != np.asarray(frames[2])).any()
    save_turntable(frames, tmp_path / "turn.gif")
    save_turntable(frames, tmp_path / "turn.png")
    with Image.open(tmp_path / "turn.gif") as gif:
        assert gif.n_frames == 5 and gif.info["loop"] == 0
    with Image.open(tmp_path / "turn.png") as strip:
        assert strip.size == (5 * 48, 48)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["turn.gif", "turn.png"]
    with pytest.raises(ValueError, match="`path` must end in .gif or .png"):
        save_turntable(frames, tmp_path / "turn.bmp")
    with pytest.raises(ValueError, match="`frames` must hold"):
        save_turntable([], tmp_path / "turn.gif")
    with pytest.raises(ValueError, match="`num_frames`"):
        turntable(POINTS, num_frames=0)
    with pytest.raises(ValueError, match="`size`"):
        render_point_cloud(POINTS, size=2)
    with pytest.raises(ValueError, match=r"`cloud` must have shape"):
        render_point_cloud(POINTS[None])


@pytest.mark.parametrize("ending", ["glb", "gltf"])
def test_a_glb_opens_nothing_beside_it(ending, tmp_path):
    """Its numbers are its own; those of a glTF lie in files beside it."""
    points = np.arange(9, dtype="<f4").reshape(3, 3)
    (tmp_path / "secret.bin").write_bytes(points.tobytes())
    content = {
        "asset": {"version": "2.0"},
        "scenes": [{"nodes": [0]}],
        "nodes": [{"mesh": 0}],
        "meshes": [{"primitives": [{"attributes": {"POSITION": 0}, "mode": 0}]}],
        "buffers": [{"uri": "secret.bin", "byteLength": 36}],
        "bufferViews": [{"buffer": 0, "byteLength": 36}],
        "accessors": [
            {"bufferView": 0, "componentType": 5126, "count": 3, "type": "VEC3", "min": [0, 1, 2], "max": [6, 7, 8]}
        ],
    }
    text = json.dumps(content).encode()
    text += b" " * (-len(text) % 4)
    path = tmp_path / f"a.{ending}"
    if ending == "glb":
        head = struct.pack("<4sII", b"glTF", 2, 20 + len(text)) + struct.pack("<I4s", len(text), b"JSON")
        path.write_bytes(head + text)
        with pytest.raises(ValueError, match="cannot be read as GLB"):
            load_point_cloud(path)
    else:
        path.write_bytes(text)
        assert np.array_equal(load_point_cloud(path).numpy(), points)
