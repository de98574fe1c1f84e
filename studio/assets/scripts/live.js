// Bring a part of the page into view once it has been opened, and the keyboard with it.
window.studioShow = (id) => {
  const part = document.getElementById(id);
  if (!part) return;
  const calm = matchMedia('(prefers-reduced-motion: reduce)').matches;
  part.scrollIntoView({ block: 'start', behavior: calm ? 'auto' : 'smooth' });
  part.querySelector('button')?.focus({ preventScroll: true });
};
