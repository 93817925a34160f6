// The part of HTMX that this page uses, with HTMX's own attributes: hx-get, hx-post, hx-target, hx-swap, hx-swap-oob,
// hx-trigger="every 400ms", and the headers HX-Retarget and HX-Reswap.

const swaps = {
  innerHTML: (el, parts) => el.replaceChildren(...parts),
  outerHTML: (el, parts) => el.replaceWith(...parts),
  afterbegin: (el, parts) => el.prepend(...parts),
}

function parse(html) {
  const page = document.createElement('template')
  page.innerHTML = html
  for (const part of page.content.querySelectorAll('[hx-swap-oob]')) {
    const there = document.getElementById(part.id), how = part.getAttribute('hx-swap-oob')
    part.remove()
    if (how === 'innerHTML') there.textContent = part.textContent
    else { part.removeAttribute('hx-swap-oob'); there.replaceWith(part) }
  }
  return [...page.content.childNodes].filter(o => o.nodeType === 1 || o.textContent.trim())
}

function swap(el, resp, html) {
  const target = document.querySelector(resp.headers.get('HX-Retarget') ?? el.getAttribute('hx-target')) ?? el
  const how = resp.headers.get('HX-Reswap') ?? el.getAttribute('hx-swap'), parts = parse(html)
  if (parts.length === 1 && parts[0].isEqualNode?.(target)) return // nothing is new: leave it, and its animation, alone
  swaps[how](target, parts)
  for (const part of parts) if (part.matches?.('[hx-trigger]')) poll(part)
}

async function send(el, method, url) {
  const start = performance.now(), body = method === 'POST' ? new FormData(el) : undefined
  let resp, html
  try {
    resp = await fetch(url, {method, body, headers: {'HX-Request': 'true'}})
    html = await resp.text()
  } catch {}
  document.getElementById('offline').hidden = !!resp
  const took = el.querySelector('[data-took]') // not HTMX's: says how quick the answer was
  if (took) took.textContent = resp?.ok ? `answered in ${Math.ceil(performance.now() - start)} ms` : ''
  if (!resp || resp.status >= 500) return // the card stays as it was, and asks again
  swap(el, resp, html)
}

function poll(el) {
  setTimeout(async () => {
    if (!el.isConnected) return
    await send(el, 'GET', el.getAttribute('hx-get'))
    poll(el)
  }, parseInt(el.getAttribute('hx-trigger').slice('every '.length)))
}

document.querySelectorAll('[hx-trigger]').forEach(poll)
document.addEventListener('submit', event => {
  event.preventDefault()
  send(event.target, 'POST', event.target.getAttribute('hx-post'))
})
