// What the page and the worker of a version tell each other.

/** What a file says of itself. */
export interface Card {
  readonly version: number;
  /** Position i is logit i. */
  readonly classes: readonly string[];
}

export interface Score {
  readonly label: string;
  readonly probability: number;
}

/** What one version says about one image. */
export interface Answer {
  readonly version: number;
  /** All classes, the likeliest first; the probabilities sum to 1. */
  readonly scores: readonly [Score, ...Score[]];
  /** 0 (as known images look) to 1 (like nothing that was learned). */
  readonly novelty: number;
}

export type Picture = Blob | ImageBitmap;

export type Request = { readonly id: number } & (
  | { readonly kind: "load"; readonly content: ArrayBuffer }
  | { readonly kind: "classify"; readonly picture: Picture }
);

export type Reply = { readonly id: number } & (
  | { readonly kind: "card"; readonly card: Card }
  | { readonly kind: "answer"; readonly answer: Answer }
  | { readonly kind: "failed"; readonly message: string }
);

/** Return what an error says, whatever was thrown. */
export function reason(error: unknown): string {
  return error instanceof Error ? error.message : String(error);
}
