// A text as a file of the visitor's own; it is made here, so nothing is written on the server.
window.studioSave = (name, text) => {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text || ""], { type: "text/yaml" }));
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
};
// The form tells by two buttons that it has changed: a listener for each of its fields would be compared with each part
// of the page whenever anything is drawn. Nobody asks for a form that is out of sight, and it is looked at seldom then:
// what changed there is told later. The page of a run stays open for hours beside its training.
(() => {
  const apart = "#train-text, #train-own, [type=file]";
  const often = 100;
  const seldom = 1000;
  const hardly = 10000;
  let before = null;
  let changed = 0;
  let address = null;
  let run = null;
  let next = 0;
  window.studioFormChanged = () => {
    changed = Date.now();
  };
  // Looks for changes, and says in how many milliseconds to look again.
  const look = () => {
    if (address !== window.location.search) {
      address = window.location.search;
      run = new URLSearchParams(address).get("run");
    }
    // With a run in the address the form is about to give way to it, until the address changes.
    if (document.hidden || run) return hardly;
    const form = document.getElementById("train-form");
    if (!form || !form.getClientRects().length) return seldom;
    const fields = [...form.querySelectorAll("input, textarea")].filter((field) => !field.closest(apart));
    const now = JSON.stringify(fields.map((field) => (/checkbox|radio/.test(field.type) ? field.checked : field.value)));
    if (before !== null && now !== before) window.studioFormChanged();
    before = now;
    if (!changed || Date.now() - changed < 80) return often;
    changed = 0;
    ["train-changed", "train-priced"].forEach((id) => document.getElementById(id)?.click());
    return often;
  };
  const watch = () => {
    clearTimeout(next);
    next = setTimeout(watch, look());
  };
  document.addEventListener("visibilitychange", watch);
  ["studio-address", "popstate"].forEach((name) => window.addEventListener(name, watch));
  watch();
})();
