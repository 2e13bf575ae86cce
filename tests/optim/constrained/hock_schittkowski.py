"""Equality-constrained problems of Hock and Schittkowski, "Test Examples for Nonlinear Programming Codes" (1981)."""

import math

import torch

R2 = math.sqrt(2)


def _c(*values):
    return torch.stack(values)


def _fourth_and_sixth(x):
    return (x[3] - 1) ** 4 + (x[4] - 1) ** 6


def _quadratic(x):
    return (x[1] + x[2] - 2) ** 2 + (x[3] - 1) ** 2 + (x[4] - 1) ** 2


def _linear_three(x, first):
    return _c(first, x[2] + x[3] - 2 * x[4], x[1] - x[4])


# number: start, objective, constraints, the value at the solution that the book gives
PROBLEMS = {
    6: ((-1.2, 1.0), lambda x: (1 - x[0]) ** 2, lambda x: _c(10 * (x[1] - x[0] ** 2)), 0.0),
    7: (
        (2.0, 2.0),
        lambda x: torch.log(1 + x[0] ** 2) - x[1],
        lambda x: _c((1 + x[0] ** 2) ** 2 + x[1] ** 2 - 4),
        -math.sqrt(3),
    ),
    9: (
        (0.0, 0.0),
        lambda x: torch.sin(math.pi * x[0] / 12) * torch.cos(math.pi * x[1] / 16),
        lambda x: _c(4 * x[0] - 3 * x[1]),
        -0.5,
    ),
    26: (
        (-2.6, 2.0, 2.0),
        lambda x: (x[0] - x[1]) ** 2 + (x[1] - x[2]) ** 4,
        lambda x: _c((1 + x[1] ** 2) * x[0] + x[2] ** 4 - 3),
        0.0,
    ),
    27: (
        (2.0, 2.0, 2.0),
        lambda x: 0.01 * (x[0] - 1) ** 2 + (x[1] - x[0] ** 2) ** 2,
        lambda x: _c(x[0] + x[2] ** 2 + 1),
        0.04,
    ),
    28: (
        (-4.0, 1.0, 1.0),
        lambda x: (x[0] + x[1]) ** 2 + (x[1] + x[2]) ** 2,
        lambda x: _c(x[0] + 2 * x[1] + 3 * x[2] - 1),
        0.0,
    ),
    39: (
        (2.0, 2.0, 2.0, 2.0),
        lambda x: -x[0],
        lambda x: _c(x[1] - x[0] ** 3 - x[2] ** 2, x[0] ** 2 - x[1] - x[3] ** 2),
        -1.0,
    ),
    40: (
        (0.8, 0.8, 0.8, 0.8),
        lambda x: -x[0] * x[1] * x[2] * x[3],
        lambda x: _c(x[0] ** 3 + x[1] ** 2 - 1, x[0] ** 2 * x[3] - x[2], x[3] ** 2 - x[1]),
        -0.25,
    ),
    42: (
        (1.0, 1.0, 1.0, 1.0),
        lambda x: (x - torch.arange(1, 5)).square().sum(),
        lambda x: _c(x[0] - 2, x[2] ** 2 + x[3] ** 2 - 2),
        28 - 10 * R2,
    ),
    46: (
        (R2 / 2, 1.75, 0.5, 2.0, 2.0),
        lambda x: (x[0] - x[1]) ** 2 + (x[2] - 1) ** 2 + _fourth_and_sixth(x),
        lambda x: _c(x[0] ** 2 * x[3] + torch.sin(x[3] - x[4]) - 1, x[1] + x[2] ** 4 * x[3] ** 2 - 2),
        0.0,
    ),
    48: (
        (3.0, 5.0, -3.0, 2.0, -2.0),
        lambda x: (x[0] - 1) ** 2 + (x[1] - x[2]) ** 2 + (x[3] - x[4]) ** 2,
        lambda x: _c(x.sum() - 5, x[2] - 2 * (x[3] + x[4]) + 3),
        0.0,
    ),
    49: (
        (10.0, 7.0, 2.0, -3.0, 0.8),
        lambda x: (x[0] - x[1]) ** 2 + (x[2] - 1) ** 2 + _fourth_and_sixth(x),
        lambda x: _c(x[0] + x[1] + x[2] + 4 * x[3] - 7, x[2] + 5 * x[4] - 6),
        0.0,
    ),
    50: (
        (35.0, -31.0, 11.0, 5.0, -5.0),
        lambda x: (x[0] - x[1]) ** 2 + (x[1] - x[2]) ** 2 + (x[2] - x[3]) ** 4 + (x[3] - x[4]) ** 2,
        lambda x: _c(*[x[i] + 2 * x[i + 1] + 3 * x[i + 2] - 6 for i in range(3)]),
        0.0,
    ),
    51: (
        (2.5, 0.5, 2.0, -1.0, 0.5),
        lambda x: (x[0] - x[1]) ** 2 + _quadratic(x),
        lambda x: _linear_three(x, x[0] + 3 * x[1] - 4),
        0.0,
    ),
    52: (
        (2.0, 2.0, 2.0, 2.0, 2.0),
        lambda x: (4 * x[0] - x[1]) ** 2 + _quadratic(x),
        lambda x: _linear_three(x, x[0] + 3 * x[1]),
        1859 / 349,
    ),
    77: (
        (2.0, 2.0, 2.0, 2.0, 2.0),
        lambda x: (x[0] - 1) ** 2 + (x[0] - x[1]) ** 2 + (x[2] - 1) ** 2 + _fourth_and_sixth(x),
        lambda x: _c(x[0] ** 2 * x[3] + torch.sin(x[3] - x[4]) - 2 * R2, x[1] + x[2] ** 4 * x[3] ** 2 - 8 - R2),
        0.24150513,
    ),
    78: (
        (-2.0, 1.5, 2.0, -1.0, -1.0),
        lambda x: x[0] * x[1] * x[2] * x[3] * x[4],
        lambda x: _c(x.square().sum() - 10, x[1] * x[2] - 5 * x[3] * x[4], x[0] ** 3 + x[1] ** 3 + 1),
        -2.91970041,
    ),
    79: (
        (2.0, 2.0, 2.0, 2.0, 2.0),
        lambda x: (x[0] - 1) ** 2 + (x[0] - x[1]) ** 2 + (x[1] - x[2]) ** 2 + (x[2] - x[3]) ** 4 + (x[3] - x[4]) ** 4,
        lambda x: _c(x[0] + x[1] ** 2 + x[2] ** 3 - 2 - 3 * R2, x[1] - x[2] ** 2 + x[3] + 2 - 2 * R2, x[0] * x[4] - 2),
        0.0787768209,
    ),
}
