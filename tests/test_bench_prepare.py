"""What benchmarks/prepare.py promises apart from its figures."""

import os
import runpy
import subprocess
import sys
import time

import pytest
from conftest import ROOT, TIKTOKEN_CACHE, make_texts, write_jsonl

BENCH = ROOT / 'benchmarks/prepare.py'
pytestmark = pytest.mark.skipif(not os.path.exists('/proc/self/smaps_rollup'), reason='there is no /proc')


def test_memory_is_that_of_the_whole_tree(monkeypatch):
    monkeypatch.setattr(sys, 'argv', ['benchmarks/prepare.py'])
    tree_pss = runpy.run_path(str(BENCH))['tree_pss']
    inner = 'import time; held = bytes(40_000_000) + b"x"; time.sleep(60)'
    outer = f'import subprocess, sys; subprocess.run([sys.executable, "-c", {inner!r}])'
    process = subprocess.Popen([sys.executable, '-c', outer], start_new_session=True)
    try:
        deadline, peak = time.time() + 30, 0
        while peak < 40 and time.time() < deadline:
            peak = tree_pss(process.pid)
            time.sleep(0.05)
        assert 40 < peak < 200
    finally:
        os.killpg(process.pid, 9)
        process.wait()


@pytest.mark.slow
@pytest.mark.skipif(not TIKTOKEN_CACHE.is_dir(), reason=f'the GPT-2 vocabulary is not in {TIKTOKEN_CACHE}')
def test_both_sides_write_the_same_number_of_tokens(tmp_path):
    corpus = write_jsonl(tmp_path / 'a.jsonl', make_texts(3000))
    done = subprocess.run(
        [sys.executable, BENCH, f'--input={corpus}', '--megabytes=1', '--runs=1', '--memory_at='],
        env={**os.environ, 'TIKTOKEN_CACHE_DIR': str(TIKTOKEN_CACHE), 'TMPDIR': str(tmp_path)},
        capture_output=True,
        text=True,
    )
    counts = [line.split(' tokens')[0].split()[-1] for line in done.stdout.splitlines() if ' tokens' in line]
    assert done.returncode in (0, 1) and len(set(counts)) == 1 and len(counts) == 2, done.stdout + done.stderr
    assert list(tmp_path.iterdir()) == [corpus]


def test_a_mistake_is_one_sentence():
    done = subprocess.run([sys.executable, BENCH, '--runs=0'], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr == 'error: runs is 0; it must be at least 1.\n'
