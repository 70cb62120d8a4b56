// --- charts.js: where the time went, from the journals: when each batch was started, when its
// --- images were journaled, and how long the pipeline took.

const NO_TIMES = "The journals of this job say no times.";

/** Three digits that count. */
const rounded = (value) => Number(value.toPrecision(3)).toLocaleString("en");

/** Time of the job → place on an axis, without the pauses between attempts. */
class Axis {
  constructor(runs) {
    const attempts = new Map();
    for (const run of runs) {
      if (run.begin === null) continue;
      const span = attempts.get(run.attempt) ?? { attempt: run.attempt, begin: Infinity, end: 0 };
      span.begin = Math.min(span.begin, run.begin);
      span.end = Math.max(span.end, run.end);
      attempts.set(run.attempt, span);
    }
    this.spans = [...attempts.values()].filter((span) => span.end > span.begin)
      .sort((a, b) => a.begin - b.begin);
    let before = 0;
    for (const span of this.spans) {
      span.place = before;
      before += span.end - span.begin;
    }
    this.length = before;
  }

  at(time) {
    for (const span of this.spans) {
      if (time <= span.end) return span.place + Math.max(0, time - span.begin);
    }
    return this.length;
  }
}

function showTimes(box, table) {
  const axis = new Axis(table.data.runs);
  const parts = [h("h2", {}, "Ranks")];
  if (axis.length > 0) {
    parts.push(legend(), timeline(table, axis), h("h2", {}, "Images per minute"), rateChart(table, axis));
  } else parts.push(h("p", { class: "soft" }, NO_TIMES));
  parts.push(h("h2", {}, "Pipeline seconds of an image, by size and steps"), secondsTable(table));
  box.replaceChildren(...parts);
}

const legend = () => h("div", { class: "legend" },
  ...[["starting", "before the first batch"], ["generating", "generating"], ["saving", "waiting for its file"],
    ["broken", "failed"]].map(([name, text]) => h("span", {}, h("i", { class: name }), text)),
  h("span", {}, "empty: idle, or not running"));

/** Pixels of a rank's line in the timeline, and of what stands below all of them. */
const LINE = 26, BELOW = 22;

/** A line for each rank: what it did when. Drawn anew when its width changes. */
function timeline(table, axis) {
  const canvas = h("canvas", { role: "img", "aria-label": "Timeline of the ranks" });
  canvas.style.height = `${table.ranks.length * LINE + BELOW}px`;
  new ResizeObserver(() => drawTimeline(canvas, table, axis)).observe(canvas);
  return canvas;
}

function drawTimeline(canvas, table, axis) {
  const line = LINE, left = 64, bottom = BELOW, { ranks } = table;
  const width = canvas.clientWidth, height = ranks.length * line + bottom, scale = devicePixelRatio;
  if (width === 0) return;
  canvas.width = width * scale;
  canvas.height = height * scale;
  const paint = canvas.getContext("2d"), colors = getComputedStyle(canvas);
  const color = (name) => colors.getPropertyValue(`--${name}`);
  paint.scale(scale, scale);
  paint.font = "12px system-ui, sans-serif";
  paint.textBaseline = "middle";
  const place = (time) => left + (axis.at(time) / axis.length) * (width - left - 8);
  const bar = (rank, from, to, name, inset) => {
    const x = place(from);
    paint.fillStyle = color(name);
    paint.fillRect(x, rank * line + 3 + inset, Math.max(0.6, place(to) - x), line - 6 - 2 * inset);
  };
  const lineOf = new Map(ranks.map((rank, k) => [rank, k]));
  ranks.forEach((rank, k) => {
    paint.fillStyle = color("empty");
    paint.fillRect(left, k * line + 3, width - left - 8, line - 6);
    paint.fillStyle = color("soft");
    paint.fillText(`rank ${rank}`, 0, k * line + line / 2);
  });
  const firstStart = table.data.runs.map(() => Infinity);
  for (let row = 0; row < table.size; row += 1) {
    const run = table.run[row];
    if (run >= 0 && table.start[row] !== null) {
      firstStart[run] = Math.min(firstStart[run], table.start[row]);
    }
  }
  table.data.runs.forEach((run, k) => {
    if (run.begin !== null && firstStart[k] > run.begin) {
      bar(lineOf.get(run.rank), run.begin, Math.min(firstStart[k], run.end), "warn", 0);
    }
  });
  for (const [from, to, name] of [["ready", "end", "good"], ["start", "ready", "accent"]]) {
    for (let row = 0; row < table.size; row += 1) {
      const run = table.runOf(row);
      if (run === null || table.start[row] === null || table.end[row] === null) continue;
      const shade = table.status[row] === FAILED ? "bad" : name;
      bar(lineOf.get(run.rank), table[from][row], table[to][row], shade, 0);
    }
  }
  paint.fillStyle = color("soft");
  for (const span of axis.spans) {
    const x = place(span.begin + 1e-6);
    if (axis.spans.length > 1) paint.fillRect(x, 0, 1, ranks.length * line);
    paint.fillText(axis.spans.length > 1 ? `attempt ${span.attempt + 1}` : "0 s", x + 2, height - bottom / 2);
  }
  paint.textAlign = "right";
  paint.fillText(duration(axis.length), width - 8, height - bottom / 2);
}

function rateChart(table, axis) {
  const bins = Math.max(1, Math.min(60, Math.ceil(axis.length)));
  const counts = new Array(bins).fill(0);
  for (let row = 0; row < table.size; row += 1) {
    if (table.status[row] !== MADE || table.end[row] === null) continue;
    counts[Math.min(bins - 1, Math.floor((axis.at(table.end[row]) / axis.length) * bins))] += 1;
  }
  const minutes = axis.length / bins / 60;
  const made = counts.reduce((a, b) => a + b, 0);
  return h("div", {},
    barChart(counts.map((count) => count / minutes), (value) => `${rounded(value)} images/min`),
    h("p", { class: "soft" }, `${plural(made, "image")} in ${duration(axis.length)} of running: `
      + `${rounded(made / (axis.length / 60))} a minute on average`));
}

/** Bars of these heights; `describe(value)` is the text of the highest. */
function barChart(values, describe, width = 720, height = 120) {
  const top = Math.max(...values), each = width / values.length;
  const chart = svg("svg", { viewBox: `0 0 ${width} ${height + 16}`, width, role: "img" });
  values.forEach((value, k) => {
    const tall = top > 0 ? (value / top) * height : 0;
    const bar = svg("rect", { class: "bar", x: k * each, width: Math.max(1, each - 1), y: 16 + height - tall, height: tall });
    bar.append(svg("title", {}, describe(value)));
    chart.append(bar);
  });
  chart.append(svg("line", { class: "axis", x1: 0, x2: width, y1: height + 15.5, y2: height + 15.5 }),
    svg("text", { x: 0, y: 11 }, `highest: ${describe(top)}`));
  return chart;
}

function secondsTable(table) {
  const groups = new Map();
  for (let row = 0; row < table.size; row += 1) {
    if (table.status[row] !== MADE || table.seconds[row] === null) continue;
    const { width, height, num_inference_steps: steps } = table.parameters(row);
    const size = width || height ? `${width ?? "default"} × ${height ?? "default"}` : "default size";
    const name = `${size}, ${steps === undefined ? "default steps" : plural(steps, "step")}`;
    if (!groups.has(name)) groups.set(name, []);
    groups.get(name).push(table.seconds[row]);
  }
  if (groups.size === 0) return h("p", { class: "soft" }, "No image has been made yet.");
  const rows = [...groups].map(([name, seconds]) => {
    seconds.sort((a, b) => a - b);
    const at = (share) => seconds[Math.min(seconds.length - 1, Math.floor(share * seconds.length))];
    return h("tr", {}, h("td", {}, name), h("td", {}, seconds.length.toLocaleString("en")),
      ...[seconds[0], at(0.5), at(0.95), seconds.at(-1)].map((value) => h("td", {}, duration(value))),
      h("td", {}, distribution(seconds)));
  });
  return h("div", { class: "wide" }, h("table", { class: "seconds" },
    h("tr", {}, ...["size and steps", "images", "fastest", "median", "95 %", "slowest", "distribution"]
      .map((name) => h("th", { scope: "col" }, name))), ...rows));
}

/** A small histogram of sorted values, between the first and the last. */
function distribution(values) {
  const bins = 24, counts = new Array(bins).fill(0), low = values[0], wide = values.at(-1) - low;
  for (const value of values) {
    counts[wide > 0 ? Math.min(bins - 1, Math.floor(((value - low) / wide) * bins)) : 0] += 1;
  }
  const top = Math.max(...counts);
  return svg("svg", { viewBox: "0 0 144 28", width: 144, role: "img" }, ...counts.map((count, k) =>
    svg("rect", { class: "bar", x: k * 6, width: 5, y: 28 - (count / top) * 28, height: (count / top) * 28 })));
}
