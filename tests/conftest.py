"""Share between tests: the repository root on sys.path, prepared folders made of nothing."""

import json
import os
import random
import resource
import runpy
import signal
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault('OMP_NUM_THREADS', '1')  # read when torch comes: threads of tiny models only wait
os.environ['HF_HUB_OFFLINE'] = '1'  # tests ask no network

import numpy as np
import tokenizers
import torch

from lm import checkpoints
from lm.configurator import ROOT
from lm.files import sha256_of
from lm.tokenizer import CHARACTERS, Tokenizer, byte_level
from model import ARCHITECTURES, ModelConfig, architecture_name

signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it would be ignored, here and in what is started

LETTERS = 'abcdefghijklmnopqrstuvwxyz '


def letter_tokenizer(letters=LETTERS):
    vocabulary = {letter: i for i, letter in enumerate(letters)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r'[\s\S]'), 'isolated')
    tokenizer.decoder = tokenizers.decoders.Fuse()
    return Tokenizer(tokenizer.to_str())


def random_texts(count, longest, seed):
    """Documents of very different length, from words that a model can learn a little about."""
    draw = random.Random(seed)
    words = ('the cat', 'a dog', 'sees', 'one', 'small', 'bird', 'in', 'its', 'tree', 'and', 'sings')
    return [' '.join(draw.choices(words, k=20))[: draw.randint(1, longest)] for _ in range(count)]


def write_folder(folder, train=None, val=None, train_on=None, letters=LETTERS):
    """Writes a prepared folder, as Folder reads it, of texts of the letters a to z and spaces.

    train, val: texts, one per document; train_on: the letters that the model is trained on, all by default.
    """
    tokenizer, splits = letter_tokenizer(letters), {}
    folder.mkdir()
    texts = {'train': train or random_texts(60, 90, seed=1), 'val': val or random_texts(12, 90, seed=2)}
    for split, documents in texts.items():
        ids = [tokenizer.encode(text) + [tokenizer.endoftext_id] for text in documents]
        tokens = np.array(sum(ids, []), np.uint16)
        tokens.tofile(folder / f'{split}_tokens.bin')
        index = np.cumsum([0] + [len(document) for document in ids])
        index.astype(np.uint64).tofile(folder / f'{split}_index.bin')
        if train_on is not None:
            np.isin(tokens, tokenizer.encode(train_on)).astype(np.uint8).tofile(folder / f'{split}_masks.bin')
        splits[split] = {'tokens': len(tokens), 'documents': len(ids), 'bytes': sum(map(len, documents))}
    (folder / 'tokenizer.json').write_text(tokenizer.to_json())
    (folder / 'config.json').write_text(
        json.dumps(
            {
                'format': 1,
                'name': folder.name,
                'vocab_size': tokenizer.vocab_size,
                'dtype': 'uint16',
                'splits': splits,
                'start_token': tokenizer.endoftext_id,
                'prompt_format': None,
                'sha256': {path.name: sha256_of(path) for path in folder.iterdir()},
            }
        )
    )
    return folder


def random_model(architecture, deviation, **shape):
    """A small model whose every weight is random (the native trunk starts as the identity), not training."""
    generator = torch.Generator().manual_seed(0)
    model = ARCHITECTURES[architecture](ModelConfig(**shape)).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            is_scale = name.endswith(('norm.weight', 'residual_scale'))
            weight.copy_(deviation * torch.randn(weight.shape, generator=generator) + is_scale)
    return model


def assert_drawn_from(probabilities, tokens):
    """Pearson's chi-square test at about four standard deviations; what is impossible never came."""
    counts = torch.bincount(tokens, minlength=len(probabilities)).double()
    expected = probabilities.double() * len(tokens)
    assert counts[expected == 0].sum() == 0
    counts, expected = counts[expected > 0], expected[expected > 0]
    if (rare := expected < 5).any():  # too few for the test: as one
        counts, expected = (torch.cat([x[~rare], x[rare].sum()[None]]) for x in (counts, expected))
    statistic, freedom = ((counts - expected) ** 2 / expected).sum(), len(counts) - 1
    assert statistic < freedom + 4 * (2 * freedom) ** 0.5 + 6, (statistic, counts, expected)


@pytest.fixture
def make_folder(tmp_path):
    """write_folder under tmp_path, by a name."""
    return lambda name='letters', **settings: write_folder(tmp_path / name, **settings)


@contextmanager
def signals_kept():
    """A script that runs within the tests installs its own handlers; afterwards they are as before."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
    handlers = {number: signal.getsignal(number) for number in numbers}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


@contextmanager
def largest_file(size):
    """As on a full disk: no file can grow beyond so many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextmanager
def several_scripts():
    """In a process of a rank: a script does not leave it at its end, as the next one is to come; this does."""
    leave, os._exit = os._exit, lambda status: None
    yield
    leave(0)


# ---------------------------------------------------------------------------- models of transformers

HF_VOCAB = 260
OPT = dict(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=64, max_position_embeddings=128
)
LLAMA = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
)
LLAMA3_ROPE = dict(
    rope_type='llama3',
    rope_theta=500.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=32,
)
LINEAR_ROPE = dict(rope_type='linear', rope_theta=1e5, factor=4.0)
SMOLLM_ROPE = dict(rope_type='default', rope_theta=1e5)
HF_MODELS = {  # name: class, what its config says
    'gpt2': ('GPT2', dict(n_embd=32, n_layer=2, n_head=4, n_positions=128)),
    'opt': ('OPT', dict(OPT, word_embed_proj_dim=32)),
    'opt-350m': ('OPT', dict(OPT, word_embed_proj_dim=16, do_layer_norm_before=False)),
    'llama': ('Llama', LLAMA),
    'llama-3.2': ('Llama', dict(LLAMA, rope_parameters=LLAMA3_ROPE, tie_word_embeddings=True, head_dim=12)),
    'deepseek-coder': ('Llama', dict(LLAMA, num_key_value_heads=4, rope_parameters=LINEAR_ROPE)),
    'tinyllama': ('Llama', dict(LLAMA, rms_norm_eps=1e-5)),
    'smollm': ('Llama', dict(LLAMA, rope_parameters=SMOLLM_ROPE, tie_word_embeddings=True)),
    'mistral': ('Mistral', dict(LLAMA, sliding_window=None)),
    'qwen2': ('Qwen2', dict(LLAMA, tie_word_embeddings=True)),
    'qwen2-untied': ('Qwen2', LLAMA),
    'qwen3': ('Qwen3', dict(LLAMA, head_dim=16, tie_word_embeddings=True)),
}


def hf_model(name, folder, **changes):
    """A model of transformers saved in `folder`: every weight is random, norms and biases too."""
    transformers = pytest.importorskip('transformers', reason='transformers is not installed')
    transformers.logging.set_verbosity_error()
    kind, shape = HF_MODELS[name]
    config = getattr(transformers, kind + 'Config')(**{'vocab_size': HF_VOCAB, **shape, **changes})
    suffix = 'LMHeadModel' if kind == 'GPT2' else 'ForCausalLM'
    model = getattr(transformers, kind + suffix)(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(0.3 * torch.randn(weight.shape, generator=generator) + 0.6 * (weight.dim() == 1))
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder)
    return model


def write_llama_tokenizer(folder, says='tokenizer.json'):
    """A byte-level tokenizer of 256 bytes, <s> and </s>; the file `says` that <s> stands before a text."""
    inner = byte_level({character: byte for byte, character in CHARACTERS.items()}, [])
    inner.add_special_tokens(['<s>', '</s>'])
    settings = {'bos_token': '<s>', 'eos_token': {'content': '</s>'}}
    settings['tokenizer_class'] = 'PreTrainedTokenizerFast'
    if says == 'tokenizer.json':
        template = tokenizers.processors.TemplateProcessing('<s> $A', '<s> $A $B', [('<s>', 256)])
        inner.post_processor = template
    else:
        settings['add_bos_token'] = True
    inner.save(str(folder / 'tokenizer.json'))
    (folder / 'tokenizer_config.json').write_text(json.dumps(settings))
    return inner


def hf_tokens(rows=2, length=60):
    return torch.randint(0, HF_VOCAB, (rows, length), generator=torch.Generator().manual_seed(1))


def write_checkpoint(path, model, tokenizer=None, **changes):
    """A ckpt.pt of a model, as train.py leaves it."""
    checkpoint = {
        'architecture': architecture_name(model),
        'global_step': 7,
        'model_state_dict': model.state_dict(),
        'model_config': vars(model.config),
        'train_config': {},
        'tokenizer': tokenizer and tokenizer.to_json(),
        'start_token': 0,
        'prompt_format': None,
    }
    checkpoints.save(path, {**checkpoint, **changes})


def write_small_checkpoint(path, architecture, tokenizer, deviation=0.3, **saved):
    """Write a checkpoint of a small model of random weights; `saved` goes over what it says beside them."""
    shape = dict(block_size=32, n_layer=1, n_head=2, n_embd=16, vocab_size=tokenizer.vocab_size)
    shape.update(mask_id=tokenizer.mask_id, ignore_id=tokenizer.ignore_id, **saved.pop('shape', {}))
    model = random_model(architecture, deviation, **shape)
    path.parent.mkdir(exist_ok=True)
    checkpoint = {
        'architecture': architecture,
        'global_step': 7,
        'model_state_dict': model.state_dict(),
        'model_config': vars(model.config),
        'tokenizer': tokenizer.to_json(),
        'start_token': tokenizer.endoftext_id,
        'prompt_format': None,
    }
    checkpoints.save(path, {**checkpoint, **saved})
    return path


# ---------------------------------------------------------------------------- of the prepare scripts

SHARED = Path(__file__).resolve().parent.parent.parent / 'shared' / 'data'
TIKTOKEN_CACHE = Path(os.environ.get('TIKTOKEN_CACHE_DIR', SHARED / 'tiktoken_cache'))


@pytest.fixture
def prepare(monkeypatch, tmp_path):
    """Runs a script of prepare/ in this process; returns the folder that it wrote."""

    def run(script, *arguments, output_dir=tmp_path / 'out'):
        words = [script, f'--output_dir={output_dir}', '--num_workers=1', *map(str, arguments)]
        monkeypatch.setattr(sys, 'argv', words)
        runpy.run_path(str(ROOT / 'prepare' / script), run_name='__main__')
        return output_dir

    return run


def make_texts(count, seed=0):
    words = 'the cat sat on a mat while every dog in Zürich was singing loudly and nobody cared'.split()
    draw = random.Random(seed)
    return [' '.join(draw.choices(words, k=draw.randint(3, 30))) + f' {i}.\n' for i in range(count)]


def write_jsonl(path, texts):
    path.write_text(''.join(json.dumps({'text': text}) + '\n' for text in texts))
    return path


def config_of(folder):
    return json.loads((folder / 'config.json').read_text())


def documents_of(folder, split):
    """Token ids of each document of a prepared folder."""
    tokens = np.fromfile(folder / f'{split}_tokens.bin', config_of(folder)['dtype'])
    index = np.fromfile(folder / f'{split}_index.bin', np.uint64).astype(int)
    assert index[0] == 0 and index[-1] == len(tokens)
    return [tokens[start:end].tolist() for start, end in zip(index, index[1:])]


def texts_of(folder, *splits):
    """The texts of a prepared folder's documents, by default of both splits."""
    tokenizer = Tokenizer.load(folder)
    return [
        tokenizer.decode(ids) for split in splits or ('train', 'val') for ids in documents_of(folder, split)
    ]


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}
