// The queue and the list of runs. What is pressed goes to the server as the button's data; each answer draws the whole
// anew, place by place: a button or a box that stays in its place may be another run's then.
window.studioRuns = (element, trigger, watch) => {
  const buttons = ["run", "sort", "tag", "open", "cancel", "to"];
  const pressed = (target) => target.closest(buttons.map((name) => `[data-${name}]`).join(", "));
  element.addEventListener("click", (event) => {
    const named = pressed(event.target);
    if (named && !named.disabled) trigger("click", { ...named.dataset });
  });
  element.addEventListener("change", (event) => {
    const { pick } = event.target.dataset;
    if (pick) trigger("click", { pick, on: event.target.checked });
  });

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
    element.querySelectorAll("input[data-pick]").forEach((box) => (box.checked = box.hasAttribute("checked")));
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
