// Shift and Enter in the prompt ask as the view that is open asks.
window.studioAsk = () => {
  const buttons = [...document.querySelectorAll("#compare-generate, #grid-draw, #blind-ask")];
  const visible = (button) => button.checkVisibility?.() ?? button.getClientRects().length > 0;
  buttons.find(visible)?.click();
};

// Whoever comes to this page has its form filled in. What asks before the form stands is held, and pressed again then.
(() => {
  const asks = "#compare-generate, #grid-draw, #blind-ask";
  const longest = 15000;
  let here = true;
  let stands = false;
  let held = null;
  const release = () => {
    const pressed = held;
    held = null;
    stands = true;
    pressed?.removeAttribute("aria-busy");
    if (pressed?.isConnected) pressed.click();
  };
  const hold = (event) => {
    const pressed = !stands && event.target.closest?.(asks);
    if (!pressed) return;
    event.preventDefault();
    event.stopImmediatePropagation();
    held?.removeAttribute("aria-busy");
    held = pressed;
    held.setAttribute("aria-busy", "true");
    setTimeout(() => held === pressed && release(), longest);
  };
  document.addEventListener("click", hold, true);
  window.addEventListener("studio-tab", (event) => {
    here = event.detail === "compare";
    if (!here) stands = false;
  });
  window.studioFormStands = () => here && release();
})();

// Two pictures under one handle: the slider over them takes pointer and arrow keys, the page follows its value.
document.addEventListener("input", (event) => {
  if (!event.target.matches || !event.target.matches(".cmp-wipe input[type=range]")) return;
  event.target.closest(".cmp-wipe").style.setProperty("--at", `${event.target.value}%`);
});
