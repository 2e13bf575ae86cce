"""Gradients through the stock loop: right, frozen elsewhere, and at the memory of one step."""

import weakref
from collections.abc import Callable

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from tests.pipelines.test_generation_map import seeded, tiny_map
from tests.tiny_pipelines import NUMPY_IN_SCHEDULERS, TINY, tiny_pipeline
from trimtab.pipelines import GenerationMap

pytestmark = pytest.mark.filterwarnings(NUMPY_IN_SCHEDULERS)


def objective(f: GenerationMap, seed: int = 9) -> Callable[[torch.Tensor], torch.Tensor]:
    """A fixed linear function of a map's output, for each row."""
    weights = None

    def value(z: torch.Tensor) -> torch.Tensor:
        nonlocal weights
        out = f(z)
        if weights is None:
            weights = torch.randn(out.shape[1:], generator=seeded(seed), dtype=out.dtype)
        return (out * weights).flatten(1).sum(1)

    return value


def gradient(f: GenerationMap, z: torch.Tensor) -> torch.Tensor:
    z = z.clone().requires_grad_()
    (grad,) = torch.autograd.grad(objective(f)(z).sum(), z)
    assert grad.dtype == z.dtype
    return grad


def relative_error(f: GenerationMap, z: torch.Tensor, step: float) -> float:
    """Of the gradient's length, against a central difference along the gradient."""
    grad = gradient(f, z)
    length = grad.norm()
    assert length > 1e-3
    direction = grad / length
    with torch.no_grad():
        difference = objective(f)(z + step * direction).sum() - objective(f)(z - step * direction).sum()
    return abs(difference / (2 * step) / length - 1).item()


def test_finite_difference_in_float64() -> None:
    """DDIM keeps the model's dtype, so here the difference can be taken to many digits."""
    f = tiny_map("sd15", pipe=tiny_pipeline("sd15", dtype=torch.float64), output="latent")
    z = f.sample_latents(1, seeded(0)).double()
    assert relative_error(f, z, 1e-4) < 1e-7  # asked for: 1e-5


@pytest.mark.parametrize("name", TINY)
def test_finite_difference(name: str) -> None:
    f = tiny_map(name, output="latent")
    assert relative_error(f, f.sample_latents(1, seeded(0)), 1e-2) < 1e-2


def test_finite_difference_of_pictures_inside_their_range() -> None:
    """Away from the clamp the pictures' gradient is exact, at values beyond it nothing flows."""
    f = tiny_map("sd15", pipe=tiny_pipeline("sd15", dtype=torch.float64))
    z = f.sample_latents(1, seeded(0)).double()
    assert relative_error(f, 0.2 * z, 1e-6) < 1e-5
    far = (100 * f.encode(torch.rand(1, 3, *TINY["sd15"].size, generator=seeded(0)).double())).requires_grad_()
    images = f.decode(far)
    cut = (images == 0) | (images == 1)
    assert cut.any()
    (grad,) = torch.autograd.grad(images[cut].sum(), far)
    assert not grad.any()


@pytest.mark.parametrize("name", TINY)
def test_checkpoints_change_nothing_but_memory(name: str) -> None:
    f = tiny_map(name)
    z = f.sample_latents(2, seeded(0))
    kept = gradient(f, z)
    f.gradient_checkpointing = False
    assert torch.equal(kept, gradient(f, z))


@pytest.mark.parametrize("name", ["sd15", "qwen-image"])
def test_rows_do_not_mix(name: str) -> None:
    f = tiny_map(name, output="latent")
    z = f.sample_latents(2, seeded(0)).requires_grad_()
    (grad,) = torch.autograd.grad(objective(f)(z)[0], z)
    assert grad[0].abs().max() > 1e-3
    assert not grad[1].any()


def test_nothing_is_recorded_unless_asked_for() -> None:
    f = tiny_map("sd3")
    z = f.sample_latents(1, seeded(0))
    assert f(z).grad_fn is None
    z.requires_grad_()
    with torch.no_grad():
        assert f(z).grad_fn is None
    assert f(z).grad_fn is not None
    assert f.decode(z).grad_fn is not None
    assert f.decode(z.detach()).grad_fn is None


@pytest.mark.parametrize("checkpointing", [True, False])
def test_parameters_stay_out_of_it(checkpointing: bool) -> None:
    f = tiny_map("sd3", gradient_checkpointing=checkpointing)
    parameters = [p for module in (f.pipe.transformer, f.pipe.vae) for p in module.parameters()]
    parameters[0].requires_grad_(False)
    before = [p.requires_grad for p in parameters]
    z = f.sample_latents(1, seeded(0)).requires_grad_()
    images = f(z)
    assert [p.requires_grad for p in parameters] == before
    images.sum().backward()
    assert z.grad.abs().max() > 0
    assert [p.requires_grad for p in parameters] == before
    assert all(p.grad is None for p in parameters)


def test_half_precision_model_gives_float32_gradients() -> None:
    f = tiny_map("sd3", pipe=tiny_pipeline("sd3", dtype=torch.bfloat16), output="latent")
    z = f.sample_latents(1, seeded(0))
    exact = gradient(tiny_map("sd3", output="latent"), z)
    rough = gradient(f, z)
    assert rough.dtype == torch.float32
    assert torch.cosine_similarity(rough.flatten(), exact.flatten(), dim=0) > 0.99


def test_second_derivatives() -> None:
    """A Hessian-vector product is the difference of two gradients."""
    f = tiny_map("sd15", pipe=tiny_pipeline("sd15", dtype=torch.float64), output="latent")
    z = f.sample_latents(1, seeded(0)).double().requires_grad_()
    v = torch.randn(z.shape, generator=seeded(1), dtype=z.dtype)
    with sdpa_kernel(SDPBackend.MATH):  # the fused attention kernels have no second derivative
        (grad,) = torch.autograd.grad(objective(f)(z).sum(), z, create_graph=True)
        (product,) = torch.autograd.grad((grad * v).sum(), z)
    step = 1e-4
    difference = (gradient(f, z.detach() + step * v) - gradient(f, z.detach() - step * v)) / (2 * step)
    assert product.norm() > 1e-4
    torch.testing.assert_close(product, difference, rtol=1e-5, atol=1e-5 * product.abs().max().item())


def test_with_the_models_own_checkpoints_inside() -> None:
    f = tiny_map("sd3")
    z = f.sample_latents(1, seeded(0))
    expected = gradient(f, z)
    for name in ("transformer", "vae"):
        model = getattr(f.pipe, name)
        model.enable_gradient_checkpointing()
        with pytest.raises(ValueError, match=f"{type(model).__name__} has gradient checkpointing of its own"):
            gradient(f, z)
        model.requires_grad_(False)
        torch.testing.assert_close(gradient(f, z), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_with_a_compiled_denoiser() -> None:
    f = tiny_map("sd3", output="latent")
    z = f.sample_latents(1, seeded(0))
    expected, denoiser = gradient(f, z), f.pipe.transformer
    f.pipe.transformer = torch.compile(denoiser, backend="eager")
    assert torch.equal(gradient(f, z), expected)
    f.pipe.transformer = denoiser
    denoiser.compile(backend="eager")
    assert torch.equal(gradient(f, z), expected)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the storages made inside it that are alive, and the most there ever were."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen:
            return
        self._seen.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size


def peak_bytes(f: GenerationMap, z: torch.Tensor) -> int:
    with LiveBytes() as live:
        f(z.clone().requires_grad_()).sum().backward()
    return live.peak


def test_memory_does_not_grow_with_the_number_of_steps() -> None:
    options = {"num_layers": 4, "attention_head_dim": 32}
    pipe = tiny_pipeline("sd3")
    config = dict(pipe.transformer.config) | options | {"caption_projection_dim": 64}
    pipe.transformer = type(pipe.transformer).from_config(config).eval()
    few, many = (tiny_map("sd3", pipe=pipe, num_inference_steps=steps) for steps in (4, 16))
    z = few.sample_latents(1, seeded(0))
    peaks = [peak_bytes(f, z) for f in (few, many)]
    assert peaks[1] < 1.15 * peaks[0]
    for f in (few, many):
        f.gradient_checkpointing = False
    stored = [peak_bytes(f, z) for f in (few, many)]
    assert stored[1] > 2.5 * stored[0]
    assert peaks[1] < 0.2 * stored[1]
