// Parts of a page that are fetched anew when the server says that something happened.

/** Fetch the page again and put its parts (`data-swap`) in the place of those that are here. */
export const refresh = async () => {
  const answer = await fetch(location.href, { headers: { Accept: "text/html" } });
  if (!answer.ok || answer.redirected) return location.reload();
  const fresh = new DOMParser().parseFromString(await answer.text(), "text/html");
  for (const part of document.querySelectorAll("[data-swap]")) {
    const next = fresh.getElementById(part.id);
    if (!next || part.outerHTML === next.outerHTML) continue;
    await left(part);
    keep(part, next);
    part.querySelectorAll(".chart").forEach((chart) => window.Plotly?.purge(chart));
    part.replaceWith(next);
  }
  const charts = fresh.getElementById("charts");
  if (charts) tellFigures(JSON.parse(charts.textContent));
};

export const tellFigures = (detail) => document.dispatchEvent(new CustomEvent("figures", { detail }));

/** A part is not taken away from under somebody who is in it. */
const left = (part) =>
  new Promise((go) => {
    if (!part.contains(document.activeElement) || document.activeElement === document.body) return go();
    part.addEventListener("focusout", () => setTimeout(() => left(part).then(go)), { once: true });
  });

/** What is unfolded or chosen stays so. */
const keep = (part, next) => {
  const folds = next.querySelectorAll("details");
  part.querySelectorAll("details").forEach((fold, at) => folds[at] && (folds[at].open = fold.open));
  for (const chosen of part.querySelectorAll("[data-switches]:checked")) {
    const same = [...next.querySelectorAll("[data-switches]")].find((input) => input.value === chosen.value);
    if (!same) continue;
    same.checked = true;
    next.querySelector(`#${same.dataset.switches}`).dataset.figure = same.value;
  }
  const scrollers = next.querySelectorAll(".scroller");
  requestAnimationFrame(() =>
    part.querySelectorAll(".scroller").forEach((one, at) => scrollers[at] && (scrollers[at].scrollLeft = one.scrollLeft))
  );
};

let busy = Promise.resolve(); // one after the other: what came later shall not be overtaken

/** Call `act` soon, and at most once in `pause` milliseconds, however often this is called. */
export const atMost = (pause, act) => {
  let waiting = false;
  return () => {
    if (waiting) return;
    waiting = true;
    setTimeout(() => {
      waiting = false;
      busy = busy.then(act).catch(() => {}); // the server may be away; the next event tries again
    }, pause);
  };
};

document.addEventListener("submit", (event) => {
  const question = event.submitter?.dataset.ask;
  if (question && !confirm(question)) event.preventDefault();
});
