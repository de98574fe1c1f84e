// The queue by drag and drop: dropped on a waiting run's upper half, the dragged one goes before it, else behind it.
// The buttons beside each run do the same for the keyboard and for fingers.
window.studioDragRuns = (element, move) => {
  let dragged = null;
  const clear = () => element.querySelectorAll(".above, .below").forEach((item) => item.classList.remove("above", "below"));
  const over = (event) => (dragged ? event.target.closest("[data-place]") : null);
  const upper = (event, item) => event.clientY < item.getBoundingClientRect().top + item.offsetHeight / 2;
  element.addEventListener("dragstart", (event) => {
    const item = event.target.closest("[data-place]");
    if (!item) return;
    dragged = item.dataset.place;
    event.dataTransfer.effectAllowed = "move";
    event.dataTransfer.setData("text/plain", dragged);
  });
  element.addEventListener("dragover", (event) => {
    const item = over(event);
    if (!item) return;
    event.preventDefault();
    clear();
    item.classList.add(upper(event, item) ? "above" : "below");
  });
  element.addEventListener("drop", (event) => {
    const item = over(event);
    if (!item) return;
    event.preventDefault();
    const next = item.nextElementSibling;
    const to = upper(event, item) ? item.dataset.place : next ? next.dataset.place : "last";
    if (item.dataset.place !== dragged && to !== dragged) move(dragged, to);
  });
  element.addEventListener("dragend", () => {
    dragged = null;
    clear();
  });
};

// The queue and the list are drawn anew while runs go on; who stands on a button in them by the keyboard stays there.
(() => {
  const lists = "#runs-queue, #runs-table";
  const names = ["run", "sort", "tag", "open", "cancel", "pick"];
  let held = null;
  const key = (target) => {
    if (target.dataset.to) return [`[data-queued="${target.dataset.queued}"][data-to="${target.dataset.to}"]`, `[data-place="${target.dataset.queued}"] button:not([disabled]):not(.link)`];
    const name = names.find((one) => target.dataset[one]);
    return name ? [`[data-${name}="${CSS.escape(target.dataset[name])}"]`] : null;
  };
  document.addEventListener("focusin", (event) => {
    const list = event.target.closest(lists);
    held = list && key(event.target) ? { list: list.id, wanted: key(event.target) } : null;
  });
  document.addEventListener("pointerdown", (event) => {
    if (!event.target.closest(lists)) held = null;
  });
  new MutationObserver(() => {
    if (!held || document.activeElement !== document.body) return;
    const list = document.getElementById(held.list);
    const found = list && held.wanted.map((one) => list.querySelector(one)).find((one) => one && !one.disabled);
    if (found) found.focus({ preventScroll: true });
  }).observe(document, { childList: true, subtree: true });
})();
