"use strict";
// Texts reach the page as text nodes only, never as markup.
const $ = id => document.getElementById(id);
const make = (tag, text, more) => Object.assign(document.createElement(tag), {textContent: text ?? ""}, more);
let count = 0, running = null;

function addItem(list, kind, text) {
  const id = `item-${++count}`, item = make("div", "", {className: "item"});
  const name = make("label", "", {htmlFor: id}), area = make("textarea", "", {id, value: text ?? ""});
  const row = make("div", "", {className: "row"});
  const remove = make("button", "Remove", {type: "button"});
  remove.addEventListener("click", () => { item.remove(); number(list, kind); list.querySelector("textarea")?.focus(); });
  if (kind === "Turn") {
    const role = make("select");
    for (const each of ["user", "assistant", "system"]) role.append(make("option", each, {value: each}));
    role.value = list.children.length % 2 ? "assistant" : "user";
    row.append(role);
  }
  row.append(remove);
  item.append(name, area, row);
  list.append(item);
  number(list, kind);
  return area;
}

function number(list, kind) {
  [...list.children].forEach((item, place) => {
    item.querySelector("label").textContent = `${kind} ${place + 1}`;
    item.querySelector("button").setAttribute("aria-label", `Remove ${kind.toLowerCase()} ${place + 1}`);
    item.querySelector("select")?.setAttribute("aria-label", `Role of turn ${place + 1}`);
    item.querySelector("button").hidden = list.children.length < 2;
  });
}

async function ask(path, body, signal) {
  const headers = {"Content-Type": "application/json"};
  if ($("key").value) headers.Authorization = `Bearer ${$("key").value}`;
  const request = {method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body), signal};
  const answer = await fetch(path, request).catch(error => {
    throw error.name === "AbortError" ? error : new Error("The server does not answer. Is it running?");
  });
  let found = {};
  try { found = await answer.json(); } catch { /* not from this server */ }
  if (answer.status === 401) {
    $("access").hidden = false;
    $("key").focus();
    throw new Error($("key").value ? "The server does not know this API key." : "This server needs an API key.");
  }
  if (!answer.ok) throw new Error(found.error?.message ?? `the server answered ${answer.status}`);
  return found;
}

function tell(text, isError) {
  $("status").textContent = text;
  $("status").className = isError ? "error" : "";
}

async function loadModels() {
  try {
    const names = (await ask("v1/models")).data.map(each => each.id), before = $("model").value;
    $("model").replaceChildren(...names.map(name => make("option", name, {value: name})));
    if (names.includes(before)) $("model").value = before;
    $("choice").hidden = names.length < 2;
    tell("");
  } catch (error) { tell(error.message, true); }
}

function readForm() {
  const isChat = document.querySelector("[name=mode]:checked").value === "chat";
  const model = $("model").value ? {model: $("model").value} : {};
  const texts = list => [...list.querySelectorAll("textarea")];
  if (!isChat) {
    const responses = texts($("answers")).map(each => each.value);
    return {...model, messages: [{role: "user", content: $("prompt").value}], responses};
  }
  const roles = [...$("turns").querySelectorAll("select")];
  return {...model, messages: texts($("turns")).map((each, place) => ({role: roles[place].value, content: each.value}))};
}

function chances(rewards) {
  const top = Math.max(...rewards), weights = rewards.map(reward => Math.exp(reward - top));
  const total = weights.reduce((sum, each) => sum + each, 0);
  return weights.map(each => each / total);
}

function showRewards(rewards) {
  const isOne = rewards.length === 1, share = chances(rewards), top = Math.max(...rewards);
  const ties = rewards.filter(each => each === top).length;
  $("how").textContent = isOne ? "The reward of the last turn." : rewards.length === 2
    ? "Best first. The probability that an answer is preferred is the sigmoid of the difference of the rewards (Bradley-Terry)."
    : "Best first. The probability that an answer is the first choice is the softmax of the rewards (Plackett-Luce); of two of them, the sigmoid of their difference.";
  $("chance-head").hidden = isOne;
  const order = rewards.map((_, place) => place).sort((a, b) => rewards[b] - rewards[a]);
  $("rewards").replaceChildren(...order.map(place => {
    const row = make("tr"), name = make("td", isOne ? "conversation" : `Answer ${place + 1} `);
    if (!isOne && rewards[place] === top) name.append(make("span", ties > 1 ? "tied" : "winner", {className: "best"}));
    const value = make("td", rewards[place].toFixed(4)), chance = make("td", `${(100 * share[place]).toFixed(1)} %`);
    value.dataset.name = "reward"; chance.dataset.name = "best with";
    const last = make("td"), bar = make("span", "", {className: "bar"}), fill = make("i");
    fill.style.width = `${100 * share[place]}%`; bar.append(fill); last.append(bar);
    row.append(name, value, ...(isOne ? [] : [chance, last]));
    return row;
  }));
}

const shown = text => text.replace(/\n/g, "\u21b5\n").replace(/\t/g, "\u21e5\t")
  .replace(/[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u200b-\u200f\u202a-\u202e\u2066-\u2069\ufeff]/g,
    each => `\\u${each.charCodeAt(0).toString(16).padStart(4, "0")}`);
const signed = value => (value < 0 ? "\u2212" : "+") + Math.abs(value).toFixed(4);

function showTrace(row, place, scale, isOne) {
  const changes = row.rewards.map((value, at) => {
    const before = at ? row.rewards[at - 1] : row.before;
    return before === null ? 0 : value - before;
  });
  const box = make("div"), line = make("p", "", {className: "note"}), text = make("div", "", {className: "tokens", tabIndex: 0});
  const title = isOne ? "Last turn" : `Answer ${place + 1}`;
  text.setAttribute("role", "group");
  text.setAttribute("aria-label", `${title}: arrow keys move from token to token`);
  line.setAttribute("aria-live", "polite");
  const describe = at => `token ${at + 1} of ${changes.length}, \u201c${shown(row.tokens[at])}\u201d: reward ${row.rewards[at].toFixed(4)}, change ${signed(changes[at])}`;
  const spans = row.tokens.map((token, at) => {
    const span = make("span", shown(token)), size = Math.min(Math.abs(changes[at]) / scale, 1);
    span.style.backgroundColor = `color-mix(in srgb, var(${changes[at] < 0 ? "--beyond" : "--bar"}) ${(70 * size).toFixed(0)}%, transparent)`;
    span.title = describe(at);
    span.addEventListener("click", () => choose(at));
    return span;
  });
  let now = -1;
  const choose = at => {
    spans[now]?.classList.remove("now");
    now = Math.max(0, Math.min(at, spans.length - 1));
    spans[now].classList.add("now");
    line.textContent = describe(now);
  };
  text.addEventListener("keydown", event => {
    const to = {ArrowRight: now + 1, ArrowLeft: now - 1, Home: 0, End: spans.length - 1}[event.key];
    if (to === undefined || event.ctrlKey || event.altKey || event.metaKey) return;
    event.preventDefault();
    choose(to);
  });
  text.append(...spans);
  const largest = changes.map((_, at) => at).filter(at => changes[at]).sort((a, b) => Math.abs(changes[b]) - Math.abs(changes[a])).slice(0, 5);
  const list = largest.map(at => `\u201c${shown(row.tokens[at]).trim() || "space"}\u201d ${signed(changes[at])}`).join(", ");
  const start = row.before === null ? "" : `Before it ${row.before.toFixed(4)}, after it ${row.reward.toFixed(4)}. `;
  line.textContent = `${start}${list ? `Largest changes: ${list}.` : ""}`;
  box.append(make("h3", title), text, line);
  return box;
}

function showTraces(rows) {
  const sizes = rows.flatMap(row => row.rewards.map((value, at) => {
    const before = at ? row.rewards[at - 1] : row.before;
    return before === null ? 0 : Math.abs(value - before);
  }));
  const scale = sizes.reduce((most, each) => Math.max(most, each), 0) || 1;
  $("legend").textContent = "The reward read after each token is that of the text if it ended there. Blue tokens raised it, red ones lowered it; the strongest color is a change of " + scale.toFixed(4) + ". The model was trained on the last token alone, so values inside a text are hints.";
  $("traces").replaceChildren(...rows.map((row, place) => showTrace(row, place, scale, rows.length === 1)));
}

async function score() {
  running?.abort();
  const own = running = new AbortController();
  tell("Scoring ...");
  try {
    if (!$("model").value) await loadModels();
    const body = readForm();
    const rewards = (await ask("classify", body, own.signal)).data.map(row => row.probs[0]);
    showRewards(rewards);
    $("traces").replaceChildren();
    $("legend").textContent = "Reading the tokens ...";
    $("results").hidden = false;
    $("results").focus({preventScroll: false});
    tell(`${rewards.length} scored`);
    try { showTraces((await ask("trace", body, own.signal)).data); } catch (error) {
      if (error.name !== "AbortError") $("legend").textContent = `Not available: ${error.message}`;
    }
  } catch (error) {
    if (error.name !== "AbortError") { tell(error.message, true); $("results").hidden = true; }
  }
}

$("form").addEventListener("submit", event => { event.preventDefault(); score(); });
document.addEventListener("keydown", event => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); score(); }
});
for (const radio of document.querySelectorAll("[name=mode]")) radio.addEventListener("change", () => {
  $("answers-part").hidden = radio.value !== "answers";
  $("chat-part").hidden = radio.value !== "chat";
});
$("add-answer").addEventListener("click", () => addItem($("answers"), "Answer").focus());
$("add-turn").addEventListener("click", () => addItem($("turns"), "Turn").focus());
$("key").addEventListener("change", loadModels);
addItem($("answers"), "Answer"); addItem($("answers"), "Answer");
addItem($("turns"), "Turn"); addItem($("turns"), "Turn");
loadModels();
