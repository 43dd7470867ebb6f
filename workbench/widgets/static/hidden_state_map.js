// A map of hidden states: taps from bottom to top, tokens from left to right. The cells are one small image that is scaled up; the
// cross at the pointer and the marks of row and chosen cell are drawn on a second canvas, so that pointer moves do not redraw the map.

const LINED = 5, FAILED = "#c2185b"; // LINED: least column width at which the ends of ranges are drawn over the cells
const LEFT = 82, TOP = 16, RIGHT = 8, LABELS = 74, WRITTEN = 11; // WRITTEN: least column width for token labels, in CSS pixels

function render({ model, el }) {
  const root = piece("div", "wb-map", el);
  const bar = piece("div", "wb-bar", root);
  const stage = piece("div", "wb-stage", root);
  const below = piece("canvas", "wb-cells", stage);
  const above = piece("canvas", "wb-above", stage);
  const read = piece("div", "wb-read", root);
  const detail = piece("div", "wb-detail", root);
  focusable(above, "application", "hidden state map, layers by tokens; arrow keys move, Enter opens a state");
  read.setAttribute("role", "status");

  const label = piece("label", "wb-label", bar, "Colour by ");
  const metric = piece("select", "wb-select", label);
  const logLabel = piece("label", "wb-label", bar);
  const log = piece("input", "", logLabel);
  log.type = "checkbox";
  logLabel.append(" logarithmic");
  const key = piece("canvas", "wb-key", bar);
  const keyText = piece("span", "wb-keytext", bar);

  let values = new Float32Array(0), cells = null, shape = [0, 0], plot = null, at = null, perColumn = 1;
  const hover = sender(model, "hovered"), choose = sender(model, "chosen"), look = sender(model, "row");

  function take() {
    values = floats(model.get("values"));
    shape = [model.get("taps").length, model.get("tokens").length];
    paint();
  }

  // Draw the cells as an image of one pixel per cell. If there are more tokens than pixels, a pixel stands for several tokens and
  // shows the worst of them, so that no single wrong token is hidden.
  function paint() {
    const started = performance.now();
    const [taps, tokens] = shape;
    if (!taps || !tokens || values.length !== taps * tokens) {
      cells = null;
      draw();
      return;
    }
    const [low, high] = model.get("bounds"), colours = pixels(model.get("palette"));
    const pixel = painter(model.get("scale"), low, high, colours), lowest = model.get("worst") === "lowest";
    const available = Math.max(Math.floor((stage.clientWidth || 700) - LEFT - RIGHT), 50);
    perColumn = Math.ceil(tokens / available);
    const columns = Math.ceil(tokens / perColumn);
    cells = document.createElement("canvas");
    cells.width = columns;
    cells.height = taps;
    const context = cells.getContext("2d");
    const image = context.createImageData(columns, taps), out = new Uint32Array(image.data.buffer);
    for (let tap = 0; tap < taps; tap++) {
      const row = (taps - 1 - tap) * columns, from = tap * tokens;
      for (let column = 0; column < columns; column++) {
        const first = from + column * perColumn, last = Math.min(first + perColumn, from + tokens);
        let worst = values[first];
        for (let at = first + 1; at < last; at++) {
          const value = values[at];
          if (Number.isNaN(worst) || (lowest ? value < worst : value > worst)) worst = value;
        }
        out[row + column] = pixel(worst) || PAPER;
      }
    }
    context.putImageData(image, 0, 0);
    drawKey(colours, low, high);
    draw();
    // For tests: how long painting took, and how often it was done.
    root.dataset.paintMilliseconds = (performance.now() - started).toFixed(1);
    root.dataset.paints = Number(root.dataset.paints || 0) + 1;
  }

  function drawKey(colours, low, high) {
    const context = sized(key, 120, 10);
    for (let i = 0; i < 120; i++) {
      context.fillStyle = css(colours[Math.round((i * 255) / 119)]);
      context.fillRect(i, 0, 1, 10);
    }
    const worst = model.get("worst") === "lowest" ? "lowest" : "largest";
    keyText.textContent = `${readable(low)} to ${readable(high)}${perColumn > 1 ? `; ${perColumn} tokens per column, the ${worst} is shown` : ""}`;
  }

  function draw() {
    const [taps, tokens] = shape, width = stage.clientWidth, height = model.get("height");
    if (width < 60) return;
    const written = tokens > 0 && (width - LEFT - RIGHT) / tokens >= WRITTEN;
    const bottom = written ? LABELS : 22;
    plot = { x: LEFT, y: TOP, width: width - LEFT - RIGHT, height: Math.max(height - TOP - bottom, 40) };
    const context = sized(below, width, height), colours = ink(root);
    context.clearRect(0, 0, width, height);
    context.font = "11px var(--jp-ui-font-family, sans-serif)";
    if (!cells) {
      context.fillStyle = colours.text;
      context.fillText(model.get("message") || "no states yet", plot.x + 10, plot.y + 24);
      mark();
      return;
    }
    context.imageSmoothingEnabled = false;
    context.globalAlpha = old ? 0.35 : 1;
    context.save();
    context.beginPath();
    context.rect(plot.x, plot.y, plot.width, plot.height);
    context.clip(); // the last column may stand for fewer tokens
    context.drawImage(cells, plot.x, plot.y, (plot.width * cells.width * perColumn) / tokens, plot.height);
    context.restore();
    context.globalAlpha = 1;
    if (old) {
      context.fillStyle = colours.text;
      context.font = "13px var(--jp-ui-font-family, sans-serif)";
      context.fillText("computing; these colours are of the ranges before", plot.x + 10, plot.y + 20);
      context.font = "11px var(--jp-ui-font-family, sans-serif)";
    }
    context.strokeStyle = colours.line;
    context.strokeRect(plot.x - 0.5, plot.y - 0.5, plot.width + 1, plot.height + 1);
    context.fillStyle = colours.text;
    context.textAlign = "right";
    context.textBaseline = "middle";
    const names = model.get("taps"), step = Math.max(1, Math.ceil((taps * 13) / plot.height));
    for (let tap = 0; tap < taps; tap += step) context.fillText(names[tap].replace("layers.", ""), plot.x - 6, plot.y + plot.height - ((tap + 0.5) * plot.height) / taps);
    const words = model.get("tokens"), column = plot.width / tokens;
    const inside = model.get("spans").map(([a, b]) => [Math.max(a, 0), Math.min(b, tokens)]);
    if (written) {
      context.font = "10px var(--jp-code-font-family, monospace)";
      for (let token = 0; token < tokens; token++) {
        const span = inside.findIndex(([a, b]) => a <= token && token < b);
        context.save();
        context.translate(plot.x + (token + 0.5) * column, plot.y + plot.height + 6);
        context.rotate(-Math.PI / 2);
        context.fillStyle = span < 0 ? colours.text : SPAN_COLOURS[span % SPAN_COLOURS.length];
        context.fillText(shownToken(words[token]).slice(0, 11), 0, 0);
        context.restore();
      }
    } else {
      context.textAlign = "center";
      context.textBaseline = "top";
      const every = Math.max(1, Math.ceil((60 * tokens) / plot.width / 10) * 10);
      for (let token = 0; token < tokens; token += every) context.fillText(token, plot.x + (token + 0.5) * column, plot.y + plot.height + 5);
    }
    inside.forEach(([a, b], item) => {
      if (b <= a) return;
      context.fillStyle = context.strokeStyle = SPAN_COLOURS[item % SPAN_COLOURS.length];
      context.fillRect(plot.x + a * column, plot.y - 7, (b - a) * column, 5);
      if (column < LINED) return; // a line would hide tokens
      context.globalAlpha = 0.7;
      for (const edge of [a, b]) context.strokeRect(plot.x + edge * column, plot.y, 0, plot.height);
      context.globalAlpha = 1;
    });
    // Triangles above the tokens at which the verdict failed.
    context.fillStyle = FAILED;
    for (const token of model.get("failures")) {
      const x = plot.x + (token + 0.5) * column;
      context.beginPath();
      context.moveTo(x - 4, plot.y - 9);
      context.lineTo(x + 4, plot.y - 9);
      context.lineTo(x, plot.y - 1);
      context.fill();
    }
    mark();
  }

  // Draw the cross at the hovered cell, a frame around the chosen one, and a mark at the row whose numbers colour the patches.
  function mark() {
    const context = sized(above, stage.clientWidth, model.get("height"));
    const [taps, tokens] = shape;
    if (!plot || !cells) return;
    const column = plot.width / tokens, row = plot.height / taps;
    const y = (tap) => plot.y + plot.height - (tap + 1) * row;
    const token = model.get("hovered"), chosen = model.get("chosen"), looked = model.get("row");
    context.strokeStyle = "#2b6cff";
    context.lineWidth = 1.5;
    if (token >= 0 && token < tokens) context.strokeRect(plot.x + token * column, plot.y, Math.max(column, 1), plot.height);
    if (at && token >= 0) context.strokeRect(plot.x, y(at[0]), plot.width, Math.max(row, 1));
    context.fillStyle = "#2b6cff";
    if (looked >= 0 && looked < taps) {
      const middle = y(looked) + row / 2;
      context.beginPath();
      context.moveTo(plot.x - 5, middle - 4);
      context.lineTo(plot.x - 5, middle + 4);
      context.lineTo(plot.x, middle);
      context.fill();
    }
    if (chosen.length === 2) {
      context.strokeStyle = "#ff00c8";
      context.lineWidth = 2;
      context.strokeRect(plot.x + chosen[1] * column - 1, y(chosen[0]) - 1, Math.max(column, 3) + 2, Math.max(row, 3) + 2);
    }
    describe(token);
  }

  function describe(token) {
    const [taps, tokens] = shape;
    if (token < 0 || token >= tokens || !cells) {
      read.textContent = model.get("message") || "point at a cell, or move with the arrow keys; click or Enter opens a state";
      return;
    }
    const tap = at ? at[0] : clampRow(model.get("row"));
    const value = values[tap * tokens + token], words = model.get("words");
    const span = model.get("spans").findIndex(([a, b]) => a <= token && token < b);
    const lens = words.length ? `, reads as ${quoted(words[tap][token])}` : "";
    const failed = model.get("failures").includes(token) ? ", verdict failed" : "";
    const unit = Number.isFinite(value) ? model.get("unit") : "";
    read.textContent = `${model.get("taps")[tap]}, token ${token} ${quoted(model.get("tokens")[token])}${span < 0 ? "" : `, range ${span}`}: ${readable(value)}${unit}${lens}${failed}`;
  }
  const clampRow = (row) => (row >= 0 && row < shape[0] ? row : shape[0] - 1);

  function cellAt(event) {
    if (!plot || !cells) return null;
    const box = above.getBoundingClientRect();
    const token = Math.floor(((event.clientX - box.left - plot.x) / plot.width) * shape[1]);
    const tap = Math.floor(((plot.y + plot.height - (event.clientY - box.top)) / plot.height) * shape[0]);
    return token >= 0 && token < shape[1] && tap >= 0 && tap < shape[0] ? [tap, token] : null;
  }

  function go(cell) {
    at = cell;
    hover(cell ? cell[1] : -1);
    if (cell) look(cell[0]);
    markSoon();
  }
  const markSoon = onceAFrame(mark);

  above.addEventListener("pointermove", (event) => go(cellAt(event)));
  above.addEventListener("pointerleave", () => go(null));
  above.addEventListener("click", (event) => {
    const cell = cellAt(event);
    if (cell) choose(cell);
    above.focus({ preventScroll: true });
  });
  above.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && at) choose(at);
    else if (event.key === "Escape") choose([]);
    else if (event.key in MOVES && cells) {
      const [up, right] = MOVES[event.key], from = at || [clampRow(model.get("row")), Math.max(model.get("hovered"), 0)];
      const step = event.shiftKey ? 10 : 1;
      go([Math.min(Math.max(from[0] + up * step, 0), shape[0] - 1), Math.min(Math.max(from[1] + right * step, 0), shape[1] - 1)]);
    } else return;
    event.preventDefault();
    event.stopPropagation();
  });
  metric.addEventListener("change", () => {
    model.set("metric", metric.value);
    model.save_changes();
  });
  log.addEventListener("change", () => {
    model.set("scale", log.checked ? "log" : "linear");
    model.save_changes();
    paint();
  });

  function controls() {
    metric.replaceChildren();
    for (const [name, title] of Object.entries(model.get("metrics"))) {
      const option = piece("option", "", metric, title);
      option.value = name;
    }
    metric.value = model.get("metric");
    log.checked = model.get("scale") === "log";
    log.disabled = model.get("bounds")[0] <= 0; // zero has no logarithm
  }

  // Show details of the chosen cell's state: a histogram of its numbers, and the tokens with the most similar states.
  function open() {
    detail.replaceChildren();
    const found = model.get("detail");
    if (!found.title) return;
    piece("div", "wb-detail-title", detail, found.title);
    const row = piece("div", "wb-detail-row", detail), chart = piece("canvas", "wb-histogram", row);
    chart.setAttribute("role", "img");
    chart.setAttribute("aria-label", `histogram of the state's ${found.size} numbers, from ${readable(found.low)} to ${readable(found.high)}`);
    const context = sized(chart, 300, 84), most = Math.max(...found.counts, 1), colours = ink(root);
    context.fillStyle = "#00798c";
    found.counts.forEach((count, i) => {
      const size = (66 * Math.log1p(count)) / Math.log1p(most);
      context.fillRect((i * 300) / found.counts.length, 68 - size, 300 / found.counts.length - 1, size);
    });
    context.fillStyle = colours.text;
    context.font = "10px sans-serif";
    context.fillText(readable(found.low), 0, 80);
    context.textAlign = "right";
    context.fillText(readable(found.high), 300, 80);
    const list = piece("table", "wb-neighbours", row);
    for (const line of found.lines) {
      const tr = piece("tr", "", list);
      line.forEach((cell) => piece("td", "", tr, cell));
    }
    const close = piece("button", "wb-button", row, "Close");
    close.addEventListener("click", () => {
      choose([]);
      above.focus({ preventScroll: true });
    });
  }

  // Numbers that are soon replaced do not flicker.
  let old = false, timer = 0;
  const age = () => {
    clearTimeout(timer);
    if (model.get("stale")) timer = setTimeout(() => { old = true; draw(); }, 300);
    else if (old) {
      old = false;
      draw();
    }
  };
  const end = listen(model, [
    [["stale"], age],
    [["values", "taps", "tokens"], onceAFrame(take)],
    [["bounds", "palette", "worst"], onceAFrame(() => { controls(); paint(); })],
    [["scale", "metric", "metrics"], () => { controls(); paint(); }],
    [["spans", "height", "message", "failures"], onceAFrame(draw)],
    [["hovered", "chosen", "row", "words"], () => { if (at && at[1] !== model.get("hovered")) at = null; markSoon(); }],
    [["detail"], open],
  ]);
  const again = onceAFrame(paint), size = new ResizeObserver(again);
  size.observe(stage);
  // Repaint in the colours of another theme, which are applied a little after its name is set.
  const theme = new MutationObserver(() => [0, 400, 1500].forEach((later) => setTimeout(again, later)));
  theme.observe(document.body, { attributes: true, attributeFilter: ["data-jp-theme-name", "data-jp-theme-light"] });
  controls();
  take();
  open();
  return () => {
    size.disconnect();
    theme.disconnect();
    end();
  };
}

export default { render };
