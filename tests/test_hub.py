"""What hub.py promises, before a stand-in for the hub's client: what is sent, what is said, what never is."""

import types

import huggingface_hub
import pytest
import transformers
from conftest import letter_tokenizer, random_model
from test_finetune import place, settings, tune  # noqa: F401

import hf
from lm import checkpoints
from lm.configurator import UserError

NAME = 'someone/letters'
GPT2 = dict(norm='layer', position='learned', mlp='gelu', bias=True, qk_norm=False, logit_softcap=0)


@pytest.fixture
def run_folder(tmp_path):
    """A finished run of an ar model that transformers can read: best.pt, and a worse ckpt.pt beside it."""
    tokenizer, folder = letter_tokenizer(), tmp_path / 'run'
    folder.mkdir()
    for file, deviation in (('best.pt', 0.1), ('ckpt.pt', 0.2)):
        model = random_model(
            'ar',
            deviation,
            n_layer=1,
            n_head=2,
            n_embd=16,
            block_size=8,
            mask_id=tokenizer.mask_id,
            vocab_size=tokenizer.vocab_size,
            ignore_id=tokenizer.ignore_id,
            **GPT2,
        )
        checkpoints.save(
            folder / file,
            {
                'architecture': 'ar',
                'global_step': 5,
                'best_step': 3,
                'best_val_loss': 1.25,
                'start_token': 0,
                'model_config': vars(model.config),
                'model_state_dict': model.state_dict(),
                'prompt_format': None,
                'tokenizer': tokenizer.to_json(),
                'train_config': {
                    'dataset': '/home/me/data/letters',
                    'init_from': 'owner/base',
                    'out_dir': '/home/me/out',
                    'learning_rate': 2e-5,
                    'wandb_project': 'mine',
                    'block_size': None,
                },
            },
        )
    return folder


@pytest.fixture
def client(monkeypatch, tmp_path):
    """A hub that keeps what it gets: `calls` in order, and the folder as it was."""
    kept = types.SimpleNamespace(calls=[], folder=tmp_path / 'kept', fails=None)

    class Client:
        def __init__(self, token=None):
            kept.calls.append(('client', token))

        def whoami(self):
            kept.calls.append(('whoami',))
            if kept.fails:
                raise kept.fails

        def create_repo(self, name, private, exist_ok):
            kept.calls.append(('create', name, private, exist_ok))
            if kept.fails:
                raise kept.fails

        def upload_folder(self, repo_id, folder_path, commit_message):
            kept.calls.append(('upload', repo_id))
            folder_path.rename(kept.folder)

    monkeypatch.setattr(huggingface_hub, 'HfApi', Client)
    return kept


def test_the_best_weights_are_sent_as_a_folder_that_transformers_reads(run_folder, client, capsys):
    hf.main(['push', str(run_folder), f'--hub_model_id={NAME}', '--token=secret', '--private'])
    assert client.calls == [('client', 'secret'), ('create', NAME, True, True), ('upload', NAME)]
    sent = transformers.AutoModelForCausalLM.from_pretrained(client.folder).state_dict()
    best = checkpoints.load(run_folder / 'best.pt')['model_state_dict']
    assert (sent['transformer.h.0.mlp.c_proj.weight'].T == best['blocks.0.mlp.down.weight']).all()
    assert NAME in capsys.readouterr().out
    assert sorted(path.name for path in run_folder.iterdir()) == ['best.pt', 'ckpt.pt']


def test_the_card_tells_the_settings_and_no_path_of_the_machine(run_folder, client):
    hf.main(['push', str(run_folder), f'--hub_model_id={NAME}'])
    card = (client.folder / 'README.md').read_text()
    assert card.startswith('---\nlibrary_name: transformers\n') and 'base_model: owner/base\n' in card
    assert (
        '1.2500 nats per token on held-out examples, at step 3' in card
        and f"from_pretrained('{NAME}')" in card
    )
    assert '| learning_rate | `2e-05` |' in card and '| dataset | `letters` |' in card
    assert not any(word in card for word in ('/home/me', 'out_dir', 'wandb', 'secret', 'block_size'))


def test_a_dry_run_shows_all_and_asks_no_one(run_folder, client, capsys):
    hf.main(['push', str(run_folder), f'--hub_model_id={NAME}', '--dry_run'])
    output = capsys.readouterr().out
    assert client.calls == [] and not client.folder.exists()
    assert all(name in output for name in ('model.safetensors', 'tokenizer.json', 'README.md', '# letters'))


@pytest.mark.parametrize(
    'words, said',
    [
        (['RUN', '--hub_model_id=letters'], "hub_model_id is 'letters'.*owner/name"),
        (['nowhere', f'--hub_model_id={NAME}'], 'no checkpoint at nowhere'),
        (['RUN', f'--hub_model_id={NAME}'], 'got nothing .*no route.*hf auth login'),
    ],
)
def test_a_mistake_is_a_sentence(words, said, run_folder, client, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    client.fails = ConnectionError('no route to the host')
    with pytest.raises(UserError, match=said):
        hf.main(['push', *(word.replace('RUN', str(run_folder)) for word in words)])
    assert sorted(path.name for path in run_folder.iterdir()) == ['best.pt', 'ckpt.pt']


def test_a_tuned_model_is_sent_when_it_is_done(place, client, tmp_path):  # noqa: F811
    hub = ('--push_to_hub', f'--hub_model_id={NAME}', '--token=secret')
    tune(*settings(place, 'ar', f'--out_dir={tmp_path}/run', *hub))
    assert [call[0] for call in client.calls] == ['client', 'whoami', 'client', 'create', 'upload']
    assert 'secret' not in (client.folder / 'README.md').read_text()
    client.fails = ConnectionError('401')
    with pytest.raises(UserError, match='does not know who you are .401.*hf auth login'):
        tune(*settings(place, 'ar', f'--out_dir={tmp_path}/other', *hub))
    assert not (tmp_path / 'other').exists()  # said before anything is done
