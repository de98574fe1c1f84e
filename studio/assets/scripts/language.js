// A text of these scripts in the page's language; {name} stands for a value.
window.studioText = (text, values = {}) =>
  ((window.studioTexts || {})[text] || text).replace(/\{(\w+)\}/g, (whole, name) => (name in values ? values[name] : whole));

// The language that is chosen is kept in a cookie. Inside another site's frame a browser may refuse that one; then the
// address keeps it.
document.addEventListener("click", (event) => {
  const link = event.target.closest ? event.target.closest("[data-language]") : null;
  if (!link) return;
  event.preventDefault();
  const chosen = link.dataset.language;
  document.cookie = `studio-language=${chosen}; Path=/; Max-Age=31536000; SameSite=Lax`;
  const address = new URL(window.location.href);
  address.searchParams.delete("language");
  if (!document.cookie.split("; ").includes(`studio-language=${chosen}`)) address.searchParams.set("language", chosen);
  if (address.href === window.location.href) window.location.reload();
  else window.location.assign(address);
});
