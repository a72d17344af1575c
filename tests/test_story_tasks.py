"""A request for a story is met by a story that is as it says, and by no other; gaps hide what can be found again."""

import hashlib
import random

import pytest

from lm.folder import Folder
from prepare import grammar, story_tasks

STORIES = list(grammar.stories(300, seed=3))


@pytest.mark.parametrize('heldout_words', [False, True])
def test_a_story_meets_each_request_that_is_made_for_it(heldout_words):
    for number, story in enumerate(STORIES):
        found = story_tasks.choices(story)
        text, wishes = story_tasks.request(found, random.Random(number), (), heldout_words)
        assert 1 <= len(set(wishes) - {'color'}) <= story_tasks.MAX_WISHES and not set('{}*') & set(text)
        assert story_tasks.follows(wishes, story) == (True, True)


def test_a_request_says_what_it_asks_for():
    """Words of requests that ask for different things differ, so that a model can know what is meant."""
    asked = {}
    for number, story in enumerate(STORIES):
        text, wishes = story_tasks.request(story_tasks.choices(story), random.Random(number))
        assert asked.setdefault(text, wishes) == wishes
    assert len(asked) > 250


def test_another_story_does_not_meet_it_and_no_story_none():
    story = 'Pip was a shy mouse. He loved to sing. ' + grammar.story(random.Random(1)).split('. ', 2)[2]
    assert story_tasks.follows({'hero': 'Pip'}, story) == (False, False)  # its heroine is another
    first, second = STORIES[:2]
    wishes = {name: row['word'] for name, row in story_tasks.choices(first).items()}
    assert story_tasks.follows(wishes, first) == (True, True)
    assert story_tasks.follows(wishes, second) == (True, False)
    assert story_tasks.follows({}, first[:-1]) == (False, False)


def test_training_never_sees_a_held_out_pair_and_each_exercise_asks_for_one(prepare):
    options = '--source=stories', '--max_examples=200', '--vocab_size=600'
    folder = Folder(prepare('instruct.py', *options))
    pairs = {'train': 0, 'val': 0}
    for split in pairs:
        for start, end in zip(folder.index[split][:-1], folder.index[split][1:]):
            text = folder.tokenizer.decode(folder.tokens[split][start:end])
            found = story_tasks.choices(text.split('### Response:\n')[1])
            assert bool(story_tasks.heldout_pair(found)) == (split == 'val')
            pairs[split] += 1
    assert pairs['train'] > 4 * pairs['val'] > 0
    for _, wishes in story_tasks.exercises(20):
        assert 'hero' in wishes and {'love', 'plot'} & set(wishes)


def test_gaps_are_as_many_as_wanted_apart_and_filled_by_what_was_there():
    for number, story in enumerate(STORIES):
        gaps = story_tasks.gaps(story, random.Random(number), 1 + number % 4)
        assert len(gaps) == 1 + number % 4
        assert all(end < start for (_, end), (start, _) in zip(gaps, gaps[1:]))
        assert all(start < end <= len(story) and story[start:end].strip() for start, end in gaps)


def test_requests_are_those_of_the_recorded_version():
    """Prepared folders are reused by the version: who changes a request has to change it too."""
    asked = ''.join(
        story_tasks.request_for(story, i)[0] for i, story in enumerate(grammar.stories(300, seed=0))
    )
    assert hashlib.sha256(asked.encode()).hexdigest() == story_tasks.VERSION[story_tasks.SOURCE]
