"""The estimate against its formula, analytic gradient and Gaussians; protected pictures against their bound."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from trimtab.optim import bayes_error, bayes_error_report, cloak, label_bandwidth, mixture_lower_bound
from trimtab.optim.protect import round_towards


def rand(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_the_formula(z, y, sigma, k):
    """The paper's estimate and its gradient with respect to z, by loops over pairs."""
    n = len(z)
    s = np.exp(-((z[:, None] - z[None]) ** 2).sum(-1) / (2 * sigma**2))
    np.fill_diagonal(s, 0)
    total = s.sum(1)
    p = np.stack([s[:, y == c].sum(1) for c in range(k)], 1) / (total[:, None] + 1e-8)
    guess, gradient = p.argmax(1), np.zeros_like(z)
    for i in range(n):
        member = y == guess[i]
        c = (member * total[i] - s[i][member].sum()) / max(total[i], 1e-30) ** 2
        for j in range(n):
            push = c[j] * s[i, j] * (z[i] - z[j]) / sigma**2
            gradient[i] += push
            gradient[j] -= push
    return (1 - p.max(1)).mean(), gradient / n


def test_the_estimate_and_its_gradient_are_the_papers():
    x, y = rand(20, 3) * 2, torch.arange(20) % 3
    leaf, scale = x.clone().requires_grad_(), float(x.abs().max())
    value = bayes_error(leaf, y, bandwidth=0.3)
    (gradient,) = torch.autograd.grad(value, leaf)
    wanted, slopes = by_the_formula((x / scale).numpy(), y.numpy(), 0.3, 3)
    assert value.item() == pytest.approx(wanted, abs=1e-6)
    np.testing.assert_allclose(gradient.numpy() * scale, slopes, atol=1e-6)
    raw = x.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: bayes_error(x, y, bandwidth=0.3, normalize=False), raw, atol=1e-6)
    assert torch.autograd.gradcheck(lambda x: 3 * bayes_error(x, y, kernel="sigmoid", normalize=False), raw, atol=1e-6)
    each = bayes_error(x, y, bandwidth=0.3, reduction="none", chunk_size=7)
    assert each.shape == (20,) and float(each.mean()) == pytest.approx(wanted, abs=1e-6)
    own = bayes_error(x, y, kernel=lambda a, b: -torch.cdist(a, b).square() / (2 * 0.3**2))
    assert float(own) == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize(("m", "true"), [(0.5, 0.3085), (1.0, 0.1587), (1.5, 0.0668)])
def test_gaussians_of_known_bayes_error(m, true):
    y = torch.arange(2000) % 2
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2000, 1, generator=generator, dtype=torch.float64) + m * (2.0 * y[:, None] - 1)
    assert float(bayes_error(x, y, bandwidth=0.3, normalize=False)) == pytest.approx(true, abs=0.03)
    assert float(bayes_error(x, y, bandwidth=1.0, normalize=False)) > true + 0.06
    if m != 1.0:
        return
    assert float(bayes_error(x, y)) == pytest.approx(true, abs=0.04)  # with its own bandwidth
    report = bayes_error_report(x, y)
    assert report.knn_lower - 0.03 < true < report.knn_upper + 0.03
    assert report.bandwidth == label_bandwidth(x, y) and report.ratio == pytest.approx(report.estimate * 2)
    assert np.mean(list(report.per_class.values())) == pytest.approx(report.estimate)


def test_far_points_do_not_look_unlearnable():
    x = torch.tensor([[0.0], [1.0], [1e3], [1e3 + 1]], dtype=torch.float64)
    y = torch.tensor([0, 0, 1, 1])
    assert float(bayes_error(x, y, bandwidth=1e-3, normalize=False)) == 0.0
    assert by_the_formula(x.numpy(), y.numpy(), 1e-3, 2)[0] == 1.0  # the published form underflows


def test_groups_and_references():
    x, y = rand(10, 2), torch.arange(10) % 2
    twice, labels, groups = x.repeat(2, 1), y.repeat(2), torch.arange(10).repeat(2)
    alone = float(bayes_error(x, y, bandwidth=0.02))
    assert float(bayes_error(twice, labels, bandwidth=0.02, groups=groups)) == pytest.approx(alone)
    leaked = 1 - bayes_error(twice, labels, bandwidth=0.02, reduction="none")
    assert float(leaked.min()) > 0.5 and float(bayes_error(twice, labels, bandwidth=0.02)) != pytest.approx(alone)
    against = bayes_error(x, y, reference=x, reference_labels=y, bandwidth=1e-3)
    assert float(against) == pytest.approx(0, abs=1e-6)


def test_a_mixtures_error_is_concave():
    generator = np.random.default_rng(0)
    error = lambda joint: 1 - joint.max(1).sum()  # noqa: E731
    for _ in range(20):
        p, q = (generator.dirichlet(np.full(80, 0.3)).reshape(20, 4) for _ in range(2))
        for part in np.linspace(0.1, 0.9, 9):
            bound = mixture_lower_bound(error(p), error(q), part)
            assert error(part * p + (1 - part) * q) >= bound - 1e-12
        assert error(p) == pytest.approx(mixture_lower_bound(error(p), error(p), 0.5))


@pytest.fixture(scope="module")
def pictures():
    y = torch.arange(60) % 3
    means = 0.5 + 0.02 * torch.randn(3, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    noise = 0.1 * torch.randn(60, 3, 6, 6, generator=torch.Generator().manual_seed(1))
    return (means[y] + noise).clamp(0, 1), y


@pytest.mark.parametrize("optimizer", ["sign", "adamw"])
def test_protected_pictures_keep_within_the_bound(pictures, optimizer):
    images, y = pictures
    fixed, seen = torch.zeros(60, dtype=torch.bool), []
    fixed[:5] = True
    step = 0.01 if optimizer == "adamw" else None
    options = {"outer_steps": 3, "inner_steps": 5, "optimizer": optimizer, "step_size": step, "fixed": fixed}
    result = cloak(images, y, callback=seen.append, **options)
    original = (images * 255).round()
    saved = result.images * 255
    assert torch.equal(saved.round(), saved) or float((saved - saved.round()).abs().max()) < 1e-4
    change = (saved.round() - original).abs()
    assert float(change.max()) <= 8 and round(result.max_change * 255) == int(change.max())
    assert float(saved.min()) >= 0 and float(saved.max()) <= 255.001
    assert torch.equal(saved[:5].round(), original[:5]) and result.psnr[:5].isinf().all()
    assert 29 < float(result.psnr[5:].min()) < 45
    assert result.bayes_error[-1] > result.bayes_error[0] + 0.02
    assert result.best_so_far == sorted(result.best_so_far)
    assert [state.outer for state in seen] == [1, 2, 3]
    features = saved.round().div(255).flatten(1)
    width = label_bandwidth((original / 255).flatten(1), y)
    assert max(result.bayes_error[1:]) == pytest.approx(float(bayes_error(features, y, bandwidth=width)), abs=1e-5)
    again = cloak(images, y, start=seen[1].images, **{**options, "outer_steps": 1})
    if optimizer == "sign":
        assert again.bayes_error[-1] == pytest.approx(result.bayes_error[-1], abs=1e-6)  # it went on where it was


def test_features_and_refits(pictures):
    images, y = pictures
    torch.manual_seed(0)
    net, calls = nn.Sequential(nn.Flatten(), nn.Linear(108, 4), nn.Dropout(0.5)).train(), []

    def refit(x, labels, outer):
        calls.append((outer, float((x - images).abs().max())))
        return net

    plain = cloak(images, y, feature_fn=net.eval(), outer_steps=2, inner_steps=3, batch_size=7)
    refitted = cloak(images, y, refit=refit, outer_steps=2, inner_steps=3)
    torch.testing.assert_close(plain.bayes_error, refitted.bayes_error, atol=1e-5, rtol=0)
    assert [outer for outer, _ in calls] == [0, 1] and calls[1][1] > calls[0][1]
    jpeg = plain.after_jpeg(75)
    assert jpeg.shape == plain.images.shape and 0 < float((jpeg - plain.images).abs().mean()) < 0.1


def test_rounding_is_towards_the_original():
    original = (rand(5000, seed=3) * 255).round() / 255
    moved = (original + (rand(5000, seed=4) * 2 - 1) * 0.1).clamp(0, 1)
    found = round_towards(moved.float(), original.float(), 8 / 255).double() * 255
    start, wish = original * 255, (moved * 255).clamp(original * 255 - 8, original * 255 + 8)
    assert float((found - found.round()).abs().max()) < 1e-4
    assert bool(((found - start).abs() <= (wish - start).abs() + 2e-3).all())
    assert bool(((found - wish).abs() < 1).all())


def test_bad_input(pictures):
    images, y = pictures
    x = rand(6, 2)
    for error, match, call in (
        (TypeError, "`features` is torch.int64", lambda: bayes_error(torch.ones(3, 2).long(), torch.tensor([0, 1, 1]))),
        (TypeError, "`labels` is torch.float32", lambda: bayes_error(x, torch.ones(6))),
        (ValueError, "two classes", lambda: bayes_error(x, torch.zeros(6).long())),
        (ValueError, "shapes", lambda: bayes_error(x, y)),
        (ValueError, "`bandwidth` is 0", lambda: bayes_error(x, torch.arange(6), bandwidth=0)),
        (ValueError, "`num_classes` is 2", lambda: bayes_error(x, torch.arange(6), num_classes=2)),
        (ValueError, "`groups`", lambda: bayes_error(x, torch.arange(6), groups=torch.zeros(6).long())),
        (ValueError, "not finite", lambda: bayes_error(x / 0, torch.arange(6))),
        (TypeError, "`images` is torch.uint8", lambda: cloak((images * 255).byte(), y)),
        (ValueError, r"`images` has shape \(60, 3, 6, 6\)", lambda: cloak(images * 2, y)),
        (ValueError, "`eps` is 0.001", lambda: cloak(images, y, eps=0.001)),
        (ValueError, "`outer_steps` is 0", lambda: cloak(images, y, outer_steps=0)),
        (ValueError, "at least one picture", lambda: cloak(images, y, fixed=torch.ones(60).bool())),
        (RuntimeError, "outer step 1", lambda: cloak(images, y, feature_fn=lambda x: (x - x.detach()).sqrt())),
        (ValueError, "`fraction` is 2", lambda: mixture_lower_bound(0.1, 0.1, 2)),
        (ValueError, "`quality` is 0", lambda: cloak(images, y, outer_steps=1, inner_steps=1).after_jpeg(0)),
    ):
        with pytest.raises(error, match=match):
            call()
    with pytest.warns(UserWarning, match="one picture only"):
        cloak(images[:5], torch.tensor([0, 0, 1, 1, 2]), outer_steps=1, inner_steps=1)
    assert math.isclose(mixture_lower_bound(1, 0, 0.5), 0.5)
