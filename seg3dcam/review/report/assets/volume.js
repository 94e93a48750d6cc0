"use strict";

// What the file holds, and how to cut it.
//
// Volumes are in display order: x towards the patient's left, y towards the back, z upwards, and
// voxel (x, y, z) is number x + nx * (y + ny * z). "Full" indices are those of the scan as it was
// given; the stored scan and the maps may be coarser, with voxel k at start + step * k.

const meta = JSON.parse(document.getElementById("meta").textContent);
const full = { shape: meta.scan.shape, start: [0, 0, 0], step: [1, 1, 1] };
const stored = meta.scan.stored;

const PLANES = {
  axial: { across: 2, columns: 0, rows: 1, upwards: false, ends: ["I", "S"] },
  coronal: { across: 1, columns: 0, rows: 2, upwards: true, ends: ["A", "P"] },
  sagittal: { across: 0, columns: 1, rows: 2, upwards: true, ends: ["R", "L"] },
};

// Of a signed page the evidence against is drawn too, and what is drawn goes by a value's size.
const { signed } = meta.look;
const shownPart = signed ? (value) => value : (value) => Math.max(value, 0);
const strength = signed ? Math.abs : (value) => value;

// ---------------------------------------------------------------- reading the file

function lines(id) {
  const text = document.getElementById(id).textContent.trim();
  return text ? text.split("\n") : [];
}

function bytesOf(base64) {
  const text = atob(base64);
  const bytes = new Uint8Array(text.length);
  for (let n = 0; n < text.length; n++) bytes[n] = text.charCodeAt(n);
  return bytes;
}

async function inflate(base64) {
  const unzip = new DecompressionStream("deflate");
  const stream = new Blob([bytesOf(base64)]).stream().pipeThrough(unzip);
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

// A map's codes, of which the file holds the differences along x, and what each code stands for.
async function readMap(base64, packed) {
  const codes = await inflate(base64);
  for (let row = 0; row < codes.length; row += packed.shape[0])
    for (let n = row + 1; n < row + packed.shape[0]; n++) codes[n] += codes[n - 1];
  const [lowest, highest] = packed.ends;
  const values = Float32Array.from({ length: 256 }, (_, code) =>
    code < meta.zero
      ? (lowest * (meta.zero - code)) / meta.zero
      : (highest * (code - meta.zero)) / (255 - meta.zero),
  );
  return { ...packed, codes, values };
}

// A mask's bits, the first voxel in the lowest one.
const readMask = inflate;
const bitOf = (bits, n) => (bits[n >> 3] >> (n & 7)) & 1;

// The scan's grey codes, slice by slice: the one at `first` comes first, then its neighbours.
async function readScan(first, codes, onSlice) {
  const [width, height, count] = stored.shape;
  const texts = lines("slices");
  const canvas = new OffscreenCanvas(width, height);
  const context = canvas.getContext("2d", { willReadFrequently: true });
  const order = [...texts.keys()].sort((a, b) => Math.abs(a - first) - Math.abs(b - first));
  const open = (z) =>
    createImageBitmap(new Blob([bytesOf(texts[z])], { type: stored.mime }), {
      colorSpaceConversion: "none",
    });
  const AHEAD = 8;
  const pending = order.slice(0, AHEAD).map(open);
  for (let n = 0; n < count; n++) {
    const picture = await pending.shift();
    if (n + AHEAD < count) pending.push(open(order[n + AHEAD]));
    context.drawImage(picture, 0, 0);
    picture.close();
    const rgba = context.getImageData(0, 0, width, height).data;
    const offset = order[n] * width * height;
    for (let p = 0; p < width * height; p++) codes[offset + p] = rgba[4 * p];
    onSlice(n + 1, count);
  }
}

// Some browsers alter pixels that a page reads back, against fingerprinting.
function readsPixelsExactly() {
  const context = new OffscreenCanvas(16, 16).getContext("2d", { willReadFrequently: true });
  const written = context.createImageData(16, 16);
  written.data.forEach((_, n) => (written.data[n] = n % 4 === 3 ? 255 : (n * 7) % 256));
  context.putImageData(written, 0, 0);
  const read = context.getImageData(0, 0, 16, 16).data;
  return read.every((value, n) => value === written.data[n]);
}

// ---------------------------------------------------------------- cutting

function strides(shape) {
  return [1, shape[0], shape[0] * shape[1]];
}

// One slice of a volume as rows of columns, the first row at the top of the picture; `voxel` gives
// the value of voxel n.
function cut(voxel, shape, plane, index) {
  const { across, columns, rows, upwards } = PLANES[plane];
  const stride = strides(shape);
  const width = shape[columns];
  const height = shape[rows];
  const slice = new Uint8Array(width * height);
  for (let r = 0; r < height; r++) {
    let from = index * stride[across] + (upwards ? height - 1 - r : r) * stride[rows];
    for (let c = 0; c < width; c++, from += stride[columns]) slice[r * width + c] = voxel(from);
  }
  return slice;
}

// Where a full index lies between two voxels of a coarser grid: the lower one, the upper one and
// the upper one's weight. Beyond the outermost voxels their value is held.
function between(index, grid, axis) {
  const last = grid.shape[axis] - 1;
  const at = Math.min(Math.max((index - grid.start[axis]) / grid.step[axis], 0), last);
  const low = Math.floor(at);
  return [low, Math.min(low + 1, last), at - low];
}

function nearest(index, axis) {
  const at = Math.round((index - stored.start[axis]) / stored.step[axis]);
  return Math.min(Math.max(at, 0), stored.shape[axis] - 1);
}

// A slice of a map at a full index, between the map's own slices.
function cutMap(map, plane, index) {
  const axis = PLANES[plane].across;
  const [low, high, weight] = between(index, map, axis);
  const code = (n) => map.codes[n];
  const values = (at) => Float32Array.from(cut(code, map.shape, plane, at), (c) => map.values[c]);
  const one = values(low);
  if (weight > 0) values(high).forEach((other, n) => (one[n] += weight * (other - one[n])));
  return one;
}

// A map's value at a full voxel.
function valueAt(map, at) {
  const stride = strides(map.shape);
  const sides = at.map((index, axis) => between(index, map, axis));
  let sum = 0;
  for (let corner = 0; corner < 8; corner++) {
    let from = 0;
    let share = 1;
    sides.forEach(([low, high, weight], axis) => {
      const upper = (corner >> axis) & 1;
      from += (upper ? high : low) * stride[axis];
      share *= upper ? weight : 1 - weight;
    });
    if (share > 0) sum += share * map.values[map.codes[from]];
  }
  return shownPart(sum);
}

function bitAt(bits, at) {
  const stride = strides(full.shape);
  return bitOf(bits, at[0] * stride[0] + at[1] * stride[1] + at[2] * stride[2]);
}

// ---------------------------------------------------------------- places in words

function toMm(at) {
  const [x, y, z] = at;
  return [0, 1, 2].map((n) => {
    const [a, b, c, d] = meta.scan.affine[n];
    return a * x + b * y + c * z + d;
  });
}

// "R 30.0" for 30 mm to the patient's right.
function mmText(mm, axis) {
  return `${(mm < 0 ? "LPI" : "RAS")[axis]} ${Math.abs(mm).toFixed(1)}`;
}

function placeText(mm) {
  return mm.map(mmText).join(", ") + " mm";
}

// The scan's own voxel index (i, j, k).
function ownIndex(at, axis) {
  return meta.scan.flipped[axis] ? full.shape[axis] - 1 - at[axis] : at[axis];
}

function ownVoxel(at) {
  return [..."ijk"].map((name) => ownIndex(at, meta.scan.axes.indexOf(name)));
}

// Slices are counted as in the file, from 1.
function sliceText(plane, at) {
  const axis = PLANES[plane].across;
  const middle = full.shape.map((size) => (size - 1) / 2);
  middle[axis] = at[axis];
  const world = 2 - "axial coronal sagittal".split(" ").indexOf(plane);
  const place = mmText(toMm(middle)[world], world);
  return `slice ${ownIndex(at, axis) + 1}/${full.shape[axis]} · ${place} mm`;
}
