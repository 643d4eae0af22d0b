'use strict';
// Shows what fleet.json says, every two seconds while somebody looks.
const EVERY = 2000;
const ROLES = ['prefill', 'decode', 'unified', 'unknown'];

function make(name, attributes, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(attributes || {})) node.setAttribute(key, value);
  node.append(...children.filter((child) => child !== null));
  return node;
}

function time(seconds) {
  if (seconds < 1) return `${(seconds * 1000).toPrecision(seconds < 0.01 ? 2 : 3)} ms`;
  return `${seconds.toPrecision(3)} s`;
}

function quantiles(found) {
  return found ? `${time(found.p50)} / ${time(found.p99)}` : '–';
}

function number(value) {
  return value >= 100 || Number.isInteger(value) ? Math.round(value).toLocaleString('en') : value.toFixed(1);
}

function plural(count, word) {
  return `${number(count)} ${word}${count === 1 ? '' : 's'}`;
}

function meter(used, all) {
  const part = all > 0 ? Math.min(1, used / all) : 0;
  const svg = document.createElementNS('http://www.w3.org/2000/svg', 'svg');
  const rect = document.createElementNS('http://www.w3.org/2000/svg', 'rect');
  svg.setAttribute('aria-hidden', 'true');
  rect.setAttribute('width', `${100 * part}%`);
  rect.setAttribute('height', '100%');
  if (part > 0.9) rect.setAttribute('class', 'high');
  svg.append(rect);
  const title = `${number(used)} of ${plural(all, 'block')}`;
  return make('div', { class: 'meter', title }, svg, make('span', {}, `${Math.round(100 * part)}%`));
}

function ranks(count) {
  const squares = count <= 16 ? '▪'.repeat(count) : '▪'.repeat(16) + '…';
  return make('td', { class: 'ranks' }, make('span', { 'aria-hidden': 'true' }, squares), ` ${count}`);
}

function row(gang) {
  return make('tr', {},
    make('th', { scope: 'row' }, gang.id || 'not reached yet'),
    make('td', { class: gang.phase }, gang.phase),
    make('td', { class: 'kv' }, meter(gang.kv_blocks_used, gang.kv_blocks)),
    make('td', { class: 'number' }, number(gang.running)),
    make('td', { class: 'number' }, number(gang.waiting)),
    ranks(gang.ranks),
    make('td', { class: 'revision' }, gang.revision || '–'));
}

function pool(model, role, gangs) {
  const ready = gangs.filter((gang) => gang.phase === 'ready').length;
  const name = role === 'unknown' ? 'role not known yet' : role;
  const title = `${name}: ${ready} of ${plural(gangs.length, 'gang')} ready`;
  const head = [['Gang', ''], ['Phase', ''], ['KV cache', 'kv'], ['Running', 'number'], ['Waiting', 'number'],
    ['Ranks', 'ranks-head'], ['Revision', 'revision']];
  const columns = head.map(([text, kind]) => {
    const narrow = kind === 'ranks-head' ? 'ranks' : kind;
    return make('th', narrow ? { scope: 'col', class: narrow } : { scope: 'col' }, text);
  });
  const table = make('table', { 'aria-label': `${model}, ${title}` },
    make('thead', {}, make('tr', {}, ...columns)), make('tbody', {}, ...gangs.map(row)));
  return [make('h3', {}, title), make('div', { class: 'scroll', tabindex: '0', role: 'region', 'aria-label': title }, table)];
}

function decision(scale) {
  if (!scale) return null;
  const sizes = ['prefill', 'decode', 'unified']
    .filter((role) => scale[role] !== null && scale[role] !== undefined)
    .map((role) => `${role} ${scale[role]}`);
  return make('p', { class: 'decision' }, `Last scaled ${scale.time}: ${sizes.join(', ')}. ${scale.reason}`);
}

function section(model, gangs) {
  const numbers = [
    ['Time to first token\np50 / p99', quantiles(model.time_to_first_token)],
    ['Between tokens\np50 / p99', quantiles(model.inter_token_latency)],
    ['Answers\na second', number(model.requests_per_second)],
    ['Tokens\na second', number(model.output_tokens_per_second)],
    ['Requests waiting\nfor a gang', number(model.waiting_for_gang)],
  ];
  const list = make('dl', { class: 'numbers' },
    ...numbers.map(([name, value]) => make('div', {}, make('dt', {}, name), make('dd', {}, value))));
  const about = model.digest
    ? `${model.digest.slice(0, 19)}…, context of ${plural(model.context_length, 'token')}`
    : 'no gang of it was reached yet';
  const pools = ROLES.map((role) => [role, gangs.filter((gang) => gang.role === role)])
    .filter(([, found]) => found.length > 0)
    .flatMap(([role, found]) => pool(model.name, role, found));
  const none = gangs.length === 0 ? make('p', {}, 'No gang serves it under this name now.') : null;
  return make('section', { class: 'model' },
    make('h2', {}, model.name), make('p', { class: 'about' }, about), list, decision(model.last_scale), none, ...pools);
}

function show(fleet) {
  const { models, gangs } = fleet;
  const ready = gangs.filter((gang) => gang.phase === 'ready').length;
  const more = fleet.left_out > 0 ? `, ${plural(fleet.left_out, 'gang')} not shown` : '';
  document.getElementById('summary').textContent =
    `${plural(models.length, 'model')}, ${ready} of ${plural(gangs.length, 'gang')} ready${more}, ` +
    `${plural(fleet.in_flight, 'request')} in work; rates of the last ${Math.round(fleet.window_seconds)} s; version ${fleet.version}`;
  const sections = models.map((model) => section(model, gangs.filter((gang) => gang.models[0] === model.name)));
  const empty = make('section', { class: 'model' }, make('h2', {}, 'No model yet'),
    make('p', {}, 'Apply a LlamaDeployment; its gangs show here as they start.'));
  const main = document.getElementById('models');
  // What has the focus keeps it: rows change, regions stay.
  const focused = [...main.querySelectorAll('.scroll')].indexOf(document.activeElement);
  main.replaceChildren(...(sections.length > 0 ? sections : [empty]));
  if (focused >= 0) [...main.querySelectorAll('.scroll')][focused]?.focus({ preventScroll: true });
}

async function refresh() {
  const problem = document.getElementById('problem');
  try {
    const answer = await fetch('fleet.json', { cache: 'no-store', signal: AbortSignal.timeout(5000) });
    if (!answer.ok) throw new Error(`fleet.json: status ${answer.status}`);
    show(await answer.json());
    problem.textContent = '';
  } catch (error) {
    problem.textContent = `The gateway does not answer (${error.message}); this is what it said last.`;
  }
}

async function watch() {
  if (!document.hidden) await refresh();
  setTimeout(watch, EVERY);
}

document.addEventListener('visibilitychange', () => { if (!document.hidden) refresh(); });
watch();
