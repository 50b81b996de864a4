// Before the first paint: the theme the reader chose here last, else the system's.
(() => {
  const kept = localStorage.getItem("outrider.theme");
  if (kept === "light" || kept === "dark") document.documentElement.dataset.theme = kept;
})();
