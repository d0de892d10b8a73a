// What the page shows: elements made of the gateway's answers.

const SVG = "http://www.w3.org/2000/svg";
const dark = matchMedia("(prefers-color-scheme: dark)");
const HEAT = { light: [[240, 244, 252], [28, 78, 178]], dark: [[30, 37, 52], [150, 190, 255]] };

/** Returns an element. A key that starts with "on" is a listener; false and null set nothing. */
export function h(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  set(element, attributes);
  element.append(...children.flat().filter((child) => child !== null && child !== false));
  return element;
}

function svg(tag, attributes, ...children) {
  const element = document.createElementNS(SVG, tag);
  set(element, attributes);
  element.append(...children);
  return element;
}

function set(element, attributes) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value !== null && value !== false) element.setAttribute(name, value);
  }
}

/** A number with a true minus sign, and none before 0. */
export const number = (value, digits = 3) =>
  value.toFixed(digits).replace(/^-(?=[0.]*$)/, "").replace("-", "−");
const count = (value) => value.toLocaleString("en");
const shortened = (text, length) => (text.length > length ? `${text.slice(0, length - 1)}…` : text);

const NO_LIMIT = 2 ** 30;
const limit = ({ max_tokens: tokens }) =>
  tokens === 0 ? "–" : tokens > NO_LIMIT ? "no limit" : count(tokens);

/** The model's facts, as pairs of a term and its value. */
export function facts(model) {
  return [
    ["Kind", model.kind],
    ["Precision", model.precision],
    ["Dimensions", count(model.dims)],
    ["Max tokens", limit(model)],
    ["Space", h("code", {}, model.space)],
    ["Provider", model.provider],
  ].map(([term, value]) => h("div", {}, h("dt", {}, term), h("dd", {}, value)));
}

export function modelsTable(models) {
  const heads = ["Name", "Kind", "Precision", "Dimensions", "Max tokens", "Space", "Provider"];
  return h(
    "table",
    { class: "plain" },
    h("thead", {}, h("tr", {}, heads.map((head) => h("th", { scope: "col" }, head)))),
    h(
      "tbody",
      {},
      models.map((model) =>
        h(
          "tr",
          {},
          h("th", { scope: "row" }, model.name),
          [
            model.kind, model.precision, count(model.dims),
            limit(model), h("code", {}, model.space),
            model.provider,
          ].map((value) => h("td", {}, value)),
        ),
      ),
    ),
  );
}

const LONG = 500;
const SHOWN = 160;

/** A text, the part that the model did not read marked. A long one is folded. */
export function marked(text, told) {
  const isMarked = told && isCut(told);
  const start = isMarked && told.read !== null ? told.read : text.length;
  const [read, rest] = [text.slice(0, start), text.slice(start)];
  const whole = (kept, cut) => [
    kept,
    cut && h("mark", {}, h("span", { class: "visually-hidden" }, "Cut off from here: "), cut),
  ].filter(Boolean);
  const where = rest ? "Cut off where marked" : "Cut off";
  const note = isMarked && h("span", { class: "cut-note" },
    ` ${where}: ${count(told.tokens)} tokens; the model reads ${count(told.max_tokens)}.`);
  if (text.length <= LONG) return [...whole(read, rest), note];
  const begin = read.slice(0, rest ? SHOWN : 2 * SHOWN).replace(/\s\S*$/, "");
  const ends = rest ? `${begin} … ${read.slice(-SHOWN).replace(/^\S*\s/, "")}` : `${begin} …`;
  const excerpt = whole(read.length > 2 * SHOWN ? ends : read, shortened(rest, SHOWN));
  return [
    h("span", { class: "excerpt" }, excerpt), note,
    h("details", { class: "whole" }, h("summary", {}, "Whole text"), h("span", {}, whole(read, rest))),
  ];
}

const isCut = (told) => told.max_tokens > 0 && told.tokens > told.max_tokens;

/** The texts that were cut off, with their marks; nothing if none was. */
export function cutTexts(texts, told) {
  const cut = texts.map((_, index) => index).filter((index) => isCut(told[index]));
  if (!cut.length) return [];
  return [
    h("h3", {}, cut.length === 1 ? "One text was cut off" : `${cut.length} texts were cut off`),
    h("ul", { class: "cut" },
      cut.map((index) =>
        h("li", {}, h("b", {}, `${index + 1}. `), marked(texts[index], told[index])),
      )),
  ];
}

function colours(value) {
  const [low, high] = HEAT[dark.matches ? "dark" : "light"];
  const share = Math.min(1, Math.max(0, value));
  const rgb = low.map((from, i) => Math.round(from + (high[i] - from) * share));
  const linear = rgb.map((c) => (c <= 10 ? c / 3294.6 : ((c / 255 + 0.055) / 1.055) ** 2.4));
  const light = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2];
  const ink = (light + 0.05) / 0.05 > 1.05 / (light + 0.05) ? "#000" : "#fff";
  return [`rgb(${rgb.join(" ")})`, ink];
}

/** Colours every cell of a heat map, for the colours that the reader prefers now. */
function paint(root) {
  for (const cell of root.querySelectorAll("[data-value]")) {
    const [ground, ink] = colours(Number(cell.dataset.value));
    cell.style.background = ground;
    cell.style.color = ink;
  }
}
dark.addEventListener("change", () => paint(document));

export function heatMap(texts, cosines, told) {
  const names = texts.map((text) => text || "(empty)");
  const table = h(
    "table",
    { class: "heat" },
    h("caption", { class: "visually-hidden" }, "Cosine of each pair of texts"),
    h("thead", {}, h("tr", {}, h("td"), names.map((name, i) =>
      h("th", { scope: "col", title: name }, String(i + 1))))),
    h("tbody", {}, names.map((name, row) =>
      h("tr", {},
        h("th", { scope: "row", title: name },
          h("span", { class: "n" }, String(row + 1)),
          h("span", { class: "name" }, name),
          h("span", { class: isCut(told[row]) ? "tokens over" : "tokens" },
            told[row].tokens < 0 ? "" : `${count(told[row].tokens)} tokens`)),
        cosines[row].map((value) =>
          h("td", { "data-value": value }, number(value, 2)))))),
  );
  const legend = h("div", { class: "legend", "aria-hidden": "true" },
    h("span", {}, "≤ 0"),
    [0, 0.25, 0.5, 0.75, 1].map((value) => h("i", { "data-value": value })),
    h("span", {}, "1"));
  const shown = h("div", {},
    h("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Heat map" }, table),
    legend, cutTexts(texts, told));
  paint(shown);
  return shown;
}

function meter(name, value, share, isMain) {
  const fill = h("i");
  fill.style.width = `${Math.round(100 * Math.min(1, Math.max(0, share)))}%`;
  return h("div", { class: isMain ? "meter" : "meter other" },
    h("span", {}, `${name} `, h("b", {}, number(value))),
    h("span", { class: "bar", "aria-hidden": "true" }, fill));
}

const bestFirst = (scores) =>
  scores.map((_, index) => index).sort((a, b) => scores[b] - scores[a] || a - b);

/** Documents by cosine and, if there is one, beside that by a reranker; both scores at each. */
export function ranking(documents, answer) {
  const { cosines, scores } = answer;
  const low = scores && Math.min(...scores);
  const high = scores && Math.max(...scores);
  const meters = {
    cosines: (i, isMain) => meter("Cosine", cosines[i], cosines[i], isMain),
    scores: (i, isMain) => {
      const isShare = low >= 0 && high <= 1;
      return meter("Reranker", scores[i], isShare ? scores[i] : (scores[i] - low) / (high - low || 1), isMain);
    },
  };
  const given = [cosines && "cosines", scores && "scores"].filter(Boolean);
  const order = (by) =>
    h("section", { "aria-label": by === "cosines" ? "By cosine" : "By reranker" },
      given.length > 1 && h("h3", {}, by === "cosines" ? "By cosine" : "By reranker"),
      h("ol", { class: "ranked", "data-by": by },
        bestFirst(answer[by]).map((index) =>
          h("li", { "data-index": index },
            h("div", { class: "text" }, marked(documents[index], by === "cosines" && answer.documents[index]),
              by === "scores" && answer.reranker_cut.includes(index) &&
                h("span", { class: "cut-note" },
                  ` Cut off: query and document exceed the reranker's ` +
                  `${count(answer.reranker_max_tokens)} tokens.`)),
            meters[by](index, true),
            given.filter((other) => other !== by).map((other) => meters[other](index, false))))));
  return h("div", { class: given.length > 1 ? "beside" : "" }, given.map(order));
}

/** For each text, the images by their cosine, the best first. */
export function imageRows(texts, images, answer) {
  return h("div", {},
    texts.map((text, row) =>
      h("section", { class: "image-row", "aria-label": text },
        h("h3", {}, text),
        h("ol", { class: "images" },
          bestFirst(answer.cosines[row]).map((index) =>
            h("li", { "data-index": index },
              h("img", { src: images[index].url, alt: images[index].name }),
              h("span", { class: "name", title: answer.images[index] ?? "" }, images[index].name),
              h("b", {}, number(answer.cosines[row][index]))))))),
    cutTexts(texts, answer.texts));
}

const MARGIN = 28;
const narrow = matchMedia("(max-width: 30rem)");

/** Width and height of a map, in units of which one is about a pixel. */
const frame = () => (narrow.matches ? [340, 400] : [720, 480]);

/** Points in the frame, with one scale for both axes. */
function placed(points, [width, height]) {
  const [xs, ys] = [points.map((p) => p[0]), points.map((p) => p[1])];
  const middle = (values) => (Math.min(...values) + Math.max(...values)) / 2;
  const span = (values) => Math.max(...values) - Math.min(...values) || 1e-9;
  const scale = Math.min((width - 2 * MARGIN) / span(xs), (height - 2 * MARGIN) / span(ys));
  return points.map(([x, y]) => [
    width / 2 + (x - middle(xs)) * scale,
    height / 2 - (y - middle(ys)) * scale,
  ]);
}

/** Labels that do not cover each other or a point, for as many points as there is room. */
function labels(lines, places, width) {
  const taken = places.map(([x, y]) => [x - 6, y - 6, x + 6, y + 6]);
  const made = [];
  places.forEach(([x, y], index) => {
    const text = shortened(lines[index], 26);
    const length = text.length * 6.6;
    const right = [x + 8, y - 8, x + 10 + length, y + 8];
    const left = [x - 10 - length, y - 8, x - 8, y + 8];
    const isFree = (box) =>
      box[0] >= 0 && box[2] <= width &&
      !taken.some(([a, b, c, d]) => box[0] < c && a < box[2] && box[1] < d && b < box[3]);
    const box = [right, left].find(isFree);
    if (!box) return;
    taken.push(box);
    made.push(svg("text", { x: box === left ? x - 10 : x + 10, y: y + 4,
      "text-anchor": box === left ? "end" : "start", "aria-hidden": "true" }, text));
  });
  return made;
}

/** A map of lines. One point can be focused; the arrow keys, Home and End move to the others. */
export function map(lines, answer) {
  const [width, height] = frame();
  const places = placed(answer.points, [width, height]);
  const tip = h("div", { class: "tip", hidden: "" });
  const tell = (index) => {
    tip.textContent = lines[index];
    tip.hidden = false;
    const [x, y] = places[index];
    tip.style.left = `${(100 * x) / width}%`;
    tip.style.top = `${(100 * y) / height}%`;
    tip.dataset.side = x > width / 2 ? "left" : "right";
  };
  const hide = () => (tip.hidden = true);
  const dots = places.map(([x, y], index) =>
    svg("circle", { cx: x, cy: y, r: lines.length > 200 ? 4 : 6, role: "img",
      "aria-label": lines[index], tabindex: index ? "-1" : "0", "data-index": index,
      onpointerenter: () => tell(index), onpointerleave: hide,
      onfocus: () => tell(index), onblur: hide }));
  const move = (event) => {
    const now = dots.indexOf(document.activeElement);
    const next = { ArrowRight: now + 1, ArrowDown: now + 1, ArrowLeft: now - 1, ArrowUp: now - 1,
      Home: 0, End: dots.length - 1 }[event.key];
    if (event.key === "Escape") hide();
    if (next === undefined || !dots[next]) return;
    event.preventDefault();
    dots[now]?.setAttribute("tabindex", "-1");
    dots[next].setAttribute("tabindex", "0");
    dots[next].focus();
  };
  const drawing = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "group",
    "aria-label": `Map of ${count(lines.length)} lines. The arrow keys move between them.`,
    onkeydown: move }, ...(lines.length > 60 ? [] : labels(lines, places, width)), ...dots);
  const table = h("details", {},
    h("summary", {}, "The same as a table"),
    h("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Places of the lines" },
      h("table", { class: "plain" },
        h("thead", {}, h("tr", {}, ["Line", "First", "Second"].map((t) => h("th", { scope: "col" }, t)))),
        h("tbody", {}, lines.map((line, i) =>
          h("tr", {}, h("th", { scope: "row" }, line),
            answer.points[i].map((v) => h("td", {}, number(v)))))))));
  return h("div", {}, h("div", { class: "map" }, drawing, tip), table);
}
