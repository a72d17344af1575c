"""Run tasks of lm-evaluation-harness on any checkpoint: python -m lm.harness --model_args checkpoint=PATH --tasks NAME

    python -m lm.harness --model_args checkpoint=out/ar-books-tiny-v1 --tasks lambada_openai --limit 200
    python -m lm.harness --model_args checkpoint=GSAI-ML/LLaDA-8B-Base,draws=32,dtype=bfloat16 --tasks arc_easy

All other arguments are the harness's own. In Python:
simple_evaluate(model=harness.Checkpoint(checkpoint=PATH), tasks=[...]).

A log-likelihood is exact for `ar`. For the other architectures it is minus a bound of the nll of the continuation
given its context (of the sampler that `order` names in the results), a mean over `draws` of its masks; as numbers of
masked tokens are drawn, not probabilities (Nie et al. 2025, LLaDA, equation 6), and spread evenly over the draws. They
depend on a request's tokens alone, not on its batch. "Greedy" is then the text that is written surest token first.
"""

import sys
import zlib
from collections import defaultdict
from itertools import chain, islice
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from lm import chat, checkpoints, data, likelihood, pretrained, prompts, runtime
from lm.configurator import ROOT, note, require, user_errors
from lm.files import as_sentence
from lm.tokenizer import Tokenizer
from model import T_MIN, architecture_name
from sampling import generate

with as_sentence('lm-evaluation-harness cannot be imported', 'pip install "lm_eval>=0.4.10"'):
    path = sys.path
    sys.path = [folder for folder in path if Path(folder).resolve() != ROOT]
    import evaluate  # noqa: F401  Hugging Face's, which tasks such as humaneval mean: not the script evaluate.py

    sys.path = path
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window


@register_model('diffusion-lm')
class Checkpoint(TemplateLM):
    """A checkpoint as the harness sees a model.

    draws: mask ratios per request, for what is not exact; add_bos: whether a context begins with the start token, None:
    as its own tokenizer does it, and always for checkpoints that were trained here. options: sampler and steps, of
    `generate`; without a sampler greedy texts are written surest token first.
    """

    eot_token_id = prefix_token_id = tokenizer_name = None  # properties in the harness, set below

    def __init__(
        self, checkpoint='', batch_size=16, device='auto', dtype='float32', draws=128, add_bos=None, **options
    ):
        super().__init__()
        unknown = options.keys() - {'sampler', 'steps', 'max_batch_size'}
        options.pop('max_batch_size', None)  # which the harness gives in any case
        require(not unknown, f'model_args has {", ".join(unknown)}, which is unknown; correct the name.')
        require(checkpoint, 'No checkpoint is given; name one: --model_args checkpoint=PATH.')
        batch_size = 16 if batch_size == 'auto' else batch_size
        for name, number in {'draws': draws, 'batch_size': batch_size}.items():
            is_number = str(number).isdecimal() and int(number) >= 1
            require(is_number, f'{name} is {number}; give a number, at least 1.')
        self.dist, self.path = runtime.Runtime(device, dtype), str(checkpoint)
        state = checkpoints.load(self.path)
        if options.get('sampler') == 'ar':
            state = checkpoints.as_ar(state, self.path)
            del options['sampler']
        self.model = checkpoints.load_model(state, self.dist.device)
        self.max_length = self.model.config.block_size
        self.batch_size, self.draws, self.said = int(batch_size), int(draws), set()
        self.options = {} if self.model.causal else options
        idle = ['draws'] * (draws != 128) + [name for name, value in options.items() if value]
        if self.model.causal and idle:
            note(f'{", ".join(idle)} has no effect on {architecture_name(self.model)}.')
        self.take_tokenizer(state, add_bos)
        each = f', {draws} draws each' * self.model.needs_noise
        note(f'{self.path}: log-likelihoods are minus {runtime.describe_loss(self.model)}{each}')

    def take_tokenizer(self, state, add_bos):
        """Take the tokenizer of a checkpoint, and decide what stands before a text."""
        came_with, start = state.get('came_with') or {}, state['start_token']
        self.is_ours = pretrained.is_ours(state)
        begin = None if self.is_ours else came_with.get('bos_token')
        self.prefix_token_id = start if begin is None else begin
        # As what chat templates write it.
        self.text = Tokenizer(state['tokenizer'], start=self.prefix_token_id)
        told = came_with.get('tokenizer_config', {}).get('add_bos_token')
        adds_it = self.is_ours or told or start in self.text.inner.encode('a').ids[:1]
        self.start = [start] * bool(adds_it if add_bos is None else add_bos)
        self.form = state.get('prompt_format') or prompts.DEFAULT
        self.ends = prompts.stop_tokens(state, self.text)
        self.eot_token_id, self.tokenizer_name = self.ends[0], self.path.replace('/', '__')
        for name in came_with.get('added_tokens', ()):  # names that its own tokenizer does not know
            self.text.special_ids.pop(name, None)

    @classmethod
    def create_from_arg_obj(cls, arg_dict, additional_config=None):
        """Make it from model_args, which count more than the arguments of the same names beside them."""
        return cls(**{**(additional_config or {}), **arg_dict})

    def get_model_info(self):
        model = self.model
        about = {'architecture': architecture_name(model), 'bound': model.bound, 'order': model.order}
        return {**about, 'draws': self.draws if model.needs_noise else None}

    def chat_template(self, chat_template=False):
        return prompts.chat_template(self.form, self.text) if chat_template else ''

    def apply_chat_template(self, chat_history, add_generation_prompt=True):
        """Return a conversation as a text, with the names of special tokens in it."""
        text = chat.render(self.chat_template(True), self.text, chat_history, add_generation_prompt)
        said = chat_history[-1]['content']  # which is to be continued, unless the prompt is complete
        said = said if said in text else said.strip()
        return text if add_generation_prompt else text[: text.rindex(said) + len(said)]

    def tok_encode(self, string, add_special_tokens=None, **_):
        """Return token ids; the name of a special token is that token, as for the harness's own models."""
        ids = prompts.encode_parts(self.text, [(string, True)])
        begins = add_special_tokens is False or ids[:1] == self.start
        return ids if begins else [*self.start, *ids]

    # ------------------------------------------------------------------------ likelihood

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
        """Return the log-likelihood of each text, in windows as the harness cuts them."""
        windows = []
        for request in requests:
            # The prefix stands before it; the harness's own models count their start token once more.
            tokens = self.tok_encode(request.args[0], add_special_tokens=False if self.is_ours else None)
            length = self.max_length - (not self.model.causal)  # of a window, without its first token
            cut = get_rolling_token_windows(tokens, self.prefix_token_id, length, context_len=1)
            windows.append([(None, *make_disjoint_window(window)) for window in cut])
        found = iter(self._loglikelihood_tokens([*chain(*windows)], disable_tqdm))
        return [sum(value for value, _ in islice(found, len(of_one))) for of_one in windows]

    def _loglikelihood_tokens(self, requests, disable_tqdm=False, **_):
        """Return [(log-likelihood, whether it is what is written greedily)] of [(texts, context, continuation)]."""
        longest, rows = self.max_length + self.model.causal, []
        for _, context, continuation in requests:
            size, context = len(continuation), context or [self.prefix_token_id]
            require(size < longest, f'A continuation has {size} tokens, and the block {longest}; shorten it.')
            rows.append((tuple((context + continuation)[-longest:]), size))
        found = {row: (0.0, True) for row in rows if not row[1]}  # within the last token of the context
        different = sorted({*rows} - {*found})
        batches = likelihood.batches_of(self.model, different, lambda row: len(row[0]), self.batch_size)
        for batch in tqdm(batches, 'log-likelihoods', disable=disable_tqdm or None):
            found.update(zip(batch, self.measure(batch)))
        return [found[row] for row in rows]

    @torch.inference_mode()
    def measure(self, rows):
        """Return [(log-likelihood, is greedy)] of rows (ids, how many of the last are the continuation)."""
        masks = [np.arange(len(ids)) >= len(ids) - count for ids, count in rows]
        batch = data.collate([(ids, mask) for (ids, _), mask in zip(rows, masks)], None).to(self.dist.device)
        draws, nll = self.draws if self.model.needs_noise else 1, 0
        by_count = not any(self.model.config.block_length)  # blocks do so themselves
        for draw in range(draws):
            noise = noise_of(rows, batch.tokens.size(1), draw, draws, by_count).to(self.dist.device)
            with self.dist.autocast():
                values, _, metrics = self.model(batch.tokens, batch.loss_mask, noise, reduction='none')
            nll = nll + values.cpu().double().sum(1) / draws
        if self.model.causal:
            is_greedy = metrics['correct'].sum(1) == batch.loss_mask.sum(1)
            return list(zip((-nll).tolist(), is_greedy.tolist()))
        hidden = [[*ids[:-count], *[self.model.config.mask_id] * count] for ids, count in rows]
        with self.dist.autocast():
            written = generate(self.model, hidden, 0, temperature=0, sampler='confidence')
        return [(-value, tuple(text) == ids) for value, text, (ids, _) in zip(nll.tolist(), written, rows)]

    # ------------------------------------------------------------------------ texts

    def generate_until(self, requests, disable_tqdm=False):
        """Return the continuation of each context up to the first text of `until`, by batches of the same settings."""
        groups, texts, size = defaultdict(list), {}, self.batch_size
        for number, request in enumerate(requests):
            groups[repr(sorted(request.args[1].items()))].append(number)
        with tqdm(total=len(requests), desc='texts', disable=disable_tqdm or None) as bar:
            for group in groups.values():
                settings = self.read_settings(requests[group[0]].args[1])  # reads the whole vocabulary
                for batch in (group[i : i + size] for i in range(0, len(group), size)):
                    contexts = [requests[number].args[0] for number in batch]
                    texts |= zip(batch, self.write(contexts, *settings, seed=batch[0]))
                    bar.update(len(batch))
        return [texts[number] for number in range(len(requests))]

    def read_settings(self, settings):
        """Return a task's length, the texts that end a text, and the options of `generate` for its settings."""
        until = settings.get('until') or []
        until = [until] if isinstance(until, str) else [end for end in until if end]
        names = ('max_gen_toks', 'max_new_tokens', 'max_tokens', 'max_completion_tokens')
        length = int(next((settings[name] for name in names if settings.get(name)), 256))
        problem = f'max_gen_toks is {length}, and the block has {self.max_length}'
        require(length < self.max_length, f'{problem}; give --gen_kwargs max_gen_toks=N.')
        draws = settings.get('do_sample', settings.get('temperature', 0) > 0)
        options = {**self.options, 'temperature': settings.get('temperature', 1.0) if draws else 0}
        options |= {name: settings[name] for name in ('top_k', 'top_p') if draws and settings.get(name)}
        if not self.model.causal and not draws:  # one answer to a request, whatever stands beside it
            options['sampler'] = options.get('sampler') or 'confidence'
        unread = settings.keys() - {'until', 'do_sample', 'temperature', 'top_k', 'top_p', *names}
        if unread := sorted(unread - self.said):
            self.said.update(unread)
            note(f'{", ".join(unread)} of a task has no effect here.')
        ids = range(self.text.vocab_size if until else 0)
        words = self.text.inner.decode_batch([[i] for i in ids], skip_special_tokens=False)
        stops = [i for i in ids if any(end in words[i] for end in until)]  # no text goes on after these
        return length, until, {**options, 'stop_tokens': {*self.ends, *stops}}

    def write(self, contexts, length, until, options, seed):
        """Return what is written after each context, up to the first text of `until`."""
        heads = [self.tok_encode(context)[length - self.max_length :] for context in contexts]
        with self.dist.autocast(), user_errors():
            rows = generate(self.model, heads, length, seed=seed, **options)
        texts = [self.text.decode(row[len(head) :]) for row, head in zip(rows, heads)]
        return [text[: min((text.find(end) for end in until if end in text), default=None)] for text in texts]


def noise_of(rows, length, draw, draws, by_count):
    """Return noise (B, 1 + length) of one of several draws: a mask ratio t per row, of which each draw has its share.

    by_count: such that ⌈t L⌉ of the L tokens of each continuation are masked, with the weight L / ⌈t L⌉.
    """
    noise = np.ones((len(rows), 1 + length))
    for row, (ids, count) in zip(noise, rows):
        rng = np.random.default_rng([zlib.crc32(np.array(ids)), draw])
        row[0] = (draw + rng.uniform()) / draws
        row[1 + len(ids) - count : 1 + len(ids)] = rng.uniform(size=count)
        if by_count:
            ratio = (np.ceil(row[0] * count) / count - T_MIN) / (1 - T_MIN)  # as `mask_ratio` undoes
            row[0] = np.clip(ratio, 0, 1 - 2**-24)  # two streams take it modulo 1
            row[1 + len(ids) - count : 1 + len(ids)] = (rng.permutation(count) + 0.5) / count
    return torch.from_numpy(noise.astype(np.float32))


def main():
    """Run the harness's own command with our model."""
    from lm_eval.__main__ import cli_evaluate

    own = '--model diffusion-lm --device auto --batch_size 16'  # its defaults are a GPU and 1
    sys.argv[1:1] = ['run', *own.split()]
    cli_evaluate()


if __name__ == '__main__':
    main()
