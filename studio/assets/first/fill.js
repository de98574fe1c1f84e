// The first page comes without what stands in its other tabs (studio/filling.py). As soon as it stands, the tabs are
// asked for; what is pressed before the last of them is there is pressed again then, but for a goal, which needs none.
(() => {
  const early = "#first-page, #start-board [data-goal], #studio-fill, #studio-wake, a[href]";
  const answers = "gradio-app button, gradio-app [role=tab], gradio-app input[type=file]";
  // Not every browser says when it has nothing to do.
  const idle = window.requestIdleCallback ?? ((call) => setTimeout(call, 1));
  let begun = false;
  let filled = false;
  const begin = () => {
    const button = document.getElementById("studio-fill");
    if (begun || !button) return;
    begun = true;
    // The address named no place to come back to; from here on it does.
    window.studioArrived = true;
    button.click();
  };
  const letGo = window.studioHold((target) => {
    const pressed = !filled && target.closest?.(answers);
    if (!pressed || pressed.closest(early)) return null;
    begin();
    return pressed;
  }, () => window.studioFilled());
  window.studioFilled = () => {
    filled = true;
    letGo();
  };
  // Not before the answer to what was pressed first, where something was.
  window.studioStands = () => setTimeout(() => idle(begin, { timeout: 600 }), 300);
})();
