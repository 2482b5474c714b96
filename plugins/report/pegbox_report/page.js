"use strict";
// Draws the charts from the figures in #figures. No library: a few hundred points, one path per series.
const data = JSON.parse(document.getElementById("figures").textContent);
const root = document.documentElement;
const W = 1000, NARROW = 480, H = 190, LEFT = 52, RIGHT = 14, TOP = 10, BOTTOM = 24;
const state = { smooth: data.smooth, log: false, axis: "step" };
const drawn = [];

const theme = document.getElementById("theme");
const dark = () => root.dataset.theme === "dark";
const show = (name) => { root.dataset.theme = name; theme.textContent = name === "dark" ? "Light" : "Dark"; };
theme.onclick = () => show(dark() ? "light" : "dark");
show(matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");

function svg(tag, attributes, parent) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (parent) parent.append(made);
  return made;
}

function html(tag, name, text, parent) {
  const made = document.createElement(tag);
  if (name) made.className = name;
  if (text !== undefined) made.textContent = text;
  if (parent) parent.append(made);
  return made;
}

function format(value, unit) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "–";
  if (value === 0) return "0";
  if (unit === "bytes") {
    const GiB = 2 ** 30, MiB = 2 ** 20;
    return value >= GiB ? `${+(value / GiB).toFixed(2)} GiB` : `${+(value / MiB).toFixed(1)} MiB`;
  }
  if (unit === "seconds") {
    if (value < 60) return `${+value.toFixed(1)} s`;
    return value < 3600 ? `${Math.floor(value / 60)} min ${Math.round(value % 60)} s` : `${(value / 3600).toFixed(1)} h`;
  }
  const size = Math.abs(value);
  if (size < 1e-3) return value.toExponential(2).replace(/\.?0+e/, "e").replace("e-", "e−");
  if (size >= 1e6) return `${+(value / 1e6).toFixed(2)} M`;
  if (size >= 1e4) return `${+(value / 1e3).toFixed(1)} k`;
  return String(+value.toPrecision(4));
}

function ticks(low, high, count, unit) {
  if (unit === "bytes") {
    const base = 1024 ** Math.floor(Math.log(Math.max(high, 1)) / Math.log(1024));
    return ticks(low / base, high / base, count).map((value) => value * base);
  }
  const raw = (high - low) / count || 1, power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 2.5, 5, 10].map((m) => m * power).find((s) => s >= raw - 1e-12 * raw);
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + 1e-9 * step; i++) found.push(i * step);
  return found;
}

function powers(low, high) {
  const found = [];
  for (let p = Math.floor(Math.log10(low)); p <= Math.ceil(Math.log10(high)); p++)
    for (const m of [1, 2, 5]) if (m * 10 ** p >= low * 0.999 && m * 10 ** p <= high * 1.001) found.push(m * 10 ** p);
  return found.length > 7 ? found.filter((v) => Number.isInteger(Math.round(Math.log10(v) * 1e6) / 1e6)) : found;
}

// Exponential moving average without a bias towards the first value (Kingma and Ba 2015, section 3).
function smoothed(values, weight) {
  let sum = 0, total = 0;
  return values.map((value) => {
    if (value === null) return null;
    sum = weight * sum + (1 - weight) * value;
    total = weight * total + (1 - weight);
    return sum / total;
  });
}

function path(xs, ys, x, y) {
  let pen = false, made = "";
  ys.forEach((value, i) => {
    if (value === null || (state.log && value <= 0)) { pen = false; return; }
    made += `${pen ? "L" : "M"}${x(xs[i]).toFixed(1)} ${y(value).toFixed(1)}`;
    pen = true;
  });
  return made;
}

const axis = (series) => state.axis === "time" && series.time ? series.time : series.step;

function range(chart, log) {
  let all = chart.series.flatMap((s) => s.value).filter((v) => v !== null && (!log || v > 0));
  let low = Math.min(...all), high = Math.max(...all);
  if (!all.length) return [0, 1];
  if (log) return low === high ? [low / 2, high * 2] : [low, high];
  if (chart.zero) low = Math.min(low, 0);
  const room = (high - low || Math.abs(high) || 1) * 0.06;
  return [chart.zero && low === 0 ? 0 : low - room, high + room];
}

function draw(holder) {
  const { chart, box, tip } = holder;
  box.replaceChildren();
  const width = Math.max(280, box.clientWidth || (chart.wide ? W : NARROW)), height = chart.wide ? 250 : H;
  const image = svg("svg", { viewBox: `0 0 ${width} ${height}`, height, role: "img", "aria-label": chart.title }, box);
  const log = state.log && chart.series.some((s) => s.value.some((v) => v > 0));
  const xs = chart.series.flatMap(axis), [low, high] = range(chart, log);
  const first = Math.min(...xs), last = Math.max(...xs), span = last - first || 1;
  const x = (v) => LEFT + ((v - first) / span) * (width - LEFT - RIGHT);
  const level = (v) => log ? (Math.log(v) - Math.log(low)) / (Math.log(high) - Math.log(low)) : (v - low) / (high - low);
  const y = (v) => height - BOTTOM - level(v) * (height - TOP - BOTTOM);
  for (const value of log ? powers(low, high) : ticks(low, high, 4, chart.unit)) {
    svg("line", { class: "grid", x1: LEFT, x2: width - RIGHT, y1: y(value), y2: y(value) }, image);
    const text = svg("text", { x: LEFT - 8, y: y(value) + 4, "text-anchor": "end" }, image);
    text.textContent = format(value, chart.unit);
  }
  svg("line", { class: "base", x1: LEFT, x2: width - RIGHT, y1: height - BOTTOM, y2: height - BOTTOM }, image);
  for (const value of ticks(first, last, Math.max(2, Math.floor(width / 130)))) {
    const text = svg("text", { x: x(value), y: height - 6, "text-anchor": "middle" }, image);
    text.textContent = format(value, state.axis === "time" ? "seconds" : "");
  }
  chart.series.forEach((series) => {
    const at = axis(series), few = series.value.length <= 40, color = series.color + (series.dashed ? " dashed" : "");
    const weight = chart.exact || (few && series.held_out) ? 0 : state.smooth;
    if (weight > 0) svg("path", { class: `raw ${color}`, d: path(at, series.value, x, y) }, image);
    svg("path", { class: `line ${color}`, d: path(at, smoothed(series.value, weight), x, y) }, image);
    if (few && !chart.exact) series.value.forEach((v, i) => {
      if (v !== null && (!log || v > 0) && weight === 0) svg("circle", { class: color, cx: x(at[i]), cy: y(v), r: series.held_out ? 3.2 : 2.2 }, image);
    });
  });
  holder.cross = svg("line", { class: "cross", y1: TOP, y2: height - BOTTOM, visibility: "hidden" }, image);
  Object.assign(holder, { x, y, width, height, first, span, image });
  image.onpointermove = (event) => {
    const at = image.getBoundingClientRect();
    point(first + (((event.clientX - at.left) * (width / at.width)) - LEFT) / (width - LEFT - RIGHT) * span, holder);
  };
  image.onpointerleave = () => drawn.forEach((other) => { other.tip.hidden = true; other.cross.setAttribute("visibility", "hidden"); });
  tip.hidden = true;
}

function nearest(values, wanted) {
  let best = 0;
  values.forEach((value, i) => { if (Math.abs(value - wanted) < Math.abs(values[best] - wanted)) best = i; });
  return best;
}

// One position in all charts: what happened elsewhere when this loss was logged?
function point(wanted, source) {
  for (const holder of drawn) {
    const { chart, tip, cross, x, width, box } = holder;
    const rows = chart.series.map((series) => {
      const at = axis(series), i = nearest(at, wanted);
      return { at: at[i], step: series.step[i], value: series.value[i], label: series.label };
    });
    const px = Math.min(width - RIGHT, Math.max(LEFT, x(rows[0].at)));
    cross.setAttribute("x1", px); cross.setAttribute("x2", px); cross.setAttribute("visibility", "visible");
    tip.replaceChildren();
    html("div", "", `step ${rows[0].step}`, tip);
    for (const row of rows) {
      const line = html("div", "", rows.length > 1 ? `${row.label} ` : "", tip);
      html("b", "", format(row.value, chart.unit), line);
      if (row.step !== rows[0].step) line.append(` (step ${row.step})`);
    }
    tip.hidden = false;
    const scale = box.clientWidth / width, left = box.offsetLeft + px * scale;
    // Beside the curve, not on it: below where the curve is high.
    const high = rows[0].value === null || holder.y(rows[0].value) > holder.height * 0.42;
    const under = box.offsetTop + (holder.height - BOTTOM) * scale - tip.offsetHeight - 6;
    tip.style.top = `${high ? box.offsetTop + 4 : under}px`;
    tip.style.left = left + tip.offsetWidth + 20 > box.offsetLeft + box.clientWidth ? `${left - tip.offsetWidth - 10}px` : `${left + 10}px`;
    tip.style.opacity = holder === source ? 1 : 0.82;
  }
}

const charts = document.getElementById("charts");
let group = "";
for (const chart of data.charts) {
  if (chart.group && chart.group !== group) html("h3", "group", group = chart.group, charts);
  const card = html("div", `card chart${chart.wide ? " wide" : ""}`, undefined, charts);
  const head = html("header", "", undefined, card);
  html(chart.group ? "h4" : "h3", "", chart.title, head);
  html("span", "", chart.note, head);
  if (chart.series.length > 1) {
    const legend = html("span", "legend", undefined, head);
    for (const series of chart.series) {
      const entry = html("span", "", undefined, legend);
      html("i", "", undefined, entry).style.background = `var(--${series.color})`;
      entry.append(series.label);
    }
  }
  drawn.push({ chart, box: html("div", "", undefined, card), tip: html("div", "tip", undefined, card) });
}
const redraw = () => drawn.forEach(draw);
redraw();
new ResizeObserver(redraw).observe(charts);

const smooth = document.getElementById("smooth");
smooth.value = state.smooth;
const told = () => { document.getElementById("smooth-value").textContent = state.smooth ? state.smooth.toFixed(2) : "off"; };
smooth.oninput = () => { state.smooth = Number(smooth.value); told(); redraw(); };
told();
function toggle(id, on, off) {
  const button = document.getElementById(id);
  button.onclick = () => {
    const pressed = button.getAttribute("aria-pressed") !== "true";
    button.setAttribute("aria-pressed", pressed);
    (pressed ? on : off)();
  };
}
toggle("log", () => { state.log = true; redraw(); }, () => { state.log = false; redraw(); });
toggle("time", () => { state.axis = "time"; redraw(); }, () => { state.axis = "step"; redraw(); });

const rows = [...document.querySelectorAll("#keys tbody tr")];
const filter = document.getElementById("filter");
let chosen = false;
const sift = () => rows.forEach((row) => {
  const fits = row.textContent.toLowerCase().includes(filter.value.toLowerCase());
  row.hidden = !fits || (chosen && row.dataset.origin === "default");
});
filter.oninput = sift;
const answers = [...document.querySelectorAll("#answers tbody tr")], search = document.getElementById("search");
if (search) search.oninput = () => answers.forEach((row) => {
  row.hidden = !row.textContent.toLowerCase().includes(search.value.toLowerCase());
});
toggle("chosen", () => { chosen = true; sift(); }, () => { chosen = false; sift(); });
root.dataset.drawn = String(drawn.length);
