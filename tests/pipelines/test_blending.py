"""Seamless blending against a direct sparse solve, and in the pipeline."""

import time

import numpy as np
import pytest
import torch
from scipy.sparse import coo_array
from scipy.sparse.linalg import spsolve

from trimtab.pipelines.blending import poisson_blend
from trimtab.pipelines.flowopt_mask import BLENDS


def example(size: int = 40, seed: int = 0):
    """A smooth picture, an edit with its own texture, and a mask with a hole that touches the picture's edge."""
    generator = torch.Generator().manual_seed(seed)
    ramp = torch.linspace(0.3, 0.6, size)
    picture = (ramp[:, None] + 0.1 * torch.rand(3, size, size, generator=generator))[None]
    edit = 0.5 + 0.1 * torch.sin(torch.arange(size) / 3.0).expand(1, 3, size, size)
    edit = edit + 0.02 * torch.rand(1, 3, size, size, generator=generator)
    mask = torch.zeros(1, 1, size, size)
    mask[..., :25, 8:30] = 1
    mask[..., 10:14, 12:20] = 0
    return edit, picture, mask


def direct(edit, picture, mask, mixed):
    """Perez, Gangnet and Blake's equation 7, pixel by pixel in float64, by a sparse factorization."""
    inside = mask[0, 0].numpy() >= 0.5
    number = np.full(inside.shape, -1)
    number[inside] = np.arange(inside.sum())
    result = picture[0].double().numpy().copy()
    e, s = edit[0].double().numpy(), picture[0].double().numpy()
    for channel in range(3):
        rows, columns, values, right = [], [], [], np.zeros(inside.sum())
        for y, x in zip(*np.nonzero(inside), strict=True):
            p, neighbours = number[y, x], 0
            for ny, nx in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)):
                if not (0 <= ny < inside.shape[0] and 0 <= nx < inside.shape[1]):
                    continue
                neighbours += 1
                v, own = e[channel, y, x] - e[channel, ny, nx], s[channel, y, x] - s[channel, ny, nx]
                right[p] += own if mixed and abs(own) > abs(v) else v
                if inside[ny, nx]:
                    rows.append(p), columns.append(number[ny, nx]), values.append(-1.0)
                else:
                    right[p] += s[channel, ny, nx]
            rows.append(p), columns.append(p), values.append(float(neighbours))
        matrix = coo_array((values, (rows, columns))).tocsc()
        result[channel][inside] = spsolve(matrix, right)
    return torch.from_numpy(result)[None]


@pytest.mark.parametrize("mixed", [False, True])
def test_matches_a_direct_solve(mixed):
    edit, picture, mask = example()
    blended = poisson_blend(edit, picture, mask, mixed=mixed)
    known = direct(edit, picture, mask, mixed)
    assert known.min() > 0 and known.max() < 1 and (known - picture).abs().max() > 0.05
    assert (blended - known).abs().max() < 1e-4
    outside = (mask < 0.5).expand_as(picture)
    assert torch.equal(blended[outside], picture[outside])


def test_mixed_gradients_keep_the_pictures_texture():
    _, picture, mask = example()
    flat = torch.full_like(picture, 0.5)
    texture = [
        float(poisson_blend(flat, picture, mask, mixed=mixed)[..., 15:25, 10:28].diff(dim=-1).std())
        for mixed in (False, True)
    ]
    assert texture[1] > 5 * texture[0]


def test_empty_full_and_batched_masks():
    edit, picture, mask = example()
    assert torch.equal(poisson_blend(edit, picture, torch.zeros_like(mask)), picture)
    assert torch.equal(poisson_blend(edit, picture, torch.ones_like(mask)), edit)
    other = mask.flip(-1)
    both = poisson_blend(edit.repeat(2, 1, 1, 1), picture.repeat(2, 1, 1, 1), torch.cat([mask, other]))
    assert torch.equal(both[1:], poisson_blend(edit, picture, other))


def test_a_large_region_takes_about_a_second():
    """White noise is the worst case; an idle core needs 0.8 s, a busy one is given twice that."""
    generator = torch.Generator().manual_seed(0)
    edit, picture = torch.rand(2, 1, 3, 514, 514, generator=generator)
    mask = torch.zeros(1, 1, 514, 514)
    mask[..., 1:513, 1:513] = 1
    start = time.thread_time()
    poisson_blend(edit, picture, mask)
    assert time.thread_time() - start < 1.6


def test_bad_input_is_named():
    edit, picture, mask = example()
    with pytest.raises(ValueError, match="`images` has shape"):
        poisson_blend(edit, picture[..., 1:], mask)
    with pytest.raises(ValueError, match="`pictures` has values that are not finite"):
        poisson_blend(edit, picture * torch.nan, mask)
    assert {"feather", "poisson", "poisson-mixed"} <= set(BLENDS)
