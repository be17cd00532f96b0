'use strict';
// The page talks to the OpenAI interface of the same server, and to /v1/jobs for progress and cancelling.
const byId = id => document.getElementById(id);
const fields = {};
for (const id of ['prompt', 'engine', 'schedule', 'w', 'steps', 'seed', 'compare', 'negative', 'key']) fields[id] = byId(id);
const WORDS = {guided: 'guided', cfg: 'CFG', unguided: 'no guidance'};
const KEPT = 24;
let engines = [], running = [], turn = 0;

function say(text, wrong = false) {
  byId('status').textContent = text;
  byId('status').classList.toggle('wrong', wrong);
}

async function ask(path, options = {}) {
  const headers = {...options.headers};
  if (fields.key.value) headers.Authorization = `Bearer ${fields.key.value}`;
  if (options.body) headers['Content-Type'] = 'application/json';
  const answer = await fetch(path, {...options, headers});
  if (answer.status === 204) return null;
  const held = await answer.json();
  if (!answer.ok) {
    const error = new Error(held.error && held.error.message || `the server answered ${answer.status}`);
    error.status = answer.status;
    throw error;
  }
  return held;
}

async function start() {
  try {
    const found = await ask('/v1/engines');
    engines = found.engines;
    fields.engine.replaceChildren(...engines.map(e => new Option(e.name, e.name)));
    for (const name of found.schedules) fields.schedule.add(new Option(name, name));
    chooseEngine();
    say('Ready.');
  } catch (error) {
    say(error.message, true);
    if (error.status === 401) fields.key.closest('details').open = true;
  }
}

function chosen() { return engines.find(e => e.name === fields.engine.value) || engines[0]; }

function chooseEngine() {
  const engine = chosen();
  if (!engine) return;
  if (engine.steps) fields.steps.value = engine.steps;
  byId('negative-hint').textContent = engine.negative_prompts ? '' : "This engine's guide takes none: CFG is used with one.";
  fields.compare.disabled = engine.methods.length < 2;
  showValues();
}

function showValues() {
  byId('w-value').textContent = fields.w.value;
  byId('steps-value').textContent = fields.steps.value;
}

function cardFor(method, prompt) {
  const card = byId('card').content.firstElementChild.cloneNode(true);
  card.classList.add(method);
  card.querySelector('strong').textContent = WORDS[method] || method;
  card.querySelector('.numbers').textContent = 'waiting';
  card.querySelector('img').alt = `${prompt}, ${WORDS[method] || method}`;
  return card;
}

function newId() { return [...crypto.getRandomValues(new Uint8Array(16))].map(b => b.toString(16).padStart(2, '0')).join(''); }

async function follow(job) {
  // progress until the image is there; the request itself brings the image
  while (!job.over) {
    await new Promise(done => setTimeout(done, 150));
    if (job.over) return;
    let held;
    try { held = await ask(`/v1/jobs/${job.id}?preview=true`); } catch { continue; }
    if (job.over || !held) return;
    job.card.querySelector('progress').value = held.steps_done / held.steps;
    job.card.querySelector('.numbers').textContent = held.running ? `step ${held.steps_done} of ${held.steps}`
      : held.state === 'loading' ? 'loading the LoRA' : 'waiting';
    if (held.preview) job.card.querySelector('img').src = held.preview;
  }
}

async function one(method, body, card) {
  const job = {id: newId(), card, over: false};
  running.push(job);
  const began = performance.now();
  const watched = follow(job);
  try {
    const held = await ask('/v1/images/generations', {
      method: 'POST', body: JSON.stringify({...body, method, request_id: job.id}),
    });
    const made = held.pnp_trt, source = `data:image/png;base64,${held.data[0].b64_json}`;
    job.over = true;
    card.querySelector('img').src = source;
    card.querySelector('.frame').classList.add('done');
    card.querySelector('.numbers').textContent =
      `${made.evaluations} evaluations, ${((performance.now() - began) / 1000).toFixed(2)} s, w ${made.images[0].guidance}, ` +
      `seed ${made.images[0].seed}`;
    const save = card.querySelector('.save');
    Object.assign(save, {href: source, download: `${made.images[0].seed}-${method}.png`, hidden: false});
    save.setAttribute('aria-label', `Save the image of ${WORDS[method] || method} as PNG`);
    return {method: made.images[0].method, source, evaluations: made.evaluations, seconds: made.seconds - made.waited};
  } catch (error) {
    card.querySelector('.numbers').textContent = error.message;
    card.querySelector('.frame').classList.add('done');
    throw error;
  } finally {
    job.over = true;
    running = running.filter(each => each !== job);
    await watched;
  }
}

function remember(request, results) {
  const best = results[0], item = document.createElement('li'), button = document.createElement('button');
  const image = new Image(), words = document.createElement('span'), numbers = document.createElement('span');
  const seed = document.createElement('span');
  image.src = best.source;
  image.alt = '';
  words.textContent = request.prompt;
  numbers.textContent = `w ${request.w}, ${request.steps} steps`;
  seed.textContent = `seed ${request.seed}`;
  button.type = 'button';
  button.title = `${request.prompt}: use these settings again`;
  button.append(image, words, numbers, seed);
  button.addEventListener('click', () => {
    for (const name of ['prompt', 'w', 'steps', 'seed', 'negative', 'engine', 'schedule']) fields[name].value = request[name];
    showValues();
    fields.prompt.focus();
    say('The settings of that image are set.');
  });
  item.append(button);
  byId('history').prepend(item);
  while (byId('history').children.length > KEPT) byId('history').lastElementChild.remove();
}

async function generate(event) {
  event.preventDefault();
  if (running.length) return;
  const engine = chosen();
  if (!engine) { await start(); if (!chosen()) return; }
  const request = {};
  for (const name of ['prompt', 'w', 'steps', 'seed', 'negative', 'engine', 'schedule']) request[name] = fields[name].value;
  const body = {
    prompt: request.prompt, model: request.engine, guidance_scale: Number(request.w), seed: Number(request.seed),
    num_inference_steps: Number(request.steps),
  };
  if (request.negative) body.negative_prompt = request.negative;
  if (request.schedule) body.schedule = request.schedule;
  let methods = [chosen().methods[0]];
  if (methods[0] === 'guided' && request.negative && !chosen().negative_prompts) methods = ['cfg'];
  const other = chosen().methods.find(name => !methods.includes(name) && (name === 'cfg' || methods[0] === 'cfg'));
  if (fields.compare.checked && other) {
    methods.push(other);
    if (other === 'unguided') methods.length = 2;
  }
  const mine = ++turn;
  byId('verdict').textContent = '';
  const cards = methods.map(method => cardFor(method, request.prompt));
  byId('cards').replaceChildren(...cards);
  byId('go').disabled = true;
  byId('stop').disabled = false;
  say('Generating …');
  const results = [];
  let failure = null;
  for (let i = 0; i < methods.length; i++) {  // one after the other, so that the times compare
    const sent = methods[i] === 'unguided' ? {...body, negative_prompt: undefined} : body;
    try { results.push(await one(methods[i], sent, cards[i])); } catch (error) { failure = error; break; }
    if (mine !== turn) break;
  }
  byId('go').disabled = false;
  byId('stop').disabled = true;
  if (failure) {
    say(failure.status === 409 ? 'Cancelled.' : failure.message, failure.status !== 409);
    if (failure.status === 401) fields.key.closest('details').open = true;
  } else {
    say(`Done: ${results.length === 1 ? 'one image' : `${results.length} images`}.`);
  }
  if (results.length) remember(request, results);
  if (results.length === 2) {
    const [a, b] = results;
    byId('verdict').textContent = `${WORDS[a.method]}: ${a.evaluations} evaluations in ${a.seconds.toFixed(2)} s; ` +
      `${WORDS[b.method]}: ${b.evaluations} in ${b.seconds.toFixed(2)} s (${(b.seconds / a.seconds).toFixed(2)} times as long).`;
  }
}

function cancel() {
  say('Cancelling …');
  for (const job of running) ask(`/v1/jobs/${job.id}`, {method: 'DELETE'}).catch(() => {});
}

byId('form').addEventListener('submit', generate);
byId('stop').addEventListener('click', cancel);
byId('dice').addEventListener('click', () => { fields.seed.value = crypto.getRandomValues(new Uint32Array(1))[0] >>> 1; });
fields.engine.addEventListener('change', chooseEngine);
fields.key.addEventListener('change', start);
for (const name of ['w', 'steps']) fields[name].addEventListener('input', showValues);
fields.prompt.addEventListener('keydown', event => {
  if (event.key === 'Enter' && (event.ctrlKey || event.metaKey)) byId('form').requestSubmit();
});
document.addEventListener('keydown', event => { if (event.key === 'Escape' && running.length) cancel(); });
start();
