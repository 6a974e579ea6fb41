// The interactive viewers. Each starts when it is scrolled into sight; browsers allow only a
// handful of WebGL contexts on a page, so the longest unused one is stopped for a new one.
const MOST_VIEWERS = 4;
const running = [];
// Voxels to the patient's right, front and top that the crosshair goes by.
const STEPS = {
  ArrowLeft: [-1, 0, 0], ArrowRight: [1, 0, 0], ArrowDown: [0, -1, 0], ArrowUp: [0, 1, 0],
  PageDown: [0, 0, -1], PageUp: [0, 0, 1],
};

const bytesOf = (id) => {
  const text = document.getElementById(id).textContent;
  if (!text) return null;
  const binary = window.atob(text);
  const bytes = new Uint8Array(binary.length);
  for (let i = 0; i < binary.length; i += 1) bytes[i] = binary.charCodeAt(i);
  return bytes.buffer;
};

const hasWebGL = () => {
  const context = document.createElement("canvas").getContext("webgl2");
  context?.getExtension("WEBGL_lose_context")?.loseContext();
  return Boolean(context);
};

class Viewer {
  constructor(section, scan) {
    this.section = section;
    this.scan = scan;
    this.protocol = page.protocols[scan.protocol];
    this.controls = {};
    findAll(section, "[data-view]").forEach((element) => {
      this.controls[element.dataset.view] = element;
    });
    this.nv = null;
    this.attempt = 0;
    this.state = "waiting";
    this.listen();
    this.enable(false);
  }

  say(text) {
    this.controls.message.textContent = text;
    this.controls.message.hidden = !text;
  }

  enable(on) {
    ["labels", "opacity", "outline", "scan", "slices", "place"].forEach((name) => {
      this.controls[name].disabled = !on;
    });
  }

  async start() {
    if (this.state === "starting" || this.state === "running" || this.state === "broken") return;
    if (typeof niivue === "undefined") {
      this.fail("The viewer's code is not part of this page (nilearn was without NiiVue when it was made).");
      return;
    }
    if (!hasWebGL()) {
      this.fail("This browser offers no WebGL 2, which the viewer draws with. Turn on hardware acceleration, or use another browser; the pictures above show the same labels.");
      return;
    }
    this.state = "starting";
    this.say("Loading …");
    while (running.length >= MOST_VIEWERS) running[0].stop();
    running.push(this);
    this.attempt += 1; // a stop while it loads, or a new start after that, makes this one void
    const { attempt } = this;
    try {
      await this.load();
      if (attempt !== this.attempt) return;
      this.state = "running";
      this.say("");
      this.enable(true);
      this.apply();
    } catch (error) {
      if (attempt !== this.attempt) return;
      this.fail(`The viewer could not start (${error.message}); the pictures above show the same labels.`);
    }
    this.section.dataset.state = this.state;
  }

  async load() {
    const nv = new niivue.Niivue({
      logLevel: "silent",
      loadingText: "",
      dragAndDropEnabled: false,
      viewModeHotKey: "",
      clipPlaneHotKey: "",
      cycleClipPlaneHotKey: "",
      showAllOrientationMarkers: true,
      show3Dcrosshair: true,
      multiplanarShowRender: niivue.SHOW_RENDER.ALWAYS,
      multiplanarForceRender: true,
      crosshairColor: [1, 1, 1, 0.6],
      crosshairGap: 3,
      crosshairWidth: 0.6,
      crosshairWidthUnit: "percent",
      fontColor: [1, 1, 1, 1],
      backColor: [0, 0, 0, 1],
    });
    this.nv = nv;
    const old = find(this.section, "canvas");
    const canvas = old.cloneNode(false);
    old.replaceWith(canvas);
    canvas.addEventListener("keydown", (event) => this.step(event));
    await nv.attachToCanvas(canvas);
    const scan = bytesOf(`${this.scan.id}-scan-volume`);
    const labels = bytesOf(`${this.scan.id}-label-volume`);
    this.hasScan = scan !== null;
    if (this.hasScan) {
      nv.addVolume(await niivue.NVImage.new(scan, "scan.nii.gz", "gray", 1, null, 0, 255));
    }
    const image = await niivue.NVImage.new(labels, "labels.nii.gz", "gray", 0.5);
    image.setColormapLabel(structuredClone(this.protocol.colormap));
    nv.addVolume(image);
    this.layer = nv.volumes.length - 1;
    nv.onLocationChange = (where) => this.tell(where);
    nv.updateGLVolume();
  }

  listen() {
    const { labels, opacity, outline, scan, slices, place } = this.controls;
    [labels, opacity, scan].forEach((control) => control.addEventListener("input", () => this.apply()));
    outline.addEventListener("input", () => this.apply());
    slices.addEventListener("change", () => this.apply());
    place.addEventListener("change", () => this.goTo(place.value));
  }

  apply() {
    if (this.state !== "running") return;
    const { labels, opacity, outline, scan, slices } = this.controls;
    const kinds = niivue.SLICE_TYPE;
    const kind = {
      multi: kinds.MULTIPLANAR, axial: kinds.AXIAL, coronal: kinds.CORONAL,
      sagittal: kinds.SAGITTAL, render: kinds.RENDER,
    }[slices.value];
    this.controls.stage.classList.toggle("single", slices.value !== "multi");
    this.nv.opts.atlasOutline = outline.checked ? 1 : 0;
    if (this.hasScan) this.nv.setOpacity(0, scan.value / 100);
    this.nv.setOpacity(this.layer, labels.checked ? opacity.value / 100 : 0);
    if (this.nv.opts.sliceType !== kind) this.nv.setSliceType(kind);
    this.nv.drawScene();
  }

  goTo(row) {
    const place = this.scan.places[row];
    if (this.state !== "running" || !place) return;
    this.nv.scene.crosshairPos = this.nv.mm2frac(place);
    this.nv.createOnLocationChange();
    this.nv.drawScene();
  }

  step(event) {
    const step = STEPS[event.key];
    if (!step || event.ctrlKey || event.altKey || event.metaKey || this.state !== "running") return;
    event.preventDefault();
    event.stopImmediatePropagation();
    this.nv.moveCrosshairInVox(...step);
  }

  tell(where) {
    const row = Math.round(where.values[this.layer]?.value ?? 0);
    const mm = Array.from(where.mm).slice(0, 3).map((x) => x.toFixed(0)).join(", ");
    const name = row > 0
      ? `${this.protocol.colormap.labels[row]} (${this.protocol.abbreviation[row]}, label ${this.protocol.index[row]})`
      : "no structure";
    this.controls.where.textContent = `${name} at x, y, z = ${mm} mm`;
  }

  stop() {
    this.attempt += 1;
    running.splice(running.indexOf(this), 1);
    this.nv?.gl?.getExtension("WEBGL_lose_context")?.loseContext();
    this.nv = null;
    this.state = "waiting";
    this.enable(false);
    this.section.dataset.state = this.state;
    this.say("Stopped to make room for another viewer; scroll here again to restart it.");
  }

  fail(text) {
    const at = running.indexOf(this);
    if (at >= 0) running.splice(at, 1);
    this.state = "broken";
    this.section.dataset.state = this.state;
    this.enable(false);
    this.say(text);
  }
}

const viewers = findAll(document, ".scan").map(
  (section) => new Viewer(find(section, "[data-viewer]"), page.scans[Number(section.dataset.scan)]),
);
const sight = new IntersectionObserver((entries) => {
  entries.filter((entry) => entry.isIntersecting).forEach((entry) => {
    viewers.find((viewer) => viewer.section === entry.target).start();
  });
}, { rootMargin: "200px" });
viewers.forEach((viewer) => sight.observe(viewer.section));
