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
    keep(maps, number, readMap(lines("maps")[number], meta.maps[number]));
  }
  for (const kind of masksOf()) {
    const number = item()[kind];
    if (masks.has(number)) continue;
    masks.set(number, null);
    keep(masks, number, readMask(lines("masks")[number]));
  }
}

function keep(unpacked, number, reading) {
  const done = (value) => {
    unpacked.set(number, value);
    schedule();
  };
  reading.then(done).catch(failed);
}

// [map, weight] of what is drawn as heat; null: nothing, or not unpacked yet.
function heatNow() {
  const wanted = isHidden() ? [] : layer().maps.map(([number, weight]) => [maps.get(number), weight]);
  return wanted.length && wanted.every(([map]) => map) ? wanted : null;
}

// ---------------------------------------------------------------- drawing

function draw() {
  // All places first: a plane that grows takes room from the others.
  for (const plane of Object.keys(PLANES))
    panels[plane].section.classList.toggle("large", plane === state.plane);
  for (const plane of Object.keys(PLANES)) drawPlane(plane);
  drawCloseup();
  drawSidebar();
  describe();
}

// The large plane around the crosshair, as near as what is seen there is large.
function drawCloseup() {
  const canvas = byId("closeup");
  fitToBox([canvas]);
  const plane = state.plane;
  const mm = (!isHidden() && layer().closeup) || meta.scan.closeup;
  const whole = placeOn(canvas, plane, 1, null);
  const nearer = Math.min(canvas.width, canvas.height) / mm / whole.mm;
  const on = placeOn(canvas, plane, nearer, state.at);
  const context = canvas.getContext("2d");
  drawLayers(context, on, plane, true);
  canvas.setAttribute("aria-label", `close-up of the crosshair, ${plane}, ${overlayText()}`);
  drawScale(byId("closeup-scale"), on);
  document.querySelectorAll("#closeup-figure .letter").forEach((letter, n) => {
    letter.textContent = meta.scan.letters[plane][n];
  });
}

// Scan, heat and outlines of a plane; without the overlay the scan alone.
function drawLayers(context, on, plane, overlay) {
  drawGrey(context, on, greyOf(plane));
  if (!overlay) return;
  const heat = state.heat ? heatNow() : null;
  if (heat) drawHeat(context, on, heat, plane, state.at, state.threshold, state.opacity);
  for (const kind of masksOf().filter((kind) => state[kind]))
    drawOutlines(context, on, contourOf(kind, plane), LINES[kind]);
}

function drawPlane(plane) {
  const { canvases, bars, slider, place } = panels[plane];
  const axis = PLANES[plane].across;
  fitToBox(canvases);
  canvases.forEach((canvas, n) => {
    const context = canvas.getContext("2d");
    const on = placeOn(canvas, plane, state.zoom, state.centre);
    drawLayers(context, on, plane, n === 1);
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
  return state.heat ? `scan with CAM from ${thresholdText()}` : "scan, CAM off";
}

const thresholdText = () => `${signed ? "±" : ""}${state.threshold.toFixed(2)}`;

// "0.40"; of a signed page also for what it speaks: "-0.83 against".
function camText(value) {
  const text = value.toFixed(2);
  if (!signed) return text;
  return +text === 0 ? "0.00" : `${text} ${value > 0 ? "for" : "against"}`;
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
    const slice = cut((n) => bitOf(bits, n), full.shape, plane, state.at[across]);
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
    threshold: thresholdText(),
    opacity: state.opacity.toFixed(2),
    width: round(high - low),
    level: round((high + low) / 2),
  };
  for (const [id, text] of Object.entries(texts)) {
    byId(`o-${id}`).textContent = text;
    byId(id).setAttribute("aria-valuetext", text);
  }
  Object.assign(byId("threshold"), { value: state.threshold });
  Object.assign(byId("opacity"), { value: state.opacity });
  Object.assign(byId("width"), { value: high - low });
  Object.assign(byId("level"), { value: (high + low) / 2 });
  for (const id of ["heat", "prediction", "truth", "cross"]) byId(id).checked = state[id];
  byId("heat").disabled = isHidden();
  drawColourBar(byId("bar"), state.threshold);
  if (!byId("profile-section").hidden) drawProfileNow();
}

function drawProfileNow() {
  const axis = PLANES[state.plane].across;
  const canvas = byId("profile");
  fitToBox([canvas]);
  const { max, sum, min } = layer().profile[axis];
  const above = (values) => values.map((value) => Math.max(value, 0));
  const against = above((min ?? max).map((value) => -value));
  const series = [
    { values: sum, largest: Math.max(...sum), colour: "sum", dash: [4, 3] },
    { values: above(max), largest: 1, colour: "max" },
  ];
  if (signed) series.push({ values: against, largest: 1, colour: "min" });
  const strongest = max.map((value, n) => Math.max(value, against[n]));
  const number = item().prediction;
  byId("profile-volume").hidden = number === null;
  if (number !== null) {
    const { voxels } = meta.masks[number].profile[axis];
    series.unshift({ values: voxels, largest: Math.max(...voxels), colour: "volume", fill: true });
  }
  const style = getComputedStyle(canvas);
  const colours = Object.fromEntries(
    ["max", "min", "sum", "volume", "now"].map((name) => [name, style.getPropertyValue(`--${name}`)]),
  );
  drawProfile(canvas, series, state.at[axis], colours);
  const [from, to] = PLANES[state.plane].ends;
  byId("profile-low").textContent = from;
  byId("profile-high").textContent = to;
  byId("h-profile").textContent = `Profile along the ${state.plane} slices`;
  const best = state.at.slice();
  best[axis] = strongest.indexOf(Math.max(...strongest));
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
  const without = isHidden() ? "CAM hidden" : layer().maps.length ? "CAM not read yet" : "no CAM";
  const words = [
    placeText(toMm(at)),
    `voxel ${ownVoxel(at).join(", ")}`,
    `scan ${stored.mime === "image/png" ? "" : "≈ "}${round(meta.scan.values[code])}`,
    heat ? `CAM ${camText(sumAt(heat, at))}` : without,
    ...inside.map((kind) => `in the ${kind}`),
  ].join(" · ");
  byId("readout").textContent = words;
  clearTimeout(spoken);
  spoken = setTimeout(() => {
    byId("live").textContent = `${state.plane} ${sliceText(state.plane, at)} · ${words}`;
  }, 400);
}
