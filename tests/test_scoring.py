"""Figures agree with values worked out by hand and with plain code; intervals cover what they promise."""

import json
import math
import statistics
from pathlib import Path

import numpy as np
import pytest

from lm import scoring
from lm.configurator import UserError
from lm.scoring import (
    block_bootstrap_ci,
    check,
    checks_stated_in,
    distinct,
    entropy,
    exact_match,
    format_compliance,
    mean_ci,
    paired_ci,
    rep,
    rouge_l,
    self_bleu,
    token_f1,
)

ROOT = Path(__file__).resolve().parent.parent
PROMPTS = json.loads((ROOT / 'config' / 'instructions.json').read_text(encoding='utf-8'))


# ---------------------------------------------------------------------------- diversity


def test_distinct_counts_over_all_samples():
    samples = ['a b a b'.split(), 'a b c'.split()]
    assert distinct(samples, 1) == 3 / 7
    assert distinct(samples, 2) == 3 / 5  # ab ba ab | ab bc
    assert distinct(samples, 4) == 1.0  # only the first sample has four words


def test_rep_counts_what_the_same_sample_said_before():
    assert rep([[1, 2, 1, 2, 1]], n=2) == 2 / 4  # 12 21 12 21
    assert rep([[1, 2, 3], [1, 2, 3]], n=2) == 0.0  # repeats another sample, not itself
    assert rep([[5] * 7, [1, 2, 3, 4]]) == 3 / 5  # 4 and 1 four-grams, 3 of them repeats


def test_entropy_is_of_the_pooled_tokens_in_nats():
    assert entropy([[1, 2], [3, 4]]) == pytest.approx(math.log(4))
    assert entropy([[1, 1], [1, 2]]) == pytest.approx(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))
    assert math.copysign(1, entropy([[7, 7]])) == 1 and entropy([[7, 7]]) == 0


def test_diversity_of_nothing_is_none():
    for samples in ([], [[]], [[], []]):
        assert distinct(samples, 1) is rep(samples, 1) is entropy(samples) is self_bleu(samples, 1) is None
    assert distinct([[1, 2]], 3) is rep([[1, 2]], 3) is None
    assert self_bleu([[1, 2, 3]], 1) is None  # no other
    assert self_bleu([[1, 2, 3], [1, 2]], 3) is None  # no other with three tokens


def test_arrays_count_like_lists():
    torch = pytest.importorskip('torch')
    samples = [[1, 2, 1, 2, 3], [3, 2, 1, 2, 1]]
    for kind in (np.array, torch.tensor):
        same = [kind(sample) for sample in samples]
        assert distinct(same, 2) == distinct(samples, 2) and self_bleu(same, 2) == self_bleu(samples, 2)


def bleu(sample, references, n):
    """BLEU as its paper says it, one n-gram at a time."""

    def count(tokens, gram):
        return sum(tokens[i : i + len(gram)] == gram for i in range(len(tokens) - len(gram) + 1))

    product = 1.0
    for order in range(1, n + 1):
        grams = [sample[i : i + order] for i in range(len(sample) - order + 1)]
        once = [gram for i, gram in enumerate(grams) if gram not in grams[:i]]
        product *= sum(
            min(count(sample, gram), max(count(other, gram) for other in references)) for gram in once
        ) / len(grams)
    closest = min(map(len, references), key=lambda length: (abs(length - len(sample)), length))
    return product ** (1 / n) * min(1.0, math.exp(1 - closest / len(sample)))


def test_self_bleu_by_hand():
    samples = ['the cat sat'.split(), 'the cat ran off'.split()]
    shorter = math.exp(1 - 4 / 3)  # the first is shorter than its reference
    assert self_bleu(samples, 1) == pytest.approx((2 / 3 * shorter + 2 / 4) / 2)
    assert self_bleu(samples, 2) == pytest.approx(
        (math.sqrt(2 / 3 * 1 / 2) * shorter + math.sqrt(2 / 4 * 1 / 3)) / 2
    )
    assert self_bleu(samples, 3) == 0.0  # no three words in common, and no smoothing
    assert self_bleu([[1, 1, 1, 1], [1, 2, 2, 2]], 1) == 1 / 4  # repeats do not match twice
    assert self_bleu([[1, 2, 3, 4]] * 3, 4) == pytest.approx(1.0)


@pytest.mark.parametrize('n', [1, 2, 3, 4])
def test_self_bleu_equals_an_independent_implementation(n):
    random = np.random.default_rng(n)
    samples = [random.integers(0, 4, random.integers(4, 20)).tolist() for _ in range(12)]
    by_hand = [bleu(sample, samples[:i] + samples[i + 1 :], n) for i, sample in enumerate(samples)]
    assert self_bleu(samples, n) == pytest.approx(statistics.fmean(by_hand), rel=1e-12)


def test_self_bleu_leaves_out_what_is_too_short_on_both_sides():
    samples = [[1, 2, 3, 4, 5], [1, 2, 3, 4, 6, 7]]
    assert self_bleu(samples + [[1, 2], []], 4) == self_bleu(samples, 4) > 0


# ---------------------------------------------------------------------------- overlap


def test_rouge_l_by_hand():
    # Lin 2004: "police kill the gunman" shares "police the gunman" with the reference, in order.
    assert rouge_l('Police kill the gunman.', 'police killed the gunman') == 2 * 3 / 8
    assert rouge_l('the gunman kill police', 'police killed the gunman') == 2 * 2 / 8
    assert rouge_l('', 'a word') == 0.0
    assert rouge_l('a word', ' ... ') is None


def test_common_subsequence_equals_the_table():
    random = np.random.default_rng(0)
    for _ in range(50):
        a, b = (random.integers(0, 3, random.integers(0, 80)).tolist() for _ in range(2))
        table = np.zeros((len(a) + 1, len(b) + 1), dtype=int)
        for i, j in np.ndindex(len(a), len(b)):
            table[i + 1, j + 1] = table[i, j] + 1 if a[i] == b[j] else max(table[i, j + 1], table[i + 1, j])
        assert scoring.common_subsequence(a, b) == table[-1, -1]


def test_token_f1_and_exact_match_by_hand():
    assert token_f1('The big dog', 'a dog barks, dog!') == 2 * 1 / (2 + 3)
    assert token_f1('', 'dog') == 0.0
    assert exact_match(' The  answer: Paris. ', 'answer paris') == 1.0
    assert exact_match('Parisian', 'Paris') == 0.0
    for nothing in ('', '...', 'The'):
        assert token_f1('x', nothing) is exact_match('-', nothing) is None


# ---------------------------------------------------------------------------- intervals


def test_equal_weights_give_students_interval():
    mean, low, high = mean_ci([1.0, 2.0, 3.0, 6.0])
    half = 3.182446 * statistics.stdev([1, 2, 3, 6]) / 2  # t with 3 degrees of freedom
    assert (mean, low, high) == pytest.approx((3.0, 3 - half, 3 + half), rel=1e-4)


@pytest.mark.parametrize(
    'freedom, quantile', [(1, 12.7062), (2, 4.30265), (2.5, 3.5746), (10, 2.22814), (1e6, 1.95997)]
)
def test_quantiles_of_t_are_those_of_the_tables(freedom, quantile):
    assert scoring.t_quantile(freedom) == pytest.approx(quantile, rel=1e-4)


def test_the_weighted_interval_by_hand():
    # Mean 12/4 = 3; residuals 1, -1, 0 (of 4, 2, 6 with weights 1, 1, 2), shares 1/4, 1/4, 1/2.
    error = math.sqrt((1 / 16 + 1 / 16) / (3 / 4))
    freedom = (1 / 16 + 1 / 16 + 1 / 4) ** 2 / (1 / 256 + 1 / 256 + 1 / 16) - 1
    half = scoring.t_quantile(freedom) * error
    assert mean_ci([4, 2, 6], [1, 1, 2]) == pytest.approx((3.0, 3 - half, 3 + half))


def test_an_interval_that_cannot_be_computed_is_none():
    few = list(range(9))
    assert mean_ci([]) == mean_ci([0.0, 0.0], [0, 0]) == mean_ci([1.0, math.nan]) == (None, None, None)
    assert mean_ci([6.0], [2]) == mean_ci([6.0, 0.0], [2, 0]) == (3, None, None)
    assert mean_ci([3 * 2.0**99, 1.0], [2.0**99, 1]) == (3, None, None)  # a share of 1 in float64
    assert block_bootstrap_ci(few) == (4.0, None, None) and block_bootstrap_ci([]) == (None, None, None)
    for values, weights in (([1, 2], [1]), ([1, 2], [1, -1]), ([[1, 2]], None)):
        with pytest.raises(ValueError, match='one weight'):
            mean_ci(values, weights)
    with pytest.raises(ValueError, match='the same ones'):
        paired_ci([1, 2], [1])


def lengths(kind, shape, random):
    if kind == 'lognormal':
        return np.exp(random.normal(5, 1, shape))
    return 50 * (1 + random.pareto(2.2, shape))


def share_that_covers(intervals, truth):
    return np.mean([interval.low <= truth <= interval.high for interval in intervals])


@pytest.mark.parametrize('kind', ['lognormal', 'pareto'])
@pytest.mark.parametrize('n', [30, 150, 1000])
def test_the_interval_covers_under_heavy_tailed_lengths(kind, n):
    random = np.random.default_rng(n)
    weights = lengths(kind, (2000, n), random)
    of_document, of_tokens = random.normal(size=(2, *weights.shape))
    # Long documents are easier, so that the ratio is not the mean of the documents.
    nats = weights * (3.5 - 0.1 * np.log(weights / 150) + of_document / 2 + 2 * of_tokens / np.sqrt(weights))
    everything = lengths(kind, 4_000_000, np.random.default_rng(0))
    truth = 3.5 - 0.1 * (everything @ np.log(everything / 150)) / everything.sum()
    assert 0.92 <= share_that_covers(map(mean_ci, nats, weights), truth) <= 0.98


def test_pairing_covers_and_tells_apart_what_overlaps():
    random = np.random.default_rng(0)
    weights = lengths('lognormal', (500, 60), random)
    hardness = 3.5 + random.normal(size=weights.shape)  # common to both models
    a, b = (weights * (hardness + shift + 0.1 * random.normal(size=weights.shape)) for shift in (0.1, 0.0))
    pairs = [paired_ci(*models) for models in zip(a, b, weights)]
    assert 0.92 <= share_that_covers(pairs, 0.1) <= 0.98
    assert np.mean([pair.low > 0 for pair in pairs]) > 0.8
    assert np.mean([mean_ci(x, w).low > mean_ci(y, w).high for x, y, w in zip(a, b, weights)]) < 0.01
    in_order = paired_ci(a[0], b[0], weights[0], block_bootstrap_ci)
    assert in_order.mean == pairs[0].mean and in_order.low != pairs[0].low


@pytest.mark.parametrize('correlation', [0.0, 0.3, 0.6])
@pytest.mark.parametrize('n', [30, 100, 300])
def test_the_block_bootstrap_covers_an_ar1_series(correlation, n):
    random = np.random.default_rng(7)
    series = random.normal(size=(n, 2000))  # (windows, simulations)
    series[0] /= math.sqrt(1 - correlation**2)
    for t in range(1, n):
        series[t] += correlation * series[t - 1]
    weights = np.append(np.full(n - 1, 256), 100)  # the last window is shorter
    intervals = [block_bootstrap_ci(one * weights, weights, draws=300) for one in 3 + series.T]
    assert 0.92 <= share_that_covers(intervals, 3.0) <= 0.98


def test_blocks_that_ignore_dependence_would_be_too_sure():
    random = np.random.default_rng(0)
    series = np.convolve(random.normal(size=300), np.ones(8))  # neighbours share seven of their eight terms
    alone, chosen = block_bootstrap_ci(series, block_length=1), block_bootstrap_ci(series)
    unseen = mean_ci(series)
    assert chosen.high - chosen.low > 2 * (unseen.high - unseen.low)
    assert alone.high - alone.low > 1.5 * (unseen.high - unseen.low)  # the widening alone does much of it


def test_intervals_are_deterministic_and_plain_numbers():
    values = np.random.default_rng(1).normal(size=40)
    assert block_bootstrap_ci(values) == block_bootstrap_ci(values) != block_bootstrap_ci(values, seed=1)
    for interval in (block_bootstrap_ci(values), mean_ci(values), paired_ci(values, -values)):
        assert all(type(number) is float for number in interval)
        assert interval.low < interval.mean < interval.high


# ---------------------------------------------------------------------------- instructions


def test_format_compliance():
    markers = ['### Instruction:', '<|user|>']
    good = {'ended': True, 'no_markers': True, 'length': True, 'all': True}
    assert format_compliance('one two', 'a b c d', True, markers) == good
    assert format_compliance('1 2 3 4 5 6 7 8', 'a b c d', True, markers) == good
    assert format_compliance('one', 'a b c d', True, markers) == {**good, 'length': False, 'all': False}
    assert format_compliance('one two', 'a b', False, markers) == {**good, 'ended': False, 'all': False}
    leaked = {**good, 'no_markers': False, 'all': False}
    assert format_compliance('a <|user|>', 'a b', True, markers) == leaked


@pytest.mark.parametrize(
    'wish, kept, broken',
    [
        ({'contains': 'blue'}, 'It is Blue.', 'It is bluer.'),
        ({'not_contains': 'red'}, 'A hundred.', 'A red one.'),
        ({'starts_with': 'Once upon'}, '"once upon a time', 'It was once upon'),
        ({'ends_with': 'the end'}, 'That is the end."', 'the end of it'),
        ({'ends_with': '?'}, 'Who?', 'Me.'),
        ({'one_of': ['yes', 'no']}, ' **No.** ', 'no way'),
        ({'regex': r'^\d{4}$'}, '2024', '2024!'),
        ({'words': 3}, 'red – green blue', 'red green'),
        ({'min_words': 2}, 'two words', 'one'),
        ({'max_words': 2}, 'two words', 'now three words'),
        ({'sentences': 2}, 'Dr. A. Smith paid 3.50 today. "Really?" she asked', 'One. Two. Three.'),
        ({'sentences': 3}, '1. One.\n2. Two... or so.\n3. Three, e.g. this', 'Only one.'),
        ({'max_sentences': 1}, 'Just "one!"', 'First. Second.'),
        ({'lines': 2}, 'a\n\nb\n', 'a b'),
        ({'bullets': 2}, 'Here:\n1. **a**\n   - deep\n2. b', '**a**\n**b**'),
        ({'items': 3}, 'They are red, green, and blue.', 'red and green'),
        ({'items': 3}, 'Here they are:\n- a\n- b\n- c', 'a\nb'),
        ({'is_json': True}, '```json\n{"a": [1]}\n```', '{"a": NaN}'),
        ({'is_json': True}, '[1, 2]', '[' * 100_000 + '1'),
        ({'is_json': False}, '5', '[5]'),
        ({'contains_number': True}, '7 up', 'seven'),
        ({'lowercase': True}, 'a 1.', 'A'),
        ({'uppercase': True}, 'A 1.', 'a'),
    ],
)
def test_each_check_tells_kept_from_broken(wish, kept, broken):
    assert check(kept, [wish]) == [True] and check(broken, [wish]) == [False]


def test_every_check_has_a_prompt_and_silence_passes_none():
    used = {name for prompt in PROMPTS for one in prompt['checks'] for name in one}
    assert used == set(scoring.CHECKS)
    for nothing in ('', ' \n', '...'):
        assert not any(any(check(nothing, prompt['checks'])) for prompt in PROMPTS)


@pytest.mark.parametrize(
    'wish, words',
    [
        ({'max_wrods': 3}, "no check 'max_wrods'; there are: contains, .*max_words"),
        ({'max_words': '3'}, 'a whole number'),
        ({'max_words': True}, 'a whole number'),
        ({'is_json': 1}, 'true or false'),
        ({'contains': ' '}, 'a text'),
        ({'one_of': 'yes'}, 'a list of texts'),
        ({'one_of': []}, 'a list of'),
        ({'regex': '('}, 'no pattern'),
        ({'lines': 1, 'words': 2}, 'one entry'),
        ('max_words', 'one entry'),
        ({}, 'one entry'),
    ],
)
def test_a_check_that_is_none_is_refused(wish, words):
    with pytest.raises(UserError, match=words):
        check('An answer.', [wish])


def test_each_shipped_prompt_can_be_followed_and_not_by_repeating_it():
    assert len({prompt['instruction'] for prompt in PROMPTS}) == len(PROMPTS) >= 60
    assert sum(len(prompt['checks']) >= 2 for prompt in PROMPTS) >= len(PROMPTS) / 2
    for prompt in PROMPTS:
        assert list(prompt) == ['instruction', 'input', 'checks', 'output'], prompt
        assert all(check(prompt['output'], prompt['checks'])), prompt
        for echo in (prompt['instruction'], prompt['input'], prompt['instruction'] + '\n' + prompt['input']):
            assert not all(check(echo, prompt['checks'])), prompt


def test_wishes_found_in_the_shipped_prompts_are_their_checks():
    found = [one for prompt in PROMPTS for one in checks_stated_in(prompt['instruction'])]
    assert len(found) >= 30
    for prompt in PROMPTS:
        assert all(one in prompt['checks'] for one in checks_stated_in(prompt['instruction'])), prompt


@pytest.mark.parametrize(
    'instruction, checks',
    [
        ('Generate a creative tagline in 4 words or less.', [{'max_words': 4}]),
        ('Summarize the article "Ten words" in less than 20 words.', [{'max_words': 19}]),
        ('Generate a short story of 50-100 words.', [{'min_words': 50}, {'max_words': 100}]),
        ('Describe the following painting in at least 10 words.', [{'min_words': 10}]),
        ('Describe the color yellow in 3 words.', [{'words': 3}]),
        ('Generate a one-sentence title for a creative recipe.', [{'sentences': 1}]),
        ('In one sentence of at most twelve words, explain rain.', [{'max_words': 12}, {'sentences': 1}]),
        ('Describe the article in one or two sentences', [{'max_sentences': 2}]),
        ('Describe the physical properties of a magnet in 5 lines.', [{'lines': 5}]),
        ('Summarize the text in three bullet points.', [{'bullets': 3}]),
        ('Give three tips for staying healthy.', [{'items': 3}]),
        ('Please list four ways to save energy.', [{'items': 4}]),
        ('Return the name and the age in JSON.', [{'is_json': True}]),
        ('Say hello. Write your answer in all caps.', [{'uppercase': True}]),
        ('Convert the uppercase text to lowercase.', [{'lowercase': True}]),
        ('Is the sky green? Answer only yes or no.', [{'one_of': ['yes', 'no']}]),
        ('Create a story that starts with the line "The sun was low."', [{'starts_with': 'The sun was low'}]),
        (
            'Generate a sentence using both the words "task" and "dynamic".',
            [{'contains': 'task'}, {'contains': 'dynamic'}],
        ),
        ('Rewrite this phrase without using the word "like":', [{'not_contains': 'like'}]),
    ],
)
def test_wishes_that_an_instruction_states_are_found(instruction, checks):
    found = checks_stated_in(instruction)
    assert sorted(found, key=str) == sorted(checks, key=str)
    check('An answer.', found)  # they are checks


@pytest.mark.parametrize(
    'instruction',
    [
        'Find the sentences with more than ten words.',
        'Delete the last two paragraphs from the following text.',
        'What is a key in JSON?',
        'Write a function that converts a text to uppercase.',
        'Parse the following JSON data and reformat into an HTML table.',
        'Categorize the following three words.',
        'Rewrite the sentence: tell it in one word.',
        'Translate "Say it in three words" into French.',
        'Name one of the branches of science',
        'List the 12 planets of the Solar System',
        'Give two reasons and three examples.',
        'Give me 2-3 examples of fruit.',
        'List 3 facts on each planet.',
        'Write three sentences of at most 5 words each.',
        'Write a sentence using three words from the list.',
        'Write an ad in 50 words.',
        'Generate a list of words that start with "re".',
        'Change the words in capital letters to lower case and the rest to upper case.',
    ],
)
def test_wishes_that_an_instruction_does_not_state_are_not_invented(instruction):
    assert checks_stated_in(instruction) == []
