"""evaluate.py judges stories, fillings of gaps in them, and answers to requests for them by the grammar."""

import json
from functools import partial

import pytest
from conftest import write_folder
from helpers import evaluate, write_run

from lm import report
from lm.configurator import UserError
from prepare import grammar
from sampling import fill_left_to_right, generate


def test_samples_are_stories_of_the_grammar_or_not_and_the_true_entropy_is_shown(tmp_path):
    stories = list(grammar.stories(4, seed=3))
    folder = write_folder(
        tmp_path / 'stories', train=stories, val=stories, letters=sorted(set(''.join(stories)))
    )
    settings = json.loads((folder / 'config.json').read_text())
    settings['floor'] = {'nats_per_token': 0.2, 'nats_per_byte': 0.05, 'bits_per_byte': 0.072}
    (folder / 'config.json').write_text(json.dumps(settings))
    write_run(tmp_path / 'ar', folder, 'ar', block_size=64)
    script = evaluate(f'--checkpoint={tmp_path}/ar', '--metrics=perplexity,generation', '--max_tokens=500')
    assert script['results']['models'][0]['valid_stories'] == 0
    lines = report.table(script['results']).split('\n')
    last = lines[lines.index('') - 1]
    assert last.startswith('true entropy') and '0.2000' in last and '1.000' in last

    tokenizer, end = script['folder'].tokenizer, script['folder'].tokenizer.endoftext_id
    told = tokenizer.encode(stories[0])
    rows = [told + [end], told + [end] + told[:9], told, tokenizer.encode(stories[1][:-1]) + [end]]
    figures = script['grammar_figures'](rows)
    assert figures['valid_stories'] == 0.5 and figures['finished_stories'] == 0.75
    assert figures['faults'][:3] == [[], [], []] and len(figures['faults'][3]) == 1
    assert figures['right_share'] == pytest.approx(1 - 1 / (4 * len(stories[1])), abs=0.01)
    right = next(story for story in grammar.stories(50, seed=3) if ' took her ' in story)
    wrong = tokenizer.encode(right.replace(' took her ', ' took his '))
    assert script['grammar_figures']([wrong + [end]])['wrong_words']['pronoun'] == 1


@pytest.mark.parametrize('architecture', ['ar', 'diffusion'])
def test_infilling_changes_nothing_but_the_gaps_and_judges_what_is_written(tmp_path, architecture):
    stories = list(grammar.stories(8, seed=3))
    letters = sorted(set(''.join(stories)))
    folder = write_folder(tmp_path / 'stories', train=stories, val=stories, letters=letters)
    config = json.loads((folder / 'config.json').read_text())
    floor = {'nats_per_token': 1.0, 'bits_per_byte': 1.0}
    (folder / 'config.json').write_text(json.dumps({**config, 'floor': floor}))
    write_run(tmp_path / 'run', folder, architecture, mode='documents', block_size=1200)
    script = evaluate(
        f'--checkpoint={tmp_path}/run', '--metrics=infilling', '--num_samples=4', '--temperature=0'
    )

    with pytest.raises(UserError, match='No held-out story fits into block_size=20'):
        evaluate(f'--checkpoint={tmp_path}/run', '--metrics=infilling', '--block_size=20')
    mask_id, start = script['tokenizer'].mask_id, script['state']['start_token']
    masked, tokens = script['hide_parts'](start), script['folder'].tokens['val']
    index = script['folder'].index['val'].astype(int)
    rows = [[start, *tokens[index[i] : index[i + 1]].tolist()] for i in (0, 2, 4, 6)]
    for count, row in enumerate(masked, 1):
        starts = [i for i in range(len(row)) if row[i] == mask_id != row[i - 1]]
        assert len(starts) == count
    fill = fill_left_to_right if architecture == 'ar' else partial(generate, max_new_tokens=0)
    for row, hidden, filled in zip(rows, masked, fill(script['model'], masked, temperature=0), strict=True):
        assert all(filled[i] == row[i] == hidden[i] for i in range(len(row)) if hidden[i] != mask_id)
        assert mask_id not in filled and filled != row
    figures = script['models'][0]['infilled']
    assert figures['one'] == figures['several'] == 0 and ('best_one' in figures) == (architecture == 'ar')
    judge = script['evaluate_infilling']
    judge.__globals__.update(hide_parts=lambda start_token: rows)
    figures = judge(script['model'], script['state'])['infilled']
    assert figures['one'] == figures['several'] == 1 and figures.get('best_several', 1) == 1


def test_requests_for_stories_are_judged_by_what_they_ask_for(prepare):
    folder = prepare('instruct.py', '--source=stories', '--max_examples=200', '--vocab_size=600')
    write_run(folder / 'run', folder, 'ar', mode='documents', block_size=400)
    script = evaluate(f'--checkpoint={folder}/run', '--metrics=instructions')
    (model,) = script['models']
    assert model['followed'] == model['followed_new_words'] == model['valid_stories'] == 0
    found = [script['story_tasks'].choices(story) for story in grammar.stories(2, seed=3)]
    wishes = [{'hero': row['hero']['word']} for row in found]
    asked = [
        (wishes[0], 0),
        (wishes[1], 1),
        (wishes[0], 0),
    ]  # without the ones that were too long, in no order
    answers = [*zip((*grammar.stories(2, seed=3), 'One day.'), asked)]
    assert script['request_figures'](answers[1:])['followed_new_words'] == 1
    figures = script['request_figures'](answers)
    assert (figures['valid_stories'], figures['followed'], figures['followed_new_words']) == (2 / 3, 0.5, 1)
