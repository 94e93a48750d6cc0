// Drawing on canvases. Sizes are in canvas pixels; a "place" says where a slice lies on a canvas.

const FULL_OPACITY_AT = 0.5; // from this value on, heat has its full opacity
const PADDING = 20; // around a picture, for the letters
const LINES = {
  truth: { colour: "#3cdc3c", dash: [] },
  prediction: { colour: "#00ffff", dash: [7, 5] },
};

// Left and top edge of the slice, and canvas pixels per column, row and mm: square in the patient.
function placeOn(canvas, plane, zoom, centre) {
  const { columns, rows, upwards } = PLANES[plane];
  const [width, height] = [full.shape[columns], full.shape[rows]];
  const [wide, high] = [meta.scan.spacing[columns], meta.scan.spacing[rows]];
  const pad = 2 * PADDING * devicePixelRatio;
  const fit = Math.min((canvas.width - pad) / (width * wide), (canvas.height - pad) / (height * high));
  const mm = Math.max(fit, 0.01) * zoom;
  const middle = (axis, size, turned) => {
    if (!centre) return size / 2;
    return (turned ? size - 1 - centre[axis] : centre[axis]) + 0.5;
  };
  return {
    left: canvas.width / 2 - middle(columns, width, false) * wide * mm,
    top: canvas.height / 2 - middle(rows, height, upwards) * high * mm,
    column: wide * mm,
    row: high * mm,
    mm,
    width,
    height,
  };
}

// Grey levels 0..255 of all codes, for a window.
function greyTable(low, high) {
  return Uint8ClampedArray.from(meta.scan.values, (value) => (255 * (value - low)) / (high - low));
}

// The scan's slice as a picture of its own size.
function greyPicture(codes, plane, at, table) {
  const { across, columns, rows } = PLANES[plane];
  const slice = cut((n) => codes[n], stored.shape, plane, nearest(at[across], across));
  const picture = new ImageData(stored.shape[columns], stored.shape[rows]);
  const rgba = new Uint32Array(picture.data.buffer);
  const opaque = Uint32Array.from(table, (grey) => (0xff000000 | (grey * 0x010101)) >>> 0);
  slice.forEach((code, n) => (rgba[n] = opaque[code]));
  return asCanvas(picture);
}

function asCanvas(picture) {
  const canvas = new OffscreenCanvas(picture.width, picture.height);
  canvas.getContext("2d").putImageData(picture, 0, 0);
  return canvas;
}

function drawGrey(context, place, grey) {
  context.fillStyle = "#000";
  context.fillRect(0, 0, context.canvas.width, context.canvas.height);
  context.imageSmoothingEnabled = true;
  context.imageSmoothingQuality = "high";
  const { left, top, column, row, width, height } = place;
  context.drawImage(grey, left, top, column * width, row * height);
}

// Heat at every pixel of the canvas, interpolated between the maps' voxels, as the formula says:
// opacity * min(1, strength / 0.5) from the threshold on, nothing below. `maps` are [map, weight].
function drawHeat(context, place, maps, plane, at, threshold, opacity) {
  const left = Math.max(0, Math.ceil(place.left - 0.5));
  const top = Math.max(0, Math.ceil(place.top - 0.5));
  const right = Math.min(context.canvas.width, place.left + place.column * place.width);
  const bottom = Math.min(context.canvas.height, place.top + place.row * place.height);
  const [wide, high] = [Math.round(right - left), Math.round(bottom - top)];
  if (wide < 1 || high < 1) return;

  const box = { left, top, wide, high };
  const heat = new Float32Array(wide * high);
  for (const [map, weight] of maps) addHeat(heat, box, place, map, weight, plane, at);
  const picture = new ImageData(wide, high);
  const rgba = new Uint32Array(picture.data.buffer);
  const table = heatTable(threshold, opacity);
  const last = table.length - 1;
  const [lowest, highest] = meta.look.ends;
  heat.forEach((value, n) => {
    const level = Math.round(((value - lowest) / (highest - lowest)) * last);
    rgba[n] = table[Math.min(Math.max(level, 0), last)];
  });
  context.drawImage(asCanvas(picture), left, top);
}

function addHeat(heat, { left, top, wide, high }, place, map, share, plane, at) {
  const { across, columns, rows, upwards } = PLANES[plane];
  const slice = cutMap(map, plane, at[across]);
  const width = map.shape[columns];
  const last = map.shape[rows] - 1;
  const sides = Array.from({ length: wide }, (_, n) => {
    const column = (left + n + 0.5 - place.left) / place.column - 0.5;
    return between(column, map, columns);
  });
  for (let r = 0; r < high; r++) {
    const row = (top + r + 0.5 - place.top) / place.row - 0.5;
    const [a, b, down] = between(upwards ? place.height - 1 - row : row, map, rows);
    const [upper, lower] = [a, b].map((index) => (upwards ? last - index : index) * width);
    for (let c = 0; c < wide; c++) {
      const [low, up, weight] = sides[c];
      const one = slice[upper + low] + weight * (slice[upper + up] - slice[upper + low]);
      const two = slice[lower + low] + weight * (slice[lower + up] - slice[lower + low]);
      heat[r * wide + c] += share * shownPart(one + down * (two - one));
    }
  }
}

// A value between the ends of the scale, by its part of the way.
function valueOf(part) {
  const [lowest, highest] = meta.look.ends;
  return lowest + part * (highest - lowest);
}

// Colour and opacity, packed, of 4096 values from one end of the scale to the other.
function heatTable(threshold, opacity) {
  return Uint32Array.from({ length: 4096 }, (_, n) => {
    const value = strength(valueOf(n / 4095));
    if (value < threshold) return 0;
    const [red, green, blue] = meta.look.colours[Math.round((n / 4095) * 255)];
    const alpha = Math.round(255 * opacity * Math.min(1, value / FULL_OPACITY_AT));
    return ((alpha << 24) | (blue << 16) | (green << 8) | red) >>> 0;
  });
}

// ---------------------------------------------------------------- lines

// Closed lines along the edges of a mask's voxels, as lists of corners (column, row).
function outlines(mask, width, height) {
  const inside = (c, r) => c >= 0 && r >= 0 && c < width && r < height && mask[r * width + c];
  const next = new Map(); // corner -> corners that a line leads to, the mask on its right
  const corner = (c, r) => r * (width + 1) + c;
  const add = (from, to) => next.set(from, [...(next.get(from) ?? []), to]);
  for (let r = 0; r < height; r++)
    for (let c = 0; c < width; c++) {
      if (!mask[r * width + c]) continue;
      if (!inside(c, r - 1)) add(corner(c, r), corner(c + 1, r));
      if (!inside(c + 1, r)) add(corner(c + 1, r), corner(c + 1, r + 1));
      if (!inside(c, r + 1)) add(corner(c + 1, r + 1), corner(c, r + 1));
      if (!inside(c - 1, r)) add(corner(c, r + 1), corner(c, r));
    }
  const found = [];
  for (const start of next.keys()) {
    while (next.get(start).length) {
      const line = [];
      let at = start;
      do {
        line.push([at % (width + 1), Math.floor(at / (width + 1))]);
        at = next.get(at).pop();
      } while (at !== start);
      found.push(line);
    }
  }
  return found;
}

function drawOutlines(context, place, found, line) {
  const path = new Path2D();
  for (const corners of found) {
    corners.forEach(([c, r], n) => {
      const at = [place.left + c * place.column, place.top + r * place.row];
      if (n) path.lineTo(...at);
      else path.moveTo(...at);
    });
    path.closePath();
  }
  const strokes = [
    ["rgba(0, 0, 0, 0.55)", 3.2], // so that it is seen on bone
    [line.colour, 1.5],
  ];
  for (const [colour, width] of strokes) {
    context.strokeStyle = colour;
    context.lineWidth = width * devicePixelRatio;
    context.setLineDash(line.dash.map((length) => length * devicePixelRatio));
    context.stroke(path);
  }
  context.setLineDash([]);
}

// Two lines with a gap where the reader looks.
function drawCrosshair(context, place, plane, at) {
  const { columns, rows, upwards } = PLANES[plane];
  const row = upwards ? place.height - 1 - at[rows] : at[rows];
  const x = place.left + (at[columns] + 0.5) * place.column;
  const y = place.top + (row + 0.5) * place.row;
  const [right, bottom] = [place.left + place.width * place.column, place.top + place.height * place.row];
  const gap = 14 * devicePixelRatio;
  context.strokeStyle = "rgba(255, 214, 102, 0.6)";
  context.lineWidth = devicePixelRatio;
  context.beginPath();
  for (const [x1, y1, x2, y2] of [
    [place.left, y, x - gap, y],
    [x + gap, y, right, y],
    [x, place.top, x, y - gap],
    [x, y + gap, x, bottom],
  ]) {
    if (x2 < x1 || y2 < y1) continue;
    context.moveTo(x1, y1);
    context.lineTo(x2, y2);
  }
  context.stroke();
}

function drawColourBar(canvas, threshold) {
  const context = canvas.getContext("2d");
  for (let n = 0; n < 256; n++) {
    const shown = strength(valueOf(n / 255)) >= threshold;
    const [red, green, blue] = meta.look.colours[n];
    context.fillStyle = `rgb(${red} ${green} ${blue})`;
    context.clearRect(n, 0, 1, canvas.height);
    context.fillRect(n, shown ? 0 : canvas.height - 3, 1, canvas.height);
  }
}

// CAM max and sum of every slice, and the predicted volume, each from 0 to its own largest value.
function drawProfile(canvas, series, at, colours) {
  const context = canvas.getContext("2d");
  const { width, height } = canvas;
  const size = devicePixelRatio;
  const count = series[0].values.length;
  const x = (n) => ((n + 0.5) / count) * width;
  context.clearRect(0, 0, width, height);
  for (const { values, largest, fill, dash, colour } of series) {
    const y = (value) => height - 1 - (value / (largest || 1)) * (height - 4 * size);
    context.beginPath();
    if (fill) context.moveTo(x(0), height);
    values.forEach((value, n) => context.lineTo(x(n), y(value)));
    if (fill) context.lineTo(x(count - 1), height);
    context.setLineDash((dash ?? []).map((length) => length * size));
    context.lineWidth = 1.5 * size;
    context.fillStyle = context.strokeStyle = colours[colour];
    if (fill) context.fill();
    else context.stroke();
  }
  context.setLineDash([]);
  context.fillStyle = colours.now;
  context.fillRect(Math.round(x(at)) - size, 0, 2 * size, height);
}
