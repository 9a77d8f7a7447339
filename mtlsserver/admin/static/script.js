"use strict";

// The page is rendered by the server. This replaces its contents by newer ones, unless somebody is
// using them, and draws the curves.
(() => {
  const every = 2000;

  const digits = (n) => n >= 100 || Number.isInteger(n) ? Math.round(n) : n.toFixed(1);

  const short = (n) => {
    const units = ["", "k", "M", "G", "T", "P"];
    let i = 0;
    for (; n >= 1000 && i < units.length - 1; i++) n /= 1000;
    return digits(n) + units[i];
  };

  const bytes = (n) => {
    const units = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    let i = 0;
    for (; n >= 999.5 && i < units.length - 1; i++) n /= 1024;
    return digits(n) + " " + units[i];
  };

  // draw puts values, which are in order of times, into a curve of 300 by 60.
  const draw = (name, times, values, text = short) => {
    const svg = document.getElementById("curve-" + name);
    const most = Math.max(1, ...values);
    const from = times[0], span = Math.max(1, times[times.length - 1] - from);
    const points = values.map((v, i) =>
      (300 * (times[i] - from) / span).toFixed(1) + "," + (58 - 56 * v / most).toFixed(1));
    const line = document.createElementNS("http://www.w3.org/2000/svg", "polyline");
    line.setAttribute("points", points.join(" "));
    svg.replaceChildren(line);
    document.getElementById(name).textContent =
      text(values[values.length - 1]) + ", peak " + text(Math.max(...values));
  };

  const curves = async () => {
    const section = document.getElementById("curves");
    if (!section) return;
    const answer = await fetch("api/stats?brief=1");
    const samples = (await answer.json()).history;
    if (samples.length < 2) return;
    const times = samples.map((s) => Date.parse(s.time));
    const rate = (key) => samples.slice(1).map((s, i) =>
      1000 * (s[key] - samples[i][key]) / Math.max(1, times[i + 1] - times[i]));
    section.hidden = false;
    draw("open", times, samples.map((s) => s.open));
    draw("opened", times.slice(1), rate("accepted"));
    draw("bytes", times.slice(1), rate("bytes"), bytes);
  };

  // Somebody is typing or has selected something.
  const inUse = () =>
    document.activeElement.matches("input, button") || !document.getSelection().isCollapsed;

  // carry hands what a reader has done to parts of the old page to the same parts of the new one.
  const carry = (old, fresh, selector, hand) => {
    const parts = fresh.querySelectorAll(selector);
    old.querySelectorAll(selector).forEach((part, i) => parts[i] && hand(part, parts[i]));
  };

  const contents = async () => {
    if (inUse()) return;
    const answer = await fetch(location.href);
    const page = new DOMParser().parseFromString(await answer.text(), "text/html");
    const old = document.getElementById("live"), fresh = page.getElementById("live");
    if (!answer.ok || !fresh || inUse()) return;
    carry(old, fresh, "#curves", (a, b) => b.replaceWith(a.cloneNode(true)));
    carry(old, fresh, "details", (a, b) => { b.open = a.open; });
    let focused;
    carry(old, fresh, "a, summary, [tabindex]", (a, b) => { if (a === document.activeElement) focused = b; });
    const scrolled = [...old.querySelectorAll(".scroll")].map((part) => part.scrollLeft);
    old.replaceWith(document.adoptNode(fresh));
    fresh.querySelectorAll(".scroll").forEach((part, i) => { part.scrollLeft = scrolled[i] || 0; });
    if (focused) focused.focus({preventScroll: true});
  };

  const tick = async () => {
    try {
      if (!document.hidden) {
        await contents();
        await curves();
      }
      document.body.classList.remove("stale");
    } catch {
      document.body.classList.add("stale"); // the server does not answer: try again
    }
    setTimeout(tick, every);
  };
  tick();
})();
