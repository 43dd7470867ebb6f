// The token strip: ranges as coloured bars that are dragged, resized, added and removed, by mouse, touch and keyboard.
// Only the lines in sight are in the page, so that a prompt of thousands of tokens scrolls as one of ten does.

const LINE = 34; // pixels from line to line
const SPARE = 6; // lines drawn beyond what is in sight
const HISTORY = 200;
const COLOURS = ["#d1495b", "#00798c", "#8a5a9e", "#b06f00", "#3a7d44", "#5b6bbf"];

function shown(token) {
  const text = token.replace(/\n/g, "↵").replace(/\t/g, "⇥").replace(/^ /, "·");
  return text === "" ? "∅" : text.length > 24 ? text.slice(0, 23) + "…" : text;
}

// Lay tokens out in lines of a width: the line of each token, its left edge and width.
function layOut(tokens, width, character) {
  const line = new Int32Array(tokens.length), left = new Float32Array(tokens.length), wide = new Float32Array(tokens.length);
  const firsts = [0];
  let x = 0;
  tokens.forEach((token, index) => {
    const size = Math.max(shown(token).length, 1) * character + 8;
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

function make(tag, className, parent, text) {
  const node = document.createElement(tag);
  node.className = className;
  if (text !== undefined) node.textContent = text;
  parent.append(node);
  return node;
}

function render({ model, el }) {
  const root = make("div", "wb-editor", el);
  root.dataset.lmSuppressShortcuts = "true"; // JupyterLab has its own plans for Page Up and the like
  const bar = make("div", "wb-bar", root);
  const strip = make("div", "wb-strip", root);
  const inner = make("div", "wb-inner", strip);
  const list = make("ul", "wb-findings", root);
  const said = make("div", "wb-said", root);
  said.setAttribute("aria-live", "polite");
  strip.setAttribute("role", "group");
  strip.setAttribute("aria-label", "prompt tokens with embedding ranges");
  strip.tabIndex = 0;
  strip.style.maxHeight = `${model.get("height")}px`;

  let layout = null, drag = null, chosen = null, past = [], future = [], sending = false;
  let ranges = model.get("embedding_ranges").map((pair) => [...pair]);
  const length = () => model.get("tokens").length;

  const buttons = {};
  const button = (name, label, title, action) => {
    const node = make("button", "wb-button", bar, label);
    node.title = title;
    node.addEventListener("click", action);
    buttons[name] = node;
  };
  button("add", "Add range", "a new range after the chosen one", add);
  button("remove", "Remove", "the chosen range (Delete)", remove);
  button("undo", "Undo", "Ctrl+Z", undo);
  button("redo", "Redo", "Ctrl+Y", redo);
  button("copy", "Copy for LMDeploy", "input_embedding_ranges=[...]", copy);

  function measure() {
    const probe = make("span", "wb-token", inner, "0".repeat(50));
    const character = (probe.getBoundingClientRect().width - 8) / 50 || 8;
    probe.remove();
    layout = layOut(model.get("tokens"), Math.max(strip.clientWidth - 18, 120), character);
    inner.style.height = `${layout.lines * LINE + 12}px`;
  }

  const worst = (item) => {
    const about = model.get("findings").filter((finding) => finding.item === item && finding.severity !== "info");
    return [about.some((f) => f.severity === "error") ? "error" : about.length ? "warning" : "", about.map((f) => f.message).join("\n")];
  };

  // Pieces of a range, one a line: [line, left, width].
  function pieces(start, stop) {
    const found = [];
    for (let line = layout.line[start]; line <= layout.line[stop - 1]; line++) {
      const first = Math.max(layout.firsts[line], start);
      const last = Math.min((line + 1 < layout.lines ? layout.firsts[line + 1] : length()) - 1, stop - 1);
      found.push([line, layout.left[first], layout.left[last] + layout.wide[last] - layout.left[first]]);
    }
    return found;
  }

  function draw() {
    if (!layout || !length()) return;
    const focus = root.contains(document.activeElement) ? document.activeElement.dataset.key : undefined;
    const from = Math.max(Math.floor(strip.scrollTop / LINE) - SPARE, 0);
    const to = Math.min(Math.ceil((strip.scrollTop + strip.clientHeight) / LINE) + SPARE, layout.lines);
    const page = document.createDocumentFragment();
    const first = layout.firsts[from], last = to < layout.lines ? layout.firsts[to] : length();
    const tokens = model.get("tokens"), special = new Set(model.get("special"));
    for (let index = first; index < last; index++) {
      const node = document.createElement("span");
      node.className = special.has(index) ? "wb-token wb-special" : "wb-token";
      node.textContent = shown(tokens[index]);
      node.title = `${index}: ${JSON.stringify(tokens[index])}${special.has(index) ? " (special token)" : ""}`;
      node.style.cssText = `left:${layout.left[index]}px;top:${layout.line[index] * LINE + 8}px;width:${layout.wide[index]}px`;
      page.append(node);
    }
    ranges.forEach(([start, stop], item) => {
      const a = Math.max(start, 0), b = Math.min(stop, length());
      if (b <= a) return;
      const [severity, reason] = worst(item);
      const parts = pieces(a, b);
      parts.forEach(([line, left, width], at) => {
        if (line < from || line >= to) return;
        const body = document.createElement("div");
        body.className = `wb-range ${severity && "wb-" + severity}`;
        body.style.cssText = `left:${left}px;top:${line * LINE + 6}px;width:${width}px;--wb-colour:${COLOURS[item % COLOURS.length]}`;
        body.title = `${model.get("labels")[item] ?? "item " + item}: [${start}, ${stop}), ${stop - start} tokens${reason ? "\n" + reason : ""}`;
        body.dataset.item = item;
        body.dataset.part = "both";
        if (at === 0) control(body, item, "both", `range ${item}, tokens ${start} to ${stop - 1}; arrow keys move it, Delete removes it`, start);
        page.append(body);
        if (at === 0) page.append(handle(item, "start", left, line, start));
        if (at === parts.length - 1) page.append(handle(item, "stop", left + width, line, stop));
      });
    });
    inner.replaceChildren(page);
    if (focus) inner.querySelector(`[data-key="${focus}"]`)?.focus({ preventScroll: true });
    mark();
  }

  // What is chosen, without drawing anew: a node that is replaced while it gets the focus loses it.
  function mark() {
    for (const node of inner.querySelectorAll(".wb-range")) node.classList.toggle("wb-chosen", Number(node.dataset.item) === chosen);
    buttons.remove.disabled = chosen === null || chosen >= ranges.length;
    buttons.undo.disabled = !past.length;
    buttons.redo.disabled = !future.length;
  }

  function control(node, item, part, label, value) {
    node.tabIndex = 0;
    node.dataset.key = `${item}-${part}`;
    node.setAttribute("role", "slider");
    node.setAttribute("aria-label", label);
    node.setAttribute("aria-valuemin", 0);
    node.setAttribute("aria-valuemax", length());
    node.setAttribute("aria-valuenow", value);
  }

  function handle(item, part, x, line, value) {
    const node = document.createElement("div");
    node.className = `wb-handle wb-${part}`;
    node.style.cssText = `left:${x - 5}px;top:${line * LINE + 4}px;--wb-colour:${COLOURS[item % COLOURS.length]}`;
    node.dataset.item = item;
    node.dataset.part = part;
    control(node, item, part, `${part} of range ${item}`, value);
    return node;
  }

  function drawFindings() {
    const findings = model.get("findings");
    list.replaceChildren();
    for (const finding of findings) {
      const node = make("li", `wb-finding wb-${finding.severity}`, list, finding.message);
      node.title = finding.code;
    }
    if (!findings.length) make("li", "wb-finding wb-good", list, "nothing found");
    draw();
  }

  // The token under a point of the strip, or the nearest one.
  function tokenAt(event) {
    const box = inner.getBoundingClientRect();
    const line = Math.min(Math.max(Math.floor((event.clientY - box.top - 6) / LINE), 0), layout.lines - 1);
    const x = event.clientX - box.left;
    let low = layout.firsts[line], high = (line + 1 < layout.lines ? layout.firsts[line + 1] : length()) - 1;
    while (low < high) {
      const middle = (low + high + 1) >> 1;
      if (layout.left[middle] <= x) low = middle;
      else high = middle - 1;
    }
    return [low, x > layout.left[low] + layout.wide[low] / 2];
  }

  const clamp = (value, least, most) => Math.min(Math.max(value, least), most);

  // A range never leaves the prompt and never becomes empty by hand; on another one it may lie, and lint says so.
  function moved([start, stop], part, by) {
    if (part === "start") return [clamp(start + by, 0, stop - 1), stop];
    if (part === "stop") return [start, clamp(stop + by, start + 1, length())];
    const step = clamp(by, -start, length() - stop);
    return [start + step, stop + step];
  }

  function remember() {
    past.push(ranges.map((pair) => [...pair]));
    if (past.length > HISTORY) past.shift();
    future = [];
  }

  function send() {
    if (sending) return;
    sending = true;
    requestAnimationFrame(() => {
      sending = false;
      model.set("embedding_ranges", ranges.map((pair) => [...pair]));
      model.save_changes();
    });
  }

  function change(next, words) {
    ranges = next;
    if (words) said.textContent = words;
    draw();
    send();
  }

  const withRange = (item, pair) => ranges.map((old, at) => (at === item ? pair : old));

  function add() {
    const after = chosen === null ? 0 : ranges[chosen]?.[1] ?? 0;
    const start = clamp(after, 0, length() - 1);
    remember();
    chosen = ranges.length;
    change([...ranges, [start, start + 1]], `range ${chosen} added at ${start}`);
  }

  function remove() {
    if (chosen === null || chosen >= ranges.length) return;
    remember();
    const gone = chosen;
    chosen = null;
    change(ranges.filter((_, at) => at !== gone), `range ${gone} removed`);
  }

  function undo() {
    if (!past.length) return;
    future.push(ranges);
    change(past.pop(), "undone");
  }

  function redo() {
    if (!future.length) return;
    past.push(ranges);
    change(future.pop(), "done again");
  }

  async function copy() {
    const code = `input_embedding_ranges=[${ranges.map(([a, b]) => `[${a}, ${b}]`).join(", ")}]`;
    try {
      await navigator.clipboard.writeText(code);
      said.textContent = `copied: ${code}`;
    } catch {
      said.textContent = code; // no clipboard here: it can be selected
    }
  }

  strip.addEventListener("pointerdown", (event) => {
    const node = event.target.closest("[data-part]");
    if (!node) return;
    chosen = Number(node.dataset.item);
    const [token] = tokenAt(event);
    drag = { item: chosen, part: node.dataset.part, token, before: ranges.map((pair) => [...pair]), moved: false };
    strip.setPointerCapture(event.pointerId);
    event.preventDefault();
    mark();
    inner.querySelector(`[data-key="${chosen}-${drag.part}"]`)?.focus({ preventScroll: true });
  });
  strip.addEventListener("pointermove", (event) => {
    if (!drag) return;
    const [token, right] = tokenAt(event);
    const old = drag.before[drag.item];
    const by = drag.part === "both" ? token - drag.token : (right ? token + 1 : token) - old[drag.part === "start" ? 0 : 1];
    const next = moved(old, drag.part, by);
    if (String(next) === String(ranges[drag.item])) return;
    if (!drag.moved) {
      remember();
      drag.moved = true;
    }
    change(withRange(drag.item, next));
  });
  const drop = () => {
    if (drag?.moved) said.textContent = `range ${drag.item}: [${ranges[drag.item]})`;
    drag = null;
  };
  strip.addEventListener("pointerup", drop);
  strip.addEventListener("pointercancel", drop);

  root.addEventListener("keydown", (event) => {
    const command = event.ctrlKey || event.metaKey;
    const key = event.key.toLowerCase();
    if (command && key === "z" && !event.shiftKey) undo();
    else if (command && (key === "y" || key === "z")) redo();
    else {
      const node = event.target.closest("[data-part]");
      if (!node) return;
      const item = Number(node.dataset.item), part = node.dataset.part;
      const steps = { ArrowLeft: -1, ArrowDown: -1, ArrowRight: 1, ArrowUp: 1, PageDown: -10, PageUp: 10 };
      if (event.key === "Delete" || event.key === "Backspace") {
        chosen = item;
        remove();
      } else if (event.key in steps) {
        const next = moved(ranges[item], part, steps[event.key] * (event.shiftKey ? 10 : 1));
        chosen = item;
        remember();
        change(withRange(item, next), `range ${item}: ${next[0]} to ${next[1]}`);
      } else return;
    }
    event.preventDefault();
    event.stopPropagation();
  });
  root.addEventListener("focusin", (event) => {
    const node = event.target.closest("[data-part]");
    if (node && chosen !== Number(node.dataset.item)) {
      chosen = Number(node.dataset.item);
      mark();
    }
  });
  let scrolling = false;
  strip.addEventListener("scroll", () => {
    if (scrolling) return;
    scrolling = true;
    requestAnimationFrame(() => {
      scrolling = false;
      draw();
    });
  }, { passive: true });

  const fromPython = () => {
    const given = model.get("embedding_ranges");
    if (drag || sending || String(given) === String(ranges)) return;
    ranges = given.map((pair) => [...pair]);
    draw();
  };
  const again = () => {
    measure();
    draw();
  };
  model.on("change:embedding_ranges", fromPython);
  model.on("change:tokens", again);
  model.on("change:findings", drawFindings);
  const size = new ResizeObserver(again);
  size.observe(strip);
  again();
  drawFindings();
  return () => {
    size.disconnect();
    model.off("change:embedding_ranges", fromPython);
    model.off("change:tokens", again);
    model.off("change:findings", drawFindings);
  };
}

export default { render };
