"""A question to a page in a browser: which of its words are too faint to read."""

from __future__ import annotations

FAINT = """() => {
  const parts = color => color.match(/[\\d.]+/g).map(Number)
  const luminance = color => color.slice(0, 3).map(v => v / 255)
    .map(v => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0)
  const ground = e => {
    for (; e; e = e.parentElement) {
      const color = getComputedStyle(e).backgroundColor
      if (parts(color).length < 4 || parts(color)[3] > .9) return color
    }
    return 'rgb(255, 255, 255)'
  }
  const found = []
  for (const e of document.querySelectorAll('main *')) {
    const words = [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim())
    if (!words || !e.checkVisibility() || e.disabled) continue
    const below = parts(ground(e)), own = parts(getComputedStyle(e).color), share = own[3] ?? 1
    const seen = below.slice(0, 3).map((v, i) => own[i] * share + v * (1 - share))
    const [low, high] = [seen, below].map(luminance).sort((a, b) => a - b)
    if ((high + .05) / (low + .05) < 4.5) found.push(e.outerHTML.slice(0, 200))
  }
  return found
}"""
"""Elements whose text has a contrast below 4.5 to 1 (WCAG 2.2, 1.4.3)."""
