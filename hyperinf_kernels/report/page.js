"use strict";
// Everything on the page works without this script; it adds searching and opening many queries at once.
(() => {
  const tools = document.getElementById("tools");
  const cards = Array.from(document.querySelectorAll("details.query"));
  if (tools && cards.length > 1) {
    const search = document.getElementById("query-filter");
    const chooser = document.getElementById("class-filter");
    const shown = document.getElementById("shown");
    const texts = cards.map((card) => card.textContent.toLowerCase());
    const filter = () => {
      const wanted = search.value.trim().toLowerCase();
      const kind = chooser ? chooser.value : "";
      let n = 0;
      cards.forEach((card, i) => {
        card.hidden = !(texts[i].includes(wanted) && (kind === "" || card.dataset.class === kind));
        n += card.hidden ? 0 : 1;
      });
      shown.textContent = n === cards.length ? "" : `${n} of ${cards.length}`;
    };
    const setAll = (open) => cards.forEach((card) => { if (!card.hidden) card.open = open; });
    search.addEventListener("input", filter);
    if (chooser) chooser.addEventListener("change", filter);
    document.getElementById("open-all").addEventListener("click", () => setAll(true));
    document.getElementById("close-all").addEventListener("click", () => setAll(false));
    tools.hidden = false;
  }
  // Paper cannot be clicked: unfold the queries for printing, then restore what was closed.
  let closed = [];
  window.addEventListener("beforeprint", () => {
    closed = cards.filter((card) => !card.open);
    closed.forEach((card) => { card.open = true; });
  });
  window.addEventListener("afterprint", () => closed.forEach((card) => { card.open = false; }));
})();
