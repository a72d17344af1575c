"""What can be said about texts and numbers without a model: diversity, overlap, intervals, kept instructions.

Samples are lists of token ids or of words. A figure that cannot be computed is None, never a wrong number;
each docstring says when. The figures of diversity depend on how many samples there are and on how long: read
them beside the same figure for as much held-out text of the same length.
"""

import bisect
import json
import math
import re
import string
from collections import Counter
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from lm.configurator import UserError

# ---------------------------------------------------------------------------- diversity of samples


def ngrams(tokens, n):
    """The len(tokens) - n + 1 n-grams of a sequence in their order, as tuples; none of a shorter one."""
    tokens = tokens.tolist() if hasattr(tokens, 'tolist') else tokens  # elements of a tensor hash by identity
    return list(zip(*(tokens[i:] for i in range(n))))


def distinct(samples, n):
    """distinct-n: different n-grams over all n-grams of all samples, in (0, 1] (Li et al. 2016, 1510.03055).

    None where no sample has n tokens.
    """
    grams = [gram for sample in samples for gram in ngrams(sample, n)]
    return len(set(grams)) / len(grams) if grams else None


def rep(samples, n=4):
    """rep-n: the share of n-grams that occurred earlier in the same sample, in [0, 1) (Welleck et al. 2020).

    Over the n-grams of all samples, so that a sample weighs as much as it has n-grams; for samples of one
    length that is the mean of their 1 - unique / total (1908.04319). None where no sample has n tokens.
    """
    grams = [ngrams(sample, n) for sample in samples]
    total = sum(map(len, grams))
    return 1 - sum(len(set(of_sample)) for of_sample in grams) / total if total else None


def entropy(samples):
    """Entropy in nats of the tokens of all samples pooled, in [0, ln of how many differ]. None if none.

    The plug-in estimate -Σ p ln p, which is low by about (how many differ) / (2 · tokens).
    """
    counts = np.array(list(Counter(gram for sample in samples for gram in ngrams(sample, 1)).values()))
    if len(counts) == 0:
        return None
    p = counts / counts.sum()
    return float(abs(p @ np.log(p)))  # abs instead of minus: one token alone is 0, not -0


def self_bleu(samples, n):
    """Self-BLEU-n: the mean over samples of BLEU-n against all the others, in [0, 1]; high: alike.

    Zhu et al. 2018 (Texygen, 1802.01886) with the BLEU of Papineni et al. 2002: the geometric mean of the
    clipped 1..n-gram precisions, times exp(1 - r / c) for a sample of c tokens shorter than r, the length of
    the other sample that comes closest (of two, the shorter). Not smoothed: a sample that shares no n-gram of
    some order with any other has BLEU 0, where Texygen puts 0.1 for the missing match.
    Samples of fewer than n tokens have no n-gram and are left out on both sides; None if fewer than 2 remain.
    """
    samples = [sample for sample in samples if len(sample) >= n]
    if len(samples) < 2:
        return None
    log_precisions = np.zeros(len(samples))
    for order in range(1, n + 1):
        counts = [Counter(ngrams(sample, order)) for sample in samples]
        best = two_largest(counts)
        for i, of_sample in enumerate(counts):
            # The most often that any other sample has the n-gram: the runner-up's count if this one leads.
            matches = sum(min(count, best[gram][count == best[gram][0]]) for gram, count in of_sample.items())
            log_precisions[i] += math.log(matches / of_sample.total()) / n if matches else -math.inf
    lengths = sorted(map(len, samples))
    penalties = [min(0.0, 1 - closest_other(lengths, len(sample)) / len(sample)) for sample in samples]
    return float(np.exp(log_precisions + penalties).mean())


def two_largest(counts):
    """{n-gram: (its largest count in one sample, its largest count in another)}, the second 0 if in none."""
    best = {}
    for of_sample in counts:
        for gram, count in of_sample.items():
            first, second = best.get(gram, (0, 0))
            best[gram] = (count, first) if count > first else (first, max(second, count))
    return best


def closest_other(lengths, length):
    """The element of sorted `lengths` closest to `length`, one element that equals it aside."""
    i = bisect.bisect_left(lengths, length)
    neighbours = lengths[max(0, i - 1) : i] + lengths[i + 1 : i + 2]
    return min(neighbours, key=lambda other: (abs(other - length), other))


# ---------------------------------------------------------------------------- overlap with a reference


def rouge_l(text, reference):
    """ROUGE-L (Lin 2004): F1 of the longest common subsequence of words, in [0, 1].

    Words are runs of letters and digits in lower case, not stemmed. An empty text scores 0; None where the
    reference has no words.
    """
    text, reference = (re.findall(r'\w+', words.lower()) for words in (text, reference))
    if not reference:
        return None
    return 2 * common_subsequence(text, reference) / (len(text) + len(reference))


def common_subsequence(a, b):
    """Length of the longest common subsequence, a row of the table at once as bits of an int (Hyyrö 2004)."""
    where = {}
    for i, word in enumerate(a):
        where[word] = where.get(word, 0) | 1 << i
    full = (1 << len(a)) - 1
    row = full  # a zero at i: the subsequence grows by one at a[i]
    for word in b:
        matches = row & where.get(word, 0)
        row = (row + matches | row - matches) & full
    return len(a) - row.bit_count()


def normalised(text):
    """Lower case without ASCII punctuation, articles (a, an, the) and double spaces (SQuAD, 1606.05250)."""
    text = text.lower().translate(str.maketrans('', '', string.punctuation))
    return ' '.join(re.sub(r'\b(a|an|the)\b', ' ', text).split())


def token_f1(text, reference):
    """F1 of the bags of words after SQuAD's normalisation, in [0, 1]; None if that empties the reference."""
    text, reference = (Counter(normalised(words).split()) for words in (text, reference))
    if not reference:
        return None
    return 2 * (text & reference).total() / (text.total() + reference.total())


def exact_match(text, reference):
    """1.0 if the texts are the same in SQuAD's normalisation, else 0.0. None if it empties the reference."""
    return float(normalised(text) == normalised(reference)) if normalised(reference) else None


# ---------------------------------------------------------------------------- how sure we are


class Interval(NamedTuple):
    mean: float  # None where there is no weight, or a value is not finite
    low: float  # None, like `high`, where there are too few values to tell
    high: float


def mean_ci(values, weights=None):
    """Σ values / Σ weights over independent documents with its 95 % interval, as (mean, low, high).

    A value is a document's total (nats, tokens guessed right), its weight what that is counted per (tokens,
    bytes; None: 1 each). The interval is that of a linearised ratio, mean ± t · se, with two amendments for
    a few long documents that carry most of the weight: each squared residual over 1 - h, where h is the
    document's share of the weight and (Bell & McCaffrey 2002) Satterthwaite's degrees of freedom,
    (Σ h²)² / Σ h⁴ - 1. With equal weights it is Student's interval.

    In simulations of 3 to 1000 documents of log-normal (σ 1, 1.5) or Pareto (2) length it covers 94 to 98 %,
    where plain linearisation comes down to 79 %; but 77 to 93 % of 30 to 1000 documents with Pareto (1.5)
    lengths, the variance of which is infinite. The interval is None where fewer than 2 documents have weight,
    and a point where all have the same mean: for rates of 0 or 1 it is too sure.
    """
    values, weights = of_some_weight(values, weights)
    mean = ratio(values, weights)
    if mean is None or len(values) < 2:
        return Interval(mean, None, None)
    share = weights / weights.sum()
    if share.max() == 1:  # one document's weight is all there is in float64
        return Interval(mean, None, None)
    residuals = values / weights.sum() - mean * share
    error = math.sqrt((residuals**2 / (1 - share)).sum())
    freedom = (share**2).sum() ** 2 / (share**4).sum() - 1
    margin = t_quantile(max(1.0, float(freedom))) * error
    return Interval(mean, mean - margin, mean + margin)


def paired_ci(a, b, weights=None, interval=mean_ci):
    """The difference a - b of two models on the same documents: Σ (a - b) / Σ weights, as (mean, low, high).

    What a document makes hard for both cancels, so it can tell models apart whose own intervals overlap.
    `interval` is block_bootstrap_ci for consecutive windows.
    """
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if a.shape != b.shape:
        raise ValueError(f'Measured on documents of shape {a.shape} and {b.shape}; pairs need the same ones.')
    return interval(a - b, weights)


def block_bootstrap_ci(values, weights=None, block_length=None, draws=2000, seed=0):
    """Σ values / Σ weights over consecutive windows, which resemble their neighbours, as (mean, low, high).

    The 95 % percentile interval of the circular block bootstrap (Politis & Romano 1992), widened about the
    mean for what it cannot see (see `widening`). A block has `block_length` windows; None: as many as
    `choose_block_length` says. The interval is None for fewer than 10 windows.

    In simulations of AR(1) series it covers 93 to 97 % for 30 to 400 windows whose neighbours correlate by up
    to 0.7; at 0.9 it covers 86 % for 30, 91 % for 60, 94 % from 120 on; for 10 windows, 93 % at 0.3, 90 % at
    0.5, 83 % at 0.7.
    """
    values, weights = of_some_weight(values, weights)
    mean, n = ratio(values, weights), len(values)
    if mean is None or n < 10:
        return Interval(mean, None, None)
    correlation = neighbour_correlation(values - mean * weights)
    length = min(block_length or choose_block_length(n, correlation), n // 2)
    starts = np.random.default_rng(seed).integers(0, n, (draws, math.ceil(n / length)))
    values, weights = (block_sums(series, length)[starts].sum(1) for series in (values, weights))  # (draws,)
    low, high = np.quantile(values / weights, (0.025, 0.975)) - mean
    wider = widening(n, length, correlation)
    return Interval(mean, float(mean + wider * low), float(mean + wider * high))


def neighbour_correlation(residuals):
    """Correlation of neighbours, in [0, 0.95]: the lag-1 estimate, freed from its bias (Kendall 1954)."""
    squares = residuals @ residuals
    r = residuals[1:] @ residuals[:-1] / squares if squares > 0 else 0.0
    return float(min(0.95, max(0.0, r + (1 + 3 * r) / len(residuals))))


def choose_block_length(n, correlation):
    """Twice what minimises the variance's error under AR(1) (Politis & White 2004), from n^(1/3) to n / 5.

    Twice, because coverage suffers more from the bias of short blocks than from the noise of long ones, for
    which the t quantile of `widening` makes up; at least n^(1/3) for dependence that is not AR(1).
    """
    best = (1.5 * n) ** (1 / 3) * (2 * correlation / (1 - correlation**2)) ** (2 / 3)
    return max(1, min(n // 5, math.ceil(max(2 * best, n ** (1 / 3)))))


def widening(n, length, correlation):
    """By how much the block bootstrap's interval is too narrow, as a factor.

    - n / length blocks are few: a quantile of t instead of the normal one, and n / (n - length) as in n - 1;
    - the blocks that are drawn may be longer in all than the series;
    - dependence across the ends of blocks is lost: the variance of an AR(1) mean over what blocks see of it.
    """
    drawn = math.ceil(n / length) * length
    lags = np.arange(1, length)
    seen = 1 + 2 * ((1 - lags / length) * correlation**lags).sum()
    there = (1 + correlation) / (1 - correlation)
    student = t_quantile(max(1.0, n / length - 1)) / 1.959964
    return student * math.sqrt(n / (n - length) * drawn / n * max(1.0, there / seen))


def block_sums(series, length):
    """(n,): the sum of `length` consecutive elements from each position on, around the end."""
    around = np.concatenate([series, series[: length - 1]])
    return np.lib.stride_tricks.sliding_window_view(around, length).sum(1)


def of_some_weight(values, weights):
    """(n,), (n,) float64: the documents that have weight. Raises ValueError for series that do not fit."""
    values = np.asarray(values, dtype=np.float64)
    weights = np.ones_like(values) if weights is None else np.asarray(weights, dtype=np.float64)
    if values.ndim != 1 or values.shape != weights.shape or (weights < 0).any():
        raise ValueError(
            f'Values of shape {values.shape} and weights of shape {weights.shape}: an interval '
            'needs one value and one weight, not below 0, for each document.'
        )
    return values[weights != 0], weights[weights != 0]


def ratio(values, weights):
    """Σ values / Σ weights; None where there is nothing, or something that is not finite."""
    if len(values) == 0 or not np.isfinite(values).all() or not np.isfinite(weights).all():
        return None
    return float(values.sum() / weights.sum())


@lru_cache(maxsize=1024)
def t_quantile(freedom):
    """The 97.5 % quantile of Student's t with `freedom` >= 1 degrees of freedom (need not be whole)."""
    t = np.linspace(0, 20, 4001)
    scale = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(math.pi * freedom)
    density = scale * np.exp(-(freedom + 1) / 2 * np.log1p(t * t / freedom))
    above_zero = np.concatenate([[0], np.cumsum(density[1:] + density[:-1]) * t[1] / 2])  # trapezoids
    return float(np.interp(0.475, above_zero, t))


# ---------------------------------------------------------------------------- counting in a text

LABEL = re.compile(r'^([ \t]*)(?:(\(?\d{1,2}[.)])|([-*•–]))\s+', re.M)  # of an item: "1. ", "2) ", "- "
TITLE = re.compile(r'\b(Mr|Mrs|Ms|Dr|Prof|St|vs|[A-HJ-Z])\.(?=\s)')  # a full stop that ends no sentence
GOES_ON = re.compile(r'(\betc\.|\be\.g\.|\bi\.e\.|\ba\.m\.|\bp\.m\.|\.\.\.|…)(?=\s+[a-z])')
SENTENCE_END = re.compile(r'(?<=[.!?…])\s+|(?<=[.!?…]["”\')\]])\s+(?![a-z])|\n')


def words_in(text):
    """Pieces between spaces that hold a letter or a digit: a dash alone is no word."""
    return re.findall(r'\S*\w\S*', text)


def count_sentences(text):
    """Pieces that end in . ! ? or with a line; labels of items, titles, initials and "e.g." end none."""
    text = GOES_ON.sub('', TITLE.sub(r'\1', LABEL.sub('', text)))
    return sum(bool(words_in(piece)) for piece in SENTENCE_END.split(text))


def count_bullets(text):
    """Lines labelled with number or bullet as the first one is, so that points below points do not count."""
    labels = [(indent, bullet) for indent, _, bullet in LABEL.findall(text)]
    return labels.count(labels[0]) if labels else 0


def count_items(text):
    """Items of a list in whatever form: labelled lines, else lines, else parts between commas and "and"."""
    lines = [line for line in text.splitlines() if line.strip() and not line.rstrip().endswith(':')]
    if count_bullets(text) or len(lines) > 1:
        return count_bullets(text) or len(lines)
    return sum(bool(words_in(part)) for part in re.split(r'[,;]\s|\band\b|\bor\b|&', text))


def is_json(text):
    """Whether the text, or the code block that it consists of, is a JSON object or array; a number is not."""
    fenced = re.fullmatch(r'```(?:json)?\n(.*?)\n?```', text.strip(), re.S | re.I)
    try:  # `int` refuses NaN and Infinity, which Python reads and JSON does not have
        return isinstance(json.loads(fenced[1] if fenced else text, parse_constant=int), (dict, list))
    except (ValueError, RecursionError):  # a model that got stuck writes a thousand brackets
        return False


# ---------------------------------------------------------------------------- checkable instructions


def find_phrase(phrase, text):
    """Whether the phrase stands in the text in whole words, upper or lower case."""
    before, after = (r'\b' if re.match(r'\w', end) else '' for end in (phrase[:1], phrase[-1:]))
    return re.search(before + re.escape(phrase) + after, text, re.I) is not None


def forms(text):
    """The text in lower case: as it is, without quotation marks around it, and without its last stop too."""
    plain = text.casefold().strip()
    bare = plain.strip(' "\'“”‘’*')
    return plain, bare, bare.rstrip('.!?')


CHECKS = {  # name: (type of the wish, whether an answer fulfils it)
    'contains': (str, lambda text, phrase: find_phrase(phrase, text)),
    'not_contains': (str, lambda text, phrase: not find_phrase(phrase, text)),
    'starts_with': (str, lambda text, start: any(f.startswith(start.casefold()) for f in forms(text))),
    'ends_with': (str, lambda text, end: any(f.endswith(end.casefold()) for f in forms(text))),
    'one_of': (list, lambda text, choices: any(one.casefold() in forms(text) for one in choices)),
    'regex': (str, lambda text, pattern: re.search(pattern, text) is not None),
    'words': (int, lambda text, n: len(words_in(text)) == n),
    'min_words': (int, lambda text, n: len(words_in(text)) >= n),
    'max_words': (int, lambda text, n: len(words_in(text)) <= n),
    'sentences': (int, lambda text, n: count_sentences(text) == n),
    'max_sentences': (int, lambda text, n: count_sentences(text) <= n),
    'lines': (int, lambda text, n: len(re.findall(r'^.*\S', text, re.M)) == n),  # not blank
    'bullets': (int, lambda text, n: count_bullets(text) == n),
    'items': (int, lambda text, n: count_items(text) == n),
    'contains_number': (bool, lambda text, wish: (re.search(r'\d', text) is not None) == wish),
    'is_json': (bool, lambda text, wish: is_json(text) == wish),
    'lowercase': (bool, lambda text, wish: text.islower() == wish),  # needs at least one letter
    'uppercase': (bool, lambda text, wish: text.isupper() == wish),
}


def check(answer, checks):
    """Whether the answer passes each of `checks`, dicts of one entry as {'max_words': 20}: a list of bools.

    Only `regex` tells upper from lower case. `contains` finds whole words. An answer without a word passes
    nothing, because silence would keep to every upper limit. Raises UserError for a check that is none.
    """
    wishes = [(name, wanted) for one in checks for name, wanted in [entry_of(one)]]
    return [bool(words_in(answer)) and CHECKS[name][1](answer, wanted) for name, wanted in wishes]


def entry_of(one):
    """The name and the wish of a check; UserError where it is none."""
    if not isinstance(one, dict) or len(one) != 1:
        raise UserError(f'A check is an object with one entry, such as {{"max_words": 20}}, not {one!r}.')
    ((name, wanted),) = one.items()
    if name not in CHECKS:
        raise UserError(f'There is no check {name!r}; there are: {", ".join(CHECKS)}.')
    kind = CHECKS[name][0]
    texts = wanted if kind is list else [wanted] if kind is str else ['-']
    if type(wanted) is not kind or not texts or not all(isinstance(x, str) and x.strip() for x in texts):
        kinds = {str: 'a text', list: 'a list of texts', int: 'a whole number', bool: 'true or false'}
        raise UserError(f'The check {name!r} wants {kinds[kind]}, not {wanted!r}.')
    if name == 'regex':
        try:
            re.compile(wanted)
        except re.error as error:
            raise UserError(f'The check "regex" has {wanted!r}, which is no pattern: {error}.') from None
    return name, wanted


def format_compliance(answer, reference, ended, markers):
    """{'ended', 'no_markers', 'length', 'all'}, bools: whether the answer keeps the form of an answer.

    ended        it ended itself (as the caller says) before it was cut off
    no_markers   holds none of `markers`, the prompt's (such as '### Instruction:')
    length       has between half and twice as many words as the reference
    all          all three
    """
    words, wanted = len(words_in(answer)), len(words_in(reference))
    result = {
        'ended': bool(ended),
        'no_markers': not any(marker in answer for marker in markers),
        'length': wanted / 2 <= words <= 2 * wanted,
    }
    return {**result, 'all': all(result.values())}


# ---------------------------------------------------------------------------- wishes stated in words

NUMBERS = (
    'one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen '
    'seventeen eighteen nineteen twenty'
).split()
N = rf'(\d+|a single|{"|".join(NUMBERS)})'
AT_MOST, AT_LEAST = (
    r'at most|no more than|not more than|up to|maximum(?: of)?',
    r'at least|no less than|no fewer than|minimum(?: of)?',
)
QUOTED = '["“\'‘]([^"“”]+?)["”\'’]'
TEXT = r'(?:essay|haiku|letter|paragraph|poem|sentence|song|speech|story|tale|text)(?: of [\w ]+)?'
WRITING = re.compile(  # how a sentence begins that asks to write something
    r'(?:please |now |can you |could you |(?:in|given) [^,]+, )*'
    r'(?:answer|combine|compare|compose|condense|construct|convert|craft|create|define|describe|draft|'
    r'explain|express|format|generate|give|how|keep|limit|list|make|name|output|outline|paraphrase|produce|'
    r'provide|rephrase|reply|respond|restate|return|rewrite|say|state|suggest|summari[sz]e|sum up|tell|turn|'
    r'use|what|who|why|write|(?:your|the) (?:answer|response|output))\b',
    re.I,
)
# A sentence about code or a format ("what is a key in JSON?") does not wish for an answer in that format.
NOT_ABOUT = (
    r'^(?!(?:compare|define|describe|explain|how|tell|what|who|why)\b)'
    r'(?!.*\b(?:code|function|parse|program|python|query|script)).*?'
)


def number(word):
    word = word.lower()
    return int(word) if word.isdigit() else 1 if word == 'a single' else NUMBERS.index(word) + 1


STATED = [
    (re.compile(pattern, re.I), make)
    for pattern, make in [  # words of an instruction, its checks
        (rf'(?:{AT_MOST}) {N} words?\b', lambda n: [{'max_words': number(n)}]),
        (rf'\b{N} words? or (?:less|fewer)\b', lambda n: [{'max_words': number(n)}]),
        (rf'\b(?:less than|fewer than|under) {N} words\b', lambda n: [{'max_words': number(n) - 1}]),
        (rf'(?:{AT_LEAST}) {N} words?\b', lambda n: [{'min_words': number(n)}]),
        (
            rf'\b(?:of|in|between) {N}(?:-| to | and ){N} words\b',
            lambda low, high: [{'min_words': number(low)}, {'max_words': number(high)}],
        ),
        # "In 50 words" means about 50, "in three words" means three.
        (
            rf'\bin ({"|".join(NUMBERS[:10])}|a single|[1-9]|10) words?\b(?! (?:from|of|or|that)\b)',
            lambda n: [{'words': number(n)}],
        ),
        (rf'\b(?:in|of) exactly {N} words\b', lambda n: [{'words': number(n)}]),
        (rf'(?:{AT_MOST}) {N} sentences?\b', lambda n: [{'max_sentences': number(n)}]),
        (rf'\b{N} sentences? or (?:less|fewer)\b', lambda n: [{'max_sentences': number(n)}]),
        (rf'\bin {N}(?:-| to | or ){N} sentences\b', lambda low, high: [{'max_sentences': number(high)}]),
        (
            rf'\b(?:in|into)(?: exactly| only| just)? {N} sentences?\b(?! or\b)',
            lambda n: [{'sentences': number(n)}],
        ),
        (rf'\ban? {N}[- ]sentence\b', lambda n: [{'sentences': number(n)}]),
        (rf'\bin(?: exactly)? {N} lines?\b(?! or\b)', lambda n: [{'lines': number(n)}]),
        (
            rf'\b(?:in|as|with|using)(?: exactly)? {N} bullet(?:s| points?)\b',
            lambda n: [{'bullets': number(n)}],
        ),
        (
            NOT_ABOUT
            + r'\b(?:(?:in|as|into|to)(?: an?)?(?: valid)? JSON|a (?:valid )?JSON (?:array|list|object))\b'
            r'(?! (?:to|into|file|schema))',
            lambda: [{'is_json': True}],
        ),
        (
            NOT_ABOUT
            + r'\b(?:in|to|into|using)(?: only)? (?:all[- ])?(?:caps|capital letters|upper ?case)\b',
            lambda: [{'uppercase': True}],
        ),
        (
            NOT_ABOUT + r'\b(?:in|to|into|using)(?: only)? (?:all[- ])?(?:small letters|lower ?case)\b',
            lambda: [{'lowercase': True}],
        ),
        (
            r'\b(?:only|just|simply) (?:with )?(yes|true) or (no|false)\b',
            lambda *choices: [{'one_of': list(choices)}],
        ),
        # "Name three fruits", but not "three sentences" and not "three fruits and two animals".
        (
            r'^(?:please )?(?:give(?: me| us)?|list|name|provide|suggest)(?: a list of)?(?! (?:one|1|a single)\b)'
            rf' {N} (?!(?:sentence|line|paragraph|more|or|to)s?\b)(?!.*\b(?:every|per)\b)(?!.*\band {N}\b)',
            lambda n, _: [{'items': number(n)}],
        ),
    ]
]

STATED_IN_QUOTES = [
    (re.compile(pattern, re.I), make)
    for pattern, make in [
        (
            rf'\b{TEXT} that (?:starts|begins) with (?:the (?:line|words?|phrase|sentence) )?{QUOTED}',
            lambda start: [{'starts_with': start.rstrip('.')}],
        ),
        (
            rf'\b{TEXT} that ends with (?:the (?:line|words?|phrase|sentence) )?{QUOTED}',
            lambda end: [{'ends_with': end}],
        ),
        (rf'\bwithout using the (?:word|phrase) {QUOTED}', lambda phrase: [{'not_contains': phrase}]),
        (
            rf'(?<!without )\busing (?:both )?the (?:words?|phrase) {QUOTED}(?: and {QUOTED})?',
            lambda *phrases: [{'contains': phrase} for phrase in phrases if phrase],
        ),
    ]
]


def checks_stated_in(instruction):
    """The checks that an instruction states in its own words: [{'max_words': 20}] for "in at most 20 words".

    It would rather miss a wish than invent one. Only sentences that ask to write something count, and of them
    what stands before a colon or a line break (after it comes material); words in quotation marks count only
    as what to use. Sentences with "each" are left alone, and so are wishes that contradict each other.
    """
    asked = re.split(r':\s|\n', instruction)[0]
    unquoted = re.sub(r'["“][^"“”]*["”]', '""', asked)
    found = []
    for sentence in re.split(r'(?<=[.!?])\s+', unquoted):
        if WRITING.match(sentence) and not re.search(r'\beach\b', sentence, re.I):
            found += [
                one
                for pattern, make in STATED
                for match in pattern.finditer(sentence)
                for one in make(*match.groups())
            ]
    if WRITING.match(asked):
        found += [
            one
            for pattern, make in STATED_IN_QUOTES
            for match in pattern.finditer(asked)
            for one in make(*match.groups())
        ]
    names = Counter(name for one in found for name in one)
    clash = [
        {'uppercase', 'lowercase'} <= set(names),
        {'items', 'is_json'} <= set(names),
        *(times > 1 for name, times in names.items() if name != 'contains'),
    ]
    return [] if any(clash) else found
