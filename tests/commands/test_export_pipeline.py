"""``trimtab export-pipeline``: what it writes loads back with ``custom_pipeline=`` and does what the class does."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler

import trimtab.geometry
import trimtab.pipelines
from tests.more_tiny_pipelines import guided_pipeline
from tests.pipelines.few_step_pipelines import FEW_STEP
from tests.pipelines.test_flowopt_families import ROWS as FLOWOPT
from tests.pipelines.test_flowopt_families import stock_pipeline
from tests.pipelines.test_guided_pipelines import ROWS as GUIDED
from tests.tiny_pipelines import NUMPY_IN_SCHEDULERS, tiny_pipeline
from trimtab.assets import asset_path
from trimtab.cli import main
from trimtab.commands.export_pipeline import custom_pipelines, export_pipeline
from trimtab.commands.pipeline_card import _PRESETS, BASES
from trimtab.geometry import LatentFlow, PointCloudAutoencoder, PointCloudReconstructionPipeline
from trimtab.pipelines.noise_presets import NOISE_PRESETS

pytestmark = pytest.mark.filterwarnings(NUMPY_IN_SCHEDULERS, "ignore:.torch.jit.script. is deprecated")

NO_CHECKER = {"safety_checker": None, "feature_extractor": None}
MISSING = {"sd15": NO_CHECKER, "z-image": FLOWOPT["z-image"].missing, "sana-sprint": {}}


def point_clouds():
    torch.manual_seed(0)
    autoencoder = PointCloudAutoencoder(40, latent_dim=16, encoder_channels=(16,), decoder_channels=(32,)).eval()
    flow = LatentFlow(16, hidden_dim=16, num_layers=1).eval()
    return PointCloudReconstructionPipeline(autoencoder, flow, FlowMatchEulerDiscreteScheduler())


# By file: what makes the stock pipeline, and what of it can't be saved.
CASES = {row.file: (lambda name=name: guided_pipeline(name), row.missing) for name, row in GUIDED.items()}
CASES |= {row.file: (lambda name=name: stock_pipeline(name), row.missing) for name, row in FLOWOPT.items()}
for few in FEW_STEP.values():
    if few.file and few.file not in CASES:
        stable = few.file == "noise_optimization_stable_diffusion"
        embedded = few.file == "noise_optimization_z_image"
        CASES[few.file] = (few.build, NO_CHECKER if stable else MISSING["z-image"] if embedded else {})
CASES["point_cloud"] = (point_clouds, {})


@pytest.fixture(autouse=True)
def modules(tmp_path, monkeypatch):
    """The folder where Diffusers copies custom pipelines to: the test's own, without what another test loaded."""
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(tmp_path / "modules")
    yield
    for name in [name for name in sys.modules if name.startswith("diffusers_modules")]:
        del sys.modules[name]


def loaded(base, folder, **options):
    pipe = DiffusionPipeline.from_pretrained(base, custom_pipeline=str(folder), trust_remote_code=True, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_every_custom_pipeline_is_in_the_table():
    """Each file that defines a pipeline class, and nothing else."""
    folder = Path(trimtab.pipelines.__file__).parent
    pattern = re.compile(r"^class \w+Pipeline\((\w+Mixin, )?\w+Pipeline\):", re.MULTILINE)
    files = {path.stem for path in folder.glob("*.py") if pattern.search(path.read_text(encoding="utf-8"))}
    assert files == set(custom_pipelines()) == set(CASES)
    assert set(BASES) == files - {"point_cloud"}
    assert set(_PRESETS.values()) <= set(NOISE_PRESETS) and set(_PRESETS) <= files


@pytest.mark.parametrize("file", CASES)
def test_loads_back(file, tmp_path):
    build, missing = CASES[file]
    build().save_pretrained(tmp_path / "stock")
    folder = export_pipeline(file, tmp_path / "exported")
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "pipeline.py"]
    module, name = custom_pipelines()[file]
    cls = getattr(sys.modules[module], name)
    assert type(loaded(tmp_path / "stock", folder, **missing)) is cls
    front, code = _card(folder)
    assert front["library_name"] == "diffusers" and front["license"] == "apache-2.0"
    assert front.get("base_model") == BASES.get(file)
    compile(code, "README.md", "exec")


def _card(folder):
    """The front matter as YAML, and the example."""
    text = (folder / "README.md").read_text(encoding="utf-8")
    _, front, body = text.split("---\n", 2)
    (code,) = re.findall(r"```python\n(.+?)```", body, re.DOTALL)
    return yaml.safe_load(front), code


@pytest.mark.parametrize("file", ["guided", "flowopt", "noise_optimization"])
def test_the_example_in_the_readme_runs(file, tmp_path, monkeypatch):
    """With a small model, words that it knows, and the processor in place of the network, theirs and the GPU."""
    tiny_pipeline("sd3").save_pretrained(tmp_path / "stock")
    folder = export_pipeline(f"{file}_stable_diffusion_3", tmp_path / "exported", repo_id="someone/something")
    _, code = _card(folder)
    changes = {
        "stabilityai/stable-diffusion-3.5-medium": str(tmp_path / "stock"),
        "stabilityai/stable-diffusion-3.5-large-turbo": str(tmp_path / "stock"),
        "someone/something": str(folder),
        "red chair": "red square",
        "pickscore": "bundled",
        "bfloat16": "float32",
        '"cuda"': '"cpu"',
    }
    for old, new in changes.items():
        code = code.replace(old, new)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    tiny = tiny_pipeline("sd3")("a cat", num_inference_steps=1, max_sequence_length=16).images[0]
    tiny.save("cat.png")
    exec(compile(code, "README.md", "exec"), {})
    assert (tmp_path / ("dog.png" if file == "flowopt" else "cat.png")).is_file()


def test_the_example_for_clouds_runs(tmp_path, monkeypatch):
    import trimesh

    point_clouds().save_pretrained(tmp_path / "model")
    folder = export_pipeline("point-cloud", tmp_path / "exported", model=str(tmp_path / "model"))
    _, code = _card(folder)
    monkeypatch.chdir(tmp_path)
    trimesh.creation.box().export("chair.obj")
    trimesh.creation.icosphere().export("table.obj")
    names = {}
    exec(compile(code.replace("OWNER/point-cloud", str(folder)), "README.md", "exec"), names)
    assert names["between"].shape == (8, 40, 3)
    assert trimtab.geometry.load_point_cloud(tmp_path / "chair.ply").shape == (40, 3)


def test_with_a_model_it_loads_by_itself(tmp_path, capsys):
    tiny_pipeline("sd3").save_pretrained(tmp_path / "stock")
    (tmp_path / "stock" / "README.md").write_text("---\nlicense: other\n---\n\n# Mine\n")
    (tmp_path / "stock" / "transformer" / "old.bin").write_bytes(b"a pickle")
    (tmp_path / "stock" / "evil.py").write_text("raise SystemExit")
    arguments = [str(tmp_path / "exported"), "--model", str(tmp_path / "stock"), "--repo-id", "me/mine"]
    assert main(["export-pipeline", "guided_stable_diffusion_3", *arguments]) == 0
    printed = capsys.readouterr().out
    assert "hf upload me/mine" in printed and str(tmp_path / "exported" / "pipeline.py") in printed
    assert ".bin" not in printed and "evil" not in printed
    index = json.loads((tmp_path / "exported" / "model_index.json").read_text())
    assert index["_class_name"] == ["pipeline", "GuidedStableDiffusion3Pipeline"]
    text = (tmp_path / "exported" / "README.md").read_text()
    assert text.startswith("---\nlicense: other\n---\n\n# Mine\n") and text.count("---\n") == 2
    assert 'from_pretrained("me/mine",trust_remote_code=True' in "".join(text.split())
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        DiffusionPipeline.from_pretrained(tmp_path / "exported")
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "exported", trust_remote_code=True)
    again = trimtab.pipelines.GuidedStableDiffusion3Pipeline.from_pretrained(tmp_path / "stock")
    call = {"num_inference_steps": 2, "max_sequence_length": 16, "output_type": "latent"}
    made = []
    for one in (pipe, again):
        assert type(one) is type(again)
        one.set_progress_bar_config(disable=True)
        made.append(one("a cat", generator=torch.Generator().manual_seed(0), **call).images)
    assert torch.equal(*made)


def test_the_bundled_model_goes_with_it(tmp_path):
    folder = export_pipeline("flowopt-stable-diffusion-3", tmp_path / "deeper" / "emoji", model="emoji-scenes")
    pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    assert type(pipe) is trimtab.pipelines.FlowOptStableDiffusion3Pipeline
    source = asset_path("emoji-scenes")
    shared = [path.relative_to(source) for path in source.rglob("*.safetensors")]
    assert shared and all((folder / path).read_bytes() == (source / path).read_bytes() for path in shared)
    assert [path.name for path in folder.parent.iterdir()] == ["emoji"]


BAD = {
    "unknown name": (["guided_nothing"], "takes one of flowopt_aura_flow, .*point_cloud; got 'guided_nothing'"),
    "a path": (["../guided_flux"], "NAME takes one of"),
    "a repository id": (["guided_flux", "--repo-id", "a/b/c"], "--repo-id takes OWNER/NAME; got 'a/b/c'"),
    "no such model": (["guided_flux", "--model", "/no/such/folder"], "/no/such/folder does not exist"),
    "a Hub id": (["guided_flux", "--model", "a/b"], "--model takes a folder on this disk"),
    "another class": (["guided_flux", "--model", "emoji-scenes"], "takes a model of a Flux.* is a StableDiffusion3Pip"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_nothing_written(name, tmp_path, capsys):
    (file, *options), words = BAD[name]
    assert main(["export-pipeline", file, str(tmp_path / "out"), *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith("trimtab: error: ") and error.count("\n") == 1 and re.search(words, error)
    assert [path for path in tmp_path.iterdir() if path.name != "modules"] == []


def test_what_is_there_stays(tmp_path, capsys):
    (tmp_path / "mine").write_text("mine")
    assert main(["export-pipeline", "guided_flux", str(tmp_path)]) == 2
    assert "holds something" in capsys.readouterr().err
    assert main(["export-pipeline", "guided_flux", str(tmp_path / "mine")]) == 2
    assert "is a file" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
