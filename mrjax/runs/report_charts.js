// Charts of the report, drawn as SVG at the width of their place.
// Names and numbers reach the page as text nodes and attributes only, never as markup.
'use strict';

const report = JSON.parse(document.getElementById('data').textContent);

// Returns an element; strings among the children become text nodes.
function element(tag, attributes, ...children) {
  const svgTags = /^(svg|g|path|line|rect|circle|text)$/;
  const node = svgTags.test(tag)
    ? document.createElementNS('http://www.w3.org/2000/svg', tag)
    : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (name.startsWith('on')) node.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined) node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

const runClass = (run) => `run-${run % 8}`;
const dashes = (run) => ['', '7 4', '2 4', '10 3 2 3'][Math.floor(run / 8) % 4];
const percent = (value, digits = 1) => `${(100 * value).toFixed(digits)}%`;
const swatch = () => element('span', { class: 'swatch' });

// Round steps of 1, 2 or 5 that cut [low, high] into about `count` parts.
function ticks(low, high, count) {
  const rough = (high - low) / count || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find((factor) => factor * power >= rough * 0.999);
  const values = [];
  for (let i = Math.floor(low / step + 1e-9); i * step < high + step * 0.999; i++) {
    values.push(Number((i * step).toPrecision(12)));
  }
  return values;
}

// Draws now and again whenever the width of the place changes.
function drawAtWidth(host, draw) {
  let width = 0;
  const redraw = () => {
    const now = host.clientWidth;
    if (!now || now === width) return;
    width = now;
    host.replaceChildren(draw(width));
  };
  new ResizeObserver(redraw).observe(host);
  redraw();
}

// Axes with grid lines; returns the SVG and the maps from values to pixels.
function frame(width, height, options) {
  const margin = { left: 46, right: 14, top: 10, bottom: 38 };
  const { xTicks, yTicks, xDomain, xLabel, xFormat, yFormat, xMap = (x) => x } = options;
  const [first, last] = xDomain.map(xMap);
  const [bottom, top] = [yTicks[0], yTicks[yTicks.length - 1]];
  const right = width - margin.right;
  const floor = height - margin.bottom;
  const x = (value) =>
    margin.left + ((xMap(value) - first) / (last - first || 1)) * (right - margin.left);
  const y = (value) =>
    floor - ((value - bottom) / (top - bottom || 1)) * (floor - margin.top);
  const svg = element('svg', { viewBox: `0 0 ${width} ${height}`, height, role: 'img',
    'aria-label': options.label });
  for (const value of yTicks) {
    svg.append(
      element('line', { class: value === bottom ? 'axis' : 'grid', x1: margin.left,
        x2: right, y1: y(value), y2: y(value) }),
      element('text', { x: margin.left - 8, y: y(value) + 4, 'text-anchor': 'end' },
        yFormat(value)),
    );
  }
  for (const value of xTicks) {
    svg.append(
      element('line', { class: 'axis', x1: x(value), x2: x(value), y1: floor,
        y2: floor + 4 }),
      element('text', { x: x(value), y: floor + 18, 'text-anchor': 'middle' },
        xFormat(value)),
    );
  }
  svg.append(element('text', { x: (margin.left + right) / 2, y: height - 3,
    'text-anchor': 'middle' }, xLabel));
  return { svg, x, y, floor, top: margin.top, left: margin.left, right };
}

const path = (points) => points.map(([x, y], i) =>
  `${i ? 'L' : 'M'}${x.toFixed(1)} ${y.toFixed(1)}`).join('');

// Shows the values nearest to the pointer; `read(pixel)` returns {x, title, lines}.
function addReadout(host, plot, read) {
  const cursor = element('line', { class: 'cursor', y1: plot.top, y2: plot.floor,
    visibility: 'hidden' });
  const tip = element('div', { class: 'tip', hidden: '' });
  plot.svg.append(cursor);
  plot.svg.addEventListener('pointermove', (event) => {
    const found = read(event.clientX - plot.svg.getBoundingClientRect().left);
    cursor.setAttribute('x1', found.x);
    cursor.setAttribute('x2', found.x);
    cursor.setAttribute('visibility', 'visible');
    tip.replaceChildren(element('b', {}, found.title), ...found.lines);
    tip.hidden = false;
    const left = found.x + 14;
    const room = host.clientWidth - tip.offsetWidth;
    tip.style.left = `${left > room ? Math.max(0, found.x - 14 - tip.offsetWidth) : left}px`;
  });
  plot.svg.addEventListener('pointerleave', () => {
    tip.hidden = true;
    cursor.setAttribute('visibility', 'hidden');
  });
  return tip;
}

function nearest(values, target) {
  return values.reduce((best, value) =>
    Math.abs(value - target) < Math.abs(best - target) ? value : best);
}

const tipLine = (run, text) => element('div', { class: runClass(run) }, swatch(),
  `${report.runs[run].name}  `, text);

function drawAccuracy(kind) {
  const host = document.getElementById(`chart-${kind}`);
  if (!host) return;
  const all = report.runs.flatMap((run) => [...run.accuracy.pass, ...run.accuracy.maj]);
  const low = Math.min(...all.map((point) => point[2]));
  const high = Math.max(...all.map((point) => point[3]));
  const yTicks = ticks(low, high, 5).filter((value) => value >= 0 && value <= 1.0001);
  const sizes = [...new Set(report.runs.flatMap((run) =>
    run.accuracy[kind].map((point) => point[0])))].sort((a, b) => a - b);
  drawAtWidth(host, (width) => {
    const plot = frame(width, 300, {
      xDomain: [sizes[0], sizes[sizes.length - 1]], xTicks: sizes, yTicks,
      xMap: Math.log2, xLabel: 'k (samples a question)', xFormat: String,
      yFormat: (value) => percent(value, 0), label: `${kind}@k against k`,
    });
    report.runs.forEach((run, i) => {
      const points = run.accuracy[kind];
      if (!points.length) return;
      const group = element('g', { class: runClass(i) });
      const above = points.map(([k, , , up]) => [plot.x(k), plot.y(up)]);
      const below = points.map(([k, , down]) => [plot.x(k), plot.y(down)]).reverse();
      group.append(element('path', { class: 'band', d: `${path([...above, ...below])}Z` }));
      const line = points.map(([k, value]) => [plot.x(k), plot.y(value)]);
      group.append(element('path', { class: 'line', d: path(line),
        'stroke-dasharray': dashes(i) }));
      for (const [x, y] of line) {
        group.append(element('circle', { class: 'mark', cx: x, cy: y, r: 3.5 }));
      }
      plot.svg.append(group);
    });
    const holder = element('div', {}, plot.svg);
    holder.append(addReadout(host, plot, (pixel) => {
      const k = nearest(sizes.map(plot.x), pixel);
      const size = sizes.find((value) => plot.x(value) === k);
      const lines = report.runs.flatMap((run, i) => run.accuracy[kind]
        .filter((point) => point[0] === size)
        .map(([, value, down, up]) =>
          tipLine(i, `${percent(value)} [${(100 * down).toFixed(1)}, ${(100 * up).toFixed(1)}]`)));
      return { x: k, title: `k = ${size}`, lines };
    }));
    return holder;
  });
}

// Mean over about a thirtieth of the curve around each point; less at its ends.
function smooth(points) {
  const reach = Math.max(1, Math.round(points.length / 60));
  return points.map(([step], i) => {
    const half = Math.min(reach, i, points.length - 1 - i);
    const near = points.slice(i - half, i + half + 1);
    return [step, near.reduce((sum, point) => sum + point[1], 0) / near.length];
  });
}

function drawLosses() {
  const host = document.getElementById('chart-losses');
  if (!host) return;
  const curves = report.runs
    .map((run, i) => ({ run: i, points: run.losses.filter((point) => point[1] !== null) }))
    .filter((curve) => curve.points.length);
  const all = curves.flatMap((curve) => curve.points);
  const steps = all.map((point) => point[0]);
  const losses = all.map((point) => point[1]);
  const least = (values) => values.reduce((a, b) => Math.min(a, b));
  const most = (values) => values.reduce((a, b) => Math.max(a, b));
  const last = most(steps);
  const digits = (value) => String(Number(value.toPrecision(4)));
  drawAtWidth(host, (width) => {
    const first = Math.min(least(steps), last - 1);
    const plot = frame(width, 300, {
      xDomain: [first, last],
      xTicks: ticks(first, last, width / 110).filter((v) => v >= first && v <= last),
      yTicks: ticks(least(losses), most(losses), 5), xLabel: 'step',
      xFormat: (value) => value.toLocaleString('en'), yFormat: digits,
      label: 'training loss against step',
    });
    for (const { run, points } of curves) {
      const pixels = (list) => list.map(([step, loss]) => [plot.x(step), plot.y(loss)]);
      const group = element('g', { class: runClass(run) });
      const many = points.length > 60;
      if (many) group.append(element('path', { class: 'raw', d: path(pixels(points)) }));
      group.append(element('path', { class: 'line', 'stroke-dasharray': dashes(run),
        d: path(pixels(many ? smooth(points) : points)) }));
      if (points.length === 1) {
        const [[x, y]] = pixels(points);
        group.append(element('circle', { class: 'mark', cx: x, cy: y, r: 3.5 }));
      }
      plot.svg.append(group);
    }
    const holder = element('div', {}, plot.svg);
    holder.append(addReadout(host, plot, (pixel) => {
      const pixelOf = nearest(steps.map(plot.x), pixel);
      const step = steps.find((value) => plot.x(value) === pixelOf);
      const lines = curves.map(({ run, points }) => {
        const near = nearest(points.map((point) => point[0]), step);
        const loss = points.find((point) => point[0] === near)[1];
        return tipLine(run, `${loss.toFixed(4)}${near === step ? '' : ` at step ${near}`}`);
      });
      return { x: pixelOf, title: `step ${step.toLocaleString('en')}`, lines };
    }));
    return holder;
  });
}

function drawLengths() {
  const place = document.getElementById('chart-lengths');
  if (!place) return;
  const edges = report.edges;
  const kinds = ['right', 'wrong', 'ungraded'];
  const runs = report.runs
    .map((run, i) => ({ run: i, name: run.name, bars: run.lengths }))
    .filter((entry) => entry.bars.right)
    .map((entry) => {
      const totals = entry.bars.right.map((count, i) =>
        count + entry.bars.wrong[i] + entry.bars.ungraded[i]);
      return { ...entry, totals, size: totals.reduce((a, b) => a + b, 0) };
    });
  const peak = Math.max(...runs.map((entry) => Math.max(...entry.totals) / entry.size));
  const yTicks = ticks(0, peak, 4);
  for (const { run, name, bars, totals, size } of runs) {
    const host = element('div', { class: 'chart' });
    place.append(element('figure', { class: runClass(run) }, element('figcaption', {},
      swatch(), name, element('span', {}, `${size.toLocaleString('en')} samples`)), host));
    drawAtWidth(host, (width) => {
      const end = edges[edges.length - 1];
      const plot = frame(width, 220, {
        xDomain: [0, end], xTicks: ticks(0, end, width / 90).filter((v) => v <= end),
        yTicks, xLabel: 'tokens', xFormat: (value) => value.toLocaleString('en'),
        yFormat: (value) => percent(value, peak < 0.04 ? 1 : 0),
        label: `lengths of the samples of ${name}`,
      });
      const bar = (i, kind, from, count) => element('rect', { class: `${kind}-bar`,
        x: plot.x(edges[i]) + 0.5, y: plot.y((from + count) / size),
        width: Math.max(1, plot.x(edges[i + 1]) - plot.x(edges[i]) - 1),
        height: plot.y(from / size) - plot.y((from + count) / size) });
      totals.forEach((total, i) => {
        let from = 0;
        for (const kind of kinds) {
          if (bars[kind][i]) plot.svg.append(bar(i, kind, from, bars[kind][i]));
          from += bars[kind][i];
        }
        if (bars.cut[i]) plot.svg.append(bar(i, 'cut', total - bars.cut[i], bars.cut[i]));
      });
      const mean = plot.x(bars.mean);
      const anchor = mean > width * 0.7 ? 'end' : 'start';
      plot.svg.append(
        element('line', { class: 'mean', x1: mean, x2: mean, y1: plot.top, y2: plot.floor }),
        element('text', { class: 'strong', x: mean + (anchor === 'end' ? -6 : 6),
          y: plot.top + 4, 'text-anchor': anchor }, `mean ${bars.mean.toFixed(1)}`),
      );
      const holder = element('div', {}, plot.svg);
      holder.append(addReadout(host, plot, (pixel) => {
        const step = plot.x(edges[1]) - plot.x(0);
        const i = Math.min(totals.length - 1,
          Math.max(0, Math.floor((pixel - plot.left) / step)));
        const lines = [...kinds, 'cut'].filter((kind) => bars[kind][i]).map((kind) =>
          element('div', {}, element('span', { class: `box ${kind}-bar` }),
            `${bars[kind][i].toLocaleString('en')} ${kind === 'cut' ? 'cut short' : kind}`));
        return { x: plot.x(edges[i]) + step / 2,
          title: `${edges[i]}–${edges[i + 1] - 1} tokens`, lines };
      }));
      return holder;
    });
  }
}

function drawLegends() {
  const entry = (i, ...text) => element('span', { class: runClass(i) },
    element('svg', { width: 26, height: 10 }, element('path', { class: 'line',
      d: 'M1 5H25', 'stroke-dasharray': dashes(i) })), ...text);
  const legends = {
    accuracy: () => [
      ...report.runs.map((run, i) => run.accuracy.pass.concat(run.accuracy.maj).length > 1
        ? entry(i, run.name) : null),
      'Bands: 95% intervals',
    ],
    losses: () => report.runs.map((run, i) => {
      const known = run.losses.filter((point) => point[1] !== null);
      if (!known.length) return null;
      const last = known[known.length - 1];
      return entry(i, element('b', {}, run.name),
        `${known[0][1].toFixed(3)} → ${last[1].toFixed(3)} at step ${last[0].toLocaleString('en')}`);
    }),
    marks: () => ['right', 'wrong', 'ungraded', 'cut'].map((kind) =>
      report.runs.some((run) => (run.lengths[kind] || []).some((count) => count))
        ? element('span', {}, element('span', { class: `box ${kind}-bar` }),
          kind === 'cut' ? 'cut short at the limit' : kind)
        : null),
  };
  for (const host of document.querySelectorAll('[data-legend]')) {
    host.append(...legends[host.dataset.legend]().filter((node) => node !== null));
  }
}

drawLegends();
drawAccuracy('maj');
drawAccuracy('pass');
drawLengths();
drawLosses();
