"""What the Taste tab does: pictures to choose from, and a personal reward fitted from the choices."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from PIL.Image import Image

from .checks import LONGEST_PROMPT, check_whole, is_number
from .code import Raw, call, device_of_code, load_pipeline_code, sequence_length_code
from .limits import BUNDLED
from .rewards import loaded_reward, with_few_steps
from .taste_choice import LEAST_VOTES
from .taste_file import FEATURES, TasteFile

if TYPE_CHECKING:
    from collections.abc import Sequence

    from trimtab.rewards import PersonalReward

    from .model import LoadedModel
    from .runs import Run

__all__ = [
    "FEWEST_PICTURES",
    "HEADS",
    "MOST_PICTURES",
    "Stock",
    "TasteJob",
    "fit_taste",
    "python_code",
    "scores_of",
    "told_apart",
]

HEADS = ("polished", "linear")
FEWEST_PICTURES, MOST_PICTURES = 4, 60
_MOST_PROMPTS = 20
_MOST_STEPS = 50
_FEWEST_OF_EACH = 4
"""Liked and disliked pictures from which it is told how well they can be told apart."""
_KEPT_SIDE = 320
"""Pixels of the longest side of what is kept to be shown."""


@dataclass(frozen=True)
class TasteJob:
    """Pictures to make.

    Attributes:
        prompts: what they show, a line each; the pictures have them in turn.
        count: of pictures.
        seed: of the first one's noise; the others' count up from it.
        features: the reward on whose features the taste is fitted.
        few_steps: whether the bundled model makes each in four evaluations; ``steps`` and ``guidance_scale`` then mean
            nothing.
        steps: of the sampler.
        guidance_scale: of the prompt.
        model: its name.

    Raises:
        ValueError: a setting out of range, in plain words.
    """

    prompts: str
    count: int = 24
    seed: int = 0
    features: Literal["bundled", "clip", "pickscore"] = "bundled"
    few_steps: bool = True
    steps: int = 8
    guidance_scale: float = 5.0
    model: str = BUNDLED

    def __post_init__(self) -> None:
        if not isinstance(self.prompts, str) or not self.lines():
            raise ValueError("Write what the pictures show, a line for each kind.")
        if len(self.lines()) > _MOST_PROMPTS or max(map(len, self.lines())) > LONGEST_PROMPT:
            raise ValueError(f"The prompts take up to {_MOST_PROMPTS} lines of up to {LONGEST_PROMPT} characters.")
        check_whole("number of pictures", self.count, FEWEST_PICTURES, MOST_PICTURES)
        check_whole("seed", self.seed, 0, 2**62)
        check_whole("number of steps", self.steps, 1, _MOST_STEPS)
        if self.features not in FEATURES:
            raise ValueError(f"The features take one of {', '.join(FEATURES)}.")
        if not is_number(self.guidance_scale, 0, 50):
            raise ValueError("The guidance scale takes a number from 0 to 50.")

    def lines(self) -> list[str]:
        """The prompts."""
        return [line.strip() for line in self.prompts.splitlines() if line.strip()]

    def seconds(self) -> float:
        """About how long it takes on a GPU."""
        return 5.0 + 0.15 * self.count * self._call()["num_inference_steps"]

    def run(self, loaded: LoadedModel, run: Run) -> None:
        """Makes them one by one; each is emitted with those before it."""
        import torch

        from trimtab.commands.edit import as_picture, sequence_length
        from trimtab.pipelines import GenerationMap
        from trimtab.rewards.personal import picture_features

        notes = loaded.unknown_words(*self.lines())
        pipe = with_few_steps(loaded.pipe) if self._distilled else loaded.pipe
        run.note("Loading the features")
        clip = loaded_reward(self.features, pipe._execution_device)
        height, width = loaded.size_within(run.largest_picture)
        options = {"height": height, "width": width, **self._call(), **sequence_length(pipe)}
        sample = GenerationMap(pipe, self.lines(), callback_on_step_end=_checking(run), **options)
        pictures: list[Image] = []
        features: list[tuple[float, ...]] = []
        for number in range(self.count):
            noise = sample.sample_latents(1, torch.Generator().manual_seed(self.seed + number))
            picture = sample(noise, prompt_index=[number % len(self.lines())]).float()
            features.append(tuple(picture_features(clip, picture.to(clip.model.device))[0].tolist()))
            shown = as_picture(picture[0].cpu())
            shown.thumbnail((_KEPT_SIDE, _KEPT_SIDE))
            pictures.append(shown)
            stock = Stock(self, tuple(pictures), tuple(features), notes)
            run.emit(stock, f"Picture {number + 1} of {self.count} is there")
            run.check()

    @property
    def _distilled(self) -> bool:
        return self.few_steps and self.model == BUNDLED

    def _call(self) -> dict[str, Any]:
        """Arguments of the pipeline's call that a job sets."""
        from trimtab.commands.few_steps import FEW_STEPS_CALL

        few = FEW_STEPS_CALL if self._distilled else {}
        return {"num_inference_steps": self.steps, "guidance_scale": float(self.guidance_scale), **few}


@dataclass(frozen=True, eq=False)
class Stock:
    """Pictures to choose from.

    Attributes:
        job: that made them.
        pictures: to be shown, no larger than 320 pixels.
        features: of each, of length 1, numbers of the job's reward.
        notes: what else to know.
    """

    job: TasteJob
    pictures: tuple[Image, ...] = ()
    features: tuple[tuple[float, ...], ...] = field(default=(), repr=False)
    notes: str = ""


def fit_taste(stock: Stock, votes: Sequence[tuple[int, int]], head: str) -> PersonalReward:
    """The taste of who chose so.

    Args:
        stock: the pictures.
        votes: numbers of two pictures each, the preferred one first.
        head: one of ``HEADS``.

    Raises:
        ValueError: too few choices, or pictures that do not differ.
    """
    import torch

    from trimtab.rewards import fit_personal_reward

    if head not in HEADS:
        raise ValueError(f"The kind takes one of {', '.join(HEADS)}.")
    if len(votes) < LEAST_VOTES:
        raise ValueError(f"There are {len(votes)} choices; a taste takes at least {LEAST_VOTES}.")
    clip = loaded_reward(stock.job.features, device_of_code())
    return fit_personal_reward(torch.tensor(stock.features), pairs=list(votes), head=head, features=clip)


def scores_of(taste: TasteFile, stock: Stock) -> list[float] | None:
    """What a taste says of pictures; None where it was fitted on other features than theirs."""
    import torch

    if taste.source() != stock.job.features:
        return None
    reward = taste.load(device_of_code())
    return reward.score_features(torch.tensor(stock.features, device=reward.mean.device)).tolist()


def told_apart(stock: Stock, votes: Sequence[tuple[int, int]]) -> str:
    """How well what was mostly chosen can be told from what mostly wasn't, in plain words; empty with too few of each.

    Nearest neighbours bracket the error that nothing which sees these features alone can stay below (Cover and Hart),
    beside the kernel's estimate of it, which is too high in many dimensions (`trimtab.optim.bayes_error`).
    """
    import torch

    from trimtab.optim import bayes_error_report

    balance = torch.zeros(len(stock.pictures))
    for first, last in votes:
        balance[first] += 1
        balance[last] -= 1
    known = balance != 0
    liked = balance[known] > 0
    if min(int(liked.sum()), int((~liked).sum())) < _FEWEST_OF_EACH:
        return ""
    found = bayes_error_report(torch.tensor(stock.features)[known], liked.long())
    chance = min(float(liked.float().mean()), 1 - float(liked.float().mean()))
    text = (
        f"You mostly chose {int(liked.sum())} of {len(liked)} pictures. From what it sees of them even the best judge "
        f"would take {100 * found.knn_lower:.0f} to {100 * found.knn_upper:.0f} % for the wrong kind (guessing: "
        f"{100 * chance:.0f} %; by another estimate: {100 * found.estimate:.0f} %)."
    )
    if found.knn_upper >= 0.9 * chance:
        text += " That is hardly better than guessing: what it sees may not hold what you choose by."
    return text


def python_code(job: TasteJob, votes: Sequence[tuple[int, int]], head: str) -> str:
    """The code that makes the pictures and fits the taste."""
    imports, load = load_pipeline_code(job.model, few_steps=job._distilled)
    others = {} if job.features == BUNDLED else {"features": job.features}
    noise = Raw(f"pictures.sample_latents(1, torch.Generator().manual_seed({job.seed} + i))")
    made = call("pictures", noise, prompt_index=Raw(f"[i % {len(job.lines())}]"))
    return "\n".join(
        [
            *imports,
            "from trimtab.pipelines import GenerationMap",
            "from trimtab.rewards import fit_personal_reward",
            "",
            load,
            call(
                "pictures = GenerationMap", Raw("pipe"), job.lines(), **job._call(), **sequence_length_code(job.model)
            ),
            f"made = torch.cat([{made} for i in range({job.count})])",
            f"pairs = {[tuple(vote) for vote in votes]}  # the preferred one first",
            call("taste = fit_personal_reward", Raw("made"), pairs=Raw("pairs"), head=head, **others),
            'taste.save("taste.safetensors")',
            "",
        ]
    )


def _checking(run: Run) -> Any:
    def step_end(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        run.check()
        return {}

    return step_end
