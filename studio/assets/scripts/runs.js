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
  let dragged = null, finger = null;
  const marks = ["above", "below", "moving"];
  const clear = () => element.querySelectorAll(".rq-item").forEach((item) => item.classList.remove(...marks));
  const over = (event) => (dragged ? event.target.closest("[data-place]") : null);
  const upper = (event, item) => event.clientY < item.getBoundingClientRect().top + item.offsetHeight / 2;
  const mark = (event, item) => {
    clear();
    item.classList.add(upper(event, item) ? "above" : "below");
  };
  const drop = (event, item) => {
    const next = item.nextElementSibling;
    const to = upper(event, item) ? item.dataset.place : next ? next.dataset.place : "last";
    if (item.dataset.place !== dragged && to !== dragged) trigger("click", { queued: dragged, to });
  };
  element.addEventListener("dragstart", (event) => {
    const item = event.target.closest("[data-place]");
    if (!item) return;
    // A long press on the grip would have the browser drag too.
    if (finger !== null) return event.preventDefault();
    dragged = item.dataset.place;
    event.dataTransfer.effectAllowed = "move";
    event.dataTransfer.setData("text/plain", dragged);
  });
  element.addEventListener("dragover", (event) => {
    const item = over(event);
    if (!item) return;
    event.preventDefault();
    mark(event, item);
  });
  element.addEventListener("drop", (event) => {
    const item = over(event);
    if (!item) return;
    event.preventDefault();
    drop(event, item);
  });
  const end = () => {
    dragged = null;
    clear();
  };
  element.addEventListener("dragend", end);

  // Browsers drag by the mouse alone. A finger or a pen takes a run by its grip; the whole list holds the pointer, since
  // an answer may draw the grip anew meanwhile.
  const under = (event) => {
    const found = document.elementFromPoint(event.clientX, event.clientY)?.closest("[data-place]");
    return found && element.contains(found) ? found : null;
  };
  element.addEventListener("pointerdown", (event) => {
    const grip = event.target.closest(".rq-grip");
    if (!grip || event.pointerType === "mouse" || finger !== null) return;
    event.preventDefault();
    finger = event.pointerId;
    dragged = grip.closest("[data-place]").dataset.place;
    element.setPointerCapture(finger);
  });
  element.addEventListener("pointermove", (event) => {
    if (event.pointerId !== finger) return;
    const item = under(event);
    clear();
    if (item && item.dataset.place !== dragged) mark(event, item);
    element.querySelector(`[data-place="${CSS.escape(dragged)}"]`)?.classList.add("moving");
  });
  const release = (event) => {
    if (event.pointerId !== finger) return;
    const item = event.type === "pointerup" ? under(event) : null;
    if (item) drop(event, item);
    finger = null;
    end();
  };
  element.addEventListener("pointerup", release);
  element.addEventListener("pointercancel", release);
};
