// Gradio makes its whole configuration reactive, and then compares each of its hundreds of components with each trigger of
// each callback, every comparison through proxies. The two lists never change: as arrays of another class, which what
// Gradio filters out of them is too, they stay plain.
(() => {
  class Plain extends Array {}
  const config = window.gradio_config || {};
  for (const list of [config.dependencies, config.components]) {
    if (Array.isArray(list)) Object.setPrototypeOf(list, Plain.prototype);
  }
})();
