import { atMost, refresh } from "./live.js";

const lines = document.getElementById("lines");

if (lines) {
  const open = () => [...document.querySelectorAll("[data-open]")].map((line) => line.dataset.job);
  const told = {};
  let stream = null;
  let heard = "";

  const listen = () => {
    const asked = `/live?${new URLSearchParams(open().map((id) => ["job", id]))}`;
    if (asked === heard) return;
    stream?.close();
    heard = asked;
    stream = new EventSource(asked);
    stream.onmessage = ({ data }) => {
      for (const [id, standing] of Object.entries(JSON.parse(data))) {
        if (id === "newest") seen(standing.job);
        else update(id, standing);
      }
    };
  };

  const again = atMost(300, async () => {
    await refresh();
    listen();
  });

  const update = (id, { state, mark, done, total }) => {
    const line = document.querySelector(`[data-job="${id}"]`);
    if (!line) return;
    // at first against what the line itself shows: much may have happened before the stream was there
    if ((told[id] ?? line.dataset.told) !== `${state} ${mark}`) again();
    told[id] = `${state} ${mark}`;
    const bar = line.querySelector("progress");
    if (!bar || total === undefined) return;
    bar.max = total || 1;
    bar.value = done;
    line.querySelector(".numbers").textContent = total ? `${done.toLocaleString("en")} / ${total.toLocaleString("en")}` : "preparing";
  };

  // The whole list shows new jobs by itself; a part of it says that there are some.
  const seen = (job) => {
    const { newest, whole } = document.getElementById("lines").dataset;
    if (job <= Number(newest)) return;
    if (whole === undefined) document.getElementById("news").hidden = false;
    else again();
  };

  addEventListener("pagehide", () => stream.close());
  listen();
}
