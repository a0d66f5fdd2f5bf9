// A chat with the server that sent this page, and with nobody else.  What is said stays in this window's memory.
'use strict';

const at = id => document.getElementById(id);
const turns = [];  // {role, content}, as the API takes them
let model = '';
let running = null;  // AbortController of the answer that is coming

function headers() {
  const key = at('key').value;
  return {'Content-Type': 'application/json', ...(key ? {Authorization: 'Bearer ' + key} : {})};
}

function element(tag, className, text) {
  const made = document.createElement(tag);
  made.className = className;
  made.textContent = text;
  return made;
}

// 2.3e-5 with a hyphen at which no line breaks.
function power(value, digits) {
  return value.toExponential(digits).replace('-', '\u2011');
}

// What the server is, and what has been proved of it.
async function introduce() {
  const proof = await fetch('msconv/proof', {headers: headers()}).then(r => r.ok ? r.json() : null).catch(() => null);
  const list = await fetch('v1/models', {headers: headers()}).then(r => r.ok ? r.json() : null).catch(() => null);
  model = list?.data?.[0]?.id || '';
  at('model').textContent = model || 'The server asks for an API key (Settings)';
  document.title = model ? model + ' - chat' : 'Chat';
  if (!proof) { at('proof').textContent = ''; return; }
  if (!proof.chat_template) at('mode').value = 'text';
  const found = proof.proven;
  const who = found && !found.checked_here ? ', as its author claims' : '';
  const rounding = proof.rounding_kernels ? '; not of these kernels, which round (' + proof.rounding_kernels + ')' : '';
  const device = proof.run_on_device ? '' : '; never run on a device before';
  at('proof').textContent = found
    ? `${proof.target}: proven against transformers${who}, largest logit error ` +
      `${power(found.max_abs_logit_error, 1)} (bound ${power(found.bound, 0)})${rounding}${device}`
    : `${proof.target}: UNPROVEN${device}`;
}

// An answer as text, with code between ``` in its own place and what a model thinks folded away.
function render(place, text) {
  place.replaceChildren();
  const thought = /^\s*<think>([\s\S]*?)(<\/think>|$)/.exec(text);
  if (thought) {
    const fold = document.createElement('details');
    fold.append(element('summary', '', thought[2] ? 'Thoughts' : 'Thinking …'), document.createTextNode(thought[1].trim()));
    place.append(fold);
    text = text.slice(thought[0].length).trimStart();
  }
  text.split(/```[^\n`]*\n?/).forEach((piece, i) => {
    if (piece) place.append(i % 2 ? element('pre', '', piece) : document.createTextNode(piece));
  });
}

function add(role, text) {
  const turn = element('div', 'turn ' + role, '');
  const said = element('div', 'said', text);
  turn.append(said);
  at('log').append(turn);
  at('log').scrollTop = at('log').scrollHeight;
  return {turn, said};
}

function request(prompt) {
  const common = {
    model, stream: true, stream_options: {include_usage: true},
    temperature: Number(at('temperature').value), max_tokens: Number(at('most').value),
  };
  if (at('mode').value === 'text') return ['v1/completions', {...common, prompt}];
  const system = at('system').value ? [{role: 'system', content: at('system').value}] : [];
  return ['v1/chat/completions', {...common, messages: [...system, ...turns]}];
}

// The events of a stream, each a parsed object.
async function* events(response) {
  const reader = response.body.getReader(), decoder = new TextDecoder();
  let rest = '';
  for (;;) {
    const {done, value} = await reader.read();
    if (done) return;
    rest += decoder.decode(value, {stream: true});
    const lines = rest.split('\n');
    rest = lines.pop();
    for (const line of lines) {
      const data = line.startsWith('data:') ? line.slice(5).trim() : '';
      if (data === '[DONE]') return;
      if (data) yield JSON.parse(data);
    }
  }
}

function reason(status, body) {
  try {
    const found = JSON.parse(body);
    return found.error?.message || found.message || found.error || body;
  } catch { return body || 'HTTP ' + status; }
}

async function ask(prompt) {
  const isText = at('mode').value === 'text';
  if (!isText) turns.push({role: 'user', content: prompt});
  add('user', prompt);
  const {turn, said} = add('assistant', '');
  const speed = element('p', 'speed', '…');
  turn.append(speed);
  const begun = performance.now();
  let text = '', first = 0, count = 0, painted = 0, usage = null, stopped = '';
  const paint = () => {
    render(said, text);
    if (first) tell(speed, begun, first, count, null, '');
    at('log').scrollTop = at('log').scrollHeight;
  };
  const [path, body] = request(prompt);
  running = new AbortController();
  busy(true);
  try {
    const response = await fetch(path, {method: 'POST', headers: headers(), body: JSON.stringify(body), signal: running.signal});
    if (!response.ok) throw new Error(reason(response.status, await response.text()));
    for await (const event of events(response)) {
      if (event.error) throw new Error(event.error.message || String(event.error));
      usage = event.usage || usage;
      const choice = event.choices?.[0];
      const piece = choice?.text ?? ((choice?.delta?.reasoning_content || '') + (choice?.delta?.content || ''));
      if (!piece) continue;
      first = first || performance.now();
      count += 1;
      text += piece;
      if (performance.now() - painted < 50) continue;
      paint();
      painted = performance.now();
      await new Promise(resolve => setTimeout(resolve));  // clicks come in between, however fast the tokens are
    }
  } catch (error) {
    if (error.name === 'AbortError') stopped = ', stopped';
    else turn.append(element('p', 'wrong', String(error.message || error)));
  }
  paint();
  running = null;
  busy(false);
  tell(speed, begun, first, count, usage, stopped);
  if (!isText && text) turns.push({role: 'assistant', content: text.replace(/^\s*<think>[\s\S]*?<\/think>\s*/, '')});
  if (!isText && !text) turns.pop();
}

// Tokens, the time to the first of them, and how many a second after it.
function tell(place, begun, first, count, usage, stopped) {
  const tokens = usage ? usage.completion_tokens : count;
  const seconds = (performance.now() - first) / 1000;
  const parts = [];
  if (usage) parts.push(usage.prompt_tokens + ' tokens in');
  if (tokens) parts.push((usage ? '' : 'about ') + tokens + ' tokens out');
  if (first) parts.push('first after ' + ((first - begun) / 1000).toFixed(2) + ' s');
  if (first && tokens > 1 && seconds > 0) parts.push(((tokens - 1) / seconds).toFixed(1) + ' tokens/s');
  place.textContent = parts.join(', ') + stopped;
}

function busy(is) {
  at('send').hidden = is;
  at('stop').hidden = !is;
}

at('form').addEventListener('submit', event => {
  event.preventDefault();
  const prompt = at('text').value;
  if (!prompt.trim() || running) return;
  at('text').value = '';
  ask(prompt);
});
at('text').addEventListener('keydown', event => {
  if (event.key === 'Enter' && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    at('form').requestSubmit();
  }
});
at('stop').addEventListener('click', () => running?.abort());
at('anew').addEventListener('click', () => {
  running?.abort();
  turns.length = 0;
  at('log').replaceChildren();
  at('text').focus();
});
at('key').addEventListener('change', introduce);
introduce();
at('text').focus();
