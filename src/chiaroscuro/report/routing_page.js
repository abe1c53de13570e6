"use strict";
const trace = JSON.parse(document.getElementById("trace").textContent);
const tokens = [...document.querySelectorAll(".token")];
const strips = [...document.querySelectorAll(".strip")];
const panel = document.getElementById("panel");
let shown = "all";

const make = (tag, text) => Object.assign(document.createElement(tag), { textContent: text });
const signed = (value) => (value < 0 ? "−" : "+") + Math.abs(value).toFixed(4);
const visible = (text) => text.replace(/ /g, "␣").replace(/\n/g, "⏎").replace(/\t/g, "⇥") || "…";
const costliest = ({ operators, of }, token) => operators.length > 1 && of[token] === operators.length - 1;

// The threshold nearest to H is the one that a small change would carry the token across.
const nearer = (a, b) => (Math.abs(a) <= Math.abs(b) ? a : b);
const distance = ({ thresholds }, entropy) =>
  (thresholds.length ? signed(thresholds.map((threshold) => entropy - threshold).reduce(nearer)) : "");

function show(choice) {
  shown = choice;
  const layer = choice === "all" ? null : trace.layers[choice];
  tokens.forEach((span, token) => {
    if (layer) span.dataset.op = layer.operators[layer.of[token]]; else delete span.dataset.op;
    if (layer && costliest(layer, token)) span.dataset.lit = ""; else delete span.dataset.lit;
    if (layer && layer.kept && layer.kept[token]) span.dataset.kept = ""; else delete span.dataset.kept;
  });
  document.querySelector(".operators").hidden = !layer;
  document.querySelectorAll(".kept").forEach((note) => { note.hidden = !(layer && layer.kept); });
  document.querySelectorAll(".scale").forEach((scale) => { scale.hidden = !!layer; });
  document.getElementById("choice").textContent = layer && layer.operators.length === 1
    ? "This layer has one operator, so every token goes there." : "";
  document.querySelectorAll(".operators li").forEach((item, op) => {
    item.hidden = layer && !layer.operators.includes(op);
  });
  strips.forEach((strip, number) => { strip.hidden = !!layer && number !== choice; });
  const current = tokens.findIndex((span) => span.classList.contains("here"));
  if (current >= 0) point(current);
}

function point(token) {
  tokens.forEach((span, number) => span.classList.toggle("here", number === token));
  const table = document.createElement("table");
  const head = table.insertRow();
  const keeps = trace.layers.some((layer) => layer.kept);
  ["layer", "operator", "H", "H − τ", "H − null", ...(keeps ? ["kept"] : [])].forEach((name) => head.append(make("th", name)));
  trace.layers.forEach((layer, number) => {
    const row = table.insertRow(), entropy = layer.entropy[token], op = layer.operators[layer.of[token]];
    row.className = number === shown ? "chosen" : "";
    row.append(make("td", number + 1));
    const name = make("span", trace.operators[op]);
    name.className = "sample"; name.dataset.op = op;
    row.insertCell().append(name);
    const numbers = [entropy.toFixed(4), distance(layer, entropy), signed(entropy - trace.null)];
    if (keeps) numbers.push(layer.kept ? `${Math.round(100 * layer.kept[token])}%` : "");
    numbers.forEach((value) => row.append(make("td", value)));
  });
  const gate = trace.gate && (trace.gate.length > 1 ? trace.gate[token] : trace.gate[0]);
  panel.replaceChildren(
    make("h3", visible(tokens[token].textContent)),
    make("p", `token ${token + 1} of ${tokens.length}` + (trace.gate ? `, gate g = ${gate.toFixed(3)}` : "")),
    table,
  );
  strips.forEach((strip) => strip.querySelector(".cursor").setAttribute("d", `M${token + 0.5} 0V100`));
}

const text = document.getElementById("text");
text.addEventListener("mouseover", (event) => {
  const token = tokens.indexOf(event.target);
  if (token >= 0) point(token);
});
// After a hover the panel goes back to the token that holds the focus.
text.addEventListener("mouseleave", () => {
  const token = tokens.indexOf(document.activeElement);
  if (token >= 0) point(token);
});
text.addEventListener("focusin", (event) => {
  tokens.forEach((span) => { span.tabIndex = span === event.target ? 0 : -1; });
  point(tokens.indexOf(event.target));
});
text.addEventListener("keydown", (event) => {
  const last = tokens.length - 1, token = tokens.indexOf(document.activeElement);
  const steps = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: 10, ArrowUp: -10, Home: -last, End: last };
  if (token < 0 || !(event.key in steps)) return;
  event.preventDefault();
  tokens[Math.min(last, Math.max(0, token + steps[event.key]))].focus();
});
strips.forEach((strip) => strip.querySelector("svg").addEventListener("mousemove", (event) => {
  const box = event.currentTarget.getBoundingClientRect();
  const token = Math.floor(tokens.length * (event.clientX - box.left) / box.width);
  if (token >= 0 && token < tokens.length) point(token);
}));
document.querySelectorAll(".layers input").forEach((radio) => radio.addEventListener("change", () => {
  show(radio.value === "all" ? "all" : Number(radio.value));
}));
// A reload can keep the radio button that was chosen.
const chosen = document.querySelector(".layers input:checked").value;
show(chosen === "all" ? "all" : Number(chosen));
