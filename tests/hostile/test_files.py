"""Files that are broken, cut, forged or bombs: a named error or a result that is finite, and nothing else."""

import io
import json
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save

from tests.hostile.cases import CASES, tried
from trimtab.commands.errors import UsageError
from trimtab.commands.model import check_model
from trimtab.geometry import io as io_module
from trimtab.geometry import load_point_cloud, save_point_cloud
from trimtab.guidance import TunedPreset
from trimtab.pipelines.images import load_image, load_images

POINTS = torch.randn(12, 3, generator=torch.Generator().manual_seed(0))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


def mangled(whole: bytes) -> st.SearchStrategy[bytes]:
    """Cut, with bytes changed, with a piece twice or one put in, or not of the format at all."""
    place = st.integers(0, len(whole))
    change = st.lists(st.tuples(place, st.binary(min_size=1, max_size=4)), max_size=3)

    def apply(start: int, end: int, changes: list[tuple[int, bytes]], how: str) -> bytes:
        data = bytearray(whole)
        for at, new in changes:
            data[at : at + len(new)] = new
        low, high = sorted((start, end))
        if how == "cut":
            return bytes(data[:high])
        if how == "twice":
            return bytes(data[:high] + data[low:])
        return bytes(data)

    return st.builds(apply, place, place, change, st.sampled_from(["cut", "twice", "changed"])) | st.binary(max_size=64)


def picture(kind: str) -> bytes:
    stream = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    options = {"exif": exif} if kind in ("PNG", "JPEG", "WEBP") else {}
    Image.fromarray(pixels).save(stream, kind, **options)
    return stream.getvalue()


PICTURES = {kind: picture(kind) for kind in ("PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "PPM", "ICO")}


@CASES
def test_pictures(cases, tmp_path):
    @tried(cases)
    @given(st.data())
    def holds(data):
        kind = data.draw(st.sampled_from(sorted(PICTURES)))
        path = tmp_path / f"p.{kind.lower()}"
        path.write_bytes(data.draw(mangled(PICTURES[kind])))
        try:
            image = load_image(path)
        except ValueError as error:
            assert "image" in str(error)
        else:
            assert image.mode == "RGB" and min(image.size) > 0

    holds()


def cloud(ending: str, tmp_path: Path) -> bytes:
    path = tmp_path / f"whole.{ending}"
    if ending in ("stl", "off", "gltf"):
        import trimesh

        exported = trimesh.creation.box().export(file_type=ending)
        return exported.encode() if isinstance(exported, str) else exported
    save_point_cloud(POINTS, path)
    return path.read_bytes()


@CASES
def test_point_clouds(cases, tmp_path):
    wholes = {ending: cloud(ending, tmp_path) for ending in ("ply", "obj", "xyz", "npz", "npy", "glb", "stl", "off")}

    @tried(cases)
    @given(st.data())
    def holds(data):
        ending = data.draw(st.sampled_from(sorted(wholes)))
        path = tmp_path / f"c.{ending}"
        path.write_bytes(data.draw(mangled(wholes[ending])))
        try:
            points = load_point_cloud(path, num_points=16)
        except ValueError as error:
            assert str(path) in str(error)
        else:
            assert points.shape[1] == 3 and len(points) > 0 and bool(points.isfinite().all())

    holds()


@CASES
def test_weights(cases, tmp_path):
    """A model's folder whose safetensors file, index or config is anything."""
    whole = save({"a": torch.arange(6.0), "b": torch.zeros(2, 2)})
    header = json.loads(whole[8 : 8 + struct.unpack("<Q", whole[:8])[0]])
    offsets = st.lists(st.integers() | st.floats() | st.text(max_size=2) | st.none(), max_size=3) | JSON
    forged = st.fixed_dictionaries({"a": st.fixed_dictionaries({"data_offsets": offsets})}) | JSON

    def with_header(content: object) -> bytes:
        text = json.dumps(content).encode()
        return struct.pack("<Q", len(text)) + text + whole[-40:]

    (tmp_path / "part").mkdir()
    (tmp_path / "model_index.json").write_text("{}")

    @tried(cases)
    @given(mangled(whole) | st.builds(with_header, forged | st.just(header)))
    def holds(content):
        (tmp_path / "part" / "w.safetensors").write_bytes(content)
        try:
            check_model(str(tmp_path))
        except UsageError as error:
            assert "w.safetensors is no whole safetensors file" in str(error)

    holds()


@CASES
def test_presets_and_indices(cases, tmp_path):
    @tried(cases)
    @given(st.binary(max_size=40) | st.builds(lambda value: json.dumps(value).encode(), JSON | presets()))
    def holds(content):
        (tmp_path / "preset.json").write_bytes(content)
        try:
            preset = TunedPreset.load(tmp_path / "preset.json")
        except (ValueError, TypeError) as error:
            assert str(error)
        else:
            assert all(np.isfinite(value) for value in (*preset.guidance.values(), *preset.noise.values()))
        (tmp_path / "model_index.json").write_bytes(content)
        try:
            check_model(str(tmp_path))
        except UsageError as error:
            assert "model_index.json" in str(error)

    holds()


def presets() -> st.SearchStrategy:
    values = st.dictionaries(st.sampled_from(["guidance_scale", "momentum", "lr", "x"]), JSON, max_size=2)
    return st.fixed_dictionaries({}, optional={"guidance": values, "noise": values, "tuned": JSON, "format": JSON})


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *chunks: bytes, data: bytes = b"\0") -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


@pytest.mark.parametrize("name", ["pixels", "text", "profile"])
def test_bombs_as_png(name, tmp_path):
    """Some kilobytes that would be gigabytes: told, not unpacked."""
    many = zlib.compress(b"\0" * 50_000_000, 9)
    content = {
        "pixels": png(100_000, 100_000, data=many),
        "text": png(8, 8, chunk(b"zTXt", b"a\0\0" + many), data=zlib.compress(b"\0\0" * 8)),
        "profile": png(8, 8, chunk(b"iCCP", b"a\0\0" + many), data=zlib.compress(b"\0\0" * 8)),
    }[name]
    assert len(content) < 100_000
    (tmp_path / "bomb.png").write_bytes(content)
    told = (
        "is too large: Image size"
        if name == "pixels"
        else "is no picture that can be read: Decompressed data too large"
    )
    with pytest.raises(ValueError, match=f"bomb.png {told}"):
        load_image(tmp_path / "bomb.png")


@pytest.mark.parametrize("ending", ["npz", "npy"])
def test_bombs_as_clouds(ending, tmp_path, monkeypatch):
    """An array that says it has 10^11 points, and one whose zeros would be gigabytes."""
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": "<f8", "fortran_order": False, "shape": (10**11, 3)})
    path = tmp_path / f"bomb.{ending}"
    if ending == "npy":
        path.write_bytes(stream.getvalue())
    else:
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("points.npy", stream.getvalue())
    with pytest.raises(ValueError, match=r"bomb\.np. cannot be read as NP"):
        load_point_cloud(path)
    np.savez_compressed(tmp_path / "zeros.npz", points=np.zeros((1000, 3)))
    monkeypatch.setattr(io_module, "_MAX_BYTES", 10_000)
    with pytest.raises(ValueError, match="points.npy would be more than 10,000 bytes"):
        load_point_cloud(tmp_path / "zeros.npz")


@pytest.mark.parametrize("sources", [[], [None], 3, "none.png", b"png", [["a"]], {"a": 1}, float("nan")])
def test_what_is_no_picture(sources):
    with pytest.raises((ValueError, TypeError), match="image"):
        load_images(sources)
