"""The exact augmented Lagrangian against penalties with Adam and scipy's solvers.

The claim: constraints hold to 1e-8 where a quadratic penalty leaves 1e-2, at a value that is not worse; logistic
regression under constraints and optimal control of Poisson's equation end at a KKT residual of 1e-6. (The control
problem's matrix is too badly conditioned for sketches.)

    python -m trimtab.benchmarks.optim.augmented_lagrangian

The toy is a convex quartic in n unknowns on a sphere and a plane. Logistic regression: 300 points of two classes in 20
dimensions, 5 linear constraints and ||x|| = 2. Control: y and u on a grid of 8 x 8 with -Laplace(y) + y^3 = u, y near
a given state, u short.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable

import torch
from scipy.optimize import minimize
from torch import Tensor

from trimtab.benchmarks.optim.report import Row, write_report
from trimtab.optim.constrained import minimize_equality

Function = Callable[[Tensor], Tensor]


def toy(n: int) -> tuple[Function, Function, Tensor]:
    """f, c and a start."""
    g = torch.Generator().manual_seed(0)
    A, a, b = (torch.randn(*shape, generator=g).double() for shape in ((n, n), (n,), (n,)))
    Q = A @ A.T / n + torch.eye(n).double()
    return (
        lambda x: 0.5 * x @ Q @ x - b @ x + 0.05 * x.pow(4).sum(),
        lambda x: torch.stack([x.square().sum() - n, a @ x - 0.5]),
        torch.randn(n, generator=g).double(),
    )


def logistic_regression() -> tuple[Function, Function, Tensor]:
    """Likewise."""
    g = torch.Generator().manual_seed(1)
    points, truth = torch.randn(300, 20, generator=g).double(), torch.randn(20, generator=g).double()
    labels = torch.sign(points @ truth + 0.5 * torch.randn(300, generator=g).double())
    A, b = torch.randn(5, 20, generator=g).double(), 0.2 * torch.randn(5, generator=g).double()
    return (
        lambda x: torch.nn.functional.softplus(-labels * (points @ x)).mean(),
        lambda x: torch.cat([A @ x - b, (x.square().sum() - 4).reshape(1)]),
        torch.randn(20, generator=g).double(),
    )


def poisson_control(side: int = 8) -> tuple[Function, Function, Tensor]:
    """Likewise; the unknowns are the state y, then the control u."""
    grid = torch.arange(1, side + 1).double() / (side + 1)
    wanted = torch.outer(torch.sin(math.pi * grid), torch.sin(2 * math.pi * grid))

    def laplace(y: Tensor) -> Tensor:
        padded = torch.nn.functional.pad(y, (1, 1, 1, 1))
        around = padded[:-2, 1:-1] + padded[2:, 1:-1] + padded[1:-1, :-2] + padded[1:-1, 2:]
        return (around - 4 * y) * (side + 1) ** 2 / 100  # scaled, as u is

    def parts(x: Tensor) -> tuple[Tensor, Tensor]:
        y, u = x.view(2, side, side)
        return y, u

    def f(x: Tensor) -> Tensor:
        y, u = parts(x)
        return (0.5 * (y - wanted).square().sum() + 0.005 * u.square().sum()) / side

    def c(x: Tensor) -> Tensor:
        y, u = parts(x)
        return (-laplace(y) + y**3 - u).flatten()

    return f, c, torch.zeros(2 * side * side).double()


def by_penalty(f: Function, c: Function, x0: Tensor) -> tuple[float, float]:
    """Value and largest violation after 2000 steps of Adam on f + 5 ||c||^2."""
    x = x0.clone().requires_grad_()
    optimizer = torch.optim.Adam([x], lr=1e-2)
    for _ in range(2000):
        optimizer.zero_grad()
        (f(x) + 5 * c(x).square().sum()).backward()
        optimizer.step()
    with torch.no_grad():
        return float(f(x)), float(c(x).abs().max())


def by_scipy(f: Function, c: Function, x0: Tensor) -> float:
    """SLSQP's value."""

    def numpy(function: Function) -> Callable:
        return lambda x: function(torch.from_numpy(x)).detach().numpy()

    constraint = {"type": "eq", "fun": numpy(c), "jac": numpy(torch.func.jacrev(c))}
    options = {"maxiter": 500, "ftol": 1e-12}
    found = minimize(
        numpy(f), x0.numpy(), jac=numpy(torch.func.grad(f)), method="SLSQP", constraints=constraint, options=options
    )
    return float(found.fun)


def measure() -> list[Row]:
    """All rows."""
    rows = []
    for n in (20, 200):
        f, c, x0 = toy(n)
        found, (value, violation) = minimize_equality(f, c, x0, tol=1e-8), by_penalty(f, c, x0)
        holds = found.violation <= 1e-8
        rows.append(
            Row(
                f"toy, n = {n}: largest violation, against a penalty with Adam",
                found.violation,
                violation,
                "<= 1e-8",
                holds,
            )
        )
        holds = found.value <= value + 1e-9
        rows.append(Row(f"toy, n = {n}: value", found.value, value, "not above", holds))
    for name, problem in (("logistic regression", logistic_regression()), ("Poisson control", poisson_control())):
        f, c, x0 = problem
        reference = by_scipy(f, c, x0)
        solvers = ("dense", "sketch", "minres") if name == "logistic regression" else ("dense", "minres")
        for solver in solvers:
            began = time.thread_time()
            found = minimize_equality(f, c, x0, solver=solver, lam0="least_squares", block=32, tol=1e-6)
            seconds = time.thread_time() - began
            what = f"{name}, {solver}: KKT residual ({found.iterations} steps, {seconds:.1f} s)"
            rows.append(Row(what, found.kkt, 1e-6, "<= 1e-6", found.kkt <= 1e-6))
            near = abs(found.value - reference) <= 1e-5 * max(1, abs(reference))
            rows.append(
                Row(f"{name}, {solver}: value, against SLSQP", found.value, reference, "the same to 1e-5", near)
            )
    return rows


def main() -> None:
    """Measures and writes."""
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    write_report("augmented_lagrangian", measure(), {})


if __name__ == "__main__":
    main()
