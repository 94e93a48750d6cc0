// What the reader does with keys, mouse and controls, and the start of it all.

function moveTo(plane, index) {
  const at = state.at.slice();
  const axis = PLANES[plane].across;
  at[axis] = Math.min(Math.max(index, 0), full.shape[axis] - 1);
  show({ at, centre: state.centre?.map((index, n) => (n === axis ? at[n] : index)) });
}

const moveBy = (plane, slices) => moveTo(plane, state.at[PLANES[plane].across] + slices);

function jump(at) {
  show({ at: at.slice(), centre: state.centre && at.slice() });
}

function nextPeak() {
  const peaks = layer().peaks;
  if (isHidden()) return remind();
  if (!peaks.length) return;
  const here = peaks.findIndex(({ at }) => at.every((index, axis) => index === state.at[axis]));
  jump(peaks[(here + 1) % peaks.length].at); // the first one, if the crosshair is on none
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

const MOST_ZOOM = 12;
const asZoom = (zoom) => Math.min(Math.max(zoom, 1), MOST_ZOOM);

function zoomBy(factor) {
  const zoom = asZoom(state.zoom * factor);
  show({ zoom, centre: zoom === 1 ? null : state.at.slice() });
}

const wholePicture = () => show({ zoom: 1, centre: null });

// While the CAM is hidden its keys change nothing: they say what to do instead.
function remind() {
  const box = byId("reading");
  box.scrollIntoView({ block: "nearest" });
  box.classList.remove("asked");
  requestAnimationFrame(() => box.classList.add("asked"));
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
  " ": () => (isHidden() ? remind() : show({ heat: !state.heat })),
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
  0: wholePicture,
  "?": () => byId("help").showModal(),
};

// Keys that a focused control needs for itself.
function isTaken(key, target) {
  if (byId("help").open || target.matches("textarea, select, input:not([type])")) return true;
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

const PIXELS_PER_SLICE = 40; // of rolling

function listenTo(canvas, plane) {
  const { columns, rows, upwards } = PLANES[plane];
  let dragged = null;
  let rolled = 0; // slices, upwards

  // Canvas pixels of a pointer, and the column and row under it.
  const under = ({ clientX, clientY }) => {
    const box = canvas.getBoundingClientRect();
    const on = placeOn(canvas, plane, state.zoom, state.centre);
    const x = (clientX - box.left) * devicePixelRatio;
    const y = (clientY - box.top) * devicePixelRatio;
    return { on, x, y, column: (x - on.left) / on.column, row: (y - on.top) / on.row };
  };
  const point = (event) => {
    const { on, column, row: from } = under(event);
    const [c, r] = [Math.floor(column), Math.floor(from)];
    const at = state.at.slice();
    at[columns] = Math.min(Math.max(c, 0), on.width - 1);
    const row = Math.min(Math.max(r, 0), on.height - 1);
    at[rows] = upwards ? on.height - 1 - row : row;
    show({ at });
  };
  // Two fingers: what was between them stays between them, and grows as they part.
  const fingers = new Map();
  let pinch = null;
  const between = () => {
    const [one, two] = [...fingers.values()];
    return {
      clientX: (one.clientX + two.clientX) / 2,
      clientY: (one.clientY + two.clientY) / 2,
      apart: Math.max(Math.hypot(one.clientX - two.clientX, one.clientY - two.clientY), 1),
    };
  };
  const beginPinch = () => {
    const { apart, ...middle } = between();
    pinch = { apart, zoom: state.zoom, ...under(middle) };
  };
  const movePinch = () => {
    const { apart, ...middle } = between();
    const zoom = asZoom((pinch.zoom * apart) / pinch.apart);
    const { x, y } = under(middle);
    const grown = zoom / pinch.zoom;
    const centre = state.at.slice();
    centre[columns] = pinch.column + (canvas.width / 2 - x) / (pinch.on.column * grown) - 0.5;
    const row = pinch.row + (canvas.height / 2 - y) / (pinch.on.row * grown) - 0.5;
    centre[rows] = upwards ? pinch.on.height - 1 - row : row;
    show({ zoom, centre: zoom === 1 ? null : centre });
  };

  canvas.onpointerdown = (event) => {
    if (event.pointerType === "touch") {
      fingers.set(event.pointerId, event);
      if (fingers.size === 2) beginPinch();
      return; // one finger may be about to scroll the page
    }
    canvas.setPointerCapture(event.pointerId);
    dragged = event.button === 2 ? "window" : "cross";
    if (dragged === "cross") point(event);
  };
  canvas.onpointermove = (event) => {
    if (fingers.has(event.pointerId)) {
      fingers.set(event.pointerId, event);
      if (fingers.size === 2 && pinch) movePinch();
      else if (!pinch) point(event);
      return;
    }
    if (dragged === "cross") point(event);
    if (dragged === "window") {
      const unit = (meta.scan.window.high - meta.scan.window.low) / 400;
      const [low, high] = state.window;
      const [wider, higher] = [event.movementX * unit, -event.movementY * unit];
      setWindow(low - wider / 2 + higher, high + wider / 2 + higher);
    }
  };
  canvas.onpointerup = canvas.onpointercancel = (event) => {
    dragged = null;
    if (!fingers.delete(event.pointerId)) return;
    if (!pinch && event.type === "pointerup") point(event);
    if (!fingers.size) pinch = null;
  };
  canvas.oncontextmenu = (event) => event.preventDefault();
  canvas.addEventListener(
    "wheel",
    (event) => {
      event.preventDefault();
      // One for a notch of a wheel; two fingers send many small events.
      const most = event.deltaMode ? 1 : PIXELS_PER_SLICE;
      const turned = -Math.max(-1, Math.min(1, event.deltaY / most));
      if (event.ctrlKey) return zoomBy(1.25 ** turned);
      rolled += turned;
      moveBy(plane, Math.trunc(rolled));
      rolled %= 1;
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
  window.addEventListener("hashchange", readFirstIfAsked);
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
  byId("window-text").textContent = `Default: ${meta.scan.window.text}`;
  const presets = Object.entries(meta.scan.presets).map(([name, [width, level]]) => [
    name,
    [level - width / 2, level + width / 2],
  ]);
  for (const [name, ends] of [["default", [low, high]], ...presets, ["full range", [lowest, highest]]])
    byId("presets").append(
      element("button", { type: "button", textContent: name, onclick: () => setWindow(...ends) }),
    );
}

// A link to this file may ask for it, when the page is opened and when it is open.
function readFirstIfAsked() {
  const asked = location.hash === "#read-first" && item().prediction !== null;
  if (asked && !state.readFirst) hideCam();
  return asked;
}

// ---------------------------------------------------------------- start

let loaded = 0; // slices

async function start() {
  document.title = ["CAM review", meta.case].filter(Boolean).join(" · ");
  byId("stored").textContent =
    `Grey values: ${stored.text}. Masks: exact. ` + mapText() +
    (meta.scan.channels > 1 ? ` Channel 1 of ${meta.scan.channels} is shown.` : "") +
    (meta.scan.oblique ? ` Oblique scan: ${meta.scan.oblique}° off the axes, letters are the nearest.` : "");
  if (signed) nameSigns();
  Object.keys(PLANES).forEach(buildPlane);
  byId("closeup-figure").append(...lettersOf(state.plane));
  byId("stage").append(element("p", { id: "readout" }), element("p", { id: "progress" }));
  listen();
  listenToFeedback();
  restore();
  if (!readFirstIfAsked()) jump(layer().peaks[0]?.at ?? middleOfPrediction());
  if (isHidden()) jump(middleOfPrediction());
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
  if (!meta.maps.length) return "";
  const errors = items.flatMap((one) => one.layers.map(errorOf));
  return `CAM: within ${Math.max(...errors).toFixed(3)} of its values.`;
}

const failed = (error) =>
  warn(
    `This page cannot be shown completely (${error}). It needs a browser of 2023 or later; if this ` +
      "is one, the file is damaged: get it again.",
  );

start().catch(failed);
