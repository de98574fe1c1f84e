// Shift and Enter in the prompt ask as the view that is open asks.
window.studioAsk = () => {
  const buttons = [...document.querySelectorAll("#compare-generate, #grid-draw, #blind-ask")];
  const visible = (button) => button.checkVisibility?.() ?? button.getClientRects().length > 0;
  buttons.find(visible)?.click();
};

// Whoever comes to this page has its form filled in. What asks before the form stands is held, and pressed again then.
(() => {
  const asks = "#compare-generate, #grid-draw, #blind-ask";
  let here = true;
  let stands = false;
  const release = () => {
    stands = true;
    letGo();
  };
  const letGo = window.studioHold?.((target) => !stands && target.closest?.(asks), release) ?? (() => {});
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
