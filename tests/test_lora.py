"""lora.py against peft, and the promises of few trained weights."""

import json
import re

import pytest
import torch
import torch.nn as nn
from conftest import random_model

import hf
from lm import checkpoints, lora
from lm.configurator import UserError

transformers = pytest.importorskip(
    'transformers', reason='transformers is not installed: make test installs it'
)
peft = pytest.importorskip('peft', reason='peft is not installed: make test installs it')

from test_hf import VOCAB, make, ours, some_tokens  # noqa: E402  (skips without transformers, as this file does)

TARGETS = {
    'gpt2': ['c_attn', 'attn.c_proj', 'mlp.c_proj'],
    'llama': ['q_proj', 'v_proj', 'down_proj'],
    'opt': ['k_proj', 'out_proj', 'fc1'],
    'qwen3': ['o_proj', 'gate_proj'],
}


def randomise(module):
    """Every adapter weight random, so that an adapter changes what the model says."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, weight in module.named_parameters():
            if 'lora_' in name:
                weight.copy_(0.2 * torch.randn(weight.shape, generator=generator))
            if 'magnitude' in name:
                weight.mul_(1 + 0.2 * torch.rand(weight.shape, generator=generator))


def native(architecture='ar', **changes):
    return random_model(
        architecture,
        0.3,
        **{
            **dict(vocab_size=40, block_size=16, n_layer=2, n_head=2, n_embd=32, mask_id=38, ignore_id=39),
            **changes,
        },
    )


def tokens_for(model):
    return torch.randint(0, 38, (3, 16), generator=torch.Generator().manual_seed(1))


# ---------------------------------------------------------------------------- beside peft


@pytest.mark.parametrize('dora', [False, True], ids=['lora', 'dora'])
@pytest.mark.parametrize('name', TARGETS)
@torch.no_grad()
def test_an_adapter_of_peft_says_the_same_here(name, dora, tmp_path):
    base = make(name, tmp_path / 'base')
    plain = base(some_tokens()).logits
    theirs = peft.get_peft_model(
        base,
        peft.LoraConfig(
            r=3, lora_alpha=5, target_modules=TARGETS[name], use_dora=dora, fan_in_fan_out=name == 'gpt2'
        ),
    ).eval()
    randomise(theirs)
    expected = theirs(some_tokens()).logits
    theirs.save_pretrained(tmp_path / 'adapter')
    model = ours(tmp_path / 'base')
    lora.load_adapter(model, tmp_path / 'adapter')
    torch.testing.assert_close(model.logits(some_tokens())[..., :VOCAB], expected, atol=1e-4, rtol=0)
    assert (expected - plain).abs().max() > 1e-2
    lora.merge(model)
    assert not lora.adapted_layers(model)
    torch.testing.assert_close(model.logits(some_tokens())[..., :VOCAB], expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize('dora', [False, True], ids=['lora', 'dora'])
@pytest.mark.parametrize(
    'name, targets',
    [
        ('gpt2', ('q', 'v', 'out', 'up')),
        ('gpt2', lora.TARGETS),
        ('llama', lora.TARGETS),
        ('opt', ('q_proj', 'fc2')),
        ('qwen3', ('all-linear',)),
    ],
)
@torch.no_grad()
def test_an_adapter_of_ours_says_the_same_in_peft(name, targets, dora, tmp_path):
    base, model = make(name, tmp_path / 'base'), ours(tmp_path / 'base')
    lora.add_lora(model, rank=3, alpha=7, targets=targets, dora=dora)
    randomise(model)
    expected = model.logits(some_tokens())[..., :VOCAB]
    lora.save_adapter(model, tmp_path / 'adapter', 'the/base')
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / 'adapter').eval()
    torch.testing.assert_close(theirs(some_tokens()).logits, expected, atol=1e-4, rtol=0)
    again = ours(tmp_path / 'base')
    lora.load_adapter(again, tmp_path / 'adapter')
    torch.testing.assert_close(again.logits(some_tokens())[..., :VOCAB], expected, atol=1e-4, rtol=0)
    config = json.loads((tmp_path / 'adapter' / 'adapter_config.json').read_text())
    assert config['base_model_name_or_path'] == 'the/base'


@pytest.mark.parametrize('architecture', ['ar', 'diffusion'])
def test_the_native_trunk_keeps_its_own_names(architecture, tmp_path):
    model = native(architecture)
    lora.add_lora(model, rank=2, alpha=2, dora=True)
    randomise(model)
    lora.save_adapter(model, tmp_path, 'ckpt.pt')
    assert 'base_model.model.blocks.0.attention.q.lora_A.weight' in lora.adapter_state(model)
    again = native(architecture)
    assert not torch.equal(again.logits(tokens_for(again)), model.logits(tokens_for(model)))
    lora.load_adapter(again, tmp_path)
    assert torch.equal(again.logits(tokens_for(again)), model.logits(tokens_for(model)))


def converted(architecture, base=None, **changes):
    """A model of another architecture that starts from an `ar` model's weights."""
    base = base or native(**changes)
    checkpoint = checkpoints.as_start(
        {'architecture': 'ar', 'model_config': vars(base.config), 'model_state_dict': base.state_dict()},
        'base',
        architecture,
    )
    return checkpoints.load_model(checkpoint, 'cpu')


@pytest.mark.parametrize('architecture', ['diffusion', 'sdd'])
@pytest.mark.parametrize('tied', [True, False], ids=['tied', 'untied'])
def test_a_converted_model_learns_its_new_rows_and_peft_reads_them(architecture, tied, tmp_path):
    torch.manual_seed(
        0
    )  # with some others filler's logits grow so large before their cap that rounding shows
    model, tokens = converted(architecture, tied=tied).train(), tokens_for(native())
    tokens[:, 8:] = 39  # filler
    start = {name: weight.clone() for name, weight in model.state_dict().items()}
    lora.add_lora(model, rank=2, alpha=4)
    lora.free_new_parts(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    beliefs = {'k': 2} if architecture == 'sdd' else {}
    for _ in range(3):
        model(tokens, noise=torch.rand(3, 17, generator=torch.Generator().manual_seed(0)), **beliefs)[
            0
        ].backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    logits = model.logits(tokens).detach()
    lora.save_adapter(model, tmp_path, 'base')

    theirs = peft.PeftModel.from_pretrained(converted(architecture, tied=tied), tmp_path)
    torch.testing.assert_close(theirs.base_model.model.logits(tokens), logits, atol=1e-4, rtol=0)
    again = converted(architecture, tied=tied)
    lora.load_adapter(again, tmp_path)
    assert torch.equal(again.logits(tokens), logits)
    with pytest.raises(UserError, match=f"has architecture='{architecture}'; only 'ar'"):
        lora.load_adapter(native(tied=tied), tmp_path)

    lora.merge(again)
    end = again.state_dict()
    torch.testing.assert_close(again.logits(tokens), logits, atol=1e-4, rtol=0)
    assert end.keys() == start.keys()
    for name in {'embedding.weight', 'unembedding.weight'} & set(start):
        changed = (end[name] != start[name]).any(1).nonzero().flatten().tolist()
        assert set(changed) <= {38, 39} and (39 in changed), name
    if architecture == 'sdd':
        assert not torch.equal(end['believed.weight'], start['believed.weight'])


# ---------------------------------------------------------------------------- training


@pytest.mark.parametrize('bits', [None, 8, 4])
@pytest.mark.parametrize('dora', [False, True], ids=['lora', 'dora'])
def test_adapters_start_as_the_model_and_they_alone_are_trained(bits, dora):
    model = native().train()
    if bits:
        lora.quantize(model, bits)
    before, frozen = model.logits(tokens_for(model)), {k: v.clone() for k, v in model.state_dict().items()}
    lora.add_lora(model, rank=4, alpha=8, dropout=0.1, dora=dora)
    torch.testing.assert_close(model.logits(tokens_for(model)), before, atol=1e-5, rtol=0)
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if re.search('lora_|magnitude', name)}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(20):
        loss, count, _ = model(tokens_for(model))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item() / count.item())
    assert losses[-1] < losses[0] - 0.2
    for name, value in frozen.items():
        layer, _, kind = name.rpartition('.')
        state = model.state_dict()
        assert torch.equal(value, state[name] if name in state else state[f'{layer}.base.{kind}']), name


def test_frozen_layers_below_still_pass_gradient_through_checkpointing():
    model = native(gradient_checkpointing=True).train()
    lora.add_lora(model, rank=2, alpha=2)
    for weight in model.blocks[0].parameters():
        weight.requires_grad_(False)
    model(tokens_for(model))[0].backward()
    assert all(
        layer.lora_B.grad.abs().max() > 0 for name, layer in lora.adapted_layers(model) if 'blocks.1' in name
    )


@pytest.mark.parametrize('bits', [None, 8, 4])
def test_adapters_train_on_a_base_in_bfloat16(bits):
    model = native().bfloat16().train()
    if bits:
        lora.quantize(model, bits)
    scales = {name: x.clone() for name, x in model.named_buffers() if 'scale' in name}
    model.bfloat16()
    assert all(torch.equal(x, scales[name]) for name, x in model.named_buffers() if 'scale' in name)
    lora.add_lora(model, rank=2, alpha=2, dora=True)
    assert all(layer.lora_A.dtype == torch.float32 for _, layer in lora.adapted_layers(model))
    for context in (torch.autocast('cpu', torch.bfloat16), torch.autocast('cpu', enabled=False)):
        with context:
            loss = model(tokens_for(model))[0]
        model.zero_grad()
        loss.backward()
        assert all(layer.lora_B.grad.abs().max() > 0 for _, layer in lora.adapted_layers(model))


# ---------------------------------------------------------------------------- few bits


@pytest.mark.parametrize('bits, error, size', [(8, 0.0085, 8.1), (4, 0.094, 4.2)])
def test_a_weight_in_few_bits_is_near_the_weight(bits, error, size):
    linear = nn.Linear(1000, 300)
    nn.init.normal_(linear.weight, std=0.02, generator=torch.Generator().manual_seed(0))
    layer = lora.Quantized(linear, bits)
    found = (layer.dequantized(torch.float32) - linear.weight).norm() / linear.weight.norm()
    assert error / 2 < found < error
    assert sum(x.numel() * x.element_size() for x in layer.buffers()) * 8 / linear.weight.numel() < size


def test_the_values_of_nf4_are_those_published():
    torch.testing.assert_close(
        lora.NF4[[0, 1, 6, 7, 8, 14, 15]],
        torch.tensor([-1.0, -0.6961928, -0.09105004, 0.0, 0.0795803, 0.7229568, 1.0]),
        atol=1e-6,
        rtol=0,
    )


@pytest.mark.parametrize('bits', [8, 4])
def test_a_quantized_layer_computes_with_its_weight_both_ways(bits):
    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(37, 19)  # no multiple of a block
    layer, plain = lora.Quantized(linear, bits), nn.Linear(37, 19)
    plain.load_state_dict({'weight': layer.dequantized(torch.float32), 'bias': linear.bias})
    x = torch.randn(5, 37, generator=generator)
    first, second = x.clone().requires_grad_(), x.clone().requires_grad_()
    layer(first).square().sum().backward()
    plain(second).square().sum().backward()
    torch.testing.assert_close(layer(x), plain(x))
    torch.testing.assert_close(first.grad, second.grad)
    assert not list(name for name, _ in layer.named_parameters() if name != 'bias')


@pytest.mark.parametrize('bits', [8, 4])
def test_only_the_linear_layers_of_blocks_are_quantized(bits):
    model, plain = (
        native(norm='layer', position='learned', bias=True),
        native(norm='layer', position='learned', bias=True),
    )
    lora.quantize(model, bits)
    assert not [layer for layer in model.blocks.modules() if isinstance(layer, nn.Linear)]
    assert torch.equal(model.embedding.weight, plain.embedding.weight)
    difference = (model.logits(tokens_for(model)) - plain.logits(tokens_for(model)))[..., :38].abs()
    assert 0 < difference.mean() < (0.1 if bits == 8 else 1.0)


@pytest.mark.parametrize('bits', [8, 4])
def test_merging_into_few_bits_gives_plain_layers(bits):
    model = native()
    lora.quantize(model, bits)
    lora.add_lora(model, rank=2, alpha=4)
    randomise(model)
    expected = model.logits(tokens_for(model))
    lora.merge(model)
    assert all(type(layer) is nn.Linear for _, layer in lora.linear_layers(model))
    torch.testing.assert_close(model.logits(tokens_for(model)), expected, atol=1e-4, rtol=0)


# ---------------------------------------------------------------------------- commands and mistakes


def test_merge_writes_a_checkpoint_and_says_how_exact_it_is(tmp_path, capsys):
    base = make('llama', tmp_path / 'base')
    theirs = peft.get_peft_model(base, peft.LoraConfig(r=2, lora_alpha=4, target_modules=['q_proj']))
    randomise(theirs)
    theirs.save_pretrained(tmp_path / 'adapter')
    hf.main(['merge', f'{tmp_path}/adapter', f'--base={tmp_path}/base', f'--out={tmp_path}/merged.pt'])
    assert float(re.search(r'by (\S+) at most', capsys.readouterr().out)[1]) < 1e-4
    model = checkpoints.load_model(checkpoints.load(tmp_path / 'merged.pt'), 'cpu')
    torch.testing.assert_close(
        model.logits(some_tokens())[..., :VOCAB], theirs.eval()(some_tokens()).logits, atol=1e-4, rtol=0
    )


def test_merge_converts_a_base_that_was_converted(tmp_path, capsys):
    base = native()
    checkpoints.save(
        tmp_path / 'ckpt.pt',
        {
            'architecture': 'ar',
            'model_state_dict': base.state_dict(),
            'model_config': vars(base.config),
            'tokenizer': None,
            'start_token': 0,
            'prompt_format': None,
        },
    )
    model = converted('sdd', base)
    lora.add_lora(model, 2, 4)
    lora.free_new_parts(model)
    randomise(model)
    with torch.no_grad():
        model.embedding.rows.add_(0.5)
    lora.save_adapter(model, tmp_path / 'adapter', 'ckpt.pt')
    hf.main(['merge', f'{tmp_path}/adapter', f'--base={tmp_path}/ckpt.pt', f'--out={tmp_path}/merged.pt'])
    merged = checkpoints.load(tmp_path / 'merged.pt')
    assert merged['architecture'] == 'sdd'
    tokens = tokens_for(base).masked_fill(torch.arange(16) % 3 == 0, 38)
    torch.testing.assert_close(
        checkpoints.load_model(merged, 'cpu').logits(tokens), model.logits(tokens), atol=1e-4, rtol=0
    )


def adapter(tmp_path, **changes):
    make('llama', tmp_path / 'base')
    model = ours(tmp_path / 'base')
    lora.add_lora(model, 2, 2, targets=('q',))
    lora.save_adapter(model, tmp_path / 'adapter', 'the/base')
    config = tmp_path / 'adapter' / 'adapter_config.json'
    config.write_text(json.dumps({**json.loads(config.read_text()), **changes}))
    return tmp_path / 'adapter'


@pytest.mark.parametrize(
    'changes, base, said',
    [
        ({}, ('gpt2', {}), "belongs on another base, 'the/base': this model has no place for model.layers"),
        (
            {},
            ('llama', {'num_attention_heads': 8, 'head_dim': 16}),
            r'lora_B of the shape \(32, 2\).*needs \(128, 2\)',
        ),
        ({}, ('llama', {'num_hidden_layers': 1}), 'no place for model.layers.1.self_attn.q_proj.lora_A'),
        ({'bias': 'all'}, ('llama', {}), "has bias='all'"),
        ({'peft_type': 'IA3'}, ('llama', {}), "peft_type='IA3'"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(changes, base, said, tmp_path):
    folder = adapter(tmp_path, **changes)
    make(base[0], tmp_path / 'other', **base[1])
    with pytest.raises(UserError, match=said):
        lora.load_adapter(ours(tmp_path / 'other'), folder)


def test_a_checkpoint_with_its_adapter_beside_is_not_exported(tmp_path):
    model = native()
    lora.add_lora(model, 2, 2)
    checkpoints.save(
        tmp_path / 'ckpt.pt',
        {
            'architecture': 'ar',
            'model_state_dict': model.state_dict(),
            'model_config': vars(model.config),
            'tokenizer': None,
            'start_token': 0,
            'prompt_format': None,
        },
    )
    with pytest.raises(UserError, match='does not hold the plain weights.*merge its adapter first'):
        hf.main(['export', f'{tmp_path}/ckpt.pt', f'--out={tmp_path}/out'])
    assert not list(tmp_path.glob('out*'))


def test_other_mistakes_are_sentences(tmp_path):
    folder = adapter(tmp_path)
    with pytest.raises(UserError, match='There is no adapter in'):
        lora.load_adapter(native(), tmp_path)
    (folder / 'adapter_model.safetensors').write_bytes(b'no')
    with pytest.raises(UserError, match='cannot be read'):
        lora.load_adapter(ours(tmp_path / 'base'), folder)
    with pytest.raises(UserError, match="'head' is no layer"):
        lora.add_lora(native(), 2, 2, targets=('head',))
    with pytest.raises(UserError, match='No layer of the model is called gate'):
        lora.add_lora(native(), 2, 2, targets=('gate',))
    with pytest.raises(UserError, match='rank is 0'):
        lora.add_lora(native(), 0, 2)
    with pytest.raises(UserError, match='bits is 2'):
        lora.quantize(native(), 2)
    model = native()
    lora.add_lora(model, 2, 2)
    with pytest.raises(UserError, match='has an adapter already'):
        lora.load_adapter(model, folder)
