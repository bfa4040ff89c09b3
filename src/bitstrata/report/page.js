"use strict";
for (const form of document.querySelectorAll(".picker")) {
  const panes = [...document.getElementById(form.dataset.panes).querySelectorAll(".pane")];
  const none = document.getElementById(form.dataset.none);
  const controls = [...form.querySelectorAll("[data-key]")];
  const chosen = (control) => (control.matches("select") ? control : control.querySelector(":checked")).value;
  const show = () => {
    const wanted = controls.map((control) => [control.dataset.key, chosen(control)]);
    let found = false;
    for (const pane of panes) {
      const on = wanted.every(([key, value]) => pane.dataset[key] === value);
      pane.classList.toggle("on", on);
      found = found || on;
    }
    none.hidden = found;
  };
  form.addEventListener("change", show);
  form.addEventListener("submit", (event) => event.preventDefault());
  show();
}
