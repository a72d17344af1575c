"""Requests for stories of prepare/grammar.py, and an exact judge of what is written for them.

    "Tell a story about a shy mouse named Pip who is afraid of thunder. It ends with the moon."

A request asks for one to four of a story's choices in the words of story_tasks.txt: the opening, a phrase that says
who it is about, and for each other choice a phrase that goes on ("who ...") or a sentence of its own. Words after a
* are never trained. Neither are stories of a hero with a love or a plot of which `heldout_pair` says that they
never meet, so that only a model that combines what it was taught can tell them.
"""

import hashlib
import random
import re
import sys
from pathlib import Path

from prepare import grammar

PHRASES, TABLES = Path(__file__).with_name('story_tasks.txt').read_text('utf-8').split('\n---\n')
SUBJECT = ('hero', 'kind', 'trait')
SOURCE = 'prepare/story_tasks.py'  # VERSION is recorded in prepared folders
VERSION = {SOURCE: 'eb143a22590b86c232087fd754c0cf793ca69eece6485ade9a6bf5400cae33c0'} | grammar.VERSION
HELDOUT = 16  # one in so many pairs of a hero and a love or a plot
MAX_WISHES = 4
SENTENCE = r'(?<=[.!?"] )[A-Z"].*?[.!?]"?(?= |$)'
GAPS = {
    'name': ('hero', 'pal'),
    'thing': 'toy color friend place snack baby fear gift charge goal weather love'.split(),
}


def read_words(text):
    """Return {what is asked for: (phrases in training, held-out phrases)}."""
    words = {}
    for block in re.split(grammar.BLOCKS, text.strip()):
        name, *lines = map(str.strip, block.split('\n'))
        heldout = [line.removeprefix('* ') for line in lines if line.startswith('*')]
        words[name] = [line for line in lines if not line.startswith('*')], heldout
    return words


WORDS, TABLES = read_words(PHRASES), grammar.read_tables(TABLES)


def choices(story):
    """Return what a story chose, {'hero': row, ..., 'kind', 'plot', 'ending'}; None if the text is no story."""
    found = grammar.parse(story)
    if found:
        plot = next(row for row in TABLES['plots'].values() if row['shown'] in found)
        ends = {'a dream': 'dreamed of ', 'the moon': ' the moon.', 'the next day': 'And the next day?'}
        end = story[-120:]
        ending = next(name for name, words in ends.items() if words in end)
        found |= {'kind': {'word': found['hero']['kind']}, 'plot': plot, 'ending': TABLES['endings'][ending]}
    return found


def heldout_pair(found):
    """Return the names of two choices whose words never meet in training; () where there are none."""
    for other in ('love', 'plot'):
        pair = f'{found["hero"]["word"]}/{found[other]["word"]}'
        if hashlib.sha256(pair.encode()).digest()[0] < 256 // HELDOUT:
            return 'hero', other
    return ()


def request(found, rng, pair=(), heldout_words=False):
    """Return a request for some of a story's choices, `pair` among them, and what it asks for, {choice: word}."""
    possible = [name for name in WORDS if name in found and name not in pair]
    wished = [*pair, *rng.sample(possible, rng.randint(max(1, len(pair)), MAX_WISHES) - len(pair))]
    rng.shuffle(wished)
    subject = ' '.join(name for name in SUBJECT if name in wished) or 'nobody'
    opening, who = (rng.choice(WORDS[name][heldout_words]) for name in ('opening', subject))
    text, goes_on = f'{opening} about {who}', rng.random() < 0.5
    for name in wished:
        if name not in SUBJECT:
            phrases = [words for words in WORDS[name][heldout_words] if words.endswith('.') != goes_on]
            text += ('' if goes_on or text.endswith('.') else '.') + f' {rng.choice(phrases)}'
            goes_on = False
    wished += ['color'] * ('toy' in wished)  # said together
    return fill(text.rstrip('.') + '.', found), {name: found[name]['word'] for name in wished}


def request_for(story, seed):
    """Return a request for a story, and the split that the two belong to."""
    found = choices(story)
    pair = heldout_pair(found)
    return request(found, random.Random(seed), pair)[0], 'val' if pair else 'train'


def exercises(number):
    """Return [(request, {choice: word})] for pairs that were never trained, every second in words that were not."""
    asked, stories = [], grammar.stories(sys.maxsize, 'requests')
    while len(asked) < number:
        found = choices(next(stories))
        if pair := heldout_pair(found):
            asked.append(request(found, random.Random(len(asked)), pair, heldout_words=len(asked) % 2 == 1))
    return asked


def fill(phrase, found):
    """Put the words of choices into a phrase: {hero} or {place.at}, {Friend.a} with a capital."""

    def word(slot):
        row = found[slot[1].lower()]
        said = row[slot[2] or 'word']
        return said[0].upper() + said[1:] if slot[1][0].isupper() else said

    return re.sub(r'{(\w+)(?:\.(\w+))?}', word, phrase)


def gaps(story, rng, number):
    """Return `number` parts of a story, [(start, end), ...] in characters, to be hidden: whole sentences; names and
    things where they are first told, so that what follows says what they are."""
    found = choices(story)
    possible = {'sentence': [part.span() for part in re.finditer(SENTENCE, story)]}
    for kind, names in GAPS.items():
        words = [rf'\b{re.escape(found[name]["word"])}\b' for name in names if name in found]
        possible[kind] = [part.span() for part in (re.search(word, story) for word in words) if part]
    spans = []
    while len(spans) < number:
        span = rng.choice(possible[rng.choice([*possible])])
        if all(span[1] < start or end < span[0] for start, end in spans):
            spans.append(span)
    return sorted(spans)


def follows(wishes, story):
    """Say whether a text is a story, and whether it is one in which each choice of {choice: word} is as wished."""
    found = choices(story)
    if not found:
        return False, False
    return True, all(name in found and found[name]['word'] == wishes[name] for name in wishes)
