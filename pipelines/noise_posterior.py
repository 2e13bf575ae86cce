"""A posterior over the noise of a frozen generator: many good pictures, each further one for one sampling."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from trimtab.optim.checks import checked_choice, checked_number
from trimtab.optim.inference import MixtureFit, MixtureGuide, fit_mixture, spread_starts
from trimtab.rewards import CallableReward
from trimtab.rewards.state_dict import write_weights

from .arguments import checked_count
from .noise_objective import NoiseObjective
from .noise_optimization import as_reward
from .noise_output import Recorder
from .noise_task import prepare_noise_task

__all__ = ["NoisePosterior"]

FORMAT = "trimtab.noise_posterior"
_OUTPUT_TYPES = ("pil", "np", "pt", "latent")
_THUMBNAIL = 16
"""Pixels a side of what starts are compared by."""


class NoisePosterior:
    """Noise whose pictures a reward likes, or that agree with a measurement, as a distribution to draw from.

    With f the frozen sampler and r the reward of a prompt's pictures, a mixture of Gaussians q is fitted to

        p(z) proportional to N(z; 0, I) exp(r(f(z)) / temperature)

    by E_q[log N(z; 0, I) + r(f(z)) / temperature - log q(z)], a lower bound of log p's constant, through gradients of
    the picture; from then on a picture costs one sampling. Optimization (`NoiseOptimizationPipeline`) finds one best
    noise for as much work as `fit` takes for all. The objective is a program of `trimtab.optim.inference`: D. Becker et
    al., "Probabilistic Programming with Programmable Variational Inference" (arXiv 2406.15742). Bound and effective
    sample size say how near q is to p; in the thousands of dimensions of noise, hundreds of evaluations make good and
    different pictures long before they make it near.

    Args:
        pipe: a pipeline of a family in the table, or one for noise optimization, whose reward then is the default.
        prompt: one prompt.
        reward: a `RewardModel` with a gradient, a name or path for `load_reward`, or weights by name.
        temperature: > 0, what of the reward is worth one nat: small asks for more reward and less variety. The default
            is for emoji-clip, whose rewards of a prompt's pictures differ by about 1.
        num_components: of the mixture, >= 1.
        family: "diagonal", or "lowrank" for covariances of `rank` directions besides.
        rank: >= 1.
        strategy: of the choice of a component: "enum" makes pictures of all in each step, "reinforce" of one a sample.
        reward_prompt: what the reward is told, if not `prompt`.
        batch_size: pictures at once; None is all of a component's.
        generator: as for `NoiseOptimizationPipeline`, of noise that a stochastic sampler adds; None is seed 0.
        gradient_checkpointing: compute activations twice rather than keep them.
        pipeline_kwargs: arguments of the stock call, such as `num_inference_steps`.

    Attributes:
        guide: the `MixtureGuide`: `log_prob`, `weights`, `modes`; None before `fit`.
        latent_shape: of one noise.

    Raises:
        ValueError: a value out of range, several prompts, or a reward without a gradient.
        TypeError: an argument that the stock call doesn't have.

    Example:
        >>> posterior = NoisePosterior(pipe, "three owls on a pink background", reward="bundled")  # doctest: +SKIP
        >>> posterior.fit()                                                                         # doctest: +SKIP
        >>> images = posterior.sample(10, torch.Generator().manual_seed(0))                         # doctest: +SKIP
    """

    def __init__(
        self,
        pipe: Any,
        prompt: str,
        *,
        reward: Any = None,
        temperature: float = 0.001,
        num_components: int = 4,
        family: Literal["diagonal", "lowrank"] = "diagonal",
        rank: int = 8,
        strategy: Literal["enum", "reinforce"] = "enum",
        reward_prompt: str | None = None,
        batch_size: int | None = None,
        generator: torch.Generator | None = None,
        gradient_checkpointing: bool = True,
        **pipeline_kwargs: Any,
    ) -> None:
        if not isinstance(prompt, str):
            raise TypeError(f"`prompt` is a {type(prompt).__name__}; takes one string: each prompt has its posterior")
        self.temperature = checked_number("temperature", temperature, above=0)
        self.prompt, self.arguments = prompt, dict(pipeline_kwargs)
        self._mixture = {"num_components": num_components, "family": family, "rank": rank, "strategy": strategy}
        MixtureGuide((1,), **self._mixture)  # raises what is out of range before a model runs
        model = getattr(pipe, "reward", None) if reward is None else as_reward(reward)
        if model is None or not model.differentiable:
            raise ValueError(f"`reward` is {getattr(model, 'name', None)!r}; takes one that has a gradient")
        if batch_size is not None:
            checked_count("batch_size", batch_size)
        self._task = prepare_noise_task(
            pipe,
            prompt,
            reward_prompt=reward_prompt,
            num_images_per_prompt=1,
            latents=None,
            generator=torch.Generator().manual_seed(0) if generator is None else generator,
            num_optimization_steps=1,
            gradient_checkpointing=gradient_checkpointing,
            **pipeline_kwargs,
        )
        self.pipe, self.latent_shape, self.batch_size = pipe, self._task.sampler.latent_shape, batch_size
        self._objective = NoiseObjective(self._task.sampler, model, self._task.prompts, batch_size=batch_size)
        self.guide: MixtureGuide | None = None

    @classmethod
    def from_measurement(
        cls,
        pipe: Any,
        prompt: str,
        measurement: Tensor,
        operator: Callable[[Tensor], Tensor],
        noise_level: float,
        **options: Any,
    ) -> NoisePosterior:
        """The posterior given y = A(picture) + noise: its log-likelihood is -||A(f(z)) - y||^2 / (2 noise_level^2).

        Args:
            pipe: as for the class.
            prompt: what is known of the picture besides.
            measurement: y, of any shape.
            operator: A, pictures (B, 3, H, W) in [0, 1] to (B, *y's shape), differentiable.
            noise_level: > 0, standard deviation of the measurement's noise.
            options: of the class, but `reward` and `temperature`.

        Raises:
            ValueError: a value out of range; in `fit`, an operator that gives another shape.
            TypeError: for `reward` or `temperature`.
        """
        level = checked_number("noise_level", noise_level, above=0)
        for name in ("reward", "temperature"):
            if name in options:
                raise TypeError(f"`{name}` is what the measurement stands for; takes none")
        y = measurement.detach()

        def log_likelihood(images: Tensor, prompts: list[str]) -> Tensor:
            seen = operator(images)
            if tuple(seen.shape[1:]) != tuple(y.shape):
                raise ValueError(f"`operator` gives {tuple(seen.shape[1:])} a picture; takes one of {tuple(y.shape)}")
            return -(seen - y.to(seen)).flatten(1).square().sum(1) / (2 * level**2)

        reward = CallableReward(log_likelihood, differentiable=True, name="measurement")
        return cls(pipe, prompt, reward=reward, temperature=1.0, **options)

    def fit(
        self,
        *,
        num_steps: int = 20,
        num_samples: int = 1,
        lr: float = 0.02,
        init: Literal["spread", "random"] = "spread",
        num_starts: int = 32,
        start_scale: float = 0.2,
        generator: torch.Generator | None = None,
        callback: Callable[[int, float], Any] | None = None,
    ) -> MixtureFit:
        """Fits the mixture; a second call begins again.

        It makes `num_starts` pictures, then `num_samples` a component in each step (in all under "reinforce").

        Args:
            num_steps: >= 1, of Adam.
            num_samples: >= 1.
            lr: > 0, falls linearly to 0.
            init: "spread" begins at the pictures that differ most among the best quarter of `num_starts` draws;
                "random" at draws as they come.
            num_starts: >= `num_components`; eight times as many for a choice.
            start_scale: in (0, 1), the components' standard deviation at first, small enough for their pictures to stay
                good. A draw z becomes the mean
                sqrt(1 - start_scale^2) z, so that noise is as long as usual.
            generator: of everything drawn; None is seed 0.
            callback: called as (step, bound) after each step; True ends the fit there.

        Returns:
            A `MixtureFit`; its `num_evaluations` has the starts' too. An interrupt from the keyboard ends the fit with
            what there is.

        Raises:
            ValueError: a value out of range.
            FloatingPointError: the first step's reward isn't finite.
        """
        checked_choice("init", init, ("spread", "random"))
        count = self._mixture["num_components"]
        checked_count("num_starts", num_starts, count)
        if not 0 < checked_number("start_scale", start_scale) < 1:
            raise ValueError(f"`start_scale` is {start_scale}; takes a number between 0 and 1")
        generator = torch.Generator().manual_seed(0) if generator is None else generator
        try:
            z = self._task.sampler.sample_latents(num_starts if init == "spread" else count, generator).float()
            if init == "spread":
                values, thumbnails = self._look(z)
                pool = max(count, num_starts // 4)
                z = z[spread_starts(thumbnails, values, count, pool)]
            means = (1 - start_scale**2) ** 0.5 * z
            guide = MixtureGuide(self.latent_shape, **self._mixture, means=means, scale=start_scale).to(z.device)
            with self.pipe.progress_bar(total=num_steps) as progress:

                def told(step: int, bound: float) -> Any:
                    progress.set_postfix_str(f"bound {bound:.4g}")
                    progress.update()
                    return callback is not None and callback(step, bound)

                options = {"num_steps": num_steps, "num_samples": num_samples, "lr": lr}
                found = fit_mixture(self._log_likelihood, guide, **options, generator=generator, callback=told)
        finally:
            self._task.release()
        self.guide = guide.requires_grad_(False)
        starts = num_starts if init == "spread" else 0
        return replace(found, num_evaluations=found.num_evaluations + starts)

    def sample_latents(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """Noise from the guide, its components in their shares.

        Args:
            count: >= 1.
            generator: None is seed 0.

        Returns:
            (count, *latent_shape) float32.

        Raises:
            RuntimeError: before `fit` or `load`.
        """
        if self.guide is None:
            raise RuntimeError("the posterior is not fitted yet; call `fit`, or make it by `load`")
        return self.guide.sample(count, generator)

    @torch.no_grad()
    def sample(
        self,
        count: int,
        generator: torch.Generator | None = None,
        *,
        output_type: Literal["pil", "np", "pt", "latent"] = "pil",
    ) -> Any:
        """Pictures, one sampling each.

        Args:
            count: >= 1.
            generator: of the noise; None is seed 0.
            output_type: "pil", "np", "pt", or "latent" for the noise alone.

        Returns:
            A list of `count` pictures, or an array or tensor of them.

        Raises:
            RuntimeError: before `fit` or `load`.
        """
        checked_choice("output_type", output_type, _OUTPUT_TYPES)
        z = self.sample_latents(count, generator)
        return z if output_type == "latent" else Recorder.pictures(self._pictures(z), output_type)

    def save(self, path: str | Path) -> Path:
        """Writes the mixture, the prompt and the call's arguments; the model stays where it is.

        Raises:
            ValueError: a name that doesn't end in .safetensors, or an argument of the call that no JSON has.
            RuntimeError: before `fit`.
        """
        path = Path(path).expanduser()
        if path.suffix != ".safetensors":
            raise ValueError(f"`path` is {str(path)!r}; takes a name that ends in .safetensors")
        if self.guide is None:
            raise RuntimeError("the posterior is not fitted yet; call `fit` first")
        about = {"prompt": self.prompt, "arguments": self.arguments, "mixture": self._mixture}
        about |= {"shape": self.latent_shape, "temperature": self.temperature}
        try:
            text = json.dumps(about)
        except TypeError as error:
            raise ValueError(f"`pipeline_kwargs` can't be saved: {error}") from None
        write_weights(self.guide.state_dict(), path, {"format": FORMAT, "about": text})
        return path

    @classmethod
    def load(cls, path: str | Path, pipe: Any, *, reward: Any = None, **options: Any) -> NoisePosterior:
        """A posterior that `save` wrote, for the same model.

        Args:
            path: the file.
            pipe: as for the class.
            reward: for a further `fit`; sampling needs none, and None then takes the pipeline's or one that is 0.
            options: of the class, such as `batch_size`.

        Raises:
            ValueError: a file of something else or a damaged one, or a model with other noise.
        """
        about, state = _read(Path(path).expanduser())
        if reward is None and getattr(pipe, "reward", None) is None:
            reward = CallableReward(lambda images, prompts: 0 * images.mean((1, 2, 3)), differentiable=True)
        settings = {**about["arguments"], **about["mixture"], "temperature": about["temperature"]}
        made = cls(pipe, about["prompt"], reward=reward, **{**settings, **options})
        if list(made.latent_shape) != list(about["shape"]):
            raise ValueError(f"`pipe` takes noise {made.latent_shape}; the posterior is of {tuple(about['shape'])}")
        guide = MixtureGuide(made.latent_shape, **about["mixture"])
        try:
            guide.load_state_dict(state)
        except RuntimeError as error:
            raise ValueError(f"`path` is {str(path)!r}, whose tensors don't fit: {error}") from None
        made.guide = guide.to(pipe._execution_device).requires_grad_(False)
        return made

    @torch.no_grad()
    def _pictures(self, z: Tensor) -> Tensor:
        sampler, found = self._task.sampler, []
        try:
            for part in z.split(self.batch_size or len(z)):
                found.append(sampler.decode(sampler(part, prompt_index=[0] * len(part))))
        finally:
            self._task.release()
        return torch.cat(found)

    def _look(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Rewards of noise, and its pictures made small."""
        with self._task.evaluating(False):
            seen = self._objective(z, [0] * len(z), with_gradient=False)
        return seen.rewards, adaptive_avg_pool2d(seen.images.float(), _THUMBNAIL)

    def _log_likelihood(self, z: Tensor) -> Tensor:
        def evaluate(rows: Tensor) -> tuple[Tensor, Tensor]:
            with self._task.evaluating(True):
                shaped = rows.reshape(len(rows), *self.latent_shape)
                seen = self._objective(shaped, [0] * len(rows), with_gradient=True)
            return seen.rewards.to(rows), seen.gradients.flatten(1).to(rows)

        return _Evaluated.apply(z, evaluate) / self.temperature


class _Evaluated(torch.autograd.Function):
    """Values and gradients that are computed together, in batches, as one node of the graph."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, evaluate: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Tensor:
        values, gradients = evaluate(z.detach())
        ctx.save_for_backward(gradients)
        return values

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        (gradients,) = ctx.saved_tensors
        return upstream[:, None] * gradients, None


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
        if metadata.get("format") != FORMAT:
            raise ValueError(f"`path` is {str(path)!r}, of format {metadata.get('format')!r}; takes {FORMAT!r}")
        return json.loads(metadata["about"]), state
    except (SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(f"`path` is {str(path)!r}, no whole file of a posterior: {error}") from None
