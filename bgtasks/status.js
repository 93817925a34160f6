// <job-status src="/jobs/ID" data-state="running">…</job-status> shows a job, and this keeps it as it is on the server.
//
// One stream of events serves all the jobs of a page, for a browser has only six lines to a server. While the page is
// hidden, or where no stream comes through, the jobs are asked for now and then instead. What a job looks like is the
// server's business: when its state changes, its element is fetched anew.

const unfinished = ['queued', 'running'], states = [...unfinished, 'succeeded', 'dead', 'cancelled']
const pages = new Map() // what follows the jobs of one prefix, by prefix

const number = o => Number.isInteger(o) ? `${o}` : o.toFixed(2)

class Follower {
  constructor(base) { this.base = base; this.elements = new Map(); this.line = new Set(); this.awaited = new Set() }

  add(el) {
    if (!this.elements.has(el.job)) this.elements.set(el.job, new Set())
    this.elements.get(el.job).add(el)
    if (el.state) this.awaited.add(el.job) // its end will be news, in whichever element it is seen first
    this.soon()
  }

  remove(el) {
    const those = this.elements.get(el.job)
    if (!those?.delete(el)) return
    if (!those.size) this.elements.delete(el.job)
    this.soon()
  }

  all() { return [...this.elements.values()].flatMap(o => [...o]) }

  // elements come and go together: look once, when they have
  soon() { this.due ??= setTimeout(() => { this.due = undefined; this.follow() }, 20) }

  follow() {
    const jobs = [...this.elements.keys()].slice(0, 100), live = !document.hidden && !this.broken && globalThis.EventSource
    if (!live || !jobs.length) this.close()
    else if (this.source?.readyState === 2 || !jobs.every(o => this.line.has(o))) this.open(jobs)
    clearTimeout(this.poll)
    const rest = this.all().filter(o => !this.line.has(o.job))
    if (rest.length) this.poll = setTimeout(() => this.ask(rest), document.hidden ? 5000 : 1500)
  }

  close() { this.source?.close(); this.source = undefined; this.line = new Set(); this.found() }

  async ask(those) {
    await Promise.all(those.map(o => o.refresh()))
    this.soon()
  }

  open(jobs) {
    this.close()
    const source = new EventSource(`${this.base}/events?${jobs.map(o => 'job=' + encodeURIComponent(o)).join('&')}`)
    for (const kind of ['job', 'progress', ...states])
      source.addEventListener(kind, e => this.hear(kind, JSON.parse(e.data)))
    source.onopen = () => { this.waits = 1000; this.found(); this.offline(false) }
    source.onerror = () => {
      if (source !== this.source) return
      this.lost ??= setTimeout(() => this.offline(true), 1000) // a stream that ends in order is soon replaced
      if (source.readyState !== 2) return // it tries again by itself
      this.broken = true
      this.waits = Math.min(2 * (this.waits ?? 1000), 30000)
      setTimeout(() => { this.broken = false; this.soon() }, this.waits)
      this.soon()
    }
    this.source = source
    this.line = new Set(jobs)
  }

  found() { clearTimeout(this.lost); this.lost = undefined }

  offline(yes) { for (const el of this.all()) el.toggleAttribute('data-offline', yes) }

  hear(kind, {job, data}) {
    for (const el of this.elements.get(job) ?? []) {
      if (kind === 'progress') el.progress(data)
      else if (kind !== 'job' || data.state !== el.dataset.state) el.refresh()
      else if (data.progress) el.progress(data.progress)
    }
  }
}

class JobStatus extends HTMLElement {
  connectedCallback() {
    const src = this.getAttribute('src') ?? '', cut = src.lastIndexOf('/')
    const base = src.slice(0, cut)
    this.job = decodeURIComponent(src.slice(cut + 1))
    this.state = this.dataset.state
    if (!pages.has(base)) pages.set(base, new Follower(base))
    this.follower = pages.get(base)
    this.addEventListener('click', this)
    this.offer()
    if (!this.childElementCount) this.refresh() // an empty one, written by hand
    if (!this.state || unfinished.includes(this.state)) this.follower.add(this)
    else setTimeout(() => this.ended(), 0) // it came in place of one that was unfinished
  }

  disconnectedCallback() { this.follower.remove(this) }

  // what morphs a page changes an element without taking it out
  static observedAttributes = ['src', 'data-state']
  attributeChangedCallback(name, before, now) {
    if (!this.follower || !this.isConnected || before === now || name !== 'src' && now === this.state) return
    if (name === 'src') { this.disconnectedCallback(); this.quarter = undefined; this.connectedCallback() }
    this.refresh()
  }

  async handleEvent(event) {
    const pressed = event.target.closest?.('[data-cancel], [data-notify]')
    if (!pressed) return
    pressed.disabled = true
    if (pressed.matches('[data-notify]')) { await Notification.requestPermission(); document.querySelectorAll('job-status').forEach(o => o.offer()) }
    else await fetch(this.getAttribute('src'), {method: 'DELETE'}).catch(() => {})
    await this.refresh()
    pressed.disabled = false
  }

  // ask for leave to notify only where that is possible and not yet decided
  offer() {
    for (const o of this.querySelectorAll('[data-notify]')) o.hidden = globalThis.Notification?.permission !== 'default'
  }

  progress({done, total, message}) {
    if (this.asking) this.again = true // what is on its way may be older than this
    const bar = this.querySelector('[role=progressbar]'), text = this.querySelector('[data-part=message]')
    if (bar) {
      const share = total ? Math.min(done / total, 1) : undefined
      if (share === undefined) { bar.removeAttribute('value'); bar.removeAttribute('aria-valuenow') }
      else { bar.max = total; bar.value = done; bar.setAttribute('aria-valuemax', total); bar.setAttribute('aria-valuenow', done) }
      const quarter = Math.floor((share ?? 0) * 4)
      if (quarter > (this.quarter ?? 0) && quarter < 4) this.say(`${this.name}: ${quarter * 25} %`)
      this.quarter = quarter
    }
    if (text) text.textContent = [total ? `${number(done)} / ${number(total)}` : number(done), message].filter(o => o !== '').join(' · ')
  }

  get name() { return this.querySelector('[data-part=title]')?.textContent.trim() || this.job }

  say(text) {
    const place = this.querySelector('[aria-live]')
    if (place) place.textContent = text
  }

  // get the element anew; what the page has put into it by itself stays
  async refresh() {
    if (this.asking) { this.again = true; return }
    this.asking = true
    const src = this.getAttribute('src')
    let html, gone
    try {
      const resp = await fetch(src, {headers: {Accept: 'text/html'}, cache: 'no-cache'})
      gone = resp.status === 404
      if (resp.ok) html = await resp.text()
    } catch {}
    this.asking = false
    if (src !== this.getAttribute('src')) { this.again = false; return this.refresh() }
    if (gone) this.follower.remove(this)
    else this.toggleAttribute('data-offline', html === undefined)
    if (html !== undefined && this.isConnected) this.become(html)
    if (this.again) { this.again = false; await this.refresh() }
  }

  become(html) {
    const page = document.createElement('template')
    page.innerHTML = html
    const fresh = page.content.querySelector('job-status')
    if (!fresh) return
    const before = this.state, now = fresh.dataset.state
    for (const kept of this.querySelectorAll('[data-keep]')) {
      const place = fresh.querySelector(`[data-keep="${kept.dataset.keep}"]`)
      place ? place.replaceWith(kept) : fresh.append(kept)
    }
    const focus = this.contains(document.activeElement) && document.activeElement
    this.replaceChildren(...fresh.childNodes)
    this.state = now
    this.dataset.state = now
    globalThis.htmx?.process(this) // there may be hx-… in it
    this.querySelector('[role=progressbar]')?.setAttribute('aria-label', this.name)
    if (focus && this.contains(focus)) focus.focus()
    this.offer()
    if (unfinished.includes(now)) { this.follower.add(this); if (before !== now) this.say(this.said); return }
    this.follower.remove(this)
    this.ended()
  }

  get said() { return `${this.name}: ${this.querySelector('[data-part=state]')?.textContent.trim()}` }

  // say so once for each job, however many elements show it
  ended() {
    const state = this.state
    if (unfinished.includes(state) || !this.follower.awaited.delete(this.job)) return
    const error = this.querySelector('[data-part=error]')?.textContent.trim()
    toast(this.said, error, state)
    notify(this.said, error, this.job)
    this.dispatchEvent(new CustomEvent('job-done', {bubbles: true, detail: {job: this.job, state}}))
  }
}

// A note in the corner; one of a failure stays until it is closed.
function toast(title, text, state) {
  let place = document.querySelector('.job-toasts')
  if (!place) {
    place = document.createElement('div')
    place.className = 'job-toasts'
    place.setAttribute('role', 'status')
    place.setAttribute('aria-live', 'polite')
    document.documentElement.append(place) // not in the body, which HTMX may replace, or keep a copy of
    document.addEventListener('keydown', e => { if (e.key === 'Escape') place.lastElementChild?.remove() })
  }
  const note = document.createElement('div'), head = document.createElement('strong'), close = document.createElement('button')
  note.className = 'job-toast'
  note.dataset.state = state
  head.textContent = title
  close.type = 'button'
  close.textContent = '×'
  close.setAttribute('aria-label', 'Close')
  close.onclick = () => note.remove()
  note.append(head, close)
  if (text) { const p = document.createElement('p'); p.textContent = text; note.append(p) }
  setTimeout(() => { // after the place itself, so that it is read out
    place.append(note)
    const old = [...place.children].slice(0, -4)
    for (const o of old) if (o.dataset.state !== 'dead' || old.length > 8) o.remove()
  }, 50)
  if (state === 'dead') return
  let timer // its time runs while somebody could see it, and isn't just reading it
  const stay = () => clearTimeout(timer), leave = () => { stay(); if (!document.hidden) timer = setTimeout(() => note.remove(), 8000) }
  for (const o of ['mouseenter', 'focusin']) note.addEventListener(o, stay)
  for (const o of ['mouseleave', 'focusout']) note.addEventListener(o, leave)
  document.addEventListener('visibilitychange', leave)
  leave()
}

// Outside of the page only for those who have allowed it, and are looking elsewhere.
function notify(title, body, tag) {
  if (globalThis.Notification?.permission !== 'granted' || document.hasFocus() && !document.hidden) return
  try { new Notification(title, {body: body ?? '', tag}) } catch {} // some phones want a service worker for it
}

for (const [where, what] of [[document, 'visibilitychange'], [window, 'pageshow'], [window, 'online']])
  where.addEventListener(what, () => {
    for (const o of pages.values()) {
      if (what !== 'online' && !document.hidden) o.all().forEach(el => el.refresh())
      o.soon()
    }
  })
window.addEventListener('pagehide', () => pages.forEach(o => o.close()))

customElements.get('job-status') ?? customElements.define('job-status', JobStatus)
