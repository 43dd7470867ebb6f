// The model as a column of blocks, last layer on top, splice at the bottom. One tap is chosen; arrow keys go from tap to tap.

function render({ model, el }) {
  const root = piece("div", "wb-taps", el);
  root.setAttribute("role", "radiogroup");
  root.setAttribute("aria-label", "taps of the model; arrow keys choose one");
  let rows = []; // of taps, from the top

  function choose(tap, focus) {
    model.set("tap", tap);
    model.save_changes();
    mark();
    if (focus) root.querySelector(`[data-tap="${tap}"]`)?.focus();
  }

  function button(tap, text, title, className) {
    const node = piece("button", `wb-tap ${className}`, root, text);
    node.dataset.tap = tap;
    node.title = title;
    node.setAttribute("role", "radio");
    node.addEventListener("click", () => choose(tap, false));
    node.addEventListener("keydown", (event) => {
      if (!(event.key in MOVES)) return;
      const [up, right] = MOVES[event.key];
      const row = rows.findIndex((taps) => taps.includes(tap)), column = rows[row].indexOf(tap);
      const next = rows[Math.min(Math.max(row - up, 0), rows.length - 1)];
      const from = up && rows[row].length === 1 ? next.length - 1 : column; // from norm or embed to the stream of the layer beside it
      choose(next[Math.min(Math.max(from + right, 0), next.length - 1)], true);
      event.preventDefault();
      event.stopPropagation();
    });
  }

  function build() {
    const ends = model.get("ends"), layers = model.get("layers");
    root.replaceChildren();
    rows = [];
    if (ends.includes("norm")) {
      button("norm", "norm → head", "after the final norm", "wb-whole");
      rows.push(["norm"]);
    }
    for (const layer of [...layers].reverse()) {
      piece("span", "wb-tap-layer", root, String(layer.number));
      const places = { attention: 2, mlp: 3 };
      for (const tap of layer.taps) {
        const part = tap.split(".")[2];
        button(tap, part ?? "→", `${tap}${part === "attention" ? `: ${layer.about}` : part ? "" : ": the residual stream after the layer"}`, "");
        root.lastChild.style.gridColumn = places[part] ?? 4;
        root.lastChild.setAttribute("aria-label", tap);
      }
      rows.push(layer.taps);
    }
    if (ends.includes("embed")) {
      button("embed", "embed", "token embeddings, with the rows spliced in", "wb-whole");
      rows.push(["embed"]);
    }
    const spans = piece("div", "wb-tap-spans", root);
    model.get("spans").forEach((name, item) => {
      const entry = piece("span", "wb-item-name", spans, `↑ ${name}`);
      entry.style.setProperty("--wb-colour", SPAN_COLOURS[item % SPAN_COLOURS.length]);
    });
    mark();
  }

  function mark() {
    const chosen = model.get("tap"), all = [...root.querySelectorAll(".wb-tap")];
    for (const node of all) {
      const checked = node.dataset.tap === chosen;
      node.setAttribute("aria-checked", String(checked));
      node.tabIndex = checked ? 0 : -1;
      // Scroll inside the column only: the page stays where the reader is.
      if (checked && (node.offsetTop < root.scrollTop || node.offsetTop + node.offsetHeight > root.scrollTop + root.clientHeight))
        root.scrollTop = node.offsetTop - root.clientHeight / 2;
    }
    if (all.length && !all.some((node) => node.tabIndex === 0)) all[0].tabIndex = 0;
  }

  const end = listen(model, [
    [["layers", "ends", "spans"], onceAFrame(build)],
    [["tap"], onceAFrame(mark)],
  ]);
  build();
  return end;
}

export default { render };
