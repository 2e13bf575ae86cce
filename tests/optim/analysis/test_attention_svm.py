"""The SVM against closed forms, optimality conditions and cvxpy; gradient descent's direction; transformers' heads."""

import cvxpy
import numpy as np
import pytest
import torch
from torch.nn.functional import cosine_similarity, normalize, scaled_dot_product_attention
from transformers import CLIPTextConfig, CLIPTextModel

from tests.tiny_pipelines import NUMPY_IN_SCHEDULERS, tiny_pipeline
from trimtab.optim import (
    attention_descent,
    attention_margin,
    attention_svm,
    attention_svm_multi,
    margin_picture,
    selection_margin,
    svm_correlation,
)

pytestmark = pytest.mark.filterwarnings(NUMPY_IN_SCHEDULERS)


def sphere(*shape, seed=0):
    draw = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return normalize(draw, dim=-1)


def problem(seed, n=6, T=8, d=10):
    selected = torch.randint(0, T, (n,), generator=torch.Generator().manual_seed(seed))
    return sphere(n, T, d, seed=seed), sphere(n, d, seed=1000 + seed), selected


def differences(x, selected):
    """(n, T - 1, d), the selected token less each other one."""
    rows = [torch.cat([x[i, :s], x[i, s + 1 :]]) for i, s in enumerate(selected.tolist())]
    return torch.stack([x[i, s] - rest for (i, s), rest in zip(enumerate(selected.tolist()), rows, strict=True)])


def test_closed_forms():
    eye = torch.eye(4, dtype=torch.float64)
    x, z, selected = eye.view(2, 2, 4), torch.stack([2 * eye[0], eye[1]]), torch.tensor([0, 0])
    wanted = 0.25 * torch.outer(eye[0] - eye[1], eye[0]) + 0.5 * torch.outer(eye[2] - eye[3], eye[1])
    exact = attention_svm(x, z, selected)
    torch.testing.assert_close(exact.weight, wanted, atol=1e-10, rtol=0)
    assert 1 / exact.margin**2 == pytest.approx(0.625, abs=1e-10) and exact.rank == 2
    nuclear = attention_svm(x, z, selected, norm="nuc")
    assert 1 / nuclear.margin == pytest.approx(1.06066, abs=1e-3)
    for norm, limit in (("fro", 1e-10), ("nuc", 1e-6)):
        one = attention_svm(x[:1], z[:1], selected[:1], norm=norm)
        single = torch.outer(eye[0] - eye[1], 2 * eye[0]) / (2 * 4)
        torch.testing.assert_close(one.weight, single, atol=limit, rtol=0)
        assert one.rank == 1 and one.support.tolist() == [[False, True]]


def test_optimality_conditions():
    for seed in range(3):
        x, z, selected = problem(seed)
        found = attention_svm(x, z, selected)
        D = differences(x, selected)
        scores = torch.einsum("ntd,de,ne->nt", D, found.weight, z)
        keep = torch.ones(6, 8, dtype=torch.bool).scatter(1, selected[:, None], False)
        a = found.multipliers[keep].view(6, 7)
        assert float(scores.min()) == pytest.approx(1, abs=1e-10) and float(a.min()) >= 0
        assert float((a * (scores - 1)).abs().max()) < 1e-10
        assert float(found.weight.square().sum()) == pytest.approx(float(a.sum()), abs=1e-10)
        torch.testing.assert_close(torch.einsum("nt,ntd,ne->de", a, D, z), found.weight, atol=1e-10, rtol=0)
        assert torch.equal(found.support[keep].view(6, 7), a > 1e-9 * a.max())


@pytest.mark.parametrize("norm", ["fro", "nuc"])
def test_the_solution_is_cvxpys(norm):
    x, z, selected = problem(0)
    D = differences(x, selected).numpy()
    W = cvxpy.Variable((10, 10))
    goal = cvxpy.sum_squares(W) if norm == "fro" else cvxpy.normNuc(W)
    constraints = [D[i, t] @ W @ z[i].numpy() >= 1 for i in range(6) for t in range(7)]
    value = cvxpy.Problem(cvxpy.Minimize(goal), constraints).solve(solver=cvxpy.CLARABEL)
    found = attention_svm(x, z, selected, norm=norm)
    assert 1 / found.margin == pytest.approx(value**0.5 if norm == "fro" else value, rel=1e-6)
    assert np.linalg.norm(found.weight.numpy() - W.value) < 1e-5 * np.linalg.norm(W.value)
    assert found.worst >= 1 - 1e-9 and found.rank in ({2, 3, 4} if norm == "nuc" else {5, 6})


def test_what_can_be_separated():
    x, z, _ = problem(3)
    x[:, 0] = (x[:, 1] + x[:, 2]) / 2
    selected = torch.zeros(6, dtype=torch.long)
    found = attention_svm(x, z, selected)
    assert not found.feasible and found.weight is None and found.margin == 0
    with pytest.raises(ValueError, match="can't be separated"):
        attention_svm(x, z, selected, strict=True)
    assert not attention_svm(*problem(0)[:1], torch.zeros(6, 10), problem(0)[2]).feasible
    counts = {d: sum(attention_svm(*problem(seed, d=d)).feasible for seed in range(20)) for d in (2, 4, 10)}
    assert counts[2] <= 2 and counts[4] == counts[10] == 20
    twice = torch.cat([x[:, 3:], x[:, 3:]], 1)  # copies of the selected token are no constraint, nor are masked ones
    chosen = torch.ones(6, dtype=torch.long)
    mask = torch.ones(6, 10, dtype=torch.bool)
    mask[:, 5:] = False
    reference = attention_svm(x[:, 3:], z, chosen).margin
    assert attention_svm(twice, z, chosen).margin == pytest.approx(reference)
    assert attention_svm(twice, z, chosen, mask=mask).margin == pytest.approx(reference)


def descents():
    seeds = range(10)
    x = torch.stack([sphere(6, 8, 10, seed=seed) for seed in seeds])
    z = torch.stack([sphere(6, 10, seed=100 + seed) for seed in seeds])
    v = torch.stack([sphere(10, seed=200 + seed) for seed in seeds])
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(0, 2, (10, 6), generator=generator) * 2.0 - 1
    return x, z, y, v


def test_gradient_descent_goes_in_the_direction_of_the_svm():
    x, z, y, v = descents()
    straight = attention_descent(x, z, y, v)
    factored = attention_descent(x, z, y, v, parametrization="KQ", generator=torch.Generator().manual_seed(1))
    cosines = {"W": [], "KQ": [], "KQ to Frobenius": []}
    for seed in range(10):
        best = attention_svm(x[seed], z[seed], straight.selected[seed])
        cosines["W"].append(svm_correlation(straight.weight[seed], best.weight))
        for norm, name in (("nuc", "KQ"), ("fro", "KQ to Frobenius")):
            best = attention_svm(x[seed], z[seed], factored.selected[seed], norm=norm)
            cosines[name].append(svm_correlation(factored.weight[seed], best.weight))
    means = {name: np.mean(values) for name, values in cosines.items()}
    assert means["W"] >= 0.99 and means["KQ"] >= 0.985 and means["KQ"] > means["KQ to Frobenius"] + 0.08, cosines
    assert float(straight.probabilities.max(-1).values.min()) > 0.9


def test_several_tokens_under_a_nonlinear_head():
    x, z, _ = problem(5, n=3, T=5, d=8)
    p = torch.tensor([[0.6, 0.4, 0, 0, 0], [0, 1.0, 0, 0, 0], [0, 0, 0.5, 0.25, 0.25]], dtype=torch.float64)
    trained = torch.zeros(8, 8, dtype=torch.float64)
    found = attention_svm_multi(x, z, p, weight=trained)
    scores = torch.einsum("ntd,de,ne->nt", x, found.finite, z)
    assert float(scores[0, 0] - scores[0, 1]) == pytest.approx(np.log(1.5), abs=1e-8)
    assert float(scores[2, 2] - scores[2, 4]) == pytest.approx(np.log(2), abs=1e-8)
    W = cvxpy.Variable((8, 8))
    constraints, equal = [], []
    for i in range(3):
        kept, first = p[i] > 0, int(p[i].argmax())
        for t in range(5):
            score = (x[i, first] - x[i, t]).numpy() @ W @ z[i].numpy()
            constraints += [score >= 1] if not kept[t] else [score == 0] if t != first else []
            equal += [score == float((p[i, first] / p[i, t]).log())] if kept[t] and t != first else []
    cvxpy.Problem(cvxpy.Minimize(cvxpy.sum_squares(W)), constraints).solve(solver=cvxpy.CLARABEL)
    np.testing.assert_allclose(found.direction.numpy(), W.value, atol=1e-5)
    cvxpy.Problem(cvxpy.Minimize(cvxpy.sum_squares(W)), equal).solve(solver=cvxpy.CLARABEL)
    np.testing.assert_allclose(found.finite.numpy(), W.value, atol=1e-5)
    grown = attention_svm_multi(x, z, p, weight=found.finite + 7 * found.direction)
    assert grown.scale == pytest.approx(7, abs=1e-8)


def test_margins_of_a_head():
    k, q = sphere(5, 4), 3 * sphere(2, 4, seed=1)
    report = selection_margin(k, q)
    scores = q @ k.T / 2
    top = scores.topk(2, 1)
    assert torch.equal(report.selected, top.indices[:, 0]) and torch.equal(report.runner_up, top.indices[:, 1])
    torch.testing.assert_close(report.logit_margin, top.values[:, 0] - top.values[:, 1])
    p = scores.softmax(1)
    torch.testing.assert_close(report.entropy, -(p * p.log()).sum(1))
    assert 0 < report.efficiency <= 1 + 1e-9
    best = attention_svm(k.expand(2, 5, 4), q, report.selected)
    assert report.best_margin == pytest.approx(best.margin) and torch.equal(report.support, best.support)
    perfect = selection_margin(k, q, weight=best.weight, selected=report.selected)
    assert perfect.efficiency == pytest.approx(1, abs=1e-9)
    flipped = selection_margin(k, q, weight=best.weight.T, selected=report.selected)
    assert flipped.efficiency < 0.99


def test_heads_of_clip_are_read_as_they_attend():
    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=8, eos_token_id=49, bos_token_id=48, pad_token_id=49,
    )  # fmt: skip
    model = CLIPTextModel(config).eval()
    ids = torch.tensor([[48, 3, 7, 9, 11, 49]])
    found = attention_margin(model, {"input_ids": ids}, ignore_tokens=(0,), max_queries=3)
    assert [(head.head, head.call) for head in found] == [(0, 0), (1, 0)] * 2
    assert found[0].layer.endswith("layers.0.self_attn") and found[2].layer.endswith("layers.1.self_attn")
    assert found[0].tokens.tolist() == [1, 2, 3, 4, 5] and len(found[0].report.selected) == 3
    model.config._attn_implementation = "eager"
    weights = model(ids, output_attentions=True).attentions
    for layer in range(2):
        for head in range(2):
            seen = weights[layer][0, head]
            part = seen[[2, 4, 5], 1:]  # evenly spaced queries among those that see two tokens or more
            wanted = (part / part.sum(1, keepdim=True)).mean(0)
            got = found[2 * layer + head]
            torch.testing.assert_close(got.attention, wanted.double(), atol=1e-5, rtol=1e-4)
            assert torch.equal(got.report.selected, part.argmax(1))
    picture = margin_picture(found, ["<s>", "a", "red", "cat", "here", "</s>"])
    assert picture.width > 300 and picture.height > 70
    with pytest.raises(ValueError, match="never called"):
        attention_margin(model, {"input_ids": ids})


def test_heads_of_a_diffusion_transformer():
    pipe = tiny_pipeline("sd3")
    run = lambda prompt: pipe(prompt, num_inference_steps=2, guidance_scale=1.0, output_type="latent")  # noqa: E731
    found = attention_margin(
        run, "a cat", modules=pipe.transformer, layers=["attn"], tokens=slice(-4, None), solve=False
    )
    assert found and all("attn" in head.layer and len(head.tokens) == 4 for head in found)
    assert {head.call for head in found} == {0, 1}  # of two steps
    assert all(head.report.best_margin is None for head in found)


def test_masks_scales_and_grouped_heads():
    q, k = sphere(1, 4, 3, 6).float(), sphere(1, 2, 5, 6, seed=1).float()
    mask = torch.zeros(1, 1, 3, 5)
    mask[..., 4] = -torch.inf
    call = lambda q: scaled_dot_product_attention(q, k, k, attn_mask=mask, scale=2.0, enable_gqa=True)  # noqa: E731
    found = attention_margin(call, q)
    for head in found:
        scores = 2 * q[0, head.head] @ k[0, head.head // 2, :4].T
        top = scores.topk(2, 1).values
        torch.testing.assert_close(head.report.logit_margin.float(), top[:, 0] - top[:, 1])
        assert float(cosine_similarity(head.attention[:4], scores.softmax(1).mean(0).double(), dim=0)) > 1 - 1e-9
    assert [head.head for head in found] == [0, 1, 2, 3]


def test_bad_input():
    x, z, selected = problem(0)
    for error, match, call in (
        (ValueError, "shapes", lambda: attention_svm(x, z[:, :3], selected)),
        (ValueError, r"values in \[0, 8\)", lambda: attention_svm(x, z, selected + 8)),
        (TypeError, "takes integers", lambda: attention_svm(x, z, selected.double())),
        (ValueError, "leaves out", lambda: attention_svm(x, z, selected, mask=torch.zeros(6, 8))),
        (ValueError, "takes 1 to 4000", lambda: attention_svm(*problem(0, n=600))),
        (ValueError, "`norm` is 'l1'", lambda: attention_svm(x, z, selected, norm="l1")),
        (ValueError, "300 dimensions", lambda: attention_svm(*problem(0, d=300), norm="nuc")),
        (TypeError, "`tokens` is torch.int64", lambda: attention_svm(x.long(), z, selected)),
        (ValueError, "not finite", lambda: attention_svm(x / 0, z, selected)),
        (ValueError, "not 0", lambda: svm_correlation(torch.eye(2), torch.zeros(2, 2))),
        (ValueError, "takes \\(..., n, T", lambda: attention_descent(x, z, torch.ones(5), z[0])),
        (ValueError, "`heads` is empty", lambda: margin_picture([], [])),
        (ValueError, "fewer than two", lambda: selection_margin(x[0, :1], z)),
    ):
        with pytest.raises(error, match=match):
            call()
