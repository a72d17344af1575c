"""lm/quantize.py: weights in few bits are near the weights, and compute as they say."""

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import random_model

from lm import lora
from lm.configurator import UserError
from lm.kernels import has_bfloat16
from lm.quantize import PackedLinear, QuantizedLinear, linear_layers, pack, quantize
from sampling import generate

SHAPE = dict(vocab_size=40, block_size=16, n_layer=2, n_head=2, n_embd=32, mask_id=38, ignore_id=39)


def some_tokens():
    return torch.randint(0, 38, (3, 16), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize('bits, error, size', [(8, 0.0085, 8.1), (4, 0.094, 4.3)])
def test_a_weight_in_few_bits_is_near_the_weight(bits, error, size):
    linear = nn.Linear(1000, 300)
    nn.init.normal_(linear.weight, std=0.02, generator=torch.Generator().manual_seed(0))
    layer = QuantizedLinear(linear, bits)
    found = (layer.weight - linear.weight).norm() / linear.weight.norm()
    assert error / 2 < found < error
    assert sum(x.numel() * x.element_size() for x in layer.buffers()) * 8 / linear.weight.numel() < size


@pytest.mark.parametrize('bits', [8, 4])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_codes_that_a_sharded_model_sees_as_floats_are_the_same_weight(bits, dtype):
    layer = QuantizedLinear(nn.Linear(64, 8), bits)
    before = layer.weight
    layer.codes = layer.codes.view(dtype)  # FSDP before PyTorch 2.12 shards no integers
    assert torch.equal(layer.weight, before)
    other = QuantizedLinear(nn.Linear(64, 8), bits)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.float().weight, before)


@pytest.mark.parametrize('bits', [8, 4])
def test_a_quantized_layer_computes_with_its_weight_both_ways(bits):
    linear = nn.Linear(37, 19)  # no multiple of a block
    layer, plain = QuantizedLinear(linear, bits), nn.Linear(37, 19)
    plain.load_state_dict({'weight': layer.weight, 'bias': linear.bias})
    x = torch.randn(5, 37, generator=torch.Generator().manual_seed(0))
    first, second = x.clone().requires_grad_(), x.clone().requires_grad_()
    layer(first).square().sum().backward()
    plain(second).square().sum().backward()
    torch.testing.assert_close(layer(x), plain(x))
    torch.testing.assert_close(first.grad, second.grad)
    assert [name for name, _ in layer.named_parameters()] == ['bias']


@pytest.mark.parametrize('bits', [8, 4])
@torch.no_grad()
def test_only_the_linear_layers_of_blocks_are_quantized(bits):
    shape = dict(SHAPE, norm='layer', position='learned', bias=True)
    model, plain = (random_model('ar', 0.3, **shape) for _ in range(2))
    quantize(model, bits)
    assert all(isinstance(layer, QuantizedLinear) for _, layer in linear_layers(model))
    assert len(linear_layers(model)) == len(linear_layers(plain)) == 12
    assert torch.equal(model.embedding.weight, plain.embedding.weight)
    difference = (model.logits(some_tokens()) - plain.logits(some_tokens()))[..., :38].abs()
    assert 0 < difference.mean() < (0.1 if bits == 8 else 1.0)


@pytest.mark.parametrize('bits', [8, 4])
@torch.no_grad()
def test_a_quantized_layer_drops_nothing_where_its_model_does_not(bits):
    model = random_model('ar', 0.3, **SHAPE).eval()
    quantize(model, bits)
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize('bits', [8, 4])
@torch.no_grad()
def test_merging_into_few_bits_gives_plain_layers(bits):
    model = random_model('ar', 0.3, **SHAPE)
    quantize(model, bits)
    lora.add_lora(model, rank=2, alpha=4)
    for _, layer in lora.adapted_layers(model):
        layer.lora_B.normal_(std=0.2, generator=torch.Generator().manual_seed(0))
    expected = model.logits(some_tokens())
    lora.merge(model)
    assert all(type(layer) is nn.Linear for _, layer in linear_layers(model))
    torch.testing.assert_close(model.logits(some_tokens()), expected, atol=1e-4, rtol=0)


# ---------------------------------------------------------------------------- weights to write with


def packed(architecture, weights, **shape):
    model = random_model(architecture, 0.3, **{**SHAPE, **shape})
    with torch.inference_mode():
        before = model.logits(some_tokens()[:1])
        pack(model, weights, torch.device('cpu'))
        return before, model.logits(some_tokens()[:1]), model


needs_fbgemm = pytest.mark.skipif(
    'fbgemm' not in torch.backends.quantized.supported_engines, reason='this processor has no FBGEMM'
)
needs_bfloat16 = pytest.mark.skipif(
    not has_bfloat16(torch.device('cpu')), reason='this processor does not multiply in bfloat16'
)
PACKED = [
    pytest.param('bfloat16', 1e-2, marks=needs_bfloat16),
    pytest.param('float16', 2e-3, marks=needs_fbgemm),
    pytest.param('int8', 0.1, marks=needs_fbgemm),
]


@pytest.mark.parametrize('architecture', ['ar', 'diffusion', 'sdd'])
@pytest.mark.parametrize('weights, gap', PACKED)
def test_packed_weights_write_nearly_the_same(architecture, weights, gap):
    before, after, model = packed(architecture, weights, bias=True, qkv_bias=True)
    assert model.num_parameters() > sum(p.numel() for p in model.parameters())
    finite = before.isfinite()
    assert 0 < (before - after)[finite].norm() < gap * before[finite].norm()
    assert torch.equal(finite, after.isfinite())
    rows = generate(model, [[1, 2]] * 2, 5, seed=1)
    assert all(len(row) == 7 for row in rows)


def test_weights_in_int8_on_another_device_are_counted():
    model = random_model('ar', 0.3, **SHAPE)
    before = model.num_parameters()
    pack(model, 'int8', torch.device('cuda'))
    assert model.num_parameters() == before


@needs_fbgemm
def test_a_tokens_int8_does_not_depend_on_the_tokens_beside_it():
    layer = torch.nn.Linear(32, 16)
    x = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    x[:, 0] = 10 * torch.tensor([1.0, -1.0, 1.0, -1.0])  # both signs in each scale
    x[0] *= 1000  # as massive activations of a first token
    packed_layer = PackedLinear(layer.weight, layer.bias, 'int8')
    error = (packed_layer(x) - layer(x)).norm(dim=1) / layer(x).norm(dim=1)
    assert (error < 0.1).all()


@needs_fbgemm
def test_the_likelihood_of_packed_weights_is_of_what_is_written():
    _, after, model = packed('ar', 'int8')
    with torch.inference_mode():
        nll = model.nll(some_tokens()[:1])
    expected = F.cross_entropy(after[0, :-1], some_tokens()[:1][0, 1:], reduction='sum')
    assert nll.item() == pytest.approx(expected.item(), rel=0.005)


@pytest.mark.parametrize('kind', ['int8', 'float16'])
def test_packed_weights_take_what_autocast_gives_them(kind):
    layer = torch.nn.Linear(16, 8)
    x = torch.randn(3, 16).bfloat16()
    y = PackedLinear(layer.weight, layer.bias, kind)(x)
    torch.testing.assert_close(y, layer(x.float()), atol=0.05, rtol=0.05)


def test_weights_of_another_kind_are_refused():
    with pytest.raises(UserError, match="weights is 'int2'; choose float32 or bfloat16 or float16 or int8"):
        packed('ar', 'int2')


def test_weights_in_bfloat16_are_refused_where_they_would_be_slow(monkeypatch):
    monkeypatch.setattr('lm.quantize.has_bfloat16', lambda device: False)
    with pytest.raises(UserError, match='does not compute with weights in bfloat16; take another of float32'):
        packed('ar', 'bfloat16')
