"""Turn --depth=N into shape, rows, steps and rate, by rules measured on two corpora at depths 2 to 6 (docs/LOG.md)."""

from lm.configurator import require
from model import ARCHITECTURES

WIDTH = 32  # of a layer, per layer: as wide as it is deep, with heads of 32
RATIO = 5  # training tokens per parameter that a step multiplies with; measured: between 1 and 19
STEP_TOKENS, TOKENS = 2048, 2e6  # of a step, in a run of TOKENS tokens
GROWTH = 0.4  # a step's tokens grow by this power of the run's
RATE = 0.15  # of a model of one layer in one step; falls as 1 / depth, as in muP, and as steps ** -0.2
WHOLE_ROWS = 1.5  # times that, where masks are of whole rows


def settings(config, vocab_size, world_size):
    """Return {setting: value} of a model of config['depth'] layers; as fits a run of max_steps, where they are given.
    Raises UserError beside a shape, a start or epochs."""
    depth, given = config['depth'], config.given & {'model_size', 'init_from', 'num_epochs'}
    problem = f'depth={depth} sets shape and steps of a new model by itself'
    require(not given, f'{problem}; leave out {" and ".join(given)}, or say how long by --max_steps.')
    width = WIDTH * depth
    parameters = 12 * depth * width**2 + vocab_size * width
    tokens, max_steps = RATIO * parameters, config['max_steps'] if 'max_steps' in config.given else 0
    if max_steps > 0:  # steps grow with the tokens of a run: tokens = steps * tokens of a step
        tokens = (max_steps * STEP_TOKENS / TOKENS**GROWTH) ** (1 / (1 - GROWTH))
    row_tokens = config['block_size'] * config['gradient_accumulation_steps'] * world_size
    batch_size = max(1, round(STEP_TOKENS * (tokens / TOKENS) ** GROWTH / row_tokens))
    batch_size = config['batch_size'] if 'batch_size' in config.given else batch_size
    max_steps = max_steps if max_steps > 0 else max(1, round(tokens / (batch_size * row_tokens)))
    is_of_rows = not ARCHITECTURES[config['architecture']].causal and not any(config['block_length'] or ())
    rate = float(f'{RATE * (WHOLE_ROWS if is_of_rows else 1) / depth / max_steps**0.2:.1e}')
    shape = dict(n_layer=depth, n_head=depth, n_embd=width, batch_size=batch_size, max_steps=max_steps)
    return shape | dict(optimizer='muon', learning_rate=rate, weight_decay=0.1, schedule='linear')
