// The queue and the list of runs. What is pressed goes to the server as the button's data; each answer draws the whole
// anew, place by place: a button or a box that stays in its place may be another run's then.
window.studioRuns = (element, trigger, watch) => {
  const buttons = ["run", "sort", "tag", "open", "cancel", "to", "untag"];
  const pressed = (target) => target.closest(buttons.map((name) => `[data-${name}]`).join(", "));
  element.addEventListener("click", (event) => {
    const named = pressed(event.target);
    if (named && !named.disabled) trigger("click", { ...named.dataset });
  });

  // A box stays as it was set until an answer has it so; answers that were on their way know nothing of it.
  const set = new Map();
  element.addEventListener("change", (event) => {
    const box = event.target, pick = box.dataset.pick;
    if (!pick) return;
    trigger("click", { pick, on: box.checked });
    const count = element.querySelectorAll("input[data-pick]:checked").length;
    if (count <= Number(box.closest("table").dataset.most)) set.set(pick, box.checked);
  });
  const settle = (box) => {
    const told = box.hasAttribute("checked"), pick = box.dataset.pick;
    if (set.get(pick) === told) set.delete(pick);
    box.checked = set.has(pick) ? set.get(pick) : told;
  };

  // By the keyboard one stays with the run, not with the place.
  let held = null;
  const same = (a, b) => JSON.stringify(a) === JSON.stringify(b);
  element.addEventListener("focusin", (event) => (held = { ...event.target.dataset }));
  document.addEventListener("focusin", (event) => {
    if (!element.contains(event.target)) held = null;
  });
  document.addEventListener("pointerdown", (event) => {
    if (!element.contains(event.target)) held = null;
  });
  const follow = () => {
    const active = document.activeElement;
    if (!held || (active !== document.body && !element.contains(active)) || same({ ...active.dataset }, held)) return;
    const all = [...element.querySelectorAll("button, input")].filter((one) => !one.disabled);
    const found = all.find((one) => same({ ...one.dataset }, held)) || all.find((one) => held.queued && one.dataset.queued === held.queued);
    if (found) found.focus({ preventScroll: true });
  };
  watch("value", () => {
    element.querySelectorAll("input[data-pick]").forEach(settle);
    follow();
  });

  // Dropped on a waiting run's upper half, the dragged one goes before it, else behind it.
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
    if (item.dataset.place !== dragged && to !== dragged) trigger("click", { queued: dragged, to });
  });
  element.addEventListener("dragend", () => {
    dragged = null;
    clear();
  });
};
