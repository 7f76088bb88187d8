// The thread of one version. It ends with it: memory that WebAssembly took is never given back
// otherwise, and a model that breaks takes nothing else along.

import * as ort from "onnxruntime-web/wasm";
import runtime from "onnxruntime-web/ort-wasm-simd-threaded.wasm?url";

import { readCard } from "./card";
import { reason, type Answer, type Card, type Reply, type Request, type Score } from "./messages";
import { pixelsOf, type Pixels } from "./pixels";

const IMAGES = "images";
const OUTPUTS = ["logits", "probabilities", "novelty"] as const;

ort.env.wasm.wasmPaths = { wasm: new URL(runtime, self.location.href).href };
// Threads share memory, which browsers allow to pages alone that are isolated (COOP and COEP).
ort.env.wasm.numThreads = self.crossOriginIsolated ? Math.min(4, navigator.hardwareConcurrency) : 1;
ort.env.logLevel = "error";

class Version {
  private constructor(
    private readonly session: ort.InferenceSession,
    readonly card: Card,
  ) {}

  /** Load a file, and see that it answers before anything depends on it. */
  static async load(content: ArrayBuffer): Promise<Version> {
    const bytes = new Uint8Array(content);
    const card = readCard(bytes);
    const version = new Version(await session(bytes), card);
    const { scores, novelty } = await version.classify(noise());
    const total = scores.reduce((sum, score) => sum + score.probability, 0);
    if (!(Math.abs(total - 1) < 1e-3 && novelty >= 0 && novelty <= 1)) {
      throw new Error("its answers make no sense");
    }
    return version;
  }

  async classify({ width, height, data }: Pixels): Promise<Answer> {
    const images = new ort.Tensor("uint8", data, [1, height, width, 3]);
    const found = await this.session.run({ [IMAGES]: images }, OUTPUTS);
    const [logits, probabilities, novelty] = OUTPUTS.map((name) => floats(found[name]));
    const labels = this.card.classes;
    if (logits?.length !== labels.length || probabilities?.length !== labels.length) {
      throw new Error(`it has ${labels.length} classes, and answers of another number`);
    }
    const order = [...labels.keys()].sort((a, b) => logits[b]! - logits[a]!);
    const scores = order.map((i): Score => ({ label: labels[i]!, probability: probabilities[i]! }));
    return {
      version: this.card.version,
      scores: scores as [Score, ...Score[]], // a card names at least one class
      novelty: novelty?.[0] ?? NaN,
    };
  }
}

async function session(bytes: Uint8Array): Promise<ort.InferenceSession> {
  try {
    return await ort.InferenceSession.create(bytes, { executionProviders: ["wasm"] });
  } catch (error) {
    throw new Error(`onnxruntime does not load it: ${reason(error)}`, { cause: error });
  }
}

function floats(tensor: ort.Tensor | undefined): Float32Array {
  if (!(tensor?.data instanceof Float32Array)) throw new Error("an output is missing");
  return tensor.data;
}

/** An image of no use, of unequal sides; the same each time. */
function noise(): Pixels {
  const [width, height] = [83, 61];
  let state = 1;
  const data = Uint8Array.from({ length: width * height * 3 }, () => {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
    return state >>> 24;
  });
  return { width, height, data };
}

let version: Version | undefined;

async function answer(request: Request): Promise<Reply> {
  const { id } = request;
  try {
    if (request.kind === "load") {
      version = await Version.load(request.content);
      return { id, kind: "card", card: version.card };
    }
    if (version === undefined) throw new Error("no model is loaded");
    const pixels = await pixelsOf(request.picture);
    return { id, kind: "answer", answer: await version.classify(pixels) };
  } catch (error) {
    return { id, kind: "failed", message: reason(error) };
  }
}

// One after the other: a session runs once at a time.
let last: Promise<void> = Promise.resolve();

self.addEventListener("message", ({ data }: MessageEvent<Request>) => {
  last = last.then(async () => self.postMessage(await answer(data)));
});
