// The first page comes without what stands in its other tabs (studio/filling.py). As soon as it stands, the tabs are
// asked for; what is pressed before the last of them is there is pressed again then, but for a goal, which needs none.
(() => {
  const early = "#first-page, #start-board [data-goal], #studio-fill, #studio-wake, a[href]";
  let begun = false;
  const longest = 15000;
  // Not every browser says when it has nothing to do.
  const idle = window.requestIdleCallback ?? ((call) => setTimeout(call, 1));
  let held = null;
  const begin = () => {
    const button = document.getElementById("studio-fill");
    if (begun || !button) return;
    begun = true;
    // The address named no place to come back to; from here on it does.
    window.studioArrived = true;
    button.click();
  };
  const hold = (event) => {
    const pressed = event.target.closest?.("gradio-app button, gradio-app [role=tab], gradio-app input[type=file]");
    if (!pressed || pressed.closest(early)) return;
    event.preventDefault();
    event.stopImmediatePropagation();
    held?.removeAttribute("aria-busy");
    held = pressed;
    held.setAttribute("aria-busy", "true");
    // Where the tabs do not come, what was pressed is not kept for ever.
    setTimeout(() => held === pressed && window.studioFilled(), longest);
    begin();
  };
  document.addEventListener("click", hold, true);
  window.studioFilled = () => {
    const pressed = held;
    held = null;
    document.removeEventListener("click", hold, true);
    pressed?.removeAttribute("aria-busy");
    if (pressed?.isConnected) pressed.click();
  };
  // Not before the answer to what was pressed first, where something was.
  window.studioStands = () => setTimeout(() => idle(begin, { timeout: 600 }), 300);
})();
