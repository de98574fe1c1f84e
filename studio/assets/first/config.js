// Gradio makes its whole configuration reactive, and then compares each of its hundreds of components with each trigger of
// each callback, every comparison through proxies. The two lists never change: as arrays of another class they stay plain.
(() => {
  class Plain extends Array {
    static get [Symbol.species]() { return Array; }
  }
  const config = window.gradio_config || {};
  const later = new Set(window.studioLater);
  for (const call of config.dependencies || []) {
    if (later.has(call.id)) call.targets = call.targets.filter(([, event]) => event !== "load");
  }
  for (const list of [config.dependencies, config.components]) {
    if (Array.isArray(list)) Object.setPrototypeOf(list, Plain.prototype);
  }
})();
