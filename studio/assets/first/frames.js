// Gradio counts the seconds of what is pending anew in each frame, shown or not, and never stops counting those of its
// own loading: sixty frames a second for as long as the page is open, on the processor that may be training. A count of
// seconds is told each second.
(() => {
  const frame = window.requestAnimationFrame.bind(window);
  window.requestAnimationFrame = (call) => {
    const text = Function.prototype.toString.call(call);
    const counts = text.length < 150 && text.includes("performance.now()") && text.includes("/1e3");
    return counts ? setTimeout(() => call(performance.now()), 1000) && 0 : frame(call);
  };
})();
