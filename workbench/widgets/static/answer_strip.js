// The tokens of an answer. Pointing at one shows what each layer would have said there, and which ranges it read; a click pins it.

const SINKS_COLOUR = "#8f8f8a", TEXT_COLOUR = "#4a6fa5";

function render({ model, el }) {
  const root = piece("div", "wb-answer", el);
  const strip = piece("div", "wb-answer-tokens", root);
  strip.setAttribute("role", "toolbar");
  strip.setAttribute("aria-label", "tokens of the answer; Enter pins one");
  const said = piece("div", "wb-read", root);
  said.setAttribute("role", "status");
  const legend = piece("div", "wb-legend", root);
  const scroll = piece("div", "wb-answer-layers", root);
  focusable(scroll, "region", "what each layer would have said");
  let shown = -1, at = 0, buttons = [];
  let chances = new Float32Array(0), likely = new Float32Array(0), reads = new Float32Array(0);

  const colourOf = (group) => (group === 0 ? SINKS_COLOUR : group === model.get("groups").length - 1 ? TEXT_COLOUR : SPAN_COLOURS[(group - 1) % SPAN_COLOURS.length]);

  function pin(index) {
    model.set("pinned", model.get("pinned") === index ? -1 : index);
    model.save_changes();
  }

  function go(index) {
    at = Math.min(Math.max(index, 0), buttons.length - 1);
    buttons.forEach((button, number) => { button.tabIndex = number === at ? 0 : -1; });
    buttons[at].focus();
  }

  function build() {
    const focused = strip.contains(document.activeElement);
    strip.replaceChildren();
    const tokens = model.get("tokens");
    at = Math.min(at, Math.max(tokens.length - 1, 0));
    buttons = tokens.map((token, index) => {
      const node = piece("button", "wb-button wb-answer-token", strip, shownToken(token));
      node.tabIndex = index === at ? 0 : -1;
      node.title = `token ${index} of the answer: ${JSON.stringify(token)}`;
      node.addEventListener("click", () => pin(index));
      node.addEventListener("pointerenter", () => show(index));
      node.addEventListener("focus", () => { at = index; show(index); });
      node.addEventListener("keydown", (event) => {
        const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
        if (!step) return;
        go(index + step);
        event.preventDefault();
        event.stopPropagation();
      });
      return node;
    });
    strip.onpointerleave = () => show(-1);
    strip.onfocusout = (event) => { if (!strip.contains(event.relatedTarget)) show(-1); };
    chances = floats(model.get("chances"));
    likely = floats(model.get("said"));
    reads = floats(model.get("reads"));
    legend.replaceChildren();
    if (reads.length) {
      piece("span", "wb-label", legend, "attention to");
      model.get("groups").forEach((name, group) => {
        const entry = piece("span", "wb-label", legend), key = piece("span", "wb-swatch", entry);
        key.style.background = colourOf(group);
        piece("span", "", entry, name);
      });
    }
    mark();
    if (focused && buttons.length) buttons[at].focus();
  }

  function mark() {
    const pinned = model.get("pinned");
    buttons.forEach((button, index) => button.setAttribute("aria-pressed", String(index === pinned)));
    show(shown);
  }

  // Show one token: that under the pointer or with the focus, else the pinned one, else the first.
  function show(index) {
    shown = index < model.get("tokens").length ? index : -1;
    const tokens = model.get("tokens"), taps = model.get("taps"), words = model.get("words"), right = model.get("right");
    scroll.hidden = legend.hidden = !tokens.length;
    if (!tokens.length) {
      said.textContent = model.get("message");
      return;
    }
    const pinned = model.get("pinned"), token = shown >= 0 ? shown : pinned >= 0 ? pinned : 0;
    const count = tokens.length, groups = model.get("groups").length;
    const last = (taps.length - 1) * count + token;
    said.textContent = `${quoted(tokens[token])} was said with ${percent(likely[last])}${token === pinned ? ", pinned" : ""}`;
    const table = document.createElement("table"), head = table.createTHead().insertRow(), body = table.createTBody();
    table.className = "wb-lens";
    for (const name of ["layer", "would say", "", `${quoted(tokens[token])}`, ...(reads.length ? ["reads"] : [])]) {
      const cell = piece("th", "", head, name);
      cell.scope = "col";
    }
    for (let row = taps.length - 1; row >= 0; row--) {
      const line = body.insertRow(), cell = row * count + token;
      piece("th", "", line, taps[row]).scope = "row";
      const word = piece("td", right && right.byteLength > cell && right.getUint8(cell) ? "wb-lens-said" : "", line, quoted(words[row][token]));
      word.style.backgroundColor = `color-mix(in srgb, #2b8cbe ${Math.round(chances[cell] * 45)}%, transparent)`;
      piece("td", "wb-number", line, percent(chances[cell]));
      piece("td", "wb-number", line, percent(likely[cell]));
      if (!reads.length) continue;
      const layer = row - 1, bar = piece("td", "wb-bars", line);
      if (layer < 0 || layer * count * groups >= reads.length) continue;
      const shares = [...reads.subarray((layer * count + token) * groups, (layer * count + token + 1) * groups)];
      bar.title = shares.map((share, group) => `${model.get("groups")[group]} ${percent(share)}`).join(", ");
      bar.setAttribute("aria-label", bar.title);
      shares.forEach((share, group) => {
        const part = piece("span", "wb-share", bar);
        part.style.cssText = `width:${share * 100}%;background:${colourOf(group)}`;
      });
    }
    scroll.replaceChildren(table);
  }

  const end = listen(model, [
    [["tokens", "taps", "words", "chances", "said", "groups", "reads", "message"], onceAFrame(build)],
    [["pinned"], onceAFrame(mark)],
  ]);
  build();
  return end;
}

const percent = (share) => (Number.isNaN(share) ? "none" : `${(share * 100).toFixed(share > 0 && share < 0.0995 ? 1 : 0)}%`);

export default { render };
