"use strict";
// Draws the scatter plots; the tables and strips are plain markup. Names reach the page as text only.
const root = document.documentElement;
const note = (message) => { root.dataset.errors = (root.dataset.errors || "") + message + "\n"; };
addEventListener("error", (event) => note(event.message));
addEventListener("securitypolicyviolation", (event) => note("blocked: " + event.violatedDirective));

(() => {
  const { themes, shapes, figures } = JSON.parse(document.getElementById("data").textContent);
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const STEPS = 65535;
  let printing = false;
  const theme = () => themes[dark.matches && !printing ? "dark" : "light"];
  const bytes = (packed) => Uint8Array.from(atob(packed), (letter) => letter.charCodeAt(0));
  for (const figure of figures) {
    figure.xy = new Uint16Array(bytes(figure.xy).buffer);
    if (figure.confidence) figure.confidence = bytes(figure.confidence);
    for (const panel of figure.panels) panel.index = new Uint16Array(bytes(panel.index).buffer);
  }

  const plots = [...document.querySelectorAll("canvas")].map((canvas) => {
    const figure = figures[canvas.dataset.figure];
    return { canvas, figure, panel: figure.panels[canvas.dataset.panel], only: null };
  });

  function sprite(series, radius, scale) {
    // One marker, drawn once and stamped for every point; hue and shape as in colours.series.
    const turn = Math.floor(series / shapes.length), hue = series % shapes.length;
    const size = Math.ceil((radius * 1.5 + 1) * 2 * scale), stamp = document.createElement("canvas");
    stamp.width = stamp.height = size;
    const pen = stamp.getContext("2d"), path = new Path2D(shapes[(hue + turn) % shapes.length]);
    pen.translate(size / 2, size / 2);
    pen.scale(radius * scale, radius * scale);
    pen.fillStyle = theme().fills[hue];
    pen.strokeStyle = theme().outlines[hue];
    pen.lineWidth = 0.75 / radius;
    pen.fill(path);
    pen.stroke(path);
    return stamp;
  }

  function draw(plot) {
    const { canvas, figure, panel } = plot, { axes } = figure, colours = theme();
    const width = canvas.clientWidth, height = canvas.clientHeight, scale = devicePixelRatio || 1;
    if (!width || !height) return;
    canvas.width = Math.round(width * scale);
    canvas.height = Math.round(height * scale);
    const pen = canvas.getContext("2d"), count = panel.index.length;
    pen.scale(scale, scale);
    pen.font = "600 12px system-ui, sans-serif";
    pen.textBaseline = "middle";
    const radius = Math.max(2.2, Math.min(4.2, 130 / Math.sqrt(count)));
    const edge = axes ? { left: 48, right: 10, top: 10, bottom: 40 } : { left: 14, right: 14, top: 14, bottom: 14 };
    const x = (unit) => edge.left + unit * (width - edge.left - edge.right);
    const y = (unit) => height - edge.bottom - unit * (height - edge.top - edge.bottom);
    plot.x = x;
    plot.y = y;
    if (axes) drawAxes(pen, axes, x, y, colours);
    const stamps = panel.names.map((_, series) => sprite(series, radius, scale));
    const stamp = (i) => {
      const image = stamps[panel.index[i]], size = image.width / scale;
      const left = x(figure.xy[2 * i] / STEPS) - size / 2, top = y(figure.xy[2 * i + 1] / STEPS) - size / 2;
      pen.drawImage(image, left, top, size, size);
    };
    pen.globalAlpha = plot.only === null ? 1 : 0.12;
    for (let i = 0; i < count; i++) if (panel.index[i] !== plot.only) stamp(i);
    pen.globalAlpha = 1;
    for (let i = 0; i < count; i++) if (panel.index[i] === plot.only) stamp(i);
    const named = axes || plot.only === null ? panel.labels : panel.labels.filter((l) => l[0] === panel.names[plot.only]);
    canvas.dataset.labels = drawLabels(pen, named, x, y, width, height, edge, colours);
    canvas.dataset.points = count;
  }

  function drawAxes(pen, axes, x, y, colours) {
    const unit = (value) => (value - axes.low) / (axes.high - axes.low);
    const line = (x0, y0, x1, y1) => { pen.beginPath(); pen.moveTo(x0, y0); pen.lineTo(x1, y1); pen.stroke(); };
    pen.save();
    pen.font = "12px system-ui, sans-serif";
    pen.fillStyle = colours.muted;
    pen.lineWidth = 1;
    for (const tick of axes.ticks) {
      pen.strokeStyle = tick === 0 ? colours.muted : colours.line;
      line(x(unit(tick)), y(0), x(unit(tick)), y(1));
      line(x(0), y(unit(tick)), x(1), y(unit(tick)));
      pen.textAlign = "center";
      pen.fillText(tick, x(unit(tick)), y(0) + 12);
      pen.textAlign = "right";
      pen.fillText(tick, x(0) - 6, y(unit(tick)));
    }
    pen.textAlign = "center";
    pen.fillText(axes.x, x(0.5), y(0) + 30);
    pen.translate(12, y(0.5));
    pen.rotate(-Math.PI / 2);
    pen.fillText(axes.y, 0, 0);
    pen.restore();
    pen.save();
    pen.strokeStyle = colours.ink;
    pen.setLineDash([6, 4]);
    line(x(0), y(0), x(1), y(1));
    pen.restore();
  }

  function drawLabels(pen, labels, x, y, width, height, edge, colours) {
    // Nearest free place around each anchor, first come first served; one without a place stays in the legend.
    const taken = [], high = 15;
    for (const [name, ux, uy] of labels) {
      const word = name.length > 28 ? name.slice(0, 27) + "…" : name;
      const wide = pen.measureText(word).width + 6, ax = x(ux), ay = y(uy);
      let place = null;
      for (let ring = edge.left > 20 ? 1 : 0; ring < 12 && !place; ring++) {
        for (let turn = 0; turn < (ring ? 12 : 1) && !place; turn++) {
          const angle = (turn * Math.PI) / 6 - Math.PI / 2;
          const cx = ax + Math.cos(angle) * ring * 0.7 * high + (ring ? Math.cos(angle) * wide / 2 : 0);
          const cy = ay + Math.sin(angle) * ring * 0.9 * high;
          const box = [cx - wide / 2, cy - high / 2, cx + wide / 2, cy + high / 2];
          const inside = box[0] >= edge.left - 12 && box[1] >= 0 && box[2] <= width && box[3] <= height - edge.bottom + 12;
          const free = taken.every((t) => box[2] < t[0] || t[2] < box[0] || box[3] < t[1] || t[3] < box[1]);
          if (inside && free) place = { cx, cy, box };
        }
      }
      if (!place) continue;
      taken.push(place.box);
      const [left, top, right, bottom] = place.box;
      const nearX = Math.max(left, Math.min(ax, right)), nearY = Math.max(top, Math.min(ay, bottom));
      if (Math.hypot(nearX - ax, nearY - ay) > 5) {
        pen.strokeStyle = colours.ink;
        pen.lineWidth = 0.8;
        pen.beginPath();
        pen.moveTo(ax, ay);
        pen.lineTo(nearX, nearY);
        pen.stroke();
      }
      pen.textAlign = "center";
      pen.lineWidth = 4;
      pen.lineJoin = "round";
      pen.strokeStyle = colours.panel;
      pen.strokeText(word, place.cx, place.cy);
      pen.fillStyle = colours.ink;
      pen.fillText(word, place.cx, place.cy);
    }
    return taken.length;
  }

  function nearest(plot, px, py) {
    let best = -1, least = 14 * 14;
    for (let i = 0; i < plot.panel.index.length; i++) {
      const dx = plot.x(plot.figure.xy[2 * i] / STEPS) - px, dy = plot.y(plot.figure.xy[2 * i + 1] / STEPS) - py;
      if (dx * dx + dy * dy < least) { least = dx * dx + dy * dy; best = i; }
    }
    return best;
  }

  function words(figure, i) {
    const lines = figure.panels.map((panel) => `${panel.title}: ${panel.names[panel.index[i]]}`);
    if (figure.confidence) lines.push(`confidence: ${(figure.confidence[i] / 100).toFixed(2)}`);
    if (figure.axes) {
      const { low, high } = figure.axes;
      const value = (at) => (low + (figure.xy[2 * i + at] / STEPS) * (high - low)).toFixed(2);
      return `${figure.points[i]}\ntrue shift: ${value(0)}\npredicted shift: ${value(1)}`;
    }
    return lines.join("\n");
  }

  function show(plot, event) {
    const box = plot.canvas.getBoundingClientRect(), tip = plot.canvas.nextElementSibling;
    const i = nearest(plot, event.clientX - box.left, event.clientY - box.top);
    tip.hidden = i < 0;
    if (i < 0) return;
    tip.textContent = words(plot.figure, i);
    const px = plot.x(plot.figure.xy[2 * i] / STEPS), py = plot.y(plot.figure.xy[2 * i + 1] / STEPS);
    tip.style.left = Math.max(0, Math.min(px + 12, box.width - tip.offsetWidth)) + "px";
    tip.style.top = (py + 14 + tip.offsetHeight < box.height ? py + 14 : Math.max(0, py - 10 - tip.offsetHeight)) + "px";
  }

  const drawAll = () => plots.forEach(draw);
  for (const plot of plots) {
    for (const kind of ["pointermove", "pointerdown"]) plot.canvas.addEventListener(kind, (event) => show(plot, event));
    plot.canvas.addEventListener("pointerleave", () => { plot.canvas.nextElementSibling.hidden = true; });
    new ResizeObserver(() => draw(plot)).observe(plot.canvas);
  }
  for (const button of document.querySelectorAll(".legend button")) {
    button.addEventListener("click", () => {
      const { figure, panel, series } = button.dataset;
      const plot = plots.find((p) => p.canvas.dataset.figure === figure && p.canvas.dataset.panel === panel);
      plot.only = plot.only === Number(series) ? null : Number(series);
      for (const other of button.closest("ul").querySelectorAll("button"))
        other.setAttribute("aria-pressed", String(plot.only === Number(other.dataset.series)));
      draw(plot);
    });
  }
  dark.addEventListener("change", drawAll);
  addEventListener("beforeprint", () => { printing = true; drawAll(); });
  addEventListener("afterprint", () => { printing = false; drawAll(); });
  drawAll();
  root.dataset.ready = "true";
})();
