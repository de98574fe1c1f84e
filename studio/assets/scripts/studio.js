// Hover text on charts, by one listener for the whole page: charts are redrawn while a run goes on, and then say what
// stands under the pointer now (`studioHover`).
(() => {
  let pointed = null;
  window.studioHover = () => {
    const plot = pointed?.plot;
    if (!plot?.isConnected || !plot.dataset.hover) return;
    const box = plot.getBoundingClientRect();
    const at = ((pointed.x - box.left) / box.width) * 100;
    const hover = JSON.parse(plot.dataset.hover);
    const tip = plot.querySelector(".tip");
    tip.replaceChildren();
    let head = null;
    for (const curve of hover.curves) {
      const near = curve.points.reduce((a, b) => (Math.abs(b[0] - at) < Math.abs(a[0] - at) ? b : a));
      if (head === null) {
        head = document.createElement("strong");
        head.textContent = `${hover.x} ${near[2]}`;
        tip.append(head);
      }
      const row = document.createElement("div");
      row.textContent = `${curve.label}: ${near[3]}` + (near[2] !== Number(head.textContent.split(" ").pop()) ? ` (${hover.x} ${near[2]})` : "");
      tip.append(row);
    }
    tip.hidden = false;
    tip.style.left = at > 60 ? "auto" : `${at + 2}%`;
    tip.style.right = at > 60 ? `${102 - at}%` : "auto";
  };
  document.addEventListener("pointermove", (event) => {
    const plot = event.target.closest ? event.target.closest(".plot") : null;
    document.querySelectorAll(".plot .tip:not([hidden])").forEach((tip) => {
      if (tip.parentElement !== plot) tip.hidden = true;
    });
    pointed = plot ? { plot, x: event.clientX } : null;
    window.studioHover();
  });
})();

// What is shown stays in the address, so that a reload or a link comes back to it.
window.studioAddress = (name, value) => {
  const address = new URL(window.location.href);
  if (value) address.searchParams.set(name, value);
  else address.searchParams.delete(name);
  window.history.replaceState(window.history.state, "", address);
  window.dispatchEvent(new CustomEvent("studio-address"));
  if (name === "tab") window.dispatchEvent(new CustomEvent("studio-tab", { detail: value }));
};

// A file over the limit is named here, before a byte of it is sent; the server refuses it all the same.
const studioLimit = 100 * 2 ** 20;
const studioRefuse = (event, files) => {
  const box = document.getElementById(event.target.closest("#guide-file") ? "guide-limit" : "data-limit");
  if (!box) return;
  box.hidden = true;
  const large = [...(files || [])].find((file) => file.size > studioLimit);
  if (!large) return;
  event.preventDefault();
  event.stopImmediatePropagation();
  const title = document.createElement("strong");
  title.className = "notice-title";
  const sizes = { name: large.name, size: Math.ceil(large.size / 2 ** 20), most: studioLimit / 2 ** 20 };
  title.textContent = studioText("{name} is too large: {size} MB; at most {most} MB can be used.", sizes);
  const hint = document.createElement("p");
  hint.className = "notice-hint";
  hint.textContent = studioText("Split the file, or keep only the columns that hold the text.");
  box.replaceChildren(title, hint);
  box.hidden = false;
};
document.addEventListener("change", (event) => {
  if (!event.target.matches("#data-file input[type=file], #guide-file input[type=file]")) return;
  studioRefuse(event, event.target.files);
  if (event.defaultPrevented) event.target.value = "";
}, true);
document.addEventListener("drop", (event) => {
  if (event.target.closest && event.target.closest("#data-file, #guide-file")) studioRefuse(event, event.dataTransfer.files);
}, true);

// A slider of the mixer that is moved by the keyboard is let go with its key, as with a pointer.
document.addEventListener("keyup", (event) => {
  const keys = ["ArrowLeft", "ArrowRight", "ArrowUp", "ArrowDown", "Home", "End", "PageUp", "PageDown"];
  if (!keys.includes(event.key) || !event.target.matches || !event.target.matches("#adapters-mixer input[type=range], #adapter-rank input[type=range]")) return;
  event.target.dispatchEvent(new PointerEvent("pointerup", { bubbles: true }));
});
