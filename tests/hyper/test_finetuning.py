"""Frozen parts of a model in whole runs: they cost little, are stored once, and stay the same."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import ift_tune
from ift_tune import (
    AdapterScale,
    Budget,
    ClassificationProblem,
    Compose,
    Float,
    MetaConfig,
    MetaSpace,
    Neumann,
    Splits,
    UsageError,
    WeightDecay,
    cached_features,
    load_best,
    refit,
    run_single,
    run_study,
)
from ift_tune.base.status import StopReason
from ift_tune.problem.losses import linearise_problem

CONFIG = MetaConfig(
    inverse=Neumann(terms=2, alpha=0.05), inner_steps=3, inner_lr=0.05, meta_lr=0.05
)
WIDE = 64
MODULES = ("attn.c_attn", "mlp.c_fc")


class LoRA(nn.Module):
    """A frozen linear layer with an adapter."""

    def __init__(self, inputs: int, outputs: int, rank: int = 2) -> None:
        super().__init__()
        self.base = nn.Linear(inputs, outputs).requires_grad_(False)
        self.lora_A = nn.Linear(inputs, rank, bias=False)
        self.lora_B = nn.Linear(rank, outputs, bias=False)
        self.scaling = 2.0

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.base(x) + self.scaling * self.lora_B(self.lora_A(x))
        return found


def make_splits(seed: int) -> Splits:
    generator = torch.Generator().manual_seed(seed)
    targets = torch.arange(90) % 3
    inputs = torch.randn(90, 8, generator=generator) + targets.unsqueeze(1)
    return Splits.from_arrays(inputs, targets, batch_size=18, seed=seed)


def make_parts(seed: int) -> tuple[nn.Sequential, nn.Sequential]:
    """Return a frozen backbone with buffers, and adapted layers on top of it."""
    torch.manual_seed(seed)
    backbone = nn.Sequential(nn.Linear(8, WIDE), nn.BatchNorm1d(WIDE), nn.Tanh())
    backbone.append(nn.Linear(WIDE, WIDE))
    backbone(torch.randn(50, 8))
    top = nn.Sequential(LoRA(WIDE, 5), nn.Tanh(), LoRA(5, 3))
    return backbone.requires_grad_(False).eval(), top


def problem_of(model: nn.Module, splits: Splits) -> ClassificationProblem:
    hyper = Compose({"scale": AdapterScale(model), "decay": WeightDecay(model, "module")})
    return ClassificationProblem(model, hyper, splits)


def make_problem(
    config: MetaConfig, device: torch.device, seed: int, *, frozen: str = "same"
) -> ClassificationProblem:
    backbone, top = make_parts(seed)
    if frozen == "by setting":
        first: Any = backbone[0]
        with torch.no_grad():
            first.weight.mul_(1.0 + config.meta_lr)
    return problem_of(nn.Sequential(backbone, top), make_splits(seed))


def make_without_buffers(
    config: MetaConfig, device: torch.device, seed: int, *, frozen: str = "same"
) -> ClassificationProblem:
    problem = make_problem(config, device, seed, frozen=frozen)
    backbone: Any = problem.model.get_submodule("0")
    backbone[1] = nn.Identity()
    return problem


def flops(work: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter:
        work()
    return int(counter.get_total_flops())


def test_a_frozen_part_below_costs_its_forward_pass_alone() -> None:
    backbone, top = make_parts(0)
    whole, cached = make_splits(0), cached_features(backbone, make_splits(0))
    products, hypergradients = [], []
    for model, splits in ((nn.Sequential(backbone, top), whole), (top, cached)):
        problem, batches = problem_of(model, splits), batches_of(splits)
        found = linearise_problem(problem, *batches)
        vector = [torch.ones_like(w) for w in found.weights]
        products.append(flops(partial(found.operator.matvec, vector)))
        hypergradients.append(flops(partial(linearise_problem, problem, *batches)))
        assert len(found.weights) == 4
    assert products[0] == products[1] > 0
    forward = sum(flops(partial(backbone, inputs)) for inputs, _ in batches_of(whole))
    assert hypergradients[0] - hypergradients[1] == forward > 0


def batches_of(splits: Splits) -> list[Any]:
    return [next(loader.in_order()) for loader in (splits.train, splits.val)]  # type: ignore[attr-defined]


def states(folder: Path) -> dict[str, Any]:
    return {file.parent.name: torch.load(file)["state"] for file in folder.rglob("*.pt")}


def test_what_is_frozen_stays_and_is_stored_once_in_a_file(tmp_path: Path) -> None:
    start = make_problem(CONFIG, torch.device("cpu"), 0).model.state_dict()
    budget = Budget(outer_steps=4, eval_every=1)
    out = tmp_path / "run"
    outcome = run_single(make_problem, budget, config=CONFIG, out=out, device="cpu")
    assert outcome.stop_reason is StopReason.DONE
    best = load_best(out, make_problem, device="cpu")
    last = load_best(out, make_problem, device="cpu", at="last")
    final = refit(out, make_problem, "train+val", device="cpu")
    for problem in (best, last, final):
        found = problem.model.state_dict()
        moved = {name for name, t in start.items() if not torch.equal(t, found[name])}
        assert moved == {name for name, p in problem.model.named_parameters() if p.requires_grad}
        assert problem.measure("test")["loss"] < 1.1
    assert not torch.equal(best.hyper["scale"].raw, torch.zeros(2))  # type: ignore[index]
    checkpoint = torch.load(out / "trial-00000" / "checkpoint.pt")["state"]
    kept, latest = checkpoint["best"]["model"], checkpoint["joint"]["model"]
    frozen = [name for name in start if name.startswith("0.") or ".base." in name]
    assert frozen
    assert all(kept[n].data_ptr() == latest[n].data_ptr() for n in frozen)
    own = latest["1.0.lora_A.weight"]
    own.add_(1.0)
    assert not torch.equal(own, kept["1.0.lora_A.weight"])


def test_tied_weights_are_kept_once(tmp_path: Path) -> None:
    def tied(config: MetaConfig, device: torch.device, seed: int) -> ClassificationProblem:
        problem = make_problem(config, device, seed)
        top = problem.model[1]  # type: ignore[index]
        top.again = nn.Identity()
        top.again.table = top[0].base.weight
        return problem

    run_single(tied, Budget(outer_steps=2), config=CONFIG, out=tmp_path / "run", device="cpu")
    kept = torch.load(tmp_path / "run" / "best" / "model.pt")["state"]["model"]
    assert kept["1.again.table"].data_ptr() == kept["1.0.base.weight"].data_ptr()


def test_a_resumed_run_has_the_same_bits(tmp_path: Path) -> None:
    joints = []
    for cut in (None, 2):
        problem = make_problem(CONFIG, torch.device("cpu"), 1)
        joint = ift_tune.JointOptimizer(problem, CONFIG, seed=1)
        for step in range(5):
            if step == cut:
                state = joint.state_dict()
                again = make_problem(CONFIG, torch.device("cpu"), 1)
                joint = ift_tune.JointOptimizer(again, CONFIG, seed=1)
                joint.load_state_dict(state)
            joint.step()
        joints.append(joint)
    for one, other in zip(*(j.problem.hypers() + j.problem.weights() for j in joints), strict=True):
        assert torch.equal(one, other)


SPACE = MetaSpace({"meta_lr": Float(0.01, 0.2, log=True), "alpha": Float(0.01, 0.1)})


def test_packed_trials_are_those_of_a_search_one_by_one(tmp_path: Path) -> None:
    tables = []
    for pack in (1, 3):
        out = tmp_path / str(pack)
        run_study(
            make_without_buffers,
            SPACE,
            Budget(outer_steps=3, retrain=False),
            n_trials=3,
            out=out,
            config=CONFIG,
            device="cpu",
            sampler="random",
            pack=pack,
        )
        tables.append(pd.read_parquet(out / "steps.parquet").sort_values(["trial", "step"]))
    columns = ["train_loss", "val_loss", "search_loss", "hypergradient_norm"]
    one, other = (table[columns].reset_index(drop=True) for table in tables)
    pd.testing.assert_frame_equal(one, other, rtol=1e-3)
    learned = [pd.read_parquet(tmp_path / p / "trials.parquet") for p in ("1", "3")]
    scales = [c for c in learned[0] if str(c).startswith("learned_scale.")]
    assert len(scales) == 2
    one, other = (table.sort_values("trial")[scales].reset_index(drop=True) for table in learned)
    pd.testing.assert_frame_equal(one, other, rtol=1e-3)


def test_trials_with_other_frozen_parts_are_not_packed(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"one problem.*got other values of model\.0\.0\.weight"):
        run_study(
            partial(make_without_buffers, frozen="by setting"),
            SPACE,
            Budget(outer_steps=2, retrain=False),
            n_trials=3,
            out=tmp_path / "run",
            config=CONFIG,
            device="cpu",
            sampler="random",
            pack=3,
        )


def test_hooks_of_others_are_still_not_packed(tmp_path: Path) -> None:
    def hooked(config: MetaConfig, device: torch.device, seed: int) -> ClassificationProblem:
        problem = make_without_buffers(config, device, seed)
        problem.model.register_forward_hook(lambda module, inputs, output: output)
        return problem

    with pytest.raises(UsageError, match="the hooks of model cannot be packed"):
        run_study(hooked, SPACE, Budget(outer_steps=2), n_trials=2, out=tmp_path / "run", pack=2)


def _gpt(seed: int) -> Any:
    """Return GPT-2 in small, made from its configuration, with adapters of peft."""
    import peft
    import transformers

    torch.manual_seed(seed)
    config = transformers.GPT2Config(
        vocab_size=19,
        n_positions=16,
        n_embd=32,
        n_layer=2,
        n_head=2,
        bos_token_id=0,
        eos_token_id=0,
    )
    lora = peft.LoraConfig(
        r=2, lora_alpha=4, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True
    )
    return peft.get_peft_model(transformers.GPT2LMHeadModel(config), lora)


def make_gpt(config: MetaConfig, device: torch.device, seed: int) -> ClassificationProblem:
    model = _gpt(seed)
    generator = torch.Generator().manual_seed(seed)
    ids = (torch.randint(19, (100, 1), generator=generator) + torch.arange(8)) % 19
    splits = Splits.from_arrays({"input_ids": ids, "labels": ids}, batch_size=20, seed=seed)
    return problem_of(model, splits)


@pytest.mark.filterwarnings("ignore")
def test_a_transformer_with_adapters_of_peft_from_run_to_merged_model(
    peft: Any, tmp_path: Path
) -> None:
    config = CONFIG.updated({"inner_optimizer": "adam", "inner_lr": 1e-2})
    out = tmp_path / "run"
    outcome = run_single(make_gpt, Budget(outer_steps=3), config=config, out=out, device="cpu")
    assert outcome.stop_reason is StopReason.DONE
    assert outcome.metrics["start_check_status"] == "passed"
    best: Any = load_best(out, make_gpt, device="cpu")
    scale, names = best.hyper["scale"], [f"transformer.h.{n}.{m}" for n in (0, 1) for m in MODULES]
    assert list(scale.names) == names
    assert set(outcome.metrics) > {f"learned_scale.{name}" for name in names}
    with torch.no_grad():
        scale.raw.copy_(scale.transform.inverse(torch.tensor([0.5, 2.0, 0.1, 1.0])))
    batch = next(iter(best.splits.test))
    ids = batch["input_ids"]
    with torch.no_grad():
        wanted = best.model(input_ids=ids).logits
    # A new model with the pattern has the layers that are left, and multiplies as they do now.
    pattern = scale.pattern(rank=4, threshold=0.2)
    fresh = peft.get_peft_model(_gpt(0).unload(), peft.LoraConfig(**pattern, fan_in_fan_out=True))
    layers = {n.removeprefix("base_model.model."): m for n, m in fresh.named_modules()}
    found = {n: m.scaling["default"] for n, m in layers.items() if hasattr(m, "lora_A")}
    assert found == pytest.approx(dict(zip((names[i] for i in (0, 1, 3)), (1, 4, 2), strict=True)))
    ranks = {n: m.r["default"] for n, m in layers.items() if hasattr(m, "lora_A")}
    assert ranks == {names[0]: 1, names[1]: 4, names[3]: 2}
    # Folded, the scales are in the adapters that peft saves and merges.
    scale.fold()
    merged = best.model.merge_and_unload()
    with torch.no_grad():
        torch.testing.assert_close(merged(input_ids=ids).logits, wanted)


@pytest.mark.filterwarnings("ignore")
def test_what_is_merged_too_early_is_refused(peft: Any) -> None:
    problem = make_gpt(CONFIG, torch.device("cpu"), 0)
    model: Any = problem.model
    batch = next(iter(problem.splits.test))
    model.merge_adapter()
    with pytest.raises(UsageError, match=r"c_attn must not be merged.*call fold\(\)"):
        problem.val_loss(batch)
    model.unmerge_adapter()
    with model.disable_adapter(), torch.no_grad():
        plain = problem.val_loss(batch)
    assert plain.isfinite()
