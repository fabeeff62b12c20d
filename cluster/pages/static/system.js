import { atMost, refresh } from "./live.js";

// Workers and leases change all the time; who looks at another window needs none of it.
const again = atMost(0, refresh);
setInterval(() => document.hidden || again(), 5000);
