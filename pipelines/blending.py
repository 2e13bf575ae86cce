"""Seamless blending: an edit set into its picture by its gradients, so that no edge of the mask shows."""

from __future__ import annotations

import torch
from torch import Tensor

from trimtab.optim.solvers import GridPoisson, Multigrid, conjugate_directions

__all__ = ["poisson_blend"]

TOLERANCE = 3e-6
"""Of the residual, relative: less than a hundredth of a step of an 8-bit picture."""


@torch.no_grad()
def poisson_blend(images: Tensor, pictures: Tensor, mask: Tensor, *, mixed: bool = False) -> Tensor:
    """Edits with their own gradients inside a mask and their pictures' pixels outside of it.

    Inside the mask f solves Poisson's equation: the sum over a pixel's neighbours of f_p - f_q is that of v_pq, with
    f = picture outside and v_pq = edit_p - edit_q. With `mixed` gradients v_pq is the picture's own difference where
    that is larger, which keeps the picture's texture under a smooth or see-through edit. At the picture's own edges
    nothing is asked. Source: Perez, Gangnet and Blake, "Poisson Image Editing" (2003), equations 7 and 13.

    It is solved by conjugate gradients preconditioned by multigrid, all channels at once.

    Args:
        images: (B, C, H, W), the edit.
        pictures: (B, C, H, W), the source.
        mask: (B, 1, H, W); inside is 0.5 or more. An empty one gives the picture, a full one the edit.
        mixed: the larger of both gradients.

    Returns:
        (B, C, H, W) of the edit's dtype, cut to [0, 1].

    Raises:
        ValueError: shapes that do not fit, or values that are not finite.

    Example:
        >>> picture = torch.linspace(0, 1, 16).expand(1, 1, 16, 16)
        >>> mask = torch.zeros(1, 1, 16, 16)
        >>> mask[..., 4:12, 4:12] = 1
        >>> edit = picture + 0.3  # the same gradients: blending takes the shift away
        >>> bool((poisson_blend(edit, picture, mask) - picture).abs().max() < 1e-4)
        True
    """
    if images.shape != pictures.shape or images.ndim != 4 or mask.shape != (len(images), 1, *images.shape[2:]):
        raise ValueError(
            f"`images` has shape {tuple(images.shape)}, `pictures` {tuple(pictures.shape)}, `mask` "
            f"{tuple(mask.shape)}; takes (B, C, H, W) twice and (B, 1, H, W)"
        )
    for name, value in (("images", images), ("pictures", pictures), ("mask", mask)):
        if not bool(torch.isfinite(value).all()):
            raise ValueError(f"`{name}` has values that are not finite")
    edits, sources = images.float(), pictures.to(images.device).float()
    blended = [_blend(*each, mixed) for each in zip(edits, sources, mask[:, 0].to(images.device) >= 0.5, strict=True)]
    return torch.stack(blended).clamp(0, 1).to(images.dtype)


def _blend(edit: Tensor, picture: Tensor, inside: Tensor, mixed: bool) -> Tensor:
    if not bool(inside.any()):
        return picture
    if bool(inside.all()):
        return edit
    guide = edit if not mixed else None
    divergence = torch.zeros_like(picture)
    for axis in (-1, -2):
        v = edit.diff(dim=axis)
        if guide is None:
            own = picture.diff(dim=axis)
            v = torch.where(own.abs() > v.abs(), own, v)
        size = v.shape[axis]
        divergence.narrow(axis, 1, size).add_(v)
        divergence.narrow(axis, 0, size).sub_(v)
    # Only pixels around the mask matter: the known ones enter by their difference f - picture, which is 0 there.
    rows, columns = (inside.any(1 - axis).nonzero()[:, 0] for axis in (0, 1))
    box = tuple(
        slice(max(0, int(place[0]) - 1), min(side, int(place[-1]) + 2))
        for place, side in zip((rows, columns), inside.shape, strict=True)
    )
    region = inside[box]
    # A box that cuts the picture's free edges off keeps them free; inside the picture its rim is known pixels.
    A = GridPoisson(region, edges="free")
    own = torch.zeros_like(picture)
    for axis in (-1, -2):
        v = picture.diff(dim=axis)
        size = v.shape[axis]
        own.narrow(axis, 1, size).add_(v)
        own.narrow(axis, 0, size).sub_(v)
    b = (divergence - own)[:, *box] * A.mask
    found = conjugate_directions(
        A,
        b,
        propose=Multigrid(A),
        tolerance=TOLERANCE,
        absolute_tolerance=1e-7,
        max_iterations=100,
        keep=1,  # enough for a preconditioner that is linear
        normalize=False,
        batched=True,
    )
    result = picture.clone()
    result[:, *box] += found.x * A.mask
    return result
