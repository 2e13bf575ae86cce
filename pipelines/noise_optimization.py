"""Noise optimization: the initial noise of a frozen model is moved until rewards like the picture."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from trimtab.optim.checks import checked_number
from trimtab.rewards import RewardModel, WeightedReward, load_reward

from .arguments import checked_count
from .families import stock_class
from .generation_map import GenerationMap
from .noise_equality import EqualityAscent
from .noise_objective import NoiseObjective
from .noise_optimizers import NoiseOptimizer, make_noise_optimizer, noise_optimizer_class
from .noise_output import NoiseOptimizationPipelineOutput, Recorder
from .noise_presets import noise_preset
from .noise_run import NoiseOptimizationState, NoiseRun
from .noise_task import NoiseTask, prepare_noise_task
from .sharing import SharedComponentsMixin

__all__ = ["NoiseOptimizationPipeline", "NoiseOptimizationPipelineMixin"]

Reward = RewardModel | str | Mapping[str, float]
Callback = Callable[[Any, int, NoiseOptimizationState], bool | None]
_OUTPUT_TYPES = ("pil", "np", "pt", "latent")
_OF_THE_CALL = ("multi_step_pipe", "multi_step_kwargs", "callback_on_iteration_end", "output_type", "return_dict")


class NoiseOptimizationPipelineMixin(SharedComponentsMixin):
    """Makes a stock pipeline one that looks for noise whose picture rewards like.

    A class of pipelines is made by naming the mixin and the stock class, in this order:

        class NoiseOptimizationFluxPipeline(NoiseOptimizationPipelineMixin, FluxPipeline): ...

    With f the sampler, p the prompt and K the log-likelihood of the noise's norm, each sample's noise z climbs

        sum_i w_i r_i(f(z), p) + lambda K(z),        K(z) = (d - 1) log ||z|| - ||z||^2 / 2

    and the picture with the highest reward is the result: L. Eyring, S. Karthik, K. Roth, A. Dosovitskiy, Z. Akata,
    "ReNO: Enhancing One-step Text-to-Image Models through Reward-based Noise Optimization" (arXiv 2406.04312).
    The default is their loop: SGD with Nesterov's momentum on the clipped gradient. Beyond it: samples of a batch are
    independent, `preset="sphere"` moves by steps of one length on the sphere that noise lies on (`SphereMomentum`),
    many-step models are optimized at inference memory with `gradient="jacobian-free"`, and a held-out reward can end
    a run. Nothing of the pipeline changes; its text-to-image call is `pipe.generate`.
    """

    reward: RewardModel | None = None

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, *, reward: Reward | None = None, **kwargs: Any) -> Any:
        """A pipeline of the components of a pipeline in memory: shared, neither copied nor converted.

        Args:
            pipeline: of the same family.
            reward: what calls without one climb.
            kwargs: as in Diffusers.

        Raises:
            ValueError: if the pipeline lacks a component.
            TypeError: if `reward` is none.
        """
        pipe = super().from_pipe(pipeline, **kwargs)
        pipe.reward = getattr(pipeline, "reward", None) if reward is None else as_reward(reward)
        return pipe

    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        reward: Reward | None = None,
        num_optimization_steps: int = 50,
        optimizer: str | type[NoiseOptimizer] | Callable[..., torch.optim.Optimizer] = "gradient",
        optimizer_kwargs: dict[str, Any] | None = None,
        gradient: Literal["full", "jacobian-free"] = "full",
        preset: str | None = None,
        constraints: Callable[[Tensor, Tensor], Tensor] | None = None,
        equality_constraints: Callable[[Tensor, Tensor], Tensor] | None = None,
        equality_tolerance: float = 1e-3,
        monitor: Reward | None = None,
        monitor_patience: int | None = None,
        reward_prompt: str | Sequence[str] | None = None,
        num_images_per_prompt: int = 1,
        batch_size: int | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        latents: Tensor | None = None,
        gradient_checkpointing: bool = True,
        multi_step_pipe: DiffusionPipeline | None = None,
        multi_step_kwargs: dict[str, Any] | None = None,
        callback_on_iteration_end: Callback | None = None,
        output_type: Literal["pil", "np", "pt", "latent"] = "pil",
        return_dict: bool = True,
        **pipeline_kwargs: Any,
    ) -> NoiseOptimizationPipelineOutput | tuple[Any, ...]:
        """Makes pictures of prompts, each from the best noise found.

        Args:
            prompt: one or several.
            reward: a `RewardModel`, a name or path for `load_reward`, or weights by name; None is the pipeline's own.
            num_optimization_steps: pictures made on the way, >= 1.
            optimizer: "gradient"; "best-of-n", fresh noise each time; for rewards without a gradient "consensus",
                "directional" and "cma", which make `num_particles` pictures an iteration (but "directional", one;
                `trimtab.pipelines.noise_searches`); a factory of `torch.optim` optimizers, such as
                `torch.optim.Adam`; or a class of `trimtab.pipelines.noise_optimizers.NoiseOptimizer`.
            optimizer_kwargs: its settings. Of gradient ascent: `regularization_weight`, `max_grad_norm`, and those of
                the torch optimizer, such as `lr`.
            gradient: "full" goes back through the sampler. "jacobian-free" takes the sampler's Jacobian for the
                identity: no activations of the denoiser, at the memory of inference and a backward pass through the
                decoder.
            preset: a name in `NOISE_PRESETS`, such as "paper", or a .json file of `trimtab tune`; arguments given here
                hold against it.
            constraints: pictures (R, 3, H, W) and their noise to (R,) or (R, p), feasible where all are <= 0; with an
                optimizer that needs no gradient. A feasible picture is better than any other, of the others one
                with less violation. The result says for each sample whether it became feasible.
            equality_constraints: pictures and their noise to (R,) or (R, m), with gradients, that are to be 0, such as
                the noise's norm less its length and the pictures' mean colour less a given one. The optimizer
                "gradient" then is `trimtab.pipelines.noise_equality.EqualityAscent`, whose settings
                `optimizer_kwargs` takes; the result has the KKT residuals.
            equality_tolerance: what an equality constraint may be off in a feasible picture.
            monitor: a held-out reward, reported at each iteration.
            monitor_patience: end a sample once the held-out reward has not risen for so many iterations, with the
                best picture up to there.
            reward_prompt: what rewards are told, if not `prompt`.
            num_images_per_prompt: samples of each prompt, each with noise of its own.
            batch_size: samples at once; None is all of them.
            generator: of all noise: one for all samples or one for each. A sampler that adds noise adds the same at
                every iteration. None is a new seed each time.
            latents: (B, *latent_shape), the noise to begin with; None draws it, as the stock call would.
            gradient_checkpointing: compute activations twice rather than keep them.
            multi_step_pipe: a model with latents of the same shape that makes its own pictures of the found noise.
            multi_step_kwargs: arguments of its stock call.
            callback_on_iteration_end: called as (pipeline, iteration, state) after each; True ends the run there.
            output_type: "pil", "np", "pt", or "latent" for the noise in place of pictures.
            return_dict: whether to return a `NoiseOptimizationPipelineOutput`; a tuple otherwise.
            pipeline_kwargs: arguments of the stock call, such as `num_inference_steps` and `guidance_scale`.

        Returns:
            A `NoiseOptimizationPipelineOutput`. An interrupt from the keyboard ends the run with the best so far.

        Raises:
            ValueError: a value out of range, a reward without a gradient where one is needed, noise of another shape,
                or a sampler that adds noise where `generator` is None.
            TypeError: an argument of the wrong type, or one that the stock call doesn't have.
            FloatingPointError: if no first picture or its reward is finite.
        """
        if output_type not in _OUTPUT_TYPES:
            raise ValueError(f"`output_type` is {output_type!r}; takes one of {', '.join(_OUTPUT_TYPES)}")
        task, run = self._begin(
            prompt,
            reward=reward,
            num_optimization_steps=num_optimization_steps,
            optimizer=optimizer,
            optimizer_kwargs=optimizer_kwargs,
            gradient=gradient,
            preset=preset,
            constraints=constraints,
            equality_constraints=equality_constraints,
            equality_tolerance=equality_tolerance,
            monitor=monitor,
            monitor_patience=monitor_patience,
            reward_prompt=reward_prompt,
            num_images_per_prompt=num_images_per_prompt,
            batch_size=batch_size,
            generator=generator,
            latents=latents,
            gradient_checkpointing=gradient_checkpointing,
            **pipeline_kwargs,
        )
        many_steps = None
        if multi_step_pipe is not None:
            many_steps = _many_steps(multi_step_pipe, task, multi_step_kwargs or {})
        recorder = Recorder()
        try:
            with self.progress_bar(total=num_optimization_steps) as progress:
                for state in run:
                    recorder.take(state)
                    progress.set_postfix_str(f"reward {state.best_rewards.mean():.4g}")
                    progress.update()
                    if callback_on_iteration_end is not None and callback_on_iteration_end(self, state.step, state):
                        break
        except KeyboardInterrupt:
            if recorder.last is None:
                raise
            recorder.interrupted = True
        finally:
            task.release()
        for message in recorder.troubles():
            warnings.warn(message, RuntimeWarning, stacklevel=2)
        output = recorder.output(output_type)
        if many_steps is not None:
            with torch.no_grad():
                output.multi_step_images = recorder.pictures(many_steps(output.latents), output_type)
        return output if return_dict else output.to_tuple()

    def stream(self, prompt: str | Sequence[str] | None = None, **options: Any) -> Iterator[NoiseOptimizationState]:
        """Gives each iteration's state as soon as it is there: stop whenever you like the picture.

        Args:
            prompt: as for the call.
            options: keyword arguments of the call but `multi_step_pipe`, `multi_step_kwargs`,
                `callback_on_iteration_end`, `output_type` and `return_dict`. They are checked, and the prompts
                encoded, before this returns.

        Raises:
            ValueError: as for the call.
            TypeError: as for the call.
        """
        for name in _OF_THE_CALL:
            if name in options:
                raise TypeError(f"`{name}` is an argument of the call, not of `stream`")
        task, run = self._begin(prompt, **{**_defaults(), **options})
        return _released(task, run)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The stock pipeline's own text-to-image call."""
        return stock_class(self).__call__(self, *args, **kwargs)

    def _begin(
        self,
        prompt: Any,
        *,
        reward: Any,
        num_optimization_steps: int,
        optimizer: Any,
        optimizer_kwargs: dict[str, Any] | None,
        gradient: str,
        preset: str | None,
        constraints: Any,
        equality_constraints: Any,
        equality_tolerance: float,
        monitor: Any,
        monitor_patience: int | None,
        batch_size: int | None,
        **options: Any,
    ) -> tuple[NoiseTask, NoiseRun]:
        """Checks everything and makes the run; no denoiser has run afterwards."""
        if gradient not in ("full", "jacobian-free"):
            raise ValueError(f"`gradient` is {gradient!r}; takes 'full' or 'jacobian-free'")
        chosen = noise_preset(preset)
        model = self.reward if reward is None else as_reward(reward)
        if model is None:
            raise ValueError(
                "`reward` is None and the pipeline has none; takes a reward or its name, such as 'bundled'"
            )
        if equality_constraints is not None:
            _check_equalities(equality_constraints, equality_tolerance, optimizer, constraints, gradient)
            optimizer = EqualityAscent
        cls = noise_optimizer_class(optimizer)
        if cls.needs_gradient and not model.differentiable:
            raise ValueError(
                f"`reward` {model.name!r} isn't differentiable and `optimizer` needs a gradient; takes a "
                'differentiable reward, or an optimizer that needs none, such as "best-of-n"'
            )
        if constraints is not None and (cls.needs_gradient or not callable(constraints)):
            takes = 'a function, with an optimizer that needs no gradient, such as "consensus" or "directional"'
            raise ValueError(
                f"`constraints` is a {type(constraints).__name__} and `optimizer` {optimizer!r}; takes {takes}"
            )
        if monitor_patience is not None:
            checked_count("monitor_patience", monitor_patience)
            if monitor is None:
                raise ValueError("`monitor_patience` is given without a `monitor`; takes both")
        if batch_size is not None:
            checked_count("batch_size", batch_size)
        given = optimizer_kwargs or {}
        settings = {**chosen.optimizer, **given} if optimizer == "gradient" else given
        task = prepare_noise_task(
            self, prompt, num_optimization_steps=num_optimization_steps, **{**chosen.call, **options}
        )
        objective = NoiseObjective(
            task.sampler,
            model,
            task.prompts,
            gradient=gradient,
            batch_size=batch_size,
            monitor=None if monitor is None else as_reward(monitor),
            constraints=constraints,
            equality_constraints=equality_constraints,
            equality_tolerance=equality_tolerance,
        )
        made = make_noise_optimizer(optimizer, task.problem, settings)
        run = NoiseRun(
            objective,
            made,
            num_optimization_steps,
            monitor_patience=monitor_patience,
            evaluating=task.evaluating,
        )
        return task, run


def as_reward(reward: Any) -> RewardModel:
    """A reward, given as one, by a name or path, or by weights of names.

    Raises:
        TypeError: for anything else.
    """
    if isinstance(reward, RewardModel):
        return reward
    if isinstance(reward, str):
        return load_reward(reward)
    if isinstance(reward, Mapping):
        return WeightedReward(reward)
    hint = "; wrap a function in trimtab.rewards.CallableReward" if callable(reward) else ""
    raise TypeError(f"`reward` is a {type(reward).__name__}; takes a RewardModel, a name or weights by name{hint}")


def _check_equalities(function: Any, tolerance: float, optimizer: Any, constraints: Any, gradient: str) -> None:
    if not callable(function):
        raise TypeError(f"`equality_constraints` is a {type(function).__name__}; takes a function")
    checked_number("equality_tolerance", tolerance, above=0)
    if optimizer not in ("gradient", EqualityAscent) or constraints is not None or gradient != "full":
        given = f"`optimizer` {optimizer!r}, `gradient` {gradient!r}, `constraints` {constraints!r}"
        raise ValueError(f"`equality_constraints` goes with {given}; takes 'gradient', 'full' and None")


def _released(task: NoiseTask, run: NoiseRun) -> Iterator[NoiseOptimizationState]:
    try:
        yield from run
    finally:
        task.release()


def _defaults() -> dict[str, Any]:
    """The call's keyword arguments that say what is done, with their defaults."""
    parameters = inspect.signature(NoiseOptimizationPipelineMixin.__call__).parameters.values()
    return {
        parameter.name: parameter.default
        for parameter in parameters
        if parameter.default is not parameter.empty and parameter.name not in ("prompt", *_OF_THE_CALL)
    }


def _many_steps(pipe: Any, task: NoiseTask, options: dict[str, Any]) -> GenerationMap:
    """The other model as a function of the found noise."""
    size = {"height": task.sampler.height, "width": task.sampler.width}
    made = GenerationMap(pipe, task.prompts, **{**size, **options})
    if made.latent_shape != task.sampler.latent_shape:
        raise ValueError(
            f"`multi_step_pipe` takes noise of shape {made.latent_shape}; takes a model with that of this one, "
            f"{task.sampler.latent_shape}"
        )
    return made


@functools.cache
def _class_for(stock: type) -> type:
    """The family's class: of its own file where it has one, made here where not."""
    import trimtab.pipelines as package

    name = f"NoiseOptimization{stock.__name__}"
    if name in package._NOISE_OPTIMIZATION:
        return getattr(package, name)
    return type(name, (NoiseOptimizationPipelineMixin, stock), {"__module__": __name__})


class NoiseOptimizationPipeline:
    """Picks the family's class: `from_pipe(stock, reward=...)` or `from_pretrained(model, reward=...)`.

    Example:
        >>> pipe = NoiseOptimizationPipeline.from_pretrained(model, reward="bundled")            # doctest: +SKIP
        >>> pipe("three owls on a pink background").images[0]                                    # doctest: +SKIP
    """

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, *, reward: Reward | None = None, **kwargs: Any) -> Any:
        """A noise-optimizing pipeline of the components of a pipeline in memory, which are shared.

        Args:
            pipeline: a stock text-to-image pipeline of a family in the table, or a subclass of one.
            reward: what calls without one climb.
            kwargs: as for Diffusers' `from_pipe`.

        Raises:
            ValueError: if its family isn't in the table.
        """
        return _class_for(stock_class(pipeline)).from_pipe(pipeline, reward=reward, **kwargs)

    @classmethod
    def from_pretrained(cls, model: str, *, reward: Reward | None = None, **kwargs: Any) -> Any:
        """A noise-optimizing pipeline of a repository or folder of a stock pipeline.

        Args:
            model: as for Diffusers' `from_pretrained`, like `kwargs`.
            reward: what calls without one climb.
            kwargs: such as `dtype`.

        Raises:
            ValueError: if its family isn't in the table.
        """
        return cls.from_pipe(DiffusionPipeline.from_pretrained(model, **kwargs), reward=reward)
