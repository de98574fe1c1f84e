// What is pressed before the page can answer is held, and pressed again when it is let go; of several the last. Whoever
// holds says what of a press's target is to be held, if anything, and what happens where nothing lets it go for long.
window.studioHold = (holds, late) => {
  const longest = 15000;
  let held = null;
  document.addEventListener("click", (event) => {
    const pressed = holds(event.target);
    if (!pressed) return;
    event.preventDefault();
    event.stopImmediatePropagation();
    held?.removeAttribute("aria-busy");
    held = pressed;
    held.setAttribute("aria-busy", "true");
    setTimeout(() => held === pressed && late(), longest);
  }, true);
  return () => {
    const pressed = held;
    held = null;
    pressed?.removeAttribute("aria-busy");
    if (pressed?.isConnected) pressed.click();
  };
};
