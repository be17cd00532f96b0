'use strict';
// The page talks to the OpenAI interface of the same server, and to /v1/jobs for progress.
const byId = id => document.getElementById(id);
const fields = {};
const SETTINGS = ['prompt', 'engine', 'schedule', 'w', 'steps', 'seed', 'lora', 'scale', 'negative'];
for (const id of [...SETTINGS, 'compare', 'weights', 'key']) fields[id] = byId(id);
const WORDS = {guided: 'guided', cfg: 'CFG', unguided: 'no guidance'};
const COMPARED = {
  cfg: 'Also generate with CFG, two evaluations per step',
  unguided: 'Also generate without guidance, one evaluation per step',
};
const KEPT = 24, POLL = 150;  // images in the history; milliseconds between two looks at a request
let engines = [], running = null;

function say(text, wrong = false) {
  byId('status').textContent = text;
  byId('status').classList.toggle('wrong', wrong);
}

async function ask(path, options = {}) {
  const headers = {...options.headers};
  if (fields.key.value) headers.Authorization = `Bearer ${fields.key.value}`;
  if (options.body) headers['Content-Type'] = 'application/json';
  const answer = await fetch(path, {...options, headers}).catch(error => {
    throw error.name === 'AbortError' ? error : new Error('The server does not answer; it may have been stopped.');
  });
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
    fill(fields.engine, engines.map(e => e.name));
    fill(fields.schedule, found.schedules, 'automatic');
    fill(fields.lora, found.loras, 'none');
    byId('loras').hidden = !found.loras.length;
    chooseEngine();
    say('Ready.');
  } catch (error) {
    say(error.message, true);
    if (error.status === 401) fields.key.closest('details').open = true;
  }
}

function fill(select, names, none) {
  const options = names.map(name => new Option(name, name));
  select.replaceChildren(...none ? [new Option(none, '')] : [], ...options);
}

function chosen() { return engines.find(e => e.name === fields.engine.value) || engines[0]; }

function methodsOf(engine, negative) {
  // the method of the image, and the one that it is compared with, if there is one
  const offered = names => names.filter(name => engine.methods.includes(name));
  if (engine.methods[0] !== 'guided') return offered(['cfg', 'unguided']);
  return offered(negative && !engine.negative_prompts ? ['cfg'] : ['guided', 'cfg']);
}

function chooseEngine() {
  const engine = chosen();
  if (!engine) return;
  if (engine.steps) fields.steps.value = engine.steps;
  byId('negative-hint').textContent = engine.negative_prompts || engine.methods[0] !== 'guided' ? ''
    : "This engine's guide takes none: CFG is used with one.";
  showValues();
}

function showValues() {
  byId('w-value').textContent = fields.w.value;
  byId('steps-value').textContent = fields.steps.value;
  const engine = chosen();
  if (!engine) return;
  const other = methodsOf(engine, fields.negative.value)[1];
  fields.compare.disabled = !other;
  byId('compare-text').textContent = COMPARED[other] || 'Nothing to compare with';
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

async function seen(job, show, pause, preview) {
  // what the server tells of a job, again and again until its image is there, which the request itself brings
  while (!job.over) {
    await new Promise(done => setTimeout(done, pause));
    if (job.over) return;
    const began = performance.now();
    let held;
    try { [held] = (await ask(`/v1/jobs?id=${job.id}&preview=${preview}`)).jobs; } catch { continue; }
    if (preview) pause = Math.max(POLL, 9 * (performance.now() - began));  // decoding one takes the engine's time
    if (!job.over && held) show(held);
  }
}

function follow(job) {
  seen(job, held => {
    job.card.querySelector('progress').value = held.steps_done / held.steps;
    job.card.querySelector('.numbers').textContent = held.running ? `step ${held.steps_done} of ${held.steps}`
      : held.state === 'loading' ? 'loading the LoRA' : 'waiting';
  }, POLL, false);
  seen(job, held => { if (held.preview) job.card.querySelector('img').src = held.preview; }, POLL, true);
}

async function one(method, body, card, signal) {
  const job = {id: newId(), card, over: false};
  follow(job);
  try {
    const held = await ask('/v1/images/generations', {
      method: 'POST', body: JSON.stringify({...body, method, request_id: job.id}), signal,
    });
    const made = held.pnp_trt, source = `data:image/png;base64,${held.data[0].b64_json}`;
    const [parameters] = made.images, seconds = made.seconds - made.waited;
    job.over = true;
    card.querySelector('img').src = source;
    card.querySelector('.numbers').textContent =
      `${made.evaluations} evaluations, ${seconds.toFixed(2)} s, w ${parameters.guidance}, seed ${parameters.seed}`;
    const cut = [parameters.dropped, parameters.negative_dropped].filter(Boolean).join(' … ');
    if (cut) Object.assign(card.querySelector('.cut'), {textContent: `Not read, as the prompt is too long: ${cut}`, hidden: false});
    const save = card.querySelector('.save');
    Object.assign(save, {href: source, download: `${parameters.seed}-${method}.png`, hidden: false});
    save.setAttribute('aria-label', `Save the image of ${WORDS[method] || method} as PNG`);
    return {method: parameters.method, source, evaluations: made.evaluations, seconds};
  } catch (error) {
    card.querySelector('.numbers').textContent = signal.aborted ? 'cancelled' : error.message;
    throw error;
  } finally {
    job.over = true;
    card.querySelector('.frame').classList.add('done');
  }
}

function remember(request, results) {
  const best = results[0], item = document.createElement('li'), button = document.createElement('button');
  const image = new Image(), words = document.createElement('span'), numbers = document.createElement('span');
  const seed = document.createElement('span');
  image.src = best.source;
  image.alt = '';
  words.textContent = request.prompt;
  numbers.textContent = `w ${request.w}, ${request.steps} steps${request.lora ? `, ${request.lora} ${request.scale}` : ''}`;
  seed.textContent = `seed ${request.seed}`;
  button.type = 'button';
  button.title = `${request.prompt}: use these settings again`;
  button.append(image, words, numbers, seed);
  button.addEventListener('click', () => {
    for (const name of SETTINGS) fields[name].value = request[name];
    fields.weights.checked = request.weights;
    chooseEngine();
    fields.steps.value = request.steps;
    showValues();
    fields.prompt.focus();
    say('The settings of that image are set.');
  });
  item.append(button);
  byId('history-empty').hidden = true;
  byId('history').prepend(item);
  while (byId('history').children.length > KEPT) byId('history').lastElementChild.remove();
}

function bodyOf(request) {
  const body = {
    prompt: request.prompt, model: request.engine, guidance_scale: Number(request.w), seed: Number(request.seed),
    num_inference_steps: Number(request.steps),
  };
  if (request.negative) body.negative_prompt = request.negative;
  if (request.schedule) body.schedule = request.schedule;
  if (request.weights) body.prompt_syntax = 'a1111';
  if (request.lora) body.lora = {name: request.lora, scale: Number(request.scale)};
  return body;
}

function busy(stop) {
  running = stop;
  byId('go').disabled = Boolean(stop);
  byId('stop').disabled = !stop;
}

async function generate(event) {
  event.preventDefault();
  if (running) return;
  if (!chosen()) { await start(); if (!chosen()) return; }
  const request = {weights: fields.weights.checked};
  for (const name of SETTINGS) request[name] = fields[name].value;
  const methods = methodsOf(chosen(), request.negative).slice(0, fields.compare.checked ? 2 : 1);
  const body = bodyOf(request), stop = new AbortController(), results = [];
  const cards = methods.map(method => cardFor(method, request.prompt));
  byId('verdict').textContent = '';
  byId('cards').replaceChildren(...cards);
  if (byId('result').getBoundingClientRect().top > innerHeight / 2) byId('result').scrollIntoView();  // below the form
  busy(stop);
  say('Generating …');
  let failure = null;
  for (let i = 0; i < methods.length && !failure; i++) {  // one after the other, so that the times compare
    const sent = methods[i] === 'unguided' ? {...body, negative_prompt: undefined} : body;
    try { results.push(await one(methods[i], sent, cards[i], stop.signal)); } catch (error) { failure = error; }
  }
  busy(null);
  if (failure) {
    for (const card of cards.slice(results.length + 1)) card.remove();
    if (stop.signal.aborted) say('Cancelled.');
    else say(failure.message, true);
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
  if (running) running.abort();  // the server ends the requests of a client that goes
}

byId('form').addEventListener('submit', generate);
byId('stop').addEventListener('click', cancel);
byId('dice').addEventListener('click', () => { fields.seed.value = crypto.getRandomValues(new Uint32Array(1))[0] >>> 1; });
fields.engine.addEventListener('change', chooseEngine);
fields.negative.addEventListener('input', showValues);
fields.key.addEventListener('change', start);
for (const name of ['w', 'steps']) fields[name].addEventListener('input', showValues);
fields.prompt.addEventListener('keydown', event => {
  if (event.key === 'Enter' && (event.ctrlKey || event.metaKey)) byId('form').requestSubmit();
});
document.addEventListener('keydown', event => { if (event.key === 'Escape') cancel(); });
start();
