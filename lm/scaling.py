"""Turn --depth=N into shape, rows, steps and rates, by rules measured on three corpora (docs/LOG.md)."""

from lm import data
from lm.configurator import note, require
from model import ARCHITECTURES

WIDTH = 32  # of a layer, per layer: as wide as it is deep, with heads of 32
RATIO = 5  # training tokens per parameter that a step multiplies with; measured: between 1 and 19
STEP_TOKENS, TOKENS = 2048, 2e6  # of a step, in a run of TOKENS tokens
GROWTH = 0.4  # a step's tokens grow by this power of the run's
RATE = 0.18  # of a model of one layer in one step; falls as 1 / depth, as in muP, and as steps ** -0.2
WHOLE_ROWS = 1.5  # times that, where masks are of whole rows
EPOCHS, EPOCHS_OF_WHOLE_ROWS = 5, 40  # at most; measured: in more, a text is learned by heart
EPOCHS_OF_DECAY = 3  # in more the embedding is decayed too: worse in one epoch, better in five


def settings(config, folder, world_size):
    """Return {setting: value} of a model of config['depth'] layers for the data of a folder; as fits a run of
    max_steps, where they are given. Raises UserError beside a shape, a start or epochs."""
    depth, given = config['depth'], config.given & {'model_size', 'init_from', 'num_epochs'}
    problem = f'depth={depth} sets shape and steps of a new model by itself'
    require(not given, f'{problem}; leave out {" and ".join(given)}, or say how long by --max_steps.')
    architecture = ARCHITECTURES[config['architecture']]
    width, block_size = WIDTH * depth, config['block_size']
    is_of_rows = not architecture.causal and not any(config['block_length'] or ())
    rows = data.make_rows(folder, 'train', architecture, block_size, config['mode'], training=False)
    epoch, most = rows.num_rows * block_size, EPOCHS_OF_WHOLE_ROWS if is_of_rows else EPOCHS

    tokens = RATIO * (12 * depth * width**2 + folder.tokenizer.vocab_size * width)
    max_steps = config['max_steps'] if 'max_steps' in config.given else 0
    if max_steps > 0:  # steps grow with the tokens of a run: tokens = steps * tokens of a step
        tokens = (max_steps * STEP_TOKENS / TOKENS**GROWTH) ** (1 / (1 - GROWTH))
    elif tokens > most * epoch:
        problem = f'depth={depth} would go through this text {tokens / epoch:.0f} times and overfit'
        note(f'{problem}; it does so {most} times, unless --max_steps says how long.')
        tokens = most * epoch
    row_tokens = block_size * config['gradient_accumulation_steps'] * world_size
    batch_size = max(1, round(STEP_TOKENS * (tokens / TOKENS) ** GROWTH / row_tokens))
    batch_size = config['batch_size'] if 'batch_size' in config.given else batch_size
    max_steps = max_steps if max_steps > 0 else max(1, round(tokens / (batch_size * row_tokens)))

    rate = float(f'{RATE * (WHOLE_ROWS if is_of_rows else 1) / depth / max_steps**0.2:.1e}')
    decays = max_steps * batch_size * row_tokens > EPOCHS_OF_DECAY * epoch
    shape = dict(n_layer=depth, n_head=depth, n_embd=width, batch_size=batch_size, max_steps=max_steps)
    shape |= dict(optimizer='muon', learning_rate=rate, weight_decay=0.1, decay_embedding=decays)
    return shape | dict(schedule='linear')
