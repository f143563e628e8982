// The page of the recommendation service. Whatever is shown is set as text, never as HTML; the address holds the whole state.
"use strict";

const $ = id => document.getElementById(id);
const from = id => $(id).content.firstElementChild.cloneNode(true);
const make = (tag, text = "", give = {}) => Object.assign(document.createElement(tag), { textContent: text }, give);
const count = (n, one, many = one + "s") => `${n.toLocaleString("en")} ${n === 1 ? one : many}`;
const name = p => p.title || p.item;
const path = p => (p.category ?? "").split(" > ").join(" › ");
const amount = n => n.toLocaleString("en", about.currency ? { style: "currency", currency: about.currency } : { minimumFractionDigits: 2, maximumFractionDigits: 2 });
const money = p => p.price == null ? "no price" : amount(p.price);
const DID = { more: "more like this", less: "not for me", purchase: "bought", cart: "in the basket", click: "clicked", view: "looked at", rating: "rated" };
const LEAST = { user: "", basket: [], less: [], model: "", versus: "", k: 10, diversity: 0, order: "score", candidates: "known", lowest: "", highest: "", allowed: [], blocked: [] };
const MOST = 50, PAST = 50;  // the longest list, and the most events of a history, that are asked for
const RULES = ["candidates", "lowest", "highest", "allowed", "blocked"];

let about, state = structuredClone(LEAST), shown = false;
const products = new Map();  // what the service told of each product so far
const know = p => products.set(p.item, p).get(p.item);

// ---------------------------------------------------------------- the service

class Refused extends Error {}  // it answered, and says what is wrong
async function ask(url, body, { signal, headers, keepalive } = {}) {
  const post = body && { method: "POST", body: JSON.stringify(body), headers: { "Content-Type": "application/json", ...headers }, keepalive };
  const answer = await fetch(url, { ...post, signal: AbortSignal.any([AbortSignal.timeout(15000), signal].filter(Boolean)) });
  const told = await answer.json().catch(() => ({}));
  if (!answer.ok) throw told.error ? Object.assign(new Refused(told.error), { status: answer.status }) : new Error(answer.statusText);
  return told;
}
const cause = wrong => wrong instanceof Refused ? wrong.message : "the service does not answer";
const at = (path, query) => `api/${path}?${new URLSearchParams(query)}`;

// ---------------------------------------------------------------- the address

function read() {
  const told = new URLSearchParams(location.search);
  for (const [key, least] of Object.entries(LEAST)) {
    const given = Array.isArray(least) ? [...new Set(told.getAll(key))] : told.get(key) ?? least;
    state[key] = typeof least === "number" ? Number(given) || least : given;
  }
  if (!about.models.includes(state.model)) state.model = about.default;
  if (!about.models.includes(state.versus) || state.versus === state.model) state.versus = "";
  if (!about.prices) Object.assign(state, { order: "score", lowest: "", highest: "" });
  for (const id of ["order", "candidates"]) if (![...$(id).options].some(o => o.value === state[id])) state[id] = LEAST[id];
  state.k = Math.min(MOST, Math.max(1, Math.round(state.k)));
  state.diversity = Math.min(1, Math.max(0, state.diversity));
}

function change(parts, keep = "pushState") {
  Object.assign(state, parts);
  const told = new URLSearchParams();
  for (const [key, least] of Object.entries(LEAST)) {
    const plain = key === "model" ? about.default : least;
    for (const value of [state[key]].flat()) if (value !== plain) told.append(key, value);
  }
  history[keep](null, "", told.size ? `?${told}` : location.pathname);
}

// ---------------------------------------------------------------- search fields that work by keyboard

function combobox(id, find, choose, empty) {
  const input = $(id), box = $(`${id}-found`);
  let found = [], active = -1, typed = false, turn = 0, waiting;
  const close = () => { turn++; typed = false; clearTimeout(waiting); box.hidden = true; active = -1; input.setAttribute("aria-expanded", false); input.removeAttribute("aria-activedescendant"); };
  const mark = i => {
    active = i;
    [...box.children].forEach((o, j) => o.setAttribute("aria-selected", i === j));
    if (i < 0) return input.removeAttribute("aria-activedescendant");
    input.setAttribute("aria-activedescendant", box.children[i].id);
    box.children[i].scrollIntoView({ block: "nearest" });
  };
  const take = i => { const one = found[i]; close(); input.value = ""; choose(one); };
  async function open() {
    const mine = ++turn;
    let got;
    try { got = await find(typed ? input.value.trim() : ""); } catch (wrong) { return failed(wrong); }
    if (mine !== turn) return;
    found = got;
    box.replaceChildren(...found.map((one, i) => {
      const option = make("li", one.text, { id: `${id}-${i}`, role: "option" });
      if (one.more) option.append(make("small", one.more));
      option.addEventListener("pointerdown", e => e.preventDefault());
      option.addEventListener("click", () => take(i));
      return option;
    }));
    if (!found.length) box.append(make("li", empty, { role: "option", ariaDisabled: "true" }));
    box.hidden = false; input.setAttribute("aria-expanded", true);
    mark(-1);
  }
  input.addEventListener("input", () => { typed = true; clearTimeout(waiting); waiting = setTimeout(open, 120); });
  input.addEventListener("click", () => box.hidden && open());
  input.addEventListener("blur", close);
  input.addEventListener("keydown", async e => {
    if (e.isComposing) return;
    if (e.key === "ArrowDown" || e.key === "ArrowUp") {
      e.preventDefault();
      if (box.hidden) await open();
      if (found.length) mark((active + (e.key === "ArrowDown" ? 1 : active < 0 ? 0 : -1) + found.length) % found.length);
    } else if (e.key === "Enter") {
      e.preventDefault();
      if (active < 0 && typed) { clearTimeout(waiting); await open(); }  // what was typed, not what was found before it
      if (!box.hidden && found.length && (active >= 0 || typed)) take(Math.max(active, 0));
    } else if (e.key === "Escape") { if (box.hidden) input.value = ""; close(); }
  });
}

const categories = text => {
  const words = text.toLowerCase().split(/\s+/);
  return about.categories.filter(c => words.every(w => c.toLowerCase().includes(w))).slice(0, 50).map(c => ({ text: c.split(" > ").join(" › "), value: c }));
};

async function people(search) {
  const { users } = await ask(at("users", { search, limit: 20 }));
  const found = users.map(u => ({ text: u.user, more: count(u.events, "event"), value: u.user }));
  return search ? found : [{ text: "New visitor", value: "" }, ...found];
}

async function goods(search) {
  const { items } = await ask(at("items", { search, limit: 20 }));
  return items.map(know).map(p => ({ text: name(p), more: [path(p), about.prices && money(p)].filter(Boolean).join(" · "), value: p }));
}

// ---------------------------------------------------------------- what is said of a product

let visitor;  // the name that a new visitor's answers are written under
const random = () => [...crypto.getRandomValues(new Uint8Array(16))].map(b => b.toString(16).padStart(2, "0")).join("");  // randomUUID is missing where there is no https
const token = () => sessionStorage.getItem("token") ?? "";

function announce(text, label, act, alarm = false) {
  $("said").classList.toggle("alarm", alarm);
  $("said").replaceChildren(make("span", text));
  if (label) $("said").append(make("button", label, { type: "button", onclick: () => { $("said").replaceChildren(); $("list").focus({ preventScroll: true }); act(); } }));
  clearTimeout(announce.gone);
  if (!alarm) announce.gone = setTimeout(() => $("said").replaceChildren(), 9000);
}

async function write(event) {
  const headers = token() ? { Authorization: `Bearer ${token()}` } : {};
  const send = () => ask("api/feedback", event, { headers, keepalive: true });
  await send().catch(wrong => { if (wrong.status < 500) throw wrong; return new Promise(r => setTimeout(r, 400)).then(send); });  // the key makes a second try harmless
}

let unwritten;  // what a new visitor said last can be taken back until it is written: by what is said next, after a while, or when the page is left
function later(told) {
  clearTimeout(later.soon);
  const before = unwritten;
  unwritten = told;
  if (told) later.soon = setTimeout(() => later(), 9000);
  if (before && (about.writing === "open" || token())) write(before).catch(() => {});  // the page keeps what a visitor says in any case
}

const saying = new Map();  // item -> what is being said of it, until the list that follows from it is there
function marks() {
  for (const card of document.querySelectorAll(".card")) {
    const event = saying.get(card.dataset.item);
    card.classList.toggle("said", !!event);
    for (const b of card.querySelectorAll(".say [value]:not([value=''])")) b.ariaPressed = b.value === event ? "true" : null;
  }
}

async function say(event, product, list) {
  if (saying.has(product.item)) return;
  saying.set(product.item, event); marks();
  const { user } = state, words = DID[event][0].toUpperCase() + DID[event].slice(1);
  const told = { key: random(), user: user || (visitor ??= `visitor-${random().slice(0, 12)}`), item: product.item, event, ...(list && { list }) };
  if (!user) {
    const [into, out] = event === "less" ? ["less", "basket"] : ["basket", "less"];
    change({ [into]: [...state[into].filter(i => i !== product.item), product.item], [out]: state[out].filter(i => i !== product.item) });
    later(told);
    announce(`${words}: ${name(product)}`, "Undo", () => unsay(product.item));
    past(); refresh();
    return;
  }
  const attempt = async () => {
    try {
      await write(told);
      announce(`Saved: ${DID[event]}, ${name(product)}`);
      saying.delete(product.item);
      if (state.user === user) { past(); refresh(); }
    } catch (wrong) {
      saying.delete(product.item); marks();
      if (wrong.status === 401) announce(token() ? "Not saved: the token is wrong." : "Not saved: this service needs a token for feedback.", "Enter it", () => $("token").focus(), true);
      else announce(`Not saved: ${cause(wrong)}.`, "Try again", attempt, true);
    }
  };
  await attempt();
}

function unsay(item) {
  if (unwritten?.item === item) unwritten = null;
  saying.delete(item); marks();
  change({ basket: state.basket.filter(i => i !== item), less: state.less.filter(i => i !== item) });
  past(); refresh();
}

// ---------------------------------------------------------------- what is known of the person

function row(product, text, label, act) {
  const li = from("row"), [title, kind, button] = li.querySelectorAll("b, .kind, button");
  title.textContent = title.title = name(product);
  kind.replaceChildren(...text);
  button.textContent = label; button.ariaLabel = `${label}: ${name(product)}`;
  button.onclick = () => { $("past").focus({ preventScroll: true }); act(); };
  button.hidden = !act;
  return li;
}

async function told(item) {
  if (!products.has(item)) try { know((await ask(at("similar", { item, k: 1, model: state.model }))).item); } catch (wrong) { if (!(wrong instanceof Refused)) throw wrong; }
  return products.get(item) ?? { item, unknown: true };
}

async function past() {
  const { user } = state, mine = past.turn = (past.turn ?? 0) + 1;
  try {
    const [had, less] = user ? [(await ask(at("history", { user, limit: PAST }))).events, []] : await Promise.all([state.basket, state.less].map(all => Promise.all(all.map(told))));
    if (mine !== past.turn) return;
    const short = p => p.unknown ? `not known to ${state.model}` : path(p).split(" › ").at(-1);
    if (user) {
      const each = new Map();
      for (const e of had) each.set(e.product.item, [...(each.get(e.product.item) ?? []), e]);
      $("past-title").textContent = "History";
      $("past-note").textContent = had.length < PAST ? had.length ? "" : "Nothing yet." : `The newest ${PAST} events.`;
      $("past-rows").replaceChildren(...[...each.values()].map(events => {
        const rating = events.find(e => e.rating != null)?.rating, when = events.find(e => e.time)?.time;
        const stars = rating != null && make("span", `${Number(rating.toFixed(1))} ★`, { className: "given" });
        const did = [...new Set(events.map(e => DID[e.event] ?? e.event))].filter(d => d !== "rated" || rating == null).join(", ");
        const day = when && make("time", new Date(when).toLocaleDateString("en-GB", { day: "numeric", month: "short", year: "numeric" }), { dateTime: when });
        return row(know(events[0].product), [stars, did, day].filter(Boolean).flatMap((part, i) => i ? [" · ", part] : [part]), "");
      }));
    } else {
      $("past-title").textContent = "Basket";
      $("past-note").textContent = had.length ? "" : "Empty. Add a product, or give feedback on one in the list.";
      $("past-rows").replaceChildren(...had.map(p => row(p, [short(p)], "Remove", () => unsay(p.item))).reverse());
    }
    $("less-part").hidden = !less.length;
    $("less-rows").replaceChildren(...less.map(p => row(p, [short(p)], "Allow again", () => unsay(p.item))).reverse());
  } catch (wrong) {
    if (mine !== past.turn) return;
    if (!(wrong instanceof Refused)) return failed(wrong);
    $("past-title").textContent = "History"; $("past-note").textContent = `${wrong.message}.`; $("past-rows").replaceChildren();
  }
}

// ---------------------------------------------------------------- the lists

const ruled = () => RULES.filter(r => String(state[r]) !== String(LEAST[r]));
const kind = model => model.startsWith("wide-alone") || /^wide-(?!deep)/.test(model) ? "wide" : model.startsWith("deep") ? "deep" : /^(hybrid|wide-deep)/.test(model) ? "hybrid" : "baseline";

function request(model) {
  const number = text => text === "" ? null : Number(text);
  return { ...(state.user ? { user: state.user } : { basket: state.basket.map(item => ({ item })), not_for_me: state.less }), model, k: state.k, diversity: state.diversity, order: state.order, candidates: state.candidates,
    rules: { lowest: number(state.lowest), highest: number(state.highest), allowed: state.allowed, blocked: state.blocked } };
}

let asking, waiting;
const soon = () => { clearTimeout(waiting); waiting = setTimeout(refresh, 150); };

async function refresh() {
  clearTimeout(waiting);
  asking?.abort();
  const mine = asking = new AbortController(), models = [state.model, state.versus].filter(Boolean);
  face(); $("lists").ariaBusy = "true";
  try {
    const one = model => ask("api/recommend", request(model), { signal: mine.signal }).catch(wrong => { if (wrong instanceof Refused) return { model, items: [], error: wrong.message }; throw wrong; });
    const answers = await Promise.all(models.map(one));
    if (mine !== asking) return;  // a later question is under way
    $("trouble").hidden = true; $("lists").classList.remove("old");
    paint(answers);
  } catch (wrong) { if (mine === asking) failed(wrong); }
  finally { if (mine === asking) $("lists").ariaBusy = "false"; }
}

function failed(wrong) {
  $("trouble").hidden = false; $("lists").classList.add("old");
  $("trouble").firstElementChild.textContent = cause(wrong).replace(/^./, c => c.toUpperCase()) + ".";
  if (!shown) $("news").textContent = "";
}

function paint(answers) {
  const lists = $("lists"), before = new Set([...lists.querySelectorAll(".card")].map(c => c.dataset.item)), focus = document.activeElement, within = focus.closest?.(".card");
  const place = within && [[...lists.children].indexOf(within.closest(".column")), [...within.parentNode.children].indexOf(within), [...within.querySelectorAll(".say button")].indexOf(focus)];
  const stood = new Map([...lists.querySelectorAll(".card")].map(c => [c, c.getBoundingClientRect().top]));
  while (lists.children.length > answers.length) lists.lastChild.remove();
  while (lists.children.length < answers.length) lists.append(from("column"));
  lists.classList.toggle("two", answers.length > 1);
  const here = new Set(answers.flatMap(a => a.items.map(p => p.item))), fresh = [...here].filter(i => !before.has(i)).length;
  answers.forEach((answer, i) => column(lists.children[i], answer, answers[1 - i], shown && fresh < here.size ? before : null));  // where all is new nothing is marked
  slide(stood);
  if (!state.user) saying.clear();
  marks();
  if (place && document.activeElement !== focus) {  // what had the focus has moved or gone: the same button, or that of what took its place
    const cards = lists.children[place[0]]?.querySelectorAll(".card") ?? [], next = cards[Math.min(place[1], cards.length - 1)];
    (focus.isConnected ? focus : next?.querySelectorAll(".say button")[Math.max(place[2], 0)] ?? $("list")).focus({ preventScroll: true });
  }
  const both = answers.length > 1 && answers[0].items.filter(p => answers[1].items.some(q => q.item === p.item)).length;
  $("news").textContent = [count(answers[0].items.length, "product"), both !== false && `${both} in both lists`, shown && (fresh === here.size ? "all new" : fresh ? `${fresh} new` : "the same as before")].filter(Boolean).join(", ") + ".";
  shown = true;
}

function column(section, answer, other, before) {
  const [title, cards, note, further] = section.children, known = state.user || state.basket.length;
  const old = new Map([...cards.children].map(c => [c.dataset.item, c])), n = answer.items.length;
  section.dataset.kind = kind(answer.model); section.ariaLabel = `List of ${answer.model}`;
  title.textContent = answer.model;
  section.classList.toggle("empty", !n);
  note.textContent = answer.error ? `${answer.error}.` : (n >= state.k ? "" : ruled().length ? (n ? "The rules leave no more products." : "The rules leave no product.") : n ? "There are no more products." : "Nothing is left: all products are in the history or not wanted.");
  const now = answer.items.map(p => {
    const rank = other?.items.find(q => q.item === p.item)?.rank;
    return card(old.get(p.item) ?? from("card"), know(p), answer, known, rank && `in both: no. ${rank} of ${other.model}`, before && !before.has(p.item));
  });
  for (const gone of old.values()) if (!now.includes(gone)) gone.remove();
  now.forEach((c, i) => { if (cards.children[i] !== c) cards.insertBefore(c, cards.children[i] ?? null); });  // what stays in its place keeps its focus
  const freed = n < state.k && ruled().length && !answer.error;
  further.hidden = !freed && (n < state.k || state.k >= MOST);
  further.textContent = freed ? "Clear the rules" : "Ten more";
  further.onclick = freed ? unrule : () => { change({ k: state.k + 10 }, "replaceState"); refresh(); };
}

function card(li, p, answer, known, both, fresh) {
  const part = what => li.querySelector(what);
  li.dataset.item = p.item; li.classList.toggle("fresh", !!fresh);
  part(".rank").textContent = p.rank;
  part("h3").textContent = part("h3").title = name(p);
  part(".kind").textContent = path(p);
  part(".why").replaceChildren(...(p.because ? [p.because.liked === false ? "because you had " : "because you liked ", make("b", p.because.title || p.because.item)] : [known ? "no single product explains it" : "a first guess: you are new here"]));
  part(".both").textContent = both ?? "";
  part(".stars").textContent = p.stars == null ? "" : `${p.stars.toFixed(1)} ★`;
  part(".stars").title = "predicted stars"; part(".stars").ariaLabel = `predicted ${p.stars?.toFixed(1)} stars`;
  part(".price").textContent = about.prices ? money(p) : ""; part(".price").classList.toggle("none", p.price == null);
  picture(part(".picture"), p);
  for (const button of li.querySelectorAll(".say button")) {
    button.ariaLabel = `${button.textContent}: ${name(p)}`;
    button.onclick = () => button.value ? say(button.value, p, answer.list) : near(li, button, p, answer.model);
  }
  return li;
}

function picture(img, p) {
  const source = at("image", { item: p.item });
  img.hidden = !about.images;
  if (!about.images || img.getAttribute("src") === source) return;
  img.classList.remove("gone");
  img.onerror = () => img.classList.add("gone");  // the place stays, so that titles are in line
  img.src = source;
}

async function near(li, button, product, model) {
  const box = li.querySelector(".similar"), open = box.hidden;
  button.ariaExpanded = String(open);
  box.hidden = !open;
  if (!open) return;
  try {
    const { items } = await ask(at("similar", { item: product.item, k: 5, model }));
    box.replaceChildren(...items.map(know).map(p => {
      const one = from("near"), [title, kind_, price, add] = one.querySelectorAll("b, .kind, .price, button");
      title.textContent = name(p); kind_.textContent = path(p); price.textContent = about.prices ? money(p) : "";
      add.ariaLabel = `Add: ${name(p)}`; add.onclick = () => say("cart", p);
      return one;
    }));
    if (!items.length) box.replaceChildren(make("li", "No similar product."));
  } catch (wrong) { if (wrong instanceof Refused) box.replaceChildren(make("li", wrong.message)); else failed(wrong); }
}

function slide(stood) {
  if (matchMedia("(prefers-reduced-motion: reduce)").matches) return;
  for (const [c, top] of stood) {
    const by = c.isConnected ? top - c.getBoundingClientRect().top : 0;
    if (Math.abs(by) > 1) c.animate([{ transform: `translateY(${by}px)` }, { transform: "none" }], { duration: 220, easing: "ease-out" });
  }
}

// ---------------------------------------------------------------- the controls

function face() {
  const who = state.user || "a new visitor";
  $("whom").textContent = `For ${who}`; document.title = `For ${who} · ${about.dataset}`;
  if (document.activeElement !== $("who")) $("who").value = state.user || "New visitor";
  for (const id of ["model", "versus", "diversity", "order", "candidates", "lowest", "highest"]) if (document.activeElement !== $(id)) $(id).value = state[id];
  for (const option of $("versus").options) option.disabled = option.value === state.model;
  document.querySelector("output").textContent = state.diversity || "none";
  for (const key of ["allowed", "blocked"]) $(key).replaceChildren(...state[key].map(c => {
    const chip = make("button", `${c.split(" > ").join(" › ")} ×`, { type: "button", ariaLabel: `No longer: ${c}`, onclick: () => { $(key === "allowed" ? "allow" : "block").focus(); change({ [key]: state[key].filter(x => x !== c) }); refresh(); } });
    const li = make("li"); li.append(chip); return li;
  }));
  const price = (state.lowest || state.highest) && `price ${[state.lowest && `from ${state.lowest}`, state.highest && `to ${state.highest}`].filter(Boolean).join(" ")}`;
  const parts = [state.candidates !== "known" && $("candidates").selectedOptions[0]?.textContent, price, state.allowed.length && `only ${state.allowed.join(", ")}`, state.blocked.length && `without ${state.blocked.join(", ")}`].filter(Boolean);
  $("ruled").textContent = parts.length ? `: ${parts.join("; ")}` : ""; $("unruled").hidden = !parts.length;
}

function unrule() {
  $("rules").querySelector("summary").focus();
  change(structuredClone(Object.fromEntries(RULES.map(r => [r, LEAST[r]]))));
  refresh();
}

function someone(user) {
  later(); visitor = undefined; shown = false; saying.clear();
  $("who").value = user || "New visitor"; $("who").select();
  change({ user, basket: [], less: [], k: LEAST.k });
  past(); refresh();
}

function listen() {
  combobox("who", people, one => someone(one.value), "No user found.");
  combobox("add", goods, one => say("cart", one.value), "No product found.");
  for (const [id, key] of [["allow", "allowed"], ["block", "blocked"]]) combobox(id, async text => categories(text), one => { change({ [key]: [...new Set([...state[key], one.value])] }); refresh(); }, "No category found.");
  $("who").addEventListener("focus", () => $("who").select());
  $("who").addEventListener("blur", face);
  for (const id of ["model", "versus", "order", "candidates"]) $(id).addEventListener("change", () => { change({ [id]: $(id).value, ...(id === "model" && $(id).value === state.versus && { versus: "" }) }); shown &&= id !== "model"; refresh(); });
  for (const id of ["diversity", "lowest", "highest"]) $(id).addEventListener("input", () => { change({ [id]: id === "diversity" ? Number($(id).value) : $(id).value }, "replaceState"); face(); soon(); });
  $("controls").addEventListener("submit", e => e.preventDefault());
  $("unruled").addEventListener("click", unrule);
  $("trouble").querySelector("button").addEventListener("click", () => { past(); refresh(); });
  $("token-part").addEventListener("submit", e => { e.preventDefault(); sessionStorage.setItem("token", $("token").value); $("token").value = ""; keep(); });
  addEventListener("pagehide", () => later());
  addEventListener("popstate", () => {
    read(); shown = false;
    if (!state.basket.concat(state.less).includes(unwritten?.item)) unwritten = null;  // taken back by going back
    past(); refresh();
  });
}

const keep = () => { $("token-note").textContent = token() ? "The token is kept until this tab is closed." : "Without it no feedback is saved."; };

async function start() {
  try { about = await ask("api/about"); }
  catch (wrong) { failed(wrong); return $("trouble").querySelector("button").onclick = () => { $("trouble").hidden = true; start(); }; }
  $("trouble").querySelector("button").onclick = null; $("trouble").hidden = true;
  $("shop").textContent = about.dataset; $("size").textContent = `${count(about.items, "product")} · ${count(about.users, "user")}`;
  const fits = Object.values(about.fits || {}).map(f => f.fit), mixed = fits.includes("released") && fits.includes("tested");
  const option = m => new Option(mixed && about.fits[m].fit === "tested" ? `${m} (tested fit)` : m, m);
  $("model").replaceChildren(...about.models.map(option));
  $("versus").replaceChildren(new Option("no other", ""), ...about.models.map(option));
  $("ordering").hidden = $("prices").hidden = !about.prices;
  document.querySelectorAll(".kinds").forEach(k => { k.hidden = !about.categories.length; });
  $("token-part").hidden = about.writing === "open"; keep();
  $("controls").hidden = false;
  read(); listen(); past(); refresh();
}

start();
