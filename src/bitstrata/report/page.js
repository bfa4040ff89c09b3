"use strict";
(() => {
  const panes = [...document.querySelectorAll(".pane")];
  if (!panes.length) return;
  const run = document.getElementById("pick-run");
  const layer = document.getElementById("pick-layer");
  const precision = document.getElementById("pick-precision");
  const none = document.getElementById("no-pane");
  const show = () => {
    const wanted = [run ? run.value : "0", layer.value, precision.querySelector(":checked").value];
    let found = false;
    for (const pane of panes) {
      const data = pane.dataset;
      const on = [data.run, data.layer, data.precision].every((value, i) => value === wanted[i]);
      pane.classList.toggle("on", on);
      found = found || on;
    }
    none.hidden = found;
  };
  for (const control of [run, layer, precision]) if (control) control.addEventListener("change", show);
  layer.form.addEventListener("submit", (event) => event.preventDefault());
  show();
})();
