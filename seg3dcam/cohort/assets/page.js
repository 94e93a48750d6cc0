"use strict";

const data = JSON.parse(document.getElementById("data").textContent);
const column = Object.fromEntries(data.columns.map((name, index) => [name, index]));

/** What a column is called, and how its values are written; columns that are not here are hidden. */
const shown = [
  ["unusual", "unusual", (v) => v.toFixed(1)],
  ["thumb", "peak slice", null],
  ["case", "case", null],
  ["class", "class", null],
  ["method", "method", null],
  ["status", "status", null],
  ["verdict", "verdict", null],
  ["why", "why look", null],
  ["confidence", "confidence", (v) => v.toFixed(2)],
  ["predicted_ml", "ml", (v) => v.toPrecision(3)],
  ["dice", "Dice", (v) => v.toFixed(2)],
  ["cam_outside", "outside", percent],
  ["cam_outside_body", "outside body", percent],
  ["peak_to_prediction_mm", "peak, mm away", (v) => v.toFixed(0)],
];

/** Columns whose distribution is drawn. */
const plotted = ["unusual", "confidence", "dice", "predicted_ml", "cam_outside", "cam_outside_body", "peak_to_prediction_mm"];

const filters = ["class", "method", "status", "verdict"];
const used = shown.filter(([name]) => name === "case" || data.rows.some((row) => row[column[name]] !== null));

let sorted = { name: "unusual", down: true };
let visible = [];
let drawn = 0;

function percent(value) {
  return `${(100 * value).toFixed(0)} %`;
}

/** Make an element with a text; texts are never read as HTML. */
function element(kind, text, className) {
  const made = document.createElement(kind);
  if (text !== undefined) made.textContent = text;
  if (className) made.className = className;
  return made;
}

/** The address of a file in a case's folder. */
function address(row, file) {
  return [row[column.case], ...file.split("/")].map(encodeURIComponent).join("/");
}

function drawRow(row) {
  const line = element("tr");
  for (const [name, , write] of used) {
    const value = row[column[name]];
    const cell = element("td", undefined, write ? "number" : name === "why" ? "words" : "");
    if (value === null) {
      cell.textContent = name === "unusual" ? "–" : "";
    } else if (name === "thumb") {
      const picture = element("img");
      picture.loading = "lazy";
      picture.width = picture.height = 96;
      picture.alt = `${row[column.case]}, ${row[column.class]}: slice through the peak`;
      picture.src = address(row, value);
      cell.append(picture);
    } else if (name === "case" && row[column.report] !== null) {
      const link = element("a", value);
      link.href = address(row, row[column.report]);
      cell.append(link);
    } else {
      cell.textContent = write ? write(value) : value;
    }
    if (name === "status" && value !== "ok") cell.classList.add("bad");
    line.append(cell);
  }
  return line;
}

/** Draw some more rows; all at once would take seconds for thousands of cases. */
function drawMore() {
  const part = document.createDocumentFragment();
  for (const row of visible.slice(drawn, drawn + 60)) part.append(drawRow(row));
  drawn = Math.min(drawn + 60, visible.length);
  document.getElementById("rows").append(part);
}

function compare(one, other) {
  const a = one[column[sorted.name]];
  const b = other[column[sorted.name]];
  if (a === b) return 0;
  if (a === null) return 1; // what is not known comes last, in either direction
  if (b === null) return -1;
  const order = typeof a === "number" ? a - b : String(a).localeCompare(String(b), "en", { numeric: true });
  return sorted.down ? -order : order;
}

function update() {
  const words = document.getElementById("search").value.toLowerCase().split(/\s+/).filter(Boolean);
  const wanted = filters.map((name) => [column[name], document.getElementById(name).value]).filter(([, value]) => value);
  visible = data.rows.filter((row) => {
    const text = [row[column.case], row[column.class], row[column.why], row[column.error]].join(" ").toLowerCase();
    return wanted.every(([index, value]) => String(row[index]) === value) && words.every((word) => text.includes(word));
  });
  visible.sort(compare);
  document.getElementById("count").textContent = `${visible.length} of ${data.rows.length} rows`;
  document.getElementById("rows").replaceChildren();
  drawn = 0;
  drawMore();
  for (const cell of document.getElementById("head").children) {
    const own = cell.dataset.name === sorted.name;
    cell.setAttribute("aria-sort", own ? (sorted.down ? "descending" : "ascending") : "none");
    cell.querySelector("span").textContent = own ? (sorted.down ? " ▼" : " ▲") : "";
  }
  drawPlots();
}

function drawHead() {
  for (const [name, words, write] of used) {
    const cell = element("th", undefined, write ? "number" : "");
    cell.dataset.name = name;
    const button = element("button", words);
    button.type = "button";
    button.append(element("span"));
    button.addEventListener("click", () => {
      sorted = { name, down: sorted.name === name ? !sorted.down : typeof firstValue(name) === "number" };
      update();
    });
    cell.append(button);
    document.getElementById("head").append(cell);
  }
}

function firstValue(name) {
  const row = data.rows.find((one) => one[column[name]] !== null);
  return row ? row[column[name]] : null;
}

function drawFilters() {
  for (const name of filters) {
    const select = document.getElementById(name);
    const values = [...new Set(data.rows.map((row) => row[column[name]]).filter((value) => value !== null))].sort();
    select.append(new Option("all", ""), ...values.map((value) => new Option(value, value)));
    select.parentElement.hidden = values.length < 2;
    select.addEventListener("change", update);
  }
  document.getElementById("search").addEventListener("input", update);
  document.getElementById("filters").addEventListener("submit", (event) => event.preventDefault());
}

/** Draw how the figures of the rows that are shown are distributed, in 24 bars from least to most. */
function drawPlots() {
  const place = document.getElementById("plots");
  place.replaceChildren();
  for (const name of plotted) {
    const about = used.find(([one]) => one === name);
    const values = visible.map((row) => row[column[name]]).filter((value) => value !== null);
    if (!about || values.length < 2) continue;
    const [, words, write] = about;
    let least = values[0];
    let most = values[0];
    for (const value of values) {
      least = Math.min(least, value);
      most = Math.max(most, value);
    }
    const counts = new Array(24).fill(0);
    for (const value of values) counts[Math.min(23, Math.floor((24 * (value - least)) / (most - least || 1)))] += 1;
    const highest = Math.max(...counts);
    const figure = element("figure");
    const svg = vector("svg", { viewBox: "0 0 240 72", preserveAspectRatio: "none", role: "img" });
    const median = values.sort((a, b) => a - b)[values.length >> 1];
    svg.setAttribute("aria-label", `${words}: from ${write(least)} to ${write(most)}, median ${write(median)}`);
    counts.forEach((count, index) => {
      const height = count ? Math.max(2, (72 * count) / highest) : 0;
      svg.append(vector("rect", { x: 10 * index + 0.5, y: 72 - height, width: 9, height }));
    });
    const caption = element("figcaption");
    caption.append(element("span", words), element("span", `median ${write(median)}`));
    const ends = element("p", undefined, "ends");
    ends.append(element("span", write(least)), element("span", write(most)));
    figure.append(caption, svg, ends);
    place.append(figure);
  }
}

/** Draw risk by coverage for every class; the dashed line is the mean risk, which is chance. */
function drawCurves() {
  document.getElementById("confidence").hidden = !data.curves.length;
  for (const curve of data.curves) {
    const figure = element("figure");
    const svg = vector("svg", { viewBox: "0 0 100 100", preserveAspectRatio: "none", role: "img" });
    svg.setAttribute("aria-label", `${curve.label}: ${curve.words}`);
    const top = Math.max(...curve.risk, 1e-9);
    const height = (risk) => 100 - (96 * risk) / top;
    const points = curve.coverage.map((part, index) => `${100 * part},${height(curve.risk[index])}`);
    const chance = height(curve.risk[curve.risk.length - 1]);
    svg.append(vector("line", { x1: 0, x2: 100, y1: chance, y2: chance }), vector("polyline", { points: points.join(" ") }));
    const caption = element("figcaption");
    caption.append(element("span", curve.label), element("span", `highest ${top.toFixed(2)}`));
    const ends = element("p", undefined, "ends");
    ends.append(element("span", "few"), element("span", "all cases"));
    figure.append(caption, svg, ends, element("p", curve.words));
    document.getElementById("curves").append(figure);
  }
}

/** Draw frequency by probability for every class; the dashed line is where probabilities are true. */
function drawReliability() {
  document.getElementById("reliable").hidden = !data.reliability.length;
  for (const one of data.reliability) {
    const figure = element("figure");
    const svg = vector("svg", { viewBox: "0 0 100 100", preserveAspectRatio: "none", role: "img" });
    svg.setAttribute("aria-label", `${one.label}: ${one.words}`);
    const points = one.probability.map((value, index) => `${100 * value},${100 - 100 * one.frequency[index]}`);
    svg.append(vector("line", { x1: 0, x2: 100, y1: 100, y2: 0 }), vector("polyline", { points: points.join(" ") }));
    const ends = element("p", undefined, "ends");
    ends.append(element("span", "probability 0"), element("span", "1"));
    const caption = element("figcaption");
    caption.append(element("span", one.label), element("span", "frequency 0 to 1"));
    figure.append(caption, svg, ends, element("p", one.words));
    document.getElementById("reliability").append(figure);
  }
}

/** Make an element of a drawing. */
function vector(kind, settings) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", kind);
  for (const [name, value] of Object.entries(settings)) made.setAttribute(name, value);
  return made;
}

document.getElementById("facts").textContent = data.facts;
drawHead();
drawFilters();
drawCurves();
drawReliability();
update();
new IntersectionObserver(
  (seen) => {
    if (seen.some((one) => one.isIntersecting) && drawn < visible.length) drawMore();
  },
  { rootMargin: "1200px" },
).observe(document.getElementById("more"));
document.body.dataset.ready = "yes";
