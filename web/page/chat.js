// The page of chat_web.py. It holds the conversation, and sends it along with every message; the
// server remembers nothing. What people or the model write is only ever set as text, never as HTML.

"use strict";

const byId = (id) => document.getElementById(id);
const log = byId("log"), message = byId("message"), problem = byId("problem");

// What a tab keeps over a reload. `forgotten` counts the first messages, which have no room in the
// model's context any more; null is the default that the server tells.
const state = { messages: [], forgotten: 0, attempt: 0, temperature: null, system: null };
const STORED = "chat-hamner";
let about = { prompts: [], system: "", temperature: 1, seed: null };
let making = null; // the answer that is being made: { reply, controller }
const articles = new WeakMap(); // of messages
const divider = element("p", "divider", "Al no longer remembers what stands above");
let isAtEnd = true; // whether the end of the conversation is in sight

class Refused extends Error {} // the server won't answer this; another try would end the same way

// ------------------------------------------------------------------------ what a tab remembers

function remember() {
  try {
    sessionStorage.setItem(STORED, JSON.stringify(state));
  } catch {
    // Storage is full or switched off: the conversation lasts as long as the page.
  }
}

function recall() {
  try {
    const stored = JSON.parse(sessionStorage.getItem(STORED));
    if (stored.messages.every(({ role, content }) => role && typeof content === "string")) {
      Object.assign(state, stored);
    }
  } catch {
    // Nothing is stored, or nothing of ours.
  }
}

// ------------------------------------------------------------------------ elements

function element(name, className, ...children) {
  const made = document.createElement(name);
  made.className = className;
  made.append(...children); // strings become text
  return made;
}

function button(text, action, className = "plain") {
  const made = element("button", className, text);
  made.type = "button";
  made.addEventListener("click", action);
  return made;
}

// Text as it is, but what stands between ``` lines as code.
function paint(place, text) {
  const parts = text.split(/^```.*\n?/m);
  if (parts.length === 1) {
    place.textContent = text;
    return;
  }
  const shown = parts.map((part, i) =>
    i % 2 ? element("pre", "", element("code", "", part.trimEnd())) : part.trim());
  place.replaceChildren(...shown.filter((part) => part !== ""));
}

// The article that shows a message, made at first sight and brought up to date from then on: what
// the user has selected in it stays selected.
function articleOf(entry, index) {
  if (!articles.has(entry)) articles.set(entry, newArticle(entry));
  const made = articles.get(entry), isLast = index === state.messages.length - 1;
  made.classList.toggle("making", making?.reply === entry);
  made.classList.toggle("forgotten", index < state.forgotten);
  const below = [];
  if (isLast && !making) below.push(button("Retry", retry));
  if (entry.note) below.push(element("span", "note", entry.note));
  made.lastChild.replaceChildren(...below);
  made.lastChild.hidden = !below.length;
  return made;
}

function newArticle({ role, content }) {
  const name = role === "user" ? element("h2", "unseen", "You") : element("h2", "", "Al");
  const text = element("div", "text");
  paint(text, content);
  return element("article", role, name, text, element("div", "below"));
}

function emptyState() {
  const prompts = about.prompts.map((prompt) => button(prompt, () => send(prompt), ""));
  return element("div", "empty",
    element("h2", "", "Say something to Al"),
    element("p", "", "Nothing of it leaves this computer."),
    element("div", "prompts", ...prompts));
}

function render() {
  const wanted = state.messages.map(articleOf);
  if (state.forgotten) wanted.splice(state.forgotten, 0, divider);
  if (!wanted.length) wanted.push(emptyState());
  wanted.forEach((part, i) => {
    if (log.children[i] !== part) log.insertBefore(part, log.children[i] ?? null);
  });
  while (log.children.length > wanted.length) log.lastChild.remove();
  byId("send").hidden = Boolean(making);
  byId("stop").hidden = !making;
  byId("clear").disabled = !state.messages.length;
  byId("save").disabled = !answered().length;
  followEnd();
  remember();
}

// Who is at the end of the conversation sees what comes; who has scrolled up to read stays there.
function followEnd() {
  if (isAtEnd) log.scrollTop = log.scrollHeight;
}

function noticeScrolling() {
  isAtEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 48;
}

function tell(text, ...actions) {
  byId("status").replaceChildren(text, ...actions);
}

function complain(text, ...actions) {
  problem.hidden = !text;
  problem.replaceChildren(element("span", "", text), ...actions);
}

// Focus goes on where the user does: never to nothing, and on a touch screen not to where it would
// bring up the keyboard.
function takeFocusFrom(place) {
  if (document.activeElement !== place) return;
  (matchMedia("(pointer: fine)").matches ? message : log).focus({ preventScroll: true });
}

// ------------------------------------------------------------------------ asking

function send(text) {
  if (making || !text.trim()) return;
  state.messages.push({ role: "user", content: text.trim() });
  state.attempt = 0;
  isAtEnd = true;
  answer();
}

function retry() {
  if (making) return;
  const isAnswered = state.messages.at(-1).role === "assistant";
  const earlier = isAnswered ? state.messages.pop() : null;
  state.attempt += 1;
  answer(earlier);
}

// Have the last message answered. If no word of the answer comes, the earlier one stays.
async function answer(earlier = null) {
  const asked = state.messages.slice(state.forgotten);
  const reply = { role: "assistant", content: "" };
  making = { reply, controller: new AbortController() };
  const { signal } = making.controller;
  state.messages.push(reply);
  complain("");
  tell("");
  render();
  takeFocusFrom(document.body);
  try {
    const reason = await hear(await ask(asked, signal), reply);
    if (reason === "length") reply.note = "this is as long as an answer may be";
  } catch (error) {
    if (signal.aborted) reply.note = "stopped";
    else giveBack(error, reply, earlier);
  }
  reply.content = reply.content.trimEnd();
  if (making?.reply === reply) finish(reply);
}

function finish(reply) {
  making = null;
  takeFocusFrom(byId("stop"));
  tell("");
  render();
  byId("spoken").textContent = reply.content; // whole, for screen readers
}

// After an error, put everything back to where the user can go on from.
function giveBack(error, reply, earlier) {
  complain(sentence(error.message));
  if (reply.content) {
    reply.note = "broken off";
    return;
  }
  state.messages.pop();
  if (earlier) state.messages.push(earlier);
  else if (error instanceof Refused) returnToComposer(state.messages.pop().content);
}

function returnToComposer(text) {
  message.value = [text, message.value].filter(Boolean).join("\n\n");
  fitComposer();
}

const sentence = (text) => text.charAt(0).toUpperCase() + text.slice(1).replace(/[^.?!]$/, "$&.");

async function ask(messages, signal) {
  const system = state.system ?? about.system;
  const body = {
    messages: [{ role: "system", content: system }, ...messages.map(bare)],
    temperature: state.temperature ?? about.temperature,
    stream: true,
  };
  if (about.seed !== null) body.seed = about.seed + state.attempt; // or each try would be the same
  const response = await fetch("v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(body),
    signal,
  }).catch(() => {
    throw new Error("the server doesn't answer: is chat_web.py still running?");
  });
  if (response.ok) return response;
  const { error } = await response.json();
  throw response.status < 500 ? new Refused(error.message) : new Error(error.message);
}

const bare = ({ role, content }) => ({ role, content });

// Add an answer's pieces to the reply as they come; returns why it ended.
async function hear(response, reply) {
  let reason = null;
  for await (const line of linesOf(response)) {
    if (line.startsWith(":")) showPlace(Number(/\d+/.exec(line)));
    if (!line.startsWith("data: ")) continue;
    if (line === "data: [DONE]") return reason;
    const { error, forgotten, choices } = JSON.parse(line.slice(6));
    if (error) throw new Error(error.message);
    if (forgotten) forget(forgotten);
    for (const { delta, finish_reason } of choices) {
      if (delta.content) extend(reply, delta.content);
      reason = finish_reason ?? reason;
    }
  }
  throw new Error("the answer broke off: is chat_web.py still running?");
}

async function* linesOf(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read().catch(() => ({ done: true }));
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    yield* lines;
  }
}

function showPlace(before) {
  tell(before ? `waiting for ${before} before you` : "");
}

function forget(count) {
  state.forgotten += count;
  render();
}

function extend(reply, piece) {
  reply.content += piece;
  const place = log.querySelector(".making .text");
  if (making?.reply !== reply || !place) return;
  // Adding to the text that is there leaves alone what the user has selected.
  if (place.childNodes.length && !reply.content.includes("```")) place.firstChild.appendData(piece);
  else paint(place, reply.content);
  followEnd();
}

function stop() {
  making?.controller.abort();
}

// ------------------------------------------------------------------------ the conversation

function clear() {
  stop();
  making = null;
  const { messages, forgotten } = state;
  Object.assign(state, { messages: [], forgotten: 0 });
  complain("");
  render();
  tell("Cleared. ", button("Undo", () => {
    Object.assign(state, { messages, forgotten });
    tell("");
    render();
    takeFocusFrom(document.body);
  }));
  takeFocusFrom(document.activeElement);
}

// The conversation up to its last answer.
function answered() {
  const end = state.messages.findLastIndex(({ role }) => role === "assistant");
  return state.messages.slice(0, end + 1);
}

// One line of training data, as chat.py's /save writes it.
function save() {
  const system = (state.system ?? about.system).trim();
  const first = system ? [{ role: "system", content: system }] : [];
  const row = { messages: [...first, ...answered().map(bare)] };
  const link = element("a", "");
  link.href = URL.createObjectURL(new Blob([JSON.stringify(row) + "\n"]));
  link.download = `chat-${new Date().toISOString().slice(0, 19).replaceAll(/[-:]/g, "")}.jsonl`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
  tell(`Saved as ${link.download}`);
}

// ------------------------------------------------------------------------ settings

function showSettings() {
  byId("system").value = state.system ?? about.system;
  showTemperature(state.temperature ?? about.temperature);
}

function showTemperature(value) {
  byId("temperature").value = value;
  byId("slider").value = value;
}

function setTemperature({ target }) {
  if (!target.checkValidity()) return;
  state.temperature = target.valueAsNumber;
  byId(target.id === "slider" ? "temperature" : "slider").value = target.value;
  remember();
}

function toggleSettings() {
  const isHidden = byId("settings").toggleAttribute("hidden");
  byId("settings-button").setAttribute("aria-expanded", String(!isHidden));
}

// ------------------------------------------------------------------------ the page

function fitComposer() {
  message.style.height = "auto";
  message.style.height = `${message.scrollHeight}px`;
  byId("send").disabled = !message.value.trim();
}

function submit(event) {
  event?.preventDefault();
  if (making || !message.value.trim()) return;
  const text = message.value;
  message.value = "";
  fitComposer();
  send(text);
}

function typed(event) {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) submit(event);
}

// An on-screen keyboard covers what is below it in browsers that don't shrink the page.
function fitToKeyboard() {
  if (visualViewport.scale === 1) document.body.style.height = `${visualViewport.height}px`;
}

function describe({ stage, step, parameters, device, context, checkpoint }) {
  const size = new Intl.NumberFormat("en", { notation: "compact", maximumFractionDigits: 1 });
  const facts = [stage, `step ${step.toLocaleString("en")}`,
    `${size.format(parameters)} parameters`, device, `context ${context.toLocaleString("en")}`];
  byId("about").textContent = facts.join(" \u00b7 ");
  byId("about").title = checkpoint;
}

async function begin() {
  recall();
  render();
  try {
    about = await (await fetch("api/about")).json();
  } catch {
    complain("The server doesn't answer.", button("Try again", () => location.reload()));
    return;
  }
  describe(about);
  byId("temperature").max = about.highest_temperature;
  showSettings();
  render();
}

byId("composer").addEventListener("submit", submit);
message.addEventListener("keydown", typed);
message.addEventListener("input", fitComposer);
byId("stop").addEventListener("click", stop);
byId("clear").addEventListener("click", clear);
byId("save").addEventListener("click", save);
byId("settings-button").addEventListener("click", toggleSettings);
byId("slider").addEventListener("input", setTemperature);
byId("temperature").addEventListener("input", setTemperature);
byId("temperature").addEventListener("change", showSettings); // what isn't valid goes away
byId("system").addEventListener("input", ({ target }) => {
  state.system = target.value;
  remember();
});
byId("defaults").addEventListener("click", () => {
  Object.assign(state, { temperature: null, system: null });
  showSettings();
  remember();
});
addEventListener("keydown", ({ key, isComposing }) => {
  if (key === "Escape" && !isComposing) stop();
});
addEventListener("beforeunload", stop);
addEventListener("pagehide", remember);
log.addEventListener("scroll", noticeScrolling);
new ResizeObserver(followEnd).observe(log);
visualViewport?.addEventListener("resize", fitToKeyboard);
begin();
