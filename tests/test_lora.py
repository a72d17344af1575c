"""lm/lora.py beside peft, and the promises of adapters."""

import json
import re

import pytest
import safetensors.torch
import torch
from conftest import HF_VOCAB, hf_model, hf_tokens, random_model, write_checkpoint

import hf
from lm import checkpoints, lora
from lm.configurator import UserError
from lm.quantize import quantize

peft = pytest.importorskip('peft', reason='peft is not installed')

SHAPE = dict(vocab_size=40, block_size=16, n_layer=2, n_head=2, n_embd=32, mask_id=38, ignore_id=39)
TARGETS = {
    'gpt2': ('c_attn', 'mlp.c_proj'),
    'llama': ('q_proj', 'v_proj', 'down_proj'),
    'opt': ('k_proj', 'out_proj', 'fc1'),
    'qwen3': ('o_proj', 'gate_proj'),
}


def load(path):
    return checkpoints.load_model(checkpoints.load(path), 'cpu')


def native(architecture='ar', **changes):
    return random_model(architecture, 0.3, **{**SHAPE, **changes})


def native_tokens():
    return torch.randint(0, 38, (3, 16), generator=torch.Generator().manual_seed(1))


def randomise(module):
    """Every adapter weight random, so that an adapter changes what the model says."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, weight in module.named_parameters():
            if 'lora_' in name:
                weight.copy_(0.2 * torch.randn(weight.shape, generator=generator))


def assert_logits(model, expected):
    logits = model.logits(hf_tokens())[..., :HF_VOCAB]
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


# ---------------------------------------------------------------------------- beside peft


@pytest.mark.parametrize('name', TARGETS)
@torch.no_grad()
def test_an_adapter_of_peft_says_the_same_here(name, tmp_path):
    base = hf_model(name, tmp_path / 'base')
    plain = base(hf_tokens()).logits
    settings = dict(r=3, lora_alpha=5, target_modules=list(TARGETS[name]))
    theirs = peft.get_peft_model(base, peft.LoraConfig(**settings, fan_in_fan_out=name == 'gpt2')).eval()
    randomise(theirs)
    expected = theirs(hf_tokens()).logits
    theirs.save_pretrained(tmp_path / 'adapter')

    model = load(tmp_path / 'base')
    lora.load_adapter(model, tmp_path / 'adapter')
    assert_logits(model, expected)
    assert (expected - plain).abs().max() > 1e-2
    lora.merge(model)
    assert not lora.adapted_layers(model)
    assert_logits(model, expected)


@pytest.mark.parametrize(
    'name, targets', [('llama', ()), ('opt', ('q_proj', 'fc2')), ('qwen3', ('all-linear',))]
)
@torch.no_grad()
def test_an_adapter_of_ours_says_the_same_in_peft(name, targets, tmp_path):
    base, model = hf_model(name, tmp_path / 'base'), load(tmp_path / 'base')
    lora.add_lora(model, rank=3, alpha=7, targets=targets)
    randomise(model)
    expected = model.logits(hf_tokens())[..., :HF_VOCAB]
    lora.save_adapter(model, tmp_path / 'adapter', 'the/base')
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / 'adapter').eval()
    torch.testing.assert_close(theirs(hf_tokens()).logits, expected, atol=1e-4, rtol=0)
    again = load(tmp_path / 'base')
    lora.load_adapter(again, tmp_path / 'adapter')
    assert_logits(again, expected)
    config = json.loads((tmp_path / 'adapter' / 'adapter_config.json').read_text())
    assert config['base_model_name_or_path'] == 'the/base'


@pytest.mark.parametrize('name', ['gpt2', 'ar', 'diffusion'])
@torch.no_grad()
def test_gpt2_and_the_native_trunk_keep_our_own_names(name, tmp_path):
    def base():
        return load(tmp_path / 'base') if name == 'gpt2' else native(name)

    if name == 'gpt2':
        hf_model('gpt2', tmp_path / 'base')
    model, tokens = base(), native_tokens()
    lora.add_lora(model, rank=2, alpha=2, targets=('v', 'out', 'up'))
    randomise(model)
    lora.save_adapter(model, tmp_path / 'adapter', 'ckpt.pt')
    tensors = safetensors.torch.load_file(tmp_path / 'adapter' / 'adapter_model.safetensors')
    assert 'base_model.model.blocks.0.attention.v.lora_A.weight' in tensors
    again = base()
    assert not torch.equal(again.logits(tokens), model.logits(tokens))
    lora.load_adapter(again, tmp_path / 'adapter')
    assert torch.equal(again.logits(tokens), model.logits(tokens))


# ---------------------------------------------------------------------------- converted models


def converted(architecture, base):
    """A model of another architecture that starts from an `ar` model's weights."""
    state = {'model_config': vars(base.config), 'model_state_dict': base.state_dict()}
    checkpoint = checkpoints.convert({'architecture': 'ar', **state}, 'base', architecture)
    return checkpoints.load_model(checkpoint, 'cpu')


@pytest.mark.parametrize('architecture', ['diffusion', 'sdd'])
@pytest.mark.parametrize('tied', [True, False], ids=['tied', 'untied'])
def test_a_converted_model_learns_its_new_rows_and_peft_reads_them(architecture, tied, tmp_path):
    torch.manual_seed(
        0
    )  # with some others padding's logits grow so large before their cap that rounding shows
    base = native(tied=tied)
    model, tokens = converted(architecture, base).train(), native_tokens()
    tokens[:, 8:] = 39  # padding
    start = {name: weight.clone() for name, weight in model.state_dict().items()}
    lora.add_lora(model, rank=2, alpha=4)
    lora.train_new_embeddings(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    noise = torch.rand(3, 17, generator=torch.Generator().manual_seed(0))
    for _ in range(3):
        model(tokens, noise=noise, **({'k': 2} if model.has_beliefs else {}))[0].backward()
        optimizer.step()
        optimizer.zero_grad()
    logits = model.eval().logits(tokens).detach()
    lora.save_adapter(model, tmp_path, 'base')

    theirs = peft.PeftModel.from_pretrained(converted(architecture, base), tmp_path)
    torch.testing.assert_close(theirs.base_model.model.logits(tokens), logits, atol=1e-4, rtol=0)
    again = converted(architecture, base)
    lora.load_adapter(again, tmp_path)
    assert torch.equal(again.logits(tokens), logits)
    with pytest.raises(UserError, match=f"has architecture='{architecture}'; only 'ar'"):
        lora.load_adapter(base, tmp_path)

    lora.merge(again)
    end = again.state_dict()
    torch.testing.assert_close(again.logits(tokens), logits, atol=1e-4, rtol=0)
    assert end.keys() == start.keys()
    for name in {'embedding.weight', 'unembedding.weight'} & set(start):
        changed = (end[name] != start[name]).any(1).nonzero().flatten().tolist()
        assert set(changed) <= {38, 39} and 39 in changed, name
    if architecture == 'sdd':
        assert not torch.equal(end['belief_proj.weight'], start['belief_proj.weight'])


def old_names(folder):
    """Gives an adapter the names of an earlier version."""
    path, config = folder / 'adapter_model.safetensors', folder / 'adapter_config.json'
    tensors = safetensors.torch.load_file(path)
    tensors = {name.replace('belief_proj', 'believed'): tensor for name, tensor in tensors.items()}
    assert 'base_model.model.believed.weight' in tensors
    safetensors.torch.save_file(tensors, path)
    config.write_text(config.read_text().replace('belief_proj', 'believed'))


@pytest.mark.parametrize('version', ['now', 'earlier'])
@torch.no_grad()
def test_merge_converts_a_base_that_was_converted(version, tmp_path):
    base = native()
    write_checkpoint(tmp_path / 'ckpt.pt', base)
    model = converted('sdd', base)
    lora.add_lora(model, 2, 4)
    lora.train_new_embeddings(model)
    randomise(model)
    model.embedding.rows.add_(0.5)
    model.belief_proj.weight.mul_(0.5)
    lora.save_adapter(model, tmp_path / 'adapter', 'ckpt.pt')
    if version == 'earlier':
        old_names(tmp_path / 'adapter')
    hf.main(['merge', f'{tmp_path}/adapter', f'--base={tmp_path}/ckpt.pt', f'--out={tmp_path}/merged.pt'])
    merged = load(tmp_path / 'merged.pt')
    tokens = native_tokens().masked_fill(torch.arange(16) % 3 == 0, 38)
    assert torch.equal(merged.belief_proj.weight, model.belief_proj.weight)
    torch.testing.assert_close(merged.logits(tokens), model.logits(tokens), atol=1e-4, rtol=0)


def test_merge_writes_a_checkpoint_that_says_what_peft_says(tmp_path):
    base = hf_model('llama', tmp_path / 'base')
    theirs = peft.get_peft_model(base, peft.LoraConfig(r=2, lora_alpha=4, target_modules=['q_proj']))
    randomise(theirs)
    theirs.save_pretrained(tmp_path / 'adapter')
    hf.main(['merge', f'{tmp_path}/adapter', f'--base={tmp_path}/base', f'--out={tmp_path}/merged.pt'])
    assert_logits(load(tmp_path / 'merged.pt'), theirs.eval()(hf_tokens()).logits)


@pytest.mark.faults
def test_merge_keeps_the_prompt_format_and_the_rows_that_the_adapter_was_tuned_with(tmp_path):
    write_checkpoint(tmp_path / 'ckpt.pt', native())
    model = native()
    lora.add_lora(model, 2, 4)
    for form in (None, 'Q: {instruction}\nA: {output}'):
        start = 5 if form else checkpoints.load(tmp_path / 'ckpt.pt')['start_token']
        asked = dict(prompt_format=form, start_token=5, block_size=8) if form else {}
        lora.save_adapter(model, tmp_path / 'adapter', 'ckpt.pt', **asked)
        words = f'merge {tmp_path}/adapter --base={tmp_path}/ckpt.pt --out={tmp_path}/out.pt --overwrite'
        hf.main(words.split())
        merged = checkpoints.load(tmp_path / 'out.pt')
        assert (merged['prompt_format'], merged['start_token']) == (form, start)
        assert merged['train_config'].get('block_size') == (8 if form else None)


# ---------------------------------------------------------------------------- training


@pytest.mark.parametrize('bits', [None, 8, 4])
def test_adapters_start_as_the_model_and_they_alone_are_trained(bits):
    model, tokens = native().train(), native_tokens()
    if bits:
        quantize(model, bits)
    before, frozen = model.logits(tokens), {k: v.clone() for k, v in model.state_dict().items()}
    lora.add_lora(model, rank=4, alpha=8, dropout=0.1)
    torch.testing.assert_close(model.logits(tokens), before, atol=1e-5, rtol=0)
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if 'lora_' in name}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    losses = []
    for _ in range(10):
        loss, count, _ = model(tokens)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item() / count.item())
    assert losses[-1] < losses[0] - 0.2
    state = model.state_dict()
    for name, value in frozen.items():
        layer, _, kind = name.rpartition('.')
        assert torch.equal(value, state[name] if name in state else state[f'{layer}.base.{kind}']), name


def test_frozen_layers_below_still_pass_gradient_through_checkpointing():
    model = native(gradient_checkpointing=True).train()
    lora.add_lora(model, rank=2, alpha=2)
    model.blocks[0].requires_grad_(False)
    model(native_tokens())[0].backward()
    layers = [layer for name, layer in lora.adapted_layers(model) if name.startswith('blocks.1.')]
    assert len(layers) == 7 and all(layer.lora_B.grad.abs().max() > 0 for layer in layers)


@pytest.mark.parametrize('bits', [None, 8, 4])
def test_adapters_train_on_a_base_in_bfloat16(bits):
    model = native().bfloat16().train()
    if bits:
        quantize(model, bits)
    scales = {name: x.clone() for name, x in model.named_buffers() if 'scale' in name}
    model.bfloat16()
    assert all(torch.equal(x, scales[name]) for name, x in model.named_buffers() if 'scale' in name)
    lora.add_lora(model, rank=2, alpha=2)
    layers = [layer for _, layer in lora.adapted_layers(model)]
    assert all(layer.lora_A.dtype == torch.float32 for layer in layers)
    for context in (torch.autocast('cpu', torch.bfloat16), torch.autocast('cpu', enabled=False)):
        with context:
            loss = model(native_tokens())[0]
        model.zero_grad()
        loss.backward()
        assert all(layer.lora_B.grad.abs().max() > 0 for layer in layers)


@pytest.mark.faults
def test_checkpointing_repeats_whatever_random_numbers_a_block_draws():
    """Dropout of adapters or of a layer of one's own, where the model's own dropout is 0."""
    gradients = []
    for checkpointing in (False, True):
        model = native(gradient_checkpointing=checkpointing)
        lora.add_lora(model.train(), rank=4, alpha=8, dropout=0.5)
        randomise(model)
        model.blocks[0].mlp.activation = lambda x: torch.dropout(x.relu(), 0.3, True)
        torch.manual_seed(0)
        model(native_tokens())[0].backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name])


@pytest.mark.faults
def test_an_adapter_on_a_model_in_evaluation_drops_nothing(tmp_path):
    model = native().train()
    lora.add_lora(model, 2, 4, dropout=0.5)
    randomise(model)
    lora.save_adapter(model, tmp_path, 'base')
    again = native()
    lora.load_adapter(again, tmp_path)
    assert not any(layer.training for _, layer in lora.adapted_layers(again))
    assert torch.equal(again.logits(native_tokens()), model.eval().logits(native_tokens()))


# ---------------------------------------------------------------------------- mistakes


def adapter(tmp_path, **changes):
    hf_model('llama', tmp_path / 'base')
    model = load(tmp_path / 'base')
    lora.add_lora(model, 2, 2, targets=('q',))
    lora.save_adapter(model, tmp_path / 'adapter', 'the/base')
    config = tmp_path / 'adapter' / 'adapter_config.json'
    config.write_text(json.dumps({**json.loads(config.read_text()), **changes}))
    return tmp_path / 'adapter'


@pytest.mark.parametrize(
    'changes, base, message',
    [
        ({}, ('gpt2', {}), r"does not fit \(model.layers.0.*give the base that it is for, 'the/base'"),
        (
            {},
            ('llama', {'num_attention_heads': 8, 'head_dim': 16}),
            r'lora_B.weight \(32, 2\), which is \(128, 2\) here',
        ),
        ({}, ('llama', {'num_hidden_layers': 1}), r'not fit \(model.layers.1.self_attn.q_proj.lora_A'),
        ({'bias': 'all'}, ('llama', {}), "has bias='all'; only 'none' is known"),
        ({'peft_type': 'IA3'}, ('llama', {}), "peft_type='IA3'"),
        ({'rank_pattern': {'q_proj': 4}}, ('llama', {}), 'rank_pattern=.*merge it into its base with PEFT'),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(changes, base, message, tmp_path):
    folder = adapter(tmp_path, **changes)
    hf_model(base[0], tmp_path / 'other', **base[1])
    with pytest.raises(UserError, match=message):
        lora.load_adapter(load(tmp_path / 'other'), folder)


@pytest.mark.faults
@pytest.mark.parametrize(
    'changes',
    [
        {'init_lora_weights': 'pissa'},
        {'init_lora_weights': 'olora'},
        {'init_lora_weights': 'loftq'},
        {'use_dora': True},
        {'alora_invocation_tokens': [1, 2]},
        {'layer_replication': [[0, 2]]},
        {'target_parameters': ['mlp.weight']},
        {'use_qalora': True},
        {'of_a_later_version': 'x'},
    ],
)
def test_an_adapter_of_another_kind_is_refused(changes, tmp_path):
    folder, ((key, value),) = adapter(tmp_path, **changes), changes.items()
    with pytest.raises(
        UserError, match=re.escape(f'has {key}={value!r}; only ') + '.*merge it into its base with PEFT'
    ):
        lora.load_adapter(load(tmp_path / 'base'), folder)


@pytest.mark.faults
def test_an_adapter_with_all_of_pefts_defaults_is_read(tmp_path):
    folder = adapter(tmp_path)
    path = folder / 'adapter_config.json'
    defaults = json.loads(json.dumps(peft.LoraConfig().to_dict(), default=str))
    path.write_text(json.dumps({**defaults, **json.loads(path.read_text())}))
    lora.load_adapter(load(tmp_path / 'base'), folder)


def test_other_mistakes_are_sentences(tmp_path):
    folder = adapter(tmp_path)
    with pytest.raises(UserError, match='There is no adapter in'):
        lora.load_adapter(native(), tmp_path)
    (folder / 'adapter_model.safetensors').write_bytes(b'no')
    with pytest.raises(UserError, match='adapter_model.safetensors cannot be read'):
        lora.load_adapter(native(), folder)
    with pytest.raises(UserError, match='No layer of the model is called head; choose of .*q_proj'):
        lora.add_lora(native(), 2, 2, targets=('q', 'head'))
