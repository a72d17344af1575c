"""Prepare tiny Shakespeare, a megabyte of plays: one document, split as in nanoGPT.

$ python prepare/shakespeare.py                       # data/shakespeare_char
$ python prepare/shakespeare.py --tokenizer=gpt2      # data/shakespeare_gpt2
"""

import hashlib
import sys
import urllib.request
from functools import cache
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from lm.configurator import configure, require
from lm.files import as_sentence
from prepare.readers import Source, files
from prepare.writer import write

input = ''  # the file itself; where none is given it is downloaded
name = ''  # of the folder under data/; shakespeare_TOKENIZER if not given
output_dir = ''  # a path to write to instead
tokenizer = 'char'  # char, bytes, gpt2, bpe, or the path of a tokenizer.json or a prepared folder
vocab_size = 1024  # of a bpe, the three special tokens included
tokenizer_sample_mb = 100.0  # megabytes of the training text that a bpe is trained on
val_fraction = 0.1  # share of the characters, at the end, for validation
num_workers = 0  # processes that encode; 0 is one per core
overwrite = False  # replace a finished folder that was prepared otherwise
config = configure(globals())

URL = 'https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt'
SHA256 = '86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed'


@cache
def download():
    """Return the text; called only where there is no finished folder to reuse."""
    with as_sentence(f'{URL} could not be downloaded', 'give a copy with --input=FILE'):
        content = urllib.request.urlopen(URL, timeout=30).read()
    is_known = hashlib.sha256(content).hexdigest() == SHA256
    require(is_known, f'{URL} gives another file now; give a copy with --input=FILE.')
    return content.decode()


if __name__ == '__main__':
    config['name'] = name or f'shakespeare_{Path(tokenizer).stem}'
    online = Source(URL, lambda done=0, state=None: [(download(), 1)][done:], {URL: SHA256}, 1, ' texts')
    write(files(input, field='text') if input else online, config)
