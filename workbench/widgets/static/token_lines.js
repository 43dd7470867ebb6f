// A prompt's tokens in lines. Only the visible lines are in the page, so that thousands of tokens scroll as smoothly as ten.

const LINE = 34; // line height in pixels
const SPARE = 6; // lines drawn above and below the visible ones

function shown(token) {
  const text = shownToken(token);
  if (text.length <= 24) return text;
  const letters = [...text]; // not UTF-16 units, so that no character is cut
  return letters.length > 24 ? letters.slice(0, 23).join("") + "…" : text;
}

// Lay tokens out in lines of the given width: the line of each token, its left edge and width, and the first token of each line.
// ASCII characters are `character` wide; other texts, such as Chinese ones, which are wider, are measured.
function layOut(tokens, width, character, measured) {
  const line = new Int32Array(tokens.length), left = new Float32Array(tokens.length), wide = new Float32Array(tokens.length);
  const firsts = [0];
  let x = 0;
  tokens.forEach((token, index) => {
    const text = shown(token);
    const size = (/^[\x20-\x7e]*$/.test(text) ? Math.max(text.length, 1) * character : Math.max(measured(text), character)) + 8;
    if (x > 0 && x + size > width) {
      firsts.push(index);
      x = 0;
    }
    line[index] = firsts.length - 1;
    left[index] = x;
    wide[index] = size;
    x += size;
  });
  return { line, left, wide, firsts, lines: firsts.length };
}

// The lines of a model's tokens in a scrolling strip. Call `measure` first, and again after the tokens or the width have changed.
function tokenLines(model, strip) {
  const inner = piece("div", "wb-inner", strip), rows = piece("div", "wb-lines", inner);
  const drawn = new Map(); // line -> its node
  let layout = null, special = new Set();

  const endOf = (line) => (line + 1 < layout.lines ? layout.firsts[line + 1] : model.get("tokens").length);

  function measure() {
    const probe = piece("span", "wb-token", inner, "0".repeat(50));
    const character = (probe.getBoundingClientRect().width - 8) / 50 || 8;
    const pen = document.createElement("canvas").getContext("2d"), style = getComputedStyle(probe);
    pen.font = `${style.fontSize} ${style.fontFamily}`;
    probe.remove();
    const widths = new Map();
    const measured = (text) => {
      if (!widths.has(text)) widths.set(text, Math.ceil(pen.measureText(text).width));
      return widths.get(text);
    };
    layout = layOut(model.get("tokens"), Math.max(strip.clientWidth - 18, 120), character, measured);
    inner.style.height = `${layout.lines * LINE + 12}px`;
    special = new Set(model.get("special"));
    drawn.clear();
    rows.replaceChildren();
  }

  // Draw the lines that became visible and keep the others, so that scrolling costs only the new ones. Returns the lines [from, to).
  function draw() {
    const from = Math.max(Math.floor(strip.scrollTop / LINE) - SPARE, 0);
    const to = Math.min(Math.ceil((strip.scrollTop + strip.clientHeight) / LINE) + SPARE, layout.lines);
    for (const [line, node] of drawn) {
      if (line >= from && line < to) continue;
      node.remove();
      drawn.delete(line);
    }
    const page = document.createDocumentFragment();
    for (let line = from; line < to; line++) if (!drawn.has(line)) page.append(drawLine(line));
    rows.append(page);
    return [from, to];
  }

  function drawLine(line) {
    const row = document.createElement("div");
    row.className = "wb-line";
    row.style.top = `${line * LINE + 8}px`;
    const tokens = model.get("tokens");
    for (let index = layout.firsts[line]; index < endOf(line); index++) {
      const node = document.createElement("span");
      node.className = special.has(index) ? "wb-token wb-special" : "wb-token";
      node.textContent = shown(tokens[index]);
      node.title = `${index}: ${JSON.stringify(tokens[index])}${special.has(index) ? " (special token)" : ""}`;
      node.dataset.token = index;
      if (index === model.get("hovered")) node.classList.add("wb-hovered");
      node.style.cssText = `left:${layout.left[index]}px;width:${layout.wide[index]}px`;
      shade(node, index);
      row.append(node);
    }
    drawn.set(line, row);
    return row;
  }

  // The parts of a range, one per line: [line, left, width].
  function pieces(start, stop) {
    const found = [];
    for (let line = layout.line[start]; line <= layout.line[stop - 1]; line++) {
      const first = Math.max(layout.firsts[line], start), last = Math.min(endOf(line), stop) - 1;
      found.push([line, layout.left[first], layout.left[last] + layout.wide[last] - layout.left[first]]);
    }
    return found;
  }

  // The token at the pointer, or the nearest one, and whether the pointer is in its right half.
  function tokenAt(event) {
    const box = inner.getBoundingClientRect();
    const line = Math.min(Math.max(Math.floor((event.clientY - box.top - 6) / LINE), 0), layout.lines - 1);
    const x = event.clientX - box.left;
    let low = layout.firsts[line], high = endOf(line) - 1;
    while (low < high) {
      const middle = (low + high + 1) >> 1;
      if (layout.left[middle] <= x) low = middle;
      else high = middle - 1;
    }
    return [low, x > layout.left[low] + layout.wide[low] / 2];
  }

  // Underline a token in its colour: four bytes of `shades`, red, green, blue and whether there is one.
  function shade(node, index) {
    const shades = model.get("shades"), at = 4 * index;
    const known = shades && shades.byteLength >= at + 4 && shades.getUint8(at + 3);
    node.style.boxShadow = known ? `inset 0 -5px 0 rgb(${shades.getUint8(at)} ${shades.getUint8(at + 1)} ${shades.getUint8(at + 2)})` : "";
  }

  function reshade() {
    for (const node of rows.querySelectorAll(".wb-token")) shade(node, Number(node.dataset.token));
  }

  function hover() {
    rows.querySelector(".wb-hovered")?.classList.remove("wb-hovered");
    rows.querySelector(`[data-token="${model.get("hovered")}"]`)?.classList.add("wb-hovered");
  }

  const lineOf = (token) => layout.line[token];

  return { inner, measure, draw, pieces, tokenAt, hover, lineOf, reshade };
}
