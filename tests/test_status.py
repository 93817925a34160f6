"`job_status` in a real browser: live, over a poor line, through a crash, with the keyboard, for eyes and for ears."
import os, signal
from time import sleep

import httpx2, pytest
from selenium.webdriver import ActionChains, Keys

import web_app
from bgtasks.server import Server
from browser import browser, htmx_files, needs_browser, shoot
from test_web import go, serving, soon, start

pytestmark = needs_browser

class Page:
    "What is on the page"
    def __init__(self, browser, client, *jobs):
        self.browser,self.client,self.jobs = browser,client,[o.rpartition('/')[2] for o in jobs]
        browser.get(str(client.base_url.join('/page?'+'&'.join(f'job={o}' for o in self.jobs))))

    def find(self, css): return self.browser.find_elements('css selector', css)
    def run(self, js, *args): return self.browser.execute_script(js, *args)
    def text(self, css):
        texts = self.run('return [...document.querySelectorAll(arguments[0])].filter(o => o.checkVisibility())'
                         '.map(o => o.innerText)', css)
        return ' '.join(' '.join(texts).split())
    def states(self): return self.run('return [...document.querySelectorAll("job-status")].map(o => o.dataset.state)')
    def bar(self):
        return self.run('const o = document.querySelector("progress"); return [o.value, o.max, o.ariaValueNow]')
    def said(self): return self.run('return document.querySelector("job-status [aria-live]").textContent')
    def streams(self):
        return self.run('return performance.getEntriesByType("resource").filter(o => o.name.includes("/events"))')
    def complaints(self): return [o for o in self.browser.get_log('browser') if 'Content Security' in o['message']]

@pytest.fixture
def client(tmp_path):
    with serving(web_app.starlette(tmp_path/'q.db')) as client: yield client

def test_a_job_from_start_to_end(browser, client):
    url = start(client, n=4)
    page = Page(browser, client, url)
    assert soon(lambda: page.states()==['running'])
    shoot(browser, 'status-begun')
    go(client, 2)
    # the bar moves by itself, for the eye and for the ear, and no page was loaded again
    assert soon(lambda: page.bar()[:2]==[2, 4])
    assert page.bar()[2]=='2' and page.text('[data-part=message]')=='2 / 4 · step 2'
    assert page.said()=='Job 1: 50 %' and not page.find('.job-toast')
    # who loads the page again in the middle sees the same
    browser.refresh()
    assert page.bar()==[2, 4, '2'] and page.text('[data-part=state]')=='Working'
    shoot(browser, 'status-half')
    go(client, 3)
    assert soon(lambda: page.find('.job-toast'))
    assert page.text('.job-toast strong')=='Job 1: Done' and page.states()==['succeeded']
    assert page.bar()==[1, 1, '1'] and page.text('[data-part=result]')=='4 steps'
    assert page.text('[data-part=title]')=='Job 1' and not page.text('button:not(.job-toast *)')
    shoot(browser, 'status-done')
    assert soon(lambda: client.get('/stats').json()['readers']==0) # nothing is followed any more
    # a page that is loaded after the end has nothing to announce
    browser.refresh()
    assert page.states()==['succeeded'] and not page.find('.job-toast') and not page.streams()
    assert page.complaints()==[]

MOST = """window.most = 0
const count = () => { most = Math.max(most, document.querySelectorAll('.job-toast').length) }
new MutationObserver(count).observe(document.documentElement, {childList: true, subtree: true})"""

def test_many_jobs_are_followed_over_one_line(browser, client):
    jobs = [start(client, n=1) for _ in range(12)] + [start(client, n=0, fail='no such row')]
    assert soon(lambda: client.get(jobs[-1]).json()['state']=='dead') # else its end is news, and a note that stays
    page = Page(browser, client, *jobs)
    assert soon(lambda: page.states()==['running']*12+['dead'])
    assert soon(lambda: client.get('/stats').json()['readers']==1)
    page.run(MOST) # looked at from within: a note goes after eight seconds, which may be over before we come to ask
    go(client, 12)
    assert soon(lambda: page.states()==['succeeded']*12+['dead'])
    assert page.text('[data-part=error]')=='ValueError: no such row'
    assert soon(lambda: page.run('return most')==4) # not a wall of them
    assert soon(lambda: client.get('/stats').json()['readers']==0) and len(page.streams())==1
    shoot(browser, 'status-many')

def test_failures_stay_in_the_corner_until_they_are_closed(browser, client):
    page = Page(browser, client, *(start(client, n=1, fail=f'no <b>{o}</b>') for o in ('bread', 'butter')))
    assert soon(lambda: page.states()==['running']*2)
    go(client, 2)
    assert soon(lambda: len(page.find('.job-toast[data-state=dead]'))==2)
    assert 'ValueError: no <b>bread</b>' in page.text('.job-toasts') and not page.find('.job-toast b')
    shoot(browser, 'status-failed')
    # one by the keyboard, the other by Escape
    page.find('.job-toast button')[0].send_keys(Keys.ENTER)
    assert soon(lambda: len(page.find('.job-toast'))==1)
    ActionChains(browser).send_keys(Keys.ESCAPE).perform()
    assert soon(lambda: not page.find('.job-toast'))

def test_cancel_with_the_keyboard(browser, client):
    page = Page(browser, client, url := start(client))
    assert soon(lambda: page.states()==['running'])
    ActionChains(browser).send_keys(Keys.TAB).perform()
    assert browser.switch_to.active_element.text=='Cancel'
    ActionChains(browser).send_keys(Keys.ENTER).perform()
    assert soon(lambda: page.states()==['cancelled']) and client.get(url).json()['state']=='cancelled'
    assert soon(lambda: page.text('.job-toast strong')=='Job 1: Cancelled')

def test_where_no_stream_comes_through_the_jobs_are_asked_for(browser, tmp_path):
    with serving(web_app.starlette(tmp_path/'q.db', deaf=True)) as client:
        page = Page(browser, client, start(client, n=2))
        go(client)
        assert soon(lambda: page.bar()[0]==1)
        go(client)
        assert soon(lambda: page.text('.job-toast strong')=='Job 1: Done') and page.states()==['succeeded']

def test_a_page_outlives_a_crash_of_the_server(browser, tmp_path):
    server = Server('web_app:starlette', path=str(tmp_path/'q.db')).start()
    port = int(server.url.rpartition(':')[2])
    try:
        with httpx2.Client(base_url=server.url) as client:
            page = Page(browser, client, start(client, n=2))
            go(client)
            assert soon(lambda: page.bar()[0]==1)
            os.kill(server.pid, signal.SIGKILL)
            server.stop()
            assert soon(lambda: 'No connection' in page.text('[data-part=offline]'))
            shoot(browser, 'status-offline')
            server = Server('web_app:starlette', path=str(tmp_path/'q.db'), port=port).start()
            assert server.url==str(client.base_url).rstrip('/')
            assert soon(lambda: not page.text('[data-part=offline]') and page.states()==['running'])
            go(client, 2)
            assert soon(lambda: page.states()==['succeeded'] and page.find('.job-toast'))
    finally: server.stop()

def test_an_element_may_come_and_go_at_any_time(browser, client):
    a,b = start(client, n=1),start(client, n=1)
    page = Page(browser, client)
    page.run(f'document.querySelector("main").innerHTML = \'<job-status src="{a}"></job-status>\'') # as HTMX would
    assert soon(lambda: page.states()==['running']) and page.text('[data-part=title]')=='Steps'
    page.run(f'document.querySelector("main").insertAdjacentHTML("beforeend", \'<job-status src="{b}"></job-status>\')')
    assert soon(lambda: page.states()==['running']*2)
    page.run('document.querySelector("job-status").remove()')
    page.run('addEventListener("job-done", e => { window.heard = [e.detail.job, e.detail.state] })')
    go(client, 2)
    assert soon(lambda: page.states()==['succeeded'])
    assert page.run('return window.heard')==[b.rpartition('/')[2], 'succeeded']
    assert soon(lambda: len(page.find('.job-toast'))==1)
    page.run('document.querySelector("job-status").outerHTML = ""')
    assert soon(lambda: client.get('/stats').json()['readers']==0)

NOTES = """window.notes = []
class Note { constructor(title, o) { notes.push([title, o.body, o.tag]) }
  static permission = 'default'
  static async requestPermission() { Note.permission = 'granted' } }
window.Notification = Note"""

def test_who_looks_elsewhere_is_called_if_that_was_allowed(browser, client):
    "The browser's own window for it can't be seen here; what is called is"
    browser.execute_cdp_cmd('Page.addScriptToEvaluateOnNewDocument', dict(source=NOTES))
    url = start(client, n=1)
    page = Page(browser, client, url)
    assert soon(lambda: page.find('[data-notify]:not([hidden])'))
    page.find('[data-notify]')[0].click()
    assert soon(lambda: not page.find('[data-notify]:not([hidden])'))
    here = browser.current_window_handle
    browser.switch_to.new_window('tab')
    assert soon(lambda: client.get('/stats').json()['readers']==0) # a hidden page holds no line
    go(client)
    assert soon(lambda: client.get('/stats').json()['shown']==['succeeded']) # it has asked by itself
    sleep(2) # and has taken in what it was told; it can't be asked while it is hidden
    browser.switch_to.window(here)
    assert page.states()==['succeeded'] and page.run('return notes')==[['Job 1: Done', '', url.rpartition('/')[2]]]

def test_for_eyes_and_ears(browser, client):
    page = Page(browser, client, start(client, n=4))
    go(client)
    assert soon(lambda: page.said()=='Job 1: 25 %')
    tree = browser.execute_cdp_cmd('Accessibility.getFullAXTree', {})['nodes']
    by_role = {}
    for o in tree: by_role.setdefault(o.get('role', {}).get('value'), []).append(o.get('name', {}).get('value', ''))
    assert by_role['progressbar']==['Job 1'] and 'Cancel' in by_role['button'] and 'status' in by_role, by_role
    def animated(): return page.run('return document.getAnimations().filter(o => o.playState === "running").length')
    assert animated() > 0
    reduced = dict(features=[dict(name='prefers-reduced-motion', value='reduce')])
    browser.execute_cdp_cmd('Emulation.setEmulatedMedia', reduced)
    assert animated()==0

@pytest.mark.parametrize('make,path', [('fasthtml', '/mine?job='), ('fastapi', '/page?job=')])
def test_in_other_frameworks(browser, tmp_path, make, path):
    with serving(getattr(web_app, make)(tmp_path/'q.db')) as client:
        page = Page(browser, client, url := start(client, n=1))
        browser.get(str(client.base_url.join(path+url.rpartition('/')[2])))
        assert soon(lambda: page.states()==['running'])
        go(client)
        assert soon(lambda: page.states()==['succeeded'] and page.find('.job-toast'))

# Beside HTMX

HTMX = {o.stem.partition('.')[0]: o for o in htmx_files()}

@pytest.fixture(params=['htmx-2', 'htmx-4'])
def htmx(request, tmp_path):
    "A server whose pages have the real HTMX, of a version that is the test's parameter"
    if request.param not in HTMX: pytest.skip(f'needs {request.param}, as django-htmx 1.29 ships it (the extra `dev`)')
    with serving(web_app.htmx_app(tmp_path/'q.db', HTMX[request.param])) as client: yield client

class HtmxPage(Page):
    "A page with some jobs on it, and above them what HTMX is told"
    def __init__(self, browser, client, do, *jobs):
        self.browser,self.client,self.jobs = browser,client,[o.rpartition('/')[2] for o in jobs]
        browser.get(str(client.base_url.join('/htmx').copy_with(params=dict(do=do, job=self.jobs))))
        assert soon(lambda: self.run('return !!window.htmx'))

    def press(self, css='#press'): self.run('document.querySelector(arguments[0]).click()', css)
    def shown(self): return self.run('return [...document.querySelectorAll("job-status")].map(o => o.job)')
    def followed(self): o = self.client.get('/stats').json(); return o['readers'],o['follows']
    def toasts(self): return self.text('.job-toast strong')

def test_htmx_swaps_jobs_in(htmx, browser):
    do = '<button id="press" hx-post="/begin" hx-target="#jobs" hx-swap="beforeend">Begin</button>'
    page = HtmxPage(browser, htmx, do)
    assert page.followed()==(0, [])
    for n in (1, 2, 3):
        page.press()
        assert soon(lambda: page.states()==['running']*n)
    assert soon(lambda: page.followed()==(1, sorted(page.shown()))) # three jobs, one line
    go(htmx, 3)
    assert soon(lambda: page.states()==['succeeded']*3 and len(page.find('.job-toast'))==3)
    assert soon(lambda: page.followed()==(0, []))
    # what was fetched anew in the meantime is HTMX's as well
    page.press('job-status button')
    assert soon(lambda: page.text('#asked')=='asked') and page.complaints()==[]

def swaps(*hows): # only HTMX 4 has swaps that morph
    return pytest.mark.parametrize('htmx,swap', [(v, o) for v in ('htmx-2', 'htmx-4') for o in hows
                                                 if v=='htmx-4' or 'Morph' not in o], indirect=['htmx'])

@swaps('outerHTML', 'outerMorph', 'delete', 'innerHTML target:#jobs')
def test_htmx_swaps_a_live_job_out(htmx, browser, swap):
    a,b,c = sorted((start(htmx, n=1) for _ in range(3)), key=lambda o: o[6:])
    how,_,target = swap.partition(' target:')
    do = (f'<button id="press" hx-get="/one?job={c[6:]}" hx-target="{target or "job-status"}" hx-swap="{how}">Other'
          '</button>')
    page = HtmxPage(browser, htmx, do, a, b)
    assert soon(lambda: page.states()==['running']*2 and page.followed()==(1, [a[6:], b[6:]]))
    page.press()
    left = [b[6:]] if how=='delete' else [c[6:]] if target else [c[6:], b[6:]]
    assert soon(lambda: page.shown()==left)
    assert soon(lambda: page.followed() in ((1, sorted(left)), (1, [a[6:], b[6:]])))
    go(htmx, 3)
    assert soon(lambda: page.states()==['succeeded']*len(left) and len(page.find('.job-toast'))==len(left))
    assert a[6:] not in page.toasts() and soon(lambda: page.followed()==(0, []))

@swaps('outerHTML', 'outerMorph')
def test_htmx_polls_beside_the_stream(htmx, browser, swap):
    url = start(htmx, n=1)
    do = f'<div hx-get="/one?job={url[6:]}" hx-trigger="every 50ms" hx-target="job-status" hx-swap="{swap}"></div>'
    page = HtmxPage(browser, htmx, do, url)
    asked = 'return performance.getEntriesByType("resource").filter(o => o.name.includes("/one")).length'
    assert soon(lambda: page.run(asked) > 10) and page.states()==['running']
    assert page.followed()==(1, [url[6:]]) # the same line all the time
    go(htmx)
    assert soon(lambda: page.find('.job-toast')) and page.toasts()==f'{url[6:]}: Done'
    before = page.run(asked)
    assert soon(lambda: page.run(asked) > before+10)
    assert len(page.find('.job-toast'))==1 and page.states()==['succeeded'] and page.followed()==(0, [])

@pytest.mark.parametrize('boost', ['true', 'false'])
def test_htmx_navigates_and_comes_back(htmx, browser, boost):
    done,other,url = (start(htmx, n=n) for n in (0, 1, 1))
    do = f'<a id="press" hx-boost="{boost}" href="/elsewhere">Elsewhere</a>'
    page = HtmxPage(browser, htmx, do, other, url)
    assert soon(lambda: page.states()==['running']*2 and page.followed()[0]==1)
    go(htmx)
    assert soon(lambda: len(page.find('.job-toast'))==1)
    page.press()
    assert soon(lambda: page.text('h1')=='Elsewhere')
    assert soon(lambda: page.followed()==(0, [])) # nothing is followed from there
    # the note stays where the page was not left for good; it is no part of what HTMX keeps
    assert len(page.find('.job-toast'))==(boost=='true')
    go(htmx)
    assert soon(lambda: htmx.get(url).json()['state']=='succeeded')
    browser.back()
    assert soon(lambda: page.states()==['succeeded']*2)
    assert len(page.find('.job-toasts'))<=1 and soon(lambda: page.followed()==(0, []))
    late = start(htmx, n=1)
    page.run('htmx.ajax("GET", arguments[0], {target: "#jobs", swap: "innerHTML"})', f'/one?job={late[6:]}')
    assert soon(lambda: page.states()==['running'] and page.followed()==(1, [late[6:]]))
    go(htmx)
    assert soon(lambda: page.states()==['succeeded'] and late[6:] in page.toasts() and page.followed()==(0, []))
