"""ResNet-18 for small images: torchvision's net with another stem; its task on tiny data."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch import nn

from ift_tune import JointOptimizer, tasks
from ift_tune.implicit.vectors import dot, randn_like
from ift_tune.problem.modes import preserved_buffers
from ift_tune.tasks.building import resnet18
from ift_tune.tasks.vision import torchvision_part

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("torchvision") is None, reason="torchvision is not installed"
)


def test_it_is_torchvisions_net_but_for_the_stem() -> None:
    with torch.device("meta"):
        net, theirs = resnet18(), torchvision_part("models").resnet18(num_classes=10)
    assert sum(p.numel() for p in net.parameters()) == 11_173_962
    ours = [tuple(p.shape) for p in net.state_dict().values()]
    truth = [tuple(p.shape) for p in theirs.state_dict().values()]
    assert (ours[0], truth[0]) == ((64, 3, 3, 3), (64, 3, 7, 7))
    assert ours[1:] == truth[1:]


def test_at_any_width_it_computes_what_torchvisions_does() -> None:
    torch.manual_seed(0)
    net = resnet18(classes=7, width=4).eval()
    theirs = torchvision_part("models").resnet18(num_classes=7)
    theirs.maxpool = nn.Identity()
    theirs.conv1, theirs.bn1 = net.get_submodule("stem").children()
    blocks = iter([m for name, m in net.named_children() if name.startswith("stage")])
    for stage in (theirs.layer1, theirs.layer2, theirs.layer3, theirs.layer4):
        for number in range(len(stage)):
            stage[number] = next(blocks)
    assert next(blocks, None) is None
    theirs.fc = net.classifier
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(net(images), theirs.eval()(images))
    assert net(images).shape == (2, 7)
    assert net[:6](images).shape == (2, 8, 16, 16)  # full size until the second stage


def test_hessian_products_go_through_relu_and_batch_normalisation() -> None:
    torch.manual_seed(0)
    net = resnet18(classes=3, width=2).double()
    weights = list(net.parameters())
    images, targets = torch.randn(4, 3, 8, 8, dtype=torch.float64), torch.tensor([0, 1, 2, 0])
    vector = [0.1 * v for v in randn_like(weights, 1)]

    def gradient() -> list[torch.Tensor]:
        with preserved_buffers(net):
            loss = nn.functional.cross_entropy(net(images), targets)
        return list(torch.autograd.grad(loss, weights, create_graph=True))

    product = torch.autograd.grad(gradient(), weights, vector)
    slopes = []
    for sign in (1.0, -1.0):
        with torch.no_grad():
            for w, v in zip(weights, vector, strict=True):
                w.add_(v, alpha=sign * 1e-6)
        slopes.append(float(dot(gradient(), vector).detach()))
        with torch.no_grad():
            for w, v in zip(weights, vector, strict=True):
                w.sub_(v, alpha=sign * 1e-6)
    truth = (slopes[0] - slopes[1]) / 2e-6
    assert float(dot(product, vector)) == pytest.approx(truth, rel=1e-4)


@pytest.mark.parametrize("name", ["cifar10-weight-decay", "cifar10-overfit"])
def test_tiny_tasks_step_and_leave_the_statistics_to_the_inner_steps(name: str) -> None:
    task = tasks.get(name, embedded=True)
    config = task.default_config.updated({"inner_steps": 2, "alpha": 0.1})
    problem = task.make_problem(config, "cpu", 0)
    assert sum(h.numel() for h in problem.hypers()) == sum(w.numel() for w in problem.weights())
    before = [h.detach().clone() for h in problem.hypers()]
    joint = JointOptimizer(problem, config)
    joint.step()
    assert all(not torch.equal(a, b) for a, b in zip(before, problem.hypers(), strict=True))
    counted = [b for n, b in problem.model.named_buffers() if n.endswith("num_batches_tracked")]
    assert len(counted) == 20
    assert all(int(number) == 2 for number in counted)
    assert len(problem.views()) == 9
