// The browser of questions and samples. What models and data files say is shown through
// text nodes only. The address after '#' holds the view, so a view can be linked.
'use strict';

(() => {
  const place = document.getElementById('browser');
  if (!place) return;

  const ROW_HEIGHT = 64;
  const MAX_ANSWERS = 6;
  const MAX_METERS = 4;
  const FILTERS = ['all', 'right', 'mixed', 'wrong'];
  const ICONS = { r: 'M2 6.5 5 9.5 10 3', w: 'M3 3 9 9M9 3 3 9', u: 'M3 6H9' };
  const WORDS = { r: 'right', w: 'wrong', u: 'not graded' };
  const { questions, texts, answers, reasons } = report;
  const byId = (id) => document.getElementById(id);
  const icon = (mark) => element('svg', { class: 'icon', viewBox: '0 0 12 12',
    'aria-hidden': 'true' }, element('path', { d: ICONS[mark] }));

  // groups[question] = {start, count, right, graded} into the columns of a run.
  const runs = report.runs
    .map((run, number) => ({ name: run.name, number, samples: run.samples }))
    .filter((run) => run.samples.question);
  for (const run of runs) {
    run.groups = new Map();
    let start = 0;
    run.samples.question.forEach((question, i) => {
      const count = run.samples.count[i];
      const marks = run.samples.mark.slice(start, start + count);
      const right = marks.split('r').length - 1;
      const graded = count - (marks.split('u').length - 1);
      run.groups.set(question, { start, count, right, graded });
      start += count;
    });
  }

  const state = { run: 0, question: -1, sample: 0, filter: 'all', find: '', sort: '' };
  let shown = []; // questions in the list, in its order
  let drawn = -1; // the question in the detail pane

  const group = () => runs[state.run].groups.get(state.question);
  const share = (run, question) => {
    const found = run.groups.get(question);
    return found && found.graded ? found.right / found.graded : 0;
  };

  function kindOf({ right, graded, count }) {
    if (graded < count) return 'all';
    return right === count ? 'right' : right ? 'mixed' : 'wrong';
  }

  // Lower-case texts, made at the first search.
  let lowered = null;
  function searchable() {
    const lower = (values) => values.map((value) => (value || '').toLowerCase());
    lowered = lowered || { texts: lower(texts), answers: lower(answers),
      id: lower(questions.id), text: lower(questions.text), gold: lower(questions.gold) };
    return lowered;
  }

  // The first sample that holds what is searched for; 0 where the question itself does,
  // -1 where nothing does.
  function firstMatch(run, question) {
    if (!state.find) return 0;
    const needle = state.find.toLowerCase();
    const low = searchable();
    if (low.id[question].includes(needle) || low.text[question].includes(needle)
        || low.gold[question].includes(needle)) return 0;
    const { start, count } = run.groups.get(question);
    for (let i = start; i < start + count; i++) {
      const answer = run.samples.answer[i];
      if (low.texts[run.samples.text[i]].includes(needle)
          || (answer >= 0 && low.answers[answer].includes(needle))) return i - start;
    }
    return -1;
  }

  const sorts = () => {
    const run = runs[state.run];
    const table = { '': ['as in the data', null],
      hardest: ['fewest right first', (q) => share(run, q)],
      easiest: ['most right first', (q) => -share(run, q)] };
    for (const other of runs) {
      if (other === run || ![...run.groups.keys()].some((q) => other.groups.has(q))) continue;
      const change = (sign) => (q) => (other.groups.has(q)
        ? sign * (share(run, q) - share(other, q)) : Infinity);
      table[`gain-${other.number}`] = [`largest gain over ${other.name}`, change(-1)];
      table[`drop-${other.number}`] = [`largest drop from ${other.name}`, change(1)];
    }
    return table;
  };

  // Recomputes which questions are shown; keeps the selected one where it still is.
  function update() {
    const run = runs[state.run];
    const matching = new Map(); // question -> the filter it passes
    const counts = { all: 0, right: 0, mixed: 0, wrong: 0 };
    for (const [question, found] of run.groups) {
      if (firstMatch(run, question) < 0) continue;
      const kind = kindOf(found);
      matching.set(question, kind);
      counts.all++;
      if (kind !== 'all') counts[kind]++;
    }
    shown = [...matching].filter(([, kind]) => state.filter === 'all' || kind === state.filter)
      .map(([question]) => question);
    const table = sorts();
    if (!table[state.sort]) state.sort = '';
    const key = table[state.sort][1];
    if (key) shown = shown.map((q) => [key(q), q]).sort((a, b) => a[0] - b[0]).map(([, q]) => q);
    if (!shown.includes(state.question)) {
      state.question = shown.length ? shown[0] : -1;
      state.sample = shown.length ? firstMatch(run, state.question) : 0;
    }
    drawTools(table, counts);
    select(state.question, state.sample);
  }

  function drawTools(table, counts) {
    byId('tabs').replaceChildren(...runs.map((run, i) => element('button', {
      type: 'button', class: runClass(run.number), 'aria-pressed': i === state.run,
      onclick: () => setRun(i) }, swatch(), run.name)));
    byId('filters').replaceChildren(...FILTERS.map((filter) => element('button', {
      type: 'button', 'aria-pressed': filter === state.filter,
      title: { all: 'Every question', right: 'Every sample is right',
        mixed: 'Some samples are right', wrong: 'No sample is right' }[filter],
      onclick: () => { state.filter = filter; update(); } },
    filter[0].toUpperCase() + filter.slice(1),
    element('span', {}, counts[filter].toLocaleString('en')))));
    byId('sort').replaceChildren(...Object.entries(table).map(([value, [label]]) =>
      element('option', { value }, label)));
    byId('sort').value = state.sort;
    if (byId('search').value !== state.find) byId('search').value = state.find;
  }

  function setRun(number) {
    state.run = number;
    const found = group();
    if (found) state.sample = Math.min(state.sample, found.count - 1);
    update();
  }

  // The list draws only the rows in sight, whatever the number of questions.
  const list = byId('list');
  const spacer = element('div', {});
  function drawList() {
    const first = Math.max(0, Math.floor(list.scrollTop / ROW_HEIGHT) - 4);
    const last = Math.min(shown.length, first + Math.ceil(list.clientHeight / ROW_HEIGHT) + 8);
    spacer.style.height = `${shown.length * ROW_HEIGHT}px`;
    const rows = shown.slice(first, last).map((question, i) => listRow(question, first + i));
    list.replaceChildren(spacer, ...(shown.length ? rows
      : [element('p', { class: 'empty' }, 'No question matches.')]));
  }

  function listRow(question, number) {
    const run = runs[state.run];
    const found = run.groups.get(question);
    const text = questions.text[question] || questions.id[question];
    const score = element('div', { class: 'score' });
    if (found.graded) {
      score.append(element('b', {}, String(found.right)), ` / ${found.count}`);
      const others = runs.filter((other) => other !== run && other.groups.has(question));
      const drawnRuns = [run, ...others.slice(0, MAX_METERS - 1)];
      for (const other of drawnRuns.sort((a, b) => a.number - b.number)) {
        const fill = element('i', {});
        fill.style.width = `${100 * share(other, question)}%`;
        score.append(element('div', { class: `meter ${runClass(other.number)}`,
          title: other.name }, fill));
      }
    }
    const row = element('div', { class: 'row', role: 'option', id: `row-${question}`,
      'aria-selected': question === state.question,
      onclick: () => open(question) },
    element('span', { class: 'place' }, String(question + 1)),
    element('span', { class: 'snippet' }, text.slice(0, 240)), score);
    row.style.transform = `translateY(${number * ROW_HEIGHT}px)`;
    return row;
  }

  function select(question, sample) {
    Object.assign(state, { question, sample });
    const number = shown.indexOf(question);
    if (number >= 0) {
      const top = number * ROW_HEIGHT;
      if (top < list.scrollTop) list.scrollTop = top;
      const below = top + ROW_HEIGHT - list.clientHeight;
      if (below > list.scrollTop) list.scrollTop = below;
      list.setAttribute('aria-activedescendant', `row-${question}`);
    }
    drawList();
    drawDetail(number);
    saveAddress();
  }

  const open = (question) => select(question, firstMatch(runs[state.run], question));
  const move = (offset) => {
    const number = shown.indexOf(state.question) + offset;
    if (number >= 0 && number < shown.length) open(shown[number]);
  };
  const moveSample = (offset) => {
    const next = state.sample + offset;
    if (group() && next >= 0 && next < group().count) select(state.question, next);
  };

  // Where what is searched for begins and ends in a text: start, end, start, end, ...
  function matches(text) {
    const needle = state.find.toLowerCase();
    const low = text.toLowerCase();
    if (!needle || low.length !== text.length) return []; // places would not agree
    const edges = [];
    for (let at = low.indexOf(needle); at >= 0; at = low.indexOf(needle, at + needle.length)) {
      edges.push(at, at + needle.length);
    }
    return edges;
  }

  // The text from one place to another, with what is searched for marked in it.
  function marked(text, from = 0, to = text.length, edges = matches(text)) {
    const parts = [];
    let start = from;
    edges.forEach((edge, i) => {
      const end = Math.min(edge, to);
      if (end <= start) return;
      const part = text.slice(start, end);
      parts.push(i % 2 ? element('mark', {}, part) : part);
      start = end;
    });
    return start < to ? [...parts, text.slice(start, to)] : parts;
  }

  // Colours of values: from the colour of wrong at one end over none to that of right.
  const [lowest, highest] = report.value_range;
  function tint(value) {
    const share = (2 * (value - lowest)) / (highest - lowest) - 1;
    const [red, green, blue] = share < 0 ? [222, 110, 58] : [22, 140, 108];
    return `rgba(${red}, ${green}, ${blue}, ${(0.68 * Math.abs(share)).toFixed(3)})`;
  }

  function valued(value, ...children) {
    const node = element('span', { class: 'token',
      title: value === null ? 'no value' : String(value) }, ...children);
    if (value !== null) node.style.backgroundColor = tint(value);
    return node;
  }

  // The text, each token on the colour of its value; those without text stand at the end.
  function heated(text, { widths, values }) {
    const edges = matches(text);
    let from = 0;
    const nodes = widths.map((width, i) => {
      const start = from;
      from += width;
      return width ? valued(values[i], ...marked(text, start, from, edges)) : null;
    });
    const last = widths.length - 1;
    if (last >= 0 && !widths[last]) {
      const end = valued(values[last], values[last] === null ? 'end' : `end ${values[last]}`);
      end.classList.add('end');
      nodes.push(end);
    }
    return nodes.filter(Boolean);
  }

  function valueLegend() {
    const steps = Array.from({ length: 11 }, (_, i) => lowest + (i * (highest - lowest)) / 10);
    return element('div', { class: 'values' }, 'Value after each token',
      element('span', {}, String(lowest)),
      element('span', { class: 'ramp' }, ...steps.map((value) => {
        const box = element('i', {});
        box.style.backgroundColor = tint(value);
        return box;
      })),
      element('span', {}, String(highest)));
  }

  function drawDetail(number) {
    const detail = byId('detail');
    if (number < 0) {
      detail.replaceChildren(element('p', { class: 'empty' }, 'No question to show.'));
      return;
    }
    const { question } = state;
    if (question !== drawn) detail.scrollTop = 0;
    drawn = question;
    const step = (label, offset, enabled) => element('button', { type: 'button',
      onclick: () => move(offset), disabled: enabled ? null : '' }, label);
    detail.replaceChildren(
      element('div', { class: 'crumbs' },
        element('span', {}, `${number + 1} of ${shown.length.toLocaleString('en')}`,
          element('span', { class: 'dot' }, '·'), questions.id[question]),
        step('Previous', -1, number > 0), step('Next', 1, number < shown.length - 1)),
      element('p', { class: 'question', dir: 'auto' },
        ...marked(questions.text[question] || 'The run does not tell its text.')),
      ...options(question), summary(question), ...chips(), sampleCard(question));
  }

  function options(question) {
    const known = questions.options[question];
    if (!known) return [];
    return [element('ul', { class: 'options' },
      ...known.map((option) => element('li', {}, ...marked(option))))];
  }

  function summary(question) {
    const { samples } = runs[state.run];
    const { start, count } = group();
    const tally = new Map();
    for (let i = start; i < start + count; i++) {
      const key = `${samples.mark[i]}${samples.answer[i]}`;
      const entry = tally.get(key) || { mark: samples.mark[i], answer: samples.answer[i], size: 0 };
      entry.size++;
      tally.set(key, entry);
    }
    const entries = [...tally.values()].sort((a, b) => b.size - a.size);
    const cut = entries.length > MAX_ANSWERS + 1 ? MAX_ANSWERS : entries.length;
    const rows = entries.slice(0, cut).flatMap(({ mark, answer, size }) => {
      const fill = element('i', { class: `${WORDS[mark].replace('not ', 'un')}-bar` });
      fill.style.width = `${(100 * size) / count}%`;
      return [
        element('span', { class: 'answer' }, answer < 0 ? 'no answer' : answers[answer]),
        element('span', { class: `tally ${mark}`, title: WORDS[mark] }, icon(mark), `${size}×`),
        element('span', { class: 'track-bar' }, fill)];
    });
    if (entries.length > cut) {
      rows.push(element('span', { class: 'rest' },
        `and ${entries.length - cut} other answers`));
    }
    const box = element('div', { class: 'summary' });
    const gold = questions.gold[question];
    if (gold !== null) {
      box.append(element('span', { class: 'label' }, 'Gold answer'),
        element('span', { class: 'gold', dir: 'auto' }, ...marked(gold)));
    }
    const others = runs.filter((run, i) => i !== state.run && run.groups.has(question));
    if (others.length) {
      box.append(element('span', { class: 'label' }, 'Other runs'),
        element('span', { class: 'others' }, ...others.map((run) => {
          const { right, graded, count: size } = run.groups.get(question);
          return element('button', { type: 'button', class: runClass(run.number),
            onclick: () => setRun(runs.indexOf(run)) }, swatch(), run.name,
          graded ? ` ${right} / ${size}` : ` ${size} samples`);
        })));
    }
    if (count > 1) {
      box.append(element('span', { class: 'label' }, 'Answers'),
        element('div', { class: 'answers' }, ...rows));
    }
    return box;
  }

  function chips() {
    const { samples } = runs[state.run];
    const { start, count } = group();
    if (count === 1) return [];
    const box = element('div', { class: count > 32 ? 'chips dense' : 'chips' });
    for (let i = 0; i < count; i++) {
      const mark = samples.mark[start + i];
      const answer = samples.answer[start + i];
      const label = answer < 0 ? 'none' : answers[answer];
      box.append(element('button', { type: 'button', class: `chip ${mark}`,
        'aria-pressed': i === state.sample, onclick: () => select(state.question, i),
        title: `Sample ${samples.index[start + i]}: ${WORDS[mark]}, ${label}` },
      icon(mark), element('span', {}, label)));
    }
    return [box];
  }

  function sampleCard(question) {
    const { samples } = runs[state.run];
    const { start } = group();
    const i = start + state.sample;
    const mark = samples.mark[i];
    const gold = questions.gold[question];
    const answer = samples.answer[i] < 0 ? 'none found' : answers[samples.answer[i]];
    const reason = samples.reason[i] < 0 ? null : reasons[samples.reason[i]];
    const facts = [
      samples.tokens[i] === null ? null : `${samples.tokens[i].toLocaleString('en')} tokens`,
      reason === 'length' ? 'cut short at the limit' : reason && `ended by ${reason}`,
      samples.logprob[i] === null ? null : `log-probability ${samples.logprob[i]}`,
      samples.value && samples.value[i] !== null ? `value ${samples.value[i]}` : null,
      samples.kl && samples.kl[i] !== null ? `KL ${samples.kl[i]}` : null,
    ];
    const text = texts[samples.text[i]];
    const heat = samples.heats[i];
    const compare = element('dl', { class: 'compare' }, element('dt', {}, 'Extracted'),
      element('dd', { class: mark }, ...marked(answer)));
    if (gold !== null) {
      compare.append(element('dt', {}, 'Gold'), element('dd', {}, ...marked(gold)));
    }
    return element('section', { class: 'sample' },
      element('header', {},
        element('span', {}, `Sample ${samples.index[i]}`),
        element('span', { class: `verdict ${mark}` }, icon(mark), WORDS[mark]),
        element('span', { class: 'facts' }, facts.filter(Boolean).join(' · '))),
      mark === 'u' && gold === null ? null : compare,
      heat ? valueLegend() : null,
      element('pre', { class: heat ? 'text heat' : 'text', dir: 'auto' },
        ...(heat ? heated(text, heat) : marked(text))));
  }

  function saveAddress() {
    const view = new URLSearchParams();
    if (state.run) view.set('run', runs[state.run].name);
    if (state.filter !== 'all') view.set('show', state.filter);
    if (state.find) view.set('find', state.find);
    if (state.sort) view.set('sort', state.sort);
    if (state.question >= 0) view.set('question', questions.id[state.question]);
    if (state.sample) view.set('sample', runs[state.run].samples.index[group().start + state.sample]);
    history.replaceState(null, '', `#${view}`);
  }

  function loadAddress() {
    const view = new URLSearchParams(location.hash.slice(1));
    state.run = Math.max(0, runs.findIndex((run) => run.name === view.get('run')));
    state.filter = FILTERS.includes(view.get('show')) ? view.get('show') : 'all';
    state.find = view.get('find') || '';
    state.sort = view.get('sort') || '';
    const known = [...runs[state.run].groups.keys()];
    const wanted = known.find((question) => questions.id[question] === view.get('question'));
    state.question = wanted === undefined ? -1 : wanted;
    state.sample = 0;
    if (group() && view.has('sample')) {
      const { start, count } = group();
      const indices = runs[state.run].samples.index.slice(start, start + count);
      state.sample = Math.max(0, indices.indexOf(Number(view.get('sample'))));
    }
    update();
  }

  let timer = 0;
  byId('search').addEventListener('input', () => {
    clearTimeout(timer);
    timer = setTimeout(() => { state.find = byId('search').value; update(); }, 120);
  });
  byId('sort').addEventListener('change', () => {
    Object.assign(state, { sort: byId('sort').value, question: -1 }); // show its first
    update();
  });
  list.addEventListener('scroll', drawList);
  new ResizeObserver(drawList).observe(list);
  window.addEventListener('hashchange', loadAddress);
  document.addEventListener('keydown', (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (/^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName)) {
      if (event.key === 'Escape') event.target.blur();
      return;
    }
    const inList = event.target === list;
    const actions = {
      j: () => move(1), k: () => move(-1),
      ArrowRight: () => moveSample(1), ArrowLeft: () => moveSample(-1),
      r: () => setRun((state.run + 1) % runs.length),
      '/': () => byId('search').focus(),
      ...(inList ? { ArrowDown: () => move(1), ArrowUp: () => move(-1) } : {}),
    };
    if (!Object.hasOwn(actions, event.key)) return;
    event.preventDefault();
    actions[event.key]();
    document.querySelector('.panes').scrollIntoView({ block: 'nearest' });
  });
  loadAddress();
})();
