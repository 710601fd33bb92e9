// SPDX-License-Identifier: Apache-2.0
"use strict";
// Names: t a recorded step, l a layer, h a KV head, k an entry of a head's selection.
const DATA = JSON.parse(document.getElementById("data").textContent);
const MISS = 0x8000, ABSENT = 0xffff, SHOWN = 8, TIMES = 160;
const [T, L, H, K] = DATA.shape;
const unpack = (text, kind) =>
  new kind(Uint8Array.from(atob(text), (c) => c.charCodeAt(0)).buffer);
const ends = unpack(DATA.ends, Int32Array), tokens = unpack(DATA.tokens, Int32Array);
const history = unpack(DATA.history, Int32Array);
const estimate = unpack(DATA.estimate, Float32Array);
const selected = unpack(DATA.selected, Uint16Array);
const size = DATA.blockSize, promptTokens = ends[ends.length - 1];
const blocks = history.reduce((a, b) => Math.max(a, b), Math.ceil(promptTokens / size));
const promptBlocks = Math.ceil(promptTokens / size);
const $ = (id) => document.getElementById(id);
const make = (name, text = "", className = "") =>
  Object.assign(document.createElement(name), { textContent: text, className });
const percent = (x) => (Number.isNaN(x) ? "not known" : `${(100 * x).toFixed(1)} %`);
const view = { t: 0, scope: "one", layer: -1, head: -1, sentence: -1 };
// How many of the chosen layers and heads selected a block: [T, blocks]; and at each step
// how many blocks were found and missing. The map, without the step in view.
let counts, hits, misses, picture;

function count() {
  counts = new Uint16Array(T * blocks);
  hits = new Uint32Array(T);
  misses = new Uint32Array(T);
  for (let t = 0; t < T; t++)
    for (let l = 0; l < L; l++) {
      if (view.layer >= 0 && l !== view.layer) continue;
      for (let h = 0; h < H; h++) {
        if (view.head >= 0 && h !== view.head) continue;
        const first = ((t * L + l) * H + h) * K;
        for (let i = first; i < first + K && selected[i] !== ABSENT; i++) {
          counts[t * blocks + (selected[i] & ~MISS)]++;
          if (selected[i] & MISS) misses[t]++;
          else hits[t]++;
        }
      }
    }
  paintMap();
}
const choosers = () => (view.layer < 0 ? L : 1) * (view.head < 0 ? H : 1);
function steps() { // first and behind the last
  if (view.scope === "one") return [view.t, view.t + 1];
  return [0, view.scope === "until" ? view.t + 1 : T];
}
function blockShares(from, to) {
  const shares = new Float64Array(blocks), whole = (to - from) * choosers();
  for (let t = from; t < to; t++)
    for (let b = 0; b < blocks; b++) shares[b] += counts[t * blocks + b] / whole;
  return shares;
}
function sentenceShare(shares, i) { // mean over its tokens
  const start = i ? ends[i - 1] : 0, end = ends[i];
  let sum = 0;
  for (let b = Math.floor(start / size); b * size < end; b++)
    sum += shares[b] * (Math.min(end, (b + 1) * size) - Math.max(start, b * size));
  return sum / (end - start);
}
const level = (share) => Math.min(10, Math.ceil(10 * Math.sqrt(share) - 1e-9));

function sum(values, from, to) {
  let total = 0;
  for (let t = from; t < to; t++) total += values[t];
  return total;
}
function meanEstimate(from, to) {
  let total = 0, n = 0;
  for (let t = from; t < to; t++)
    for (let l = 0; l < L; l++)
      if (view.layer < 0 || l === view.layer) { total += estimate[t * L + l]; n++; }
  return total / n;
}

const spans = DATA.sentences.map((text, i) => {
  const span = make("span", text);
  span.dataset.i = i;
  $("prompt").append(span);
  return span;
});
const buttons = DATA.answer.map((text, token) => {
  const t = tokens.indexOf(token), button = make("button", text);
  button.type = "button";
  button.tabIndex = -1; // the slider is the keyboard's way
  if (t < 0) {
    button.className = "dense";
    button.disabled = true;
    button.title = "no sparse step is recorded for this token";
  } else button.addEventListener("click", () => go(t));
  $("answer").append(button);
  return button;
});

function show() {
  const [from, to] = steps(), shares = blockShares(from, to);
  const kept = [history[2 * view.t] * size, history[2 * view.t + 1] * size];
  const found = spans.map((span, i) => {
    const share = sentenceShare(shares, i);
    const always = ends[i] <= kept[0] || (i ? ends[i - 1] : 0) >= kept[1];
    const name = `h${level(share)}${always ? " kept" : ""}${i === view.sentence ? " chosen" : ""}`;
    if (span.className !== name) span.className = name;
    return share;
  });
  buttons.forEach((b) => b.removeAttribute("aria-current"));
  const current = buttons[tokens[view.t]];
  current.setAttribute("aria-current", "true");
  const box = $("answer"), top = current.offsetTop - box.offsetTop;
  if (top < box.scrollTop || top > box.scrollTop + box.clientHeight - 24) box.scrollTop = top - 24;
  const label = `${tokens[view.t] + 1} of ${DATA.answer.length}: ${JSON.stringify(DATA.answer[tokens[view.t]])}`;
  $("at").textContent = label;
  $("slider").setAttribute("aria-valuetext", label);
  const hit = sum(hits, from, to), miss = sum(misses, from, to);
  $("facts").textContent = `Blocks of heads selected: ${hit} found on the device, ${miss} copied from the swap pool` +
    ` (hit rate ${percent(hit / (hit + miss))}). Estimated share of attention on what was read: ` +
    `${percent(meanEstimate(from, to))}${view.head < 0 ? "" : " (mean over heads)"}.`;
  const order = [...found.keys()].filter((i) => found[i] > 0).sort((a, b) => found[b] - found[a]);
  $("most").replaceChildren(...order.slice(0, SHOWN).map((i) => {
    const item = make("li"), button = make("button", `${percent(found[i])} ${DATA.sentences[i].trim().slice(0, 90)}`);
    button.type = "button";
    button.addEventListener("click", () => choose(i, true));
    item.append(button);
    return item;
  }));
  drawMap();
  if (view.sentence >= 0) describe(found[view.sentence]);
}

function describe(share) {
  const i = view.sentence, box = $("sentence");
  const first = Math.floor((i ? ends[i - 1] : 0) / size), last = Math.floor((ends[i] - 1) / size);
  const [from, to] = steps(), grid = new Uint32Array(L * H);
  for (let t = from; t < to; t++)
    for (let lh = 0; lh < L * H; lh++)
      for (let k = (t * L * H + lh) * K, end = k + K; k < end && selected[k] !== ABSENT; k++) {
        const b = selected[k] & ~MISS;
        if (b >= first && b <= last) { grid[lh]++; break; }
      }
  const lead = make("p", `“${DATA.sentences[i].trim().slice(0, 160)}”`);
  const what = make("p", `Tokens ${(i ? ends[i - 1] : 0)} to ${ends[i] - 1}, blocks ${first} to ${last}: selected by `);
  const strong = make("strong", percent(share));
  strong.id = "share";
  what.append(strong, " of the layers, heads and steps in view.");
  const table = make("table"), head = make("tr");
  table.append(make("caption", "Layers down, KV heads across", "note"), head);
  head.append(make("th"), ...Array.from({ length: H }, (_, h) => make("th", h)));
  for (let l = 0; l < L; l++) {
    const row = make("tr");
    row.append(make("th", DATA.layers[l]));
    for (let h = 0; h < H; h++) {
      const part = grid[l * H + h] / (to - from), cell = make("td", "", `h${level(part)}`);
      cell.title = `layer ${DATA.layers[l]}, head ${h}: ${percent(part)} of the steps`;
      cell.setAttribute("aria-label", cell.title);
      row.append(cell);
    }
    table.append(row);
  }
  const times = make("div", "", "times"), bars = Math.min(T, TIMES);
  times.setAttribute("role", "img");
  times.setAttribute("aria-label", "Share of layers and heads at every token of the answer");
  for (let bar = 0; bar < bars; bar++) {
    const a = Math.floor((bar * T) / bars), b = Math.floor(((bar + 1) * T) / bars);
    const part = sentenceShare(blockShares(a, b), i), mark = make("i");
    mark.style.height = `${100 * part}%`;
    mark.title = `token ${tokens[a] + 1}: ${percent(part)}`;
    times.append(mark);
  }
  box.replaceChildren(lead, what, make("p", "At the answer's tokens, first to last:", "note"), times, table);
}

function paintMap() {
  const map = $("map"), whole = choosers();
  map.width = promptBlocks;
  map.height = T;
  picture = map.getContext("2d").createImageData(promptBlocks, T);
  for (let t = 0; t < T; t++)
    for (let b = 0; b < promptBlocks; b++) {
      const i = 4 * (t * promptBlocks + b);
      picture.data[i] = 232;
      picture.data[i + 1] = 93;
      picture.data[i + 2] = 4;
      picture.data[i + 3] = 255 * Math.sqrt(counts[t * blocks + b] / whole);
    }
}
function drawMap() { // and the step in view as a line
  const context = $("map").getContext("2d");
  context.putImageData(picture, 0, 0);
  context.fillStyle = "rgb(11 87 208 / .35)";
  context.fillRect(0, view.t, promptBlocks, 1);
}

function go(t) {
  view.t = t;
  $("slider").value = t;
  show();
}
function choose(i, scroll) {
  view.sentence = i;
  if (scroll) spans[i].scrollIntoView({ block: "center" });
  show();
}
$("slider").max = T - 1;
$("slider").addEventListener("input", (e) => go(Number(e.target.value)));
$("prompt").addEventListener("click", (e) => {
  if (e.target.dataset.i !== undefined) choose(Number(e.target.dataset.i), false);
});
$("map").addEventListener("click", (e) => {
  const b = Math.floor((e.offsetX / $("map").clientWidth) * promptBlocks);
  view.t = Math.max(0, Math.min(T - 1, Math.floor((e.offsetY / $("map").clientHeight) * T)));
  $("slider").value = view.t;
  choose(Math.max(0, ends.findIndex((end) => end > b * size)), true);
});
document.querySelectorAll("[name=scope]").forEach((radio) =>
  radio.addEventListener("change", () => { view.scope = radio.value; show(); }));
for (const [id, n, name] of [["layer", L, (l) => DATA.layers[l]], ["head", H, (h) => h]]) {
  $(id).append(new Option("all", -1), ...Array.from({ length: n }, (_, i) => new Option(name(i), i)));
  $(id).addEventListener("change", (e) => { view[id] = Number(e.target.value); count(); show(); });
}
for (const share of [0.01, 0.09, 0.25, 0.49, 1])
  $("legend").append(make("span", `${100 * share} %`, `h${level(share)}`));
$("legend").prepend("share of layers and heads: ");
$("about").textContent = `${DATA.model}, policy ${DATA.policy}: ${promptTokens} tokens of prompt, ` +
  `${DATA.budget} of them read a step in each of ${L} layers and ${H} KV heads, by blocks of ${size}. ` +
  "Dotted underline: sinks and recent window, always read." +
  (DATA.question ? ` Question: ${DATA.question}` : "");
if (DATA.leftOut) {
  $("bounded").textContent = `${DATA.leftOut} later steps were not recorded: the record has reached its bound.`;
  $("bounded").hidden = false;
}
count();
show();
