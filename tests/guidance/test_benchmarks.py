"""The benchmarks' claims on small settings, and that their scripts run."""

import sys
import time

import pytest
import torch

from trimtab.benchmarks import guidance_cost, guidance_mixture


def test_mixture_claim():
    """APG at w = 10: at most 0.65 of plain guidance's Fréchet distance, and a norm below the data's."""
    rows = {(row["rule"], row["w"]): row for row in guidance_mixture.measure([10.0], seeds=1)}
    plain, apg = rows["CFG", 10.0], rows["APG", 10.0]
    assert apg["frechet"] <= 0.65 * plain["frechet"]
    assert apg["norm"] < 1 < plain["norm"]
    assert rows["projection alone", 10.0]["norm"] < 1 < rows["projection alone, raw space", 10.0]["norm"]
    assert rows["unguided", 1.0]["frechet"] < apg["frechet"]


def test_mixture_denoiser_is_a_posterior_mean():
    """Against an average of many draws, weighted by their likelihood."""
    mixture = guidance_mixture.Mixture.make(2, 0)
    generator = torch.Generator().manual_seed(1)
    data = mixture.samples(0, 200_000, generator)
    for sigma in (0.5, 2.0):
        x = data[:5] + sigma * torch.randn(5, 2, generator=generator, dtype=torch.float64)
        weights = torch.softmax(-0.5 * torch.cdist(x, data) ** 2 / sigma**2, dim=1)
        assert torch.allclose(mixture.denoise(x, sigma, 0), weights @ data, atol=0.02)


def test_scripts_write_their_reports(tmp_path, monkeypatch, capsys):
    for script, arguments, name in (
        (guidance_mixture, ["--samples", "32", "--seeds", "1", "--scales", "4"], "guidance_mixture.json"),
        (guidance_cost, ["--pairs", "1", "--steps", "1"], "guidance_cost_small.json"),
    ):
        monkeypatch.setattr(sys, "argv", ["script", *arguments, "--out", str(tmp_path)])
        script.main()
        assert (tmp_path / name).is_file()
    assert "APG / CFG" in capsys.readouterr().out


@pytest.mark.slow
def test_the_rule_is_faster_than_diffusers_one():
    """In CPU time of one thread, for a machine with other work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert max(guidance_cost.rule_cost("cpu", 15, time.process_time)["speedup"] for _ in range(3)) >= 1.8
    finally:
        torch.set_num_threads(threads)
