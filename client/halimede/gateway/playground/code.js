// The page's request as code for other programs: curl, OpenAI's SDK, halimede.

import { key } from "./api.js";

const origin = () => new URL(".", location.href).href.replace(/\/$/, "");
const quoted = (value) => JSON.stringify(value);
const list = (texts) =>
  texts.length ? `[\n${texts.map((text) => `    ${quoted(text)},\n`).join("")}]` : "[]";

function curl(path, body) {
  const data = JSON.stringify(body, null, 2).replaceAll("'", "'\\''");
  const auth = key() ? `  -H "Authorization: Bearer $HALIMEDE_KEY" \\\n` : "";
  return `curl ${origin()}${path} \\\n${auth}  -H 'Content-Type: application/json' \\\n  -d '${data}'\n`;
}

function sdk(body, before = "", after = "") {
  const auth = key() ? 'os.environ["HALIMEDE_KEY"]' : '"none"';
  const standard = before + (key() ? "import os\n" : "") + after;
  const imports = standard && `${standard}\n`;
  return `${imports}import numpy as np\nfrom openai import OpenAI\n\nclient = OpenAI(base_url=${quoted(
    `${origin()}/v1`,
  )}, api_key=${auth})\n${body}`;
}

const ours = (imports, body) =>
  `# HALIMEDE_URL is Triton's address, such as 127.0.0.1:8001.\n${imports}\n${body}`;

const PCA = `centred = vectors - vectors.mean(axis=0)
left, lengths, _ = np.linalg.svd(centred, full_matrices=False)
print(left[:, :2] * lengths[:2])
`;

const create = (model, input, extra = "") =>
  `client.embeddings.create(model=${quoted(model)}, input=${input}${extra})`;
const rows = (answer) => `np.array([row.embedding for row in ${answer}.data])`;

function texts({ model, texts }, last = "print(vectors @ vectors.T)\n") {
  return {
    curl: curl("/v1/embeddings", { model, input: texts }),
    openai: sdk(
      `texts = ${list(texts)}\nanswer = ${create(model, "texts")}\n` +
        `vectors = ${rows("answer")}\n${last}`,
    ),
    halimede: ours(
      `${last === PCA ? "import numpy as np\n" : ""}from halimede import Embedder\n`,
      `texts = ${list(texts)}\nwith Embedder(model=${quoted(model)}) as embedder:\n` +
        `    vectors = embedder.embed(texts).vectors\n${last}`,
    ),
  };
}

function rank({ model, reranker, query, documents }) {
  const inputs = `query = ${quoted(query)}\ndocuments = ${list(documents)}\n`;
  const code = { curl: "", openai: inputs, halimede: inputs };
  const imports = [];
  if (model) {
    imports.push("Embedder");
    code.curl +=
      curl("/v1/embeddings", { model, input: [query], input_type: "query" }) +
      curl("/v1/embeddings", { model, input: documents, input_type: "document" });
    const typed = (type) => `, extra_body={"input_type": "${type}"}`;
    code.openai +=
      `asked = ${create(model, "[query]", typed("query"))}\n` +
      `found = ${create(model, "documents", typed("document"))}\n` +
      `print(${rows("found")} @ ${rows("asked")}[0])\n`;
    code.halimede +=
      `with Embedder(model=${quoted(model)}) as embedder:\n` +
      `    asked = embedder.embed([query], input_type="query").vectors\n` +
      `    found = embedder.embed(documents, input_type="document").vectors\n` +
      `print(found @ asked[0])\n`;
  }
  if (reranker) {
    imports.push("Reranker");
    code.curl += curl("/v1/rerank", { model: reranker, query, documents });
    code.openai +=
      `# OpenAI's API has no reranking; its SDK can post to ours.\n` +
      `body = {"model": ${quoted(reranker)}, "query": query, "documents": documents}\n` +
      `print(client.post("/rerank", body=body, cast_to=object))\n`;
    code.halimede +=
      `with Reranker(model=${quoted(reranker)}) as reranker:\n` +
      `    for ranked in reranker.rank(query, documents):\n` +
      `        print(ranked.index, ranked.score)\n`;
  }
  return {
    curl: code.curl,
    openai: sdk(code.openai),
    halimede: ours(`from halimede import ${imports.join(", ")}\n`, code.halimede),
  };
}

function images({ model, imageTexts, files }) {
  const shown = files.length ? files : [{ name: "photo.jpg", type: "image/jpeg" }];
  const names = shown.map(({ name }) => name);
  const auth = key() ? `  -H "Authorization: Bearer $HALIMEDE_KEY" \\\n` : "";
  const data = shown.map(
    ({ name, type }) => `  "data:${type};base64,$(base64 -w 0 '${name.replaceAll("'", "'\\''")}')"`,
  );
  return {
    curl:
      `curl ${origin()}/v2/embed \\\n${auth}  -H 'Content-Type: application/json' \\\n` +
      `  -d @- <<END\n{"model": ${quoted(model)}, "input_type": "image", ` +
      `"embedding_types": ["float"], "images": [\n${data.join(",\n")}\n]}\nEND\n` +
      curl("/v1/embeddings", { model, input: imageTexts }),
    openai: sdk(
      `names = ${list(names)}\n` +
        `types = [mimetypes.guess_type(name)[0] for name in names]\n` +
        `images = [base64.b64encode(Path(name).read_bytes()).decode() for name in names]\n` +
        `# OpenAI's API embeds no images; its SDK can post to Cohere's path.\n` +
        `body = {\n    "model": ${quoted(model)},\n    "input_type": "image",\n` +
        `    "embedding_types": ["float"],\n` +
        `    "images": [f"data:{t};base64,{i}" for t, i in zip(types, images, strict=True)],\n}\n` +
        `seen = client.post(${quoted(`${origin()}/v2/embed`)}, body=body, cast_to=object)\n` +
        `texts = ${list(imageTexts)}\nanswer = ${create(model, "texts")}\n` +
        `print(${rows("answer")} @ np.array(seen["embeddings"]["float"]).T)\n`,
      "import base64\nimport mimetypes\n",
      "from pathlib import Path\n",
    ),
    halimede: ours(
      `from pathlib import Path\n\nfrom halimede import Embedder\n`,
      `images = [Path(name) for name in ${list(names)}]\ntexts = ${list(imageTexts)}\n` +
        `with Embedder(model=${quoted(model)}) as embedder:\n` +
        `    print(embedder.embed(texts).vectors @ embedder.embed_images(images).vectors.T)\n`,
    ),
  };
}

const map = ({ model, lines }) => texts({ model, texts: lines }, PCA);

/** Tab → a function that returns the code of its request in each language. */
export const CODE = { texts, rank, images, map };
