// Items on one page: fifty images in a column would be longer than any screen.
const PAGE = 12;

// Images with their patch grids (audio as a strip). A patch is one feature row, which is one token, which is one column of the map.

function render({ model, el }) {
  const root = piece("div", "wb-patches", el);
  const pager = piece("div", "wb-bar", root);
  const caption = piece("div", "wb-read", root);
  caption.setAttribute("role", "status");
  root.insertBefore(caption, pager);
  const turn = (name, by) => {
    const node = piece("button", "wb-button", pager, name);
    node.addEventListener("click", () => {
      page += by;
      build();
    });
    return node;
  };
  const earlier = turn("Earlier images", -1), where = piece("span", "wb-label", pager), later = turn("Later images", 1);
  const list = piece("div", "wb-images", root);
  const hover = sender(model, "hovered");
  let page = 0; // of the items, PAGE on each
  let items = [], values = new Float32Array(0);

  const shape = (item) => [item.range, item.image, item.lines, item.columns, item.rows].join();

  const pages = () => Math.max(Math.ceil(model.get("items").length / PAGE), 1);
  const paged = () => model.get("items").slice(page * PAGE, (page + 1) * PAGE);

  // If ranges have only moved, images and focus are kept.
  function move() {
    const given = paged();
    if (given.map(shape).join(";") !== items.map(shape).join(";")) {
      build();
      return;
    }
    given.forEach((item, number) => Object.assign(items[number], item));
    recolour();
  }

  function build() {
    for (const item of items) if (item.url) URL.revokeObjectURL(item.url);
    list.replaceChildren();
    const all = model.get("items").length;
    page = Math.min(Math.max(page, 0), pages() - 1);
    pager.hidden = pages() === 1;
    earlier.disabled = page === 0;
    later.disabled = page === pages() - 1;
    where.textContent = `${page * PAGE + 1} to ${Math.min((page + 1) * PAGE, all)} of ${all}`;
    items = paged().map((item) => {
      const box = piece("figure", "wb-item", list), name = piece("figcaption", "wb-item-name", box, "");
      const stage = piece("div", "wb-stage", box);
      const canvas = piece("canvas", "wb-image", stage), above = piece("canvas", "wb-above", stage);
      focusable(above, "application", `patches of ${item.label}; arrow keys move from patch to patch`);
      const made = { ...item, box, name, canvas, above, loaded: null, url: null };
      if (item.image >= 0) {
        made.url = URL.createObjectURL(new Blob([model.get("images")[item.image]], { type: "image/png" }));
        const image = new Image();
        image.onload = () => {
          made.loaded = image;
          draw(made);
        };
        image.onerror = () => draw(made);
        image.src = made.url;
      }
      above.addEventListener("pointermove", (event) => hover(tokenAt(made, event)));
      above.addEventListener("pointerleave", () => hover(-1));
      above.addEventListener("keydown", (event) => step(made, event));
      return made;
    });
    if (!items.length) piece("div", "wb-empty", list, "this prompt has no images");
    values = floats(model.get("values"));
    items.forEach(draw);
    mark();
  }

  function tokenAt(item, event) {
    const box = item.above.getBoundingClientRect();
    const column = Math.floor(((event.clientX - box.left) / box.width) * item.columns);
    const line = Math.floor(((event.clientY - box.top) / box.height) * item.lines);
    const row = line * item.columns + column;
    return column >= 0 && column < item.columns && line >= 0 && row < item.rows ? item.start + row : -1;
  }

  function step(item, event) {
    if (!(event.key in MOVES)) return;
    const [up, right] = MOVES[event.key], row = model.get("hovered") - item.start;
    const from = row >= 0 && row < item.rows ? row : 0;
    hover(item.start + Math.min(Math.max(from - up * item.columns + right, 0), item.rows - 1));
    event.preventDefault();
    event.stopPropagation();
  }

  function draw(item) {
    const width = model.get("width");
    const aspect = item.loaded ? item.loaded.naturalHeight / item.loaded.naturalWidth : item.lines / item.columns;
    const height = item.loaded ? Math.round(Math.min(width * aspect, 1.6 * width)) : Math.round(Math.min(Math.max(width * aspect, item.lines === 1 ? 44 : 0), 1.6 * width));
    item.size = [width, height];
    const context = sized(item.canvas, width, height), colours = ink(root);
    if (item.loaded) context.drawImage(item.loaded, 0, 0, width, height);
    else {
      context.fillStyle = colours.line;
      context.fillRect(0, 0, width, height);
    }
    const cell = [width / item.columns, height / item.lines], [low, high] = model.get("bounds");
    if (values.length && low < high) {
      const pixel = painter(model.get("scale"), low, high, pixels(model.get("palette")));
      context.globalAlpha = model.get("opacity");
      for (let row = 0; row < item.rows; row++) {
        const token = item.start + row, colour = token >= 0 && token < values.length ? pixel(values[token]) : 0;
        if (!colour) continue;
        context.fillStyle = css(colour);
        context.fillRect((row % item.columns) * cell[0], Math.floor(row / item.columns) * cell[1], cell[0], cell[1]);
      }
      context.globalAlpha = 1;
    }
    context.strokeStyle = "rgba(255, 255, 255, 0.65)";
    context.lineWidth = 1;
    context.beginPath();
    for (let column = 1; column < item.columns; column++) {
      context.moveTo(column * cell[0], 0);
      context.lineTo(column * cell[0], height);
    }
    for (let line = 1; line < item.lines; line++) {
      context.moveTo(0, line * cell[1]);
      context.lineTo(width, line * cell[1]);
    }
    if (item.rows <= 4096) context.stroke();
    item.box.style.setProperty("--wb-colour", SPAN_COLOURS[item.range % SPAN_COLOURS.length]);
    item.name.textContent = `${item.label}: ${item.lines * item.columns === item.rows ? `${item.lines} x ${item.columns} patches` : `${item.rows} rows`}, tokens [${item.start}, ${item.start + item.rows})`;
    marked(item);
  }

  function marked(item) {
    const context = sized(item.above, ...item.size);
    const row = model.get("hovered") - item.start;
    if (row < 0 || row >= item.rows) return;
    const cell = [item.size[0] / item.columns, item.size[1] / item.lines];
    context.strokeStyle = "#2b6cff";
    context.lineWidth = 3;
    context.strokeRect((row % item.columns) * cell[0], Math.floor(row / item.columns) * cell[1], cell[0], cell[1]);
  }

  // Turn to the page of a token that another view points at.
  function turnTo(token) {
    if (items.some(({ start, rows }) => token >= start && token < start + rows)) return;
    const at = model.get("items").findIndex(({ start, rows }) => token >= start && token < start + rows);
    if (at < 0 || Math.floor(at / PAGE) === page) return;
    page = Math.floor(at / PAGE);
    build();
  }

  function mark() {
    const token = model.get("hovered");
    items.forEach((item) => item.size && marked(item));
    const item = items.find(({ start, rows }) => token >= start && token < start + rows);
    if (!item) {
      caption.textContent = model.get("caption") || "point at a patch";
      return;
    }
    const row = token - item.start, value = token < values.length ? `: ${readable(values[token])}` : "";
    caption.textContent = `patch (${Math.floor(row / item.columns)}, ${row % item.columns}) of ${item.label} is token ${token}${value}`;
  }

  const recolour = onceAFrame(() => {
    values = floats(model.get("values"));
    items.forEach(draw);
    mark();
  });
  const end = listen(model, [
    [["items"], onceAFrame(move)],
    [["width", "images"], onceAFrame(build)],
    [["values", "bounds", "palette", "scale", "opacity"], recolour],
    [["hovered"], onceAFrame(() => { turnTo(model.get("hovered")); mark(); })],
    [["caption"], onceAFrame(mark)],
  ]);
  build();
  return () => {
    for (const item of items) if (item.url) URL.revokeObjectURL(item.url);
    end();
  };
}

export default { render };
