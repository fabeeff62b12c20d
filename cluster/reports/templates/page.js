"use strict";
(() => {
  const figures = JSON.parse(document.getElementById("charts")?.textContent ?? "{}");
  const charts = () => document.querySelectorAll(".chart");

  // Figures name their colours and fonts as CSS variables, so that a chart follows the page from light to dark.
  const resolved = (value, style) => {
    if (typeof value === "string") {
      return value.replace(/^var\((--[\w-]+)\)$/, (_, name) => style.getPropertyValue(name).trim());
    }
    if (Array.isArray(value)) return value.map((item) => resolved(item, style));
    if (value && typeof value === "object") {
      return Object.fromEntries(Object.entries(value).map(([key, item]) => [key, resolved(item, style)]));
    }
    return value;
  };

  const draw = (chart) => {
    const figure = figures[chart.dataset.figure];
    if (!figure) return window.Plotly?.purge(chart);
    const { data, layout } = resolved(figure, getComputedStyle(document.documentElement));
    chart.style.height = `${layout.height}px`; // plotly asks the element, not the layout, when the window is resized
    Plotly.newPlot(chart, data, layout, { displayModeBar: false, responsive: true });
  };

  const drawAll = () => charts().forEach(draw);
  drawAll();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
  document.addEventListener("change", ({ target }) => {
    if (!target.dataset.switches) return;
    const chart = document.getElementById(target.dataset.switches);
    chart.dataset.figure = target.value;
    draw(chart);
  });
  // A page that learns of figures later tells them here.
  document.addEventListener("figures", ({ detail }) => {
    Object.assign(figures, detail);
    drawAll();
  });

  const tip = document.getElementById("tip");

  const shown = () => document.querySelector("[aria-describedby=tip]");
  const show = (token) => {
    if (token !== shown()) hide();
    tip.textContent = token.dataset.tip;
    tip.hidden = false;
    token.setAttribute("aria-describedby", "tip");
    const at = token.getClientRects()[0];
    const below = at.bottom + tip.offsetHeight + 12 < innerHeight;
    tip.style.left = `${Math.max(12, Math.min(at.left, innerWidth - tip.offsetWidth - 12))}px`;
    tip.style.top = `${below ? at.bottom + 6 : at.top - tip.offsetHeight - 6}px`;
  };
  const hide = () => {
    tip.hidden = true;
    shown()?.removeAttribute("aria-describedby");
  };
  const token = (event) => event.target.closest?.("[data-tip]");

  for (const [enter, leave] of [["mouseover", "mouseout"], ["focusin", "focusout"]]) {
    document.addEventListener(enter, (event) => token(event) && show(token(event)));
    document.addEventListener(leave, (event) => token(event) && hide());
  }
  // Focus may scroll the page after the fact: the tip goes with its token.
  addEventListener("scroll", () => shown() && show(shown()), { passive: true });

  // One tab stop a completion; the arrow keys walk its tokens.
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") return hide();
    const from = token(event);
    if (!from) return;
    const all = [...from.parentElement.querySelectorAll("[data-tip]")];
    const places = { ArrowRight: all.indexOf(from) + 1, ArrowLeft: all.indexOf(from) - 1, Home: 0, End: all.length - 1 };
    const to = all[places[event.key]];
    if (!to) return;
    event.preventDefault();
    from.tabIndex = -1;
    to.tabIndex = 0;
    to.focus();
  });
})();
