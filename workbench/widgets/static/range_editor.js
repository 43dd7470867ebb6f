// Ranges as coloured bars over a prompt's tokens, which can be dragged, resized, added and removed by mouse, touch and keyboard.

const HISTORY = 200;
const MOST_CONTROLS = 400; // with more ranges than this, only those in view can be reached by Tab; "Go to" reaches all

function render({ model, el }) {
  const root = piece("div", "wb-editor", el);
  const bar = piece("div", "wb-bar", root);
  const strip = piece("div", "wb-strip", root);
  const tokens = tokenLines(model, strip);
  const bars = piece("div", "wb-bars", tokens.inner); // ranges are drawn over their tokens
  const list = piece("ul", "wb-findings", root);
  list.tabIndex = 0; // it scrolls
  keepKeys(list);
  list.setAttribute("aria-label", "findings about the prompt");
  const said = piece("div", "wb-said", root);
  said.setAttribute("aria-live", "polite");
  focusable(strip, "group", "prompt tokens with embedding ranges");
  strip.style.maxHeight = `${model.get("height")}px`;

  let gone = false; // whether the kernel has ended
  let fromKernel = null; // ranges that Python set while the mouse held one
  let opened = false; // whether the first range has been scrolled into view
  let drag = null, chosen = null, past = [], future = [], sending = false, unsent = false, sentAt = 0;
  let ranges = model.get("embedding_ranges").map((pair) => [...pair]);
  const length = () => model.get("tokens").length;

  const buttons = {};
  const button = (name, label, title, action) => {
    const node = piece("button", "wb-button", bar, label);
    node.title = title;
    node.addEventListener("click", action);
    buttons[name] = node;
  };
  button("add", "Add range", "add a range after the selected one", add);
  button("remove", "Remove", "remove the selected range (Delete)", remove);
  button("undo", "Undo", "Ctrl+Z", undo);
  button("redo", "Redo", "Ctrl+Y", redo);
  button("copy", "Copy for LMDeploy", "input_embedding_ranges=[...]", copy);
  const goLabel = piece("label", "wb-label", bar, "Go to "), go = piece("select", "wb-select", goLabel);
  go.addEventListener("change", () => {
    if (go.value !== "") goTo(Number(go.value));
    go.value = "";
  });

  const worst = (item) => {
    const about = model.get("findings").filter((finding) => finding.item === item && finding.severity !== "info");
    return [about.some((f) => f.severity === "error") ? "error" : about.length ? "warning" : "", about.map((f) => f.message).join("\n")];
  };

  function draw() {
    if (!length()) return;
    const [from, to] = tokens.draw();
    const focus = root.contains(document.activeElement) ? document.activeElement.dataset.key : undefined;
    const page = document.createDocumentFragment();
    ranges.forEach(([start, stop], item) => {
      const a = Math.max(start, 0), b = Math.min(stop, length());
      if (b <= a) return;
      const [severity, reason] = worst(item);
      const parts = tokens.pieces(a, b);
      parts.forEach(([line, left, width], at) => {
        // The controls of a range are drawn wherever it is, so that Tab reaches it; the browser scrolls to what receives the focus.
        const ends = (at === 0 || at === parts.length - 1) && ranges.length <= MOST_CONTROLS;
        if (!ends && (line < from || line >= to)) return;
        const body = document.createElement("div");
        body.className = `wb-range ${severity && "wb-" + severity}`;
        body.style.cssText = `left:${left}px;top:${line * LINE + 6}px;width:${width}px;--wb-colour:${SPAN_COLOURS[item % SPAN_COLOURS.length]}`;
        body.title = `${model.get("labels")[item] ?? "item " + item}: [${start}, ${stop}), ${stop - start} tokens${reason ? "\n" + reason : ""}`;
        body.dataset.item = item;
        body.dataset.part = "both";
        if (at === 0) control(body, item, "both", `range ${item}, tokens ${start} to ${stop - 1}; arrow keys move it, Delete removes it`, start);
        page.append(body);
        if (at === 0) page.append(handle(item, "start", left, line, start));
        if (at === parts.length - 1) page.append(handle(item, "stop", left + width, line, stop));
      });
    });
    bars.replaceChildren(page);
    listRanges();
    if (focus) bars.querySelector(`[data-key="${focus}"]`)?.focus({ preventScroll: true });
    mark();
  }

  let listed = "";
  function listRanges() {
    const names = ranges.map(([start, stop], item) => `${model.get("labels")[item] ?? "item " + item}: [${start}, ${stop})`);
    if (names.join("\n") === listed) return;
    listed = names.join("\n");
    go.replaceChildren(new Option("range …", ""), ...names.map((name, item) => new Option(name, item)));
    goLabel.hidden = !ranges.length;
  }

  // Scroll to a range and give it the focus.
  function goTo(item) {
    showRange(item);
    bars.querySelector(`[data-key="${item}-both"]`)?.focus({ preventScroll: true });
  }

  function showRange(item) {
    const start = ranges[item]?.[0];
    if (start === undefined || start < 0 || start >= length()) return;
    strip.scrollTop = Math.max(tokens.lineOf(start) * LINE - LINE, 0);
    draw();
  }

  // Mark the chosen range without redrawing: a node that is replaced while it receives the focus loses it.
  function mark() {
    for (const node of bars.querySelectorAll(".wb-range")) node.classList.toggle("wb-chosen", Number(node.dataset.item) === chosen);
    buttons.add.disabled = gone;
    buttons.remove.disabled = gone || chosen === null || chosen >= ranges.length;
    buttons.undo.disabled = gone || !past.length;
    buttons.redo.disabled = gone || !future.length;
  }

  function control(node, item, part, label, value) {
    focusable(node, "slider", label);
    node.dataset.key = `${item}-${part}`;
    node.setAttribute("aria-valuemin", 0);
    node.setAttribute("aria-valuemax", length());
    node.setAttribute("aria-valuenow", value);
  }

  function handle(item, part, x, line, value) {
    const node = document.createElement("div");
    node.className = `wb-handle wb-${part}`;
    node.style.cssText = `left:${x - 5}px;top:${line * LINE + 4}px;--wb-colour:${SPAN_COLOURS[item % SPAN_COLOURS.length]}`;
    node.dataset.item = item;
    node.dataset.part = part;
    control(node, item, part, `${part} of range ${item}`, value);
    return node;
  }

  function drawFindings() {
    const findings = model.get("findings");
    list.replaceChildren();
    for (const finding of findings) {
      const node = piece("li", `wb-finding wb-${finding.severity}`, list, finding.message);
      node.title = finding.code;
    }
    if (!findings.length) piece("li", "wb-finding wb-good", list, "no problems found");
    draw();
    // For tests: the time from a change to its lint findings.
    if (sentAt) root.dataset.feedbackMilliseconds = (performance.now() - sentAt).toFixed(1);
    sentAt = 0;
  }

  const clamp = (value, low, high) => Math.min(Math.max(value, low), high);

  // Edits never move a range out of the prompt or make it empty; it may overlap another one, which lint reports.
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

  // Send at once, then at most once per frame: a key press does not wait for the next frame.
  function send() {
    if (sending) {
      unsent = true;
      return;
    }
    sending = true;
    unsent = false;
    sentAt = performance.now();
    sent = String(ranges);
    model.set("embedding_ranges", ranges.map((pair) => [...pair]));
    model.save_changes();
    requestAnimationFrame(() => {
      sending = false;
      if (unsent) send();
    });
  }

  let sent = String(ranges); // what Python was sent last, to tell its echo from ranges that Python set
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
    change(future.pop(), "redone");
  }

  async function copy() {
    const code = `input_embedding_ranges=[${ranges.map(([a, b]) => `[${a}, ${b}]`).join(", ")}]`;
    try {
      await navigator.clipboard.writeText(code);
      said.textContent = `copied: ${code}`;
    } catch {
      said.textContent = code; // without clipboard access, show the code to select it
    }
  }

  strip.addEventListener("pointerdown", (event) => {
    const node = event.target.closest("[data-part]");
    if (!node || gone) return;
    chosen = Number(node.dataset.item);
    const [token] = tokens.tokenAt(event);
    drag = { item: chosen, part: node.dataset.part, token, before: ranges.map((pair) => [...pair]), moved: false };
    strip.setPointerCapture(event.pointerId);
    event.preventDefault();
    mark();
    bars.querySelector(`[data-key="${chosen}-${drag.part}"]`)?.focus({ preventScroll: true });
  });
  let pointed = -1;
  const point = (token) => {
    if (token === pointed) return;
    pointed = token;
    // Sent with the next frame, as the other views do, so that the -1 from the view that the pointer left comes first.
    requestAnimationFrame(() => {
      if (pointed !== token) return;
      model.set("hovered", token);
      model.save_changes();
    });
  };
  strip.addEventListener("pointerleave", () => point(-1));
  strip.addEventListener("pointermove", (event) => {
    if (!drag) {
      point(tokens.tokenAt(event)[0]);
      return;
    }
    const [token, right] = tokens.tokenAt(event);
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
    if (fromKernel) {
      take(fromKernel);
      send(); // moves after Python's change had replaced it there
    }
  };
  strip.addEventListener("pointerup", drop);
  strip.addEventListener("pointercancel", drop);

  root.addEventListener("keydown", (event) => {
    if (gone) return;
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

  function take(given) {
    ranges = given.map((pair) => [...pair]);
    fromKernel = null;
    sent = String(ranges);
    if (chosen !== null && chosen >= ranges.length) chosen = null;
    draw();
  }
  const fromPython = () => {
    const given = model.get("embedding_ranges");
    if (String(given) === sent || String(given) === String(ranges)) return;
    if (drag) fromKernel = given;
    else take(given);
  };
  const again = () => {
    tokens.measure();
    bars.replaceChildren();
    draw();
    if (!opened && strip.clientHeight && length()) {
      opened = true;
      showRange(0);
    }
  };
  // Another prompt: its first range is shown, and ranges of the one before cannot come back.
  const otherTokens = () => {
    past = [];
    future = [];
    opened = false;
    again();
  };
  const endWatch = watchKernel(model, el, (now) => {
    gone = now;
    if (gone) drag = fromKernel = null;
    root.classList.toggle("wb-gone", gone);
    if (gone) said.textContent = "No kernel is connected to this view, so ranges cannot be moved: run the cell again.";
    else if (said.textContent.startsWith("No kernel")) said.textContent = "";
    mark();
  });
  model.on("change:embedding_ranges", fromPython);
  model.on("change:tokens", otherTokens);
  model.on("change:labels", draw);
  model.on("change:findings", drawFindings);
  model.on("change:hovered", tokens.hover);
  model.on("change:shades", tokens.reshade);
  const size = new ResizeObserver(again);
  size.observe(strip);
  again();
  drawFindings();
  return () => {
    endWatch();
    size.disconnect();
    model.off("change:embedding_ranges", fromPython);
    model.off("change:tokens", otherTokens);
    model.off("change:labels", draw);
    model.off("change:findings", drawFindings);
    model.off("change:hovered", tokens.hover);
    model.off("change:shades", tokens.reshade);
  };
}

export default { render };
