# The language database of classify.py: language -> task -> data set; lm/languages.py says what the fields mean.
# A folder stands under data/ or is given as a path; what is none is looked for on the hub.
#   python classify.py --task=sentiment --train_langs=eng --eval_langs=eng
_pair, _premise, _sides = 'sentence1 sentence2', 'premise hypothesis', 'sentence_A sentence_B'
_entails, _entailment = 'entailment not_entailment', 'entailment neutral contradiction'
_cdsc, _three = 'NEUTRAL CONTRADICTION ENTAILMENT', 'train validation test'
_tweets = 'cardiffnlp/tweet_sentiment_multilingual'


def _task(dataset, classes, features='text', label='label', splits='train test', **more):
    """Return an entry: how many classes, or their names, and further names as words of a text."""
    classes = classes if isinstance(classes, int) else classes.split()
    entry = {'dataset': dataset, 'task_type': 'classification', 'classes': classes, 'eval_feature': label}
    return {**entry, 'train_features': features.split(), 'splits': splits.split(), **more}


def _glue(name, features, classes, validation='validation'):
    return _task('nyu-mll/glue', classes, features, splits=f'train {validation}', config=name)


def _xnli(language):
    return _task('facebook/xnli', _entailment, _premise, splits=_three, config=language)


LANGUAGES = {
    'eng': {  # SST-2: data/sst2/{train,dev,test}.tsv, a text and its label per line
        'sentiment': _task('sst2', 'negative positive', splits='train dev test', columns=['text', 'label']),
        'entailment': _xnli('en'),
        'cola': _glue('cola', 'sentence', 'unacceptable acceptable'),
        'mrpc': _glue('mrpc', _pair, 'not_equivalent equivalent'),
        'qnli': _glue('qnli', 'question sentence', _entails),
        'qqp': _glue('qqp', 'question1 question2', 'not_duplicate duplicate'),
        'rte': _glue('rte', _pair, _entails),
        'wnli': _glue('wnli', _pair, 'not_entailment entailment'),
        'mnli': _glue('mnli', _premise, _entailment, 'validation_matched'),
    },
    'spa': {
        'sentiment': _task(_tweets, 'negative neutral positive', splits=_three, config='spanish'),
        'entailment': _xnli('es'),
    },
    # data/rus-sentiment/{train,test}.csv with the columns text, text-phoneme and label
    'rus': {'sentiment': _task('rus-sentiment', 2), 'entailment': _xnli('ru')},
    'pol': {  # data/pol-sentiment/{train,test}.csv, as above
        'sentiment': _task('pol-sentiment', 2),
        'entailment': _task('pol-entailment', _cdsc, _sides, 'entailment_judgment', _three),
    },
}
