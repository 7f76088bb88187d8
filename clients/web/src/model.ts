// A version that is loaded, as the page sees it.

import type { Answer, Card, Picture, Reply, Request } from "./messages";

type Asked = Request extends infer R ? (R extends Request ? Omit<R, "id"> : never) : never;

interface Waiting {
  resolve(reply: Reply): void;
  reject(error: Error): void;
}

export class Model {
  private readonly worker = new Worker(new URL("./worker.ts", import.meta.url), { type: "module" });
  private readonly waiting = new Map<number, Waiting>();
  private asked = 0;
  private retired = false;
  private card: Card = { version: 0, classes: [] };

  private constructor() {
    this.worker.addEventListener("message", ({ data }: MessageEvent<Reply>) => {
      const waiting = this.waiting.get(data.id);
      this.waiting.delete(data.id);
      if (data.kind === "failed") waiting?.reject(new Error(data.message));
      else waiting?.resolve(data);
      if (this.retired) this.retire();
    });
    this.worker.addEventListener("error", (event) => {
      const said = event.message || "its script did not load";
      // Of one that was replaced, nothing is lost: the page has another that answers.
      const failure = this.retired
        ? `version ${this.version} was replaced, and ended (${said})`
        : `the model's thread ended (${said}): load the page again`;
      for (const waiting of this.waiting.values()) waiting.reject(new Error(failure));
      this.waiting.clear();
      if (this.retired) this.retire();
    });
  }

  /**
   * Load a file in a thread of its own, beside whatever is in use.
   *
   * @param content Is handed to that thread, and empty afterwards.
   * @throws Error if it is no model, or does not answer as one.
   */
  static async load(content: ArrayBuffer): Promise<Model> {
    const model = new Model();
    try {
      const reply = await model.ask({ kind: "load", content }, [content]);
      if (reply.kind === "card") model.card = reply.card;
      return model;
    } catch (error) {
      model.worker.terminate();
      throw error;
    }
  }

  get version(): number {
    return this.card.version;
  }

  get classes(): readonly string[] {
    return this.card.classes;
  }

  /** Classify an image: all of the answer is of this version, also while another takes its place. */
  async classify(picture: Picture): Promise<Answer> {
    const reply = await this.ask(
      { kind: "classify", picture },
      picture instanceof ImageBitmap ? [picture] : [],
    );
    if (reply.kind !== "answer") throw new Error("the model's thread gave another reply");
    return reply.answer;
  }

  /** End it once it has answered what it was asked. Nothing may be asked of it any more. */
  retire(): void {
    this.retired = true;
    if (this.waiting.size === 0) this.worker.terminate();
  }

  private ask(asked: Asked, transfer: Transferable[]): Promise<Reply> {
    const id = (this.asked += 1);
    return new Promise((resolve, reject) => {
      this.waiting.set(id, { resolve, reject });
      this.worker.postMessage({ ...asked, id }, transfer);
    });
  }
}
