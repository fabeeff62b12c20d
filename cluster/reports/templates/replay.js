"use strict";
// A policy is arithmetic on what was traced: every move of a slider decides all tokens anew, here.
(() => {
  const told = JSON.parse(document.getElementById("replay").textContent);
  const bytes = (text) => Uint8Array.from(atob(text), (char) => char.charCodeAt(0)).buffer;
  const n = told.tokens, p = told.points.length, last = p - 1;
  const signals = Object.fromEntries(
    Object.entries(told.signals).map(([name, { data, low, high }]) => [name, { values: new Uint16Array(bytes(data)), low, high }]),
  );
  const marks = new Uint8Array(bytes(told.marks)); // [p, n] 1: right, 2: agrees with full depth
  const winners = told.winners && new Uint8Array(bytes(told.winners)); // [p, n] the controller's likeliest class
  const step = new Int32Array(bytes(told.step)); // [n] of its batch; -1: out of prefill
  const reach = new Int32Array(bytes(told.reach)); // [n] positions that are looked at
  const sample = new Int32Array(bytes(told.sample)); // [n]
  const wrong = new Uint8Array(bytes(told.wrong)); // [samples] full depth would not write the target
  const usable = told.points.map((point, place) => place < last && told.exitPoints.includes(point));
  const EXIT = 1, STOP = 2;

  // Thresholds are compared with what is kept of a signal, in steps of 1 in 65,535 of its range.
  const kept = ({ low, high }, value) => ((value - low) / (high - low)) * 65535;

  const decide = (kind, { threshold, exit, stop }) => {
    const places = new Uint8Array(n).fill(last), stops = new Uint8Array(n);
    if (kind === "controller") {
      const { values } = signals.top, leave = kept(signals.top, exit), giveUp = kept(signals.top, stop);
      const asked = told.points.map((point, place) => usable[place] || (place === last && told.exitPoints.includes(point)));
      for (let i = 0; i < n; i++) {
        if (step[i] < 0) continue;
        for (let place = 0; place < p; place++) {
          if (!asked[place]) continue;
          const at = place * n + i;
          const leaves = place < last && winners[at] === EXIT && values[at] > leave;
          if (!leaves && !(winners[at] === STOP && values[at] > giveUp)) continue;
          places[i] = place;
          stops[i] = leaves ? 0 : 1;
          break;
        }
      }
      return { places, stops };
    }
    const signal = signals[kind], at = kept(signal, threshold), below = kind === "entropy";
    for (let i = 0; i < n; i++) {
      if (step[i] < 0) continue;
      for (let place = 0; place < last; place++) {
        const value = signal.values[place * n + i];
        if (!usable[place] || (below ? value >= at : value <= at)) continue;
        places[i] = place;
        break;
      }
    }
    return { places, stops };
  };

  const figures = (kind, thresholds) => {
    const { places, stops } = decide(kind, thresholds);
    const k = told.steps, counts = new Float64Array(p * k), looked = new Float64Array(p * k), left = new Float64Array(p * k);
    let written = 0, right = 0, agree = 0, layers = 0, decoded = 0, stopped = 0, wrongStopped = 0, ended = -1;
    for (let i = 0; i < n; i++) {
      if (sample[i] === ended) continue; // behind a stop
      const place = places[i], at = place * k + step[i];
      if (step[i] >= 0) {
        counts[at] += 1;
        looked[at] += reach[i];
      }
      if (stops[i]) {
        ended = sample[i];
        stopped += 1;
        wrongStopped += wrong[ended];
        continue;
      }
      if (step[i] >= 0) {
        left[at] += 1;
        decoded += 1;
      }
      written += 1;
      right += marks[place * n + i] & 1;
      agree += marks[place * n + i] >> 1;
      layers += told.points[place];
    }
    const samples = wrong.length, base = wrong.reduce((sum, one) => sum + one, 0);
    return {
      speed: speed(kind, counts, looked, left, decoded, layers / written),
      right: right / written,
      agree: agree / written,
      layer: layers / written,
      stopped: stopped / samples,
      lift: stopped && base ? wrongStopped / stopped / (base / samples) : null,
    };
  };

  // The roofline of engine/cost.py over the steps of all batches, keys and values copied.
  const ideal = (kind, counts, looked, left) => {
    const { shape, heads, bandwidth, peak } = told.cost, k = told.steps, size = shape.element_size;
    const perPosition = 2 * shape.n_kv_heads * shape.head_size, projection = shape.hidden_size * perPosition;
    const most = (flops, read) => Math.max(read / bandwidth, flops / peak);
    const predicting = ["confidence", "margin", "entropy"].includes(kind);
    let total = 0;
    for (let s = 0; s < k; s++) {
      let rows = 0, context = 0;
      for (let place = last; place >= 0; place--) {
        const at = place * k + s, own = told.points[place] - (place ? told.points[place - 1] : 0);
        rows += counts[at];
        context += looked[at];
        if (!rows) continue;
        const flops = 2 * shape.layer_parameters * rows + 4 * shape.n_heads * shape.head_size * context;
        total += own * most(flops, size * (shape.layer_parameters + perPosition * context));
        if (place < last && left[at]) total += (told.nLayers - told.points[place]) * most(2 * projection * left[at], size * projection);
        const asked = predicting && usable[place] ? rows : left[at];
        if (asked) total += most(2 * heads[place] * asked, size * heads[place]);
      }
    }
    return total;
  };

  const speed = (kind, counts, looked, left, decoded, layer) => {
    if (!told.cost) return told.nLayers / layer;
    return told.full / (ideal(kind, counts, looked, left) / decoded);
  };

  const main = document.getElementById("replaying");
  const sliders = [...main.querySelectorAll("input[type=range]")];
  const choice = main.querySelector("select");
  const percent = (share) => `${(100 * share).toFixed(1)}%`;
  const shown = {
    speed: (now) => `${now.speed.toFixed(2)}×`,
    right: (now) => percent(now.right),
    agree: (now) => percent(now.agree),
    layer: (now) => now.layer.toFixed(1),
    stopped: (now) => percent(now.stopped),
    lift: (now) => (now.lift === null ? "–" : `${now.lift.toFixed(2)}×`),
  };

  const update = () => {
    const kind = choice.value, own = {};
    for (const slider of sliders) {
      const belongs = slider.dataset.kinds.split(" ").includes(kind);
      slider.closest(".slider").hidden = !belongs;
      if (!belongs) continue;
      const { low, high } = slider.name === "threshold" ? signals[kind] : { low: 0, high: 1 };
      const value = Math.max(0, low) + (high - Math.max(0, low)) * (slider.value / slider.max);
      own[slider.name] = Number(value.toFixed(4));
      slider.setAttribute("aria-valuetext", own[slider.name]);
      main.querySelector(`output[for=${slider.id}]`).value = own[slider.name];
    }
    const now = figures(kind, own);
    for (const [name, form] of Object.entries(shown)) document.getElementById(`now-${name}`).textContent = form(now);
    const options = Object.entries(own).map(([name, value]) => `${name}: ${value}`).join(", ");
    document.getElementById("now-policy").textContent = `{${kind}: {${options}}}`;
    told.figure.data.at(-1).x = [now.speed];
    told.figure.data.at(-1).y = [now.right];
    document.dispatchEvent(new CustomEvent("figures", { detail: { replay: told.figure } }));
    window.replayed = { kind, thresholds: own, ...now };
  };

  main.addEventListener("input", update);
  update();
})();
