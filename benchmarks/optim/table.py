"""One table of what the optimization benchmarks wrote: ``python -m trimtab.benchmarks.optim.table``."""

from __future__ import annotations

import json

from trimtab.benchmarks.optim.report import RESULTS, Row, print_rows

BENCHMARKS = (
    "personal_reward",
    "personal_noise",
    "convex_relu",
    "newton",
    "blind_gain",
    "conjugate_directions",
    "restoration",
    "consensus",
    "directional",
    "mirror_descent",
    "augmented_lagrangian",
    "bilevel",
    "training_optimizers",
    "noise_constraints",
    "search_pipeline",
    "search_landscape",
    "adaptive_batch",
    "target_surrogate",
    "optimizer_biases",
    "finetune",
    "hessian_spectrum",
    "noise_posterior",
    "programmable_inference",
    "unlearnable_examples",
)


def main() -> None:
    rows = []
    for name in BENCHMARKS:
        path = RESULTS / f"{name}.json"
        if path.exists():
            rows += [Row(**row) for row in json.loads(path.read_text()).get("rows", [])]
        else:
            print(f"not run yet: python -m trimtab.benchmarks.optim.{name}")
    print_rows(rows)


if __name__ == "__main__":
    main()
