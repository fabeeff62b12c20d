import { atMost, refresh, tellFigures } from "./live.js";

const [, , id] = location.pathname.split("/");
const standing = () => document.getElementById("standing");

const depth = async () => {
  if (!document.querySelector('[id^="depth-"]')) return;
  const answer = await fetch(`/jobs/${id}/depth`);
  if (!answer.ok) return;
  for (const chart of document.querySelectorAll('[id^="depth-"]')) {
    chart.dataset.empty = chart.dataset.empty.replace("Tokens are being read…", "There are too few tokens.");
  }
  tellFigures((await answer.json()).figures);
};

const show = ({ batches_done: done, batches_total: total }) => {
  const bar = standing().querySelector("progress");
  if (!bar) return;
  bar.max = total || 1;
  bar.value = done;
  document.getElementById("done").textContent = done.toLocaleString("en");
  document.getElementById("total").textContent = total.toLocaleString("en");
};

const ENDS = ["done", "failed", "cancelled"];
const say = (text) => (document.getElementById("said").textContent = text);

if (standing().dataset.live) {
  const soon = atMost(400, refresh);
  const later = atMost(4000, refresh);
  const deeper = atMost(15000, depth);
  const stream = new EventSource(`/v1/jobs/${id}/events`);
  stream.addEventListener("progress", ({ data }) => {
    show(JSON.parse(data));
    later();
    deeper();
  });
  stream.addEventListener("job", async ({ data }) => {
    const { what } = JSON.parse(data);
    if (!ENDS.includes(what)) return soon();
    await refresh();
    if (standing().dataset.live) return; // an end of before a policy was added, or the job was retried
    stream.close();
    say(`The job is ${what}.`);
    setTimeout(depth, 1500);
  });
  addEventListener("pagehide", () => stream.close());
}

// Depth over position is read from tokens: after everything that is read from sums stands there.
(window.requestIdleCallback ?? setTimeout)(depth);
