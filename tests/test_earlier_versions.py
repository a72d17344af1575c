"""Checkpoints and runs of earlier versions load, and go on."""

import torch
from conftest import random_model
from helpers import load, metrics, run

from lm import checkpoints
from lm.folder import Folder

EARLIER = {'embedding_shortcuts': False}  # which its model_config did not say


def old_checkpoint(folder):
    """A checkpoint as commit d63822a wrote it, of an sdd model after 3 of 6 steps."""
    tokenizer = Folder(folder).tokenizer
    shape = dict(vocab_size=30, block_size=16, n_layer=1, n_head=2, n_embd=16, mask_id=28, ignore_id=29)
    model = random_model('sdd', 0.1, **shape, **EARLIER)
    weights = dict(model.state_dict())
    weights['believed.weight'] = weights.pop('belief_proj.weight')
    generator = torch.Generator().manual_seed(1)
    moments = {
        i: {
            'step': torch.tensor(3.0),
            'exp_avg': 0.01 * torch.randn(weight.shape, generator=generator),
            'exp_avg_sq': 0.01 * torch.rand(weight.shape, generator=generator),
        }
        for i, weight in enumerate(weights.values())
    }
    group = {'lr': 0.001, 'betas': (0.9, 0.95), 'eps': 1e-8, 'weight_decay': 0.1, 'amsgrad': False}
    group |= {'maximize': False, 'foreach': None, 'capturable': False, 'differentiable': False}
    group |= {'fused': True, 'decoupled_weight_decay': True, 'params': [*range(len(weights))]}
    train_config = {
        'dataset': str(folder),
        'mode': 'packed',
        'batch_size': 4,
        'gradient_accumulation_steps': 1,
        'architecture': 'sdd',
        'model_size': 'tiny',
        'n_layer': 1,
        'n_head': 2,
        'n_embd': 16,
        'n_kv_head': 2,
        'block_size': 16,
        'k_schedule': (1, 2, 4, 8),
        'p_belief': ((0.0, 1.0),),
        'anneal_steps': 0,
        'max_steps': 6,
        'eval_every': 3,
        'eval_batches': 2,
        'log_every': 1,
        'ema_decay': 0.5,
        'out_dir': 'somewhere/else',
        'seed': 0,
        'no_wandb': True,
        'device': 'cpu',
        'dtype': 'float32',
    }
    return {
        'format': 1,
        'architecture': 'sdd',
        'global_step': 3,
        'best_step': 3,
        'best_val_loss': 3.0,
        'model_config': {key: value for key, value in vars(model.config).items() if key not in EARLIER},
        'model_state_dict': weights,
        'ema_state_dict': {name: weight + 0.01 for name, weight in weights.items()},
        'train_config': train_config,
        'seed': 0,
        'tokenizer': tokenizer.to_json(),
        'start_token': tokenizer.endoftext_id,
        'prompt_format': None,
        'scaler_state_dict': {},
        'rows_per_step': 4,
        'data': None,
        'wandb_run_id': None,
        'optimizer_state_dict': {'adamw': {'state': moments, 'param_groups': [group]}},
    }


def test_a_checkpoint_of_an_earlier_version_goes_on_and_samples(make_folder, tmp_path, capsys):
    out = tmp_path / 'old'
    out.mkdir()
    old = old_checkpoint(make_folder())
    torch.save(old, out / 'ckpt.pt')
    model = checkpoints.load_model(checkpoints.load(out), 'cpu')  # has the averaged weights
    assert torch.equal(model.belief_proj.weight, old['ema_state_dict']['believed.weight'])
    run('train.py', f'--resume_from={out}')
    new = load(out)
    assert new['global_step'] == 6 and [row['step'] for row in metrics(out)] == list('456')
    assert new['train_config']['eval_tokens'] == 2 * 4 * 16  # as many rows as its batches had
    assert new['train_config']['noisy_every'] == 1  # it was trained on all blocks
    assert new['train_config']['decay_embedding']
    for name, weight in new['model_state_dict'].items():
        before = old['model_state_dict'][name.replace('belief_proj', 'believed')]
        assert 0 < (weight - before).abs().max() < 0.1, name
    capsys.readouterr()
    arguments = ['--max_new_tokens=5', '--device=cpu', '--num_samples=1']
    run('sample.py', f'--checkpoint={out}', *arguments)
    sampled = capsys.readouterr().out
    torch.save(old, out / 'ckpt.pt')
    run('sample.py', f'--checkpoint={out}', *arguments)
    assert sampled and capsys.readouterr().out
