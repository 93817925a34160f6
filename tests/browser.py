"A real browser without a window, and pictures of what it shows."
import os, shutil
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CHROMIUM,DRIVER = shutil.which('chromium'),shutil.which('chromedriver')
FLAGS = ['--headless', '--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run',
         '--disable-background-networking', '--disable-component-update', '--disable-sync']
NO_BROWSER = 'needs chromium and chromedriver (Debian: chromium, chromium-driver)'
needs_browser = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason=NO_BROWSER)

@pytest.fixture
def browser(tmp_path):
    from selenium import webdriver
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    options.set_capability('goog:loggingPrefs', dict(browser='ALL'))
    for o in (*FLAGS, f'--user-data-dir={tmp_path/"profile"}'): options.add_argument(o)
    res = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield res
    res.quit()

def text_of(browser, css):
    "What can be read there: in one step, since a card that is renewed is another element"
    script = "return [...document.querySelectorAll(arguments[0])].map(o => o.innerText).join(' ')"
    return browser.execute_script(script, css)

def htmx_files():
    "The real HTMX, as a Python package ships it byte for byte: `htmx-2.min.js`, `htmx-4.min.js`"
    spec = find_spec('django_htmx')
    return sorted(Path(spec.origin).parent.glob('static/django_htmx/htmx-?.min.js')) if spec else []

def shoot(browser, name):
    "Save the page as it is, wide and narrow, light and dark"
    folder = Path(os.environ.get('BGTASKS_ARTIFACTS') or ROOT/'screenshots')
    folder.mkdir(parents=True, exist_ok=True)
    for size,width in (('wide', 1280), ('narrow', 390)):
        for scheme in ('light', 'dark'):
            metrics = dict(width=width, height=900, deviceScaleFactor=1, mobile=False)
            browser.execute_cdp_cmd('Emulation.setDeviceMetricsOverride', metrics)
            media = dict(features=[dict(name='prefers-color-scheme', value=scheme)])
            browser.execute_cdp_cmd('Emulation.setEmulatedMedia', media)
            browser.save_screenshot(str(folder/f'{name}-{size}-{scheme}.png'))
            assert browser.execute_script('return document.documentElement.scrollWidth') <= width
