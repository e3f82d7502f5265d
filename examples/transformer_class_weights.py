"""A transformer with its loss inside, in bfloat16: class weights learned where classes are rare."""

import argparse
from dataclasses import dataclass

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import ift_tune
from ift_tune import Batches, Budget, ClassificationProblem, ClassWeights, MetaConfig, Splits


@dataclass
class Output:
    """What the transformer returns."""

    logits: Tensor
    loss: Tensor | None


class Transformer(nn.Module):
    """Reads a digit as eight tokens, its rows of eight pixels."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embed, self.position = nn.Linear(8, width), nn.Parameter(torch.randn(8, width))
        self.layer = nn.TransformerEncoderLayer(width, 4, 2 * width, batch_first=True)
        self.head = nn.Linear(width, 10)

    def forward(self, tokens: Tensor, labels: Tensor | None = None) -> Output:
        """Return the logits, and the cross-entropy where labels are given."""
        logits = self.head(self.layer(self.embed(tokens) + self.position).mean(dim=1))
        return Output(logits, None if labels is None else nn.CrossEntropyLoss()(logits, labels))


def make_problem(config: MetaConfig, device: torch.device, seed: int) -> ClassificationProblem:
    """Return the problem: in training alone, the classes 0, 3, 6 and 9 are rare."""
    pixels, labels = map(torch.as_tensor, load_digits(return_X_y=True))
    order = torch.randperm(1797, generator=torch.Generator().manual_seed(seed))
    train, *others = torch.split(order, [900, 300, 300, 297])
    parts = train[(labels[train] % 3 > 0) | (torch.arange(900) % 20 == 0)], *others
    rows = [{"tokens": pixels[i].float().view(-1, 8, 8) / 16, "labels": labels[i]} for i in parts]
    splits = Splits(Batches(rows[0], batch_size=32), *map(Batches, rows[1:]))
    return ClassificationProblem(Transformer(), ClassWeights(10, transform="exp"), splits)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="runs/transformer_class_weights")
    parser.add_argument("--outer-steps", type=int, default=100)
    args = parser.parse_args()
    config = MetaConfig(inner_steps=10, inner_lr=2e-3, meta_lr=0.3, precision="bfloat16")
    budget = Budget(args.outer_steps, patience=20)
    ift_tune.run_single(make_problem, budget, config=config, out=args.out)
    trials, steps = ift_tune.load_results(args.out)
    errors = steps.set_index("step")[["search_error", "test_error"]]
    best = errors.loc[trials["best_step"].item()]
    print("best", best.to_dict(), "last", errors.iloc[-1].to_dict(), trials["learned_words"].item())
