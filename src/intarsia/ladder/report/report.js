// Readings under the pointer or the finger. The page says everything without this.
(() => {
  const tip = document.createElement("div");
  tip.className = "tip";
  tip.hidden = true;
  document.body.append(tip);
  const clear = () => {
    tip.hidden = true;
    for (const dot of document.querySelectorAll(".near")) dot.classList.remove("near");
  };
  for (const figure of document.querySelectorAll("svg.figure")) {
    const dots = [...figure.querySelectorAll("circle.dot")];
    if (!dots.length) continue;
    const at = dots.map((dot) => [dot, dot.cx.baseVal.value, dot.cy.baseVal.value, dot.textContent]);
    // The tooltip replaces the browser's own.
    for (const dot of dots) dot.textContent = "";
    const show = (event) => {
      const place = new DOMPoint(event.clientX, event.clientY).matrixTransform(figure.getScreenCTM().inverse());
      let nearest = null, best = 40 * 40;
      for (const [dot, x, y, text] of at) {
        const distance = (x - place.x) ** 2 + ((y - place.y) / 2) ** 2;
        if (distance < best) { best = distance; nearest = [dot, text]; }
      }
      clear();
      if (!nearest) return;
      nearest[0].classList.add("near");
      const box = nearest[0].getBoundingClientRect();
      tip.textContent = nearest[1];
      tip.hidden = false;
      const half = tip.offsetWidth / 2 + 4;
      tip.style.left = `${Math.min(Math.max(box.left + box.width / 2, half), innerWidth - half) + scrollX}px`;
      tip.style.top = `${box.top + scrollY}px`;
    };
    figure.addEventListener("pointermove", show);
    figure.addEventListener("pointerdown", show);
    figure.addEventListener("pointerleave", clear);
  }
  // What is folded away belongs on paper.
  const opened = [];
  addEventListener("beforeprint", () => {
    for (const fold of document.querySelectorAll("details:not([open])")) { fold.open = true; opened.push(fold); }
  });
  addEventListener("afterprint", () => { for (const fold of opened.splice(0)) fold.open = false; });
})();
