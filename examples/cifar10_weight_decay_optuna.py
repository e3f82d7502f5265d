"""ResNet-18 on CIFAR-10 with 11 million decays under Optuna: the flagship, for a GPU.

    python examples/cifar10_weight_decay_optuna.py --data-root DIR              # one GPU
    python examples/cifar10_weight_decay_optuna.py --data-root DIR --storage sqlite:///study.db
    python examples/cifar10_weight_decay_optuna.py --embedded                   # seconds on a CPU

Every trial learns a decay for each weight by implicit differentiation; the study searches what the
implicit function theorem cannot see. Start the second line on as many GPUs as there are, each with
its CUDA_VISIBLE_DEVICES: they share the study.
"""

from __future__ import annotations

import argparse

import optuna

import ift_tune
from ift_tune import Float, Int, MetaSpace, tasks

SPACE = MetaSpace(
    {
        "terms": Int(0, 10),
        # α as a multiple of 1/λ_max: a value found here carries over to other nets
        "alpha_scale": Float(0.1, 1.5),
        "meta_lr": Float(1e-2, 0.5, log=True),
        "inner_lr": Float(3e-3, 0.1, log=True),
        "inner_steps": Int(2, 50, log=True),
    }
)


def main() -> None:
    """Run the study and print its best trial."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--n-trials", type=int, default=20)
    parser.add_argument("--outer-steps", type=int, default=200)
    parser.add_argument("--storage", default=None)
    parser.add_argument("--data-root", default=None, help="default: the environment's")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--embedded", action="store_true", help="a tiny net on digits, no files")
    options = parser.parse_args()

    task = tasks.get("cifar10-weight-decay", data_root=options.data_root, embedded=options.embedded)
    objective = ift_tune.IFTObjective(
        task.make_problem,
        SPACE,
        ift_tune.Budget(outer_steps=options.outer_steps, eval_every=min(20, options.outer_steps)),
        config=task.default_config,
        device=options.device,
    )
    study = optuna.create_study(
        study_name="cifar10-weight-decay",
        storage=options.storage,
        load_if_exists=True,
        direction="minimize",
        sampler=optuna.samplers.TPESampler(seed=0, constant_liar=options.storage is not None),
        pruner=optuna.pruners.MedianPruner(n_startup_trials=4, n_warmup_steps=40),
    )
    study.optimize(objective, n_trials=options.n_trials)
    print(study.trials_dataframe(attrs=("number", "value", "state", "params")).to_string())
    best = study.best_trial
    print(
        f"best: trial {best.number} {best.params}, search error {best.value:.3f}, "
        f"retrained test error {best.user_attrs['retrained_test_error']:.3f}"
    )


if __name__ == "__main__":
    main()
