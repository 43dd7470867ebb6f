// Helpers that all views share: numbers from bytes, colours, page elements. Concatenated before each view's own file.

// Arrow keys as [rows up, columns right].
const MOVES = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [1, 0], ArrowDown: [-1, 0] };

// Elements that take the focus by themselves.
const FOCUSABLE = new Set(["button", "input", "select", "summary"]);

// Create an element with a class and perhaps a text, append it to `parent`, and return it.
function piece(tag, className, parent, text) {
  const node = document.createElement(tag);
  node.className = className;
  if (text !== undefined) node.textContent = text;
  if (FOCUSABLE.has(tag)) keepKeys(node);
  parent.append(node);
  return node;
}

// Jupyter's shortcuts, such as `d d`, which deletes the cell, match the focused node before its ancestors: each node that can have the
// focus must say that its keys are its own.
function keepKeys(node) {
  node.dataset.lmSuppressShortcuts = "true";
}

// Make a node focusable, with keys of its own and a role and name for screen readers.
function focusable(node, role, name) {
  node.tabIndex = 0;
  keepKeys(node);
  node.setAttribute("role", role);
  node.setAttribute("aria-label", name);
}

// Call `changed(gone)` when the kernel behind a view ends or comes back; `gone` is also true for a saved notebook that was opened without
// a kernel. Returns a function that ends it. A front end that does not tell is taken to have a kernel.
function watchKernel(model, el, changed) {
  let gone = null;
  const look = () => {
    const manager = model.widget_manager;
    let now = Boolean(el.closest(".jupyter-widgets-disconnected")); // ipywidgets: the comm is closed
    if (manager && "kernel" in manager) {
      const kernel = manager.kernel;
      const lost = !kernel || kernel.isDisposed || ["dead", "terminating"].includes(kernel.status);
      now ||= lost || (kernel.connectionStatus !== undefined && kernel.connectionStatus !== "connected");
    }
    if (now !== gone) changed((gone = now));
  };
  const timer = setInterval(look, 1000);
  look();
  return () => clearInterval(timer);
}

// Bytes from Python as float32; copied, because their offset may be unaligned.
function floats(view) {
  if (!view || !view.byteLength) return new Float32Array(0);
  return new Float32Array(view.buffer.slice(view.byteOffset, view.byteOffset + view.byteLength));
}

// A function from a number to its 32-bit pixel: 0, that is, none, for NaN and, on a logarithmic scale, for 0; NOT_FINITE for infinity,
// which stands for a state that contains NaN or infinity.
function painter(kind, low, high, colours) {
  const a = Math.log(low), span = Math.log(high) - a || 1;
  const share = kind === "log" ? (value) => (Math.log(value) - a) / span : (value) => (value - low) / (high - low || 1);
  return (value) => {
    if (Number.isNaN(value) || (kind === "log" && value === 0)) return 0;
    if (!Number.isFinite(value)) return NOT_FINITE;
    return colours[paletteIndex(share(value))];
  };
}
const NOT_FINITE = 0xffff00ff; // magenta, as in figures
const paletteIndex = (share) => (share > 0 ? (share >= 1 ? 255 : Math.round(share * 255)) : 0);

// The palette as 32-bit pixels, so that a map is filled with one assignment per cell.
function pixels(palette) {
  const bytes = new Uint8Array(palette.buffer, palette.byteOffset, palette.byteLength);
  const out = new Uint32Array(256);
  for (let i = 0; i < 256; i++) out[i] = 0xff000000 | (bytes[3 * i + 2] << 16) | (bytes[3 * i + 1] << 8) | bytes[3 * i];
  return out;
}
const css = (pixel) => `rgb(${pixel & 255} ${(pixel >> 8) & 255} ${(pixel >> 16) & 255})`;
const PAPER = 0xffffffff;

// A number as a short text; "none" for NaN, "not finite" for infinity.
function readable(value) {
  if (Number.isNaN(value)) return "none";
  if (!Number.isFinite(value)) return "not finite";
  if (value === 0) return "0";
  const size = Math.abs(value);
  return size >= 1e5 || size < 1e-3 ? value.toExponential(2) : String(Number(value.toPrecision(4)));
}

// A token with its line breaks, tabs and leading space made visible, and "∅" for an empty one.
function shownToken(token) {
  const text = token.replace(/\n/g, "↵").replace(/\t/g, "⇥").replace(/^ /, "·");
  return text === "" ? "∅" : text;
}

// A token in quotes for a line of text; a long one is cut, so that what follows it stays visible.
function quoted(token) {
  const letters = [...token];
  return JSON.stringify(letters.length > 32 ? letters.slice(0, 31).join("") + "…" : token);
}

// Colours of the page's theme, for canvases.
function ink(node) {
  const style = getComputedStyle(node);
  return { text: style.color, quiet: style.getPropertyValue("--jp-ui-font-color2").trim() || "#777", line: style.getPropertyValue("--jp-border-color2").trim() || "#bbb" };
}

const SPAN_COLOURS = ["#d1495b", "#00798c", "#8a5a9e", "#b06f00", "#3a7d44", "#5b6bbf"];

// Size a canvas to `width` x `height` CSS pixels at the screen's resolution; returns its 2D context.
function sized(canvas, width, height) {
  const ratio = window.devicePixelRatio || 1;
  canvas.width = Math.max(1, Math.round(width * ratio));
  canvas.height = Math.max(1, Math.round(height * ratio));
  canvas.style.width = `${width}px`;
  canvas.style.height = `${height}px`;
  const context = canvas.getContext("2d");
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  return context;
}

// Wrap an action so that it runs at most once per frame, however often it is called.
function onceAFrame(action) {
  let waiting = false;
  return () => {
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => {
      waiting = false;
      action();
    });
  };
}

// Listen to several traitlets; returns a function that stops listening.
function listen(model, table) {
  for (const [names, action] of table) for (const name of names) model.on(`change:${name}`, action);
  return () => {
    for (const [names, action] of table) for (const name of names) model.off(`change:${name}`, action);
  };
}

// A function that sends a trait's value to Python and linked views, at most once per frame.
function sender(model, name) {
  let next;
  const send = onceAFrame(() => {
    if (String(model.get(name)) === String(next)) return;
    model.set(name, next);
    model.save_changes();
  });
  return (value) => {
    next = value;
    send();
  };
}
