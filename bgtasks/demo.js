// The part of HTMX that this page uses, with HTMX's own attributes: hx-post, hx-target, hx-swap, hx-swap-oob,
// hx-trigger, and the headers HX-Retarget and HX-Reswap.

const swaps = {
  innerHTML: (el, parts) => el.replaceChildren(...parts),
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

async function send(form) {
  const start = performance.now()
  let resp, html
  try {
    resp = await fetch(form.getAttribute('hx-post'), {method: 'POST', body: new FormData(form), headers: {'HX-Request': 'true'}})
    html = await resp.text()
  } catch {}
  document.getElementById('offline').hidden = !!resp
  const took = form.querySelector('[data-took]') // not HTMX's: says how quick the answer was
  if (took) took.textContent = resp?.ok ? `answered in ${Math.ceil(performance.now() - start)} ms` : ''
  if (!resp || resp.status >= 500) return
  const target = document.querySelector(resp.headers.get('HX-Retarget') ?? form.getAttribute('hx-target'))
  swaps[resp.headers.get('HX-Reswap') ?? form.getAttribute('hx-swap')](target, parse(html))
}

document.addEventListener('submit', event => {
  event.preventDefault()
  send(event.target)
})

// a job that has ended may have others that tell of it: what hx-trigger says, for the one list that has it
document.addEventListener('job-done', async () => {
  const resp = await fetch('/told', {headers: {'HX-Request': 'true'}}).catch(() => {})
  if (resp?.ok) document.getElementById('told')?.replaceWith(...parse(await resp.text()))
})
