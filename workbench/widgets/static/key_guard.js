// Whatever receives the focus inside the view keeps its keys, and every control has a name: ipywidgets' own controls, such as menus, leave
// their keys to Jupyter, and its sliders and number boxes have no names for screen readers.

function render({ el }) {
  el.style.display = "none";
  let root = null, frame = 0;
  const keep = (event) => keepKeys(event.target);
  const name = () => {
    for (const node of root.querySelectorAll(".noUi-handle:not([aria-label]), input:not([type=checkbox]):not([aria-label])")) {
      const widget = node.closest(".jupyter-widgets");
      // A number box has the name of the slider beside it.
      const text = [widget, widget?.parentElement].map((near) => near?.querySelector(".widget-label")?.textContent.trim()).find(Boolean);
      if (text) node.setAttribute("aria-label", text);
    }
  };
  const watcher = new MutationObserver(onceAFrame(name));
  const attach = () => {
    root = el.closest(".workbench-view");
    if (root) {
      root.addEventListener("focusin", keep);
      watcher.observe(root, { childList: true, subtree: true });
      name();
    } else if (frame++ < 600) requestAnimationFrame(attach); // a view is rendered before it is put into the page
  };
  attach();
  return () => {
    watcher.disconnect();
    root?.removeEventListener("focusin", keep);
  };
}

export default { render };
