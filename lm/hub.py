"""The way to the Hugging Face hub, and the card that a model has there, written from its run's settings."""

import re
from pathlib import Path

from lm import checkpoints, families
from lm.configurator import UserError
from model import ModelConfig

KINDS = {'ar': 'autoregressive', 'diffusion': 'masked diffusion', 'sdd': 'sparse distribution diffusion'}
# Settings that say nothing about the model, or name files and folders of the machine that it was made on.
LEFT_OUT = {
    'out_dir',
    'run_suffix',
    'overwrite',
    'resume_from',
    'save_every',
    'save_total_limit',
    'no_wandb',
    'device',
    'wandb_project',
    'wandb_run_name',
    'log_every',
    'num_samples',
    'sample_tokens',
    'sample_every',
    'push_to_hub',
    'hub_model_id',
    'trust_remote_code',
    'compile',
}


def check(hub_model_id, token=None):
    """A UserError where a run that is to end with an upload could not: said before it trains, not after."""
    check_name(hub_model_id)
    attempt(
        'The run is to end on the hub, which does not know who you are', lambda client: client.whoami(), token
    )


def check_name(hub_model_id):
    if not re.fullmatch(r'[\w.-]+/[\w.-]+', hub_model_id or ''):
        raise UserError(
            f'hub_model_id is {hub_model_id!r}; it is the name on the hub, as --hub_model_id=owner/name.'
        )


def send(folder, hub_model_id, message, token=None, private=False):
    """Uploads a folder as one commit of the model `hub_model_id`, which is made where it does not exist; nothing is
    deleted there."""

    def upload(client):
        client.create_repo(hub_model_id, private=private, exist_ok=True)
        client.upload_folder(repo_id=hub_model_id, folder_path=folder, commit_message=message)

    attempt(f'{hub_model_id} got nothing', upload, token)


def attempt(failure, call, token=None):
    """call(HfApi) with every way in which a network and a service can fail said in a sentence."""
    from huggingface_hub import HfApi  # comes with datasets; slow to import

    try:
        return call(HfApi(token=token or None))
    except Exception as error:  # the client's, the network's and httpx' own errors have no common class
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f'{failure} ({reason}). Log in with `hf auth login` and see that the hub can be reached; a '
            'finished run is sent by: python hf.py push RUN --hub_model_id=owner/name'
        ) from error


def show(folder):
    """What would be sent."""
    for path in sorted(folder.iterdir()):
        print(f'  {path.stat().st_size:>15,} bytes  {path.name}')
    print((folder / 'README.md').read_text(encoding='utf-8'))


# ---------------------------------------------------------------------------- the card


def model_card(checkpoint, name):
    """README.md of a model on the hub: what it is, how to use it, how it was made, how good it is."""
    config, settings = ModelConfig(**checkpoint['model_config']), checkpoint['train_config']
    architecture, base = checkpoint['architecture'], settings.get('init_from', '')
    family, _ = families.family_of(architecture, config)
    facts = {
        'library_name': 'transformers' if family else families.NATIVE,
        'pipeline_tag': 'text-generation',
        'tags': f'[{families.NATIVE}, {architecture}]',
    }
    if on_the_hub(base):
        facts['base_model'] = base
    count = sum(tensor.numel() for tensor in checkpoint['model_state_dict'].values())
    made = f'tuned from {plain(base)}' if base and base != 'scratch' else 'trained from random weights'
    text = [
        f'# {name.split("/")[1]}',
        f'A language model ({KINDS[architecture]}) of {count:,} parameters, {made}'
        + (f' on {plain(settings["dataset"])}.' if settings.get('dataset') else '.'),
    ]
    text += ['## Use', usage(name, family, checkpoint)]
    if checkpoint.get('best_val_loss') is not None:
        bound = '' if architecture == 'ar' else ' (an upper bound)'
        text += [
            '## Result',
            f'{checkpoint["best_val_loss"]:.4f} nats per token{bound} on held-out examples, at step '
            f'{checkpoint["best_step"]}.',
        ]
    rows = [
        f'| {key} | `{plain(value)}` |'
        for key, value in settings.items()
        if key not in LEFT_OUT and value not in ('', None)
    ]
    if rows:
        text += ['## Settings', '\n'.join(['| setting | value |', '|---|---|', *rows])]
    head = '\n'.join(['---', *(f'{key}: {value}' for key, value in facts.items()), '---'])
    return '\n\n'.join([head, *text]) + '\n'


def on_the_hub(base):
    return bool(base) and checkpoints.is_pretrained(base) and not Path(base).exists() and '/' in base


def plain(value):
    """A setting as it may be read by everyone: of a path only its name."""
    return Path(value).name if isinstance(value, str) and '/' in value and not on_the_hub(value) else value


def usage(name, family, checkpoint):
    chat = ' --chat' if checkpoint.get('prompt_format') else ''
    lines = [f'```\npython sample.py --checkpoint={name}{chat or " --prompt=..."}\n```']
    if family:
        lines = [
            f'```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n'
            f"model = AutoModelForCausalLM.from_pretrained('{name}')\n"
            f"tokenizer = AutoTokenizer.from_pretrained('{name}')\n```"
        ]
    else:
        lines.append('It is of a family of its own, which `transformers` does not read.')
    if chat:
        lines.append(f'A prompt is written as\n\n```\n{checkpoint["prompt_format"]}\n```')
    return '\n\n'.join(lines)
