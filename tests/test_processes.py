"""How a script ends: a mistake in one line, Ctrl-C in a sentence, a fault of ours with its traceback."""

import os
import subprocess
import sys

import pytest

from lm import configurator

SCRIPT = '''"""A script."""
from lm.configurator import configure
batch_size = 12  # rows
config = configure(globals())
print(batch_size)
'''


def python(folder, *words):
    environment = {**os.environ, 'PYTHONPATH': str(configurator.ROOT)}
    return subprocess.run(
        [sys.executable, *words], cwd=folder, env=environment, text=True, capture_output=True
    )


def test_a_mistake_prints_one_line_without_a_traceback_from_any_working_directory(tmp_path):
    path = tmp_path / 'script.py'
    path.write_text(SCRIPT)
    (tmp_path / 'elsewhere').mkdir()
    done = python(tmp_path / 'elsewhere', path, '--batch_size=x')
    assert (done.returncode, done.stdout) == (1, '')
    assert done.stderr == 'error: --batch_size=x gives str where int is wanted, such as 12.\n'
    done = python(tmp_path / 'elsewhere', path, '--batch_size=8')
    assert (done.returncode, done.stdout, done.stderr) == (0, '8\n', '')


@pytest.mark.faults
def test_ctrl_c_is_a_sentence_and_output_needs_no_utf8(tmp_path):
    done = python(tmp_path, '-c', 'import lm.configurator; raise KeyboardInterrupt')
    assert (done.returncode, done.stderr) == (130, '\nstopped by Ctrl-C\n')
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('PYTHONIOENCODING', 'ascii')
        done = python(tmp_path, '-c', r"import lm.configurator; print('\u0416')")
    assert (done.returncode, done.stdout) == (0, '\\u0416\n')


def test_other_exceptions_keep_their_traceback(tmp_path):
    done = python(tmp_path, '-c', 'import lm.configurator; 1 / 0')
    assert done.returncode == 1 and 'Traceback' in done.stderr and 'ZeroDivisionError' in done.stderr


def test_a_reader_that_ends_early_is_no_error():
    process = subprocess.Popen(
        [sys.executable, configurator.ROOT / 'sweep.py', 'config/sweep_parity.py', '--dry_run'],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    process.stdout.close()  # as `| head -0` does, before anything is written
    assert (process.stderr.read(), process.wait()) == ('', 1)
