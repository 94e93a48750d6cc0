// The page: what is shown (`state`), how it changes, and everything that follows from it.

const byId = (id) => document.getElementById(id);
const items = meta.items;
const codes = new Uint8Array(stored.shape[0] * stored.shape[1] * stored.shape[2]);

const state = {
  plane: "axial", // the large one
  at: [0, 0, 0], // the crosshair, in full indices
  zoom: 1,
  centre: null, // middle of the zoomed pictures; null: of the scan
  item: 0,
  layer: 0,
  window: [meta.scan.window.low, meta.scan.window.high],
  threshold: meta.look.threshold,
  opacity: meta.look.opacity,
  heat: true,
  prediction: true,
  truth: true,
  cross: true,
  readFirst: false, // the CAM of a target is hidden until its prediction has been read
};
const read = new Set(); // labels of the targets whose prediction has been read

const item = () => items[state.item];
const layer = () => item().layers[state.layer];
const isHidden = () => state.readFirst && !read.has(item().label);
const masksOf = () => ["truth", "prediction"].filter((kind) => item()[kind] !== null);

// What is unpacked when it is first needed.
const maps = new Map();
const masks = new Map();
const grey = {};
const contours = {};

// Changes what is shown, then draws; says so in the live text a little later.
function show(change) {
  Object.assign(state, change);
  unpack();
  schedule();
}

let planned = false;
function schedule() {
  if (planned) return;
  planned = true;
  requestAnimationFrame(() => {
    planned = false;
    draw();
  });
}

function unpack() {
  for (const [number] of layer().maps) {
    if (maps.has(number)) continue;
    maps.set(number, null);
    readMap(lines("maps")[number], meta.maps[number]).then((map) => {
      maps.set(number, map);
      schedule();
    });
  }
  for (const kind of masksOf()) {
    const number = item()[kind];
    if (masks.has(number)) continue;
    masks.set(number, null);
    readMask(lines("masks")[number]).then((bits) => {
      masks.set(number, bits);
      schedule();
    });
  }
}

// [map, weight] of what is drawn as heat; null: nothing, or not unpacked yet.
function heatNow() {
  const wanted = isHidden() ? [] : layer().maps.map(([number, weight]) => [maps.get(number), weight]);
  return wanted.length && wanted.every(([map]) => map) ? wanted : null;
}

// ---------------------------------------------------------------- building the page

function element(tag, properties = {}, children = []) {
  const { dataset = {}, ...others } = properties;
  const made = Object.assign(document.createElement(tag), others);
  Object.assign(made.dataset, dataset);
  made.append(...children);
  return made;
}

const panels = {};

function buildPlane(plane) {
  const letters = meta.scan.letters[plane];
  const sides = ["left", "right", "top", "bottom"];
  const canvases = ["scan", "overlay"].map((kind) => {
    const canvas = element("canvas", { id: `${plane}-${kind}` });
    canvas.setAttribute("role", "img");
    return canvas;
  });
  const bars = canvases.map(() => element("span", { className: "scale" }));
  const panes = canvases.map((canvas, n) =>
    element("figure", {}, [
      canvas,
      ...sides.map((side, k) =>
        element("span", { className: `letter ${side}`, textContent: letters[k] }),
      ),
      bars[n],
      element("figcaption", { textContent: n ? "scan + CAM" : "scan" }),
    ]),
  );
  const across = PLANES[plane].across;
  const title = element("h2", {}, [
    element("button", {
      type: "button",
      textContent: plane[0].toUpperCase() + plane.slice(1),
      title: `Show the ${plane} plane large`,
      onclick: () => show({ plane }),
    }),
    element("span", { className: "place" }),
  ]);
  const slider = element("input", { type: "range", min: 0, max: full.shape[across] - 1, step: 1 });
  slider.setAttribute("aria-label", `${plane} slice`);
  slider.oninput = () => moveTo(plane, +slider.value);
  const section = element("section", { id: plane, className: "plane" }, [
    title,
    element("div", { className: "pair" }, panes),
    slider,
  ]);
  byId("stage").append(section);
  panels[plane] = { section, canvases, bars, slider, place: title.querySelector(".place") };
  canvases.forEach((canvas) => listenTo(canvas, plane));
}

function fillFacts() {
  const facts = {
    Case: meta.case,
    Model: item().model,
    Target: item().label,
    Layer: layer().name,
    Method: item().method,
    "Sanity check": "not run",
    seg3dcam: meta.version,
    Date: meta.date,
  };
  const pairs = Object.entries(facts).filter(([, value]) => value);
  byId("facts").replaceChildren(...pairs.map(([name, value]) => fact(name, value)));
}

function fact(name, value) {
  return element("div", {}, [
    element("dt", { textContent: name }),
    element("dd", { textContent: value, title: value }),
  ]);
}

function fillChoices() {
  const labels = [...new Set(items.map((one) => one.label))];
  const same = [...items.keys()].filter((n) => items[n].label === item().label);
  const methods = same.map((n) => items[n].method);
  const repeated = new Set(methods).size < methods.length;
  fillSelect("target", labels, labels.indexOf(item().label), (n) => {
    const method = item().method;
    const with_label = [...items.keys()].filter((k) => items[k].label === labels[n]);
    choose(with_label.find((k) => items[k].method === method) ?? with_label[0]);
  });
  fillSelect(
    "method",
    same.map((n) => (repeated ? `${items[n].method} (${items[n].name})` : items[n].method)),
    same.indexOf(state.item),
    (n) => choose(same[n]),
  );
  fillSelect("layer", item().layers.map((one) => one.name), state.layer, (n) => {
    show({ layer: n });
    refill();
  });
}

function fillSelect(id, texts, chosen, onChoice) {
  const select = byId(id);
  byId(`f-${id}`).hidden = texts.length < 2;
  select.replaceChildren(...texts.map((text) => element("option", { textContent: text })));
  select.selectedIndex = chosen;
  select.onchange = () => onChoice(select.selectedIndex);
}

// The same layer, if the other explanation has it.
function choose(number) {
  const wanted = items[number].layers.findIndex((one) => one.name === layer().name);
  show({ item: number, layer: Math.max(wanted, 0) });
  if (isHidden()) jump(middleOfPrediction());
  refill();
}

function refill() {
  fillFacts();
  fillChoices();
  fillNotices();
  fillPeaks();
  fillNumbers();
  for (const kind of ["truth", "prediction"]) byId(`f-${kind}`).hidden = item()[kind] === null;
  byId("hide").hidden = state.readFirst || item().prediction === null;
  byId("reading").hidden = !isHidden();
  noteFirstLook();
  for (const id of ["peaks-section", "profile-section"])
    byId(id).hidden = isHidden() || !layer().maps.length;
}

const trouble = new Set();

function fillNotices() {
  const words = isHidden() ? [] : layer().found.warnings.concat(coarseWarning());
  const all = [...trouble, ...words];
  byId("notices").replaceChildren(
    ...all.map((text) => element("p", { className: "notice", textContent: text })),
  );
}

function warn(text) {
  trouble.add(text);
  fillNotices();
}

function coarseWarning() {
  const error = errorOf(layer());
  if (error < 0.05) return [];
  return `this layer's CAM is too detailed for this file: it is drawn smoother than it is, by up to ${error.toFixed(2)}`;
}

function fillPeaks() {
  const peaks = isHidden() ? [] : layer().peaks;
  byId("peaks").replaceChildren(
    ...peaks.map((peak, n) =>
      element("li", {}, [
        element("button", {
          type: "button",
          textContent: placeText(peak.mm),
          onclick: () => jump(peak.at),
        }),
        element("span", { textContent: peak.value.toFixed(2) }),
      ]),
    ),
  );
}

function fillNumbers() {
  const found = layer().found;
  const digits = (value, unit, count) => (value === null ? null : value.toPrecision(count) + unit);
  const ml = (value) => (value === null ? null : `${+value.toPrecision(3)} ml`);
  const percent = (value) => (value === null ? null : `${(100 * value).toFixed(0)} %`);
  const mm = (value) => (value === null ? null : value === 0 ? "inside" : `${value.toFixed(1)} mm`);
  const masks = {
    "Predicted volume": ml(found.predicted_ml),
    "True volume": ml(found.truth_ml),
    Dice: digits(found.dice, "", 2),
  };
  const cam = {
    "CAM inside the prediction": percent(found.cam_inside_prediction),
    "CAM inside the truth": percent(found.cam_inside_truth),
    "CAM outside of both": percent(found.cam_outside),
    "Peak to prediction": mm(found.peak_to_prediction_mm),
    "Peak to truth": mm(found.peak_to_truth_mm),
    "CAM resolution": found.resolution_mm.map((x) => x.toFixed(1)).join(" × ") + " mm",
    "One voxel of the layer": ml(found.cell_ml),
    "Score explained": item().score,
  };
  const shown = Object.entries(isHidden() ? masks : { ...masks, ...cam });
  byId("numbers").replaceChildren(
    ...shown.filter(([, value]) => value !== null).map(([name, value]) => fact(name, value)),
  );
}

// ---------------------------------------------------------------- drawing

function draw() {
  for (const plane of Object.keys(PLANES)) drawPlane(plane);
  drawSidebar();
  describe();
}

function drawPlane(plane) {
  const { section, canvases, bars, slider, place } = panels[plane];
  const axis = PLANES[plane].across;
  section.classList.toggle("large", plane === state.plane);
  fitToBox(canvases);
  const heat = state.heat ? heatNow() : null;
  canvases.forEach((canvas, n) => {
    const context = canvas.getContext("2d");
    const on = placeOn(canvas, plane, state.zoom, state.centre);
    drawGrey(context, on, greyOf(plane));
    if (n === 1 && heat) drawHeat(context, on, heat, plane, state.at, state.threshold, state.opacity);
    if (n === 1)
      for (const kind of masksOf().filter((kind) => state[kind]))
        drawOutlines(context, on, contourOf(kind, plane), LINES[kind]);
    if (state.cross) drawCrosshair(context, on, plane, state.at);
    canvas.setAttribute("aria-label", `${plane} ${sliceText(plane, state.at)}, ${n ? overlayText() : "scan"}`);
    drawScale(bars[n], on);
  });
  slider.value = state.at[axis];
  slider.setAttribute("aria-valuetext", sliceText(plane, state.at));
  place.textContent = sliceText(plane, state.at);
}

function overlayText() {
  if (isHidden()) return "scan with the prediction, CAM hidden";
  if (!layer().maps.length) return `scan, ${layer().notice}`;
  return state.heat ? `scan with CAM from ${state.threshold.toFixed(2)}` : "scan, CAM off";
}

function fitToBox(canvases) {
  for (const canvas of canvases) {
    const width = Math.max(1, Math.round(canvas.clientWidth * devicePixelRatio));
    const height = Math.max(1, Math.round(canvas.clientHeight * devicePixelRatio));
    if (canvas.width !== width || canvas.height !== height) Object.assign(canvas, { width, height });
  }
}

// Slices and outlines are cut again only when they change.
function greyOf(plane) {
  const key = [state.at[PLANES[plane].across], ...state.window, loaded].join();
  if (grey[plane]?.key !== key)
    grey[plane] = { key, picture: greyPicture(codes, plane, state.at, greyTable(...state.window)) };
  return grey[plane].picture;
}

function contourOf(kind, plane) {
  const { across, columns, rows } = PLANES[plane];
  const bits = masks.get(item()[kind]);
  if (!bits) return [];
  const key = [item()[kind], state.at[across]].join();
  const kept = (contours[kind] ??= {});
  if (kept[plane]?.key !== key) {
    const slice = cutBits(bits, full.shape, plane, state.at[across]);
    kept[plane] = { key, found: outlines(slice, full.shape[columns], full.shape[rows]) };
  }
  return kept[plane].found;
}

// A bar of 1, 2 or 5 times a power of ten that is at most a third of the picture.
function drawScale(bar, on) {
  const css = on.mm / devicePixelRatio;
  const most = bar.parentElement.clientWidth / 3 / css;
  const power = 10 ** Math.floor(Math.log10(most));
  const mm = power * [5, 2, 1].find((n) => n * power <= most);
  bar.style.width = `${mm * css}px`;
  bar.textContent = mm >= 10 ? `${mm / 10} cm` : `${mm} mm`;
}

function drawSidebar() {
  const [low, high] = state.window;
  const texts = {
    threshold: state.threshold.toFixed(2),
    opacity: state.opacity.toFixed(2),
    width: round(high - low),
    level: round((high + low) / 2),
  };
  for (const [id, text] of Object.entries(texts)) byId(`o-${id}`).textContent = text;
  Object.assign(byId("threshold"), { value: state.threshold });
  Object.assign(byId("opacity"), { value: state.opacity });
  Object.assign(byId("width"), { value: high - low });
  Object.assign(byId("level"), { value: (high + low) / 2 });
  for (const id of ["heat", "prediction", "truth", "cross"]) byId(id).checked = state[id];
  drawColourBar(byId("bar"), state.threshold);
  if (!byId("profile-section").hidden) drawProfileNow();
}

function drawProfileNow() {
  const axis = PLANES[state.plane].across;
  const canvas = byId("profile");
  fitToBox([canvas]);
  const { max, sum } = layer().profile[axis];
  const series = [
    { values: sum, largest: Math.max(...sum), colour: "sum", dash: [4, 3] },
    { values: max, largest: 1, colour: "max" },
  ];
  const number = item().prediction;
  byId("profile-volume").hidden = number === null;
  if (number !== null) {
    const { voxels } = meta.masks[number].profile[axis];
    series.unshift({ values: voxels, largest: Math.max(...voxels), colour: "volume", fill: true });
  }
  const style = getComputedStyle(canvas);
  const colours = Object.fromEntries(
    ["max", "sum", "volume", "now"].map((name) => [name, style.getPropertyValue(`--${name}`)]),
  );
  drawProfile(canvas, series, state.at[axis], colours);
  const [from, to] = PLANES[state.plane].ends;
  byId("profile-low").textContent = from;
  byId("profile-high").textContent = to;
  byId("h-profile").textContent = `Profile along the ${state.plane} slices`;
  const best = state.at.slice();
  best[axis] = max.indexOf(Math.max(...max));
  canvas.setAttribute(
    "aria-label",
    `CAM maximum, CAM sum and predicted volume of every ${state.plane} slice; ` +
      `the CAM is highest in ${sliceText(state.plane, best)}`,
  );
}

function round(value) {
  const spread = meta.scan.window.high - meta.scan.window.low;
  return spread > 50 ? value.toFixed(0) : value.toPrecision(3);
}

function sumAt(heat, at) {
  return heat.reduce((sum, [map, weight]) => sum + weight * valueAt(map, at), 0);
}

// Under the pictures at once; for a screen reader when the changes have stopped.
let spoken;
function describe() {
  const at = state.at;
  const nearby = at.map(nearest);
  const code = codes[nearby[0] + stored.shape[0] * (nearby[1] + stored.shape[1] * nearby[2])];
  const heat = heatNow();
  const inside = masksOf().filter((kind) => masks.get(item()[kind]) && bitAt(masks.get(item()[kind]), at));
  const words = [
    placeText(toMm(at)),
    `voxel ${ownVoxel(at).join(", ")}`,
    `scan ${round(meta.scan.values[code])}`,
    heat ? `CAM ${sumAt(heat, at).toFixed(2)}` : isHidden() ? "CAM hidden" : "no CAM",
    ...inside.map((kind) => `in the ${kind}`),
  ].join(" · ");
  byId("readout").textContent = words;
  clearTimeout(spoken);
  spoken = setTimeout(() => {
    byId("live").textContent = `${state.plane} ${sliceText(state.plane, at)} · ${words}`;
  }, 400);
}

// ---------------------------------------------------------------- what the reader does

function moveTo(plane, index) {
  const at = state.at.slice();
  const axis = PLANES[plane].across;
  at[axis] = Math.min(Math.max(index, 0), full.shape[axis] - 1);
  show({ at });
}

const moveBy = (plane, slices) => moveTo(plane, state.at[PLANES[plane].across] + slices);

function jump(at) {
  show({ at: at.slice(), centre: state.centre && at.slice() });
}

let lastPeak = -1;
function nextPeak() {
  const peaks = layer().peaks;
  if (isHidden() || !peaks.length) return;
  const isHere = (peak) => peak.at.every((index, axis) => index === state.at[axis]);
  lastPeak = peaks[lastPeak] && isHere(peaks[lastPeak]) ? (lastPeak + 1) % peaks.length : 0;
  jump(peaks[lastPeak].at);
}

// Where the prediction is largest along each axis; without one, the middle.
function middleOfPrediction() {
  const number = item().prediction;
  return full.shape.map((size, axis) => {
    const voxels = number === null ? [0] : meta.masks[number].profile[axis].voxels;
    const most = Math.max(...voxels);
    return most > 0 ? voxels.indexOf(most) : Math.floor((size - 1) / 2);
  });
}

function zoomBy(factor) {
  const zoom = Math.min(Math.max(state.zoom * factor, 1), 12);
  show({ zoom, centre: zoom === 1 ? null : (state.centre ?? state.at.slice()) });
}

function setWindow(low, high) {
  const least = (meta.scan.window.high - meta.scan.window.low) / 1000;
  const middle = (low + high) / 2;
  const half = Math.max(high - low, least) / 2;
  show({ window: [middle - half, middle + half] });
}

const KEYS = {
  ArrowUp: () => moveBy(state.plane, 1),
  ArrowRight: () => moveBy(state.plane, 1),
  ArrowDown: () => moveBy(state.plane, -1),
  ArrowLeft: () => moveBy(state.plane, -1),
  PageUp: () => moveBy(state.plane, 10),
  PageDown: () => moveBy(state.plane, -10),
  Home: () => moveTo(state.plane, 0),
  End: () => moveTo(state.plane, Infinity),
  " ": () => show({ heat: !state.heat }),
  1: () => show({ plane: "axial" }),
  2: () => show({ plane: "coronal" }),
  3: () => show({ plane: "sagittal" }),
  p: nextPeak,
  c: () => {
    const on = !masksOf().some((kind) => state[kind]);
    show({ truth: on, prediction: on });
  },
  x: () => show({ cross: !state.cross }),
  "+": () => zoomBy(1.25),
  "=": () => zoomBy(1.25),
  "-": () => zoomBy(1 / 1.25),
  0: () => show({ zoom: 1, centre: null }),
  "?": () => byId("help").showModal(),
};

// Keys that a focused control needs for itself.
function isTaken(key, target) {
  if (target.matches("textarea, select, input:not([type]), dialog, dialog *")) return true;
  if (target.matches("[type=range], [type=radio]")) return key.length > 1;
  return target.matches("button, [type=checkbox]") && key === " ";
}

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  if (!(key in KEYS) || isTaken(key, event.target)) return;
  event.preventDefault();
  KEYS[key]();
}

function listenTo(canvas, plane) {
  const { columns, rows, upwards } = PLANES[plane];
  let dragged = null;

  const point = (event) => {
    const box = canvas.getBoundingClientRect();
    const on = placeOn(canvas, plane, state.zoom, state.centre);
    const c = Math.floor(((event.clientX - box.left) * devicePixelRatio - on.left) / on.column);
    const r = Math.floor(((event.clientY - box.top) * devicePixelRatio - on.top) / on.row);
    const at = state.at.slice();
    at[columns] = Math.min(Math.max(c, 0), on.width - 1);
    const row = Math.min(Math.max(r, 0), on.height - 1);
    at[rows] = upwards ? on.height - 1 - row : row;
    show({ at });
  };
  canvas.onpointerdown = (event) => {
    canvas.setPointerCapture(event.pointerId);
    dragged = event.button === 2 ? "window" : "cross";
    if (dragged === "cross") point(event);
  };
  canvas.onpointermove = (event) => {
    if (dragged === "cross") point(event);
    if (dragged === "window") {
      const unit = (meta.scan.window.high - meta.scan.window.low) / 400;
      const [low, high] = state.window;
      const [wider, higher] = [event.movementX * unit, -event.movementY * unit];
      setWindow(low - wider / 2 + higher, high + wider / 2 + higher);
    }
  };
  canvas.onpointerup = canvas.onpointercancel = () => (dragged = null);
  canvas.oncontextmenu = (event) => event.preventDefault();
  canvas.addEventListener(
    "wheel",
    (event) => {
      event.preventDefault();
      if (event.ctrlKey) zoomBy(event.deltaY < 0 ? 1.25 : 1 / 1.25);
      else moveBy(plane, event.deltaY < 0 ? 1 : -1);
    },
    { passive: false },
  );
}

function listen() {
  document.addEventListener("keydown", onKey);
  // After a click the keys belong to the pictures again.
  document.addEventListener("pointerup", (event) => {
    const used = event.target.closest("button, label, [type=range], [type=checkbox]");
    if (used && !used.closest("dialog, fieldset, #ask")) byId("stage").focus({ preventScroll: true });
  });
  for (const id of ["heat", "prediction", "truth", "cross"])
    byId(id).onchange = (event) => show({ [id]: event.target.checked });
  for (const id of ["threshold", "opacity"])
    byId(id).oninput = (event) => show({ [id]: +event.target.value });
  listenToWindow();
  byId("profile").onpointerdown = (event) => {
    const box = event.target.getBoundingClientRect();
    const count = full.shape[PLANES[state.plane].across];
    moveTo(state.plane, Math.floor(((event.clientX - box.left) / box.width) * count));
  };
  byId("ask").onclick = () => byId("help").showModal();
  byId("close").onclick = () => byId("help").close();
  byId("theme").onclick = () => {
    const dark = matchMedia("(prefers-color-scheme: dark)").matches;
    const now = document.documentElement.dataset.theme ?? (dark ? "dark" : "light");
    document.documentElement.dataset.theme = now === "dark" ? "light" : "dark";
    schedule();
  };
  matchMedia("(prefers-color-scheme: dark)").onchange = schedule;
  new ResizeObserver(schedule).observe(byId("stage"));
}

function listenToWindow() {
  const values = meta.scan.values;
  const [lowest, highest] = [values[0], values[values.length - 1]];
  const step = (highest - lowest) / 4000;
  Object.assign(byId("width"), { min: step, max: highest - lowest, step: "any" });
  Object.assign(byId("level"), { min: lowest, max: highest, step: "any" });
  const onInput = () => {
    const [width, level] = [+byId("width").value, +byId("level").value];
    setWindow(level - width / 2, level + width / 2);
  };
  byId("width").oninput = byId("level").oninput = onInput;
  const { low, high } = meta.scan.window;
  const presets = Object.entries(meta.scan.presets).map(([name, [width, level]]) => [
    name,
    [level - width / 2, level + width / 2],
  ]);
  for (const [name, ends] of [["start", [low, high]], ...presets, ["full range", [lowest, highest]]])
    byId("presets").append(
      element("button", { type: "button", textContent: name, onclick: () => setWindow(...ends) }),
    );
}

// ---------------------------------------------------------------- start

let loaded = 0; // slices

async function start() {
  document.title = ["CAM review", meta.case].filter(Boolean).join(" · ");
  byId("stored").textContent =
    `Grey values: ${stored.text}. Masks: exact. ` + mapText() +
    (meta.scan.channels > 1 ? ` Channel 1 of ${meta.scan.channels} is shown.` : "") +
    (meta.scan.oblique ? ` Oblique scan: ${meta.scan.oblique}° off the axes, letters are the nearest.` : "");
  Object.keys(PLANES).forEach(buildPlane);
  byId("stage").append(element("p", { id: "readout" }), element("p", { id: "progress" }));
  listen();
  listenToFeedback();
  if (location.hash === "#read-first" && item().prediction !== null) hideCam();
  else jump(layer().peaks[0]?.at ?? middleOfPrediction());
  refill();
  if (!readsPixelsExactly())
    warn(
      "This browser alters pictures that a page reads, to prevent fingerprinting: grey values are " +
        "not reliable. Allow canvas access for this page, or use another browser.",
    );
  await readScan(state.at[2], codes, (done, count) => {
    loaded = done;
    byId("progress").textContent = done < count ? `reading slices: ${done}/${count}` : "";
    if (done === 1 || done === count || done % 24 === 0) schedule();
  });
  document.body.dataset.ready = "yes";
}

// How far the CAM in this file is off, at most, where it was measured.
function errorOf({ maps: used }) {
  const sum = used.reduce((all, [number, weight]) => all + weight * meta.maps[number].error, 0);
  return Math.max(sum, 0.005);
}

function mapText() {
  const errors = items.flatMap((one) => one.layers.map(errorOf));
  return `CAM: within ${Math.max(...errors).toFixed(3)} of its values.`;
}

const failed = (error) =>
  warn(`This page does not work in this browser: ${error}. Use a browser of 2023 or later.`);
