// What a browser can say about how a page looks; `tests/looking.py` asks.
window.looking = {};

// Composites every visible text's colour over what lies behind it, and compares by WCAG 2's formula.
looking.contrast = () => {
  const canvas = new OffscreenCanvas(1, 1).getContext('2d', {willReadFrequently: true});
  const known = new Map();
  const rgba = (text) => {
    if (!known.has(text)) {
      canvas.clearRect(0, 0, 1, 1);
      canvas.fillStyle = text;
      canvas.fillRect(0, 0, 1, 1);
      const [r, g, b, a] = canvas.getImageData(0, 0, 1, 1).data;
      known.set(text, [r, g, b, a / 255]);
    }
    return known.get(text);
  };
  const over = (top, under, opacity = 1) => {
    const a = top[3] * opacity;
    return [0, 1, 2].map((i) => top[i] * a + under[i] * (1 - a)).concat(1);
  };
  const light = (colour) => {
    const [r, g, b] = colour.slice(0, 3).map((c) => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const chain = (element) => element ? [element, ...chain(element.parentElement)] : [];
  const behind = (element) => {
    const layers = [];
    for (const one of chain(element)) {
      const style = getComputedStyle(one);
      if (style.backgroundImage.includes('gradient') || style.backgroundImage.includes('url')) return null;
      layers.push(rgba(style.backgroundColor));
      if (layers.at(-1)[3] === 1) break;
    }
    return layers.reverse().reduce((under, top) => over(top, under), [255, 255, 255, 1]);
  };
  const faults = new Map();
  const look = (element, colour, text, style) => {
    const under = behind(element);
    if (!under) return 0;
    const opacity = chain(element).reduce((all, one) => all * Number(getComputedStyle(one).opacity), 1);
    const [a, b] = [light(over(rgba(colour), under, opacity)), light(under)].sort((x, y) => y - x);
    const ratio = (a + 0.05) / (b + 0.05), size = parseFloat(style.fontSize);
    const large = size >= 24 || (size >= 18.66 && Number(style.fontWeight) >= 700);
    if (ratio < (large ? 3 : 4.5) - 0.005) {
      const name = `${element.tagName.toLowerCase()}.${String(element.className.baseVal ?? element.className).split(' ').filter((c) => !c.startsWith('svelte')).join('.')}`;
      faults.set(`${name} "${text.trim().slice(0, 40)}" ${colour} ${ratio.toFixed(2)}`, 1);
    }
    return 1;
  };
  const shown = (element) => {
    if (!element.checkVisibility({opacityProperty: true, visibilityProperty: true})) return false;
    const box = element.getBoundingClientRect();
    return box.width > 1 && box.height > 1 && !element.closest('[disabled], [aria-disabled=true], .sr-only');
  };
  let count = 0;
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement, text = walker.currentNode.textContent;
    if (!text.trim() || ['SCRIPT', 'STYLE', 'NOSCRIPT', 'OPTION'].includes(element.tagName) || !shown(element)) continue;
    const style = getComputedStyle(element);
    count += look(element, element.closest('svg') ? style.fill : style.color, text, style);
  }
  for (const field of document.querySelectorAll('input, textarea')) {
    if (!shown(field) || ['range', 'checkbox', 'radio', 'file'].includes(field.type) || field.disabled) continue;
    const style = getComputedStyle(field);
    if (field.value) count += look(field, style.color, field.value, style);
    else if (field.placeholder) {
      const faint = getComputedStyle(field, '::placeholder');
      count += look(field, faint.color, field.placeholder, style);
    }
  }
  return {count, faults: [...faults.keys()]};
};

// What the keyboard has to reach, and what each is called.
looking.controls = () => {
  const shown = (element) => {
    const box = element.getBoundingClientRect();
    return element.checkVisibility({visibilityProperty: true}) && box.width > 0 && box.height > 0;
  };
  const text = (element) => (element?.innerText || element?.textContent || '').trim();
  window.nameOf = (element) => {
    const by = (element.getAttribute('aria-labelledby') || '').split(/\s+/).filter(Boolean);
    const labels = [...(element.labels || [])].map(text).join(' ').trim();
    return element.getAttribute('aria-label') || by.map((id) => text(document.getElementById(id))).join(' ').trim()
      || labels || (['INPUT', 'TEXTAREA', 'SELECT'].includes(element.tagName) ? '' : text(element))
      || element.querySelector('img[alt]')?.alt || element.getAttribute('title') || '';
  };
  window.wordsOf = (element) => {
    const place = element.closest('[id]:not([id^=component]):not([id^=range])');
    return `${element.tagName.toLowerCase()}${element.type ? ':' + element.type : ''} in #${place?.id || '?'} "${window.nameOf(element).slice(0, 40)}"`;
  };
  const wanted = 'a[href], button, input, select, textarea, summary, [tabindex]:not([tabindex="-1"])';
  const radios = new Set();
  window.controls = [...document.querySelectorAll(wanted)].filter((element) => {
    if (!shown(element) || element.disabled || element.closest('[inert]') || element.tabIndex < 0) return false;
    if (element.type === 'radio') {
      const group = element.closest('fieldset') || element.name;
      if (radios.has(group)) return false;
      radios.add(group);
    }
    return true;
  });
  window.reached = new Set();
  window.visited = new Set();
  return {count: window.controls.length, nameless: window.controls.filter((one) => !window.nameOf(one)).map(window.wordsOf)};
};

// After a press of Tab: whether the focus can be seen, by what changes when it is taken away.
looking.focused = () => {
  const element = document.activeElement;
  if (!element || element === document.body) return {end: true, lost: true};
  const drawn = () => {
    const parts = [];
    for (let one = element, n = 0; one && n < 5; one = one.parentElement, n++) {
      const style = getComputedStyle(one);
      const outline = style.outlineStyle !== 'none' && parseFloat(style.outlineWidth) > 0 ? style.outline : '';
      parts.push([outline, style.boxShadow, style.borderColor, style.backgroundColor, style.textDecorationLine].join());
    }
    return parts.join(';');
  };
  const again = window.visited.has(element);
  window.visited.add(element);
  window.reached.add(element);
  if (element.type === 'radio') for (const other of element.closest('fieldset')?.querySelectorAll('[type=radio]') || []) window.reached.add(other);
  const on = drawn();
  element.blur();
  const off = drawn();
  element.focus({preventScroll: true});
  return {end: again, words: window.wordsOf(element), seen: on !== off};
};

// What Tab has not come to.
looking.missed = () => window.controls.filter((one) => one.isConnected && one.checkVisibility() && !window.reached.has(one)).map(window.wordsOf);
