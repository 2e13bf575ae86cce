"""The table of families against the installed diffusers."""

import inspect

import diffusers
import pytest

from tests.tiny_pipelines import TINY, tiny_pipeline
from trimtab.pipelines import FAMILIES, Family, family_of
from trimtab.pipelines.families import stock_class

CLASSES = [(family, name) for family in FAMILIES for name in family.pipelines]
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")


def test_names_and_classes_are_unique() -> None:
    names = [family.name for family in FAMILIES]
    assert len(set(names)) == len(names)
    classes = [name for _, name in CLASSES]
    assert len(set(classes)) == len(classes)


@pytest.mark.parametrize(("family", "name"), CLASSES, ids=[name for _, name in CLASSES])
def test_entry_fits_the_stock_class(family: Family, name: str) -> None:
    cls = getattr(diffusers, name)
    parameters = inspect.signature(cls.__call__).parameters
    assert {family.guidance_argument, "latents", "generator", "output_type"} <= set(parameters)
    assert family.returns_latents or "callback_on_step_end" in parameters
    components = set(inspect.signature(cls.__init__).parameters)
    assert {*family.denoisers, "vae", "scheduler"} <= components
    assert {"batch_size", "height", "width", "dtype", "device", "generator", "latents"} <= set(
        inspect.signature(cls.prepare_latents).parameters
    )
    assert set(family.shared_outputs) <= set(family.prompt_outputs)
    source = inspect.getsource(cls.__init__)
    assert f"self.{family.scale_factor} = " in source
    assert ("_pack_latents" in vars(cls)) == (family.tokens or not family.returns_latents)


@pytest.mark.parametrize("name", TINY)
def test_family_of_a_pipeline_and_of_a_subclass(name: str) -> None:
    pipe = tiny_pipeline(name)
    cls = type(pipe)
    assert type(pipe).__name__ in family_of(pipe).pipelines
    custom = object.__new__(type("Custom", (type("Mixin", (), {}), cls), {}))
    assert family_of(custom) is family_of(pipe)
    assert stock_class(custom) is cls


def test_unknown_pipelines_are_refused_by_name() -> None:
    class StableDiffusion3Pipeline:
        """Somebody else's class of the same name."""

    with pytest.raises(ValueError, match="`pipe` is a StableDiffusion3Pipeline, which is in no family"):
        family_of(StableDiffusion3Pipeline())
    with pytest.raises(ValueError, match="DDPMPipeline, which is in no family known here; takes .*QwenImage"):
        family_of(object.__new__(diffusers.DDPMPipeline))
