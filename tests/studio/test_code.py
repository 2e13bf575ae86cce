"""The code that the app gives out runs as it is, and makes the same pixels; jobs one by one, without a page."""

import numpy as np
import pytest
from PIL import Image

from tests.tiny_pipelines import NUMPY_IN_SCHEDULERS, tiny_pipeline
from trimtab.commands.demo_edit import drawn_picture
from trimtab.studio import create_job, edit_job, improve_job
from trimtab.studio.create_job import CreateJob, rule_names
from trimtab.studio.edit_job import METHODS, EditJob
from trimtab.studio.improve_job import ImproveJob
from trimtab.studio.runs import Stop, stream

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*kept in float32:UserWarning"),
    pytest.mark.filterwarnings(NUMPY_IN_SCHEDULERS),
]
PROMPT = "a cat on a sky background"


def quick(names, few):
    """All names as parameters, those but a few marked slow."""
    return [pytest.param(name, marks=() if name in few else pytest.mark.slow) for name in names]


def result(job, tmp_path):
    *_, last = stream(job, Stop(tmp_path), 600, 1024)
    assert not last.error and not last.stopped
    return last.result


def made_by_code(code, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    return np.asarray(Image.open(tmp_path / name).convert("RGB"))


@pytest.mark.parametrize("rule", quick(rule_names(), ("apg", "cfg", "cfg++")))
def test_create(rule, tmp_path, monkeypatch):
    scale = {"cfg++": 0.6, "autoguidance": 2.0}.get(rule, 7.0)
    job = CreateJob(PROMPT, negative_prompt="a dog", guidance=rule, guidance_scale=scale, seed=3, steps=2)
    made = result(job, tmp_path)
    theirs = made_by_code(create_job.python_code(job, made.arguments), "picture.png", tmp_path, monkeypatch)
    assert np.array_equal(np.asarray(made.pictures[-1][1]), theirs)


@pytest.mark.parametrize("rule", ["cfg", "apg"])
@pytest.mark.parametrize("family", quick(("flux", "qwen-image"), ("qwen-image",)))
def test_create_with_models_whose_guidance_has_another_name(family, rule, tmp_path, monkeypatch):
    """Qwen-Image's argument is `true_cfg_scale`, which without a negative prompt does nothing; FLUX has both."""
    tiny_pipeline(family).save_pretrained(tmp_path / "model")
    job = CreateJob("a cat", guidance=rule, guidance_scale=7.0, seed=3, steps=2, model=str(tmp_path / "model"))
    *_, last = stream(job, Stop(tmp_path), 600, 32)
    assert not last.error
    made = last.result
    code = create_job.python_code(job, made.arguments).replace('a cat"],', 'a cat"], height=32, width=32,')
    theirs = made_by_code(code, "picture.png", tmp_path, monkeypatch)
    assert np.array_equal(np.asarray(made.pictures[-1][1]), theirs)
    assert ("true_cfg_scale=7.0" in code) == (family == "qwen-image" or rule == "apg")


@pytest.mark.parametrize("few_steps", [True, False])
def test_improve(few_steps, tmp_path, monkeypatch):
    job = ImproveJob(
        PROMPT, palette="pink", palette_weight=2.0, iterations=2, steps=2, few_steps=few_steps, seed=5
    )  # fmt: skip
    made = result(job, tmp_path)
    theirs = made_by_code(improve_job.python_code(job), "improved.png", tmp_path, monkeypatch)
    assert np.array_equal(np.asarray(made.best), theirs)
    assert len(made.rewards) == 2 and max(made.rewards) == made.rewards[made.best_step]


@pytest.mark.parametrize("method", quick(METHODS, ("flowopt", "flowedit", "uni-inv", "rf-inversion")))
def test_each_method_shows_where_it_goes(method, tmp_path):
    job = EditJob(drawn_picture(), "a red circle", "a green circle", None, method, steps=4, iterations=0)
    updates = [update.result for update in stream(job, Stop(tmp_path), 600, 1024) if update.result]
    assert any(made.preview is not None and not made.iterates for made in updates)
    assert updates[-1].preview is None and len(updates[-1].iterates) == 1


@pytest.mark.parametrize("method", quick(METHODS, ("flowopt", "flowedit")))
def test_edit(method, tmp_path, monkeypatch):
    image, mask = drawn_picture(), Image.new("RGB", (128, 128))
    mask.paste("white", (0, 0, 64, 128))
    image.save(tmp_path / "picture.png")
    mask.save(tmp_path / "mask.png")
    blend = {"flowopt": "feather", "flowedit": "poisson", "sdedit": "poisson-mixed"}.get(method, "none")
    job = EditJob(image, "a red circle", "a green circle", mask, method, steps=3, iterations=1, blend=blend)
    made = result(job, tmp_path).iterates[-1]
    theirs = made_by_code(edit_job.python_code(job), "edited.png", tmp_path, monkeypatch)
    assert np.array_equal(np.asarray(made), theirs)
    right = np.abs(np.asarray(made)[:, 96:].astype(int) - np.asarray(image)[:, 96:])  # outside of the mask
    assert right.mean() <= 6 if blend == "none" else right.max() <= 2  # "none": as good as the model's VAE
