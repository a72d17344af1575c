"""
Prepare instruction data: prompts to be read, answers to be learned.

    $ python prepare/instruct.py --source=alpaca_1k.json --name=alpaca --tokenizer=out/base/ckpt.pt
    $ python prepare/instruct.py --source=dolly --tokenizer=gpt2 --prompt_format=chatml

Records of Alpaca (instruction, input, output), Dolly (context, response), prompt and completion, `messages`,
ShareGPT's `conversations`, or plain text (--field=text).
"""
import sys
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import prompts
import runtime
from configurator import UserError, check_range, configure
from prepare import readers, tokenizer as tokenizers
from prepare.examples import Examples, conversation
from prepare.writer import Source, write

source = ''                     # alpaca, dolly, a data set of the Hugging Face hub, or .json, .jsonl, .parquet files
field = ''                      # of records that are plain text: the field that holds it
prompt_format = 'default'       # default, alpaca, qa, chatml, llama3: see prompts.py
max_seq_len: int = None         # tokens of the longest example; None: as many as the tokenizer's model reads, or 1024
max_examples = 0                # the first ones only; 0: all
name = ''                       # of the folder under data/; the source's if not given
output_dir = ''                 # a path to write to instead
tokenizer = 'bpe'               # a checkpoint or the path of a tokenizer.json or its folder; or char, bytes, gpt2, bpe
vocab_size = 8192               # of a bpe, the three special tokens included
tokenizer_sample_mb = 100       # megabytes of the training text, from its start, that a bpe is trained on
val_fraction = 0.1              # share of the examples for validation, by hash
num_workers = 0                 # processes that encode; 0 is one per core
overwrite = False               # replace a finished folder that was prepared otherwise
config = configure(globals())

HUB = {'alpaca': 'tatsu-lab/alpaca', 'dolly': 'databricks/databricks-dolly-15k'}


def read(record, where):
    return conversation(record, where, field)


def from_hub(repository):
    """The Source of the training split of a data set of the hub, at the revision that is the newest now."""
    import datasets  # these two take seconds to import: only where they are wanted
    import huggingface_hub
    try:
        revision = huggingface_hub.HfApi().dataset_info(repository).sha
        rows = datasets.load_dataset(repository, revision=revision, split='train', streaming=True)
    except Exception as error:  # the client's, the network's and httpx' own errors have no common class
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f'--source={source} is no file here, and the data set {repository} of the hub could not be '
                        f'read ({reason}); correct the name, connect to '
                        'the network, or give a file.') from error

    def documents():
        return ((read(row, f'{repository}, row {number}'), 1) for number, row in enumerate(rows, 1))
    return Source(repository, documents, {repository: revision}, 0, ' examples')


def base_settings():
    """(block size, start token) of the checkpoint that --tokenizer names; nothing where it names none."""
    path = Path(tokenizer)
    if tokenizer in tokenizers.KINDS or not (path.suffix == '.pt' or (path / 'ckpt.pt').is_file()):
        return None, None
    base = runtime.load_checkpoint(tokenizer)
    start, special = base.get('start_token'), tokenizers.build(tokenizer).special_ids
    return base['model_config']['block_size'], start if start in special.values() else None


if __name__ == '__main__':
    check_range(config, 0, float('inf'), 'max_examples')
    if not source:
        raise UserError('There is nothing to read: give --source=alpaca, dolly, FILE.json, or a data set of the hub.')
    form = prompts.named(prompt_format)
    block_size, start_token = base_settings()
    config['max_seq_len'] = max_seq_len = max_seq_len or block_size or 1024
    check_range(config, 8, float('inf'), 'max_seq_len')
    config['name'] = name or Path(source.partition(',')[0]).stem
    is_hub = source in HUB or Path(source).suffix.lower() not in readers.READERS and source.count('/') == 1
    examples = from_hub(HUB.get(source, source)) if is_hub else readers.files(source, field, read)
    if max_examples:
        every = examples.documents
        examples.documents = lambda: islice(every(), max_examples)
    examples.examples = Examples(form, max_seq_len, start_token)
    write(examples, config)
