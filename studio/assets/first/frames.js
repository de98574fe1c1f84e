// Gradio counts the seconds of what is pending anew in each frame, shown or not, and never stops counting those of its
// own loading: sixty frames a second for as long as the page is open, on the processor that may be training. A count of
// seconds is told each second, and one that nobody sees is hardly kept.
(() => {
  const frame = window.requestAnimationFrame.bind(window);
  window.requestAnimationFrame = (call) => {
    const text = Function.prototype.toString.call(call);
    const counts = text.length < 150 && text.includes("performance.now()") && text.includes("/1e3");
    if (!counts) return frame(call);
    const seen = document.querySelector("[data-testid=status-tracker]:not(.hide)");
    setTimeout(() => call(performance.now()), seen ? 1000 : 10000);
    return 0;
  };
})();
