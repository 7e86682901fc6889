// What the report does in a browser: hands the trace's numbers to Plotly, and redoes sums when a stretch of time is chosen.
"use strict";
(() => {
  const D = JSON.parse(document.getElementById("data").textContent);
  const $ = id => document.getElementById(id);
  const P = D.pageSize, n = D.edges.length - 1, last = D.edges[n] || 0;
  // Safe for colour-blind readers: Okabe and Ito's colours, without their black and yellow.
  const COLOURS = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#7F7FC9", "#8C6D31", "#8A94A3"];
  const escaped = text => text.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
  const sum = list => list.reduce((a, b) => a + b, 0);
  const digits = value => value >= 100 ? value.toFixed(0) : (value >= 10 ? value.toFixed(1) : value.toPrecision(3)).replace(/\.0*$|(\.\d*?)0+$/, "$1");
  function size(bytes) {
    const units = ["bytes", "KiB", "MiB", "GiB", "TiB"];
    let i = 0;
    while (bytes >= 1024 && i < 4) { bytes /= 1024; i++; }
    return (i ? digits(bytes) : String(Math.round(bytes))) + " " + units[i];
  }
  const time = s => !(s > 0) ? "0 s" : s < 0.001 ? digits(s * 1e6) + " µs" : s < 1 ? digits(s * 1e3) + " ms" : s < 120 ? digits(s) + " s" : s < 7200 ? digits(s / 60) + " min" : digits(s / 3600) + " h";
  const speed = b => b >= 1e9 ? digits(b / 1e9) + " GB/s" : digits(b / 1e6) + " MB/s";
  const percent = x => x >= 0.995 || x === 0 ? Math.round(x * 100) + " %" : x >= 0.1 ? Math.round(x * 100) + " %" : (x * 100).toPrecision(2) + " %";

  // The grid: 16 bits for each row and column, a logarithm of page writes.
  const packed = atob(D.grid), grid = [];
  for (let r = 0, at = 0; r < D.rows.first.length; r++) {
    const row = [];
    for (let c = 0; c < n; c++, at += 2) {
      const code = packed.charCodeAt(at) | packed.charCodeAt(at + 1) << 8;
      row.push(code ? Math.round(2 ** ((code - 1) / D.steps)) : 0);
    }
    grid.push(row);
  }

  // Different pages written from the beginning of one column to the beginning of another, as Digest.unions has them:
  // "before" says of each column's writes in which column the same page was written before, or that it never was.
  const bytes = atob(D.before), unions = Array.from({ length: n + 1 }, () => new Float64Array(n + 1));
  for (let c = 0, at = 0; c < n; c++) {
    for (let i = 0, found = 0; i <= c; i++) {
      let count = 0, unit = 1, byte;
      do { byte = bytes.charCodeAt(at++); count += (byte & 127) * unit; unit *= 128; } while (byte > 127);
      found += count;
      unions[i][c + 1] = unions[i][c] + found;
    }
  }
  // Digest._between, Digest.what_if and Digest.snapshot: the same steps, so the same figures.
  function between(start, end) {
    let column = 0, partly = 0;
    while (column < n && D.edges[column + 1] < start) column++;
    for (let first = column; column < n; column++) {
      const began = D.edges[column], ended = D.edges[column + 1];
      const share = (Math.min(end, ended) - Math.max(start, began)) / (ended - began);
      if (share < 1) {
        partly += share * (unions[first][column + 1] - unions[first][column]);
        if (ended < end) first = column + 1;
      } else if (ended >= end) return unions[first][column + 1] + partly;
      if (ended >= end) return unions[first][column] + partly;
    }
    return null;
  }
  function whatIf(bandwidth, downtime, start) {
    const rounds = [];
    let rest = D.npages, clock = 0, now = start;
    const result = verdict => ({ verdict, rounds, rest, clock, downtime: rest * P / bandwidth });
    while (rest * P / bandwidth > downtime) {
      const seconds = rest * P / bandwidth;
      if (rounds.length === 30) return result("does not converge");
      const fresh = between(now, now + seconds);
      now += seconds;
      if (fresh === null) return result("unknown");
      const dirtied = Math.min(D.npages, Math.ceil(fresh));
      rounds.push({ start: clock, pages: rest, seconds, dirtied });
      clock += seconds;
      rest = dirtied;
    }
    return result("converges");
  }
  function snapshot(every, start, until) {
    const sizes = [];
    while (start + (sizes.length + 1) * every <= until + every / 2000) {
      const found = between(start + sizes.length * every, Math.min(start + (sizes.length + 1) * every, until));
      if (found === null) break;
      sizes.push(found);
    }
    return sizes.length ? sum(sizes) / sizes.length : null;
  }

  let from = 0, to = last, dark = false, ink, faint, line, paper, blue;
  const narrow = () => document.documentElement.clientWidth < 640;
  let printing = false;
  function look() {
    dark = !printing && matchMedia("(prefers-color-scheme: dark)").matches && !matchMedia("print").matches;
    blue = dark ? "#56B4E9" : "#0072B2";
    [ink, faint, line, paper] = dark ? ["#e6eaf0", "#9aa6b6", "#2c3644", "#10151d"] : ["#1a2230", "#5b6676", "#dde2e9", "#ffffff"];
  }
  const CONFIG = { responsive: true, displaylogo: false, displayModeBar: false, scrollZoom: false, doubleClick: "reset" };
  function layout(more) {
    const axis = { gridcolor: line, linecolor: line, zerolinecolor: line, tickcolor: line, tickfont: { color: faint, size: 11 }, title: { font: { color: faint, size: 12 }, standoff: 8 }, automargin: true };
    const merged = Object.assign({
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { color: ink, family: 'system-ui, "Segoe UI", sans-serif', size: 12 },
      margin: { l: 56, r: 12, t: 10, b: 42 }, hovermode: "closest", dragmode: matchMedia("(pointer: coarse)").matches ? false : "zoom", showlegend: false,
      hoverlabel: { bgcolor: dark ? "#2c3644" : "#ffffff", bordercolor: faint, font: { color: ink, size: 12 }, align: "left" },
      legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0, font: { size: 11 } }, bargap: 0.25,
    }, more);
    for (const name of ["xaxis", "yaxis"]) {
      const own = merged[name] || {};
      merged[name] = Object.assign({}, axis, own, { title: Object.assign({}, axis.title, { text: own.title || "" }) });
    }
    return merged;
  }
  const timeAxis = more => Object.assign({ range: [from, to], title: "seconds since the recording began", minallowed: 0, maxallowed: last, showgrid: false }, more);

  function drawMap() {
    const z = [], hover = [], y = [0], ticks = [], names = [], shapes = [];
    const edges = D.rows.edges;
    D.blocks.forEach((block, b) => {
      const low = edges[block.start], high = edges[block.end];
      if (D.named) {
        ticks.push((low + high) / 2);
        names.push(escaped(narrow() ? block.brief : block.label));
      } else for (let i = 0; i <= 4; i++) {
        const r = Math.min(block.end - 1, Math.round(i * (block.end - block.start) / 4));
        ticks.push(edges[i < 4 ? r : block.end]);
        names.push("page " + (i < 4 ? D.rows.first[r] : D.rows.last[r]).toLocaleString("en"));
      }
      for (let r = block.start; r < block.end; r++) {
        const share = [], said = [];
        for (let c = 0; c < n; c++) {
          const found = grid[r][c], part = found / (D.rows.npages[r] * D.columnEpochs[c]);
          share.push(found ? Math.max(Math.log10(part), -3) : null);
          said.push(escaped(block.name) + "<br>pages " + D.rows.first[r].toLocaleString("en") + " to " + D.rows.last[r].toLocaleString("en") +
            "<br>" + time(D.edges[c]) + " to " + time(D.edges[c + 1]) + (D.columnEpochs[c] > 1 ? ", " + D.columnEpochs[c] + " harvests" : "") +
            "<br>" + size(found * P) + " written, " + percent(part) + " of these pages" + (D.columnInexact[c] ? "<br>not exact: an upper bound" : ""));
        }
        z.push(share); hover.push(said); y.push(edges[r + 1]);
      }
      if (b) shapes.push({ type: "line", xref: "paper", x0: 0, x1: 1, y0: low, y1: low, line: { color: paper, width: 2 } });
    });
    D.columnInexact.forEach((bad, c) => { if (bad) shapes.push({ type: "rect", yref: "paper", y0: 0, y1: 1, x0: D.edges[c], x1: D.edges[c + 1], line: { width: 0 }, fillcolor: "rgba(213,94,0,.25)", layer: "below" }); });
    const bar = { title: { text: "share of pages written in a harvest", side: "right" }, tickvals: [-3, -2, -1, 0], ticktext: ["0.1 %", "1 %", "10 %", "100 %"], thickness: 12, outlinewidth: 0, tickfont: { color: faint, size: 11 } };
    if (narrow()) Object.assign(bar, { orientation: "h", y: 1, yanchor: "bottom", thickness: 8, title: { text: "share of pages written", side: "top" } });
    return Plotly.react("map", z.length ? [{ type: "heatmap", x: D.edges, y, z, text: hover, hoverinfo: "text", colorscale: "Viridis", reversescale: !dark, zmin: -3, zmax: 0, hoverongaps: false, colorbar: bar }] : [],
      layout({ xaxis: timeAxis(), yaxis: { tickvals: ticks, ticktext: names, fixedrange: true, showgrid: false, zeroline: false, range: [0, 1] }, shapes, plot_bgcolor: dark ? "#161d27" : "#f3f5f8", margin: { l: 40, r: 8, t: narrow() ? 56 : 8, b: 42 } }), CONFIG);
  }

  const W = D.windows.length - 1, width = W > 0 ? D.windows[1] - D.windows[0] : 0;
  const middles = D.windows.slice(1).map((edge, i) => (edge + D.windows[i]) / 2);
  const totals = middles.map((_, i) => sum(D.regionPages.map(row => row[i])));
  const MiB = pages => pages * P / 2 ** 20;
  // A peak is over windows of one length: a second, or what is nearest to it.
  const many = Math.max(1, Math.min(W, Math.round(Math.max(1, D.interval) / (width || 1))));
  function rolling(count) {
    const means = [];
    let inside = 0;
    totals.forEach((value, i) => { inside += value - (i >= count ? totals[i - count] : 0); means.push(i >= count - 1 ? MiB(inside / (count * width)) : null); });
    return means;
  }
  const long = Math.min(W, many * 10);
  // A value for each window, drawn from its beginning to its end: the last is drawn to where it ends.
  const steps = values => values.concat(values.slice(-1));
  function drawRate() {
    const said = middles.map((m, i) => time(D.windows[i]) + " to " + time(D.windows[i + 1]) + ": " + size(totals[i] * P / width) + " per second");
    const traces = [{ type: "scatter", mode: "lines", name: "windows of " + time(width), x: D.windows, y: steps(totals.map(t => MiB(t / width))), fill: "tozeroy", line: { shape: "hv", width: 1, color: blue }, fillcolor: dark ? "rgba(86,180,233,.35)" : "rgba(0,114,178,.35)", text: steps(said), hoverinfo: "text" }];
    if (many > 1 && many < W) traces.push({ type: "scatter", mode: "lines", name: "mean over " + time(many * width), x: middles.map(m => m - (many - 1) * width / 2), y: rolling(many), line: { width: 2, color: "#E69F00" }, hoverinfo: "skip" });
    if (long > many && long < W / 2) traces.push({ type: "scatter", mode: "lines", name: "mean over " + time(long * width), x: middles.map(m => m - (long - 1) * width / 2), y: rolling(long), line: { width: 2, dash: "dash", color: "#D55E00" }, hoverinfo: "skip" });
    return Plotly.react("rate", W > 0 ? traces : [], layout({ showlegend: true, xaxis: timeAxis({ title: "", rangeslider: { visible: true, thickness: 0.16, bgcolor: dark ? "#161d27" : "#f3f5f8", bordercolor: line, borderwidth: 1, range: [0, last] } }), yaxis: { title: "MiB per second", rangemode: "tozero", fixedrange: true }, margin: { l: 56, r: 12, t: 28, b: 24 } }), CONFIG);
  }
  function drawRegions() {
    const traces = D.regionNames.map((name, i) => ({ type: "scatter", mode: "lines", stackgroup: "all", name: escaped(narrow() ? D.regionBriefs[i] : name), x: D.windows, y: steps(D.regionPages[i].map(v => MiB(v / width))), line: { shape: "hv", width: 0.5, color: COLOURS[i % 9] }, fillcolor: COLOURS[i % 9], text: steps(D.regionPages[i].map(v => escaped(name) + ": " + size(v * P / width) + " per second")), hoverinfo: "text" }));
    return Plotly.react("regions", W > 0 ? traces : [], layout({ showlegend: true, legend: Object.assign({ orientation: "h", y: 1.02, yanchor: "bottom", x: 0, font: { size: 11 }, traceorder: "normal" }, narrow() ? { entrywidth: 0.48, entrywidthmode: "fraction" } : {}), xaxis: timeAxis(), yaxis: { title: "MiB per second", rangemode: "tozero", fixedrange: true } }), CONFIG);
  }

  // ---- what follows the chosen time ----
  function columns() {
    let a = 0, b = n;
    while (a < n - 1 && D.edges[a + 1] <= from) a++;
    while (b > a + 1 && D.edges[b - 1] >= to) b--;
    return [a, b];
  }
  function curve(a, b) {
    const points = [];
    for (const level of D.levels) {
      let pages = 0, seconds = 0, count = 0;
      level.pages.forEach((found, i) => {
        const x = i * level.span, y = x + level.span;
        if (x >= a && y <= b) { pages += found; seconds += D.edges[y] - D.edges[x]; count += level.groups; }
      });
      if (count && seconds > 0) points.push({ seconds: seconds / count, pages: pages / count });
    }
    return points;
  }
  let points = [], chosen = [0, last];
  function small(id, x, y, said, title, ytitle, more) {
    if (more.type === "bar") more.textposition = "none";
    return Plotly.react(id, [Object.assign({ x, y, text: said, hoverinfo: "text", marker: { color: blue }, line: { color: blue, width: 2 } }, more)],
      layout({ dragmode: false, xaxis: { title, type: more.type === "bar" ? "category" : "log", dtick: more.type === "bar" ? undefined : 1, fixedrange: true }, yaxis: { title: ytitle, rangemode: "tozero", fixedrange: true, ticksuffix: ytitle === "share" ? " %" : "" } }), CONFIG);
  }
  function update() {
    const [a, b] = columns(), all = a === 0 && b === n;
    const begin = D.edges[a] || 0, end = D.edges[b] || 0, seconds = end - begin, pages = sum(D.columnPages.slice(a, b));
    $("selected").textContent = all ? "Whole recording: " + time(last) : "Selected: " + digits(begin) + " s to " + digits(end) + " s, " + time(seconds);
    $("all").hidden = all;
    points = curve(a, b);
    chosen = [begin, end];
    $("n-rate").textContent = size(seconds > 0 ? pages * P / seconds : 0);
    const inside = totals.filter((_, i) => middles[i] >= begin && middles[i] <= end);
    const peaks = D.columnPeaks.slice(a, b).filter(peak => peak !== null);
    $("n-peak").textContent = peaks.length ? "peak " + size(Math.max(...peaks) * P) + " per second, over windows of " + time(Math.max(1, D.interval)) : "too short for a peak: it would be over windows of a second";
    const set = unions[a] ? unions[a][b] : 0;
    $("n-set").textContent = (D.sampled ? "about " : "") + size(set * P);
    $("n-set-note").textContent = "different pages written in " + time(seconds) + ", " + percent(set / (D.memory || 1)) + " of " + size(D.memory * P);
    let hot = -1, most = 0;
    D.regionPages.forEach((row, i) => { const found = sum(row.filter((_, j) => middles[j] >= begin && middles[j] <= end)); if (found > most && !D.regionRest[i]) { most = found; hot = i; } });
    $("n-hot").textContent = hot < 0 ? "none" : D.regionNames[hot];
    const part = sum(inside);
    $("n-hot-note").textContent = hot < 0 ? "nothing was written" : percent(most / (part || 1)) + " of what was written";
    showSnapshot();
    // The same pages again.
    const bins = Array.from(D.gaps[0] || [0], (_, i) => sum(D.gaps.slice(a, b).map(row => row[i]))), writes = sum(bins);
    const step = seconds / (sum(D.columnEpochs.slice(a, b)) || 1);
    const names = bins.map((_, i) => i === 0 ? "first time" : "≤ " + time(step * (2 ** i - 1)));
    const order = [...bins.keys()].slice(1).concat(0);
    small("again", order.map(i => names[i]), order.map(i => writes ? 100 * bins[i] / writes : 0), order.map(i => names[i] + ": " + percent(writes ? bins[i] / writes : 0) + ", " + size(bins[i] * P)), "time since the last write of that page", "share", { type: "bar" });
    const again = writes ? 1 - bins[0] / writes : 0;
    $("again-note").textContent = writes ? "To write a page again makes no new page dirty: " + percent(again) + " of the writes seen in this time went to pages that had been written before, and a written page was found written " + digits(pages / (set || 1)) + " times on average." : "Nothing was written.";
    small("snap", points.map(p => p.seconds), points.map(p => MiB(p.pages)), points.map(p => "every " + time(p.seconds) + ": " + size(p.pages * P)), "seconds between snapshots", "MiB", { type: "scatter", mode: "lines+markers" });
    small("store", points.map(p => p.seconds), points.map(p => MiB(p.pages * 60 / p.seconds)), points.map(p => "every " + time(p.seconds) + ": " + size(p.pages * P * 60 / p.seconds) + " per minute"), "seconds between snapshots", "MiB per minute", { type: "scatter", mode: "lines+markers" });
    migrate();
  }
  function showSnapshot() {
    const pages = snapshot(Number($("every").value), ...chosen);
    $("n-snap").textContent = pages === null ? "unknown" : size(pages * P);
    $("n-snap-note").textContent = pages === null ? "the selected time is shorter than that" : "what changes on average from one to the next";
  }
  function migrate() {
    const bandwidth = D.speeds[$("bw").value], downtime = D.pauses[$("dt").value], start = chosen[0];
    const found = whatIf(bandwidth, downtime, start), rounds = found.rounds, many = rounds.length + (rounds.length === 1 ? " round" : " rounds");
    $("bw-value").textContent = speed(bandwidth); $("dt-value").textContent = time(downtime);
    $("bw").setAttribute("aria-valuetext", speed(bandwidth)); $("dt").setAttribute("aria-valuetext", time(downtime));
    $("verdict").textContent = found.verdict === "converges" ? "It converges: " + many + " in " + time(found.clock) + ", then a pause of " + time(found.downtime) + "." :
      found.verdict === "unknown" ? "Unknown: round " + (rounds.length + 1) + " would last from " + time(start + found.clock) + " to " + time(start + found.clock + found.downtime) + ", and the recording ends at " + time(last) + ". A higher bandwidth or a longer recording would tell." :
        "It does not converge: after " + many + " " + size(found.rest * P) + " are left, a pause of " + time(found.downtime) + ".";
    const bars = rounds.map((r, i) => Object.assign({ name: "round " + (i + 1), colour: blue }, r));
    bars.push(found.verdict === "unknown" ? { name: "round " + (rounds.length + 1) + ": unknown", pages: found.rest, seconds: found.downtime, colour: COLOURS[8] } : { name: "pause", pages: found.rest, seconds: found.downtime, colour: COLOURS[5] });
    $("rounds").forecast = found;
    return Plotly.react("rounds", [{ type: "bar", x: bars.map(r => r.name), y: bars.map(r => MiB(r.pages)), text: bars.map(r => r.name + ": " + size(r.pages * P) + " in " + time(r.seconds)), textposition: "none", hoverinfo: "text", marker: { color: bars.map(r => r.colour) } }],
      layout({ dragmode: false, xaxis: { type: "category", fixedrange: true }, yaxis: { title: "MiB sent", rangemode: "tozero", fixedrange: true } }), CONFIG);
  }

  const TIMED = ["map", "rate", "regions"];
  let busy = false;
  async function choose(x, y) {
    if (busy) return;
    busy = true;
    from = Math.max(0, Math.min(x, y)); to = Math.min(last, Math.max(x, y));
    if (!(to > from)) { from = 0; to = last; }
    await Promise.all(TIMED.map(id => Plotly.relayout(id, { "xaxis.range": [from, to] })));
    update();
    busy = false;
  }
  let shape = null;
  async function draw() {
    look();
    // Plotly keeps a colour bar that stood the other way, and its room: after a phone was turned, the map begins anew.
    if (shape !== null && shape !== narrow()) { Plotly.purge("map"); heard = heard.filter(id => id !== "map"); }
    shape = narrow();
    await Promise.all([drawMap(), drawRate(), drawRegions()]);
    small("often", D.often.map((_, i) => i ? 2 ** i + " to " + (2 ** (i + 1) - 1) : "1"), D.often.map(v => D.distinct ? 100 * v / D.distinct : 0), D.often.map((v, i) => size(v * P) + " in " + (i ? 2 ** i + " to " + (2 ** (i + 1) - 1) : 1) + " harvests"), "harvests that found it written", "share", { type: "bar" });
    update();
    listen();
    document.documentElement.dataset.drawn = (narrow() ? "narrow " : "wide ") + (dark ? "dark" : "light");
  }
  if (D.program) [from, to] = D.program;
  const place = location.hash.match(/^#t=([\d.]+),([\d.]+)$/);
  if (place) { from = Math.min(last, Number(place[1])); to = Math.min(last, Number(place[2])); if (!(to > from)) { from = 0; to = last; } }
  for (const s of D.rhythms) $("every").append(new Option(time(s), s));
  // Of few snapshots the mean says little.
  $("every").value = D.rhythms.filter(s => s <= 10 && 3 * s <= last).pop() || D.rhythms[0];
  $("every").addEventListener("change", showSnapshot);
  for (const [id, values, at] of [["bw", D.speeds, D.speed], ["dt", D.pauses, D.pause]]) Object.assign($(id), { min: 0, max: values.length - 1, step: 1, value: at });
  for (const id of ["bw", "dt"]) $(id).addEventListener("input", migrate);
  for (const b of D.presets) {
    const button = document.createElement("button");
    button.textContent = speed(b);
    button.addEventListener("click", () => { $("bw").value = D.speeds.indexOf(b); migrate(); });
    $("presets").append(button, " ");
  }
  $("rate-note").textContent = W > 0 ? "The steps are windows of " + time(width) + "; the peak above is over windows of " + time(Math.max(1, D.interval)) + "." : "";
  $("all").addEventListener("click", () => choose(0, last));
  let heard = [];
  function listen() {
    for (const id of TIMED.filter(id => !heard.includes(id))) $(id).on("plotly_relayout", event => {
      if (event["xaxis.autorange"]) choose(0, last);
      else if (event["xaxis.range"]) choose(...event["xaxis.range"]);
      else if ("xaxis.range[0]" in event) choose(event["xaxis.range[0]"], event["xaxis.range[1]"]);
    });
    heard = [...TIMED];
  }
  draw();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  // A phone that is turned.
  matchMedia("(max-width: 639.5px)").addEventListener("change", draw);
  const fit = () => document.querySelectorAll(".chart").forEach(chart => Plotly.Plots.resize(chart));
  addEventListener("beforeprint", () => { printing = true; draw().then(fit); });
  addEventListener("afterprint", () => { printing = false; draw().then(fit); });
})();
