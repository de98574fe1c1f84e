// Two pictures under one handle: the slider over them takes pointer and arrow keys, the page follows its value.
document.addEventListener("input", (event) => {
  if (!event.target.matches || !event.target.matches(".cmp-wipe input[type=range]")) return;
  event.target.closest(".cmp-wipe").style.setProperty("--at", `${event.target.value}%`);
});
