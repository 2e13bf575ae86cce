"""What a compiled objective costs beside one written by hand, and enumeration beside the score function for a count.

    python -m trimtab.benchmarks.optim.programmable_inference [--repeats 60] [--steps 1000] [--seeds 2]

A variational autoencoder 784-400-20 with Bernoulli pixels: the same step of Adam from the program `elbo` compiled by
`estimate` and from lines written by hand with the same noise, in turns, by the median of its CPU seconds. Both find the
same value. Counting is kept where it was run before with the same settings.

Attend-infer-repeat (Eslami et al., arXiv 1603.08575) in small: scenes of one line of 32 pixels with 0 to 3 blobs; the
count is a categorical choice, places are reparametrized. The count is enumerated, or has the score function with the
batch's mean as baseline, from the same weights and scenes; the score function also at as many runs of the program as
enumeration made, four for one. How often the count of held-out scenes is right, and the bound.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli, Categorical, Independent, Normal
from torch.nn.functional import binary_cross_entropy_with_logits, softplus

from trimtab.benchmarks.optim.report import RESULTS, Row, write_report
from trimtab.optim import elbo, estimate, sample

PIXELS, HIDDEN, CODE = 784, 400, 20
SIDE, MOST, WIDTH, LEVEL = 32, 3, 2.0, 0.4


class Autoencoder(nn.Module):
    """Encoder and decoder of one hidden layer each."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(PIXELS, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, 2 * CODE))
        self.decoder = nn.Sequential(nn.Linear(CODE, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, PIXELS))

    def code(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mean, raw = self.encoder(x).chunk(2, 1)
        return mean, softplus(raw) + 1e-4


def compiled_bound(model: Autoencoder, x: Tensor, generator: torch.Generator) -> Tensor:
    """The surrogate of E_q[log p(x, z) - log q(z)] by a program; a row a picture."""

    def guide() -> None:
        mean, scale = model.code(x)
        sample(Independent(Normal(mean, scale, validate_args=False), 1, validate_args=False), name="z")

    def log_target(choices: Any) -> Tensor:
        z = choices["z"]
        prior = Normal(0.0, 1.0, validate_args=False).log_prob(z).sum(1)
        return prior + Bernoulli(logits=model.decoder(z), validate_args=False).log_prob(x).sum(1)

    return estimate(elbo(log_target, guide), num_samples=len(x), generator=generator, vectorized=True).surrogate


def written_bound(model: Autoencoder, x: Tensor, generator: torch.Generator) -> Tensor:
    """The same by hand."""
    mean, scale = model.code(x)
    noise = torch.randn(mean.shape, generator=generator)
    z = mean + scale * noise
    prior = -0.5 * z.square().sum(1)
    density = (-0.5 * noise.square() - scale.log()).sum(1)  # the halves of log 2 pi cancel
    pixels = binary_cross_entropy_with_logits(model.decoder(z), x, reduction="none").sum(1)
    return (prior - pixels - density).mean()


def overhead(batch: int, repeats: int) -> tuple[float, float]:
    """CPU seconds of a step, compiled and by hand."""
    x = (torch.rand(batch, PIXELS, generator=torch.Generator().manual_seed(0)) < 0.3).float()
    sides = []
    for bound in (compiled_bound, written_bound):
        torch.manual_seed(0)
        model = Autoencoder()
        optimizer = torch.optim.Adam(model.parameters(), 1e-3)
        sides.append((bound, model, optimizer, torch.Generator().manual_seed(1), []))
    for turn in range(repeats):
        for bound, model, optimizer, generator, seconds in sides[:: 1 if turn % 2 else -1]:
            began = time.process_time()
            optimizer.zero_grad()
            (-bound(model, x, generator)).backward()
            optimizer.step()
            seconds.append(time.process_time() - began)
    compiled, written = (statistics.median(side[-1][repeats // 10 :]) for side in sides)
    return compiled, written


def same_value() -> float:
    """The relative difference of the two bounds under the same noise."""
    torch.manual_seed(0)
    model, x = Autoencoder(), torch.rand(32, PIXELS).round()
    found = float(compiled_bound(model, x, torch.Generator().manual_seed(3)).detach())
    # `estimate` draws a seed for the samples' own stream.
    seed = int(torch.randint(2**62, (), generator=torch.Generator().manual_seed(3)))
    wanted = float(written_bound(model, x, torch.Generator().manual_seed(seed)).detach())
    return abs(found - wanted) / abs(wanted)


def rendered(where: Tensor, count: Tensor) -> Tensor:
    """Blobs at where (N, 3), the first `count` (N,) of them: (N, 32)."""
    line = torch.arange(SIDE, dtype=torch.float32)
    centre = (SIDE - 1) / 2 + 6 * where
    blobs = (-0.5 * ((line - centre[..., None]) / WIDTH) ** 2).exp()
    return (blobs * (torch.arange(MOST) < count[:, None])[..., None]).sum(1)


def scenes(number: int, seed: int) -> tuple[Tensor, Tensor]:
    """Pictures (N, 32) and counts (N,)."""
    generator = torch.Generator().manual_seed(seed)
    count = torch.randint(MOST + 1, (number,), generator=generator)
    where = torch.randn(number, MOST, generator=generator)
    noise = LEVEL * torch.randn(number, SIDE, generator=generator)
    return rendered(where, count) + noise, count


class Counter(nn.Module):
    """A picture to the count's logits and each place's mean and deviation."""

    def __init__(self) -> None:
        super().__init__()
        sizes = SIDE, 128, 128, MOST + 1 + MOST * 2
        layers = [nn.Linear(a, b) for a, b in zip(sizes[:-1], sizes[1:], strict=True)]
        self.net = nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        out = self.net(x)
        logits, rest = out[:, : MOST + 1], out[:, MOST + 1 :].chunk(2, 1)
        return logits, rest[0], softplus(rest[1]) + 1e-2


def count_bound(model: Counter, x: Tensor, strategy: str) -> Tensor:
    """E_q[log p - log q] of each scene: (N,); a program. Places beyond the count are in neither density."""
    logits, mean, scale = model(x)
    count = sample(Categorical(logits=logits, validate_args=False), strategy=strategy)
    place = Normal(mean, scale, validate_args=False)
    where = sample(Independent(place, 1, validate_args=False), strategy="reparam")
    there = (torch.arange(MOST) < count[:, None]).float()
    each = Normal(0.0, 1.0, validate_args=False).log_prob(where) - place.log_prob(where)
    pixels = Normal(rendered(where, count), LEVEL, validate_args=False).log_prob(x).sum(1)
    log_q = logits.log_softmax(1).gather(1, count[:, None])[:, 0]
    return pixels + (each * there).sum(1) - math.log(MOST + 1) - log_q


def counting(strategy: str, steps: int, seed: int, batch: int = 64) -> dict[str, float]:
    """Trains, and gives how often the likeliest count is right, the bound and the CPU seconds."""
    torch.manual_seed(seed)
    model = Counter()
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    generator = torch.Generator().manual_seed(seed)
    began = time.process_time()
    for step in range(steps):
        x, _ = scenes(batch, 10_000 * (seed + 1) + step)
        optimizer.zero_grad()
        found = estimate(count_bound, model, x, strategy, num_samples=batch, generator=generator, vectorized=True)
        (-found.surrogate).backward()
        optimizer.step()
    seconds = time.process_time() - began
    x, count = scenes(1000, 7)
    with torch.no_grad():
        right = float((model(x)[0].argmax(1) == count).float().mean())
        bound = float(estimate(count_bound, model, x, "enum", num_samples=len(x), vectorized=True).value)
    return {"right": right, "bound": bound, "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=60)
    parser.add_argument("--steps", type=int, default=1000, help="of enumeration")
    parser.add_argument("--seeds", type=int, default=2)
    options = parser.parse_args()
    difference = same_value()
    rows = [Row("VAE: relative difference of the bounds", difference, 1e-5, "less", difference < 1e-5)]
    settings: dict[str, Any] = {"steps": options.steps, "seeds": options.seeds, "batch": 64}
    path = RESULTS / "programmable_inference.json"
    before = json.loads(path.read_text())["settings"] if path.is_file() else {}
    known = before.get("counting", {}) if {k: before.get(k) for k in settings} == settings else {}
    settings["counting"] = known
    for batch in (64, 256, 1024):
        ours, hand = overhead(batch, options.repeats)
        rows.append(Row(f"VAE, batch {batch}: ms a step beside by hand", 1e3 * ours, 1e3 * hand, "<= 1.1x",
                        ours <= 1.1 * hand))  # fmt: skip
    plan = {
        "enumerated": ("enum", options.steps),
        "score function": ("reinforce", options.steps),
        "score function, four times the steps": ("reinforce", (MOST + 1) * options.steps),
    }
    mean: dict[str, dict[str, float]] = {}
    for name, (strategy, steps) in plan.items():
        runs = known[name] = known.get(name) or [counting(strategy, steps, seed) for seed in range(options.seeds)]
        mean[name] = {key: statistics.mean(run[key] for run in runs) for key in runs[0]}
    enumerated = mean.pop("enumerated")
    for name, found in mean.items():
        for key in ("right", "bound"):
            better = enumerated[key] > found[key]
            rows.append(Row(f"count: {key}, enumerated beside {name}", enumerated[key], found[key], "more", better))
    last = mean["score function, four times the steps"]
    rows.append(Row("count: CPU seconds, enumerated beside four times the steps", enumerated["seconds"],
                    last["seconds"], "less", enumerated["seconds"] < last["seconds"]))  # fmt: skip
    write_report("programmable_inference", rows, settings)


if __name__ == "__main__":
    main()
