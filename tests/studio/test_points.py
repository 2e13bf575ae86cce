"""The Points tab through its endpoints: what is downloaded is what its code makes, and what strangers upload."""

import base64
import io
import json
import re
import time
import zipfile

import numpy as np
import pytest
import torch
import trimesh
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError

from trimtab.assets import asset_path
from trimtab.geometry import REFINEMENT_LOSSES, chamfer_distance, load_point_cloud
from trimtab.recipes.point_clouds import TRANSFER_CLASSES, draw_cloud
from trimtab.studio.metadata import read_embedded
from trimtab.studio.points_job import LOSSES, InterpolateJob, ReconstructJob, SampleJob
from trimtab.studio.points_source import ENDINGS, NUM_POINTS, SHAPES, Shape, Upload
from trimtab.studio.points_view import figure

pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(scope="module")
def client(app_url):
    return Client(app_url, verbose=False)


def reconstruct(client, **changes):
    arguments = {"file": None, "shape": "sofa", "number": 1, "loss": "sliced_wasserstein", "steps": 5}
    return client.predict(api_name="/reconstruct_points", **(arguments | changes))


def path_of(download) -> str:
    return download["value"] if isinstance(download, dict) else download


def points_of(view) -> list[np.ndarray]:
    """The clouds that a view shows, in its scene."""
    return [
        np.stack([np.frombuffer(bytes_of(trace[axis]), "<f4") for axis in "xyz"], axis=1)
        for trace in json.loads(view["plot"])["data"]
        if trace["mode"] == "markers"
    ]


def bytes_of(values) -> bytes:
    return base64.b64decode(values["bdata"])


@pytest.fixture
def ran(tmp_path, monkeypatch):
    """Runs code in an empty folder, and gives the clouds that it wrote there by name."""

    def run(code: str) -> dict[str, np.ndarray]:
        monkeypatch.chdir(tmp_path)
        exec(code, {})
        return {path.name: load_point_cloud(path).numpy() for path in sorted(tmp_path.glob("*.ply"))}

    return run


@pytest.mark.parametrize("loss", LOSSES)
def test_a_reconstruction_is_what_its_code_makes(loss, client, ran, capsys):
    view, table, curve, download, code, status = reconstruct(client, loss=loss, steps=2)
    assert "Done" in status
    assert np.array_equal(load_point_cloud(path_of(download)).numpy(), ran(code)["reconstruction.ply"])
    given, best = points_of(view)
    assert len(given) == len(best) == NUM_POINTS
    distances = {row[0]: row[1:] for row in table["data"]}
    assert set(distances) == {"Chamfer", "Sliced Wasserstein", "Earth mover's"}
    if loss == "none":
        printed = capsys.readouterr().out
        assert f"{float(distances['Chamfer'][0]):.4f}" == f"{float(printed.split('tensor([')[1].split(']')[0]):.4f}"
        assert distances["Chamfer"][1] == ""
    else:
        assert "loss over step: each step from" in curve and float(distances["Chamfer"][1]) > 0


def test_the_loss_comes_down_and_distances_are_those_of_the_file(client):
    _, table, curve, download, _, _ = reconstruct(client, loss="chamfer", steps=40)
    first, last = (float(value) for value in re.search(r"best so far from (\S+) to (\S+)\"", curve).groups())
    assert last < 0.8 * first
    made, given = load_point_cloud(path_of(download)), draw_cloud("sofa", 1, NUM_POINTS, test=True)
    chamfer = {row[0]: row[1:] for row in table["data"]}["Chamfer"]
    assert float(chamfer[1]) == pytest.approx(float(chamfer_distance(made, given)), abs=6e-5)
    assert float(chamfer[0]) == pytest.approx(first, abs=6e-5)
    assert float(chamfer[1]) == pytest.approx(last, abs=2e-4)


@pytest.mark.parametrize("ending", [".ply", ".obj", ".stl", ".glb", ".xyz", ".npz"])
def test_an_upload_in_its_own_frame_is_what_its_code_makes(ending, client, ran, tmp_path):
    """A mesh away from the origin and far from unit size: the result lies where the upload does."""
    box = trimesh.creation.box((4.0, 8.0, 4.0), transform=trimesh.transformations.translation_matrix((100, 0, 0)))
    path = tmp_path / f"my box{ending}"
    if ending == ".npz":
        np.savez(path, vertices=box.vertices, faces=box.faces)
    elif ending == ".xyz":
        np.savetxt(path, box.sample(1500, seed=0))
    else:
        box.export(path)
    *_, download, code, _ = reconstruct(client, file=handle_file(path), steps=2)
    name = code.split('load_point_cloud("')[1].split('"')[0]
    path.rename(tmp_path / name)  # the page may have its own idea of the file's name
    made = load_point_cloud(path_of(download)).numpy()
    assert np.abs(made.mean(0) - (100, 0, 0)).max() < 1.0 and 3.0 < np.abs(made[:, 1]).max() < 6.0
    assert np.array_equal(made, ran(code)["reconstruction.ply"])


def test_clouds_between_are_what_their_code_makes(client, ran):
    view, files, code, _ = client.predict(
        None, "chair", 1, None, "table", 2, 3, api_name="/interpolate_points"
    )  # fmt: skip
    made = ran(code)
    assert list(made) == ["between-1.ply", "between-2.ply", "between-3.ply"]
    for file, cloud in zip(files, made.values(), strict=True):
        assert np.array_equal(load_point_cloud(file).numpy(), cloud)
    assert len(points_of(view)) == 3


def test_new_clouds_are_what_their_code_makes_and_the_seed_s(client, ran):
    _, files, code, _ = client.predict(2, 5, api_name="/sample_points")
    for file, cloud in zip(files, ran(code).values(), strict=True):
        assert np.array_equal(load_point_cloud(file).numpy(), cloud)
    other = client.predict(2, 6, api_name="/sample_points")[1]
    assert not np.array_equal(load_point_cloud(files[0]).numpy(), load_point_cloud(other[0]).numpy())


def test_files_give_their_settings_back(client, tmp_path):
    """Of each of the three actions; what an upload was is the person's own. Other programs read the files as before."""
    made = {
        path_of(reconstruct(client, loss="chamfer", steps=2)[3]): {
            "shape": "sofa", "number": 1, "loss": "chamfer", "steps": 2,
        },
        client.predict(2, 5, api_name="/sample_points")[1][1]: {"new": 2, "seed": 5},
        client.predict(None, "chair", 3, None, "mug", 2, 2, api_name="/interpolate_points")[1][0]: {
            "first_shape": "chair", "first_number": 3, "last_shape": "mug", "last_number": 2, "between": 2,
        },
    }  # fmt: skip
    for path, settings in made.items():
        found = read_embedded(path)
        assert (found.tab, found.settings) == ("points", settings)
        assert np.array_equal(np.asarray(trimesh.load(path).vertices, np.float32), load_point_cloud(path).numpy())
        for hostile in (b"comment trimtab settings [1]", b"comment trimtab settings", b"comment trimtab \xff {}"):
            (tmp_path / "hostile.ply").write_bytes(b"ply\nformat ascii 1.0\n" + hostile + b"\nend_header\n")
            assert read_embedded(tmp_path / "hostile.ply") is None


def archive(**arrays) -> bytes:
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)
    return file.getvalue()


BAD = {
    "picture.ply": b"\x89PNG\r\n\x1a\n" + bytes(200),
    "empty.obj": b"",
    "text.stl": b"no triangles here\n" * 20,
    "words.xyz": b"one two three\n",
    "two.csv": b"1,2\n3,4\n",
    "nan.xyz": b"nan 0 0\n1 1 1\n",
    "huge.xyz": b"1e39 0 0\n1 1 1\n",
    "cut.glb": b"glTF\2\0\0\0\xff\xff\0\0",
    "pickled.npy": lambda: saved(np.array([{"a": 1}], dtype=object)),
    "claims.ply": b"ply\nformat binary_little_endian 1.0\nelement vertex 4000000000\n"
    b"property float x\nproperty float y\nproperty float z\nend_header\n" + bytes(12),
    "bomb.npz": lambda: archive(points=np.zeros((20_000_000, 3), np.float32)),
    "flat.npz": lambda: archive(vertices=np.zeros((3, 3)), faces=np.array([[0, 1, 2]])),
    "outside.npz": lambda: archive(vertices=np.eye(3), faces=np.array([[0, 1, 9]])),
    "zip.npz": b"PK\x03\x04" + bytes(100),
}


def saved(array) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    return file.getvalue()


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_cloud_is_refused_in_words(name, tmp_path):
    path = tmp_path / name
    content = BAD[name]
    path.write_bytes(content() if callable(content) else content)
    began = time.monotonic()
    with pytest.raises(ValueError, match="This file cannot be used: .") as error:
        Upload(str(path), 100).load()
    assert time.monotonic() - began < 5
    assert str(tmp_path) not in str(error.value) and "Traceback" not in str(error.value)


def test_a_scene_that_repeats_itself_is_refused(tmp_path):
    """A small file whose nodes show one mesh very often would fill the memory."""
    scene, ball = trimesh.Scene(), trimesh.creation.icosphere(5)
    for index in range(600):
        scene.add_geometry(ball, geom_name="ball", node_name=f"node{index}") if not index else scene.graph.update(
            f"node{index}", "world", geometry="ball"
        )
    path = tmp_path / "many.glb"
    path.write_bytes(scene.export(file_type="glb"))
    assert path.stat().st_size < 2_000_000
    with pytest.raises(ValueError, match="12,288,000 faces"):
        Upload(str(path), 20).load()


def test_files_over_the_limit_and_of_other_kinds_are_refused(tmp_path, client):
    (tmp_path / "large.xyz").write_text("0 0 0\n" * 200_000)
    with pytest.raises(ValueError, match="larger than 1 MB"):
        Upload(str(tmp_path / "large.xyz"), 1).load()
    (tmp_path / "a.gltf").write_text("{}")
    with pytest.raises(ValueError, match="no cloud or mesh"):
        Upload(str(tmp_path / "a.gltf"), 1).load()
    (tmp_path / "bad.ply").write_text("no cloud")
    with pytest.raises(AppError, match="cannot be used") as error:
        reconstruct(client, file=handle_file(tmp_path / "bad.ply"))
    assert "/" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shape": "dragon"}, "not in the list|takes one of"),
        ({"number": -1}, "number of the shape|less than minimum"),
        ({"loss": "l7"}, "not in the list|takes one of"),
        ({"steps": 10**6}, "steps|greater than maximum"),
        ({"steps": 2.5}, "whole number"),
    ],
)
def test_bad_settings_are_refused_in_words(changes, message, client):
    with pytest.raises(AppError, match=message):
        reconstruct(client, **changes)


def test_every_loss_and_shape_is_there():
    assert set(LOSSES) - {"none"} == set(REFINEMENT_LOSSES)
    assert all(Shape(name, 0).load().shape == (NUM_POINTS, 3) for name in SHAPES)
    assert [name in TRANSFER_CLASSES for name in SHAPES] == [False] * (len(SHAPES) - 6) + [True] * 6
    index = json.loads((asset_path("point-clouds") / "autoencoder" / "config.json").read_text())
    assert index["num_points"] == NUM_POINTS
    assert ".gltf" not in ENDINGS


class Recorded:
    """A run that keeps what it is sent, and ends when told."""

    def __init__(self, end_after: int = 10**9) -> None:
        self.sent, self.left = [], end_after

    def emit(self, result, note=""):
        self.sent.append(result)

    def note(self, note):
        pass

    def check(self):
        self.left -= 1
        if self.left < 0:
            raise InterruptedError


def test_a_stopped_descent_keeps_its_best():
    holder = ReconstructJob.holder
    run, job = Recorded(3), ReconstructJob(Shape("guitar", 0), "chamfer", 200)
    with holder.use(job.model, lambda note: None, lambda: None) as pipe, pytest.raises(InterruptedError):
        job.run(pipe, run)
    last = run.sent[-1]
    assert last.step == 3 and len(last.losses) == 4
    unit = draw_cloud("guitar", 0, NUM_POINTS, test=True)
    assert float(chamfer_distance(last.best, unit)) == pytest.approx(min(last.losses), rel=1e-4)


def test_one_model_is_held_for_all_jobs():
    assert ReconstructJob.holder is InterpolateJob.holder is SampleJob.holder
    assert ReconstructJob.holder.loads <= 1


def test_views_show_each_cloud_beside_the_others():
    clouds = [torch.zeros(2, 3) for _ in range(5)]
    made = figure(clouds, list("abcde"), given=1)
    shown = [trace for trace in made.data if trace.mode == "markers"]
    places = {(float(trace.x[0]), float(trace.z[0])) for trace in shown}
    assert len(places) == 5 and len({x for x, _ in places}) == 3
    assert shown[0].marker.colorscale != shown[1].marker.colorscale == shown[4].marker.colorscale


def test_archives_are_measured_before_they_are_opened(tmp_path):
    path = tmp_path / "bomb.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("points.npy", saved(np.zeros((2, 3))) + bytes(250_000_000))
    with pytest.raises(ValueError, match="unpacks to more"):
        Upload(str(path), 20).load()
