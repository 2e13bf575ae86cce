"""Target surrogates against one update for each expensive call: in regression, in distillation and for a reward.

The claim: ten updates a call need at most a fifth of the calls of gradient descent on the regression. For the other two
calls, passes of the model and seconds are shown without a bar.

    python -m trimtab.benchmarks.optim.target_surrogate [--only regression|imitation|reward]

Regression: 400 samples, 30 features of condition 10^1.5, labels the sign of a signal with unit noise, full batch, start
0, inner steps of 1 / smoothness, until the loss is within 1e-3 of its minimum; then mini-batches of 100 in 500 calls
with steps that fall as 1 / sqrt(t), the best of a grid. Imitation: a LoRA of the bundled model learns one of four
straight steps, each of three guided steps of the model itself, on the states that it visits from one noise a call; a
call is the six passes of the teacher; Adam at the same rate, held-out states. Reward: a LoRA of the distilled
transformer raises the bundled reward of its one-step pictures of four captions; a call is the reward's gradient at the
latents and is charged 0.5 s on top of what it takes, as a slow or remote model would. Seconds are processor time.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable

import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from peft import LoraConfig
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from trimtab.assets import FEW_STEPS, asset_path
from trimtab.benchmarks.optim.report import RESULTS, Row, write_report
from trimtab.optim import TargetSurrogate
from trimtab.recipes.distil import teacher_end, velocity_of
from trimtab.recipes.finetune import LORA_LAYERS
from trimtab.rewards import load_reward

CAPTIONS = (
    "a cat on a pink background",
    "two owls on a sky background",
    "a red heart to the left of a key on a mint background",
    "a rocket above a tree on a sand background",
)
CHARGE = 0.5


def problem(n: int = 400, d: int = 30) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    u, _ = torch.linalg.qr(torch.randn(n, d, generator=generator, dtype=torch.float64))
    v, _ = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64))
    features = u @ torch.diag(torch.logspace(0, -1.5, d, dtype=torch.float64)) @ v.T * math.sqrt(n)
    noise = torch.randn(n, generator=generator, dtype=torch.float64)
    signal = features @ torch.randn(d, generator=generator, dtype=torch.float64)
    return features, torch.sign(signal + noise)


def logistic(labels: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda z: nn.functional.softplus(-labels * z).mean()


def minimum(features: Tensor, labels: Tensor) -> float:
    theta = torch.zeros(features.shape[1], dtype=torch.float64, requires_grad=True)
    lbfgs = torch.optim.LBFGS([theta], max_iter=2000, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        lbfgs.zero_grad()
        loss = logistic(labels)(features @ theta)
        loss.backward()
        return loss

    lbfgs.step(closure)
    return float(closure().detach())


def calls_to_gap(features: Tensor, labels: Tensor, best: float, inner: int, most: int = 2000) -> tuple[int, int]:
    """Calls and passes until the loss is within 1e-3 of the best."""
    n = len(labels)
    eta = 4.0 * n
    theta = nn.Parameter(torch.zeros(features.shape[1], dtype=torch.float64))
    rate = eta / float(torch.linalg.matrix_norm(features, 2) ** 2)
    fit = TargetSurrogate(torch.optim.SGD([theta], rate), eta=eta, inner_steps=inner)
    passes = 0
    for calls in range(most):
        step = fit.step(lambda: features @ theta, loss=logistic(labels))
        if step.loss - best < 1e-3:
            return calls, passes
        passes += step.model_passes
    return most, passes


def stochastic_gap(features: Tensor, labels: Tensor, best: float, inner: int, size: int, calls: int = 500) -> float:
    """Gap after ``calls`` mini-batches with the best of a grid of steps."""
    gaps = []
    for factor in (1.0, 3.0, 10.0):
        generator = torch.Generator().manual_seed(1)
        theta = nn.Parameter(torch.zeros(features.shape[1], dtype=torch.float64))
        eta = 4.0 * size * factor
        sgd = torch.optim.SGD([theta], 1.0)
        fit = TargetSurrogate(sgd, eta=eta, inner_steps=inner, schedule="sqrt")
        for _ in range(calls):
            index = torch.randperm(len(labels), generator=generator)[:size]
            part = features[index]
            sgd.param_groups[0]["lr"] = fit.present_eta / float((part @ part.T).trace())
            fit.step(lambda theta=theta, part=part: part @ theta, loss=logistic(labels[index]))
        gaps.append(float(logistic(labels)(features @ theta.detach())) - best)
    return min(gap for gap in gaps if math.isfinite(gap))


def regression() -> tuple[list[Row], dict]:
    features, labels = problem()
    best = minimum(features, labels)
    counts = {m: calls_to_gap(features, labels, best, m) for m in (1, 10, 100)}
    gaps = {m: stochastic_gap(features, labels, best, m, 100) for m in (1, 10)}
    rows = [
        Row("regression: calls to 1e-3, m = 10 against m = 1", counts[10][0], counts[1][0], "<= 0.2x",
            counts[10][0] <= 0.2 * counts[1][0]),
        Row("  passes of the model for that", counts[10][1], counts[1][1], "no bar", True),
        Row("  calls, m = 100 against m = 1", counts[100][0], counts[1][0], "no bar", True),
        Row("batches of 100, gap after 500 calls, m = 10 against m = 1", gaps[10], gaps[1], "no bar", True),
    ]  # fmt: skip
    return rows, {
        "calls and passes": {str(m): c for m, c in counts.items()},
        "gaps": {str(m): g for m, g in gaps.items()},
    }


def with_lora(transformer: SD3Transformer2DModel) -> list[nn.Parameter]:
    torch.manual_seed(0)
    layers = [name for name, _ in transformer.named_modules() if name.endswith(LORA_LAYERS)]
    transformer.add_adapter(LoraConfig(r=8, lora_alpha=8, target_modules=layers))
    return [p for p in transformer.parameters() if p.requires_grad]


def texts(pipe: StableDiffusion3Pipeline) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Features and pooled vectors of the captions, and of none."""
    outputs = pipe.encode_prompt(list(CAPTIONS), None, None, max_sequence_length=16)
    return tuple(tensor.detach() for tensor in (outputs[0], outputs[2], outputs[1], outputs[3]))


def imitation(inner: int, calls: int, rate: float = 3e-4) -> list[dict[str, float]]:
    """Held-out losses on the way, with the calls, passes and seconds that led there."""
    pipe = StableDiffusion3Pipeline.from_pretrained(asset_path("emoji-scenes"), dtype=torch.float32)
    features, pooled, no_features, no_pooled = texts(pipe)
    student = pipe.transformer
    trained = with_lora(student)
    levels = torch.tensor([1.0, 0.75, 0.5, 0.25])

    def states(noise: Tensor, which: Tensor) -> Tensor:
        visited = [noise]
        for level in levels[:-1]:
            velocity = velocity_of(student, visited[-1], level.expand(len(noise)), features[which], pooled[which])
            visited.append(visited[-1] - 0.25 * velocity)
        return torch.cat(visited)

    @torch.no_grad()
    def targets(at: Tensor, sigmas: Tensor, which: Tensor) -> Tensor:
        student.disable_adapters()
        pair = [torch.cat([none[which], told[which]]) for none, told in ((no_features, features), (no_pooled, pooled))]
        end = teacher_end(
            lambda z, s: velocity_of(student, torch.cat([z, z]), torch.cat([s, s]), *pair).chunk(2),
            at, sigmas, 0.25, num_steps=3, guidance_scale=3.0,
        )  # fmt: skip
        student.enable_adapters()
        return 4.0 * (at - end)

    def draw(seed: int, which: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        noise = torch.randn(len(which), 8, 16, 16, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            at = states(noise, which)
        return at, levels.repeat_interleave(len(which)), which.repeat(4)

    held = draw(10**6, torch.tensor([0, 2]))
    answer = targets(*held)
    fit = TargetSurrogate(torch.optim.Adam(trained, rate), inner_steps=inner)
    trace, passes, started = [], 0, time.process_time()
    for call in range(calls + 1):
        if call % 4 == 0:
            with torch.no_grad():
                at, sigmas, which = held
                guess = velocity_of(student, at, sigmas, features[which], pooled[which])
            spent = time.process_time() - started
            trace.append(
                {"calls": call, "passes": passes, "seconds": spent, "loss": float((guess - answer).square().mean())}
            )
            print(inner, trace[-1], flush=True)
            started = time.process_time() - spent
        at, sigmas, which = draw(call, torch.tensor([call % 4]))
        wanted = targets(at, sigmas, which)
        fit.eta = wanted.numel() / 2  # of a mean of squares: the surrogate is the loss itself
        with sdpa_kernel(SDPBackend.MATH):
            step = fit.step(
                lambda at=at, sigmas=sigmas, which=which: velocity_of(
                    student, at, sigmas, features[which], pooled[which]
                ),
                loss=lambda z, wanted=wanted: (z - wanted).square().mean(),
            )
        passes += step.model_passes
    return trace


def reward(inner: int, calls: int, rate: float = 3e-4, eta: float = 2.0) -> list[dict[str, float]]:
    """Rewards on the way of one-step pictures, with calls, passes and seconds, the charge included."""
    folder = asset_path("emoji-scenes")
    student = SD3Transformer2DModel.from_pretrained(folder, subfolder=FEW_STEPS, dtype=torch.float32)
    pipe = StableDiffusion3Pipeline.from_pretrained(folder, transformer=student, dtype=torch.float32)
    features, pooled, _, _ = texts(pipe)
    trained = with_lora(student)
    pipe.vae.requires_grad_(False)
    judge = load_reward("bundled")
    noise = torch.randn(4, 8, 16, 16, generator=torch.Generator().manual_seed(0))
    config = pipe.vae.config

    def picture() -> Tensor:
        return noise - velocity_of(student, noise, torch.ones(4), features, pooled)

    def loss(latents: Tensor) -> Tensor:
        images = pipe.vae.decode(latents / config.scaling_factor + config.shift_factor).sample
        return -judge((images / 2 + 0.5).clamp(0, 1), list(CAPTIONS)).sum()

    fit = TargetSurrogate(torch.optim.Adam(trained, rate), eta=eta, inner_steps=inner)
    trace, passes, started = [], 0, time.process_time()
    for call in range(calls):
        with sdpa_kernel(SDPBackend.MATH):
            step = fit.step(picture, loss=loss)
        seconds = time.process_time() - started + CHARGE * (call + 1)
        passes += step.model_passes
        trace.append({"calls": call + 1, "passes": passes, "seconds": seconds, "loss": step.loss})
        print(inner, trace[-1], flush=True)
    return trace


def reached(trace: list[dict[str, float]], loss: float) -> dict[str, float]:
    """The first point that is as low; infinite figures where none is."""
    found = [point for point in trace if point["loss"] <= loss]
    return found[0] if found else {"calls": math.inf, "passes": math.inf, "seconds": math.inf}


def compared(name: str, plain: list[dict[str, float]], ours: list[dict[str, float]]) -> list[Row]:
    """Rows on the way to the lowest loss that both reach."""
    goal = max(min(point["loss"] for point in trace) for trace in (plain, ours))
    a, b = reached(plain, goal), reached(ours, goal)
    return [
        Row(f"{name}, {what} to a loss of {goal:.3f}", b[what], a[what], "no bar", True) for what in a if what != "loss"
    ]


def main() -> None:
    """Measures and writes; ``--only`` keeps the other parts' rows of the last run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=("regression", "imitation", "reward"))
    args = parser.parse_args()
    path = RESULTS / "target_surrogate.json"
    parts = json.loads(path.read_text())["settings"] if path.exists() else {}
    wanted = [args.only] if args.only else ["regression", "imitation", "reward"]
    if "regression" in wanted:
        rows, details = regression()
        parts["regression"] = {"rows": [vars(row) for row in rows], **details}
    for name, run, lengths in (("imitation", imitation, (40, 16)), ("reward", reward, (40, 12))):
        if name in wanted:
            plain, ours = run(1, lengths[0]), run(5, lengths[1])
            rows = compared(f"{name}, m = 5 against m = 1", plain, ours)
            parts[name] = {"rows": [vars(row) for row in rows], "plain": plain, "ours": ours}
    rows = [Row(**row) for part in parts.values() for row in part["rows"]]
    write_report("target_surrogate", rows, parts)


if __name__ == "__main__":
    main()
