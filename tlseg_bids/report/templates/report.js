// The page's own behaviour: label layers of the mosaics, sorting, ratings. No library.
"use strict";
const page = JSON.parse(document.getElementById("page-data").textContent);
const find = (root, selector) => root.querySelector(selector);
const findAll = (root, selector) => Array.from(root.querySelectorAll(selector));

// Browsers may forbid storage to pages opened from a file; then ratings last as long as the page.
const store = {
  get(key) {
    try { return JSON.parse(window.localStorage.getItem(key)); } catch { return null; }
  },
  set(key, value) {
    try { window.localStorage.setItem(key, JSON.stringify(value)); return true; } catch { return false; }
  },
};

// Mosaics: labels on and off, opacity, blinking.
findAll(document, ".figures").forEach((figures) => {
  const toggle = find(figures, "[data-overlay-toggle]");
  const opacity = find(figures, "[data-overlay-opacity]");
  const blink = find(figures, "[data-blink]");
  let timer = null;
  const show = (on) => figures.classList.toggle("no-labels", !on);
  toggle.addEventListener("change", () => show(toggle.checked));
  opacity.addEventListener("input", () => {
    findAll(figures, ".overlay").forEach((layer) => { layer.style.opacity = opacity.value / 100; });
  });
  blink.addEventListener("click", () => {
    if (timer !== null) {
      window.clearInterval(timer);
      timer = null;
      show(toggle.checked);
    } else {
      timer = window.setInterval(() => show(figures.classList.contains("no-labels")), 700);
    }
    blink.setAttribute("aria-pressed", String(timer !== null));
  });
});

// Tables: a click on a heading sorts by it, a second one turns the order round.
findAll(document, "table[data-sortable]").forEach((table) => {
  const headings = findAll(table, "thead th");
  const body = find(table, "tbody");
  const value = (row, column, type) => {
    const cell = row.cells[column];
    const text = cell.dataset.value ?? cell.textContent.trim();
    return type === "number" ? Number.parseFloat(text) : text;
  };
  headings.forEach((heading, column) => {
    find(heading, "button").addEventListener("click", () => {
      const sign = heading.getAttribute("aria-sort") === "ascending" ? -1 : 1;
      const type = heading.dataset.type;
      headings.forEach((other) => other.removeAttribute("aria-sort"));
      heading.setAttribute("aria-sort", sign === 1 ? "ascending" : "descending");
      const rows = Array.from(body.rows).map((row) => [value(row, column, type), row]);
      rows.sort(([a], [b]) => {
        if (type === "text") return sign * a.localeCompare(b);
        if (Number.isNaN(a) || Number.isNaN(b)) return Number.isNaN(a) - Number.isNaN(b);
        return sign * (a - b);
      });
      body.append(...rows.map(([, row]) => row));
    });
  });
});

// Ratings.
const ratingKey = (scan) => `tlseg-rating:${scan.scan}:${scan.key}`;
const ratings = new Map();
page.scans.forEach((scan) => {
  const form = find(document, `[data-rating="${scan.id}"]`);
  const shown = find(document, `[data-rated="${scan.id}"]`);
  const note = find(form, "textarea");
  const radios = findAll(form, "input[type=radio]");
  const show = (entry) => {
    shown.textContent = entry.rating || "not rated";
    ratings.set(scan.id, entry);
  };
  const saved = store.get(ratingKey(scan));
  const first = { rating: "", note: "", time: "" };
  if (saved && typeof saved === "object") {
    first.rating = radios.some((r) => r.value === saved.rating) ? saved.rating : "";
    first.note = String(saved.note ?? "");
    first.time = String(saved.time ?? "");
  }
  radios.forEach((radio) => { radio.checked = radio.value === first.rating; });
  note.value = first.note;
  show(first);
  const changed = () => {
    const chosen = radios.find((radio) => radio.checked);
    const entry = {
      rating: chosen ? chosen.value : "",
      note: note.value,
      time: new Date().toISOString(),
    };
    show(entry);
    store.set(ratingKey(scan), entry);
  };
  form.addEventListener("input", changed);
  form.addEventListener("submit", (event) => event.preventDefault());
});

const rater = document.getElementById("rater");
if (rater) {
  rater.value = String(store.get("tlseg-rater") ?? "");
  rater.addEventListener("input", () => store.set("tlseg-rater", rater.value));
}

const exportRows = () => page.scans.map((scan) => {
  const entry = ratings.get(scan.id);
  return {
    participant_id: `sub-${page.subject}`,
    session_id: scan.session ? `ses-${scan.session}` : "n/a",
    scan: scan.scan,
    rating: entry.rating || "n/a",
    note: entry.note || "n/a",
    rater: rater.value || "n/a",
    time: entry.time || "n/a",
    content_key: scan.key || "n/a",
    version: page.version,
  };
});

const asTsv = (rows) => {
  const clean = (text) => String(text).replace(/[\t\r\n]+/g, " ");
  const columns = Object.keys(rows[0]);
  return [columns, ...rows.map((row) => columns.map((c) => clean(row[c])))]
    .map((cells) => cells.join("\t")).join("\n") + "\n";
};

findAll(document, "[data-export]").forEach((button) => {
  button.addEventListener("click", () => {
    const kind = button.dataset.export;
    const rows = exportRows();
    const text = kind === "tsv" ? asTsv(rows) : `${JSON.stringify(rows, null, 2)}\n`;
    const type = kind === "tsv" ? "text/tab-separated-values" : "application/json";
    const url = URL.createObjectURL(new Blob([text], { type }));
    const link = document.createElement("a");
    link.href = url;
    link.download = `sub-${page.subject}_ratings.${kind}`;
    link.click();
    window.setTimeout(() => URL.revokeObjectURL(url), 1000);
    const rated = rows.filter((row) => row.rating !== "n/a").length;
    document.getElementById("export-status").textContent =
      `${link.download}: ${rated} of ${rows.length} scan${rows.length === 1 ? "" : "s"} rated`;
  });
});
