// Shift and Enter in the prompt ask as the view that is open asks.
window.studioAsk = () => {
  const buttons = [...document.querySelectorAll("#compare-generate, #grid-draw, #blind-ask")];
  buttons.find((button) => button.checkVisibility())?.click();
};

// Two pictures under one handle: the slider over them takes pointer and arrow keys, the page follows its value.
document.addEventListener("input", (event) => {
  if (!event.target.matches || !event.target.matches(".cmp-wipe input[type=range]")) return;
  event.target.closest(".cmp-wipe").style.setProperty("--at", `${event.target.value}%`);
});
