"use strict";
// All text goes in as text: nothing of a model is read as HTML.
const numbers = JSON.parse(document.getElementById("numbers").textContent);
const map = document.getElementById("map"), detail = document.getElementById("detail");
const play = document.getElementById("play");
const rows = [...map.tBodies[0].rows], cells = rows.map(row => [...row.querySelectorAll(".cell")]);
const columns = cells[0].length;
let here = [0, 0], timer = null;

for (const cell of cells.flat()) {  // the sentence is shown below: a tooltip would say it twice
  cell.setAttribute("aria-label", cell.title);
  cell.removeAttribute("title");
}

function put(parent, name, text, kind) {
  const node = parent.appendChild(document.createElement(name));
  node.textContent = text;
  if (kind) node.className = kind;
  return node;
}

function strip(parent, layer, engine, used, live) {
  const node = put(parent, "div", "", "strip");
  put(node, "span", layer, "plain");
  for (let expert = 0; expert < numbers.experts; expert++) {
    const mine = used.includes(expert), theirs = engine.includes(expert);
    const text = (theirs ? "μ" : "") + (live.includes(expert) ? "π" : "");
    put(node, "span", text, mine ? (theirs ? "both" : "flip") : "");
  }
}

function show(t, column, focus) {
  here = [t, column];
  const cell = cells[t][column];
  for (const other of cells.flat()) {
    other.tabIndex = other === cell ? 0 : -1;
    other.classList.toggle("now", other === cell);
  }
  rows.forEach((row, i) => {
    row.classList.toggle("now", i === t);
    row.classList.toggle("later", timer !== null && i > t);
  });
  if (focus) cell.focus({preventScroll: timer !== null});
  detail.replaceChildren();
  const next = t + 1 >= numbers.from, word = numbers.words;
  put(detail, "h2", `token ${t + 1} of ${rows.length}: ${word[t]}` + (next ? `, then ${word[t + 1]}` : " (prompt)"));
  put(detail, "p", cell.getAttribute("aria-label"));
  const key = put(detail, "div", "", "dim");
  put(key, "span", "", "sample both used");
  key.append(" used, μ's too  ");
  put(key, "span", "", "sample flip used");
  key.append(" used, not μ's: a flip. Letters: who chose it.");
  for (const [m, mode] of numbers.modes.entries()) {
    const box = put(detail, "div", "", "mode");
    put(box, "h3", mode.title + (next ? `; log π ${mode.logprobs[t]}, log μ ${numbers.mu[t]}` : ""));
    box.style.setProperty("--experts", numbers.experts);
    numbers.engine[t].forEach((engine, layer) => strip(box, layer, engine, mode.used[t][layer], mode.live[t][layer]));
  }
}

function stop() {
  clearInterval(timer);
  timer = null;
  play.textContent = "▶ Play";
  rows.forEach(row => row.classList.remove("later"));
}

play.addEventListener("click", () => {
  if (timer !== null) return stop();
  timer = setInterval(() => here[0] + 1 === rows.length ? stop() : show(here[0] + 1, here[1]), 1200);
  play.textContent = "❚❚ Pause";
  show(here[0] + 1 === rows.length ? 0 : here[0], here[1]);
});

const moves = {ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1],
  Home: [0, -columns], End: [0, columns]};
map.addEventListener("keydown", event => {
  const move = moves[event.key];
  if (!move) return;
  event.preventDefault();
  const inside = (x, n) => Math.max(0, Math.min(n - 1, x));
  show(inside(here[0] + move[0], rows.length), inside(here[1] + move[1], columns), true);
});
cells.forEach((line, t) => line.forEach((cell, column) => {
  cell.addEventListener("mouseenter", () => timer === null && show(t, column));
  cell.addEventListener("focus", () => (here[0] !== t || here[1] !== column) && show(t, column));
  cell.addEventListener("click", () => { stop(); show(t, column, true); });
}));

// Begins at the first flip of the response.
const flip = cells.flat().find(cell => cell.dataset.t >= numbers.from && /other/.test(cell.className));
show(flip ? +flip.dataset.t : 0, flip ? cells[flip.dataset.t].indexOf(flip) : 0);
document.documentElement.dataset.ready = "yes";
