// Whatever receives the focus inside the view keeps its keys: ipywidgets' own controls, such as menus, leave them to Jupyter.

function render({ el }) {
  el.style.display = "none";
  let root = null, frame = 0;
  const keep = (event) => keepKeys(event.target);
  const attach = () => {
    root = el.closest(".workbench-view");
    if (root) root.addEventListener("focusin", keep);
    else if (frame++ < 600) requestAnimationFrame(attach); // a view is rendered before it is put into the page
  };
  attach();
  return () => root?.removeEventListener("focusin", keep);
}

export default { render };
