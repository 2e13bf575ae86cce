"""What the Improve tab does: the noise of a picture is moved until rewards like it (ReNO, arXiv 2406.04312)."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from .checks import LONGEST_PROMPT, is_number, is_whole
from .code import Raw, call, device_of_code, load_pipeline_code, sequence_length_code
from .limits import BUNDLED
from .rewards import loaded_reward, with_few_steps
from .taste_file import TASTE, TasteFile

if TYPE_CHECKING:
    from PIL.Image import Image

    from .model import LoadedModel
    from .runs import Run

__all__ = ["Improved", "ImproveJob", "colours_of", "python_code"]

_MOST_ITERATIONS = 200
_MOST_STEPS = 50
_MOST_COLOURS = 8
_TASTE_WEIGHT = 20.0
"""Of a taste, beside the weight that is set: its values are log odds, so flat in the noise that the gradient would stay
far below the length to which it is cut, and the picture as it is. Above that length a larger weight changes little."""


@dataclass(frozen=True)
class Improved:
    """What there is of a run, so far.

    Attributes:
        preview: while the first picture is being made, what it will be.
        first: the picture of the first noise.
        best: the picture with the highest reward.
        best_step: its iteration.
        rewards: one an iteration; NaN where there is none.
        terms: the parts of the rewards by name.
        kept: each improvement: iteration, reward, picture.
        notes: what else to know, such as words that the model does not know.
    """

    preview: Image | None = None
    first: Image | None = None
    best: Image | None = None
    best_step: int = 0
    rewards: tuple[float, ...] = ()
    terms: dict[str, tuple[float, ...]] = field(default_factory=dict)
    kept: tuple[tuple[int, float, Image], ...] = ()
    notes: str = ""


@dataclass(frozen=True)
class ImproveJob:
    """A picture to improve.

    Attributes:
        prompt: what it shows.
        negative_prompt: what to guide away from; empty leaves it to the model.
        reward: a name in ``trimtab.rewards.REWARDS``, or "taste".
        reward_weight: of that, 0 or more.
        palette: colours that the picture is to have, with commas between, such as "pink, #ffd1dc".
        palette_weight: of their reward, 0 or more; 0 is none.
        optimizer: "gradient", or "best-of-n" for fresh noise each time.
        iterations: pictures made on the way.
        learning_rate: the step of the gradient, which is cut to a length of 0.1.
        steps: of the sampler.
        guidance_scale: of the prompt.
        few_steps: whether the bundled model makes each picture in four evaluations, by its distilled transformer;
            ``steps`` and ``guidance_scale`` then mean nothing. Of other models it means nothing.
        seed: of the first noise.
        taste: the file of the reward that is called "taste".
        model: its name.

    Raises:
        ValueError: a setting out of range, in plain words.
    """

    prompt: str
    negative_prompt: str = ""
    reward: str = "bundled"
    reward_weight: float = 1.0
    palette: str = ""
    palette_weight: float = 0.0
    optimizer: Literal["gradient", "best-of-n"] = "gradient"
    iterations: int = 20
    learning_rate: float = 5.0
    steps: int = 8
    guidance_scale: float = 5.0
    few_steps: bool = True
    seed: int = 0
    taste: TasteFile | None = None
    model: str = BUNDLED

    def __post_init__(self) -> None:
        from trimtab.rewards import REWARDS

        if not self.prompt.strip():
            raise ValueError("Write a prompt: what the picture shows.")
        for name in ("prompt", "negative_prompt", "palette"):
            if len(getattr(self, name)) > LONGEST_PROMPT:
                raise ValueError(f"The {_shown(name)} is too long; it takes up to {LONGEST_PROMPT} characters.")
        if self.reward not in (*REWARDS, TASTE):
            raise ValueError(f"The reward takes one of {', '.join(REWARDS)}, {TASTE}.")
        if self.reward == TASTE:
            if self.taste is None:
                raise ValueError("There is no taste yet: choose pictures in the Taste tab, or give a taste's file.")
            self.taste.source()
        if self.optimizer not in ("gradient", "best-of-n"):
            raise ValueError("The search takes gradient or best-of-n.")
        for name, low, high in (("iterations", 1, _MOST_ITERATIONS), ("steps", 1, _MOST_STEPS), ("seed", 0, 2**62)):
            if not is_whole(getattr(self, name), low, high):
                raise ValueError(f"The {_shown(name)} takes a whole number from {low} to {high}.")
        for name, low, high in (
            ("reward_weight", 0.0, 100.0),
            ("palette_weight", 0.0, 100.0),
            ("learning_rate", 1e-4, 100.0),
            ("guidance_scale", 0.0, 50.0),
        ):
            if not is_number(getattr(self, name), low, high):
                raise ValueError(f"The {_shown(name)} takes a number from {low:g} to {high:g}.")
        if not (self.reward_weight or (self.palette_weight and self.palette.strip())):
            raise ValueError("Give the reward a weight above 0, or the palette colours and a weight.")
        if self.palette_weight:
            colours_of(self.palette)

    def seconds(self) -> float:
        """How long it takes on a GPU, about."""
        return 10.0 + self.iterations * (0.3 + 0.12 * self._call()["num_inference_steps"])

    def run(self, loaded: LoadedModel, run: Run) -> None:
        """Improves the picture; each iteration is emitted, and the run may end after any.

        Raises:
            ValueError: the pipeline refuses a setting.
        """
        import torch

        from trimtab.commands.edit import as_picture, sequence_length
        from trimtab.pipelines import NoiseOptimizationPipeline

        made = Improved(notes=loaded.unknown_words(self.prompt, self.negative_prompt))
        run.note("Loading the reward")
        stock = with_few_steps(loaded.pipe) if self._distilled else loaded.pipe
        pipe = NoiseOptimizationPipeline.from_pipe(stock, reward=self._rewards(stock._execution_device))
        height, width = loaded.size_within(run.largest_picture)

        def preview(picture: Image) -> None:
            if made.first is None:
                run.emit(replace(made, preview=picture), "Making the first picture")

        steps = self._call()["num_inference_steps"]
        watch = run.step(steps, "First picture, step", on_preview=preview, height=height, width=width)

        def step_end(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            if made.first is None:
                return watch(pipe, step, timestep, tensors)
            run.check()
            return {}

        options = {"callback_on_step_end": step_end, **self._call(), **sequence_length(pipe)}
        generator = torch.Generator("cpu").manual_seed(self.seed)
        for state in pipe.stream(self.prompt, generator=generator, height=height, width=width, **options):
            made = _added(made, state, as_picture)
            best = made.rewards[made.best_step]
            run.emit(made, f"Iteration {state.step + 1} of {self.iterations}, best reward {best:.4g}")
            run.check()

    @property
    def _distilled(self) -> bool:
        return self.few_steps and self.model == BUNDLED

    @property
    def _weight(self) -> float:
        return self.reward_weight * (_TASTE_WEIGHT if self.reward == TASTE else 1.0)

    def _call(self) -> dict[str, Any]:
        """Arguments of the pipeline's call that a job sets."""
        from trimtab.commands.few_steps import FEW_STEPS_CALL

        gradient = self.optimizer == "gradient"
        few = FEW_STEPS_CALL if self._distilled else {}
        return {
            "negative_prompt": self.negative_prompt or None,
            "num_optimization_steps": self.iterations,
            "optimizer": self.optimizer,
            "optimizer_kwargs": {"lr": self.learning_rate} if gradient else None,
            "num_inference_steps": self.steps,
            "guidance_scale": self.guidance_scale,
            **few,
        }

    def _rewards(self, device: Any) -> Any:
        from trimtab.rewards import PaletteReward, WeightedReward

        pairs = []
        if self.reward_weight:
            own = self.reward == TASTE
            reward = self.taste.load(device) if own else loaded_reward(self.reward, device)
            pairs.append((reward, self._weight))
        if self.palette_weight:
            pairs.append((PaletteReward(colours_of(self.palette)).to(device), self.palette_weight))
        return WeightedReward(pairs)


def python_code(job: ImproveJob, size: tuple[int, int] | None = None) -> str:
    """The trimtab code that makes the same picture.

    Args:
        job: the settings; of a run that was stopped, with the iterations that were done.
        size: (height, width) where it is not the model's own.
    """
    device = device_of_code()
    where = {} if device == "cpu" else {"device": device}
    source = "taste.safetensors" if job.reward == TASTE else job.reward
    on_device = "" if device == "cpu" else f'.to("{device}")'
    rewards = [f"({call('load_reward', source, **where)}, {job._weight!r})"] if job.reward_weight else []
    if job.palette_weight:
        rewards.append(f"({call('PaletteReward', colours_of(job.palette))}{on_device}, {job.palette_weight!r})")
    names = ["WeightedReward", *(["load_reward"] if job.reward_weight else [])]
    names += ["PaletteReward"] if job.palette_weight else []
    imports, loading = load_pipeline_code(job.model, few_steps=job._distilled)
    sizes = {} if size is None else {"height": size[0], "width": size[1]}
    lines = [
        *imports,
        "from trimtab.pipelines import NoiseOptimizationPipeline",
        f"from trimtab.rewards import {', '.join(sorted(names))}",
        "",
        loading,
        f"reward = WeightedReward([{', '.join(rewards)}])",
        "improve = NoiseOptimizationPipeline.from_pipe(pipe, reward=reward)",
        call(
            "out = improve",
            job.prompt,
            **job._call(),
            **sizes,
            **sequence_length_code(job.model),
            generator=Raw(f'torch.Generator("cpu").manual_seed({job.seed})'),
        ),
        "image = out.images[0]",
        'image.save("improved.png")',
        "print(out.rewards, out.best_step)",
    ]
    return "\n".join(lines) + "\n"


def colours_of(palette: str) -> list[str]:
    """The colours of a text with commas between them.

    Raises:
        ValueError: none, too many, or a word that is no colour.

    Example:
        >>> colours_of("pink, #FFD1DC")
        ['pink', '#ffd1dc']
    """
    from PIL import ImageColor

    words = [word.strip().lower() for word in palette.split(",") if word.strip()]
    if not 1 <= len(words) <= _MOST_COLOURS:
        raise ValueError(f"The palette takes 1 to {_MOST_COLOURS} colours with commas between them.")
    for word in words:
        try:
            ImageColor.getrgb(word)
        except ValueError:
            raise ValueError(f"{word[:40]!r} is no colour; colours are such as pink or #ffd1dc.") from None
    return words


def _added(made: Improved, state: Any, as_picture: Any) -> Improved:
    """What there is after another iteration."""
    reward = float(state.rewards[0])
    kept = made.kept
    if state.step == 0 or bool(state.improved[0]):
        kept = (*kept, (state.step, reward, as_picture(state.images[0].float().cpu())))
    return replace(
        made,
        preview=None,
        first=kept[0][2],
        best=kept[-1][2],
        best_step=int(state.best_step[0]),
        rewards=(*made.rewards, reward),
        terms={name: (*made.terms.get(name, ()), float(value[0])) for name, value in state.terms.items()},
        kept=kept,
    )


def _shown(name: str) -> str:
    return name.replace("_", " ")
