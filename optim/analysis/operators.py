"""Hessians and Gauss-Newton matrices as functions of a vector: no matrix is ever formed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from trimtab.optim.checks import checked_choice, checked_number

from .second_derivatives import (
    central_difference,
    default_step,
    differentiated,
    evaluated,
    gauss_newton_product,
    gradients_of,
)

__all__ = ["SymmetricOperator", "data_hessian_operator", "hessian_operator"]

Parameters = Tensor | Iterable[Tensor]


class SymmetricOperator:
    """A symmetric matrix (n, n) that is known by its products with vectors.

    Attributes:
        size: n.
        shapes: of the tensors that a vector is made of, one after another.
        num_products: how many products with a vector were taken.

    Args:
        product: (n,) float64 on the CPU to (n,).
        size: n, >= 1.
        shapes: None is one vector of length n.
    """

    def __init__(
        self, product: Callable[[Tensor], Tensor], size: int, shapes: Sequence[torch.Size] | None = None
    ) -> None:
        self.size = size
        self.shapes = [torch.Size([size])] if shapes is None else list(shapes)
        self.num_products = 0
        self._product = product

    @property
    def shape(self) -> tuple[int, int]:
        return self.size, self.size

    def __call__(self, v: Tensor) -> Tensor:
        """A v, of v's shape: (n,) or (n, r); float64 on the CPU.

        Raises:
            ValueError: for another shape.
            RuntimeError: if a product isn't finite.
        """
        if v.ndim not in (1, 2) or v.shape[0] != self.size:
            raise ValueError(f"`v` has shape {tuple(v.shape)}; takes ({self.size},) or ({self.size}, r)")
        if v.ndim == 2:
            return torch.stack([self(column) for column in v.unbind(1)], 1)
        self.num_products += 1
        result = self._product(v.detach().to("cpu", torch.float64)).detach().to("cpu", torch.float64)
        if not bool(torch.isfinite(result).all()):
            raise RuntimeError(f"a product with the matrix is not finite in {self._where(result)}")
        return result

    def split(self, v: Tensor) -> list[Tensor]:
        """A vector (n,) as tensors shaped like the parameters."""
        parts = v.split([shape.numel() for shape in self.shapes])
        return [part.view(shape) for part, shape in zip(parts, self.shapes, strict=True)]

    @classmethod
    def from_matrix(cls, matrix: Tensor) -> SymmetricOperator:
        """The operator of a matrix (n, n) that is symmetric.

        Raises:
            ValueError: if it is not square or not symmetric.

        Example:
            >>> SymmetricOperator.from_matrix(torch.diag(torch.tensor([1.0, 3.0])))(torch.ones(2)).tolist()
            [1.0, 3.0]
        """
        if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
            raise ValueError(f"`matrix` has shape {tuple(matrix.shape)}; takes (n, n)")
        wide = matrix.detach().to("cpu", torch.float64)
        if not torch.allclose(wide, wide.T, rtol=1e-6, atol=1e-9 * float(wide.abs().max())):
            raise ValueError("`matrix` is not symmetric")
        return cls(wide.__matmul__, len(wide))

    def _where(self, result: Tensor) -> str:
        bad = [i for i, part in enumerate(self.split(result)) if not bool(torch.isfinite(part).all())]
        return f"parameter {', '.join(map(str, bad[:4]))} of {len(self.shapes)}"


def hessian_operator(
    closure: Callable[[], Tensor],
    params: Parameters,
    *,
    method: Literal["double_backward", "finite_difference"] = "double_backward",
    eps: float | None = None,
    keep_graph: bool = True,
) -> SymmetricOperator:
    """The Hessian of a loss with respect to tensors that it is computed from: weights, or noise.

    Attention is computed without fused kernels meanwhile, which have no second derivative. Gradient checkpointing
    must be the one with ``use_reentrant=False``.

    Sources: Pearlmutter, "Fast exact multiplication by the Hessian" (1994); used on networks' spectra by Sagun,
    Evci, Guney, Dauphin, Bottou, "Empirical Analysis of the Hessian of Over-Parametrized Neural Networks"
    (arXiv 1706.04454).

    Args:
        closure: gives the loss, a single number, the same at every call: without dropout, and with noise that is
            drawn beforehand. Evaluated twice here.
        params: float32 or float64 tensors that require a gradient; those that the loss doesn't depend on have a
            Hessian of 0.
        method: "double_backward" is exact. "finite_difference" is (g(w + eps v) - g(w - eps v)) / 2 eps with unit v,
            for losses without a second derivative in torch; the tensors are as before afterwards.
        eps: of the finite difference; None is 1e-3 in float32 and 1e-5 in float64, times max(1, ||w||).
        keep_graph: keep the gradient's graph between products, which saves two thirds of their time.

    Raises:
        TypeError: tensors that are no float32 or float64.
        ValueError: no tensors, tensors without a gradient, or a loss that is not a single number.
        RuntimeError: the loss differs between two calls, or has no second derivative in torch.

    Example:
        >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> hessian_operator(lambda: w[0] ** 2 * w[1], w)(torch.tensor([1.0, 0.0])).tolist()
        [4.0, 2.0]
    """
    checked_choice("method", method, ("double_backward", "finite_difference"))
    tensors = checked_parameters(params)
    first, second = (float(evaluated(closure, False)) for _ in range(2))
    if first != second and not (first != first and second != second):
        raise RuntimeError(
            f"`closure` gave {first:.6g} and {second:.6g} at two calls; takes one that is always the same: no dropout, "
            "noise drawn beforehand"
        )
    if method == "finite_difference":
        step = default_step(tensors) if eps is None else checked_number("eps", eps, above=0)
        return _operator(tensors, lambda v: central_difference(closure, tensors, v, step))
    kept: list[list[Tensor | None]] = []

    def product(v: list[Tensor]) -> list[Tensor]:
        gradients = kept[0] if kept else gradients_of(evaluated(closure, True), tensors, create_graph=True)
        if keep_graph and not kept:
            kept.append(gradients)
        return differentiated(gradients, v, tensors, keep_graph)

    return _operator(tensors, product)


def data_hessian_operator(
    model: nn.Module,
    loss_fn: Callable[[Tensor, Any], Tensor],
    batches: Iterable[tuple[Any, Any]],
    params: Iterable[Tensor] | None = None,
    *,
    matrix: Literal["hessian", "gauss_newton"] = "hessian",
) -> SymmetricOperator:
    """The Hessian, or the generalized Gauss-Newton matrix, of a model's mean loss over data.

    With J the Jacobian of the model's outputs with respect to its parameters, H = G + R where
    G = mean J^T (d2 loss / d output^2) J is the Gauss-Newton matrix and R vanishes with the loss's gradient
    (arXiv 1706.04454, section 2). The model is in evaluation mode during products.

    Args:
        model: called with a batch's inputs.
        loss_fn: the model's outputs and a batch's targets to a single number, the batch's mean.
        batches: pairs of inputs and targets that can be gone through again and again, such as a list; a batch counts
            by its targets' length.
        params: None is all parameters that require a gradient.
        matrix: which.

    Raises:
        TypeError: batches that can be gone through only once; parameters as in :func:`hessian_operator`.
        ValueError: no batches; as :func:`hessian_operator`.

    Example:
        >>> model = nn.Linear(1, 1, bias=False)
        >>> data = [(torch.tensor([[1.0], [3.0]]), torch.zeros(2, 1))]
        >>> data_hessian_operator(model, nn.MSELoss(), data)(torch.ones(1)).tolist()
        [10.0]
    """
    checked_choice("matrix", matrix, ("hessian", "gauss_newton"))
    if isinstance(batches, Iterator):
        raise TypeError("`batches` can be gone through only once; takes a list or a loader")
    if params is None:
        params = [parameter for parameter in model.parameters() if parameter.requires_grad]
    tensors = checked_parameters(params)
    total = sum(len(targets) for _, targets in batches)
    if not total:
        raise ValueError("`batches` is empty; takes at least one")

    def product(v: list[Tensor]) -> list[Tensor]:
        result = [torch.zeros_like(part) for part in v]
        with _evaluating(model):
            for inputs, targets in batches:
                if matrix == "hessian":
                    loss = evaluated(lambda: loss_fn(model(inputs), targets), True)  # noqa: B023 (called at once)
                    part = differentiated(gradients_of(loss, tensors, create_graph=True), v, tensors, False)
                else:
                    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
                        outputs = model(inputs)
                    part = gauss_newton_product(outputs, loss_fn, targets, tensors, v)
                for total_part, batch_part in zip(result, part, strict=True):
                    total_part.add_(batch_part, alpha=len(targets) / total)
        return result

    return _operator(tensors, product)


def checked_parameters(params: Any) -> list[Tensor]:
    """A tensor or several as a list; raises as :func:`hessian_operator`."""
    tensors = [params] if isinstance(params, Tensor) else list(params)
    if not tensors:
        raise ValueError("`params` is empty; takes at least one tensor that requires a gradient")
    for index, tensor in enumerate(tensors):
        if not isinstance(tensor, Tensor) or tensor.dtype not in (torch.float32, torch.float64):
            got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(
                f"`params` has a {got} at {index}; takes float32 or float64 tensors: curvature in half precision is "
                "rounding"
            )
        if not tensor.requires_grad:
            raise ValueError(f"`params` has a tensor at {index} that requires no gradient; takes ones that do")
    return tensors


def _operator(tensors: list[Tensor], product: Callable[[list[Tensor]], list[Tensor]]) -> SymmetricOperator:
    shapes, sizes = [t.shape for t in tensors], [t.numel() for t in tensors]

    def flat(v: Tensor) -> Tensor:
        parts = [p.view(t.shape).to(t.device, t.dtype) for p, t in zip(v.split(sizes), tensors, strict=True)]
        with sdpa_kernel(SDPBackend.MATH):  # around backward passes too: checkpoints compute attention again there
            results = product(parts)
        return torch.cat([part.detach().to("cpu", torch.float64).flatten() for part in results])

    return SymmetricOperator(flat, sum(sizes), shapes)


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
