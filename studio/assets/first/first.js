// Shows the first view until the page itself listens, then gives it what was pressed meanwhile, and its place.
(() => {
  const first = document.getElementById("first-page");
  const theme = new URLSearchParams(window.location.search).get("__theme");
  const dark = theme ? theme === "dark" : window.matchMedia("(prefers-color-scheme: dark)").matches;
  first.classList.toggle("dark", dark);
  let pressed = null;
  first.addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (!button) return;
    first.querySelectorAll("[aria-busy]").forEach((other) => other.removeAttribute("aria-busy"));
    button.setAttribute("aria-busy", "true");
    pressed = button;
  });
  const place = (button) => {
    const { tab, goal, sample, page } = button.dataset;
    if (tab) return document.getElementById(`tab-${tab}-button`) || [...document.querySelectorAll("gradio-app [role=tab]")].find((one) => one.textContent.trim() === button.textContent.trim());
    const name = goal ? `goal="${goal}"` : sample ? `sample="${sample}"` : `page="${page}"`;
    return document.querySelector(`#start-board [data-${name}]`);
  };
  const watch = new MutationObserver(() => {
    if (!document.querySelector("#start-board[data-live], #start-board [data-live]")) return;
    watch.disconnect();
    requestAnimationFrame(() => {
      const held = document.activeElement && first.contains(document.activeElement) ? place(document.activeElement) : null;
      const next = pressed ? place(pressed) : null;
      first.remove();
      if (held) held.focus();
      if (next) next.click();
      window.studioStands();
    });
  });
  watch.observe(document.querySelector("gradio-app") || document.documentElement, { childList: true, subtree: true, attributes: true, attributeFilter: ["data-live"] });
})();
