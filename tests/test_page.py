"""The page of serve.py in a browser: to write, chat and infill, and to look at the steps."""

import json

import pytest
from conftest import letter_tokenizer
from helpers import ASCII
from test_serve import server  # noqa: F401  (a fixture)

from lm.watch import Frames, save_page

CHROMIUM = '/usr/bin/chromium'
OPTIONS = 'headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking'
OPTIONS += ' disable-component-update disable-sync'


@pytest.fixture(scope='module')
def browser():
    api = pytest.importorskip('playwright.sync_api', reason='playwright is not installed')
    with api.sync_playwright() as playwright:
        try:
            options = ['--' + option for option in OPTIONS.split()]
            browser = playwright.chromium.launch(executable_path=CHROMIUM, args=options)
        except api.Error as error:
            pytest.skip(f'{CHROMIUM} does not start: {error.message.splitlines()[0]}')
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser):
    """A function that opens an address; what the page's script or its security policy refuses is an error."""
    complaints = []

    def open_page(address):
        page = browser.new_page(viewport={'width': 390, 'height': 844})
        page.set_default_timeout(20_000)
        page.on('pageerror', lambda error: complaints.append(str(error)))
        page.on('console', lambda said: 'Policy' in said.text and complaints.append(said.text))
        page.goto(address)
        return page

    yield open_page
    assert not complaints
    for context in browser.contexts:
        context.close()


@pytest.fixture
def page(open_page, server):  # noqa: F811
    page = open_page(f'http://127.0.0.1:{server.port()}/')
    page.route('**/v1/**', give_seed)
    page.wait_for_selector('#models label')
    page.fill('#length', '12')
    return page


def give_seed(route):
    """Send a request on with a seed: by chance a model of random weights ends its text at once."""
    body = route.request.post_data
    is_text = body and route.request.url.endswith(('completions', 'infill'))
    route.continue_(post_data=json.dumps({**json.loads(body), 'seed': 1}) if is_text else body)


def choose(page, mode, *models):
    """Choose what to do and the models to do it with."""
    page.click(f'#modes >> text={mode}')
    for box in page.query_selector_all('#models label'):
        page_box, name = box.query_selector('input'), box.inner_text().split('\n')[0]
        if page_box.is_enabled():
            page_box.set_checked(name in models)


def run(page):
    page.click('#go')
    page.wait_for_selector('#stop:disabled')


def step_to(page, step):
    page.eval_on_selector(
        '.player input', '(slider, step) => { slider.value = step; slider.oninput(); }', step
    )
    return page.inner_text('.player output')


def test_two_models_write_side_by_side(page):
    choose(page, 'Write', 'ar', 'diffusion')
    page.fill('#text', 'the cat')
    run(page)
    names = page.locator('#answers h2').all_inner_texts()
    assert [name.split('\n')[0] for name in names] == ['ar', 'diffusion']
    texts = page.locator('#answers .text').all_inner_texts()
    assert all(text.startswith('the cat') and len(text) > 7 for text in texts) and texts[0] != texts[1]
    assert page.evaluate('document.documentElement.scrollWidth') <= 390  # nothing is wider than a phone


def test_a_conversation_is_kept_and_begun_anew(page):
    choose(page, 'Chat', 'ar')
    for text in ('hello', '<img src=x onerror=alert(1)>'):
        page.fill('#text', text)
        page.press('#text', 'Enter')
        page.wait_for_selector('#stop:disabled')
    assert page.locator('.said.user').all_inner_texts() == ['hello', '<img src=x onerror=alert(1)>']
    assert page.locator('.said').count() == 4 and page.locator('#answers img').count() == 0
    page.click('#new')
    assert page.locator('.said').count() == 0


@pytest.mark.faults
def test_a_conversation_goes_on_after_an_answer_of_nothing(page):
    empty = {'choices': [{'index': 0, 'delta': {'content': ''}, 'finish_reason': 'stop'}]}
    events, asked = f'data: {json.dumps(empty)}\n\ndata: [DONE]\n\n', []

    def answer(route):
        asked.append([said['role'] for said in route.request.post_data_json['messages']])
        route.fulfill(content_type='text/event-stream', body=events)

    page.route('**/v1/chat/completions', answer)
    choose(page, 'Chat', 'ar')
    for text in ('hello', 'again'):
        page.fill('#text', text)
        run(page)
    assert asked == [['user'], ['user', 'assistant', 'user']]
    assert page.locator('.said').count() == 4 and page.locator('.error').count() == 0


def test_stop_ends_an_answer(page):
    choose(page, 'Chat', 'sdd')
    page.fill('#length', '1000')
    page.fill('#text', 'hello')
    page.click('#go')
    page.wait_for_selector('.said.busy')
    page.click('#stop')
    page.wait_for_selector('#stop:disabled', timeout=2000)
    assert page.locator('.error').count() == 0 and page.is_enabled('#go')


def test_a_marked_part_becomes_a_gap_and_is_filled(page):
    choose(page, 'Infill', 'diffusion')
    page.fill('#text', 'the cat sat on')
    page.eval_on_selector('#text', 'box => { box.focus(); box.setSelectionRange(3, 8); }')
    with page.expect_response('**/v1/tokenize'):
        page.click('#gap')
    page.wait_for_timeout(200)
    text = page.input_value('#text')
    assert text.startswith('the <mask:') and text.endswith('> sat on')
    run(page)
    assert page.locator('.cells .w').count() == int(text[10 : text.index('>')]) >= 3
    shown = page.inner_text('.cells')
    assert shown.startswith('the ') and shown.endswith(' sat on')


def test_the_steps_of_a_text_are_watched(page):
    choose(page, 'Write', 'sdd')
    page.check('#watch')
    page.fill('#text', 'the')
    run(page)
    page.click('.player button')  # it plays
    assert step_to(page, 4) == 'step 4 / 12'
    kinds = lambda: [page.locator(f'.cells .{kind}').count() for kind in 'gwh']
    assert kinds() == [4, 4, 8] and page.locator('.cells .new').count() == 1
    page.hover('.cells .h >> nth=2')
    lines = page.inner_text('#tip').split('\n')
    assert lines[0] == 'hidden' and len(lines) > 4 and all(line.endswith(' %') for line in lines[1:])
    page.hover('.cells .w b:visible >> nth=0')
    assert page.inner_text('#tip').endswith(' % sure')
    assert step_to(page, 12) == 'step 12 / 12' and kinds() == [4, 12, 0]


def test_what_the_server_refuses_is_shown_as_its_sentence(page):
    choose(page, 'Write', 'ar', 'diffusion')
    page.fill('#text', 'Zürich')
    run(page)
    errors = page.locator('.error').all_inner_texts()
    assert len(errors) == 2 and "The character 'ü' of 'Zürich' is not in" in errors[0]


def test_a_saved_page_shows_its_steps_and_asks_for_nothing(open_page, tmp_path):
    tokenizer = letter_tokenizer(ASCII)
    frames = Frames(tokenizer)
    frames.begin(tokenizer.encode('</script>'))
    frames.steps.append([[9, '<b>', 'w', 0.5]])
    save_page(tmp_path / 'steps.html', 'A <title>', frames.steps)
    page = open_page((tmp_path / 'steps.html').as_uri())
    assert page.inner_text('h1') == page.title() == 'A <title>' and page.locator('textarea').count() == 0
    assert step_to(page, 1) == 'step 1 / 1' and page.inner_text('.cells') == '</script><b>'
