// A card that is pressed looks pressed at once; the server's answer comes a moment later.
document.addEventListener("click", (event) => {
  const card = event.target.closest ? event.target.closest("#start-board [data-choice]") : null;
  if (!card) return;
  card.parentElement.querySelectorAll("[data-choice]").forEach((other) => other.setAttribute("aria-pressed", String(other === card)));
});
