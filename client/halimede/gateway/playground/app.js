// The page: reads its fields, asks the gateway, shows the answers.

import { Refused, ask, base64, key, useKey } from "./api.js";
import { CODE } from "./code.js";
import { facts, h, heatMap, imageRows, map, modelsTable, number, ranking } from "./views.js";

const TABS = ["texts", "rank", "images", "map"];
const EXAMPLES = {
  "text-lines": [
    "The cat sleeps on the sofa.", "A kitten naps on the couch.", "Stock prices fell on Monday.",
    "The market closed lower today.", "How do I bake bread at home?", "A recipe for a simple loaf",
  ],
  query: "How can I make my house warmer?",
  documents: [
    "Insulating the attic keeps heat inside in winter.", "The museum opens at nine on weekdays.",
    "A heat pump warms rooms and uses little electricity.",
    "Thick curtains stop draughts from old windows.", "Penguins huddle together against the cold.",
  ],
  "image-texts": ["a photo of a cat", "a red square"],
  lines: [
    "apple", "banana", "cherry", "orange", "bread", "cheese", "Paris", "Rome", "Berlin", "Madrid",
    "Tokyo", "guitar", "violin", "piano", "drums", "trumpet", "football", "tennis", "swimming",
    "cycling", "rain", "snow", "thunder", "sunshine",
  ],
};

const $ = (id) => document.getElementById(id);
const state = { models: [], images: [], tab: "texts", chosen: {}, busy: new Set() };
/** What a tab needs of the model that is chosen. */
const NEEDS = { texts: "embeds_texts", rank: "embeds_texts", images: "embeds_images", map: "embeds_texts" };
const lines = (id) => $(id).value.split("\n").map((line) => line.trim()).filter(Boolean);
const quote = (text) => `“${text.length > 40 ? `${text.slice(0, 39)}…` : text}”`;

function request() {
  return {
    model: $("model").value,
    reranker: $("reranker").value,
    texts: lines("text-lines"),
    query: $("query").value.trim(),
    documents: lines("documents"),
    imageTexts: lines("image-texts"),
    files: state.images.map(({ name, file }) => ({ name, type: file.type })),
    lines: lines("lines"),
  };
}

// ---- each tab: what it asks, and how the answer is shown

const WORK = {
  async texts({ model, texts }) {
    need(model, "No model that embeds texts is served.");
    need(texts.length, "Write at least one text.");
    const answer = await ask("similarity", { model, texts });
    return [heatMap(texts, answer.cosines, answer.texts), mostAlike(texts, answer.cosines)];
  },
  async rank({ model, reranker, query, documents }) {
    need(model || reranker, "No model that embeds or ranks texts is served.");
    need(query, "Write a query.");
    need(documents.length, "Write at least one document.");
    const answer = await ask("rank", { model, reranker, query, documents });
    const scores = answer.cosines ?? answer.scores;
    const best = scores.indexOf(Math.max(...scores));
    const name = answer.cosines ? "cosine" : "score";
    return [
      ranking(documents, answer),
      `The best by ${name}: ${quote(documents[best])}, ${number(scores[best])}.`,
    ];
  },
  async images({ model, imageTexts }) {
    need(model, NO_IMAGES);
    need(state.images.length, "Choose at least one image.");
    need(imageTexts.length, "Write at least one text.");
    const shown = [...state.images];
    const images = await Promise.all(shown.map((image) => base64(image.file)));
    const answer = await ask("images", { model, images, texts: imageTexts });
    return [
      imageRows(imageTexts, shown, answer),
      `${plural(shown.length, "image")} ranked for ${plural(imageTexts.length, "text")}.`,
    ];
  },
  async map({ model, lines }) {
    need(model, "No model that embeds texts is served.");
    need(lines.length >= 3, "Write at least three lines.");
    const answer = await ask("map", { model, texts: lines });
    const share = Math.round(100 * answer.shares.reduce((a, b) => a + b, 0));
    const cut = answer.cut.length ? ` ${plural(answer.cut.length, "line")} cut off.` : "";
    return [
      map(lines, answer),
      `${plural(lines.length, "line")}. The two axes hold ${share} % of the variance.${cut}`,
    ];
  },
};
const NO_IMAGES = "No model that embeds images is served. Build a CLIP, and it shows here.";

function need(value, message) {
  if (!value) throw new Refused(message, 0);
}

const plural = (n, word) => `${n.toLocaleString("en")} ${word}${n === 1 ? "" : "s"}`;

function mostAlike(texts, cosines) {
  let best = null;
  for (let i = 0; i < texts.length; i++)
    for (let j = 0; j < i; j++)
      if (!best || cosines[i][j] > cosines[best[0]][best[1]]) best = [i, j];
  if (!best) return "One text. Write another to compare it with.";
  const [i, j] = best;
  return `Most alike: ${quote(texts[j])} and ${quote(texts[i])}, ${number(cosines[i][j])}.`;
}

async function work(event) {
  event.preventDefault();
  const tab = event.target.dataset.tab;
  if (state.busy.has(tab)) return;
  state.busy.add(tab);
  const button = event.target.querySelector("button.main");
  button.setAttribute("aria-busy", "true");
  $(`${tab}-status`).textContent = "Working …";
  try {
    const [shown, words] = await WORK[tab](request());
    $(`${tab}-result`).replaceChildren(shown);
    $(`${tab}-status`).textContent = words;
    fail("");
  } catch (error) {
    $(`${tab}-status`).textContent = "";
    fail(words(error), error);
  } finally {
    state.busy.delete(tab);
    button.removeAttribute("aria-busy");
  }
}

function words(error) {
  if (!(error instanceof Refused)) return `The page failed: ${error.message}`;
  if (error.status !== 401) return error.message;
  return `${error.message} Enter a key at the top of the page.`;
}

function fail(message, error) {
  $("error").textContent = message;
  $("error").hidden = !message;
  if (!message) return;
  if (error?.status === 401) {
    $("key-box").open = true;
    $("key").focus();
  }
  $("error").scrollIntoView({ block: "nearest" });
}

// ---- models

async function readModels() {
  try {
    state.models = (await ask("models")).models;
    fail("");
  } catch (error) {
    fail(words(error), error);
    return;
  }
  fill("reranker", "ranks");
  if (state.models.some((m) => m.ranks)) $("reranker").append(h("option", { value: "" }, "none"));
  $("all-models").replaceChildren(modelsTable(state.models));
  if (!state.models.some((m) => m.embeds_images)) $("images-status").textContent = NO_IMAGES;
  showModel();
}

/** Lists the models that can do this; the one that was chosen stays so. */
function fill(id, can) {
  const names = state.models.filter((model) => model[can]).map((model) => model.name);
  $(id).replaceChildren(
    ...(names.length
      ? names.map((name) => h("option", { value: name }, name))
      : [h("option", { value: "" }, "none served")]),
  );
  if (names.includes(state.chosen[can])) $(id).value = state.chosen[can];
}

function showModel() {
  fill("model", NEEDS[state.tab]);
  showFacts();
}

function showFacts() {
  const model = state.models.find((m) => m.name === $("model").value);
  $("facts").replaceChildren(...(model ? facts(model) : []));
  showCode();
}

// ---- images

function addImages(files) {
  for (const file of files) {
    if (file.type.startsWith("image/"))
      state.images.push({ name: file.name, file, url: URL.createObjectURL(file) });
    else fail(`${file.name} is no image.`);
  }
  showImages();
}

function showImages() {
  const remove = (image) => {
    state.images = state.images.filter((other) => other !== image);
    showImages();
    $("files").focus();
  };
  $("thumbs").replaceChildren(
    ...state.images.map((image) =>
      h("li", {},
        h("img", { src: image.url, alt: image.name }),
        h("button", { type: "button", "aria-label": `Remove ${image.name}`,
          onclick: () => remove(image) }, "×")),
    ),
  );
  showCode();
}

function setUpDrop() {
  const drop = $("drop");
  $("files").addEventListener("change", () => {
    addImages($("files").files);
    $("files").value = "";
  });
  for (const name of ["dragenter", "dragover"])
    drop.addEventListener(name, (event) => {
      event.preventDefault();
      drop.classList.add("over");
    });
  for (const name of ["dragleave", "drop"])
    drop.addEventListener(name, () => drop.classList.remove("over"));
  drop.addEventListener("drop", (event) => {
    event.preventDefault();
    addImages(event.dataTransfer.files);
  });
}

// ---- code

function showCode() {
  const language = document.querySelector("[name=language]:checked").value;
  $("code").textContent = CODE[state.tab](request())[language];
}

async function copy() {
  try {
    await navigator.clipboard.writeText($("code").textContent);
  } catch {
    // Without TLS there is no clipboard to write to, but a selection can be copied.
    getSelection().selectAllChildren($("code"));
    document.execCommand("copy");
  }
  $("copied").textContent = "";
  $("copied").textContent = "The code is copied.";
  $("copy").textContent = "Copied";
  setTimeout(() => ($("copy").textContent = "Copy"), 1500);
}

// ---- tabs

function choose(tab, focus = false) {
  state.tab = tab;
  for (const name of TABS) {
    const isChosen = name === tab;
    $(`tab-${name}`).setAttribute("aria-selected", isChosen);
    $(`tab-${name}`).tabIndex = isChosen ? 0 : -1;
    $(`panel-${name}`).hidden = !isChosen;
  }
  if (focus) $(`tab-${tab}`).focus();
  history.replaceState(null, "", `#${tab}`);
  showModel();
}

function onTabKey(event) {
  const now = TABS.indexOf(state.tab);
  const next = { ArrowRight: now + 1, ArrowLeft: now - 1, Home: 0, End: TABS.length - 1 }[event.key];
  if (next === undefined) return;
  event.preventDefault();
  choose(TABS[(next + TABS.length) % TABS.length], true);
}

// ---- start

function start() {
  for (const [id, value] of Object.entries(EXAMPLES))
    if (!$(id).value) $(id).value = Array.isArray(value) ? value.join("\n") : value;
  $("key").value = key();
  $("key-form").addEventListener("submit", (event) => {
    event.preventDefault();
    useKey($("key").value.trim());
    readModels();
  });
  for (const tab of TABS) $(`tab-${tab}`).addEventListener("click", () => choose(tab));
  document.querySelector("[role=tablist]").addEventListener("keydown", onTabKey);
  for (const form of document.querySelectorAll("form.ask")) {
    form.addEventListener("submit", work);
    form.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
    });
  }
  document.querySelector("main").addEventListener("input", showCode);
  $("model").addEventListener("change", () => {
    state.chosen[NEEDS[state.tab]] = $("model").value;
    showFacts();
  });
  $("reranker").addEventListener("change", () => (state.chosen.ranks = $("reranker").value));
  $("copy").addEventListener("click", copy);
  setUpDrop();
  const asked = location.hash.slice(1);
  choose(TABS.includes(asked) ? asked : "texts");
  readModels();
}

start();
