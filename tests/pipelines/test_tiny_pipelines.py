"""The tiny pipelines are usable ones: stock calls whose pictures depend on noise and prompt."""

import pytest
import torch

from tests.tiny_pipelines import NUMPY_IN_SCHEDULERS, TINY, tiny_pipeline

pytestmark = pytest.mark.filterwarnings(NUMPY_IN_SCHEDULERS)


@pytest.mark.parametrize("name", TINY)
def test_stock_call_depends_on_its_inputs(name: str) -> None:
    case = TINY[name]
    pipe = tiny_pipeline(name)

    def images(prompt: str, seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return pipe(prompt, num_inference_steps=2, generator=generator, output_type="pt", **case.call).images

    base = images("a red cat", 0)
    assert base.shape == (1, 3, *case.size)
    assert torch.equal(base, images("a red cat", 0))
    assert (base - images("two dog on a sky background", 0)).abs().max() > 1e-3
    assert (base - images("a red cat", 1)).abs().max() > 1e-2


@pytest.mark.parametrize("name", TINY)
def test_built_alike_every_time(name: str) -> None:
    first, second = tiny_pipeline(name), tiny_pipeline(name)
    for key, module in first.components.items():
        if isinstance(module, torch.nn.Module):
            other = getattr(second, key).state_dict()
            assert all(torch.equal(value, other[k]) for k, value in module.state_dict().items()), key
