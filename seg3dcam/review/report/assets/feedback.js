// What the reader thinks, and in which order the CAM and the prediction were seen.

let opened = Date.now();
const story = []; // [seconds since the page was opened, what happened]
const remarks = [];
let saved = true;

function tell(event) {
  story.push([Math.round((Date.now() - opened) / 100) / 10, event]);
  keepForReload();
}

function hideCam() {
  tell("CAMs hidden");
  show({ readFirst: true, at: middleOfPrediction(), zoom: 1, centre: null });
  refill();
  keepForReload();
}

function showCam() {
  tell(`prediction of ${item().label} read`);
  read.add(item().label);
  show({});
  refill();
  keepForReload();
}

// Label of a target -> whether its prediction had been read when its CAM was first seen.
const firstLooks = new Map();

function noteFirstLook() {
  const { label } = item();
  if (isHidden() || firstLooks.has(label)) return;
  firstLooks.set(label, read.has(label) ? "yes" : "no");
  tell(`CAM of ${label} shown`);
}

// "CAM of lesion shown at 0 s; CAMs hidden at 4.1 s; ..": tells a first look from a second one.
const order = () => story.map(([seconds, event]) => `${event} at ${seconds} s`).join("; ");

function remark() {
  const verdict = document.querySelector("[name=verdict]:checked")?.value;
  if (!verdict) return null;
  const { label, method, name, model } = item();
  const mm = toMm(state.at);
  const voxel = ownVoxel(state.at);
  const [low, high] = state.window;
  const fixed = (value, digits) => +value.toFixed(digits);
  return {
    time: new Date().toISOString(),
    case: meta.case,
    name,
    target: label,
    class: item().class,
    layer: layer().name,
    method,
    model,
    verdict,
    comment: byId("comment").value.trim(),
    initials: byId("initials").value.trim(),
    plane: state.plane,
    r_mm: fixed(mm[0], 2),
    a_mm: fixed(mm[1], 2),
    s_mm: fixed(mm[2], 2),
    i: voxel[0],
    j: voxel[1],
    k: voxel[2],
    threshold: state.threshold,
    opacity: state.opacity,
    window_width: fixed(high - low, 3),
    window_level: fixed((high + low) / 2, 3),
    cam_shown: state.heat && heatNow() ? "yes" : "no",
    read_first: firstLooks.get(label) ?? "CAM not seen yet",
    order: order(),
    seg3dcam: meta.version,
  };
}

function noteRemark() {
  const made = remark();
  if (!made) {
    byId("noted").textContent = "Choose useful, misleading or unclear first.";
    return false;
  }
  remarks.push(made);
  saved = false;
  keepRemarks();
  document.querySelector("[name=verdict]:checked").checked = false;
  byId("comment").value = "";
  sayNoted();
  keepForReload();
  return true;
}

// Something is chosen or written that is not noted yet.
const isOpen = () =>
  document.querySelector("[name=verdict]:checked") !== null || byId("comment").value.trim() !== "";

function save(kind) {
  if ((isOpen() || !remarks.length) && !noteRemark()) return;
  const [text, type] =
    kind === "csv" ? [asCsv(remarks), "text/csv"] : [JSON.stringify(remarks, null, 2), "application/json"];
  const stamp = new Date().toISOString().slice(0, 19).replace(/[-:]/g, "").replace("T", "_");
  const link = element("a", {
    href: URL.createObjectURL(new Blob([text], { type })),
    download: `cam_feedback_${stamp}.${kind}`,
  });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  saved = true;
  keepRemarks();
  byId("noted").textContent = `Saved ${remarks.length} as ${link.download}`;
}

// For spreadsheets: a byte order mark, and no cell that would be run as a formula.
function asCsv(rows) {
  const cell = (value) => {
    const text = typeof value === "string" && /^[=+\-@\t\r]/.test(value) ? `'${value}` : String(value);
    return `"${text.replaceAll('"', '""')}"`;
  };
  const table = [Object.keys(rows[0]), ...rows.map(Object.values)];
  return "\ufeff" + table.map((row) => row.map(cell).join(",") + "\r\n").join("");
}

// ---------------------------------------------------------------- what outlives a reload

const STORED = `seg3dcam feedback ${meta.id}`;

// Notes stay in this browser until they are saved or deleted. A page in a notebook may keep none.
function keepRemarks() {
  byId("forget").hidden = !remarks.length;
  attempt(() =>
    saved ? localStorage.removeItem(STORED) : localStorage.setItem(STORED, JSON.stringify(remarks)),
  );
}

// What is being written, and what has been seen, belong to this visit: a reload goes on with it.
function keepForReload() {
  const visit = {
    opened,
    story,
    read: [...read],
    firstLooks: [...firstLooks],
    readFirst: state.readFirst,
    verdict: document.querySelector("[name=verdict]:checked")?.value ?? null,
    comment: byId("comment").value,
    initials: byId("initials").value,
  };
  attempt(() => history.replaceState({ [STORED]: visit }, ""));
}

function restore() {
  const kept = attempt(() => JSON.parse(localStorage.getItem(STORED))) ?? [];
  remarks.push(...kept);
  if (kept.length) {
    saved = false;
    byId("forget").hidden = false;
    sayNoted();
  }
  const visit = attempt(() => history.state?.[STORED]);
  if (!visit) return;
  opened = visit.opened;
  story.push(...visit.story);
  visit.read.forEach((label) => read.add(label));
  visit.firstLooks.forEach(([label, how]) => firstLooks.set(label, how));
  state.readFirst = visit.readFirst;
  byId("comment").value = visit.comment;
  byId("initials").value = visit.initials;
  if (visit.verdict) document.querySelector(`[name=verdict][value=${visit.verdict}]`).checked = true;
}

function forget() {
  remarks.length = 0;
  saved = true;
  keepRemarks();
  byId("noted").textContent = "The notes are deleted.";
}

function sayNoted() {
  byId("noted").textContent =
    `${remarks.length} noted, and kept in this browser; nothing leaves it until you save it.`;
}

// Null where a browser refuses to keep anything, as in a frame without an origin of its own.
function attempt(action) {
  try {
    return action() ?? null;
  } catch {
    return null;
  }
}

function listenToFeedback() {
  byId("hide").onclick = hideCam;
  byId("read").onclick = showCam;
  byId("note").onclick = noteRemark;
  byId("save-csv").onclick = () => save("csv");
  byId("save-json").onclick = () => save("json");
  byId("forget").onclick = forget;
  for (const form of [byId("comment"), byId("initials"), document.querySelector("fieldset")])
    form.addEventListener("input", keepForReload);
  window.addEventListener("beforeunload", (event) => {
    if (!saved || isOpen()) event.preventDefault();
  });
}
