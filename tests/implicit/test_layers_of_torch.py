"""Every common layer and loss of torch.nn: products with H are differences of the gradient."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune
from torch.nn.utils.rnn import pack_padded_sequence

from ift_tune import DoubleBackwardError, safe_kernels
from ift_tune.implicit.curvature import Hessian
from ift_tune.implicit.hidden_curvature import refuse_hidden_curvature, refuse_power_iteration
from ift_tune.implicit.vectors import Tensors, fill_missing, flatten, randn_like, relative_error

Run = Callable[[Any, Tensor], Any]


class Case(NamedTuple):
    """A module, the shape of its inputs, how it is called, and the words of its refusal."""

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    run: Run = lambda module, x: module(x)
    refused: str = ""


CASES: dict[str, Case] = {}
_norm: Any


def case(
    name: str, build: Callable[..., nn.Module], *shape: int, run: Run | None = None, no: str = ""
) -> None:
    CASES[name] = Case(build, shape, run or Case._field_defaults["run"], no)


def made(function: Callable[..., Any], layer: Callable[[], nn.Module], *a: Any, **k: Any) -> Any:
    return lambda: function(layer(), *a, **k)


def _linear() -> nn.Module:
    return nn.Linear(4, 3)


# --- activations -------------------------------------------------------------------------------
for _name in (
    *("CELU", "ELU", "GELU", "Hardshrink", "Hardsigmoid", "Hardswish", "Hardtanh", "Identity"),
    *("LeakyReLU", "LogSigmoid", "Mish", "PReLU", "RReLU", "ReLU", "ReLU6", "SELU", "SiLU"),
    *("Sigmoid", "Softplus", "Softshrink", "Softsign", "Tanh", "Tanhshrink", "GLU"),
    *("Dropout", "AlphaDropout", "FeatureAlphaDropout", "Flatten"),
):
    case(_name, getattr(nn, _name), 3, 4)
for _name in ("Softmax", "Softmin", "LogSoftmax"):
    case(_name, partial(getattr(nn, _name), dim=1), 3, 4)
case("GELU, tanh", partial(nn.GELU, "tanh"), 3, 4)
case("Hardsigmoid, in place", partial(nn.Hardsigmoid, inplace=True), 3, 4)
case("Threshold", partial(nn.Threshold, 0.1, 0.0), 3, 4)
case("Softmax2d", nn.Softmax2d, 2, 3, 2, 2)


# --- convolutions, pools, pads, norms ----------------------------------------------------------
def _unpool(d: int, module: Any, x: Tensor) -> Any:
    return module(*getattr(F, f"max_pool{d}d")(x, 2, return_indices=True))


for _d in (1, 2, 3):
    _shape = (2, 4, *[4] * _d)
    for _name in ("BatchNorm", "InstanceNorm"):
        case(f"{_name}{_d}d", partial(getattr(nn, f"{_name}{_d}d"), 4, affine=True), *_shape)
    for _name in ("Conv", "ConvTranspose"):
        _layer = getattr(nn, f"{_name}{_d}d")
        case(f"{_name}{_d}d", partial(_layer, 4, 3, 2, stride=2, padding=1), *_shape)
    _layer = partial(getattr(nn, f"Conv{_d}d"), 4, 4, 3, groups=2, padding_mode="circular")
    case(f"Conv{_d}d, circular groups", partial(_layer, padding="same"), *_shape)
    for _name in ("MaxPool", "AvgPool", "AdaptiveMaxPool", "AdaptiveAvgPool"):
        case(f"{_name}{_d}d", partial(getattr(nn, f"{_name}{_d}d"), 2), *_shape)
    case(f"LPPool{_d}d", partial(getattr(nn, f"LPPool{_d}d"), 2.0, 2), *_shape)
    case(
        f"MaxUnpool{_d}d",
        partial(getattr(nn, f"MaxUnpool{_d}d"), 2),
        *_shape,
        run=partial(_unpool, _d),
    )
    for _name in ("Zero", "Reflection", "Replication", "Circular"):
        case(f"{_name}Pad{_d}d", partial(getattr(nn, f"{_name}Pad{_d}d"), 1), *_shape)
    case(f"ConstantPad{_d}d", partial(getattr(nn, f"ConstantPad{_d}d"), 1, 0.5), *_shape)
    case(f"Dropout{_d}d", getattr(nn, f"Dropout{_d}d"), *_shape)
case("BatchNorm1d, evaluated", lambda: nn.BatchNorm1d(4).eval(), 2, 4, 4)
case("FractionalMaxPool2d", partial(nn.FractionalMaxPool2d, 2, output_size=2), 2, 4, 4, 4)
case("FractionalMaxPool3d", partial(nn.FractionalMaxPool3d, 2, output_size=2), 2, 4, 4, 4, 4)
case("LayerNorm", partial(nn.LayerNorm, 4), 3, 4)
case("RMSNorm", partial(nn.RMSNorm, 4), 3, 4)
case("GroupNorm", partial(nn.GroupNorm, 2, 4), 2, 4, 3)
case("LocalResponseNorm", partial(nn.LocalResponseNorm, 2), 2, 4, 3)
case("Linear", _linear, 3, 4)
case("Bilinear", partial(nn.Bilinear, 4, 4, 3), 3, 4, run=lambda m, x: m(x, x.flip(0)))
case("Unflatten", partial(nn.Unflatten, 1, (2, 2)), 3, 4)
case("Fold", partial(nn.Fold, (3, 3), 2), 2, 4, 4)
case("Unfold", partial(nn.Unfold, 2), 2, 2, 3, 3)
case("PixelShuffle", partial(nn.PixelShuffle, 2), 2, 4, 2, 2)
case("PixelUnshuffle", partial(nn.PixelUnshuffle, 2), 2, 1, 2, 2)
case("ChannelShuffle", partial(nn.ChannelShuffle, 2), 2, 4, 2, 2)
for _mode, _d in (
    *(("nearest", 1), ("linear", 1), ("nearest", 2), ("bilinear", 2), ("bicubic", 2)),
    *(("area", 2), ("nearest-exact", 2), ("nearest", 3), ("trilinear", 3)),
):
    _layer = partial(nn.Upsample, scale_factor=2, mode=_mode)
    case(f"Upsample, {_mode} {_d}d", _layer, 2, 2, *[3] * _d)


# --- distances, embeddings, sampling -----------------------------------------------------------
def _with_flipped(module: Any, x: Tensor) -> Any:
    return module(x, 2.0 * x.flip(0) + 0.3)


class _Calls(nn.Module):
    """A function as a module without weights."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(*inputs)


def _sampled(mode: str, x: Tensor) -> Tensor:
    grid = F.interpolate(x[:, :2], size=(2, 2)).permute(0, 2, 3, 1).tanh()
    return F.grid_sample(x, grid, mode=mode, align_corners=False)


IDS = torch.tensor([[0, 1, 2], [3, 0, 2]])
case("CosineSimilarity", nn.CosineSimilarity, 3, 4, run=_with_flipped)
case("PairwiseDistance", nn.PairwiseDistance, 3, 4, run=_with_flipped)
case("cdist", lambda: _Calls(torch.cdist), 3, 4, run=_with_flipped)
case("cdist, p = 1", lambda: _Calls(partial(torch.cdist, p=1.0)), 3, 4, run=_with_flipped)
case("pdist", lambda: _Calls(torch.pdist), 3, 4)
case("Embedding", partial(nn.Embedding, 4, 3), 1, run=lambda m, _: m(IDS))
case("Embedding, sparse", partial(nn.Embedding, 4, 3, sparse=True), 1, run=lambda m, _: m(IDS))
for _key in ("max_norm", "scale_grad_by_freq"):
    _options: Any = {_key: 1}
    case(
        f"Embedding, {_key}",
        partial(nn.Embedding, 4, 3, **_options),
        1,
        run=lambda m, _: m(IDS),
        no=_key,
    )
for _mode in ("sum", "mean", "max"):
    _no = "mode='max'" if _mode == "max" else ""
    _layer = partial(nn.EmbeddingBag, 4, 3, mode=_mode)
    case(f"EmbeddingBag, {_mode}", _layer, 1, run=lambda m, _: m(IDS), no=_no)
for _mode in ("bilinear", "nearest", "bicubic"):
    case(f"grid_sample, {_mode}", lambda m=_mode: _Calls(partial(_sampled, m)), 2, 3, 4, 4)
case(
    "affine_grid",
    lambda: _Calls(partial(F.affine_grid, size=[2, 1, 3, 3], align_corners=False)),
    2,
    2,
    3,
)

# --- recurrent layers and attention ------------------------------------------------------------
for _name in ("RNN", "LSTM", "GRU"):
    _layer = partial(getattr(nn, _name), 4, 3, 2, batch_first=True, bidirectional=True)
    case(_name, _layer, 2, 3, 4, run=lambda m, x: m(x)[0])
    case(f"{_name}Cell", partial(getattr(nn, f"{_name}Cell"), 4, 3), 2, 4)
case("RNN, relu", partial(nn.RNN, 4, 3, nonlinearity="relu"), 2, 3, 4)
case("LSTM, projected", partial(nn.LSTM, 4, 3, proj_size=2), 2, 3, 4)
case(
    "LSTM, packed",
    partial(nn.LSTM, 4, 3),
    *(3, 2, 4),
    run=lambda m, x: m(pack_padded_sequence(x, [3, 2]))[0].data,
)
_attention = partial(nn.MultiheadAttention, 4, 2, batch_first=True)
case("MultiheadAttention", _attention, 2, 3, 4, run=lambda m, x: m(x, x, x))
for _mode in ("trained", "evaluated"):
    case(
        f"MultiheadAttention, fused, {_mode}",
        lambda m=_mode: _attention().train(m == "trained"),
        *(2, 3, 4),
        run=lambda m, x: m(x, x, x, need_weights=False),
    )
_encoder = partial(nn.TransformerEncoderLayer, 4, 2, 8, batch_first=True)
_decoder = partial(nn.TransformerDecoderLayer, 4, 2, 8, batch_first=True)
case("TransformerEncoderLayer", _encoder, 2, 3, 4)
case("TransformerEncoderLayer, evaluated", lambda: _encoder().eval(), 2, 3, 4)
case("TransformerDecoderLayer", _decoder, 2, 3, 4, run=lambda m, x: m(x, x))
case("TransformerEncoder", lambda: nn.TransformerEncoder(_encoder(activation="gelu"), 1), 2, 3, 4)
case(
    "TransformerDecoder",
    lambda: nn.TransformerDecoder(_decoder(), 1),
    2,
    3,
    4,
    run=lambda m, x: m(x, x),
)
case("Transformer", partial(nn.Transformer, 4, 2, 1, 1, 8), 2, 3, 4, run=lambda m, x: m(x, x))

# --- parametrisations --------------------------------------------------------------------------
for _form, _norm in (("old", nn.utils.weight_norm), ("new", parametrizations.weight_norm)):
    for _dim in (0, 1, None):
        case(f"weight_norm, {_form}, dim={_dim}", made(_norm, _linear, dim=_dim), 3, 4)
    case(f"weight_norm, {_form}, Conv1d", made(_norm, partial(nn.Conv1d, 4, 3, 2)), 2, 4, 4)
for _form, _norm in (("old", nn.utils.spectral_norm), ("new", parametrizations.spectral_norm)):
    case(f"spectral_norm, {_form}", made(_norm, _linear), 3, 4, no="spectral_norm")
    case(f"spectral_norm, {_form}, held", lambda n=_norm: n(_linear()).eval(), 3, 4)
for _name in ("matrix_exp", "cayley"):
    case(
        f"orthogonal, {_name}",
        made(parametrizations.orthogonal, _linear, orthogonal_map=_name),
        3,
        4,
    )
case("pruned", made(prune.l1_unstructured, _linear, "weight", 3), 3, 4)
case("pruned, rows", made(prune.ln_structured, _linear, "weight", 1, 2, 0), 3, 4)

# --- losses ------------------------------------------------------------------------------------
CLASSES = torch.tensor([0, 2, 1])
REAL = torch.linspace(-1.3, 1.1, 12, dtype=torch.float64).reshape(3, 4).cos() - 0.4
SHARES = REAL.softmax(dim=1)
SIGNS = torch.tensor([1.0, -1.0, 1.0], dtype=torch.float64)
WEIGHT = torch.tensor([0.5, 1.0, 2.0, 0.3], dtype=torch.float64)
LABELS = torch.tensor([[0, 2, -1, 1]] * 3)
PHRASES = torch.tensor([[1, 2], [2, 1]])
case("CrossEntropyLoss", nn.CrossEntropyLoss, 3, 4, run=lambda m, x: m(x, CLASSES))
case(
    "CrossEntropyLoss, soft",
    partial(nn.CrossEntropyLoss, label_smoothing=0.1),
    3,
    4,
    run=lambda m, x: m(x, SHARES),
)
case(
    "CrossEntropyLoss, weighted",
    partial(nn.CrossEntropyLoss, weight=WEIGHT, ignore_index=2),
    3,
    4,
    run=lambda m, x: m(x, CLASSES),
)
for _name in ("MSELoss", "L1Loss", "SmoothL1Loss", "HuberLoss"):
    case(_name, getattr(nn, _name), 3, 4, run=lambda m, x: m(x, REAL))
for _name in ("SoftMarginLoss", "HingeEmbeddingLoss"):
    case(_name, getattr(nn, _name), 3, 4, run=lambda m, x: m(x, REAL.sign()))
case("NLLLoss", nn.NLLLoss, 3, 4, run=lambda m, x: m(x.log_softmax(1), CLASSES))
case(
    "PoissonNLLLoss",
    partial(nn.PoissonNLLLoss, full=True),
    3,
    4,
    run=lambda m, x: m(x, 9.0 * SHARES),
)
case("GaussianNLLLoss", nn.GaussianNLLLoss, 3, 4, run=lambda m, x: m(x, REAL, x.exp()))
case(
    "KLDivLoss",
    partial(nn.KLDivLoss, reduction="batchmean"),
    3,
    4,
    run=lambda m, x: m(x.log_softmax(1), SHARES),
)
case("BCELoss", nn.BCELoss, 3, 4, run=lambda m, x: m(x.sigmoid(), SHARES))
case(
    "BCEWithLogitsLoss",
    partial(nn.BCEWithLogitsLoss, pos_weight=WEIGHT),
    3,
    4,
    run=lambda m, x: m(x, SHARES),
)
case(
    "MultiLabelSoftMarginLoss",
    nn.MultiLabelSoftMarginLoss,
    3,
    4,
    run=lambda m, x: m(x, SHARES.round()),
)
case("MultiMarginLoss", nn.MultiMarginLoss, 3, 4, run=lambda m, x: m(x, CLASSES))
case(
    "MultiMarginLoss, squared",
    partial(nn.MultiMarginLoss, p=2, weight=WEIGHT, reduction="sum"),
    3,
    4,
    run=lambda m, x: m(x, CLASSES),
)
case("MarginRankingLoss", nn.MarginRankingLoss, 3, 4, run=lambda m, x: m(x[:, 0], x[:, 1], SIGNS))
case(
    "CosineEmbeddingLoss",
    nn.CosineEmbeddingLoss,
    3,
    4,
    run=lambda m, x: m(x, 2.0 * x.flip(0) + REAL, SIGNS),
)
for _name in ("TripletMarginLoss", "TripletMarginWithDistanceLoss"):
    case(_name, getattr(nn, _name), 3, 4, run=lambda m, x: m(x, x.flip(0) + REAL, REAL))
case(
    "AdaptiveLogSoftmaxWithLoss",
    partial(nn.AdaptiveLogSoftmaxWithLoss, 4, 6, [2, 4]),
    3,
    4,
    run=lambda m, x: m(x, CLASSES),
)
# Dynamic programming and ranks of labels: no primitive operation says the same in a few lines.
case(
    "MultiLabelMarginLoss",
    nn.MultiLabelMarginLoss,
    3,
    4,
    run=lambda m, x: m(x, LABELS),
    no="multilabel_margin_loss",
)
case(
    "CTCLoss",
    nn.CTCLoss,
    5,
    2,
    3,
    run=lambda m, x: m(x.log_softmax(2), PHRASES, (5, 4), (2, 2)),
    no="ctc_loss",
)


def test_the_walk_is_long_and_few_are_refused() -> None:
    refused = [name for name, c in CASES.items() if c.refused]
    assert len(CASES) >= 170
    assert len(refused) <= 8


@pytest.mark.parametrize("name", CASES)
def test_products_are_differences_of_the_gradient(name: str) -> None:
    c = CASES[name]
    torch.manual_seed(0)
    with warnings.catch_warnings():
        # Old forms, and transformers that will not be quick; these are what is tested.
        warnings.simplefilter("ignore")
        module = c.build().double()
    inputs = torch.randn(c.shape, dtype=torch.float64)
    scales = nn.Parameter(1.0 + 0.3 * torch.randn_like(inputs))  # what lies before the module
    weights: list[Tensor] = [scales, *(p for p in module.parameters() if p.requires_grad)]
    buffers = {n: b.clone() for n, b in module.named_buffers()}

    def loss() -> Tensor:
        module.load_state_dict(buffers, strict=False)
        torch.manual_seed(1)
        found = c.run(module, inputs * scales)
        outputs = found if isinstance(found, Tensor) else found[0]
        shifts = torch.linspace(-1.0, 1.0, outputs.numel(), dtype=torch.float64)
        return 0.5 * (outputs.reshape(-1) + shifts).square().sum()

    def gradient() -> list[Tensor]:
        found = torch.autograd.grad(loss(), weights, allow_unused=True)
        return [g.to_dense() for g in fill_missing(found, weights)]

    def product(vector: Tensors) -> list[Tensor]:
        with safe_kernels(module):
            refuse_power_iteration(module)
            value = loss()
            refuse_hidden_curvature(value)
            slope = torch.autograd.grad(value, weights, create_graph=True, allow_unused=True)
        return Hessian(slope, weights).matvec(vector)

    vector = randn_like(weights, seed=2)
    if c.refused:
        with pytest.raises(DoubleBackwardError, match=c.refused):
            product(vector)
        return
    found = product(vector)
    ends = []
    for step in (1e-6, -2e-6):  # central, and the kernels of plain training
        with torch.no_grad():
            torch._foreach_add_(weights, vector, alpha=step)
        ends.append(gradient())
    truth = [(ahead - behind) / 2e-6 for ahead, behind in zip(*ends, strict=True)]
    assert float(flatten(truth).norm()) > 1e-3
    assert relative_error(found, truth) < 1e-5
