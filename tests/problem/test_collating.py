"""Batches that tell their examples: any collator, any dataset with a length."""

from __future__ import annotations

import pickle
from collections import UserDict
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils import data

from ift_tune import (
    ClassificationProblem,
    DomainWeights,
    ExampleWeights,
    IndexedCollator,
    IndexedDataset,
    JointOptimizer,
    MetaConfig,
    Splits,
    UsageError,
)

TEXTS = [{"ids": torch.arange(1, 2 + n % 3), "labels": n % 2} for n in range(12)]


def padded(examples: list[dict[str, Any]]) -> UserDict[str, Tensor]:
    """Refuse what it does not know, as strict collators do; return what is no dict."""
    assert all(set(example) == {"ids", "labels"} for example in examples)
    ids = nn.utils.rnn.pad_sequence([e["ids"] for e in examples], batch_first=True)
    return UserDict({"ids": ids, "labels": torch.tensor([e["labels"] for e in examples])})


class Bag(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 2, padding_idx=0)

    def forward(self, ids: Tensor) -> Tensor:
        found: Tensor = self.table(ids).sum(1)
        return found


def test_examples_keep_their_positions_through_any_collator() -> None:
    dataset = IndexedDataset(TEXTS, sources=[n % 3 for n in range(12)])
    collate = pickle.loads(pickle.dumps(IndexedCollator(padded)))  # as workers get it
    order = torch.Generator().manual_seed(0)
    loader: Any = data.DataLoader(
        dataset, batch_size=5, shuffle=True, collate_fn=collate, generator=order
    )
    seen = []
    for batch in loader:
        assert batch["index"].dtype == torch.int64
        for row, place in enumerate(batch["index"].tolist()):
            ids = batch["ids"][row]
            assert torch.equal(ids[ids > 0], TEXTS[place]["ids"])
            assert batch["labels"][row] == TEXTS[place]["labels"]
            seen.append(place)
    assert sorted(seen) == list(range(12))


def test_positions_reach_the_weights_of_examples_and_sources_those_of_sources() -> None:
    sources = [0] * 4 + [1] * 8
    other: Any = data.DataLoader(TEXTS, batch_size=6, collate_fn=padded)  # type: ignore[arg-type]
    kinds = {"index": ExampleWeights(12), "source": DomainWeights(shares=[4, 8])}
    for entry, hyper in kinds.items():
        collate = IndexedCollator(padded, entry=entry)
        dataset = IndexedDataset(TEXTS, sources=sources)
        train: Any = data.DataLoader(dataset, batch_size=12, collate_fn=collate)
        (batch,) = train
        assert batch["index"].tolist() == (sources if entry == "source" else list(range(12)))
        problem = ClassificationProblem(Bag(), hyper, Splits(train, other, other, other))
        joint = JointOptimizer(problem, MetaConfig(inner_steps=2, start_check=False))
        before = [h.detach().clone() for h in problem.hypers()]
        joint.step()
        assert not torch.equal(before[0], problem.hypers()[0])


def test_pairs_get_a_third_entry() -> None:
    dataset = IndexedDataset([(float(n), n % 2) for n in range(4)])
    assert dataset[-1] == (3.0, 1, 3)
    subset: Any = data.Subset(TEXTS, [5, 7])  # type: ignore[arg-type]
    assert [IndexedDataset(subset)[n]["index"] for n in range(2)] == [0, 1]
    with pytest.raises(IndexError):
        dataset[4]
    (batch,) = data.DataLoader(dataset, batch_size=4)
    assert batch[2].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("value", [3, np.int32(3), torch.tensor(3)])
def test_whole_numbers_of_any_library_are_positions(value: Any) -> None:
    assert IndexedCollator()([{"x": 1.0, "index": value}])["index"].tolist() == [3]


def test_what_tells_no_positions_is_refused() -> None:
    with pytest.raises(UsageError, match=r"entry 'index'.*IndexedDataset, got \['x'\]"):
        IndexedCollator()([{"x": 1.0}])
    with pytest.raises(UsageError, match=r"entry 'source'.*got tuple"):
        IndexedCollator(entry="source")([(1, 2)])
    for value in ("web", 1.5, None):
        with pytest.raises(UsageError, match="must be a whole number"):
            IndexedCollator(entry="source")([{"x": 1.0, "source": value}])
    with pytest.raises(UsageError, match=r"must return a mapping.*got a Tensor"):
        IndexedCollator(lambda examples: torch.zeros(len(examples)))([{"index": 0}])
    for wrong in ({"collate_fn": 3}, {"entry": ""}, {"entry": 1}):
        given: Any = wrong
        with pytest.raises(UsageError, match="got"):
            IndexedCollator(**given)
    with pytest.raises(UsageError, match="sources must be one for each of 12 examples, got 1"):
        IndexedDataset(TEXTS, sources=[0])
    with pytest.raises(UsageError, match="must be mappings, or pairs"):
        IndexedDataset([1, 2])[0]
    with pytest.raises(UsageError, match="a length"):
        IndexedDataset(iter(TEXTS))
