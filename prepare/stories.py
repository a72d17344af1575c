"""Prepare stories that a grammar tells: no network, as many as wanted, and the best possible loss is known.

$ python prepare/stories.py --num_stories=20000 --seed=0
"""

import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from lm.configurator import check_range, configure
from prepare import grammar
from prepare.readers import Source
from prepare.writer import write

num_stories = 20000  # how many to tell
seed = 0  # of the teller; more stories from the same seed begin with the same ones
name = 'stories'  # of the folder under data/
output_dir = ''  # a path to write to instead
tokenizer = 'bpe'  # char, bytes, gpt2, bpe, or the path of a tokenizer.json or a prepared folder
vocab_size = 1536  # of a bpe, the three special tokens included; nearly every word is a token
tokenizer_sample_mb = 2.0  # megabytes of the training stories that a bpe is trained on
val_fraction = 0.05  # share of the stories for validation, by hash
num_workers = 0  # processes that encode; 0 is one per core
overwrite = False  # replace a finished folder that was prepared otherwise
config = configure(globals())


def documents(done=0, state=None):
    return ((story, 1) for story in grammar.stories(num_stories, seed, done))


if __name__ == '__main__':
    check_range(config, 2, math.inf, 'num_stories')
    source = Source('prepare/grammar.py', documents, grammar.VERSION, num_stories, ' stories')
    floor = write(source, config, grammar.log_prob)['floor']
    figures = ', '.join(f'{nats:.4f} {unit.replace("_", " ")}' for unit, nats in floor.items())
    print(f'\n{next(grammar.stories(1, seed))}\n')
    print(f'The best expected loss on the validation stories: {figures}.')
