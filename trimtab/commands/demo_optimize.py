"""The part of ``trimtab demo`` that optimizes the noise of a picture."""

from pathlib import Path
from typing import Any

from trimtab.commands.pictures import save_png
from trimtab.commands.words import report_unknown_words

__all__ = ["demo_optimize"]

PROMPT = "three cars on a mint background"
SEED = 3
ITERATIONS = 12


def demo_optimize(pipe: Any, folder: Path, seed: int = SEED, *, bundled: bool = True) -> Path:
    """Optimizes one picture against the bundled reward and writes ``optimize.png``: the first to the best.

    Args:
        pipe: a stock pipeline.
        folder: where to; it exists.
        seed: of the noise to begin with.
        bundled: whether it is the bundled model's, which then gets its distilled transformer.

    Returns:
        The file.
    """
    import torch

    from trimtab.commands.edit import sequence_length
    from trimtab.commands.few_steps import FEW_STEPS_CALL, with_few_steps
    from trimtab.commands.optimize import GUIDED_CALL
    from trimtab.commands.optimize_report import Improvements
    from trimtab.pipelines import NoiseOptimizationPipeline

    report_unknown_words(pipe, [PROMPT])
    improvements = Improvements()
    stock = with_few_steps(pipe) if bundled else pipe
    optimized = NoiseOptimizationPipeline.from_pipe(stock, reward="bundled")
    optimized.set_progress_bar_config(desc="optimize", leave=False, disable=None)
    result = optimized(
        PROMPT,
        num_optimization_steps=ITERATIONS,
        generator=torch.Generator("cpu").manual_seed(seed),
        callback_on_iteration_end=improvements,
        **(FEW_STEPS_CALL if bundled else GUIDED_CALL),
        **sequence_length(optimized),
    )
    path = folder / "optimize.png"
    save_png(improvements.strip(0, int(result.best_step[0])), path, {"prompt": PROMPT, "seed": seed})
    return path
