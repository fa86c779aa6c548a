// Draws the charts with uPlot and, where the page is served, replaces what has changed.
(() => {
  "use strict";
  const DASHES = [[], [10, 5], [2, 4], [12, 4, 2, 4]];
  const MARKS = ["solid", "dashed", "dotted", "dashed"]; // in the legend, which has no longer patterns
  const HEIGHT = 240;
  const place = document.getElementById("charts");
  const trouble = document.getElementById("trouble");
  let drawn = []; // of {names, plot, figure, observer}

  const setting = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const names = chart => JSON.stringify([chart.title, ...chart.series.map(([label]) => label)]);
  const columns = chart => [chart.rounds, ...chart.series.map(([, values]) => values)];

  function options(chart, width) {
    const ink = setting("--ink"), line = setting("--line"), colours = setting("--series").split(" ");
    const axis = {stroke: ink, grid: {stroke: line, width: 1}, ticks: {stroke: line, width: 1}};
    return {
      width, height: HEIGHT,
      scales: {x: {time: false}},
      axes: [{...axis, label: "round", incrs: [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000]}, {...axis, size: 60}],
      legend: {markers: {width: 3, dash: (plot, k) => MARKS[(k - 1) % MARKS.length]}},
      series: [{label: "round"}, ...chart.series.map(([label], k) => ({
        label, width: 2, spanGaps: true,
        stroke: colours[k % colours.length], dash: DASHES[k % DASHES.length],
        value: (plot, value) => value === null || value === undefined ? "--" : String(Number(value.toPrecision(3))),
      }))],
    };
  }

  function add(chart) {
    const figure = document.createElement("figure"), caption = document.createElement("figcaption");
    const box = document.createElement("div");
    caption.textContent = chart.title;
    box.tabIndex = 0;
    box.setAttribute("role", "group");
    box.setAttribute("aria-label", `chart: ${chart.title}, by round`);
    figure.append(caption, box);
    place.append(figure);
    const plot = new uPlot(options(chart, box.clientWidth), columns(chart), box);
    const observer = new ResizeObserver(() => plot.setSize({width: box.clientWidth, height: HEIGHT}));
    observer.observe(figure);
    box.addEventListener("keydown", event => move(plot, event));
    for (const label of box.querySelectorAll(".u-series:not(:first-child) th")) {
      label.tabIndex = 0;
      label.addEventListener("keydown", event => { if (event.key === "Enter") label.click(); });
    }
    drawn.push({names: names(chart), plot, figure, observer});
  }

  function move(plot, event) {
    const step = {ArrowLeft: -1, ArrowRight: 1}[event.key], rounds = plot.data[0];
    if (!step || !rounds.length) return;
    event.preventDefault();
    const now = plot.cursor.idx ?? (step > 0 ? -1 : rounds.length);
    const next = Math.min(rounds.length - 1, Math.max(0, now + step));
    plot.setCursor({left: plot.valToPos(rounds[next], "x"), top: 10});
  }

  function draw(afresh) {
    const charts = JSON.parse(document.querySelector("[data-part=charts]").textContent);
    const same = charts.length === drawn.length && charts.every((chart, k) => names(chart) === drawn[k].names);
    if (same && !afresh) {
      charts.forEach((chart, k) => drawn[k].plot.setData(columns(chart)));
      return;
    }
    drawn.forEach(({plot, figure, observer}) => { observer.disconnect(); plot.destroy(); figure.remove(); });
    drawn = [];
    place.textContent = charts.length ? "" : "No round has finished yet.";
    charts.forEach(add);
  }

  const shown = new Map(); // part to its text as it came
  for (const part of document.querySelectorAll("[data-part]")) shown.set(part.dataset.part, part.innerHTML);

  function replace(text) {
    const fresh = new DOMParser().parseFromString(text, "text/html"); // runs no script
    let charted = false;
    for (const part of document.querySelectorAll("[data-part]")) {
      const name = part.dataset.part, next = fresh.querySelector(`[data-part="${name}"]`);
      if (!next || next.innerHTML === shown.get(name)) continue;
      shown.set(name, next.innerHTML);
      part.replaceChildren(...next.childNodes);
      charted ||= name === "charts";
    }
    const text_of = query => document.querySelector(query).textContent;
    document.title = `${text_of("[data-part=progress] strong")} - ${text_of("h1")}`;
    if (charted) draw(false);
  }

  async function look() {
    let problem = "No connection: `fedfactory watch` has ended. What is shown is its last state.", text = "";
    try {
      const answer = await fetch("live", {cache: "no-store"});
      text = await answer.text();
      problem = answer.ok ? "" : text;
    } catch { /* the problem is as above */ }
    if (!problem) replace(text);
    trouble.hidden = !problem;
    if (trouble.textContent !== problem) trouble.textContent = problem;
    setTimeout(look, refresh);
  }

  draw(true);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => draw(true));
  const refresh = 1000 * Number(document.documentElement.dataset.refresh ?? 0);
  if (refresh) setTimeout(look, refresh);
})();
