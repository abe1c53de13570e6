"""The style sheet and the script of the routing page (see `routing_html`)."""

STYLE = """
:root{--ink:#241d14;--quiet:#6a5f50;--hair:#d9cdb8;--raised:#fffdf8;--wash:#ffc24a;--null:#3f5f8a;
--threshold:#a32a20;--lit:42%}
@media(prefers-color-scheme:dark){:root{--ink:#e9dfcc;--quiet:#a0937e;--hair:#3a3127;--raised:#1c1712;
--wash:#ffcb66;
--null:#8fb2ff;--threshold:#ff8f7d;--lit:16%}}
*{box-sizing:border-box}
body{margin:0;background:var(--ground);color:var(--ink);
font:17px/1.55 "Iowan Old Style","Palatino Linotype",Palatino,"Book Antiqua","URW Palladio L",Georgia,serif}
header,main{max-width:72rem;margin:auto;padding:0 2rem}
header{padding-top:3.5rem}
.house{margin:0;color:var(--quiet);font-variant:small-caps;letter-spacing:.14em}
h1{margin:.1rem 0 .4rem;font-size:2.7rem;font-weight:400;line-height:1.15;letter-spacing:-.01em}
h2{margin:3.5rem 0 .3rem;font-size:1.5rem;font-weight:400}
.lead{max-width:44rem;margin:0 0 2.2rem;color:var(--quiet);font-size:1.1rem}
.note{max-width:46rem;margin:0 0 1.6rem;color:var(--quiet)}
.layers{display:flex;flex-wrap:wrap;gap:.3rem;margin:0;padding:0;border:0}
.layers legend{float:left;padding:.2rem .6rem .2rem 0;color:var(--quiet);font-variant:small-caps;
letter-spacing:.08em}
.layers input{position:absolute;opacity:0}
.layers span{display:block;min-width:2.1rem;padding:.15rem .6rem;border:1px solid var(--hair);
border-radius:3px;
text-align:center;cursor:pointer;font-variant-numeric:tabular-nums}
.layers .single span{border-style:dashed;color:var(--quiet)}
.layers input:checked+span{background:var(--ink);border-color:var(--ink);color:var(--ground)}
.layers input:focus-visible+span,.token:focus-visible{outline:2px solid var(--null);outline-offset:2px}
.legend{display:flex;flex-wrap:wrap;align-items:baseline;gap:.2rem 1.6rem;min-height:2.2rem;
margin:.9rem 0 1.1rem;
color:var(--quiet)}
.legend p{margin:0}.legend ul{display:flex;gap:1.2rem;margin:0;padding:0;
list-style:none}.legend ul[hidden]{display:none}
.scale .sample{padding:0 .45em;margin-right:.15em}
.reading{display:grid;grid-template-columns:minmax(0,1fr) 23rem;gap:2.5rem;align-items:start}
#text{margin:0;max-height:34rem;overflow:auto;padding:.2rem .3rem;font-size:1.3rem;line-height:2;
white-space:pre-wrap;
overflow-wrap:anywhere}
.token,.sample{border-radius:2px;color:var(--ink);cursor:default}
.token,.depth{background:color-mix(in oklab,var(--wash) calc(var(--depth)*88%),transparent);
box-shadow:inset 0 calc(var(--depth)*-3px) var(--edge)}
:root{--edge:#8f5200}
.token[data-op],.sample[data-op]{background:none;box-shadow:none;color:var(--op);
text-decoration:var(--line);text-underline-offset:.22em}
.token[data-lit],.sample[data-lit]{background:color-mix(in oklab,var(--wash) var(--lit),transparent)}
.token[data-sign]::before{content:attr(data-sign);color:var(--quiet);font-size:.7em;opacity:.8}
.token.here{outline:1.5px solid var(--ink);outline-offset:1px}
@media(prefers-color-scheme:dark){
:root{--edge:transparent}
.token,.depth{background:none;box-shadow:inset 0 calc(var(--depth)*-2px) var(--wash);
color:color-mix(in oklab,var(--wash) calc(var(--depth)*100%),#8d8373);
text-shadow:0 0 calc(var(--depth)*18px) color-mix(in oklab,var(--wash) calc(var(--depth)*65%),transparent)}
.token[data-op]{text-shadow:none}
}
#panel{position:sticky;top:1.2rem;min-height:12rem;max-height:calc(100vh - 2.4rem);overflow:auto;
padding:1rem 1.1rem;
background:var(--raised);border:1px solid var(--hair);border-radius:4px;font-size:.9rem}
#panel .hint{margin:0;color:var(--quiet)}
#panel h3{margin:0 0 .1rem;font-size:1.35rem;font-weight:400;overflow-wrap:anywhere}
#panel p{margin:0 0 .6rem;color:var(--quiet)}
#panel table{width:100%;border-collapse:collapse;font-variant-numeric:tabular-nums}
#panel th{padding:.1rem 0;border-bottom:1px solid var(--hair);color:var(--quiet);font-weight:400;
text-align:right}
#panel td{padding:.12rem 0;text-align:right}
#panel th:nth-child(2),#panel td:nth-child(2){padding-left:.7rem;text-align:left}
#panel tr.chosen td{background:color-mix(in oklab,var(--hair) 55%,transparent)}
.strip{margin:0 0 1.5rem}.strip[hidden]{display:none}
.strip figcaption{margin-bottom:.25rem;color:var(--quiet);font-size:.95rem;font-variant-numeric:tabular-nums}
.strip b{margin-right:.5em;color:var(--ink);font-weight:600}
.plot{position:relative;padding-left:3.2rem}
.plot span{position:absolute;left:0;color:var(--quiet);font-size:.78rem;line-height:1;
font-variant-numeric:tabular-nums}
.plot .top{top:0}.plot .bottom{bottom:0}
svg{display:block;width:100%;height:6.5rem;border:solid var(--hair);border-width:1px 0;overflow:visible}
svg path{fill:none;vector-effect:non-scaling-stroke}
.mark{stroke:var(--op);stroke-width:var(--mark);stroke-linecap:round}
.mark[data-lit]{stroke-linecap:square}
svg .rule{stroke-width:1.5px}svg .null{stroke:var(--null)}svg .threshold{stroke:var(--threshold);
stroke-dasharray:6 4}
.note .rule{display:inline-block;width:1.8em;vertical-align:middle;border-top:2px solid var(--null)}
.note .threshold{border-top:2px dashed var(--threshold)}
.cursor{stroke:var(--ink);stroke-width:1px}
@media(max-width:54rem){.reading{grid-template-columns:1fr;
gap:1.2rem}#panel{position:static}header,main{padding:0 1.1rem}
header{padding-top:2rem}}
"""

SCRIPT = """
"use strict";
const trace = JSON.parse(document.getElementById("trace").textContent);
const tokens = [...document.querySelectorAll(".token")];
const strips = [...document.querySelectorAll(".strip")];
const panel = document.getElementById("panel");
let shown = "all";

const make = (tag, text) => Object.assign(document.createElement(tag), { textContent: text });
const signed = (value) => (value < 0 ? "−" : "+") + Math.abs(value).toFixed(4);
const visible = (text) => text.replace(/ /g, "␣").replace(/\\n/g, "⏎").replace(/\\t/g, "⇥") || "…";
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
  });
  document.querySelector(".operators").hidden = !layer;
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
  ["layer", "operator", "H", "H − τ", "H − null"].forEach((name) => head.append(make("th", name)));
  trace.layers.forEach((layer, number) => {
    const row = table.insertRow(), entropy = layer.entropy[token], op = layer.operators[layer.of[token]];
    row.className = number === shown ? "chosen" : "";
    row.append(make("td", number + 1));
    const name = make("span", trace.operators[op]);
    name.className = "sample"; name.dataset.op = op;
    row.insertCell().append(name);
    const numbers = [entropy.toFixed(4), distance(layer, entropy), signed(entropy - trace.null)];
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
"""
