// The page's own behaviour: plot on a canvas, summary, list of scans. No library, no network.
"use strict";
const data = JSON.parse(document.getElementById("group-data").textContent);
const by = (id) => document.getElementById(id);
const MISSING = 65535;
const NO_LEVEL = 255;
// Okabe and Ito's colours, which most colour-blind readers can tell apart. Further groups take them
// again with another shape: corners in units of the radius, none for a disc.
const COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#a66f00", "#3a87b8", "#333333", "#8a7f00"];
const SHAPES = [
  null,
  [[-1, -1], [1, -1], [1, 1], [-1, 1]],
  [[0, -1.3], [1.3, 1], [-1.3, 1]],
  [[0, -1.4], [1.4, 0], [0, 1.4], [-1.4, 0]],
  [[-1.2, -1.2], [1.2, -1.2], [-1.2, 1.2], [1.2, 1.2]],
];
const REACH = 1.4;
const UNKNOWN = "#9aa3ae";
const MARGIN = { left: 74, right: 14, top: 12, bottom: 46 };
const PAGE = 50;

const bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
const unpack = {
  u8: bytes,
  u16: (text) => new Uint16Array(bytes(text).buffer),
  u32: (text) => new Uint32Array(bytes(text).buffer),
};
const floats = (column) => {
  if (!column.floats) {
    const codes = unpack.u16(column.data);
    column.floats = Float64Array.from(codes, (c) => (c === MISSING ? NaN : column.low + column.step * c));
  }
  return column.floats;
};
const codes = (category) => (category.codes ??= bytes(category.data));
const hasReport = bytes(data.report);
data.strata.forEach((stratum) => { stratum.rows = unpack.u32(stratum.rows); });

// A number to the fourth digit of the largest that it stands beside, so that all end at one place.
const shown = (value, largest = value) => {
  if (!Number.isFinite(value)) return "–";
  const digits = Math.min(12, Math.max(0, 3 - Math.floor(Math.log10(Math.abs(largest) || 1))));
  const rounded = Number(value.toFixed(digits)) + 0; // + 0 turns −0 into 0
  return rounded.toLocaleString("en", { maximumFractionDigits: digits }).replace(/,/g, "\u202f");
};
const colourOf = (group) => (group === NO_LEVEL ? UNKNOWN : COLOURS[group % COLOURS.length]);
const shapeOf = (group) => (group === NO_LEVEL ? null : SHAPES[Math.floor(group / COLOURS.length) % SHAPES.length]);
const plainly = (name) => name.replace(/_/g, " ");
const reportOf = (row) => (hasReport[row] ? `sub-${encodeURIComponent(data.participant[row])}.html` : null);
const nameOf = (row) => `sub-${data.participant[row]}${data.session[row] ? `, ses-${data.session[row]}` : ""}`;

const fill = (select, entries, wanted) => {
  const before = wanted ?? select.value;
  select.replaceChildren(...entries.map(([value, text]) => new Option(text, value)));
  if (entries.some(([value]) => value === before)) select.value = before;
};

const quantile = (sorted, share) => {
  if (!sorted.length) return NaN;
  const place = share * (sorted.length - 1);
  const low = Math.floor(place);
  const high = Math.ceil(place);
  return sorted[low] + (place - low) * (sorted[high] - sorted[low]);
};

// What is chosen.
const state = { points: [], marked: -1 };
const stratum = () => data.strata[Number(by("stratum").value)];
const kind = () => stratum().kinds.find((k) => k.kind === by("kind").value);
const find = (list, name) => list.find((entry) => entry.name === name);

const refill = () => {
  fill(by("kind"), stratum().kinds.map((k) => [k.kind, k.words]));
  const names = kind().names;
  fill(by("structure"), names.map((name) => [name, plainly(name)]), by("structure").value || "left_hippocampus");
};

const begin = () => {
  fill(by("stratum"), data.strata.map((s, n) => [String(n), s.name.replace("_", ", ")]));
  by("stratum-label").hidden = data.strata.length < 2;
  const varying = data.categories.filter((c) => c.levels.length > 1);
  const sites = ["site", "scanner_device_serial_number", "scanner_manufacturers_model_name", "sex"];
  const first = sites.find((name) => varying.some((c) => c.name === name)) ?? "proposal";
  const axes = [...data.numbers.map((n) => n.name), ...data.categories.map((c) => c.name)];
  fill(by("against"), axes.map((name) => [name, plainly(name)]), "age_years");
  if (by("against").value !== "age_years") by("against").value = axes.includes(first) ? first : axes[0];
  fill(by("colour"), [["", "none"], ...varying.map((c) => [c.name, plainly(c.name)])], first);
  refill();
};

// Points: x, y, group, row. A category on the x axis is spread sideways, the same way each time.
const spread = (row) => ((Math.imul(row + 1, 2654435761) >>> 8) % 1000) / 1000 - 0.5;
const gather = () => {
  const rows = stratum().rows;
  const place = kind().names.indexOf(by("structure").value);
  const y = floats(kind().columns[place]);
  const category = find(data.categories, by("against").value);
  const x = category ? codes(category) : floats(find(data.numbers, by("against").value));
  const colour = find(data.categories, by("colour").value);
  const group = colour ? codes(colour) : null;
  const points = [];
  for (let n = 0; n < rows.length; n += 1) {
    const row = rows[n];
    const unknown = category ? x[row] === NO_LEVEL : Number.isNaN(x[row]);
    if (!unknown && !Number.isNaN(y[n])) {
      const at = category ? x[row] + 0.62 * spread(row) : x[row];
      points.push({ x: at, y: y[n], level: category ? x[row] : 0, group: group ? group[row] : 0, row });
    }
  }
  points.sort((a, b) => a.x - b.x || a.row - b.row);
  const largest = points.reduce((most, p) => Math.max(most, Math.abs(p.y)), 0);
  return { points, category, colour, largest, missing: rows.length - points.length };
};

const ticks = (low, high, most) => {
  const rough = (high - low) / most || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= rough);
  const result = [];
  for (let value = Math.ceil(low / step) * step; value <= high + step * 1e-9; value += step) result.push(value);
  return result;
};

const canvas = by("canvas");
const pen = canvas.getContext("2d");
const draw = () => {
  const { points, category, colour } = state.view;
  const ratio = window.devicePixelRatio || 1;
  const [width, height] = [canvas.clientWidth, canvas.clientHeight];
  canvas.width = Math.round(width * ratio);
  canvas.height = Math.round(height * ratio);
  pen.setTransform(ratio, 0, 0, ratio, 0, 0);
  pen.clearRect(0, 0, width, height);
  const xs = category ? [-0.6, category.levels.length - 0.4] : range(points.map((p) => p.x));
  const ys = range(points.map((p) => p.y));
  const across = width - MARGIN.left - MARGIN.right;
  const up = height - MARGIN.top - MARGIN.bottom;
  const px = (x) => MARGIN.left + ((x - xs[0]) / (xs[1] - xs[0])) * across;
  const py = (y) => MARGIN.top + up - ((y - ys[0]) / (ys[1] - ys[0])) * up;
  axes(width, height, xs, ys, px, py);
  points.forEach((p) => { p.px = px(p.x); p.py = py(p.y); });
  pen.globalAlpha = points.length > 3000 ? 0.3 : points.length > 500 ? 0.5 : 0.8;
  const radius = points.length > 3000 ? 2 : 3.2;
  points.forEach((p) => {
    pen.fillStyle = colourOf(p.group);
    pen.beginPath();
    const corners = shapeOf(p.group);
    if (corners) corners.forEach(([x, y]) => pen.lineTo(p.px + radius * x, p.py + radius * y));
    else pen.arc(p.px, p.py, radius, 0, 7);
    pen.fill();
  });
  pen.globalAlpha = 1;
  if (category) boxes(points, category, px, py); else medians(points, colour);
  if (state.marked >= 0) {
    const p = points[state.marked];
    pen.strokeStyle = "#000";
    pen.lineWidth = 2;
    pen.beginPath();
    pen.arc(p.px, p.py, 7, 0, 7);
    pen.stroke();
  }
};

const range = (values) => {
  let [low, high] = [Infinity, -Infinity];
  values.forEach((v) => { low = Math.min(low, v); high = Math.max(high, v); });
  if (!(high >= low)) return [0, 1];
  const room = (high - low || Math.abs(high) || 1) * 0.04;
  return [low - room, high + room];
};

const axes = (width, height, xs, ys, px, py) => {
  const { category } = state.view;
  pen.font = "13px system-ui, sans-serif";
  pen.lineWidth = 1;
  pen.textAlign = "right";
  pen.textBaseline = "middle";
  ticks(ys[0], ys[1], 6).forEach((y) => {
    pen.strokeStyle = "#e3e7ec";
    pen.beginPath();
    pen.moveTo(MARGIN.left, py(y));
    pen.lineTo(width - MARGIN.right, py(y));
    pen.stroke();
    pen.fillStyle = "#3d4856";
    pen.fillText(shown(y, ys[1] - ys[0]), MARGIN.left - 8, py(y));
  });
  pen.textAlign = "center";
  pen.textBaseline = "top";
  const bottom = height - MARGIN.bottom + 6;
  const marks = category
    ? category.levels.map((level, n) => [n, level]).filter(([n]) => n % Math.ceil(category.levels.length / Math.max(1, Math.floor(width / 80))) === 0)
    : ticks(xs[0], xs[1], Math.max(5, width / 110)).map((x) => [x, shown(x, xs[1] - xs[0])]);
  const most = Math.max(4, Math.floor((width / Math.max(marks.length, 1)) / 8));
  marks.forEach(([x, text]) => pen.fillText(text.length > most ? `${text.slice(0, most - 1)}…` : text, px(x), bottom));
  pen.font = "600 13px system-ui, sans-serif";
  const middle = MARGIN.left + (width - MARGIN.left) / 2;
  pen.fillText(plainly(by("against").value), middle, bottom + 20, width - MARGIN.left);
  pen.save();
  pen.translate(6, height / 2 - 20);
  pen.rotate(-Math.PI / 2);
  pen.fillText(`${plainly(by("structure").value)} (${kind().unit})`, 0, 0, height - 40);
  pen.restore();
};

const boxes = (points, category, px, py) => {
  category.levels.forEach((_, level) => {
    const values = points.filter((p) => p.level === level).map((p) => p.y).sort((a, b) => a - b);
    if (values.length < 3) return;
    const [low, middle, high] = [0.25, 0.5, 0.75].map((share) => py(quantile(values, share)));
    pen.strokeStyle = "#1c2430";
    pen.lineWidth = 1.5;
    pen.strokeRect(px(level - 0.22), high, px(level + 0.22) - px(level - 0.22), low - high);
    pen.lineWidth = 3;
    pen.beginPath();
    pen.moveTo(px(level - 0.22), middle);
    pen.lineTo(px(level + 0.22), middle);
    pen.stroke();
  });
};

const medians = (points, colour) => {
  const groups = colour ? colour.levels.map((_, n) => n) : [0];
  groups.slice(0, COLOURS.length).forEach((group) => {
    const mine = points.filter((p) => p.group === group);
    if (mine.length < 40) return;
    const size = Math.max(15, Math.floor(mine.length / 12));
    const step = Math.max(1, Math.floor(size / 6));
    pen.beginPath();
    for (let n = 0; n + size <= mine.length; n += step) {
      const window = mine.slice(n, n + size);
      const ys = window.map((p) => p.py).sort((a, b) => a - b);
      pen.lineTo(window[size >> 1].px, quantile(ys, 0.5));
    }
    pen.strokeStyle = "#fff";
    pen.lineWidth = 5;
    pen.stroke();
    pen.strokeStyle = COLOURS[group % COLOURS.length];
    pen.lineWidth = 2.5;
    pen.stroke();
  });
};

const cellOf = (tag, text, scope) => {
  const cell = document.createElement(tag);
  cell.textContent = text;
  if (scope) cell.scope = scope;
  return cell;
};
const lineOf = (cells) => {
  const line = document.createElement("tr");
  line.append(...cells);
  return line;
};

const summarise = () => {
  const { points, category, colour, largest, missing } = state.view;
  const volume = (value) => shown(value, largest);
  const [source, key] = category ? [category, "level"] : [colour, "group"];
  const among = (entry) => [...entry.levels.map((level, n) => [level, n]), ["n/a", NO_LEVEL]];
  const groups = source ? among(source).map(([level, n]) => [level, points.filter((p) => p[key] === n)]) : [];
  const rows = [...groups.filter(([, members]) => members.length), ["all", points]].map(([name, members]) => {
    const values = members.map((p) => p.y).sort((a, b) => a - b);
    const mean = values.reduce((sum, v) => sum + v, 0) / values.length;
    const sd = Math.sqrt(values.reduce((sum, v) => sum + (v - mean) ** 2, 0) / (values.length - 1));
    const quartiles = `${volume(quantile(values, 0.25))} to ${volume(quantile(values, 0.75))}`;
    return lineOf([cellOf("th", name, "row"), ...[String(values.length), volume(quantile(values, 0.5)), quartiles, volume(mean), volume(sd)].map((t) => cellOf("td", t))]);
  });
  by("summary").replaceChildren(...rows);
  const what = `${plainly(by("structure").value)}, ${kind().words} (${kind().unit})`;
  const without = missing ? `; ${missing} without a value` : "";
  by("summary-caption").textContent = `${what}, by ${source ? plainly(source.name) : "nothing"}${without}`;
  canvas.setAttribute("aria-label", `Plot of ${what} against ${plainly(by("against").value)}: ${points.length} scan${points.length === 1 ? "" : "s"}, median ${by("summary").lastElementChild.cells[2].textContent}. The table below says the same in numbers.`);
  const named = colour ? among(colour) : [];
  const there = new Set(points.map((p) => p.group));
  by("legend").replaceChildren(...named.filter(([, n]) => n !== NO_LEVEL || there.has(n)).map(([level, n]) => {
    const entry = document.createElement("span");
    const dot = document.createElement("i");
    const corners = shapeOf(n)?.map((at) => at.map((c) => `${50 + (50 * c) / REACH}%`).join(" "));
    dot.style.backgroundColor = colourOf(n);
    dot.style.clipPath = corners ? `polygon(${corners.join(", ")})` : "";
    dot.style.borderRadius = corners ? "0" : "";
    entry.append(dot, level);
    return entry;
  }));
};

const renew = () => {
  state.view = gather();
  state.marked = -1;
  by("tip").hidden = true;
  by("told").textContent = "";
  draw();
  summarise();
};

// One scan: under the pointer, or walked to with the arrow keys.
const wordsOf = (p) => {
  const { category, colour, largest } = state.view;
  const x = category ? category.levels[p.level] : shown(p.x);
  const group = colour && colour !== category ? `\n${plainly(colour.name)}: ${colour.levels[p.group] ?? "n/a"}` : "";
  return `${nameOf(p.row)}\n${plainly(by("structure").value)}: ${shown(p.y, largest)} ${kind().unit}\n${plainly(by("against").value)}: ${x}${group}\nproposal: ${data.proposal[p.row]}`;
};
const mark = (number, aloud) => {
  state.marked = number;
  draw();
  const tip = by("tip");
  tip.hidden = number < 0;
  canvas.style.cursor = number >= 0 && reportOf(state.view.points[number].row) ? "pointer" : "default";
  if (number < 0) return;
  const p = state.view.points[number];
  tip.textContent = wordsOf(p);
  tip.style.left = `${Math.min(p.px + 12, canvas.clientWidth - tip.offsetWidth - 4)}px`;
  tip.style.top = `${Math.max(0, p.py - tip.offsetHeight - 10)}px`;
  if (aloud) by("told").textContent = wordsOf(p).replace(/\n/g, "; ");
};
const nearest = (event) => {
  const box = canvas.getBoundingClientRect();
  const [x, y] = [event.clientX - box.left, event.clientY - box.top];
  let [best, distance] = [-1, 144];
  state.view.points.forEach((p, n) => {
    const d = (p.px - x) ** 2 + (p.py - y) ** 2;
    if (d < distance) [best, distance] = [n, d];
  });
  return best;
};
const open = (number) => {
  const target = number >= 0 && reportOf(state.view.points[number].row);
  if (target) window.location.href = target;
};
canvas.addEventListener("pointermove", (event) => {
  const number = nearest(event);
  if (number !== state.marked) mark(number, false);
});
canvas.addEventListener("pointerleave", () => mark(-1, false));
canvas.addEventListener("click", (event) => open(nearest(event)));
canvas.addEventListener("keydown", (event) => {
  const last = state.view.points.length - 1;
  const steps = { ArrowRight: 1, ArrowUp: 1, ArrowLeft: -1, ArrowDown: -1, PageDown: 50, PageUp: -50, Home: -Infinity, End: Infinity };
  if (event.key === "Enter") open(state.marked);
  else if (event.key === "Escape") mark(-1, false);
  else if (event.key in steps && last >= 0) mark(Math.min(last, Math.max(0, state.marked + steps[event.key])), true);
  else return;
  event.preventDefault();
});

// The list of scans, a page at a time.
let from = 0;
const list = () => {
  const which = by("which").value;
  const words = by("find").value.trim().toLowerCase();
  const rows = [];
  for (let n = 0; n < data.scan.length; n += 1) {
    const proposal = data.proposal[n];
    const wanted = which === "all" || (which === "exclude" ? proposal === "exclude" : proposal !== "use");
    if (wanted && (!words || `${data.scan[n]} ${data.reasons[n]}`.toLowerCase().includes(words))) rows.push(n);
  }
  from = Math.max(0, Math.min(from, PAGE * Math.floor((rows.length - 1) / PAGE)));
  by("scans").replaceChildren(...rows.slice(from, from + PAGE).map((n) => {
    const first = cellOf("th", "", "row");
    const target = reportOf(n);
    if (target) {
      const link = document.createElement("a");
      link.href = target;
      link.textContent = nameOf(n);
      first.append(link);
    } else first.textContent = nameOf(n);
    return lineOf([first, cellOf("td", data.scan[n]), cellOf("td", data.proposal[n]), cellOf("td", data.reasons[n] || "–")]);
  }));
  by("place").textContent = rows.length ? `${from + 1} to ${Math.min(from + PAGE, rows.length)} of ${rows.length}` : "no scan";
  by("before").disabled = from === 0;
  by("after").disabled = from + PAGE >= rows.length;
};
const turn = (pages) => { from += pages * PAGE; list(); };
by("before").addEventListener("click", () => turn(-1));
by("after").addEventListener("click", () => turn(1));
by("which").addEventListener("change", () => { from = 0; list(); });
by("find").addEventListener("input", () => { from = 0; list(); });

["stratum", "kind"].forEach((id) => by(id).addEventListener("change", () => { refill(); renew(); }));
["structure", "against", "colour"].forEach((id) => by(id).addEventListener("change", renew));
window.addEventListener("resize", draw);
begin();
renew();
list();
document.body.dataset.ready = "yes";
