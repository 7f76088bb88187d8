// Follows the folder that `inflora-edge follow` keeps, as any web server hands it out: `state.json`
// names the active version and its hash, and is replaced in one step.

import { reason } from "./messages";
import { Model } from "./model";

/** How often a file may fail before it is left alone; as devices do. */
const TRIES = 3;

export interface Held {
  readonly version: number;
  readonly sha256: string;
}

export interface Listener {
  /** A version is being fetched; `share` is 0 to 1, or null if nobody knows. */
  onProgress(version: number, share: number | null): void;
  /** A version is there, and passed its test. */
  onModel(model: Model): void;
  /** There was no update: why. */
  onProblem(message: string): void;
  /** All is well, whether or not there was an update. */
  onLooked(): void;
}

/** What is wrong with a file, and not with the line. */
class BadFile extends Error {}

export class Follower {
  private stopped = new AbortController();
  private active: string | undefined;
  private readonly failed = new Map<string, number>();

  /**
   * @param folder Ends with a slash.
   * @param seconds Between two looks.
   */
  constructor(
    private readonly folder: URL,
    private readonly seconds: number,
    private readonly listener: Listener,
  ) {}

  /** Look again and again, until `stop`. */
  async start(): Promise<void> {
    this.stopped = new AbortController();
    const { signal } = this.stopped;
    while (!signal.aborted) {
      try {
        await this.look(signal);
        if (!signal.aborted) this.listener.onLooked();
      } catch (error) {
        if (!signal.aborted) this.listener.onProblem(reason(error));
      }
      await new Promise((resolve) => setTimeout(resolve, 1000 * this.seconds));
    }
  }

  /** Leave the model alone, whatever is on its way. */
  stop(): void {
    this.stopped.abort();
    this.active = undefined;
  }

  private async look(signal: AbortSignal): Promise<void> {
    const held = await this.state(signal);
    if (held.sha256 === this.active) return;
    const failures = this.failed.get(held.sha256) ?? 0;
    if (failures >= TRIES) {
      throw new Error(`version ${held.version} failed ${TRIES} times, and is not tried again`);
    }
    try {
      const model = await this.fetched(held, failures > 0, signal);
      if (signal.aborted) {
        model.retire();
        return;
      }
      this.active = held.sha256;
      this.failed.delete(held.sha256);
      this.listener.onModel(model);
    } catch (error) {
      if (error instanceof BadFile) this.failed.set(held.sha256, failures + 1);
      throw error;
    }
  }

  private async state(signal: AbortSignal): Promise<Held> {
    const address = new URL("state.json", this.folder);
    const response = await answered(address, { cache: "no-store", signal });
    if (response.status === 404) {
      throw new Error(
        `there is no model at ${address.pathname} yet: ` +
          "have `inflora-edge follow` keep that folder, or drop a model.onnx here",
      );
    }
    if (!response.ok) throw new Error(`${address.pathname}: the web server says ${response.status}`);
    const said: unknown = await response.json().catch(() => null);
    const held = (said as { active?: Held | null } | null)?.active;
    if (held === null) throw new Error("no version was fetched by `inflora-edge follow` yet");
    if (!Number.isInteger(held?.version) || !/^[0-9a-f]{64}$/.test(held?.sha256 ?? "")) {
      throw new Error(`${address.pathname} is not what \`inflora-edge follow\` writes`);
    }
    return held as Held;
  }

  private async fetched(held: Held, again: boolean, signal: AbortSignal): Promise<Model> {
    const { version, sha256 } = held;
    if (!("subtle" in crypto)) {
      throw new Error("browsers check models on https and localhost alone: open the page from there");
    }
    this.listener.onProgress(version, null);
    const response = await answered(new URL(`${version}-${sha256}.onnx`, this.folder), {
      // What failed must not come from the browser's own cache.
      cache: again ? "reload" : "default",
      signal,
    });
    if (!response.ok) throw new Error(`version ${version}: the web server says ${response.status}`);
    const content = await received(response, (share) => this.listener.onProgress(version, share));
    if ((await hashed(content)) !== sha256) {
      throw new BadFile(`version ${version} was damaged on its way, or on the web server's disk`);
    }
    try {
      const model = await Model.load(content);
      if (model.version === version) return model;
      model.retire();
      throw new Error(`it says that it is version ${model.version}`);
    } catch (error) {
      throw new BadFile(`version ${version} failed its test: ${reason(error)}`, { cause: error });
    }
  }
}

async function answered(address: URL, options: RequestInit): Promise<Response> {
  try {
    return await fetch(address, options);
  } catch (error) {
    throw new Error(`${address.pathname}: the web server does not answer`, { cause: error });
  }
}

async function received(
  response: Response,
  onShare: (share: number | null) => void,
): Promise<ArrayBuffer> {
  // What is compressed on its way is longer than announced: then nobody knows the share.
  const coded = response.headers.get("Content-Encoding") !== null;
  const total = coded ? 0 : Number(response.headers.get("Content-Length"));
  const pieces: Uint8Array<ArrayBuffer>[] = [];
  let size = 0;
  const reader = response.body?.getReader();
  try {
    for (let piece = await reader?.read(); piece?.value; piece = await reader?.read()) {
      pieces.push(piece.value);
      size += piece.value.length;
      onShare(total ? Math.min(size / total, 1) : null);
    }
  } catch (error) {
    throw new Error("the line was cut while a version was fetched", { cause: error });
  }
  return new Blob(pieces).arrayBuffer();
}

async function hashed(content: ArrayBuffer): Promise<string> {
  const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", content));
  return Array.from(digest, (byte) => byte.toString(16).padStart(2, "0")).join("");
}
