// Words, choices and lists around the pictures.

function element(tag, properties = {}, children = []) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

const panels = {};

function buildPlane(plane) {
  const canvases = ["scan", "overlay"].map((kind) => {
    const canvas = element("canvas", { id: `${plane}-${kind}` });
    canvas.setAttribute("role", "img");
    return canvas;
  });
  const bars = canvases.map(() => element("span", { className: "scale" }));
  const panes = canvases.map((canvas, n) =>
    element("figure", {}, [
      canvas,
      ...lettersOf(plane),
      bars[n],
      element("figcaption", { textContent: n ? "+ CAM" : "scan" }),
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
    element("span", { className: "zoom" }, [
      zoomButton("−", "Zoom out", () => zoomBy(1 / 1.5)),
      zoomButton("+", "Zoom in at the crosshair", () => zoomBy(1.5)),
      zoomButton("⤢", "Show the whole slice", wholePicture),
    ]),
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

// Which side of the patient each edge of a picture is.
function lettersOf(plane) {
  return ["left", "right", "top", "bottom"].map((side, n) =>
    element("span", { className: `letter ${side}`, textContent: meta.scan.letters[plane][n] }),
  );
}

function zoomButton(textContent, name, onclick) {
  const button = element("button", { type: "button", textContent, title: name, onclick });
  button.setAttribute("aria-label", name);
  return button;
}

// "encoder.stages.0.b…convs.1.conv": the ends of a long name tell it from others.
function shortened(text, most) {
  if (text.length <= most) return text;
  const kept = (most - 1) / 2;
  return `${text.slice(0, Math.ceil(kept))}…${text.slice(-Math.floor(kept))}`;
}

const LONGEST_FACT = 36;
const LONGEST_CHOICE = 44;

function fillFacts() {
  const facts = {
    Case: meta.case,
    Model: item().model,
    Target: item().label,
    Layer: layer().name,
    Method: item().method,
    "Map verdict": isHidden() ? "" : layer().verdict?.finding || "not known",
    seg3dcam: meta.version,
    Date: meta.date,
  };
  const pairs = Object.entries(facts).filter(([, value]) => value);
  byId("facts").replaceChildren(...pairs.map(([name, value]) => fact(name, value)));
}

function fact(name, value) {
  return element("div", {}, [
    element("dt", { textContent: name }),
    element("dd", { textContent: shortened(value, LONGEST_FACT), title: value }),
  ]);
}

function fillChoices() {
  const labels = [...new Set(items.map((one) => one.label))];
  const same = [...items.keys()].filter((n) => items[n].label === item().label);
  const methods = same.map((n) => items[n].method);
  const repeated = new Set(methods).size < methods.length;
  fillSelect("target", labels, labels.indexOf(item().label), (n) => {
    const method = item().method;
    const its = [...items.keys()].filter((k) => items[k].label === labels[n]);
    choose(its.find((k) => items[k].method === method) ?? its[0]);
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
  const short = texts.map((text) => shortened(text, LONGEST_CHOICE));
  const apart = new Set(short).size === new Set(texts).size; // else whole names only
  select.replaceChildren(
    ...texts.map((text, n) => element("option", { textContent: apart ? short[n] : text, title: text })),
  );
  select.title = texts[chosen];
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
  byId("explained").textContent = item().explained;
  byId("hide").hidden = state.readFirst || item().prediction === null;
  byId("reading").hidden = !isHidden();
  noteFirstLook();
  for (const id of ["peaks-section", "profile-section"])
    byId(id).hidden = isHidden() || !layer().maps.length;
}

// What the colours and the curves of a signed page are.
function nameSigns() {
  byId("bar").setAttribute(
    "aria-label",
    "Colour bar from -1, against the target, to 1, for it: relative values, not a probability",
  );
  byId("bar-low").textContent = "-1 against";
  byId("bar-high").textContent = "for 1";
  byId("profile-max").textContent = "for";
  byId("profile-min").hidden = false;
}

const trouble = new Set();

function fillNotices() {
  const words = isHidden() ? [] : layer().found.warnings.concat(coarseWarning());
  const all = [...trouble, ...words];
  const said = isHidden() ? null : layer().verdict;
  const verdict = said && element("p", {
    className: said.against ? "notice verdict" : "verdict",
    textContent: `Verdict on the map: ${said.words}`,
  });
  byId("notices").replaceChildren(
    ...(verdict ? [verdict] : []),
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
        element("span", { textContent: camText(peak.value) }),
      ]),
    ),
  );
}

function fillNumbers() {
  const found = layer().found;
  const explained = item().explained.toLowerCase();
  const digits = (value, unit, count) => (value === null ? null : value.toPrecision(count) + unit);
  const ml = (value) => (value === null ? null : `${+value.toPrecision(3)} ml`);
  const percent = (value) => (value === null ? null : `${(100 * value).toFixed(0)} %`);
  const mm = (value) => (value === null ? null : value === 0 ? "inside" : `${value.toFixed(1)} mm`);
  const masks = {
    [explained === "prediction" ? "Predicted volume" : "Explained volume"]: ml(found.predicted_ml),
    "True volume": ml(found.truth_ml),
    Dice: digits(found.dice, "", 2),
  };
  // These figures are of what speaks for the target, also on a signed page.
  const [part, peak] = signed ? ["Evidence for", "Its peak"] : ["CAM", "Peak"];
  const cam = {
    "Evidence against": percent(found.evidence_against),
    [`${part} inside the ${explained}`]: percent(found.cam_inside_prediction),
    [`${part} inside the truth`]: percent(found.cam_inside_truth),
    [`${part} outside of both`]: percent(found.cam_outside),
    [`${peak} to ${explained}`]: mm(found.peak_to_prediction_mm),
    [`${peak} to truth`]: mm(found.peak_to_truth_mm),
    "CAM resolution": found.resolution_mm.map((x) => x.toFixed(1)).join(" × ") + " mm",
    "One voxel of the layer": ml(found.cell_ml),
    "Score explained": String(+item().score),
  };
  const shown = Object.entries(isHidden() ? masks : { ...masks, ...cam });
  byId("numbers").replaceChildren(
    ...shown.filter(([, value]) => value !== null).map(([name, value]) => fact(name, value)),
  );
}
