"""torch.export to the IR: every lowering against torch on small modules, at sizes other than the example's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from stemma.frontend.aten import LOWERINGS, TORCH_DTYPES, common
from stemma.frontend.torch_export import trace
from stemma.ir import Module, Tensor, UnsupportedError, WeightStore, dim, interpret, ops, parse_module, print_module, verify

BATCH, TOKENS = dim("batch"), dim("tokens", 1, 64)
WIDTH = 8


class Lambda(nn.Module):
    """A function of x [batch, tokens, 8] as a module."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> Any:
        return self.function(x)


def check(module: nn.Module, *shapes: tuple[int, ...], tolerance: float = 1e-6, dims: Any = None, example: Any = None) -> Module:
    """Trace, verify, print and parse, and compare with torch at each shape; f64 interpreter against torch in f64."""
    module = module.eval()
    example = torch.randn(3, 5, WIDTH) if example is None else example
    traced, store = trace(module, (example,), dims={"x": {0: BATCH, 1: TOKENS}} if dims is None else dims)
    verify(traced)
    assert parse_module(print_module(traced)) is traced
    for shape in shapes:
        x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        compare(traced, store, module, x, tolerance)
    return traced


def compare(traced: Module, store: WeightStore, module: nn.Module, x: torch.Tensor, tolerance: float) -> None:
    got = interpret(traced["forward"], [x.numpy()], store)
    with torch.no_grad():
        wanted = module(x)
    leaves = [wanted] if isinstance(wanted, torch.Tensor) else list(wanted)
    assert len(got) == len(leaves)
    for value, leaf in zip(got.values(), leaves, strict=True):
        assert value.shape == tuple(leaf.shape)
        if leaf.dtype in (torch.bool, torch.int64):
            assert np.array_equal(value, leaf.numpy())
        else:
            np.testing.assert_allclose(value, leaf.numpy(), rtol=tolerance, atol=tolerance)


def positions(x: torch.Tensor) -> torch.Tensor:
    return torch.arange(x.shape[1])


FUNCTIONS: dict[str, Callable[[torch.Tensor], Any]] = {
    "arithmetic": lambda x: (x + 1) * 2 - x / 3 + torch.add(x, x, alpha=2) - torch.rsub(x, 1, alpha=3),
    "unary": lambda x: x.exp() + x.sin() * x.cos() + x.tanh() + x.sigmoid() + torch.erf(x) - x.abs() + x.sign() + (-x),
    "roots": lambda x: (x * x + 1).sqrt() + (x * x + 1).rsqrt() + (x * x + 1).reciprocal() + (x * x + 1).log() + torch.log1p(x * x),
    "more unary": lambda x: torch.expm1(x) + torch.log2(x * x + 1) + torch.exp2(x) + torch.tan(x * 0.3) + torch.square(x),
    "rounding": lambda x: (x * 3).floor() + (x * 3).ceil() + (x * 3).round() + (x * 3).trunc(),
    "powers": lambda x: x**2 + x**3 + x**4 + (x.abs() + 1) ** 1.7 + (x.abs() + 1) ** -0.5 + 2.0**x + (x.abs() + 1) ** x + x**1,
    "activations": lambda x: F.silu(x) + F.gelu(x) + F.gelu(x, approximate="tanh") + F.relu(x) + F.leaky_relu(x) + F.elu(x),
    "more activations": lambda x: F.softplus(x) + F.mish(x) + F.hardswish(x) + F.hardtanh(x) + F.logsigmoid(x) + F.relu6(x),
    "clamp": lambda x: x.clamp(-0.5, 0.5) + x.clamp(min=0.1) + x.clamp_max(0.3) + torch.maximum(x, -x) + torch.minimum(x, x * 2),
    "comparisons": lambda x: ((x > 0) & (x <= 1)) | ~(x < 0.5) ^ (x != 0),
    "where": lambda x: torch.where(x > 0, x, -1.0).masked_fill(x > 1, 7.0) + torch.where(x > 0, 1.0, 0.0),
    "integers": lambda x: (positions(x) // 3) * 2 + positions(x) % 4 - torch.div(positions(x) - 4, 3, rounding_mode="trunc"),
    "int to float": lambda x: positions(x) / 3 + positions(x) * 0.5 + x[..., 0],
    "bool arithmetic": lambda x: (x > 0).sum(-1) + (x > 0).float().mean(-1) + (x > 0).cumsum(-1)[..., -1],
    "remainder": lambda x: torch.remainder(x, 0.7) + torch.fmod(x, 0.7) + x.floor_divide(0.3),
    "reductions": lambda x: x.sum(-1) + x.mean(-1) + x.amax(-1) + x.amin(-1) + x.var(-1) + x.std(-1, correction=0) + x.norm(dim=-1),
    "reductions of all": lambda x: x.sum() + x.mean() + x.max() - x.min() + x.mean((0, 1)),
    "any and all": lambda x: [(x > 1).any(-1), (x > -9).all(), x.argmax(-1), x.argmin(1), *x.max(2), *x.min(-1, keepdim=True)],
    "scatter": lambda x: x.scatter(2, x.topk(2)[1], 7.0) + x.scatter(2, x.topk(3)[1], x[..., :3]),
    "topk": lambda x: [*x.topk(3), *x.topk(1, dim=1, largest=False)],
    "cumsum": lambda x: x.cumsum(1) + x.cumsum(-1),
    "softmax": lambda x: F.softmax(x, -1) + F.log_softmax(x, 1) + torch.softmax(x, 0, dtype=torch.float32),
    "glu": lambda x: F.glu(x),
    "views": lambda x: x.view(x.shape[0], -1, 2, 4).transpose(1, 2).reshape(x.shape[0], 2, -1).permute(2, 0, 1).flatten(1),
    "slices": lambda x: x[:, :1] + x[:, -1:] + x[..., 1:5:2].sum() + x[:, 0, None] + x.select(-1, -2)[..., None],
    "splits": lambda x: sum(x.chunk(2, -1)) + torch.split(x, [1, 3, 4], -1)[2] + torch.stack(x.unbind(-1)[:4], -1),
    "even splits": lambda x: torch.split(x, 4, 2)[0] + torch.split(x, 4, -1)[1],
    "joins": lambda x: torch.cat([x, x * 2, torch.zeros(0)], 1).sum(1) + torch.stack([x, x]).sum((0, 2)),
    "expand": lambda x: x[:, None].expand(-1, 3, -1, -1).sum(1) + x.repeat(1, 1, 2)[..., :8] + x.repeat_interleave(2, 1)[:, ::2],
    "flip and roll": lambda x: x.flip(1) + x.flip(-1) + x.roll(3, -1) + x.roll(-1, 2),
    "pad": lambda x: F.pad(x, (1, 2)).sum(-1) + F.pad(x, (0, 0, 1, 0), value=3.0)[:, 1:, 0] + F.pad(x, (-1, -1)).sum(-1),
    "creation": lambda x: created(x),
    "triangles": lambda x: torch.ones(x.shape[1], x.shape[1]).tril(1).triu(-1) @ x,
    "causal mask": lambda x: torch.where(positions(x)[:, None] >= positions(x)[None], 0.0, float("-inf")).softmax(-1) @ x,
    "gather": lambda x: x.gather(2, (positions(x)[None, :, None] % 8).expand(x.shape[0], -1, 2)),
    "index_select": lambda x: x.index_select(2, torch.tensor([1, 5])),
    "indexing": lambda x: x[:, :, torch.tensor([0, -1])] + x[torch.arange(x.shape[0])[:, None], positions(x)[None]][..., :2],
    "separate indices": lambda x: x[torch.zeros(2, dtype=torch.long), :, torch.tensor([3, 4])],
    "one hot": lambda x: F.one_hot(positions(x) % 3, 3) + x[..., :3],
    "einsum": lambda x: torch.einsum("btd,bsd->bts", x, x) + torch.einsum("btd,de->bte", x, torch.ones(8, 1)),
    "products": lambda x: x @ x.mT @ x + (x @ torch.ones(8))[..., None],
    "batched products": lambda x: torch.bmm(x, squares(x)) + torch.baddbmm(x, x, squares(x)),
    "addmm": lambda x: torch.addmm(x[0], x[0], torch.ones(8, 8)) + torch.addmm(torch.ones(8), x[0], torch.ones(8, 8)),
    "normalize": lambda x: F.normalize(x, dim=-1) + F.cosine_similarity(x, x * x + 1, dim=-1)[..., None],
    "norms": lambda x: F.layer_norm(x, (8,)) + F.rms_norm(x, (8,)) + F.layer_norm(x.view(*x.shape[:2], 2, 4), (2, 4)).flatten(2),
    "attention": lambda x: F.scaled_dot_product_attention(x[:, None], x[:, None] * 0.5, x[:, None], is_causal=True)[:, 0],
    "grouped attention": lambda x: grouped(x),
    "masked attention": lambda x: F.scaled_dot_product_attention(x, x, x, attn_mask=positions(x)[:, None] >= positions(x)),
    "short causal attention": lambda x: F.scaled_dot_product_attention(x[:, None, :1], x[:, None], x[:, None], is_causal=True),
    "in place": lambda x: x.clone().mul_(2).add_(1),
    "slice assignment": lambda x: assign(x),
    "dtypes": lambda x: x.to(torch.float64).to(torch.float32) + x.to(torch.int64) + (x > 0).to(x) + x.type_as(x),
    "meshgrid": lambda x: sum(torch.meshgrid(positions(x), torch.arange(8), indexing="ij")) + x,
    "isnan": lambda x: torch.isnan(x) | torch.isinf(x / 0) | torch.logical_not(x),
    "symbolic mean": lambda x: x.mean(1) + x.sum(1) / x.shape[1] + x.shape[1] * 2,
    "inside no_grad": lambda x: no_grad(x),
    "outputs": lambda x: (x + 1, x * 2),
}  # fmt: skip


def created(x: torch.Tensor) -> torch.Tensor:
    y = torch.ones_like(x) + torch.full((8,), 2.0) + torch.zeros(x.shape[1], 8) + torch.eye(8)[0] + x.new_full((1,), 4.0)
    return y + torch.arange(2, 18, 2) + torch.arange(8.0) + torch.empty_like(x).fill_(3)


def squares(x: torch.Tensor) -> torch.Tensor:
    return torch.ones(8, 8).expand(x.shape[0], 8, 8)


def grouped(x: torch.Tensor) -> torch.Tensor:
    q = x.view(x.shape[0], -1, 4, 2).transpose(1, 2)
    kv = x[..., :4].reshape(x.shape[0], -1, 2, 2).transpose(1, 2)
    return F.scaled_dot_product_attention(q, kv, kv, enable_gqa=True)


def assign(x: torch.Tensor) -> torch.Tensor:
    y = x.clone()
    y[:, :, 2:4] = 5.0
    y[..., 0] = x[..., 1]
    return y


def no_grad(x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        y = x.float() * 2
    return y + 1


@pytest.mark.parametrize("name", FUNCTIONS)
def test_operators_equal_torch_at_other_sizes(name: str) -> None:
    torch.manual_seed(0)
    check(Lambda(FUNCTIONS[name]), (1, 1, WIDTH), (2, 9, WIDTH), tolerance=2e-5)


class Net(nn.Module):
    """A convolutional network with everything that inference folds."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3, stride=2, padding=1, groups=2)
        self.norm = nn.BatchNorm2d(8)
        self.down = nn.Conv2d(8, 4, 1, bias=False)
        self.group = nn.GroupNorm(2, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu_(self.norm(self.conv(x)))
        y = self.group(self.down(F.max_pool2d(y, 3, 2, 1))) + F.avg_pool2d(self.down(y), 2)
        result: torch.Tensor = self.head(F.dropout(F.adaptive_avg_pool2d(y, 1).flatten(1), 0.5, self.training))
        return result


class Flat(nn.Module):
    """Sequences of features through one-dimensional convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(8, 6, 3, padding=2, dilation=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pooled = F.adaptive_avg_pool1d(F.avg_pool1d(self.conv(x.mT), 2), 1)[..., 0]
        return pooled * F.max_pool1d(x.mT, 2).sum((1, 2), keepdim=True)[0]


def test_convolutional_network() -> None:
    torch.manual_seed(0)
    net = Net()
    net.norm.running_mean = torch.randn(8)
    net.norm.running_var = torch.rand(8) + 0.5
    example = torch.randn(3, 4, 16, 16)
    traced = check(net, (1, 4, 16, 16), (5, 4, 16, 16), dims={"x": {0: BATCH}}, example=example, tolerance=1e-5)
    assert traced["forward"].result_names == ("output",)
    check(Flat(), (2, 8, 8), (1, 8, 8), dims={"x": {0: BATCH}}, example=torch.randn(3, 8, 8), tolerance=1e-5)


class Mlp(nn.Module):
    """Embedding, norm, gated layers and a tied head; the parameters' dtype is a choice."""

    scale: torch.Tensor
    table: torch.Tensor

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.rms = nn.RMSNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 12), nn.Linear(12, WIDTH, bias=False)
        self.head = nn.Linear(WIDTH, 11, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("scale", torch.tensor(1.5))
        self.register_buffer("table", torch.arange(6.0))
        self.to(dtype)

    def forward(self, ids: torch.Tensor, extra: torch.Tensor | None = None) -> dict[str, Any]:
        h = self.norm(self.embed(ids)) * self.scale
        h = h + self.down(F.silu(self.up(self.rms(h))))
        return {"logits": self.head(h), "inner": {"hidden": h + self.table.sum().to(h.dtype)}}


@pytest.mark.quick
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
def test_modules_with_weights_keep_names_types_and_ties(stored: torch.dtype) -> None:
    torch.manual_seed(0)
    model = Mlp(stored).eval()
    ids = torch.randint(0, 11, (2, 4))
    module, store = trace(model, (ids,), dims={"ids": {0: BATCH, 1: TOKENS}}, properties={"kind": "model"})
    verify(module)
    assert parse_module(print_module(module)) is module
    assert model.embed.weight.dtype == stored, "the user's module is not changed"
    forward = module["forward"]
    assert [p.attrs["name"] for p in forward.params] == ["ids"]
    assert forward.result_names == ("logits", "inner_hidden")
    assert set(store) == {"embed.weight", "norm.weight", "norm.bias", "rms.weight", "up.weight", "up.bias", "down.weight", "table"}
    name = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}[stored]
    assert store.type("up.weight").dtype == name
    linear = next(n for n in forward.nodes if n.op.name == "linear")
    assert linear.inputs[1].op.name == ("weight" if stored is torch.float32 else "cast")
    got = interpret(forward, [ids[:1, :3].numpy()], store)
    with torch.no_grad():
        wanted = model.float()(ids[:1, :3])
    np.testing.assert_allclose(got["logits"], wanted["logits"], atol=1e-5)
    np.testing.assert_allclose(got["inner_hidden"], wanted["inner"]["hidden"], atol=1e-5)


@pytest.mark.quick
def test_nodes_carry_the_users_source_line() -> None:
    module, _ = trace(Mlp().eval(), (torch.zeros(2, 4, dtype=torch.long),))
    linear = next(n for n in module["forward"].nodes if n.op.name == "linear")
    assert linear.origin.line.startswith("test_frontend.py:") and "self.up(self.rms(h))" in linear.origin.line


def test_all_unsupported_operators_are_named_once_with_their_lines() -> None:
    class Bad(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = torch.sort(x, -1)[0] + torch.sort(x * 2, -1)[0]
            y = y + torch.linalg.inv(x.mT @ x + torch.eye(WIDTH)).sum()
            z: torch.Tensor = y + x[..., :2].round(decimals=1).sum()
            return z

    with pytest.raises(UnsupportedError) as error:
        trace(Bad(), (torch.randn(3, 5, WIDTH),), dims={"x": {0: BATCH}})
    text = str(error.value)
    assert text.count("aten.sort.default") == 1 and "2 times" in text
    assert "aten.linalg_inv_ex" in text and "aten.round.decimals" in text
    assert "test_frontend.py:" in text and "torch.sort(x, -1)" in text and "\n" not in text


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda x: x[x > 0], "mask"),
        (lambda x: x * 2 if x.sum() > 0 else x, "torch.export could not trace"),
        (lambda x: F.interpolate(x, 7, mode="area"), "aten."),
        (lambda x: F.dropout(x, 0.5, True), "training mode"),
    ],
    ids=["mask", "branch", "pool", "dropout"],
)
def test_refusals_say_why(function: Callable[..., Any], words: str) -> None:
    with pytest.raises(UnsupportedError, match=words):
        trace(Lambda(function), (torch.randn(5, 5, WIDTH),), dims={"x": {0: BATCH, 1: TOKENS}})


def test_state_that_changes_is_refused() -> None:
    class Counter(nn.Module):
        count: torch.Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.zeros(1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.count.add_(1)
            return x + self.count

    with pytest.raises(UnsupportedError, match="count.* in place"):
        trace(Counter(), (torch.randn(3, 2),))


def test_wrong_names_and_fixed_sizes_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="no argument 'y'"):
        trace(Lambda(lambda x: x), (torch.randn(3, 2),), dims={"y": {0: BATCH}})
    with pytest.raises(UnsupportedError, match="sizes must not be tied"):
        trace(Lambda(lambda x: x.reshape(6)), (torch.randn(3, 2),), dims={"x": {0: BATCH}})


@pytest.mark.quick
def test_promotion_follows_torch() -> None:
    dtypes = {torch_name: name for name, torch_name in TORCH_DTYPES.items() if torch_name not in ("f16", "bf16")}
    for left, torch_left in dtypes.items():
        for right, torch_right in dtypes.items():
            for a_shape, b_shape in (((2,), (2,)), ((2,), ()), ((), (2,)), ((), ())):
                a, b = torch.zeros(a_shape, dtype=torch_left), torch.zeros(b_shape, dtype=torch_right)
                x = ops.param(name="x", type=Tensor(left, a_shape))
                y = ops.param(name="y", type=Tensor(right, b_shape))
                assert dtypes[common(x, y)] == torch.result_type(a, b)
            for number in (True, 2, 2.5):
                assert dtypes[common(ops.param(name="x", type=Tensor(left, (2,))), number)] == torch.result_type(
                    torch.zeros(2, dtype=torch_left), number
                )


def test_the_table_names_operators_that_torch_has() -> None:
    for name in LOWERINGS:
        _, packet, overload = name.split(".")
        assert hasattr(getattr(torch.ops.aten, packet), overload), name
